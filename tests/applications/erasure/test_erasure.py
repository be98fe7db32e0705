"""Concept erasure against the numbers of diffusers' class, signs on two tokens, files, and hostile input."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_files import fixture_file
from problems import float64

from bilevel import hypergradients, run, solvers
from bilevel.applications.erasure import (
    PUBLISHED,
    Flux,
    TextToImage,
    attacked,
    closed_form,
    contrast,
    digits,
    erasing_target,
    erasure,
    from_original,
    sample,
    to_original,
    weighted,
)
from bilevel.applications.layers import lora, read_safetensors, write_safetensors

fixture = functools.partial(fixture_file, "flux")
TINY = Flux(
    in_channels=3, num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2,
    joint_attention_dim=5, pooled_projection_dim=0, axes_dims_rope=(0, 2, 2),
)  # fmt: skip


def relative(ours, theirs):
    assert np.shape(ours) == np.shape(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@functools.cache
def weights():
    """Of TINY, none of them zero."""
    shapes = TINY.shapes()
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {n: 0.3 * jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}


def inputs(batch=2):
    rng = np.random.default_rng(0)
    ids = {"img_ids": jnp.asarray(rng.integers(0, 3, (4, 3)), jnp.float32), "txt_ids": jnp.zeros((2, 3))}
    return (
        jnp.asarray(rng.normal(size=(batch, 4, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(batch, 2, 5)), jnp.float32),
        jnp.linspace(0.1, 0.9, batch),
    ), ids


@pytest.mark.parametrize("name", ["plain", "guidance_lora"])
@pytest.mark.optimised
def test_the_network_is_diffusers(name):
    """Gradients of the weights in float64: what is left is the rounding of the fixture, on every processor the same.

    In float32 the smallest of them, of a query's adapter, is what is left of larger sums, and processors differ in it.
    """
    file = dict(fixture(f"{name}.npz"))
    net = Flux.from_config(json.loads(str(file["config"])))
    given = {k.removeprefix("param/"): v for k, v in file.items() if k.startswith("param/")}
    base, adapter = lora.split(given) if name == "guidance_lora" else (given, {})
    arrays = ("img_ids", "txt_ids", "pooled_projections", *(("guidance",) if "guidance" in file else ()))
    at = {k: file[k] for k in ("encoder_hidden_states", "timestep", *arrays)}

    def run(params, adapter, x, at):
        more = {k: at[k] for k in arrays}
        adapted = lora.merge(params, adapter)
        return net(adapted, x, at["encoder_hidden_states"], at["timestep"], attention=(0, 1, 2), **more)

    def check(found, of_x):
        assert found.velocity.dtype == given["x_embedder.weight"].dtype
        assert relative(found.velocity, file["output"]) < 2e-6
        assert relative(of_x, file["grad_hidden_states"]) < 2e-6
        assert max(relative(found.attention[k], file[f"attention_{k}"]) for k in range(3)) < 2e-6

    def stacked():
        return net.load(base), {k: jnp.asarray(v) for k, v in net.stack(adapter).items()}

    def loss(params, adapter, x, at):
        found = run(params, adapter, x, at)
        return jnp.sum(found.velocity * file["cotangent"]), found

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, found), (*_, of_x) = gradient(*stacked(), jnp.asarray(file["hidden_states"]), at)
    check(found, of_x)
    with float64():
        of = lambda tree: jax.tree.map(lambda v: np.asarray(v, np.float64), tree)
        given, base, adapter = of(given), of(base), of(adapter)
        (_, found), (of_params, of_adapter, of_x) = gradient(*stacked(), of(file["hidden_states"]), of(at))
        check(found, of_x)
        ours = {**net.unstack(of_params), **net.unstack(of_adapter)}
    gradients = [k for k in file if k.startswith("grad/")]
    plain = lambda k: k.removeprefix("grad/").replace(".base_layer.", ".").replace(".default.", ".")
    apart = {k: relative(ours[plain(k)], file[k]) for k in gradients}
    assert apart and max(apart.values()) < 2.5e-6, apart


def test_the_published_sizes_and_the_published_adapter_by_shapes_alone(tmp_path):
    assert {name: net.count() for name, net in PUBLISHED.items()} == {"dev": 11_901_408_320, "schnell": 11_891_178_560}
    dev = PUBLISHED["dev"]
    shapes = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in dev.shapes(stacked=False).items()}
    adapter = jax.eval_shape(lambda k: lora.init(k, shapes, ["add_q_proj", "add_k_proj"], 8), jax.random.key(0))
    assert len(adapter) == 76 and adapter["transformer_blocks.18.attn.add_k_proj.lora_B.weight"].shape == (3072, 8)
    count = lambda depth: len(jax.make_jaxpr(lambda p: Flux(**{**SMALL, "num_layers": depth})(p, *inputs()[0], **inputs()[1]).velocity)(  # noqa: E501
        {n: jnp.zeros(s) for n, s in Flux(**{**SMALL, "num_layers": depth}).shapes().items()}).eqns)  # fmt: skip
    assert count(2) == count(19)


SMALL = {
    "in_channels": 3, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2,
    "joint_attention_dim": 5, "pooled_projection_dim": 0, "axes_dims_rope": (0, 2, 2),
}  # fmt: skip


def test_all_layouts_are_one_network(tmp_path):
    args, ids = inputs()
    call = jax.jit(lambda p: TINY(p, *args, **ids, attention=(1, -1)))
    expected = call(weights())
    flat = {n: np.asarray(a) for n, a in TINY.unstack(weights()).items()}
    np.testing.assert_allclose(call(flat).velocity, expected.velocity, rtol=1e-5, atol=1e-6)
    back = from_original(TINY, to_original(TINY, weights()))
    assert back.keys() == flat.keys() and all((back[n] == flat[n]).all() for n in flat)
    write_safetensors(tmp_path / "bfl.safetensors", to_original(TINY, weights()))
    loaded = TINY.load(tmp_path / "bfl.safetensors")
    assert all((loaded[n] == weights()[n]).all() for n in weights())
    assert expected.attention.keys() == {1, -1}
    np.testing.assert_allclose(expected.attention[-1].sum(-1), 1, rtol=1e-5)


def test_adapters_go_through_files_under_both_names(tmp_path):
    file = fixture("guidance_lora.npz")
    net = Flux.from_config(json.loads(str(file["config"])))
    given = {k.removeprefix("param/"): file[k] for k in file.files if k.startswith("param/")}
    _, adapter = lora.split(given)
    ours = net.stack(adapter)
    for prefix in ("transformer.", "base_model.model."):
        lora.save(tmp_path / "a.safetensors", ours, prefix=prefix, unstack=net.unstack)
        again = lora.read(tmp_path / "a.safetensors")
        assert again.keys() == adapter.keys() and all((again[n] == adapter[n]).all() for n in adapter)
    names = set(read_safetensors(tmp_path / "a.safetensors"))
    assert "base_model.model.transformer_blocks.1.attn.add_k_proj.lora_A.weight" in names and len(names) == 8


def test_an_adapter_starts_as_nothing_and_merges_by_its_equation(x64):
    nested = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    fresh = lora.init(jax.random.key(0), nested, ["a"], 2, layout="in_out")
    assert list(fresh) == ["a.lora_A.weight", "a.lora_B.weight"] and fresh["a.lora_A.weight"].shape == (2, 3)
    same = lora.merge(nested, fresh, layout="in_out")
    assert (same["a"]["kernel"] == 1).all() and same["b"]["kernel"] is nested["b"]["kernel"]
    grown = {**fresh, "a.lora_B.weight": jnp.arange(8.0).reshape(4, 2)}
    merged = lora.merge(nested, grown, alpha=4, scale=0.5, layout="in_out")["a"]["kernel"]
    expected = 1 + 0.5 * 4 / 2 * (grown["a.lora_B.weight"] @ grown["a.lora_A.weight"]).T
    np.testing.assert_allclose(merged, expected, rtol=1e-12)


def test_the_target_is_the_frozen_models():
    class Line:
        def velocity(self, params, x, prompt, t):
            return params * x + prompt[:, :1]

    x, prompt, null = jnp.ones((2, 3, 1)), jnp.full((2, 2, 1), 5.0), jnp.full((2, 2, 1), 1.0)
    target = lambda frozen: erasing_target(Line(), frozen, x, jnp.ones(2), prompt, null, 2.0)
    np.testing.assert_allclose(target(3.0), 4.0 - 2.0 * (8.0 - 4.0))
    assert float(jax.grad(lambda p: target(p).sum())(3.0)) == 0


def test_the_contrasts_two_signs_on_two_tokens(x64):
    """Two image tokens; the anchor's map lies between the synonym's and the irrelevant word's."""
    anchor, synonym, other = jnp.array([[0.6, 0.5]]), jnp.array([[1.0, 0.1]]), jnp.array([[[0.1, 1.0]]])
    gradient = jax.grad(contrast)(anchor, synonym, other)
    moved = anchor - 1e-3 * gradient
    cosine = lambda a, b: float((a * b).sum() / jnp.linalg.norm(a) / jnp.linalg.norm(b))
    assert cosine(moved, synonym) < cosine(anchor, synonym)
    assert cosine(moved, other[0]) > cosine(anchor, other[0])
    # and in the similarities themselves
    of_syn, of_other = jax.grad(lambda s, o: s - jax.nn.logsumexp(jnp.stack([s, o])), (0, 1))(0.3, 0.2)
    assert of_syn > 0 > of_other


@functools.cache
def tiny_problem(**options):
    words = digits.Words(jax.random.normal(jax.random.key(1), (len(digits.WORDS), 32)))
    net = Flux(**{**SMALL, "in_channels": 12, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32})
    shapes = net.shapes()
    keys = jax.random.split(jax.random.key(2), len(shapes))
    frozen = {n: 0.1 * jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    images = jax.random.normal(jax.random.key(3), (4, 16, 12))
    given = {
        "word": "three", "synonym": "3", "irrelevant": ("seven",),
        "prompts": ["a photo red three", "three a photo blue"] * 2, "images": images,
        "kept_prompts": ["a photo red four"] * 4, "kept_images": -images, "rank": 2, "batch": 4, **options,
    }  # fmt: skip
    return erasure(TextToImage(net, 4, 4), frozen, words, **given)


@pytest.mark.slow
def test_levels_are_their_terms_and_the_base_stays():
    app = tiny_problem()
    assert app.x0 is None and len(app.y0) == 4
    before = {n: np.array(a) for n, a in app.frozen.items()}
    levels = app.problem.levels(0)
    rows, (kept, words) = levels.lower.batch, levels.upper.batch
    value = jax.jit(
        lambda y: {n: app.terms[n](y, r) for n, r in zip(app.terms, (rows, rows, kept, words), strict=True)}
    )
    L = value(app.y0)
    f, F = jax.jit(lambda: (levels.lower(None, app.y0), levels.upper(None, app.y0)))()
    np.testing.assert_allclose(f, L["erase"] + 0.1 * L["attention"], rtol=1e-5)
    np.testing.assert_allclose(F, L["keep"] + 0.02 * L["contrast"], rtol=1e-5)
    state, _ = jax.jit(lambda p, y: run(p, solvers.DynamicBarrier(0.01), None, y, steps=2, key=0))(app.problem, app.y0)
    assert all((before[n] == np.asarray(app.frozen[n])).all() for n in before)
    assert any(float(jnp.abs(state.y[n] - app.y0[n]).max()) > 0 for n in app.y0)


def away(app):
    """An adapter that is not nothing: at B = 0 the gates have no derivative."""
    return {n: 0.3 * jax.random.normal(jax.random.key(k), a.shape) for k, (n, a) in enumerate(app.y0.items())}


def test_one_pass_over_all_rows_is_a_pass_over_each():
    app = tiny_problem()
    erased, (kept, anchored) = app.problem.draw_lower(0).batch, app.problem.draw_upper(0).batch
    together = jax.jit(lambda y: app.losses(y, erased=erased, kept=kept, anchored=anchored))(away(app))
    alone = jax.jit(
        lambda y: {
            n: app.terms[n](y, r)
            for n, r in {"erase": erased, "attention": erased, "keep": kept, "contrast": anchored}.items()
        }
    )(away(app))
    assert together.keys() == alone.keys()
    for name in alone:
        np.testing.assert_allclose(together[name], alone[name], rtol=2e-5)


@pytest.mark.slow
def test_weights_and_gates_are_in_the_lower_loss():
    app = weighted(tiny_problem(), tiny_problem(), decay=0.1)
    level, y = app.problem.draw_lower(0), away(app)
    value, gradient = jax.jit(jax.value_and_grad(level))(app.x0, y)
    # f = sum of exp(a) L + decay |y|^2 / 2, so its slope in a is a term, and the terms add up
    decay = 0.05 * sum(float(jnp.sum(a * a)) for a in y.values())
    np.testing.assert_allclose(sum(gradient["log_weights"].values()) + decay, value, rtol=1e-4)
    assert all(float(jnp.abs(g).max()) > 0 for g in gradient["gates"].values())
    np.testing.assert_allclose(np.exp(app.x0["log_weights"]["attention"]), 0.1, rtol=1e-6)
    silent = tiny_problem.__wrapped__(weights={"contrast": 0})
    with pytest.raises(ValueError, match="weighted: contrast has the weight 0, which has no logarithm"):
        weighted(silent, silent)
    with pytest.raises(ValueError, match=r"weighted\(decay=0\): a positive number, without which"):
        weighted(tiny_problem(), tiny_problem(), decay=0)


@pytest.mark.slow
def test_the_variant_with_weights_above_has_a_hypergradient():
    app = weighted(tiny_problem(), tiny_problem(), decay=0.1)
    solver = solvers.T1T2(0.05, 0.05)
    estimate = hypergradients.value_and_hypergradient(app.problem, solver.hypergradient, solver.lower_solver)
    found = jax.jit(lambda x, y: estimate(x, y, key=0))(app.x0, away(app))
    assert np.isfinite(float(found.value))
    # Of a random adapter they are small, and a gate of one in float32 would not show a step along them.
    assert all(float(jnp.abs(slope).max()) > 0 for slope in jax.tree.leaves(found.gradient))


def test_attacks_climb_and_stay_in_the_ball(x64):
    prompt, wanted = jnp.zeros((2, 3, 4)), jnp.full((2, 3, 4), 5.0)
    moved = attacked(lambda p: -jnp.square(p - wanted).sum(), prompt, radius=0.7, steps=8)
    np.testing.assert_allclose(jnp.linalg.norm(moved, axis=-1), 0.7, rtol=1e-9)
    np.testing.assert_allclose(moved, 0.35, rtol=1e-9)
    with pytest.raises(ValueError, match=r"attacked\(radius=-1\)"):
        attacked(jnp.sum, prompt, radius=-1)


def test_the_closed_form_is_its_normal_equations(x64):
    rng = np.random.default_rng(0)
    old, c, star, kept = (jnp.asarray(rng.normal(size=s)) for s in ((3, 4), 4, 4, (6, 4)))
    new = closed_form({"context_embedder.weight": old}, c, star, kept, ridge=0.3)["context_embedder.weight"]
    cost = lambda w: (
        jnp.sum((w @ c - old @ star) ** 2) + jnp.sum(((w - old) @ kept.T) ** 2) + 0.3 * jnp.sum((w - old) ** 2)
    )
    assert float(jnp.abs(jax.grad(cost)(new)).max()) < 1e-10


def test_sampling_follows_a_straight_flow_to_its_end():
    class Straight:
        def velocity(self, params, x, prompt, t):
            return params + 0 * x + prompt[:, :1]

    noise, ones = jnp.zeros((2, 3, 1)), jnp.ones((2, 1, 1))
    np.testing.assert_allclose(sample(Straight(), 2.0, noise, ones, steps=7), -3.0, rtol=1e-6)
    np.testing.assert_allclose(sample(Straight(), 2.0, noise, ones, 0 * ones, guidance=3.0), -5.0, rtol=1e-6)


def test_the_shipped_model_is_whole_and_draws_what_is_asked():
    base = digits.base()
    found = jax.jit(lambda k: digits.draw(base, base.params, list(range(10)), True, k)[0])(jax.random.key(0))
    assert float((base.judge.digit(found) == jnp.arange(10)).mean()) >= 0.9
    assert float((base.judge.colour(found) == jnp.arange(10) % 3).mean()) >= 0.9
    images = digits.to_images(found)
    np.testing.assert_array_equal(digits.to_tokens(images), found)


def load_example(name):
    path = Path(__file__).parents[3] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_trained_anew_the_base_is_as_good(tmp_path):
    """Qualities, not bits: another machine rounds otherwise."""
    script, (ink, labels) = load_example("concept_erasure_base"), digits.real()[0]
    judge, trained = script.train_judge(ink, labels), script.train(ink, labels)
    new = script.scores(digits.Base(digits.MODEL, trained["net"], digits.Words(trained["words"]), digits.Judge(judge)))
    old = script.scores(digits.base())
    for name in ("words", "numerals", "colours of words", "colours of numerals", "judge on real digits"):
        assert new[name] > old[name] - 0.03, name
    # Each distance is in the features of a judge of its own, so the two have no common scale but their order.
    assert new["Frechet distance"] < 2 * old["Frechet distance"]


def test_a_base_that_is_none_is_named(tmp_path):
    path = tmp_path / "base.safetensors"
    write_safetensors(path, {"words": np.zeros((26, 32), np.float32)})
    with pytest.raises(ValueError, match=r"The weights have no judge.1.bias: they are not a base of coloured digits"):
        digits.base(path)
    shipped = Path(digits.__file__).parent / "digits.safetensors"
    path.write_bytes(shipped.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"base.safetensors is cut off"):
        digits.base(path)


@pytest.mark.slow
def test_the_example_prints_every_route(tmp_path, capsys):
    example, out = load_example("concept_erasure"), tmp_path / "erasure.png"
    rows = example.main(["--steps", "5", "--seeds", "0", "--per-word", "6", "--all", "--out", str(out)])
    assert len(rows) == 13 and "hypergradient, AID" in rows
    assert all(np.isfinite(list(found.values())).all() for seeds in rows.values() for found in seeds)
    assert "beyond the spread" in capsys.readouterr().out and out.stat().st_size > 10_000


def test_the_frechet_distance_is_the_formula_for_normals():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 3))
    assert digits.frechet(a, a + np.array([2, 0, 0])) == pytest.approx(4, abs=1e-6)
    assert digits.frechet(a, 2 * a) == pytest.approx(np.trace(np.cov(a.T)) + (a.mean(0) ** 2).sum(), rel=1e-6)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    whole = {n: np.asarray(a) for n, a in TINY.unstack(weights()).items()}
    write_safetensors(path, whole)
    assert {n: a.dtype for n, a in read_safetensors(path).items()} == {n: a.dtype for n, a in whole.items()}
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"w.safetensors is cut off: proj_out"):
        TINY.load(path)
    path.write_bytes(b"12")
    with pytest.raises(ValueError, match="is no safetensors file, or is cut off"):
        TINY.load(path)
    missing = {n: a for n, a in whole.items() if n != "proj_out.bias"}
    with pytest.raises(ValueError, match=r"missing \['proj_out.bias'\] \(1 in all\), unknown \[\]"):
        TINY.load(missing)
    with pytest.raises(ValueError, match=r"x_embedder.weight has the shape \(2, 2\), and Flux.* needs \(8, 3\)"):
        TINY.load({**whole, "x_embedder.weight": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"proj_out.bias has the shape \(1,\)"):
        TINY.load({**whole, "proj_out.bias": np.zeros(1)})


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"lora: 'add_x_proj' matches none of the \d+ weights.*add_k_proj"):
        lora.init(jax.random.key(0), weights(), ["add_x_proj"])
    with pytest.raises(ValueError, match=r"lora: 'add_q' matches none"):
        lora.init(jax.random.key(0), weights(), "add_q")
    with pytest.raises(ValueError, match=r"lora.init\(rank=9\): .*8 is all"):
        lora.init(jax.random.key(0), weights(), ["add_q_proj"], 9)
    with pytest.raises(ValueError, match="this is no adapter"):
        lora.from_published({})
    with pytest.raises(ValueError, match=r"The prompt 'a photo red four' does not have the word 'three'"):
        tiny_problem(prompts=("a photo red four",) * 4)
    with pytest.raises(ValueError, match=r"is to be kept, and has 'three'"):
        tiny_problem(kept_prompts=("a three",) * 4)
    with pytest.raises(ValueError, match=r"The prompt 'a dog' has 'dog'; known: a, photo"):
        tiny_problem(kept_prompts=("a dog",) * 4)
    with pytest.raises(ValueError, match=r"There are 3 kept prompts and 4 images"):
        tiny_problem(kept_prompts=("a four",) * 3)
    args, ids = inputs()
    with pytest.raises(ValueError, match="guidance is given, and this network has none"):
        TINY(weights(), *args, **ids, guidance=jnp.ones(2))
    with pytest.raises(ValueError, match=r"attention=\(4,\): this network has the blocks 0 to 3"):
        TINY(weights(), *args, **ids, attention=(4,))
    with pytest.raises(ValueError, match="give even numbers whose sum"):
        Flux(axes_dims_rope=(1, 2, 3))


def tiny(network=digits.NETWORK, text=None, **options):
    rng = np.random.default_rng(0)
    frozen = {n: jnp.asarray(0.1 * rng.normal(size=s), jnp.float32) for n, s in network.shapes().items()}
    words = digits.Words(jnp.asarray(rng.normal(size=(len(digits.WORDS), 32)), jnp.float32))
    images = jnp.asarray(rng.normal(size=(4, 16, 12)), jnp.float32)
    given = dict(
        word="three", prompts=["a photo red three"] * 4, images=images, kept_prompts=["a photo red four"] * 4,
        kept_images=-images, synonym="3", irrelevant=("seven",), rank=2, batch=4,
    )  # fmt: skip
    return erasure(TextToImage(network, 4, 4), frozen, words if text is None else text(words), **{**given, **options})


def test_a_pooled_prompt_beside_the_words():
    """`TextToImage` takes {"tokens", "pooled"}: the columns are the words', whatever the pooled vector's length."""

    class Pooled:
        def __init__(self, words):
            self.words, self.columns = words, words.columns

        def __call__(self, prompts):
            tokens = self.words(prompts)
            return {"tokens": tokens, "pooled": tokens.mean(1)[:, :6]}

    app = tiny(dataclasses.replace(digits.NETWORK, pooled_projection_dim=6), Pooled)
    lower = app.problem.draw_lower(0)
    assert lower.batch[0][2].shape == (4, digits.LENGTH)
    assert np.isfinite(lower(app.x0, app.y0)) and np.isfinite(app.problem.draw_upper(0)(app.x0, app.y0))


@pytest.mark.parametrize(
    ("gone", "level"), [(("keep", "contrast"), "draw_upper"), (("erase", "attention"), "draw_lower")]
)
def test_a_level_without_terms_is_zero(gone, level):
    app = tiny(weights=dict.fromkeys(gone, 0))
    assert float(getattr(app.problem, level)(0)(app.x0, app.y0)) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(images=np.zeros((4, 16, 12), np.uint8)), r"erased images are uint8\[4, 16, 12\]: give finite numbers"),
        (dict(kept_images=np.full((4, 16, 12), np.nan)), r"kept images are float64\[4, 16, 12\]: give finite numbers"),
        (dict(kept_images=np.zeros((4, 8, 8, 3))), r"of the shape \(n, tokens, channels\)"),
        (dict(batch=4.0), r"batch=4\.0\): an integer, at least one"),
        (dict(attack=0.5), r"attack=0\.5\): a pair \(radius, steps\), or None"),
        (dict(temperature=0.0), r"temperature is positive"),
        (dict(weights={"keep": "1"}), r"numbers of at least 0 for erase"),
        (dict(irrelevant="57"), r"irrelevant='57'\): the contrast needs a sequence of irrelevant words"),
        (dict(irrelevant=("3",)), r"'three' and its synonym '3' are what is to be erased, and not irrelevant"),
    ],
)
def test_what_is_erased_is_looked_at_before_it_is(options, said):
    with pytest.raises(ValueError, match=said):
        tiny(**options)


@pytest.mark.parametrize("name", ["transformer.h.0.c_attn", "text_encoder.layers.0.q_proj", "unet.to_q", "h.0.q"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", ""])
def test_adapters_of_names_like_prefixes_come_back(name, prefix, tmp_path):
    params = {f"{name}.weight": jnp.ones((6, 5))}
    adapter = lora.init(jax.random.key(0), params, ".*", 2)
    lora.save(tmp_path / "a.safetensors", adapter, prefix=prefix)
    assert set(lora.read(tmp_path / "a.safetensors")) == set(adapter)
    lora.merge(params, lora.read(tmp_path / "a.safetensors", prefix=prefix))


def test_an_alpha_that_a_file_states_counts(tmp_path):
    params = {"a.weight": jnp.zeros((4, 4))}
    adapter = {name: jnp.ones_like(leaf) for name, leaf in lora.init(jax.random.key(0), params, ["a"], 2).items()}
    said = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 16})}
    write_safetensors(tmp_path / "a", {f"transformer.{n}": np.asarray(a) for n, a in adapter.items()}, said)
    np.testing.assert_allclose(lora.merge(params, lora.read(tmp_path / "a"))["a.weight"], 8 * 2.0)
    said = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 2, "alpha_pattern": {"a": 4}})}
    write_safetensors(tmp_path / "b", {n: np.asarray(a) for n, a in adapter.items()}, said)
    with pytest.raises(ValueError, match="states an alpha for each part"):
        lora.read(tmp_path / "b")
    for scale, text in ({}, "'a' is adapted, and has none"), ({"a": 1.0, "b": 1.0}, "'b' is not adapted"):
        with pytest.raises(ValueError, match=text):
            lora.merge(params, adapter, scale=scale)
    with pytest.raises(ValueError, match=r"layers is a list, and weights are found by dictionaries' keys"):
        lora.matches({"layers": [params]}, ".*")


def test_a_stacked_norm_is_no_matrix():
    net = digits.NETWORK
    stacked = {name: jnp.zeros(shape) for name, shape in net.shapes().items()}
    names = lora.matches(stacked, r".*\.attn\..*")
    assert names and not [name for name in names if "norm" in name]
    assert not [name for name in lora.matches(net.unstack(stacked), r".*\.attn\..*") if "norm" in name]


def test_bases_of_other_shapes_are_named():
    with pytest.raises(ValueError, match=r"Words\(table of shape \(5, 32\)\): a vector for each of 26 words"):
        digits.Words(jnp.zeros((5, 32)))
    with pytest.raises(ValueError, match=r"features are \(n, size\), of one size"):
        digits.frechet(np.zeros((4, 2)), np.zeros((4, 3)))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 1)), 2 * rng.normal(size=(60, 1)) + 1
    exact = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert digits.frechet(a, b) == pytest.approx(exact, rel=1e-9)
