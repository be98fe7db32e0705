"""What every solver is, and how it refuses what it cannot honour."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from bilevel.problem import Problem, ProblemError

PyTree = Any

_PARTS = {
    "constraint": "the coupled inequality constraint=",
    "equality": "the coupled equality constraint equality=",
    "project_upper": "the upper projection project_upper=",
    "project_lower": "the lower projection project_lower=",
    "prox_lower": "the nonsmooth lower term prox_lower=",
}


@runtime_checkable
class Solver(Protocol):
    """A bilevel method: two pure methods, and nothing else is needed to write a new one.

    `init(problem, x, y, key) -> state` makes a pytree of arrays with attributes `x` and `y`.
    `step(problem, state, key) -> (state, metrics)` is one outer iteration; `metrics` is a dictionary of scalars. `key` is a
    `data.StepKey`: `problem.draw_lower(key)` binds the step's batch, `key.random` is a key for `jax.random`.

    Optional: `status(state, metrics, tol) -> int32`, one of `Result`'s codes (0 to go on), asked after each step where
    `solve` was given a tolerance. `finish(problem, state, result, metrics, tol) -> (measures, result, sentence)`, called on the
    host after the last step with the last metrics: numbers for the history, the result to report, what to add to the reason.
    """

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> Any: ...

    def step(self, problem: Problem, state: Any, key: Any) -> tuple[Any, dict[str, jax.Array]]: ...


def scattered(y: PyTree, i: Any) -> PyTree:
    """Start number i = 1, 2, ... around y for an independent lower solve: noise of three sizes in turn, on y's scale. 0: y itself."""
    leaves, structure = jax.tree.flatten(y)
    spread = jnp.where(i == 0, 0.0, 0.3 * 3.0 ** (i % 3))
    moved = [
        leaf
        + spread
        * (1 + jnp.sqrt(jnp.mean(leaf**2)))
        * jax.random.normal(jax.random.fold_in(jax.random.key(i), j), leaf.shape, leaf.dtype)
        for j, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, moved)


def refuse(
    solver: Any, problem: Problem, x: PyTree, *, honours: tuple[str, ...] = (), simple: bool = False, instead: str = ""
) -> None:
    """Raise a `ProblemError` for each part of the problem that the solver does not honour.

    Args:
      solver: the solver, for its name.
      problem: the problem.
      x: the upper variable (None in a simple bilevel problem).
      honours: which of constraint, equality, project_upper, project_lower, prox_lower the solver treats.
      simple: whether it takes x0=None.
      instead: what to take instead, a sentence's end such as "solvers.LVHBA".
    """
    name = type(solver).__name__
    cure = f" Take {instead} instead." if instead else ""
    for part, what in _PARTS.items():
        if getattr(problem, part) is not None and part not in honours:
            raise ProblemError(f"{name} cannot honour {what} of the problem, and would ignore it.{cure}")
    if not simple and not jax.tree.leaves(x):
        raise ProblemError(
            f"{name} needs an upper variable: x0 is empty (a simple bilevel problem, where both levels own y).{cure}"
        )
