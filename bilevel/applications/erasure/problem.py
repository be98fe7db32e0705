"""Concept erasure as a simple bilevel problem, and as one with weights and gates above."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from bilevel import Problem, data
from bilevel.applications.application import Application
from bilevel.applications.erasure.attack import attacked
from bilevel.applications.erasure.losses import contrast, erasing_target, onto
from bilevel.applications.erasure.text_to_image import on_path
from bilevel.applications.layers import lora

PyTree = Any
Weights = Mapping[str, float]
Losses = dict[str, Array]
PUBLISHED_WEIGHTS = {"erase": 1.0, "attention": 1e-3, "keep": 0.1, "contrast": 0.1}
"""The published code's, for its sums over all queries; `erasure` takes means, so these are to be chosen anew."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Erasure(Application[Any, dict[str, Array]]):
    """The problem that `erasure` or `weighted` makes.

    Attributes:
        adapted: `(y, x=None) -> parameters`: the network with the adapter, whose gates are x's.
        terms: by name (erase, attention, keep, contrast) a function of (y, batch, x=None), without its weight.
        losses: `(y, x=None, erased=, kept=, anchored=) -> {name: term}`: the terms of the batches that are given, by
            one pass of the network over all their images.
        weights: of the terms.
        frozen: the base's parameters.
    """

    adapted: Callable[..., PyTree]
    terms: Mapping[str, Callable[..., Array]]
    losses: Callable[..., Losses]
    weights: Weights
    frozen: PyTree
    name: str = "concept erasure"
    description: str = "Below, one concept is erased from a flow transformer; above, the others are kept; both by LoRA."
    source: str = '"EraseAnything: Enabling Concept Erasure in Rectified Flow Transformers", ICML 2025'


def erasure(
    model: Any,
    frozen: PyTree,
    text: Any,
    *,
    word: str,
    prompts: Sequence[str],
    images: Any,
    kept_prompts: Sequence[str],
    kept_images: Any,
    synonym: str,
    irrelevant: Sequence[str],
    targets: str | Sequence[str] = ("add_q_proj", "add_k_proj"),
    rank: int = 8,
    weights: Weights | None = None,
    strength: float = 1.0,
    temperature: float = 0.07,
    batch: int = 16,
    attack: tuple[float, int] | None = None,
    seed: int = 0,
) -> Erasure:
    """Take a word's concept out of a flow transformer, and leave the rest, by an adapter y that both levels own:

        lower  f(y) = w_erase |v_y(x_t, c, t) - target|^2 + w_attention (attention onto the word)
               target = v_0(x_t, null, t) - strength (v_0(x_t, c, t) - v_0(x_t, null, t)),      v_0 frozen
        upper  F(y) = w_keep |v_y(u_t, c', t) - (noise - u)|^2 + w_contrast contrast(word; synonym, irrelevant)

    c are prompts with the word and x images of them, noised to t; c' and u are what is to be kept. The attention is the
    mean over heads and image tokens, summed over the word's columns. In the contrast only the word's own map moves: the
    synonym's and the irrelevant words' are those of the frozen base, in the same prompt.

    Args:
        model: `TextToImage`, or an object with its `velocity` and `attend`.
        frozen: its parameters; they are not changed.
        text: the text encoder: `text(prompts)` embeds a list, the empty prompt "" among them, and
            `text.columns(prompt, word)` says where a word stands; see `digits.Words`.
        word: the concept's word.
        prompts, images: prompts that have it and an image each, (n, tokens, channels).
        kept_prompts, kept_images: what to keep, a prompt and an image each; none with the word.
        synonym: what else the concept is called: takes the word's place in the contrast.
        irrelevant: words that have nothing to do with it, likewise.
        targets, rank: which weights are adapted, see `lora.init`; by default the published ones.
        weights: by name (erase, attention, keep, contrast); 1, 0.1, 1 and 0.02 where they are not given.
        strength: eta of the ESD target.
        temperature: of the contrast.
        batch: images per step of each level.
        attack: (radius, steps): the lower loss is taken at the worst embedding of the prompt that `attacked` finds
            within that distance of each word: erasure trained against attacks.
        seed: of the adapter's start.

    Raises:
        ValueError: a prompt without the word, a kept one with it, unequal counts, a weight that is not known, targets
            that match nothing.
    """
    weight = {"erase": 1.0, "attention": 0.1, "keep": 1.0, "contrast": 0.02, **(weights or {})}
    unknown = sorted(weight.keys() - {"erase", "attention", "keep", "contrast"})
    if unknown or not all(isinstance(w, (int, float, np.number)) and w >= 0 for w in weight.values()):
        raise ValueError(
            f"erasure(weights={dict(weights or {})}): numbers of at least 0 for erase, attention, keep, contrast."
        )
    if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
        raise ValueError(f"erasure(batch={batch!r}): an integer, at least one image a step.")
    if not temperature > 0:
        raise ValueError(f"erasure(temperature={temperature!r}): the contrast's temperature is positive.")
    if attack is not None and np.shape(attack) != (2,):
        raise ValueError(f"erasure(attack={attack!r}): a pair (radius, steps), or None.")
    columns = jnp.asarray(_columns(text, prompts, word))
    for prompt in kept_prompts:
        if text.columns(prompt, word):
            raise ValueError(f"The prompt {prompt!r} is to be kept, and has {word!r}, which is to be erased.")
    for what, some, them in (("erased", prompts, images), ("kept", kept_prompts, kept_images)):
        if len(some) != len(them) or not len(some):
            raise ValueError(f"There are {len(some)} {what} prompts and {len(them)} images: give one each, and some.")
        array = np.asarray(them)
        if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            raise ValueError(
                f"The {what} images are {array.dtype}{list(array.shape)}: give finite numbers of floating point, "
                "of the shape (n, tokens, channels)."
            )
    if isinstance(irrelevant, str) or not irrelevant:
        raise ValueError(
            f"erasure(irrelevant={irrelevant!r}): the contrast needs a sequence of irrelevant words, one at least."
        )
    if {word, synonym} & set(irrelevant):
        raise ValueError(
            f"erasure(irrelevant={tuple(irrelevant)}): {word!r} and its synonym {synonym!r} are what is to be erased, "
            "and not irrelevant to it."
        )
    swapped = [[_replaced(p, word, other) for p in prompts] for other in (synonym, *irrelevant)]
    marks = jnp.stack(
        [jnp.asarray(_columns(text, some, w)) for some, w in zip(swapped, (synonym, *irrelevant), strict=True)], 1
    )
    null = text([""])
    y0 = lora.init(jax.random.key(seed), frozen, targets, rank)

    below = (jnp.asarray(images), text(list(prompts)), columns)
    others = jax.tree.map(lambda *a: jnp.stack(a, 1), *(text(some) for some in swapped))
    above = ((jnp.asarray(kept_images), text(list(kept_prompts))), (*below, others, marks))

    def adapted(y: PyTree, x: Any = None) -> PyTree:
        return lora.merge(frozen, y, scale=1.0 if x is None else {n: x["gates"][n] for n in lora.names(y)})

    def empty(n: int) -> Any:
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *a.shape[1:])), null)

    def losses(y: PyTree, x: Any = None, *, erased: Any = None, kept: Any = None, anchored: Any = None) -> Losses:
        """The terms of the rows that are given, by one pass of the adapted network over all of them."""
        params, passes, found = adapted(y, x), [], Losses()
        if erased is not None:
            (image, prompt, column), noise, t = erased
            x_t = on_path(image, noise, t)
            target = erasing_target(model, frozen, x_t, t, prompt, empty(len(t)), strength)
            if attack is not None:
                gain = lambda c: -jnp.square(model.velocity(params, x_t, c, t) - (noise - image)).mean()  # noqa: E731
                prompt = lax.stop_gradient(attacked(gain, prompt, radius=attack[0], steps=attack[1]))
            passes.append((x_t, prompt, t))
        if kept is not None:
            (of_kept, kept_prompt), kept_noise, kept_t = kept
            passes.append((on_path(of_kept, kept_noise, kept_t), kept_prompt, kept_t))
        if anchored is not None:
            (of_word, word_prompt, word_column, them, where), word_noise, word_t = anchored
            passes.append((on_path(of_word, word_noise, word_t), word_prompt, word_t))
        velocity, maps = model.attend(params, *jax.tree.map(lambda *a: jnp.concatenate(a), *passes))
        ends = np.cumsum([len(t) for *_, t in passes])[:-1]
        parts = iter(zip(jnp.split(velocity, ends), jnp.split(maps, ends), strict=True))
        if erased is not None:
            v, onto_words = next(parts)
            found["erase"], found["attention"] = jnp.square(v - target).mean(), onto(onto_words, column).mean()
        if kept is not None:
            found["keep"] = jnp.square(next(parts)[0] - (kept_noise - of_kept)).mean()
        if anchored is not None:
            anchor, k = onto(next(parts)[1], word_column), where.shape[1]
            flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), them)
            others_maps = model.attend(frozen, jnp.repeat(passes[-1][0], k, 0), flat, jnp.repeat(word_t, k))[1]
            others_maps = onto(others_maps, where.reshape(-1, where.shape[-1])).reshape(-1, k, *anchor.shape[1:])
            others_maps = lax.stop_gradient(jnp.moveaxis(others_maps, 1, 0))
            found["contrast"] = contrast(anchor, others_maps[0], others_maps[1:], temperature)
        return found

    def lower_loss(x: Any, y: PyTree, rows: Any) -> Array:
        return _total(weight, losses(y, erased=rows))

    def upper_loss(x: Any, y: PyTree, rows: Any) -> Array:
        kept, anchored = rows
        return _total(weight, losses(y, kept=kept, anchored=anchored if weight["contrast"] else None))

    problem = Problem(
        upper=upper_loss,
        lower=lower_loss,
        upper_data=data.Sampler(lambda key, a: _both(key, a, batch), above),
        lower_data=data.Sampler(lambda key, a: _rows(key, a, batch), below),
    )
    terms = {
        "erase": lambda y, rows, x=None: losses(y, x, erased=rows)["erase"],
        "attention": lambda y, rows, x=None: losses(y, x, erased=rows)["attention"],
        "keep": lambda y, rows, x=None: losses(y, x, kept=rows)["keep"],
        "contrast": lambda y, rows, x=None: losses(y, x, anchored=rows)["contrast"],
    }
    return Erasure(problem, None, y0, adapted=adapted, terms=terms, losses=losses, weights=weight, frozen=frozen)


def weighted(app: Erasure, held_out: Erasure, *, erase: float = 1.0, keep: float = 1.0, decay: float = 1e-3) -> Erasure:
    """The same with a genuine upper variable: x has the logarithms of the four weights, and a gate per adapted weight.

        lower  f(x, y) = sum over terms of exp(x_term) L_term(y, x) + decay |y|^2 / 2
        upper  F(x, y) = erase L_erase(y, x) + keep L_keep(y, x)         on prompts and images held out

    For stacked blocks a gate is one number per block. The adapter's part is multiplied by its gate.

    Args:
        app: the problem of training: its terms, on its data.
        held_out: the same model's problem, made of held-out prompts and images.
        erase, keep: the upper loss's weights.
        decay: keeps the lower level's minimiser one.
    """
    if not decay > 0:
        raise ValueError(
            f"weighted(decay={decay}): a positive number, without which the lower level has many minimisers."
        )
    silent = [name for name, w in app.weights.items() if not w > 0]
    if silent:
        raise ValueError(f"weighted: {silent[0]} has the weight 0, which has no logarithm. Give all four some weight.")
    gates = {name: jnp.ones(app.y0[f"{name}.lora_A.weight"].shape[:-2]) for name in lora.names(app.y0)}
    x0 = {"log_weights": {name: jnp.log(jnp.asarray(w)) for name, w in app.weights.items()}, "gates": gates}

    def lower_loss(x: Any, y: PyTree, rows: Any) -> Array:
        erased, (kept, anchored) = rows
        found = app.losses(y, x, erased=erased, kept=kept, anchored=anchored)
        parts = [jnp.exp(x["log_weights"][name]) * term for name, term in found.items()]
        return jnp.stack([*parts, decay / 2 * optax.tree.norm(y, squared=True)]).sum()

    def upper_loss(x: Any, y: PyTree, rows: Any) -> Array:
        erased, (kept, _) = rows
        return _total({"erase": erase, "keep": keep}, held_out.losses(y, x, erased=erased, kept=kept))

    def source(of: Erasure) -> data.Sampler:
        below, above = of.problem.lower_data, of.problem.upper_data
        return data.Sampler(lambda key, a: (below.fn(key, a[0]), above.fn(jax.random.fold_in(key, 1), a[1])),
                            (below.arrays, above.arrays))  # fmt: skip

    problem = Problem(upper_loss, lower_loss, upper_data=source(held_out), lower_data=source(app))
    return dataclasses.replace(app, problem=problem, x0=x0)


def _total(weight: Weights, found: Losses) -> Array:
    terms = [weight[name] * term for name, term in found.items() if weight.get(name, 0)]
    return jnp.stack(terms).sum() if terms else jnp.zeros(())


def _columns(text: Any, prompts: Sequence[str], word: str) -> list[list[float]]:
    rows = []
    null = text([""])
    length = (null["tokens"] if isinstance(null, Mapping) else null).shape[1]
    for prompt in prompts:
        found = text.columns(prompt, word)
        if not found:
            raise ValueError(f"The prompt {prompt!r} does not have the word {word!r}, which is to be erased.")
        rows.append([float(i in found) for i in range(length)])
    return rows


def _replaced(prompt: str, word: str, other: str) -> str:
    return " ".join(other if part == word else part for part in prompt.split())


def _rows(key: Array, arrays: PyTree, batch: int) -> Any:
    """Drawn samples, noise as of the first array of them, and levels t: the logistic of a normal."""
    rows, noise, level = jax.random.split(key, 3)
    count = len(jax.tree.leaves(arrays)[0])
    chosen = jax.random.randint(rows, (min(batch, count),), 0, count)
    drawn = jax.tree.map(lambda a: a[chosen], arrays)
    like = drawn[0]
    t = jax.nn.sigmoid(jax.random.normal(level, (len(like),), like.dtype))
    return drawn, jax.random.normal(noise, like.shape, like.dtype), t


def _both(key: Array, arrays: PyTree, batch: int) -> Any:
    kept, word = arrays
    return _rows(key, kept, batch), _rows(jax.random.fold_in(key, 1), word, max(batch // 4, 1))
