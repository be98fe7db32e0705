"""Single-loop methods: one batch of each level moves x, y and the linear system's v together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import constructor, hyperparameters, state
from bilevel.derivatives import norm
from bilevel.keys import StepKey
from bilevel.optimizers import Move, check_optimizer, residual
from bilevel.problem import Problem
from bilevel.solvers._base import refuse, within
from bilevel.solvers._directions import Joint, Point, Series
from bilevel.solvers._variance_reduction import PAGE, SAGA, SARAH, STORM, Momentum, Plain, decayed, storm
from bilevel.typing import Metrics, PyTree

__all__ = [
    "FSLA", "MASOBA", "MRBO", "PAGE", "SABA", "SAGA", "SARAH", "SOBA", "SPABA", "SRBA", "STORM", "SUSTAIN", "AdamSOBA",
    "Joint", "Momentum", "Series", "SingleLoop",
]  # fmt: skip


@state
class SingleLoopState:
    """The variables; the step rules' memories; the variance reduction's memory.

    Attributes:
      x, y: the upper and the lower variable.
      v: the linear system's variable, near f_yy^{-1} F_y (None where the directions solve the system from scratch).
      steps: the memories of the three step rules.
      memory: what the variance reduction keeps.
    """

    x: PyTree
    y: PyTree
    v: PyTree
    steps: Point
    memory: PyTree


@hyperparameters
class SingleLoop:
    """Local directions, a variance-reduction rule, a step rule for each variable.

        (D_x, D_y, D_v) = reduction(directions(B_t))
        y <- y - a_t D_y,    v <- v - a_t D_v,    x <- project_upper(x - b_t D_x)

    all at the old point. With the default directions D_y = f_y, D_v = f_yy v - F_y and D_x = F_x - f_xy v (v is minus
    that of SOBA's paper): a fixed point of the expected directions is f_y = 0, v = f_yy^{-1} F_y and a zero of the
    hypergradient, exactly.

    Attributes:
      lower_optimizer, upper_optimizer: optax rules or step sizes a and b.
      linear_optimizer: the rule of v; None: `lower_optimizer`.
      reduction: `Plain()`, `Momentum`, `SAGA`, `STORM`, `SARAH` or `PAGE`.
      directions: `Joint()` or `Series(...)`.
      lower_decay, upper_decay: exponents e of a_t = a / (t + 1)^e and b_t; with an optax rule its updates are scaled
        so. None: constant.

    Metrics: `upper_loss` on the batch; `hypergradient_norm`, `lower_residual` and `linear_residual`, the norms of D_x,
    D_y and D_v as they were taken (noisy where the batches are). With a tolerance a run has converged when all are
    within it.

    Assumes f(x, .) strongly convex (v's iteration contracts) and a below 2/L. Refuses projections of the lower level,
    proxes and constraints.
    """

    lower_optimizer: float | optax.GradientTransformation = 0.1
    upper_optimizer: float | optax.GradientTransformation = 0.1
    linear_optimizer: float | optax.GradientTransformation | None = None
    reduction: Any = Plain()
    directions: Any = Joint()
    lower_decay: float | None = None
    upper_decay: float | None = None

    def __post_init__(self) -> None:
        check_optimizer("SingleLoop", "lower_optimizer", self.lower_optimizer)
        check_optimizer("SingleLoop", "upper_optimizer", self.upper_optimizer)
        if self.linear_optimizer is not None:
            check_optimizer("SingleLoop", "linear_optimizer", self.linear_optimizer)

    def _moves(self, problem: Problem) -> Point:
        """How x, y and v move."""
        linear = self.lower_optimizer if self.linear_optimizer is None else self.linear_optimizer
        return Point(Move(self.upper_optimizer, problem.project_upper), Move(self.lower_optimizer), Move(linear))

    def table_bytes(self, problem: Problem, x: PyTree, y: PyTree) -> int:
        """Bytes that the variance reduction's tables would take, nothing being allocated."""
        return self.reduction.table_bytes(problem, x, y) if hasattr(self.reduction, "table_bytes") else 0

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> SingleLoopState:
        """The state before the first step."""
        refuse(self, problem, x, honours=("project_upper",), instead="solvers.AID or one of the Hessian-free solvers")
        at, moves = Point(x, y, self.directions.start(y)), self._moves(problem)
        steps = Point(moves.x.init(x), moves.y.init(y), None if at.v is None else moves.v.init(at.v))
        return SingleLoopState(x, y, at.v, steps, self.reduction.init(problem, self.directions, at))

    def step(self, problem: Problem, state: SingleLoopState, key: StepKey) -> tuple[SingleLoopState, Metrics]:
        """One outer iteration."""
        at = Point(state.x, state.y, state.v)
        value, direction, memory = self.reduction(problem, self.directions, at, state.memory, key)

        move, steps = self._moves(problem), state.steps
        a, b = scales((self.lower_decay, self.upper_decay), key)
        x, of_x = move.x(direction.x, steps.x, at.x, b)
        y, of_y = move.y(direction.y, steps.y, at.y, a)
        v, of_v = (None, None) if at.v is None else move.v(direction.v, steps.v, at.v, a)
        metrics = {"upper_loss": value, **measured(problem, at.x, direction)}
        return SingleLoopState(x, y, v, Point(of_x, of_y, of_v), memory), metrics

    def status(self, state: SingleLoopState, metrics: Metrics, tol: Any) -> jax.Array:
        """CONVERGED where the three directions are within the tolerance."""
        return within(tol, metrics, "hypergradient_norm", "lower_residual", "linear_residual")


def scales(decays: tuple[Any, ...], key: StepKey) -> tuple[Any, ...]:
    """(t + 1)^-decay for each decay, None for a decay of None.

    All powers in one kernel: at small sizes kernels are what costs.
    """
    given = [decay for decay in decays if decay is not None]
    if not given:
        return decays
    values = iter(decayed(1.0, jnp.stack(given), key.step))
    return tuple(None if decay is None else next(values) for decay in decays)


def measured(problem: Problem, x: PyTree, direction: Point) -> Metrics:
    """The directions' norms; of D_x with a projection |x - project(x - D_x)|."""
    upper = residual(x, direction.x, problem.project_upper)
    metrics = {"hypergradient_norm": upper, "lower_residual": norm(direction.y)}
    return metrics if direction.v is None else metrics | {"linear_residual": norm(direction.v)}


@constructor
def SOBA(
    upper_optimizer: Any = 0.1, lower_optimizer: Any = 0.1, linear_optimizer: Any = None, decay: float | None = 0.5
) -> SingleLoop:
    """Plain SGD on the three directions, all steps decaying as t^-1/2 (`decay=None`: constant, for full batches).

    Per step: one joint linearisation of f with one product (1 gradient + 1 HVP + 1 cross product) and one gradient of
    F. Stalls at its noise floor with constant steps.

    Reference: Dagreou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms", NeurIPS 2022.
    """
    return SingleLoop(lower_optimizer, upper_optimizer, linear_optimizer, lower_decay=decay, upper_decay=decay)


@constructor
def MASOBA(
    upper_optimizer: Any = 0.1, lower_optimizer: Any = 0.1, linear_optimizer: Any = None, theta: float = 0.1
) -> SingleLoop:
    """SOBA with a moving average of the upper direction and constant steps.

    Steps are of the order of theta ~ 1/sqrt(total steps).

    Cost of SOBA; one more x of memory.

    Reference: Chen, Xiao, Balasubramanian, "Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed
    Smoothness Conditions", 2023.
    """
    return SingleLoop(lower_optimizer, upper_optimizer, linear_optimizer, Momentum(theta))


@constructor
def SABA(
    upper_optimizer: Any = 0.1, lower_optimizer: Any = 0.1, linear_optimizer: Any = None, max_table_bytes: int = 2**32
) -> SingleLoop:
    """SAGA on the five terms of SOBA's directions, constant steps: converges linearly where SOBA stalls.

    Levels with more than one batch must be `data.Minibatches(..., blocks=True)` with a size that divides the samples.
    Cost of SOBA and one row of the tables read and written; memory: see `SAGA` and `table_bytes`.

    Reference: Dagreou, Ablin, Vaiter, Moreau, NeurIPS 2022.
    """
    return SingleLoop(lower_optimizer, upper_optimizer, linear_optimizer, SAGA(max_table_bytes))


@constructor
def SRBA(
    upper_optimizer: Any = 0.1,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = None,
    period: int | None = None,
    period_fraction: float = 0.5,
) -> SingleLoop:
    """SARAH on SOBA's directions, constant steps: the accuracy of SABA without its tables.

    Per step two of SOBA's, and a pass over all data every `period` steps (default `period_fraction` (n + m) / batch).

    Reference: Dagreou, Moreau, Vaiter, Ablin, "A Lower Bound and a Near-Optimal Algorithm for Bilevel Empirical Risk
    Minimization", AISTATS 2024.
    """
    return SingleLoop(lower_optimizer, upper_optimizer, linear_optimizer, SARAH(period, period_fraction))


@constructor
def SPABA(
    upper_optimizer: Any = 0.1,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = None,
    probability: float | None = None,
) -> SingleLoop:
    """PAGE on SOBA's directions: SRBA whose restarts are drawn (default probability batch / (samples + batch)).

    The paper's clipping of v is not applied.

    Reference: Chu, Xu, Yao, Zhang, "SPABA: A Single-Loop and Probabilistic Stochastic Bilevel Algorithm Achieving
    Optimal Sample Complexity", ICML 2024.
    """
    return SingleLoop(lower_optimizer, upper_optimizer, linear_optimizer, PAGE(probability=probability))


@constructor
def AdamSOBA(upper_rate: float = 1e-2, lower_rate: float = 1e-2, linear_rate: float | None = None) -> SingleLoop:
    """SOBA's directions, each preconditioned by Adam (optax's defaults but for the rates).

    `linear_rate` None is the lower's. Not one paper's method: deep learning's step rule on SOBA's directions.
    """
    rule = optax.inject_hyperparams(optax.adam)
    linear = lower_rate if linear_rate is None else linear_rate
    return SingleLoop(rule(lower_rate), rule(upper_rate), rule(linear))


@constructor
def SUSTAIN(
    upper_optimizer: Any = 0.1, lower_optimizer: Any = 0.1, hvp_step: float = 0.1, hvp_steps: int = 10, eta: float = 0.5
) -> SingleLoop:
    """STORM on f_y and on a hypergradient by the randomised Neumann series; steps t^-1/3, weight eta t^-2/3.

    Per step two gradients of each level and (K - 1) HVPs on average, K = `hvp_steps`.

    Reference: Khanduri et al., "A Near-Optimal Algorithm for Stochastic Bilevel Optimization via Double-Momentum",
    NeurIPS 2021.
    """
    return SingleLoop(
        lower_optimizer, upper_optimizer, None, STORM(eta), Series(hvp_step, hvp_steps, True), 1 / 3, 1 / 3
    )


@constructor
def MRBO(
    upper_optimizer: Any = 0.1, lower_optimizer: Any = 0.1, hvp_step: float = 0.1, hvp_steps: int = 10, eta: float = 0.5
) -> SingleLoop:
    """STORM on f_y and on a hypergradient by the stochastic Neumann series; steps t^-1/3, weight eta t^-2/3.

    Per step two gradients of each level and 2 K HVPs, K = `hvp_steps`.

    Reference: Yang, Ji, Liang, "Provably Faster Algorithms for Bilevel Optimization", NeurIPS 2021.
    """
    return SingleLoop(lower_optimizer, upper_optimizer, None, STORM(eta), Series(hvp_step, hvp_steps), 1 / 3, 1 / 3)


@state
class FSLAState:
    """The variables, the step rules' memories, and the last point at which D_x was taken with the direction then."""

    x: PyTree
    y: PyTree
    v: PyTree
    steps: Point
    at: Point
    momentum: PyTree


@hyperparameters
class FSLA:
    """The fully single-loop algorithm: y, v and x in turn, each on a batch of its own, momentum on x.

        y <- y - a_t f_y(B_1),    v <- v - a_t (f_yy(B_2) v - F_y(B'_1))    at the new y
        m <- D_x(new; B_3, B'_2) + (1 - eta_t) (m - D_x(old; B_3, B'_2)),    x <- x - b_t m

    with D_x = F_x - f_xy v; "old" is where D_x was taken one step before.

    Attributes:
      lower_optimizer, upper_optimizer: optax rules or step sizes a and b.
      eta: eta_t = eta / (t + 1)^decay.
      decay: the exponent of a_t, b_t and eta_t.

    Metrics: as `SingleLoop`, each norm at the point where its direction is taken. Per step 1 gradient, 1 HVP and 2
    cross products of f and 3 gradients of F.

    Reference: Li, Gu, Huang, "A Fully Single Loop Algorithm for Bilevel Optimization without Hessian Inverse", AAAI
    2022.
    """

    lower_optimizer: float | optax.GradientTransformation = 0.1
    upper_optimizer: float | optax.GradientTransformation = 0.1
    eta: float = 0.5
    decay: float = 0.5

    def __post_init__(self) -> None:
        check_optimizer("FSLA", "lower_optimizer", self.lower_optimizer)
        check_optimizer("FSLA", "upper_optimizer", self.upper_optimizer)
        if isinstance(self.eta, float) and not 0 < self.eta <= 1:
            raise ValueError(f"FSLA(eta={self.eta!r}): the weight lies in (0, 1].")

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> FSLAState:
        """The state before the first step."""
        refuse(self, problem, x, honours=("project_upper",), instead="solvers.AID or one of the Hessian-free solvers")
        v, move_x, move_y = optax.tree.zeros_like(y), *self._moves(problem)
        steps = Point(move_x.init(x), move_y.init(y), move_y.init(v))
        return FSLAState(x, y, v, steps, Point(x, y, v), optax.tree.zeros_like(x))

    def _moves(self, problem: Problem) -> tuple[Move, Move]:
        return Move(self.upper_optimizer, problem.project_upper), Move(self.lower_optimizer)

    def step(self, problem: Problem, state: FSLAState, key: StepKey) -> tuple[FSLAState, Metrics]:
        """One outer iteration."""
        (upper, lower), (move_x, move_y) = problem.levels(key), self._moves(problem)
        (scale,) = scales((self.decay,), key)
        x = state.x

        lower_y = lower.redraw(0, 3).gradient(x, state.y)
        y, of_y = move_y(lower_y, state.steps.y, state.y, scale)

        hvp = derivatives.hvp(lower.redraw(1, 3), x, y, state.v)
        linear = optax.tree.sub(hvp, jax.grad(upper.redraw(0, 2), argnums=1)(x, y))
        v, of_v = move_y(linear, state.steps.v, state.v, scale)

        third, other = lower.redraw(2, 3), upper.redraw(1, 2)

        def upper_direction(at: Point) -> tuple[jax.Array, PyTree]:
            value, upper_x = jax.value_and_grad(other)(at.x, at.y)
            return value, optax.tree.sub(upper_x, derivatives.cross_product(third, at.x, at.y, at.v))

        at = Point(x, y, v)
        value, now = upper_direction(at)
        eta = jnp.where(key.step == 0, 1.0, decayed(self.eta, self.decay, key.step))
        momentum = storm(now, upper_direction(state.at)[1], state.momentum, eta)
        x, of_x = move_x(momentum, state.steps.x, x, scale)
        metrics = {"upper_loss": value, **measured(problem, state.x, Point(momentum, lower_y, linear))}
        return FSLAState(x, y, v, Point(of_x, of_y, of_v), at, momentum), metrics

    status = SingleLoop.status
