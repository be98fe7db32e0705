"""Federated bilevel optimisation across silos with Flower: the data stay where they are, oracles' answers travel.

The extra `flower` installs it (`pip install 'bilevel[flower]'`; best into an environment of its own: it pins widely
used packages). Two sides:

    app = flower.client_app(setup)          # on each client: setup(context) -> (problem on its own data, x, y)

    app = ServerApp()
    @app.main()
    def main(grid, context):
        solution = flower.run(grid, federated.SimFBO(10), x0, y0, steps=100)

The solvers are those of `solvers.federated`: `SimFBO` (one exchange per step) and `FedMBO` (its chains handed from
client to client). Each oracle is a message type of its own, `train.grad_y`, `train.f_y`, `train.hvp`, `train.hyper`,
`train.simfbo`, `train.curvature`, so that a site can allow, log or add noise to each by itself.

A client that fails, or is late (`timeout`), is left out of that round's averages, named in the log and in
`solution.state.missing`, and may be asked again in later rounds. The run goes on.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import derivatives
from bilevel.data import Agents, Minibatches, StepKey
from bilevel.history import History
from bilevel.optimizers import as_optimizer
from bilevel.problem import Problem
from bilevel.result import Result
from bilevel.solution import Solution
from bilevel.solvers import _agents
from bilevel.solvers.federated._round import Round
from bilevel.solvers.federated.hypergradients import ParallelHypergradient
from bilevel.solvers.federated.nested import FederatedNested
from bilevel.solvers.federated.simfbo import FederatedSingleLoop

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
except ImportError as error:  # pragma: no cover
    raise ImportError(f"bilevel.integrations.flower needs Flower ({error}): pip install 'flwr>=1.40,<1.42'.") from error

PyTree = Any

__all__ = ["FlowerError", "FlowerState", "InProcessGrid", "Missing", "client_app", "run"]

logger = logging.getLogger("bilevel")

_PREFIX = "train."


class FlowerError(RuntimeError):
    """The run cannot start or go on; the message says who is missing, and what to do."""


# ---------------------------------------------------------------- what travels


def _pack(trees: dict[str, PyTree], config: dict[str, Any]) -> RecordDict:
    """Trees as one record of arrays, `name/number of the leaf`; the other side knows the structures."""
    arrays = {
        f"{name}/{i}": Array(np.asarray(leaf))
        for name, tree in trees.items()
        for i, leaf in enumerate(jax.tree.leaves(tree))
    }
    return RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord(config)})


def _unpack(content: RecordDict, templates: dict[str, PyTree]) -> dict[str, PyTree]:
    """The trees that are there, with the structures of the templates; an error where a shape is another."""
    found = {}
    arrays = {name: array.numpy() for name, array in content["arrays"].items()}
    for name, template in templates.items():
        leaves, structure = jax.tree.flatten(template)
        mine = [arrays.get(f"{name}/{i}") for i in range(len(leaves))]
        if any(leaf is None for leaf in mine):
            continue
        for leaf, like in zip(mine, leaves, strict=True):
            assert leaf is not None
            if leaf.shape != np.shape(like):
                raise FlowerError(
                    f"{name} came with the shape {leaf.shape}, expected {np.shape(like)}: server and clients "
                    f"must be given equal models."
                )
        found[name] = jax.tree.unflatten(structure, mine)
    return found


def _numbers(content: RecordDict) -> int:
    return sum(int(np.prod(array.shape)) for array in content["arrays"].values())


# ---------------------------------------------------------------- the client


def client_app(setup: Callable[[Context], tuple[Problem, PyTree, PyTree]]) -> ClientApp:
    """A `ClientApp` that answers the oracles on this client's data.

    Args:
      setup: `context -> (problem, x, y)`: the problem with this client's samples alone (arrays for full batches, or
        `data.Minibatches`), and variables of the right shapes (their values are not used). Called once per process;
        `context.node_config` says which partition this node has.
    """
    app = ClientApp()

    ready: dict[int, tuple[Problem, PyTree, PyTree]] = {}

    def answer(kind: str) -> Callable[[Message, Context], Message]:
        def respond(message: Message, context: Context) -> Message:
            if context.node_id not in ready:
                problem, x, y = setup(context)
                alone = dataclasses.replace(
                    problem, upper_data=_alone(problem.upper_data), lower_data=_alone(problem.lower_data)
                )
                ready[context.node_id] = (alone, x, y)
            problem, x, y = ready[context.node_id]
            given = _unpack(message.content, {"x": x, "y": y, "z": y, "p": y})
            config = message.content["config"]
            base = jax.random.key(int(config["seed"]))
            base = jax.random.fold_in(base, context.node_id % 2**32)
            key = StepKey(base, jnp.uint32(config["step"]), jnp.uint32(config["stream"]))
            steps = tuple(float(s) for s in config.get("steps", ()))
            trees = _ORACLES[kind](problem, given, key, int(config.get("local_steps", 1)), steps)
            counts = {f"{level}_samples": _samples(getattr(problem, f"{level}_data")) for level in ("upper", "lower")}
            return Message(_pack(jax.tree.map(np.asarray, trees), counts), reply_to=message)

        return respond

    for kind in _ORACLES:
        app.train(kind)(answer(kind))
    return app


def _alone(data: Any) -> Any:
    """This client's samples as those of one agent."""
    if data is None:
        return None
    arrays, size = (data.arrays, data.size) if isinstance(data, Minibatches) else (data, None)
    return Agents(jax.tree.map(lambda a: jnp.asarray(a)[None], arrays), size)


def _samples(data: Any) -> int:
    return 1 if data is None else data.samples


@functools.partial(jax.jit, static_argnames=("local_steps",))
def _grad_y(
    problem: Problem, given: dict[str, PyTree], key: StepKey, local_steps: int, steps: Any
) -> dict[str, PyTree]:
    at = Round(problem, key)
    x, y = at.copies((given["x"], given["y"]))
    return {"gradient": _agents.mean(jax.grad(at.lower(), argnums=1)(x, y))}


@functools.partial(jax.jit, static_argnames=("local_steps",))
def _f_y(problem: Problem, given: dict[str, PyTree], key: StepKey, local_steps: int, steps: Any) -> dict[str, PyTree]:
    at = Round(problem, key)
    x, y = at.copies((given["x"], given["y"]))
    return {"gradient": _agents.mean(jax.grad(at.upper(), argnums=1)(x, y))}


@functools.partial(jax.jit, static_argnames=("local_steps",))
def _hvp(problem: Problem, given: dict[str, PyTree], key: StepKey, local_steps: int, steps: Any) -> dict[str, PyTree]:
    at = Round(problem, key)
    x, y, p = at.copies((given["x"], given["y"], given["p"]))
    return {"product": _agents.mean(derivatives.hvp(at.lower(), x, y, p))}


@functools.partial(jax.jit, static_argnames=("local_steps",))
def _hyper(problem: Problem, given: dict[str, PyTree], key: StepKey, local_steps: int, steps: Any) -> dict[str, PyTree]:
    at = Round(problem, key)
    x, y, p = at.copies((given["x"], given["y"], given["p"]))
    value, F_x = jax.value_and_grad(at.upper(), argnums=0)(x, y)
    cross = derivatives.cross_product(at.lower(), x, y, p)
    return {"value": value, "direct": _agents.mean(F_x), "cross": _agents.mean(cross)}


@functools.partial(jax.jit, static_argnames=("local_steps",))
def _simfbo(
    problem: Problem, given: dict[str, PyTree], key: StepKey, local_steps: int, steps: Any
) -> dict[str, PyTree]:
    """The sums of the local directions, divided by the number of local steps, upper and lower parts apart for their
    weights."""
    at = Round(problem, key)
    here = at.copies((given["x"], given["y"], given["z"]))

    def local(k: Any, carry: Any) -> Any:
        (x, y, z), total, first = carry
        sample = at.key.inner(k, local_steps) if local_steps > 1 else at.key
        value, (F_x, F_y) = jax.value_and_grad(at.upper(sample), argnums=(0, 1))(x, y)
        lower = derivatives.linearised(at.lower(sample), x, y)
        cross, product = lower.products(z)
        D = (optax.tree.sub(F_x, cross), lower.gradient_y, optax.tree.sub(product, F_y))
        moved = tuple(
            jax.tree.map(lambda v, d, s=s: v - s * d, v, d) for s, v, d in zip(steps, (x, y, z), D, strict=True)
        )
        return (
            moved,
            optax.tree.add(total, (F_x, cross, lower.gradient_y, product, F_y)),
            jnp.where(k == 0, value, first),
        )

    x, y, _ = here
    value = jax.eval_shape(at.upper(), x, y)
    start = (here, optax.tree.zeros_like((x, x, y, y, y)), jnp.zeros(value.shape, value.dtype))
    _, total, value = jax.lax.fori_loop(0, local_steps, local, start)
    names = ("direct", "cross", "gradient", "product", "upper_gradient")
    return {
        "value": value,
        **{name: optax.tree.scale(1 / local_steps, _agents.mean(t)) for name, t in zip(names, total, strict=True)},
    }


def _curvature(
    problem: Problem, given: dict[str, PyTree], key: StepKey, local_steps: int, steps: Any
) -> dict[str, PyTree]:
    at = Round(problem, key)
    x, y = at.copies((given["x"], given["y"]))
    return {"value": _agents.largest_curvature(problem, x, y, key)}


_ORACLES: dict[str, Callable[..., dict[str, PyTree]]] = {
    "grad_y": _grad_y, "f_y": _f_y, "hvp": _hvp, "hyper": _hyper, "simfbo": _simfbo, "curvature": _curvature,
}  # fmt: skip


# ---------------------------------------------------------------- the server


@dataclasses.dataclass(frozen=True)
class Missing:
    """An answer that did not come: the step, the message type, the node, and why."""

    step: int
    kind: str
    node: int
    reason: str

    def __str__(self) -> str:
        return f"node {self.node} in step {self.step} ({_PREFIX}{self.kind}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class FlowerState:
    """The server's variables at the end, and the answers that did not come. `z` is None where the method keeps none."""

    x: PyTree
    y: PyTree
    z: PyTree
    missing: tuple[Missing, ...]


class _Server:
    """Rounds over a Grid: who is asked, what came back, who did not answer, what was sent."""

    def __init__(
        self, grid: Grid, solver: Any, x: PyTree, y: PyTree, seed: int, timeout: float | None, wait: float
    ) -> None:
        self.grid, self.solver, self.seed, self.timeout = grid, solver, seed, timeout
        self.templates = {"x": x, "y": y}
        self.missing: list[Missing] = []
        self.samples: dict[str, dict[int, int]] = {"upper": {}, "lower": {}}
        self.rounds, self.floats, self.step, self.stream = 0, 0, 0, 0
        needed = solver.clients or 1
        until = time.monotonic() + wait
        while len(nodes := self.nodes()) < needed:
            if time.monotonic() > until:
                raise FlowerError(
                    f"{type(solver).__name__}(clients={solver.clients}) samples more clients than the "
                    f"{len(nodes)} nodes that have connected "
                    f"within {wait:g} seconds: start more nodes, or lower clients."
                )
            time.sleep(min(1.0, wait / 10))

    def nodes(self) -> list[int]:
        return sorted(int(node) for node in self.grid.get_node_ids())

    def sample(self, size: int | None = None) -> list[int]:
        """Nodes of one round, without replacement; all where the solver samples all. Node ids stay Python integers."""
        nodes = self.nodes()
        count = min(self.solver.clients or len(nodes), len(nodes)) if size is None else min(size, len(nodes))
        order = np.random.default_rng((self.seed, self.step, self.stream)).permutation(len(nodes))
        return [nodes[i] for i in order[:count]]

    def ask(
        self, kind: str, payloads: dict[int, dict[str, PyTree]], templates: dict[str, PyTree], **config: Any
    ) -> dict[int, dict[str, PyTree]]:
        """One exchange: the answers by node, without those that failed or were late."""
        self.stream += 1
        self.rounds += 1
        config = {"seed": self.seed, "step": self.step, "stream": self.stream, **config}
        messages = [
            Message(_pack(trees, config), dst_node_id=node, message_type=_PREFIX + kind, group_id=str(self.step))
            for node, trees in payloads.items()
        ]
        self.floats += sum(_numbers(message.content) for message in messages)
        answers, reasons = {}, {}
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            node = int(reply.metadata.src_node_id)
            if reply.has_error():
                reasons[node] = (reply.error.reason or f"error {reply.error.code}").strip().splitlines()[-1]
                continue
            self.floats += _numbers(reply.content)
            for level, counts in self.samples.items():
                counts[node] = int(reply.content["config"][f"{level}_samples"])
            answer = _unpack(reply.content, templates)
            broken = [
                name
                for name, tree in answer.items()
                if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
            ]
            if broken:
                reasons[node] = f"its {broken[0]} is not finite"
            else:
                answers[node] = answer
        for node in payloads:
            if node not in answers:
                lost = Missing(
                    self.step,
                    kind,
                    node,
                    reasons.get(node, f"no answer within {self.timeout} seconds" if self.timeout else "no answer"),
                )
                self.missing.append(lost)
                logger.warning("left out of the averages: %s", lost)
        return answers

    def weight(self, node: int, level: str) -> float:
        """How much a client counts: 1 on average over the clients heard of."""
        if self.solver.weighting == "clients":
            return 1.0
        known = self.samples[level]
        return known[node] * len(known) / sum(known.values())

    def mean(self, answers: dict[int, dict[str, PyTree]], name: str, level: str) -> PyTree:
        """The weighted mean over those who answered."""
        trees = [optax.tree.scale(self.weight(node, level), answer[name]) for node, answer in answers.items()]
        return jax.tree.map(lambda *leaves: jnp.asarray(np.mean(leaves, axis=0), leaves[0].dtype), *trees)


class _NobodyAnsweredError(Exception):
    pass


def _somebody(answers: dict[int, Any]) -> dict[int, Any]:
    if not answers:
        raise _NobodyAnsweredError
    return answers


def run(
    grid: Grid,
    solver: Any,
    x0: PyTree,
    y0: PyTree,
    *,
    steps: int,
    key: int = 0,
    timeout: float | None = None,
    wait: float = 60.0,
    retries: int = 3,
    callback: Callable[[int, PyTree, PyTree, dict[str, float]], Any] | None = None,
) -> Solution:
    """Run a federated solver over a Grid: the body of a `ServerApp`'s main.

    Args:
      grid: Flower's Grid, or an `InProcessGrid`.
      solver: `federated.SimFBO(...)`, `FedBiO(...)` or `FedMBO(...)`.
      x0, y0: where to start; shaped as the clients' `setup` says.
      steps: outer steps.
      key: a seed: who is sampled, and each client's batches.
      timeout: seconds to wait for answers in each exchange; later ones are left out. None: for ever, which waits for
        dead clients too.
      wait: seconds to wait at the start until as many nodes have connected as a round samples.
      retries: how often a step in which nobody answered is tried again with other clients before the run ends.
      callback: `(step, x, y, metrics)` after each step, for progress or saving; returning True ends the run.

    Returns:
      A `Solution`; its `state.missing` lists every answer that did not come, its `reason` sums them up.

    Raises:
      FlowerError: too few nodes, or a solver that cannot run here.
    """
    take: Callable[..., Any]
    if isinstance(solver, FederatedSingleLoop) and isinstance(solver.local_steps, int):
        take, memory = _simfbo_step, _single_loop_memory(solver, x0, y0)
    elif (
        isinstance(solver, FederatedNested)
        and solver.lower == "minibatch"
        and isinstance(solver.hypergradient, ParallelHypergradient)
        and solver.local_upper_steps == 1
    ):
        take, memory = _fedmbo_step, _nested_memory(solver, x0, y0)
    else:
        raise FlowerError(
            f"{solver!r} does not run over Flower: take federated.SimFBO, FedBiO (one number of local steps) or FedMBO."
        )
    began = time.perf_counter()
    server = _Server(grid, solver, x0, y0, key, timeout, wait)
    x, y = (jax.tree.map(jnp.asarray, tree) for tree in (x0, y0))
    values: dict[str, list[float]] = collections.defaultdict(list)
    result, reason, done, tries = Result.MAX_STEPS, "", 0, 0
    while done < steps:
        server.step, server.rounds, server.floats, lost = done, 0, 0, len(server.missing)
        if tries == 0:
            server.stream = 0
        try:
            x, y, memory, metrics = take(server, solver, x, y, memory)
        except _NobodyAnsweredError:
            tries += 1
            if tries > retries:
                result, reason = (
                    Result.INTERRUPTED,
                    f"Nobody answered in step {done}, {tries} times. x and y are those of the step before.",
                )
                break
            continue
        tries, done = 0, done + 1
        metrics |= {
            "communication_rounds": server.rounds,
            "communication_floats": server.floats,
            "missing_clients": len(server.missing) - lost,
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
    state = FlowerState(x, y, memory.get("z"), tuple(server.missing))
    return Solution(x, y, result, history, state, done, time.perf_counter() - began, solver, reason)


def _stepped(rule: Any, direction: PyTree, memory: PyTree, variable: PyTree) -> tuple[PyTree, PyTree]:
    updates, memory = as_optimizer(rule).update(direction, memory, variable)
    return optax.apply_updates(variable, updates), memory


def _single_loop_memory(solver: FederatedSingleLoop, x: PyTree, y: PyTree) -> dict[str, Any]:
    rules = {name: as_optimizer(getattr(solver, f"{name}_optimizer")) for name in ("upper", "lower", "linear")}
    return {
        "z": optax.tree.zeros_like(y),
        "upper": rules["upper"].init(x),
        "lower": rules["lower"].init(y),
        "linear": rules["linear"].init(y),
    }


def _simfbo_step(server: _Server, solver: FederatedSingleLoop, x: PyTree, y: PyTree, memory: dict[str, Any]) -> Any:
    """One exchange: (x, y, z) down, summed local directions up."""
    z, local_steps = memory["z"], int(solver.local_steps)  # type: ignore[arg-type]
    walk = [0.0, 0.0, 0.0]
    if local_steps > 1:
        own = [(getattr(solver, f"local_{n}"), getattr(solver, f"{n}_optimizer")) for n in ("upper", "lower", "linear")]
        walk = [float(theirs if mine is None else mine * local_steps) / local_steps for mine, theirs in own]
    like = {"value": jnp.zeros(()), "direct": x, "cross": x, "gradient": y, "product": y, "upper_gradient": y}
    payloads = {node: {"x": x, "y": y, "z": z} for node in server.sample()}
    answers = _somebody(server.ask("simfbo", payloads, like, local_steps=local_steps, steps=walk))
    mean = functools.partial(server.mean, answers)
    D_x = optax.tree.sub(mean("direct", "upper"), mean("cross", "lower"))
    D_y = mean("gradient", "lower")
    D_z = optax.tree.sub(mean("product", "lower"), mean("upper_gradient", "upper"))
    x, upper = _stepped(solver.upper_optimizer, D_x, memory["upper"], x)
    y, lower = _stepped(solver.lower_optimizer, D_y, memory["lower"], y)
    z, linear = _stepped(solver.linear_optimizer, D_z, memory["linear"], z)
    if solver.radius is not None:
        z = optax.projections.projection_l2_ball(z, solver.radius)
    metrics = {
        "upper_loss": mean("value", "upper"),
        "hypergradient_norm": derivatives.norm(D_x),
        "lower_residual": derivatives.norm(D_y),
    }
    return x, y, {"z": z, "upper": upper, "lower": lower, "linear": linear}, metrics


def _nested_memory(solver: FederatedNested, x: PyTree, y: PyTree) -> dict[str, Any]:
    return {
        "upper": as_optimizer(solver.upper_optimizer).init(x),
        "lower": as_optimizer(solver.lower_optimizer).init(y),
        "L": solver.curvature,
    }


def _fedmbo_step(server: _Server, solver: FederatedNested, x: PyTree, y: PyTree, memory: dict[str, Any]) -> Any:
    """Minibatch rounds for y, then chains that go from client to client; a chain whose client did not answer is
    dropped."""
    estimator, moments, L = solver.hypergradient, memory["lower"], memory["L"]
    if L is None:
        answers = _somebody(
            server.ask("curvature", {node: {"x": x, "y": y} for node in server.nodes()}, {"value": jnp.zeros(())})
        )
        L = 1.2 * max(float(answer["value"]) for answer in answers.values())
    for _ in range(solver.lower_rounds):
        answers = _somebody(server.ask("grad_y", {node: {"x": x, "y": y} for node in server.sample()}, {"gradient": y}))
        G = server.mean(answers, "gradient", "lower")
        y, moments = _stepped(solver.lower_optimizer, G, moments, y)

    answers = _somebody(server.ask("f_y", {node: {"x": x, "y": y} for node in server.sample()}, {"gradient": y}))
    first = estimator.terms if estimator.random else 1.0

    def scale(tree, w):
        return jax.tree.map(lambda a: np.asarray(w * a, a.dtype), tree)

    chains = [scale(answer["gradient"], first * server.weight(node, "upper")) for node, answer in answers.items()]
    sums = list(chains)
    lengths = np.random.default_rng((server.seed, server.step, server.stream, 1)).integers(
        0, estimator.terms, len(chains)
    )
    lengths = lengths if estimator.random else np.full(len(chains), estimator.terms)
    alive = list(range(len(chains)))
    for j in range(estimator.terms - 1):
        moving = [i for i in alive if j < lengths[i]]
        if not moving:
            break
        place = dict(zip(server.sample(len(moving)), moving, strict=False))
        answers = server.ask(
            "hvp", {node: {"x": x, "y": y, "p": chains[i]} for node, i in place.items()}, {"product": y}
        )
        for node, i in place.items():
            if node not in answers:
                alive.remove(i)
                continue
            factor = server.weight(node, "lower") / L
            chains[i] = jax.tree.map(
                lambda p, hp, w=factor: np.asarray(p - w * hp, p.dtype), chains[i], answers[node]["product"]
            )
            sums[i] = chains[i] if estimator.random else jax.tree.map(np.add, sums[i], chains[i])
        alive = [i for i in alive if i not in moving or i in place.values()]
    _somebody(dict.fromkeys(alive))
    place = dict(zip(server.sample(len(alive)), alive, strict=False))
    payloads = {node: {"x": x, "y": y, "p": scale(sums[i], 1 / L)} for node, i in place.items()}
    answers = _somebody(server.ask("hyper", payloads, {"value": jnp.zeros(()), "direct": x, "cross": x}))
    h = optax.tree.sub(server.mean(answers, "direct", "upper"), server.mean(answers, "cross", "lower"))
    x, upper = _stepped(solver.upper_optimizer, h, memory["upper"], x)
    metrics = {
        "upper_loss": server.mean(answers, "value", "upper"),
        "hypergradient_norm": derivatives.norm(h),
        "lower_residual": derivatives.norm(G),
    }
    return x, y, {"upper": upper, "lower": moments, "L": L}, metrics


# ---------------------------------------------------------------- a grid without a network


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
        from flwr.supercore.task_identity import (
            TaskIdentity,
        )  # Message() reads them; the engines set them, and so does this one

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
