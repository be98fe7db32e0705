"""Defences: detectors of encoders and of samples, preprocessing, and repairs, three of which are bilevel problems."""

from bilevel.applications.contrastive.defences.catalogue import DEFENCES, Rule
from bilevel.applications.contrastive.defences.inversion import (
    decree,
    k_means,
    neural_cleanse,
    patched,
    smallest,
    ssl_cleanse,
)
from bilevel.applications.contrastive.defences.pruning import anp, clp, fine_pruning, lipschitz_bounds
from bilevel.applications.contrastive.defences.repair import (
    asset,
    asset_solver,
    distillation,
    fine_tuning,
    ibau,
    ibau_solver,
    of_asset,
    of_ibau,
    of_unlearning,
    offsets,
    unlearning,
    unlearning_solver,
)
from bilevel.applications.contrastive.defences.samples import (
    activation_clustering,
    blurred,
    masking_trajectory,
    preprocessing,
    quantised,
    reconstruction,
    silhouettes,
    spectral,
    spectral_scores,
)
from bilevel.applications.contrastive.defences.suspect import Found, Suspect, two_gaussians

__all__ = [
    "DEFENCES", "Found", "Rule", "Suspect", "activation_clustering", "anp", "asset", "asset_solver", "blurred",
    "clp", "decree", "distillation", "fine_pruning", "fine_tuning", "ibau", "ibau_solver", "k_means",
    "lipschitz_bounds", "masking_trajectory", "neural_cleanse", "of_asset", "of_ibau", "of_unlearning", "offsets",
    "patched", "preprocessing", "quantised", "reconstruction", "silhouettes", "smallest", "spectral",
    "spectral_scores", "ssl_cleanse", "two_gaussians", "unlearning", "unlearning_solver",
]  # fmt: skip
