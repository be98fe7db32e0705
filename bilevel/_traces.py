"""Reading what JAX has traced, and computing it again: equations within equations, and what depends on what."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

__all__ = [
    "Outlines", "applied", "degrees", "equations", "evaluated", "inner", "of_function", "of_losses", "of_problem",
    "reached", "traced_by", "traffic",
]  # fmt: skip


def of_function(fn: Callable[..., Any], x: Any, y: Any, source: Any) -> tuple[Any, Any]:
    """The trace of `fn(x, y)`, or of `fn(x, y, batch)` where the source is one, and the shapes of its outputs.

    Its arguments are the leaves of x, of y, and then others. Of a function that was taken apart it is asked for by one
    function of this module, so that JAX remembers it. Of others not: a trace that is kept keeps the arrays it holds in
    its precision, and JAX gives them so to traces in another one.
    """
    if _apart(fn):
        return _remembered(_called, x, y, source, fn)
    return jax.make_jaxpr(lambda x, y, source: _called(x, y, source, fn), return_shape=True)(x, y, source)


def _apart(fn: Any) -> bool:
    """Whether all arrays that a function holds are arguments of its trace."""
    return getattr(fn, "whole", False)


def _called(x: Any, y: Any, source: Any, fn: Callable[..., Any]) -> Any:
    return fn(x, y, source.example()) if source.given else fn(x, y)


def of_losses(problem: Any, x: Any, y: Any) -> list[Any]:
    """The traces of both losses on all samples, remembered likewise; their arguments begin with x and y."""
    return [of_problem(loss, x, y, problem)[0].jaxpr for loss in (_upper_on_all, _lower_on_all)]


def of_problem(fn: Callable[..., Any], x: Any, y: Any, problem: Any) -> tuple[Any, Any]:
    """The trace of `fn(x, y, problem)`, fn being a function of a module, and its shapes; remembered likewise."""
    functions = [value for value in vars(problem).values() if callable(value)]
    if all(map(_apart, functions)):
        return _remembered(fn, x, y, problem)
    return jax.make_jaxpr(lambda x, y, problem: fn(x, y, problem), return_shape=True)(x, y, problem)


def _remembered(fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    traced = _jitted(fn).trace(*args)
    return traced.jaxpr, traced.out_info


@functools.cache
def _jitted(fn: Callable[..., Any]) -> Any:
    """One of a function of a module, since each new one costs more than to find a trace again."""
    return jax.jit(fn)


class Outlines:
    """The last of what was traced without an error, by all that a trace depends on: the structures, the shapes and
    dtypes of all leaves, and JAX's settings of dtypes."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, None] = OrderedDict()

    def have(self, trees: Any) -> bool:
        """Whether such trees were added."""
        outline = _outline(trees)
        return outline is not None and outline in self._found

    def add(self, trees: Any) -> None:
        """Remember these, unless a structure cannot be compared."""
        outline = _outline(trees)
        if outline is not None:
            self._found[outline] = None
            if len(self._found) > _OUTLINES:
                self._found.popitem(last=False)


_OUTLINES = 128


def _outline(trees: Any) -> Hashable | None:
    leaves, structure = jax.tree.flatten(trees)
    settings = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # type: ignore[attr-defined]
    found = structure, tuple(map(_kind, leaves)), settings
    try:
        hash(found)
    except TypeError:
        return None
    return found


def _kind(leaf: Any) -> Any:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return type(leaf) if shape is None else (shape, dtype, getattr(leaf, "weak_type", False))


def _upper_on_all(x: Any, y: Any, problem: Any) -> Any:
    return problem.full_levels().upper(x, y)


def _lower_on_all(x: Any, y: Any, problem: Any) -> Any:
    return problem.full_levels().lower(x, y)


def inner(equation: Any) -> list[Any]:
    """The traces within an equation: a loop's body, a branch, a called function."""
    parts = [part for value in equation.params.values() for part in (value if type(value) is tuple else (value,))]
    return [getattr(part, "jaxpr", part) for part in parts if hasattr(getattr(part, "jaxpr", part), "eqns")]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a trace, those inside others too."""
    for equation in jaxpr.eqns:
        yield equation
        for body in inner(equation):
            yield from equations(body)


def traced_by(
    compute: Callable[[Any, list[Any]], list[Any]],
    fn: Callable[..., Any],
    wanted: Callable[[Any], bool] = lambda jaxpr: True,
) -> Callable[..., Any]:
    """`fn`, computed from its trace by `compute(closed trace, leaves)`; as it is where it has effects, or the trace is
    not `wanted`. It is traced once per call of the result."""

    def traced(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        if closed.jaxpr.effects or not wanted(closed.jaxpr):
            return fn(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), compute(closed, jax.tree.leaves(args)))

    return traced


def evaluated(jaxpr: Any, consts: Any, args: Any, apply: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """What a trace computes, `apply(equation, values)` being what each of its equations does."""
    environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else environment[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        results = apply(equation, [read(atom) for atom in equation.invars])
        environment.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def applied(equation: Any, values: list[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """What an equation makes of other values, with its own parameters or these."""
    bound = equation.primitive.get_bind_params(equation.params if params is None else params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = equation.primitive.bind(*functions, *values, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def reached(jaxpr: Any, inputs: list[bool], visit: Callable[[Any], None] = lambda equation: None) -> list[bool]:
    """Which outputs depend on the marked inputs; `visit` is called with each equation that one of them reaches."""
    marked = {v for v, on in zip(jaxpr.invars, inputs, strict=True) if on}
    is_marked = lambda v: not isinstance(v, Literal) and v in marked  # noqa: E731
    for equation in jaxpr.eqns:
        on = [is_marked(v) for v in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            out = reached(equation.params["jaxpr"].jaxpr, on, visit)
        else:
            out = [any(on)] * len(equation.outvars)
            if any(on):
                visit(equation)
        marked.update(v for v, reaches in zip(equation.outvars, out, strict=True) if reaches)
    return [is_marked(v) for v in jaxpr.outvars]


def traffic(jaxpr: Any) -> int:
    """Bytes of all that a traced function computes on its way; the body of a loop as often as it is known to run."""
    total = 0
    for equation in jaxpr.eqns:
        if bodies := inner(equation):
            total += sum(map(traffic, bodies)) * int(equation.params.get("length", 1))
        else:
            total += sum(int(np.prod(out.aval.shape)) * out.aval.dtype.itemsize for out in equation.outvars)
    return total


# What keeps the degree of its first argument, the rest being constant; what has the greatest of its arguments' degrees;
# and what has their sum.
_KEEPS = frozenset((
    "broadcast_in_dim", "copy", "copy_p", "cumsum", "dynamic_slice", "expand_dims", "gather", "neg", "reduce_sum",
    "reshape", "rev", "slice", "squeeze", "tile", "transpose", "unstack",
))  # fmt: skip
_GREATEST = frozenset(("add", "add_any", "concatenate", "dynamic_update_slice", "pad", "stack", "sub"))
_SUM = frozenset(("conv_general_dilated", "dot_general", "mul"))


def degrees(jaxpr: Any, given: list[float]) -> list[float]:
    """Bounds on the degrees of a trace's outputs as polynomials in its arguments, `given` being the arguments' own.

    Infinite where a value is none, or not seen to be one: loops, branches and functions with derivatives of their own
    are not looked into.
    """
    known = dict(zip(jaxpr.invars, given, strict=True))
    read = lambda atom: 0.0 if isinstance(atom, Literal) else known.get(atom, 0.0)  # noqa: E731
    for equation in jaxpr.eqns:
        name, of = equation.primitive.name, [read(atom) for atom in equation.invars]
        first, rest = (of[0], max(of[1:], default=0.0)) if of else (0.0, 0.0)
        found = np.inf
        if not max(of, default=0.0):
            found = 0.0
        elif name in ("jit", "pjit"):
            known.update(zip(equation.outvars, degrees(equation.params["jaxpr"].jaxpr, of), strict=True))
            continue
        elif name in _GREATEST:
            found = max(of)
        elif name in _SUM:
            found = sum(of)
        elif name == "split" or ((name in _KEEPS or name == "div") and not rest):
            found = first
        elif name == "select_n" and not first:
            found = rest
        elif name == "square":
            found = 2 * first
        elif name == "integer_pow" and equation.params["y"] >= 0:
            found = first * equation.params["y"] if equation.params["y"] else 0.0
        elif name == "convert_element_type" and np.issubdtype(equation.params["new_dtype"], np.inexact):
            found = first
        known.update((out, found) for out in equation.outvars)
    return [read(atom) for atom in jaxpr.outvars]
