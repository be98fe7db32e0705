"""Which solver `solve` takes when it is given none."""

from __future__ import annotations

from typing import Any

import optax

from bilevel.problem import Problem, ProblemError
from bilevel.solvers.nested import AID

PyTree = Any


def default_solver(problem: Problem, x: PyTree, y: PyTree) -> tuple[Any, str]:
    """A sensible solver for the problem, and the sentence that says which and why."""
    return AID(), "AID (implicit differentiation with CG): full batches, no coupled constraints."
