"""What a defence is given, and what it answers."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class Suspect(NamedTuple):
    """An encoder under suspicion, and the data around it. Stacked along a leading axis it is many encoders.

    Attributes:
        encoder: the encoder's parameters.
        probe: of a linear probe on the trusted images.
        pool: the images it was pretrained on (n, 8, 8), as they were.
        flags: which of them are perturbed: for the evaluation of a defence, which must not look at them.
        trusted, trusted_labels: clean images with labels.
        test, test_labels, triggered: held-out images, and the same images perturbed.
        share: of the pool that may be perturbed, which the spectral signatures are told.
    """

    encoder: Any
    probe: Any
    pool: Array
    flags: Array
    trusted: Array
    trusted_labels: Array
    test: Array
    test_labels: Array
    triggered: Array
    share: Array | float


@dataclasses.dataclass(frozen=True)
class Found:
    """What a defence says of one encoder; of many, with a leading axis.

    Attributes:
        statistic: the number that it looks at.
        scores: of samples, larger where more suspicious: of the pool, or of clean and triggered test images.
        cut: the score above which a sample is called perturbed.
        encoder, probe: what a repair leaves; probe None: a new one is fitted.
        test, triggered: what a preprocessing makes of these images.
    """

    statistic: Any = None
    scores: Any = None
    cut: Any = None
    encoder: Any = None
    probe: Any = None
    test: Any = None
    triggered: Any = None


jax.tree_util.register_dataclass(Found)


def descend(
    loss: Any, params: Any, rule: optax.GradientTransformation | float, steps: int, key: Array
) -> tuple[Any, Array]:
    """`steps` steps of a rule (a number: Adam's rate) on loss(params, key): the parameters, and the losses."""
    rule = optax.adam(rule) if isinstance(rule, (int, float)) else rule

    def step(carry: Any, key: Array) -> Any:
        params, memory = carry
        value, gradient = jax.value_and_grad(loss)(params, key)
        updates, memory = rule.update(gradient, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    (params, _), values = jax.lax.scan(step, (params, rule.init(params)), jax.random.split(key, steps))
    return params, values


def small_outlier(sizes: Array, scale: float = 1.4826) -> Array:
    """The anomaly index of the least of some sizes: (median - least) / (scale * MAD)."""
    median = jnp.median(sizes)
    mad = jnp.median(jnp.abs(sizes - median))
    return (median - sizes.min()) / (scale * mad + 1e-12)


def two_gaussians(values: Array, steps: int = 50) -> tuple[Array, Array]:
    """Where a mixture of two Gaussians splits values (n,), and how far apart its two are.

    By EM from the tenth largest part and the rest. The split is where the upper one becomes the likelier, the distance
    is Ashman's D = |m_1 - m_0| / sqrt((s_0^2 + s_1^2) / 2), which is above 2 where the two are separate.
    """
    floor = 1e-6 * values.var() + jnp.finfo(values.dtype).tiny

    def likely(x: Array, mean: Array, square: Array, weight: Array) -> Array:
        """The logarithm of weight times density, (..., 2)."""
        return jnp.log(weight) - 0.5 * jnp.log(square) - 0.5 * (x[..., None] - mean) ** 2 / square

    def fitted(share: Array) -> tuple[Array, Array, Array]:
        total = share.sum(0) + 1e-12
        mean = (share * values[:, None]).sum(0) / total
        return mean, (share * (values[:, None] - mean) ** 2).sum(0) / total + floor, total / len(values)

    def step(share: Array, _: Any) -> tuple[Array, None]:
        return jax.nn.softmax(likely(values, *fitted(share))), None

    upper = (values > jnp.quantile(values, 0.9)).astype(values.dtype)
    share, _ = jax.lax.scan(step, jnp.stack([1 - upper, upper], 1), length=steps)
    mean, square, weight = fitted(share)
    order = jnp.argsort(mean)
    mean, square, weight = mean[order], square[order], weight[order]
    between = mean[0] + (mean[1] - mean[0]) * jnp.linspace(0, 1, 257, dtype=values.dtype)
    gap = likely(between, mean, square, weight)
    return between[jnp.argmax(gap[:, 1] >= gap[:, 0])], (mean[1] - mean[0]) / jnp.sqrt(square.mean())
