"""Newton's method for lower levels of up to some hundreds of unknowns, or of any conditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import linear
from bilevel._module import hyperparameters
from bilevel.data import ProblemError
from bilevel.level import Level
from bilevel.linear._common import eigh, equilibration
from bilevel.linear.krylov import conjugate_gradients
from bilevel.lower.loops import LowerState
from bilevel.optimizers import check_count
from bilevel.typing import PyTree, Scalar

__all__ = ["Newton"]


@hyperparameters
class Newton:
    """Damped Newton steps on f(x, .), projected where Y is a box: exact at any conditioning that the dtype can hold.

    For up to `dense` unknowns f_yy is a matrix, made by as many products at once, and with S f_yy S = U diag(w) U'

        p = -S U (U' S f_y) / (|w| + damping),        y <- clip(y + p, bounds)

    with S = I, or where the largest entries of f_yy's rows are more than a factor of 256 apart powers of two that bring
    them near 1 (rounding would hide a flat unknown's curvature behind a steep one's),
    with directions of no curvature (|w| below rounding) and no slope left out, and a kick along the eigenvector of the
    least w < 0 where f_y does not see it: saddle points and maxima are left. Above, p is that of `cg_steps` of CG on
    (f_yy + damping I) p = -f_y, which ends at negative curvature. Unknowns at a bound that f_y pushes against are held,
    and the step is taken in the others (Bertsekas's projected Newton method). The damping starts at zero; a step whose
    decrease is not a ten-thousandth of the model's, or without a finite value, is withdrawn and the damping raised, and
    lowered after a good one. A step is no longer than 10 (1 + rms(y)) sqrt(d).

    It ends when |y - clip(y - f_y)| <= tol, at the precision of the dtype, or after `steps`. A quadratic takes one step
    and one more to see it. The answer is differentiated by the implicit function theorem, in both modes and whatever
    the number of steps (by x and what the level closes over; by the start its derivative is zero): `Unrolled` through
    it is `Implicit`.

    y is one vector here, which over a mesh every device has whole (above `dense` unknowns too): large models take steps
    (`lower.GradientDescent`, `lower.LBFGS`).

    For full batches, f twice differentiable; Y the whole space or a set with bounds (`sets.Box`: an object with
    `bounds(y) -> (lower, upper)`).

    Attributes:
      steps: the most steps.
      tol: on the (projected) gradient's norm; None: the precision of the dtype.
      dense: the largest number of unknowns that is solved as a matrix: d products and d^3 operations a step.
      cg_steps: the most CG iterations a step above that.

    References: Nocedal, Wright, "Numerical Optimization", 2nd ed., chapters 3 and 7; Bertsekas, "Projected Newton
    Methods for Optimization Problems with Simple Constraints", SIAM J. Control Optim. 1982; Dauphin et al.,
    "Identifying and Attacking the Saddle Point Problem in High-Dimensional Non-Convex Optimization", NeurIPS 2014 (|w|
    in the place of w).
    """

    steps: int = 50
    tol: float | None = None
    dense: int = 256
    cg_steps: int = 200

    def __post_init__(self) -> None:
        check_count("Newton", steps=self.steps, dense=self.dense, cg_steps=self.cg_steps)
        if isinstance(self.tol, float) and not self.tol > 0:
            raise ValueError(f"Newton(tol={self.tol!r}): the tolerance is positive, or None for the dtype's precision.")

    def init(self, y: PyTree) -> LowerState:
        """y, with nothing to remember."""
        return LowerState(y, None)

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        value, flat, unravel, bounds = self._as_vector(level, x, state.y)

        def condition(u: jax.Array) -> jax.Array:
            """Zero at the solution: the slope of what is free, and the distance to the bound of what is held."""
            slope = jax.grad(value)(u)
            if bounds is None:
                return slope
            low, high = (jax.lax.stop_gradient(end) for end in bounds)
            held = _held(u, slope, (low, high))
            return jnp.where(held, u - jnp.clip(u, *bounds), slope)

        def tangent(apply: Callable[[jax.Array], jax.Array], b: jax.Array) -> jax.Array:
            robust = linear.Robust(tol=_precision(b), max_steps=1000, symmetric=bounds is None, dense=self.dense)
            return robust(apply, b)[0]

        solve = lambda _, u: self._minimise(value, u, bounds)  # noqa: E731
        found = jax.lax.custom_root(condition, jax.lax.stop_gradient(flat), solve, tangent)
        return LowerState(unravel(found), None)

    def minimum(self, level: Level, x: PyTree, y: PyTree) -> PyTree:
        """The same from y, without the rule of its derivative, which would be traced too: not to be differentiated."""
        value, flat, unravel, bounds = self._as_vector(level, x, y)
        return unravel(self._minimise(value, flat, bounds))

    def _as_vector(self, level: Level, x: PyTree, y: PyTree) -> tuple[Callable[[jax.Array], Scalar], Any, Any, Any]:
        """The loss of y's vector, that vector, the way back, and the bounds or None."""
        _refuse(level)
        flat, unravel = ravel_pytree(y)
        bounds = None
        if level.project is not None:
            ends = level.project.bounds(y)  # type: ignore[attr-defined]
            bounds = tuple(
                ravel_pytree(jax.tree.map(lambda b, y: jnp.broadcast_to(b, jnp.shape(y)), end, y))[0] for end in ends
            )
        return lambda u: level(x, unravel(u)), flat, unravel, bounds

    def _minimise(self, fn: Callable[[jax.Array], Scalar], u: jax.Array, bounds: Any) -> jax.Array:
        clip = (lambda u: u) if bounds is None else (lambda u: jnp.clip(u, *bounds))
        slope_at, d = jax.value_and_grad(fn), u.size
        eps = jnp.finfo(u.dtype).eps

        def residual(u: jax.Array, g: jax.Array, units: Any = 1.0) -> jax.Array:
            return jnp.linalg.norm((u - clip(u - units**2 * g)) / units)

        def body(s: _State) -> _State:
            held = jnp.zeros(u.shape, bool) if bounds is None else _held(s.u, s.g, bounds)
            step, multiply, size, curved, units = self._step(fn, s, held)
            longest = 10 * (jnp.sqrt(1.0 * d) + jnp.linalg.norm(s.u))
            length = jnp.linalg.norm(step)
            step = step * jnp.where(length > longest, longest / jnp.where(length > 0, length, 1), 1)
            new = clip(s.u + step)
            moved = new - s.u
            model = -(jnp.vdot(s.g, moved) + jnp.vdot(moved, multiply(moved)) / 2)
            value, g = slope_at(new)
            gain, noise = s.value - value, 10 * eps * (jnp.abs(s.value) + jnp.abs(value))
            now, before = residual(new, g, units), residual(s.u, s.g, units)
            # Where values no longer tell points apart, slopes do.
            level = (jnp.abs(gain) <= noise) & (now < before)
            good = jnp.isfinite(value) & jnp.all(jnp.isfinite(g)) & ((gain >= 1e-4 * model) & (gain > 0) | level)
            raised = jnp.where(s.damping > 0, 8 * s.damping, 1e-3 * jnp.where(size > 0, size, 1))
            lowered = jnp.where(s.damping > 1e-4 * size, s.damping / 10, 0)
            lowered = jnp.where((gain >= 0.25 * model) | level, lowered, s.damping)
            at = lambda a, b: jnp.where(good, a, b)  # noqa: E731
            best = jnp.minimum(s.best, now)
            exact = before <= 4 * eps * size * jnp.linalg.norm(s.u / units)
            since = jnp.where((good & (gain > noise)) | (good & (now < 0.5 * s.best)), 0, s.since + 1)
            ended = (residual(s.u, s.g) <= (0.0 if self.tol is None else self.tol)) | exact | (since > 12)
            ended = (ended | (level & (now > 0.5 * before))) & ~curved | (s.since > 25)
            return _State(
                at(new, s.u), at(value, s.value), at(g, s.g), jnp.where(good, lowered, raised), at(best, s.best),
                since, s.k + 1, ended,
            )  # fmt: skip

        u = clip(u)
        value, g = slope_at(u)
        zero = jnp.int32(0)
        start = _State(u, value, g, jnp.zeros_like(value), jnp.full_like(value, jnp.inf), zero, zero, jnp.bool_(False))
        return jax.lax.while_loop(lambda s: (s.k < self.steps) & ~s.ended, body, start).u

    def _step(
        self, fn: Callable[[jax.Array], Scalar], s: _State, held: jax.Array
    ) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], jax.Array, jax.Array, jax.Array]:
        """The step, v -> f_yy v, and in units of each unknown's own: f_yy's size, if it curves down, those units."""
        free = lambda v: jnp.where(held, 0, v)  # noqa: E731
        product = jax.linearize(jax.grad(fn), s.u)[1]
        multiply, g = lambda v: free(product(free(v))), free(s.g)
        if s.u.size > self.dense:
            target = jnp.minimum(0.1, jnp.sqrt(jnp.linalg.norm(g))) * 1e-3 * jnp.linalg.norm(g)
            damped = lambda v: multiply(v) + s.damping * v  # noqa: E731
            end = conjugate_gradients(damped, -g, None, None, target, self.cg_steps)
            return end.v, product, end.size_h, jnp.bool_(False), jnp.ones_like(g)
        matrix = jax.vmap(multiply)(jnp.eye(s.u.size, dtype=s.u.dtype))
        finite = jnp.all(jnp.isfinite(matrix))
        matrix = jnp.where(finite, (matrix + matrix.T) / 2, jnp.eye(s.u.size, dtype=s.u.dtype))
        units = equilibration(matrix, True)[1]
        w, vectors = eigh(matrix * units[:, None] * units)
        size, rounding = jnp.max(jnp.abs(w)), max(s.u.size, 4) * jnp.finfo(w.dtype).eps
        along = vectors.T @ (units * g)
        flat = jnp.abs(w) <= rounding * size
        negligible = flat & (jnp.abs(along) <= rounding**0.5 * jnp.linalg.norm(units * g))
        scale = jnp.where(flat, jnp.where(size > 0, rounding * size, 1), jnp.abs(w)) + s.damping
        coefficients = jnp.where(negligible, 0, -along / scale)
        # A saddle point's slope does not show the way out of it.
        curved = w[0] < -(rounding**0.5) * size
        blind = curved & (jnp.abs(along[0]) <= 1e-3 * jnp.abs(w[0]) * 0.1)
        kick = 0.1 * (1 + jnp.linalg.norm(s.u) / s.u.size**0.5) / (1 + s.damping / jnp.where(size > 0, size, 1))
        kick = kick / jnp.linalg.norm(units * vectors[:, 0])
        sign = jnp.where(along[0] > 0, -1.0, 1.0).astype(w.dtype)
        coefficients = coefficients.at[0].add(jnp.where(blind, sign * kick, 0))
        return free(units * (vectors @ coefficients)), multiply, size, curved, units


class _State(NamedTuple):
    u: jax.Array
    value: jax.Array
    g: jax.Array
    damping: jax.Array
    best: jax.Array  # the smallest residual yet
    since: jax.Array  # steps without a gain
    k: jax.Array
    ended: jax.Array


def _held(u: jax.Array, g: jax.Array, bounds: Any) -> jax.Array:
    """Which unknowns stand at a bound that the slope pushes them against."""
    low, high = bounds
    near = 4 * jnp.finfo(u.dtype).eps * (1 + jnp.abs(u))
    return ((u <= low + near) & (g > 0)) | ((u >= high - near) & (g < 0))


def _precision(b: jax.Array) -> float:
    return float(jnp.finfo(b.dtype).eps) ** 0.75


def _refuse(level: Level) -> None:
    if level.prox is not None or level.constraint is not None or level.equality is not None:
        raise ProblemError(
            "lower.Newton solves smooth lower levels over a box, and this one has a prox or coupled constraints, which "
            "it would ignore. Take lower.GradientDescent (prox), or lower.Accurate (constraints)."
        )
    if level.project is not None and not hasattr(level.project, "bounds"):
        raise ProblemError(
            "lower.Newton sees a box by its bounds, and project_lower is a plain function. Give it as a set, "
            "project_lower=sets.Box(lower, upper) (any callable with bounds(y) -> (lower, upper)), or take "
            "lower.GradientDescent."
        )
