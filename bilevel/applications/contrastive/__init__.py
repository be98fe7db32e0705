"""Contrastive pretraining, and a study of which defences hold against perturbations tuned through it; digits alone."""

from bilevel.applications.contrastive.augment import Augmentation
from bilevel.applications.contrastive.defences import DEFENCES
from bilevel.applications.contrastive.encoders import MLP, Conv
from bilevel.applications.contrastive.evaluate import auroc, knn, logits, probe, tpr_at, wilson
from bilevel.applications.contrastive.losses import byol, cosine, nt_xent, simsiam
from bilevel.applications.contrastive.perturbation import Perturbation
from bilevel.applications.contrastive.pretraining import METHODS, Pretraining
from bilevel.applications.contrastive.report import Attack, Claim, Defence, Share, Study
from bilevel.applications.contrastive.routes import ROUTES
from bilevel.applications.contrastive.study import robustness_study

__all__ = [
    "DEFENCES", "METHODS", "MLP", "ROUTES", "Attack", "Augmentation", "Claim", "Conv", "Defence", "Perturbation",
    "Pretraining", "Share", "Study", "auroc", "byol", "cosine", "knn", "logits", "nt_xent", "probe",
    "robustness_study", "simsiam", "tpr_at", "wilson",
]  # fmt: skip
