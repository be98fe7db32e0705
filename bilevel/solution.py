"""What a run returns."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import jax
import numpy as np

from bilevel._arguments import Named
from bilevel._module import name_of
from bilevel._pickling import storable
from bilevel.history import History
from bilevel.result import Result
from bilevel.typing import PyTree, X, Y

if TYPE_CHECKING:
    from bilevel.solvers.certificate import Certificate

__all__ = ["Best", "Solution"]


@dataclasses.dataclass(frozen=True)
class Best(Generic[X, Y]):
    """The best point that a run has seen, by one of the user's metrics: `solve(keep_best=...)`.

    Attributes:
      metric: the name of the metric.
      value: its value there.
      step: the outer steps taken there.
      x, y: the variables there.
    """

    metric: str
    value: float
    step: int
    x: X
    y: Y

    def __repr__(self) -> str:
        return f"Best({self.metric} = {self.value:.6g} at step {self.step})"


@storable
@dataclasses.dataclass(frozen=True)
class Solution(Named, Generic[X, Y]):
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
      certificate: what was checked of the end, by which measures, and what was not; see `Certificate`.
      best: with `keep_best` the best point of the run, else None; see `Best`.
      multipliers: those of the constraints, in the user's units and shaped like the constraints' outputs, by name
        (`constraint`, `equality`, `upper_constraint`, `upper_equality`), as far as the solver knows them.
    """

    x: X
    y: Y
    result: Result
    history: History
    state: Any
    steps: int
    seconds: float
    solver: Any
    reason: str = ""
    certificate: Certificate | None = None
    multipliers: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    best: Best[X, Y] | None = None

    def plot(self, names: str | Sequence[str | tuple[str, ...]] | None = None, path: Any = None) -> Any:
        """Draw the history against the steps; returns the matplotlib figure (and saves it where a path is given).

        Your own metrics share a panel, and noisy curves are drawn faint with their running mean: `plot.plot_history`.
        """
        from bilevel.plot import plot_history

        return plot_history(self.history, names=names, path=path, title=name_of(self.solver))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the solution, with state and solver, to a file that `Solution.load` reads; the folders are made.

        The file is a pickle. It is written under another name and renamed when it is whole.

        Raises:
          pickle.PicklingError: the solver holds a lambda or an inner function of yours; the message names it.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"Solution.save({path!r}): give the path of a file, such as 'runs/cleaning.solution'.")
        file = Path(path).expanduser()
        if file.is_dir():
            raise IsADirectoryError(f"Solution.save({str(path)!r}) is a directory: give the path of a file in it.")
        content = pickle.dumps(self)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part{os.getpid()}")
        part.write_bytes(content)
        part.replace(file)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Solution[Any, Any]:
        """A solution that `save` has written. Reading a pickle can run code: load your own files only."""
        file = Path(path).expanduser()
        if file.is_dir():
            raise ValueError(f"Solution.load({str(path)!r}): that is a directory, and Solution.save writes a file.")
        if not file.exists():
            raise FileNotFoundError(f"Solution.load({str(path)!r}): there is no such file; Solution.save writes one.")
        try:
            found = pickle.loads(file.read_bytes())
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError) as error:
            raise ValueError(f"{str(file)!r} is no whole file of Solution.save: {error}.") from error
        if not isinstance(found, Solution):
            raise ValueError(f"{str(file)!r} holds a {type(found).__name__}, and no Solution.")
        return found

    def __repr__(self) -> str:
        variables = {name: tree for name, tree in (("x", self.x), ("y", self.y)) if jax.tree.leaves(tree)}
        sizes = " and ".join(f"{name} ({_size(tree)})" for name, tree in variables.items())
        lines = [f"{self.result.name}: {name_of(self.solver)} {self.result.sentence}."]
        lines.append(f"  {self.steps} steps in {self.seconds:.2f} s; variables {sizes}.")
        shown = [f"{name} = {value:.6g}" for name, value in self.history.last().items() if np.ndim(value) == 0]
        if shown:
            lines.append("  Last: " + ", ".join(shown) + ".")
        if self.best is not None:
            lines.append(
                f"  Best: {self.best.metric} = {self.best.value:.6g} at step {self.best.step} (solution.best)."
            )
        if self.reason:
            lines.append(f"  {self.reason}")
        return "\n".join(lines)


def _size(tree: PyTree) -> str:
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
    return f"{count} number{'s' if count != 1 else ''}"
