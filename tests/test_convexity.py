"""What traces say is convex is so, and the search of the lower level that relies on it finds what a longer one does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, Result, solve
from bilevel._convexity import CONSTANT, VARIABLE, constant, kinds
from bilevel.solvers.small import search
from bilevel.solvers.small.program import Program

A = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
LABELS = np.array([0, 1, 1, 0, 1], np.float32)


def of(f, x=CONSTANT):
    traced = jax.make_jaxpr(f)(np.ones(3, np.float32), np.ones(3, np.float32))
    return kinds(traced.jaxpr, traced.consts, [VARIABLE, x])[0]


@pytest.mark.parametrize(
    "f",
    [
        lambda y, x: jnp.sum((y - x) ** 2 + 0.1 * y**4) + jnp.sum(y**2.0),
        lambda y, x: jnp.mean(optax.sigmoid_binary_cross_entropy(A @ y, LABELS)) + jnp.exp(x[0]) * jnp.sum(y**2),
        lambda y, x: jnp.linalg.norm(y - x) + jnp.sqrt(1 + jnp.sum(y**2)) + jnp.sum(jnp.abs(A @ y - 1)),
        lambda y, x: jnp.sum(jnp.maximum(0, 1 - A @ y) ** 2) + jnp.sum(jax.nn.relu(A @ y) ** 1.5),
        lambda y, x: -jnp.sum(jnp.log(1 - y)) - jnp.sqrt(3 - jnp.max(jnp.concatenate([y, x]))),
        lambda y, x: (A @ y - 1) @ (A @ y - 1) + jnp.vdot(y, x) + jnp.sum(jnp.cosh(y)) - jnp.min(y - x),
        lambda y, x: jax.checkpoint(lambda y: jnp.sum(jnp.exp(y) + jnp.expm1(2 * y)))(y) + (1 + x[0] ** 2) * y[1] ** 2,
        lambda y, x: jnp.sum(jnp.where(x > 0, y**2, y**4)) + jnp.sum(jnp.reshape(y, (1, 3))[:, ::-1]) / 2,
        lambda y, x: jax.nn.logsumexp(y) + jnp.sum(jax.nn.logsumexp(A * y, axis=1) - A @ y),
        lambda y, x: optax.softmax_cross_entropy_with_integer_labels(A * y, np.array([0, 1, 2, 0, 1])).mean(),
        lambda y, x: optax.softmax_cross_entropy(A * y, np.ones((5, 3)) / 3).mean() - jax.nn.log_softmax(y)[1],
        lambda y, x: jnp.sum(1 / jnp.sqrt(2 - y)) + jnp.sum(jnp.power(1 - y, -0.5)),
    ],
)  # fmt: skip
def test_what_the_rules_say_is_convex(f):
    found = of(f)
    assert found.convex and not found.fixed
    assert not of(lambda y, x: -f(y, x)).convex and of(lambda y, x: -f(y, x)).concave


@pytest.mark.parametrize(
    "f",
    [
        lambda y, x: jnp.sum(jnp.sin(y)),
        lambda y, x: jnp.sum((y**2 - 1) ** 2),
        lambda y, x: y[0] * y[1],
        lambda y, x: (A[:3] @ y) @ y,
        lambda y, x: jnp.sum(jnp.where(y > 0, y, 0.0)),
        lambda y, x: jnp.sum(y**3),
        lambda y, x: jnp.sum(1 / y),
        lambda y, x: jnp.sqrt(jnp.sum(y**4)),
        lambda y, x: jnp.sum(jax.nn.softmax(y) ** 2),
        lambda y, x: jax.lax.stop_gradient(y[0]) - y[0] + y[1] ** 2,
        # a shift that varies along the sum, and one that stands elsewhere than it was taken from
        lambda y, x: jnp.log(jnp.sum(jnp.exp(y - jax.lax.stop_gradient(y)))) + jax.lax.stop_gradient(y)[0],
        lambda y, x: jnp.sum(jnp.log(jnp.sum(jnp.exp(x[:, None] - (s := jax.lax.stop_gradient(y))), 1)) + s),
        lambda y, x: jax.nn.logsumexp(jnp.sin(y)),
        lambda y, x: jnp.sum(y.astype(int).astype(float)),
        lambda y, x: jnp.sum(jax.lax.stop_gradient(y) ** 2),
        lambda y, x: x[0] * jnp.sum(y**2),
        lambda y, x: jnp.outer(y, y)[0, 1],
        lambda y, x: jax.nn.relu(y)[0] * jax.nn.relu(-y)[0] - jax.nn.relu(y)[0] * jax.nn.relu(y)[1],
        lambda y, x: jnp.tanh(y).sum() + jnp.clip(y, 0, 1).sum(),
        lambda y, x: jax.lax.scan(lambda c, v: (c * v, None), 1.0, y)[0],
    ],
)
def test_what_the_rules_do_not_say(f):
    assert not of(f).convex


def test_signs_of_what_is_given_count():
    f = lambda y, x: x[0] * jnp.sum(y**2) - x[1] * jnp.sum(jnp.sqrt(y))
    assert of(f, constant(np.array([1.0, 0.0, 2.0]))).convex
    assert of(f, constant(-np.ones(3))).concave
    assert not of(f).convex and not of(f, constant(np.array([1.0, -1, 1]))).convex


def test_keys_are_constants():
    """The draws of `data.Keyed` hold keys, which are no arrays of numpy's."""
    keys = jax.random.split(jax.random.key(0), 3)

    def f(y, x):
        shifts = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return jnp.mean(jax.vmap(lambda shift: jnp.sum((y - shift) ** 2))(shifts))

    assert of(f).convex
    assert of(f, constant(keys)).convex


def test_one_body_called_with_two_arguments_is_two_values():
    inner = jax.jit(lambda y: jax.nn.softplus(y))
    assert not of(lambda y, x: jnp.sum(inner(y) * inner(-y))).convex
    assert not of(lambda y, x: jnp.dot(inner(y), inner(y[::-1]))).convex
    assert of(lambda y, x: jnp.dot(inner(y) + 0.0, inner(y) + 0.0) * 0 + jnp.sum(inner(y))).nonnegative


def random_expression(rng, depth):
    """A function of y (2,), made of atoms and of what keeps convexity, and of what does not."""
    if depth == 0:
        a, b = rng.normal(size=2), float(rng.normal())
        return lambda y: a @ y + b
    first, second = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    c = float(rng.normal())
    return [
        lambda y: first(y) + second(y),
        lambda y: first(y) - second(y),
        lambda y: c * first(y),
        lambda y: jnp.maximum(first(y), second(y)),
        lambda y: jnp.minimum(first(y), c),
        lambda y: first(y) ** 2,
        lambda y: first(y) * first(y),
        lambda y: first(y) * second(y),
        lambda y: jnp.exp(0.1 * first(y)),
        lambda y: jnp.abs(first(y)),
        lambda y: jax.nn.softplus(first(y)),
        lambda y: jax.nn.relu(first(y)) ** 3,
        lambda y: jnp.sqrt(1 + first(y) ** 2 + second(y) ** 2),
        lambda y: jnp.log1p(jnp.maximum(first(y), 0)),
        lambda y: 1 / (1 + jnp.abs(first(y))),
        lambda y: -first(y),
    ][rng.integers(16)]


@pytest.mark.usefixtures("x64")
def test_claims_of_random_expressions_hold_at_midpoints():
    rng, claims = np.random.default_rng(3), []
    for _ in range(90):
        f = random_expression(rng, int(rng.integers(1, 4)))
        traced = jax.make_jaxpr(f)(np.ones(2))
        kind = kinds(traced.jaxpr, traced.consts, [VARIABLE])[0]
        if kind.convex or kind.concave or kind.nonnegative or kind.nonpositive:
            claims.append((f, kind))
    assert len(claims) > 50
    ends = rng.normal(size=(2, 50, 2)) * 10.0 ** rng.uniform(-1, 1, (1, 50, 1))
    points = jnp.concatenate([ends[0], ends[1], ends.mean(0)])
    values = jax.jit(lambda points: [jax.vmap(f)(points) for f, _ in claims])(points)
    for (_, kind), found in zip(claims, values, strict=True):
        a, b, middle = np.split(np.asarray(found), 3)
        small = 1e-9 * (1 + np.abs(a) + np.abs(b))
        assert not kind.convex or (middle <= (a + b) / 2 + small).all()
        assert not kind.concave or (middle >= (a + b) / 2 - small).all()
        assert not kind.nonnegative or (found >= -1e-12).all()
        assert not kind.nonpositive or (found <= 1e-12).all()


PROBLEMS = [
    (lambda x, y: jnp.sum((y - x) ** 2 + 0.1 * y**4), True),
    (lambda x, y: jnp.sum(jax.nn.softplus(-A[:, :2] @ y)) + jnp.exp(x[0]) * jnp.sum(y**2) + x[1] * y[0], True),
    (lambda x, y: jnp.sum((y**2 - 1 - x**2) ** 2), False),
]


@pytest.mark.parametrize(("f", "convex"), PROBLEMS)
def test_the_only_minimiser_is_what_solves_from_many_starts_find(f, convex):
    program = Program(Problem(lambda x, y: jnp.sum((y - 1) ** 2 + x**2), f), np.zeros(2), np.ones(2))
    rng = np.random.default_rng(0)
    for _ in range(5):
        xy = rng.normal(size=4)
        with program.precision():
            only = search._only_minimiser(program, xy)
            rows, bounds = search.lower_rows(program), box(program, xy)
            starts = [np.r_[xy[:2], y] for y in search.lower_starts(program, xy, 4, rng)]
            ends = [search.attempt(rows, start, *bounds, tol=1e-13).point for start in starts]
        assert (only is not None) == convex
        if convex:
            np.testing.assert_allclose([only] * 4, ends, atol=1e-5)


def box(program, xy):
    low, high = program.own_lower.copy(), program.own_upper.copy()
    low[:2] = high[:2] = xy[:2]
    return low, high


def test_the_verdict_on_a_convex_problem_looks_at_one_start(monkeypatch):
    calls = []
    kept = search.attempt
    monkeypatch.setattr(search, "attempt", lambda *args, **given: calls.append(1) or kept(*args, **given))
    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2 + 0.1 * x**2), PROBLEMS[0][0])
    found = solve(problem, np.zeros(2, np.float32), np.zeros(2, np.float32), tol=1e-4, steps=300, progress=False)
    assert found.result is Result.CONVERGED
    # y + .2 y^3 = x and 2 (y - 1) dy + .2 x dx = 0 with dx = (1 + .6 y^2) dy
    y = np.asarray(found.y, float)
    np.testing.assert_allclose(2 * (y - 1) + 0.2 * (y + 0.2 * y**3) * (1 + 0.6 * y**2), 0, atol=1e-3)
    assert len(calls) < 40, len(calls)
