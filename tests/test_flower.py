"""Flower: the same iterates as in one process, clients that fail or are late, hostile input; no network needed."""

from __future__ import annotations

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributed_problems import arrays, lower, quadratic, solution, upper

from bilevel import Problem, data
from bilevel import run as run_here
from bilevel.solvers.federated import AggITD, FedBiO, FedMBO, FedNest, SimFBO

pytest.importorskip("flwr", reason="the optional extra `flower` is not installed")

from bilevel.integrations import flower

N, P, Q = 5, 3, 4


def _setup(size: int | None = None, samples: int = 1, noise: float = 0.0):
    up, low = arrays(N, 0.5, samples=samples, noise=noise)

    def setup(context):
        i = int(context.node_config["partition-id"])
        mine = [jax.tree.map(lambda a: a[i], level) for level in (up, low)]
        if size is not None:
            mine = [data.Minibatches(level, size) for level in mine]
        return Problem(upper, lower, *mine), jnp.zeros(P), jnp.zeros(Q)

    return setup


def _run(solver, steps: int, lost=None, setup=None, **options):
    grid = flower.InProcessGrid(flower.client_app(setup or _setup()), N, lost=lost)
    return flower.run(grid, solver, jnp.zeros(P), jnp.zeros(Q), steps=steps, **options)


@pytest.mark.parametrize(
    "solver", [SimFBO(None, 0.05, 0.2, 0.2), FedBiO(None, 0.02, 0.1, 0.1, local_steps=3)], ids=["simfbo", "fedbio"]
)
def test_full_participation_gives_the_iterates_of_one_process(solver, x64: None) -> None:
    problem, _ = quadratic(N, het=0.5)
    here, metrics = run_here(problem, solver, jnp.zeros(P), jnp.zeros(Q), 10)
    there = _run(solver, 10)
    np.testing.assert_allclose(there.x, here.x, atol=1e-13)
    np.testing.assert_allclose(there.y, here.y, atol=1e-13)
    np.testing.assert_allclose(there.state.server.v, here.v, atol=1e-13)
    np.testing.assert_allclose(there.history["upper_loss"], metrics["upper_loss"], atol=1e-12)
    assert there.history["communication_floats"][0] > N * (P + 2 * Q)
    assert (there.history["communication_rounds"] == 1).all() and there.state.missing == ()


def test_aggitd_runs_on_both_engines(x64: None) -> None:
    problem, _ = quadratic(N, het=0.5)
    solver = AggITD(None, 0.05, 0.2, 5)
    here, _ = run_here(problem, solver, jnp.zeros(P), jnp.zeros(Q), 4)
    there = _run(solver, 4)
    np.testing.assert_allclose(there.x, here.x, atol=1e-13)
    np.testing.assert_allclose(there.y, here.y, atol=1e-13)
    assert (there.history["communication_rounds"] == 6).all()


@pytest.mark.parametrize("chain", ["sum", "random"])
def test_fedmbo_chains_go_from_client_to_client(chain: str, x64: None) -> None:
    """It settles around x*: noise from the chains' routes only, which falls with the step."""
    problem, _ = quadratic(N, het=0.5)
    there = _run(FedMBO(3, 0.05, 0.2, lower_rounds=2, terms=6, chain=chain), 25)
    start = np.linalg.norm(solution(problem)[0])
    assert np.linalg.norm(there.x - solution(problem)[0]) < 0.7 * start
    assert there.history["communication_rounds"].max() <= 2 + 6 + 1 + 1  # the first step asks for the curvature too
    assert there.state.missing == ()


def test_a_client_killed_mid_round_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    """From step 4 on node 1002 never answers: the run completes, and every absence is in the report."""

    def dead(node, message):
        return node == 1002 and int(message.content["config"]["step"]) >= 4

    with caplog.at_level(logging.WARNING, "bilevel"):
        found = _run(SimFBO(None, 0.05, 0.2, 0.2), 10, lost=dead)
    assert found.steps == 10 and found.result.name == "COMPLETED"
    assert found.history["missing_clients"].tolist() == [0] * 4 + [1] * 6
    assert {m.node for m in found.state.missing} == {1002}
    assert "node 1002 in step 4 (train.simfbo): no answer" in found.reason
    assert "left out of the averages: node 1002" in caplog.text
    # The others' average: the same as a run of the four alone, from there on.
    assert np.isfinite(found.x).all()


def test_a_chain_whose_client_fails_is_dropped() -> None:
    def lost(node, message):
        return message.metadata.message_type == "train.hvp" and node == 1001

    found = _run(FedMBO(None, 0.05, 0.2, lower_rounds=1, terms=4), 4, lost=lost)
    assert found.steps == 4
    assert {(m.kind, m.node) for m in found.state.missing} == {("hvp", 1001)}


def test_errors_and_nonsense_of_clients_are_left_out() -> None:
    good = _setup()

    def setup(context):
        problem, x, y = good(context)
        if context.node_config["partition-id"] == 0:
            raise RuntimeError("disk full")
        if context.node_config["partition-id"] == 1:
            return (
                Problem(lambda x, y, b: jnp.nan * upper(x, y, b), lower, problem.upper_data, problem.lower_data),
                x,
                y,
            )
        return problem, x, y

    found = _run(SimFBO(None, 0.05, 0.2, 0.2), 3, setup=setup)
    assert found.steps == 3 and np.isfinite(found.x).all()
    reasons = {m.node: m.reason for m in found.state.missing}
    assert reasons[1000] == "RuntimeError: disk full" and "is not finite" in reasons[1001]


def test_a_step_nobody_answers_is_tried_again_and_then_ends_the_run() -> None:
    attempts = []

    def flaky(node, message):
        attempts.append(node)
        return int(message.content["config"]["step"]) == 1 and len(attempts) < 2 * N + 1

    assert _run(SimFBO(None), 3, lost=flaky).steps == 3
    found = _run(SimFBO(None), 3, lost=lambda node, message: int(message.content["config"]["step"]) >= 1, retries=1)
    assert found.steps == 1 and found.result.name == "INTERRUPTED"
    assert "Nobody answered in step 1, 2 times" in found.reason


def test_minibatches_and_partial_participation_are_reproducible() -> None:
    setup = _setup(size=2, samples=6, noise=0.3)
    first, again, other = (_run(SimFBO(2, local_steps=2), 5, setup=setup, key=key) for key in (1, 1, 2))
    np.testing.assert_array_equal(first.x, again.x)
    assert (np.asarray(first.x) != np.asarray(other.x)).any()


def _unequal(kinds):
    """Clients of 46, 1, 1, 1, 1 samples, each of curvature 1: f = mean (y - x - b)^2 / 2 with b = 0."""

    def setup(context):
        i = int(context.node_config["partition-id"])
        samples = np.zeros(46 if i == 0 else 1, np.float32)
        up = lambda x, y, b: jnp.mean((y - b - 1) ** 2) / 2 + x**2 / 20
        low = lambda x, y, b: jnp.mean((y - x - b) ** 2) / 2
        return Problem(up, low, *(kind(samples) for kind in kinds)), jnp.zeros(()), jnp.zeros(())

    return setup


@pytest.mark.parametrize(
    "solver",
    [FedMBO(None, 0.3, 0.5, lower_rounds=1, terms=6), SimFBO(1, 0.05, 0.5, 0.5), AggITD(2, 0.3, 0.5, 5)],
    ids=["fedmbo", "simfbo", "aggitd"],
)
def test_a_client_of_most_samples_does_not_blow_up_what_is_stable_for_each(solver) -> None:
    grid = flower.InProcessGrid(flower.client_app(_unequal((np.asarray, np.asarray))), N)
    found = flower.run(grid, solver, jnp.zeros(()), jnp.zeros(()), steps=80 if len(solver.asks) == 1 else 15)
    np.testing.assert_allclose(found.x, 1 / 1.1, atol=0.05)
    # A client's number of samples comes with its first answer, which may count too much once.
    assert found.history["hypergradient_norm"].max() < 10 and found.state.missing == ()


def test_a_clients_own_way_of_drawing_is_its_own() -> None:
    """A sampler that adds one to the samples, with and without keys."""
    ones = lambda samples: data.Sampler(lambda key, b: b[:1] + 1, samples)
    keyed = lambda samples: data.Keyed(data.Minibatches(samples, 1, replace=True))

    def setup(context):
        problem, x, y = _unequal((ones, keyed))(context)
        low = lambda x, y, b: problem.lower(x, y, b[0] + 0 * jax.random.uniform(b[1].random))
        return Problem(problem.upper, low, *problem.sources), x, y

    def plain(context):
        problem, x, y = _unequal((np.asarray, np.asarray))(context)
        up = problem.upper
        return Problem(lambda x, y, b: up(x, y, b + 1), problem.lower, *problem.sources), x, y

    first, second = (
        flower.run(
            flower.InProcessGrid(flower.client_app(given), N),
            SimFBO(None, 0.05, 0.5, 0.5, weighting="clients"), jnp.zeros(()), jnp.zeros(()), steps=3,
        )
        for given in (setup, plain)
    )  # fmt: skip
    np.testing.assert_allclose(first.x, second.x, rtol=1e-6)


def test_a_stream_at_a_client_is_refused() -> None:
    streams = _unequal((lambda samples: data.Stream([samples]), np.asarray))
    grid = flower.InProcessGrid(flower.client_app(streams), N)
    found = flower.run(grid, SimFBO(None), jnp.zeros(()), jnp.zeros(()), steps=1, retries=0)
    assert "upper_data of this client's problem is a data.Stream" in found.reason


# ---------------------------------------------------------------- broken answers


class Tampered(flower.InProcessGrid):
    """A grid on which what node 1001 answers from step 1 on has been changed."""

    def __init__(self, change, **options) -> None:
        super().__init__(flower.client_app(_setup(samples=3)), N, **options)
        self.change = change

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        for reply in super().send_and_receive(messages, timeout=timeout):
            if reply.metadata.src_node_id == 1001 and int(messages[0].content["config"]["step"]) >= 1:
                reply = self.change(reply) or reply
            yield reply


def _array(values):
    from flwr.app import Array

    return Array(np.asarray(values))


def _first(content):
    return next(name for name in content["arrays"] if name != "value")


def _raw(data, dtype="float32", shape=(P,), stype="numpy.ndarray"):
    from flwr.app import Array

    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def _with(make):
    def change(reply):
        name = _first(reply.content)
        reply.content["arrays"][name] = make(reply.content["arrays"][name])

    return change


def _config(name, value):
    def change(reply):
        reply.content["config"][name] = value

    return change


def _drop(what):
    def change(reply):
        if what == "leaf":
            del reply.content["arrays"][_first(reply.content)]
        elif what == "value":
            del reply.content["arrays"]["value"]
        else:
            del reply.content[what]

    return change


def _empty(reply):
    from flwr.app import RecordDict

    for name in list(reply.content):
        del reply.content[name]
    assert isinstance(reply.content, RecordDict)


def _header_of_a_giant():
    import io

    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    return stream.getvalue()


def _pickled():
    import io

    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}] * P, dtype=object), allow_pickle=True)
    return stream.getvalue()


class _Cut:
    def __call__(self, array):
        return _raw(array.data[:-3])


BROKEN = {
    "shape": (_with(lambda a: _array(np.zeros(17, np.float32))), "shape"),
    "scalar": (_with(lambda a: _array(np.float32(1))), "shape"),
    "missing leaf": (_drop("leaf"), "is missing"),
    "no arrays": (_drop("arrays"), "is missing"),
    "no config": (_drop("config"), "upper_samples is 'None'"),
    "nothing": (_empty, "samples"),
    "garbage": (_with(lambda a: _raw(b"\x00garbage" * 9)), "is no array"),
    "empty bytes": (_with(lambda a: _raw(b"")), "is no array"),
    "cut": (_with(_Cut()), "is cut"),
    "giant": (_with(lambda a: _raw(_header_of_a_giant())), "shape"),
    "pickle": (_with(lambda a: _raw(_pickled())), "expected floating-point"),
    "integers": (_with(lambda a: _array(a.numpy().astype(int))), "expected floating-point"),
    "complex": (_with(lambda a: _array(a.numpy() + 1j)), "expected floating-point"),
    "nan": (_with(lambda a: _array(a.numpy() * np.nan)), "not finite"),
    "inf": (_with(lambda a: _array(a.numpy() + np.inf)), "not finite"),
    "1e30": (_with(lambda a: _array(a.numpy() * 0 + np.float32(1e30))), "not finite|in size"),
    "1e12": (_with(lambda a: _array(a.numpy() * 0 + np.float32(1e12))), "in size"),
    "float64 beyond float32": (_with(lambda a: _array(a.numpy().astype(float) * 0 + 1e300)), "not finite"),
    "-5 samples": (_config("lower_samples", -5), "lower_samples is '-5'"),
    "0 samples": (_config("upper_samples", 0), "upper_samples is '0'"),
    "1e9 samples": (_config("lower_samples", 10**9), "lower_samples is '1000000000'"),
    "samples 'x'": (_config("lower_samples", "x"), "lower_samples is 'x'"),
    "samples nan": (_config("lower_samples", float("nan")), "lower_samples is 'nan'"),
    "2.5 samples": (_config("lower_samples", 2.5), "lower_samples is '2.5'"),
    "samples True": (_config("lower_samples", True), "lower_samples is 'True'"),
    "samples list": (_config("lower_samples", [1, 2]), "lower_samples is"),
}
METHODS = {"simfbo": SimFBO(None, 0.05, 0.2, 0.2), "fedbio": FedBiO(None, 0.02, 0.1, 0.1, local_steps=2)}


@pytest.fixture(scope="module")
def without_it():
    """The run in which node 1001 never answers from step 1 on."""
    gone = lambda node, message: node == 1001 and int(message.content["config"]["step"]) >= 1
    return {name: _run(solver, 3, lost=gone, setup=_setup(samples=3)) for name, solver in METHODS.items()}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("method", METHODS)
def test_a_broken_answer_leaves_its_client_out_and_nothing_else(method, what, without_it) -> None:
    change, words = BROKEN[what]
    found = flower.run(Tampered(change), METHODS[method], jnp.zeros(P), jnp.zeros(Q), steps=3)
    expected = without_it[method]
    assert found.steps == 3 and found.result.name == "COMPLETED"
    np.testing.assert_array_equal(found.x, expected.x)
    np.testing.assert_array_equal(found.y, expected.y)
    np.testing.assert_array_equal(found.history["upper_loss"], expected.history["upper_loss"])
    assert {m.node for m in found.state.missing} == {1001} and all(m.broken for m in found.state.missing)
    assert all(re.search(f"a broken answer: .*({words})", m.reason) for m in found.state.missing), found.reason
    assert found.history["broken_replies"].tolist() == found.history["missing_clients"].tolist()
    assert found.history["broken_replies"][0] == 0 and (found.history["broken_replies"][1:] >= 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_of_nonsense_does_not_reach_the_history(method) -> None:
    def change(reply):
        if "value" in reply.content["arrays"]:
            reply.content["arrays"]["value"] = _array(np.float32(1e25))

    found = flower.run(Tampered(change), METHODS[method], jnp.zeros(P), jnp.zeros(Q), steps=3)
    assert found.history["upper_loss"].max() < 1e6 and found.history["broken_replies"][1:].all()


def test_answers_nobody_asked_for_are_not_heard() -> None:
    class Twice(flower.InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            return [*replies, *replies]

    once = _run(METHODS["simfbo"], 3)
    twice = flower.run(Twice(flower.client_app(_setup()), N), METHODS["simfbo"], jnp.zeros(P), jnp.zeros(Q), steps=3)
    np.testing.assert_array_equal(once.x, twice.x)


@pytest.mark.parametrize("option", [{"clip": 2.0}, {"average": "median"}])
@pytest.mark.parametrize("method", METHODS)
def test_what_one_client_can_do_is_bounded(method, option) -> None:
    """It answers a thousand times too much, in the wrong direction: possible numbers, all the same."""

    def change(reply):
        for name in list(reply.content["arrays"]):
            reply.content["arrays"][name] = _array(reply.content["arrays"][name].numpy() * np.float32(-1e3))

    far, near = (
        flower.run(Tampered(change), METHODS[method], jnp.zeros(P), jnp.zeros(Q), steps=4, **given)
        for given in ({}, option)
    )
    honest = _run(METHODS[method], 4, setup=_setup(samples=3))
    distance = lambda found: float(np.linalg.norm(np.asarray(found.y) - np.asarray(honest.y)))
    assert distance(near) < 0.05 * distance(far)
    clean = _run(METHODS[method], 4, setup=_setup(samples=3), clip=1e6)
    np.testing.assert_array_equal(clean.x, honest.x)


def test_errors_by_name() -> None:
    for option, words in (({"clip": 0.5}, "from 1 on"), ({"average": "mode"}, "'mean' or 'median'")):
        with pytest.raises(flower.FlowerError, match=words):
            _run(SimFBO(None), 1, **option)
    with pytest.raises(flower.FlowerError, match=r"clients=9\) samples more clients than the 5 nodes"):
        _run(SimFBO(9), 1, wait=0.01)
    with pytest.raises(flower.FlowerError, match="does not run over Flower"):
        _run(FedNest(2), 1)
    grid = flower.InProcessGrid(flower.client_app(_setup()), N)
    found = flower.run(grid, SimFBO(None), jnp.zeros(P + 1), jnp.zeros(Q), steps=1, retries=0)
    assert "server and clients must be given equal models" in found.state.missing[0].reason
