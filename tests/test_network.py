"""Networks: matrices, mixing, drift in float32, collectives, hostile input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import network

GRAPHS = {
    "ring1": network.ring(1),
    "ring2": network.ring(2),
    "ring8": network.ring(8),
    "torus": network.torus(3, 4),
    "torus2": network.torus(2, 3),
    "torus1": network.torus(1, 5),
    "exponential": network.exponential(12),
    "complete": network.complete(7),
    "star": network.star(6),
    "erdos": network.erdos_renyi(9, 0.4, seed=1),
    "lazy": network.ring(5).lazy(),
    "matrix1": network.matrix([[1.0]]),
    "sparse2": network.matrix(network.ring(24).matrix()),
    "sparse": network.erdos_renyi(120, 0.05, seed=0),
    "sparse80": network.erdos_renyi(80, 0.05, seed=1),
}


MIX = jax.jit(lambda graph, tree, k=0: graph.mix(tree, k))


def test_a_matrix_of_few_neighbours_is_not_multiplied_out() -> None:
    """Two neighbours each, unequal numbers of them (more than are written out), and too many to pay."""
    assert GRAPHS["sparse2"].links[0].shape == (24, 2)
    for name in ("sparse", "sparse80"):
        index, weights = GRAPHS[name].links
        assert network.UNROLLED < index.shape[1] <= 15
        assert (weights == 0).any()
    assert GRAPHS["erdos"].links is None


@pytest.mark.parametrize("name", GRAPHS)
def test_mixing_is_the_matrix(name: str, x64: None) -> None:
    graph = GRAPHS[name]
    weights = graph.matrix()
    np.testing.assert_allclose(weights, weights.T, atol=1e-15)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-14)
    tree = {"a": np.random.default_rng(0).normal(size=(graph.n, 2, 3)), "b": np.arange(float(graph.n))}
    mixed, flow = jax.jit(lambda graph, tree: (graph.mix(tree), graph.flow(tree)))(graph, tree)
    for leaf in tree:
        expected = np.einsum("ij,j...->i...", weights, tree[leaf])
        np.testing.assert_allclose(mixed[leaf], expected, atol=1e-13)
        np.testing.assert_allclose(flow[leaf], tree[leaf] - expected, atol=1e-13)


@pytest.mark.parametrize("name", ["ring8", "exponential"])
def test_both_ways_of_shifting_are_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = jnp.asarray(np.random.default_rng(0).normal(size=(GRAPHS[name].n, 3)), jnp.float32)
    found = []
    for devices in (1, 4):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        found.append(np.asarray(GRAPHS[name].mix(s)))
    np.testing.assert_array_equal(*found)


def test_known_spectra() -> None:
    assert network.ring(8).spectral_gap == pytest.approx(1 - (1 + 2 * np.cos(np.pi / 4)) / 3)
    assert network.ring(8).smallest_eigenvalue == pytest.approx(-1 / 3)
    assert network.complete(5).spectral_gap == pytest.approx(1)
    assert network.star(6).spectral_gap == pytest.approx(1 / 6)
    assert network.ring(1).spectral_gap == 1
    gaps = [network.ring(64).spectral_gap, network.torus(8, 8).spectral_gap, network.exponential(64).spectral_gap]
    assert gaps == sorted(gaps)
    assert "spectral gap 0.195" in repr(network.ring(8))


def test_metropolis_weights() -> None:
    path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    np.testing.assert_allclose(network.metropolis(path), [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]])


@pytest.mark.parametrize(
    "name",
    [
        *("ring8", "torus", "exponential", "complete", "star", "erdos", "sparse80"),
        pytest.param("sparse", marks=pytest.mark.slow),
    ],
)
def test_float32_does_not_drift_over_100_000_mixings(name: str) -> None:
    graph = GRAPHS[name]
    start = jnp.asarray(np.random.default_rng(0).normal(1.0, 1.0, size=(graph.n, 5)), jnp.float32)
    end = jax.jit(lambda graph, s: jax.lax.fori_loop(0, 100_000, lambda k, s: graph.mix(s, k), s))(graph, start)
    assert end.dtype == jnp.float32
    # The mean is kept to a few roundings, and an agreement is a fixed point bit for bit.
    np.testing.assert_allclose(
        np.asarray(end, np.float64).mean(axis=0), np.asarray(start, np.float64).mean(axis=0), atol=1e-6
    )
    assert float(jax.jit(network.consensus_error)(end)) < 1e-6
    agreed = np.broadcast_to(start[:1], start.shape)
    np.testing.assert_array_equal(MIX(graph, agreed), agreed)


def test_time_varying(x64: None) -> None:
    graph = network.time_varying([network.ring(4), network.star(4)])
    s = np.random.default_rng(0).normal(size=(4, 2))
    step = jax.jit(lambda graph, s, k: graph.mix(s, k))
    np.testing.assert_allclose(step(graph, s, 2), network.ring(4).matrix() @ s, atol=1e-14)
    np.testing.assert_allclose(step(graph, s, 3), network.star(4).matrix() @ s, atol=1e-14)
    assert 0 < graph.spectral_gap <= 1


def test_one_peer_averages_exactly(x64: None) -> None:
    graph = network.one_peer(8)
    s = np.random.default_rng(0).normal(size=(8, 2))
    end = s
    for k in range(3):
        mixed = np.asarray(MIX(graph, end, k))
        np.testing.assert_allclose(mixed, graph.matrix(k) @ end, atol=1e-14)
        end = mixed
    np.testing.assert_allclose(end, np.broadcast_to(s.mean(axis=0), s.shape), atol=1e-14)
    assert graph.neighbours == 1


def test_networks_are_pytrees() -> None:
    s = np.arange(8, dtype=np.float32)
    np.testing.assert_allclose(MIX(network.ring(8), s), network.ring(8).mix(s), rtol=1e-6)
    assert jax.jit(jax.grad(lambda s: (network.ring(8).mix(s) ** 2).sum()))(s).shape == (8,)


def _bad(change: dict[tuple[int, int], float]) -> np.ndarray:
    weights = network.ring(4).matrix()
    for where, value in change.items():
        weights[where] = value
    return weights


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: network.matrix(_bad({(0, 1): 0.5})), r"not symmetric: w\[0, 1\] = 0.5"),
        (lambda: network.matrix(_bad({(2, 2): 0.5})), "not doubly stochastic: row 2 sums to 1.16667"),
        (
            lambda: network.matrix(_bad({(0, 1): -0.1, (1, 0): -0.1, (0, 0): 0.766666, (1, 1): 0.766666})),
            "not negative",
        ),
        (lambda: network.matrix(np.eye(3)), "disconnected: agent 0 reaches 1 of 3 agents, not 1, 2"),
        (lambda: network.matrix([[0.0, 1.0], [1.0, 0.0]]), "eigenvalue -1"),
        (lambda: network.matrix(np.ones((2, 3))), "is square"),
        (lambda: network.matrix(_bad({(1, 2): np.nan})), r"\[1, 2\] is nan"),
        (lambda: network.from_adjacency(np.kron(np.eye(2), np.ones((2, 2)))), "disconnected: agent 0 reaches 2 of 4"),
        (lambda: network.metropolis([[0, 1], [0, 0]]), "directed: agent 0 lists agent 1"),
        (lambda: network.erdos_renyi(40, 0.001), "no connected graph"),
        (lambda: network.erdos_renyi(4, 1.5), "probability"),
        (lambda: network.ring(0), "positive integer"),
        (lambda: network.one_peer(6), "power of two"),
        (lambda: network.time_varying([network.ring(4), network.ring(5)]), "have 4, 5 agents"),
        (lambda: network.time_varying([]), "empty"),
        (lambda: network.time_varying([network.one_peer(4)]), "changes with the step itself"),
        (lambda: network.ring(4).mix(jnp.ones((5, 2))), r"its 4 agents; the leaf given has the shape \[5, 2\]"),
    ],
)
def test_errors_by_name(make, words: str) -> None:
    with pytest.raises(network.NetworkError, match=words):
        make()


def test_a_float32_matrix_is_taken_and_mended() -> None:
    graph = network.matrix(np.asarray(network.ring(3).matrix(), np.float32))
    np.testing.assert_allclose(graph.matrix().sum(axis=1), 1, atol=1e-15)


@pytest.mark.parametrize("make", [lambda: network.ring(4), lambda: network.star(4), lambda: network.complete(4)])
def test_integers_are_averaged_as_numbers(make):
    net, given = make(), np.asarray([1, 0, 0, 0])
    np.testing.assert_allclose(net.mix(given), net.mix(given.astype(float)), rtol=1e-6)


def test_matchings_agree_in_turn_where_their_union_is_connected():
    """Two matchings of a path of four: neither is connected, and their product is a contraction on disagreements."""
    pairs = [[(0, 1), (2, 3)], [(1, 2)]]
    weights = []
    for links in pairs:
        adjacency = np.zeros((4, 4), bool)
        for i, j in links:
            adjacency[i, j] = adjacency[j, i] = True
        weights.append(network.metropolis(adjacency))
    with pytest.raises(network.NetworkError, match="disconnected"):
        network.matrix(weights[0])
    members = [network.matrix(w, "a matching", connected=False) for w in weights]
    net = network.time_varying(members)
    values = jnp.asarray([1.0, 0.0, 0.0, 3.0])
    for step in range(80):
        values = net.mix(values, step)
    np.testing.assert_allclose(values, 1.0, atol=1e-5)
    with pytest.raises(network.NetworkError, match="the union of time_varying's networks is disconnected"):
        network.time_varying(members[:1])
    for step in range(2):
        np.testing.assert_allclose(net.lazy().matrix(step), (np.eye(4) + weights[step]) / 2)
