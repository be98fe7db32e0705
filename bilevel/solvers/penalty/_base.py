"""What the penalty methods share: what they report, and when a run has ended."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel import derivatives
from bilevel.constraints import Constraints
from bilevel.keys import StepKey
from bilevel.level import Level
from bilevel.problem import Problem
from bilevel.result import Result
from bilevel.solvers.penalty._schedule import Path, as_schedule
from bilevel.typing import Metrics, PyTree, Scalar

norm = derivatives.norm

LARGE = 1e6
"""Beyond this an upper loss is no scale for tolerances: a run that explodes would meet them all."""
SMOOTH = ("constraint", "equality", "project_upper", "project_lower")
"""What most methods under coupled constraints honour: all but a prox."""


def ratio(a: Any, b: Any) -> jax.Array:
    """a / b, one where b is nothing."""
    return jnp.where(b > 1e-12, a / jnp.where(b > 1e-12, b, 1.0), 1.0)


def limited(u: PyTree, step: PyTree) -> PyTree:
    """A step no longer than the variables' own size plus one (root mean square)."""
    size = max(optax.tree.size(u), 1) ** 0.5
    longest = size + norm(u)
    length = norm(step)
    return optax.tree.scale(jnp.where(length > longest, longest / jnp.where(length > 0, length, 1.0), 1.0), step)


def kept_inside(problem: Problem, upper: Level, lower: Level, old: PyTree, new: PyTree) -> PyTree:
    """`new`, or where a loss has no finite value or gradient there nine tenths of the way to it from `old`.

    A projection puts a step onto the edge of a closed set, which a loss (1 / x, log x) may not be defined on; what is
    between two points of a convex set is inside. Where no set is given nothing is evaluated.
    """
    constrained = problem.constraint is not None or problem.equality is not None
    if problem.project_upper is None and problem.project_lower is None and not constrained:
        return new
    slopes = jax.value_and_grad(lambda u: jnp.stack([upper(*u), lower(*u)]).sum())(new)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(slopes)]))
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b + 0.9 * (a - b)), new, old)


def proximal(lower: Level, x: PyTree, y: PyTree, size: Any) -> PyTree:
    """The lower level's prox at y, as far as it has one, and its projection."""
    y = y if lower.prox is None else lower.prox(x, y, size)
    return y if lower.project is None else lower.project(y)


def rate(new: PyTree, old: PyTree, size: Any) -> Scalar:
    """The length of a step over its step size: a residual in units of a gradient."""
    return norm(optax.tree.sub(new, old)) / size


class Reported:
    """A state with the point to report: the extrapolated one where there is one, else `here`."""

    point: tuple[PyTree, PyTree]
    path: Path

    @property
    def here(self) -> tuple[PyTree, PyTree]:
        """(x, y) where nothing is extrapolated."""
        return self.point

    @property
    def x(self) -> PyTree:
        """The upper variable to report."""
        return (self.here if self.path.reported is None else self.path.reported)[0]

    @property
    def y(self) -> PyTree:
        """The lower variable to report."""
        return (self.here if self.path.reported is None else self.path.reported)[1]


def report(
    path: Path, *, gap: Scalar, penalty: Scalar, violation: Any = 0.0, bias: Any = None, slope: Any = 0.0, **more: Any
) -> Metrics:
    """The family's metrics (`Diagnosed`), the others given as `more`; `path` is the one after the step.

    The bias is c times the gap where none is given, and at most slope = |grad F| times the last change by
    extrapolation.
    """
    bias = jnp.abs(penalty * gap) if bias is None else bias
    bias = jnp.where(path.change >= 0, jnp.minimum(slope * path.change, bias), bias)
    violation = jnp.asarray(violation, more["upper_loss"].dtype)
    return {"gap": gap, "violation": violation, "penalty": penalty, "bias": bias, **more}


def share_at_cap(lam: jax.Array, cap: Any) -> Scalar:
    """The share of multipliers that sit on their cap."""
    if not lam.size:
        return jnp.zeros((), lam.dtype)
    return jnp.mean((jnp.abs(lam) >= cap * (1 - 1e-6)).astype(lam.dtype))


_REFINED = 500  # The most rows, and


_UNKNOWNS = 5000  # the most lower unknowns whose multipliers are refined: a dense system of both.


def refined(lower: Level, rows: Constraints, x: PyTree, y: PyTree, lam: jax.Array) -> jax.Array:
    """The multipliers of (scaled) rows that fit the lower level's stationarity best at y, or those given if they do.

        argmin over lam in the cone of |f_y + J' lam|^2 + sum over inequalities of (c_i lam_i)^2

    in the unknowns that Y leaves free there; a slack inequality weighs its multiplier down to zero.
    """
    if rows.count > _REFINED or optax.tree.size(y) > _UNKNOWNS or lower.prox is not None:
        return lam
    return _refined(lower, rows, x, y, lam)


def _refined(lower: Level, rows: Constraints, x: PyTree, y: PyTree, lam: jax.Array) -> jax.Array:
    flat, unravel = ravel_pytree(y)
    value, jacobian = rows(x, y), jax.jacobian(lambda u: rows(x, unravel(u)))(flat)
    slope = ravel_pytree(lower.gradient(x, y))[0]

    def left(lam: jax.Array) -> jax.Array:
        """What the projected gradient step of the Lagrangian moves, for a step of one over the slope's size."""
        force = slope + jacobian.T @ lam
        if lower.project is None:
            return force
        size = 1e-3 * (1 + norm(flat)) / (1e-30 + norm(slope))
        return (flat - ravel_pytree(lower.project(unravel(flat - size * force)))[0]) / size

    force = slope + jacobian.T @ lam
    free = jnp.ones(flat.shape, bool) if lower.project is None else left(lam) != 0
    free = free | (force == 0)
    weights = jnp.where(rows.inequality, jnp.abs(value), 0) / jnp.maximum(norm(flat), 1e-3)
    system = jnp.concatenate([jnp.where(free, jacobian, 0).T, jnp.diag(weights * norm(jacobian))])
    right = jnp.concatenate([jnp.where(free, -slope, 0), jnp.zeros_like(lam)])
    found = rows.clip(jnp.linalg.lstsq(system, right, rcond=1e2 * float(jnp.finfo(rows.dtype).eps))[0])
    slack = lambda lam: norm(jnp.where(rows.inequality, value * lam, 0))  # noqa: E731
    better = norm(left(found)) + slack(found) < norm(left(lam)) + slack(lam)
    return jnp.where(better, found, lam)


class Diagnosed:
    """`status` and `multipliers`, the same for all members of the family.

    A member's metrics hold, in units of the upper loss F and its gradient:

      `upper_loss`: F at the point before the step.
      `hypergradient_norm`: the residual R_k, how far the penalised problem is from stationary (all its variables).
      `lower_residual`: the same for the lower level's auxiliary variable alone, in units of f's gradient.
      `gap`: the member's own gap function, zero where y solves the lower level.
      `violation`: the largest scaled constraint value (about a distance).
      `penalty`: c.
      `bias`: the estimated error in F that is due to a finite c: c times the gap, which bounds F* - F from below; with
        Richardson the last change that it made.
      `multiplier_at_cap`: the share of multipliers that sit on their cap (methods with a cap).

    With a tolerance a run ends CONVERGED when residual, violation and bias are all within it, and PENALTY_LIMITED when
    only the bias is not and the penalty cannot grow any more.
    """

    penalty = 1.0  # a member's schedule, or its number; this one never grows

    def advance(self, path: Path, key: StepKey, point: PyTree, settled: Any) -> Path:
        """The path after this step, which is `settled` by the residual over |grad F|, taken at `point`."""
        return as_schedule(self.penalty).advance(path, key.step, point, settled)

    def status(self, state: Any, metrics: Metrics, tol: Any) -> jax.Array:
        """CONVERGED, PENALTY_LIMITED or 0 to go on; see the class."""
        scale = 1 + jnp.minimum(jnp.abs(metrics["upper_loss"]), LARGE)
        settled = (metrics["hypergradient_norm"] <= tol * scale) & (metrics["violation"] <= tol)
        unbiased = metrics["bias"] <= tol * scale
        stuck = settled & ~unbiased & ~as_schedule(self.penalty).grows(state.path)
        return jnp.where(settled & unbiased, Result.CONVERGED.value, jnp.where(stuck, Result.PENALTY_LIMITED.value, 0))

    def multipliers(self, problem: Problem, state: Any) -> dict[str, PyTree]:
        """The lower level's multipliers (f + lam . g + mu . h), in the user's units, like the constraints' outputs.

        Those of a penalty c have a bias of order 1 / c, which extrapolation in (x, y) does not take from them: they are
        `refined` at the reported point.
        """
        lower = problem.full_lower()
        rows = Constraints(lower, state.x, state.y, state.scale)
        return rows.multipliers(refined(lower, rows, state.x, state.y, state.lam)) if rows.count else {}
