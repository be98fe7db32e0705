"""Bilevel optimisation in JAX: `from bilevel import Problem, solve`.

Three heights, each built from the one below: `implicit` differentiates through any solver, `hypergradients` is
`value_and_grad` for a bilevel objective, and `solve` is the whole job.
"""

from __future__ import annotations

from bilevel import (
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
    regularizers,
    solvers,
)
from bilevel._module import hyperparameters, state
from bilevel.checkpoint import CheckpointError
from bilevel.level import Level, Levels
from bilevel.multistart import Multistart, multistart
from bilevel.problem import Problem, ProblemError
from bilevel.solution import History, Result, Solution
from bilevel.solve import Event, run, solve
from bilevel.sweep import Sweep, sweep

__all__ = [
    "CheckpointError",
    "Event",
    "History",
    "Level",
    "Levels",
    "Multistart",
    "Problem",
    "ProblemError",
    "Result",
    "Solution",
    "Sweep",
    "data",
    "derivatives",
    "diagnostics",
    "hypergradients",
    "hyperparameters",
    "implicit",
    "linear",
    "lower",
    "multistart",
    "network",
    "optimality",
    "optimizers",
    "projections",
    "regularizers",
    "run",
    "solve",
    "solvers",
    "state",
    "sweep",
]
