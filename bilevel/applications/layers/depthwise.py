"""Depthwise convolution, fast on CPU and differentiable to any order, of flat maps and of images.

XLA's own grouped convolution is slow on CPU, where the k^2 shifted multiply-adds of a depthwise kernel fuse into one
loop; and so is the transpose that automatic differentiation makes of the shifts, a sum of k^2 padded arrays. The
convolution is therefore stated as what it is, one of the gradients of a trilinear form, and each gradient is a
primitive that is linear in the two other operands: its transposes are the other gradients, and derivatives of every
    order and mode stay among them.

There are two, because the order of axes in memory decides what is fast, and turning a map around costs as much as the
convolution:

- `depthwise`, `depthwise_flat`: the batch innermost, many kernels of one input at a time (the edges of a supernet's
  cell). A shift is an offset into one axis, and a stride of 2 reads the four planes of pixels with even and odd rows
  and columns.
- `depthwise_conv`: channels innermost, as in Flax, any padding and stride. It is a grouped convolution off the CPU,
  sums up 16-bit numbers in 32, and its gradient in the input is a convolution again: two primitives instead of three.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.applications.layers.maps import halved, padded, planes, same_row, unite
from bilevel.applications.layers.primitives import align, bilinear, bind, mapped_first, mapped_size, primitive

# Flat maps: arrays (channels, pixels x batch), rows of pixels one after the other. The multiply-adds of a kernel are
# one loop over contiguous memory, and what runs over the left or right border is masked, once for each column of the
# kernel. (On four axes the same sums are slow on CPU as soon as a matrix product follows: XLA merges the product's two
# axes into the loop and takes every index apart again.) The form is
#
#     phi(x, k, g) = sum over t, c, i, j, a, b, n of
#                    g[t, c, i, j, n] k[t, c, a, b] x[t // m, c, s i + d a - p, s j + d b - p, n]
#
# with t = 0..T-1 edges, of which m in a row read the same input, channels c, samples n, stride s, dilation d, padding
# p.


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
    return bind(_out_p, x.astype(dtype), kernel.astype(dtype), inputs=x.shape[0], geometry=geometry)


def _sum_of_shifts(terms: list[tuple[Array, int, int, Array]], columns: int, batch: int, margin: int) -> Array:
    """The sum of `coefficient * plane`, each shifted so that a pixel sees the one `down` rows and `right` columns away.

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
    seen = [padded(p, [(g.margin * batch,) * 2])[:, None] for p in planes(x, (g.rows, g.columns), g.stride)]
    kernel = kernel.reshape(inputs, -1, *kernel.shape[1:])
    terms = [(seen[t.plane], t.down, t.right, kernel[..., t.a, t.b, None]) for t in g.taps()]
    total = _sum_of_shifts(terms, g.out[1], batch, g.margin)
    return total.reshape(-1, *total.shape[2:])


def _input(out: Array, kernel: Array, *, inputs: int, geometry: Geometry) -> Array:
    """Plane by plane: each tap shifts back what it read, with its coefficient; added over the edges of each input."""
    g = geometry
    batch = out.shape[-1] // (g.out[0] * g.out[1])
    seen = padded(out, [(g.margin * batch,) * 2])
    seen = seen.reshape(inputs, -1, *seen.shape[1:])
    kernel = kernel.reshape(inputs, -1, *kernel.shape[1:])
    found = []
    for plane in range(g.stride**2):
        terms = [
            (seen[:, t], -tap.down, -tap.right, kernel[:, t, :, tap.a, tap.b, None])
            for t in range(seen.shape[1])
            for tap in g.taps()
            if tap.plane == plane
        ]
        zeros = jnp.zeros((inputs, *out.shape[1:]), out.dtype)
        found.append(_sum_of_shifts(terms, g.out[1], batch, g.margin) if terms else zeros)
    return unite(found, (g.rows, g.columns), g.stride)


# Results of more bytes are worked on channel by channel, so that a channel's maps stay in a core's cache for all taps.
_TOGETHER = 2**21

# So many rows are written out as one sum (of more rows, as many as divide them): few are sooner compiled, and channel
# by channel, where the maps are large, a sum of many is one pass instead of several.
_ROWS, _ROWS_OF_A_CHANNEL = 8, 32


def _kernel(x: Array, out: Array, *, inputs: int, geometry: Geometry) -> Array:
    """Products with the shifted input, rows added to rows as vectors: XLA vectorises no sums over an inner axis."""
    g = geometry
    rows, columns = g.out
    batch = out.shape[-1] // (rows * columns)
    width = columns * batch
    seen = [padded(p, [(g.margin * batch,) * 2])[:, None] for p in planes(x, (g.rows, g.columns), g.stride)]
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
    seen = [padded(p, [(g.margin * batch,) * 2]) for p in planes(x, (g.rows, g.columns), g.stride)]
    out = out.reshape(inputs, -1, *out.shape[1:])
    found = []
    for tap in g.taps():
        start = (g.margin + tap.down * g.out[1] + tap.right) * batch
        shifted = lax.slice_in_dim(seen[tap.plane], start, start + out.shape[-1], axis=-1)
        inside = jnp.where(same_row(tap.right, g.out[1], batch, out.shape[-1]), shifted, 0)
        found.append(jnp.einsum("scl,stcl->stc", inside, out))
    return jnp.stack(found, axis=-1).reshape(-1, out.shape[2], g.size, g.size)


def _batch(made: Any, args: Any, axes: Any, *, inputs: int, geometry: Geometry) -> Any:
    """A mapped axis is more inputs, each with its own edges."""
    n = mapped_size(args, axes)
    if inputs == 1 and made is not _input_p and axes[0] is None:  # more kernels for the one input
        second = jnp.moveaxis(args[1], axes[1], 0)
        result = made.bind(args[0], second.reshape(-1, *second.shape[2:]), inputs=1, geometry=geometry)
        return result.reshape(n, -1, *result.shape[1:]), 0
    folded = [a.reshape(-1, *a.shape[2:]) for a in mapped_first(args, axes)]
    result = made.bind(*folded, inputs=n * inputs, geometry=geometry)
    return result.reshape(n, -1, *result.shape[1:]), 0


def _out_shape(x: Any, kernel: Any, *, inputs: int, geometry: Geometry) -> Any:
    batch = x.shape[-1] // (geometry.rows * geometry.columns)
    return kernel.shape[0], x.shape[1], geometry.out[0] * geometry.out[1] * batch


def _input_shape(out: Any, kernel: Any, *, inputs: int, geometry: Geometry) -> Any:
    batch = out.shape[-1] // (geometry.out[0] * geometry.out[1])
    return inputs, out.shape[1], geometry.rows * geometry.columns * batch


def _kernel_shape(x: Any, out: Any, *, inputs: int, geometry: Geometry) -> Any:
    return *out.shape[:2], geometry.size, geometry.size


_out_p = primitive("flat_depthwise", _out_shape, _out, _batch)
_input_p = primitive("flat_depthwise_input", _input_shape, _input, _batch)
_kernel_p = primitive("flat_depthwise_kernel", _kernel_shape, _kernel_plain, _batch, cpu=_kernel)

bilinear(_out_p, lambda ct, _, k, **s: bind(_input_p, ct, k, **s), lambda ct, _, x, **s: bind(_kernel_p, x, ct, **s))
bilinear(_input_p, lambda ct, _, k, **s: bind(_out_p, ct, k, **s), lambda ct, _, o, **s: bind(_kernel_p, ct, o, **s))
bilinear(_kernel_p, lambda ct, _, o, **s: bind(_input_p, o, ct, **s), lambda ct, _, x, **s: bind(_out_p, x, ct, **s))


# Images (batch, height, width, channels). The convolution is bilinear in (input, kernel); its transpose in the input is
# a convolution again, and its transpose in the kernel a correlation, whose own transposes are convolutions.

Pairs = tuple[tuple[int, int], tuple[int, int]]


def depthwise_conv(
    x: Array,
    kernel: Array,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    padding: str | int | Pairs = "SAME",
) -> Array:
    """Convolve each channel with its own kernel.

        out[n, i, j, c] = sum_ab kernel[a, b, c] x[n, s i + d a - p, s j + d b - p, c]

    Lowered to shifted multiply-adds on CPU and to a grouped convolution elsewhere; differentiable to any order in both
    modes, and `vmap`-able over inputs and over kernels.

    Args:
        x: (batch, height, width, channels).
        kernel: (kernel height, kernel width, channels).
        stride: s, of rows and columns.
        dilation: d, the distance between the kernel's taps.
        padding: zeros around x. "SAME" is d (k - 1) / 2 on either side whatever the stride (PyTorch's habit with odd
            kernels, not TensorFlow's), "VALID" none, a number the same on the four sides, or
            ((top, bottom), (left, right)).

    Returns:
        (batch, out height, out width, channels).
    """
    if x.ndim != 4 or kernel.ndim != 3 or x.shape[-1] != kernel.shape[-1]:
        raise ValueError(
            f"depthwise_conv was given x of shape {x.shape} and a kernel of shape {kernel.shape}; "
            "it expects (batch, height, width, channels) and (kernel height, kernel width, channels)."
        )
    strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
    dilations = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
    if padding == "SAME":
        spans = [d * (k - 1) for d, k in zip(dilations, kernel.shape[:2], strict=True)]
        pads: Any = tuple((span // 2, span - span // 2) for span in spans)
    elif padding == "VALID":
        pads = ((0, 0), (0, 0))
    elif isinstance(padding, int):
        pads = ((padding, padding), (padding, padding))
    elif isinstance(padding, str):
        raise ValueError(f'padding={padding!r} is neither "SAME", "VALID", a number nor a pair of pairs.')
    else:
        pads = tuple((int(low), int(high)) for low, high in padding)
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return _conv(x.astype(dtype), kernel.astype(dtype), strides, dilations, pads)


def _conv(x: Array, kernel: Array, stride: Any, dilation: Any, padding: Any) -> Array:
    return bind(_conv_p, x, kernel, stride=stride, dilation=dilation, padding=padding)


def _correlate(x: Array, g: Array, size: Any, stride: Any, dilation: Any, padding: Any) -> Array:
    """The transpose of the convolution with respect to its kernel: the correlation of input and cotangent."""
    return bind(_correlate_p, x, g, size=size, stride=stride, dilation=dilation, padding=padding)[0]


def _input_gradient(g: Array, kernel: Array, shape: Any, stride: Any, dilation: Any, padding: Any) -> Array:
    """The transpose with respect to the input: a convolution of the spread-out cotangent with the turned kernel."""
    spread = [(0, 0, s - 1) for s in stride]
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    pads = []
    for axis in range(2):
        span = dilation[axis] * (kernel.shape[axis] - 1)
        low = span - padding[axis][0]
        pads.append((low, shape[axis] + span - g.shape[1 + axis] - low))
    return _conv(g, kernel[::-1, ::-1], (1, 1), dilation, tuple(pads))


def _framed(x: Array, padding: Any) -> Array:
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])


def _out_size(shape: Any, size: Any, stride: Any, dilation: Any, padding: Any) -> tuple[int, int]:
    rows, columns = ((shape[a] + sum(padding[a]) - dilation[a] * (size[a] - 1) - 1) // stride[a] + 1 for a in range(2))
    return rows, columns


def _tap(x: Array, a: int, b: int, out: Any, stride: Any, dilation: Any) -> Array:
    """The padded input as seen through tap (a, b) of the kernel, one element per output."""
    top, left = a * dilation[0], b * dilation[1]
    stop = (top + (out[0] - 1) * stride[0] + 1, left + (out[1] - 1) * stride[1] + 1)
    return lax.slice(x, (0, top, left, 0), (x.shape[0], *stop, x.shape[3]), (1, *stride, 1))


def _accumulator(dtype: Any) -> Any:
    return jnp.float32 if dtype in (jnp.bfloat16, jnp.float16) else dtype


def _conv_shifted(x: Array, kernel: Array, *, stride: Any, dilation: Any, padding: Any) -> Array:
    size = kernel.shape[:2]
    out = _out_size(x.shape[1:3], size, stride, dilation, padding)
    dtype = _accumulator(x.dtype)
    padded, taps = _framed(x, padding), kernel.astype(dtype)
    total = jnp.zeros((), dtype)
    for a in range(size[0]):
        for b in range(size[1]):
            total = total + _tap(padded, a, b, out, stride, dilation).astype(dtype) * taps[a, b]
    return total.astype(x.dtype)


def _conv_grouped(x: Array, kernel: Array, *, stride: Any, dilation: Any, padding: Any) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        stride,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _correlate_shifted(x: Array, g: Array, *, size: Any, stride: Any, dilation: Any, padding: Any) -> Array:
    """One pass over the rows of the cotangent, so that a row of it and the k rows of input it meets stay in cache."""
    dtype = _accumulator(x.dtype)
    _, rows, columns, channels = g.shape
    span = dilation[0] * (size[0] - 1) + 1
    padded = _framed(x, padding).astype(dtype)
    g = g.astype(dtype)

    def add_row(total: Array, row: Array) -> tuple[Array, None]:
        ours = lax.dynamic_slice_in_dim(g, row, 1, axis=1)
        theirs = lax.dynamic_slice_in_dim(padded, row * stride[0], span, axis=1)[:, :: dilation[0]]
        sums = []
        for b in range(size[1]):
            left = b * dilation[1]
            seen = theirs[:, :, left : left + (columns - 1) * stride[1] + 1 : stride[1]]
            sums.append((seen * ours).sum((0, 2)))
        return total + jnp.stack(sums, axis=1), None

    zero, _ = align(jnp.zeros((*size, channels), dtype), g)
    return lax.scan(add_row, zero, jnp.arange(rows))[0].astype(x.dtype)[None]


def _correlate_grouped(x: Array, g: Array, *, size: Any, stride: Any, dilation: Any, padding: Any) -> Array:
    def conv(kernel: Array) -> Array:
        return _conv_grouped(x, kernel, stride=stride, dilation=dilation, padding=padding)

    (gradient,) = jax.linear_transpose(conv, jax.ShapeDtypeStruct((*size, x.shape[-1]), x.dtype))(g)
    return gradient[None]


def _to_channels(values: Any, axis: int | None, n: int) -> Array:
    """Fold a mapped axis into the channels, where every channel is on its own anyway."""
    if axis is None:
        return jnp.tile(values, (*(1,) * (values.ndim - 1), n))
    values = jnp.moveaxis(values, axis, -2)
    return values.reshape(*values.shape[:-2], -1)


def _from_channels(values: Array, n: int) -> tuple[Array, int]:
    return values.reshape(*values.shape[:-1], n, -1), values.ndim - 1


def _batch_conv(made: Any, args: Any, axes: Any, **sizes: Any) -> Any:
    (x, kernel), (x_axis, kernel_axis) = args, axes
    if kernel_axis is None:  # a mapped input alone is a longer batch
        x = jnp.moveaxis(x, x_axis, 0)
        out = _conv(x.reshape(-1, *x.shape[2:]), kernel, **sizes)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    n = kernel.shape[kernel_axis]
    return _from_channels(_conv(_to_channels(x, x_axis, n), _to_channels(kernel, kernel_axis, n), **sizes), n)


def _batch_correlate(made: Any, args: Any, axes: Any, **sizes: Any) -> Any:
    (x, g), (x_axis, g_axis) = args, axes
    n = x.shape[x_axis] if x_axis is not None else g.shape[g_axis]
    out, axis = _from_channels(_correlate(_to_channels(x, x_axis, n), _to_channels(g, g_axis, n), **sizes), n)
    return out[None], axis + 1


def _conv_shape(x: Any, kernel: Any, **sizes: Any) -> Any:
    return x.shape[0], *_out_size(x.shape[1:3], kernel.shape[:2], **sizes), x.shape[3]


# The correlation's result has a leading 1: it is of the input's rank then, so that its type can be the input's.
_conv_p = primitive("depthwise", _conv_shape, _conv_grouped, _batch_conv, cpu=_conv_shifted)
_correlate_p = primitive(
    "depthwise_correlate",
    lambda x, g, *, size, **sizes: (1, *size, x.shape[3]),
    _correlate_grouped,
    _batch_correlate,
    cpu=_correlate_shifted,
)

bilinear(
    _conv_p,
    lambda ct, shape, kernel, **sizes: _input_gradient(ct, kernel, shape[1:3], **sizes),
    lambda ct, shape, x, **sizes: _correlate(x, ct, shape[:2], **sizes),
)
bilinear(
    _correlate_p,
    lambda ct, shape, g, size, **sizes: _input_gradient(g, ct[0], shape[1:3], **sizes),
    lambda ct, shape, x, size, **sizes: _conv(x, ct[0], **sizes),
)
