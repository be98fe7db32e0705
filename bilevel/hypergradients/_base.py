"""What every hypergradient estimator takes and gives."""

from __future__ import annotations

from typing import Any, Generic, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import state
from bilevel.level import Level
from bilevel.lower import LowerState
from bilevel.typing import LowerSolver, Metrics, PyTree, Scalar, X


@state
class Estimate(Generic[X]):
    """What an estimator returns.

    Attributes:
      value: F(x, y) at the y found.
      gradient: the estimate of dF(x, y*(x))/dx, shaped like x.
      lower: the lower solver's new state; `lower.y` is the y found.
      carry: what the estimator keeps for the next outer step (warm start of the linear system, preconditioner).
      metrics: scalars by name, such as `lower_residual` = |f_y(x, y)|.
    """

    value: Scalar
    gradient: X
    lower: LowerState
    carry: PyTree
    metrics: Metrics


class Estimator(Protocol):
    """An estimator of the hypergradient of h(x) = F(x, y*(x)).

    A call runs the lower solver, `solver(lower, x, state) -> state`, or differentiates through it.
    """

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """The carry before the first call: what is kept between outer steps."""

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate[Any]:
        """The estimate at x, the lower solver beginning at `start`."""


def lower_metrics(lower: Level, x: PyTree, y: PyTree) -> Metrics:
    """`lower_loss` and `lower_residual` at y: f, which may be undefined where its gradient is not, and |f_y|."""
    if lower.mixed:
        return {"lower_loss": lower(x, y), "lower_residual": derivatives.norm(lower.gradient(x, y))}
    value, gradient = jax.value_and_grad(lower, argnums=1)(x, y)
    return {"lower_loss": value, "lower_residual": derivatives.norm(gradient)}


def central_difference(lower: Level, x: PyTree, y: PyTree, v: PyTree, radius: Any) -> PyTree:
    """f_xy v by [f_x(x, y + e v) - f_x(x, y - e v)] / (2 e), e = radius / |v|; None: by a derivative."""
    if radius is None:
        return derivatives.cross_product(lower, x, y, v)
    length = derivatives.norm(v)
    e = radius / jnp.maximum(length, jnp.finfo(length.dtype).tiny ** 0.5)
    shifted = [optax.tree.cast_like(optax.tree.add_scale(y, sign * e, v), y) for sign in (1, -1)]
    plus, minus = (jax.grad(lower)(x, y) for y in shifted)
    return optax.tree.scale(1 / (2 * e), optax.tree.sub(plus, minus))


def check_radius(owner: str, radius: Any) -> None:
    """Raise a sentence where a perturbation's length is not positive (or None)."""
    if isinstance(radius, float) and not radius > 0:
        what = "the perturbation's length is positive, or None for the exact product."
        raise ValueError(f"{owner}(radius={radius!r}): {what}")
