"""Average precision against pycocotools, MOTA and IDF1 against motmetrics; by hand where they are not installed."""

from __future__ import annotations

import contextlib
import io
import types

import numpy as np
import pytest

from bilevel.applications.detection.matching import assign, covered, overlaps
from bilevel.applications.detection.metrics import average_precision, track_scores


def random_case(seed, images=12, classes=3, crowds=True, ties=True, grid=None):
    """Annotations, and detections that are near some of them; images without either, a class without boxes."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for k in range(images):
        count = 0 if k % 5 == 4 else int(rng.integers(1, 7))
        corner, side = rng.uniform(0, 60, (count, 2)), rng.uniform(4, 40, (count, 2))
        boxes = np.concatenate([corner, corner + side], 1)
        if count > 2:
            boxes[1] = boxes[0]  # annotations that overlap any detection equally
        labels = rng.integers(0, classes - 1, count)
        crowd = rng.random(count) < (0.25 if crowds else 0)
        again = rng.integers(0, count, 3 * count) if count else np.zeros(0, int)
        near = boxes[again] + rng.normal(0, 3, (len(again), 4))
        near[:, 2:] = np.maximum(near[:, :2], near[:, 2:])
        far = rng.uniform(0, 50, (3, 2))
        guesses = np.concatenate([near, boxes[:1], np.concatenate([far, far + rng.uniform(0, 30, (3, 2))], 1)])
        named = np.concatenate([labels[again], labels[:1], rng.integers(0, classes, 3)])
        scores = rng.random(len(guesses))
        if ties:
            scores = np.round(scores, 1)
        if k % 6 == 5:
            guesses, named, scores = guesses[:0], named[:0], scores[:0]
        if grid:
            boxes, guesses = np.round(boxes / grid) * grid, np.round(guesses / grid) * grid
        truth.append({"boxes": boxes, "classes": labels, "crowd": crowd})
        found.append({"boxes": guesses, "classes": named, "scores": scores})
    return found, truth


def pycocotools_says(found, truth):
    """AP@.5:.95, AP@.5 and the tables of COCOeval."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from pycocotools.cocoeval import COCOeval

    wide = lambda box: [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
    annotations = [
        {"id": 0, "image_id": k, "category_id": int(c), "bbox": wide(b), "area": float(np.prod(b[2:] - b[:2])),
         "iscrowd": int(w)}
        for k, image in enumerate(truth)
        for b, c, w in zip(image["boxes"], image["classes"], image["crowd"], strict=True)
    ]  # fmt: skip
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    results = [
        {"image_id": k, "category_id": int(c), "bbox": wide(b), "score": float(s)}
        for k, image in enumerate(found)
        for b, c, s in zip(image["boxes"], image["classes"], image["scores"], strict=True)
    ]
    names = sorted({a["category_id"] for a in [*annotations, *results]})
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = coco.COCO()
        annotated.dataset = {
            "images": [{"id": k} for k in range(len(truth))],
            "annotations": annotations,
            "categories": [{"id": c} for c in names],
        }
        annotated.createIndex()
        detected = coco.COCO()
        detected.dataset = {**annotated.dataset, "annotations": []}
        detected.createIndex()
        if results:
            detected = annotated.loadRes(results)
        run = COCOeval(annotated, detected, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats[0], run.stats[1], run.eval["precision"][..., 0, 2], run.eval["recall"][..., 0, 2]


@pytest.mark.parametrize(
    "options",
    [{"seed": s} for s in range(6)]
    + [{"seed": 6, "grid": 8}, {"seed": 7, "grid": 4, "classes": 2}, {"seed": 8, "crowds": False, "ties": False}],
    ids=str,
)
def test_average_precision_is_that_of_pycocotools(options):
    found, truth = random_case(**options)
    ours, theirs = average_precision(found, truth), pycocotools_says(found, truth)
    np.testing.assert_allclose((ours.at_50_95, ours.at_50), theirs[:2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.precision, theirs[2], atol=1e-12)
    np.testing.assert_allclose(ours.recall, theirs[3], atol=1e-12)
    assert 0.02 < ours.at_50_95 < ours.at_50 < 1


@pytest.mark.parametrize(
    "boxes", [(0, 0), (0, 3), (2, 0)], ids=["nothing at all", "false alarms only", "annotations only"]
)
def test_empties_are_those_of_pycocotools(boxes):
    rng = np.random.default_rng(0)
    make = lambda n: np.concatenate([rng.uniform(0, 9, (n, 2)), rng.uniform(10, 20, (n, 2))], 1)
    truth = [{"boxes": make(boxes[0]), "classes": np.zeros(boxes[0], int), "crowd": np.zeros(boxes[0], bool)}] * 2
    found = [{"boxes": make(boxes[1]), "classes": np.zeros(boxes[1], int), "scores": rng.random(boxes[1])}] * 2
    ours = average_precision(found, truth)
    np.testing.assert_array_equal((ours.at_50_95, ours.at_50), (0, 0) if boxes[0] else (-1, -1))
    if boxes[0]:  # pycocotools cannot load an empty list of results, nor count classes that nothing has
        np.testing.assert_allclose((ours.at_50_95, ours.at_50), pycocotools_says(found, truth)[:2])


def test_only_the_best_hundred_of_a_class_and_image_count():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 500, (150, 2))
    truth = [{"boxes": np.concatenate([corner, corner + 30], 1), "classes": np.zeros(150, int)}]
    found = [{**truth[0], "scores": rng.random(150)}]
    truth[0]["crowd"] = np.zeros(150, bool)
    ours, theirs = average_precision(found, truth), pycocotools_says(found, truth)
    np.testing.assert_allclose((ours.at_50_95, ours.at_50), theirs[:2], atol=1e-12)
    assert average_precision(found, truth, most=150).at_50 == pytest.approx(1)


def test_average_precision_by_hand():
    """Two boxes, three detections: right, wrong, right: precision 1 up to recall 1/2 (51 places), 2/3 up to 1 (50)."""
    truth = {"boxes": [[[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 1, 1]]], "classes": [[1, 1, 0]]}
    truth["mask"] = [[True, True, False]]
    found = {"boxes": [[[20, 20, 30, 30], [0, 40, 9, 49], [0, 0, 10, 8]]], "classes": [[1] * 3], "scores": [[3, 2, 1]]}
    ours = average_precision(found, truth)
    assert ours.at_50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    # The third overlaps by .8: from .85 on it is wrong, and half of the boxes are found.
    assert ours.at_50_95 == pytest.approx((7 * (51 + 50 * 2 / 3) + 3 * 51) / 1010)
    assert ours.classes.tolist() == [1]
    assert "1: " in repr(ours)


def test_padded_arrays_and_sequences_are_one(seed=3):
    found, truth = random_case(seed)

    def padded(images, fill):
        most = max(len(image["boxes"]) for image in images) + 2
        pad = lambda a: np.concatenate([a, np.full((most - len(a), *a.shape[1:]), fill, a.dtype)])
        stacked = {key: np.stack([pad(np.asarray(image[key])) for image in images]) for key in images[0]}
        return {**stacked, "mask": np.stack([np.arange(most) < len(image["boxes"]) for image in images])}

    a, b = average_precision(found, truth), average_precision(padded(found, 7), padded(truth, 7))
    np.testing.assert_array_equal(a.precision, b.precision)
    as_attributes = types.SimpleNamespace(**padded(found, 7))
    np.testing.assert_array_equal(average_precision(as_attributes, truth).precision, a.precision)


BOX = [[0.0, 0.0, 5.0, 5.0]]
ONE = [{"boxes": BOX, "classes": [0]}]


@pytest.mark.parametrize(
    ("found", "truth", "message"),
    [
        ([{"boxes": [[0, 0, np.nan, 5]], "classes": [0], "scores": [1]}], ONE,
         r"Image 0, prediction 0: \[0.0, 0.0, nan, 5.0\] is no box"),
        ([{"boxes": BOX, "classes": [0], "scores": [1]}], [{"boxes": [BOX[0], [5, 0, 0, 5]], "classes": [0, 0]}],
         r"Image 0, annotation 1: \[5.0, 0.0, 0.0, 5.0\] is no box"),
        ([{"boxes": BOX, "classes": [0], "scores": [np.inf]}], ONE, "Image 0, prediction: 'scores' holds inf"),
        (ONE, ONE, "Image 0, prediction: no 'scores' among boxes, classes"),
        ([], ONE, "0 images have predictions and 1 annotations"),
        ([{"boxes": BOX, "classes": [0, 1], "scores": [1]}], ONE, "disagrees on"),
        ([{"boxes": BOX, "classes": [0.5], "scores": [1]}], ONE, "'classes' holds 0.5; give whole"),
        ({"boxes": BOX, "classes": [0], "scores": [1]}, ONE, r"\(images, boxes, 4\)"),
    ],
)  # fmt: skip
def test_what_is_no_box_is_named(found, truth, message):
    with pytest.raises(ValueError, match=message):
        average_precision(found, truth)


def random_tracks(seed, frames=30, objects=6):
    """Objects on random walks that come and go; tracks that follow them, lose them, and change ids."""
    rng = np.random.default_rng(seed)
    place, side = rng.uniform(0, 80, (objects, 2)), rng.uniform(10, 25, (objects, 2))
    names = np.arange(objects) * 3 + 1
    follows = {int(name): int(name) + 100 for name in names}
    truth, found = [], []
    for _ in range(frames):
        place = place + rng.normal(0, 3, place.shape)
        seen = rng.random(objects) < 0.85
        boxes = np.concatenate([place, place + side], 1)
        order = rng.permutation(np.flatnonzero(seen))
        truth.append({"boxes": boxes[order], "ids": names[order]})
        if rng.random() < 0.25:  # two tracks change places, or one gets a new id
            a, b = rng.choice(names, 2, replace=False).tolist()
            new = int(rng.integers(200, 300))
            follows[a], follows[b] = (follows[b], follows[a]) if rng.random() < 0.5 else (new, 7)
        kept = {follows[int(names[i])]: i for i in np.flatnonzero(rng.random(objects) < 0.8)}  # also of unseen ones
        ids = np.array(list(kept), int)
        near = boxes[list(kept.values())] + rng.normal(0, 1.5, (len(ids), 4))
        far = rng.uniform(0, 80, (1, 2))
        found.append({
            "boxes": np.concatenate([near, np.concatenate([far, far + 15], 1)]),
            "ids": np.append(ids, 1000 + rng.integers(0, 3)),
        })  # fmt: skip
    truth[3] = {key: value[:0] for key, value in truth[3].items()}
    found[5] = {key: value[:0] for key, value in found[5].items()}
    return found, truth


@pytest.mark.filterwarnings("ignore")  # motmetrics' own
@pytest.mark.parametrize("seed", range(6))
def test_mota_and_idf1_are_those_of_motmetrics(seed):
    motmetrics = pytest.importorskip("motmetrics", reason="motmetrics is not installed")
    found, truth = random_tracks(seed)
    accumulator = motmetrics.MOTAccumulator(auto_id=True)
    for frame, true in zip(found, truth, strict=True):
        distance = 1 - overlaps(true["boxes"], frame["boxes"])
        accumulator.update(true["ids"], frame["ids"], np.where(distance > 0.5, np.nan, distance))
    names = ["mota", "idf1", "num_misses", "num_false_positives", "num_switches", "motp", "idtp"]
    theirs = motmetrics.metrics.create().compute(accumulator, metrics=names).iloc[0]
    ours = track_scores(found, truth)
    np.testing.assert_allclose(
        [ours.mota, ours.idf1, ours.misses, ours.false_positives, ours.switches, ours.motp, ours.idtp],
        [theirs[name] for name in names],
        rtol=1e-12,
    )
    assert ours.switches > 3


def test_track_scores_by_hand():
    """One object over four frames: found as 1, 1, lost, then as 2, beside one false alarm."""
    box = lambda *corners: np.array(corners, float).reshape(-1, 4)
    truth = [{"boxes": box(0, 0, 10, 10), "ids": [5]}] * 4
    here = {"boxes": box(0, 0, 10, 8), "ids": [1]}
    found = [here, here, {"boxes": box(), "ids": []}, {"boxes": box(0, 0, 10, 8, 50, 50, 60, 60), "ids": [2, 3]}]
    ours = track_scores(found, truth)
    assert (ours.misses, ours.false_positives, ours.switches, ours.idtp) == (1, 1, 1, 2)
    assert ours.mota == pytest.approx(1 - 3 / 4)
    assert ours.idf1 == pytest.approx(2 * 2 / (4 + 4))
    assert ours.motp == pytest.approx(0.2)
    nothing = [{"boxes": box(), "ids": []}]
    assert np.isnan(track_scores(nothing, nothing).mota)
    assert track_scores(nothing, truth[:1]).mota == 0
    with pytest.raises(ValueError, match="Frame 0, found: the id 1 stands there twice"):
        track_scores([{"boxes": box(0, 0, 1, 1, 2, 2, 3, 3), "ids": [1, 1]}], truth[:1])
    with pytest.raises(ValueError, match="4 frames were found and 1 are true"):
        track_scores(found, truth[:1])


def test_overlaps_and_matchings():
    a, b = np.array([[0, 0, 2, 2], [1, 1, 1, 1]]), np.array([[1, 0, 3, 2], [0, 0, 4, 4]])
    np.testing.assert_allclose(overlaps(a, b), [[1 / 3, 1 / 4], [0, 0]])
    np.testing.assert_allclose(covered(a, b), [[1 / 2, 1], [0, 0]])
    # Both rows like the first column: by cost alone one of them takes it, with `most` the other gets the second.
    cost = np.array([[0.1, 0.6], [0.2, np.nan]])
    assert [x.tolist() for x in assign(cost, 0.65)] == [[0], [0]]
    assert [x.tolist() for x in assign(cost, 0.75)] == [[0, 1], [1, 0]]
    assert [x.tolist() for x in assign(cost, 0.65, most=True)] == [[0, 1], [1, 0]]
    assert [x.tolist() for x in assign(cost, 0.05, most=True)] == [[], []]
