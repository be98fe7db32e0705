"""Simple bilevel problems (x0=None): min F(y) over the minimisers of f."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters, name_of
from bilevel.keys import StepKey
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import limited, proximal, rate
from bilevel.solvers.penalty._joint import Joint, JointState, Slopes, begin
from bilevel.solvers.penalty._schedule import Continuation
from bilevel.typing import Metrics, PyTree


@hyperparameters
class IterativeRegularization(Joint):
    """Penalty for simple bilevel problems: one proximal gradient step of f + F / c per iteration, c growing.

        y <- prox_{s r}(y - s (f_y + F_y / c)),     s = 1 / (L_f + L_F / c)

    Problem class: x0=None; f convex (plus a nonsmooth r given by `prox_lower`), F convex, Y simple. Oracle calls: 1
    gradient of each. The `gap` is that between y and the end of `lower_steps` more steps of f alone.

    Attributes:
      step_size: s; None: as above.
      penalty: a schedule or a number.
      lower_steps: steps for the gap's estimate; their start is remembered, so that few are enough.

    Reference: Solodov, "An Explicit Descent Method for Bilevel Convex Optimization", J. Convex Anal. 2007 (with a line
    search).
    """

    step_size: float | None = None
    penalty: Any = Continuation()
    lower_steps: int = 1

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> JointState:
        """Estimate the curvatures."""
        _only_simple(self, problem, x)
        return begin(problem, x, y, key, self.penalty, follows=self.step_size is None)

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c, L = state.point, state.path.penalty, state.curvatures
        size = 1 / (L["f"] + L["F"] / c) if self.step_size is None else self.step_size

        loss, F_y = jax.value_and_grad(upper, argnums=1)(x, y)
        value, f_y = jax.value_and_grad(lower, argnums=1)(x, y)
        descent = optax.tree.scale(-size, optax.tree.add_scale(f_y, 1 / c, F_y))
        after = proximal(lower, x, optax.tree.add(y, limited(y, descent)), size)

        theta = state.theta
        for _ in range(self.lower_steps):
            theta = proximal(lower, x, optax.tree.add_scale(theta, -size, lower.gradient(x, theta)), size)
        found = Slopes(loss, (None, F_y), value - lower(x, theta), (None, f_y))
        new = state.followed(key, lower, found, factor=1.0).stepped((x, after), theta)
        joint, inner = rate(after, y, size), rate(theta, state.theta, size)
        return self.close(new, key, found, (joint, inner), inner)


@hyperparameters
class BiGSAM(Joint):
    """BiG-SAM, alternation for simple bilevel problems: a weighted mean of a step of F and a step of f.

        s = y - sigma F_y(y),    t = prox_{tau r}(y - tau f_y(y))
        y <- a_k s + (1 - a_k) t,        a_k = min(weight / (k + 1), 1)

    Problem class: x0=None; f convex (plus r by `prox_lower`), Y simple, F smooth and *strongly* convex. Converges to
    the solution, with the slow rate O(1 / k) of f's gap. Oracle calls: 1 gradient of each. `penalty` is tau (1 - a) /
    (sigma a).

    Attributes:
      upper_step, lower_step: sigma and tau; None: 1 / L_F and 1 / L_f (the publication: 2 / (L_F + mu_F) and 1 / L_f).
      weight: a_k's.

    Reference: Sabach, Shtern, "A First Order Method for Solving Convex Bilevel Optimization Problems", SIAM J. Optim.
    2017.
    """

    upper_step: float | None = None
    lower_step: float | None = None
    weight: float = 4.0

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> JointState:
        """Estimate the curvatures."""
        _only_simple(self, problem, x)
        return begin(problem, x, y, key, self.penalty, follows=self.upper_step is None or self.lower_step is None)

    def step(self, problem: Problem, state: JointState, key: StepKey) -> tuple[JointState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), L = state.point, state.curvatures
        sigma = 1 / jnp.maximum(L["F"], 1e-12) if self.upper_step is None else self.upper_step
        tau = 1 / jnp.maximum(L["f"], 1e-12) if self.lower_step is None else self.lower_step
        a = jnp.minimum(self.weight / (1.0 + jnp.asarray(key.step, L["f"].dtype)), 1.0)

        loss, F_y = jax.value_and_grad(upper, argnums=1)(x, y)
        value, f_y = jax.value_and_grad(lower, argnums=1)(x, y)
        s = optax.tree.add_scale(y, -sigma, F_y)
        t = proximal(lower, x, optax.tree.add_scale(y, -tau, f_y), tau)
        after = optax.tree.add_scale(optax.tree.scale(a, s), 1 - a, t)
        if lower.project is not None:
            after = lower.project(after)

        theta = proximal(lower, x, optax.tree.add_scale(state.theta, -tau, lower.gradient(x, state.theta)), tau)
        found = Slopes(loss, (None, F_y), value - lower(x, theta), (None, f_y))
        new = state.followed(key, lower, found, factor=1.0).stepped((x, after), theta)
        joint, inner = rate(after, y, jnp.maximum(a * sigma, 1e-30)), rate(theta, state.theta, tau)
        c = tau * (1 - a) / (sigma * a)
        return self.close(new, key, found, (joint,), inner, penalty=c, bias=c * jnp.abs(found.gap))


def _only_simple(solver: Any, problem: Problem, x: PyTree) -> None:
    refuse(solver, problem, x, honours=("project_lower", "prox_lower"), simple=True, instead="solvers.LVHBA")
    if jax.tree.leaves(x):
        raise ProblemError(
            f"{name_of(solver)} is for simple bilevel problems, where both levels own y: pass x0=None, "
            "or take solvers.VPBGD instead."
        )
