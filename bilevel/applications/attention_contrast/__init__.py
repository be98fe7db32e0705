"""Contrast of attention maps (CARVE): an ill-conditioned oracle, soft masks with a retrained head, diagnostics."""

from bilevel.applications.attention_contrast.contrast import Oracle, clutter, contrast, entropy, fuse, oracle
from bilevel.applications.attention_contrast.masking import Masking, masking
from bilevel.applications.attention_contrast.regions import crop, regions

__all__ = [
    "Masking", "Oracle", "clutter", "contrast", "crop", "entropy", "fuse", "masking", "oracle", "regions",
]  # fmt: skip
