"""The loop: `run` as a pure function, and `Loop`, the compiled chunks by which `solve` advances."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import _compiling
from bilevel._arguments import explained
from bilevel._convolutions import in_canonical_order
from bilevel._module import name_of
from bilevel._places import kept, over_one_mesh
from bilevel._rules import joined, parted
from bilevel._settings import settings
from bilevel.captures import Captured, form
from bilevel.keys import StepKey, as_step_key
from bilevel.optimizers import check_count
from bilevel.precision import named, working
from bilevel.problem import Problem, ProblemError, as_given, check_problem
from bilevel.result import Result
from bilevel.solvers._base import check_solver, refuse_standing
from bilevel.streaming import Portion, on_device
from bilevel.typing import HostSolver, Metrics, PyTree, Solver, X, Y

__all__ = ["run"]

# Steps that one call of the compiled loop can record; its bounds are dynamic, so any number up to it is one program.
CAPACITY = 16384


@explained
def run(
    problem: Problem[X, Y], solver: Solver, x0: X, y0: Y, steps: int, key: int | jax.Array | StepKey = 0
) -> tuple[Any, Metrics]:
    """`steps` outer iterations as a pure function, to be put under `jit`, `vmap` or `grad`.

    The iterates are those of `solve` with the same key, up to rounding (it is another compiled program). The start is
    projected on X and Y. Values are not looked at, since they may be traced: `problem.validate(x0, y0)` does that.

    Args:
      problem: the problem; `vmap` over its data for many problems.
      solver: the solver; `vmap` over its float hyperparameters for a sweep.
      x0, y0: the start; `vmap` over them for a multi-start.
      steps: static.
      key: a seed or a PRNG key; `vmap` over keys for repetitions.

    Returns:
      `(state, metrics)`: the final state (`state.x`, `state.y`) and each metric stacked along a leading axis of
      `steps`. Half-precision variables, and variables of several dtypes, have master copies in one dtype during the
      run (`bilevel.precision`); `state.x` and `state.y` are in the dtypes that were given, `state.master` is the rest.

    Raises:
      ProblemError: a level's data are a host's stream; inside `shard_map` a loss differs from device to device.
    """
    check_problem("run", problem, "run(problem, solver, x0, y0, steps)")
    check_solver("run", solver)
    if isinstance(solver, HostSolver):
        raise ProblemError(
            f"{name_of(solver)} works on the host, step by step: call solve, which run cannot stand for."
        )
    if isinstance(steps, jax.core.Tracer):
        raise TypeError(
            "run(steps=...) is traced: the number of steps is fixed when the run is compiled, so give an int."
        )
    check_count("run", steps=steps)
    x0, y0 = as_given("x0", x0), as_given("y0", y0)
    if any(source.host for source in problem.sources):
        raise ProblemError("run is pure and cannot read a Stream from the host: use solve, or arrays.")
    base = as_step_key(key)
    with named(solver, problem, x0, y0):
        found = working(problem, x0, y0)
    refuse_standing(solver, found.y)

    def body(state: Any, k: jax.Array) -> tuple[Any, Metrics]:
        return solver.step(found.problem, state, at_step(base, k))

    body = in_canonical_order(body) if found.convolves else body
    with settings(), named(solver, problem, x0, y0):
        state = solver.init(found.problem, *found.problem.projected(found.x, found.y), at_step(base, 0))
        state, metrics = jax.lax.scan(body, state, jnp.arange(steps, dtype=jnp.uint32))
    return found.shown(state), metrics


def at_step(base: StepKey, k: Any) -> StepKey:
    """The run's key at step k."""
    return StepKey(base.base, jnp.asarray(k, jnp.uint32), base.stream)


class Chunk(NamedTuple):
    """What one call of the compiled loop did.

    Attributes:
      state: the state at its end; after a divergence the last finite one.
      done: the run's steps that lie behind that state.
      steps: the steps whose metrics were recorded, the one that diverged included.
      metrics: by name, an entry for each of those.
      result: how the run stands: MAX_STEPS to go on.
      why: which quantity broke and what to try, after a divergence.
    """

    state: Any
    done: int
    steps: np.ndarray
    metrics: dict[str, np.ndarray]
    result: Result
    why: str = ""


class Loop:
    """The compiled loop of a run: `loop(state, done, stop, portions)` takes the steps done, ..., stop - 1.

    Args:
      problem: the problem, without its streams.
      solver: the solver.
      start: x and y where it starts, for their shapes.
      base: the run's key.
      tol: the tolerance that the solver's `status` is asked with after each step; None: it is not asked.
      capacity: the most steps of one call.
      convolves: a loss has convolutions.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        start: tuple[Any, Any],
        base: StepKey,
        tol: float | None,
        capacity: int,
        convolves: bool = False,
    ) -> None:
        self._base = base
        self._advance = functools.partial(
            _advance,
            problem,
            as_argument(solver, *start),
            tol=0.0 if tol is None else tol,
            use_tol=tol is not None,
            capacity=capacity,
            convolves=convolves,
        )

    def __call__(self, state: Any, done: int, stop: int, portions: dict[str, Portion]) -> Chunk:
        """Advance; a divergence is looked at again, step by step, and the last finite iterate returned."""
        first = np.uint32(done)  # numpy's, which need no dispatch of their own
        state, places = over_one_mesh(state)
        advance = functools.partial(self._advance, state, self._base, first, portions=portions, places=places)
        new, taken, status, metrics = advance(np.uint32(stop))
        result, why = Result(int(status)), ""
        if result is Result.DIVERGED:
            new, taken, _, metrics = advance(np.uint32(stop), careful=True)
        count = int(taken)
        recorded = {name: np.asarray(buffer)[:count].copy() for name, buffer in metrics.items()}
        steps, behind = np.arange(done, done + count), done + count
        if result is Result.DIVERGED:
            behind -= 1
            why = _blame(new, recorded, behind)
            new = advance(np.uint32(behind))[0] if behind > done else state
        return Chunk(new, behind, steps, recorded, result, why)


@_compiling.jit(static_argnames=("capacity", "use_tol", "careful", "convolves", "places"))
def _advance(
    problem: Problem,
    solver: Any,
    state: Any,
    base: StepKey,
    start: Any,
    stop: Any,
    *,
    tol: Any,
    portions: dict[str, Portion],
    capacity: int,
    use_tol: bool,
    convolves: bool = False,
    careful: bool = False,
    places: Any = None,
) -> tuple[Any, jax.Array, jax.Array, Metrics]:
    """Steps start, ..., stop - 1 in one loop with dynamic bounds, ended early by a status or a non-finite metric (but
    for a trial that the solver has `withdrawn`, which is in the history as what it was).

    The iterates themselves are looked at after the last step, or with `careful` after each: a NaN in them shows in the
    metrics one step later, and a small step has few operations besides.

    Over a mesh the state's leaves end in the `places` where they lay.

    Returns the state, the steps taken, the status, and the metrics in buffers of `capacity` rows (or as many as a
    portion has room for).
    """
    solver = as_solver(solver)

    def step(k: Any, state: Any) -> tuple[Any, Metrics]:
        return solver.step(on_device(problem, portions, k - start), state, at_step(base, k))

    # Traced once, for the shapes of its metrics and for the loop.
    step = jax.jit(in_canonical_order(step) if convolves else step, inline=True)
    rows = _Rows(jax.eval_shape(step, start, state)[1])

    def cond(carry: Any) -> jax.Array:
        k, _, _, status = carry
        return (k < stop) & (status == 0)

    def body(carry: Any) -> Any:
        k, state, buffers, _ = carry
        state, metrics = step(k, state)
        row = rows.packed(metrics)
        buffers = jax.tree.map(lambda b, m: b.at[k - start].set(m), buffers, row)
        status = jnp.zeros((), jnp.int32)
        if use_tol:
            status = jnp.asarray(solver.status(state, metrics, tol), jnp.int32)
        finite = _finite(row)
        if hasattr(solver, "withdrawn"):  # the trial broke, and the run stands where it stood
            finite = finite | solver.withdrawn(state, metrics)
        if careful:
            finite = finite & _finite((state.x, state.y))
        return k + 1, state, buffers, jnp.where(finite, status, Result.DIVERGED.value)

    buffers = rows.buffers(min([capacity, *(portion.room for portion in portions.values())]))
    k, state, buffers, status = jax.lax.while_loop(cond, body, (start, state, buffers, jnp.zeros((), jnp.int32)))
    status = jnp.where(_finite((state.x, state.y)), status, Result.DIVERGED.value)
    return kept(state, places), k - start, status, rows.unpacked(buffers)


class _Rows:
    """How a step's metrics are written: scalars of one dtype share a buffer, so that a step writes once."""

    def __init__(self, shapes: dict[str, Any]) -> None:
        self._shapes = shapes
        self._scalars: dict[Any, list[str]] = {}
        for name, shape in shapes.items():
            if shape.shape == ():
                self._scalars.setdefault(shape.dtype, []).append(name)

    def packed(self, metrics: Metrics) -> tuple[list[jax.Array], Metrics]:
        rows = [jnp.stack([metrics[name] for name in names]) for names in self._scalars.values()]
        return rows, {name: value for name, value in metrics.items() if self._shapes[name].shape != ()}

    def unpacked(self, buffers: tuple[list[jax.Array], Metrics]) -> Metrics:
        rows, others = buffers
        columns = zip(self._scalars.values(), rows, strict=True)
        return {name: row[:, i] for names, row in columns for i, name in enumerate(names)} | others

    def buffers(self, capacity: int) -> PyTree:
        shapes = jax.eval_shape(self.packed, self._shapes)
        return jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), shapes)


class _Argument:
    """A solver as an argument of compiled code: its numbers are leaves, the rest is compared by what it holds.

    `optax.adam(0.1)` made anew each time is other functions that hold the same (`captures.form`): it compiles nothing.
    Nor does `optax.adam(0.2)` after it: of a rule's numbers those that can be are leaves too (`bilevel._rules`).
    """

    def __init__(self, leaves: list[Any], rules: list[Captured], code: _Code) -> None:
        self.leaves, self.rules, self.code = leaves, rules, code


class _Code:
    """How a solver is put together again from its leaves; equal where the same is held."""

    def __init__(self, treedef: Any, solver: Any, held: Hashable) -> None:
        self.treedef, self.solver, self.held = treedef, solver, held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Code) and self.held == other.held

    def __hash__(self) -> int:
        return hash(self.held)


jax.tree_util.register_pytree_node(
    _Argument,
    lambda argument: ((argument.leaves, argument.rules), argument.code),
    lambda code, children: _Argument(list(children[0]), list(children[1]), code),
)


def as_argument(solver: Any, *variables: PyTree) -> _Argument:
    """A solver as an argument of compiled code: its leaves where they are numbers, else all of it is code.

    Args:
      solver: the solver.
      variables: x and y, for which its step rules are looked at; without them the rules' numbers are code.
    """
    solver, rules = parted(solver, variables or None)
    leaves, treedef = jax.tree.flatten(solver)
    travels = len(leaves) != 1 or leaves[0] is not solver
    if travels and all(isinstance(leaf, (float, int, np.ndarray, np.number, jax.Array)) for leaf in leaves):
        return _Argument(leaves, rules, _Code(treedef, None, form(jax.tree.map(lambda _: None, solver))))
    return _Argument([], rules, _Code(None, solver, form(solver)))


def as_solver(argument: _Argument) -> Any:
    """The solver of `as_argument`."""
    code = argument.code
    solver = code.solver if code.treedef is None else jax.tree.unflatten(code.treedef, argument.leaves)
    return joined(solver, argument.rules)


def _finite(tree: PyTree) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in leaves], jnp.asarray(True))


def _blame(state: Any, metrics: dict[str, np.ndarray], step: int) -> str:
    """Which quantity broke first at this step, and what to try."""
    broken = [name for name, values in metrics.items() if not np.isfinite(values[-1]).all()]
    broken += [name for name in ("y", "x") if not bool(_finite(getattr(state, name)))]
    losses = [name for name in broken if name in ("lower_loss", "upper_loss")]
    first = [*losses, *broken, "x"][0]
    cure = {
        "x": "lower the upper step size or clip its gradient (optax.clip_by_global_norm)",
        "y": "lower the lower level's step size",
        "lower_loss": "the lower loss is undefined or unbounded there: bound y (project_lower), or mend the loss",
        "upper_loss": "the upper loss is unbounded or undefined there: bound the variables (project_upper, "
        "project_lower), or mend the loss",
        "hypergradient_norm": "the losses have values there and the derivative has none, as a root or a norm at zero "
        "in a loss (put a small constant under it) or in a step rule that is differentiated (give Adam an eps_root); "
        "or lower the step sizes, the lower level's first",
    }.get(first, "lower the step sizes, the lower level's first")
    return (
        f"Step {step} made {', '.join(broken)} non-finite ({first} first): {cure}; diagnostics.check shows the "
        "curvature at the start."
    )
