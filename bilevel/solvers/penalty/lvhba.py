"""LV-HBA: a single-loop first-order method for lower levels with coupled constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import projections
from bilevel._module import hyperparameters, state
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty import _base
from bilevel.solvers.penalty._base import Diagnosed, norm, project_pair
from bilevel.solvers.penalty._constraints import Constraints, is_affine
from bilevel.solvers.penalty._joint import lower_scale
from bilevel.solvers.penalty._schedule import Continuation, Path, Reported, as_schedule

PyTree = Any


@state
class LVHBAState(Reported):
    """The variables of LV-HBA and what sets its steps.

    Attributes:
      point: the iterate (x, y).
      theta, lam: the approximate saddle point of the proximal Lagrangian; z: the multiplier variable. lam and z,
        shape (p,), belong to the scaled rows: norm one together, times f's curvature (`LVHBA.multipliers` gives the
        user's).
      path: the penalty and what is extrapolated along it.
      scale: (p,), the rows' scale.
      curvatures: estimates for f, for F and for the saddle operator.
      dual, factor: memory of the projection on C.
      direction, moved, probe: the gap's last gradient and the length of the step since, and a direction of large
        curvature (they keep the curvature up to date).
    """

    point: PyTree
    theta: PyTree
    lam: jax.Array
    z: jax.Array
    path: Path
    scale: jax.Array
    curvatures: dict[str, jax.Array]
    dual: jax.Array
    factor: jax.Array
    direction: PyTree
    moved: jax.Array
    probe: PyTree


@hyperparameters
class LVHBA(Diagnosed):
    """LV-HBA, a Hessian-free single-loop method through the proximal Lagrangian value function of the lower level.

        v(x, y, z) = min over theta in Y, max over lam in Z of
                         f(x, theta) + lam . c(x, theta) + |theta - y|^2 / (2 gamma1) - |lam - z|^2 / (2 gamma2)
        minimise psi_c = F / c + f - v  over (x, y) in C = {x in X, y in Y, g <= 0, h = 0} and z in Z

    with Z = [0, r]^p, for equalities [-r, r]^p.

    One step, with B the saddle operator (the gradient in theta, minus that in lam):

        (theta, lam) <- Proj((theta, lam) - eta B(Proj((theta, lam) - eta B(theta, lam))))      extragradient
        (x, y)       <- Proj_C((x, y) - alpha (psi_x, psi_y))              theta and lam held (Danskin)
        z            <- Proj_Z(z + beta (lam - z) / gamma2)

    Problem class: f convex in y (the solution need not be unique) and weakly convex in (x, y); C convex and cheap to
    project on;
    a multiplier exists. Oracle calls a step: 2 f_y and 2 products J'v in the saddle step (half of it without
    `extragradient`), 1 gradient of F, 2 of f in (x, y), 1 product J'v, 1 projection on C; on full batches one
    Hessian-vector product every ten steps watches the curvature (`init` spends some 90 on its first estimate). With
    alpha set by hand there is none.

    Attributes:
      alpha, beta, eta: steps; None: from the curvature L of f, L_F of F and |B'| of the saddle operator,
        alpha = min(1 / (2 L + L_F / c), 0.6 eta), beta = 0.3 gamma2, eta = 0.75 / |B'|, all followed along the run
        for full batches.
      gamma1, gamma2: proximal parameters; None: 3 / L and 30 L with L the curvature of f in y.
      penalty: a schedule (`Continuation`, `Polynomial(c0, p)` as published) or a number.
      cap: r, for rows of norm one and in units of f's curvature in y: a distance. `multiplier_at_cap` tells where it
        binds.
      extragradient: False: one simultaneous step, as published; stable only for small eta.
      project: the projection on C, `(x, y) -> (x, y)`. None: exact by a cached factor where C is affine, else through
        the dual (`projections.dual`), with linearised rows where they are nonlinear (C must be convex).
      projection_steps: the most steps of the latter.

    The default step rules and values are ours: the published ones do not converge on the paper's own second toy
    problem (`benchmarks/constrained.py`). The publication scales no rows, takes c_k = c0 (k+1)^p, p < 1/2, and does
    not extrapolate.

    Reference: Yao, Yu, Zeng, Zhang, "Constrained Bi-Level Optimization: Proximal Lagrangian Value function Approach and
    Hessian-free Algorithm", ICLR 2024.
    """

    alpha: float | None = None
    beta: float | None = None
    eta: float | None = None
    gamma1: float | None = None
    gamma2: float | None = None
    penalty: Any = Continuation()
    cap: float = 1e5
    extragradient: bool = True
    project: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] | None = None
    projection_steps: int = 200

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> LVHBAState:
        """Scale the rows, project the start on C, and estimate the curvatures."""
        refuse(
            self,
            problem,
            x,
            honours=("constraint", "equality", "project_upper", "project_lower"),
            instead="solvers.MEHA",
        )
        upper, lower = problem.levels(key)
        rows = Constraints(problem, lower, x, y).at(x, y)
        dtype, count = rows.dtype, rows.count
        # All rows together to norm one, or many parallel rows would dictate a short saddle step.
        together = jnp.maximum(_base.operator_norm(lambda u: rows(*u), (x, y)), 1.0) if count else jnp.ones((), dtype)
        rows.scale = rows.scale / together
        factor = jnp.zeros((0, 0), dtype)
        if self._exact(problem, rows, x, y):
            factor = projections.dual_factor(lambda u: rows(*u), lambda u: project_pair(problem, *u), (x, y))
        zeros = jnp.zeros((count,), dtype)
        (x, y), dual = self._project(problem, rows, (x, y), zeros, factor)
        curvatures = {
            "f": _base.curvature(lambda u: lower(*u), (x, y)),
            "F": _base.curvature(lambda u: upper(*u), (x, y)),
            "f_yy": _base.curvature(lambda y: lower(x, y), y),
            "rows": together,
        }
        gamma1, gamma2 = self._gammas(curvatures)
        # In the saddle problem rows are in units of f's curvature: a multiplier as large as that times a distance is
        # then as many steps away as theta is.
        unit = lower_scale(curvatures)
        heavy = Constraints(problem, lower, x, y, rows.scale * unit)
        saddle = lambda p: _saddle(lower, heavy, x, y, zeros, gamma1, gamma2 / unit**2, *p)  # noqa: E731
        curvatures["B"] = _base.operator_norm(saddle, (y, zeros))
        curvatures |= {"f0": curvatures["f"], "B0": curvatures["B"], "unit": unit}
        nought = optax.tree.zeros_like((x, y))
        path = as_schedule(self.penalty).init((x, y), _base.ratio(curvatures["F"], curvatures["f"]))
        return LVHBAState(
            (x, y),
            y,
            zeros,
            zeros,
            path,
            heavy.scale,
            curvatures,
            dual,
            factor,
            nought,
            jnp.zeros((), dtype),
            _base.random_like((x, y)),
        )

    def step(self, problem: Problem, state: LVHBAState, key: Any) -> tuple[LVHBAState, dict[str, jax.Array]]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), z, curvatures, probe = state.point, state.z, dict(state.curvatures), state.probe
        unit = curvatures["unit"]
        rows = Constraints(problem, lower, x, y, state.scale)
        gamma1, gamma2 = self._gammas(curvatures)
        gamma2 = gamma2 / unit**2
        c = state.path.penalty
        adapts = not problem.stochastic

        # 1. The saddle point (theta, lam).
        def clipped(theta: PyTree, lam: jax.Array) -> tuple[PyTree, jax.Array]:
            return project_pair(problem, None, theta)[1], rows.clip(lam, self.cap)

        saddle = lambda p: _saddle(lower, rows, x, y, z, gamma1, gamma2, *p)  # noqa: E731
        eta = 0.75 / curvatures["B"] if self.eta is None else self.eta
        start = (state.theta, state.lam)
        forces = saddle(start)
        theta, lam = halfway = clipped(*optax.tree.add_scale(start, -eta, forces))
        if self.extragradient:
            there = saddle(halfway)
            theta, lam = clipped(*optax.tree.add_scale(start, -eta, there))
            if adapts:
                gone = norm(optax.tree.sub(halfway, start))
                curvatures["B"] = _base.secant(
                    curvatures["B"], curvatures["B0"], optax.tree.sub(there, forces), gone, norm(start)
                )
                # A step that proves longer than the operator allows is not taken: the next one is shorter.
                stable = eta * curvatures["B"] < 1
                theta, lam = jax.tree.map(lambda new, old: jnp.where(stable, new, old), (theta, lam), start)
        saddle_residual = norm(optax.tree.sub((theta, lam), start)) / eta

        # 2. The joint step on C.
        def gap(x: PyTree, y: PyTree) -> jax.Array:
            prox = optax.tree.norm(optax.tree.sub(theta, y), squared=True) / (2 * gamma1) - jnp.sum((lam - z) ** 2) / (
                2 * gamma2
            )
            return lower(x, y) - lower(x, theta) - jnp.vdot(lam, rows(x, theta)) - prox

        loss, upward = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        value, apart = jax.value_and_grad(gap, argnums=(0, 1))(x, y)
        if adapts and self.alpha is None:
            curved = lambda u: lower(*u) + jnp.vdot(lam, rows(*u))  # noqa: E731
            curvatures["f0"], probe = _base.probed(curved, (x, y), key.step, curvatures["f0"], probe)
            curvatures["f"] = _base.secant(
                curvatures["f"], curvatures["f0"], optax.tree.sub(apart, state.direction), 2 * state.moved, norm((x, y))
            )
            curvatures["f"] = jnp.maximum(curvatures["f"], curvatures["f0"])
        # y must not outrun theta, which its own proximal term holds it away from.
        alpha = (
            jnp.minimum(1 / (2 * curvatures["f"] + curvatures["F"] / c), 0.6 * eta)
            if self.alpha is None
            else self.alpha
        )
        descent = optax.tree.scale(-alpha, optax.tree.add_scale(apart, 1 / c, upward))
        target = optax.tree.add((x, y), _base.limited((x, y), descent))
        normal = Constraints(problem, lower, x, y, state.scale / unit)
        point, dual = self._project(problem, normal, target, state.dual, state.factor)

        # 3. The multiplier variable.
        beta = 0.3 * gamma2 if self.beta is None else self.beta / unit**2
        new_z = rows.clip(z + beta * (lam - z) / gamma2, self.cap)

        steps = optax.tree.sub(point, (x, y))
        # Multipliers' errors are gradient errors (rows have norm one), while psi itself is flat in z: |lam - z| / gamma2.
        z_residual = unit * norm(new_z - z) * gamma2 / beta
        residual = c * jnp.sqrt((norm(steps) / alpha) ** 2 + z_residual**2 + saddle_residual**2)
        slope = norm(upward)
        moved = norm((steps, optax.tree.sub((theta, lam), start), new_z - z))
        schedule = as_schedule(self.penalty)
        path = schedule.advance(state.path, key.step, point, residual / jnp.maximum(slope, 1e-30))
        bias = jnp.where(
            jnp.isfinite(path.change), jnp.minimum(slope * path.change, jnp.abs(c * value)), jnp.abs(c * value)
        )
        metrics = {
            "upper_loss": loss,
            "hypergradient_norm": residual,
            "lower_residual": saddle_residual,
            "gap": value,
            "violation": normal.violation(*point) * curvatures["rows"],
            "penalty": c,
            "bias": bias,
            "multiplier_at_cap": _share_at_cap(lam, self.cap),
        }
        new = LVHBAState(
            point, theta, lam, new_z, path, state.scale, curvatures, dual, state.factor, apart, moved, probe
        )
        return new, metrics

    def _can_grow(self, state: LVHBAState) -> Any:
        return as_schedule(self.penalty).grows(state.path)

    def _gammas(self, curvatures: dict[str, jax.Array]) -> tuple[Any, Any]:
        scale = lower_scale(curvatures)
        return 3 / scale if self.gamma1 is None else self.gamma1, 30 * scale if self.gamma2 is None else self.gamma2

    def _exact(self, problem: Problem, rows: Constraints, x: PyTree, y: PyTree) -> bool:
        if self.project is not None or not rows.count or bool(rows.inequality.any()) or rows.count > 2000:
            return False
        return is_affine(rows.raw, x, y) and is_affine(lambda x, y: project_pair(problem, x, y), x, y)

    def _project(
        self, problem: Problem, rows: Constraints, u: PyTree, dual: jax.Array, factor: jax.Array
    ) -> tuple[PyTree, jax.Array]:
        """The projection on C and the dual variable to start the next one from."""
        if self.project is not None:
            return self.project(*u), dual
        both = lambda u: project_pair(problem, *u)  # noqa: E731
        c = lambda u: rows(*u)  # noqa: E731
        if not rows.count:
            return both(u), dual
        if factor.size:
            return projections.affine(c, both, factor, u), dual
        rounds = 1 if is_affine(rows.raw, *u) else 4
        return projections.dual(c, rows.inequality, both, u, dual, steps=self.projection_steps, linearisations=rounds)


def _saddle(
    lower: Any,
    rows: Constraints,
    x: PyTree,
    y: PyTree,
    z: jax.Array,
    gamma1: Any,
    gamma2: Any,
    theta: PyTree,
    lam: jax.Array,
) -> Any:
    """B(theta, lam): the gradient of the proximal Lagrangian in theta, minus that in lam."""

    def lagrangian(theta: PyTree) -> tuple[jax.Array, jax.Array]:
        value = rows(x, theta)
        return lower(x, theta) + jnp.vdot(lam, value), value

    gradient, value = jax.grad(lagrangian, has_aux=True)(theta)
    return optax.tree.add_scale(gradient, 1 / gamma1, optax.tree.sub(theta, y)), (lam - z) / gamma2 - value


def _share_at_cap(lam: jax.Array, cap: Any) -> jax.Array:
    if not lam.size:
        return jnp.zeros((), lam.dtype)
    return jnp.mean((jnp.abs(lam) >= cap * (1 - 1e-6)).astype(lam.dtype))
