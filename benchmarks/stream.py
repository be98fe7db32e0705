"""Does a host stream keep up? Steps on batches from the host, read ahead, against batches that lie on the device.

    python benchmarks/stream.py [--wait 0 1 4] [--steps 2000] [--rounds 5]

A synthetic softmax regression at MNIST's shape, SOBA on batches of 256. The reader copies each batch out of an array and
then sleeps for `--wait` milliseconds, as a disk or a network would make it wait. With perfect overlap a step takes the longer of
the two, max(wait, device); without any it takes their sum. Wall-clock time per step: medians of rounds in which the
kinds of run take turns.
"""

from __future__ import annotations

import argparse
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
    times: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(arguments.rounds + 1):
        for name, problem in problems.items():
            begun = time.perf_counter()
            solve(problem, x0, y0, solvers.SOBA(0.01, 0.05), steps=arguments.steps, progress=False)
            if number:  # the first round compiles
                times[name].append(1e3 * (time.perf_counter() - begun) / arguments.steps)
    device = float(np.median(times["device"]))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; ms per step, medians of {arguments.rounds} rounds")
    print(f"{'batches from':<14}{'ms':>8}{'spread':>16}{'overlap would be':>18}{'sum would be':>14}")
    for name, found in times.items():
        wait = float(name.split()[1]) if name != "device" else 0.0
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{name:<14}{np.median(found):>8.2f}{spread:>16}{max(wait, device):>18.2f}{wait + device:>14.2f}")


if __name__ == "__main__":
    main()
