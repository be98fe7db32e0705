"""The record that every application's constructor returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from bilevel import Problem

X = TypeVar("X")
Y = TypeVar("Y")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Application(Generic[X, Y]):
    """A bilevel problem with all that a run of it needs.

        app = biformer.cleaning(train, clean, test=test)
        solution = solve(app.problem, app.x0, app.y0, solver, metrics=app.metrics)

    What else an application has to offer (its network as a function, tables of labels, held-out data), it says in its
    own folder, as keyword fields of a class below this one:

        @dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
        class Cleaning(Application[Array, PyTree]): ...

    Attributes:
        problem: the problem.
        x0: where the upper variable starts; None where both levels own y.
        y0: where the lower variable starts.
        metrics: by name functions of (x, y), or pairs (function, data): the `metrics` of `solve`.
        name: of the application, in a word or two.
        description: a sentence that says what is chosen above and what is trained below.
        source: the paper that the problem is from.
    """

    problem: Problem
    x0: X
    y0: Y
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = dataclasses.field(default="", kw_only=True)
    description: str = dataclasses.field(default="", kw_only=True)
    source: str = dataclasses.field(default="", kw_only=True)

    def __repr__(self) -> str:
        size = lambda tree: f"{sum(map(np.size, jax.tree.leaves(tree))):,} numbers"  # noqa: E731
        lines = [
            f"{type(self).__name__}: {self.name}" if self.name else type(self).__name__,
            self.description,
            f"x: {size(self.x0)}, y: {size(self.y0)}, metrics: {', '.join(self.metrics) or 'none'}",
            self.source,
        ]
        return "\n  ".join(filter(None, lines))
