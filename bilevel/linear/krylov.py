"""Krylov solvers: CG and MINRES for symmetric systems, with preconditioners; GMRES, BiCGStab and NormalCG for any.

The derivatives of the last three use the transposed system, which JAX derives from the matvec; so the matvec must be
built of operations that JAX can transpose (a `jvp` or a linearised function is).
"""

from __future__ import annotations

from collections.abc import Callable
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
    eigh,
    epsilon,
    equilibration,
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
from bilevel.linear.preconditioners import Preconditioner, dense_matrix
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

    Negative curvature. Where p'Hp <= 0, or is not above its rounding error of 4 eps |H| |p|^2, the system has no
    minimum to go to, and CG keeps v, stops and says so in `info.negative_curvature`. In the first iteration from v = 0
    with p'Hp <= 0, v is p ||b|| / ||Hp|| instead of zero: steepest descent at the length of a curvature |H|, so that
    v'b > 0 and a hypergradient still has a first-order answer (0 if Hp = 0). Raise `damping` if this occurs, or use
    MINRES or Robust.

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
        s = conjugate_gradients(h, b, v, precondition, residual_target(self.tol, b), self.max_steps)
        return s.v, report(jnp.sqrt(s.rr), s.k, s.broken)


class CGState(NamedTuple):
    """Where conjugate gradients stand."""

    v: PyTree
    r: PyTree
    p: PyTree
    rz: jax.Array
    rr: jax.Array
    k: jax.Array
    size_h: jax.Array  # a lower bound of the norm of H, to tell rounding from numbers
    broken: jax.Array  # p'Hp was not positive beyond rounding
    negative: jax.Array  # it was negative beyond rounding


def conjugate_gradients(
    h: Matvec, b: PyTree, v: PyTree, precondition: Any, target: jax.Array, max_steps: int, size_h: Any = 0.0
) -> CGState:
    """CG's iterations from v (None: cold) to a residual of `target`; `size_h`: what is known of the norm of H."""
    v, r = start(h, b, v)
    z = r if precondition is None else precondition(r)
    at_zero, eps = dot(v, v) == 0, 4 * float(jnp.finfo(working_dtype(b)).eps)

    def unfinished(s: CGState) -> jax.Array:
        return (s.k < max_steps) & (s.rr > target**2) & ~s.broken

    def step(s: CGState) -> CGState:
        q = h(s.p)
        curvature, pp, qq = dot(s.p, q), dot(s.p, s.p), dot(q, q)
        size_h = jnp.maximum(s.size_h, jnp.sqrt(ratio(qq, pp)))
        # In a direction without curvature p'Hp is what rounding makes of zero: a step of rr / p'Hp would be noise.
        rounding = eps * size_h * pp
        broken = curvature <= rounding  # False for a NaN, which then shows in v
        descends = at_zero & (s.k == 0) & (curvature <= 0)
        safe = lambda: jnp.where(descends, ratio(norm(b), jnp.sqrt(qq)), 0)  # noqa: E731
        a = jax.lax.cond(broken, safe, lambda: ratio(s.rz, curvature))
        v, r = axpy(a, s.p, s.v), axpy(-a, q, s.r)
        z = r if precondition is None else precondition(r)
        rr = dot(r, r)
        rz = rr if precondition is None else dot(r, z)
        p = axpy(ratio(rz, s.rz), s.p, z)
        return CGState(v, r, p, rz, rr, s.k + 1, size_h, broken, curvature < -rounding)

    rr, no = dot(r, r), jnp.bool_(False)
    rz = rr if precondition is None else dot(r, z)
    size_h = jnp.asarray(size_h, rr.dtype)
    return jax.lax.while_loop(unfinished, step, CGState(v, r, z, rz, rr, jnp.int32(0), size_h, no, no))


@hyperparameters
class TaskCG(Krylov):
    """`CG` for each of many systems that share nothing, stacked along the leading axis of every leaf.

    One CG over all of them would need as many iterations as they have distinct eigenvalues together, and stop for all
    at the first with negative curvature; here each has step lengths, a tolerance and an end of its own, and all share
    the products. `info.residual` is that of all together, `info.negative_curvature` whether any met some.

    Attributes: `tol`, `max_steps`, `warm_start` and `damping` as for `CG`.
    """

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: None) -> Answer:
        dtype = working_dtype(b)

        def dots(a: PyTree, b: PyTree) -> jax.Array:
            pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
            each = [jnp.sum((x.astype(dtype) * y.astype(dtype)).reshape(len(x), -1), 1) for x, y in pairs]
            return jnp.sum(jnp.stack(each), 0)

        def along(scalars: jax.Array, x: PyTree, y: PyTree) -> PyTree:
            wide = lambda leaf: scalars.reshape(-1, *[1] * (leaf.ndim - 1))  # noqa: E731
            return jax.tree.map(lambda x, y: (y + wide(x) * x).astype(y.dtype), x, y)

        bb, eps = dots(b, b), float(jnp.finfo(dtype).eps)
        target = bb * (epsilon(b) if self.tol is None else jnp.maximum(self.tol, epsilon(b))) ** 2
        zero, ones = optax.tree.zeros_like(b), jnp.ones_like(bb)
        if v is not None:
            rest = along(-ones, h(v), b)
            helps = (dots(rest, rest) <= bb).astype(dtype)  # False where v holds a NaN
            known = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), v)
            v = along(helps, known, zero)
        v = zero if v is None else v
        r = along(-ones, h(v), b)
        at_zero = dots(v, v) == 0

        def unfinished(s: Any) -> jax.Array:
            return (s[5] < self.max_steps) & jnp.any((s[3] > target) & ~s[6])

        def step(s: Any) -> Any:
            v, r, p, rr, size_h, k, broken, negative = s
            q = h(p)
            curvature, pp, qq = dots(p, q), dots(p, p), dots(q, q)
            size_h = jnp.maximum(size_h, jnp.sqrt(ratio(qq, pp)))
            rounding = 4 * eps * size_h * pp
            moves = (rr > target) & ~broken
            broken = broken | (moves & (curvature <= rounding))
            negative = negative | (moves & (curvature < -rounding))
            first = at_zero & (k == 0) & (curvature <= 0)
            a = jnp.where(broken, jnp.where(first, ratio(jnp.sqrt(bb), jnp.sqrt(qq)), 0), ratio(rr, curvature))
            a = jnp.where(moves, a, 0)
            v, r = along(a, p, v), along(-a, q, r)
            new = dots(r, r)
            p = along(jnp.where(moves, ratio(new, rr), 0), p, r)
            return v, r, p, new, size_h, k + 1, broken, negative

        no = jnp.zeros(bb.shape, bool)
        s = jax.lax.while_loop(unfinished, step, (v, r, r, dots(r, r), jnp.zeros_like(bb), jnp.int32(0), no, no))
        return s[0], report(jnp.sqrt(jnp.sum(s[3])), s[5], jnp.any(s[7]))


@hyperparameters
class Robust(Krylov):
    """A Krylov method where it can be trusted, and the least-squares solution of least norm where it cannot.

    For up to `dense` unknowns H is made a matrix, by d products at once, and solved by its eigenvalues (singular values
    where it is not symmetric), with rows and columns brought to one size by powers of two where they differ by more
    than a factor of 256: those below its rounding error (d eps of the largest, or what a symmetric H and H' differ by,
    where that is more) count as zero. Above, `CG` (`GMRES`) to the same tolerance. Where CG meets a direction without
    positive curvature (beyond rounding) or is not done after d iterations, or GMRES stagnates (or needs more than d
    iterations), the system is solved anew: as a matrix for up to 256 unknowns, and else, from cold, by CGLS (conjugate
    gradients on |b - H v|^2, two products per iteration). So

    * a consistent singular system has its solution of least norm,
    * an inconsistent one a least-squares solution, and `info.residual` the part of b that is outside H's range,
    * an indefinite one its exact solution, and `info.negative_curvature` is True where H is symmetric.

    CGLS converges at a rate of kappa^2 and ends after `max_steps` iterations: `info.residual` is what is left.

    Attributes: `tol`, `max_steps`, `warm_start` and `damping` as for `CG`.
      symmetric: whether H' = H.
      dense: the largest d that is solved as a matrix.

    References: Hestenes and Stiefel (1952), J. Res. NBS 49; Bjorck (1996), Numerical Methods for Least Squares
    Problems, 7.4.
    """

    most_as_matrix: ClassVar[int] = 256

    symmetric: bool = True  # type: ignore[misc]
    dense: int = 32

    def _memory(self, b: PyTree) -> jax.Array:
        return jnp.zeros((), working_dtype(b))  # the norm of H as far as the last solves have seen it

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, memory: PyTree) -> tuple[PyTree, PyTree, LinearInfo]:
        if self.symmetric and size(b) > self.dense:
            known = memory
            memory = jax.lax.stop_gradient(jax.lax.cond(known > 0, lambda: known, lambda: _typical(h, b)))
        h, warm_start, size_h = damped(h, self.damping), v, memory
        algorithm: Algorithm = lambda h, b, v: self._answer(h, b, v, size_h)  # noqa: E731
        forward = lambda h, b: solve_normalised(algorithm, h, b, warm_start)  # noqa: E731
        transposed = lambda h, b: solve_normalised(algorithm, h, b, None)  # noqa: E731
        v, info = implicit_solve(h, b, forward, transposed, self.symmetric)
        return v, memory, info

    def _answer(self, h: Matvec, b: PyTree, v: PyTree, size_h: jax.Array) -> Answer:
        as_matrix = _by_eigenvalues if self.symmetric else _by_singular_values
        if size(b) <= self.dense:
            return as_matrix(h, b)
        target = residual_target(self.tol, b)
        if self.symmetric:
            s = conjugate_gradients(h, b, v, None, target, self.max_steps, size_h)
            v, rr, k, failed, negative = s.v, s.rr, s.k, s.broken, s.negative
            failed = failed | ((rr > target**2) & (k >= size(b)) & (size(b) <= self.most_as_matrix))
            transposed = h
        else:
            v, info = GMRES(self.tol, self.max_steps)._iterations(h, b, v, None)
            rr, k, negative = info.residual**2, info.iterations, jnp.bool_(False)
            failed = (info.residual > target) & ((k < self.max_steps) | (size(b) <= self.max_steps))
            transposed = lambda r: jax.linear_transpose(h, b)(r)[0]  # noqa: E731
        # Under `vmap` both branches run: a right-hand side of zero ends the second one at once.
        right = optax.tree.where(failed, b, optax.tree.zeros_like(b))

        def instead() -> tuple[PyTree, jax.Array, jax.Array, jax.Array]:
            if size(b) <= self.most_as_matrix:
                w, info = as_matrix(h, right)
                return w, info.residual**2, info.iterations, info.negative_curvature
            s = least_squares(h, transposed, right, None, target, self.max_steps)
            return s.v, s.rr, s.k, jnp.bool_(False)

        other, other_rr, more, indefinite = jax.lax.cond(failed, instead, lambda: (v, rr, jnp.int32(0), negative))
        better = failed & (other_rr <= rr * (1 + 1e-3))
        v, rr = optax.tree.where(better, (other, other_rr), (v, rr))
        return v, report(jnp.sqrt(rr), k + more, negative | indefinite)


def _typical(h: Matvec, b: PyTree) -> jax.Array:
    """|H u| / |u| at a random u: the root mean square of the eigenvalues, as an expectation."""
    u = optax.tree.random_like(jax.random.key(11), b, jax.random.normal)
    return jax.lax.stop_gradient(ratio(norm(h(u)), norm(u)))


def _by_eigenvalues(h: Matvec, b: PyTree) -> Answer:
    """The least-squares solution of least norm from the eigenvalues of H as a matrix, its unknowns in units alike."""
    flatten, unflatten = flattener(b)
    matrix, x = dense_matrix(h, b), flatten(b)
    usable = jnp.all(jnp.isfinite(matrix))
    matrix = jnp.where(usable, matrix, 0)
    scales = equilibration(matrix, True)[1]
    even = matrix * scales[:, None] * scales
    values, vectors = eigh((even + even.T) / 2)
    largest, d = jnp.max(jnp.abs(values)), len(values)
    rounding = max(d, 4) * jnp.finfo(x.dtype).eps * largest + 2 * jnp.linalg.norm(even - even.T)
    regular = jnp.abs(values) > rounding
    inverse = jnp.where(regular, 1 / jnp.where(values == 0, 1, values), 0)
    through = lambda x: scales * matmul(vectors, inverse * matmul(vectors.T, scales * x))  # noqa: E731
    outside = _outside(scales[:, None] * vectors, regular)
    # Once more with what is left: the digits that the eigenvectors have lost.
    step = lambda _, v: v + outside(through(outside(x - matmul(matrix, v))))  # noqa: E731
    v = jax.lax.fori_loop(0, 2, step, jnp.zeros_like(x))
    solution = unflatten(jnp.where(usable, v, jnp.nan))
    return solution, report(norm(axpy(-1.0, h(solution), b)), 0, values[0] < -rounding)


def _by_singular_values(h: Matvec, b: PyTree) -> Answer:
    """The same from the singular values."""
    flatten, unflatten = flattener(b)
    matrix, x = dense_matrix(h, b), flatten(b)
    usable = jnp.all(jnp.isfinite(matrix))
    matrix = jnp.where(usable, matrix, 0)
    r, c = equilibration(matrix, False)
    left, values, right = jnp.linalg.svd(matrix * r[:, None] * c)
    regular = values > 2 * max(len(x), 4) * jnp.finfo(x.dtype).eps * jnp.max(values)
    inverse = jnp.where(regular, 1 / jnp.where(values == 0, 1, values), 0)
    through = lambda x: c * matmul(right.T, inverse * matmul(left.T, r * x))  # noqa: E731
    reached, least = _outside(r[:, None] * left, regular), _outside(c[:, None] * right.T, regular)
    step = lambda _, v: v + least(through(reached(x - matmul(matrix, v))))  # noqa: E731
    v = jax.lax.fori_loop(0, 2, step, jnp.zeros_like(x))
    solution = unflatten(jnp.where(usable, v, jnp.nan))
    return solution, report(norm(axpy(-1.0, h(solution), b)), 0)


def _outside(columns: jax.Array, regular: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The projection on what is orthogonal to the columns that are not `regular`; as it is where all are."""

    if len(columns) <= 2:  # none, one, or both
        left_out = jnp.where(regular, 0, columns / jnp.linalg.norm(columns, axis=0))
        return lambda x: jnp.where(regular.any(), x - left_out @ (left_out.T @ x), 0)

    def basis() -> jax.Array:
        length = jnp.linalg.norm(columns, axis=0)
        left_out = jnp.where(regular, 0, columns / jnp.where(length > 0, length, 1))

        def orthogonalise(j: jax.Array, q: jax.Array) -> jax.Array:
            # Gram and Schmidt, twice; a column of which nothing is left but rounding is none.
            w = left_out[:, j] - matmul(q, matmul(q.T, left_out[:, j]))
            w = w - matmul(q, matmul(q.T, w))
            rest = jnp.linalg.norm(w)
            some = rest > 8 * jnp.finfo(w.dtype).eps
            return q.at[:, j].set(jnp.where(some, w / jnp.where(some, rest, 1), 0))

        return jax.lax.fori_loop(0, len(columns), orthogonalise, jnp.zeros_like(columns))

    q = jax.lax.cond(jnp.all(regular), lambda: jnp.zeros_like(columns), basis)
    return lambda x: x - matmul(q, matmul(q.T, x))


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
    * d, each leaf's part shaped, and over a mesh lying, as the leaf. The basis is orthogonalised twice (classical
    Gram-Schmidt, dense products of the basis, which a GPU likes). It ends early when a restart brings no gain, be it
    that precision is reached or that it stagnates.

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
        wide, given = lambda tree: optax.tree.cast(tree, dtype), lambda tree: optax.tree.cast_like(tree, b)
        m = min(self.restart, size(b), self.max_steps)

        def along(basis: PyTree, w: PyTree) -> jax.Array:
            """<basis_i, w> for all i."""
            full = jax.lax.Precision.HIGHEST
            each = jax.tree.map(lambda rows, w: jnp.tensordot(rows, w, w.ndim, precision=full), basis, w)
            return jax.tree.reduce(jnp.add, each)

        def combined(weights: jax.Array, basis: PyTree) -> PyTree:
            """The sum of weights_i basis_i."""
            full = jax.lax.Precision.HIGHEST
            return jax.tree.map(lambda rows: jnp.tensordot(weights, rows, 1, precision=full), basis)

        class Arnoldi(NamedTuple):
            basis: PyTree  # m + 1 of b's kind along a leading axis, orthonormal, zero from row j + 1 on
            triangle: jax.Array  # [m, m], R of the Hessenberg matrix's QR, ones on the diagonal from column j on
            rotations: jax.Array  # [m + 1, m + 1], Q' of it
            j: jax.Array
            residual: jax.Array

        def arnoldi(r: PyTree, k: jax.Array) -> tuple[PyTree, Arnoldi]:
            beta = norm(r)

            def unfinished(s: Arnoldi) -> jax.Array:
                return (s.j < m) & (k + s.j < self.max_steps) & (s.residual > target)

            def step(s: Arnoldi) -> Arnoldi:
                w = wide(h(given(jax.tree.map(lambda rows: rows[s.j], s.basis))))
                length = norm(w)
                first = along(s.basis, w)
                w = optax.tree.sub(w, combined(first, s.basis))
                second = along(s.basis, w)
                w = optax.tree.sub(w, combined(second, s.basis))
                rest = norm(w)
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
                basis = jax.tree.map(lambda rows, w: rows.at[s.j + 1].set(ratio(w, rest)), s.basis, w)
                return Arnoldi(basis, triangle, rotations, s.j + 1, beta * jnp.abs(rotations[s.j + 1, 0]))

            basis = jax.tree.map(lambda r: jnp.zeros((m + 1, *r.shape), dtype).at[0].set(ratio(r, beta)), r)
            initial = Arnoldi(basis, jnp.eye(m, dtype=dtype), jnp.eye(m + 1, dtype=dtype), jnp.int32(0), beta)
            s = jax.lax.while_loop(unfinished, step, initial)
            # a zero on the diagonal: H is singular on the space, and that direction is left out
            solvable = (jnp.arange(m) < s.j) & (jnp.diagonal(s.triangle) != 0)
            g = jnp.where(solvable, beta * s.rotations[:m, 0], 0)
            triangle = s.triangle + jnp.diag(jnp.where(jnp.diagonal(s.triangle) == 0, 1, 0).astype(dtype))
            weights = jax.scipy.linalg.solve_triangular(triangle, g)
            return combined(jnp.append(weights, jnp.zeros((), dtype)), s.basis), s

        class State(NamedTuple):
            v: PyTree
            r: PyTree
            norm: jax.Array
            gained: jax.Array
            k: jax.Array

        def unfinished(s: State) -> jax.Array:
            return (s.k < self.max_steps) & (s.norm > target) & s.gained

        def step(s: State) -> State:
            change, process = arnoldi(wide(s.r), s.k)
            v = axpy(1.0, given(change), s.v)
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
        transposed = lambda r: jax.linear_transpose(h, b)(r)[0]  # noqa: E731
        end = least_squares(h, transposed, b, v, residual_target(self.tol, b), self.max_steps)
        return end.v, report(jnp.sqrt(end.rr), end.k)


class CGLSState(NamedTuple):
    """Where conjugate gradients on the normal equations stand."""

    v: PyTree
    r: PyTree
    p: PyTree
    ss: jax.Array
    rr: jax.Array
    k: jax.Array


def least_squares(h: Matvec, transposed: Matvec, b: PyTree, v: PyTree, target: jax.Array, max_steps: int) -> CGLSState:
    """CGLS's iterations from v (None: cold) to a residual of `target`, or to H'r = 0."""
    eps = epsilon(b)
    v, r = start(h, b, v)
    s = transposed(r)
    ss_0 = dot(s, s)

    def unfinished(s: CGLSState) -> jax.Array:
        # H'r = 0: no residual can be smaller
        return (s.k < max_steps) & (s.rr > target**2) & ~(s.ss <= eps**2 * ss_0)

    def step(s: CGLSState) -> CGLSState:
        q = h(s.p)
        a = ratio(s.ss, dot(q, q))
        v, r = axpy(a, s.p, s.v), axpy(-a, q, s.r)
        gradient = transposed(r)
        ss = dot(gradient, gradient)
        return CGLSState(v, r, axpy(ratio(ss, s.ss), s.p, gradient), ss, dot(r, r), s.k + 1)

    return jax.lax.while_loop(unfinished, step, CGLSState(v, r, s, ss_0, dot(r, r), jnp.int32(0)))
