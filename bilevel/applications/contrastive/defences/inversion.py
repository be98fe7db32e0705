"""Detectors of encoders by inversion: which trigger would explain the encoder, and is it suspiciously small?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel.applications.contrastive.defences.suspect import Found, Suspect, small_outlier
from bilevel.applications.contrastive.digits import CLASSES, SIDE
from bilevel.applications.contrastive.evaluate import cross_entropy, logits
from bilevel.applications.contrastive.losses import cosine, normalised


def patched(raw: dict[str, Array], images: Array) -> Array:
    """(1 - m) x + m p, with the mask m and the pattern p in 0..1 as (tanh + 1) / 2 of free numbers."""
    mask, pattern = (0.5 * (jnp.tanh(raw[name]) + 1) for name in ("mask", "pattern"))
    return (1 - mask) * images + mask * pattern


def _start(key: Array, mask: float = -1.0) -> dict[str, Array]:
    noise = jax.random.normal(key, (2, SIDE, SIDE))
    return {"mask": mask + 0.1 * noise[0], "pattern": 0.5 * noise[1]}


def _mask(raw: dict[str, Array]) -> Array:
    return 0.5 * (jnp.tanh(raw["mask"]) + 1)


def smallest(
    terms: Callable[[Any], tuple[Array, Array, Array]],
    raw: Any,
    *,
    steps: int,
    wanted: float,
    up: float,
    down: float,
    first: float = 1e-3,
    patience: int = 5,
    rate: Any = 0.1,
) -> Array:
    """The least size with which a trigger does what it shall; 1, the largest there is, where none did.

        min over raw  loss(raw) + lambda size(raw)      by Adam(.5, .9)

    lambda is multiplied by `up` once the trigger has worked for `patience` steps in a row, and divided by `down` once
    it has failed for as many: the authors of all three inversions follow the smallest trigger so.

    Args:
        terms: `raw -> (loss, how well it works, size)`.
        raw: the start.
        wanted: it works where it works at least so well.
        first: lambda at the start.
        rate: Adam's, or a schedule.
    """
    rule = optax.adam(rate, b1=0.5, b2=0.9)

    def loss(raw: Any, strength: Array) -> tuple[Array, tuple[Array, Array]]:
        value, works, size = terms(raw)
        return value + strength * size, (works, size)

    def step(carry: Any, _: Any) -> Any:
        raw, memory, strength, streak, best = carry
        gradient, (works, size) = jax.grad(loss, has_aux=True)(raw, strength)
        reached = works >= wanted
        best = jnp.where(reached, jnp.minimum(best, size), best)
        streak = jnp.where(reached, jnp.maximum(streak, 0) + 1, jnp.minimum(streak, 0) - 1)
        turn = jnp.abs(streak) >= patience
        strength = jnp.where(turn, strength * jnp.where(reached, up, 1 / down), strength)
        updates, memory = rule.update(gradient, memory)
        carry = optax.apply_updates(raw, updates), memory, strength, jnp.where(turn, 0, streak), best
        return carry, None

    number = lambda value: jnp.asarray(value, float)  # noqa: E731
    start = (raw, rule.init(raw), number(first), jnp.asarray(0), number(1))
    (*_, best), _ = jax.lax.scan(step, start, length=steps)
    return best


def decree(encode: Any, suspect: Suspect, key: Array, *, steps: int = 300, wanted: float = 0.99) -> Found:
    """DECREE: the smallest patch under which all images have one embedding.

        min over m, p  - mean over pairs cos f((1 - m) x + m p) + lambda |m|_1 / 64

    with the rates .5, .1 and .05 in turn, and lambda times or by 5. The statistic is P-L1, the least |m|_1 / 64 with
    which the mean cosine was above `wanted`. Flagged below .1.

    Reference: Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023.
    """
    images = suspect.trusted[:64]
    n = len(images)

    def terms(raw: dict[str, Array]) -> tuple[Array, Array, Array]:
        z = normalised(encode(suspect.encoder, patched(raw, images)))
        alike = (jnp.sum(z.sum(0) ** 2) - n) / (n * (n - 1))
        return -alike, alike, _mask(raw).mean()

    rate = lambda k: jnp.where(k < steps // 5, 0.5, jnp.where(k < steps // 2, 0.1, 0.05))  # noqa: E731
    return Found(statistic=smallest(terms, _start(key), steps=steps, wanted=wanted, up=5.0, down=5.0, rate=rate))


def neural_cleanse(
    encode: Any, suspect: Suspect, key: Array, *, additive: bool = False, steps: int = 300, wanted: float = 0.99
) -> Found:
    """Neural Cleanse on the probe: by class, the smallest trigger that turns trusted images into it.

        min over m, p  CE(probe f(t(x)), c) + lambda |m|_1 / 64,     t(x) = (1 - m) x + m p
        additive:                  ... + lambda |d|_1 / 64,          t(x) = clip(x + d, 0, 1)

    lambda times 2, or by 2^1.5, as in the authors' code. A trigger works where a share `wanted` of the images gets the
    label c. The statistic is the anomaly index of the least norm among the ten, (median - least) / (1.4826 MAD);
    flagged above 2. The additive variant is not the authors': it has the threat model of the attack.

    Reference: Wang et al., "Neural Cleanse", IEEE S&P 2019.
    """
    images = suspect.trusted[:48]

    def of_class(c: Array, key: Array) -> Array:
        def terms(raw: Any) -> tuple[Array, Array, Array]:
            if additive:
                changed, size = jnp.clip(images + jnp.tanh(raw), 0, 1), jnp.abs(jnp.tanh(raw)).mean()
            else:
                changed, size = patched(raw, images), _mask(raw).mean()
            scores = logits(suspect.probe, encode(suspect.encoder, changed))
            return cross_entropy(scores, jnp.full(len(images), c)), jnp.mean(scores.argmax(-1) == c), size

        start = 0.05 * jax.random.normal(key, (SIDE, SIDE)) if additive else _start(key)
        return smallest(terms, start, steps=steps, wanted=wanted, up=2.0, down=2**1.5)

    sizes = jax.vmap(of_class)(jnp.arange(CLASSES), jax.random.split(key, CLASSES))
    return Found(statistic=small_outlier(sizes))


def k_means(
    points: Array, k: int, key: Array, *, member: Array | None = None, restarts: int = 5, steps: int = 10
) -> tuple[Array, Array]:
    """Lloyd's algorithm from `restarts` random starts: the best centres (k, d) and each point's cluster (n,).

    Args:
        points: (n, d).
        member: bool (n,), the points that count (None: all); the others are given their nearest cluster alone.
    """
    weight = jnp.ones(len(points), points.dtype) if member is None else member.astype(points.dtype)

    def distances(centres: Array) -> Array:
        return jnp.sum(centres**2, -1) - 2 * points @ centres.T

    def run(key: Array) -> tuple[Array, Array]:
        def step(centres: Array, _: Any) -> tuple[Array, None]:
            own = jax.nn.one_hot(distances(centres).argmin(-1), k, dtype=points.dtype) * weight[:, None]
            counts = own.sum(0)[:, None]
            return jnp.where(counts > 0, own.T @ points / jnp.maximum(counts, 1), centres), None

        # different points: the largest of random numbers, among the members
        start = points[jax.lax.top_k(jax.random.uniform(key, weight.shape) + weight, k)[1]]
        centres, _ = jax.lax.scan(step, start, length=steps)
        return centres, jnp.sum(weight * distances(centres).min(-1))

    centres, costs = jax.vmap(run)(jax.random.split(key, restarts))
    best = centres[costs.argmin()]
    return best, distances(best).argmin(-1)


def ssl_cleanse(encode: Any, suspect: Suspect, key: Array, *, steps: int = 300, wanted: float = 0.99) -> Found:
    """SSL-Cleanse's detector: by cluster of embeddings, the smallest patch that leads there. No labels.

        min over m, d  - mean cos( f((1 - m) x + m d), centre ) + lambda |m|_1 / 64

    lambda times or by 1.5. A trigger works where a share `wanted` of the images is nearest to the centre. The size is
    the mask's, as in the authors' code: that of m d would be nothing for a black patch, however large. The statistic is
    the anomaly index of the least size, (median - least) / (1.4826 MAD / .6745), flagged above 2; that index makes the
    MAD a deviation twice over, which is the authors' code's as well, and their threshold belongs to it.

    Reference: Zheng et al., "SSL-Cleanse", ECCV 2024 (k-means has 30 starts there, and here 5).
    """
    of_means, *of_clusters = jax.random.split(key, 1 + CLASSES)
    sample = jnp.concatenate([suspect.trusted, suspect.pool[:450]])
    centres, _ = k_means(normalised(encode(suspect.encoder, sample)), CLASSES, of_means)
    images = suspect.trusted[:48]

    def of_cluster(c: Array, key: Array) -> Array:
        def terms(raw: dict[str, Array]) -> tuple[Array, Array, Array]:
            alike = cosine(encode(suspect.encoder, patched(raw, images))[:, None], centres)  # (images, clusters)
            return -alike[:, c].mean(), jnp.mean(alike.argmax(-1) == c), _mask(raw).mean()

        return smallest(terms, _start(key), steps=steps, wanted=wanted, up=1.5, down=1.5)

    sizes = jax.vmap(of_cluster)(jnp.arange(CLASSES), jnp.stack(of_clusters))
    return Found(statistic=small_outlier(sizes, 1.4826 / 0.6745))
