"""Parts and detectors: the originals' numbers, counts and names; forms for use; derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_files import fixture_file
from flax import nnx

from bilevel.applications.detection import (
    ELAN,
    SPPCSPC,
    SPPF,
    C2f,
    ConvBlock,
    CSPStage,
    GroupNorm,
    Halving,
    Head,
    RepConv,
    Routed,
    bgf_nano,
    bgf_yolo,
    fused,
    load_original,
    multiply_adds,
    name_table,
    parameter_count,
    yolov7_bra,
    yolov7_nano,
)
from bilevel.applications.detection.parts import max_pool, side_by_side, standardise
from bilevel.integrations.flax import from_nnx

RNG = np.random.default_rng(0)
PARTS = {
    "cspstage_n1": lambda rngs: CSPStage(24, 32, 1, rngs=rngs),
    "c2f_n2_short": lambda rngs: C2f(16, 32, 2, shortcut=True, rngs=rngs),
    "bra_yolo_w8_20": lambda rngs: Routed(32, rngs=rngs),
    "conv_s2": lambda rngs: ConvBlock(8, 16, 3, 2, rngs=rngs),
}


@functools.cache
def numbers():
    return dict(fixture_file("detection", "modules.npz"))


def part(name):
    weights = {k.split("/param/")[1]: v for k, v in numbers().items() if k.startswith(f"{name}/param/")}
    return load_original(PARTS[name](nnx.Rngs(0)), weights), weights


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_the_originals(name):
    module, weights = part(name)
    x = jnp.asarray(numbers()[f"{name}/input"].transpose(0, 2, 3, 1))
    params, apply = from_nnx(module)
    out = np.asarray(jax.jit(apply)(params, x)).transpose(0, 3, 1, 2)
    expected = numbers()[f"{name}/output"]
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()
    with pytest.raises(KeyError, match="The weights lack"):
        load_original(module, dict(list(weights.items())[1:]))


@functools.cache
def shapes(make, *args, **kwargs):
    """A model without numbers, traced once for all that is asked of it."""
    return nnx.eval_shape(lambda: make(*args, **kwargs, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("scale", "count", "giga"),
    [("n", 3_396_164, 13.35), ("s", 12_497_268, None), ("m", 30_426_692, None), ("l", 54_198_996, None),
     ("x", 84_310_340, 220.2)],
)  # fmt: skip
def test_bgf_yolo_counts(scale, count, giga):
    model = shapes(bgf_yolo, scale)
    assert parameter_count(model) == count
    parts = {"BRA": Routed, "CSP": CSPStage, "heads": Head}
    sizes = {
        name: sum(parameter_count(m) for m in vars(model).values() if isinstance(m, kind))
        for name, kind in parts.items()
    }
    expected = {"n": (191_040, 903_392, 617_364 - 16), "x": (4_641_600, 34_226_080, 4_638_100 - 16)}
    if scale in expected:
        assert tuple(sizes.values()) == expected[scale]  # the 16 are the bins', stored in the original's head
    if giga is not None:
        assert round(multiply_adds(model) / 1e9, 2 if giga < 100 else 1) == giga


def test_yolov7_counts_and_what_its_attention_adds():
    model, plain = shapes(yolov7_bra, 80), shapes(yolov7_bra, 80, attention=None)
    assert parameter_count(model) - parameter_count(plain) == 1_055_744
    heads = sum(parameter_count(getattr(plain, f"head{i}")) for i in range(3))
    anchored = 1792 * 255 + 3 * 255 + 1792 + 765  # YOLOv7's heads of anchor boxes for 80 classes
    assert parameter_count(plain) - plain.bins - heads + anchored == 37_622_682  # as YOLOv7 itself counts


def test_names_are_those_of_the_state_dicts():
    table = name_table(shapes(bgf_yolo, "n"))
    of = lambda ours: table[ours][0]
    assert of("row0.conv") == "model.0.conv" and of("row2.block0.first.norm") == "model.2.m.0.cv1.bn"
    assert of("row9.leave.conv") == "model.9.cv2.conv" and of("row12.attention.qkv") == "model.12.qkv.qkv"
    assert of("row14.block0.first.point_norm") == "model.14.convs.0.conv2.rbr_1x1.bn"
    assert of("row14.block0.second.conv") == "model.14.convs.0.conv1.conv"
    assert of("head3.box3") == "model.40.cv2.3.2" and of("head0.class1.norm") == "model.40.cv3.0.0.bn"
    table = name_table(shapes(yolov7_bra, 3))
    theirs = [name for names in table.values() for name in names]
    assert len(set(theirs)) == len(theirs)
    for name in ("model.4.conv", "model.11.bn", "model.15.conv", "model.51.cv7.conv", "model.51.att.wo",
                 "model.62.conv", "model.79.conv", "model.104.rbr_1x1.1"):  # fmt: skip
        assert (name in theirs) == (name != "model.62.conv")  # 62 is a concatenation


def test_a_detector_is_loaded_by_name_and_by_nothing_else():
    model = bgf_nano(2, "pico", norm="batch", rngs=nnx.Rngs(0))
    leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    table, weights = name_table(model), {"model.40.dfl.conv.weight": np.zeros((1, 8, 1, 1), np.float32)}
    for path, value in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        *module, last = (str(entry.key) for entry in path if hasattr(entry, "key"))
        array = RNG.standard_normal(value.shape).astype(np.float32)
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 3:
            array = array.transpose(2, 0, 1)[:, None]
        elif array.ndim == 2:
            array = array.T
        weights[f"{table['.'.join(module)][0]}.{leaf.get(last, last)}"] = array
    load_original(model, weights)
    np.testing.assert_array_equal(
        model.row4.block0.first.conv.kernel[...], weights["model.4.m.0.cv1.conv.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(model.head1.class3.bias[...], weights["model.40.cv3.1.2.bias"])
    with pytest.raises(ValueError, match=r"no place for model\.99\.bias"):
        load_original(model, {**weights, "model.99.bias": np.zeros(1)})


def moved(module):
    """Running statistics and scales that are not those of the start."""
    state = nnx.state(module)
    leaves, tree = jax.tree.flatten(state)
    nnx.update(
        module, tree.unflatten([a + 0.1 * np.abs(RNG.standard_normal(a.shape)).astype(np.float32) for a in leaves])
    )
    return module


@pytest.mark.parametrize("norm", ["batch", pytest.param("group", marks=pytest.mark.slow)])
def test_what_is_fused_for_use_says_the_same(norm):
    model = moved(yolov7_nano(2, width=1 / 32, norm=norm, rngs=nnx.Rngs(0)))
    images = jnp.asarray(RNG.uniform(size=(1, 32, 32, 3)), jnp.float32)
    use = fused(model)
    run = lambda m: (lambda p, f: jax.jit(f)(p, images))(*from_nnx(m))
    before, after = run(model), run(use)
    for name in ("logits", "boxes"):
        a, b = np.asarray(getattr(before, name)), np.asarray(getattr(after, name))
        assert np.abs(a - b).max() < 2e-5 * np.abs(a).max()
    rep = [m for _, m in nnx.iter_modules(use) if isinstance(m, RepConv)]
    assert rep and all(m.point is None for m in rep) and multiply_adds(use, 64, 64) < multiply_adds(model, 64, 64)
    assert not any(isinstance(m, RepConv) and m.point is None for _, m in nnx.iter_modules(model))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_csp_stage_fused_is_the_stage(norm):
    stage = moved(CSPStage(8, 16, 2, norm=norm, rngs=nnx.Rngs(0)))
    x = jnp.asarray(RNG.standard_normal((2, 6, 6, 8)), jnp.float32)
    run = lambda: (lambda p, f: jax.jit(f)(p, x))(*from_nnx(stage))
    before = run()
    for _, module in nnx.iter_modules(stage):
        if isinstance(module, (ConvBlock, RepConv)):
            module.fold()
    np.testing.assert_allclose(run(), before, rtol=2e-5, atol=2e-5)


def test_group_normalisation_and_its_derivatives_are_their_definition():
    def plainly(x, size):
        grouped = x.reshape(*x.shape[:2], -1, size)
        mean = grouped.mean((1, 3), keepdims=True)
        return ((grouped - mean) / jnp.sqrt(((grouped - mean) ** 2).mean((1, 3), keepdims=True) + 1e-5)).reshape(
            x.shape
        )

    with jax.enable_x64(True):
        x, v = 0.3 + jnp.asarray(RNG.standard_normal((2, 2, 5, 12)))
        for size in (4, 12):
            ours = lambda x, size=size: (jnp.sin(standardise(x, size)[0]) ** 2).sum()
            theirs = lambda x, size=size: (jnp.sin(plainly(x, size)) ** 2).sum()

            def derivatives(x, v, f):
                gradient, twice = jax.jvp(jax.grad(f), (x,), (v,))
                return f(x), gradient, twice, jax.grad(lambda x: (jax.grad(f)(x) * v).sum())(x)

            found = [jax.jit(functools.partial(derivatives, f=f))(x, v) for f in (ours, theirs)]
            for a, b, options in zip(*found, ({"rtol": 1e-10}, {"atol": 1e-10}, *2 * [{"atol": 1e-9}]), strict=True):
                np.testing.assert_allclose(a, b, **options)


def test_two_blocks_side_by_side_are_the_two_blocks():
    a, b = (ConvBlock(6, n, 3, norm="group", rngs=nnx.Rngs(n)) for n in (8, 16))
    x = jnp.asarray(RNG.standard_normal((2, 4, 4, 6)), jnp.float32)
    run = nnx.jit(lambda a, b, x: (side_by_side(a, b, x, train=False), (a(x), b(x))))
    for ours, theirs in zip(*run(a, b, x), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_pools_and_pyramids():
    x = jnp.asarray(RNG.standard_normal((1, 7, 5, 2)), jnp.float32)
    padded = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2)).max((-1, -2))
    once, twice, wide = jax.jit(lambda x: (max_pool(x, 5), max_pool(max_pool(x, 5), 5), max_pool(x, 9)))(x)
    np.testing.assert_array_equal(once, windows)
    np.testing.assert_array_equal(twice, wide)

    @nnx.jit
    def parts(x):
        rngs = nnx.Rngs(0)
        pyramid = SPPCSPC(2, 8, attention={"regions": 2, "heads": 2, "chosen": 2}, rngs=rngs)
        stage = ELAN(2, 12, enter=4, inner=2, depth=4, every=2, rngs=rngs)
        assert stage.leave.conv.kernel.shape[2] == 2 * 4 + 2 * 2
        halved = Halving(2, 8, rngs=rngs)(x[:, :6, :4])
        return SPPF(2, 6, rngs=rngs)(x), *pyramid(x, return_routing=True), stage(x), halved

    pooled, out, routing, staged, halved = parts(x)
    assert pooled.shape == (1, 7, 5, 6)
    assert out.shape == (1, 7, 5, 8) and routing.index.shape == (1, 4, 2)
    assert staged.shape == (1, 7, 5, 12) and halved.shape == (1, 3, 2, 8)


@pytest.fixture(scope="module")
def pico():
    """A detector, its parameters, its function, two images, and what it says of them."""
    params, apply = from_nnx(bgf_nano(2, "pico", image=32, rngs=nnx.Rngs(0)))
    images = jnp.asarray(RNG.uniform(size=(2, 32, 32, 3)), jnp.float32)
    run = jax.jit(lambda p, x, r: apply(p, x, routing_index=r, return_routing=True))
    free = jax.jit(lambda p, x: apply(p, x, return_routing=True))
    return params, images, run, free(params, images)


def test_a_frozen_routing_is_taken_and_images_do_not_touch_each_other(pico):
    params, images, run, (found, routings) = pico
    assert list(routings) == ["row12", "row17", "row21", "row25", "row29", "row33"]
    index = {name: routing.index for name, routing in routings.items()}
    again, _ = run(params, images, index)
    np.testing.assert_allclose(again.logits, found.logits, atol=1e-5)
    flipped, _ = run(params, images[::-1], {name: i[::-1] for name, i in index.items()})
    np.testing.assert_allclose(flipped.logits[::-1], found.logits, atol=1e-5)
    other, _ = run(params, images, {name: (i + 1) % 16 for name, i in index.items()})
    assert np.abs(np.asarray(other.logits - found.logits)).max() > 1e-6
    assert found.logits.shape == (2, 85, 2) and found.bins.shape == (2, 85, 4, 8)


def test_bad_arguments_are_said():
    with pytest.raises(ValueError, match="none of n, s, m, l, x"):
        bgf_yolo("xl", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 1"):
        bgf_nano(0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="none of nano, pico"):
        bgf_nano(2, "femto", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="none of batch, group"):
        ConvBlock(3, 8, norm="layer", rngs=nnx.Rngs(0))
    model = bgf_nano(2, "pico", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"sides divisible by 32, its largest stride\. Pad them"):
        model(jnp.zeros((1, 48, 64, 3)))
    assert isinstance(model.row0.norm, GroupNorm)
