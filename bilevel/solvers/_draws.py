"""A problem whose data have no end, on draws that are made once: the same problem to whoever looks at it.

With N draws of each such level the losses are means,

    F_N(x, y) = 1/N sum_i F(x, y; b_i),        f_N(x, y) = 1/N sum_i f(x, y; b_i),

and a difference between two points is known up to three standard errors of its mean over the draws (the same draws at
both points). What that error is of a change by one unit of the variables is measured, and N is chosen by it.

Where each draw is a lower level of its own (`data.Shared`), y is stacked: the problem is

    min over x  1/N sum_i F(x, y_i; b_i)      s.t.  y_i minimises f(x, .; b_i),

from the minimisers that Newton steps reach from the run's y; no lower level is known up to an error then.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import _compiling
from bilevel._traces import traffic
from bilevel.data import Draws, Source, Streamed, of_one_step
from bilevel.keys import Draw, StepKey, as_step_key
from bilevel.lower import LowerState, Newton
from bilevel.problem import Problem
from bilevel.solvers._units import moves, units_of_variables
from bilevel.typing import PyTree

__all__ = ["Fixed", "fixed_draws"]

_FIRST, _FEWEST, _MOST = 64, 8, 4096
"""Draws to begin with; where they do not differ; the most of them."""
_BYTES = 2**20
"""What one evaluation of both losses on all draws may read and write, where more than the fewest are taken."""
_HELD = 2**28
"""Bytes that the draws may hold."""
_ERRORS = 3.0
"""Standard errors that a difference may be off."""
_UNKNOWNS = 2_000
"""The most lower unknowns of all draws together, where each has its own."""
_SEED = 0x5EED


class Fixed(NamedTuple):
    """What `fixed_draws` found.

    Attributes:
      problem: the same problem on fixed draws.
      y: the run's, or the minimisers on the draws, stacked, where each has its own.
      draws: how many there are of each level.
      upper, lower: the sampling error of a change of F (where y follows) and of f by one unit, relative to that change.
    """

    problem: Problem
    y: PyTree
    draws: int
    upper: float
    lower: float


def fixed_draws(
    problem: Problem, x: PyTree, y: PyTree, start: tuple[PyTree, PyTree], resolve: float, step: int = 0
) -> Fixed | str:
    """The problem on fixed draws, as many as a relative difference of `resolve` needs, or as can be afforded.

    A string: why there are none. `step` is that of keys which reach a loss.
    """
    if of_one_step(problem.sources[1]):
        return _separate_draws(problem, x, y, start, resolve, step)
    try:
        most = _affordable(problem, x, y, step)
        if isinstance(most, str):
            return most

        def of(count: int) -> tuple[Problem, tuple[float, float]]:
            found = _drawn(problem, count, step)
            return found, _errors(found, units_of_variables(found, x, y, *start), x, y)

        count, found, (upper, lower) = _chosen(of, most, resolve)
    except (TypeError, ValueError, NotImplementedError) as error:  # what a loss does cannot be batched
        return f"the losses cannot be evaluated on several draws at once ({type(error).__name__})"
    # F is compared where y is the minimiser on these draws, which is off by what they leave of f's slope.
    upper += lower * max(1.0, optax.tree.size(y) ** 0.5 / (2 * _ERRORS))
    return Fixed(found, y, count, upper, lower)


def _affordable(problem: Problem, x: PyTree, y: PyTree, step: int, separate: bool = False) -> int | str:
    """The most draws that can be afforded, or why none can."""
    found = _drawn(problem, 1, step, separate)
    y = _copies(y, 1) if separate else y
    one = sum(traffic(jax.make_jaxpr(level)(x, y).jaxpr) for level in found.full_levels())
    held = [source.arrays for source in found.sources if isinstance(source, Draws)]
    size = sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(held))
    if size * _FEWEST > _HELD:
        return f"a draw holds {size / 2**20:.3g} MiB, of which several are too many"
    return max(_FEWEST, min(_MOST, _BYTES // max(one, 1)))


def _chosen(of: Any, most: int, resolve: float) -> tuple[int, Any, tuple[float, float]]:
    """How many draws `resolve` needs, at most `most`; what `of` makes of as many, and their errors."""
    count = min(_FIRST, most)
    found, errors = of(count)
    worst, asked = max(errors), count
    if worst == 0:
        asked = min(_FEWEST, most)
    elif np.isfinite(worst) and worst > resolve / 2:
        asked = int(min(most, np.ceil(count * (2 * worst / resolve) ** 2)))
    if asked != count:
        count, (found, errors) = asked, of(asked)
    return count, found, errors


def _separate_draws(
    problem: Problem, x: PyTree, y: PyTree, start: tuple[PyTree, PyTree], resolve: float, step: int
) -> Fixed | str:
    """`fixed_draws` where each draw is a lower level of its own."""
    names = ("project_lower", "prox_lower", "constraint", "equality", "upper_constraint", "upper_equality")
    bound = next((name for name in names if getattr(problem, name) is not None), None)
    if bound is not None:
        return f"each draw (data.Shared) is a lower level of its own, and {bound}= binds one y"
    if isinstance(problem.sources[0], Streamed):
        return "each draw (data.Shared) is a lower level of its own, and the upper level's data are a stream"
    most = _UNKNOWNS // optax.tree.size(y)
    if most < _FEWEST:
        return (
            f"each draw (data.Shared) is a lower level of its own, and {_FEWEST} of {optax.tree.size(y):,} unknowns "
            "each are too many"
        )
    try:
        affordable = _affordable(problem, x, y, step, separate=True)
        if isinstance(affordable, str):
            return affordable

        def of(count: int) -> tuple[tuple[Problem, PyTree], tuple[float, float]]:
            found = _drawn(problem, count, step, separate=True)
            solved = _solved(found, x, _copies(y, count))
            lengths = units_of_variables(found, x, solved, start[0], _copies(start[1], count))
            mean, error = (np.asarray(part, float) for part in _followed(found, x, solved, moves(x, y, lengths)[0]))
            return (found, solved), (_relative(np.abs(mean), error, y), 0.0)

        count, (found, y), (upper, lower) = _chosen(of, min(most, affordable), resolve)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"the losses cannot be evaluated on several draws at once ({type(error).__name__})"
    return Fixed(found, y, count, upper, lower)


def _copies(y: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), y)


def _minimisers(problem: Problem, x: PyTree, y: PyTree) -> PyTree:
    """That of f(x, .) on each draw, by Newton steps from these y."""
    lower = problem.full_lower()

    def one(of: tuple[PyTree, PyTree]) -> PyTree:
        batch, y = of
        return Newton(60, cg_steps=100)(lower.on(batch), x, LowerState(y, None)).y

    return jax.lax.map(one, (lower.batch, y))


_solved = _compiling.jit(_minimisers)


@_compiling.jit
def _followed(problem: Problem, x: PyTree, y: PyTree, away: PyTree) -> tuple[jax.Array, jax.Array]:
    """After each move of x, each y following: the mean change of F over the draws, and its standard error."""
    upper = problem.full_upper()

    def after(move: PyTree) -> tuple[jax.Array, jax.Array]:
        there = optax.tree.add(x, move)
        there = there if upper.project is None else upper.project(there)
        values = upper.each(there, _minimisers(problem, there, y)) - upper.each(x, y)
        return jnp.mean(values), jnp.std(values, ddof=1) / values.shape[0] ** 0.5

    return jax.lax.map(after, away)


def _drawn(problem: Problem, count: int, step: int, separate: bool = False) -> Problem:
    base = as_step_key(_SEED, step)
    upper, lower = problem.sources
    found: dict[str, Any] = {}
    for name, source, tag in (("upper_data", upper, Draw.UPPER), ("lower_data", lower, Draw.LOWER)):
        if isinstance(source, Streamed):
            found[name] = Draws(source.items, source.whole_stream)
        elif source.redrawn or separate:
            arrays = _stacked(source, base.fold_in(tag), np.arange(count)) if source.given else None
            found[name] = Draws(arrays, separate=separate, given=source.given)
    return dataclasses.replace(problem, **found)


@_compiling.jit
def _stacked(source: Source, key: StepKey, numbers: jax.Array) -> PyTree:
    def one(i: jax.Array) -> PyTree:
        return source.full(StepKey(jax.random.fold_in(key.base, i), key.step, key.stream))

    return jax.lax.map(one, numbers)


def _errors(problem: Problem, lengths: tuple[Any, Any], x: PyTree, y: PyTree) -> tuple[float, float]:
    """The sampling errors of changes by one unit, relative to these."""
    found = []
    for source, (mean, error) in zip(problem.sources, _spread(problem, x, y, moves(x, y, lengths)), strict=True):
        mean, error = np.abs(np.asarray(mean, float)), np.asarray(error, float)
        if not isinstance(source, Draws) or source.exact:
            found.append(0.0)
        else:
            found.append(_relative(mean, error, y))
    return found[0], found[1]


def _relative(mean: np.ndarray, error: np.ndarray, y: PyTree) -> float:
    """The sampling error of a change by one unit, of changes by several moves and their standard errors."""
    usable = np.isfinite(mean) & np.isfinite(error)
    if not usable.any():  # of a single draw nothing is known
        return np.inf
    unit = float(np.median(mean[usable]))
    typical = _ERRORS * float(np.median(error[usable]))
    rounding = 10 * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y))).eps)
    relative = typical / unit if unit > 0 else (np.inf if typical > 0 else 0.0)
    return relative if relative > rounding else 0.0


@_compiling.jit
def _spread(
    problem: Problem, x: PyTree, y: PyTree, away: tuple[PyTree, PyTree]
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Of each level, after each move: the mean change over the draws, and its standard error."""
    upper, lower = problem.full_levels()

    def change(level: Any, there: tuple[PyTree, PyTree]) -> tuple[jax.Array, jax.Array]:
        if not level.source.averaged:
            return jnp.zeros(()), jnp.zeros(())
        values = level.each(*there) - level.each(x, y)
        return jnp.mean(values), jnp.std(values, ddof=1) / values.shape[0] ** 0.5

    def after(move: tuple[PyTree, PyTree]) -> Any:
        there_x, there_y = optax.tree.add(x, move[0]), optax.tree.add(y, move[1])
        there_x = there_x if upper.project is None else upper.project(there_x)
        there_y = there_y if lower.project is None else lower.project(there_y)
        return change(upper, (there_x, there_y)), change(lower, (x, there_y))

    return jax.lax.map(after, away)
