"""Images that are changed take their boxes along: what was painted in a box is found in the box that comes out."""

from __future__ import annotations

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, data
from bilevel.applications.detection.augment import (
    GREY,
    Augmentation,
    Letterbox,
    augmented,
    flip,
    from_hsv,
    jitter,
    letterbox,
    mosaic,
    to_hsv,
    zoom,
)


def painted(boxes, height=40, width=40, colours=(0, 1)):
    """Black images, one for each list of boxes; each box is filled with 1 in the channel of its class."""
    n, most = len(boxes), max(map(len, boxes))
    batch = {
        "image": np.zeros((n, height, width, 3), np.float32), "boxes": np.zeros((n, most, 4), np.float32),
        "classes": np.zeros((n, most), np.int32), "mask": np.zeros((n, most), bool),
    }  # fmt: skip
    for k, each in enumerate(boxes):
        for m, (x1, y1, x2, y2) in enumerate(each):
            batch["image"][k, y1:y2, x1:x2, colours[m]] = 1
            batch["boxes"][k, m], batch["classes"][k, m], batch["mask"][k, m] = (x1, y1, x2, y2), colours[m], True
    return batch


def seen(image, channel):
    """The box of what has more than half of this channel, and is not grey."""
    inside = np.asarray(image[..., channel] - image[..., 2]) > 0.5
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else None


BOXES = [[(4, 6, 16, 30), (20, 10, 36, 22)], [(0, 0, 9, 12)]]


def test_a_letterbox_keeps_the_shape_and_goes_back():
    batch = painted(BOXES, 40, 80)
    square = letterbox(batch, 40)
    assert square["image"].shape == (2, 40, 40, 3)
    np.testing.assert_allclose(square["image"][:, :10], GREY)
    np.testing.assert_allclose(square["image"][:, 30:], GREY)
    np.testing.assert_allclose(square["boxes"][0, 0], [2, 10 + 3, 8, 10 + 15], atol=1e-5)
    np.testing.assert_array_equal(seen(square["image"][0], 0), [2, 13, 8, 25])
    assert not square["boxes"][1, 1].any()
    place = Letterbox.of(40, 80, 40)
    np.testing.assert_allclose(place.back(square["boxes"][0]), batch["boxes"][0], atol=1e-5)
    odd = Letterbox.of(101, 67, 64)
    assert (odd.rows, odd.columns, odd.top, odd.left) == (64, 42, 0, 11)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_flip_takes_boxes_along_and_is_its_own_inverse(axis):
    batch = painted(BOXES)
    once = flip(batch, jax.random.key(0), 1.0, axis)
    for m in range(2):
        np.testing.assert_array_equal(seen(once["image"][0], m), once["boxes"][0, m])
    assert not once["boxes"][1, 1].any()
    twice = flip(once, jax.random.key(0), 1.0, axis)
    np.testing.assert_array_equal(twice["image"], batch["image"])
    np.testing.assert_array_equal(twice["boxes"], batch["boxes"])
    np.testing.assert_array_equal(flip(batch, jax.random.key(0), 0.0, axis)["image"], batch["image"])


def test_colours_go_to_hue_and_back():
    colours = np.random.default_rng(0).random((200, 3), np.float32)
    colours[:3], colours[3] = np.eye(3), 0.5
    hsv = to_hsv(jnp.asarray(colours))
    np.testing.assert_allclose(hsv, [colorsys.rgb_to_hsv(*c) for c in colours.tolist()], atol=1e-5)
    np.testing.assert_allclose(from_hsv(hsv), colours, atol=1e-6)


def test_jitter_moves_colours_by_its_gains_and_not_boxes():
    rng = np.random.default_rng(0)
    batch = {**painted(BOXES), "image": rng.uniform(0.3, 0.6, (2, 40, 40, 3)).astype(np.float32)}
    changed = jitter(batch, jax.random.key(1), 0.0, 0.0, 0.4)
    ratio = np.asarray(changed["image"] / batch["image"]).reshape(2, -1)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)
    assert (np.abs(ratio[:, 0] - 1) < 0.4).all() and abs(ratio[0, 0] - ratio[1, 0]) > 1e-3
    np.testing.assert_allclose(jitter(batch, jax.random.key(1), 0, 0, 0)["image"], batch["image"], atol=1e-6)
    np.testing.assert_array_equal(changed["boxes"], batch["boxes"])


def test_a_zoom_takes_boxes_along_and_cuts_them():
    batch = painted([[(4, 6, 16, 30), (22, 10, 36, 22)]] * 8)
    moved = jax.jit(zoom)(batch, jax.random.key(3))
    compared = 0
    for image, boxes, mask in zip(moved["image"], np.asarray(moved["boxes"]), moved["mask"], strict=True):
        assert (boxes >= 0).all() and (boxes <= 40).all()
        for m in np.flatnonzero(mask):
            np.testing.assert_allclose(seen(image, m), boxes[m], atol=1.01)
            compared += 1
    assert compared > 10
    assert np.abs(np.asarray(moved["image"]) - GREY).min() < 1e-6  # what an image leaves open
    same = jax.jit(lambda batch, key: zoom(batch, key, 0.0, 0.0))(batch, jax.random.key(3))
    np.testing.assert_allclose(same["image"], batch["image"], atol=1e-6)
    np.testing.assert_allclose(same["boxes"], batch["boxes"], atol=1e-5)


def test_a_mosaic_has_four_images_and_their_boxes():
    four = painted([[(4, 6, 30, 34)], [(10, 8, 36, 34)], [(6, 2, 34, 36)], [(2, 10, 20, 38)]])
    four["number"] = np.arange(4)[:, None]
    compared = 0
    combine = jax.jit(mosaic)
    for seed in range(8):
        one = combine(four, jax.random.key(seed))
        assert one["image"].shape == (40, 40, 3) and one["boxes"].shape == (4, 4)
        assert one["number"].tolist() == [0, 1, 2, 3]
        boxes, mask = np.asarray(one["boxes"]), np.asarray(one["mask"])
        for m in np.flatnonzero(mask):  # in a canvas of its own, so that neighbours do not join
            alone = {**four, "image": np.where(np.arange(4)[:, None, None, None] == m, four["image"], 0)}
            np.testing.assert_allclose(seen(combine(alone, jax.random.key(seed))["image"], 0), boxes[m], atol=1.01)
            compared += 1
        assert not boxes[~mask].any()
        ink = np.asarray(one["image"])[..., 0] - np.asarray(one["image"])[..., 2] > 0.5
        covered = np.zeros_like(ink)
        for x1, y1, x2, y2 in np.round(boxes[mask]).astype(int):
            covered[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1] = True
        assert (ink & ~covered).sum() <= 0.1 * 28 * 34 * 2  # slivers of dropped boxes
    assert compared > 20


def test_a_sampler_draws_in_the_compiled_loop():
    batch = painted(BOXES * 2)
    batch["weight"] = np.ones((4, 2), np.float32)
    source = augmented(batch, 3, mosaic=0.5)
    assert isinstance(source, data.Sampler)
    problem = Problem(
        lambda x, y: (y - x) ** 2, lambda x, y, batch: (y - batch["image"].mean()) ** 2, lower_data=source
    )
    assert problem.lower_data is source

    @jax.jit
    def loop(source, steps):
        return jax.lax.scan(lambda none, step: (none, source.draw(data.as_step_key(0, step))), None, steps)[1]

    drawn = loop(source, jnp.asarray([0, 0, 1, 2], jnp.uint32))
    assert {name: leaf.shape[1:] for name, leaf in drawn.items()} == {
        "image": (3, 40, 40, 3), "boxes": (3, 8, 4), "classes": (3, 8), "mask": (3, 8), "weight": (3, 8),
    }  # fmt: skip
    image = np.asarray(drawn["image"])
    assert image.min() >= 0 and image.max() <= 1
    np.testing.assert_array_equal(image[0], image[1])
    assert not np.array_equal(image[1], image[2]) and not np.array_equal(image[2], image[3])
    assert np.asarray(drawn["mask"]).any((1, 2)).all()
    plain = augmented(batch, 3, mosaic=0.0)
    assert jax.eval_shape(plain.draw, data.as_step_key(0))["boxes"].shape == (3, 2, 4)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"number": np.arange(2)}, {}, r"'number' has the shape \(2,\), and 'mask' \(2, 2\)"),
        ({"image": np.zeros((2, 8, 8, 3), np.uint8)}, {}, "divide 8-bit pixels by 255"),
        ({"image": np.full((2, 8, 8, 3), 7.0)}, {}, "pixels go from 7.0 to 7.0; 0 to 1"),
        ({}, {"flip": 1.5}, r"Augmentation\(flip=1.5\)"),
        ({}, {"scale": 1.0}, r"Augmentation\(scale=1.0\)"),
    ],
)
def test_what_cannot_be_changed_is_named(change, options, message):
    with pytest.raises(ValueError, match=message):
        augmented({**painted(BOXES), **change}, 2, **options)
    with pytest.raises(ValueError, match="have no 'mask'"):
        augmented({name: leaf for name, leaf in painted(BOXES).items() if name != "mask"}, 2)
    with pytest.raises(ValueError, match=r"Augmentation\(batch=0\)"):
        Augmentation(0)


def test_axes_and_dtypes_that_would_tear_images_from_boxes_are_refused():
    batch = {"image": jnp.zeros((1, 4, 6, 3)), "boxes": jnp.ones((1, 1, 4)), "mask": jnp.ones((1, 1), bool)}
    for axis in (-2, 0, 3):
        with pytest.raises(ValueError, match=rf"flip\(axis={axis}\): 2 mirrors left to right, 1 top to bottom"):
            flip(batch, jax.random.key(0), 1.0, axis)
    with pytest.raises(ValueError, match=r"letterbox: the images are uint8: scale them to floating point in 0\.\.1"):
        letterbox({**batch, "image": jnp.zeros((1, 4, 6, 3), jnp.uint8)}, 8)
