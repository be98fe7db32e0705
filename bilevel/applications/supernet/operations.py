"""The candidate operations, on one flat map (channels, rows x columns x batch); see `maps`.

An operation is a row of `OPERATIONS`: the parameters that it has, and the function. Normalisation is by the statistics
of the batch at hand, always, so that the network is a function of its parameters and the batch alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.applications.layers import depthwise_flat
from bilevel.applications.layers.maps import Grid, halved, inner, planes, scale, shifted, spread, total

EPSILON = 1e-5

Shapes = dict[str, tuple[tuple[int, ...], int]]
Params = Mapping[str, Array]


def normalise(x: Array, gain: Array | None = None, bias: Array | None = None, weight: Array | None = None) -> Array:
    """Batch normalisation by this batch's statistics: weight ((x - mean) / sqrt(var + 1e-5) gain + bias).

    The variance over pixels and samples is E[x^2] - E[x]^2, one pass over the map.
    """
    count = x.shape[-1]
    centre = total(x) / count
    variance = jnp.maximum(inner(x, x) / count - jnp.square(centre), 0)
    factor = lax.rsqrt(variance + EPSILON)
    if gain is not None:
        factor = factor * gain
    shift = -centre * factor if bias is None else bias - centre * factor
    if weight is not None:
        factor, shift = factor * weight, shift * weight
    return scale(factor, x) + spread(shift, count)


def weighed(x: Array, weight: Array | None) -> Array:
    """weight x; None: x."""
    return x if weight is None else scale(jnp.broadcast_to(weight, x.shape[:1]).astype(x.dtype), x)


def pointwise(x: Array, kernel: Array) -> Array:
    """A 1x1 convolution, one matrix product; kernel (out, in)."""
    return jnp.matmul(kernel, x)


def dense(x: Array, kernel: Array, grid: Grid, stride: int = 1) -> Array:
    """A k x k convolution of all channels, zeros around the map; kernel (out, in, k, k).

    One matrix product with the map's k shifts along a row, for all rows of the kernel; then the k rows' sum.
    """
    size = kernel.shape[-1]
    reach = size // 2
    columns = jnp.concatenate([shifted(x, grid, 0, b - reach) for b in range(size)])
    by_row = kernel.transpose(2, 0, 3, 1).reshape(size * kernel.shape[0], -1)
    rows = jnp.split(jnp.matmul(by_row, columns), size)
    out = functools.reduce(jnp.add, [shifted(r, grid, a - reach, 0) for a, r in enumerate(rows)])
    return planes(out, grid, stride)[0]


def factorized_reduce(x: Array, even: Array, odd: Array, grid: Grid) -> Array:
    """Half the side without losing pixels: two 1x1 convolutions of stride 2, one of them a pixel further; no norm.

    out = concat(even x[:, ::2, ::2], odd x[:, 1::2, 1::2]); kernels (out / 2, in).
    """
    four = planes(x, grid, 2)
    return jnp.concatenate([pointwise(four[0], even), pointwise(four[3], odd)])


def max_pool(x: Array, grid: Grid, stride: int = 1) -> Array:
    """3x3 maximum, one pixel of padding that never wins; rows, then columns."""
    for down, right in ((1, 0), (0, 1)):
        sides = [shifted(x, grid, sign * down, sign * right, -jnp.inf) for sign in (-1, 1)]
        x = jnp.maximum(jnp.maximum(sides[0], x), sides[1])
    return planes(x, grid, stride)[0]


def average_pool(x: Array, grid: Grid, stride: int = 1) -> Array:
    """3x3 mean of the pixels that exist: padding is not counted (`count_include_pad=False`)."""
    batch = x.shape[-1] // (grid[0] * grid[1])
    place = lax.iota(jnp.int32, x.shape[-1]) // batch
    for at, side, down, right in ((place // grid[1], grid[0], 1, 0), (place % grid[1], grid[1], 0, 1)):
        there = 3 - (at == 0).astype(x.dtype) - (at == side - 1).astype(x.dtype)
        x = (shifted(x, grid, -down, -right) + x + shifted(x, grid, down, right)) / there
    return planes(x, grid, stride)[0]


@dataclasses.dataclass(frozen=True)
class Context:
    """What an operation knows besides its input.

    grid: the map's rows and columns.
    stride: 1 or 2.
    pool_norm: whether pooling is normalised.
    key: for noise.
    weight: that its result has in a mixture; None: 1.
    """

    grid: Grid
    stride: int
    pool_norm: bool
    key: Array | None = None
    weight: Array | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """A candidate operation.

    shapes: `(channels, stride) -> {name: (shape, fan in)}`, what is trained; fan in 0 for one of a norm.
    norms: `stride -> ` how many normalisations it has, for scales and biases where the network has them.
    apply: `(x, params, context) -> out`, times the weight.
    parameter_free: counted as such in the degenerate architectures that DARTS drifts to.
    """

    shapes: Callable[[int, int], Shapes]
    norms: Callable[[int], int]
    apply: Callable[[Array, Params, Context], Array]
    parameter_free: bool = False


def _norm(y: Array, p: Params, i: int, weight: Array | None = None) -> Array:
    return normalise(y, p.get(f"scale{i}"), p.get(f"bias{i}"), weight)


def _sep_conv(size: int) -> Operation:
    """[ReLU, depthwise k x k, 1x1, norm] twice; the stride is in the first."""

    def shapes(channels: int, stride: int) -> Shapes:
        depth, point = ((channels, size, size), size * size), ((channels, channels), channels)
        return {"depth1": depth, "point1": point, "depth2": depth, "point2": point}

    def apply(x: Array, p: Params, context: Context) -> Array:
        grid = context.grid
        for i, stride, weight in ((1, context.stride, None), (2, 1, context.weight)):
            seen = depthwise_flat(jax.nn.relu(x)[None], p[f"depth{i}"][None], grid, stride=stride)[0]
            x, grid = _norm(pointwise(seen, p[f"point{i}"]), p, i, weight), halved(grid, stride)
        return x

    return Operation(shapes, lambda stride: 2, apply)


def _dil_conv(size: int) -> Operation:
    """ReLU, depthwise k x k of dilation 2, 1x1, norm."""

    def shapes(channels: int, stride: int) -> Shapes:
        return {"depth1": ((channels, size, size), size * size), "point1": ((channels, channels), channels)}

    def apply(x: Array, p: Params, context: Context) -> Array:
        x, kernel = jax.nn.relu(x)[None], p["depth1"][None]
        seen = depthwise_flat(x, kernel, context.grid, stride=context.stride, dilation=2)[0]
        return _norm(pointwise(seen, p["point1"]), p, 1, context.weight)

    return Operation(shapes, lambda stride: 1, apply)


def _nor_conv(size: int) -> Operation:
    """ReLU, dense k x k, norm (NAS-Bench-201)."""

    def shapes(channels: int, stride: int) -> Shapes:
        kernel = (channels, channels) if size == 1 else (channels, channels, size, size)
        return {"kernel1": (kernel, channels * size * size)}

    def apply(x: Array, p: Params, context: Context) -> Array:
        x = jax.nn.relu(x)
        if size == 1:
            x = pointwise(planes(x, context.grid, context.stride)[0], p["kernel1"])
        else:
            x = dense(x, p["kernel1"], context.grid, context.stride)
        return _norm(x, p, 1, context.weight)

    return Operation(shapes, lambda stride: 1, apply)


def _skip_shapes(channels: int, stride: int) -> Shapes:
    half = ((channels // 2, channels), channels)
    return {} if stride == 1 else {"even": half, "odd": half}


def _skip(x: Array, p: Params, context: Context) -> Array:
    """The identity; at stride 2 ReLU, factorized reduction, norm."""
    if context.stride == 1:
        return weighed(x, context.weight)
    return _norm(factorized_reduce(jax.nn.relu(x), p["even"], p["odd"], context.grid), p, 1, context.weight)


def _pool(pool: Callable[[Array, Grid, int], Array]) -> Operation:
    def apply(x: Array, p: Params, context: Context) -> Array:
        out = pool(x, context.grid, context.stride)
        return normalise(out, weight=context.weight) if context.pool_norm else weighed(out, context.weight)

    return Operation(lambda channels, stride: {}, lambda stride: 0, apply, parameter_free=True)


def _shape(x: Array, context: Context) -> tuple[int, int]:
    rows, columns = halved(context.grid, context.stride)
    return x.shape[0], x.shape[1] // (context.grid[0] * context.grid[1]) * rows * columns


def _none(x: Array, p: Params, context: Context) -> Array:
    return jnp.zeros(_shape(x, context), x.dtype)


def _noise(x: Array, p: Params, context: Context) -> Array:
    """Standard normal numbers in the shape of the (strided) map, whatever the input."""
    assert context.key is not None
    return weighed(jax.random.normal(context.key, _shape(x, context), x.dtype), context.weight)


OPERATIONS: dict[str, Operation] = {
    "none": Operation(
        lambda channels, stride: {},
        lambda stride: 0,
        _none,
        parameter_free=True,
    ),
    "noise": Operation(lambda channels, stride: {}, lambda stride: 0, _noise, parameter_free=True),
    "skip_connect": Operation(_skip_shapes, lambda stride: 0 if stride == 1 else 1, _skip, parameter_free=True),
    "max_pool_3x3": _pool(max_pool),
    "avg_pool_3x3": _pool(average_pool),
    "sep_conv_3x3": _sep_conv(3),
    "sep_conv_5x5": _sep_conv(5),
    "dil_conv_3x3": _dil_conv(3),
    "dil_conv_5x5": _dil_conv(5),
    "nor_conv_1x1": _nor_conv(1),
    "nor_conv_3x3": _nor_conv(3),
}


def parameter_shapes(name: str, channels: int, stride: int, affine: bool) -> Shapes:
    """{parameter: (shape, fan in)} of an operation; with `affine` scales and biases of its norms, of fan in 0."""
    operation = OPERATIONS[name]
    shapes = dict(operation.shapes(channels, stride))
    if affine:
        for i in range(1, operation.norms(stride) + 1):
            shapes[f"scale{i}"] = shapes[f"bias{i}"] = ((channels,), 0)
    return shapes
