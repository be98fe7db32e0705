"""Freed memory is kept between calls, within bounds, and the user's own settings stand."""

import os
import platform
import subprocess
import sys

import pytest

# A block, written to and freed, again and again: how many pages the system had to give anew. XLA's blocks come from
# threads of its own, whose heaps are others than the first thread's.
FAULTS = """
import ctypes, resource, threading
{before}
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def once():
    block = library.malloc({size})
    ctypes.memset(block, 1, {size})
    library.free(block)

def all():
    global found
    once()
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = faults()
    for _ in range(5):
        once()
    found = faults() - start

if {thread}:
    thread = threading.Thread(target=all)
    thread.start()
    thread.join()
else:
    all()
print(found)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def faults(before, size=64 << 20, thread=False, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "BILEVEL_KEEP"))}
    code = FAULTS.format(before=before, size=size, thread=thread)
    done = subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@glibc
@pytest.mark.parametrize(("size", "thread"), [(64 << 20, False), (512 << 20, False), (46 << 20, True)])
def test_a_block_that_was_freed_is_not_zeroed_again(size, thread):
    pages = 5 * size // os.sysconf("SC_PAGE_SIZE")
    without = faults("import bilevel", size, thread, BILEVEL_KEEP_MEMORY="0")
    if without < pages / 2:
        pytest.skip("the system gives huge pages")
    assert faults("import bilevel", size, thread) < pages / 100


@glibc
@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "200000"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=200000"}],
    ids=lambda environment: next(iter(environment)),
)
def test_settings_of_the_users_own_stand(environment):
    before = "from bilevel._memory import keep_freed_memory\nassert keep_freed_memory() is {}"
    faults(before.format(True))
    faults(before.format(False), **environment)
    faults(before.format(False), BILEVEL_KEEP_MEMORY="0")


def test_elsewhere_nothing_is_done(monkeypatch):
    from bilevel import _memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not _memory.keep_freed_memory()
