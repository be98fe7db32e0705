"""Lower-level solvers: how y*(x) is found.

A lower solver has two pure methods,

    init(y) -> LowerState               # y together with what the method remembers (optimiser moments)
    __call__(lower, x, state) -> LowerState

where `lower` is a `problem.Level`, a plain function of (x, y) with `.gradient(x, y)`, `.batch`, `.redraw(i, total)`.
Any function `(lower, x, y) -> y` is accepted in its place (`as_lower_solver`), so a closed form, or a solver of another
library, is one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters, state
from bilevel.optimizers import quasi_newton, withdraws

PyTree = Any

__all__ = [
    "LBFGS",
    "Function",
    "GradientDescent",
    "Inner",
    "LowerState",
    "as_lower_solver",
    "as_optimizer",
    "jaxopt",
    "optimistix",
]


@state
class LowerState:
    """The lower variable and what its solver remembers from one outer step to the next."""

    y: PyTree
    memory: PyTree


def as_optimizer(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """An optax rule; a bare number means `optax.sgd` with that step size."""
    if isinstance(optimizer, optax.GradientTransformation):
        return optax.with_extra_args_support(optimizer)
    return optax.with_extra_args_support(optax.sgd(optimizer))


def check_optimizer(owner: str, name: str, value: Any) -> None:
    """Raise a sentence where a step rule is neither a positive number nor an optax rule."""
    if isinstance(value, (optax.GradientTransformation, jax.Array, jax.core.Tracer)):
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not value > 0:
            raise ValueError(f"{owner}({name}={value!r}): a step size is positive.")
        return
    raise TypeError(
        f"{owner}({name}={value!r}): give a step size or an optax GradientTransformation such as optax.adam(1e-2)."
    )


_PATIENCE = 25


@hyperparameters
class GradientDescent:
    """`steps` steps of an optax rule on f(x, .), each on a fresh batch where the level's data are drawn.

        y <- project(y + update(f_y(x, y)))            with plain numbers: y <- project(y - optimizer f_y(x, y))

    With a `prox_lower` the rule must be a plain step size eta, and a step is y <- prox(y - eta f_y(x, y), x, eta).

    Attributes:
      optimizer: an optax rule (momentum, Adam, schedules, L-BFGS with its line search, ...) or a step size (SGD).
      steps: the number of steps; the maximum where `tol` is given.
      tol: stop once |f_y| <= tol (with a projection |y - project(y - f_y)|, with a prox the step's length over eta);
        the loop then cannot be differentiated in reverse, so unrolled estimators refuse it. It also ends after 25 steps
        without a smaller residual (the precision of the dtype is reached). None: exactly `steps`.
      start: `(x, y) -> y`, where each solve begins; None: at the incoming y (warm start). MAML starts at x.
      first, total: the part of a longer run that this is; set by estimators that split a run.

    One gradient per step (L-BFGS: one or more by its line search).
    """

    optimizer: float | optax.GradientTransformation = 0.1
    steps: int = 10
    tol: float | None = None
    start: Callable[[PyTree, PyTree], PyTree] | None = None
    first: int = 0
    total: int | None = None

    def __post_init__(self) -> None:
        check_optimizer("GradientDescent", "optimizer", self.optimizer)
        if not isinstance(self.steps, int) or self.steps < 0 or (self.steps == 0 and self.total is None):
            raise ValueError(f"GradientDescent(steps={self.steps!r}): the number of steps is a positive integer.")
        if isinstance(self.tol, float) and not self.tol > 0:
            raise ValueError(
                f"GradientDescent(tol={self.tol!r}): the tolerance is positive, or None for a fixed number of steps."
            )

    def init(self, y: PyTree) -> LowerState:
        """The start of a run: y with fresh optimiser moments."""
        return LowerState(y, as_optimizer(self.optimizer).init(y))

    def __call__(self, lower: Any, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        optimizer = as_optimizer(self.optimizer)
        if lower.prox is not None and isinstance(self.optimizer, optax.GradientTransformation):
            raise ValueError(
                "GradientDescent with a prox_lower takes a plain step size as its optimizer: the prox is scaled with it."
            )
        if self.start is not None:
            y = self.start(x, state.y)
            state = LowerState(y, optimizer.init(y))
        elif _needs_value(state.memory) and self.first == 0:
            # Such rules remember values and gradients, which belong to the x of the last solve.
            state = self.init(state.y)
        total = self.steps if self.total is None else self.total

        def step(state: LowerState, i: Any) -> tuple[LowerState, jax.Array]:
            level = lower.redraw(i, total)
            y, memory = state.y, state.memory
            if _has_line_search(memory):
                value, gradient = optax.value_and_grad_from_state(lambda y: level(x, y))(y, state=memory)
                updates, memory = optimizer.update(
                    gradient, memory, y, value=value, grad=gradient, value_fn=lambda y: level(x, y)
                )
            elif _needs_value(memory):
                value, gradient = jax.value_and_grad(lambda y: level(x, y))(y)
                updates, memory = optimizer.update(gradient, memory, y, value=value)
            else:
                gradient = level.gradient(x, y)
                updates, memory = optimizer.update(gradient, memory, y)
            new = optax.apply_updates(y, updates)
            if level.project is not None:
                new = level.project(new)
            if level.prox is not None:
                new = level.prox(new, x, self.optimizer)
            if self.tol is None:
                return LowerState(new, memory), jnp.zeros(())
            if level.prox is not None:
                residual = derivatives.norm(optax.tree.sub(y, new)) / self.optimizer
            elif level.project is not None:
                residual = derivatives.norm(optax.tree.sub(y, level.project(optax.tree.sub(y, gradient))))
            else:
                residual = derivatives.norm(gradient)
            tol = self.tol
            if level.prox is None:  # the point that meets the tolerance is returned, not the one after it
                new = jax.tree.map(lambda new, y: jnp.where(residual <= tol, y, new), new, y)
            return LowerState(new, memory), residual

        if self.tol is None:
            body = jax.checkpoint(lambda s, i: (step(s, i)[0], None), prevent_cse=False)
            state = jax.lax.scan(body, state, self.first + jnp.arange(self.steps))[0]
            return LowerState(state.memory.x, state.memory) if withdraws(state.memory) else state

        tol = self.tol

        # The residual is that of the point before the step: a step more than needed is taken, none is wasted on a test.
        def unfinished(carry: Any) -> jax.Array:
            i, _, residual, _, since = carry
            return (i < self.steps) & (residual > tol) & (since < _PATIENCE)

        def loop(carry: Any) -> Any:
            i, state, _, best, since = carry
            state, residual = step(state, i)
            return i + 1, state, residual, jnp.minimum(residual, best), jnp.where(residual < best, 0, since + 1)

        zero = jnp.zeros((), jnp.int32)
        infinite = jnp.full_like(jax.eval_shape(step, state, 0)[1], jnp.inf)
        _, state, residual, *_ = jax.lax.while_loop(unfinished, loop, (zero, state, infinite, infinite, zero))
        if withdraws(state.memory):
            y = jax.tree.map(lambda y, x: jnp.where(residual <= tol, y, x), state.y, state.memory.x)
            state = LowerState(y, state.memory)
        return state

    def part(self, first: int, steps: int) -> GradientDescent:
        """Steps first, ..., first + steps - 1 of this run, as a run of its own."""
        start = self.start if first == 0 else None
        return dataclasses.replace(self, steps=steps, first=first, total=self.steps, start=start)


def _has_line_search(memory: PyTree) -> bool:
    return optax.tree.get(memory, "value", None) is not None


def _needs_value(memory: PyTree) -> bool:
    return withdraws(memory) or _has_line_search(memory)


def LBFGS(steps: int = 200, tol: float | None = 1e-6, memory_size: int = 10) -> GradientDescent:
    """L-BFGS (`optimizers.quasi_newton`) to a tolerance on |f_y|: no step size to choose. For full batches without a projection."""
    return GradientDescent(quasi_newton(memory_size), steps, tol)


@hyperparameters
class Function:
    """A lower solver from a function `(lower, x, y) -> y`."""

    fn: Callable[[Any, PyTree, PyTree], PyTree]

    def init(self, y: PyTree) -> LowerState:
        """y with nothing to remember."""
        return LowerState(y, None)

    def __call__(self, lower: Any, x: PyTree, state: LowerState) -> LowerState:
        """Call the function."""
        return LowerState(self.fn(lower, x, state.y), None)


def as_lower_solver(solver: Any) -> Any:
    """A lower solver from itself, an optax rule (10 steps), a step size, or a function `(lower, x, y) -> y`."""
    if hasattr(solver, "init") and callable(solver) and not isinstance(solver, optax.GradientTransformation):
        return solver
    if isinstance(solver, (float, int, jax.Array, optax.GradientTransformation)) and not isinstance(solver, bool):
        return GradientDescent(solver)
    if callable(solver):
        return Function(solver)
    raise TypeError(
        f"A lower solver is a bilevel.lower solver, an optax rule, a step size or a function (lower, x, y) -> y, not {type(solver).__name__}."
    )


def jaxopt(solver_class: Any, **options: Any) -> Function:
    """A jaxopt solver, e.g. `lower.jaxopt(jaxopt.LBFGS, maxiter=100, tol=1e-8)`; it minimises y -> f(x, y) from the incoming y.

    Derivatives through it follow the options (`implicit_diff`, `unroll`); implicit estimators need none, and
    `implicit_diff=False` is set unless given.
    """
    options = {"implicit_diff": False, **options}

    def solve(lower: Any, x: PyTree, y: PyTree) -> PyTree:
        return solver_class(fun=lambda y, x: lower(x, y), **options).run(y, x).params

    return Function(solve)


def optimistix(solver: Any, **options: Any) -> Function:
    """An optimistix minimiser, e.g. `lower.optimistix(optimistix.BFGS(1e-8, 1e-8), max_steps=100)`, from the incoming y."""
    options = {"throw": False, **options}

    def solve(lower: Any, x: PyTree, y: PyTree) -> PyTree:
        import optimistix as optx

        return optx.minimise(lambda y, x: lower(x, y), solver, y, args=x, **options).value

    return Function(solve)


class Inner:
    """A lower solver bound to a level: `inner(x, state) -> state`, what an estimator calls or differentiates."""

    def __init__(self, solver: Any, lower: Any) -> None:
        self.solver, self.lower = solver, lower

    def __call__(self, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        return self.solver(self.lower, x, state)

    def with_level(self, lower: Any) -> Inner:
        """The same solver on another form of the level."""
        return Inner(self.solver, lower)

    def split(self, last: int, owner: str) -> tuple[Inner, Inner]:
        """The run without its last `last` steps, and those."""
        if not isinstance(self.solver, GradientDescent):
            raise ValueError(
                f"{owner} differentiates the last steps of the lower solver and needs one made of steps: GradientDescent(...), not {type(self.solver).__name__}."
            )
        steps = self.solver.steps
        if last > steps:
            raise ValueError(
                f"{owner} differentiates {last} steps but the lower solver takes {steps}: raise steps or lower {last}."
            )
        return Inner(self.solver.part(0, steps - last), self.lower), Inner(
            self.solver.part(steps - last, last), self.lower
        )
