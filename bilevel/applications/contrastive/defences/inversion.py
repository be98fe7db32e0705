"""Detectors of encoders by inversion: which trigger would explain the encoder, and is it suspiciously small?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bilevel.applications.contrastive.defences.suspect import Found, Suspect, descend, small_outlier
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


def decree(encode: Any, suspect: Suspect, key: Array, *, steps: int = 150, wanted: float = 0.99) -> Found:
    """DECREE: the smallest patch under which all images have one embedding.

        min over m, p  - mean over pairs cos f((1 - m) x + m p) + lambda |m|_1 / 64

    by Adam(.5, .9) with rates .1 and .05; lambda times 5 while the mean cosine is above `wanted` for five steps, and
    divided by 5 while it is below. The statistic is P-L1, the least |m|_1 / 64 with which the cosine was reached; 1
    where it never was. Flagged below .1.

    Reference: Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023 (on larger images).
    """
    images = suspect.trusted[:64]

    def terms(raw: dict[str, Array]) -> tuple[Array, Array]:
        z = normalised(encode(suspect.encoder, patched(raw, images)))
        n = len(z)
        return (jnp.sum(z.sum(0) ** 2) - n) / (n * (n - 1)), _mask(raw).mean()

    def loss(raw: dict[str, Array], strength: Array) -> tuple[Array, tuple[Array, Array]]:
        similar, size = terms(raw)
        return strength * size - similar, (similar, size)

    rule = optax.adam(lambda k: jnp.where(k < steps // 2, 0.1, 0.05), b1=0.5, b2=0.9)

    def step(carry: Any, _: Any) -> Any:
        raw, memory, strength, streak, best = carry
        gradient, (similar, size) = jax.grad(loss, has_aux=True)(raw, strength)
        reached = similar > wanted
        streak = jnp.where(reached, jnp.maximum(streak, 0) + 1, jnp.minimum(streak, 0) - 1)
        turn = jnp.abs(streak) >= 5
        strength = jnp.clip(jnp.where(turn, strength * jnp.where(streak > 0, 5.0, 0.2), strength), 1e-3, 1e3)
        best = jnp.where(reached, jnp.minimum(best, size), best)
        updates, memory = rule.update(gradient, memory)
        return (optax.apply_updates(raw, updates), memory, strength, jnp.where(turn, 0, streak), best), None

    raw = _start(key)
    start = (raw, rule.init(raw), jnp.asarray(1e-3), jnp.asarray(0), jnp.asarray(1.0))
    (*_, best), _ = jax.lax.scan(step, start, length=steps)
    return Found(statistic=best)


def neural_cleanse(
    encode: Any, suspect: Suspect, key: Array, *, additive: bool = False, steps: int = 100, strength: float = 2.0
) -> Found:
    """Neural Cleanse on the probe: by class, the smallest trigger that turns trusted images into it.

        min over m, p  CE(probe f(t(x)), c) + lambda |m|_1 / 64,     t(x) = (1 - m) x + m p
        additive:                  ... + lambda |d|_1 / 64,          t(x) = clip(x + d, 0, 1)

    The statistic is the anomaly index of the least norm among the ten, (median - least) / (1.4826 MAD); flagged
    above 2. The additive variant is not the authors': it has the threat model of the attack.

    Reference: Wang et al., "Neural Cleanse", IEEE S&P 2019 (whose lambda adapts; here it is constant).
    """
    images = suspect.trusted[:48]

    def of_class(c: Array, key: Array) -> Array:
        def terms(raw: Any) -> tuple[Array, Array]:
            if additive:
                return jnp.clip(images + jnp.tanh(raw), 0, 1), jnp.abs(jnp.tanh(raw)).mean()
            return patched(raw, images), _mask(raw).mean()

        def loss(raw: Any, _: Array) -> Array:
            changed, size = terms(raw)
            scores = logits(suspect.probe, encode(suspect.encoder, changed))
            return cross_entropy(scores, jnp.full(len(images), c)) + strength * size

        start = 0.05 * jax.random.normal(key, (SIDE, SIDE)) if additive else _start(key)
        raw, _ = descend(loss, start, 0.1, steps, key)
        return terms(raw)[1]

    sizes = jax.vmap(of_class)(jnp.arange(CLASSES), jax.random.split(key, CLASSES))
    return Found(statistic=small_outlier(sizes))


def k_means(points: Array, k: int, key: Array, *, restarts: int = 5, steps: int = 10) -> tuple[Array, Array]:
    """Lloyd's algorithm from `restarts` random starts: the best centres (k, d) and each point's cluster (n,)."""

    def distances(centres: Array) -> Array:
        return jnp.sum(centres**2, -1) - 2 * points @ centres.T

    def run(key: Array) -> tuple[Array, Array]:
        def step(centres: Array, _: Any) -> tuple[Array, None]:
            own = jax.nn.one_hot(distances(centres).argmin(-1), k)
            counts = own.sum(0)[:, None]
            return jnp.where(counts > 0, own.T @ points / jnp.maximum(counts, 1), centres), None

        start = jax.random.choice(key, points, (k,), replace=False)
        centres, _ = jax.lax.scan(step, start, length=steps)
        return centres, distances(centres).min(-1).sum()

    centres, costs = jax.vmap(run)(jax.random.split(key, restarts))
    best = centres[costs.argmin()]
    return best, distances(best).argmin(-1)


def ssl_cleanse(encode: Any, suspect: Suspect, key: Array, *, steps: int = 100, strength: float = 1.0) -> Found:
    """SSL-Cleanse's detector: by cluster of embeddings, the smallest trigger that leads there. No labels.

        min over m, d  - mean cos( f((1 - m) x + m d), centre ) + lambda mean(m d)

    The statistic is the anomaly index of the least mean(m d), |least - median| / (1.4826 MAD / .6745); flagged above 2.

    Reference: Zheng et al., "SSL-Cleanse", ECCV 2024 (k-means with 30 starts and an adaptive lambda there).
    """
    of_means, *of_clusters = jax.random.split(key, 1 + CLASSES)
    sample = jnp.concatenate([suspect.trusted, suspect.pool[:450]])
    centres, _ = k_means(normalised(encode(suspect.encoder, sample)), CLASSES, of_means)
    images = suspect.trusted[:48]

    def of_cluster(centre: Array, key: Array) -> Array:
        size = lambda raw: jnp.mean(_mask(raw) * 0.5 * (jnp.tanh(raw["pattern"]) + 1))  # noqa: E731

        def loss(raw: Any, _: Array) -> Array:
            return strength * size(raw) - cosine(encode(suspect.encoder, patched(raw, images)), centre).mean()

        return size(descend(loss, _start(key), 0.1, steps, key)[0])

    sizes = jax.vmap(of_cluster)(centres, jnp.stack(of_clusters))
    return Found(statistic=small_outlier(sizes, 1.4826 / 0.6745))
