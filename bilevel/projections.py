"""The projection on the coupled set C = {(x, y) in X x Y : g(x, y) <= 0, h(x, y) = 0}, for methods that need it.

Sets that do not couple x with y are in `bilevel.sets`. A projection of one's own, `(x, y) -> (x, y)`, is always better
where it is known; what is here serves the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._forward import forward_only
from bilevel.curvature import spectral_norm
from bilevel.typing import Project, PyTree

__all__ = ["affine", "dual", "dual_factor"]

Rows = Callable[[PyTree], jax.Array]

_NO_REVERSE = (
    "No derivative goes back through a projection on a coupled set by its dual (solvers.LVHBA with rows of "
    "constraint=): its loop ends by a tolerance. Forward mode (jax.jacfwd) goes through it; for reverse mode give a "
    "projection of your own, LVHBA(project=...), or take solvers.BiCGAFFA, which projects on no coupled set."
)


def dual_factor(rows: Rows, project: Project, point: PyTree) -> jax.Array:
    """The pseudo-inverse of J P' J', (p, p), for affine rows c(u) = J u - b and an affine P: see `affine`."""
    value, push = jax.linearize(rows, point)
    pull = jax.linear_transpose(push, point)
    along = jax.linearize(project, point)[1]
    matrix = jax.vmap(lambda w: push(along(pull(w)[0])))(jnp.eye(value.shape[0], dtype=value.dtype))
    return jnp.linalg.pinv(matrix, rtol=1e3 * jnp.finfo(value.dtype).eps, hermitian=True)


def affine(rows: Rows, project: Project, factor: jax.Array, u: PyTree) -> PyTree:
    """The projection of u on {v : c(v) = 0, v in the range of P}, affine c and P, by a product with a cached factor.

    v = P(u - J' lam),    lam = (J P' J')^+ c(P u)
    """
    inside = project(u)
    value, pull = jax.vjp(rows, inside)
    return project(optax.tree.sub(u, pull(factor @ value)[0]))


def dual(
    rows: Rows,
    inequality: Any,
    project: Project,
    u: PyTree,
    lam: jax.Array,
    *,
    steps: int = 200,
    linearisations: int = 1,
    tol: float = 1e-7,
) -> tuple[PyTree, jax.Array]:
    """The projection of u on {v in X x Y : c(v) <= 0 or = 0} through its dual, matrix-free, from a warm start.

        maximise over lam:  min over v in X x Y of |v - u|^2 / 2 + lam . c(v),      v = P(u - J' lam)

    by accelerated projected gradient ascent with restarts; P projects on X x Y. Nonlinear convex rows are replaced
    by their linearisation at the newest v, `linearisations` times (each is an outer approximation of C).

    Args:
      rows: c, scaled so that its rows have about norm one.
      inequality: bool (p,), which rows are inequalities.
      project: P.
      lam: a start, shape (p,): the last projection's.
      steps: the most ascent steps per linearisation.
      linearisations: 1 for affine rows.
      tol: on the largest violation and the change of lam.

    Returns v and its lam.
    """
    floor = jnp.where(inequality, 0.0, -jnp.inf).astype(lam.dtype)

    def once(_: Any, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        centre, lam = carry
        value, push = jax.linearize(rows, centre)
        pull = jax.linear_transpose(push, centre)
        size = 0.9 / jnp.maximum(spectral_norm(lambda w: push(pull(w)[0]), lam, steps=12), 1e-12)

        def at(lam: jax.Array) -> PyTree:
            return project(optax.tree.sub(u, pull(lam)[0]))

        def body(carry: Any) -> Any:
            i, lam, ahead, t, _ = carry
            new = jnp.maximum(ahead + size * (value + push(optax.tree.sub(at(ahead), centre))), floor)
            restart = jnp.vdot(ahead - new, new - lam) > 0
            following = jnp.where(restart, 1.0, (1 + jnp.sqrt(1 + 4 * t**2)) / 2).astype(t.dtype)
            momentum = jnp.where(restart, 0.0, (t - 1) / following)
            return i + 1, new, new + momentum * (new - lam), following, jnp.max(jnp.abs(new - ahead)) / size

        start = (0, lam, lam, jnp.ones((), lam.dtype), jnp.asarray(jnp.inf, lam.dtype))
        lam = jax.lax.while_loop(lambda c: (c[0] < steps) & (c[4] > tol), body, start)[1]
        return at(lam), lam

    return forward_only(jax.lax.fori_loop(0, linearisations, once, (project(u), lam)), _NO_REVERSE)
