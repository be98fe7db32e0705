"""Hessian-free and constrained methods: a penalised objective, auxiliary variables with their own update, a penalty
schedule."""

from __future__ import annotations

from bilevel.solvers.penalty._base import Diagnosed
from bilevel.solvers.penalty._schedule import Continuation, Path, Polynomial
from bilevel.solvers.penalty.blocc import BLOCC
from bilevel.solvers.penalty.bome import BOME
from bilevel.solvers.penalty.bvfsm import BVFSM
from bilevel.solvers.penalty.f2sa import F2BA, F2SA, CentralF2SA, SingleLoopF2SA
from bilevel.solvers.penalty.gaffa import BiCGAFFA
from bilevel.solvers.penalty.lvhba import LVHBA
from bilevel.solvers.penalty.meha import MEHA
from bilevel.solvers.penalty.pbgd import GPBGD, VPBGD
from bilevel.solvers.penalty.sflcb import SFLCB
from bilevel.solvers.penalty.simple import BiGSAM, IterativeRegularization

__all__ = [
    "BLOCC",
    "BOME",
    "BVFSM",
    "F2BA",
    "F2SA",
    "GPBGD",
    "LVHBA",
    "MEHA",
    "SFLCB",
    "VPBGD",
    "BiCGAFFA",
    "BiGSAM",
    "CentralF2SA",
    "Continuation",
    "Diagnosed",
    "IterativeRegularization",
    "Path",
    "Polynomial",
    "SingleLoopF2SA",
]
