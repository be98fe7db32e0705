"""Importing this keeps the process on one core, for CPU times that mean one thread's work on every side.

Import it before JAX and torch, whose threads inherit it. XLA's own flags for one thread will not do: they leave a second
thread that spins while it waits, which is counted as CPU time.
"""

import os

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
