"""Images and their boxes changed at random, in the compiled loop: letterboxing, mosaic, flips, colour jitter.

    train = augmented(batch, 16, mosaic=1.0)          # a data.Sampler: a level's data
    problem = Problem(upper=..., lower=..., lower_data=train, ...)

A batch is a mapping: "image" (B, H, W, 3) in 0..1, "boxes" (B, M, 4), x1, y1, x2, y2 in pixels, "classes" (B, M) and
"mask" (B, M). Whatever else has the axes (B, M), such as a box's number or weight, goes with its box.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import data

Batch = dict[str, Any]

GREY = 114 / 255
"""What is around an image that does not fill its canvas, as in YOLO."""

LEAST_AREA = 0.1
"""A box of which less than this share is left within its picture is dropped, as in YOLO."""

LEAST_SIDE = 2.0
"""And one of which a side is shorter than this, in pixels."""


class Letterbox(NamedTuple):
    """Where an image comes to lie in a square: as large as it fits, in the middle.

    Attributes:
        rows, columns: the size that the image is scaled to.
        top, left: where it begins.
        scale: of x and of y.
    """

    rows: int
    columns: int
    top: int
    left: int
    scale: tuple[float, float]

    @classmethod
    def of(cls, height: int, width: int, size: int) -> Letterbox:
        """That of an image of so many pixels in a square of this size."""
        height, width = int(height), int(width)
        ratio = size / max(height, width)
        rows, columns = (max(1, round(ratio * side)) for side in (height, width))
        return cls(rows, columns, (size - rows) // 2, (size - columns) // 2, (columns / width, rows / height))

    def boxes(self, boxes: Any) -> Any:
        """Corners (..., 4) of the image in the square."""
        scale, start = self._as_corners()
        return boxes * scale + start

    def back(self, boxes: Any) -> Any:
        """Corners (..., 4) of the square in the image: where a detection is in the photograph."""
        scale, start = self._as_corners()
        return (boxes - start) / scale

    def _as_corners(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array([*self.scale] * 2, np.float32), np.array([self.left, self.top] * 2, np.float32)


def letterbox(batch: Mapping[str, Any], size: int) -> Batch:
    """Images (B, H, W, 3) of any sides, as large as they fit into squares, the rest grey; their boxes with them."""
    image = jnp.asarray(batch["image"])
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"letterbox: the images are {image.dtype}: scale them to floating point in 0..1 first.")
    place = Letterbox.of(image.shape[1], image.shape[2], size)
    scaled = jax.image.resize(image, (len(image), place.rows, place.columns, image.shape[-1]), "linear")
    margins = [(side, size - side - length) for side, length in ((place.top, place.rows), (place.left, place.columns))]
    square = jnp.pad(scaled, ((0, 0), *margins, (0, 0)), constant_values=GREY)
    boxes = jnp.asarray(batch["boxes"])
    return {**batch, "image": square, "boxes": jnp.where(_real(batch), place.boxes(boxes), boxes)}


def flip(batch: Mapping[str, Any], key: Array, rate: float = 0.5, axis: int = 2) -> Batch:
    """Mirror each image with this probability, left to right (axis 2) or top to bottom (axis 1)."""
    if axis not in (1, 2):
        raise ValueError(f"flip(axis={axis!r}): 2 mirrors left to right, 1 top to bottom.")
    image, boxes = jnp.asarray(batch["image"]), jnp.asarray(batch["boxes"])
    chosen = jax.random.bernoulli(key, rate, (len(image), 1, 1))
    low, high = (0, 2) if axis == 2 else (1, 3)
    side = image.shape[axis]
    mirrored = boxes.at[..., low].set(side - boxes[..., high]).at[..., high].set(side - boxes[..., low])
    return {
        **batch,
        "image": jnp.where(chosen[..., None], jnp.flip(image, axis), image),
        "boxes": jnp.where(chosen & _real(batch), mirrored, boxes),
    }


def jitter(
    batch: Mapping[str, Any], key: Array, hue: float = 0.015, saturation: float = 0.7, value: float = 0.4
) -> Batch:
    """Multiply each image's hue, saturation and value by 1 + u, u uniform in -gain..gain (hue goes round)."""
    image = jnp.asarray(batch["image"])
    gains = jnp.asarray([hue, saturation, value], image.dtype)
    factor = 1 + gains * jax.random.uniform(key, (len(image), 1, 1, 3), image.dtype, -1, 1)
    h, s, v = jnp.moveaxis(to_hsv(image) * factor, -1, 0)
    return {**batch, "image": from_hsv(jnp.stack([h % 1, jnp.clip(s, 0, 1), jnp.clip(v, 0, 1)], -1))}


def to_hsv(image: Array) -> Array:
    """Red, green and blue as hue (0..1), saturation and value, along the last axis."""
    high, low = image.max(-1), image.min(-1)
    spread = high - low
    safe = jnp.where(spread > 0, spread, 1)
    red, green, blue = jnp.moveaxis((high[..., None] - image) / safe[..., None], -1, 0)
    hue = jnp.where(
        image[..., 0] == high, blue - green, jnp.where(image[..., 1] == high, 2 + red - blue, 4 + green - red)
    )
    hue = jnp.where(spread > 0, hue / 6 % 1, 0)
    return jnp.stack([hue, jnp.where(high > 0, spread / jnp.where(high > 0, high, 1), 0), high], -1)


def from_hsv(image: Array) -> Array:
    """The inverse of `to_hsv`: channel c is v - v s max(0, min(k, 4 - k, 1)), k = (n_c + 6 h) mod 6, n = 5, 3, 1."""
    h, s, v = (image[..., i, None] for i in range(3))
    k = (jnp.asarray([5, 3, 1], image.dtype) + 6 * h) % 6
    return v - v * s * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def mosaic(four: Mapping[str, Any], key: Array, scale: float = 0.5) -> Batch:
    """Four images as one of the same size, around a random point, each at a random scale.

    The point lies between a quarter and three quarters of each side. An image is scaled by a factor uniform in
    1 - scale..1 + scale and laid with its inner corner on the point; what sticks out of its quarter is cut, and what it
    leaves open is grey. (Bochkovskiy, Wang and Liao, "YOLOv4", arXiv:2004.10934.)

    Args:
        four: "image" (4, H, W, 3), "boxes" (4, M, 4), ...
        key: of the point and the scales.
        scale: see above; below 1.

    Returns:
        One image without the leading axis: "image" (H, W, 3), "boxes" (4 M, 4), "classes" (4 M,), ...
    """
    image = jnp.asarray(four["image"])
    sides = jnp.asarray([image.shape[2], image.shape[1]], image.dtype)
    of_point, of_scale = jax.random.split(key)
    point = jnp.round(sides * jax.random.uniform(of_point, (2,), image.dtype, 0.25, 0.75))
    factor = jax.random.uniform(of_scale, (4,), image.dtype, 1 - scale, 1 + scale)
    after = jnp.asarray([[0, 0], [1, 0], [0, 1], [1, 1]], bool)  # whether a quarter is right of, below the point
    start = jnp.where(after, point, point - factor[:, None] * sides)
    low, high = jnp.where(after, point, 0), jnp.where(after, sides, point)
    pictures, covered = jax.vmap(_placed)(image, factor, start, low, high)
    boxes, mask = jax.vmap(_moved)(jnp.asarray(four["boxes"]), jnp.asarray(four["mask"]), factor, start, low, high)
    canvas = jnp.where(covered.any(0), pictures.sum(0), jnp.asarray(GREY, image.dtype))
    rest = {name: jnp.asarray(leaf) for name, leaf in four.items() if name not in ("image", "boxes", "mask")}
    flat = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in {**rest, "boxes": boxes, "mask": mask}.items()}
    return {"image": canvas, **flat}


def zoom(batch: Mapping[str, Any], key: Array, scale: float = 0.5, translate: float = 0.1) -> Batch:
    """Scale each image around its middle by a factor uniform in 1 - scale..1 + scale, and move it.

    It is moved by a share of its sides uniform in -translate..translate each way; boxes are cut at the canvas.
    """
    image = jnp.asarray(batch["image"])
    sides = jnp.asarray([image.shape[2], image.shape[1]], image.dtype)
    of_scale, of_place = jax.random.split(key)
    factor = jax.random.uniform(of_scale, (len(image),), image.dtype, 1 - scale, 1 + scale)
    shift = sides * jax.random.uniform(of_place, (len(image), 2), image.dtype, -translate, translate)
    start = sides / 2 * (1 - factor[:, None]) + shift
    everywhere = jnp.broadcast_to(jnp.zeros(2, image.dtype), start.shape), jnp.broadcast_to(sides, start.shape)
    pictures, covered = jax.vmap(_placed)(image, factor, start, *everywhere)
    moved = jax.vmap(_moved)(jnp.asarray(batch["boxes"]), jnp.asarray(batch["mask"]), factor, start, *everywhere)
    canvas = jnp.where(covered, pictures, jnp.asarray(GREY, image.dtype))
    return {**batch, "image": canvas, "boxes": moved[0], "mask": moved[1]}


def _placed(image: Array, factor: Array, start: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """A scaled image (H, W, 3) that begins at `start` (x, y), zero outside low..high; and where it is, (H, W, 1)."""
    moved = jax.image.scale_and_translate(
        image, image.shape, (0, 1), jnp.stack([factor, factor]), start[::-1], "linear", antialias=True
    )
    sides = factor * jnp.asarray([image.shape[1], image.shape[0]], image.dtype)
    first, last = jnp.maximum(start, low), jnp.minimum(start + sides, high)
    x, y = (jnp.arange(side) + jnp.asarray(0.5, image.dtype) for side in (image.shape[1], image.shape[0]))
    inside = ((x > first[0]) & (x < last[0]))[None, :, None] & ((y > first[1]) & (y < last[1]))[:, None, None]
    return jnp.where(inside, moved, 0), inside


def _moved(boxes: Array, mask: Array, factor: Array, start: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Boxes (M, 4) that go with `_placed`, cut to low..high, and which of them are still there."""
    moved = factor * boxes + jnp.tile(start, 2)
    cut = jnp.clip(moved, jnp.tile(low, 2), jnp.tile(high, 2))
    before, after = moved[:, 2:] - moved[:, :2], cut[:, 2:] - cut[:, :2]
    kept = mask & (after.prod(-1) >= LEAST_AREA * before.prod(-1)) & (after >= LEAST_SIDE).all(-1)
    return jnp.where(kept[:, None], cut, 0), kept


def _real(batch: Mapping[str, Any]) -> Array:
    """(B, M, 1), false where a row is padding, which stays as it is."""
    return jnp.asarray(batch["mask"])[..., None]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to a batch, `(key, arrays) -> batch`; the defaults are those that BGF-YOLO was trained with.

    Attributes:
        batch: images in a batch, drawn with replacement.
        mosaic: the share of mosaics among them; the others are zoomed.
        scale: of mosaic and zoom.
        translate: of zoom.
        flip: the share mirrored left to right.
        flip_down: the share mirrored top to bottom.
        hue, saturation, value: the gains of `jitter`.
    """

    batch: int
    mosaic: float = 1.0
    scale: float = 0.5
    translate: float = 0.1
    flip: float = 0.5
    flip_down: float = 0.0
    hue: float = 0.015
    saturation: float = 0.7
    value: float = 0.4

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"Augmentation(batch={self.batch}): a batch has one image at least.")
        for name in ("mosaic", "flip", "flip_down", "hue", "saturation", "value", "translate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Augmentation({name}={getattr(self, name)}): a share, it lies between 0 and 1.")
        if not 0 <= self.scale < 1:
            raise ValueError(f"Augmentation(scale={self.scale}): factors go from 1 - scale to 1 + scale, above 0.")

    def __call__(self, key: Array, arrays: Mapping[str, Any]) -> Batch:
        """A batch of the arrays; where there are mosaics it has four times as many rows for boxes."""
        of_rows, of_choice, of_mosaic, of_zoom, of_flip, of_flip_down, of_jitter = jax.random.split(key, 7)
        rows = jax.random.randint(of_rows, (self.batch, 4), 0, len(arrays["boxes"]))
        drawn = zoom(_taken(arrays, rows[:, 0]), of_zoom, self.scale, self.translate)
        if self.mosaic:
            keys = jax.random.split(of_mosaic, self.batch)
            mosaics = jax.vmap(lambda key, row: mosaic(_taken(arrays, row), key, self.scale))(keys, rows)
            chosen = jax.random.bernoulli(of_choice, self.mosaic, (self.batch,))
            drawn = {name: _either(chosen, leaf, drawn[name]) for name, leaf in mosaics.items()}
        drawn = flip(flip(drawn, of_flip, self.flip), of_flip_down, self.flip_down, axis=1)
        return jitter(drawn, of_jitter, self.hue, self.saturation, self.value)


def _taken(arrays: Mapping[str, Any], rows: Array) -> Batch:
    return {name: jnp.asarray(leaf)[rows] for name, leaf in arrays.items()}


def _either(chosen: Array, first: Array, second: Array) -> Array:
    """By image the first or the second, which is padded to its number of rows."""
    if second.shape != first.shape:
        second = jnp.pad(second, ((0, 0), (0, first.shape[1] - second.shape[1]), *((0, 0),) * (first.ndim - 2)))
    return jnp.where(chosen.reshape(-1, *(1,) * (first.ndim - 1)), first, second)


def augmented(arrays: Mapping[str, Any], batch: int, **options: float) -> data.Sampler:
    """A source of changed images for a level of a `Problem`.

    Args:
        arrays: "image" (n, H, W, 3) in 0..1, "boxes" (n, M, 4), "classes" (n, M), "mask" (n, M), and what else has the
            axes (n, M) and goes with the boxes.
        batch: images in a batch.
        options: those of `Augmentation`.

    Raises:
        ValueError: a leaf without the axes (n, M), pixels outside 0..1, or an option out of its range.
    """
    missing = [name for name in ("image", "boxes", "classes", "mask") if name not in arrays]
    if missing:
        raise ValueError(f"augmented: the arrays have no {', '.join(map(repr, missing))}; they have {list(arrays)}.")
    axes = np.shape(arrays["mask"])
    for name, leaf in arrays.items():
        if name != "image" and np.shape(leaf)[:2] != axes:
            raise ValueError(
                f"augmented: {name!r} has the shape {np.shape(leaf)}, and 'mask' {axes}. What travels with boxes has "
                "their axes; repeat what an image has for each of its boxes: a mosaic has those of four images."
            )
    image = arrays["image"]
    if np.ndim(image) != 4 or len(image) != axes[0] or not jnp.issubdtype(jnp.asarray(image[:1]).dtype, jnp.floating):
        raise ValueError(
            f"augmented: 'image' is {np.shape(image)} of {np.asarray(image[:1]).dtype}; ({axes[0]}, H, W, 3) of "
            "floating numbers in 0..1 was expected: divide 8-bit pixels by 255."
        )
    if np.min(image) < 0 or np.max(image) > 1:
        raise ValueError(f"augmented: pixels go from {np.min(image)} to {np.max(image)}; 0 to 1 was expected.")
    return data.Sampler(Augmentation(batch, **options), dict(arrays))
