"""Step rules as arguments of compiled code: the numbers within a solver's optax rules, taken out of them.

`optax.adam(0.1)` holds its rate in a closure, and a programme compiled with it is that rate's own. What a problem's
losses capture is taken apart (`bilevel.captures`); a rule is more delicate, since it may compute with its numbers
before they meet an array: 1 - 0.999 is done in Python's double precision, and in single precision has an error of 5e-5.
So a number is an argument where a trial shows that nothing but its being a number was used: the rule traced with it as
an argument does the same operations, on states of the same types, as traced with its value, and what it computes of
numbers alone (0 - 0.1 in a schedule) is the same but for one rounding. All other numbers, and those that it branches
on, stay part of the programme.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal

from bilevel._roots import with_roots
from bilevel._traces import equations
from bilevel.captures import Captured, Divided
from bilevel.optimizers import as_optimizer, is_rule
from bilevel.typing import PyTree

__all__ = ["joined", "parted", "stiff_at_rest"]

# What a number may go through on its way to an array: exact, or the rounding that a number in Python is given there.
_MOVES: dict[str, Callable[..., Any]] = {
    "convert_element_type": lambda a: a, "broadcast_in_dim": lambda a: a, "copy": lambda a: a, "neg": np.negative,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum,
}  # fmt: skip
_CALLS = frozenset({"pjit", "jit", "reshape", "squeeze"})  # not counted: what is in them is
_DEEP = 20  # parts within parts, that rules are looked for in
_TRIALS = 40  # of one rule, for which of its numbers can be arguments; numbers that are left then stay as they are


@dataclasses.dataclass(frozen=True)
class _Hole:
    """Where a rule was."""

    place: int


def parted(solver: Any, variables: tuple[PyTree, PyTree] | None) -> tuple[Any, list[Captured]]:
    """A solver without those of its rules whose numbers can be arguments, and these, as pytrees of their numbers.

    Args:
      solver: a solver of either kind; rules are looked for in its fields, and in those of its parts.
      variables: x and y, or their shapes, which the rules move; None: the solver as it is.
    """
    rules: list[Captured] = []

    def taken(rule: Any, path: str) -> Any:
        assert variables is not None
        known = _divided(rule, variables if "upper" in path else variables[::-1])
        if known is None:
            return rule
        rules.append(known)
        return _Hole(len(rules) - 1)

    return (solver if variables is None else _mapped(solver, is_rule, taken)), rules


def joined(solver: Any, rules: list[Captured]) -> Any:
    """The solver of `parted`."""
    if not rules:
        return solver
    return _mapped(solver, lambda part: isinstance(part, _Hole), lambda hole, _: rules[hole.place].built)


def _mapped(part: Any, wanted: Callable[[Any], bool], change: Callable[[Any, str], Any], path: str = "") -> Any:
    """A solver with its wanted parts changed; one without any is itself."""
    if wanted(part):
        return change(part, path)
    inside = dict(_inside(part)) if path.count(".") < _DEEP else {}
    new = {name: _mapped(value, wanted, change, f"{path}.{name}") for name, value in inside.items()}
    if all(new[name] is value for name, value in inside.items()):
        return part
    if isinstance(part, dict):
        return type(part)(new)
    if isinstance(part, (tuple, list)):
        return type(part)(*new.values()) if hasattr(part, "_fields") else type(part)(new.values())
    made = copy.copy(part)
    for name, value in new.items():
        object.__setattr__(made, name, value)  # past the checks of a constructor, as where JAX makes one again
    return made


def _inside(part: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of a solver's part: a container's, or a dataclass's that is its fields and no more."""
    if type(part) is dict:
        yield from part.items()
    elif type(part) in (tuple, list) or (isinstance(part, tuple) and hasattr(part, "_fields")):
        yield from enumerate(part)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part) if hasattr(part, field.name)]
        if set(getattr(part, "__dict__", {})) <= {*names, "_name", "_dynamic"}:  # not what was made of a rule
            yield from ((name, getattr(part, name)) for name in names)


# ---------------------------------------------------------------- which numbers can be arguments


def _divided(rule: Any, variables: tuple[PyTree, PyTree]) -> Captured | None:
    """The rule with all numbers as leaves that can be; None where there are none."""
    whole = Divided(rule)
    if not whole.places:
        return None
    shapes = tuple(jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), v) for v in variables)
    leaves, treedef = jax.tree.flatten(shapes)
    like = treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves), jax.config.read("jax_enable_x64")
    known = _known(whole.only(whole.places).kind, like)
    for places, kinds in known.items():  # of rules that are alike but for their numbers
        found = whole.only(places)
        if found.kind in kinds and not any(sums.differing(found) for sums in kinds[found.kind]):
            return found if places else None
    places, sums, differing = _arguments(whole, shapes)
    found = whole.only(places)
    if differing.isdisjoint(places):  # else another number in those places might have let more of them be arguments
        known.setdefault(places, {})[found.kind] = sums
    return found if places else None


@functools.lru_cache(maxsize=64)
def _known(kind: Hashable, like: Hashable) -> dict[tuple[int, ...], dict[Hashable, tuple[_Sums, ...]]]:
    """Which numbers were found to be arguments, with which others as a part of the programme, and what is computed of
    them alone: of rules that are of this form where all of them are arguments."""
    return {}


def _arguments(
    whole: Divided, variables: tuple[PyTree, ...]
) -> tuple[tuple[int, ...], tuple[_Sums, ...], frozenset[int]]:
    """The places of numbers that can be arguments, what is computed of them alone, and which could not be or not all
    together, for a difference that another number might not have made.

    By trials: on one small leaf as far as the rule moves one, and once more on the variable itself.
    """
    plain, differing = whole.only(()), set[int]()
    moved = next((v for v in variables if jax.tree.leaves(v) and _traces(plain, v) is not None), None)
    if moved is not None:
        small = jax.ShapeDtypeStruct((2,), jnp.result_type(*jax.tree.leaves(moved)))
        for variable in (small, moved):
            found = _found(whole, variable, differing)
            sums = _worked(whole, found, moved, _traces(plain, moved), differing) if found else None
            if sums is not None:
                return found, sums, frozenset(differing)
    return (), (), frozenset(differing)


def _found(whole: Divided, variable: PyTree, differing: set[int]) -> tuple[int, ...]:
    """Those that can be when the rule moves this variable."""
    plain, count = _traces(whole.only(()), variable), itertools.count()

    def works(places: tuple[int, ...]) -> bool:
        return next(count) < _TRIALS and _worked(whole, places, variable, plain, differing) is not None

    return () if plain is None else _most(whole.places, (), works)


def _worked(
    whole: Divided, places: tuple[int, ...], variable: PyTree, plain: Any, differing: set[int]
) -> tuple[_Sums, ...] | None:
    """What the rule computes of these numbers alone; None where they cannot be arguments."""
    rule = whole.only(places)
    if plain is None or (traces := _traces(rule, variable)) is None:
        return None
    found = [mine.like(other) for mine, other in zip(traces, plain, strict=True)]
    sums = tuple(one for one in found if one is not None)
    apart = frozenset[int]().union(*(one.differing(rule) for one in sums))
    differing |= apart
    return sums if len(sums) == len(found) and not apart else None


def _most(places: tuple[int, ...], kept: tuple[int, ...], works: Callable[[tuple[int, ...]], bool]) -> tuple[int, ...]:
    """Those of the places that work together with those kept, which are included; halves of what does not are tried."""
    together = tuple(sorted((*kept, *places)))
    if works(together):
        return together
    if len(places) == 1:
        return kept
    half = len(places) // 2
    return _most(places[half:], _most(places[:half], kept, works), works)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """What a rule computes of its numbers alone: equations of scalars, and the variables that the numbers are."""

    equations: tuple[Any, ...]
    numbers: tuple[Any, ...]

    @classmethod
    def of(cls, jaxpr: Any, count: int) -> _Sums:
        """Those of a trace whose first arguments are the numbers."""
        known, found = set(jaxpr.invars[:count]), []
        for equation in jaxpr.eqns:
            given = [v for v in equation.invars if not isinstance(v, Literal)]
            scalar = all(v.aval.shape == () for v in (*equation.invars, *equation.outvars))
            if scalar and given and known.issuperset(given) and equation.primitive.name in _MOVES | _ARITHMETIC:
                known.update(equation.outvars)
                found.append(equation)
        return cls(tuple(found), tuple(jaxpr.invars[:count]))

    def differing(self, rule: Captured) -> frozenset[int]:
        """The places of numbers of which something is computed that is not, in the run's precision and but for one
        rounding, what Python makes of them."""
        exact = dict(zip(self.numbers, jax.tree.leaves(rule), strict=True))
        short = {v: np.asarray(value).astype(v.aval.dtype) for v, value in exact.items()}
        made_of = {v: frozenset({place}) for v, place in zip(self.numbers, rule.places, strict=True)}
        found: frozenset[int] = frozenset()
        for equation in self.equations:
            name, (out,) = equation.primitive.name, equation.outvars
            for values in (exact, short):
                given = (v.val if isinstance(v, Literal) else values[v] for v in equation.invars)
                with np.errstate(all="ignore"):
                    values[out] = (_MOVES | _ARITHMETIC)[name](*map(np.asarray, given))
            short[out] = short[out].astype(out.aval.dtype)
            made_of[out] = frozenset().union(*(made_of[v] for v in equation.invars if not isinstance(v, Literal)))
            if name in _ARITHMETIC and jnp.issubdtype(out.aval.dtype, jnp.floating):
                wanted, eps = np.asarray(exact[out], np.float64), float(jnp.finfo(out.aval.dtype).eps)
                if not abs(np.float64(short[out]) - wanted) <= eps * abs(wanted):
                    found |= made_of[out]
        return found


@dataclasses.dataclass(frozen=True)
class _Trace:
    """What a part of a rule did when it was traced.

    Attributes:
      done: the operations, and the numbers that stand in them: how often which.
      rest: likewise without the operations of the rule's numbers alone, `sums`.
      types: of what it returned.
    """

    done: Counter[Any]
    rest: Counter[Any]
    sums: _Sums
    types: tuple[Any, ...]

    @classmethod
    def of(cls, fn: Callable[..., Any], rule: Captured, *args: Any) -> tuple[_Trace, Any]:
        """The trace of `fn(rule, *args)`, and the shapes of what it returns."""
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(rule, *args)
        sums = _Sums.of(closed.jaxpr, len(jax.tree.leaves(rule)))
        alone = {id(equation) for equation in sums.equations}
        done, rest = Counter[Any](), Counter[Any]()
        for equation in equations(closed.jaxpr):
            if (name := equation.primitive.name) in _MOVES or name in _CALLS:
                continue
            numbers: Any = (v for v in equation.invars if isinstance(v, Literal))
            found = [name, *(float(v.val) for v in numbers if jnp.issubdtype(v.aval.dtype, jnp.floating))]
            done.update(found)
            rest.update([] if id(equation) in alone else found)
        return cls(done, rest, sums, (jax.tree.structure(shapes), *closed.out_avals)), shapes

    def like(self, plain: _Trace) -> _Sums | None:
        """What is computed of numbers alone, where this is the plain rule's trace but for that and for numbers that are
        arguments here; None where it is another."""
        if self.types != plain.types:
            return None
        for mine, sums in ((self.done, _Sums((), self.sums.numbers)), (self.rest, self.sums)):
            names = lambda count: {k: n for k, n in count.items() if isinstance(k, str)}  # noqa: E731
            if names(mine) == names(plain.done) and mine <= plain.done:
                return sums
        return None


def _traces(rule: Captured, variable: PyTree) -> tuple[_Trace, _Trace] | None:
    """Those of the rule's first state and of an update; None where it cannot be traced."""

    def update(mine: Captured, memory: PyTree, variable: PyTree, gradient: PyTree, value: Any) -> Any:
        total = lambda at: sum((jnp.sum(a) for a in jax.tree.leaves(at)), jnp.zeros((), value.dtype))  # noqa: E731
        extra = {"value": value, "grad": gradient, "value_fn": total}
        updates, later = as_optimizer(mine.built).update(gradient, memory, variable, **extra)
        return updates, later, optax.apply_updates(variable, updates)

    value = jax.ShapeDtypeStruct((), jnp.result_type(*jax.tree.leaves(variable)))
    try:
        first, memory = _Trace.of(lambda mine, variable: mine.built.init(variable), rule, variable)
        return first, _Trace.of(update, rule, memory, variable, variable, value)[0]
    except Exception:  # whatever a rule says to a traced number, or to this variable
        return None


# ---------------------------------------------------------------- at a gradient of zero


def stiff_at_rest(rule: Any, variable: PyTree, memory: PyTree = None) -> bool:
    """Whether a rule's update grows a thousand times faster at a gradient of zero than its size elsewhere.

    The update is its first, or the one after steps which have left this `memory`.

    Adam and its relatives divide by a root of a mean square and a tiny eps, which at an optimum is all there is: the
    derivative of their steps is 1 / eps there, and says nothing about the lower solution. Not so where the mean square
    still holds larger gradients.
    """
    if not is_rule(rule):
        return False
    if memory is None:  # one number for each leaf will do, and costs nothing
        variable = jax.tree.map(lambda leaf: jnp.ones((1,) * jnp.ndim(leaf), jnp.result_type(leaf)), variable)
    ones = optax.tree.ones_like(variable)
    full = as_optimizer(rule)
    update = lambda gradient, memory: full.update(gradient, memory, ones)  # noqa: E731
    try:
        names = {equation.primitive.name for equation in equations(jax.make_jaxpr(update)(ones, full.init(ones)).jaxpr)}
        if "div" not in names and not names & {"rsqrt", "pow"}:
            return False
        parts = _divided(rule, (ones, ones)) or Divided(rule).only(())
        at_rest, elsewhere = map(float, _sizes(parts, variable, memory))
    except Exception:  # a rule that wants more than a gradient, or withdraws steps: not differentiated anyway
        return False
    return at_rest > 1e3 * elsewhere


@jax.jit
def _sizes(rule: Captured, variable: PyTree, memory: PyTree) -> tuple[jax.Array, jax.Array]:
    """Of a rule's slope after some steps at rest (RAdam begins with plain ones), and of its updates elsewhere."""
    full, ones = as_optimizer(rule.built), optax.tree.ones_like(variable)
    zero = optax.tree.zeros_like(ones)

    def update(gradient: PyTree, memory: PyTree) -> PyTree:
        return full.update(gradient, memory, variable)

    like = lambda new, old: jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), new, old)  # noqa: E731
    rest = lambda _, memory: like(update(zero, memory)[1], memory)  # noqa: E731
    left = full.init(variable) if memory is None else memory
    rested = jax.lax.fori_loop(0, 8, rest, jax.tree.map(jnp.asarray, left))
    slope = jax.jvp(lambda g: with_roots(update)(g, rested)[0], (zero,), (ones,))[1]
    norm = lambda tree: optax.tree.norm(jax.tree.map(jnp.nan_to_num, tree))  # noqa: E731
    first, later = norm(update(ones, full.init(variable))[0]), norm(update(ones, rested)[0])
    return norm(slope), jnp.where(first > 0, first, later)  # a warm-up begins with a step of zero
