"""Overlaps of boxes and one-to-one matchings on the host, in float64: what metrics and trackers stand on."""

from __future__ import annotations

import numpy as np

Box = np.ndarray


def overlaps(a: Box, b: Box, crowd: np.ndarray | None = None) -> np.ndarray:
    """The intersection over union of every box of a with every box of b, (n, m); 0 where either has no area.

    The arithmetic is that of pycocotools: boxes are taken as a corner, a width and a height, so that an overlap of
    exactly a threshold falls on the same side of it.

    Args:
        a: (n, 4), corners x1, y1, x2, y2.
        b: (m, 4).
        crowd: (m,) bool: where true, the intersection over the area of the box of a alone.
    """
    common, area, other = _common(a, b)
    total = area[:, None] + other[None, :] - common
    if crowd is not None:
        total = np.where(crowd[None, :], area[:, None], total)
    return np.divide(common, total, out=np.zeros_like(common), where=common > 0)


def covered(a: Box, b: Box) -> np.ndarray:
    """The share of every box of a that lies in each box of b (intersection over the area of a), (n, m)."""
    common, area, _ = _common(a, b)
    return np.divide(common, area[:, None], out=np.zeros_like(common), where=common > 0)


def _common(a: Box, b: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intersections (n, m), the areas of a (n,) and of b (m,)."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (a, b))
    low, other_low = a[:, None, :2], b[None, :, :2]
    size, other_size = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    sides = np.minimum(low + size[:, None], other_low + other_size[None]) - np.maximum(low, other_low)
    return np.prod(np.clip(sides, 0, None), -1), np.prod(size, -1), np.prod(other_size, -1)


def assign(cost: np.ndarray, gate: float, *, most: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The one-to-one matching of rows and columns of least cost, without pairs above the gate.

    Minimised is sum over pairs of cost, plus `gate` for every row or column of the smaller side that stays alone; with
    `most`, as many pairs as possible are made first. (Kuhn 1955; by `scipy.optimize.linear_sum_assignment`.)

    Args:
        cost: (n, m); NaN is no pair.
        gate: the largest cost of a pair.
        most: whether the number of pairs comes before their cost.

    Returns:
        Rows and columns of the pairs, two arrays of whole numbers, the rows ascending.
    """
    from scipy.optimize import linear_sum_assignment

    cost = np.asarray(cost, np.float64)
    possible = cost <= gate  # false for NaN
    if not possible.any():
        return np.zeros(0, int), np.zeros(0, int)
    alone = gate
    if most:  # dearer than any exchange of possible pairs
        alone = 2 * min(cost.shape) * (np.abs(cost[possible]).max() + 1) + 1
    rows, columns = linear_sum_assignment(np.where(possible, cost, alone))
    kept = possible[rows, columns]
    return rows[kept], columns[kept]
