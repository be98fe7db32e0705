"""How the layers register what they add to JAX: a primitive with its lowerings and batching, and its derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir


def primitive(
    name: str, shape: Callable[..., Any], lowering: Callable[..., Array], batch: Callable[..., Any], *, cpu: Any = None
) -> Any:
    """A primitive of arrays and static keywords. Its result is of its first operand's type, but for the shape.

    Args:
        name: in jaxprs.
        shape: `(*operands, **static) ->` the result's shape.
        lowering: `(*operands, **static) ->` the result, in JAX's operations.
        batch: `(primitive, operands, axes, **static) -> (result, axis)`, the rule of `vmap`.
        cpu: a lowering for that platform.
    """
    made = jax.extend.core.Primitive(name)
    made.def_abstract_eval(
        lambda *operands, **static: operands[0].update(shape=shape(*operands, **static), weak_type=False)
    )
    mlir.register_lowering(made, mlir.lower_fun(lowering, multiple_results=False))
    if cpu is not None:
        mlir.register_lowering(made, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
    batching.primitive_batchers[made] = functools.partial(batch, made)
    run = jax.jit(lambda operands, static: made.bind(*operands, **dict(static)), static_argnums=1)
    made.def_impl(lambda *operands, **static: run(operands, tuple(static.items())))
    return made


def bilinear(made: Any, by_first: Callable[..., Array], by_second: Callable[..., Array]) -> None:
    """Say that a primitive is linear in each of two operands.

    Args:
        made: the primitive.
        by_first: `(cotangent, shape of the first operand, second operand, **static) ->` the transpose in the first
            operand.
        by_second: `(cotangent, shape of the second operand, first operand, **static) ->` that in the second.
    """
    ad.defbilinear(
        made,
        lambda ct, first, second, **static: by_first(ct, first.aval.shape, second, **static),
        lambda ct, first, second, **static: by_second(ct, second.aval.shape, first, **static),
    )


def linear(made: Any, transpose: Callable[..., Array]) -> None:
    """Say that a primitive of one operand is linear: `transpose(cotangent, shape of the operand, **static)`."""
    ad.deflinear2(made, lambda ct, operand, **static: [transpose(ct, operand.aval.shape, **static)])


def mapped_size(args: Any, axes: Any) -> int:
    """The length of the axis that `vmap` maps."""
    return next(a.shape[axis] for a, axis in zip(args, axes, strict=True) if axis is not None)


def mapped_first(args: Any, axes: Any) -> list[Array]:
    """The operands with the mapped axis in front, repeated where one has none."""
    n = mapped_size(args, axes)
    return [
        jnp.broadcast_to(a, (n, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(args, axes, strict=True)
    ]


def in_front(made: Any, args: Any, axes: Any, **static: Any) -> tuple[Array, int]:
    """The rule of `vmap` for primitives that take leading axes as they come: one more in front."""
    return made.bind(*mapped_first(args, axes), **static), 0


def bind(made: Any, x: Array, y: Array, **static: Any) -> Array:
    """Call a primitive of two operands."""
    return made.bind(*align(x, y), **static)


def align(x: Array, y: Array) -> tuple[Array, Array]:
    """Inside `shard_map`, make both operands vary over the same mesh axes, as the built-in operations do."""
    over_x, over_y = _varying(x), _varying(y)
    if over_x == over_y:
        return x, y
    vary: Any = functools.partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else lax.pvary  # type: ignore
    if over_y - over_x:
        x = vary(x, tuple(over_y - over_x))
    if over_x - over_y:
        y = vary(y, tuple(over_x - over_y))
    return x, y


def _varying(x: Array) -> frozenset[str]:
    """The mesh axes over which a value varies inside `shard_map`, under each of the names JAX gave that attribute."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", None) or getattr(manual, "varying", None) or ())
