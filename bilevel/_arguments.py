"""A call's arguments, taken apart so that a custom derivative sees every value that it can depend on.

Keyword arguments become positional ones (`bind`), leaves that are not arrays go around JAX (`Leaves`), and values that
functions capture from an enclosing transformation become arguments (`holds_tracer`, `hoisted`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bilevel.typing import PyTree


class Leaves:
    """A pytree of which the arrays and floats (`values`) go through JAX, and all other leaves around it."""

    def __init__(self, tree: PyTree):
        self.leaves, self.treedef = jax.tree.flatten(tree)
        array_like = (jax.Array, np.ndarray, np.number, float, complex)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, array_like)]
        self.values = [self.leaves[i] for i in self.places]

    def merge(self, values: Sequence[Any]) -> PyTree:
        """The pytree with other values in its dynamic leaves."""
        return jax.tree.unflatten(self.treedef, replaced(self.leaves, self.places, values))


def replaced(items: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The items, with other values in some places."""
    items = list(items)
    for i, value in zip(places, values, strict=True):
        items[i] = value
    return items


def signature(function: Callable[..., Any] | inspect.Signature) -> inspect.Signature | None:
    """How a function takes its arguments; None for a builtin, whose arguments are taken as they come."""
    if isinstance(function, inspect.Signature):
        return function
    with contextlib.suppress(TypeError, ValueError):
        return inspect.signature(getattr(function, "subfun", function))  # jaxopt's composite objectives have a subfun
    return None


def bind(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any], whose: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keyword arguments turned into positional ones where the signature says how; defaults filled in."""
    if signature is not None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"The arguments do not fit the signature {signature} of {whose}: {error}. Solver and optimality_fun "
                "must take the same arguments (the solution in place of the initial guess); pass reference_signature "
                "to say how they match."
            ) from None
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    if not args:
        raise TypeError(f"The initial guess is missing for {whose}. Pass it (or None) first: solver(init, *args).")
    return args, kwargs


def holds_tracer(root: Any) -> bool:
    """Whether a traced value is reachable from the closures of some functions."""
    pending, seen = [root], set[int]()
    while pending and len(seen) < 10_000:  # a bound on the time that a large object can take
        value = pending.pop()
        if isinstance(value, jax.core.Tracer):
            return True
        if id(value) not in seen:
            seen.add(id(value))
            pending.extend(_contents(value))
    return False


def _contents(value: Any) -> Iterator[Any]:
    if value is None or isinstance(value, (jax.Array, np.ndarray, str, bytes, int, float, type, types.ModuleType)):
        return
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        yield from value
    else:
        for cell in getattr(value, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # a cell that has not been filled yet
                yield cell.cell_contents
        for name in ("__wrapped__", "__self__", "__defaults__", "__kwdefaults__", "__dict__"):
            yield getattr(value, name, None)
        if isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)


def hoisted(
    call: Callable[..., Any],
    condition: Callable[..., PyTree],
    has_aux: bool,
    start_values: list[Any],
    values: list[Any],
) -> tuple[Callable[..., Any], Callable[..., PyTree], list[Any]]:
    """Make arguments of the values that the solver and the condition capture from an enclosing transformation.

    A custom derivative sees its arguments only: a captured value would have no derivative, or silently a zero one.
    Returns `call(start_values, values)`, `condition(sol, values)` and the values, longer by what was captured.
    """
    call, call_captured = jax.closure_convert(call, start_values, values)
    output = jax.eval_shape(call, start_values, values, *call_captured)
    blank = lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # noqa: E731  # takes no memory
    sol = jax.tree.map(blank, output[0] if has_aux else output)
    condition, condition_captured = jax.closure_convert(condition, sol, values)
    n, m = len(values), len(values) + len(call_captured)
    return (
        lambda start_values, values: call(start_values, values[:n], *values[n:m]),
        lambda sol, values: condition(sol, values[:n], *values[m:]),
        [*values, *call_captured, *condition_captured],
    )
