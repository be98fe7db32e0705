"""Few-shot regression of sinusoids: MAML and implicit MAML, each of them one call.

A task is a sine wave of unknown amplitude and phase, given at a handful of points. The upper variable x is the initial
point of a small network, from which each task i adapts its own copy y_i by a few gradient steps; x is good if the
copies then predict *other* points of their tasks well:

    min over x   F(x, y*(x)) = mean over tasks of  loss_i(y*_i(x); query points)
    MAML         y*_i(x) = five gradient steps on loss_i(y; support points), from y = x
    iMAML        y*_i(x) = argmin over y of loss_i(y; support points) + lam/2 |y - x|^2   (sixteen steps of Adam from x)

MAML differentiates through the steps; iMAML states the condition that their end satisfies, and never looks at them. The
tasks of each outer step are drawn inside the compiled loop. The benchmark is synthetic by definition (Finn, Abbeel,
Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017: amplitude in [0.1, 5], phase in
[0, pi], inputs in [-5, 5], ten shots, two hidden layers of 40).

    python examples/few_shot_sinusoid.py
    python examples/few_shot_sinusoid.py --tasks 50 --seed 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, data, hypergradients, lower, solve, solvers

SHOTS, WIDTH = 10, 40
EVALUATED = (0, 1, 5, 10)


def network(y, inputs):
    hidden = jax.nn.relu(inputs[:, None] @ y["w1"] + y["b1"])
    hidden = jax.nn.relu(hidden @ y["w2"] + y["b2"])
    return (hidden @ y["w3"] + y["b3"])[:, 0]


def init_network(key):
    """Weights and biases uniform in +-1/sqrt(inputs of the layer)."""
    sizes = (1, WIDTH, WIDTH, 1)
    parameters = {}
    for layer, (layer_key, rows, columns) in enumerate(
        zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True), 1
    ):
        weights, biases = jax.random.split(layer_key)
        parameters[f"w{layer}"] = jax.random.uniform(weights, (rows, columns), minval=-1, maxval=1) / rows**0.5
        parameters[f"b{layer}"] = jax.random.uniform(biases, (columns,), minval=-1, maxval=1) / rows**0.5
    return parameters


def draw_tasks(key, ranges):
    """A batch of tasks, a leading axis of tasks on each array: support and query points."""
    keys = jax.random.split(key, 4)
    count = len(ranges["tasks"])
    amplitude = jax.random.uniform(keys[0], (count, 1), minval=ranges["amplitude"][0], maxval=ranges["amplitude"][1])
    phase = jax.random.uniform(keys[1], (count, 1), minval=ranges["phase"][0], maxval=ranges["phase"][1])

    def points(key):
        inputs = jax.random.uniform(key, (count, SHOTS), minval=-5, maxval=5)
        return inputs, amplitude * jnp.sin(inputs - phase)

    return {"support": points(keys[2]), "query": points(keys[3]), "amplitude": amplitude, "phase": phase}


def mean_square(y, points):
    inputs, targets = points
    return jnp.mean((network(y, inputs) - targets) ** 2)


def query_loss(x, y, tasks):
    return jax.vmap(mean_square)(y, tasks["query"]).mean()


def support_loss(x, y, tasks):
    return jax.vmap(mean_square)(y, tasks["support"]).sum()


def proximal_loss(lam):
    def loss(x, y, tasks):
        apart = jax.tree.map(lambda x, y: jnp.sum((y - x) ** 2), x, y)
        return support_loss(x, y, tasks) + lam / 2 * optax.tree.sum(apart)

    return loss


def start_at_upper(x, y):
    """A copy of x for every task."""
    return jax.tree.map(jnp.broadcast_to, x, jax.tree.map(jnp.shape, y))


def maml(steps):
    """Five steps of a small network fit into memory many times over: plain reverse mode, without checkpoints."""
    return solvers.HypergradientDescent(
        hypergradients.Unrolled(checkpoint=False),
        lower.GradientDescent(0.01, steps=5, start=start_at_upper),
        decaying_adam(5e-3, steps),
        warm_start=False,
    )


def imaml(steps):
    """Adam and not plain descent inside: nothing keeps the curvature at x small, as differentiating the steps does.

    The linear systems of all tasks are one block-diagonal system, solved by ten steps of CG. They are those of a
    network that is not at its minimum, and CG stops where it meets negative curvature: the hypergradient is rough, and
    much longer runs end at starts so sharp that gradient steps of 0.01 diverge from them.
    """
    return solvers.IMAML(16, optax.adam(0.01), decaying_adam(2e-3, steps), cg_steps=10)


def decaying_adam(rate, steps):
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(rate, steps)))


def meta_train(solver, lower_loss, sampler, tasks, steps, seed):
    x0 = init_network(jax.random.key(seed))
    y0 = jax.tree.map(lambda leaf: jnp.zeros((tasks, *leaf.shape)), x0)
    problem = Problem(query_loss, lower_loss, upper_data=sampler, lower_data=sampler)
    return solve(problem, x0, y0, solver, steps=steps, key=seed)


@jax.jit
def adapted(x, tasks):
    """Parameters after 0, 1, ..., 10 gradient steps from x on each task: a leading axis of steps, one of tasks."""

    def one(support):
        step = lambda y, _: (optax.tree.add_scale(y, -0.01, jax.grad(mean_square)(y, support)), y)
        return jax.lax.scan(step, x, None, length=max(EVALUATED) + 1)[1]

    return jax.vmap(one, out_axes=1)(tasks["support"])


@jax.jit
def errors(x, tasks):
    """Mean square error of the query points after each number of steps, (11, tasks)."""
    return jax.vmap(lambda y: jax.vmap(mean_square)(y, tasks["query"]))(adapted(x, tasks))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="outer steps")
    parser.add_argument("--tasks", type=int, default=25, help="tasks per outer step")
    parser.add_argument("--lam", type=float, default=0.5, help="strength of iMAML's proximal term")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("few_shot_sinusoid.png"))
    args = parser.parse_args(arguments)
    began = time.perf_counter()

    ranges = {"amplitude": np.array([0.1, 5.0], np.float32), "phase": np.array([0, np.pi], np.float32)}
    # Shared: both levels, and all lower steps, see the tasks that are drawn at an outer step.
    sampler = data.Shared(data.Sampler(draw_tasks, {**ranges, "tasks": np.zeros(args.tasks, np.float32)}))
    initial = {"random": init_network(jax.random.key(args.seed))}
    for name, solver, loss in (
        ("MAML", maml(args.steps), support_loss),
        ("iMAML", imaml(args.steps), proximal_loss(args.lam)),
    ):
        solution = meta_train(solver, loss, sampler, args.tasks, args.steps, args.seed)
        print(f"{name}: {solution}\n")
        initial[name] = solution.x

    fresh = draw_tasks(jax.random.key(args.seed + 1), {**ranges, "tasks": np.zeros(600, np.float32)})
    found = {name: np.asarray(errors(x, fresh)) for name, x in initial.items()}
    print("  mean square error on 600 fresh tasks after k gradient steps on ten points (95 % interval at 10 steps)")
    print(f"  {'initial point':<14}" + "".join(f"{f'k = {k}':>9}" for k in EVALUATED))
    for name, error in found.items():
        interval = 1.96 * error[EVALUATED[-1]].std(ddof=1) / error.shape[1] ** 0.5
        print(f"  {name:<14}" + "".join(f"{error[k].mean():9.3f}" for k in EVALUATED) + f"  (+- {interval:.3f})")
    draw(args.out, initial, found, fresh)
    print(f"\n  picture: {args.out}; {time.perf_counter() - began:.1f} s in all")
    return {name: error.mean(1) for name, error in found.items()}


def draw(path, initial, found, tasks, shown=0):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    *curves, last = figure.subplots(1, len(initial) + 1)
    grid = np.linspace(-5, 5, 300, dtype=np.float32)
    truth = np.asarray(tasks["amplitude"][shown] * jnp.sin(grid - tasks["phase"][shown]))
    one = jax.tree.map(lambda leaf: leaf[shown : shown + 1], tasks)
    for axis, (name, x) in zip(curves, initial.items(), strict=True):
        path_of_y = adapted(x, one)
        axis.plot(grid, truth, color="k", lw=1, label="task")
        for k, color in ((0, "C7"), (1, "C0"), (10, "C3")):
            y = jax.tree.map(lambda leaf, k=k: leaf[k, 0], path_of_y)
            axis.plot(grid, network(y, grid), color=color, label=f"{k} steps", ls=":" if k == 0 else "-")
        axis.plot(*(points[0] for points in one["support"]), "k^", ms=5)
        axis.set(
            title=f"{name} initial point",
            xlabel="input",
            ylabel="output",
            ylim=(1.6 * truth.min() - 1, 1.6 * truth.max() + 1),
        )
    curves[0].legend(fontsize=8)
    for (name, error), color in zip(found.items(), ("C7", "C0", "C2"), strict=True):
        last.semilogy(error.mean(1), "o-", ms=3, color=color, label=name)
    last.set(title="mean over 600 fresh tasks", xlabel="gradient steps on ten points", ylabel="mean square error")
    last.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
