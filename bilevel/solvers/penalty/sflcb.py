"""SFLCB: linear coupled constraints, single loop, no projection on the coupled set."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters
from bilevel.constraints import Constraints, is_affine
from bilevel.keys import StepKey
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import SMOOTH, kept_inside, rate
from bilevel.solvers.penalty._joint import Joint, JointState, begin, descend, lower_scale, slopes
from bilevel.solvers.penalty._schedule import Continuation
from bilevel.typing import Metrics, PyTree, Scalar


@hyperparameters
class SFLCB(Joint):
    """SFLCB: the penalised difference of two augmented Lagrangians, for linear constraints c(x, y) = Bx + Ay - b.

        A(y, u) = (1 / 2 rho) (|Proj(u + rho c(x, y))|^2 - |u|^2)
        K = F(x, y) / c + f(x, y) + A(y, u) - f(x, theta) - A(theta, v):     min over x, y, v;  max over u, theta

    One step:

        theta <- Proj_Y(theta - s (f + A)_y(x, theta; v)),   v <- v + sigma rho A_v
        (x, y) <- Proj_{X x Y}((x, y) - s K_{x, y}),           u <- u + sigma rho A_u,     rho A_u = Proj(u + rho c) - u

    Problem class: f strongly convex in y, c affine with full row rank in y, lower level feasible for all x. Fails for a
    linear f and where the lower level becomes infeasible. Oracle calls a step: 1 f_y, 1 gradient of F, 2 of f in (x,
    y).

    Attributes:
      step_size: s; None: 1 / (2 L + 2 rho |J|^2 + L_F / c).
      dual_step: sigma in (0, 1].
      rho: None: L / |J|^2.
      penalty: 1 / delta of the publication, a schedule or a number.

    The publication keeps slack variables for the inequalities and steps in them; here they are eliminated exactly,
    which is the Proj above. It takes one step size for everything and a constant penalty (delta = 0.1).

    Reference: Shen, Huang, Zhang, Shen, "A Single-Loop First-Order Algorithm for Linearly Constrained Bilevel
    Optimization", NeurIPS 2025.
    """

    step_size: float | None = None
    dual_step: float = 0.3
    rho: float | None = None
    penalty: Any = Continuation(least=1.0)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> JointState:
        """Scale the rows and estimate the curvatures."""
        refuse(self, problem, x, honours=SMOOTH, instead="solvers.MEHA")
        if not is_affine(Constraints(problem.draw_lower(key), x, y).raw, x, y):
            raise ProblemError(
                "SFLCB needs constraints that are affine in (x, y), and these are not (by their trace). "
                "Take solvers.BiCGAFFA instead."
            )
        return begin(problem, *problem.projected(x, y), key, self.penalty, self.step_size is None, ("lam", "v"))

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), theta, u, v = state.point, state.theta, state.duals["lam"], state.duals["v"]
        rows, c, L = Constraints(lower, x, y, state.scale), state.path.penalty, state.curvatures
        wide = jnp.maximum(L["rows"], 1.0) ** 2
        rho = lower_scale(L) / wide if self.rho is None else self.rho
        size = 1 / (2 * L["f"] + 2 * rho * wide + L["F"] / c) if self.step_size is None else self.step_size

        def augmented(x: PyTree, y: PyTree, u: jax.Array) -> Scalar:
            return lower(x, y) + (jnp.sum(rows.clip(u + rho * rows(x, y)) ** 2) - jnp.sum(u**2)) / (2 * rho)

        new_theta = optax.tree.add_scale(theta, -size, jax.grad(augmented, argnums=1)(x, theta, v))
        new_theta = problem.projected(None, new_theta)[1]
        new_v = v + self.dual_step * (rows.clip(v + rho * rows(x, new_theta)) - v)

        def gap(x: PyTree, y: PyTree) -> Scalar:
            return augmented(x, y, u) - augmented(x, new_theta, new_v)

        found = slopes(upper, gap, x, y)
        point = kept_inside(problem, upper, lower, (x, y), descend(problem, (x, y), found.along(c), size))
        new_u = u + self.dual_step * (rows.clip(u + rho * rows(*point)) - u)

        dual_size = self.dual_step * rho
        joint, dual, inner = rate(point, (x, y), size), rate(new_u, u, dual_size), rate(new_theta, theta, size)
        inner = jnp.hypot(inner, rate(new_v, v, dual_size))
        new = state.followed(key, lower, found).stepped(point, new_theta, {"lam": new_u, "v": new_v})
        # u dominates v by F's share of the multiplier, so that the augmented gap is no bound: take the Lagrangian's.
        bias = c * jnp.abs(found.gap) + c * jnp.abs(jnp.vdot(new_u - new_v, rows(x, y)))
        return self.close(new, key, found, (joint, dual, inner), inner, violation=rows.violation(*point), bias=bias)
