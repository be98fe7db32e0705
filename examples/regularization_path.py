"""One penalty per feature of a logistic model, learnt on validation data: SOBA against SABA against a grid.

The breast-cancer data (569 patients, 30 features). A grid search can afford one common penalty; a bilevel method learns
thirty:

    min over x   F(x, y*(x)) = validation loss of y*(x)
    s.t.         y*(x) = argmin over y of  training loss + sum_j exp(x_j) w_j^2 / 2,     y = (w, bias)

    python examples/regularization_path.py              # scikit-learn's copy of the data, needs nothing else
    python examples/regularization_path.py --steps 20000
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, data, datasets, lower, solve, solvers, sweep


def logistic(y, batch):
    features, labels = batch
    return jax.nn.softplus(-labels * (features @ y["weights"] + y["bias"])).mean()


def validation_loss(x, y, batch):
    return logistic(y, batch)


def penalised_loss(x, y, batch):
    return logistic(y, batch) + 0.5 * jnp.sum(jnp.exp(x) * y["weights"] ** 2) + 0.005 * y["bias"] ** 2


def accuracy(y, batch):
    features, labels = batch
    return (jnp.sign(features @ y["weights"] + y["bias"]) == labels).mean()


def load(seed):
    """Train, validation and test, standardised on the training part; labels in {-1, 1}."""
    features, labels = datasets.breast_cancer()
    parts = datasets.split((features, 2 * labels.astype(np.float32) - 1), (320, 128, -1), seed)
    scaled = datasets.standardise(*(part[0] for part in parts))
    return [(f, part[1]) for f, part in zip(scaled, parts, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=32, help="a divisor of 320 and 128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="regularization_path.png")
    args = parser.parse_args()

    train, validation, test = load(args.seed)
    dim = train[0].shape[1]
    y0 = {"weights": np.zeros(dim, np.float32), "bias": np.zeros((), np.float32)}
    x0 = np.full(dim, -3.0, np.float32)
    problem = Problem(
        upper=validation_loss,
        lower=penalised_loss,
        upper_data=data.Minibatches(validation, args.batch, blocks=True),
        lower_data=data.Minibatches(train, args.batch, blocks=True),
        project_upper=lambda x: jnp.clip(x, -9.0, 3.0),
    )

    @jax.jit
    def fitted(x):
        """y*(x) on all samples, by L-BFGS."""
        solver = lower.LBFGS(500, tol=1e-5)
        return solver(problem.full_lower(), x, solver.init(jax.tree.map(jnp.asarray, y0))).y

    def h(x, y, batches):
        """The validation loss of y*(x): what is being minimised, whatever y is now."""
        train, validation = batches
        level = Problem(validation_loss, penalised_loss, lower_data=train).draw_lower(0)
        solver = lower.LBFGS(200, tol=1e-5)
        return logistic(solver(level, x, solver.init(y)).y, validation)

    grid = np.linspace(-9, 3, 25, dtype=np.float32)
    losses = [float(logistic(fitted(jnp.full(dim, p)), validation)) for p in grid]
    common = jnp.full(dim, grid[int(np.argmin(losses))])
    rows = {"grid, one penalty": common}

    # Step sizes: a sweep of short runs in one compile each; then one long run with the best.
    curves = {}
    for name, make in (("SOBA", solvers.SOBA), ("SABA", solvers.SABA)):
        steps = [make(upper, lower) for lower in (0.03, 0.1) for upper in (0.1, 0.3, 1.0, 3.0)]
        began = time.perf_counter()
        score = lambda x, y: h(x, y, (train, validation))
        found = sweep(problem, steps, x0, y0, steps=max(args.steps // 5, 1), key=args.seed, score=score)
        solution = solve(
            problem,
            x0,
            y0,
            found.solver,
            steps=args.steps,
            key=args.seed,
            metrics={"h": (h, (train, validation))},
            metrics_every=max(args.steps // 25, 1),
        )
        rows[name] = solution.x
        curves[name] = solution.history.steps["h"], solution.history["h"]
        sizes = f"upper {found.solver.upper_optimizer}, lower {found.solver.lower_optimizer}"
        print(f"{name}: {sizes} of {len(steps)} pairs; {time.perf_counter() - began:.1f} s with the sweep")

    print(f"\n{'':<20}{'validation loss':>16}{'test loss':>12}{'test accuracy':>15}")
    scores = {}
    for name, x in rows.items():
        y = fitted(x)
        fit, unseen = scores[name] = float(logistic(y, validation)), float(logistic(y, test))
        print(f"{name:<20}{fit:>16.4f}{unseen:>12.4f}{float(accuracy(y, test)):>15.3f}")
    fit, unseen = scores.pop("grid, one penalty")
    overfit = [name for name, score in scores.items() if score[0] < fit and score[1] > unseen]
    if overfit:
        print(
            f"{' and '.join(overfit)}: {dim} penalties fit the {len(validation[1])} validation samples better than the "
            "grid's one, and the test samples worse. They overfit: take more validation data, or fewer penalties."
        )
    plot(grid, losses, curves, rows, Path(args.out))
    print(f"saved {args.out}")


def plot(grid, losses, curves, rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    left.plot(grid, losses, ".-", color="C7")
    left.plot(grid[int(np.argmin(losses))], min(losses), "o", color="C3", label="best common penalty")
    left.set(
        xlabel="log penalty, the same for all features", ylabel="validation loss of y*(x)", title="grid", yscale="log"
    )
    left.legend()
    for name, (steps, values) in curves.items():
        middle.plot(steps, values, label=name)
    middle.axhline(min(losses), color="C3", linestyle="--", label="best of the grid")
    middle.set(xlabel="step", ylabel="validation loss of y*(x)", title="a penalty per feature", yscale="log")
    middle.legend()
    order = np.argsort(np.asarray(rows["SABA"]))
    for name, x in rows.items():
        style = (
            {"linestyle": "--", "color": "C3"}
            if name.startswith("grid")
            else {"marker": ".", "linestyle": "none", "color": {"SOBA": "C0", "SABA": "C1"}[name]}
        )
        right.plot(np.asarray(x)[order], label=name, **style)
    right.set(xlabel="feature, ordered by SABA's penalty", ylabel="log penalty", title="what was learnt")
    right.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
