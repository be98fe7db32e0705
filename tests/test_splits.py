"""Data splits: every sample once, seeded, as skewed as asked, and reported."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel import splits

LABELS = np.random.default_rng(0).integers(0, 10, size=2000)

MAKE = {
    "iid": lambda seed: splits.iid(2000, 20, seed),
    "dirichlet": lambda seed: splits.dirichlet(LABELS, 20, 0.3, seed),
    "shards": lambda seed: splits.shards(LABELS, 20, 2, seed),
    "imbalanced": lambda seed: splits.imbalanced(2000, 20, 10.0, seed),
}


@pytest.mark.parametrize("name", MAKE)
def test_every_sample_once_and_seeded(name: str) -> None:
    split = MAKE[name](3)
    np.testing.assert_array_equal(np.sort(np.concatenate(split.indices)), np.arange(2000))
    for mine, again in zip(split.indices, MAKE[name](3).indices, strict=True):
        np.testing.assert_array_equal(mine, again)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(split.indices, MAKE[name](4).indices, strict=True))
    assert "seed=3" in repr(split) and "20 clients, 2000 samples" in repr(split)


def test_skew_follows_the_concentration() -> None:
    skews = [splits.dirichlet(LABELS, 20, c).skew for c in (0.1, 1.0, 100.0)]
    assert skews == sorted(skews, reverse=True) and skews[0] > 0.6 and skews[-1] < 0.15
    assert "label skew" in repr(splits.dirichlet(LABELS, 20, 1.0))


def test_shards_hold_few_classes() -> None:
    split = splits.shards(LABELS, 20, 2)
    assert (split.label_shares > 0).sum(axis=1).max() <= 4
    assert set(split.sizes) == {100}


def test_imbalance_ratio() -> None:
    sizes = splits.imbalanced(5000, 30, 8.0).sizes
    assert sizes.max() / sizes.min() == pytest.approx(8.0, rel=0.1)


def test_levels_are_disjoint_and_keep_a_share() -> None:
    split = splits.dirichlet(LABELS, 20, 0.5)
    upper, lower = split.levels((np.arange(2000), LABELS), validation=0.25, size=8)
    assert len(upper) == len(lower) == 20
    assert not set(upper.arrays[0]) & set(lower.arrays[0])
    np.testing.assert_array_equal(np.asarray(upper.counts) + np.asarray(lower.counts), split.sizes)
    assert abs(upper.count / 2000 - 0.25) < 0.02


def test_feature_shift_moves_by_its_strength() -> None:
    features = np.random.default_rng(1).normal(size=(2000, 5)).astype(np.float32)
    split = splits.iid(2000, 4)
    assert (splits.feature_shift(split, features, 0.0) == features).all()
    means = {}
    for strength in (0.5, 1.0):
        shifted = splits.feature_shift(split, features, strength)
        assert shifted.dtype == np.float32
        means[strength] = np.stack([shifted[i].mean(axis=0) for i in split.indices]).std()
    assert means[1.0] == pytest.approx(2 * means[0.5], rel=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: splits.iid(3, 5), "3 samples are too few for 5 clients"),
        (lambda: splits.iid(3, 0), "positive integer"),
        (lambda: splits.dirichlet(LABELS, 20, 0.0), "concentration=0"),
        (lambda: splits.dirichlet(LABELS[:60], 20, 0.01, minimum=3), "raise the concentration"),
        (lambda: splits.dirichlet(LABELS + 0.5, 20), "vector of integers"),
        (lambda: splits.imbalanced(20, 20, 0.5), "at least 1"),
        (lambda: splits.iid(10, 10).levels(np.arange(10)), "Client 0 has 1 sample"),
        (lambda: splits.iid(10, 2).levels(np.arange(10), validation=1.0), "share in"),
        (lambda: splits.feature_shift(splits.iid(4, 2), np.arange(4), 1.0), "floating-point features"),
        (lambda: splits.feature_shift(splits.iid(4, 2), np.ones((4, 2)), -1.0), "not negative"),
        (lambda: splits.iid(4, 2).label_shares, "without labels"),
    ],
)
def test_errors_by_name(make, words: str) -> None:
    with pytest.raises(splits.SplitError, match=words):
        make()
