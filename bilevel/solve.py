"""The front door: `solve` checks its arguments, then is the host of the compiled loop until the run has ended."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import host
from bilevel.keys import StepKey, as_step_key
from bilevel.loop import CAPACITY, Loop, at_step
from bilevel.optimizers import check_count
from bilevel.problem import Problem, as_variable
from bilevel.recorder import Event, Measures, Recorder, Schedule
from bilevel.result import Result
from bilevel.solution import Solution
from bilevel.solvers._base import linear_remark, refuse_unreached
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

# How often a run goes on after the certificate did not let its end stand.
_TIGHTER = 4


def solve(
    problem: Problem[X, Y],
    x0: X,
    y0: Y,
    solver: Solver | HostSolver | None = None,
    *,
    steps: int = 1000,
    key: int | jax.Array | StepKey = 0,
    tol: float | None = None,
    metrics: Mapping[str, Any] | None = None,
    metrics_every: int | None = None,
    callback: Callable[[Event[X, Y]], Any] | None = None,
    callback_every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    checkpoint_keep: int = 3,
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
      tol: stop as soon as the solver's own measure of stationarity (see its docstring) is at most this.
      metrics: functions of (x, y) by name, or pairs `(function, data)` called as `function(x, y, data)` (data of any
        size then stay out of the compiled program). Evaluated before the first step, every `metrics_every` steps, and
        at the end.
      metrics_every: default: a hundred times in the run.
      callback: called with an `Event` every `callback_every` steps (default: as `metrics_every`); returning something
        true ends the run.
      checkpoint: a directory. The run is saved there every `checkpoint_every` steps (default: twenty times in the run,
        but not twice within five seconds) and at its end, and goes on from the newest good checkpoint that it finds
        there, bit for bit as if it had not been interrupted.
      checkpoint_keep: how many of the newest checkpoints stay in the directory.
      progress: show a progress bar (rich); None: on a terminal only.
      chunk: the most steps to compile into one call; default: as many as fit a quarter of a second.

    Returns:
      A `Solution`. Ctrl-C returns what there is; a NaN or an infinity ends the run with the last finite iterate.

    Raises:
      ProblemError: the problem, the start or the solver's fit to it is wrong; before anything is compiled.
      CheckpointError: the directory cannot be written, or holds a run of another problem, solver or data.
      ImportError: `checkpoint` is given and orbax, which writes it, is not installed.
    """
    began = time.perf_counter()
    check_count("solve", steps=steps, metrics_every=metrics_every, callback_every=callback_every)
    check_count("solve", checkpoint_every=checkpoint_every, checkpoint_keep=checkpoint_keep, chunk=chunk)
    asked_for = solver
    problem, x, y, solver, reason = _checked(problem, x0, y0, solver, tol)
    steps = host.most_steps(solver, steps)
    base, measures, streams = as_step_key(key), Measures(metrics or {}), Streams(problem)
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

    run = Recorder(schedule, measures, callback, saver, _first_state(streams.peeked(), solver, x, y, base))
    if run.resume() and tol is not None:
        newest = run.history.last().items()
        last = {name: jnp.asarray(value) for name, value in newest if run.history.last_step(name) == run.done - 1}
        run.result = Result(int(solver.status(run.state, last, tol)))  # type: ignore[attr-defined]
    pace = _Pace(chunk)
    certificate = _settle(run, streams, solver, base, (x, y), tol, pace, progress)
    if run.why:
        logger.warning("%s", run.why)
    reason = " ".join(part for part in (reason, run.why) if part)
    seconds = time.perf_counter() - began
    solution = Solution(
        x=run.state.x,
        y=run.state.y,
        result=run.result,
        history=run.history,
        state=run.state,
        steps=run.done,
        seconds=seconds,
        solver=solver,
        reason=reason,
        certificate=certificate,
        multipliers=_multipliers(solver, streams, run.state),
    )
    chosen = asked_for is None and tol is not None and checkpoint is None and callback is None
    if chosen and run.result in _MENDABLE and (other := second_solver(problem, x, y, solver)) is not None:
        again, why = other
        logger.info("%s", f"Went on with {why}.")
        options: dict[str, Any] = dict(key=key, tol=tol, metrics=metrics, metrics_every=metrics_every)
        second = solve(problem, x, y, again, steps=steps, progress=progress, chunk=chunk, **options)
        if second.result is Result.CONVERGED:
            reason = f"{reason} Went on with {why}. {second.reason}".strip()
            return dataclasses.replace(second, reason=reason, seconds=time.perf_counter() - began)
    return solution


def _settle(
    run: Recorder,
    streams: Streams,
    solver: Solver | HostSolver,
    base: StepKey,
    start: tuple[Any, Any],
    tol: float | None,
    pace: _Pace,
    progress: bool | None,
) -> Certificate:
    """Drive the run to an end that the certificate lets stand, or to its last step.

    The tolerance is a solver's own measure, in units that the problem need not share: where the certificate says that
    x, or y, is not there yet, the run goes on with a smaller one.
    """
    asked, met = tol, False
    for trial in range(_TIGHTER + 1):
        if isinstance(solver, HostSolver):
            host.drive(run, streams.rest, solver, base, asked, progress)
        else:
            _drive(run, Loop(streams.rest, solver, base, asked, pace.most), streams, pace, progress)
        if tol is None and run.result is Result.MAX_STEPS:
            run.result = Result.COMPLETED
        met = met or run.result is Result.CONVERGED
        ended = Result.CONVERGED if met and run.result is Result.MAX_STEPS else run.result
        numbers = {name: float(value) for name, value in run.history.last().items() if np.ndim(value) == 0}
        x, y = (_pooled(tree, like) for tree, like in zip((run.state.x, run.state.y), start, strict=True))
        found = certify(streams.peeked(), x, y, start, ended, numbers, tol)
        again = run.result is Result.CONVERGED and found.unsettled and run.done < run.schedule.steps
        if asked is None or not again or trial == _TIGHTER:
            break
        asked, run.result = asked / 30, Result.MAX_STEPS
    run.note({name: value for name, value in found.measures.items() if name.startswith("polished")})
    settled = (Result.CONVERGED, Result.INTERRUPTED, Result.STOPPED)
    along = "" if found.result in settled else linear_remark(numbers)
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
    return solver.multipliers(streams.peeked(), state) if hasattr(solver, "multipliers") else {}


def _checked(problem: Problem[X, Y], x0: X, y0: Y, solver: Any, tol: float | None) -> tuple[Problem, X, Y, Solver, str]:
    """The problem on the device, the start as arrays of its own, the solver, and why that one if it was not given."""
    if tol is not None and not tol > 0:
        raise ValueError(f"solve(tol={tol!r}): the tolerance is positive, or None to take all steps.")
    if not isinstance(problem, Problem):
        raise TypeError(f"solve takes a Problem first, not {type(problem).__name__}: Problem(upper=F, lower=f, ...).")
    x, y = as_variable("x0", x0), as_variable("y0", y0)
    problem.validate(x, y)
    problem = jax.tree.map(jnp.asarray, problem)
    x, y = problem.projected(x, y)
    reason = ""
    if solver is None:
        solver, reason = default_solver(problem, x, y)
        logger.info("%s", reason)
    if not (hasattr(solver, "init") and hasattr(solver, "step")) and not isinstance(solver, HostSolver):
        raise TypeError(
            f"solve's solver is {solver!r}; it needs methods init(problem, x, y, key) and step(problem, state, key), "
            "such as solvers.AID(), or init, search and status, such as solvers.MPCC()."
        )
    refuse_unreached(solver, problem, x, y)
    if tol is not None and not hasattr(solver, "status"):
        raise ValueError(
            f"solve(tol=...) asks the solver for its status, and {type(solver).__name__} has no method status(state, "
            "metrics, tol)."
        )
    return problem, x, y, solver, reason


def _first_state(problem: Problem, solver: Solver, x: Any, y: Any, base: StepKey) -> Any:
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
