"""Convolutions within loops on a CPU, in the one order of axes that XLA has a fast kernel for there.

XLA:CPU brings convolutions into that order (batch, places, channels) itself, but in a programme's outermost computation
alone: within a loop the derivatives of a convolution, whose axes are permuted, run many times slower than outside
(`benchmarks/convolutions.py`). Here the axes are permuted in the trace of the loop's body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from bilevel._traces import applied, equations, evaluated, inner, traced_by

__all__ = ["convolves", "in_canonical_order"]

_NAME = "conv_general_dilated"


def convolves(jaxpr: Any) -> bool:
    """Whether a trace has convolutions."""
    return any(equation.primitive.name == _NAME for equation in equations(jaxpr))


def in_canonical_order(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, a loop's body, with its convolutions in canonical order, those of loops within it too; on a CPU.

    The values are the same up to the order of sums. Grouped convolutions are left as they are.
    """
    if jax.default_backend() != "cpu":
        return fn
    return traced_by(lambda closed, args: evaluated(closed.jaxpr, closed.consts, args, _apply), fn, _permuted)


def _permuted(jaxpr: Any) -> bool:
    return any(map(_is_permuted, equations(jaxpr)))


def _is_permuted(equation: Any) -> bool:
    if equation.primitive.name != _NAME:
        return False
    given, rank = equation.params["dimension_numbers"], equation.outvars[0].aval.ndim
    grouped = equation.params["feature_group_count"] > 1 or equation.params["batch_group_count"] > 1
    return not grouped and tuple(given) != _orders(rank)


def _orders(rank: int) -> tuple[tuple[int, ...], ...]:
    """Where batch, channels and places are in the input, outputs, inputs and places in the kernel, and so on."""
    places = tuple(range(1, rank - 1))
    return (0, rank - 1, *places), (rank - 1, rank - 2, *range(rank - 2)), (0, rank - 1, *places)


def _apply(equation: Any, values: list[Any]) -> list[Any]:
    if _is_permuted(equation):
        left, right = values
        return [_convolution(left, right, equation.params)]
    if not any(map(_permuted, inner(equation))):
        return applied(equation, values)
    return applied(equation, values, {name: _rewritten(value) for name, value in equation.params.items()})


def _rewritten(value: Any) -> Any:
    """A parameter of an equation, with the traces in it in canonical order."""
    if type(value) is tuple:
        return tuple(map(_rewritten, value))
    jaxpr = getattr(value, "jaxpr", value)
    if not hasattr(jaxpr, "eqns") or not _permuted(jaxpr) or jaxpr.effects:
        return value
    closed = isinstance(value, ClosedJaxpr)
    avals = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=getattr(v.aval, "weak_type", False))
        for v in (*jaxpr.constvars * (not closed), *jaxpr.invars)
    ]
    consts = value.consts if closed else []
    new = jax.make_jaxpr(lambda *args: evaluated(jaxpr, consts, args, _apply))(*avals)
    return new if closed else new.jaxpr if not new.consts else value


def _convolution(left: Any, right: Any, params: dict[str, Any]) -> Any:
    given, canonical = params["dimension_numbers"], _orders(left.ndim)
    put = lambda array, at, to: jnp.transpose(array, [at[to.index(axis)] for axis in range(array.ndim)])  # noqa: E731
    out = jax.lax.conv_general_dilated(
        put(left, given.lhs_spec, canonical[0]),
        put(right, given.rhs_spec, canonical[1]),
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        jax.lax.ConvDimensionNumbers(*canonical),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return put(out, canonical[2], given.out_spec)
