"""Real handwritten digits in colours, prompts of four words for them, and a judge of what was drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel import datasets
from bilevel.applications.erasure.flux import Flux
from bilevel.applications.erasure.text_to_image import TextToImage, sample
from bilevel.applications.layers.weights import read_safetensors

COLOURS = ("red", "green", "blue")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMERALS = tuple("0123456789")
WORDS = ("", "a", "photo", *COLOURS, *NUMBERS, *NUMERALS)
"""The vocabulary; the first is no word, four of which are the empty prompt."""

LENGTH = 4
NETWORK = Flux(
    in_channels=12,
    num_layers=2,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=32,
    pooled_projection_dim=0,
    axes_dims_rope=(4, 6, 6),
)
MODEL = TextToImage(NETWORK, 4, 4)
"""16 patches of 2 x 2 coloured pixels and 4 words; no pooled prompt, which adapters of attention could not reach."""

CHECKSUM = "98ee9451456b35d7040dee3cd5419903a431b02c08fa99e29f361302282fa01f"
"""SHA-256 of the shipped weights; `examples/concept_erasure_base.py` prints it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """A frozen text encoder: a vector per word.

    Attributes:
        table: (words, size).
        vocabulary: the words, in the table's order; the first is no word.
        length: of a prompt.
    """

    table: Array
    vocabulary: tuple[str, ...] = WORDS
    length: int = LENGTH

    def __post_init__(self) -> None:
        if np.ndim(self.table) != 2 or len(self.table) != len(self.vocabulary):
            raise ValueError(
                f"Words(table of shape {np.shape(self.table)}): a vector for each of {len(self.vocabulary)} words."
            )

    def ids(self, prompts: Sequence[str]) -> np.ndarray:
        """The numbers of the prompts' words, (prompts, length).

        Raises:
            ValueError: a word that is not known, or too many of them; the prompt is said.
        """
        found = np.zeros((len(prompts), self.length), np.int32)
        for row, prompt in zip(found, prompts, strict=True):
            words = prompt.split()
            unknown = [word for word in words if word not in self.vocabulary[1:]]
            if unknown:
                raise ValueError(f"The prompt {prompt!r} has {unknown[0]!r}; known: {', '.join(self.vocabulary[1:])}.")
            if len(words) > self.length:
                raise ValueError(f"The prompt {prompt!r} has {len(words)} words; {self.length} is the most.")
            row[: len(words)] = [self.vocabulary.index(word) for word in words]
        return found

    def __call__(self, prompts: Sequence[str]) -> Array:
        """The prompts' vectors, (prompts, length, size)."""
        return self.table[self.ids(prompts)]

    def columns(self, prompt: str, word: str) -> tuple[int, ...]:
        """Where in a prompt a word stands; nowhere: ()."""
        return tuple(i for i, other in enumerate(prompt.split()) if other == word)


def to_tokens(images: Any) -> Array:
    """Images (n, 8, 8, 3) as patches (n, 16, 12)."""
    n = len(images)
    return jnp.asarray(images).reshape(n, 4, 2, 4, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, 16, 12)


def to_images(tokens: Any) -> Array:
    """Patches (n, 16, 12) as images (n, 8, 8, 3)."""
    n = len(tokens)
    return jnp.asarray(tokens).reshape(n, 4, 4, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, 8, 8, 3)


def coloured(ink: Any, colours: Any) -> Array:
    """Images (n, 8, 8, 3) in -1..1, from ink (n, 64) in 0..16 and a channel each; the paper is black."""
    ink = jnp.asarray(ink, jnp.float32).reshape(-1, 8, 8, 1) / 8
    return ink * jax.nn.one_hot(jnp.asarray(colours), 3)[:, None, None] - 1


def prompts_for(
    digits: Sequence[int] | np.ndarray, colours: Sequence[int] | np.ndarray, numeral: Sequence[bool], seed: int
) -> list[str]:
    """ "a photo COLOUR DIGIT" with the digit as a word or a numeral, its words in a random order."""
    rng, made = np.random.default_rng(seed), []
    for digit, colour, short in zip(digits, colours, numeral, strict=True):
        words = ["a", "photo", COLOURS[colour], (NUMERALS if short else NUMBERS)[digit]]
        made.append(" ".join(rng.permutation(words)))
    return made


def real(seed: int = 0) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's 1,797 digits in two parts, 1,297 to train on and 500 held out: (ink, labels) each."""
    train, test = datasets.split(datasets.digits(), (-1, 500), seed)
    return train, test


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """Who says what was drawn: a small network over the ink, trained on real digits.

    Attributes:
        weights: its two layers, "1.weight", "1.bias", "2.weight", "2.bias".
    """

    weights: dict[str, Array]

    def features(self, tokens: Array) -> Array:
        """The hidden layer, (n, 64)."""
        ink = jnp.clip((to_images(tokens).sum(-1) + 3) / 2, 0, 1).reshape(len(tokens), 64)
        return jax.nn.relu(ink @ self.weights["1.weight"].T + self.weights["1.bias"])

    def logits(self, tokens: Array) -> Array:
        """Of the ten digits, (n, 10)."""
        return self.features(tokens) @ self.weights["2.weight"].T + self.weights["2.bias"]

    def digit(self, tokens: Array) -> Array:
        """The digits seen, (n,)."""
        return self.logits(tokens).argmax(-1)

    def colour(self, tokens: Array) -> Array:
        """The channels with the most light, (n,)."""
        return to_images(tokens).sum((1, 2)).argmax(-1)


def frechet(a: Any, b: Any) -> float:
    """The Frechet distance of two sets of features (n, size): |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2))."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"frechet: features are (n, size), of one size, and these are {a.shape} and {b.shape}.")
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"frechet: {len(a)} and {len(b)} samples; a covariance needs two at least.")
    c, d = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    middle = np.sqrt(np.clip(np.linalg.eigvalsh(root @ d @ root), 0, None)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c) + np.trace(d) - 2 * middle)


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """The shipped model: its parameters, the words' vectors and the judge."""

    model: TextToImage
    params: dict[str, Array]
    words: Words
    judge: Judge


def base(path: Any = None) -> Base:
    """The model of coloured digits, trained by `examples/concept_erasure_base.py`.

    Args:
        path: of a safetensors file; None: the one in the package.

    Raises:
        ValueError: the file is not the one that was shipped (its checksum), or names or shapes are others.
    """
    if path is None:
        with importlib.resources.as_file(importlib.resources.files(__package__) / "digits.safetensors") as file:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found != CHECKSUM:
                raise ValueError(
                    f"{file} is not the file that was shipped: its SHA-256 is {found}, and {CHECKSUM} was shipped. "
                    "Install the package again, or train anew: python examples/concept_erasure_base.py"
                )
            arrays = {name: np.array(array) for name, array in read_safetensors(file).items()}
    else:
        arrays = read_safetensors(path)
    named = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    part = lambda of: {n.removeprefix(of): a for n, a in named.items() if n.startswith(of)}  # noqa: E731
    missing = {"words", *(f"judge.{n}" for n in ("1.weight", "1.bias", "2.weight", "2.bias"))} - named.keys()
    if missing:
        raise ValueError(f"The weights have no {sorted(missing)[0]}: they are not a base of coloured digits.")
    first, second = named["judge.1.weight"].shape, named["judge.2.weight"].shape
    if first[1:] != (64,) or second != (10, first[0]):
        raise ValueError(f"The judge's layers are {first} and {second}: (h, 64) and (10, h) are needed.")
    return Base(MODEL, NETWORK.load(part("transformer.")), Words(named["words"]), Judge(part("judge.")))


def draw(
    given: Base,
    params: Any,
    digits: Sequence[int],
    numeral: bool,
    key: Array,
    *,
    steps: int = 20,
    guidance: float = 2.5,
    table: Array | None = None,
) -> tuple[Array, np.ndarray]:
    """Images of these digits in the three colours in turn, as tokens, and the colours asked for."""
    colours = np.arange(len(digits)) % 3
    ids = given.words.ids(prompts_for(digits, colours.tolist(), [numeral] * len(digits), 0))
    table = given.words.table if table is None else table
    noise = jax.random.normal(key, (len(digits), *given.model.tokens))
    null = jnp.broadcast_to(given.words.table[0], (len(digits), LENGTH, table.shape[1]))
    return sample(given.model, params, noise, table[ids], null, guidance=guidance, steps=steps), colours
