"""Encoders of 8x8 images, and the heads that pretraining puts on them; pure functions of a dictionary."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.applications.contrastive.digits import SIDE

Parameters = dict[str, Any]


def layer(key: Array, n_in: int, n_out: int) -> dict[str, Array]:
    """A linear layer: weights (in, out) of variance 1 / in, and a bias of zeros."""
    return {"w": jax.random.normal(key, (n_in, n_out)) * n_in**-0.5, "b": jnp.zeros(n_out)}


def linear(params: dict[str, Array], x: Array) -> Array:
    """x w + b."""
    return x @ params["w"] + params["b"]


@dataclasses.dataclass(frozen=True)
class MLP:
    """An encoder of fully connected layers with GELU between them: images (..., 8, 8) -> features (..., width).

    Args:
        hidden: the widths of the hidden layers.
        width: of the features.
    """

    hidden: tuple[int, ...] = (64,)
    width: int = 32

    def __post_init__(self) -> None:
        _check_widths(self, (*self.hidden, self.width))

    def init(self, key: Array) -> Parameters:
        """Parameters, a layer each: "layer0", "layer1", ..."""
        sizes = (SIDE**2, *self.hidden, self.width)
        keys = jax.random.split(key, len(sizes) - 1)
        return {f"layer{k}": layer(keys[k], *sizes[k : k + 2]) for k in range(len(sizes) - 1)}

    def activations(self, params: Parameters, images: Array) -> tuple[list[Array], Array]:
        """What each hidden layer's channels say, (..., channels), and the features."""
        x, hidden = jnp.reshape(images, (*jnp.shape(images)[:-2], SIDE**2)), []
        for k in range(len(self.hidden)):
            x = jax.nn.gelu(linear(params[f"layer{k}"], x))
            hidden.append(x)
        return hidden, linear(params[f"layer{len(self.hidden)}"], x)

    def __call__(self, params: Parameters, images: Array) -> Array:
        """The features."""
        return self.activations(params, images)[1]

    def kernels(self, params: Parameters) -> list[Array]:
        """The weights of each hidden layer's channels as matrices, (channels, in, taps)."""
        return [params[f"layer{k}"]["w"].T[:, :, None] for k in range(len(self.hidden))]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A small convolutional encoder: 3x3 convolutions, each with GELU and a mean over 2x2, then a linear layer.

    The convolutions are products with patches, so that `vmap` over parameters is a batched product.

    Args:
        channels: of the convolutions, at most three.
        width: of the features.
    """

    channels: tuple[int, ...] = (8, 16)
    width: int = 32

    def __post_init__(self) -> None:
        _check_widths(self, (*self.channels, self.width))
        if not 1 <= len(self.channels) <= 3:
            raise ValueError(f"Conv(channels={self.channels}): one to three convolutions halve a side of eight.")

    @property
    def hidden(self) -> tuple[int, ...]:
        """The channels of the hidden layers."""
        return self.channels

    def init(self, key: Array) -> Parameters:
        """Parameters, a layer each: "layer0", "layer1", ..."""
        sizes, keys = (1, *self.channels), jax.random.split(key, len(self.channels) + 1)
        params = {f"layer{k}": layer(keys[k], 9 * sizes[k], sizes[k + 1]) for k in range(len(self.channels))}
        left = (SIDE >> len(self.channels)) ** 2 * self.channels[-1]
        return {**params, f"layer{len(self.channels)}": layer(keys[-1], left, self.width)}

    def activations(self, params: Parameters, images: Array) -> tuple[list[Array], Array]:
        """What each convolution's channels say, by their mean over the pixels, and the features."""
        lead = jnp.shape(images)[:-2]
        x, hidden = jnp.reshape(images, (-1, SIDE, SIDE, 1)), []
        for k in range(len(self.channels)):
            x = jax.nn.gelu(linear(params[f"layer{k}"], _patches(x)))
            hidden.append(x.mean((1, 2)).reshape(*lead, -1))
            n, side = x.shape[0], x.shape[1] // 2
            x = x.reshape(n, side, 2, side, 2, -1).mean((2, 4))
        features = linear(params[f"layer{len(self.channels)}"], x.reshape(x.shape[0], -1))
        return hidden, features.reshape(*lead, self.width)

    def __call__(self, params: Parameters, images: Array) -> Array:
        """The features."""
        return self.activations(params, images)[1]

    def kernels(self, params: Parameters) -> list[Array]:
        """The weights of each convolution's channels as matrices, (channels, in, taps)."""
        return [params[f"layer{k}"]["w"].T.reshape(c, 9, -1).swapaxes(1, 2) for k, c in enumerate(self.channels)]


def _patches(x: Array) -> Array:
    """The 3x3 neighbourhoods of each pixel, zeros beyond the border: (n, h, w, c) -> (n, h, w, 9 c)."""
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1)


def _check_widths(owner: Any, widths: tuple[Any, ...]) -> None:
    if not all(isinstance(w, int) and not isinstance(w, bool) and w > 0 for w in widths):
        raise ValueError(f"{owner}: widths are positive integers.")


def head(key: Array, n_in: int, hidden: int, n_out: int) -> Parameters:
    """A projector or predictor: linear, batch normalisation, GELU, linear.

    GELU where the papers have ReLU: the encoders have it too, and an implicit hypergradient needs second derivatives.
    """
    first, second = jax.random.split(key)
    return {"first": layer(first, n_in, hidden), "second": layer(second, hidden, n_out)}


def apply_head(params: Parameters, x: Array) -> Array:
    """The head on a batch (batch, in), normalised by the batch's own statistics.

    No average of these is kept: a head is used in pretraining alone.
    """
    x = linear(params["first"], x)
    x = (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)
    return linear(params["second"], jax.nn.gelu(x))
