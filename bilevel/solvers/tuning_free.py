"""Bilevel methods without step sizes.

Each variable moves by its direction over the norm of all its directions so far.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters, state
from bilevel.derivatives import norm
from bilevel.keys import Draw, StepKey
from bilevel.optimizers import Move, check_count
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers._directions import Joint, Point
from bilevel.solvers.single_loop import SingleLoop, measured
from bilevel.typing import Metrics, PyTree

__all__ = ["DTFBO", "STFBO"]


@state
class TuningFreeState:
    """The variables, and the accumulated squared norms alpha^2 (of D_x), beta^2 (of D_y) and gamma^2 (of D_v)."""

    x: PyTree
    y: PyTree
    v: PyTree
    alpha2: jax.Array
    beta2: jax.Array
    gamma2: jax.Array


def _start(solver: Any, problem: Problem, x: PyTree, y: PyTree) -> TuningFreeState:
    refuse(solver, problem, x, honours=("project_upper",), instead="solvers.AID or one of the Hessian-free solvers")
    squares = [jnp.square(jnp.asarray(solver.start, jnp.result_type(*jax.tree.leaves(tree)))) for tree in (x, y, y)]
    return TuningFreeState(x, y, optax.tree.zeros_like(y), *squares)


def _checked(solver: Any) -> None:
    if isinstance(solver.start, float) and not solver.start > 0:
        raise ValueError(
            f"{type(solver).__name__}(start={solver.start!r}): the accumulators start at a positive number."
        )


def _stepped(problem: Problem, x: PyTree, rate: jax.Array, direction: PyTree) -> PyTree:
    return Move(rate, problem.project_upper)(direction, (optax.EmptyState(),) * 2, x)[0]


@hyperparameters
class STFBO:
    """S-TFBO, single loop: SOBA's directions with AdaGrad-norm steps; nothing to tune.

        beta^2 += |D_y|^2,   gamma^2 += |D_v|^2,   alpha^2 += |D_x|^2,   phi = max(beta, gamma)
        y <- y - D_y / beta,   v <- v - D_v / phi,   x <- project_upper(x - D_x / (alpha phi))

    Attributes:
      start: where all three accumulators start. It bounds the first step: |D| / start. The paper leaves it open (any
        positive number); it matters little, since the first direction is added before the first step.

    Metrics: as `SingleLoop`. Cost of SOBA. The theory is deterministic, O(log^4(1/eps) / eps); batches may be given.

    Reference: Yang et al., "Tuning-Free Bilevel Optimization: New Algorithms and Convergence Analysis", ICLR 2025.
    """

    start: float = 1.0

    def __post_init__(self) -> None:
        _checked(self)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> TuningFreeState:
        """The state before the first step."""
        return _start(self, problem, x, y)

    def step(self, problem: Problem, state: TuningFreeState, key: StepKey) -> tuple[TuningFreeState, Metrics]:
        """One outer iteration."""
        at = Point(state.x, state.y, state.v)
        value, direction = Joint()(*problem.levels(key), at)

        beta2 = state.beta2 + norm(direction.y) ** 2
        gamma2 = state.gamma2 + norm(direction.v) ** 2
        alpha2 = state.alpha2 + norm(direction.x) ** 2
        phi = jnp.sqrt(jnp.maximum(beta2, gamma2))
        y = optax.tree.add_scale(at.y, -1 / jnp.sqrt(beta2), direction.y)
        v = optax.tree.add_scale(at.v, -1 / phi, direction.v)
        x = _stepped(problem, at.x, 1 / (jnp.sqrt(alpha2) * phi), direction.x)
        metrics = {"upper_loss": value, **measured(problem, at.x, direction)}
        return TuningFreeState(x, y, v, alpha2, beta2, gamma2), metrics

    status = SingleLoop.status


@hyperparameters
class DTFBO:
    """D-TFBO, double loop: `lower_steps` steps on y, `linear_steps` on v, one on x, all with AdaGrad-norm steps.

        beta^2 += |f_y|^2,   y <- y - f_y / beta                                  up to N times
        gamma^2 += |f_yy v - F_y|^2,   v <- v - (f_yy v - F_y) / gamma            up to M times
        alpha^2 += |D_x|^2,   x <- project_upper(x - D_x / alpha),   D_x = F_x - f_xy v

    Attributes:
      lower_steps, linear_steps: N and M.
      start: where the accumulators start (see `STFBO`).
      tol: an inner loop's steps stop moving its variable once the squared norm of its direction is at most this (the
        paper's 1/T); None: never, as the authors' code with its ten fixed steps.

    Metrics: as `SingleLoop`, the inner ones of the loops' last directions. Per step N gradients, M HVPs and 1 cross
    product of f, 1 gradient of F; each inner step on a fresh batch. Theory: O(1/eps) outer iterations, deterministic.

    Reference: Yang et al., "Tuning-Free Bilevel Optimization: New Algorithms and Convergence Analysis", ICLR 2025.
    """

    lower_steps: int = 10
    linear_steps: int = 10
    start: float = 1.0
    tol: float | None = None

    def __post_init__(self) -> None:
        _checked(self)
        counts = {"lower_steps": self.lower_steps, "linear_steps": self.linear_steps}
        check_count("DTFBO", "the number of steps is a positive integer", **counts)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> TuningFreeState:
        """The state before the first step."""
        return _start(self, problem, x, y)

    def step(self, problem: Problem, state: TuningFreeState, key: StepKey) -> tuple[TuningFreeState, Metrics]:
        """One outer iteration."""
        (upper, lower), x = problem.levels(key), state.x

        def descent(direction_of: Any) -> Any:
            def step(carry: Any, i: Any) -> Any:
                variable, square, _ = carry
                direction = direction_of(variable, i)
                length = norm(direction)
                move = 1.0 if self.tol is None else jnp.where(length**2 > self.tol, 1.0, 0.0).astype(length.dtype)
                square = square + move * length**2
                return (optax.tree.add_scale(variable, -move / jnp.sqrt(square), direction), square, length), None

            return step

        zero = jnp.zeros_like(state.beta2)
        lower_y = descent(lambda y, i: lower.redraw(i, self.lower_steps).gradient(x, y))
        (y, beta2, lower_norm), _ = jax.lax.scan(lower_y, (state.y, state.beta2, zero), jnp.arange(self.lower_steps))

        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        others = lower.stream(Draw.PRODUCTS)

        def linear(v: PyTree, i: Any) -> PyTree:
            level = others.redraw(i, self.linear_steps)
            return optax.tree.sub(derivatives.hvp(level, x, y, v), upper_y)

        (v, gamma2, linear_norm), _ = jax.lax.scan(
            descent(linear), (state.v, state.gamma2, zero), jnp.arange(self.linear_steps)
        )

        cross = derivatives.cross_product(lower.stream(Draw.CROSS), x, y, v)
        direction = optax.tree.sub(upper_x, cross)
        alpha2 = state.alpha2 + norm(direction) ** 2
        new = _stepped(problem, x, 1 / jnp.sqrt(alpha2), direction)
        metrics = {"upper_loss": value, **measured(problem, x, Point(direction, None, None))}
        metrics |= {"lower_residual": lower_norm, "linear_residual": linear_norm}
        return TuningFreeState(new, y, v, alpha2, beta2, gamma2), metrics

    status = SingleLoop.status
