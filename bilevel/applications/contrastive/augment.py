"""Augmentations of 8x8 images, drawn inside the compiled loop: the draws travel in the batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from bilevel.applications.contrastive.digits import SIDE


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Shift, crop and resize, contrast, brightness, noise; no flips, since digits have a direction.

        view = c (resampled - mean) + mean + b + noise

    `draw` says what is done to each image, `apply` does it. A batch carries its draws, so that a loss is a
    deterministic function of (x, y, batch): one draw can be evaluated at two points. Views may leave 0..1.

    Args:
        shift: pixels, uniform in both directions.
        crop: the smallest side of a crop as a share, uniform up to 1; the crop lies anywhere within the image.
        contrast: c is uniform within 1 +- contrast.
        brightness: b is uniform within +- brightness.
        noise: the deviation of the noise, which is uniform.
    """

    shift: float = 1.0
    crop: float = 0.75
    contrast: float = 0.3
    brightness: float = 0.1
    noise: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1 or min(dataclasses.astuple(self)) < 0:
            raise ValueError(f"{self}: the strengths are not negative, and the crop's share lies in (0, 1].")

    def draw(self, key: Array, count: int) -> dict[str, Array]:
        """What is done to `count` images."""
        u = jax.random.uniform(key, (count, 7 + SIDE**2), minval=-1.0)  # one program, and not seven
        scale = 0.5 * (1 + self.crop + (1 - self.crop) * u[:, 0])
        return {
            "scale": scale,
            "offset": u[:, 1:3] * (1 - scale)[:, None] * (SIDE - 1) / 2 + self.shift * u[:, 3:5],
            "contrast": 1 + self.contrast * u[:, 5],
            "brightness": self.brightness * u[:, 6],
            "noise": 3**0.5 * self.noise * u[:, 7:].reshape(count, SIDE, SIDE),
        }

    def apply(self, draws: dict[str, Array], images: Array) -> Array:
        """The views (n, 8, 8) of images (n, 8, 8): linear interpolation, zeros beyond the border."""
        grid, middle = jnp.arange(SIDE, dtype=images.dtype), (SIDE - 1) / 2
        at = middle + draws["offset"][..., None] + (grid - middle) * draws["scale"][:, None, None]
        rows = jnp.maximum(0, 1 - jnp.abs(at[:, 0, :, None] - grid))  # (n, view, pixel)
        columns = jnp.maximum(0, 1 - jnp.abs(at[:, 1, None, :] - grid[:, None]))  # (n, pixel, view)
        # Sums of products of whole arrays: many products of 8x8 matrices take as long as the encoder's gradient.
        half, views = jnp.zeros_like(images), jnp.zeros_like(images)
        for k in range(SIDE):
            half = half + rows[:, :, k, None] * images[:, k, None, :]
        for k in range(SIDE):
            views = views + half[:, :, k, None] * columns[:, k, None, :]
        mean = views.mean((1, 2), keepdims=True)
        c, b = draws["contrast"][:, None, None], draws["brightness"][:, None, None]
        return c * (views - mean) + mean + b + draws["noise"]
