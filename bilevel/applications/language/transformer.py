"""A decoder-only transformer as a pure function of a flat dictionary: scanned blocks, and logits that are never whole.

Blocks are stacked along the first axis of their parameters, and one of them is compiled, whatever their number. Weights
are (out, in), PyTorch's layout, so that `layers.lora` and a mesh find them by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.applications.language.entropy import chunked_entropy
from bilevel.applications.layers import check_numbers, lora
from bilevel.applications.layers.weights import check_weights

Parameters = dict[str, Array]

_BLOCKS, _EPSILON = "blocks.", 1e-5
_LINEAR = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Next tokens from those before: pre-norm blocks with causal attention,

        h <- h + attention(LN(h)),    h <- h + down(gelu(up(LN(h)))),

    between an embedding E and logits E LN(h): E is one matrix for both ends (tied), as in GPT-2. With
    `positions="learnt"` and GPT-2's sizes it is GPT-2 (`GPT2`: 124,439,808 parameters).

    Args:
        vocabulary: how many tokens there are.
        width: of a token's vector.
        blocks, heads: how many; each head has width / heads numbers, which rotary positions need even.
        length: the most tokens of a sequence.
        positions: "rotary", which turns queries and keys by angles of their places and has no parameters, or "learnt",
            a vector for each place that is added to the embedding.
        remat: compute a block again in the backward pass, so that one block's intermediates are kept at a time and of
            the others the input alone.
        chunk: positions of each sequence whose logits exist at once (`chunked_entropy`).
        compute: dtype of products and activations, such as "bfloat16"; the parameters keep theirs and are cast where
            they are used; sums in norms and the cross-entropy are in the parameters'. None: the parameters'.
        attend: a kernel in place of the plain attention, called as `jax.nn.dot_product_attention` is: `attend(q, k, v,
            is_causal=True)`, each (batch, time, heads, numbers). The plain one is exact in float64 too.

    References: Vaswani et al., NeurIPS 2017; Radford et al., "Language Models are Unsupervised Multitask Learners",
    2019 (GPT-2); Su et al., "RoFormer", 2021 (rotary positions).
    """

    vocabulary: int
    width: int = 64
    blocks: int = 2
    heads: int = 4
    length: int = 128
    positions: Literal["rotary", "learnt"] = "rotary"
    remat: bool = True
    chunk: int = 16
    compute: str | None = None
    attend: Callable[..., Array] | None = None

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "blocks", "heads", "length", "chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Transformer({name}={value!r}): a positive integer is needed.")
        if self.positions not in ("rotary", "learnt"):
            raise ValueError(f"Transformer(positions={self.positions!r}): positions are 'rotary' or 'learnt'.")
        if self.width % self.heads:
            raise ValueError(
                f"Transformer(width={self.width}, heads={self.heads}): the heads share the width equally, so give a "
                "multiple of the heads as width."
            )
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise ValueError(
                f"Transformer(width={self.width}, heads={self.heads}): rotary positions turn pairs of numbers, and a "
                f"head has {self.width // self.heads}. Give an even number per head, or positions='learnt'."
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by name; those of the blocks have the blocks as first axis."""
        w, n = self.width, self.blocks
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocabulary, w)}
        if self.positions == "learnt":
            shapes["positions.weight"] = (self.length, w)
        sides = {"mlp.up": (4 * w, w), "mlp.down": (w, 4 * w)}
        for name in _LINEAR:
            out, n_in = sides.get(name, (w, w))
            shapes[f"{_BLOCKS}{name}.weight"], shapes[f"{_BLOCKS}{name}.bias"] = (n, out, n_in), (n, out)
        for name in ("attention.norm", "mlp.norm"):
            shapes[f"{_BLOCKS}{name}.scale"], shapes[f"{_BLOCKS}{name}.bias"] = (n, w), (n, w)
        return {**shapes, "norm.scale": (w,), "norm.bias": (w,)}

    def count(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def init(self, key: Array, dtype: Any = jnp.float32) -> Parameters:
        """Parameters as GPT-2's start: normal of deviation .02, of .02 / sqrt(2 blocks) for what is added to the
        stream (`attention.out`, `mlp.down`); biases 0, scales 1."""
        params = {}
        for k, (name, shape) in enumerate(self.shapes().items()):
            if name.endswith(".weight"):
                added = name.endswith(("attention.out.weight", "mlp.down.weight"))
                deviation = 0.02 / math.sqrt(2 * self.blocks) if added else 0.02
                params[name] = deviation * jax.random.normal(jax.random.fold_in(key, k), shape, dtype)
            else:
                params[name] = jnp.full(shape, float(name.endswith(".scale")), dtype)
        return params

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise a `ValueError` where parameters are not this network's, by name and shape."""
        check_weights(params, self.shapes(), self, "the parameters' own")

    def hidden(self, params: Mapping[str, Array], tokens: Array, adapter: Mapping[str, Array] | None = None) -> Array:
        """LN(h) after the last block, (batch, time, width).

        Args:
            params: from `init`.
            tokens: whole numbers (batch, time), 0 to vocabulary - 1.
            adapter: of `lora.init`, on weights of the blocks; its product is added layer by layer, so that no adapted
                weight is ever made. The result is that of `lora.merge(params, adapter)`.
        """
        t = tokens.shape[1]
        if t > self.length:
            raise ValueError(f"Sequences of {t} tokens were given to a Transformer of length {self.length}.")
        adapter = {} if adapter is None else adapter
        strange = [name for name in lora.names(adapter) if not name.startswith(_BLOCKS)]
        if strange:
            raise ValueError(
                f"The adapter has {strange[0]}: adapters of the blocks' weights alone are added layer by layer. Take "
                "others to `lora.merge`, and give the merged parameters."
            )
        kind = params["embedding.weight"].dtype if self.compute is None else jnp.dtype(self.compute)
        check_numbers(
            "The tokens", tokens, self.vocabulary, "in the vocabulary", "Give Transformer the tokenizer's size."
        )
        h = jnp.asarray(params["embedding.weight"])[tokens].astype(kind)
        if self.positions == "learnt":
            h = h + params["positions.weight"][:t].astype(kind)
        turn = _angles(t, self.width // self.heads) if self.positions == "rotary" else None

        def block(h: Array, own: tuple[Parameters, Parameters]) -> tuple[Array, None]:
            return self._block(*own, h, turn), None

        # Without prevent_cse=False the scan would hold barriers against a sharing that cannot happen in it.
        body = jax.checkpoint(block, prevent_cse=False) if self.remat else block
        stacked = {name.removeprefix(_BLOCKS): leaf for name, leaf in params.items() if name.startswith(_BLOCKS)}
        added = {name.removeprefix(_BLOCKS): leaf for name, leaf in adapter.items()}
        h, _ = jax.lax.scan(body, h, (stacked, added))
        return _norm(params, "norm", h)

    def _block(self, params: Parameters, adapter: Parameters, h: Array, turn: Any) -> Array:
        b, t, w = h.shape

        def linear(name: str, x: Array) -> Array:
            out = x @ params[f"{name}.weight"].astype(x.dtype).T + params[f"{name}.bias"].astype(x.dtype)
            delta = lora.product(adapter, name, x)
            return out if delta is None else out + delta

        x = _norm(params, "attention.norm", h)
        q, k, v = (linear(f"attention.{part}", x).reshape(b, t, self.heads, -1) for part in ("query", "key", "value"))
        if turn is not None:
            q, k = _turned(q, turn), _turned(k, turn)
        attend = _causal if self.attend is None else self.attend
        h = h + linear("attention.out", attend(q, k, v, is_causal=True).reshape(b, t, w))
        up = jax.nn.gelu(linear("mlp.up", _norm(params, "mlp.norm", h)), approximate=True)
        return h + linear("mlp.down", up)

    def __call__(self, params: Mapping[str, Array], tokens: Array, adapter: Mapping[str, Array] | None = None) -> Array:
        """The logits of each next token, (batch, time, vocabulary), whole: for looking at and for drawing text."""
        h, embedding = self.hidden(params, tokens, adapter), params["embedding.weight"]
        return jnp.matmul(
            h, embedding.T.astype(h.dtype), preferred_element_type=jnp.promote_types(h.dtype, jnp.float32)
        )

    def losses(self, params: Mapping[str, Array], tokens: Array, adapter: Mapping[str, Array] | None = None) -> Array:
        """-log p(token | those before) of the tokens after the first, (batch, time - 1), in nats.

        Their logits exist `chunk` positions at a time, in the backward pass too.
        """
        h = self.hidden(params, tokens[:, :-1], adapter)
        return chunked_entropy(h, params["embedding.weight"], tokens[:, 1:], self.chunk)

    def loss(self, params: Mapping[str, Array], tokens: Array, adapter: Mapping[str, Array] | None = None) -> Array:
        """The mean of `losses` of each sequence, (batch,)."""
        return self.losses(params, tokens, adapter).mean(-1)

    def generate(
        self, params: Mapping[str, Array], key: Array, start: Array, count: int, temperature: float = 1.0
    ) -> Array:
        """`count` tokens drawn after `start`, whole numbers (n,): (n + count,). All is computed anew for each.

        At the temperature 0 the likeliest token is taken each time.
        """
        if not temperature >= 0:
            raise ValueError(f"generate(temperature={temperature}): it is zero (the likeliest token) or positive.")
        check_numbers("The tokens of start", start, self.vocabulary, "in the vocabulary")
        start = jnp.asarray(start)
        if len(start) < 1 or len(start) + count > self.length + 1:
            raise ValueError(
                f"generate(count={count}) after {len(start)} tokens: at least one is needed before, and the length "
                f"{self.length} at most in all."
            )
        row = jnp.zeros(len(start) + count, start.dtype).at[: len(start)].set(start)

        def draw(row: Array, now: tuple[Array, Array]) -> tuple[Array, None]:
            place, key = now
            logits = self(params, row[None, :-1])[0, place - 1]
            token = logits.argmax() if temperature == 0 else jax.random.categorical(key, logits / temperature)
            return row.at[place].set(token.astype(row.dtype)), None

        places = jnp.arange(len(start), len(start) + count)
        return jax.lax.scan(draw, row, (places, jax.random.split(key, count)))[0]


GPT2 = Transformer(50257, 768, 12, 12, 1024, "learnt")
"""The smallest GPT-2's shape."""


def _norm(params: Mapping[str, Array], name: str, h: Array) -> Array:
    """Layer norm, summed in the parameters' dtype."""
    kind, scale = h.dtype, params[f"{name}.scale"]
    h = h.astype(jnp.promote_types(kind, scale.dtype))
    centred = h - h.mean(-1, keepdims=True)
    out = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPSILON) * scale
    return (out + params[f"{name}.bias"]).astype(kind)


def _causal(q: Array, k: Array, v: Array, *, is_causal: bool) -> Array:
    """Softmax attention to what is not later, the softmax in float32 at least."""
    kind, t = jnp.promote_types(q.dtype, jnp.float32), q.shape[1]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=kind)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, jnp.finfo(kind).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(v.dtype), v)


def _angles(time: int, numbers: int) -> tuple[Array, Array]:
    """Cosine and sine of place times frequency, (time, 1, numbers / 2): frequencies from 1 down to 1 / 10,000."""
    frequencies = 10_000.0 ** (-jnp.arange(0, numbers, 2) / numbers)
    angles = (jnp.arange(time)[:, None] * frequencies)[:, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _turned(x: Array, turn: tuple[Array, Array]) -> Array:
    """Each pair (first half, second half) of a head's numbers turned by its angle."""
    cos, sin = (part.astype(x.dtype) for part in turn)
    one, two = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, one * sin + two * cos], -1)
