"""Derivatives of estimates and of whole runs, in the data and in what a loss captures: right, or refused by a sentence.

Every estimator and every kind of lower solver, in reverse and in forward mode, against central differences in float64.
"""

from __future__ import annotations

import grid
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, ProblemError, data, hypergradients, linear, lower, run, solve, solvers
from bilevel.hypergradients import value_and_hypergradient

GD = lower.GradientDescent(0.1, 6)
TIED = {"equality": lambda x, y: y[:1] - x[:1]}
BOUND = {"constraint": lambda x, y: y[0] - 0.3}
BOUND_BY_DATA = {"constraint": lambda x, y, batch: y[0] - 0.1 * batch[0]}
CLIPPED = {"project_lower": lambda y: jnp.clip(y, -0.05, 0.35)}
SHRUNK = {"prox_lower": lambda x, y, s: jnp.sign(y) * jnp.maximum(jnp.abs(y) - 0.1 * s, 0)}

ESTIMATORS = {
    "Unrolled": (hypergradients.Unrolled(), GD),
    "Unrolled, plain": (hypergradients.Unrolled(checkpoint=False), GD),
    "Unrolled, two states kept": (hypergradients.Unrolled(checkpoint=2), GD),
    "Unrolled, momentum": (hypergradients.Unrolled(), lower.MomentumSGD(0.05, steps=4)),
    "Unrolled, Adam": (hypergradients.Unrolled(), lower.GradientDescent(optax.adam(0.1, eps_root=1e-6), 4)),
    "Unrolled, Newton": (hypergradients.Unrolled(), lower.Newton()),
    "Unrolled, last": (hypergradients.Unrolled(last=2), GD),
    "Unrolled, forward": (hypergradients.Unrolled(mode="forward"), GD),
    "OneStep": (hypergradients.OneStep(), GD),
    "Forward": (hypergradients.Forward(), GD),
    "Forward, last": (hypergradients.Forward(last=3), GD),
    "Forward, decay": (hypergradients.Forward(decay=0.5), GD),
    "Forward, directions": (hypergradients.Forward(directions=1), GD),
    "Forward, restart": (hypergradients.Forward(restart=2), GD),
    "Implicit": (hypergradients.Implicit(), GD),
    "Implicit, Newton": (hypergradients.Implicit(), lower.Newton()),
    "Implicit, Identity": (hypergradients.Implicit(), lower.Identity()),
    "Implicit, function": (hypergradients.Implicit(), lambda level, x, y: y - 0.1 * level.gradient(x, y)),
    "Implicit, projected": (hypergradients.Implicit(), GD, CLIPPED),
    "Implicit, prox": (hypergradients.Implicit(), GD, SHRUNK),
    "Implicit, CG": (hypergradients.Implicit(linear.CG()), GD),
    "Implicit, GMRES": (hypergradients.Implicit(linear.GMRES()), GD),
    "Implicit, series": (hypergradients.Implicit(linear.Neumann(0.1)), GD),
    "Implicit, Nystrom": (hypergradients.Implicit(linear.Nystrom(2)), GD),
    "JacobianFree": (hypergradients.JacobianFree(0.1), GD),
    "LeastSquares": (hypergradients.LeastSquares(step_size=0.1), GD),
    "LeastSquares, by curvature": (hypergradients.LeastSquares(), GD),
    "FiniteDifference": (hypergradients.FiniteDifference(), GD),
    "FiniteDifference, exact": (hypergradients.FiniteDifference(radius=None), GD),
    "FiniteDifference, own step": (hypergradients.FiniteDifference(None), lower.MomentumSGD(0.05)),
    "FirstOrder": (hypergradients.FirstOrder(), GD),
    "SAMA": (hypergradients.SAMA(), GD),
    "SAMA, exact": (hypergradients.SAMA(None), lower.GradientDescent(optax.adam(0.1), 3)),
    "StochasticImplicit": (hypergradients.StochasticImplicit(), GD),
    "StochasticImplicit, warm": (hypergradients.StochasticImplicit(warm_start=True), GD),
    "StochasticImplicit, randomised": (hypergradients.StochasticImplicit(randomised=True), GD),
    "PZOBO": (hypergradients.PZOBO(2), GD),
    "HOZOG": (hypergradients.HOZOG(2), GD),
    "NullSpace": (hypergradients.NullSpace(), lower.EqualityDescent(6), TIED),
    "ActiveSet": (hypergradients.ActiveSet(), lower.Accurate(), BOUND),
    "ActiveSet, data in the rows": (hypergradients.ActiveSet(), lower.Accurate(), BOUND_BY_DATA),
    "Implicit, LBFGS": (hypergradients.Implicit(), lower.LBFGS(tol=1e-10)),
    "Implicit, Relative": (hypergradients.Implicit(), lower.Relative(lower.LBFGS(tol=1e-10))),
    "Implicit, until": (hypergradients.Implicit(), lower.GradientDescent(0.2, 200, tol=1e-10)),
    "NullSpace, Accurate": (hypergradients.NullSpace(), lower.Accurate(tol=1e-13), TIED),
}  # fmt: skip
UNTIL = "No derivative goes back through a lower solver that runs until a tolerance"
REFUSED = {
    **dict.fromkeys(
        ("ActiveSet", "ActiveSet, data in the rows", "Implicit, LBFGS", "Implicit, Relative", "Implicit, until",
         "NullSpace, Accurate"), UNTIL,
    ),
    "StochasticImplicit, randomised": "No derivative goes back through a randomised product of Hessians",
}  # fmt: skip
FAST = (
    "Unrolled", "Unrolled, last", "Forward", "Implicit", "Implicit, series", "LeastSquares",
    "FiniteDifference", "FirstOrder", "SAMA", "StochasticImplicit", "HOZOG", "warm start", "SOBA",
)  # fmt: skip


def lanes(table):
    """The names of a table, all but some for the slow lane."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in table]


def problem(scale, captured, rows=None):
    """Data that are scaled by one traced number, losses that hold another."""
    return Problem(
        lambda x, y, b: jnp.sum((y - b) ** 2 * captured) + jnp.sum(x**2),
        lambda x, y, b: jnp.sum((y - x * b) ** 2 * captured) / 2 + jnp.sum(y**2 + y**3 / 9) / 9,
        scale * jnp.arange(1.0, 3.0),
        scale * jnp.arange(2.0, 4.0) / 2,
        **(rows or {}),
    )


def of_estimate(estimator, solver, rows=None):
    def of(at):
        found = value_and_hypergradient(problem(*at, rows), estimator, solver)
        estimate = found(jnp.array([0.3, 0.7]), jnp.array([0.1, 0.2]))
        return jnp.sum(jnp.sin(estimate.gradient)) + jnp.sum(estimate.lower.y) + estimate.value

    return of


def slopes(of, at, h=1e-5):
    """Central differences along each entry."""
    units = np.eye(len(at))
    return np.array([(of(at + h * u) - of(at - h * u)) / (2 * h) for u in units])


def check(of, refusal, rtol):
    """Derivatives in both modes are central differences; where reverse mode is refused, by that sentence.

    What is refused ends at a tolerance and is off by it: its differences are taken over more."""
    at = np.array([0.8, 1.3])
    modes = [jax.jacfwd] if refusal else [jax.jacfwd, jax.grad]
    of = jax.jit(of)
    expected = slopes(of, at, 1e-4 if refusal else 1e-5)
    for found in jax.jit(lambda at: [mode(of)(at) for mode in modes])(at):
        np.testing.assert_allclose(found, expected, rtol=rtol)
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            jax.grad(of)(at)


@pytest.mark.parametrize("name", lanes(ESTIMATORS))
def test_an_estimate_is_differentiated_in_the_data_and_in_captured_numbers(x64, name):
    check(of_estimate(*ESTIMATORS[name]), REFUSED.get(name), rtol=1e-5)


def test_the_table_has_every_estimator():
    made = {type(entry[0]).__name__ for entry in ESTIMATORS.values()}
    names = set(hypergradients.__all__) - {"Estimate", "Estimator", "Tangents", "value_and_hypergradient"}
    assert made == names - {"OneStep", "JacobianFree"}  # constructors of Unrolled and Implicit
    assert {"OneStep", "JacobianFree"} <= set(ESTIMATORS)


RUNS = {
    "ITD": solvers.ITD(4, 0.1, 0.1),
    "warm start": solvers.TruncatedITD(4, 2, 0.1, 0.1),
    "AID": solvers.AID(lower.Newton(), 0.1),
    "SOBA": solvers.SOBA(0.1, 0.1),
    "SAMA": solvers.SAMA(0.1, 0.1),
    "DARTS": solvers.DARTS(2, 0.1, 0.1),
    "FSLA": solvers.FSLA(0.1, 0.1),
    "SingleLoopF2SA": solvers.SingleLoopF2SA(0.1, 0.1),
    "AID, L-BFGS": solvers.AID(upper_optimizer=0.1),
    "AID, quasi-Newton": solvers.AID(lower.Newton()),
    "BSA": solvers.BSA(),
}
RUN_REFUSED = {
    "AID, L-BFGS": UNTIL, "AID, quasi-Newton": "No derivative goes back through a step rule that withdraws",
    "BSA": "No derivative goes back through a randomised product",
}  # fmt: skip


@pytest.mark.parametrize("name", lanes(RUNS))
def test_a_whole_run_is_differentiated_in_the_data(x64, name):
    def of(at):
        state, _ = run(problem(*at), RUNS[name], jnp.array([0.3, 0.7]), jnp.array([0.1, 0.2]), 2)
        return jnp.sum(jnp.sin(state.x)) + jnp.sum(state.y)

    check(of, RUN_REFUSED.get(name), rtol=2e-5)


def exact_residual(y, batch):
    noise = 0.01 * jax.vmap(lambda key: jax.random.normal(key, dtype=jnp.float64))(batch["key"])
    return (1 + batch["label"]) * (batch["a"] @ y["w"] + y["b"] - batch["t"] - noise)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in grid.SOLVERS if name != "MPCC"])
def test_a_run_of_every_constructor_is_differentiated_or_refused(x64, monkeypatch, name):
    """In forward mode all are right; in reverse they are right, or refused by a sentence of their own."""
    weights = lambda x, y: 0 * y["w"] if x is None else x
    upper = lambda x, y, batch: jnp.mean(exact_residual(y, batch) ** 2) / 2 + 0.01 * jnp.sum(weights(x, y) ** 2)
    decay = lambda x, y: jnp.sum(jnp.exp(weights(x, y)) * y["w"] ** 2) + y["b"] ** 2
    monkeypatch.setattr(grid, "upper_loss", upper)
    monkeypatch.setattr(
        grid, "lower_loss", lambda x, y, batch: (jnp.mean(exact_residual(y, batch) ** 2) + decay(x, y)) / 2
    )
    case = grid.SOLVERS[name]
    given, start = case.problem(np.float64), case.start(*[np.float64] * 3)
    # With its own step sizes, one over a curvature, which a derivative takes for a constant.
    solver = solvers.AiPOD(upper_optimizer=0.1, lower_step=0.1) if name == "AiPOD" else case.make()

    def of(scale):
        times = lambda leaf: leaf * scale if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        state, _ = run(jax.tree.map(times, given), solver, *start, 2)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((state.x, state.y)))

    of = jax.jit(of)
    expected = (of(1 + 1e-5) - of(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.jacfwd(of))(1.0), expected, rtol=3e-5)
    try:
        found = jax.jit(jax.grad(of))(1.0)
    except ValueError as error:
        assert str(error).startswith("No derivative goes back through"), error
    else:
        np.testing.assert_allclose(found, expected, rtol=3e-5)


@pytest.mark.slow
def test_batches_have_cotangents_too(x64):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)))

    def of(scale):
        pools = (data.Minibatches(scale * rows, 4) for _ in range(2))
        drawn = Problem(
            lambda x, y, b: jnp.mean((y - b) ** 2) + x @ x, lambda x, y, b: jnp.mean((y - x * b) ** 2), *pools
        )
        state, _ = run(drawn, solvers.TruncatedITD(4, 2, 0.1, 0.1), jnp.array([0.3, 0.7]), jnp.zeros(2), 2)
        return jnp.sum(jnp.sin(state.x))

    expected = (of(1 + 1e-5) - of(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(of)(1.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(of)(1.0), expected, rtol=1e-6)


def test_solve_is_no_part_of_a_transformation():
    def of(scale):
        return solve(problem(scale, 1.0), jnp.zeros(2), jnp.zeros(2), steps=1).x

    with pytest.raises(ProblemError, match=r"bilevel.run\(problem, solver, x0, y0, steps\)"):
        jax.jit(of)(1.0)
