"""Cross-entropy over a large vocabulary, of which a few positions' logits exist at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def chunked_entropy(hidden: Array, embedding: Array, targets: Array, chunk: int = 16) -> Array:
    """log sum_v exp(h . e_v) - h . e_target for every position, (batch, time).

    A scan over pieces of `chunk` positions of every sequence, each computed again in the backward pass: the logits take
    batch x chunk x vocabulary numbers, and not batch x time x vocabulary. The pieces are cut along time, so that
    sequences that lie on several devices stay where they are. Derivatives of every order exist.

    Args:
        hidden: h, (batch, time, width).
        embedding: e, (vocabulary, width); cast to h's dtype.
        targets: whole numbers (batch, time).
        chunk: positions at a time; the last piece is filled up and cut off again.

    Raises:
        ValueError: shapes that do not fit, or a chunk that is no positive integer.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunked_entropy(chunk={chunk!r}): a positive integer is needed.")
    if hidden.ndim != 3 or hidden.shape[:2] != targets.shape or embedding.shape[1:] != hidden.shape[2:]:
        raise ValueError(
            f"chunked_entropy takes hidden (batch, time, width), embedding (vocabulary, width), targets (batch, time); "
            f"{hidden.shape}, {embedding.shape} and {targets.shape} were given."
        )
    b, t, w = hidden.shape
    chunk = min(chunk, t)
    pieces = -(-t // chunk)
    fill = pieces * chunk - t
    h = jnp.pad(hidden, ((0, 0), (0, fill), (0, 0))).reshape(b, pieces, chunk, w)
    wanted = jnp.pad(targets, ((0, 0), (0, fill))).reshape(b, pieces, chunk)

    @jax.checkpoint
    def piece(embedding: Array, h: Array, wanted: Array) -> Array:
        kind = jnp.promote_types(h.dtype, jnp.float32)  # products in bfloat16 are added up in float32
        logits = jnp.matmul(h, embedding.T.astype(h.dtype), preferred_element_type=kind)
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, wanted[..., None], -1)[..., 0]

    def step(_: None, now: tuple[Array, Array]) -> tuple[None, Array]:
        return None, piece(embedding, *now)

    _, out = jax.lax.scan(step, None, (jnp.moveaxis(h, 1, 0), jnp.moveaxis(wanted, 1, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(b, pieces * chunk)[:, :t]
