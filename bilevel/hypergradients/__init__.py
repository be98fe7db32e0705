"""Hypergradient estimators, and `value_and_hypergradient` to use one in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.data import as_step_key
from bilevel.hypergradients._base import Estimate, Estimator
from bilevel.hypergradients.finite_difference import FiniteDifference, FirstOrder
from bilevel.hypergradients.implicit import Implicit, JacobianFree
from bilevel.hypergradients.unrolled import OneStep, Unrolled
from bilevel.hypergradients.zeroth_order import HOZOG, PZOBO
from bilevel.lower import LBFGS, Inner, LowerState, as_lower_solver

__all__ = [
    "HOZOG",
    "PZOBO",
    "Estimate",
    "Estimator",
    "FiniteDifference",
    "FirstOrder",
    "Implicit",
    "JacobianFree",
    "OneStep",
    "Unrolled",
    "value_and_hypergradient",
]


def value_and_hypergradient(problem: Any, estimator: Any = None, lower_solver: Any = None) -> Callable[..., Estimate]:
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
    estimator = Implicit() if estimator is None else estimator
    if lower_solver is None:
        lower_solver = as_lower_solver(0.1) if problem.stochastic else LBFGS()
    solver = as_lower_solver(lower_solver)

    def evaluate(x: Any, y: Any, carry: Any = None, key: Any = 0) -> Estimate:
        step_key = as_step_key(key)
        x, y = jax.tree.map(jnp.asarray, (x, y))
        upper, lower = problem.draw_upper(step_key), problem.draw_lower(step_key)
        start: LowerState = solver.init(y)
        if carry is None:
            carry = estimator.init(lower, x, y)
        return estimator(upper, lower, Inner(solver, lower), x, start, carry)

    return evaluate
