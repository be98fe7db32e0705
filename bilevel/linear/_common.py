"""What all linear solvers share: types, the checks of what a caller gives, tree arithmetic, differentiation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel._module import state
from bilevel.typing import PyTree

Matvec = Callable[[PyTree], PyTree]
S = TypeVar("S")


@state
class LinearInfo:
    """What a linear solve reports about itself; arrays all three, so that it passes through `jit`, `vmap` and `scan`.

    Attributes:
      residual: the norm ||b - H v|| of the system that was solved (with `damping`, H is H + damping I), in the units
        of b. Where a solver's docstring says so, it is that of the solver's recursion.
      iterations: int32, the number of iterations done; 0 where there are none (Dense, Nystrom, Identity).
      negative_curvature: bool, whether a direction p with p'Hp <= 0 was met. Only solvers that look at curvature can
        say True: the solvers for non-symmetric systems always say False.
    """

    residual: jax.Array
    iterations: jax.Array
    negative_curvature: jax.Array


@state
class LinearCarry:
    """All that a solver takes from one outer step to the next. It is never differentiated.

    Attributes:
      v: the last solution, where the next solve starts (None for solvers without warm start).
      preconditioner: arrays of the preconditioner or of the sketch, with their refresh counter (None without one).
    """

    v: PyTree = None
    preconditioner: PyTree = None


class LinearSolver(Protocol):
    """A solver of H v = b: two pure methods, all that the rest of the package asks of one."""

    def init(self, b: PyTree) -> LinearCarry:
        """What the first solve starts from, for right-hand sides shaped like b."""
        ...

    def __call__(
        self, matvec: Matvec, b: PyTree, carry: LinearCarry | None = None
    ) -> tuple[PyTree, LinearCarry, LinearInfo]:
        """Solve matvec(v) = b; `carry=None` is a cold start."""
        ...


class Solver:
    """The frame around every algorithm: what it is given is checked, and a system without unknowns is its own answer.

    A solver adds its hyperparameters, `_first(b)`, the carry of a first solve, where that holds more than a v, and
    `_solve(h, b, v, carry)`, which solves h(v) = b from the warm start v, None for a cold one.
    """

    warm_start: bool = False  # solvers that have one make it a field

    def init(self, b: PyTree) -> LinearCarry:
        """What the first solve starts from, for right-hand sides shaped like b."""
        return self._first(as_vector(b))

    def __call__(
        self, matvec: Matvec, b: PyTree, carry: LinearCarry | None = None
    ) -> tuple[PyTree, LinearCarry, LinearInfo]:
        """Solve matvec(v) = b; returns v, the carry of the next solve, and the report. `carry=None` is a cold start."""
        b = as_vector(b)
        warm = carry is not None and self.warm_start
        carry = jax.lax.stop_gradient(self.init(b) if carry is None else carry)
        if size(b) == 0:
            return b, carry, report(jnp.zeros((), working_dtype(b)), 0)
        if warm:
            check_carry(type(self).__name__, carry, b)
        return self._solve(checked(matvec, b), b, carry.v if warm else None, carry)

    def _first(self, b: PyTree) -> LinearCarry:
        return LinearCarry(v=optax.tree.zeros_like(b) if self.warm_start else None)

    def _carried(self, v: PyTree) -> PyTree:
        """The warm start of the next solve."""
        return jax.lax.stop_gradient(v) if self.warm_start else None

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, carry: LinearCarry) -> tuple[PyTree, LinearCarry, LinearInfo]:
        raise NotImplementedError


# Checks of what a person wrote. Inside a transformation a hyperparameter may be a tracer, and then nothing is checked.


def check_positive(owner: str, **fields: Any) -> None:
    """Refuse a number or count that is not positive (None and traced values pass)."""
    for name, value in fields.items():
        if isinstance(value, (int, float)) and not value > 0:
            cure = " For a fixed number of iterations use tol=None." if name == "tol" else ""
            raise ValueError(f"{owner}({name}={value!r}) was given, but {name} must be positive.{cure}")


def check_not_negative(owner: str, **fields: Any) -> None:
    """Refuse a negative number (traced values pass)."""
    for name, value in fields.items():
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{owner}({name}={value!r}) was given, but {name} must be zero or positive.")


def as_vector(b: PyTree) -> PyTree:
    """The right-hand side as a pytree of real floating-point arrays; everything else is refused by name."""

    def leaf(path: Any, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"The right-hand side's leaf b{jax.tree_util.keystr(path)} has dtype {x.dtype}, but a linear system "
                "needs real floating-point leaves. Cast it, or take integer and complex leaves out of the variable."
            )
        return jnp.asarray(x, dtype=x.dtype)  # the explicit dtype drops JAX's weak type, which no loop could carry

    return jax.tree_util.tree_map_with_path(leaf, b)


def checked(matvec: Matvec, b: PyTree) -> Matvec:
    """The same linear map, which refuses at trace time to return anything that is not shaped like b."""

    def describe(tree: PyTree) -> str:
        leaves, structure = jax.tree.flatten(tree)
        return f"{structure} of [{', '.join(f'{x.dtype}{list(x.shape)}' for x in leaves)}]"

    def multiply(v: PyTree) -> PyTree:
        product = jax.tree.map(lambda x: jnp.asarray(x, dtype=jnp.result_type(x)), matvec(v))
        if describe(product) != describe(b):
            raise TypeError(
                f"matvec(v) returned {describe(product)}, but b is {describe(b)}. A linear solver needs a matvec from "
                "the space of b to itself: return the same structure, shapes and dtypes as its argument."
            )
        return product

    return multiply


def check_carry(owner: str, carry: LinearCarry, b: PyTree) -> None:
    """Refuse a warm start that belongs to another system."""
    given, expected = (jax.tree.map(jnp.shape, tree) for tree in (carry.v, b))
    if given != expected:
        raise ValueError(
            f"{owner} was given a carry whose v has shapes {given}, but b has shapes {expected}. "
            "Make the carry with solver.init(b), or pass carry=None for a cold start."
        )


# Arithmetic.


def size(b: PyTree) -> int:
    """The number d of unknowns."""
    return sum(leaf.size for leaf in jax.tree.leaves(b))


def working_dtype(b: PyTree) -> Any:
    """The precision of scalars and of dense arrays: that of b's widest leaf and at least float32."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(b))


def epsilon(b: PyTree) -> float:
    """The relative accuracy that b's coarsest leaf can hold: no residual is asked to be smaller."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(b))


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product <a, b>, accumulated in at least float32."""
    widen = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    return jnp.asarray(optax.tree.vdot(jax.tree.map(widen, a), jax.tree.map(widen, b)))


def norm(a: PyTree) -> jax.Array:
    """The norm ||a||."""
    return jnp.sqrt(dot(a, a))


def axpy(scalar: jax.typing.ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """The sum y + scalar x, in the dtypes of y."""
    return optax.tree.cast_like(optax.tree.add_scale(y, scalar, x), y)


def scaled(scalar: jax.typing.ArrayLike, x: PyTree) -> PyTree:
    """The product scalar x, in the dtypes of x."""
    return optax.tree.cast_like(optax.tree.scale(scalar, x), x)


def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """The quotient a / b, and 0 where b = 0 (an iteration that has converged or broken down then stands still)."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def damped(matvec: Matvec, damping: Any) -> Matvec:
    """The map v -> H v + damping v."""
    if isinstance(damping, float) and damping == 0.0:
        return matvec
    return lambda v: axpy(damping, v, matvec(v))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product a b in full precision: an accelerator's default for float32 keeps three digits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def flattener(b: PyTree) -> tuple[Callable[[PyTree], jax.Array], Callable[[jax.Array], PyTree]]:
    """(flatten, unflatten) between the space of b and vectors of its working precision."""
    dtype = working_dtype(b)
    widen = lambda tree: optax.tree.cast(tree, dtype)  # noqa: E731
    unravel = ravel_pytree(widen(b))[1]
    return lambda tree: ravel_pytree(widen(tree))[0].astype(dtype), lambda x: optax.tree.cast_like(unravel(x), b)


def block(multiply: Callable[[jax.Array], jax.Array], rows: jax.Array, batch: int = 256) -> jax.Array:
    """H applied to each row, in batches so that the memory stays that of `batch` products."""
    if len(rows) <= batch:
        return jax.vmap(multiply)(rows)
    return jax.lax.map(multiply, rows, batch_size=batch)


def start(matvec: Matvec, b: PyTree, v: PyTree) -> tuple[PyTree, PyTree]:
    """(v, b - H v) at the warm start v, or (0, b) where that residual is smaller.

    So a warm start is never worse than a cold one; it costs the one product that its residual needs anyway. v=None
    is a cold start and costs none.
    """
    if v is None:
        return optax.tree.zeros_like(b), b
    r = axpy(-1.0, matvec(v), b)
    helps = norm(r) <= norm(b)  # False when v holds a NaN: what a diverged step left behind is not a start
    return (
        jax.tree.map(lambda x: jnp.where(helps, x, jnp.zeros_like(x)), v),
        jax.tree.map(lambda x, y: jnp.where(helps, x, y), r, b),
    )


def iterate(unfinished: Callable[[S], jax.Array], step: Callable[[S], S], initial: S) -> S:
    """Repeat `step` while `unfinished`, which bounds the number of iterations.

    Also where the length is fixed: what has reached the precision of its dtype stands still, and a loop that ends there
    needs no selects to freeze it. Under `vmap` JAX freezes the members that have finished.
    """
    return jax.lax.while_loop(unfinished, step, initial)


# Solving.


Algorithm = Callable[[Matvec, PyTree, PyTree], tuple[PyTree, LinearInfo]]


def solve_normalised(algorithm: Algorithm, matvec: Matvec, b: PyTree, v: PyTree) -> tuple[PyTree, LinearInfo]:
    """Run an algorithm on b / s, with s the power of two next to max |b|.

    Exact, because the system is linear and s a power of two; and the squares of a gradient of size 1e-25 or 1e25 then
    neither vanish nor overflow in float32. A NaN or infinity in b makes s, and so all of v, NaN: it is not lost.
    """
    dtype = working_dtype(b)
    largest = jnp.stack([jnp.max(jnp.abs(x)).astype(dtype) for x in jax.tree.leaves(b) if x.size]).max()
    s = jnp.where(jnp.isfinite(largest), jnp.ldexp(jnp.ones((), dtype), jnp.frexp(largest)[1]), jnp.nan)
    v, info = algorithm(matvec, scaled(1 / s, b), None if v is None else scaled(1 / s, v))
    return scaled(s, v), dataclasses.replace(info, residual=s * info.residual)


def implicit_solve(
    matvec: Matvec,
    b: PyTree,
    solve: Callable[[Matvec, PyTree], tuple[PyTree, LinearInfo]],
    transpose_solve: Callable[[Matvec, PyTree], tuple[PyTree, LinearInfo]],
    symmetric: bool,
) -> tuple[PyTree, LinearInfo]:
    """Solve, with the derivative H dv = db - dH v of a solution: again a solve, in either mode and to any order.

    It is the derivative of the exact solution; `solve` itself is not differentiated, nor what it closes over. So a
    solve that is cut short by `max_steps` has a derivative that is cut short likewise.
    """
    v, info = jax.lax.custom_linear_solve(matvec, b, solve, transpose_solve, symmetric=symmetric, has_aux=True)
    return v, jax.lax.stop_gradient(jax.tree.map(jnp.array, info))


def report(residual: jax.Array, iterations: Any, negative_curvature: Any = False) -> LinearInfo:
    """A LinearInfo of arrays."""
    return LinearInfo(residual, jnp.asarray(iterations, jnp.int32), jnp.asarray(negative_curvature, bool))
