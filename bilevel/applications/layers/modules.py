"""Small Flax modules, with PyTorch's conventions where Flax's differ."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from bilevel.applications.layers.depthwise import depthwise_conv
from bilevel.applications.layers.initialisers import normal, uniform_fan_in

EPSILON = 1e-6  # of the layer normalisations; batch normalisation has 1e-5


def linear(features_in: int, features_out: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer that starts as vision transformers do: normal of deviation 0.02, zero bias."""
    return nnx.Linear(features_in, features_out, use_bias=bias, kernel_init=normal(0.02), rngs=rngs)


def pointwise(features_in: int, features_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A 1x1 convolution: a linear layer that starts as a convolution does."""
    start = uniform_fan_in(features_in)
    return nnx.Linear(features_in, features_out, kernel_init=start, bias_init=start, rngs=rngs)


class LayerNorm(nnx.Module):
    """Layer normalisation over channels; variance of the centred values, whose rounding does not grow with the mean.

    The two means are products with a constant vector: on CPU XLA reduces a short last axis slowly.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Array) -> Array:
        """(..., channels) -> the same."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        average = jnp.full(x.shape[-1], 1.0 / x.shape[-1], wide.dtype)

        def mean(a: Array) -> Array:
            return jnp.matmul(a, average, precision=lax.Precision.HIGHEST)[..., None]

        centred = wide - mean(wide)
        normal = centred * lax.rsqrt(mean(jnp.square(centred)) + EPSILON)
        return normal.astype(x.dtype) * self.scale[...] + self.bias[...]


def gelu(x: Array) -> Array:
    """x Phi(x), exactly (not the tanh approximation that Flax and JAX take by default)."""
    return 0.5 * x * (1.0 + lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))


def convolve(x: Array, kernel: Array, *, stride: int = 1, padding: int = 0) -> Array:
    """A dense convolution with symmetric padding: NHWC and a kernel (rows, columns, in, out)."""
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class Conv(nnx.Module):
    """A dense convolution with symmetric padding (at stride 2, Flax's SAME pads one side only). NHWC."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        size: int,
        *,
        stride: int,
        padding: int,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        start = uniform_fan_in(features_in * size * size)
        self.kernel = nnx.Param(start(rngs.params(), (size, size, features_in, features_out)))
        self.bias = nnx.Param(start(rngs.params(), (features_out,))) if bias else None
        self.stride, self.padding = stride, padding

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, in) -> (batch, height', width', out)."""
        out = convolve(x, self.kernel[...], stride=self.stride, padding=self.padding)
        return out if self.bias is None else out + self.bias[...]


class DepthwiseConv(nnx.Module):
    """One kernel per channel, stride 1, size kept. NHWC."""

    def __init__(self, features: int, size: int, *, rngs: nnx.Rngs):
        start = uniform_fan_in(size * size)
        self.kernel = nnx.Param(start(rngs.params(), (size, size, features)))
        self.bias = nnx.Param(start(rngs.params(), (features,)))
        self.size = size

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, channels) -> the same."""
        return depthwise_conv(x, self.kernel[...], padding=self.size // 2) + self.bias[...]


class BatchNorm(nnx.Module):
    """Batch normalisation as PyTorch has it: momentum 0.1, and the *unbiased* variance in the running statistics.

    In training the batch's own mean and (biased) variance normalise; `mean` and `var` then move towards them.
    """

    def __init__(self, features: int, *, momentum: float = 0.1, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.momentum, self.epsilon = momentum, epsilon

    def __call__(self, x: Array, *, train: bool) -> Array:
        """(batch, height, width, channels) -> the same."""
        if train:
            axes = tuple(range(x.ndim - 1))
            count = math.prod(x.shape[:-1])
            mean = x.mean(axes)
            var = jnp.square(x - mean).mean(axes)
            unbiased = lax.stop_gradient(var) * (count / max(count - 1, 1))
            keep = 1.0 - self.momentum
            self.mean[...] = keep * self.mean[...] + self.momentum * lax.stop_gradient(mean)
            self.var[...] = keep * self.var[...] + self.momentum * unbiased
        else:
            mean, var = self.mean[...], self.var[...]
        factor = self.scale[...] * lax.rsqrt(var + self.epsilon)
        return x * factor + (self.bias[...] - mean * factor)


def drop_path(x: Array, rate: Array | float, key: Array) -> Array:
    """Stochastic depth: drop the branch of a whole sample with probability `rate`, and rescale what is kept."""
    keep = 1.0 - jnp.asarray(rate, x.dtype)
    kept = jax.random.uniform(key, (x.shape[0], *(1,) * (x.ndim - 1)), x.dtype) < keep
    return jnp.where(kept, x / jnp.where(keep > 0, keep, 1), 0)
