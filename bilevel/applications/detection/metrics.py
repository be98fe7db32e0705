"""How well boxes were found and followed: mean average precision as COCO has it, MOTA and IDF1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bilevel.applications.detection.matching import assign, overlaps
from bilevel.applications.detection.rows import Boxes, by_image, checked

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's ten overlaps from which on a box counts as found."""

_RECALLS = np.linspace(0, 1, 101)


@dataclasses.dataclass(frozen=True, eq=False)
class AveragePrecision:
    """What `average_precision` found; -1 stands, as in pycocotools, where no annotation counts.

    Attributes:
        at_50_95: the mean over thresholds and classes: mAP@.5:.95 with the default thresholds.
        at_50: the mean over classes at the threshold 0.5 (NaN where it was not asked for).
        table: average precision by threshold and class, (thresholds, classes).
        recall: the largest recall by threshold and class, (thresholds, classes).
        precision: interpolated, by threshold, recall (0, .01, ..., 1) and class, (thresholds, 101, classes).
        thresholds: (thresholds,).
        classes: the numbers of the classes that occur, ascending.
    """

    at_50_95: float
    at_50: float
    table: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    thresholds: np.ndarray
    classes: np.ndarray

    def __repr__(self) -> str:
        per_class = ", ".join(f"{c}: {v:.3f}" for c, v in zip(self.classes, self.per_class, strict=True))
        return f"AveragePrecision(@.5 {self.at_50:.4f}, @.5:.95 {self.at_50_95:.4f}; by class {per_class or 'none'})"

    @property
    def per_class(self) -> np.ndarray:
        """The mean over thresholds by class, (classes,); -1 for a class without annotations."""
        return self.table.mean(0)


def average_precision(
    predictions: Boxes, annotations: Boxes, *, thresholds: Sequence[float] | np.ndarray = THRESHOLDS, most: int = 100
) -> AveragePrecision:
    """Mean average precision of detections, equal to pycocotools' `COCOeval` for boxes of all sizes.

    Per class and threshold, the detections of an image are taken by falling score (ties: in the order given) and each
    takes the free annotation with the largest overlap of at least the threshold (ties: the last one). One that can
    only have a crowd's box, which any number may, does not count for or against. Precision over recall, of all images
    together, is made non-increasing from the right and read at 101 recalls. (Lin et al., "Microsoft COCO", ECCV 2014,
    and the evaluation code that goes with it.)

    Args:
        predictions: "boxes" (B, N, 4), corners in pixels, "scores" (B, N), "classes" (B, N), and "mask" (B, N), false
            where the row is padding (left out: all rows count). Or a sequence with a mapping for each image, without
            the axis B and with as many rows as there are.
        annotations: "boxes" (B, M, 4), "classes" (B, M), "mask" (B, M), and "crowd" (B, M), true for a box around many
            (left out: none); or a sequence likewise. Other entries ("image") are not looked at.
        thresholds: overlaps (intersection over union) from which on a box counts as found.
        most: detections that count, the best per class and image.

    Raises:
        ValueError: other numbers of images; boxes, scores or classes of other lengths; NaN, infinite numbers or swapped
            corners, by image and row.
    """
    found = [
        checked(image, f"Image {k}, prediction", "classes", "scores")
        for k, image in enumerate(by_image(predictions, "predictions"))
    ]
    truth = []
    for k, image in enumerate(by_image(annotations, "annotations")):
        crowd = np.asarray(image.get("crowd", np.zeros(len(image.get("boxes", ()))))).astype(bool)
        truth.append({**checked(image, f"Image {k}, annotation", "classes"), "crowd": crowd})
    if len(found) != len(truth):
        raise ValueError(
            f"average_precision: {len(found)} images have predictions and {len(truth)} annotations. Give both for the "
            "same images, in one order; an image without boxes has zero rows."
        )
    thresholds = np.atleast_1d(np.asarray(thresholds, np.float64))
    if thresholds.ndim != 1 or not thresholds.size or not ((thresholds > 0) & (thresholds <= 1)).all():
        raise ValueError(f"thresholds={thresholds} was given; an overlap lies above 0 and is 1 at most.")
    if most < 1:
        raise ValueError(f"most={most} was given; at least one detection per class and image has to count.")
    classes = np.unique(np.concatenate([np.zeros(0, int), *(image["classes"] for image in [*found, *truth])]))
    precision = np.full((len(thresholds), len(_RECALLS), len(classes)), -1.0)
    recall = np.full((len(thresholds), len(classes)), -1.0)
    for k, number in enumerate(classes):
        pairs = zip(found, truth, strict=True)
        of_class = ((_only(a, number), _only(b, number)) for a, b in pairs)
        parts = [_matched(a, b, thresholds, most) for a, b in of_class]
        counting = sum(part[3] for part in parts)
        if counting:
            scores, hit, ignored = (np.concatenate([part[i] for part in parts], -1) for i in range(3))
            order = np.argsort(-scores, kind="stable")
            precision[:, :, k], recall[:, k] = _curves(hit[:, order], ignored[:, order], counting)
    table = precision.mean(1)
    return AveragePrecision(
        _mean(precision), _mean(precision[np.isclose(thresholds, 0.5)], float("nan")), table, recall, precision,
        thresholds, classes,
    )  # fmt: skip


def _mean(values: np.ndarray, without: float = -1.0) -> float:
    """Of what is not -1; -1 where nothing is left, and `without` where nothing was there."""
    if not len(values):
        return without
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _matched(
    found: dict[str, np.ndarray], truth: dict[str, np.ndarray], thresholds: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Of one image and class: scores (n,), which found a box and which don't count, (thresholds, n); boxes to find."""
    order = np.argsort(-found["scores"], kind="stable")[:most]
    last = np.argsort(truth["crowd"], kind="stable")  # boxes that any number may have come after all others
    crowd, boxes = truth["crowd"][last], truth["boxes"][last]
    overlap = overlaps(found["boxes"][order], boxes, crowd)
    taken = np.full((len(thresholds), len(order)), -1)
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]
    free = np.ones((len(thresholds), len(boxes)), bool)
    counting = int((~crowd).sum())
    for d, row in enumerate(overlap):
        able = np.where(free & (row >= least), row, -1)
        own, of_many = _last_largest(able[:, :counting]), _last_largest(able[:, counting:])
        taken[:, d] = np.where(own >= 0, own, np.where(of_many >= 0, of_many + counting, -1))
        won = np.flatnonzero(own >= 0)
        free[won, own[won]] = False
    hit = taken >= 0
    ignored = hit & (taken >= counting)
    return found["scores"][order], hit & ~ignored, ignored, counting


def _last_largest(able: np.ndarray) -> np.ndarray:
    """By row the last column with its largest value; -1 where all are negative."""
    if not able.shape[1]:
        return np.full(len(able), -1)
    return np.where(able.max(1) >= 0, able.shape[1] - 1 - able[:, ::-1].argmax(1), -1)


def _curves(hit: np.ndarray, ignored: np.ndarray, counting: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision at the 101 recalls, (thresholds, 101), and the largest recall, of detections by falling score."""
    right, wrong = np.cumsum(hit, 1, dtype=float), np.cumsum(~hit & ~ignored, 1, dtype=float)
    recall, precision = right / counting, right / (right + wrong + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    curve = np.zeros((len(hit), len(_RECALLS)))
    for row, r, p in zip(curve, recall, precision, strict=True):
        at = np.searchsorted(r, _RECALLS, side="left")
        row[at < len(p)] = p[at[at < len(p)]]
    return curve, recall[:, -1] if recall.shape[1] else np.zeros(len(hit))


@dataclasses.dataclass(frozen=True, eq=False)
class TrackScores:
    """What `track_scores` found.

    Attributes:
        mota: 1 - (misses + false positives + switches) / objects; NaN without objects (-inf where boxes were found).
        idf1: 2 IDTP / (objects + predictions); NaN where there is neither.
        misses: true boxes that nothing was matched to.
        false_positives: found boxes that nothing was matched to.
        switches: times that an object was matched to another track than the last time.
        objects, predictions: true and found boxes.
        idtp: found boxes on the object that their whole track is assigned to.
        motp: the mean of 1 - IoU over matched boxes; NaN without any.
    """

    mota: float
    idf1: float
    misses: int
    false_positives: int
    switches: int
    objects: int
    predictions: int
    idtp: int
    motp: float


def track_scores(found: Boxes, truth: Boxes, threshold: float = 0.5) -> TrackScores:
    """MOTA and IDF1 of tracks, equal to those of the package motmetrics.

    MOTA (Bernardin and Stiefelhagen, 2008): frame by frame, an object keeps the track that it last had while their
    boxes overlap by at least the threshold; the others are matched, as many as can be, at the least total 1 - IoU. IDF1
    (Ristani et al., 2016): whole tracks are assigned to whole objects so that most boxes agree.

    Args:
        found: "boxes" (T, N, 4), "ids" (T, N), whole numbers, and "mask" (T, N), false where the row is padding (left
            out: all rows count); or a sequence with a mapping for each frame, with as many rows as there are.
        truth: the same for the objects.
        threshold: the least overlap (intersection over union) of a match.

    Raises:
        ValueError: other numbers of frames, an id twice in a frame, or broken boxes, by frame and row.
    """
    tracks = [checked(image, f"Frame {k}, found", "ids") for k, image in enumerate(by_image(found, "found"))]
    objects = [checked(image, f"Frame {k}, true", "ids") for k, image in enumerate(by_image(truth, "truth"))]
    if len(tracks) != len(objects):
        raise ValueError(
            f"track_scores: {len(tracks)} frames were found and {len(objects)} are true. Give both for the same frames."
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} was given; an overlap lies above 0 and is 1 at most.")
    for name, frames in (("found", tracks), ("true", objects)):
        for k, frame in enumerate(frames):
            names, counts = np.unique(frame["ids"], return_counts=True)
            if (counts > 1).any():
                raise ValueError(f"Frame {k}, {name}: the id {names[counts > 1][0]} stands there twice.")
    last: dict[int, int] = {}  # by object the track it was last matched to
    together: dict[tuple[int, int], int] = {}  # frames in which an object and a track overlap
    matches = switches = 0
    distances: list[float] = []
    for frame, true in zip(tracks, objects, strict=True):
        theirs, ours = true["ids"].tolist(), frame["ids"].tolist()
        distance = 1 - overlaps(true["boxes"], frame["boxes"])
        distance[distance > 1 - threshold] = np.nan
        for i, j in zip(*np.nonzero(~np.isnan(distance)), strict=True):
            together[theirs[i], ours[j]] = together.get((theirs[i], ours[j]), 0) + 1
        free = distance.copy()
        pairs = []
        for i, name in enumerate(theirs):
            j = ours.index(last[name]) if last.get(name) in ours else -1
            if j >= 0 and not np.isnan(free[i, j]):
                pairs.append((i, j))
                free[i], free[:, j] = np.nan, np.nan
        for i, j in zip(*assign(free, 1 - threshold, most=True), strict=True):
            switches += theirs[i] in last and last[theirs[i]] != ours[j]
            last[theirs[i]] = ours[j]
            pairs.append((i, j))
        matches += len(pairs)
        distances += [distance[pair] for pair in pairs]
    total, predicted = (sum(len(frame["ids"]) for frame in frames) for frames in (objects, tracks))
    wrong = (total - matches) + (predicted - matches) + switches
    right = _agreeing(together)
    return TrackScores(
        1 - _ratio(wrong, total), _ratio(2 * right, total + predicted), total - matches, predicted - matches, switches,
        total, predicted, right, _ratio(float(np.sum(distances)), matches),
    )  # fmt: skip


def _agreeing(together: dict[tuple[int, int], int]) -> int:
    """The largest sum of common frames over one-to-one assignments of objects to tracks."""
    rows, columns = (sorted({pair[i] for pair in together}) for i in range(2))
    counts = np.zeros((len(rows), len(columns)))
    for (a, b), count in together.items():
        counts[rows.index(a), columns.index(b)] = count
    i, j = assign(-counts, 0.0)
    return int(counts[i, j].sum())


def _ratio(a: float, b: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(a) / np.float64(b))


def _only(image: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The rows of one class."""
    return {key: array[image["classes"] == number] for key, array in image.items()}
