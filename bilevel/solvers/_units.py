"""A problem in its own units, so that tolerances need none.

What is 1 for x, y, F and f is read off the problem at a point and where the run began. Multiplying F, f, x or y by a
number multiplies its unit, and changes nothing that is measured in units.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import _compiling, derivatives
from bilevel.level import Level
from bilevel.problem import Problem
from bilevel.typing import PyTree, Scalar

__all__ = [
    "AWAY", "FELT", "IRREGULAR", "SHORTER_WAYS", "Units", "changes", "left_of", "moves", "natural_units",
    "normalised", "progress_of", "regular", "rms", "share", "shorter", "times", "units_of_losses",
    "units_of_variables", "untrue", "untrue_along",
]  # fmt: skip


class Units(NamedTuple):
    """What a change of 1 in x, y, F and f is, and F and f where they were taken (they are measured from there)."""

    x: Any
    y: Any
    upper: Any
    lower: Any
    upper_here: Any
    lower_here: Any


FELT = 3e-2
"""How far x moves at least, in its units, for what F falls by on the way to count as a part of F itself."""


IRREGULAR = 1e1
"""By how much a loss bends more over a length than it does nearby, where that length says nothing of a point."""


def progress_of(here: float, way: float) -> float:
    """F here, or F's way from the start, whichever is more: what a fall is a part of.

    F's unit is what it changes by when x and y are moved anyhow. Beside coordinates in which it changes by much others
    are nothing in that unit, and may be far from their solution.
    """
    return max((abs(float(part)) for part in (here, way) if np.isfinite(part)), default=0.0)


def share(fall: float, progress: float) -> float:
    """A fall of F as a part of `progress_of`, to compare with what is in units: of those ten times a tolerance passes,
    of this one tolerance."""
    return 10 * fall / progress if progress > 0 else 0.0


def left_of(fall: float, progress: float, unit: float) -> float:
    """The same of a fall, however little x moves for it, with `unit` the loss's: of a run that did not end by itself.

    A billionth of the unit is always a little: such a run may have begun at the solution.
    """
    return share(fall, max(progress, 1e-9 * unit))


def rms(tree: PyTree) -> jax.Array:
    """The root mean square over all of a tree's numbers; 0 of an empty one."""
    return derivatives.norm(tree) / max(optax.tree.size(tree), 1) ** 0.5


def times(factor: Any, tree: PyTree) -> PyTree:
    """The tree multiplied by a number, in its own dtypes."""
    return jax.tree.map(lambda leaf: (factor * leaf).astype(leaf.dtype), tree)


# How much of the way from the start is a unit of a variable that has come (nearly) to zero.
_WAY = 0.1


def natural_units(problem: Problem, x: PyTree, y: PyTree, x0: PyTree, y0: PyTree) -> Units:
    """The units at (x, y), for a run that began at (x0, y0); not under `jit`.

    Those of x and y: their root mean square, or a tenth of the way from the start where that is more. Where a variable
    is zero and has not moved its unit is the length of a step that its level would take: for y the step to the minimum
    of f, or of F, along its gradient; for x the change that moves y by its unit, or that step of F. Those of F and f:
    the median change between here and points one unit away.
    """
    lengths = units_of_variables(problem, x, y, x0, y0)
    return units_of_losses(lengths, *_changes(problem, x, y, *moves(x, y, lengths)))


def units_of_variables(problem: Problem, x: PyTree, y: PyTree, x0: PyTree, y0: PyTree) -> tuple[Any, Any]:
    """Those of x and y of `natural_units`, in the variables' dtypes."""
    unit_x, unit_y = _plain(x, x0) if jax.tree.leaves(x) else np.float64(1.0), _plain(y, y0)
    if not all(unit > 0 and np.isfinite(unit) for unit in (unit_x, unit_y)):
        steps = {name: np.float64(step) for name, step in _steps(problem, x, y).items()}
        unit_y = _first(unit_y, steps["lower"], steps["upper_y"], np.float64(1.0))
        with np.errstate(divide="ignore"):
            moves_y = unit_y * _first(1 / steps["follows"], np.float64(0.0))
        unit_x = _first(unit_x, moves_y, steps["upper_x"], np.float64(1.0))
    of_x, of_y = (jnp.result_type(float, *jax.tree.leaves(tree)) for tree in (x, y))
    return np.asarray(unit_x, of_x), np.asarray(unit_y, of_y)


def moves(x: PyTree, y: PyTree, lengths: tuple[Any, Any]) -> tuple[PyTree, PyTree]:
    """Random moves of x and of y, of one unit, stacked; drawn on the host, since a compiled normal distribution takes
    longer to compile than the losses do."""
    random = np.random.default_rng(5)
    draw = lambda at, unit: jax.tree.map(  # noqa: E731
        lambda leaf: (np.float64(unit) * random.standard_normal((AWAY, *leaf.shape))).astype(leaf.dtype), at
    )
    return draw(x, lengths[0]), draw(y, lengths[1])


def shorter(x: PyTree, y: PyTree, lengths: tuple[Any, Any]) -> tuple[PyTree, PyTree]:
    """Random moves of x and of y, stacked, there and back: a few of one unit, and the same of parts of it."""
    random = np.random.default_rng(6)

    def draw(leaf: Any, unit: Any) -> np.ndarray:
        ways = random.standard_normal((_PAIRS, 1, *leaf.shape)) * np.array([1.0, -1.0]).reshape(2, *[1] * leaf.ndim)
        parts = _PARTS.reshape(-1, 1, 1, *[1] * leaf.ndim)
        return (np.float64(unit) * parts * ways).reshape(-1, *leaf.shape).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: draw(leaf, lengths[0]), x), jax.tree.map(lambda leaf: draw(leaf, lengths[1]), y)


def regular(
    lengths: tuple[Any, Any], way: tuple[PyTree, PyTree], here: tuple[Any, Any], found: tuple[np.ndarray, np.ndarray]
) -> tuple[tuple[Any, Any], tuple[np.ndarray, np.ndarray]] | None:
    """Parts of the lengths of x and y, and the losses' changes by moves of these, where the losses bend over the whole
    lengths as they nowhere do nearby; else None.

    How far a variable is from zero is no length of a problem that was moved away from there; the way from the start is.

    Args:
      lengths: the units of x and y.
      way: from here to the start.
      here, found: F and f here, and their changes after the `shorter` moves.
    """
    upper, lower = _regular(here[0], found[0]), _regular(here[1], found[1])
    part_x, part_y = (
        max((i for i in range(part + 1) if length * _PARTS[i] >= _size(least)), default=0)
        for length, part, least in zip(lengths, (upper, max(upper, lower)), way, strict=True)
    )
    if not part_x + part_y:
        return None
    of_upper, of_lower = (
        changes.reshape(len(_PARTS), -1)[part] for changes, part in zip(found, (part_x, part_y), strict=True)
    )
    cut = lambda length, part: np.asarray(length * _PARTS[part], length.dtype)  # noqa: E731
    return (cut(lengths[0], part_x), cut(lengths[1], part_y)), (of_upper, of_lower)


def _regular(here: Any, found: np.ndarray) -> int:
    """Which part: 0, the whole, where a loss bends over it as nearby, and where nothing is seen."""
    bends = found.reshape(len(_PARTS), _PAIRS, 2).sum(-1)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts at which no value is finite
        table = np.nanmedian(np.abs(bends), axis=1)
    seen = table > 1e3 * np.finfo(here.dtype).eps * abs(float(here))  # beside rounding; not of a NaN
    last = int(np.argmin(seen)) - 1 if not seen.all() else len(seen) - 1
    curvature = table / _PARTS**2
    if last < 1 or not 0.5 <= curvature[last - 1] / curvature[last] <= 2:
        return 0  # of a power there is no bend nearby: it is another at every length
    return int(np.flatnonzero(np.append(True, curvature[: last + 1] > IRREGULAR * curvature[last]))[-1])


_PAIRS, _PARTS = 4, 16.0 ** -np.arange(7)


def untrue(changes: np.ndarray, told: np.ndarray, sizes: np.ndarray, least: Any) -> np.ndarray:
    """Whether a derivative is another than that of the values: where differences there and back, at two sizes in a row,
    agree with each other and not with it.

    Args:
      changes: (sizes, ways, 2, ...), of one or several functions by a way times each size, and times minus that.
      told: (ways, ...), what the derivative says of each way.
      sizes: the sizes, the largest first.
      least: what of a change is rounding.
    """
    up, down = changes[:, :, 0], -changes[:, :, 1]
    sizes = sizes.reshape(-1, *[1] * (up.ndim - 1))
    most = lambda a, b: np.maximum(np.abs(a), np.abs(b))  # noqa: E731
    with np.errstate(all="ignore"):
        rate = (up + down) / 2 / sizes
        smooth = np.abs(up - down) <= 0.5 * most(up, down)  # at an edge they are opposite
        # At a kink a derivative is that of one side, or between both.
        outside = np.maximum(np.minimum(up, down) / sizes - told, told - np.maximum(up, down) / sizes)
        off = (outside > 0.05 * most(rate, told)) & (outside * sizes > least)
        steady = np.abs(rate[1:] - rate[:-1]) <= 0.02 * most(rate[1:], rate[:-1])
    found = smooth & off
    return (found[1:] & found[:-1] & steady).any(axis=(0, 1))


# Of the `shorter` moves those of a whole unit, there.
SHORTER_WAYS = slice(0, 2 * _PAIRS, 2)


def untrue_along(told: Any, changes: np.ndarray, here: Any) -> bool:
    """`untrue` of a loss and the `shorter` moves, `told` being what its gradient says of `SHORTER_WAYS`."""
    least = 1e2 * np.finfo(here.dtype).eps * abs(float(here))
    by_size = np.asarray(changes, np.float64).reshape(len(_PARTS), _PAIRS, 2)
    return bool(untrue(by_size, np.asarray(told, np.float64), _PARTS, least))


def units_of_losses(lengths: tuple[Any, Any], here: tuple[Any, Any], found: tuple[Any, Any]) -> Units:
    """All units, from those of x and y and the `changes` after the moves."""
    upper, lower = (
        _first(
            np.nanmedian(np.abs(change)) if np.isfinite(change).any() else np.float64(0.0),
            np.abs(value),
            np.float64(1.0),
        )
        for change, value in zip(map(np.asarray, found), map(np.float64, here), strict=True)
    )
    as_own = lambda unit, own: np.asarray(unit, own.dtype)  # noqa: E731
    return Units(*lengths, as_own(upper, here[0]), as_own(lower, here[1]), *here)


AWAY = 9


def _plain(at: PyTree, start: PyTree) -> np.float64:
    """The root mean square of a variable, or a tenth of that of its way from the start; nothing is compiled."""
    with np.errstate(all="ignore"):
        way = jax.tree.map(lambda here, there: np.asarray(here, np.float64) - np.asarray(there, np.float64), at, start)
        return np.maximum(_size(at), _WAY * _size(way))


def _size(tree: PyTree) -> np.float64:
    """`rms` on the host."""
    leaves = [np.asarray(leaf).astype(np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.sqrt(np.mean(np.concatenate(leaves) ** 2)) if leaves else np.float64(0.0)


def _first(*values: np.float64) -> np.float64:
    """The first that a unit can be: positive and finite (the last, where none is)."""
    return next((value for value in values if value > 0 and np.isfinite(value)), values[-1])


@_compiling.jit
def _steps(problem: Problem, x: PyTree, y: PyTree) -> dict[str, Scalar]:
    """Lengths of the steps to where quadratic models turn: of f and F in y, of F in x, and of y when x moves by one."""
    upper, lower = problem.full_levels()

    def step(fn: Any, at: PyTree) -> Scalar:
        gradient, hvp = jax.linearize(jax.grad(fn), at)
        return _cauchy(gradient, hvp)

    found = {"lower": step(lambda y: lower(x, y), y), "upper_y": step(lambda y: upper(x, y), y)}
    if not jax.tree.leaves(x):
        return {**found, "follows": jnp.zeros(()), "upper_x": jnp.zeros(())}
    way = optax.tree.random_like(jax.random.key(3), x, jax.random.normal)
    force = jax.jvp(lambda x: jax.grad(lower, argnums=1)(x, y), (x,), (way,))[1]
    hvp = jax.linearize(lambda y: jax.grad(lower, argnums=1)(x, y), y)[1]
    return {**found, "follows": _cauchy(force, hvp), "upper_x": step(lambda x: upper(x, y), x)}


def changes(
    problem: Problem, x: PyTree, y: PyTree, moves_x: PyTree, moves_y: PyTree
) -> tuple[tuple[Scalar, Scalar], tuple[jax.Array, jax.Array]]:
    """F and f here, and what they change by with each move (in the sets; NaN where that is not finite)."""
    upper, lower = problem.full_levels()
    here = upper(x, y), lower(x, y)

    def away(moves: tuple[PyTree, PyTree]) -> tuple[Scalar, Scalar]:
        there_x, there_y = optax.tree.add(x, moves[0]), optax.tree.add(y, moves[1])
        there_x = there_x if upper.project is None else upper.project(there_x)
        there_y = there_y if lower.project is None else lower.project(there_y)
        both = upper(there_x, there_y) - here[0], lower(x, there_y) - here[1]
        of_upper, of_lower = (jnp.where(jnp.isfinite(change), change, jnp.nan) for change in both)
        return of_upper, of_lower

    return here, jax.lax.map(away, (moves_x, moves_y))


_changes = _compiling.jit(changes)


def _cauchy(gradient: PyTree, hvp: Any) -> Scalar:
    """The length (root mean square) of the step along a gradient to where a quadratic model turns; 0 without any."""
    square = optax.tree.norm(gradient, squared=True)
    bend = jnp.abs(derivatives.dot(gradient, hvp(gradient)))
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
