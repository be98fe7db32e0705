"""The loop: `run` as a pure function, and `solve`, the host around it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import StepKey, Streamed, as_source, as_step_key
from bilevel.problem import Problem, ProblemError, as_variable
from bilevel.solution import History, Result, Solution
from bilevel.solvers.default import default_solver
from bilevel.streaming import Prefetched

PyTree = Any

__all__ = ["Event", "run", "solve"]

logger = logging.getLogger("bilevel")

# Steps that one call of the compiled loop can record; the loop's bounds are dynamic, so any number up to it is one program.
_CAPACITY = 16384

# Between two saves that the user did not schedule.
_SAVE_SECONDS = 5.0


def run(
    problem: Problem, solver: Any, x0: PyTree, y0: PyTree, steps: int, key: Any = 0
) -> tuple[Any, dict[str, jax.Array]]:
    """`steps` outer iterations as a pure function, to be put under `jit`, `vmap` or `grad`.

    The iterates are those of `solve` with the same key, up to rounding (it is another compiled program). Nothing is
    checked: `problem.validate(x0, y0)` does that.

    Args:
      problem: the problem; `vmap` over its data for many problems.
      solver: the solver; `vmap` over its float hyperparameters for a sweep.
      x0, y0: the start; `vmap` over them for a multi-start.
      steps: static.
      key: a seed or a PRNG key; `vmap` over keys for repetitions.

    Returns:
      `(state, metrics)`: the final state (`state.x`, `state.y`) and each metric stacked along a leading axis of `steps`.
    """
    if any(source.host for source in problem.sources):
        raise ProblemError("run is pure and cannot read a Stream from the host: use solve, or arrays.")
    base = as_step_key(key)
    state = solver.init(problem, x0, y0, _step_key(base, 0))

    def body(state: Any, k: jax.Array) -> Any:
        return solver.step(problem, state, _step_key(base, k))

    return jax.lax.scan(body, state, jnp.arange(steps, dtype=jnp.uint32))


def _step_key(base: StepKey, k: Any) -> StepKey:
    return StepKey(base.base, jnp.asarray(k, jnp.uint32), base.stream)


@dataclasses.dataclass(frozen=True)
class Event:
    """What a callback sees.

    Attributes:
      step: outer steps taken.
      x, y: the variables now.
      state: the solver's state now.
      history: the history so far.
    """

    step: int
    x: PyTree
    y: PyTree
    state: Any
    history: History


class _Static:
    """A solver that is no pytree (a user's plain class), as a static part of the compiled loop."""

    def __init__(self, solver: Any) -> None:
        self.solver = solver


jax.tree_util.register_pytree_node(_Static, lambda s: ((), s.solver), lambda solver, _: _Static(solver))


def _as_argument(solver: Any) -> Any:
    leaves = jax.tree.leaves(solver)
    travels = len(leaves) != 1 or leaves[0] is not solver
    if travels and all(isinstance(leaf, (float, int, np.ndarray, np.number, jax.Array)) for leaf in leaves):
        return solver
    return _Static(solver)


def _unwrapped(solver: Any) -> Any:
    return solver.solver if isinstance(solver, _Static) else solver


@functools.partial(jax.jit, static_argnames=("capacity", "use_tol", "careful"))
def _advance(
    problem: Problem,
    solver: Any,
    state: Any,
    base: StepKey,
    start: Any,
    stop: Any,
    tol: Any,
    streamed: Any,
    capacity: int,
    use_tol: bool,
    careful: bool = False,
) -> Any:
    """Steps start, ..., stop - 1 in one compiled loop with dynamic bounds, ended early by a status or a non-finite metric.

    The iterates themselves are looked at after the last step, or with `careful` after each: a NaN in them shows in the
    metrics one step later, and a small step has few operations besides.

    Returns the state, the steps taken, the status, and the metrics in buffers of `capacity` rows.
    """
    solver = _unwrapped(solver)

    def step(k: Any, state: Any) -> Any:
        now = problem
        for name, (items, first, draws) in streamed.items():
            row = (first + k - start) * draws.value
            mine = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, draws.value), items)
            now = dataclasses.replace(now, **{name: Streamed(mine, draws.value)})  # type: ignore[arg-type]
        return solver.step(now, state, _step_key(base, k))

    shapes = jax.eval_shape(step, start, state)[1]
    scalars: dict[Any, list[str]] = {}  # by dtype: those of one dtype share a buffer, so that a step writes once
    for name, shape in shapes.items():
        if shape.shape == ():
            scalars.setdefault(shape.dtype, []).append(name)
    together = {name for names in scalars.values() for name in names}

    def packed(metrics: dict[str, jax.Array]) -> Any:
        rows = [jnp.stack([metrics[name] for name in names]) for names in scalars.values()]
        return rows, {name: value for name, value in metrics.items() if name not in together}

    def unpacked(buffers: Any) -> dict[str, jax.Array]:
        rows, others = buffers
        columns = {n: row[:, i] for names, row in zip(scalars.values(), rows, strict=True) for i, n in enumerate(names)}
        return columns | others

    buffers = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), jax.eval_shape(packed, shapes))

    def cond(carry: Any) -> Any:
        k, _, _, status = carry
        return (k < stop) & (status == 0)

    def body(carry: Any) -> Any:
        k, state, buffers, _ = carry
        state, metrics = step(k, state)
        rows = packed(metrics)
        buffers = jax.tree.map(lambda b, m: b.at[k - start].set(m), buffers, rows)
        status = jnp.zeros((), jnp.int32)
        if use_tol:
            status = jnp.asarray(solver.status(state, metrics, tol), jnp.int32)
        finite = _finite((state.x, state.y, rows) if careful else rows)
        return k + 1, state, buffers, jnp.where(finite, status, Result.DIVERGED.value)

    k, state, buffers, status = jax.lax.while_loop(cond, body, (start, state, buffers, jnp.zeros((), jnp.int32)))
    status = jnp.where(_finite((state.x, state.y)), status, Result.DIVERGED.value)
    return state, k - start, status, unpacked(buffers)


def _finite(tree: PyTree) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in leaves], jnp.asarray(True))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Draws:
    value: int


@functools.partial(jax.jit, static_argnames="functions")
def _measure(
    functions: tuple[tuple[str, Callable[..., Any]], ...], x: PyTree, y: PyTree, data: dict[str, Any]
) -> dict[str, jax.Array]:
    return {name: fn(x, y, data[name]) if name in data else fn(x, y) for name, fn in functions}


def solve(
    problem: Problem,
    x0: PyTree,
    y0: PyTree,
    solver: Any = None,
    *,
    steps: int = 1000,
    key: Any = 0,
    tol: float | None = None,
    metrics: Mapping[str, Any] | None = None,
    metrics_every: int | None = None,
    callback: Callable[[Event], Any] | None = None,
    callback_every: int | None = None,
    checkpoint: Any = None,
    checkpoint_every: int | None = None,
    checkpoint_keep: int = 3,
    progress: bool | None = None,
    chunk: int | None = None,
) -> Solution:
    """Solve a bilevel problem.

    Args:
      problem: the problem.
      x0, y0: where to start: pytrees of floating-point arrays (they are copied). `x0=None`: a simple bilevel problem.
      solver: one of `bilevel.solvers`, or any object with `init` and `step`. None: one is chosen from the problem and named, with
        the reason, in the log (logger "bilevel") and in the solution.
      steps: outer steps, those before a resume included.
      key: a seed or a PRNG key. What step k draws is a function of the key and of k (`data.StepKey`): the same key gives
        the same run, whatever the chunk size.
      tol: stop as soon as the solver's own measure of stationarity (see its docstring) is at most this.
      metrics: functions of (x, y) by name, or pairs `(function, data)` called as `function(x, y, data)` (data of any size
        then stay out of the compiled program). Evaluated before the first step, every `metrics_every` steps, and at the end.
      metrics_every: default: a hundred times in the run.
      callback: called with an `Event` every `callback_every` steps (default: as `metrics_every`); returning something true ends the run.
      checkpoint: a directory. The run is saved there every `checkpoint_every` steps (default: twenty times in the run, but not
        twice within five seconds) and at its end, and goes on from the newest good checkpoint that it finds there, bit for
        bit as if it had not been interrupted.
      checkpoint_keep: how many of the newest checkpoints stay in the directory.
      progress: show a progress bar; None: on a terminal only.
      chunk: the most steps to compile into one call; default: as many as fit a quarter of a second.

    Returns:
      A `Solution`. Ctrl-C returns what there is; a NaN or an infinity ends the run with the last finite iterate.

    Raises:
      ProblemError: the problem, the start or the solver's fit to it is wrong; before anything is compiled.
      CheckpointError: the directory cannot be written, or holds a run of another problem, solver or data.
    """
    began = time.perf_counter()
    for name, count in (
        ("steps", steps),
        ("metrics_every", metrics_every),
        ("callback_every", callback_every),
        ("checkpoint_every", checkpoint_every),
        ("checkpoint_keep", checkpoint_keep),
        ("chunk", chunk),
    ):
        if count is not None and (isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1):
            raise ValueError(f"solve({name}={count!r}): a positive integer is needed.")
    if tol is not None and not tol > 0:
        raise ValueError(f"solve(tol={tol!r}): the tolerance is positive, or None to take all steps.")
    if not isinstance(problem, Problem):
        raise TypeError(f"solve takes a Problem first, not {type(problem).__name__}: Problem(upper=F, lower=f, ...).")
    x, y = as_variable("x0", x0), as_variable("y0", y0)
    problem.validate(x, y)
    problem = jax.tree.map(jnp.asarray, problem)
    reason = ""
    if solver is None:
        solver, reason = default_solver(problem, x, y)
        logger.info("%s", reason)
    if not (hasattr(solver, "init") and hasattr(solver, "step")):
        raise TypeError(
            f"solve's solver is {solver!r}; it needs methods init(problem, x, y, key) and step(problem, state, key), such as solvers.AID()."
        )
    if tol is not None and not hasattr(solver, "status"):
        raise ValueError(
            f"solve(tol=...) asks the solver for its status, and {type(solver).__name__} has no method status(state, metrics, tol)."
        )

    base = as_step_key(key)
    metrics_every = metrics_every or max(1, math.ceil(steps / 100))
    callback_every = callback_every or metrics_every
    rest = 0.0 if checkpoint_every else _SAVE_SECONDS
    checkpoint_every = checkpoint_every or max(1, math.ceil(steps / 20))
    measure = _Metrics(metrics or {})
    streams = {
        name: source for name in ("upper_data", "lower_data") if (source := as_source(getattr(problem, name))).host
    }

    def peeked() -> Problem:
        """The problem with a stream's first items in place, for `init`."""
        found = {}
        for name, stream in streams.items():
            items = stream.items()
            first = [next(items) for _ in range(stream.draws)]
            found[name] = Streamed(jax.tree.map(lambda *leaves: jnp.stack(leaves), *first), stream.draws)
        return dataclasses.replace(problem, **found)  # type: ignore[arg-type]

    saver = None
    if checkpoint is not None:
        from bilevel.checkpoint import Checkpoints, fingerprint

        saver = Checkpoints(checkpoint, fingerprint(problem, solver, x, y, base), checkpoint_keep)

    state = solver.init(peeked() if streams else problem, x, y, _step_key(base, 0))
    for name in ("x", "y"):
        if not hasattr(state, name):
            raise TypeError(
                f"{type(solver).__name__}.init returned a {type(state).__name__} without the attribute {name}: a state has x and y."
            )

    history, done, result, why = History(), 0, Result.MAX_STEPS, ""
    if saver is not None and (restored := saver.restore(state)) is not None:
        done, state, history = restored
        logger.info("resumed from step %d", done)
        if done > steps:
            raise ValueError(
                f"solve(steps={steps}): the checkpoint is already at step {done}. Ask for more steps, or for another directory."
            )
        if tol is not None:
            newest = history.last().items()
            last = {name: jnp.asarray(value) for name, value in newest if history.last_step(name) == done - 1}
            result = Result(int(solver.status(state, last, tol)))

    from bilevel.progress import reporter

    argument = _as_argument(solver)
    prefetched = {name: Prefetched(stream.items(done * stream.draws), stream.draws) for name, stream in streams.items()}
    compiled_problem = dataclasses.replace(problem, **{name: None for name in streams})  # type: ignore[arg-type]
    capacity = min(_CAPACITY, chunk or _CAPACITY)
    length = chunk or 1
    saved, save_clock = done if saver is not None and done else -1, time.perf_counter()
    if done == 0:
        measure(history, 0, state)
    with reporter(steps, done, progress) as bar, _Interrupts() as interrupts:
        try:
            while done < steps and result is Result.MAX_STEPS:
                interrupts.raise_if_asked()
                stop = min(steps, done + min(length, capacity))
                for every, active in (
                    (metrics_every, measure.active),
                    (callback_every, callback is not None),
                    (checkpoint_every, saver is not None),
                ):
                    if active:
                        stop = min(stop, done - done % every + every)
                ready = {name: source.ready(stop - done) for name, source in prefetched.items()}
                stop = min([stop, *(done + count for _, _, count in ready.values())])
                streamed = {
                    name: (segment, np.uint32(first), _Draws(streams[name].draws))
                    for name, (segment, first, _) in ready.items()
                }
                clock = time.perf_counter()
                bounds = np.uint32(done), np.uint32(stop)  # numpy's, which need no dispatch of their own
                advance = functools.partial(
                    _advance,
                    compiled_problem,
                    argument,
                    tol=tol if tol is not None else 0.0,
                    streamed=streamed,
                    capacity=min([capacity, *(source.steps for source in prefetched.values())]),
                    use_tol=tol is not None,
                )
                new, taken, status, buffers = advance(state, base, *bounds)
                taken, status = int(taken), Result(int(status))
                if status is Result.DIVERGED:  # from the chunk's start again, looking at every step
                    new, steps_taken, _, buffers = advance(state, base, *bounds, careful=True)
                    taken = int(steps_taken)
                    why = _blame(new, buffers, done, taken)
                    if taken > 1:
                        new = advance(state, base, bounds[0], np.uint32(done + taken - 1))[0]
                    else:
                        new = state
                _record(history, buffers, done, taken)
                done += taken - (status is Result.DIVERGED)
                for source in prefetched.values():
                    source.consume(taken)
                state, result = new, status
                elapsed = _agreed(time.perf_counter() - clock)
                if chunk is None and stop - done <= 0:
                    length = _next_length(length, taken, elapsed)
                if measure.active and (done % metrics_every == 0 or done == steps or result is not Result.MAX_STEPS):
                    measure(history, done, state)
                bar.update(done, history)
                if callback is not None and done % callback_every == 0:
                    answer = callback(Event(done, state.x, state.y, state, history))
                    if answer is not None and bool(answer) and result is Result.MAX_STEPS:
                        result = Result.STOPPED
                ended = done == steps or result is not Result.MAX_STEPS
                due = done % checkpoint_every == 0 and time.perf_counter() - save_clock >= rest
                if saver is not None and result is not Result.DIVERGED and (due or ended):
                    saver.save(done, state, history)
                    saved, save_clock = done, time.perf_counter()
        except KeyboardInterrupt:
            result = Result.INTERRUPTED
            if saver is not None and saved != done:
                saver.save(done, state, history)
        finally:
            for source in prefetched.values():
                source.close()
            if saver is not None:
                saver.close()
    if hasattr(solver, "finish") and result not in (Result.DIVERGED, Result.INTERRUPTED):
        numbers = {name: float(value) for name, value in history.last().items() if np.ndim(value) == 0}
        measures, result, why = solver.finish(peeked() if streams else problem, state, result, numbers, tol)
        for name, value in measures.items():
            history.extend(name, np.asarray([done]), np.asarray([value]))
    reason = " ".join(part for part in (reason, why) if part)
    if why:
        logger.warning("%s", why)
    return Solution(state.x, state.y, result, history, state, done, time.perf_counter() - began, solver, reason)


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


def _agreed(seconds: float) -> float:
    """Process 0's measurement, so that all processes run the same chunks."""
    if jax.process_count() == 1:
        return seconds
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


def _next_length(length: int, taken: int, elapsed: float) -> int:
    """Chunk lengths in powers of two that approach a quarter of a second a chunk; results do not depend on them."""
    if elapsed < 0.06:
        return min(length * 4, _CAPACITY)
    if elapsed < 0.125:
        return min(length * 2, _CAPACITY)
    return max(length // 2, 1) if elapsed > 0.5 and taken > 1 else length


def _record(history: History, buffers: dict[str, jax.Array], done: int, taken: int) -> None:
    steps = np.arange(done, done + taken)
    for name, buffer in buffers.items():
        history.extend(name, steps, np.asarray(buffer)[:taken].copy())


def _blame(state: Any, buffers: dict[str, jax.Array], done: int, taken: int) -> str:
    """Which quantity broke first, and what to try."""
    broken = [name for name, buffer in buffers.items() if not np.isfinite(np.asarray(buffer)[taken - 1]).all()]
    for name in ("y", "x"):
        if not bool(_finite(getattr(state, name))):
            broken.append(name)
    first = broken[0] if broken else "x"
    cure = {
        "x": "lower the upper step size or clip its gradient (optax.clip_by_global_norm)",
        "y": "lower the lower level's step size",
    }.get(first, "lower the step sizes, the lower level's first")
    return f"Step {done + taken - 1} made {', '.join(broken)} non-finite ({first} first): {cure}; diagnostics.check shows the curvature at the start."


class _Metrics:
    """The user's metrics, evaluated in one compiled call."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        functions, data = [], {}
        for name, entry in metrics.items():
            if isinstance(entry, tuple):
                if len(entry) != 2 or not callable(entry[0]):
                    raise TypeError(
                        f"metrics[{name!r}]: give a function of (x, y), or a pair (function, data) for function(x, y, data)."
                    )
                entry, data[name] = entry[0], jax.tree.map(jnp.asarray, entry[1])
            elif not callable(entry):
                raise TypeError(
                    f"metrics[{name!r}] is a {type(entry).__name__}: give a function of (x, y), or a pair (function, data)."
                )
            functions.append((name, entry))
        self.functions, self.data = tuple(functions), data

    @property
    def active(self) -> bool:
        return bool(self.functions)

    def __call__(self, history: History, step: int, state: Any) -> None:
        if not self.functions or history.last_step(self.functions[0][0]) == step:
            return
        for name, value in _measure(self.functions, state.x, state.y, self.data).items():
            history.extend(name, np.asarray([step]), np.asarray(value)[None])
