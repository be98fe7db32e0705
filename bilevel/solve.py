"""The front door: `solve` checks its arguments, then is the host of the compiled loop until the run has ended."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import numbers
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import _compiling, host
from bilevel._arguments import explained
from bilevel._module import name_of
from bilevel._settings import settings, users_settings
from bilevel.keys import StepKey, as_step_key
from bilevel.loop import CAPACITY, Loop, as_argument, as_solver, at_step
from bilevel.optimizers import check_count
from bilevel.precision import Working, named, undefined_at, working
from bilevel.problem import Problem, ProblemError, as_variable, check_problem
from bilevel.recorder import Event, Keeper, Measures, Recorder, Schedule, check_callback
from bilevel.result import Result
from bilevel.solution import Solution
from bilevel.solvers._base import check_solver, refuse_at_rest, refuse_standing, refuse_unreached, refuse_unread, remark
from bilevel.solvers.certificate import Certificate, certify
from bilevel.solvers.default import default_solver, second_solver
from bilevel.streaming import Streams
from bilevel.typing import HostSolver, Solver, X, Y

__all__ = ["solve"]

logger = logging.getLogger("bilevel")

# Between two saves that the user did not schedule.
_SAVE_SECONDS = 5.0

# Ends of a solver that was chosen here after which another one may do better.
_MENDABLE = (
    Result.MAX_STEPS,
    Result.DIVERGED,
    Result.LOWER_LEVEL,
    Result.SEVERAL_MINIMISERS,
    Result.NOT_STATIONARY,
    Result.LOCAL,
    Result.PENALTY_LIMITED,
    Result.INFEASIBLE,
)

# Those after which the certificate may know a better point to go on from, and how often that is done.
_FALLING, _LEADS = (Result.NOT_STATIONARY, Result.LOCAL, Result.SEVERAL_MINIMISERS, Result.MAX_STEPS), 5

# A run on full batches where minibatches were given: its steps are dear, few are needed, and it ends by itself.
_WHOLE_STEPS, _WHOLE_TOL = 1000, 1e-5

# How often a run goes on after the certificate did not let its end stand.
_TIGHTER = 4


@settings()
@_compiling.sized()
@explained
def solve(
    problem: Problem[X, Y],
    x0: X | None = None,
    y0: Y | None = None,
    solver: Solver | HostSolver | None = None,
    *,
    steps: int = 1000,
    key: int | jax.Array | StepKey = 0,
    tol: float | None = None,
    metrics: Mapping[str, Any] | None = None,
    metrics_every: int | None = None,
    keep_best: str | tuple[str, Any] | None = None,
    patience: int | None = None,
    callback: Callable[[Event[X, Y]], Any] | None = None,
    callback_every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    checkpoint_keep: int = 3,
    state: Any = None,
    progress: bool | None = None,
    chunk: int | None = None,
) -> Solution[X, Y]:
    """Solve a bilevel problem.

    Args:
      problem: the problem.
      x0, y0: where to start: pytrees of floating-point arrays (they are copied, and projected on X and Y where the
        problem has projections). `x0=None`: a simple bilevel problem.
      solver: one of `bilevel.solvers`, or any object with `init` and `step` (on the host: `init` and `search`). None:
        one is chosen from the problem and named, with the reason, in the log (logger "bilevel") and in the solution.
      steps: outer steps, those before a resume included.
      key: a seed or a PRNG key. What step k draws is a function of the key and of k (`data.StepKey`): the same key
        gives the same run, whatever the chunk size.
      tol: stop as soon as the solver's own measure of stationarity (see its docstring) is at most this. None: take
        all steps; but where no solver is given and minibatches are passed over whole instead (the log and the
        solution's reason say so), at most 1,000, and 1e-5.
      metrics: functions of (x, y) by name, or pairs `(function, data)` called as `function(x, y, data)` (data of any
        size then stay out of the compiled program). Evaluated before the first step, every `metrics_every` steps, and
        at the end.
      metrics_every: default: a hundred times in the run.
      keep_best: one of the metrics, by which the best point of the run is kept in `solution.best`: `("valid acc", max)`
        or `("valid loss", min)`; a bare name will do where it holds a word such as accuracy, loss or error. The start
        counts. `solution.x` stays the last point.
      patience: end the run once so many evaluations in a row have not bettered the best.
      callback: called with an `Event` every `callback_every` steps (default: as `metrics_every`); returning something
        true ends the run.
      checkpoint: a directory. The run is saved there every `checkpoint_every` steps (default: twenty times in the run,
        but not twice within five seconds) and at its end, and goes on from the newest good checkpoint that it finds
        there, bit for bit as if it had not been interrupted. One run at a time has a directory. A checkpoint that
        cannot be written (a full disk) is a warning in the log and in the solution's reason, and the run goes on.
      checkpoint_keep: how many of the newest checkpoints stay in the directory.
      state: go on from another run: a `Solution`, whose steps and history are counted on, so that two runs of 500 steps
        (`steps=500`, then `steps=1000, state=solution`) are one of 1000; or `solution.state`, with which the count of
        steps, and the draws of a key, begin anew. The solver is that of the run; x0 and y0 may be left out: the run
        goes on from the state, and a start elsewhere is ignored, which the log says. A checkpoint that is found goes
        before the state, likewise.
      progress: show a progress bar; None: on a terminal (by rich) and in a notebook.
      chunk: the most steps to compile into one call; default: as many as fit a quarter of a second.

    Returns:
      A `Solution`. Ctrl-C returns what there is; a NaN or an infinity ends the run with the last finite iterate.

    Raises:
      ProblemError: the problem, the start or the solver's fit to it is wrong; before anything is compiled.
      CheckpointError: the directory cannot be written, is in use by another run, or holds one of another problem,
        solver or data.
      ImportError: `checkpoint` is given and orbax, which writes it, is not installed.
    """
    began = time.perf_counter()
    check_count("solve", steps=steps, metrics_every=metrics_every, callback_every=callback_every)
    check_count("solve", checkpoint_every=checkpoint_every, checkpoint_keep=checkpoint_keep, chunk=chunk)
    check_count("solve", patience=patience)
    if progress is not None and not isinstance(progress, (bool, np.bool_)):
        raise TypeError(f"solve(progress={progress!r}): True, False or None is expected.")
    before = state if isinstance(state, Solution) else None
    if before is not None:
        state, solver = before.state, before.solver if solver is None else solver
    x0, y0, solver = _from_state(problem, state, before, x0, y0, solver)
    asked_for = solver
    found, solver, reason = _checked(problem, x0, y0, solver, tol)
    given, problem, x, y = problem, found.problem, found.x, found.y
    quiet = tol
    whole = asked_for is None and given.stochastic and not problem.stochastic
    if whole:  # full batches in place of minibatches
        steps, quiet = min(steps, _WHOLE_STEPS), _WHOLE_TOL if tol is None else tol
    steps = host.most_steps(solver, steps)
    base, measures, streams = as_step_key(key), Measures(metrics or {}), Streams(problem)
    with users_settings():
        measures.check(*found.given(x, y))
    check_callback(callback)
    keeper = None if keep_best is None else Keeper(keep_best, patience, measures.names)
    if patience is not None and keeper is None:
        raise ValueError(f'solve(patience={patience}): say of what, with keep_best=("valid loss", min).')
    metrics_every = metrics_every or math.ceil(steps / 100)
    schedule = Schedule(
        steps,
        metrics=metrics_every if measures else None,
        callback=None if callback is None else callback_every or metrics_every,
        checkpoint=None if checkpoint is None else checkpoint_every or math.ceil(steps / 20),
        rest=0.0 if checkpoint_every else _SAVE_SECONDS,
    )
    saver = None
    if checkpoint is not None:
        from bilevel.checkpoint import Checkpoints, fingerprint

        saver = Checkpoints(checkpoint, fingerprint(problem, solver, x, y, base), checkpoint_keep)

    first = _first_state(streams.peeked(), solver, x, y, base)
    if state is not None:
        first = _fitting(state, first, solver)
        _say_ignored(state if before is None else before, x0, y0)
    if before is not None and before.steps > steps:
        raise ValueError(
            f"solve(steps={steps}, state=solution): the solution is already at step {before.steps}; steps counts those "
            "before. Ask for more."
        )
    run = Recorder(schedule, measures, callback, saver, first, keeper, before, found.given)
    with contextlib.nullcontext() if saver is None else saver.held():
        resumed = run.resume()
        if resumed and state is not None:
            logger.warning("state is ignored: the run goes on from the checkpoint in %s", checkpoint)
        if resumed and quiet is not None:
            newest = run.history.last().items()
            last = {name: jnp.asarray(value) for name, value in newest if run.history.last_step(name) == run.done - 1}
            run.result = Result(int(solver.status(run.state, last, quiet)))  # type: ignore[attr-defined]
        pace = _Pace(chunk)
        with named(solver, problem, x, y):
            certificate = _settle(run, streams, solver, base, (x, y), tol, quiet, pace, progress, found)
    if run.result is Result.DIVERGED and not run.done and (undefined := undefined_at(problem, x, y)):
        run.why = undefined
    if run.why:
        logger.warning("%s", run.why)
    reason = " ".join(part for part in (reason, run.why, run.unsaved) if part)
    seconds = time.perf_counter() - began
    x_end, y_end = run.point
    solution = Solution(
        x=x_end,
        y=y_end,
        result=run.result,
        history=run.history,
        state=run.state,
        steps=run.done,
        seconds=seconds,
        solver=solver,
        reason=reason,
        certificate=certificate,
        multipliers=_multipliers(solver, streams, run.state),
        best=None if run.best is None or run.best.step < 0 else run.best,
    )
    chosen = asked_for is None and tol is not None and checkpoint is None and callback is None
    if not chosen or run.result not in _MENDABLE:
        return solution
    options: dict[str, Any] = dict(key=key, tol=tol, metrics=metrics, metrics_every=metrics_every, steps=steps)
    options |= dict(keep_best=keep_best, patience=patience, progress=progress, chunk=chunk)
    whole_problem = given.whole() if whole else given

    def again(problem: Any, x: Any, y: Any, solver: Any, why: str) -> Solution[X, Y]:
        logger.info("%s", f"Went on with {why}.")
        if found.lifted:  # the user's dtypes, which metrics are given
            x, y = (jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), *pair) for pair in ((x, x0), (y, y0)))
            problem = whole_problem
        second = solve(problem, x, y, solver, **options)
        said = f"{reason} Went on with {why}. {second.reason}".strip()
        return dataclasses.replace(second, reason=said, seconds=time.perf_counter() - began)

    if (other := second_solver(problem, x, y, solver)) is not None:
        again_with, why, problem = other
        # What was seen to lie lower is where to begin: from the start the other solver may end at the same point.
        begin = certificate.better if solution.result is Result.LOCAL and certificate.better is not None else (x, y)
        second = again(problem, *begin, again_with, why)
        if second.result is not Result.CONVERGED:
            return solution
        return _held_against(second, solution) if begin[0] is not x else second
    # The same solver, from where the certificate found a lower F; one that can be sent there has been.
    for _ in range(0 if hasattr(solver, "towards") else _LEADS):
        if certificate.better is None or solution.result not in _FALLING:
            break
        second = again(problem, *certificate.better, solver, f"{name_of(solver)} from a point with a lower F")
        solution, certificate = second, second.certificate or certificate
    return solution


def _held_against(second: Solution[X, Y], first: Solution[X, Y]) -> Solution[X, Y]:
    """The second run, which began at a point that the first one's certificate found; LOCAL where it left that again."""
    ended, before = (run.history.last().get("upper_loss", np.nan) for run in (second, first))
    known = first.certificate.measures.get("beaten", 0.0) if first.certificate else 0.0
    if not float(ended) > float(before) - 0.9 * known:
        return second
    by = float(ended) - (float(before) - known)
    why = f"Another x, further away, has an upper loss smaller by {by:.2g}: this is a local solution."
    logger.warning("%s", why)
    return dataclasses.replace(second, result=Result.LOCAL, reason=f"{second.reason} {why}".strip())


_ALIKE = "The end was not looked at: parties of unequal sizes count alike, and are many, or their data are wrapped."


def _settle(
    run: Recorder,
    streams: Streams,
    solver: Solver | HostSolver,
    base: StepKey,
    start: tuple[Any, Any],
    tol: float | None,
    quiet: float | None,
    pace: _Pace,
    progress: bool | None,
    given: Working,
) -> Certificate:
    """Drive the run to an end that the certificate lets stand, or to its last step.

    The tolerance is a solver's own measure, in units that the problem need not share: where the certificate says that
    x, or y, is not there yet, the run goes on with a smaller one, and from a lower point that the certificate found if
    the solver can go there. `quiet` is where a run without a tolerance (`tol` is None) ends, all the same.
    """
    asked, met = quiet, False
    for trial in range(_TIGHTER + 1):
        if isinstance(solver, HostSolver):
            host.drive(run, streams.rest, solver, base, asked, progress)
        else:
            _drive(
                run, Loop(streams.rest, solver, start, base, asked, pace.most, given.convolves), streams, pace, progress
            )
        if tol is None and (run.result is Result.MAX_STEPS or (quiet and run.result is Result.CONVERGED)):
            run.result = Result.COMPLETED
        met = met or run.result is Result.CONVERGED
        ended = Result.CONVERGED if met and run.result is Result.MAX_STEPS else run.result
        numbers = {name: float(value) for name, value in run.history.last().items() if np.ndim(value) == 0}
        x, y = (_pooled(tree, like) for tree, like in zip((run.state.x, run.state.y), start, strict=True))
        try:
            left = run.result is Result.CONVERGED and run.done < run.schedule.steps and trial < _TIGHTER
            looked = streams.peeked() if tol is None else streams.sampled()
            looked = solver.solved_problem(looked) if hasattr(solver, "solved_problem") else looked
            if looked is None:
                found = Certificate(ended, unchecked=(_ALIKE,))
            else:
                found = certify(looked, x, y, start, ended, numbers, tol, left, max(run.done - 1, 0))
        except KeyboardInterrupt:  # the run is there, and what was not looked at is said
            run.interrupted()
            found = Certificate(run.result, unchecked=("The end was not looked at: Ctrl-C.",))
        towards = getattr(solver, "towards", None)
        onward = found.better is not None and towards is not None and found.result in _MENDABLE
        if tol is None or asked is None or not left or not (found.unsettled or onward):
            break
        asked, run.result = asked / 30, Result.MAX_STEPS
        if towards is not None and found.better is not None:
            run.state = towards(run.state, *found.better)
    run.note({name: value for name, value in found.measures.items() if name.startswith("polished")})
    settled = (Result.CONVERGED, Result.INTERRUPTED, Result.STOPPED)
    along = "" if found.result in settled else remark(numbers, given.rounding)
    run.result, run.why = found.result, " ".join(part for part in (run.why, found.why, along) if part)
    return found


def _pooled(tree: Any, like: Any) -> Any:
    """A variable as the problem's losses take it: the mean over agents where each has its own."""
    if jax.tree.structure(tree) != jax.tree.structure(like):  # type: ignore[operator]
        return tree
    mean = lambda leaf, one: jnp.mean(leaf, axis=0) if jnp.ndim(leaf) == jnp.ndim(one) + 1 else leaf  # noqa: E731
    return jax.tree.map(mean, tree, like)


def _multipliers(solver: Any, streams: Streams, state: Any) -> dict[str, Any]:
    """Those that the solver knows, in the user's units."""
    known = getattr(state, "multipliers", None)
    if isinstance(known, dict):
        return known
    problem = streams.peeked()
    if not hasattr(solver, "multipliers"):
        return {}
    if _starts_in_one_program(solver, problem, state.x, state.y):
        if problem.constraint is None and problem.equality is None:
            return {}
        return _their_multipliers(problem, as_argument(solver), state)
    return solver.multipliers(problem, state)


@_compiling.jit
def _their_multipliers(problem: Problem, solver: Any, state: Any) -> dict[str, Any]:
    """What the solver makes of its state."""
    return as_solver(solver).multipliers(problem, state)


def _checked(problem: Problem[X, Y], x0: X, y0: Y, solver: Any, tol: float | None) -> tuple[Working, Solver, str]:
    """The problem on the device and the start in the run's dtype, the solver, and why that one if it was not given."""
    if tol is not None and (isinstance(tol, bool) or not isinstance(tol, (numbers.Real, jax.Array))):
        raise TypeError(f"solve(tol={tol!r}): the tolerance is a positive number, or None to take all steps.")
    if tol is not None and not tol > 0:
        raise ValueError(f"solve(tol={tol!r}): the tolerance is positive, or None to take all steps.")
    check_problem("solve", problem, "Problem(upper=F, lower=f, ...)")
    x, y = as_variable("x0", x0), as_variable("y0", y0)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((x, y, problem, solver))):
        raise ProblemError(
            "solve is the host of a compiled run (it looks at values, writes down history) and cannot itself stand "
            "under jit, vmap or grad. Call it outside; under a transformation take bilevel.run(problem, solver, x0, "
            "y0, steps), the same loop as a pure function, or hypergradients.value_and_hypergradient for one step."
        )
    with users_settings():
        problem = jax.tree.map(jnp.asarray, problem.validated(x, y))
        found = working(problem, x, y)
    _compiling.computes(found.bytes)
    if solver is not None:
        refuse_standing(solver, found.y, certified=tol is not None)
    problem, (x, y) = found.problem, found.problem.projected(found.x, found.y)
    reason = ""
    if solver is None:
        with named(None, problem, x, y):
            solver, reason, problem = default_solver(problem, x, y)
        logger.info("%s", reason)
    check_solver("solve", solver)
    refuse_unreached(solver, problem, x, y)
    refuse_unread(solver, problem, x, y)
    refuse_at_rest(solver, problem, x, y)
    if tol is not None and not hasattr(solver, "status"):
        raise ValueError(
            f"solve(tol=...) asks the solver for its status, and {type(solver).__name__} has no method status(state, "
            "metrics, tol)."
        )
    return found._replace(problem=problem, x=x, y=y), solver, reason


def _from_state(
    problem: Any, state: Any, before: Solution | None, x0: Any, y0: Any, solver: Any
) -> tuple[Any, Any, Any]:
    """Where a run begins that goes on from a state: there, unless a start is given for its shapes."""
    if state is None:
        if y0 is None:
            raise ProblemError(
                "solve needs a start: solve(problem, x0, y0), or another run's state to go on from: "
                "solve(problem, state=solution)."
            )
        return x0, y0, solver
    if not (hasattr(state, "x") and hasattr(state, "y")):
        raise TypeError(
            f"solve(state=...) takes a Solution or its state, not a {type(state).__name__}: "
            "solve(problem, state=solution)."
        )
    if solver is None:
        raise ProblemError(
            "solve(state=solution.state) needs the solver that the state belongs to: give it, or go on with "
            "state=solution, which knows its own."
        )
    if y0 is not None:
        return x0, y0, solver
    if before is None and getattr(problem, "frozen", None) is not None:
        raise ProblemError(
            "solve(state=solution.state) of a problem with frozen parts holds the other parts of y alone: go on with "
            "state=solution, or give x0 and y0 besides, whose frozen parts are the constants."
        )
    return (state.x, state.y, solver) if before is None else (before.x, before.y, solver)


def _fitting(state: Any, first: Any, solver: Any) -> Any:
    """The state that was given; an error where it is not of the form of this run's."""
    form = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path): (jnp.shape(leaf), jnp.result_type(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    then, now = form(state), form(first)
    if type(state) is type(first) and then == now:
        return state
    names = [name for name in dict.fromkeys((*now, *then)) if then.get(name) != now.get(name)]
    what = f": state{names[0]} is {then.get(names[0], 'absent')}, wanted {now.get(names[0], 'absent')}" if names else ""
    raise ProblemError(
        f"solve(state=...) is a {type(state).__name__} that does not fit {name_of(solver)} on this problem{what}. "
        "Give the solver and the problem of the run that it comes from, or start anew from x0=state.x, y0=state.y."
    )


def _say_ignored(state: Any, x0: Any, y0: Any) -> None:
    """A warning where a start was given that is not where the state stands, up to the rounding of either's dtype.

    Not where it is shaped otherwise (one x for many agents, all of y for its free parts): its values say nothing then.
    """
    for name, given, held in (("x0", x0, state.x), ("y0", y0, state.y)):
        pairs = [(a, b) for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(held), strict=False)]
        here = all(getattr(leaf, "is_fully_addressable", True) for pair in pairs for leaf in pair)
        if here and any(np.shape(a) == np.shape(b) and not _same(np.asarray(a), np.asarray(b)) for a, b in pairs):
            logger.warning("%s is not where the state stands; it is ignored, the run goes on from the state", name)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a.astype(b.dtype), b) or np.array_equal(a, b.astype(a.dtype)))


# Their `init` places data on devices, and looks at values (a step against the network's eigenvalues).
_EAGER = ("bilevel.solvers.decentralized", "bilevel.solvers.federated")


def _starts_in_one_program(solver: Any, problem: Problem, x: Any, y: Any) -> bool:
    """Whether `init` is compiled as a whole: not where it needs values or several devices, nor a user's own."""
    home = type(solver).__module__
    if isinstance(solver, HostSolver) or not home.startswith("bilevel.solvers.") or home.startswith(_EAGER):
        return False
    leaves = [leaf for leaf in jax.tree.leaves((problem, x, y)) if isinstance(leaf, jax.Array)]
    return all(len(leaf.devices()) == 1 for leaf in leaves)


@_compiling.jit
def _init(problem: Problem, solver: Any, x: Any, y: Any, base: StepKey) -> Any:
    """The first state."""
    return as_solver(solver).init(problem, x, y, at_step(base, 0))


def _first_state(problem: Problem, solver: Solver, x: Any, y: Any, base: StepKey) -> Any:
    with named(solver, problem, x, y):
        if _starts_in_one_program(solver, problem, x, y):
            state = _init(problem, as_argument(solver, x, y), x, y, base)
        else:
            state = solver.init(problem, x, y, at_step(base, 0))
    for name in ("x", "y"):
        if not hasattr(state, name):
            raise TypeError(
                f"{type(solver).__name__}.init returned a {type(state).__name__} without the attribute {name}: a state "
                "has x and y."
            )
    return state


def _drive(run: Recorder, loop: Loop, streams: Streams, pace: _Pace, progress: bool | None) -> None:
    """Chunk after chunk, until the run has ended or Ctrl-C."""
    with run.showing(progress), _Interrupts() as interrupts:
        try:
            streams.begin(run.done)
            while not run.ended:
                interrupts.raise_if_asked()
                steps = min(run.schedule.next_stop(run.done) - run.done, pace.length)
                portions, steps = streams.ready(steps)
                clock = time.perf_counter()
                chunk = loop(run.state, run.done, run.done + steps, portions)
                pace.adapt(len(chunk.steps), time.perf_counter() - clock)
                streams.consume(len(chunk.steps))
                run.record(chunk)
            interrupts.raise_if_asked()  # during the last one
        except KeyboardInterrupt:
            run.interrupted()
        finally:
            streams.close()


class _Pace:
    """How many steps to ask of one call of the compiled loop (`length` now, `most` ever); no result depends on it.

    They are `chunk`, or where that is None powers of two that approach a quarter of a second.
    """

    def __init__(self, chunk: int | None) -> None:
        self._fixed = chunk is not None
        self.most = min(chunk or CAPACITY, CAPACITY)
        self.length = self.most if self._fixed else 1

    def adapt(self, taken: int, seconds: float) -> None:
        """So long did the last call take."""
        if self._fixed:
            return
        if jax.process_count() > 1:  # process 0's measurement, so that all processes run the same chunks
            from jax.experimental import multihost_utils

            seconds = float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))
        if seconds < 0.06:
            self.length = min(self.length * 4, self.most)
        elif seconds < 0.125:
            self.length = min(self.length * 2, self.most)
        elif seconds > 0.5 and taken > 1:
            self.length = max(self.length // 2, 1)


class _Interrupts:
    """Ctrl-C is taken between chunks, where state and history agree; a second one at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupts:
        self._before = None
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def raise_if_asked(self) -> None:
        """KeyboardInterrupt, if there was one."""
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
