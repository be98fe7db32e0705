"""What a detector with distribution boxes is trained by: task-aligned assignment, and the loss of box, class and bins.

Anchors are the centres of the cells of all levels, in pixels. At each the network says logits of the classes and, for
each of the four sides, a distribution over R bins: the side's distance in units of the stride is the expectation.
Everything is in static shapes: A anchors, M annotated boxes an image of which `mask` says which are there.

Sources: Feng et al., "TOOD: Task-aligned One-stage Object Detection", ICCV 2021 (assignment); Li et al., "Generalized
Focal Loss", NeurIPS 2020 (distributions); Zheng et al., "Distance-IoU Loss", AAAI 2020 (CIoU).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bilevel import state
from bilevel.applications.detection.boxes import Overlap, from_distances, overlap, to_distances


@state
class Predictions:
    """What a detector says of a batch of images.

    bins: logits of the distances, (batch, A, 4, R). logits: of the classes, (batch, A, C).
    points: the anchors, (A, 2) in pixels. strides: of their levels, (A, 1).
    """

    bins: Array
    logits: Array
    points: Array
    strides: Array

    @property
    def units(self) -> Array:
        """The boxes in units of their stride, (batch, A, 4)."""
        distances = jax.nn.softmax(self.bins, axis=-1) @ jnp.arange(self.bins.shape[-1], dtype=self.bins.dtype)
        return from_distances(self.points / self.strides, distances)

    @property
    def boxes(self) -> Array:
        """The boxes in pixels, (batch, A, 4)."""
        return self.units * self.strides

    @property
    def scores(self) -> Array:
        """Of the classes, between 0 and 1, (batch, A, C)."""
        return jax.nn.sigmoid(self.logits)


def anchors(grids: Sequence[tuple[int, int]], strides: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The centres (i + 1/2) s of the cells of each level, row by row, (A, 2) as (x, y), and the strides, (A, 1)."""
    points = []
    for (rows, columns), stride in zip(grids, strides, strict=True):
        y, x = np.mgrid[:rows, :columns] + 0.5
        points.append(stride * np.stack([x, y], axis=-1).reshape(-1, 2))
    sizes = [np.full((rows * columns, 1), s) for (rows, columns), s in zip(grids, strides, strict=True)]
    return np.concatenate(points).astype(np.float32), np.concatenate(sizes).astype(np.float32)


def from_maps(maps: Sequence[Array], strides: Sequence[int], bins: int) -> Predictions:
    """The predictions that stand in a detector's raw maps.

    Args:
        maps: for each level (batch, rows, columns, 4 R + C): the four sides' bins, then the classes.
        strides: of the levels, in pixels.
        bins: R.
    """
    if not maps or len(maps) != len(strides):
        raise ValueError(f"{len(maps)} maps and {len(strides)} strides: give one stride for each map.")
    width = maps[0].shape[-1]
    if width <= 4 * bins:
        raise ValueError(f"A map has {width} channels; {bins} bins for each of four sides and the classes need more.")
    flat = jnp.concatenate([m.reshape(m.shape[0], -1, width) for m in maps], axis=1)
    points, sizes = anchors([(m.shape[1], m.shape[2]) for m in maps], strides)
    return Predictions(
        flat[..., : 4 * bins].reshape(*flat.shape[:2], 4, bins),
        flat[..., 4 * bins :],
        jnp.asarray(points, flat.dtype),
        jnp.asarray(sizes, flat.dtype),
    )


@state
class Targets:
    """What each anchor should say; constants to every derivative.

    labels: (batch, A). boxes: (batch, A, 4) in pixels. scores: (batch, A, C). foreground: (batch, A), whether an
    anchor has a box. index: (batch, A), which box (0 in the background). Labels and boxes of the background are those
    of box 0; its scores are 0.
    """

    labels: Array
    boxes: Array
    scores: Array
    foreground: Array
    index: Array


def task_aligned(
    scores: Array,
    boxes: Array,
    points: Array,
    batch: Mapping[str, Any],
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Targets:
    """Task-aligned assignment: give each annotated box the anchors that already say its class and its place best.

        m = score of the box's class^alpha  max(CIoU(box, predicted box), 0)^beta    for anchors inside the box, else 0

    A box has its topk anchors by m that lie inside it; an anchor that several boxes have goes to that of highest CIoU
    among those it lies in. The target is the one-hot label times m max CIoU / max m, both maxima over the box's
    anchors. No derivative goes through.

    Args:
        scores: predicted, (batch, A, C), between 0 and 1.
        boxes: predicted, (batch, A, 4), in pixels.
        points: the anchors, (A, 2).
        batch: "boxes" (batch, M, 4), "classes" (batch, M), "mask" (batch, M), and perhaps "crowd" (batch, M): a box
            around many has no anchors. Values are not looked at (`checked` does): a box with swapped corners, NaN or an
            unknown class counts as none.
        topk, alpha, beta: as said.
    """
    scores, boxes, points = lax.stop_gradient((scores, boxes, points))
    given, labels, mask = lax.stop_gradient((batch["boxes"], batch["classes"], batch["mask"]))
    mask = mask & ~batch["crowd"] if "crowd" in batch else mask
    classes, count = scores.shape[-1], given.shape[1]
    if count == 0:  # nothing is annotated in any image: the label of the background is no class
        empty = jnp.zeros(scores.shape[:2], jnp.int32)
        return Targets(empty + classes, jnp.zeros_like(boxes), jnp.zeros_like(scores), empty > 0, empty)

    def one(scores: Array, boxes: Array, given: Array, labels: Array, mask: Array) -> Targets:
        inside = (to_distances(points, given[:, None, :]).min(-1) > 1e-9) & mask[:, None]  # (M, A)
        fit = jnp.maximum(overlap(given[:, None, :], boxes[None], "ciou"), 0)
        fit = jnp.where(inside, fit, 0)
        metric = scores.T[labels] ** alpha * fit**beta
        _, best = lax.top_k(metric, min(topk, metric.shape[-1]))
        chosen = jax.nn.one_hot(best, metric.shape[-1], dtype=bool).any(1) & inside
        highest = jax.nn.one_hot(fit.argmax(0), count, axis=0, dtype=bool)
        chosen = jnp.where(chosen.sum(0) > 1, highest, chosen)
        index, foreground = chosen.argmax(0), chosen.any(0)
        metric, fit = jnp.where(chosen, metric, 0), jnp.where(chosen, fit, 0)
        level = metric * (fit.max(-1, keepdims=True) / (metric.max(-1, keepdims=True) + 1e-9))
        target = jax.nn.one_hot(labels[index], classes, dtype=scores.dtype)
        target = target * jnp.where(foreground, level.max(0), 0)[:, None]
        return Targets(labels[index], given[index], target, foreground, index)

    found = jax.vmap(one)(scores, boxes, given, labels, mask)
    return lax.stop_gradient(found)


class Gains(NamedTuple):
    """The weights of the loss's three parts."""

    box: Any = 7.5
    classes: Any = 0.5
    bins: Any = 1.5


GAINS = Gains()


def as_gains(gains: Any) -> Gains:
    """`Gains` of these three numbers."""
    three = tuple(gains) if np.iterable(gains) and not isinstance(gains, Mapping) else ()
    if len(three) != 3:
        raise ValueError(f"gains={gains!r}: give Gains(box=.., classes=.., bins=..), or three numbers in this order.")
    return Gains(*three)


@state
class Losses:
    """The three parts without gains, and their weighted sum.

    box: of 1 - overlap. classes: of the binary cross-entropies. bins: of the distributions. total: with gains, times
    the number of images. Scalars; with `per="image"` each is (batch,).
    """

    box: Array
    classes: Array
    bins: Array
    total: Array


def loss(
    predictions: Predictions,
    batch: Mapping[str, Any],
    *,
    gains: Any = GAINS,
    weights: Array | None = None,
    class_weights: Array | None = None,
    targets: Targets | None = None,
    per: Literal["batch", "image"] = "batch",
    kind: Overlap = "ciou",
    topk: int = 10,
) -> Losses:
    """The loss of a batch.

        Z       = max(sum of the target scores, 1),     w_a = sum over classes of an anchor's target score
        classes = sum over anchors and classes of BCE(logit, target score) / Z
        box     = sum over foreground of w (1 - CIoU(box, target box)) / Z
        bins    = sum over foreground of w mean over 4 sides of [(r - t) CE(bin l) + (t - l) CE(bin r)] / Z
        total   = (gain_box box + gain_classes classes + gain_bins bins) times the number of images

    where t is a side's distance in units of the stride, clipped to [0, R - 1.01], l = floor(t) and r = l + 1.

    Args:
        predictions: of the detector.
        batch: "boxes" (batch, M, 4) in pixels, "classes" (batch, M), "mask" (batch, M), as `task_aligned` takes them.
        gains: `Gains`, or any three numbers (box, classes, bins).
        weights: of each annotated box, (batch, M): multiplies all terms of the anchors that are assigned to it, so that
            a box of weight 0 leaves its anchors out of the loss, neither foreground nor background; or of each image,
            (batch,): multiplies all its terms.
        class_weights: (C,): multiplies the terms of that class's logits, and box and bins of boxes of that class.
        targets: those of `task_aligned`, frozen; by default they are assigned to these predictions.
        per: "batch" has one Z, which couples the images; "image" has one each, so that a weight of an image scales its
            own loss alone; the result is then one number for each image, without the number of images as a factor.
        kind: which overlap.
        topk: of the assignment.

    Raises:
        ValueError: shapes that do not fit, or gains that are not three numbers.
    """
    gain = as_gains(gains)
    images, count = predictions.logits.shape[:2]
    if weights is not None and weights.shape not in ((images,), batch["mask"].shape):
        raise ValueError(
            f"weights of shape {weights.shape} for {images} images of at most {batch['mask'].shape[1]} boxes; give one "
            f"for each image, ({images},), or for each box, {batch['mask'].shape}."
        )
    if class_weights is not None and class_weights.shape != predictions.logits.shape[-1:]:
        raise ValueError(
            f"class_weights of shape {class_weights.shape} for {predictions.logits.shape[-1]} classes: give one each."
        )
    if per not in ("batch", "image"):
        raise ValueError(f'per={per!r} is neither "batch" nor "image".')
    units, strides = predictions.units, predictions.strides
    if targets is None:
        targets = task_aligned(predictions.scores, units * strides, predictions.points, batch, topk=topk)
    scores, foreground = targets.scores, targets.foreground
    summed = (lambda a: a.sum((1, 2))) if per == "image" else jnp.sum
    over = (lambda a: a.sum(1)) if per == "image" else jnp.sum
    z = jnp.maximum(summed(scores), 1)

    anchor_weight: Any = jnp.ones((images, count), scores.dtype)
    if weights is not None and weights.ndim == 2 and weights.shape[1]:
        anchor_weight = jnp.where(foreground, jnp.take_along_axis(weights, targets.index, axis=1), 1)
    elif weights is not None and weights.ndim == 1:
        anchor_weight = jnp.broadcast_to(weights[:, None], (images, count))
    by_class = jnp.ones(scores.shape[-1], scores.dtype) if class_weights is None else class_weights

    entropy = _binary_cross_entropy(predictions.logits, scores) * by_class * anchor_weight[..., None]
    weight = (scores * by_class).sum(-1) * anchor_weight

    # In the background the target is the anchor's own prediction (a constant): its terms have the weight 0, and a box
    # that is nowhere near would only add large numbers, and 0 times infinity, to the derivatives.
    own = lax.stop_gradient(units)
    aim = jnp.where(foreground[..., None], targets.boxes / strides, own)
    misfit = (1 - overlap(units, aim, kind)) * weight
    bins = _distribution_loss(predictions.bins, to_distances(predictions.points / strides, aim)).mean(-1) * weight

    parts = over(misfit) / z, summed(entropy) / z, over(bins) / z
    total = gain.box * parts[0] + gain.classes * parts[1] + gain.bins * parts[2]
    return Losses(*parts, total if per == "image" else total * images)


def _binary_cross_entropy(logits: Array, targets: Array) -> Array:
    return jax.nn.softplus(logits) - logits * targets


def _distribution_loss(bins: Array, distances: Array) -> Array:
    """Cross-entropies of the two bins beside a distance, each weighted by how near it is: (..., R), (...) -> (...)."""
    last = bins.shape[-1] - 1
    t = jnp.clip(distances, 0, last - 0.01)
    spread = jnp.maximum(1 - jnp.abs(t[..., None] - jnp.arange(last + 1, dtype=t.dtype)), 0)  # r - t at l, t - l at r
    return -(lax.stop_gradient(spread) * jax.nn.log_softmax(bins, axis=-1)).sum(-1)
