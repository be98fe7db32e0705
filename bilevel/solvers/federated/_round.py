"""One round between the server and sampled clients: who takes part, with which samples, and how answers are
averaged."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import derivatives
from bilevel.data import Clients, StepKey
from bilevel.keys import permute
from bilevel.problem import Problem, ProblemError
from bilevel.solvers import _agents

PyTree = Any


def check_clients(problem: Problem, owner: str, clients: int | None) -> int:
    """The number of clients that the data are for; errors by name where `clients` cannot be sampled from them."""
    total = _agents.number_of_agents(problem, owner)
    if total is None:
        raise ProblemError(f"{owner} samples clients, and neither level has data: give data.Agents or data.Clients.")
    if clients is not None and clients > total:
        raise ProblemError(
            f"{owner}(clients={clients}) samples more clients than the {total} that exist: take clients={total} "
            f"or fewer, or None for all."
        )
    return total


def check_count(owner: str, **counts: Any) -> None:
    """Raise where a count is not a positive integer (or None)."""
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{owner}({name}={count!r}): a positive integer is needed.")


@dataclasses.dataclass(frozen=True)
class Round:
    """The clients of one round.

    Attributes:
      problem: whose losses and data.
      key: the round's key: the clients and their batches follow from it.
      clients: how many take part; None: all.
      weighting: "samples": F and f are the means over all samples, so that a client counts by its number of them;
        "clients": the means over clients.
    """

    problem: Problem
    key: StepKey
    clients: int | None = None
    weighting: str = "samples"

    @property
    def total(self) -> int:
        """The number of clients that exist."""
        data = self.problem.lower_data if self.problem.lower_data is not None else self.problem.upper_data
        return len(data)

    @property
    def size(self) -> int:
        """The number of clients that take part."""
        return self.total if self.clients is None else self.clients

    @property
    def everyone(self) -> bool:
        """Whether all clients take part."""
        return self.size == self.total

    def who(self) -> jax.Array:
        """The clients' indices, drawn without replacement: images of a keyed permutation, so that millions cost no
        more than a few."""
        if self.everyone:
            return jnp.arange(self.total)
        return permute(
            jnp.arange(self.size), self.total, jax.random.bits(self.key.fold_in(101).random, dtype=jnp.uint32)
        )

    def pass_on(self, chains: PyTree) -> PyTree:
        """Vectors handed to this round's clients at random: a permutation where all take part (fresh samples come in
        random order anyway)."""
        if not self.everyone:
            return chains
        order = permute(
            jnp.arange(self.total), self.total, jax.random.bits(self.key.fold_in(102).random, dtype=jnp.uint32)
        )
        return jax.tree.map(lambda a: a[order], chains)

    def _stacked(self, fn: Any, data: Any, stream: int, key: StepKey | None) -> _agents.Stacked:
        key = (self.key if key is None else key).fold_in(stream)
        if data is None:
            return _agents.stacked(fn, None, None)
        return _agents.stacked(fn, data, _agents.draw(data, key, None if self.everyone else self.who()))

    def upper(self, key: StepKey | None = None) -> _agents.Stacked:
        """The sum over these clients of their upper losses, a function of stacked variables, on a batch of `key` (the
        round's)."""
        return self._stacked(self.problem.upper, self.problem.upper_data, 1, key)

    def lower(self, key: StepKey | None = None) -> _agents.Stacked:
        """The sum over these clients of their lower losses, a function of stacked variables, on a batch of `key` (the
        round's)."""
        return self._stacked(self.problem.lower, self.problem.lower_data, 0, key)

    def copies(self, tree: PyTree) -> PyTree:
        """What the server sends to each: the same, stacked."""
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.size, *a.shape)), tree)

    def importance(self, level: str) -> jax.Array:
        """m p_i of these clients, p_i their share of the level's objective: with it a plain mean over them is
        unbiased."""
        data = self.problem.upper_data if level == "upper" else self.problem.lower_data
        if self.weighting == "clients" or not isinstance(data, Clients):
            return jnp.ones(self.size)
        counts = jnp.asarray(data.counts)
        return (counts * (self.total / counts.sum()))[self.who()]

    def weigh(self, tree: PyTree, level: str) -> PyTree:
        """Each client's answer times its importance."""
        weights = self.importance(level)
        return jax.tree.map(lambda a: a * weights.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype), tree)

    def mean(self, tree: PyTree, level: str) -> PyTree:
        """The server's average of the clients' answers."""
        return _agents.mean(self.weigh(tree, level))


def curvature_bound(problem: Problem, x: PyTree, y: PyTree, key: StepKey, most: int = 64) -> jax.Array:
    """1.2 times the largest curvature of up to `most` clients' lower levels at the start."""
    total = len(problem.lower_data) if problem.lower_data is not None else 1
    some = jnp.asarray(np.unique(np.linspace(0, total - 1, min(total, most)).astype(int)))
    count = int(some.shape[0])

    def stack(tree):
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), tree)

    return 1.2 * _agents.largest_curvature(problem, stack(x), stack(y), key, agents=some)


def norms(h: PyTree, lower: PyTree) -> dict[str, jax.Array]:
    """The two measures of stationarity."""
    return {"hypergradient_norm": derivatives.norm(h), "lower_residual": derivatives.norm(lower)}


def traffic(rounds: int, floats: float) -> dict[str, jax.Array]:
    """Rounds in this step, and the numbers that all its clients together received and sent."""
    return {
        "communication_rounds": jnp.asarray(rounds, jnp.float32),
        "communication_floats": jnp.asarray(floats, jnp.float32),
    }
