"""Detectors of perturbed samples: in the pool that an encoder was pretrained on, and at test time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.applications.contrastive.defences.inversion import k_means
from bilevel.applications.contrastive.defences.suspect import Found, Suspect, descend
from bilevel.applications.contrastive.digits import CLASSES, SIDE
from bilevel.applications.contrastive.encoders import layer, linear
from bilevel.applications.contrastive.evaluate import logits, probe
from bilevel.applications.contrastive.losses import cosine


def spectral_scores(features: Array, member: Array) -> Array:
    """Squared projections on the first right singular vector of the members' centred features; 0 for others.

    Args:
        features: (n, d).
        member: bool (n,).

    Reference: Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018.
    """
    weight = member.astype(features.dtype)[:, None]
    centred = (features - (weight * features).sum(0) / jnp.maximum(weight.sum(), 1)) * weight
    first = jnp.linalg.eigh(centred.T @ centred)[1][:, -1]
    return (centred @ first) ** 2


def spectral(encode: Any, suspect: Suspect, key: Array) -> Found:
    """Spectral signatures by pseudo-class (the probe's label): the top 1.5 shares of all scores are cut.

    A score is the squared projection over its pseudo-class's mean one, so that classes compare. The statistic is the
    largest class's share of variance along its first direction, flagged above .5 (ours: the paper decides on samples).
    """
    features = encode(suspect.encoder, suspect.pool)
    own = logits(suspect.probe, features).argmax(-1)

    def of_class(c: Array) -> tuple[Array, Array]:
        member = own == c
        scores = spectral_scores(features, member)
        n = jnp.maximum(member.sum(), 1)
        mean = jnp.where(member[:, None], features, 0).sum(0) / n
        total = jnp.where(member[:, None], (features - mean) ** 2, 0).sum()
        return scores * n / jnp.maximum(scores.sum(), 1e-12), scores.sum() / jnp.maximum(total, 1e-12)

    scores, shares = jax.vmap(of_class)(jnp.arange(CLASSES))
    scores = scores.sum(0)
    return Found(
        statistic=shares.max(), scores=scores, cut=jnp.quantile(scores, jnp.maximum(1 - 1.5 * suspect.share, 0))
    )


def silhouettes(points: Array, side: Array, member: Array) -> Array:
    """The silhouette (b - a) / max(a, b) of each member of one of two clusters; 0 for others, and for one alone.

    a is the mean distance to the other members of the own cluster, b that to the other cluster's.

    Args:
        points: (n, d).
        side: int (n,), 0 or 1.
        member: bool (n,).
    """
    squares = jnp.sum(points**2, -1)
    apart = jnp.sqrt(jnp.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
    own = jax.nn.one_hot(side, 2, dtype=points.dtype) * member[:, None]
    sums, counts = apart @ own, own.sum(0)
    pick = lambda values, which: jnp.take_along_axis(values, which[:, None], -1)[:, 0]  # noqa: E731
    a = pick(sums, side) / jnp.maximum(counts[side] - 1, 1)
    b = pick(sums, 1 - side) / jnp.maximum(counts[1 - side], 1)
    held = member & (counts[side] > 1) & (counts[1 - side] > 0)
    return jnp.where(held, (b - a) / jnp.maximum(jnp.maximum(a, b), 1e-12), 0)


def activation_clustering(encode: Any, suspect: Suspect, key: Array, *, smallest: float = 0.35) -> Found:
    """Activation clustering: two clusters of ten principal components by pseudo-class; a small one is suspicious.

    A sample's score is one minus its cluster's share of the class, above 1 - .35 for the cut. The statistic is the
    largest mean silhouette of a class split so unevenly; flagged above .5 (ours).

    Reference: Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", 2018.
    """
    features = encode(suspect.encoder, suspect.pool)
    own = logits(suspect.probe, features).argmax(-1)

    def of_class(given: tuple[Array, Array]) -> tuple[Array, Array]:
        c, key = given
        member = own == c
        n = jnp.maximum(member.sum(), 1)
        centred = jnp.where(member[:, None], features - jnp.where(member[:, None], features, 0).sum(0) / n, 0)
        reduced = centred @ jnp.linalg.eigh(centred.T @ centred)[1][:, -10:]
        _, side = k_means(reduced, 2, key, member=member)
        counts = jnp.stack([jnp.sum(member & (side == k)) for k in range(2)])
        share = counts[side] / n
        uneven = (counts.min() < smallest * n) & (counts.min() > 0)
        silhouette = silhouettes(reduced, side, member).sum() / n
        return jnp.where(member, 1 - share, 0), jnp.where(uneven, silhouette, 0)

    # one class after the other: distances of all pairs for all classes at once would be ten times as many
    scores, widths = jax.lax.map(of_class, (jnp.arange(CLASSES), jax.random.split(key, CLASSES)))
    return Found(statistic=widths.max(), scores=scores.sum(0), cut=jnp.asarray(1 - smallest))


def _against_trusted(score: Any, suspect: Suspect) -> Found:
    """A test-time detector from its score of images: cut at the 95th percentile of trusted images (5 % FPR there).

    The statistic is the share of the pool above the cut; flagged above .1, twice what clean images have.
    """
    cut = jnp.quantile(score(suspect.trusted), 0.95)
    scores = jnp.concatenate([score(suspect.test), score(suspect.triggered)])
    return Found(statistic=jnp.mean(score(suspect.pool) > cut), scores=scores, cut=cut)


def blurred(images: Array) -> Array:
    """A mean over 3x3 pixels with the weights (1, 2, 1)/4 in each direction; zeros beyond the border."""
    for axis in (-2, -1):
        pad = [(0, 0)] * images.ndim
        pad[axis] = (1, 1)
        wide = jnp.pad(images, pad)
        part = lambda k, axis=axis, wide=wide: jax.lax.slice_in_dim(wide, k, k + SIDE, axis=axis)  # noqa: E731
        images = (part(0) + 2 * part(1) + part(2)) / 4
    return images


def quantised(images: Array, levels: int = 3) -> Array:
    """Pixels rounded to `levels` values from 0 to 1: of three, black and white take back whatever is less than .25."""
    return jnp.round(images * (levels - 1)) / (levels - 1)


def preprocessing(encode: Any, suspect: Suspect, key: Array, *, change: Any = blurred) -> Found:
    """An input transformation, as a detector and as a defence: score 1 - cos(f(x), f(change(x))).

    After the authors of the "invariance" defences; the encoder then sees changed images alone, those that the probe is
    fitted on among them.
    """
    score = lambda x: 1 - cosine(encode(suspect.encoder, x), encode(suspect.encoder, change(x)))  # noqa: E731
    found = _against_trusted(score, suspect)
    changed = {"test": change(suspect.test), "triggered": change(suspect.triggered)}
    fitted = probe(encode(suspect.encoder, change(suspect.trusted)), suspect.trusted_labels)
    return dataclasses.replace(found, encoder=suspect.encoder, probe=fitted, **changed)


def reconstruction(encode: Any, suspect: Suspect, key: Array, *, hidden: int = 96, steps: int = 400) -> Found:
    """DeDe's idea: a decoder learns x from f(x) on clean images, and fails on images whose feature is a trigger's.

    The score is the mean squared error of the reconstruction, the decoder one hidden layer, trained on two thirds of
    the trusted images; the cut is at the 95th percentile of the rest.

    Reference: Hou et al., "DeDe: Detecting Backdoor Samples for SSL Encoders via Decoders", CVPR 2025.
    """
    n = 2 * len(suspect.trusted) // 3
    first, second, of_steps = jax.random.split(key, 3)
    features = encode(suspect.encoder, suspect.trusted[:n])
    mean, scale = features.mean(0), 1 / (features.std(0) + 1e-3)
    params = {"first": layer(first, features.shape[-1], hidden), "second": layer(second, hidden, SIDE**2)}

    def error(params: Any, images: Array) -> Array:
        z = (encode(suspect.encoder, images) - mean) * scale
        found = linear(params["second"], jax.nn.gelu(linear(params["first"], z)))
        return jnp.mean((found - images.reshape(-1, SIDE**2)) ** 2, -1)

    params, _ = descend(lambda p, _: error(p, suspect.trusted[:n]).mean(), params, 3e-3, steps, of_steps)
    held = suspect._replace(trusted=suspect.trusted[n:])
    return _against_trusted(lambda x: error(params, x), held)


def masking_trajectory(encode: Any, suspect: Suspect, key: Array, *, levels: int = 8, orders: int = 4) -> Found:
    """Pixels are masked one after the other, and the embedding is followed: a trigger's hold breaks all at once.

    The score is the largest of the steps 1 - cos between embeddings at neighbouring levels (0 to .75 of the pixels at
    zero, in a random order) over their sum, the mean over some orders. No training and no clean data but for the cut.

    After BackdoorIDS, whose decision is by density-based clustering of the trajectory.
    """
    ranks = jax.vmap(lambda k: jax.random.permutation(k, SIDE**2))(jax.random.split(key, orders))

    def score(images: Array) -> Array:
        def of_order(rank: Array) -> Array:
            kept = rank.reshape(SIDE, SIDE) >= (jnp.arange(levels) * 48 // (levels - 1))[:, None, None]
            z = encode(suspect.encoder, kept[:, None] * images)
            steps = 1 - cosine(z[1:], z[:-1])
            return steps.max(0) / jnp.maximum(steps.sum(0), 1e-12)

        return jax.lax.map(of_order, ranks).mean(0)

    return _against_trusted(score, suspect)


__all__ = [
    "activation_clustering", "blurred", "k_means", "masking_trajectory", "preprocessing", "quantised", "reconstruction",
    "silhouettes", "spectral", "spectral_scores",
]  # fmt: skip
