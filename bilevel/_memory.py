"""Memory that one call has freed is kept for the next, where the C library would give it back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

__all__ = ["OFF", "keep_freed_memory"]

OFF = "BILEVEL_KEEP_MEMORY"
"""The environment's variable that leaves the C library as it is: "0"."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST, _KEPT = 2**30, 2**31 - 1  # bytes: of one block, and of all that is kept at the heap's end


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 1 GiB, 2 GiB of them in all, instead of unmapping them.

    XLA on CPU asks for a programme's temporaries anew with every call, in one block. glibc maps a block of 32 MiB or
    more for itself and unmaps it when it is freed, so that the system has to zero every page of it again at the next
    call: a fifth of some steps' time, and nothing that shows in others (`benchmarks/memory.py`). Nothing is done where
    the user has settings of `malloc` in the environment (MALLOC_..., GLIBC_TUNABLES) or `BILEVEL_KEEP_MEMORY=0`, nor
    where the C library is another one.

    Returns:
      Whether it was done.
    """
    theirs = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or os.environ.get(OFF) == "0" or theirs:
        return False
    with contextlib.suppress(OSError, AttributeError):  # no glibc: musl has no `mallopt` that does anything
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
        # Not one arena for all threads besides: products of small matrices, which ask for scratch space each, then
        # search what the compiler has left behind (the denoiser's row in the benchmark).
        options = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT))
        return all([bool(library.mallopt(*option)) for option in options])
    return False
