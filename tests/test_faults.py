"""Faults that were once found in what solvers said: each as it was given, and neighbours of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, ProblemError, Result, data, hypergradients, implicit, linear, lower, run, solve, solvers
from bilevel.hypergradients import value_and_hypergradient

A = jnp.asarray

# A start outside the sets ---------------------------------------------------------------------------------------------


def boxed(**sets):
    return Problem(lambda x, y: (y - 2) ** 2 + 0.1 * x**2, lambda x, y: 0.5 * (y - x) ** 2, **sets)


@pytest.mark.parametrize("start", [3.0, -40.0])
@pytest.mark.parametrize(
    "solver",
    [None, pytest.param(solvers.F2BA(), marks=pytest.mark.slow), solvers.STFBO()],
    ids=["default", "F2BA", "STFBO"],
)
def test_a_start_outside_the_upper_set_is_projected(solver, start):
    problem = boxed(project_upper=lambda x: jnp.clip(x, -0.5, 0.5))
    solution = solve(problem, A(start), A(0.0), solver, tol=1e-4, steps=2000)
    assert solution.result is Result.CONVERGED
    np.testing.assert_allclose(solution.x, 0.5, atol=1e-4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    x: Any
    y: Any


class Standing:
    """A solver that moves nothing."""

    def init(self, problem, x, y, key):
        return Pair(x, y)

    def step(self, problem, state, key):
        return state, {"upper_loss": problem.upper(state.x, state.y)}


def test_both_variables_are_projected_before_any_solver_sees_them():
    sets = {"project_upper": lambda x: jnp.clip(x, -0.5, 0.5), "project_lower": lambda y: jnp.maximum(y, 1.0)}
    problem = boxed(**sets)
    solution = solve(problem, A(3.0), A(-2.0), Standing(), steps=1)
    assert (float(solution.x), float(solution.y)) == (0.5, 1.0)
    state, _ = run(problem, Standing(), A(3.0), A(-2.0), 1)
    assert (float(state.x), float(state.y)) == (0.5, 1.0)


# Linear systems that are not what a solver needs ----------------------------------------------------------------------

SKEW = np.array([[2.0, 1.0], [-1.0, 3.0]])


SYMMETRIC = (linear.Dense(), linear.CG(), linear.MINRES(), linear.Robust())  # these make way for GMRES


@pytest.mark.parametrize("jacobian, solver", [
    *((jax.jacrev, solver) for solver in (None, *SYMMETRIC, linear.GMRES())),
    *((jax.jacfwd, solver) for solver in (None, linear.GMRES())),
    *(pytest.param(jax.jacfwd, solver, marks=pytest.mark.slow) for solver in SYMMETRIC),
], ids=lambda part: getattr(part, "__name__", str(part)))  # fmt: skip
def test_a_condition_with_a_jacobian_that_is_not_symmetric(solver, jacobian, x64):
    solved = implicit.custom_root(lambda y, b: SKEW @ y - b, solve=solver)(lambda _, b: jnp.linalg.solve(SKEW, b))
    found = jax.jit(jacobian(lambda b: solved(jnp.zeros(2), b)))(A([1.0, 2.0]))
    np.testing.assert_allclose(found, np.linalg.inv(SKEW), atol=1e-10)


def test_a_symmetric_solver_is_still_the_one_that_solves_a_symmetric_condition(x64):
    matrix = A([[2.0, 1.0], [1.0, 3.0]])
    # Ten times the identity is damped in: only the solver that was asked for gives this answer.
    solved = implicit.custom_root(lambda y, b: matrix @ y - b, solve=linear.CG(damping=10.0))(lambda _, b: b)
    found = jax.jit(jax.jacrev(lambda b: solved(jnp.zeros(2), b)))(A([1.0, 2.0]))
    np.testing.assert_allclose(found, np.linalg.inv(matrix + 10 * np.eye(2)), atol=1e-6)


def test_dense_sees_a_matrix_that_is_not_symmetric(x64):
    def solve_it(b):
        v, _, info = linear.Dense()(lambda v: SKEW @ v, b)
        return v, (v, info.negative_curvature)

    b = A([1.0, 2.0])
    slope, (v, negative) = jax.jit(jax.jacrev(solve_it, has_aux=True))(b)
    np.testing.assert_allclose(v, np.linalg.solve(SKEW, b), rtol=1e-12)
    np.testing.assert_allclose(slope, np.linalg.inv(SKEW), rtol=1e-12)
    assert not negative


def spectrum(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return (q * values) @ q.T


@pytest.mark.parametrize("d", [3, 60])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_robust_gives_the_least_squares_solution_of_least_norm(d, dtype, x64):
    values = np.linspace(1, 4, d)
    values[:2] = 0
    matrix, b = spectrum(values), np.random.default_rng(1).normal(size=d)
    expected = np.linalg.pinv(matrix, rcond=1e-6) @ b
    v, _, info = jax.jit(lambda h, b: linear.Robust()(lambda v: h @ v, b))(A(matrix, dtype), A(b, dtype))
    np.testing.assert_allclose(v, expected, atol=1e-5 if dtype == jnp.float32 else 1e-10)
    np.testing.assert_allclose(info.residual, np.linalg.norm(b - matrix @ expected), rtol=1e-5)
    assert not info.negative_curvature


@pytest.mark.parametrize("d", [3, 60])
def test_robust_is_exact_where_the_matrix_is_indefinite_or_not_symmetric(d, x64):
    values, b = np.linspace(1, 4, d), A(np.random.default_rng(1).normal(size=d))
    values[0] = -2
    matrix = spectrum(values)
    v, _, info = jax.jit(lambda b: linear.Robust(tol=1e-10)(lambda v: matrix @ v, b))(b)
    np.testing.assert_allclose(v, np.linalg.solve(matrix, b), rtol=1e-6, atol=1e-7)
    assert bool(info.negative_curvature)
    left, _, right = np.linalg.svd(np.random.default_rng(2).normal(size=(d, d)))
    values[0] = 0
    matrix = (left * values) @ right
    v = jax.jit(lambda b: linear.Robust(tol=1e-10, symmetric=False)(lambda v: matrix @ v, b)[0])(b)
    np.testing.assert_allclose(v, np.linalg.pinv(matrix) @ b, atol=1e-6)


def test_robust_in_a_batch_is_robust_alone(x64):
    d = 40
    spectra = np.stack(
        [np.linspace(1, 4, d), np.r_[0, 0, np.linspace(1, 4, d - 2)], np.r_[-1, np.linspace(1, 4, d - 1)]]
    )
    matrices = A(np.stack([spectrum(values) for values in spectra]))
    b = A(np.random.default_rng(1).normal(size=(3, d)))
    solve_it = lambda h, b: linear.Robust()(lambda v: h @ v, b)
    together, _, info = jax.jit(jax.vmap(solve_it))(matrices, b)
    alone = [jax.jit(solve_it)(h, c) for h, c in zip(matrices, b, strict=True)]
    np.testing.assert_allclose(together, np.stack([v for v, _, _ in alone]), atol=1e-8)
    assert info.negative_curvature.tolist() == [False, False, True]


# Singular lower Hessians ----------------------------------------------------------------------------------------------


def unused(d=1):
    """y* = (x, whatever y_1 is): only F uses the last d entries."""
    return (
        Problem(
            lambda x, y: (y[0] - 1) ** 2 + jnp.sum((y[1:] - 2) ** 2) + x**2,
            lambda x, y: (y[0] - x) ** 2,
        ),
        jnp.zeros(()),
        jnp.zeros(1 + d),
    )


@pytest.mark.parametrize("d", [1, pytest.param(50, marks=pytest.mark.slow)])  # `many`, below, is of 50
def test_a_lower_parameter_that_only_the_upper_loss_uses_has_a_hypergradient(d):
    problem, x, y = unused(d)
    estimate = jax.jit(lambda x: value_and_hypergradient(problem)(x, y))(x + 0.3)
    np.testing.assert_allclose(estimate.gradient, 2 * (0.3 - 1) + 2 * 0.3, rtol=1e-4)
    solution = solve(problem, x, y, tol=1e-4, steps=50, solver=solvers.AID())
    np.testing.assert_allclose(solution.x, 0.5, atol=1e-3)
    assert solution.result is not Result.CONVERGED
    assert "not in its range" in solution.reason


@pytest.mark.parametrize("kind", [pytest.param("given", marks=pytest.mark.slow), "many"])
def test_an_upper_gradient_outside_the_range_of_the_lower_hessian(kind):
    """The least-squares gradient along x -> the lower solution that is nearest to y, and no CONVERGED."""
    a = A([0.3, 0.7, 1.1]) if kind == "given" else A(np.random.default_rng(0).normal(size=50), jnp.float32)
    target = jnp.arange(len(a), dtype=jnp.float32)
    problem = Problem(lambda x, y: jnp.sum((y - target) ** 2) + x**2, lambda x, y: (a @ y - x) ** 2)
    estimate = jax.jit(lambda x, y: value_and_hypergradient(problem)(x, y))(A(0.7), jnp.zeros(len(a)))
    y = estimate.lower.y
    np.testing.assert_allclose(estimate.gradient, 2 * (y - target) @ a / (a @ a) + 1.4, rtol=1e-3)
    assert float(estimate.metrics["linear_error"]) > 0.1
    solution = solve(problem, A(0.7), jnp.zeros(len(a)), solvers.AID(), tol=1e-3, steps=50)
    assert solution.result is not Result.CONVERGED and "linear system" in solution.reason


def test_a_singular_lower_level_whose_upper_gradient_is_in_the_range_converges():
    problem = Problem(lambda x, y: (y[0] - 1) ** 2 + x**2, lambda x, y: (y[0] - x) ** 2)
    solution = solve(problem, A(0.0), A([0.0, 3.0]), solvers.AID(), tol=1e-4, steps=50)
    assert float(solution.history["linear_error"][-1]) < 1e-4
    np.testing.assert_allclose(solution.x, 0.5, atol=1e-3)


@pytest.mark.parametrize(
    "solver",
    [solvers.AID(), pytest.param(solvers.AID(linear_solver=linear.CG()), marks=pytest.mark.slow), solvers.IMAML()],
    ids=["AID", "CG", "IMAML"],
)  # fmt: skip
def test_negative_curvature_reaches_the_reason(solver):
    problem = Problem(lambda x, y: (y - 1) ** 2 + x**2, lambda x, y: -((y - x) ** 2))
    solution = solve(problem, A(0.5), A(0.3), solver, tol=1e-4, steps=30)
    assert solution.result is not Result.CONVERGED
    assert "negative curvature" in solution.reason


def test_a_lower_level_that_runs_away_along_a_line_is_said_to_be_singular():
    problem = Problem(lambda x, y: (y - 1) ** 2 + x**2, lambda x, y: -y * x)
    solution = solve(problem, A(0.5), A(0.3), solvers.AID(), tol=1e-4, steps=10)
    assert solution.result is not Result.CONVERGED and "f_yy is singular" in solution.reason


def test_a_hypergradient_of_a_truncated_solve_is_not_called_converged():
    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2) + x**2, lambda x, y: (y - x) ** 2)
    solution = solve(problem, A(0.0), A(0.0), solvers.T1T2(0.5, 0.1), tol=1e-4, steps=300)
    np.testing.assert_allclose(solution.x, 2 / 3, atol=1e-3)  # right: 1/2
    assert solution.result is not Result.CONVERGED and "cut short" in solution.reason


# Values that are not finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [solvers.AID(), solvers.ITD(20, 0.3), pytest.param(solvers.GALET(), marks=pytest.mark.slow)],
    ids=["AID", "ITD", "GALET"],
)
def test_a_lower_loss_without_a_value_is_noticed_though_its_gradient_is_finite(solver):
    hole = lambda x: jax.lax.stop_gradient(jnp.where(x > 0.2, jnp.nan, 0.0))
    problem = Problem(lambda x, y: (y - 1) ** 2 + x**2, lambda x, y: (y - x) ** 2 + hole(x))
    solution = solve(problem, A(0.0), A(0.0), solver, tol=1e-4, steps=300)
    assert solution.result is Result.DIVERGED and "lower_loss" in solution.reason


# Tasks ----------------------------------------------------------------------------------------------------------------


def tasks(count=8, d=3, lowest=1.0, seed=0):
    """Quadratic tasks held near x: their Hessians have `count` d distinct eigenvalues together and d each."""
    random = np.random.default_rng(seed)
    hessians = np.stack([spectrum(np.linspace(lowest if i == 0 else 1.0, 2 + 3 * i, d), i) for i in range(count)])
    t, v, lam = random.normal(size=(count, d)), random.normal(size=(count, d)), 0.5
    each = lambda y, h, t, x: (y - t) @ h @ (y - t) / 2 + lam / 2 * jnp.sum((y - x) ** 2)
    problem = Problem(
        lambda x, y: jnp.mean(jnp.sum((y - v) ** 2, 1)),
        lambda x, y: jnp.sum(jax.vmap(each, (0, 0, 0, None))(y, hessians, t, x)),
    )
    x = random.normal(size=d)
    y = np.stack([np.linalg.solve(h + lam * np.eye(d), h @ a + lam * x) for h, a in zip(hessians, t, strict=True)])
    w = [np.linalg.solve(h + lam * np.eye(d), 2 * (y[i] - v[i]) / count) for i, h in enumerate(hessians)]
    return problem, x, y, lam * np.asarray(w)


def test_imaml_is_exact_after_as_many_steps_as_one_task_has_unknowns(x64):
    problem, x, y, shares = tasks()
    estimator = solvers.IMAML(cg_steps=3).hypergradient
    estimate = jax.jit(value_and_hypergradient(problem, estimator, lambda lower, x, y: y))(x, y)
    np.testing.assert_allclose(estimate.gradient, shares.sum(0), rtol=1e-9)
    assert float(estimate.metrics["linear_error"]) < 1e-10


def test_a_task_with_negative_curvature_leaves_the_others_alone(x64):
    problem, x, y, shares = tasks(lowest=-4.0)
    estimator = solvers.IMAML(cg_steps=3).hypergradient

    @jax.jit
    def found(x, y):
        b = jax.grad(problem.upper, argnums=1)(x, y)
        lower_y = lambda y: jax.grad(problem.lower, argnums=1)(x, y)
        v, _, info = estimator.linear_solver(jax.linearize(lower_y, y)[1], b)
        return value_and_hypergradient(problem, estimator, lambda lower, x, y: y)(x, y), b, v, info

    estimate, b, v, info = found(x, y)
    np.testing.assert_allclose(0.5 * v[1:], shares[1:], rtol=1e-8)
    assert bool(info.negative_curvature) and bool(jnp.vdot(v[0], b[0]) > 0)
    assert float(estimate.metrics["negative_curvature"]) == 1


def test_a_task_that_is_not_stacked_is_one_system(x64):
    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: (y - x) @ A([[2.0, 1.0], [1.0, 3.0]]) @ (y - x))
    estimate = jax.jit(value_and_hypergradient(problem, solvers.IMAML().hypergradient, lambda lower, x, y: x))(
        jnp.zeros(2), jnp.zeros(2)
    )
    np.testing.assert_allclose(estimate.gradient, [-2.0, -2.0], rtol=1e-9)


# An x that reaches nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, solvers.ITD(5, 0.1), solvers.SOBA(), solvers.F2BA()], ids=str)
def test_an_x_that_reaches_no_loss_is_refused_before_the_run(solver):
    problem = Problem(lambda x, y: (y - 1) ** 2, lambda x, y: (y - 2) ** 2)
    with pytest.raises(ProblemError, match=r"x0 reaches neither the upper nor the lower loss.*start=lambda"):
        solve(problem, A(0.3), A(0.0), solver, steps=3)
    drawn = data.Minibatches(np.ones((8, 1), np.float32), 4)
    problem = Problem(lambda x, y: (y - 1) ** 2, lambda x, y, b: jnp.mean((y - b) ** 2), lower_data=drawn)
    with pytest.raises(ProblemError, match="x0 reaches neither"):
        solve(problem, A(0.3), A(0.0), solvers.SOBA(), steps=3)


@pytest.mark.parametrize(
    "solver",
    [None, solvers.ITD(5, 0.1), solvers.SOBA(), solvers.F2BA(), solvers.AID()],
    ids=["the choice", "ITD", "SOBA", "F2BA", "AID"],
)
def test_a_lower_loss_that_does_not_read_y_is_refused_before_the_run(solver):
    """It ended COMPLETED, with a word about a singular f_yy."""
    said = "lower does not depend on y0: every y minimises it.*the lower loss, whose arguments are .x, y., the upper"
    with pytest.raises(ProblemError, match=said):
        solve(Problem(lambda x, y: (y - 1) ** 2 + x**2, lambda x, y: (x - 2) ** 2), A(0.3), A(0.0), solver, steps=3)
    drawn = data.Minibatches(np.ones((8, 1), np.float32), 4)
    problem = Problem(lambda x, y: (y - 1) ** 2 + x**2, lambda x, y, b: jnp.mean((x - b) ** 2), lower_data=drawn)
    with pytest.raises(ProblemError, match="lower does not depend on y0"):
        solve(problem, A(0.3), A(0.0), solvers.SOBA(), steps=3)


def test_what_states_y_beside_the_lower_loss_is_enough(x64):
    """Rows that state y, a step of the user's own that does: then a lower loss of zero is one."""
    upper, lower = lambda x, y: (y - 1) ** 2 + x**2, lambda x, y: 0.0 * x
    found = solve(Problem(upper, lower, equality=lambda x, y: y - x), A(0.3), A(0.3), tol=1e-6)
    np.testing.assert_allclose(found.x, 0.5, atol=1e-5)
    assert solve(Problem(upper, lower), A(0.3), A(0.3), solvers.AID(lambda level, x, y: x), steps=2).steps == 2


def test_an_x_that_is_the_start_alone_is_learnt_where_the_solver_begins_there(x64):
    """MAML: y_5(x) = 2 + 0.8^5 (x - 2), at its best where y_5 = 1."""
    problem = Problem(lambda x, y: (y - 1) ** 2, lambda x, y: (y - 2) ** 2)
    inner = lower.GradientDescent(0.1, 5, start=lambda x, y: x)
    maml = solvers.HypergradientDescent(hypergradients.Unrolled(), inner)
    solution = solve(problem, A(0.3), A(0.0), maml, steps=30)
    np.testing.assert_allclose(solution.x, 2 - 0.8**-5, rtol=1e-6)


def test_an_x_of_one_constraint_alone_is_accepted():
    problem = Problem(lambda x, y: (y - 1) ** 2, lambda x, y: y**2, constraint=lambda x, y: x - y)
    assert solve(problem, A(0.3), A(0.5), solvers.BiCGAFFA(), steps=2).steps == 2


# Penalty methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [pytest.param(solvers.VPBGD(), marks=pytest.mark.slow), solvers.GPBGD()], ids=["VPBGD", "GPBGD"]
)
def test_the_pbgd_toy_ends_at_the_lower_solution_from_everywhere(solver):
    """F curves 400 times more where it waves than where it is flat, and most starts are in its flat part."""
    problem = Problem(
        lambda x, y: jnp.cos(4 * y + 2) / (1 + jnp.exp(2 - 4 * x)) + 0.5 * jnp.log((4 * x - 2) ** 2 + 1),
        lambda x, y: (x + y) ** 2,
        project_upper=lambda x: jnp.clip(x, 0, 3),
    )
    random = np.random.default_rng(0)
    x, y = A(random.uniform(0, 3, 40), jnp.float32), A(random.uniform(-10, 10, 40), jnp.float32)
    state, _ = jax.jit(jax.vmap(lambda x, y: run(problem, solver, x, y, 1500)))(x, y)
    assert np.abs(np.asarray(state.x) + np.asarray(state.y)).max() < 1e-2
    h = lambda x: problem.upper(x, -x)
    slope, x = np.asarray(jax.jit(jax.vmap(jax.grad(h)))(state.x)), np.asarray(state.x)
    assert np.abs(slope[(x > 1e-3) & (x < 3 - 1e-3)]).max() < 0.1


@pytest.mark.parametrize("kind", ["1/x", pytest.param("log", marks=pytest.mark.slow)])
def test_a_closed_edge_where_a_loss_is_not_defined_is_not_stepped_on(kind, x64):
    """F = 1e-3 / x + x or x - 1e-3 log x, whose minimum is near the edge x = 0; the first steps overshoot it."""
    barrier = (lambda x: 1e-3 / x) if kind == "1/x" else (lambda x: -1e-3 * jnp.log(x))
    problem = Problem(
        lambda x, y: barrier(x) + x + 0.1 * y**2, lambda x, y: (y - x) ** 2 / 2,
        project_upper=lambda x: jnp.maximum(x, 0.0), constraint=lambda x, y: y - 5.0,
    )  # fmt: skip
    solution = solve(problem, A(1.0), A(1.0), solvers.LVHBA(), steps=1500)
    assert solution.result is not Result.DIVERGED
    assert 0 < float(solution.x) < 0.1


def toll(**sets):
    """Two arcs, costs y_1 + x and 2 y_2 + 1, demand 1, revenue x y_1: x* = 3/2, y* = (1/2, 1/2), multiplier -5/2."""
    return Problem(
        lambda x, y: -x * y[0],
        lambda x, y: y[0] ** 2 / 2 + y[1] ** 2 + (0.5 + x) * y[0] + 1.5 * y[1],
        equality=lambda x, y: y[0] + y[1] - 1,
        project_upper=lambda x: jnp.clip(x, 0, 5),
        **sets,
    )


@pytest.mark.parametrize("sets", [{}, {"project_lower": lambda y: jnp.maximum(y, 0)}], ids=["free", "y >= 0"])
def test_the_multiplier_of_a_toll_has_no_bias_of_the_penalty(sets, x64):
    solver = solvers.LVHBA()

    @jax.jit
    def ended():
        state, _ = run(toll(**sets), solver, A(0.2), A([0.5, 0.5]), 1000)
        return state.x, state.y, solver.multipliers(toll(**sets), state)["equality"]

    x, y, multiplier = map(np.asarray, ended())
    np.testing.assert_allclose(x, 1.5, atol=0.06)
    np.testing.assert_allclose(multiplier, -2.5, atol=0.03)
    # And it fits the reported point as well as one number can fit two conditions.
    left = np.array([y[0] + 0.5 + x, 2 * y[1] + 1.5]) + multiplier
    np.testing.assert_allclose(left.sum(), 0, atol=1e-6)


def test_the_multiplier_of_a_slack_inequality_is_zero_and_of_an_active_one_exact(x64):
    from bilevel.constraints import Constraints
    from bilevel.solvers.penalty._base import refined

    g = lambda x, y: A([3 * (y[0] - 1), y[1] - 9.0])
    level = Problem(lambda x, y: 0.0, lambda x, y: jnp.sum((y - 2) ** 2) / 2, constraint=g).full_lower()

    @jax.jit
    def found(y):
        rows = Constraints(level, A(0.0), y).at(A(0.0), y)
        return rows.multipliers(refined(level, rows, A(0.0), y, A([0.5, 0.3])))["constraint"]

    np.testing.assert_allclose(found(A([1.0, 2.0])), [1 / 3, 0], atol=1e-9)


def test_richardson_gains_more_along_the_ladder(x64):
    """A quadratic with a bias of order 1 / c: three stages cancel two orders, so that the gain grows as c^2."""
    random = np.random.default_rng(0)
    m, b = random.normal(size=(4, 4)), random.normal(size=(4, 3))
    q, goal = m @ m.T / 4 + np.eye(4), random.normal(size=4)
    k = np.linalg.solve(q, b)
    x_star = np.linalg.solve(np.eye(3) + k.T @ k, k.T @ goal)
    problem = Problem(
        lambda x, y: jnp.sum(x**2) / 2 + jnp.sum((y - goal) ** 2) / 2, lambda x, y: y @ q @ y / 2 - y @ (b @ x)
    )

    def gain(shrink):
        penalty = solvers.Continuation(settle=0.02, shrink=shrink, maximum=100.0)
        state = run(problem, solvers.F2BA(penalty=penalty), jnp.zeros(3), jnp.zeros(4), 90)[0]
        return jnp.linalg.norm(state.point[0] - x_star) / jnp.linalg.norm(state.x - x_star)

    constant, shrinking = jax.jit(jax.vmap(gain))(A([0.0, 2.0]))
    assert solvers.F2BA().penalty.shrink == solvers.BLOCC().penalty.shrink == 2
    assert shrinking > 500 and shrinking > 10 * constant


# Variance reduction in a double loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lower_steps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_vrbo_is_exact_at_every_step_on_full_batches(lower_steps, x64):
    """Between restarts, which never come again here: its direction is that of the point that it belongs to."""
    from bilevel.keys import as_step_key
    from bilevel.solvers._directions import Series
    from bilevel.solvers._variance_reduction import full

    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2) + jnp.sum(x**2), lambda x, y: jnp.sum(A([1.0, 2.0, 5.0]) * (y - x) ** 2) / 2
    )
    solver = solvers.VRBO(0.1, 0.15, Series(0.15, 150), lower_steps=lower_steps, period=10_000)
    state = solver.init(problem, jnp.zeros(3), jnp.ones(3), as_step_key(0))
    step, at = jax.jit(solver.step), jax.jit(lambda point: full(problem, solver.directions, point)[1])
    for t in range(6):
        state, _ = step(problem, state, as_step_key(0, t))
        exact = at(state.at)
        np.testing.assert_allclose(state.direction.x, exact.x, atol=1e-12)
        np.testing.assert_allclose(state.direction.y, exact.y, atol=1e-12)
    for t in range(6, 300):
        state, _ = step(problem, state, as_step_key(0, t))
    np.testing.assert_allclose(state.x, 0.5, atol=1e-6)


@pytest.mark.parametrize("solver", [None, solvers.SOBA(), solvers.AID()])
def test_no_lower_unknown_is_said(solver):
    problem = Problem(lambda x, y: jnp.sum((x - 1) ** 2), lambda x, y: jnp.sum(y * x[0]))
    with pytest.raises(
        ProblemError, match=r"y0 holds no numbers: there is no lower level to solve\. Minimise the upper"
    ):
        solve(problem, jnp.zeros(2), jnp.zeros(0), solver)


def test_a_constant_upper_loss_is_a_number():
    """A Python number where a traced scalar was expected: nothing to gain, and no traceback."""
    solution = solve(Problem(lambda x, y: 3.0, lambda x, y: (y - x) ** 2), jnp.asarray(1.0), jnp.asarray(0.0))
    assert float(solution.history["upper_loss"][-1]) == 3 and abs(float(solution.y) - 1) < 1e-3
