"""What every hypergradient estimator takes and gives."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from bilevel._module import state
from bilevel.lower import Inner, LowerState

PyTree = Any


@state
class Estimate:
    """What an estimator returns.

    Attributes:
      value: F(x, y) at the y found.
      gradient: the estimate of dF(x, y*(x))/dx, shaped like x.
      lower: the lower solver's new state; `lower.y` is the y found.
      carry: what the estimator keeps for the next outer step (warm start of the linear system, preconditioner).
      metrics: scalars by name, such as `lower_residual` = |f_y(x, y)|.
    """

    value: jax.Array
    gradient: PyTree
    lower: LowerState
    carry: PyTree
    metrics: dict[str, jax.Array]


class Estimator(Protocol):
    """An estimator of the hypergradient of h(x) = F(x, y*(x)).

    `init(lower, x, y) -> carry` makes what is kept between outer steps. The call runs the lower solver, `inner(x, state) -> state`,
    or differentiates through it, and returns an `Estimate`. `upper` and `lower` are `problem.Level`s: functions of (x, y).
    """

    def init(self, lower: Any, x: PyTree, y: PyTree) -> PyTree: ...

    def __call__(
        self, upper: Any, lower: Any, inner: Inner, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate: ...
