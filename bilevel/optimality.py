"""Optimality conditions to differentiate through, ready-made.

Each function here builds T(sol, *args) that is zero at the solution, for `bilevel.implicit.custom_root`. As in jaxopt,
the variable that is solved for stands first: `fun(y, *args)`. Where a condition has a projection or a proximal
operator, its hyperparameters come second, `T(sol, hyperparams, *args)`, and are differentiated like any other
argument. If they are None a projection is called without them, so that those of optax and of jaxopt both go in.

The fixed-point conditions hold for every `step` > 0, so the derivative of the solution does not depend on it; it only
sets the conditioning of the linear system. A step of about 1/L, L the largest curvature of `fun`, keeps that good.

Blondel, Berthet, Cuturi, Frostig, Hoyer, Llinares-López, Pedregosa and Vert (2022), "Efficient and modular implicit
differentiation", NeurIPS 35.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._arguments import explained, signature

Function = Callable[..., Any]
Condition = Callable[..., Any]

__all__ = [
    "block_coordinate", "kkt", "kkt_qp", "mirror_descent", "projected_gradient", "proximal_gradient", "stationarity",
]  # fmt: skip


@explained
def stationarity(fun: Function) -> Condition:
    """An unconstrained minimum: grad fun(y, *args) = 0, the gradient by the first argument.

    Its Jacobian is the Hessian of `fun`, symmetric, and positive definite at a strict minimum. The condition says so
    and `custom_root` then takes conjugate gradients; for a saddle point pass it `symmetric=False`.
    """
    gradient = _gradient(fun)

    def condition(y: Any, *args: Any, **kwargs: Any) -> Any:
        return gradient(y, *args, **kwargs)

    condition.symmetric = True  # type: ignore[attr-defined]
    return _with_signature(condition, fun)


@explained
def projected_gradient(fun: Function, projection: Function, step: Any = 1.0) -> Condition:
    """A minimum over a convex set: P(y - step grad fun(y, *args), hyperparams) - y = 0.

    P is the Euclidean projection onto the set, `projection(y, hyperparams) -> y`.
    """
    return mirror_descent(fun, projection, lambda y: y, step)


@explained
def proximal_gradient(fun: Function, prox: Function, step: Any = 1.0) -> Condition:
    """A minimum of a smooth fun + g: prox(y - step grad fun(y, *args), hyperparams, step) - y = 0.

    prox(v, hyperparams, scaling) = argmin_y 1/2 |y - v|^2 + scaling g(y, hyperparams)
    """
    back = lambda moved, hyperparams: prox(moved, hyperparams, step)  # noqa: E731
    return _fixed_point(fun, lambda y: y, step, back, "hyperparams_prox")


@explained
def mirror_descent(fun: Function, projection: Function, mirror_map: Callable[[Any], Any], step: Any = 1.0) -> Condition:
    """A minimum over a convex set in a Bregman geometry: P(grad phi(y) - step grad fun(y, *args), hyperparams) - y = 0.

    Args:
        projection: `projection(z, hyperparams) -> y`, from the dual space onto the set: argmin_y phi(y) - <z, y>. For
            the simplex and the entropy it is `jax.nn.softmax`, given hyperparameters None.
        mirror_map: grad phi, from y to its dual; for the entropy `jnp.log` (up to a constant).
    """

    def back(moved: Any, hyperparams: Any) -> Any:
        return projection(moved) if hyperparams is None else projection(moved, hyperparams)

    return _fixed_point(fun, mirror_map, step, back, "hyperparams_proj")


@explained
def block_coordinate(fun: Function, block_prox: Function, step: Any = 1.0) -> Condition:
    """A minimum of a smooth fun(y) + sum_j g_j(y_j), the blocks y_j along the leading axis of every leaf of y.

        block_prox(y_j - step grad_j fun(y, *args), hyperparams, step) - y_j = 0    for every block j

    At a solution every block is optimal at once, so this is the condition of proximal gradient with a separable g.
    """
    return proximal_gradient(fun, jax.vmap(block_prox, in_axes=(0, None, None)), step)


@explained
def kkt(fun: Function, eq: Function | None = None, ineq: Function | None = None) -> Condition:
    """The Karush-Kuhn-Tucker conditions of  min_y fun(y)  s.t.  eq(y) = 0,  ineq(y) <= 0.

        grad fun(y, p_obj) + (d eq)^T nu + (d ineq)^T lam = 0
        eq(y, p_eq) = 0
        min(-ineq(y, p_ineq), lam) = 0

    The last line is lam >= 0, ineq <= 0 and lam * ineq = 0 in one equation. Unlike the product alone, its derivative
    keeps unit scale: an active constraint's row is that of an equality, an inactive one's says that its multiplier
    stays zero. Where both are zero (a degenerate constraint) the solution may have a kink, and has no derivative.

    `fun` returns a scalar, `eq` and `ineq` pytrees.

    Returns:
        `T(sol, params_obj, params_eq=None, params_ineq=None)` with `sol = (y, nu, lam)`: the variable, the multipliers
        of `eq` and those of `ineq`, in any triple of pytrees (jaxopt's `KKTSolution` is one). Multipliers are None
        where there is no such constraint.
    """
    gradient = _gradient(fun)

    def condition(sol: Any, params_obj: Any, params_eq: Any = None, params_ineq: Any = None) -> Any:
        if not isinstance(sol, (tuple, list)) or len(sol) != 3:
            raise TypeError(
                f"A KKT condition was given a {type(sol).__name__} as the solution; it expects the triple (y, nu, lam) "
                "of the variable, the multipliers of the equalities and those of the inequalities, None where there "
                "are none."
            )
        y, nu, lam = sol
        stationary, feasible, complementary = gradient(y, params_obj), None, None
        if nu is not None:
            feasible, _, force = _pulled("eq", eq, y, params_eq, nu)
            stationary = optax.tree.add(stationary, force)
        if lam is not None:
            slack, lam, force = _pulled("ineq", ineq, y, params_ineq, lam)
            stationary = optax.tree.add(stationary, force)
            complementary = jax.tree.map(lambda g, m: jnp.minimum(-g, m), slack, lam)
        return stationary, feasible, complementary

    return condition


@explained
def kkt_qp(
    matvec_Q: Function | None = None, matvec_A: Function | None = None, matvec_G: Function | None = None
) -> Condition:
    """The conditions of the quadratic programme  min_y 1/2 y^T Q y + c^T y  s.t.  A y = b,  G y <= h.

    If Q, which is symmetric, is not a matrix, `matvec_Q(Q, y)` makes Q y; likewise for A and G.

    Returns:
        `T(sol, params_obj, params_eq=None, params_ineq=None)` with `sol` as in `kkt`, `params_obj = (Q, c)`,
        `params_eq = (A, b)` and `params_ineq = (G, h)`, as jaxopt's `EqualityConstrainedQP` and `OSQP` take them.
    """
    product_Q, product_A, product_G = (m if m is not None else jnp.dot for m in (matvec_Q, matvec_A, matvec_G))

    def objective(y: Any, params_obj: Any) -> Any:
        Q, c = params_obj
        return 0.5 * optax.tree.vdot(y, product_Q(Q, y)) + optax.tree.vdot(c, y)

    def affine(product: Function) -> Function:
        return lambda y, params: optax.tree.sub(product(params[0], y), params[1])

    return kkt(objective, affine(product_A), affine(product_G))


def _gradient(fun: Function) -> Function:
    def scalar(y: Any, *args: Any, **kwargs: Any) -> Any:
        value = fun(y, *args, **kwargs)
        several = isinstance(value, (tuple, list))
        if several or jnp.shape(value) != ():
            shape = type(value).__name__ if several else f"shape {jnp.shape(value)}"
            raise TypeError(
                f"The objective of an optimality condition returned a {shape}; a scalar is expected. Sum over samples, "
                "or, if the objective also returns auxiliary output, drop that: lambda *a: fun(*a)[0]."
            )
        return value

    return jax.grad(scalar)


def _fixed_point(
    fun: Function, mirror_map: Callable[[Any], Any], step: Any, back: Callable[[Any, Any], Any], second: str
) -> Condition:
    """T(y, hyperparams, *args) = back(mirror_map(y) - step grad fun(y, *args), hyperparams) - y."""
    gradient = _gradient(fun)

    def condition(y: Any, hyperparams: Any, *args: Any, **kwargs: Any) -> Any:
        moved = optax.tree.add_scale(mirror_map(y), -step, gradient(y, *args, **kwargs))
        return optax.tree.sub(back(moved, hyperparams), y)

    return _with_signature(condition, fun, second)


def _pulled(name: str, constraint: Function | None, y: Any, params: Any, multipliers: Any) -> tuple[Any, Any, Any]:
    """A constraint's value, its multipliers in the value's containers and dtypes, and (d constraint)^T multipliers."""
    if constraint is None:
        raise TypeError(
            f"The solution holds multipliers for `{name}`, but kkt was built without that constraint. Pass {name}=..., "
            "or None in the multipliers' place."
        )
    value, pull_back = jax.vjp(lambda y: constraint(y, params), y)
    pairs = jax.tree.leaves(multipliers), jax.tree.leaves(value)
    got, expected = ([jnp.shape(leaf) for leaf in leaves] for leaves in pairs)
    if got != expected:
        raise TypeError(
            f"The multipliers have leaves of shapes {got} and their constraint returned shapes {expected}; they must "
            "be equal, one multiplier for each constraint."
        )
    leaves = [jnp.asarray(leaf, dtype=like.dtype) for leaf, like in zip(*pairs, strict=True)]
    multipliers = jax.tree.unflatten(jax.tree.structure(value), leaves)
    return value, multipliers, pull_back(multipliers)[0]


def _with_signature(condition: Condition, fun: Function, second: str | None = None) -> Condition:
    """Give the condition the arguments' names of `fun`, so that it can be called by keyword."""
    if (found := signature(fun)) is not None:
        parameters = list(found.parameters.values())
        if second is not None:
            parameters.insert(1, inspect.Parameter(second, inspect.Parameter.POSITIONAL_OR_KEYWORD))
        with contextlib.suppress(ValueError):  # `fun` takes its variable through *args
            condition.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return condition
