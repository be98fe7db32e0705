"""What all linear solvers share: types, the checks of what a caller gives, tree arithmetic, differentiation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel import derivatives
from bilevel._module import state
from bilevel._settings import settings
from bilevel.typing import PyTree

Matvec = Callable[[PyTree], PyTree]


@state
class LinearInfo:
    """What a linear solve reports about itself; arrays all three, so that it passes through `jit`, `vmap` and `scan`.

    Attributes:
      residual: the norm ||b - H v|| of the system that was solved (with `damping`, H is H + damping I), in the units
        of b; that of the solver's recursion where its docstring says so.
      iterations: int32, the number of iterations done; 0 where there are none (Dense, Nystrom, Identity).
      negative_curvature: bool, whether a direction p with p'Hp <= 0 was met; always False for non-symmetric systems.
    """

    residual: jax.Array
    iterations: jax.Array
    negative_curvature: jax.Array


@state
class LinearCarry:
    """All that a solver takes from one outer step to the next. It is never differentiated.

    Attributes:
      v: the last solution, where the next solve starts (None for solvers without warm start).
      preconditioner: the state of the preconditioner or of the sketch (None without one).
    """

    v: PyTree = None
    preconditioner: PyTree = None


class LinearSolver(Protocol):
    """A solver of H v = b: two pure methods, all that the rest of the package asks of one."""

    def init(self, b: PyTree) -> LinearCarry:
        """What the first solve starts from, for right-hand sides shaped like b."""

    def __call__(
        self, matvec: Matvec, b: PyTree, carry: LinearCarry | None = None
    ) -> tuple[PyTree, LinearCarry, LinearInfo]:
        """Solve matvec(v) = b; `carry=None` is a cold start."""


def check_numbers(self: Any) -> None:
    """The `__post_init__` of all here: refuse numbers and counts that are not positive, or a negative damping.

    None and a seed pass, and so does a tracer, which a hyperparameter may be inside a transformation.
    """
    for name, value in vars(self).items():
        if name == "seed" or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        given = f"{type(self).__name__}({name}={value!r}) was given, but {name} must be"
        if name == "damping" and not value >= 0:
            raise ValueError(f"{given} zero or positive.")
        if name != "damping" and not value > 0:
            cure = " For a fixed number of iterations use tol=None." if name == "tol" else ""
            raise ValueError(f"{given} positive.{cure}")
        if name == "tol" and value >= 1:
            raise ValueError(
                f"{given} below 1: it is what is left of |b|, as a share. A number of steps is max_steps={value:g}."
            )
    preconditioner = getattr(self, "preconditioner", None)
    if preconditioner is not None and not (hasattr(preconditioner, "update") and hasattr(preconditioner, "apply")):
        raise TypeError(
            f"{type(self).__name__}(preconditioner={preconditioner!r}): one of linear.Jacobi(), "
            "linear.NystromPreconditioner(...), linear.StaleCholesky() is expected, or None."
        )


class Solver:
    """The frame around every algorithm: what it is given is checked, and a system without unknowns is its own answer.

    A solver adds its hyperparameters, `_memory(b)`, what is carried besides v, where there is such, and
    `_solve(h, b, v, memory)`, which solves h(v) = b from the warm start v (None: cold) and returns v, memory and info.
    """

    warm_start: bool = False  # solvers that have one make it a field

    __post_init__ = check_numbers

    def init(self, b: PyTree) -> LinearCarry:
        """What the first solve starts from, for right-hand sides shaped like b."""
        b = as_vector(b)
        v = optax.tree.zeros_like(b) if self.warm_start else None
        return LinearCarry(v, self._memory(b) if size(b) else None)

    @settings()
    def __call__(
        self, matvec: Matvec, b: PyTree, carry: LinearCarry | None = None
    ) -> tuple[PyTree, LinearCarry, LinearInfo]:
        """Solve matvec(v) = b; returns v, the carry of the next solve, and the report. `carry=None` is a cold start."""
        if not callable(matvec):
            raise TypeError(
                f"{type(self).__name__} was given a {type(matvec).__name__} as its matvec: it takes a function "
                "v -> H v first and the right-hand side second; for a matrix write lambda v: H @ v."
            )
        if carry is not None and not hasattr(carry, "v"):
            raise TypeError(
                f"{type(self).__name__} was given a {type(carry).__name__} as its carry: that is what solver.init(b) "
                "or the last call returned; None is a cold start."
            )
        b = as_vector(b)
        warm = carry is not None and self.warm_start
        carry = jax.lax.stop_gradient(self.init(b) if carry is None else carry)
        if size(b) == 0:
            return b, carry, report(jnp.zeros((), working_dtype(b)), 0)
        if warm:
            given, expected = (jax.tree.map(jnp.shape, tree) for tree in (carry.v, b))
            if given != expected:
                raise ValueError(
                    f"{type(self).__name__} was given a carry whose v has shapes {given}, but b has shapes {expected}. "
                    "Make the carry with solver.init(b), or pass carry=None for a cold start."
                )
        v, memory, info = self._solve(checked(matvec, b), b, carry.v if warm else None, carry.preconditioner)
        carry = LinearCarry(jax.lax.stop_gradient(v) if self.warm_start else None, memory)
        return v, carry, jax.lax.stop_gradient(info)

    def _memory(self, b: PyTree) -> PyTree:
        return None

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, memory: PyTree) -> tuple[PyTree, PyTree, LinearInfo]:
        raise NotImplementedError


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
    return derivatives.dot(jax.tree.map(widen, a), jax.tree.map(widen, b))


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
    """(v, b - H v) at the warm start v, for one product, or (0, b) where that residual is smaller or v is None."""
    if v is None:
        return optax.tree.zeros_like(b), b
    r = axpy(-1.0, matvec(v), b)
    helps = norm(r) <= norm(b)  # False when v holds a NaN: what a diverged step left behind is not a start
    return optax.tree.where(helps, v, optax.tree.zeros_like(v)), optax.tree.where(helps, r, b)


def is_skew(matvec: Matvec, b: PyTree) -> jax.Array:
    """Whether two products tell that H is not symmetric: u'Hv and v'Hu differ beyond rounding for two random vectors.

    False for a NaN.
    """
    u, v = (optax.tree.random_like(jax.random.key(i), b, jax.random.normal) for i in (1, 2))
    forward, back = matvec(u), matvec(v)
    scale = norm(v) * norm(forward) + norm(u) * norm(back)
    return jnp.abs(dot(v, forward) - dot(u, back)) > epsilon(b) ** 0.5 * scale


# Solving.

Answer = tuple[PyTree, LinearInfo]
Solve = Callable[[Matvec, PyTree], Answer]
Algorithm = Callable[[Matvec, PyTree, PyTree], Answer]


def solve_normalised(algorithm: Algorithm, matvec: Matvec, b: PyTree, v: PyTree) -> Answer:
    """Run an algorithm on b / s, with s the power of two next to max |b| from below.

    That is exact, and the squares of a gradient of size 1e-25 or 1e25 then neither vanish nor overflow in float32. A
    NaN or infinity in b makes s, and so all of v, NaN: it is not lost.
    """
    dtype = working_dtype(b)
    largest = jnp.stack([jnp.max(jnp.abs(x)).astype(dtype) for x in jax.tree.leaves(b) if x.size]).max()
    s = jnp.where(jnp.isfinite(largest), _power_of_two(largest), jnp.nan)
    v, info = algorithm(matvec, scaled(1 / s, b), None if v is None else scaled(1 / s, v))
    return scaled(s, v), dataclasses.replace(info, residual=s * info.residual)


def _power_of_two(number: jax.Array) -> jax.Array:
    """The largest power of two that is at most the number (its exponent's bits alone); 1 below normal ones."""
    bits = jax.lax.bitcast_convert_type(number, f"uint{jnp.finfo(number.dtype).bits}")
    exponent = bits & np.array(np.inf, number.dtype).view(bits.dtype)
    return jnp.where(exponent > 0, jax.lax.bitcast_convert_type(exponent, number.dtype), 1)


def implicit_solve(h: Matvec, b: PyTree, solve: Solve, transpose_solve: Solve, symmetric: bool) -> Answer:
    """Solve, with the derivative H dv = db - dH v of the exact solution: again a solve, in either mode, to any order.

    `solve` is not differentiated, nor what it closes over: one that is cut short has a derivative cut short likewise.
    """
    v, info = jax.lax.custom_linear_solve(h, b, solve, transpose_solve, symmetric=symmetric, has_aux=True)
    return v, jax.tree.map(jnp.array, info)


def report(residual: jax.Array, iterations: Any, negative_curvature: Any = False) -> LinearInfo:
    """A LinearInfo of arrays."""
    return LinearInfo(residual, jnp.asarray(iterations, jnp.int32), jnp.asarray(negative_curvature, bool))


def equilibration(matrix: jax.Array, symmetric: bool) -> tuple[jax.Array, jax.Array]:
    """Powers of two (r, c) that bring the largest entry of every row and column of diag(r) A diag(c) near 1.

    An eigenvalue or singular value below the rounding error of the largest tells nothing: where unknowns have units
    that far apart, only in units of their own do small ones show. r = c for a symmetric A; both are ones where the
    largest entries of the rows (and columns) are within a factor of 256: rounding then hides nothing, and least norms
    are those of the unknowns as they are. Rows and columns of zeros keep 1.

    The steps are Ruiz's where A is not symmetric; else each a_ii is brought to 1, or (max_j |a_ij|)^2 / max |A| where
    that is more, which in a definite A it is not.

    Reference: Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices", RAL-TR-2001-034.
    """
    ones = jnp.ones(len(matrix), matrix.dtype)
    if len(matrix) == 1:
        return ones, ones
    some = lambda largest: jnp.where(largest > 0, largest, 1)  # noqa: E731
    tiny = float(jnp.finfo(matrix.dtype).tiny) ** 0.5

    def apart(largest: jax.Array) -> jax.Array:
        return jnp.max(largest) > 256 * jnp.min(jnp.where(largest > 0, largest, jnp.inf))

    def rounded(wide: jax.Array, scales: jax.Array) -> jax.Array:
        return jnp.where(wide, _power_of_two(jnp.clip(scales, tiny, 1 / tiny)), 1)

    if symmetric:
        s = ones
        wide = apart(jnp.max(jnp.abs(matrix), 1))
        for _ in range(2):
            size = jnp.abs(matrix * s[:, None] * s)
            largest = jnp.max(size, 1)
            s = s / jnp.sqrt(some(jnp.maximum(jnp.diagonal(size), largest * (largest / some(jnp.max(largest))))))
        s = rounded(wide, s)
        return s, s

    def once(_: Any, scales: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        r, c = scales
        size = jnp.abs(matrix * r[:, None] * c)
        r, c = r / jnp.sqrt(some(jnp.max(size, 1))), c / jnp.sqrt(some(jnp.max(size, 0)))
        return jnp.clip(r, tiny, 1 / tiny), jnp.clip(c, tiny, 1 / tiny)

    wide = apart(jnp.max(jnp.abs(matrix), 1)) | apart(jnp.max(jnp.abs(matrix), 0))
    r, c = jax.lax.fori_loop(0, 8, once, (ones, ones))
    return rounded(wide, r), rounded(wide, c)


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ascending eigenvalues and eigenvectors in columns, as `jnp.linalg.eigh`; of one or two unknowns in closed form.

    The first programme with an eigenvalue routine makes jaxlib import SciPy's, much of a small problem's first answer.
    """
    if matrix.shape[0] > 2:
        return jnp.linalg.eigh(matrix)
    if matrix.shape[0] < 2:
        return matrix.reshape(-1), jnp.ones_like(matrix)
    a, b, c = matrix[0, 0], matrix[0, 1], matrix[1, 1]
    radius, angle = jnp.hypot((a - c) / 2, b), jnp.arctan2(2 * b, a - c) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (a + c) / 2 + jnp.stack([-radius, radius]), jnp.stack([jnp.stack([-sin, cos]), jnp.stack([cos, sin])])
