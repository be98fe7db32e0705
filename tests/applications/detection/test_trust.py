"""Learnt trust in annotations: the loss by hand, hypergradients against differences, and what is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bilevel import Problem, data, hypergradients, lower
from bilevel.applications import Application
from bilevel.applications.detection import (
    ConvBlock,
    Detector,
    FrozenUpper,
    Head,
    OneGradient,
    RepConv,
    Routed,
    checked,
    loss,
    trust,
)
from bilevel.applications.detection.detector import Row
from bilevel.derivatives import cross_product
from bilevel.keys import Draw

RNG = np.random.default_rng(0)
EVERYTHING = ("images", "boxes", "classes", "gains")


def annotated(n, size=16, most=3):
    """Noise with boxes: one image without any, and one box without area."""
    corner, sides = RNG.uniform(0, 8, (n, most, 2)), RNG.uniform(4, 8, (n, most, 2))
    batch = {
        "image": RNG.uniform(size=(n, size, size, 3)),
        "boxes": np.concatenate([corner, corner + sides], -1),
        "classes": RNG.integers(0, 2, (n, most)).astype(np.int32),
        "mask": RNG.random((n, most)) < 0.7,
    }
    batch["mask"][0] = False
    batch["mask"][-1, 0] = True
    batch["boxes"][-1, 0] = 5
    return batch


def small_detector():
    """A convolution, attention among 2 x 2 regions, a convolution of two branches, a head of 4 bins."""
    rngs = nnx.Rngs(0)
    block = {"norm": "group", "rngs": rngs}
    rows = [
        (Row((-1,), "part", 0), ConvBlock(3, 8, 3, 4, **block)),
        (Row((0,), "part", 1), Routed(8, regions=2, heads=2, chosen=2, residual=True, rngs=rngs)),
        (Row((1,), "part", 2), RepConv(8, 8, **block)),
    ]
    head = Head(8, 2, 4, box_width=8, class_width=8, class_bias=-2.0, **block)
    return Detector(rows, (2,), (4,), [head], bins=4, classes=2)


TRAIN, CLEAN = annotated(4), annotated(4)


def one_step(problem, x, y, rate):
    low, up = problem.full_lower(), problem.full_upper()
    gradient = jax.grad(low, argnums=1)(x, y)
    return up(x, jax.tree.map(lambda a, g: a - rate * g, y, gradient))


def test_hypergradients_are_differences_with_targets_and_routing_frozen():
    with jax.enable_x64(True):
        app = trust(TRAIN, CLEAN, 2, learn=EVERYTHING, detector=small_detector(), kind="diou")
        y = jax.tree.map(lambda a: np.asarray(a, np.float64) + 0.05 * RNG.standard_normal(a.shape), app.y0)
        x = jax.tree.map(lambda a: 0.3 * RNG.standard_normal(a.shape), app.x0)
        flat, back = jax.flatten_util.ravel_pytree(x)
        rate, steps = 0.02, 1e-4 * np.eye(len(flat))

        @jax.jit
        def both(x, y, directions):
            problem = app.frozen(y, CLEAN, TRAIN)
            estimator = hypergradients.value_and_hypergradient(
                problem, hypergradients.Unrolled(), lower.GradientDescent(rate, 1)
            )
            estimate = estimator(x, y)
            at = lambda d: one_step(problem, optax.tree.add(x, back(d)), y, rate)
            return estimate, jax.flatten_util.ravel_pytree(estimate.gradient)[0], jax.lax.map(at, directions)

        estimate, gradient, values = both(x, y, np.concatenate([steps, -steps]))
        values = np.asarray(values)
        differences = (values[: len(flat)] - values[len(flat) :]) / 2e-4
        np.testing.assert_allclose(gradient, differences, atol=1e-7)
        assert np.abs(gradient).max() > 0.01 and (np.asarray(estimate.gradient["gains"]) != 0).all()
        nothing = np.asarray(estimate.gradient["boxes"])[~TRAIN["mask"]]
        np.testing.assert_array_equal(nothing, 0)
        assert np.asarray(estimate.gradient["images"])[0] != 0  # an image without boxes says where nothing is


@pytest.mark.slow
def test_without_freezing_targets_are_those_of_the_y_that_is_arrived_at():
    app = trust(TRAIN, CLEAN, 2, learn="gains", detector=small_detector())
    live = dataclasses.replace(app.problem, upper_data=CLEAN, lower_data={**TRAIN, "row": np.arange(4, dtype=np.int32)})
    both = jax.jit(lambda live, frozen: (one_step(live, app.x0, app.y0, 1.0), one_step(frozen, app.x0, app.y0, 1.0)))
    a, b = both(live, app.frozen(app.y0, CLEAN, TRAIN))
    assert abs(a - b) > 1e-6  # a step of 1 moves the predictions, and with them the target scores


def test_the_levels_are_the_formulas_and_the_weights_what_they_are_said_to_be():
    app = trust(TRAIN, CLEAN, 2, learn=EVERYTHING, detector=small_detector(), decay=0.1, gains=(4.0, 1.0, 2.0))
    assert isinstance(app, Application) and "trust" in repr(app) and app.source
    x = jax.tree.map(lambda a: jnp.asarray(RNG.standard_normal(a.shape), jnp.float32), app.x0)
    w = app.weights(x)
    assert {k: v.shape for k, v in w.items()} == {"images": (4,), "boxes": (4, 3), "classes": (2,), "gains": (3,)}
    np.testing.assert_allclose([w["gains"].sum(), w["classes"].mean()], [7, 1], rtol=1e-6)
    np.testing.assert_allclose(app.weights(app.x0)["gains"], [4, 1, 2], rtol=1e-6)
    app.problem.validate(app.x0, app.y0)

    @jax.jit
    def by_hand(y, train, clean):
        options = {"gains": w["gains"], "weights": w["boxes"], "class_weights": w["classes"], "per": "image"}
        lower = (w["images"] * loss(app.apply(y, train["image"]), train, **options).total).mean()
        upper = loss(app.apply(y, clean["image"]), clean, gains=(1.0, 1.0, 0.25), per="image").total.mean()
        return lower + 0.05 * optax.tree.norm(y, squared=True), upper

    levels = jax.jit(lambda p, y: (p.full_lower()(x, y), p.full_upper()(x, y)))
    np.testing.assert_allclose(levels(app.problem, app.y0), by_hand(app.y0, TRAIN, CLEAN), rtol=1e-5)
    doubled = dataclasses.replace(app.problem, lower=lambda x, y, b: app.problem.lower(x, y, b))
    rows = {**TRAIN, "row": np.array([3, 2, 1, 0], np.int32)}  # other weights for the same images
    other = jax.jit(lambda p, y: p.full_lower()(x, y))(dataclasses.replace(doubled, lower_data=rows), app.y0)
    assert abs(other - levels(app.problem, app.y0)[0]) > 1e-4
    found = jax.jit(lambda y, images: app.detect(y, images, confidence=0.0, most=5))(app.y0, CLEAN["image"])
    assert found.boxes.shape == (4, 5, 4) and found.mask.all()


class Look:
    """A solver that does nothing but to look at the upper level, one unit further along."""

    def init(self, problem, x, y, key):
        return SimpleNamespace(x=x, y=y)

    def step(self, problem, state, key):
        further = jax.tree.map(lambda a: a + 0.02, state.y)
        return state, problem.draw_upper(key)(state.x, further)


def test_a_solver_that_freezes_sees_the_targets_and_the_routing_of_where_it_begins():
    app = trust(TRAIN, CLEAN, 2, learn="images", detector=small_detector(), batch=2)
    key = data.as_step_key(0)
    solver = FrozenUpper(Look(), app.freeze)
    batch = app.problem.sources[0].draw(key.fold_in(Draw.UPPER))

    @jax.jit
    def values(problem, y):
        further = jax.tree.map(lambda a: a + 0.02, y)
        state = solver.init(problem, app.x0, y, key)
        frozen = app.loss(further, app.freeze(y, batch))
        return solver.step(problem, state, key)[1], frozen, app.loss(further, batch)

    seen, frozen, live = values(app.problem, app.y0)
    np.testing.assert_allclose(seen, frozen, rtol=1e-6)
    assert abs(seen - live) > 1e-5


@pytest.mark.slow
def test_one_compiled_gradient_takes_the_steps_of_its_formula():
    app = trust(TRAIN, CLEAN, 2, learn=("boxes", "gains"), detector=small_detector(), batch=4, decay=0.1)
    x = jax.tree.map(lambda a: jnp.asarray(RNG.standard_normal(a.shape), jnp.float32), app.x0)
    solver, key = OneGradient(app, optax.sgd(0.5), optax.sgd(2.0)), data.as_step_key(0)

    @jax.jit
    def both(problem, x, y):
        upper, lower = problem.levels(key)
        v = jax.grad(upper, argnums=1)(x, y)
        by_hand = cross_product(lower, x, y, v), jax.grad(lower, argnums=1)(x, y)
        return solver.step(problem, solver.init(problem, x, y, key), key)[0], *by_hand

    after, cross, lower_y = both(app.problem, x, app.y0)
    for new, old, gradient, rate in ((after.x, x, cross, -2.0), (after.y, app.y0, lower_y, 0.5)):
        moved = jax.tree.map(lambda a, b: a - b, new, old)
        size = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient))
        jax.tree.map(
            lambda m, g, size=size, rate=rate: np.testing.assert_allclose(m, -rate * g, atol=1e-4 * size),
            moved,
            gradient,
        )
    uneven = dataclasses.replace(app.problem, lower_data={**TRAIN, "row": np.arange(4, dtype=np.int32)})
    uneven = dataclasses.replace(uneven, upper_data=jax.tree.map(lambda a: a[:2], CLEAN))
    with pytest.raises(ValueError, match="takes batches of one size"):
        solver.step(uneven, solver.init(uneven, x, app.y0, key), key)


def test_one_gradient_takes_frozen_batches_as_they_are():
    """With f = x/2 |y - t|^2 and F = 1/2 |y - t|^2, t a batch's targets: f_xy F_y = (y - t) (y - 3) = 3 at y = 0."""
    app = SimpleNamespace(
        weighted=lambda y, batch, w: 0.5 * w * jnp.sum((y - batch["targets"]) ** 2),
        lower_weights=lambda x, batch: x, upper_weights=lambda batch: 1.0, decay=0.0,
    )  # fmt: skip
    batch = lambda t, **more: {"mask": np.ones((1, 1), bool), "targets": np.full(1, t, np.float32), **more}
    ours = lambda **more: Problem(app.weighted, app.weighted, upper_data=batch(3), lower_data=batch(1, **more))
    solver, x, y, key = OneGradient(app, optax.sgd(1.0), optax.sgd(1.0)), jnp.float32(2), jnp.zeros(1), 0
    after, _ = solver.step(ours(row=np.zeros(1, np.int32)), solver.init(None, x, y, key), key)
    np.testing.assert_allclose([after.x, after.y[0]], [2 + 3, 0 + 2], rtol=1e-6)
    with pytest.raises(ValueError, match=r"of which one alone has routing\. Give both the same arrays"):
        solver.step(ours(routing=np.zeros(1)), solver.init(None, x, y, key), key)


def broken(**changes):
    return {**TRAIN, **changes}


def at(name, where, value):
    array = TRAIN[name].copy()
    array[where] = value
    return {name: array}


ROW = tuple(int(i) for i in np.argwhere(TRAIN["mask"])[0])


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (at("boxes", ROW, [9, 2, 3, 8]), f"box {ROW[1]} of image {ROW[0]}.*has swapped corners"),
        (at("boxes", ROW, [2, 2, 30, 8]), "outside of the image of 16 x 16 pixels"),
        (at("boxes", ROW, [2, np.nan, 3, 8]), "a number that is not finite"),
        (at("classes", ROW, 2), "a class that is none of 0 to 1"),
        ({"image": TRAIN["image"] * 255}, "floats between 0 and 1; divide bytes by 255"),
        ({"mask": TRAIN["mask"].astype(int)}, "give bool and integers"),
        ({"boxes": TRAIN["boxes"][:3]}, r"\(n, height, width, 3\) and"),
        ({"classes": TRAIN["classes"][:, :2]}, r"both should be \(4, 3\)"),
    ],
)
def test_annotations_that_are_none_are_named(batch, said):
    with pytest.raises(ValueError, match=said):
        trust(broken(**batch), CLEAN, 2, detector=small_detector())


def test_what_is_not_looked_at_may_be_anything_and_the_rest_is_refused():
    hidden = tuple(int(i) for i in np.argwhere(~TRAIN["mask"])[0])
    cleared = checked(broken(**at("boxes", hidden, np.nan)), 2)
    np.testing.assert_array_equal(cleared["boxes"][hidden], 0)
    with pytest.raises(ValueError, match="train lacks mask"):
        trust({k: v for k, v in TRAIN.items() if k != "mask"}, CLEAN, 2)
    with pytest.raises(ValueError, match="give one or several of images, boxes, classes, gains"):
        trust(TRAIN, CLEAN, 2, learn=("images", "rates"))
    with pytest.raises(ValueError, match="has 2 classes, and classes=3"):
        trust(TRAIN, CLEAN, 3, detector=small_detector())
    with pytest.raises(ValueError, match="no box in any image"):
        trust(TRAIN, {**CLEAN, "mask": np.zeros((4, 3), bool)}, 2, detector=small_detector())
    with pytest.raises(ValueError, match=r"gains=\{'box': 1.0\}: give Gains\(box="):
        trust(TRAIN, CLEAN, 2, upper_gains={"box": 1.0}, detector=small_detector())
    with pytest.raises(ValueError, match="learnt gains start at positive numbers"):
        trust(TRAIN, CLEAN, 2, learn="gains", gains=(1.0, 0.0, 1.0), detector=small_detector())
