"""What the methods with inner solves and a gradient in x alone share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import curvature
from bilevel._module import state
from bilevel.constraints import Constraints
from bilevel.keys import StepKey
from bilevel.level import Level
from bilevel.optimizers import Move, spectral
from bilevel.problem import Problem
from bilevel.solvers.penalty import _base
from bilevel.solvers.penalty._base import Diagnosed, Reported
from bilevel.solvers.penalty._schedule import Continuation, Path, as_schedule
from bilevel.typing import PyTree


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
      point: (x, y), x the next trial and y the lower variable at the one before.
      seen: the x that y belongs to, where the last hypergradient was taken.
      inner: what each inner solve starts from, by name.
      upper: the upper step rule's memory.
      path: the penalty and what is extrapolated along it.
      scale, lam: the rows' scale and multipliers (empty without coupled constraints).
      curvatures: `f_yy` and `F_yy` at the start; one where the method does not ask for them.
    """

    point: PyTree
    seen: PyTree
    inner: dict[str, PyTree]
    upper: PyTree
    path: Path
    scale: jax.Array
    lam: jax.Array
    curvatures: dict[str, jax.Array]

    @property
    def here(self) -> tuple[PyTree, PyTree]:
        """The last x with its y."""
        return self.seen, self.point[1]


@functools.cache
def default_upper() -> optax.GradientTransformation:
    """The upper rule where batches are drawn."""
    return optax.adam(1e-2)


class ValueMethod(Diagnosed):
    """What the methods with inner solves share: their start, the step of x, and the state after it."""

    upper_optimizer: Any = None

    def move(self, problem: Problem) -> Move:
        """How x moves; by default without a step size on full batches, and by Adam(0.01) on minibatches."""
        default = default_upper() if problem.stochastic else spectral()
        return Move(default if self.upper_optimizer is None else self.upper_optimizer, problem.project_upper)

    def begin(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        key: StepKey,
        inner: Any = lambda rows, y: {},
        measured: bool = True,
    ) -> ValueState:
        """A start at (x, y).

        Args:
          inner: `(multipliers, y)`: what the inner solves start from.
          measured: estimate the curvatures, by second derivatives; False where nothing reads them: they are one.
        """
        upper, lower = problem.levels(key)
        rows = Constraints(lower, x, y).at(x, y)
        losses = {"f_yy": lambda y: lower(x, y), "F_yy": lambda y: upper(x, y)}
        curvatures = {
            name: curvature.hessian_norm(loss, y) if measured else jnp.ones((), jnp.result_type(*jax.tree.leaves(y)))
            for name, loss in losses.items()
        }
        lam = jnp.zeros((rows.count,), rows.dtype)
        path = as_schedule(self.penalty).init((x, y), _base.ratio(curvatures["F_yy"], curvatures["f_yy"]))
        return ValueState((x, y), x, inner(lam, y), self.move(problem).init(x), path, rows.scale, lam, curvatures)

    def after(
        self, problem: Problem, state: ValueState, key: StepKey, slope: Any, y: Any, inner: Any, settled: Any = jnp.inf
    ) -> ValueState:
        """The state after an upper step by `slope`, value and gradient at the state's x, where y was found.

        `settled`: the residual over |F_y| there. The step rule starts afresh where the penalty, and with it the
        objective, jumped.
        """
        move, x, (value, gradient) = self.move(problem), state.point[0], slope
        new, memory = move(gradient, state.upper, x, value=value, grad=gradient)
        path = self.advance(state.path, key, (x, y), settled)
        if isinstance(self.penalty, Continuation):
            jumped = path.penalty != state.path.penalty
            memory = jax.tree.map(lambda fresh, old: jnp.where(jumped, fresh, old), move.init(new), memory)
        return dataclasses.replace(state, point=(new, y), seen=x, inner=inner, upper=memory, path=path)
