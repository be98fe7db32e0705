"""The check at the end of a run, the same for all families of solvers: is y what the result says it is?

A search (`thorough`, or `quick` where there are no constraints) measures the end with means of its own, nothing of them
shared with the method; `verdict` reads measures and metrics by the rows of a table, in order, and gives the result and
its sentence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.constraints import Constraints
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

Measures = dict[str, float]


# ---------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a verdict is read from.

    Attributes:
      measures: of the search: `lower_loss`, `polished_gap`, `polished_violation`, `polished_change`, as far as
        measured.
      metrics: of the run's last step.
      tol: the tolerance that the run was given, or None; `asked` that or 1e-3.
      result: what the run ended by.
      weight: the lower level's weight in the search, over the upper loss; `heavier`: over the run's penalty.
      eps: the resolution of y's dtype.
      least: no gap below this, relative to the lower loss, counts.
    """

    measures: Measures
    metrics: dict[str, float]
    tol: float | None
    result: Result
    weight: float = 0.0
    eps: float = 0.0
    least: float = 1e-3

    @property
    def asked(self) -> float:
        """The tolerance to judge by."""
        return 1e-3 if self.tol is None else self.tol

    @property
    def scale(self) -> float:
        """The unit of differences of F."""
        return 1 + min(abs(self.metrics.get("upper_loss", 0.0)), LARGE)

    @property
    def gap(self) -> float:
        """How far below f(x, y) the search came."""
        return self.measures["polished_gap"]

    @property
    def broken(self) -> float:
        """What the search could not repair of the constraints."""
        return self.measures.get("polished_violation", 0.0)

    @property
    def change(self) -> float:
        """F where the lower level weighs more, less F."""
        return self.measures.get("polished_change", 0.0)

    @property
    def lower_scale(self) -> float:
        """The unit of differences of f."""
        here = self.measures["lower_loss"]
        return 1 + min(abs(here), abs(here - self.gap))

    @property
    def lower(self) -> bool:
        """Whether the search came lower by more than the tolerance and the dtype allow."""
        return not np.isfinite(self.gap) or self.gap > max(10 * self.asked, self.least) * self.lower_scale

    @property
    def undecided(self) -> bool:
        """Whether F at this x depends on how much the lower level weighs."""
        noise = 1e3 * self.eps * self.weight * abs(self.measures["lower_loss"])
        return self.result is Result.CONVERGED and not abs(self.change) <= (10 * self.asked + noise) * self.scale

    @property
    def heavier(self) -> float:
        """How many times the run's penalty the search took."""
        return self.weight / max(self.metrics.get("penalty", 1.0), 1.0)

    @property
    def capped(self) -> float:
        """The share of multipliers that sit on their cap."""
        return self.metrics.get("multiplier_at_cap", 0.0)


class Row(NamedTuple):
    """One row: where `holds`, a result among `instead_of` becomes `result`, and `says` is added to the reason."""

    holds: Callable[[Findings], bool]
    instead_of: Collection[Result]
    result: Result
    says: Callable[[Findings], str]


_CONVERGED = (Result.CONVERGED,)
_ENDED = (Result.CONVERGED, Result.PENALTY_LIMITED)

# The first row that holds decides.
VERDICTS = (
    Row(
        lambda f: f.broken > max(1e-3, f.asked),
        (*_ENDED, Result.MAX_STEPS),
        Result.INFEASIBLE,
        lambda f: (
            "At this x no feasible lower-level y was found: "
            f"the best breaks a constraint by {f.broken:.2g} (scaled rows)."
        ),
    ),
    Row(
        lambda f: (
            f.result is Result.CONVERGED and f.tol is not None and f.metrics.get("violation", 0.0) > max(f.tol, 1e-3)
        ),
        _CONVERGED,
        Result.INFEASIBLE,
        lambda f: "",
    ),
    Row(
        lambda f: f.lower,
        _ENDED,
        Result.LOWER_LEVEL,
        lambda f: (
            f"An independent solve of the lower level reaches {f.gap:.3g} below f(x, y)"
            + (
                ": y is stationary and not its minimum. Start elsewhere (multistart)."
                if f.result is Result.CONVERGED
                else "."
            )
        ),
    ),
    Row(
        lambda f: f.undecided and f.change > 0,
        _CONVERGED,
        Result.PENALTY_LIMITED,
        lambda f: (
            f"With the lower level weighted {f.heavier:.0e} times more the upper loss at this x grows by "
            f"{f.change:.2g}: "
            "the lower level is too flat for this penalty. Raise it, or tighten the tolerance."
        ),
    ),
    Row(
        lambda f: f.undecided,
        _CONVERGED,
        Result.LOWER_LEVEL,
        lambda f: (
            f"Another y, as low in the lower loss, has an upper loss smaller by {-f.change:.2g}: the lower-level "
            "solution is not unique, and this method does not choose among solutions. Take F2BA, MEHA or LVHBA."
        ),
    ),
    Row(
        lambda f: (
            f.result is Result.MAX_STEPS
            and f.metrics.get("hypergradient_norm", np.inf) <= f.asked * f.scale < f.metrics.get("bias", 0.0)
        ),
        (Result.MAX_STEPS,),
        Result.PENALTY_LIMITED,
        lambda f: (
            f"The penalty's bias in the upper loss is about {f.metrics['bias']:.2g}: "
            "raise the penalty, or extrapolate in it (Continuation)."
        ),
    ),
)
# And each of these that holds is added to it.
REMARKS = (
    Row(
        lambda f: f.capped > 0,
        _CONVERGED,
        Result.PENALTY_LIMITED,
        lambda f: (
            f"{100 * f.capped:.0f}% of the multipliers sit on their cap: raise the cap; "
            "if they follow it, no multiplier exists."
        ),
    ),
)


def verdict(
    measures: dict[str, jax.Array],
    result: Result,
    metrics: dict[str, float],
    tol: float | None,
    weight: float = 0.0,
    least: float | None = None,
) -> tuple[Measures, Result, str]:
    """The measures as numbers, the result that they leave standing, and what is to be said about it.

    Args:
      measures: what a search found.
      result: what the run ended by.
      metrics: of its last step.
      tol: the run's tolerance, or None.
      weight: of the lower level in the search (`weight_of_lower`); 0: not varied.
      least: the smallest gap that counts, relative to the lower loss; None: the resolution of the dtype, or 1e-3
        without a tolerance.
    """
    eps = float(jnp.finfo(measures["lower_loss"].dtype).eps)
    least = least if least is not None else 1e-3 if tol is None else 100 * eps
    numbers = {name: float(value) for name, value in measures.items()}
    findings = Findings(numbers, metrics, tol, result, weight, eps, least)
    decided = next((row for row in VERDICTS if row.holds(findings)), None)
    rows = [row for row in (decided, *(row for row in REMARKS if row.holds(findings))) if row is not None]
    for row in rows:
        result = row.result if result in row.instead_of else result
    return numbers, result, " ".join(filter(None, (row.says(findings) for row in rows)))


# ---------------------------------------------------------------- the searches


def scattered(y: PyTree, i: Any) -> PyTree:
    """Start number i = 1, 2, ... around y: noise of three sizes in turn, on y's scale. 0: y itself."""
    leaves, structure = jax.tree.flatten(y)
    spread = jnp.where(i == 0, 0.0, 0.3 * 3.0 ** (i % 3))
    moved = [
        leaf
        + spread
        * (1 + jnp.sqrt(jnp.mean(leaf**2)))
        * jax.random.normal(jax.random.fold_in(jax.random.key(i), j), leaf.shape, leaf.dtype)
        for j, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, moved)


def weight_of_lower(problem: Problem, y: PyTree, metrics: dict[str, float], tol: float | None) -> float:
    """How much more than F the lower level is to weigh in the search: a million times the run's penalty, as far as the
    dtype resolves F's share. 0: it is not varied, since no weight is much above the penalty's, or there is a prox."""
    asked, eps = 1e-3 if tol is None else tol, float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y))).eps)
    c = max(float(metrics.get("penalty", 1.0)), 1.0)
    weight = min(1e6 * c, asked * (1 + min(abs(metrics.get("upper_loss", 0.0)), LARGE)) / (1e3 * eps))
    return weight if weight > 10 * c and problem.prox_lower is None else 0.0


def thorough(problem: Problem, x: PyTree, y: PyTree, weight: float) -> dict[str, Scalar]:
    """Lower solves by augmented Lagrangians with line searches.

    They start at y and, up to 10,000 unknowns, at seven other points.

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
