"""Flat maps: arrays (channels, rows x columns x batch), the batch innermost, and sums that XLA vectorises on CPU.

Every loop over a map is then one over two axes, which matrix products share; see `depthwise` for why that matters.
`scale`, `inner`, `total` and `spread` are each other's transposes, so that derivatives of every order stay among them:
a sum over pixels and samples is always a matrix product with a vector, never a reduction of an inner axis, which XLA
does number by number.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel.applications.layers.primitives import align, bilinear, bind, in_front, linear, primitive

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


def padded(x: Array, widths: Sequence[tuple[int, int]]) -> Array:
    """x with so many zeros before and behind along each axis, made once and not tested for in each read.

    On a CPU it is copied into zeros, at a place that XLA does not know: where it knows it, it writes a padding, whose
    every number is tested for the border, one by one.
    """
    widths = [(0, 0)] * (x.ndim - len(widths)) + list(widths)
    if jax.default_backend() != "cpu":
        return lax.optimization_barrier(jnp.pad(x, widths))
    zeros = jnp.zeros([low + size + high for (low, high), size in zip(widths, x.shape, strict=True)], x.dtype)
    start = [lax.optimization_barrier(np.int32(low)) if low + high else np.int32(0) for low, high in widths]
    return lax.optimization_barrier(lax.dynamic_update_slice(*align(zeros, x), start))


def shifted(x: Array, grid: Grid, down: int, right: int, fill: float = 0.0) -> Array:
    """The map whose pixel (i, j) is x's (i + down, j + right), `fill` outside."""
    moved = _shift_p.bind(x, grid=grid, down=down, right=right)
    if not fill:
        return moved
    batch = x.shape[-1] // (grid[0] * grid[1])
    row = lax.iota(jnp.int32, x.shape[-1]) // (batch * grid[1]) + down
    inside = (row >= 0) & (row < grid[0]) & same_row(right, grid[1], batch, x.shape[-1])
    return jnp.where(inside, moved, jnp.asarray(fill, x.dtype))


def _shifted(x: Array, *, grid: Grid, down: int, right: int) -> Array:
    batch = x.shape[-1] // (grid[0] * grid[1])
    offset = (down * grid[1] + right) * batch
    # Above and below, the padding is zeros; to the left and right an offset ends in another row.
    moved = padded(x, [(max(-offset, 0), max(offset, 0))])
    moved = lax.slice_in_dim(moved, max(offset, 0), max(offset, 0) + x.shape[-1], axis=-1)
    return jnp.where(same_row(right, grid[1], batch, x.shape[-1]), moved, 0) if right else moved


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
_shift_p = primitive("map_shift", lambda x, **_: x.shape, _shifted, in_front)

bilinear(_scale_p, lambda ct, _, factor: scale(factor, ct), lambda ct, _, x: inner(ct, x))
bilinear(_inner_p, lambda ct, _, y: scale(ct, y), lambda ct, _, x: scale(ct, x))
linear(_total_p, lambda ct, shape: spread(ct, shape[-1]))
linear(_spread_p, lambda ct, shape, length: total(ct))
linear(_shift_p, lambda ct, _, grid, down, right: shifted(ct, grid, -down, -right))
