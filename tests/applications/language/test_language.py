"""The transformer against NumPy, its entropy against the plain one, the weights of sources against their formulas."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import lower, run
from bilevel.applications import language
from bilevel.applications.language import GPT2, Transformer, chunked_entropy, sources
from bilevel.applications.layers import lora
from bilevel.hypergradients import value_and_hypergradient
from bilevel.keys import as_step_key

RNG = np.random.default_rng(0)
TINY = Transformer(11, width=8, blocks=2, heads=2, length=6, chunk=4)
QUICK = dataclasses.replace(TINY, remat=False)  # to compile


def close(ours, theirs, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=tolerance, atol=tolerance)


def drawn(model, seed=0, dtype=float):
    """Parameters of a size at which every part counts."""
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(0.5 * random.normal(size=shape), dtype) for name, shape in model.shapes().items()}


def tokens(model, count, time, seed=0):
    return np.random.default_rng(seed).integers(0, model.vocabulary, (count, time)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def loss(model, params, rows, adapter=None):
    return model.loss(params, rows, adapter)


# The entropy.


def plain_entropy(hidden, embedding, targets):
    logits = hidden @ embedding.T
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 4, 7, 50])
def test_chunked_entropy_is_the_plain_one_with_its_derivatives(x64, chunk):
    h, e, t = RNG.normal(size=(2, 7, 3)), RNG.normal(size=(9, 3)), RNG.integers(0, 9, (2, 7))
    weights = RNG.normal(size=(2, 7))
    along = RNG.normal(size=h.shape), RNG.normal(size=e.shape)

    def all_of(entropy):
        total = lambda h, e: (weights * entropy(h, e)).sum()
        gradient = jax.grad(total, argnums=(0, 1))
        return jax.jit(lambda: (entropy(h, e), *jax.jvp(gradient, (h, e), along)))()

    ours = all_of(lambda h, e: chunked_entropy(h, e, t, chunk))
    jax.tree.map(close, ours, all_of(lambda h, e: plain_entropy(h, e, t)))


def test_logits_are_never_whole():
    """The gradient of the chunked entropy has temporaries of some pieces, that of the plain one of all logits."""
    b, t, w, v, chunk = 2, 256, 8, 4096, 4
    shapes = jax.ShapeDtypeStruct((b, t, w), jnp.float32), jax.ShapeDtypeStruct((v, w), jnp.float32)
    targets = jnp.zeros((b, t), jnp.int32)

    def temporaries(entropy):
        gradient = jax.grad(lambda h, e: entropy(h, e).sum(), argnums=(0, 1))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole, piece = 4 * b * t * v, 4 * b * chunk * v
    assert temporaries(lambda h, e: plain_entropy(h, e, targets)) >= whole
    assert temporaries(lambda h, e: chunked_entropy(h, e, targets, chunk)) < 4 * piece + 4 * 4 * v * w < whole / 2


def test_chunked_entropy_says_what_does_not_fit():
    h, e, t = jnp.zeros((2, 3, 4)), jnp.zeros((5, 4)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"chunk=0\): a positive integer"):
        chunked_entropy(h, e, t, 0)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), \(5, 4\) and \(2, 2\) were given"):
        chunked_entropy(h, e, t[:, :2])


# The transformer.


def by_hand(model, params, row):
    """The logits of one sequence, head by head and place by place."""
    p = {name: np.asarray(leaf) for name, leaf in params.items()}
    norm = lambda h, s, b: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * s + b
    h = p["embedding.weight"][row]
    if model.positions == "learnt":
        h = h + p["positions.weight"][: len(row)]
    d = model.width // model.heads
    for k in range(model.blocks):
        of = lambda name, k=k: p[f"blocks.{name}"][k]
        linear = lambda name, x, of=of: x @ of(f"{name}.weight").T + of(f"{name}.bias")
        x = norm(h, of("attention.norm.scale"), of("attention.norm.bias"))
        out = np.zeros_like(h)
        for head in range(model.heads):
            part = slice(head * d, (head + 1) * d)
            q, key, v = (linear(f"attention.{name}", x)[:, part] for name in ("query", "key", "value"))
            for i in range(len(row)):
                if model.positions == "rotary":
                    # As complex numbers: turned by the place, so that scores depend on differences of places.
                    turn = lambda z, at: (
                        (z[: d // 2] + 1j * z[d // 2 :]) * np.exp(1j * at * 10_000.0 ** (-np.arange(0, d, 2) / d))
                    )
                    scores = [np.real(np.vdot(turn(key[j], j), turn(q[i], i))) for j in range(i + 1)]
                else:
                    scores = [q[i] @ key[j] for j in range(i + 1)]
                weights = np.exp(np.array(scores) / np.sqrt(d))
                out[i, part] = weights @ v[: i + 1] / weights.sum()
        h = h + linear("attention.out", out)
        x = linear("mlp.up", norm(h, of("mlp.norm.scale"), of("mlp.norm.bias")))
        h = h + linear("mlp.down", 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    return norm(h, p["norm.scale"], p["norm.bias"]) @ p["embedding.weight"].T


@pytest.mark.parametrize("positions", ["rotary", "learnt"])
def test_the_transformer_is_its_definition(x64, positions):
    model = dataclasses.replace(TINY, positions=positions)
    params, rows = drawn(model), tokens(model, 2, 6)
    logits = jax.jit(model)(params, rows)
    for row, ours in zip(rows, logits, strict=True):
        close(ours, by_hand(model, params, row), 1e-10)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), rows[:, 1:, None], -1)[..., 0]
    found = jax.jit(model.losses)(params, rows)
    close(found, expected, 1e-10)
    close(loss(model, params, rows), expected.mean(-1), 1e-10)


def test_blocks_computed_again_give_the_same_gradient(x64):
    params, rows = drawn(TINY), tokens(TINY, 2, 6)
    gradient = lambda model: jax.jit(jax.grad(lambda p: model.loss(p, rows).sum()))(params)
    jax.tree.map(close, gradient(TINY), gradient(dataclasses.replace(TINY, remat=False)))


def test_sizes_are_those_of_gpt2():
    assert GPT2.count() == 124_439_808
    assert TINY.count() == sum(leaf.size for leaf in jax.eval_shape(TINY.init, jax.random.key(0)).values())


def test_half_precision_is_in_the_products_alone():
    model = dataclasses.replace(TINY, compute="bfloat16")
    params, rows = drawn(TINY, dtype=jnp.float32), tokens(TINY, 2, 6)
    value, exact = np.asarray(loss(model, params, rows)), np.asarray(loss(TINY, params, rows))
    assert value.dtype == np.float32 and 1e-5 < np.abs(value - exact).max() < 0.1
    gradient = jax.eval_shape(jax.grad(lambda p: model.loss(p, rows).mean()), params)
    assert {leaf.dtype for leaf in gradient.values()} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.hidden, params, rows).dtype == jnp.bfloat16


def test_a_kernel_is_given_queries_keys_and_values():
    seen = []

    def attend(q, k, v, *, is_causal):
        seen.append((q.shape, k.shape, v.shape, is_causal))
        return jnp.zeros_like(q)

    jax.eval_shape(dataclasses.replace(TINY, attend=attend).loss, drawn(TINY), tokens(TINY, 3, 6))
    assert seen[0] == ((3, 5, 2, 4),) * 3 + (True,)


def test_an_adapter_in_the_blocks_is_the_merged_weights(x64):
    params, rows = drawn(TINY), tokens(TINY, 2, 6)
    adapter = lora.init(jax.random.key(0), params, ["query", "value", "mlp.down"], 3)
    adapter = {name: leaf + 0.1 * RNG.normal(size=leaf.shape) for name, leaf in adapter.items()}
    inside = jax.jit(jax.value_and_grad(lambda a: loss(QUICK, params, rows, a).sum()))(adapter)
    merged = jax.jit(jax.value_and_grad(lambda a: loss(QUICK, lora.merge(params, a), rows).sum()))(adapter)
    jax.tree.map(lambda a, b: close(a, b, 1e-11), inside, merged)
    assert abs(float(inside[0] - loss(TINY, params, rows).sum())) > 1e-3
    x = RNG.normal(size=(2, 8))
    one = {name.removeprefix("blocks."): leaf[0] for name, leaf in adapter.items()}
    delta = lora.merge(params, adapter, alpha=6.0)["blocks.mlp.down.weight"] - params["blocks.mlp.down.weight"]
    wide = RNG.normal(size=(2, 32))
    close(lora.product(one, "mlp.down", wide, alpha=6.0), wide @ delta[0].T, 1e-11)
    assert lora.product(one, "attention.key", x) is None


def test_the_transformer_says_what_does_not_fit():
    for changed, words in (
        ({"width": 9}, r"width=9, heads=2\): the heads share the width equally"),
        ({"width": 6}, r"rotary positions turn pairs of numbers, and a head has 3"),
        ({"positions": "none"}, r"positions='none'\): positions are 'rotary' or 'learnt'"),
        ({"blocks": 0}, r"Transformer\(blocks=0\): a positive integer is needed"),
        ({"chunk": True}, r"Transformer\(chunk=True\): a positive integer is needed"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(TINY, **changed)
    params = drawn(TINY)
    with pytest.raises(ValueError, match="Sequences of 7 tokens were given to a Transformer of length 6"):
        TINY.hidden(params, tokens(TINY, 1, 7))
    adapter = lora.init(jax.random.key(0), params, ["embedding"], 2)
    with pytest.raises(ValueError, match="The adapter has embedding: adapters of the blocks' weights alone"):
        TINY.hidden(params, tokens(TINY, 1, 6), adapter)
    with pytest.raises(ValueError, match="at least one is needed before, and the length 6"):
        TINY.generate(params, jax.random.key(0), jnp.zeros(3, jnp.int32), 5)


def test_generated_tokens_follow_the_start():
    model = Transformer(5, width=8, blocks=1, heads=1, length=6, positions="learnt")
    # Blocks that add nothing: the likeliest next token is the one before.
    params = {name: np.zeros(shape, np.float32) for name, shape in model.shapes().items()}
    params["embedding.weight"], params["norm.scale"] = np.eye(5, 8, dtype=np.float32), np.ones(8, np.float32)
    same = model.generate(params, jax.random.key(0), jnp.array([3], jnp.int32), 4, temperature=0.01)
    assert same.tolist() == [3, 3, 3, 3, 3]
    likeliest = model.generate(params, jax.random.key(0), jnp.array([3], jnp.int32), 4, temperature=0)
    assert likeliest.tolist() == [3, 3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"temperature=-1\): it is zero \(the likeliest token\) or positive"):
        model.generate(params, jax.random.key(0), jnp.array([3], jnp.int32), 4, temperature=-1)
    for call in (lambda t: model(params, t), lambda t: model.generate(params, jax.random.key(0), t[0], 2)):
        with pytest.raises(ValueError, match=r"go from 1 to 5, and there are 5 in the vocabulary \(0 to 4\)"):
            call(jnp.array([[1, 5]], jnp.int32))


# The weights of sources.


def made(per="source", **options):
    train = {"good": tokens(TINY, 5, 6, 1), "bad": tokens(TINY, 3, 6, 2)}
    return sources(QUICK, train, tokens(TINY, 4, 6, 3), params=drawn(TINY), per=per, **options), train


def levels(app, x):
    """f, f_x and F."""

    def both(x, y):
        upper, level = app.problem.levels(as_step_key(0))
        return *jax.value_and_grad(level)(x, y), upper(x, y)

    return jax.jit(both)(x, app.y0)


def test_the_losses_are_their_formulas(x64):
    app, train = made(decay=0.3)
    means = np.array([loss(TINY, app.y0, rows).mean() for rows in train.values()])
    square = sum(float((leaf**2).sum()) for leaf in app.y0.values())
    x = jnp.array([0.7, -0.4])
    p = np.exp(x) / np.exp(x).sum()
    close(app.weights(x), p)
    value, gradient, above = levels(app, x)
    close(value, p @ means + 0.15 * square, 1e-11)
    close(gradient, (np.diag(p) - np.outer(p, p)) @ means, 1e-11)
    close(above, loss(TINY, app.y0, tokens(TINY, 4, 6, 3)).mean(), 1e-11)
    assert list(app.metrics) == ["weight good", "weight bad"]
    close(app.metrics["weight bad"](x, app.y0), p[1])

    app, _ = made("sample")
    x = jnp.asarray(RNG.normal(size=8))
    each = np.concatenate([loss(TINY, app.y0, rows) for rows in train.values()])
    w = 1 / (1 + np.exp(-x))
    close(levels(app, x)[0], (w * each).mean(), 1e-11)
    close(app.shares(x), np.array([w[:5].sum(), w[5:].sum()]) / w.sum())


def test_batches_have_the_mean_of_all(x64):
    app, _ = made(batch=2)
    level = app.problem.draw_lower(as_step_key(0))
    x, found = jnp.array([0.5, -0.5]), []
    value = jax.jit(lambda step: level.redraw(step, 4)(x, app.y0))
    found = [float(value(step)) for step in range(4)]  # an epoch of 4 batches: every sequence once
    close(np.mean(found), levels(made()[0], x)[0], 1e-11)
    assert np.std(found) > 1e-3


def test_shares_are_fixed_and_drawn_by():
    app, train = made(batch=2000)
    close(app.weights(app.fixed([3, 1])), [0.75, 0.25], 1e-6)
    close(app.weights(app.fixed([1, 0])), [1, 0])
    of_samples, _ = made("sample")
    close(of_samples.shares(of_samples.fixed([3, 1])), [0.75, 0.25], 1e-6)
    rows = np.asarray(app.mixed([3, 1]).draw(as_step_key(0)))
    good = (rows[:, None] == train["good"]).all(-1)
    assert good.any(1).sum() + (rows[:, None] == train["bad"]).all(-1).any(1).sum() == 2000
    assert abs(good.any(1).mean() - 0.75) < 0.05 and (good.sum(0) > 200).all()
    for shares in ([1, 1, 1], [-1, 2], [0, 0], [np.nan, 1]):
        with pytest.raises(ValueError, match="2 are needed, none negative and not all zero"):
            app.fixed(shares)


def test_an_adapter_is_all_that_moves():
    app, train = made(rank=2, adapted=["query", "value"])
    assert set(app.y0) == {
        f"blocks.attention.{name}.lora_{part}.weight" for name in ("query", "value") for part in "AB"
    }
    rows = train["good"]
    close(app.loss(app.y0, rows), loss(TINY, app.base, rows), 1e-6)
    moved = jax.tree.map(lambda leaf: leaf + 0.3, app.y0)
    close(app.loss(moved, rows), loss(TINY, app.full(moved), rows), 1e-5)
    # Both levels read one and the same base: what they capture holds each array of it once.
    captured = jax.tree.leaves(app.problem.captured(app.x0, app.y0))
    assert sum(leaf.shape == (2, 8, 8) for leaf in captured) == 4
    with pytest.raises(ValueError, match=r"sources\(rank=2\) adapts a trained network: give its parameters"):
        sources(TINY, train, rows, rank=2)


def test_sources_say_what_does_not_fit():
    train, target = {"a": tokens(TINY, 3, 6), "b": tokens(TINY, 3, 6)}, tokens(TINY, 3, 6)
    for changed, words in (
        ({"train": {"a": train["a"]}}, r"1 source\(s\) of text: a share per source needs two"),
        ({"train": {**train, "b": train["b"].astype(float)}}, r"of source 'b' are float64\[3, 6\]; whole numbers"),
        ({"train": {**train, "b": train["b"][:0]}}, r"source 'b' are int32\[0, 6\]"),
        (
            {"train": {**train, "b": train["b"] + 9}},
            r"source 'b' have tokens from \d+ to \d+, and the network knows 0 to 10",
        ),
        ({"target": tokens(TINY, 3, 8)}, r"target have 8 tokens, more than the network's length 6"),
        ({"target": tokens(TINY, 3, 5)}, r"'target' have 5 tokens and those of 'a' 6: cut all to one length"),
        ({"per": "token"}, r"per='token'\): a weight per 'source' or per 'sample'"),
        ({"decay": -1.0}, r"decay=-1.0\): at least 0"),
        ({"params": {}}, r"The weights are not those of Transformer"),
    ):
        options = {"train": train, "target": target, **changed}
        with pytest.raises(ValueError, match=words):
            sources(TINY, options.pop("train"), options.pop("target"), **options)


# The routes.

SMALL = Transformer(3, width=4, blocks=1, heads=1, length=4, remat=False, chunk=4)


def noisy(**options):
    """Sequences 0 1 2 0 1, and noise: what is wanted is the first."""
    good = (np.arange(5) + np.arange(3)[:, None]) % 3
    noise = np.random.default_rng(0).integers(0, 3, (12, 5))
    return sources(SMALL, {"good": np.tile(good, (4, 1)), "noise": noise}, good, **options)


def test_the_derivative_of_a_whole_run_is_a_central_difference(x64):
    app = noisy(params=drawn(SMALL), batch=6)
    route = language.whole_run(5, 0.05, checkpoint="sqrt")

    @jax.jit
    def both(x):
        of = value_and_hypergradient(app.problem, route.hypergradient, route.lower_solver)
        found = of(x, app.y0)
        return found.value, found.gradient

    x, h = jnp.array([0.3, -0.2]), 1e-5
    gradient = np.asarray(both(x)[1])
    difference = [(both(x + h * e)[0] - both(x - h * e)[0]) / (2 * h) for e in np.eye(2)]
    close(gradient, difference, 1e-7)
    assert np.abs(gradient).min() > 1e-4


ROUTES = {
    "penalty": (language.penalty(0.02, 0.05, alpha=3.0), 150),
    "one-step": (language.one_step(1, 0.02, 0.05), 150),
    "whole run": (language.whole_run(30, 0.02, 0.3), 12),
    "implicit": (language.implicit(5, 0.02, 0.1), 60),
}


@pytest.mark.parametrize(
    "name", ["penalty", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one-step", "whole run", "implicit"))]
)
def test_every_route_turns_away_from_the_noise(name):
    route, steps = ROUTES[name]
    base = SMALL.init(jax.random.key(1))
    app = noisy(params={k: 10 * v if k.endswith("weight") else v for k, v in base.items()}, batch=6)
    state, metrics = jax.jit(lambda x, y: run(app.problem, route, x, y, steps))(app.x0, app.y0)
    assert float(app.shares(state.x)[1]) < 0.3
    assert float(metrics["upper_loss"][-1]) < float(metrics["upper_loss"][0])


@pytest.mark.slow
def test_the_penalty_needs_one_base_and_three_adapters():
    """Compiled sizes of a step, beside those of a plain fine-tuning of the adapter."""
    model = Transformer(64, width=128, blocks=2, heads=2, length=16, chunk=8)
    rows = tokens(model, 8, 17)
    app = sources(model, {"a": rows, "b": rows}, rows, params=model.init(jax.random.key(0)), rank=4, batch=2)
    route, rule = language.penalty(), optax.adam(1e-3)
    problem = app.problem.captured(app.x0, app.y0)

    def total(step, *args, donated):
        """(bytes in all, temporaries): what goes in and stays, what comes out elsewhere, and what is in between."""
        sizes = jax.jit(step, donate_argnums=donated).lower(*args).compile().memory_analysis()
        kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return kept + sizes.temp_size_in_bytes, sizes.temp_size_in_bytes

    def fine_tune(base, y, memory, rows):
        gradient = jax.grad(lambda y: model.loss(base, rows, y).mean())(y)
        updates, memory = rule.update(gradient, memory)
        return optax.apply_updates(y, updates), memory

    state = jax.eval_shape(lambda: route.init(problem, app.x0, app.y0, as_step_key(0)))
    plain, _ = total(fine_tune, app.base, app.y0, rule.init(app.y0), jnp.asarray(rows[:2]), donated=(1, 2))
    ours, _ = total(lambda p, s: route.step(p, s, as_step_key(0)), problem, state, donated=(1,))
    base, adapter = (sum(leaf.nbytes for leaf in tree.values()) for tree in (app.base, app.y0))
    data = rows.nbytes * 3
    # One copy of the base: without it, the step needs what two fine-tunings need without theirs, and a tenth.
    assert ours - base - data < 1.1 * 2 * (plain - base)
    assert ours < 1.1 * 2 * plain and ours < 2 * base
    # Three copies of the adapter, and two of Adam's moments.
    like = [
        leaf for leaf in jax.tree.leaves(state) if leaf.shape == app.y0["blocks.attention.query.lora_A.weight"].shape
    ]
    assert len(like) == 2 * (3 + 2 * 2) and adapter < base / 20


def test_a_training_on_drawn_sequences_goes_into_a_lower_solver():
    """What `mixed` returns is a level's data: a training afresh is a lower solver's run."""
    app = noisy(params=drawn(SMALL, dtype=jnp.float32), batch=6)
    problem = dataclasses.replace(
        app.problem, lower=lambda x, y, rows: app.loss(y, rows).mean(), lower_data=app.mixed([1, 0])
    )
    training = lower.GradientDescent(optax.adam(0.05), 60)
    y = jax.jit(lambda y: training(problem.draw_lower(as_step_key(0)), app.x0, training.init(y)).y)(app.y0)
    good = (np.arange(5) + np.arange(3)[:, None]) % 3
    assert float(loss(SMALL, y, good).mean()) < 0.5 < float(loss(SMALL, app.y0, good).mean())
