"""Repairs and a detector that are bilevel problems themselves, each an `Application`; and two plain repairs beside.

The problems take one encoder, or with `stacked=True` many along a leading axis of every array: then each loss is the
sum over encoders, which share nothing, so that one run of `solve` is a run for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel import Problem, data, linear, lower, sets
from bilevel.applications.application import Application
from bilevel.applications.contrastive.augment import Augmentation
from bilevel.applications.contrastive.defences.pruning import fine_tuned
from bilevel.applications.contrastive.defences.suspect import Found, Suspect, descend, two_gaussians
from bilevel.applications.contrastive.digits import SIDE
from bilevel.applications.contrastive.evaluate import cross_entropy, logits
from bilevel.applications.contrastive.losses import cosine, normalised
from bilevel.hypergradients import Implicit, OneStep, Unrolled
from bilevel.solvers import HypergradientDescent


def _many(loss: Callable[..., Array], stacked: bool) -> Callable[..., Array]:
    """The loss, or the sum of those along a leading axis."""
    return (lambda x, y, batch: jax.vmap(loss)(x, y, batch).sum()) if stacked else loss


class Parts(data.Source):
    """Full batches in parts of unequal lengths, which bare arrays may not have."""

    random, count = False, None  # type: ignore[assignment]

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays

    def draw(self, key: Any) -> Any:
        """All parts, at every step."""
        return self.arrays


def ibau(
    classify: Callable[[Any, Array], Array],
    params: Any,
    images: Array,
    labels: Array,
    *,
    penalty: float = 3.0,
    portion: float = 0.5,
    bound: float | None = 0.3,
    stacked: bool = False,
) -> Application[Any, Array]:
    """I-BAU: unlearn the perturbation that the classifier is most sensitive to.

        min over theta  (1 - portion) CE(theta; x) + portion CE(theta; x + delta*)
        delta* in argmax over delta  CE(theta; x + delta) - penalty/2 |delta|^2

    One perturbation delta for all images. The paper has portion = 1; the authors' code perturbs a random hundredth of
    the images above, whose mean is portion = .01. They bound delta by its norm; here a quadratic penalty (theirs is
    .002) makes the maximum one where theta leaves it strictly concave, and the box |delta| <= bound holds always (None:
    no box). x = theta, y = delta.

    Args:
        classify: `(params, images) -> scores` (n, classes).
        params: theta at the start.
        images, labels: clean, (n, 8, 8) and (n,).

    Reference: Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022.
    """

    def at(theta: Any, delta: Array | float, batch: Any) -> Array:
        images, labels = batch
        return cross_entropy(classify(theta, images + delta), labels)

    def upper(theta: Any, delta: Array, batch: Any) -> Array:
        return portion * at(theta, delta, batch) + (1 - portion) * at(theta, 0.0, batch)

    def below(theta: Any, delta: Array, batch: Any) -> Array:
        return 0.5 * penalty * jnp.sum(delta**2) - at(theta, delta, batch)

    batch = (jnp.asarray(images), jnp.asarray(labels))
    problem = Problem(
        _many(upper, stacked),
        _many(below, stacked),
        upper_data=batch,
        lower_data=batch,
        project_lower=None if bound is None else sets.Box(-bound, bound),
    )
    shape = (len(batch[0]), SIDE, SIDE) if stacked else (SIDE, SIDE)
    return Application(
        problem,
        params,
        jnp.zeros(shape, batch[0].dtype),
        name="I-BAU",
        description="a classifier is unlearnt above from the perturbation that is found below",
        source="Zeng et al., ICLR 2022",
    )


def ibau_solver(rate: float = 3e-4, inner: int = 5, terms: int = 5, step: float = 0.15) -> HypergradientDescent:
    """The authors' way: some ascent steps, and the hypergradient by `terms` of the fixed point's series."""
    estimator = Implicit(linear.Neumann(step_size=1.0, steps=terms), step=step)
    return HypergradientDescent(estimator, lower.GradientDescent(step, inner), optax.adam(rate))


def unlearning(
    encode: Callable[[Any, Array], Array],
    params: Any,
    images: Array,
    *,
    bound: float = 0.3,
    anchor: float = 1.0,
    temperature: float | None = 0.5,
    stacked: bool = False,
) -> Application[Any, Array]:
    """Label-free unlearning: adversarial examples of a contrastive loss below, features held where they were above.

        min over theta  C(theta, delta*) + anchor E [1 - cos(f_theta(x), f_0(x))]
        delta* in argmax over |delta| <= bound of  C(theta, delta)
        C = mean over i of  -log exp(cos(z_i, w_i) / tau) / sum over j of exp(cos(z_i, w_j) / tau)
        z_i = f_theta(x_i + delta_i),  w_i = f_0(x_i)

    with f_0 the encoder as it was given, and one delta per image. x = theta, y = delta. No labels.

    Args:
        encode: `(params, images) -> features`.
        params: theta at the start, and f_0's parameters.
        images: clean, (n, 8, 8).
        temperature: tau; None: no other images, C = E [1 - cos(z_i, w_i)].

    After the adversarial contrastive training of Kim, Tack, Hwang, "Adversarial Self-Supervised Contrastive Learning",
    NeurIPS 2020, whose attack is on the contrastive loss too; the given encoder's features stand in for the other view.
    """

    def away(theta: Any, delta: Array, batch: Any) -> Array:
        images, features = batch
        if temperature is None:
            return jnp.mean(1 - cosine(encode(theta, images + delta), features))
        scores = normalised(encode(theta, images + delta)) @ normalised(features).T / temperature
        return cross_entropy(scores, jnp.arange(len(images)))

    def upper(theta: Any, delta: Array, batch: Any) -> Array:
        images, features = batch
        return away(theta, delta, batch) + anchor * jnp.mean(1 - cosine(encode(theta, images), features))

    def below(theta: Any, delta: Array, batch: Any) -> Array:
        return -away(theta, delta, batch)

    images = jnp.asarray(images)
    batch = (images, (jax.vmap(encode) if stacked else encode)(params, images))
    problem = Problem(
        _many(upper, stacked),
        _many(below, stacked),
        upper_data=batch,
        lower_data=batch,
        project_lower=sets.Box(-bound, bound),
    )
    # A start off the kink at zero, where the gradient of the distance vanishes.
    start = 0.1 * bound * jax.random.normal(jax.random.key(0), images.shape, images.dtype)
    return Application(
        problem,
        params,
        start,
        name="label-free unlearning",
        description="an encoder keeps its features above under the perturbations that move them most below",
        source="after contrastive adversarial training",
    )


def unlearning_solver(rate: float = 1e-3, inner: int = 3, step: float = 200.0) -> HypergradientDescent:
    """Unrolled through `inner` projected ascent steps from the last perturbations."""
    return HypergradientDescent(Unrolled(), lower.GradientDescent(step, inner), optax.adam(rate))


def asset(
    encode: Callable[[Any, Array], Array],
    params: Any,
    base: Array,
    suspects: Array,
    *,
    temperature: float = 10.0,
    off: float = 0.01,
    stacked: bool = False,
) -> Application[Any, Array]:
    """ASSET's offset: keep the features of a trusted base, and change those of the suspects that let themselves.

        min over theta  mean over base of l_i(theta) - sum over suspects of w_i l_i(theta)
        l_i(theta) = 1 - cos(f_theta(x_i), f_0(x_i))
        w*(theta) = argmin over the simplex of  tau/2 |w|^2 - sum over suspects of w_i l_i(theta)

    What a suspect shares with the base cannot move without moving the base; a trigger can. The lower level, the
    "concentration", puts the weights where the offset has worked (tau = temperature / n: the larger, the flatter);
    one projected gradient step of length 1 / tau solves it exactly. The authors use the training's own loss as l_i and
    a network for the concentration. A sample's score is l_i at the end. x = theta, y = w.

    Args:
        encode: `(params, images) -> features`.
        params: f_0's parameters.
        base: clean images.
        suspects: the pool.
        off: theta's start is so far from f_0's parameters, as a share of each one's size and in a random direction: at
            f_0 all l_i have their minimum, and rounding would choose where to go.

    Reference: Pan et al., "ASSET: Robust Backdoor Data Detection Across a Multiplicity of Deep Learning Paradigms",
    USENIX Security 2023.
    """
    base, suspects = jnp.asarray(base), jnp.asarray(suspects)
    count = suspects.shape[1] if stacked else len(suspects)
    tau = temperature / count

    def moved(theta: Any, batch: Any) -> Array:
        images, features = batch
        return 1 - cosine(encode(theta, images), features)

    def upper(theta: Any, weights: Array, batch: Any) -> Array:
        of_base, of_suspects = batch
        return moved(theta, of_base).mean() - weights @ moved(theta, of_suspects)

    def below(theta: Any, weights: Array, batch: Any) -> Array:
        return 0.5 * tau * weights @ weights - weights @ moved(theta, batch)

    features = jax.vmap(encode) if stacked else encode
    of_base, of_suspects = ((images, features(params, images)) for images in (base, suspects))
    problem = Problem(
        _many(upper, stacked),
        _many(below, stacked),
        upper_data=Parts((of_base, of_suspects)),
        lower_data=of_suspects,
        project_lower=sets.Simplex(axis=-1),
    )
    return Application(
        problem,
        _off(params, off, stacked),
        jnp.full(suspects.shape[:-2], 1 / count, suspects.dtype),
        name="ASSET",
        description="an encoder is offset above, and the suspects that give way are weighted below",
        source="Pan et al., USENIX Security 2023",
    )


def _off(params: Any, size: float, stacked: bool) -> Any:
    """Parameters away from the given ones, each leaf by a share of its root mean square; of many alike."""
    random = np.random.default_rng(0)

    def moved(a: Array) -> Array:
        axes = tuple(range(stacked, jnp.ndim(a)))
        noise = jnp.asarray(random.normal(size=a.shape[stacked:]), a.dtype)
        return a + size * jnp.sqrt(jnp.mean(a**2, axes, keepdims=True)) * noise

    return jax.tree.map(moved, params)


def asset_solver(count: int, temperature: float = 10.0, rate: float = 1e-3) -> HypergradientDescent:
    """The exact lower step, differentiated as one step, which is exact too."""
    return HypergradientDescent(OneStep(), lower.GradientDescent(count / temperature, 1), optax.adam(rate))


def offsets(encode: Callable[[Any, Array], Array], before: Any, after: Any, images: Array) -> Array:
    """ASSET's scores, 1 - cos(f_after(x), f_before(x)), of images (n, 8, 8)."""
    return 1 - cosine(encode(after, images), encode(before, images))


def of_ibau(encode: Any, suspects: Suspect) -> tuple[Application[Any, Array], Any, Callable[[Any], Found]]:
    """I-BAU on encoders and their probes: the problem, its solver, and what a solution says."""

    def classify(params: Any, images: Array) -> Array:
        return logits(params[1], encode(params[0], images))

    start = (suspects.encoder, suspects.probe)
    app = ibau(classify, start, suspects.trusted, suspects.trusted_labels, stacked=True)
    return app, ibau_solver(), lambda x: Found(encoder=x[0], probe=x[1])


def of_asset(encode: Any, suspects: Suspect) -> tuple[Application[Any, Array], Any, Callable[[Any], Found]]:
    """ASSET on encoders' pools: the same. A sample's score is its offset, cut where a mixture of two Gaussians splits.

    The statistic is how far apart the mixture's two are, Ashman's D, flagged above 2 (ours: the paper decides on
    samples).
    """
    app = asset(encode, suspects.encoder, suspects.trusted, suspects.pool, stacked=True)

    def read(x: Any) -> Found:
        scores, (cut, apart) = _offset(encode, suspects.encoder, x, suspects.pool)
        return Found(statistic=apart, scores=scores, cut=cut)

    return app, asset_solver(suspects.pool.shape[1]), read


@functools.partial(jax.jit, static_argnums=0)
def _offset(encode: Any, before: Any, after: Any, pools: Array) -> tuple[Array, tuple[Array, Array]]:
    """Each encoder's scores of its pool, and what a mixture says of them."""
    scores = jax.vmap(functools.partial(offsets, encode))(before, after, pools)
    return scores, jax.vmap(two_gaussians)(scores)


def of_unlearning(encode: Any, suspects: Suspect) -> tuple[Application[Any, Array], Any, Callable[[Any], Found]]:
    """Label-free unlearning of encoders: the same."""
    app = unlearning(encode, suspects.encoder, suspects.trusted, stacked=True)
    return app, unlearning_solver(), lambda x: Found(encoder=x)


def fine_tuning(encode: Any, suspect: Suspect, key: Array, *, steps: int = 200) -> Found:
    """Encoder and probe are trained on the trusted images with their labels."""
    encoder, probe = fine_tuned(encode, suspect, suspect.encoder, key, steps)
    return Found(encoder=encoder, probe=probe)


def distillation(encode: Any, suspect: Suspect, key: Array, *, steps: int = 400, augmentation: Any = None) -> Found:
    """A fresh encoder learns the suspect's features of augmented trusted images, by their cosine."""
    augmentation = augmentation or Augmentation()

    def loss(params: Any, key: Array) -> Array:
        images = augmentation.apply(augmentation.draw(key, len(suspect.trusted)), suspect.trusted)
        return jnp.mean(1 - cosine(encode(params, images), encode(suspect.encoder, images)))

    of_start, of_steps = jax.random.split(key)
    return Found(encoder=descend(loss, encode.init(of_start), 3e-3, steps, of_steps)[0])
