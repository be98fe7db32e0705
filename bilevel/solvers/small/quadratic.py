"""The ends of runs on linear-quadratic problems, looked at exactly: no search, and nothing that a search can miss.

Where F and f are polynomials of degree at most two in (x, y) together, seen in their traces, the lower level's rows are
affine and few, and nothing else constrains x or y, one Hessian says everything. With Q = f_yy positive definite the
lower level has one minimiser wherever it has a feasible point. Where the set A of its inequalities is active (no
inequality at all: A is empty), with the equalities and these rows R, independent in y,

    [ Q    R_y' ] [ y ]       [ f_x-terms ]
    [ R_y  0    ] [ m ]  =  - [ R_x-terms ],        so that y = J x + c and m are affine in x,

which holds on the polyhedron {x: m_A >= 0, the other rows <= 0}. There h(x) = F(x, y(x)) is a quadratic with the
gradient F_x + J' F_y and the Hessian

    F_xx + F_xy J + J' F_yx + J' F_yy J.

With that positive definite for every A, h has one minimiser on each polyhedron, found by its own active rows; the
lowest of them is the solution, and the polyhedra that hold x tell whether it is a local one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel import _compiling
from bilevel._traces import degrees, equations, of_losses, of_problem, traffic
from bilevel.problem import Problem
from bilevel.solvers._units import FELT, left_of, progress_of, share
from bilevel.solvers.small.program import PASS_BYTES, Layout, flatten, precise
from bilevel.typing import PyTree

__all__ = ["exact_end"]

_MOST = 300
"""Unknowns."""
_ROWS = 4
"""Inequalities of the lower level; there are two to the power of their number of polyhedra, with as many faces each."""
_DEFINITE = 1e-9
"""The least eigenvalue of a Hessian with a diagonal of ones that counts as positive, in double precision."""
_HERE = 1e-3
"""How far from a polyhedron, or inside it from its face, x is at most that lies on it: in units of x."""
_ROUNDING = 1e-9
"""The same of points that are computed."""


@_compiling.jit(static_argnames=("layout",))
def _expanded(problem: Problem, z: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array, jax.Array]:
    """F, f and the lower rows at (x, y), their gradients and their Hessians."""
    upper, lower = problem.full_levels()

    def values(z: jax.Array) -> jax.Array:
        x, y = layout.unflatten(z)
        return jnp.concatenate([jnp.stack([upper(x, y), lower(x, y)]), *_rows(x, y, problem)])

    def slopes(z: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        found, pull = jax.vjp(values, z)
        rows = jax.vmap(lambda row: pull(row)[0])(jnp.eye(found.size, dtype=found.dtype))
        return rows, (found, rows)

    hessians, (found, rows) = jax.jacfwd(slopes, has_aux=True)(z)
    return found, rows, hessians


def _rows(x: PyTree, y: PyTree, problem: Problem) -> tuple[jax.Array, ...]:
    """The lower level's inequalities and its equalities, each as a vector, where there are such."""
    lower = problem.full_levels().lower
    return tuple(ravel_pytree(row(x, y))[0] for row in (lower.constraint, lower.equality) if row is not None)


def _quadratic(problem: Problem, x: PyTree, y: PyTree) -> bool:
    """Whether both losses are seen to be of degree two at most in all variables together, the lower rows affine and
    few, and all of it cheap."""
    read = sum(leaf.size * leaf.dtype.itemsize for s in problem.sources for leaf in jax.tree.leaves(s.arrays))
    traces = [(2, traced) for traced in of_losses(problem, x, y)]
    if problem.constraint is not None or problem.equality is not None:
        traces.append((1, of_problem(_rows, x, y, problem)[0].jaxpr))
    if problem.constraint is not None and traces[-1][1].outvars[0].aval.size > _ROWS:
        return False
    unknowns = len(jax.tree.leaves((x, y)))
    for most, traced in traces:
        read += traffic(traced)
        given = [float(i < unknowns) for i in range(len(traced.invars))]
        if traced.effects or read > PASS_BYTES or max(degrees(traced, given)) > most:
            return False
        if any(equation.primitive.name == "stop_gradient" for equation in equations(traced)):
            return False  # its derivatives are not those of its values
    return True


def _definite(matrix: np.ndarray) -> bool:
    """Whether it is positive definite by more than rounding, in units in which its diagonal is one."""
    diagonal = np.diag(matrix)
    if not (np.isfinite(matrix).all() and (diagonal > 0).all()):
        return False
    unit = 1 / np.sqrt(diagonal)
    return not matrix.size or float(np.linalg.eigvalsh(unit[:, None] * matrix * unit)[0]) > _DEFINITE


class _Piece(NamedTuple):
    """A polyhedron of x on which the lower solution is affine; all relative to the point that is looked at.

    Attributes:
      normals, offsets: it is {dx: normals dx + offsets <= 0}.
      scales: what a row changes by when x and y move by their units.
      step: the lower solution at dx = 0, less y, with zeros for x.
      along: d(x, y*(x)) / dx.
      value, slope, hessian: of h at dx = 0.
      left: the minimiser of h on it, less x; None where the polyhedron is empty.
    """

    normals: np.ndarray
    offsets: np.ndarray
    scales: np.ndarray
    step: np.ndarray
    along: np.ndarray
    value: float
    slope: np.ndarray
    hessian: np.ndarray
    left: np.ndarray | None

    def h(self, dx: np.ndarray) -> float:
        """F at x + dx and the lower solution there."""
        return float(self.value + self.slope @ dx + dx @ self.hessian @ dx / 2)

    def outside(self, dx: np.ndarray, lengths: np.ndarray) -> float:
        """How far outside of it x + dx is, at most over its faces, in units of x."""
        return float(self._distances(dx, lengths).max(initial=-np.inf))

    def _distances(self, dx: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The rows at x + dx, each in its own scale where x hardly reaches it, else as the way to where it is zero."""
        steep = np.linalg.norm(self.normals * lengths, axis=1)
        return (self.normals @ dx + self.offsets) / np.where(steep > 1e-12 * self.scales, steep, self.scales)

    def pull(self, lengths: np.ndarray) -> float:
        """The slope of h at dx = 0 that no face holds: the length of the residual of h's conditions, units of x."""
        slope = lengths * self.slope
        faces = self.normals[self._distances(np.zeros(lengths.size), lengths) >= -_HERE] * lengths
        found = float(np.abs(slope).sum())
        for chosen in _subsets(len(faces) if slope.size else 0):
            multipliers = np.linalg.lstsq(faces[chosen].T, -slope, rcond=None)[0] if chosen else np.zeros(0)
            if (multipliers >= 0).all():
                found = min(found, float(np.abs(slope + faces[chosen].T @ multipliers).sum()))
        return found


def _subsets(count: int) -> Iterator[list[int]]:
    """All of 0, ..., count - 1, the small ones first."""
    return (list(chosen) for size in range(count + 1) for chosen in itertools.combinations(range(count), size))


def _pieces(
    slopes: np.ndarray, hessians: np.ndarray, values: np.ndarray, n: int, inequalities: int, units: np.ndarray
) -> list[_Piece] | None:
    """All polyhedra; None where h is not strictly convex on one of them."""
    (upper, _), (slope, lower_slope), (hessian, lower_hessian) = values[:2], slopes[:2], hessians[:2]
    rows, jacobian = values[2:], slopes[2:]
    found = []
    for active in _subsets(inequalities):
        held = [*active, *range(inequalities, len(rows))]
        normal = jacobian[held][:, n:]
        if len(held) and np.linalg.matrix_rank(
            normal / np.linalg.norm(normal, axis=1, keepdims=True).clip(1e-300)
        ) < len(held):
            continue  # the same y has multipliers on independent rows as well
        empty = np.zeros((len(held), len(held)))
        conditions = np.block([[lower_hessian[n:, n:], normal.T], [normal, empty]])
        right = np.block([[lower_hessian[n:, :n], lower_slope[n:, None]], [jacobian[held][:, :n], rows[held, None]]])
        answer = -np.linalg.solve(conditions, right)
        m = slope.size - n
        along = np.concatenate([np.eye(n), answer[:m, :n]])
        step = np.concatenate([np.zeros(n), answer[:m, n]])
        multipliers = answer[m : m + len(active)]
        others = [i for i in range(inequalities) if i not in active]
        normals = np.concatenate([-multipliers[:, :n], jacobian[others] @ along])
        offsets = np.concatenate([-multipliers[:, n], rows[others] + jacobian[others] @ step])
        steep = np.linalg.norm(jacobian * units, axis=1)
        pressing = np.linalg.norm((units * (np.abs(lower_slope) + np.abs(lower_hessian) @ units))[n:]) / steep[active]
        reduced = along.T @ hessian @ along
        if not _definite(reduced):
            return None
        value = float(upper + slope @ step + step @ hessian @ step / 2)
        scales = np.concatenate([pressing, steep[others]]).clip(1e-300)
        piece = _Piece(normals, offsets, scales, step, along, value, along.T @ (slope + hessian @ step), reduced, None)
        found.append(piece._replace(left=_least(piece)))
    return found


def _least(piece: _Piece) -> np.ndarray | None:
    """The minimiser of h on the polyhedron."""
    lengths = np.ones(piece.slope.size)
    free = -np.linalg.solve(piece.hessian, piece.slope) if lengths.size else np.zeros(0)
    lengths *= max(np.abs(free).max(initial=0.0), 1e-300)
    for chosen in _subsets(len(piece.offsets)):
        faces = piece.normals[chosen]
        norms = np.linalg.norm(faces, axis=1)
        reached = (norms * lengths.max(initial=0.0) > 1e-12 * piece.scales[chosen]).all()
        if len(chosen) and (not reached or np.linalg.matrix_rank(faces / norms[:, None]) < len(chosen)):
            continue
        empty = np.zeros((len(chosen), len(chosen)))
        conditions = np.block([[piece.hessian, faces.T], [faces, empty]])
        answer = -np.linalg.solve(conditions, np.concatenate([piece.slope, piece.offsets[chosen]]))
        dx, multipliers = answer[: lengths.size], answer[lengths.size :]
        size = np.maximum(lengths, np.abs(dx).max(initial=0.0))
        signs = (multipliers >= -_ROUNDING * np.abs(multipliers).max(initial=0.0)).all()
        if signs and piece.outside(dx, size) <= _ROUNDING:
            return dx
    return None


def exact_end(
    problem: Problem, x: PyTree, y: PyTree, start: tuple[PyTree, PyTree], asked: float
) -> tuple[dict[str, float], tuple[PyTree, PyTree] | None] | None:
    """The certificate's measures at (x, y), and a better point where there is one; None: no problem of this kind.

    Relative measures are in units of the problem's own: a variable's length is its distance from the solution, or the
    solution's size where that is larger, and a loss's unit what its gradient makes of these lengths. Where x is off by
    as much as `FELT`, or F's slope is above the tolerance `asked`, what F can fall by counts as a part of F, or of
    how far F has come from the start, too.
    """
    parts = (
        problem.project_upper, problem.project_lower, problem.prox_lower, problem.upper_constraint,
        problem.upper_equality,
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
            equalities = 0 if problem.equality is None else of_problem(_rows, x, y, problem)[1][-1].size
    except (TypeError, ValueError, IndexError):  # a function insists on single precision, or on batches of one size
        return None
    if values.dtype != np.float64 or not all(np.isfinite(part).all() for part in (values, slopes, hessians)):
        return None
    n, inequalities = layout.sizes[0], values.size - 2 - equalities
    curved = hessians[1, n:, n:]
    away = z - np.concatenate([flatten(start[0]), flatten(start[1])])
    blocks = [block for block in (slice(0, n), slice(n, z.size)) if block.stop > block.start]
    units = np.ones(z.size)
    for block in blocks:
        units[block] = max(np.abs(v[block]).max() for v in (z, away)) or 1.0
    if not _definite(curved) or (pieces := _pieces(slopes, hessians, values, n, inequalities, units)) is None:
        return None
    ends = [(piece.h(piece.left), piece, piece.left) for piece in pieces if piece.left is not None]
    if not ends:
        return None
    lowest, of, left = min(ends, key=lambda end: end[0])
    best = z + of.step + of.along @ left
    lengths = np.ones(z.size)
    for block in blocks:
        length = max(np.sqrt(np.mean(v[block] ** 2)) for v in (best, best - (z - away)))
        if not length > 0:
            return None
        lengths[block] = length
    at_x = [(piece, left) for _, piece, left in ends if piece.outside(np.zeros(n), lengths[:n]) <= _HERE]
    if not at_x:  # no y is feasible at this x
        return None
    here = min((piece for piece, _ in at_x), key=lambda piece: piece.outside(np.zeros(n), lengths[:n]))

    (upper, lower), (slope, lower_slope), (hessian, lower_hessian) = values[:2], slopes[:2], hessians[:2]
    step = here.step
    change = here.value - float(upper)  # F(x, y*(x)) - F(x, y)
    gap = -float(lower_slope @ step + step @ lower_hessian @ step / 2)  # f(x, y) - f(x, y*(x))
    rng = np.random.default_rng(0)
    near = [lengths * rng.normal(size=z.size) for _ in range(8)]
    unit = float(np.median([np.linalg.norm(lengths * (slope + hessian @ d)) for d in near]))
    lower_unit = float(np.median([np.linalg.norm((lengths * (lower_slope + lower_hessian @ d))[n:]) for d in near]))
    if not (unit > 0 and lower_unit > 0):
        return None
    back = -away
    since = float(slope @ back + back @ hessian @ back / 2)  # F at the start less F here
    progress = progress_of(float(upper), since)

    # Where coordinates of x are of unlike sizes the curvature says which way is long for F.
    bent = lambda v: float(np.sqrt(v @ here.hessian @ v))  # noqa: E731
    long = max(bent(v) for v in (best[:n], (best - (z - away))[:n]))

    # Beside an offset x hardly moves, whatever F falls by: that counts where the slope is above the tolerance.
    sloped = min(piece.pull(np.ones(n)) for piece, _ in at_x) > asked

    def felt(fall: float, dx: np.ndarray) -> float:
        moved = np.abs(dx / lengths[:n]).max(initial=0.0) > FELT or bent(dx) > FELT * long
        return share(fall, progress) if moved or sloped else 0.0

    beside = [(piece.value - piece.h(end), end) for piece, end in at_x]
    descent = max(fall for fall, _ in beside)
    further = here.value - lowest
    rows, steep = values[2:], np.linalg.norm(slopes[2:] * lengths, axis=1)
    broken = np.concatenate([rows[:inequalities], np.abs(rows[inequalities:])]) / np.where(steep > 0, steep, 1.0)
    found = {
        "finite": 1.0,
        "bounded": 1.0,
        "violation": float(broken.max(initial=0.0)),
        "gap": max(gap, 0.0) / lower_unit,
        "gain": abs(change) / unit,
        "near": max(*(piece.pull(lengths[:n]) / unit for piece, _ in at_x), *(felt(*end) for end in beside), 0.0),
        "far": 0.0,
        "left": left_of(max(descent, further, 0.0), progress, unit),
        "descent": descent,
        "beaten": 0.0,
        "noise_upper": 1e-12 * abs(upper) / unit,
        "noise_lower": 1e-12 * abs(lower) / lower_unit,
        "lower_loss": float(lower),
        "polished_gap": max(gap, 0.0),
        "polished_violation": float(broken.max(initial=0.0)),
        "polished_change": change,
        "curvature_least": float(np.linalg.eigvalsh(curved)[0]) if curved.size else 0.0,
        "curvature_greatest": float(np.linalg.eigvalsh(curved)[-1]) if curved.size else 0.0,
    }
    if further > descent:
        found["beaten"], found["far"] = further, max(further / unit, felt(further, left))
    ended = [_like(part, leaf) for part, leaf in zip(_cut(best, layout), leaves, strict=True)]
    cut = layout.x.num_leaves
    better = jax.tree.unflatten(layout.x, ended[:cut]), jax.tree.unflatten(layout.y, ended[cut:])
    return found, better if max(further, 0.0) + max(-change, 0.0) > 1e-12 * abs(upper) else None


def _cut(vector: np.ndarray, layout: Layout) -> list[np.ndarray]:
    edges = np.cumsum([int(np.prod(shape)) for shape in layout.shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(vector, edges), layout.shapes, strict=True)]


def _like(value: np.ndarray, leaf: Any) -> jax.Array:
    return jax.device_put(value.astype(np.asarray(leaf).dtype))
