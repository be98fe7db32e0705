"""Fixtures that every test file shares."""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from compiled import Kept
from problems import float64

# The tests wait for the compiler more than for anything else, so that it is told to work less: machine code in one
# piece and not optimised, and, where that is known (jaxlib 0.10; 0.12 has dropped it), the older way of emitting
# fusions. It reads the variable at the first compilation. Whoever has flags keeps these: `.ci/run` has the compiler's
# own level for the oldest and newest versions.
FAST = "--xla_cpu_parallel_codegen_split_count=1" + (
    " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)
QUICK = "--xla_backend_optimization_level=0 " + FAST
os.environ.setdefault("XLA_FLAGS", QUICK)

# Python walks through all that JAX keeps of thousands of programmes whenever some hundred objects are new.
gc.set_threshold(20_000, 20, 20)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A background job starts with Ctrl-C ignored, and so would all that it starts; the tests of Ctrl-C are meant.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """What earlier runs have compiled is taken over, where pytest keeps anything (not under `-p no:cacheprovider`)."""
    if getattr(config, "cache", None) is not None:
        kept = Kept(config.cache.mkdir("compiled"))
        kept.start()
        config.add_cleanup(kept.end)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """What is `optimised` runs in a process of its own, compiled as users' programmes are."""
    if os.environ["XLA_FLAGS"] != QUICK or pyfuncitem.get_closest_marker("optimised") is None:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=3 " + FAST}
    done = subprocess.run(command, env=environment, cwd=pyfuncitem.config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with float64():
        yield


MAPS = Path("/proc/self/maps")  # Linux lets a process map 65,530 pieces of memory, a compiled programme takes some
MOST_MAPS, LOOK_EVERY = 25_000, 10
ended = itertools.count(1)


@pytest.fixture(autouse=True)
def _compiled_programmes_are_let_go() -> Iterator[None]:
    """A thousand tests in one process compile more programmes than it may hold: they are dropped before that."""
    yield
    looked = next(ended) % LOOK_EVERY == 0 and MAPS.exists()  # the list is megabytes long
    if looked and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
