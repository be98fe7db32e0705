"""Real images at sizes that an architecture search on a small budget can take."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bilevel import datasets

Split = tuple[np.ndarray, np.ndarray]


class Images(NamedTuple):
    """Four splits of a set of images, each (images (n, rows, columns, 1), labels (n,))."""

    search_train: Split
    search_validation: Split
    train: Split
    test: Split


def fashion_mnist_small(seed: int = 0, samples: int = 1000, retrain: int = 8000, path: Any = None) -> Images:
    """Fashion-MNIST for a small budget: 14 x 14 pixels (2 x 2 means), padded to 16 x 16, mean 0 and deviation 1.

    Args:
        seed: of the split.
        samples: training and validation images of the search, so many each.
        retrain: images for training what was found, those of the search among them.
        path: see `datasets.fashion_mnist`.
    """
    images, labels = datasets.fashion_mnist("train", path)
    if not 0 < 2 * samples <= retrain <= len(labels):
        raise ValueError(
            f"fashion_mnist_small(samples={samples}, retrain={retrain}): the {2 * samples} images of the search are "
            f"among those to retrain on, and there are {len(labels)} in all."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    pooled = [_pooled(images[order[:retrain]]), _pooled(datasets.fashion_mnist("test", path)[0])]
    train, test = _standardised(*pooled)
    labels = labels[order[:retrain]]
    part = lambda a, b: (train[a:b], labels[a:b])  # noqa: E731
    test_labels = datasets.fashion_mnist("test", path)[1]
    return Images(part(0, samples), part(samples, 2 * samples), part(0, retrain), (test, test_labels))


def digits_small(seed: int = 0) -> Images:
    """The 1,797 digits of 8 x 8 pixels: 600 and 600 for the two levels, those 1,200 to retrain, 597 to test."""
    images, labels = datasets.digits()
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = images[order].reshape(-1, 8, 8, 1), labels[order]
    train, test = _standardised(images[:1200], images[1200:])
    return Images(
        (train[:600], labels[:600]), (train[600:], labels[600:1200]), (train, labels[:1200]), (test, labels[1200:])
    )


def _pooled(images: np.ndarray) -> np.ndarray:
    means = images.reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32)
    return np.pad(means, ((0, 0), (1, 1), (1, 1)))[..., None]


def _standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both less the training pixels' mean, over their deviation."""
    mean, deviation = train.mean(dtype=np.float64), train.std(dtype=np.float64)
    first, second = (((a - mean) / deviation).astype(np.float32) for a in (train, test))
    return first, second
