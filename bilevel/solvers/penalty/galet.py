"""GALET: alternating descent for a lower level that satisfies the PL inequality."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.lower import GradientDescent, LowerState
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import Diagnosed
from bilevel.solvers.penalty._value import ValueState, advance, begin, descend, upper_rule

PyTree = Any


@hyperparameters
class GALET(Diagnosed):
    """GALET: implicit differentiation with a least-squares system, so that the lower Hessian may be singular.

        y <- `lower_steps` gradient steps of f(x, .);   w <- `linear_steps` steps  w - rho f_yy (F_y + f_yy w)
        x <- Proj_X(x + upper_optimizer(F_x + f_xy w))

    Problem class: f unconstrained and PL in y, possibly nonconvex. The y it converges to is the limit of its own
    descent: where
    the minimiser is not unique and F prefers another, F_y + f_yy w cannot vanish. That residual is `linear_residual`,
    and a run with a tolerance does not end CONVERGED above it. Not Hessian-free: 2 linear_steps + 1 second-order
    products a step.

    Attributes:
      lower_steps, lower_step: None: 1 / L_yy.
      linear_steps, linear_step: rho; None: 1 / L_yy^2.
      upper_optimizer: None: `optimizers.spectral()` on full batches, Adam(0.01) on minibatches.

    Reference: Xiao, Lu, Chen, "An Alternating Optimization Method for Bilevel Problems under the Polyak-Lojasiewicz
    Condition", NeurIPS 2023.
    """

    lower_steps: int = 20
    lower_step: float | None = None
    linear_steps: int = 20
    linear_step: float | None = None
    upper_optimizer: Any = None

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> ValueState:
        """Estimate the curvature; w starts at zero."""
        refuse(self, problem, x, honours=("project_upper",), instead="solvers.LVHBA or solvers.F2SA")
        return begin(
            problem, x, y, key, 1.0, upper_rule(problem, self.upper_optimizer), {"w": optax.tree.zeros_like(y)}
        )

    def step(self, problem: Problem, state: ValueState, key: Any) -> tuple[ValueState, dict[str, jax.Array]]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), curvature = state.point, jnp.maximum(state.curvatures["f_yy"], 1e-12)
        size = 1 / curvature if self.lower_step is None else self.lower_step
        descent = GradientDescent(size, self.lower_steps)
        y = descent(lower, x, LowerState(y, descent.init(y).memory)).y

        loss, (F_x, F_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        local = derivatives.linearised(lower, x, y)
        rho = 1 / curvature**2 if self.linear_step is None else self.linear_step

        def improve(w: PyTree, _: Any) -> tuple[PyTree, None]:
            return optax.tree.add_scale(w, -rho, local.hvp(optax.tree.add(F_y, local.hvp(w)))), None

        w = jax.lax.scan(improve, state.inner["w"], None, length=self.linear_steps)[0]
        cross, product = local.products(w)
        rule = upper_rule(problem, self.upper_optimizer)
        new_x, memory, stationarity = descend(problem, rule, state, loss, optax.tree.add(F_x, cross))
        path, memory = advance(1.0, rule, state, key, (new_x, y), memory, jnp.inf, (x, y))
        residual = derivatives.norm(local.gradient_y)
        linear = derivatives.norm(optax.tree.add(F_y, product))
        metrics = {
            "upper_loss": loss,
            "hypergradient_norm": jnp.maximum(stationarity, linear),
            "lower_residual": residual,
            "linear_residual": linear,
            "gap": residual**2 / (2 * curvature),
            "violation": jnp.zeros_like(loss),
            "penalty": jnp.ones_like(loss),
            "bias": residual,
        }
        return ValueState((new_x, y), {"w": w}, memory, path, state.scale, state.lam, state.curvatures), metrics
