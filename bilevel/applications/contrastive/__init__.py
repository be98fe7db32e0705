"""Contrastive pretraining, and a study of which defences hold against perturbations tuned through it; digits alone."""

from bilevel.applications.contrastive.augment import Augmentation
from bilevel.applications.contrastive.encoders import MLP, Conv
from bilevel.applications.contrastive.evaluate import auroc, knn, logits, probe, tpr_at, wilson
from bilevel.applications.contrastive.losses import byol, cosine, nt_xent, simsiam
from bilevel.applications.contrastive.perturbation import Perturbation
from bilevel.applications.contrastive.pretraining import METHODS, Pretraining
from bilevel.applications.contrastive.problem import Alignment, alignment
from bilevel.applications.contrastive.routes import ROUTES, Held, route
from bilevel.applications.contrastive.study import (
    DEFENCES,
    Attack,
    Claim,
    Defence,
    Share,
    Study,
    robustness_study,
)

__all__ = [
    "DEFENCES", "METHODS", "MLP", "ROUTES", "Alignment", "Attack", "Augmentation", "Claim", "Conv", "Defence", "Held",
    "Perturbation", "Pretraining", "Share", "Study", "alignment", "auroc", "byol", "cosine", "knn", "logits", "nt_xent",
    "probe", "robustness_study", "route", "simsiam", "tpr_at", "wilson",
]  # fmt: skip
