"""Scenes, still and moving: their annotations are exact, and exactly what was asked for is spoilt."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel.applications.detection.matching import covered, overlaps
from bilevel.applications.detection.scenes import (
    Behaviour,
    Items,
    corrupt,
    digit_items,
    fashion_items,
    moving_scenes,
    scenes,
)
from bilevel.datasets import DatasetNotFoundError


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return digit_items((3, 7))


def bars():
    """One item: a filled rectangle of 4 x 6 pixels within 10 x 10."""
    image = np.zeros((1, 10, 10), np.float32)
    image[0, 2:6, 3:9] = 1
    return Items(image, np.zeros(1, np.int32), ("bar",))


def test_a_box_is_the_ink_and_nothing_else_is():
    batch = scenes(bars(), 20, seed=0, clutter=0, objects=(1, 1))
    for image, box in zip(batch["image"], batch["boxes"][:, 0].astype(int), strict=True):
        x1, y1, x2, y2 = box
        bright = image.max(-1) > 0.8
        assert bright[y1:y2, x1:x2].all()
        assert bright.sum() == (y2 - y1) * (x2 - x1)
        assert (x2 - x1) / (y2 - y1) == pytest.approx(1.5, rel=0.1)


def test_scenes_are_what_the_interface_says(digits):
    batch = scenes(digits, 12, seed=3, size=48, objects=(2, 4), overlap=0.3)
    assert batch["image"].shape == (12, 48, 48, 3)
    assert [batch[key].dtype for key in ("image", "boxes", "classes", "mask")] == [
        "float32",
        "float32",
        "int32",
        "bool",
    ]
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    assert batch["mask"].sum(1).max() <= 4 and batch["mask"].any(1).all()
    for boxes, mask in zip(batch["boxes"], batch["mask"], strict=True):
        real = boxes[mask]
        assert (real[:, :2] >= 0).all() and (real[:, 2:] <= 48).all() and (real[:, 2:] > real[:, :2]).all()
        assert (covered(real, real) - np.eye(len(real)) <= 0.3).all()
        assert not boxes[~mask].any()
    again, other = scenes(digits, 12, seed=3, size=48, objects=(2, 4), overlap=0.3), scenes(digits, 12, seed=4, size=48)
    np.testing.assert_array_equal(batch["image"], again["image"])
    assert not np.array_equal(batch["image"][:, :, :, 0], other["image"][:, :, :, 0])


def test_items_are_real_split_and_numbered_anew(digits):
    assert digits.names == ("3", "7")
    assert set(digits.labels.tolist()) == {0, 1}
    train, test = digit_items(), digit_items(split="test")
    assert (len(train.labels), len(test.labels)) == (1297, 500)
    with pytest.raises(ValueError, match=r"classes=\(3, 12\) was given; give different numbers from 0 to 9: 0 0, 1 1"):
        digit_items((3, 12))
    with pytest.raises(ValueError, match="the digits have 'train' and 'test'"):
        digit_items(split="all")
    try:
        clothes = fashion_items((9, 1), split="test")
    except DatasetNotFoundError:
        pytest.skip("Fashion-MNIST is not installed")
    assert clothes.names == ("boot", "trousers")
    assert clothes.images.shape == (2000, 28, 28) and clothes.images.max() == 1
    assert clothes.labels.mean() == 0.5


@pytest.mark.parametrize("by", ["image", "box"])
def test_exactly_the_share_is_spoilt_and_truly_so(digits, by):
    batch = scenes(digits, 40, seed=0, objects=(1, 3))
    batch["number"] = np.arange(40)
    spoilt, wrong = corrupt(batch, 0.3, 2, seed=1, by=by)
    mask = batch["mask"]
    if by == "image":
        assert wrong.images.sum() == 12
        np.testing.assert_array_equal(wrong.any, mask & wrong.images[:, None])
    else:
        assert wrong.any.sum() == round(0.3 * mask.sum())
    np.testing.assert_array_equal(spoilt["classes"] != batch["classes"], wrong.labels)
    np.testing.assert_array_equal((spoilt["boxes"] != batch["boxes"]).any(-1), wrong.boxes)
    for row in zip(*np.nonzero(wrong.boxes), strict=True):
        assert overlaps(spoilt["boxes"][row], batch["boxes"][row])[0, 0] < 0.5
        x1, y1, x2, y2 = spoilt["boxes"][row]
        assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64
    assert spoilt["image"] is batch["image"] and spoilt["number"] is batch["number"]
    again, _ = corrupt(batch, 0.3, 2, seed=1, by=by)
    np.testing.assert_array_equal(again["boxes"], spoilt["boxes"])


def test_labels_or_boxes_alone(digits):
    batch = scenes(digits, 10, seed=0)
    spoilt, wrong = corrupt(batch, 1, 2, seed=0, boxes=False)
    np.testing.assert_array_equal(spoilt["boxes"], batch["boxes"])
    assert not wrong.boxes.any() and (wrong.labels == batch["mask"]).all()
    spoilt, wrong = corrupt(batch, 1, 2, seed=0, labels=False)
    np.testing.assert_array_equal(spoilt["classes"], batch["classes"])
    assert not wrong.labels.any() and (wrong.any == batch["mask"]).all()
    untouched, wrong = corrupt(batch, 0, 2, seed=0)
    np.testing.assert_array_equal(untouched["boxes"], batch["boxes"])
    assert not wrong.any.any()


def test_a_box_that_fills_its_image_can_be_spoilt():
    batch = {
        "image": np.zeros((1, 20, 30, 3), np.float32), "boxes": np.array([[[0, 0, 30, 20.0]]]),
        "classes": np.zeros((1, 1), int), "mask": np.ones((1, 1), bool),
    }  # fmt: skip
    spoilt, _ = corrupt(batch, 1, 3, seed=0)
    x1, y1, x2, y2 = spoilt["boxes"][0, 0]
    assert 0 <= x1 < x2 <= 30 and 0 <= y1 < y2 <= 20
    assert (x2 - x1) * (y2 - y1) < 300


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: scenes(bars(), 0, seed=0), "n=0 and size=64 were given"),
        (lambda b: scenes(bars(), 1, seed=0, objects=(3, 2)), r"objects=\(3, 2\) was given"),
        (lambda b: scenes(bars(), 1, seed=0, sides=(0.5, 1.5)), r"sides=\(0.5, 1.5\) was given"),
        (lambda b: scenes(Items(np.zeros((0, 8, 8)), np.zeros(0, int), ()), 1, seed=0), "0 images and 0 labels"),
        (lambda b: corrupt(b, 1.5, 2, seed=0), "rate=1.5 was given"),
        (lambda b: corrupt(b, 0.5, 2, seed=0, by="scene"), "by='scene' was given"),
        (lambda b: corrupt(b, 0.5, 1, seed=0), "classes=1 was given"),
        (lambda b: corrupt(b, 0.5, 2, seed=0, overlap=0), "overlap=0 was given"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(scenes(bars(), 2, seed=0))


BEHAVIOURS = (Behaviour("three", 0), Behaviour("three, moving", 0, 0.25), Behaviour("seven", 1))


def still(**options):
    """A film of filled rectangles over a ground without scraps."""
    return moving_scenes(bars(), digit_items((3, 7)), BEHAVIOURS, seed=2, clutter=0, **options)


def test_a_film_is_what_its_annotations_say():
    pytest.importorskip("sklearn")
    film = still(frames=40, identities=3, size=64, hidden=0.3)
    assert film.image.shape == (40, 64, 64, 3) and film.image.min() >= 0 and film.image.max() <= 1
    assert repr(film) == "Film(40 frames of 64 pixels, 3 identities; three, three, moving, seven)"
    np.testing.assert_array_equal(film.signs[film.mask], np.array([0, 0, 1])[film.behaviour[film.mask]])
    for t in range(40):
        held = film.sign_mask[t] & film.mask[t]
        assert (np.diag(covered(film.sign_boxes[t], film.boxes[t]))[held] > 0.99).all()
        for k in np.flatnonzero(film.mask[t]):
            x1, y1, x2, y2 = film.boxes[t, k].astype(int)
            assert film.image[t, y1:y2, x1:x2].max(-1).mean() > 0.45  # a light body there, under its sign or another
    # A body keeps its size and its way: it never jumps.
    boxes = film.boxes[:, 0][film.mask[:, 0]]
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides == sides[0]).all()
    gaps = np.diff(np.flatnonzero(film.mask[:, 0]))
    steps = np.abs(np.diff(boxes[:, :2], axis=0)).max(1)
    assert (steps <= 3 * gaps + 1).all() and steps.sum() > 10
    assert 0.1 < 1 - film.sign_mask[film.mask].mean() < 0.6
    again = still(frames=40, identities=3, size=64, hidden=0.3)
    np.testing.assert_array_equal(film.image, again.image)


def test_behaviours_last_and_change_and_one_of_them_swings():
    pytest.importorskip("sklearn")
    film = still(frames=200, identities=4, dwell=12, hidden=0.0)
    lengths = []
    for k in range(4):
        change = np.flatnonzero(np.diff(film.behaviour[:, k]))
        lengths += np.diff(change).tolist()
    assert min(lengths) >= 3 and 8 < np.mean(lengths) < 17
    offset = film.sign_boxes[..., 0] - film.boxes[..., 0]
    for number, moves in ((0, False), (1, True)):
        same = (film.behaviour[1:] == number) & (film.behaviour[:-1] == number) & film.mask[1:] & film.mask[:-1]
        steps = np.abs(np.diff(offset, axis=0))[same]
        assert (steps.mean() > 1) == moves


def test_what_a_film_gives_to_a_detector_and_to_a_judge():
    pytest.importorskip("sklearn")
    film = still(frames=30, identities=3)
    batch, truth = film.batch(), film.truth()
    assert batch["boxes"].shape == (30, 6, 4) and batch["classes"].max() == 2
    assert (batch["classes"][:, :3] == 0).all() and (batch["classes"][:, 3:] >= 1).all()
    for t, frame in enumerate(truth):
        np.testing.assert_array_equal(frame["boxes"], film.boxes[t, frame["ids"] - 1])
        np.testing.assert_array_equal(frame["labels"], film.behaviour[t, frame["ids"] - 1])
        assert len(frame["ids"]) == film.mask[t].sum()
    assert any(len(frame["ids"]) < 3 for frame in truth)  # who comes late, goes early, or is hidden


@pytest.mark.parametrize(
    ("behaviours", "options", "message"),
    [
        (BEHAVIOURS[:1], {}, "give two or more"),
        ((*BEHAVIOURS, Behaviour("nine", 5)), {}, "there is no item of the class 5 for 'nine'"),
        (BEHAVIOURS, {"identities": 0}, "identities=0"),
        (BEHAVIOURS, {"hidden": 1.0}, r"hidden=1.0"),
        (BEHAVIOURS, {"held": 0.0}, r"held=0.0"),
    ],
)
def test_films_that_cannot_be_made_are_named(behaviours, options, message):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        moving_scenes(bars(), digit_items((3, 7)), behaviours, seed=0, **options)
