"""Per-layer learning rates and weight decays for fine-tuning a BiFormer, by hypergradients and by random search.

A small BiFormer is pretrained on five classes of Fashion-MNIST and fine-tuned on the other five, of which there are
few samples. Each layer has a learning rate and a weight decay, chosen by the loss on a validation set: see
`bilevel.applications.biformer.fine_tuning`. The hypergradient is that of the whole fine-tuning run (`solvers.ITD`).
Random search draws all of them, log-uniformly around the same start, and stops at the same time on the clock
(compilation apart on both sides).

    python examples/biformer_finetune_hyperparameters.py
    python examples/biformer_finetune_hyperparameters.py --outer 40 --seeds 3
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import datasets, solve, solvers
from bilevel.applications.biformer import fine_tuning, prepare, small_biformer
from bilevel.integrations.flax import from_nnx

CLASSES = 5
STEP = 0.05  # of gradient descent in the fine-tuning; the learnt rates multiply it


def pretrain(apply, params, images, labels, steps, batch, key):
    """Adam on the classes 0 to 4."""
    rule = optax.adam(2e-3)

    def loss(params, images, labels):
        logits = apply(params, prepare(images), train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def run(params, images, labels):
        def step(carry, key):
            params, memory = carry
            i = jax.random.randint(key, (batch,), 0, len(labels))
            updates, memory = rule.update(jax.grad(loss)(params, images[i], labels[i]), memory)
            return (optax.apply_updates(params, updates), memory), None

        return jax.lax.scan(step, (params, rule.init(params)), jax.random.split(key, steps))[0][0]

    return run(params, images, labels)


def pick(images, labels, classes, per_class, random):
    """`per_class` samples of each class, labelled 0, 1, ..., in the order of `classes`."""
    chosen = [random.permutation(np.flatnonzero(labels == c))[:per_class] for c in classes]
    relabelled = np.repeat(np.arange(len(classes), dtype=np.int32), per_class)
    order = random.permutation(len(relabelled))
    return images[np.concatenate(chosen)][order], relabelled[order]


def run(args, seed):
    random = np.random.default_rng(seed)
    images, labels = datasets.fashion_mnist("train")
    test = pick(*datasets.fashion_mnist("test"), range(5, 10), args.test, random)
    old = pick(images, labels, range(5), args.pretrain, random)
    new = pick(images, labels, range(5, 10), args.shots + args.validation, random)
    few = args.shots * 5

    train, validation = (new[0][:few], new[1][:few]), (new[0][few:], new[1][few:])
    start, apply = from_nnx(small_biformer(CLASSES, seed=seed))
    trained = pretrain(apply, start, *old, args.pretrain_steps, 128, jax.random.key(seed))
    task = fine_tuning(apply, {**trained, "head": start["head"]}, train, validation)

    @jax.jit
    def fine_tune(problem, x):
        """y after the run with these hyperparameters, and the loss on the validation set."""
        level = problem.draw_lower(jax.random.key(0))

        def step(y, _):
            return jax.tree.map(lambda y, g: y - STEP * g, y, level.gradient(x, y)), None

        y = jax.lax.scan(step, task.y0, length=args.inner)[0]
        return y, problem.draw_upper(jax.random.key(0))(x, y)

    accuracy = jax.jit(task.accuracy)
    y, loss = fine_tune(task.problem, task.x0)
    rows = {"at the start": (float(loss), float(accuracy(task.x0, y, test)))}

    solver = solvers.ITD(args.inner, STEP, optax.adam(0.1), warm_start=False)
    marks = []
    solution = solve(
        task.problem,
        task.x0,
        task.y0,
        solver,
        steps=args.outer + 1,
        key=seed,
        callback=lambda event: marks.append(time.perf_counter()) and None,
        callback_every=1,
    )
    seconds = marks[-1] - marks[0]  # the first mark falls after the compilation
    y, loss = fine_tune(task.problem, solution.x)
    rows["hypergradients"] = (float(loss), float(accuracy(solution.x, y, test)))

    best, trials, began = (np.inf, None), 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        x = jax.tree.map(lambda a: a + np.float32(random.uniform(-2, 2)), task.x0)
        y, loss = fine_tune(task.problem, x)
        trials += 1
        if float(loss) < best[0]:
            best = (float(loss), (x, y))
    rows["random search"] = (best[0], float(accuracy(*best[1], test)))
    print(f"  seed {seed}: {args.outer} outer steps and {trials} random trials in {seconds:.0f} s each")
    for name, (loss, score) in rows.items():
        print(f"    {name:<16} validation loss {loss:.3f}, test accuracy {score:.3f}", flush=True)
    return rows, solution


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=600, help="pretraining samples per class")
    parser.add_argument("--pretrain-steps", type=int, default=200)
    parser.add_argument("--shots", type=int, default=10, help="fine-tuning samples per class")
    parser.add_argument("--validation", type=int, default=20, help="validation samples per class")
    parser.add_argument("--test", type=int, default=200, help="test samples per class")
    parser.add_argument("--inner", type=int, default=15, help="steps of a fine-tuning run")
    parser.add_argument("--outer", type=int, default=20, help="steps on the hyperparameters")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("biformer_finetune.png"))
    args = parser.parse_args()
    began = time.perf_counter()
    results = [run(args, seed) for seed in range(args.seeds)]
    print("mean over seeds")
    for name in results[0][0]:
        loss, score = np.mean([rows[name] for rows, _ in results], axis=0)
        print(f"  {name:<16} validation loss {loss:.3f}, test accuracy {score:.3f}")
    draw(args.out, results[-1][1])
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all")


def draw(path, solution):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    curve, rates, decays = figure.subplots(1, 3)
    curve.plot(solution.history.steps["upper_loss"], solution.history["upper_loss"])
    curve.set(title="loss on the validation set", xlabel="outer step")
    layers = list(solution.x["rate"])
    rates.barh(layers, [float(jnp.exp(2 * solution.x["rate"][name])) for name in layers])
    rates.set(title="learning rate, times the common one", xscale="log")
    rates.invert_yaxis()
    decays.barh(layers, [float(jnp.exp(solution.x["decay"][name])) for name in layers], color="C1")
    decays.set(title="weight decay", xscale="log", yticklabels=[])
    decays.invert_yaxis()
    decays.xaxis.set_minor_formatter("")  # on a short range its labels run into each other
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
