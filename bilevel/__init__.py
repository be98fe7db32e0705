"""Bilevel optimisation in JAX: `from bilevel import Problem, solve`.

Three heights, each built from the one below: `implicit` differentiates through any solver, `hypergradients` is
`value_and_grad` for a bilevel objective, and `solve` is the whole job. Beside it `search` puts a proposer without
gradients above a continuous problem.
"""

from __future__ import annotations

from bilevel import (
    curvature,
    data,
    derivatives,
    diagnostics,
    hypergradients,
    implicit,
    linear,
    lower,
    network,
    optimality,
    optimizers,
    projections,
    proposers,
    prox,
    regularizers,
    runs,
    sets,
    solvers,
)
from bilevel._memory import keep_freed_memory
from bilevel._module import hyperparameters, state
from bilevel.checkpoint import CheckpointError
from bilevel.data import ProblemError
from bilevel.history import History
from bilevel.level import Level, Levels
from bilevel.loop import run
from bilevel.problem import Problem
from bilevel.recorder import Event
from bilevel.result import Result
from bilevel.runs import Multistart, Sweep, multistart, sweep
from bilevel.search import Discovery, LowerProblem, search
from bilevel.solution import Solution
from bilevel.solve import solve

__all__ = [
    "CheckpointError", "Discovery", "Event", "History", "Level", "Levels", "LowerProblem", "Multistart", "Problem",
    "ProblemError", "Result", "Solution", "Sweep", "curvature", "data", "derivatives", "diagnostics", "hypergradients",
    "hyperparameters", "implicit", "linear", "lower", "multistart", "network", "optimality", "optimizers",
    "projections", "proposers", "prox", "regularizers", "run", "runs", "search", "sets", "solve", "solvers", "state",
    "sweep",
]  # fmt: skip

keep_freed_memory()


def __getattr__(name: str) -> str:
    """`__version__`, read from the installed distribution where it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("bilevel")
    raise AttributeError(f"module 'bilevel' has no attribute {name!r}")
