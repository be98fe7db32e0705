"""Repairs that prune channels: by their Lipschitz bound, by their silence on clean images, by their sensitivity."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.applications.contrastive.defences.suspect import Found, Suspect, descend
from bilevel.applications.contrastive.evaluate import cross_entropy, logits


def scaled(params: Any, factors: list[Array], biases: list[Array] | None = None) -> Any:
    """Parameters whose hidden channels' weights are multiplied by factors, and their biases by others (or the same)."""
    biases = factors if biases is None else biases
    new = dict(params)
    for k, (of_w, of_b) in enumerate(zip(factors, biases, strict=True)):
        old = params[f"layer{k}"]
        new[f"layer{k}"] = {"w": old["w"] * of_w, "b": old["b"] * of_b}
    return new


def lipschitz_bounds(encode: Any, params: Any) -> list[Array]:
    """The largest singular value of each hidden channel's weights, by layer (channels,)."""
    return [jnp.sqrt(jnp.linalg.eigvalsh(_gram(w))[..., -1]) for w in encode.kernels(params)]


def _gram(w: Array) -> Array:
    return w @ w.swapaxes(-1, -2) if w.shape[-2] < w.shape[-1] else w.swapaxes(-1, -2) @ w


def clp(encode: Any, suspect: Suspect, key: Array, *, u: float = 3.0) -> Found:
    """Channel Lipschitzness pruning, without data: channel k goes where sigma(W_k) > mean + u deviation of its layer.

    The statistic is the largest (sigma - mean) / deviation, and the threshold is u.

    Reference: Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022.
    """
    z = [(s - s.mean()) / (s.std() + 1e-12) for s in lipschitz_bounds(encode, suspect.encoder)]
    kept = [(part <= u).astype(part.dtype) for part in z]
    return Found(statistic=jnp.concatenate(z).max(), encoder=scaled(suspect.encoder, kept))


def fine_tuned(encode: Any, suspect: Suspect, encoder: Any, key: Array, steps: int, rate: float = 1e-3) -> Any:
    """Encoder and probe after `steps` of Adam on the trusted images' cross entropy."""

    def loss(params: Any, _: Array) -> Array:
        return cross_entropy(logits(params[1], encode(params[0], suspect.trusted)), suspect.trusted_labels)

    return descend(loss, (encoder, suspect.probe), rate, steps, key)[0]


def fine_pruning(encode: Any, suspect: Suspect, key: Array, *, share: float = 0.3, steps: int = 100) -> Found:
    """The channels that say least on trusted images are pruned, then encoder and probe are fine-tuned on these.

    `share` of each hidden layer's channels, and the pruned ones stay so. The authors prune one layer for as long as the
    accuracy lasts.

    Reference: Liu, Dolan-Gavitt, Garg, "Fine-Pruning", RAID 2018.
    """
    hidden, _ = encode.activations(suspect.encoder, suspect.trusted)
    kept = []
    for values in hidden:
        mean = jnp.abs(values).mean(0)
        kept.append((mean > jnp.quantile(mean, share)).astype(mean.dtype))
    encoder, probe = fine_tuned(encode, suspect, scaled(suspect.encoder, kept), key, steps)
    return Found(encoder=scaled(encoder, kept), probe=probe)


def anp(
    encode: Any, suspect: Suspect, key: Array, *, size: float = 0.4, alpha: float = 0.2, cut: float = 0.2,
    steps: int = 100,
) -> Found:  # fmt: skip
    """Adversarial neuron pruning: masks m of channels that stand perturbations of the channels; m < `cut` is pruned.

        min over m in [0, 1]  alpha CE(m w, b) + (1 - alpha) max over |d|, |e| <= size  CE((m + d) w, (1 + e) b)

    on the trusted images, the maximum by one step along the sign. `alpha` is the share of the clean loss.

    Reference: Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021.
    """
    widths = [w.shape[0] for w in encode.kernels(suspect.encoder)]

    def loss_of(factors: list[Array], biases: list[Array]) -> Array:
        features = encode(scaled(suspect.encoder, factors, biases), suspect.trusted)
        return cross_entropy(logits(suspect.probe, features), suspect.trusted_labels)

    def loss(masks: list[Array], key: Array) -> Array:
        masks = [jnp.clip(m, 0, 1) for m in masks]
        ones = [jnp.ones_like(m) for m in masks]
        start = [0.1 * size * jax.random.normal(jax.random.fold_in(key, k), (2, len(m))) for k, m in enumerate(masks)]
        moved = lambda d: ([m + e[0] for m, e in zip(masks, d, strict=True)], [1 + e[1] for e in d])  # noqa: E731
        worst = jax.grad(lambda d: loss_of(*moved(d)))(start)
        worst = jax.lax.stop_gradient([size * jnp.sign(g) for g in worst])
        return alpha * loss_of(masks, ones) + (1 - alpha) * loss_of(*moved(worst))

    masks, _ = descend(loss, [jnp.ones(n) for n in widths], 2e-2, steps, key)
    kept = [(m >= cut).astype(m.dtype) for m in masks]
    return Found(encoder=scaled(suspect.encoder, kept))
