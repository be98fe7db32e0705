"""How often a classifier is right."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def share_right(
    classify: Callable[[Array], Array], inputs: Array, labels: Array, *, chunk: int = 500, rest: bool = True
) -> Array:
    """The share of right answers, `chunk` samples at a time, so that a large set needs no more memory than a small one.

    Args:
        classify: inputs (n, ...) -> scores (n, classes).
        inputs: (n, ...).
        labels: (n,).
        chunk: samples at a time.
        rest: count what is left over too. False where a classifier normalises by the batch at hand, which an odd one
            out would do by others' statistics.
    """
    chunk = min(chunk, len(labels))
    whole = len(labels) // chunk * chunk
    parts = inputs[:whole].reshape(-1, chunk, *inputs.shape[1:])
    answers = jax.lax.map(lambda part: classify(part).argmax(-1), parts).ravel()
    if rest and whole < len(labels):
        answers = jnp.concatenate([answers, classify(inputs[whole:]).argmax(-1)])
    return (answers == labels[: len(answers)]).mean()
