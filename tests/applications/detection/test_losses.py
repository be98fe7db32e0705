"""Boxes and losses against numbers of the original implementation, closed forms, and what must stay finite."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_files import fixture_file

from bilevel.applications.detection import (
    Gains,
    Predictions,
    anchors,
    centred,
    cornered,
    from_distances,
    from_maps,
    loss,
    overlap,
    pairwise,
    suppress,
    task_aligned,
    to_distances,
)

CASES = {"a4lvl": (4, 8, 16, 32), "no_gt": (4, 8, 16, 32), "p3_p5_nc1": (8, 16, 32)}
RNG = np.random.default_rng(0)


@functools.cache
def numbers():
    return dict(fixture_file("detection", "loss.npz"))


def annotated(targets, images, size, least=1):
    """(image, class, centre and sides as shares of the canvas) as padded arrays."""
    most = max([int((targets[:, 0] == i).sum()) for i in range(images)] + [least])
    batch = {
        "boxes": np.zeros((images, most, 4), np.float32),
        "classes": np.zeros((images, most), np.int32),
        "mask": np.zeros((images, most), bool),
    }
    for i in range(images):
        for j, row in enumerate(targets[targets[:, 0] == i]):
            batch["boxes"][i, j] = np.asarray(cornered(jnp.asarray(row[2:] * np.float32(size))))
            batch["classes"][i, j], batch["mask"][i, j] = row[1], True
    return batch


def case(name):
    fixture, strides = numbers(), CASES[name]
    maps = [jnp.asarray(fixture[f"{name}/feat_{i}"].transpose(0, 2, 3, 1)) for i in range(len(strides))]
    return maps, annotated(fixture[f"{name}/targets"], len(maps[0]), maps[0].shape[1] * strides[0]), strides


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / max(np.abs(theirs).max(), 1e-30)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradient_are_the_originals(name):
    maps, batch, strides = case(name)

    def total(maps):
        found = loss(from_maps(maps, strides, 16), batch)
        return found.total, found

    (value, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(maps)
    expected = numbers()
    assert relative(value, expected[f"{name}/total"]) < 1e-5
    items = jnp.stack([7.5 * found.box, 0.5 * found.classes, 1.5 * found.bins])
    np.testing.assert_allclose(items, expected[f"{name}/loss_items"], rtol=1e-5)
    for i, g in enumerate(gradient):
        assert relative(g.transpose(0, 3, 1, 2), expected[f"{name}/grad_feat_{i}"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_assignment_is_the_originals(name):
    given = {key.split("/")[-1]: value for key, value in numbers().items() if key.startswith(f"{name}/assign_in")}
    expected = {key.split("/")[-1]: value for key, value in numbers().items() if key.startswith(f"{name}/assign_out")}
    batch = {
        "boxes": given["gt_bboxes"],
        "classes": given["gt_labels"][..., 0].astype(np.int32),
        "mask": given["mask_gt"][..., 0] > 0,
    }
    found = jax.jit(task_aligned)(given["pd_scores"], given["pd_bboxes"], given["anc_points"], batch)
    np.testing.assert_array_equal(found.labels, expected["target_labels"])
    np.testing.assert_array_equal(found.foreground, expected["fg_mask"])
    np.testing.assert_array_equal(found.index, expected["target_gt_idx"])
    np.testing.assert_array_equal(found.boxes, expected["target_bboxes"])
    np.testing.assert_allclose(found.scores, expected["target_scores"], rtol=1e-5, atol=1e-7)
    maps, _, strides = case(name)
    points, _ = anchors([m.shape[1:3] for m in maps], strides)
    np.testing.assert_array_equal(points, given["anc_points"])


def by_hand(a, b, kind):
    """The overlap of two boxes, side by side as its authors write it."""
    width, height, width_, height_ = a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = width * height + width_ * height_ - shared
    iou = shared / union
    wide, high = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    if kind == "iou":
        return iou
    if kind == "giou":
        return iou - (wide * high - union) / (wide * high)
    apart = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4 / (wide**2 + high**2)
    v = 4 / np.pi**2 * (np.arctan(width_ / height_) - np.arctan(width / height)) ** 2
    return iou - apart - (v * v / (1 - iou + v) if kind == "ciou" else 0)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_overlaps_and_their_gradients(kind):
    corner, sides = RNG.uniform(0, 20, (2, 40, 2)), RNG.uniform(2, 20, (2, 40, 2))
    a, b = np.concatenate([corner, corner + sides], axis=-1)
    with jax.enable_x64(True):
        values = overlap(jnp.asarray(a), jnp.asarray(b), kind)
        np.testing.assert_allclose(values, [by_hand(*pair, kind) for pair in zip(a, b, strict=True)], atol=1e-6)
        np.testing.assert_allclose(np.diag(pairwise(jnp.asarray(a), jnp.asarray(b), kind)), values, rtol=1e-12)
        gradient = jax.grad(lambda a: overlap(a, jnp.asarray(b), kind).sum())(jnp.asarray(a))
        for i in range(4):
            step = 1e-6 * np.eye(4)[i]
            if kind == "ciou":  # whose weight is a constant to its derivative
                iou, shape = np.asarray(overlap(a, b, "iou")), overlap(a, b, "diou") - values
                v = lambda a: 4 / np.pi**2 * (_angle(b) - _angle(a)) ** 2
                weight = v(a) / (v(a) - iou + 1)
                np.testing.assert_allclose(shape, weight * v(a), atol=1e-6)
                at = lambda a, weight=weight: overlap(a, b, "diou") - weight * v(a)
            else:
                at = lambda a: overlap(a, b, kind)
            difference = (at(a + step) - at(a - step)) / 2e-6
            np.testing.assert_allclose(gradient[:, i], difference, atol=1e-7)


def _angle(boxes):
    return np.arctan((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1] + 1e-7))


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_boxes_without_area_and_far_apart_have_finite_derivatives_of_both_orders(kind):
    a = jnp.array([[0, 0, 0, 0], [5, 5, 5, 9], [0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 1e4, 1e-3]], jnp.float32)
    b = jnp.array([[0, 0, 0, 0], [5, 5, 5, 9], [4, 0, 8, 4], [0, 0, 4, 4], [9e3, 9e3, 9e3, 1e4]], jnp.float32)
    f = lambda a: overlap(a, b, kind).sum()
    assert np.isfinite(f(a)) and np.isfinite(jax.grad(f)(a)).all()
    assert np.isfinite(jax.jvp(jax.grad(f), (a,), (jnp.ones_like(a),))[1]).all()
    assert overlap(a, b, kind)[3] == pytest.approx(1, abs=1e-5)


def test_distances_and_corners_go_back_and_forth():
    boxes = jnp.asarray(np.concatenate([corner := RNG.uniform(0, 5, (6, 2)), corner + RNG.uniform(1, 5, (6, 2))], -1))
    points = jnp.asarray(RNG.uniform(0, 5, (6, 2)))
    np.testing.assert_allclose(from_distances(points, to_distances(points, boxes)), boxes, rtol=1e-5)
    np.testing.assert_allclose(cornered(centred(boxes)), boxes, rtol=1e-5)


def predictions(images=2, classes=3, bins=8, sharp=1.0):
    maps = [
        sharp * jnp.asarray(RNG.standard_normal((images, side, side, 4 * bins + classes)), jnp.float32)
        for side in (8, 4)
    ]
    return from_maps(maps, (4, 8), bins)


BATCH = {
    "boxes": jnp.array([[[2, 3, 20, 25], [8, 8, 30, 30]], [[0, 0, 0, 0], [0, 0, 0, 0]]], jnp.float32),
    "classes": jnp.array([[0, 2], [0, 0]]),
    "mask": jnp.array([[True, True], [False, False]]),
}


def test_padding_and_crowds_say_nothing():
    found, total = predictions(), jax.jit(lambda found, batch: loss(found, batch).total)
    padded = {name: np.pad(BATCH[name], ((0, 0), (0, 3)) + ((0, 0),) * (BATCH[name].ndim - 2)) for name in BATCH}
    padded["boxes"][:, 2:] = [0.0, 0.0, 32.0, 32.0]
    padded["crowd"] = np.zeros((2, 5), bool)
    padded["mask"][:, 4] = padded["crowd"][:, 4] = True
    np.testing.assert_allclose(total(found, padded), total(found, BATCH), rtol=1e-6)
    nothing = {
        "boxes": np.zeros((2, 0, 4), np.float32),
        "classes": np.zeros((2, 0), int),
        "mask": np.zeros((2, 0), bool),
    }
    empty = {**BATCH, "mask": np.zeros((2, 2), bool)}
    np.testing.assert_allclose(total(found, nothing), total(found, empty), rtol=1e-6)


def test_images_have_losses_of_their_own_and_weights_scale_their_terms():
    found, one = predictions(), lambda tree, i: jax.tree.map(lambda a: np.asarray(a)[i : i + 1], tree)

    @jax.jit
    def whole(found):
        each = loss(found, BATCH, per="image")
        weighted = loss(found, BATCH, per="image", weights=jnp.array([0.25, 2.0]))
        same = loss(found, BATCH, per="image", weights=jnp.ones((2, 2)), class_weights=jnp.ones(3))
        gains = loss(found, BATCH, gains=Gains(2.0, 0.0, 0.0))
        return each.total, weighted.total, same.total, gains.total, gains.box

    each, weighted, same, total, box = map(np.asarray, whole(found))
    alone = jax.jit(lambda found, batch: loss(found, batch).total)
    for i in range(2):
        of_one = Predictions(*one((found.bins, found.logits), i), found.points, found.strides)
        np.testing.assert_allclose(each[i], alone(of_one, one(BATCH, i)), rtol=1e-5)
    np.testing.assert_allclose(weighted, each * [0.25, 2.0], rtol=1e-5)
    np.testing.assert_allclose(same, each, rtol=1e-6)
    np.testing.assert_allclose(total, 2 * 2 * box, rtol=1e-6)


def test_the_anchors_of_a_box_of_weight_0_are_left_out():
    found = predictions()
    targets = jax.jit(lambda found: task_aligned(found.scores, found.boxes, found.points, BATCH))(found)
    out = np.asarray(targets.foreground) & (np.asarray(targets.index) == 1)
    assert out.any() and (np.asarray(targets.foreground) & ~out).any()
    weights = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    total = lambda f: loss(f, BATCH, weights=weights, targets=targets).total
    gradient = jax.jit(jax.grad(total, allow_int=True))(found)
    assert (np.asarray(gradient.logits)[out] == 0).all() and (np.asarray(gradient.bins)[out] == 0).all()
    others = np.asarray(targets.foreground) & (np.asarray(targets.index) == 0)
    assert (np.abs(np.asarray(gradient.bins)[others]).max((-1, -2)) > 0).all()


@pytest.mark.parametrize("sharp", [1.0, 60.0])
def test_losses_have_finite_derivatives_of_both_orders_for_tiny_sharp_and_missing_boxes(sharp):
    found = predictions(sharp=sharp)
    batch = {**BATCH, "boxes": BATCH["boxes"].at[0, 0].set(jnp.array([10.0, 10.0, 10.5, 10.5])).at[0, 1].set(6.0)}
    f = lambda bins: loss(Predictions(bins, found.logits, found.points, found.strides), batch).total
    all_orders = jax.jit(lambda b: (f(b), *jax.jvp(jax.grad(f), (b,), (jnp.ones_like(b),))))
    value, gradient, curvature = all_orders(found.bins)
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.isfinite(curvature).all()


def slow_suppression(boxes, scores, iou, confidence):
    kept, table = [], np.asarray(jax.jit(lambda b: overlap(b[:, None], b[None], "iou"))(boxes))
    for a, c in sorted(np.argwhere(scores > confidence).tolist(), key=lambda ac: (-scores[*ac], ac)):
        if all(c != c_ or table[a, a_] <= iou for a_, c_ in kept):
            kept.append((a, c))
    return kept


def test_suppression_keeps_what_the_definition_keeps():
    corner = RNG.uniform(0, 20, (2, 25, 2))
    boxes = jnp.asarray(np.concatenate([corner, corner + RNG.uniform(4, 12, (2, 25, 2))], -1), jnp.float32)
    scores = jnp.asarray(RNG.integers(0, 6, (2, 25, 2)) / 6, jnp.float32)  # with ties
    found = jax.jit(functools.partial(suppress, iou=0.3, confidence=0.1, most=50))(boxes, scores)
    for i in range(2):
        expected = slow_suppression(boxes[i], np.asarray(scores[i]), 0.3, 0.1)
        kept = np.asarray(found.mask[i])
        assert list(zip(found.anchors[i][kept].tolist(), found.classes[i][kept].tolist(), strict=True)) == expected
        np.testing.assert_array_equal(found.boxes[i][kept], boxes[i][np.array([a for a, _ in expected])])
    fewer = jax.jit(lambda b, s: suppress(b, s, iou=0.3, confidence=0.1, most=3))(boxes, scores)
    np.testing.assert_array_equal(fewer.scores, found.scores[:, :3])
    alone = functools.partial(suppress, iou=0.0, confidence=0.1, across_classes=True)
    across = jax.tree.map(np.asarray, jax.jit(alone)(boxes, scores))
    overlaps = np.asarray(pairwise(across.boxes[0], across.boxes[0]))[np.ix_(*[np.flatnonzero(across.mask[0])] * 2)]
    np.testing.assert_allclose(overlaps, np.eye(len(overlaps)), atol=1e-5)


def test_what_does_not_fit_is_said():
    found = predictions()
    with pytest.raises(ValueError, match=r"weights of shape \(3,\) for 2 images of at most 2 boxes"):
        loss(found, BATCH, weights=jnp.ones(3))
    with pytest.raises(ValueError, match=r"class_weights of shape \(2,\) for 3 classes"):
        loss(found, BATCH, class_weights=jnp.ones(2))
    for gains in ({"box": 1.0, "classes": 1.0, "bins": 1.0}, (1.0, 2.0), 1.0):
        with pytest.raises(ValueError, match=r"gains=.*: give Gains\(box=.*, or three numbers in this order"):
            loss(found, BATCH, gains=gains)
    with pytest.raises(ValueError, match='neither "batch" nor "image"'):
        loss(found, BATCH, per="box")
    with pytest.raises(ValueError, match="none of iou, giou, diou, ciou"):
        overlap(BATCH["boxes"], BATCH["boxes"], "wiou")
    with pytest.raises(ValueError, match="a number between 0 and 1"):
        suppress(found.boxes, found.scores, iou=50)
    with pytest.raises(ValueError, match=r"expects \(batch, A, 4\)"):
        suppress(found.boxes[0], found.scores)
    with pytest.raises(ValueError, match="give one stride for each map"):
        from_maps([jnp.zeros((1, 2, 2, 40))], (8, 16), 8)
    with pytest.raises(ValueError, match="need more"):
        from_maps([jnp.zeros((1, 2, 2, 32))], (8,), 8)
