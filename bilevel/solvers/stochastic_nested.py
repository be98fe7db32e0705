"""Nested methods on minibatches: a few lower steps, a stochastic linear solve, an upper step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import constructor, hyperparameters, state
from bilevel.hypergradients.stochastic import SAMA as AdaptiveIdentity
from bilevel.hypergradients.stochastic import StochasticImplicit
from bilevel.keys import StepKey
from bilevel.lower import GradientDescent
from bilevel.optimizers import Move, check_count, check_optimizer, rewound
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers._directions import Point, Series
from bilevel.solvers._variance_reduction import Recursion, full, period_of, recursive, refuse_endless
from bilevel.solvers.nested import HypergradientDescent
from bilevel.solvers.single_loop import measured
from bilevel.typing import Metrics, PyTree

__all__ = ["BSA", "SAMA", "TTSA", "VRBO", "AmIGO", "StocBiO"]


@constructor
def StocBiO(
    upper_optimizer: Any = 0.1,
    lower_optimizer: Any = 0.1,
    lower_steps: int = 10,
    hvp_step: float = 0.1,
    hvp_steps: int = 10,
) -> HypergradientDescent:
    """`lower_steps` SGD steps, a stochastic Neumann series of `hvp_steps` products, an upper step; constant steps.

    Per step `lower_steps` gradients, `hvp_steps` HVPs and 1 cross product of f, 1 gradient of F.

    Reference: Ji, Yang, Liang, "Bilevel Optimization: Convergence Analysis and Enhanced Design", ICML 2021. The steps
    are those of benchmark_bilevel.
    """
    return HypergradientDescent(
        StochasticImplicit(hvp_step, hvp_steps), GradientDescent(lower_optimizer, lower_steps), upper_optimizer
    )


@constructor
def AmIGO(
    upper_optimizer: Any = 0.1,
    lower_optimizer: Any = 0.1,
    lower_steps: int = 10,
    hvp_step: float = 0.1,
    hvp_steps: int = 10,
) -> HypergradientDescent:
    """`lower_steps` SGD steps on y and `hvp_steps` on the linear system, both from where they were; an upper step.

    All steps are constant.

    Per step as StocBiO. All steps on the linear system share one batch of the upper level, as in benchmark_bilevel.

    Reference: Arbel, Mairal, "Amortized Implicit Differentiation for Stochastic Bilevel Optimization", ICLR 2022.
    """
    estimator = StochasticImplicit(hvp_step, hvp_steps, warm_start=True)
    return HypergradientDescent(estimator, GradientDescent(lower_optimizer, lower_steps), upper_optimizer)


@functools.cache
def _decaying(size: float, exponent: float, inner: int = 1) -> optax.GradientTransformation:
    """SGD with size / (t + 1)^exponent, where t counts outer steps and the rule is called `inner` times in each."""
    return optax.sgd(lambda count: size / (count // inner + 1.0) ** exponent)


@constructor
def BSA(
    upper_step: float = 0.1, lower_step: float = 0.1, lower_steps: int = 10, hvp_step: float = 0.1, hvp_steps: int = 10
) -> HypergradientDescent:
    """`lower_steps` SGD steps, a randomised Neumann product, an upper step; upper and lower steps decay as t^-1/2.

    The paper raises the number of lower steps with t; here it is constant, as in benchmark_bilevel. The upper step
    follows the lower ones (benchmark_bilevel's order is the other way round).

    Reference: Ghadimi, Wang, "Approximation Methods for Bilevel Programming", 2018.
    """
    estimator = StochasticImplicit(hvp_step, hvp_steps, randomised=True)
    lower = GradientDescent(_decaying(lower_step, 0.5, lower_steps), lower_steps, schedules="run")
    return HypergradientDescent(estimator, lower, _decaying(upper_step, 0.5))


@constructor
def TTSA(
    upper_step: float = 0.1, lower_step: float = 0.1, hvp_step: float = 0.1, hvp_steps: int = 10
) -> HypergradientDescent:
    """One lower step (t^-2/5), a randomised Neumann product, one upper step (t^-3/5): two time scales in one loop.

    Reference: Hong, Wai, Wang, Yang, "A Two-Timescale Stochastic Algorithm Framework for Bilevel Optimization", SIAM J.
    Optim. 2023.
    """
    estimator = StochasticImplicit(hvp_step, hvp_steps, randomised=True)
    return HypergradientDescent(estimator, GradientDescent(_decaying(lower_step, 0.4), 1), _decaying(upper_step, 0.6))


@constructor
def SAMA(
    upper_optimizer: Any = 1e-3, lower_optimizer: Any = 1e-3, lower_steps: int = 1, radius: float | None = 1.0
) -> HypergradientDescent:
    """First derivatives only: the inverse Hessian taken for the derivative of the lower optimiser's update.

    The cross product is a finite difference. `lower_optimizer` is where the adaptation comes from: `optax.adam(1e-3)`
    and not a number is its use.

    Reference: Choe et al., "Making Scalable Meta Learning Practical", NeurIPS 2023.
    """
    return HypergradientDescent(
        AdaptiveIdentity(radius), GradientDescent(lower_optimizer, lower_steps), upper_optimizer
    )


@state
class VRBOState:
    """The variables, the step rules' memories (upper, lower), and the directions with the point they belong to: the
    one before the last lower step."""

    x: PyTree
    y: PyTree
    steps: tuple[PyTree, PyTree]
    direction: Point
    at: Point


@hyperparameters
class VRBO:
    """SPIDER in a double loop: full directions now and then, an upper step, N lower steps that carry both along.

        every q steps   (d_x, d_y) = full directions at (x, y);  else  (d_x, d_y) += D(x, y; B) - D(z_before; B)
        x' <- project_upper(x - b d_x)
        N times         (d_x, d_y) <- (d_x, d_y) + D(z; B) - D(z_before; B),   y <- y - a d_y

    with D the gradient in y and the hypergradient by a stochastic Neumann series, z the current (x', y) and z_before
    the point that the directions belong to, on the same batches. With full batches all directions are exact.

    The inner loop ends with a step of y, so that the directions belong to the point before it: the difference that
    brings them to (x, y) is taken before the next upper step. Without it each outer step would lose one, and with N = 1
    the iteration diverge.

    Attributes:
      upper_optimizer, lower_optimizer: optax rules or step sizes b and a.
      directions: the series.
      lower_steps: N; with more than one a schedule in `lower_optimizer` is over these, and begins anew with each loop.
      period: q; None: `period_fraction` (n + m) / batch.
      period_fraction: see `period`; benchmark_bilevel's default is 128, its published best 0.01 to 0.5.

    Metrics: as `SingleLoop`, of the directions after the inner loop. Per step N + 1 times two gradients of each level
    and 2 K HVPs: the dearest of the family.

    Reference: Yang, Ji, Liang, "Provably Faster Algorithms for Bilevel Optimization", NeurIPS 2021.
    """

    upper_optimizer: float | optax.GradientTransformation = 0.1
    lower_optimizer: float | optax.GradientTransformation = 0.1
    directions: Series = Series()
    lower_steps: int = 10
    period: int | None = None
    period_fraction: float = 0.5

    def __post_init__(self) -> None:
        check_optimizer("VRBO", "upper_optimizer", self.upper_optimizer)
        check_optimizer("VRBO", "lower_optimizer", self.lower_optimizer)
        check_count("VRBO", lower_steps=self.lower_steps, period=self.period)
        if isinstance(self.period_fraction, float) and not self.period_fraction > 0:
            raise ValueError(f"VRBO(period_fraction={self.period_fraction!r}): the fraction of an epoch is positive.")

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> VRBOState:
        """The state before the first step, which takes full directions."""
        refuse(self, problem, x, honours=("project_upper",), instead="solvers.AID or one of the Hessian-free solvers")
        refuse_endless("VRBO", problem)
        steps = Move(self.upper_optimizer).init(x), Move(self.lower_optimizer).init(y)
        start = Point(x, y, None)
        return VRBOState(x, y, steps, optax.tree.zeros_like(start), start)

    def step(self, problem: Problem, state: VRBOState, key: StepKey) -> tuple[VRBOState, Metrics]:
        """One outer iteration."""
        move_x, move_y = Move(self.upper_optimizer, problem.project_upper), Move(self.lower_optimizer)
        start = Point(state.x, state.y, None)
        upper, lower = problem.levels(key)
        last = Recursion(state.at, state.direction)
        direction = jax.lax.cond(
            key.step % period_of(problem, self.period, self.period_fraction) == 0,
            lambda: full(problem, self.directions, start, key)[1],
            lambda: recursive(problem, self.directions, start, last, key)[1],
        )
        x, upper_memory = move_x(direction.x, state.steps[0], start.x)

        def inner(carry: Any, i: Any) -> Any:
            before, at, direction, memory, _ = carry
            upper_i, lower_i = upper.redraw(i, self.lower_steps), lower.redraw(i, self.lower_steps)
            value, now = self.directions(upper_i, lower_i, at)
            _, then = self.directions(upper_i, lower_i, before)
            direction = jax.tree.map(lambda d, n, b: d + (n - b), direction, now, then)
            y, memory = move_y(direction.y, memory, at.y)
            return (at, Point(x, y, None), direction, memory, value), None

        value = jnp.zeros_like(jax.eval_shape(upper, start.x, start.y))
        # A schedule is over the inner loop, where there is one.
        memory = rewound(state.steps[1], start.y) if self.lower_steps > 1 else state.steps[1]
        carry = start, Point(x, start.y, None), direction, memory, value
        (before, at, direction, lower_memory, value), _ = jax.lax.scan(inner, carry, jnp.arange(self.lower_steps))
        metrics = {"upper_loss": value, **measured(problem, start.x, direction)}
        return VRBOState(at.x, at.y, (upper_memory, lower_memory), direction, before), metrics
