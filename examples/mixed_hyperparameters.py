"""Depth and width by Optuna, a weight decay per layer by hypergradients, against Optuna for all of them.

    pip install 'bilevel[optuna]'
    python examples/mixed_hyperparameters.py

Few handwritten digits (160), a network of tanh layers. Depth and width are whole numbers, so a sampler has to choose
them. Below each choice the decays (one per layer, on a logarithmic scale) have a gradient: a short run of AID moves
them on the validation loss. On the other side Optuna samples depth, width and all decays. Each side then trains its
network anew, in the same way, with the decays that it has; both get the same seconds, compile time included, in turn.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, datasets, linear, lower, run, search, solvers
from bilevel.proposers import OptunaProposer

LOWEST, HIGHEST = -12.0, 1.0  # of log decay
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=35.0, help="of each side, for each seed")
    parser.add_argument("--evaluations", type=int, default=10_000, help="of each side, at most")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--depth", type=int, default=3, help="at most")
    parser.add_argument("--upper-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("mixed_hyperparameters.png"))
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    shape = {"depth": (1, args.depth), "width": list(args.widths)}
    decays = {f"decay {i}": (float(np.exp(LOWEST)), float(np.exp(HIGHEST))) for i in range(args.depth + 1)}
    sides = {
        "hypergradients below Optuna": lambda: OptunaProposer(shape),
        "Optuna alone": lambda: OptunaProposer({**shape, **decays}, log=tuple(decays)),
    }
    images, labels = datasets.digits()
    rows, curves = {name: [] for name in sides}, {name: [] for name in sides}
    for seed in range(args.seeds):
        train, valid, test = datasets.split((images / 16, labels), sizes=(args.train, 500, -1), seed=seed)
        for name, proposer in sides.items():
            jax.clear_caches()  # neither side lives on what the other has compiled
            clock, ends = time.perf_counter(), []
            tuned = name.startswith("hyper")
            solver = functools.partial(evaluate, train=train, valid=valid, steps=args.upper_steps if tuned else 0)
            found = search(
                lambda proposal: proposal,
                proposer(),
                evaluations=args.evaluations,
                batch=1,
                seconds=args.seconds,
                solver=lambda proposal, key, solver=solver: solver(proposal),
                key=seed,
                callback=lambda trials: ends.append(time.perf_counter() - clock),
            )
            proposal, x = found.best.proposal, jnp.asarray(found.best.y)
            y = trained(network(proposal, args.train), x, train)
            accuracy = float(jnp.mean(jnp.argmax(predict(y, test[0]), -1) == test[1]))
            rows[name].append((found.best.loss, accuracy, len(found.trials)))
            curves[name].append((np.array(ends), found.history["best_loss"]))
            print(
                f"seed {seed}, {name:<27} validation loss {found.best.loss:.4f}, test accuracy {accuracy:.4f}; "
                f"{len(found.trials):3d} networks, depth {proposal['depth']}, width {proposal['width']}, decays "
                + " ".join(f"{d:.1e}" for d in np.exp(x)),
                flush=True,
            )
    for name, side in rows.items():
        loss, accuracy, count = np.mean(side, 0)
        print(f"mean of {args.seeds}: {name:<27} validation loss {loss:.4f}, test accuracy {accuracy:.4f}, {count:.0f}")
    draw(args.out, curves)
    print(f"picture: {args.out}; {time.perf_counter() - began:.1f} s in all")
    return rows


def network(proposal, seed):
    """Weights and biases of `depth` layers of one width, and the last."""
    sizes = [64, *[proposal["width"]] * proposal["depth"], 10]
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    layer = lambda key, a, b: {"w": jax.random.normal(key, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)}
    return [layer(key, a, b) for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def predict(y, images):
    for layer in y[:-1]:
        images = jnp.tanh(images @ layer["w"] + layer["b"])
    return images @ y[-1]["w"] + y[-1]["b"]


def validation_loss(x, y, batch):
    return cross_entropy(predict(y, batch[0]), batch[1]).mean()


def training_loss(x, y, batch):  # x: log decays, one per layer
    penalty = sum(jnp.exp(log) * jnp.sum(layer["w"] ** 2) for log, layer in zip(x, y, strict=True))
    return cross_entropy(predict(y, batch[0]), batch[1]).mean() + penalty


@jax.jit
def trained(y, x, train):
    """400 steps of Adam on the training loss with decays exp(x): how either side's network is made."""
    adam = optax.adam(optax.cosine_decay_schedule(0.02, 400))

    def step(carry, _):
        y, state = carry
        updates, state = adam.update(jax.grad(training_loss, argnums=1)(x, y, train), state)
        return (optax.apply_updates(y, updates), state), None

    return jax.lax.scan(step, (y, adam.init(y)), length=400)[0][0]


@functools.partial(jax.jit, static_argnums=4)
def tuned(y, x, train, valid, steps):
    """Log decays after a few outer steps of AID."""
    problem = Problem(
        validation_loss,
        training_loss,
        upper_data=valid,
        lower_data=train,
        project_upper=lambda x: jnp.clip(x, LOWEST, HIGHEST),
    )
    adam = lower.GradientDescent(optax.adam(0.02), steps=25)
    solver = solvers.AID(adam, optax.adam(0.3), linear.CG(max_steps=10, damping=1e-2))
    return run(problem, solver, x, y, steps)[0].x


def evaluate(proposal, train, valid, steps):
    """(validation loss, log decays) of a proposal; with steps, its decays by hypergradients."""
    y = network(proposal, len(train[1]))
    x = jnp.array([np.log(proposal.get(f"decay {i}", 1e-3)) for i in range(proposal["depth"] + 1)])
    if steps:
        x = tuned(y, x, train, valid, steps)
    return validation_loss(x, trained(y, x, train), valid), np.asarray(x)


def draw(path, curves):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, runs), colour in zip(curves.items(), ("C0", "C1"), strict=True):
        for i, (seconds, best) in enumerate(runs):
            axes.step(seconds, best, where="post", color=colour, alpha=0.8, label=name if i == 0 else None)
            axes.plot(seconds[-1], best[-1], "o", ms=4, color=colour)
    axes.set(xlabel="seconds", ylabel="best validation loss", title="equal time, a line for each split")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
