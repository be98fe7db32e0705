"""F2SA, F2BA and the central difference: hypergradients from two lower solves and first derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.lower import GradientDescent, LowerState, as_lower_solver
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import Diagnosed
from bilevel.solvers.penalty._schedule import Continuation, Polynomial, as_schedule
from bilevel.solvers.penalty._value import Tilted, ValueState, advance, begin, descend, lower_rule, upper_rule

PyTree = Any


@hyperparameters
class F2SA(Diagnosed):
    """The fully first-order hypergradient, a finite difference in nu = 1 / c of v_nu(x) = min over y of f + nu F.

        one-sided:  y = argmin f + nu F,   z = argmin f
                    h(x) = F_x(x, y) + c (f_x(x, y) - f_x(x, z))                                      error O(1 / c)
        central:    y = argmin f + nu F,   z = argmin f - nu F
                    h(x) = (F_x(x, y) + F_x(x, z)) / 2 + (c / 2) (f_x(x, y) - f_x(x, z))              error O(1 / c^2)
        x <- Proj_X(x + upper_optimizer(h))

    y and z start where they ended; on minibatches both solves see the same batches, because their difference is
    multiplied by c.

    Problem class: f strongly convex in y over a simple set Y. One-sided, the minimiser of f need not be unique; the
    central
    difference needs strong convexity, for f - nu F is unbounded where f is flat. Oracle calls a step: 2 lower solves,
    2 gradients of F and 2 of f in x.

    Attributes:
      central: the central difference.
      lower_solver: for both solves; None: L-BFGS to a tolerance on full batches, `lower_steps` steps of length 1 / (2
        L) on minibatches. `lower.GradientDescent(step, 1)` is the single loop.
      lower_steps: see there.
      upper_optimizer: an optax rule or a step size; None: `optimizers.spectral()` on full batches, Adam(0.01) on
        minibatches.
      penalty: c (lambda in the publications), a number or a schedule.

    The reference implementations take steps of y with f's gradient at z in one place; here it is at y.

    References: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization", ICML 2023
    (F2SA); Chen, Ma, Zhang, "Near-Optimal Nonconvex-Strongly-Convex Bilevel Optimization with Fully First-Order Oracles",
    JMLR 2025 (F2BA); for differences of higher order arXiv 2509.02937 (F2SA-p).
    """

    central: bool = False
    lower_solver: Any = None
    lower_steps: int = 10
    upper_optimizer: Any = None
    penalty: Any = Polynomial(10.0, 1 / 3)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> ValueState:
        """Estimate the curvatures; both lower variables start at y."""
        refuse(
            self,
            problem,
            x,
            honours=("project_upper", "project_lower"),
            instead="solvers.LVHBA, solvers.BLOCC or solvers.MEHA",
        )
        rule = upper_rule(problem, self.upper_optimizer)
        memory = self._lower(problem, jnp.ones((), jnp.result_type(*jax.tree.leaves(y))), y).init(y)
        return begin(problem, x, y, key, self.penalty, rule, {"y": memory, "z": memory})

    def step(self, problem: Problem, state: ValueState, key: Any) -> tuple[ValueState, dict[str, jax.Array]]:
        """One iteration."""
        upper, lower = problem.levels(key)
        x, c = state.point[0], state.path.penalty
        nu, low = 1 / c, -1 / c if self.central else 0.0
        solver = self._lower(problem, state.curvatures["f_yy"] + nu * state.curvatures["F_yy"], state.point[1])

        tilted, other = Tilted.of(lower, upper, nu), Tilted.of(lower, upper, low) if self.central else lower
        found, reference = solver(tilted, x, state.inner["y"]), solver(other, x, state.inner["z"])
        y, z = found.y, reference.y

        def value(x: PyTree) -> jax.Array:
            if self.central:
                return (upper(x, y) + upper(x, z)) / 2 + c / 2 * (lower(x, y) - lower(x, z))
            return upper(x, y) + c * (lower(x, y) - lower(x, z))

        penalised, gradient = jax.value_and_grad(value)(x)
        rule = upper_rule(problem, self.upper_optimizer)
        new_x, memory, stationarity = descend(problem, rule, state, penalised, gradient)

        middle = optax.tree.scale(0.5, optax.tree.add(y, z)) if self.central else y
        loss = upper(x, middle)
        gap = jnp.maximum(lower(x, y), lower(x, z)) - lower(x, middle) if self.central else lower(x, y) - lower(x, z)
        # To leading order what the difference quotient leaves out: even terms of F, odd terms of f.
        bias = (
            jnp.abs((upper(x, y) + upper(x, z)) / 2 - loss) + jnp.abs(c / 2 * (lower(x, y) - lower(x, z)))
            if self.central
            else c * gap
        )
        inexact = c * jnp.maximum(_residual(tilted, x, y), _residual(other, x, z))
        slope = derivatives.norm(jax.grad(upper, argnums=1)(x, middle))
        settled = (stationarity + inexact) / jnp.maximum(slope, 1e-30)
        path, memory = advance(self.penalty, rule, state, key, (new_x, middle), memory, settled, (x, middle))
        bias = jnp.where(jnp.isfinite(path.change), jnp.minimum(slope * path.change, jnp.abs(bias)), jnp.abs(bias))
        metrics = {
            "upper_loss": loss,
            "hypergradient_norm": jnp.maximum(stationarity, inexact),
            "lower_residual": inexact / c,
            "gap": gap,
            "violation": jnp.zeros_like(loss),
            "penalty": c,
            "bias": bias,
        }
        inner = {"y": LowerState(y, found.memory), "z": LowerState(z, reference.memory)}
        return ValueState((new_x, middle), inner, memory, path, state.scale, state.lam, state.curvatures), metrics

    def _lower(self, problem: Problem, curvature: Any, y: PyTree) -> Any:
        return as_lower_solver(
            lower_rule(problem, self.lower_solver, curvature, self.lower_steps, jnp.result_type(*jax.tree.leaves(y)))
        )

    def _can_grow(self, state: ValueState) -> Any:
        return as_schedule(self.penalty).grows(state.path)


def _residual(level: Any, x: PyTree, y: PyTree) -> jax.Array:
    gradient = level.gradient(x, y)
    if level.project is None:
        return derivatives.norm(gradient)
    return derivatives.norm(optax.tree.sub(y, level.project(optax.tree.sub(y, gradient))))


def F2BA(lower_solver: Any = None, upper_optimizer: Any = None, penalty: Any = None, lower_steps: int = 10) -> F2SA:
    """F2BA: accurate lower solves and a constant penalty; by default one that doubles stage by stage, with
    extrapolation.

    The upper step does not depend on c, because min over y of F + c (f - v) is as smooth in x as h itself.
    """
    schedule = Continuation(settle=0.02) if penalty is None else penalty
    return F2SA(False, lower_solver, lower_steps, upper_optimizer, schedule)


def CentralF2SA(
    lower_solver: Any = None, upper_optimizer: Any = None, penalty: Any = 300.0, lower_steps: int = 10
) -> F2SA:
    """The central difference (F2SA-p with p = 2): the same two solves and an error of O(1 / c^2). For strongly convex
    f."""
    return F2SA(True, lower_solver, lower_steps, upper_optimizer, penalty)


def SingleLoopF2SA(lower_step: float = 0.1, upper_optimizer: Any = 0.01, penalty: Any = None) -> F2SA:
    """F2SA with one lower step of each kind per upper step; c ~ k^(1/7), k^(1/5), k^(1/3) for both levels noisy, the
    upper, none."""
    schedule = Polynomial(10.0, 1 / 7) if penalty is None else penalty
    return F2SA(False, GradientDescent(lower_step, 1), 1, upper_optimizer, schedule)
