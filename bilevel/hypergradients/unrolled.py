"""Iterative differentiation: the hypergradient of the lower solver's last iterate, seen as a function of x."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel._module import hyperparameters
from bilevel.hypergradients._base import Estimate, lower_metrics
from bilevel.level import Level
from bilevel.lower import LowerState, repeat
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
      mode: "reverse" or "forward". Forward carries p = dim x tangents through the run: for few upper variables, at a
        memory that does not grow with T.
      checkpoint: keep only (y_t, moments) of each step in reverse mode and recompute within it, with the gradient's own
        second derivative taken in mixed mode (`derivatives.mixed_mode_gradient`). False: plain reverse mode.

    Cost per call: reverse, T gradients and T (HVP + cross product), memory T copies of y and the optimiser's moments;
    forward, p T HVPs. Works through any differentiable optimiser. With Adam-like optimisers give `eps_root > 0`: the
    derivative of the square root at zero is infinite.

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
        reverse = self.mode == "reverse"
        if reverse and getattr(solver, "tol", None) is not None:
            raise ValueError(
                "Unrolled differentiates through the lower solver's loop, whose length must be fixed: set its tol=None "
                "(a number of steps), or take an implicit estimator."
            )
        level = lower.mixed_mode() if reverse and self.checkpoint else lower
        run = solver if self.last is None else self._truncated(solver, level, x, start)

        def objective(x: PyTree) -> tuple[jax.Array, LowerState]:
            found = run(level, x, start)
            return upper(x, found.y), found

        if reverse:
            (value, found), gradient = jax.value_and_grad(objective, has_aux=True)(x)
        else:
            (value, found), gradient = _forward_gradient(objective, x)
        return Estimate(value, gradient, found, carry, lower_metrics(lower, x, found.y))

    def _truncated(self, solver: Any, level: Level, x: PyTree, start: LowerState) -> Any:
        """The last steps of the run alone, which begin where the others, not differentiated, have ended."""
        if not hasattr(solver, "advance"):
            raise ValueError(
                f"Unrolled(last={self.last}) differentiates the last steps of the lower solver and needs one made of "
                f"steps: lower.GradientDescent(...) or lower.MomentumSGD(...), not {type(solver).__name__}."
            )
        if self.last > solver.steps:
            raise ValueError(
                f"Unrolled(last={self.last}) differentiates {self.last} steps but the lower solver takes "
                f"{solver.steps}: raise steps or lower last."
            )
        first = solver.steps - self.last
        middle = repeat(solver, level, x, solver.begin(x, start), 0, first)
        return lambda level, x, _: solver.end(repeat(solver, level, x, middle, first))


def OneStep() -> Unrolled:
    """Differentiate the last step of the lower solver only: F_x + (d_x Phi)' F_y.

    With gradient descent of step eta: F_x - eta f_xy F_y. The bias is at most a multiple of rho / (1 - rho) for a
    contraction rho, and vanishes for superlinear solvers.

    Reference: Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms", NeurIPS 2023.
    """
    return Unrolled(last=1)


def _forward_gradient(objective: Any, x: PyTree) -> Any:
    """Gradient by one tangent per coordinate of x, all of them carried through one run."""
    flat, unravel = jax.flatten_util.ravel_pytree(x)

    def directional(direction: jax.Array) -> tuple[jax.Array, jax.Array, PyTree]:
        return jax.jvp(lambda flat: objective(unravel(flat)), (flat,), (direction,), has_aux=True)

    values, slopes, found = jax.vmap(directional, out_axes=(None, 0, None))(jnp.eye(flat.size, dtype=flat.dtype))
    return (values, found), unravel(slopes)
