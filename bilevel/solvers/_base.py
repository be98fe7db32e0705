"""What every solver does: refuse what it cannot honour, and say when it is within a tolerance."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import name_of
from bilevel._rules import stiff_at_rest
from bilevel._traces import of_function, reached
from bilevel.constraints import depends
from bilevel.data import Source, as_source
from bilevel.frozen import as_rule, refuse_rule
from bilevel.hypergradients.implicit import Implicit
from bilevel.level import takes_batch
from bilevel.lower.foreign import Function
from bilevel.optimizers import AT_REST
from bilevel.problem import Problem, ProblemError
from bilevel.result import Result
from bilevel.typing import HostSolver, Metrics, PyTree

_PARTS = {
    "upper_constraint": "the upper level's inequality upper_constraint=",
    "upper_equality": "the upper level's equality upper_equality=",
    "constraint": "the coupled inequality constraint=",
    "equality": "the coupled equality constraint equality=",
    "project_upper": "the upper projection project_upper=",
    "project_lower": "the lower projection project_lower=",
    "prox_lower": "the nonsmooth lower term prox_lower=",
}


def refuse(
    solver: Any, problem: Problem, x: PyTree, *, honours: tuple[str, ...] = (), simple: bool = False, instead: str = ""
) -> None:
    """Raise a `ProblemError` for each part of the problem that the solver does not honour.

    Args:
      solver: the solver, for its name.
      problem: the problem.
      x: the upper variable (None in a simple bilevel problem).
      honours: which of upper_constraint, upper_equality, constraint, equality, project_upper, project_lower,
        prox_lower the solver treats.
      simple: whether it takes x0=None.
      instead: what to take instead, a sentence's end such as "solvers.LVHBA".
    """
    name = name_of(solver)
    cure = f" Take {instead} instead." if instead else ""
    for part, what in _PARTS.items():
        if getattr(problem, part) is not None and part not in honours:
            cure = " Take solvers.MPCC instead." if part.startswith("upper_") else cure
            raise ProblemError(f"{name} cannot honour {what} of the problem, and would ignore it.{cure}")
    if not simple and not jax.tree.leaves(x):
        raise ProblemError(
            f"{name} needs an upper variable: x0 is empty (a simple bilevel problem, where both levels own y).{cure}"
        )


def reads_x(fn: Any, x: PyTree, y: PyTree, source: Source) -> bool:
    """Whether a loss or a constraint depends on x, read off its trace."""
    jaxpr, n = of_function(fn, x, y, source)[0].jaxpr, len(jax.tree.leaves(x))
    return any(reached(jaxpr, [i < n for i in range(len(jaxpr.invars))]))


def refuse_unreached(solver: Any, problem: Problem, x: PyTree, y: PyTree) -> None:
    """Raise a `ProblemError` where x reaches neither level, so that every hypergradient would be zero.

    Read off the traces of both losses and of all constraints. A lower solver that starts at x (MAML) reaches it, and
    one of the user's may; so may a solver of the user's.
    """
    ours = lambda part: type(part).__module__.split(".")[0] == "bilevel"  # noqa: E731
    below = getattr(solver, "lower_solver", None)
    implicit = isinstance(getattr(solver, "hypergradient", None), Implicit)  # the start is no part of its derivative
    starts = getattr(below, "start", None) is not None
    begins = (starts and not implicit) or not (below is None or ours(below))
    if not jax.tree.leaves(x) or begins or not ours(solver):
        return
    of_upper, of_lower = problem.sources
    parts = {
        "upper": of_upper, "upper_constraint": of_upper, "upper_equality": of_upper,
        "lower": of_lower, "constraint": of_lower, "equality": of_lower,
    }  # fmt: skip
    for name, source in parts.items():
        fn = getattr(problem, name)
        if fn is None:
            continue
        source = source if name in ("upper", "lower") or takes_batch(fn) else as_source(None)
        if reads_x(fn, x, y, source):
            return
    prox = problem.prox_lower
    if prox is not None and depends(lambda x, y: prox(x, y, 1.0), x, y):
        return
    if starts:
        raise ProblemError(
            f"x0 is where the lower solver starts and reaches neither loss, and {name_of(solver)} differentiates the "
            "lower level's solution, which does not depend on its start: every hypergradient is zero. Add the proximal "
            "term to the lower loss, + lam / 2 * jnp.sum((y - x) ** 2), or take solvers.MAML, which differentiates the "
            "steps."
        )
    raise ProblemError(
        "x0 reaches neither the upper nor the lower loss (nor a constraint): the objective does not depend on x, and "
        "every hypergradient is zero. Use x in a loss; to learn where the lower solver starts, as MAML does, take "
        "solvers.MAML, or give the lower solver a start: solvers.ITD(start=lambda x, y: x)."
    )


def refuse_empty(y: PyTree) -> None:
    """Raise a `ProblemError` where the lower level has no unknown."""
    if not any(jnp.size(leaf) for leaf in jax.tree.leaves(y)):
        raise ProblemError(
            "y0 holds no numbers: there is no lower level to solve. Minimise the upper loss by itself (optax, "
            "scipy.optimize), or give y0 the shape of what the lower level chooses."
        )


def refuse_unread(solver: Any, problem: Problem, x: PyTree, y: PyTree) -> None:
    """Raise a `ProblemError` where the lower loss does not depend on y, and nothing else of the lower level does.

    A function of the user's that solves the lower level need not look at the loss.
    """
    others = (problem.constraint, problem.equality, problem.project_lower, problem.prox_lower)
    below = getattr(solver, "lower_solver", None)
    ours = lambda part: type(part).__module__.split(".")[0] == "bilevel"  # noqa: E731
    own = isinstance(below, Function) or not (below is None or ours(below))
    if own or not ours(solver) or any(part is not None for part in others):
        return
    refuse_empty(y)
    jaxpr = of_function(problem.lower, x, y, problem.sources[1])[0].jaxpr
    n, m = len(jax.tree.leaves(x)), len(jax.tree.leaves(y))
    if not any(reached(jaxpr, [n <= i < n + m for i in range(len(jaxpr.invars))])):
        raise ProblemError(
            "lower does not depend on y0: every y minimises it, and the problem says nothing of y. Use y in the lower "
            "loss, whose arguments are (x, y), the upper level's variable first."
        )


def refuse_standing(solver: Any, y: PyTree, certified: bool = False) -> None:
    """Raise a `ProblemError` where the step rule of y never moves a part of y and the method would not know of it.

    Methods that differentiate through the rule's steps, or take the values of its solutions, are right all the same
    (their estimator's, or their own, `through` says so); with `certified` they are refused too, since the certificate
    solves the lower level in all of y.
    """
    through = getattr(getattr(solver, "hypergradient", solver), "through", False)
    if certified or not through:
        below = getattr(solver, "lower_optimizer", None)
        refuse_rule(name_of(solver), as_rule(getattr(solver, "lower_solver", None)) if below is None else below, y)


def refuse_at_rest(solver: Any, problem: Problem, x: PyTree, y: PyTree) -> None:
    """Raise a `ProblemError` where steps are differentiated that start at an optimum, by a rule that is stiff there."""
    below = getattr(solver, "lower_solver", None)
    rule = as_rule(below)
    differentiates = getattr(getattr(solver, "hypergradient", None), "through", False)
    moved = getattr(below, "start", None) is not None or any(source.host for source in problem.sources)
    if not differentiates or moved or not stiff_at_rest(rule, y):
        return
    slope = _slope(problem, x, y)
    if all(not bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(slope)):
        raise ProblemError("At the start " + AT_REST.format(what=name_of(solver)))


@jax.jit
def _slope(problem: Problem, x: PyTree, y: PyTree) -> PyTree:
    return problem.draw_lower(0).gradient(x, y)


def check_solver(owner: str, solver: Any) -> None:
    """Raise a sentence where this is no solver: a class, a constructor, a name, or another part of the package."""
    module = getattr(type(solver), "__module__", "")
    if isinstance(solver, type) or (callable(solver) and hasattr(solver, "__name__")):
        cure = f"{solver.__name__} was not called: write {solver.__name__}()"
    elif isinstance(solver, str):
        cure = f"solvers are objects: write solvers.{solver}()"
    elif isinstance(solver, optax.GradientTransformation):
        cure = "an optax rule moves one variable: write solvers.AID(upper_optimizer=rule)"
    elif module.startswith("bilevel.lower"):
        cure = "it solves the lower level alone: write solvers.AID(lower_solver=...)"
    elif module.startswith("bilevel.linear"):
        cure = "it solves a linear system: write solvers.AID(linear_solver=...)"
    elif module.startswith("bilevel.hypergradients"):
        cure = "it is an estimator: write solvers.HypergradientDescent(...) around it"
    elif (hasattr(solver, "init") and hasattr(solver, "step")) or isinstance(solver, HostSolver):
        return
    elif owner == "run":
        cure = "the order is run(problem, solver, x0, y0, steps), with a solver such as solvers.SOBA()"
    else:
        cure = "take one of bilevel.solvers, such as solvers.AID()"
    what = "an optax rule" if isinstance(solver, optax.GradientTransformation) else repr(solver)[:200]
    raise TypeError(
        f"{owner}'s solver is {what}; it needs methods init(problem, x, y, key) and step(problem, state, key), or "
        f"init, search and status: {cure}."
    )


def within(tol: Any, metrics: Metrics, *names: str) -> jax.Array:
    """CONVERGED where all these metrics, as far as they are measured, are at most tol; 0, to go on, elsewhere."""
    worst = jnp.max(jnp.stack([metrics[name] for name in names if name in metrics]))
    return jnp.where(worst <= tol, Result.CONVERGED.value, 0)


# Of F_y: with more of it left the hypergradient is not that of the problem.
_LINEAR = 1e-3


def linear_settled(tol: Any, metrics: Metrics) -> Any:
    """Whether the hypergradient's linear system is solved: what is left of F_y is at most tol, or a thousandth of it,
    and no negative curvature was met. True where neither is measured."""
    settled: Any = True
    if "linear_error" in metrics:
        settled = (metrics["linear_error"] <= _LINEAR) | (metrics["linear_residual"] <= tol)
    return settled & (metrics.get("negative_curvature", 0) == 0)


def remark(metrics: dict[str, float], eps: float = 0.0) -> str:
    """What the last step's metrics say against the run, in a sentence; nothing where all is well.

    `eps`: of the coarsest dtype that the losses compute in. What a linear solver leaves below it is rounding.
    """
    if metrics.get("returns", 0) > 0:
        return (
            f"x ran away and was put back {metrics['returns']:.0f} times: the lower level looks ill-conditioned, and "
            "single loops follow it too slowly. Take solvers.AID() on all samples, or rescale y."
        )
    if metrics.get("upper_curvature", 1) == 0:
        return (
            "No curvature of x -> F(x, y*(x)) was seen along x's directions, so that no step of x could be chosen: it "
            "is flat or linear there. Take solvers.SOBA with a step size of yours."
        )
    if metrics.get("negative_curvature", 0) > 0:
        return (
            "The linear solver met negative curvature of the lower loss: y is no minimum, but a saddle point or a "
            "maximum of it (or the lower level is unbounded, or not solved yet). Start elsewhere (multistart), solve "
            "the lower level by lower.Newton(), or add a strongly convex term to it."
        )
    if metrics.get("linear_error", 0) > max(_LINEAR, eps):
        return (
            f"The linear system f_yy v = F_y is left with {100 * metrics['linear_error']:.2g}% of F_y. Either f_yy is "
            "singular and F_y not in its range: the lower-level solution is not unique, F prefers another one, and "
            "this method does not choose among solutions (F2BA, MEHA and LVHBA do); or the linear solver was cut "
            "short: give it more steps."
        )
    return ""
