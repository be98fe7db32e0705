"""Many starts in one compile, and the best feasible end."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import Named, explained
from bilevel.keys import StepKey, as_step_key
from bilevel.loop import as_argument, as_solver, run
from bilevel.problem import Problem, ProblemError, check_problem
from bilevel.solvers._base import check_solver
from bilevel.typing import Solver, X, Y

__all__ = ["Multistart", "multistart"]


@dataclasses.dataclass(frozen=True)
class Multistart(Named, Generic[X, Y]):
    """The ends of all starts.

    Attributes:
      x, y: the best feasible end.
      best: its index; -1 where no end is feasible and finite (x, y are then the least infeasible).
      xs, ys: all ends, along a leading axis.
      metrics: the last metrics of each, by name.
      states: the solver's states.
    """

    x: X
    y: Y
    best: int
    xs: X
    ys: Y
    metrics: dict[str, np.ndarray]
    states: Any


@functools.partial(jax.jit, static_argnames="steps")
def _run_all(problem: Problem[X, Y], solver: Any, x0s: X, y0s: Y, key: StepKey, steps: int) -> Any:
    solver = as_solver(solver)

    def one(x: X, y: Y) -> Any:
        state, metrics = run(problem, solver, x, y, steps, key)
        last = jax.tree.map(lambda m: m[-1], metrics)
        return state, state.x, state.y, last | {"score": _upper_loss(problem, state, last)}

    return jax.vmap(one)(x0s, y0s)


def _upper_loss(problem: Problem[X, Y], state: Any, last: dict[str, Any]) -> Any:
    """F at the end on all samples, as a sweep has it; where nobody can evaluate that, the last step's."""
    try:
        upper = problem.full_upper()
        jax.eval_shape(upper, state.x, state.y)
    except Exception:  # data without an end, a row of x for each agent
        return last["upper_loss"]
    return upper(state.x, state.y)


@explained
def multistart(
    problem: Problem[X, Y],
    x0s: X,
    y0s: Y,
    solver: Solver,
    steps: int = 1000,
    key: int | jax.Array | StepKey = 0,
    feasible: float = 1e-3,
    settled: float = float("inf"),
) -> Multistart[X, Y]:
    """Run the solver from many starts at once (`vmap`) and return the best feasible end.

    Bilevel methods are local: where either level has several solutions the start decides. An end counts where it is
    finite, its `violation` (of methods that measure it) is at most `feasible` and its `hypergradient_norm` at most
    `settled`; among those the lowest upper loss at the end wins, on all samples (data without an end: the last step's),
    with `bias` (how far a penalty holds F below its true value) added.

    Args:
      problem: the problem.
      x0s, y0s: starts along a leading axis of every leaf. `x0s=None` for a simple bilevel problem.
      solver: a solver.
      steps: outer steps from each start.
      key: a seed or a PRNG key; all starts see the same batches.
      feasible: the largest violation that counts as feasible.
      settled: the largest residual that counts.

    What the functions capture has its value of now, as in `solve`, and another value compiles nothing anew.
    """
    for name, bound in (("feasible", feasible), ("settled", settled)):
        if not isinstance(bound, numbers.Real):
            raise TypeError(f"multistart({name}={bound!r}): a number is needed.")
    check_problem("multistart", problem, "multistart(problem, x0s, y0s, solver)")
    check_solver("multistart", solver)
    counts = {leaf.shape[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves((x0s, y0s))}
    if len(counts) != 1 or 0 in counts:
        raise ProblemError(
            "multistart takes starts along one leading axis of every leaf of x0s and y0s; "
            f"found lengths {sorted(counts)}."
        )
    first = jax.tree.map(lambda leaf: leaf[0], (x0s, y0s))
    problem.validate(*first)
    problem = jax.tree.map(jnp.asarray, problem.captured(*first))
    states, xs, ys, last = _run_all(problem, as_argument(solver, *first), x0s, y0s, as_step_key(key), steps)
    metrics = {name: np.asarray(value) for name, value in last.items()}
    n, upper_loss = next(iter(counts)), metrics.pop("score")
    finite = np.all(
        [np.isfinite(np.asarray(leaf)).reshape(n, -1).all(axis=1) for leaf in jax.tree.leaves((xs, ys))]
        + [np.isfinite(upper_loss)],
        axis=0,
    )
    violation = metrics.get("violation", np.zeros(n))
    usable = finite & (violation <= feasible) & (metrics.get("hypergradient_norm", np.zeros(n)) <= settled)
    score = upper_loss + metrics.get("bias", np.zeros(n))
    if usable.any():
        best = pick = int(np.argmin(np.where(usable, score, np.inf)))
    else:
        best, pick = -1, int(np.argmin(np.where(finite, violation, np.inf)))
    take = lambda tree: jax.tree.map(lambda leaf: leaf[pick], tree)  # noqa: E731
    return Multistart(take(xs), take(ys), best, xs, ys, metrics, states)
