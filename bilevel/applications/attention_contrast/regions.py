"""Regions and crops from a saliency: hard choices, outside the differentiable path."""

from __future__ import annotations

from typing import Any

import numpy as np


def regions(saliency: Any, share: float = 0.2, most: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The connected regions (of four neighbours) of the most salient pixels.

    Args:
        saliency: (rows, columns).
        share: of the pixels, in (0, 1]: those at or above this top quantile.
        most: the number of regions kept, those of the largest summed saliency.

    Returns:
        A boolean mask (rows, columns) and the boxes (regions, 4): first row, first column, last row + 1, last column +
        1, by falling saliency.
    """
    from scipy import ndimage

    saliency = np.asarray(saliency, float)
    if saliency.ndim != 2 or not np.isfinite(saliency).all():
        raise ValueError(f"A saliency of finite numbers (rows, columns) is needed, not {saliency.shape}.")
    if not 0 < share <= 1 or most < 1:
        raise ValueError(f"regions(share={share}, most={most}): a share in (0, 1] and one region at least are needed.")
    labels, count = ndimage.label(saliency >= np.quantile(saliency, 1 - share))
    sums = ndimage.sum(saliency, labels, np.arange(1, count + 1))
    kept = np.argsort(-sums, kind="stable")[:most] + 1
    slices = ndimage.find_objects(labels)
    boxes = [(s[0].start, s[1].start, s[0].stop, s[1].stop) for s in (slices[k - 1] for k in kept)]
    return np.isin(labels, kept), np.array(boxes, int)


def crop(image: Any, mask: Any, margin: int = 0) -> np.ndarray:
    """The part of an image (rows, columns, ...) in a mask's box, widened by the margin; 0 where the mask is not."""
    image, mask = np.asarray(image), np.asarray(mask, bool)
    if image.shape[:2] != mask.shape:
        raise ValueError(f"The mask has the shape {mask.shape} and the image {image.shape[:2]}: make them alike.")
    if margin < 0:
        raise ValueError(f"crop(margin={margin}): a number of pixels around the mask's box is needed, 0 or more.")
    if not mask.any():
        raise ValueError("The mask is empty: there is nothing to crop.")
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    first = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    kept = np.where(mask.reshape(*mask.shape, *(1,) * (image.ndim - 2)), image, 0)
    return kept[first[0] : rows[-1] + 1 + margin, first[1] : columns[-1] + 1 + margin]
