"""Nested methods: approximate y*(x), estimate the hypergradient, take an upper step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import hypergradients, linear
from bilevel._module import hyperparameters, state
from bilevel.hypergradients import Estimate, Estimator, Implicit, Unrolled
from bilevel.keys import StepKey
from bilevel.lower import LBFGS, GradientDescent, LowerState, as_lower_solver
from bilevel.optimizers import Move, accepted, check_optimizer, quasi_newton, residual, spectral, withdraws
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import linear_settled, refuse, within
from bilevel.typing import Metrics, PyTree, Scalar

__all__ = ["AID", "IMAML", "ITD", "T1T2", "HypergradientDescent", "OneStep", "TruncatedITD"]


@state
class NestedState:
    """Between two steps of a nested method.

    Attributes:
      x, y: the variables.
      trial: where the next hypergradient is taken: x, but for step rules that may withdraw a step.
      memory, carry, upper: what the lower solver, the estimator and the upper step rule remember.
      start: where cold lower solves begin; None where they are warm.
    """

    x: PyTree
    y: PyTree
    trial: PyTree
    memory: PyTree
    carry: PyTree
    upper: PyTree
    start: PyTree


@hyperparameters
class HypergradientDescent:
    """Descent on h(x) = F(x, y*(x)) with an estimated hypergradient.

        y_{k+1}  = lower_solver(x_k, y_k)
        x_{k+1}  = project_upper(x_k + upper_optimizer(hypergradient(x_k, y_{k+1})))

    Attributes:
      hypergradient: an estimator of `bilevel.hypergradients`.
      lower_solver: anything that `lower.as_lower_solver` accepts.
      upper_optimizer: an optax rule or a step size. Rules with a line search (`optax.lbfgs()`) are given h and its
        estimated gradient; they suit full batches. None: `optimizers.quasi_newton()`, or under a projection
        `optimizers.spectral()`, which need no step size and full batches.
      warm_start: start each lower solve at the last y (and its optimiser's moments); False: at y0 every time, as in
        meta-learning.

    Metrics: `upper_loss`, `hypergradient_norm` (with a projection |x - project(x - gradient)|), and the estimator's
    (`lower_residual` = |f_y|, `linear_residual`, `linear_iterations`). With a tolerance a run has converged when both
    `hypergradient_norm` and `lower_residual` are at most tol, the linear system (where there is one) is solved to
    tol or to a thousandth of F_y, and no negative curvature was met in it. What was in the way is said at the end.
    """

    hypergradient: Estimator = Implicit()
    lower_solver: Any = GradientDescent()
    upper_optimizer: float | optax.GradientTransformation | None = None
    warm_start: bool = True

    def __post_init__(self) -> None:
        if self.upper_optimizer is not None:
            check_optimizer("HypergradientDescent", "upper_optimizer", self.upper_optimizer)
        as_lower_solver(self.lower_solver)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> NestedState:
        """The state before the first step."""
        honours = getattr(self.hypergradient, "honours", ("project_lower", "prox_lower"))
        refuse(self, problem, x, honours=("project_upper", *honours), instead="solvers.LVHBA or solvers.MEHA")
        memory = as_lower_solver(self.lower_solver).init(y).memory
        carry = self.hypergradient.init(problem.draw_lower(key), x, y)
        upper = self._move(problem).init(x)
        if problem.stochastic and withdraws(upper):
            raise ProblemError(
                "HypergradientDescent's upper step rule compares values and needs full batches; this problem draws "
                "minibatches. Give upper_optimizer a step size or an optax rule, such as optax.adam(1e-2)."
            )
        return NestedState(x, y, x, memory, carry, upper, None if self.warm_start else y)

    def _move(self, problem: Problem) -> Move:
        """How x moves."""
        if self.upper_optimizer is not None:
            return Move(self.upper_optimizer, problem.project_upper)
        return Move(quasi_newton() if problem.project_upper is None else spectral(), problem.project_upper)

    def step(self, problem: Problem, state: NestedState, key: StepKey) -> tuple[NestedState, Metrics]:
        """One outer iteration."""
        upper, lower = problem.levels(key)
        solver = as_lower_solver(self.lower_solver)
        start = LowerState(state.y, state.memory) if self.warm_start else solver.init(state.start)

        found = self.hypergradient(upper, lower, solver, state.trial, start, state.carry)

        def again(x: PyTree) -> Estimate[Any]:
            return self.hypergradient(upper, lower, solver, x, found.lower, found.carry)

        trial, memory = self._move(problem)(
            found.gradient,
            state.upper,
            state.trial,
            value=found.value,
            grad=found.gradient,
            value_fn=lambda x: _with_gradient(again, x),
        )
        x, kept = accepted(memory, trial)
        y = jax.tree.map(lambda new, old: jnp.where(kept, new, old), found.lower.y, state.y)
        metrics = {
            "upper_loss": found.value,
            "hypergradient_norm": residual(state.trial, found.gradient, upper.project),
            **found.metrics,
        }
        return NestedState(x, y, trial, found.lower.memory, found.carry, memory, state.start), metrics

    def status(self, state: NestedState, metrics: Metrics, tol: Any) -> jax.Array:
        """CONVERGED where the hypergradient and the lower level's residual are within the tolerance (and what else the
        estimator says), the linear system is solved to it or to a thousandth of F_y, and met no negative curvature."""
        met = within(tol, metrics, "hypergradient_norm", *getattr(self.hypergradient, "settles", ("lower_residual",)))
        return jnp.where(linear_settled(tol, metrics), met, 0)

    def multipliers(self, problem: Problem, state: NestedState) -> dict[str, PyTree]:
        """The lower level's multipliers in the user's units, where the estimator knows them; else none."""
        known = getattr(self.hypergradient, "multipliers", None)
        return {} if known is None else known(problem.full_lower(), state.x, state.y, state.carry)


def _with_gradient(estimate: Any, x: PyTree) -> Scalar:
    """estimate(x).value as a function of x whose derivative is estimate(x).gradient (for line searches)."""

    @jax.custom_jvp
    def value(x: PyTree) -> jax.Array:
        return estimate(x).value

    @value.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        found = jax.lax.stop_gradient(estimate(primals[0]))
        return found.value, optax.tree.vdot(found.gradient, tangents[0])

    return value(x)


def AID(
    lower_solver: Any = None,
    upper_optimizer: Any = None,
    linear_solver: Any = None,
) -> HypergradientDescent:
    """Approximate implicit differentiation: a lower solve, a warm-started linear solve, an upper step.

    Defaults, for full batches, without a step size to choose: `lower.LBFGS(tol=1e-6)`, `linear.Robust` (CG from a warm
    start, or GMRES with a projection or prox on the lower level, and least squares where f_yy is singular; up
    to 32 unknowns as a matrix), `optimizers.quasi_newton()` (`optimizers.spectral()` with a projection on the upper
    level). `lower_solver=lower.Newton()` solves small or badly conditioned lower levels to the dtype's precision.

    References: Pedregosa, ICML 2016 (HOAG); Grazzi et al., "On the Iteration Complexity of Hypergradient Computation",
    ICML 2020.
    """
    return HypergradientDescent(
        Implicit(linear_solver),
        LBFGS() if lower_solver is None else lower_solver,
        upper_optimizer,
    )


def ITD(
    lower_steps: int = 100, lower_optimizer: Any = 0.1, upper_optimizer: Any = 0.01, warm_start: bool = False
) -> HypergradientDescent:
    """Iterative differentiation: backpropagation through all `lower_steps` steps from y0.

    Reference: Franceschi et al., ICML 2017.
    """
    return HypergradientDescent(Unrolled(), GradientDescent(lower_optimizer, lower_steps), upper_optimizer, warm_start)


def TruncatedITD(
    lower_steps: int = 100,
    last: int = 10,
    lower_optimizer: Any = 0.1,
    upper_optimizer: Any = 0.01,
    warm_start: bool = True,
) -> HypergradientDescent:
    """Iterative differentiation through the last `last` of `lower_steps` steps.

    Reference: Shaban et al., AISTATS 2019.
    """
    return HypergradientDescent(
        Unrolled(last=last), GradientDescent(lower_optimizer, lower_steps), upper_optimizer, warm_start
    )


def OneStep(lower_steps: int = 10, lower_optimizer: Any = 0.1, upper_optimizer: Any = 0.01) -> HypergradientDescent:
    """Descent along the one-step hypergradient: `lower_steps` steps, of which the last is differentiated.

    Reference: Bolte, Pauwels, Vaiter, NeurIPS 2023.
    """
    return HypergradientDescent(
        hypergradients.OneStep(), GradientDescent(lower_optimizer, lower_steps), upper_optimizer
    )


def T1T2(lower_optimizer: Any = 0.1, upper_optimizer: Any = 0.01, scale: float = 1.0) -> HypergradientDescent:
    """One lower step and one upper step in turn, the inverse Hessian replaced by `scale` times the identity.

        y <- y - eta f_y(x, y),    x <- x - beta (F_x - scale f_xy F_y)

    Reference: Luketina et al., "Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters", ICML 2016
    (which takes scale = 1, the lower step being absorbed in the upper one).
    """
    return HypergradientDescent(Implicit(linear.Identity(scale)), GradientDescent(lower_optimizer, 1), upper_optimizer)


def IMAML(
    lower_steps: int = 16, lower_optimizer: Any = 0.1, upper_optimizer: Any = 0.001, cg_steps: int = 5
) -> HypergradientDescent:
    """Implicit MAML: each task starts at the meta-parameters x and is held near them.

    The hypergradient by `cg_steps` of CG on each task's system (`linear.TaskCG`): tasks share nothing, and one of
    negative curvature, which is said at the end of the run, stops at its own first-order answer and leaves the others
    alone.

    The lower loss is the sum over tasks of loss_i(y_i) + (lam/2) |y_i - x|^2, which the user states (with `vmap` over
    tasks, y stacked along a leading axis); each lower solve starts at y_i = x.

    Reference: Rajeswaran et al., "Meta-Learning with Implicit Gradients", NeurIPS 2019.
    """
    solver = GradientDescent(lower_optimizer, lower_steps, start=_start_at_upper)
    return HypergradientDescent(
        Implicit(linear.TaskCG(tol=None, max_steps=cg_steps, warm_start=False)), solver, upper_optimizer
    )


def _start_at_upper(x: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape).astype(y.dtype), x, y)
