"""Recorded proposals, in their order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bilevel._arguments import explained_class
from bilevel.proposers.expressions import Grammar, GrammarError, Refused
from bilevel.proposers.trials import Trial, short_error

__all__ = ["ReplayProposer", "read_answer"]


@explained_class
@dataclasses.dataclass(frozen=True)
class ReplayProposer:
    """Proposals from a list: for tests, for documentation, and to run a recorded session again without its model.

        ReplayProposer.from_transcript("runs/law/transcript.jsonl", grammar)

    Attributes:
      answers: proposals, or answers of a language model as texts where a grammar is given.
      grammar: reads texts; None: the answers are the proposals.
    """

    answers: tuple[Any, ...]
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", tuple(self.answers))

    @classmethod
    def from_transcript(cls, path: Any, grammar: Grammar) -> ReplayProposer:
        """The answers that an `LLMProposer` wrote down, those that came; a last line that was cut off is left out."""
        rows, lines = [], Path(path).read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise ValueError(f"{path}:{number} is no line of a transcript. Give another file.") from None
        return cls(tuple(row["answer"] for row in rows if isinstance(row.get("answer"), str)), grammar)

    def ask(self, history: Sequence[Trial], count: int, key: jax.Array) -> list[Any]:
        """The next answers; none when all were given."""
        chosen = self.answers[len(history) : len(history) + count]
        if self.grammar is None:
            return list(chosen)
        return [read_answer(a, self.grammar) if isinstance(a, str) else a for a in chosen]

    def tell(self, results: Sequence[Trial]) -> None:
        """Nothing to remember."""


def read_answer(answer: str, grammar: Grammar) -> Any:
    """The law in a model's answer: the one JSON object in it, alone or within prose; else a `Refused` that says why."""
    try:
        return grammar.from_json(_object(answer))
    except (GrammarError, ValueError, RecursionError) as error:
        return Refused(short_error(str(error) if isinstance(error, GrammarError) else "the answer is not valid JSON"))


def _object(answer: str) -> Any:
    """The first JSON object with terms in a text."""
    if len(answer) > 20_000:
        raise GrammarError("the answer is too long")
    decoder, at, tries = json.JSONDecoder(parse_constant=_no_constant), answer.find("{"), 0
    while at >= 0 and tries < 20:
        try:
            found, _ = decoder.raw_decode(answer, at)
            if isinstance(found, dict) and "terms" in found:
                return found
        except ValueError:
            pass
        at, tries = answer.find("{", at + 1), tries + 1
    raise GrammarError('there is no JSON object with "terms" in the answer')


def _no_constant(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are no JSON
