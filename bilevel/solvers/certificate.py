"""The certificate at the end of a run, the same for all families of solvers and for a user's own.

`certify` measures the end with means of its own, nothing of them shared with the method, in the problem's own units
(`_units`), and reads the measures by the rows of a table, in order (`verdict`):

    finite         F, f and their gradients are numbers;
    feasible       x in X, y in Y, G, H, g, h hold;
    bounded        f(x, .) does not fall for ever, and x did not run away;
    minimised      no start reaches a lower f(x, .);
    optimistic     no other minimiser of f(x, .) has a lower F;
    stationary     no small feasible move of x, y following by a lower solve of its own, lowers F: along the slope,
                   where x -> F(x, y*(x)) bends down most and by Newton's step (up to 300 unknowns of x), and along
                   random directions;
    not beaten     no large move does (for a few unknowns).

Where data have no end, all of it is looked at on draws of its own (`_draws`); their sampling error is a tolerance like
that of rounding, and where it is above what the run was asked for, that is said.

Of a linear-quadratic problem without sets and with few lower rows they are exact, from one Hessian (`small.quadratic`).
CONVERGED means that all of it held; what was not checked, because of size or of the kind of data, is said.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel import _compiling
from bilevel._traces import equations, of_losses
from bilevel.constraints import Constraints
from bilevel.curvature import ends_of_spectrum, lower_curvature, lower_spectrum, ritz_pairs
from bilevel.data import of_one_step
from bilevel.hypergradients.implicit import Implicit
from bilevel.keys import as_step_key
from bilevel.lower import LowerState, Newton
from bilevel.lower.accurate import augmented_lagrangian
from bilevel.problem import Problem
from bilevel.result import Result
from bilevel.solvers._draws import Fixed, fixed_draws
from bilevel.solvers._units import (
    AWAY,
    FELT,
    SHORTER_WAYS,
    Units,
    changes,
    left_of,
    moves,
    normalised,
    progress_of,
    regular,
    rms,
    share,
    shorter,
    times,
    units_of_losses,
    units_of_variables,
    untrue_along,
)
from bilevel.solvers.small.mpcc import around
from bilevel.solvers.small.program import Program, flatten
from bilevel.solvers.small.quadratic import exact_end
from bilevel.solvers.small.search import FEASIBLE, Search, solve_lower
from bilevel.solvers.small.stationarity import kinked, lower_verified, refusal, stationary, unbounded
from bilevel.typing import PyTree, Scalar

__all__ = ["Certificate", "certify", "verdict"]

MANY = 10_000
"""The most unknowns of a level for which it is solved anew."""
_MANY_STARTS = 250
"""The most lower unknowns for which the lower level is solved from eight starts; from four above."""
_FEW = 8
"""The most upper unknowns for which every coordinate is moved, and far moves are tried."""
_CURVED = 2_000
"""The most lower unknowns for which a run without a tolerance has its curvature looked at."""
_AROUND = 3
"""Starts of the search for another solution of a small problem that lead nowhere new before it ends."""
_EVALUATIONS = 12_000
"""Evaluations after which it is left."""
_SEARCHED = 150
"""The most unknowns and lower rows with which there is such a search."""
_BLIND = 3
"""Random directions."""
_BENDS = 300
"""The most unknowns of x of which it is looked for where F bends down: a dozen lower solves, one after the other."""
_STEADY = 1e-4
"""By how much of a unit a little of F beside f changes F at most, where what it does elsewhere says something."""
_APART = 0.1
"""How far from y, in units, a lower minimiser is at least that is another one, where f is strongly convex around y."""
_NOTHING = 1e-5
"""The violation of a row, in the units of the start, that is none."""
_RUNAWAY = 1e10
"""How far x is from zero at most, in units that it had at the start."""
_NEAR, _FAR, _WAYS = (1e-2, 1e-1), (1.0, 4.0, 16.0, 64.0, 256.0), (1.0, 4.0)
"""How far x is moved, in its own units: nearby, far along each of few coordinates, and far of many."""
_BETWEEN, _ACROSS, _TRIED = (0.35, 0.7, 2.0), 9, 3
"""And of one or two coordinates besides; the places across a box; and how many points with a lower F are looked at."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was found at the end of a run.

    Attributes:
      result: the result that it leaves standing.
      why: what is to be said about it, in sentences; empty where all held.
      measures: numbers by name: `lower_loss`, `polished_gap` (how much lower another solve of the lower level came),
        `polished_violation` (what that solve could not repair), `polished_change` (F at the lower level's solution that
        is best for F, less F), `descent` (how much lower F came nearby), `curvature_least` and `curvature_greatest`
        (eigenvalues of f_yy), as far as measured; of data without an end `sampling_error`, that of a change of F or f
        by one unit, relative to it.
      unchecked: what was not checked, a sentence each.
      unsettled: the end is near a solution and not close enough: a run with a smaller tolerance may mend it.
      better: a point (x, y) with a lower F, feasible and lower-optimal as far as the search saw, or None.
    """

    result: Result
    why: str = ""
    measures: dict[str, float] = dataclasses.field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    unsettled: bool = False
    better: tuple[PyTree, PyTree] | None = None


# ---------------------------------------------------------------- the table


def _asked(tol: float | None) -> float:
    """The tolerance of an end's check: the run's, or this where the run had none."""
    return 1e-3 if tol is None else tol


_FUNCTIONS = ("upper", "lower", "upper_constraint", "upper_equality", "constraint", "equality")
_LIVE = (Result.CONVERGED, Result.PENALTY_LIMITED)
_ANY = (*_LIVE, Result.MAX_STEPS, Result.COMPLETED)


def verdict(
    found: dict[str, float], result: Result, metrics: dict[str, float], tol: float | None
) -> tuple[Result, str]:
    """The result that the measures leave standing, and what is to be said about it.

    Args:
      found: the measures, relative ones (in `Units`) among them: `finite`, `outside`, `upper_violation`, `violation`,
        `repaired` (what the best lower solve still breaks), `bounded`, `gap`, `gain`, `near`, `far`, `left` (what F can
        still fall by as a part of F or of its way, `share`), with `noise_lower` and `noise_upper`, what rounding makes
        of them; and the others of `Certificate`. What is absent was not checked.
      result: what the run ended by.
      metrics: of its last step.
      tol: the run's tolerance, or None (1e-3 then).
    """
    asked = _asked(tol)
    feasible = max(asked, 1e-4)
    margin = 10 * asked
    get = lambda name: found.get(name, 0.0)  # noqa: E731
    above = lambda name, least, noise="": not get(name) <= max(least, get(noise))  # noqa: E731  a NaN is above
    bias, capped = metrics.get("bias", 0.0), metrics.get("multiplier_at_cap", 0.0)
    change, penalised = get("polished_change"), "penalty" in metrics
    undecided = above("gain", margin, "noise_upper")
    vanishing = (
        " By what it was at the start that is nothing: its slope vanishes where it is met, as that of z^2 <= 0 does, "
        "and it has no multiplier. Write z = 0."
        if get("vanishing")
        else ""
    )
    convex = _bend(found) == 1 and get("apart") < _APART  # else the other y is in another valley
    settled = (
        result is Result.MAX_STEPS
        and metrics.get("hypergradient_norm", np.inf) <= asked * (1 + abs(metrics.get("upper_loss", 0.0)))
        and bias > asked * (1 + abs(metrics.get("upper_loss", 0.0)))
    )
    # The first row that holds decides: a result among the second column becomes the third, and the sentence is added.
    rows = (
        (
            not found.get("finite", 1.0),
            _ANY,
            Result.DIVERGED,
            "At the end a loss, a constraint or a gradient is not finite.",
        ),
        (
            above("repaired", max(1e-3, asked)),
            _ANY,
            Result.INFEASIBLE,
            f"At this x no feasible lower-level y was found: the best breaks a constraint by {get('repaired'):.2g} "
            "(scaled rows).",
        ),
        (
            above("outside", feasible),
            _ANY,
            Result.INFEASIBLE,
            f"x or y lies outside its set, by {get('outside'):.2g} of its size.",
        ),
        (
            above("upper_violation", feasible),
            _ANY,
            Result.INFEASIBLE,
            f"A constraint of the upper level is broken by {get('upper_violation'):.2g} (scaled rows)." + vanishing,
        ),
        (
            above("violation", 10 * feasible),
            _LIVE,
            Result.INFEASIBLE,
            f"y breaks a constraint of the lower level by {get('violation'):.2g} (scaled rows)." + vanishing,
        ),
        (
            not found.get("bounded", 1.0),
            _ANY,
            Result.UNBOUNDED,
            "The lower loss falls without bound (or without a minimiser) from y at this x: the lower level has no "
            "solution there. Bound y (project_lower=), or regularise f.",
        ),
        (
            above("runaway", 0.0),
            _ANY,
            Result.UNBOUNDED,
            f"x ran away to {get('runaway'):.1g} times its unit: the upper loss seems to fall for ever. Bound x "
            "(project_upper=), or regularise F.",
        ),
        (
            above("gap", margin, "noise_lower") and above("unanswered", 1e-3),
            _ANY,
            Result.INFEASIBLE,
            f"y lies {get('polished_gap'):.3g} above the lower level's minimum, whose minimisers break a constraint of "
            f"the upper level by {get('unanswered'):.2g} (scaled rows) at this x, and no other x was found where one "
            "does not.",
        ),
        (
            settled,
            (Result.MAX_STEPS,),
            Result.PENALTY_LIMITED,
            f"The penalty's bias in the upper loss is about {bias:.2g}: raise the penalty, or extrapolate in it "
            "(Continuation).",
        ),
        (
            above("gap", margin, "noise_lower"),
            _LIVE,
            Result.LOWER_LEVEL,
            f"An independent solve of the lower level reaches {get('polished_gap'):.3g} below f(x, y)"
            + (
                ": y is stationary and not its minimum. Start elsewhere (multistart)."
                if result is Result.CONVERGED
                else "."
            ),
        ),
        (
            undecided and change > 0 and penalised,
            (Result.CONVERGED,),
            Result.PENALTY_LIMITED,
            f"At the lower level's own solution the upper loss is larger by {change:.2g}: the lower level is too flat "
            "for this penalty. Raise it, or tighten the tolerance.",
        ),
        (
            undecided and (change > 0 or convex),
            (Result.CONVERGED,),
            Result.LOWER_LEVEL,
            f"At the lower level's own solution the upper loss is {'larger' if change > 0 else 'smaller'} by "
            f"{abs(change):.2g}: y is not there yet. Tighten the tolerance, take more lower steps, or a lower solver "
            "that stands ill-conditioning (lower.Newton).",
        ),
        (
            undecided and not convex,
            _LIVE,
            Result.SEVERAL_MINIMISERS,
            f"Another y, as low in the lower loss, has an upper loss smaller by {-change:.2g}: the lower level's "
            "solution is not unique, and this method does not choose among solutions. Take MPCC (small problems), "
            "F2BA, MEHA or LVHBA.",
        ),
        (
            above("untrue", 0.0),
            (Result.CONVERGED,),
            Result.UNRESOLVED,
            f"The derivative that JAX takes of {_FUNCTIONS[int(get('untrue')) - 1]} is another than that of its values "
            "(a stop_gradient, a rounding that is passed over, a rule of its own): where it is zero says nothing of F.",
        ),
        (
            above("near", margin, "noise_upper"),
            (Result.CONVERGED,),
            Result.NOT_STATIONARY,
            (f"F falls by {get('descent'):.2g}" if get("descent") > 0 else "F falls, by its slope,")
            + " when x is moved a little and y follows: x is not a solution of the upper "
            "level (a kink, a maximum, or a tolerance too coarse for this problem's units).",
        ),
        (
            above("far", margin, "noise_upper"),
            (Result.CONVERGED,),
            Result.LOCAL,
            f"Another x, further away, has an upper loss smaller by {get('beaten'):.2g}: this is a local solution.",
        ),
        (
            above("blind", 0.0),
            (Result.CONVERGED,),
            Result.UNRESOLVED,
            "The slope of x -> F(x, y*(x)) is not a number here, and of many directions few were tried: nothing that "
            "was seen speaks against this end. Write the losses so that they have derivatives (a root or a norm of "
            "z + 1e-12 in place of z).",
        ),
        (
            above("sampling_error", margin),
            (Result.CONVERGED,),
            Result.UNRESOLVED,
            f"On {get('draws'):.0f} draws the losses' changes are known to {100 * get('sampling_error'):.2g}% of a "
            f"unit, and the tolerance asks for {100 * margin:.2g}%: nothing above that speaks against this end, and "
            "nothing below can be seen. Draw larger batches, or ask for a larger tolerance.",
        ),
    )
    # And these are added to it.
    kink = (
        above("kinked", 0.0),
        (),
        result,
        "The lower loss has a kink at its minimiser (an absolute value, a maximum, a norm), where its derivatives say "
        "nothing: give the kink as rows, |z| as t with constraint= z - t and -z - t (MPCC, LVHBA), or as prox_lower=.",
    )
    remark = (
        capped > 0,
        (Result.CONVERGED,),
        Result.PENALTY_LIMITED,
        f"{100 * capped:.0f}% of the multipliers sit on their cap: raise the cap; if they follow it, no multiplier "
        "exists.",
    )
    said, held = [], True
    for row in (next((row for row in rows if row[0]), None), kink, remark):
        if row is not None and row[0]:
            held = False
            result = row[2] if result in row[1] else result
            said.append(row[3])
    if held and tol is not None and result is Result.MAX_STEPS and "near" in found:
        # The run's own measure has units that the problem does not share; the certificate's have none. But what is
        # left to gain is not to be much of what the run has gained, in whatever units.
        if above("left", margin):
            said.append(f"F can still fall by {max(get('descent'), get('beaten')):.2g}: take more steps.")
        else:
            result = Result.CONVERGED
    return result, " ".join(said)


def _bend(found: dict[str, float]) -> int | None:
    """f(x, .) around y: 1 strongly convex, 0 flat in a direction, -1 curved downwards in one; None: not known."""
    if "curvature_least" not in found:
        return None
    rounding = 1e-6 * abs(found["curvature_greatest"])
    least = found["curvature_least"]
    return 1 if least > rounding > 0 else 0 if least > -rounding else -1 if least < -rounding else None


# ---------------------------------------------------------------- the search


def certify(
    problem: Problem,
    x: PyTree,
    y: PyTree,
    start: tuple[PyTree, PyTree],
    result: Result,
    metrics: dict[str, float],
    tol: float | None,
    steps_left: bool = False,
    step: int = 0,
) -> Certificate:
    """Check the end (x, y) of a run from `start` that ended by `result`, with `metrics` of its last step.

    With a tolerance everything in this module's table that size allows, up to 10,000 unknowns; without one, up to 2,000
    on full batches, values, sets and rows, and the lower level from y where it is constrained, penalised or not convex.
    Of a run that has `steps_left`, an end that is not there yet is said as soon as it is seen, before the other starts
    and directions. `step` is that of keys which reach a loss (`data.Keyed`). Losses without second derivatives are
    taken as they are, and that nothing was looked at is said.
    """
    end = _End(problem, x, y, start, result, metrics, tol, steps_left, step)
    try:
        return _certified(end)
    except (TypeError, ValueError, NotImplementedError):
        blind = _blind(problem, x, y)
        if blind is None:
            raise
        return _unlooked(end, (f"Not checked by an independent solve: {blind}.",))


@dataclasses.dataclass(frozen=True)
class _End:
    """What `certify` is given."""

    problem: Problem
    x: PyTree
    y: PyTree
    start: tuple[PyTree, PyTree]
    result: Result
    metrics: dict[str, float]
    tol: float | None
    steps_left: bool
    step: int

    @property
    def asked(self) -> float:
        """The tolerance, or what stands in its place."""
        return _asked(self.tol)

    @property
    def judged(self) -> bool:
        """Whether there is a word to hold it to."""
        return self.tol is not None or self.result is Result.CONVERGED


def _certified(end: _End) -> Certificate:
    if jax.process_count() > 1:
        said = "The end was not looked at: the run is spread over several processes."
        return Certificate(end.result, unchecked=(said,))
    if end.result in (Result.LOWER_LEVEL, Result.INFEASIBLE):  # a solver's word: the search may find better or worse
        found = _certified(dataclasses.replace(end, result=Result.MAX_STEPS, steps_left=False))
        return found if found.result is not Result.MAX_STEPS else dataclasses.replace(found, result=end.result)
    if end.result not in _ANY:
        return Certificate(end.result)
    unchecked = _obstacles(end.problem, end.x, end.y, end.tol)
    sampled: dict[str, float] = {}
    if end.judged and unchecked == () and any(source.redrawn for source in end.problem.sources):
        fixed = fixed_draws(end.problem, end.x, end.y, end.start, 10 * end.asked, end.step)
        if isinstance(fixed, Fixed):
            start = end.start
            if of_one_step(end.problem.sources[1]):
                alone = _unlooked(end, ())  # the run's own y, on its own draw
                if alone.result is not end.result:
                    return alone
                start = start[0], jax.tree.map(lambda y0, y: jnp.broadcast_to(y0, y.shape), start[1], fixed.y)
            end = dataclasses.replace(end, problem=fixed.problem, y=fixed.y, start=start)
            error = max(fixed.upper, fixed.lower)
            sampled = {"draws": fixed.draws, "sampling_error": error, "upper": fixed.upper, "lower": fixed.lower}
        else:
            unchecked = (f"Not checked by an independent solve: {fixed}.",)
    found = _looked(end, unchecked, sampled)
    if end.problem.sources[1].separate:  # a better y is one for each draw
        found = dataclasses.replace(found, better=None)
    if sampled.get("sampling_error"):
        said = f"Looked at on {sampled['draws']:.0f} draws: changes of the losses by less than "
        said += f"{100 * sampled['sampling_error']:.2g}% of a unit are sampling error."
        found = dataclasses.replace(found, unchecked=(*found.unchecked, said))
    return found


def _looked(end: _End, unchecked: tuple[str, ...] | None, sampled: dict[str, float]) -> Certificate:
    """The certificate of a problem on samples that stay."""
    problem, x, y, start = end.problem, end.x, end.y, end.start
    if unchecked == ():
        with np.errstate(all="ignore"):  # a run may have ended at numbers of any size
            exact = exact_end(problem, x, y, start, end.asked)
            if exact is not None:
                measures = exact[0] if end.judged else _unasked(exact[0], "penalty" in end.metrics)
                return _concluded(end, _noisier(measures, sampled), (), exact[1] if end.judged else None)
            if end.judged and not refusal(problem, x, y):
                return _of_small(end, sampled)
    if unchecked is None:
        return Certificate(end.result, unchecked=("The end was not looked at: its data are read from a stream.",))
    if unchecked:  # nothing is evaluated on data or models of that size
        return _unlooked(end, unchecked)
    nonsmooth = problem.project_lower is not None or problem.prox_lower is not None
    rows = problem.constraint is not None or problem.equality is not None
    n = optax.tree.size(y)
    curved = not nonsmooth and not rows and n <= _CURVED
    units, at, progress, found = _measured(problem, x, y, start, curved)
    ends = ends_of_spectrum(found.pop("curvature")) if curved else None
    numbers = _noisier({name: float(value) for name, value in found.items()} | _in_units(units), sampled)
    if not end.judged:
        numbers.pop("untrue", None)
    if ends is not None:
        numbers["curvature_least"], numbers["curvature_greatest"] = ends
    better = None
    concave = _bend(numbers) == -1
    if numbers["finite"] and (end.judged or rows or concave or "penalty" in end.metrics):
        search = _Search(problem, units, at, numbers, progress)
        movable = end.judged and bool(jax.tree.leaves(x))
        if movable and end.steps_left:
            search.minimise(starts=1, choose=True)
            if np.isfinite(numbers["gap"]):
                search.move(everywhere=False)
            seen = _concluded(end, dict(numbers), unchecked, search.better)
            if seen.unsettled:
                return seen
        starts = 1 if not end.judged and not concave else 8 if n <= _MANY_STARTS else 4
        search.minimise(starts=starts, choose=end.judged)
        if movable and np.isfinite(numbers["gap"]):
            search.move()
            if max(numbers["near"], numbers.get("far", 0.0)) <= 10 * end.asked:
                search.bend()
            size = f"because of size: {optax.tree.size(x):,} unknowns of the upper level."
            if optax.tree.size(x) > _BENDS:
                unchecked += (f"Whether F falls to both sides of x along some direction was not looked at, {size}",)
            if "far" not in numbers:
                unchecked += (f"Whether another x is better was not looked at, {size}",)
        better = search.better
    return _concluded(end, numbers, unchecked, better)


def _measured(
    problem: Problem, x: PyTree, y: PyTree, start: tuple[PyTree, PyTree], curved: bool
) -> tuple[Units, tuple[PyTree, PyTree], float, dict[str, Any]]:
    """The units, the point in these, F or its way from the start in its unit, and what is seen without a solve."""
    lengths = units_of_variables(problem, x, y, *start)
    # The way back to the start is looked at with the moves.
    back = tuple(
        jax.tree.map(lambda z0, z: np.asarray(z0) - np.asarray(z), *pair) for pair in zip(start, (x, y), strict=True)
    )
    away = tuple(
        jax.tree.map(lambda way, *some: np.concatenate([way.astype(some[0].dtype)[None], *some]), *trees)
        for trees in zip(back, moves(x, y, lengths), shorter(x, y, lengths), strict=True)
    )
    ruled = any(map(_has_rules, of_losses(problem, x, y)))
    at, here, changed, found = _examined(problem, lengths, x, y, away, curved=curved, ruled=ruled)
    of_upper, of_lower = map(np.asarray, changed)
    told = found.pop("told", (None, None))
    if ruled and problem.project_upper is None and problem.project_lower is None:  # else the moves end elsewhere
        of_moves = zip(told, (of_upper[AWAY + 1 :], of_lower[AWAY + 1 :]), here, strict=True)
        wrong = [untrue_along(*of_loss) for of_loss in of_moves]
        found |= {"untrue": float(wrong.index(True) + 1)} if True in wrong else {}
    short = regular(lengths, back, here, (of_upper[AWAY + 1 :], of_lower[AWAY + 1 :]))
    if short is None:
        units = units_of_losses(lengths, here, (of_upper[1 : AWAY + 1], of_lower[1 : AWAY + 1]))
    else:
        units = units_of_losses(short[0], here, short[1])
        by = [old / new for old, new in zip(lengths, short[0], strict=True)]
        at = tuple(
            jax.tree.map(lambda leaf, by=by: (np.asarray(leaf) * by).astype(leaf.dtype), tree)
            for tree, by in zip(at, by, strict=True)
        )
    return units, at, progress_of(float(here[0]), float(of_upper[0])) / float(units.upper), found


def _unasked(found: dict[str, float], penalised: bool) -> dict[str, float]:
    """Of all measures those of a run that was asked for no tolerance: x and the choice of y are not judged, and y where
    a penalty holds it."""
    of_x = {"gain", "near", "far", "descent", "beaten", "polished_change"}
    of_y = set() if penalised else {"gap", "polished_gap", "polished_violation"}
    return {name: value for name, value in found.items() if name not in of_x | of_y}


def _unlooked(end: _End, unchecked: tuple[str, ...]) -> Certificate:
    """The certificate of an end that is not looked at, with the reason."""
    result = end.result
    why = " ".join(unchecked) if end.tol is not None and result is Result.CONVERGED else ""
    left = end.metrics.get("lower_residual", 0.0)
    if result is Result.CONVERGED and left > end.asked:  # of a run that unrolls its steps
        result, why = Result.LOWER_LEVEL, f"The lower level is left with |f_y| = {left:.3g}. {why}".strip()
    return Certificate(result, why, unchecked=unchecked)


def _blind(problem: Problem, x: PyTree, y: PyTree) -> str | None:
    """Which level's loss has no second derivative as the search takes it, linearised and stacked; None: none."""
    for name, level in zip(("upper", "lower"), problem.levels(as_step_key(0)), strict=True):

        def products(x: PyTree, y: PyTree, level: Any = level) -> PyTree:
            product = jax.linearize(jax.grad(level, 1), x, y)[1]
            return jax.vmap(product)(*jax.tree.map(lambda leaf: leaf[None], (x, y)))

        try:
            jax.eval_shape(products, x, y)
        except Exception:  # whatever a kernel without a derivative says
            return f"{name}, the {name} level's loss, has no second derivative"
    return None


def _noisier(found: dict[str, float], sampled: dict[str, float]) -> dict[str, float]:
    """The measures with the sampling error beside rounding."""
    for level in ("upper", "lower") if sampled else ():
        found[f"noise_{level}"] = max(found[f"noise_{level}"], sampled[level])
    return found | {name: sampled[name] for name in ("draws", "sampling_error") if name in sampled}


def _concluded(
    end: _End, found: dict[str, float], unchecked: tuple[str, ...], better: tuple[PyTree, PyTree] | None
) -> Certificate:
    """The certificate that measures lead to, whichever search took them."""
    result, why = verdict(found, end.result, end.metrics, end.tol)
    seen = {"gap": "lower", "gain": "upper", "near": "upper", "far": "upper"}
    if "draws" in found and not any(found.get(name, 0.0) > found[f"noise_{level}"] for name, level in seen.items()):
        better = None  # as far as the draws can tell
    measures = {name: found[name] for name in _REPORTED if name in found}
    unsettled = result is Result.NOT_STATIONARY or (result is Result.LOWER_LEVEL and found.get("gap", 1.0) <= 0.1)
    return Certificate(result, why, measures, unchecked, unsettled, better)


def _of_small(end: _End, sampled: dict[str, float]) -> Certificate:
    """The same of a small problem, on the host: all vertices of the multipliers and all branches."""
    problem, x, y, start = end.problem, end.x, end.y, end.start
    program = Program(problem, x, y, "The certificate", began=start)
    before = Program(problem, *start, "The certificate")
    n, k = program.n, program.n + program.m
    with np.errstate(all="ignore"):
        sizes = np.abs(program.start * program.columns[:k]) / before.columns[:k]
    if any((program.columns[part] < 1e-3 * before.columns[part]).any() for part in (slice(0, n), slice(n, k))):
        program = before  # at the end a variable is zero but for rounding, which is no unit
        program.start = program.scaled(x, y)
    falls = unbounded(problem, x, y, program) or (sizes[n:].max() > _RUNAWAY and _falls_further(program, x, y))
    starts = 1 if falls else 12  # nothing is to be found where f falls for ever
    lower = lower_verified(problem, x, y, starts, program=program, noise=sampled.get("lower", 0.0))
    upper_loss, lower_loss = program.losses(x, y)
    found: dict[str, float] = {
        "finite": float(np.isfinite(upper_loss) and np.isfinite(lower_loss)),
        "upper_violation": lower.upper_violation,
        "violation": lower.violation,
        "repaired": 0.0 if np.isfinite(lower.gap) else lower.violation,
        "bounded": float(not (falls or (lower.gap > 1e-3 and unbounded(problem, x, y, program, curved=True)))),
        "runaway": _runaway(program, x, y, float(sizes[:n].max(initial=0.0))),
        "unanswered": lower.answer_violation if "start_loss" in end.metrics else 0.0,
        "gap": lower.gap,
        "gain": max(lower.optimistic_gain, lower.loss_change / program.upper_scale),
        "noise_upper": 1e-12 * abs(upper_loss) / program.upper_scale,
        "noise_lower": 1e-12 * abs(lower_loss) / program.lower_scale,
        "lower_loss": lower_loss,
        "polished_gap": lower.loss_gap,
        "polished_violation": lower.violation,
        "polished_change": lower.loss_change if lower.loss_change > lower.loss_gain else -lower.loss_gain,
    }
    if max(lower.upper_violation, lower.violation) > max(end.asked, 1e-4):
        with before.precision():
            broken = before.violation(before(before.point(before.scaled(x, y))))
        found["vanishing"] = float(broken <= _NOTHING)
    if lower.better is not None:
        found["apart"] = float(np.abs(program.scaled(x, lower.better) - program.scaled(x, y)).max(initial=0.0))
    with program.precision():
        lowest = program.scaled(x, lower.minimisers[0] if lower.minimisers else y)
        found["kinked"] = float(kinked(program, lowest))
    if (whose := program.untrue(program.scaled(x, y))) is not None:
        found["untrue"] = float(_FUNCTIONS.index(whose) + 1)
    found = _noisier(found, sampled)
    progress = progress_of(upper_loss, upper_loss - program.losses(*start)[0])
    if (
        found["gain"] > 1e-3
        and problem.project_lower is None
        and problem.prox_lower is None
        and not (program.p + program.q)
    ):
        # Another y as low, or the same minimum met more closely: the curvature around y tells.
        found["curvature_least"], found["curvature_greatest"] = lower_spectrum(problem, x, y, dense=300)
    unchecked: tuple[str, ...] = ()
    better = None if lower.better is None else (x, lower.better)
    looked = found["finite"] and found["bounded"] and np.isfinite(lower.gap)
    if jax.tree.leaves(x) and looked and "untrue" not in found:
        slope = stationary(problem, x, y, end.asked, program)
        found["near"] = max(0.0, -slope.slope)
        found["descent"] = 0.0 if slope.reached is None else max(upper_loss - program.losses(*slope.reached)[0], 0.0)
        if found["near"] * program.upper_scale > end.asked * program.columns[:n].max():  # as in `exact_end`
            found["near"] = max(found["near"], share(found["descent"], progress))
        unchecked = () if slope.checked or not slope.why else (f"Stationarity: {slope.why}",)
        better = slope.reached or better
        if end.steps_left and (seen := _concluded(end, dict(found), unchecked, better)).unsettled:
            return seen
        # MPCC that ended by itself has looked around, by the lower level's conditions: nothing where f has kinks.
        searched = "start_loss" in end.metrics and not program.may_kink and end.result is not Result.MAX_STEPS
        if not searched and (lower_yet := _further(program, found, progress, start)) is not None:
            better = better or lower_yet
        if not searched and found["near"] <= 1e-2 and found["gap"] <= max(10 * end.asked, found["noise_lower"]):
            if program.size <= _SEARCHED:
                better = _elsewhere(program, upper_loss, found, progress, start) or better
                if found.pop("cut") and not found["beaten"]:
                    unchecked += (f"Another x with a lower F was looked for in {_EVALUATIONS} evaluations alone.",)
            else:
                why = f"{program.n + program.m} unknowns and {program.p + program.q} rows of the lower level"
                unchecked += (f"Whether another x is better was not looked at, because of size: {why}.",)
        fall = max(found["descent"], found.get("beaten", 0.0)) - found["noise_upper"] * program.upper_scale
        found["left"] = left_of(max(fall, 0.0), progress, program.upper_scale)
    elif not jax.tree.leaves(x):
        found["near"] = 0.0
    return _concluded(end, found, unchecked, better)


def _runaway(program: Program, x: PyTree, y: PyTree, size: float) -> float:
    """`size`, how far x is from zero in units of the start, where F falls on and on from there; else 0.

    Where no unit of the start says anything that is at twice as far; elsewhere at 2, 32 and 512 times as far, each time
    by half of its own size, with nothing in the way.
    """
    if not np.isfinite(size):
        return size
    with program.precision():
        xy = program.scaled(x, y)
        last = program(program.point(xy)).F
        for times in (2.0,) if size > _RUNAWAY else (2.0, 32.0, 512.0):
            further = np.clip(times * xy, program.own_lower[: xy.size], program.own_upper[: xy.size])
            if size <= _RUNAWAY and (further != times * xy)[: program.n].any():
                return 0.0
            found = solve_lower(program, further, [further[program.n :], xy[program.n :]])
            there = program(program.point(found.points[0])) if found.points else None
            if there is None or (size <= _RUNAWAY and program.violation(there) > FEASIBLE):
                return 0.0
            if not last - there.F > (0.0 if size > _RUNAWAY else 0.5 * abs(last)):
                return 0.0
            last = there.F
        return size


def _falls_further(program: Program, x: PyTree, y: PyTree) -> bool:
    """Whether f is lower still, or beyond all numbers, at twice a y that ran away."""
    with program.precision(), np.errstate(all="ignore"):
        xy = program.scaled(x, y)
        further = np.concatenate([xy[: program.n], 2 * xy[program.n :]])
        here, there = program(program.point(xy)), program(program.point(further))
        return not np.isfinite(there.f) or (there.f < here.f and program.violation(there, upper=False) <= FEASIBLE)


def _felt(program: Program, here: np.ndarray, there: np.ndarray, start: tuple[PyTree, PyTree]) -> bool:
    """Whether x moves by as much as `FELT` between two points: in its units, or of its size at these and the start.

    A box that is far too wide makes a wide unit.
    """
    n = program.n
    way, columns = np.abs(there - here)[:n], program.columns[:n]
    size = max(np.linalg.norm(point[:n] * columns) for point in (here, there))
    size = max(size, np.linalg.norm(flatten(start[0])))
    return bool(way.max(initial=0.0) > FELT or np.linalg.norm(way * columns) > FELT * size)


def _further(
    program: Program, found: dict[str, float], progress: float, start: tuple[PyTree, PyTree]
) -> tuple[PyTree, PyTree] | None:
    """Where local solves lead from here, of F in units of the slope that is left, if F is felt to fall on the way."""
    search, rng = Search(program), np.random.default_rng(0)
    with program.precision():
        here = search.judge(search.multipliers(search.polish(program.start))[0], rng)
        there = search.settled(here, rng)
        fall = (here.loss - there.loss) * program.upper_scale
        if not (fall > 0 and _felt(program, here.xy, there.xy, start)):
            return None
        if share(fall, progress) > found["near"]:
            found["near"], found["descent"] = share(fall, progress), fall
        return program.trees_inside(there.xy)


def _elsewhere(
    program: Program, upper_loss: float, found: dict[str, float], progress: float, start: tuple[PyTree, PyTree]
) -> tuple[PyTree, PyTree] | None:
    """A verified point with a lower F, from a few starts of a search; `far` and `beaten` say by how much."""
    best, ended = around(program, _AROUND, _EVALUATIONS)
    found["cut"] = float(not ended)
    points = [] if best is None else [best.xy]
    if program.n <= _FEW:
        points += _far_along_coordinates(program, upper_loss / program.upper_scale)
    with program.precision():
        points.sort(key=lambda xy: program(program.point(xy)).F)
        tries = [program.trees(xy) for xy in points[:_TRIED]]
    fall, reached = 0.0, None
    for reached in tries:
        # In units of its own: in those of this end its lower level may be solved nowhere, and a start stand for it.
        there = lower_verified(program.problem, *reached)
        # To the search's tolerance, or as far as the lower solution was rounded: F is taken at the exact one.
        lower = upper_loss - program.losses(*reached)[0]
        close = there.gap <= 1e-5 or (there.gap <= 0.1 and abs(there.loss_change) <= 1e-3 * lower)
        fall = lower - max(there.loss_change, 0.0) if close else 0.0
        if fall > 0:
            break
    found["far"], found["beaten"] = max(fall, 0.0) / program.upper_scale, max(fall, 0.0)
    if reached is not None and _felt(program, program.start, program.scaled(*reached), start):
        found["far"] = max(found["far"], share(fall, progress))
    return reached if fall > 0 else None


def _far_along_coordinates(program: Program, loss: float) -> list[np.ndarray]:
    """The lower solutions with an F below `loss` of x moved along each coordinate: nothing of a loss that is flat in
    pieces is seen by a search with derivatives."""
    n, k = program.n, program.n + program.m
    found: list[np.ndarray] = []
    low, high = program.own_lower[:k], program.own_upper[:k]
    with program.precision():
        for j in range(n):
            here = program.start[j]
            ways = [sign * size for sign in (1.0, -1.0) for size in (_BETWEEN + _FAR if n <= 2 else _FAR)]
            places = {min(max(here + way, low[j]), high[j]) for way in ways}
            if n <= 2 and np.isfinite(high[j] - low[j]):
                places |= set(np.linspace(low[j], high[j], _ACROSS))
            for place in sorted(places - {here}):
                xy = program.start.copy()
                xy[j] = place
                xy = np.clip(xy, low, high)
                for point in solve_lower(program, xy, [xy[n:]]).points[:1]:
                    at = program(program.point(point))
                    if program.violation(at) <= FEASIBLE and loss > at.F:
                        found.append(point)
    return found


_REPORTED = (
    "lower_loss", "polished_gap", "polished_violation", "polished_change", "descent", "beaten", "curvature_least",
    "curvature_greatest", "sampling_error",
)  # fmt: skip


def _obstacles(problem: Problem, x: PyTree, y: PyTree, tol: float | None) -> tuple[str, ...] | None:
    """Why the lower level is not solved anew, in sentences; None: there are not even values."""
    sources = problem.sources
    if any(source.host for source in sources):
        return None
    if problem.stochastic and tol is None:
        return ("Not checked by an independent solve: samples are drawn, and there is no tolerance.",)
    for name, tree in (("x", x), ("y", y)):
        if optax.tree.size(tree) > (MANY if tol is not None else _CURVED):
            size = f"{name} holds {optax.tree.size(tree):,} numbers"
            return (f"Not checked by an independent solve, because of size: {size}.",)
    return ()


def _has_rules(jaxpr: Any) -> bool:
    """Whether a loss has a part whose derivative somebody wrote, so that it may be another than that of its values."""
    return any(equation.primitive.name in _RULES for equation in equations(jaxpr))


_RULES = frozenset(("stop_gradient", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


@_compiling.jit(static_argnames=("curved", "ruled"))
def _examined(
    problem: Problem,
    lengths: tuple[Any, Any],
    x: PyTree,
    y: PyTree,
    away: tuple[PyTree, PyTree],
    curved: bool,
    ruled: bool,
) -> tuple[tuple[PyTree, PyTree], tuple[Scalar, Scalar], tuple[jax.Array, jax.Array], dict[str, Any]]:
    """The point in units of x and y, what `changes` returns, and what is seen without a solve; `ruled`: with what
    the gradients of F, and of f in y, say of some moves."""
    here, changed = changes(problem, x, y, *away)
    u, w = times(1 / lengths[0], x), times(1 / lengths[1], y)
    above, below = normalised(problem, Units(*lengths, 1.0, 1.0, *here))
    outside = [
        rms(optax.tree.sub(z, level.project(z)))
        for level, z in ((above, u), (below, w))
        if level.project is not None and jax.tree.leaves(z)
    ]
    broken = Constraints(above, u, w).at(u, w).violation(u, w), Constraints(below, u, w).at(u, w).violation(u, w)
    found: dict[str, Any] = {
        "finite": functools.reduce(jnp.logical_and, map(jnp.isfinite, (*here, *broken))),
        "outside": functools.reduce(jnp.maximum, outside, jnp.zeros(())),
        "upper_violation": broken[0],
        "violation": broken[1],
    }
    if curved:
        found["curvature"] = lower_curvature(problem, x, y)
    if ruled:
        upper, lower = problem.full_levels()
        ways = jax.tree.map(lambda leaf: leaf[AWAY + 1 :][SHORTER_WAYS], away)
        along = lambda moves, slope: sum(  # noqa: E731
            jnp.tensordot(way, leaf, leaf.ndim) for way, leaf in zip(*map(jax.tree.leaves, (moves, slope)), strict=True)
        )
        found["told"] = along(ways, jax.grad(upper, (0, 1))(x, y)), along(ways[1], jax.grad(lower, 1)(x, y))
    return (u, w), here, changed, found


def _in_units(units: Units) -> dict[str, float]:
    """The losses, their units, and what rounding makes of them in these."""
    found: dict[str, float] = {}
    for name, unit, here in (
        ("upper", units.upper, units.upper_here),
        ("lower", units.lower, units.lower_here),
    ):
        noise = 1e3 * float(jnp.finfo(here.dtype).eps) * abs(float(here)) / float(unit)
        found |= {f"{name}_loss": float(here), f"unit_{name}": float(unit), f"noise_{name}": noise}
    return found


class _Reached(NamedTuple):
    """Lower solves, stacked: where they ended, by how much F and f differ from here, what they break, and what the rows
    that are broken here are worth by their multipliers: a point gains at most multiplier times excess."""

    w: Any
    multipliers: Any
    lower: Any
    upper: Any
    violation: Any
    upper_violation: Any
    owed: Any


class _Search:
    """The solves of one certificate, a few compiled programs for all of them; writes what it finds into `found`.

    Where x moves as far as `FELT` what F falls by counts as a part of `progress`, too (`_progress`, in F's unit).
    """

    def __init__(
        self, problem: Problem, units: Units, at: tuple[PyTree, PyTree], found: dict[str, float], progress: float
    ) -> None:
        self.problem, self.units, self.at, self.found, self.progress = problem, units, at, found, progress
        self.flat_u, self.flat_w = map(_flat, at)  # numpy's: on the host nothing is compiled for what is small
        self._room = 128 if self.flat_u.size + self.flat_w.size <= 1000 else 8
        fine = jnp.finfo(self.flat_w.dtype).eps < 1e-10
        dense = self.flat_w.size <= _DENSE
        self._convex = _bend(found) in (0, 1)
        self.weights = (1e-7, 1e-8) if fine and dense else (1e-5, 1e-6) if fine else (1e-3, 1e-4)
        self.better: tuple[PyTree, PyTree] | None = None
        self.others: list[np.ndarray] = []
        self._base: tuple[_Reached, int]
        self._tilted: tuple[Any, float, float] | None = None  # y, F there and the weight of F

    def _reach(self, us: list[Any], ws: list[Any], weights: list[float]) -> _Reached:
        parts = []
        for first in range(0, len(us), self._room):
            some = slice(first, first + self._room)
            count = len(us[some])
            pad = lambda rows: np.stack([*rows, *[rows[0]] * (self._room - count)])  # noqa: E731
            filled = np.asarray([*weights[some], *[0.0] * (self._room - count)], self.flat_w.dtype)
            out = _reached(
                self.problem, self.units, *self.at, pad(us[some]), pad(ws[some]), filled, count, self._convex
            )
            parts.append(jax.tree.map(lambda leaf: np.asarray(leaf)[:count], out))
        return _Reached(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))

    def minimise(self, starts: int, choose: bool) -> None:
        """Solve the lower level at x from y and around it, and with a little of F added."""
        found, u, w = self.found, self.flat_u, self.flat_w
        random = np.random.default_rng(7)
        ws = [w] + [
            w + (0.3 * 3.3 ** (i % 4) * random.standard_normal(w.shape)).astype(w.dtype) for i in range(starts - 1)
        ]
        weights = [0.0] * starts
        prox = self.problem.prox_lower is not None
        tilt = choose and not prox
        if tilt:
            ws, weights = [*ws, w, w], [*weights, *self.weights]
        reached = self._reach([u] * len(ws), ws, weights)
        solved = _Reached(*(leaf[:starts] for leaf in reached))
        value = np.where(np.isfinite(solved.lower), solved.lower, np.inf)
        found["repaired"] = found["polished_violation"] = float(solved.violation.min())
        usable = solved.violation <= min(solved.violation.min() * 1.01 + 1e-6, 1.0)
        best = int(np.argmin(np.where(usable, value, np.inf)))
        lowest = float(value[best])
        far = np.abs(solved.w[best]).max() > 1e5
        found["bounded"] = float(lowest > -1e5 and not far and bool(np.isfinite(solved.lower).any()))
        gap = -lowest + float(solved.owed[best])
        if prox:
            gap = float(_proximal_gap(self.problem, self.units, *self.at))
        found["gap"], found["polished_gap"] = gap, gap * found["unit_lower"]
        self._base = (solved, best)
        if prox or not choose:
            return
        tie = max(1e-9, found["noise_lower"]) if self.weights[0] < 1e-6 else max(1e-6, found["noise_lower"])
        tied = usable & (value <= lowest + tie) & np.isfinite(solved.upper)
        change = 0.0
        here_first = int(np.argmin(np.where(usable, np.abs(solved.w - w).max(axis=1) + 1e9 * ~tied, np.inf)))
        if tied.any():
            chosen = int(np.argmin(np.where(tied, solved.upper, np.inf)))
            # Where y is not exact, the choice is judged from the minimiser that belongs to it.
            change = float(solved.upper[chosen])
            if change < 0:
                self._keep(self.at[0], solved.w[chosen])
                found["apart"] = float(np.abs(solved.w[chosen] - w).max())
            elif tied[here_first]:
                change = float(solved.upper[here_first]) if tied.sum() == 1 else min(change, 0.0)
        if tilt:
            large, small = reached.upper[starts], reached.upper[starts + 1]
            fair = bool((reached.violation[starts:] < 1e-5).all() and np.isfinite([large, small]).all())
            fair = fair and found["violation"] < 1e-4 and found["gap"] <= 1e-3
            if fair:
                # What F gains by a weight that goes to nothing: nothing, where the minimiser is unique.
                extrapolated = float(small + (small - large) / 9)
                ends = extrapolated if abs(extrapolated) <= 2 * abs(small) else float(small)
                if abs(ends) > abs(change):
                    change = ends
                    if ends < 0:
                        self._keep(self.at[0], reached.w[starts + 1])
        found["gain"], found["polished_change"] = abs(change), change * found["unit_upper"]
        separate = [
            solved.w[j] for j in np.flatnonzero(tied) if np.abs(solved.w[j] - solved.w[best]).max() > 1e-3 and j != best
        ]
        self.others = separate[:1]
        if tilt and np.isfinite(reached.upper[starts]):
            self._tilted, self._tie = (reached.w[starts], float(reached.upper[starts]), self.weights[0]), tie

    def _keep(self, u: PyTree, w: Any) -> None:
        self.better = (times(self.units.x, u), times(self.units.y, _unflat(w, self.at[1])))

    def move(self, everywhere: bool = True) -> None:
        """Move x, solve the lower level there, and see whether F is lower; not `everywhere`: along the slope alone."""
        found, u = self.found, self.flat_u
        random = np.random.default_rng(11)
        few = u.size <= _FEW and everywhere
        blind = _BLIND if u.size <= _MANY_STARTS else 1  # a random direction sees little of many unknowns' slope
        directions = [random.standard_normal(u.shape) for _ in range(blind if everywhere else 0)]
        if few:
            directions += [sign * row for row in np.eye(u.size) for sign in (1.0, -1.0)]
        slope = self._slope(u)
        found["blind"] = float(not few and not np.isfinite(slope).all())
        if not np.isfinite(slope).all():  # at a kink, as a norm has at zero: that of one side says where to try
            slope = self._slope((u + 1e-3 * np.random.default_rng(17).standard_normal(u.shape)).astype(u.dtype))
        length = np.linalg.norm(slope)
        usable = np.isfinite(length) and length > 0
        steepest = -slope / length * u.size**0.5 if usable else np.zeros(u.shape)
        sizes = [(size, "near") for size in _NEAR] + ([(size, "far") for size in _FAR] if few else [])
        along = [(size, kind, u + size * steepest) for size, kind in sizes]
        directions.insert(0, steepest)
        tries = [(size, kind, u + size * d) for d in directions[1:] for size, kind in sizes]
        wide = everywhere and not few and self._room > 8
        if wide:  # of many unknowns some ways, and the one to zero, on which a set is left, or a norm
            tries += [(size, "far", u + size * d) for d in directions[:_BLIND] for size in _WAYS]
            tries += [(1.0, "far", u * (1 - part)) for part in (0.5, 1.0, 2.0)]
        self._tried(along, best_for_upper=True)
        if usable and found["near"] < 0.25 * _NEAR[-1] * length * u.size**0.5:
            # F does not fall as the slope has it: at a kink of f it may be that of no side, and F fall the other way.
            self._tried([(size, "near", u - size * steepest) for size in _NEAR], best_for_upper=True)
        self._tried(tries, best_for_upper=False)
        if few or wide:
            found["far"], found["beaten"] = found.get("far", 0.0), found.get("beaten", 0.0)

    def bend(self) -> None:
        """Move x where x -> F(x, y*(x)) bends down most, at a saddle point the other directions of many see nothing;
        and by Newton's step, since the slope sees little of what is flat beside the rest."""
        u = self.flat_u
        if not 1 < u.size <= _BENDS:
            return
        step = _NEAR[0] * u.size**0.5
        move = lambda d: _projected(self.problem, self.units, self.at[0], [(u + step * d).astype(u.dtype)])[0]  # noqa: E731
        here = self._slope(u)
        pairs = ritz_pairs(lambda d: (self._slope(move(d)) - here) / step, u.size)
        if pairs is None:
            return
        values, vectors = pairs
        if values[0] < 0:
            ways = [sign * u.size**0.5 * vectors[0] for sign in (1.0, -1.0)]
            sizes = [(size, "near") for size in _NEAR] + [(size, "far") for size in _WAYS]
            self._tried([(size, kind, u + size * d) for d in ways for size, kind in sizes], best_for_upper=True)
        known = values > 1e2 * np.finfo(u.dtype).eps * np.abs(values).max()  # the slopes' differences have rounding
        newton = -((vectors[known] @ here) / values[known]) @ vectors[known]
        size = float(np.linalg.norm(newton)) / u.size**0.5
        bent = lambda v: np.sqrt(((vectors @ v) ** 2 * np.abs(values)).sum())  # noqa: E731
        # What is short beside coordinates of other sizes may be long for F.
        least = 1.01 * FELT if bent(newton) > FELT * bent(u) else 0.0
        if np.isfinite(size) and max(size, least) > FELT:
            tries = [(max(part * size, least), "near", u + part * newton) for part in (1.0, 0.3)]
            self._tried(tries, best_for_upper=True)

    def _slope(self, flat: np.ndarray) -> np.ndarray:
        """That of x -> F(x, y*(x)) at x = `flat`."""
        (solved, best), there = self._base, _unflat(flat, self.at[0])
        if self._tilted is None:
            w = self._reach([flat], [solved.w[best]], [0.0]).w[0]
            slope = _implicit(self.problem, self.units, there, _unflat(w, self.at[1]))
        else:
            weight = self._tilted[2]
            reached = self._reach([flat, flat], [solved.w[best], self._tilted[0]], [0.0, weight])
            pairs = [part for i in range(2) for part in (reached.w[i], reached.multipliers[i])]
            slope = _slope(self.problem, self.units, *self.at, there, *pairs, weight)
        return _flat(slope).astype(np.float64)

    def _tried(self, tries: list[tuple[float, str, np.ndarray]], best_for_upper: bool) -> None:
        """F where x is moved to (size, kind, there), the lower level solved anew; `best_for_upper`: and with a little
        of F added, so that of several minimisers the one that is best for F follows x."""
        if not tries:
            return
        found, u, solved, best = self.found, self.flat_u, *self._base
        warm, weights = [solved.w[best], *self.others], [0.0] * (1 + len(self.others))
        here = float(solved.upper[best]) if not self.others else min(float(solved.upper[best]), 0.0)
        tie = 1e-9
        steady = self._tilted is not None and abs(self._tilted[1] - here) <= _STEADY
        if self._tilted is not None and steady and best_for_upper:
            warm, weights = [*warm, self._tilted[0]], [*weights, self._tilted[2]]
            here, tie = min(here, self._tilted[1]), max(tie, self._tie)
        moved = _projected(self.problem, self.units, self.at[0], [t[2].astype(u.dtype) for t in tries])
        us = [target for target in moved for _ in warm]
        reached = self._reach(us, [w for _ in moved for w in warm], [w for _ in moved for w in weights])
        width = len(warm)
        allowed = max(1e-4, 1.01 * found["upper_violation"])
        lowest = {kind: found.get(kind, 0.0) for kind in ("near", "far")}
        drop = {kind: found.get(name, 0.0) for kind, name in (("near", "descent"), ("far", "beaten"))}
        for i, (size, kind, _) in enumerate(tries):
            rows = slice(i * width, (i + 1) * width)
            value = np.where(reached.violation[rows] <= 1e-4, reached.lower[rows], np.inf)
            if not np.isfinite(value).any():
                continue
            tied = value <= value.min() + tie
            upper = np.where(tied, reached.upper[rows], np.inf)
            j = int(np.argmin(upper))
            if not np.isfinite(upper[j]) or reached.upper_violation[rows][j] > allowed or value.min() < -1e5:
                continue
            fall = min(here, 0.0) - float(upper[j])
            relative = fall * (0.1 / size if kind == "near" else 1.0)
            if fall > found["noise_upper"]:
                felt = left_of(fall - found["noise_upper"], self.progress, 1.0)
                found["left"] = max(found.get("left", 0.0), felt)
                relative = max(relative, share(fall, self.progress)) if size > FELT else relative
            if relative > lowest[kind]:
                lowest[kind], drop[kind] = relative, fall * found["unit_upper"]
                if kind == "far" or lowest["far"] == 0.0:
                    self._keep(_unflat(moved[i], self.at[0]), reached.w[rows][j])
        found["near"], found["descent"] = lowest["near"], drop["near"]
        if lowest["far"] > 0.0:
            found["far"], found["beaten"] = lowest["far"], drop["far"]


_DENSE = 100
"""The most lower unknowns for which any smooth lower level is solved by Newton steps with the whole Hessian."""


@_compiling.jit(static_argnames=("convex",))
def _reached(
    problem: Problem, units: Units, u: PyTree, w: PyTree, us: Any, ws: Any, weights: Any, count: Any, convex: bool
) -> _Reached:
    """Lower solves number 0, ..., count - 1 from ws at us, with weights of F beside f.

    Newton steps where f(x, .) is smooth and small, or `convex` where the run ended; else what needs no curvature.
    """
    upper, lower = normalised(problem, units)
    rows, above = Constraints(lower, u, w).at(u, w), Constraints(upper, u, w).at(u, w)
    excess = rows(u, w) if rows.count else jnp.zeros((0,), ws.dtype)
    unravel_u, unravel_w = ravel_pytree(u)[1], ravel_pytree(w)[1]
    smooth = lower.project is None and lower.prox is None and not rows.count and (convex or ws.shape[1] <= _DENSE)

    def one(j: Any, out: _Reached) -> _Reached:
        u, weight = unravel_u(us[j]), weights[j]

        @jax.jit  # what its solver takes of it, many times over, is traced once
        def value(u: PyTree, w: PyTree) -> Scalar:
            # F is not evaluated where it has no weight: the starts may lie outside its domain.
            tilted = lambda w: lower(u, w) + (weight * upper(u, w)).astype(ws.dtype)  # noqa: E731
            return jax.lax.cond(weight > 0, tilted, lambda w: lower(u, w).astype(ws.dtype), w)

        if smooth:
            w = Newton(60, cg_steps=100).minimum(lower.with_loss(value), u, unravel_w(ws[j]))
            multipliers, broken = jnp.zeros((0,), ws.dtype), jnp.zeros((), ws.dtype)
        else:
            tol = jnp.where(weight > 0, jnp.minimum(1e-3 * weight, 1e-9), 1e-9)
            solved = augmented_lagrangian(lower.with_loss(value), rows, u, unravel_w(ws[j]), tol=tol)
            w, multipliers, broken = solved.y, solved.multipliers, solved.violation
        new = _Reached(
            ravel_pytree(w)[0], multipliers, lower(u, w), upper(u, w), broken, above.violation(u, w),
            jnp.vdot(multipliers, excess),
        )  # fmt: skip
        return _Reached(*(old.at[j].set(leaf.astype(old.dtype)) for old, leaf in zip(out, new, strict=True)))

    n = us.shape[0]
    empty = _Reached(
        jnp.zeros_like(ws), jnp.zeros((n, rows.count), ws.dtype), *(jnp.zeros((n,), ws.dtype) for _ in range(5))
    )  # fmt: skip
    return jax.lax.fori_loop(0, count, one, empty)


@_compiling.jit
def _proximal_gap(problem: Problem, units: Units, u: PyTree, w: PyTree) -> Scalar:
    """Half the squared proximal gradient, in place of the gap: a nonsmooth term's value is not known, only its prox."""
    lower = normalised(problem, units)[1]
    moved = lower.prox(u, optax.tree.sub(w, lower.gradient(u, w)), 1.0)  # type: ignore[misc]
    moved = moved if lower.project is None else lower.project(moved)
    return optax.tree.norm(optax.tree.sub(w, moved), squared=True) / 2


@_compiling.jit
def _slope(
    problem: Problem,
    units: Units,
    u: PyTree,
    w: PyTree,
    there: PyTree,
    w0: Any,
    lam0: Any,
    w1: Any,
    lam1: Any,
    weight: Any,
) -> PyTree:
    """The gradient of x -> (min (f + weight F) - min f) / weight by the envelope theorem: that of h, to O(weight).

    It is that at `there`; the rows are scaled as at (u, w), like their multipliers.
    """
    upper, lower = normalised(problem, units)
    rows, u = Constraints(lower, u, w).at(u, w), there
    unravel = ravel_pytree(w)[1]
    w0, w1 = unravel(w0), unravel(w1)

    def lagrangian(u: PyTree, w: PyTree, lam: Any) -> Scalar:
        return lower(u, w) + (jnp.vdot(lam, rows(u, w)) if rows.count else 0.0)

    direct = jax.grad(upper)(u, w1)
    there, here = jax.grad(lagrangian)(u, w1, lam1), jax.grad(lagrangian)(u, w0, lam0)
    return jax.tree.map(lambda d, a, b: d + (a - b) / weight, direct, there, here)


@_compiling.jit
def _implicit(problem: Problem, units: Units, u: PyTree, w: PyTree) -> PyTree:
    """The slope of x -> F(x, y*(x)) by the implicit function theorem, where a nonsmooth term has no values to add F to.

    At a kink it is that of one of the sides, and of rows it knows nothing: it says where to try.
    """
    upper, lower = normalised(problem, units)
    estimate, solved = Implicit(), LowerState(w, None)
    stay: Any = lambda lower, u, start: start  # noqa: E731
    return estimate(upper, lower, stay, u, solved, estimate.init(lower, u, w)).gradient


def _flat(tree: PyTree) -> np.ndarray:
    """All numbers of a tree in one vector of its dtype, in the order of `ravel_pytree`."""
    return flatten(tree).astype(jnp.result_type(np.float32, *jax.tree.leaves(tree)))


def _unflat(flat: Any, like: PyTree) -> PyTree:
    """The tree of which `_flat` made this."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = np.split(np.asarray(flat), ends[:-1]) if leaves else []
    return jax.tree.unflatten(
        treedef,
        [jnp.asarray(part.reshape(leaf.shape).astype(leaf.dtype)) for part, leaf in zip(parts, leaves, strict=True)],
    )


def _projected(problem: Problem, units: Units, like: PyTree, flats: list[np.ndarray]) -> list[np.ndarray]:
    """Points of X nearest to these."""
    if problem.project_upper is None:
        return flats
    return list(np.asarray(_onto(problem, units, like, np.stack(flats))))


@_compiling.jit
def _onto(problem: Problem, units: Units, like: PyTree, flats: jax.Array) -> jax.Array:
    upper, unravel = normalised(problem, units)[0], ravel_pytree(like)[1]
    return jax.lax.map(lambda flat: ravel_pytree(upper.project(unravel(flat)))[0], flats)  # type: ignore[misc]
