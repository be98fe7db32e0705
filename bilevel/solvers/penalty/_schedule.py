"""The penalty's schedule, and what is made of the points along it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters, state
from bilevel.typing import PyTree

# Below this F has no curvature to speak of.
_FLAT = 1e-5

# No length: a state that holds no infinity passes JAX's jax_debug_infs.
UNKNOWN = -1.0


@state
class Path:
    """Where a run stands on the penalty's path.

    What belongs to the extrapolation is None where nothing is extrapolated.

    Attributes:
      penalty: c, the weight of the lower level against the upper loss.
      begun: the step at which this c was taken.
      unit: what c is measured in, see `Continuation`.
      penalties: c at the last three stages that converged, shape (3,), newest first; zero where there is none yet.
      change: |the newest extrapolated point - the one before|, an estimate of its error; `UNKNOWN`
        before there are two.
      ends: the points at the ends of those stages, (x, y), stacked along a leading axis.
      reported: the point to report.
    """

    penalty: jax.Array
    begun: jax.Array
    unit: jax.Array
    penalties: jax.Array
    change: jax.Array
    ends: PyTree = None
    reported: PyTree = None


@hyperparameters
class Polynomial:
    """c_k = min(start (k + 1)^power, maximum): the schedule of the published single-loop methods, power in [0, 1/2)."""

    start: float = 10.0
    power: float = 0.49
    maximum: float = float("inf")

    def init(self, point: PyTree, unit: Any = 1.0) -> Path:
        """The path before the first step."""
        return _begin(point, self.start, 1.0, extrapolated=False)

    def advance(self, path: Path, k: Any, point: PyTree, settled: Any) -> Path:
        """The path after step k."""
        c = self.start * (jnp.asarray(k, path.penalty.dtype) + 2) ** self.power
        return dataclasses.replace(path, penalty=jnp.minimum(c, self.maximum).astype(path.penalty.dtype))

    def grows(self, path: Path) -> jax.Array:
        """Whether c can still grow."""
        return path.penalty < self.maximum


@hyperparameters
class Continuation:
    """c doubles whenever the point for the present c has been found, and at the latest when a power of k overtakes it:
    start ((k + 1) / patience)^power.

    The solution of the penalised problem has a bias that is a power series in 1/c (where multipliers and active sets
    stay as they are). With `extrapolate` (Richardson) the reported point combines the last three converged stages so
    that the 1/c and 1/c^2 terms cancel; it is reported only where the stages show that behaviour, otherwise the last
    iterate is.

    Attributes:
      start, factor, maximum: c = unit start factor^stage, as long as that is at most maximum (times the unit where it
        exceeds one). The unit is half the curvature of F over that of f at the start, so that a run does not depend on
        the scale of either loss (one where F has no curvature, and at least `least`).
      power, patience: the slowest growth allowed; the power is that of the published schedules.
      settle: a stage has converged when the residual is below `settle` (c_0 / c)^shrink |grad F| / c (all in units of
        grad F), c_0 the first stage's c.
      extrapolate: Richardson. Its weights (8/3, -2, 1/3) add up what the stages lack, so that the error is up to
        5 settle (c_0 / c)^shrink |F_y| / c over the upper curvature: smaller in proportion to `settle`, for a few steps
        more a stage.
      shrink: what Richardson gains grows as c^2, so that stages of a constant `settle` waste it beyond 1 / (5 settle).
        1 or 2 keep it, where stages converge fast (accurate inner solves); no residual is asked to be below 10
        sqrt(eps), which is what a line search can resolve.
    """

    start: float = 20.0
    factor: float = 2.0
    maximum: float = 1e5
    power: float = 0.49
    patience: float = 500.0
    settle: float = 0.5
    extrapolate: bool = True
    least: float = 1e-3
    shrink: float = 0.0

    def init(self, point: PyTree, unit: Any = 2.0) -> Path:
        """The path before the first step; `unit`: the upper loss's curvature over the lower one's."""
        unit = jnp.where(unit > _FLAT, jnp.maximum(unit / 2, self.least), 1.0)
        return _begin(point, self.start, unit, self.extrapolate)

    def advance(self, path: Path, k: Any, point: PyTree, settled: Any) -> Path:
        """The path after step k; `settled`: the residual relative to the upper gradient."""
        dtype, c = path.penalty.dtype, path.penalty
        k = jnp.asarray(k, dtype)
        loose, resolved = self.settle * path.unit / c, 10 * float(jnp.finfo(dtype).eps) ** 0.5
        asked = jnp.maximum(loose * (path.unit * self.start / c) ** self.shrink, jnp.minimum(loose, resolved))
        done = (settled <= asked) & (k > path.begun + 5) & (c > path.penalties[0])
        overdue = path.unit * self.start * ((k + 1) / self.patience) ** self.power > self.factor * c
        penalties = jnp.where(done, jnp.concatenate([c[None], path.penalties[:-1]]), path.penalties)
        # An unconverged stage breaks the ladder.
        penalties = jnp.where(overdue & ~done, 0.0, penalties)
        # The last step is a whole one too: extrapolation needs stages in proportion.
        grown = jnp.where(self.grows(path), c * self.factor, c)
        follow = lambda new, old: jnp.where(done | overdue, new, old).astype(dtype)  # noqa: E731
        c, begun = follow(grown, c), follow(k, path.begun)
        new = dataclasses.replace(path, penalty=c, begun=begun, penalties=penalties)
        return self._extrapolated(new, point, done) if self.extrapolate else new

    def _extrapolated(self, path: Path, point: PyTree, done: jax.Array) -> Path:
        """The path with its stages' ends and what is extrapolated from them; `done`: `point` ends a stage."""
        ends = jax.tree.map(lambda e, p: jnp.where(done, jnp.concatenate([p[None], e[:-1]]), e), path.ends, point)
        found, regular = _richardson(ends, path.penalties, self.factor)
        held = derivatives.norm(optax.tree.sub(found, path.reported))
        choose = lambda f, p, old: jnp.where(regular, jnp.where(done, f, old), p)  # noqa: E731
        reported = jax.tree.map(choose, found, point, path.reported)
        change = jnp.where(regular, jnp.where(done, held, path.change), UNKNOWN).astype(path.change.dtype)
        return dataclasses.replace(path, ends=ends, reported=reported, change=change)

    def grows(self, path: Path) -> jax.Array:
        """Whether c can still grow."""
        return path.penalty * self.factor <= jnp.maximum(path.unit, 1.0) * self.maximum * (1 + 1e-5)


def as_schedule(value: Any) -> Any:
    """A schedule from itself; a number is a constant penalty."""
    return value if hasattr(value, "advance") else Polynomial(value, 0.0)


def _begin(point: PyTree, start: Any, unit: Any, extrapolated: bool) -> Path:
    dtype = jnp.result_type(*jax.tree.leaves(point))
    c, begun, unit, change = (jnp.asarray(v, dtype) for v in (unit * start, 0, unit, UNKNOWN))
    ends, reported = (jax.tree.map(lambda p: jnp.stack([p] * 3), point), point) if extrapolated else (None, None)
    return Path(c, begun, unit, jnp.zeros((3,), dtype), change, ends, reported)


def _richardson(ends: PyTree, penalties: jax.Array, q: Any) -> tuple[PyTree, jax.Array]:
    """The extrapolated point of the last three stages, and whether they behave like a series in 1/c."""
    two = jax.tree.map(lambda e: (q * e[0] - e[1]) / (q - 1), ends)
    before = jax.tree.map(lambda e: (q * e[1] - e[2]) / (q - 1), ends)
    three = jax.tree.map(lambda a, b: (q**2 * a - b) / (q**2 - 1), two, before)
    newest, older = (jax.tree.map(lambda e, i=i: e[i] - e[i + 1], ends) for i in (0, 1))
    new, old, size = (derivatives.norm(u) for u in (newest, older, jax.tree.map(lambda e: e[0], ends)))
    resolution = 50 * jnp.finfo(penalties.dtype).eps * size
    # Consecutive differences fall by q; far from that (another active set, a series in a root of 1/c) nothing is
    # extrapolated.
    ratio = q * new / jnp.maximum(old, resolution)
    falling = (ratio > 0.7) & (ratio < 1.4) & (derivatives.dot(newest, older) > 0.9 * new * old)
    return three, (penalties[2] > 0) & (falling | (old <= resolution))
