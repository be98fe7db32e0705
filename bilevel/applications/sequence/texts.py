"""From texts to arrays: tokens, vocabularies, characters, weighted n-grams, and static word vectors."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import math
import os
import re
import string
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.sequence.attentive import CHARACTERS
from bilevel.applications.sequence.recurrent import concrete
from bilevel.datasets import ENVIRONMENT_VARIABLE, DatasetNotFoundError

PADDING, UNKNOWN = 0, 1
TOKEN = re.compile(r"https?://\S+|[@#]?\w+(?:['’]\w+)*|[:;=8][-o*']?[)(\]\[dDpP/\\|]|[^\w\s]")
PRINTABLE = {letter: k + 2 for k, letter in enumerate(string.printable)}


def tokenise(text: str) -> list[str]:
    """Lower-cased words, numbers, hashtags, users, emoticons, and signs one by one; an address is `<url>`."""
    tokens = TOKEN.findall(text)
    return ["<url>" if token.startswith(("http://", "https://")) else token.lower() for token in tokens]


def check_texts(texts: Sequence[str], what: str = "texts") -> None:
    """Refuse what is no text and texts without a token, naming the first ones."""
    if isinstance(texts, str):
        raise ValueError(f"One string was given for {what}; give a sequence of strings.")
    strange = [k for k, text in enumerate(texts) if not isinstance(text, str)]
    if strange:
        raise ValueError(
            f"{what.capitalize()} {strange[:8]} are no strings ({type(texts[strange[0]]).__name__}); "
            "give strings, and leave out what is missing."
        )
    empty = [k for k, text in enumerate(texts) if not text.strip()]
    if empty:
        raise ValueError(
            f"{what.capitalize()} {empty[:8]} are empty ({len(empty)} of {len(texts)}): there is nothing to read. "
            "Leave them out, their labels too."
        )


def pad(rows: Sequence[Sequence[int]], longest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of whole numbers as one array (rows, time), padded with 0 and cut at `longest`, and their lengths."""
    if longest is not None and longest < 1:
        raise ValueError(f"longest={longest} was given; a text has at least one token.")
    rows = [row[:longest] for row in rows]
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), max(lengths, default=0)), np.int32)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = row
    return ids, lengths


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens that a model knows; row 0 is padding, row 1 every other token.

        vocabulary = Vocabulary.of(train_texts)
        ids, lengths = vocabulary.encode(texts, longest=40)

    Attributes:
        words: the tokens of rows 2, 3, ...
    """

    words: tuple[str, ...]
    _rows: Mapping[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(set(self.words)) != len(self.words):
            twice = [word for word, count in collections.Counter(self.words).items() if count > 1]
            raise ValueError(f"A vocabulary has each token once; {twice[:8]} stand there more often.")
        object.__setattr__(self, "_rows", {word: k + 2 for k, word in enumerate(self.words)})

    @classmethod
    def of(cls, texts: Iterable[str], least: int = 2, most: int | None = None) -> Vocabulary:
        """The tokens that occur at least `least` times, the `most` frequent of them, frequent ones first."""
        counts = collections.Counter(token for text in texts for token in tokenise(text))
        frequent = sorted((-count, word) for word, count in counts.items() if count >= least)
        return cls(tuple(word for _, word in frequent[:most]))

    def __len__(self) -> int:
        """How many rows an embedding needs."""
        return len(self.words) + 2

    def __getitem__(self, token: str) -> int:
        return self._rows.get(token, UNKNOWN)

    def encode(self, texts: Sequence[str], longest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens' rows (n, time) and lengths (n,), both int32; tokens beyond `longest` are cut off.

        Raises:
            ValueError: empty texts, by their places.
        """
        check_texts(texts)
        return pad([[self[token] for token in tokenise(text)] for text in texts], longest)


def encode_characters(
    texts: Sequence[str], longest: int | None = None, *, unknown: Literal["row", "refuse"] = "row"
) -> tuple[np.ndarray, np.ndarray]:
    """Characters' rows (n, time) and lengths (n,) for `character_model`: lower case, `string.printable` from row 2 on.

    Args:
        texts: n of them.
        longest: characters that are read of each.
        unknown: what is not in `string.printable` is row 1, as in the paper; or refused.

    Raises:
        ValueError: empty texts, texts of unknown characters alone, with "refuse" any unknown character; by name.
    """
    if unknown not in ("row", "refuse"):
        raise ValueError(f"unknown={unknown!r} was given; there are 'row' and 'refuse'.")
    check_texts(texts)
    rows = [[PRINTABLE.get(letter, UNKNOWN) for letter in text.lower()] for text in texts]
    for k, row in enumerate(rows):
        strangers = sorted({letter for letter, at in zip(texts[k].lower(), row, strict=True) if at == UNKNOWN})
        if strangers and (
            unknown == "refuse" or all(at == UNKNOWN or texts[k][j].isspace() for j, at in enumerate(row))
        ):
            raise ValueError(
                f"Text {k} has the unknown characters {''.join(strangers[:12])!r}"
                f"{'' if unknown == 'refuse' else ' and no other'}: the {CHARACTERS} rows are those of "
                "string.printable. Transliterate the text, or leave it out."
            )
    return pad(rows, longest)


@dataclasses.dataclass(frozen=True)
class NGrams:
    """Weighted n-grams (TF-IDF): the features of a linear learner, in the sparse form of two arrays.

        grams = NGrams.of(train_texts)
        inputs = grams.encode(texts)
        logits = linear_classifier(params, inputs)

    A text's value at a gram is its count times 1 + log((1 + n) / (1 + texts that have it)), over the text's norm.

    Attributes:
        grams: tokens joined by a space; row 0 is padding, whose value is 0.
        rarity: of each gram, (rows,).
        longest: tokens in a gram.
    """

    grams: tuple[str, ...]
    rarity: np.ndarray
    longest: int = 2

    @classmethod
    def of(cls, texts: Sequence[str], longest: int = 2, least: int = 2, most: int | None = None) -> NGrams:
        """The grams of 1 to `longest` tokens that stand in `least` of the texts at least, the `most` frequent ones."""
        check_texts(texts)
        counts = collections.Counter(gram for text in texts for gram in set(_grams(text, longest)))
        grams = [gram for gram, count in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if count >= least][:most]
        if not grams:
            raise ValueError(f"No n-gram stands in {least} of {len(texts)} texts; lower least=.")
        rarity = [0.0] + [1 + math.log((1 + len(texts)) / (1 + counts[gram])) for gram in grams]
        return cls(tuple(grams), np.asarray(rarity, np.float32), longest)

    def __len__(self) -> int:
        """Rows of the parameters, the padding's included."""
        return len(self.grams) + 1

    def encode(self, texts: Sequence[str], width: int | None = None) -> dict[str, np.ndarray]:
        """`{"grams": rows (n, m), "values": (n, m)}`; a text without a known gram has values of zero alone.

        m is the most that a text has, or `width`, beyond which a text's grams are left out.
        """
        check_texts(texts)
        rows = {gram: k + 1 for k, gram in enumerate(self.grams)}
        found: list[dict[int, int]] = [
            collections.Counter(rows[gram] for gram in _grams(text, self.longest) if gram in rows) for text in texts
        ]
        found = [dict(list(counts.items())[:width]) for counts in found]
        ids, _ = pad([list(counts) for counts in found])
        if width is not None:
            ids = np.pad(ids, ((0, 0), (0, width - ids.shape[1])))
        values = np.zeros(ids.shape, np.float32)
        for k, counts in enumerate(found):
            value = np.array(list(counts.values()), np.float32) * self.rarity[ids[k, : len(counts)]]
            values[k, : len(counts)] = value / max(float(np.linalg.norm(value)), 1e-12)
        return {"grams": ids, "values": values}

    def init(self, classes: int = 2) -> dict[str, Array]:
        """Parameters of `linear_classifier`, zero: one logit for two classes, else one for each."""
        out = 1 if classes == 2 else classes
        return {"kernel": jnp.zeros((len(self), out)), "bias": jnp.zeros(out)}


def _grams(text: str, longest: int) -> list[str]:
    tokens = tokenise(text)
    return [" ".join(tokens[k : k + size]) for size in range(1, longest + 1) for k in range(len(tokens) - size + 1)]


def linear_classifier(params: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
    """Logits (n, 1) or (n, classes) of weighted n-grams, as `NGrams.encode` makes them: sum of values times weights."""
    known = concrete(inputs["grams"])
    rows = params["kernel"].shape[0]
    if known is not None and known.size and known.max() >= rows:
        raise ValueError(
            f"n-grams up to row {known.max()} were given to a classifier of {rows}: the dictionary does not match it. "
            "Encode with the NGrams that the parameters were made for."
        )
    return jnp.einsum("nm,nmc->nc", inputs["values"], params["kernel"][inputs["grams"]]) + params["bias"]


def wordllama_table(vocabulary: Vocabulary, path: str | os.PathLike[str] | None = None) -> np.ndarray:
    """Static vectors of a vocabulary's tokens from the package `wordllama`, float32 (rows, 256).

    A token is cut into the pieces of that package's vocabulary, the longest first from the left, and its vector is the
    mean of theirs (the package's own tokenizer merges pieces in another order); the rows of padding and of unknown
    tokens are zero and the mean of all. Nothing of the package is run.

    Args:
        vocabulary: whose tokens.
        path: of the wheel, of its unpacked folder, or of the installed package; by default the installed package.

    Raises:
        DatasetNotFoundError: the two files are in none of these.
        ValueError: files of another form.
    """
    weights, tokens = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"
    content = _package_files("wordllama", (weights, tokens), path, "pip install wordllama==0.4.0.post1")
    table = _safetensors(content[weights], "embedding.weight")
    rows: dict[str, int] = json.loads(content[tokens])["model"]["vocab"]
    if table.ndim != 2 or max(rows.values()) >= len(table):
        raise ValueError(
            f"wordllama's dictionary of {len(rows)} entries does not match its embeddings of shape {table.shape}: "
            "take both files from one version."
        )
    out = np.zeros((len(vocabulary), table.shape[1]), np.float32)
    out[UNKNOWN] = table.mean(0)
    for k, word in enumerate(vocabulary.words):
        pieces = _pieces("▁" + word, rows)
        out[k + 2] = table[pieces].mean(0) if pieces else out[UNKNOWN]
    return out


def _pieces(word: str, rows: Mapping[str, int]) -> list[int]:
    """The longest known pieces from the left; letters that are in no piece are left out."""
    found, at = [], 0
    while at < len(word):
        for end in range(len(word), at, -1):
            piece = word[at:end]
            if piece in rows:
                if piece != "▁":
                    found.append(rows[piece])
                at = end
                break
        else:
            at += 1
    return found


def _safetensors(content: bytes, name: str) -> np.ndarray:
    """One array of a safetensors file, as float32."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    if name not in header:
        raise ValueError(f"The file of vectors has {', '.join(sorted(header))}, and no {name!r}.")
    entry = header[name]
    kinds = {"F16": np.float16, "F32": np.float32}
    if entry["dtype"] not in kinds:
        raise ValueError(f"{name!r} has the type {entry['dtype']}; F16 or F32 was expected.")
    begin, end = (8 + size + offset for offset in entry["data_offsets"])
    return np.frombuffer(content[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"]).astype(np.float32)


def _package_files(
    name: str, files: Sequence[str], path: str | os.PathLike[str] | None, install: str
) -> dict[str, bytes]:
    """Files of an installed package, which is found and not imported, or of its wheel or folder at `path`."""
    given = [Path(path).expanduser()] if path is not None else []
    if path is None:
        if environment := os.environ.get(ENVIRONMENT_VARIABLE):
            given += [Path(environment).expanduser() / name, Path(environment).expanduser()]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            given.append(Path(spec.submodule_search_locations[0]))
    for place in given:
        if place.is_file() and zipfile.is_zipfile(place):
            with zipfile.ZipFile(place) as archive:
                inside = {file: f"{name}/{file}" for file in files}
                if set(inside.values()) <= set(archive.namelist()):
                    return {file: archive.read(full) for file, full in inside.items()}
        for folder in (place, place / name):
            if all((folder / file).is_file() for file in files):
                return {file: (folder / file).read_bytes() for file in files}
    looked = ", ".join(map(str, given)) or f"no place: {name} is not installed"
    raise DatasetNotFoundError(
        f"{name}'s files {', '.join(files)} were not found in {looked}. Install it with `{install}`, or give the wheel "
        f"or the folder as path= or in the environment variable {ENVIRONMENT_VARIABLE}."
    )


def check_table(table: Any, vocabulary: Vocabulary) -> None:
    """Refuse vectors that are not one row per entry of the vocabulary."""
    if np.ndim(table) != 2 or np.shape(table)[0] != len(vocabulary):
        raise ValueError(
            f"Vectors of shape {np.shape(table)} were given for a vocabulary of {len(vocabulary)} rows: the dictionary "
            f"does not match the embeddings. Give ({len(vocabulary)}, width), rows 0 and 1 for padding and unknown."
        )
