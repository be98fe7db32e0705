"""Runs of `solve` with x and y over whatever devices and processes there are; the tests compare their results.

python tests/mesh_run.py OUT.npz [--steps K] [--checkpoint DIR] [--metagradient]
python tests/mesh_run.py OUT.npz --over N:K,N:K... ...     # runs in pieces: to step K on N of the devices, and so on
python tests/mesh_run.py OUT.npz --moved                   # metagradients that stop and go on over other devices
python tests/mesh_run.py OUT.npz --mixed                   # y over a mesh, and other things elsewhere
python tests/mesh_run.py OUT.npz --agents                  # four agents over two of the devices' rows, y over columns

Several of the last three and of `--estimators NAME...`, a table of sharded_run.py's, are made by one process.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sharded_run
from distributed_problems import quadratic
from jax.sharding import PartitionSpec as P

from bilevel import ProblemError, distributed, hypergradients, lower, network, run, runs, solve, solvers
from bilevel.checkpoint import CheckpointError, Checkpoints

LAYERS = 3  # enough for numbers; what a device holds at most is sharded_run.py's, of more
TRAINING = lower.GradientDescent(optax.adam(1e-2, eps_root=1e-8), 5)
SOLVER = solvers.HypergradientDescent(hypergradients.Unrolled(), TRAINING, optax.adam(0.1))


def placed(devices):
    """The problem, x and y over so many devices: samples along one axis of the mesh, parameters along both."""
    count = len(devices)
    mesh = distributed.mesh(devices, shape={"data": 2 if count > 1 else 1, "model": -1})
    problem, x, y = sharded_run.made(jnp.zeros(()).dtype, layers=LAYERS)
    specs = sharded_run.specs(mesh)
    return (
        distributed.place(problem, mesh, P("data")),
        distributed.place(x, mesh, specs),
        distributed.place(y, mesh, specs),
    )


def outcome(devices, steps, checkpoint=None, metagradient=False):
    """What a run found, whole on every process, and over how many devices it lay."""
    problem, x, y = placed(devices)
    if metagradient:
        found = runs.metagradient(problem, x, y, TRAINING, segment=2, checkpoint=checkpoint)
        tree, curve = {"x": found.gradient, "y": found.lower.y}, np.asarray(found.value)
    else:
        options = {} if checkpoint is None else {"checkpoint": checkpoint, "checkpoint_every": 1}
        found = solve(problem, x, y, SOLVER, steps=steps, key=3, progress=False, **options)
        tree, curve = {"x": found.x, "y": found.y}, found.history["upper_loss"]
    over = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(tree)}
    part = {leaf.addressable_shards[0].data.size * len(devices) == leaf.size for leaf in jax.tree.leaves(tree)}
    named = jax.tree_util.tree_leaves_with_path(distributed.gather(tree))
    values = {jax.tree_util.keystr(path): leaf for path, leaf in named}
    return values | {"curve": curve, "devices": sorted(over), "parts": sorted(part)}


AGENTS = {
    "ring": lambda: solvers.GTDSBO(network.ring(4), 0.05, 0.1, 0.1, lower_steps=2, linear_steps=2),
    "simfbo": lambda: solvers.SimFBO(4, 0.02, 0.1, 0.1, local_steps=2),
}


def agents():
    """Each method's y on one device and on four, where it lies then, and what is refused."""
    mesh, found = distributed.mesh(shape={"agents": 2, "model": 2}), {}
    other = distributed.mesh(shape={"model": 4})
    problem, (p, q) = quadratic(4, het=0.5, samples=4, noise=0.3, size=2, q=8)
    x, y = jnp.zeros(p), jnp.zeros(q)
    spread = distributed.shard(problem, mesh), distributed.place(x, mesh), distributed.place(y, mesh, P("model"))
    for name, make in AGENTS.items():
        alone, many = (solve(*at, make(), steps=10, key=3, progress=False).y for at in ((problem, x, y), spread))
        found |= {f"{name} alone": alone, f"{name} many": np.asarray(many), f"{name} spec": str(many.sharding.spec)}
    for i, wrong in enumerate((distributed.place(y, mesh, P("agents")), distributed.place(y, other, P("model")))):
        try:
            solve(spread[0], x, wrong, AGENTS["ring"](), steps=1, progress=False)
        except ProblemError as error:
            found[f"refused {i}"] = str(error)
    return found


MOVES = [(part, *move) for part in ("states", "backward") for move in ((4, 2), (4, 1), (1, 4))]


def moved():
    """Metagradients whose disk is full at step 2, forward or backward, gone on with over other devices: what they
    found, over how many devices, and the first step that was written then."""
    write, found = Checkpoints._write, {}

    def until_full(self, step, *rest, part=None):
        if part is None:
            first.append(step)
        elif self.path.name == part and step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, step, *rest)

    for part, before, after in MOVES:
        first = []
        with tempfile.TemporaryDirectory() as directory:
            Checkpoints._write = functools.partialmethod(until_full, part=part)
            with contextlib.suppress(CheckpointError):
                outcome(jax.devices()[:before], 0, directory, metagradient=True)
            Checkpoints._write = until_full
            of = outcome(jax.devices()[:after], 0, directory, metagradient=True)
            Checkpoints._write = write
        named = {f"{part} {before} {after} {name}": value for name, value in of.items()}
        found |= named | {f"{part} {before} {after} first": first[0]}
    return found


def mixed():
    """A run with y alone on a mesh beside one with all on it; and what is said of two places."""
    (problem, x, _), (_, _, y4) = sharded_run.made(jnp.zeros(()).dtype, layers=LAYERS), placed(jax.devices())
    go = lambda *at: solve(*at, SOLVER, steps=3, key=3, progress=False)  # chunks of one step and two
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, fun_name="", **__: compiled.append(fun_name) if "backend_compile" in event else None
    )
    one, loops = go(problem, x, y4), compiled.count("jit(_advance)")
    spread = placed(jax.devices())
    two = go(*spread)
    lie = lambda *trees: [leaf.sharding for leaf in jax.tree.leaves(trees)]
    devices = sorted({len(leaf.sharding.device_set) for leaf in jax.tree.leaves((one.x, one.y))})
    found = {"y alone": np.asarray(one.y["in"]), "all": np.asarray(two.y["in"]), "devices": devices, "loops": loops}
    found["whole"] = all(place.spec == P() for place in lie(one.x))
    found["kept"] = lie(one.y, two.x, two.y) == lie(y4, *spread[1:])
    x2 = distributed.place(x, distributed.mesh(jax.devices()[:2]))
    elsewhere = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[1]), problem)
    of = lambda *at: hypergradients.value_and_hypergradient(at[0], hypergradients.Unrolled(), TRAINING)(*at[1:])
    calls = {
        "solve": lambda: go(problem, x2, y4),
        "run": lambda: run(problem, SOLVER, x2, y4, 2, 0),
        "estimate": lambda: of(problem, x2, y4),
        "metagradient": lambda: runs.metagradient(problem, x2, y4, TRAINING),
        "data": lambda: go(elsewhere, x, y4),
    }
    for name, call in calls.items():
        try:
            call()
        except ProblemError as error:
            found[name] = str(error)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpoint")
    parser.add_argument("--metagradient", action="store_true")
    parser.add_argument("--moved", action="store_true")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--agents", action="store_true")
    parser.add_argument("--over", nargs="+", default=[])
    parser.add_argument("--estimators", nargs="+")
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for i, pieces in enumerate(given.over):
        with tempfile.TemporaryDirectory() as directory:
            for piece in pieces.split(","):
                devices, steps = map(int, piece.split(":"))
                found = outcome(jax.devices()[:devices], steps, directory)
        np.savez(given.out.with_suffix(f".{i}.npz"), **found)
        print(pieces.replace(",", " "))
    makers = {"agents": agents, "moved": moved, "mixed": mixed}
    asked = [make for name, make in makers.items() if getattr(given, name)]
    if asked:
        np.savez(given.out, **{name: value for make in asked for name, value in make().items()})
    elif not given.over:
        found = outcome(jax.devices(), given.steps, given.checkpoint, given.metagradient)
        if jax.process_index() == 0:
            np.savez(given.out, processes=jax.process_count(), **found)
    if given.estimators:
        sharded_run.main(["--float64", "--mesh", "2x2", *given.estimators])


if __name__ == "__main__":
    main()
