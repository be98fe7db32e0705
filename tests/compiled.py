"""Programmes that an earlier run of the tests has compiled are there for the next: JAX's persistent compilation cache.

JAX writes the cache's files in place, so that a process that is killed, as some tests do, leaves half a one to all that
come after it. Each process of pytest has therefore a directory of its own, which begins with links to the shared one's
files; what it has compiled is linked there when it ends. Processes that the tests start have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jaxlib

LARGEST = 2**31  # bytes of the shared directory: past that it begins anew
DAY = 86_400  # seconds


def machine() -> str:
    """What compiled code depends on beside the programme and its flags, which JAX's keys have."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    digest = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()
    return f"{jax.__version__}-{jaxlib.__version__}-{digest[:16]}"


class Kept:
    """The cache of this process, from `start` to `end`."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared / machine()
        self.own: Path | None = None

    def start(self) -> None:
        """JAX reads from a copy of the shared directory and writes there."""
        self.shared.mkdir(parents=True, exist_ok=True)
        for left in self.shared.parent.glob(".*"):
            with contextlib.suppress(OSError):  # of a run that was killed, and another process may be at it
                if time.time() - left.stat().st_mtime > DAY:
                    shutil.rmtree(left)
        self.own = Path(tempfile.mkdtemp(prefix=".", dir=self.shared.parent))  # of one file system: links are possible
        for file in self.shared.iterdir():
            with contextlib.suppress(OSError):
                os.link(file, self.own / file.name)
        jax.config.update("jax_compilation_cache_dir", str(self.own))
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # keys would have the directory in them
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def end(self) -> None:
        """What is new goes into the shared directory, whole or not at all."""
        if self.own is None:
            return
        jax.config.update("jax_compilation_cache_dir", None)
        with contextlib.suppress(OSError):  # another process of the run is at the same
            if sum(file.stat().st_size for file in self.shared.iterdir()) > LARGEST:
                shutil.rmtree(self.shared)
        self.shared.mkdir(exist_ok=True)
        for file in self.own.iterdir():
            with contextlib.suppress(OSError):  # another process was first
                os.link(file, self.shared / file.name)
        shutil.rmtree(self.own, ignore_errors=True)
