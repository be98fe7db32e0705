"""Boxes followed from frame to frame, and what each does: a tracker, and the fusion of scores over its tracks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bilevel.applications.detection.matching import assign, covered, overlaps
from bilevel.applications.detection.rows import Boxes, by_image, checked

Frame = dict[str, np.ndarray]


class Gaussian(NamedTuple):
    """What a filter believes of n boxes.

    Attributes:
        mean: (n, 8): centre x and y, width over height, height, and the change of each per frame.
        covariance: (n, 8, 8).
    """

    mean: np.ndarray
    covariance: np.ndarray


_OBSERVED = np.eye(4, 8)
_MOTION = np.eye(8) + np.eye(8, k=4)


@dataclasses.dataclass(frozen=True)
class Kalman:
    """A Kalman filter of boxes that move at constant velocity (Wojke, Bewley and Paulus, "Deep SORT", ICIP 2017).

    With s = (x, y, a, h), centre, width over height, height, and its velocity v, per frame s <- s + v + noise and
    v <- v + noise, and s is observed with noise. All noise is Gaussian; its deviation is a share of the height, but for
    a, which has no unit: 0.01 in the motion, 1e-5 in its velocity, 0.1 in the observation.

    Attributes:
        position: deviation of x, y and h, of the motion and of the observation, as a share of the height.
        velocity: likewise of their velocities.
    """

    position: float = 1 / 20
    velocity: float = 1 / 160

    def _noise(self, height: np.ndarray, position: float, velocity: float, ratio: float) -> np.ndarray:
        """A diagonal covariance (n, 8, 8): multiples of the two shares, and the deviation of a."""
        deviation = height[:, None] * np.repeat([self.position * position, self.velocity * velocity], 4)
        deviation[:, 2], deviation[:, 6] = ratio, 1e-5
        return deviation[:, :, None] ** 2 * np.eye(8)

    def start(self, boxes: np.ndarray) -> Gaussian:
        """Boxes (n, 4) seen for the first time: at rest, and hardly anything known of where to."""
        seen = _to_ratio(boxes)
        return Gaussian(np.pad(seen, ((0, 0), (0, 4))), self._noise(seen[:, 3], 2, 10, 1e-2))

    def predict(self, state: Gaussian) -> Gaussian:
        """One frame later."""
        noise = self._noise(state.mean[:, 3], 1, 1, 1e-2)
        return Gaussian(state.mean @ _MOTION.T, _MOTION @ state.covariance @ _MOTION.T + noise)

    def update(self, state: Gaussian, boxes: np.ndarray) -> Gaussian:
        """After boxes (n, 4) were observed: gain K = P H' (H P H' + R)^-1, mean + K (s - H mean), P - K H P."""
        noise = self._noise(state.mean[:, 3], 1, 1, 1e-1)[:, :4, :4]
        cross = state.covariance @ _OBSERVED.T
        innovation = _OBSERVED @ cross + noise
        gain = np.linalg.solve(innovation, cross.transpose(0, 2, 1)).transpose(0, 2, 1)
        surprise = _to_ratio(boxes) - state.mean @ _OBSERVED.T
        mean = state.mean + np.einsum("nij,nj->ni", gain, surprise)
        return Gaussian(mean, state.covariance - gain @ innovation @ gain.transpose(0, 2, 1))

    def boxes(self, state: Gaussian) -> np.ndarray:
        """The corners of the mean, (n, 4)."""
        x, y, ratio, height = state.mean.T[:4]
        half = np.stack([np.maximum(ratio * height, 0), np.maximum(height, 0)], 1) / 2
        centre = np.stack([x, y], 1)
        return np.concatenate([centre - half, centre + half], 1)


def _to_ratio(boxes: np.ndarray) -> np.ndarray:
    """Corners (n, 4) as centre, width over height, height."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    side = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6)
    return np.column_stack([(boxes[:, :2] + boxes[:, 2:]) / 2, side[:, 0] / side[:, 1], side[:, 1]])


class Tracks(NamedTuple):
    """A tracker's memory: n tracks, in the order of their birth.

    Attributes:
        ids: (n,), from 1, never given twice.
        state: what is believed of their boxes.
        missed: frames since each was last seen, (n,).
        confirmed: whether it was seen again after its birth, (n,).
        scores: of the detection it was last seen by, (n,).
        rows: the row of that detection in the frame just taken, -1 where there was none, (n,).
        born: ids given so far.
        frames: taken so far.
    """

    ids: np.ndarray
    state: Gaussian
    missed: np.ndarray
    confirmed: np.ndarray
    scores: np.ndarray
    rows: np.ndarray
    born: int
    frames: int

    def only(self, which: np.ndarray) -> Tracks:
        """Some of the tracks."""
        state = Gaussian(self.state.mean[which], self.state.covariance[which])
        ids, missed, confirmed, scores, rows = (
            part[which] for part in (self.ids, self.missed, self.confirmed, self.scores, self.rows)
        )
        return Tracks(ids, state, missed, confirmed, scores, rows, self.born, self.frames)


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Tracks by two-stage association in the manner of ByteTrack (Zhang et al., ECCV 2022, arXiv:2110.06864).

    In a frame (1) confirmed tracks, those lost of late among them, are predicted and matched with detections of a
    score from `high` on, at the least total cost 1 - IoU x score; (2) tracks left over that were seen in the frame
    before, with detections of a score from `low` to `high`, at the least 1 - IoU: a low score is often an object half
    hidden; (3) tracks that were born in the frame before, with what is left of (1). Detections that are still left
    and have a score from `birth` on are born as tracks; those of the first frame are confirmed at once, later ones
    when they are seen again in the next frame, and else they die. A confirmed track dies when it was not seen for more
    than `patience` frames. (The paper's code also drops one of two tracks that overlap almost wholly; here both stay.)

    Attributes:
        high: detections from this score on go into the first stage.
        low: those below it are not looked at.
        birth: a track is born from this score on.
        gate: the largest cost in the first stage.
        low_gate: in the second.
        new_gate: in the third.
        patience: frames for which a track may be lost.
        by_score: whether the first and third stage multiply the IoU by the score.
        filter: how boxes move.
    """

    high: float = 0.5
    low: float = 0.1
    birth: float = 0.6
    gate: float = 0.8
    low_gate: float = 0.5
    new_gate: float = 0.7
    patience: int = 30
    by_score: bool = True
    filter: Kalman = Kalman()

    def __post_init__(self) -> None:
        if not self.low <= self.high <= self.birth:
            raise ValueError(
                f"Tracker(low={self.low}, high={self.high}, birth={self.birth}): scores rise in this order; a track "
                "can't be born from a detection that is not in the first stage."
            )
        for name in ("gate", "low_gate", "new_gate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"Tracker({name}={getattr(self, name)}): costs are 1 - IoU; a gate lies between 0 and 1, since at "
                    "1 boxes that do not touch are matched."
                )
        if self.patience < 0:
            raise ValueError(f"Tracker(patience={self.patience}): a number of frames, 0 at least.")

    def init(self) -> Tracks:
        """Before the first frame."""
        empty = np.zeros(0)
        start = Gaussian(np.zeros((0, 8)), np.zeros((0, 8, 8)))
        return Tracks(empty.astype(int), start, empty.astype(int), empty.astype(bool), empty, empty.astype(int), 0, 0)

    def step(self, tracks: Tracks, boxes: np.ndarray, scores: np.ndarray) -> Tracks:
        """Take the detections of one frame, corners (m, 4) and scores (m,)."""
        boxes, scores = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64).reshape(-1)
        mean = tracks.state.mean.copy()
        mean[tracks.missed > 0, 7] = 0  # what is not seen does not grow
        state = self.filter.predict(Gaussian(mean, tracks.state.covariance))
        expected = self.filter.boxes(state)
        taken = np.full(len(tracks.ids), -1)
        free = np.ones(len(scores), bool)

        def match(which: np.ndarray, rows: np.ndarray, gate: float, by_score: bool) -> None:
            i, j = np.flatnonzero(which & (taken < 0)), np.flatnonzero(rows & free)
            near = overlaps(expected[i], boxes[j]) * (scores[j] if by_score else 1)
            of_track, of_box = assign(1 - near, gate)
            taken[i[of_track]] = j[of_box]
            free[j[of_box]] = False

        strong, weak = scores >= self.high, (scores >= self.low) & (scores < self.high)
        match(tracks.confirmed, strong, self.gate, self.by_score)
        match(tracks.confirmed & (tracks.missed == 0), weak, self.low_gate, False)
        match(~tracks.confirmed, strong, self.new_gate, self.by_score)

        seen = taken >= 0
        after = self.filter.update(Gaussian(state.mean[seen], state.covariance[seen]), boxes[taken[seen]])
        state.mean[seen], state.covariance[seen] = after
        kept = tracks._replace(
            state=state,
            missed=np.where(seen, 0, tracks.missed + 1),
            confirmed=tracks.confirmed | seen,
            scores=np.where(seen, np.append(scores, 0)[taken], tracks.scores),
            rows=taken,
        ).only(seen | (tracks.confirmed & (tracks.missed < self.patience)))
        return self._born(kept, boxes, scores, np.flatnonzero(free & (scores >= self.birth)))

    def _born(self, tracks: Tracks, boxes: np.ndarray, scores: np.ndarray, rows: np.ndarray) -> Tracks:
        new = self.filter.start(boxes[rows])
        both = np.concatenate
        return Tracks(
            both([tracks.ids, tracks.born + 1 + np.arange(len(rows))]),
            Gaussian(both([tracks.state.mean, new.mean]), both([tracks.state.covariance, new.covariance])),
            both([tracks.missed, np.zeros(len(rows), int)]),
            both([tracks.confirmed, np.full(len(rows), tracks.frames == 0)]),
            both([tracks.scores, scores[rows]]),
            both([tracks.rows, rows]),
            tracks.born + len(rows),
            tracks.frames + 1,
        )


def follow(detections: Boxes, tracker: Tracker = Tracker()) -> list[Frame]:
    """The tracks of a film.

    Args:
        detections: of one kind of object, "boxes" (T, N, 4), corners in pixels, "scores" (T, N), and "mask" (T, N),
            false where the row is padding; or a sequence with a mapping for each frame, with as many rows as it has.
        tracker: the rules.

    Returns:
        For each frame the tracks that are confirmed and seen in it: "boxes" (n, 4), as the filter has them, "ids" (n,),
        "scores" (n,), and "rows" (n,), which of the frame's detections each is (padding not counted).

    Raises:
        ValueError: boxes or scores that are none, by frame and row.
    """
    tracks, found = tracker.init(), []
    for k, frame in enumerate(by_image(detections, "detections")):
        rows = checked(frame, f"Frame {k}, detection", "scores")
        tracks = tracker.step(tracks, rows["boxes"], rows["scores"])
        shown = tracks.only(tracks.confirmed & (tracks.rows >= 0))
        boxes = tracker.filter.boxes(shown.state)
        found.append({"boxes": boxes, "ids": shown.ids, "scores": shown.scores, "rows": shown.rows})
    return found


def of_classes(detections: Boxes, classes: Sequence[int]) -> list[Frame]:
    """The rows of these classes alone, frame by frame; their classes are numbered anew in the order given."""
    number = {c: k for k, c in enumerate(classes)}
    kept = []
    for k, frame in enumerate(by_image(detections, "detections")):
        checked(frame, f"Frame {k}, detection", "classes")
        rows = np.isin(frame["classes"], classes)
        part = {key: array[rows] for key, array in frame.items()}
        kept.append({**part, "classes": np.array([number[int(c)] for c in part["classes"]], int)})
    return kept


class Clip(NamedTuple):
    """What a model of short clips says of some tracks.

    Attributes:
        start, stop: the frames it is about, from `start` to before `stop`.
        ids: of the tracks, (n,).
        scores: of the behaviours, not below 0, (n, behaviours).
    """

    start: int
    stop: int
    ids: np.ndarray
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Scores of behaviours for each track, from a detector, a detector of behaviours, and a model of clips.

    In each frame the boxes of behaviours are given to persons one to one, at the least total 1 - IoA (IoA: the share of
    the behaviour's box that lies in the person's), up to `gate`. With d the person's score, b the behaviours' scores of
    the box given to it (0 without one) and c what clips around this frame say of the track (their mean; 0 without any),

        e = d (box_weight b + clip_weight c),    s <- (1 - rate) s + rate e,    label = argmax s,

    and no label as long as s = 0. In a frame in which nothing is seen of it, a track keeps its label; a track that was
    lost goes on with the s that it had.

    Attributes:
        rate: 1: nothing is remembered.
        gate: the largest 1 - IoA.
        box_weight, clip_weight: what the two say counts for.
    """

    rate: float = 0.2
    gate: float = 0.5
    box_weight: float = 1.0
    clip_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"Fusion(rate={self.rate}): it lies above 0 and is 1 at most (nothing is remembered).")
        if not 0 <= self.gate < 1:
            raise ValueError(f"Fusion(gate={self.gate}): it lies between 0 and 1; at 1 boxes apart would be matched.")
        if min(self.box_weight, self.clip_weight) < 0 or self.box_weight + self.clip_weight == 0:
            raise ValueError(
                f"Fusion(box_weight={self.box_weight}, clip_weight={self.clip_weight}): weights are not below 0, and "
                "one of them is above."
            )

    def __call__(
        self, tracks: Sequence[Frame], boxes: Boxes, behaviours: int, clips: Sequence[Clip] = ()
    ) -> list[Frame]:
        """Fuse.

        Args:
            tracks: of the persons, from `follow`.
            boxes: of the behaviours, "boxes", "scores" and "classes" (numbers of the behaviours), or instead of the
                classes "scores" of all of them, (m, behaviours); padded, or a mapping for each frame.
            behaviours: how many there are.
            clips: what was seen in clips.

        Returns:
            For each frame, row by row as in `tracks`: "ids" (n,), "labels" (n,), -1 where nothing was seen yet,
            "scores" (n, behaviours), which are s, and "rows" (n,), the frame's box given to each track, -1 for none.

        Raises:
            ValueError: other numbers of frames, a class or scores of other behaviours, broken boxes.
        """
        frames = list(by_image(boxes, "boxes"))
        if len(frames) != len(tracks):
            raise ValueError(f"{len(tracks)} frames have tracks and {len(frames)} boxes of behaviours; give as many.")
        said = self._of_clips(clips, behaviours)
        memory: dict[int, np.ndarray] = {}
        fused = []
        for k, (track, frame) in enumerate(zip(tracks, frames, strict=True)):
            persons = checked(track, f"Frame {k}, track", "ids", "scores")
            places = checked({"boxes": frame["boxes"]}, f"Frame {k}, behaviour")["boxes"]
            scores = _by_behaviour(frame, behaviours, f"Frame {k}, behaviour")
            given = np.full(len(persons["ids"]), -1)
            row, column = assign(1 - covered(places, persons["boxes"]).T, self.gate)
            given[row] = column
            evidence = self.box_weight * np.concatenate([scores, np.zeros((1, behaviours))])[given]
            for i, name in enumerate(persons["ids"].tolist()):
                heard = said.get((k, name), ())
                if len(heard):
                    evidence[i] += self.clip_weight * np.mean(heard, 0)
                old = memory.get(name, np.zeros(behaviours))
                memory[name] = (1 - self.rate) * old + self.rate * persons["scores"][i] * evidence[i]
            s = np.array([memory[name] for name in persons["ids"].tolist()]).reshape(-1, behaviours)
            labels = np.where(s.max(1, initial=0) > 0, s.argmax(1), -1)
            fused.append({"ids": persons["ids"], "labels": labels, "scores": s, "rows": given})
        return fused

    def _of_clips(self, clips: Sequence[Clip], behaviours: int) -> dict[tuple[int, int], list[np.ndarray]]:
        """By frame and track, what clips say."""
        said: dict[tuple[int, int], list[np.ndarray]] = {}
        for number, clip in enumerate(clips):
            scores = np.asarray(clip.scores, np.float64)
            if scores.shape != (len(clip.ids), behaviours) or not np.isfinite(scores).all() or (scores < 0).any():
                raise ValueError(
                    f"Clip {number}: scores of the shape {scores.shape}; finite ones not below 0 were expected, of the "
                    f"shape ({len(clip.ids)}, {behaviours}): a row for each id, a column for each behaviour."
                )
            for name, row in zip(np.asarray(clip.ids).tolist(), scores, strict=True):
                for k in range(clip.start, clip.stop):
                    said.setdefault((k, name), []).append(row)
        return said


def _by_behaviour(frame: Frame, behaviours: int, where: str) -> np.ndarray:
    """The scores of a frame's boxes by behaviour, (m, behaviours)."""
    if "scores" not in frame:
        raise ValueError(f"{where}: no 'scores' among {', '.join(frame)}.")
    scores = np.asarray(frame["scores"], np.float64)
    if scores.ndim == 2 or (not len(scores) and "classes" not in frame):
        if scores.size and scores.shape[1] != behaviours:
            raise ValueError(f"{where}: scores of {scores.shape[1]} behaviours; there are {behaviours}.")
        scores = scores.reshape(-1, behaviours)
    else:
        rows = checked(frame, where, "classes", "scores")
        if ((rows["classes"] < 0) | (rows["classes"] >= behaviours)).any():
            raise ValueError(f"{where}: classes {rows['classes'].tolist()}; they go from 0 to {behaviours - 1}.")
        scores = rows["scores"][:, None] * np.eye(behaviours)[rows["classes"]]
    if not np.isfinite(scores).all() or (scores < 0).any():
        raise ValueError(f"{where}: scores have to be finite and not below 0.")
    return scores


def timeline(fused: Sequence[Frame]) -> dict[int, np.ndarray]:
    """By track its label in each frame, (T,); -1 where it was not seen, or had none yet."""
    names = sorted({int(name) for frame in fused for name in frame["ids"]})
    lines = {name: np.full(len(fused), -1) for name in names}
    for k, frame in enumerate(fused):
        for name, label in zip(frame["ids"].tolist(), frame["labels"].tolist(), strict=True):
            lines[name][k] = label
    return lines


class Line(NamedTuple):
    """What one identity does, and what was said of it, both (T,).

    Attributes:
        true: its behaviour; -1 where it can't be seen.
        said: the label of the track on it; -1 where there is none.
    """

    true: np.ndarray
    said: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of the frames in which it can be seen where the label is right; not tracked is wrong."""
        there = self.true >= 0
        return float((self.true == self.said)[there].mean())


def by_identity(
    tracks: Sequence[Frame], fused: Sequence[Frame], truth: Sequence[Frame], threshold: float = 0.5
) -> dict[int, Line]:
    """What was said of each true identity.

    In each frame tracks are given to identities: as many pairs as can be with an overlap of at least the threshold, at
    the least total 1 - IoU.

    Args:
        tracks: from `follow`.
        fused: from `Fusion`, row by row as `tracks`.
        truth: for each frame "boxes" (n, 4), "ids" (n,) and "labels" (n,) of those who can be seen.
        threshold: the least intersection over union.
    """
    if not len(tracks) == len(fused) == len(truth):
        raise ValueError(f"{len(tracks)} frames of tracks, {len(fused)} of labels, {len(truth)} true; give as many.")
    names = sorted({int(name) for frame in truth for name in frame["ids"]})
    lines = {name: Line(np.full(len(truth), -1), np.full(len(truth), -1)) for name in names}
    for k, (found, said, true) in enumerate(zip(tracks, fused, truth, strict=True)):
        labels = np.full(len(true["ids"]), -1)
        i, j = assign(1 - overlaps(true["boxes"], found["boxes"]), 1 - threshold, most=True)
        labels[i] = said["labels"][j]
        for name, label, wanted in zip(true["ids"], labels, true["labels"], strict=True):
            lines[int(name)].true[k], lines[int(name)].said[k] = wanted, label
    return lines
