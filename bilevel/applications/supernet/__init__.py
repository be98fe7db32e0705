"""Architecture search in the spaces of DARTS, RobustDARTS and NAS-Bench-201: supernet, problem, and retraining."""

from bilevel.applications.supernet.evaluation import Retrainer, nasbench201_accuracy
from bilevel.applications.supernet.genotype import (
    Genotype,
    derive,
    discrete,
    extract,
    mask,
    nasbench201_key,
    parameter_free,
)
from bilevel.applications.supernet.images import Images, digits_small, fashion_mnist_small
from bilevel.applications.supernet.network import Supernet
from bilevel.applications.supernet.operations import OPERATIONS
from bilevel.applications.supernet.problem import Search, search, small_network, small_s2
from bilevel.applications.supernet.select import perturbation_select
from bilevel.applications.supernet.spaces import NASBENCH201, S1, S2, S3, S4, S5, CellSpec, SearchSpace, darts_space

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
    "Images",
    "Retrainer",
    "Search",
    "SearchSpace",
    "Supernet",
    "darts_space",
    "derive",
    "digits_small",
    "discrete",
    "extract",
    "fashion_mnist_small",
    "mask",
    "nasbench201_accuracy",
    "nasbench201_key",
    "parameter_free",
    "perturbation_select",
    "search",
    "small_network",
    "small_s2",
]
