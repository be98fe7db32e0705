"""Hypergradients from differences of first derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.hypergradients._base import Estimate, PyTree
from bilevel.lower import GradientDescent, Inner, LowerState


@hyperparameters
class FiniteDifference:
    """DARTS's second-order estimate: one virtual step, and a central difference of f_x instead of a cross product.

    With a virtual step y' = U(f_y(x, y)), a function of the lower gradient g alone,

        w = F_y(x, y'),    v = (dU/dg)' w,    e = radius / |v|
        dF/dx ~ F_x(x, y') + [f_x(x, y + e v) - f_x(x, y - e v)] / (2 e)

    For the plain step U(g) = y - virtual_step g this is v = -virtual_step w, the equation of the paper.

    Attributes:
      virtual_step: xi, the step of a plain virtual update (0: y' = y, and the estimate is F_x(x, y)). None: the virtual
        update is the lower solver's own step with its momentum, weight decay and schedule, from where the
        solver stands; U and its derivative are then those of the solver's rule, which must take one step.
      radius: the length of the perturbation e v; DARTS's default 0.01.

    Per call: 1 lower gradient, 1 upper gradient, 2 gradients in x, then the lower solver, run from the incoming y. The bias is
    that of one step, plus O(radius^2) (O(radius) where f_x is not three times differentiable in y).

    Reference: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, equations 7 and 8.
    """

    virtual_step: float | None = 0.1
    radius: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.radius, float) and not self.radius > 0:
            raise ValueError(f"FiniteDifference(radius={self.radius!r}): the perturbation's length is positive.")

    def init(self, lower: Any, x: PyTree, y: PyTree) -> PyTree:
        """Nothing is kept."""
        return ()

    def _virtual(self, lower: Any, inner: Inner, x: PyTree, start: LowerState, lower_y: PyTree) -> tuple[PyTree, Any]:
        """y' and w -> (dU/dg)' w."""
        if self.virtual_step is not None:
            xi = self.virtual_step
            return optax.tree.add_scale(start.y, -xi, lower_y), lambda w: optax.tree.scale(-xi, w)
        if getattr(inner.solver, "steps", 1) != 1:
            raise ValueError(
                f"FiniteDifference(virtual_step=None) differentiates one step of the lower solver, and {type(inner.solver).__name__} takes "
                f"{inner.solver.steps}: give it steps=1, or give a virtual_step."
            )
        moved, pullback = jax.vjp(lambda g: inner.with_level(_Given(lower, g))(x, start).y, lower_y)
        return moved, lambda w: pullback(w)[0]

    def __call__(self, upper: Any, lower: Any, inner: Inner, x: PyTree, start: LowerState, carry: PyTree) -> Estimate:
        """The estimate at x."""
        y = start.y
        lower_y = lower.gradient(x, y)
        virtual, pullback = self._virtual(lower, inner, x, start, lower_y)
        value, (upper_x, w) = jax.value_and_grad(upper, argnums=(0, 1))(x, optax.tree.cast_like(virtual, y))
        v = pullback(w)
        length = derivatives.norm(v)
        e = self.radius / jnp.maximum(length, jnp.finfo(length.dtype).tiny ** 0.5)
        plus, minus = (
            jax.grad(lower)(x, optax.tree.cast_like(optax.tree.add_scale(y, sign * e, v), y)) for sign in (1, -1)
        )
        cross = optax.tree.scale(1 / (2 * e), optax.tree.sub(plus, minus))
        gradient = optax.tree.cast_like(optax.tree.add(upper_x, cross), x)
        metrics = {"lower_residual": derivatives.norm(lower_y)}
        return Estimate(value, gradient, inner(x, start), carry, metrics)


class _Given:
    """A level whose gradient is the one given: what a lower solver does with it is then a function of that gradient."""

    prox = None

    def __init__(self, lower: Any, gradient: PyTree) -> None:
        if lower.prox is not None:
            raise ValueError(
                "FiniteDifference(virtual_step=None) knows no virtual step with a prox_lower: give a virtual_step."
            )
        self.project, self._gradient = lower.project, gradient

    def gradient(self, x: PyTree, y: PyTree) -> PyTree:
        return self._gradient

    def redraw(self, i: Any, total: int) -> _Given:
        return self

    def __call__(self, x: PyTree, y: PyTree) -> Any:
        raise ValueError(
            "FiniteDifference(virtual_step=None) differentiates a lower solver that takes one step along the gradient; "
            f"this one evaluates the loss itself. Take {GradientDescent.__name__} with an optax rule and steps=1, or give a virtual_step."
        )


@hyperparameters
class FirstOrder:
    """The direct gradient F_x(x, y) at the incoming y: how y*(x) moves with x is ignored.

    DARTS's first-order estimate. The lower solver runs after it. Cheapest of all, and biased wherever f_xy F_y is not
    zero, also at convergence. It does not measure the lower level's residual, which would cost a gradient.

    Reference: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.3.
    """

    def init(self, lower: Any, x: PyTree, y: PyTree) -> PyTree:
        """Nothing is kept."""
        return ()

    def __call__(self, upper: Any, lower: Any, inner: Inner, x: PyTree, start: LowerState, carry: PyTree) -> Estimate:
        """The estimate at x."""
        value, gradient = jax.value_and_grad(upper)(x, start.y)
        return Estimate(value, gradient, inner(x, start), carry, {})
