"""Agents on many devices and many processes: JAX's own runtime, and nothing beside it.

The solvers' code is the same everywhere. What changes is where the agents' data lie: `shard` puts the agents' axis of
`data.Agents` over the devices of a mesh, and the solvers let their copies lie beside it. On one host with several
devices:

    problem = distributed.shard(problem, distributed.mesh())
    solution = solve(problem, x0, y0, solvers.GTDSBO(network.ring(8)))

On several processes, one command per host starts the same script on each,

    python -m bilevel.distributed --coordinator HOST:PORT --processes N --process I script.py [arguments]

with I = 0 on HOST. On CPUs, `--devices D` asks for D devices per process; they talk through gloo. A dead process ends
the run on all: start it again, on as many processes as there are, and with `checkpoint=` it goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bilevel.data import Agents, as_source
from bilevel.problem import Problem
from bilevel.typing import PyTree

__all__ = ["DistributedError", "from_local", "gather", "initialize", "mesh", "shard", "shutdown"]


class DistributedError(ValueError):
    """Devices or processes do not fit the agents; the message says which numbers, and what to do."""


def mesh(devices: Sequence[Any] | None = None, axis: str = "agents") -> Mesh:
    """A mesh of one axis over the given devices; None: all devices of all processes."""
    return Mesh(np.asarray(jax.devices() if devices is None else list(devices)), (axis,))


def shard(problem: Problem, mesh: Mesh, axis: str = "agents") -> Problem:
    """The problem with the agents' axis of its data (`data.Agents`) over the mesh's axis, other data on every device.

    With several processes every one calls it with the same data (`from_local` for data that only one process has).

    Raises:
      DistributedError: the mesh has no such axis, or it does not divide the number of agents.
    """

    def placed(name: str) -> Any:
        data = getattr(problem, name)
        source = as_source(data)
        if source.stacked:
            _divides(source.parties or 0, mesh, axis, name)
        elif source.host:
            raise DistributedError(
                f"{name} is {data!r}, which reads from the host of one process: it cannot be sharded."
            )
        sharding = NamedSharding(mesh, PartitionSpec(axis) if source.stacked else PartitionSpec())
        return jax.tree.map(lambda leaf: _put(leaf, sharding), data)

    return dataclasses.replace(problem, upper_data=placed("upper_data"), lower_data=placed("lower_data"))


def from_local(arrays: PyTree, mesh: Mesh, size: int | None = None, axis: str = "agents") -> Agents:
    """`data.Agents` of which each process brings its own agents, (agents, samples, ...), in the order of processes."""
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    counts = sorted({np.shape(leaf)[0] for leaf in jax.tree.leaves(arrays)})
    if len(counts) != 1:
        given = ", ".join(map(str, counts))
        raise DistributedError(f"from_local: the leaves have {given} agents; all need the same number.")
    process = jax.process_index()
    mine = [d for d in mesh.devices.flat if d.process_index == process]
    if not mine or counts[0] % len(mine):
        raise DistributedError(
            f"from_local: {counts[0]} agents do not divide over the {len(mine)} devices of process {process}."
        )
    whole = jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), arrays)
    return Agents(whole, size)


def gather(tree: PyTree) -> PyTree:
    """NumPy copies of whole arrays on every process, wherever their pieces lie; all processes must call it."""

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(whole, tree)


def initialize(
    coordinator: str,
    processes: int,
    process: int,
    devices: int | None = None,
    *,
    timeout: int = 300,
    heartbeat: int = 100,
) -> None:
    """Join the other processes. To be called before anything touches JAX's devices.

    Args:
      coordinator: "host:port" of process 0, reachable from all.
      processes: how many there are.
      process: which one this is, 0 to processes - 1.
      devices: CPU devices of this process; None: what the platform has.
      timeout: seconds to wait for the others.
      heartbeat: seconds without a sign of life after which a process counts as dead, and the run ends on all.

    Raises:
      DistributedError: the numbers do not fit each other.
    """
    if not 0 <= process < processes:
        raise DistributedError(f"process {process} of {processes}: processes are numbered 0 to {processes - 1}.")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise DistributedError(
            f"coordinator={coordinator!r}: give the address and port of process 0, such as 10.0.0.1:12345."
        )
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    options: dict[str, Any] = {"coordinator_bind_address": coordinator} if process == 0 else {}
    options |= {"initialization_timeout": timeout, "heartbeat_timeout_seconds": heartbeat}
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process, **options)


def shutdown() -> None:
    """Wait for the others and leave."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("bilevel.distributed.shutdown")
    jax.distributed.shutdown()


def _divides(agents: int, mesh: Mesh, axis: str, name: str) -> None:
    if axis not in mesh.shape:
        has = ", ".join(map(repr, mesh.shape))
        raise DistributedError(f"The mesh has no axis {axis!r}, it has {has}: make it with distributed.mesh().")
    size = mesh.shape[axis]
    if agents % size:
        fitting = max(d for d in range(1, size + 1) if agents % d == 0)
        raise DistributedError(
            f"The mesh's axis {axis!r} of {size} devices does not divide the {agents} agents of {name}: take a mesh of "
            f"{fitting} devices, or a multiple of {size} agents."
        )


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bilevel.distributed", description="Start one process of a script that runs on several."
    )
    add = parser.add_argument
    add("--coordinator", required=True, metavar="HOST:PORT", help="address of process 0, reachable from all")
    add("--processes", type=int, required=True, help="how many processes there are")
    add("--process", type=int, required=True, help="which one this is, from 0")
    add("--devices", type=int, help="CPU devices of this process")
    add("--heartbeat", type=int, default=100, help="seconds until a silent process counts as dead")
    add("script", help="the Python script, the same on all")
    add("rest", nargs=argparse.REMAINDER, metavar="arguments", help="the script's own arguments")
    given = parser.parse_args(arguments)
    initialize(given.coordinator, given.processes, given.process, given.devices, heartbeat=given.heartbeat)
    sys.argv = [given.script, *given.rest]
    sys.path.insert(0, os.path.dirname(os.path.abspath(given.script)))
    runpy.run_path(given.script, run_name="__main__")
    shutdown()


if __name__ == "__main__":
    _main()
