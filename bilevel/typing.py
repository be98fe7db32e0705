"""The words of the package's signatures: trees, scalars, losses, and what a lower solver and a solver are.

A `bilevel.Level` is one level with its batch bound, `Problem[X, Y]` and `Solution[X, Y]` carry the types of the upper
and the lower variable through `solve`, and everything else is one of the names below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax

if TYPE_CHECKING:
    from bilevel.keys import StepKey
    from bilevel.level import Level
    from bilevel.lower.steps import LowerState
    from bilevel.problem import Problem

__all__ = ["HostSolver", "LowerSolver", "Metrics", "PyTree", "Scalar", "Solver", "X", "Y"]

PyTree: TypeAlias = Any
"""Nested containers of arrays, as `jax.tree` takes them."""

Scalar: TypeAlias = jax.Array
"""An array without axes."""

Metrics: TypeAlias = dict[str, jax.Array]
"""What a step reports, by name."""

X = TypeVar("X")
"""The type of the upper variable."""

Y = TypeVar("Y")
"""The type of the lower variable."""

Project: TypeAlias = Callable[[PyTree], PyTree]
"""A projection onto a set, `z -> z`."""


class LowerSolver(Protocol):
    """How y*(x) is found: `init(y)` makes the state of a run, the call runs it on a level at x."""

    def init(self, y: PyTree) -> LowerState:
        """The state of a run that starts at y."""

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """The state at the end of a run from `state`."""


@runtime_checkable
class Solver(Protocol):
    """A bilevel method: two pure methods, and nothing else is needed to write a new one.

    `init(problem, x, y, key) -> state` makes a pytree of arrays with attributes `x` and `y`. `step(problem, state, key)
    -> (state, metrics)` is one outer iteration; `metrics` is a dictionary of scalars. `key` is a `data.StepKey`:
    `problem.levels(key)` binds the step's batches, `key.random` is a key for `jax.random`.

    Optional: `status(state, metrics, tol) -> int32`, one of `Result`'s codes (0 to go on), asked after each step where
    `solve` was given a tolerance. `multipliers(problem, state)`: those of the constraints by name, for the solution.
    """

    def init(self, problem: Problem[Any, Any], x: PyTree, y: PyTree, key: StepKey) -> Any:
        """The state before the first step."""

    def step(self, problem: Problem[Any, Any], state: Any, key: StepKey) -> tuple[Any, Metrics]:
        """One outer iteration."""


@runtime_checkable
class HostSolver(Protocol):
    """A method that runs on the host, over programs of its own: for small problems, and for engines of others.

    `init` is a `Solver`'s. `search(problem, state, key) -> iterator of (state, metrics)` goes on from a state, that of
    `init` or one of an earlier run: the state after each step, a pytree of arrays of the same shapes with attributes
    `x` and `y`, the best so far, and a dictionary of scalars. `key` is the run's `data.StepKey`; what a step draws
    should be a function of it and of the step's number, which the state has to know: then a run that was interrupted
    ends as one that was not. `status(state, metrics, tol)` is one of `Result`'s codes, asked after each step, with a
    tolerance or None; not 0 ends the run.

    Optional: `most_steps`, the most steps that a run can have. `towards(state, x, y)`, a state that goes on from a
    point lower than the best, which the certificate found: a run of `solve` with a tolerance is not over there.
    """

    def init(self, problem: Problem[Any, Any], x: PyTree, y: PyTree, key: StepKey) -> Any:
        """The state before the first step."""

    def search(self, problem: Problem[Any, Any], state: Any, key: StepKey) -> Iterator[tuple[Any, Metrics]]:
        """State and metrics after each step."""

    def status(self, state: Any, metrics: Metrics, tol: float | None) -> int:
        """How the run stands."""
