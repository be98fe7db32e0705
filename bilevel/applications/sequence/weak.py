"""Weak labels: which of them to trust, learnt from a few labels by people, above any classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel import Problem, data
from bilevel.applications.application import Application
from bilevel.applications.layers import check_numbers
from bilevel.applications.sequence.attentive import cross_entropy

PyTree = Any
Classifier = Callable[[PyTree, Any], Array]
Loss = Callable[[PyTree, Any], Array]
Labelled = tuple[Any, Any]


def answers(logits: Array) -> Array:
    """The classes of logits (n, 1) or (n, classes)."""
    return (logits[..., 0] > 0).astype(jnp.int32) if logits.shape[-1] == 1 else logits.argmax(-1)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Weighted(Application[Array, PyTree]):
    """The problem that `weighted` makes; all weights start at 1/2.

    Attributes:
        weights: `x ->` the weight in (0, 1) of every training sample, (n,).
    """

    weights: Callable[[Array], Array]
    name: str = "weighted samples"
    description: str = "A weight for each sample, or a model of weights; a model trained under these weights."
    source: str = 'Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017'


def weighted(
    loss: Loss,
    y0: PyTree,
    train: Any,
    clean: Any,
    *,
    features: Any = None,
    clean_loss: Loss | None = None,
    batch: int | None = None,
    clean_batch: int | None = None,
    decay: float = 0.0,
    metrics: Mapping[str, Any] | None = None,
) -> Weighted:
    """Learn how much each training sample should count, from samples that are known to be good:

        min over x   F(x, y) = mean over clean samples of clean_loss(y; sample)
        s.t.         y in argmin of f(x, y) = mean_i w_i(x) loss(y; sample_i) + decay/2 |y|^2

    with w_i = sigmoid(x_i), a weight per sample, or w_i = sigmoid(features_i . x). With the columns of an identity
    (`one_hot` of where a sample is from) as features, x is a weight per source.

    Args:
        loss: `(y, samples) -> (n,)`.
        y0: where the model's parameters start.
        train, clean: pytrees of arrays with one sample per row.
        features: (n, k) of the training samples; None: a weight for each.
        clean_loss: the same for clean samples, which may be of another kind; by default `loss`.
        batch, clean_batch: samples per batch of the lower and upper level; None: all.
        decay: of the lower level's parameters.
        metrics: see `Application`.

    Raises:
        ValueError: samples that disagree in number, features of another shape or without a value.
    """
    n, m = _count(train, "training"), _count(clean, "clean")
    if features is None:
        known, x0 = np.arange(n, dtype=np.int32), jnp.zeros(n)
    else:
        known = np.asarray(features)
        if known.ndim != 2 or len(known) != n or not known.size:
            raise ValueError(f"Features of shape {known.shape} were given for {n} training samples; give ({n}, k).")
        if not np.isfinite(known).all():
            raise ValueError(
                f"The features of samples {_first(np.any(~np.isfinite(known), axis=1))} have no finite value."
            )
        x0 = jnp.zeros(known.shape[-1])
        known = known.astype(x0.dtype)
    if not decay >= 0:
        raise ValueError(f"decay={decay} was given; it is at least 0.")
    judged = loss if clean_loss is None else clean_loss

    def weigh(x: Array, known: Array) -> Array:
        return jax.nn.sigmoid(x[known] if features is None else known @ x)

    def upper(x: Array, y: PyTree, samples: Any) -> Array:
        return judged(y, samples).mean()

    def lower(x: Array, y: PyTree, batch: Any) -> Array:
        samples, known = batch
        return _decayed((weigh(x, known) * loss(y, samples)).mean(), y, decay)

    def drawn(arrays: Any, size: int | None, count: int) -> Any:
        return arrays if size is None or size >= count else data.Minibatches(arrays, size)

    problem = Problem(
        upper=upper,
        lower=lower,
        upper_data=drawn(clean, clean_batch, m),
        lower_data=drawn((train, known), batch, n),
    )
    return Weighted(problem, x0, y0, metrics or {}, weights=lambda x: weigh(x, jnp.asarray(known)))


def _decayed(loss: Array, y: PyTree, decay: float) -> Array:
    return loss + 0.5 * decay * optax.tree.norm(y, squared=True) if decay else loss


def one_hot(sources: Any, count: int | None = None) -> np.ndarray:
    """Whole numbers from 0 on, (n,), as features (n, count) of `weighted` and `weak_labels`: a weight per source."""
    sources = np.asarray(sources)
    if sources.ndim != 1 or not np.issubdtype(sources.dtype, np.integer) or not sources.size or sources.min() < 0:
        raise ValueError(
            f"Sources of type {sources.dtype}{list(sources.shape)} were given; give whole numbers from 0 on."
        )
    count = int(sources.max()) + 1 if count is None else count
    check_numbers("The sources", sources, count, "of them")
    return np.eye(count, dtype=np.float32)[sources]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class WeakLabels(Weighted):
    """The problem that `weak_labels` makes; all weights start at 1/2.

    Attributes:
        accuracy: `(x, y, (inputs, labels)) ->` share of right answers; also among the metrics.
        balanced_accuracy: the same, averaged over the classes that occur.
    """

    accuracy: Callable[..., Array]
    balanced_accuracy: Callable[..., Array]
    name: str = "weak labels"
    description: str = "A weight for each weak label, or a model of weights; a classifier trained under these weights."


def weak_labels(
    classify: Classifier,
    y0: PyTree,
    train: Labelled,
    clean: Labelled,
    *,
    test: Labelled | None = None,
    features: Any = None,
    judge: Classifier | None = None,
    batch: int | None = None,
    clean_batch: int | None = None,
    decay: float = 0.0,
) -> WeakLabels:
    """Learn how far to trust each weak label from a few labels by people:

        min over x   F(x, y) = mean over clean samples of CE(y; input, label)
        s.t.         y in argmin of f(x, y) = mean_i w_i(x) CE(y; input_i, weak label_i) + decay/2 |y|^2

    with w_i = sigmoid(x_i), a weight per example, or w_i = sigmoid(features_i . x), a small model of what the weak
    rule knows of the example: its score, the label that it gives. The second has few unknowns, and weighs examples that
    were not in training too.

        app = weak_labels(linear_classifier, grams.init(), (inputs, weak), (few_inputs, human))
        solution = solve(app.problem, app.x0, app.y0, metrics=app.metrics)

    Args:
        classify: `(y, inputs) -> logits`, (n, 1) for two classes or (n, classes).
        y0: where its parameters start.
        train: inputs, any pytree of arrays with n samples, and weak labels (n,), whole numbers.
        clean: the same, fewer, with labels by people.
        test: the same, for the metrics; by default the clean ones.
        features: (n, k), of the training samples; None: a weight for each.
        judge: the classifier of clean and test inputs where these are of another kind (`in_documents`); by default
            `classify`.
        batch, clean_batch: samples per batch of the lower and upper level; None: all.
        decay: of the lower level's parameters.

    Raises:
        ValueError: labels or features that are not one per sample, labels that are no whole numbers from 0 on or beyond
            the classifier's classes, or features without a value; named.
    """
    train, clean = _checked(train, "training"), _checked(clean, "clean")
    test = clean if test is None else _checked(test, "test")
    judge = classify if judge is None else judge
    for what, samples, by in (("training", train, classify), ("clean", clean, judge), ("test", test, judge)):
        logits = jax.eval_shape(by, y0, samples[0])
        check_numbers(
            f"The {what} labels", samples[1], max(2, logits.shape[-1]), "classes", "Make the classifier for so many."
        )
    entropy = lambda classify: lambda y, samples: cross_entropy(classify(y, samples[0]), samples[1])  # noqa: E731

    def accuracy(x: Array, y: PyTree, batch: Any) -> Array:
        return (answers(judge(y, batch[0])) == batch[1]).mean()

    def balanced_accuracy(x: Array, y: PyTree, batch: Any) -> Array:
        logits, labels = judge(y, batch[0]), jnp.asarray(batch[1])
        of_class = jax.nn.one_hot(labels, max(2, logits.shape[-1]))
        counts = of_class.sum(0)
        right = of_class.T @ (answers(logits) == labels).astype(of_class.dtype)
        return (right / jnp.maximum(counts, 1)).sum() / (counts > 0).sum()

    app = weighted(
        entropy(classify),
        y0,
        train,
        clean,
        features=features,
        clean_loss=entropy(judge),
        batch=batch,
        clean_batch=clean_batch,
        decay=decay,
        metrics={"accuracy": (accuracy, test), "balanced accuracy": (balanced_accuracy, test)},
    )
    return WeakLabels(
        app.problem,
        app.x0,
        app.y0,
        app.metrics,
        weights=app.weights,
        accuracy=accuracy,
        balanced_accuracy=balanced_accuracy,
    )


def by_document(inputs: Any, documents: Any) -> dict[str, Any]:
    """Sentences arranged by document: `{"sentences": each array as (documents, most, ...), "count": (documents,)}`.

    Args:
        inputs: arrays (n, ...) of sentences.
        documents: which each is from, whole numbers (n,); the documents come in the order of these numbers.

    Where a document has fewer sentences than others its first one stands again: `in_documents` leaves it out.

    Raises:
        ValueError: not one document per sentence.
    """
    documents = np.asarray(documents)
    counts = sorted({len(np.asarray(leaf)) for leaf in jax.tree.leaves(inputs)})
    if documents.ndim != 1 or counts != [len(documents)] or not np.issubdtype(documents.dtype, np.integer):
        raise ValueError(
            f"Sentences of {counts} rows were given with documents of type {documents.dtype}{list(documents.shape)}; "
            "give the number of the document of each sentence."
        )
    _, where, count = np.unique(documents, return_inverse=True, return_counts=True)
    order = np.argsort(where, kind="stable")
    place = np.arange(len(where)) - np.repeat(np.cumsum(count) - count, count)

    def arrange(a: Any) -> np.ndarray:
        a = np.asarray(a)
        first = order[np.cumsum(count) - count]
        out = np.repeat(a[first][:, None], count.max(), 1)
        out[where[order], place] = a[order]
        return out

    return {"sentences": jax.tree.map(arrange, inputs), "count": count.astype(np.int32)}


def in_documents(classify: Classifier) -> Classifier:
    """A document's classifier: the mean of its sentences' logits, for inputs as `by_document` arranges them."""

    def pooled(y: PyTree, inputs: Any) -> Array:
        sentences, count = inputs["sentences"], inputs["count"]
        documents, most = jax.tree.leaves(sentences)[0].shape[:2]
        logits = classify(y, jax.tree.map(lambda a: a.reshape(documents * most, *a.shape[2:]), sentences))
        real = (jnp.arange(most) < count[:, None])[..., None]
        logits = jnp.where(real, logits.reshape(documents, most, -1), 0)
        return logits.sum(1) / jnp.maximum(count, 1)[:, None].astype(logits.dtype)

    return pooled


def inherited_labels(
    classify: Classifier,
    y0: PyTree,
    train: tuple[Any, Any, Any],
    validation: tuple[Any, Any, Any],
    *,
    test: tuple[Any, Any, Any] | None = None,
    features: Any = None,
    batch: int | None = None,
    decay: float = 0.0,
) -> WeakLabels:
    """Sentences that inherit their document's label, weighed by what is right for other documents as a whole.

    `weak_labels` with each sentence's weak label that of its document, and above it whole documents, whose logit is the
    mean of their sentences'. No sentence has a label of its own.

    Args:
        classify: of sentences, `(y, inputs) -> logits`.
        y0: where its parameters start.
        train, validation, test: inputs of sentences, arrays (n, ...); the document of each, whole numbers (n,); the
            labels of the documents, whole numbers, in the order of the documents' numbers.
        features, batch, decay: see `weak_labels`.
    """
    inputs, documents, labels = train
    _, which = np.unique(np.asarray(documents), return_inverse=True)
    _one_label_each(which, labels, "training")

    def whole(samples: tuple[Any, Any, Any] | None, what: str) -> Labelled | None:
        if samples is None:
            return None
        _one_label_each(np.unique(np.asarray(samples[1]), return_inverse=True)[1], samples[2], what)
        return by_document(*samples[:2]), samples[2]

    clean = whole(validation, "validation")
    assert clean is not None
    return weak_labels(
        classify,
        y0,
        (inputs, np.asarray(labels)[which]),
        clean,
        test=whole(test, "test"),
        features=features,
        judge=in_documents(classify),
        batch=batch,
        decay=decay,
    )


def _one_label_each(which: np.ndarray, labels: Any, what: str) -> None:
    if np.shape(labels) != (which.max() + 1,):
        raise ValueError(
            f"{what.capitalize()} labels of shape {np.shape(labels)} were given for {which.max() + 1} documents; give "
            "one per document, in the order of the documents' numbers."
        )


def _count(samples: Any, what: str) -> int:
    counts = sorted({np.shape(leaf)[0] if np.ndim(leaf) else -1 for leaf in jax.tree.leaves(samples)})
    if len(counts) != 1 or counts[0] < 1:
        raise ValueError(
            f"{what.capitalize()} arrays of {counts} samples were given; give one sample per row, at least one."
        )
    return counts[0]


def _first(wrong: Any) -> list[int]:
    return np.flatnonzero(wrong)[:8].tolist()


def _checked(samples: Labelled, what: str) -> tuple[Any, np.ndarray]:
    inputs, labels = samples
    given = np.asarray(labels)
    counts = sorted({np.shape(leaf)[0] if np.ndim(leaf) else -1 for leaf in jax.tree.leaves(inputs)})
    if given.ndim != 1 or not len(given) or counts != [len(given)]:
        raise ValueError(
            f"{what.capitalize()} inputs of {counts} samples were given with labels of shape {given.shape}; give one "
            "label per sample, and at least one sample."
        )
    if not (np.issubdtype(given.dtype, np.integer) or given.dtype == bool):
        raise ValueError(
            f"{what.capitalize()} labels of type {given.dtype} were given; give whole numbers, classes from 0 on. "
            "(A score's sign is `(score > 0).astype(int)`.)"
        )
    if given.min() < 0:
        raise ValueError(
            f"{what.capitalize()} labels from {given.min()} were given, first at {_first(given < 0)}; classes count "
            "from 0."
        )
    return inputs, given.astype(np.int32)


def auc(scores: Any, wrong: Any) -> float:
    """How often a wrong one has a higher score than a right one (area under the ROC curve; ties count half).

    Args:
        scores: (n,), for instance minus the weights.
        wrong: (n,), booleans, some true and some false.
    """
    scores, wrong = np.asarray(scores, np.float64), np.asarray(wrong, bool)
    if scores.shape != wrong.shape or scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"Scores of shape {scores.shape} and marks of {wrong.shape} were given; give (n,) finite.")
    positive, negative = int(wrong.sum()), int((~wrong).sum())
    if not positive or not negative:
        raise ValueError(f"{positive} wrong and {negative} right samples were given; some of each are needed.")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[wrong].sum() - positive * (positive + 1) / 2) / (positive * negative))
