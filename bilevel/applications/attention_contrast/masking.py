"""Soft masks: which layers, which contrast and which threshold, by the answers of a head trained on masked images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bilevel import Problem
from bilevel.applications.application import Application
from bilevel.applications.attention_contrast.contrast import check_maps, check_strength, contrast

PyTree = Any
Mask = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Masking(Application[Mask, PyTree]):
    """The problem that `masking` makes.

    x0 has log lambda by layer ("strength"), the layers' weights before their softmax ("layers"), the threshold
    ("threshold") and the logarithm of its width ("width"); y0 are the head's weights.

    Attributes:
        saliency: `(x, question, general) ->` standardised saliencies (n, tokens).
        mask: `(x, question, general) ->` soft masks (n, tokens), 0 to 1.
        accuracy: `(x, y, batch) ->` the share of right answers.
    """

    saliency: Callable[[Mask, Array, Array], Array]
    mask: Callable[[Mask, Array, Array], Array]
    accuracy: Callable[..., Array]
    name: str = "soft masks by contrast"
    description: str = "Contrast, layers and threshold of a mask; an answer head trained on the masked tokens."
    source: str = 'Ge et al., "CARVE", arXiv:2509.06461 (with hard masks and no head)'


def masking(
    train: tuple[Any, Any, Any, Any],
    validation: tuple[Any, Any, Any, Any],
    *,
    classes: int,
    strength: float = 0.1,
    decay: float = 1e-2,
    test: tuple[Any, Any, Any, Any] | None = None,
) -> Masking:
    """Learn the mask by the validation loss of a head that is trained anew under each mask:

        S     = sum over layers of softmax(w)_l A_Q / (A_G + lambda_l), standardised over each image's tokens
        lower f(x, y) = mean CE(y; sum over tokens of sigmoid((S - tau) / T) features / sqrt(tokens), answer)
                        + decay/2 |y|^2
        upper F(x, y) = the same cross-entropy on the validation set

    over x = (log lambda, w, tau, log T). The lower level is strongly convex: implicit differentiation is exact. The
    mask multiplies the features and nothing makes up for what it takes away, as it would be with the image: where it
    is zero nothing is left to answer from. (A mean weighted by the mask is the same for a mask and its half.)

    Args:
        train, validation, test: (question maps (n, layers, tokens), general maps of the same shape, features (n,
            tokens, d), answers (n,)).
        classes: the number of answers.
        strength: where lambda starts.
        decay: of the head.
    """
    check_strength(strength)
    if not decay > 0:
        raise ValueError(f"masking(decay={decay!r}): a positive number is needed, or the head has no best weights.")
    sets = [("training", train), ("validation", validation), *([] if test is None else [("test", test)])]
    for name, (question, general, features, answers) in sets:
        check_maps(f"{name} question", question)
        check_maps(f"{name} general", general)
        if np.shape(question) != np.shape(general) or np.ndim(question) != 3:
            raise ValueError(
                f"The {name} maps have the shapes {np.shape(question)} and {np.shape(general)}; both are (n, layers, "
                "tokens)."
            )
        if np.shape(features)[:2] != (len(question), np.shape(question)[2]) or len(answers) != len(question):
            raise ValueError(f"The {name} features {np.shape(features)} or answers do not belong to these maps.")
        if np.shape(question)[1] != np.shape(train[0])[1] or np.shape(features)[2] != np.shape(train[2])[2]:
            raise ValueError(
                f"The {name} set has {np.shape(question)[1]} layers and features of size {np.shape(features)[2]}, the "
                f"training set {np.shape(train[0])[1]} and {np.shape(train[2])[2]}: they are one network's."
            )
        if not np.isfinite(np.asarray(features)).all():
            raise ValueError(f"The {name} features are not all finite.")
        known = np.asarray(answers)
        if known.dtype.kind not in "iu" or known.min(initial=0) < 0 or known.max(initial=0) >= classes:
            raise ValueError(f"The {name} answers are not all integers in 0..{classes - 1}.")
    layers, d = np.shape(train[0])[1], np.shape(train[2])[2]

    def saliency(x: Mask, question: Array, general: Array) -> Array:
        maps = contrast(question, general, jnp.exp(x["strength"])[:, None])
        maps = maps / maps.mean(-1, keepdims=True)  # layers with a large lambda would count less
        s = jnp.einsum("l,nlt->nt", jax.nn.softmax(x["layers"]), maps)
        variance = s.var(-1, keepdims=True)
        spread = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)  # uniform: slope zero
        return (s - s.mean(-1, keepdims=True)) / (spread + 1e-6)

    def mask(x: Mask, question: Array, general: Array) -> Array:
        return jax.nn.sigmoid((saliency(x, question, general) - x["threshold"]) / jnp.exp(x["width"]))

    def logits(x: Mask, y: PyTree, batch: Any) -> Array:
        question, general, features, _ = batch
        kept = mask(x, question, general)
        pooled = jnp.einsum("nt,ntd->nd", kept, features) / kept.shape[-1] ** 0.5
        return pooled @ y["kernel"] + y["bias"]

    def upper(x: Mask, y: PyTree, batch: Any) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(x, y, batch), batch[3]).mean()

    def lower(x: Mask, y: PyTree, batch: Any) -> Array:
        return upper(x, y, batch) + 0.5 * decay * optax.tree.norm(y, squared=True)

    def accuracy(x: Mask, y: PyTree, batch: Any) -> Array:
        return jnp.mean(logits(x, y, batch).argmax(-1) == batch[3])

    x0 = {
        "strength": jnp.full(layers, jnp.log(strength)), "layers": jnp.zeros(layers),
        "threshold": jnp.zeros(()), "width": jnp.zeros(()),
    }  # fmt: skip
    y0 = {"kernel": jnp.zeros((d, classes)), "bias": jnp.zeros(classes)}
    problem = Problem(upper=upper, lower=lower, upper_data=validation, lower_data=train)
    metrics = {"accuracy": (accuracy, validation if test is None else test)}
    return Masking(problem, x0, y0, metrics, saliency=saliency, mask=mask, accuracy=accuracy)
