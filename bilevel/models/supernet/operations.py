"""The candidate operations, on one feature map with the batch as its last axis: (channels, rows, columns, batch).

An operation is a row of `OPERATIONS`: the parameters that it has, and the function. Normalisation is by the statistics
of the batch at hand, always, so that the network is a function of its parameters and the batch alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel.models.supernet.depthwise import depthwise

EPSILON = 1e-5

Shapes = dict[str, tuple[tuple[int, ...], int]]
Params = Mapping[str, Array]


def normalise(x: Array, scale: Array | None = None, bias: Array | None = None) -> Array:
    """Batch normalisation over rows, columns and samples, (x - mean) / sqrt(var + 1e-5), by this batch's statistics.

    The variance is E[x^2] - E[x]^2, one pass over the map. The sums run over rows and columns first and over samples by
    a product with a constant vector, the form that XLA vectorises on CPU.
    """
    average = jnp.full(x.shape[-1], 1.0 / (x.shape[-1] * x.shape[-2] * x.shape[-3]), x.dtype)

    def mean(a: Array) -> Array:
        return jnp.matmul(a.sum((-3, -2)), average, precision=lax.Precision.HIGHEST)

    centre = mean(x)
    variance = jnp.maximum(mean(jnp.square(x)) - jnp.square(centre), 0)
    factor = lax.rsqrt(variance + EPSILON)
    if scale is not None:
        factor = factor * scale
    shift = -centre * factor if bias is None else bias - centre * factor
    return x * factor[:, None, None, None] + shift[:, None, None, None]


def pointwise(x: Array, kernel: Array) -> Array:
    """A 1x1 convolution, one matrix product; kernel (out, in)."""
    return jnp.matmul(kernel, x.reshape(x.shape[0], -1)).reshape(-1, *x.shape[1:])


def dense(x: Array, kernel: Array, stride: int = 1) -> Array:
    """A k x k convolution of all channels, zeros around the map; kernel (out, in, k, k)."""
    pad = kernel.shape[-1] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=("CHWN", "OIHW", "CHWN")
    )


def factorized_reduce(x: Array, even: Array, odd: Array) -> Array:
    """Half the side without losing pixels: two 1x1 convolutions of stride 2, one of them a pixel further; no norm.

    out = concat(even x[:, ::2, ::2], odd x[:, 1::2, 1::2]); kernels (out / 2, in).
    """
    return jnp.concatenate([pointwise(x[:, ::2, ::2], even), pointwise(x[:, 1::2, 1::2], odd)])


def _windows(x: Array, stride: int, fill: float) -> tuple[Array, Array, Array]:
    """The three rows that a 3x3 window of each output row sees, out of the map; then columns likewise."""
    padded = lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0), (1, 1, 0), (0, 0, 0), (0, 0, 0)])
    count = (x.shape[1] - 1) // stride + 1
    first, second, third = (lax.slice_in_dim(padded, a, a + (count - 1) * stride + 1, stride, axis=1) for a in range(3))
    return first, second, third


def max_pool(x: Array, stride: int = 1) -> Array:
    """3x3 maximum, one pixel of padding that never wins; rows, then columns."""
    for _ in range(2):
        first, second, third = _windows(x, stride, -jnp.inf)
        x = jnp.maximum(jnp.maximum(first, second), third).swapaxes(1, 2)
    return x


def average_pool(x: Array, stride: int = 1) -> Array:
    """3x3 mean of the pixels that exist: padding is not counted (`count_include_pad=False`)."""
    for _ in range(2):
        first, second, third = _windows(x, stride, 0.0)
        rows = (jnp.arange(first.shape[1]) * stride)[:, None, None]
        count = 3 - (rows == 0).astype(x.dtype) - (rows == x.shape[1] - 1).astype(x.dtype)
        x = ((first + second + third) / count).swapaxes(1, 2)
    return x


@dataclasses.dataclass(frozen=True)
class Context:
    """What an operation knows besides its input: stride, whether pooling is normalised, and a key for noise."""

    stride: int
    pool_norm: bool
    key: Array | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """A candidate operation.

    shapes: `(channels, stride) -> {name: (shape, fan in)}`, what is trained; fan in 0 for one of a norm.
    norms: `stride -> ` how many normalisations it has, for scales and biases where the network has them.
    apply: `(x, params, context) -> out`.
    parameter_free: counted as such in the degenerate architectures that DARTS drifts to.
    """

    shapes: Callable[[int, int], Shapes]
    norms: Callable[[int], int]
    apply: Callable[[Array, Params, Context], Array]
    parameter_free: bool = False


def _norm(y: Array, p: Params, i: int) -> Array:
    return normalise(y, p.get(f"scale{i}"), p.get(f"bias{i}"))


def _sep_conv(size: int) -> Operation:
    """[ReLU, depthwise k x k, 1x1, norm] twice; the stride is in the first."""

    def shapes(channels: int, stride: int) -> Shapes:
        depth, point = ((channels, size, size), size * size), ((channels, channels), channels)
        return {"depth1": depth, "point1": point, "depth2": depth, "point2": point}

    def apply(x: Array, p: Params, context: Context) -> Array:
        for i, stride in ((1, context.stride), (2, 1)):
            seen = depthwise(jax.nn.relu(x)[None], p[f"depth{i}"][None], stride=stride)[0]
            x = _norm(pointwise(seen, p[f"point{i}"]), p, i)
        return x

    return Operation(shapes, lambda stride: 2, apply)


def _dil_conv(size: int) -> Operation:
    """ReLU, depthwise k x k of dilation 2, 1x1, norm."""

    def shapes(channels: int, stride: int) -> Shapes:
        return {"depth1": ((channels, size, size), size * size), "point1": ((channels, channels), channels)}

    def apply(x: Array, p: Params, context: Context) -> Array:
        seen = depthwise(jax.nn.relu(x)[None], p["depth1"][None], stride=context.stride, dilation=2)[0]
        return _norm(pointwise(seen, p["point1"]), p, 1)

    return Operation(shapes, lambda stride: 1, apply)


def _nor_conv(size: int) -> Operation:
    """ReLU, dense k x k, norm (NAS-Bench-201)."""

    def shapes(channels: int, stride: int) -> Shapes:
        kernel = (channels, channels) if size == 1 else (channels, channels, size, size)
        return {"kernel1": (kernel, channels * size * size)}

    def apply(x: Array, p: Params, context: Context) -> Array:
        x = jax.nn.relu(x)
        if size == 1:
            x = pointwise(x[:, :: context.stride, :: context.stride], p["kernel1"])
        else:
            x = dense(x, p["kernel1"], context.stride)
        return _norm(x, p, 1)

    return Operation(shapes, lambda stride: 1, apply)


def _skip_shapes(channels: int, stride: int) -> Shapes:
    half = ((channels // 2, channels), channels)
    return {} if stride == 1 else {"even": half, "odd": half}


def _skip(x: Array, p: Params, context: Context) -> Array:
    """The identity; at stride 2 ReLU, factorized reduction, norm."""
    return x if context.stride == 1 else _norm(factorized_reduce(jax.nn.relu(x), p["even"], p["odd"]), p, 1)


def _pool(pool: Callable[[Array, int], Array]) -> Operation:
    def apply(x: Array, p: Params, context: Context) -> Array:
        out = pool(x, context.stride)
        return normalise(out) if context.pool_norm else out

    return Operation(lambda channels, stride: {}, lambda stride: 0, apply, parameter_free=True)


def _strided(x: Array, stride: int) -> Array:
    return x[:, ::stride, ::stride]


def _noise(x: Array, p: Params, context: Context) -> Array:
    """Standard normal numbers in the shape of the (strided) map, whatever the input."""
    assert context.key is not None
    return jax.random.normal(context.key, _strided(x, context.stride).shape, x.dtype)


OPERATIONS: dict[str, Operation] = {
    "none": Operation(
        lambda channels, stride: {},
        lambda stride: 0,
        lambda x, p, context: jnp.zeros_like(_strided(x, context.stride)),
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
