"""What the benchmarks share: the command line, one core, rounds in which the sides take turns, ratios with spread.

Nothing here imports JAX before `start` has put the process on its core: XLA and torch size their pools of threads
when they first compute. XLA's own flags for one thread will not do: they leave a second thread that spins while it
waits, which is counted as CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np


def arguments(doc: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with `--rounds` and `--quick`; the script adds what else it takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"of the sides in turn (default {rounds})")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes and one round: does it still work?")
    return parser


def start(
    parser: argparse.ArgumentParser, *packages: str, pin: bool = True, given: Any = None, **quick: Any
) -> argparse.Namespace:
    """Read the command line, take a core, print the versions.

    Args:
      packages: the peers, whose versions are printed too.
      pin: keep the process on one core, so that CPU times mean one thread's work on every side.
      quick: the defaults of options under `--quick` (`rounds` is 1); what the command line says counts all the same.
    """
    options = parser.parse_args(given)
    if options.quick:
        parser.set_defaults(rounds=1, **quick)
        options = parser.parse_args(given)
    if pin:
        one_core()
    print(versions(*packages), flush=True)
    return options


def one_core() -> None:
    """Keep the process, the threads that it has and those that it will have on its last core."""
    if not hasattr(os, "sched_setaffinity"):
        return
    core = {max(os.sched_getaffinity(0))}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread), core)


def versions(*packages: str) -> str:
    """The versions of Python, JAX and the packages that are installed, and the number of cores."""
    found = [f"Python {platform.python_version()}"]
    for package in ("jax", "jaxlib", "numpy", *packages):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{', '.join(found)}; {cores} core{'s' if cores != 1 else ''}"


@dataclasses.dataclass
class Times:
    """Seconds of a side's rounds."""

    cpu: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Adds what the block takes, CPU time of all threads of the process and wall-clock time."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def median(self, kind: str = "cpu", unit: float = 1.0) -> float:
        """The median, `unit` times as large (1e3: milliseconds)."""
        return float(np.median(getattr(self, kind))) * unit


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm: int = 1,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Times]:
    """Every side once, then every side once more, and so on (A B C, A B C): what disturbs the machine disturbs all.

    Args:
      calls: the sides by name, functions without arguments; the arrays that they return are waited for.
      warm: rounds before the first that counts (compilation, caches).
      before: what to call before a side's turn, off the clock.
    """
    import jax

    times = {name: Times() for name in calls}
    for number in range(rounds + warm):
        for name, call in calls.items():
            if before is not None:
                before[name]()
            with (times[name] if number >= warm else Times()).measured():
                jax.block_until_ready(call())
    return times


def measured(call: Callable[[], Any]) -> tuple[Any, Times]:
    """What one call returns, and its time."""
    import jax

    times = Times()
    with times.measured():
        result = jax.block_until_ready(call())
    return result, times


def compiled(function: Any, *args: Any) -> tuple[Any, Times]:
    """The program of a jitted function for these arguments, and what tracing and compiling took."""
    return measured(lambda: function.lower(*args).compile())


def ratio(ours: Times, theirs: Times, kind: str = "cpu") -> str:
    """Ours over theirs, round by round: the median with the smallest and the largest."""
    each = np.asarray(getattr(ours, kind)) / np.asarray(getattr(theirs, kind))
    return f"{np.median(each):.3f} ({each.min():.3f}, {each.max():.3f})"


def difference(a: Any, b: Any) -> float:
    """|a - b| / |b|."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def table(*rows: Any) -> None:
    """Print rows in columns, the first of them left, the others right; the first row is the header."""
    texts = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    for row in texts:
        cells = zip(row, widths, strict=True)
        print("  ".join(f"{t:<{w}}" if i == 0 else f"{t:>{w}}" for i, (t, w) in enumerate(cells)).rstrip(), flush=True)
