"""Sparse group lasso with a penalty for each group: a nonsmooth lower level with many hyperparameters.

Ten measurements of 442 diabetes patients, each expanded to five polynomial terms (a group):

    min over x   validation mean squared error of y*(x) / 2
    s.t.         y*(x) = argmin of  |A y - t|^2 / (2n) + e^{x_0} |y|_1 + sum_g e^{x_g} |y_g|_2

MEHA (first derivatives and a prox) against implicit differentiation (AID, its system solved with GMRES) and a grid of
two penalties.

    python examples/sparse_group_lasso.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, datasets, lower, solve, solvers
from bilevel.solvers import MEHA, Continuation

GROUPS, TERMS = 10, 5
LOW, HIGH = -9.0, 1.0
# MEHA moves x and y with one step size. A penalty's logarithm changes the lower loss by e^x |y|, which is about 0.01,
# and y by ten: in units of 1 / SCALE both curve about equally.
SCALE = 30.0


def loss(x, y, batch):
    features, targets = batch
    return 0.5 * jnp.mean((features @ y.reshape(-1) - targets) ** 2)


def penalty(x, y):
    return jnp.exp(x[0]) * jnp.sum(jnp.abs(y)) + jnp.sum(jnp.exp(x[1:]) * jnp.sqrt(jnp.sum(y**2, axis=1) + 1e-12))


def scaled_penalty(x, y):
    return penalty(SCALE * x, y)


def scaled_prox(x, y, scaling):
    return prox(SCALE * x, y, scaling)


def scaled_bounded(x):
    return bounded(SCALE * x) / SCALE


def prox(x, y, scaling):
    """Soft thresholding of the entries, then of the groups: exact for the sum of the two terms."""
    y = jnp.sign(y) * jnp.maximum(jnp.abs(y) - scaling * jnp.exp(x[0]), 0)
    length = jnp.sqrt(jnp.sum(y**2, axis=1, keepdims=True) + 1e-30)
    return y * jnp.maximum(1 - scaling * jnp.exp(x[1:, None]) / length, 0)


def bounded(x):
    return jnp.clip(x, LOW, HIGH)


def expand(features):
    """Polynomial terms of each standardised measurement: Chebyshev polynomials of degree 1 to 5 of a squashed value."""
    squashed = np.tanh(features / 2)
    terms = np.polynomial.chebyshev.chebvander(squashed, TERMS)[..., 1:]
    return terms.reshape(len(features), -1)


def load(seed):
    features, targets = datasets.diabetes()
    train, validation, test = datasets.split((features, targets), (200, 100, -1), seed)
    standard = datasets.standardise(train[0], validation[0], test[0])
    expanded = datasets.standardise(*(expand(a) for a in standard))
    scaled = datasets.standardise(train[1][:, None], validation[1][:, None], test[1][:, None])
    return [(a.astype(np.float32), t[:, 0]) for a, t in zip(expanded, scaled, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12_000, help="of MEHA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sparse_group_lasso.png"))
    args = parser.parse_args()

    train, validation, test = load(args.seed)
    problem = Problem(loss, loss, validation, train, project_upper=bounded, prox_lower=prox)
    x0, y0 = jnp.full(1 + GROUPS, -4.0), jnp.zeros((GROUPS, TERMS))
    size = 1 / float(jnp.linalg.norm(train[0], 2) ** 2 / len(train[0]))
    descent = lower.GradientDescent(size, 2000)
    fit = jax.jit(lambda x, y: descent(problem.draw_lower(0), x, descent.init(y)).y)

    rows, paths = [], {}

    def record(name, x, seconds, history=None):
        y = fit(x, y0)
        rows.append(
            (
                name,
                float(loss(x, y, validation)),
                float(loss(x, y, test)),
                int((jnp.abs(y).max(axis=1) > 1e-4).sum()),
                int((jnp.abs(y) > 1e-4).sum()),
                seconds,
            )
        )
        paths[name] = (y, history)

    record("start", x0, 0.0)
    began = time.perf_counter()
    values = np.linspace(-8, 0, 9)
    grid = [
        (float(loss(x, fit(x, y0), validation)), x)
        for x in (jnp.full(1 + GROUPS, g).at[0].set(a) for a in values for g in values)
    ]
    record("grid of two", min(grid, key=lambda row: row[0])[1], time.perf_counter() - began)

    scaled = Problem(loss, loss, validation, train, project_upper=scaled_bounded, prox_lower=scaled_prox)
    for name, posed, unit, solver, steps in (
        ("MEHA", scaled, SCALE, MEHA(nonsmooth=scaled_penalty, penalty=Continuation(start=10.0)), args.steps),
        ("AID", problem, 1.0, solvers.AID(lower.GradientDescent(size, 100), optax.adam(0.05)), 300),
    ):
        solution = solve(posed, x0 / unit, y0, solver, steps=steps)
        print(solution)
        record(name, unit * solution.x, solution.seconds, solution.history)

    print(
        f"\n{len(train[1])} training, {len(validation[1])} validation, {len(test[1])} test samples; "
        "halved mean squared errors of the lasso at the penalties found"
    )
    print(f"  {'':<12} {'validation':>10} {'test':>8} {'groups':>7} {'nonzeros':>9} {'seconds':>8}")
    for name, val, tst, groups, nonzero, seconds in rows:
        print(f"  {name:<12} {val:>10.4f} {tst:>8.4f} {groups:>7} {nonzero:>9} {seconds:>8.1f}")
    own = float(paths["MEHA"][1]["upper_loss"][-1])
    print(f"  MEHA's own y has a validation loss of {own:.4f}, which no lasso reaches: the penalty's bias.")
    draw(args.out, rows, {name: path for name, path in paths.items() if name != "start"})
    print(f"  picture: {args.out}")


def draw(path, rows, paths):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, *maps = figure.subplots(1, 1 + len(paths), width_ratios=(1.6, *[1] * len(paths)))
    for name, (_, history) in paths.items():
        if history is not None:
            steps = history.steps["upper_loss"]
            left.plot(steps / steps[-1], history["upper_loss"], label=f"{name}, F at its y ({steps[-1] + 1} steps)")
    for i, (name, validation, *_) in enumerate(rows[1:]):
        left.axhline(validation, color=("C7", "C0", "C1")[i], ls="--", lw=1, label=f"{name}, solved to the end")
    left.set(xlabel="share of the run", ylabel="validation loss", yscale="log")
    left.legend(fontsize=8)
    largest = max(float(jnp.abs(y).max()) for y, _ in paths.values())
    for axis, (name, (y, _)) in zip(maps, paths.items(), strict=True):
        axis.imshow(np.asarray(y), cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        axis.set(title=name, xlabel="term", ylabel="measurement")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
