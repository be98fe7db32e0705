"""Ways to hand one data set out to clients that differ: label skew, shards, unequal sizes, feature shift.

A split is seeded, and prints its sizes and how far the clients' labels are from the whole's:

    split = splits.dirichlet(labels, clients=100, concentration=0.3, seed=0)
    print(split)
    upper_data, lower_data = split.levels((images, labels), validation=0.2, size=16)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import explained, explained_class
from bilevel.data import Clients, as_arrays, sample_count
from bilevel.problem import Problem

PyTree = Any

__all__ = ["Split", "SplitError", "cross_validation", "dirichlet", "feature_shift", "iid", "imbalanced", "shards"]


class SplitError(ValueError):
    """The data cannot be split as asked; the message says why and what to change."""


@explained_class
@dataclasses.dataclass(frozen=True)
class Split:
    """Which samples are whose.

    Attributes:
      indices: an integer array per client; no sample belongs to two.
      name: how the split was made, seed included.
      labels: the labels of all samples, where the split knows them; for the report.
      count: of all samples, whose arrays have this length; None: any that the indices allow.
    """

    indices: Sequence[np.ndarray]
    name: str
    labels: np.ndarray | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.count not in (None, len(self.labels)):
            raise SplitError(
                f"{self.name}: there are {len(self.labels)} labels for {self.count} samples, give one each."
            )
        if self.labels is not None:
            object.__setattr__(self, "count", len(self.labels))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sizes(self) -> np.ndarray:
        """The number of samples of each client."""
        return np.asarray([len(i) for i in self.indices])

    @property
    def label_shares(self) -> np.ndarray:
        """(clients, classes): the share of each class among a client's samples."""
        if self.labels is None:
            raise SplitError(f"{self.name} was made without labels: Split(indices, name, labels) knows them.")
        classes = np.unique(self.labels)
        return np.stack([(self.labels[i][:, None] == classes).mean(axis=0) for i in self.indices])

    @property
    def skew(self) -> float:
        """The mean total-variation distance of clients' label shares from the whole's.

        0 alike, towards 1 a class each.
        """
        shares = self.label_shares
        assert self.labels is not None  # or they have said so
        whole = (self.labels[:, None] == np.unique(self.labels)).mean(axis=0)
        return float(np.abs(shares - whole).sum(axis=1).mean() / 2)

    def datasets(self, arrays: PyTree) -> list[PyTree]:
        """One pytree of arrays per client."""
        needed = 1 + max((int(np.max(i)) for i in self.indices if len(i)), default=-1)
        needed = needed if self.count is None else self.count
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
            length = np.shape(leaf)[0] if np.ndim(leaf) else 0
            if length < needed or (self.count is not None and length != needed):
                raise SplitError(
                    f"arrays{jax.tree_util.keystr(path)} has {length} samples, and {self.name} is a split of {needed}: "
                    "give the arrays that it was made for."
                )
        return [jax.tree.map(lambda a: np.asarray(a)[i], arrays) for i in self.indices]

    def clients(self, arrays: PyTree, size: int | None = None) -> Clients:
        """The data as `data.Clients`, batches of `size` (cut to the smallest client's number of samples)."""
        return Clients(self.datasets(arrays), None if size is None else min(size, int(self.sizes.min())))

    def levels(
        self, arrays: PyTree, validation: float = 0.2, size: int | None = None, seed: int = 0
    ) -> tuple[Clients, Clients]:
        """(upper, lower) data: each client keeps a share of its own samples, at least one, for the upper level."""
        if not 0 < validation < 1:
            raise SplitError(f"levels(validation={validation}): a share in (0, 1) is needed.")
        generator = np.random.default_rng(seed)
        upper, lower = [], []
        for c, mine in enumerate(self.indices):
            if len(mine) < 2:
                raise SplitError(
                    f"Client {c} has {len(mine)} sample(s): two are needed, one for each level. Raise `minimum` "
                    f"in the split."
                )
            order = generator.permutation(mine)
            held = min(max(1, round(validation * len(mine))), len(mine) - 1)
            upper.append(order[:held])
            lower.append(order[held:])
        clients = [dataclasses.replace(self, indices=part).clients(arrays, size) for part in (upper, lower)]
        return clients[0], clients[1]

    def __repr__(self) -> str:
        sizes = self.sizes
        text = f"{self.name}: {len(self)} clients, {sizes.sum()} samples, {sizes.min()} to {sizes.max()} each"
        text += f" (median {np.median(sizes):g})"
        if self.labels is not None:
            classes = (self.label_shares > 0).sum(axis=1)
            text += f"; {classes.min()} to {classes.max()} classes each, label skew {self.skew:.2f}"
        return text


@explained
def iid(count: int, clients: int, seed: int = 0) -> Split:
    """`count` samples dealt out at random in equal parts (to one sample)."""
    _check(count, clients)
    parts = np.array_split(np.random.default_rng(seed).permutation(count), clients)
    return Split(parts, f"iid(seed={seed})", count=count)


@explained
def dirichlet(labels: Any, clients: int, concentration: float = 0.5, seed: int = 0, minimum: int = 2) -> Split:
    """Label skew: the shares in which each class goes to the clients are drawn from a symmetric Dirichlet distribution.

    Args:
      labels: integer labels of all samples.
      clients: how many.
      concentration: towards 0 each class sits with one client; large values are iid. 0.1 to 1 are usual.
      seed: of the draw.
      minimum: samples that each client gets at least; drawn again until it holds.

    Reference: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019.
    """
    labels = _labels(labels)
    _check(len(labels), clients, minimum)
    if not concentration > 0:
        raise SplitError(f"dirichlet(concentration={concentration}): a positive number is needed.")
    generator = np.random.default_rng(seed)
    for _ in range(1000):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(generator.dirichlet(np.full(clients, concentration)))[:-1] * len(members)).astype(int)
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        indices = [np.concatenate(part) for part in parts]
        if min(map(len, indices)) >= minimum:
            name = f"dirichlet(concentration={concentration:g}, seed={seed})"
            return Split([generator.permutation(i) for i in indices], name, labels)
    raise SplitError(
        f"dirichlet(concentration={concentration:g}) gave some of {clients} clients fewer than {minimum} of "
        f"{len(labels)} samples in a "
        "thousand draws: raise the concentration, or lower clients or minimum."
    )


@explained
def shards(labels: Any, clients: int, per_client: int = 2, seed: int = 0) -> Split:
    """Samples sorted by label, cut into clients * per_client equal shards, each client dealt `per_client` of them.

    Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
    2017.
    """
    labels = _labels(labels)
    _check(len(labels), clients)
    if isinstance(per_client, bool) or not isinstance(per_client, (int, np.integer)) or per_client < 1:
        raise SplitError(
            f"shards(per_client={per_client!r}): the number of shards of each client is a positive integer."
        )
    _check(len(labels), clients, per_client)
    total = clients * per_client
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    pieces = np.array_split(order[np.argsort(labels[order], kind="stable")], total)
    dealt = generator.permutation(total).reshape(clients, per_client)
    indices = [generator.permutation(np.concatenate([pieces[s] for s in mine])) for mine in dealt]
    return Split(indices, f"shards(per_client={per_client}, seed={seed})", labels)


@explained
def imbalanced(count: int, clients: int, ratio: float = 10.0, seed: int = 0, labels: Any = None) -> Split:
    """Equal distributions, unequal sizes: sizes fall geometrically, the largest `ratio` times the smallest."""
    _check(count, clients)
    if not ratio >= 1:
        raise SplitError(f"imbalanced(ratio={ratio}): the largest over the smallest size is at least 1.")
    generator = np.random.default_rng(seed)
    weights = np.geomspace(1, 1 / ratio, clients)
    exact = weights / weights.sum() * count
    sizes = np.maximum(exact.astype(int), 1)
    order = generator.permutation(count)
    if sizes.sum() > count:
        raise SplitError(
            f"imbalanced: {clients} clients at ratio {ratio:g} need more than {count} samples: lower clients or ratio."
        )
    sizes[np.argsort(sizes - exact, kind="stable")[: count - sizes.sum()]] += 1  # to those that rounding took most of
    cuts = np.cumsum(sizes)
    indices = np.split(order, cuts[:-1])
    return Split(
        [indices[i] for i in generator.permutation(clients)], f"imbalanced(ratio={ratio:g}, seed={seed})",
        None if labels is None else _labels(labels), count,
    )  # fmt: skip


@explained
def feature_shift(split: Split, features: Any, strength: float, seed: int = 0) -> np.ndarray:
    """Each client's instrument reads differently: features times (1 + strength a) plus strength b standard deviations.

    Args:
      split: whose sample is whose; the other samples are left as they are.
      features: (samples, ...) of floating point.
      strength: 0 is no shift; 1 moves by a standard deviation of each feature.
      seed: of a and b, standard normal, one of each per client and feature.

    Returns:
      The shifted features, of the same shape and dtype.
    """
    features = np.asarray(features)
    if not np.issubdtype(features.dtype, np.floating):
        raise SplitError(
            f"feature_shift shifts floating-point features, these are {features.dtype}: convert (and scale) them first."
        )
    if not strength >= 0:
        raise SplitError(f"feature_shift(strength={strength}): a number that is not negative is needed.")
    generator = np.random.default_rng(seed)
    spread, shifted = features.std(axis=0), features.copy()
    for mine in split.indices:
        gain, offset = generator.normal(size=(2, *features.shape[1:]))
        shifted[mine] = features[mine] * (1 + strength * gain) + strength * offset * spread
    return shifted


def _labels(labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise SplitError(
            f"Labels are a vector of integers, one per sample; these are {labels.dtype}{list(labels.shape)}."
        )
    return labels


def _check(count: int, clients: int, minimum: int = 1) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise SplitError(f"count={count!r}: the number of samples is an integer.")
    if isinstance(clients, bool) or not isinstance(clients, (int, np.integer)) or clients < 1:
        raise SplitError(f"clients={clients!r}: a positive integer is needed.")
    if clients * minimum > count:
        raise SplitError(f"{count} samples are too few for {clients} clients with at least {minimum} each.")


@explained
def cross_validation(
    loss: Callable[[PyTree, PyTree], jax.Array],
    penalty: Callable[[PyTree, PyTree], jax.Array] | None,
    samples: PyTree,
    y0: PyTree,
    folds: int | Sequence[tuple[Any, Any]] = 5,
    *,
    seed: int | None = None,
    score: Callable[[PyTree, PyTree], jax.Array] | None = None,
    prox: Callable[[PyTree, PyTree, Any], PyTree] | None = None,
) -> tuple[Problem, PyTree]:
    """Cross-validation as a problem: the models of all folds are one lower level, stacked along a leading axis.

        problem, y0 = splits.cross_validation(squared_error, ridge, (X, t), jnp.zeros(10), folds=5)
        x = solve(problem, x0, y0).x

        upper:  mean over folds k of  the mean of score(y_k, .) over the samples held out in k
        lower:  sum over folds k of   the mean of loss(y_k, .) over the others, + penalty(x, y_k) (+ r(x, y_k))

    The folds share no unknown, so the sum's minimiser is each fold's own. A fold's samples are told by weights, so that
    folds of unequal sizes are exact.

    Args:
      loss: `(y, samples) -> (n,)`, the training loss of each sample.
      penalty: `(x, y) -> scalar`, of one fold's model; None: none.
      samples: a pytree of arrays with n samples each (tables will do).
      y0: where one fold's model starts.
      folds: how many, of consecutive samples as in scikit-learn's `KFold`; or pairs (training, held-out) of indices,
        such as `KFold(5).split(X)` gives.
      seed: shuffle the samples before they are cut; None: as they stand.
      score: `(y, samples) -> (n,)`, what is measured on the samples held out; None: the loss.
      prox: the operator of a nonsmooth penalty r of one fold's model, `(x, y, scaling) -> y`, as `prox.lasso(...)`.

    Returns:
      The problem, and y0 with the leading axis of folds.

    Raises:
      SplitError: the folds cannot be made.
    """
    samples = as_arrays(samples, "samples")
    n = sample_count(samples, "samples")
    held_out, trained = _fold_weights(folds, n, seed)
    count, score = len(held_out), loss if score is None else score

    def upper(x: PyTree, y: PyTree, batch: PyTree) -> jax.Array:
        rows, weights = batch
        one = lambda y, w: w @ _each(score, "score", y, rows, n)  # noqa: E731
        return jax.vmap(one)(y, weights.T).mean()

    def lower(x: PyTree, y: PyTree, batch: PyTree) -> jax.Array:
        rows, weights = batch

        def one(y: PyTree, w: jax.Array) -> jax.Array:
            value = w @ _each(loss, "loss", y, rows, n)
            return value if penalty is None else value + _called("penalty(x, y)", penalty, x, y)

        return jax.vmap(one)(y, weights.T).sum()

    stacked_prox = None
    if prox is not None:
        stacked_prox = lambda x, y, scaling: jax.vmap(lambda y: prox(x, y, scaling))(y)  # noqa: E731
    problem: Problem = Problem(upper, lower, (samples, held_out.T), (samples, trained.T), prox_lower=stacked_prox)
    return problem, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), y0)


def _fold_weights(folds: Any, n: int, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the held-out and of the training samples, (folds, n): each row sums to one."""
    if not isinstance(folds, (int, np.integer)) and not isinstance(folds, Iterable):
        raise SplitError(
            f"cross_validation(folds={folds!r}): a whole number of folds, or pairs (training, held-out) of indices, "
            "as KFold(5).split(X) gives."
        )
    if isinstance(folds, (int, np.integer)):
        if not 2 <= folds <= n:
            raise SplitError(f"cross_validation(folds={folds}): at least 2 folds, and at most the {n} samples.")
        order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)
        pairs: list[Any] = [(np.setdiff1d(order, part), part) for part in np.array_split(order, folds)]
    else:
        pairs = list(folds)
        if not pairs:
            raise SplitError(
                "cross_validation(folds=[]): at least one pair of training and held-out samples is needed."
            )
    rows = np.zeros((2, len(pairs), n))
    for k, (train, valid) in enumerate(pairs):
        for row, which, name in ((rows[0, k], valid, "held-out"), (rows[1, k], train, "training")):
            at = np.asarray(which)
            at = np.flatnonzero(at) if at.dtype == bool and at.shape == (n,) else at.astype(int)
            if at.size and not (-n <= at.min() and at.max() < n):
                raise SplitError(
                    f"cross_validation: fold {k} has the {name} sample {at.max() if at.max() >= n else at.min()}, and "
                    f"there are {n}: the pairs hold indices of samples, or masks of them all."
                )
            np.add.at(row, at, 1.0)  # a sample that a bootstrap draws twice counts twice
            if not row.any():
                raise SplitError(f"cross_validation: fold {k} has no {name} samples.")
            row /= row.sum()
        if np.any((rows[0, k] > 0) & (rows[1, k] > 0)):
            raise SplitError(f"cross_validation: fold {k} trains on samples that it holds out.")
    return rows[0], rows[1]


def _each(fn: Callable[..., jax.Array], name: str, y: PyTree, rows: PyTree, n: int) -> jax.Array:
    values = _called(f"{name}(y, samples)", fn, y, rows)
    if jnp.shape(values) != (n,):
        raise SplitError(
            f"cross_validation: {name}(y, samples) returned the shape {list(jnp.shape(values))}; it returns the loss "
            f"of each sample, ({n},), without a mean."
        )
    return values


def _called(how: str, fn: Callable[..., jax.Array], *args: PyTree) -> jax.Array:
    try:
        return fn(*args)
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        raise SplitError(f"cross_validation calls {how}, and this function takes other arguments: {error}.") from error
