"""Drivers of whole runs: many at once (sweep, multistart), or watched, stopped, rolled back and compared; and the
derivative of a whole training."""

from bilevel.runs.early_stopping import Decision, EarlyStopping, Monitor, Snapshot
from bilevel.runs.metagradient import metagradient
from bilevel.runs.multistart import Multistart, multistart
from bilevel.runs.strength import Adaptive, Best, adaptive, keep_best
from bilevel.runs.sweep import Sweep, sweep

__all__ = [
    "Adaptive", "Best", "Decision", "EarlyStopping", "Monitor", "Multistart", "Snapshot", "Sweep", "adaptive",
    "keep_best", "metagradient", "multistart", "sweep",
]  # fmt: skip
