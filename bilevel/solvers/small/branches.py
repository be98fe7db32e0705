"""Branches of a problem whose lower level is linear or quadratic: which rows hold y, by mixed-integer programmes.

Where all rows and the lower level's conditions are affine in z = (x, y, lam, mu), a choice of the rows that hold y
(b_i = 1 for g_i = 0, b_i = 0 for lam_i = 0) leaves a polyhedron. With F as linearised at a point, the best point over
all choices is the solution of

    min F' z   s.t.   G <= 0,  H = 0,  g <= 0,  h = 0,  r = 0,
                      0 <= lam_i <= M b_i,   -g_i <= M (1 - b_i),   b_i in {0, 1}.

M is a guess, and so is the linearised F: what is found are points to begin at, on branches that starts in boxes miss
where they are small. Where F is affine and M large enough, the first one is the solution itself.
"""

from __future__ import annotations

import numpy as np

from bilevel.solvers.small.program import Program

__all__ = ["best_branches"]

_LARGE = 1e3
"""M, in units of the variables and of their multipliers."""
_MOST_ROWS, _NODES = 60, 200
"""Lower inequalities at most, and branches of the tree of a programme."""
_ROUNDS = 3
"""Linearisations of F."""
_SAME = 1e-6


def best_branches(program: Program, xy: np.ndarray) -> list[np.ndarray]:
    """(x, y) on the best branches, F linearised at `xy` and then at each of them; none where a row is not affine."""
    if not program.affine or not program.p or program.p > _MOST_ROWS:
        return []
    found: list[np.ndarray] = []
    for _ in range(_ROUNDS):
        point = _best(program, xy)
        if point is None or any(np.abs(point - other).max() <= _SAME for other in found):
            break
        found.append(point)
        xy = point
    return found


def _best(program: Program, xy: np.ndarray) -> np.ndarray | None:
    """One programme: F linearised at `xy`."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    k, size = program.n + program.m, program.size
    z = program.point(xy)
    at = program(z)
    pair, keep = program.pairs[:, 0], np.flatnonzero(program.inequality)
    upper_pair, upper_keep = program.upper_pairs[:, 0], np.flatnonzero(program.upper_inequality)
    values = [at.G[upper_keep], at.g[keep], at.H, at.G[upper_pair], at.h, at.g[pair], at.r]
    slopes = [at.dG[upper_keep], at.dg[keep], at.dH, at.dG[upper_pair], at.dh, at.dg[pair], at.dr]
    value, slope = np.concatenate(values), np.concatenate(slopes)
    if not (np.isfinite(value).all() and np.isfinite(slope).all() and np.isfinite(at.dF).all()):
        return None
    count = upper_keep.size + keep.size
    room = slope @ z - value
    rows = np.zeros((value.size + 2 * keep.size, size + keep.size))
    rows[: value.size, :size] = slope
    least, most = np.full(rows.shape[0], -np.inf), np.zeros(rows.shape[0])
    most[: value.size] = room
    least[count : value.size] = room[count:]
    for i, row in enumerate(keep):
        held, slack = value.size + i, value.size + keep.size + i
        rows[held, [k + row, size + i]] = 1.0, -_LARGE  # lam_i <= M b_i
        rows[slack, :size], rows[slack, size + i] = -at.dg[row], _LARGE  # -g_i <= M (1 - b_i)
        most[slack] = _LARGE - room[upper_keep.size + i]
    lower = np.concatenate([program.lower, np.zeros(keep.size)])
    upper = np.concatenate([program.upper, np.ones(keep.size)])
    lower[k + keep], upper[k + keep] = 0.0, _LARGE
    lower[:k], upper[:k] = np.maximum(lower[:k], -_LARGE), np.minimum(upper[:k], _LARGE)
    cost = np.zeros(size + keep.size)
    cost[:k] = at.dF[:k]
    solved = milp(
        cost,
        integrality=np.concatenate([np.zeros(size), np.ones(keep.size)]),
        bounds=Bounds(lower, np.maximum(lower, upper)),
        constraints=LinearConstraint(rows, least, most),
        options={"node_limit": _NODES},
    )
    if solved.x is None or not np.abs(solved.x).max() < (1 - _SAME) * _LARGE:  # where M ends it, it falls for ever
        return None
    return np.asarray(solved.x[:k])
