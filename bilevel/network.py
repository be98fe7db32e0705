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

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel._arguments import explained
from bilevel._module import hyperparameters
from bilevel.typing import PyTree

__all__ = [
    "Network", "NetworkError", "complete", "consensus_error", "erdos_renyi", "exponential", "from_adjacency", "matrix",
    "metropolis", "one_peer", "ring", "star", "time_varying", "torus",
]  # fmt: skip

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


@hyperparameters
class Network:
    """What all networks share. Made by `ring(n)`, `torus(rows, cols)`, ..., `matrix(W)`; a pytree.

    `mix(tree)` is W applied along the leading axis of every leaf, `flow(tree)` is I - W. `step` is the outer step,
    which only `time_varying` networks look at.
    """

    n: int
    name: str
    varies: ClassVar[bool] = False
    """Whether the graph changes from step to step."""

    def __init_subclass__(cls) -> None:
        cls.__repr__ = Network.__repr__  # type: ignore[method-assign]  # a dataclass would make one of its own

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        raise NotImplementedError

    def matrix(self, step: int = 0) -> np.ndarray:
        """W as a float64 array (n, n), of that step."""
        raise NotImplementedError

    def flow(self, tree: PyTree, step: Any = 0) -> PyTree:
        """(I - W) along the leading axis of every leaf."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if np.ndim(leaf) == 0 or np.shape(leaf)[0] != self.n:
                raise NetworkError(
                    f"{self.name} mixes arrays with a leading axis of its {self.n} agents; the leaf "
                    f"{jax.tree_util.keystr(path) or 'given'} has the shape {list(np.shape(leaf))}."
                )
        real = lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf.astype(float)  # noqa: E731
        return jax.tree.map(lambda leaf: self._flow(real(jnp.asarray(leaf)), step), tree)

    def mix(self, tree: PyTree, step: Any = 0) -> PyTree:
        """W along the leading axis of every leaf: each agent's average over itself and its neighbours."""
        return optax.tree.sub(tree, self.flow(tree, step))

    def eigenvalues(self) -> np.ndarray:
        """The eigenvalues of W, ascending; of `time_varying` networks what stands for them over one cycle."""
        return np.linalg.eigvalsh(self.matrix())

    @property
    def smallest_eigenvalue(self) -> float:
        """l_n (the smallest of any step's W), which limits the step of combine-then-adapt forms and of EXTRA."""
        return float(self.eigenvalues()[0])

    @property
    def spectral_gap(self) -> float:
        """1 - max(|l_2|, |l_n|): how fast a disagreement shrinks. 1 for the complete graph and for a single agent."""
        values = self.eigenvalues()
        return 1.0 if self.n == 1 else float(1 - max(abs(values[0]), abs(values[-2])))

    @property
    def neighbours(self) -> int:
        """The most neighbours that an agent has: messages sent per mixing."""
        return _degree(self.matrix())

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

    shifts: tuple[int, ...]
    weight: float

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        # On a single device slices of the doubled array fuse, six times as fast as rolls on a CPU; of a sharded axis
        # rolls alone become collective permutes. The sums are the same, bit for bit.
        if jax.device_count() == 1:
            doubled = jnp.concatenate([leaf, leaf])
            return _flow_from(leaf, [doubled[shift : shift + self.n] for shift in self.shifts], self.weight)
        return _flow_from(leaf, [jnp.roll(leaf, -shift, axis=0) for shift in self.shifts], self.weight)

    def matrix(self, step: int = 0) -> np.ndarray:
        agents = np.arange(self.n)
        return _equal_weights([(agents + shift) % self.n for shift in self.shifts], self.n, self.weight)


@hyperparameters
class _Torus(Network):
    """A grid of rows x cols agents, row by row along the axis, closed in both directions.

    Steps within a row are rolls of the whole axis, mended where they leave the row: no reshape of a sharded axis.
    """

    rows: int
    cols: int
    weight: float

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        def roll(shift: int) -> jax.Array:
            return jnp.roll(leaf, -shift, axis=0)

        column = (jnp.arange(self.n) % self.cols).reshape(-1, *[1] * (leaf.ndim - 1))
        neighbours = [roll(shift * self.cols) for shift in _steps(self.rows)]
        for shift in _steps(self.cols):
            edge = self.cols - 1 if shift == 1 else 0
            neighbours.append(jnp.where(column == edge, roll(shift * (1 - self.cols)), roll(shift)))
        return _flow_from(leaf, neighbours, self.weight)

    def matrix(self, step: int = 0) -> np.ndarray:
        grid = np.arange(self.n).reshape(self.rows, self.cols)
        moves = [(0, shift) for shift in _steps(self.rows)] + [(1, shift) for shift in _steps(self.cols)]
        neighbours = [np.roll(grid, -shift, axis=axis).ravel() for axis, shift in moves]
        return _equal_weights(neighbours, self.n, self.weight)


@hyperparameters
class _Complete(Network):
    """All agents average with all: one all-reduce."""

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        return leaf - _mean(leaf)

    def matrix(self, step: int = 0) -> np.ndarray:
        return np.full((self.n, self.n), 1 / self.n)


@hyperparameters
class _Matrix(Network):
    """Any mixing matrix: an all-gather where the axis is sharded.

    Where every agent has few neighbours, `links` holds their (n, degree) indices and weights, filled up with
    weights of zero, and their differences are summed: n degree products per number instead of n^2.
    """

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
        laplacian = jnp.asarray(np.eye(self.n) - self.weights, leaf.dtype)
        return jnp.tensordot(laplacian, leaf - leaf[:1], 1, precision="highest")

    def matrix(self, step: int = 0) -> np.ndarray:
        return np.asarray(self.weights, np.float64)


@hyperparameters
class _Pairs(Network):
    """Agent i averages with agent i XOR `distance`, a power of two."""

    distance: int

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        upper = (jnp.arange(self.n) // self.distance % 2 == 1).reshape(-1, *[1] * (leaf.ndim - 1))
        peer = jnp.where(upper, jnp.roll(leaf, self.distance, axis=0), jnp.roll(leaf, -self.distance, axis=0))
        return (leaf - peer) / 2

    def matrix(self, step: int = 0) -> np.ndarray:
        return (np.eye(self.n) + np.eye(self.n)[np.arange(self.n) ^ self.distance]) / 2


@hyperparameters
class _TimeVarying(Network):
    """Step k mixes with network k mod their number."""

    networks: Any
    varies: ClassVar[bool] = True

    def _flow(self, leaf: jax.Array, step: Any) -> jax.Array:
        which = jnp.asarray(step, jnp.uint32) % jnp.uint32(len(self.networks))
        flows = [lambda leaf, w=w: w._flow(leaf, 0) for w in self.networks]
        return jax.lax.switch(which.astype(jnp.int32), flows, leaf)

    def matrix(self, step: int = 0) -> np.ndarray:
        return self.networks[step % len(self.networks)].matrix()

    def lazy(self) -> Network:
        """Each of them with (I + W) / 2."""
        halved = lambda w: matrix((np.eye(self.n) + w.matrix()) / 2, f"lazy {w.name}", connected=False)  # noqa: E731
        return _TimeVarying(self.n, f"lazy {self.name}", tuple(map(halved, self.networks)))

    def eigenvalues(self) -> np.ndarray:
        """The singular values of the product over one cycle, to the power of one over its length, ascending."""
        product = np.linalg.multi_dot([w.matrix() for w in self.networks] + [np.eye(self.n)])
        return np.sort(np.linalg.svd(product, compute_uv=False)) ** (1 / len(self.networks))

    @property
    def smallest_eigenvalue(self) -> float:
        return min(w.smallest_eigenvalue for w in self.networks)

    @property
    def neighbours(self) -> int:
        return max(w.neighbours for w in self.networks)


@hyperparameters
class _OnePeer(_TimeVarying):
    """One message a step, exact consensus after a cycle."""

    def eigenvalues(self) -> np.ndarray:
        """Those of the product over one cycle: the exact average."""
        return np.concatenate([np.zeros(self.n - 1), [1.0]])

    @property
    def smallest_eigenvalue(self) -> float:
        return 0.0


def _flow_from(leaf: jax.Array, neighbours: list[jax.Array], weight: Any) -> jax.Array:
    """(I - W) s of agents that average with their neighbours' copies, given in any order, all with one weight."""
    total = jnp.zeros_like(leaf)
    for neighbour in neighbours:
        total = total + (leaf - neighbour)
    return (total * weight).astype(leaf.dtype)


def _equal_weights(neighbours: list[np.ndarray], n: int, weight: Any) -> np.ndarray:
    """The W of `_flow_from`, each neighbour given by its number."""
    weights = np.zeros((n, n))
    for neighbour in neighbours:
        weights[np.arange(n), neighbour] += float(weight)
    return weights + np.diag(1 - weights.sum(axis=1))


def _steps(length: int) -> tuple[int, ...]:
    """Steps to the distinct neighbours on a circle: none on one of one, and both the same on one of two."""
    return (1, -1)[: length - 1]


def _degree(weights: np.ndarray) -> int:
    """The most neighbours of an agent."""
    return int(((weights != 0) & ~np.eye(len(weights), dtype=bool)).sum(axis=1).max())


def _links(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Each agent's neighbours and their weights, (n, largest degree); None where a matrix product is cheaper."""
    degree = _degree(weights)
    if degree == 0 or 8 * degree > len(weights):
        return None
    others = weights - np.diag(np.diag(weights))
    index = np.argsort(others == 0, axis=1, kind="stable")[:, :degree]  # the neighbours first, then any others
    return index.astype(np.int32), np.take_along_axis(others, index, axis=1)


# ---------------------------------------------------------------- the named graphs


@explained
def ring(n: int) -> Network:
    """Agents on a circle, each averaging with its two neighbours: weights 1/3, spectral gap O(1/n^2)."""
    _positive("ring", n=n)
    return _circulant(n, f"ring({n})", {1 % n, -1 % n} - {0})


@explained
def torus(rows: int, cols: int) -> Network:
    """A grid closed in both directions, each agent averaging with four neighbours: weights 1/5, gap O(1/n)."""
    _positive("torus", rows=rows, cols=cols)
    return _Torus(rows * cols, f"torus({rows}, {cols})", rows, cols, 1 / (1 + len(_steps(rows) + _steps(cols))))


@explained
def exponential(n: int) -> Network:
    """The static exponential graph, made symmetric: agent i averages with i +- 1, 2, 4, ... (mod n); gap O(1/log n).

    Reference: Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep Training", NeurIPS 2021
    (directed there).
    """
    _positive("exponential", n=n)
    powers = [2**j for j in range((n - 1).bit_length())]
    return _circulant(n, f"exponential({n})", {s * p % n for p in powers for s in (1, -1)} - {0})


@explained
def complete(n: int) -> Network:
    """Everybody averages with everybody: W = 1 1' / n, one all-reduce, spectral gap 1."""
    _positive("complete", n=n)
    return _Complete(n, f"complete({n})")


@explained
def star(n: int) -> Network:
    """Agent 0 in the middle, Metropolis weights 1/n on the spokes: gap 1/n."""
    _positive("star", n=n)
    adjacency = np.zeros((n, n), bool)
    adjacency[0, 1:] = adjacency[1:, 0] = True
    return from_adjacency(adjacency, name=f"star({n})")


@explained
def erdos_renyi(n: int, probability: float, seed: int = 0) -> Network:
    """A random graph, each edge present with the given probability, Metropolis weights; drawn again until it is
    connected; a `NetworkError` where none of a thousand draws is.
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
        f"above log(n)/n = {math.log(n) / n:.3g}."
    )


@explained
def matrix(weights: Any, name: str = "matrix", *, connected: bool = True) -> Network:
    """A network from its mixing matrix.

    Args:
      weights: (n, n), symmetric, rows that sum to one, entries not negative, connected, no eigenvalue at -1; where
        one of these fails, a `NetworkError` names the entry or the row.
      name: for messages.
      connected: False: it may be disconnected, as a matching is, for `time_varying`; alone it never agrees.
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
    i = int(np.abs(sums - 1).argmax())
    if abs(sums[i] - 1) > _TOLERANCE:
        raise NetworkError(
            f"{name} is not doubly stochastic: row {i} sums to {sums[i]:g}, not 1. "
            "network.metropolis(adjacency) makes such weights for any undirected graph."
        )
    if weights.min() < -_TOLERANCE:
        i, j = np.unravel_index(weights.argmin(), weights.shape)
        raise NetworkError(f"{name}[{i}, {j}] = {weights[i, j]:g}: the weights of an average are not negative.")
    if connected:
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


@explained
def metropolis(adjacency: Any) -> np.ndarray:
    """Metropolis-Hastings weights w_ij = 1 / (1 + max(deg_i, deg_j)) of an undirected graph: symmetric, rows sum to 1.

    `adjacency` is (n, n), of truth values; its diagonal is ignored.
    """
    linked = np.array(adjacency) != 0
    if linked.ndim != 2 or linked.shape[0] != linked.shape[1]:
        shape = list(linked.shape)
        raise NetworkError(f"An adjacency matrix is square, (agents, agents); this one has the shape {shape}.")
    np.fill_diagonal(linked, False)
    if (linked != linked.T).any():
        i, j = np.argwhere(linked & ~linked.T)[0]
        raise NetworkError(
            f"The graph is directed: agent {i} lists agent {j} as a neighbour, but not the other way round. Add "
            "the missing edges."
        )
    degrees = linked.sum(axis=1)
    weights = np.where(linked, 1 / (1 + np.maximum(degrees[:, None], degrees[None, :])), 0.0)
    return weights + np.diag(1 - weights.sum(axis=1))


@explained
def from_adjacency(adjacency: Any, name: str = "graph") -> Network:
    """A network from an undirected graph, with Metropolis weights."""
    return matrix(metropolis(adjacency), name)


@explained
def time_varying(networks: Sequence[Network]) -> Network:
    """Step k mixes with network k mod their number. Each may be disconnected in itself (`matrix(..., connected=False)`,
    a matching), their union not.

    Corrections that remember one graph's flows (ED, EXTRA) refuse it; gradient tracking does not mind.
    """
    networks = tuple(networks)
    if not networks:
        raise NetworkError("time_varying needs at least one network; the sequence is empty.")
    sizes = sorted({w.n for w in networks})
    if len(sizes) > 1:
        given = ", ".join(map(str, sizes))
        raise NetworkError(f"time_varying: the networks have {given} agents; all need the same number.")
    nested = [w.name for w in networks if w.varies]
    if nested:
        raise NetworkError(f"time_varying: {nested[0]} changes with the step itself; give networks that do not.")
    _connected(np.sum([w.matrix() for w in networks], axis=0) > _TOLERANCE, "the union of time_varying's networks")
    return _TimeVarying(networks[0].n, f"time_varying({', '.join(w.name for w in networks)})", networks)


@explained
def one_peer(n: int) -> Network:
    """Time-varying: at step k agent i of n = 2, 4, 8, ... averages with agent i XOR 2^(k mod log2 n).

    One message a mixing, exact average after log2 n of them.
    """
    _positive("one_peer", n=n)
    name = f"one_peer({n})"
    if n < 2 or n & (n - 1):
        raise NetworkError(
            f"{name}: pairs at distances 1, 2, 4, ... need a number of agents that is a power of two, at least 2."
        )
    return _OnePeer(n, name, tuple(_Pairs(n, name, 2**j) for j in range(n.bit_length() - 1)))


def _circulant(n: int, name: str, shifts: set[int]) -> Network:
    return _Circulant(n, name, tuple(sorted(shifts)), 1 / (len(shifts) + 1))


def _positive(owner: str, **counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise NetworkError(f"{owner}({name}={count!r}): the number of agents is a positive integer.")


def _component(linked: np.ndarray) -> set[int]:
    """The agents that agent 0 can reach."""
    found, new = {0}, {0}
    while new:
        new = {int(j) for i in new for j in np.flatnonzero(linked[i])} - found
        found |= new
    return found


def _connected(linked: np.ndarray, name: str) -> None:
    found = _component(linked)
    lost = sorted(set(range(len(linked))) - found)
    if lost:
        shown = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
        raise NetworkError(
            f"{name} is disconnected: agent 0 reaches {len(found)} of {len(linked)} agents, not {shown}. They "
            "could never agree: add edges."
        )
