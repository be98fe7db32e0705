"""Supernets: search spaces of DARTS, RobustDARTS and NAS-Bench-201 as pure functions of parameters and mixture weights."""

from bilevel.models.supernet.depthwise import depthwise
from bilevel.models.supernet.genotype import Genotype, derive, discrete, extract, mask, nasbench201_key, parameter_free
from bilevel.models.supernet.network import Supernet
from bilevel.models.supernet.operations import OPERATIONS
from bilevel.models.supernet.select import perturbation_select
from bilevel.models.supernet.spaces import NASBENCH201, S1, S2, S3, S4, S5, CellSpec, SearchSpace, darts_space

__all__ = [
    "NASBENCH201",
    "OPERATIONS",
    "S1",
    "S2",
    "S3",
    "S4",
    "S5",
    "CellSpec",
    "Genotype",
    "SearchSpace",
    "Supernet",
    "darts_space",
    "depthwise",
    "derive",
    "discrete",
    "extract",
    "mask",
    "nasbench201_key",
    "parameter_free",
    "perturbation_select",
]
