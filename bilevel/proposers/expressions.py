"""Expressions of a closed grammar: read from text, printed as mathematics, evaluated with finite values and gradients.

An expression is a tree of tuples, `("const", 2.0)`, `("var", "J")` or `(operation, tree, ...)`. Text becomes a tree
by a tokenizer and a recursive descent of this module's own: nothing of it is ever executed, evaluated, compiled or
imported, and what the grammar does not name is refused with a short sentence. `evaluate` is a walk over the tree with
JAX's operations; `bilevel.proposers.registers` runs the same operations as data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from bilevel._arguments import explained_class

__all__ = ["Expression", "Grammar", "GrammarError", "Parameter", "Refused", "finite"]

Node = tuple[Any, ...]

_TINY, _EXPONENT, _HUGE = 1e-6, 30.0, 1e15
_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<name>[A-Za-z][A-Za-z0-9_]*)"
    r"|(?P<mark>\*\*|[-+*/(),])"
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*")


class GrammarError(ValueError):
    """A text is not in the grammar; the message is one bounded sentence that says why, safe to show to anyone."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A proposal that could not be read: it is recorded as a failure with this reason, and never run.

    Attributes:
      reason: one bounded sentence.
    """

    reason: str


@explained_class
@dataclasses.dataclass(frozen=True)
class Parameter:
    """A number of an expression that the lower level fits, in the user's own units.

    Attributes:
      name: as it stands in the expression.
      start: where the fit begins.
      lower, upper: its bounds.
    """

    name: str
    start: float = 1.0
    lower: float = -math.inf
    upper: float = math.inf

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.name) > 24:
            raise GrammarError("a parameter's name is a letter followed by at most 23 letters, digits or single _")
        if not (math.isfinite(self.start) and self.lower <= self.start <= self.upper):
            raise GrammarError(f"parameter {self.name} needs a finite start within its bounds")


# ---------------------------------------------------------------- operations


def _safe(x: Any) -> Any:
    """x, kept away from zero without a change of sign."""
    return jnp.where(jnp.abs(x) > _TINY, x, jnp.where(x < 0, -_TINY, _TINY))


def _log(x: Any) -> Any:
    return jnp.log(jnp.abs(_safe(x)))


def _sqrt(x: Any) -> Any:
    inside = jnp.abs(x) > _TINY
    return jnp.where(inside, jnp.sqrt(jnp.where(inside, jnp.abs(x), 1.0)), 0.0)


def _exp(x: Any) -> Any:
    inside = jnp.abs(x) < _EXPONENT
    return jnp.exp(jnp.where(inside, x, _EXPONENT * jnp.sign(jax.lax.stop_gradient(x))))


# One table for the walk over a tree and for the register program: the same function, so the same bits.
OPERATIONS: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "div": (2, lambda a, b: a / _safe(b)),
    "neg": (1, lambda a, b: -a),
    "sq": (1, lambda a, b: a * a),
    "cube": (1, lambda a, b: a * a * a),
    "log": (1, lambda a, b: _log(a)),
    "exp": (1, lambda a, b: _exp(a)),
    "sqrt": (1, lambda a, b: _sqrt(a)),
    "abs": (1, lambda a, b: jnp.abs(a)),
    "max": (2, jnp.maximum),
    "min": (2, jnp.minimum),
}
_SIGNS = {"+": "add", "-": "sub", "*": "mul", "/": "div"}
_FUNCTIONS = ("log", "exp", "sqrt", "sq", "abs", "max", "min")


def _bounded(x: Any) -> Any:
    return jnp.clip(jnp.where(jnp.isfinite(x), x, 0.0), -_HUGE, _HUGE)


def finite(function: Callable[..., Any], aux: Any = None) -> Callable[..., Any]:
    """An elementwise function of fields, whose values and derivatives of every order are finite and at most 1e15.

    The protected operations are finite one by one; a chain of them may still overflow. So the value is bounded, and the
    derivative is stated: the partial derivatives, bounded in the same way, times the tangents.

    Args:
      function: `(*fields) -> field`, or `(aux, *fields) -> field` where `aux` is given.
      aux: arrays that it depends on and is not differentiated in. They may be traced, where a closure's may not.
    """
    with_aux = function if aux is not None else (lambda _, *fields: function(*fields))
    return functools.partial(_finite(with_aux), aux)


def _finite(function: Callable[..., Any]) -> Callable[..., Any]:
    @jax.custom_jvp
    def bounded(aux: Any, *fields: Any) -> Any:
        return _of_all(_bounded(function(aux, *fields)), fields)

    @functools.partial(bounded.defjvp, symbolic_zeros=True)
    def derivative(primals: Any, tangents: Any) -> Any:
        aux, *fields = primals
        change = jnp.zeros_like(fields[0])
        for i, tangent in enumerate(tangents[1:]):
            if not isinstance(tangent, SymbolicZero):
                change = change + _finite(_partial(function, i))(aux, *fields) * tangent
        return bounded(aux, *fields), _of_all(change, fields)

    return bounded


def _of_all(value: Any, fields: Sequence[Any]) -> Any:
    """The value, as something that depends on every field.

    Under `vmap` a value or a derivative that does not (of `log(b)` by a) would have no batch axis where its partner
    has one, which JAX does not expect of a `custom_jvp` inside a scan.
    """
    for field in fields:
        value = jnp.where(field == field, value, value)
    return value


def _partial(function: Callable[..., Any], i: int) -> Callable[..., Any]:
    def partial(aux: Any, *fields: Any) -> Any:
        along = lambda x: function(aux, *fields[:i], x, *fields[i + 1 :])  # noqa: E731
        return jax.jvp(along, (fields[i],), (jnp.ones_like(fields[i]),))[1]

    return partial


def walk(node: Node, values: Mapping[str, Any]) -> Any:
    """The value of a tree, operation by operation."""
    if node[0] == "const":
        return jnp.full_like(next(iter(values.values())), node[1])
    if node[0] == "var":
        return values[node[1]]
    children = [walk(child, values) for child in node[1:]]
    return OPERATIONS[node[0]][1](children[0], children[-1])


# ---------------------------------------------------------------- trees


def size(node: Node) -> int:
    """The number of nodes."""
    return 1 if node[0] in ("const", "var") else 1 + sum(map(size, node[1:]))


def depth(node: Node) -> int:
    """The number of nodes on the longest way down."""
    return 1 if node[0] in ("const", "var") else 1 + max(map(depth, node[1:]))


def names_in(node: Node) -> set[str]:
    """The variables and parameters of a tree."""
    if node[0] == "var":
        return {node[1]}
    return set() if node[0] == "const" else set().union(*map(names_in, node[1:]))


def is_positive(node: Node, positive: Collection[str]) -> bool:
    """Whether the value cannot be negative, where the names in `positive` are."""
    op = node[0]
    if op == "const":
        return bool(node[1] >= 0)
    if op == "var":
        return node[1] in positive
    if op in ("add", "mul", "div", "min"):
        return all(is_positive(child, positive) for child in node[1:])
    if op == "max":
        return any(is_positive(child, positive) for child in node[1:])
    return op in ("sq", "abs", "exp", "sqrt") or (op == "cube" and is_positive(node[1], positive))


def simplified(node: Node, positive: Collection[str] = ()) -> Node:
    """The tree with constants folded, neutral elements removed, and the arguments of symmetric operations in order.

    Of what is known to be positive, the absolute value is dropped.
    """
    if node[0] in ("const", "var"):
        return node
    op, children = node[0], [simplified(child, positive) for child in node[1:]]
    if op == "abs" and is_positive(children[0], positive):
        return children[0]
    if op == "mul" and children[0] == children[1]:
        op, children = "sq", children[:1]
    if op == "add" and children[0] == children[1]:
        op, children = "mul", [("const", 2.0), children[0]]
    if op in ("add", "mul", "max", "min"):
        children.sort(key=repr)
    if all(child[0] == "const" for child in children):
        with np.errstate(all="ignore"):
            # numpy's own numbers, in double precision; only what stays within the grammar's constants is folded
            value = _folded(op, [child[1] for child in children])
        if value is not None and math.isfinite(value) and abs(value) <= 1e6:
            return ("const", value)
    zero, one = ("const", 0.0), ("const", 1.0)
    if op == "add" and zero in children:
        return children[1] if children[0] == zero else children[0]
    if op == "sub" and children[1] == zero:
        return children[0]
    if op == "mul" and one in children:
        return children[1] if children[0] == one else children[0]
    if op == "div" and children[1] == one:
        return children[0]
    if op == "neg" and children[0][0] == "neg":
        return children[0][1]
    if op in ("max", "min") and children[0] == children[1]:
        return children[0]
    if op in ("sq", "abs") and children[0][0] in ("neg", "abs"):
        return (op, children[0][1])
    if (op, children[0][0]) in (("sqrt", "sq"), ("sq", "sqrt")):
        return simplified(("abs", children[0][1]), positive)
    return (op, *children)


def summands(node: Node) -> list[Node]:
    """What a sum, a difference, or the logarithm of a product is made of, without the signs; else the tree alone."""
    if node[0] in ("add", "sub"):
        return [part for child in node[1:] for part in summands(child)]
    if node[0] == "log" and node[1][0] in ("mul", "div"):
        return [part for child in node[1][1:] for part in summands(("log", child))]
    return [node]


def unscaled(node: Node, positive: Collection[str] = ()) -> Node:
    """The simplified tree without what a coefficient in front of it can say: signs, constant factors, log's powers."""
    node = simplified(node, positive)
    if node[0] in ("mul", "div", "sq", "cube", "abs", "sqrt"):
        # A factor of what is in there is a factor of the whole.
        node = simplified((node[0], *(unscaled(child, positive) for child in node[1:])), positive)
    op = node[0]
    if op == "neg":
        return unscaled(node[1], positive)
    if op in ("mul", "div") and node[2][0] == "const" and node[2][1] != 0:
        return unscaled(node[1], positive)
    if op == "mul" and node[1][0] == "const" and node[1][1] != 0:
        return unscaled(node[2], positive)
    if op == "div" and node[1][0] == "const" and node[1][1] not in (0, 1):
        return unscaled(("div", ("const", 1.0), node[2]), positive)
    if op == "log" and node[1][0] in ("sq", "cube", "sqrt", "abs"):
        return unscaled(("log", node[1][1]), positive)
    return node


def _folded(op: str, values: list[float]) -> float | None:
    a, b = values[0], values[-1]
    table: dict[str, Callable[[], float]] = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "div": lambda: a / b if abs(b) > _TINY else math.inf,
        "neg": lambda: -a,
        "sq": lambda: a * a,
        "cube": lambda: a * a * a,
    }
    return table[op]() if op in table else None


_INFIX = {"add": (" + ", 1), "sub": (" - ", 1), "mul": ("*", 2), "div": ("/", 2)}


def text(node: Node) -> str:
    """The tree as text that the grammar reads back."""
    return _text(node)[0]


def _text(node: Node) -> tuple[str, int]:
    if node[0] == "const":
        number = f"{node[1]:.17g}"
        return (number, 4) if node[1] >= 0 else (number, 3)
    if node[0] == "var":
        return node[1], 4
    if node[0] in _INFIX:
        sign, level = _INFIX[node[0]]
        parts = [_text(child) for child in node[1:]]
        left = parts[0][0] if parts[0][1] >= level else f"({parts[0][0]})"
        right = parts[1][0] if parts[1][1] > level else f"({parts[1][0]})"
        return f"{left}{sign}{right}", level
    if node[0] == "neg":
        inner, level = _text(node[1])
        return f"-{inner if level >= 4 else f'({inner})'}", 3
    if node[0] == "cube":
        inner, level = _text(node[1])
        return f"{inner if level >= 4 else f'({inner})'}**3", 3
    return f"{node[0]}({', '.join(_text(child)[0] for child in node[1:])})", 4


def latex(node: Node) -> str:
    """The tree as LaTeX."""
    return _latex(node)[0]


def _symbol(name: str) -> str:
    head, _, tail = name.replace("_", "").partition("\0")
    found = re.fullmatch(r"([A-Za-z]+)([0-9]+)", head)
    if found:
        return f"{_word(found[1])}_{{{found[2]}}}"
    return _word(head) + tail


def _word(word: str) -> str:
    greek = ("mu", "lambda", "nu", "kappa", "alpha", "beta", "gamma", "sigma", "epsilon")
    if word in greek:
        return f"\\{word}"
    return word if len(word) == 1 else f"\\mathrm{{{word}}}"


def _latex(node: Node) -> tuple[str, int]:
    if node[0] == "const":
        return _number(node[1]), 4 if node[1] >= 0 else 1
    if node[0] == "var":
        return _symbol(node[1]), 4
    op, parts = node[0], [_latex(child) for child in node[1:]]
    wrap = lambda part, level: part[0] if part[1] >= level else rf"\left({part[0]}\right)"  # noqa: E731
    if op == "add":
        return f"{parts[0][0]} + {wrap(parts[1], 1)}", 1
    if op == "sub":
        return f"{parts[0][0]} - {wrap(parts[1], 2)}", 1
    if op == "mul":
        return rf"{wrap(parts[0], 2)} \, {wrap(parts[1], 2)}", 2
    if op == "div":
        return rf"\frac{{{parts[0][0]}}}{{{parts[1][0]}}}", 3
    if op == "neg":
        return f"-{wrap(parts[0], 2)}", 1
    if op in ("sq", "cube"):
        return f"{wrap(parts[0], 4)}^{{{2 if op == 'sq' else 3}}}", 3
    if op == "sqrt":
        return rf"\sqrt{{\left|{parts[0][0]}\right|}}", 4
    if op == "abs":
        return rf"\left|{parts[0][0]}\right|", 4
    return rf"\{op}\left({', '.join(part[0] for part in parts)}\right)", 4


def _number(value: float) -> str:
    shown = f"{value:.6g}"
    mantissa, _, exponent = shown.partition("e")
    return rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else shown


# ---------------------------------------------------------------- expressions


@dataclasses.dataclass(frozen=True)
class Expression:
    """A law: `sum_i parameters[i] terms[i]` where it is additive, else its one term, with the parameters inside.

    Attributes:
      terms: trees.
      parameters: one per term where the law is additive; else those named in the term.
      additive: which of the two it is.
    """

    terms: tuple[Node, ...]
    parameters: tuple[Parameter, ...] = ()
    additive: bool = False

    def __post_init__(self) -> None:
        if self.additive and len(self.terms) != len(self.parameters):
            raise GrammarError("an additive law has one parameter per term")
        if not self.additive and len(self.terms) != 1:
            raise GrammarError("a law that is not additive has one term")

    @property
    def complexity(self) -> int:
        """The number of nodes of all terms, and of parameters."""
        return sum(map(size, self.terms)) + len(self.parameters)

    def evaluate(self, variables: Mapping[str, Any], parameters: Sequence[Any] | Any = ()) -> Any:
        """The value at fields of one shape, with the parameters in their order; finite, and so are its derivatives."""
        values = [jnp.asarray(variables[name]) for name in variables]
        shape, dtype = jnp.broadcast_shapes(*(v.shape for v in values)), jnp.result_type(float, *values)
        names = [*variables, *(p.name for p in self.parameters)]
        if len(names) - len(values) != len(parameters):
            raise ValueError(
                f"{len(parameters)} values were given for the {len(self.parameters)} parameters of {self}."
            )
        fields = [jnp.broadcast_to(jnp.asarray(v, dtype), shape) for v in (*values, *parameters)]
        if not self.additive:
            return finite(lambda *f: walk(self.terms[0], dict(zip(names, f, strict=True))))(*fields)
        count = len(values)
        of_terms = [
            finite(lambda *f, term=term: walk(term, dict(zip(variables, f, strict=True))))(*fields[:count])
            for term in self.terms
        ]
        return sum((p * value for p, value in zip(fields[count:], of_terms, strict=True)), jnp.zeros(shape, dtype))

    def _numbers(self, values: Any) -> list[float]:
        """The parameters' values by name, or from any other tree of numbers; more of them belong to empty terms."""
        if isinstance(values, Mapping) and {p.name for p in self.parameters} <= values.keys():
            values = [values[p.name] for p in self.parameters]
        return [float(v) for leaf in jax.tree.leaves(values) for v in np.ravel(leaf)][: len(self.parameters)]

    def text(self, values: Sequence[float] | Any = (), digits: int = 6) -> str:
        """One line of mathematics; with the parameters' values in place of their names where they are given."""
        shown = [f"{v:.{digits}g}" for v in self._numbers(values)] or [p.name for p in self.parameters]
        if self.additive:
            parts = (
                f"{p}*{_text(t)[0] if _text(t)[1] > 2 else f'({_text(t)[0]})'}"
                for p, t in zip(shown, self.terms, strict=True)
            )
            return " + ".join(parts).replace("+ -", "- ") or "0"
        where = (
            ", ".join(f"{p.name} = {v}" for p, v in zip(self.parameters, shown, strict=True))
            if len(shown) and jax.tree.leaves(values)
            else ""
        )
        return text(self.terms[0]) + (f"  [{where}]" if where else "")

    def latex(self, values: Sequence[float] | Any = ()) -> str:
        """The same as LaTeX."""
        if not self.additive:
            return latex(self.terms[0])
        shown = [_number(v) for v in self._numbers(values)] or [_symbol(p.name) for p in self.parameters]
        bracketed = lambda t, level: t if level > 1 else rf"\left({t}\right)"  # noqa: E731
        parts = [rf"{p} \, {bracketed(*_latex(t))}" for p, t in zip(shown, self.terms, strict=True)]
        return " + ".join(parts).replace("+ -", "- ") or "0"

    def __str__(self) -> str:
        return self.text()

    def to_json(self) -> dict[str, Any]:
        """What `Grammar.from_json` reads: texts and numbers."""
        bound = lambda v: v if math.isfinite(v) else None  # noqa: E731
        return {
            "terms": [text(term) for term in self.terms],
            "params": [
                {"name": p.name, "init": p.start, "lower": bound(p.lower), "upper": bound(p.upper)}
                for p in self.parameters
            ],
            "additive": self.additive,
        }


def additive(terms: Sequence[Node]) -> Expression:
    """The sum of parameter-free terms with a coefficient each."""
    return Expression(tuple(terms), tuple(Parameter(f"p{i}") for i in range(len(terms))), additive=True)


# ---------------------------------------------------------------- the grammar


@explained_class
@dataclasses.dataclass(frozen=True)
class Grammar:
    """What a law may be made of, and how large it may be.

    Attributes:
      variables: the names that a law is a function of.
      functions: of `log`, `exp`, `sqrt`, `sq`, `abs`, `max`, `min`; operators are + - * / and the powers **2 and **3.
      positive: which of the variables cannot be negative: laws that differ by an absolute value of them are one law.
      parameters: how many of its own an expression may name.
      characters, nodes, depth: the largest text and tree.
      constant: the largest absolute value of a number.

    Operations are protected: log(x) is log|x| and division keeps its sign, both 1e-6 away from zero, sqrt is of |x|,
    exp is constant beyond 30.
    """

    variables: tuple[str, ...]
    functions: tuple[str, ...] = _FUNCTIONS
    positive: tuple[str, ...] = ()
    parameters: int = 6
    characters: int = 400
    nodes: int = 48
    depth: int = 12
    constant: float = 1e6

    def __post_init__(self) -> None:
        for field in ("variables", "functions", "positive"):
            if isinstance(value := getattr(self, field), str) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"Grammar({field}={value!r}): a tuple of names is needed, such as ('I1', 'J').")
            object.__setattr__(self, field, tuple(value))
        if unknown := set(self.functions) - set(_FUNCTIONS):
            raise ValueError(f"Grammar(functions=...): {sorted(unknown)} is none of {', '.join(_FUNCTIONS)}.")
        if unknown := set(self.positive) - set(self.variables):
            raise ValueError(f"Grammar(positive=...): {sorted(unknown)} is none of {', '.join(self.variables)}.")
        for name in self.variables:
            if not _NAME.fullmatch(name) or name in _FUNCTIONS or len(name) > 24:
                raise ValueError(f"Grammar(variables=...): {name!r} is no name that a law can use.")
        if not self.variables or len(set(self.variables)) != len(self.variables):
            raise ValueError(f"Grammar(variables={self.variables!r}): at least one name is needed, each once.")

    def parse(self, source: Any, parameters: Sequence[Parameter] = ()) -> Node:
        """The tree of a text; nothing in it is executed.

        Raises:
          GrammarError: in one short sentence, which quotes at most a name or a sign of the text.
        """
        if not isinstance(source, str):
            raise GrammarError("an expression is a text")
        if len(source) > self.characters:
            raise GrammarError(f"the text has {len(source)} characters; at most {self.characters} are allowed")
        if not source.isascii():
            raise GrammarError("only ASCII characters are allowed")
        reader = _Reader(self, source, {p.name for p in parameters})
        node = reader.sum(0)
        if reader.mark is not None:
            raise GrammarError(f"{_quoted(reader.mark[1])} is not expected after a complete expression")
        self.check(node)
        return node

    def check(self, node: Node) -> Node:
        """The tree, where it is within the limits."""
        if size(node) > self.nodes:
            raise GrammarError(f"the expression has {size(node)} nodes; at most {self.nodes} are allowed")
        if depth(node) > self.depth:
            raise GrammarError(f"the expression is {depth(node)} deep; at most {self.depth} is allowed")
        return node

    def expression(self, source: str, parameters: Sequence[Parameter] = ()) -> Expression:
        """A law from one text, with the parameters that stand in it."""
        self._check_parameters(parameters)
        node = self.parse(source, parameters)
        used = names_in(node)
        return Expression((node,), tuple(p for p in parameters if p.name in used))

    def additive(self, terms: Sequence[str]) -> Expression:
        """The law `sum_i p_i term_i` from texts without parameters."""
        if not 0 < len(terms) <= max(self.parameters, 1):
            raise GrammarError(f"between 1 and {self.parameters} terms are allowed, not {len(terms)}")
        return additive([self.parse(term) for term in terms])

    def _check_parameters(self, parameters: Sequence[Parameter]) -> None:
        names = [p.name for p in parameters]
        if len(names) > self.parameters:
            raise GrammarError(f"{len(names)} parameters were named; at most {self.parameters} are allowed")
        if len(set(names)) < len(names) or set(names) & {*self.variables, *_FUNCTIONS}:
            raise GrammarError("a parameter's name may not be that of a variable, a function or another parameter")

    def from_json(self, answer: Any) -> Expression:
        """A law from `{"terms": [...], "params": [{"name", "init", "lower", "upper"}, ...]}`, treated as data.

        Terms with parameters in them are summed; without any parameter they are an additive law.

        Raises:
          GrammarError: where it is anything else.
        """
        if not isinstance(answer, dict):
            raise GrammarError("the answer is not a JSON object")
        terms, given = answer.get("terms"), answer.get("params") or []
        if not isinstance(terms, list) or not 0 < len(terms) <= 12 or not all(isinstance(t, str) for t in terms):
            raise GrammarError('"terms" has to be a list of 1 to 12 texts')
        if not isinstance(given, list) or not all(isinstance(p, dict) for p in given):
            raise GrammarError('"params" has to be a list of objects')
        if answer.get("additive") is True or not given:
            return self.additive(terms)
        parameters = [self._parameter(p) for p in given]
        self._check_parameters(parameters)
        nodes = [self.parse(term, parameters) for term in terms]
        node = functools.reduce(lambda a, b: ("add", a, b), nodes)
        used = names_in(self.check(node))
        return Expression((node,), tuple(p for p in parameters if p.name in used))

    def _parameter(self, given: dict[str, Any]) -> Parameter:
        def number(name: str, default: float) -> float:
            value = given.get(name)
            if value is None:
                return default
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e12:
                raise GrammarError(f'"{name}" of a parameter has to be a number of at most 1e12')
            return float(value)

        if not isinstance(name := given.get("name"), str):
            raise GrammarError('"name" of a parameter has to be a text')
        return Parameter(name, number("init", 1.0), number("lower", -math.inf), number("upper", math.inf))


def _quoted(piece: str) -> str:
    """A name or a sign of the text, short."""
    return repr(piece if len(piece) <= 24 else piece[:24] + "...")


class _Reader:
    """Recursive descent over the tokens of a text."""

    def __init__(self, grammar: Grammar, source: str, parameters: set[str]) -> None:
        self.grammar, self.names = grammar, {*grammar.variables, *parameters}
        self.tokens = self._tokens(source)
        self.mark: tuple[str, str] | None = None
        self.advance()

    def _tokens(self, source: str) -> Any:
        at = 0
        while at < len(source):
            if source[at] in " \t\n":
                at += 1
                continue
            found = _TOKEN.match(source, at)
            if found is None:
                raise GrammarError(f"the character {source[at]!r} is not allowed")
            at = found.end()
            yield str(found.lastgroup), found[0]

    def advance(self) -> None:
        self.mark = next(self.tokens, None)

    def taken(self, *signs: str) -> str | None:
        """The next token where it is one of these signs, which is then behind us."""
        if self.mark is not None and self.mark[0] == "mark" and self.mark[1] in signs:
            sign = self.mark[1]
            self.advance()
            return sign
        return None

    def expect(self, sign: str) -> None:
        if self.taken(sign) is None:
            raise GrammarError(f"{sign!r} is expected" + (f" before {_quoted(self.mark[1])}" if self.mark else ""))

    def down(self, level: int) -> int:
        # Brackets deepen the recursion without a node; the limit is for the reader's own stack.
        if level > 4 * self.grammar.depth:
            raise GrammarError("brackets or signs are nested too deep")
        return level + 1

    def sum(self, level: int) -> Node:
        node = self.product(self.down(level))
        while sign := self.taken("+", "-"):
            node = (_SIGNS[sign], node, self.product(level + 1))
        return node

    def product(self, level: int) -> Node:
        node = self.signed(level)
        while sign := self.taken("*", "/"):
            node = (_SIGNS[sign], node, self.signed(level))
        return node

    def signed(self, level: int) -> Node:
        if self.taken("-"):
            node = self.signed(self.down(level))
            return ("const", -node[1]) if node[0] == "const" else ("neg", node)
        node = self.atom(level)
        if self.taken("**"):
            if self.mark is None or self.mark[1] not in ("2", "3"):
                raise GrammarError("a power is a literal 2 or 3")
            node = ("sq" if self.mark[1] == "2" else "cube", node)
            self.advance()
            if self.mark is not None and self.mark[1] == "**":
                raise GrammarError("a power of a power needs brackets")
        return node

    def atom(self, level: int) -> Node:
        if self.mark is None:
            raise GrammarError("the expression ends too early")
        kind, piece = self.mark
        self.advance()
        if kind == "number":
            value = float(piece)
            if not abs(value) <= self.grammar.constant:
                raise GrammarError(f"a number is at most {self.grammar.constant:g} in size")
            return ("const", value)
        if kind == "mark":
            if piece != "(":
                raise GrammarError(f"{piece!r} is not expected here")
            node = self.sum(level)
            self.expect(")")
            return node
        if piece in self.names:
            return ("var", piece)
        if piece not in self.grammar.functions:
            raise GrammarError(f"the name {_quoted(piece)} is not in the grammar")
        self.expect("(")
        children = [self.sum(level) for _ in range(1)]
        for _ in range(OPERATIONS[piece][0] - 1):
            self.expect(",")
            children.append(self.sum(level))
        self.expect(")")
        return (piece, *children)
