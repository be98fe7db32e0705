"""Decentralised methods: agents on a graph, no server."""

from __future__ import annotations

from bilevel.solvers.decentralized.corrections import CORRECTIONS
from bilevel.solvers.decentralized.solver import (
    DSOBA,
    GTDSBO,
    MADSBO,
    SLDBO,
    SPARKLE,
    Decentralized,
    DecentralizedState,
)

__all__ = ["CORRECTIONS", "DSOBA", "GTDSBO", "MADSBO", "SLDBO", "SPARKLE", "Decentralized", "DecentralizedState"]
