"""Runs of solvers that work on the host: what `solve` does around them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bilevel.keys import StepKey
from bilevel.loop import Chunk
from bilevel.problem import Problem
from bilevel.recorder import Recorder
from bilevel.result import Result
from bilevel.typing import HostSolver

__all__ = ["drive", "most_steps"]


def most_steps(solver: Any, steps: int) -> int:
    """The steps of a run: as asked, and no more than the solver has."""
    return min(steps, int(getattr(solver, "most_steps", steps)))


def drive(
    run: Recorder, problem: Problem, solver: HostSolver, base: StepKey, tol: float | None, progress: bool | None
) -> None:
    """State after state of the solver's search, each written down, until it has ended or Ctrl-C.

    States are values: an interrupt, wherever it comes, leaves the newest one as it is.
    """
    with run.showing(progress):
        try:
            for state, metrics in solver.search(problem, run.state, base) if not run.ended else ():
                result = Result(int(solver.status(state, metrics, tol)))
                numbers = {name: np.asarray(value)[None] for name, value in metrics.items()}
                run.record(Chunk(state, run.done + 1, np.array([run.done]), numbers, result))
                if run.ended:
                    break
        except KeyboardInterrupt:
            run.interrupted()
