"""What is written down of a run, and when: history, the user's metrics, callback and checkpoints, the progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import _compiling
from bilevel.captures import Functions, taken
from bilevel.history import History
from bilevel.loop import Chunk
from bilevel.progress import Reporter, reporter
from bilevel.result import Result
from bilevel.solution import Best, Solution
from bilevel.typing import Metrics, PyTree, X, Y

if TYPE_CHECKING:
    from bilevel.checkpoint import Checkpoints

__all__ = ["Event"]

logger = logging.getLogger("bilevel")


@dataclasses.dataclass(frozen=True)
class Event(Generic[X, Y]):
    """What a callback sees.

    Attributes:
      step: outer steps taken.
      x, y: the variables now.
      state: the solver's state now.
      history: the history so far.
    """

    step: int
    x: X
    y: Y
    state: Any
    history: History


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a run of `steps` steps is to be looked at: every so many steps for each purpose, None where there is none.

    Attributes:
      steps: the run's steps.
      metrics, callback, checkpoint: steps between two of each.
      rest: the least seconds between two checkpoints.
    """

    steps: int
    metrics: int | None = None
    callback: int | None = None
    checkpoint: int | None = None
    rest: float = 0.0

    def next_stop(self, done: int) -> int:
        """The next step after which the loop is to be left."""
        wanted = (every for every in (self.metrics, self.callback, self.checkpoint) if every is not None)
        return min([self.steps, *(done - done % every + every for every in wanted)])


class Keeper:
    """Looks at one of the user's metrics whenever it is taken: the best point so far, and when to stop waiting.

    Args:
      keep: the metric's name, or `(name, min)` or `(name, max)`: which is better.
      patience: how many evaluations in a row may bring nothing better; None: any number.
      names: the metrics that there are.

    Raises:
      ValueError: the metric is not among them, or its name does not say which direction is better.
    """

    def __init__(self, keep: Any, patience: int | None, names: Sequence[str]) -> None:
        name, *direction = keep if isinstance(keep, (tuple, list)) else (keep,)
        known = ", ".join(map(repr, names)) or "no metrics"
        if not isinstance(name, str) or name not in names:
            raise ValueError(
                f"solve(keep_best={keep!r}): name one of the metrics that are given to solve ({known}): "
                'metrics={"valid acc": accuracy}, keep_best=("valid acc", max).'
            )
        ways = {min: -1, max: 1, "min": -1, "max": 1}
        if len(direction) > 1 or (direction and direction[0] not in ways):
            raise ValueError(
                f"solve(keep_best={keep!r}): the direction is min or max, as in keep_best=({name!r}, max)."
            )
        self.name, self.patience = name, patience
        self._sign = ways[direction[0]] if direction else _direction(name)

    def __repr__(self) -> str:
        return f"{'most' if self._sign > 0 else 'least'} {self.name}"

    def begin(self, x: Any, y: Any) -> Best:
        """Before anything was seen."""
        return Best(self.name, -self._sign * math.inf, -1, x, y)

    def look(self, run: Recorder) -> None:
        """Keep the point where the run stands if it is the best so far."""
        value = run.history.last()[self.name]
        if np.ndim(value) != 0:
            raise ValueError(
                f"solve(keep_best={self.name!r}): the metric has the shape {list(np.shape(value))}, and what is best "
                "is told by a number. Return a scalar, such as a mean."
            )
        if self._sign * float(value) > self._sign * run.best.value:  # type: ignore[union-attr]
            run.best = Best(self.name, float(value), run.done, *run.point)
        if self.patience is not None and run.result is Result.MAX_STEPS:
            steps = run.history.steps[self.name]
            waited = int((steps > run.best.step).sum())  # type: ignore[union-attr]
            if waited >= self.patience:
                run.result = Result.STOPPED
                run.why = (
                    f"Stopped at step {run.done}: {self.name!r} was not better than {run.best.value:.6g} "  # type: ignore[union-attr]
                    f"(step {run.best.step}) in {waited} evaluations."  # type: ignore[union-attr]
                )


def _direction(name: str) -> int:
    """1 where more of a quantity of this name is better, -1 where less is; an error where the name does not say."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    more = {"acc", "accuracy", "auc", "auroc", "f1", "score", "r2", "precision", "recall", "likelihood", "reward"}
    less = {"loss", "error", "err", "mse", "rmse", "mae", "nll", "perplexity", "regret", "distance", "cost", "gap"}
    turned = words & {"neg", "negative", "negated", "minus", "inverse", "brier"} or re.search(r"(^|\s|1)\s*-", name)
    if bool(words & more) == bool(words & less) or turned:
        raise ValueError(
            f"solve(keep_best={name!r}): say which is better, more of it or less: keep_best=({name!r}, max) or "
            f"keep_best=({name!r}, min)."
        )
    return 1 if words & more else -1


class Recorder:
    """A run as it stands, and all that is written down of it.

    Args:
      schedule: when.
      measures: the user's metrics.
      callback: called with an `Event`; something true ends the run.
      saver: where checkpoints go; None: nowhere.
      state: the solver's state before the first step.
      keeper: looks for the best point; None: nobody does.
      before: the run that this one goes on from: its steps and history; None: a new one.
      given: (x, y) of a state as the user gave them, in their dtypes.

    Attributes:
      state, done, history: where the run stands; they always belong together.
      result: how it stands: MAX_STEPS while it may go on.
      why: what went wrong, where something did.
      best: the best point so far, where there is a keeper.
    """

    def __init__(
        self,
        schedule: Schedule,
        measures: Measures,
        callback: Callable[[Event], Any] | None,
        saver: Checkpoints | None,
        state: Any,
        keeper: Keeper | None = None,
        before: Solution | None = None,
        given: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = lambda x, y: (x, y),
    ) -> None:
        self._given = given
        self.schedule, self._measures, self._callback, self._saver = schedule, measures, callback, saver
        self.state, self.done, self.history = state, 0, History()
        if before is not None:
            self.done, self.history = before.steps, before.history.copy()
        self._keeper = keeper
        self.best: Best | None = None if keeper is None else keeper.begin(*given(state.x, state.y))
        if before is not None and before.best is not None and keeper is not None and before.best.metric == keeper.name:
            self.best = before.best
        self.result, self.why = Result.MAX_STEPS, ""
        self._bar = Reporter()
        self._saved, self._saved_at = -1, time.perf_counter()
        self.unsaved = ""  # why the last checkpoint is none

    def resume(self) -> bool:
        """Go to the newest checkpoint; False where there is none. At step 0 the user's metrics are taken."""
        restored = None if self._saver is None else self._saver.restore(self.state)
        if restored is not None:
            self.done, self.state, self.history = restored
            if self._keeper is not None:
                found = self._saver.beside_of(self._beside())  # type: ignore[union-attr]
                if found is None:
                    logger.info("the checkpoint holds no best point by %r: it is looked for from here on", self._keeper)
                    self.best = self._keeper.begin(*self.point)
                else:
                    ((value, step, x, y),) = found.values()
                    self.best = Best(self._keeper.name, float(value), int(step), x, y)
            logger.info("resumed from step %d", self.done)
            if self.done > self.schedule.steps:
                raise ValueError(
                    f"solve(steps={self.schedule.steps}): the checkpoint is already at step {self.done}. Ask for more "
                    "steps, or for another directory."
                )
            self._saved = self.done
        self.history.metrics = self._measures.names
        if self.done == 0:
            self._look()
        return restored is not None

    @property
    def point(self) -> tuple[PyTree, PyTree]:
        """(x, y) where the run stands, in the user's dtypes."""
        return self._given(self.state.x, self.state.y)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.done == self.schedule.steps or self.result is not Result.MAX_STEPS

    @contextlib.contextmanager
    def showing(self, progress: bool | None) -> Iterator[None]:
        """Show a bar until the block ends; None: on a terminal only."""
        with reporter(self.schedule.steps, self.done, progress) as self._bar:
            yield

    def record(self, chunk: Chunk) -> None:
        """Write down a chunk, and do what is due after it."""
        taken_twice = [name for name in chunk.metrics if name in self._measures.names]
        if taken_twice:
            raise ValueError(
                f"metrics={{{taken_twice[0]!r}: ...}} is the name of what the solver itself reports, and the history "
                "would mix both: give it another name."
            )
        for name, values in chunk.metrics.items():
            self.history.extend(name, chunk.steps, values)
        self.state, self.done, self.result, self.why = chunk.state, chunk.done, chunk.result, chunk.why
        if self._due(self.schedule.metrics) or self.ended:
            self._look()
        self._bar.update(self.done, self.history)
        if self._callback is not None and self._due(self.schedule.callback):
            answer = self._callback(Event(self.done, *self.point, self.state, self.history))
            if answer is not None and _truth(answer) and self.result is Result.MAX_STEPS:
                self.result = Result.STOPPED
        rested = time.perf_counter() - self._saved_at >= self.schedule.rest
        if self.result is not Result.DIVERGED and (self.ended or (rested and self._due(self.schedule.checkpoint))):
            self.save()

    def _look(self) -> None:
        """Take the user's metrics, unless that was done, and keep what is best by one of them."""
        if self._measures(self) and self._keeper is not None:
            self._keeper.look(self)

    def _beside(self) -> Any:
        """What a checkpoint holds beside the state: the best point, under what it is the best by."""
        if self.best is None:
            return {}
        return {repr(self._keeper): (np.float64(self.best.value), np.int64(self.best.step), self.best.x, self.best.y)}

    def _due(self, every: int | None) -> bool:
        return every is not None and self.done % every == 0

    def save(self) -> None:
        """Leave a checkpoint of where the run stands. One that cannot be written does not end the run."""
        if self._saver is None:
            return
        from bilevel.checkpoint import CheckpointError

        try:
            self._saver.save(self.done, self.state, self.history, self._beside())
            self._saved, self.unsaved = self.done, ""
        except CheckpointError as error:
            logger.warning("%s The run goes on without it.", error)
            self.unsaved = f"{type(error).__name__}: {error}"
        self._saved_at = time.perf_counter()

    def interrupted(self) -> None:
        """Ctrl-C: the run ends where it stands; what is worse than that is said all the same."""
        if self.result is not Result.DIVERGED:
            self.result = Result.INTERRUPTED
        if self._saved != self.done:
            self.save()

    def note(self, measures: Mapping[str, Any]) -> None:
        """Write down numbers that belong to where the run stands."""
        for name, value in measures.items():
            self.history.extend(name, np.asarray([self.done]), np.asarray(value)[None])


def check_callback(callback: Any) -> None:
    """Raise a sentence where this is no function of one argument."""
    cure = "give a function of one argument, an Event (event.step, event.x, event.y, event.history)."
    if callback is None:
        return
    if isinstance(callback, type) or not callable(callback):
        raise TypeError(f"solve(callback={callback!r}): {cure}")
    try:
        inspect.signature(callback).bind(None)
    except TypeError:
        name = getattr(callback, "__name__", type(callback).__name__)
        raise TypeError(f"solve(callback={name}) does not take one argument: {cure}") from None
    except ValueError:  # a builtin
        return


def _truth(answer: Any) -> bool:
    try:
        return bool(answer)
    except Exception as error:  # of an array of several numbers, a table
        raise TypeError(
            f"The callback returned a {type(answer).__name__} that is neither true nor false: return True to end the "
            "run, and nothing to go on."
        ) from error


class Measures:
    """The user's metrics, evaluated in one compiled call.

    Args:
      metrics: by name a function of (x, y), or a pair `(function, data)`.

    Raises:
      TypeError: one is neither.
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        functions, self._data = [], {}
        if not isinstance(metrics, Mapping):
            raise TypeError(
                f"metrics is a {type(metrics).__name__}: give a dictionary of functions of (x, y) by name, such as "
                "metrics={'accuracy': accuracy}."
            )
        for name in metrics:
            if not isinstance(name, str):
                raise TypeError(f"metrics has {name!r} for a name: names are strings.")
        for name, entry in metrics.items():
            if isinstance(entry, tuple):
                if len(entry) != 2 or not callable(entry[0]):
                    raise TypeError(
                        f"metrics[{name!r}]: give a function of (x, y), or a pair (function, data) for "
                        "function(x, y, data)."
                    )
                entry, self._data[name] = entry[0], jax.tree.map(jnp.asarray, entry[1])
            elif not callable(entry):
                raise TypeError(
                    f"metrics[{name!r}] is a {type(entry).__name__}: give a function of (x, y), or a pair "
                    "(function, data)."
                )
            functions.append((name, entry))
        self._functions = dict(functions)
        self._taken: dict[str, Any] | None = None  # with what they capture when they are first evaluated

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._functions)

    def check(self, x: PyTree, y: PyTree) -> None:
        """Raise a sentence where a metric does not take (x, y) or (x, y, data), or returns no array (by shapes)."""
        for name, fn in self._functions.items():
            data = (self._data[name],) if name in self._data else ()
            called = "(x, y, data)" if data else "(x, y)"
            try:
                out = jax.eval_shape(fn, x, y, *data)
            except Exception as error:
                more = "" if data else "; a third argument comes with a pair: (function, data)"
                if isinstance(error, (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)):
                    more = (
                        "; it is traced, so write it in jnp, and leave float(), .item() and numpy to a callback, which "
                        "is given numbers"
                    )
                said = str(error).split("The error occurred while tracing")[0].strip()[:300]
                raise TypeError(
                    f"metrics[{name!r}] fails as a function of {called}{more}. {type(error).__name__}: {said}"
                ) from error
            if not jax.tree_util.all_leaves([out]):
                raise TypeError(f"metrics[{name!r}] returned {out!r}: a metric is one array, mostly a scalar.")

    def __bool__(self) -> bool:
        return bool(self._functions)

    def __call__(self, run: Recorder) -> bool:
        """Take them where the run stands, unless that was done; whether they were."""
        due = bool(self._functions) and run.history.last_step(next(iter(self._functions))) != run.done
        if due:
            (x, y), data = run.point, self._data
            if self._taken is None:
                args = {name: (x, y, data[name]) if name in data else (x, y) for name in self._functions}
                self._taken = {name: taken(fn, args[name]) for name, fn in self._functions.items()}
            run.note(_measure(Functions(self._taken), x, y, data))
        return due


@_compiling.jit
def _measure(functions: Functions, x: PyTree, y: PyTree, data: dict[str, Any]) -> Metrics:
    return {name: fn(x, y, data[name]) if name in data else fn(x, y) for name, fn in functions.by_name.items()}
