"""Hypergradient estimators, and `value_and_hypergradient` to use one in a loop of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel._arguments import explained
from bilevel._module import name_of
from bilevel._rules import stiff_at_rest
from bilevel._settings import settings
from bilevel.frozen import as_rule, refuse_rule
from bilevel.hypergradients._base import Estimate, Estimator, check_estimator, first_carry
from bilevel.hypergradients.finite_difference import FiniteDifference, FirstOrder
from bilevel.hypergradients.forward import Forward, Tangents
from bilevel.hypergradients.implicit import Implicit, JacobianFree
from bilevel.hypergradients.kkt import ActiveSet, NullSpace
from bilevel.hypergradients.least_squares import LeastSquares
from bilevel.hypergradients.stochastic import SAMA, StochasticImplicit
from bilevel.hypergradients.unrolled import OneStep, Unrolled
from bilevel.hypergradients.zeroth_order import HOZOG, PZOBO
from bilevel.keys import as_step_key
from bilevel.lower import LBFGS, Accurate, LowerState, as_lower_solver
from bilevel.optimizers import AT_REST
from bilevel.precision import named, working
from bilevel.problem import Problem, ProblemError, as_given, check_problem
from bilevel.typing import LowerSolver, X, Y

__all__ = [
    "HOZOG", "PZOBO", "SAMA", "ActiveSet", "Estimate", "Estimator", "FiniteDifference", "FirstOrder", "Forward",
    "Implicit", "JacobianFree", "LeastSquares", "NullSpace", "OneStep", "StochasticImplicit", "Tangents", "Unrolled",
    "value_and_hypergradient",
]  # fmt: skip


@explained
def value_and_hypergradient(
    problem: Problem[X, Y], estimator: Estimator | None = None, lower_solver: Any = None
) -> Callable[..., Estimate[X]]:
    """`jax.value_and_grad` for the bilevel objective h(x) = F(x, y*(x)), to be put into a loop of one's own.

    Args:
      problem: a `Problem`.
      estimator: one of this module; None: `Implicit()`.
      lower_solver: anything `lower.as_lower_solver` accepts; None: `lower.Accurate()` under coupled constraints, else
        `lower.LBFGS()` for full batches, and ten steps of gradient descent where batches are drawn.

    Returns:
      `f(x, y, carry=None, key=0) -> Estimate`, pure and jittable. Its `value` is F at the y found, `gradient` the
      hypergradient, `lower.y` the y found, `carry` what the estimator keeps (warm starts). Hand `estimate.lower` back
      as y, and `estimate.carry`: the lower solver goes on with its memory, such as Adam's moments; a plain y begins
      with a fresh one. To keep data out of the compiled program, jit a function that takes the problem as an argument:

          @jax.jit
          def step(problem, x, lower, carry): return value_and_hypergradient(problem)(x, lower, carry)

      Where a training loop of your own moves y, `lower_solver=lower.Identity()` leaves it where it is.
    """
    check_problem("value_and_hypergradient", problem, "Problem(upper=F, lower=f, ...)")
    estimator = Implicit() if estimator is None else estimator
    check_estimator("value_and_hypergradient", estimator)
    default: Any = 0.1 if problem.stochastic else LBFGS()
    if problem.constraint is not None or problem.equality is not None:  # which those would ignore
        default = Accurate()
    solver = as_lower_solver(default if lower_solver is None else lower_solver)

    _refuse_parts(estimator, problem)

    def evaluate(x: X, y: Y | LowerState, carry: Any = None, key: Any = 0) -> Estimate[X]:
        if isinstance(y, Estimate):
            raise TypeError(
                "value_and_hypergradient was handed a whole estimate as y: hand back estimate.lower, and "
                "estimate.carry after it."
            )
        x = as_given("x", x)
        if isinstance(y, LowerState):
            y = LowerState(as_given("y", y.y), jax.tree.map(jnp.asarray, y.memory))
        else:
            y = as_given("y", y)
        goes_on = isinstance(y, LowerState)
        if carry is not None and getattr(estimator, "continues", False) and not goes_on:
            raise ValueError(
                f"{type(estimator).__name__} goes on with the derivative of the whole lower run, the optimiser's "
                "memory included: give the last estimate's `lower` as y, and not its `lower.y`."
            )
        at = y.y if isinstance(y, LowerState) else y
        with named(estimator, problem, x, at):
            found = working(problem, x, at)
        if not getattr(estimator, "through", False):
            refuse_rule(f"value_and_hypergradient with {name_of(estimator)}", as_rule(solver), found.y)
        with settings(), named(estimator, problem, x, at):
            if isinstance(y, LowerState):
                start = _begun(solver, LowerState(found.y, y.memory))
            else:
                start = solver.init(found.y)
            upper, lower = found.problem.levels(as_step_key(key))
            carry = first_carry(estimator, lower, found.x, start) if carry is None else carry
            estimate = estimator(upper, lower, solver, found.x, start, carry)
        left = estimate.metrics.get("lower_residual", 1.0)
        at_rest = getattr(estimator, "through", False) and not isinstance(left, jax.core.Tracer) and left == 0
        if at_rest and stiff_at_rest(as_rule(solver), estimate.lower.y, estimate.lower.memory):
            raise ProblemError(AT_REST.format(what=name_of(solver)))
        gradient, at = found.given(estimate.gradient, estimate.lower.y)
        return dataclasses.replace(estimate, gradient=gradient, lower=LowerState(at, estimate.lower.memory))

    return explained(evaluate, of="value_and_hypergradient(problem)")


def _refuse_parts(estimator: Estimator, problem: Problem[Any, Any]) -> None:
    """A sentence for a part of the lower level that the estimator would ignore, and for data that it cannot read."""
    honours = getattr(estimator, "honours", ("project_lower", "prox_lower"))
    for part in ("constraint", "equality", "project_lower", "prox_lower"):
        if getattr(problem, part) is not None and part not in honours:
            raise ProblemError(
                f"value_and_hypergradient with {name_of(estimator)} cannot honour {part}= of the problem, and would "
                "ignore it: take hypergradients.ActiveSet() for constraints, NullSpace() for affine equalities (with "
                "lower.Accurate() as the lower solver, which is the default there), or a solver of the whole problem "
                "(solve)."
            )
    if any(source.host for source in problem.sources):
        raise ProblemError(
            "value_and_hypergradient is pure and cannot read a Stream from the host: make a Problem of each batch, "
            "Problem(upper, lower, batch_of_one, batch_of_the_other), inside of your jitted step."
        )


def _begun(solver: LowerSolver, state: LowerState) -> LowerState:
    """The state that a call has left; an error where it is that of another lower solver."""
    fresh = jax.eval_shape(solver.init, state.y)
    form = lambda tree: (jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    if form(fresh.memory) != form(state.memory):
        raise ValueError(
            "value_and_hypergradient was handed an estimate.lower whose memory is not that of "
            f"{type(solver).__name__}: hand back that of the same lower solver, or estimate.lower.y to begin with a "
            "fresh memory."
        )
    return state
