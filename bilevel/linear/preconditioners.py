"""Preconditioners that outlive an outer step.

Between two outer steps of a bilevel method the Hessian H moves little, so what is learnt about it once serves many
solves. Each preconditioner here builds its arrays from products with H, keeps them in the solver's carry and rebuilds
them every `refresh` solves (`refresh=None`: never). Between two builds it costs no product at all.

All three are symmetric and positive definite whatever H is, so that CG and MINRES may use them also where H turns
out to be indefinite; how well they serve there is another matter. They are not differentiated: a preconditioner
changes the road to the solution and not the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from bilevel._module import hyperparameters, state
from bilevel.linear._common import (
    Matvec,
    block,
    check_not_negative,
    check_positive,
    flattener,
    matmul,
    size,
    working_dtype,
)
from bilevel.typing import PyTree


@state
class PreconditionerState:
    """A preconditioner's memory.

    Attributes:
      count: int32, the solves so far; the arrays are rebuilt when it is a multiple of `refresh`.
      arrays: what was built from H.
    """

    count: jax.Array
    arrays: PyTree


class Preconditioner(Protocol):
    """What CG and MINRES ask of a preconditioner P ~ H; a class of one's own with these methods works too."""

    def init(self, b: PyTree) -> PreconditionerState:
        """Memory before the first solve, of the shapes that `update` returns."""
        ...

    def update(self, matvec: Matvec, b: PyTree, memory: PreconditionerState) -> PreconditionerState:
        """Memory for the coming solve, rebuilt from matvec when it is due."""
        ...

    def apply(self, memory: PreconditionerState, r: PyTree) -> PyTree:
        """P^-1 r; symmetric positive definite."""
        ...


def refreshed(
    memory: PreconditionerState, refresh: int | None, build: Callable[[jax.Array], PyTree]
) -> PreconditionerState:
    """Rebuild when due. `build(count)` gets the number of solves so far, as the seed's companion.

    The choice is a `lax.cond`: a build that isn't due costs nothing, except under a `vmap` over the memory itself,
    where JAX evaluates both branches.
    """
    due = memory.count == 0 if refresh is None else memory.count % refresh == 0
    arrays = jax.lax.cond(due, build, lambda _: memory.arrays, memory.count)
    return PreconditionerState(memory.count + 1, jax.lax.stop_gradient(arrays))


def flat_matvec(matvec: Matvec, b: PyTree) -> Callable[[jax.Array], jax.Array]:
    """H as a map of vectors, cut off from differentiation."""
    flatten, unflatten = flattener(b)
    return lambda x: jax.lax.stop_gradient(flatten(matvec(unflatten(x))))


def dense_matrix(matvec: Matvec, b: PyTree) -> jax.Array:
    """H as a [d, d] array, by d products with unit vectors."""
    return block(flat_matvec(matvec, b), jnp.eye(size(b), dtype=working_dtype(b))).T


def check_size(owner: str, d: int, bound: int, cure: str) -> None:
    """Refuse a dense computation above a bound."""
    if d > bound:
        raise ValueError(f"{owner} was given a system of {d} unknowns, but its max_size is {bound}. {cure}")


@hyperparameters
class Jacobi:
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

    def __post_init__(self) -> None:
        check_positive("Jacobi", refresh=self.refresh, probes=self.probes, max_size=self.max_size)

    def init(self, b: PyTree) -> PreconditionerState:
        """A diagonal of ones, to be built at the first solve."""
        if self.probes is None:
            cure = (
                "Estimate the diagonal instead, with Jacobi(probes=20), or raise max_size if d products are affordable."
            )
            check_size("Jacobi", size(b), self.max_size, cure)
        return PreconditionerState(jnp.zeros((), jnp.int32), jnp.ones(size(b), working_dtype(b)))

    def update(self, matvec: Matvec, b: PyTree, memory: PreconditionerState) -> PreconditionerState:
        """A new diagonal when due."""
        multiply = flat_matvec(matvec, b)
        d, dtype = size(b), working_dtype(b)

        def build(count: jax.Array) -> jax.Array:
            if self.probes is None:
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

        return refreshed(memory, self.refresh, build)

    def apply(self, memory: PreconditionerState, r: PyTree) -> PyTree:
        """The quotient r / diagonal."""
        flatten, unflatten = flattener(r)
        return unflatten(flatten(r) / memory.arrays)


def low_rank(multiply: Callable[[jax.Array], jax.Array], test: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The Nystrom approximation H ~ U' diag(l) U from the products Y = H T' with the orthonormal rows T of `test`.

    Y' (T Y)^-1 Y by the symmetric square root of T Y = T H T', shifted by the rounding error of Y and cut to its
    positive part; so it is finite, and positive semidefinite, also where H is indefinite.

    Returns:
      U of shape [k, d] with orthonormal rows, l of shape [k] in descending order, and whether T H T' had a
      negative eigenvalue beyond rounding.

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


def gaussian_test(key: jax.Array, k: int, d: int, dtype: jnp.dtype) -> jax.Array:
    """Orthonormal rows, k of them, that span a Gaussian random subspace."""
    return jnp.linalg.qr(jax.random.normal(key, (d, k), dtype))[0].T


@hyperparameters
class NystromPreconditioner:
    """The map P^-1 = I + U'[(l_k + mu) / (l + mu) - 1]U: for spectra with a few large eigenvalues.

    The k = `rank` leading eigenpairs (l, U) of H are approximated from k products with a random subspace; P brings them
    down to the smallest of them, l_k, and leaves the rest alone.

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

    def __post_init__(self) -> None:
        check_positive("NystromPreconditioner", rank=self.rank, refresh=self.refresh)
        check_not_negative("NystromPreconditioner", damping=self.damping)

    def init(self, b: PyTree) -> PreconditionerState:
        """An empty sketch, to be built at the first solve."""
        d, dtype = size(b), working_dtype(b)
        check_rank("NystromPreconditioner", self.rank, d)
        return PreconditionerState(
            jnp.zeros((), jnp.int32), (jnp.zeros((self.rank, d), dtype), jnp.zeros(self.rank, dtype))
        )

    def update(self, matvec: Matvec, b: PyTree, memory: PreconditionerState) -> PreconditionerState:
        """A new sketch when due."""
        multiply = flat_matvec(matvec, b)

        def build(count: jax.Array) -> tuple[jax.Array, jax.Array]:
            key = jax.random.fold_in(jax.random.key(self.seed), count)
            u, eigenvalues, _ = low_rank(multiply, gaussian_test(key, self.rank, size(b), working_dtype(b)))
            return u, eigenvalues

        return refreshed(memory, self.refresh, build)

    def apply(self, memory: PreconditionerState, r: PyTree) -> PyTree:
        """The vector r + U'(weight - 1)U r, weight one in the directions that the sketch did not resolve."""
        u, eigenvalues = memory.arrays
        resolved = eigenvalues > jnp.finfo(eigenvalues.dtype).eps * eigenvalues[0]
        smallest = jnp.min(jnp.where(resolved, eigenvalues, jnp.inf))
        weight = jnp.where(resolved, (smallest + self.damping) / jnp.where(resolved, eigenvalues + self.damping, 1), 1)
        flatten, unflatten = flattener(r)
        x = flatten(r)
        return unflatten(x + matmul((weight.astype(x.dtype) - 1) * matmul(u, x), u))


def check_rank(owner: str, rank: int, d: int) -> None:
    """Refuse a sketch of more columns than unknowns."""
    if rank > d:
        raise ValueError(
            f"{owner}(rank={rank}) was given a system of only {d} unknowns: rank counts products with random "
            f"directions and must be at most {d}. For so small a system use Dense() or StaleCholesky()."
        )


@hyperparameters
class StaleCholesky:
    """The Cholesky factorisation P = L L' of an H of some solves ago: for d up to a few hundred, any conditioning.

    A build costs d products (batched) and d^3/3 operations; afterwards a solve needs only what H has moved
    since. Where the factor does not exist (H not positive definite at the build) P is the identity.

    Attributes:
      refresh: solves between two builds, None for a single build. The default is long because a build costs d products.
      max_size: the largest d that it accepts; the factor has d^2 entries.
    """

    refresh: int | None = 100
    max_size: int = 2000

    def __post_init__(self) -> None:
        check_positive("StaleCholesky", refresh=self.refresh, max_size=self.max_size)

    def init(self, b: PyTree) -> PreconditionerState:
        """The identity's factor, to be built at the first solve."""
        cure = "Use NystromPreconditioner() or Jacobi(probes=20), or raise max_size if d^2 memory is affordable."
        check_size("StaleCholesky", size(b), self.max_size, cure)
        return PreconditionerState(jnp.zeros((), jnp.int32), jnp.eye(size(b), dtype=working_dtype(b)))

    def update(self, matvec: Matvec, b: PyTree, memory: PreconditionerState) -> PreconditionerState:
        """A new factor when due."""

        def build(_: jax.Array) -> jax.Array:
            h = dense_matrix(matvec, b)
            factor = jnp.linalg.cholesky((h + h.T) / 2)
            return jnp.where(jnp.all(jnp.isfinite(factor)), factor, jnp.eye(len(h), dtype=h.dtype))

        return refreshed(memory, self.refresh, build)

    def apply(self, memory: PreconditionerState, r: PyTree) -> PyTree:
        """The vector L'^-1 L^-1 r."""
        flatten, unflatten = flattener(r)
        return unflatten(jax.scipy.linalg.cho_solve((memory.arrays, True), flatten(r)))
