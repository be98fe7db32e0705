"""Smooth the lower loss in x: train y under perturbed choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.regularizers.outer import as_keyed

PyTree = Any


def softmax(x: PyTree) -> PyTree:
    """Each leaf's last axis to the simplex."""
    return jax.tree.map(lambda leaf: jax.nn.softmax(leaf, axis=-1), x)


def renormalise(a: PyTree) -> PyTree:
    """Clip at 0 and divide by the sum over the last axis: back to the simplex after a perturbation."""

    def leaf(a: jax.Array) -> jax.Array:
        clipped = jnp.maximum(a, 0)
        total = clipped.sum(-1, keepdims=True)
        return jnp.where(total > 0, clipped / jnp.where(total > 0, total, 1), 1 / a.shape[-1])

    return jax.tree.map(leaf, a)


def perturbed(
    loss: Callable[..., jax.Array],
    radius: float | Callable[[Any], Any] = 0.3,
    *,
    adversarial: bool = False,
    transform: Callable[[PyTree], PyTree] = softmax,
    project: Callable[[PyTree], PyTree] | None = renormalise,
    steps: int = 7,
) -> Callable[..., jax.Array]:
    """The lower loss of SmoothDARTS, f(project(transform(x) + d), y): y is trained to be good around x.

    - random (RS): d uniform in [-radius, radius], a fresh one for each batch. To second order its mean is f + radius^2/6 tr(f_AA);
    - adversarial (ADV): d from `steps` ascent steps of 2 radius/steps along the sign of f's gradient, within
      [-radius, radius] and projected after each, from a random start; kept only where the loss rose, else 0.

    The perturbation is a constant to all derivatives. The upper loss stays unperturbed: F = validation(transform(x), y, batch).

        schedule = optax.linear_schedule(0.03, 0.3, total_steps)
        Problem(lower=perturbed(training_loss, schedule), lower_data=data.Keyed(data.Minibatches(train, 64)), ...)

    Args:
      loss: `loss(A, y, batch)`, or `loss(A, y)` where the level has no data, with A = transform(x) what the model multiplies with.
      radius: a number, or a function of the step that comes with the batch. That step counts the lower level's draws: outer steps times
        the lower solver's steps. The authors' grows from 0.03 to 0.3.
      adversarial: ADV instead of RS; costs `steps` gradients in x and two losses more.
      transform: x to choices; a softmax over the last axis.
      project: back to the feasible choices after a perturbation; None: not at all.
      steps: of the ascent.

    Returns:
      `f(x, y, batch)` for `Problem(lower=...)` with `lower_data=data.Keyed(...)`, whose key is the source of randomness: both points of a
      finite difference see one perturbation.

    Reference: Chen, Hsieh, "Stabilizing Differentiable Architecture Search via Perturbation-based Regularization", ICML 2020.
    """
    if isinstance(radius, (int, float)) and not radius > 0:
        raise ValueError(f"perturbed(radius={radius!r}): the radius is positive.")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"perturbed(steps={steps!r}): a positive number of ascent steps is needed.")
    back = (lambda a: a) if project is None else project

    def smoothed(x: PyTree, y: PyTree, *batch: Any) -> jax.Array:
        inner, key = as_keyed("perturbed", *batch)
        rest = () if inner is None else (inner,)
        size = radius(key.step) if callable(radius) else radius
        a = transform(x)

        def at(d: PyTree) -> jax.Array:
            return loss(back(optax.tree.add(a, d)), y, *rest)

        d = _uniform(key.random, a, size)
        if adversarial:
            fixed = jax.lax.stop_gradient((a, y))
            d = _ascend(lambda a: loss(a, fixed[1], *rest), fixed[0], d, size, steps, back)
        d = jax.lax.stop_gradient(d)
        return at(d)

    return smoothed


def _uniform(key: jax.Array, like: PyTree, size: Any) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        (size * jax.random.uniform(k, leaf.shape, leaf.dtype, -1, 1)).astype(leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def _ascend(
    loss: Callable[[PyTree], jax.Array],
    a: PyTree,
    start: PyTree,
    size: Any,
    steps: int,
    back: Callable[[PyTree], PyTree],
) -> PyTree:
    """The perturbation d that `steps` signed ascent steps find, 0 where the loss at back(a + d) is not above that at a."""

    def step(_: Any, b: PyTree) -> PyTree:
        g = jax.grad(loss)(b)
        moved = jax.tree.map(lambda b, g: b + (2 * size / steps) * jnp.sign(g), b, g)
        moved = jax.tree.map(lambda m, a: a + jnp.clip(m - a, -size, size), moved, a)
        return optax.tree.cast_like(back(moved), a)

    b = jax.lax.fori_loop(0, steps, step, optax.tree.cast_like(back(optax.tree.add(a, start)), a))
    rose = loss(b) > loss(a)
    return jax.tree.map(lambda b, a: jnp.where(rose, b - a, jnp.zeros_like(a)), b, a)
