"""DARTS: differentiable architecture search as a nested method that takes the upper step first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from bilevel._module import hyperparameters
from bilevel.hypergradients import Unrolled
from bilevel.hypergradients.finite_difference import FiniteDifference, FirstOrder
from bilevel.lower import GradientDescent, LowerState, as_lower_solver
from bilevel.solvers.nested import HypergradientDescent

PyTree = Any


@hyperparameters
class MomentumSGD:
    """A lower solver: `steps` steps of gradient descent with clipping, weight decay and momentum, whose numbers are leaves.

        g <- clip(f_y(x, y)) + weight_decay y,    m <- momentum m + g,    y <- y - learning_rate m

    An optax rule is a closure, and another weight decay another program; here numbers are data, so that a sweep over
    `weight_decay` is a `vmap` and a regularisation that grows during a run (`regularizers.adaptive`) compiles once.

    Attributes:
      learning_rate: a number, or an optax schedule of the steps taken (static: another schedule is another program).
      momentum, weight_decay: the numbers above.
      clip: the norm that f_y is clipped to over all of y, before the weight decay is added; None: no clipping.
      steps: steps per call, each on a fresh batch where the level's data are drawn.

    Defaults: the convolutional search of Liu, Simonyan, Yang, ICLR 2019 (whose rate falls to 0.001 by a cosine:
    `optax.cosine_decay_schedule(0.025, steps, 0.04)`).
    """

    learning_rate: float | Callable[[Any], Any] = 0.025
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float | None = 5.0
    steps: int = 1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "momentum", "weight_decay", "clip"):
            value = getattr(self, name)
            if isinstance(value, float) and (value < 0 or (value == 0 and name in ("learning_rate", "clip"))):
                sign = "positive" if name in ("learning_rate", "clip") else "not negative"
                raise ValueError(f"MomentumSGD({name}={value!r}): the number is {sign}.")

    def _descent(self) -> GradientDescent:
        rule = optax.chain(
            optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip),  # type: ignore[arg-type]
            optax.add_decayed_weights(self.weight_decay),
            optax.sgd(self.learning_rate, momentum=self.momentum),
        )
        return GradientDescent(rule, self.steps)

    def init(self, y: PyTree) -> LowerState:
        """y with an empty momentum buffer."""
        return self._descent().init(y)

    def __call__(self, lower: Any, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        return self._descent()(lower, x, state)

    def virtual(self) -> MomentumSGD:
        """One step of the rule without clipping: DARTS's virtual step. Its memory has the same form."""
        return dataclasses.replace(self, clip=None, steps=1)


@functools.cache
def coupled_adam(
    learning_rate: float = 3e-4, b1: float = 0.5, b2: float = 0.999, weight_decay: float = 1e-3
) -> optax.GradientTransformation:
    """Adam on the gradient of the loss plus (weight_decay / 2) |x|^2, DARTS's rule for the architecture.

    The decay goes through Adam's moments (coupled), unlike `optax.adamw`'s. Equal numbers give one and the same
    rule, so that solvers made with it share a compiled program.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate, b1=b1, b2=b2))


def DARTS(
    order: int | str = 2,
    lower_optimizer: Any = None,
    upper_optimizer: Any = None,
    *,
    weight_decay: float | None = None,
    virtual_step: float | None = None,
    radius: float = 0.01,
) -> HypergradientDescent:
    """Differentiable architecture search: an upper step on a validation batch, then one lower step at the *new* x.

        y' = U(f_y(x, y))                            the virtual step: the lower solver's own rule, without clipping
        x <- upper_optimizer(dF(x, y')/dx)           F on a fresh batch of the upper data, f on that of the lower step
        y <- one step of lower_optimizer at the new x, on the same batch of the lower data

    `order` says how the virtual step is differentiated:

    - 1: not at all, y' = y and the gradient is F_x(x, y) (`hypergradients.FirstOrder`); 1 upper and 1 lower gradient;
    - 2: by a central difference of f_x at y +- radius v/|v| (`hypergradients.FiniteDifference`); 1 upper gradient, 2 lower
      gradients in y and 2 in x. The published method;
    - "exact": by automatic differentiation (`hypergradients.Unrolled`); in place of the 2 gradients in x one cross product.

    The virtual step contains the momentum buffer, the weight decay and the schedule, and not the clipping, as in the
    authors' code for convolutional cells (that for recurrent cells clips it). The scheme's fixed point depends on the virtual
    step: it is the bilevel optimum neither for order 1 nor in general for the other two.

    Args:
      order: 1, 2 or "exact".
      lower_optimizer: None: `MomentumSGD(weight_decay=weight_decay)`. A step size or an optax rule (of which one step is taken;
        clipping that is chained into it cannot be left out of the virtual step), a `MomentumSGD`, or any lower solver.
      upper_optimizer: an optax rule or a step size; None: `coupled_adam()`, Adam(0.5, 0.999) with step 3e-4 and a coupled L2 of 1e-3.
      weight_decay: of the default lower rule (3e-4 where None): a leaf, so that another value does not recompile.
      virtual_step: the step xi of a plain virtual update y' = y - xi f_y instead of the lower solver's own; 0 is order 1.
      radius: of the central difference; the paper's default.

    For orders 2 and "exact" the metrics have `upper_loss` = F(x, y') and `lower_residual` = |f_y| at y or y'. Order 1 does not
    measure `lower_residual`, and refuses a tolerance.

    Reference: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, algorithm 1 and equations 7 and 8.
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
            "lower_optimizer=solvers.MomentumSGD(0.1, weight_decay=1e-3)."
        )
    elif isinstance(lower_optimizer, (float, int, jax.Array, optax.GradientTransformation)):
        solver = GradientDescent(lower_optimizer, 1)
    else:
        solver = as_lower_solver(lower_optimizer)
    upper = coupled_adam() if upper_optimizer is None else upper_optimizer
    estimator = {1: FirstOrder(), 2: FiniteDifference(virtual_step, radius), "exact": Unrolled()}[order]
    virtual = _PlainStep(virtual_step) if order == "exact" and virtual_step is not None else None
    return HypergradientDescent(estimator, solver, upper, upper_first=True, virtual_solver=virtual)


@hyperparameters
class _PlainStep:
    """y - step f_y(x, y), leaving the lower solver's memory alone; the step may be 0."""

    step: float

    def init(self, y: PyTree) -> LowerState:
        return LowerState(y, None)

    def __call__(self, lower: Any, x: PyTree, state: LowerState) -> LowerState:
        moved = optax.tree.add_scale(state.y, -self.step, lower.gradient(x, state.y))
        return LowerState(optax.tree.cast_like(moved, state.y), state.memory)
