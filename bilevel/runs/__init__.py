"""Drivers of whole runs: many at once (sweep, multistart), or watched, stopped, rolled back and compared."""

from bilevel.runs.early_stopping import Decision, EarlyStopping, Monitor, Snapshot
from bilevel.runs.multistart import Multistart, multistart
from bilevel.runs.strength import Adaptive, Best, adaptive, keep_best
from bilevel.runs.sweep import Sweep, sweep

__all__ = [
    "Adaptive", "Best", "Decision", "EarlyStopping", "Monitor", "Multistart", "Snapshot", "Sweep", "adaptive",
    "keep_best", "multistart", "sweep",
]  # fmt: skip
