"""Flower: the same iterates as in one process, clients that fail or are late, hostile input; no network needed."""

from __future__ import annotations

import logging

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


def test_errors_by_name() -> None:
    with pytest.raises(flower.FlowerError, match=r"clients=9\) samples more clients than the 5 nodes"):
        _run(SimFBO(9), 1, wait=0.01)
    with pytest.raises(flower.FlowerError, match="does not run over Flower"):
        _run(FedNest(2), 1)
    grid = flower.InProcessGrid(flower.client_app(_setup()), N)
    found = flower.run(grid, SimFBO(None), jnp.zeros(P + 1), jnp.zeros(Q), steps=1, retries=0)
    assert "server and clients must be given equal models" in found.state.missing[0].reason
