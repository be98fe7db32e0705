"""Stop before the solution degenerates: a rule on an eigenvalue's growth, and a callback that applies it in `solve`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from bilevel._arguments import explained_class
from bilevel.history import History
from bilevel.optimizers import check_count
from bilevel.recorder import Event
from bilevel.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Decision:
    """What an `EarlyStopping` rule decided.

    Attributes:
      epoch: the epoch to go back to.
      decided_at: the epoch of the evaluation at which the rule fired.
      index: the evaluation (0, 1, ...) that `epoch` is of.
      growth: the quotient of the two local averages that made it fire.
    """

    epoch: float
    decided_at: float
    index: int
    growth: float


@explained_class
@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """A rule on a sequence of eigenvalues lambda_0, lambda_1, ..., one every `every` epochs.

    The local average at evaluation c is a mean over `window` evaluations around it (fewer at the start),

        average(c) = mean of lambda_j for max(0, c - h) <= j <= c + h,    h = window // 2,

    known h evaluations later. The rule fires at the first evaluation i at which, with c = i - h and s = c - lag,

        average(c) / average(s) > ratio,    average(c) > floor,    epoch of s >= start,

    and says to go back to s. An even window is the mean of the last `window` evaluations, with c = i - window / 2.

    Attributes:
      window: evaluations in a local average.
      lag: evaluations between the averages that are compared.
      ratio: the growth that is too much.
      start: the first epoch that may be gone back to.
      every: epochs between two evaluations, where `decide` is given no epochs.
      floor: an average at or below it never fires: where curvature is tiny, its growth means nothing.
      patience: so many evaluations in a row must meet the condition; the first of them says where to go back to.

    Presets: `EarlyStopping.paper()` and `EarlyStopping.code()`, which differ.

    Reference: Zela et al., "Understanding and Robustifying Differentiable Architecture Search", ICLR 2020.
    """

    window: int = 5
    lag: int = 5
    ratio: float = 4 / 3
    start: float = 0
    every: float = 1
    floor: float = 0.0
    patience: int = 1

    def __post_init__(self) -> None:
        counts = {"window": self.window, "lag": self.lag, "patience": self.patience}
        check_count("EarlyStopping", "a positive number of evaluations is needed", **counts)
        if not self.ratio > 1:
            raise ValueError(
                f"EarlyStopping(ratio={self.ratio!r}): the ratio is new over old, above 1 (the paper writes old over "
                "new < 0.75: that is ratio=4/3)."
            )
        if np.isnan(self.floor) or np.isnan(self.start):
            raise ValueError(f"EarlyStopping(start={self.start!r}, floor={self.floor!r}): both are numbers.")
        if not self.every > 0:
            raise ValueError(f"EarlyStopping(every={self.every!r}): the epochs between two evaluations are positive.")

    @classmethod
    def paper(cls, **changes: Any) -> EarlyStopping:
        """The paper's rule: an evaluation an epoch, averages over 5, compared 5 apart; stop where old / new < 0.75."""
        return cls(**{**dict(window=5, lag=5, ratio=1 / 0.75, start=0, every=1, floor=-np.inf), **changes})

    @classmethod
    def code(cls, **changes: Any) -> EarlyStopping:
        """What the authors' code does: an evaluation every 2 epochs, averages over 5, compared 4 apart (8 epochs).

        It stops where new / old > 1.3, not before epoch 10. Their runs of 50 epochs never stop in the last one:
        `decide(..., total=50)`.
        """
        return cls(**{**dict(window=5, lag=4, ratio=1.3, start=10, every=2, floor=-np.inf), **changes})

    @property
    def depth(self) -> int:
        """How many evaluations before the one that fires the stop can lie."""
        return self.window // 2 + self.lag + self.patience - 1

    def averages(self, eigenvalues: Sequence[float] | np.ndarray) -> np.ndarray:
        """The local averages, by the evaluation i at which each becomes known; NaN before the first.

        What is no number (an eigenvalue that did not come out) is no part of an average.
        """
        values = np.asarray(eigenvalues, float)
        first = -(-self.window // 2)  # half a window, rounded up, is enough at the start
        windows = [values[max(0, n - self.window) : n] for n in range(1, len(values) + 1)]
        known = [window[np.isfinite(window)] for window in windows]
        found = [part.mean() if n >= first and part.size else np.nan for n, part in enumerate(known, 1)]
        return np.asarray(found, float)

    def decide(
        self,
        eigenvalues: Sequence[float] | np.ndarray,
        epochs: Sequence[float] | np.ndarray | None = None,
        total: float | None = None,
    ) -> Decision | None:
        """The rule's first decision on a sequence, None where it does not fire.

        A longer sequence with the same beginning gives the same decision, so it may be asked after every evaluation.

        Args:
          eigenvalues: one per evaluation, oldest first; any list or array.
          epochs: the epochs of the evaluations, increasing; None: 0, every, 2 every, ..., at most total - 1.
          total: the run's epochs; an evaluation in the last one (epoch total - 1 or later) never decides. None: all
            may.
        """
        values = np.asarray(eigenvalues, float)
        if values.ndim != 1:
            raise ValueError(
                "EarlyStopping.decide takes a list of numbers, one per evaluation, not an array of shape "
                f"{list(values.shape)}."
            )
        if epochs is None:
            when = self.every * np.arange(len(values))
            when = when if total is None else np.minimum(when, total - 1)
        else:
            when = np.asarray(epochs)
        if when.shape != values.shape:
            raise ValueError(
                f"EarlyStopping.decide was given {len(values)} eigenvalues and {len(when)} epochs: one epoch per "
                "eigenvalue."
            )
        averages = self.averages(values)
        # Epochs are quotients of steps: equal but for rounding.
        last = np.inf if total is None else total - 1 - 1e-9 * max(1.0, abs(total))
        streak = 0
        for i in range(len(values)):
            old, stop = i - self.lag, i - self.window // 2 - self.lag
            fires = False
            if stop >= 0 and when[stop] >= self.start and when[i] < last:
                growth = _quotient(averages[i], averages[old])
                fires = growth > self.ratio and averages[i] > self.floor
            streak = streak + 1 if fires else 0
            if streak == self.patience:
                index = stop - self.patience + 1
                return Decision(when[index].item(), when[i].item(), index, growth)
        return None


def _quotient(new: float, old: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(new) / np.float64(old))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The run at one evaluation: outer steps taken, epoch, the variables, and the solver's whole state."""

    step: int
    epoch: float
    x: PyTree
    y: PyTree
    state: Any


@explained_class
class Monitor:
    """A callback of `solve` that ends the run where an `EarlyStopping` rule fires, and has the variables to go back to.

        monitor = runs.Monitor(EarlyStopping.code(), steps_per_epoch=100)
        solution = solve(problem, x0, y0, solver, steps=5000,
                         metrics={"eigenvalue": (dominant_eigenvalue(validation_loss), batch)}, metrics_every=200,
                         callback=monitor)
        x = monitor.stopped.x if monitor.stopped else solution.x

    It looks at every new value of the metric (give `callback_every` only as a divisor of `metrics_every`), the one
    before the first step included, whose epoch is 0.

    Args:
      rule: when to stop.
      steps_per_epoch: outer steps in what the rule calls an epoch; an evaluation's epoch is its step divided by it.
      metric: the name of the metric that holds the eigenvalue.
      total: the run's epochs; the rule then does not fire in the last one.
      keep_state: keep y and the solver's state of the evaluations that can be gone back to (`rule.depth` and one of
        them) besides x. Turn it off where y is large and not needed.

    Attributes:
      decision: the rule's `Decision`, or None.
      stopped: the `Snapshot` to go back to, or None. After a resume from a checkpoint its variables can be from before
        the interruption and gone: an error says so. `runs.adaptive` keeps them on the disk.
    """

    def __init__(
        self,
        rule: EarlyStopping,
        *,
        steps_per_epoch: float = 1,
        metric: str = "eigenvalue",
        total: float | None = None,
        keep_state: bool = True,
    ) -> None:
        if not hasattr(rule, "decide"):
            raise TypeError(f"Monitor takes a rule such as EarlyStopping.code(), not {type(rule).__name__}.")
        if not steps_per_epoch > 0:
            raise ValueError(f"Monitor(steps_per_epoch={steps_per_epoch!r}): a positive number is needed.")
        self.rule, self.steps_per_epoch, self.metric, self.total = rule, steps_per_epoch, metric, total
        self.keep_state = keep_state
        self.decision: Decision | None = None
        self._kept: collections.deque[Snapshot] = collections.deque(maxlen=rule.depth + 1)

    def decide(self, history: History) -> Decision | None:
        """The rule's decision on a history."""
        if self.metric not in history:
            raise ValueError(
                f"Monitor looks at the metric {self.metric!r}, and the history has {', '.join(history) or 'nothing'}: "
                f"give solve metrics={{{self.metric!r}: (curvature.dominant_eigenvalue(F), batch)}}."
            )
        return self.rule.decide(history[self.metric], history.steps[self.metric] / self.steps_per_epoch, self.total)

    def step_of(self, decision: Decision, history: History) -> int:
        """The outer steps that had been taken at the evaluation to go back to."""
        return int(history.steps[self.metric][decision.index])

    def __call__(self, event: Event) -> bool:
        """Whether to end the run."""
        decision = self.decide(event.history)
        if event.history.last_step(self.metric) != event.step:
            return decision is not None
        y, state = (event.y, event.state) if self.keep_state else (None, None)
        self._kept.append(Snapshot(event.step, event.step / self.steps_per_epoch, event.x, y, state))
        self.decision = decision
        self._stop_step = None if decision is None else self.step_of(decision, event.history)
        return decision is not None

    @property
    def stopped(self) -> Snapshot | None:
        """The run at the evaluation to go back to; None where the rule has not fired."""
        if self.decision is None:
            return None
        for snapshot in self._kept:
            if snapshot.step == self._stop_step:
                return snapshot
        raise ValueError(
            f"Monitor: the rule goes back to step {self._stop_step}, which this process has not seen (the start, or a "
            "part of the run before an interruption). Take runs.adaptive, which keeps such points on the disk, or a "
            "rule with a later start."
        )
