"""How a run ended: the codes that solvers return, and what each means."""

from __future__ import annotations

import enum

__all__ = ["Result"]


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
    COMPLETED = 8
    SEVERAL_MINIMISERS = 9
    NOT_STATIONARY = 10
    UNBOUNDED = 11
    LOCAL = 12
    UNRESOLVED = 13

    @property
    def sentence(self) -> str:
        """What it means."""
        return _SENTENCES[self]


_SENTENCES = {
    Result.MAX_STEPS: "took all its steps and did not meet the tolerance",
    Result.CONVERGED: "met the tolerance, its own or that of the check of its end, which found nothing against it",
    Result.PENALTY_LIMITED: "stopped improving at the penalty's own bias: raise the penalty, or extrapolate in it",
    Result.DIVERGED: "met a NaN or an infinity; x and y are the last finite iterate",
    Result.STOPPED: "was stopped by a callback or by its patience",
    Result.INTERRUPTED: "was interrupted from the keyboard; x and y are where it stood",
    Result.INFEASIBLE: "ended where the constraints are not met",
    Result.LOWER_LEVEL: "stopped moving at a y that does not minimise the lower level",
    Result.COMPLETED: "took the steps that were asked for",
    Result.SEVERAL_MINIMISERS: "stopped at one of several lower-level minimisers, and not at the best for F",
    Result.NOT_STATIONARY: "stopped where F can be lowered by moving x",
    Result.UNBOUNDED: "ended where the lower level has no minimiser, or ran away while the upper loss fell",
    Result.LOCAL: "met the tolerance at a local solution; another x has a lower F",
    Result.UNRESOLVED: "met the tolerance, but noise, or a slope that is none, hides whether this is a solution",
}
