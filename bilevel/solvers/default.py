"""Which solver `solve` takes when it is given none: it looks at the problem, then takes the first row that fits.

`ROWS` is the one table of that choice; the page "Which method when" prints it (`as_markdown`). Minibatches of samples
that are few enough to be passed over whole are passed over whole: the choice is then that for full batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel._module import name_of
from bilevel.constraints import Constraints, depends, is_affine
from bilevel.curvature import lower_spectrum
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import refuse_empty
from bilevel.solvers.small.program import size_of
from bilevel.solvers.small.stationarity import refusal
from bilevel.typing import PyTree

__all__ = ["ROWS", "Choice", "Facts", "Row", "as_markdown", "default_solver", "look", "second_solver"]

# Above this many constraint values LV-HBA's projection on the coupled set is dearer than its step.
_MANY_ROWS = 2000
# Above this many unknowns and bounds of a set around y MPCC is dearer than steps with the set's projection.
_MANY_BOUNDS = 100
# The most lower unknowns whose curvature is looked at before the choice, and whose Hessian is written down.
_DENSE = 100
# What a pass over all samples may read and write, so that minibatches are passed over whole.
_PASS_BYTES = 2**26
# The same where minibatches did not get there.
_MOST_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is seen of a problem before the choice, at the start.

    Attributes:
      simple: there is no upper variable (`x0=None`).
      stochastic: a level's samples are drawn.
      rows: values of the lower level's coupled constraints; `affine`: all of them are.
      upper_rows: the upper level has constraints.
      projected, nonsmooth: the lower level has a projection; a prox. `coupled_prox`: the prox depends on x.
      refusal: why the problem is none for `solvers.MPCC`; "" where it is one.
      size: unknowns and rows that MPCC works on, counted where there is a set around y.
      unknowns: of the lower level.
      curvature: of f(x0, .) at y0: "convex", "flat" or "indefinite"; "" where it was not looked at.
    """

    simple: bool
    stochastic: bool
    rows: int
    affine: bool
    upper_rows: bool
    projected: bool
    nonsmooth: bool
    coupled_prox: bool
    refusal: str
    size: int
    unknowns: int
    curvature: str

    @property
    def small(self) -> bool:
        """Whether MPCC takes the problem."""
        return not self.refusal

    @property
    def constrained(self) -> bool:
        """Whether y is bound by more than f: by rows, a set or a prox."""
        return bool(self.rows) or self.projected or self.nonsmooth


def look(problem: Problem, x: PyTree, y: PyTree) -> Facts:
    """What the choice rests on."""
    rows, affine = 0, True
    if problem.constraint is not None or problem.equality is not None:
        coupled = Constraints(problem.draw_lower(0), x, y)
        rows, affine = coupled.count, is_affine(coupled.raw, x, y)
    prox, refused = problem.prox_lower, refusal(problem, x, y)
    facts = Facts(
        simple=not jax.tree.leaves(x),
        stochastic=problem.stochastic,
        rows=rows,
        affine=affine,
        upper_rows=problem.upper_constraint is not None or problem.upper_equality is not None,
        projected=problem.project_lower is not None,
        nonsmooth=prox is not None,
        coupled_prox=prox is not None and depends(lambda y, x: prox(x, y, 1.0), y, x, on=1),
        refusal=refused,
        size=0 if refused or problem.project_lower is None else sum(size_of(problem, x, y)),
        unknowns=optax.tree.size(y),
        curvature="",
    )
    if facts.constrained or facts.stochastic or facts.simple or facts.unknowns > _DENSE:
        return facts
    low, high = lower_spectrum(problem, x, y, dense=_DENSE)
    flat = 1e-9 * abs(high) if jnp.finfo(jnp.result_type(*jax.tree.leaves(y))).eps < 1e-10 else 1e-5 * abs(high)
    kind = "convex" if low > flat else "flat" if low >= -flat else "indefinite" if np.isfinite(low) else ""
    return dataclasses.replace(facts, curvature=kind)


class Choice(NamedTuple):
    """What `solve` takes.

    Attributes:
      solver: the solver.
      why: the sentence that says which and why.
      problem: the problem that it is run on: the one given, or that on full batches in place of minibatches.
    """

    solver: Any
    why: str
    problem: Problem


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the choice.

    Attributes:
      problem: which problems, in words.
      holds: whether a problem is one of them.
      take: makes the solver.
      solver: its name, with what is set in it.
      why: the reason.
    """

    problem: str
    holds: Callable[[Facts], bool]
    take: Callable[[], Any]
    solver: str
    why: str


def _take(name: str, *args: Any, **kwargs: Any) -> Any:
    from bilevel import solvers  # imported where needed

    return getattr(solvers, name)(*args, **kwargs)


def _newton() -> Any:
    from bilevel.lower import Newton

    return _take("AID", Newton())


def _quasi_newton() -> Any:
    from bilevel.lower import LBFGS, Relative

    return _take("AID", Relative(LBFGS(tol=1e-4), careful=True))


def _proximal() -> Any:
    from bilevel.lower import ProximalGradient

    return _take("AID", ProximalGradient())


ROWS = (
    Row(
        "at most 300 unknowns and constraint values, full batches; constraints at either level, a set that can be seen "
        "(`bilevel.sets`) around y (at most 100), or no upper variable",
        lambda f: f.small and (f.upper_rows or bool(f.rows) or f.simple or (f.projected and f.size <= _MANY_BOUNDS)),
        functools.partial(_take, "MPCC"),
        "MPCC",
        "a small problem with constraints: the lower level's conditions as constraints, several starts, every end "
        "verified",
    ),
    Row(
        "the same size, no constraints, and f is not strongly convex at the start",
        lambda f: f.small and f.curvature in ("flat", "indefinite"),
        functools.partial(_take, "MPCC"),
        "MPCC",
        "a small problem whose lower level is flat or not convex at the start: several minimisers are possible, and "
        "the best for F is looked for",
    ),
    Row(
        "constraints of the upper level, larger",
        lambda f: f.upper_rows,
        lambda: None,
        "none: name one",
        "",
    ),
    Row(
        "coupled affine constraints of the lower level",
        lambda f: 0 < f.rows <= _MANY_ROWS and f.affine and not f.nonsmooth and not f.simple,
        functools.partial(_take, "LVHBA"),
        "LVHBA",
        "the coupled constraints are affine, so that projecting on them is cheap and keeps the lower level feasible",
    ),
    Row(
        "other coupled constraints of the lower level",
        lambda f: f.rows > 0 and not f.nonsmooth and not f.simple,
        functools.partial(_take, "BiCGAFFA"),
        "BiCGAFFA",
        "coupled constraints (nonlinear, or many rows) without a projection on the coupled set; LVHBA(project=...) if "
        "you have one",
    ),
    Row(
        "no upper variable, minibatches",
        lambda f: f.simple and not f.rows and f.stochastic and not f.projected and not f.nonsmooth,
        functools.partial(_take, "BOME"),
        "BOME",
        "a simple bilevel problem on minibatches: the dynamic barrier",
    ),
    Row(
        "no upper variable",
        lambda f: f.simple and not f.rows,
        functools.partial(_take, "IterativeRegularization"),
        "IterativeRegularization",
        "a simple bilevel problem, both levels own y: a growing penalty",
    ),
    Row(
        "a nonsmooth lower term that does not depend on x",
        lambda f: f.nonsmooth and not f.coupled_prox and not f.rows,
        functools.partial(_take, "MEHA"),
        "MEHA",
        "the Moreau envelope: the lower level has a nonsmooth term that does not depend on x",
    ),
    Row(
        "full batches; a projected or proximal lower level",
        lambda f: not f.rows and not f.simple and not f.stochastic and (f.projected or f.nonsmooth),
        _proximal,
        "AID",
        "implicit differentiation of the forward-backward map, with GMRES; accelerated proximal gradient steps with a "
        "line search below, no step sizes to set: full batches, a projected or proximal lower level",
    ),
    Row(
        "full batches, at most 100 lower unknowns, f strongly convex at the start",
        lambda f: not f.rows and not f.simple and not f.stochastic and f.curvature == "convex",
        _newton,
        "AID",
        "implicit differentiation with Newton steps and a direct linear solve, whatever the condition; no step sizes "
        "to set: full batches, no coupled constraints, few lower unknowns",
    ),
    Row(
        "full batches",
        lambda f: not f.rows and not f.simple and not f.stochastic,
        _quasi_newton,
        "AID",
        "implicit differentiation with warm-started CG; no step sizes to set: full batches, no coupled constraints",
    ),
    Row(
        "minibatches",
        lambda f: f.stochastic and not f.rows and not f.simple and not f.projected and not f.nonsmooth,
        functools.partial(_take, "ProbedSingleLoop"),
        "ProbedSingleLoop",
        "a single loop with step sizes from probed curvatures; none to set: minibatches, no coupled constraints",
    ),
)


def default_solver(problem: Problem, x: PyTree, y: PyTree) -> Choice:
    """A sensible solver for the problem, and the sentence that says which and why: the first of `ROWS` that fits.

    Raises:
      ProblemError: no solver of this package honours all parts of the problem.
    """
    refuse_empty(y)
    whole = _passed_over_whole(problem, x, y, _PASS_BYTES)
    facts = look(problem if whole is None else whole, x, y)
    row = next((row for row in ROWS if row.holds(facts)), None)
    solver = None if row is None else row.take()
    if row is not None and solver is not None:
        if whole is None:
            return Choice(solver, f"Chose {row.solver}: {row.why}.", problem)
        why = f"Chose {row.solver} on all samples in place of minibatches (a pass over them is cheap): {row.why}."
        return Choice(solver, why, whole)
    if facts.upper_rows:
        raise ProblemError(
            "No solver is chosen automatically for upper_constraint= and upper_equality= here, since solvers.MPCC does "
            f"not take the problem: {facts.refusal}"
        )
    if facts.stochastic and facts.constrained:
        raise ProblemError(
            "No solver is chosen automatically for minibatches with a projected or proximal lower level: name one, "
            "such as solvers.VPBGD or solvers.MEHA, or give full batches."
        )
    raise ProblemError(
        "No solver is chosen automatically for this combination of constraints, prox and x0=None: name one of "
        "bilevel.solvers."
    )


def _passed_over_whole(problem: Problem, x: PyTree, y: PyTree, most: int) -> Problem | None:
    """The problem on full batches, where samples are drawn and a pass over all of them reads and writes at most `most`
    bytes; None otherwise."""
    whole = problem.whole() if problem.stochastic else None
    return None if whole is None or whole.pass_bytes(x, y) > most else whole


def second_solver(problem: Problem, x: PyTree, y: PyTree, first: Any) -> Choice | None:
    """What to try where the first choice ended at something that is no solution; None: nothing fits better."""
    from bilevel.solvers import F2BA, MPCC

    if isinstance(first, MPCC):
        return None
    if problem.stochastic:
        whole = _passed_over_whole(problem, x, y, _MOST_BYTES) if jax.tree.leaves(x) else None
        if whole is None:
            return None
        chosen = default_solver(whole, x, y)
        return chosen._replace(why=f"{name_of(chosen.solver)} on all samples in place of minibatches")
    if not refusal(problem, x, y):
        return Choice(MPCC(), "MPCC, which looks for other minimisers and other solutions", problem)
    constrained = problem.constraint is not None or problem.equality is not None
    if constrained or problem.project_lower is not None or problem.prox_lower is not None or not jax.tree.leaves(x):
        return None
    return Choice(F2BA(), "F2BA, which chooses among several minimisers", problem)


def as_markdown() -> str:
    """The table of the choice, for the page that explains it."""
    lines = ["| the problem | `solve` takes | why |", "|---|---|---|"]
    lines += [f"| {row.problem} | {row.solver} | {row.why} |" for row in ROWS]
    return "\n".join(lines)
