"""Solvers: frozen dataclasses of hyperparameters with `init` and `step`; a paper's name is a short constructor over parts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bilevel.solvers._base import refuse
from bilevel.solvers.darts import DARTS, UpperFirst
from bilevel.solvers.default import default_solver
from bilevel.solvers.kkt import GALET, GAM, AiPOD
from bilevel.solvers.nested import AID, IMAML, ITD, T1T2, HypergradientDescent, OneStep, TruncatedITD
from bilevel.solvers.single_loop import FSLA, MASOBA, MRBO, SABA, SOBA, SPABA, SRBA, SUSTAIN, AdamSOBA, SingleLoop
from bilevel.solvers.stochastic_nested import BSA, SAMA, TTSA, VRBO, AmIGO, StocBiO
from bilevel.solvers.tuning_free import DTFBO, STFBO

if TYPE_CHECKING:
    from bilevel.solvers.decentralized import DSOBA, GTDSBO, MADSBO, SLDBO, SPARKLE, Decentralized
    from bilevel.solvers.federated import (
        AggITD,
        FedBiO,
        FedBiOAcc,
        FederatedNested,
        FederatedSingleLoop,
        FedMBO,
        FedNest,
        LFedNest,
        ShroFBO,
        SimFBO,
    )
    from bilevel.solvers.penalty import (
        BLOCC,
        BOME,
        BVFSM,
        F2BA,
        F2SA,
        GPBGD,
        LVHBA,
        MEHA,
        SFLCB,
        VPBGD,
        BiCGAFFA,
        BiGSAM,
        CentralF2SA,
        Continuation,
        IterativeRegularization,
        Path,
        Polynomial,
        SingleLoopF2SA,
    )

# Families that a run may never touch are imported where a name of theirs is first used.
_LAZY = {
    "decentralized": ("DSOBA", "GTDSBO", "MADSBO", "SLDBO", "SPARKLE", "Decentralized"),
    "federated": (
        "AggITD",
        "FedBiO",
        "FedBiOAcc",
        "FedMBO",
        "FedNest",
        "FederatedNested",
        "FederatedSingleLoop",
        "LFedNest",
        "ShroFBO",
        "SimFBO",
    ),
    "penalty": (
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
        "IterativeRegularization",
        "Path",
        "Polynomial",
        "SingleLoopF2SA",
    ),
}

__all__ = [
    "AID",
    "BLOCC",
    "BOME",
    "BSA",
    "BVFSM",
    "DARTS",
    "DSOBA",
    "DTFBO",
    "F2BA",
    "F2SA",
    "FSLA",
    "GALET",
    "GAM",
    "GPBGD",
    "GTDSBO",
    "IMAML",
    "ITD",
    "LVHBA",
    "MADSBO",
    "MASOBA",
    "MEHA",
    "MRBO",
    "SABA",
    "SAMA",
    "SFLCB",
    "SLDBO",
    "SOBA",
    "SPABA",
    "SPARKLE",
    "SRBA",
    "STFBO",
    "SUSTAIN",
    "T1T2",
    "TTSA",
    "VPBGD",
    "VRBO",
    "AdamSOBA",
    "AggITD",
    "AiPOD",
    "AmIGO",
    "BiCGAFFA",
    "BiGSAM",
    "CentralF2SA",
    "Continuation",
    "Decentralized",
    "FedBiO",
    "FedBiOAcc",
    "FedMBO",
    "FedNest",
    "FederatedNested",
    "FederatedSingleLoop",
    "HypergradientDescent",
    "IterativeRegularization",
    "LFedNest",
    "OneStep",
    "Path",
    "Polynomial",
    "ShroFBO",
    "SimFBO",
    "SingleLoop",
    "SingleLoopF2SA",
    "StocBiO",
    "TruncatedITD",
    "UpperFirst",
    "default_solver",
    "refuse",
]


def __getattr__(name: str) -> Any:
    for family, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"bilevel.solvers.{family}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
