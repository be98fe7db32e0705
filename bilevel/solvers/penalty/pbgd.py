"""V-PBGD and G-PBGD: penalised joint descent for an unconstrained lower level."""

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
from bilevel.solvers.penalty._base import kept_inside, rate
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
        return begin(problem, *problem.projected(x, y), key, self.penalty, follows=self.alpha is None)

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c, L = state.point, state.path.penalty, state.curvatures
        size = 1 / jnp.maximum(L["f_yy"], 1e-12) if self.lower_step is None else self.lower_step
        w = descended(lower, x, state.theta, size, self.lower_steps)

        found = slopes(upper, lambda x, y: lower(x, y) - lower(x, w), x, y)
        alpha = 1 / (2 * L["f"] + L["F"] / c) if self.alpha is None else self.alpha
        point = kept_inside(problem, upper, lower, (x, y), descend(problem, (x, y), found.along(c), alpha))

        joint, inner = rate(point, (x, y), alpha), rate(w, state.theta, size * self.lower_steps)
        return self.close(state.followed(key, lower, found).stepped(point, w), key, found, (joint, inner), inner)


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
        start = begin(problem, *problem.projected(x, y), key, self.penalty, follows=self.alpha is None)
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
        point = kept_inside(problem, upper, lower, (x, y), descend(problem, (x, y), found.along(c), alpha))

        new = state.followed(key, lambda x, y: _half_square(lower, x, y), found, factor=1 / scale)
        slope = jnp.sqrt(2 * scale * found.gap)
        return self.close(new.stepped(point), key, found, (rate(point, (x, y), alpha),), slope)


def _half_square(lower: Level, x: PyTree, y: PyTree) -> Scalar:
    return 0.5 * optax.tree.norm(jax.grad(lower, argnums=1)(x, y), squared=True)
