"""Who talks to whom: graphs of agents, and averaging over neighbours.

A network of n agents has a mixing matrix W: symmetric, rows that sum to one, w_ij > 0 only between neighbours. Its
eigenvalues are 1 = l_1 > l_2 >= ... >= l_n > -1; `1 - max(|l_2|, |l_n|)` is the spectral gap, the share of a
disagreement that one mixing removes at least.

All agents' copies of a variable stand along a leading axis of n. Everything is computed from the *flow*

    flow(s)_i = sum_j w_ij (s_i - s_j) = ((I - W) s)_i,          mix(s) = s - flow(s) = W s.

Differences are exact zeros at consensus and antisymmetric along each edge, so that neither the mean nor a consensus
drifts in float32, however often it is mixed; a product with W in float32 drifts, because 3 * float32(1/3) is not one.
Ring, torus and exponential graphs are `jnp.roll`s: along an axis that is sharded over devices they compile to
collective permutes.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel._module import hyperparameters

PyTree = Any

__all__ = [
    "Network",
    "NetworkError",
    "complete",
    "consensus_error",
    "erdos_renyi",
    "exponential",
    "from_adjacency",
    "matrix",
    "metropolis",
    "one_peer",
    "ring",
    "star",
    "time_varying",
    "torus",
]

logger = logging.getLogger("bilevel")

UNROLLED = 8  # neighbours up to which the sum over them is written out
_TOLERANCE = 1e-6  # of the checks of a matrix that may have been made in float32


class NetworkError(ValueError):
    """A graph or a mixing matrix cannot be used; the message says which entry, and what to do."""


def consensus_error(tree: PyTree) -> jax.Array:
    """sqrt(mean_i |s_i - mean s|^2) of copies along a leading axis: 0 where all agents agree."""

    def squares(leaf: jax.Array) -> jax.Array:
        deviation = leaf - _mean(leaf)
        return jnp.sum(deviation * deviation) / leaf.shape[0]

    return jnp.sqrt(optax.tree.sum(jax.tree.map(squares, tree)))


def _mean(leaf: jax.Array) -> jax.Array:
    """The mean over agents, with a leading axis of one; exact where all agents agree."""
    return leaf[:1] + jnp.mean(leaf - leaf[:1], axis=0, keepdims=True)


class Network:
    """What all networks share. Made by `ring(n)`, `torus(rows, cols)`, ..., `matrix(W)`; a pytree.

    `mix(tree)` is W applied along the leading axis of every leaf, `flow(tree)` is I - W. `step` is the outer step,
    which only `time_varying` networks look at.
    """

    n: int
    name: str

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        raise NotImplementedError

    def matrix(self, step: int = 0) -> np.ndarray:
        """W as a float64 array (n, n)."""
        raise NotImplementedError

    def flow(self, tree: PyTree, step: Any = 0) -> PyTree:
        """(I - W) along the leading axis of every leaf."""
        self._check(tree)
        return jax.tree.map(lambda leaf: self._flow(leaf, step), tree)

    def mix(self, tree: PyTree, step: Any = 0) -> PyTree:
        """W along the leading axis of every leaf: each agent's average over itself and its neighbours."""
        self._check(tree)
        return jax.tree.map(lambda leaf: leaf - self._flow(leaf, step), tree)

    def _check(self, tree: PyTree) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if np.ndim(leaf) == 0 or np.shape(leaf)[0] != self.n:
                raise NetworkError(
                    f"{self.name} mixes arrays with a leading axis of its {self.n} agents; the leaf "
                    f"{jax.tree_util.keystr(path) or 'given'} has the shape {list(np.shape(leaf))}."
                )

    @property
    def varies(self) -> bool:
        """Whether the graph changes from step to step."""
        return False

    def eigenvalues(self) -> np.ndarray:
        """The eigenvalues of W, ascending."""
        return np.linalg.eigvalsh(self.matrix())

    @property
    def smallest_eigenvalue(self) -> float:
        """l_n, which limits the step of combine-then-adapt forms and of EXTRA."""
        return float(self.eigenvalues()[0])

    @property
    def spectral_gap(self) -> float:
        """1 - max(|l_2|, |l_n|): how fast a disagreement shrinks. 1 for the complete graph and for a single agent."""
        if self.n == 1:
            return 1.0
        values = self.eigenvalues()
        return float(1 - max(abs(values[0]), abs(values[-2])))

    @property
    def neighbours(self) -> int:
        """The most neighbours that an agent has: messages sent per mixing."""
        off = self.matrix() - np.diag(np.diag(self.matrix()))
        return int((np.abs(off) > 0).sum(axis=1).max())

    def lazy(self) -> Network:
        """The network with (I + W) / 2: no negative eigenvalue, half the speed."""
        return matrix((np.eye(self.n) + self.matrix()) / 2, name=f"lazy {self.name}")

    def __repr__(self) -> str:
        try:
            return f"{self.name}: {self.n} agents, spectral gap {self.spectral_gap:.4g}"
        except jax.errors.TracerArrayConversionError:
            return f"{self.name}: {self.n} agents"


@hyperparameters
class _Circulant(Network):
    """Agent i talks to i + s for each s in `shifts` (which holds -s with s), all with one weight."""

    n: int
    name: str
    shifts: tuple[int, ...]
    weight: float

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        # On a single device slices of the doubled array fuse, six times as fast as rolls on a CPU; of a sharded axis
        # rolls alone become collective permutes. The sums are the same, bit for bit.
        doubled = jnp.concatenate([leaf, leaf]) if jax.device_count() == 1 else None
        total = jnp.zeros_like(leaf)
        for shift in self.shifts:
            neighbour = jnp.roll(leaf, -shift, axis=0) if doubled is None else doubled[shift : shift + self.n]
            total = total + (leaf - neighbour)
        return (total * self.weight).astype(leaf.dtype)

    def matrix(self, step: int = 0) -> np.ndarray:
        """W as a float64 array (n, n)."""
        weights = np.zeros((self.n, self.n))
        for shift in self.shifts:
            weights[np.arange(self.n), (np.arange(self.n) + shift) % self.n] += float(self.weight)
        return weights + np.diag(1 - weights.sum(axis=1))

    __repr__ = Network.__repr__


@hyperparameters
class _Torus(Network):
    """A grid of rows x cols agents, row by row along the axis, closed in both directions.

    Steps within a row are rolls of the whole axis, mended where they leave the row: no reshape of a sharded axis.
    """

    n: int
    name: str
    rows: int
    cols: int
    weight: float

    def _shifts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        def distinct(length: int) -> tuple[int, ...]:
            return () if length == 1 else (1,) if length == 2 else (1, -1)

        return distinct(self.rows), distinct(self.cols)

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        down, right = self._shifts()
        total = jnp.zeros_like(leaf)
        for shift in down:
            total = total + (leaf - jnp.roll(leaf, -shift * self.cols, axis=0))
        column = (jnp.arange(self.n) % self.cols).reshape(-1, *[1] * (leaf.ndim - 1))
        for shift in right:
            edge = self.cols - 1 if shift == 1 else 0
            neighbour = jnp.where(
                column == edge, jnp.roll(leaf, shift * (self.cols - 1), axis=0), jnp.roll(leaf, -shift, axis=0)
            )
            total = total + (leaf - neighbour)
        return (total * self.weight).astype(leaf.dtype)

    def matrix(self, step: int = 0) -> np.ndarray:
        """W as a float64 array (n, n)."""
        down, right = self._shifts()
        grid = np.arange(self.n).reshape(self.rows, self.cols)
        weights = np.zeros((self.n, self.n))
        for axis, shifts in ((0, down), (1, right)):
            for shift in shifts:
                weights[grid.ravel(), np.roll(grid, -shift, axis=axis).ravel()] += float(self.weight)
        return weights + np.diag(1 - weights.sum(axis=1))

    __repr__ = Network.__repr__


@hyperparameters
class _Complete(Network):
    """All agents average with all: one all-reduce."""

    n: int
    name: str

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        return leaf - _mean(leaf)

    def matrix(self, step: int = 0) -> np.ndarray:
        """W as a float64 array (n, n)."""
        return np.full((self.n, self.n), 1 / self.n)

    __repr__ = Network.__repr__


@hyperparameters
class _Matrix(Network):
    """Any mixing matrix: an all-gather where the axis is sharded.

    Where every agent has few neighbours, `links` holds their (n, degree) indices and weights, filled up with
    weights of zero, and their differences are summed: n degree products per number instead of n^2.
    """

    n: int
    name: str
    weights: np.ndarray
    links: tuple[np.ndarray, np.ndarray] | None = None

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        if self.links is not None:
            leaf, index, weights = map(jnp.asarray, (leaf, *self.links))
            weights = weights.astype(leaf.dtype).reshape(*weights.shape, *[1] * (leaf.ndim - 1))

            def add(j: Any, total: jax.Array) -> jax.Array:
                return total + weights[:, j] * (leaf - leaf[index[:, j]])

            degree = index.shape[1]
            return jax.lax.fori_loop(0, degree, add, jnp.zeros_like(leaf), unroll=degree <= UNROLLED or None)
        # Differences to agent 0 vanish at consensus, and I - W does not see what is subtracted from all.
        shifted = (leaf - leaf[:1]).reshape(self.n, -1)
        laplacian = jnp.asarray(_laplacian(self.weights), leaf.dtype)
        return jnp.matmul(laplacian, shifted, precision="highest").reshape(leaf.shape)

    def matrix(self, step: int = 0) -> np.ndarray:
        """W as a float64 array (n, n)."""
        return np.asarray(self.weights, np.float64)

    __repr__ = Network.__repr__


def _links(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Each agent's neighbours and their weights, (n, largest degree).

    None where a matrix product is the cheaper way.
    """
    others = weights - np.diag(np.diag(weights))
    degree = int((others != 0).sum(axis=1).max())
    if degree == 0 or 8 * degree > len(weights):
        return None
    index = np.argsort(others == 0, axis=1, kind="stable")[:, :degree]  # the neighbours first, then any others
    return index.astype(np.int32), np.take_along_axis(others, index, axis=1)


def _laplacian(weights: Any) -> Any:
    module = np if isinstance(weights, np.ndarray) else jnp
    return module.eye(weights.shape[0]) - weights


@hyperparameters
class _OnePeer(Network):
    """At step k agent i averages with agent i XOR 2^(k mod log2 n): one message, exact consensus after log2 n steps."""

    n: int
    name: str

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        index = jnp.arange(self.n).reshape(-1, *[1] * (leaf.ndim - 1))

        def exchange(distance: int, leaf: jax.Array) -> jax.Array:
            upper = (index // distance) % 2 == 1
            peer = jnp.where(upper, jnp.roll(leaf, distance, axis=0), jnp.roll(leaf, -distance, axis=0))
            return (leaf - peer) / 2

        rounds = self.n.bit_length() - 1
        which = jnp.asarray(step, jnp.uint32) % jnp.uint32(rounds)
        return jax.lax.switch(which.astype(jnp.int32), [functools.partial(exchange, 2**j) for j in range(rounds)], leaf)

    def matrix(self, step: int = 0) -> np.ndarray:
        """W of that step as a float64 array (n, n)."""
        peers = np.arange(self.n) ^ 2 ** (step % (self.n.bit_length() - 1))
        return (np.eye(self.n) + np.eye(self.n)[peers]) / 2

    @property
    def varies(self) -> bool:
        """It does."""
        return True

    def eigenvalues(self) -> np.ndarray:
        """The eigenvalues of the product over one cycle, ascending: the exact average."""
        return np.concatenate([np.zeros(self.n - 1), [1.0]])

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest of any step's W."""
        return 0.0

    __repr__ = Network.__repr__


@hyperparameters
class _TimeVarying(Network):
    """Step k mixes with network k mod their number."""

    n: int
    name: str
    networks: Any

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        which = jnp.asarray(step, jnp.uint32) % jnp.uint32(len(self.networks))
        return jax.lax.switch(
            which.astype(jnp.int32), [lambda leaf, w=w: w._flow(leaf, 0) for w in self.networks], leaf
        )

    def matrix(self, step: int = 0) -> np.ndarray:
        """W of that step as a float64 array (n, n)."""
        return self.networks[step % len(self.networks)].matrix()

    @property
    def varies(self) -> bool:
        """It does."""
        return True

    def eigenvalues(self) -> np.ndarray:
        """The singular values of the product over one cycle, to the power of one over its length, ascending."""
        product = np.linalg.multi_dot([w.matrix() for w in self.networks] + [np.eye(self.n)])
        return np.sort(np.linalg.svd(product, compute_uv=False)) ** (1 / len(self.networks))

    @property
    def smallest_eigenvalue(self) -> float:
        """The smallest of any step's W."""
        return min(w.smallest_eigenvalue for w in self.networks)

    __repr__ = Network.__repr__


# ---------------------------------------------------------------- the named graphs


def ring(n: int) -> Network:
    """Agents on a circle, each averaging with its two neighbours: weights 1/3, spectral gap O(1/n^2)."""
    _positive("ring", n=n)
    return _circulant(n, f"ring({n})", {1 % n, -1 % n} - {0})


def torus(rows: int, cols: int) -> Network:
    """A grid closed in both directions, each agent averaging with four neighbours: weights 1/5, gap O(1/n)."""
    _positive("torus", rows=rows, cols=cols)
    degree = sum(0 if k == 1 else 1 if k == 2 else 2 for k in (rows, cols))
    return _Torus(rows * cols, f"torus({rows}, {cols})", rows, cols, 1 / (degree + 1))


def exponential(n: int) -> Network:
    """The static exponential graph, made symmetric: agent i averages with i +- 1, 2, 4, ... (mod n); gap O(1/log n).

    Reference: Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep Training", NeurIPS 2021
    (directed there).
    """
    _positive("exponential", n=n)
    powers = [2**j for j in range(max(n - 1, 0).bit_length()) if 2**j < n]
    return _circulant(n, f"exponential({n})", {s * p % n for p in powers for s in (1, -1)} - {0})


def complete(n: int) -> Network:
    """Everybody averages with everybody: W = 1 1' / n, one all-reduce, spectral gap 1."""
    _positive("complete", n=n)
    return _Complete(n, f"complete({n})")


def star(n: int) -> Network:
    """Agent 0 in the middle, Metropolis weights 1/n on the spokes: gap 1/n."""
    _positive("star", n=n)
    adjacency = np.zeros((n, n), bool)
    adjacency[0, 1:] = adjacency[1:, 0] = True
    return from_adjacency(adjacency, name=f"star({n})")


def erdos_renyi(n: int, probability: float, seed: int = 0) -> Network:
    """A random graph, each edge present with the given probability, Metropolis weights; drawn again until it is
    connected.

    Raises:
      NetworkError: none of a thousand draws was connected.
    """
    _positive("erdos_renyi", n=n)
    if not 0 < probability <= 1:
        raise NetworkError(f"erdos_renyi(probability={probability}): a probability in (0, 1] is needed.")
    generator = np.random.default_rng(seed)
    for _ in range(1000):
        upper = np.triu(generator.random((n, n)) < probability, 1)
        adjacency = upper | upper.T
        if len(_component(adjacency)) == n:
            return from_adjacency(adjacency, name=f"erdos_renyi({n}, {probability:g}, seed={seed})")
    raise NetworkError(
        f"erdos_renyi({n}, {probability:g}): a thousand draws gave no connected graph. Raise the probability well "
        f"above "
        f"log(n)/n = {math.log(n) / n:.3g}."
    )


def matrix(weights: Any, name: str = "matrix") -> Network:
    """A network from its mixing matrix.

    Args:
      weights: (n, n), symmetric, rows that sum to one, entries not negative, connected, no eigenvalue at -1.
      name: for messages.

    Raises:
      NetworkError: it is none of these; the message names the entry or the row.
    """
    weights = np.array(weights, np.float64)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or weights.shape[0] == 0:
        raise NetworkError(f"A mixing matrix is square, (agents, agents); {name} has the shape {list(weights.shape)}.")
    if not np.isfinite(weights).all():
        i, j = np.argwhere(~np.isfinite(weights))[0]
        raise NetworkError(f"{name}[{i}, {j}] is {weights[i, j]}: a mixing matrix has finite entries.")
    uneven = np.abs(weights - weights.T)
    if uneven.max() > _TOLERANCE:
        i, j = np.unravel_index(uneven.argmax(), uneven.shape)
        raise NetworkError(
            f"{name} is not symmetric: w[{i}, {j}] = {weights[i, j]:g} but w[{j}, {i}] = {weights[j, i]:g}. "
            "network.metropolis(adjacency) makes symmetric weights for any undirected graph."
        )
    sums = weights.sum(axis=1)
    if np.abs(sums - 1).max() > _TOLERANCE:
        i = int(np.abs(sums - 1).argmax())
        raise NetworkError(
            f"{name} is not doubly stochastic: row {i} sums to {sums[i]:g}, not 1. "
            "network.metropolis(adjacency) makes such weights for any undirected graph."
        )
    if weights.min() < -_TOLERANCE:
        i, j = np.unravel_index(weights.argmin(), weights.shape)
        raise NetworkError(f"{name}[{i}, {j}] = {weights[i, j]:g}: the weights of an average are not negative.")
    _connected(weights > _TOLERANCE, name)
    # Rounding of the input (float32) must not leave rows that sum to 1 + 1e-7: the diagonal takes it up.
    weights = (weights + weights.T) / 2
    np.fill_diagonal(weights, 0.0)
    np.fill_diagonal(weights, 1 - weights.sum(axis=1))
    smallest = np.linalg.eigvalsh(weights)[0]
    if smallest < -1 + 1e-9 and len(weights) > 1:
        raise NetworkError(
            f"{name} has the eigenvalue -1 (a bipartite graph without self-weights): mixing oscillates and never "
            "agrees. Use (I + W) / 2, which network.matrix((numpy.eye(n) + W) / 2) takes."
        )
    found = _Matrix(len(weights), name, weights, _links(weights))
    logger.info("%r", found)
    return found


def metropolis(adjacency: Any) -> np.ndarray:
    """Metropolis-Hastings weights w_ij = 1 / (1 + max(deg_i, deg_j)) of an undirected graph: symmetric, rows sum to
    one.

    Args:
      adjacency: (n, n) of truth values; the diagonal is ignored.
    """
    linked = np.array(adjacency) != 0
    if linked.ndim != 2 or linked.shape[0] != linked.shape[1]:
        raise NetworkError(
            f"An adjacency matrix is square, (agents, agents); this one has the shape {list(linked.shape)}."
        )
    np.fill_diagonal(linked, False)
    if (linked != linked.T).any():
        i, j = np.argwhere(linked & ~linked.T)[0]
        raise NetworkError(
            f"The graph is directed: agent {i} lists agent {j} as a neighbour, but not the other way round. Add "
            f"the missing edges."
        )
    degrees = linked.sum(axis=1)
    weights = np.where(linked, 1 / (1 + np.maximum(degrees[:, None], degrees[None, :])), 0.0)
    return weights + np.diag(1 - weights.sum(axis=1))


def from_adjacency(adjacency: Any, name: str = "graph") -> Network:
    """A network from an undirected graph, with Metropolis weights."""
    weights = metropolis(adjacency)
    _connected(weights > 0, name)
    return matrix(weights, name)


def time_varying(networks: Sequence[Network]) -> Network:
    """Step k mixes with network k mod their number. Each may be disconnected in itself (made by `one_peer` or as a
    matching), their union not.

    Corrections that remember one graph's flows (ED, EXTRA) refuse it; gradient tracking does not mind.
    """
    networks = tuple(networks)
    if not networks:
        raise NetworkError("time_varying needs at least one network; the sequence is empty.")
    sizes = {w.n for w in networks}
    if len(sizes) > 1:
        raise NetworkError(
            f"time_varying: the networks have {', '.join(map(str, sorted(sizes)))} agents; all need the same number."
        )
    nested = [w.name for w in networks if w.varies]
    if nested:
        raise NetworkError(f"time_varying: {nested[0]} changes with the step itself; give networks that do not.")
    return _TimeVarying(networks[0].n, f"time_varying({', '.join(w.name for w in networks)})", networks)


def one_peer(n: int) -> Network:
    """Time-varying: at step k agent i averages with agent i XOR 2^k. One message a mixing, exact average after log2 n
    of them.

    Args:
      n: a power of two, at least 2.
    """
    _positive("one_peer", n=n)
    if n < 2 or n & (n - 1):
        raise NetworkError(
            f"one_peer({n}): pairs at distances 1, 2, 4, ... need a number of agents that is a power of two, at "
            f"least 2."
        )
    return _OnePeer(n, f"one_peer({n})")


def _circulant(n: int, name: str, shifts: set[int]) -> Network:
    return _Circulant(n, name, tuple(sorted(shifts)), 1 / (len(shifts) + 1))


def _positive(owner: str, **counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise NetworkError(f"{owner}({name}={count!r}): the number of agents is a positive integer.")


def _component(linked: np.ndarray) -> set[int]:
    """The agents that agent 0 can reach."""
    found, new = {0}, [0]
    while new:
        new = [int(j) for i in new for j in np.flatnonzero(linked[i]) if j not in found]
        found.update(new)
        new = list(dict.fromkeys(new))
    return found


def _connected(linked: np.ndarray, name: str) -> None:
    found = _component(linked)
    if len(found) < len(linked):
        lost = sorted(set(range(len(linked))) - found)
        shown = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        raise NetworkError(
            f"{name} is disconnected: agent 0 reaches {len(found)} of {len(linked)} agents, not {shown}. They "
            f"could never agree: add edges."
        )
