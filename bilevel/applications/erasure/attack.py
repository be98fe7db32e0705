"""Attacks on an erased model: embeddings near a prompt's that bring the concept back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

PyTree = Any


def attacked(gain: Callable[[PyTree], Array], prompt: PyTree, *, radius: float, steps: int = 10) -> PyTree:
    """The prompt's embedding, moved so that `gain` grows: projected ascent in the 2-ball around each word's vector.

        d <- Proj(d + 2.5 radius / steps  g / |g|),     g = gradient of the gain at prompt + d, by word

    Args:
        gain: a scalar of the embedding (batch, words, size), for an attack minus the flow-matching loss of images that
            have the concept.
        prompt: the embedding to begin at.
        radius: how far each word's vector may go.
        steps: of ascent.
    """
    if not radius >= 0:
        raise ValueError(f"attacked(radius={radius}): a distance is at least 0.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"attacked(steps={steps!r}): a positive integer is needed.")
    length = lambda d: jnp.sqrt(jnp.square(d).sum(-1, keepdims=True) + 1e-30)  # noqa: E731

    def step(moved: PyTree, _: Any) -> tuple[PyTree, None]:
        gradient = jax.grad(lambda m: gain(jax.tree.map(jnp.add, prompt, m)))(moved)

        def climb(d: Array, g: Array) -> Array:
            d = d + 2.5 * radius / steps * g / length(g)
            return d * jnp.minimum(1.0, radius / length(d))

        return jax.tree.map(climb, moved, gradient), None

    moved = lax.scan(step, jax.tree.map(jnp.zeros_like, prompt), length=steps)[0]
    return jax.tree.map(jnp.add, prompt, moved)


def attack(
    model: Any, params: PyTree, prompt: PyTree, images: Array, key: Array, *, radius: float, steps: int = 20
) -> PyTree:
    """One embedding for each prompt that brings images of the concept back.

    Args:
        model, params: the erased flow.
        prompt: embeddings (n, words, size).
        images: of the concept, (n, tokens, channels).
        key: draws noise and levels, one draw for the whole attack.
        radius, steps: see `attacked`.
    """
    from bilevel.applications.erasure.text_to_image import matching

    of_noise, of_level = jax.random.split(key)
    noise = jax.random.normal(of_noise, images.shape, images.dtype)
    t = (jax.random.permutation(of_level, len(images)) + 0.5) / len(images)
    return attacked(
        lambda prompt: -matching(model, params, images, noise, t.astype(images.dtype), prompt),
        prompt, radius=radius, steps=steps,
    )  # fmt: skip
