"""Files of texts and labels from the user's own path; nothing of them is shipped, and nothing is fetched.

VADER's crowd-rated snippets are in the source distribution of the package `vaderSentiment` on PyPI (MIT). The tweets
of SemEval-2018 task 3 may not be passed on; SQuAD and XQuAD have licences of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bilevel.datasets import ENVIRONMENT_VARIABLE, DatasetNotFoundError

Place = str | os.PathLike[str]

KINDS = {
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
}
_RATED = "additional_resources/hutto_ICWSM_2014"
_RULE = ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt")
_INSTALL = "pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2"


class Snippets(NamedTuple):
    """Texts that people rated.

    Attributes:
        texts: n strings.
        human: the raters' mean, -4 to 4, float32 (n,).
        documents: which text a sentence is from, whole numbers from 0 (n,); each its own where the file has none.
        names: the file's names of the texts.
    """

    texts: list[str]
    human: np.ndarray
    documents: np.ndarray
    names: list[str]


class RuleScores(NamedTuple):
    """What VADER's rule says of texts, each float32 (n,).

    Attributes:
        compound: -1 to 1; its sign is the weak label, 0 where the rule knows no word.
        negative, neutral, positive: shares of the text, which sum to 1.
    """

    compound: np.ndarray
    negative: np.ndarray
    neutral: np.ndarray
    positive: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """The weak label, 1 where compound > 0."""
        return (self.compound > 0).astype(np.int32)

    @property
    def features(self) -> np.ndarray:
        """(n, 5) for `weak_labels(features=)`: 1, the label as -1 or 1, the score, its size, the neutral share."""
        side = 2 * self.labels.astype(np.float32) - 1
        return np.stack([np.ones_like(side), side, self.compound, np.abs(self.compound), self.neutral], 1)

    def __getitem__(self, which: Any) -> Any:
        """By whole numbers or booleans the scores of these texts; by a number the field, as of any tuple."""
        if isinstance(which, (int, np.integer, slice)):
            return tuple.__getitem__(self, which)
        return RuleScores(*(part[which] for part in self))


def snippets(kind: Literal["movie", "nyt", "amazon", "tweets"] = "movie", path: Place | None = None) -> Snippets:
    """Crowd-rated snippets (Hutto and Gilbert, ICWSM 2014): 10,605 of movie reviews, 5,190, 3,708 and 4,200.

    Args:
        kind: "movie", "nyt" (editorials), "amazon" (reviews; these two have documents), "tweets".
        path: of the source distribution `vaderSentiment-3.3.2.tar.gz`, or of what it unpacks to; by default one of
            these in the folder that the environment variable `BILEVEL_DATA` names, or in its `vaderSentiment`.

    Raises:
        DatasetNotFoundError: not there; the message has the line that gets it.
        ValueError: another kind, or a file with a missing column or an empty text, by its line.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} was given; there are {', '.join(map(repr, KINDS))}.")
    name = f"{KINDS[kind]}_GroundTruth.txt"
    text = _distribution(path).read(f"{_RATED}/{name}").decode("utf-8-sig")
    names, human, texts = [], [], []
    for line, row in _lines(text, name, ("id", "mean rating", "text")):
        try:
            human.append(float(row[1]))
        except ValueError:
            raise ValueError(f"{name}, line {line}: the mean rating {row[1]!r} is no number.") from None
        names.append(row[0])
        texts.append(row[2])
    keys = [each.split("_")[0] for each in names] if any("_" in each for each in names) else names
    numbers = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return Snippets(texts, np.array(human, np.float32), np.array([numbers[key] for key in keys], np.int32), names)


def rule_scores(texts: Sequence[str], path: Place | None = None) -> RuleScores:
    """The scores of VADER's rule, by the package's own code (MIT).

    It is the installed package `vaderSentiment`'s where there is one and no path is given; else the three files of the
    source distribution are unpacked into a temporary folder and run from there, as an import would.

    Args:
        texts: n strings.
        path: see `snippets`.
    """
    analyser = _analyser(path)
    table = [analyser.polarity_scores(text) for text in texts]
    part = lambda name: np.array([row[name] for row in table], np.float32)  # noqa: E731
    return RuleScores(part("compound"), part("neg"), part("neu"), part("pos"))


def _analyser(path: Place | None) -> Any:
    if path is None and importlib.util.find_spec("vaderSentiment") is not None:
        return importlib.import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    distribution = _distribution(path)
    with tempfile.TemporaryDirectory() as folder:
        for file in _RULE:
            (Path(folder) / file).write_bytes(distribution.read(f"vaderSentiment/{file}"))
        spec = importlib.util.spec_from_file_location("vader_rule", Path(folder) / _RULE[0])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.SentimentIntensityAnalyzer()  # which reads its lexicon, beside its own file, at once


class _Distribution(NamedTuple):
    """A source distribution, packed or not."""

    place: Path

    def read(self, name: str) -> bytes:
        """A file by its path below the distribution's folder; the archive inside is looked into too."""
        inner = f"{_RATED}.tar.gz"
        if self.place.is_dir():
            if (self.place / name).is_file():
                return (self.place / name).read_bytes()
            if name.startswith(_RATED) and (self.place / inner).is_file():
                return self._member((self.place / inner).read_bytes(), name.removeprefix("additional_resources/"))
        else:
            packed = self.place.read_bytes()
            if name.startswith(_RATED):
                return self._member(self._member(packed, inner), name.removeprefix("additional_resources/"))
            return self._member(packed, name)
        raise DatasetNotFoundError(f"{self.place} has no {name}. {_cure()}")

    def _member(self, packed: bytes, name: str) -> bytes:
        try:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                for member in archive:
                    if member.isfile() and (member.name == name or member.name.split("/", 1)[-1] == name):
                        found = archive.extractfile(member)
                        assert found is not None
                        return found.read()
        except tarfile.ReadError as error:
            raise ValueError(f"{self.place} is no archive of a source distribution ({error}). {_cure()}") from None
        raise DatasetNotFoundError(f"{self.place} has no {name}. {_cure()}")


def _cure() -> str:
    return (
        f"Get it with `{_INSTALL}` and give the file as path=, or put it into the folder that the environment variable "
        f"{ENVIRONMENT_VARIABLE} names. (A wheel, or an installed package, has no snippets.)"
    )


def _distribution(path: Place | None) -> _Distribution:
    places: list[Path] = []
    if path is not None:
        places.append(Path(path).expanduser())
    elif environment := os.environ.get(ENVIRONMENT_VARIABLE):
        top = Path(environment).expanduser()
        places += [top / "vaderSentiment", top, *sorted(top.glob("vaderSentiment-*"))]
    for place in places:
        if place.is_file():
            return _Distribution(place)
        if place.is_dir():
            if (place / "additional_resources").is_dir():
                return _Distribution(place)
            inside = [each for each in sorted(place.glob("vaderSentiment-*")) if each.name.endswith((".tar.gz", ".2"))]
            if inside:
                return _Distribution(inside[-1])
    looked = ", ".join(map(str, places)) or f"no place: neither path= nor {ENVIRONMENT_VARIABLE} was given"
    raise DatasetNotFoundError(f"VADER's source distribution was not found. Looked in {looked}. {_cure()}")


def _lines(text: str, name: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file of tab-separated columns, with their lines; the last column may hold tabs."""
    for k, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        row = line.split("\t", len(columns) - 1)
        if len(row) < len(columns):
            raise ValueError(
                f"{name}, line {k} has {len(row)} columns, {line[:40]!r}; {len(columns)} separated by tabs were "
                f"expected: {', '.join(columns)}."
            )
        if not row[-1].strip():
            raise ValueError(f"{name}, line {k}: the text is empty. Take the line out.")
        yield k, row


class Tweets(NamedTuple):
    """Texts and their classes, int32 (n,)."""

    texts: list[str]
    labels: np.ndarray


def semeval_irony(path: Place, classes: Literal[2, 4] = 2) -> Tweets:
    """A file of SemEval-2018 task 3 (irony in English tweets), which its users agree not to pass on.

    Columns separated by tabs, with the header `Tweet index`, `Label`, `Tweet text`; labels 0 and 1 (task A), or 0 to 3
    (task B).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a missing column, a label that is none, an empty tweet, an index twice; by its line.
    """
    if classes not in (2, 4):
        raise ValueError(f"classes={classes} was given; task A has 2 and task B has 4.")
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is no file. The tweets of SemEval-2018 task 3 are to be had from its organisers, under terms that "
            "forbid passing them on; give the path of your own copy."
        )
    lines = file.read_text("utf-8-sig").split("\n")
    header = [name.strip().lower() for name in lines[0].rstrip("\r").split("\t")]
    wanted = ("tweet index", "label", "tweet text")
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ValueError(
            f"{file.name} lacks the column(s) {', '.join(map(repr, missing))}; its first line has "
            f"{', '.join(map(repr, header))}. Give a file whose first line is 'Tweet index', 'Label', 'Tweet text', "
            "separated by tabs."
        )
    at = [header.index(name) for name in wanted]
    texts, labels = [], []
    seen: dict[str, int] = {}
    for k, row in _lines("\n".join(["", *lines[1:]]), file.name, header):
        index, label, text = (row[j].strip() for j in at)
        if not label.isdigit() or int(label) >= classes:
            raise ValueError(f"{file.name}, line {k}: the label {label!r} is not among 0 to {classes - 1}.")
        if not text:
            raise ValueError(f"{file.name}, line {k}: the tweet is empty. Take the line out.")
        if index in seen:
            raise ValueError(f"{file.name}, line {k}: the index {index} stands in line {seen[index]} already.")
        seen[index] = k
        texts.append(text)
        labels.append(int(label))
    if not texts:
        raise ValueError(f"{file.name} has a header and no tweet.")
    return Tweets(texts, np.array(labels, np.int32))


class Question(NamedTuple):
    """A question on a paragraph.

    Attributes:
        name: its id in the file.
        question, context: texts.
        answers: the texts that count as right, the first one's place being `start`.
        start: character of the context where the first answer begins.
        article: title of the article.
    """

    name: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int
    article: str = ""


def squad(path: Place) -> list[Question]:
    """The questions of a file in SQuAD's format (SQuAD 1.1, XQuAD), from the user's own path.

        {"data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ...,
         "answers": [{"text": ..., "answer_start": ...}]}]}]}]}

    Questions without an answer (SQuAD 2.0's `is_impossible`) are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no JSON, a field that is missing, an empty text, an answer that does not stand where the file says;
            by the place in the file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is no file. Give the path of a JSON file in SQuAD's format, such as xquad.en.json (CC BY-SA 4.0)."
        )
    try:
        content = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} is no JSON: {error}.") from None
    found = []
    for a, article in enumerate(_field(content, "data", list, file.name)):
        where = f"{file.name}, data[{a}]"
        for p, paragraph in enumerate(_field(article, "paragraphs", list, where)):
            at = f"{where}.paragraphs[{p}]"
            context = _field(paragraph, "context", str, at)
            for q, entry in enumerate(_field(paragraph, "qas", list, at)):
                here = f"{at}.qas[{q}]"
                question, given = _field(entry, "question", str, here), _field(entry, "answers", list, here)
                if not given and entry.get("is_impossible"):
                    continue
                if not given:
                    raise ValueError(f"{here} has no answer. Take it out, or mark it is_impossible.")
                texts = tuple(_field(answer, "text", str, f"{here}.answers[{k}]") for k, answer in enumerate(given))
                start = _field(given[0], "answer_start", int, f"{here}.answers[0]")
                if context[start : start + len(texts[0])] != texts[0] or start < 0:
                    raise ValueError(
                        f"{here}.answers[0]: {texts[0]!r} does not stand at character {start} of its context, where "
                        f"{context[max(start, 0) : max(start, 0) + len(texts[0])]!r} is."
                    )
                name = str(entry.get("id", f"{a}.{p}.{q}"))
                found.append(Question(name, question, context, texts, start, str(article.get("title", ""))))
    if not found:
        raise ValueError(f"{file.name} has no question with an answer.")
    return found


def _field(entry: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        have = ", ".join(map(repr, entry)) if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise ValueError(f"{where} lacks the field {name!r}; it has {have}.")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}.{name} is a {type(value).__name__}; a {kind.__name__} was expected.")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{where}.{name} is empty.")
    return value
