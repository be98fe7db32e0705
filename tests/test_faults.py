"""Faults that were once found in what solvers said: each as it was given, and neighbours of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, Result, implicit, linear, run, solve, solvers
from bilevel.hypergradients import value_and_hypergradient

A = jnp.asarray

# A start outside the sets ---------------------------------------------------------------------------------------------


def boxed(**sets):
    return Problem(lambda x, y: (y - 2) ** 2 + 0.1 * x**2, lambda x, y: 0.5 * (y - x) ** 2, **sets)


@pytest.mark.parametrize("start", [3.0, -40.0])
@pytest.mark.parametrize("solver", [None, solvers.F2BA(), solvers.STFBO()], ids=["default", "F2BA", "STFBO"])
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


@pytest.mark.parametrize(
    "solver", [None, linear.Dense(), linear.CG(), linear.MINRES(), linear.Robust(), linear.GMRES()], ids=str
)
@pytest.mark.parametrize("jacobian", [jax.jacrev, jax.jacfwd])
def test_a_condition_with_a_jacobian_that_is_not_symmetric(solver, jacobian, x64):
    solved = implicit.custom_root(lambda y, b: SKEW @ y - b, solve=solver)(lambda _, b: jnp.linalg.solve(SKEW, b))
    found = jax.jit(jacobian(lambda b: solved(jnp.zeros(2), b)))(A([1.0, 2.0]))
    np.testing.assert_allclose(found, np.linalg.inv(SKEW), atol=1e-10)


def test_a_symmetric_solver_is_still_the_one_that_solves_a_symmetric_condition(x64):
    matrix = A([[2.0, 1.0], [1.0, 3.0]])
    # Ten times the identity is damped in: only the solver that was asked for gives this answer.
    solved = implicit.custom_root(lambda y, b: matrix @ y - b, solve=linear.CG(damping=10.0))(lambda _, b: b)
    found = jax.jacrev(lambda b: solved(jnp.zeros(2), b))(A([1.0, 2.0]))
    np.testing.assert_allclose(found, np.linalg.inv(matrix + 10 * np.eye(2)), atol=1e-6)


def test_dense_sees_a_matrix_that_is_not_symmetric(x64):
    solve_it = lambda b: linear.Dense()(lambda v: SKEW @ v, b)[0]
    b = A([1.0, 2.0])
    np.testing.assert_allclose(solve_it(b), np.linalg.solve(SKEW, b), rtol=1e-12)
    np.testing.assert_allclose(jax.jacrev(solve_it)(b), np.linalg.inv(SKEW), rtol=1e-12)
    assert not linear.Dense()(lambda v: SKEW @ v, b)[2].negative_curvature


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


@pytest.mark.parametrize("d", [1, 50])
def test_a_lower_parameter_that_only_the_upper_loss_uses_has_a_hypergradient(d):
    problem, x, y = unused(d)
    estimate = jax.jit(lambda x: value_and_hypergradient(problem)(x, y))(x + 0.3)
    np.testing.assert_allclose(estimate.gradient, 2 * (0.3 - 1) + 2 * 0.3, rtol=1e-4)
    solution = solve(problem, x, y, tol=1e-4, steps=50, solver=solvers.AID())
    np.testing.assert_allclose(solution.x, 0.5, atol=1e-3)
    assert solution.result is not Result.CONVERGED
    assert "not in its range" in solution.reason


@pytest.mark.parametrize("kind", ["given", "many"])
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
    [solvers.AID(), solvers.AID(linear_solver=linear.CG()), solvers.IMAML()],
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


@pytest.mark.parametrize("solver", [solvers.AID(), solvers.ITD(20, 0.3), solvers.GALET()], ids=["AID", "ITD", "GALET"])
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
    estimate = value_and_hypergradient(problem, estimator, lambda lower, x, y: y)(x, y)
    np.testing.assert_allclose(estimate.gradient, shares.sum(0), rtol=1e-9)
    assert float(estimate.metrics["linear_error"]) < 1e-10


def test_a_task_with_negative_curvature_leaves_the_others_alone(x64):
    problem, x, y, shares = tasks(lowest=-4.0)
    estimator = solvers.IMAML(cg_steps=3).hypergradient
    estimate = value_and_hypergradient(problem, estimator, lambda lower, x, y: y)(x, y)
    b = jax.grad(problem.upper, argnums=1)(x, A(y))
    lower_y = lambda y: jax.grad(problem.lower, argnums=1)(x, y)
    v, _, info = estimator.linear_solver(jax.linearize(lower_y, A(y))[1], b)
    np.testing.assert_allclose(0.5 * v[1:], shares[1:], rtol=1e-8)
    assert bool(info.negative_curvature) and bool(jnp.vdot(v[0], b[0]) > 0)
    assert float(estimate.metrics["negative_curvature"]) == 1


def test_a_task_that_is_not_stacked_is_one_system(x64):
    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: (y - x) @ A([[2.0, 1.0], [1.0, 3.0]]) @ (y - x))
    estimate = value_and_hypergradient(problem, solvers.IMAML().hypergradient, lambda lower, x, y: x)(
        jnp.zeros(2), jnp.zeros(2)
    )
    np.testing.assert_allclose(estimate.gradient, [-2.0, -2.0], rtol=1e-9)
