"""Token attention over routed regions: one mathematical function, several ways to compute it.

Every query region r attends to the tokens of its K chosen regions s_1..s_K, with a head-wise softmax over all of them:

    out[r, t] = sum_ku p[k, u] w[r, k] v[s_k, u],      p = softmax_ku( scale w[r, k] <q[r, t], k[s_k, u]> )

where w are the soft routing weights (1 without soft routing). The back-ends:

- `gathered`: copies the chosen keys and values, then two matrix products. K copies of keys and values.
- `online`: a scan over the K choices with a running softmax. No copies; the logits of one region at a time.
- `dense`: attention among all tokens with the regions not chosen masked out. No gather, (HW)^2 logits.
- `full`: attention among all tokens, which is the same thing when every region is chosen.
- `fused`: the chosen keys and values handed to the fused attention kernel. First derivatives only.

All but the last are built from plain JAX operations, so that derivatives of any order and mode exist.
Shapes: q (B, M, R, T, D), k (B, M, R, U, D), v (B, M, R, U, E), index and weight (B, R, K); result (B, M, R, T, E).
B batch, M heads, R regions, T and U tokens of a query and a key region, D and E widths of a head.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

Backend = Literal["auto", "gathered", "online", "dense", "full", "fused"]
BACKENDS = ("auto", "gathered", "online", "dense", "full", "fused")


def choose_backend(regions: int, chosen: int, tokens: int, *, soft: bool = False) -> Backend:
    """The back-end for a shape: R regions of U key tokens, of which K are chosen per query region.

    Everything chosen is full attention; a tiny map of which a quarter or more is chosen is done densely; many chosen
    regions or tokens are scanned; the rest is gathered. `benchmarks/biformer.py` prints the times behind the
    thresholds.
    """
    if chosen == regions and not soft:
        return "full"
    if 4 * chosen >= regions and regions * tokens <= 256:
        return "dense"
    if chosen >= 8 or chosen * tokens >= 1024:
        return "online"
    return "gathered"


def routed_attention(
    q: Array, k: Array, v: Array, index: Array, weight: Array | None, *, scale: float, backend: Backend = "auto"
) -> Array:
    """Attend from every region to the tokens of its chosen regions (shapes and equation in the module's text).

    Args:
        q: queries, (B, M, R, T, D).
        k: keys, (B, M, R, U, D).
        v: values, (B, M, R, U, E).
        index: the chosen regions, integers (B, R, K).
        weight: soft routing weights (B, R, K), or None.
        scale: factor of the logits.
        backend: how to compute it; "auto" chooses by shape.
    """
    regions, chosen = k.shape[2], index.shape[-1]
    if backend == "auto":
        backend = choose_backend(regions, chosen, k.shape[3], soft=weight is not None)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is none of {', '.join(BACKENDS)}.")
    if backend == "full" and (chosen != regions or weight is not None):
        raise ValueError(
            f'backend="full" is for {regions} of {regions} regions and no soft routing; here {chosen} are chosen'
            f"{' with soft weights' if weight is not None else ''}. Use dense."
        )
    q = q * jnp.asarray(scale, q.dtype)
    if backend == "full":
        return _full(q, k, v)
    if backend == "dense":
        return _dense(q, k, v, index, weight)
    if backend == "online" and chosen > 1:
        return _online(q, k, v, index, weight)
    if backend == "fused":
        return _fused(q, k, v, index, weight)
    return _gathered(q, k, v, index, weight)


def full_attention(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """Plain attention, (B, M, T, D), (B, M, U, D), (B, M, U, E) -> (B, M, T, E)."""
    return _softmax_times(jnp.einsum("bmtd,bmud->bmtu", q * jnp.asarray(scale, q.dtype), k), v)


def _softmax_times(logits: Array, v: Array) -> Array:
    """softmax(logits) @ v, normalised after the product, where there are fewer numbers to divide."""
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    p = jnp.exp(logits - top)
    return jnp.einsum("...tu,...ue->...te", p, v) / p.sum(-1, keepdims=True)


def _take_regions(values: Array, index: Array) -> Array:
    """values (B, M, R, ...), index (B, ...) -> (B, M, *index, ...)."""
    return jax.vmap(lambda one, chosen: one.at[:, chosen].get(mode="promise_in_bounds"))(values, index)


def _gathered(q: Array, k: Array, v: Array, index: Array, weight: Array | None) -> Array:
    batch, heads, regions, tokens, _ = q.shape
    chosen = index.shape[-1]
    chosen_k = _take_regions(k.swapaxes(-1, -2), index)  # (B, M, R, K, D, U)
    chosen_v = _take_regions(v, index)  # (B, M, R, K, U, E)
    logits = jnp.einsum("bmrtd,bmrkdu->bmrtku", q, chosen_k)
    if weight is not None:
        logits = logits * weight[:, None, :, None, :, None]
    flat = logits.reshape(batch, heads, regions, tokens, -1)
    top = lax.stop_gradient(flat.max(-1, keepdims=True))
    p = jnp.exp(flat - top)
    total = p.sum(-1, keepdims=True)
    if weight is not None:
        p = (p.reshape(logits.shape) * weight[:, None, :, None, :, None]).reshape(p.shape)
    values = chosen_v.reshape(batch, heads, regions, chosen * v.shape[3], v.shape[4])
    return jnp.einsum("bmrtu,bmrue->bmrte", p, values) / total


def _online(q: Array, k: Array, v: Array, index: Array, weight: Array | None) -> Array:
    """Softmax over one chosen region after the other, keeping a running maximum, sum and weighted value."""
    k = k.swapaxes(-1, -2)

    def logits_and_values(choice: tuple[Array, Array | None]) -> tuple[Array, Array]:
        region, w = choice
        logits = jnp.einsum("bmrtd,bmrdu->bmrtu", q, _take_regions(k, region))
        values = _take_regions(v, region)
        if w is not None:
            w = w[:, None, :, None, None]
            logits, values = logits * w, values * w
        return logits, values

    def add(carry: tuple[Array, Array, Array], choice: tuple[Array, Array | None]) -> tuple[tuple, None]:
        top, total, out = carry
        logits, values = logits_and_values(choice)
        # The maximum only shifts the exponents and cancels in the quotient: a constant to every derivative.
        new_top = lax.stop_gradient(jnp.maximum(top, logits.max(-1, keepdims=True)))
        p, shrink = jnp.exp(logits - new_top), jnp.exp(top - new_top)
        total = shrink * total + p.sum(-1, keepdims=True)
        out = shrink * out + jnp.einsum("bmrtu,bmrue->bmrte", p, values)
        return (new_top, total, out), None

    choices = jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), (index, weight))
    first, rest = jax.tree.map(lambda a: a[0], choices), jax.tree.map(lambda a: a[1:], choices)
    logits, values = logits_and_values(first)
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    p = jnp.exp(logits - top)
    start = (top, p.sum(-1, keepdims=True), jnp.einsum("bmrtu,bmrue->bmrte", p, values))
    (_, total, out), _ = lax.scan(add, start, rest)
    return out / total


def _dense(q: Array, k: Array, v: Array, index: Array, weight: Array | None) -> Array:
    batch, heads, regions, tokens, _ = q.shape
    others, keys = k.shape[2], k.shape[3]
    one_hot = index[..., None] == jnp.arange(others)  # (B, R, K, R')
    logits = jnp.einsum("bmrtd,bmsud->bmrtsu", q, k)
    if weight is not None:
        spread = (one_hot * weight[..., None]).sum(2)[:, None, :, None, :, None]
        logits = logits * spread
    seen = one_hot.any(2)[:, None, :, None, :, None]
    logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
    flat = logits.reshape(batch, heads, regions * tokens, others * keys)
    p = jnp.exp(flat - lax.stop_gradient(flat.max(-1, keepdims=True)))
    total = p.sum(-1, keepdims=True)
    if weight is not None:
        p = (p.reshape(logits.shape) * spread).reshape(p.shape)
    out = jnp.einsum("bmtu,bmue->bmte", p, v.reshape(batch, heads, others * keys, -1)) / total
    return out.reshape(batch, heads, regions, tokens, -1)


def _full(q: Array, k: Array, v: Array) -> Array:
    def flat(a: Array) -> Array:
        return a.reshape(*a.shape[:2], -1, a.shape[-1])

    out = _softmax_times(jnp.einsum("bmtd,bmud->bmtu", flat(q), flat(k)), flat(v))
    return out.reshape(*q.shape[:-1], v.shape[-1])


def _fused(q: Array, k: Array, v: Array, index: Array, weight: Array | None) -> Array:
    """Regions become a batch of short sequences (B R, tokens, M, width) for the fused kernel."""
    if weight is not None:
        raise ValueError(
            'backend="fused" has no soft routing: its kernel cannot weight keys by query region. Use "online".'
        )
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and q.dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(
            f'backend="fused" runs a kernel for float16 and bfloat16, and was given {q.dtype}. '
            'Cast the model and its input, or use "online".'
        )
    batch, heads, regions, tokens, _ = q.shape

    def sequences(a: Array) -> Array:
        return jnp.moveaxis(a, 1, -2).reshape(batch * regions, -1, heads, a.shape[-1])

    implementation = "cudnn" if on_gpu else "xla"
    out = _first_order_attention(
        sequences(q), sequences(_take_regions(k, index)), sequences(_take_regions(v, index)), implementation
    )
    return jnp.moveaxis(out.reshape(batch, regions, tokens, heads, -1), -2, 1)


def _once_only(function):  # type: ignore[no-untyped-def]
    """`function`, refusing to be differentiated with a sentence that says what to do."""
    guarded = jax.custom_jvp(function)

    def refuse(*_):  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            'backend="fused" has first derivatives only, in reverse mode: its kernel has no second derivative. For a '
            'Hessian-vector product or a hypergradient through the model use backend="auto", "gathered" or "online".'
        )

    guarded.defjvp(refuse)
    return guarded


def _kernel(q: Array, k: Array, v: Array, implementation: str) -> Array:
    attention: Any = jax.nn.dot_product_attention  # its stubs know no plain string
    return attention(q, k, v, scale=1.0, implementation=implementation)


def _first_order_attention(q: Array, k: Array, v: Array, implementation: str) -> Array:
    @_once_only
    def forward(q: Array, k: Array, v: Array) -> Array:
        return _kernel(q, k, v, implementation)

    @_once_only
    def backward(q: Array, k: Array, v: Array, g: Array) -> tuple[Array, Array, Array]:
        return jax.vjp(lambda q, k, v: _kernel(q, k, v, implementation), q, k, v)[1](g)

    attention = jax.custom_vjp(lambda q, k, v: forward(q, k, v))
    attention.defvjp(lambda q, k, v: (forward(q, k, v), (q, k, v)), lambda saved, g: backward(*saved, g))
    return attention(q, k, v)
