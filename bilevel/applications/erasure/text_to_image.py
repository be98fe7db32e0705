"""A text-to-image flow as it is used here: the straight path, its velocity loss, and guided Euler sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.erasure.flux import Flow, Flux

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class TextToImage:
    """A Flux network with the positions of its tokens: a velocity of (parameters, x_t, prompt, t).

    Any object with `velocity` and `attend` of these signatures does as well.

    Args:
        flux: the network.
        rows, columns: of the patches; their product is the number of image tokens.
        block: whose attention is looked at; None: the last dual block's.
        guidance: what a network with a guidance input is given.
    """

    flux: Flux
    rows: int
    columns: int
    block: int | None = None
    guidance: float | None = None

    @property
    def tokens(self) -> tuple[int, int]:
        """The shape of one image: patches, numbers per patch."""
        return self.rows * self.columns, self.flux.in_channels

    def _call(self, params: PyTree, x: Array, prompt: Any, t: Any, attention: tuple[int, ...]) -> Flow:
        embedded, pooled = (prompt["tokens"], prompt["pooled"]) if isinstance(prompt, dict) else (prompt, None)
        row, column = np.divmod(np.arange(self.rows * self.columns), self.columns)
        return self.flux(
            params,
            x,
            embedded,
            t,
            img_ids=jnp.asarray(np.stack([0 * row, row, column], 1), x.dtype),
            txt_ids=jnp.zeros((embedded.shape[1], 3), x.dtype),
            pooled_projections=pooled,
            guidance=None if self.guidance is None else jnp.asarray(self.guidance, x.dtype),
            attention=attention,
        )

    def velocity(self, params: PyTree, x: Array, prompt: Any, t: Any) -> Array:
        """The velocity (batch, tokens, channels).

        `prompt` is (batch, words, size), or {"tokens": such, "pooled": (batch, size)}.
        """
        return self._call(params, x, prompt, t, ()).velocity

    def attend(self, params: PyTree, x: Array, prompt: Any, t: Any) -> tuple[Array, Array]:
        """The velocity, and the attention onto the prompt's words (batch, heads, image tokens, words)."""
        block = self.flux.num_layers - 1 if self.block is None else self.block
        found = self._call(params, x, prompt, t, (block,))
        words = found.attention[block].shape[-1] - x.shape[1]
        return found.velocity, found.attention[block][:, :, words:, :words]


def on_path(x0: Array, noise: Array, t: Array) -> Array:
    """x_t = (1 - t) x_0 + t noise, t one number per image. Its velocity is noise - x_0."""
    t = t.reshape(-1, *(1,) * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def matching(model: Any, params: PyTree, x0: Array, noise: Array, t: Array, prompt: Any) -> Array:
    """The flow-matching loss: the mean of |v(x_t, c, t) - (noise - x_0)|^2."""
    return jnp.square(model.velocity(params, on_path(x0, noise, t), prompt, t) - (noise - x0)).mean()


def sample(
    model: Any, params: PyTree, noise: Array, prompt: Any, null: Any = None, *, guidance: float = 2.5, steps: int = 20
) -> Array:
    """Images from noise by `steps` Euler steps from t = 1 to 0, along v(null) + guidance (v(prompt) - v(null)).

    Args:
        model, params: the flow.
        noise: (batch, tokens, channels).
        prompt: of each image.
        null: the empty prompt, of each image; None: no guidance.
        guidance: its weight.
        steps: of the same length.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"sample(steps={steps!r}): a positive integer is needed.")
    both = prompt if null is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), prompt, null)

    def step(x: Array, t: Array) -> tuple[Array, None]:
        if null is None:
            v = model.velocity(params, x, both, t)
        else:
            given, empty = jnp.split(model.velocity(params, jnp.concatenate([x, x]), both, t), 2)
            v = empty + guidance * (given - empty)
        return x - v / steps, None

    return jax.lax.scan(step, noise, 1 - jnp.arange(steps, dtype=noise.dtype) / steps)[0]
