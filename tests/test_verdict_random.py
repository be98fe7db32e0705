"""Random problems of one x and one y, held against a grid: CONVERGED is the lowest F in a box."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, sets, solve

BOX, REACH = 3.0, 12.0


def lower_loss(rng):
    """Strictly convex in y."""
    a, kind = rng.normal(size=6), rng.integers(0, 5)
    extra = (
        lambda x, y: 0.0,
        lambda x, y: 0.5 * jnp.exp(0.5 * y * np.sign(a[3])),
        lambda x, y: 0.2 * y**4,
        lambda x, y: jnp.log1p(jnp.exp(a[3] * x + y * a[4])),
        lambda x, y: 0.3 * jnp.sin(x * a[3]) * y,
    )[kind]
    return lambda x, y: (1 + abs(a[0])) * (y - a[1] * x - a[2]) ** 2 + extra(x, y)


def upper_loss(rng):
    """Waves, kinks and wells."""
    a, kind = rng.normal(size=6), rng.integers(0, 5)
    return (
        lambda x, y: (y - a[0]) ** 2 + 0.3 * a[1] * x,
        lambda x, y: jnp.sin(2 * x + a[0]) + 0.1 * (y - a[1]) ** 2,
        lambda x, y: jnp.abs(y - a[0]) + 0.2 * x**2,
        lambda x, y: jnp.maximum(y - a[0], a[1] * x) + 0.1 * (x - a[2]) ** 2,
        lambda x, y: (x**2 - 1) ** 2 * 0.3 + a[0] * y,
    )[kind]


def on_a_grid(upper, lower, feasible, count=2401):
    """x, the lower solutions, and F there."""
    x, y = jnp.linspace(-BOX, BOX, 601), jnp.linspace(-REACH, REACH, count)
    values = jax.vmap(lambda x: jax.vmap(lambda y: jnp.where(feasible(x, y), lower(x, y), jnp.inf))(y))(x)
    best = y[jnp.argmin(values, axis=1)]
    return np.asarray(x), np.asarray(best), np.asarray(jax.vmap(upper)(x, best))


@pytest.mark.parametrize(
    "seed",
    # A kink at the solution; a wave in a box beside a lower one, whose y float32 rounds; and others.
    [42, 116, 158, 3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 40))],
)
def test_converged_is_the_lowest_on_a_grid(seed):
    rng = np.random.default_rng(seed)
    lower, upper, kind = lower_loss(rng), upper_loss(rng), rng.integers(0, 4)
    rng.integers(0, 2)  # a draw that nothing uses: with it the seeds are the problems that were once found wrong
    parts, feasible = {"project_upper": sets.Box(-BOX, BOX)}, lambda x, y: True
    if kind == 1:
        b = float(rng.normal())
        parts["constraint"] = lambda x, y: y - b - 0.5 * x
        feasible = lambda x, y: y - b - 0.5 * x <= 1e-9
    elif kind == 2:
        b = float(rng.normal())
        parts["project_lower"] = sets.Box(b - 1, b + 0.5)
        feasible = lambda x, y: (y >= b - 1 - 1e-9) & (y <= b + 0.5 + 1e-9)
    x, y, values = on_a_grid(upper, lower, feasible)
    start = jnp.full(1, float(rng.uniform(-2, 2)))
    one = lambda fn: lambda x, y: fn(x[0], y[0])
    parts |= {"constraint": one(parts["constraint"])} if kind == 1 else {}
    found = solve(Problem(one(upper), one(lower), **parts), start, jnp.zeros(1), steps=3000, tol=1e-3, progress=False)
    assert found.result.name == "CONVERGED", found
    of_range = (float(upper(found.x[0], found.y[0])) - values.min()) / np.ptp(values)
    assert of_range < 0.01
    at = int(np.abs(x - float(found.x[0])).argmin())
    # The grid's steps, and how far y goes on one of x's.
    assert abs(y[at] - float(found.y[0])) < 0.01 + np.abs(np.gradient(y))[at]
