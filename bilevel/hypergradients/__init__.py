"""Hypergradient estimators, and `value_and_hypergradient` to use one in a loop of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel._settings import settings
from bilevel.hypergradients._base import Estimate, Estimator, check_estimator
from bilevel.hypergradients.finite_difference import FiniteDifference, FirstOrder
from bilevel.hypergradients.implicit import Implicit, JacobianFree
from bilevel.hypergradients.kkt import ActiveSet, NullSpace
from bilevel.hypergradients.least_squares import LeastSquares
from bilevel.hypergradients.stochastic import SAMA, StochasticImplicit
from bilevel.hypergradients.unrolled import OneStep, Unrolled
from bilevel.hypergradients.zeroth_order import HOZOG, PZOBO
from bilevel.keys import as_step_key
from bilevel.lower import LBFGS, LowerState, as_lower_solver
from bilevel.precision import named, working
from bilevel.problem import Problem
from bilevel.typing import X, Y

__all__ = [
    "HOZOG", "PZOBO", "SAMA", "ActiveSet", "Estimate", "Estimator", "FiniteDifference", "FirstOrder", "Implicit",
    "JacobianFree", "LeastSquares", "NullSpace", "OneStep", "StochasticImplicit", "Unrolled", "value_and_hypergradient",
]  # fmt: skip


def value_and_hypergradient(
    problem: Problem[X, Y], estimator: Estimator | None = None, lower_solver: Any = None
) -> Callable[..., Estimate[X]]:
    """`jax.value_and_grad` for the bilevel objective h(x) = F(x, y*(x)), to be put into a loop of one's own.

    Args:
      problem: a `Problem`.
      estimator: one of this module; None: `Implicit()`.
      lower_solver: anything `lower.as_lower_solver` accepts; None: `lower.LBFGS()` for full batches, and ten steps of
        gradient descent where batches are drawn.

    Returns:
      `f(x, y, carry=None, key=0) -> Estimate`, pure and jittable. Its `value` is F at the y found, `gradient` the
      hypergradient, `lower.y` the y to start from next time, `carry` what to hand back then (warm starts). To keep data
      out of the compiled program, jit a function that takes the problem as an argument:

          @jax.jit
          def step(problem, x, y, carry): return value_and_hypergradient(problem)(x, y, carry)
    """
    if not isinstance(problem, Problem):
        raise TypeError(
            f"value_and_hypergradient takes a Problem first, not a {type(problem).__name__}: Problem(upper=F, lower=f, "
            "...)."
        )
    estimator = Implicit() if estimator is None else estimator
    check_estimator("value_and_hypergradient", estimator)
    default = 0.1 if problem.stochastic else LBFGS()
    solver = as_lower_solver(default if lower_solver is None else lower_solver)

    def evaluate(x: X, y: Y, carry: Any = None, key: Any = 0) -> Estimate[X]:
        found = working(problem, *jax.tree.map(jnp.asarray, (x, y)))
        with settings(), named(estimator, problem, x, y):
            upper, lower = found.problem.levels(as_step_key(key))
            carry = estimator.init(lower, found.x, found.y) if carry is None else carry
            estimate = estimator(upper, lower, solver, found.x, solver.init(found.y), carry)
        gradient, at = found.given(estimate.gradient, estimate.lower.y)
        return dataclasses.replace(estimate, gradient=gradient, lower=LowerState(at, estimate.lower.memory))

    return evaluate
