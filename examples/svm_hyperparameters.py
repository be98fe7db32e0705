"""One regularisation weight per training sample for a support vector machine, with its constraints in the lower level.

    min over C   sum over the validation set of sigmoid(-5 t (w.a + b) / |w|)
        a smooth count of errors
    s.t.         (w, b, xi) = argmin of  |w|^2 / 2 + sum_i e^{C_i} xi_i^2 / 2    s.t.  1 - xi_i - t_i (w.a_i + b) <= 0

Constrained methods against a grid of one common C, for which the lower level is solved to the end, and against
implicit differentiation of the lower level without its constraints: here xi = max(0, 1 - margin) can be substituted,
which leaves a smooth problem in (w, b) and says where the constrained methods ought to end.

    python examples/svm_hyperparameters.py                        # diabetes, made binary at its median
    python examples/svm_hyperparameters.py --data breast-cancer
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, datasets, lower, solve, solvers
from bilevel.solvers import LVHBA, BiCGAFFA, Continuation

LOW, HIGH, START = -9.0, 2.0, -5.0
# A first-order method moves all variables with one step size, so they are kept in units in which the lower loss curves
# about equally: x is C / SCALE (20^2 e^-5 / 2 is about one), and y["xi"] is xi / SLACK (12^2 e^-5 is about one).
SCALE, SLACK = 20.0, 12.0


def margin(y, samples):
    features, signs = samples
    return signs * (features @ y["w"] + y["b"])


def validation_errors(x, y, batch):
    length = jnp.sqrt(jnp.sum(y["w"] ** 2) + 1e-6)
    return jax.nn.sigmoid(-5 * margin(y, batch) / length).sum()


def svm(x, y, batch):
    return 0.5 * jnp.sum(y["w"] ** 2) + 0.5 * jnp.sum(jnp.exp(SCALE * x) * (SLACK * y["xi"]) ** 2)


def margins_kept(x, y, batch):
    return 1 - SLACK * y["xi"] - margin(y, batch)


def hinge(x, y, batch):
    """The lower loss with xi = max(0, 1 - margin) put in: smooth in (w, b)."""
    return 0.5 * jnp.sum(y["w"] ** 2) + 0.5 * jnp.sum(jnp.exp(SCALE * x) * jnp.maximum(0, 1 - margin(y, batch)) ** 2)


def bounded(x):
    return jnp.clip(x, LOW / SCALE, HIGH / SCALE)


def accuracy(x, y, samples):
    return (margin(y, samples) > 0).mean()


@jax.jit
def exact(x, batch, y):
    """The lower level's solution."""
    level = Problem(upper=hinge, lower=hinge, lower_data=batch).draw_lower(0)
    solver = lower.LBFGS(300)
    found = solver(level, x, solver.init({"w": y["w"], "b": y["b"]})).y
    return {**found, "xi": jnp.maximum(0, 1 - margin(found, batch)) / SLACK}


def load(name, seed):
    if name == "breast-cancer":
        features, labels = datasets.breast_cancer()
        signs, sizes = 2.0 * labels - 1, (250, 150, -1)
    else:
        features, targets = datasets.diabetes()
        signs, sizes = np.where(targets > np.median(targets), 1.0, -1.0), (200, 120, -1)
    train, validation, test = datasets.split((features, signs.astype(np.float32)), sizes, seed)
    scaled = datasets.standardise(train[0], validation[0], test[0])
    return [(a, part[1]) for a, part in zip(scaled, (train, validation, test), strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("diabetes", "breast-cancer"), default="diabetes")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("svm_hyperparameters.png"))
    args = parser.parse_args()

    train, validation, test = load(args.data, args.seed)
    n, d = train[0].shape
    empty = {"w": jnp.zeros(d), "b": jnp.zeros(()), "xi": jnp.ones(n)}
    problem = Problem(validation_errors, svm, validation, train, project_upper=bounded, constraint=margins_kept)

    began, grid = time.perf_counter(), []
    for c in np.linspace(LOW, HIGH, 23):
        y = exact(jnp.full(n, c / SCALE), train, empty)
        grid.append(
            (
                c,
                *(float(accuracy(None, y, part)) for part in (validation, test)),
                float(validation_errors(None, y, validation)),
            )
        )
    grid_seconds = time.perf_counter() - began
    best = max(grid, key=lambda row: row[1])

    x0 = jnp.full(n, START / SCALE)
    y0 = exact(x0, train, empty)
    metrics = {"validation accuracy": (accuracy, validation), "test accuracy": (accuracy, test)}

    def scores(y):
        return (
            float(validation_errors(None, y, validation)),
            *(float(accuracy(None, y, p)) for p in (validation, test)),
        )

    rows, runs = [("start", *scores(y0), 0.0, None), ("grid, one C", best[3], best[1], best[2], grid_seconds, None)], {}
    smooth = Problem(validation_errors, hinge, validation, train, project_upper=bounded)
    reference = solve(smooth, x0, {"w": y0["w"], "b": y0["b"]}, solvers.AID(lower.LBFGS(100)), steps=400)
    rows.append(("implicit", *scores(exact(reference.x, train, y0)), reference.seconds, None))
    # Continuation's c is in units of the curvatures' ratio, which is large here (F is a sum of steep sigmoids).
    for solver in (LVHBA(penalty=Continuation(start=1.0)), BiCGAFFA(penalty=Continuation(start=1.0))):
        solution = solve(problem, x0, y0, solver, steps=args.steps, metrics=metrics)
        solved = exact(solution.x, train, solution.y)
        multipliers = np.asarray(solver.multipliers(problem, solution.state)["constraint"])
        name = type(solver).__name__
        runs[name] = (solution, multipliers)
        rows.append((name, *scores(solved), solution.seconds, solution))
        print(solution)

    print(
        f"\n{args.data}: {n} training, {len(validation[1])} validation, {len(test[1])} test samples; "
        "scores of the exact SVM at the C found"
    )
    print(
        f"  {'':<12} {'smooth loss':>11} {'validation':>11} {'test':>7} {'seconds':>8} "
        f"{'|w - w(C)|/|w(C)|':>18} {'violation':>10} {'support vectors':>16}"
    )
    for name, loss, val, tst, seconds, solution in rows:
        extra = ""
        if solution is not None:
            w = exact(solution.x, train, solution.y)["w"]
            away = float(jnp.linalg.norm(solution.y["w"] - w) / jnp.linalg.norm(w))
            support = (runs[name][1] > 1e-3 * runs[name][1].max()).sum()
            extra = f"{away:>18.1e} {solution.history['violation'][-1]:>10.1e} {support:>16}"
        print(f"  {name:<12} {loss:>11.4f} {val:>11.3f} {tst:>7.3f} {seconds:>8.1f} {extra}")
    for name, (solution, multipliers) in runs.items():
        print(
            f"  {name}: |C - C0| on average {SCALE * float(jnp.abs(solution.x - x0).mean()):.2f}, at the end C from "
            f"{SCALE * float(solution.x.min()):.1f} to {SCALE * float(solution.x.max()):.1f}; multipliers up to "
            f"{multipliers.max():.2g}"
        )
    draw(args.out, grid, rows, runs)
    print(f"  picture: {args.out}")


def draw(path, grid, rows, runs):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, gap, right = figure.subplots(1, 4)
    c, val, tst, loss = (np.asarray(column) for column in zip(*grid, strict=True))
    left.plot(c, val, "o-", ms=3, label="validation")
    left.plot(c, tst, "o-", ms=3, label="test")
    left.set(title="grid over one common C", xlabel="log C", ylabel="accuracy")
    left.legend(fontsize=8)
    middle.axhline(loss.min(), color="C7", ls="--", lw=1, label="best of the grid")
    middle.axhline(rows[2][1], color="k", ls=":", lw=1, label="implicit differentiation")
    for name, (solution, _) in runs.items():
        middle.plot(solution.history.steps["upper_loss"], solution.history["upper_loss"], label=name)
        gap.plot(solution.history.steps["gap"], np.abs(solution.history["gap"]) + 1e-12, lw=0.8, label=name)
    middle.set(xlabel="step", ylabel="smooth validation loss")
    middle.legend(fontsize=8)
    gap.set(xlabel="step", ylabel="gap function of the lower level", yscale="log")
    gap.legend(fontsize=8)
    for name, (solution, multipliers) in runs.items():
        right.scatter(SCALE * np.asarray(solution.x), multipliers, s=8, alpha=0.6, label=name)
    right.set(title="weights and multipliers", xlabel="log C of the sample", ylabel="multiplier")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
