"""Iterative differentiation: the hypergradient of the lower solver's last iterate, seen as a function of x."""

from __future__ import annotations

import dataclasses

import jax

from bilevel._module import hyperparameters
from bilevel.hypergradients._base import Estimate, last_steps, lower_metrics
from bilevel.hypergradients.forward import Forward
from bilevel.level import Level
from bilevel.lower import Identity, LowerState
from bilevel.optimizers import check_count
from bilevel.typing import LowerSolver, PyTree


@hyperparameters
class Unrolled:
    """The exact derivative of F(x, y_T(x)), where y_T is the result of T steps of the lower solver.

    In reverse mode: with y_{t+1} = Phi(y_t, x), a = F_y, G = F_x, and for t = T-1, ..., 0

        G <- G + (d_x Phi_t)' a,    a <- (d_y Phi_t)' a.

    Attributes:
      last: differentiate only the last K steps (truncated); None: all of them. With a strongly convex lower level the
        bias is O((1 - mu eta)^K). K = 1 is one-step differentiation.
      mode: "reverse", or "forward", which is `Forward(last)`: for few upper variables, at a memory that does not grow
        with T.
      checkpoint: keep only (y_t, moments) of each step in reverse mode and recompute within it, with the gradient's own
        second derivative taken in mixed mode (`derivatives.mixed_mode_gradient`). False: plain reverse mode.

    Cost per call: reverse, T gradients and T (HVP + cross product), memory T copies of y and the optimiser's moments;
    forward, p T HVPs. Works through any differentiable optimiser. Where a parameter's
    gradient is zero, rules that divide by its root (Adam, clipping by a norm) are differentiated as if the root had the
    derivative zero there; with `eps_root > 0` Adam's is what it is.

    References: Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017; Shaban
    et al., "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019; Kemaev et al., ICML 2025 (mixed mode).
    """

    last: int | None = None
    mode: str = "reverse"
    checkpoint: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("reverse", "forward"):
            raise ValueError(f"Unrolled(mode={self.mode!r}): the mode is 'reverse' or 'forward'.")
        rule = "the number of differentiated steps is a positive integer, or None for all"
        check_count("Unrolled", rule, last=self.last)

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """Nothing is kept."""
        return ()

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate:
        """The estimate at x."""
        if isinstance(solver, Identity):
            raise ValueError(
                "Unrolled differentiates through the steps of the lower solver, and lower.Identity takes none: its "
                "hypergradient would be F_x alone. Take an implicit estimator, hypergradients.Implicit()."
            )
        if self.mode == "forward":
            forward = Forward(self.last)
            estimate = forward(upper, lower, solver, x, start, forward.init(lower, x, start.y))
            return dataclasses.replace(estimate, carry=carry)
        if getattr(solver, "tol", None) is not None:
            raise ValueError(
                "Unrolled differentiates through the lower solver's loop, whose length must be fixed: set its tol=None "
                "(a number of steps), or take an implicit estimator."
            )
        solver = solver.differentiable() if hasattr(solver, "differentiable") else solver
        level, run = lower.mixed_mode() if self.checkpoint else lower, solver
        if self.last is not None:
            run, start = last_steps("Unrolled", self.last, solver, level, x, start)

        def objective(x: PyTree) -> tuple[jax.Array, LowerState]:
            found = run(level, x, start)
            return upper(x, found.y), found

        (value, found), gradient = jax.value_and_grad(objective, has_aux=True)(x)
        return Estimate(value, gradient, found, carry, lower_metrics(lower, x, found.y))


def OneStep() -> Unrolled:
    """Differentiate the last step of the lower solver only: F_x + (d_x Phi)' F_y.

    With gradient descent of step eta: F_x - eta f_xy F_y. The bias is at most a multiple of rho / (1 - rho) for a
    contraction rho, and vanishes for superlinear solvers.

    Reference: Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms", NeurIPS 2023.
    """
    return Unrolled(last=1)
