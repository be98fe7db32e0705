"""Lower solvers made of steps: an optax rule along the gradient of the lower loss, a number of times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives, optimizers
from bilevel._arguments import explained
from bilevel._module import hyperparameters, state
from bilevel._roots import with_roots
from bilevel.level import Level
from bilevel.lower.loops import LowerState, repeat, until, until_share
from bilevel.lower.newton import Newton
from bilevel.optimizers import Move, accepted, as_optimizer, check_count, is_rule, residual, rewound, withdraws
from bilevel.typing import PyTree, Scalar

__all__ = ["LBFGS", "GradientDescent", "MomentumSGD", "Relative", "Steps"]


class Steps:
    """A lower solver made of steps of an optax rule; a subclass has `steps` and `rule()`.

    Everything that takes such solvers takes a class of `init`, `advance`, `end` and `steps` (`loops.Kernel`) as well.
    """

    steps: int
    tol: float | None = None
    schedules: str | None = None

    def rule(self) -> optax.GradientTransformationExtraArgs:
        """The optax rule of a step."""
        raise NotImplementedError

    def step_size(self) -> Any:
        """The length of a step as a number, which a prox is scaled with."""
        raise ValueError(
            f"{type(self).__name__} with a prox_lower takes a plain step size as its optimizer: "
            "the prox is scaled with it."
        )

    def virtual(self) -> Steps:
        """The solver whose one step is differentiated in place of this one's (DARTS's virtual step)."""
        return self

    def differentiable(self, choosing: bool = False) -> Any:
        """The solver to differentiate through: the same steps, by a rule that has derivatives at a gradient of zero.

        Args:
          choosing: take rules that withdraw steps or search along a line as they are, their choices for constants (in
            forward mode alone).

        Raises:
          ValueError: its rule withdraws steps, or searches along a line, and is not to be `choosing`.
        """
        return _Differentiable(self, choosing) if type(self).advance is Steps.advance else self

    def looks(self, state: LowerState) -> bool:
        """Whether the rule looks at values of the loss, and not at gradients alone."""
        return optimizers.looks_at_values(self.rule(), state.memory, state.y)

    def init(self, y: PyTree) -> LowerState:
        """The start of a run: y with fresh optimiser moments."""
        return LowerState(y, self.rule().init(y))

    def begin(self, x: PyTree, state: LowerState) -> LowerState:
        """Where a run from `state` begins at this x: values that a rule remembers belong to the last run's x, and a
        schedule over the steps of a solve begins anew."""
        if self.looks(state):
            return self.init(state.y)
        counts_on = self.schedules == "run" or (self.schedules is None and self.steps == 1)
        return state if counts_on else LowerState(state.y, rewound(state.memory, state.y))

    def advance(self, level: Level, x: PyTree, state: LowerState) -> tuple[LowerState, Callable[[], Scalar]]:
        """One step on the batch that the level holds, and the residual before it."""
        y, extra, loss = state.y, {}, lambda y: level(x, y)
        if self.looks(state):
            # What a line search has left at y holds for this batch, and where no projection moved y since.
            left = () if level.random or level.nonsmooth else state.memory
            value, gradient = optimizers.value_and_gradient(loss, y, left)
            extra = {"value": value, "grad": gradient, "value_fn": loss}
        else:
            gradient = level.gradient(x, y)
        new = self.move(level, x, state, gradient, **extra)

        def before() -> Scalar:
            if level.prox is not None:
                return derivatives.norm(optax.tree.sub(y, new.y)) / self.step_size()
            return residual(y, gradient, level.project)

        return new, before

    def move(self, level: Level, x: PyTree, state: LowerState, gradient: PyTree, **extra: Any) -> LowerState:
        """The step along a given gradient: a function of it that can be differentiated."""
        new, memory = Move(self.rule(), level.project)(gradient, state.memory, state.y, **extra)
        if level.prox is not None:
            new = level.prox(x, new, self.step_size())
        return LowerState(new, memory)

    def end(self, state: LowerState) -> LowerState:
        """The point that the rule stands at: for rules that withdraw steps the accepted one."""
        return LowerState(accepted(state.memory, state.y)[0], state.memory)

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        if level.prox is not None:
            self.step_size()
        state = self.begin(x, state)
        if self.tol is not None:
            return until(self, level, x, state, self.tol)
        return self.end(repeat(self, level, x, state))


class _Differentiable(Steps):
    """A solver whose rule is `_roots.with_roots`, and otherwise the same."""

    def __init__(self, solver: Steps, choosing: bool = False) -> None:
        self.solver, self.steps, self.tol, self.schedules = solver, solver.steps, solver.tol, solver.schedules
        self.choosing = choosing

    def rule(self) -> optax.GradientTransformationExtraArgs:
        """The solver's."""
        rule = self.solver.rule()

        def update(gradient: PyTree, memory: PyTree, variable: PyTree = None, **extra: Any) -> Any:
            if withdraws(memory) or optimizers.searches(memory):
                return rule.update(gradient, memory, variable, **extra)
            value_fn = {name: extra.pop(name) for name in ("value_fn",) if name in extra}
            guarded = with_roots(lambda g, m, v, extra: rule.update(g, m, v, **extra, **value_fn))
            return guarded(gradient, memory, variable, extra)

        return optax.GradientTransformationExtraArgs(rule.init, update)

    def step_size(self) -> Any:
        """The solver's."""
        return self.solver.step_size()

    def begin(self, x: PyTree, state: LowerState) -> LowerState:
        """Where a run begins."""
        state = self.solver.begin(x, state)
        if not self.choosing and (withdraws(state.memory) or optimizers.searches(state.memory)):
            raise ValueError(
                "An unrolled estimator differentiates the lower level's step rule, and this one withdraws steps or "
                "searches along a line (optimizers.quasi_newton, optimizers.spectral, lower.LBFGS, optax.lbfgs): its "
                "choices have no derivative. Take hypergradients.Implicit (solvers.AID), or a plain rule such as 0.1 "
                "or optax.adam(1e-2) for the lower level."
            )
        return state


@hyperparameters
class GradientDescent(Steps):
    """`steps` steps of an optax rule on f(x, .), each on a fresh batch where the level's data are drawn.

        y <- project(y + update(f_y(x, y)))            with plain numbers: y <- project(y - optimizer f_y(x, y))

    With a `prox_lower` the rule must be a plain step size eta, and a step is y <- prox(x, y - eta f_y(x, y), eta).

    Attributes:
      optimizer: an optax rule (momentum, Adam, schedules, L-BFGS with its line search, ...) or a step size (SGD).
      steps: the number of steps; the maximum where `tol` is given.
      tol: stop once |f_y| <= tol (with a projection |y - project(y - f_y)|, with a prox the step's length over eta);
        the loop then cannot be differentiated in reverse, so unrolled estimators refuse it. It also ends after 40 steps
        without a smaller residual (the precision of the dtype is reached). None: exactly `steps`.
      start: `(x, y) -> y`, where each solve begins; None: at the incoming y (warm start). MAML starts at x.
      schedules: what the rule's schedules (`optax.cosine_decay_schedule(0.1, steps)`, `inject_hyperparams`, ...) count:
        the steps of each solve ("solve"), or those of the whole run ("run"), as one over 10,000 steps in pieces of 10.
        None: "solve", but for `steps=1`, where a schedule can only be over the run. Only their count begins anew at a
        warm start; momentum, and moments with the count of their bias correction, go on.

    One gradient per step (L-BFGS: one or more by its line search).
    """

    optimizer: float | optax.GradientTransformation = 0.1
    steps: int = 10
    tol: float | None = None
    start: Callable[[PyTree, PyTree], PyTree] | None = None
    schedules: str | None = None

    def __post_init__(self) -> None:
        optimizers.check_optimizer("GradientDescent", "optimizer", self.optimizer)
        _check_schedules("GradientDescent", self.schedules)
        check_count("GradientDescent", "the number of steps is a positive integer", steps=self.steps)
        if isinstance(self.tol, float) and not self.tol > 0:
            what = "the tolerance is positive, or None for a fixed number of steps."
            raise ValueError(f"GradientDescent(tol={self.tol!r}): {what}")

    def rule(self) -> optax.GradientTransformationExtraArgs:
        """`optimizer` as an optax rule."""
        return as_optimizer(self.optimizer)

    def step_size(self) -> Any:
        """`optimizer`, where it is a number."""
        return super().step_size() if is_rule(self.optimizer) else self.optimizer

    def begin(self, x: PyTree, state: LowerState) -> LowerState:
        """Where a run from `state` begins at this x: at `start(x, y)` with fresh moments, where it is given."""
        return super().begin(x, state) if self.start is None else self.init(self.start(x, state.y))


@hyperparameters
class MomentumSGD(Steps):
    """`steps` steps of gradient descent with clipping, weight decay and momentum, whose numbers are leaves.

        g <- clip(f_y(x, y)) + weight_decay y,    m <- momentum m + g,    y <- y - learning_rate m

    An optax rule is a closure, and another weight decay another program; here numbers are data, so that a sweep over
    `weight_decay` is a `vmap` and a regularisation that grows during a run (`runs.adaptive`) compiles once.

    Attributes:
      learning_rate: a number, or an optax schedule of the steps taken (static: another schedule is another program).
      clip: the norm that f_y is clipped to over all of y, before the weight decay is added; None: no clipping.
      steps: steps per call, each on a fresh batch where the level's data are drawn.
      schedules: what the schedule counts, the steps of each solve ("solve") or of the whole run ("run"); None: "run"
        for `steps=1`, else "solve".

    Defaults: the convolutional search of Liu, Simonyan, Yang, ICLR 2019 (whose rate falls to 0.001 by a cosine:
    `optax.cosine_decay_schedule(0.025, steps, 0.04)`).
    """

    learning_rate: float | Callable[[Any], Any] = 0.025
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float | None = 5.0
    steps: int = 1
    schedules: str | None = None

    def __post_init__(self) -> None:
        _check_schedules("MomentumSGD", self.schedules)
        check_count("MomentumSGD", "the number of steps is a positive integer", steps=self.steps)
        for name in ("learning_rate", "momentum", "weight_decay", "clip"):
            value, positive = getattr(self, name), name in ("learning_rate", "clip")
            if isinstance(value, float) and (value < 0 or (value == 0 and positive)):
                sign = "positive" if positive else "not negative"
                raise ValueError(f"MomentumSGD({name}={value!r}): the number is {sign}.")

    def rule(self) -> optax.GradientTransformationExtraArgs:
        """The three parts as an optax chain; with or without clipping its memory has one form."""
        clip = optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)  # type: ignore[arg-type]
        decay = optax.add_decayed_weights(self.weight_decay)
        return as_optimizer(optax.chain(clip, decay, optax.sgd(self.learning_rate, momentum=self.momentum)))

    def virtual(self) -> MomentumSGD:
        """One step of the rule without clipping: DARTS's virtual step."""
        return dataclasses.replace(self, clip=None, steps=1)


def _check_schedules(owner: str, given: Any) -> None:
    if given not in (None, "solve", "run"):
        raise ValueError(
            f"{owner}(schedules={given!r}): the step rule's schedules count the steps of each lower solve, 'solve', or "
            "those of the whole run, 'run'."
        )


@explained
def LBFGS(steps: int = 200, tol: float | None = 1e-6, memory_size: int = 10) -> GradientDescent:
    """L-BFGS (`optimizers.quasi_newton`) to a tolerance on |f_y|, without a step size: full batches, no projection."""
    check_count("LBFGS", "the most steps are a positive integer, and there is no step size to give", steps=steps)
    return GradientDescent(optimizers.quasi_newton(memory_size), steps, tol)


@state
class Reach:
    """What `Relative` remembers: its solver's memory, the |f_y| that its tolerance is a share of, the run's largest,
    and where the run began (None unless `careful`)."""

    memory: PyTree
    largest: jax.Array
    ever: jax.Array
    start: PyTree


@hyperparameters
class Relative:
    """A lower solver of steps with a tolerance that has no unit: |f_y| <= tol r.

    r is the |f_y| that a solve begins with, or a tenth of the last solve's r where that is larger. Far from the
    solution of the upper level lower solves are thus as exact as the way ahead is long, near it as exact as the dtype
    allows, and other units of f or y change nothing.

    Attributes:
      solver: with `steps` and a `tol`, such as `LBFGS()` or `GradientDescent(0.1, 1000, tol=1e-6)`.
      careful: a warm start that is none is seen: where f is lower at the y of the run's start and |f_y| a thousandth of
        that at the last y (a penalty e^x that x's last step raised, say), the solve begins there. And for up to
        256 unknowns, without a set, a prox or rows around y, a solve that ends above its tolerance (and above the
        rounding of the largest |f_y| of the run) is gone on with by `Newton`. Three gradients more a solve, and a
        copy of y. For full batches.
    """

    solver: Steps
    careful: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Steps) or self.solver.tol is None:
            raise ValueError(
                f"Relative({self.solver!r}): give a solver of steps with a tolerance, such as lower.LBFGS(tol=1e-6)."
            )

    @property
    def tol(self) -> Any:
        """The solver's."""
        return self.solver.tol

    @property
    def steps(self) -> int:
        """The solver's."""
        return self.solver.steps

    def init(self, y: PyTree) -> LowerState:
        """The start of a run."""
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(y)))
        start = y if self.careful else None
        return LowerState(y, Reach(self.solver.init(y).memory, zero, zero, start))

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        if level.prox is not None:
            self.solver.step_size()
        largest = state.memory.largest
        begun = self.solver.begin(x, LowerState(state.y, state.memory.memory))
        if state.memory.start is not None:
            begun = self._begun(level, x, begun, state.memory.start)
        end, reach = until_share(self.solver, level, x, begun, self.solver.tol, largest / 10)
        reach = jnp.asarray(reach, largest.dtype)
        ever = jnp.maximum(state.memory.ever, reach)
        reached = Reach(end.memory, reach, ever, state.memory.start)
        return LowerState(self._finished(level, x, end.y, reached), reached)

    def _begun(self, level: Level, x: PyTree, warm: LowerState, start: PyTree) -> LowerState:
        """The warm start, or a cold one where that is far lower."""
        cold = self.solver.begin(x, self.solver.init(start))
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), warm.y, cold.y)

        def looked(y: PyTree) -> tuple[Scalar, Scalar]:
            value, slope = jax.value_and_grad(level, argnums=1)(x, y)
            return value, derivatives.norm(slope)

        values, steep = jax.lax.map(looked, both)  # one after the other: networks side by side are slow
        lost = (values[1] < values[0]) & (1e3 * steep[1] < steep[0]) | ~jnp.isfinite(values[0])
        return jax.tree.map(lambda a, b: jnp.where(lost, b, a), warm, cold)

    def _finished(self, level: Level, x: PyTree, y: PyTree, reached: Reach) -> PyTree:
        """y, or where Newton's method leads from a y that is not there yet."""
        reach, ever = reached.largest, reached.ever
        rows = level.constraint is not None or level.equality is not None
        if not self.careful or optax.tree.size(y) > Newton.dense or level.nonsmooth or rows:
            return y
        precision = 4 * float(jnp.finfo(ever.dtype).eps)
        left = derivatives.norm(level.gradient(x, y))
        missed = left > jnp.maximum(self.tol * reach, precision * ever)  # no for a NaN
        newton = lambda: jax.lax.stop_gradient(Newton().minimum(level, x, y))  # noqa: E731
        return jax.lax.cond(missed, newton, lambda: y)
