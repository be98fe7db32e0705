"""Proximal operators: held to the minimisation that defines them, in both modes, and as a problem's `prox_lower`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from bilevel import Problem, ProblemError, lower, prox, sets, solve, solvers

RANDOM = np.random.default_rng(5)
Y = RANDOM.normal(size=5) * 2
# B is of one precision in all tests: a float64 constant that JAX 0.10 has compiled under x64 stays one without x64.
A, B = RANDOM.normal(size=(3, 5)), RANDOM.normal(size=3).astype(np.float32)
SUM = lambda u: jnp.sum(jnp.abs(u))
SQUARES = lambda u: 0.5 * jnp.sum(u**2)
# operator of a strength that is a function of x, r(x, u) without its bounds, and the lower bound of u
CASES = {
    "none": (prox.none(), lambda x, u: 0.0 * x, None),
    "lasso": (prox.lasso(jnp.exp), lambda x, u: jnp.exp(x) * SUM(u), None),
    "ridge": (prox.ridge(jnp.exp), lambda x, u: jnp.exp(x) * SQUARES(u), None),
    "elastic net": (
        prox.elastic_net(jnp.exp, lambda x: 2 * jnp.exp(x)),
        lambda x, u: jnp.exp(x) * (SUM(u) + 2 * SQUARES(u)),
        None,
    ),
    "non-negative lasso": (prox.non_negative_lasso(jnp.exp), lambda x, u: jnp.exp(x) * SUM(u), 0.0),
    "non-negative ridge": (prox.non_negative_ridge(jnp.exp), lambda x, u: jnp.exp(x) * SQUARES(u), 0.0),
    "log barrier": (prox.log_barrier(jnp.exp), lambda x, u: -jnp.exp(x) * jnp.sum(jnp.log(u)), 1e-12),
    "group lasso": (prox.group_lasso(jnp.exp), lambda x, u: jnp.exp(x) * jnp.sqrt(u @ u), None),
    "least squares": (
        prox.least_squares(A, lambda x: x * B, jnp.exp),
        lambda x, u: jnp.exp(x) * SQUARES(A @ u - x * B),
        None,
    ),
    "non-negative least squares": (
        prox.non_negative_least_squares(A, lambda x: x * B, jnp.exp),
        lambda x, u: jnp.exp(x) * SQUARES(A @ u - x * B),
        0.0,
    ),
}
each = pytest.mark.parametrize("name", CASES)


@functools.cache
def compiled(name):
    """An operator and both modes of its derivative, each compiled once for each kind of argument."""
    operator = CASES[name][0]
    f = lambda v: operator(v[5], v[:5], v[6])
    return jax.jit(operator), jax.jit(f), jax.jit(lambda v: (jax.jacfwd(f)(v), jax.jacrev(f)(v)))


@each
def test_an_operator_minimises_what_its_formula_says(x64, name):
    """Against SciPy's bounded minimiser from the found point and others: none is lower, and the point is feasible."""
    operator, r, least = CASES[name]
    x, scaling = -0.3, 0.7
    found = np.asarray(operator(x, jnp.asarray(Y), scaling))
    objective = jax.jit(lambda u: 0.5 * jnp.sum((u - Y) ** 2) + scaling * r(x, u))
    value = float(objective(found))
    assert least is None or float(found.min()) >= 0
    for start in (found + 1e-3, np.abs(Y) + 0.1, np.full(5, 0.5)):
        bounds = [(least, None)] * 5
        best = scipy.optimize.minimize(lambda u: float(objective(u)), start, method="L-BFGS-B", bounds=bounds)
        assert value <= best.fun + 1e-9
    for _ in range(30):
        other = found + RANDOM.normal(size=5) * 10.0 ** RANDOM.uniform(-4, 0)
        assert value <= float(objective(other if least is None else np.maximum(other, least))) + 1e-12


@each
def test_both_modes_equal_differences_by_y_x_and_the_scaling(x64, name):
    _, f, both_modes = compiled(name)
    at, eps = np.append(Y, [-0.3, 0.7]), 1e-6
    expected = np.stack([(np.asarray(f(at + e)) - np.asarray(f(at - e))) / (2 * eps) for e in eps * np.eye(7)], -1)
    for jacobian in both_modes(at):
        np.testing.assert_allclose(jacobian, expected, atol=1e-6)


@each
def test_kinks_zeros_and_small_dtypes_are_safe(name):
    operator = compiled(name)[0]
    reverse = jax.jit(jax.jacrev(lambda y: CASES[name][0](0.0, y, 1.0)))
    for y in (np.zeros(5), np.ones(5), np.array([1e30, -1e30, 0.0, 1.0, 1.0])):
        assert np.all(np.isfinite(reverse(y.astype(np.float32)))), name
    small = jax.eval_shape(CASES[name][0], 0.0, np.ones(5, jnp.bfloat16), 1.0)
    assert small.dtype == jnp.bfloat16
    assert jax.eval_shape(CASES[name][0], np.float32(0), np.ones(5, np.float32), 0.5).dtype == jnp.float32
    y = np.stack([Y, Y]).astype(np.float32)
    batched = jax.jit(jax.vmap(CASES[name][0], in_axes=(0, 0, None)))(np.zeros(2, np.float32), y, 0.5)
    np.testing.assert_allclose(batched[1], operator(np.float32(0), y[0], 0.5), atol=1e-5)


def test_zero_strength_is_the_identity_with_its_derivative():
    for operator in (prox.lasso(0.0), prox.group_lasso(0.0), prox.ridge(0), prox.elastic_net(0, 0)):
        jacobian = jax.jit(jax.jacfwd(lambda y: operator(None, y, 1.0)))(np.zeros(3))
        np.testing.assert_allclose(jacobian, np.eye(3))


def test_strengths_are_spread_over_trees_and_groups():
    y = {"w": np.array([[3.0, 4.0], [0.3, 0.4]], np.float32), "b": np.array([1.0, -1.0], np.float32)}
    groups = prox.group_lasso(lambda x: x["groups"], axis=1)

    @jax.jit
    def all_three(y, lengths):
        return (
            prox.lasso({"w": 0.5, "b": np.array([0.0, 2.0])})(None, y, 1.0),
            groups({"groups": lengths}, y["w"], 1.0),
            prox.group_lasso(1.0)(None, y, 1.0),  # one group of all leaves
        )

    found, grouped, whole = all_three(y, np.array([2.5, 1.0], np.float32))
    np.testing.assert_allclose(found["w"], [[2.5, 3.5], [0, 0]])
    np.testing.assert_allclose(found["b"], [1, 0])
    np.testing.assert_allclose(grouped, [[1.5, 2.0], [0, 0]])
    length = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in y.values()))
    np.testing.assert_allclose(whole["b"], y["b"] * (1 - 1 / length), rtol=1e-6)


def test_the_sparse_group_lasso_is_a_chain(x64):
    """Zero is in the subdifferential: y - u = lasso part + group part, entry by entry of a kept group."""
    one, two = 0.3, 0.5
    y = np.asarray([[2.0, -1.0, 0.1], [0.4, 0.3, 0.2]])
    chained = prox.chain(prox.lasso(one), prox.group_lasso(two, axis=1))
    u = np.asarray(jax.jit(lambda y: chained(None, y, 1.0))(y))
    assert np.all(u[1] == 0) and u[0, 2] == 0
    kept = u[0, :2]
    np.testing.assert_allclose(y[0, :2] - kept, one * np.sign(kept) + two * kept / np.linalg.norm(u[0]), rtol=1e-12)


def test_a_projection_is_an_operator():
    operator = prox.projection(sets.Box(0, 1))
    np.testing.assert_array_equal(operator(None, jnp.array([-1.0, 2.0]), 3.0), [0, 1])


def test_a_problem_takes_them(x64):
    """The hypergradient through the lasso of one entry: y* = t - e^x, F = (y* - 1)^2 / 2, so x* = log(t - 1)."""
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((y - 1) ** 2),
        lambda x, y: 0.5 * jnp.sum((y - 3) ** 2),
        prox_lower=prox.lasso(lambda x: jnp.exp(x)),
    )
    inner = lower.GradientDescent(0.5, 60)
    solution = solve(problem, jnp.array(0.0), jnp.zeros(1), solvers.AID(inner, 0.1), steps=300, progress=False)
    np.testing.assert_allclose(solution.x, np.log(2), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: prox.lasso(-1.0), ValueError, r"prox.lasso: the strength -1.0 is negative or NaN"),
        (
            lambda: prox.ridge({"a": np.array([1.0, np.nan])}),
            ValueError,
            "prox.ridge: the strength .* is negative or NaN",
        ),
        (lambda: prox.lasso(None), TypeError, "takes its strength as a number, a tree or a function of x, not None"),
        (
            lambda: prox.lasso(np.ones(2))(None, jnp.ones(3), 1.0),
            ValueError,
            r"prox.lasso's strength has the shape \(2,\)",
        ),
        (lambda: prox.group_lasso(1.0, axis=1)(None, jnp.ones(3), 1.0), ValueError, "was given a leaf of shape"),
        (
            lambda: prox.group_lasso(np.ones(3), axis=1)(None, jnp.ones((2, 3)), 1.0),
            ValueError,
            r"the strength has the shape \(3,\) and the groups have \(2,\)",
        ),
        (lambda: prox.least_squares(A, B)(None, jnp.ones(4), 1.0), ValueError, r"takes A \(rows, 4\)"),
        (lambda: prox.projection(3), TypeError, "takes a set or a projection"),
        (lambda: prox.chain(), TypeError, "takes operators"),
    ],
)
def test_bad_arguments_are_errors_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("swapped", "x0", "y0"),
    [
        (lambda y, x, s: jnp.sign(y) * jnp.maximum(jnp.abs(y) - s * jnp.exp(x), 0), jnp.array(0.0), jnp.zeros(3)),
        (lambda a, b, s: jnp.sign(a) * jnp.maximum(jnp.abs(a) - s * jnp.exp(b), 0), jnp.zeros(3), jnp.zeros(3)),
        (lambda a, b, s: jnp.sign(a) * jnp.maximum(jnp.abs(a) - s * jnp.exp(b), 0), jnp.array(0.0), jnp.zeros(3)),
        (lambda a, b, s: a / (1 + s * b["strength"]), {"strength": jnp.array(1.0)}, jnp.zeros(3)),
    ],
)
def test_an_operator_in_the_old_order_is_refused(swapped, x0, y0):
    problem = Problem(lambda x, y: jnp.sum(y), lambda x, y: jnp.sum((y - 1) ** 2), prox_lower=swapped)
    with pytest.raises(ProblemError, match=r"prox_lower takes \(x, y, scaling\).*swap its first two parameters"):
        problem.validate(x0, y0)


@each
def test_no_operator_of_the_package_is_taken_for_a_swapped_one(name):
    upper, below = (lambda x, y: jnp.sum(y)), (lambda x, y: jnp.sum((y - 1) ** 2))
    Problem(upper, below, prox_lower=CASES[name][0]).validate(jnp.array(0.3), jnp.ones(5))
    Problem(upper, below, prox_lower=prox.projection(sets.Box(0, 1))).validate(jnp.ones(5), jnp.ones(5))
