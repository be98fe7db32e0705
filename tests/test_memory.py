"""Freed memory is kept between calls, within bounds, and the user's own settings stand."""

import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

# A block, written to and freed, again and again: how many pages the system had to give anew. XLA's blocks come from
# threads of its own, whose heaps are others than the first thread's.
FAULTS = """
import ctypes, resource, threading
from bilevel._memory import keep_freed_memory
assert keep_freed_memory() is {kept}
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def once(size):
    block = library.malloc(size)
    ctypes.memset(block, 1, size)
    library.free(block)

def measured(size):
    once(size)
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = faults()
    for _ in range(2):
        once(size)
    print(faults() - start)

for size, threaded in {sizes}:
    if threaded:
        thread = threading.Thread(target=measured, args=(size,))
        thread.start()
        thread.join()
    else:
        measured(size)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


SIZES = (46 << 20, True), (64 << 20, False), (512 << 20, False)  # bytes, and whether in a thread of its own


def faults(kept, sizes=SIZES, **environment):
    """Of each size, in one process, where freed memory is kept or not."""
    return printed(FAULTS.format(kept=kept, sizes=sizes), environment)


def resident_less(**environment):
    """Pages by which a process is smaller after each of three events."""
    return printed(LEFT, environment)


def printed(code, environment):
    """The numbers that a process prints, without settings of `malloc` but these."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "BILEVEL_KEEP"))}
    done = subprocess.run([sys.executable, "-c", code], env={**others, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@glibc
def test_a_block_that_was_freed_is_not_zeroed_again():
    pages = [2 * size // os.sysconf("SC_PAGE_SIZE") for size, _ in SIZES]
    without, kept = faults(False, BILEVEL_KEEP_MEMORY="0"), faults(True)
    if any(found < most / 2 for found, most in zip(without, pages, strict=True)):
        pytest.skip("the system gives huge pages")
    assert all(found < most / 100 for found, most in zip(kept, pages, strict=True)), (kept, pages)


# Many small blocks with one in use between any two, as a compiler leaves them: the process's size after JAX's event.
LEFT = """
import ctypes
import jax
import bilevel
from pathlib import Path
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
size = 1 << 16
blocks = [library.malloc(size) for _ in range(3200)]
for block in blocks:
    ctypes.memset(block, 1, size)
for block in blocks[::2]:
    library.free(block)
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])
start = resident()
for event, seconds in (("backend_compile", 1.0), ("jaxpr_trace", 60.0), ("backend_compile", 3.0)):
    jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}_duration", seconds, fun_name="step")
    print(start - resident())
"""


@glibc
def test_what_a_long_compile_leaves_is_given_back():
    short, trace, long = resident_less()
    half = 1600 * (1 << 16) // os.sysconf("SC_PAGE_SIZE")
    assert abs(short) < half / 10 and abs(trace) < half / 10 and long > 0.8 * half, (short, trace, long, half)
    assert max(map(abs, resident_less(BILEVEL_KEEP_MEMORY="0"))) < half / 10


def test_a_compile_tells_jax_its_time_as_the_listener_asks():
    from bilevel import _memory

    heard = []
    listener = lambda event, duration, **_: heard.append((event, duration))
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert [duration > 0 for event, duration in heard if event == _memory._COMPILED] == [True]


@glibc
@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "200000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=200000"}],
    ids=lambda environment: next(iter(environment)),
)
def test_settings_of_the_users_own_stand(environment):
    faults(False, (), **environment)


def test_elsewhere_nothing_is_done(monkeypatch):
    from bilevel import _memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not _memory.keep_freed_memory()
