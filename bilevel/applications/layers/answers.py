"""How often a classifier is right, and whether labels are ones that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
            out would do by others' statistics: the chunks are of one size then, and fewer samples than there are chunks
            are left out.
    """
    chunk = min(chunk, len(labels)) if rest else len(labels) // -(-len(labels) // chunk)
    whole = len(labels) // chunk * chunk
    parts = inputs[:whole].reshape(-1, chunk, *inputs.shape[1:])
    answers = jax.lax.map(lambda part: classify(part).argmax(-1), parts).ravel()
    if rest and whole < len(labels):
        answers = jnp.concatenate([answers, classify(inputs[whole:]).argmax(-1)])
    return (answers == labels[: len(answers)]).mean()


def check_numbers(what: str, numbers: Any, count: int, of: str, cure: str = "") -> None:
    """Refuse numbers that are not 0, ..., count - 1, which indexing would take for the nearest row or the last.

    Args:
        what: whose they are, as the sentence begins: "The training labels".
        numbers: of any shape; inside a transformation, where values are not known, nothing is looked at.
        count: of the rows.
        of: what has so many: "classes".
        cure: a sentence more.

    Raises:
        ValueError: some are no whole numbers, or beyond.
    """
    if isinstance(numbers, jax.core.Tracer):
        return
    values = np.asarray(numbers)
    if not (np.issubdtype(values.dtype, np.integer) or values.dtype == bool):
        raise ValueError(f"{what} are of type {values.dtype}; whole numbers from 0 to {count - 1} are needed.")
    if values.size and (values.min() < 0 or values.max() >= count):
        said = f"{what} go from {values.min()} to {values.max()}, and there are {count} {of} (0 to {count - 1})."
        raise ValueError(f"{said} {cure}".strip())
