"""V-PBGD, G-PBGD and BOME: joint descent for an unconstrained lower level, by a penalty or a dynamic barrier."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import curvature
from bilevel._module import hyperparameters
from bilevel.keys import StepKey
from bilevel.level import Level
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import norm, project_pair, rate
from bilevel.solvers.penalty._joint import Joint, JointState, begin, descend, descended, slopes
from bilevel.solvers.penalty._schedule import Continuation
from bilevel.typing import Metrics, PyTree, Scalar


@hyperparameters
class VPBGD(Joint):
    """V-PBGD: descent on F / c + f(x, y) - v(x) with v(x) from a few warm-started lower steps.

        w      <- `lower_steps` projected gradient steps of f(x, .) from the last w
        (x, y) <- Proj_{X x Y}((x, y) - alpha (F_x / c + f_x(x, y) - f_x(x, w),  F_y / c + f_y(x, y)))

    Problem class: f satisfies the PL inequality in y (it may be nonconvex, its minimiser need not be unique); Y simple.
    Takes x0=None: both levels own y. Oracle calls a step: lower_steps f_y, 1 gradient of F, 2 of f in (x, y).

    Attributes:
      alpha: None: 1 / (2 L + L_F / c).
      lower_steps, lower_step: the number and the length of the lower steps; None: 1 / L_yy.
      penalty: the gamma of the publication, a schedule or a number.

    The publication steps in F + gamma (f - v), which is the same with alpha gamma for alpha.

    Reference: Shen, Chen, "On Penalty-based Bilevel Gradient Descent Method", ICML 2023.
    """

    alpha: float | None = None
    lower_steps: int = 1
    lower_step: float | None = None
    penalty: Any = Continuation()

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> JointState:
        """Estimate the curvatures."""
        honours = ("project_upper", "project_lower")
        refuse(self, problem, x, honours=honours, simple=True, instead="solvers.LVHBA or solvers.MEHA")
        return begin(problem, *project_pair(problem, x, y), key, self.penalty, follows=self.alpha is None)

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c, L = state.point, state.path.penalty, state.curvatures
        size = 1 / jnp.maximum(L["f_yy"], 1e-12) if self.lower_step is None else self.lower_step
        w = descended(lower, x, state.theta, size, self.lower_steps)

        found = slopes(upper, lambda x, y: lower(x, y) - lower(x, w), x, y)
        alpha = 1 / (2 * L["f"] + L["F"] / c) if self.alpha is None else self.alpha
        point = descend(problem, (x, y), found.along(c), alpha)

        joint, inner = rate(point, (x, y), alpha), rate(w, state.theta, size * self.lower_steps)
        return self.close(state.followed(key, lower, found.apart).stepped(point, w), key, found, (joint, inner), inner)


@hyperparameters
class GPBGD(Joint):
    """G-PBGD: descent on F / c + |f_y(x, y)|^2 / (2 L): no value function, one Hessian-vector product a step.

        (x, y) <- Proj_{X x Y}((x, y) - alpha ((F_x, F_y) / c + (f_xy f_y, f_yy f_y) / L))

    Problem class: f unconstrained and PL in y. True to *stationarity* of the lower level only: where f is not PL, any
    of its stationary points passes. Oracle calls a step: 1 gradient of F, 1 gradient of |f_y|^2.

    Attributes:
      alpha: None: 1 / (2 L + L_F / c), L the curvature of f in (x, y).
      penalty: a schedule or a number.

    Reference: Shen, Chen, "On Penalty-based Bilevel Gradient Descent Method", ICML 2023.
    """

    alpha: float | None = None
    penalty: Any = Continuation()

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> JointState:
        """Estimate the curvatures."""
        refuse(self, problem, x, honours=("project_upper",), simple=True, instead="solvers.LVHBA or solvers.MEHA")
        start = begin(problem, *project_pair(problem, x, y), key, self.penalty, follows=self.alpha is None)
        lower = problem.draw_lower(key)
        largest = curvature.hessian_norm(lambda u: _half_square(lower, *u), (x, y))
        curvatures = {**start.curvatures, "f": largest, "f0": largest, "scale": start.curvatures["f"]}
        return dataclasses.replace(start, theta=None, curvatures=curvatures)

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c, L = state.point, state.path.penalty, state.curvatures
        scale = jnp.where(L["scale"] > 1e-12, L["scale"], 1.0)

        found = slopes(upper, lambda x, y: _half_square(lower, x, y) / scale, x, y)
        alpha = 1 / (2 * L["f"] / scale + L["F"] / c) if self.alpha is None else self.alpha
        point = descend(problem, (x, y), found.along(c), alpha)

        new = state.followed(key, lambda x, y: _half_square(lower, x, y), found.apart, factor=1 / scale)
        slope = jnp.sqrt(2 * scale * found.gap)
        return self.close(new.stepped(point), key, found, (rate(point, (x, y), alpha),), slope)


def _half_square(lower: Level, x: PyTree, y: PyTree) -> Scalar:
    return 0.5 * optax.tree.norm(jax.grad(lower, argnums=1)(x, y), squared=True)


@hyperparameters
class BOME(Joint):
    """BOME: descent on F that always reduces the lower level's gap q at least as fast as a barrier phi asks.

        w      <- `lower_steps` gradient steps of f(x, .) from y,      q(x, y) = f(x, y) - f(x, w), w held
        lam    = max((phi - <grad F, grad q>) / |grad q|^2, 0),        phi = barrier |grad q|^2 (`by_value`: barrier q)
        (x, y) <- (x, y) - xi (grad F + lam grad q)

    Problem class: f unconstrained, PL in y at least locally; the minimiser need not be unique. Takes x0=None: the
    dynamic barrier method of simple bilevel problems. Oracle calls a step: lower_steps f_y, 1 gradient of F, 2 of f.

    Attributes:
      xi: the step; None: 1 / (L_F + 2 (1 + lam) L).
      barrier: eta of the publication.
      by_value: phi proportional to q instead of |grad q|^2.
      lower_steps, lower_step: the number and length of the lower steps; None: 1 / L_yy.
      floor: added to |grad q|^2. Where q = 0 its gradient is zero and no multiplier exists: lam grows without bound
        near a solution, with about 1 / |y - y*|.
      cap: the largest lam.

    `penalty` in the metrics is lam. Defaults for the counts and the barrier are the publication's; its step is set by
    hand. The accuracy is limited by the vanishing gradient of q: 1e-2 to 1e-3 relative is what to expect.

    Reference: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach",
    NeurIPS 2022; for simple bilevel problems Gong, Liu, Liu, "Bi-objective Trade-off with Dynamic Barrier Gradient
    Descent", NeurIPS 2021.
    """

    xi: float | None = None
    barrier: float = 0.5
    by_value: bool = False
    lower_steps: int = 10
    lower_step: float | None = None
    floor: float = 1e-8
    cap: float = 1e4

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> JointState:
        """Estimate the curvatures."""
        refuse(self, problem, x, honours=(), simple=True, instead="solvers.VPBGD, solvers.MEHA or solvers.LVHBA")
        return begin(problem, x, y, key, self.penalty, follows=self.xi is None)

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), L = state.point, state.curvatures
        size = 1 / jnp.maximum(L["f_yy"], 1e-12) if self.lower_step is None else self.lower_step
        w = descended(lower, x, y, size, self.lower_steps)

        found = slopes(upper, lambda x, y: lower(x, y) - lower(x, w), x, y)
        steep = optax.tree.norm(found.apart, squared=True)
        phi = self.barrier * (found.gap if self.by_value else steep)
        lam = jnp.clip((phi - optax.tree.vdot(found.upward, found.apart)) / (steep + self.floor), 0.0, self.cap)
        direction = optax.tree.add_scale(found.upward, lam, found.apart)
        xi = 1 / (L["F"] + 2 * (1 + lam) * L["f"]) if self.xi is None else self.xi
        point = descend(problem, (x, y), direction, xi)

        # What the multiplier leaves of F's gradient in the direction and the gap together are the KKT measure.
        new = state.followed(key, lower, found.apart).stepped(point, w)
        return self.close(new, key, found, (norm(direction),), jnp.sqrt(steep), penalty=lam, bias=lam * found.gap)
