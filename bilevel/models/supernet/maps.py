"""Flat maps: arrays (channels, rows x columns x batch), the batch innermost, and sums over them that XLA vectorises on CPU.

Every loop over a map is then one over two axes, which matrix products share; see `depthwise` for why that matters.
`scale`, `inner`, `total` and `spread` are each other's transposes, so that derivatives of every order stay among them: a sum
over pixels and samples is always a matrix product with a vector, never a reduction of an inner axis, which XLA does number
by number.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir

Grid = tuple[int, int]


def halved(grid: Grid, stride: int = 2) -> Grid:
    """Rows and columns after a stride."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def planes(x: Array, grid: Grid, stride: int) -> list[Array]:
    """The stride^2 maps of pixels (stride i + a, stride j + b), number a stride + b; with zeros where the side is no multiple."""
    if stride == 1:
        return [x]
    rows, columns = halved(grid, stride)
    full = x.reshape(*x.shape[:-1], *grid, -1)
    lead = [(0, 0)] * (x.ndim - 1)
    full = jnp.pad(full, [*lead, (0, rows * stride - grid[0]), (0, columns * stride - grid[1]), (0, 0)])
    full = full.reshape(*x.shape[:-1], rows, stride, columns, stride, -1)
    return [full[..., :, a, :, b, :].reshape(*x.shape[:-1], -1) for a in range(stride) for b in range(stride)]


def unite(parts: Sequence[Array], grid: Grid, stride: int) -> Array:
    """The map of those planes."""
    if stride == 1:
        return parts[0]
    rows, columns = halved(grid, stride)
    lead = parts[0].shape[:-1]
    cut = [p.reshape(*lead, rows, columns, -1) for p in parts]
    lines = [jnp.stack(cut[a * stride : (a + 1) * stride], axis=-2) for a in range(stride)]
    full = jnp.stack(lines, axis=-4).reshape(*lead, rows * stride, columns * stride, -1)
    return full[..., : grid[0], : grid[1], :].reshape(*lead, -1)


def shifted(x: Array, grid: Grid, down: int, right: int, fill: float = 0.0) -> Array:
    """The map whose pixel (i, j) is x's (i + down, j + right), `fill` outside."""
    batch = x.shape[-1] // (grid[0] * grid[1])
    offset = (down * grid[1] + right) * batch
    widths = [(0, 0, 0)] * (x.ndim - 1) + [(max(-offset, 0), max(offset, 0), 0)]
    # Above and below, the padding is the fill; to the left and right an offset ends in another row. The barrier has the
    # padding made once: XLA would put its tests into the loop that reads it.
    moved = lax.optimization_barrier(lax.pad(x, jnp.asarray(fill, x.dtype), widths))
    moved = lax.slice_in_dim(moved, max(offset, 0), max(offset, 0) + x.shape[-1], axis=-1)
    if not right:
        return moved
    return jnp.where(same_row(right, grid[1], batch, x.shape[-1]), moved, jnp.asarray(fill, x.dtype))


def same_row(right: int, columns: int, batch: int, length: int) -> Array:
    """Whether the pixel so far to the right is of the same row."""
    column = lax.iota(jnp.int32, length) // batch % columns + right
    return (column >= 0) & (column < columns)


def scale(factor: Array, x: Array) -> Array:
    """factor[c] x[c, l]."""
    return _scale_p.bind(factor, x)


def inner(x: Array, y: Array) -> Array:
    """sum over l of x[c, l] y[c, l]."""
    return _inner_p.bind(x, y)


def total(x: Array) -> Array:
    """sum over l of x[c, l]."""
    return _total_p.bind(x)


def spread(b: Array, length: int) -> Array:
    """b[c] at every l."""
    return _spread_p.bind(b, length=length)


_scale_p = jax.extend.core.Primitive("map_scale")
_inner_p = jax.extend.core.Primitive("map_inner")
_total_p = jax.extend.core.Primitive("map_total")
_spread_p = jax.extend.core.Primitive("map_spread")


def _inner(x: Array, y: Array) -> Array:
    lead = tuple(range(x.ndim - 1))
    return lax.dot_general(x, y, (((x.ndim - 1,), (x.ndim - 1,)), (lead, lead)), precision=lax.Precision.HIGHEST)


def _total(x: Array) -> Array:
    return jnp.matmul(x, jnp.ones(x.shape[-1], x.dtype), precision=lax.Precision.HIGHEST)


def _spread(b: Array, *, length: int) -> Array:
    return jnp.broadcast_to(b[..., None], (*b.shape, length))


_scale_p.def_abstract_eval(lambda factor, x: x.update(weak_type=False))
_inner_p.def_abstract_eval(lambda x, y: x.update(shape=x.shape[:-1], weak_type=False))
_total_p.def_abstract_eval(lambda x: x.update(shape=x.shape[:-1], weak_type=False))
_spread_p.def_abstract_eval(lambda b, length: b.update(shape=(*b.shape, length), weak_type=False))

ad.defbilinear(_scale_p, lambda ct, factor, x: _inner_p.bind(ct, x), lambda ct, factor, x: _scale_p.bind(factor, ct))
ad.defbilinear(_inner_p, lambda ct, x, y: _scale_p.bind(ct, y), lambda ct, x, y: _scale_p.bind(ct, x))
ad.deflinear2(_total_p, lambda ct, x: [_spread_p.bind(ct, length=x.aval.shape[-1])])
ad.deflinear2(_spread_p, lambda ct, b, length: [_total_p.bind(ct)])


def mapped_size(args: Any, axes: Any) -> int:
    """The length of the axis that `vmap` maps."""
    return next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)


def mapped_first(args: Any, axes: Any) -> list[Array]:
    """The operands with the mapped axis in front, repeated where one has none."""
    n = mapped_size(args, axes)
    return [
        jnp.broadcast_to(a, (n, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(args, axes, strict=True)
    ]


def _batch(primitive: Any, args: Any, axes: Any, **static: Any) -> Any:
    """A mapped axis is one more in front."""
    return primitive.bind(*mapped_first(args, axes), **static), 0


def _register(primitive: Any, lowering: Any) -> None:
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(lowering, multiple_results=False))
    run = jax.jit(lambda args, static: primitive.bind(*args, **dict(static)), static_argnums=1)
    primitive.def_impl(lambda *args, **static: run(args, tuple(static.items())))


_register(_scale_p, lambda factor, x: x * factor[..., None])
_register(_inner_p, _inner)
_register(_total_p, _total)
_register(_spread_p, _spread)
