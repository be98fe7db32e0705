"""Accurate lower solves, with constraints and without: robust first, cheap second.

`minimise` is a minimum of a function over a simple set or with a prox, `augmented_lagrangian` one of a level under its
coupled constraints, with multipliers, and `Accurate` both as a lower solver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._forward import forward_only
from bilevel._module import hyperparameters
from bilevel.constraints import Constraints
from bilevel.level import Level
from bilevel.lower.loops import NO_REVERSE, LowerState
from bilevel.optimizers import check_count, value_and_gradient
from bilevel.typing import PyTree

__all__ = ["Accurate", "Solved", "augmented_lagrangian", "minimise"]


class Solved(NamedTuple):
    """What `augmented_lagrangian` found."""

    y: PyTree  # the minimum
    multipliers: jax.Array  # (p,), of the rows as they were given (scaled)
    value: jax.Array  # f(x, y)
    violation: jax.Array  # the largest of a row there


Objective = Callable[[PyTree], jax.Array]


def minimise(
    fn: Objective, y: PyTree, project: Any = None, prox: Any = None, steps: int = 200, tol: Any = 1e-9
) -> PyTree:
    """The minimum of a smooth function from y, over a simple set (`project` y -> y) or with a `prox` (y, scaling) -> y.

    L-BFGS with a line search where there is neither; else accelerated proximal gradient with backtracking and restarts.
    At most `steps` steps, until the norm of the (proximal) gradient is at most `tol`.
    """
    found = _lbfgs(fn, y, steps, tol) if project is None and prox is None else _fista(fn, y, project, prox, steps, tol)
    return forward_only(found, NO_REVERSE)


def _lbfgs(fn: Objective, y: PyTree, steps: int, tol: Any) -> PyTree:
    rule = optax.lbfgs()

    def body(carry: Any) -> Any:
        i, y, memory, best, lowest, _ = carry
        value, gradient = value_and_gradient(fn, y, memory)
        better = value < lowest
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), y, best)
        updates, memory = rule.update(gradient, memory, y, value=value, grad=gradient, value_fn=fn)
        y, lowest = optax.apply_updates(y, updates), jnp.minimum(value, lowest)
        return i + 1, y, memory, best, lowest, derivatives.norm(gradient)

    infinite = jnp.asarray(jnp.inf, jax.eval_shape(fn, y).dtype)
    start = (0, y, rule.init(y), y, infinite, infinite)
    _, last, _, best, lowest, _ = jax.lax.while_loop(lambda c: (c[0] < steps) & (c[5] > tol), body, start)
    final = fn(last)
    return jax.tree.map(lambda a, b: jnp.where(final < lowest, a, b), last, best)


def _fista(fn: Objective, y: PyTree, project: Any, prox: Any, steps: int, tol: Any) -> PyTree:
    def move(y: PyTree, gradient: PyTree, size: Any) -> PyTree:
        y = optax.tree.add_scale(y, -size, gradient)
        y = y if project is None else project(y)
        return y if prox is None else prox(y, size)

    def body(carry: Any) -> Any:
        i, y, ahead, t, size, _ = carry
        value, gradient = jax.value_and_grad(fn)(ahead)

        def too_long(size: Any) -> Any:
            new = move(ahead, gradient, size)
            step = optax.tree.sub(new, ahead)
            bound = value + optax.tree.vdot(gradient, step) + optax.tree.vdot(step, step) / (2 * size)
            return (fn(new) > bound + 4 * jnp.finfo(value.dtype).eps * jnp.abs(value)) & (size > 1e-12)

        size = jax.lax.while_loop(too_long, lambda size: size / 2, size * 1.5)
        new = move(ahead, gradient, size)
        step = optax.tree.sub(new, y)
        uphill = optax.tree.vdot(optax.tree.sub(ahead, new), step) > 0
        following = jnp.where(uphill, 1.0, (1 + jnp.sqrt(1 + 4 * t**2)) / 2).astype(t.dtype)
        momentum = jnp.where(uphill, 0.0, (t - 1) / following)
        residual = derivatives.norm(optax.tree.sub(new, ahead)) / size
        return i + 1, new, optax.tree.add_scale(new, momentum, step), following, size, residual

    one = jnp.ones((), jax.eval_shape(fn, y).dtype)
    y = y if project is None else project(y)
    start = (0, y, y, one, one, jnp.inf * one)
    return jax.lax.while_loop(lambda c: (c[0] < steps) & (c[5] > tol), body, start)[1]


def augmented_lagrangian(
    lower: Level,
    rows: Constraints,
    x: PyTree,
    y: PyTree,
    multipliers: jax.Array | None = None,
    steps: int = 200,
    rounds: int = 15,
    tol: Any = 1e-9,
) -> Solved:
    """A minimum of f(x, .) under the (scaled) constraints `rows`, by the augmented Lagrangian.

        y   <- argmin f + (1/2 rho) (|P(lam + rho c)|^2 - |lam|^2),     lam <- P(lam + rho c)

    with P the projection on nonnegative numbers for inequalities; rho grows tenfold where the violation has not
    fallen to a quarter. Without constraints one minimisation. With a `prox` the nonsmooth term is not in the returned
    value. `steps` and `tol` are those of each minimisation, `rounds` the most updates of the multipliers.
    """
    operator = lower.prox
    prox = None if operator is None else (lambda u, size: operator(x, u, size))
    if not rows.count:
        y = minimise(lambda y: lower(x, y), y, lower.project, prox, steps, tol)
        return Solved(y, jnp.zeros((0,), rows.dtype), lower(x, y), jnp.zeros((), rows.dtype))

    def body(carry: Any) -> Any:
        i, y, lam, rho, before = carry

        def lagrangian(y: PyTree) -> jax.Array:
            return lower(x, y) + jnp.sum(rows.clip(lam + rho * rows(x, y)) ** 2) / (2 * rho)

        y = minimise(lagrangian, y, lower.project, prox, steps, tol)
        lam = rows.clip(lam + rho * rows(x, y))
        violation = rows.violation(x, y)
        rho = jnp.where(violation > 0.25 * before, jnp.minimum(rho * 10, 1e8), rho)
        return i + 1, y, lam, rho, violation

    lam = jnp.zeros((rows.count,), rows.dtype) if multipliers is None else multipliers
    rho = (1 + jnp.abs(lower(x, y))) / jnp.maximum(1.0, jnp.sum(rows.excess(x, y) ** 2))
    start = (0, y, lam, jnp.clip(rho, 1.0, 1e3).astype(rows.dtype), jnp.asarray(jnp.inf, rows.dtype))
    feasible = jnp.finfo(rows.dtype).eps ** 0.75
    unfinished = lambda c: (c[0] < rounds) & ((c[4] > feasible) | (c[0] < 3))  # noqa: E731
    _, y, lam, _, violation = jax.lax.while_loop(unfinished, body, start)
    return Solved(y, lam, lower(x, y), violation)


@hyperparameters
class Accurate:
    """A lower solver to high accuracy that needs no step size, under coupled constraints too.

    `minimise` without constraints, `augmented_lagrangian` with them; the state's memory is then the multipliers in the
    user's units, shape (p,), which the next solve starts from (None: zeros). For full batches; not differentiable in
    reverse.

    Attributes:
      steps: the most steps of each minimisation.
      rounds: the most updates of the multipliers.
      tol: on the gradient's norm; None: eps^(3/4) of y's dtype.
    """

    steps: int = 200
    rounds: int = 15
    tol: float | None = None

    def __post_init__(self) -> None:
        check_count("Accurate", steps=self.steps, rounds=self.rounds)

    def init(self, y: PyTree) -> LowerState:
        """y, and no multipliers yet."""
        return LowerState(y, None)

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        rows = Constraints(level, x, state.y).at(x, state.y)
        tol = float(jnp.finfo(rows.dtype).eps) ** 0.75 if self.tol is None else self.tol
        start = None if state.memory is None else state.memory / rows.scale
        found = augmented_lagrangian(level, rows, x, state.y, start, self.steps, self.rounds, tol)
        return LowerState(found.y, found.multipliers * rows.scale if rows.count else None)
