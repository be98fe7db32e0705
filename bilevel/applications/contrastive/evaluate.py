"""How an encoder is judged: a linear probe and nearest neighbours; intervals; how well scores tell apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel.applications.contrastive.digits import CLASSES
from bilevel.applications.contrastive.losses import normalised


def probe(features: Array, labels: Array, decay: float = 1e-3, steps: int = 200) -> dict[str, Array]:
    """A softmax regression on standardised features, by Adam: parameters for `logits`.

    Args:
        features: (n, d).
        labels: (n,), 0 to 9.
        decay: decay / 2 |w|^2 is added to the mean cross entropy.
        steps: of Adam with the rate .1, on all samples.
    """
    mean, scale = features.mean(0), 1 / (features.std(0) + 1e-3)
    x, rule = (features - mean) * scale, optax.adam(0.1)
    params = {"w": jnp.zeros((features.shape[1], CLASSES), features.dtype), "b": jnp.zeros(CLASSES, features.dtype)}

    def loss(params: dict[str, Array]) -> Array:
        return cross_entropy(x @ params["w"] + params["b"], labels) + 0.5 * decay * jnp.sum(params["w"] ** 2)

    def step(carry: Any, _: Any) -> Any:
        params, memory = carry
        updates, memory = rule.update(jax.grad(loss)(params), memory)
        return (optax.apply_updates(params, updates), memory), None

    (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), length=steps)
    w = params["w"] * scale[:, None]
    return {"w": w, "b": params["b"] - mean @ w}


def logits(params: dict[str, Array], features: Array) -> Array:
    """What a probe says of features (..., d): (..., 10)."""
    return features @ params["w"] + params["b"]


def cross_entropy(scores: Array, labels: Array) -> Array:
    """The mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def knn(features: Array, labels: Array, queries: Array, k: int = 10) -> Array:
    """Labels of queries (m, d) by the votes of the k nearest of features (n, d) in cosine similarity: (m,)."""
    if not 1 <= k <= features.shape[0]:
        raise ValueError(f"knn(k={k}): between 1 and {features.shape[0]} neighbours can vote.")
    near = jax.lax.top_k(normalised(queries) @ normalised(features).T, k)
    votes = jax.nn.one_hot(jnp.asarray(labels)[near[1]], CLASSES) * jnp.exp(near[0] / 0.1)[..., None]
    return votes.sum(1).argmax(-1)


def wilson(successes: Any, trials: Any, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share: the p with |p - successes/trials| <= z sqrt(p (1 - p) / trials)."""
    if not 0 <= successes <= trials or not trials > 0:
        raise ValueError(f"wilson({successes}, {trials}): successes of at least one trial, and at most as many.")
    n, share = float(trials), float(successes) / float(trials)
    centre, spread = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(float(low), 0.0), min(float(high), 1.0)


def auroc(scores: Array, positive: Array) -> Array:
    """The chance that a positive's score is above a negative's, ties counting half; NaN without either, and where a
    score is none."""
    positive = jnp.asarray(positive, bool)
    above = (scores[:, None] > scores) + 0.5 * (scores[:, None] == scores)
    pairs = positive[:, None] & ~positive
    found = jnp.sum(jnp.where(pairs, above, 0)) / pairs.sum()
    return jnp.where(jnp.isnan(scores).any(), jnp.nan, found)


def tpr_at(scores: Array, positive: Array, rate: float = 0.05) -> Array:
    """The share of positives above the threshold that at most a share `rate`, in [0, 1), of negatives is above; NaN
    without either, and where a score is none."""
    if not 0 <= rate < 1:
        raise ValueError(f"tpr_at(rate={rate}): the share of negatives above the threshold lies in [0, 1).")
    positive = jnp.asarray(positive, bool)
    negatives = jnp.sort(jnp.where(positive, -jnp.inf, scores))[::-1]
    allowed = jnp.floor(rate * (~positive).sum()).astype(int)
    found = jnp.sum(positive & (scores > negatives[allowed])) / positive.sum()
    return jnp.where(jnp.isnan(scores).any() | positive.all(), jnp.nan, found)
