"""A problem whose data have no end, on draws that are made once: the same problem to whoever looks at it.

With N draws of each such level the losses are means,

    F_N(x, y) = 1/N sum_i F(x, y; b_i),        f_N(x, y) = 1/N sum_i f(x, y; b_i),

and a difference between two points is known up to three standard errors of its mean over the draws (the same draws at
both points). What that error is of a change by one unit of the variables is measured, and N is chosen by it.
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
from bilevel.data import Draws, Source, Streamed
from bilevel.keys import Draw, StepKey, as_step_key
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
_SEED = 0x5EED


class Fixed(NamedTuple):
    """What `fixed_draws` found.

    Attributes:
      problem: the same problem on fixed draws.
      draws: how many there are of each level.
      upper, lower: the sampling error of a change of F (where y follows) and of f by one unit, relative to that change.
    """

    problem: Problem
    draws: int
    upper: float
    lower: float


def fixed_draws(
    problem: Problem, x: PyTree, y: PyTree, start: tuple[PyTree, PyTree], resolve: float, step: int = 0
) -> Fixed | str:
    """The problem on fixed draws, as many as a relative difference of `resolve` needs, or as can be afforded.

    A string: why there are none. `step` is that of keys which reach a loss.
    """
    if problem.sources[1].shared and problem.sources[1].redrawn:
        return "each draw (data.Shared) is a lower level of its own, and y belongs to the last"
    count = _FIRST
    try:
        found = _drawn(problem, 1, step)
        one = sum(traffic(jax.make_jaxpr(level)(x, y).jaxpr) for level in found.full_levels())
        held = [source.arrays for source in found.sources if isinstance(source, Draws)]
        size = sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(held))
        if size * _FEWEST > _HELD:
            return f"a draw holds {size / 2**20:.3g} MiB, of which several are too many"
        most = max(_FEWEST, min(_MOST, _BYTES // max(one, 1)))
        found = _drawn(problem, min(count, most), step)
        lengths = units_of_variables(found, x, y, *start)
        errors = _errors(found, lengths, x, y)
        worst = max(errors)
        if worst == 0:
            count = _FEWEST
        elif np.isfinite(worst) and worst > resolve / 2:
            count = int(min(most, np.ceil(count * (2 * worst / resolve) ** 2)))
        if min(count, most) != min(_FIRST, most):
            found = _drawn(problem, min(count, most), step)
            errors = _errors(found, lengths, x, y)
    except (TypeError, ValueError, NotImplementedError) as error:  # what a loss does cannot be batched
        return f"the losses cannot be evaluated on several draws at once ({type(error).__name__})"
    upper, lower = errors
    # F is compared where y is the minimiser on these draws, which is off by what they leave of f's slope.
    upper += lower * max(1.0, optax.tree.size(y) ** 0.5 / (2 * _ERRORS))
    return Fixed(found, min(count, most), upper, lower)


def _drawn(problem: Problem, count: int, step: int) -> Problem:
    base = as_step_key(_SEED, step)
    upper, lower = problem.sources
    found: dict[str, Any] = {}
    for name, source, tag in (("upper_data", upper, Draw.UPPER), ("lower_data", lower, Draw.LOWER)):
        if isinstance(source, Streamed):
            found[name] = Draws(source.items, source.whole_stream)
        elif source.redrawn:
            found[name] = Draws(_stacked(source, base.fold_in(tag), np.arange(count)))
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
        usable = np.isfinite(mean) & np.isfinite(error)
        if not isinstance(source, Draws) or source.exact:
            found.append(0.0)
            continue
        if not usable.any():  # of a single draw nothing is known
            found.append(np.inf)
            continue
        unit = float(np.median(mean[usable]))
        typical = _ERRORS * float(np.median(error[usable]))
        rounding = 10 * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y))).eps)
        relative = typical / unit if unit > 0 else (np.inf if typical > 0 else 0.0)
        found.append(relative if relative > rounding else 0.0)
    return found[0], found[1]


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
