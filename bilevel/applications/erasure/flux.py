"""Flux: a flow transformer of dual-stream and single-stream blocks, a pure function of named parameters.

Names and layout are those of diffusers' `FluxTransformer2DModel` (a weight is (out, in)). The blocks of a kind are run
by one scan over parameters stacked along a leading axis, so that compile time does not grow with depth.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.layers.weights import check_weights, read_safetensors

Parameters = dict[str, Array]

_DUAL, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_NUMBERED = re.compile(rf"^({_SINGLE}|{_DUAL})\.(\d+)\.(.+)$")
_FREQUENCIES = 256  # features of a noise level
_EPSILON = 1e-6
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class Flow(NamedTuple):
    """What the network returns: the velocity, and attention maps by block."""

    velocity: Array
    attention: dict[int, Array]


@dataclasses.dataclass(frozen=True)
class Flux:
    """The velocity of a rectified flow, from noisy patches and a prompt.

    With c = e(1000 t) [+ e'(1000 guidance)] [+ mlp(pooled prompt)], e an mlp of 256 sines and cosines, a dual block
    moves image tokens x and text tokens z, each by weights of its own that SiLU(c) steers,

        (s1, k1, g1, s2, k2, g2) = Linear(SiLU(c)),       h = LN(x) (1 + k1) + s1,       and so for z,
        attention over [z; x]: queries and keys RMS-normalised by head, then rotated by (text, row, column),
        x <- x + g1 Linear(attended),                     x <- x + g2 mlp(LN(x) (1 + k2) + s2),

    and a single block moves u = [z; x] in one stream, attention beside the mlp: with (s, k, g) = Linear(SiLU(c)) and
    h = LN(u) (1 + k) + s,

        u <- u + g Linear([attention(h); GELU(Linear(h))]).

    LN has no parameters, GELU is the tanh approximation, and the last layer is Linear(LN(x) (1 + k) + s).

    Parameters are a flat dictionary. Stacked (`init`, `load`), `transformer_blocks.attn.to_q.weight` holds that weight
    of all blocks, (blocks, out, in); `unstack` gives diffusers' names, `transformer_blocks.0.attn.to_q.weight`, and
    the call takes either.

    Args:
        in_channels: numbers per image token (a patch).
        out_channels: of the velocity; None: as many.
        num_layers, num_single_layers: dual and single blocks.
        attention_head_dim, num_attention_heads: the width is their product.
        joint_attention_dim: of the prompt's tokens.
        pooled_projection_dim: of the pooled prompt; 0: there is none.
        guidance_embeds: whether the guidance is an input.
        axes_dims_rope: how the head's dimensions are shared among the three positions; even numbers.
        rematerialise: whether reverse mode computes blocks anew instead of keeping what is inside them.

    Raises:
        ValueError: a field that no such network has, by name.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    rematerialise: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        least = {"num_layers": 0, "num_single_layers": 0, "pooled_projection_dim": 0}
        for field in ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
                      "joint_attention_dim", "pooled_projection_dim"):  # fmt: skip
            value, low = getattr(self, field), least.get(field, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"Flux({field}={value!r}): an integer of at least {low} is needed.")
        if self.out_channels is not None and (not isinstance(self.out_channels, int) or self.out_channels < 1):
            raise ValueError(f"Flux(out_channels={self.out_channels!r}): a positive integer or None is needed.")
        if any(n < 0 or n % 2 for n in self.axes_dims_rope) or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"Flux(axes_dims_rope={self.axes_dims_rope}, attention_head_dim={self.attention_head_dim}): the "
                "positions share a head's dimensions, so give even numbers whose sum is the latter."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Flux:
        """The network of a `config.json` of diffusers; what begins with an underscore there is no part of it.

        Raises:
            ValueError: a field that is not known, or a patch size other than 1 (patches are made before the network).
        """
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        if given.pop("patch_size", 1) != 1:
            raise ValueError(
                f"patch_size={config['patch_size']}: Flux takes patches as tokens; make them before, and set it to 1."
            )
        unknown = sorted(given.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"The configuration has {unknown}, which this Flux does not know.")
        return cls(**given)

    @property
    def width(self) -> int:
        """Of the tokens inside."""
        return self.attention_head_dim * self.num_attention_heads

    def shapes(self, stacked: bool = True) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by its name, with the blocks stacked or each by itself."""
        d, mlp, shapes = self.width, 4 * self.width, dict[str, tuple[int, ...]]()

        def layer(name: str, n_in: int, n_out: int, lead: tuple[int, ...] = ()) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (*lead, n_out, n_in), (*lead, n_out)

        embedders = {"timestep_embedder": _FREQUENCIES}
        embedders |= {"guidance_embedder": _FREQUENCIES} if self.guidance_embeds else {}
        embedders |= {"text_embedder": self.pooled_projection_dim} if self.pooled_projection_dim else {}
        for name, n_in in embedders.items():
            layer(f"time_text_embed.{name}.linear_1", n_in, d)
            layer(f"time_text_embed.{name}.linear_2", d, d)
        layer("context_embedder", self.joint_attention_dim, d)
        layer("x_embedder", self.in_channels, d)

        def dual(name: str, lead: tuple[int, ...]) -> None:
            for norm in ("norm1", "norm1_context"):
                layer(f"{name}.{norm}.linear", d, 6 * d, lead)
            for norm in _NORMS:
                shapes[f"{name}.attn.{norm}.weight"] = (*lead, self.attention_head_dim)
            for proj in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                layer(f"{name}.attn.{proj}", d, d, lead)
            for ff in ("ff", "ff_context"):
                layer(f"{name}.{ff}.net.0.proj", d, mlp, lead)
                layer(f"{name}.{ff}.net.2", mlp, d, lead)

        def single(name: str, lead: tuple[int, ...]) -> None:
            layer(f"{name}.norm.linear", d, 3 * d, lead)
            layer(f"{name}.proj_mlp", d, mlp, lead)
            layer(f"{name}.proj_out", d + mlp, d, lead)
            for norm in _NORMS[:2]:
                shapes[f"{name}.attn.{norm}.weight"] = (*lead, self.attention_head_dim)
            for proj in ("to_q", "to_k", "to_v"):
                layer(f"{name}.attn.{proj}", d, d, lead)

        for block, kind, count in ((dual, _DUAL, self.num_layers), (single, _SINGLE, self.num_single_layers)):
            if stacked and count:
                block(kind, (count,))
            for k in range(0 if stacked else count):
                block(f"{kind}.{k}", ())
        layer("norm_out.linear", d, 2 * d)
        layer("proj_out", d, self.in_channels if self.out_channels is None else self.out_channels)
        return shapes

    def count(self) -> int:
        """The number of parameters, from shapes alone."""
        return sum(map(math.prod, self.shapes().values()))

    def init(self, key: Array, dtype: Any = jnp.float32) -> Parameters:
        """Stacked parameters to train from: uniform in +-1/sqrt(inputs) as PyTorch draws them, norms of one.

        The layers that modulate and the last one start at zero, so that each block starts as the identity (adaLN-Zero).
        """
        params: Parameters = {}
        for k, (name, shape) in enumerate(self.shapes().items()):
            if re.search(r"norm_(added_)?[qk]\.weight$", name):
                params[name] = jnp.ones(shape, dtype)
            elif re.search(r"(norm\d?(_context|_out)?\.linear|^proj_out)\.", name):
                params[name] = jnp.zeros(shape, dtype)
            else:
                n_in = self.shapes()[re.sub(r"bias$", "weight", name)][-1]
                params[name] = jax.random.uniform(jax.random.fold_in(key, k), shape, dtype, -1, 1) / math.sqrt(n_in)
        return params

    def load(self, weights: Mapping[str, Any] | Any, dtype: Any = None) -> Parameters:
        """Stacked parameters from named arrays or a safetensors file, under diffusers' names or the original release's.

        Args:
            weights: name -> array, or the path of a file (or of several, shards of one model). A prefix `transformer.`
                or `model.diffusion_model.` is dropped, and so is PEFT's `.base_layer`.
            dtype: of the result; None: as given.

        Raises:
            ValueError: missing, unknown or misshapen names; a file that is none or is cut off.
        """
        if not isinstance(weights, Mapping):
            files = weights if isinstance(weights, (list, tuple)) else [weights]
            weights = {name: array for file in files for name, array in read_safetensors(file).items()}
        given = {
            re.sub(r"^(transformer|model\.diffusion_model)\.", "", name).replace(".base_layer.", "."): array
            for name, array in weights.items()
        }
        if any(name.startswith(("double_blocks.", "single_blocks.")) for name in given):
            from bilevel.applications.erasure.names import from_original

            given = from_original(self, given)
        shapes = self.shapes(stacked=not any(map(_NUMBERED.match, given)))
        check_weights(given, shapes, self)
        return {name: jnp.asarray(array, dtype) for name, array in self.stack(given).items()}

    def stack(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters (or an adapter's) with the blocks of a kind stacked, from names with a block's number.

        Raises:
            ValueError: a number is missing between others, so that no stack is whole.
        """
        stacked: dict[str, Any] = {}
        parts: dict[str, dict[int, Any]] = {}
        for name, array in params.items():
            if found := _NUMBERED.match(name):
                parts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = array
            else:
                stacked[name] = array
        for name, blocks in parts.items():
            count = self.num_single_layers if name.startswith(_SINGLE) else self.num_layers
            if sorted(blocks) != list(range(count)):
                raise ValueError(
                    f"{name} is given for the blocks {sorted(blocks)}, and {count} are stacked: give one for each, or "
                    "keep the names with their numbers."
                )
            join = np.stack if all(isinstance(a, np.ndarray) for a in blocks.values()) else jnp.stack
            stacked[name] = join([blocks[k] for k in range(count)])
        return stacked

    def unstack(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters (or an adapter's) under diffusers' names, each block by itself."""
        flat: dict[str, Any] = {}
        for name, array in params.items():
            kind, _, rest = name.partition(".")
            if kind in (_DUAL, _SINGLE) and not _NUMBERED.match(name):
                flat |= {f"{kind}.{k}.{rest}": array[k] for k in range(len(array))}
            else:
                flat[name] = array
        return flat

    def __call__(
        self,
        params: Mapping[str, Any],
        hidden_states: Array,
        encoder_hidden_states: Array,
        timestep: Array,
        *,
        img_ids: Array,
        txt_ids: Array,
        pooled_projections: Array | None = None,
        guidance: Array | float | None = None,
        attention: Sequence[int] = (),
    ) -> Flow:
        """The velocity, and the attention of chosen blocks.

        Args:
            params: from `init` or `load`, or under diffusers' names.
            hidden_states: image tokens (batch, tokens, in_channels).
            encoder_hidden_states: the prompt's tokens (batch, words, joint_attention_dim).
            timestep: t in [0, 1], (batch,) or one for all.
            img_ids, txt_ids: positions (text, row, column) of the tokens, (tokens, 3) and (words, 3).
            pooled_projections: (batch, pooled_projection_dim), where the network has them.
            guidance: (batch,) or one for all, where the network has it.
            attention: numbers of the blocks, the dual ones first, whose attention is wanted.

        Returns:
            velocity (batch, tokens, out_channels), and by block probabilities (batch, heads, words + tokens,
            words + tokens), text before image.

        Raises:
            ValueError: inputs of other shapes, a missing or a needless input, a block that there is not.
        """
        self._check(hidden_states, encoder_hidden_states, img_ids, txt_ids, pooled_projections, guidance, attention)
        params = self.stack(params)
        x, z = _linear(params, "x_embedder", hidden_states), _linear(params, "context_embedder", encoder_hidden_states)
        batch, words = x.shape[0], z.shape[1]
        c = self._level(params, "timestep_embedder", timestep, batch, x.dtype)
        if guidance is not None:
            c = c + self._level(params, "guidance_embedder", guidance, batch, x.dtype)
        if pooled_projections is not None:
            c = c + _mlp(params, "time_text_embed.text_embedder", pooled_projections)
        steer, turn = jax.nn.silu(c), self._turn(jnp.concatenate([txt_ids, img_ids]), x.dtype)
        maps: dict[int, Array] = {}

        def dual(carry: tuple[Array, Array], block: Parameters, keep: bool) -> tuple[tuple[Array, Array], Any]:
            return self._dual(block, *carry, steer, turn, keep)

        def single(u: Array, block: Parameters, keep: bool) -> tuple[Array, Any]:
            return self._single(block, u, steer, turn, keep)

        chosen = {k % (self.num_layers + self.num_single_layers) for k in attention}
        x, z = self._run(dual, (x, z), params, _DUAL, range(self.num_layers), chosen, maps)
        blocks = range(self.num_layers, self.num_layers + self.num_single_layers)
        u = self._run(single, jnp.concatenate([z, x], axis=1), params, _SINGLE, blocks, chosen, maps)
        scale, shift = jnp.split(_linear(params, "norm_out.linear", steer)[:, None], 2, axis=-1)
        velocity = _linear(params, "proj_out", _normalised(u[:, words:]) * (1 + scale) + shift)
        return Flow(velocity, {k: maps[k % (self.num_layers + self.num_single_layers)] for k in attention})

    def _run(
        self, body: Any, carry: Any, params: Mapping[str, Any], kind: str, blocks: range, chosen: set[int], maps: Any
    ) -> Any:
        """The blocks of a kind, one after another: one scan for each run of blocks whose attention is (not) wanted."""
        stacks = {name[len(kind) + 1 :]: a for name, a in params.items() if name.startswith(f"{kind}.")}
        for keep, run in itertools.groupby(blocks, lambda k: k in chosen):
            numbers = list(run)
            first, last = numbers[0] - blocks[0], numbers[-1] - blocks[0] + 1
            step = jax.checkpoint(body, static_argnums=2) if self.rematerialise else body
            if last - first == 1:  # a loop of one is none
                carry, found = step(carry, {name: a[first] for name, a in stacks.items()}, keep)
                found = None if found is None else found[None]
            else:
                part = stacks if len(numbers) == len(blocks) else {name: a[first:last] for name, a in stacks.items()}
                carry, found = jax.lax.scan(functools.partial(_kept, step, keep), carry, part)
            if keep:
                maps |= {k: found[i] for i, k in enumerate(numbers)}
        return carry

    def _dual(self, p: Parameters, x: Array, z: Array, steer: Array, turn: Any, keep: bool) -> Any:
        words = z.shape[1]
        s1, k1, g1, s2, k2, g2 = jnp.split(_linear(p, "norm1.linear", steer)[:, None], 6, axis=-1)
        t1, l1, h1, t2, l2, h2 = jnp.split(_linear(p, "norm1_context.linear", steer)[:, None], 6, axis=-1)
        of_x = self._heads(p, _normalised(x) * (1 + k1) + s1, "to_q", "to_k", "to_v", "norm_q", "norm_k")
        of_z = self._heads(
            p, _normalised(z) * (1 + l1) + t1, "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"
        )
        out, maps = self._attend(tuple(jnp.concatenate(pair, axis=1) for pair in zip(of_z, of_x, strict=True)), turn)
        x = x + g1 * _linear(p, "attn.to_out.0", out[:, words:])
        z = z + h1 * _linear(p, "attn.to_add_out", out[:, :words])
        x = x + g2 * _feed(p, "ff", _normalised(x) * (1 + k2) + s2)
        z = z + h2 * _feed(p, "ff_context", _normalised(z) * (1 + l2) + t2)
        return (x, z), maps if keep else None

    def _single(self, p: Parameters, u: Array, steer: Array, turn: Any, keep: bool) -> Any:
        s, k, g = jnp.split(_linear(p, "norm.linear", steer)[:, None], 3, axis=-1)
        h = _normalised(u) * (1 + k) + s
        out, maps = self._attend(self._heads(p, h, "to_q", "to_k", "to_v", "norm_q", "norm_k"), turn)
        beside = jax.nn.gelu(_linear(p, "proj_mlp", h), approximate=True)
        return u + g * _linear(p, "proj_out", jnp.concatenate([out, beside], axis=-1)), maps if keep else None

    def _heads(self, p: Parameters, h: Array, q: str, k: str, v: str, norm_q: str, norm_k: str) -> tuple[Array, ...]:
        """Normalised queries and keys, and values, (batch, tokens, heads, head)."""
        parts = (
            _linear(p, f"attn.{name}", h).reshape(*h.shape[:2], self.num_attention_heads, self.attention_head_dim)
            for name in (q, k, v)
        )
        query, key, value = parts
        return _rms(query, p[f"attn.{norm_q}.weight"]), _rms(key, p[f"attn.{norm_k}.weight"]), value

    def _attend(self, qkv: tuple[Array, ...], turn: Any) -> tuple[Array, Array]:
        q, k, v = _rotated(qkv[0], *turn), _rotated(qkv[1], *turn), qkv[2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * self.attention_head_dim**-0.5
        probabilities = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32))).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", probabilities, v)
        return out.reshape(*out.shape[:2], self.width), probabilities

    def _level(self, params: Mapping[str, Any], name: str, level: Any, batch: int, dtype: Any) -> Array:
        """An mlp of sines and cosines of 1000 times a number in [0, 1]."""
        angles = 1000 * jnp.broadcast_to(jnp.asarray(level, jnp.float32), (batch,))[:, None] * _rates()
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)
        return _mlp(params, f"time_text_embed.{name}", features)

    def _turn(self, ids: Array, dtype: Any) -> tuple[Array, Array]:
        """Cosines and sines (tokens, head / 2) of the rotations.

        A rate is the sum of twelve leading bits, whose product with a position is exact, and a rest: so the angles are
        as good as float64's, and positions may be traced.
        """
        wide, cosines, sines = jnp.promote_types(dtype, jnp.float32), [], []
        for axis, size in enumerate(self.axes_dims_rope):
            rates = 10_000.0 ** -(np.arange(0, size, 2) / max(size, 1))
            fraction, power = np.frexp(rates)
            lead = np.ldexp(np.round(fraction * 2**12) / 2**12, power)
            position = ids[:, axis, None].astype(wide)
            a, b = position * lead.astype(wide), position * (rates - lead).astype(wide)
            cosines.append(jnp.cos(a) * jnp.cos(b) - jnp.sin(a) * jnp.sin(b))
            sines.append(jnp.sin(a) * jnp.cos(b) + jnp.cos(a) * jnp.sin(b))
        return jnp.concatenate(cosines, axis=-1), jnp.concatenate(sines, axis=-1)

    def _check(self, x: Any, z: Any, img_ids: Any, txt_ids: Any, pooled: Any, guidance: Any, attention: Any) -> None:
        for name, array, size in (
            ("hidden_states", x, self.in_channels),
            ("encoder_hidden_states", z, self.joint_attention_dim),
        ):
            if array.ndim != 3 or array.shape[-1] != size:
                raise ValueError(f"{name} has the shape {array.shape}; this network takes (batch, tokens, {size}).")
        if x.shape[0] != z.shape[0]:
            raise ValueError(f"{x.shape[0]} images have {z.shape[0]} prompts: give as many.")
        axes = len(self.axes_dims_rope)
        for name, ids, tokens in (("img_ids", img_ids, x.shape[1]), ("txt_ids", txt_ids, z.shape[1])):
            if ids.shape != (tokens, axes):
                raise ValueError(
                    f"{name} has the shape {ids.shape}; {tokens} tokens have positions ({tokens}, {axes})."
                )
        for name, value, has in (
            ("pooled_projections", pooled, self.pooled_projection_dim > 0),
            ("guidance", guidance, self.guidance_embeds),
        ):
            if (value is not None) != has:
                raise ValueError(
                    f"{name} is {'not ' if has else ''}given, and this network has {'it' if has else 'none'}."
                )
        if pooled is not None and pooled.shape != (x.shape[0], self.pooled_projection_dim):
            raise ValueError(
                f"pooled_projections: {pooled.shape}; ({x.shape[0]}, {self.pooled_projection_dim}) is needed."
            )
        blocks = self.num_layers + self.num_single_layers
        for k in attention:
            if not -blocks <= k < blocks:
                raise ValueError(f"attention={tuple(attention)}: this network has the blocks 0 to {blocks - 1}.")


def _kept(step: Any, keep: bool, carry: Any, block: Parameters) -> Any:
    return step(carry, block, keep)


def _rates() -> np.ndarray:
    """exp(-log(1e4) k / 128) in float32, to the bit as PyTorch computes it on a CPU, whatever the network's dtype.

    Angles go up to 1000, where the last digit of a rate is seen in the fifth of a gradient. The nearest float32, but at
    two places, where PyTorch's exponential is one unit above.
    """
    half = _FREQUENCIES // 2
    exponents = np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    rates = np.exp(exponents.astype(np.float64)).astype(np.float32)
    rates[[12, 106]] = np.nextafter(rates[[12, 106]], np.float32(2))
    return rates


def _linear(params: Mapping[str, Any], name: str, x: Array) -> Array:
    return x @ jnp.swapaxes(params[f"{name}.weight"], -1, -2) + params[f"{name}.bias"]


def _mlp(params: Mapping[str, Any], name: str, x: Array) -> Array:
    return _linear(params, f"{name}.linear_2", jax.nn.silu(_linear(params, f"{name}.linear_1", x)))


def _feed(params: Mapping[str, Any], name: str, x: Array) -> Array:
    return _linear(params, f"{name}.net.2", jax.nn.gelu(_linear(params, f"{name}.net.0.proj", x), approximate=True))


def _normalised(x: Array) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPSILON)).astype(x.dtype)


def _rms(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + _EPSILON)).astype(x.dtype) * scale


def _rotated(x: Array, cosine: Array, sine: Array) -> Array:
    """Each pair of neighbouring dimensions turned by its token's angle."""
    pairs = x.astype(cosine.dtype).reshape(*x.shape[:-1], -1, 2)
    a, b, c, s = pairs[..., 0], pairs[..., 1], cosine[:, None], sine[:, None]
    return jnp.stack([a * c - b * s, b * c + a * s], axis=-1).reshape(x.shape).astype(x.dtype)


PUBLISHED = {"dev": Flux(guidance_embeds=True), "schnell": Flux()}
"""The two published configurations: 19 dual and 38 single blocks of width 3072."""
