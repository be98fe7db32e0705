"""Terms that keep an upper variable from degenerating: a lower loss perturbed in x, and penalties on x.

Made for architecture search and not tied to it. What watches a run, stops it or adapts a strength is in `bilevel.runs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._arguments import explained
from bilevel.data import as_keyed
from bilevel.typing import PyTree

__all__ = ["beta_decay", "entropy", "penalised", "perturbed", "renormalise", "softmax", "zero_one"]

# ---------------------------------------------------------------- the lower loss, perturbed


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


@explained
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

    - random (RS): d uniform in [-radius, radius], a fresh one for each batch. To second order its mean is
      f + radius^2/6 tr(f_AA);
    - adversarial (ADV): d from `steps` ascent steps of 2 radius/steps along the sign of f's gradient, within
      [-radius, radius] and projected after each, from a random start; kept only where the loss rose, else 0.

    The perturbation is a constant to all derivatives. The upper loss stays unperturbed: its F is
    validation(transform(x), y, batch).

        schedule = optax.linear_schedule(0.03, 0.3, total_steps)
        Problem(lower=perturbed(training_loss, schedule), lower_data=data.Keyed(data.Minibatches(train, 64)), ...)

    Args:
      loss: `loss(A, y, batch)`, or `loss(A, y)` where the level has no data, with A = transform(x) what the model
        multiplies with.
      radius: a number, or a function of the step that comes with the batch. That step counts the lower level's draws:
        outer steps times the lower solver's steps. The authors' grows from 0.03 to 0.3.
      adversarial: ADV instead of RS; costs `steps` gradients in x and two losses more.
      transform: x to choices; a softmax over the last axis.
      project: back to the feasible choices after a perturbation; None: not at all.
      steps: of the ascent.

    Returns:
      `f(x, y, batch)` for `Problem(lower=...)` with `lower_data=data.Keyed(...)`, whose key is the source of
      randomness: both points of a finite difference see one perturbation.

    Reference: Chen, Hsieh, "Stabilizing Differentiable Architecture Search via Perturbation-based Regularization", ICML
    2020.
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

        noise = optax.tree.random_like(key.random, a, functools.partial(jax.random.uniform, minval=-1, maxval=1))
        d = optax.tree.cast_like(optax.tree.scale(size, noise), a)
        if adversarial:
            fixed = jax.lax.stop_gradient((a, y))
            d = _ascend(lambda a: loss(a, fixed[1], *rest), fixed[0], d, size, steps, back)
        d = jax.lax.stop_gradient(d)
        return at(d)

    return smoothed


def _ascend(
    loss: Callable[[PyTree], jax.Array],
    a: PyTree,
    start: PyTree,
    size: Any,
    steps: int,
    back: Callable[[PyTree], PyTree],
) -> PyTree:
    """The perturbation that `steps` signed ascent steps find; 0 where the loss there is not above that at a."""

    def step(_: Any, b: PyTree) -> PyTree:
        g = jax.grad(loss)(b)
        moved = jax.tree.map(lambda b, g: b + (2 * size / steps) * jnp.sign(g), b, g)
        moved = jax.tree.map(lambda m, a: a + jnp.clip(m - a, -size, size), moved, a)
        return optax.tree.cast_like(back(moved), a)

    b = jax.lax.fori_loop(0, steps, step, optax.tree.cast_like(back(optax.tree.add(a, start)), a))
    rose = loss(b) > loss(a)
    return jax.tree.map(lambda b, a: jnp.where(rose, b - a, jnp.zeros_like(a)), b, a)


# ---------------------------------------------------------------- the upper loss, penalised


def beta_decay(x: PyTree) -> jax.Array:
    """The mean over edges of logsumexp_k x_k, the choices k being the last axis of each leaf.

    A decay of the softmaxed weights: the gradient in x is softmax(x) over the number of edges. Its strength grows
    during the search; the authors' is 0.5 times the epoch.

    Reference: Ye et al., "b-DARTS: Beta-Decay Regularization for Differentiable Architecture Search", CVPR 2022.
    """
    return _mean([jax.nn.logsumexp(leaf, axis=-1) for leaf in _choices("beta_decay", x)])


def zero_one(x: PyTree, norm: int = 2) -> jax.Array:
    """Minus the mean of (sigmoid(x) - 1/2)^2 (norm=2) or of |sigmoid(x) - 1/2| (norm=1): drives sigmoids to 0 or 1.

    For independent choices (sigmoid instead of softmax); the authors' strength is 10.

    Reference: Chu et al., "Fair DARTS: Eliminating Unfair Advantages in Differentiable Architecture Search", ECCV 2020.
    """
    if norm not in (1, 2):
        raise ValueError(f"zero_one(norm={norm!r}): the norm is 1 or 2.")
    distances = [jnp.abs(jax.nn.sigmoid(leaf) - 0.5) for leaf in jax.tree.leaves(x)]
    return -_mean([d if norm == 1 else d**2 for d in distances])


def entropy(x: PyTree) -> jax.Array:
    """The mean over edges of the entropy -sum_k p_k log p_k of p = softmax(x) over the last axis.

    Added, it makes choices decide; subtracted (a negative strength), it keeps them open.
    """
    found = []
    for leaf in _choices("entropy", x):
        logs = jax.nn.log_softmax(leaf, axis=-1)
        found.append(-jnp.sum(jnp.exp(logs) * logs, axis=-1))
    return _mean(found)


@explained
def penalised(
    loss: Callable[..., jax.Array], *terms: tuple[Callable[[PyTree], jax.Array], float | Callable[[Any], Any]]
) -> Callable[..., jax.Array]:
    """The upper loss F(x, y[, batch]) plus strength times penalty(x), for each pair (penalty, strength).

        Problem(upper=penalised(validation_loss, (beta_decay, lambda step: 0.5 * step / steps_per_epoch)),
                upper_data=data.Keyed(data.Minibatches((X_val, t_val), 64)), ...)

    Args:
      loss: the upper loss.
      terms: pairs of a function of x (`beta_decay`, `zero_one`, `entropy`, your own) and its strength. A strength is a
        number, or a function of the outer step; the step comes with the batch, so the level's data are then
        `data.Keyed(...)`.
    """
    for term in terms:
        if not (isinstance(term, tuple) and len(term) == 2 and callable(term[0])):
            raise TypeError(
                f"penalised takes pairs (penalty, strength), not {term!r}: penalised(loss, (beta_decay, 0.1))."
            )
    scheduled = any(callable(strength) for _, strength in terms)

    def total(x: PyTree, y: PyTree, *batch: Any) -> jax.Array:
        step = None
        if scheduled:
            inner, key = as_keyed("penalised", *batch)
            batch, step = () if inner is None else (inner,), key.step
        value = loss(x, y, *batch)
        for penalty, strength in terms:
            value = value + (strength(step) if callable(strength) else strength) * penalty(x)
        return value

    return total


def _choices(name: str, x: PyTree) -> list[jax.Array]:
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"{name} reads the last axis of each leaf of x as choices, and a leaf is a scalar.")
    return leaves


def _mean(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([part.reshape(-1) for part in parts]).mean()
