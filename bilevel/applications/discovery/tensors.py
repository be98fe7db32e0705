"""Functions of symmetric matrices without eigenvectors: smooth, and so are their derivatives, where eigenvalues
coincide.

`jnp.linalg.svd` and `eigh` divide by differences of singular values, so their derivatives are NaN at F = I, where every
simulation starts. In two dimensions a function of B = m I + D (D traceless, D^2 = s I) is a closed form in m and s,
which
is analytic at s = 0. In three dimensions it is a rational iteration in products and inverses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["cofactor_determinant", "deviator", "exp_symmetric", "half_log", "polar_rotation"]


def _eye(a: Any) -> Any:
    return jnp.eye(a.shape[-1], dtype=a.dtype)


def _by(scalar: Any) -> Any:
    return scalar[..., None, None]


def trace(a: Any) -> Any:
    """tr A of (..., d, d)."""
    return jnp.trace(a, axis1=-2, axis2=-1)


def deviator(a: Any) -> Any:
    """A - tr(A)/d I."""
    return a - _by(trace(a) / a.shape[-1]) * _eye(a)


def cofactor_determinant(a: Any) -> tuple[Any, Any]:
    """(det A, A^-1 det A) of (..., d, d) with d = 2 or 3, by cofactors."""
    if a.shape[-1] == 2:
        adjugate = jnp.stack(
            [jnp.stack([a[..., 1, 1], -a[..., 0, 1]], -1), jnp.stack([-a[..., 1, 0], a[..., 0, 0]], -1)], -2
        )
        return a[..., 0, 0] * a[..., 1, 1] - a[..., 0, 1] * a[..., 1, 0], adjugate
    rows = a[..., 0, :], a[..., 1, :], a[..., 2, :]
    columns = [jnp.cross(rows[1], rows[2]), jnp.cross(rows[2], rows[0]), jnp.cross(rows[0], rows[1])]
    return jnp.sum(rows[0] * columns[0], -1), jnp.stack(columns, -1)


def determinant(a: Any) -> Any:
    """det A."""
    return cofactor_determinant(a)[0]


def inverse(a: Any) -> Any:
    """A^-1, kept finite where A is singular."""
    det, adjugate = cofactor_determinant(a)
    return adjugate / _by(jnp.where(jnp.abs(det) > 1e-12, det, 1e-12))


def _series(x: Any, inside: Any, closed: Callable[[Any], Any], coefficients: list[float]) -> Any:
    """A function of x that is analytic at 0: by its series near it, closed elsewhere, with finite derivatives in
    both."""
    near = jnp.polyval(jnp.asarray(coefficients[::-1], x.dtype), jnp.where(inside, x, 0.0))
    return jnp.where(inside, near, closed(jnp.where(inside, 1.0, x)))


def _atanh_over(q: Any) -> Any:
    """atanh(sqrt q) / sqrt q."""
    closed = lambda q: jnp.arctanh(jnp.sqrt(jnp.minimum(q, 1 - 1e-7))) / jnp.sqrt(q)  # noqa: E731
    return _series(q, q < 0.05, lambda q: closed(jnp.where(q >= 1, 0.5, q)), [1 / (2 * k + 1) for k in range(12)])


def _sinh_over(q: Any) -> Any:
    """sinh(sqrt q) / sqrt q."""
    factorials = [1.0]
    for k in range(1, 9):
        factorials.append(factorials[-1] / (2 * k * (2 * k + 1)))
    return _series(q, q < 1.0, lambda q: jnp.sinh(jnp.sqrt(q)) / jnp.sqrt(q), factorials)


def _cosh(q: Any) -> Any:
    """cosh(sqrt q)."""
    factorials = [1.0]
    for k in range(1, 9):
        factorials.append(factorials[-1] / (2 * k * (2 * k - 1)))
    return _series(q, q < 1.0, lambda q: jnp.cosh(jnp.sqrt(q)), factorials)


def half_log(b: Any) -> Any:
    """log(V) = log(B) / 2 of B = F F' = V^2, symmetric positive definite, (..., d, d): the Hencky strain."""
    if b.shape[-1] == 2:
        mean, traceless = trace(b) / 2, deviator(b)
        mean = jnp.maximum(mean, 1e-12)
        q = (traceless[..., 0, 0] ** 2 + traceless[..., 0, 1] * traceless[..., 1, 0]) / mean**2
        product = jnp.maximum(determinant(b), 1e-12)
        # the eigenvalues are m (1 +- sqrt q): their logarithms have the mean log(det)/2 and half the difference
        # atanh(sqrt q)
        return _by(jnp.log(product) / 4) * _eye(b) + _by(_atanh_over(q) / (2 * mean)) * traceless
    return _log_by_roots(b) / 2


def _log_by_roots(b: Any, roots: int = 4, iterations: int = 9) -> Any:
    """log(B) by 2^roots-th roots (Denman and Beavers' iteration) and the series of 2 atanh((A - I)(A + I)^-1)."""
    eye = _eye(b)
    size = jnp.maximum(trace(b) / b.shape[-1], 1e-12)
    a = b / _by(size)
    halves = lambda pair, _: (((pair[0] + inverse(pair[1])) / 2, (pair[1] + inverse(pair[0])) / 2), None)  # noqa: E731
    # Scans, because the unrolled iterations compile for half a minute once they are differentiated twice.
    root = lambda a, _: (jax.lax.scan(halves, (a, jnp.broadcast_to(eye, a.shape)), length=iterations)[0][0], None)  # noqa: E731
    a = jax.lax.scan(root, a, length=roots)[0]
    w = (a - eye) @ inverse(a + eye)
    square, total = w @ w, w * 0
    for k in reversed(range(10)):
        total = total @ square + eye / (2 * k + 1)
    return 2.0 ** (roots + 1) * (w @ total) + _by(jnp.log(size)) * eye


def exp_symmetric(a: Any) -> Any:
    """exp(A) of a symmetric A (..., d, d)."""
    if a.shape[-1] == 2:
        mean, traceless = trace(a) / 2, deviator(a)
        q = traceless[..., 0, 0] ** 2 + traceless[..., 0, 1] * traceless[..., 1, 0]
        return _by(jnp.exp(mean)) * (_by(_cosh(q)) * _eye(a) + _by(_sinh_over(q)) * traceless)
    scaled, total = a / 16, jnp.broadcast_to(_eye(a), a.shape)
    for k in reversed(range(1, 11)):
        total = _eye(a) + scaled @ total / k
    for _ in range(4):
        total = total @ total
    return total


def polar_rotation(f: Any) -> Any:
    """R of F = V R, det F > 0."""
    if f.shape[-1] == 2:
        c, s = f[..., 0, 0] + f[..., 1, 1], f[..., 1, 0] - f[..., 0, 1]
        square = c**2 + s**2
        inside = square > 1e-12
        scale = jnp.where(inside, jax.lax.rsqrt(jnp.where(inside, square, 1.0)), 1.0)
        c, s = c * scale, s * scale
        return jnp.stack([jnp.stack([c, -s], -1), jnp.stack([s, c], -1)], -2)
    return exp_symmetric(-half_log(f @ jnp.swapaxes(f, -1, -2))) @ f
