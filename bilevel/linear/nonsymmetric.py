"""Solvers for systems that need not be symmetric, such as I - dPhi/dy of a fixed-point map Phi.

Their derivatives use the transposed system, which JAX derives from the matvec; so the matvec must be built of
operations that JAX can transpose (a `jvp` or a linearised function is).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bilevel._module import hyperparameters
from bilevel.linear._common import (
    LinearInfo,
    Matvec,
    axpy,
    check_positive,
    dot,
    epsilon,
    flattener,
    iterate,
    matmul,
    norm,
    ratio,
    report,
    size,
    start,
    working_dtype,
)
from bilevel.linear.krylov import Krylov, residual_target
from bilevel.typing import PyTree


@hyperparameters
class GMRES(Krylov):
    """Restarted GMRES: the v that minimises ||b - H v|| over a Krylov space of at most `restart` dimensions, repeated.

    One product per iteration and one per restart, for the true residual (so `info.residual` is exact); memory restart
    * d. The basis is orthogonalised twice (classical Gram-Schmidt, two dense products per iteration, which a GPU
    likes). It ends early when a restart brings no gain, be it that precision is reached or that it stagnates.

    Attributes: `tol`, `max_steps` (iterations in all), `warm_start` and `damping` as for `CG`; tol=None iterates to
      the precision of the dtype, at most `max_steps` times.
      restart: dimensions of a Krylov space; 20 as in `jax.scipy.sparse.linalg.gmres`.

    Reference: Saad and Schultz (1986), "GMRES: a generalized minimal residual algorithm for solving nonsymmetric
    linear systems", SIAM J. Sci. Stat. Comput. 7.
    """

    symmetric: ClassVar[bool] = False

    restart: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("GMRES", restart=self.restart)

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: None) -> tuple[PyTree, LinearInfo]:
        target, eps, dtype = residual_target(self.tol, b), epsilon(b), working_dtype(b)
        flatten, unflatten = flattener(b)
        d = size(b)
        m = min(self.restart, d, self.max_steps)

        class Arnoldi(NamedTuple):
            basis: jax.Array  # [m + 1, d], orthonormal rows, zero from row j + 1 on
            triangle: jax.Array  # [m, m], R of the Hessenberg matrix's QR, ones on the diagonal from column j on
            rotations: jax.Array  # [m + 1, m + 1], Q' of it
            j: jax.Array
            residual: jax.Array

        def arnoldi(r: jax.Array, k: jax.Array) -> tuple[jax.Array, Arnoldi]:
            beta = jnp.linalg.norm(r)

            def unfinished(s: Arnoldi) -> jax.Array:
                return (s.j < m) & (k + s.j < self.max_steps) & (s.residual > target)

            def step(s: Arnoldi) -> Arnoldi:
                w = flatten(h(unflatten(s.basis[s.j])))
                length = jnp.linalg.norm(w)
                first = matmul(s.basis, w)
                w = w - matmul(first, s.basis)
                second = matmul(s.basis, w)
                w = w - matmul(second, s.basis)
                rest = jnp.linalg.norm(w)
                rest = jnp.where(rest <= eps * length, 0, rest)  # the Krylov space is invariant: the solution is in it
                column = matmul(s.rotations, (first + second).at[s.j + 1].set(rest))
                a, c = column[s.j], column[s.j + 1]
                diagonal = jnp.hypot(a, c)
                cos, sin = jnp.where(diagonal == 0, 1, ratio(a, diagonal)), ratio(c, diagonal)
                upper, lower = s.rotations[s.j], s.rotations[s.j + 1]
                rotations = s.rotations.at[s.j].set(cos * upper + sin * lower)
                rotations = rotations.at[s.j + 1].set(cos * lower - sin * upper)
                triangle = s.triangle.at[:, s.j].set(jnp.where(jnp.arange(m) < s.j, column[:m], 0))
                triangle = triangle.at[s.j, s.j].set(diagonal)
                return Arnoldi(
                    s.basis.at[s.j + 1].set(ratio(w, rest)),
                    triangle,
                    rotations,
                    s.j + 1,
                    beta * jnp.abs(rotations[s.j + 1, 0]),
                )

            basis = jnp.zeros((m + 1, d), dtype).at[0].set(ratio(r, beta))
            initial = Arnoldi(basis, jnp.eye(m, dtype=dtype), jnp.eye(m + 1, dtype=dtype), jnp.int32(0), beta)
            s = jax.lax.while_loop(unfinished, step, initial)
            # a zero on the diagonal: H is singular on the space, and that direction is left out
            solvable = (jnp.arange(m) < s.j) & (jnp.diagonal(s.triangle) != 0)
            g = jnp.where(solvable, beta * s.rotations[:m, 0], 0)
            triangle = s.triangle + jnp.diag(jnp.where(jnp.diagonal(s.triangle) == 0, 1, 0).astype(dtype))
            return matmul(jax.scipy.linalg.solve_triangular(triangle, g), s.basis[:m]), s

        class State(NamedTuple):
            v: PyTree
            r: PyTree
            norm: jax.Array
            gained: jax.Array
            k: jax.Array

        def unfinished(s: State) -> jax.Array:
            return (s.k < self.max_steps) & (s.norm > target) & s.gained

        def step(s: State) -> State:
            change, process = arnoldi(flatten(s.r), s.k)
            v = axpy(1.0, unflatten(change), s.v)
            r = axpy(-1.0, h(v), b)
            gained = ~(norm(r) >= s.norm)  # a NaN is let through
            keep = lambda new, old: jax.tree.map(lambda x, y: jnp.where(gained, x, y), new, old)  # noqa: E731
            return State(keep(v, s.v), keep(r, s.r), keep(norm(r), s.norm), gained, s.k + process.j)

        v, r = start(h, b, v)
        s = jax.lax.while_loop(unfinished, step, State(v, r, norm(r), jnp.bool_(True), jnp.int32(0)))
        return s.v, report(s.norm, s.k)


@hyperparameters
class BiCGStab(Krylov):
    """Stabilised bi-conjugate gradients: two products per iteration and a memory of a few vectors.

        a = rho / r0'Hp;   s = r - a H p;   w = s'Hs / ||Hs||^2;   v += a p + w s;   r = s - w H s
        p = r + (rho_new / rho) (a / w) (p - w H p),   rho = r0'r

    The residual does not fall monotonically, and the v of the least one is returned. When the shadow residual r0 has
    become orthogonal to r, it is replaced by r, a restart. One product more gives the true residual for `info` (under
    `jit` only if `info.residual` is used).

    Attributes: `tol`, `max_steps`, `warm_start` and `damping` as for `CG`.

    Reference: van der Vorst (1992), "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of
    nonsymmetric linear systems", SIAM J. Sci. Stat. Comput. 13.
    """

    symmetric: ClassVar[bool] = False

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: None) -> tuple[PyTree, LinearInfo]:
        target, eps = residual_target(self.tol, b), epsilon(b)

        def unless_orthogonal(x: PyTree, y: PyTree) -> jax.Array:
            """The product <x, y>, or 0 where it is only rounding: dividing by that would throw v away."""
            product = dot(x, y)
            return jnp.where(jnp.abs(product) <= eps * norm(x) * norm(y), 0, product)

        class State(NamedTuple):
            v: PyTree
            best: PyTree  # the v of the least residual so far, which is what is returned
            least: jax.Array
            r: PyTree
            shadow: PyTree
            p: PyTree
            rho: jax.Array
            rr: jax.Array
            k: jax.Array
            stuck: jax.Array

        def unfinished(s: State) -> jax.Array:
            return (s.k < self.max_steps) & (s.rr > target**2) & ~s.stuck

        def step(s: State) -> State:
            q = h(s.p)
            a = ratio(s.rho, unless_orthogonal(s.shadow, q))
            half = axpy(-a, q, s.r)
            t = h(half)
            w = ratio(unless_orthogonal(t, half), dot(t, t))
            v = axpy(w, half, axpy(a, s.p, s.v))
            r = axpy(-w, t, half)
            rr, rho = dot(r, r), dot(s.shadow, r)
            p = axpy(ratio(rho, s.rho) * ratio(a, w), axpy(-w, q, s.p), r)
            restart = (unless_orthogonal(s.shadow, r) == 0) | (a == 0) | (w == 0)
            other = lambda new, old: jax.tree.map(lambda x, y: jnp.where(restart, x, y), new, old)  # noqa: E731
            better = ~(rr >= s.least)  # a NaN is let through
            best = jax.tree.map(lambda x, y: jnp.where(better, x, y), v, s.best)
            least = jnp.where(better, rr, s.least)
            shadow, p, rho = other(r, s.shadow), other(r, p), other(rr, rho)
            return State(v, best, least, r, shadow, p, rho, rr, s.k + 1, (a == 0) & (w == 0))

        v, r = start(h, b, v)
        rr = dot(r, r)
        initial = State(v, v, rr, r, r, r, rr, rr, jnp.int32(0), jnp.bool_(False))
        s = iterate(unfinished, step, initial)
        return s.best, report(norm(axpy(-1.0, h(s.best), b)), s.k)


@hyperparameters
class NormalCG(Krylov):
    """Conjugate gradients on H'H v = H'b, for any H: two products per iteration, one of them with the transpose.

        q = H p;   a = ||s||^2 / ||q||^2;   v += a p;   r -= a q;   s = H'r;   p = s + (||s_new||^2 / ||s||^2) p

    It never breaks down, and gives the least-squares solution where there is no other; but its rate depends on
    kappa^2. Where H is symmetric use CG or MINRES, where it is not try GMRES first. This form (CGLS) updates the
    residual r = b - H v itself and never forms H'H, so that `info.residual` and `tol` are those of the system asked
    for.

    Attributes: `tol`, `max_steps`, `warm_start` and `damping` (added to H, not to H'H) as for `CG`.

    Reference: Hestenes and Stiefel (1952), section 10; Bjorck (1996), Numerical Methods for Least Squares Problems,
    7.4.
    """

    symmetric: ClassVar[bool] = False

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: None) -> tuple[PyTree, LinearInfo]:
        target, eps = residual_target(self.tol, b), epsilon(b)
        transposed = lambda r: jax.linear_transpose(h, b)(r)[0]  # noqa: E731

        class State(NamedTuple):
            v: PyTree
            r: PyTree
            p: PyTree
            ss: jax.Array
            rr: jax.Array
            k: jax.Array

        v, r = start(h, b, v)
        s = transposed(r)
        ss_0 = dot(s, s)

        def unfinished(s: State) -> jax.Array:
            # H'r = 0: no residual can be smaller
            return (s.k < self.max_steps) & (s.rr > target**2) & ~(s.ss <= eps**2 * ss_0)

        def step(s: State) -> State:
            q = h(s.p)
            a = ratio(s.ss, dot(q, q))
            v, r = axpy(a, s.p, s.v), axpy(-a, q, s.r)
            gradient = transposed(r)
            ss = dot(gradient, gradient)
            return State(v, r, axpy(ratio(ss, s.ss), s.p, gradient), ss, dot(r, r), s.k + 1)

        initial = State(v, r, s, ss_0, dot(r, r), jnp.int32(0))
        end = iterate(unfinished, step, initial)
        return end.v, report(jnp.sqrt(end.rr), end.k)
