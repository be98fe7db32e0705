"""Flat maps: arrays (channels, rows x columns x batch), the batch innermost, and sums that XLA vectorises on CPU.

Every loop over a map is then one over two axes, which matrix products share; see `depthwise` for why that matters.
`scale`, `inner`, `total` and `spread` are each other's transposes, so that derivatives of every order stay among them:
a sum over pixels and samples is always a matrix product with a vector, never a reduction of an inner axis, which XLA
does number by number.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from bilevel.applications.layers.primitives import bilinear, bind, in_front, linear, primitive

Grid = tuple[int, int]


def halved(grid: Grid, stride: int = 2) -> Grid:
    """Rows and columns after a stride."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def planes(x: Array, grid: Grid, stride: int) -> list[Array]:
    """The stride^2 maps of pixels (stride i + a, stride j + b), at a stride + b; zeros where a side ends early."""
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
    return bind(_scale_p, x, factor)


def inner(x: Array, y: Array) -> Array:
    """sum over l of x[c, l] y[c, l]."""
    return bind(_inner_p, x, y)


def total(x: Array) -> Array:
    """sum over l of x[c, l]."""
    return _total_p.bind(x)


def spread(b: Array, length: int) -> Array:
    """b[c] at every l."""
    return _spread_p.bind(b, length=length)


def _inner(x: Array, y: Array) -> Array:
    lead = tuple(range(x.ndim - 1))
    return lax.dot_general(x, y, (((x.ndim - 1,), (x.ndim - 1,)), (lead, lead)), precision=lax.Precision.HIGHEST)


def _total(x: Array) -> Array:
    return jnp.matmul(x, jnp.ones(x.shape[-1], x.dtype), precision=lax.Precision.HIGHEST)


def _spread(b: Array, *, length: int) -> Array:
    return jnp.broadcast_to(b[..., None], (*b.shape, length))


_scale_p = primitive("map_scale", lambda x, factor: x.shape, lambda x, factor: x * factor[..., None], in_front)
_inner_p = primitive("map_inner", lambda x, y: x.shape[:-1], _inner, in_front)
_total_p = primitive("map_total", lambda x: x.shape[:-1], _total, in_front)
_spread_p = primitive("map_spread", lambda b, length: (*b.shape, length), _spread, in_front)

bilinear(_scale_p, lambda ct, _, factor: scale(factor, ct), lambda ct, _, x: inner(ct, x))
bilinear(_inner_p, lambda ct, _, y: scale(ct, y), lambda ct, _, x: scale(ct, x))
linear(_total_p, lambda ct, shape: spread(ct, shape[-1]))
linear(_spread_p, lambda ct, shape, length: total(ct))
