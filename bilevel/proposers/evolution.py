"""The offline proposer: evolution of laws of a grammar, with shares that exploit and explore."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from bilevel._arguments import explained_class
from bilevel.proposers.expressions import (
    OPERATIONS,
    Expression,
    Grammar,
    GrammarError,
    Node,
    Parameter,
    additive,
    names_in,
    simplified,
    summands,
    text,
    unscaled,
)
from bilevel.proposers.trials import Trial, best_of

__all__ = ["GrammarProposer"]


@explained_class
@dataclasses.dataclass(frozen=True)
class GrammarProposer:
    """Laws of a grammar by evolution: additive ones `sum_i p_i term_i` by default, whose fit is a linear least squares.

    Of each round, `exploit` is the share of children of the `parents` best trials (a term replaced, added, dropped or
    mutated, or the terms of two parents mixed); the others are drawn at random from the grammar, so that no region is
    ever given up. A child is ordered and simplified, and no law is proposed twice. What it proposes follows from
    history and key alone, so it remembers nothing, and resumes exactly.

    Attributes:
      grammar: the names, the functions and the limits.
      terms: the most terms of an additive law.
      additive: False: one free expression with up to three parameters inside, p0, p1, p2.
      exploit: the share of children.
      parents: how many of the best trials have children.
      term_depth: of a random term, at most.
      constants: whether a term may be a constant (of an energy it says nothing).
      exclude: texts of terms that are never proposed, alone or within a sum.
    """

    grammar: Grammar
    terms: int = 3
    additive: bool = True
    exploit: float = 0.5
    parents: int = 5
    term_depth: int = 3
    constants: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.grammar, Grammar):
            raise TypeError("GrammarProposer(grammar=...): a bilevel.proposers.Grammar is needed.")
        for name in ("terms", "parents", "term_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"GrammarProposer({name}={getattr(self, name)!r}): a positive integer is needed.")
        if not 0 <= self.exploit <= 1:
            raise ValueError(f"GrammarProposer(exploit={self.exploit!r}): a share between 0 and 1 is needed.")
        if self.term_depth > self.grammar.depth:
            raise ValueError(
                f"GrammarProposer(term_depth={self.term_depth}): the grammar's depth is {self.grammar.depth}."
            )

    def ask(self, history: Sequence[Trial], count: int, key: jax.Array) -> list[Expression]:
        """`count` new laws; fewer where the grammar has no more that are found by chance."""
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
        seen = {str(t.proposal) for t in history}
        best = self._parents(history)
        found: list[Expression] = []
        for _ in range(60 * count):
            if len(found) == count:
                break
            child = bool(best) and random.random() < self.exploit
            law = self._child(random, best) if child else self._random(random)
            if law is not None and str(law) not in seen:
                seen.add(str(law))
                found.append(law)
        return found

    def tell(self, results: Sequence[Trial]) -> None:
        """Nothing to remember: `ask` reads the history."""

    def _parents(self, history: Sequence[Trial]) -> list[Expression]:
        """The best trials, of those with one loss (the same law in other words) the simplest one."""
        found: list[Trial] = []
        for trial in best_of(history, 20 * self.parents):
            if isinstance(trial.proposal, Expression):
                same = [i for i, t in enumerate(found) if abs(t.loss - trial.loss) <= 1e-3 * t.loss]
                if not same:
                    found.append(trial)
                elif trial.complexity < found[same[0]].complexity:
                    found[same[0]] = trial
        return [t.proposal for t in found[: self.parents]]

    # ------------------------------------------------------------ laws

    def _law(self, terms: Sequence[Node]) -> Expression | None:
        """The law in its one form, or None where it is outside the grammar or says nothing."""
        one_form = functools.partial(unscaled if self.additive else simplified, positive=self.grammar.positive)
        excluded = {text(one_form(self.grammar.parse(e))) for e in self.exclude}
        known = {text(t): t for t in map(one_form, terms)}
        if self.additive:
            known = self._split(known, one_form)
        if constant := [name for name, t in known.items() if not names_in(t) & {*self.grammar.variables}]:
            known = {name: t for name, t in known.items() if name not in constant}
            if self.constants:
                known["1"] = ("const", 1.0)
        said = lambda t: {text(one_form(part)) for part in summands(t)}  # noqa: E731
        kept = [t for name, t in sorted(known.items()) if name not in excluded and not said(t) & excluded]
        if not kept or len(kept) > self.terms:
            return None
        try:
            for term in kept:
                self.grammar.check(term)
        except GrammarError:
            return None
        if self.additive:
            return additive(kept)
        used = names_in(kept[0])
        return Expression((kept[0],), tuple(Parameter(f"p{i}") for i in range(3) if f"p{i}" in used))

    def _split(self, known: dict[str, Node], one_form: Callable[[Node], Node]) -> dict[str, Node]:
        """Terms that are sums as terms of their own, each with its coefficient, where there are places for them."""
        for name, term in list(known.items()):
            parts = {text(t): t for t in map(one_form, summands(term)) if self.constants or names_in(t)}
            wider = {other: t for other, t in known.items() if other != name} | parts
            if parts.keys() != {name} and len(wider) <= self.terms:
                known = wider
        return known

    def _random(self, random: np.random.Generator) -> Expression | None:
        count = int(random.integers(1, self.terms + 1)) if self.additive else 1
        levels = self.term_depth if self.additive else min(self.term_depth + 3, self.grammar.depth)
        return self._law([self._tree(random, int(random.integers(1, levels + 1))) for _ in range(count)])

    def _tree(self, random: np.random.Generator, levels: int) -> Node:
        """A random tree; leaves are variables, at times a small constant (or a parameter, in free laws)."""
        if levels <= 1:
            if not self.additive and random.random() < 0.3:
                return ("var", f"p{random.integers(3)}")
            if random.random() < 0.2:
                return ("const", float(random.choice([0.5, 1.0, 2.0, 3.0])))
            return ("var", str(random.choice(self.grammar.variables)))
        functions = [f for f in self.grammar.functions if OPERATIONS[f][0] == 1]
        if functions and random.random() < 0.55:
            return (str(random.choice(functions)), self._tree(random, levels - 1))
        binary = ["add", "sub", "mul", "div", *(f for f in self.grammar.functions if OPERATIONS[f][0] == 2)]
        shares = np.array([3.0, 3.0, 3.0, 2.0] + [0.5] * (len(binary) - 4))
        op = str(random.choice(binary, p=shares / shares.sum()))
        other = int(random.integers(1, levels))
        pair = [self._tree(random, levels - 1), self._tree(random, other)]
        if random.random() < 0.5:
            pair.reverse()
        return (op, *pair)

    def _child(self, random: np.random.Generator, best: list[Expression]) -> Expression | None:
        # The better a parent the more children: ranks weigh 1, 1/2, 1/3, ...
        weights = 1 / np.arange(1.0, len(best) + 1)
        parent = best[int(random.choice(len(best), p=weights / weights.sum()))]
        terms = list(parent.terms)
        if not self.additive:
            return self._law([self._mutated(random, terms[0])])
        move = random.random()
        new = lambda: self._tree(random, int(random.integers(1, self.term_depth + 1)))  # noqa: E731
        if move < 0.25 and len(terms) < self.terms:
            terms.append(new())
        elif move < 0.5:
            terms[int(random.integers(len(terms)))] = new()
        elif move < 0.6 and len(terms) > 1:
            terms.pop(int(random.integers(len(terms))))
        elif move < 0.8 and len(best) > 1:
            pool = sorted({*terms, *best[int(random.integers(len(best)))].terms}, key=repr)
            size = int(random.integers(1, min(self.terms, len(pool)) + 1))
            terms = [pool[i] for i in random.choice(len(pool), size, replace=False)]
        else:
            i = int(random.integers(len(terms)))
            terms[i] = self._mutated(random, terms[i])
        return self._law(terms)

    def _mutated(self, random: np.random.Generator, node: Node) -> Node:
        """The tree with one place of it changed: replaced, wrapped in an operation, or cut down to a child."""
        if node[0] in ("const", "var") or random.random() < 0.35:
            move = random.random()
            if move < 0.4:
                return self._tree(random, int(random.integers(1, 3)))
            if move < 0.7 and (functions := [f for f in self.grammar.functions if OPERATIONS[f][0] == 1]):
                return (str(random.choice(functions)), node)
            if move < 0.85:
                return (str(random.choice(["add", "sub", "mul", "div"])), node, self._tree(random, 1))
            return node if node[0] in ("const", "var") else node[1 + int(random.integers(len(node) - 1))]
        i = 1 + int(random.integers(len(node) - 1))
        return (*node[:i], self._mutated(random, node[i]), *node[i + 1 :])
