"""What the methods with inner solves and a gradient in x alone share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import optimizers
from bilevel._module import state
from bilevel.level import Level
from bilevel.lower import LBFGS, GradientDescent
from bilevel.optimizers import as_optimizer
from bilevel.problem import Problem
from bilevel.solvers.penalty import _base
from bilevel.solvers.penalty._constraints import Constraints
from bilevel.solvers.penalty._schedule import Path, Reported, as_schedule

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Tilted(Level):
    """f + nu F as a lower level; both draw fresh batches where f does, so that two tilts see the same batches."""

    upper: Level | None = None
    nu: Any = 0.0

    @classmethod
    def of(cls, lower: Level, upper: Level, nu: Any) -> Tilted:
        """The lower level tilted by nu times the upper one."""
        return cls(**vars(lower), upper=upper, nu=nu)

    def _at(self, x: PyTree, y: PyTree, batch: PyTree) -> jax.Array:
        return super()._at(x, y, batch) + self.nu * self.upper(x, y)  # type: ignore[misc]

    def redraw(self, i: Any, total: int) -> Tilted:
        """The tilt of both levels' batches of inner step i."""
        lower: Any = super().redraw(i, total)
        return dataclasses.replace(lower, upper=self.upper.redraw(i, total))  # type: ignore[union-attr]


@state
class ValueState(Reported):
    """The state of a method with inner solves.

    Attributes:
      point: the iterate (x, y).
      inner: what each inner solve starts from, by name.
      upper: the upper optimiser's memory.
      path: the penalty and what is extrapolated along it.
      scale, lam: the rows' scale and multipliers (empty without coupled constraints).
      curvatures: estimates by name.
    """

    point: PyTree
    inner: dict[str, PyTree]
    upper: PyTree
    path: Path
    scale: jax.Array
    lam: jax.Array
    curvatures: dict[str, jax.Array]


@functools.cache
def default_upper() -> optax.GradientTransformation:
    """The upper rule where batches are drawn."""
    return optax.adam(1e-2)


def upper_rule(problem: Problem, given: Any) -> Any:
    """The upper optimiser: the one given, else steps without a step size on full batches and Adam(0.01) on
    minibatches."""
    if given is not None:
        return as_optimizer(given)
    return as_optimizer(default_upper() if problem.stochastic else optimizers.spectral())


def lower_rule(problem: Problem, given: Any, curvature: Any, steps: int, dtype: Any) -> Any:
    """The lower solver: the one given, else L-BFGS (with a projection: spectral projected gradients) on full batches
    and `steps` steps of length 1 / (2 curvature) on minibatches."""
    if given is not None:
        return given
    if problem.stochastic:
        return GradientDescent(0.5 / jnp.maximum(curvature, 1e-12), steps)
    tol = 3 * float(jnp.finfo(dtype).eps) ** 0.75
    return LBFGS(200, tol) if problem.project_lower is None else GradientDescent(optimizers.spectral(), 500, tol)


def begin(
    problem: Problem, x: PyTree, y: PyTree, key: Any, schedule: Any, rule: Any, inner: dict[str, PyTree]
) -> ValueState:
    """A start at (x, y), with the curvatures `f_yy` and `F_yy`."""
    upper, lower = problem.levels(key)
    rows = Constraints(problem, lower, x, y).at(x, y)
    curvatures = {"f_yy": _base.curvature(lambda y: lower(x, y), y), "F_yy": _base.curvature(lambda y: upper(x, y), y)}
    zeros = jnp.zeros((rows.count,), rows.dtype)
    return ValueState(
        (x, y),
        inner,
        rule.init(x),
        as_schedule(schedule).init((x, y), _base.ratio(curvatures["F_yy"], curvatures["f_yy"])),
        rows.scale,
        zeros,
        curvatures,
    )


def descend(
    problem: Problem, rule: Any, state: ValueState, value: Any, gradient: PyTree
) -> tuple[PyTree, PyTree, jax.Array]:
    """One upper step: the new x, the optimiser's memory, and the gradient's norm (projected where X is a set)."""
    x = state.point[0]
    updates, memory = rule.update(gradient, state.upper, x, value=value, grad=gradient)
    new = optax.apply_updates(x, updates)
    if problem.project_upper is None:
        return new, memory, _base.norm(gradient)
    mapped = optax.tree.sub(x, problem.project_upper(optax.tree.sub(x, gradient)))
    return problem.project_upper(new), memory, _base.norm(mapped)


def advance(
    schedule: Any, rule: Any, state: ValueState, key: Any, point: PyTree, memory: PyTree, settled: Any, at: PyTree
) -> tuple[Path, PyTree]:
    """The path after this step, and the optimiser's memory: a new one where the penalty, and with it the objective,
    changed.

    `at`: the point that `settled` was measured at, which is the one before the step.
    """
    path = as_schedule(schedule).advance(state.path, key.step, at, settled)
    if getattr(schedule, "extrapolate", None) is None:
        return path, memory
    fresh, changed = rule.init(point[0]), path.penalty != state.path.penalty
    return path, jax.tree.map(lambda new, old: jnp.where(changed, new, old), fresh, memory)
