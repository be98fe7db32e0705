"""Agents and large variables on many devices and many processes: JAX's own runtime, and nothing beside it.

The solvers' code is the same everywhere. What changes is where arrays lie. `shard` puts the agents' axis of
`data.Agents` over the devices of a mesh, and the solvers let their copies lie beside it. On one host with several
devices:

    problem = distributed.shard(problem, distributed.mesh())
    solution = solve(problem, x0, y0, solvers.GTDSBO(network.ring(8)))

`place` puts variables and data that are too large for one device over a mesh of any axes (`spread` says how, where
nothing better is known), and optimisers' moments, tangents, saved states and hypergradients lie as they do:

    mesh = distributed.mesh(shape={"data": 2, "model": 4})
    problem = distributed.place(problem, mesh, P("data"))
    y0 = distributed.place(y0, mesh, distributed.spread(y0, mesh, "model"))
    solution = solve(problem, x0, y0, solver)

On several processes, one command per host starts the same script on each,

    python -m bilevel.distributed --coordinator HOST:PORT --processes N --process I script.py [arguments]

with I = 0 on HOST. On CPUs, `--devices D` asks for D devices per process; they talk through gloo. A dead process ends
the run on all: start it again, on as many processes as there are, and with `checkpoint=` it goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from bilevel._arguments import explained
from bilevel._places import put
from bilevel.data import Agents, as_source
from bilevel.problem import Problem
from bilevel.typing import PyTree

__all__ = [
    "DistributedError", "from_local", "gather", "initialize", "mesh", "place", "shard", "shutdown", "spread",
]  # fmt: skip


class DistributedError(ValueError):
    """Devices or processes do not fit what is to lie on them; the message says which numbers, and what to do."""


@explained
def mesh(devices: Sequence[Any] | None = None, axis: str = "agents", shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh over the given devices; None: all devices of all processes.

    Args:
      devices: which ones.
      axis: the name of its one axis, where there is no `shape`.
      shape: the sizes of its axes by name, such as {"data": 2, "model": 4}; one may be -1, which is what is left.

    Raises:
      DistributedError: the sizes are not those of the devices.
    """
    given = jax.devices() if devices is None else devices
    if not isinstance(given, (Sequence, np.ndarray)) or len(given) == 0:
        raise DistributedError(
            f"mesh({devices!r}): devices are a list of some, such as jax.devices()[:2]; None takes all of them."
        )
    found = np.asarray(list(given))
    if shape is None:
        return Mesh(found, (axis,))
    if not isinstance(shape, Mapping) or not all(_is_count(size) for size in shape.values()):
        raise DistributedError(
            f"mesh(shape={shape!r}): the sizes of the axes are whole numbers by name, such as "
            '{"data": 2, "model": -1}.'
        )
    sizes = dict(shape)
    if list(sizes.values()).count(-1) == 1:
        rest = math.prod(size for size in sizes.values() if size != -1)
        sizes = {name: found.size // max(rest, 1) if size == -1 else size for name, size in sizes.items()}
    if min(sizes.values(), default=1) < 1 or math.prod(sizes.values()) != found.size:
        asked = " x ".join(str(size) for size in shape.values()) or "no axes"
        raise DistributedError(
            f"mesh(shape={dict(shape)}): {asked} is not the number of devices, which is {found.size}: give sizes whose "
            "product that is (-1 for one of them: what is left), or devices=jax.devices()[:n] for fewer."
        )
    return Mesh(found.reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _is_count(size: Any) -> bool:
    return isinstance(size, (int, np.integer)) and not isinstance(size, bool)


@explained
def place(tree: PyTree, mesh: Mesh, specs: Any = None) -> PyTree:
    """Arrays over a mesh: variables, a problem's data, anything that is a pytree.

    With several processes every one calls it with the same arrays, and each device is given its part of them.

    Args:
      tree: the arrays. Of a `Problem` these are its data, and what it holds besides stays as it is.
      mesh: of `mesh` or `jax.make_mesh`, of any axes.
      specs: where they lie: a `jax.sharding.PartitionSpec` for all, a tree of them like `tree` (or of the upper part of
        it), or a function (path, leaf) -> spec. None, here or for a part: whole on every device. An array of fewer axes
        than its spec (a number among matrices) takes the part of the spec that it has axes for.

    Returns:
      The same tree of `jax.Array`s.

    Raises:
      DistributedError: the mesh has no such axis, or does not divide an array; the message names both.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise DistributedError(
            f"place(tree, mesh, specs): {type(mesh).__name__} was given as the mesh: make one with "
            'distributed.mesh(shape={"data": 2, "model": -1}).'
        )
    named, structure = jax.tree_util.tree_flatten_with_path(tree)
    is_spec = lambda leaf: leaf is None or isinstance(leaf, PartitionSpec)  # noqa: E731
    if is_spec(specs):
        along = [specs] * len(named)
    elif callable(specs):
        along = [specs(path, leaf) for path, leaf in named]
    else:
        below = lambda spec, part: [spec] * len(jax.tree.leaves(part))  # noqa: E731
        try:
            along = jax.tree.leaves(jax.tree.map(below, specs, tree, is_leaf=is_spec), is_leaf=is_spec)
        except ValueError as error:
            raise DistributedError(
                f"place: the specs are not a tree like the arrays' ({str(error).splitlines()[0]}): give one "
                f"PartitionSpec for all, a tree like {structure}, or a function (path, leaf) -> PartitionSpec."
            ) from error
    placed = []
    for (path, leaf), spec in zip(named, along, strict=True):
        name = jax.tree_util.keystr(path).lstrip(".") or "the array"
        if not hasattr(leaf, "dtype") and np.asarray(leaf).dtype.kind in "OUS":
            raise DistributedError(f"place: {name} is {leaf!r}, no array: give arrays of numbers.")
        placed.append(put(leaf, NamedSharding(mesh, _fitting(name, np.shape(leaf), spec, mesh))))
    return jax.tree.unflatten(structure, placed)


@explained
def spread(tree: PyTree, mesh: Mesh, *axes: str) -> PyTree:
    """Specs for `place` that put each array over the mesh's `axes` (all of them together where none is named), along
    the largest of its axes that they divide; arrays that they do not divide, and small ones, are whole on every device.

    The way of "fully sharded data parallelism", where nothing is known of what the arrays are for. A network of which
    that is known does better with specs of its own: columns of one matrix and rows of the next.
    """
    axes = axes or tuple(mesh.axis_names)
    for axis in axes:
        _has(mesh, axis)
    size = math.prod(mesh.shape[axis] for axis in axes)

    def spec(leaf: Any) -> PartitionSpec:
        shape = np.shape(leaf)
        fitting = [i for i, n in enumerate(shape) if n % size == 0 and n > 0]
        if not fitting or math.prod(shape) < _SMALL * size:
            return PartitionSpec()
        at = max(fitting, key=lambda i: (shape[i], i))
        return PartitionSpec(*(axes if i == at else None for i in range(at + 1)))

    return jax.tree.map(spec, tree)


_SMALL = 256  # numbers per device below which an array is not worth an exchange


@explained
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
        return jax.tree.map(lambda leaf: put(leaf, sharding), data)

    return dataclasses.replace(problem, upper_data=placed("upper_data"), lower_data=placed("lower_data"))


@explained
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


@explained
def gather(tree: PyTree) -> PyTree:
    """NumPy copies of whole arrays on every process, wherever their pieces lie; all processes must call it."""

    def whole(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(whole, tree)


@explained
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


def _has(mesh: Mesh, axis: str) -> None:
    if axis not in mesh.shape:
        has = ", ".join(map(repr, mesh.shape))
        raise DistributedError(f"The mesh has no axis {axis!r}, it has {has}: make it with distributed.mesh().")


def _fitting(name: str, shape: tuple[int, ...], spec: Any, mesh: Mesh) -> PartitionSpec:
    """The spec, as far as there are axes; an error where it does not fit."""
    spec = PartitionSpec() if spec is None else spec
    if not isinstance(spec, PartitionSpec):
        raise DistributedError(f"place: the spec of {name} is {spec!r}: give a jax.sharding.PartitionSpec.")
    taken: list[str] = []
    for i, (length, along) in enumerate(zip(shape, spec, strict=False)):
        if along is PartitionSpec.UNCONSTRAINED:
            raise DistributedError(f"place: the spec of {name} leaves axis {i} open: name a mesh axis there, or None.")
        axes = () if along is None else (along,) if isinstance(along, str) else tuple(along)
        for axis in axes:
            _has(mesh, axis)
            if axis in taken:
                raise DistributedError(f"place: the spec of {name} has the mesh's {axis!r} twice: once is the most.")
            taken.append(axis)
        size = math.prod(mesh.shape[axis] for axis in axes)
        if length % size:
            over, most = " and ".join(map(repr, axes)), max(d for d in range(1, size + 1) if length % d == 0)
            raise DistributedError(
                f"The mesh's {over} of {size} devices does not divide axis {i} of {name}, of shape {shape}: put "
                f"another axis over it, pad that one to {-(-length // size) * size}, or take {most} "
                f"{'devices' if most > 1 else 'device'} there."
            )
    return PartitionSpec(*tuple(spec)[: len(shape)])


def _divides(agents: int, mesh: Mesh, axis: str, name: str) -> None:
    _has(mesh, axis)
    size = mesh.shape[axis]
    if agents % size:
        fitting = max(d for d in range(1, size + 1) if agents % d == 0)
        raise DistributedError(
            f"The mesh's axis {axis!r} of {size} devices does not divide the {agents} agents of {name}: take a mesh of "
            f"{fitting} devices, or a multiple of {size} agents."
        )


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
