"""Least squares in a few parameters: Levenberg-Marquardt with forward-mode Jacobians, in the parameters' own units."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel._module import hyperparameters, state
from bilevel.level import Level, takes_batch
from bilevel.lower.loops import LowerState
from bilevel.optimizers import check_count
from bilevel.typing import PyTree

__all__ = ["LeastSquares", "LevenbergMarquardt"]

_LARGEST, _SMALLEST = 1e12, 1e-15  # of the damping


@state
class LeastSquares:
    """What a fit found.

    Attributes:
      y: the parameters, in the user's units.
      loss: the sum of squares there; infinite where it is finite nowhere on the way.
      curve: the smallest sum of squares after 0, 1, ... iterations, repeated after the last.
      steps: iterations taken.
      converged: whether a step ended below the tolerance, rather than all steps having been taken.
    """

    y: PyTree
    loss: jax.Array
    curve: jax.Array
    steps: jax.Array
    converged: jax.Array


@hyperparameters
class LevenbergMarquardt:
    """Damped Gauss-Newton steps on |r(y)|^2 with the Jacobian by forward mode: for few parameters and many residuals.

        y = T(u),   J = dr/du,   (J'J + damping diag(J'J)) d = -J'r,   u <- clip(u + d)

    A step that does not lower the sum of squares (or meets a NaN) is withdrawn and the damping grows by 4, then 8,
    16, ...;
    else it falls by 10. The scale of the damping is J's own, so that parameters may have any units. A parameter that
    stands at
    its bound and is pushed outwards takes no part in the linear system. An iteration costs one evaluation of r and one
    tangent of it per parameter, all at the trial point. It is pure: `vmap` is many fits at once. A fit that is done
    stands still until the last of them is. J is dense, and over a mesh every device has the whole of it.

    As a lower solver `residuals` is r(x, y), or r(x, y, batch), whose sum of squares is the lower loss; `fit` alone
    needs no problem.

    Attributes:
      residuals: `(x, y) -> arrays` or `(x, y, batch) -> arrays`, for use as a lower solver.
      steps: the most iterations.
      damping: at the start.
      tol: ends where an accepted step lowers the sum of squares by less than this, relatively, or where J'r vanishes
        in the same units.
      lower, upper: bounds, trees like y or numbers; None: none.
      transform: `"log"` (the fit is in log y, for what is positive), `"logit"` (y = lower + (upper - lower)
        sigmoid(u), both
        finite) or None, for all of y, or as a tree like y.

    Source: Levenberg 1944, Marquardt 1963; the scaling by diag(J'J) is Marquardt's.
    """

    residuals: Callable[..., PyTree] | None = None
    steps: int = 30
    damping: float = 1e-3
    tol: float = 1e-10
    lower: PyTree = None
    upper: PyTree = None
    transform: PyTree = None

    def __post_init__(self) -> None:
        check_count("LevenbergMarquardt", "the number of iterations is a positive integer", steps=self.steps)
        for name in ("damping", "tol"):
            value = getattr(self, name)
            if isinstance(value, float) and not (value > 0 or (name == "tol" and value == 0)):
                raise ValueError(f"LevenbergMarquardt({name}={value!r}): the number is positive.")
        if not (self.transform is None or isinstance(self.transform, (str, _Names))):
            leaves, treedef = jax.tree.flatten(self.transform, is_leaf=lambda t: t is None)
            object.__setattr__(self, "transform", _Names(tuple(leaves), treedef))

    def init(self, y: PyTree) -> LowerState:
        """y, with nothing to remember."""
        return LowerState(y, None)

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        if self.residuals is None:
            raise ValueError(
                "LevenbergMarquardt as a lower solver needs the residuals whose sum of squares the lower loss is: "
                "LevenbergMarquardt(residuals=lambda x, y: ...)."
            )
        residuals, batch = self.residuals, (level.batch,) if takes_batch(self.residuals) else ()
        return LowerState(self.fit(lambda y: residuals(x, y, *batch), state.y).y, None)

    def fit(
        self, residuals: Callable[[PyTree], PyTree], y: PyTree, lower: PyTree = None, upper: PyTree = None
    ) -> LeastSquares:
        """The parameters of least sum of squares, from y; bounds given here go before those of the solver.

        Raises:
          ValueError: the start is outside the bounds, or a transform does not fit them.
        """
        space = _Space(y, *((b if b is not None else d) for b, d in ((lower, self.lower), (upper, self.upper))))
        space.choose(self.transform)
        flat = lambda u: ravel_pytree(residuals(space.tree(u)))[0]  # noqa: E731

        def linearised(u: Any) -> Any:
            value, push = jax.linearize(flat, u)
            jacobian = jax.vmap(push)(jnp.eye(u.size, dtype=u.dtype))  # (parameters, residuals)
            loss = jnp.vdot(value, value)
            gram, slope = jacobian @ jacobian.T, jacobian @ value
            good = jnp.isfinite(loss) & jnp.isfinite(gram).all() & jnp.isfinite(slope).all()
            return jnp.where(good, loss, jnp.inf), gram, slope

        def step(carry: Any) -> Any:
            i, u, (loss, gram, slope), damping, growth, curve, _ = carry
            blocked = ((u <= space.low) & (slope > 0)) | ((u >= space.high) & (slope < 0))
            scale = jnp.where(jnp.diag(gram) > 0, jnp.diag(gram), 1.0)
            scale = jnp.sqrt(jnp.maximum(scale, jnp.finfo(u.dtype).tiny))
            free = jnp.where(blocked, 0.0, 1.0).astype(u.dtype)
            matrix = free[:, None] * (gram / scale[:, None] / scale) * free
            matrix = matrix + jnp.diag(damping * jnp.diag(matrix) + 4 * jnp.finfo(u.dtype).eps + (1 - free))
            right = -free * slope / scale
            change = jnp.linalg.solve(matrix, right) / scale
            trial = jnp.clip(u + change, space.low, space.high)
            new = linearised(trial)
            better = new[0] < loss
            drop = loss - new[0]
            # The sum of squares that a perfect Gauss-Newton step could still take away, in relative units.
            flat_here = jnp.vdot(right, right) <= self.tol * jnp.where(jnp.isfinite(loss), loss, 0.0)
            done = (better & (drop <= self.tol * loss)) | flat_here | (loss == 0) | (damping >= _LARGEST)
            u, fitted = jax.tree.map(lambda a, b: jnp.where(better, a, b), (trial, new), (u, (loss, gram, slope)))
            damping = jnp.where(better, jnp.maximum(damping / 10, _SMALLEST), damping * growth)
            growth = jnp.where(better, jnp.asarray(4, growth.dtype), 2 * growth)
            return i + 1, u, fitted, damping, growth, curve.at[i + 1].set(fitted[0]), done

        u = space.start
        first = linearised(u)
        curve = jnp.full(self.steps + 1, jnp.inf, first[0].dtype).at[0].set(first[0])
        damping, growth = jnp.asarray(self.damping, u.dtype), jnp.asarray(4, u.dtype)
        carry = (0, u, first, damping, growth, curve, ~jnp.isfinite(first[0]))
        i, u, (loss, *_), *_, curve, done = jax.lax.while_loop(lambda c: (c[0] < self.steps) & ~c[6], step, carry)
        curve = jnp.where(jnp.arange(self.steps + 1) > i, loss, curve)
        return LeastSquares(space.tree(u), loss, curve, jnp.asarray(i), done & jnp.isfinite(loss))


@dataclasses.dataclass(frozen=True)
class _Names:
    """A tree of names of transforms, as static data that can be hashed."""

    leaves: tuple[Any, ...]
    treedef: Any

    def __repr__(self) -> str:
        return repr(jax.tree.unflatten(self.treedef, self.leaves))


class _Space:
    """The parameters as a flat vector u, unbounded by a transform or bounded by a box."""

    def __init__(self, y: PyTree, lower: PyTree, upper: PyTree) -> None:
        y = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float, a)), y)
        self.y, self.unravel = ravel_pytree(y)
        if not self.y.size:
            return self._nothing()
        self.treedef = jax.tree.structure(y)
        self.low, self.high = (self._spread(y, b, d) for b, d in ((lower, -jnp.inf), (upper, jnp.inf)))
        self.shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]

    def _nothing(self) -> None:
        self.low = self.high = self.y
        self.shapes, self.treedef = [], None  # type: ignore[assignment]

    def _spread(self, y: PyTree, bound: PyTree, default: float) -> jax.Array:
        """A bound as a vector."""
        if bound is None:
            return jnp.full_like(self.y, default)
        if jax.tree.structure(bound) != self.treedef:  # type: ignore[operator]
            if jnp.ndim(bound) or len(jax.tree.leaves(bound)) != 1:
                raise ValueError(
                    f"Bounds are a number or a tree like y, {self.treedef}; these are {jax.tree.structure(bound)}."
                )
            return jnp.full_like(self.y, bound)
        spread = jax.tree.map(lambda leaf, b: jnp.broadcast_to(jnp.asarray(b, leaf.dtype), leaf.shape), y, bound)
        return ravel_pytree(spread)[0]

    def choose(self, transform: PyTree) -> None:
        """Take the transforms, check the start against them, and go over to u."""
        names = [None, "log", "logit"]
        given = transform.leaves if isinstance(transform, _Names) else (transform,) * len(self.shapes)
        if len(given) != len(self.shapes) or any(t not in names for t in given):
            raise ValueError(f"transform={transform!r}: 'log', 'logit' or None is needed, for all of y or per leaf.")
        codes = [np.full(int(np.prod(shape)), names.index(t)) for t, shape in zip(given, self.shapes, strict=True)]
        self.code = np.concatenate(codes) if codes else np.zeros(0, int)
        if not any(isinstance(a, jax.core.Tracer) for a in (self.y, self.low, self.high)):
            self._check(np.asarray(self.y), np.asarray(self.low), np.asarray(self.high))
        y, low, high, code = self.y, self.low, self.high, self.code
        self.range = low, high
        positive = jnp.where(code == 1, y, 1.0)
        share = jnp.where(code == 2, (y - low) / jnp.where(code == 2, high - low, 1.0), 0.5)
        self.start = jnp.where(code == 1, jnp.log(positive), jnp.where(code == 2, jnp.log(share / (1 - share)), y))
        to_log = lambda b, d: jnp.where(b > 0, jnp.log(jnp.where(b > 0, b, 1.0)), d)  # noqa: E731
        self.low = jnp.where(code == 1, to_log(low, -jnp.inf), jnp.where(code == 2, -jnp.inf, low))
        self.high = jnp.where(code == 1, to_log(high, jnp.inf), jnp.where(code == 2, jnp.inf, high))

    def _check(self, y: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        if not (np.isfinite(y).all() and (low <= y).all() and (y <= high).all()):
            raise ValueError(f"The start {y} is not finite or outside its bounds, {low} to {high}: start inside them.")
        if (self.code == 1).any() and not (y[self.code == 1] > 0).all():
            raise ValueError(f"transform='log' is for positive parameters, and the start is {y}.")
        box = self.code == 2
        if (
            box.any()
            and not (np.isfinite(low[box]) & np.isfinite(high[box]) & (low[box] < y[box]) & (y[box] < high[box])).all()
        ):
            raise ValueError("transform='logit' needs finite bounds and a start strictly between them.")

    def tree(self, u: jax.Array) -> PyTree:
        """u in the user's units and shape."""
        low, high = self.range
        bounded = self.code == 2
        span = jnp.where(bounded, high - low, 1.0)
        inside = jnp.where(bounded, low, 0.0) + span * jax.nn.sigmoid(u)
        y = jnp.where(self.code == 1, jnp.exp(jnp.where(self.code == 1, u, 0.0)), jnp.where(bounded, inside, u))
        return self.unravel(y)
