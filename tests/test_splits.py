"""Data splits: every sample once, seeded, as skewed as asked, and reported."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import ProblemError, hypergradients, lower, splits

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


def test_cross_validation_of_a_ridge_is_the_closed_form(x64):
    rng = np.random.default_rng(0)
    X, y0 = rng.normal(size=(23, 4)), jnp.zeros(4)  # 23 samples: folds of unequal sizes
    t = X @ np.array([1.0, -1, 0, 0]) + rng.normal(size=23)
    squared = lambda y, samples: (samples[0] @ y - samples[1]) ** 2
    ridge = lambda x, y: jnp.exp(x) * jnp.sum(y**2)
    problem, start = splits.cross_validation(squared, ridge, (X, t), y0, folds=5)
    assert start.shape == (5, 4)

    def cross_validated(x):
        errors = []
        for part in np.array_split(np.arange(23), 5):
            rest = np.setdiff1d(np.arange(23), part)
            gram = X[rest].T @ X[rest] / len(rest) + np.exp(x) * np.eye(4)
            y = np.linalg.solve(gram, X[rest].T @ t[rest] / len(rest))
            errors.append(np.mean((X[part] @ y - t[part]) ** 2))
        return np.mean(errors)

    at = hypergradients.value_and_hypergradient(problem, lower_solver=lower.Newton())
    found = at(jnp.array(-1.0), start)
    assert float(found.value) == pytest.approx(cross_validated(-1.0), rel=1e-8)
    slope = (cross_validated(-1 + 1e-5) - cross_validated(-1 - 1e-5)) / 2e-5
    assert float(found.gradient) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(folds=1), "at least 2 folds"),
        (dict(folds=[([0, 1], [1, 2])]), "fold 0 trains on samples that it holds out"),
        (dict(folds=[([0, 1], [])]), "fold 0 has no held-out samples"),
    ],
)
def test_folds_that_cannot_be_made_are_named(options, text):
    with pytest.raises(splits.SplitError, match=text):
        splits.cross_validation(lambda y, s: s * y, None, np.ones(5), jnp.zeros(()), **options)


def test_a_loss_with_a_mean_is_named():
    problem, start = splits.cross_validation(lambda y, s: jnp.mean(s * y), None, np.ones(5), jnp.zeros(()))
    with pytest.raises(ProblemError, match=r"\(y, samples\) returned the shape \[\].*without a mean"):
        problem.validate(jnp.zeros(()), start)


def test_folds_may_be_masks_and_bootstraps_and_are_in_range():
    samples = {"t": np.arange(6.0)}
    squares = lambda y, rows: (y - rows["t"]) ** 2

    def weights(folds):
        problem, _ = splits.cross_validation(squares, None, samples, jnp.zeros(()), folds)
        return np.asarray(problem.upper_data[1]), np.asarray(problem.lower_data[1])

    train = np.array([True, True, True, False, False, False])
    masked, indexed = weights([(train, ~train)]), weights([([0, 1, 2], [3, 4, 5])])
    for one, other in zip(masked, indexed, strict=True):
        np.testing.assert_allclose(one, other)
    held_out, trained = weights([([0, 0, 1, 2], [3, 4])])
    np.testing.assert_allclose(trained[:, 0], [0.5, 0.25, 0.25, 0, 0, 0])
    np.testing.assert_allclose(held_out[:, 0], [0, 0, 0, 0.5, 0.5, 0])
    with pytest.raises(splits.SplitError, match=r"fold 0 has the held-out sample 6, and there are 6: .* or masks"):
        weights([([0, 1], [2, 6])])


@pytest.mark.parametrize(("count", "clients", "ratio"), [(1000, 100, 10.0), (1000, 7, 3.0), (57, 5, 1.0)])
def test_sizes_fall_by_the_ratio_that_is_asked(count, clients, ratio):
    sizes = np.sort(splits.imbalanced(count, clients, ratio).sizes)
    weights = np.geomspace(1 / ratio, 1, clients)
    assert sizes.sum() == count
    assert np.abs(sizes - weights / weights.sum() * count).max() <= 1


def test_a_split_takes_the_arrays_that_it_was_made_for():
    for split in (splits.iid(20, 4), splits.shards(np.arange(20) % 5, 4), splits.imbalanced(20, 4, 2.0)):
        for use in (split.datasets, split.clients, split.levels):
            with pytest.raises(
                splits.SplitError, match=r"arrays\['a'\] has 30 samples, and .* is a split of 20: give the"
            ):
                use({"a": np.zeros(30)})
    with pytest.raises(splits.SplitError, match=r"arrays has 3 samples, and mine is a split of 6"):
        splits.Split([np.arange(3), np.arange(3, 6)], "mine").datasets(np.zeros(3))
    assert len(splits.Split([np.arange(3)], "a part").datasets(np.zeros(9))[0]) == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: splits.iid(20, 4).skew, r"was made without labels"),
        (
            lambda: splits.imbalanced(20, 4, labels=np.zeros(5, int)),
            r"there are 5 labels for 20 samples, give one each",
        ),
        (lambda: splits.shards(np.zeros(20, int), 4, 0), r"per_client=0\): the number of shards .* positive integer"),
        (lambda: splits.shards(np.zeros(20, int), 4, 1.5), r"per_client=1\.5\)"),
        (lambda: splits.iid(20.5, 4), r"count=20\.5: the number of samples is an integer"),
        (lambda: splits.cross_validation(lambda y, s: s, None, np.zeros(4), 0.0, []), r"at least one pair of training"),
    ],
)
def test_what_no_split_is_made_of_is_said(make, said):
    with pytest.raises(splits.SplitError, match=said):
        make()
