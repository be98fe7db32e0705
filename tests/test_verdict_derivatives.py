"""Where the derivative that JAX takes is not that of a loss's values, zero says nothing, and CONVERGED is not said."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, solve, solvers
from bilevel.result import Result
from bilevel.solvers._units import untrue

stopped = jax.lax.stop_gradient


@jax.custom_vjp
def passed_over(y):
    return jnp.round(y)


passed_over.defvjp(lambda y: (jnp.round(y), None), lambda _, g: (g,))


def mean(y):
    return jnp.mean((y - 1) ** 2)


def quadratic(x, y):
    return jnp.sum((y - x) ** 2)


def quartic(x, y):
    return jnp.sum((y - x) ** 2 + 0.1 * (y - x) ** 4)


def half(z):
    """Its derivative is half of what it should be."""
    return stopped(z) / 2 + z / 2


FALSE = {
    "F": (lambda x, y: mean(stopped(y)), quadratic, "upper"),
    "F, of another shape": (lambda x, y: mean(stopped(y)), quartic, "upper"),
    "F, in part": (lambda x, y: mean(stopped(y)) + jnp.mean((x - 2.5) ** 2), quartic, "upper"),
    "F, by half": (lambda x, y: mean(half(y)) + jnp.mean((y - 3) ** 2), quartic, "upper"),
    "f": (lambda x, y: mean(y), lambda x, y: quadratic(stopped(x), y), "lower"),
    "f, of another shape": (lambda x, y: mean(y), lambda x, y: quartic(stopped(x), y), "lower"),
}


@pytest.mark.parametrize("name", FALSE)
@pytest.mark.parametrize("n", [1, 3, pytest.param(400, marks=pytest.mark.slow)])
def test_a_zero_of_another_derivative_is_no_solution(name, n):
    upper, lower, whose = FALSE[name]
    found = solve(Problem(upper, lower), jnp.full(n, 3.0), jnp.full(n, 3.0), solvers.AID(), steps=300, tol=1e-3)
    assert found.result is Result.UNRESOLVED or (n == 400 and whose == "lower" and found.result is Result.LOCAL)
    if n < 400 or whose == "upper":
        assert f"The derivative that JAX takes of {whose} is another" in found.reason, found.reason


def test_many_unknowns_of_which_F_is_stopped():
    """The general certificate, on a size at which it is fast."""
    lower = lambda x, y: quartic(jnp.broadcast_to(x, y.shape), y)
    problem = Problem(FALSE["F, of another shape"][0], lower)
    found = solve(problem, jnp.full(1, 3.0), jnp.full(400, 3.0), solvers.AID(), steps=300, tol=1e-3)
    assert found.result is Result.UNRESOLVED
    assert "The derivative that JAX takes of upper is another" in found.reason


@pytest.mark.parametrize("n", [2, 400])
def test_rules_that_are_right_are_not_called_otherwise(n):
    """logsumexp stops the gradient of its maximum, relu and abs have rules of their own and kinks."""

    def upper(x, y):
        kinks = jnp.mean(jax.nn.relu(y - 1) + jnp.abs(y - 1) + jnp.sqrt(jnp.abs(x - 1) + 1e-9))
        return jax.nn.logsumexp(y) + kinks + jnp.mean((passed_over(y) - y) ** 2) * 0

    lower = lambda x, y: quadratic(x, y) + jax.nn.logsumexp(y) * 1e-3 + jnp.sum(jax.nn.softplus(y)) * 1e-3
    start = jnp.full(n, 1.0)
    found = solve(Problem(upper, lower), start, start, solvers.AID(), steps=20, tol=1e-3)
    assert "The derivative that JAX takes" not in found.reason


def test_differences_are_believed_where_they_agree():
    sizes = np.array([1e-3, 1e-3 / 16])
    at = lambda fn: np.array([[[fn(size) - fn(0), fn(-size) - fn(0)]] for size in sizes])
    for fn, told, wrong in (
        (lambda s: 3 * s + s**2, 3.0, False),
        (lambda s: 3 * s + s**2, 2.0, True),
        (lambda s: 3 * s, 0.0, True),
        (lambda s: 0.0, 3.0, True),
        (lambda s: 0.0, 0.0, False),
        (lambda s: max(s, 0.0), 0.0, False),  # kinks, at which a slope is that of no side
        (lambda s: max(3 * s, 3.4 * s), 3.4, False),
        (lambda s: max(3 * s, 3.4 * s), 3.2, False),
        (lambda s: max(3 * s, 3.4 * s), 4.0, True),
        (lambda s: np.sqrt(abs(s)), 1e8, False),
        (lambda s: np.tanh(1e5 * s), 1e5, False),  # and what is shorter than the differences
        (lambda s: np.floor(s + 1e-9), 0.0, False),
        (lambda s: np.nan, 1.0, False),
        (lambda s: 1e-9 * s, 0.0, False),  # rounding
    ):
        assert bool(untrue(at(fn), np.array([told]), sizes, 1e-10)) is wrong


def test_what_falls_for_ever_beside_waves_is_not_solved():
    for solver in (None, solvers.MPCC()):
        problem = Problem(lambda x, y: jnp.sum(jnp.sin(y) + 0.1 * y), quadratic)
        found = solve(problem, jnp.full(1, 3.0), jnp.full(1, 3.0), solver, steps=2000, tol=1e-3)
        assert found.result in (Result.UNBOUNDED, Result.LOCAL)
