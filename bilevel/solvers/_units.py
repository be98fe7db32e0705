"""A problem in its own units, so that tolerances need none.

What is 1 for x, y, F and f is read off the problem at a point and where the run began. Multiplying F, f, x or y by a
number multiplies its unit, and changes nothing that is measured in units.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel.level import Level
from bilevel.problem import Problem
from bilevel.typing import PyTree, Scalar

__all__ = ["Units", "natural_units", "normalised", "rms", "times"]


class Units(NamedTuple):
    """What a change of 1 in x, y, F and f is, and F and f where they were taken (they are measured from there)."""

    x: Scalar
    y: Scalar
    upper: Scalar
    lower: Scalar
    upper_here: Scalar
    lower_here: Scalar


def rms(tree: PyTree) -> jax.Array:
    """The root mean square over all of a tree's numbers; 0 of an empty one."""
    return derivatives.norm(tree) / max(optax.tree.size(tree), 1) ** 0.5


def times(factor: Any, tree: PyTree) -> PyTree:
    """The tree multiplied by a number, in its own dtypes."""
    return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), tree)


# How much of the way from the start is a unit of a variable that has come (nearly) to zero.
_WAY = 0.1


def natural_units(problem: Problem, x: PyTree, y: PyTree, x0: PyTree, y0: PyTree) -> Units:
    """The units at (x, y), for a run that began at (x0, y0).

    Those of x and y: their root mean square, or a tenth of the way from the start where that is more. Where a variable
    is zero and has not moved its unit is the length of a step that its level would take: for y the step to the minimum
    of f, or of F, along its gradient; for x the change that moves y by its unit, or that step of F. Those of F and f:
    the median change between here and points one unit away.
    """
    upper, lower = problem.full_levels()
    usable = lambda value, other: jnp.where((value > 0) & jnp.isfinite(value), value, other)  # noqa: E731
    plain = lambda at, start: jnp.maximum(rms(at), _WAY * rms(optax.tree.sub(at, start)))  # noqa: E731

    def step(fn: Any, at: PyTree) -> Scalar:
        gradient, hvp = jax.linearize(jax.grad(fn), at)
        return _cauchy(gradient, hvp)

    unit_y = plain(y, y0)
    of_lower, of_upper = step(lambda y: lower(x, y), y), step(lambda y: upper(x, y), y)
    unit_y = usable(unit_y, usable(of_lower, usable(of_upper, 1.0)))
    unit_x = jnp.ones(())
    if jax.tree.leaves(x):
        way = optax.tree.random_like(jax.random.key(3), x, jax.random.normal)
        force = jax.jvp(lambda x: jax.grad(lower, argnums=1)(x, y), (x,), (way,))[1]
        hvp = jax.linearize(lambda y: jax.grad(lower, argnums=1)(x, y), y)[1]
        follows = _cauchy(force, hvp)
        of_upper = step(lambda x: upper(x, y), x)
        unit_x = usable(plain(x, x0), usable(unit_y * usable(1 / follows, 0.0), usable(of_upper, 1.0)))
    upper_here, lower_here = upper(x, y), lower(x, y)

    def away(key: jax.Array) -> tuple[Scalar, Scalar]:
        a, b = jax.random.split(key)
        there_x = optax.tree.add(x, times(unit_x, optax.tree.random_like(a, x, jax.random.normal)))
        there_y = optax.tree.add(y, times(unit_y, optax.tree.random_like(b, y, jax.random.normal)))
        there_x = there_x if upper.project is None else upper.project(there_x)
        there_y = there_y if lower.project is None else lower.project(there_y)
        changes = upper(there_x, there_y) - upper_here, lower(x, there_y) - lower_here
        of_upper, of_lower = (jnp.where(jnp.isfinite(change), jnp.abs(change), jnp.nan) for change in changes)
        return of_upper, of_lower

    changes = jax.lax.map(away, jax.random.split(jax.random.key(5), 9))
    of_upper, of_lower = (
        usable(jnp.nanmedian(change), usable(jnp.abs(here), 1.0))
        for change, here in zip(changes, (upper_here, lower_here), strict=True)
    )
    return Units(unit_x, unit_y, of_upper, of_lower, upper_here, lower_here)


def _cauchy(gradient: PyTree, hvp: Any) -> Scalar:
    """The length (root mean square) of the step along a gradient to where a quadratic model turns; 0 without any."""
    square = optax.tree.norm(gradient, squared=True)
    bend = jnp.abs(optax.tree.vdot(gradient, hvp(gradient)))
    return jnp.where(bend > 0, rms(gradient) * square / jnp.where(bend > 0, bend, 1.0), 0.0)


def normalised(problem: Problem, units: Units) -> tuple[Level, Level]:
    """Both levels as functions of (u, w) = (x / units.x, y / units.y), with values in their own units from here."""
    upper, lower = problem.full_levels()

    def scaled(level: Level, size: Scalar, unit: Scalar, here: Scalar) -> Level:
        def wrap(fn: Any) -> Any:
            return None if fn is None else lambda u, w: fn(times(units.x, u), times(units.y, w))

        def value(u: PyTree, w: PyTree) -> Scalar:
            return (level(times(units.x, u), times(units.y, w)) - here) / unit

        project = level.project and (lambda z: times(1 / size, level.project(times(size, z))))  # type: ignore[misc]
        prox = level.prox and (
            lambda u, w, step: times(
                1 / units.y,
                level.prox(times(units.x, u), times(units.y, w), step * units.y**2 / unit),  # type: ignore[misc]
            )
        )
        return dataclasses.replace(
            level.with_loss(value),
            project=project,
            prox=prox,
            inequality=wrap(level.constraint),
            equation=wrap(level.equality),
        )

    return (
        scaled(upper, units.x, units.upper, units.upper_here),
        scaled(lower, units.y, units.lower, units.lower_here),
    )
