"""Gradient descent whose steps are one over the curvature, on the whole space and on affine equalities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters, state
from bilevel.constraints import Equalities
from bilevel.curvature import unit_direction
from bilevel.level import Level
from bilevel.lower.loops import LowerState
from bilevel.lower.steps import GradientDescent
from bilevel.optimizers import check_count
from bilevel.typing import PyTree, Scalar

__all__ = ["EqualityDescent", "ScaledDescent"]

_FIRST = 30  # products for the first estimate


@state
class Curvature:
    """An estimate of |f_yy|, zero before the first, and the direction that it was found along."""

    size: Scalar
    direction: PyTree


def unknown_curvature(y: PyTree) -> Curvature:
    """Before the first look."""
    return Curvature(jnp.zeros((), jnp.result_type(*jax.tree.leaves(y))), unit_direction(y))


def curvature_at(known: Curvature, level: Level, x: PyTree, y: PyTree) -> Curvature:
    """The estimate after one more step of power iteration on f_yy at (x, y), and after thirty where there was none."""
    product = jax.linearize(lambda y: level.gradient(x, y), y)[1]

    def power(_: Any, known: Curvature) -> Curvature:
        v = product(known.direction)
        size = optax.tree.norm(v)
        usable = jnp.isfinite(size) & (size > jnp.finfo(size.dtype).tiny * 1e3)
        new = Curvature(size, jax.tree.map(lambda v: v / jnp.where(usable, size, 1), v))
        return jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, known)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, jnp.where(known.size > 0, 1, _FIRST), power, known))


def inverse_curvature(known: Curvature) -> Any:
    """1 / L; 1 where no curvature was seen."""
    return jnp.where(known.size > 0, 1 / jnp.where(known.size > 0, known.size, 1), 1)


def _step(step_size: Any, known: Curvature) -> Any:
    return inverse_curvature(known) if step_size is None else step_size


@hyperparameters
class ScaledDescent:
    """`steps` gradient steps of length 1 / L, L = |f_yy| by power iteration, for smooth lower levels.

        y <- y - f_y(x, y) / L

    The first call takes 30 Hessian-vector products, and each later one a single product, at the point where it starts;
    with a `step_size` there are none. In derivatives of a run L is a constant.

    Attributes:
      steps: per call, each on a fresh batch where the level's data are drawn.
      step_size: None: 1 / L.
    """

    steps: int = 20
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_count("ScaledDescent", steps=self.steps)

    def init(self, y: PyTree) -> LowerState:
        """y, and no estimate yet."""
        return LowerState(y, unknown_curvature(y) if self.step_size is None else None)

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        known = state.memory if self.step_size is not None else curvature_at(state.memory, level, x, state.y)
        solver = GradientDescent(_step(self.step_size, known), self.steps)
        return LowerState(solver(level, x, solver.init(state.y)).y, known)


@hyperparameters
class EqualityDescent:
    """Projected gradient steps on {y : h(x, y) = 0}, h affine in y: the lower solver of AiPOD and E-AiPOD.

        y <- Proj(y - beta f_y(x, y))

    With `skip` < 1 it is E-AiPOD's, which keeps a correction r from one call to the next and projects with this
    probability only:

        z = y - beta (f_y - r)
        with probability skip:   y <- Proj(z - (beta / skip) r),   r <- r + (skip / beta) (y - z)
        else:                    y <- z

    A call factors the constraints' A A' once. The level's random numbers decide, those of its `key`.

    Attributes:
      steps: per call.
      step_size: beta; None: 1 / L, as `ScaledDescent`.
      skip: the probability of projecting.

    Reference: Xiao, Shen, Yin, Chen, "Alternating Projected SGD for Equality-constrained Bilevel Optimization",
    AISTATS 2023.
    """

    steps: int = 5
    step_size: float | None = None
    skip: float = 1.0

    def __post_init__(self) -> None:
        check_count("EqualityDescent", steps=self.steps)
        if isinstance(self.skip, float) and not 0 < self.skip <= 1:
            raise ValueError(f"EqualityDescent(skip={self.skip!r}): a probability in (0, 1].")

    def init(self, y: PyTree) -> LowerState:
        """y, no estimate yet and no correction."""
        return LowerState(y, (unknown_curvature(y), optax.tree.zeros_like(y)))

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        y, (known, correction) = state.y, state.memory
        rows = Equalities.of(level, x, y)
        known = known if self.step_size is not None else curvature_at(known, level, x, y)
        beta = _step(self.step_size, known)

        def step(carry: tuple[PyTree, PyTree], i: Any) -> tuple[tuple[PyTree, PyTree], None]:
            y, r = carry
            gradient = level.redraw(i, self.steps).gradient(x, y)
            if self._always:
                return (rows.onto(optax.tree.add_scale(y, -beta, gradient)), r), None
            z = optax.tree.add_scale(y, -beta, optax.tree.sub(gradient, r))
            projected = rows.onto(optax.tree.add_scale(z, -beta / self.skip, r))
            corrected = optax.tree.add_scale(r, self.skip / beta, optax.tree.sub(projected, z))
            now = jax.random.bernoulli(jax.random.fold_in(level.key.random, i), self.skip)
            return jax.tree.map(lambda a, b: jnp.where(now, a, b), (projected, corrected), (z, r)), None

        (y, correction), _ = jax.lax.scan(step, (y, correction), jnp.arange(self.steps))
        return LowerState(y, (known, correction))

    @property
    def _always(self) -> bool:
        return isinstance(self.skip, float) and self.skip == 1
