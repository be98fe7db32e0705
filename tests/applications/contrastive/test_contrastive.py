"""The contrastive losses, encoders and defences against closed forms; the study's limits and its columns."""

from __future__ import annotations

import ast
import dataclasses
import functools
import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

pytest.importorskip("sklearn")

from bilevel import Problem, data, datasets, hypergradients, linear, lower, run, solve
from bilevel.applications import Application, contrastive
from bilevel.applications.contrastive import (
    DEFENCES,
    METHODS,
    MLP,
    ROUTES,
    Augmentation,
    Claim,
    Conv,
    Perturbation,
    Pretraining,
    Share,
    auroc,
    byol,
    defences,
    knn,
    logits,
    nt_xent,
    probe,
    robustness_study,
    simsiam,
    tpr_at,
    wilson,
)
from bilevel.applications.contrastive.defences.repair import Parts
from bilevel.applications.contrastive.defences.suspect import small_outlier
from bilevel.applications.contrastive.digits import split
from bilevel.applications.contrastive.encoders import apply_head, head
from bilevel.applications.contrastive.problem import alignment, problem_of
from bilevel.applications.contrastive.routes import route
from bilevel.hypergradients import value_and_hypergradient

RNG = np.random.default_rng(0)


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def test_losses_are_numpys(x64):
    p1, p2, z1, z2 = RNG.normal(size=(4, 5, 3))
    cos = lambda a, b: (unit(a) * unit(b)).sum(-1)
    a = [jnp.asarray(part) for part in (p1, p2, z1, z2)]
    found = {
        loss: jax.jit(lambda *a, loss=loss: (loss(*a), jax.grad(loss, argnums=(2, 3))(*a)))(*a)
        for loss in (simsiam, byol)
    }
    np.testing.assert_allclose(found[simsiam][0], -0.5 * (cos(p1, z2) + cos(p2, z1)).mean(), rtol=1e-12)
    np.testing.assert_allclose(found[byol][0], ((2 - 2 * cos(p1, z2)) + (2 - 2 * cos(p2, z1))).mean() / 2, rtol=1e-12)
    z, expected = unit(np.concatenate([z1, z2])), 0.0
    for i in range(10):
        weights = np.exp(z @ z[i] / 0.7)
        expected -= np.log(weights[(i + 5) % 10] / (weights.sum() - weights[i])) / 10
    np.testing.assert_allclose(jax.jit(lambda z1, z2: nt_xent(z1, z2, 0.7))(*a[2:]), expected, rtol=1e-12)
    # nothing is learnt through what is held: SimSiam's projections, BYOL's targets
    for _, held in found.values():
        assert not any(np.any(g) for g in held)
    assert np.isfinite(jax.jit(jax.grad(nt_xent))(np.zeros((4, 3)), z2[:4])).all()


def test_simsiams_collapse_has_the_least_loss_and_simclrs_not(x64):
    collapsed = jax.jit(lambda same: (simsiam(same, same, same, same), nt_xent(same, same)))(np.ones((6, 4)))
    np.testing.assert_allclose(collapsed[0], -1)
    np.testing.assert_allclose(collapsed[1], np.log(11))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bound_holds_exactly_for_any_parameters(dtype, x64):
    images = np.concatenate([RNG.uniform(size=(200, 8, 8)), RNG.integers(0, 17, (200, 8, 8)) / 16]).astype(dtype)
    for bound in (8 / 255, 0.1, 1 / 3, 1e-9, 1.0):
        g = Perturbation(bound, hidden=16)
        params = jax.tree.map(lambda a: a.astype(dtype), g.init(jax.random.key(0)))
        for scale in (0.0, 1.0, 1e3, 1e30, -1e30, np.inf, np.nan):
            changed = np.asarray(g(jax.tree.map(lambda a, s=scale: a * s, params), jnp.asarray(images)))
            assert changed.dtype == dtype and changed.min() >= 0 and changed.max() <= 1
            exact = np.abs(changed.astype(np.longdouble) - images.astype(np.longdouble))
            assert exact.max() <= bound
        pattern = 30 * np.sign(RNG.normal(size=64))
        fixed = np.asarray(
            g(jax.tree.map(lambda a: a.astype(dtype), g.fixed(pattern)), jnp.full((1, 8, 8), 0.5, dtype))
        )
        difference = np.clip(0.5 + bound * np.sign(pattern).reshape(8, 8), 0, 1) - 0.5
        np.testing.assert_allclose(fixed[0] - 0.5, difference, atol=1e-6)


def test_bounds_outside_of_their_range_are_refused():
    for bound in (0, -0.1, 1.5, np.nan, "a", True, None):
        with pytest.raises(ValueError, match=r"bound=.*an L-infinity bound lies in \(0, 1\]"):
            Perturbation(bound)
    with pytest.raises(ValueError, match=r"bound=2: pixels lie in 0\.\.1"):
        robustness_study(bound=2)


def test_augmentations_are_what_they_say(x64):
    images = jnp.asarray(RNG.uniform(size=(3, 8, 8)))
    nothing = Augmentation(0.0, 1.0, 0.0, 0.0, 0.0)
    np.testing.assert_allclose(nothing.apply(nothing.draw(jax.random.key(0), 3), images), images, atol=1e-12)
    draws = {**nothing.draw(jax.random.key(0), 3), "offset": jnp.array([[1.0, 0.0]] * 3)}
    shifted = nothing.apply(draws, images)
    np.testing.assert_allclose(shifted[:, :7], images[:, 1:], atol=1e-12)
    np.testing.assert_allclose(shifted[:, 7], 0, atol=1e-12)
    jitter = Augmentation(0.0, 1.0, 0.5, 0.2, 0.1)
    draws = jitter.draw(jax.random.key(1), 3)
    mean = images.mean((1, 2), keepdims=True)
    c, b = draws["contrast"][:, None, None], draws["brightness"][:, None, None]
    np.testing.assert_allclose(jitter.apply(draws, images), c * (images - mean) + mean + b + draws["noise"], atol=1e-12)
    many = Augmentation().draw(jax.random.key(2), 4000)
    assert many["scale"].min() >= 0.75 and many["scale"].max() <= 1
    assert np.abs(many["offset"]).max() <= 1 + 0.25 * 3.5
    assert np.asarray(many["noise"]).std() == pytest.approx(0.05, rel=0.02)
    with pytest.raises(ValueError, match="the crop's share lies in"):
        Augmentation(crop=0.0)


def test_encoders_by_hand(x64):
    image = jnp.asarray(RNG.normal(size=(2, 8, 8)))
    conv = Conv((3,), 5)
    params = jax.tree.map(lambda a: np.asarray(a) + 0.1, jax.jit(conv.init)(jax.random.key(0)))
    padded, kernel = np.pad(image, ((0, 0), (1, 1), (1, 1))), np.asarray(params["layer0"]["w"]).reshape(3, 3, 3)
    by_hand = np.zeros((2, 8, 8, 3))
    for i in range(8):
        for j in range(8):
            by_hand[:, i, j] = np.einsum("nab,abc->nc", padded[:, i : i + 3, j : j + 3], kernel) + 0.1
    active = np.asarray(jax.nn.gelu(jnp.asarray(by_hand)))
    pooled = active.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, -1)
    expected = pooled @ params["layer1"]["w"] + params["layer1"]["b"]
    found, activations = jax.jit(lambda p, x: (conv(p, x), conv.activations(p, x)))(params, image)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(activations[0][0], active.mean((1, 2)), rtol=1e-10)
    kernels = jax.eval_shape(lambda key: list(Conv((3, 4), 5).kernels(Conv((3, 4), 5).init(key))), jax.random.key(0))
    assert [w.shape for w in kernels] == [(3, 1, 9), (4, 3, 9)]
    mlp = MLP((6,), 4)
    params = jax.jit(mlp.init)(jax.random.key(0))
    hidden = jax.nn.gelu(image.reshape(2, 64) @ params["layer0"]["w"])
    np.testing.assert_allclose(mlp(params, image), hidden @ params["layer1"]["w"], rtol=1e-10)
    for wrong in (lambda: MLP((0,)), lambda: Conv((4,) * 4), lambda: MLP((3.5,))):
        with pytest.raises(ValueError, match=r"positive integers|one to three convolutions"):
            wrong()


def test_a_head_normalises_by_its_batch(x64):
    params, x = jax.jit(lambda key: head(key, 4, 6, 3))(jax.random.key(0)), RNG.normal(size=(7, 4)) * 5 + 2
    hidden = x @ np.asarray(params["first"]["w"])
    hidden = np.asarray(jax.nn.gelu((hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)))
    np.testing.assert_allclose(jax.jit(apply_head)(params, x), hidden @ params["second"]["w"], rtol=1e-10)


def tiny(method="simclr", **options):
    return Pretraining(method, MLP((6,), 4), 4, batch=12, **options)


def test_byols_target_is_the_average_of_the_online_network(x64):
    """xi <- m xi + (1 - m) theta, with the theta before the step, m rising from .9 to 1."""
    learner = tiny("byol", momentum=0.9)
    params, rule = jax.tree.map(np.asarray, jax.jit(learner.init)(jax.random.key(0))), learner.rule(4)
    params = {**params, "target": jax.tree.map(lambda a: a + 1.0, params["target"])}
    memory, views = jax.jit(rule.init)(params), jnp.asarray(RNG.uniform(size=(2, 12, 8, 8)))

    @jax.jit
    def step(params, memory):
        updates, memory = rule.update(jax.grad(learner.loss)(params, *views), memory, params)
        return jax.tree.map(jnp.add, params, updates), memory

    for k in range(4):
        new, memory = step(params, memory)
        params, new = jax.tree.map(np.asarray, (params, new))
        m = 1 - 0.1 * 0.5 * (1 + np.cos(np.pi * k / 4))
        for part in ("encoder", "projector"):
            expected = jax.tree.map(
                lambda xi, theta, m=m: m * xi + (1 - m) * theta, params["target"][part], params[part]
            )
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), new["target"][part], expected)
            assert not np.allclose(new["encoder"]["layer0"]["w"], params["encoder"]["layer0"]["w"])
        params = new


@functools.partial(jax.jit, static_argnums=0)
def accuracies(encode, encoder, d):
    """Of the probe and of ten neighbours, and the share of features that vary."""
    trusted, test = encode(encoder, d.trusted), encode(encoder, d.test)
    right = logits(probe(trusted, d.trusted_labels), test).argmax(-1) == d.test_labels
    near = knn(trusted, d.trusted_labels, test) == d.test_labels
    return right.mean(), near.mean(), (test.std(0) > 1e-2).mean()


@pytest.mark.parametrize("method", METHODS)
def test_pretraining_teaches_every_method(method):
    """On held-out digits 300 steps give better features than a random encoder has, by probe and by neighbours."""
    d = split(0, 0, 0.02)
    learner = Pretraining(method, MLP((48,), 12), 16)
    start = learner.init(jax.random.key(1))
    trained = jax.jit(lambda y: learner.train(jnp.asarray(d.pool), jax.random.key(2), 300, y))(start)
    before = accuracies(learner.encoder, start["encoder"], d)
    after = accuracies(learner.encoder, trained["encoder"], d)
    assert after[0] > before[0] + 0.1
    assert after[1] > before[1] + 0.03
    assert after[2] == 1  # no collapse


def test_judging_is_by_the_book(x64):
    low, high = wilson(8, 10)
    for p in (low, high):
        np.testing.assert_allclose(abs(p - 0.8), 1.96 * np.sqrt(p * (1 - p) / 10), rtol=1e-10)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    scores, positive = RNG.integers(0, 9, 60).astype(float), RNG.uniform(size=60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    np.testing.assert_allclose(jax.jit(auroc)(scores, positive), np.mean(pairs), rtol=1e-12)
    scores = np.concatenate([np.arange(100.0), [94.5, 95.5, 200.0, -3.0]])
    found = jax.jit(tpr_at)(scores, np.arange(104) >= 100)
    np.testing.assert_allclose(found, 0.75)  # of the negatives 95, ..., 99 are above the threshold 94
    features, labels = RNG.normal(size=(40, 5)), np.arange(40) % 10
    assert (knn(jnp.asarray(features), labels, jnp.asarray(3 * features), 1) == labels).all()
    with pytest.raises(ValueError, match=r"knn\(k=41\): between 1 and 40"):
        knn(jnp.asarray(features), labels, jnp.asarray(features), 41)
    sizes = np.array([1.0, 9.0, 10.0, 11.0, 12.0])
    np.testing.assert_allclose(jax.jit(small_outlier)(sizes), 9 / 1.4826, rtol=1e-9)


def frozen(anchor=0.0, decay=1e-4):
    """A small problem in float64, every second image of its pool flagged; its draws are frozen."""
    digits = split(0, 0, 0.04)
    rows = np.concatenate([np.flatnonzero(digits.flags)[:10], np.flatnonzero(~digits.flags)[:10]])
    pool, labels, flags = (part[rows] for part in (digits.pool, digits.pool_labels, digits.flags))
    assert pool.dtype == np.float64 and flags.sum() == 10
    learner = Pretraining("simclr", MLP((4,), 4), 8, batch=16, decay=decay, temperature=1.0)
    g = Perturbation(0.3, 3)
    x, y = jax.jit(lambda: (g.init(jax.random.key(0)), learner.init(jax.random.key(3))))()
    digits = digits._replace(pool=pool, pool_labels=labels, flags=flags)
    problem = problem_of(g, learner, digits, 0, anchor, y)
    sources = problem.upper_data, problem.lower_data
    drawn = [Parts(batch) for batch in jax.jit(lambda: [source.draw(data.as_step_key(0)) for source in sources])()]
    return learner, x, y, Problem(problem.upper, problem.lower, upper_data=drawn[0], lower_data=drawn[1])


def against_central_differences(problem, estimator, solver, x, y, step=1e-5):
    """The estimate at x; its gradient, and F_x with y held, flat; and by direction (slope, central difference of F)."""
    at, unravel = ravel_pytree(x)
    found = jax.jit(lambda problem, at: value_and_hypergradient(problem, estimator, solver)(unravel(at), y))
    flat = jax.jit(lambda tree: ravel_pytree(tree)[0])
    estimate = found(problem, at)
    gradient = flat(estimate.gradient)
    held = flat(jax.jit(lambda problem, y: jax.grad(problem.draw_upper(0))(x, y))(problem, estimate.lower.y))
    pairs = []
    for direction in (np.random.default_rng(0).normal(size=at.size), np.asarray(gradient - held)):
        direction = direction / np.linalg.norm(direction)
        ends = [float(found(problem, at + sign * step * direction).value) for sign in (1, -1)]
        pairs.append((float(gradient @ direction), (ends[0] - ends[1]) / (2 * step)))
    return estimate, gradient, held, pairs


def test_the_implicit_hypergradient_is_the_derivative_of_the_lower_level_solved_again(x64):
    """Frozen draws, float64; the anchor makes the lower level strongly convex where it is solved to 1e-10."""
    _, x, y, problem = frozen(anchor=40.0, decay=1e-2)
    implicit = hypergradients.Implicit(linear.CG(tol=1e-12))
    solver = lower.GradientDescent(0.01, 400)
    estimate, gradient, held, pairs = against_central_differences(problem, implicit, solver, x, y)
    assert estimate.metrics["lower_residual"] < 1e-10
    assert estimate.metrics["negative_curvature"] == 0
    for slope, difference in pairs:
        np.testing.assert_allclose(slope, difference, rtol=1e-7)
    assert np.linalg.norm(gradient - held) > 0.5 * np.linalg.norm(held)  # y follows x, and much comes of it


def test_the_unrolled_route_is_the_derivative_through_its_steps_and_the_alternation_holds_y(x64):
    """Two gradient steps (Adam's first is a sign, no difference sees its slope) from a draw that replaces y."""
    learner, x, y, problem = frozen()
    make = lambda name: route(name, optax.sgd(0.05), learner.init, inner=2, every=3)
    solver = make("unrolled")
    assert isinstance(solver.lower_solver, lower.Reinitialized)
    estimate, _, held, pairs = against_central_differences(problem, solver.hypergradient, solver.lower_solver, x, y)
    for slope, difference in pairs:
        np.testing.assert_allclose(slope, difference, rtol=1e-6)
    alternating = make("alternating").hypergradient
    (upper, below), identity = problem.levels(data.as_step_key(0)), lower.Identity()
    at_the_same = jax.jit(lambda y: alternating(upper, below, identity, x, identity.init(y), ()))(estimate.lower.y)
    np.testing.assert_allclose(ravel_pytree(at_the_same.gradient)[0], held, rtol=1e-12)
    np.testing.assert_allclose(at_the_same.value, estimate.value, rtol=1e-12)
    assert isinstance(make("frozen").lower_solver, lower.Identity)
    with pytest.raises(ValueError, match="route 'best': the routes to a hypergradient are alternating, unrolled"):
        make("best")


def test_spectral_scores_are_numpys_svd(x64):
    features, member = RNG.normal(size=(30, 4)) * [3, 1, 1, 1], RNG.uniform(size=30) < 0.6
    chosen = features[member] - features[member].mean(0)
    first = np.linalg.svd(chosen)[2][0]
    scores = np.asarray(jax.jit(defences.spectral_scores)(features, member))
    np.testing.assert_allclose(scores[member], (chosen @ first) ** 2, rtol=1e-8)
    assert not np.asarray(scores)[~member].any()


def test_silhouettes_and_clusters_are_scikit_learns(x64):
    from sklearn.metrics import silhouette_samples

    points = np.concatenate([RNG.normal(size=(14, 3)) + 2, RNG.normal(size=(9, 3)) - 2, RNG.normal(size=(7, 3)) * 9])
    member = np.arange(30) < 23  # the last seven are not there
    clusters = jax.jit(lambda points, member: defences.k_means(points, 2, jax.random.key(0), member=member))
    silhouettes = jax.jit(defences.silhouettes)
    centres, side = map(np.array, clusters(points, member))
    assert len(set(side[:14])) == len(set(side[14:23])) == 1 and side[0] != side[14]
    for c in (0, 1):
        np.testing.assert_allclose(centres[c], points[:23][side[:23] == c].mean(0), rtol=1e-12)
    side[3] = side[14]  # one stands wrong
    found = np.asarray(silhouettes(points, side, member))
    np.testing.assert_allclose(found[:23], silhouette_samples(points[:23], side[:23]), rtol=1e-7)
    assert not found[23:].any()
    alone = np.where(np.arange(30) == 2, 1, 0).astype(side.dtype)
    assert np.asarray(silhouettes(points, alone, member))[2] == 0


def test_the_smallest_trigger_is_the_least_that_works(x64):
    """x + y > 1 with the size (x + y) / 9: lambda grows until the trigger stands at the border."""
    terms = lambda raw: (-jnp.tanh(raw.sum()), (raw.sum() > 1).astype(float), raw.sum() / 9)
    least = jax.jit(lambda raw: defences.smallest(terms, raw, steps=400, wanted=0.5, up=2.0, down=2**1.5, rate=0.02))
    assert 1 / 9 < least(jnp.array([2.0, 1.0])) < 1.05 / 9
    never = lambda raw: (raw @ raw, 0.0 * raw.sum(), raw @ raw)
    assert defences.smallest(never, jnp.ones(2), steps=3, wanted=0.5, up=2.0, down=2.0) == 1


def test_ibaus_hypergradient_is_the_closed_form_of_a_linear_classifier(x64):
    """All of class 0, two classes: delta* = -a w with c a = mean sigma(a |w|^2 - m_i), w = W_0 - W_1."""
    images, c, portion = RNG.uniform(size=(9, 8, 8)), 3.0, 0.7
    weights = 0.15 * RNG.normal(size=(64, 2))  # |w|^2 is about 3, well below 4 c
    classify = lambda params, x: x.reshape(len(x), 64) @ params
    app = defences.ibau(
        classify, jnp.asarray(weights), images, np.zeros(9, int), penalty=c, portion=portion, bound=None
    )
    assert isinstance(app, Application) and "I-BAU" in repr(app)
    flat = images.reshape(9, 64)
    w = weights[:, 0] - weights[:, 1]
    margins, square, a = flat @ w, w @ w, 0.0
    sigma = lambda t: 1 / (1 + np.exp(-t))
    for _ in range(200):  # a contraction, |w|^2 < 4 c
        a = sigma(a * square - margins).mean() / c
    s = sigma(a * square - margins)  # -dF/d(margin_i) times n
    curve = (s * (1 - s)).mean()
    # F = mean softplus(a |w|^2 - m_i), s_i its slopes; a follows w by the implicit derivative of its equation
    slope = ((s * (1 - s))[:, None] * (2 * a * w - flat)).mean(0) / (c - curve * square)
    expected = s.mean() * square * slope + (s[:, None] * (2 * a * w - flat)).mean(0)
    expected = portion * expected - (1 - portion) * (sigma(-margins)[:, None] * flat).mean(0)  # and the clean images'
    found = jax.jit(value_and_hypergradient(app.problem, hypergradients.Implicit(), lower.Newton()))(app.x0, app.y0)
    np.testing.assert_allclose(found.lower.y.ravel(), -a * w, rtol=1e-8)
    np.testing.assert_allclose(found.gradient, np.stack([expected, -expected], 1), rtol=1e-7)
    series = hypergradients.Implicit(linear.Neumann(step_size=1 / c, steps=80))  # the authors' fixed point, in full
    found = jax.jit(value_and_hypergradient(app.problem, series, lower.Identity()))(app.x0, found.lower.y)
    np.testing.assert_allclose(found.gradient[:, 0], expected, rtol=1e-7)


def test_many_encoders_are_each_alone(x64):
    """A run of a stacked problem is a run for each encoder."""
    encode = MLP((5,), 3)
    init = jax.jit(encode.init)
    params = [jax.tree.map(lambda a: np.asarray(a, np.float64), init(jax.random.key(k))) for k in range(2)]
    base, pool = RNG.uniform(size=(2, 12, 8, 8)), RNG.uniform(size=(2, 20, 8, 8))
    stack = lambda trees: jax.tree.map(lambda *a: np.stack(a), *trees)
    solver = defences.asset_solver(20, rate=1e-2)
    app = defences.asset(encode, stack(params), base, pool, stacked=True)
    solution = solve(app.problem, app.x0, app.y0, solver, steps=3, progress=False)
    np.testing.assert_allclose(solution.y.sum(-1), 1, rtol=1e-12)  # on the simplex, of each
    one = defences.asset(encode, params[1], base[1], pool[1])
    alone, _ = jax.jit(lambda: run(one.problem, solver, one.x0, one.y0, 3))()
    ends = [jax.tree.map(lambda a: a[1], solution.x), alone.x]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10), ends[0], ends[1])


REFUSED = [
    ({"data": "cifar10"}, "data='cifar10': this study evaluates defences on scikit-learn's 8x8 digits and takes no"),
    ({"data": (np.zeros((5, 64)), np.zeros(5))}, "data=a tuple: this study evaluates defences"),
    ({"target": 10}, "target=10: this class does not occur among the digits; their classes are 0 to 9"),
    ({"target": True}, "target=True: this class does not occur"),
    ({"bound": 0}, "bound=0: pixels lie in"),
    ({"share": 0.2}, "share=0.2 is 270 of 1350 images, all of one class, which has"),
    ({"share": 0.0}, "share=0.0: the share of the pool that is perturbed lies in"),
    (
        {"clean_encoders": 2},
        "clean_encoders=2: a defence's false-positive rate is measured on at least 3 clean encoders",
    ),
    ({"defences": ()}, "attacks are shown beside defences alone, so name at least one"),
    ({"defences": ("prayer",)}, "defences: 'prayer' is none of DECREE, SSL-Cleanse"),
    ({"defences": ("CLP", "CLP")}, "name at least one, each once; they are DECREE"),
    ({"defences": "CLP"}, "defences='CLP': give a sequence of names, such as ('DECREE',)"),
    ({"defences": None}, "defences=None: give a sequence of names"),
    ({"attacks": ()}, "one of them is defended against, so name at least one, each once"),
    ({"attacks": ("luck",)}, "attacks: 'luck' is none of alternating, unrolled"),
    ({"attacks": "frozen"}, "attacks='frozen': give a sequence of names, such as ('alternating',)"),
    ({"attacked": "frozen", "attacks": ("unrolled",)}, "attacked='frozen' is not among the attacks unrolled"),
    ({"seeds": (0, 0)}, "give different integers that are not negative"),
    ({"seeds": 3}, "seeds=3: give different integers that are not negative, at least one, as a tuple"),
    ({"seeds": (-1,)}, "seeds=(-1,): give different integers"),
    ({"seeds": (0.5,)}, "seeds=(0.5,): give different integers"),
    ({"pretraining": "simclr"}, "pretraining='simclr': give a Pretraining, such as Pretraining('byol', Conv())"),
    ({"pretraining": False}, "pretraining=False: give a Pretraining"),
    ({"attacks": iter(("luck",))}, "attacks: 'luck' is none of"),
    ({"seeds": (2**32,)}, "seeds=(4294967296,): give different integers that are not negative"),
    ({"share": np.float32(0.2)}, "is 270 of 1350 images, all of one class, which has"),
    ({"bound": np.float32(2)}, "bound=np.float32(2.0): pixels lie in"),
    ({"rounds": 0}, "rounds=0: a positive integer is needed"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_the_study_refuses(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        robustness_study(**options)


@dataclasses.dataclass(frozen=True)
class Plain:
    """An encoder of one's own, with no more than pretraining needs."""

    width: int = 6

    def init(self, key):
        return jax.random.normal(key, (64, self.width)) / 8

    def __call__(self, params, images):
        return jnp.tanh(images.reshape(*images.shape[:-2], 64) @ params)


def test_what_a_pretraining_refuses_and_whose_encoder_it_takes():
    for wrong, said in [
        ({"method": "moco"}, "the methods are simclr, simsiam, byol"),
        ({"encoder": "MLP"}, r"encoder='MLP'\): an encoder is MLP\(\), Conv\(\), or an object with init"),
        ({"batch": 1}, "a contrast needs two images at least"),
        ({"projection": 0}, "a width is a positive integer"),
        ({"temperature": 0.0}, "a positive number is needed"),
        ({"decay": -1.0}, "the decay of the weights is not negative"),
        ({"momentum": 1.5}, "an average's momentum lies in"),
    ]:
        with pytest.raises(ValueError, match=said):
            Pretraining(**wrong)
    learner = Pretraining("simsiam", Plain(), 4, batch=12)
    with pytest.raises(ValueError, match="Plain has no activations and no kernels, and CLP, ANP prune its channels"):
        robustness_study(pretraining=learner, defences=("CLP", "blur", "ANP"))
    start = learner.init(jax.random.key(0))
    views = jnp.asarray(RNG.uniform(size=(2, 12, 8, 8)))
    assert np.isfinite(jax.jit(learner.loss)(start, *views)) and start["encoder"].shape == (64, 6)


def test_the_digits_are_known_by_their_content():
    images, labels = datasets.digits()
    alignment(data=(images, labels))
    images[0, 0] += 1
    with pytest.raises(ValueError, match="takes no other data"):
        alignment(data=(images, labels))


def test_nothing_of_the_application_writes_or_has_a_command_line():
    """No call that opens, saves or parses arguments stands in its code, and it runs as no module."""
    folder = Path(contrastive.__file__).parent
    calls = {"open", "save", "savez", "savetxt", "tofile", "dump", "dumps", "write", "write_text", "write_bytes",
             "ArgumentParser", "to_csv", "checkpoint", "imsave", "savefig"}  # fmt: skip
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                assert name not in calls, (file.name, name)
                assert not any(k.arg == "checkpoint" for k in node.keywords), file.name
    assert not list(folder.rglob("__main__.py"))


def small_study(seeds, attacks, defences, **options):
    learner = Pretraining("simclr", MLP((8,), 6), 4, batch=16)
    sizes = {"steps": 10, "rounds": 2, "inner": 2, "repair_steps": 2}
    return robustness_study(seeds, pretraining=learner, attacks=attacks, defences=defences, **sizes, **options)


def check_columns(study):
    """Both halves are there for each seed, with intervals, and the table says it all."""
    n = len(study.seeds)
    for attack in study.attacks.values():
        assert attack.accuracy.trials == n * 297 and attack.success.trials < attack.accuracy.trials
        low, high = attack.success.interval
        assert 0 <= low <= attack.success.value <= high <= 1
        assert len(attack.success.by_seed) == len(attack.together) == n
    assert study.attacks["fixed"].surrogate is None
    for name, d in study.defences.items():
        rule = DEFENCES[name]
        assert len(d.statistic) == n and len(d.clean_statistic) == 3
        assert np.isfinite([*d.statistic, *d.clean_statistic]).all() and 0 <= d.false_positives <= 1
        flags = [value < d.threshold if rule.below else value > d.threshold for value in d.clean_statistic]
        assert d.false_positives == pytest.approx(np.mean(flags))
        assert (d.auroc is None) == (d.tpr is None) == (rule.kind in ("encoder", "repair"))
        assert (d.after is None) == (rule.kind in ("encoder", "pool", "input"))
        assert d.kind == rule.kind and d.seconds > 0
    changed = np.abs(study.pictures["perturbed"] - study.pictures["images"])
    assert 0 < changed.max() <= 0.25
    printed = repr(study)
    for word in ("attack success", "FPR", "AUROC", "Claims", *study.defences, *study.attacks, *map(str, study.claims)):
        assert word in printed


def test_the_study_shows_attack_and_defence_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = ("spectral signatures", "CLP")
    study = small_study((0, 1, 2), ("frozen",), chosen)
    assert set(study.attacks) == {"fixed", "frozen"}
    assert tuple(study.defences) == chosen
    check_columns(study)
    assert [len(c.difference) for c in study.claims] == [3, 3]
    with pytest.raises(TypeError, match="A Study stays in memory"):
        pickle.dumps(study)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_seed_among_others_is_the_seed_alone():
    """All is vmapped over seeds, which share nothing: what is found for one does not depend on the others."""
    chosen = ("CLP", "spectral signatures", "fine-tuning")
    both, alone = (small_study(seeds, ("alternating",), chosen) for seeds in ((0, 1), (1,)))
    for name, attack in alone.attacks.items():
        for column in ("accuracy", "success", "control", "kept"):
            one, among = getattr(attack, column).by_seed[0], getattr(both.attacks[name], column).by_seed[1]
            assert one == pytest.approx(among, abs=2.5 / 297), (name, column)  # two images on the border
    for name, defence in alone.defences.items():
        assert defence.statistic[0] == pytest.approx(both.defences[name].statistic[1], abs=0.01), name


@pytest.mark.slow
def test_every_route_and_every_defence_has_its_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = small_study((3,), ROUTES, tuple(DEFENCES), target=7, attacked="implicit")
    assert set(study.attacks) == {"fixed", *ROUTES}
    check_columns(study)
    assert len(study.claims) == 1 + 4 + 1 + 1
    assert not list(tmp_path.iterdir())


def test_at_least_ten_defences_and_the_bilevel_ones_among_them():
    assert len(DEFENCES) >= 10
    assert {name for name, rule in DEFENCES.items() if rule.bilevel} == {"ASSET", "I-BAU", "label-free unlearning"}


@pytest.mark.slow
def test_the_orderings_that_papers_claim_come_out_as_the_page_says():
    """Three seeds of the study with its defaults. What fails is reported: by the study, and on its page.

    Two orderings hold on every seed; the others turn with rounding on some, and over ten seeds fail on three and four.
    """
    page = (Path(__file__).parents[3] / "docs/applications/contrastive.md").read_text()
    study = robustness_study(attacks=("alternating", "frozen"), defences=("label-free unlearning", "fine-tuning"))
    fixed, frozen, victims, repairs = study.claims
    assert "optimised perturbation (alternating)" in fixed.claim and fixed.holds and fixed.apart
    assert "label-free unlearning leaves less" in repairs.claim and repairs.holds and repairs.apart
    for claim in (fixed, repairs):
        assert f"holds: {claim.claim}: " in page
    assert "pretrained with it than on clean ones" in victims.claim and "frozen surrogate" in frozen.claim
    for claim in (victims, frozen):
        assert re.search(f"FAILS on [1-9] of 10 seeds: {re.escape(claim.claim)}: ", page)
    for attack in study.attacks.values():
        low, high = attack.success.interval
        share, n = attack.success.value, attack.success.trials
        for end in (low, high):
            np.testing.assert_allclose(abs(share - end), 1.96 * np.sqrt(end * (1 - end) / n), rtol=1e-8)


def test_a_claim_says_whether_it_holds():
    share = lambda *hits: Share(tuple(h / 100 for h in hits), sum(hits), 100 * len(hits))
    few, many, mixed = share(10, 20), share(70, 90), share(15, 15)
    assert str(Claim("a beats b", many, few)) == (
        "holds: a beats b: 0.800 (0.739, 0.850) against 0.150 (0.107, 0.206); by seed +0.600, +0.700"
    )
    assert str(Claim("a beats b", share(12, 21), few)).startswith("holds on each seed, intervals overlap: a beats b: ")
    assert str(Claim("a beats b", mixed, few)).startswith("FAILS on 1 of 2 seeds: a beats b: ")
    assert Claim("a beats b", few, many).difference == pytest.approx((-0.6, -0.7))
    assert not Claim("a beats b", few, few).holds


def test_a_training_that_diverges_is_no_attack():
    """The class of no number is 0, the target: every image counted as a hit."""
    with pytest.raises(ValueError, match=r"pretraining has diverged: its parameters are not finite\. Lower the rate"):
        contrastive.robustness_study(
            seeds=(0,), steps=2, rounds=1, inner=1, attacks=("frozen",), defences=("blur",),
            pretraining=Pretraining(rate=1e30),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"encoder=MLP\): that is the class; give MLP\(\)"):
        Pretraining(encoder=contrastive.MLP)
