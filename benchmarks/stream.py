"""Does a host stream keep up? Steps on batches from the host, read ahead, against batches that lie on the device.

    python benchmarks/stream.py [--wait 0 1 4] [--steps 2000] [--rounds 5]

A synthetic softmax regression at MNIST's shape, SOBA on batches of 256. The reader copies each batch out of an array
and then sleeps for `--wait` milliseconds, as a disk or a network would make it wait. "Reader alone" is the same
reader with nothing computed. With perfect overlap a step takes the longer of the two, max(reader, device), or where
the cores are all busy their processor time over the number of cores; without any overlap it takes the sum. Per step:
medians of rounds in which the kinds of run take turns.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import Problem, data, solve, solvers

SAMPLES, BATCH = 20_480, 256


def loss(x: Any, y: Any, batch: Any) -> jax.Array:
    """Cross entropy, and a penalty per class that the upper level sets."""
    features, labels = batch
    fit = optax.softmax_cross_entropy_with_integer_labels(features @ y, labels).mean()
    return fit + 0.5 * jnp.sum(jnp.exp(x) * jnp.sum(y**2, 0))


def validation(x: Any, y: Any, batch: Any) -> jax.Array:
    """Cross entropy."""
    features, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(features @ y, labels).mean()


def reader(arrays: Any, wait: float) -> Any:
    """Batches from number `start` on, each `wait` seconds late."""

    def items(start: int) -> Iterator[Any]:
        blocks = SAMPLES // BATCH
        for k in range(start, start + blocks):
            rows = slice(k % blocks * BATCH, k % blocks * BATCH + BATCH)
            if wait:
                time.sleep(wait)
            yield tuple(a[rows].copy() for a in arrays)

    return items


def read(source: Any, steps: int) -> None:
    """The reader alone."""
    if isinstance(source, data.Stream):
        items = source.items()
        for _ in range(steps):
            next(items)


def main() -> None:
    """Print the table."""
    parser = _harness.arguments(__doc__, rounds=5)
    parser.add_argument("--wait", nargs="+", type=float, default=[0.0, 1.0, 4.0], help="milliseconds per batch")
    parser.add_argument("--steps", type=int, default=2000)
    arguments = _harness.start(parser, "optax", pin=False, steps=100)
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((SAMPLES, 784), np.float32), rng.integers(0, 10, SAMPLES).astype(np.int32)
    held = data.Minibatches(tuple(a[:2048] for a in arrays), BATCH, blocks=True)
    x0, y0 = np.full(10, -4.0, np.float32), np.zeros((784, 10), np.float32)
    sources = {"device": data.Minibatches(arrays, BATCH, blocks=True)}
    sources |= {f"host, {wait:g} ms": data.Stream(reader(arrays, wait / 1e3)) for wait in arguments.wait}
    problems = {name: Problem(validation, loss, held, source) for name, source in sources.items()}
    steps, part = arguments.steps, arguments.steps // 4
    calls = {}
    for name, problem in problems.items():
        run = functools.partial(solve, problem, x0, y0, solvers.SOBA(0.01, 0.05), steps=steps, progress=False)
        calls[name] = lambda run=run: run().x
        calls[f"{name}, reader"] = functools.partial(read, problem.lower_data, part)
    times = _harness.interleaved(calls, arguments.rounds)
    cores = len(os.sched_getaffinity(0))
    print(f"{jax.devices()[0].device_kind}; ms per step, medians of {arguments.rounds} rounds")
    rows: list[Any] = [("batches from", "wall", "spread", "cpu", "cpu/cores", "reader alone", "longer", "sum")]
    device = times["device"].median("wall", 1e3) / steps
    for name in sources:
        found, reading = times[name], times[f"{name}, reader"].median("wall", 1e3) / part
        wall, cpu = (found.median(kind, 1e3) / steps for kind in ("wall", "cpu"))
        spread = f"{1e3 * min(found.wall) / steps:.2f} to {1e3 * max(found.wall) / steps:.2f}"
        numbers = (cpu, cpu / cores, reading, max(reading, device), reading + device)
        rows.append((name, f"{wall:.2f}", spread, *(f"{number:.2f}" for number in numbers)))
    _harness.table(*rows)


if __name__ == "__main__":
    main()
