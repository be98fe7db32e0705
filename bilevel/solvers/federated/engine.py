"""How a server asks its clients: one interface, whether they are rows of arrays in this process or far away.

A federated method is written once, against an `Engine`, as rounds of asks. An ask names one of `oracles` and the point
that is sent; the answers come back weighted, both levels' terms put together, stacked over those who answered.

    at = engine.round(Draw.ROUND)                           clients sampled afresh
    D = at.ask(oracles.simfbo, Point(x, y, v)).mean         one exchange

`InProcess` stacks the clients and stays inside the compiled step; `integrations.flower` sends messages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel._module import name_of
from bilevel.data import ProblemError, Source
from bilevel.keys import Draw, StepKey, permute
from bilevel.level import Levels
from bilevel.optimizers import check_count
from bilevel.problem import Problem
from bilevel.solvers import _agents
from bilevel.solvers._base import refuse
from bilevel.solvers._directions import Point, combined
from bilevel.solvers.federated import oracles
from bilevel.typing import Metrics, PyTree, Scalar

Oracle = Callable[..., oracles.Terms]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the clients of one ask sent back.

    Attributes:
      value: the mean of their upper losses, where the oracle gives it.
      each: the answers, stacked, each times what its client counts.
      own: the rows, in the answers' order, of what was handed to each client by itself.
    """

    value: Scalar | None
    each: Any
    own: Any = None

    @property
    def mean(self) -> Any:
        """The server's average."""
        return _agents.mean(self.each)


class Engine(Protocol):
    """Where the clients are. What stands for a round's clients has `ask` and `pass_on`, see `Round`."""

    @property
    def key(self) -> StepKey:
        """The step's."""

    def round(self, draw: int, chains: bool = False) -> Any:
        """Clients sampled afresh, by what they count (`Round.by_share`); `chains`: each has a chain of its own."""

    def repeat(
        self, draw: int, count: int, body: Callable[[Any, PyTree], PyTree], carry: PyTree, chains: bool = False
    ) -> PyTree:
        """`count` rounds: body(clients, carry) -> carry."""

    def curvature(self, x: PyTree, y: PyTree) -> Any:
        """The largest curvature of the clients' lower levels at (x, y)."""


class InProcess:
    """All clients in this process, stacked along a leading axis: every exchange is a part of the compiled step.

    Args:
      key: the step's key: the clients of a round and their batches follow from it.
      clients: how many take part in a round; None: all.
      weighting: "samples": F and f are the means over all samples, so that a client counts by its number of them;
        "clients": the means over clients.
    """

    def __init__(self, problem: Problem, key: StepKey, clients: int | None = None, weighting: str = "samples") -> None:
        self.problem, self.key, self.weighting = problem, key, weighting
        self.total = next(source.parties for source in problem.sources if source.parties is not None)
        self.size = self.total if clients is None else clients
        self.spent = np.zeros(2, int)  # exchanges so far, and the numbers that their clients received and sent

    def round(self, draw: int, chains: bool = False) -> Round:
        """Clients sampled afresh, by what they count."""
        return Round(self, self.key.fold_in(draw)).by_share(chains)

    def repeat(
        self, draw: int, count: int, body: Callable[[Round, PyTree], PyTree], carry: PyTree, chains: bool = False
    ) -> PyTree:
        """`count` rounds in a compiled loop."""
        key, spent = self.key.fold_in(draw), self.spent

        def one(i: Any, carry: PyTree) -> PyTree:
            self.spent = spent  # however often the body is traced, it counts once
            return body(Round(self, key.inner(i, count)).by_share(chains), carry)

        carry = jax.lax.fori_loop(0, count, one, carry)
        self.spent = spent + count * (self.spent - spent)
        return carry

    def curvature(self, x: PyTree, y: PyTree, most: int = 64) -> jax.Array:
        """The largest curvature of the clients' lower levels, `most` of them at a time."""
        pieces = -(-self.total // most)
        some = np.arange(pieces * min(most, self.total)).reshape(pieces, -1) % self.total  # of one size: one programme
        found = [_curvature(self.problem, self.key, jnp.asarray(who), Point(x, y, None)) for who in some]
        return functools.reduce(jnp.maximum, found)


@dataclasses.dataclass(frozen=True)
class Round:
    """The clients of one round of an `InProcess` engine."""

    engine: InProcess
    key: StepKey

    def _permuted(self, draw: Draw, count: int) -> jax.Array:
        seed = jax.random.bits(self.key.fold_in(draw).random, dtype=jnp.uint32)
        return permute(jnp.arange(count), self.engine.total, seed)

    @functools.cached_property
    def who(self) -> Literal["all"] | jax.Array:
        """The clients' numbers, drawn without replacement: images of a keyed permutation, so that millions cost no more
        than a few."""
        size = self.engine.size
        return "all" if size == self.engine.total else self._permuted(Draw.CLIENTS, size)

    def by_share(self, chains: bool = False) -> Round:
        """The same round with clients drawn by what they count, which then all count alike.

        Where clients count by unequal numbers of samples, and only some take part or each has a chain of its own
        (`chains`), what one of them counts is otherwise a factor of its answers: their variance, and each factor of a
        chain, would be as many times larger. Drawn are as many as take part, each about as often as its share of the
        lower level says (systematic sampling): a large client may have several of the rows.
        """
        engine = self.engine
        source = engine.problem.levels(self.key, "all").lower.source
        if engine.weighting == "clients" or not source.given or source.even:
            return self
        if isinstance(self.who, str) and not chains:
            return self
        cuts = jnp.cumsum(source.shares()) / engine.total
        start = jax.random.uniform(self.key.fold_in(Draw.CLIENTS).random)
        drawn = jnp.searchsorted(cuts, (jnp.arange(engine.size) + start) / engine.size, side="right")
        order = jax.random.permutation(self.key.fold_in(Draw.ORDER).random, engine.size)
        return _Drawn(engine, self.key, jnp.minimum(drawn, engine.total - 1)[order])

    def pass_on(self, chains: PyTree) -> PyTree:
        """Rows handed to this round's clients at random: permuted where all take part, else they are random anyway."""
        if not isinstance(self.who, str):
            return chains
        order = self._permuted(Draw.ORDER, self.engine.total)
        return jax.tree.map(lambda a: a[order], chains)

    def of(self, numbers: jax.Array) -> jax.Array:
        """These clients' rows of an array with a row for every client."""
        return numbers if isinstance(self.who, str) else numbers[self.who]

    def importance(self, source: Source) -> jax.Array | None:
        """m p_i of these clients, p_i their share of a level's objective: a plain mean over them is unbiased."""
        if self.engine.weighting == "clients" or not source.given:
            return None
        return self.of(source.shares())

    def weights(self, levels: Levels) -> list[jax.Array | None]:
        """What these clients count in either level, by which a plain mean over them is unbiased."""
        return [self.importance(level.source) for level in levels]

    def ask(
        self, oracle: Oracle, sent: Any, own: Any = None, only: Any = None, *, held: bool = False,
        weighted: bool = False, **options: Any,
    ) -> Answers:  # fmt: skip
        """One exchange.

        Args:
          oracle: one of `oracles`.
          sent: the `Point` that all are sent.
          own: None, or a stacked tree with a row for each client, and then `sent.v` is stacked too: client i is sent
            row i of it. Rows whose client does not answer are lost.
          only: which rows need an answer; those of the others may be anything.
          held: the clients have x and y already, from this round's first ask.
          weighted: the clients compute with what they count as a factor of their losses, and answer with what is to be
            averaged (as the upper terms).
          **options: the oracle's.
        """
        engine = self.engine
        levels = engine.problem.levels(self.key, self.who)
        weights = self.weights(levels)
        here = _copies(sent if own is None else Point(sent.x, sent.y, None), engine.size)
        here = here if own is None else Point(here.x, here.y, sent.v)
        if weighted:
            levels = Levels(*(dataclasses.replace(level, weights=w) for level, w in zip(levels, weights, strict=True)))
        found = oracle(levels, here, **options)
        each, value = found.upper, found.value
        if value is not None and not weighted and weights[0] is not None:
            value = levels.upper.weighted(weights[0])(here.x, here.y)  # of the clients as they count, where they begin
        if not weighted:
            each = combined(_weighed(found.lower, weights[1]), _weighed(found.upper, weights[0]))
        engine.spent = engine.spent + np.array([1, optax.tree.size(here.v if held else here) + optax.tree.size(each)])
        return Answers(None if value is None else value / engine.size, each, own)


@dataclasses.dataclass(frozen=True)
class _Drawn(Round):
    """A round with clients that were drawn by their share of the lower level, some more than once."""

    drawn: jax.Array

    @property
    def who(self) -> jax.Array:  # type: ignore[override]
        """Their numbers."""
        return self.drawn

    def weights(self, levels: Levels) -> list[jax.Array | None]:
        """Relative to the share that they were drawn by."""
        lower: Any = self.importance(levels.lower.source)
        upper = self.importance(levels.upper.source)
        return [1 / lower if upper is None else upper / lower, None]


@jax.jit
def _curvature(problem: Problem, key: StepKey, who: jax.Array, at: Point) -> jax.Array:
    return oracles.curvature(problem.levels(key, who), _copies(at, len(who))).value


def _copies(tree: PyTree, count: int) -> Any:
    """What the server sends to each: the same, stacked."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *jnp.shape(a))), tree)


def _weighed(terms: PyTree, weights: jax.Array | None) -> PyTree:
    if weights is None:
        return terms
    return jax.tree.map(lambda a: a * oracles.rows(weights, a).astype(a.dtype), terms)


class Federated:
    """What federated methods share: they begin and advance on any engine, and as solvers in this process.

    A method gives `begin(engine, x, y) -> state`, `advance(engine, state) -> (state, metrics)`, and the oracles that it
    `asks`, so that an engine that cannot ask one of them refuses the method.
    """

    clients: int | None
    weighting: str

    def solved_problem(self, problem: Problem) -> Problem | None:
        """The problem that is solved, which a certificate judges; None where it cannot."""
        return problem if self.weighting == "samples" else _agents.mean_over_parties(problem)

    @property
    def asks(self) -> tuple[Oracle, ...]:
        """The oracles of this method's rounds."""
        raise NotImplementedError

    def _check(self, *counts: str) -> None:
        owner = type(self).__name__
        check_count(owner, **{name: getattr(self, name) for name in ("clients", *counts)})
        if self.weighting not in ("samples", "clients"):
            raise ValueError(f"{owner}(weighting={self.weighting!r}): 'samples' or 'clients'.")

    def begin(self, engine: Engine, x: PyTree, y: PyTree) -> Any:
        """The server before the first round."""
        raise NotImplementedError

    def advance(self, engine: Engine, state: Any) -> tuple[Any, Metrics]:
        """The rounds of one outer iteration."""
        raise NotImplementedError

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> Any:
        """The server before the first round, its clients in this process."""
        refuse(self, problem, x)
        name, clients = name_of(self), self.clients
        total = _agents.number_of_agents(problem, name)
        if total is None:
            raise ProblemError(f"{name} samples clients, and neither level has data: give data.Agents or data.Clients.")
        if clients is not None and clients > total:
            raise ProblemError(
                f"{name}(clients={clients}) samples more clients than the {total} that exist: take clients={total} or "
                "fewer, or None for all."
            )
        return self.begin(InProcess(problem, key, clients, self.weighting), x, y)

    def step(self, problem: Problem, state: Any, key: StepKey) -> tuple[Any, Metrics]:
        """One outer iteration."""
        engine = InProcess(problem, key, self.clients, self.weighting)
        state, metrics = self.advance(engine, state)
        return state, metrics | _agents.traffic(*engine.spent)
