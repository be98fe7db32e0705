"""`lower.ProximalGradient` against closed forms, in any units, and the hypergradient through what it finds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bilevel import Problem, Result, hypergradients, lower, sets, solve
from bilevel.hypergradients import value_and_hypergradient

RANDOM = np.random.default_rng(3)
A, B = RANDOM.standard_normal((30, 12)), RANDOM.standard_normal((20, 12))
TRUE = np.concatenate([2 * np.ones(3), np.zeros(9)])
SEEN, HELD_OUT = A @ TRUE + 0.3 * RANDOM.standard_normal(30), B @ TRUE + 0.3 * RANDOM.standard_normal(20)


def soft(y, strength):
    return jnp.sign(y) * jnp.maximum(jnp.abs(y) - strength, 0)


def level_of(loss, **parts):
    return Problem(lambda x, y: 0.0, loss, **{f"{name}_lower": part for name, part in parts.items()}).full_lower()


def found(level, y, solver=lower.ProximalGradient(tol=1e-12)):  # noqa: B008
    return solver(level, jnp.zeros(()), solver.init(y)).y


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_a_lasso_with_orthogonal_columns_is_the_soft_threshold(x64, unit):
    q = np.linalg.qr(A)[0]
    level = level_of(
        lambda x, y: unit * 0.5 * jnp.sum((q @ y - SEEN) ** 2), prox=lambda x, y, scaling: soft(y, scaling * unit * 0.5)
    )
    np.testing.assert_allclose(found(level, jnp.ones(12)), soft(q.T @ SEEN, 0.5), atol=1e-9)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_quadratic_in_a_box_meets_the_conditions_of_its_solution(x64, unit):
    box = sets.Box(-0.5 * unit, 1.0 * unit)
    level = level_of(lambda x, y: 0.5 * jnp.sum((A @ (y / unit) - SEEN) ** 2), project=box)
    y = found(level, jnp.zeros(12)) / unit
    slope = np.asarray(A.T @ (A @ y - SEEN))
    low, high = np.isclose(y, -0.5, atol=1e-12), np.isclose(y, 1.0, atol=1e-12)
    assert (low | high).any()
    assert (slope[low] > 0).all()
    assert (slope[high] < 0).all()
    np.testing.assert_allclose(slope[~(low | high)], 0, atol=1e-7)


def test_a_second_solve_keeps_the_length_of_the_steps_and_ends_where_it_is():
    solver = lower.ProximalGradient()
    level = level_of(lambda x, y: 50 * jnp.sum((y - 1) ** 2), project=sets.Box(-3.0, 3.0))
    first = solver(level, 0.0, solver.init(jnp.zeros(4)))
    again = solver(level, 0.0, first)
    np.testing.assert_allclose(again.y, 1, rtol=1e-6)
    assert 1e-3 < again.memory.size < 2e-2  # L = 100


@functools.cache
def slope_of_the_held_out_loss(at):
    """By central differences through the lower solution, whatever a hypergradient makes of it."""

    @jax.jit
    def objective(x):
        level = level_of(lambda _, y: 0.5 * jnp.sum((A @ y - SEEN) ** 2), prox=lambda _, y, s: soft(y, s * jnp.exp(x)))
        return jnp.mean((B @ found(level, jnp.zeros(12)) - HELD_OUT) ** 2)

    return (objective(at + 1e-5) - objective(at - 1e-5)) / 2e-5


@pytest.mark.parametrize("step", [None, 1e-3, 1.0])
def test_the_hypergradient_of_a_lasso_is_the_finite_difference_whatever_the_step_of_its_map(x64, step):
    problem = Problem(
        lambda x, y: jnp.mean((B @ y - HELD_OUT) ** 2),
        lambda x, y: 0.5 * jnp.sum((A @ y - SEEN) ** 2),
        prox_lower=lambda x, y, scaling: soft(y, scaling * jnp.exp(x)),
    )
    fn = value_and_hypergradient(problem, hypergradients.Implicit(step=step), lower.ProximalGradient(5000, tol=1e-13))
    found = jax.jit(fn)(np.array(1.0), np.zeros(12))
    np.testing.assert_allclose(found.gradient, slope_of_the_held_out_loss(1.0), rtol=1e-5)


@functools.cache
def least_of_a_grid():
    """The least held-out loss for 141 strengths."""
    one = lambda x: level_of(
        lambda _, y: 0.5 * jnp.sum((A @ y - SEEN) ** 2), prox=lambda _, y, s: soft(y, s * jnp.exp(x))
    )
    losses = jax.jit(
        lambda grid: jax.lax.map(lambda x: jnp.mean((B @ found(one(x), jnp.zeros(12)) - HELD_OUT) ** 2), grid)
    )
    return losses(np.linspace(-3, 4, 141)).min()


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_a_lasso_is_solved_without_a_solver_in_any_unit_of_the_lower_loss(x64, unit):
    problem = Problem(
        lambda x, y: jnp.mean((B @ y - HELD_OUT) ** 2),
        lambda x, y: unit * 0.5 * jnp.sum((A @ y - SEEN) ** 2),
        prox_lower=lambda x, y, scaling: soft(y, unit * scaling * jnp.exp(x)),
    )
    solution = solve(problem, jnp.zeros(()), jnp.zeros(12), steps=300, tol=1e-4, progress=False)
    assert solution.result is Result.CONVERGED
    assert problem.upper(solution.x, solution.y) <= least_of_a_grid() * (1 + 1e-4)


def test_forward_mode_goes_through_it_and_reverse_mode_says_what_to_do(x64):
    level = lambda x: level_of(lambda _, y: jnp.sum((y - x) ** 4 + (y - x) ** 2), project=sets.Box(-9.0, 9.0))
    check_grads(jax.jit(lambda x: found(level(x), jnp.zeros(2))), (jnp.ones(2),), order=1, modes=["fwd"], rtol=1e-4)
    with pytest.raises(ValueError, match=r"lower\.Newton\(\)"):
        jax.grad(lambda x: found(level(x), jnp.zeros(2)).sum())(jnp.ones(2))


def test_a_tolerance_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match="give a share between 0 and 1 of the first residual"):
        lower.ProximalGradient(tol=0.0)
