"""Erasure without training: a projection's outputs for a word are set to those of another, in closed form (UCE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array


def closed_form(
    frozen: Mapping[str, Any],
    word: Array,
    replacement: Array,
    kept: Array,
    *,
    strength: float = 1.0,
    ridge: float = 0.1,
) -> dict[str, Any]:
    """The parameters with `context_embedder`, the map of the prompt's vectors, edited as UCE edits a projection:

        W = argmin |W c - W_0 c*|^2 strength + sum over kept k of |W k - W_0 k|^2 + ridge |W - W_0|^2
          = W_0 (strength c* c' + K' K + ridge I) (strength c c' + K' K + ridge I)^-1

    UCE edits the keys and values of cross-attention, which joint attention does not have: here every block's text
    passes through this one map first.

    Args:
        frozen: the base's parameters.
        word, replacement: vectors (size,), or several (n, size): c and c*.
        kept: vectors (m, size) whose images stay.
        strength, ridge: weights.

    Reference: Gandikota, Orgad, Belinkov, Materzynska, Bau, "Unified Concept Editing in Diffusion Models", WACV 2024.
    """
    if not ridge > 0:
        raise ValueError(f"closed_form(ridge={ridge}): a positive number is needed, or the system may be singular.")
    old = frozen["context_embedder.weight"]
    c, target = jnp.atleast_2d(word), jnp.atleast_2d(replacement)
    rest = kept.T @ kept + ridge * jnp.eye(kept.shape[1], dtype=kept.dtype)
    left, right = strength * target.T @ c + rest, strength * c.T @ c + rest
    return {**frozen, "context_embedder.weight": jnp.linalg.solve(right.T, (old @ left).T).T}
