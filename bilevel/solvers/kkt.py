"""Nested methods for lower levels that are constrained, or whose Hessian may be singular."""

from __future__ import annotations

from typing import Any

from bilevel._module import constructor
from bilevel.hypergradients import ActiveSet, LeastSquares, NullSpace
from bilevel.lower import Accurate, EqualityDescent, ScaledDescent
from bilevel.optimizers import spectral
from bilevel.solvers.nested import HypergradientDescent

__all__ = ["GALET", "GAM", "AiPOD"]


@constructor
def GALET(
    lower_steps: int = 20,
    lower_step: float | None = None,
    linear_steps: int = 20,
    linear_step: float | None = None,
    upper_optimizer: Any = None,
) -> HypergradientDescent:
    """Alternating descent for a convex lower level that satisfies the PL inequality: its Hessian may be singular.

        y <- `lower_steps` steps y - f_y / L;    v <- `linear_steps` steps v - rho f_yy (f_yy v - F_y)
        x <- Proj_X(x + upper_optimizer(F_x - f_xy v))

    Steps that are None are 1 / L and 1 / L^2 with L = |f_yy|. `upper_optimizer`: None: `optimizers.spectral()`, which
    needs full batches. The theory asks for a lower level that is convex in y besides PL: v's steps are descent on a
    least-squares problem at any f_yy, but where it has negative eigenvalues y need not be a minimum. See
    `hypergradients.LeastSquares` (Xiao, Lu, Chen, NeurIPS 2023).
    """
    rule = spectral() if upper_optimizer is None else upper_optimizer
    return HypergradientDescent(LeastSquares(linear_steps, linear_step), ScaledDescent(lower_steps, lower_step), rule)


@constructor
def GAM(
    eps: float = 1e-4, upper_optimizer: Any = None, inner_steps: int = 100, rounds: int = 12
) -> HypergradientDescent:
    """Implicit differentiation through the lower level's KKT system: small lower levels, any convex constraints.

    Where it is exact: f strongly convex in y, linearly independent gradients of the active constraints, and none weakly
    active (multiplier and slack both zero) at the solution. The gradient then is that of x -> F(x, y*(x)) up to the
    lower solve's accuracy, the multipliers are those of the lower level without a bias of any penalty, and a few steps
    end the run. At a weakly active constraint h has a kink, and the shortest of two one-sided gradients is taken.
    Bounds of y are to be stated as constraints.

    The lower level is solved to high accuracy (`lower.Accurate`) with `rounds` updates of the multipliers, each a
    minimisation of at most `inner_steps` steps. `upper_optimizer`: None: `optimizers.spectral()`, which needs full
    batches. See `hypergradients.ActiveSet` (Xu, Zhu, AAAI 2023).
    """
    rule = spectral() if upper_optimizer is None else upper_optimizer
    return HypergradientDescent(ActiveSet(eps), Accurate(inner_steps, rounds), rule)


@constructor
def AiPOD(
    lower_steps: int = 5,
    lower_step: float | None = None,
    linear_steps: int = 50,
    skip: float = 1.0,
    upper_optimizer: Any = None,
) -> HypergradientDescent:
    """Alternating projected descent under an equality A y + h(x) = b; with `skip` < 1 E-AiPOD.

    Each step takes `lower_steps` projected gradient steps (`lower.EqualityDescent`; `lower_step` None: 1 / L, the
    publication takes 5 steps of 0.1) and at most `linear_steps` of CG on the null space of A. `upper_optimizer`: None:
    `optimizers.spectral()`, which needs full batches. See `hypergradients.NullSpace` (Xiao, Shen, Yin, Chen, AISTATS
    2023).
    """
    rule = spectral() if upper_optimizer is None else upper_optimizer
    return HypergradientDescent(NullSpace(linear_steps), EqualityDescent(lower_steps, lower_step, skip), rule)
