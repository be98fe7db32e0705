"""Properties of a population of windows: cross-correlations, the maximum mean discrepancy, and four scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

TRAINING = (0.01, 0.05, 0.1, 0.2, 0.5, 0.7, 1.0)
"""The bandwidths of the training loss."""
EVALUATION = (*TRAINING, 1.5, 2.0)
"""Those of the scores."""


def pairs(channels: int) -> list[tuple[int, int]]:
    """The pairs of channels in their order: (1, 0), (2, 0), (2, 1), ..."""
    return [(i, j) for i in range(channels) for j in range(i)]


def cross_correlations(x: Array) -> Array:
    """Pearson's correlation over each window of each pair of channels, (n, length, channels) -> (n, pairs).

    0 where one of the two is constant in the window; the gradient is finite (zero) there, too.
    """
    if x.ndim != 3 or x.shape[-1] < 2:
        raise ValueError(f"Windows (n, length, channels) with two channels at least are needed, not {x.shape}.")
    i, j = np.tril_indices(x.shape[-1], -1)
    constant = x.max(1) == x.min(1)
    centred = x - x.mean(1, keepdims=True)
    # Where a channel is constant its deviation is taken for 1 before the root and the division, not after.
    deviation = jnp.sqrt(jnp.where(constant, 1, jnp.square(centred).sum(1)))
    normal = jnp.where(constant[:, None], 0, centred / deviation[:, None])
    return (normal[:, :, i] * normal[:, :, j]).sum(1)


def mmd(a: Array, b: Array, bandwidths: Sequence[float] = TRAINING, *, unbiased: bool = False) -> Array:
    """Maximum mean discrepancy of two samples of numbers, (n, ...) and (m, ...): one value for each trailing index.

        mean k(a, a') + mean k(b, b') - 2 mean k(a, b),    k(d) = sum over bandwidths w of exp(-d^2 / (2 w))

    w stands where a variance does. The biased statistic, with the pairs of a sample with itself, is 0 for equal samples
    and positive for two samples of one distribution: by the more, the fewer they are. Compare equal n, or take the
    `unbiased` one, which leaves these pairs out.
    """
    a, b = (jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) for x in (a, b))
    if unbiased and min(len(a), len(b)) < 2:
        raise ValueError("mmd(unbiased=True) leaves out a number's pair with itself: two of each sample are needed.")
    scales = jnp.asarray([-0.5 / w for w in bandwidths], a.dtype)

    def mean(p: Array, q: Array, same: bool) -> Array:
        squares = jnp.square(p[..., :, None] - q[..., None, :])
        total = functools.reduce(jnp.add, [jnp.exp(squares * s) for s in scales])
        if not (unbiased and same):
            return total.mean((-2, -1))
        n = p.shape[-1]
        return (total.sum((-2, -1)) - n * len(bandwidths)) / (n * (n - 1))

    a, b = jnp.moveaxis(a, 0, -1), jnp.moveaxis(b, 0, -1)  # the samples along a long last axis
    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def _compared(score: str, real: Any, generated: Any, channels: int = 1, alike: bool = False) -> tuple[Array, Array]:
    """Both as arrays of floats; windows that a score would say something of by chance are refused."""
    both = []
    for name, values in (("real", real), ("generated", generated)):
        if np.ndim(values) != 3 or 0 in np.shape(values) or np.shape(values)[-1] < channels:
            raise ValueError(
                f"{score}: the {name} windows have the shape {np.shape(values)}; (n, length, channels) with at least "
                f"{channels} channel{'s' if channels > 1 else ''} is needed."
            )
        if not isinstance(values, jax.core.Tracer) and not np.isfinite(np.asarray(values, float)).all():
            wrong = len(values) - int(np.isfinite(np.asarray(values, float)).all((1, 2)).sum())
            raise ValueError(
                f"{score}: {wrong} of {len(values)} {name} windows have missing or infinite values. Say how many a "
                "sampler makes, and score the others."
            )
        both.append(jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32)))
    start = 1 if alike else 2
    if both[0].shape[start:] != both[1].shape[start:]:
        raise ValueError(
            f"{score}: the real windows have the shape {both[0].shape} and the generated ones {both[1].shape}: "
            f"{'lengths and channels' if alike else 'channels'} are to be the same."
        )
    return both[0], both[1]


def fdds(real: Array, generated: Array) -> Array:
    """Functional-dependency score: the mean over pairs of the discrepancy of cross-correlations (nine bandwidths)."""
    real, generated = _compared("fdds", real, generated, 2)
    return jnp.stack([_in_blocks(c) for c in _columns(cross_correlations(real), cross_correlations(generated))]).mean()


def vds(real: Array, generated: Array, *, count: int = 10_000, seed: int = 0) -> Array:
    """Value-distribution score: the mean over channels of the discrepancy of values (nine bandwidths).

    Args:
        real, generated: windows (n, length, channels).
        count: the values per channel that are compared, a sample of all.
        seed: of that sample.
    """
    flat = [np.asarray(x).reshape(-1, x.shape[-1]) for x in _compared("vds", real, generated)]
    size = min(count, *map(len, flat))
    random = np.random.default_rng(seed)
    chosen = [jnp.asarray(x[random.choice(len(x), size, replace=False)]) for x in flat]
    return jnp.stack([_in_blocks(c) for c in _columns(*chosen)]).mean()


def _columns(a: Array, b: Array) -> list[tuple[Array, Array]]:
    return [(a[:, k], b[:, k]) for k in range(a.shape[1])]


@jax.jit
def _in_blocks(both: tuple[Array, Array]) -> Array:
    """`mmd` of many numbers, whose tables of differences do not fit into memory."""
    a, b = both
    scales = jnp.asarray(EVALUATION, a.dtype)[:, None]
    kernel = lambda p, q: jnp.exp(jnp.square(p - q)[None] * -0.5 / scales).sum(0)  # noqa: E731
    mean = lambda p, q: jax.lax.map(lambda p: kernel(p, q).mean(), p, batch_size=256).mean()  # noqa: E731
    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def discriminative(
    real: Array, generated: Array, key: Array, *, steps: int = 2000, batch: int = 128, repeats: int = 5
) -> Array:
    """How far from 1/2 the accuracy of a network is that tells real windows from generated ones; shape (repeats,).

    A GRU of channels // 2 units and a linear layer on its last state, Adam (1e-3); four fifths of each kind to train on
    and the rest to test.
    """
    n = min(len(real), len(generated))
    if n < 5:
        raise ValueError(f"discriminative was given {n} windows of a kind: five are needed to train and to test.")
    (real, generated), cut = _compared("discriminative", real, generated, alike=True), 4 * n // 5

    def once(key: Array) -> Array:
        order, start, draws = jax.random.split(key, 3)
        both = [
            x[jax.random.permutation(k, len(x))[:n]]
            for x, k in zip((real, generated), jax.random.split(order), strict=True)
        ]

        def loss(params: Any, key: Array) -> Array:
            rows = jax.random.randint(key, (2, batch), 0, cut)
            logits = jnp.concatenate([_answer(params, x[r]) for x, r in zip(both, rows, strict=True)])
            return optax.sigmoid_binary_cross_entropy(logits, jnp.repeat(jnp.array([1.0, 0.0]), batch)).mean()

        params = _trained(loss, _gru(start, real.shape[-1], max(1, real.shape[-1] // 2)), draws, steps)
        right = [(_answer(params, x[cut:]) > 0) == label for x, label in zip(both, (True, False), strict=True)]
        return jnp.abs(jnp.concatenate(right).mean() - 0.5)

    return jax.lax.map(jax.jit(once), jax.random.split(key, repeats))


def predictive(
    real: Array, generated: Array, key: Array, *, steps: int = 5000, batch: int = 128, repeats: int = 5
) -> Array:
    """Mean absolute error on real windows of a network trained on generated ones, one per repeat (`repeats`,).

    A GRU of channels // 2 units sees all channels but the last up to now, and says the last one a step later; Adam
    (1e-3) on the absolute error. The network's answers lie in 0..1, and so all windows are moved there first, by each
    channel's least and largest value in `real`: the error is a share of the last one's range.
    """
    real, generated = _compared("predictive", real, generated, 2, alike=True)
    c, low, high = real.shape[-1], real.min((0, 1)), real.max((0, 1))
    real, generated = ((x - low) / jnp.where(high > low, high - low, 1) for x in (real, generated))
    error = lambda params, x: jnp.abs(_answers(params, x[:, :-1, :-1]) - x[:, 1:, -1]).mean()  # noqa: E731

    def once(key: Array) -> Array:
        start, draws = jax.random.split(key)
        drawn = lambda key: generated[jax.random.randint(key, (batch,), 0, len(generated))]  # noqa: E731
        loss = lambda params, key: error(params, drawn(key))  # noqa: E731
        return error(_trained(loss, _gru(start, c - 1, max(1, c // 2)), draws, steps), real)

    return jax.lax.map(jax.jit(once), jax.random.split(key, repeats))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _trained(loss: Callable[[Any, Array], Array], params: Any, key: Array, steps: int) -> Any:
    rule = optax.adam(1e-3)

    def step(carry: Any, key: Array) -> Any:
        params, memory = carry
        updates, memory = rule.update(jax.grad(loss)(params, key), memory)
        return (optax.apply_updates(params, updates), memory), None

    return jax.lax.scan(step, (params, rule.init(params)), jax.random.split(key, steps))[0][0]


def _gru(key: Array, inputs: int, units: int) -> dict[str, Array]:
    keys = jax.random.split(key, 3)
    glorot = lambda k, a, b: jax.random.uniform(k, (a, b), minval=-1, maxval=1) * (6 / (a + b)) ** 0.5  # noqa: E731
    return {
        "w": glorot(keys[0], inputs, 3 * units), "u": glorot(keys[1], units, 3 * units), "b": jnp.zeros(3 * units),
        "out": glorot(keys[2], units, 1), "bias": jnp.zeros(()),
    }  # fmt: skip


def _states(params: dict[str, Array], x: Array) -> Array:
    """Update, reset and candidate: h <- z h + (1 - z) tanh(W x + U (r h))."""
    units = params["u"].shape[0]
    w, u = params["w"], params["u"]

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        a = x @ w + params["b"]
        gates = jax.nn.sigmoid(a[:, : 2 * units] + h @ u[:, : 2 * units])
        z, r = gates[:, :units], gates[:, units:]
        h = z * h + (1 - z) * jnp.tanh(a[:, 2 * units :] + (r * h) @ u[:, 2 * units :])
        return h, h

    return jax.lax.scan(step, jnp.zeros((len(x), units), x.dtype), jnp.swapaxes(x, 0, 1))[1]


def _answer(params: dict[str, Array], x: Array) -> Array:
    return (_states(params, x)[-1] @ params["out"])[:, 0] + params["bias"]


def _answers(params: dict[str, Array], x: Array) -> Array:
    return jax.nn.sigmoid((_states(params, x) @ params["out"])[..., 0].T + params["bias"])
