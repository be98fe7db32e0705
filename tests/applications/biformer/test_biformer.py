"""BiFormer against numbers of the original implementation, closed forms, and finite differences."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_files import fixture_file
from flax import nnx

from bilevel.applications.biformer import (
    BiFormer,
    RoutingAttention,
    biformer_base,
    biformer_small,
    biformer_stl,
    biformer_tiny,
    choose_backend,
    load_original,
    multiply_adds,
    name_table,
    read_checkpoint,
    routed_attention,
)
from bilevel.applications.biformer.attend import full_attention
from bilevel.integrations.flax import from_nnx

HERE = Path(__file__).parent / "fixtures"
BACKENDS = ("gathered", "online", "dense")
TOLERANCE = 2e-6
CONFIG = json.loads((HERE / "config.json").read_text())
MODELS = {model["tag"]: model for model in CONFIG["models"]}
LAYERS = {layer["tag"]: layer for layer in CONFIG["layers"]}


fixture = functools.partial(fixture_file, "biformer", here=HERE)


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def weight(name, shape):
    """The original's weights were set to this function of their name."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    z, leaf = random.standard_normal(shape), name.split(".")[-1]
    if leaf == "num_batches_tracked":
        z = np.zeros(shape)
    elif leaf == "running_var":
        z = 1 + 0.5 * random.uniform(size=shape)
    elif leaf in ("bias", "running_mean"):
        z = 0.1 * z
    elif leaf.startswith("gamma"):
        z = 0.5 + 0.1 * z
    elif len(shape) == 1:
        z = 1 + 0.1 * z
    else:
        z = z / np.sqrt(np.prod(shape[1:]))
    return np.asarray(z, np.float32)


def build(tag, **changes):
    config = {name: value for name, value in MODELS[tag]["config"].items() if name != "pe"}
    weights = {name: weight(name, tuple(shape)) for name, shape in MODELS[tag]["param_names"]}
    return load_original(BiFormer(**{**config, **changes}, rngs=nnx.Rngs(0)), weights)


def by_their_names(model, params):
    """Our parameter dictionary as {their name: array}, channels still in our order."""
    flat = {}
    for ours, names in name_table(model).items():
        node = params
        for part in ours.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        for j, name in enumerate(names if node is not None else ()):
            leaves = node if isinstance(node, dict) else {None: node}
            for leaf, value in leaves.items():
                if isinstance(value, dict):
                    continue
                end = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(
                    leaf, leaf
                )
                flat[f"{name}.{end}" if end else name] = value[j] if "blocks" in ours else value
    return flat


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("tag", "backend"),
    [("nano_alltypes", "auto"), slowly("nano64", "auto"), *(slowly("nano64", name) for name in BACKENDS)],
)
def test_a_model_equals_the_original(tag, backend):
    model, numbers = build(tag, backend=backend), fixture(f"{tag}_small.npz")
    params, apply = from_nnx(model)
    x = jnp.asarray(numbers["input"].transpose(0, 2, 3, 1))

    def loss(params, x):
        logits, routings = apply(params, x, return_routing=True)
        return (logits * numbers["cotangent"]).sum(), (logits, routings)

    (_, (logits, routings)), (gradient, input_gradient) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(params, x)
    assert relative(logits, numbers["logits"]) < TOLERANCE
    assert relative(logits, numbers["logits_f64"]) < TOLERANCE
    assert relative(input_gradient.transpose(0, 3, 1, 2), numbers["grad_input"]) < TOLERANCE
    routed = [jax.tree.map(lambda a, j=j: a[j], r) for r in routings if r is not None for j in range(r.index.shape[0])]
    assert len(routed) == MODELS[tag]["n_routes"]
    for i, routing in enumerate(routed):
        assert relative(routing.logits, numbers[f"route/{i}/logit"]) < TOLERANCE
        assert relative(routing.weight, numbers[f"route/{i}/weight"]) < TOLERANCE
        np.testing.assert_array_equal(routing.index, numbers[f"route/{i}/idx"])
    norms = {name: np.linalg.norm(np.asarray(g, np.float64)) for name, g in by_their_names(model, gradient).items()}
    expected = {name.removeprefix("gradnorm/"): numbers[name] for name in numbers if name.startswith("gradnorm/")}
    assert norms.keys() == expected.keys()
    for name, norm in expected.items():
        assert abs(norms[name] - norm) < TOLERANCE * norm, name


@pytest.mark.parametrize("tag", ["nano64", slowly("nano_alltypes")])
def test_training_mode_normalises_and_counts_as_the_original(tag):
    model, numbers = build(tag), fixture(f"{tag}_small.npz")
    params, apply = from_nnx(model)
    x = jnp.asarray(numbers["input"].transpose(0, 2, 3, 1))
    logits, state = jax.jit(lambda p, s, x: apply.with_state(p, s, x, train=True))(params, apply.state, x)
    assert relative(logits, numbers["logits_train_mode"]) < TOLERANCE
    statistics = by_their_names(model, state)
    after = [name for name in numbers if name.startswith("after_train/")]
    assert len(after) == len(statistics) > 0
    for name in after:
        assert relative(statistics[name.removeprefix("after_train/")], numbers[name]) < TOLERANCE


@pytest.mark.slow
def test_gradients_and_features_of_a_whole_model_equal_the_original():
    numbers = fixture("nano64_full.npz")
    dense = build("nano64")
    params, apply = from_nnx(dense)
    x = jnp.asarray(numbers["input"].transpose(0, 2, 3, 1))
    gradient = jax.jit(jax.grad(lambda p: (apply(p, x) * numbers["cotangent"]).sum()))(params)
    stored = {n.removeprefix("grad/"): numbers[n] for n in numbers if n.startswith("grad/")}
    theirs, _ = from_nnx(load_original(build("nano64"), {**_buffers("nano64"), **stored}))
    jax.tree.map(lambda a, b: _assert_close(a, b), gradient, theirs)
    for i, depth in enumerate(dense.depth):
        x = getattr(dense, f"down{i}")(x, train=False)
        assert relative(x.transpose(0, 3, 1, 2), numbers[f"feat/downsample_{i}"]) < TOLERANCE
        x, _ = getattr(dense, f"stage{i}")(x, rates=None, key=None, routing_index=None, return_routing=False)
        assert relative(x.transpose(0, 3, 1, 2), numbers[f"feat/stage_{i}_block_{depth - 1}"]) < TOLERANCE


def _assert_close(ours, theirs):
    assert relative(ours, theirs) < TOLERANCE


def _buffers(tag):
    return {n: weight(n, tuple(s)) for n, s in MODELS[tag]["param_names"] if "running" in n}


def layer(tag, numbers, **changes):
    config = dict(LAYERS[tag]["config"])
    layout = "refactored" if LAYERS[tag]["layout"] == "NCHW" else "legacy"
    module = RoutingAttention(config.pop("dim"), **config, layout=layout, **changes, rngs=nnx.Rngs(0))
    start = f"{tag}/param/"
    return load_original(module, {n.removeprefix(start): numbers[n] for n in numbers if n.startswith(start)})


@pytest.mark.parametrize("backend", ("auto", *(slowly(name) for name in BACKENDS)))
@pytest.mark.parametrize("tag", list(LAYERS))
def test_a_layer_equals_the_original(tag, backend):
    numbers = fixture("bra_layers.npz")
    params, apply = from_nnx(layer(tag, numbers, backend=backend))
    channels_last = (0, 2, 3, 1) if LAYERS[tag]["layout"] == "NCHW" else (0, 1, 2, 3)
    x = jnp.asarray(numbers[f"{tag}/input"].transpose(channels_last))
    bias = "output_linear.bias" if LAYERS[tag]["layout"] == "NCHW" else "wo.bias"
    received = numbers[f"{tag}/grad/{bias}"] if f"{tag}/grad/{bias}" in numbers else np.ones(32, np.float32)

    @jax.jit
    def run(params, x):
        out, pullback, routing = jax.vjp(lambda p: apply(p, x, return_routing=True), params, has_aux=True)
        return out, routing, pullback(jnp.broadcast_to(received / (out.size // 32), out.shape))[0]

    out, routing, gradient = run(params, x)
    assert relative(out, numbers[f"{tag}/output"].transpose(channels_last)) < TOLERANCE
    assert relative(routing.logits, numbers[f"{tag}/r_logit"]) < TOLERANCE
    if f"{tag}/r_weight" in numbers:
        assert relative(routing.weight, numbers[f"{tag}/r_weight"]) < TOLERANCE
    if "pad" not in tag:  # regions of nothing but padding tie, and ties are broken differently
        np.testing.assert_array_equal(routing.index, numbers[f"{tag}/r_idx"])
    if f"{tag}/grad/{bias}" in numbers:
        # The stored gradients belong to a random cotangent g that is not stored. The output bias received the sum of g,
        # LePE's bias W_o^T times that sum, so that any cotangent of the same sum gives LePE's bias the same gradient.
        assert relative(gradient["lepe"]["bias"], numbers[f"{tag}/grad/lepe.bias"]) < 2e-5


@pytest.mark.parametrize(
    ("constructor", "parameters", "operations"),
    [
        (biformer_tiny, 13_142_760, 2_228_044_160),
        (biformer_small, 25_536_232, 4_487_312_640),
        (biformer_base, 56_804_968, 9_794_514_816),
        (biformer_stl, 28_372_552, 4_589_905_728),
    ],
)
def test_parameters_and_multiply_adds_are_exact(constructor, parameters, operations):
    model = nnx.eval_shape(lambda: constructor(rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == parameters
    assert multiply_adds(model) == operations


def attend(backend, scale):
    """`routed_attention` as one compiled function of (q, k, v, index, w)."""
    return jax.jit(functools.partial(routed_attention, scale=scale, backend=backend))


def random_qkv(key, shape, regions, keys, width):
    batch, heads, tokens, chosen = shape
    kq, kk, kv, ki = jax.random.split(jax.random.key(key), 4)
    q = jax.random.normal(kq, (batch, heads, regions, tokens, width))
    k = jax.random.normal(kk, (batch, heads, regions, keys, width))
    v = jax.random.normal(kv, (batch, heads, regions, keys, width + 1))
    index = jnp.argsort(jax.random.uniform(ki, (batch, regions, regions)))[..., :chosen]
    return q, k, v, index


@pytest.mark.parametrize("soft", (False, True))
@pytest.mark.parametrize("chosen", (1, 3, 6))
def test_back_ends_agree_with_the_definition(x64, soft, chosen):
    q, k, v, index = random_qkv(0, (2, 2, 4, chosen), 6, 3, 5)
    w = jax.nn.softmax(jax.random.normal(jax.random.key(1), index.shape)) if soft else None
    weights = np.ones(index.shape) if w is None else np.asarray(w)
    expected = np.zeros((*q.shape[:-1], v.shape[-1]))
    for b, m, r in np.ndindex(2, 2, 6):
        chosen_k = np.concatenate([weights[b, r, i] * np.asarray(k[b, m, s]) for i, s in enumerate(index[b, r])])
        chosen_v = np.concatenate([weights[b, r, i] * np.asarray(v[b, m, s]) for i, s in enumerate(index[b, r])])
        p = np.exp(0.3 * np.asarray(q[b, m, r]) @ chosen_k.T)
        expected[b, m, r] = p / p.sum(-1, keepdims=True) @ chosen_v
    for backend in (*BACKENDS, *(("full",) if chosen == 6 and not soft else ())):
        np.testing.assert_allclose(attend(backend, 0.3)(q, k, v, index, w), expected, atol=1e-12)


def test_a_large_logit_does_not_overflow_any_back_end():
    q, k, v, index = random_qkv(0, (1, 1, 2, 2), 3, 2, 4)
    for backend in (*BACKENDS, "fused"):
        out = attend(backend, 1.0)(1e3 * q, 1e3 * k, v[..., :4], index, None)
        assert np.isfinite(out).all(), backend


def layers_hvp(backend, **options):
    """A layer's loss over (params, x) with its routing frozen, and a random point and direction."""
    module = RoutingAttention(8, 2, n_win=3, topk=3, backend=backend, **options, rngs=nnx.Rngs(0))
    params, apply = from_nnx(module)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    params = jax.tree.map(
        lambda a: jnp.asarray(a, x.dtype) + 0.3 * jax.random.normal(jax.random.key(1), a.shape), params
    )
    _, routing = apply(params, x, return_routing=True)

    def loss(point):
        params, x = point
        return jnp.square(apply(params, x, routing_index=routing.index)).sum()

    point = (params, x)
    direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape), point)
    return loss, point, direction


def assert_second_derivatives(loss, point, direction, tolerance):
    """A Hessian-vector product against central differences of the gradient, both from one compiled program."""
    both = jax.jit(lambda point: jax.jvp(jax.grad(loss), (point,), (direction,)))
    _, hvp = both(point)
    step = 1e-5
    up, down = (both(jax.tree.map(lambda a, d, t=t: a + t * d, point, direction))[0] for t in (step, -step))
    numeric = jax.tree.map(lambda a, b: (a - b) / (2 * step), up, down)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(numeric))
    for ours, theirs in zip(jax.tree.leaves(hvp), jax.tree.leaves(numeric), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        *((backend, {}) for backend in ("auto", *BACKENDS)),
        *((backend, {"soft_routing": True, "diff_routing": True, "param_routing": True}) for backend in BACKENDS),
        ("gathered", {"kv_downsample_mode": "ada_maxpool", "kv_per_win": 1}),
        ("online", {"layout": "refactored"}),
    ],
)
def test_second_derivatives_equal_finite_differences(x64, backend, options):
    assert_second_derivatives(*layers_hvp(backend, **options), tolerance=1e-7)


@pytest.mark.slow
def test_second_derivatives_of_a_model_through_scan_and_batch_statistics(x64):
    model = BiFormer(
        (1, 1, 2, 1),
        (8, 8, 16, 16),
        in_chans=1,
        num_classes=3,
        head_dim=4,
        topks=(1, 2, 4, -2),
        n_win=2,
        layer_scale_init_value=0.5,
        remat=True,
        rngs=nnx.Rngs(0),
    )
    params, apply = from_nnx(model)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    x = jax.random.normal(jax.random.key(0), (2, 64, 64, 1))
    _, routings = jax.jit(lambda p: apply(p, x, train=True, return_routing=True))(params)
    frozen = [None if r is None else r.index for r in routings]

    def loss(params):
        return jnp.square(apply(params, x, train=True, routing_index=frozen)).sum()

    direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape), params)
    assert_second_derivatives(loss, params, direction, tolerance=1e-6)


def test_the_fused_back_end_has_first_derivatives_and_refuses_second_ones():
    q, k, v, index = random_qkv(0, (1, 2, 4, 2), 3, 4, 8)
    v = v[..., :8]

    def loss(backend):
        return lambda q, k, v: jnp.square(routed_attention(q, k, v, index, None, scale=0.3, backend=backend)).sum()

    ours, theirs = (jax.jit(jax.grad(loss(name), argnums=(0, 1, 2)))(q, k, v) for name in ("fused", "gathered"))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    gradient = jax.grad(loss("fused"))
    with pytest.raises(NotImplementedError, match=r"first derivatives only.*hypergradient"):
        jax.eval_shape(lambda q: jax.jvp(lambda q: gradient(q, k, v), (q,), (q,)), q)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.eval_shape(jax.grad(lambda q: jax.jit(gradient)(q, k, v).sum()), q)
    with pytest.raises(ValueError, match="no soft routing"):
        routed_attention(q, k, v, index, jnp.ones(index.shape), scale=1.0, backend="fused")


def test_hard_routing_passes_no_gradient_and_soft_differentiable_routing_does():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))

    def router_gradient(**options):
        module = RoutingAttention(8, 2, n_win=2, topk=2, soft_routing=True, **options, rngs=nnx.Rngs(0))
        params, apply = from_nnx(module)
        return jax.jit(jax.grad(lambda p: jnp.square(apply(p, x)).sum()))(params)

    assert jnp.abs(router_gradient(diff_routing=True, param_routing=True)["router"]["kernel"]).max() > 0
    frozen, free = router_gradient(), router_gradient(diff_routing=True)
    assert jnp.abs(frozen["qkv"]["kernel"] - free["qkv"]["kernel"]).max() > 0


def test_all_regions_chosen_is_full_attention(x64):
    q, k, v, _ = random_qkv(0, (2, 2, 4, 1), 5, 4, 6)
    every = jnp.broadcast_to(jnp.arange(5), (2, 5, 5))
    flat = [a.reshape(2, 2, 20, -1) for a in (q, k, v)]
    expected = jax.jit(functools.partial(full_attention, scale=0.2))(*flat).reshape(2, 2, 5, 4, 7)
    for backend in ("auto", *BACKENDS):
        np.testing.assert_allclose(attend(backend, 0.2)(q, k, v, every, None), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "backend"),
    [
        ((49, 49, 4), "full"),
        ((49, 16, 4), "dense"),
        ((49, 16, 64), "online"),
        ((49, 4, 256), "online"),
        ((49, 1, 64), "gathered"),
    ],
)
def test_the_back_end_follows_the_shape(shape, backend):
    assert choose_backend(*shape) == backend


def test_padding_to_a_multiple_equals_padding_by_hand_and_cropping():
    module = RoutingAttention(8, 2, n_win=3, topk=2, auto_pad=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 7, 8))
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 2), (0, 0)))
    params, apply = from_nnx(module)
    call = jax.jit(apply)
    np.testing.assert_allclose(call(params, x), call(params, padded)[:, :5, :7], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 3}, "must divide"),
        ({"param_routing": True}, "needs diff_routing=True"),
        ({"param_attention": "q"}, "neither"),
        ({"kv_downsample_mode": "fracpool"}, "none of identity"),
        ({"layout": "refactored", "soft_routing": True}, "no soft routing"),
        ({"layout": "new"}, "neither"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RoutingAttention(8, **{"num_heads": 2, **options}, rngs=nnx.Rngs(0))


def test_impossible_inputs_are_refused():
    x = jnp.zeros((1, 8, 8, 8))
    with pytest.raises(NotImplementedError, match="needs soft_routing=True"):
        RoutingAttention(8, 2, diff_routing=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="does not divide into 3 x 3 regions"):
        RoutingAttention(8, 2, n_win=3, rngs=nnx.Rngs(0))(x)
    with pytest.raises(ValueError, match="topk=5 of 4 regions"):
        RoutingAttention(8, 2, n_win=2, topk=5, backend="gathered", rngs=nnx.Rngs(0))(x)
    with pytest.raises(ValueError, match="too small"):
        RoutingAttention(8, 2, n_win=9, layout="refactored", rngs=nnx.Rngs(0))(x)
    with pytest.raises(ValueError, match="is none of"):
        RoutingAttention(8, 2, n_win=2, topk=1, backend="fast", rngs=nnx.Rngs(0))(x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has 3 entries"):
        BiFormer((1, 1, 1), rngs=nnx.Rngs(0))


def small(**changes):
    config = {
        "depth": (1, 1, 2, 1),
        "embed_dim": (8, 8, 8, 8),
        "in_chans": 1,
        "num_classes": 3,
        "head_dim": 4,
        "topks": (1, 2, 4, -2),
        "n_win": 2,
    }
    return BiFormer(**{**config, **changes}, rngs=nnx.Rngs(0))


def test_dense_output_is_four_normalised_maps():
    params, apply = from_nnx(small(dense=True))
    maps = jax.jit(apply)(params, jnp.ones((1, 64, 64, 1)) * jnp.linspace(-1, 1, 64)[:, None])
    assert [m.shape for m in maps] == [(1, 16, 16, 8), (1, 8, 8, 8), (1, 4, 4, 8), (1, 2, 2, 8)]
    for m in maps:
        np.testing.assert_allclose(m.mean(-1), 0, atol=1e-5)


def test_drop_path_needs_a_key_and_follows_the_given_rates():
    model = small(drop_path_rate=0.5)
    np.testing.assert_allclose(model.drop_path_rates(), [0, 0.125, 0.25, 0.375, 0.5], atol=1e-7)
    params, apply = from_nnx(model)
    x = jax.random.normal(jax.random.key(0), (2, 64, 64, 1))
    with pytest.raises(ValueError, match="needs a random key"):
        apply(params, x, train=True)
    run = jax.jit(lambda key, rates: apply(params, x, train=True, key=key, drop_path_rates=rates))
    a, b = (run(jax.random.key(i), model.drop_path_rates()) for i in (0, 1))
    assert jnp.abs(a - b).max() > 0
    without = jax.jit(lambda: from_nnx(small())[1](params, x, train=True))()
    np.testing.assert_allclose(run(jax.random.key(0), jnp.zeros(5)), without, atol=1e-6)


def test_weights_come_back_from_files_and_bad_ones_are_refused(tmp_path):
    weights = {name: weight(name, tuple(shape)) for name, shape in MODELS["nano64"]["param_names"]}
    np.savez(tmp_path / "weights.npz", **weights)
    read = read_checkpoint(tmp_path / "weights.npz")
    assert read.keys() == weights.keys()
    model = build("nano64")
    missing = {name: value for name, value in read.items() if name != "head.bias"}
    with pytest.raises(KeyError, match=r"lack head\.bias"):
        load_original(model, missing)
    with pytest.raises(ValueError, match=r"stages\.0\.0\.attn\.wo\.weight has shape"):
        load_original(model, {**read, "stages.0.0.attn.wo.weight": np.zeros((3, 3))})
    with pytest.raises(ValueError, match=r"no place for extra\.weight"):
        load_original(model, {**read, "extra.weight": np.zeros(3)})
    params, apply = from_nnx(model)
    with pytest.raises(KeyError, match=r"lack head\.bias"):
        apply({**params, "head": {}}, jnp.zeros((1, 64, 64, 3)))
