"""Bilevel optimisation in JAX."""

from bilevel import data, derivatives, diagnostics, hypergradients, implicit, linear, lower, optimizers, solvers
from bilevel.problem import Level, Problem, ProblemError
from bilevel.solution import History, Result, Solution
from bilevel.solve import Event, run, solve

__all__ = [
    "Event", "History", "Level", "Problem", "ProblemError", "Result", "Solution", "data", "derivatives", "diagnostics", "hypergradients", "implicit",
    "linear", "lower", "optimizers", "run", "solve", "solvers",
]
