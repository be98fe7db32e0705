"""LV-HBA: a single-loop first-order method for lower levels with coupled constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import curvature, projections
from bilevel._module import hyperparameters, state
from bilevel.constraints import Constraints, is_affine
from bilevel.keys import StepKey
from bilevel.level import Level
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty import _base
from bilevel.solvers.penalty._base import SMOOTH, norm, rate, share_at_cap
from bilevel.solvers.penalty._joint import Joint, JointState, lower_scale, slopes, watching
from bilevel.solvers.penalty._schedule import Continuation, as_schedule
from bilevel.typing import Metrics, PyTree, Scalar


@state
class LVHBAState(JointState):
    """A joint state (theta, lam: the approximate saddle point of the proximal Lagrangian), and projections' memory."""

    projection: jax.Array  # (p,), the dual variable that the next projection on C starts from
    factor: jax.Array  # (p, p) where C is affine and equalities alone: its projection's cached factor, else (0, 0)


@hyperparameters
class LVHBA(Joint):
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
    project on; a multiplier exists. Oracle calls a step: 2 f_y and 2 products J'v in the saddle step (half of it
    without `extragradient`), 1 gradient of F, 2 of f in (x, y), 1 product J'v, 1 projection on C; on full batches one
    Hessian-vector product every ten steps watches the curvature (`init` spends some 90 on its first estimate). With
    alpha set by hand there is none.

    All rows together are scaled to the spectral norm of f's curvature in y at the start, so that a multiplier is a
    distance, as many steps away as theta is; `gamma2`, `beta` and the metrics are those of rows of norm one.

    Attributes:
      alpha, beta, eta: steps; None: from the curvature L of f, L_F of F and |B'| of the saddle operator,
        alpha = min(1 / (2 L + L_F / c), 0.6 eta), beta = 0.3 gamma2, eta = 0.75 / |B'|, followed on full batches.
      gamma1, gamma2: proximal parameters; None: 3 / L and 30 L with L the curvature of f in y.
      penalty: a schedule (`Continuation`, `Polynomial(c0, p)` as published) or a number.
      cap: r, a distance. `multiplier_at_cap` tells where it binds.
      extragradient: False: one simultaneous step, as published; stable only for small eta.
      project: the projection on C, `(x, y) -> (x, y)`. None: exact by a cached factor where C is affine, else through
        the dual (`projections.dual`), with linearised rows where they are nonlinear (C must be convex).
      projection_steps: the most steps of the latter.

    The default step rules and values are ours: the published ones do not converge on the paper's own second toy problem
    (`benchmarks/constrained.py`). The publication scales no rows, takes c_k = c0 (k+1)^p, p < 1/2, and does not
    extrapolate.

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

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> LVHBAState:
        """Scale the rows, project the start on C, and estimate the curvatures."""
        refuse(self, problem, x, honours=SMOOTH, instead="solvers.MEHA")
        upper, lower = problem.levels(key)
        rows = Constraints(lower, x, y).at(x, y)
        zeros, together = jnp.zeros((rows.count,), rows.dtype), jnp.ones((), rows.dtype)
        if rows.count:
            # All rows together to norm one, or many parallel rows would dictate a short saddle step.
            together = jnp.maximum(curvature.jacobian_norm(lambda u: rows(*u), (x, y)), 1.0)
            rows = rows.times(1 / together)
        factor = jnp.zeros((0, 0), rows.dtype)
        if self._exact(problem, rows, x, y):
            factor = projections.dual_factor(lambda u: rows(*u), lambda u: problem.projected(*u), (x, y))
        (x, y), projection = self._project(problem, rows, (x, y), zeros, factor, 1.0)
        L = {
            "f": curvature.hessian_norm(lambda u: lower(*u), (x, y)),
            "F": curvature.hessian_norm(lambda u: upper(*u), (x, y)),
            "f_yy": curvature.hessian_norm(lambda y: lower(x, y), y),
        }
        # The one scaling from here on: rows as steep as f is curved.
        unit = lower_scale(L)
        rows, factor, projection = rows.times(unit), factor / unit**2, projection / unit
        L |= {"f0": L["f"], "unit": unit, "rows": unit / together}
        saddle = proximal_saddle(lower, rows, (x, y), zeros, *self._gammas(L))
        L["B"] = L["B0"] = curvature.jacobian_norm(lambda p: saddle(*p), (y, zeros))
        path = as_schedule(self.penalty).init((x, y), _base.ratio(L["F"], L["f"]))
        duals, watch = {"lam": zeros, "z": zeros}, watching(problem, (x, y), self.alpha is None)
        return LVHBAState((x, y), y, duals, path, rows.scale, L, watch, projection, factor)

    def step(self, problem: Problem, state: LVHBAState, key: StepKey) -> tuple[LVHBAState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), z, c, L = state.point, state.duals["z"], state.path.penalty, state.curvatures
        rows = Constraints(lower, x, y, state.scale)
        gamma1, gamma2 = self._gammas(L)

        # 1. The saddle point (theta, lam).
        saddle = proximal_saddle(lower, rows, (x, y), z, gamma1, gamma2)
        eta = 0.75 / L["B"] if self.eta is None else self.eta
        start = (state.theta, state.duals["lam"])
        theta, lam, steepness = self._saddle_step(problem, rows, saddle, start, eta, L)

        # 2. The joint step on C; y must not outrun theta, which its own proximal term holds it away from.
        def gap(x: PyTree, y: PyTree) -> Scalar:
            near = optax.tree.norm(optax.tree.sub(theta, y), squared=True) / (2 * gamma1)
            v = lower(x, theta) + jnp.vdot(lam, rows(x, theta)) + near - jnp.sum((lam - z) ** 2) / (2 * gamma2)
            return lower(x, y) - v

        found = slopes(upper, gap, x, y)
        state = state.followed(key, lambda x, y: lower(x, y) + jnp.vdot(lam, rows(x, y)), found)
        L = state.curvatures | {"B": steepness}
        alpha = jnp.minimum(1 / (2 * L["f"] + L["F"] / c), 0.6 * eta) if self.alpha is None else self.alpha
        descent = _base.limited((x, y), optax.tree.scale(-alpha, found.along(c)))
        target = optax.tree.add((x, y), descent)
        point, projection = self._project(problem, rows, target, state.projection, state.factor, L["unit"])
        point = _base.kept_inside(problem, upper, lower, (x, y), point)

        # 3. The multiplier variable.
        beta = 0.3 * gamma2 if self.beta is None else self.beta / L["unit"] ** 2
        new_z = rows.clip(z + beta * (lam - z) / gamma2, self.cap)

        new = state.stepped(point, theta, {"lam": lam, "z": new_z}, curvatures=L, projection=projection)
        # Multipliers' errors are gradient errors where rows have norm one, while psi itself is flat in z.
        joint, dual = rate(point, (x, y), alpha), L["unit"] * gamma2 * rate(new_z, z, beta)
        inner = rate((theta, lam), start, eta)
        said = {"violation": rows.violation(*point) / L["rows"], "multiplier_at_cap": share_at_cap(lam, self.cap)}
        return self.close(new, key, found, (joint, dual, inner), inner, **said)

    def _saddle_step(
        self, problem: Problem, rows: Constraints, saddle: Any, start: PyTree, eta: Any, L: dict[str, jax.Array]
    ) -> tuple[PyTree, jax.Array, Scalar]:
        """theta and lam after an (extra)gradient step from `start`, and what is known of the operator's curvature."""

        def forward(forces: PyTree) -> tuple[PyTree, jax.Array]:
            theta, lam = optax.tree.add_scale(start, -eta, forces)
            return problem.projected(None, theta)[1], rows.clip(lam, self.cap)

        forces = saddle(*start)
        halfway = forward(forces)
        if not self.extragradient:
            return *halfway, L["B"]
        there = saddle(*halfway)
        new = forward(there)
        if problem.stochastic:
            return *new, L["B"]
        gone, change = norm(optax.tree.sub(halfway, start)), optax.tree.sub(there, forces)
        steepness = curvature.secant_estimate(L["B"], L["B0"], change, gone, norm(start))
        # A step that proves longer than the operator allows is not taken: the next one is shorter.
        theta, lam = jax.tree.map(lambda new, old: jnp.where(eta * steepness < 1, new, old), new, start)
        return theta, lam, steepness

    def _gammas(self, L: dict[str, jax.Array]) -> tuple[Any, Any]:
        """The proximal parameters, the second one for the rows as they are scaled."""
        scale = lower_scale(L)
        gamma1 = 3 / scale if self.gamma1 is None else self.gamma1
        return gamma1, (30 * scale if self.gamma2 is None else self.gamma2) / L["unit"] ** 2

    def _exact(self, problem: Problem, rows: Constraints, x: PyTree, y: PyTree) -> bool:
        if self.project is not None or not rows.count or bool(rows.inequality.any()) or rows.count > 2000:
            return False
        return is_affine(rows.raw, x, y) and is_affine(lambda x, y: problem.projected(x, y), x, y)

    def _project(
        self, problem: Problem, rows: Constraints, u: PyTree, start: jax.Array, factor: jax.Array, unit: Any
    ) -> tuple[PyTree, jax.Array]:
        """The projection on C and the dual variable to start the next one from; `unit`: the rows' norm."""
        if self.project is not None:
            return self.project(*u), start
        both = lambda u: problem.projected(*u)  # noqa: E731
        c = lambda u: rows(*u)  # noqa: E731
        if not rows.count:
            return both(u), start
        if factor.size:
            return projections.affine(c, both, factor, u), start
        options = {"steps": self.projection_steps, "linearisations": 1 if is_affine(rows.raw, *u) else 4}
        return projections.dual(c, rows.inequality, both, u, start, tol=1e-7 * unit, **options)


def proximal_saddle(
    lower: Level, rows: Constraints, point: PyTree, z: jax.Array, gamma1: Any, gamma2: Any
) -> Callable[[PyTree, jax.Array], tuple[PyTree, jax.Array]]:
    """B(theta, lam) at (x, y, z): the gradient of the proximal Lagrangian in theta, minus that in lam."""
    x, y = point

    def operator(theta: PyTree, lam: jax.Array) -> tuple[PyTree, jax.Array]:
        def lagrangian(theta: PyTree) -> tuple[Scalar, jax.Array]:
            value = rows(x, theta)
            return lower(x, theta) + jnp.vdot(lam, value), value

        gradient, value = jax.grad(lagrangian, has_aux=True)(theta)
        return optax.tree.add_scale(gradient, 1 / gamma1, optax.tree.sub(theta, y)), (lam - z) / gamma2 - value

    return operator
