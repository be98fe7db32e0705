"""Architecture search over real images: mixture weights above, the supernet's parameters below.

    images = supernet.fashion_mnist_small()
    app = supernet.search(images.search_train, images.search_validation)
    solution = solve(app.problem, app.x0, app.y0, solvers.DARTS(order=1), steps=900, metrics=app.metrics)
    genotype = app.genotype(solution.x)
    accuracy = supernet.Retrainer(images.train, images.test, app.network)(genotype)

Both levels, and tests, normalise by the statistics of the batch at hand, so that a loss is a function of parameters and
batch alone. Drop-path and DARTS-'s auxiliary skip follow the step that comes with the batch (`data.Keyed`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from bilevel import Problem, data, regularizers
from bilevel.applications.application import Application
from bilevel.applications.layers import check_numbers, share_right
from bilevel.applications.supernet.genotype import Genotype, derive
from bilevel.applications.supernet.images import Split
from bilevel.applications.supernet.network import Supernet
from bilevel.applications.supernet.spaces import SearchSpace, darts_space
from bilevel.integrations.flax import Apply, from_nnx

PyTree = Any

small_s2 = darts_space("S2", ("skip_connect", "sep_conv_3x3"), nodes=2)
"""S2 on cells of two nodes: five edges, 20 architecture weights with those of the reduction cell."""


def small_network(
    seed: int = 0, space: SearchSpace = small_s2, *, image: tuple[int, int, int] = (16, 16, 1), **changes: Any
) -> Supernet:
    """Normal, reduction, normal cell (one a stage where reductions are fixed), 8 channels, 8 x 8 pixels at most.

    Args:
        seed: of the parameters.
        space: the search space.
        image: (rows, columns, channels).
        changes: other arguments of `Supernet`.
    """
    options: dict[str, Any] = {"channels": 8, "stem_stride": 2 if image[0] > 8 else 1, "scan": None}
    options |= {"cells": 1} if space.reduce is None else {"cells": 3, "reductions": (1,)}
    return Supernet(space, **{**options, **changes}, image=image, rngs=nnx.Rngs(seed))


def _unkeyed(batch: Any) -> tuple[Any, Any]:
    """A batch and its step's key; None where there is none."""
    if len(batch) == 2 and isinstance(batch[1], data.StepKey):
        return batch
    return batch, None


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Search(Application[dict[str, Array], PyTree]):
    """The problem that `search` makes; x are the architecture weights, y the supernet's parameters.

    Attributes:
        space: the search space.
        network: `seed -> Supernet`.
        apply: `(y, weights, images, ...) ->` logits.
        training_loss: `(weights, y, batch) ->` mean cross-entropy with these mixture weights, for
            `regularizers.perturbed`.
        validation_loss: `(x, y, batch) ->` the upper loss, for `curvature.dominant_eigenvalue`.
        accuracy: `(x, y, (images, labels)) ->` share of right answers of the supernet.
    """

    space: SearchSpace
    network: Callable[[int], Supernet]
    apply: Apply
    training_loss: Callable[..., Array]
    validation_loss: Callable[..., Array]
    accuracy: Callable[..., Array]
    name: str = "architecture search"
    description: str = "How far each edge of a cell uses each operation; the network that mixes all of them."
    source: str = 'Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019'

    def start(self, seed: int) -> tuple[dict[str, Array], PyTree]:
        """(x0, y0) of another seed."""
        return self.space.alphas(seed), from_nnx(self.network(seed))[0]

    def genotype(self, x: Mapping[str, Any], threshold: float | None = None) -> Genotype:
        """The architecture that x points at (`derive`)."""
        return derive(
            self.space, self.space.weights({name: jnp.asarray(a) for name, a in x.items()}), threshold=threshold
        )

    def with_drop_path(self, drop_path: float) -> Problem:
        """The problem with another largest drop-path probability: a number in the data, and the same compiled program.

        Raises:
            ValueError: the search was made without drop-path.
        """

        def changed(keyed: Any) -> Any:
            images, labels, *rest = keyed.arrays
            if not rest:
                raise ValueError("This search has no drop-path: search(..., drop_path=0.0, steps=...).")
            new = np.full(len(labels), _probability(drop_path), np.asarray(rest[0]).dtype)
            return data.Keyed(data.Minibatches((images, labels, new), keyed.size))

        problem = self.problem
        return dataclasses.replace(
            problem, upper_data=changed(problem.upper_data), lower_data=changed(problem.lower_data)
        )


def search(
    train: Split,
    validation: Split,
    network: Callable[[int], Supernet] = small_network,
    *,
    test: Split | None = None,
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

    L2 terms are the optimisers': of y `lower.MomentumSGD(weight_decay=...)`, of x `optimizers.coupled_adam()`.

    Args:
        train, validation: images (n, rows, columns, channels) and labels (n,).
        network: `seed -> Supernet`; by default `small_network` for these images.
        test: the same, for the metric "accuracy"; by default the validation set.
        batch: samples per batch, of either level.
        seed: of x0 and y0.
        drop_path: the largest probability to drop an edge, per sample, in both levels; it grows linearly over the
            epochs from 0 (R-DARTS). 0.0 keeps the code for `with_drop_path`; None: no drop-path.
        auxiliary_skip: DARTS-: an auxiliary skip connection whose weight falls from 1 to 0, linearly in the epochs; its
            network has `auxiliary_skip=True`.
        steps: of each level in total, for the two schedules; each level has epochs of its own length.
        perturb: SmoothDARTS: train y under perturbed mixture weights (`regularizers.perturbed`), with `radius`; not
            together with drop-path or the auxiliary skip.
        radius: a number or a function of the lower step.
        penalties: pairs (function of x, strength), see `regularizers.penalised`.

    Raises:
        ValueError: a schedule without `steps`, parts that do not go together, labels beyond the network's classes.
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
    for name, split in (("training", train), ("validation", validation), ("test", test or validation)):
        check_split(name, split, net.classes)
    kind = jax.tree.leaves(y0)[0].dtype  # images may be bytes
    noisy = any("noise" in names for cell in space.cells().values() for names in cell.operations)

    def loss(weights: Any, y: PyTree, batch: Any, n: int) -> Array:
        (images, labels, *rest), key = _unkeyed(batch)
        options: dict[str, Any] = {}
        if key is not None and scheduled:
            epochs = max(2, steps // (n // size))  # type: ignore[operator]
            done = jnp.minimum((key.step // (n // size)) / (epochs - 1), 1.0).astype(kind)
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
        # Each chunk is normalised by its own statistics.
        classify = lambda images: apply(y, space.weights(x), images, key=jax.random.key(0))  # noqa: E731
        return share_right(classify, *batch, rest=False)

    smoothed = lower
    if perturb is not None:
        smoothed = regularizers.perturbed(
            training_loss, radius, adversarial=perturb == "adversarial", transform=space.weights
        )
    problem = Problem(
        upper=regularizers.penalised(validation_loss, *penalties) if penalties else validation_loss,
        lower=smoothed,
        upper_data=data.Keyed(data.Minibatches(_with(validation, drop_path, kind), size)),
        lower_data=data.Keyed(data.Minibatches(_with(train, drop_path, kind), size)),
    )
    return Search(
        problem,
        space.alphas(seed),
        y0,
        {"accuracy": (accuracy, validation if test is None else test)},
        space=space,
        network=network,
        apply=apply,
        training_loss=training_loss,
        validation_loss=validation_loss,
        accuracy=accuracy,
    )


def check_split(name: str, split: Split, classes: int) -> None:
    """Refuse images and labels that disagree in number, and labels that the network has no logit for."""
    images, labels = split
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{len(images)} {name} images were given with {len(labels)} labels; give one for each.")
    cure = "Give the network so many, `lambda seed: small_network(seed, classes=...)`."
    check_numbers(f"The {name} labels", labels, classes, "classes", cure)


def _probability(drop_path: float) -> float:
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path={drop_path}: it is a probability, from 0 to below 1.")
    return drop_path


def _with(split: Split, drop_path: float | None, kind: Any) -> tuple[np.ndarray, ...]:
    images, labels = split
    if drop_path is None:
        return images, labels
    # A number per sample, so that it is part of the batch, and another number no other program.
    return images, labels, np.full(len(labels), _probability(drop_path), kind)
