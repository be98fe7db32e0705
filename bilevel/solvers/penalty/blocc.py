"""BLOCC: accurate saddle solves of the lower level's Lagrangian, a gradient in x alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.constraints import Constraints
from bilevel.keys import StepKey
from bilevel.lower.accurate import augmented_lagrangian
from bilevel.optimizers import residual
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import SMOOTH, report
from bilevel.solvers.penalty._schedule import Continuation
from bilevel.solvers.penalty._value import Tilted, ValueMethod, ValueState
from bilevel.typing import Metrics, PyTree, Scalar


@hyperparameters
class BLOCC(ValueMethod):
    """BLOCC, F2BA with coupled constraints.

        (z, mu)  = saddle of f + mu . c,         (y, lam) = saddle of F / c + f + lam . c            over y in Y
        h(x)     = F_x(x, y) + c [(f + lam . c)_x(x, y) - (f + mu . c)_x(x, z)]
        x        <- Proj_X(x + upper_optimizer(h))

    Problem class: f strongly convex in y, constraints convex in y, linearly independent gradients of the active ones,
    lower level feasible for every x. Oracle calls a step: two augmented-Lagrangian solves (each up to `rounds` of
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

    penalty: Any = Continuation(settle=0.02, shrink=2.0)
    upper_optimizer: Any = None
    inner_steps: int = 60
    rounds: int = 8

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> ValueState:
        """Scale the rows; both saddle points start at (y, 0)."""
        refuse(self, problem, x, honours=SMOOTH, instead="solvers.MEHA")
        return self.begin(problem, x, y, key, lambda lam, y: {"y": (y, lam), "z": (y, lam)})

    def step(self, problem: Problem, state: ValueState, key: StepKey) -> tuple[ValueState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c = state.point, state.path.penalty
        rows = Constraints(lower, x, y, state.scale)
        options = {"steps": self.inner_steps, "rounds": self.rounds, "tol": float(jnp.finfo(rows.dtype).eps) ** 0.75}
        z, mu, _, z_broken = augmented_lagrangian(lower, rows, x, *state.inner["z"], **options)
        y, lam, _, broken = augmented_lagrangian(Tilted.of(lower, upper, 1 / c), rows, x, *state.inner["y"], **options)

        def value(x: PyTree) -> Scalar:
            lagrangians = lower(x, y) + jnp.vdot(lam, rows(x, y)) - lower(x, z) - jnp.vdot(mu, rows(x, z))
            return upper(x, y) + c * lagrangians

        penalised, gradient = slope = jax.value_and_grad(value)(x)
        stationarity = residual(x, gradient, problem.project_upper)

        loss, upward = jax.value_and_grad(upper, argnums=1)(x, y)
        steep = derivatives.norm(upward)
        settled = stationarity / jnp.maximum(steep, 1e-30)
        new = self.after(problem, state, key, slope, y, {"y": (y, lam), "z": (z, mu)}, settled)
        lagrangian = lambda z: lower(x, z) + jnp.vdot(mu, rows(x, z))  # noqa: E731
        inner = derivatives.norm(jax.grad(lagrangian)(z)) if lower.project is None else z_broken
        said = {"lower_residual": inner, "gap": (penalised - loss) / c, "violation": jnp.maximum(broken, z_broken)}
        said |= {"upper_loss": loss, "hypergradient_norm": stationarity, "penalty": c, "slope": steep}
        return dataclasses.replace(new, lam=mu), report(new.path, **said)
