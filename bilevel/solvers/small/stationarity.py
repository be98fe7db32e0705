"""Is (x, y) stationary, and does y minimise the lower level? For small problems, whatever method found the point.

Both are asked in units in which the functions' gradients and the lengths on which they change are one, so that a
problem multiplied by a number gets the same answers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from bilevel.curvature import least_curved
from bilevel.problem import Problem, ProblemError
from bilevel.solvers.small.nlp import attempt
from bilevel.solvers.small.program import PASS_BYTES, Evaluated, Program, size_of
from bilevel.solvers.small.search import (
    EXACT,
    FEASIBLE,
    Lowest,
    Search,
    deeper,
    lower_rows,
    lower_starts,
    solve_linear,
    solve_lower,
)
from bilevel.typing import PyTree

__all__ = ["Lower", "Stationarity", "kinked", "lower_verified", "refusal", "stationary", "unbounded"]

_MOST = 256
"""The most linear programmes, and the most supports that are looked at for vertices."""
_RADIUS = 1e-3
_VERTEX = 1e-6
_LOOKED, _SHARP = 20, 3e-3
"""Of how many coordinates a kink is looked for, and how much of f's rise a hundredth of the way leaves at one: a
hundredth at a kink, less than a thousandth where f is smooth or rises like a power of 3/2."""
_STEP = 0.1
"""The part of the tolerance that a step to a kink, in units of x, and its fall of F are at most where they are none."""
_BENT = (1e-2, 1e-1)
"""How far x is moved where F bends down, in its units."""
_REACHES = (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4)
"""How far a ray is followed, in units of y or in its size."""


@dataclasses.dataclass(frozen=True)
class Stationarity:
    """What `stationary` found.

    Attributes:
      slope: the least slope of F along feasible directions, at most 0, where a typical gradient of F is one.
      direction: (x, y) of the step that attains it, in the user's units; None without one.
      checked: whether all branches were looked at.
      why: what was not, or what the answer rests on.
      reached: a point (x, y) with a lower F, y a lower solution there, to which the direction led; None without one.
    """

    slope: float
    direction: tuple[PyTree, PyTree] | None
    checked: bool
    why: str = ""
    reached: tuple[PyTree, PyTree] | None = None


@dataclasses.dataclass(frozen=True)
class Lower:
    """What `lower_verified` found.

    Attributes:
      gap: f(x, y) less the lowest value found, where a typical gradient of f in y is one; infinite where no feasible
        lower point was found.
      violation: of the lower level's rows by y, about a distance in units of the variables.
      minimisers: the y that are as low as the lowest, to 1e-6.
      values: F at each.
      optimistic_gain: F(x, y) less the least F of a lower minimiser that breaks no upper row, at least 0, where a
        typical gradient of F is one.
      upper_violation: of the upper level's rows by (x, y).
      loss_gap: the gap in units of f.
      loss_gain: the gain in units of F.
      loss_change: F at the best of the minimisers less F(x, y), in units of F; positive where y is not exact.
      better: the minimiser with that least F, where it is less than F(x, y); None without one.
      answer_violation: the least that one of the minimisers breaks of the upper level's rows.
    """

    gap: float
    violation: float
    minimisers: list[PyTree]
    values: list[float]
    optimistic_gain: float
    upper_violation: float = 0.0
    loss_gap: float = 0.0
    loss_gain: float = 0.0
    loss_change: float = 0.0
    better: PyTree | None = None
    answer_violation: float = 0.0


def refusal(problem: Problem, x: PyTree, y: PyTree, largest: int = 300) -> str:
    """Why the two checks are not made for this problem; "" where they are."""
    try:
        unknowns, rows = size_of(problem, x, y)
    except ProblemError as error:
        return str(error)
    if unknowns + rows > largest:
        return f"{unknowns} unknowns and {rows} rows are more than {largest}, for which dense checks are made."
    passed = problem.pass_bytes(x, y)
    if passed > PASS_BYTES:
        return f"a pass over the samples reads and writes {passed / 2**20:.3g} MiB, too much for thousands of them."
    return ""


def lower_verified(
    problem: Problem,
    x: PyTree,
    y: PyTree,
    starts: int = 12,
    key: int = 0,
    program: Program | None = None,
    noise: float = 0.0,
) -> Lower:
    """The lower level at x solved from `starts` points, y the first, and F compared among its minimisers.

    Minimisers whose values differ by less than `noise`, where a typical gradient of f in y is one, are taken for equal.

    Raises:
      ProblemError: see `refusal`.
    """
    program = program or Program(problem, x, y, "The check of the lower level")
    with program.precision():
        xy, rng = program.scaled(x, y), np.random.default_rng(key)
        search = Search(program)
        at = program(program.point(xy))
        lowest = solve_lower(program, xy, lower_starts(program, xy, starts, rng))
        lowest = deeper(program, xy, lowest, rng)
        gap, excess = at.f - lowest.value if lowest.points else np.inf, program.excess(xy)
        slack = max(1e-6, noise, abs(gap) if np.isfinite(gap) and gap * excess < 1e-3 else 0.0)
        slack = max(slack / excess, 1e-14 * abs(lowest.value)) if excess > 1 else slack
        ties = [p for p, value in zip(lowest.points, lowest.values, strict=True) if value <= lowest.value + slack]
        known = [search.polish(point) for point in ties]
        for point in known[:4]:  # minimisers that are many: the one with the least F, on the conditions at this x
            z, left = search.multipliers(point)
            if left < 1e-4:
                end = search.polish(search.ladder(z, (1e-5, 1e-9), fixed=True)[: search.k])
                there = program(program.point(end))
                # Along a direction in which f is nearly flat its value says little, and its gradient more.
                exact = search.multipliers(end)[1] <= EXACT
                low = there.f <= lowest.value + 1e-8 / excess
                if exact and program.violation(there, upper=False) <= FEASIBLE and low:
                    known.append(end)
        for point in known:  # a first-order method stops early where f is ill-conditioned; Newton's does not
            there = program(program.point(point))
            if program.violation(there, upper=False) <= FEASIBLE and there.f < lowest.value:
                lowest.value = there.f
                gap = at.f - there.f
        stationary_ones = [point for point in known if search.multipliers(point)[1] <= EXACT]
        known = stationary_ones or known  # where there are no multipliers none is
        upper = lambda at: float(max(np.max(at.G, initial=0.0), np.max(np.abs(at.H), initial=0.0)))  # noqa: E731
        evaluated = [program(program.point(point)) for point in known]
        broken = upper(at)
        fair = [i for i, other in enumerate(evaluated) if upper(other) <= max(FEASIBLE, broken)]
        best = min(fair, key=lambda i: evaluated[i].F, default=None)
        change = evaluated[best].F - at.F if best is not None and np.isfinite(at.F) else 0.0
        gain = max(0.0, -change) if np.isfinite(at.F) else np.inf
        return Lower(
            max(gap, 0.0) * excess,
            program.violation(at, upper=False),
            [program.trees(point)[1] for point in known],
            [other.F * program.upper_scale for other in evaluated],
            gain,
            broken,
            max(gap, 0.0) * program.lower_scale,
            gain * program.upper_scale,
            change * program.upper_scale,
            program.trees(known[best])[1] if best is not None and change < 0 else None,
            min((upper(other) for other in evaluated), default=0.0),
        )


def unbounded(problem: Problem, x: PyTree, y: PyTree, program: Program | None = None, curved: bool = False) -> bool:
    """Whether f(x, .) keeps falling, feasibly, along a ray from y: steepest descent or the most negative curvature.

    It may fall for ever, or towards a value that it does not take.

    `curved`: or along a path, by its least values in boxes that grow.
    """
    program = program or Program(problem, x, y, "The check of the lower level")
    with program.precision():
        xy = program.scaled(x, y)
        at, n, k = program(program.point(xy)), program.n, program.n + program.m
        if not np.isfinite(at.f) or not np.isfinite(at.dr).all():
            return False
        if program.linear:
            return solve_linear(program, xy)[1]
        size = 1 + np.abs(xy).max(initial=0.0)
        rays = [-at.df[n:k]]
        if k - n:
            curvature = at.dr[:, n:k]
            values, basis = np.linalg.eigh((curvature + curvature.T) / 2)
            if values[0] < -1e-6 * np.abs(values).max():
                rays += [basis[:, 0], -basis[:, 0]]
        for ray in rays:
            with np.errstate(over="ignore"):
                length = np.linalg.norm(ray)
            if not 0 < length < np.inf:
                continue
            values_along, slopes = [at.f], [at.df[n:k] @ ray / length]
            for reach in _REACHES:
                point = xy.copy()
                point[n:] += reach * size * ray / length
                there = program(program.point(point))
                if not np.isfinite(there.f) or program.violation(there, upper=False) > FEASIBLE:
                    break
                values_along.append(there.f)
                slopes.append(there.df[n:k] @ ray / length)
            if len(values_along) <= len(_REACHES):
                continue
            falls = np.diff([at.f, *values_along[3:]])
            if (falls < 0).all() and falls[-1] < falls[0]:
                return True
            if _never_rests(values_along, slopes) and not _rests(program, xy, values_along[-1], size):
                return True
        return curved and _falls_in_boxes(program, xy)


def kinked(program: Program, xy: np.ndarray) -> bool:
    """Whether f(x, .) rises from (x, y), where a lower solve ended, in proportion to the distance and not to its square
    on both sides: |y| does, and no loss whose second derivatives exist.
    """
    if not program.double:
        return False
    n, k = program.n, program.n + program.m
    here = program(program.point(xy))

    def rise(step: np.ndarray) -> float:
        points = [xy + sign * step for sign in (1.0, -1.0)]
        inside = all(((p >= program.own_lower[:k]) & (p <= program.own_upper[:k]))[n:].all() for p in points)
        return sum(program(program.point(p)).f - here.f for p in points) if inside else np.nan

    for j in range(n, min(k, n + _LOOKED)):
        step = np.zeros(k)
        step[j] = 1.0
        far, near = rise(1e-3 * step), rise(1e-5 * step)
        if far > 1e-6 and near > _SHARP * far:
            return True
    return False


def _null_space(rows: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span what all rows are zero on."""
    if not rows.size:
        return np.eye(rows.shape[1])
    _, sizes, basis = np.linalg.svd(rows)
    return basis[int((sizes > 1e-9 * sizes.max(initial=0.0)).sum()) :].T


def _never_rests(values: list[float], slopes: list[float]) -> bool:
    """Whether f goes down by more than rounding along a ray, and its slope dwindles and is never seen to end."""
    down = np.asarray(slopes[1:]) < 0
    last = int(down.sum())  # beyond, the slope is too small for a number
    if not last or not down[:last].all() or (np.diff(values) > 0).any():
        return False
    if values[0] - values[1] <= 1e3 * np.finfo(float).eps * abs(values[0]):
        return False
    # Less than rounding would leave of a slope at the edge of a floor.
    return last == down.size or bool(slopes[last] > 1e-20 * min(slopes) and not np.any(slopes[last + 1 :]))


def _rests(program: Program, xy: np.ndarray, value: float, size: float) -> bool:
    """Whether a point that is not far away lies lower."""
    starts = lower_starts(program, xy, 8, np.random.default_rng(0))
    found = solve_lower(program, xy, starts)
    near = [f for point, f in zip(found.points, found.values, strict=True) if np.abs(point - xy).max() < 1e2 * size]
    return min(near, default=np.inf) < value


def _falls_in_boxes(program: Program, xy: np.ndarray) -> bool:
    """Whether the lowest lower values found in boxes around y fall by more and more as the boxes grow."""
    n, size = program.n, 1 + np.abs(xy).max(initial=0.0)
    points, values = [xy], [program(program.point(xy)).f]
    if np.isfinite(program.own_lower[n:]).all() and np.isfinite(program.own_upper[n:]).all():
        return False
    for reach in (1e1, 1e2, 1e3, 1e4):
        box = np.concatenate([np.zeros(n), np.full(program.m, reach * size)])
        lower, upper = np.maximum(program.own_lower, xy - box), np.minimum(program.own_upper, xy + box)
        lower[:n] = upper[:n] = xy[:n]
        starts = [points[-1], *(np.clip(xy + sign * box, lower, upper) for sign in (0.3, -0.3))]
        ends = [attempt(lower_rows(program), start, lower, upper, iterations=100, far=1e30).point for start in starts]
        at = [(program(program.point(end)), end) for end in ends]
        fair = [(there.f, end) for there, end in at if program.violation(there, upper=False) <= FEASIBLE * reach]
        if not fair:
            return False
        value, end = min(fair, key=lambda pair: pair[0])
        values.append(value)
        points.append(end)
    falls = np.diff(values[1:])
    return bool(np.isfinite(falls).all() and (falls < 0).all() and (falls[1:] < 2 * falls[:-1]).all())


def stationary(
    problem: Problem, x: PyTree, y: PyTree, tol: float = 1e-4, program: Program | None = None
) -> Stationarity:
    """The least slope of F along directions that the problem allows at (x, y), one-sided.

    On each vertex of the set of lower multipliers, and on each branch of rows that are active with multiplier zero, the
    problem is linear to first order:

        min F_x dx + F_y dy   s.t.   linearised G, H, g, h, stationarity and branch;   |dx|, |dy| <= radius,

    with the rows' values in place, so that a kink nearer than the radius counts as reached. Where another lower
    minimiser ties with y, its value bounds that of y: a row more. A descent that is found is tried, with lower solves
    at the x that it leads to; what F does there decides. Where there is none, x is moved where x -> F(x, y(x)) bends
    down most, by differences of its gradients: a saddle point is none of the solutions. Where no multiplier exists,
    sampled directions alone are tried.

    Raises:
      ProblemError: see `refusal`.
    """
    program = program or Program(problem, x, y, "The check of stationarity")
    with program.precision():
        return _Check(program, program.scaled(x, y), tol).run()


class _Check:
    def __init__(self, program: Program, xy: np.ndarray, tol: float, beside: bool = False) -> None:
        self.program, self.tol, self.radius, self.beside = program, tol, max(_RADIUS, 10 * tol), beside
        self.search = Search(program)
        self.n, self.k = program.n, program.n + program.m
        rng = np.random.default_rng(0)
        lowest = solve_lower(program, xy, lower_starts(program, xy, 8, rng))
        near = solve_lower(program, xy, [xy[self.n :]])
        # The lower solution that y stands for, more exactly than a method leaves it.
        close = [point for point in near.points if np.abs(point - xy).max() <= 10 * self.radius]
        self.xy = self.search.polish(close[0] if close else xy)
        self.others = [
            point
            for point, value in zip(lowest.points, lowest.values, strict=True)
            if np.abs(point - self.xy).max() > 10 * self.radius
        ]
        self.lowest: Lowest = lowest
        self.loss = program(program.point(self.xy)).F
        self.still = self._still()

    def _still(self) -> float:
        """How much F falls along F_y at this x while f does not rise by more than rounding.

        Nothing, but where f is flat to a high order, so that lower solves leave y off by more than their values say.
        """
        program, here, fall = self.program, self.program(self.program.point(self.xy)), 0.0
        size = np.linalg.norm(here.dF[self.n : self.k])
        for step in 10.0 ** np.arange(-5, 0.5, 0.5) if 0 < size < np.inf else ():
            point = self.xy.copy()
            point[self.n :] -= step * here.dF[self.n : self.k] / size
            there = program(program.point(point))
            if not there.f <= here.f + 1e-13 * (1 + abs(here.f)) or program.violation(there, upper=False) > FEASIBLE:
                break
            fall = min(fall, there.F - self.loss)
        return fall

    def run(self) -> Stationarity:
        here = self.program(self.program.point(self.xy))
        if not all(np.isfinite(part).all() for part in (here.dF, here.dr, here.dG, here.dH, here.dg, here.dh)):
            return self.sampled("A derivative is not a number at this point")
        if kinked(self.program, self.xy):
            return self.sampled("The lower loss has a kink at y")
        vertices, complete = self.vertices()
        if not vertices:
            return self.sampled("The lower level has no multiplier at this point")
        found, count, whole = [], 0, complete
        ties = self.ties()
        for lam, mu in vertices:
            at = self.program(self.program.point(self.xy, lam, mu))
            for branch in self.branches(at, lam):
                count += 1
                if count > _MOST:
                    whole = False
                    break
                value, direction = self.linear(at, lam, branch, ties)
                if direction is not None and value < 0:
                    found.append((value / self.radius, direction))
        why = "" if whole else f"not all branches: {_MOST} linear programmes were solved."
        threshold = -max(self.tol, 1e-6)
        steep = [pair for pair in sorted(found, key=lambda pair: pair[0]) if pair[0] <= threshold]
        for slope, direction in steep[:32]:
            if (reached := self.descends(direction, slope)) is not None:
                if self.is_beside(direction, reached):  # a kink that x is nearer to than a method comes
                    return Stationarity(0.0, None, whole, why)
                return Stationarity(slope, self.in_units(direction), whole, why, self.in_units(reached))
        if steep:  # the conditions promise what F does not do: they say too little here (f is flat to second order)
            return self.sampled("What the lower level's conditions promise to first order does not happen")
        if (bent := self.bent()) is not None:
            return dataclasses.replace(bent, checked=whole, why=why)
        return Stationarity(max((s for s, _ in found if s > threshold), default=0.0), None, whole, why)

    def is_beside(self, direction: np.ndarray, reached: np.ndarray) -> bool:
        """Whether the step is none to the run's tolerance, neither in x nor in F, and leads to a stationary point."""
        fall = self.loss - self.program(self.program.point(reached)).F
        near = not self.beside and max(np.abs(direction[: self.n]).max(initial=0.0), fall) <= _STEP * self.tol
        return near and _Check(self.program, reached, self.tol, beside=True).run().slope > -max(self.tol, 1e-6)

    def in_units(self, direction: np.ndarray) -> tuple[PyTree, PyTree]:
        return self.program.trees(direction)

    def bent(self) -> Stationarity | None:
        """The direction in which x -> F(x, y(x)) bends down most, where F falls along it; None: it does not.

        Of directions along which the upper level's active rows stay, to first order.
        """
        program, n, k = self.program, self.n, self.k
        free = np.flatnonzero(np.minimum(self.xy - program.lower[:k], program.upper[:k] - self.xy)[:n] > self.radius)
        if not free.size:
            return None
        slope, here = self.search.cut(self.xy).slope, program(program.point(self.xy))
        active = ~program.upper_inequality | (-self.radius < here.G)
        rows = np.concatenate([here.dG[active], here.dH])
        basis = _null_space((rows[:, :n] + rows[:, n:k] @ slope)[:, free])
        if not basis.shape[1]:
            return None

        def along(d: np.ndarray) -> np.ndarray:
            step = np.zeros(k)
            step[free] = basis @ d
            step[n:] = slope @ step[:n]
            return step

        def gradient(xy: np.ndarray) -> np.ndarray:
            xy = self.search.polish(xy)
            at = program(program.point(xy))
            return basis.T @ (at.dF[:n] + self.search.cut(xy).slope.T @ at.dF[n:k])[free]

        def product(d: np.ndarray) -> np.ndarray:
            ahead, back = (gradient(self.xy + sign * self.radius * along(d)) for sign in (1, -1))
            return (ahead - back) / (2 * self.radius)

        least = least_curved(product, basis.shape[1])
        if least is None or not least[0] < 0:
            return None
        best: tuple[float, Any, Any] = (0.0, None, None)
        for size, sign in itertools.product(_BENT, (1, -1)):
            step = sign * size * along(least[1])
            gained, reached = self.trial(self.xy + step, step, 1.01 * program.violation(here))
            best = min(best, ((gained - self.still) / size, step, reached), key=lambda entry: entry[0])
        if best[0] > -max(10 * self.tol, 1e-3):
            return None
        return Stationarity(best[0], self.in_units(best[1]), True, "", self.in_units(best[2]))

    # ------------------------------------------------------------ multipliers

    def vertices(self) -> tuple[list[tuple[np.ndarray, np.ndarray]], bool]:
        """The vertices of {lam >= 0, mu: r = 0} on active rows, and whether all supports were looked at."""
        program, n, k = self.program, self.n, self.k
        at = program(program.point(self.xy))
        pair = program.pairs[:, 0]
        active = np.flatnonzero(program.inequality & (at.g > -max(_VERTEX, self.tol)))
        fixed = np.concatenate([at.dg[pair], at.dh])[:, n:k].T
        rank = int(np.linalg.matrix_rank(fixed, tol=1e-9)) if fixed.size else 0
        most = min(active.size, program.m - rank)
        size = np.linalg.norm(at.r) + 1.0
        found: list[tuple[np.ndarray, np.ndarray]] = []
        count, complete = 0, True
        for support in itertools.chain.from_iterable(
            itertools.combinations(active, length) for length in range(most + 1)
        ):
            count += 1
            if count > 8 * _MOST:
                complete = False
                break
            chosen = np.asarray(support, int)
            matrix = np.concatenate([at.dg[chosen][:, n:k].T, fixed], axis=1)
            if matrix.shape[1]:
                values, _, ranked, _ = np.linalg.lstsq(matrix, -at.r, rcond=1e-10)
                if ranked < chosen.size + rank:
                    continue
            else:
                values = np.zeros(0)
            left = np.abs(at.r + matrix @ values).max(initial=0.0)
            if left > max(1e-5, self.tol) * size or values[: chosen.size].min(initial=1.0) < -1e-7:
                continue
            lam, mu = np.zeros(program.p), values[chosen.size + pair.size :]
            lam[chosen] = np.maximum(values[: chosen.size], 0.0)
            lam[pair] = values[chosen.size : chosen.size + pair.size]
            if not any(np.allclose(lam, other, atol=1e-7) for other, _ in found):
                found.append((lam, mu))
        return found, complete

    def branches(self, at: Evaluated, lam: np.ndarray) -> Iterator[np.ndarray]:
        """Which inequalities are held active: all choices where both the row and its multiplier are nearly zero."""
        keep, near = self.program.inequality, 2 * self.radius
        both = np.flatnonzero(keep & (at.g > -near) & (lam < near))
        held = keep & (lam >= near)
        for flips in itertools.product((False, True), repeat=min(both.size, 10)):
            branch = held.copy()
            branch[both[: len(flips)]] = flips
            yield branch

    # ------------------------------------------------------------ linear programmes

    def ties(self) -> list[tuple[float, np.ndarray]]:
        """f - f(x, y_k) and its gradient in (x, y) for other minimisers that y may not lie above."""
        program, n, k = self.program, self.n, self.k
        here = program(program.point(self.xy))
        rows = []
        for point in self.others:
            slope, left = self.search.slope(point)
            there = program(program.point(point))
            if left > 1e-3 or there.f - here.f > 10 * self.radius:
                continue
            gradient = here.df[:k].copy()
            gradient[:n] -= slope
            rows.append((here.f - there.f, gradient))
        return rows

    def linear(
        self, at: Evaluated, lam: np.ndarray, branch: np.ndarray, ties: list[tuple[float, np.ndarray]]
    ) -> tuple[float, np.ndarray | None]:
        """The linear programme of one branch: its value and (dx, dy)."""
        from scipy.optimize import linprog

        program, k, radius = self.program, self.k, self.radius
        pair, upper_pair = program.pairs[:, 0], program.upper_pairs[:, 0]
        off = program.inequality & ~branch
        tie_rows = [np.concatenate([gradient, np.zeros(program.p + program.q)]) for _, gradient in ties]
        above = np.concatenate(
            [at.dG[program.upper_inequality], at.dg[off], *([np.stack(tie_rows)] if tie_rows else [])]
        )
        room = np.concatenate([-at.G[program.upper_inequality], -at.g[off], [max(-value, 0.0) for value, _ in ties]])
        room = np.maximum(room, 0.0)  # what is broken a little may stay so
        # The point stays where it is an end of its equations: their left-hand sides are not asked to be repaired.
        equal = np.concatenate([at.dH, at.dG[upper_pair], at.dh, at.dg[pair], at.dg[branch], at.dr])
        level = np.zeros(equal.shape[0])
        first = at.dH.shape[0] + upper_pair.size + at.dh.shape[0] + pair.size
        level[first : first + int(branch.sum())] = np.maximum(-at.g[branch], 0.0)
        bounds: list[tuple[float | None, float | None]] = [(-radius, radius)] * k
        far = 1e3 * radius
        for i in range(program.p):
            if program.inequality[i]:
                bounds.append((max(-lam[i], -far), far) if branch[i] else (-lam[i], -lam[i]))
            else:
                bounds.append((-far, far) if i in pair else (0.0, 0.0))
        bounds += [(-far, far)] * program.q
        cost = at.dF.copy()
        cost[k:] = 0.0
        if not all(np.isfinite(part).all() for part in (cost, above, room, equal, level)):
            return 0.0, None
        # The solver's tolerances are absolute: everything is divided by the radius.
        scaled = [(None if a is None else a / radius, None if b is None else b / radius) for a, b in bounds]
        found = linprog(
            cost,
            above if above.shape[0] else None,
            room / radius if above.shape[0] else None,
            equal if equal.shape[0] else None,
            level / radius if equal.shape[0] else None,
            scaled,
            method="highs",
        )
        if found.status != 0:
            return 0.0, None
        return float(found.fun) * radius, found.x[:k] * radius

    # ------------------------------------------------------------ trials

    def descends(self, direction: np.ndarray, slope: float) -> np.ndarray | None:
        """Where F falls by a good part of what the slope promises, with the lower level solved anew; None: nowhere."""
        size = np.abs(direction).max()
        for factor in (1.0, 0.1):
            step = factor * direction
            gained, reached = self.trial(self.xy + step, step)
            if gained - self.still <= 0.2 * factor * slope * min(size, self.radius):
                return reached
        return None

    def trial(self, xy: np.ndarray, step: np.ndarray, slack: float | None = None) -> tuple[float, np.ndarray]:
        """The lowest lower solution found at that x, the best for F, and its F less F here; infinite: infeasible, rows
        being broken by more than `slack`."""
        program, n = self.program, self.n
        xy = np.clip(xy, program.lower[: self.k], program.upper[: self.k])
        starts = [xy[n:], self.xy[n:], *[point[n:] for point in self.others[:6]]]
        found = solve_lower(program, xy, starts)
        # A curved upper row is broken to second order by a step along its tangent.
        slack = 10 * float(np.abs(step).max()) ** 2 if slack is None else slack
        best = self.best_of(found, xy, slack)
        if best[0] < 0 and not program.convex(xy):  # what is lower for F may not be lowest: another valley is
            rng = np.random.default_rng(1)
            closer = solve_lower(program, xy, [*(p[n:] for p in found.points), *lower_starts(program, xy, 12, rng)])
            closer = deeper(program, xy, closer, rng)
            if closer.value < found.value - 1e-9:
                self.others.insert(0, closer.points[0])
                best = self.best_of(closer, xy, slack)
        return best

    def best_of(self, found: Lowest, xy: np.ndarray, slack: float) -> tuple[float, np.ndarray]:
        """F at the best for it of the lowest points, less F here; infinite where none is feasible."""
        program, best = self.program, (np.inf, xy)
        ties = [p for p, value in zip(found.points, found.values, strict=True) if value <= found.value + 1e-9]
        points = [self.search.polish(point) for point in ties]
        ends = [program(program.point(point)) for point in points]
        lowest = min((at.f for at in ends), default=np.inf)
        for point, at in zip(points, ends, strict=True):
            if at.f > lowest + 1e-13 * (1 + abs(lowest)):
                continue
            if program.violation(at) <= FEASIBLE + slack and at.F - self.loss < best[0]:
                best = at.F - self.loss, point
        return best

    def sampled(self, why: str) -> Stationarity:
        """Directions tried one by one."""
        rng, n = np.random.default_rng(0), self.n
        directions = [sign * unit for unit in np.eye(n)[:12] for sign in (1.0, -1.0)]
        directions += [v / np.abs(v).max() for v in rng.normal(size=(8, n))] if n > 1 else []
        best: tuple[float, Any, Any] = (0.0, None, None)
        for direction in directions:
            step = np.concatenate([self.radius * direction, np.zeros(self.program.m)])
            gained, reached = self.trial(self.xy + step, step)
            gained -= self.still
            if gained / self.radius < best[0]:
                best = gained / self.radius, step, reached
        if best[0] > -max(10 * self.tol, 1e-3):
            best = 0.0, None, None
        step_in_units, end_in_units = (None if part is None else self.in_units(part) for part in best[1:])
        why = f"{why}: {len(directions)} sampled directions were tried."
        return Stationarity(best[0], step_in_units, False, why, end_in_units)
