"""What a run returns."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any

__all__ = ["History", "Result", "Solution"]


class Result(enum.IntEnum):
    """How a run ended. The values are the codes that a solver's `status` returns inside the compiled loop."""

    MAX_STEPS = 0
    CONVERGED = 1
    PENALTY_LIMITED = 2
    DIVERGED = 3
    STOPPED = 4
    INTERRUPTED = 5
    INFEASIBLE = 6
    LOWER_LEVEL = 7

    @property
    def sentence(self) -> str:
        """What it means."""
        return _SENTENCES[self]


_SENTENCES = {
    Result.MAX_STEPS: "took all its steps; no tolerance was met",
    Result.CONVERGED: "met the tolerance",
    Result.PENALTY_LIMITED: "stopped improving at the penalty's own bias: raise the penalty, or extrapolate in it",
    Result.DIVERGED: "met a NaN or an infinity; x and y are the last finite iterate",
    Result.STOPPED: "was stopped by a callback",
    Result.INTERRUPTED: "was interrupted from the keyboard; x and y are where it stood",
    Result.INFEASIBLE: "ended where the lower level's constraints are not met",
    Result.LOWER_LEVEL: "stopped moving at a y that does not minimise the lower level",
}


class History(Mapping[str, np.ndarray]):
    """Arrays by name, each with the steps at which its entries were taken.

    `history["upper_loss"]` is an array with one entry per recorded step, `history.steps["upper_loss"]` those steps. Step
    k's metrics are those of the iterate *before* its update; the user's metrics are taken after the named number of steps.
    """

    def __init__(self, values: dict[str, np.ndarray] | None = None, steps: dict[str, np.ndarray] | None = None) -> None:
        self._values = {name: [np.asarray(v)] for name, v in (values or {}).items()}
        self._steps = {name: [np.asarray(s)] for name, s in (steps or {}).items()}

    def extend(self, name: str, steps: np.ndarray, values: np.ndarray) -> None:
        """Append entries."""
        self._values.setdefault(name, []).append(np.asarray(values))
        self._steps.setdefault(name, []).append(np.asarray(steps))

    def _joined(self, store: dict[str, list[np.ndarray]], name: str) -> np.ndarray:
        parts = store[name]
        if len(parts) > 1:
            store[name] = parts = [np.concatenate(parts)]
        return parts[0]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._values:
            raise KeyError(f"the history has no {name!r}; it has {', '.join(self._values) or 'nothing'}")
        return self._joined(self._values, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """The steps of each array's entries."""
        return {name: self._joined(self._steps, name) for name in self._steps}

    def last(self) -> dict[str, Any]:
        """The newest entry of each."""
        return {name: parts[-1][-1] for name, parts in self._values.items() if len(parts[-1])}

    def last_step(self, name: str) -> int:
        """The step of an array's newest entry, -1 where there is none."""
        parts = self._steps.get(name)
        return int(parts[-1][-1]) if parts and len(parts[-1]) else -1

    def to_frame(self) -> Any:
        """A pandas data frame, one row a step, empty where a quantity was not recorded (needs pandas)."""
        import pandas as pd

        series = {name: pd.Series(list(self[name]), index=self.steps[name]) for name in self}
        return pd.DataFrame(series).rename_axis("step")

    def __repr__(self) -> str:
        return f"History({', '.join(f'{name}[{len(self[name])}]' for name in self)})"


@dataclasses.dataclass(frozen=True)
class Solution:
    """The end of a run.

    Attributes:
      x, y: the variables at the end; after a divergence the last finite ones.
      result: a `Result`.
      history: a `History`, arrays by name.
      state: the solver's whole state, to go on from.
      steps: outer steps taken in total, those before a resume included.
      seconds: wall-clock time of this call, compilation included.
      solver: the solver used.
      reason: why that solver was chosen, where it was, and what went wrong, where something did.
    """

    x: PyTree
    y: PyTree
    result: Result
    history: History
    state: Any
    steps: int
    seconds: float
    solver: Any
    reason: str = ""

    def plot(self, names: Any = None, path: Any = None) -> Any:
        """Draw the history against the steps; returns the matplotlib figure (and saves it where a path is given)."""
        from bilevel.plot import plot_history

        return plot_history(self.history, names=names, path=path, title=type(self.solver).__name__)

    def __repr__(self) -> str:
        sizes = " and ".join(
            f"{name} ({_size(tree)})" for name, tree in (("x", self.x), ("y", self.y)) if jax.tree.leaves(tree)
        )
        lines = [f"{self.result.name}: {type(self.solver).__name__} {self.result.sentence}."]
        lines.append(f"  {self.steps} steps in {self.seconds:.2f} s; variables {sizes}.")
        shown = [f"{name} = {value:.6g}" for name, value in self.history.last().items() if np.ndim(value) == 0]
        if shown:
            lines.append("  Last: " + ", ".join(shown) + ".")
        if self.reason:
            lines.append(f"  {self.reason}")
        return "\n".join(lines)


def _size(tree: PyTree) -> str:
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
    return f"{count} number{'s' if count != 1 else ''}"
