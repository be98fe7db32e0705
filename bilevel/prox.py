"""Proximal operators of nonsmooth lower-level terms, for `Problem(prox_lower=...)`.

    problem = Problem(..., prox_lower=prox.lasso(lambda x: jnp.exp(x)))         # adds e^x |y|_1 to the lower loss

Each function here builds an operator with the arguments of `Problem.prox_lower`,

    prox(x, y, scaling) = argmin over u of  |u - y|^2 / 2 + scaling r(x, u),

from the strength of its term: a number, a tree that is spread over y (one strength for a whole part, or one for each
entry), or a function of x that returns either. Strengths are not negative. Without a Problem the operators serve as
they are: `prox.lasso(0.1)(None, y, 1.0)`.

| operator | r(x, y) |
|---|---|
| `none()` | 0 |
| `lasso(strength)` | strength times the 1-norm of y |
| `group_lasso(strength, axis)` | strength times the sum of the groups' 2-norms |
| `ridge(strength)` | strength times half the square of the 2-norm |
| `elastic_net(lasso, ridge)` | both, each with its own strength |
| `non_negative_lasso(strength)` | lasso, and y >= 0 |
| `non_negative_ridge(strength)` | ridge, and y >= 0 |
| `log_barrier(strength)` | minus strength times the sum of log y |
| `least_squares(A, b, strength)` | strength times half the square of the 2-norm of A y - b |
| `non_negative_least_squares(A, b, strength)` | the same, and y >= 0 |
| `projection(set)` | 0 on the set, infinite elsewhere |
| `chain(first, second, ...)` | one after the other: the sum, where that is exact |

All are differentiable in both modes with respect to y, x and the scaling, without NaN at the kinks, where the
derivative is that of one side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel._arguments import explained
from bilevel.quadratic import qp
from bilevel.sets import _aligned, _flat, _known
from bilevel.typing import Project, PyTree

__all__ = [
    "chain", "elastic_net", "group_lasso", "lasso", "least_squares", "log_barrier", "non_negative_lasso",
    "non_negative_least_squares", "non_negative_ridge", "none", "projection", "ridge",
]  # fmt: skip

Strength = Any
Prox = Callable[[PyTree, PyTree, Any], PyTree]


@explained
def none() -> Prox:
    """The operator of r = 0: y itself."""
    return lambda x, y, scaling: y


@explained
def lasso(strength: Strength) -> Prox:
    """r = strength |y|_1: sign(y) max(|y| - scaling strength, 0), soft thresholding.

    Args:
      strength: not negative; see the module.
    """
    return _entrywise("lasso", _soft, strength)


@explained
def ridge(strength: Strength) -> Prox:
    """r = strength |y|^2 / 2: y / (1 + scaling strength).

    jaxopt's `prox_ridge` computes the same; its documentation leaves the half out.
    """
    return _entrywise("ridge", lambda y, s: y / (1 + s), strength)


@explained
def elastic_net(lasso: Strength, ridge: Strength) -> Prox:
    """r = lasso |y|_1 + ridge |y|^2 / 2: soft thresholding, then shrinking.

    jaxopt's strengths (l, g) are `elastic_net(l, l * g)` here: each term has its own strength.
    """
    return _entrywise("elastic_net", lambda y, one, two: _soft(y, one) / (1 + two), lasso, ridge)


@explained
def non_negative_lasso(strength: Strength) -> Prox:
    """r = strength |y|_1 on y >= 0: max(y - scaling strength, 0)."""
    return _entrywise("non_negative_lasso", lambda y, s: jax.nn.relu(y - s), strength)


@explained
def non_negative_ridge(strength: Strength) -> Prox:
    """r = strength |y|^2 / 2 on y >= 0: max(y, 0) / (1 + scaling strength)."""
    return _entrywise("non_negative_ridge", lambda y, s: jax.nn.relu(y) / (1 + s), strength)


@explained
def log_barrier(strength: Strength) -> Prox:
    """r = - strength sum log y: (y + sqrt(y^2 + 4 scaling strength)) / 2, positive; written so that nothing cancels."""

    def positive(y: jax.Array, s: jax.Array) -> jax.Array:
        root = jnp.sqrt(jnp.where((y == 0) & (s == 0), 1.0, y**2 + 4 * s))
        below = y < 0
        away = 2 * s / jnp.where(below, root - y, 1.0)
        return jnp.where((y == 0) & (s == 0), 0.0, jnp.where(below, away, (y + root) / 2))

    return _entrywise("log_barrier", positive, strength)


@explained
def group_lasso(strength: Strength, axis: int | tuple[int, ...] | None = None) -> Prox:
    """r = sum over groups of strength |y_g|_2: y_g max(1 - scaling strength / |y_g|, 0).

    Args:
      strength: a number; with `axis`, also one for each group: an array that broadcasts to a leaf with `axis` left out
        (for y of shape (groups, terms) and `axis=1`, of shape (groups,)), or a tree of them.
      axis: None: all of y is one group, over its leaves. Else the entries of a leaf along this axis, or these axes,
        are a group, for every leaf.
    """
    _check("group_lasso", strength)

    def prox(x: PyTree, y: PyTree, scaling: Any) -> PyTree:
        value = strength(x) if callable(strength) else strength
        if axis is None:
            flat, back = _flat(y)
            return back(_shrunk(flat, jnp.asarray(scaling * jnp.asarray(value), flat.dtype), None))

        def leafwise(leaf: jax.Array, value: Any) -> jax.Array:
            leaf = jnp.asarray(leaf)
            axes = (axis,) if isinstance(axis, int) else tuple(axis)
            if not all(-leaf.ndim <= a < leaf.ndim for a in axes):
                raise ValueError(f"group_lasso(axis={axis}) was given a leaf of shape {leaf.shape}.")
            value = jnp.asarray(value, jnp.promote_types(leaf.dtype, jnp.float32))
            groups = tuple(length for i, length in enumerate(leaf.shape) if i not in [a % leaf.ndim for a in axes])
            try:
                value = jnp.broadcast_to(value, groups)
            except ValueError:
                raise ValueError(
                    f"group_lasso: the strength has the shape {value.shape} and the groups have {groups}."
                ) from None
            value = jnp.expand_dims(value, [a % leaf.ndim for a in axes])
            return _shrunk(leaf.astype(value.dtype), scaling * value, axes).astype(leaf.dtype)

        if jax.tree.structure(value) == jax.tree.structure(y):  # type: ignore[operator]
            return jax.tree.map(leafwise, y, value)
        return jax.tree.map(lambda leaf: leafwise(leaf, value), y)

    return prox


@explained
def least_squares(A: Any, b: Any, strength: Strength = 1.0) -> Prox:
    """r = strength |A y - b|^2 / 2: (I + scaling strength A^T A)^{-1} (y + scaling strength A^T b), y raveled.

    Args:
      A, b: a matrix (rows, unknowns) and a vector (rows,), or functions of x that return them.
      strength: a number or a function of x.
    """
    _check("least_squares", strength)

    def prox(x: PyTree, y: PyTree, scaling: Any) -> PyTree:
        flat, back = _flat(y)
        matrix, vector, size = _system("least_squares", A, b, strength, x, flat)
        left = jnp.eye(flat.shape[0], dtype=flat.dtype) + scaling * size * matrix.T @ matrix
        return back(jnp.linalg.solve(left, flat + scaling * size * matrix.T @ vector))

    return prox


@explained
def non_negative_least_squares(A: Any, b: Any, strength: Strength = 1.0) -> Prox:
    """r = strength |A y - b|^2 / 2 on y >= 0, by `implicit.qp`; the arguments are those of `least_squares`."""
    _check("non_negative_least_squares", strength)

    def prox(x: PyTree, y: PyTree, scaling: Any) -> PyTree:
        flat, back = _flat(y)
        matrix, vector, size = _system("non_negative_least_squares", A, b, strength, x, flat)
        identity = jnp.eye(flat.shape[0], dtype=flat.dtype)
        Q = identity + scaling * size * matrix.T @ matrix
        found = qp(Q, -(flat + scaling * size * matrix.T @ vector), G=-identity, h=jnp.zeros_like(flat))
        return back(jax.nn.relu(found.y))

    return prox


@explained
def projection(project: Project) -> Prox:
    """r = 0 on a set and infinite elsewhere: the projection, whatever x and the scaling are.

    Args:
      project: a set of `bilevel.sets`, or any projection `y -> y`.
    """
    if not callable(project):
        raise TypeError(f"prox.projection takes a set or a projection y -> y, not {project!r}.")
    return lambda x, y, scaling: project(y)


@explained
def chain(*operators: Prox) -> Prox:
    """One operator after the other. The result is the operator of the terms' sum in the cases where that is known:

    lasso, then group_lasso (the sparse group lasso); any separable term, then a box that holds zero; lasso, then ridge.
    It is a heuristic elsewhere.
    """
    if not operators or not all(callable(operator) for operator in operators):
        raise TypeError("prox.chain takes operators: prox.chain(prox.lasso(0.1), prox.group_lasso(0.2, axis=1)).")

    def prox(x: PyTree, y: PyTree, scaling: Any) -> PyTree:
        for operator in operators:
            y = operator(x, y, scaling)
        return y

    return prox


def _soft(y: jax.Array, threshold: jax.Array) -> jax.Array:
    """Soft thresholding; at zero strength the identity, with its derivative."""
    return jnp.where(
        y > threshold, y - threshold, jnp.where(y < -threshold, y + threshold, jnp.where(threshold == 0, y, 0.0))
    )


def _shrunk(v: jax.Array, threshold: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
    """v max(1 - threshold / |v|, 0) over groups, in which lengths neither overflow nor divide by zero."""
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(v), axis=axes, keepdims=axes is not None, initial=0.0))
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1.0)
    squares = jnp.sum((v / unit) ** 2, axis=axes, keepdims=axes is not None)
    length = unit * jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    kept = (squares > 0) & (length > threshold)
    shrunk = v * jnp.where(kept, 1 - threshold / length, 0.0)
    return jnp.where(jnp.isnan(squares), jnp.nan, jnp.where(threshold == 0, v, shrunk))


def _entrywise(name: str, formula: Callable[..., jax.Array], *strengths: Strength) -> Prox:
    for strength in strengths:
        _check(name, strength)

    def prox(x: PyTree, y: PyTree, scaling: Any) -> PyTree:
        values = [strength(x) if callable(strength) else strength for strength in strengths]
        spread = [_aligned(f"prox.{name}'s strength", value, y) for value in values]

        def leafwise(leaf: Any, *values: jax.Array) -> jax.Array:
            leaf = jnp.asarray(leaf)
            wide = jnp.promote_types(leaf.dtype, jnp.float32)
            sizes = (jnp.asarray(scaling, wide) * value.astype(wide) for value in values)
            return formula(leaf.astype(wide), *sizes).astype(leaf.dtype)

        return jax.tree.map(leafwise, y, *spread)

    return prox


def _check(name: str, strength: Strength) -> None:
    if strength is None or isinstance(strength, (str, bool)):
        raise TypeError(f"prox.{name} takes its strength as a number, a tree or a function of x, not {strength!r}.")
    if not callable(strength):
        for leaf in jax.tree.leaves(strength):
            known = _known(leaf)
            if known is not None and not (known >= 0).all():
                raise ValueError(f"prox.{name}: the strength {known} is negative or NaN; r would not be convex.")


def _system(owner: str, A: Any, b: Any, strength: Any, x: PyTree, flat: jax.Array) -> tuple[Any, Any, Any]:
    matrix, vector, size = (part(x) if callable(part) else part for part in (A, b, strength))
    matrix, vector = jnp.asarray(matrix, flat.dtype), jnp.asarray(vector, flat.dtype)
    if matrix.ndim != 2 or matrix.shape[1] != flat.shape[0] or vector.shape != matrix.shape[:1]:
        raise ValueError(
            f"prox.{owner} takes A (rows, {flat.shape[0]}) and b (rows,), and was given the shapes {matrix.shape} and "
            f"{vector.shape}."
        )
    return matrix, vector, jnp.asarray(size, flat.dtype)
