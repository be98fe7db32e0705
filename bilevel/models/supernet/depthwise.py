"""Depthwise convolution of flat maps, many kernels for one input, closed under differentiation.

A map is an array (channels, pixels x batch), rows of pixels one after the other and the batch innermost. A shift of the map
by rows and columns is then an offset into one axis: the k^2 multiply-adds of a depthwise kernel are one loop over
contiguous memory, and what runs over the left or right border is masked, once for each column of the kernel. (On four axes
the same sums are slow on CPU as soon as a matrix product follows: XLA merges the product's two axes into the loop and takes
every index apart again.) A stride of 2 reads the four planes of pixels with even and odd rows and
columns. XLA's own grouped convolution is slow on CPU, and so is the transpose that automatic differentiation
makes of the shifts. The convolution is therefore stated as what it is, one of the three gradients of

    phi(x, k, g) = sum over t, c, i, j, a, b, n of  g[t, c, i, j, n] k[t, c, a, b] x[t // m, c, s i + d a - p, s j + d b - p, n]

with t = 0..T-1 edges, of which m in a row read the same input, channels c, samples n, stride s, dilation d, padding p.
Each gradient is a primitive that is linear in the other two operands, and its transposes are the other two primitives:
derivatives of every order and mode stay among the three.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir

from bilevel.models.supernet.maps import halved, mapped_first, mapped_size, planes, same_row, unite


class Tap(NamedTuple):
    """A position (a, b) of the kernel: it reads that plane of the input, so many pixels down and to the right."""

    a: int
    b: int
    plane: int
    down: int
    right: int


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static part: map size (rows, columns), kernel size, stride, dilation."""

    rows: int
    columns: int
    size: int
    stride: int
    dilation: int

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the result, and of each of the input's stride^2 planes."""
        return halved((self.rows, self.columns), self.stride)

    def taps(self) -> Iterator[Tap]:
        """The positions of the kernel; zeros around the map, so that it keeps its size at stride 1."""
        padding = self.dilation * (self.size - 1) // 2
        for a in range(self.size):
            down, row = divmod(self.dilation * a - padding, self.stride)
            for b in range(self.size):
                right, column = divmod(self.dilation * b - padding, self.stride)
                yield Tap(a, b, row * self.stride + column, down, right)

    @property
    def margin(self) -> int:
        """Pixels before and behind a flat plane that a shift can reach."""
        return max(abs(t.down) for t in self.taps()) * self.out[1] + max(abs(t.right) for t in self.taps())


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
    grid = x.shape[2], x.shape[3]
    out = depthwise_flat(x.reshape(*x.shape[:2], -1), kernel, grid, stride=stride, dilation=dilation)
    return out.reshape(*out.shape[:2], *halved(grid, stride), x.shape[-1])


def depthwise_flat(x: Array, kernel: Array, grid: tuple[int, int], *, stride: int = 1, dilation: int = 1) -> Array:
    """`depthwise` of flat maps: x (inputs, channels, rows x columns x batch) with grid = (rows, columns)."""
    geometry = Geometry(*grid, kernel.shape[-1], stride, dilation)
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return _out_p.bind(x.astype(dtype), kernel.astype(dtype), inputs=x.shape[0], geometry=geometry)


def _padded(plane: Array, pixels: int) -> Array:
    """Zeros before and behind; made once, where without the barrier XLA would test each of the k^2 reads for the border."""
    widths = [(0, 0)] * (plane.ndim - 1) + [(pixels, pixels)]
    return lax.optimization_barrier(jnp.pad(plane, widths))


def _sum_of_shifts(terms: list[tuple[Array, int, int, Array]], columns: int, batch: int, margin: int) -> Array:
    """The sum of `coefficient * plane`, each plane shifted so that a pixel sees the one `down` rows and `right` columns from it.

    terms: (padded plane, down, right, coefficient).
    """
    by_right: dict[int, Any] = {}
    length = terms[0][0].shape[-1] - 2 * margin * batch
    for plane, down, right, coefficient in terms:
        start = (margin + down * columns + right) * batch
        seen = lax.slice_in_dim(plane, start, start + length, axis=-1) * coefficient
        by_right[right] = by_right[right] + seen if right in by_right else seen
    total: Any = 0
    for right, column in by_right.items():
        total = total + (jnp.where(same_row(right, columns, batch, length), column, 0) if right else column)
    return total


def _out(x: Array, kernel: Array, *, inputs: int, geometry: Geometry) -> Array:
    g = geometry
    batch = x.shape[-1] // (g.rows * g.columns)
    seen = [_padded(p, g.margin * batch)[:, None] for p in planes(x, (g.rows, g.columns), g.stride)]
    kernel = kernel.reshape(inputs, -1, *kernel.shape[1:])
    terms = [(seen[t.plane], t.down, t.right, kernel[..., t.a, t.b, None]) for t in g.taps()]
    total = _sum_of_shifts(terms, g.out[1], batch, g.margin)
    return total.reshape(-1, *total.shape[2:])


def _input(out: Array, kernel: Array, *, inputs: int, geometry: Geometry) -> Array:
    """Plane by plane: each tap shifts back what it read, with its coefficient; added over the edges of each input."""
    g = geometry
    batch = out.shape[-1] // (g.out[0] * g.out[1])
    padded = _padded(out, g.margin * batch).reshape(inputs, -1, out.shape[1], out.shape[2] + 2 * g.margin * batch)
    kernel = kernel.reshape(inputs, -1, *kernel.shape[1:])
    found = []
    for plane in range(g.stride**2):
        terms = [
            (padded[:, t], -tap.down, -tap.right, kernel[:, t, :, tap.a, tap.b, None])
            for t in range(padded.shape[1])
            for tap in g.taps()
            if tap.plane == plane
        ]
        zeros = jnp.zeros((inputs, *out.shape[1:]), out.dtype)
        found.append(_sum_of_shifts(terms, g.out[1], batch, g.margin) if terms else zeros)
    return unite(found, (g.rows, g.columns), g.stride)


# Results of more bytes are worked on channel by channel, so that a channel's maps stay in a core's cache for all taps.
_TOGETHER = 2**21

# So many rows are written out as one sum (of more rows, as many as divide them): few are sooner compiled, and channel by
# channel, where the maps are large, a sum of many is one pass instead of several.
_ROWS, _ROWS_OF_A_CHANNEL = 8, 32


def _kernel(x: Array, out: Array, *, inputs: int, geometry: Geometry) -> Array:
    """Products with the shifted input, rows added to rows as vectors: sums over an inner axis are not vectorised by XLA."""
    g = geometry
    rows, columns = g.out
    batch = out.shape[-1] // (rows * columns)
    width = columns * batch
    seen = [_padded(p, g.margin * batch)[:, None] for p in planes(x, (g.rows, g.columns), g.stride)]
    out = out.reshape(inputs, -1, *out.shape[1:])
    together = out.size * out.dtype.itemsize <= _TOGETHER or out.shape[2] == 1
    limit = _ROWS if together else _ROWS_OF_A_CHANNEL
    at_once = max(n for n in range(1, limit + 1) if rows % n == 0)

    def sums(planes: list[Array], out: Array) -> tuple[Array, ...]:
        found = []
        for tap in g.taps():
            start = (g.margin + tap.down * columns + tap.right) * batch
            rest = []
            for first in range(0, rows, at_once):
                cut = [
                    lax.slice_in_dim(planes[tap.plane], start + i * width, start + (i + 1) * width, axis=-1)
                    * lax.slice_in_dim(out, i * width, (i + 1) * width, axis=-1)
                    for i in range(first, first + at_once)
                ]
                rest.append(functools.reduce(jnp.add, cut))
            found.append(rest[0] if len(rest) == 1 else functools.reduce(jnp.add, lax.optimization_barrier(rest)))
        return tuple(found)

    if together:
        found = sums(seen, out)
    else:
        at = lambda a, c: lax.dynamic_slice_in_dim(a, c, 1, axis=2)  # noqa: E731
        each = lax.map(lambda c: sums([at(p, c) for p in seen], at(out, c)), jnp.arange(out.shape[2]))
        found = tuple(jnp.moveaxis(a[..., 0, :], 0, 2) for a in each)
    masks = {t.right: same_row(t.right, columns, batch, width).astype(out.dtype) for t in g.taps()}
    summed = [jnp.matmul(a, masks[t.right]) for a, t in zip(found, g.taps(), strict=True)]
    return jnp.stack(summed, axis=-1).reshape(-1, out.shape[2], g.size, g.size)


def _kernel_plain(x: Array, out: Array, *, inputs: int, geometry: Geometry) -> Array:
    g = geometry
    batch = out.shape[-1] // (g.out[0] * g.out[1])
    seen = [_padded(p, g.margin * batch) for p in planes(x, (g.rows, g.columns), g.stride)]
    out = out.reshape(inputs, -1, *out.shape[1:])
    found = []
    for tap in g.taps():
        start = (g.margin + tap.down * g.out[1] + tap.right) * batch
        shifted = lax.slice_in_dim(seen[tap.plane], start, start + out.shape[-1], axis=-1)
        inside = jnp.where(same_row(tap.right, g.out[1], batch, out.shape[-1]), shifted, 0)
        found.append(jnp.einsum("scl,stcl->stc", inside, out))
    return jnp.stack(found, axis=-1).reshape(-1, out.shape[2], g.size, g.size)


_out_p = jax.extend.core.Primitive("supernet_depthwise")
_input_p = jax.extend.core.Primitive("supernet_depthwise_input")
_kernel_p = jax.extend.core.Primitive("supernet_depthwise_kernel")


@_out_p.def_abstract_eval
def _(x: Any, kernel: Any, *, inputs: int, geometry: Geometry) -> Any:
    batch = x.shape[-1] // (geometry.rows * geometry.columns)
    shape = (kernel.shape[0], x.shape[1], geometry.out[0] * geometry.out[1] * batch)
    return x.update(shape=shape, weak_type=False)


@_input_p.def_abstract_eval
def _(out: Any, kernel: Any, *, inputs: int, geometry: Geometry) -> Any:
    batch = out.shape[-1] // (geometry.out[0] * geometry.out[1])
    shape = (inputs, out.shape[1], geometry.rows * geometry.columns * batch)
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
    n = mapped_size(args, axes)
    if inputs == 1 and primitive is not _input_p and axes[0] is None:  # more kernels for the one input
        second = jnp.moveaxis(args[1], axes[1], 0)
        result = primitive.bind(args[0], second.reshape(-1, *second.shape[2:]), inputs=1, geometry=geometry)
        return result.reshape(n, -1, *result.shape[1:]), 0
    folded = [a.reshape(-1, *a.shape[2:]) for a in mapped_first(args, axes)]
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
