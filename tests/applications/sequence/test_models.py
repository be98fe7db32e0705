"""The sequence models against numbers of the original implementations, identities, differences, and hostile input."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.applications.sequence import (
    LSTM,
    Attention,
    AttentiveBiLSTM,
    BiDAF,
    HierarchicalTransformer,
    Interview,
    Passage,
    balanced_weights,
    best_span,
    character_model,
    cross_entropy,
    ensemble,
    ensemble_span,
    parameter_count,
    posteriors,
    span_loss,
    word_model,
)
from bilevel.applications.sequence.hierarchical import encode, rollout

HERE = Path(__file__).parent / "fixtures"


def fixture(name):
    with np.load(HERE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def close(ours, theirs, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def drawn(model, seed=0):
    """Parameters in one compiled programme, and not in one for each of the draws; once for models of one kind."""
    return _drawn(model, seed, jax.config.jax_enable_x64)


@functools.cache
def _drawn(model, seed, x64):
    return jax.jit(model.init)(jax.random.key(seed))


def blank(model):
    """Parameters for who asks for no number."""
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(model.init, jax.random.key(0)))


def doubles(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


# The recurrence.


def by_hand(params, x, cell, reverse=False):
    """One sequence (time, features), gate by gate, in numpy."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    if cell == "pytorch":
        kernel = np.concatenate([p["input_kernel"], p["hidden_kernel"]])
        bias, order, forget = p["input_bias"] + p["hidden_bias"], (0, 1, 2, 3), 0
    else:
        kernel, bias, order, forget = p["kernel"], p["bias"], (0, 2, 1, 3), 1
    d = kernel.shape[1] // 4
    h = c = np.zeros(d)
    out = np.zeros((len(x), d))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    for t in range(len(x))[:: -1 if reverse else 1]:
        parts = np.split(np.concatenate([x[t], h]) @ kernel + bias, 4)
        i, f, g, o = (parts[k] for k in order)
        c = sigmoid(f + forget) * c + sigmoid(i) * np.tanh(g)
        h = out[t] = sigmoid(o) * np.tanh(c)
    return out


@pytest.mark.parametrize("cell", ["pytorch", "tensorflow"])
def test_lstm_is_the_definition_within_each_sequence_and_zero_beyond(cell, x64):
    lstm = LSTM(3, 4, layers=2, cell=cell)
    params = doubles(drawn(lstm))
    x, lengths = normal(0, 3, 6, 3), jnp.array([6, 1, 4])
    states = jax.jit(lstm)(params, x, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = np.asarray(x[row, :length])
        for layer in params.values():
            expected = np.concatenate(
                [by_hand(layer[name], expected, cell, name == "backward") for name in ("forward", "backward")], -1
            )
        close(states[row, :length], expected, 1e-14)
        assert not np.asarray(states[row, length:]).any()


@pytest.fixture(scope="module")
def padded():
    """An LSTM, a batch, and its states and a loss's gradients as two compiled functions."""
    with jax.enable_x64(True):
        lstm = LSTM(3, 4, layers=2)
        x, lengths = normal(0, 3, 6, 3), jnp.array([6, 1, 4])
        loss = lambda params, x: jnp.sum(jnp.sin(lstm(params, x, lengths) + 1))
        return drawn(lstm), x, lengths, jax.jit(lstm), jax.jit(jax.grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_padding_never_leaks(bad, x64, padded):
    params, x, lengths, lstm, gradients = padded
    beyond = np.arange(6) >= np.asarray(lengths)[:, None]
    hostile = jnp.asarray(np.where(beyond[..., None], bad, x))
    close(lstm(params, hostile, lengths), lstm(params, x, lengths), 0)
    by_params, by_x = gradients(params, hostile)
    assert not np.asarray(by_x)[beyond].any()
    jax.tree.map(lambda a, b: close(a, b, 0), (by_params, by_x), gradients(params, x))
    # More padding changes nothing.
    more = jnp.asarray(np.concatenate([x, normal(5, 3, 2, 3)], 1))
    close(lstm(params, more, lengths)[:, :6], lstm(params, x, lengths), 1e-15)


@pytest.mark.parametrize("cell", ["pytorch", "tensorflow"])
def test_first_and_second_derivatives_are_differences(cell, x64):
    lstm = LSTM(2, 3, layers=2, cell=cell)
    flat, unravel = jax.flatten_util.ravel_pytree(doubles(drawn(lstm, 1)))
    x, lengths = normal(0, 2, 5, 2), jnp.array([5, 3])
    f = jax.jit(lambda p: jnp.sum(jnp.square(lstm(unravel(p), x, lengths)) * jnp.arange(1, 7)))
    g = jax.jit(jax.grad(f))
    v, e = normal(3, flat.size), 1e-6
    along = (f(flat + e * v) - f(flat - e * v)) / (2 * e)
    close(g(flat) @ v, along, 1e-8 * abs(float(along)))
    difference = (g(flat + e * v) - g(flat - e * v)) / (2 * e)

    @jax.jit
    def products(flat, v):
        forward = lambda p: jax.jvp(f, (p,), (v,))[1]
        reverse_over_reverse = jax.grad(lambda p: g(p) @ v)(flat)
        return forward(flat), (jax.jvp(g, (flat,), (v,))[1], reverse_over_reverse, jax.grad(forward)(flat))

    slope, second = products(flat, v)
    close(slope, g(flat) @ v, 1e-13)
    for product in second:
        close(product, difference, 1e-8 * float(jnp.linalg.norm(difference)))


def test_lstm_maps_over_parameters():
    lstm = LSTM(2, 3)
    stacked = jax.jit(jax.vmap(lstm.init))(jax.random.split(jax.random.key(0), 4))
    x, lengths = normal(0, 2, 5, 2), jnp.array([5, 3])
    many = jax.jit(jax.vmap(lstm, (0, None, None)))(stacked, x, lengths)
    one = jax.jit(lstm)(jax.tree.map(lambda a: np.asarray(a)[2], stacked), x, lengths)
    close(many[2], one, 1e-6)


def test_lstm_says_what_is_wrong():
    lstm = LSTM(3, 4)
    params, x = blank(lstm), normal(0, 2, 5, 3)
    with pytest.raises(ValueError, match=r"Sequences \[1\] of the batch have length 0: there is nothing to read"):
        lstm(params, x, jnp.array([3, 0]))
    with pytest.raises(ValueError, match="lengths from 3 to 6 were given for sequences padded to 5 steps"):
        lstm(params, x, jnp.array([3, 6]))
    with pytest.raises(ValueError, match=r"lengths of shape \(2,\) and type float32 .* give 2 whole numbers"):
        lstm(params, x, jnp.array([3.0, 2.0], jnp.float32))
    with pytest.raises(ValueError, match=r"shape \(2, 5, 2\) were given to an LSTM of 3 features"):
        lstm(params, x[..., :2])
    with pytest.raises(ValueError, match="cell='gru' was given; there are 'pytorch', 'tensorflow'"):
        LSTM(3, 4, cell="gru")
    with pytest.raises(KeyError, match="lack 'weight_ih_l0'"):
        lstm.from_pytorch({"weight": np.zeros(3)})
    with pytest.raises(ValueError, match=r"'weight_ih_l0' has shape \(16, 2\); \(16, 3\) was expected"):
        lstm.from_pytorch({"weight_ih_l0": np.zeros((16, 2))})


def test_inside_jit_an_empty_sequence_is_zero_and_so_is_its_gradient():
    model = AttentiveBiLSTM(9, 3, 4, layers=1, trained=True)
    params = drawn(model)
    ids = jnp.array([[1, 2, 3], [0, 0, 0]])
    logits, attention = jax.jit(lambda p, n: model(p, ids, n, return_attention=True))(params, jnp.array([3, 0]))
    assert np.isfinite(np.asarray(logits)).all()
    assert not np.asarray(attention[1]).any()
    gradient = jax.jit(jax.grad(lambda p, n: model(p, ids, n).sum()))(params, jnp.array([3, 0]))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))
    assert not np.asarray(gradient["embedding"][0]).any()


# NTUA's model.


def test_attentive_bilstm_has_the_released_codes_numbers(x64):
    f = fixture("ntua_full_small")
    model = AttentiveBiLSTM(rows=15, embedding=5, hidden=3)
    params, table = model.from_pytorch(f)
    frozen = jax.jit(lambda p, ids: model(p, ids, f["lengths"], table=table, return_attention=True))
    logits, attention = frozen(params, f["ids"])
    close(logits, f["logits"])
    close(attention, f["attention"])
    trained = dataclasses.replace(model, trained=True)
    params, _ = trained.from_pytorch(f)
    learnt = jax.jit(trained)
    close(learnt(params, f["ids"], f["lengths"]), f["logits"])
    # What stands at padding is not read.
    other = np.where(np.arange(6) >= f["lengths"][:, None], 7, f["ids"])
    close(learnt(params, other, f["lengths"]), f["logits"])


@pytest.mark.parametrize(
    ("make", "classes", "count"),
    [
        (word_model, 2, 1_085_402),
        (word_model, 4, 1_086_305),
        (character_model, 2, 757_952),
        (character_model, 4, 758_855),
    ],
)
def test_ntua_parameter_counts(make, classes, count):
    model = make(1000, classes) if make is word_model else make(classes)
    assert parameter_count(jax.eval_shape(model.init, jax.random.key(0))) == count


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_attention_is_never_sharp_and_follows_a_permutation(context, layers, x64):
    attend = Attention(4, layers, context)
    params = jax.tree.map(lambda a: 100 * np.asarray(a), drawn(attend))
    states, lengths = 100 * np.asarray(normal(0, 5, 7, 4)), np.array([7, 5, 3, 2, 1])
    run = jax.jit(attend)
    representation, attention = map(np.asarray, run(params, states, lengths))
    close(attention.sum(-1), np.ones(5), 1e-14)
    for row, length in zip(np.asarray(attention), lengths.tolist(), strict=True):
        assert row[:length].max() / row[:length].min() <= np.e**2 * (1 + 1e-12)
        assert not row[length:].any()
    order = np.array([3, 1, 0, 4, 2, 6, 5])
    again, moved = run(params, states[:1, order], lengths[:1])
    close(again, representation[:1], 1e-10)
    close(moved, attention[:1, order], 1e-13)


def test_attention_is_released_softmax_then_mask_then_renormalise(x64):
    attend = Attention(4)
    params = drawn(attend)
    states, lengths = normal(0, 3, 6, 4), np.array([6, 2, 4])
    scores = np.tanh(np.asarray(states @ params["layer0"]["kernel"] + params["layer0"]["bias"])[..., 0])
    all_steps = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    masked = all_steps * (np.arange(6) < lengths[:, None])
    close(jax.jit(attend)(params, states, lengths)[1], masked / masked.sum(-1, keepdims=True), 1e-15)


def test_attentive_bilstm_says_what_is_wrong():
    model = AttentiveBiLSTM(9, 3, 4)
    params = blank(model)
    ids, lengths = jnp.array([[1, 2, 3]]), jnp.array([3])
    with pytest.raises(ValueError, match="not trained: give the tokens' vectors as table="):
        model(params, ids, lengths)
    with pytest.raises(ValueError, match=r"shape \(8, 3\) was given .* the dictionary does not match"):
        model(params, ids, lengths, table=jnp.zeros((8, 3)))
    with pytest.raises(ValueError, match="The tokens go from 1 to 9, and there are 9 in"):
        model(params, jnp.array([[1, 2, 9]]), lengths, table=jnp.zeros((9, 3)))


def test_losses_and_ensembles(x64):
    logits, labels = normal(0, 6, 1), jnp.array([0, 1, 1, 0, 1, 0])
    p = posteriors(logits)
    close(cross_entropy(logits, labels), -np.log(np.asarray(p)[np.arange(6), labels]), 1e-14)
    two = jnp.concatenate([jnp.zeros_like(logits), logits], -1)
    close(cross_entropy(two, labels), cross_entropy(logits, labels), 1e-14)
    weights = balanced_weights([0, 0, 0, 1], 2)
    close(weights, [4 / 6, 2.0], 1e-7)
    close(cross_entropy(two, labels, weights), np.asarray(cross_entropy(two, labels)) * weights[labels], 1e-14)
    with pytest.raises(ValueError, match=r"counts \[2, 0\] were given for 2 classes; each needs a sample"):
        balanced_weights([0, 0], 2)
    members = [jnp.array([[0.9, 0.1]]), jnp.array([[0.4, 0.6]]), jnp.array([[0.45, 0.55]])]
    close(ensemble(members), [[1.75 / 3, 1.25 / 3]], 1e-15)
    assert int(ensemble(members, "vote").argmax()) == 1  # where the mean says 0
    with pytest.raises(ValueError, match="rule='max' was given; there are 'mean' and 'vote'"):
        ensemble(members, "max")


# BiDAF.


def bidaf_fixture():
    f = fixture("bidaf_full_small")
    model = BiDAF(characters=12, word_features=5, character_features=3, filters=4, hidden=3)
    pair = lambda name: {
        "layer0": {
            direction: {"kernel": f[f"P_{name}_{short}_W"], "bias": f[f"P_{name}_{short}_b"]}
            for direction, short in (("forward", "fw"), ("backward", "bw"))
        }
    }
    dense = lambda k, name: {"kernel": f[f"P_hw{k}_W{name}"], "bias": f[f"P_hw{k}_b{name}"]}
    vector = lambda w, b: {"kernel": f[w], "bias": f[b]}
    params = {
        "characters": f["P_Ec"],
        "convolution": {"kernel": f["P_K"], "bias": f["P_bk"]},
        "highway": {f"layer{k}": {"transform": dense(k, "t"), "gate": dense(k, "g")} for k in range(2)},
        "context": pair("ctx"),
        "modelling1": pair("m1"),
        "modelling2": pair("m2"),
        "end": pair("end"),
        "similarity": vector("P_w", "P_wb"),
        "first": vector("P_p1_w", "P_p1_b"),
        "last": vector("P_p2_w", "P_p2_b"),
    }
    texts = Passage(f["x"], f["cx"], f["x_len"]), Passage(f["q"], f["cq"], f["q_len"])
    return f, model, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, texts), jnp.asarray(f["P_Ew"])


def test_bidaf_has_the_released_codes_numbers(x64):
    f, model, params, texts, table = bidaf_fixture()
    like = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, like)
    reading = jax.jit(model)(params, *texts, table=table)
    for name in ("X", "Q", "H", "U", "G", "M1", "M2", "p1", "p2"):
        close(getattr(reading, name), f[name])
    assert np.array_equal(best_span(reading.p1, reading.p2), f["spans"])
    close(span_loss(reading, jnp.asarray(f["y1"]), jnp.asarray(f["y2"])).mean(), f["loss"])


@pytest.mark.parametrize("characters", [262, 1000])
def test_bidaf_parameter_counts(characters):
    count = lambda **changes: parameter_count(
        jax.eval_shape(BiDAF(characters=characters, **changes).init, jax.random.key(0))
    )
    assert count() == 2_570_703 + 8 * characters
    assert count(end="printed") == 1_610_703 + 8 * characters
    assert BiDAF(262, cell="pytorch", character_features=16).hidden == 100
    if characters == 262:
        assert count(cell="pytorch", character_features=16) == 2_582_095


@pytest.mark.parametrize("end", ["released", "printed"])
def test_bidaf_does_not_read_padding(end, x64):
    _, model, params, (context, question), table = bidaf_fixture()
    model = dataclasses.replace(model, end=end)
    if end == "printed":
        params = {**params, "end": drawn(model)["end"]}
    padded_x = np.arange(6) >= np.asarray(context.lengths)[:, None]
    padded_q = np.arange(4) >= np.asarray(question.lengths)[:, None]
    other = (
        Passage(
            np.where(padded_x, 3, context.words),
            np.where(padded_x[..., None], 7, context.characters),
            context.lengths,
        ),
        Passage(
            np.where(padded_q, 5, question.words),
            np.where(padded_q[..., None], 9, question.characters),
            question.lengths,
        ),
    )
    read = jax.jit(model)
    ours, theirs = read(params, context, question, table=table), read(params, *other, table=table)
    for name in ("H", "U", "M1", "M2", "p1", "p2"):
        close(getattr(ours, name), getattr(theirs, name), 0)
    assert not np.asarray(ours.p1)[padded_x].any()
    gradient = jax.jit(jax.grad(lambda t: model(params, context, question, table=t).p2[:, 0].sum()))(table)
    only_padding = sorted({0} - set(np.asarray(context.words)[~padded_x].tolist()))
    assert not np.asarray(gradient)[only_padding].any()


def test_similarity_is_the_trilinear_form(x64):
    """The attention flow against the equation, the (T, J, 6 d) tensor made."""
    model = BiDAF(5, hidden=2)
    params = drawn(model)
    params = {**params, "similarity": {**params["similarity"], "kernel": normal(9, 12)}}
    H, U = normal(0, 1, 5, 4), normal(1, 1, 3, 4)
    both = np.concatenate(
        [
            np.broadcast_to(H[0][:, None], (5, 3, 4)),
            np.broadcast_to(U[0][None], (5, 3, 4)),
            np.asarray(H[0])[:, None] * np.asarray(U[0])[None],
        ],
        -1,
    )
    S = both @ np.asarray(params["similarity"]["kernel"])
    soft = lambda a: np.exp(a - a.max(-1, keepdims=True)) / np.exp(a - a.max(-1, keepdims=True)).sum(-1, keepdims=True)
    attended, summary = soft(S) @ np.asarray(U[0]), soft(S.max(1)) @ np.asarray(H[0])
    h = np.asarray(H[0])
    expected = np.concatenate([h, attended, h * attended, h * summary], -1)
    close(jax.jit(model.flow)(params, H, U, jnp.array([5]), jnp.array([3]))[0], expected, 1e-14)


@pytest.mark.parametrize("longest", [None, 1, 3, 20])
def test_best_span_is_that_of_all_pairs(longest):
    random = np.random.default_rng(0)
    p1, p2 = random.random((50, 9)), random.random((50, 9))
    found = np.asarray(best_span(jnp.asarray(p1), jnp.asarray(p2), longest))
    for row, (first, last) in enumerate(found):
        pairs = {
            (k, l): np.float32(p1[row, k]) * np.float32(p2[row, l])
            for k in range(9)
            for l in range(k, min(9, k + (longest or 9)))  # noqa: E741
        }
        assert (first, last) == max(pairs, key=pairs.get)
    with pytest.raises(ValueError, match="longest=0 was given; a span has at least one word"):
        best_span(jnp.ones(3), jnp.ones(3), 0)


def test_ensemble_of_spans_sums_confidences():
    sure = jnp.array([0.8, 0.2]), jnp.array([0.3, 0.7])  # (0, 1) with .56
    other = jnp.array([0.4, 0.6]), jnp.array([0.4, 0.6])  # (1, 1) with .36, twice .72
    assert ensemble_span([sure, other, other]).tolist() == [1, 1]
    assert ensemble_span([sure, other]).tolist() == [0, 1]


def test_bidaf_says_what_is_wrong():
    model = BiDAF(5, word_features=3, hidden=2)
    params = blank(model)
    words, table = jnp.ones((1, 3), int), jnp.zeros((4, 3))
    text = lambda letters, length=3: Passage(words, jnp.ones((1, 3, letters), int), jnp.array([length]))
    with pytest.raises(ValueError, match="Words of 4 characters were given to a convolution of width 5"):
        model(params, text(4), text(5), table=table)
    with pytest.raises(ValueError, match=r"Questions \[0\] of the batch have length 0"):
        model(params, text(5), text(5, 0), table=table)
    with pytest.raises(ValueError, match=r"Word vectors of shape \(4, 2\) were given; give \(words, 3\)"):
        model(params, text(5), text(5), table=table[:, :2])
    beyond = lambda word, letter: Passage(words * word, jnp.full((1, 3, 5), letter), jnp.array([3]))
    with pytest.raises(ValueError, match="The words go from 4 to 4, and there are 4 rows of word vectors"):
        model(params, beyond(4, 1), text(5), table=table)
    with pytest.raises(ValueError, match="The letters go from 5 to 5, and there are 5 in the model's alphabet"):
        model(params, text(5), beyond(1, 5), table=table)
    with pytest.raises(ValueError, match=r"A dropout of 1\.0 was given; it is a probability"):
        BiDAF(5, word_features=3, hidden=2, dropout=1.0)(params, text(5), text(5), table=table, key=jax.random.key(0))
    with pytest.raises(ValueError, match="end='other' was given; there are 'released' and 'printed'"):
        BiDAF(5, end="other")


# The hierarchical transformer.


def test_rollout_has_the_prototypes_numbers(x64):
    f = {name: jnp.asarray(value) for name, value in fixture("hier_gradattn_rollout").items()}
    stack = lambda letter: {
        f"layer{k}": {name: f[f"{letter}{k}_{name}"] for name in ("Wq", "Wk", "Wv", "Wo", "W1", "W2")} for k in range(2)
    }

    def y(probes):
        sentences, below = encode(stack("s"), f["cls_s"], f["tok"], jnp.ones((4, 5), bool), 2, probes[0])
        speech, above = encode(stack("d"), f["cls_d"], sentences[None], jnp.ones((1, 4), bool), 2, probes[1])
        return speech[0] @ f["w"], (below, above)

    zeros = [jnp.zeros((4, 2, 6, 6))] * 2, [jnp.zeros((1, 2, 5, 5))] * 2
    (value, (below, above)), gradients = jax.jit(jax.value_and_grad(y, has_aux=True))(zeros)
    close(value, f["y"])
    for k in range(2):
        close(below[k], f[f"A_s{k}"])
        close(above[k], f[f"A_d{k}"])
        close(gradients[0][k], f[f"gA_s{k}"])
        close(gradients[1][k], f[f"gA_d{k}"])
    R_speech, R_sent = jax.jit(lambda a, b: (rollout(*a)[0], rollout(*b)))((above, gradients[1]), (below, gradients[0]))
    close(R_speech, f["R_speech"])
    close(R_sent, f["R_sent"])
    close(R_speech[0, 1:], f["rel_sentence"])
    close(R_sent[:, 0, 1:], f["rel_token"])


def interviews(seed=0, sound=True):
    random = np.random.default_rng(seed)
    return Interview(
        sentences=jnp.array([3, 2]),
        tokens=jnp.asarray(random.integers(1, 9, (2, 3, 5))),
        lengths=jnp.array([[5, 2, 3], [4, 1, 0]]),
        spectrograms=jnp.asarray(random.standard_normal((2, 3, 8, 12))) if sound else None,
        frames=jnp.array([[12, 5, 8], [12, 3, 0]]) if sound else None,
    )


def small(**changes):
    options = {"rows": 9, "bands": 8, "features": 8, "heads": 2, "frames": 16, "patch": 4, "longest": 6, "sentences": 4}
    return HierarchicalTransformer(**{**options, **changes})


@pytest.mark.slow
def test_relevance_is_at_least_the_identity_and_zero_at_padding(x64):
    model, batch = small(), interviews()
    params = model.init(jax.random.key(0))
    found = model.relevance(params, batch)
    close(found.logit, model(params, batch), 1e-14)
    for R in (found.R_interview, found.R_text, found.R_sound):
        assert (np.asarray(R) >= np.eye(R.shape[-1])).all()
    assert np.asarray(found.sentences)[0].all() and not np.asarray(found.sentences)[1, 2:].any()
    assert not np.asarray(found.tokens)[0, 1, 2:].any() and not np.asarray(found.tokens)[1, 2].any()
    assert found.patches.shape == (2, 3, 2, 3)
    assert not np.asarray(found.patches)[0, 1, :, 2:].any() and not np.asarray(found.patches)[1, 2].any()
    close(found.tokens_in_interview, np.asarray(found.sentences)[..., None] * np.asarray(found.tokens), 0)
    # Nothing rests on attention where the head is zero.
    none = model.relevance({**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}, batch)
    close(none.R_interview, np.broadcast_to(np.eye(4), (2, 4, 4)), 0)
    close(none.R_text, np.broadcast_to(np.eye(6), (2, 3, 6, 6)), 0)
    # In the last layer the CLS row alone has a gradient: one layer moves that row alone.
    one = dataclasses.replace(model, layers=1)
    R = np.asarray(one.relevance(one.init(jax.random.key(1)), batch).R_interview)
    close(R[:, 1:], np.broadcast_to(np.eye(4), (2, 4, 4))[:, 1:], 0)


@pytest.mark.slow
def test_relevance_follows_sentences_where_they_have_no_positions(x64):
    model, order = small(positions=False), np.array([2, 0, 1])
    params = model.init(jax.random.key(0))
    first = jax.tree.map(lambda a: a[:1], interviews())
    moved = first._replace(
        **{name: getattr(first, name)[:, order] for name in ("tokens", "lengths", "spectrograms", "frames")}
    )
    one, other = model.relevance(params, first), model.relevance(params, moved)
    close(one.logit, other.logit, 1e-13)
    close(one.sentences[:, order], other.sentences, 1e-12)
    close(one.tokens[:, order], other.tokens, 1e-12)
    # The other way round with positions: the order matters.
    model = small()
    params = model.init(jax.random.key(0))
    assert abs(float((model(params, first) - model(params, moved))[0])) > 1e-6


def test_relevance_scales_with_the_logit_in_one_layer(x64):
    model, batch = small(layers=1), interviews()
    params, relevance = drawn(model), jax.jit(model.relevance)
    scaled = {**params, "head": jax.tree.map(lambda a: 3 * a, params["head"])}
    close(relevance(scaled, batch).sentences, 3 * np.asarray(relevance(params, batch).sentences), 1e-12)


def test_hierarchical_transformer_does_not_read_padding(x64):
    model, batch = small(), interviews()
    params, run, relevance = drawn(model), jax.jit(model), jax.jit(model.relevance)
    tokens = np.asarray(batch.tokens).copy()
    tokens[0, 1, 2:] = tokens[0, 2, 3:] = tokens[1, 0, 4:] = tokens[1, 1, 1:] = tokens[1, 2] = 8
    sound = np.asarray(batch.spectrograms).copy()
    sound[0, 1, :, 5:] = sound[0, 2, :, 8:] = sound[1, 1, :, 3:] = sound[1, 2] = np.nan
    hostile = batch._replace(tokens=jnp.asarray(tokens), spectrograms=jnp.asarray(sound))
    close(run(params, hostile), run(params, batch), 0)
    of_sound = jax.grad(lambda s, batch: model(params, batch._replace(spectrograms=s)).sum())
    by_sound = jax.jit(of_sound)(jnp.asarray(sound), batch)
    assert not np.asarray(by_sound)[np.isnan(sound)].any() and np.isfinite(np.asarray(by_sound)).all()
    found = relevance(params, hostile)
    close(found.tokens, relevance(params, batch).tokens, 0)


def test_modality_dropout_hides_one_half_of_a_sentence(x64):
    model, batch = small(modality_dropout=1.0), interviews()
    params = drawn(small())
    both = jax.jit(lambda batch: (model(params, batch, key=jax.random.key(1)), model(params, batch)))
    dropped, kept = both(batch)
    assert np.isfinite(np.asarray(dropped)).all() and (np.asarray(dropped) != np.asarray(kept)).all()


def test_a_compiled_function_may_hold_the_interviews():
    batch = interviews(sound=False)
    model = HierarchicalTransformer(rows=9, features=8, heads=2, longest=6, sentences=4)
    assert np.isfinite(jax.jit(lambda params: model(params, batch))(drawn(model))).all()


def test_hierarchical_transformer_says_what_is_wrong():
    model, batch = small(), interviews()
    params = blank(model)
    with pytest.raises(ValueError, match="spectrograms were not given to a model made with them"):
        model(params, batch._replace(spectrograms=None))
    with pytest.raises(ValueError, match="Interviews of 0 to 3 sentences were given"):
        model(params, batch._replace(sentences=jnp.array([3, 0])))
    with pytest.raises(ValueError, match=r"Sentences \[\(0, 1\)\] \(interview, sentence\) have length 0"):
        model(params, batch._replace(lengths=batch.lengths.at[0, 1].set(0)))
    with pytest.raises(ValueError, match="rows=0 and bands=0 were given: nothing to read"):
        HierarchicalTransformer()
    with pytest.raises(ValueError, match="features=10 do not divide among 4 heads"):
        HierarchicalTransformer(rows=3, features=10)
