"""Boxes (x1, y1, x2, y2) in static shapes: overlaps with derivatives, distances to a point, non-maximum suppression."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from bilevel import state

Overlap = Literal["iou", "giou", "diou", "ciou"]
OVERLAPS = ("iou", "giou", "diou", "ciou")
EPSILON = 1e-7


def overlap(boxes: Array, others: Array, kind: Overlap = "ciou", *, epsilon: float = EPSILON) -> Array:
    """How well boxes lie on others, 1 where they agree.

        IoU  = intersection / union
        GIoU = IoU - (hull - union) / hull                                     hull: the smallest box around both
        DIoU = IoU - |centre - centre'|^2 / |diagonal of the hull|^2
        CIoU = DIoU - a v,    v = 4 / pi^2 (atan(w / h) - atan(w' / h'))^2,    a = v / (1 - IoU + v), a constant

    `epsilon` is added to heights, unions and the hull's measure, so that boxes without area have finite values and
    derivatives of every order; a is a constant to derivatives, as its authors have it.

    Args:
        boxes, others: (..., 4), broadcast against each other.
        kind: which.
        epsilon: as said.

    Returns:
        (...).

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019; Zheng et al., "Distance-IoU Loss",
    AAAI 2020.
    """
    if kind not in OVERLAPS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(OVERLAPS)}.")
    left, top, right, bottom = (boxes[..., i] for i in range(4))
    left_, top_, right_, bottom_ = (others[..., i] for i in range(4))
    width, height = right - left, bottom - top + epsilon
    width_, height_ = right_ - left_, bottom_ - top_ + epsilon
    shared = _positive(jnp.minimum(right, right_) - jnp.maximum(left, left_)) * _positive(
        jnp.minimum(bottom, bottom_) - jnp.maximum(top, top_)
    )
    union = width * height + width_ * height_ - shared + epsilon
    iou = shared / union
    if kind == "iou":
        return iou
    hull_width = jnp.maximum(right, right_) - jnp.minimum(left, left_)
    hull_height = jnp.maximum(bottom, bottom_) - jnp.minimum(top, top_)
    if kind == "giou":
        hull = hull_width * hull_height + epsilon
        return iou - (hull - union) / hull
    diagonal = jnp.square(hull_width) + jnp.square(hull_height) + epsilon
    apart = (jnp.square(left_ + right_ - left - right) + jnp.square(top_ + bottom_ - top - bottom)) / 4
    if kind == "diou":
        return iou - apart / diagonal
    shape = (4 / math.pi**2) * jnp.square(jnp.arctan(width_ / height_) - jnp.arctan(width / height))
    weight = lax.stop_gradient(shape / (shape - iou + (1 + epsilon)))
    return iou - (apart / diagonal + shape * weight)


def _positive(x: Array) -> Array:
    """max(x, 0), of slope 1 where x is 0: boxes that touch are drawn together."""
    return jnp.where(x >= 0, x, jnp.zeros_like(x))


def pairwise(boxes: Array, others: Array, kind: Overlap = "iou") -> Array:
    """The overlap of each of (..., n, 4) with each of (..., m, 4): (..., n, m)."""
    return overlap(boxes[..., :, None, :], others[..., None, :, :], kind)


def to_distances(points: Array, boxes: Array) -> Array:
    """How far the sides (left, top, right, bottom) of boxes (..., 4) are from points (..., 2): (..., 4)."""
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def from_distances(points: Array, distances: Array) -> Array:
    """The boxes whose sides are so far from the points: the inverse of `to_distances`."""
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def centred(boxes: Array) -> Array:
    """(x1, y1, x2, y2) -> (centre x, centre y, width, height)."""
    return jnp.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], axis=-1)


def cornered(boxes: Array) -> Array:
    """(centre x, centre y, width, height) -> (x1, y1, x2, y2)."""
    half = boxes[..., 2:] / 2
    return jnp.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)


@state
class Detections:
    """What was found, padded to a fixed number, best first.

    boxes: (batch, N, 4) in pixels. scores: (batch, N), 0 where there is nothing. classes: (batch, N).
    mask: (batch, N), whether there is something. anchors: (batch, N), at which anchor it was found.
    """

    boxes: Array
    scores: Array
    classes: Array
    mask: Array
    anchors: Array


def suppress(
    boxes: Array,
    scores: Array,
    *,
    iou: float = 0.5,
    confidence: float = 0.05,
    most: int = 100,
    candidates: int = 300,
    across_classes: bool = False,
) -> Detections:
    """Non-maximum suppression in static shapes.

    Every class of every anchor is a candidate; the `candidates` best go on. From the best down, a candidate is kept if
    no kept one of its class (of any, with `across_classes`) overlaps it by more than `iou`. Equal scores: the lower
    index (anchor, then class) first.

    Args:
        boxes: (batch, A, 4).
        scores: (batch, A, classes), between 0 and 1.
        iou: more overlap than this is a duplicate.
        confidence: scores of at most this are no detections.
        most: how many detections an image has at most, N.
        candidates: how many are compared.
        across_classes: let classes suppress each other.
    """
    for name, value in (("iou", iou), ("confidence", confidence)):
        if not 0 <= value <= 1:
            raise ValueError(f"suppress({name}={value}): give a number between 0 and 1.")
    for name, value in (("most", most), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"suppress({name}={value}): give at least 1.")
    if boxes.ndim != 3 or scores.ndim != 3 or boxes.shape[-1] != 4 or boxes.shape[:2] != scores.shape[:2]:
        raise ValueError(
            f"suppress was given boxes {boxes.shape} and scores {scores.shape}; it expects (batch, A, 4) and "
            "(batch, A, classes)."
        )
    classes = scores.shape[-1]
    compared = min(candidates, scores.shape[1] * classes)
    kept = min(most, compared)

    def one(boxes: Array, scores: Array) -> Detections:
        flat = jnp.where(scores > confidence, scores, 0.0).ravel()
        best, place = lax.top_k(flat, compared)
        anchor, label = place // classes, place % classes
        chosen = boxes[anchor]
        same = True if across_classes else label[:, None] == label
        close = (pairwise(chosen, chosen) > iou) & same & (jnp.arange(compared)[:, None] < jnp.arange(compared))

        def step(i: Any, alive: Array) -> Array:
            return alive & ~(close[i] & alive[i])

        alive = lax.fori_loop(0, compared, step, best > 0)
        order = jnp.argsort(~alive, stable=True)[:kept]
        mask = alive[order]
        blank = lambda a: jnp.where(mask.reshape(-1, *(1,) * (a.ndim - 1)), a, 0)  # noqa: E731
        return Detections(blank(chosen[order]), blank(best[order]), blank(label[order]), mask, blank(anchor[order]))

    return jax.vmap(one)(boxes, scores)
