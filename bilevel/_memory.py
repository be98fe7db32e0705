"""Memory that one call has freed is kept for the next, where the C library would give it back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

import jax

__all__ = ["OFF", "keep_freed_memory"]

OFF = "BILEVEL_KEEP_MEMORY"
"""The environment's variable that leaves the C library as it is: "0"."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST, _KEPT = 2**30, 2**31 - 1  # bytes: of one block, and of all that is kept at the heap's end
_PAD = 2**27  # bytes, of addresses only
_COMPILED, _LONG = "/jax/core/compile/backend_compile_duration", 2.0  # JAX's event, and seconds


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks instead of unmapping them: up to 1 GiB each, 2 GiB in all at the heap's end.

    XLA on CPU asks for a programme's temporaries anew with every call, in one block, mostly from a thread of its own.
    glibc maps a block of 32 MiB or more for itself and unmaps it when it is freed, so that the system has to zero every
    page of it again at the next call: a fifth to a quarter of some steps' time (`benchmarks/memory.py`).

    Threads other than the first take theirs from heaps of 64 MiB, which glibc unmaps once they are empty. With a pad
    larger than a heap it keeps them (`heap_trim` in its `arena.c`); a block that no heap holds is still mapped and
    unmapped there. One arena for all threads would keep these too, and is not asked for: products of small matrices
    want scratch space each, and would search what the compiler has left behind.

    Nothing is done where the user has settings of `malloc` in the environment (MALLOC_..., GLIBC_TUNABLES) or
    `BILEVEL_KEEP_MEMORY=0`, nor where the C library is another one.

    Returns:
      Whether it was done.
    """
    theirs = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or os.environ.get(OFF) == "0" or theirs:
        return False
    with contextlib.suppress(OSError, AttributeError):  # no glibc: musl has no `mallopt` that does anything
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
        options = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _PAD))
        kept = all([bool(library.mallopt(*option)) for option in options])
        jax.monitoring.register_event_duration_secs_listener(_GiveBack(library))
        return kept
    return False


class _GiveBack:
    """A listener of JAX's events: after a long compile the heap's free pages go back to the system."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._trim = library.malloc_trim

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        """JAX's signature."""
        if event == _COMPILED and duration_secs > _LONG:
            self._trim(ctypes.c_size_t(0))
