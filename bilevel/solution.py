"""What a run returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic

import jax
import numpy as np

from bilevel.history import History
from bilevel.result import Result
from bilevel.typing import PyTree, X, Y

if TYPE_CHECKING:
    from bilevel.solvers.certificate import Certificate

__all__ = ["Solution"]


@dataclasses.dataclass(frozen=True)
class Solution(Generic[X, Y]):
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

    def plot(self, names: str | Sequence[str] | None = None, path: Any = None) -> Any:
        """Draw the history against the steps; returns the matplotlib figure (and saves it where a path is given)."""
        from bilevel.plot import plot_history

        return plot_history(self.history, names=names, path=path, title=type(self.solver).__name__)

    def __repr__(self) -> str:
        variables = {name: tree for name, tree in (("x", self.x), ("y", self.y)) if jax.tree.leaves(tree)}
        sizes = " and ".join(f"{name} ({_size(tree)})" for name, tree in variables.items())
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
