"""The lower level's constraints as one vector of rows of equal scale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel._traces import reached
from bilevel.level import Level
from bilevel.typing import PyTree

__all__ = ["Constraints", "Equalities", "depends", "is_affine", "random_like", "row_norms"]


class Constraints:
    """c(x, y) in R^p, inequalities c_i <= 0 first, then equalities c_i = 0, each row divided by its norm at the start.

    A saddle point is only as well conditioned as its constraints: a row of norm 17 makes a step 300 times too long or
    too short. Methods therefore work on scaled rows, with multipliers in the units of those; `multipliers` gives them
    back in the user's units, for f + lam . g + mu . h.

    Args:
      level: the level whose `constraint` and `equality` these are.
      x, y: a point, for the shapes.
      scale: (p,), what each row is multiplied with; None: ones. `at` gives rows of norm one.

    Attributes:
      count: p; zero where the problem has no coupled constraint.
      inequality: bool (p,), host constant: which rows are inequalities.
      scale: (p,), what each row is multiplied with.
    """

    def __init__(self, level: Level, x: PyTree, y: PyTree, scale: Any = None) -> None:
        self.parts = level.constraint, level.equality
        shapes = [jax.eval_shape(part, x, y) if part is not None else () for part in self.parts]
        counts = [sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shape)) for shape in shapes]
        self.shapes, self.count = shapes, sum(counts)
        self.inequality = np.arange(self.count) < counts[0]
        self.dtype = jnp.result_type(*jax.tree.leaves(y))
        self.scale = jnp.ones((self.count,), self.dtype) if scale is None else scale

    def raw(self, x: PyTree, y: PyTree) -> jax.Array:
        """The rows in the user's units."""
        leaves = [leaf for part in self.parts if part is not None for leaf in jax.tree.leaves(part(x, y))]
        if not leaves:
            return jnp.zeros((0,), self.dtype)
        return jnp.concatenate([jnp.ravel(leaf).astype(self.dtype) for leaf in leaves])

    def __call__(self, x: PyTree, y: PyTree) -> jax.Array:
        """c(x, y), shape (p,)."""
        return self.scale * self.raw(x, y)

    def excess(self, x: PyTree, y: PyTree) -> jax.Array:
        """What each row breaks: max(c_i, 0) or c_i, in scaled units."""
        value = self(x, y)
        return jnp.where(self.inequality, jnp.maximum(value, 0), value)

    def violation(self, x: PyTree, y: PyTree) -> jax.Array:
        """The largest |excess|: about the distance to the feasible set where rows have norm one. Zero without rows."""
        return jnp.max(jnp.abs(self.excess(x, y)), initial=0.0)

    def clip(self, multipliers: jax.Array, cap: Any = jnp.inf) -> jax.Array:
        """The projection on [0, cap] (inequalities) and [-cap, cap] (equalities)."""
        return jnp.clip(multipliers, jnp.where(self.inequality, 0.0, -cap).astype(self.dtype), cap)

    def multipliers(self, scaled: jax.Array) -> dict[str, PyTree]:
        """Multipliers in the user's units, shaped like the outputs of `constraint` and `equality`."""
        values, found, first = self.scale * scaled, {}, 0
        for name, shape in zip(("constraint", "equality"), self.shapes, strict=True):
            leaves, structure = jax.tree.flatten(shape)
            if not leaves:
                continue
            parts = []
            for leaf in leaves:
                size = int(np.prod(leaf.shape))
                parts.append(values[first : first + size].reshape(leaf.shape))
                first += size
            found[name] = jax.tree.unflatten(structure, parts)
        return found

    def times(self, factor: Any) -> Constraints:
        """The same constraints with all rows multiplied by a number."""
        return self._scaled(self.scale * factor)

    def _scaled(self, scale: jax.Array) -> Constraints:
        other = copy.copy(self)
        other.scale = scale
        return other

    def at(self, x: PyTree, y: PyTree) -> Constraints:
        """The same constraints, each row scaled to norm one at (x, y); without a gradient there its scale is one."""
        if not self.count:
            return self
        norms = row_norms(self.raw, x, y)
        largest = jnp.max(norms, initial=0.0)
        usable = norms > 1e-6 * jnp.where(largest > 0, largest, 1.0)
        return self._scaled(jnp.where(usable, 1 / jnp.where(usable, norms, 1.0), 1.0).astype(self.dtype))


class Equalities(NamedTuple):
    """The rows c(y) = A y - b of one x that are affine in y, and the projections that belong to them.

    Attributes:
      rows: y -> (p,).
      push, pull: v -> A v and q -> A' q.
      inverse: (p, p), a generalised inverse of A A'.
    """

    rows: Callable[[PyTree], jax.Array]
    push: Callable[[PyTree], jax.Array]
    pull: Callable[[jax.Array], PyTree]
    inverse: jax.Array

    @classmethod
    def of(cls, level: Level, x: PyTree, y: PyTree) -> Equalities:
        """Those of a level at x: p products with A and A', and one factorisation."""
        all_rows = Constraints(level, x, y)
        rows = lambda y: all_rows.raw(x, y)  # noqa: E731
        push = jax.linearize(rows, y)[1]
        transposed = jax.linear_transpose(push, y)
        pull = lambda q: transposed(q)[0]  # noqa: E731
        matrix = jax.vmap(lambda q: push(pull(q)))(jnp.eye(all_rows.count, dtype=all_rows.dtype))
        size = jnp.diag(matrix)
        unit = jnp.where(size > 0, 1 / jnp.sqrt(jnp.where(size > 0, size, 1)), 1.0)
        rtol = 1e3 * jnp.finfo(all_rows.dtype).eps
        inverse = unit[:, None] * jnp.linalg.pinv(unit[:, None] * matrix * unit, rtol=rtol, hermitian=True) * unit
        return cls(rows, push, pull, inverse)

    def onto(self, y: PyTree) -> PyTree:
        """The projection of y on {c = 0}."""
        return optax.tree.sub(y, self.pull(self.inverse @ self.rows(y)))

    def along(self, v: PyTree) -> PyTree:
        """The projection of v on the null space of A."""
        return optax.tree.sub(v, self.pull(self.inverse @ self.push(v)))


# Above this many rows their norms are estimated: E (Jv)_i^2 = |J_i|^2 for random signs v.
_EXACT_ROWS = 512
_PROBES = 64


def row_norms(fn: Any, x: PyTree, y: PyTree) -> jax.Array:
    """The norms of the rows of the Jacobian of `fn(x, y)`, shape (p,), in both variables together.

    The larger of the norms at (x, y) and at a point nearby, so that a row whose gradient happens to vanish is not lost.
    """

    def at(point: tuple[PyTree, PyTree]) -> jax.Array:
        value, push = jax.linearize(lambda u: fn(*u), point)
        if value.shape[0] <= _EXACT_ROWS:
            pull, unit = jax.linear_transpose(push, point), jnp.eye(value.shape[0], dtype=value.dtype)
            return jnp.sqrt(jax.lax.map(lambda w: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(pull(w))), unit))
        keys = jax.random.split(jax.random.key(0), _PROBES)
        squares = jax.lax.map(lambda key: push(random_like(key, point, jax.random.rademacher)) ** 2, keys)
        return jnp.sqrt(squares.mean(0))

    point = x, y
    away = lambda p, noise: p + (1 + jnp.max(jnp.abs(p), initial=0.0)) * noise  # noqa: E731
    here, there = at(point), at(jax.tree.map(away, point, random_like(jax.random.key(1), point)))
    return jnp.where(here > 1e-6, here, there)


def random_like(key: jax.Array, like: PyTree, sampler: Any = jax.random.normal) -> PyTree:
    """Independent draws shaped like `like`, leaf number i by the key with i folded in."""
    leaves, structure = jax.tree.flatten(like)
    draws = [sampler(jax.random.fold_in(key, i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, draws)


def depends(fn: Any, *args: PyTree, on: int = 0) -> bool:
    """Whether fn's value depends on argument number `on`, read off its trace: static, under `jit` and `vmap` too."""
    sizes = [len(jax.tree.leaves(arg)) for arg in args]
    first = sum(sizes[:on])
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return any(reached(jaxpr, [first <= i < first + sizes[on] for i in range(len(jaxpr.invars))]))


def is_affine(fn: Any, *args: PyTree) -> bool:
    """Whether the derivative of `fn(*args)` is the same everywhere, read off its trace.

    A syntactic test: True is certain; an affine function written in a roundabout way may be missed.
    """
    return not depends(lambda point, tangent: jax.jvp(fn, point, tangent)[1], args, args, on=0)
