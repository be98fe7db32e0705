"""GAM: implicit differentiation through the lower level's KKT system, for small constrained lower levels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import Diagnosed
from bilevel.solvers.penalty._constraints import Constraints
from bilevel.solvers.penalty._polish import solve_lower
from bilevel.solvers.penalty._value import ValueState, advance, begin, descend, upper_rule

PyTree = Any


@hyperparameters
class GAM(Diagnosed):
    """GAM: the gradient of h(x) = F(x, y*(x)) from the active constraints, and a subgradient where activity is about
    to change.

        (y, lam) = solution and multipliers of the lower level,     L = f + lam . c
        A = {i : lam_i > eps, or an equality},     W = {i not in A : c_i > -eps}
        [ L_yy  J_A' ] [w]   [F_y]
        [ J_A    0   ] [q] = [ 0 ],         gradient for A = F_x - L_xy w - (J_A)_x' q
        x <- Proj_X(x + upper_optimizer(the shortest convex combination of the gradients for A and for A + W))

    Problem class: f strongly convex in y and constraints convex, with linearly independent active gradients; Y the
    whole space.
    Cost a step: an augmented-Lagrangian solve to high accuracy and two dense systems of size m + p. No step size for y.

    Attributes:
      eps: what counts as weakly active, in scaled rows.
      upper_optimizer: None: `optimizers.spectral()` on full batches, Adam(0.01) on minibatches.
      inner_steps, rounds: of the lower solve.

    The publication takes the gradients of all subsets of W (2^|W| of them); here the two extreme ones. h is not
    smooth: at a kink the direction can be short without x being optimal for a first-order method with a constant step.

    Reference: Xu, Zhu, "Efficient Gradient Approximation Method for Constrained Bilevel Optimization", AAAI 2023.
    """

    eps: float = 1e-4
    upper_optimizer: Any = None
    inner_steps: int = 100
    rounds: int = 12

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> ValueState:
        """Scale the rows."""
        refuse(
            self,
            problem,
            x,
            honours=("constraint", "equality", "project_upper"),
            instead="solvers.BLOCC or solvers.LVHBA",
        )
        state = begin(problem, x, y, key, 1.0, upper_rule(problem, self.upper_optimizer), {})
        return ValueState((x, y), {"lam": state.lam}, state.upper, state.path, state.scale, state.lam, state.curvatures)

    def step(self, problem: Problem, state: ValueState, key: Any) -> tuple[ValueState, dict[str, jax.Array]]:
        """One iteration."""
        upper, lower = problem.levels(key)
        x, y = state.point
        rows = Constraints(problem, lower, x, y, state.scale)
        solved = solve_lower(
            lower,
            rows,
            x,
            y,
            state.lam,
            steps=self.inner_steps,
            rounds=self.rounds,
            tol=float(jnp.finfo(rows.dtype).eps) ** 0.75,
        )
        y, lam = solved.y, solved.multipliers

        loss, (F_x, F_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        flat, unravel = ravel_pytree(y)
        lagrangian = lambda x, y: lower(x, y) + jnp.vdot(lam, rows(x, y))  # noqa: E731
        hessian = jax.hessian(lambda u: lagrangian(x, unravel(u)))(flat)
        jacobian = jax.jacobian(lambda u: rows(x, unravel(u)))(flat)
        right = jnp.concatenate([ravel_pytree(F_y)[0], jnp.zeros_like(lam)])

        def gradient(active: jax.Array) -> PyTree:
            masked = jnp.where(active[:, None], jacobian, 0.0)
            system = jnp.block([[hessian, masked.T], [masked, jnp.diag(jnp.where(active, 0.0, 1.0))]])
            solution = jnp.linalg.lstsq(system, right, rcond=1e2 * float(jnp.finfo(rows.dtype).eps))[0]
            w, q = unravel(solution[: flat.size]), jnp.where(active, solution[flat.size :], 0.0)
            indirect = derivatives.cross_product(lagrangian, x, y, w)
            through = jax.vjp(lambda x: rows(x, y), x)[1](q)[0]
            return optax.tree.sub(F_x, optax.tree.add(indirect, through))

        strong = (lam > self.eps) | ~rows.inequality
        weak = (rows(x, y) > -self.eps) & ~strong
        a, b = gradient(strong), gradient(strong | weak)
        difference = optax.tree.sub(b, a)
        share = -optax.tree.vdot(a, difference) / jnp.maximum(optax.tree.vdot(difference, difference), 1e-30)
        shortest = optax.tree.add_scale(a, jnp.clip(share, 0.0, 1.0), difference)

        rule = upper_rule(problem, self.upper_optimizer)
        new_x, memory, stationarity = descend(problem, rule, state, loss, shortest)
        path, memory = advance(1.0, rule, state, key, (new_x, y), memory, jnp.inf, (x, y))
        residual = derivatives.norm(jax.grad(lagrangian, argnums=1)(x, y))
        metrics = {
            "upper_loss": loss,
            "hypergradient_norm": stationarity,
            "lower_residual": residual,
            "gap": jnp.abs(jnp.vdot(lam, rows(x, y))),
            "violation": solved.violation,
            "penalty": jnp.ones_like(loss),
            "bias": residual,
            "weakly_active": jnp.sum(weak).astype(loss.dtype),
        }
        return ValueState((new_x, y), {"lam": lam}, memory, path, state.scale, lam, state.curvatures), metrics
