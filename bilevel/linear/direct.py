"""Solvers that build (part of) the matrix: a dense factorisation, and the Nystrom approximation of the inverse."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from bilevel._module import hyperparameters
from bilevel.linear._common import (
    Answer,
    LinearInfo,
    Matvec,
    Solver,
    axpy,
    damped,
    flattener,
    implicit_solve,
    matmul,
    norm,
    report,
    size,
    solve_normalised,
)
from bilevel.linear.preconditioners import LowRank, check_size, dense_matrix, random_low_rank, refreshed, unbuilt
from bilevel.typing import PyTree


@hyperparameters
class Dense(Solver):
    """Factorise the matrix: exact, for d up to a few hundred unknowns (more if products are cheap).

    d products (batched), d^3/3 operations for a symmetric matrix and twice that otherwise, d^2 memory; one product
    for the residual (under `jit` only if it is used). A symmetric matrix gets a Cholesky factor or, being indefinite
    (`info.negative_curvature` is then True), an LU factor. The derivative reuses it. Over a mesh every device has the
    whole matrix and b.

    Attributes:
      symmetric: whether H' = H is to be expected, up to rounding: such a matrix is made symmetric exactly. Where H and
        H' turn out to differ by more than 1e3 d eps (or sqrt(eps), if that is more) of H, it is solved as it is, by an
        LU factor. False: always that.
      damping: solve (H + damping I) v = b.
      max_size: the largest d that it accepts.
    """

    symmetric: bool = True
    damping: float = 0.0
    max_size: int = 2000

    def _memory(self, b: PyTree) -> None:
        cure = "Use a matrix-free solver (CG if symmetric, else GMRES), or raise max_size if d^2 memory is affordable."
        check_size("Dense", b, self.max_size, cure)

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, memory: PyTree) -> tuple[PyTree, PyTree, LinearInfo]:
        self._memory(b)
        h = damped(h, self.damping)
        flatten, unflatten = flattener(b)
        matrix = dense_matrix(h, b)
        order = jnp.arange(size(b), dtype=jnp.int32)

        if self.symmetric:
            eps = float(jnp.finfo(matrix.dtype).eps)
            rounding = max(1e3 * len(matrix) * eps, eps**0.5) * jnp.linalg.norm(matrix)
            even = ~(jnp.linalg.norm(matrix - matrix.T) > rounding)  # True for a NaN, which then shows in v
            cholesky = jnp.linalg.cholesky((matrix + matrix.T) / 2)
            definite = even & (jnp.all(jnp.isfinite(cholesky)) | ~jnp.all(jnp.isfinite(matrix)))
            matrix = jnp.where(even, (matrix + matrix.T) / 2, matrix)
            factor = jax.lax.cond(definite, lambda: (cholesky, order), lambda: _lu(matrix))
        else:
            even, definite = jnp.bool_(False), jnp.bool_(False)
            factor = _lu(matrix)

        def solve(h: Matvec, b: PyTree, transpose: bool) -> Answer:
            x = flatten(b)
            lu = lambda: jax.scipy.linalg.lu_solve(factor, x, trans=int(transpose))  # noqa: E731
            if self.symmetric:
                x = jax.lax.cond(definite, lambda: jax.scipy.linalg.cho_solve((factor[0], True), x), lu)
            else:
                x = lu()
            v = unflatten(x)
            return v, report(norm(axpy(-1.0, h(v), b)), 0, even & ~definite)

        forward, transposed = functools.partial(solve, transpose=False), functools.partial(solve, transpose=True)
        v, info = implicit_solve(h, b, forward, transposed, symmetric=False)
        return v, memory, info


def _lu(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    factor, pivots = jax.scipy.linalg.lu_factor(matrix)
    return factor, pivots.astype(jnp.int32)


@hyperparameters
class Nystrom(Solver):
    """The approximation v = (H_k + rho I)^-1 b in closed form, H_k the rank-k Nystrom approximation of an H >= 0.

    With C = H[:, K] for k of the columns and W = C[K], H_k = C W^+ C' and (the Woodbury identity) v = b/rho - C (W +
    C'C/rho)^-1 C'b / rho^2. It is evaluated from the eigenpairs (l, U) of H_k as U' (l + rho)^-1 U b + (b - U'U b) /
    rho, which is the same and loses no digits when rho is small. k products per build; one for the residual, which is
    that of (H + rho I) v = b (under `jit` only if it is used).

    Outside the k directions v is b / rho. For accuracy use `CG(preconditioner=NystromPreconditioner(...))`. The k
    directions are a matrix of k rows of length d, which over a mesh every device has whole.

    Attributes:
      rank: k, at most d; 10 as in Hataya and Yamada.
      rho: the damping, which must be positive; 0.01 as in Hataya and Yamada.
      sketch: "columns" (theirs: k random unit vectors) or "gaussian" (a random subspace, which sees every column).
      refresh: solves between two builds; 1 is theirs.
      seed: of the random choice, drawn anew for every build.

    Where H is indefinite its negative part is cut off and `info.negative_curvature` says so at the solves that build.
    Derivatives are those of a solution of (H + rho I) v = b, with the approximate inverse.

    Reference: Hataya and Yamada (2023), "Nystrom method for accurate and scalable implicit differentiation", AISTATS.
    """

    symmetric: ClassVar[bool] = True  # and positive semidefinite, which the approximation takes H to be

    rank: int = 10
    rho: float = 0.01
    sketch: str = "columns"
    refresh: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sketch not in ("columns", "gaussian"):
            raise ValueError(f'Nystrom(sketch={self.sketch!r}) was given, but sketch must be "columns" or "gaussian".')

    def _memory(self, b: PyTree) -> PyTree:
        return unbuilt(functools.partial(self._build, lambda v: v, b))

    def _build(self, h: Matvec, b: PyTree, count: jax.Array) -> LowRank:
        return random_low_rank(self, h, b, count, columns=self.sketch == "columns")

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, memory: PyTree) -> tuple[PyTree, PyTree, LinearInfo]:
        memory = refreshed(memory, self.refresh, functools.partial(self._build, h, b))
        u, eigenvalues, negative = memory.arrays
        flatten, unflatten = flattener(b)

        def apply(h: Matvec, b: PyTree, v: None) -> Answer:
            x = flatten(b)
            inside = matmul(u, x)
            outside = x - matmul(inside, u)
            outside = outside - matmul(matmul(u, outside), u)  # twice: its rounding error is about to be divided by rho
            rho = jnp.asarray(self.rho, x.dtype)
            solution = unflatten(matmul(inside / (eigenvalues + rho), u) + outside / rho)
            return solution, report(norm(axpy(-1.0, h(solution), b)), 0, negative)

        solve = lambda h, b: solve_normalised(apply, h, b, None)  # noqa: E731
        v, info = implicit_solve(damped(h, self.rho), b, solve, solve, symmetric=True)
        return v, memory, info
