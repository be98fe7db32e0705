"""Quadratic programmes, solved by an interior-point method and differentiable with respect to all of their numbers."""

from __future__ import annotations

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import explained
from bilevel._module import state

__all__ = ["QPSolution", "QPStatus", "qp"]


class QPStatus(enum.IntEnum):
    """How a quadratic programme ended."""

    SOLVED = 0
    """The conditions hold to the tolerance."""
    INFEASIBLE = 1
    """No y fulfils the constraints, and multipliers prove it; the solution is NaN."""
    UNBOUNDED = 2
    """The objective falls without end along a direction that was found; the solution is NaN."""
    INACCURATE = 3
    """The iterations ended before the tolerance was met: the best point found, and `residual` says how good."""
    NONCONVEX = 4
    """Q has a negative eigenvalue; the solution is NaN."""


@state
class QPSolution:
    """A solution of `qp`.

    Attributes:
      y: the minimiser (n,).
      nu: the multipliers (p,) of A y = b, or None.
      lam: the multipliers (m,) of G y <= h, not negative, or None.
      status: a `QPStatus`, int32.
      steps: of the interior-point method, int32.
      residual: the largest violation of the optimality conditions, in the units of the problem scaled to about one.
    """

    y: jax.Array
    nu: jax.Array | None
    lam: jax.Array | None
    status: jax.Array
    steps: jax.Array
    residual: jax.Array


@explained
def qp(
    Q: Any,
    c: Any,
    A: Any = None,
    b: Any = None,
    G: Any = None,
    h: Any = None,
    *,
    tol: float | None = None,
    max_steps: int = 60,
) -> QPSolution:
    """Minimise y^T Q y / 2 + c^T y subject to A y = b and G y <= h: a layer in one line.

        y = implicit.qp(Q, c, A, b, G, h).y

    Differentiable in both modes, to any order, with respect to all six arguments, from the linear system of the
    Karush-Kuhn-Tucker conditions at the solution with its active rows held,

        Q dy + A^T dnu + G_a^T dlam_a = -(dQ y + dc + dA^T nu + dG_a^T lam_a)
        A dy = db - dA y,    G_a dy = dh_a - dG_a y,    dlam = 0 on the other rows;

    batched by `jax.vmap`. The method is a primal-dual one with Mehrotra's predictor and corrector on the homogeneous
    embedding, which ends with a solution or with a proof that there is none; the point is then polished by solving for
    the active rows as equations. Dense: a factorisation of (n + p)^2 a step, made for up to some hundreds of unknowns.

    Args:
      Q: (n, n), positive semidefinite; zero for a linear programme. Only its symmetric part counts.
      c: (n,).
      A, b: equations, (p, n) and (p,), or None. Rows may be redundant.
      G, h: inequalities, (m, n) and (m,), or None. A row with h = inf is none.
      tol: on the conditions' violation relative to the numbers they are made of; None: 1e-9 in float64, 2e-5 in
        float32. 16-bit numbers are computed with in float32.
      max_steps: of the interior-point method.

    Returns a `QPSolution`. Where its `status` is INFEASIBLE, UNBOUNDED or NONCONVEX, y and the multipliers are NaN, and
    so are their derivatives: under `vmap` each problem has a status of its own. A positive definite Q or a bounded
    feasible set makes a solution unique or at least existent.

    Degenerate problems: where an active row has a multiplier of zero the solution has a kink, and the derivative is
    that of one side. Where active rows are dependent the multipliers are not unique: those returned are one choice; dy
    is right for every change under which the same rows can stay active, and the least-squares compromise for others.
    Where y is not unique (a linear programme with a tie) dy is the shortest.

    Raises a ValueError for shapes that do not fit, numbers that are NaN, and a Q, known in advance, with a negative
    eigenvalue.

    References: Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 1992; Goulart,
    Chen, "Clarabel: An interior-point solver for conic programs with quadratic objectives", 2024 (the embedding); Amos,
    Kolter, "OptNet: Differentiable Optimization as a Layer in Neural Networks", ICML 2017 (the derivative).
    """
    given = _checked(Q, c, A, b, G, h)
    return _answer(given, tol, max_steps)


def _answer(given: tuple[Any, ...], tol: float | None, max_steps: int) -> QPSolution:
    out = jnp.result_type(*(a for a in given if a is not None), jnp.bfloat16)
    dtype = jnp.promote_types(out, jnp.float32)
    n = np.shape(given[1])[0]
    Q, c, A, b, G, h = (None if a is None else jnp.asarray(a, dtype) for a in given)
    nothing = jnp.zeros((0, n), dtype), jnp.zeros((0,), dtype)
    eps = float(jnp.finfo(dtype).eps)
    tol = (1e-9 if eps < 1e-10 else 2e-5) if tol is None else tol
    rows = (*((A, b) if A is not None else nothing), *((G, h) if G is not None else nothing))
    y, nu, lam, _, status, steps, residual = _compiled(tol, max_steps, (Q + Q.T) / 2, c, *rows)  # type: ignore[union-attr, operator]
    failed = (status == QPStatus.INFEASIBLE) | (status == QPStatus.UNBOUNDED) | (status == QPStatus.NONCONVEX)
    failed |= jnp.isnan(residual)  # a NaN in the numbers, which eager calls refuse
    y, nu, lam = ((v * jnp.where(failed, jnp.nan, 1.0)).astype(out) for v in (y, nu, lam))  # a NaN derivative too
    return QPSolution(y, None if A is None else nu, None if G is None else lam, status, steps, residual)


def projection(z: jax.Array, A: jax.Array, b: jax.Array, G: jax.Array, h: jax.Array) -> jax.Array:
    """The projection of a vector on {A v = b, G v <= h}, arrays that were checked before; NaN where there is none."""
    return _answer((jnp.eye(z.shape[0], dtype=z.dtype), -z, A, b, G, h), None, 60).y


def _checked(*given: Any) -> tuple[Any, ...]:
    names = ("Q", "c", "A", "b", "G", "h")
    arrays = []
    for name, a in zip(names, given, strict=True):
        try:
            if a is not None and not (hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating)):
                a = jnp.asarray(a, float)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"qp: {name} is a {type(a).__name__} that is no array of numbers ({error}). Give Q (n, n), c (n,), and "
                "A (p, n), b (p,), G (m, n), h (m,) where there are such rows."
            ) from None
        if a is not None and not isinstance(a, jax.core.Tracer) and np.isnan(np.asarray(a, float)).any():
            raise ValueError(f"qp: {name} holds a NaN.")
        arrays.append(a)
    Q, c, A, b, G, h = arrays
    if Q is None or c is None or c.ndim != 1 or Q.shape != (c.shape[0], c.shape[0]):
        shapes = ["None" if a is None else a.shape for a in (Q, c)]
        raise ValueError(
            f"qp takes Q (n, n) and c (n,), and was given the shapes {shapes[0]} and {shapes[1]}. Many problems at "
            "once are jax.vmap(implicit.qp)."
        )
    for matrix, vector, M, v in (("A", "b", A, b), ("G", "h", G, h)):
        if (M is None) != (v is None):
            raise ValueError(f"qp was given only one of {matrix} and {vector}; they come together.")
        if M is not None and (M.ndim != 2 or M.shape[1] != c.shape[0] or v.shape != M.shape[:1]):
            raise ValueError(
                f"qp takes {matrix} (rows, {c.shape[0]}) and {vector} (rows,), and was given the shapes {M.shape} and "
                f"{v.shape}."
            )
    if not isinstance(Q, jax.core.Tracer) and c.shape[0]:
        known = np.asarray(Q, float)
        values = np.linalg.eigvalsh((known + known.T) / 2)
        if values[0] < -_negative(Q.dtype, c.shape[0]) * np.abs(values).max():
            raise ValueError(
                f"qp: Q has the eigenvalue {values[0]:.3g}, so the objective is not convex; a positive semidefinite Q "
                "is expected."
            )
    return tuple(arrays)


def _negative(dtype: Any, n: int) -> float:
    """Below this fraction of the largest, a negative eigenvalue is taken for rounding."""
    return 100 * n * float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _solve(tol: float, max_steps: int, Q: Any, c: Any, A: Any, b: Any, G: Any, h: Any) -> tuple[jax.Array, ...]:
    """The tuple (y, nu, lam, active, status, steps, residual): scale, run the method, polish, unscale."""
    if c.shape[0] == 0:
        raise ValueError("qp was given no unknowns.")
    real = h < jnp.inf
    G, h = jnp.where(real[:, None], G, 0.0), jnp.where(real, h, 1.0)
    M, r = jnp.concatenate([A, G]), jnp.concatenate([b, h])
    p = b.shape[0]
    column, row = _equilibrated(Q, M)
    Q1, M1, c1, r1 = column[:, None] * Q * column, row[:, None] * M * column, column * c, row * r
    length = _unit_of_length(Q1, c1, r1, p)
    force = _or_one(jnp.maximum(length * _largest(Q1), _largest(c1)))
    Q2, c2, r2 = (length / force) * Q1, c1 / force, r1 / length

    y, z, s, status, steps = _interior_point(Q2, c2, M1, r2, p, tol, max_steps)
    # A row counts as active where its multiplier outweighs its slack.
    active = jnp.concatenate([jnp.ones(p, bool), (z[p:] > s) & real])
    polished = _polished(Q2, c2, M1, r2, active, y, z)
    before, after = (_violation(Q2, c2, M1, r2, p, *point) for point in ((y, z), polished))
    better = after <= before  # false for a NaN
    y, z = jnp.where(better, polished[0], y), jnp.where(better, polished[1], z)
    residual = jnp.where(better, after, before)
    status = jnp.where((status == QPStatus.INACCURATE) & (residual <= tol), QPStatus.SOLVED, status)
    values = jnp.linalg.eigvalsh(Q1)
    concave = values[0] < -_negative(Q.dtype, c.shape[0]) * jnp.max(jnp.abs(values))
    status = jnp.where(concave, QPStatus.NONCONVEX, status).astype(jnp.int32)
    z = row * z * force
    lam = jnp.where(real, jnp.maximum(z[p:], 0.0), 0.0)
    return length * column * y, z[:p], lam, active, status, steps, residual


@_solve.defjvp
def _solve_jvp(tol: float, max_steps: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The derivative of the Karush-Kuhn-Tucker conditions with the active rows held."""
    found = _solve(tol, max_steps, *primals)  # calls the function itself, so that it can be differentiated again
    y, nu, lam, active = found[:4]
    n, z = y.shape[0], jnp.concatenate([nu, lam])

    def conditions(Q: Any, c: Any, A: Any, b: Any, G: Any, h: Any) -> jax.Array:
        M, r = jnp.concatenate([A, G]), jnp.concatenate([b, h])
        return jnp.concatenate([Q @ y + c + M.T @ z, jnp.where(active, M @ y - r, 0.0)])

    right = -jax.jvp(conditions, primals, tangents)[1]
    Q, _, A, _, G, _ = primals
    M = jnp.where(active[:, None], jnp.concatenate([A, G]), 0.0)

    def matvec(u: jax.Array) -> jax.Array:
        dy, dz = u[:n], u[n:]
        return jnp.concatenate([Q @ dy + M.T @ dz, M @ dy - jnp.where(active, 0.0, dz)])

    solve = _active_system(*jax.lax.stop_gradient((Q, M)), active)
    u = jax.lax.custom_linear_solve(matvec, right, lambda _, b: solve(b), symmetric=True)
    zero = lambda a: (  # noqa: E731
        jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.inexact) else np.zeros(a.shape, jax.dtypes.float0)
    )
    return found, (u[:n], u[n : n + nu.shape[0]], u[n + nu.shape[0] :], *(zero(a) for a in found[3:]))


_compiled = jax.jit(_solve, static_argnums=(0, 1))


def _active_system(Q: jax.Array, M: jax.Array, active: jax.Array, equilibrate: bool = True) -> Any:
    """The solution of [[Q, M^T], [M, -inactive]] u = b, least squares where active rows are dependent.

    M is zero on the rows that are not active. The system is equilibrated, so that the cut-off of the pseudo-inverse
    does not depend on units, and the answer is refined once.
    """
    column, row = _equilibrated(Q, M) if equilibrate else (jnp.ones(Q.shape[0], Q.dtype), jnp.ones(M.shape[0], Q.dtype))
    scale = jnp.concatenate([column, row])  # one on the rows that are not active
    matrix = scale[:, None] * jnp.block([[Q, M.T], [M, -jnp.diag(jnp.where(active, 0.0, 1.0).astype(Q.dtype))]]) * scale
    cut = 10 * matrix.shape[0] * float(jnp.finfo(Q.dtype).eps)
    inverse = jnp.linalg.pinv(matrix, rtol=cut, hermitian=True)

    def solve(b: jax.Array) -> jax.Array:
        u = inverse @ (scale * b)
        return scale * (u + inverse @ (scale * b - matrix @ u))

    return solve


def _largest(*arrays: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(a), initial=0.0) for a in arrays])


def _or_one(number: jax.Array) -> jax.Array:
    return jnp.where((number > 0) & jnp.isfinite(number), number, 1.0)


def _equilibrated(Q: jax.Array, M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales of the unknowns and of the rows that bring the entries of [[Q, M^T], [M, 0]] to about one (Ruiz).

    Powers of two, so that scaling rounds nothing.
    """

    def body(_: Any, scales: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        column, row = scales
        M1, Q1 = jnp.abs(row[:, None] * M * column), jnp.abs(column[:, None] * Q * column)
        of_columns = jnp.maximum(jnp.max(Q1, axis=1), jnp.max(M1, axis=0, initial=0.0))
        of_rows = jnp.max(M1, axis=1, initial=0.0)
        return column / jnp.sqrt(_or_one(of_columns)), row / jnp.sqrt(_or_one(of_rows))

    start = jnp.ones(Q.shape[0], Q.dtype), jnp.ones(M.shape[0], Q.dtype)
    scales = jax.lax.fori_loop(0, 12, body, start)
    return tuple(jnp.exp2(jnp.round(jnp.log2(s))) for s in scales)  # type: ignore[return-value]


def _unit_of_length(Q: jax.Array, c: jax.Array, r: jax.Array, p: int) -> jax.Array:
    """About the size of y: that of Q y = -c, where the rows allow it."""
    least = _or_one(jnp.maximum(_largest(r[:p]), jnp.max(-r[p:], initial=0.0)))
    most = _largest(r)
    free = _largest(c) / jnp.where(_largest(Q) > 0, _largest(Q), 1.0)
    at_least = jnp.where(jnp.maximum(_largest(r[:p]), jnp.max(-r[p:], initial=0.0)) > 0, least, 0.0)
    free = jnp.where(_largest(Q) > 0, free, most)
    return jax.lax.stop_gradient(_or_one(jnp.where(most > 0, jnp.clip(free, at_least, most), free)))


def _violation(Q: Any, c: Any, M: Any, r: Any, p: int, y: jax.Array, z: jax.Array) -> jax.Array:
    """The largest violation of the optimality conditions, each relative to the numbers that it is made of."""
    slack = r - M @ y
    lam = z[p:]
    dual = Q @ y + c + M.T @ z
    unit = jnp.maximum(1.0, _largest(y))
    force = jnp.maximum(1.0, jnp.maximum(_largest(Q @ y), _largest(z)))
    return functools.reduce(
        jnp.maximum,
        [
            _largest(dual) / force,
            _largest(slack[:p]) / unit,
            jnp.max(-slack[p:], initial=0.0) / unit,
            jnp.max(-lam, initial=0.0) / force,
            _largest(jnp.minimum(jnp.abs(lam) / force, jnp.abs(slack[p:]) / unit)),
        ],
    )


def _polished(
    Q: Any, c: Any, M: Any, r: Any, active: jax.Array, y: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The point of the active rows as equations: the smallest correction of (y, z), twice."""
    n = y.shape[0]
    held = jnp.where(active[:, None], M, 0.0)
    solve = _active_system(Q, held, active, equilibrate=False)  # it is already

    def correct(_: Any, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y, z = point
        step = solve(-jnp.concatenate([Q @ y + c + held.T @ z, jnp.where(active, M @ y - r, 0.0)]))
        return y + step[:n], jnp.where(active, z + step[n:], 0.0)

    return jax.lax.fori_loop(0, 2, correct, (y, jnp.where(active, z, 0.0)))


def _interior_point(
    Q: jax.Array, c: jax.Array, M: jax.Array, r: jax.Array, p: int, tol: float, max_steps: int
) -> tuple[jax.Array, ...]:
    """Mehrotra's predictor and corrector on the homogeneous embedding

        Q x + M^T z + c t = 0,   M x + s = r t,   x^T Q x / t + c^T x + r^T z + k = 0,   s z = 0, t k = 0

    with s = 0 on the first p rows and s, t, k >= 0, z >= 0 on the others. A solution with t > 0 is one of the
    programme, (x, z, s) / t; one with k > 0 proves that there is none.

    Returns y, z, s, the status and the number of steps.
    """
    n, m = Q.shape[0], r.shape[0] - p
    dtype = Q.dtype
    eps = float(jnp.finfo(dtype).eps)
    A, G = M[:p], M[p:]

    def residuals(point: Any) -> tuple[Any, ...]:
        x, z, s, t, k = point
        Qx = Q @ x
        along = x @ Qx / t + c @ x + r @ z
        slack = jnp.concatenate([jnp.zeros(p, dtype), s])
        return Qx + M.T @ z + c * t, M @ x + slack - r * t, along + k, along, Qx

    def judged(point: Any) -> jax.Array:
        x, z, _, t, _ = point
        dual, primal, _, along, Qx = residuals(point)
        force = jnp.maximum(t * _largest(c), jnp.maximum(_largest(Qx), _largest(M.T @ z)))
        size = jnp.maximum(t * _largest(r), jnp.maximum(_largest(M @ x), t))
        worth = jnp.maximum(t, jnp.maximum(jnp.abs(c @ x), jnp.abs(r @ z)))
        near = (_largest(dual) <= tol * jnp.maximum(force, t)) & (_largest(primal) <= tol * size)
        solved = near & (jnp.abs(along) <= tol * worth)
        proof, fall = -(r @ z), -(c @ x)
        infeasible = (proof > 0) & (_largest(M.T @ z) <= tol * proof) & (t < 1e-2 * jnp.maximum(1.0, _largest(z)))
        ray = jnp.maximum(_largest(Qx), _largest(primal + r * t))
        unbounded = (fall > 0) & (ray <= tol * fall) & (t < 1e-2 * jnp.maximum(1.0, _largest(x)))
        return jnp.where(
            solved,
            QPStatus.SOLVED,
            jnp.where(infeasible, QPStatus.INFEASIBLE, jnp.where(unbounded, QPStatus.UNBOUNDED, QPStatus.INACCURATE)),
        ).astype(jnp.int32)

    def inverted(z: jax.Array, s: jax.Array) -> jax.Array:
        weight, small = z[p:] / s, 10 * eps
        H = Q + (G.T * weight) @ G
        H = H + small * jnp.maximum(jnp.max(jnp.abs(jnp.diag(H))), 1.0) * eps**0.25 * jnp.eye(n, dtype=dtype)
        # An inverse compiles in a fraction of a factor's time, and the refinement below makes up for its rounding.
        return jnp.linalg.inv(jnp.block([[H, A.T], [A, -small * jnp.eye(p, dtype=dtype)]]))

    def solved(inverse: jax.Array, weight: jax.Array, force: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Q x + M^T v = force, M x - [0, v / weight] = rows, for columns: one solve and two refinements."""

        def refine(_: Any, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, v = found
            f = force - Q @ x - M.T @ v
            g = rows - M @ x + jnp.concatenate([jnp.zeros((p, v.shape[1]), dtype), v[p:] / weight[:, None]])
            u = inverse @ jnp.concatenate([f + G.T @ (weight[:, None] * g[p:]), g[:p]])
            return x + u[:n], v + jnp.concatenate([u[n:], weight[:, None] * (G @ u[:n] - g[p:])])

        return jax.lax.fori_loop(0, 3, refine, (jnp.zeros_like(force), jnp.zeros_like(rows)))

    def longest(v: jax.Array, dv: jax.Array) -> jax.Array:
        return jnp.min(jnp.where(dv < 0, -v / jnp.where(dv < 0, dv, -1.0), jnp.inf), initial=jnp.inf)

    def body(carry: Any) -> Any:
        i, point, _, _ = carry
        x, z, s, t, k = point
        dual, primal, along, _, Qx = residuals(point)
        inverse, weight = inverted(z, s), z[p:] / s
        xi = x / t
        slope = 2 * Qx / t + c

        def right(keep: Any, of_s: jax.Array) -> tuple[jax.Array, jax.Array]:
            return -keep * dual, -keep * primal + jnp.concatenate([jnp.zeros(p, dtype), of_s / z[p:]])

        def newton(keep: Any, of_s: jax.Array, of_k: jax.Array, dx: Any, dz: Any) -> tuple[jax.Array, ...]:
            dt = (-keep * along + of_k / t - slope @ dx - r @ dz) / bottom
            dx, dz = dx + dt * direction[0], dz + dt * direction[1]
            return dx, dz, -(of_s + s * dz[p:]) / z[p:], dt, -(of_k + k * dt) / t

        def length(step: Any) -> jax.Array:
            _, dz, ds, dt, dk = step
            ends = (longest(s, ds), longest(z[p:], dz[p:]), longest(t[None], dt[None]), longest(k[None], dk[None]))
            return jnp.minimum(1.0, 0.99 * functools.reduce(jnp.minimum, ends))

        mu = (s @ z[p:] + t * k) / (m + 1)
        force, rows = right(1.0, s * z[p:])
        pair = solved(inverse, weight, jnp.stack([-c, force], 1), jnp.stack([r, rows], 1))
        direction = pair[0][:, 0], pair[1][:, 0]
        bottom = -k / t + slope @ direction[0] + r @ direction[1] - xi @ Qx / t
        predictor = newton(1.0, s * z[p:], t * k, pair[0][:, 1], pair[1][:, 1])
        sigma = (1 - length(predictor)) ** 3
        of_s = s * z[p:] + predictor[2] * predictor[1][p:] - sigma * mu
        of_k = t * k + predictor[3] * predictor[4] - sigma * mu
        dx, dz = solved(inverse, weight, *(v[:, None] for v in right(1 - sigma, of_s)))
        corrector = newton(1 - sigma, of_s, of_k, dx[:, 0], dz[:, 0])
        size = length(corrector)
        new = tuple(a + size * da for a, da in zip(point, corrector, strict=True))
        unit = jnp.maximum(new[3], new[4])  # the embedding is homogeneous: keep its size at one
        new = tuple(a / unit for a in new)
        fine = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(a)) for a in new])
        fine &= size > 1e-6
        new = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, point)
        return i + 1, new, judged(new), ~fine

    def go(carry: Any) -> jax.Array:
        i, _, status, stuck = carry
        return (i < max_steps) & (status == QPStatus.INACCURATE) & ~stuck

    one = jnp.ones((), dtype)
    start = (jnp.zeros(n, dtype), jnp.concatenate([jnp.zeros(p, dtype), jnp.ones(m, dtype)]), jnp.ones(m, dtype))
    begin = (
        jnp.zeros((), jnp.int32),
        (*start, one, one),
        jnp.asarray(QPStatus.INACCURATE, jnp.int32),
        jnp.asarray(False),
    )
    steps, (x, z, s, t, _), status, _ = jax.lax.while_loop(go, body, begin)
    return x / t, z / t, s / t, status, steps
