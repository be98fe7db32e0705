"""The upper variable: a perturbation of images that no parameters can make larger than its bound."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.contrastive.digits import SIDE
from bilevel.applications.contrastive.encoders import Parameters, layer, linear


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """g(x) = clip(x + bound tanh(h(x)), 0, 1), h one hidden layer: |g(x) - x| <= bound, exactly, whatever its numbers.

    Exactly, that is in real arithmetic on the floating-point images: the clip's ends are x +- bound rounded towards x.
    Where h is not a number nothing is added. Differentiable in the parameters.

    Args:
        bound: L-infinity, in (0, 1], on images in 0..1.
        hidden: the width of h's hidden layer.
    """

    bound: float = 8 / 255
    hidden: int = 64

    def __post_init__(self) -> None:
        check_bound(self.bound)
        object.__setattr__(self, "bound", float(self.bound))
        if not isinstance(self.hidden, int) or self.hidden < 1:
            raise ValueError(f"Perturbation(hidden={self.hidden!r}): the width is a positive integer.")

    def init(self, key: Array) -> Parameters:
        """Parameters of a small perturbation that depends on the image."""
        first, second = jax.random.split(key)
        return {"first": layer(first, SIDE**2, self.hidden), "second": layer(second, self.hidden, SIDE**2)}

    def fixed(self, pattern: Array) -> Parameters:
        """Parameters of the perturbation bound * tanh(pattern), the same for every image."""
        params = jax.tree.map(jnp.zeros_like, self.init(jax.random.key(0)))
        return {**params, "second": {**params["second"], "b": jnp.ravel(pattern)}}

    def __call__(self, params: Parameters, images: Array) -> Array:
        """The perturbed images (..., 8, 8), in 0..1 where the images are."""
        flat = images.reshape(*images.shape[:-2], SIDE**2)
        h = linear(params["second"], jax.nn.gelu(linear(params["first"], flat))).reshape(images.shape)
        low, high = jax.lax.stop_gradient(_ends(images, self.bound))
        return jnp.clip(images + self.bound * jnp.tanh(jnp.where(jnp.isnan(h), 0, h)), low, high)


def _ends(images: Array, bound: float) -> tuple[Array, Array]:
    """The least and the largest value of each pixel: within 0..1 and within the bound, rounded towards the pixel."""
    below = np.asarray(bound, images.dtype)
    if float(below) > bound:
        below = np.nextafter(below, np.zeros_like(below))
    # Two units in the last place towards the pixel undo any rounding of the sum; negative ends are cut off at 0.
    slack = 2 * jnp.finfo(images.dtype).eps
    high = jnp.maximum((images + below) * (1 - slack), images)
    low = jnp.minimum((images - below) * (1 + slack), images)
    return jnp.maximum(low, 0), jnp.minimum(high, 1)


def check_bound(bound: Any) -> None:
    """Raise where the bound is no number in (0, 1]."""
    if isinstance(bound, bool) or not isinstance(bound, numbers.Real) or not 0 < float(bound) <= 1:
        raise ValueError(
            f"bound={bound!r}: pixels lie in 0..1, so that an L-infinity bound lies in (0, 1]; the literature's is "
            "8/255 on photographs."
        )
