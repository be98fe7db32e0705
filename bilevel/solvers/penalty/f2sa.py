"""F2SA, F2BA and the central difference: hypergradients from two lower solves and first derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import constructor, hyperparameters
from bilevel.keys import StepKey
from bilevel.lower import LBFGS, GradientDescent, LowerState, as_lower_solver
from bilevel.optimizers import residual, spectral
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import report
from bilevel.solvers.penalty._schedule import Continuation, Polynomial, as_schedule
from bilevel.solvers.penalty._value import Tilted, ValueMethod, ValueState
from bilevel.typing import LowerSolver, Metrics, PyTree, Scalar


@hyperparameters
class F2SA(ValueMethod):
    """The fully first-order hypergradient, a finite difference in nu = 1 / c of v_nu(x) = min over y of f + nu F.

        one-sided:  y = argmin f + nu F,   z = argmin f
                    h(x) = F_x(x, y) + c (f_x(x, y) - f_x(x, z))                                      error O(1 / c)
        central:    y = argmin f + nu F,   z = argmin f - nu F
                    h(x) = (F_x(x, y) + F_x(x, z)) / 2 + (c / 2) (f_x(x, y) - f_x(x, z))              error O(1 / c^2)
        x <- Proj_X(x + upper_optimizer(h))

    y and z start where they ended; on minibatches both solves see the same batches, because their difference is
    multiplied by c.

    Problem class: f strongly convex in y over a simple set Y. One-sided, the minimiser of f need not be unique; the
    central difference needs strong convexity, for f - nu F is unbounded where f is flat. Oracle calls a step: 2 lower
    solves, 2 gradients of F and 2 of f in x.

    Attributes:
      central: the central difference.
      lower_solver: for both solves; None: L-BFGS to a tolerance on full batches, `lower_steps` steps of length 1 / (2
        L) on minibatches. `lower.GradientDescent(step, 1)` is the single loop.
      lower_steps: see there.
      upper_optimizer: an optax rule or a step size; None: `optimizers.spectral()` on full batches, Adam(0.01) on
        minibatches.
      penalty: c (lambda in the publications), a number or a schedule.

    The reference implementations take steps of y with f's gradient at z in one place; here it is at y.

    References: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel Optimization", ICML 2023
    (F2SA); Chen, Ma, Zhang, "Near-Optimal Nonconvex-Strongly-Convex Bilevel Optimization with Fully First-Order
    Oracles", JMLR 2025 (F2BA); for differences of higher order arXiv 2509.02937 (F2SA-p).
    """

    central: bool = False
    lower_solver: Any = None
    lower_steps: int = 10
    upper_optimizer: Any = None
    penalty: Any = Polynomial(10.0, 1 / 3)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> ValueState:
        """Both lower variables start at y; with a lower solver and a plain penalty no second derivative is taken."""
        honours = ("project_upper", "project_lower")
        refuse(self, problem, x, honours=honours, instead="solvers.LVHBA, solvers.BLOCC or solvers.MEHA")
        start = y if self.lower_solver is None else as_lower_solver(self.lower_solver).init(y)
        measured = self.lower_solver is None or not isinstance(as_schedule(self.penalty), Polynomial)
        return self.begin(problem, x, y, key, lambda lam, y: {"y": start, "z": start}, measured)

    def step(self, problem: Problem, state: ValueState, key: StepKey) -> tuple[ValueState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        x, c, L = state.point[0], state.path.penalty, state.curvatures
        nu, low = 1 / c, -1 / c if self.central else 0.0
        solver, starts = self._solver(problem, L["f_yy"] + nu * L["F_yy"], state.inner)

        tilted, other = Tilted.of(lower, upper, nu), Tilted.of(lower, upper, low) if self.central else lower
        found, reference = solver(tilted, x, starts["y"]), solver(other, x, starts["z"])
        y, z = found.y, reference.y

        def value(x: PyTree) -> Scalar:
            if self.central:
                return (upper(x, y) + upper(x, z)) / 2 + c / 2 * (lower(x, y) - lower(x, z))
            return upper(x, y) + c * (lower(x, y) - lower(x, z))

        slope = jax.value_and_grad(value)(x)
        stationarity = residual(x, slope[1], problem.project_upper)

        middle = optax.tree.scale(0.5, optax.tree.add(y, z)) if self.central else y
        loss, upward = jax.value_and_grad(upper, argnums=1)(x, middle)
        gap, bias = lower(x, y) - lower(x, z), None
        if self.central:
            # To leading order what the difference quotient leaves out: even terms of F, odd terms of f.
            bias = jnp.abs((upper(x, y) + upper(x, z)) / 2 - loss) + jnp.abs(c / 2 * gap)
            gap = jnp.maximum(lower(x, y), lower(x, z)) - lower(x, middle)
        inner = jnp.maximum(*(residual(u, f.gradient(x, u), f.project) for f, u in ((tilted, y), (other, z))))
        steep = derivatives.norm(upward)
        settled = (stationarity + c * inner) / jnp.maximum(steep, 1e-30)
        ends = (y, z) if self.lower_solver is None else (found, reference)
        new = self.after(problem, state, key, slope, middle, dict(zip("yz", ends, strict=True)), settled)
        said = {"upper_loss": loss, "lower_residual": inner, "gap": gap, "penalty": c, "bias": bias, "slope": steep}
        return new, report(new.path, hypergradient_norm=jnp.maximum(stationarity, c * inner), **said)

    def _solver(
        self, problem: Problem, curvature: Any, inner: dict[str, PyTree]
    ) -> tuple[LowerSolver, dict[str, LowerState]]:
        """The lower solver and where its runs start: the default ones remember nothing but where they ended."""
        if self.lower_solver is not None:
            return as_lower_solver(self.lower_solver), inner
        tol = 3 * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(inner["y"]))).eps) ** 0.75
        if problem.stochastic:
            solver = GradientDescent(0.5 / jnp.maximum(curvature, 1e-12), self.lower_steps)
        else:
            solver = LBFGS(200, tol) if problem.project_lower is None else GradientDescent(spectral(), 500, tol)
        return solver, {name: solver.init(start) for name, start in inner.items()}


@constructor
def F2BA(lower_solver: Any = None, upper_optimizer: Any = None, penalty: Any = None, lower_steps: int = 10) -> F2SA:
    """F2BA: accurate lower solves and a constant penalty; by default one that doubles by stages, with extrapolation.

    The upper step does not depend on c, because min over y of F + c (f - v) is as smooth in x as h itself.
    """
    schedule = Continuation(settle=0.02, shrink=2.0) if penalty is None else penalty
    return F2SA(False, lower_solver, lower_steps, upper_optimizer, schedule)


@constructor
def CentralF2SA(
    lower_solver: Any = None, upper_optimizer: Any = None, penalty: Any = 300.0, lower_steps: int = 10
) -> F2SA:
    """The central difference (F2SA-p with p = 2), for strongly convex f: the same two solves, error O(1 / c^2)."""
    return F2SA(True, lower_solver, lower_steps, upper_optimizer, penalty)


@constructor
def SingleLoopF2SA(lower_step: float = 0.1, upper_optimizer: Any = 0.01, penalty: Any = None) -> F2SA:
    """F2SA with one lower step of each kind per upper step.

    c grows as k^(1/7) where both levels are noisy, k^(1/5) where the upper one is, k^(1/3) where none is.
    """
    schedule = Polynomial(10.0, 1 / 7) if penalty is None else penalty
    return F2SA(False, GradientDescent(lower_step, 1), 1, upper_optimizer, schedule)
