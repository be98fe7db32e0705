"""One solver code on one device, on a mesh, in several processes; killed and resumed on another number of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distributed_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributed_problems import quadratic
from problems import float64
from processes import ended, printed, started

from bilevel import Problem, data, distributed, network, solve
from bilevel.solvers import GTDSBO

METHODS = ["gt", "ed", "simfbo", "fedmbo"]
SCRIPT = "distributed_run.py"


def _same(found: Any, methods: Sequence[str]) -> None:
    for name in methods:
        for quantity, value in expected(name).items():
            if quantity.startswith(f"{name}."):
                np.testing.assert_allclose(found[quantity], value, rtol=1e-12, atol=1e-12, err_msg=quantity)


@functools.cache
def expected(name: str) -> dict[str, Any]:
    """The run of a method on one device of this process."""
    with float64():
        return distributed_run.results([name], 40, sharded=False)


@pytest.mark.slow
def test_four_devices_are_one_device(tmp_path: Path) -> None:
    """Equal iterates and histories, copies that lie on all four, and a ring step whose only collectives are
    permutes."""
    printed(SCRIPT, tmp_path / "out.npz", "--collectives", devices=4)
    found = np.load(tmp_path / "out.npz")
    assert found["devices"] == 4 and found["gt devices"] == 4
    _same(found, METHODS)
    assert found["collectives"].tolist() == ["collective-permute"] * 4


@pytest.mark.slow
def test_two_processes_with_two_devices_are_one_device(tmp_path: Path) -> None:
    ended(started(SCRIPT, 2, 2, [tmp_path / "out.npz", "--methods", "gt,simfbo"]))
    found = np.load(tmp_path / "out.npz")
    assert found["devices"] == 4 and found["processes"] == 2
    _same(found, ["gt", "simfbo"])


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_and_resumed_on_another_number_of_processes(tmp_path: Path, x64: None, again: bool) -> None:
    """Two processes, of which one dies at step 25; this process goes on from their checkpoint, and then two again.

    (Two processes that go on from one's checkpoint: test_mesh.py has that too, for arrays of which each has a part.)
    """
    runs = tmp_path / "runs"
    arguments = [tmp_path / "out.npz", "--methods", "gt", "--checkpoint", runs]
    pair = started(SCRIPT, 2, 1, [*arguments, "--kill-at", 25])
    codes = []
    try:
        codes.append(pair[1].wait(timeout=500))
    finally:
        for process in pair:  # the survivor waits for its peer, and gives up after the heartbeat
            process.kill()
            process.communicate()
    assert codes == [9]
    assert sorted(entry.name for entry in runs.iterdir() if entry.name[0] != ".") == ["step_10", "step_20"]

    alone = distributed_run.results(["gt"], 30 if again else 40, sharded=False, checkpoint=str(runs))
    if again:
        assert len(alone["gt.upper_loss"]) == 30
        ended(started(SCRIPT, 2, 2, arguments))
        alone = np.load(tmp_path / "out.npz")
    _same(alone, ["gt"])


def test_from_local_and_gather_in_one_process() -> None:
    mesh = distributed.mesh()
    rows = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    agents = distributed.from_local(rows, mesh, size=2)
    assert len(agents) == 4 and agents.size == 2
    np.testing.assert_array_equal(distributed.gather({"a": agents.arrays, "b": 1.0})["a"], rows)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: distributed.shard(quadratic(8)[0], _mesh(3)),
            "'agents' of 3 devices does not divide the 8 agents of upper_data: take a mesh of 2",
        ),
        (lambda: distributed.shard(quadratic(8)[0], _mesh(2, "rows")), "no axis 'agents', it has 'rows'"),
        (lambda: distributed.shard(Problem(jnp.sum, jnp.sum, None, data.Stream([1])), _mesh(2)), "reads from the host"),
        (lambda: distributed.initialize("host:1", 2, 2), "numbered 0 to 1"),
        (lambda: distributed.initialize("nowhere", 2, 0), "address and port"),
        (lambda: distributed.from_local((np.ones(2), np.ones(3)), distributed.mesh()), "have 2, 3 agents"),
    ],
)
def test_errors_by_name(make, words: str) -> None:
    with pytest.raises(distributed.DistributedError, match=words):
        make()


def _mesh(size: int, axis: str = "agents") -> Any:
    return jax.sharding.AbstractMesh((size,), (axis,))


def test_a_mesh_of_one_device_changes_nothing() -> None:
    problem, (p, q) = quadratic(4)
    solver = GTDSBO(network.ring(4), 0.05, 0.2, 0.2)
    here = solve(problem, jnp.zeros(p), jnp.zeros(q), solver, steps=20)
    there = solve(distributed.shard(problem, distributed.mesh()), jnp.zeros(p), jnp.zeros(q), solver, steps=20)
    np.testing.assert_array_equal(here.x, there.x)
