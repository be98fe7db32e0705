"""Concept erasure as a simple bilevel problem, and as one with weights and gates above."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from bilevel import Problem, data
from bilevel.applications.application import Application
from bilevel.applications.erasure.attack import attacked
from bilevel.applications.erasure.losses import contrast, erasing_target, onto
from bilevel.applications.erasure.text_to_image import matching, on_path
from bilevel.applications.layers import lora

PyTree = Any
Weights = Mapping[str, float]
PUBLISHED_WEIGHTS = {"erase": 1.0, "attention": 1e-3, "keep": 0.1, "contrast": 0.1}
"""The published code's, for its sums over all queries; `erasure` takes means, so these are to be chosen anew."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Erasure(Application[Any, dict[str, Array]]):
    """The problem that `erasure` or `weighted` makes.

    Attributes:
        adapted: `(y, x=None) -> parameters`: the network with the adapter, whose gates are x's.
        terms: by name (erase, attention, keep, contrast) a function of (y, batch), without its weight.
        frozen: the base's parameters.
    """

    adapted: Callable[..., PyTree]
    terms: Mapping[str, Callable[..., Array]]
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
        attack: (radius, steps): the erase loss is taken at the worst embedding of the prompt that `attacked` finds
            within that distance of each word: erasure trained against attacks.
        seed: of the adapter's start.

    Raises:
        ValueError: a prompt without the word, a kept one with it, unequal counts, a weight that is not known, targets
            that match nothing.
    """
    weight = {"erase": 1.0, "attention": 0.1, "keep": 1.0, "contrast": 0.02, **(weights or {})}
    unknown = sorted(weight.keys() - {"erase", "attention", "keep", "contrast"})
    if unknown or not all(w >= 0 for w in weight.values()):
        raise ValueError(
            f"erasure(weights={dict(weights or {})}): numbers of at least 0 for erase, attention, keep, contrast."
        )
    if batch < 1:
        raise ValueError(f"erasure(batch={batch}): at least one image a step.")
    columns = jnp.asarray(_columns(text, prompts, word))
    for prompt in kept_prompts:
        if text.columns(prompt, word):
            raise ValueError(f"The prompt {prompt!r} is to be kept, and has {word!r}, which is to be erased.")
    for what, some, them in (("erased", prompts, images), ("kept", kept_prompts, kept_images)):
        if len(some) != len(them) or not len(some):
            raise ValueError(f"There are {len(some)} {what} prompts and {len(them)} images: give one each, and some.")
    if not irrelevant:
        raise ValueError("erasure(irrelevant=()): the contrast needs an irrelevant word at least.")
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

    def velocity_gap(params: PyTree, prompt: Any, x: Array, t: Array, target: Array) -> Array:
        return jnp.square(model.velocity(params, x, prompt, t) - target).mean()

    def noised(rows: Any) -> tuple[Array, Array, Any, Array]:
        (image, prompt, column), noise, t = rows
        return on_path(image, noise, t), t, prompt, column

    def erase(y: PyTree, rows: Any, x: Any = None) -> Array:
        x_t, t, prompt, _ = noised(rows)
        target = erasing_target(model, frozen, x_t, t, prompt, empty(len(t)), strength)
        params = adapted(y, x)
        if attack is not None:
            loss = lambda prompt: -jnp.square(model.velocity(params, x_t, prompt, t) - rows[1] + rows[0][0]).mean()  # noqa: E731
            prompt = lax.stop_gradient(attacked(loss, prompt, radius=attack[0], steps=attack[1]))
        return velocity_gap(params, prompt, x_t, t, target)

    def attention(y: PyTree, rows: Any, x: Any = None) -> Array:
        x_t, t, prompt, column = noised(rows)
        return onto(model.attend(adapted(y, x), x_t, prompt, t)[1], column).mean()

    def keep(y: PyTree, rows: Any, x: Any = None) -> Array:
        (image, prompt), noise, t = rows
        return matching(model, adapted(y, x), image, noise, t, prompt)

    def contrasted(y: PyTree, rows: Any, x: Any = None) -> Array:
        (image, prompt, column, others, marks), noise, t = rows
        x_t = on_path(image, noise, t)
        anchor = onto(model.attend(adapted(y, x), x_t, prompt, t)[1], column)
        k = marks.shape[1]
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), others)
        found = model.attend(frozen, jnp.repeat(x_t, k, 0), flat, jnp.repeat(t, k))[1]
        maps = onto(found, marks.reshape(-1, marks.shape[-1])).reshape(len(t), k, *anchor.shape[1:])
        maps = lax.stop_gradient(jnp.moveaxis(maps, 1, 0))
        return contrast(anchor, maps[0], maps[1:], temperature)

    def lower_loss(x: Any, y: PyTree, rows: Any) -> Array:
        loss = weight["erase"] * erase(y, rows)
        return loss + weight["attention"] * attention(y, rows) if weight["attention"] else loss

    def upper_loss(x: Any, y: PyTree, rows: Any) -> Array:
        kept, word_rows = rows
        loss = weight["keep"] * keep(y, kept)
        return loss + weight["contrast"] * contrasted(y, word_rows) if weight["contrast"] else loss

    problem = Problem(
        upper=upper_loss,
        lower=lower_loss,
        upper_data=data.Sampler(lambda key, a: _both(key, a, batch), above),
        lower_data=data.Sampler(lambda key, a: _rows(key, a, batch), below),
    )
    terms = {"erase": erase, "attention": attention, "keep": keep, "contrast": contrasted}
    return Erasure(problem, None, y0, adapted=adapted, terms=terms, frozen=frozen)


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
    start = {"erase": 1.0, "attention": 0.1, "keep": 1.0, "contrast": 0.02}
    gates = {name: jnp.ones(app.y0[f"{name}.lora_A.weight"].shape[:-2]) for name in lora.names(app.y0)}
    x0 = {"log_weights": {name: jnp.log(jnp.asarray(w)) for name, w in start.items()}, "gates": gates}

    def lower_loss(x: Any, y: PyTree, rows: Any) -> Array:
        erased, (kept, word_rows) = rows
        parts = {"erase": erased, "attention": erased, "keep": kept, "contrast": word_rows}
        terms = [jnp.exp(x["log_weights"][name]) * app.terms[name](y, part, x) for name, part in parts.items()]
        return jnp.stack([*terms, decay / 2 * optax.tree.norm(y, squared=True)]).sum()

    def upper_loss(x: Any, y: PyTree, rows: Any) -> Array:
        erased, (kept, _) = rows
        return erase * held_out.terms["erase"](y, erased, x) + keep * held_out.terms["keep"](y, kept, x)

    def source(of: Erasure) -> data.Sampler:
        below, above = of.problem.lower_data, of.problem.upper_data
        return data.Sampler(lambda key, a: (below.fn(key, a[0]), above.fn(jax.random.fold_in(key, 1), a[1])),
                            (below.arrays, above.arrays))  # fmt: skip

    problem = Problem(upper_loss, lower_loss, upper_data=source(held_out), lower_data=source(app))
    return dataclasses.replace(app, problem=problem, x0=x0)


def _columns(text: Any, prompts: Sequence[str], word: str) -> list[list[float]]:
    rows = []
    length = jax.tree.leaves(text([""]))[0].shape[1]
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
