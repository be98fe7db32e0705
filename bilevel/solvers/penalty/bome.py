"""BOME: a dynamic barrier instead of a penalty schedule."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.keys import StepKey
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import norm
from bilevel.solvers.penalty._joint import Joint, JointState, begin, descend, descended, slopes
from bilevel.typing import Metrics, PyTree


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
    hand. The accuracy is limited by the vanishing gradient of q, and no figure is promised: on two problems of
    `benchmarks/constrained.py` the relative error after 5,000 steps is 0.1 and 2e-6.

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
        lam = jnp.clip((phi - derivatives.dot(found.upward, found.apart)) / (steep + self.floor), 0.0, self.cap)
        direction = optax.tree.add_scale(found.upward, lam, found.apart)
        xi = 1 / (L["F"] + 2 * (1 + lam) * L["f"]) if self.xi is None else self.xi
        point = descend(problem, (x, y), direction, xi)

        # What the multiplier leaves of F's gradient in the direction and the gap together are the KKT measure.
        new = state.followed(key, lower, found).stepped(point, w)
        return self.close(new, key, found, (norm(direction),), jnp.sqrt(steep), penalty=lam, bias=lam * found.gap)
