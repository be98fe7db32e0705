"""What a trace says of curvature: convex, concave or affine in some of its arguments, by the rules of composition.

The rules are those of disciplined convex programming (Grant, Boyd and Ye, "Disciplined Convex Programming", 2006): what
they call convex is convex, and what they do not may be convex all the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from bilevel._traces import equations

__all__ = ["CONSTANT", "VARIABLE", "Kind", "constant", "kinds"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a value, of all its entries alike.

    Attributes:
      convex, concave: in the arguments that vary; both: affine.
      nonnegative, nonpositive: wherever it has a value.
      fixed: whether it depends on no argument that varies.
      squares: whether it is a sum of squares of affine functions and of nonnegative numbers: its root is a norm.
    """

    convex: bool = False
    concave: bool = False
    nonnegative: bool = False
    nonpositive: bool = False
    fixed: bool = False
    squares: bool = False

    @property
    def affine(self) -> bool:
        """Whether it is both."""
        return self.convex and self.concave

    def __neg__(self) -> Kind:
        return Kind(self.concave, self.convex, self.nonpositive, self.nonnegative, self.fixed)

    def __add__(self, other: Kind) -> Kind:
        summed = _joined([self, other])
        squared = (self.squares or self._root) and (other.squares or other._root)
        return dataclasses.replace(summed, squares=squared)

    def __mul__(self, other: Kind) -> Kind:
        up = (self.nonnegative and other.nonnegative) or (self.nonpositive and other.nonpositive)
        down = (self.nonnegative and other.nonpositive) or (self.nonpositive and other.nonnegative)
        factor, part = (self, other) if self.fixed else (other, self)
        if not factor.fixed:
            return Kind(nonnegative=up, nonpositive=down)
        if factor.nonnegative:
            part = dataclasses.replace(part, squares=part.squares or part._root)
            return dataclasses.replace(part, nonnegative=up, nonpositive=down, fixed=part.fixed)
        if factor.nonpositive:
            return dataclasses.replace(-part, nonnegative=up, nonpositive=down)
        return Kind(part.affine, part.affine, up, down, part.fixed)

    @property
    def _root(self) -> bool:
        return self.fixed and self.nonnegative


CONSTANT, VARIABLE = Kind(True, True, fixed=True), Kind(True, True)
"""Of arguments: one that is given, and one that the curvature is asked by."""


def constant(value: Any) -> Kind:
    """The kind of a number, an array or a key that is known."""
    if _is_key(value):
        return CONSTANT
    value = np.asarray(value)
    if value.dtype == bool or not np.issubdtype(value.dtype, np.number):
        return CONSTANT
    return dataclasses.replace(CONSTANT, nonnegative=bool((value >= 0).all()), nonpositive=bool((value <= 0).all()))


def kinds(jaxpr: Any, consts: Sequence[Any], given: Sequence[Kind]) -> list[Kind]:
    """Of a trace's outputs, where its arguments are of the kinds `given`."""
    numbers: dict[Any, int] = {}
    arguments = [_Known(kind, number=_numbered(numbers, object())) for kind in given]
    return [known.kind for known in _walked(jaxpr, consts, arguments, numbers)]


class _Known(NamedTuple):
    """A kind, the value itself where it is a number of the trace's own, and the number of what computes it: one for all
    equations that are the same."""

    kind: Kind
    value: np.ndarray | None = None
    number: int | None = None
    shift: _Shift | None = None


class _Shift(NamedTuple):
    """A value that holds an unknown number s, as JAX's logarithms of sums of exponentials do on their way: the largest
    exponent is taken from all, and added again in the end.

    Attributes:
      number: of what computes s.
      axes: of the value, the axes along which s varies, in the order of its own.
      sign: the value is base + sign s, or a sum of exp(base + sign s) with convex bases.
      sums: which of the two.
      base: what is known of it.
    """

    number: int
    axes: tuple[int, ...]
    sign: int
    sums: bool
    base: Kind


def _of(value: Any) -> _Known:
    if isinstance(value, _Known):
        return value
    return _Known(constant(value), None if _is_key(value) else np.asarray(value))


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _numbered(numbers: dict[Any, int], key: Any) -> int:
    return numbers.setdefault(key, len(numbers))


def _walked(jaxpr: Any, consts: Sequence[Any], given: Sequence[_Known], numbers: dict[Any, int]) -> list[_Known]:
    known = dict(zip((*jaxpr.invars, *jaxpr.constvars), (*given, *map(_of, consts)), strict=True))
    read = lambda atom: _of(atom.val) if isinstance(atom, Literal) else known.get(atom, _Known(Kind()))  # noqa: E731
    for equation in jaxpr.eqns:
        of = [read(atom) for atom in equation.invars]
        inside = _inside(equation, of, numbers)
        found = _outside(equation, of, numbers) if inside is None else inside
        if all(part.kind.fixed for part in of):
            fixed = {"convex": True, "concave": True, "fixed": True}
            found = [part._replace(kind=dataclasses.replace(part.kind, **fixed)) for part in found]
        known.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outside(equation: Any, of: list[_Known], numbers: dict[Any, int]) -> list[_Known]:
    """Of an equation that calls nothing."""
    name, values = equation.primitive.name, [part.value for part in of]
    if name in _IN_NUMPY and not any(value is None for value in values):
        with np.errstate(all="ignore"):
            return [_of(_IN_NUMPY[name](*values))]
    arrays = [(str(part.value.dtype), part.value.shape, part.value.tobytes()) for part in of if part.value is not None]
    numbered = tuple(part.number for part in of)
    known = all(part.value is not None or part.number is not None for part in of)
    key: tuple[Any, ...] = (name, str(equation.params), numbered, tuple(arrays)) if known else (object(),)
    if any(part.shift for part in of) and (held := _shifted(equation, of)) is not None:
        return [held]
    same = len(of) == 2 and numbered[0] is not None and numbered[0] == numbered[1]
    kind = _rule(equation, [part.kind for part in of], same)
    found = [_Known(kind, number=_numbered(numbers, (*key, i))) for i in range(len(equation.outvars))]
    if name == "stop_gradient":
        axes = tuple(axis for axis, size in enumerate(equation.outvars[0].aval.shape) if size > 1)
        return [part._replace(shift=_Shift(part.number or 0, axes, 1, False, constant(0))) for part in found]
    return found


def _shifted(equation: Any, of: list[_Known]) -> _Known | None:
    """Of an equation with an s in its arguments, where the form is kept or s cancels; else None."""
    name, params, shift = equation.primitive.name, equation.params, of[0].shift
    if name in ("add", "add_any", "sub"):
        first, second = of
        sign = -1 if name == "sub" else 1
        one, other = (part.shift or _Shift(-1, (), 0, False, part.kind) for part in of)
        if one.sums or other.sums:
            return None
        total = one.sign + sign * other.sign
        base = one.base + (-other.base if sign < 0 else other.base)
        if first.shift and second.shift:
            return _Known(base) if one[:2] == other[:2] and total == 0 else None
        held = one if first.shift else other
        return _Known(Kind(), shift=_Shift(held.number, held.axes, total, False, base))
    if shift is None:
        return None
    if name == "neg" and not shift.sums:
        return _Known(Kind(), shift=shift._replace(sign=-shift.sign, base=-shift.base))
    if name == "exp" and not shift.sums and shift.base.convex:
        return _Known(Kind(nonnegative=True), shift=shift._replace(sums=True, base=Kind(convex=True)))
    if name == "abs" and shift.sums:
        return of[0]
    if name == "log" and shift.sums:
        return _Known(Kind(), shift=shift._replace(sums=False))
    if name == "broadcast_in_dim":
        axes = tuple(params["broadcast_dimensions"][axis] for axis in shift.axes)
        return _Known(of[0].kind, shift=shift._replace(axes=axes))
    gone = params.get("dimensions" if name == "squeeze" else "axes", ())
    if (name == "squeeze" or (name == "reduce_sum" and shift.sums)) and not set(gone) & set(shift.axes):
        axes = tuple(axis - sum(other < axis for other in gone) for axis in shift.axes)
        return _Known(of[0].kind, shift=shift._replace(axes=axes))
    return None


# Numbers of a trace's own that are computed on the way, for their sign: 1 - labels.
_IN_NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs, "add": np.add, "copy": np.asarray, "div": np.true_divide, "exp": np.exp, "max": np.maximum,
    "min": np.minimum, "mul": np.multiply, "neg": np.negative, "sqrt": np.sqrt, "square": np.square, "sub": np.subtract,
}  # fmt: skip


def _inside(equation: Any, of: list[_Known], numbers: dict[Any, int]) -> list[_Known] | None:
    """Of a called function, by its own trace; None where the equation calls none that is looked into."""
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit"):
        return _walked(params["jaxpr"].jaxpr, params["jaxpr"].consts, of, numbers)
    if name in ("checkpoint", "remat2"):
        return _walked(params["jaxpr"], [], of, numbers)
    if name == "custom_jvp_call":
        rule = next((rule for theirs, rule in _OF_JAX if _is(equation, theirs)), None)
        return None if rule is None else [_Known(rule(*(part.kind for part in of)))]
    return None


# Functions of JAX's with derivatives of their own. A user's are not looked into: their derivative may be another.
_OF_JAX: list[tuple[Callable[..., Any], Callable[..., Kind]]] = [
    (jnp.logaddexp, lambda a, b: Kind(a.convex and b.convex, nonnegative=a.nonnegative or b.nonnegative)),
    (jax.nn.relu, lambda a: Kind(a.convex, nonnegative=True, nonpositive=a.nonpositive)),
]


def _is(equation: Any, fn: Callable[..., Any]) -> bool:
    """Whether a call is one of this function, equation by equation."""
    called = str(equation.params["call_jaxpr"])
    shapes = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in equation.invars]
    try:
        theirs = jax.make_jaxpr(fn)(*shapes).jaxpr
    except TypeError:  # of another number of arguments
        return False
    calls = [inner for inner in equations(theirs) if inner.primitive.name == "custom_jvp_call"]
    return any(str(inner.params["call_jaxpr"]) == called for inner in calls)


_KEEPS = frozenset((
    "broadcast_in_dim", "copy", "copy_p", "cumsum", "dynamic_slice", "expand_dims", "gather", "reduce_sum", "reshape",
    "rev", "slice", "split", "squeeze", "tile", "transpose", "unstack",
))  # fmt: skip
_PLACED = frozenset(("concatenate", "dynamic_update_slice", "pad", "stack"))
_GROWS: dict[str, Callable[[Kind], Kind]] = {
    "exp": lambda k: Kind(k.convex, nonnegative=True),
    "exp2": lambda k: Kind(k.convex, nonnegative=True),
    "expm1": lambda k: Kind(k.convex, nonnegative=k.nonnegative, nonpositive=k.nonpositive),
    "log": lambda k: Kind(concave=k.concave),
    "log1p": lambda k: Kind(concave=k.concave, nonnegative=k.nonnegative, nonpositive=k.nonpositive),
    "sqrt": lambda k: Kind(k.squares, k.concave, nonnegative=True),
    "logistic": lambda k: Kind(nonnegative=True),
    "tanh": lambda k: Kind(nonnegative=k.nonnegative, nonpositive=k.nonpositive),
    "reduce_max": lambda k: Kind(k.convex, nonnegative=k.nonnegative, nonpositive=k.nonpositive),
    "reduce_min": lambda k: Kind(concave=k.concave, nonnegative=k.nonnegative, nonpositive=k.nonpositive),
    "neg": lambda k: -k,
    "abs": lambda k: k if k.nonnegative else _even(k),
    "cosh": lambda k: _even(k),
    "square": lambda k: _power(k, 2),
}
"""What functions of one argument make of its kind."""


def _rule(equation: Any, of: list[Kind], same: bool) -> Kind:
    """Of an equation's outputs; `same`: both of its arguments are one value."""
    name = equation.primitive.name
    if name in _GROWS:
        return _GROWS[name](of[0])
    if name in _KEEPS and all(kind.fixed for kind in of[1:]):
        return of[0]
    if name == "convert_element_type" and np.issubdtype(equation.params["new_dtype"], np.inexact):
        return of[0]
    if name in _PLACED:
        return _joined(of)
    if name == "select_n" and of[0].fixed:
        return _joined(of[1:])
    if name in ("add", "add_any", "sub"):
        return of[0] + (-of[1] if name == "sub" else of[1])
    if name in ("max", "min"):
        first, second = of if name == "max" else (-of[0], -of[1])
        up = first.nonnegative or second.nonnegative
        found = Kind(first.convex and second.convex, False, up, first.nonpositive and second.nonpositive)
        return found if name == "max" else -found
    if name in ("conv_general_dilated", "dot_general", "mul"):
        if same and _by_entries(equation):
            return _power(of[0], 2)
        return of[0] * of[1]
    if name == "div":
        if of[1].fixed:
            return of[0] * of[1]  # 1 / c has the sign of c
        return of[0] * _power(of[1], -1) if of[0].fixed else Kind()
    if name == "integer_pow":
        return _power(of[0], equation.params["y"])
    if name == "pow" and isinstance(equation.invars[1], Literal):
        return _power(of[0], float(equation.invars[1].val))
    return Kind()


def _joined(of: Sequence[Kind]) -> Kind:
    """What holds of all."""
    return Kind(*(all(getattr(kind, field.name) for kind in of) for field in dataclasses.fields(Kind)))


def _even(k: Kind) -> Kind:
    """Of an even function that is convex and grows with the size of its argument."""
    return Kind(k.affine or (k.convex and k.nonnegative) or (k.concave and k.nonpositive), nonnegative=True)


def _power(k: Kind, p: float) -> Kind:
    """Of k ** p, where it has a value."""
    if p == 0:
        return dataclasses.replace(CONSTANT, nonnegative=True)
    if p == 1:
        return k
    if p == 2:
        return dataclasses.replace(_even(k), squares=k.affine)
    if p > 0 and p % 2 == 0:
        return _even(k)
    if p % 1:  # there is no value below zero
        k = dataclasses.replace(k, nonnegative=True)
        if 0 < p < 1:
            return Kind(concave=k.concave, nonnegative=True)
        return Kind(k.affine or k.convex if p > 1 else k.concave, nonnegative=True)
    if p < 0:
        signs = Kind(nonnegative=k.nonnegative or p % 2 == 0, nonpositive=k.nonpositive and p % 2 == 1)
        convex = (k.nonnegative and k.concave) or (k.nonpositive and k.convex and p % 2 == 0)
        return dataclasses.replace(signs, convex=convex, concave=k.nonpositive and k.convex and p % 2 == 1)
    return Kind(k.convex and k.nonnegative, k.concave and k.nonpositive, k.nonnegative, k.nonpositive)


def _by_entries(equation: Any) -> bool:
    """Whether a product of two arrays of one shape multiplies each entry of one with the same entry of the other."""
    if equation.primitive.name != "dot_general":
        return equation.primitive.name == "mul"
    (left, right), batch = equation.params["dimension_numbers"]
    rank = equation.invars[0].aval.ndim
    return left == right and batch[0] == batch[1] and len(left) + len(batch[0]) == rank
