"""Ridge regression with one penalty per feature, all of them learnt on a validation set.

    min over x   F(x, y*(x)) = |A_val y*(x) - t_val|^2 / n_val
    s.t.         y*(x) = argmin over y of  |A y - t|^2 / n  +  sum_j exp(x_j) y_j^2

The lower level has a closed form, and so has the hypergradient: with H = A'A / n + diag(exp(x)) and g the gradient of
F in y,

    y* = H^-1 A't / n,    dF/dx_j = - exp(x_j) y*_j (H^-1 g)_j.

The script holds the package's estimators to it, learns the penalties, and compares them with the one penalty that a
grid search on the same split finds. Ten penalties can fit a small validation set better than they fit the truth:
the comparison is therefore repeated on many random splits, all of them in one `vmap` over `bilevel.run`.

    python examples/ridge_per_feature.py
    python examples/ridge_per_feature.py --seed 3 --valid 50
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, datasets, hypergradients, linear, lower, run, solve, solvers

FEATURES = ("age", "sex", "bmi", "blood pressure", "tc", "ldl", "hdl", "tch", "ltg", "glu")
SMALLEST, LARGEST = -10.0, 5.0  # bounds of x = log penalty: e^-10 is no penalty, e^5 drops the feature


def mean_square(x, y, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ y - targets) ** 2)


def penalised(x, y, batch):
    return mean_square(x, y, batch) + jnp.sum(jnp.exp(x) * y**2)


def within_bounds(x):
    return jnp.clip(x, SMALLEST, LARGEST)


def ridge(x, train):
    """The lower level's solution."""
    inputs, targets = train
    n = len(targets)
    return jnp.linalg.solve(inputs.T @ inputs / n + jnp.diag(jnp.exp(x)), inputs.T @ targets / n)


def closed_form(lower, x, y):
    """The same as a lower solver: any function (lower, x, y) -> y is one."""
    return ridge(x, lower.batch)


def hypergradient_on_paper(x, train, valid):
    """The formula of the docstring, in NumPy."""
    x, inputs, targets, new, truth = (np.asarray(a, np.float64) for a in (x, *train, *valid))
    matrix = inputs.T @ inputs / len(targets) + np.diag(np.exp(x))
    y = np.linalg.solve(matrix, inputs.T @ targets / len(targets))
    gradient = 2 * new.T @ (new @ y - truth) / len(truth)
    return -np.exp(x) * y * np.linalg.solve(matrix, gradient)


def load(sizes, seed):
    """(train, valid, test), features and target standardised with the training set's moments, in float64."""
    inputs, targets = (a.astype(np.float64) for a in datasets.diabetes())
    parts = datasets.split((inputs, targets), sizes, seed)
    standardised = [datasets.standardise(*column) for column in zip(*parts, strict=True)]
    return tuple(zip(*standardised, strict=True))


def make_problem(train, valid):
    return Problem(mean_square, penalised, upper_data=valid, lower_data=train, project_upper=within_bounds)


def estimator_errors(train, valid, x):
    """The relative error of each estimator's hypergradient at x."""
    rows = {
        "Implicit(CG), lower level by L-BFGS": (hypergradients.Implicit(), lower.LBFGS(tol=1e-12)),
        "Implicit(CG), closed-form lower level": (hypergradients.Implicit(), closed_form),
        "Implicit(Dense), closed-form lower level": (hypergradients.Implicit(linear.Dense()), closed_form),
        "Unrolled, 1000 gradient steps": (hypergradients.Unrolled(), lower.GradientDescent(0.1, 1000)),
        "Unrolled, 100 gradient steps": (hypergradients.Unrolled(), lower.GradientDescent(0.1, 100)),
        "Unrolled(last=20), 1000 gradient steps": (hypergradients.Unrolled(last=20), lower.GradientDescent(0.1, 1000)),
    }
    problem, truth, errors = make_problem(train, valid), hypergradient_on_paper(x, train, valid), {}
    for name, (estimator, solver) in rows.items():
        evaluate = jax.jit(lambda p, e=estimator, s=solver: hypergradients.value_and_hypergradient(p, e, s)(x, 0 * x))
        errors[name] = float(np.linalg.norm(evaluate(problem).gradient - truth) / np.linalg.norm(truth))
    return errors


def single_penalty(train, valid, points=301):
    """The grid search: the best x of one penalty for all features, and its validation losses along the grid."""
    grid = jnp.linspace(SMALLEST, LARGEST, points)
    everywhere = jnp.broadcast_to(grid[:, None], (points, train[0].shape[1]))
    losses = jax.vmap(lambda x: mean_square(x, ridge(x, train), valid))(everywhere)
    return everywhere[jnp.argmin(losses)], grid, losses


def learn_on_splits(splits, steps):
    """Validation and test losses on many splits at once, (splits, 2): one penalty, a penalty each."""

    def one(train, valid, test):
        one_x = single_penalty(train, valid)[0]
        state, _ = run(make_problem(train, valid), solvers.AID(closed_form), one_x, jnp.zeros_like(one_x), steps)
        return jnp.stack(
            [jnp.stack([mean_square(x, ridge(x, train), part) for part in (valid, test)]) for x in (one_x, state.x)]
        )

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *splits)
    return jax.jit(jax.vmap(one))(*stacked)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=150)
    parser.add_argument("--valid", type=int, default=150)
    parser.add_argument("--steps", type=int, default=500, help="the most outer steps")
    parser.add_argument("--splits", type=int, default=50, help="random splits of the repeated comparison; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("ridge_per_feature.png"))
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    jax.config.update("jax_enable_x64", True)

    sizes = (args.train, args.valid, -1)
    train, valid, test = load(sizes, args.seed)
    one_x, grid, grid_losses = single_penalty(train, valid)
    counts = f"{len(train[1])} training, {len(valid[1])} validation, {len(test[1])} test patients"
    print(f"diabetes: {counts}; {len(one_x)} penalties")
    print("  relative error of the hypergradient against the closed form, at the best single penalty:")
    errors = estimator_errors(train, valid, one_x)
    for name, error in errors.items():
        print(f"    {name:<42} {error:.1e}")

    # From the best single penalty on: what is gained below is gained by having one each.
    solution = solve(
        make_problem(train, valid), one_x, jnp.zeros_like(one_x), solvers.AID(closed_form), steps=args.steps, tol=1e-5
    )
    print(solution)
    rows = {
        "no penalty": jnp.full_like(one_x, SMALLEST),
        "one penalty, by grid search": one_x,
        "one penalty per feature": solution.x,
    }
    print(f"\n  {'mean square error (variance 1)':<32} validation   test")
    for name, x in rows.items():
        y = ridge(x, train)
        print(f"  {name:<32} {mean_square(x, y, valid):10.4f} {mean_square(x, y, test):6.4f}")
    if args.splits:
        losses = np.asarray(learn_on_splits([load(sizes, 1000 + s) for s in range(args.splits)], 60))
        gain = losses[:, 0] - losses[:, 1]
        error = gain.std(0, ddof=1) / np.sqrt(len(gain))
        print(f"  over {args.splits} other splits, a penalty each lowers the error by (mean and its standard error)")
        for part in (0, 1):
            print(f"    {('validation', 'test')[part]:<12} {gain[:, part].mean():+.4f} ({error[part]:.4f})")
    draw(args.out, solution, one_x, grid, grid_losses)
    print(f"  picture: {args.out}; {time.perf_counter() - began:.1f} s in all")
    return errors, solution


def draw(path, solution, one_x, grid, grid_losses):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    penalties = np.exp(np.asarray(solution.x))
    left.barh(FEATURES, penalties, left=np.exp(SMALLEST), color="C0")
    left.axvline(np.exp(float(one_x[0])), color="C3", ls="--", label="one penalty, by grid search")
    left.set(xscale="log", xlabel="penalty exp(x_j)", title="learnt penalty of each feature")
    left.invert_yaxis()
    left.legend(fontsize=8)
    loss = solution.history["upper_loss"]
    right.plot(solution.history.steps["upper_loss"], np.minimum.accumulate(loss), color="C0", label="a penalty each")
    right.axhline(float(grid_losses.min()), color="C3", ls="--", label="one penalty, by grid search")
    right.set(xlabel="outer step", ylabel="validation loss (best so far)")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
