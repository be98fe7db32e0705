"""The search of a small problem: relaxed KKT systems, cuts by the lower level's value, verification.

All vectors are in the units of `Program`. A local method sees the rows

    G <= 0,   H = 0,   g <= 0,   h = 0,   r = 0,   lam >= 0,   t + lam_i g_i >= 0,

t going to zero; a cut says that f(x, y) is at most what a known lower point y_k attains at x.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bilevel.solvers.small.nlp import Rows, attempt
from bilevel.solvers.small.program import Evaluated, Program, equilibrated

__all__ = ["Lowest", "Point", "Search", "deeper", "lower_starts", "solve_lower"]

LADDER = (1e-1, 1e-3, 1e-5, 1e-8)
_SHORT = (1e-4, 1e-8)
FEASIBLE = 1e-6
"""The largest violation of a row that counts as none, in units of the variables."""
RUNAWAY = 1e5
"""A point beyond it, in units of the variables, is never verified."""
_HOPELESS = 1e-2
"""A violation at which a point is not looked at any further."""
_BOTH = 3
"""Rounds of cuts in which the search goes on from the lower solution, too."""
EXACT = 1e-10
"""What the conditions of a lower solution are left with by rounding."""
SAME = 1e-4
"""How far apart two lower solutions are at least, in units of the variables, that are two."""
_BESIDE = 1e-2
"""How far from a relaxed point the exact one is at most, in units of the variables."""
_STEEP = 1e3
"""A lower solution that moves faster with x, in units of the variables, is at a kink."""
_DAMPING = (1.0, 0.3, 0.1, 0.03)
"""Parts of a Newton step that are tried."""
_SAME_VALLEY = 1e-5
"""Scaled f: local minima that differ by less are taken for one."""
_SEVERAL, _HOPS, _PATIENCE = 3, 100, 10
"""From how many valleys on the lower level is solved from more starts, how many, and how many without success."""
_SHIFTS = 5
"""Steps of x to a tie."""
_SETTLED, _LEVEL = 5, 1e-11
"""How often F is solved for again in the unit of the slope that is left, and the slope and the fall that are none."""
_FIRST, _BESIDE_KNOWN, _CREPT = 30, 3e-2, 3
"""Evaluations of a lower solve after which it is looked at where it goes, how near it is to the end of another one that
it is left, in units of y, and how many solves may spend all their iterations."""
_NEWTON_STEPS, _NEWTON_REST = 50, 1e-11
"""Steps of a lower solve by Newton's method, and the last one's size, in units of y."""
_WIDE = 1e2
"""Units of a variable: a box as wide as this one is no hint of where to look."""


@dataclasses.dataclass
class Lowest:
    """What is known of the lower level at one x.

    Attributes:
      value: the least scaled f at a feasible point; infinite where none was found.
      points: (x, y) of the local minima found, the lowest first.
      values: their f.
      valleys: those of the local minima that differ in f: where there are several, there may be more.
    """

    value: float
    points: list[np.ndarray]
    values: list[float]
    valleys: list[np.ndarray] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Point:
    """A candidate: (x, y) with what is known of it.

    Attributes:
      xy: the point; `z` with its multipliers.
      loss: scaled F.
      violation: of all rows.
      gap: f(x, y) less the lowest value found; infinite where none was.
      lowest: what was found of the lower level.
    """

    xy: np.ndarray
    z: np.ndarray
    loss: float
    violation: float
    gap: float
    lowest: Lowest

    def verified(self, tol: float) -> bool:
        """Whether it is feasible, no lower point lies lower, and it is no runaway."""
        return bool(
            self.violation <= max(FEASIBLE, tol)
            and np.isfinite(self.gap)
            and self.gap <= tol
            and np.isfinite(self.loss)
            and np.abs(self.xy).max() < RUNAWAY
        )


# ---------------------------------------------------------------- the lower level


def lower_rows(program: Program) -> Any:
    """The lower level at the x of the point, as an NLP in y."""
    n, k = program.n, program.n + program.m
    rest = program.inequality & ~program.bounding
    first = program.pairs[:, 0]
    first = first[~program.bounding[first]]

    def rows(xy: np.ndarray) -> Rows:
        at = program(program.point(xy))
        gradient = np.concatenate([np.zeros(n), at.df[n:k]])
        return Rows(
            at.f,
            gradient,
            -at.g[rest],
            -at.dg[rest][:, :k],
            np.concatenate([at.h, at.g[first]]),
            np.concatenate([at.dh[:, :k], at.dg[first][:, :k]]),
        )

    return rows


def solve_lower(
    program: Program, xy: np.ndarray, starts: Iterable[np.ndarray], iterations: int = 100, method: str = "SLSQP"
) -> Lowest:
    """Local solves of the lower level at the x of `xy` from several y; a feasible start counts as a point itself.

    A linear programme is solved as one, whatever the starts.
    """
    n = program.n
    tried = [np.concatenate([xy[:n], y]) for y in starts]
    ends: list[np.ndarray] = []
    if program.linear:
        ends = solve_linear(program, xy)[0]
    elif (only := _only_minimiser(program, tried[0])) is not None:
        ends = [only]
    else:
        lower, upper = program.own_lower.copy(), program.own_upper.copy()
        lower[:n] = upper[:n] = xy[:n]
        rows = lower_rows(program)
        given: Any = {"method": method, "iterations": iterations, "tol": 1e-13, "far": 1e30}
        crept = 0
        for start in tried:
            # Where there is one minimiser, other starts than the first and one more lead to it again.
            if len(ends) == 2 and not crept and all(program.convex(end) for end in ends):
                break
            # At rows without a qualification a method creeps: one that creeps to where another one has been is left,
            # and where some have crept others are not waited for.
            end = attempt(rows, start, lower, upper, **given, evaluations=_FIRST if ends else np.inf)
            if ends and not end.rested:
                if any(np.abs(end.point - other).max() <= _BESIDE_KNOWN for other in ends):
                    continue
                end = attempt(rows, end.point, lower, upper, **given) if crept < _CREPT else end
            crept += not end.rested
            ends.append(end.point)
    return _lowest(program, tried, ends)


def _only_minimiser(program: Program, start: np.ndarray) -> np.ndarray | None:
    """The lower solution at the x of `start` by Newton's steps, where f(x, .) is seen to be convex and no row bounds y;
    None where it is not, or does not bend up at the end of the steps."""
    n, k = program.n, program.n + program.m
    if program.p or program.q or not program.convex_at(start):
        return None
    point, at = start, program(program.point(start))
    for _ in range(_NEWTON_STEPS):
        if not np.isfinite(at.f) or not np.isfinite(at.dr).all() or not np.isfinite(at.r).all():
            return None
        units, hessian = equilibrated(at.dr[:, n:k])
        w, vectors = np.linalg.eigh(hessian)
        if not w[-1] > 0:
            return None
        step = -units * (vectors @ (vectors.T @ (units * at.r) / np.maximum(w, 1e-14 * w[-1])))
        slope = float(at.df[n:k] @ step)
        if np.abs(step).max() <= _NEWTON_REST * max(1.0, np.abs(point[n:]).max()):
            return point if program.convex(point) else None
        left = np.linalg.norm(units * at.r)
        for halvings in range(30):
            moved = point.copy()
            moved[n:] += 0.5**halvings * step
            there = program(program.point(moved))
            if there.f <= at.f + 1e-4 * 0.5**halvings * slope:
                break
            # Where values no longer tell points apart, slopes do.
            level = -slope <= 1e-9 * abs(at.f) and there.f <= at.f + 1e-14 * abs(at.f)
            if level and np.linalg.norm(units * there.r) < 0.5 * left:
                break
        else:
            return point if -slope <= 1e-12 * abs(at.f) and program.convex(point) else None
        point, at = moved, there
    return None


def _lowest(program: Program, starts: list[np.ndarray], ends: list[np.ndarray]) -> Lowest:
    """What solves of the lower level from `starts` to `ends` say of it."""
    found = []
    for i, point in enumerate([*starts, *ends]):
        at = program(program.point(point))
        # A point that breaks its rows a little may be lower by that much times their multipliers.
        if program.violation(at, upper=False) <= FEASIBLE and np.isfinite(at.f):
            found.append((at.f, i, point))
    found.sort(key=lambda entry: entry[:2])
    points: list[np.ndarray] = []
    values: list[float] = []
    valleys: list[tuple[float, np.ndarray]] = []
    for value, i, point in found:
        if all(np.abs(point - other).max() > SAME for other in points):
            points.append(point)
            values.append(value)
        if i >= len(starts) and all(abs(value - other) > _SAME_VALLEY for other, _ in valleys):
            valleys.append((value, point))
    return Lowest(values[0] if values else np.inf, points, values, [point for _, point in valleys])


def deeper(program: Program, xy: np.ndarray, lowest: Lowest, rng: np.random.Generator, method: str = "SLSQP") -> Lowest:
    """The same after more solves, where those made ended in several valleys: from around the lowest point, and from a
    valley's distance along each coordinate, until many in a row found nothing lower."""
    n, m = program.n, program.m
    if len(lowest.valleys) < _SEVERAL or program.convex_at(xy):
        return lowest
    low, high = program.own_lower[n : n + m], program.own_upper[n : n + m]
    left, misses, sweep = _HOPS, 0, 0
    while left and (misses < _PATIENCE or sweep < 2 * m):
        left -= 1
        start = lowest.points[0][n:].copy()
        if misses < _PATIENCE:
            along = np.ones(m) if misses % 2 else np.eye(m)[rng.integers(m)]
            start += 10.0 ** rng.uniform(-1.5, 1) * rng.normal(size=m) * along
        else:
            j = sweep // 2
            apart = np.abs(np.stack(lowest.valleys)[:, n + j] - start[j])
            apart = apart[apart > 1e-2 * apart.max(initial=0.0)]
            start[j] += (-1) ** sweep * apart.min(initial=np.inf) if apart.size else 0.0
            sweep += 1
        found = solve_lower(program, xy, [np.clip(start, low, high)], method=method)
        lower = found.value < lowest.value - _SAME_VALLEY
        # What is no lower is another valley all the same, and says how far apart they are.
        lowest = _lowest(program, [], [*lowest.points, *found.points[:1]])
        misses, sweep = (0, 0) if lower else (misses + 1, sweep)
    return lowest


def solve_linear(program: Program, xy: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """A linear lower level at the x of `xy`: minimisers, the best for F among them, and whether it is unbounded."""
    from scipy.optimize import linprog

    n, k = program.n, program.n + program.m
    at = program(program.point(xy))
    rest = program.inequality & ~program.bounding
    pair = program.pairs[:, 0]
    pair = pair[~program.bounding[pair]]
    matrix, equal = at.dg[rest][:, n:k], np.concatenate([at.dh, at.dg[pair]])[:, n:k]
    room = matrix @ xy[n:] - at.g[rest]
    level = equal @ xy[n:] - np.concatenate([at.h, at.g[pair]])
    bounds = np.stack([program.own_lower[n:k], program.own_upper[n:k]], axis=1)
    if not all(np.isfinite(part).all() for part in (at.df, at.dF, matrix, room, equal, level)):
        return [], False

    def solve(cost: np.ndarray, matrix: np.ndarray, room: np.ndarray) -> Any:
        rows = {"A_ub": matrix, "b_ub": room} if matrix.shape[0] else {}
        rows |= {"A_eq": equal, "b_eq": level} if equal.shape[0] else {}
        options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
        return linprog(cost, bounds=bounds, method="highs", options=options, **rows)

    first = solve(at.df[n:k], matrix, room)
    if first.status != 0:
        return [], first.status == 3
    marginals = [first.lower.marginals, first.upper.marginals]
    marginals += [first.ineqlin.marginals] if matrix.shape[0] else []
    held = sum(int((np.abs(part) > 1e-9).sum()) for part in marginals) + equal.shape[0]
    points = [first.x]
    there = program(program.point(np.concatenate([xy[:n], first.x])))
    if held < program.m and np.isfinite(there.dF).all():
        face = np.concatenate([matrix, at.df[None, n:k]])
        second = solve(there.dF[n:k], face, np.append(room, at.df[n:k] @ first.x))
        points += [second.x] if second.status == 0 else []
    return [np.concatenate([xy[:n], np.clip(y, bounds[:, 0], bounds[:, 1])]) for y in points], False


def lower_starts(program: Program, xy: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """y itself and -y, then points around it and in its box, at widths of all sizes."""
    n, k = program.n, program.n + program.m
    low, high = program.own_lower[n:k], program.own_upper[n:k]
    starts = [xy[n:], np.clip(-xy[n:], low, high)]
    for i in range(count - 2):
        starts.append(sample(low, high, xy[n:], rng, wide=i % 2 == 0))
    return starts[:count]


def sample(
    low: np.ndarray,
    high: np.ndarray,
    center: np.ndarray,
    rng: np.random.Generator,
    wide: bool,
    place: np.ndarray | None = None,
) -> np.ndarray:
    """A point in a box: uniform where it is closed, log-uniform widths where it is open or wide; or near the center.

    `place`: where in the closed ones, in [0, 1].
    """
    width = 10.0 ** rng.uniform(-1, 1.5)
    around = center + width * rng.normal(size=center.size)
    if not wide:
        return np.clip(around, low, high)
    closed = np.isfinite(low) & np.isfinite(high)
    span = np.where(closed, high - low, 0.0)
    where = rng.uniform(size=center.size) if place is None else place
    inside = np.where(closed, low, 0.0) + span * where
    # A box that is wide in the problem's own units says little: there widths of all sizes up to its own.
    far = 10.0 ** (np.abs(2 * where - 1) * np.log10(10 * np.maximum(span, 1.0)) - 1)
    inside = np.where(span > _WIDE, np.clip(center + np.sign(where - 0.5) * far, low, high), inside)
    above = np.where(np.isfinite(low), low, 0.0) + 10.0 ** rng.uniform(-1, 1.5, center.size)
    below = np.where(np.isfinite(high), high, 0.0) - 10.0 ** rng.uniform(-1, 1.5, center.size)
    half = np.where(np.isfinite(low), above, np.where(np.isfinite(high), below, around))
    return np.where(closed, inside, half)


def spread(number: int, size: int) -> np.ndarray:
    """Point number 1, 2, ... of an additive recurrence that fills [0, 1]^size evenly."""
    root = 2.0
    for _ in range(30):  # of r^(size + 1) = r + 1: the golden ratio and its relatives
        root = (1 + root) ** (1 / (size + 1))
    return (0.5 + number * root ** -np.arange(1.0, size + 1)) % 1.0


# ---------------------------------------------------------------- the whole problem


@dataclasses.dataclass
class Cut:
    """f(x, y) <= f(x, y_k) + M (what y_k breaks of the lower rows at x), with y_k = y + slope (x - at).

    A y_k that moves with x as the lower solution does bounds the lower level's value to second order, and one that
    stays does not even to first where its rows move.
    """

    y: np.ndarray
    weight: float
    at: np.ndarray
    slope: np.ndarray


class Search:
    """The parts of a search, each on one start.

    Args:
      program: the problem.
      method: of `nlp.METHODS`.
      tol: the gap that counts as none, scaled.
      rounds: the most rounds of cuts.
      lower_count: starts of the lower level at a verification.
    """

    def __init__(
        self, program: Program, method: str = "SLSQP", tol: float = 1e-6, rounds: int = 5, lower_count: int = 8
    ) -> None:
        self.program, self.method, self.tol, self.rounds, self.lower_count = program, method, tol, rounds, lower_count
        self.n, self.k = program.n, program.n + program.m

    # ------------------------------------------------------------ local solves

    def rows(
        self, t: float | None, active: np.ndarray | None = None, cuts: Sequence[Cut] = (), stationary: bool = True
    ) -> Any:
        """The NLP: relaxed by t; on the branch `active` (g_i = 0 there, lam_i = 0 elsewhere); or, not `stationary`,
        without multipliers."""
        program, k = self.program, self.k
        # Bounds of one unknown are the method's own, exactly; as rows besides they would be rows twice.
        pair, upper_pair = program.pairs[:, 0], program.upper_pairs[:, 0]
        pair, upper_pair = pair[~program.bounding[pair]], upper_pair[~program.upper_bounding[upper_pair]]
        keep = program.inequality
        rest, upper_rest = keep & ~program.bounding, program.upper_inequality & ~program.upper_bounding
        off = rest if active is None else rest & ~active

        def rows(z: np.ndarray) -> Rows:
            at = program(z)
            lam = z[k : k + program.p]
            inequality = [-at.G[upper_rest], -at.g[off]]
            inequality_jacobian = [-at.dG[upper_rest], -at.dg[off]]
            equality = [at.H, at.h, at.G[upper_pair], at.g[pair]]
            equality_jacobian = [at.dH, at.dh, at.dG[upper_pair], at.dg[pair]]
            if stationary:
                equality.append(at.r)
                equality_jacobian.append(at.dr)
            if active is not None:
                equality.append(at.g[rest & active])
                equality_jacobian.append(at.dg[rest & active])
            elif stationary and program.p:
                product = lam[:, None] * at.dg
                product[:, k : k + program.p] += np.diag(at.g)
                inequality.append((t + lam * at.g)[keep])
                inequality_jacobian.append(product[keep])
            for cut in cuts:
                value, gradient = self._cut(at, z, cut)
                inequality.append(np.array([value]))
                inequality_jacobian.append(gradient[None])
            return Rows(
                at.F,
                at.dF,
                np.concatenate(inequality),
                np.concatenate(inequality_jacobian),
                np.concatenate(equality),
                np.concatenate(equality_jacobian),
            )

        return rows

    def _cut(self, at: Evaluated, z: np.ndarray, cut: Cut) -> tuple[float, np.ndarray]:
        """What the cut leaves, and its gradient."""
        n, k, program = self.n, self.k, self.program
        there = program(program.point(np.concatenate([z[:n], cut.y + cut.slope @ (z[:n] - cut.at)])))
        broken, side = there.g > 0, np.sign(there.h)
        value = there.f + cut.weight * (there.g[broken].sum() + np.abs(there.h).sum()) - at.f
        slope = there.df + cut.weight * (there.dg[broken].sum(0) + side @ there.dh)
        gradient = -at.df.copy()
        gradient[:n] += slope[:n] + slope[n:k] @ cut.slope
        return value, gradient

    def cut(self, xy: np.ndarray) -> Cut:
        """The cut by a lower solution (x, y_k)."""
        n, k, program = self.n, self.k, self.program
        z, left = self.multipliers(xy)
        weight = 2 * float(np.abs(z[k:]).max(initial=0.0)) + 1
        slope = np.zeros((program.m, n))
        if left <= 1e-3:
            at = program(z)
            held = program.inequality & (z[k : k + program.p] > 1e-7) & (at.g > -1e-4)
            held[program.pairs[:, 0]] = True
            rows = np.concatenate([at.dr, at.dg[held], at.dh])
            unknown = np.r_[n:k, k + np.flatnonzero(held), k + program.p : program.size]
            if n and np.isfinite(rows).all():
                found = -np.linalg.lstsq(rows[:, unknown], rows[:, :n], rcond=1e-9)[0][: program.m]
            else:
                found = slope
            if np.isfinite(found).all() and np.abs(found).max(initial=0.0) < _STEEP:
                slope = found
        return Cut(xy[n:], weight, xy[:n], slope)

    def local(
        self,
        z: np.ndarray,
        t: float | None,
        active: np.ndarray | None = None,
        cuts: Sequence[Cut] = (),
        stationary: bool = True,
        fixed: bool = False,
        iterations: int = 60,
        unit: float = 1.0,
    ) -> np.ndarray:
        """One local solve from z; `fixed`: x stays; `unit`: of F, for the method."""
        lower, upper = self.bounds(active, stationary)
        if fixed:
            lower[: self.n] = upper[: self.n] = z[: self.n]
        all_rows = self.rows(t, active, cuts, stationary)

        def rows(z: np.ndarray) -> Rows:
            at = all_rows(z)
            return at._replace(value=at.value / unit, gradient=at.gradient / unit)

        return attempt(rows, z, lower, upper, method=self.method, iterations=iterations).point

    def bounds(self, active: np.ndarray | None = None, stationary: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Of the unknowns in `rows`."""
        program, k = self.program, self.k
        lower, upper = program.lower.copy(), program.upper.copy()
        if not stationary:
            lower[k:] = upper[k:] = 0.0
        if active is not None:
            off = np.flatnonzero(program.inequality & ~active)
            lower[k + off] = upper[k + off] = 0.0
            for i in np.flatnonzero(program.bounding & program.inequality & active):
                j, edge = program.edges[int(i)]
                lower[j] = upper[j] = edge
        return lower, upper

    def ladder(
        self, z: np.ndarray, ladder: Sequence[float] = LADDER, cuts: Sequence[Cut] = (), fixed: bool = False
    ) -> np.ndarray:
        """Local solves with t going down, each from the last one's end."""
        if not self.program.inequality.any():
            ladder = ladder[-1:]
        for t in ladder:
            z = self.local(z, t, cuts=cuts, fixed=fixed)
        return z

    def multipliers(self, xy: np.ndarray) -> tuple[np.ndarray, float]:
        """z with multipliers by ridge least squares, rows far from active held down, and what is left of r."""
        program, n, k = self.program, self.n, self.k
        z = program.point(xy)
        at = program(z)
        if not (program.p + program.q) or not np.isfinite(at.r).all():
            return z, float(np.abs(at.r).max(initial=0.0))
        pair = np.zeros(program.p, bool)
        pair[program.pairs[:, 0]] = True
        use = program.inequality | pair
        columns = np.concatenate([at.dg[use], at.dh])[:, n:k].T
        weights = np.concatenate([np.where(pair, 0.0, at.g)[use], np.zeros(program.q)])
        matrix = columns.T @ columns + np.diag(weights**2 + 1e-8)
        sign = np.concatenate([program.inequality[use], np.zeros(program.q, bool)])
        found = np.zeros(sign.size)
        free = np.ones(sign.size, bool)
        try:
            for _ in range(sign.size + 1):  # multipliers that come out negative are dropped, the worst first
                found[:] = 0.0
                found[free] = np.linalg.solve(matrix[np.ix_(free, free)], -columns[:, free].T @ at.r)
                worst = np.where(sign & free, found, 0.0)
                if worst.min(initial=0.0) >= -1e-9:
                    break
                free[int(np.argmin(worst))] = False
            # The ridge, which is for rows far from active, holds all multipliers down a little: again without those.
            exact, near = found.copy(), free & (~sign | (found > 1e-6))
            exact[~near] = 0.0
            for _ in range(2):
                left = at.r + columns @ exact
                exact[near] += np.linalg.solve(matrix[np.ix_(near, near)], -columns[:, near].T @ left)
            exact = np.clip(exact, np.where(sign, 0.0, -np.inf), np.inf)
            if np.abs(at.r + columns @ exact).max() < np.abs(at.r + columns @ found).max():
                found = exact
        except np.linalg.LinAlgError:
            return z, np.inf
        found = np.clip(found, np.where(sign, 0.0, -1e3), 1e3)
        left = at.r + columns @ found
        z[k : k + program.p][use] = found[: int(use.sum())]
        z[k + program.p :] = found[int(use.sum()) :]
        return z, float(np.abs(left).max())

    def feasible(self, xy: np.ndarray) -> np.ndarray:
        """A point next to (x, y) at which the rows of both levels hold, whether or not y is optimal."""
        program, k = self.program, self.k
        xy = np.clip(xy, program.lower[:k], program.upper[:k])
        if program.violation(program(program.point(xy))) <= FEASIBLE:
            return xy
        all_rows = self.rows(None, np.zeros(program.p, bool), stationary=False)

        def rows(point: np.ndarray) -> Rows:
            away = np.zeros(program.size)
            away[:k] = point[:k] - xy
            return all_rows(point)._replace(value=float(away @ away) / 2, gradient=away)

        lower, upper = program.lower.copy(), program.upper.copy()
        lower[k:] = upper[k:] = 0.0
        end = attempt(rows, program.point(xy), lower, upper, method=self.method, iterations=30, tol=1e-6).point
        found = end[:k]
        before, after = (program.violation(program(program.point(point))) for point in (xy, found))
        return found if after < before else xy

    def high_point(self, xy: np.ndarray) -> np.ndarray:
        """Where the upper level would like (x, y) to be: a local solve that ignores the lower loss."""
        return self.local(self.program.point(xy), None, np.zeros(self.program.p, bool), stationary=False)[: self.k]

    def polish(self, xy: np.ndarray, steps: int = 40) -> np.ndarray:
        """The lower solution next to y, by Newton's method on its conditions: as exact as the arithmetic allows.

        A minimiser of f alone is known to the root of what f resolves, and where f is flat to less.
        """
        program, n, k = self.program, self.n, self.k
        z, left = self.multipliers(xy)
        if not np.isfinite(left) or left > 1e-2:
            return xy
        held = program.inequality & (z[k : k + program.p] > 1e-7) & (program(z).g > -1e-4)
        z[k : k + program.p][program.inequality & ~held] = 0.0
        held[program.pairs[:, 0]] = True
        unknown = np.r_[n:k, k + np.flatnonzero(held), k + program.p : program.size]

        def conditions(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            at = program(z)
            return np.concatenate([at.r, at.g[held], at.h]), np.concatenate([at.dr, at.dg[held], at.dh])[:, unknown]

        value, slope = conditions(z)
        size = np.abs(value).max(initial=0.0)
        for _ in range(steps):
            if size < 1e-15 or not np.isfinite(slope).all():
                break
            step = np.linalg.lstsq(slope, value, rcond=None)[0]
            for factor in _DAMPING:
                after = z.copy()
                after[unknown] -= factor * step
                new_value, new_slope = conditions(after)
                new_size = np.abs(new_value).max(initial=0.0)
                if new_size < size:
                    break
            else:
                break
            z, value, slope, size = after, new_value, new_slope, new_size
        lam = z[k : k + program.p][program.inequality]
        at = program(program.point(z[:k]))
        before = program(program.point(xy))
        fine = lam.min(initial=0.0) > -1e-7 and program.violation(at, upper=False) <= FEASIBLE
        near = (np.abs(z[:k] - xy).max() <= 1e-1 and at.f <= before.f + 1e-9) or at.f < before.f - 1e-9
        return z[:k] if fine and near else xy

    # ------------------------------------------------------------ points

    def judge(
        self,
        z: np.ndarray,
        rng: np.random.Generator,
        known: Iterable[np.ndarray] = (),
        count: int = 0,
        deep: bool = False,
    ) -> Point:
        """The point (x, y) of z, with the lower level solved from several starts; `deep`: from more where it has many
        minima."""
        program, k = self.program, self.k
        xy = np.clip(z[:k], program.lower[:k], program.upper[:k])
        at = program(program.point(xy))
        if program.violation(at) > _HOPELESS:
            return Point(xy, np.concatenate([xy, z[k:]]), at.F, program.violation(at), np.inf, Lowest(np.inf, [], []))
        starts = lower_starts(program, xy, count or self.lower_count, rng) + [y for y in known]
        lowest = solve_lower(program, xy, starts, method=self.method)
        if deep:
            lowest = deeper(program, xy, lowest, rng, self.method)
        gap = at.f - lowest.value if lowest.points else np.inf
        if self.tol < gap < np.inf:  # a method stops early in a curved valley, and no cut mends that
            sharp = self.polish(xy)
            there = program(program.point(sharp))
            beside = np.abs(sharp - xy).max() <= _BESIDE and program.violation(there) <= FEASIBLE
            if beside and there.f - lowest.value <= self.tol:
                xy, at, gap = sharp, there, max(there.f - lowest.value, 0.0)
        return Point(xy, np.concatenate([xy, z[k:]]), at.F, program.violation(at), gap, lowest)

    def crossover(self, z: np.ndarray, cuts: Sequence[Cut] = (), most: int = 4) -> list[np.ndarray]:
        """The plain NLPs of the branch that z lies on, and of neighbours where rows are biactive."""
        return [self.local(z, None, branch, cuts) for branch in self.branches(z, most)]

    def branches(self, z: np.ndarray, most: int = 4) -> list[np.ndarray]:
        """The lower rows that are active on the branch that z lies on, and on `most` neighbours."""
        program, k = self.program, self.k
        keep = program.inequality
        if not keep.any():
            return [np.zeros(program.p, bool)]
        lam, g = z[k : k + program.p], -program(z).g
        active = (lam > g) & keep
        biactive = np.flatnonzero(keep & (lam < 1e-3) & (g < 1e-3))
        branches = [active]
        for flips in itertools.islice(itertools.product((False, True), repeat=min(biactive.size, 6)), 2 * most):
            branch = active.copy()
            branch[biactive[: len(flips)]] = flips
            if not any(np.array_equal(branch, other) for other in branches):
                branches.append(branch)
        return branches[: most + 1]

    def slope(self, xy: np.ndarray) -> tuple[np.ndarray, float]:
        """The derivative in x of f at a lower solution that follows x, and what is left of its conditions."""
        program, n, k = self.program, self.n, self.k
        z, left = self.multipliers(xy)
        at = program(z)
        lam, mu = z[k : k + program.p], z[k + program.p :]
        return (at.df + lam @ at.dg + mu @ at.dh)[:n], left

    def exact(self, point: Point, rng: np.random.Generator) -> Point:
        """The solution that a verified point stands for: y on its conditions at x, or both on a branch of theirs, and x
        where y is no higher than another minimiser.

        What is relaxed by 1e-8 lets F be better by its root where f is flat, and a gap that passes lets x lie on the
        wrong side of a tie. And a method that ends where F stays to 1e-10 of its scale has done nothing for what is
        smaller than that: x in which F is flat beside what it is elsewhere.
        """
        return self.settled(self._tied(self._on_conditions(point, rng), rng), rng)

    def settled(self, point: Point, rng: np.random.Generator) -> Point:
        """The point after local solves, on its branches, of F in units of the slope that is left there."""
        if not point.verified(self.tol):
            return point
        for _ in range(_SETTLED):
            z, left = self.multipliers(point.xy)
            slopes = [(branch, self.slope_left(z, branch)) for branch in self.branches(z)] if left <= 1e-6 else []
            found = []
            for branch, slope in slopes:
                if not slope > _LEVEL:
                    continue
                end = self.local(z, None, branch, unit=slope, iterations=200)
                if not point.loss - self.program(self.program.point(end[: self.k])).F > _LEVEL:
                    continue
                known = [p[self.n :] for p in point.lowest.points[:2]]
                found.append(self.judge(self.multipliers(end[: self.k])[0], rng, known))
            lower = [p for p in found if p.verified(self.tol) and p.loss < point.loss]
            if not lower:
                break
            point = min(lower, key=lambda p: p.loss)
        return point

    def slope_left(self, z: np.ndarray, branch: np.ndarray) -> float:
        """What multipliers leave of F's gradient on a branch."""
        from scipy.optimize import lsq_linear

        lower, upper = self.bounds(branch)
        at = self.rows(None, branch)(z)
        free = lower < upper
        near = at.inequality < FEASIBLE
        at_edge = [(z - lower < FEASIBLE) & free, (upper - z < FEASIBLE) & free]
        unit = np.eye(z.size)
        held = np.concatenate([at.inequality_jacobian[near], unit[at_edge[0]], -unit[at_edge[1]]])[:, free]
        rows = np.concatenate([held, at.equality_jacobian[:, free]])
        if not (np.isfinite(rows).all() and np.isfinite(at.gradient).all()):
            return 0.0
        if not rows.size:
            return float(np.linalg.norm(at.gradient[free]))
        least = np.where(np.arange(rows.shape[0]) < held.shape[0], 0.0, -np.inf)
        found = lsq_linear(rows.T, at.gradient[free], (least, np.full(rows.shape[0], np.inf)))
        return float(np.linalg.norm(at.gradient[free] - rows.T @ found.x))

    def _tied(self, point: Point, rng: np.random.Generator) -> Point:
        """The point with x moved to where y ties with a minimiser that lies lower by less than the tolerance."""
        found = point
        for _ in range(_SHIFTS):
            if not EXACT < found.gap < np.inf or not found.lowest.points:
                break
            other = found.lowest.points[0]
            (here, left), (there, left_there) = self.slope(found.xy), self.slope(other)
            away = here - there
            if np.abs(other - found.xy).max() <= _BESIDE or max(left, left_there) > 1e-3 or not away.any():
                break
            step = -1.01 * found.gap * away / (away @ away)  # a little beyond the tie
            if not np.abs(step).max() <= _BESIDE:
                break
            moved = found.xy.copy()
            moved[: self.n] += step
            moved[self.n :] += self.cut(found.xy).slope @ step
            moved = self.polish(np.clip(moved, self.program.lower[: self.k], self.program.upper[: self.k]))
            after = self.judge(self.multipliers(moved)[0], rng, [p[self.n :] for p in found.lowest.points[:2]])
            if not after.gap < found.gap:
                break
            found = after
        return found if found.verified(self.tol) and found.loss <= point.loss + _BESIDE else point

    def _on_conditions(self, point: Point, rng: np.random.Generator) -> Point:
        """The point with y on its conditions at x, or both on a branch of theirs."""
        if self.multipliers(point.xy)[1] <= EXACT:
            return point
        found = []
        polished = self.polish(point.xy)
        ends = [polished, *self.crossover(point.z), *self.crossover(self.multipliers(polished)[0])]
        for end in ends:
            z, left = self.multipliers(end[: self.k])
            if left <= EXACT and np.abs(z[: self.k] - point.xy).max() <= _BESIDE:
                found.append(self.judge(z, rng, [p[self.n :] for p in point.lowest.points[:2]]))
        return min((p for p in found if p.verified(self.tol)), key=lambda p: p.loss, default=point)

    def cut_rounds(self, z: np.ndarray, rng: np.random.Generator, stationary: bool = True) -> list[Point]:
        """From an end of a local solve: cuts where the lower level has a lower point, until none has; all points."""
        points = [self.judge(z, rng)]
        cuts: list[Cut] = []
        point = points[0]
        gaps: list[float] = []
        for i in range(self.rounds):
            if point.gap <= self.tol or not point.lowest.points:
                break
            lowest = point.lowest.points[0]
            cuts.append(self.cut(lowest))
            # Both restarts; later on the second ends where it did before.
            starts = [point.z, self.multipliers(lowest)[0]] if i < _BOTH else [point.z]
            ends = []
            for start in starts:
                if stationary:
                    end = self.ladder(start, _SHORT, cuts)
                else:
                    end = self.local(start, None, cuts=cuts, stationary=False, iterations=100)
                ends.append(self.judge(end, rng, [cut.y for cut in cuts]))
            points += ends
            # What is still too low goes on while it is lower than what is verified: the optimum may be where two
            # lower minimisers tie, which cuts come to from below.
            reached = min((p.loss for p in points if p.verified(self.tol)), default=np.inf)
            open_ends = [p for p in ends if not p.verified(self.tol) and p.loss < reached and p.lowest.points]
            if not open_ends:
                break
            after = min(open_ends, key=lambda p: p.loss)
            gaps.append(after.gap)
            stuck = len(gaps) > 3 and gaps[-1] > 0.8 * gaps[-4]
            if stuck or np.abs(after.xy - point.xy).max() < 1e-9:
                break
            point = after
        return points
