"""The check at the end of a run, the same for all families of solvers: is y what the result says it is?

A search (`thorough`, or `quick` where there are no constraints) measures the end with means of its own, nothing of them
shared with the method; `verdict` reads measures and metrics by the rows of a table, in order, and gives the result and
its sentence.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.constraints import Constraints, random_like
from bilevel.lower import LBFGS
from bilevel.lower.accurate import Solved, augmented_lagrangian
from bilevel.problem import Problem
from bilevel.result import Result
from bilevel.typing import PyTree, Scalar

__all__ = ["LARGE", "MANY", "quick", "thorough", "verdict", "weight_of_lower"]

LARGE = 1e6
"""Beyond this an upper loss is no scale for tolerances: a run that explodes would meet them all."""
MANY = 10_000
"""The most lower unknowns for which other starts are tried."""
_STARTS = 8


# ---------------------------------------------------------------- the table


def verdict(
    measures: dict[str, jax.Array],
    result: Result,
    metrics: dict[str, float],
    tol: float | None,
    weight: float = 0.0,
    least: float | None = None,
) -> tuple[dict[str, float], Result, str]:
    """The measures as numbers, the result that they leave standing, and what is to be said about it.

    Args:
      measures: what a search found: `lower_loss`, `polished_gap`, `polished_violation`, `polished_change`, as far as
        measured.
      result: what the run ended by.
      metrics: of its last step.
      tol: the run's tolerance, or None (1e-3 then).
      weight: of the lower level in the search, over the upper loss (`weight_of_lower`); 0: not varied.
      least: the smallest gap that counts, relative to the lower loss; None: the resolution of the dtype, or 1e-3
        without a tolerance.
    """
    eps, asked = float(jnp.finfo(measures["lower_loss"].dtype).eps), 1e-3 if tol is None else tol
    least = least if least is not None else 1e-3 if tol is None else 100 * eps
    numbers = {name: float(value) for name, value in measures.items()}
    here, gap = numbers["lower_loss"], numbers["polished_gap"]
    broken, change = numbers.get("polished_violation", 0.0), numbers.get("polished_change", 0.0)
    bias, capped = metrics.get("bias", 0.0), metrics.get("multiplier_at_cap", 0.0)
    converged, ended = (Result.CONVERGED,), (Result.CONVERGED, Result.PENALTY_LIMITED)
    broke = metrics.get("violation", 0.0) > max(asked, 1e-3)

    scale = 1 + min(abs(metrics.get("upper_loss", 0.0)), LARGE)  # the unit of differences of F
    # Whether the search came lower by more than the tolerance and the dtype allow.
    lower = not np.isfinite(gap) or gap > max(10 * asked, least) * (1 + min(abs(here), abs(here - gap)))
    # Whether F at this x depends on how much the lower level weighs.
    noise = 1e3 * eps * weight * abs(here)
    undecided = result in converged and not abs(change) <= (10 * asked + noise) * scale
    settled = metrics.get("hypergradient_norm", np.inf) <= asked * scale
    elsewhere = ": y is stationary and not its minimum. Start elsewhere (multistart)."

    # The first row that holds decides: a result among the second column becomes the third, and the sentence is added.
    rows = (
        (
            broken > max(1e-3, asked),
            (*ended, Result.MAX_STEPS),
            Result.INFEASIBLE,
            "At this x no feasible lower-level y was found: "
            f"the best breaks a constraint by {broken:.2g} (scaled rows).",
        ),
        (result in converged and tol is not None and broke, converged, Result.INFEASIBLE, ""),
        (
            lower,
            ended,
            Result.LOWER_LEVEL,
            f"An independent solve of the lower level reaches {gap:.3g} below f(x, y)"
            + (elsewhere if result in converged else "."),
        ),
        (
            undecided and change > 0,
            converged,
            Result.PENALTY_LIMITED,
            f"With the lower level weighted {weight / max(metrics.get('penalty', 1.0), 1.0):.0e} times more the upper "
            f"loss at this x grows by {change:.2g}: the lower level is too flat for this penalty. Raise it, or tighten "
            "the tolerance.",
        ),
        (
            undecided,
            converged,
            Result.LOWER_LEVEL,
            f"Another y, as low in the lower loss, has an upper loss smaller by {-change:.2g}: the lower-level "
            "solution is not unique, and this method does not choose among solutions. Take F2BA, MEHA or LVHBA.",
        ),
        (
            result is Result.MAX_STEPS and settled and asked * scale < bias,
            (Result.MAX_STEPS,),
            Result.PENALTY_LIMITED,
            f"The penalty's bias in the upper loss is about {bias:.2g}: raise the penalty, or extrapolate in it "
            "(Continuation).",
        ),
    )
    # And this one is added to it.
    remark = (
        capped > 0,
        converged,
        Result.PENALTY_LIMITED,
        f"{100 * capped:.0f}% of the multipliers sit on their cap: raise the cap; if they follow it, no multiplier "
        "exists.",
    )
    said = []
    for row in (next((row for row in rows if row[0]), None), remark):
        if row is not None and row[0]:
            result = row[2] if result in row[1] else result
            said.append(row[3])
    return numbers, result, " ".join(filter(None, said))


# ---------------------------------------------------------------- the searches


def scattered(y: PyTree, i: Any) -> PyTree:
    """Start number i = 1, 2, ... around y: noise of three sizes in turn, on y's scale. 0: y itself."""
    spread = jnp.where(i == 0, 0.0, 0.3 * 3.0 ** (i % 3))
    noise = random_like(jax.random.key(i), y)
    return jax.tree.map(lambda leaf, n: leaf + spread * (1 + jnp.sqrt(jnp.mean(leaf**2))) * n, y, noise)


def weight_of_lower(problem: Problem, y: PyTree, metrics: dict[str, float], tol: float | None) -> float:
    """How much more than F the lower level is to weigh in the search: a million times the run's penalty, as far as the
    dtype resolves F's share. 0: it is not varied, since no weight is much above the penalty's, or there is a prox."""
    asked, eps = 1e-3 if tol is None else tol, float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y))).eps)
    c = max(float(metrics.get("penalty", 1.0)), 1.0)
    weight = min(1e6 * c, asked * (1 + min(abs(metrics.get("upper_loss", 0.0)), LARGE)) / (1e3 * eps))
    return weight if weight > 10 * c and problem.prox_lower is None else 0.0


def thorough(problem: Problem, x: PyTree, y: PyTree, weight: float) -> dict[str, Scalar]:
    """Lower solves by augmented Lagrangians with line searches from y and, up to 10,000 unknowns, seven other points.

    `lower_loss` = f(x, y); `polished_gap` = f(x, y) - v(x), v the least value found; `polished_violation`: what that
    solve could not repair of the constraints; `polished_change`, with a `weight`: F at the y that minimises F / weight
    + f from y, less F at y.
    """
    starts = _STARTS if optax.tree.size(y) <= MANY else 1
    found = dict(_thorough(problem, x, y, 1 / weight if weight else 0.0, starts=starts))
    if not weight:
        found.pop("polished_change")
    return found


def quick(problem: Problem, x: PyTree, y: PyTree) -> dict[str, Scalar]:
    """`lower_loss` and `polished_gap` by L-BFGS from six points around y: no constraints, no projection, no prox."""
    here, lowest = _quick(problem, x, y)
    return {"lower_loss": here, "polished_gap": here - jnp.minimum(here, lowest)}


@jax.jit
def _quick(problem: Problem, x: PyTree, y: PyTree) -> tuple[Scalar, Scalar]:
    lower, solver = problem.full_lower(), LBFGS(100)

    def reached(i: jax.Array) -> Scalar:
        value = lower(x, solver(lower, x, solver.init(scattered(y, i))).y)
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    return lower(x, y), jnp.min(jax.lax.map(reached, jnp.arange(1, 7)))


@functools.partial(jax.jit, static_argnames="starts")
def _thorough(problem: Problem, x: PyTree, y: PyTree, nu: Any, starts: int) -> dict[str, Scalar]:
    upper, lower = problem.full_levels()
    rows = Constraints(lower, x, y).at(x, y)

    def solve_from(i: Any) -> Solved:
        # F is not evaluated where it has no weight: the starts may lie outside its domain.
        def value(x: PyTree, y: PyTree) -> Scalar:
            plain = lambda y: lower(x, y)  # noqa: E731
            return jax.lax.cond(i == starts, lambda y: lower(x, y) + (nu * upper(x, y)).astype(rows.dtype), plain, y)

        start = scattered(y, jnp.where(i == starts, 0, i))
        tol = jnp.where(i == starts, jnp.minimum(1e-3 * nu, 1e-9), 1e-9)
        return augmented_lagrangian(lower.with_loss(value), rows, x, start, tol=tol)

    # The last one is tilted.
    solved = jax.lax.map(solve_from, jnp.arange(starts + 1))
    tilted, solved = (jax.tree.map(lambda leaf, at=at: leaf[at], solved) for at in (starts, slice(0, starts)))
    value = jnp.where(jnp.isfinite(solved.value), solved.value, jnp.inf)
    feasible = solved.violation <= jnp.minimum(jnp.min(solved.violation) * 1.01 + 1e-6, 1.0)
    best = jnp.argmin(jnp.where(feasible, value, jnp.inf))
    # A point that breaks its constraints gains at most multiplier times excess by it: the gap is the Lagrangian's.
    multiplied = jnp.vdot(solved.multipliers[best], rows(x, y)) if rows.count else 0.0
    here, loss = lower(x, y), upper(x, y)
    gap = here + multiplied - value[best]
    if lower.prox is not None:
        # The nonsmooth term's value is not known, only its prox: half the squared proximal gradient stands for the gap.
        moved = lower.prox(optax.tree.sub(y, lower.gradient(x, y)), x, 1.0)
        moved = moved if lower.project is None else lower.project(moved)
        gap = optax.tree.norm(optax.tree.sub(y, moved), squared=True) / 2
    # Where y breaks constraints the other solve has to pay for them in F, too: no comparison then.
    fair = (tilted.violation < 1e-6) & (tilted.value <= here + nu * loss) & (rows.violation(x, y) < 1e-4)
    return {
        "lower_loss": here,
        "polished_gap": gap,
        "polished_violation": solved.violation[best],
        "polished_change": jnp.where(fair, upper(x, tilted.y) - loss, 0.0),
    }
