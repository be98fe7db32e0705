"""Terms in x that are added to the upper loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def beta_decay(x: PyTree) -> jax.Array:
    """The mean over edges of logsumexp_k x_k, the choices k being the last axis of each leaf.

    A decay of the softmaxed weights: the gradient in x is softmax(x) over the number of edges. Its strength grows during
    the search; the authors' is 0.5 times the epoch.

    Reference: Ye et al., "b-DARTS: Beta-Decay Regularization for Differentiable Architecture Search", CVPR 2022.
    """
    return _mean([jax.nn.logsumexp(leaf, axis=-1) for leaf in _choices("beta_decay", x)])


def zero_one(x: PyTree, norm: int = 2) -> jax.Array:
    """Minus the mean of (sigmoid(x) - 1/2)^2 (norm=2) or of |sigmoid(x) - 1/2| (norm=1): drives sigmoids to 0 or 1.

    For independent choices (sigmoid instead of softmax); the authors' strength is 10.

    Reference: Chu et al., "Fair DARTS: Eliminating Unfair Advantages in Differentiable Architecture Search", ECCV 2020.
    """
    if norm not in (1, 2):
        raise ValueError(f"zero_one(norm={norm!r}): the norm is 1 or 2.")
    distances = [jnp.abs(jax.nn.sigmoid(leaf) - 0.5) for leaf in jax.tree.leaves(x)]
    return -_mean([d if norm == 1 else d**2 for d in distances])


def entropy(x: PyTree) -> jax.Array:
    """The mean over edges of the entropy -sum_k p_k log p_k of p = softmax(x) over the last axis.

    Added, it makes choices decide; subtracted (a negative strength), it keeps them open.
    """
    found = []
    for leaf in _choices("entropy", x):
        logs = jax.nn.log_softmax(leaf, axis=-1)
        found.append(-jnp.sum(jnp.exp(logs) * logs, axis=-1))
    return _mean(found)


def penalised(
    loss: Callable[..., jax.Array], *terms: tuple[Callable[[PyTree], jax.Array], float | Callable[[Any], Any]]
) -> Callable[..., jax.Array]:
    """The upper loss F(x, y[, batch]) plus strength times penalty(x), for each pair (penalty, strength).

        Problem(upper=penalised(validation_loss, (beta_decay, lambda step: 0.5 * step / steps_per_epoch)),
                upper_data=data.Keyed(data.Minibatches((X_val, t_val), 64)), ...)

    Args:
      loss: the upper loss.
      terms: pairs of a function of x (`beta_decay`, `zero_one`, `entropy`, your own) and its strength. A strength is a number, or
        a function of the outer step; the step comes with the batch, so the level's data are then `data.Keyed(...)`.
    """
    for term in terms:
        if not (isinstance(term, tuple) and len(term) == 2 and callable(term[0])):
            raise TypeError(
                f"penalised takes pairs (penalty, strength), not {term!r}: penalised(loss, (beta_decay, 0.1))."
            )
    scheduled = any(callable(strength) for _, strength in terms)

    def total(x: PyTree, y: PyTree, *batch: Any) -> jax.Array:
        step = None
        if scheduled:
            inner, key = as_keyed("penalised", *batch)
            batch, step = () if inner is None else (inner,), key.step
        value = loss(x, y, *batch)
        for penalty, strength in terms:
            value = value + (strength(step) if callable(strength) else strength) * penalty(x)
        return value

    return total


def as_keyed(owner: str, *batch: Any) -> tuple[Any, Any]:
    """A batch of `data.Keyed` in its two parts; an error where it is another."""
    from bilevel.data import StepKey

    if len(batch) == 1 and isinstance(batch[0], tuple) and len(batch[0]) == 2 and isinstance(batch[0][1], StepKey):
        return batch[0]
    raise ValueError(
        f"{owner} needs the step's key with each batch: wrap the level's data, data.Keyed(data.Minibatches(...)), or "
        "data.Keyed() where the level has no data."
    )


def _choices(name: str, x: PyTree) -> list[jax.Array]:
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"{name} reads the last axis of each leaf of x as choices, and a leaf is a scalar.")
    return leaves


def _mean(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([part.reshape(-1) for part in parts]).mean()
