"""What server and clients share: the two losses, the model's shapes, who holds which digits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, datasets, splits

CLASSES = 10
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def logits(x, y, images):
    return jnp.tanh(images @ x["weights"] + x["bias"]) @ y["weights"] + y["bias"]


def upper(x, y, batch):
    images, labels = batch
    return cross_entropy(logits(x, y, images), labels).mean()


def lower(x, y, batch):
    images, labels = batch
    decay = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
    return cross_entropy(logits(x, y, images), labels).mean() + 0.05 * decay


def start(hidden: int, seed: int):
    """The body x and the head y before the first round."""
    weights = np.random.default_rng(seed).normal(size=(64, hidden)) / 8
    x = {"weights": jnp.asarray(weights, jnp.float32), "bias": jnp.zeros(hidden)}
    return x, {"weights": jnp.zeros((hidden, CLASSES)), "bias": jnp.zeros(CLASSES)}


def digits():
    """(training, test) images and labels."""
    images, labels = datasets.digits()
    return datasets.split((images / 16, labels), sizes=(1300, -1), seed=0)


def client_problem(partition: int, partitions: int) -> Problem:
    """The problem on one client's own digits; a real client would read its own files here."""
    train, _ = digits()
    mine = splits.shards(train[1], partitions, per_client=3, seed=0).indices[partition]
    held = max(1, len(mine) // 3)

    def part(rows):
        return tuple(array[rows] for array in train)

    return Problem(upper, lower, upper_data=part(mine[:held]), lower_data=part(mine[held:]))


def accuracy(x, y) -> float:
    images, labels = digits()[1]
    return float(jnp.mean(jnp.argmax(logits(x, y, images), axis=1) == labels))
