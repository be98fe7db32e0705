"""From text to whole numbers and back, and to sequences of one length."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

_PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s+")


class Tokenizer(Protocol):
    """What `sequences` needs: `size` tokens, and `encode`."""

    @property
    def size(self) -> int:
        """How many tokens there are."""

    def encode(self, text: str) -> np.ndarray:
        """The text's tokens, int32 (n,)."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""


@dataclasses.dataclass(frozen=True)
class Bytes:
    """The 256 bytes of UTF-8: nothing to train, and no text that cannot be written."""

    size: int = dataclasses.field(default=256, init=False)

    def encode(self, text: str) -> np.ndarray:
        """The text's bytes, int32 (n,)."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that are none are shown by a sign."""
        return bytes(int(token) for token in tokens).decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Words:
    """The most frequent words, signs and spaces of a text, and its bytes for all others.

        tokenizer = Words.of(texts, most=2000)

    A word has the space before it, as in GPT-2. What is not among the words is written in bytes, the first 256 tokens,
    so that every text comes back from `decode` as it was.

    Attributes:
        words: the tokens from 256 on.
    """

    words: tuple[str, ...]
    _rows: Mapping[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        twice = [word for word, count in collections.Counter(self.words).items() if count > 1]
        if twice:
            raise ValueError(f"Words has each word once; {twice[:8]} stand there more often.")
        object.__setattr__(self, "_rows", {word: 256 + k for k, word in enumerate(self.words)})

    @classmethod
    def of(cls, texts: Iterable[str], most: int = 2000, least: int = 2) -> Words:
        """The `most` pieces of texts that occur at least `least` times and save the most bytes, best ones first."""
        if isinstance(texts, str):
            raise ValueError("One string was given for texts; give a sequence of strings.")
        counts = collections.Counter(piece for text in texts for piece in _PIECE.findall(text))
        saved = {piece: n * (len(piece.encode()) - 1) for piece, n in counts.items() if n >= least}
        best = sorted((-n, piece) for piece, n in saved.items() if n > 0)
        return cls(tuple(piece for _, piece in best[:most]))

    @property
    def size(self) -> int:
        """How many tokens there are: the words, and 256 bytes."""
        return 256 + len(self.words)

    def encode(self, text: str) -> np.ndarray:
        """The text's tokens, int32 (n,)."""
        found: list[int] = []
        for piece in _PIECE.findall(text):
            row = self._rows.get(piece)
            found += piece.encode("utf-8", "replace") if row is None else [row]
        return np.array(found, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text."""
        parts = (self.words[t - 256].encode() if t >= 256 else bytes([t]) for t in map(int, tokens))
        return b"".join(parts).decode("utf-8", "replace")


def sequences(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Texts in a row, an empty line between them, cut into sequences (n, length + 1) that share no token; int32.

    The token beyond `length` is the last one's target. What is left over at the end is left out.

    Raises:
        ValueError: one string, no string, or fewer tokens than one sequence.
    """
    if isinstance(texts, str):
        raise ValueError("One string was given for texts; give a sequence of strings.")
    strange = [k for k, text in enumerate(texts) if not isinstance(text, str)]
    if strange:
        raise ValueError(f"Texts {strange[:8]} are no strings ({type(texts[strange[0]]).__name__}): leave them out.")
    if length < 1:
        raise ValueError(f"sequences(length={length}): a positive length is needed.")
    tokens = tokenizer.encode("\n\n".join(texts))
    count = len(tokens) // (length + 1)
    if not count:
        raise ValueError(
            f"{len(texts)} texts have {len(tokens)} tokens in all, fewer than one sequence of {length} + 1: give more "
            "text or a shorter length."
        )
    return tokens[: count * (length + 1)].reshape(count, length + 1)


def corrupted(texts: Sequence[str], how: str = "characters", rate: float = 1.0, seed: int = 0) -> list[str]:
    """Texts made worthless, for sources whose worth is known.

    Args:
        texts: n strings.
        how: "characters": each word's places are filled with letters drawn from the whole text, so that words are
            nonsense and letters, lengths and spaces as frequent as before; "words": the words change places within
            their text, so that each is right and their order is not.
        rate: the share of words that this happens to.
        seed: of the draws.

    Raises:
        ValueError: another way, or a rate outside 0..1.
    """
    if how not in ("characters", "words"):
        raise ValueError(f"corrupted(how={how!r}): texts are corrupted by 'characters' or by 'words'.")
    if not 0 <= rate <= 1:
        raise ValueError(f"corrupted(rate={rate}): a share is between 0 and 1.")
    random = np.random.default_rng(seed)
    letters = np.array(list("".join("".join(text.split()) for text in texts)))
    found = []
    for text in texts:
        pieces = re.split(r"(\s+)", text)
        places = [k for k, piece in enumerate(pieces) if piece and not piece.isspace()]
        chosen = [k for k in places if random.random() < rate]
        if how == "characters":
            for k in chosen:
                pieces[k] = "".join(letters[random.integers(0, len(letters), len(pieces[k]))])
        else:
            for k, word in zip(chosen, [pieces[j] for j in random.permutation(chosen)], strict=True):
                pieces[k] = word
        found.append("".join(pieces))
    return found
