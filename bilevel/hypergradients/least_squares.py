"""Implicit differentiation where the lower Hessian may be singular: a least-squares system."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from bilevel import curvature, derivatives
from bilevel._module import hyperparameters, state
from bilevel.hypergradients._base import Estimate
from bilevel.level import Level
from bilevel.lower import LowerState
from bilevel.typing import LowerSolver, PyTree, Scalar


@state
class LeastSquaresCarry:
    """v, where the next steps start, and |f_yy| at the start of the run (zero with a step size by hand)."""

    v: PyTree
    curvature: Scalar


@hyperparameters
class LeastSquares:
    """GALET's hypergradient: gradient steps on |F_y - f_yy v|^2 / 2, so that f_yy may be singular.

        dF/dx = F_x - f_xy v,        v <- v - rho f_yy (f_yy v - F_y)        `steps` times, from the last v

    For lower levels that are smooth, convex in y (which the theory asks for) and satisfy the PL inequality in y. Where
    the minimiser is not unique and F prefers another one than the lower solver found, F_y - f_yy v cannot vanish: that
    is `linear_residual`, and a run with a tolerance does not end CONVERGED above it. Per call: the lower solve, a
    gradient of F, 2 steps + 1 second-order products. `Implicit(linear.Robust())` solves the same system to a tolerance.

    Attributes:
      steps: per call.
      step_size: rho; None: 1 / L^2, L = |f_yy| at the start of the run, by 30 products.

    Reference: Xiao, Lu, Chen, "An Alternating Optimization Method for Bilevel Problems under the Polyak-Lojasiewicz
    Condition", NeurIPS 2023. (Its w is -v.)
    """

    honours: ClassVar[tuple[str, ...]] = ()
    settles: ClassVar[tuple[str, ...]] = ("lower_residual", "linear_residual")

    steps: int = 20
    step_size: float | None = None

    def init(self, lower: Level, x: PyTree, y: PyTree) -> LeastSquaresCarry:
        """v starts at zero."""
        largest = jnp.zeros((), jnp.result_type(*jax.tree.leaves(y)))
        if self.step_size is None:
            largest = curvature.hessian_norm(lambda y: lower(x, y), y)
        return LeastSquaresCarry(optax.tree.zeros_like(y), largest)

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: LeastSquaresCarry
    ) -> Estimate:
        """The estimate at x."""
        found = solver(lower, x, start)
        value, (F_x, F_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, found.y)
        local = derivatives.linearised(lower, x, found.y)
        rho = 1 / jnp.maximum(carry.curvature, 1e-12) ** 2 if self.step_size is None else self.step_size

        def improve(v: PyTree, _: Any) -> tuple[PyTree, None]:
            return optax.tree.add_scale(v, -rho, local.hvp(optax.tree.sub(local.hvp(v), F_y))), None

        v = jax.lax.scan(improve, carry.v, None, length=self.steps)[0]
        cross, product = local.products(v)
        metrics = {
            "lower_loss": local.value,
            "lower_residual": derivatives.norm(local.gradient_y),
            "linear_residual": derivatives.norm(optax.tree.sub(F_y, product)),
        }
        carry = LeastSquaresCarry(v, carry.curvature)
        return Estimate(value, optax.tree.sub(F_x, cross), found, carry, metrics)
