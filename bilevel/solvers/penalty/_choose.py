"""Which penalty method `solve` takes when it is given none."""

from __future__ import annotations

from typing import Any

import jax

from bilevel.problem import Problem
from bilevel.solvers.penalty._constraints import Constraints, depends, is_affine
from bilevel.solvers.penalty.bome import BOME
from bilevel.solvers.penalty.gaffa import BiCGAFFA
from bilevel.solvers.penalty.lvhba import LVHBA
from bilevel.solvers.penalty.meha import MEHA
from bilevel.solvers.penalty.simple import IterativeRegularization

PyTree = Any

# Above this many constraint values LV-HBA's projection on the coupled set is dearer than its step.
_MANY_ROWS = 2000


def choose(problem: Problem, x: PyTree, y: PyTree) -> tuple[Any, str] | None:
    """A solver for a constrained, simple or nonsmooth problem and the sentence that says why; None: leave it to
    others."""
    if problem.constraint is not None or problem.equality is not None:
        if problem.prox_lower is not None or not jax.tree.leaves(x):
            return None
        rows = Constraints(problem, problem.draw_lower(0), x, y)
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
