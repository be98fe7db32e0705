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
from jax.extend.core import ClosedJaxpr, Literal

__all__ = ["with_roots"]


def with_roots(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with zero for the derivative of a square root and of a quotient by zero, and zero for 0 / 0 itself.

    All other values and derivatives are those of `fn`. Roots inside its compiled functions and its branches are seen,
    those inside loops are not. `fn` is traced once per call of the result.
    """

    def guarded(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        if closed.jaxpr.effects:
            return fn(*args)
        values = _evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return guarded


def _evaluate(closed: Any, args: Any) -> list[Any]:
    jaxpr = closed.jaxpr
    environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else environment[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        results = _apply(equation, [read(atom) for atom in equation.invars])
        environment.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


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
        branches = [lambda *a, branch=branch: _evaluate(branch, a) for branch in params["branches"]]
        return jax.lax.switch(args[0], branches, *args[1:])
    bound = equation.primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = equation.primitive.bind(*functions, *args, **params)
    return list(results) if equation.primitive.multiple_results else [results]
