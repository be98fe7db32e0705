"""Krylov solvers for symmetric systems: CG and MINRES, with warm start and preconditioners that outlive a solve."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters
from bilevel.linear._common import (
    Algorithm,
    LinearCarry,
    LinearInfo,
    Matvec,
    Solver,
    axpy,
    check_not_negative,
    check_positive,
    damped,
    dot,
    epsilon,
    implicit_solve,
    iterate,
    norm,
    ratio,
    report,
    scaled,
    size,
    solve_normalised,
    start,
)
from bilevel.linear.preconditioners import Preconditioner
from bilevel.typing import PyTree


@hyperparameters
class Krylov(Solver):
    """What all Krylov algorithms do around their iterations: damping, preconditioner, warm start, derivative.

    A solver adds `_iterations(matvec, b, v, precondition)`, which does the iterations from v (None for a cold start).
    The solves for derivatives run the same algorithm; the transposed one starts cold, since it has another right-hand
    side.
    """

    symmetric: ClassVar[bool] = True  # whether H has to be

    tol: float | None = 1e-6
    max_steps: int = 100
    warm_start: bool = True
    damping: float = 0.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_positive(owner, tol=self.tol, max_steps=self.max_steps)
        check_not_negative(owner, damping=self.damping)

    @property
    def _preconditioner(self) -> Preconditioner | None:
        return getattr(self, "preconditioner", None)

    def _first(self, b: PyTree) -> LinearCarry:
        unbuilt = None if self._preconditioner is None or size(b) == 0 else self._preconditioner.init(b)
        return dataclasses.replace(super()._first(b), preconditioner=unbuilt)

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, carry: LinearCarry) -> tuple[PyTree, LinearCarry, LinearInfo]:
        h, warm_start = damped(h, self.damping), v
        memory, precondition = None, None
        if (preconditioner := self._preconditioner) is not None:
            memory = preconditioner.update(h, b, carry.preconditioner)
            precondition = lambda r: preconditioner.apply(memory, r)  # noqa: E731

        algorithm: Algorithm = lambda h, b, v: self._iterations(h, b, v, precondition)  # noqa: E731
        v, info = implicit_solve(
            h,
            b,
            lambda h, b: solve_normalised(algorithm, h, b, warm_start),
            lambda h, b: solve_normalised(algorithm, h, b, None),
            self.symmetric,
        )
        return v, LinearCarry(self._carried(v), memory), info

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: Any) -> tuple[PyTree, LinearInfo]:
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

    Negative curvature. Where p'Hp <= 0 the system has no minimum to go to, and CG stops: it keeps v and reports it in
    `info.negative_curvature`. If that happens in the first iteration from v = 0, v is p ||b|| / ||Hp|| instead of
    zero: the direction of steepest descent at the length of a curvature of the size |H| along it, so that v'b > 0 and
    a hypergradient still has a first-order answer (0 if Hp = 0). Raise `damping` if this occurs, or use MINRES.

    Attributes:
      tol: stop at ||r|| <= tol ||b||; a tol below the precision of b's dtype is taken as that precision. None:
        `max_steps` iterations, for a cost that is known beforehand; they end early only where the residual has reached
        that precision.
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

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: Any) -> tuple[PyTree, LinearInfo]:
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
        s = iterate(unfinished, step, initial)
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

    def _iterations(self, h: Matvec, b: PyTree, v: PyTree, precondition: Any) -> tuple[PyTree, LinearInfo]:
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
            r = jax.tree.map(lambda x, y: jnp.where(solved, x, y), s.r, r)
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
        s = iterate(unfinished, step, initial)
        return s.v, report(norm(axpy(-1.0, h(s.v), b)), s.k, s.negative & (precondition is None))
