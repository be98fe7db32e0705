"""Which solver `solve` takes when it is given none."""

from __future__ import annotations

from typing import Any

import jax

from bilevel.constraints import Constraints, depends, is_affine
from bilevel.lower import GradientDescent
from bilevel.problem import Problem, ProblemError
from bilevel.solvers.nested import AID
from bilevel.solvers.tuning_free import STFBO
from bilevel.typing import PyTree

# Above this many constraint values LV-HBA's projection on the coupled set is dearer than its step.
_MANY_ROWS = 2000


def default_solver(problem: Problem, x: PyTree, y: PyTree) -> tuple[Any, str]:
    """A sensible solver for the problem, and the sentence that says which and why.

    | the problem has | the solver |
    |---|---|
    | coupled constraints, x0=None, or a nonsmooth term that does not depend on x | a penalty method (`choose`) |
    | full batches | `AID`: implicit differentiation with warm-started CG |
    | full batches and a projected or proximal lower level | `AID` on the forward-backward map, with GMRES |
    | minibatches | `STFBO`: a single loop whose steps come from accumulated gradient norms |

    Raises:
      ProblemError: no solver of this package honours all parts of the problem.
    """
    if problem.upper_constraint is not None or problem.upper_equality is not None:
        raise ProblemError(
            "No solver is chosen automatically for upper_constraint= and upper_equality=: name one of bilevel.solvers "
            "that honours them."
        )
    chosen = choose(problem, x, y)
    if chosen is not None:
        return chosen[0], f"Chose {chosen[1]}"
    if problem.constraint is not None or problem.equality is not None or not jax.tree.leaves(x):
        raise ProblemError(
            "No solver is chosen automatically for this combination of constraints, prox and x0=None: name one of "
            "bilevel.solvers."
        )
    nonsmooth = problem.project_lower is not None or problem.prox_lower is not None
    if not problem.stochastic:
        if nonsmooth:
            solver = AID(lower_solver=GradientDescent(0.1, 1000, tol=1e-6))
            return solver, (
                "Chose AID (implicit differentiation of the forward-backward map, with GMRES; lower steps of 0.1): "
                "full batches, a projected or proximal lower level."
            )
        return (
            AID(),
            "Chose AID (implicit differentiation with warm-started CG; no step sizes to set): full batches, no "
            "coupled constraints.",
        )
    if nonsmooth:
        raise ProblemError(
            "No solver is chosen automatically for minibatches with a projected or proximal lower level: name one, "
            "such as solvers.VPBGD or solvers.MEHA, or give full batches."
        )
    return (
        STFBO(),
        (
            "Chose STFBO (a single loop with step sizes from accumulated gradient norms; none to set): minibatches, no "
            "coupled constraints."
        ),
    )


def choose(problem: Problem, x: PyTree, y: PyTree) -> tuple[Any, str] | None:
    """A penalty method for a constrained, simple or nonsmooth problem, and why; None: leave it to others."""
    from bilevel.solvers import BOME, LVHBA, MEHA, BiCGAFFA, IterativeRegularization  # imported where needed

    if problem.constraint is not None or problem.equality is not None:
        if problem.prox_lower is not None or not jax.tree.leaves(x):
            return None
        rows = Constraints(problem.draw_lower(0), x, y)
        if is_affine(rows.raw, x, y) and rows.count <= _MANY_ROWS:
            return (
                LVHBA(),
                "LVHBA: the coupled constraints are affine, so that projecting on them is cheap "
                "and keeps the lower level feasible.",
            )
        why = "nonlinear" if rows.count <= _MANY_ROWS else f"{rows.count} rows"
        return (
            BiCGAFFA(),
            f"BiCGAFFA: coupled constraints ({why}) without a projection on the coupled set; "
            "LVHBA(project=...) if you have one.",
        )
    if not jax.tree.leaves(x):
        if problem.project_lower is None and problem.prox_lower is None and problem.stochastic:
            return BOME(), "BOME (dynamic barrier): a simple bilevel problem on minibatches."
        return (
            IterativeRegularization(),
            "IterativeRegularization (a growing penalty): a simple bilevel problem, both levels own y.",
        )
    prox = problem.prox_lower
    if prox is not None and not depends(lambda y, x: prox(y, x, 1.0), y, x, on=1):
        return MEHA(), "MEHA (Moreau envelope): the lower level has a nonsmooth term that does not depend on x."
    return None
