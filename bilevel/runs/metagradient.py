"""The hypergradient of one whole training, on the host: states in memory or in files, and a backward pass that resumes.

What `hypergradients.Unrolled` computes within one compiled programme is computed here segment by segment: T steps are
ceil(T / L) segments of L. Forward, the state at the beginning of each is taken from the device and kept on the host, or
in a directory. Backward, from the last segment to the first, it is put back, and the segment computed again and pulled
back by one compiled programme, which needs what `Unrolled` needs for L steps:

    a_k, g_k  from  a_{k+1}:    a_k = (d_s Psi_k)' a_{k+1},    g_k = g_{k+1} + (d_x Psi_k)' a_{k+1}

with Psi_k the segment, a_n = (F_y, 0) and g_n = 0; the gradient is F_x + g_0. (a_k, g_k) and the states are all that a
process needs to go on.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel._arguments import explained
from bilevel._module import state
from bilevel._recompute import even, split
from bilevel._settings import settings, users_settings
from bilevel.captures import whole
from bilevel.checkpoint import Checkpoints, fingerprint, placed
from bilevel.history import History
from bilevel.hypergradients import Estimate, Unrolled
from bilevel.hypergradients._base import lower_metrics
from bilevel.hypergradients.unrolled import end_value
from bilevel.keys import StepKey, as_step_key
from bilevel.loop import as_argument, as_solver
from bilevel.lower import LowerState, as_lower_solver
from bilevel.lower.loops import stretch
from bilevel.optimizers import check_count
from bilevel.precision import Working, named, working
from bilevel.problem import Problem, ProblemError, as_variable, check_problem
from bilevel.progress import reporter
from bilevel.typing import Metrics, PyTree, X, Y

__all__ = ["metagradient"]


@state
class Adjoint:
    """Where the backward pass stands: the cotangents of the state's floating-point leaves, and those of x so far."""

    state: list[jax.Array]
    x: PyTree


@settings()
@explained
def metagradient(
    problem: Problem[X, Y],
    x: X,
    y0: Y,
    lower_solver: Any,
    *,
    key: int | jax.Array | StepKey = 0,
    segment: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Estimate[X]:
    """F(x, y_T(x)) and its exact gradient, y_T being the end of a training of T steps from y0: as long as it may be.

        training = lower.GradientDescent(optax.adam(1e-3), steps=100_000)
        found = runs.metagradient(problem, x, y0, training, checkpoint="runs/meta")
        found.value, found.gradient, found.lower.y

    The derivative of `hypergradients.Unrolled`, by the same steps and added up in the same order: as a rule to the last
    bit that of its schedules, where the value is asked for with the gradient. The device holds one segment's states,
    the host (or the disk) one state per segment. Each step is computed twice, and a third time where it is taken back.

    Args:
      problem: the problem; its data are arrays or drawn from arrays, and not a `data.Stream`.
      x: the point.
      y0: where the training begins.
      lower_solver: one made of a number of steps, such as `lower.GradientDescent(optax.adam(1e-3), steps)`.
      key: the draws of both levels, as in `hypergradients.value_and_hypergradient`.
      segment: L, the steps of a segment, at most T; a last one that is shorter is compiled as well. None: the divisor
        of T next to its root, or where there is none within a factor of two the root.
      checkpoint: a directory for the states and for the backward pass. A call that was killed goes on from there,
        forward or backward, and ends with the same bits as if it had not been; one that had ended gives its result
        again. At most it holds one state per segment; it is the caller's to delete. None: the host's memory.
      progress: show a bar over the steps, forward and backward; None: on a terminal and in a notebook.

    Returns:
      An `Estimate`, as `value_and_hypergradient` returns.

    Raises:
      ProblemError: the problem or the start is wrong; before anything is compiled.
      ValueError: a lower solver without a fixed number of steps, a segment longer than the run.
      CheckpointError: the directory cannot be written, is full (what is there stays, and the next call goes on from
        it), is in use, or is another run's.

    Reference: Griewank, Walther, "Evaluating Derivatives", SIAM 2008, chapter 12 (two levels of storage).
    """
    given, solver, steps = _checked(problem, x, y0, lower_solver, segment)
    length = even(steps, math.sqrt(steps)) if segment is None else segment
    bounds = [*range(0, steps, length), steps]
    problem, x, y = given.problem, given.x, given.y
    base, parts, count = as_step_key(key), as_argument(solver, x, y), len(bounds) - 1
    marks = _marks(problem, solver, x, y, base, length)
    with named(Unrolled(), problem, x, y), _stores(checkpoint, marks) as (states, adjoints):
        start = _begun(problem, parts, x, y)
        done, adjoint = adjoints.newest(Adjoint(split(start)[0], x), count) or (0, None)  # segments, from the last one
        reached, now = states.newest(start, count) or (-1, start)  # segments, from the first one

        def forward(state: LowerState, k: int) -> LowerState:
            return _advanced(problem, parts, x, state, base, np.int32(bounds[k]), count=bounds[k + 1] - bounds[k])

        with reporter(2 * steps, bounds[max(reached, 0)] + steps - bounds[count - done], progress) as bar:
            if reached < 0:
                states.save(0, start)
            for k in range(max(reached, 0), count):
                now = forward(now, k)
                states.save(k + 1, now)
                bar.update(bounds[k + 1], _NONE)

            value, end, upper, metrics = _ended(problem, parts, x, now, base)
            adjoint = Adjoint(upper.state, optax.tree.zeros_like(x)) if adjoint is None else adjoint
            for k in reversed(range(count - done)):
                at, now = states.newest(start, k) or (0, start)
                for missing in range(at, k):  # a file is torn: again from the one before it
                    now = forward(now, missing)
                first, taken = np.int32(bounds[k]), bounds[k + 1] - bounds[k]
                adjoint = _pulled_back(problem, parts, x, now, adjoint, base, first, count=taken)
                adjoints.save(count - k, adjoint)
                if k + 1 < count:  # the adjoint before this one is there too, and goes on from state k
                    states.drop(k + 1)
                bar.update(2 * steps - bounds[k], _NONE)
        gradient = _whole(problem, parts, x, y, adjoint, upper.x)
    gradient, at = given.given(gradient, end.y)
    return Estimate(value, gradient, LowerState(at, end.memory), (), metrics)


_NONE = History()


def _checked(problem: Any, x: Any, y0: Any, lower_solver: Any, segment: Any) -> tuple[Working, Any, int]:
    """The problem and the point in the run's dtype, the lower solver and its number of steps."""
    check_problem("metagradient", problem, "Problem(upper=F, lower=f, ...)")
    if any(source.host for source in problem.sources):
        raise ProblemError("metagradient takes steps again, and a Stream gives each item once: give arrays.")
    x, y = as_variable("x", x), as_variable("y0", y0)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((x, y, problem))):
        raise ProblemError(
            "metagradient is the host of compiled segments and cannot itself stand under jit, vmap or grad: call it "
            "outside, or take hypergradients.Unrolled, the same derivative as a pure function."
        )
    solver: Any = as_lower_solver(lower_solver)
    if not all(hasattr(solver, name) for name in ("advance", "begin", "end", "steps")):
        raise ValueError(
            "metagradient takes a training apart into segments of steps, and needs a lower solver made of steps: "
            f"lower.GradientDescent(...) or lower.MomentumSGD(...), not {type(solver).__name__}."
        )
    if getattr(solver, "tol", None) is not None:
        raise ValueError("metagradient needs a training of a known number of steps: set the lower solver's tol=None.")
    check_count("metagradient", "the number of steps of a segment is a positive integer", segment=segment)
    if segment is not None and segment > solver.steps:
        raise ValueError(
            f"metagradient(segment={segment}): the training has {solver.steps} steps, and a segment is part of it: "
            f"give a number up to {solver.steps}."
        )
    with users_settings():
        problem = jax.tree.map(jnp.asarray, problem.validated(x, y))
        return working(problem, x, y), solver, solver.steps


def _marks(problem: Problem, solver: Any, x: PyTree, y: PyTree, base: StepKey, length: int) -> dict[str, str]:
    """What a directory belongs to: a run's fingerprint, in which the point counts, and the segments' length."""
    found = fingerprint(problem, solver, x, y, base) | {"segment": str(length), "F_x": "added last"}
    values = {name: found.pop(name) for name in list(found) if name.startswith("start ")}
    return found | {f"{name.removeprefix('start ')} contents": value for name, value in values.items()}


# ---------------------------------------------------------------- where states are kept


class _Store(Protocol):
    """States by number."""

    def save(self, number: int, tree: PyTree) -> None:
        """Keep one."""

    def newest(self, like: PyTree, up_to: int) -> tuple[int, PyTree] | None:
        """The last one that is kept and good, on the devices of `like`, and its number."""

    def drop(self, number: int) -> None:
        """It is not needed any more."""


class _Host:
    """In the host's memory."""

    def __init__(self) -> None:
        self.kept: dict[int, PyTree] = {}

    def save(self, number: int, tree: PyTree) -> None:
        self.kept[number] = jax.tree.map(whole, tree)

    def newest(self, like: PyTree, up_to: int) -> tuple[int, PyTree] | None:
        number = max((n for n in self.kept if n <= up_to), default=None)
        return None if number is None else (number, jax.tree.map(placed, self.kept[number], like))

    def drop(self, number: int) -> None:
        self.kept.pop(number, None)


class _Files:
    """In a directory."""

    def __init__(self, files: Checkpoints) -> None:
        self.files = files

    def save(self, number: int, tree: PyTree) -> None:
        self.files.save(number, tree, _NONE)

    def newest(self, like: PyTree, up_to: int) -> tuple[int, PyTree] | None:
        found = self.files.restore(like, up_to=up_to)
        return None if found is None else found[:2]

    def drop(self, number: int) -> None:
        self.files.drop(number)


class _Nowhere:
    """For what nobody will go on from."""

    def save(self, number: int, tree: PyTree) -> None:
        pass

    def newest(self, like: PyTree, up_to: int) -> None:
        return None

    def drop(self, number: int) -> None:
        pass


@contextlib.contextmanager
def _stores(checkpoint: Any, marks: dict[str, str]) -> Iterator[tuple[_Store, _Store]]:
    """Those of the states and of the backward pass."""
    if checkpoint is None:
        yield _Host(), _Nowhere()
        return
    Checkpoints(checkpoint, marks)  # whether it is a directory
    parts = ("states", sys.maxsize), ("backward", 2)
    states, adjoints = (Checkpoints(Path(checkpoint) / name, marks, keep) for name, keep in parts)
    with states.held(), adjoints.held():
        yield _Files(states), _Files(adjoints)


# ---------------------------------------------------------------- the programmes


def _kernel(parts: Any) -> Any:
    solver = as_solver(parts)
    return solver.differentiable() if hasattr(solver, "differentiable") else solver


@jax.jit
def _begun(problem: Problem, parts: Any, x: PyTree, y: PyTree) -> LowerState:
    return _kernel(parts).begin(x, as_solver(parts).init(y))


@functools.partial(jax.jit, static_argnames="count")
def _advanced(
    problem: Problem, parts: Any, x: PyTree, state: LowerState, base: StepKey, first: Any, *, count: int
) -> LowerState:
    """A segment, its steps as `_pulled_back` computes them again."""
    return stretch(_kernel(parts), problem.levels(base).lower.mixed_mode(), x, state, first, count, 1)[0]


@functools.partial(jax.jit, static_argnames="count")
def _pulled_back(
    problem: Problem,
    parts: Any,
    x: PyTree,
    state: LowerState,
    adjoint: Adjoint,
    base: StepKey,
    first: Any,
    *,
    count: int,
) -> Adjoint:
    """A segment's derivative, from the state at its beginning."""
    lower, (floats, others, join) = problem.levels(base).lower.mixed_mode(), split(state)
    keep: Any = Unrolled().kept(_kernel(parts), count) or count

    def run(x: PyTree, floats: list[jax.Array]) -> Adjoint:
        end, x = stretch(_kernel(parts), lower, x, join(floats, others), first, count, keep)
        return Adjoint(split(end)[0], x)

    of_x, of_state = jax.vjp(run, x, floats)[1](adjoint)
    return Adjoint(of_state, of_x)


@jax.jit
def _ended(
    problem: Problem, parts: Any, x: PyTree, state: LowerState, base: StepKey
) -> tuple[jax.Array, LowerState, Adjoint, Metrics]:
    """F at the end, the solver's state there, and where the backward pass begins."""
    (upper, lower), (floats, others, join) = problem.levels(base), split(state)

    def objective(x: PyTree, floats: list[jax.Array]) -> tuple[jax.Array, LowerState]:
        end = _kernel(parts).end(join(floats, others))
        return end_value(upper, x, end.y), end

    (value, end), (of_x, of_state) = jax.value_and_grad(objective, (0, 1), has_aux=True)(x, floats)
    return value, end, Adjoint(of_state, of_x), lower_metrics(lower, x, end.y)


@jax.jit
def _whole(problem: Problem, parts: Any, x: PyTree, y: PyTree, adjoint: Adjoint, of_x: PyTree) -> PyTree:
    """The gradient, with F_x and what goes through a start that depends on x."""
    _, back = jax.vjp(lambda x: split(_kernel(parts).begin(x, as_solver(parts).init(y)))[0], x)
    return optax.tree.add(optax.tree.add(of_x, adjoint.x), back(adjoint.state)[0])
