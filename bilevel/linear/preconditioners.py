"""Preconditioners that outlive an outer step.

Between two outer steps of a bilevel method the Hessian H moves little, so what is learnt about it once serves many
solves. Each preconditioner here builds its arrays from products with H, keeps them in the solver's carry and rebuilds
them every `refresh` solves (`refresh=None`: never). Between two builds it costs no product at all.

All three are symmetric and positive definite whatever H is, so that CG and MINRES may use them also where H turns
out to be indefinite. They are not differentiated: they change the road to the solution and not the solution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters, state
from bilevel.linear._common import Matvec, block, check_numbers, flattener, matmul, size, working_dtype
from bilevel.typing import PyTree


@state
class PreconditionerState:
    """A preconditioner's memory: the solves so far (int32), and what was built from H at a multiple of `refresh`."""

    count: jax.Array
    arrays: PyTree


class Preconditioner(Protocol):
    """What CG and MINRES ask of a preconditioner P ~ H; a class of one's own with these methods works too."""

    def init(self, b: PyTree) -> PreconditionerState:
        """Memory before the first solve, of the shapes that `update` returns."""

    def update(self, matvec: Matvec, b: PyTree, memory: PreconditionerState) -> PreconditionerState:
        """Memory for the coming solve, rebuilt from matvec when it is due."""

    def apply(self, memory: PreconditionerState, r: PyTree) -> PyTree:
        """P^-1 r; symmetric positive definite."""


Multiply = Callable[[jax.Array], jax.Array]
Build = Callable[[jax.Array], PyTree]


def unbuilt(build: Build) -> PreconditionerState:
    """Memory before the first solve, which builds; zeros of the shapes that `build` returns."""
    count = jnp.zeros((), jnp.int32)
    return PreconditionerState(count, optax.tree.zeros_like(jax.eval_shape(build, count)))


def refreshed(memory: PreconditionerState, refresh: int | None, build: Build) -> PreconditionerState:
    """Memory for the coming solve, built anew when due; `build` gets the number of solves so far.

    The choice is a `lax.cond`: a build that isn't due costs nothing, except under a `vmap` over the memory itself,
    where JAX evaluates both branches.
    """
    due = memory.count == 0 if refresh is None else memory.count % refresh == 0
    arrays = jax.lax.cond(due, build, lambda _: memory.arrays, memory.count)
    return PreconditionerState(memory.count + 1, jax.lax.stop_gradient(arrays))


def flat_matvec(matvec: Matvec, b: PyTree) -> Multiply:
    """H as a map of vectors, cut off from differentiation."""
    flatten, unflatten = flattener(b)
    return lambda x: jax.lax.stop_gradient(flatten(matvec(unflatten(x))))


def dense_matrix(matvec: Matvec, b: PyTree) -> jax.Array:
    """H as a [d, d] array, by d products with unit vectors."""
    return block(flat_matvec(matvec, b), jnp.eye(size(b), dtype=working_dtype(b))).T


def check_size(owner: str, b: PyTree, bound: int, cure: str) -> None:
    """Refuse a dense computation above a bound."""
    if size(b) > bound:
        raise ValueError(f"{owner} was given a system of {size(b)} unknowns, but its max_size is {bound}. {cure}")


class Refreshed:
    """The frame around the preconditioners here: memory that is rebuilt when due, and vectors in place of pytrees.

    One adds `_build(matvec, b, count)`, the arrays built after `count` solves, or a refusal of b, and
    `_apply(arrays, x)`, the vector P^-1 x.
    """

    refresh: int | None

    __post_init__ = check_numbers

    def init(self, b: PyTree) -> PreconditionerState:
        """Memory before the first solve."""
        return unbuilt(functools.partial(self._build, lambda v: v, b))

    def update(self, matvec: Matvec, b: PyTree, memory: PreconditionerState) -> PreconditionerState:
        """Memory for the coming solve, rebuilt when it is due."""
        return refreshed(memory, self.refresh, functools.partial(self._build, matvec, b))

    def apply(self, memory: PreconditionerState, r: PyTree) -> PyTree:
        """P^-1 r."""
        flatten, unflatten = flattener(r)
        return unflatten(self._apply(memory.arrays, flatten(r)))

    def _build(self, matvec: Matvec, b: PyTree, count: jax.Array) -> PyTree:
        raise NotImplementedError

    def _apply(self, arrays: PyTree, x: jax.Array) -> jax.Array:
        raise NotImplementedError


@hyperparameters
class Jacobi(Refreshed):
    """The diagonal P = diag(|H_ii|): for systems whose conditioning comes from the scales of the variables.

    With `probes=None` the diagonal is exact and costs d products (batched) per build. With k probes it is
    Hutchinson's estimate mean_j z_j * (H z_j), z_j random signs, for k products; entries below their own standard
    error are raised to it, since a diagonal that is only noise is no scale to divide by. The estimate's variance in
    entry i is the sum of H_im^2 over m != i: it serves where H is nearly diagonal, and can harm elsewhere.

    Attributes:
      refresh: solves between two builds, None for a single build. The default is long because a build costs d products.
      probes: None for the exact diagonal, or the number of random probes.
      max_size: the largest d for which the exact diagonal is computed.
      seed: of the probes.

    Reference: Bekas, Kokiopoulou and Saad (2007), "An estimator for the diagonal of a matrix", Applied Numerical
    Mathematics 57.
    """

    refresh: int | None = 100
    probes: int | None = None
    max_size: int = 2000
    seed: int = 0

    def _build(self, matvec: Matvec, b: PyTree, count: jax.Array) -> jax.Array:
        d, dtype, multiply = size(b), working_dtype(b), flat_matvec(matvec, b)
        if self.probes is None:
            cure = "Estimate the diagonal instead, with Jacobi(probes=20), or raise max_size if d products are"
            check_size("Jacobi", b, self.max_size, f"{cure} affordable.")
            # one entry of each product: the [d, d] array need not exist
            diagonal = block(lambda e: jnp.sum(e * multiply(e)), jnp.eye(d, dtype=dtype))
        else:
            key = jax.random.fold_in(jax.random.key(self.seed), count)
            z = jax.random.rademacher(key, (self.probes, d), dtype)
            samples = z * block(multiply, z)
            diagonal = jnp.maximum(jnp.abs(samples.mean(0)), samples.std(0) / jnp.sqrt(float(self.probes)))
        diagonal = jnp.abs(diagonal)
        floor = jnp.finfo(dtype).eps * diagonal.max()
        diagonal = jnp.where(diagonal > floor, diagonal, jnp.where(floor > 0, floor, 1))
        return jnp.where(jnp.isfinite(diagonal), diagonal, 1).astype(dtype)

    def _apply(self, arrays: jax.Array, x: jax.Array) -> jax.Array:
        return x / arrays


LowRank = tuple[jax.Array, jax.Array, jax.Array]


def low_rank(multiply: Multiply, test: jax.Array) -> LowRank:
    """The Nystrom approximation H ~ U' diag(l) U from the products Y = H T' with the orthonormal rows T of `test`.

    Y' (T Y)^-1 Y by the symmetric square root of T Y = T H T', shifted by the rounding error of Y and cut to its
    positive part; so it is finite, and positive semidefinite, also where H is indefinite. Returns U of shape [k, d]
    with orthonormal rows, l of shape [k], descending, and whether T H T' had a negative eigenvalue beyond rounding.

    Reference: Frangella, Tropp and Udell (2023), "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 44,
    Algorithm 2.1 (with an eigendecomposition where they have a Cholesky factor).
    """
    k, d = test.shape
    y = block(multiply, test)
    y = jnp.where(jnp.isfinite(y), y, 0)
    eps = jnp.finfo(y.dtype).eps
    shift = eps * jnp.sqrt(float(d)) * jnp.linalg.norm(y)
    y = y + shift * test
    core = matmul(test, y.T)
    w, q = jnp.linalg.eigh((core + core.T) / 2)
    cut = k * eps * jnp.max(jnp.abs(w))
    root = jnp.where(w > cut, jax.lax.rsqrt(jnp.where(w > cut, w, 1)), 0)
    _, s, u = jnp.linalg.svd(root[:, None] * matmul(q.T, y), full_matrices=False)
    return u, jnp.maximum(s**2 - shift, 0), jnp.any(w < -cut)


def random_low_rank(owner: Any, matvec: Matvec, b: PyTree, count: jax.Array, columns: bool = False) -> LowRank:
    """`low_rank` of H by products with `owner.rank` random directions, drawn anew after each `count` of solves.

    They span a Gaussian random subspace, or are unit vectors that pick columns of H.
    """
    d, dtype, key = size(b), working_dtype(b), jax.random.fold_in(jax.random.key(owner.seed), count)
    if owner.rank > d:
        raise ValueError(
            f"{type(owner).__name__}(rank={owner.rank}) was given a system of only {d} unknowns: rank counts products "
            f"with random directions and must be at most {d}. For so small a system use Dense() or StaleCholesky()."
        )
    if columns:
        test = jax.nn.one_hot(jax.random.choice(key, d, (owner.rank,), replace=False), d, dtype=dtype)
    else:
        test = jnp.linalg.qr(jax.random.normal(key, (d, owner.rank), dtype))[0].T
    return low_rank(flat_matvec(matvec, b), test)


@hyperparameters
class NystromPreconditioner(Refreshed):
    """The map P^-1 = I + U'[(l_k + mu) / (l + mu) - 1]U: for spectra with a few large eigenvalues.

    The k = `rank` leading eigenpairs (l, U) of H are approximated from k products with a random subspace; P brings them
    down to the smallest of them, l_k, and leaves the rest alone. U is a matrix of k rows of length d, which over a mesh
    every device has whole.

    Attributes:
      rank: the number of products per build, at most d.
      refresh: solves between two builds, None for a single build.
      damping: mu. The solver's own `damping` is already part of the H seen here, so zero is the right value unless
        the approximation is known to be coarse.
      seed: of the random subspaces; each build draws a new one.

    Reference: Frangella, Tropp and Udell (2023), "Randomized Nystrom preconditioning", SIAM J. Matrix Anal. Appl. 44.
    """

    rank: int = 20
    refresh: int | None = 10
    damping: float = 0.0
    seed: int = 0

    def _build(self, matvec: Matvec, b: PyTree, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        return random_low_rank(self, matvec, b, count)[:2]

    def _apply(self, arrays: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        u, eigenvalues = arrays
        resolved = eigenvalues > jnp.finfo(eigenvalues.dtype).eps * eigenvalues[0]
        smallest = jnp.min(jnp.where(resolved, eigenvalues, jnp.inf))
        # one in the directions that the sketch did not resolve
        weight = jnp.where(resolved, (smallest + self.damping) / jnp.where(resolved, eigenvalues + self.damping, 1), 1)
        return x + matmul((weight.astype(x.dtype) - 1) * matmul(u, x), u)


@hyperparameters
class StaleCholesky(Refreshed):
    """The Cholesky factorisation P = L L' of an H of some solves ago: for d up to a few hundred, any conditioning.

    A build costs d products (batched) and d^3/3 operations; afterwards a solve needs only what H has moved
    since. Where the factor does not exist (H not positive definite at the build) P is the identity. Over a mesh every
    device has the whole factor.

    Attributes:
      refresh: solves between two builds, None for a single build. The default is long because a build costs d products.
      max_size: the largest d that it accepts; the factor has d^2 entries.
    """

    refresh: int | None = 100
    max_size: int = 2000

    def _build(self, matvec: Matvec, b: PyTree, count: jax.Array) -> jax.Array:
        cure = "Use NystromPreconditioner() or Jacobi(probes=20), or raise max_size if d^2 memory is affordable."
        check_size("StaleCholesky", b, self.max_size, cure)
        h = dense_matrix(matvec, b)
        factor = jnp.linalg.cholesky((h + h.T) / 2)
        return jnp.where(jnp.all(jnp.isfinite(factor)), factor, jnp.eye(len(h), dtype=h.dtype))

    def _apply(self, arrays: jax.Array, x: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve((arrays, True), x)
