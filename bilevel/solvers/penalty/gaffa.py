"""BiC-GAFFA: coupled constraints without a projection on the coupled set."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters
from bilevel.constraints import Constraints
from bilevel.keys import StepKey
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import SMOOTH, kept_inside, rate, share_at_cap
from bilevel.solvers.penalty._joint import Joint, JointState, begin, descend, lower_scale, slopes
from bilevel.solvers.penalty._schedule import Continuation
from bilevel.typing import Metrics, PyTree, Scalar


@hyperparameters
class BiCGAFFA(Joint):
    """BiC-GAFFA, through a doubly regularised gap function of the lower level's Lagrangian L = f + z . c.

        G(x, y, z) = max over theta in Y, lam in cone of  L(x, y, lam) - |lam - z|^2 / (2 gamma2)
                                                          - L(x, theta, z) - |theta - y|^2 / (2 gamma1)
        minimise F / c + G over x in X, y in Y, z in [0, r]^p  ([-r, r] for equalities)

    One step:

        theta <- Proj_Y(theta - eta (L_y(x, theta, z) + (theta - y) / gamma1)),      lam = Proj(z + gamma2 c(x, y))
        (x, y) <- Proj_{X x Y}((x, y) - alpha (F / c + G)_{x, y}),      z <- Proj(z - beta G_z),
        G_z = (lam - z) / gamma2 - c(x, theta)

    Problem class: f convex in y, c convex in y (not jointly: the coupled set may be nonconvex), X and Y simple.
    Iterates break the constraints until the end. Oracle calls a step: 1 L_y, 1 gradient of F, 2 of L in (x, y).
    No projection on the coupled set.

    Attributes:
      alpha, beta, eta: steps; None: alpha = 1 / (2 L + gamma2 |J|^2 + L_F / c), beta = min(gamma2, 1 / (gamma1 |J|^2))
        / 2, eta = 1 / (L + 1 / gamma1).
      gamma1, gamma2: None: 3 / L and L / |J|^2 with L the curvature of f in y and J the scaled rows' Jacobian.
      penalty: a schedule or a number.
      cap: r, for scaled rows; `multiplier_at_cap` tells where it binds.

    The step rules are ours (the publication sets them by hand, and its toy runs cap c at 10).

    Reference: Yao, Yin, Zeng, Zhang, "Overcoming Lower-Level Constraints in Bilevel Optimization: A Novel Approach with
    Regularized Gap Functions", ICLR 2025 (arXiv 2406.01992).
    """

    alpha: float | None = None
    beta: float | None = None
    eta: float | None = None
    gamma1: float | None = None
    gamma2: float | None = None
    penalty: Any = Continuation()
    cap: float = 1e5

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> JointState:
        """Scale the rows and estimate the curvatures."""
        refuse(self, problem, x, honours=SMOOTH, instead="solvers.MEHA")
        follows = self.alpha is None or self.eta is None
        return begin(problem, *problem.projected(x, y), key, self.penalty, follows, ("lam", "z"))

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), z, c, L = state.point, state.duals["z"], state.path.penalty, state.curvatures
        rows = Constraints(lower, x, y, state.scale)
        wide = jnp.maximum(L["rows"], 1.0) ** 2
        gamma1 = 3 / lower_scale(L) if self.gamma1 is None else self.gamma1
        gamma2 = lower_scale(L) / wide if self.gamma2 is None else self.gamma2

        eta = 1 / (L["f"] + 1 / gamma1) if self.eta is None else self.eta
        slope = jax.grad(lambda t: lower(x, t) + jnp.vdot(z, rows(x, t)))(state.theta)
        slope = optax.tree.add_scale(slope, 1 / gamma1, optax.tree.sub(state.theta, y))
        theta = problem.projected(None, optax.tree.add_scale(state.theta, -eta, slope))[1]
        lam = rows.clip(z + gamma2 * rows(x, y))

        def gap(x: PyTree, y: PyTree) -> Scalar:
            here = lower(x, y) + jnp.vdot(lam, rows(x, y)) - jnp.sum((lam - z) ** 2) / (2 * gamma2)
            near = optax.tree.norm(optax.tree.sub(theta, y), squared=True) / (2 * gamma1)
            return here - (lower(x, theta) + jnp.vdot(z, rows(x, theta)) + near)

        found = slopes(upper, gap, x, y)
        alpha = 1 / (2 * L["f"] + gamma2 * wide + L["F"] / c) if self.alpha is None else self.alpha
        point = kept_inside(problem, upper, lower, (x, y), descend(problem, (x, y), found.along(c), alpha))
        beta = jnp.minimum(gamma2, 1 / (gamma1 * wide)) / 2 if self.beta is None else self.beta
        new_z = rows.clip(z - beta * ((lam - z) / gamma2 - rows(x, theta)), self.cap)

        # Where the rows are curved so is lam . c.
        new = state.followed(key, lambda x, y: lower(x, y) + jnp.vdot(lam, rows(x, y)), found)
        new = new.stepped(point, theta, {"lam": lam, "z": new_z})
        joint, dual, inner = rate(point, (x, y), alpha), rate(new_z, z, beta), rate(theta, state.theta, eta)
        said = {"violation": rows.violation(*point), "multiplier_at_cap": share_at_cap(lam, self.cap)}
        return self.close(new, key, found, (joint, dual, inner), inner, **said)
