"""Data hyper-cleaning where the model's size is a constraint of the lower level, tuned with the samples' weights.

    min over (w, r)   clean-set cross-entropy of W*
    s.t.              W* = argmin of  mean_i sigmoid(w_i) CE(W; image_i, noisy label_i)   s.t.  |W|^2 <= e^r

The constraint is coupled (its bound is an upper variable) and nonlinear: BiC-GAFFA, which needs no projection on it.

    python examples/constrained_cleaning.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, datasets, lower, solve
from bilevel.solvers import BiCGAFFA, Continuation

CLASSES = 10
# w is kept in units in which its curvature (a 1/n per sample) is about that of W, and one step size serves both.
SCALE = 60.0


def cross_entropy(y, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(images @ y, labels)


def clean_loss(x, y, batch):
    return cross_entropy(y, *batch).mean()


def weighted_loss(x, y, batch):
    return (jax.nn.sigmoid(SCALE * x["weights"]) * cross_entropy(y, *batch)).mean()


def within(x, y):
    return jnp.sum(y**2) - jnp.exp(x["log_bound"])


def bounded(x):
    return {"weights": jnp.clip(x["weights"], -6 / SCALE, 6 / SCALE), "log_bound": jnp.clip(x["log_bound"], 0.0, 6.0)}


def accuracy(x, y, batch):
    images, labels = batch
    return (jnp.argmax(images @ y, axis=1) == labels).mean()


def fit(batch, bound, weights=1.0, steps=2000):
    """The lower level solved to the end: the weighted model in the ball of that squared radius."""

    def into_the_ball(y):
        return y * jnp.minimum(1, jnp.sqrt(bound) / jnp.sqrt(jnp.sum(y**2) + 1e-12))

    full = lambda x, y, batch: (weights * cross_entropy(y, *batch)).mean()
    level = Problem(full, full, lower_data=batch, project_lower=into_the_ball).draw_lower(0)
    solver = lower.GradientDescent(0.5, steps)
    return solver(level, None, solver.init(jnp.zeros((batch[0].shape[1], CLASSES)))).y


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=0.5, help="share of the training labels that are flipped")
    parser.add_argument("--clean", type=int, default=150, help="size of the clean set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("constrained_cleaning.png"))
    args = parser.parse_args()

    images, labels = datasets.digits()
    train, clean, test = datasets.split(
        (np.hstack([images / 16, np.ones((len(images), 1), np.float32)]), labels), (800, args.clean, -1), args.seed
    )
    noisy, flipped = datasets.corrupt_labels(train[1], args.rate, CLASSES, args.seed)
    problem = Problem(clean_loss, weighted_loss, clean, (train[0], noisy), project_upper=bounded, constraint=within)
    bound = 30.0
    x0 = {"weights": jnp.zeros(len(noisy)), "log_bound": jnp.log(jnp.asarray(bound))}
    y0 = fit((train[0], noisy), bound)
    solver = BiCGAFFA(penalty=Continuation(start=5.0))
    solution = solve(problem, x0, y0, solver, steps=args.steps, metrics={"test accuracy": (accuracy, test)})
    print(solution)

    weights = np.asarray(jax.nn.sigmoid(SCALE * solution.x["weights"]))
    dropped = weights < 0.5
    found = (dropped & flipped).sum()
    size, allowed = float(jnp.sum(solution.y**2)), float(jnp.exp(solution.x["log_bound"]))
    multiplier = float(solver.multipliers(problem, solution.state)["constraint"])
    before = {
        what: float(accuracy(None, fit(batch, bound), test))
        for what, batch in (("noisy labels", (train[0], noisy)), ("true labels", train), ("clean set alone", clean))
    }
    print(
        f"\ndigits: {len(noisy)} training samples, {flipped.sum()} labels flipped, {len(clean[1])} clean samples, "
        f"{len(test[1])} for the test"
    )
    for what, value in before.items():
        print(f"  test accuracy, trained on the {what:<16} {value:.3f}   (|W|^2 <= {bound:.0f})")
    solved = fit((train[0], noisy), allowed, weights)
    learnt = float(accuracy(None, solved, test))
    print(f"  test accuracy, learnt weights and bound        {learnt:.3f}   (|W|^2 <= {allowed:.0f})")
    losses = [float(clean_loss(None, y, clean)) for y in (y0, solution.y, solved)]
    print(
        f"  loss on the clean set: {losses[0]:.3f} at the start, {losses[1]:.3f} at the end of the run, "
        f"{losses[2]:.3f} for the lower level solved at the weights and bound found"
    )
    print(f"  |W|^2 = {size:.2f} within {allowed:.2f}, multiplier {multiplier:.2e}")
    precision, recall = found / max(dropped.sum(), 1), found / flipped.sum()
    print(f"  flips found (weight < 0.5): precision {precision:.3f}, recall {recall:.3f}")
    draw(args.out, solution, weights, flipped, before)
    print(f"  picture: {args.out}; {solution.seconds:.1f} s")


def draw(path, solution, weights, flipped, before):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, acc, gap, hist = figure.subplots(1, 4)
    history = solution.history
    loss.plot(history.steps["upper_loss"], history["upper_loss"])
    loss.set(title="loss on the clean set", xlabel="step", ylabel="cross-entropy")
    acc.plot(history.steps["test accuracy"], history["test accuracy"], label="learnt")
    for (what, value), color in zip(before.items(), ("C3", "C2", "C7"), strict=True):
        acc.axhline(value, color=color, ls="--", lw=1, label=what)
    acc.set(xlabel="step", ylabel="test accuracy")
    acc.legend(fontsize=7)
    gap.plot(history.steps["gap"], np.abs(history["gap"]) + 1e-12, lw=0.8, label="gap")
    gap.plot(
        history.steps["violation"],
        np.where(history["violation"] > 0, history["violation"], np.nan),
        ".",
        ms=1,
        label="violation",
    )
    gap.set(xlabel="step", ylabel="gap and violation", yscale="log")
    gap.legend(fontsize=8)
    hist.hist(
        [weights[~flipped], weights[flipped]], bins=30, label=["right", "flipped"], color=["C2", "C3"], stacked=True
    )
    hist.set(title="weights of the samples", xlabel="sigmoid(w)", ylabel="samples")
    hist.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
