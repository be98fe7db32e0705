"""Hypergradients at the incoming y, ahead of the lower solver: what architecture search moves along."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.hypergradients._base import Estimate, central_difference, check_radius
from bilevel.level import Level
from bilevel.lower import LowerState
from bilevel.typing import LowerSolver, Metrics, PyTree, Scalar

Found: TypeAlias = tuple[Scalar, PyTree, Metrics]


class Ahead:
    """An estimator that looks at the incoming y alone, by `at`; the lower solver runs after it."""

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """Nothing is kept."""
        return ()

    def at(self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState) -> Found:
        """The upper loss, the hypergradient and the metrics at (x, start.y)."""
        raise NotImplementedError

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate[Any]:
        """The estimate at x."""
        value, gradient, metrics = self.at(upper, lower, solver, x, start)
        return Estimate(value, gradient, solver(lower, x, start), carry, metrics)


@hyperparameters
class FiniteDifference(Ahead):
    """DARTS's second-order estimate: one virtual step, and a central difference of f_x instead of a cross product.

    With a virtual step y' = U(f_y(x, y)), a function of the lower gradient g alone,

        w = F_y(x, y'),    v = (dU/dg)' w,    e = radius / |v|
        dF/dx ~ F_x(x, y') + [f_x(x, y + e v) - f_x(x, y - e v)] / (2 e)

    For the plain step U(g) = y - virtual_step g this is v = -virtual_step w, the equation of the paper.

    Attributes:
      virtual_step: xi, the step of a plain virtual update (0: y' = y, and the estimate is F_x(x, y)). None: the virtual
        update is the lower solver's own step with its momentum, weight decay and schedule, from where the
        solver stands; U and its derivative are then those of the solver's rule, which must take one step.
      radius: the length of the perturbation e v; DARTS's default 0.01. None: the cross product f_xy v itself, which
        makes the estimate the exact derivative of F(x, y'(x)).

    Per call: 1 lower gradient, 1 upper gradient, 2 gradients in x, then the lower solver, run from the incoming y. The
    bias is that of one step, plus O(radius^2) (O(radius) where f_x is not three times differentiable in y).

    Reference: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, equations 7 and 8.
    """

    virtual_step: float | None = 0.1
    radius: float | None = 0.01

    def __post_init__(self) -> None:
        check_radius("FiniteDifference", self.radius)

    def at(self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState) -> Found:
        """The upper loss at the virtual step, the hypergradient and |f_y| at (x, start.y)."""
        y = start.y
        lower_y = lower.gradient(x, y)
        virtual, pullback = self._virtual(lower, solver, x, start, lower_y)
        value, (upper_x, w) = jax.value_and_grad(upper, argnums=(0, 1))(x, optax.tree.cast_like(virtual, y))
        cross = central_difference(lower, x, y, pullback(w), self.radius)
        gradient = optax.tree.cast_like(optax.tree.add(upper_x, cross), x)
        return value, gradient, {"lower_residual": derivatives.norm(lower_y)}

    def _virtual(self, lower: Level, solver: Any, x: PyTree, start: LowerState, lower_y: PyTree) -> tuple[PyTree, Any]:
        """y' and w -> (dU/dg)' w."""
        if self.virtual_step is not None:
            xi = self.virtual_step
            return optax.tree.add_scale(start.y, -xi, lower_y), lambda w: optax.tree.scale(-xi, w)
        owner = "FiniteDifference(virtual_step=None)"
        if lower.prox is not None:
            raise ValueError(f"{owner} knows no virtual step with a prox_lower: give a virtual_step.")
        if getattr(solver, "steps", 1) != 1:
            raise ValueError(
                f"{owner} differentiates one step of the lower solver, and {type(solver).__name__} takes "
                f"{solver.steps}: give it steps=1, or give a virtual_step."
            )
        if not hasattr(solver, "virtual") or solver.looks(start):
            raise ValueError(
                f"{owner} differentiates a lower solver that takes one step along the gradient; this one evaluates the "
                "loss itself. Take GradientDescent with an optax rule and steps=1, or give a virtual_step."
            )
        step = solver.virtual().differentiable()
        moved, pullback = jax.vjp(lambda g: step.move(lower, x, start, g).y, lower_y)
        return moved, lambda w: pullback(w)[0]


@hyperparameters
class FirstOrder(Ahead):
    """The direct gradient F_x(x, y) at the incoming y: how y*(x) moves with x is ignored.

    DARTS's first-order estimate. The lower solver runs after it. Cheapest of all, and biased wherever f_xy F_y is not
    zero, also at convergence. It does not measure the lower level's residual, which would cost a gradient.

    Reference: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.3.
    """

    def at(self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState) -> Found:
        """F and F_x at (x, start.y)."""
        return *jax.value_and_grad(upper)(x, start.y), {}
