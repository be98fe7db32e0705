"""Krylov solvers: CG and MINRES for symmetric systems, with preconditioners; GMRES, BiCGStab and NormalCG for any.

The derivatives of the last three use the transposed system, which JAX derives from the matvec; so the matvec must be
built of operations that JAX can transpose (a `jvp` or a linearised function is).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters
from bilevel.linear._common import (
    Algorithm,
    Answer,
    LinearInfo,
    Matvec,
    Solver,
    axpy,
    damped,
    dot,
    epsilon,
    flattener,
    implicit_solve,
    matmul,
    norm,
    ratio,
    report,
    scaled,
    size,
    solve_normalised,
    start,
    working_dtype,
)
from bilevel.linear.preconditioners import Preconditioner
from bilevel.typing import PyTree


@hyperparameters
class Krylov(Solver):
    """What all Krylov algorithms do around their iterations: damping, preconditioner, warm start, derivative.

    A solver adds `_iterations(matvec, b, v, precondition)`, which does the iterations from v (None for a cold start).
    The solves for derivatives run the same algorithm; the transposed one starts cold, since it has another right-hand
    side. Iterations are a `while_loop` also where their number is fixed: what has reached the precision of its dtype
    stands still, and a loop that ends there needs no selects to freeze it.
    """

    symmetric: ClassVar[bool] = True  # whether H has to be

    tol: float | None = 1e-6
    max_steps: int = 100
    warm_start: bool = True
    damping: float = 0.0

    def _memory(self, b: PyTree) -> PyTree:
        preconditioner = getattr(self, "preconditioner", None)
        return None if preconditioner is None else preconditioner.init(b)

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, memory: PyTree) -> tuple[PyTree, PyTree, LinearInfo]:
        h, warm_start, precondition = damped(h, self.damping), v, None
        if (preconditioner := getattr(self, "preconditioner", None)) is not None:
            memory = preconditioner.update(h, b, memory)
            precondition = lambda r: preconditioner.apply(memory, r)  # noqa: E731

        algorithm: Algorithm = lambda h, b, v: self._iterations(h, b, v, precondition)  # noqa: E731
        forward = lambda h, b: solve_normalised(algorithm, h, b, warm_start)  # noqa: E731
        transposed = lambda h, b: solve_normalised(algorithm, h, b, None)  # noqa: E731
        v, info = implicit_solve(h, b, forward, transposed, self.symmetric)
        return v, memory, info

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: Any) -> Answer:
        raise NotImplementedError


def residual_target(tol: Any, b: PyTree) -> jax.Array:
    """The residual norm at which to stop: tol ||b||, and never below what b's precision can hold."""
    eps = epsilon(b)
    return norm(b) * (eps if tol is None else jnp.maximum(tol, eps))


@hyperparameters
class CG(Krylov):
    """Conjugate gradients, for H symmetric positive definite: one product per iteration.

        p = z = P^-1 r;   a = r'z / p'Hp;   v += a p;   r -= a H p;   z = P^-1 r;   p = z + (r'z)_new / (r'z)_old p

    The error falls like ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k with the condition number kappa of P^-1 H. A warm
    start costs one product more, for its first residual, and is dropped where its residual exceeds that of v = 0.

    Negative curvature. Where p'Hp <= 0 the system has no minimum to go to, and CG keeps v, stops and says so in
    `info.negative_curvature`. In the first iteration from v = 0, v is p ||b|| / ||Hp|| instead of zero: steepest
    descent at the length of a curvature |H|, so that v'b > 0 and a hypergradient still has a first-order answer (0 if
    Hp = 0). Raise `damping` if this occurs, or use MINRES.

    Attributes:
      tol: stop at ||r|| <= tol ||b||, or at the precision of b's dtype where that is larger. None: only there, so
        that `max_steps` iterations are the rule, a cost that is known beforehand.
      max_steps: the largest number of iterations.
      warm_start: start from the carried solution.
      damping: solve (H + damping I) v = b.
      preconditioner: Jacobi, NystromPreconditioner, StaleCholesky or any object with their three methods.

    `info.residual` is the recursively updated residual, which in floating point can run below the true one.

    Reference: Hestenes and Stiefel (1952), "Methods of conjugate gradients for solving linear systems", J. Res.
    NBS 49. The stopping rule at negative curvature is that of truncated Newton methods: Nocedal and Wright (2006),
    Numerical Optimization, Algorithm 7.1.
    """

    preconditioner: Preconditioner | None = None

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: Any) -> Answer:
        target = residual_target(self.tol, b)
        v, r = start(h, b, v)
        z = r if precondition is None else precondition(r)
        at_zero = dot(v, v) == 0

        class State(NamedTuple):
            v: PyTree
            r: PyTree
            p: PyTree
            rz: jax.Array
            rr: jax.Array
            k: jax.Array
            negative: jax.Array

        def unfinished(s: State) -> jax.Array:
            return (s.k < self.max_steps) & (s.rr > target**2) & ~s.negative

        def step(s: State) -> State:
            q = h(s.p)
            curvature = dot(s.p, q)
            negative = curvature <= 0  # False for a NaN, which then shows in v
            safe = lambda: jnp.where(at_zero & (s.k == 0), ratio(norm(b), norm(q)), 0)  # noqa: E731
            a = jax.lax.cond(negative, safe, lambda: ratio(s.rz, curvature))
            v, r = axpy(a, s.p, s.v), axpy(-a, q, s.r)
            z = r if precondition is None else precondition(r)
            rr = dot(r, r)
            rz = rr if precondition is None else dot(r, z)
            return State(v, r, axpy(ratio(rz, s.rz), s.p, z), rz, rr, s.k + 1, negative)

        rr = dot(r, r)
        initial = State(v, r, z, rr if precondition is None else dot(r, z), rr, jnp.int32(0), jnp.bool_(False))
        s = jax.lax.while_loop(unfinished, step, initial)
        return s.v, report(jnp.sqrt(s.rr), s.k, s.negative)


@hyperparameters
class MINRES(Krylov):
    """Minimal residuals, for H symmetric, indefinite or singular as it may be: one product per iteration.

    The Lanczos process beta_{k+1} v_{k+1} = H v_k - alpha_k v_k - beta_k v_{k-1}, and a QR factorisation of its
    tridiagonal matrix by one Givens rotation per step, give the v that minimises ||b - H v|| (in the norm of P^-1)
    over the Krylov space. Unlike CG it cannot break down, and its residual never grows; where CG converges it does as
    well, in about as many iterations with three vectors more.

    On a consistent singular system a cold start gives the solution of least norm. On an inconsistent one it ends at a
    least-squares solution, by the second stopping rule of Paige and Saunders, ||H r|| <= tol ||H|| ||r||: there tol
    has to be above what rounding allows (about kappa^2 times the precision; beyond it v grows without bound), and
    `NormalCG` or some damping is the safer choice. For an indefinite lower Hessian the hypergradient that it gives is
    the exact one of a stationary point, which need not be a minimiser: see `info.negative_curvature`, True if r'Hr <=
    0 was met for a residual r.

    One product more gives the true residual for `info` (under `jit` only if `info.residual` is used).

    Attributes: as for `CG`. With a preconditioner (which must be positive definite) r'P^-1Hr is not looked at and
    `negative_curvature` stays False.

    Reference: Paige and Saunders (1975), "Solution of sparse indefinite systems of linear equations", SIAM J. Numer.
    Anal. 12. The test of curvature is free and due to Liu and Roosta (2022), "MINRES: from negative curvature
    detection to monotonicity properties", SIAM J. Optim. 32.
    """

    preconditioner: Preconditioner | None = None

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: Any) -> Answer:
        target = residual_target(self.tol, b)
        least_squares = jnp.maximum(0.0 if self.tol is None else self.tol, 10 * epsilon(b))
        v, r = start(h, b, v)
        z = r if precondition is None else precondition(r)
        beta = jnp.sqrt(dot(r, z))
        zero, one = jnp.zeros_like(beta), jnp.ones_like(beta)

        class State(NamedTuple):
            v: PyTree
            r: PyTree  # the residual b - H v itself: with a preconditioner phi is its norm in P^-1 only
            u_old: PyTree  # two Lanczos vectors before the preconditioner, times beta_old and beta
            u: PyTree
            z: PyTree  # P^-1 u
            w_old: PyTree  # two directions of the solution
            w: PyTree
            beta_old: jax.Array
            beta: jax.Array
            cos: jax.Array
            sin: jax.Array
            delta: jax.Array  # what the last rotation left for the next column
            epsilon: jax.Array
            phi: jax.Array
            norm: jax.Array
            size_h: jax.Array  # a lower bound of the norm of H, to tell rounding from numbers
            k: jax.Array
            negative: jax.Array
            solved: jax.Array

        def unfinished(s: State) -> jax.Array:
            return (s.k < self.max_steps) & (s.norm > target) & (s.beta > 0) & ~s.solved

        def step(s: State) -> State:
            q = scaled(ratio(one, s.beta), s.z)
            u_new = axpy(-ratio(s.beta, s.beta_old), s.u_old, h(q))
            alpha = dot(q, u_new)
            u_new = axpy(-ratio(alpha, s.beta), s.u, u_new)
            z_new = u_new if precondition is None else precondition(u_new)
            beta_new = jnp.sqrt(jnp.maximum(dot(u_new, z_new), 0))
            size_h = jnp.maximum(s.size_h, jnp.hypot(alpha, beta_new))

            delta = s.cos * s.delta + s.sin * alpha
            gamma_bar = s.sin * s.delta - s.cos * alpha
            gamma = jnp.hypot(gamma_bar, beta_new)
            # This is ||H r|| / ||r|| for the r so far. Where it vanishes, v solves the least-squares problem, and the
            # step, which would divide rounding by rounding, is not taken.
            solved = jnp.hypot(gamma_bar, s.cos * beta_new) <= least_squares * size_h
            cos, sin = ratio(gamma_bar, gamma), ratio(beta_new, gamma)
            w_new = scaled(ratio(one, gamma), axpy(-delta, s.w, axpy(-s.epsilon, s.w_old, q)))
            phi = s.phi * sin
            v = axpy(jnp.where(solved, 0, s.phi * cos), w_new, s.v)
            r = axpy(-ratio(phi * cos, beta_new), u_new, scaled(sin**2, s.r))
            r = optax.tree.where(solved, s.r, r)
            negative = s.negative | (~solved & (s.cos * gamma_bar >= 0))
            return State(
                v, r, s.u, u_new, z_new, s.w, w_new,
                s.beta, beta_new, cos, sin, -s.cos * beta_new, s.sin * beta_new,
                phi, norm(r), size_h, s.k + 1, negative, solved,
            )  # fmt: skip

        none = optax.tree.zeros_like(r)
        initial = State(
            v, r, none, r, z, none, none, zero, beta, -one, zero, zero, zero,
            beta, norm(r), zero, jnp.int32(0), jnp.bool_(False), jnp.bool_(False),
        )  # fmt: skip
        s = jax.lax.while_loop(unfinished, step, initial)
        return s.v, report(norm(axpy(-1.0, h(s.v), b)), s.k, s.negative & (precondition is None))


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

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: None) -> Answer:
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
                basis = s.basis.at[s.j + 1].set(ratio(w, rest))
                return Arnoldi(basis, triangle, rotations, s.j + 1, beta * jnp.abs(rotations[s.j + 1, 0]))

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
            v, r, residual = optax.tree.where(gained, (v, r, norm(r)), (s.v, s.r, s.norm))
            return State(v, r, residual, gained, s.k + process.j)

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

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: None) -> Answer:
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
            shadow, p, rho = optax.tree.where(restart, (r, r, rr), (s.shadow, p, rho))
            better = ~(rr >= s.least)  # a NaN is let through
            best, least = optax.tree.where(better, (v, rr), (s.best, s.least))
            return State(v, best, least, r, shadow, p, rho, rr, s.k + 1, (a == 0) & (w == 0))

        v, r = start(h, b, v)
        rr = dot(r, r)
        initial = State(v, v, rr, r, r, r, rr, rr, jnp.int32(0), jnp.bool_(False))
        s = jax.lax.while_loop(unfinished, step, initial)
        return s.best, report(norm(axpy(-1.0, h(s.best), b)), s.k)


@hyperparameters
class NormalCG(Krylov):
    """Conjugate gradients on H'H v = H'b, for any H: two products per iteration, one of them with the transpose.

        q = H p;   a = ||s||^2 / ||q||^2;   v += a p;   r -= a q;   s = H'r;   p = s + (||s_new||^2 / ||s||^2) p

    It never breaks down, and gives the least-squares solution where there is no other; but its rate depends on
    kappa^2. Where H is symmetric use CG or MINRES, where it is not try GMRES first. This form (CGLS) updates the
    residual r = b - H v itself, so that `info.residual` and `tol` are those of the system asked for.

    Attributes: `tol`, `max_steps`, `warm_start` and `damping` (added to H, not to H'H) as for `CG`.

    Reference: Hestenes and Stiefel (1952), section 10; Bjorck (1996), Numerical Methods for Least Squares Problems,
    7.4.
    """

    symmetric: ClassVar[bool] = False

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: None) -> Answer:
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
        end = jax.lax.while_loop(unfinished, step, initial)
        return end.v, report(jnp.sqrt(end.rr), end.k)
