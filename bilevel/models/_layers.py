"""Layers shared by the models: a depthwise convolution that is fast on CPU and differentiable to any order.

XLA's grouped convolution is slow on CPU, where the k^2 shifted multiply-adds of a depthwise kernel fuse into one loop;
and the automatic transpose of those shifts is again slow, as it is a sum of k^2 padded arrays. Both go away with the
structure made explicit: the convolution is bilinear in (input, kernel), its transpose with respect to the input is a
convolution again, and its transpose with respect to the kernel is a second bilinear map whose transposes are
convolutions. The two maps are primitives below, so that derivatives of every order and mode stay among them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir

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


def _varying(x: Array) -> frozenset[str]:
    """The mesh axes over which a value varies inside `shard_map`, under each of the names JAX gave that attribute."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", None) or getattr(manual, "varying", None) or ())


def _align(x: Array, y: Array) -> tuple[Array, Array]:
    """Inside `shard_map`, make both operands vary over the same mesh axes, as the built-in operations do."""
    over_x, over_y = _varying(x), _varying(y)
    if over_x == over_y:
        return x, y
    vary = functools.partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else lax.pvary  # type: ignore[attr-defined]
    if over_y - over_x:
        x = vary(x, tuple(over_y - over_x))
    if over_x - over_y:
        y = vary(y, tuple(over_x - over_y))
    return x, y


def _conv(x: Array, kernel: Array, stride: Any, dilation: Any, padding: Any) -> Array:
    return _conv_p.bind(*_align(x, kernel), stride=stride, dilation=dilation, padding=padding)


def _kernel_gradient(x: Array, g: Array, size: Any, stride: Any, dilation: Any, padding: Any) -> Array:
    """The transpose of the convolution with respect to its kernel: the correlation of input and cotangent."""
    return _kernel_p.bind(*_align(x, g), size=size, stride=stride, dilation=dilation, padding=padding)[0]


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


def _padded(x: Array, padding: Any) -> Array:
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
    padded, taps = _padded(x, padding), kernel.astype(dtype)
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


def _kernel_shifted(x: Array, g: Array, *, size: Any, stride: Any, dilation: Any, padding: Any) -> Array:
    """One pass over the rows of the cotangent, so that a row of it and the k rows of input it meets stay in cache."""
    dtype = _accumulator(x.dtype)
    _, rows, columns, channels = g.shape
    span = dilation[0] * (size[0] - 1) + 1
    padded = _padded(x, padding).astype(dtype)
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

    zero, _ = _align(jnp.zeros((*size, channels), dtype), g)
    return lax.scan(add_row, zero, jnp.arange(rows))[0].astype(x.dtype)[None]


def _kernel_grouped(x: Array, g: Array, *, size: Any, stride: Any, dilation: Any, padding: Any) -> Array:
    def conv(kernel: Array) -> Array:
        return _conv_grouped(x, kernel, stride=stride, dilation=dilation, padding=padding)

    (gradient,) = jax.linear_transpose(conv, jax.ShapeDtypeStruct((*size, x.shape[-1]), x.dtype))(g)
    return gradient[None]


_conv_p = jax.extend.core.Primitive("depthwise_conv")
_kernel_p = jax.extend.core.Primitive("depthwise_conv_kernel")


@_conv_p.def_abstract_eval
def _(x: Any, kernel: Any, **sizes: Any) -> Any:
    return x.update(
        shape=(x.shape[0], *_out_size(x.shape[1:3], kernel.shape[:2], **sizes), x.shape[3]), weak_type=False
    )


@_kernel_p.def_abstract_eval
def _(x: Any, g: Any, *, size: Any, **sizes: Any) -> Any:
    # Of the input's rank, so that what else a type carries (sharding, manual axes) can be taken over as it is.
    return x.update(shape=(1, *size, x.shape[3]), weak_type=False)


def _transpose_input(ct: Any, x: Any, kernel: Any, *, stride: Any, dilation: Any, padding: Any) -> Any:
    return _input_gradient(ct, kernel, x.aval.shape[1:3], stride, dilation, padding)


def _transpose_kernel(ct: Any, x: Any, kernel: Any, **sizes: Any) -> Any:
    return _kernel_gradient(x, ct, kernel.aval.shape[:2], **sizes)


ad.defbilinear(_conv_p, _transpose_input, _transpose_kernel)


def _kernel_transpose_input(ct: Any, x: Any, g: Any, *, size: Any, stride: Any, dilation: Any, padding: Any) -> Any:
    return _input_gradient(g, ct[0], x.aval.shape[1:3], stride, dilation, padding)


def _kernel_transpose_cotangent(ct: Any, x: Any, g: Any, *, size: Any, **sizes: Any) -> Any:
    return _conv(x, ct[0], **sizes)


ad.defbilinear(_kernel_p, _kernel_transpose_input, _kernel_transpose_cotangent)


def _to_channels(values: Any, axis: int | None, n: int) -> Array:
    """Fold a mapped axis into the channels, where every channel is on its own anyway."""
    if axis is None:
        return jnp.tile(values, (*(1,) * (values.ndim - 1), n))
    values = jnp.moveaxis(values, axis, -2)
    return values.reshape(*values.shape[:-2], -1)


def _from_channels(values: Array, n: int) -> tuple[Array, int]:
    return values.reshape(*values.shape[:-1], n, -1), values.ndim - 1


def _batch_conv(args: Any, axes: Any, **sizes: Any) -> Any:
    (x, kernel), (x_axis, kernel_axis) = args, axes
    if kernel_axis is None:  # a mapped input alone is a longer batch
        x = jnp.moveaxis(x, x_axis, 0)
        out = _conv(x.reshape(-1, *x.shape[2:]), kernel, **sizes)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    n = kernel.shape[kernel_axis]
    return _from_channels(_conv(_to_channels(x, x_axis, n), _to_channels(kernel, kernel_axis, n), **sizes), n)


def _batch_kernel(args: Any, axes: Any, **sizes: Any) -> Any:
    (x, g), (x_axis, g_axis) = args, axes
    n = x.shape[x_axis] if x_axis is not None else g.shape[g_axis]
    out, axis = _from_channels(_kernel_gradient(_to_channels(x, x_axis, n), _to_channels(g, g_axis, n), **sizes), n)
    return out[None], axis + 1


batching.primitive_batchers[_conv_p] = _batch_conv
batching.primitive_batchers[_kernel_p] = _batch_kernel


def _register(primitive: Any, shifted: Any, grouped: Any) -> None:
    mlir.register_lowering(primitive, mlir.lower_fun(grouped, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(shifted, multiple_results=False), platform="cpu")
    run = jax.jit(lambda x, y, sizes: primitive.bind(x, y, **dict(sizes)), static_argnums=2)
    primitive.def_impl(lambda x, y, **sizes: run(x, y, tuple(sizes.items())))


_register(_conv_p, _conv_shifted, _conv_grouped)
_register(_kernel_p, _kernel_shifted, _kernel_grouped)
