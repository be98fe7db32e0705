"""BLOCC: accurate saddle solves of the lower level's Lagrangian, a gradient in x alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import Diagnosed
from bilevel.solvers.penalty._constraints import Constraints
from bilevel.solvers.penalty._polish import solve_lower
from bilevel.solvers.penalty._schedule import Continuation, as_schedule
from bilevel.solvers.penalty._value import Tilted, ValueState, advance, begin, descend, upper_rule

PyTree = Any


@hyperparameters
class BLOCC(Diagnosed):
    """BLOCC, F2BA with coupled constraints.

        (z, mu)  = saddle of f + mu . c,         (y, lam) = saddle of F / c + f + lam . c            over y in Y
        h(x)     = F_x(x, y) + c [(f + lam . c)_x(x, y) - (f + mu . c)_x(x, z)],
            x <- Proj_X(x + upper_optimizer(h))

    Problem class: f strongly convex in y, constraints convex in y, linearly independent gradients of the active ones,
    lower
    level feasible for every x. Oracle calls a step: two augmented-Lagrangian solves (each up to `rounds` of
    `inner_steps` steps).

    Attributes:
      penalty: gamma of the publication, a schedule or a number.
      upper_optimizer: None: `optimizers.spectral()` on full batches, Adam(0.01) on minibatches.
      inner_steps, rounds: the most inner steps per multiplier update, and the most of those.

    The publication's inner solver is (accelerated) projected ascent in the multiplier with gradient descent in y;
    here both solves are augmented Lagrangians with line searches, which need no dual step size.

    Reference: Jiang, Xiao, Tenorio, Real-Rojas, Marques, Chen, "A Primal-Dual-Assisted Penalty Approach to Bilevel
    Optimization with Coupled Constraints", NeurIPS 2024.
    """

    penalty: Any = Continuation(settle=0.02)
    upper_optimizer: Any = None
    inner_steps: int = 60
    rounds: int = 8

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> ValueState:
        """Scale the rows; both saddle points start at (y, 0)."""
        honours = ("constraint", "equality", "project_upper", "project_lower")
        refuse(self, problem, x, honours=honours, instead="solvers.MEHA")
        state = begin(problem, x, y, key, self.penalty, upper_rule(problem, self.upper_optimizer), {})
        start = (y, state.lam)
        return ValueState(
            state.point, {"y": start, "z": start}, state.upper, state.path, state.scale, state.lam, state.curvatures
        )

    def step(self, problem: Problem, state: ValueState, key: Any) -> tuple[ValueState, dict[str, jax.Array]]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c = state.point, state.path.penalty
        rows = Constraints(problem, lower, x, y, state.scale)
        options = {"steps": self.inner_steps, "rounds": self.rounds, "tol": float(jnp.finfo(rows.dtype).eps) ** 0.75}
        z, mu, _, z_broken = solve_lower(lower, rows, x, *state.inner["z"], **options)
        y, lam, _, broken = solve_lower(Tilted.of(lower, upper, 1 / c), rows, x, *state.inner["y"], **options)

        def value(x: PyTree) -> jax.Array:
            lagrangians = lower(x, y) + jnp.vdot(lam, rows(x, y)) - lower(x, z) - jnp.vdot(mu, rows(x, z))
            return upper(x, y) + c * lagrangians

        penalised, gradient = jax.value_and_grad(value)(x)
        rule = upper_rule(problem, self.upper_optimizer)
        new_x, memory, stationarity = descend(problem, rule, state, penalised, gradient)

        loss, gap = upper(x, y), (penalised - upper(x, y)) / c
        slope = derivatives.norm(jax.grad(upper, argnums=1)(x, y))
        path, memory = advance(
            self.penalty, rule, state, key, (new_x, y), memory, stationarity / jnp.maximum(slope, 1e-30), (x, y)
        )
        bias = jnp.where(
            jnp.isfinite(path.change), jnp.minimum(slope * path.change, jnp.abs(c * gap)), jnp.abs(c * gap)
        )
        metrics = {
            "upper_loss": loss,
            "hypergradient_norm": stationarity,
            "lower_residual": derivatives.norm(jax.grad(lambda z: lower(x, z) + jnp.vdot(mu, rows(x, z)))(z))
            if lower.project is None
            else z_broken,
            "gap": gap,
            "violation": jnp.maximum(broken, z_broken),
            "penalty": c,
            "bias": bias,
        }
        return ValueState(
            (new_x, y), {"y": (y, lam), "z": (z, mu)}, memory, path, state.scale, mu, state.curvatures
        ), metrics

    def _can_grow(self, state: ValueState) -> Any:
        return as_schedule(self.penalty).grows(state.path)
