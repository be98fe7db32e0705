"""Questions as arrays, how answers are judged, and questions made by template from plain paragraphs."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bilevel.applications.sequence.bidaf import Passage
from bilevel.applications.sequence.loaders import Question
from bilevel.applications.sequence.texts import PRINTABLE, TOKEN, UNKNOWN, Vocabulary, pad

TEMPLATES = ("entity", "number", "date", "word")
_MONTH = r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_PATTERNS = {
    "date": re.compile(rf"\b(?:{_MONTH}(?: \d{{1,2}})?(?:,? \d{{4}})?|(?:1[0-9]|20)\d\d)\b"),
    "number": re.compile(r"\b\d[\d,.]*\d\b|\b\d\b"),
    "entity": re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*"),
    "word": re.compile(r"\b[a-z]{5,}\b"),
}
_SENTENCE = re.compile(r"[^.!?]+(?:[.!?](?!\s|$)[^.!?]*)*[.!?]?")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """SQuAD's form of an answer: lower case, without punctuation, articles and doubled blanks."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the normalised prediction is one of the answers, else 0 (EM)."""
    _some(answers)
    return float(any(normalise_answer(prediction) == normalise_answer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the prediction's words against an answer's, both normalised; 0 where they share none."""
    _some(answers)

    def against(answer: str) -> float:
        ours, theirs = normalise_answer(prediction).split(), normalise_answer(answer).split()
        shared = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
        return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0

    return max(against(answer) for answer in answers)


def _some(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers={answers!r} was given; give a sequence of the texts that count as right.")


class Questions(NamedTuple):
    """Questions as arrays, n of them; a pytree but for `kept` and `offsets`, which `samples` leaves out.

    Attributes:
        context, question: batches of texts.
        first, last: the answer's first and last word in the context, (n,).
        kept: which of the given questions these are; the others' answers lie beyond the longest context.
        offsets: per question the words' places in the characters of its context.
    """

    context: Passage
    question: Passage
    first: np.ndarray
    last: np.ndarray
    kept: np.ndarray
    offsets: list[list[tuple[int, int]]]

    @property
    def samples(self) -> dict[str, Any]:
        """What `weighted` takes: arrays alone, one question per row."""
        return {name: getattr(self, name) for name in ("context", "question", "first", "last")}

    def text(self, k: int, span: Any, context: str) -> str:
        """The words of a span (first, last), cut out of the k-th question's context."""
        first, last = (min(int(at), len(self.offsets[k]) - 1) for at in span)
        return context[self.offsets[k][first][0] : self.offsets[k][last][1]]


def encode_questions(
    questions: Sequence[Question],
    vocabulary: Vocabulary,
    *,
    longest: int = 400,
    longest_question: int = 40,
    letters: int = 16,
) -> Questions:
    """Questions as a reader takes them.

    Args:
        questions: as `squad` and `cloze` give them.
        vocabulary: of the words.
        longest, longest_question: words that are read; a question whose answer ends beyond is left out.
        letters: characters that are read of a word; rows as in `encode_characters`.

    Raises:
        ValueError: a question or context without a word, an answer that does not stand at its place, no question left.
    """
    contexts, asked, spans, kept = [], [], [], []
    for k, each in enumerate(questions):
        words, query = list(TOKEN.finditer(each.context)), list(TOKEN.finditer(each.question))
        if not words or not query:
            raise ValueError(
                f"{'The context' if not words else 'The text'} of question {each.name!r} ({k}) has no word."
            )
        end = each.start + len(each.answers[0])
        if each.context[each.start : end] != each.answers[0]:
            raise ValueError(
                f"The answer {each.answers[0]!r} of question {each.name!r} ({k}) does not stand at {each.start}."
            )
        inside = [j for j, word in enumerate(words) if word.start() < end and word.end() > each.start]
        if not inside or inside[-1] >= longest:
            continue
        contexts.append(words[:longest])
        asked.append(query[:longest_question])
        spans.append((inside[0], inside[-1]))
        kept.append(k)
    if not kept:
        raise ValueError(f"None of {len(questions)} questions has its answer in the first {longest} words.")

    def passage(texts: list[list[re.Match[str]]]) -> Passage:
        ids, lengths = pad([[vocabulary[word.group().lower()] for word in words] for words in texts])
        characters = np.zeros((*ids.shape, letters), np.int32)
        for k, words in enumerate(texts):
            for j, word in enumerate(words):
                row = [PRINTABLE.get(letter, UNKNOWN) for letter in word.group().lower()[:letters]]
                characters[k, j, : len(row)] = row
        return Passage(ids, characters, lengths)  # type: ignore[arg-type]

    first, last = np.array(spans, np.int32).T
    offsets = [[word.span() for word in words] for words in contexts]
    return Questions(passage(contexts), passage(asked), first, last, np.array(kept), offsets)


def cloze(
    contexts: Sequence[str], per_context: int = 4, seed: int = 0, templates: Sequence[str] = TEMPLATES
) -> tuple[list[Question], np.ndarray]:
    """Questions made from paragraphs: a sentence with a gap, whose filling is the answer.

    Templates say what is taken out: "entity", capitalised words within a sentence; "number"; "date", years and months;
    "word", any word of five letters or more. Dates are no numbers here.

    Args:
        contexts: paragraphs.
        per_context: gaps of each template and paragraph, at most; they are drawn.
        seed: of the draw.
        templates: of the four.

    Returns:
        The questions, and each one's template by its number in `templates`.
    """
    unknown = [name for name in templates if name not in _PATTERNS]
    if unknown or not templates:
        raise ValueError(f"templates={tuple(templates)} was given; there are {', '.join(map(repr, TEMPLATES))}.")
    random, found, sources = np.random.default_rng(seed), [], []
    for c, context in enumerate(contexts):
        sentences = [match.span() for match in _SENTENCE.finditer(context) if match.group().strip()]
        dates = {match.start() for match in _PATTERNS["date"].finditer(context)}
        for t, name in enumerate(templates):
            gaps = [
                match.span()
                for match in _PATTERNS[name].finditer(context)
                if name != "number" or match.start() not in dates
            ]
            for g in sorted(random.permutation(len(gaps))[:per_context]):
                start, end = gaps[g]
                around = next(((a, b) for a, b in sentences if a <= start and end <= b), None)
                if around is None or not TOKEN.search(context[around[0] : start] + context[end : around[1]]):
                    continue
                question = f"{context[around[0] : start]} <blank> {context[end : around[1]]}".strip()
                found.append(Question(f"cloze {c}.{name}.{g}", question, context, (context[start:end],), start))
                sources.append(t)
    if not found:
        raise ValueError(f"No gap of {', '.join(templates)} was found in {len(contexts)} paragraphs.")
    return found, np.array(sources, np.int32)
