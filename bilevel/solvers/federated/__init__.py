"""Federated methods: a server, clients sampled in each round, data that are not identically distributed."""

from __future__ import annotations

from bilevel.solvers._directions import Point, combined
from bilevel.solvers.federated import oracles
from bilevel.solvers.federated.aggitd import AggITD
from bilevel.solvers.federated.engine import Answers, Engine, Federated, InProcess
from bilevel.solvers.federated.fedbio import FedBiO, FedBiOAcc
from bilevel.solvers.federated.hypergradients import LocalHypergradient, ParallelHypergradient, SharedHypergradient
from bilevel.solvers.federated.nested import FederatedNested, FedMBO, FedNest, LFedNest
from bilevel.solvers.federated.simfbo import FederatedSingleLoop, ShroFBO, SimFBO

__all__ = [
    "AggITD", "Answers", "Engine", "FedBiO", "FedBiOAcc", "FedMBO", "FedNest", "Federated", "FederatedNested",
    "FederatedSingleLoop", "InProcess", "LFedNest", "LocalHypergradient", "ParallelHypergradient", "Point",
    "SharedHypergradient", "ShroFBO", "SimFBO", "combined", "oracles",
]  # fmt: skip
