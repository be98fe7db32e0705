"""Simple bilevel problems (x0=None) by a step rule of one's own: an alternation, and combined directions."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import constructor, hyperparameters, name_of, state
from bilevel.keys import StepKey
from bilevel.level import Level
from bilevel.optimizers import Move, check_count, check_optimizer
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import refuse
from bilevel.typing import Metrics, PyTree, Scalar

__all__ = ["Alternating", "Combined", "DynamicBarrier", "LossMultiplier", "PenaltyDescent", "WeightedSum"]


@state
class SharedState:
    """y, which both levels own, and what the method remembers of its steps."""

    x: PyTree
    y: PyTree
    memory: PyTree


@hyperparameters
class Alternating:
    """The lower level's steps and the upper level's in turn, on the y that both own, each with a step rule.

        y <- y + lower_optimizer(f_y(y))      `lower_steps` times, then
        y <- y + upper_optimizer(F_y(y))      `upper_steps` times

    A heuristic of practice: where it ends depends on the two step sizes, and is in general no solution of the bilevel
    problem. `BOME`, `DynamicBarrier` or `IterativeRegularization` are methods for that.

    Attributes:
      lower_optimizer: an optax rule or a step size for f.
      upper_optimizer: the same for F; None: the lower level's rule *and its memory*, as where one optimiser is called
        with either loss.
      lower_steps, upper_steps: of each in an iteration; every lower step draws a batch of its own, and so every upper.

    Metrics: `upper_loss`, `lower_loss`, and the norms of the two gradients, each at the iteration's last step of its
    level. Oracle calls: lower_steps f_y, upper_steps F_y.
    """

    lower_optimizer: float | optax.GradientTransformation
    upper_optimizer: float | optax.GradientTransformation | None = None
    lower_steps: int = 1
    upper_steps: int = 1

    def __post_init__(self) -> None:
        check_optimizer("Alternating", "lower_optimizer", self.lower_optimizer)
        if self.upper_optimizer is not None:
            check_optimizer("Alternating", "upper_optimizer", self.upper_optimizer)
        check_count("Alternating", lower_steps=self.lower_steps, upper_steps=self.upper_steps)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> SharedState:
        """The state before the first step."""
        _only_simple(self, problem, x)
        above = None if self.upper_optimizer is None else Move(self.upper_optimizer).init(y)
        return SharedState(x, y, (Move(self.lower_optimizer).init(y), above))

    def step(self, problem: Problem, state: SharedState, key: StepKey) -> tuple[SharedState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        project = lower.project
        y, (below, above) = state.y, state.memory

        def run(level: Level, move: Move, y: PyTree, memory: PyTree, steps: int) -> tuple[Any, ...]:
            for i in range(steps):
                drawn = level.redraw(i, steps) if steps > 1 else level
                value, gradient = jax.value_and_grad(drawn, argnums=1)(state.x, y)
                y, memory = move(gradient, memory, y)
            return y, memory, value, derivatives.norm(gradient)

        y, below, f, f_norm = run(lower, Move(self.lower_optimizer, project), y, below, self.lower_steps)
        if self.upper_optimizer is None:
            y, below, F, F_norm = run(upper, Move(self.lower_optimizer, project), y, below, self.upper_steps)
        else:
            y, above, F, F_norm = run(upper, Move(self.upper_optimizer, project), y, above, self.upper_steps)
        metrics = {"upper_loss": F, "lower_loss": f, "upper_gradient_norm": F_norm, "lower_gradient_norm": f_norm}
        return SharedState(state.x, y, (below, above)), metrics


class Combination(Protocol):
    """How the two gradients become one direction, a F_y + b f_y."""

    def init(self, dtype: Any) -> PyTree:
        """What it remembers, before the first step."""

    def weights(self, memory: PyTree, step: Any, F_y: PyTree, f_y: PyTree) -> tuple[Any, Any]:
        """The weights a of F_y and b of f_y."""

    def after(self, memory: PyTree, before: Scalar, now: Any) -> PyTree:
        """What it remembers after the step; `before` is F before the step and `now()` F after it, on the same batch."""


class _Memoryless:
    """A combination that remembers nothing."""

    def init(self, dtype: Any) -> None:
        return None

    def after(self, memory: None, before: Scalar, now: Any) -> None:
        return None


@hyperparameters
class _Fixed(_Memoryless):
    """a = weight, b = 1."""

    weight: float

    def weights(self, memory: None, step: Any, F_y: PyTree, f_y: PyTree) -> tuple[Any, Any]:
        return self.weight, 1.0


@hyperparameters
class _Growing(_Memoryless):
    """a = 1 / c, b = 1, with c = start (1 + k / period)^power."""

    start: float
    period: float
    power: float

    def weights(self, memory: None, step: Any, F_y: PyTree, f_y: PyTree) -> tuple[Any, Any]:
        return 1 / (self.start * (1 + step / self.period) ** self.power), 1.0


@hyperparameters
class _Barrier(_Memoryless):
    """a = 1, b = max((phi - <F_y, f_y>) / |f_y|^2, 0), phi = barrier |f_y|^2."""

    barrier: float
    cap: float

    def weights(self, memory: None, step: Any, F_y: PyTree, f_y: PyTree) -> tuple[Any, Any]:
        steep, along = optax.tree.norm(f_y, squared=True), derivatives.dot(F_y, f_y)
        share = along / jnp.where(steep > 0, steep, 1)
        return 1.0, jnp.where(steep > 0, jnp.clip(self.barrier - share, 0.0, self.cap), 0.0)


@hyperparameters
class _Multiplier:
    """a = w / (1 + w), b = 1 / (1 + w), w moved by Adam on how much F fell."""

    start: float
    rate: float
    decay: float
    slack: float
    step_size: float

    def _rule(self) -> optax.GradientTransformation:
        return optax.adamw(self.rate, weight_decay=self.decay)

    def init(self, dtype: Any) -> PyTree:
        w = jnp.asarray(self.start, dtype)
        return w, self._rule().init(w)

    def weights(self, memory: PyTree, step: Any, F_y: PyTree, f_y: PyTree) -> tuple[Any, Any]:
        w = jnp.maximum(memory[0], 0)
        return w / (1 + w), 1 / (1 + w)

    def after(self, memory: PyTree, before: Scalar, now: Any) -> PyTree:
        w, of_w = memory
        fallen = ((before - now()) / self.step_size - self.slack).astype(w.dtype)
        updates, of_w = self._rule().update(fallen, of_w, w)
        return jnp.maximum(w + updates, 0).astype(w.dtype), of_w


@hyperparameters
class Combined:
    """One step a step along a combination of both levels' gradients, by any step rule, on minibatches too.

        y <- y + optimizer(a F_y + b f_y)

    Made by its named forms, which say what a and b are: `WeightedSum`, `PenaltyDescent`, `DynamicBarrier`,
    `LossMultiplier`.

    Attributes:
      optimizer: an optax rule or a step size.
      combination: what gives a and b.

    Metrics: `upper_loss`, `lower_loss`, `upper_gradient_norm`, `lower_gradient_norm`, the weights `upper_weight` = a,
    `lower_weight` = b. Oracle calls: 1 gradient of each.
    """

    optimizer: float | optax.GradientTransformation
    combination: Any

    def __post_init__(self) -> None:
        check_optimizer("Combined", "optimizer", self.optimizer)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> SharedState:
        """The state before the first step."""
        _only_simple(self, problem, x)
        dtype = jnp.result_type(*jax.tree.leaves(y))
        return SharedState(x, y, (Move(self.optimizer).init(y), self.combination.init(dtype)))

    def step(self, problem: Problem, state: SharedState, key: StepKey) -> tuple[SharedState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        x, y, (memory, kept) = state.x, state.y, state.memory
        F, F_y = jax.value_and_grad(upper, argnums=1)(x, y)
        f, f_y = jax.value_and_grad(lower, argnums=1)(x, y)
        a, b = self.combination.weights(kept, jnp.asarray(key.step, F.dtype), F_y, f_y)
        direction = jax.tree.map(lambda u, v: (a * u + b * v).astype(u.dtype), F_y, f_y)
        new, memory = Move(self.optimizer, lower.project)(direction, memory, y)
        kept = self.combination.after(kept, F, lambda: upper(x, new))
        metrics = {
            "upper_loss": F,
            "lower_loss": f,
            "upper_gradient_norm": derivatives.norm(F_y),
            "lower_gradient_norm": derivatives.norm(f_y),
            "upper_weight": jnp.asarray(a, F.dtype),
            "lower_weight": jnp.asarray(b, F.dtype),
        }
        return SharedState(x, new, (memory, kept)), metrics


@constructor
def WeightedSum(optimizer: Any, weight: float = 1.0) -> Combined:
    """Descent on f + weight F: the plain sum, which solves no bilevel problem but is what others are held against."""
    _positive("WeightedSum", weight=weight)
    return Combined(optimizer, _Fixed(weight))


@constructor
def PenaltyDescent(optimizer: Any, start: float = 1.0, period: float = 100.0, power: float = 1.0) -> Combined:
    """V-PBGD of a simple bilevel problem by any step rule: descent on f + F / c, c = start (1 + k / period)^power.

    f's value function is a constant where there is no x, so the penalised gap f - v has the gradient of f. `VPBGD` is
    the method with step sizes from curvatures; this one goes on minibatches with Adam.

    Reference: Shen, Chen, "On Penalty-based Bilevel Gradient Descent Method", ICML 2023.
    """
    _positive("PenaltyDescent", start=start, period=period)
    if not power >= 0:
        raise ValueError(f"PenaltyDescent(power={power!r}): a penalty does not fall: give at least 0.")
    return Combined(optimizer, _Growing(start, period, power))


@constructor
def DynamicBarrier(optimizer: Any, barrier: float = 0.5, cap: float = 1e4) -> Combined:
    """The dynamic barrier by any step rule: descent on F that reduces f at least at the rate `barrier` |f_y|^2.

        y <- y + optimizer(F_y + lam f_y),      lam = clip(barrier - <F_y, f_y> / |f_y|^2, 0, cap)

    With a step size for the rule it is the publication's method for f without a known minimum. `BOME` estimates f's
    minimum by lower steps.

    Reference: Gong, Liu, Liu, "Bi-objective Trade-off with Dynamic Barrier Gradient Descent", NeurIPS 2021.
    """
    _positive("DynamicBarrier", barrier=barrier, cap=cap)
    return Combined(optimizer, _Barrier(barrier, cap))


@constructor
def LossMultiplier(
    optimizer: Any,
    rate: float = 0.3,
    decay: float = 0.01,
    slack: float = 0.003,
    step_size: float = 1e-3,
    start: float = 1.0,
) -> Combined:
    """EraseAnything++'s multiplier: both losses at once, F's share growing where F does not fall.

        y <- y + optimizer((w F_y + f_y) / (1 + w))
        d  = (F(before) - F(after)) / step_size - slack        on the batch of this step
        w <- max(w - AdamW(d), 0)                              of the learning rate `rate` and the weight decay `decay`

    One more evaluation of F a step. `step_size` is the rule's own; where w starts is not published.

    Reference: "EraseAnything++", arXiv 2603.00978.
    """
    _positive("LossMultiplier", rate=rate, step_size=step_size)
    return Combined(optimizer, _Multiplier(start, rate, decay, slack, step_size))


def _positive(owner: str, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"{owner}({name}={value!r}): a positive number is needed.")


def _only_simple(solver: Any, problem: Problem, x: PyTree) -> None:
    refuse(solver, problem, x, honours=("project_lower",), simple=True, instead="solvers.LVHBA")
    if jax.tree.leaves(x):
        raise ProblemError(
            f"{name_of(solver)} is for simple bilevel problems, where both levels own y: pass x0=None, or take "
            "solvers.BOME or solvers.VPBGD instead."
        )
