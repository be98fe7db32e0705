"""PaD-TS's denoiser: a transformer over time and one over channels, whose outputs are added; a pure function.

Parameters are a flat dictionary under the names and in the layout of the original (PyTorch): a weight is (out, in).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.layers.weights import check_weights

Parameters = dict[str, Array]

DEAD = "feature2emb.pos_emb.pe"
"""A parameter of the original that nothing reads: its channels' transformer adds no position. Ours has none."""

_STEP_FEATURES = 256
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """x_0 from x_t and t.

    Two branches, of tokens that are time steps (length of them, `channels` numbers each, with learnt positions) and of
    tokens that are channels. In each a linear layer to `width`, `encoders` pre-norm blocks,

        x <- x + attention(LN(x)),    x <- x + mlp(LN(x)),

    then `decoders` blocks that the noise level steers, with (s1, k1, g1, s2, k2, g2) = Linear(SiLU(c(t))),

        x <- x + g1 attention(LN(x) (1 + k1) + s1),    x <- x + g2 mlp(LN(x) (1 + k2) + s2),

    and a linear layer back. LN has no parameters. The decoders are wired as the original's are: y_k = block_k(x_k),
    x_{k+1} = y_k + x_k, and their output is the sum of all y_k. Nothing starts at zero (it is not adaLN-Zero): all
    layers start as PyTorch's do.

    Args:
        length, channels: of the windows.
        width: of the tokens.
        encoders, decoders: blocks per branch.
        heads: of the attention.

    Reference: Li, Meng, Bi, Urteaga, Yeung, "Population Aware Diffusion for Time Series Generation", AAAI 2025.
    """

    length: int
    channels: int
    width: int = 128
    encoders: int = 1
    decoders: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Denoiser({name}={value!r}): a positive integer is needed.")
        if self.width % self.heads:
            raise ValueError(
                f"Denoiser(width={self.width}, heads={self.heads}): the heads share the width equally, so give a "
                "multiple of the heads as width."
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by the original's name."""
        h = self.width
        shapes: dict[str, tuple[int, ...]] = {"time2emb.pos_emb.pe": (1, self.length, self.width)}

        def layer(name: str, n_in: int, n_out: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

        for branch, size in (("time", self.channels), ("feature", self.length)):
            layer(f"{branch}2emb.processing.0", size, h)
            for part, count in ((f"{branch}_encoder", self.encoders), (f"{branch}_blocks", self.decoders)):
                for k in range(count):
                    block = f"{part}.encoder_blocks.{k}"
                    layer(f"{block}.attn.qkv", h, 3 * h)
                    layer(f"{block}.attn.proj", h, h)
                    layer(f"{block}.mlp.fc1", h, 4 * h)
                    layer(f"{block}.mlp.fc2", 4 * h, h)
                    if part.endswith("_blocks"):
                        layer(f"{block}.adaLN_modulation.1", h, 6 * h)
            layer(f"{branch}_blocks.diffusion_step_emb.mlp.0", _STEP_FEATURES, h)
            layer(f"{branch}_blocks.diffusion_step_emb.mlp.2", h, h)
            layer(f"fc_{branch}", h, size)
        return shapes

    def count(self, dead: bool = True) -> int:
        """The number of parameters; with the original's dead ones (`DEAD`), as published, or without."""
        return sum(math.prod(s) for s in self.shapes().values()) + dead * self.length * self.width

    def init(self, key: Array) -> Parameters:
        """Parameters as PyTorch draws them: U(-1, 1) / sqrt(inputs) for layers, normal of deviation 0.02 for positions.

        The original's start of the positions is not published; this is the usual one.
        """
        shapes, of_layers, of_positions = self.shapes(), *jax.random.split(key)
        # One draw for all layers, in pieces: a generator for each of some fifty would take seconds to compile.
        sizes = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith(".pe")}
        flat = jax.random.uniform(of_layers, (sum(sizes.values()),), minval=-1)
        pieces = dict(zip(sizes, jnp.split(flat, np.cumsum(list(sizes.values()))[:-1]), strict=True))
        params = {}
        for name, shape in shapes.items():
            if name.endswith(".pe"):
                params[name] = 0.02 * jax.random.normal(of_positions, shape)
                continue
            bound = shapes[name.removesuffix("bias").removesuffix("weight") + "weight"][1] ** -0.5
            params[name] = bound * pieces[name].reshape(shape)
        return params

    def load(self, weights: Mapping[str, Any]) -> Parameters:
        """Parameters from the original's state dictionary, or from one of a flat file with `__` for dots.

        Raises:
            ValueError: names or shapes are not those of this configuration.
        """
        given = {name.removeprefix("P_").replace("__", "."): np.asarray(value) for name, value in weights.items()}
        given.pop(DEAD, None)
        shapes = self.shapes()
        check_weights(given, shapes, self, "the original's")
        return {name: jnp.asarray(given[name]) for name in shapes}

    def __call__(self, params: Parameters, x: Array, t: Array) -> Array:
        """The denoised windows.

        Args:
            params: from `init` or `load`.
            x: noisy windows (batch, length, channels).
            t: noise levels, integers (batch,) or one for all.
        """
        if x.shape[-2:] != (self.length, self.channels):
            raise ValueError(
                f"The windows have the shape {x.shape}; {self} takes (batch, {self.length}, {self.channels})."
            )
        steps = step_features(jnp.broadcast_to(t, x.shape[:1]), x.dtype)
        return self._branch(params, "time", x, steps) + jnp.swapaxes(
            self._branch(params, "feature", jnp.swapaxes(x, 1, 2), steps), 1, 2
        )

    def _branch(self, params: Parameters, branch: str, x: Array, steps: Array) -> Array:
        x = _linear(params, f"{branch}2emb.processing.0", x)
        if branch == "time":
            x = x + params["time2emb.pos_emb.pe"]
        for k in range(self.encoders):
            x = self._block(params, f"{branch}_encoder.encoder_blocks.{k}", x)
        name = f"{branch}_blocks.diffusion_step_emb.mlp"
        c = _linear(params, f"{name}.2", jax.nn.silu(_linear(params, f"{name}.0", steps)))
        total = jnp.zeros_like(x)
        for k in range(self.decoders):
            block = f"{branch}_blocks.encoder_blocks.{k}"
            modulation = _linear(params, f"{block}.adaLN_modulation.1", jax.nn.silu(c))[:, None]
            y = self._block(params, block, x, jnp.split(modulation, 6, axis=-1))
            total, x = total + y, y + x
        return _linear(params, f"fc_{branch}", total)

    def _block(self, params: Parameters, name: str, x: Array, modulation: Any = None) -> Array:
        s1, k1, g1, s2, k2, g2 = (0.0, 0.0, 1.0, 0.0, 0.0, 1.0) if modulation is None else modulation
        x = x + g1 * self._attention(params, f"{name}.attn", _normalised(x) * (1 + k1) + s1)
        hidden = jax.nn.gelu(_linear(params, f"{name}.mlp.fc1", _normalised(x) * (1 + k2) + s2), approximate=True)
        return x + g2 * _linear(params, f"{name}.mlp.fc2", hidden)

    def _attention(self, params: Parameters, name: str, x: Array) -> Array:
        b, n, h = x.shape
        qkv = _linear(params, f"{name}.qkv", x).reshape(b, n, 3, self.heads, h // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (h // self.heads) ** -0.5
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return _linear(params, f"{name}.proj", out.reshape(b, n, h))


def step_features(t: Array, dtype: Any = jnp.float32) -> Array:
    """[cos(t w), sin(t w)] of 128 frequencies from 1 down to 1e-4; t is the level's number, not a share of all."""
    half = _STEP_FEATURES // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=dtype) / half)
    angles = jnp.asarray(t, dtype)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _linear(params: Parameters, name: str, x: Array) -> Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _normalised(x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPSILON)


sines = Denoiser(24, 5)
stocks = Denoiser(24, 6)
energy = Denoiser(24, 28, 256)
mujoco = Denoiser(24, 14, 256)
fmri = Denoiser(24, 50, 256)

PUBLISHED = {"sines": sines, "stocks": stocks, "energy": energy, "mujoco": mujoco, "fmri": fmri}
"""The five configurations of the paper."""
