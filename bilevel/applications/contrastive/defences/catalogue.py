"""The defences by name: what each is given and how its answer is read."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from bilevel.applications.contrastive.defences.inversion import decree, neural_cleanse, ssl_cleanse
from bilevel.applications.contrastive.defences.pruning import anp, clp, fine_pruning
from bilevel.applications.contrastive.defences.repair import (
    distillation,
    fine_tuning,
    of_asset,
    of_ibau,
    of_unlearning,
)
from bilevel.applications.contrastive.defences.samples import (
    activation_clustering,
    masking_trajectory,
    preprocessing,
    quantised,
    reconstruction,
    spectral,
)


class Rule(NamedTuple):
    """How a defence is run and read.

    Attributes:
        kind: "encoder", "pool" or "input" (detectors), "preprocessing" (input, and a repair), "repair".
        run: `(encode, suspect, key) -> Found` for one encoder; of a bilevel one
            `(encode, suspects) -> (application, solver, x -> Found)` for many at once.
        threshold: of the statistic.
        below: flagged below the threshold, and not above.
        bilevel: `solve` finds the answer.
        channels: it prunes channels, by the encoder's `activations` and `kernels`.
    """

    kind: str
    run: Any
    threshold: float
    below: bool = False
    bilevel: bool = False
    channels: bool = False


CHANGED = 0.05
"""A repair flags an encoder where it changes more than this share of the pool's labels (ours)."""

DEFENCES = {
    "DECREE": Rule("encoder", decree, 0.1, below=True),
    "SSL-Cleanse": Rule("encoder", ssl_cleanse, 2.0),
    "Neural Cleanse, patch": Rule("encoder", neural_cleanse, 2.0),
    "Neural Cleanse, additive": Rule("encoder", functools.partial(neural_cleanse, additive=True), 2.0),
    "spectral signatures": Rule("pool", spectral, 0.5),
    "activation clustering": Rule("pool", activation_clustering, 0.5),
    "ASSET": Rule("pool", of_asset, 2.0, bilevel=True),
    "reconstruction error": Rule("input", reconstruction, 0.1),
    "masking trajectory": Rule("input", masking_trajectory, 0.1),
    "blur": Rule("preprocessing", preprocessing, 0.1),
    "quantisation": Rule("preprocessing", functools.partial(preprocessing, change=quantised), 0.1),
    "CLP": Rule("repair", clp, 3.0, channels=True),
    "fine-pruning": Rule("repair", fine_pruning, CHANGED, channels=True),
    "ANP": Rule("repair", anp, CHANGED, channels=True),
    "I-BAU": Rule("repair", of_ibau, CHANGED, bilevel=True),
    "label-free unlearning": Rule("repair", of_unlearning, CHANGED, bilevel=True),
    "fine-tuning": Rule("repair", fine_tuning, CHANGED),
    "distillation": Rule("repair", distillation, CHANGED),
}
"""By name: each defence's kind, its function and its threshold."""
