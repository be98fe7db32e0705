"""The only data of this application: scikit-learn's 8x8 digits, and how a seed splits them."""

from __future__ import annotations

import hashlib
import numbers
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bilevel import datasets

DIGEST = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
"""SHA-256 of the 1797 images and labels as bytes."""

SIDE, CLASSES = 8, 10
TRUSTED, TEST = 150, 297


class Split(NamedTuple):
    """One seed's digits: images (n, 8, 8) in 0..1, labels (n,), and which of the pool an attacker would touch.

    Attributes:
        pool, pool_labels: 1350 images to pretrain on; the labels are for the evaluation alone.
        trusted, trusted_labels: 150 images with labels, for the probe and the defender.
        test, test_labels: 297 held-out images.
        flags: bool (1350,), the share of the pool, all of the target's class, that is perturbed.
    """

    pool: np.ndarray
    pool_labels: np.ndarray
    trusted: np.ndarray
    trusted_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    flags: np.ndarray


def load(data: Any = "digits") -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) in 0..1, of the precision that JAX is set to, and labels (1797,).

    Args:
        data: "digits", or these very digits as `datasets.digits()` returns them.

    Raises:
        ValueError: anything else, by its content: the study is of defences, on digits alone.
    """
    if isinstance(data, str) and data == "digits":
        data = datasets.digits()
    try:
        images, labels = (np.asarray(part) for part in data)
        digest = hashlib.sha256(images.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
        same = digest == DIGEST and (images == images.astype(np.uint8)).all()
    except (TypeError, ValueError):
        same = False
    if not same:
        what = repr(data) if isinstance(data, str) else f"a {type(data).__name__}"
        raise ValueError(
            f"data={what}: this study evaluates defences on scikit-learn's 8x8 digits and takes no other data. Leave "
            'the argument out, or give data="digits".'
        )
    return images.reshape(-1, SIDE, SIDE).astype(jnp.result_type(float)) / 16, labels.astype(np.int32)


def split(seed: int, target: int, share: float, data: Any = "digits") -> Split:
    """The digits in a seed's order, and `share` of the pool flagged, drawn from the target class.

    Raises:
        ValueError: other data, a target that is no class of them, or a share that the class cannot hold.
    """
    images, labels = load(data)
    check_target(target)
    order = np.random.default_rng(seed).permutation(len(images))
    parts = np.split(order, [TRUSTED, TRUSTED + TEST])
    trusted, test, pool = parts
    members = np.flatnonzero(labels[pool] == target)
    count = flagged_count(share, len(pool), len(members))
    flags = np.zeros(len(pool), bool)
    flags[members[:count]] = True
    return Split(images[pool], labels[pool], images[trusted], labels[trusted], images[test], labels[test], flags)


def check_target(target: Any) -> None:
    """Raise where the target is no class of the digits."""
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)) or not 0 <= target < CLASSES:
        raise ValueError(f"target={target!r}: this class does not occur among the digits; their classes are 0 to 9.")


def flagged_count(share: Any, pool: int, members: int) -> int:
    """How many images a share of the pool is."""
    if not isinstance(share, numbers.Real) or isinstance(share, bool) or not 0 < float(share) < 1:
        raise ValueError(f"share={share!r}: the share of the pool that is perturbed lies in (0, 1).")
    count = round(float(share) * pool)
    if not 1 <= count <= members // 2:
        raise ValueError(
            f"share={share!r} is {count} of {pool} images, all of one class, which has {members} there: give a share "
            f"between {1 / pool:.4f} and {members // 2 / pool:.3f}."
        )
    return count
