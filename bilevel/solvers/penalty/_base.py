"""What the penalty methods share: the diagnostics, and when a run has ended."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import curvature as estimates
from bilevel import derivatives
from bilevel.problem import Problem
from bilevel.result import Result
from bilevel.solvers._base import scattered
from bilevel.solvers.penalty._constraints import Constraints
from bilevel.solvers.penalty._polish import solve_lower

PyTree = Any

norm = derivatives.norm
spectral_norm, curvature, operator_norm = estimates.spectral_norm, estimates.hessian_norm, estimates.jacobian_norm
secant, probed, random_like = estimates.secant_estimate, estimates.probe_estimate, estimates.unit_direction


def ratio(a: Any, b: Any) -> jax.Array:
    """a / b, one where b is nothing."""
    return jnp.where(b > 1e-12, a / jnp.where(b > 1e-12, b, 1.0), 1.0)


def limited(u: PyTree, step: PyTree) -> PyTree:
    """A step no longer than the variables' own size plus one (root mean square)."""
    size = max(optax.tree.size(u), 1) ** 0.5
    longest = size + norm(u)
    length = norm(step)
    return optax.tree.scale(jnp.where(length > longest, longest / jnp.where(length > 0, length, 1.0), 1.0), step)


def project_pair(problem: Problem, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    """(x, y) projected on X and on Y."""
    if problem.project_upper is not None and jax.tree.leaves(x):
        x = problem.project_upper(x)
    if problem.project_lower is not None:
        y = problem.project_lower(y)
    return x, y


class Diagnosed:
    """`status` and `finish`, the same for all members of the family.

    A member's metrics hold, in units of the upper loss F and its gradient:

      `upper_loss`       F at the point before the step.
      `hypergradient_norm`  the residual R_k: how far the penalised problem is from stationary (all its variables).
      `gap`              the member's own gap function, zero where y solves the lower level.
      `violation`        the largest scaled constraint value (about a distance).
      `penalty`          c.
      `bias`
          the estimated error in F that is due to a finite c: c times the gap, which bounds F* - F from below;
                         with Richardson the last change that it made.
      `multiplier_at_cap`  the share of multipliers that sit on their cap (methods with a cap).

    With a tolerance a run ends CONVERGED when residual, violation and bias are all within it, and PENALTY_LIMITED
    when only the bias is not and the penalty cannot grow any more. `finish` checks the end with means of its own, see
    there.
    """

    def status(self, state: Any, metrics: dict[str, jax.Array], tol: Any) -> jax.Array:
        """CONVERGED, PENALTY_LIMITED or 0 to go on; see the class."""
        scale = 1 + jnp.minimum(jnp.abs(metrics["upper_loss"]), _LARGE)
        settled = (metrics["hypergradient_norm"] <= tol * scale) & (metrics["violation"] <= tol)
        unbiased = metrics["bias"] <= tol * scale
        stuck = settled & ~unbiased & ~self._can_grow(state)
        return jnp.where(settled & unbiased, Result.CONVERGED.value, jnp.where(stuck, Result.PENALTY_LIMITED.value, 0))

    def _can_grow(self, state: Any) -> Any:
        return jnp.asarray(True)

    def finish(
        self, problem: Problem, state: Any, result: Result, metrics: dict[str, float], tol: float | None
    ) -> tuple[dict[str, float], Result, str]:
        """Check the end of a run with an independent solve of the lower level, from y and from other starts.

        Returns measures, the result and a sentence. `polished_gap` = f(x, y) - v(x) with v from an augmented Lagrangian
        with line searches, nothing of it shared with the method; `polished_violation`: what that solve could not
        repair; `polished_change`: F at the y that minimises F / c' + f from y, less F at y, for a c' a million times
        larger. A CONVERGED run becomes LOWER_LEVEL where another y is lower (or as low with a smaller F), INFEASIBLE
        where no y satisfies the constraints at this x, and PENALTY_LIMITED where F grows with c'. A run out of steps
        whose residual is small but whose bias is not becomes PENALTY_LIMITED.
        """
        asked = 1e-3 if tol is None else tol
        scale = 1 + min(abs(metrics.get("upper_loss", 0.0)), _LARGE)
        eps = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(state.y))).eps)
        c = max(float(metrics.get("penalty", 1.0)), 1.0)
        heavy = min(1e6 * c, asked * scale / (1e3 * eps))
        heavy = heavy if heavy > 10 * c and problem.prox_lower is None else 0.0
        starts = _STARTS if optax.tree.size(state.y) <= _MANY else 1
        found = _check(problem, state.x, state.y, 1 / heavy if heavy else 0.0, starts=starts)
        checked = {name: float(value) for name, value in found.items()}
        if not heavy:
            checked.pop("polished_change")
        here = checked["lower_loss"]
        lower_scale = 1 + min(abs(here), abs(here - checked["polished_gap"]))
        noise = 100 * eps * lower_scale
        room = max(10 * asked, 1e-3) if tol is None else max(10 * asked, noise)
        change = checked.get("polished_change", 0.0)
        said = []
        wrong = not np.isfinite(checked["polished_gap"]) or checked["polished_gap"] > room * lower_scale
        if checked["polished_violation"] > max(1e-3, asked):
            if result in (Result.CONVERGED, Result.PENALTY_LIMITED, Result.MAX_STEPS):
                result = Result.INFEASIBLE
            said.append(
                "At this x no feasible lower-level y was found: "
                f"the best breaks a constraint by {checked['polished_violation']:.2g} (scaled rows)."
            )
        elif metrics.get("violation", 0.0) > max(asked, 1e-3) and tol is not None and result is Result.CONVERGED:
            result = Result.INFEASIBLE
        elif wrong:
            if result in (Result.CONVERGED, Result.PENALTY_LIMITED):
                result = Result.LOWER_LEVEL
            said.append(f"An independent solve of the lower level reaches {checked['polished_gap']:.3g} below f(x, y).")
        elif result is Result.CONVERGED and not abs(change) <= (10 * asked + 1e3 * eps * heavy * abs(here)) * scale:
            result = Result.PENALTY_LIMITED if change > 0 else Result.LOWER_LEVEL
            said.append(
                f"With the lower level weighted {heavy / c:.0e} times more the upper loss at this x grows by {change:.2g}: "
                "the lower level is too flat for this penalty. Raise it, or tighten the tolerance."
                if change > 0
                else f"Another y, as low in the lower loss, has an upper loss smaller by {-change:.2g}: the lower-level "
                "solution is not unique, and this method does not choose among solutions. Take F2BA, MEHA or LVHBA."
            )
        elif result is Result.MAX_STEPS and metrics.get("hypergradient_norm", np.inf) <= asked * scale < metrics.get(
            "bias", 0.0
        ):
            result = Result.PENALTY_LIMITED
            said.append(
                f"The penalty's bias in the upper loss is about {metrics['bias']:.2g}: "
                "raise the penalty, or extrapolate in it (Continuation)."
            )
        if metrics.get("multiplier_at_cap", 0.0) > 0:
            said.append(
                f"{100 * metrics['multiplier_at_cap']:.0f}% of the multipliers sit on their cap: raise the cap; "
                "if they follow it, no multiplier exists."
            )
            if result is Result.CONVERGED:
                result = Result.PENALTY_LIMITED
        return checked, result, " ".join(said)

    def multipliers(self, problem: Problem, state: Any) -> dict[str, PyTree]:
        """The lower level's multipliers in the user's units (f + lam . g + mu . h), shaped like the constraints'
        outputs."""
        lower = problem.full_lower()
        rows = Constraints(problem, lower, state.x, state.y)
        if not rows.count:
            return {}
        return Constraints(problem, lower, state.x, state.y, state.scale).multipliers(state.lam)


_STARTS = 8
# Beyond this an upper loss is no scale for tolerances: a run that explodes would meet them all.
_LARGE = 1e6
_MANY = 10_000


@functools.partial(jax.jit, static_argnames="starts")
def _check(problem: Problem, x: PyTree, y: PyTree, nu: Any, starts: int) -> dict[str, jax.Array]:
    """f - v from the best of several lower solves: from y itself, and from points around it at three distances.

    One more solve, of f + nu F from y, says what F is where it can no longer buy anything from f.
    """
    lower, upper = problem.full_lower(), problem.full_upper()
    rows = Constraints(problem, lower, x, y)
    rows = rows.at(x, y)

    def solve_from(i: Any) -> Any:
        # F is not evaluated where it has no weight: the starts may lie outside its domain.
        def value(x: PyTree, y: PyTree) -> jax.Array:
            plain = lambda y: lower(x, y)  # noqa: E731
            return jax.lax.cond(i == starts, lambda y: lower(x, y) + (nu * upper(x, y)).astype(rows.dtype), plain, y)

        level = lower.with_loss(value)
        return solve_lower(
            level,
            rows,
            x,
            scattered(y, jnp.where(i == starts, 0, i)),
            tol=jnp.where(i == starts, jnp.minimum(1e-3 * nu, 1e-9), 1e-9),
        )

    # The last one is tilted.
    solved = jax.lax.map(solve_from, jnp.arange(starts + 1))
    tilted, solved = (jax.tree.map(lambda leaf, at=at: leaf[at], solved) for at in (starts, slice(0, starts)))
    value = jnp.where(jnp.isfinite(solved.value), solved.value, jnp.inf)
    feasible = solved.violation <= jnp.minimum(jnp.min(solved.violation) * 1.01 + 1e-6, 1.0)
    best = jnp.argmin(jnp.where(feasible, value, jnp.inf))
    # A point that breaks its constraints gains at most multiplier times excess by it; the gap is that of the
    # Lagrangian.
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
