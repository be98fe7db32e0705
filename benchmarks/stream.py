"""Does a host stream keep up? Steps on batches from the host, read ahead, against batches that lie on the device.

    python benchmarks/stream.py [--wait 0 1 4] [--steps 2000] [--rounds 5]

A synthetic softmax regression at MNIST's shape, SOBA on batches of 256. The reader copies each batch out of an array and
then sleeps for `--wait` milliseconds, as a disk or a network would make it wait. "Reader alone" is the same reader with nothing
computed. With perfect overlap a step takes the longer of the two, max(reader, device), or where the cores are all busy
their processor time over the number of cores; without any overlap it takes the sum. Per step: medians of rounds in which
the kinds of run take turns.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

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


def read(source: Any, steps: int) -> float:
    """Milliseconds per item of the reader alone."""
    if not isinstance(source, data.Stream):
        return 0.0
    items = source.items()
    begun = time.perf_counter()
    for _ in range(steps):
        next(items)
    return 1e3 * (time.perf_counter() - begun) / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", nargs="+", type=float, default=[0.0, 1.0, 4.0], help="milliseconds per batch")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((SAMPLES, 784), np.float32), rng.integers(0, 10, SAMPLES).astype(np.int32)
    held = data.Minibatches(tuple(a[:2048] for a in arrays), BATCH, blocks=True)
    x0, y0 = np.full(10, -4.0, np.float32), np.zeros((784, 10), np.float32)
    sources = {"device": data.Minibatches(arrays, BATCH, blocks=True)}
    sources |= {f"host, {wait:g} ms": data.Stream(reader(arrays, wait / 1e3)) for wait in arguments.wait}
    problems = {name: Problem(validation, loss, held, source) for name, source in sources.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    alone: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(arguments.rounds + 1):
        for name, problem in problems.items():
            begun, spent = time.perf_counter(), time.process_time()
            solve(problem, x0, y0, solvers.SOBA(0.01, 0.05), steps=arguments.steps, progress=False)
            if number:  # the first round compiles
                passed = time.perf_counter() - begun, time.process_time() - spent
                times[name].append(tuple(1e3 * t / arguments.steps for t in passed))  # type: ignore[arg-type]
                alone[name].append(read(problem.lower_data, arguments.steps // 4))
    cores = len(os.sched_getaffinity(0))
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {cores} cores; ms per step, medians of {arguments.rounds} rounds"
    )
    print(
        f"{'batches from':<14}{'wall':>8}{'spread':>16}{'cpu':>8}{'cpu/cores':>11}{'reader alone':>14}{'longer':>8}{'sum':>8}"
    )
    device = float(np.median([wall for wall, _ in times["device"]]))
    for name, found in times.items():
        wall, cpu = np.median(found, 0)
        reading = float(np.median(alone[name]))
        spread = f"{min(found)[0]:.2f} to {max(found)[0]:.2f}"
        print(
            f"{name:<14}{wall:>8.2f}{spread:>16}{cpu:>8.2f}{cpu / cores:>11.2f}{reading:>14.2f}"
            f"{max(reading, device):>8.2f}{reading + device:>8.2f}"
        )


if __name__ == "__main__":
    main()
