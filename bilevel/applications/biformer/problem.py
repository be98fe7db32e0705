"""Bilevel problems whose lower level trains a small BiFormer: cleaning of labels, and fine-tuning.

The lower variable is the network's parameters as a plain dictionary. Both levels normalise by the statistics of their
own batch, so that a loss is a function of parameters and batch alone and no running statistics travel with the
variables; `calibrated` gives a trained network the statistics of a set of images for its use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from bilevel import Problem, data
from bilevel.applications.application import Application
from bilevel.applications.biformer.model import BiFormer
from bilevel.applications.layers import share_right
from bilevel.integrations import flax
from bilevel.integrations.flax import Apply, from_nnx

PyTree = Any
Split = tuple[np.ndarray, np.ndarray]

CLASSES = 10


def small_biformer(num_classes: int = CLASSES, *, seed: int = 0, **changes: Any) -> BiFormer:
    """A BiFormer for grey images of 28 x 28 pixels, shown to it at twice that size (`prepare`).

    Its first stage has 14 x 14 tokens in 7 x 7 regions of 2 x 2 tokens, 4 x 4 pixels of the image, of which each region
    looks at 4; its second 7 x 7 tokens, each a region, of which each looks at 8. The rest is full attention.
    """
    config = {
        "depth": (1, 1, 1, 1),
        "embed_dim": (8, 16, 32, 32),
        "in_chans": 1,
        "head_dim": 8,
        "topks": (4, 8, -2, -2),
        "n_win": 7,
        "norm_momentum": 1.0,
    }
    return BiFormer(**{**config, **changes}, num_classes=num_classes, rngs=nnx.Rngs(seed))  # type: ignore[arg-type]


def prepare(images: Array) -> Array:
    """Grey images, bytes (batch, 28, 28), as the network takes them: -1 to 1, pixels doubled, (batch, 56, 56, 1)."""
    x = images.astype(jnp.float32) / 127.5 - 1.0
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[..., None]


def calibrated(apply: Apply, y: PyTree, images: Array) -> Callable[..., Any]:
    """The network with parameters y, normalising by the statistics of `images`: a function of prepared images."""
    fixed = flax.calibrated(apply, y, prepare(images), train=True)
    return lambda x, **options: fixed(y, x, **options)


def _cross_entropy(apply: Apply, y: PyTree, images: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply(y, prepare(images), train=True), labels)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Cleaning(Application[Array, PyTree]):
    """The problem that `cleaning` makes; x0 are weights of 1/2, y0 the network's initial parameters.

    Attributes:
        apply: the network as a function of its parameters.
        weights: `x ->` the weight in (0, 1) of every training sample.
        accuracy: `(x, y, (images, labels)) ->` share of right answers.
    """

    apply: Apply
    weights: Callable[[Array], Array]
    accuracy: Callable[..., Array]
    name: str = "data cleaning"
    description: str = "A weight for each training label, or class of labels; a BiFormer trained under these weights."
    source: str = 'Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017'


def cleaning(
    train: Split,
    clean: Split,
    *,
    test: Split | None = None,
    model: BiFormer | None = None,
    weigh: Literal["samples", "classes"] = "samples",
    batch: int = 128,
    decay: float = 1e-4,
) -> Cleaning:
    """Learn how far to trust each training label, or each class of labels, from a small set of clean ones:

        min over x   F(x, y) = mean over clean batch of CE(y; image, label)
        s.t.         y in argmin of f(x, y) = mean over batch of sigmoid(x_i) CE(y; image_i, label_i) + decay/2 |y|^2

    Args:
        train: images, bytes (n, 28, 28), and labels (n,), some of which are wrong.
        clean: the same, fewer and right.
        test: the same, for the metric "accuracy"; by default the clean ones.
        model: the network, `small_biformer()` by default.
        weigh: a weight per training sample, or per given label.
        batch: samples per batch, of either level.
        decay: weight decay of the lower level.
    """
    images, labels = train
    network = small_biformer() if model is None else model
    y0, apply = from_nnx(network)
    n, by_class = len(labels), weigh == "classes"
    groups = np.asarray(labels, np.int32) if by_class else np.arange(n, dtype=np.int32)

    def upper(x: Array, y: PyTree, batch: Any) -> Array:
        return _cross_entropy(apply, y, *batch).mean()

    def lower(x: Array, y: PyTree, batch: Any) -> Array:
        images, labels, group = batch
        loss = (jax.nn.sigmoid(x[group]) * _cross_entropy(apply, y, images, labels)).mean()
        return loss + 0.5 * decay * optax.tree.norm(y, squared=True)

    reference = np.asarray(images[:500])

    def accuracy(x: Array, y: PyTree, batch: Any) -> Array:
        network = calibrated(apply, y, jnp.asarray(reference))
        return share_right(lambda images: network(prepare(images)), *batch)

    problem = Problem(
        upper=upper,
        lower=lower,
        upper_data=data.Minibatches(clean, min(batch, len(clean[1]))),
        lower_data=data.Minibatches((images, labels, groups), min(batch, n)),
    )
    x0 = jnp.zeros(int(groups.max()) + 1)
    metrics = {"accuracy": (accuracy, clean if test is None else test)}
    weights = lambda x: jax.nn.sigmoid(x[groups])  # noqa: E731
    return Cleaning(problem, x0, y0, metrics, apply=apply, weights=weights, accuracy=accuracy)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FineTuning(Application[dict[str, dict[str, Array]], PyTree]):
    """The problem that `fine_tuning` makes.

    x0 has log rate and log decay per layer, {"rate": {layer: scalar}, "decay": {layer: scalar}}; y0, zeros, is the
    distance from the pretrained parameters in units of the rates.

    Attributes:
        parameters: `(x, y) ->` the network's parameters.
        accuracy: `(x, y, (images, labels)) ->` share of right answers.
    """

    parameters: Callable[[Any, PyTree], PyTree]
    accuracy: Callable[..., Array]
    name: str = "fine-tuning"
    description: str = "A learning rate and a weight decay per layer; a pretrained network fine-tuned with them."
    source: str = (
        'Maclaurin et al., "Gradient-based Hyperparameter Optimization through Reversible Learning", ICML 2015'
    )


def layer_names(params: dict[str, Any]) -> tuple[str, ...]:
    """The layers that have hyperparameters of their own: the entries of the parameter dictionary."""
    return tuple(params)


def fine_tuning(
    apply: Apply,
    pretrained: dict[str, Any],
    train: Split,
    validation: Split,
    *,
    test: Split | None = None,
    rate: float = 1.0,
    decay: float = 1e-2,
) -> FineTuning:
    """Choose per-layer learning rates and weight decays for fine-tuning by the loss on a validation set.

    With layers l, pretrained parameters p_l, and x = (log rates r, log decays d), gradient descent is done in y, where

        parameters_l = p_l + exp(r_l) y_l
        min over x   F(x, y) = CE(parameters; validation)
        s.t.         y follows from  f(x, y) = CE(parameters; train) + 1/2 sum_l exp(d_l) |exp(r_l) y_l|^2,   y_0 = 0

    so that a step of size a in y is one of size a exp(2 r_l) in the parameters of layer l. Rates matter to a run of
    finitely many steps and not to a minimum: differentiate the run (`solvers.ITD`, with `warm_start=False`).

    Args:
        apply, pretrained: of the network, from `from_nnx`.
        train, validation: images, bytes (n, 28, 28), and labels (n,); full batches.
        test: the same, for the metric "accuracy"; by default the validation set.
        rate, decay: where all rates and decays start.
    """
    layers = layer_names(pretrained)

    def parameters(x: Any, y: PyTree) -> PyTree:
        return {
            name: jax.tree.map(lambda p, z, name=name: p + jnp.exp(x["rate"][name]) * z, pretrained[name], y[name])
            for name in layers
        }

    def upper(x: Any, y: PyTree, batch: Any) -> Array:
        return _cross_entropy(apply, parameters(x, y), *batch).mean()

    def lower(x: Any, y: PyTree, batch: Any) -> Array:
        penalty = sum(
            jnp.exp(x["decay"][name] + 2 * x["rate"][name]) * optax.tree.norm(y[name], squared=True) for name in layers
        )
        return _cross_entropy(apply, parameters(x, y), *batch).mean() + 0.5 * penalty

    def accuracy(x: Any, y: PyTree, batch: Any) -> Array:
        network = calibrated(apply, parameters(x, y), jnp.asarray(train[0]))
        return share_right(lambda images: network(prepare(images)), *batch)

    x0 = {
        "rate": {name: jnp.asarray(np.log(rate), jnp.float32) for name in layers},
        "decay": {name: jnp.asarray(np.log(decay), jnp.float32) for name in layers},
    }
    problem = Problem(upper=upper, lower=lower, upper_data=validation, lower_data=train)
    y0 = jax.tree.map(jnp.zeros_like, pretrained)
    metrics = {"accuracy": (accuracy, validation if test is None else test)}
    return FineTuning(problem, x0, y0, metrics, parameters=parameters, accuracy=accuracy)
