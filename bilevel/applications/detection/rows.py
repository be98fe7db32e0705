"""Boxes image by image: padded arrays, or as many rows as there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Boxes = Mapping[str, Any] | Sequence[Mapping[str, Any]] | Any
"""Padded: arrays with a leading axis of images (or frames) and one of rows, "mask" being false where a row is padding,
by name in a mapping or as attributes (`suppress` gives such `Detections`). Or a sequence with a mapping for each image,
without padding."""


def by_image(boxes: Boxes, name: str) -> Iterator[dict[str, np.ndarray]]:
    """Image by image the rows that are no padding."""
    kinds = ("boxes", "scores", "classes", "ids", "crowd", "mask")
    if not isinstance(boxes, (Mapping, Sequence)) and hasattr(boxes, "boxes"):
        boxes = {key: getattr(boxes, key) for key in kinds if hasattr(boxes, key)}
    if isinstance(boxes, Mapping):
        arrays = {key: np.asarray(boxes[key]) for key in kinds if key in boxes}
        if "boxes" in arrays and (arrays["boxes"].ndim != 3 or arrays["boxes"].shape[-1] != 4):
            raise ValueError(
                f"{name}['boxes'] has the shape {arrays['boxes'].shape}; (images, boxes, 4) was expected, with padding "
                "told by 'mask'. For other numbers of boxes give a sequence of one mapping per image."
            )
        count = len(arrays.get("boxes", ()))
        if any(len(array) != count for array in arrays.values()):
            counts = ", ".join(f"{key!r} {len(array)}" for key, array in arrays.items())
            raise ValueError(f"{name} disagrees on the number of images: {counts}. Make them equal.")
        boxes = [{key: array[k] for key, array in arrays.items()} for k in range(count)]
    for k, image in enumerate(boxes):
        rows = {key: np.asarray(image[key]) for key in kinds if key in image}
        if "boxes" in rows and rows["boxes"].size == 0:
            rows["boxes"] = rows["boxes"].reshape(-1, 4)
        if len({np.shape(array)[:1] for array in rows.values()}) > 1:
            counts = ", ".join(f"{key!r} {np.shape(array)}" for key, array in rows.items())
            raise ValueError(f"{name}, image {k} disagrees on the number of rows: {counts}. Make them equal.")
        mask = rows.pop("mask", None)
        yield rows if mask is None else {key: array[mask.astype(bool)] for key, array in rows.items()}


def checked(image: Mapping[str, np.ndarray], where: str, *needed: str) -> dict[str, np.ndarray]:
    """The boxes of an image in float64, and what else is needed of them: whole numbers, or "scores".

    Raises:
        ValueError: something is missing, or a row is no box; `where` says of which image and what.
    """
    missing = [key for key in ("boxes", *needed) if key not in image]
    if missing:
        raise ValueError(f"{where}: no {', '.join(map(repr, missing))} among {', '.join(image) or 'nothing'}.")
    boxes = np.asarray(image["boxes"], np.float64)
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"{where}: the boxes have the shape {boxes.shape}; (boxes, 4) was expected.")
    broken = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
    if broken.any():
        row = int(broken.argmax())
        raise ValueError(
            f"{where} {row}: {boxes[row].tolist()} is no box. Corners are x1, y1, x2, y2 in pixels, finite, with "
            "x1 <= x2 and y1 <= y2; padding is told by 'mask'."
        )
    rows = {"boxes": boxes}
    for key in needed:
        numbers = np.asarray(image[key])
        if numbers.shape != (len(boxes),):
            raise ValueError(f"{where}: {key!r} has the shape {numbers.shape}; ({len(boxes)},) was expected.")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{where}: {key!r} holds {numbers[~np.isfinite(numbers)][0]}; give finite numbers.")
        if key != "scores" and (numbers != np.round(numbers)).any():
            raise ValueError(f"{where}: {key!r} holds {numbers[numbers != np.round(numbers)][0]}; give whole numbers.")
        rows[key] = numbers.astype(np.float64 if key == "scores" else int)
    return rows
