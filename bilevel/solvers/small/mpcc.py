"""`MPCC`: a small problem as a mathematical programme with complementarity constraints, by SciPy on the host."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._module import hyperparameters, state
from bilevel.keys import StepKey, as_step_key
from bilevel.optimizers import check_count
from bilevel.problem import Problem, ProblemError
from bilevel.result import Result
from bilevel.solvers.small.branches import best_branches
from bilevel.solvers.small.nlp import METHODS
from bilevel.solvers.small.program import Program, ProgramSpentError, flatten
from bilevel.solvers.small.search import (
    EXACT,
    LADDER,
    SAME,
    Lowest,
    Point,
    Search,
    lower_starts,
    sample,
    solve_lower,
    spread,
)
from bilevel.solvers.small.stationarity import kinked, unbounded
from bilevel.typing import Metrics, PyTree

__all__ = ["MPCC", "Local", "MPCCState", "around"]

logger = logging.getLogger("bilevel")

_LARGE = 600
"""Unknowns and rows, multipliers included, above which a dense method takes minutes a start."""
_DIFFERENT = 1e-3
_SCOUTS, _FEW = 30, 60
"""Lower solves before the search, and the most unknowns for which so many are made."""
_LOOKS = 4
"""Points of a start that are looked at more closely, of those that do not stand it."""
_LOWER = 1e-4
"""Scaled F: what counts as a lower one elsewhere."""
_SOME, _MANY, _IDLE = 40, 100, 2
"""From how many unknowns and rows on a search ends early, and after how many starts that found nothing lower."""
_IN_KINKS = 2
"""Lower solves at a verification, and rounds of cuts, where f has a kink at its minimiser."""
_FAR = 2
"""Starts at lower solutions that lie far from the others."""


class Local(NamedTuple):
    """A point that a search ended at.

    Attributes:
      x, y: the variables.
      upper_loss: F there.
      verified: whether it is feasible and no lower point of the lower level was found.
    """

    x: PyTree
    y: PyTree
    upper_loss: float
    verified: bool


@state
class MPCCState:
    """The best point so far, and what each start ended at.

    Attributes:
      x, y: the best verified point, or where there is none the least violated one.
      multipliers: at that point, in the user's units and of the constraints' shapes: `upper_constraint` and
        `upper_equality` of the upper level, `constraint` and `equality` of f + lam . g + mu . h; with sets as objects
        `project_upper` and `project_lower` hold those of the sets' inequalities, bounds and equalities.
      upper_loss, violation, gap, verified: F; the largest violated row and f(x, y) less the lowest value found, in the
        solver's own units; whether the point passed.
      ends: x, y, upper_loss and verified of each start, stacked; `MPCC.others` reads them.
      start: where the search began.
      lead, led: where the next start is, and whether it is there: `MPCC.towards`.
      done, finished: the starts behind it, and whether there are no more.
    """

    x: PyTree
    y: PyTree
    multipliers: dict[str, PyTree]
    upper_loss: Any
    violation: Any
    gap: Any
    verified: Any
    ends: dict[str, Any]
    start: tuple[PyTree, PyTree]
    lead: tuple[PyTree, PyTree]
    led: Any
    done: Any
    finished: Any


@hyperparameters
class MPCC:
    """Small problems to high accuracy: SciPy's SLSQP on the relaxed KKT system, with value-function cuts, many starts.

    The lower level is replaced by its first-order conditions,

        min F(x, y)   s.t.   G <= 0,  H = 0,  g <= 0,  h = 0,  lam >= 0,
                             grad_y (f + lam . g + mu . h) = 0,     t + lam_i g_i >= 0,      t = 1e-1, ..., 1e-8,

    whose values and dense Jacobian are one compiled program, in double precision where the functions allow it. Each
    start is solved with t going down, then on the branch of active rows that it ends on and on neighbours of it. Then
    the lower level is solved from several y at the x found. Where it has a lower point y_k, the search goes on with the
    cut f(x, y) <= f(x, y_k), from where it was and from (x, y_k), so that non-convex lower levels are treated, and
    lower levels without a constraint qualification, for which the conditions are dropped and cuts alone used.

    A point counts as verified where all rows hold, no lower solve from any of the starts came lower, and it has not run
    away. The least verified F is returned; a better solution elsewhere is never excluded, and neither is a lower
    minimum that no start found.

    On full batches, for up to some hundreds of unknowns and rows. Not for nonsmooth terms. All of the problem's
    constraints, equalities and sets that are objects of `bilevel.sets` are honoured, and x0=None. One step of `solve`
    is one start, with all its rounds; a run ends by itself after `starts` of them (and up to a third more where none
    was verified), with more than 40 unknowns and rows as soon as some in a row found nothing lower: half of `starts`
    with 70, two with 100 and more.

    After Scholtes, SIAM J. Optim. 11 (2001), for the relaxation; Mitsos, Lemonidis and Barton, J. Glob. Optim. 42
    (2008), for bounds by the lower level's value.

    Attributes:
      starts: the first is (x0, y0), the others are drawn in the boxes that sets and rows imply, and around the start,
        at widths of all sizes; where the lower level's conditions and all rows are affine, some of them lie on the best
        branch of active rows, found by a mixed-integer linear programme.
      method: "SLSQP" or "trust-constr", of `scipy.optimize.minimize`.
      tol: the largest f(x, y) less the lowest value found, in units in which f has a unit gradient.
      rounds: the most rounds of cuts of a start.
      lower_starts: solves of the lower level at each verification; three times as many where a best point is found.
      largest: the most unknowns and rows together.
    """

    starts: int = 10
    method: str = "SLSQP"
    tol: float = 1e-6
    rounds: int = 12
    lower_starts: int = 8
    largest: int = _LARGE

    def __post_init__(self) -> None:
        check_count("MPCC", starts=self.starts, rounds=self.rounds, lower_starts=self.lower_starts)
        if self.method not in METHODS:
            raise ValueError(f"MPCC(method={self.method!r}): the methods are {', '.join(map(repr, METHODS))}.")
        if not self.tol > 0:
            raise ValueError(f"MPCC(tol={self.tol}): a tolerance is positive.")

    @property
    def most_steps(self) -> int:
        """The most steps that a run can take."""
        return self.starts + self._more

    @property
    def _more(self) -> int:
        return -(-self.starts // 3)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> MPCCState:
        """The start, nothing known of it; a problem that this is not for is refused."""
        program = Program(problem, x, y, type(self).__name__, measured=False)
        rows = sum(program.layout.rows)
        if program.n + program.m + rows > self.largest:
            raise ProblemError(
                f"MPCC solves dense systems: {program.n + program.m} unknowns and {rows} rows are more than the "
                f"{self.largest} that it takes in seconds. Take a first-order solver (solvers.AID, LVHBA, BiCGAFFA), "
                f"or MPCC(largest={program.n + program.m + rows}) and time."
            )
        count = self.most_steps
        stacked = lambda tree: jax.tree.map(lambda leaf: np.zeros((count, *leaf.shape), leaf.dtype), tree)  # noqa: E731
        ends = {
            "x": stacked(x),
            "y": stacked(y),
            "upper_loss": np.full(count, np.inf),
            "verified": np.zeros(count, bool),
        }
        zeros = _in_shape(program, np.zeros(sum(program.layout.rows[:2])), np.zeros(program.p + program.q))
        far, no = np.float64(np.inf), np.bool_(False)
        return MPCCState(x, y, zeros, far, far, far, no, ends, (x, y), (x, y), no, np.int64(0), no)

    def towards(self, state: MPCCState, x: PyTree, y: PyTree) -> MPCCState:
        """The state whose next start is (x, y): a point lower than the best one, which a check of the end has found."""
        return dataclasses.replace(state, lead=(x, y), led=np.bool_(True), finished=np.bool_(False))

    def search(self, problem: Problem, state: MPCCState, key: StepKey) -> Iterator[tuple[MPCCState, Metrics]]:
        """Start after start from where the state stands: the state and the metrics after each.

        Metrics: `upper_loss`, `violation`, `gap` of the best point so far, and `start_loss`, F where this start ended.
        """
        program = Program(problem, *state.start, type(self).__name__)
        run = _Run(self, program, key)
        if state.done:
            run.resume(state)
        with program.precision():
            lead = program.scaled(*state.lead) if state.led else None
            ends = run.all(int(state.done), lead)
        while True:
            with program.precision():
                end = next(ends, None)
            if end is None:
                return
            step, point, finished = end
            state = run.state(state, step, point, finished)
            shown = {"upper_loss": state.upper_loss, "violation": state.violation, "gap": state.gap}
            yield state, shown | {"start_loss": state.ends["upper_loss"][step]}

    def status(self, state: MPCCState, metrics: Metrics, tol: float | None) -> int:
        """0 while there are starts left; then CONVERGED, LOWER_LEVEL or INFEASIBLE."""
        if not state.finished:
            return 0
        if state.verified:
            return Result.CONVERGED.value
        return (Result.LOWER_LEVEL if state.violation <= max(1e-6, self.tol) else Result.INFEASIBLE).value

    def multipliers(self, problem: Problem, state: MPCCState) -> dict[str, PyTree]:
        """The multipliers of both levels, as `state.multipliers` has them."""
        return state.multipliers

    def others(self, state: MPCCState) -> list[Local]:
        """The other points that starts ended at, those that differ, the verified ones first, by their upper loss."""
        found: list[Local] = []
        size = lambda tree: flatten(tree)  # noqa: E731
        order = np.lexsort((state.ends["upper_loss"], ~np.asarray(state.ends["verified"])))
        seen = [np.concatenate([size(state.x), size(state.y)])]
        for i in order:
            if not np.isfinite(state.ends["upper_loss"][i]):
                continue
            x, y = (jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), state.ends[name]) for name in ("x", "y"))
            point = np.concatenate([size(x), size(y)])
            scale = max(float(np.abs(other).max(initial=0.0)) for other in [point, *seen[:1]]) or 1.0
            if all(np.abs(point - other).max() > _DIFFERENT * scale for other in seen):
                seen.append(point)
                found.append(Local(x, y, float(state.ends["upper_loss"][i]), bool(state.ends["verified"][i])))
        return found


class _Run:
    """A search of `MPCC` under way."""

    def __init__(self, solver: MPCC, program: Program, key: StepKey) -> None:
        self.solver, self.program = solver, program
        self.search = Search(program, solver.method, solver.tol, solver.rounds, solver.lower_starts)
        self.best: Point | None = None
        self.known: list[np.ndarray] = []
        self.losses: list[float] = []
        self._scouts: tuple[list[np.ndarray], list[np.ndarray]] | None = None
        self._seed = [int(part) for part in np.asarray(jax.random.key_data(key.base)).ravel()]
        self._seed += [int(key.stream)]

    def resume(self, state: MPCCState) -> None:
        """The best point of an earlier run's state."""
        with self.program.precision():
            xy = self.program.scaled(state.x, state.y)
            z = self.search.multipliers(xy)[0]
            self.best = self.search.judge(z, np.random.default_rng(self._seed), count=1)
        self.best.gap, self.best.violation = float(state.gap), float(state.violation)
        self.best.loss = float(state.upper_loss) * self.program.rows[0]
        self._learn(state.ends)
        losses = np.where(state.ends["verified"], state.ends["upper_loss"], np.inf) * self.program.rows[0]
        self.losses = list(losses[: int(state.done)])

    def _learn(self, ends: dict[str, Any]) -> None:
        """The verified ends as a state holds them, so that a resumed run knows what the first one did."""
        at = lambda i: (jax.tree.map(lambda leaf: leaf[i], ends[name]) for name in ("x", "y"))  # noqa: E731
        self.known = [self.program.scaled(*at(i)) for i in np.flatnonzero(ends["verified"])]

    def all(self, done: int, lead: np.ndarray | None = None) -> Iterator[tuple[int, Point, bool]]:
        """(number, where it ended, whether it was the last) of each start; the first at `lead`, where there is one."""
        solver = self.solver
        if done == 0 and self._falls():
            yield 0, self._hopeless(), True
            return
        most = solver.most_steps
        if self._is_kinked():  # derivatives lead nowhere, and each lower solve takes its time
            most, self.search.lower_count, self.search.rounds = 1, _IN_KINKS, _IN_KINKS
        for step in range(done, max(most, done + 1)):
            rng = np.random.default_rng([*self._seed, step])
            points = self._from(step, rng, lead)
            lead = None
            # Nothing new: the start came to where an earlier one had been.
            point = self._better(points, rng) if points else self.best
            assert point is not None
            passed = self.best is not None and self.best.verified(solver.tol)
            if step == 0 and not passed and point.gap > 1e-3 and self._falls(curved=True):
                yield 0, self._hopeless(), True
                return
            self.losses.append(point.loss if point.verified(solver.tol) else np.inf)
            finished = step + 1 >= most or (passed and (step + 1 >= solver.starts or self._is_idle()))
            if finished and passed and self.best is not None:
                self.best = self.search.exact(self.best, rng)
            yield step, point, finished
            if finished:
                return

    def _hopeless(self) -> Point:
        """The start, as where a search ends that has nothing to look for."""
        self.best = self.search.judge(
            self.search.multipliers(self.program.start)[0], np.random.default_rng(self._seed), count=1
        )
        self.best.gap = np.inf
        return self.best

    def _is_kinked(self) -> bool:
        """Whether f has a kink where a lower solve from the start ends: its conditions, which the search is by, say
        nothing there."""
        program = self.program
        found = solve_lower(program, program.start, [program.start[program.n :]])
        return bool(found.points) and kinked(program, found.points[0])

    def _falls(self, curved: bool = False) -> bool:
        """Whether the lower level falls for ever at the start and at points around it: there is nothing to search."""
        program, rng = self.program, np.random.default_rng(self._seed)
        k = program.n + program.m
        points = [program.start]
        points += [sample(program.lower[:k], program.upper[:k], program.start, rng, wide) for wide in (False, True)]
        return all(unbounded(program.problem, *program.trees(xy), program, curved) for xy in points)

    def _better(self, points: list[Point], rng: np.random.Generator) -> Point:
        """The best of a start's points; one that would be the best of all is looked at more closely first."""
        tol, n = self.solver.tol, self.program.n
        points = sorted(points, key=lambda point: _rank(point, tol))
        known = _apart([other[n:] for point in points for other in point.lowest.points[:2]])
        first, looks = points[0], 0
        while points:
            point = points.pop(0)
            if self.best is not None and _rank(point, tol) >= _rank(self.best, tol):
                return point
            if point.verified(tol):
                sharper = self._sharper(point, known, rng)
                if sharper is not None:  # F is compared where y is exact
                    points.append(sharper)
                    points.sort(key=lambda point: _rank(point, tol))
                    continue
                closer = self.search.judge(point.z, rng, known, 3 * self.search.lower_count, deep=not looks)
                falls = unbounded(self.program.problem, *self.program.trees(point.xy), self.program)
                if falls or not closer.verified(tol):
                    point.gap = np.inf if falls else closer.gap
                    looks += 1
                    if looks == _LOOKS:
                        self.best = self.best or point
                        return point
                    if not falls and closer.lowest.points:  # what lies lower is a point of the problem itself
                        points.append(self._answer(closer.lowest, closer.lowest.points[0]))
                        known.append(closer.lowest.points[0][n:])
                        points.sort(key=lambda point: _rank(point, tol))
                    continue
            self.best = point
            return point
        if self.best is None:
            self.best = first
        return first

    def _sharper(self, point: Point, known: list[np.ndarray], rng: np.random.Generator) -> Point | None:
        """A verified point with y on its conditions, where it was not; None: it was, or has none."""
        search = self.search
        if search.multipliers(point.xy)[1] <= EXACT:
            return None
        z, left = search.multipliers(search.polish(point.xy))
        if left > EXACT:
            return None
        found = search.judge(z, rng, known)
        return found if found.verified(self.solver.tol) else None

    def _answer(self, lowest: Lowest, xy: np.ndarray) -> Point:
        """A lower solution that was found, as a point."""
        at = self.program(self.program.point(xy))
        z = self.search.multipliers(xy)[0]
        return Point(xy, z, at.F, self.program.violation(at), at.f - lowest.value, lowest)

    def _is_idle(self) -> bool:
        """Whether a start costs much, and the last ones found nothing lower than those before: the more it costs, the
        fewer."""
        dear = (self.program.size - _SOME) / (_MANY - _SOME)
        last = max(_IDLE, int(np.ceil(self.solver.starts * (1 - dear))))
        if dear <= 0 or len(self.losses) <= last:
            return False
        return min(self.losses[-last:]) > min(self.losses[:-last]) - _LOWER

    def _is_known(self, xy: np.ndarray) -> bool:
        """Whether a verified end of an earlier start is there."""
        return any(np.abs(xy - other).max() < 1e-5 for other in self.known)

    def scouts(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Lower solutions at many x: of each set of active rows that is met the best for F, the best first; and some
        that lie far from these and from each other.

        The first are those on the best branches, where a linear programme tells; then comes the one next to where the
        upper level would like y to be.
        """
        if self._scouts is None:
            search, program = self.search, self.program
            n, k = program.n, program.n + program.m
            rng = np.random.default_rng([*self._seed, 1 << 20])
            low, high, start = program.lower[:k], program.upper[:k], program.start
            wished = search.high_point(start)
            count = _SCOUTS if program.size <= _FEW else _SCOUTS // 3
            tried = [(wished, [wished[n:]]), (start, lower_starts(program, start, 3, rng))]
            for i in range(1, count):
                xy = search.feasible(sample(low, high, start, rng, i % 3 > 0, spread(i, k)))
                tried.append((xy, [xy[n:]] if i % 2 else [start[n:], xy[n:]]))
            best: dict[bytes, tuple[float, np.ndarray]] = {}
            feasible: list[tuple[float, np.ndarray]] = []
            first: list[np.ndarray] = []
            for i, (xy, starts) in enumerate(tried):
                for point in solve_lower(program, xy, starts, method=self.solver.method).points[:1]:
                    at = program(program.point(point))
                    broken = program.violation(at)
                    cost = at.F + 1e2 * broken
                    active = (at.g > -1e-4).tobytes() + (at.G > -1e-4).tobytes()
                    if np.isfinite(cost) and cost < best.get(active, (np.inf,))[0]:
                        best[active] = cost, point
                    if np.isfinite(cost) and broken <= 1e-2:
                        feasible.append((cost, point))
                    first += [point] if i == 0 else []
            near = first + [point for _, point in sorted(best.values(), key=lambda pair: pair[0])]
            near = best_branches(program, start) + near
            # Two solutions with the same active rows may lie on different sides of a set: what is far is tried, too.
            feasible = sorted(feasible, key=lambda pair: pair[0])[: (len(feasible) + 1) // 2]
            taken = [start, *near[:2]]
            far: list[np.ndarray] = []
            while feasible and len(far) < _FAR:
                away = [min(np.linalg.norm((point - other)[:n]) for other in taken) for _, point in feasible]
                far.append(feasible.pop(int(np.argmax(away)))[1])
                taken.append(far[-1])
            self._scouts = near, far
        return self._scouts

    def _from(self, step: int, rng: np.random.Generator, lead: np.ndarray | None = None) -> list[Point]:
        """All points that one start gives."""
        search, program, solver = self.search, self.program, self.solver
        n, k = program.n, program.n + program.m
        xy = program.start if lead is None else lead
        stationary = step < solver.starts or lead is not None
        branching = bool(step) and step % 4 != 2
        branching = branching or not stationary or lead is not None
        if step and lead is None:
            place = spread(step, k)
            xy = sample(program.lower[:k], program.upper[:k], xy, rng, step % 4 != 0, place)
            xy = xy if branching else search.feasible(xy)
        points: list[Point] = [] if lead is None else [search.judge(search.multipliers(lead)[0], rng)]
        if branching and lead is None:
            # From the lower level's solution at an x, on its own branch.
            near, far = self.scouts()
            if stationary and step % 4 == 0 and far:
                xy = far[(step // 4 - 1) % len(far)]
            elif near:
                xy = near[(step // 2) % len(near)]
            if self.best is None or self.best.loss - _LOWER > program(program.point(xy)).F:
                points.append(search.judge(search.multipliers(xy)[0], rng))  # it is a point of the problem itself
        z, left = search.multipliers(xy)
        if branching and left > 1e-3 and program.p:
            stationary = False  # there is no multiplier at a lower solution: no constraint qualification
        if not stationary:
            z = search.local(z, None, stationary=False, iterations=100)
            points += search.cut_rounds(z, rng, stationary=False)
        else:
            if branching:
                active = (z[k : k + program.p] > -program(z).g) & program.inequality
                z = search.local(z, None, active)
                z = search.ladder(z, LADDER[2:])
            else:
                z = search.ladder(z)
            if lead is None and self._is_known(z[:k]):
                return []
            rounds = search.cut_rounds(z, rng)
            points += rounds
            last = min(rounds, key=lambda point: _rank(point, solver.tol))
            for end in search.crossover(last.z) if last.violation <= 1e-2 else []:
                points.append(search.judge(end, rng, [p[n:] for p in last.lowest.points[:2]]))
        # The lower level's solutions at the x that were met are points of the problem themselves.
        for point in list(points):
            points += [self._answer(point.lowest, other) for other in point.lowest.points[:3]]
        return points

    # ------------------------------------------------------------ states

    def state(self, before: MPCCState, step: int, point: Point, finished: bool) -> MPCCState:
        """The state after a start that ended at `point`."""
        program, best, tol = self.program, self.best, self.solver.tol
        assert best is not None
        ends = jax.tree.map(np.copy, before.ends)
        for name, tree in zip(("x", "y"), program.trees(point.xy), strict=True):
            jax.tree.map(lambda store, leaf: store.__setitem__(step, leaf), ends[name], tree)
        ends["upper_loss"][step] = point.loss * program.upper_scale
        ends["verified"][step] = point.verified(tol)
        self._learn(ends)
        x, y = program.trees_inside(best.xy)
        with program.precision():
            upper, lower = _multipliers(self.search, best)
        return MPCCState(
            x,
            y,
            _in_shape(program, upper, lower),
            np.float64(best.loss * program.upper_scale),
            np.float64(best.violation),
            np.float64(best.gap),
            np.bool_(best.verified(tol)),
            ends,
            before.start,
            before.lead,
            np.bool_(False),
            np.int64(step + 1),
            np.bool_(finished),
        )


def around(program: Program, starts: int, evaluations: int) -> tuple[Point | None, bool]:
    """A verified point with a lower F than where `program` begins, from a search around it, or None: none was found;
    and whether that search came to its end.

    It ends at the first one, after so many starts that led nowhere new, or after four times as many in all. It is left
    after so many evaluations.
    """
    run = _Run(MPCC(starts=4 * starts), program, as_step_key(0))
    tol, idle, ended = run.solver.tol, 0, True
    with program.precision():
        here = program(program.point(program.start)).F
        better = lambda best: best.verified(tol) and best.loss < here - _LOWER  # noqa: E731
        try:
            with program.at_most(evaluations):
                for _, point, _ in run.all(1):  # start number 0 is the point itself
                    apart = (np.abs(point.xy - end).max() > _DIFFERENT for end in [program.start, *run.known])
                    new = point.verified(tol) and all(apart)
                    idle = 0 if new else idle + 1
                    run.known += [point.xy] if new else []
                    if (run.best is not None and better(run.best)) or idle >= starts:
                        break
        except ProgramSpentError:
            ended = False
        if run.best is not None and better(run.best):
            return run.search.exact(run.best, np.random.default_rng(0)), True
    return None, ended


def _apart(points: list[np.ndarray]) -> list[np.ndarray]:
    """Those that are not one of the others again."""
    found: list[np.ndarray] = []
    for point in points:
        if all(np.abs(point - other).max() > SAME for other in found):
            found.append(point)
    return found


def _rank(point: Point, tol: float) -> tuple[int, float]:
    """Verified points by F, then feasible ones by their gap, then the others by what they break."""
    if point.verified(tol):
        return 0, point.loss
    if point.violation <= 1e-6 and np.isfinite(point.gap):
        return 1, point.gap
    return 2, point.violation


def _multipliers(search: Search, point: Point) -> tuple[np.ndarray, np.ndarray]:
    """Those of the upper level's rows, of F + a . G + b . H under the lower level's conditions, and the lower level's,
    in the user's units."""
    from scipy.optimize import lsq_linear

    program, k = search.program, search.k
    z, left = search.multipliers(point.xy)
    if left > 1e-3:
        z = point.z
    at = program(z)
    _, _, G, H, _, _, _ = program._slices
    lam, mu = z[k : k + program.p].copy(), z[k + program.p :]
    for i, j in program.pairs:
        lam[i], lam[j] = max(lam[i], 0.0), max(-lam[i], 0.0)
    lower = np.concatenate([lam * program.columns[k : k + program.p], mu * program.columns[k + program.p :]])
    upper = np.zeros(G.stop - G.start + H.stop - H.start)
    on = np.flatnonzero(at.G > -1e-5)
    if on.size + at.H.size:
        tight = (at.g > -1e-5) & ((lam > 1e-6) | ~program.inequality)
        rows = [at.dG[on], at.dH, at.dg[tight], at.dh, at.dr]
        matrix = np.concatenate(rows)[:, : k + program.p + program.q]
        moving = np.ones(matrix.shape[1], bool)
        moving[k : k + program.p] = lam > 1e-6
        least = np.full(matrix.shape[0], -np.inf)
        least[: on.size] = 0.0
        found = lsq_linear(matrix[:, moving].T, -at.dF[moving], (least, np.full(least.size, np.inf))).x
        upper[on] = found[: on.size]
        upper[at.G.size :] = found[on.size : on.size + at.H.size]
    scale = np.concatenate([program.rows[G], program.rows[H]]) / program.rows[0]
    return upper * scale, lower


def _in_shape(program: Program, upper: np.ndarray, lower: np.ndarray) -> dict[str, PyTree]:
    """Multipliers by the names of a `Problem`'s fields, in the shapes of what those return."""
    found: dict[str, PyTree] = {}
    for prefix, values, level in (("upper_", upper, "upper"), ("", lower, "lower")):
        first = 0
        for kind in ("constraint", "equality"):
            name = prefix + kind
            shapes, extra = program.shapes[name]
            leaves = []
            for shape in jax.tree.leaves(shapes):
                size = int(np.prod(shape.shape))
                leaves.append(jax.device_put(values[first : first + size].reshape(shape.shape).astype(shape.dtype)))
                first += size
            if leaves:
                found[name] = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
            if extra:
                found[f"project_{level}.{kind}"] = jax.device_put(values[first : first + extra])
                first += extra
    return found
