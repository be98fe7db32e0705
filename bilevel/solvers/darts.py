"""DARTS: differentiable architecture search, which takes the upper step first."""

from __future__ import annotations

from typing import Any

import jax
import optax

from bilevel._module import constructor, hyperparameters, state
from bilevel.hypergradients.finite_difference import Ahead, FiniteDifference, FirstOrder
from bilevel.keys import StepKey
from bilevel.lower import GradientDescent, LowerState, MomentumSGD, as_lower_solver
from bilevel.optimizers import Move, check_optimizer, coupled_adam, is_rule, residual, withdraws
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import refuse, within
from bilevel.typing import Metrics, PyTree

__all__ = ["DARTS", "UpperFirst"]


@state
class UpperFirstState:
    """x and y, and the memories of the lower solver and of the upper step rule."""

    x: PyTree
    y: PyTree
    memory: PyTree
    upper: PyTree


@hyperparameters
class UpperFirst:
    """The upper step first, along an estimate at the incoming y; then the lower level at the new x, on the same batch.

        x_{k+1} = project_upper(x_k + upper_optimizer(hypergradient(x_k, y_k)))
        y_{k+1} = lower_solver(x_{k+1}, y_k)

    Attributes:
      hypergradient: an estimator at the incoming y: `hypergradients.FiniteDifference` or `FirstOrder`.
      lower_solver: anything that `lower.as_lower_solver` accepts.
      upper_optimizer: an optax rule or a step size. One that withdraws steps is refused: the lower level has moved on.

    Metrics: `upper_loss`, `hypergradient_norm` (with a projection |x - project(x - gradient)|), and the estimator's
    (`lower_residual` = |f_y|). With a tolerance a run has converged when both are at most tol.
    """

    hypergradient: Ahead
    lower_solver: Any
    upper_optimizer: float | optax.GradientTransformation

    def __post_init__(self) -> None:
        if not hasattr(self.hypergradient, "at"):
            raise TypeError(
                "UpperFirst estimates at the incoming y, ahead of the lower solver: take "
                f"hypergradients.FiniteDifference or FirstOrder, not {type(self.hypergradient).__name__}."
            )
        check_optimizer("UpperFirst", "upper_optimizer", self.upper_optimizer)
        as_lower_solver(self.lower_solver)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> UpperFirstState:
        """The state before the first step."""
        refuse(self, problem, x, honours=("project_upper", "project_lower", "prox_lower"))
        memory = Move(self.upper_optimizer).init(x)
        if withdraws(memory):
            raise ProblemError(
                "UpperFirst (DARTS) cannot withdraw an upper step, since the lower level has moved with it: take a "
                "step size or an optax rule such as optax.adam(1e-2) as upper_optimizer."
            )
        return UpperFirstState(x, y, as_lower_solver(self.lower_solver).init(y).memory, memory)

    def step(self, problem: Problem, state: UpperFirstState, key: StepKey) -> tuple[UpperFirstState, Metrics]:
        """One outer iteration."""
        upper, lower = problem.levels(key)
        solver, start = as_lower_solver(self.lower_solver), LowerState(state.y, state.memory)

        value, gradient, metrics = self.hypergradient.at(upper, lower, solver, state.x, start)
        x, memory = Move(self.upper_optimizer, upper.project)(
            gradient, state.upper, state.x, value=value, grad=gradient
        )
        found = solver(lower, x, start)

        norm = residual(state.x, gradient, upper.project)
        return (
            UpperFirstState(x, found.y, found.memory, memory),
            {"upper_loss": value, "hypergradient_norm": norm, **metrics},
        )

    def status(self, state: UpperFirstState, metrics: Metrics, tol: Any) -> jax.Array:
        """CONVERGED where the hypergradient and the lower level's residual are within the tolerance."""
        if "lower_residual" not in metrics:
            raise ValueError(
                f"{type(self.hypergradient).__name__} does not measure the lower level's residual, so a tolerance "
                "cannot be "
                "met: leave tol out and give the number of steps."
            )
        return within(tol, metrics, "hypergradient_norm", "lower_residual")


@constructor
def DARTS(
    order: int | str = 2,
    lower_optimizer: Any = None,
    upper_optimizer: Any = None,
    *,
    weight_decay: float | None = None,
    virtual_step: float | None = None,
    radius: float = 0.01,
) -> UpperFirst:
    """Differentiable architecture search: an upper step on a validation batch, then one lower step at the *new* x.

        y' = U(f_y(x, y))                            the virtual step: the lower solver's own rule, without clipping
        x <- upper_optimizer(dF(x, y')/dx)           F on a fresh batch of the upper data, f on that of the lower step
        y <- one step of lower_optimizer at the new x, on the same batch of the lower data

    `order` says how the virtual step is differentiated:

    - 1: not at all, y' = y and the gradient is F_x(x, y) (`hypergradients.FirstOrder`); 1 upper and 1 lower gradient;
    - 2: by a central difference of f_x at y +- radius v/|v| (`hypergradients.FiniteDifference`); 1 upper gradient, 2
      lower gradients in y and 2 in x. The published method;
    - "exact": by automatic differentiation (`FiniteDifference(radius=None)`); in place of the 2 gradients in x one
      cross product.

    The virtual step contains the momentum buffer, the weight decay and the schedule, and not the clipping, as in the
    authors' code for convolutional cells (that for recurrent cells clips it). The scheme's fixed point depends on the
    virtual step: it is the bilevel optimum neither for order 1 nor in general for the other two.

    Args:
      order: 1, 2 or "exact".
      lower_optimizer: None: `MomentumSGD(weight_decay=weight_decay)`. A step size or an optax rule (of which one step
        is taken; clipping that is chained into it cannot be left out of the virtual step), a `MomentumSGD`, or any
        lower solver.
      upper_optimizer: an optax rule or a step size; None: `coupled_adam()`, Adam(0.5, 0.999) with step 3e-4 and a
        coupled L2 of 1e-3.
      weight_decay: of the default lower rule (3e-4 where None): a leaf, so that another value does not recompile.
      virtual_step: the step xi of a plain virtual update y' = y - xi f_y instead of the lower solver's own; 0 is order
        1.
      radius: of the central difference; the paper's default.

    For orders 2 and "exact" the metrics have `upper_loss` = F(x, y') and `lower_residual` = |f_y| at y or y'. Order 1
    does not measure `lower_residual`, and refuses a tolerance.

    Reference: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, algorithm 1 and equations 7
    and 8.
    """
    if order not in (1, 2, "exact") or isinstance(order, bool):
        raise ValueError(f"DARTS(order={order!r}): the order is 1, 2 or 'exact'.")
    if virtual_step is not None and not isinstance(virtual_step, (jax.Array, jax.core.Tracer)) and virtual_step < 0:
        raise ValueError(
            f"DARTS(virtual_step={virtual_step!r}): the step is not negative, or None for the lower solver's own."
        )
    if lower_optimizer is None:
        solver: Any = MomentumSGD() if weight_decay is None else MomentumSGD(weight_decay=weight_decay)
    elif weight_decay is not None:
        raise ValueError(
            "DARTS(weight_decay=...) is the default lower rule's; with a lower_optimizer put it in there, such as "
            "lower_optimizer=lower.MomentumSGD(0.1, weight_decay=1e-3)."
        )
    elif is_rule(lower_optimizer) or isinstance(lower_optimizer, (float, int, jax.Array)):
        solver = GradientDescent(lower_optimizer, 1)
    else:
        solver = as_lower_solver(lower_optimizer)
    upper = coupled_adam() if upper_optimizer is None else upper_optimizer
    estimators: dict[Any, Ahead] = {
        1: FirstOrder(),
        2: FiniteDifference(virtual_step, radius),
        "exact": FiniteDifference(virtual_step, None),
    }
    return UpperFirst(estimators[order], solver, upper)
