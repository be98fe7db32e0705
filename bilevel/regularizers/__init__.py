"""Regularisation of an upper variable that would otherwise degenerate: watch its curvature, stop, adapt, perturb, penalise.

Made for architecture search and not tied to it: every piece works on any bilevel problem.
"""

from bilevel.regularizers.early_stopping import Decision, EarlyStopping, Monitor, Snapshot
from bilevel.regularizers.outer import beta_decay, entropy, penalised, zero_one
from bilevel.regularizers.perturbation import perturbed, renormalise, softmax
from bilevel.regularizers.strength import Adaptive, Best, adaptive, keep_best

__all__ = [
    "Adaptive",
    "Best",
    "Decision",
    "EarlyStopping",
    "Monitor",
    "Snapshot",
    "adaptive",
    "beta_decay",
    "entropy",
    "keep_best",
    "penalised",
    "perturbed",
    "renormalise",
    "softmax",
    "zero_one",
]
