"""Hypergradients from differences of first derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.hypergradients._base import Estimate, PyTree
from bilevel.lower import Inner, LowerState


@hyperparameters
class FiniteDifference:
    """DARTS's second-order estimate: a virtual step and a central difference of f_x instead of a cross product.

        y' = y - virtual_step f_y(x, y),    w = F_y(x, y'),    e = radius / |w|
        dF/dx ~ F_x(x, y') - virtual_step [f_x(x, y + e w) - f_x(x, y - e w)] / (2 e)

    Attributes:
      virtual_step: xi, the step of the virtual update; 0 is the first-order estimate F_x(x, y).
      radius: the length of the perturbation e w; DARTS's default 0.01.

    The lower solver runs *after* the estimate is taken, from the incoming y, as in DARTS (architecture step first).
    Per call: 1 lower gradient, 1 upper gradient, 2 gradients in x; the bias is that of one step, plus O(e^2).

    Reference: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, equations 7 and 8.
    """

    virtual_step: float = 0.1
    radius: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.radius, float) and not self.radius > 0:
            raise ValueError(f"FiniteDifference(radius={self.radius!r}): the perturbation's length is positive.")

    def init(self, lower: Any, x: PyTree, y: PyTree) -> PyTree:
        """Nothing is kept."""
        return ()

    def __call__(self, upper: Any, lower: Any, inner: Inner, x: PyTree, start: LowerState, carry: PyTree) -> Estimate:
        """The estimate at x."""
        y, xi = start.y, self.virtual_step
        lower_y = jax.grad(lower, argnums=1)(x, y)
        virtual = optax.tree.add_scale(y, -xi, lower_y)
        value, (upper_x, w) = jax.value_and_grad(upper, argnums=(0, 1))(x, virtual)
        length = derivatives.norm(w)
        e = self.radius / jnp.maximum(length, jnp.finfo(length.dtype).tiny ** 0.5)
        plus, minus = (
            jax.grad(lower)(x, optax.tree.cast_like(optax.tree.add_scale(y, sign * e, w), y)) for sign in (1, -1)
        )
        cross = optax.tree.scale(1 / (2 * e), optax.tree.sub(plus, minus))
        gradient = optax.tree.cast_like(optax.tree.add_scale(upper_x, -xi, cross), x)
        metrics = {"lower_residual": derivatives.norm(lower_y)}
        return Estimate(value, gradient, inner(x, start), carry, metrics)
