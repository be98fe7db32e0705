"""Accelerated proximal gradient steps whose length is found along the way, for sets and nonsmooth terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._forward import forward_only
from bilevel._module import hyperparameters, state
from bilevel.level import Level
from bilevel.lower.loops import NO_REVERSE, PATIENCE, LowerState
from bilevel.optimizers import check_count
from bilevel.typing import PyTree, Scalar

__all__ = ["Proximal", "ProximalGradient", "proximal_gradient"]


class Proximal(NamedTuple):
    """What `proximal_gradient` found."""

    y: PyTree  # the last point
    size: Scalar  # the last step's length
    first: Scalar  # the residual that it began with, or `reach` where that is larger


def proximal_gradient(
    fn: Callable[[PyTree], Scalar],
    y: PyTree,
    project: Any = None,
    prox: Any = None,
    *,
    steps: int = 200,
    tol: Any = 1e-9,
    size: Any = None,
    reach: Any = None,
) -> Proximal:
    """A minimum of a smooth function from y, over a simple set (`project` y -> y) and with a `prox` (y, scaling) -> y.

    Accelerated steps (FISTA) from a point a ahead of y,

        y <- prox(Proj(a - s g(a)), s),    halving s until  fn(y) <= fn(a) + <g(a), y - a> + |y - a|^2 / 2 s

    where s grows by half each step and momentum starts anew where it points uphill. At most `steps` of them, until the
    residual |y - a| / s is at most `tol`, or has not fallen for forty steps (the precision of the dtype).

    Args:
      size: s of the first step; None, or not positive: |g|^2 / <g, H g>, by one Hessian-vector product.
      reach: makes `tol` relative: to the first residual, or to `reach` where that is larger.

    Reference: Beck, Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", SIAM
    Journal on Imaging Sciences 2(1), 2009; O'Donoghue, Candes, "Adaptive Restart for Accelerated Gradient Schemes",
    Foundations of Computational Mathematics 15, 2015.
    """

    def move(y: PyTree, gradient: PyTree, size: Any) -> PyTree:
        y = optax.tree.add_scale(y, -size, gradient)
        y = y if project is None else project(y)
        return y if prox is None else prox(y, size)

    y = y if project is None else project(y)
    dtype = jax.eval_shape(fn, y).dtype
    smallest = jnp.finfo(dtype).tiny * 1e3

    def turn(y: PyTree) -> Any:
        gradient, product = jax.jvp(jax.grad(fn), (y,), (jax.grad(fn)(y),))
        square, bend = optax.tree.norm(gradient, squared=True), jnp.abs(derivatives.dot(gradient, product))
        usable = (bend > 0) & jnp.isfinite(bend) & (square > 0)
        return jnp.where(usable, square / jnp.where(usable, bend, 1), 1).astype(dtype)

    if size is None:
        size = turn(y)
    else:
        size = jax.lax.cond(size > 0, lambda y: jnp.asarray(size, dtype), turn, y)

    def body(carry: Any) -> Any:
        i, y, ahead, t, size, _, best, since, least = carry
        value, gradient = jax.value_and_grad(fn)(ahead)

        def too_long(size: Any) -> Any:
            new = move(ahead, gradient, size)
            step = optax.tree.sub(new, ahead)
            square = derivatives.dot(step, step)

            def by_value(_: Any) -> Any:
                return fn(new) > value + derivatives.dot(gradient, step) + square / (2 * size)

            def by_gradient(_: Any) -> Any:  # the same of a quadratic, and where values differ by their rounding alone
                return derivatives.dot(optax.tree.sub(jax.grad(fn)(new), gradient), step) > square / size

            rounding = square / (2 * size) <= 1e3 * jnp.finfo(value.dtype).eps * jnp.abs(value)
            return jax.lax.cond(rounding, by_gradient, by_value, None) & (size > smallest)

        size = jax.lax.while_loop(too_long, lambda size: size / 2, size * 1.5)
        new = move(ahead, gradient, size)
        step = optax.tree.sub(new, y)
        uphill = derivatives.dot(optax.tree.sub(ahead, new), step) > 0
        following = jnp.where(uphill, 1.0, (1 + jnp.sqrt(1 + 4 * t**2)) / 2).astype(t.dtype)
        momentum = jnp.where(uphill, 0.0, (t - 1) / following)
        residual = derivatives.norm(optax.tree.sub(new, ahead)) / size
        if reach is not None:
            least = jnp.where(i == 0, tol * jnp.maximum(jnp.asarray(reach, residual.dtype), residual), least)
        since = jnp.where(residual < best, 0, since + 1)
        return (
            i + 1, new, optax.tree.add_scale(new, momentum, step), following, size, residual,
            jnp.minimum(best, residual), since, least,
        )  # fmt: skip

    def unfinished(carry: Any) -> Any:
        i, *_, residual, _, since, least = carry
        return (i < steps) & (residual > least) & (since < PATIENCE)

    one, zero, infinite = jnp.ones((), dtype), jnp.zeros((), jnp.int32), jnp.full((), jnp.inf, dtype)
    least = jnp.zeros((), dtype) if reach is not None else jnp.asarray(tol, dtype)
    start = (zero, y, y, one, size, infinite, infinite, zero, least)
    _, y, _, _, size, *_, least = jax.lax.while_loop(unfinished, body, start)
    return Proximal(y, size, least / tol)


@state
class ProximalMemory:
    """What the solver remembers: its last step's length (0 before the first), and what its tolerance is a share of."""

    size: Scalar
    first: Scalar


@hyperparameters
class ProximalGradient:
    """Accelerated proximal gradient steps (FISTA) with a line search and restarts: no step size, no unit.

        y <- prox_{s r(x, .)}(Proj_Y(a - s f_y(x, a))),    a = y + momentum

    for lower levels with a projection, a prox, both or neither; the length s is found by halving (see
    `proximal_gradient`) and kept from one solve to the next. It ends when the residual |y - a| / s is at most `tol`
    times the one it began with (or a tenth of the last solve's, where that is larger), so that other units of f or y
    change nothing; or at the precision of the dtype, or after `steps`. For full batches; not differentiable in reverse
    (`hypergradients.Implicit` differentiates the solution).

    Attributes:
      steps: the most steps.
      tol: relative, on the proximal gradient's norm.

    Reference: Beck, Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", SIAM
    Journal on Imaging Sciences 2(1), 2009.
    """

    steps: int = 1000
    tol: float = 1e-6

    def __post_init__(self) -> None:
        check_count("ProximalGradient", steps=self.steps)
        if isinstance(self.tol, float) and not 0 < self.tol < 1:
            raise ValueError(f"ProximalGradient(tol={self.tol!r}): give a share between 0 and 1 of the first residual.")

    def init(self, y: PyTree) -> LowerState:
        """y, and no length yet."""
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(y)))
        return LowerState(y, ProximalMemory(zero, zero))

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        operator = level.prox
        prox = None if operator is None else (lambda y, size: operator(x, y, size))
        found = proximal_gradient(
            lambda y: level(x, y), state.y, level.project, prox, steps=self.steps, tol=self.tol,
            size=state.memory.size, reach=state.memory.first / 10,
        )  # fmt: skip
        found_now = ProximalMemory(found.size, found.first)
        memory = jax.tree.map(lambda new, old: new.astype(old.dtype), found_now, state.memory)
        return forward_only(LowerState(found.y, memory), NO_REVERSE)
