"""Concept erasure in rectified-flow transformers: the network, the bilevel problem, attacks, and a model of digits."""

from bilevel.applications.erasure import digits
from bilevel.applications.erasure.attack import attack, attacked
from bilevel.applications.erasure.closed_form import closed_form
from bilevel.applications.erasure.flux import PUBLISHED, Flow, Flux
from bilevel.applications.erasure.losses import contrast, erasing_target, onto
from bilevel.applications.erasure.names import from_original, original_names, to_original
from bilevel.applications.erasure.problem import PUBLISHED_WEIGHTS, Erasure, erasure, weighted
from bilevel.applications.erasure.text_to_image import TextToImage, matching, on_path, sample

__all__ = [
    "PUBLISHED", "PUBLISHED_WEIGHTS", "Erasure", "Flow", "Flux", "TextToImage", "attack", "attacked", "closed_form",
    "contrast", "digits", "erasing_target", "erasure", "from_original", "matching", "on_path", "onto", "original_names",
    "sample", "to_original", "weighted",
]  # fmt: skip
