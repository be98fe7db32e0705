"""What every hypergradient estimator takes and gives."""

from __future__ import annotations

from typing import Any, Generic, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._arguments import Named
from bilevel._convolutions import in_canonical_order
from bilevel._module import state
from bilevel.level import Level
from bilevel.lower import LowerState, repeat
from bilevel.typing import LowerSolver, Metrics, PyTree, Scalar, X


@state
class Estimate(Named, Generic[X]):
    """What an estimator returns.

    Attributes:
      value: F(x, y) at the y found.
      gradient: the estimate of dF(x, y*(x))/dx, shaped like x.
      lower: the lower solver's new state; `lower.y` is the y found.
      carry: what the estimator keeps for the next outer step (warm start of the linear system, preconditioner).
      metrics: scalars by name, such as `lower_residual` = |f_y(x, y)|.
    """

    value: Scalar
    gradient: X
    lower: LowerState
    carry: PyTree
    metrics: Metrics

    def __repr__(self) -> str:
        metrics = ", ".join(self.metrics) if isinstance(self.metrics, dict) else self.metrics
        return (
            f"Estimate(value={self.value}; .gradient is the hypergradient, without any jax.grad; .lower and .carry go "
            f"back into the next call, .lower.y is the lower solution; .metrics: {metrics})"
        )


class Estimator(Protocol):
    """An estimator of the hypergradient of h(x) = F(x, y*(x)).

    A call runs the lower solver, `solver(lower, x, state) -> state`, or differentiates through it. One that takes a
    part of y which the solver's rule never moves for a constant says `through = True`; others are refused with such a
    rule.
    """

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """The carry before the first call: what is kept between outer steps."""

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate[Any]:
        """The estimate at x, the lower solver beginning at `start`."""


def first_carry(estimator: Estimator, lower: Level, x: PyTree, start: LowerState) -> PyTree:
    """The carry before the first call, in the form that calls return.

    An estimator that carries derivatives of the lower solver's whole state has `begin(lower, x, start)` for it.
    """
    begin = getattr(estimator, "begin", None)
    return estimator.init(lower, x, start.y) if begin is None else begin(lower, x, start)


def last_steps(
    owner: str, last: int, solver: Any, level: Level, x: PyTree, start: LowerState, keep: int | str | None = None
) -> tuple[Any, LowerState]:
    """(the last steps of the lower solver's run as a solver, where they begin): the others are not differentiated.

    Args:
      owner: the estimator, for its errors.
      last: how many steps.
      solver, level, x, start: of the run.
      keep: how many of their states are kept in reverse mode, as in `lower.repeat`.
    """
    if not hasattr(solver, "advance"):
        raise ValueError(
            f"{owner}(last={last}) differentiates the last steps of the lower solver and needs one made of "
            f"steps: lower.GradientDescent(...) or lower.MomentumSGD(...), not {type(solver).__name__}."
        )
    if last > solver.steps:
        raise ValueError(
            f"{owner}(last={last}) differentiates {last} steps but the lower solver takes "
            f"{solver.steps}: raise steps or lower last."
        )
    first = solver.steps - last
    middle = repeat(solver, level, x, solver.begin(x, start), 0, first)
    return (lambda level, x, state: solver.end(repeat(solver, level, x, state, first, keep=keep))), middle


def check_estimator(owner: str, estimator: Any) -> None:
    """Raise a sentence where this is no estimator: a class, a constructor, a linear or a lower solver, a rule."""
    if isinstance(estimator, type) or (callable(estimator) and hasattr(estimator, "__name__")):
        name = getattr(estimator, "__name__", "")
        raise TypeError(f"{owner} was given {name} itself as its estimator: make one, hypergradients.{name}().")
    if hasattr(estimator, "init") and callable(estimator) and not type(estimator).__module__.startswith(_OTHERS):
        return
    name = type(estimator).__name__
    if type(estimator).__module__.startswith("bilevel.lower"):
        raise TypeError(
            f"{owner} takes an estimator of bilevel.hypergradients here, such as hypergradients.Implicit(), and {name} "
            f"is a lower solver: give it by name, lower_solver=lower.{name}(...)."
        )
    kind = "linear solver" if type(estimator).__module__.startswith("bilevel.linear") else "other thing"
    raise TypeError(
        f"{owner} takes an estimator of bilevel.hypergradients, and {name} is a{'n' if kind[0] == 'o' else ''} {kind}: "
        f"write hypergradients.Implicit(linear_solver=linear.{name}(...))."
        if kind == "linear solver"
        else f"{owner} takes an estimator of bilevel.hypergradients, such as hypergradients.Implicit(), not a {name}."
    )


_OTHERS = ("bilevel.linear", "bilevel.lower", "bilevel.solvers", "optax")


def lower_metrics(lower: Level, x: PyTree, y: PyTree) -> Metrics:
    """`lower_loss` and `lower_residual` at y: f, which may be undefined where its gradient is not, and |f_y|."""
    if lower.mixed:
        return {"lower_loss": lower(x, y), "lower_residual": derivatives.norm(lower.gradient(x, y))}
    value, gradient = jax.value_and_grad(lower, argnums=1)(x, y)
    return {"lower_loss": value, "lower_residual": derivatives.norm(gradient)}


def central_difference(lower: Level, x: PyTree, y: PyTree, v: PyTree, radius: Any) -> PyTree:
    """f_xy v by [f_x(x, y + e v) - f_x(x, y - e v)] / (2 e), e = radius / |v|; None: by a derivative."""
    if radius is None:
        return derivatives.cross_product(lower, x, y, v)
    length = derivatives.norm(v)
    e = radius / jnp.maximum(length, jnp.finfo(length.dtype).tiny ** 0.5)

    def beside(sign: Any) -> PyTree:
        return jax.grad(lower)(x, optax.tree.cast_like(optax.tree.add_scale(y, sign * e, v), y))

    # A loop of two rounds: the gradient is compiled once.
    sides = jax.lax.map(in_canonical_order(beside), jnp.asarray([1, -1], e.dtype))
    difference = jax.tree.map(lambda pair: pair[0] - pair[1], sides)
    return optax.tree.scale(1 / (2 * e), difference)


def check_radius(owner: str, radius: Any) -> None:
    """Raise a sentence where a perturbation's length is not positive (or None)."""
    if isinstance(radius, float) and not radius > 0:
        what = "the perturbation's length is positive, or None for the exact product."
        raise ValueError(f"{owner}(radius={radius!r}): {what}")
