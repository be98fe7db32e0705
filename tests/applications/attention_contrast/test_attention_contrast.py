"""The contrast against numbers of the original, its closed-form hypergradient, soft masks, regions and bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixture_files import fixture_file

from bilevel import linear, lower, solve, solvers
from bilevel.applications import Application
from bilevel.applications.attention_contrast import (
    clutter,
    contrast,
    crop,
    entropy,
    fuse,
    masking,
    oracle,
    regions,
)
from bilevel.hypergradients import Implicit, value_and_hypergradient

RNG = np.random.default_rng(0)


fixture = functools.partial(fixture_file, "attention_contrast")


def maps(n, tokens=12, mass=0.8):
    return RNG.dirichlet(np.ones(tokens), n) * mass


def make(strength=0.05, tokens=12):
    return oracle(maps(3, tokens), maps(3, tokens), maps(3, tokens, 1.0), strength)


def test_the_contrast_is_the_originals():
    file = fixture("contrast.npz")
    a, g, lam = jnp.asarray(file["A_Q"]), jnp.asarray(file["A_G"]), float(file["lam"])
    close = lambda ours, theirs: np.abs(np.asarray(ours) - theirs).max() < 2e-6 * np.abs(theirs).max()
    assert close(contrast(a, g, lam), file["A_hat"])
    assert close(jax.jacfwd(lambda lam: contrast(a, g, lam))(lam), file["dA_hat_dlam"])


def test_the_contrast_minimises_its_objective_and_has_the_stated_derivatives(x64):
    app = make()
    level = app.problem.full_lower()
    y = app.solution(app.x0)
    np.testing.assert_allclose(level.gradient(app.x0, y), 0, atol=1e-14)
    expected = jax.grad(app.objective)(app.x0)
    np.testing.assert_allclose(app.hypergradient(app.x0), expected, rtol=1e-12)
    h = 1e-5
    slope = (app.objective(app.x0 + h) - app.objective(app.x0 - h)) / (2 * h)
    np.testing.assert_allclose(app.hypergradient(app.x0), slope, rtol=1e-8)
    solver = lower.LBFGS(2000, tol=1e-13)
    f = value_and_hypergradient(app.problem, Implicit(linear.CG(tol=1e-13, max_steps=500)), solver)
    np.testing.assert_allclose(f(app.x0, app.y0).gradient, expected, rtol=1e-7)
    _, g = app.problem.lower_data
    hessian = jax.hessian(lambda y: level(app.x0, y))(y).reshape(36, 36)
    np.testing.assert_allclose(hessian, np.diag((2 * g * (g + 0.05)).ravel()), atol=1e-14)
    np.testing.assert_allclose(app.condition(app.x0), np.linalg.cond(hessian), rtol=1e-10)


def test_entropy_and_clutter_on_known_maps():
    flat = jnp.full((2, 16), 0.7 / 16)
    np.testing.assert_allclose(entropy(flat), np.log(16), rtol=1e-6)
    one = jnp.zeros(16).at[3].set(0.4)
    assert float(entropy(one)) == 0 and np.isfinite(jax.grad(lambda a: entropy(a))(flat[0])).all()
    plain = np.full((1, 8, 8, 3), 0.5)
    halves = plain.copy()
    halves[0, :, :4] = (1, 0, 0)
    halves[0, :, 4:] = (0, 1, 0)
    stripes = plain.copy()
    stripes[0, :, ::3] = 1.0
    np.testing.assert_allclose(clutter(plain), 0)
    np.testing.assert_allclose(clutter(halves)[1], np.log(2) / np.log(180))
    np.testing.assert_allclose(clutter(stripes)[0], 0.75)  # the central difference is 0 on a stripe
    for wrong in ((255 * plain).astype(np.uint8), np.nan * plain, plain[0]):
        with pytest.raises(ValueError, match=r"in 0\.\.1 are needed; divide bytes by 255"):
            clutter(wrong)


def test_fuse_weighs_layers_and_later_steps():
    a = jnp.asarray(RNG.random((2, 3, 6)), jnp.float32)
    w = jnp.array([0.5, 2.0])
    by_hand = sum(w[k] * (s + 1) * a[k, s] for k in range(2) for s in range(3)).reshape(2, 3)
    np.testing.assert_allclose(fuse(a, w, (2, 3), (2, 3)), by_hand, rtol=1e-5)
    assert fuse(a, w, (8, 12), (2, 3)).shape == (8, 12)
    np.testing.assert_allclose(fuse(jnp.ones_like(a), w, (8, 12), (2, 3)), 15.0, rtol=1e-5)


def test_regions_are_the_largest_connected_ones():
    saliency = np.zeros((6, 8))
    saliency[1:3, 1:3] = 5.0
    saliency[4, 5:8] = 4.0
    saliency[0, 7] = 9.0
    mask, boxes = regions(saliency, share=8 / 48, most=2)
    np.testing.assert_array_equal(boxes, [[1, 1, 3, 3], [4, 5, 5, 8]])
    assert mask.sum() == 7 and not mask[0, 7]
    picture = np.ones((6, 8, 3))
    part = crop(picture, mask)
    assert part.shape == (4, 7, 3) and part.sum() == 21
    for call, message in (
        (lambda: regions(saliency, share=0.0), r"a share in \(0, 1\]"),
        (lambda: regions(saliency[0]), r"A saliency of finite numbers \(rows, columns\)"),
        (lambda: crop(picture, np.zeros((6, 8))), "The mask is empty"),
        (lambda: crop(picture, np.ones((6, 7))), "make them alike"),
        (lambda: crop(picture, mask, margin=-5), r"crop\(margin=-5\): .* 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def samples(n, seed, tokens=9):
    """The answer is in the token that the first layer looks at; the second layer looks anywhere."""
    random = np.random.default_rng(seed)
    at, answers = random.integers(0, tokens, n), random.integers(0, 3, n)
    question = random.dirichlet(np.ones(tokens), (n, 2)) * 0.3
    question[np.arange(n), 0, at] += 0.6
    general = random.dirichlet(np.full(tokens, 20.0), (n, 2))
    features = random.normal(size=(n, tokens, 3))
    features[np.arange(n), at] = 3 * np.eye(3)[answers]
    return question, general, features, answers


def test_a_soft_mask_is_learnt_by_the_head_that_it_serves(x64):
    app = masking(samples(200, 0), samples(200, 1), classes=3, test=samples(200, 2))
    assert isinstance(app, Application) and "soft masks" in repr(app)
    solver = solvers.AID(upper_optimizer=optax.adam(0.05))
    solution = solve(app.problem, app.x0, app.y0, solver, steps=60, progress=False, metrics=app.metrics)
    assert solution.history["upper_loss"][-1] < 0.5 * solution.history["upper_loss"][0]
    assert solution.x["layers"][0] > solution.x["layers"][1] + 1
    assert solution.history["accuracy"][-1] > 0.9
    # The mask is the token that the answer is in, and neither nothing nor all.
    kept, at = app.mask(solution.x, *app.problem.upper_data[:2]), app.problem.upper_data[0][:, 0].argmax(-1)
    inside = np.arange(9) == at[:, None]
    assert kept.shape == (200, 9) and kept[inside].mean() > 0.9 and kept[~inside].mean() < 0.1


def test_half_a_mask_is_another_mask(x64):
    """The head sees features times mask: a mask that shrinks as a whole has another loss, and nothing at zero."""
    app = masking(samples(60, 0), samples(60, 1), classes=3)
    upper, y = app.problem.full_upper(), {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
    far = {**app.x0, "threshold": jnp.asarray(40.0)}  # sigmoid is exp there: one step further, the mask / e
    farther = {**app.x0, "threshold": jnp.asarray(41.0)}
    kept = [app.mask(x, *app.problem.upper_data[:2]) for x in (far, farther)]
    np.testing.assert_allclose(kept[1] * np.e, kept[0], rtol=1e-8)
    np.testing.assert_allclose(upper(far, y), np.log(3), rtol=1e-8)
    scaled = {**y, "kernel": y["kernel"] * np.exp(40.0)}
    assert abs(float(upper(far, scaled) - upper(farther, scaled))) > 0.01


def test_the_masks_hypergradient_is_that_of_the_retrained_head(x64):
    app = masking(samples(60, 0), samples(60, 1), classes=3)
    f = value_and_hypergradient(app.problem, Implicit(linear.CG(tol=1e-13)), lower.LBFGS(500, tol=1e-12))
    f = jax.jit(f)
    found = f(app.x0, app.y0).gradient
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(found))
    for name in ("threshold", "width"):
        move = lambda s, name=name: f({**app.x0, name: app.x0[name] + s}, app.y0).value
        np.testing.assert_allclose(found[name], (move(1e-5) - move(-1e-5)) / 2e-5, rtol=1e-6)


def test_bad_maps_are_named():
    good = maps(3), maps(3), maps(3, mass=1.0)
    with pytest.raises(ValueError, match=r"3 of 3 mask maps do not sum to 1\.0: the first sums to 0\.8"):
        oracle(good[0], good[1], good[0])
    with pytest.raises(ValueError, match=r"3 of 3 question maps do not sum to a mass in \(0, 1\].*first sums to 2"):
        oracle(good[2] * 2, good[1], good[2])
    with pytest.raises(ValueError, match="hold negative values"):
        oracle(good[0] - 0.2, good[1], good[2])
    with pytest.raises(ValueError, match="missing or infinite"):
        oracle(good[0] * np.nan, good[1], good[2])
    for lam in (0.0, -1e-3):
        with pytest.raises(ValueError, match=r"strictly convex for lambda > 0 alone: give a positive number"):
            oracle(*good, lam)
        with pytest.raises(ValueError, match=r"strictly convex for lambda > 0 alone"):
            contrast(good[0], good[1], lam)
    with pytest.raises(ValueError, match="differ in shape"):
        oracle(good[0][:2], good[1], good[2])
    question, general, features, answers = samples(10, 0)
    with pytest.raises(ValueError, match=r"features .* do not belong to these maps"):
        masking((question, general, features[:, 1:], answers), samples(10, 1), classes=3)
    with pytest.raises(ValueError, match=r"fuse\(grid=\(2, 2\)\) has 4 places for 6 tokens"):
        fuse(jnp.ones((1, 1, 6)), jnp.ones(1), (4, 4), (2, 2))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_the_oracles_gradient_is_that_of_its_objective(shape, x64):
    rng = np.random.default_rng(0)
    normal = lambda a: a / a.sum(-1, keepdims=True)
    question, general, mask = (normal(rng.uniform(0.1, 1, shape)) for _ in range(3))
    app = oracle(question, general, mask)
    assert float(app.hypergradient(app.x0)) == pytest.approx(float(jax.grad(app.objective)(app.x0)), rel=1e-10)


def test_an_image_without_contrast_leaves_a_gradient():
    question, general, features, answers = samples(8, 1)
    flat = np.full_like(np.asarray(question[:1]), 1 / question.shape[-1])
    held = (np.concatenate([flat, question[1:]]), np.concatenate([flat, general[1:]]), features, answers)
    app = masking(samples(20, 0), held, classes=3)
    gradient = jax.grad(app.problem.full_upper())(app.x0, app.y0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_sets_of_masking_are_looked_at():
    train, (question, general, features, answers) = samples(20, 0), samples(10, 1)
    features = np.asarray(features)
    for wrong, said in (
        ((question, general, features, np.full(10, 3)), r"validation answers are not all integers in 0\.\.2"),
        ((question, general, features, np.full(10, -1)), r"validation answers are not all integers"),
        ((question, general, np.full_like(features, np.nan), answers), "validation features are not all finite"),
        ((question[:, :1], general[:, :1], features, answers), r"validation set has 1 layers and .* one network's"),
    ):
        with pytest.raises(ValueError, match=said):
            masking(train, wrong, classes=3)
        with pytest.raises(ValueError, match=said.replace("validation", "test")):
            masking(train, samples(10, 1), classes=3, test=wrong)
    with pytest.raises(ValueError, match=r"decay=-1\): a positive number is needed"):
        masking(train, samples(10, 1), classes=3, decay=-1)
