"""Sources of batches: every one is a pure function of the run's key and the step's index."""

from __future__ import annotations

import collections
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Problem, ProblemError, data, lower, solve, solvers, streaming
from bilevel.data import as_step_key
from bilevel.keys import permute
from bilevel.streaming import Prefetched


def keys(n, seed=0):
    return [as_step_key(seed, k) for k in range(n)]


PERMUTED = jax.jit(lambda n, seed: permute(np.arange(300), n, seed))  # one programme for all lengths up to 300


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_permute_is_a_permutation_for_any_length(n, seed):
    assert sorted(np.asarray(PERMUTED(np.uint32(n), np.uint32(seed)))[:n].tolist()) == list(range(n))


def test_permute_with_a_given_length_is_the_same_permutation():
    for n in (1, 2, 7, 100):
        image = np.asarray(permute(np.arange(n), n, np.uint32(5)))
        assert sorted(image.tolist()) == list(range(n))
        np.testing.assert_array_equal(image, PERMUTED(np.uint32(n), np.uint32(5))[:n])


def test_permute_is_uniform_in_places_and_in_pairs():
    n, seeds = 30, 3000
    images = np.asarray(jax.vmap(lambda s: permute(jnp.arange(n), n, s))(jnp.arange(seeds, dtype=jnp.uint32)))
    counts = np.stack([np.bincount(images[:, j], minlength=n) for j in range(n)])
    expected = seeds / n
    chi2 = ((counts - expected) ** 2 / expected).sum() / (n - 1) ** 2  # chi squared over its degrees of freedom
    assert 0.8 < chi2 < 1.2
    pairs = collections.Counter(zip(images[:, 0].tolist(), images[:, 1].tolist(), strict=True))
    variance = np.var([pairs.get((i, j), 0) for i in range(n) for j in range(n) if i != j])
    assert variance == pytest.approx(seeds / (n * (n - 1)), rel=0.25)


def test_an_epoch_without_replacement_sees_each_sample_once_and_epochs_differ():
    source = data.Minibatches(np.arange(12), 4)
    draw = jax.jit(source.draw)
    epochs = [np.concatenate([draw(k) for k in keys(9)[3 * e : 3 * e + 3]]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_leftover_samples_differ_between_epochs():
    draw = jax.jit(data.Minibatches(np.arange(10), 4).draw)
    batches = [np.asarray(draw(k)).tolist() for k in keys(40)]
    seen = {tuple(sorted(set(range(10)) - {*batches[2 * e], *batches[2 * e + 1]})) for e in range(20)}
    assert len(seen) > 5


def test_identical_keys_give_identical_batches_and_other_keys_and_streams_do_not():
    source = data.Minibatches(np.arange(1000), 10)
    a, b = source.draw(as_step_key(3, 7)), source.draw(as_step_key(3, 7))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, source.draw(as_step_key(4, 7)))
    assert not np.array_equal(a, source.draw(as_step_key(3, 8)))
    assert not np.array_equal(a, source.draw(as_step_key(3, 7).fold_in(1)))


def test_the_two_levels_draw_independently():
    problem = Problem(
        upper=lambda x, y, b: jnp.sum(b), lower=lambda x, y, b: jnp.sum(b),
        upper_data=data.Minibatches(np.arange(1000), 10), lower_data=data.Minibatches(np.arange(1000), 10),
    )  # fmt: skip
    assert not np.array_equal(problem.draw_upper(0).batch, problem.draw_lower(0).batch)


def test_inner_steps_draw_fresh_batches_of_one_epoch():
    level = Problem(
        upper=lambda x, y: 0.0, lower=lambda x, y, b: jnp.sum(b), lower_data=data.Minibatches(np.arange(12), 3)
    ).draw_lower(as_step_key(0, 0))
    batches = np.concatenate([level.redraw(i, 4).batch for i in range(4)])
    assert sorted(batches.tolist()) == list(range(12))


def test_blocks_are_contiguous_numbered_and_complete():
    source = data.Minibatches(np.arange(12), 4, blocks=True)
    numbers = [int(source.numbered(k)[0]) for k in keys(3)]
    assert sorted(numbers) == [0, 1, 2]
    for number, key in zip(numbers, keys(3), strict=True):
        np.testing.assert_array_equal(source.draw(key), np.arange(4 * number, 4 * number + 4))


def test_with_replacement_is_uniform():
    source = data.Minibatches(np.arange(8), 8, replace=True)
    draw = jax.jit(source.draw)
    drawn = np.concatenate([draw(k) for k in keys(300)])
    counts = np.bincount(drawn, minlength=8)
    assert ((counts - 300) ** 2 / 300).sum() < 30  # chi squared with 7 degrees of freedom


def test_sampler_gets_a_fresh_key_and_its_arrays():
    source = data.Sampler(lambda key, a: (a["scale"] * jax.random.normal(key, (2,)), key), {"scale": jnp.float32(3.0)})
    a, b = source.draw(as_step_key(0, 0)), source.draw(as_step_key(0, 1))
    assert not np.array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[0], 3.0 * jax.random.normal(a[1], (2,)))


def test_clients_keep_to_their_samples():
    clients = data.Clients([{"v": np.arange(5)}, {"v": np.arange(100, 103)}, {"v": np.arange(200, 207)}])
    assert len(clients) == 3
    assert clients.count == 15
    draw = jax.jit(clients.draw_client, static_argnums=2)
    for c, (low, high) in enumerate([(0, 5), (100, 103), (200, 207)]):
        drawn = np.concatenate([draw(k, np.int32(c), 2)["v"] for k in keys(12)])
        assert set(drawn.tolist()) == set(range(low, high))
    epoch = np.concatenate([draw(k, np.int32(2), 1)["v"] for k in keys(7)])
    assert sorted(epoch.tolist()) == list(range(200, 207))
    np.testing.assert_array_equal(np.sort(jax.jit(clients.draw)(as_step_key(0))["v"]), np.sort(clients.arrays["v"]))


def read(reader, steps, at_once=3):
    """The next items of `steps` steps, in the portions that the reader hands out."""
    found = []
    while steps:
        segment, first, count = reader.ready(min(steps, at_once))
        draws = jax.tree.leaves(segment)[0].shape[0] // reader.steps
        found.append(jax.tree.map(lambda a: np.array(a[first * draws : (first + count) * draws]), segment))
        reader.consume(count)
        steps -= count
    return np.concatenate(found)


def test_stream_skips_and_repeats():
    stream = data.Stream([np.asarray([i]) for i in range(3)])
    items = stream.items(4)  # 0 1 2 | 0 [1] 2 | 0
    assert [int(next(items)[0]) for _ in range(3)] == [1, 2, 0]
    reader = Prefetched(stream.items(1), stream.draws)
    np.testing.assert_array_equal(read(reader, 4)[:, 0], [1, 2, 0, 1])
    reader.close()


@pytest.mark.parametrize("patience", [0.0, 10.0])
@pytest.mark.parametrize("draws", [1, 3])
def test_a_stream_keeps_its_order_whoever_is_the_slower(monkeypatch, patience, draws):
    # Seven steps of items of 16 bytes, and several segments reused.
    monkeypatch.setattr(streaming, "_SEGMENT_BYTES", 7 * draws * 16)
    monkeypatch.setattr(streaming, "_PATIENCE", patience)
    slow = np.random.default_rng(0).random(200 * draws) < 0.05

    def items(start):
        for i in range(start, 10**6):
            if i < len(slow) and slow[i]:
                time.sleep(0.002)
            yield np.full(4, i, np.float32)

    reader = Prefetched(data.Stream(items, draws).items(), draws)
    found = read(reader, 200, at_once=4)
    reader.close()
    assert reader.steps == 7
    np.testing.assert_array_equal(found, np.repeat(np.arange(200 * draws), 4).reshape(-1, 4))


def test_a_slow_stream_hands_out_what_there_is():
    gate = threading.Event()

    def items(start):
        for i in range(start, 10):
            if i == 3:
                gate.wait()
            yield np.full(1, i)

    reader = Prefetched(data.Stream(items).items())
    assert read(reader, 3).ravel().tolist() == [0, 1, 2]  # the fourth may take for ever
    gate.set()
    assert read(reader, 7).ravel().tolist() == [3, 4, 5, 6, 7, 8, 9]
    reader.close()


def test_stream_raises_the_sources_error_where_it_is_consumed():
    def broken(start):
        yield from (np.full(1, i) for i in range(2))
        raise OSError("disk gone")

    reader = Prefetched(data.Stream(broken).items())
    assert read(reader, 2).ravel().tolist() == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        reader.ready(1)
    reader.close()


def test_a_stream_of_unequal_items_is_named():
    reader = Prefetched(data.Stream([np.zeros(4), np.zeros(3)]).items())
    read(reader, 1)
    with pytest.raises(ValueError, match=r"Item 1 of the stream .*\(3,\).*the first had .*\(4,\).*drop or pad"):
        reader.ready(1)
    reader.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: data.Minibatches(np.zeros((5, 2)), 6), r"size=6\) exceeds the 5 samples: lower the size"),
        (lambda: data.Minibatches(np.zeros((5, 2)), 0), "positive integer"),
        (
            lambda: data.Minibatches((np.zeros(5), np.zeros(4)), 2),
            r"disagree on the number of samples: .*\[0\] has 5, .*\[1\] has 4",
        ),
        (lambda: data.Minibatches(np.zeros((0, 2)), 1), "zero samples"),
        (lambda: data.Minibatches(np.zeros(4), 2, replace=True, blocks=True), "choose one"),
        (lambda: data.Minibatches({}, 2), "holds no arrays"),
        (lambda: data.Clients([]), "at least one client"),
        (lambda: data.Clients([{"a": np.zeros(3)}, {"b": np.zeros(3)}]), "Client 1's data have the structure"),
        (lambda: data.Clients([np.zeros(3), np.zeros(0)]), "client 1's data has zero samples"),
        (lambda: data.Clients([np.zeros(3), np.zeros(5)], size=4), r"smallest client has 3 samples"),
        (lambda: data.Stream([], draws=0), "at least one item"),
        (lambda: next(data.Stream([]).items()), "The stream is empty"),
        (lambda: next(data.Stream(lambda start: iter(())).items()), "The stream is empty"),
    ],
)
def test_bad_sources_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_spent_generator_is_named():
    items = data.Stream(np.zeros(1) for _ in range(2)).items()
    next(items), next(items)
    with pytest.raises(ValueError, match="cannot be iterated again"):
        next(items)


# ---------------------------------------------------------------- one draw for both levels

DRAWN = data.Sampler(lambda key, arrays: jax.random.normal(key, (3,)))


@pytest.mark.parametrize(
    "source",
    [DRAWN, data.Minibatches(np.arange(40.0), 3), data.Keyed(DRAWN), data.Agents(np.arange(40.0).reshape(4, 10), 3)],
    ids=repr,
)
def test_a_shared_draw_is_one_in_both_levels_and_in_all_lower_steps(source):
    shared = data.Shared(source)
    problem = Problem(lambda x, y, b: 0.0, lambda x, y, b: 0.0, upper_data=shared, lower_data=shared)
    same = lambda a, b: all(
        np.array_equal(*map(np.asarray, map(_plain, pair)))
        for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    seen = []
    for k in range(4):
        upper, lower = problem.levels(as_step_key(5, k))
        assert same(upper.batch, lower.batch)
        assert same(lower.batch, lower.redraw(2, 7).batch) and same(lower.batch, lower.stream(3).batch)
        seen.append(upper.batch)
    assert not any(same(a, b) for a, b in zip(seen, seen[1:], strict=False))


def _plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_a_shared_draw_in_a_whole_run():
    """The lower level fits the draw, the upper one measures the fit on its own: zero where both are one."""
    shared = data.Shared(DRAWN)
    upper, lower_loss = lambda x, y, b: jnp.sum((y - b) ** 2) + x**2, lambda x, y, b: jnp.sum((y - b) ** 2)
    solver = solvers.AID(lower.GradientDescent(0.5, steps=3), 0.1)
    for source, most in ((shared, 1e-9), (data.Sampler(DRAWN.fn), None)):
        other = source if most else data.Sampler(DRAWN.fn)
        problem = Problem(upper, lower_loss, upper_data=source, lower_data=other)
        found = solve(problem, jnp.zeros(()), jnp.zeros(3), solver, steps=20, progress=False)
        loss = found.history["upper_loss"]
        assert loss.max() < most if most else loss.mean() > 1


@pytest.mark.parametrize(
    "make", [lambda: DRAWN, lambda: data.Minibatches(np.arange(9.0), 3), lambda: data.Keyed(DRAWN)]
)
def test_one_random_source_in_both_levels_is_warned_of(make):
    source = make()
    loss = lambda x, y, b: 0.0
    with pytest.warns(UserWarning, match=r"one object, .* each level draws from it by itself.*data\.Shared\(\.\.\.\)"):
        Problem(loss, loss, upper_data=source, lower_data=source)
    with pytest.warns(UserWarning, match="one object"):
        Problem(loss, loss, upper_data=data.Keyed(DRAWN), lower_data=DRAWN)
    Problem(loss, loss, upper_data=make(), lower_data=np.ones(3))  # no warning, which would be an error here
    Problem(loss, loss, *[data.Shared(source)] * 2)
    Problem(loss, loss, *[np.ones(3)] * 2)  # the same samples in full are the same


def test_what_cannot_be_shared_is_named():
    for wrong in (data.Stream([1]), None, data.Shared(DRAWN)):
        with pytest.raises(TypeError, match="Shared wraps a source that is drawn from in the compiled loop, not"):
            data.Shared(wrong)


@pytest.mark.parametrize("source", [data.Agents, data.Clients])
def test_keyed_gives_each_party_a_key_of_its_own(source):
    """The mean of m parties' noise is of size 1 / sqrt(m): with one key for all of them it was of size one."""
    arrays = np.zeros((64, 4)) if source is data.Agents else [np.zeros(4)] * 64
    keyed = data.Keyed(source(arrays, 2))
    draws = jax.vmap(lambda key: jax.random.normal(key.random))
    means = [float(draws(keyed.draw_each(as_step_key(0, t))[1]).mean()) for t in range(40)]
    assert 0.5 / 8 < np.sqrt(np.mean(np.square(means))) < 1.5 / 8
    everyone, some = keyed.draw_each(as_step_key(0))[1], keyed.draw_each(as_step_key(0), jnp.asarray([5, 2]))[1]
    np.testing.assert_array_equal(draws(some), draws(everyone)[jnp.asarray([5, 2])])  # whoever else takes part


@pytest.mark.parametrize("make", [lambda size: data.Agents(np.zeros((2, 4)), size),
                                  lambda size: data.Clients([np.zeros(4)] * 2, size),
                                  lambda size: data.Minibatches(np.zeros(4), size)])  # fmt: skip
@pytest.mark.parametrize("size", [2.5, True, "3", 0.0])
def test_batch_sizes_are_integers(make, size):
    with pytest.raises(ProblemError, match="the batch size is a positive integer"):
        make(size)


@pytest.mark.parametrize("draws", [1.5, "2", True, 0])
def test_items_per_step_are_counted(draws):
    with pytest.raises(ValueError, match=r"the number of items per step is a positive integer: at least one item"):
        data.Stream([np.zeros(1)], draws=draws)


def test_a_stream_with_fewer_items_than_lower_steps_says_so():
    items = [np.asarray([float(i)]) for i in range(12)]
    upper, below = lambda x, y: 0.5 * (y - x) ** 2, lambda x, y, batch: 0.5 * (y - batch[0]) ** 2 + 0 * x
    given = lambda stream: solve(
        Problem(upper, below, None, stream), jnp.asarray(0.0), jnp.asarray(0.0),
        solvers.AID(lower.GradientDescent(1.0, 3), 0.1), steps=2,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"takes 3 steps .* Stream\(draws=1\) has 1 .* Stream\(\.\.\., draws=3\)"):
        assert float(given(data.Stream(items)).y) == 1  # item 1 three times
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(given(data.Stream(items, draws=3)).y) == 5
