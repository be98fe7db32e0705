"""Try a grid of hyperparameters in one compiled program, and keep the best."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import Named, explained
from bilevel.captures import Functions, taken
from bilevel.keys import StepKey, as_step_key
from bilevel.loop import as_argument, as_solver, run
from bilevel.problem import Problem, ProblemError, as_variable, check_problem
from bilevel.solvers._base import check_solver
from bilevel.typing import Scalar, Solver, X, Y

__all__ = ["Sweep", "sweep"]


@dataclasses.dataclass(frozen=True)
class Sweep(Named, Generic[X, Y]):
    """What a sweep found.

    Attributes:
      solver: the best of the solvers, by score.
      x, y: its final variables.
      score: its score, the lowest.
      scores: one per solver, in the order given; inf where a run ended in a NaN or an infinity.
      state: all final states, stacked along a leading axis.
    """

    solver: Solver
    x: X
    y: Y
    score: float
    scores: np.ndarray
    state: Any

    def __repr__(self) -> str:
        lost = int(np.isinf(self.scores).sum())
        return f"Sweep(best of {len(self.scores)}: score {self.score:.6g} with {self.solver}; {lost} diverged)"


@functools.partial(jax.jit, static_argnames=("steps",))
def _run_all(
    problem: Problem[X, Y], solvers: Any, x0: X, y0: Y, key: StepKey, score: Functions, steps: int
) -> tuple[Any, jax.Array]:
    rank = score.by_name["score"]

    def one(solver: Any) -> tuple[Any, jax.Array]:
        state, _ = run(problem, as_solver(solver), x0, y0, steps, key)
        value = problem.full_upper()(state.x, state.y) if rank is None else rank(state.x, state.y)
        return state, value

    return jax.vmap(one)(solvers)


@explained
def sweep(
    problem: Problem[X, Y],
    solvers: Sequence[Solver],
    x0: X,
    y0: Y,
    *,
    steps: int = 1000,
    key: int | jax.Array | StepKey = 0,
    score: Callable[[X, Y], Scalar] | None = None,
) -> Sweep[X, Y]:
    """Run `solvers`, alike but for their numbers, as one `vmap` under one compile; return the best.

        sweep(problem, [SOBA(b, a) for a in (0.03, 0.1, 0.3) for b in (0.01, 0.1, 1.0)], x0, y0, steps=5000)
        sweep(problem, [SOBA(optax.adam(b), 0.1) for b in (0.01, 0.03, 0.1)], x0, y0, steps=5000)

    Args:
      problem: the problem.
      solvers: the same solver with other floating-point hyperparameters: step sizes, and the numbers of optax rules
        that can be arguments of compiled code, as rates can.
      x0, y0: the start of every run.
      steps: outer steps of every run.
      key: the key of every run: all see the same batches, so that scores differ by hyperparameters alone.
      score: `(x, y) -> scalar`, lower is better; None: the upper loss on all its samples.

    What the functions capture has its value of now, as in `solve`, and another value compiles nothing anew.

    Memory: that of one run times the number of solvers. Solvers with branches (SRBA, SPABA, VRBO) compute both of them
    under `vmap`.
    """
    check_problem("sweep", problem, "sweep(problem, [solver, ...], x0, y0)")
    if getattr(type(solvers), "__bilevel_hyperparameters__", False) or not isinstance(solvers, Iterable):
        raise TypeError(
            f"sweep takes several solvers in a list, not a {type(solvers).__name__}: sweep(problem, [SOBA(0.1), "
            "SOBA(0.3)], x0, y0)."
        )
    solvers = list(solvers)
    for solver in solvers:
        check_solver("sweep", solver)
    if not solvers:
        raise ValueError("sweep needs at least one solver; the sequence is empty.")
    x0, y0 = as_variable("x0", x0), as_variable("y0", y0)
    problem.validate(x0, y0)
    given = [as_argument(solver, x0, y0) for solver in solvers]
    for i, other in enumerate(given):
        if jax.tree.structure(other) != jax.tree.structure(given[0]):  # type: ignore[operator]
            raise ValueError(
                f"sweep runs solvers that differ in numbers only, and solver {i} differs from solver 0 in something "
                f"else (a count, a flag, another rule, a number of a rule that it counts or branches on, as Adam's b1 "
                f"in single precision): {solvers[i]} against {solvers[0]}. Sweep over those in separate calls."
            )
    if not jax.tree.leaves(given[0]):
        raise ValueError(f"sweep: {solvers[0]} has no numbers to vary: give step sizes, or rates of optax rules.")
    problem = jax.tree.map(jnp.asarray, problem.captured(x0, y0))
    if score is not None:
        try:
            jax.eval_shape(score, x0, y0)
        except Exception as error:
            said = str(error).split("The error occurred while tracing")[0].strip()[:300]
            raise TypeError(
                f"sweep(score=...) fails as a function of (x, y) to one scalar: {type(error).__name__}: {said}"
            ) from error
    ranking = Functions({"score": taken(score, (x0, y0))})
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *given)
    state, values = _run_all(problem, stacked, x0, y0, as_step_key(key), ranking, steps)
    if values.shape != (len(solvers),):
        raise ProblemError(
            f"sweep(score=...) returned values of shape {list(values.shape[1:])}; a score is one scalar."
        )
    finite = functools.reduce(
        np.logical_and,
        [np.isfinite(a).reshape(len(solvers), -1).all(1) for a in map(np.asarray, jax.tree.leaves((state.x, state.y)))],
    )
    scores = np.where(finite & np.isfinite(values), values, np.inf)
    best = int(np.argmin(scores))
    if not np.isfinite(scores[best]):
        raise ValueError(f"sweep: all {len(solvers)} runs diverged within {steps} steps. Try smaller step sizes.")
    x, y = (jax.tree.map(lambda a: a[best], tree) for tree in (state.x, state.y))
    return Sweep(solvers[best], x, y, float(scores[best]), scores, state)
