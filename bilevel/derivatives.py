"""All the calculus that hypergradients need: Hessian-vector products, cross products, joint linearisation.

Notation: f(x, y) is a lower-level loss with x the upper and y the lower variable, both pytrees; f_y its gradient in y,
f_yy its Hessian in y, f_xy v = d/dx <f_y, v> the cross product (shaped like x).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel._forward import forward_only
from bilevel._products import merge_products
from bilevel._reverse import inner, reverse_over_reverse
from bilevel.typing import PyTree

Loss = Callable[[PyTree, PyTree], jax.Array]

__all__ = [
    "Linearised", "cross_product", "dot", "forward_only", "gradient_and_cross", "gradient_and_products", "hvp",
    "linearised", "mixed_mode_gradient", "reverse_over_reverse",
]  # fmt: skip


class Linearised(NamedTuple):
    """The lower level's value f and gradients f_x and f_y at a point, and its products v -> (f_xy v, f_yy v), two from
    one pass."""

    value: jax.Array
    gradient_x: PyTree
    gradient_y: PyTree
    products: Callable[[PyTree], tuple[PyTree, PyTree]]

    def hvp(self, v: PyTree) -> PyTree:
        """The Hessian-vector product f_yy v, shaped like y."""
        return self.products(v)[1]

    def cross(self, v: PyTree) -> PyTree:
        """The cross product f_xy v, shaped like x."""
        return self.products(v)[0]


def linearised(f: Loss, x: PyTree, y: PyTree) -> Linearised:
    """Linearise the joint gradient (f_x, f_y) in y.

    Along v the tangent of f_y is f_yy v, and that of f_x is f_xy v because second derivatives commute: one forward
    pass over the linearised gradient gives both products. Its primal pass gives both gradients, and is stated once,
    outside any loop that applies the products.
    """

    def gradients(y: PyTree) -> tuple[tuple[PyTree, PyTree], jax.Array]:
        value, gradients = jax.value_and_grad(f, argnums=(0, 1))(x, y)
        return gradients, value

    (gradient_x, gradient_y), products, value = linear(gradients, y)
    return Linearised(value, gradient_x, gradient_y, products)


def linear(fn: Callable[[PyTree], tuple[PyTree, PyTree]], y: PyTree) -> tuple[PyTree, Callable[..., PyTree], PyTree]:
    """`jax.linearize(fn, y, has_aux=True)`; and where a part of fn (a Pallas kernel) has tangents, and none apart from
    its value, a function that evaluates both."""
    try:
        return jax.linearize(fn, y, has_aux=True)
    except ValueError as error:
        if "Linearization failed" not in str(error):
            raise
    value, aux = fn(y)
    return value, lambda v: jax.jvp(lambda y: fn(y)[0], (y,), (v,))[1], aux


def _along(f: Loss, x: PyTree, y: PyTree, v: PyTree, argnums: Any, pick: Callable[[Any, Any], Any]) -> Any:
    """`pick` of f's gradient in the `argnums` and its derivative along v in y, forward over reverse."""
    both = lambda x, y, v: jax.jvp(lambda y: jax.grad(f, argnums)(x, y), (y,), (v,))  # noqa: E731
    return merge_products(lambda x, y, v: pick(*both(x, y, v)))(x, y, v)


def hvp(f: Loss, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
    """f_yy(x, y) v, forward over reverse."""
    return _along(f, x, y, v, 1, lambda _, hvp: hvp)


def cross_product(f: Loss, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
    """f_xy(x, y) v = d/dx <f_y(x, y), v>, shaped like x."""
    return _along(f, x, y, v, 0, lambda _, cross: cross)


def gradient_and_cross(f: Loss, x: PyTree, y: PyTree, v: PyTree) -> tuple[PyTree, PyTree]:
    """f_y(x, y) and f_xy(x, y) v from one joint linearisation."""
    return _along(f, x, y, v, (0, 1), lambda gradients, products: (gradients[1], products[0]))


def gradient_and_products(f: Loss, x: PyTree, y: PyTree, v: PyTree) -> tuple[PyTree, PyTree, PyTree]:
    """f_y(x, y), f_xy(x, y) v and f_yy(x, y) v from one joint linearisation; for many v see `linearised`."""
    return _along(f, x, y, v, (0, 1), lambda gradients, products: (gradients[1], *products))


def mixed_mode_gradient(f: Callable[..., jax.Array]) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """(x, y, batch) -> f_y(x, y, batch), whose *reverse* derivative costs one forward pass over the gradient.

    Reverse mode through a gradient stores the tape of the forward pass and that of the backward one. The cotangent w of
    f_y is needed against symmetric second derivatives, w' f_yy = f_yy w and w' d f_y/dx = f_xy w, and both are one
    `jvp` of the joint gradient along w: nothing but the arguments is saved (MixFlow-MG). So are those with respect to
    the batch, and to traced values that f captures, where somebody asks for them. Forward mode is not defined here (use
    `jax.grad(f, 1)`).

    Reference: Kemaev et al., "Scalable Meta-Learning via Mixed-Mode Differentiation", ICML 2025.
    """

    def of(x: PyTree, y: PyTree, batch: PyTree) -> PyTree:
        # What f captures must be an argument: a custom derivative sees nothing else.
        traced = jax.make_jaxpr(lambda *point: f(*point))(x, y, batch)  # new, since JAX remembers functions
        return gradient(traced.jaxpr, x, y, batch, traced.consts)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def gradient(jaxpr: Any, x: PyTree, y: PyTree, batch: PyTree, captured: list[Any]) -> PyTree:
        return jax.grad(_evaluated(jaxpr), argnums=1)(x, y, batch, captured)

    def forward(jaxpr: Any, *point: PyTree) -> tuple[PyTree, tuple[PyTree, ...]]:
        return jax.grad(_evaluated(jaxpr), argnums=1)(*point), point

    def backward(jaxpr: Any, point: tuple[PyTree, ...], w: PyTree) -> tuple[PyTree, ...]:
        x, y, *others = point
        leaves, structure = jax.tree.flatten(others)
        real = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

        def merged(values: list[Any], leaves: list[Any]) -> Any:
            new = iter(values)
            return jax.tree.unflatten(
                structure, [next(new) if r else leaf for r, leaf in zip(real, leaves, strict=True)]
            )

        loss = lambda x, y, values: _evaluated(jaxpr)(x, y, *merged(values, leaves))  # noqa: E731
        values = [leaf for r, leaf in zip(real, leaves, strict=True) if r]
        joint = lambda y: jax.grad(loss, argnums=(0, 1, 2))(x, y, values)  # noqa: E731
        _, (cross, hvp, rest) = jax.jvp(joint, (y,), (w,))
        return cross, hvp, *merged(rest, [None] * len(leaves))

    gradient.defvjp(forward, backward)
    return of


def _evaluated(jaxpr: Any) -> Callable[..., jax.Array]:
    """A traced scalar function of pytrees and of what it captured."""
    return lambda *args: jax.core.eval_jaxpr(jaxpr, args[-1], *jax.tree.leaves(args[:-1]))[0]


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product <a, b> over all leaves, 0 for none; of complex leaves the real part of <conj(a), b>."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    found = [inner(*map(jnp.asarray, pair)).real for pair in pairs]
    return sum(found[1:], found[0]) if found else jnp.zeros(())


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, 0 for none; XLA vectorises inner products, and sums of squares not."""
    return jnp.sqrt(dot(tree, tree))
