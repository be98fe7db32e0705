"""Freed memory is kept between calls, within bounds, and the user's own settings stand."""

import os
import platform
import subprocess
import sys

import pytest

# A block of 64 MiB, written to and freed, again and again: how many pages the system had to give anew each time.
FAULTS = """
import ctypes, resource
{before}
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def once():
    block = library.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    library.free(block)

once()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
start = faults()
for _ in range(5):
    once()
print(faults() - start)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def faults(before, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "BILEVEL_KEEP"))}
    code = FAULTS.format(before=before)
    done = subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@glibc
def test_a_block_that_was_freed_is_not_zeroed_again():
    pages = 5 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    without = faults("import bilevel", BILEVEL_KEEP_MEMORY="0")
    if without < pages / 2:
        pytest.skip("the system gives huge pages")
    assert faults("import bilevel") < pages / 100


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
