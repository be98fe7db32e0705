"""Each defence on an encoder with a planted trigger, one corner pixel, and on the same encoder without."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

from bilevel import run
from bilevel.applications.contrastive import DEFENCES, MLP, Conv, auroc, defences, logits, tpr_at
from bilevel.applications.contrastive.digits import split

KEY = jax.random.key(0)
DIGITS = split(0, 0, 0.04)  # the digits' corner pixel is black in all of them


def marked(images, value=1.0):
    """The images with the trigger."""
    images = np.array(images)
    images[:, 0, 0] = value
    return jnp.asarray(images)


@functools.cache
def start(encode, seed=0):
    """First parameters, as arrays of numpy's that no one may change."""
    return jax.tree.map(np.asarray, jax.jit(encode.init)(jax.random.key(seed)))


def pixels(params, images):
    """A linear encoder."""
    return images.reshape(*images.shape[:-2], 64) @ params


def suspect_of(encoder, probe, flagged=27, value=1.0):
    """150 trusted images, a pool of 270 of which some are marked, 60 test images and the same marked."""
    flags = np.arange(270) < flagged
    pool = jnp.asarray(np.where(flags[:, None, None], marked(DIGITS.pool[:270], value), DIGITS.pool[:270]))
    trusted, test = jnp.asarray(DIGITS.trusted), jnp.asarray(DIGITS.test[:60])
    labels = (jnp.asarray(DIGITS.trusted_labels), jnp.asarray(DIGITS.test_labels[:60]))
    return defences.Suspect(
        encoder, probe, pool, jnp.asarray(flags), trusted, labels[0], test, labels[1], marked(test, value), 0.1
    )


def linear_suspect(planted, value=1.0, strength=1000.0):
    """Ten of the pixels, slightly mixed; planted: feature 3 is the corner pixel, many times over."""
    weight = np.eye(64)[:, 7:17] + 0.1 * np.random.default_rng(1).normal(size=(64, 10))
    weight[0] = strength * planted * np.eye(10)[3]
    return suspect_of(jnp.asarray(weight, float), {"w": jnp.eye(10), "b": jnp.zeros(10)}, value=value)


def flagged(rule, found):
    """Whether the rule flags what was found."""
    return bool(found.statistic < rule.threshold if rule.below else found.statistic > rule.threshold)


@pytest.mark.parametrize("name", ["DECREE", "SSL-Cleanse", "Neural Cleanse, patch", "Neural Cleanse, additive"])
def test_inversions_find_a_planted_pixel(name):
    """One pixel leads every image to one embedding and one class: a small trigger, and no small one without it."""
    rule, answer = DEFENCES[name], jax.jit(functools.partial(DEFENCES[name].run, pixels))
    found = [answer(linear_suspect(planted), KEY) for planted in (0, 1)]
    assert [flagged(rule, f) for f in found] == [False, True], [float(f.statistic) for f in found]


def told_apart(name, suspect, kind):
    """AUROC of a detector of samples, and the shares of marked and of clean samples above its cut."""
    found = jax.jit(functools.partial(DEFENCES[name].run, pixels))(suspect, KEY)
    positive = suspect.flags if kind == "pool" else jnp.arange(120) >= 60
    above = np.asarray(found.scores > found.cut)
    assert DEFENCES[name].kind == kind and np.isfinite(found.statistic)
    return float(auroc(found.scores, positive)), above[np.asarray(positive)].mean(), above[~np.asarray(positive)].mean()


@pytest.mark.parametrize("name", ["spectral signatures", "activation clustering"])
def test_marked_samples_of_the_pool_stand_out(name):
    """All marked images get the label 3 and lie apart from the rest of it; of others none is near the cut."""
    area, hit, false = told_apart(name, linear_suspect(1, strength=3.0), "pool")
    assert area > 0.9 and hit > 0.9 and false < 0.35


@pytest.mark.parametrize("name", ["reconstruction error", "masking trajectory", "quantisation"])
def test_marked_test_images_stand_out(name):
    """A quarter of full black in one pixel, which the encoder sees forty times over."""
    area, hit, false = told_apart(name, linear_suspect(1, 0.24, 40.0), "input" if name[0] != "q" else "preprocessing")
    assert area > 0.9 and hit > 0.8 and false < 0.2


def test_preprocessing_by_hand():
    image = np.random.default_rng(0).uniform(size=(2, 8, 8))
    wide = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    by_hand = sum(
        a * b / 16 * wide[:, i : i + 8, j : j + 8] for i, a in enumerate((1, 2, 1)) for j, b in enumerate((1, 2, 1))
    )
    np.testing.assert_allclose(jax.jit(defences.blurred)(image), by_hand, rtol=1e-5)
    levels = jax.jit(defences.quantised)(np.array([0.0, 0.24, 0.26, 0.5, 0.74, 0.76, 1.0], np.float32))
    np.testing.assert_array_equal(levels, [0, 0, 0.5, 0.5, 0.5, 1, 1])
    suspect = linear_suspect(1, 0.24)
    found = jax.jit(functools.partial(defences.preprocessing, pixels, change=defences.quantised))(suspect, KEY)
    np.testing.assert_array_equal(found.triggered, found.test)  # the trigger is gone


def test_asset_offsets_what_the_base_does_not_hold():
    """The base never meets the corner pixel: the encoder is free to move what is seen of it."""
    encode = MLP((32,), 8)
    params = jax.tree.map(np.array, start(encode))
    params["layer0"]["w"][0] *= 6.0
    suspect = suspect_of(params, None)._replace(probe=jnp.zeros(()))
    app, _, read = defences.of_asset(encode, jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[None]), suspect))
    solver = defences.asset_solver(270, rate=5e-3)
    state, _ = jax.jit(lambda: run(app.problem, solver, app.x0, app.y0, 100))()
    found = jax.tree.map(np.asarray, jax.jit(read)(state.x))
    assert jax.jit(auroc)(found.scores[0], suspect.flags) > 0.95
    above = np.asarray(found.scores[0] > found.cut[0])
    assert above[:27].mean() > 0.7 and above[27:].mean() < 0.1


def test_asset_starts_where_there_is_a_direction():
    """At f_0 itself every offset has its minimum; the start is away from it."""
    encode = MLP((5,), 3)
    params = start(encode)
    app = defences.asset(encode, params, DIGITS.trusted, DIGITS.pool[:40])
    gradient = jax.jit(lambda x: jax.grad(app.problem.draw_upper(0))(x, app.y0)["layer0"]["w"])
    assert np.abs(gradient(params)).max() < 1e-6 < 1e-3 < np.abs(gradient(app.x0)).max()


def test_a_mixture_of_two_gaussians_is_scikit_learns(x64):
    from sklearn.mixture import GaussianMixture

    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(size=900), 5 + 0.5 * random.normal(size=100)])
    fitted = GaussianMixture(2, tol=1e-9, max_iter=1000, random_state=0).fit(values[:, None])
    low, high = np.argsort(fitted.means_[:, 0])
    ends, squares = fitted.means_[[low, high], 0], fitted.covariances_[[low, high], 0, 0]
    grid = np.linspace(*ends, 20_001)
    split_at = grid[np.argmax(fitted.predict_proba(grid[:, None])[:, high] >= 0.5)]
    cut, apart = jax.jit(defences.two_gaussians)(values)
    assert abs(cut - split_at) < (ends[1] - ends[0]) / 256 + 1e-4  # a grid of 256
    np.testing.assert_allclose(apart, (ends[1] - ends[0]) / np.sqrt(squares.mean()), rtol=1e-4)


def networks(planted):
    """An MLP of 16 channels; planted: channel 0 sees the corner pixel alone, and tells all features."""
    encode = MLP((16,), 8)
    params = jax.tree.map(np.array, start(encode, 1))
    first, second = dict(params["layer0"]), dict(params["layer1"])
    if planted:
        first["w"][:, 0], second["w"][0] = 0.0, 5.0
        first["w"][0, 0] = 50.0
    probe = {"w": jax.random.normal(jax.random.key(2), (8, 10)), "b": jnp.zeros(10)}
    return encode, suspect_of({"layer0": first, "layer1": second}, probe)


def test_clp_prunes_the_channel_of_the_largest_singular_value():
    answer = jax.jit(functools.partial(defences.clp, networks(0)[0]))
    clean, planted = (answer(networks(k)[1], KEY) for k in (0, 1))
    assert [flagged(DEFENCES["CLP"], f) for f in (clean, planted)] == [False, True]
    kept = np.any(planted.encoder["layer0"]["w"], 0)
    assert not kept[0] and kept[1:].all() and np.any(clean.encoder["layer0"]["w"], 0).all()
    conv = Conv((3, 4), 5)
    params = start(conv)
    for k, found in enumerate(jax.jit(lambda p: defences.lipschitz_bounds(conv, p))(params)):
        w = np.asarray(params[f"layer{k}"]["w"]).T.reshape(len(found), 9, -1)  # by channel: taps x inputs
        np.testing.assert_allclose(found, [np.linalg.svd(one)[1][0] for one in w], rtol=1e-5)


def test_fine_pruning_takes_the_silent_channel_and_leaves_it_out():
    encode, suspect = networks(1)
    found = jax.jit(functools.partial(defences.fine_pruning, encode, share=0.05, steps=20))(suspect, KEY)
    first = found.encoder["layer0"]
    assert not np.any(first["w"][:, 0]) and first["b"][0] == 0 and np.any(first["w"][:, 1:], 0).all()
    assert np.abs(found.probe["w"] - suspect.probe["w"]).max() > 1e-3


def test_anp_prunes_a_channel_that_misleads():
    """A channel that speaks for one wrong class on clean images costs both terms of the loss."""
    encode, suspect = networks(0)
    first, second = suspect.encoder["layer0"], suspect.encoder["layer1"]
    probe = {"w": jnp.eye(8, 10), "b": jnp.zeros(10)}
    wrong = {"w": jnp.asarray(second["w"]).at[0].set(4.0 * jnp.eye(8)[7]), "b": second["b"]}
    first = {"w": jnp.asarray(first["w"]).at[:, 0].set(0.05), "b": first["b"]}
    suspect = suspect._replace(encoder={"layer0": first, "layer1": wrong}, probe=probe)
    found = jax.jit(functools.partial(defences.anp, encode))(suspect, KEY)
    kept = np.any(found.encoder["layer0"]["w"], 0)
    assert not kept[0] and kept[1:].mean() > 0.6


def test_unlearning_by_hand(x64):
    """The contrastive loss, and what the anchor adds, against numpy; one cosine per image without a temperature."""
    random = np.random.default_rng(0)
    before, after, delta = random.normal(size=(64, 5)), random.normal(size=(64, 5)), random.normal(size=(6, 8, 8))
    images = random.uniform(size=(6, 8, 8))
    unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
    w, z, same = (unit(x.reshape(6, 64) @ p) for x, p in ((images, before), (images + delta, after), (images, after)))
    for tau in (0.5, None):
        app = defences.unlearning(pixels, jnp.asarray(before), images, anchor=2.0, temperature=tau)
        cosines = z @ w.T
        if tau is None:
            expected = np.mean(1 - np.diag(cosines))
        else:
            weights = np.exp(cosines / tau)
            expected = np.mean(-np.log(np.diag(weights) / weights.sum(1)))
        level, upper = app.problem.draw_lower(0), app.problem.draw_upper(0)
        np.testing.assert_allclose(level(jnp.asarray(after), jnp.asarray(delta)), -expected, rtol=1e-12)
        held = 2.0 * np.mean(1 - np.sum(same * w, 1))
        np.testing.assert_allclose(upper(jnp.asarray(after), jnp.asarray(delta)), expected + held, rtol=1e-12)


def test_unlearning_leaves_less_to_move():
    """What the lower level finds against the repaired encoder is less than against the one that was given."""
    encode, suspect = networks(0)
    app = defences.unlearning(encode, suspect.encoder, suspect.trusted)
    state, _ = jax.jit(lambda: run(app.problem, defences.unlearning_solver(), app.x0, app.y0, 60))()

    @jax.jit
    def moved(params):
        again = defences.unlearning(encode, params, suspect.test, temperature=None)
        step = lambda k, y: again.problem.project_lower(y - 80.0 * jax.grad(again.problem.draw_lower(0), 1)(params, y))
        return -again.problem.draw_lower(0)(params, jax.lax.fori_loop(0, 5, step, again.y0))

    assert moved(state.x) < 0.7 * moved(suspect.encoder)


def test_distillation_and_fine_tuning_learn_what_they_are_shown():
    encode, suspect = networks(0)
    fresh = jax.jit(functools.partial(defences.distillation, encode, steps=200))(suspect, KEY).encoder
    offsets = jax.jit(lambda before, after: defences.offsets(encode, before, after, suspect.test))
    assert np.asarray(offsets(suspect.encoder, fresh)).mean() < 0.1
    found = jax.jit(functools.partial(defences.fine_tuning, encode))(suspect, KEY)
    right = jax.jit(
        lambda encoder, probe: jnp.mean(
            logits(probe, encode(encoder, suspect.trusted)).argmax(-1) == suspect.trusted_labels
        )
    )
    assert right(found.encoder, found.probe) > 0.8 > 0.5 > right(suspect.encoder, suspect.probe)


def test_rates_take_labels_of_any_kind_and_no_number_for_one():
    rng = np.random.default_rng(0)
    scores, positive = jnp.asarray(rng.normal(size=40)), np.arange(40) % 3 == 0
    for kind in (bool, int, np.int8, float):
        assert float(tpr_at(scores, positive.astype(kind), 0.1)) == float(tpr_at(scores, jnp.asarray(positive), 0.1))
        assert float(auroc(scores, positive.astype(kind))) == float(auroc(scores, jnp.asarray(positive)))
    for measure in (auroc, tpr_at):
        assert np.isnan(measure(scores.at[3].set(jnp.nan), positive))
        assert np.isnan(measure(scores, np.ones(40, bool))) and np.isnan(measure(scores, np.zeros(40, bool)))
    with pytest.raises(ValueError, match=r"rate=5\): the share of negatives .* lies in \[0, 1\)"):
        tpr_at(scores, positive, 5)


def test_the_probe_of_an_input_transformation_has_seen_it():
    """The encoder sees changed images alone, and so does what is fitted on it: here the change turns pixels over."""
    from bilevel.applications.contrastive.evaluate import probe

    suspect = suspect_of(jnp.eye(64), None)
    suspect = suspect._replace(probe=probe(pixels(suspect.encoder, suspect.trusted), suspect.trusted_labels))
    found = defences.samples.preprocessing(pixels, suspect, KEY, change=lambda images: 1 - images)
    said = logits(found.probe, pixels(found.encoder, found.test)).argmax(-1)
    mismatched = logits(suspect.probe, pixels(found.encoder, found.test)).argmax(-1)
    right = lambda labels: float((labels == suspect.test_labels).mean())
    assert right(said) > right(mismatched) + 0.2
