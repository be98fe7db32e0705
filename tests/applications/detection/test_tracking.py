"""The filter against exact conditioning, the tracker on films whose answer is known, the fusion against its formula."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel.applications.detection.metrics import track_scores
from bilevel.applications.detection.tracking import (
    Clip,
    Fusion,
    Kalman,
    Tracker,
    by_identity,
    follow,
    of_classes,
    timeline,
)


def box(x, y, w=10.0, h=20.0):
    """Corners from a centre and sides."""
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def test_the_filter_is_the_exact_posterior():
    """With a constant height the noise is constant: condition the joint Gaussian of all states on all observations."""
    rng = np.random.default_rng(0)
    kalman, frames, h = Kalman(), 6, 20.0
    centres = np.cumsum(rng.normal(2, 1, (frames, 2)), 0)
    state = kalman.start(np.array([box(*centres[0], h=h)]))
    for centre in centres[1:]:
        state = kalman.update(kalman.predict(state), np.array([box(*centre, h=h)]))

    p, v = h / 20, h / 160
    motion = np.eye(8) + np.eye(8, k=4)
    q = np.diag(np.square([p, p, 1e-2, p, v, v, 1e-5, v]))
    r = np.diag(np.square([p, p, 1e-1, p]))
    covariance = {(0, 0): np.diag(np.square([2 * p, 2 * p, 1e-2, 2 * p, 10 * v, 10 * v, 1e-5, 10 * v]))}
    for t in range(1, frames):
        for s in range(t):
            covariance[t, s] = motion @ covariance[t - 1, s]
            covariance[s, t] = covariance[t, s].T
        covariance[t, t] = motion @ covariance[t - 1, t - 1] @ motion.T + q
    mean = np.zeros((frames, 8))
    mean[:, :4] = [*centres[0], 0.5, h]
    seen = np.column_stack([centres[1:], np.full(frames - 1, 0.5), np.full(frames - 1, h)])
    times = range(1, frames)
    joint = np.block([[covariance[t, s][:4, :4] + (t == s) * r for s in times] for t in times])
    cross = np.block([covariance[frames - 1, s][:, :4] for s in times])
    posterior = mean[-1] + cross @ np.linalg.solve(joint, (seen - mean[1:, :4]).ravel())
    np.testing.assert_allclose(state.mean[0], posterior, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        state.covariance[0], covariance[frames - 1, frames - 1] - cross @ np.linalg.solve(joint, cross.T), atol=1e-9
    )
    np.testing.assert_allclose(kalman.boxes(kalman.start(np.array([box(3, 4)]))), [box(3, 4)])


def film(paths, scores=0.9):
    """Detections of objects along paths (T, n, 2), NaN where one is not seen, at a score each (T, n)."""
    paths = np.asarray(paths, float)
    scores = np.broadcast_to(scores, paths.shape[:2])
    frames = []
    for places, sure in zip(paths, scores, strict=True):
        there = ~np.isnan(places[:, 0])
        boxes = np.array([box(x, y) for x, y in places[there]]).reshape(-1, 4)
        frames.append({"boxes": boxes, "scores": sure[there], "ids": np.flatnonzero(there)})
    return frames


def line(start, step, frames=20):
    """A path at constant velocity."""
    return np.asarray(start) + np.arange(frames)[:, None] * np.asarray(step)


def test_objects_that_cross_keep_their_identities():
    rng = np.random.default_rng(0)
    paths = np.stack([line((0, 0), (3, 0)), line((57, 14), (-3, 0)), line((30, -40), (0, 3))], 1)
    detections = film(paths + rng.normal(0, 0.5, paths.shape))
    for frame in detections:
        order = rng.permutation(len(frame["ids"]))
        frame |= {key: frame[key][order] for key in ("boxes", "scores", "ids")}
    found = follow(detections)
    scores = track_scores(found, film(paths))
    assert (scores.mota, scores.idf1, scores.switches) == (1, 1, 0)
    assert found[0]["ids"].tolist() == [1, 2, 3]
    for frame, seen in zip(found, detections, strict=True):
        np.testing.assert_allclose(frame["boxes"], seen["boxes"][frame["rows"]], atol=3)


def test_a_score_that_sinks_is_caught_by_the_second_stage():
    sure = np.full((20, 1), 0.9)
    sure[8:14] = 0.3  # half hidden
    detections = film(line((0, 0), (2, 1))[:, None], sure)
    assert [frame["ids"].tolist() for frame in follow(detections)] == [[1]] * 20
    without = follow(detections, Tracker(low=0.5))
    assert [len(frame["ids"]) for frame in without] == [1] * 8 + [0] * 6 + [1] * 6
    assert without[-1]["ids"].tolist() == [1]


def test_births_need_a_second_look_and_deaths_patience():
    paths = np.full((16, 3, 2), np.nan)
    paths[:, 0] = line((0, 0), (1, 0), 16)
    paths[5, 1] = (60, 60)  # a false alarm, once
    paths[8:, 2] = line((90, 0), (0, 1), 8)
    ids = [frame["ids"].tolist() for frame in follow(film(paths))]
    assert ids == [[1]] * 9 + [[1, 3]] * 7  # 2 was the false alarm's
    paths[4:8, 0] = np.nan
    for patience, last in ((4, 1), (3, 3)):
        found = follow(film(paths[:, :2]), Tracker(patience=patience))
        assert found[-1]["ids"].tolist() == [last], patience


def test_a_frame_without_detections_and_one_score_for_each_threshold():
    detections = film(line((0, 0), (1, 0), 6)[:, None], [[0.05], [0.55], [0.7], [0.7], [0.7], [0.7]])
    detections[4] = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0)}
    # .05 is not looked at, .55 can't be born, .7 is born in frame 2 and confirmed in frame 3.
    assert [frame["ids"].tolist() for frame in follow(detections)] == [[], [], [], [1], [], [1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tracker(high=0.7), r"Tracker\(low=0.1, high=0.7, birth=0.6\): scores rise in this order"),
        (lambda: Tracker(gate=1.0), r"Tracker\(gate=1.0\): costs are 1 - IoU"),
        (lambda: Tracker(patience=-1), r"Tracker\(patience=-1\)"),
        (lambda: Fusion(rate=0.0), r"Fusion\(rate=0.0\)"),
        (lambda: Fusion(gate=1.0), r"Fusion\(gate=1.0\)"),
        (lambda: Fusion(box_weight=0, clip_weight=0), "one of them is above"),
        (lambda: follow([{"boxes": [[0, 0, np.inf, 1]], "scores": [1]}]), r"Frame 0, detection 0: .* is no box"),
        (lambda: follow([{"boxes": [[0, 0, 1, 1]], "scores": [np.nan]}]), "Frame 0, detection: 'scores' holds nan"),
        (lambda: follow([{"boxes": [[0, 0, 1, 1]]}]), "Frame 0, detection: no 'scores' among boxes"),
    ],
)
def test_what_cannot_be_followed_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def persons(*scores):
    """One person who stands still, seen at these scores (None: not seen), as tracks."""
    here = {"boxes": np.array([box(50, 50, 30, 60)]), "ids": np.array([4])}
    nobody = {"boxes": np.zeros((0, 4)), "ids": np.zeros(0, int), "scores": np.zeros(0)}
    return [nobody if score is None else {**here, "scores": np.array([score])} for score in scores]


def sign(kind, score, x=50.0):
    """One box of a behaviour; 10 wide, so that at x = 65 half of it lies in the person's."""
    return {"boxes": np.array([box(x, 50, 10, 10)]), "classes": np.array([kind]), "scores": np.array([score])}


NO_SIGN = {"boxes": np.zeros((0, 4)), "classes": np.zeros(0, int), "scores": np.zeros(0)}


def test_fused_scores_are_the_formula():
    tracks = persons(0.9, 0.5, None, 1.0, 1.0)
    signs = [sign(0, 0.8), sign(1, 0.6), sign(1, 1.0), NO_SIGN, NO_SIGN]
    clips = [Clip(3, 5, np.array([4, 9]), [[0.1, 0.7], [1, 0]]), Clip(4, 5, np.array([4]), [[0.3, 0.1]])]
    fused = Fusion(rate=0.25, box_weight=2, clip_weight=0.5)(tracks, signs, 2, clips)
    s = np.zeros(2)
    expected = []
    for evidence in (0.9 * 2 * np.array([0.8, 0]), 0.5 * 2 * np.array([0, 0.6]), None, 0.5 * np.array([0.1, 0.7]),
                     0.5 * np.array([0.2, 0.4])):  # fmt: skip
        if evidence is not None:
            s = 0.75 * s + 0.25 * evidence
            expected.append(s)
    got = np.concatenate([frame["scores"] for frame in fused])
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert [frame["labels"].tolist() for frame in fused] == [[0], [0], [], [0], [np.argmax(expected[-1])]]
    assert [frame["rows"].tolist() for frame in fused] == [[0], [0], [], [-1], [-1]]
    assert timeline(fused)[4].tolist() == [0, 0, -1, 0, expected[-1].argmax()]


def test_a_box_counts_for_the_person_it_lies_in():
    fuse = lambda x: Fusion(rate=1.0)(persons(1.0), [sign(1, 0.9, x)], 2)[0]
    assert fuse(64.9)["labels"].tolist() == [1]  # a little more than half of it inside
    assert fuse(65.1)["labels"].tolist() == [-1]
    two = [{"boxes": np.array([box(20, 50, 30, 60), box(50, 50, 30, 60)]), "ids": [1, 2], "scores": np.ones(2)}]
    signs = [{key: np.concatenate([sign(0, 0.9)[key], sign(1, 0.9, 22)[key]]) for key in NO_SIGN}]
    assert Fusion()(two, signs, 2)[0]["labels"].tolist() == [1, 0]
    # One to one: of two boxes in one person the second finds nobody.
    both = [{key: np.concatenate([sign(0, 0.9)[key], sign(1, 0.9, 52)[key]]) for key in NO_SIGN}]
    assert sorted(Fusion()(two, both, 2)[0]["rows"].tolist()) in ([-1, 0], [-1, 1])


def test_a_memory_outlives_wrong_looks_and_no_memory_does_not():
    kinds = [0] * 6 + [1] + [0] * 5 + [None] * 3 + [0] * 2 + [1] * 10
    signs = [NO_SIGN if kind is None else sign(kind, 0.9) for kind in kinds]
    tracks = persons(*[1.0] * len(kinds))
    remembered = timeline(Fusion(rate=0.3)(tracks, signs, 2))[4]
    assert remembered.tolist() == [0] * 17 + [0] + [1] * 9  # the true change is seen a frame late
    bare = timeline(Fusion(rate=1.0)(tracks, signs, 2))[4]
    assert bare.tolist() == [-1 if kind is None else kind for kind in kinds]


def test_accuracy_is_by_identity():
    tracks = persons(1.0, 1.0, None, 1.0)
    fused = Fusion(rate=1.0)(tracks, [sign(0, 0.9), sign(1, 0.9), NO_SIGN, sign(1, 0.9)], 2)
    there = {"boxes": np.array([box(50, 50, 30, 60), box(200, 50)]), "ids": np.array([7, 8])}
    truth = [{**there, "labels": np.array([0, 0])}] * 2 + [{**there, "labels": np.array([1, 0])}] * 2
    lines = by_identity(tracks, fused, truth)
    assert [lines[7].true.tolist(), lines[7].said.tolist()] == [[0, 0, 1, 1], [0, 1, -1, 1]]
    assert {name: line.accuracy for name, line in lines.items()} == {7: 0.5, 8: 0.0}
    came_late = by_identity(tracks, fused, [{key: value[:0] for key, value in truth[0].items()}, *truth[1:]])
    assert came_late[7].accuracy == 1 / 3
    with pytest.raises(ValueError, match="4 frames of tracks, 4 of labels, 1 true"):
        by_identity(tracks, fused, truth[:1])


def test_scores_of_all_behaviours_instead_of_classes_and_what_does_not_fit():
    whole = {"boxes": sign(0, 1)["boxes"], "scores": np.array([[0.2, 0.7, 0.1]])}
    np.testing.assert_allclose(Fusion(rate=1.0)(persons(0.5), [whole], 3)[0]["scores"], [[0.1, 0.35, 0.05]])
    with pytest.raises(ValueError, match="scores of 3 behaviours; there are 2"):
        Fusion()(persons(1.0), [whole], 2)
    with pytest.raises(ValueError, match=r"classes \[2\]; they go from 0 to 1"):
        Fusion()(persons(1.0), [sign(2, 1.0)], 2)
    with pytest.raises(ValueError, match="1 frames have tracks and 2 boxes"):
        Fusion()(persons(1.0), [sign(0, 1.0)] * 2, 2)
    with pytest.raises(ValueError, match=r"Clip 0: scores of the shape \(1, 3\)"):
        Fusion()(persons(1.0), [sign(0, 1.0)], 2, [Clip(0, 1, np.array([4]), np.ones((1, 3)))])


def test_classes_are_taken_apart():
    frame = {"boxes": [[box(0, 0), box(9, 9), box(5, 5)]], "classes": [[2, 0, 1]], "scores": [[0.1, 0.2, 0.3]]}
    (kept,) = of_classes({key: np.array(value) for key, value in frame.items()}, (1, 2))
    assert kept["classes"].tolist() == [1, 0]
    assert kept["scores"].tolist() == [0.1, 0.3]
