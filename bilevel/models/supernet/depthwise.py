"""Depthwise convolution with the batch as the last axis, many kernels for one input, closed under differentiation.

A supernet applies many small kernels to one feature map. With the batch innermost every shift of the map by a pixel is
a contiguous run of memory, whatever the stride, and the k^2 multiply-adds of a depthwise kernel are one vectorised
loop; XLA's own grouped convolution is slow on CPU, and so is the transpose that automatic
differentiation makes of the shifts. The convolution is therefore stated as what it is, one of the three gradients of

    phi(x, k, g) = sum over t, c, i, j, a, b, n of  g[t, c, i, j, n] k[t, c, a, b] x[t // m, c, s i + d a - p, s j + d b - p, n]

with t = 0..T-1 edges, of which m in a row read the same input, channels c, samples n, stride s, dilation d, padding p.
Each gradient is a primitive that is linear in the other two operands, and its transposes are the other two primitives:
derivatives of every order and mode stay among the three.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.interpreters import ad, batching, mlir


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static part: map size (rows, columns), kernel size, stride, dilation, padding."""

    rows: int
    columns: int
    size: int
    stride: int
    dilation: int

    @property
    def padding(self) -> int:
        """Zeros on each side: the map keeps its size at stride 1."""
        return self.dilation * (self.size - 1) // 2

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        span = self.dilation * (self.size - 1) + 1
        rows, columns = ((side + 2 * self.padding - span) // self.stride + 1 for side in (self.rows, self.columns))
        return rows, columns

    def taps(self) -> Iterator[tuple[int, int]]:
        """The positions of the kernel."""
        for a in range(self.size):
            for b in range(self.size):
                yield a, b


def depthwise(x: Array, kernel: Array, *, stride: int = 1, dilation: int = 1) -> Array:
    """Convolve each input with the kernels that read it, channel by channel, zeros around the map.

        out[t, c, i, j, n] = sum_ab kernel[t, c, a, b] x[t // m, c, s i + d a - p, s j + d b - p, n],  p = d (k - 1) / 2

    Args:
        x: (inputs, channels, rows, columns, batch).
        kernel: (T, channels, k, k), k odd, T a multiple m of the number of inputs: the first m kernels read input 0,
            the next m input 1, ...
        stride: s.
        dilation: d.

    Returns:
        (T, channels, ceil(rows / s), ceil(columns / s), batch).
    """
    if (
        x.ndim != 5
        or kernel.ndim != 4
        or x.shape[1] != kernel.shape[1]
        or kernel.shape[0] % x.shape[0]
        or kernel.shape[2] != kernel.shape[3]
        or kernel.shape[2] % 2 == 0
    ):
        raise ValueError(
            f"depthwise was given x of shape {x.shape} and a kernel of shape {kernel.shape}; it expects (inputs, "
            "channels, rows, columns, batch) and (a multiple of inputs, channels, k, k) with k odd."
        )
    geometry = Geometry(x.shape[2], x.shape[3], kernel.shape[2], stride, dilation)
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return _out_p.bind(x.astype(dtype), kernel.astype(dtype), inputs=x.shape[0], geometry=geometry)


def _pad(x: Array, low: int, high: tuple[int, int], spread: int = 0) -> Array:
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, [(0, 0, 0)] * (x.ndim - 3) + [(low, high[0], spread), (low, high[1], spread), (0, 0, 0)])


def _window(x: Array, top: int, left: int, out: tuple[int, int], stride: int) -> Array:
    """Rows and columns top, left, ... of a padded map, as many as `out`, every `stride`."""
    lead = x.ndim - 3
    start = (*[0] * lead, top, left, 0)
    stop = (*x.shape[:lead], top + (out[0] - 1) * stride + 1, left + (out[1] - 1) * stride + 1, x.shape[-1])
    return lax.slice(x, start, stop, (*[1] * lead, stride, stride, 1))


def _out(x: Array, kernel: Array, *, inputs: int, geometry: Geometry) -> Array:
    g = geometry
    # The copy with its border is made once; without the barrier XLA tests each of the k^2 reads for the border.
    padded = lax.optimization_barrier(_pad(x, g.padding, (g.padding, g.padding)))[:, None]
    kernel = kernel.reshape(inputs, -1, *kernel.shape[1:])
    total: Any = 0
    for a, b in g.taps():
        seen = _window(padded, a * g.dilation, b * g.dilation, g.out, g.stride)
        total = total + seen * kernel[..., a, b, None, None, None]
    return total.reshape(-1, *total.shape[2:])


def _input(out: Array, kernel: Array, *, inputs: int, geometry: Geometry) -> Array:
    """Spread out to the input's grid, convolve with the turned kernels, and add over the edges of each input."""
    g = geometry
    reach = g.dilation * (g.size - 1)
    low = reach - g.padding
    high = tuple(
        side + reach - low - ((n - 1) * g.stride + 1) for side, n in zip((g.rows, g.columns), g.out, strict=True)
    )
    padded = lax.optimization_barrier(_pad(out, low, high, g.stride - 1))  # type: ignore[arg-type]
    padded = padded.reshape(inputs, -1, *padded.shape[1:])
    kernel = kernel.reshape(inputs, -1, *kernel.shape[1:])
    total: Any = 0
    for t in range(padded.shape[1]):
        for a, b in g.taps():
            seen = _window(padded[:, t], reach - a * g.dilation, reach - b * g.dilation, (g.rows, g.columns), 1)
            total = total + seen * kernel[:, t, :, a, b, None, None, None]
    return total


# Up to so many columns the kernel's gradient is matrix products, of which most is thrown away; above it is written out.
_NARROW = 8

# Maps of so many bytes are worked on at a time when it is written out, so that they stay in a core's cache.
_CACHE = 2**18


def _kernel(x: Array, out: Array, *, inputs: int, geometry: Geometry) -> Array:
    g = geometry
    edges, channels = out.shape[:2]
    padded = _pad(x, g.padding, (g.padding, g.padding))
    planes = padded.reshape(-1, *padded.shape[2:])
    t = np.arange(edges * channels)
    source = (t // channels) // (edges // inputs) * channels + t % channels
    way = _kernel_products if g.out[1] <= _NARROW else _kernel_sums
    result = way(planes, out.reshape(-1, *out.shape[2:]), source, channels, g)
    return result.reshape(edges, channels, g.size, g.size)


def _kernel_products(x: Array, out: Array, source: Any, channels: int, g: Geometry) -> Array:
    """For each row of the kernel all products of a column of the padded map with one of the result, of which a band is
    wanted: one matrix product per row of the kernel, and little to compile."""
    planes, rows, columns, _ = out.shape
    ours = out.swapaxes(1, 2).reshape(planes, columns, -1)
    theirs = (x if len(x) == planes else x[source]).swapaxes(1, 2)
    j, b = np.arange(columns), np.arange(g.size)[:, None]
    band = np.zeros((g.size, x.shape[2], columns), out.dtype)
    band[b, j * g.stride + b * g.dilation, j] = 1
    sums = []
    for a in range(g.size):
        top = a * g.dilation
        seen = theirs[:, :, top : top + (rows - 1) * g.stride + 1 : g.stride]
        products = jnp.einsum("pik,pjk->pij", seen.reshape(planes, x.shape[2], -1), ours)
        sums.append(jnp.einsum("pij,bij->pb", products, band))
    return jnp.stack(sums, axis=1)


def _kernel_sums(x: Array, out: Array, source: Any, channels: int, g: Geometry) -> Array:
    """A few planes (edge and channel) at a time, which stay in cache for all taps; columns are added as vectors, a sum
    that XLA would not vectorise if it were stated as one."""

    def sums(theirs: Array, ours: Array) -> Any:
        found = []
        for a, b in g.taps():
            seen = _window(theirs, a * g.dilation, b * g.dilation, g.out, g.stride)
            found.append(functools.reduce(jnp.add, [seen[..., w, :] * ours[..., w, :] for w in range(g.out[1])]))
        return tuple(found)

    at_once = max(1, _CACHE // (out[0].size * out.dtype.itemsize))
    size = max(n for n in range(1, channels + 1) if channels % n == 0 and n <= at_once)
    starts = jnp.asarray(source[::size])
    found = lax.map(
        lambda at: sums(lax.dynamic_slice_in_dim(x, at[0], size), at[1]),
        (starts, out.reshape(-1, size, *out.shape[1:])),
    )
    ones = jnp.ones(found[0].shape[-1] * found[0].shape[-2], out.dtype)
    return jnp.stack([s.reshape(len(out), -1) @ ones for s in found], axis=-1)


def _kernel_plain(x: Array, out: Array, *, inputs: int, geometry: Geometry) -> Array:
    g = geometry
    padded = _pad(x, g.padding, (g.padding, g.padding))
    out = out.reshape(inputs, -1, *out.shape[1:])
    sums = [
        jnp.einsum("schwn,stchwn->stc", _window(padded, a * g.dilation, b * g.dilation, g.out, g.stride), out)
        for a, b in g.taps()
    ]
    return jnp.stack(sums, axis=-1).reshape(-1, out.shape[2], g.size, g.size)


_out_p = jax.extend.core.Primitive("supernet_depthwise")
_input_p = jax.extend.core.Primitive("supernet_depthwise_input")
_kernel_p = jax.extend.core.Primitive("supernet_depthwise_kernel")


@_out_p.def_abstract_eval
def _(x: Any, kernel: Any, *, inputs: int, geometry: Geometry) -> Any:
    return x.update(shape=(kernel.shape[0], x.shape[1], *geometry.out, x.shape[4]), weak_type=False)


@_input_p.def_abstract_eval
def _(out: Any, kernel: Any, *, inputs: int, geometry: Geometry) -> Any:
    shape = (inputs, out.shape[1], geometry.rows, geometry.columns, out.shape[4])
    return out.update(shape=shape, weak_type=False)


@_kernel_p.def_abstract_eval
def _(x: Any, out: Any, *, inputs: int, geometry: Geometry) -> Any:
    return x.update(shape=(*out.shape[:2], geometry.size, geometry.size), weak_type=False)


def _bilinear(primitive: Any, by_first: Any, by_second: Any) -> None:
    ad.defbilinear(
        primitive,
        lambda ct, first, second, **static: by_first(ct, second, **static),
        lambda ct, first, second, **static: by_second(ct, first, **static),
    )


_bilinear(_out_p, lambda ct, k, **s: _input_p.bind(ct, k, **s), lambda ct, x, **s: _kernel_p.bind(x, ct, **s))
_bilinear(_input_p, lambda ct, k, **s: _out_p.bind(ct, k, **s), lambda ct, o, **s: _kernel_p.bind(ct, o, **s))
_bilinear(_kernel_p, lambda ct, o, **s: _input_p.bind(o, ct, **s), lambda ct, x, **s: _out_p.bind(x, ct, **s))


def _batch(primitive: Any, args: Any, axes: Any, *, inputs: int, geometry: Geometry) -> Any:
    """A mapped axis is more inputs, each with its own edges."""
    n = next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)
    if inputs == 1 and primitive is not _input_p and axes[0] is None:  # more kernels for the one input
        second = jnp.moveaxis(args[1], axes[1], 0)
        result = primitive.bind(args[0], second.reshape(-1, *second.shape[2:]), inputs=1, geometry=geometry)
        return result.reshape(n, -1, *result.shape[1:]), 0
    moved = [
        jnp.broadcast_to(a, (n, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(args, axes, strict=True)
    ]
    folded = [a.reshape(-1, *a.shape[2:]) for a in moved]
    result = primitive.bind(*folded, inputs=n * inputs, geometry=geometry)
    return result.reshape(n, -1, *result.shape[1:]), 0


def _register(primitive: Any, lowering: Any, elsewhere: Any) -> None:
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=False))
    if lowering is not elsewhere:
        mlir.register_lowering(primitive, mlir.lower_fun(lowering, multiple_results=False), platform="cpu")
    run = jax.jit(lambda first, second, static: primitive.bind(first, second, **dict(static)), static_argnums=2)
    primitive.def_impl(lambda first, second, **static: run(first, second, tuple(static.items())))


_register(_out_p, _out, _out)
_register(_input_p, _input, _input)
_register(_kernel_p, _kernel, _kernel_plain)
