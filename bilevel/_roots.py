"""Derivatives of step rules where a gradient is zero: a root has an infinite one there, and infinity times zero is NaN.

Adam divides by the root of a mean square, clipping by a norm. At a gradient of exactly zero (a parameter that the loss
does not use, a bias before a normalisation, an optimum) their values are finite, and automatic differentiation makes
NaN of their derivatives, although the parameter's update does not depend on anything there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from bilevel._traces import applied, evaluated, traced_by

__all__ = ["root", "with_roots"]


@jax.custom_jvp
def root(square: jax.Array) -> jax.Array:
    """The root, with the derivative zero at zero: of lengths that are zero where there is nothing to be sized."""
    return jnp.sqrt(square)


@root.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    value = jnp.sqrt(primals[0])
    return value, jnp.where(value > 0, tangents[0] / jnp.where(value > 0, 2 * value, 1), 0)


def with_roots(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with zero for the derivative of a square root and of a quotient by zero, and zero for 0 / 0 itself.

    All other values and derivatives are those of `fn`. Roots inside its compiled functions and its branches are seen,
    those inside loops are not. `fn` is traced once per call of the result.
    """

    return traced_by(_evaluate, fn)


def _evaluate(closed: Any, args: list[Any]) -> list[Any]:
    return evaluated(closed.jaxpr, closed.consts, args, _apply)


def _apply(equation: Any, args: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    floating = bool(equation.outvars) and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
    if name == "sqrt" and floating:
        outside = args[0] <= 0  # below zero in the branch of a `where` that is not taken (RAdam)
        return [jnp.where(outside, 0, jnp.sqrt(jnp.where(outside, 1, args[0])))]
    if name == "div" and floating:
        zero, constant = args[1] == 0, jax.lax.stop_gradient(jax.lax.div(*args))
        constant = jnp.where(args[0] == 0, 0, constant)
        return [jnp.where(zero, constant, jax.lax.div(args[0], jnp.where(zero, 1, args[1])))]
    if name in ("jit", "pjit") and isinstance(params.get("jaxpr"), ClosedJaxpr):
        return _evaluate(params["jaxpr"], args)
    if name == "cond":
        branches = [lambda *a, branch=branch: _evaluate(branch, list(a)) for branch in params["branches"]]
        return jax.lax.switch(args[0], branches, *args[1:])
    return applied(equation, args)
