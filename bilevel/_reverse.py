"""Derivatives of all orders by reverse mode alone, for functions whose gradient has no forward mode.

The one operation is the gradient of an inner product with a gradient,

    P[f, A, B](v, t) = d/dv_A <df/dv_B (v), t>,

a product with the block (A, B) of f's second derivative. Because second derivatives commute it is closed: linear in
t, its transpose is P[f, B, A]; its tangent in v is P[g, A, C] with g(v, t) = <df/dv_B, t>; and many of them are one, of
the sum of f over the batch. So it goes through every transformation of JAX without one forward pass through f.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bilevel.typing import PyTree

__all__ = ["reverse_over_reverse"]


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """The inner product of two arrays of one shape, as a product over all axes and not of flat arrays: one that lies
    over a mesh would be gathered to be flattened."""
    return jnp.tensordot(jnp.conj(a), b, a.ndim, precision=jax.lax.Precision.HIGHEST)


def reverse_over_reverse(f: Callable[..., jax.Array], name: str = "the loss") -> Callable[..., jax.Array]:
    """f, with second derivatives made by reverse mode alone: for losses whose gradient has no forward mode.

    The products of this package are forward over reverse, the cheaper way. A kernel whose backward pass is itself a
    `custom_vjp` cannot be taken so. Here the tangent of the gradient along t is the gradient of an inner product,
    f'' t = d/dv <f'(v), t>, and that of f is <f', t>: whatever asks for a product, in whichever mode, gets it by two
    reverse passes. `solve`, `run` and `value_and_hypergradient` find out by themselves which losses need it.

    Args:
      f: a scalar function of pytrees, (x, y) or (x, y, batch).
      name: what it is called in the error.

    Raises:
      ValueError: a second derivative is asked for, and f has none in reverse mode either; where it is asked for.
    """

    @functools.wraps(f, updated=())
    def loss(*args: PyTree) -> jax.Array:
        # What f captures must be an argument: a custom derivative sees nothing else.
        traced = jax.make_jaxpr(lambda *args: f(*args))(*args)
        count = len(traced.consts)
        plain = lambda *v: jax.core.eval_jaxpr(traced.jaxpr, v[:count], *v[count:])[0]  # noqa: E731
        return _value(plain, name)(*traced.consts, *jax.tree.leaves(args))

    return loss


def _value(f: Callable[..., jax.Array], name: str) -> Callable[..., jax.Array]:
    """A function of arrays whose tangent is <f', t>."""
    value = jax.custom_jvp(lambda *v: f(*v))

    def rule(v: Any, tangents: Any) -> Any:
        moving = _moving(v, tangents)
        slopes = _gradient(f, moving, name)(*v)
        along = [inner(slope, tangents[i]).real for i, slope in zip(moving, slopes, strict=True)]
        out = value(*v)
        return out, sum(along, jnp.zeros_like(out))

    value.defjvp(rule, symbolic_zeros=True)
    return value


def _gradient(f: Callable[..., jax.Array], of: tuple[int, ...], name: str) -> Callable[..., tuple[jax.Array, ...]]:
    """f' in the arguments `of`, whose tangent is a product."""
    gradient = jax.custom_jvp(lambda *v: jax.grad(f, of)(*v))

    def rule(v: Any, tangents: Any) -> Any:
        along = _moving(v, tangents)
        slopes = gradient(*v)
        if not along:
            return slopes, jax.tree.map(jnp.zeros_like, slopes)
        t = [tangents[i] for i in along]
        try:
            jax.eval_shape(lambda *vt: _evaluated(*vt, f=f, of=of, along=along), *v, *t)
        except Exception as error:  # whatever a kernel without a derivative says
            why = (str(error) or "no reason given").splitlines()[0][:200]
            raise ValueError(
                f"{name} has no second derivative, neither forward over reverse nor reverse over reverse "
                f"({type(error).__name__}: {why}): a kernel's backward pass has no derivative of its own. Give the "
                "kernel a custom_vjp whose backward pass can be differentiated in reverse mode, take another "
                "implementation of it, or a method of first derivatives alone (solvers.F2SA, solvers.PenaltyDescent, "
                "hypergradients.FirstOrder)."
            ) from error
        return slopes, tuple(_product.bind(*v, *t, f=f, of=of, along=along))

    gradient.defjvp(rule, symbolic_zeros=True)
    return gradient


def _moving(v: Any, tangents: Any) -> tuple[int, ...]:
    """The arguments with a tangent."""
    real = [jnp.issubdtype(jnp.result_type(value), jnp.inexact) for value in v]
    return tuple(i for i, t in enumerate(tangents) if real[i] and not isinstance(t, SymbolicZero))


def _inner(f: Callable[..., jax.Array], along: tuple[int, ...]) -> Callable[..., Any]:
    """(v, t) -> <df/dv_B, t>."""

    def product(*vt: Any) -> Any:
        v, t = vt[: len(vt) - len(along)], vt[len(vt) - len(along) :]
        return sum(map(inner, jax.grad(f, along)(*v), t))

    return product


def _evaluated(*vt: Any, f: Any, of: tuple[int, ...], along: tuple[int, ...]) -> list[jax.Array]:
    return list(jax.grad(_inner(f, along), of)(*vt))


def _tangent(primals: Any, tangents: Any, *, f: Any, of: tuple[int, ...], along: tuple[int, ...]) -> Any:
    count = len(primals) - len(along)
    out = _product.bind(*primals, f=f, of=of, along=along)
    parts = []
    t = tangents[count:]
    if not all(type(each) is ad.Zero for each in t):
        t = [ad.instantiate_zeros(each) for each in t]
        parts.append(_product.bind(*primals[:count], *t, f=f, of=of, along=along))
    moving = tuple(i for i, w in enumerate(tangents[:count]) if type(w) is not ad.Zero and _real(primals[i]))
    if moving:
        w = [tangents[i] for i in moving]
        parts.append(_product.bind(*primals, *w, f=_inner(f, along), of=of, along=moving))
    if not parts:
        return out, [jnp.zeros_like(each) for each in out]
    return out, parts[0] if len(parts) == 1 else [a + b for a, b in zip(*parts, strict=True)]


def _real(value: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def _transposed(cotangents: Any, *vt: Any, f: Any, of: tuple[int, ...], along: tuple[int, ...]) -> list[Any]:
    v, w = vt[: len(vt) - len(along)], map(ad.instantiate_zeros, cotangents)
    return [None] * len(v) + list(_product.bind(*v, *w, f=f, of=along, along=of))


def _batched(args: Any, dims: Any, *, f: Any, of: tuple[int, ...], along: tuple[int, ...]) -> Any:
    """Products of the sum over the batch, in which what is differentiated is each member's own."""
    count = len(args) - len(along)
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    own = {*of, *along, *range(count, len(args))}
    stacked = [
        batching.bdim_at_front(a, d, size) if i in own or d is not None else a
        for i, (a, d) in enumerate(zip(args, dims, strict=True))
    ]
    axes = tuple(0 if i in own or dims[i] is not None else None for i in range(count))
    together = lambda *v: jnp.sum(jax.vmap(f, axes)(*v))  # noqa: E731
    out = _product.bind(*stacked, f=together, of=of, along=along)
    return out, [0] * len(out)


_product = Primitive("reverse_product")
_product.multiple_results = True
_product.def_impl(lambda *vt, **params: jax.jit(functools.partial(_evaluated, **params))(*vt))
_product.def_abstract_eval(lambda *vt, f, of, along: [vt[i].update(weak_type=False) for i in of])
ad.primitive_jvps[_product] = _tangent
ad.primitive_transposes[_product] = _transposed
batching.primitive_batchers[_product] = _batched
mlir.register_lowering(_product, mlir.lower_fun(_evaluated, multiple_results=True))
