"""Nested methods: approximate y*(x), estimate the hypergradient, take an upper step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives, hypergradients, linear
from bilevel._module import constructor, hyperparameters, name_of, state
from bilevel.hypergradients import Estimate, Estimator, Implicit, Unrolled
from bilevel.hypergradients._base import check_estimator, first_carry
from bilevel.keys import StepKey
from bilevel.lower import LBFGS, GradientDescent, LowerState, Relative, as_lower_solver
from bilevel.optimizers import (
    Move,
    accepted,
    check_count,
    check_optimizer,
    is_rule,
    quasi_newton,
    residual,
    spectral,
    standing,
    withdraws,
)
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import linear_settled, refuse, within
from bilevel.typing import Metrics, PyTree, Scalar

__all__ = ["AID", "IMAML", "ITD", "MAML", "T1T2", "HypergradientDescent", "OneStep", "TruncatedITD"]


@state
class NestedState:
    """Between two steps of a nested method.

    Attributes:
      x, y: the variables.
      trial: where the next hypergradient is taken: x, but for step rules that may withdraw a step.
      memory, carry, upper: what the lower solver, the estimator and the upper step rule remember.
      start: where cold lower solves begin; None where they are warm.
      unsolved: how many trials in a row have left the lower level without values.
    """

    x: PyTree
    y: PyTree
    trial: PyTree
    memory: PyTree
    carry: PyTree
    upper: PyTree
    start: PyTree
    unsolved: jax.Array


_UNSOLVED = 12  # trials, each a quarter as long as the last


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
    (`lower_residual` = |f_y|, `linear_residual`, `linear_iterations`). Under a rule that withdraws steps the first two
    are those of the point that stands, and the estimator's those of the last trial.

    With a tolerance a run has converged when both `hypergradient_norm` and `lower_residual` are at most tol (the first
    alone where the whole lower run is differentiated: it is that of F(x, y_T(x)), and the certificate looks at y_T),
    the linear system (where there is one) is solved to tol or to a thousandth of F_y, and no negative curvature was met
    in it. What was in the way is said at the end.
    """

    hypergradient: Estimator = Implicit()
    lower_solver: Any = GradientDescent()
    upper_optimizer: float | optax.GradientTransformation | None = None
    warm_start: bool = True

    def __post_init__(self) -> None:
        if self.upper_optimizer is not None:
            check_optimizer("HypergradientDescent", "upper_optimizer", self.upper_optimizer)
        as_lower_solver(self.lower_solver)
        check_estimator("HypergradientDescent", self.hypergradient)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> NestedState:
        """The state before the first step."""
        honours = getattr(self.hypergradient, "honours", ("project_lower", "prox_lower"))
        refuse(self, problem, x, honours=("project_upper", *honours), instead="solvers.LVHBA or solvers.MEHA")
        start = as_lower_solver(self.lower_solver).init(y)
        carry = first_carry(self.hypergradient, problem.draw_lower(key), x, start)
        upper = self._move(problem).init(x)
        if getattr(self.hypergradient, "continues", False) and (withdraws(upper) or not self.warm_start):
            cure = (
                "warm_start=True" if not self.warm_start else "upper_optimizer a step size or an optax rule, such as "
                "optax.adam(1e-2), that withdraws no steps"
            )  # fmt: skip
            raise ProblemError(
                f"{type(self.hypergradient).__name__}(restart=...) carries the derivative of the lower run from one "
                f"outer step to the next, so that run must go on and not be taken back: give "
                f"HypergradientDescent {cure}."
            )
        if problem.stochastic and withdraws(upper):
            raise ProblemError(
                f"{name_of(self)}'s upper step rule compares values and needs full batches; this problem draws "
                "minibatches. Give upper_optimizer a step size or an optax rule, such as optax.adam(1e-2)."
            )
        renews = getattr(self.lower_solver, "renews", False)
        if renews and not self.warm_start:
            raise ProblemError(
                f"{name_of(self)}(warm_start=False) begins each lower solve as if it were the first, so that "
                "lower.Reinitialized would take draw 0 at every step: leave warm_start on (every=1 draws at each step)."
            )
        if renews and withdraws(upper):
            raise ProblemError(
                f"{name_of(self)}'s upper step rule compares values at two points, and lower.Reinitialized may begin "
                "their lower solves at different draws. Give upper_optimizer a step size or an optax rule, such as "
                "optax.adam(1e-2)."
            )
        return NestedState(x, y, x, start.memory, carry, upper, None if self.warm_start else y, jnp.int32(0))

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

        # A trial at which the lower level has no values (e^x has overflowed) is one without a value.
        solved = _has_values(found.metrics)
        trial, memory = self._move(problem)(
            found.gradient,
            state.upper,
            state.trial,
            value=jnp.where(solved, found.value, jnp.nan),
            grad=found.gradient,
            value_fn=lambda x: _with_gradient(again, x),
        )
        x, kept = accepted(memory, trial)
        y = jax.tree.map(lambda new, old: jnp.where(kept, new, old), found.lower.y, state.y)
        left, carry = found.lower.memory, found.carry
        if withdraws(memory):  # a trial without a value leaves nothing that the next one could begin with
            sound = solved & jnp.isfinite(found.value) & jnp.isfinite(optax.tree.norm(found.gradient))
            keep = lambda new, old: jnp.where(sound | kept, new, old)  # noqa: E731
            left, carry = jax.tree.map(keep, (left, carry), (start.memory, state.carry))
        value, gradient = standing(memory, found.value, found.gradient)
        at = x if withdraws(memory) else state.trial
        metrics = {
            "upper_loss": value,
            "hypergradient_norm": residual(at, gradient, upper.project),
            **found.metrics,
        }
        unsolved = jnp.where(solved, 0, state.unsolved + 1)
        return NestedState(x, y, trial, left, carry, memory, state.start, unsolved), metrics

    def status(self, state: NestedState, metrics: Metrics, tol: Any) -> jax.Array:
        """CONVERGED where the hypergradient and the lower level's residual are within the tolerance (and what else the
        estimator says), the linear system is solved to it or to a thousandth of F_y, and met no negative
        curvature; never by an estimate that is small by chance."""
        if not getattr(self.hypergradient, "conclusive", True):
            return jnp.zeros((), jnp.int32)
        met = within(tol, metrics, "hypergradient_norm", *getattr(self.hypergradient, "settles", ("lower_residual",)))
        return jnp.where(linear_settled(tol, metrics) & ~self.withdrawn(state, metrics), met, 0)

    def withdrawn(self, state: NestedState, metrics: Metrics) -> jax.Array:
        """Whether the last trial was taken back. Where the lower level goes on having no values, however short the
        trial, that is a fault of its loss, which the run is to end with."""
        return ~jnp.asarray(accepted(state.upper, state.x)[1]) & (state.unsolved < _UNSOLVED)

    def multipliers(self, problem: Problem, state: NestedState) -> dict[str, PyTree]:
        """The lower level's multipliers in the user's units, where the estimator knows them; else none."""
        known = getattr(self.hypergradient, "multipliers", None)
        return {} if known is None else known(problem.full_lower(), state.x, state.y, state.carry)


def _has_values(metrics: Metrics) -> jax.Array:
    """Whether what the estimator says of the lower level are numbers."""
    lower = [metrics[name] for name in ("lower_loss", "lower_residual") if name in metrics]
    return functools.reduce(jnp.logical_and, map(jnp.isfinite, lower), jnp.asarray(True))


def _with_gradient(estimate: Any, x: PyTree) -> Scalar:
    """estimate(x).value as a function of x whose derivative is estimate(x).gradient (for line searches)."""

    @jax.custom_jvp
    def value(x: PyTree) -> jax.Array:
        return estimate(x).value

    @value.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        found = jax.lax.stop_gradient(estimate(primals[0]))
        return found.value, derivatives.dot(found.gradient, tangents[0])

    return value(x)


@constructor
def AID(
    lower_solver: Any = None,
    upper_optimizer: Any = None,
    linear_solver: Any = None,
) -> HypergradientDescent:
    """Approximate implicit differentiation: a lower solve, a warm-started linear solve, an upper step.

    Defaults, for full batches, without a step size or a unit to choose: `lower.Relative(lower.LBFGS(tol=1e-4))`,
    `linear.Robust` (CG from a warm start, or GMRES with a projection or prox on the lower level, and least squares
    where f_yy is singular; up to 32 unknowns as a matrix), `optimizers.quasi_newton()` (`optimizers.spectral()` with a
    projection on the upper level). `lower_solver=lower.Newton()` solves small or badly conditioned lower levels to the
    dtype's precision.

    References: Pedregosa, ICML 2016 (HOAG); Grazzi et al., "On the Iteration Complexity of Hypergradient Computation",
    ICML 2020.
    """
    return HypergradientDescent(
        Implicit(linear_solver),
        Relative(LBFGS(tol=1e-4)) if lower_solver is None else lower_solver,
        upper_optimizer,
    )


@constructor
def ITD(
    lower_steps: int = 100,
    lower_optimizer: Any = 0.1,
    upper_optimizer: Any = 0.01,
    warm_start: bool = False,
    start: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> HypergradientDescent:
    """Iterative differentiation: backpropagation through all `lower_steps` steps from y0.

    `start`: `(x, y) -> y`, where each run of the lower level begins, differentiated as the steps are; None: at y0, or
    with `warm_start` at the last y.

    Reference: Franceschi et al., ICML 2017.
    """
    _check_steps("ITD", lower_steps, lower_optimizer, upper_optimizer)
    solver = GradientDescent(lower_optimizer, lower_steps, start=start)
    return HypergradientDescent(Unrolled(), solver, upper_optimizer, warm_start)


@constructor
def MAML(
    lower_steps: int = 5,
    lower_optimizer: Any = 0.1,
    upper_optimizer: Any = 0.001,
    start: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> HypergradientDescent:
    """Model-agnostic meta-learning: `lower_steps` steps on each task from the meta-parameters x, differentiated.

        y_i = x, then lower_steps times  y_i <- y_i - lower_optimizer d loss_i(y_i);   x <- x - upper d/dx mean F_i(y_i)

    y is stacked along a leading axis of tasks (y0 says only how many there are), the lower loss is the *sum* over tasks
    (`vmap`), and x need not be in either loss.

    Attributes:
      start: `(x, y) -> ` the part of x that the tasks adapt, shaped like one task's y (or like y). None: all of x. With
        `start=lambda x, y: x["head"]` and losses that read x["body"] the tasks adapt the head alone: ANIL.

    References: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017; Raghu et al., "Rapid Learning or
    Feature Reuse? Towards Understanding the Effectiveness of MAML", ICLR 2020 (ANIL).
    """
    _check_steps("MAML", lower_steps, lower_optimizer, upper_optimizer)
    if start is not None and not callable(start):
        raise TypeError(
            f"MAML(start={start!r}): a function is expected, of (x, y) to the part of x that the tasks adapt: "
            'start=lambda x, y: x["head"].'
        )
    begin = _start_at_upper if start is None else lambda x, y: _start_at_upper(start(x, y), y)
    return ITD(lower_steps, lower_optimizer, upper_optimizer, start=begin)


@constructor
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
    _check_steps("TruncatedITD", lower_steps, lower_optimizer, upper_optimizer)
    return HypergradientDescent(
        Unrolled(last=last), GradientDescent(lower_optimizer, lower_steps), upper_optimizer, warm_start
    )


@constructor
def OneStep(lower_steps: int = 10, lower_optimizer: Any = 0.1, upper_optimizer: Any = 0.01) -> HypergradientDescent:
    """Descent along the one-step hypergradient: `lower_steps` steps, of which the last is differentiated.

    Reference: Bolte, Pauwels, Vaiter, NeurIPS 2023.
    """
    _check_steps("OneStep", lower_steps, lower_optimizer, upper_optimizer)
    return HypergradientDescent(
        hypergradients.OneStep(), GradientDescent(lower_optimizer, lower_steps), upper_optimizer
    )


@constructor
def T1T2(lower_optimizer: Any = 0.1, upper_optimizer: Any = 0.01, scale: float = 1.0) -> HypergradientDescent:
    """One lower step and one upper step in turn, the inverse Hessian replaced by `scale` times the identity.

        y <- y - eta f_y(x, y),    x <- x - beta (F_x - scale f_xy F_y)

    Reference: Luketina et al., "Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters", ICML 2016
    (which takes scale = 1, the lower step being absorbed in the upper one).
    """
    return HypergradientDescent(Implicit(linear.Identity(scale)), GradientDescent(lower_optimizer, 1), upper_optimizer)


@constructor
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
    _check_steps("IMAML", lower_steps, lower_optimizer, upper_optimizer)
    solver = GradientDescent(lower_optimizer, lower_steps, start=_start_at_upper)
    return HypergradientDescent(
        Implicit(linear.TaskCG(tol=None, max_steps=cg_steps, warm_start=False)), solver, upper_optimizer
    )


def _check_steps(owner: str, lower_steps: Any, lower_optimizer: Any, upper_optimizer: Any) -> None:
    """Raise a sentence where the count of steps is no count, such as a lower solver, or a step size in its place."""
    if hasattr(lower_steps, "advance") or is_rule(lower_steps):
        what = "an optax rule" if is_rule(lower_steps) else f"a lower solver, {type(lower_steps).__name__}"
        rule = "rule" if is_rule(lower_steps) else "0.1"
        raise TypeError(
            f"{owner} was given {what} in the place of lower_steps: it takes a number of steps and their rule, "
            f"{owner}(lower_steps=10, lower_optimizer={rule}). For a lower solver of its own write "
            "solvers.HypergradientDescent(hypergradients.Unrolled(), lower_solver)."
        )
    check_count(
        owner,
        "the number of lower steps is a positive integer, and comes before the step size",
        lower_steps=lower_steps,
    )
    if lower_steps is None:
        raise TypeError(f"{owner}(lower_steps=None): the number of lower steps is a positive integer.")
    check_optimizer(owner, "lower_optimizer", lower_optimizer)
    check_optimizer(owner, "upper_optimizer", upper_optimizer)


def _start_at_upper(x: PyTree, y: PyTree) -> PyTree:
    """Each task's copy of x, shaped like y."""

    def shapes(tree: PyTree) -> str:
        return str(jax.tree.map(lambda leaf: list(jnp.shape(leaf)), tree))

    fits = (
        jax.tree.structure(x) == jax.tree.structure(y)  # type: ignore[operator]
        and all(
            jnp.shape(own)[jnp.ndim(own) - jnp.ndim(meta) :] == jnp.shape(meta)
            for meta, own in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        )
    )
    if not fits:
        raise ProblemError(
            f"Each task starts at a copy of x, and x {shapes(x)} does not fit y {shapes(y)}: y is x with a leading "
            'axis of tasks. Where tasks adapt a part of x, name it: solvers.MAML(start=lambda x, y: x["head"]).'
        )
    return jax.tree.map(lambda x, y: jnp.broadcast_to(x, y.shape).astype(y.dtype), x, y)
