"""Federated bilevel optimisation across silos with Flower: the data stay where they are, oracles' answers travel.

The extra `flower` installs it (`pip install 'bilevel[flower]'`; best into an environment of its own: it pins widely
used packages). Two sides:

    app = flower.client_app(setup)          # on each client: setup(context) -> (problem on its own data, x, y)

    app = ServerApp()
    @app.main()
    def main(grid, context):
        solution = flower.run(grid, federated.SimFBO(10), x0, y0, steps=100)

This is an engine under the methods of `solvers.federated`, and holds the transport alone: what is asked, computed and
averaged is theirs. It runs those whose clients need no number and keep nothing: `SimFBO` and `FedBiO` (one exchange per
step), `FedMBO` (its chains handed from client to client), `AggITD`. Each oracle is a message type of its own,
`train.grad_y`, `train.f_y`, `train.hvp`, `train.hyper`, `train.simfbo`, `train.aggitd`, `train.curvature`, so that a
site can allow, log or add noise to each by itself.

A client that fails, or is late (`timeout`), is left out of that round's averages, named in the log and in
`solution.state.missing`, and may be asked again in later rounds. The run goes on. So does it where an answer is not
what was asked for: replies are untrusted input, read in one place (`_read`), and whatever is wrong with one (missing
arrays, other shapes, bytes that are no array, NaN, numbers of another order of magnitude than all others', impossible
counts of samples) leaves that client out and is counted. Within what is possible a client can still pull the average:
`clip` and `average="median"` bound how far.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import logging
import math
import numbers
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import explained, explained_class
from bilevel._module import name_of
from bilevel.data import Source
from bilevel.history import History
from bilevel.keys import StepKey
from bilevel.problem import Problem
from bilevel.result import Result
from bilevel.solution import Solution
from bilevel.solvers.federated import Answers, Federated, Point, combined, oracles
from bilevel.solvers.federated.oracles import Terms
from bilevel.typing import PyTree

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
except ImportError as error:  # pragma: no cover
    raise ImportError(f"bilevel.integrations.flower needs Flower ({error}): pip install 'flwr>=1.40,<1.42'.") from error

__all__ = ["FlowerError", "FlowerState", "InProcessGrid", "Missing", "client_app", "run"]

logger = logging.getLogger("bilevel")

_PREFIX = "train."
_KINDS = ("grad_y", "f_y", "hvp", "hyper", "simfbo", "aggitd", "curvature")
_ORACLES: dict[str, Callable[..., Terms]] = {kind: getattr(oracles, kind) for kind in _KINDS}


class FlowerError(RuntimeError):
    """The run cannot start or go on; the message says who is missing, and what to do."""


class _NobodyAnsweredError(Exception):
    pass


class _BrokenError(Exception):
    """A message is not what was asked for; the text says how."""


# What each oracle answers with, of value, lower (x, y, v) and upper (x, y, v).
_ANSWERS: dict[str, frozenset[str]] = {
    "grad_y": frozenset({"lower.y"}),
    "f_y": frozenset({"upper.v"}),
    "hvp": frozenset({"lower.v"}),
    "hyper": frozenset({"value", "lower.x", "upper.x"}),
    "simfbo": frozenset({"value", "lower.x", "lower.y", "lower.v", "upper.x", "upper.v"}),
    "aggitd": frozenset({"lower.y", "lower.v", "upper.v"}),
    "curvature": frozenset({"value"}),
}
_MOST_SAMPLES = 10_000_000
_OUTLIER = 1e6  # times the largest median so far of the same kind of answer: no client's data are so unlike


# ---------------------------------------------------------------- what travels


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _pack(tree: PyTree, config: dict[str, Any]) -> RecordDict:
    """A `Point` or `Terms` as one record of arrays by name; the other side knows the structure."""
    arrays = {name: Array(np.asarray(leaf)) for name, leaf in _named(tree)}
    return RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord(config)})


def _unpack(content: RecordDict, like: PyTree, needed: Callable[[str], bool] = lambda name: False) -> Any:
    """What was packed, with the structure of `like`, None for leaves that are not there.

    Raises:
      _BrokenError: an array is no array of finite numbers of its shape, or a needed one is missing.
    """
    arrays: Any = content.array_records.get("arrays", {})
    found: list[Any] = []
    for name, expected in _named(like):
        if name in arrays:
            found.append(_parsed(name, arrays[name], np.shape(expected), np.dtype(jnp.result_type(expected))))
        elif needed(name):
            raise _BrokenError(f"{name} is missing")
        else:
            found.append(None)
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _parsed(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array that some bytes say they are: its header is read first, and nothing is allocated for a wrong one."""
    try:
        stream = io.BytesIO(array.data)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        said, fortran, kind = read(stream)
        content = stream.read()
        size = math.prod(said) * kind.itemsize
    except Exception as error:
        raise _BrokenError(f"{name} is no array ({type(error).__name__}: {str(error)[:100]})") from None
    if said != shape:
        raise _BrokenError(
            f"{name} came with the shape {said}, expected {shape}: server and clients must be given equal models"
        )
    if kind.kind not in "fV" or (kind.kind == "V" and kind.itemsize != dtype.itemsize):
        raise _BrokenError(f"{name} came as {kind}, expected floating-point numbers")
    if len(content) != size:
        raise _BrokenError(f"{name} is cut: it has {len(content)} bytes, its header says {size}")
    if kind.kind == "V":  # bfloat16 and its like, which numpy writes as bytes
        kind = dtype
    with np.errstate(all="ignore"):
        values = np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C").astype(dtype)
        if not np.isfinite(values).all() or not np.isfinite(_norm(values)):
            raise _BrokenError(f"{name} is not finite")
    return values


def _norm(values: Any) -> float:
    """The Euclidean norm, infinite where its square is more than the values' type can hold."""
    with np.errstate(all="ignore"):
        kind = np.result_type(np.asarray(values).dtype, np.float32)
        return float(np.sqrt(np.sum(np.square(np.asarray(values, kind)))))


def _samples(config: Any, name: str) -> int:
    """A count of samples that is one."""
    value = config.get(name)
    whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value and value % 1 == 0
    if not whole or not 1 <= value <= _MOST_SAMPLES:
        raise _BrokenError(f"{name} is {str(value)[:60]!r}, expected a whole number from 1 to {_MOST_SAMPLES:,}")
    return int(value)


def _read(kind: str, content: RecordDict, like: PyTree) -> tuple[Terms, dict[str, int]]:
    """A client's answer and its numbers of samples; the one place that looks at what clients send.

    Raises:
      _BrokenError: it is not what was asked for.
    """
    try:
        config = dict[str, Any](content.config_records.get("config", {}))
        counts = {level: _samples(config, f"{level}_samples") for level in ("upper", "lower")}

        def needed(name: str) -> bool:
            return ".".join(name.split(".")[:2]) in _ANSWERS[kind]

        return _unpack(content, like, needed), counts
    except _BrokenError:
        raise
    except Exception as error:  # records of other types, arrays without data, ...: nothing of it may end the run
        raise _BrokenError(f"it cannot be read ({type(error).__name__}: {str(error)[:100]})") from None


def _numbers(content: RecordDict) -> int:
    """How many numbers the server sends in a message."""
    return sum(int(np.prod(array.shape)) for array in content.array_records["arrays"].values())


# ---------------------------------------------------------------- the client


@explained
def client_app(setup: Callable[[Context], tuple[Problem, PyTree, PyTree]]) -> ClientApp:
    """A `ClientApp` that answers the oracles on this client's data.

    Args:
      setup: `context -> (problem, x, y)`: the problem with this client's samples alone (arrays for full batches, or any
        source but a `data.Stream`), and variables of the right shapes (their values are not used). Called once per
        process; `context.node_config` says which partition this node has.
    """
    app = ClientApp()
    ready: dict[int, tuple[Problem, dict[str, int], Point]] = {}

    def answer(kind: str) -> Callable[[Message, Context], Message]:
        def respond(message: Message, context: Context) -> Message:
            if context.node_id not in ready:
                problem, x, y = setup(context)
                upper, lower = problem.sources
                own = _alone("upper_data", upper), _alone("lower_data", lower)
                alone = dataclasses.replace(problem, upper_data=own[0], lower_data=own[1])
                counts = {"upper_samples": upper.count or 1, "lower_samples": lower.count or 1}
                ready[context.node_id] = alone, counts, Point(x, y, y)
            problem, counts, like = ready[context.node_id]
            try:
                sent = _unpack(message.content, like)
            except _BrokenError as error:
                raise FlowerError(f"The server's message: {error}.") from None
            config = dict[str, Any](message.content.config_records["config"])
            base = jax.random.fold_in(jax.random.key(int(config.pop("seed"))), context.node_id % 2**32)
            key = StepKey(base, jnp.uint32(config.pop("step")), jnp.uint32(config.pop("stream")))
            numbers = {name: tuple(value) for name, value in config.items() if isinstance(value, list)}
            sizes = tuple(sorted((name, value) for name, value in config.items() if name not in numbers))
            return Message(_pack(_computed(kind, problem, sent, key, numbers, sizes), counts), reply_to=message)

        return respond

    for kind in _ORACLES:
        app.train(kind)(answer(kind))
    return app


class _Alone(Source, leaves=("source",)):
    """What one client's source draws, as that of one agent."""

    parties = 1

    def __init__(self, source: Source) -> None:
        self.source = source

    random, varies, shared, count = (  # type: ignore[assignment]
        property(operator.attrgetter(f"source.{name}")) for name in ("random", "varies", "shared", "count")
    )

    def draw_each(self, key: StepKey, who: jax.Array | None = None) -> PyTree:
        """The client's batch, stacked."""
        return jax.tree.map(lambda a: jnp.asarray(a)[None], self.source.draw(key))


def _alone(name: str, source: Source) -> Source | None:
    """This client's data as those of one agent; None where it has none."""
    if source.host:
        raise FlowerError(
            f"{name} of this client's problem is a data.Stream, which is read item by item, and a client is asked when "
            "the server likes: give arrays, data.Minibatches or a data.Sampler."
        )
    return _Alone(source) if source.given else None


@functools.partial(jax.jit, static_argnames=("kind", "sizes"))
def _computed(
    kind: str, problem: Problem, sent: Point, key: StepKey, numbers: dict[str, Any], sizes: tuple[tuple[str, int], ...]
) -> Terms:
    """A round of this one client."""
    here = jax.tree.map(lambda a: jnp.asarray(a)[None], sent)
    found = _ORACLES[kind](problem.levels(key, "all"), here, **numbers, **dict(sizes))
    return Terms(found.value, *jax.tree.map(lambda a: a[0], (found.lower, found.upper)))


# ---------------------------------------------------------------- the server


@dataclasses.dataclass(frozen=True)
class Missing:
    """An answer that did not come, or was broken: the step, the message type, the node, and why."""

    step: int
    kind: str
    node: int
    reason: str
    broken: bool = False

    def __str__(self) -> str:
        return f"node {self.node} in step {self.step} ({_PREFIX}{self.kind}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class FlowerState:
    """The method's own state at the end (None where no step began), and the answers that did not come."""

    server: Any
    missing: tuple[Missing, ...]


class _Server:
    """An `Engine` over a Grid: who is asked, what came back, who did not answer, what was sent. Each ask is a round.

    How many samples a client has comes with its first answer; until then it counts as the mean of those heard of.
    """

    def __init__(
        self, grid: Grid, solver: Federated, x: PyTree, y: PyTree, seed: int, timeout: float | None, wait: float,
        clip: float | None = None, average: str = "mean",
    ) -> None:  # fmt: skip
        self.grid, self.solver, self.seed, self.timeout = grid, solver, seed, timeout
        self.clip, self.average = clip, average
        self.typical: dict[tuple[str, str], float] = {}  # the largest median norm so far of each part of each answer
        self.like = Terms(jnp.zeros(()), Point(x, y, y), Point(x, y, y))
        self.missing: list[Missing] = []
        self.samples: dict[str, dict[int, int]] = {"upper": {}, "lower": {}}
        self.rounds, self.floats, self.step, self.stream = 0, 0, 0, 0
        needed = solver.clients or 1
        until = time.monotonic() + wait
        while len(nodes := self.nodes()) < needed:
            if time.monotonic() > until:
                raise FlowerError(
                    f"{name_of(solver)}(clients={solver.clients}) samples more clients than the {len(nodes)} "
                    f"nodes that have connected within {wait:g} seconds: start more nodes, or lower clients."
                )
            time.sleep(min(1.0, wait / 10))

    @property
    def key(self) -> StepKey:
        """The step's, for what the server draws by itself."""
        return StepKey(jax.random.key(self.seed), jnp.uint32(self.step), jnp.uint32(0))

    def nodes(self) -> list[int]:
        return sorted(int(node) for node in self.grid.get_node_ids())

    def sample(self, size: int | None = None, chains: bool = False) -> tuple[list[int], dict[int, float]]:
        """Nodes of one round, and how much likelier than on average each was to be drawn (empty: all alike).

        Without replacement, and all where the solver samples all; with unequal numbers of samples, unless all take part
        (and have no `chains` of their own), by their shares of the lower level's, as `InProcess` does. Node ids stay
        Python integers.
        """
        nodes = self.nodes()
        count = min((self.solver.clients or len(nodes)) if size is None else size, len(nodes))
        generator = np.random.default_rng((self.seed, self.step, self.stream))
        drawn = {node: self.share(node, "lower") for node in nodes}
        if len(set(drawn.values())) == 1 or (count == len(nodes) and not chains):
            return [nodes[i] for i in generator.permutation(len(nodes))[:count]], {}
        ends = np.cumsum(list(drawn.values()))
        places = (np.arange(count) + generator.random()) * (ends[-1] / max(count, 1))
        picked = np.minimum(np.searchsorted(ends, places, side="right"), len(nodes) - 1)
        return [nodes[i] for i in generator.permutation(picked)], drawn

    # ------------------------------------------------------------ the engine

    def round(self, draw: int, chains: bool = False) -> _Round:
        """Every ask samples its own."""
        return _Round(self, chains)

    def repeat(
        self, draw: int, count: int, body: Callable[[Any, PyTree], PyTree], carry: PyTree, chains: bool = False
    ) -> PyTree:
        """`count` rounds, one after the other."""
        for _ in range(count):
            carry = body(_Round(self, chains), carry)
        return carry

    def curvature(self, x: PyTree, y: PyTree) -> float:
        """The largest that any node has; all are asked."""
        answers = self.exchange("curvature", dict.fromkeys(self.nodes(), Point(x, y, None)))
        if not answers:
            raise _NobodyAnsweredError
        return max(float(answer.value) for answer in answers.values())

    def ask(
        self, oracle: Any, sent: Point, own: PyTree = None, only: Any = None, *, chains: bool = False, **options: Any
    ) -> Answers:
        """One exchange, see `InProcess`'s; a row of `own` whose node did not answer is dropped."""
        kind = oracle.__name__
        if own is None:
            nodes, drawn = self.sample(None, chains)
            heard = self.exchange(kind, dict.fromkeys(nodes, sent), **options)
            rows = [i for i, node in enumerate(nodes) if node in heard]
            place, answers = dict(enumerate(nodes)), {i: heard[nodes[i]] for i in rows}
        else:
            count = jax.tree.leaves(own)[0].shape[0]
            moving = range(count) if only is None else np.flatnonzero(only).tolist()
            nodes, drawn = self.sample(len(moving), chains)
            place = dict(zip(moving, nodes, strict=False))
            answers = self._handed(kind, sent, place, **options)
            rows = [i for i in range(count) if i in answers or i not in moving]
            own = jax.tree.map(lambda a: a[np.asarray(rows, int)], own)
        if not rows:
            raise _NobodyAnsweredError
        weighed = {i: self._weighed(place[i], answer, drawn) for i, answer in answers.items()}
        if only is not None:  # rows that needed no answer have zeros in its place
            like = next(iter(weighed.values()), Point(None, None, jax.tree.map(lambda a: a[0], sent.v)))
            weighed = dict.fromkeys(rows, jax.tree.map(np.zeros_like, like)) | weighed
        each = jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *(weighed[i] for i in rows))
        values = [
            self.weight(place[i], "upper", drawn) * answer.value
            for i, answer in answers.items()
            if answer.value is not None
        ]
        middle = jnp.median if self.average == "median" else jnp.mean
        value = middle(jnp.asarray(values)) if values else None
        if self.average == "median" and own is None:  # every row is the median, and so is their mean
            each = jax.tree.map(lambda a: jnp.broadcast_to(jnp.median(a, axis=0), a.shape).astype(a.dtype), each)
        return Answers(value, each, own)

    def _handed(self, kind: str, sent: Point, place: dict[int, int], **options: Any) -> dict[int, Terms]:
        """The answers by row, each row of `sent.v` sent to its node: a node that has several is asked once for each."""
        answers: dict[int, Terms] = {}
        while place:
            now = {node: i for i, node in place.items()}
            v = {node: jax.tree.map(lambda a, i=i: a[i], sent.v) for node, i in now.items()}
            heard = self.exchange(kind, {node: Point(sent.x, sent.y, v[node]) for node in v}, **options)
            answers |= {now[node]: answer for node, answer in heard.items()}
            place = {i: node for i, node in place.items() if now[node] != i}
        return answers

    def _weighed(self, node: int, answer: Terms, drawn: dict[int, float]) -> Point:
        def part(terms: Point, level: str) -> Point:
            return jax.tree.map(lambda a: np.asarray(self.weight(node, level, drawn) * a, a.dtype), terms)

        return combined(part(answer.lower, "lower"), part(answer.upper, "upper"))

    def weight(self, node: int, level: str, drawn: dict[int, float]) -> float:
        """How much a client's answer counts: its share, over how much likelier it was to be drawn."""
        return self.share(node, level) / drawn.get(node, 1.0)

    def share(self, node: int, level: str) -> float:
        """How much a client counts in a level: 1 on average over the clients heard of, and for the others."""
        known = self.samples[level]
        if self.solver.weighting == "clients" or self.average == "median" or node not in known:
            return 1.0
        return known[node] * len(known) / sum(known.values())

    # ------------------------------------------------------------ the transport

    def exchange(self, kind: str, payloads: dict[int, Point], **options: Any) -> dict[int, Terms]:
        """The answers by node, without those that failed, were late or are not finite."""
        self.stream += 1
        self.rounds += 1
        options = {name: [float(n) for n in o] if isinstance(o, tuple) else o for name, o in options.items()}
        options |= {"seed": self.seed, "step": self.step, "stream": self.stream}
        messages = [
            Message(_pack(point, options), dst_node_id=node, message_type=_PREFIX + kind, group_id=str(self.step))
            for node, point in payloads.items()
        ]
        self.floats += sum(_numbers(message.content) for message in messages)
        answers: dict[int, Terms] = {}
        reasons: dict[int, str] = {}
        broken: set[int] = set()
        heard = {}
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            node = int(reply.metadata.src_node_id)
            if node not in payloads or node in answers or node in reasons:
                continue  # nobody asked, or a second answer
            if reply.has_error():
                said = (reply.error.reason or f"error {reply.error.code}").strip().splitlines()
                reasons[node] = said[-1][:300] if said else "an error without words"
                continue
            try:
                answers[node], heard[node] = _read(kind, reply.content, self.like)
            except _BrokenError as error:
                reasons[node] = f"a broken answer: {error}"
                broken.add(node)
        for node, why in self._outliers(kind, answers).items():
            del answers[node]
            reasons[node] = f"a broken answer: {why}"
            broken.add(node)
        for node, answer in answers.items():
            self.floats += sum(int(np.size(leaf)) for leaf in jax.tree.leaves(answer))
            for level, counts in self.samples.items():
                counts[node] = heard[node][level]
        silence = f"no answer within {self.timeout} seconds" if self.timeout else "no answer"
        for node in payloads:
            if node not in answers:
                lost = Missing(self.step, kind, node, reasons.get(node, silence), node in broken)
                self.missing.append(lost)
                logger.warning("left out of the averages: %s", lost)
        return self._clipped(answers)

    def _outliers(self, kind: str, answers: dict[int, Terms]) -> dict[int, str]:
        """Answers of another order of magnitude than all that was heard, and why.

        A part of an answer is held against the median of the round's (of two, the smaller), or the largest such median
        of the rounds before where that is more: near a solution most gradients vanish.
        """
        found: dict[int, str] = {}
        for name in ("value", "lower.x", "lower.y", "lower.v", "upper.x", "upper.y", "upper.v"):
            sizes = {node: _size(answer, name) for node, answer in answers.items() if _part(answer, name) is not None}
            if not sizes:
                continue
            typical = max(sorted(sizes.values())[(len(sizes) - 1) // 2], self.typical.get((kind, name), 0.0))
            if len(sizes) > 1 or (kind, name) in self.typical:
                for node, size in sizes.items():
                    if 0 < _OUTLIER * typical < size:
                        found[node] = f"{name} is {size:.1e} in size, and {typical:.1e} is usual"
            self.typical[kind, name] = typical
        return found

    def _clipped(self, answers: dict[int, Terms]) -> dict[int, Terms]:
        """Each part of each answer at most `clip` times as long as the median of the round's."""
        if self.clip is None:
            return answers
        changed = {node: {"lower": answer.lower, "upper": answer.upper} for node, answer in answers.items()}
        for name in ("lower.x", "lower.y", "lower.v", "upper.x", "upper.y", "upper.v"):
            level, variable = name.split(".")
            sizes = {node: _size(answer, name) for node, answer in answers.items() if _part(answer, name) is not None}
            most = self.clip * sorted(sizes.values())[(len(sizes) - 1) // 2] if sizes else 0.0
            for node, size in sizes.items():
                if size > most:
                    point = changed[node][level]
                    shorter = jax.tree.map(
                        lambda a, s=most / size: np.asarray(a * s, a.dtype), getattr(point, variable)
                    )
                    changed[node][level] = dataclasses.replace(point, **{variable: shorter})
        return {node: Terms(answers[node].value, **parts) for node, parts in changed.items()}


def _part(answer: Terms, name: str) -> PyTree:
    """A part of an answer by its name; None where it has none."""
    level, _, variable = name.partition(".")
    found = getattr(getattr(answer, level), variable) if variable else getattr(answer, level)
    return found if jax.tree.leaves(found) else None


def _size(answer: Terms, name: str) -> float:
    return math.hypot(*(_norm(leaf) for leaf in jax.tree.leaves(_part(answer, name))))


@dataclasses.dataclass(frozen=True)
class _Round:
    """Who answers the asks of one round of a server."""

    server: _Server
    chains: bool = False

    def pass_on(self, chains: PyTree) -> PyTree:
        """Every ask hands its rows to nodes at random."""
        return chains

    def ask(self, *args: Any, **options: Any) -> Answers:
        """One exchange with nodes of its own."""
        return self.server.ask(*args, chains=self.chains, **options)


@explained
def run(
    grid: Grid,
    solver: Federated,
    x0: PyTree,
    y0: PyTree,
    *,
    steps: int,
    key: int = 0,
    timeout: float | None = None,
    wait: float = 60.0,
    retries: int = 3,
    clip: float | None = None,
    average: Literal["mean", "median"] = "mean",
    callback: Callable[[int, PyTree, PyTree, dict[str, float]], Any] | None = None,
) -> Solution:
    """Run a federated solver over a Grid: the body of a `ServerApp`'s main.

    Args:
      grid: Flower's Grid, or an `InProcessGrid`.
      solver: `federated.SimFBO(...)`, `FedBiO(...)`, `FedMBO(...)` or `AggITD(...)`.
      x0, y0: where to start; shaped as the clients' `setup` says.
      steps: outer steps.
      key: a seed: who is sampled, and each client's batches.
      timeout: seconds to wait for answers in each exchange; later ones are left out. None: for ever, which waits for
        dead clients too.
      wait: seconds to wait at the start until as many nodes have connected as a round samples.
      retries: how often a step in which nobody answered is tried again with other clients before the run ends.
      clip: no client's gradient, or other part of an answer, is longer than so many times the median of the round's;
        2 or 3 bound what one client can do and leave honest ones alone. None: no bound but that of other orders of
        magnitude.
      average: "median" takes the median of each coordinate over clients in place of their mean: half of them less one
        may answer anything. It is not the objective's gradient where clients differ, and they count alike. Methods that
        hand chains on (`FedMBO`) take it where they average, and not along the chains.
      callback: `(step, x, y, metrics)` after each step, for progress or saving; returning True ends the run.

    Returns:
      A `Solution`; its `state.missing` lists every answer that did not come or was broken, its history counts them at
      each step ("missing_clients", and of those "broken_replies"), its `reason` sums them up, and
      `state.server` is the solver's own state.

    Raises:
      FlowerError: too few nodes, or a solver that cannot run here.
    """
    if not isinstance(solver, Federated) or not set(solver.asks) <= set(_ORACLES.values()):
        raise FlowerError(
            f"{solver!r} does not run over Flower: take federated.SimFBO or FedBiO with one number of local steps, "
            "FedMBO or AggITD."
        )
    if clip is not None and not (isinstance(clip, numbers.Real) and 1 <= clip < math.inf):
        raise FlowerError(f"run(clip={clip!r}): a number from 1 on, times the median length; or None.")
    if average not in ("mean", "median"):
        raise FlowerError(f"run(average={average!r}): 'mean' or 'median'.")
    began = time.perf_counter()
    server = _Server(grid, solver, x0, y0, key, timeout, wait, clip, average)
    x, y = (jax.tree.map(jnp.asarray, tree) for tree in (x0, y0))
    state = None
    values: dict[str, list[float]] = collections.defaultdict(list)
    result, reason, done, tries = Result.COMPLETED, "", 0, 0
    while done < steps:
        server.step, server.rounds, server.floats, lost = done, 0, 0, len(server.missing)
        if tries == 0:
            server.stream = 0
        try:
            state = solver.begin(server, x, y) if state is None else state
            state, found = solver.advance(server, state)
        except _NobodyAnsweredError:
            tries += 1
            if tries <= retries:
                continue
            result = Result.INTERRUPTED
            reason = f"Nobody answered in step {done}, {tries} times. x and y are those of the step before."
            break
        tries, done, x, y = 0, done + 1, state.x, state.y
        metrics = {name: float(value) for name, value in found.items()} | {
            "communication_rounds": server.rounds,
            "communication_floats": server.floats,
            "missing_clients": len(server.missing) - lost,
            "broken_replies": sum(answer.broken for answer in server.missing[lost:]),
        }
        for name, value in metrics.items():
            values[name].append(float(value))
        if callback is not None and callback(done, x, y, metrics) is True:
            result = Result.STOPPED
            break
    if server.missing:
        shown = "; ".join(map(str, server.missing[:5])) + ("; ..." if len(server.missing) > 5 else "")
        reason = " ".join(part for part in (reason, f"{len(server.missing)} answers were left out: {shown}.") if part)
    history = History({k: np.asarray(v) for k, v in values.items()}, {k: np.arange(len(v)) for k, v in values.items()})
    ended = FlowerState(state, tuple(server.missing))
    return Solution(x, y, result, history, ended, done, time.perf_counter() - began, solver, reason)


# ---------------------------------------------------------------- a grid without a network


@explained_class
class InProcessGrid(Grid):
    """All clients in this process, one after the other: no start-up, no network; for tests and for trying an app out.

    Args:
      app: the `ClientApp`.
      nodes: how many clients; node i is told `partition-id` i of `num-partitions` nodes.
      run_config: what the clients' contexts hold as their run's configuration.
      lost: `(node, message) -> bool`, asked before each delivery: True, and the answer never comes (a killed or late
        client).
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: int,
        run_config: dict[str, Any] | None = None,
        lost: Callable[[int, Message], bool] | None = None,
    ) -> None:
        # Message() reads them; Flower's engines set them, and so does this one.
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.app, self.lost = app, lost
        self.contexts = {
            1000 + i: Context(
                run_id=1,
                node_id=1000 + i,
                node_config={"partition-id": i, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for i in range(nodes)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Nothing to set."""

    @property
    def run(self) -> Any:
        """There is no run."""
        raise NotImplementedError("An InProcessGrid has no Run.")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Sequence[str]:
        """Deliver, and keep the answers."""
        names = []
        for message in messages:
            node, name = message.metadata.dst_node_id, f"{len(self._replies)}-{time.monotonic_ns()}"
            names.append(name)
            if self.lost is not None and self.lost(node, message):
                continue
            try:
                self._replies[name] = self.app(message, self.contexts[node])
            except Exception as error:  # as the engines do: a client's exception becomes an error message
                self._replies[name] = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that came."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver and collect."""
        return self.pull_messages(self.push_messages(messages))
