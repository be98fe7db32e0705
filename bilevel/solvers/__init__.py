"""Solvers: frozen dataclasses of hyperparameters with `init` and `step`."""

from __future__ import annotations

from bilevel.solvers._base import Solver, refuse
from bilevel.solvers.nested import AID, IMAML, ITD, T1T2, HypergradientDescent, OneStep, TruncatedITD

__all__ = [
    "AID",
    "IMAML",
    "ITD",
    "T1T2",
    "HypergradientDescent",
    "OneStep",
    "Solver",
    "TruncatedITD",
    "refuse",
]
