"""The contrast of two attention maps: in closed form, as a lower level, fused over layers and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import Problem
from bilevel.applications.application import Application


def check_maps(name: str, maps: Any, mass: float | None = None) -> np.ndarray:
    """Attention maps as an array, or an error that names what is wrong with them.

    Args:
        name: of the maps, for errors.
        maps: (..., tokens).
        mass: what each map sums to; None: a mass between 0 and 1, since attention to what is no image is left out.
    """
    maps = np.asarray(maps)
    if maps.ndim < 1 or not np.isfinite(maps).all():
        raise ValueError(f"The {name} maps hold values that are missing or infinite: attention is finite.")
    if (maps < 0).any():
        raise ValueError(f"The {name} maps hold negative values (least {maps.min():.3g}): give probabilities.")
    sums = maps.sum(-1, dtype=np.float64)
    wrong = (sums <= 0) | (sums > 1 + 1e-3) if mass is None else abs(sums - mass) > 1e-3
    if wrong.any():
        expected = "a mass in (0, 1], that of attention to the image" if mass is None else f"{mass}"
        raise ValueError(
            f"{int(wrong.sum())} of {sums.size} {name} maps do not sum to {expected}: the first sums to "
            f"{sums[wrong].flat[0]:.4g}. Give probabilities over tokens on the last axis, or normalise them."
        )
    return maps


def contrast(question: Array, general: Array, strength: Any) -> Array:
    """A_Q / (A_G + lambda): the attention under the question over that under a general instruction.

    The exact minimiser over X of the strictly convex sum (X A_G - A_Q)^2 + lambda sum X^2 A_G.

    Args:
        question, general: A_Q and A_G, maps of one shape.
        strength: lambda > 0, a number, or an array that broadcasts against the maps (one per layer, say).

    Reference: Ge et al., "CARVE" (arXiv:2509.06461).
    """
    check_strength(strength)
    return question / (general + strength)


def check_strength(strength: Any) -> None:
    """Raise where lambda is not positive (a traced one is not looked at)."""
    if isinstance(strength, jax.core.Tracer):
        return
    if not (np.asarray(strength) > 0).all():
        raise ValueError(
            f"lambda = {np.min(np.asarray(strength)):.3g} was given; the contrast divides by A_G + lambda and its "
            "problem is strictly convex for lambda > 0 alone: give a positive number (the paper's code takes 1e-8)."
        )


def entropy(maps: Array) -> Array:
    """-sum a log a of each map, normalised to sum to 1, in nats: at most log(tokens). (..., tokens) -> (...)."""
    share = maps / maps.sum(-1, keepdims=True)
    return -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), -1)


def clutter(images: Any, bins: int = 180) -> tuple[np.ndarray, np.ndarray]:
    """Two measures of how much is going on in colour images (n, rows, columns, 3), 0..1.

    Returns:
        The share of pixels at an edge (brightness gradient above 0.1), and the entropy of the hues' histogram over
        log(bins), of the pixels that have a hue.
    """
    images = np.asarray(images, float)
    if images.ndim != 4 or images.shape[-1] != 3 or not ((images >= 0) & (images <= 1)).all():
        raise ValueError(
            f"clutter of images {images.shape}: (n, rows, columns, 3) in 0..1 are needed; divide bytes by 255."
        )
    grey = images.mean(-1)
    rows, columns = np.gradient(grey, axis=(1, 2))
    edges = (np.hypot(rows, columns) > 0.1).mean((1, 2))
    high, low = images.max(-1), images.min(-1)
    spread = np.where(high > low, high - low, 1)
    r, g, b = np.moveaxis(images, -1, 0)
    hue = np.select([high == r, high == g], [(g - b) / spread % 6, (b - r) / spread + 2], (r - g) / spread + 4) / 6
    entropies = []
    for h, coloured in zip(hue, high > low, strict=True):
        counts = np.histogram(h[coloured], bins, (0, 1))[0]
        share = counts[counts > 0] / max(counts.sum(), 1)
        entropies.append(-(share * np.log(share)).sum() / np.log(bins))
    return edges, np.asarray(entropies)


def fuse(maps: Array, weights: Array, image: tuple[int, int], grid: tuple[int, int]) -> Array:
    """The saliency over the image: each map on its grid, bilinearly enlarged, summed with its weight.

    Args:
        maps: (layers, steps, tokens), contrasts or plain attention.
        weights: of the layers (layers,); step s counts s + 1 times, as the paper's code has it.
        image: (rows, columns) of the result.
        grid: (rows, columns) of the tokens.
    """
    _, steps, tokens = maps.shape
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"fuse(grid={grid}) has {grid[0] * grid[1]} places for {tokens} tokens.")
    each = weights[:, None] * jnp.arange(1, steps + 1, dtype=maps.dtype)
    total = jnp.einsum("ls,lst->t", each, maps).reshape(grid)
    return jax.image.resize(total, image, "linear", antialias=False)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Oracle(Application[Array, Array]):
    """The problem that `oracle` makes, with its answers.

    Attributes:
        solution: `x -> y*(x)`.
        objective: `x -> F(x, y*(x))`.
        hypergradient: `x ->` its derivative, in closed form.
        condition: `x ->` the condition number of the lower level's Hessian.
    """

    solution: Callable[[Array], Array]
    objective: Callable[[Array], Array]
    hypergradient: Callable[[Array], Array]
    condition: Callable[[Array], Array]
    name: str = "contrast of attention maps (test problem)"
    description: str = "The contrast's lambda; the contrast as the minimiser of a separable quadratic of bad condition."
    source: str = 'Ge et al., "CARVE", arXiv:2509.06461'


def oracle(question: Any, general: Any, mask: Any, strength: float = 1e-2) -> Oracle:
    """The contrast as a lower level, and a known mask above it: a test problem for linear solvers.

        lower  f(x, y) = sum (y A_G - A_Q)^2 + lambda sum y^2 A_G,   lambda = exp(x)
        upper  F(x, y) = mean of the cross-entropy of the mask under the softmax of y

    y* = A_Q / (A_G + lambda), dy*/dlambda = -A_Q / (A_G + lambda)^2, and the Hessian is diagonal, 2 A_G (A_G + lambda):
    its condition number is the largest of that over the smallest, easily 1e6 to 1e9. As a bilevel problem it is
    degenerate, the lower level being in closed form.

    Args:
        question, general: A_Q and A_G (.., tokens), with no A_G of zero.
        mask: (.., tokens), the share of each token in the answer's region; each row sums to 1.
        strength: lambda at x0.
    """
    check_strength(strength)
    question, general = check_maps("question", question), check_maps("general", general)
    mask = check_maps("mask", mask, mass=1.0)
    if not question.shape == general.shape == mask.shape:
        raise ValueError(f"Maps and mask differ in shape: {question.shape}, {general.shape}, {mask.shape}.")
    if (general == 0).any():
        raise ValueError("A general map has a zero: J is flat there. Leave these tokens out.")

    def upper(x: Array, y: Array, mask: Array) -> Array:
        return -jnp.mean(jnp.sum(mask * jax.nn.log_softmax(y), -1))

    def lower(x: Array, y: Array, batch: Any) -> Array:
        a, g = batch
        return jnp.sum((y * g - a) ** 2) + jnp.exp(x) * jnp.sum(y**2 * g)

    solution = lambda x: question / (general + jnp.exp(x))  # noqa: E731
    objective = lambda x: upper(x, solution(x), mask)  # noqa: E731

    def hypergradient(x: Array) -> Array:
        lam, y = jnp.exp(x), solution(x)
        upper_y = (jax.nn.softmax(y) * mask.sum(-1, keepdims=True) - mask) / (mask.size // mask.shape[-1])
        return jnp.sum(upper_y * -question / (general + lam) ** 2) * lam

    def condition(x: Array) -> Array:
        curvature = general * (general + jnp.exp(x))
        return curvature.max() / curvature.min()

    problem = Problem(upper=upper, lower=lower, upper_data=mask, lower_data=(question, general))
    x0, y0 = jnp.log(jnp.asarray(strength, question.dtype)), jnp.zeros_like(jnp.asarray(question))
    return Oracle(
        problem, x0, y0, solution=solution, objective=objective, hypergradient=hypergradient, condition=condition
    )
