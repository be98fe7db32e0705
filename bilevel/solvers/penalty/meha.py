"""MEHA: a single-loop first-order method for lower levels with a nonsmooth term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters
from bilevel.constraints import depends
from bilevel.keys import StepKey
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import norm, proximal, rate
from bilevel.solvers.penalty._joint import Joint, JointState, Slopes, begin, lower_scale
from bilevel.solvers.penalty._schedule import Continuation
from bilevel.typing import Metrics, PyTree, Scalar


@hyperparameters
class MEHA(Joint):
    """MEHA, through the Moreau envelope of the lower level phi(x, y) = f(x, y) + r(x, y), r with a known prox.

        v(x, y) = min over theta in Y of phi(x, theta) + |theta - y|^2 / (2 gamma),      minimise F / c + phi - v

    One step:

        theta <- prox_{eta r(x,.)}(theta - eta (f_y(x, theta) + (theta - y) / gamma))
        x     <- Proj_X(x - alpha (F_x / c + phi_x(x, y) - phi_x(x, theta)))
        y     <- prox_{alpha r(x,.)}(y - alpha (F_y(x, y) / c + f_y(x, y) - (y - theta) / gamma))         at the new x

    Problem class: f weakly convex in y, r convex in y, Y simple; no coupled constraints. Where f is not convex the
    method characterises stationary points of the lower level, not its global minimisers. Oracle calls a step: 2 f_y, 2
    f_x, F_x, F_y.

    Attributes:
      alpha, eta: steps; None: alpha = 1 / (2 L + L_F / c), eta = 1 / (L + 1 / gamma), from power iteration in `init`.
      gamma: None: 3 / L_yy, but below half the inverse of a negative curvature of f in y at the start.
      penalty: a schedule or a number.
      nonsmooth: r(x, y) itself, needed where its prox depends on x (for r_x in the step of x).

    The publication takes constant steps set by hand and c_k = c0 (k+1)^p. With coupled constraints it is LV-HBA.

    Reference: Liu, Liu, Yao, Zeng, Zhang, "Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-Loop and
    Hessian-Free Solution Strategy", ICML 2024.
    """

    alpha: float | None = None
    eta: float | None = None
    gamma: float | None = None
    penalty: Any = Continuation()
    nonsmooth: Callable[..., jax.Array] | None = None

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> JointState:
        """Estimate the curvatures."""
        refuse(self, problem, x, honours=("project_upper", "project_lower", "prox_lower"), instead="solvers.LVHBA")
        prox = problem.prox_lower
        if prox is not None and self.nonsmooth is None and depends(lambda y, x: prox(x, y, 1.0), y, x, on=1):
            raise ProblemError(
                "MEHA: prox_lower depends on x, so the step of x needs the derivative of the nonsmooth term r itself: "
                "give MEHA(nonsmooth=r) with r(x, y) -> scalar."
            )
        return begin(problem, x, y, key, self.penalty, follows=self.alpha is None or self.eta is None)

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c, curvatures = state.point, state.path.penalty, state.curvatures
        gamma = self._gamma(curvatures)

        def phi(x: PyTree, y: PyTree) -> Scalar:
            return lower(x, y) if self.nonsmooth is None else lower(x, y) + self.nonsmooth(x, y)

        eta = 1 / (curvatures["f"] + 1 / gamma) if self.eta is None else self.eta
        gradient = optax.tree.add_scale(lower.gradient(x, state.theta), 1 / gamma, optax.tree.sub(state.theta, y))
        theta = proximal(lower, x, optax.tree.add_scale(state.theta, -eta, gradient), eta)

        def gap(x: PyTree, y: PyTree, phi: Any = phi) -> Scalar:
            return phi(x, y) - phi(x, theta) - optax.tree.norm(optax.tree.sub(theta, y), squared=True) / (2 * gamma)

        loss, F_x = jax.value_and_grad(upper)(x, y)
        value, gap_x = jax.value_and_grad(gap)(x, y)
        alpha = 1 / (2 * curvatures["f"] + curvatures["F"] / c) if self.alpha is None else self.alpha
        new_x = optax.tree.add_scale(optax.tree.add_scale(x, -alpha, gap_x), -alpha / c, F_x)
        if problem.project_upper is not None:
            new_x = problem.project_upper(new_x)
        # The smooth part alone: r enters the step of y through its prox.
        F_y = jax.grad(upper, argnums=1)(new_x, y)
        gap_y = jax.grad(lambda x, y: gap(x, y, lower), argnums=1)(new_x, y)
        new_y = optax.tree.add_scale(optax.tree.add_scale(y, -alpha, gap_y), -alpha / c, F_y)
        new_y = proximal(lower, new_x, new_y, alpha)

        found = Slopes(loss, (F_x, F_y), value, (gap_x, gap_y))
        new = state.followed(key, lower, found, also=norm(optax.tree.sub(new_x, x)))
        joint, inner = rate((new_x, new_y), (x, y), alpha), rate(theta, state.theta, eta)
        return self.close(new.stepped((new_x, new_y), theta), key, found, (joint, inner), inner)

    def _gamma(self, curvatures: dict[str, jax.Array]) -> Any:
        if self.gamma is not None:
            return self.gamma
        scale, negative = lower_scale(curvatures), curvatures["negative"]
        most = jnp.where(negative > 1e-2 * scale, 0.45 / jnp.where(negative > 0, negative, 1.0), jnp.inf)
        return jnp.minimum(3 / scale, most)
