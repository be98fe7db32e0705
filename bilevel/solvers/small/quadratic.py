"""The ends of runs on linear-quadratic problems, looked at exactly: no search, and nothing that a search can miss.

Where F and f are polynomials of degree at most two in (x, y) together, seen in their traces, and nothing constrains x
or y, one Hessian says everything. With H = f_yy positive definite the lower level has the one minimiser

    y*(x) = y - H^{-1} f_y(x, y),        J = dy*/dx = -H^{-1} f_yx,

and h(x) = F(x, y*(x)) is a quadratic with the gradient F_x + J' F_y at (x, y*(x)) and the Hessian

    R = F_xx + F_xy J + J' F_yx + J' F_yy J.

With R positive definite it has one minimiser x*, and there is no other solution.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import _compiling
from bilevel._traces import degrees, of_losses, traffic
from bilevel.problem import Problem
from bilevel.solvers._units import FELT, progress_of, share
from bilevel.solvers.small.program import PASS_BYTES, Layout, flatten, precise
from bilevel.typing import PyTree

__all__ = ["exact_end"]

_MOST = 300
"""Unknowns."""
_DEFINITE = 1e-9
"""The least eigenvalue of a Hessian with a diagonal of ones that counts as positive, in double precision."""


@_compiling.jit(static_argnames=("layout",))
def _expanded(problem: Problem, z: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """F and f at (x, y), their gradients and their Hessians."""
    upper, lower = problem.full_levels()

    def losses(z: jax.Array) -> jax.Array:
        x, y = layout.unflatten(z)
        return jnp.stack([upper(x, y), lower(x, y)])

    def slopes(z: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        values, pull = jax.vjp(losses, z)
        rows = jax.vmap(lambda row: pull(row)[0])(jnp.eye(2, dtype=values.dtype))
        return rows, (values, rows)

    hessians, (values, rows) = jax.jacfwd(slopes, has_aux=True)(z)
    return values, rows, hessians


def _quadratic(problem: Problem, x: PyTree, y: PyTree) -> bool:
    """Whether both losses are seen to be of degree two at most in all variables together, and cheap."""
    read = sum(leaf.size * leaf.dtype.itemsize for s in problem.sources for leaf in jax.tree.leaves(s.arrays))
    unknowns = len(jax.tree.leaves((x, y)))
    for traced in of_losses(problem, x, y):
        read += traffic(traced)
        given = [float(i < unknowns) for i in range(len(traced.invars))]
        if traced.effects or read > PASS_BYTES or max(degrees(traced, given)) > 2:
            return False
    return True


def _definite(matrix: np.ndarray) -> bool:
    """Whether it is positive definite by more than rounding, in units in which its diagonal is one."""
    diagonal = np.diag(matrix)
    if not (np.isfinite(matrix).all() and (diagonal > 0).all()):
        return False
    unit = 1 / np.sqrt(diagonal)
    return not matrix.size or float(np.linalg.eigvalsh(unit[:, None] * matrix * unit)[0]) > _DEFINITE


def exact_end(
    problem: Problem, x: PyTree, y: PyTree, start: tuple[PyTree, PyTree]
) -> tuple[dict[str, float], tuple[PyTree, PyTree] | None] | None:
    """The certificate's measures at (x, y), and a better point where there is one; None: no problem of this kind.

    Relative measures are in units of the problem's own: a variable's length is its distance from the solution, or the
    solution's size where that is larger, and a loss's unit what its gradient makes of these lengths. Where x is off by
    as much as `FELT` what F can fall by counts as a part of F, or of how far F has come from the start, too.
    """
    parts = (
        problem.project_upper, problem.project_lower, problem.prox_lower, problem.constraint, problem.equality,
        problem.upper_constraint, problem.upper_equality,
    )  # fmt: skip
    if any(part is not None for part in parts):
        return None
    leaves = [*jax.tree.leaves(x), *jax.tree.leaves(y)]
    if sum(np.size(leaf) for leaf in leaves) > _MOST:
        return None
    layout = Layout(jax.tree.structure(x), jax.tree.structure(y), tuple(np.shape(leaf) for leaf in leaves))
    z = np.concatenate([flatten(x), flatten(y)])
    try:
        if not _quadratic(problem, x, y):
            return None
        with precise():
            values, slopes, hessians = (np.asarray(part) for part in _expanded(problem, z, layout=layout))
    except (TypeError, ValueError, IndexError):  # a function insists on single precision, or on batches of one size
        return None
    if values.dtype != np.float64 or not all(np.isfinite(part).all() for part in (values, slopes, hessians)):
        return None
    n = layout.sizes[0]
    (upper, lower), (slope, lower_slope), (hessian, lower_hessian) = values, slopes, hessians
    curved = lower_hessian[n:, n:]
    if not _definite(curved):
        return None
    answer = -np.linalg.solve(curved, lower_hessian[n:, :n])
    along = np.concatenate([np.eye(n), answer])  # d(x, y*(x)) / dx
    reduced = along.T @ hessian @ along
    if not _definite(reduced):
        return None

    away = z - np.concatenate([flatten(start[0]), flatten(start[1])])
    missing = np.linalg.solve(curved, lower_slope[n:])  # y - y*(x)
    step = np.concatenate([np.zeros(n), missing])
    at_answer = slope - hessian @ step
    change = float(-slope @ step + step @ hessian @ step / 2)  # F(x, y*(x)) - F(x, y)
    fall = along.T @ at_answer
    left = np.linalg.solve(reduced, fall) if n else np.zeros(0)  # x - x*
    best = z - step - along @ left
    descent, gap = float(fall @ left / 2), float(missing @ curved @ missing / 2)

    lengths = np.ones(z.size)
    for block in (slice(0, n), slice(n, z.size)):
        if block.stop > block.start:
            length = max(np.sqrt(np.mean(v[block] ** 2)) for v in (best, best - (z - away)))
            if not length > 0:
                return None
            lengths[block] = length
    rng = np.random.default_rng(0)
    near = [lengths * rng.normal(size=z.size) for _ in range(8)]
    unit = float(np.median([np.linalg.norm(lengths * (slope + hessian @ d)) for d in near]))
    lower_unit = float(np.median([np.linalg.norm((lengths * (lower_slope + lower_hessian @ d))[n:]) for d in near]))
    if not (unit > 0 and lower_unit > 0):
        return None
    back = -away
    since = float(slope @ back + back @ hessian @ back / 2)  # F at the start less F here
    felt = np.abs(left / lengths[:n]).max(initial=0.0) > FELT
    part = share(descent, progress_of(float(upper), since)) if felt else 0.0
    found = {
        "finite": 1.0,
        "bounded": 1.0,
        "gap": gap / lower_unit,
        "gain": abs(change) / unit,
        "near": max(float(np.abs(lengths[:n] * fall).sum()) / unit, part),
        "far": 0.0,
        "descent": descent,
        "beaten": 0.0,
        "noise_upper": 1e-12 * abs(upper) / unit,
        "noise_lower": 1e-12 * abs(lower) / lower_unit,
        "lower_loss": float(lower),
        "polished_gap": gap,
        "polished_violation": 0.0,
        "polished_change": change,
        "curvature_least": float(np.linalg.eigvalsh(curved)[0]) if curved.size else 0.0,
        "curvature_greatest": float(np.linalg.eigvalsh(curved)[-1]) if curved.size else 0.0,
    }
    ended = [_like(part, leaf) for part, leaf in zip(_cut(best, layout), leaves, strict=True)]
    cut = layout.x.num_leaves
    better = jax.tree.unflatten(layout.x, ended[:cut]), jax.tree.unflatten(layout.y, ended[cut:])
    return found, better if descent + max(-change, 0.0) > 1e-12 * abs(upper) else None


def _cut(vector: np.ndarray, layout: Layout) -> list[np.ndarray]:
    edges = np.cumsum([int(np.prod(shape)) for shape in layout.shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(vector, edges), layout.shapes, strict=True)]


def _like(value: np.ndarray, leaf: Any) -> jax.Array:
    return jax.device_put(value.astype(np.asarray(leaf).dtype))
