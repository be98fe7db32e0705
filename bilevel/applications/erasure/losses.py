"""The four losses of EraseAnything, each a function of what it compares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

PyTree = Any


def erasing_target(model: Any, frozen: PyTree, x: Array, t: Array, prompt: Any, null: Any, strength: float) -> Array:
    """Where ESD sends the erased prompt: v0(null) - strength (v0(prompt) - v0(null)), v0 of the *frozen* parameters."""
    twice = lambda a: jnp.concatenate([a, a])  # noqa: E731
    prompts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), prompt, null)
    given, empty = jnp.split(model.velocity(frozen, twice(x), prompts, twice(t)), 2)
    return lax.stop_gradient(empty - strength * (given - empty))


def onto(attention: Array, columns: Array) -> Array:
    """The attention onto the marked words, (batch, heads, image tokens).

    Args:
        attention: (batch, heads, image tokens, words).
        columns: (batch, words), one where a word is meant.
    """
    return jnp.einsum("bhqw,bw->bhq", attention, columns)


def contrast(anchor: Array, synonym: Array, irrelevant: Array, temperature: float = 0.07) -> Array:
    """How much more the anchor's map is like the synonym's than like the irrelevant words':

        L = s_syn - logsumexp(s_syn, s_1, ..., s_K),     s = cosine with the anchor / temperature.

    Minimised, it repels the synonym (dL/ds_syn > 0) and attracts the irrelevant words (dL/ds_k < 0). The published
    formula, as printed, has the other sign.

    Args:
        anchor, synonym: maps (batch, ...).
        irrelevant: maps (K, batch, ...).
        temperature: tau.
    """
    unit = lambda a, n: _unit(a.reshape(*a.shape[:n], -1))  # noqa: E731
    others = jnp.concatenate([unit(synonym, 1)[None], unit(irrelevant, 2)])
    similar = jnp.einsum("bd,kbd->kb", unit(anchor, 1), others) / temperature
    return (similar[0] - jax.nn.logsumexp(similar, axis=0)).mean()


def _unit(a: Array) -> Array:
    return a * lax.rsqrt(jnp.square(a).sum(-1, keepdims=True) + 1e-12)
