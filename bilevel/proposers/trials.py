"""What a proposer is, and the record of one proposal: what `search` and its proposers pass to each other."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from bilevel.proposers.expressions import OPERATIONS, Expression, Parameter, Refused
from bilevel.typing import PyTree

__all__ = ["Proposer", "Trial", "best_of", "short_error"]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A proposal with what its lower level came to.

    Attributes:
      number: 0, 1, ... in the order of the run.
      round: the call of `ask` that it came from.
      proposal: what was proposed.
      loss: the upper loss at y; infinite where the trial failed.
      y: the lower variable, or None.
      error: a short sentence where the trial failed, else empty.
      curve: the lower loss by iteration, where the solver tells it.
    """

    number: int
    round: int
    proposal: Any
    loss: float
    y: PyTree = None
    error: str = ""
    curve: tuple[float, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether there is no loss."""
        return not math.isfinite(self.loss)

    @property
    def complexity(self) -> int:
        """The size of an `Expression`; 0 for any other proposal."""
        return self.proposal.complexity if isinstance(self.proposal, Expression) else 0

    def __repr__(self) -> str:
        if isinstance(self.proposal, Expression) and self.y is not None:
            shown = self.proposal.text(self.y)
        else:
            shown = str(self.proposal)
        return f"Trial {self.number}: " + (f"failed, {self.error}" if self.failed else f"{self.loss:.4g}  {shown}")


@runtime_checkable
class Proposer(Protocol):
    """An upper level without gradients: two methods, and a class of one's own with these works in `search`.

    Optional: an attribute `tokens`, what it has spent, for the budget of that name; a method `settings()`, a dictionary
    of what makes it propose as it does, by which `search(checkpoint=...)` knows another proposer (of a frozen
    dataclass: its fields).
    """

    def ask(self, history: Sequence[Trial], count: int, key: jax.Array) -> Sequence[Any]:
        """At most `count` proposals, given all trials so far; none at all ends the run.

        What follows from history and key alone resumes exactly.
        """

    def tell(self, results: Sequence[Trial]) -> None:
        """The trials of the last proposals, in the order asked; after a resume, those of every earlier round."""


def best_of(history: Sequence[Trial], count: int) -> list[Trial]:
    """The best trials, one of each proposal, the best first: at most `count` of them, a positive integer."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise ValueError(f"best_of(history, {count!r}): a positive integer is needed.")
    found: dict[str, Trial] = {}
    for trial in sorted((t for t in history if not t.failed), key=lambda t: (t.loss, t.number)):
        found.setdefault(_content(trial.proposal), trial)
        if len(found) == count:
            break
    return list(found.values())


def _content(proposal: Any) -> str:
    """What tells two proposals apart: an array's text leaves numbers out."""
    try:
        return json.dumps(encoded(proposal), sort_keys=True)
    except (TypeError, ValueError):  # of a class that no checkpoint takes
        return str(proposal)


def short_error(error: BaseException | str, limit: int = 160) -> str:
    """An error in one bounded line of plain characters, without paths: fit to be shown, and sent to a language
    model."""
    line = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    line = re.sub(r"[^ -~]+", " ", line.splitlines()[0] if line.strip() else "unknown error")
    line = re.sub(r"(?:[A-Za-z]:)?[/\\][^\s'\",;:)]+", "(path)", line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


# ---------------------------------------------------------------- trials as JSON


def encoded(value: Any) -> Any:
    """A proposal or a y as JSON, exactly; nothing of it is code.

    Raises:
      TypeError: it holds something else than numbers, texts, arrays and containers of these.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return {"float": repr(value)} if not math.isfinite(value) else value
    if isinstance(value, Refused):
        return {"refused": value.reason}
    if isinstance(value, Expression):
        parameters = [[p.name, *(encoded(float(v)) for v in (p.start, p.lower, p.upper))] for p in value.parameters]
        return {"expression": [value.terms, parameters, value.additive]}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        if array.dtype.kind in "biufc" and array.dtype.kind != "c":
            return {
                "array": [encoded(v) for v in array.ravel().tolist()],
                "shape": array.shape,
                "dtype": str(array.dtype),
            }
    if isinstance(value, tuple) and type(value) is tuple:
        return {"tuple": [encoded(v) for v in value]}
    if isinstance(value, list):
        return [encoded(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encoded(v) for k, v in value.items()}}
    raise TypeError(f"a {type(value).__name__} cannot be written to a checkpoint")


def decoded(value: Any) -> Any:
    """What `encoded` wrote."""
    if isinstance(value, list):
        return [decoded(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "refused" in value:
        return Refused(value["refused"])
    if "expression" in value:
        terms, parameters, additive = value["expression"]
        read = tuple(Parameter(p[0], *(decoded(v) for v in p[1:])) for p in parameters)
        return Expression(tuple(_node(t) for t in terms), read, additive)
    if "array" in value:
        return np.asarray(decoded(value["array"]), value["dtype"]).reshape(value["shape"])
    if "tuple" in value:
        return tuple(decoded(v) for v in value["tuple"])
    return {k: decoded(v) for k, v in value["dict"].items()}


def _node(value: Any) -> Any:
    op, *children = value
    if op == "const":
        return ("const", float(children[0]))
    if op == "var":
        return ("var", str(children[0]))
    if op not in OPERATIONS or len(children) != OPERATIONS[op][0]:
        raise ValueError(f"{op!r} is no operation of an expression")
    return (op, *map(_node, children))
