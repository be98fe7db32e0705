"""Which solver `solve` takes when it is given none."""

from __future__ import annotations

from typing import Any

import jax

from bilevel import linear
from bilevel.hypergradients import Implicit
from bilevel.lower import GradientDescent
from bilevel.problem import Problem, ProblemError
from bilevel.solvers.nested import AID, HypergradientDescent

PyTree = Any


def default_solver(problem: Problem, x: PyTree, y: PyTree) -> tuple[Any, str]:
    """A sensible solver for the problem, and the sentence that says which and why.

    Raises:
      ProblemError: no solver of this package honours all parts of the problem.
    """
    if problem.constraint is not None or problem.equality is not None or not jax.tree.leaves(x):
        raise ProblemError("No solver is chosen automatically for coupled constraints or a simple bilevel problem (x0=None): name one.")
    if not problem.stochastic:
        if problem.project_lower is not None or problem.prox_lower is not None:
            solver = AID(lower_solver=GradientDescent(0.1, 1000, tol=1e-6))
            return solver, "Chose AID (implicit differentiation of the forward-backward map, with GMRES): full batches, a projected or proximal lower level."
        return AID(), "Chose AID (implicit differentiation with warm-started CG; no step sizes to set): full batches, no coupled constraints."
    solver = HypergradientDescent(Implicit(linear.CG(tol=None, max_steps=10)), GradientDescent(0.1, 10), 0.01)
    return solver, "Chose HypergradientDescent (10 SGD steps, 10 CG steps): minibatches, no coupled constraints."
