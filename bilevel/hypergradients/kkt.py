"""Implicit differentiation of a constrained lower level, through its conditions of optimality."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel import derivatives
from bilevel._module import hyperparameters, name_of
from bilevel.constraints import Constraints, Equalities, is_affine
from bilevel.hypergradients._base import Estimate
from bilevel.level import Level
from bilevel.lower import Accurate, EqualityDescent, Function, Identity, LowerState
from bilevel.problem import ProblemError
from bilevel.typing import LowerSolver, PyTree


@hyperparameters
class ActiveSet:
    """GAM's hypergradient: the KKT system of the active constraints, a subgradient where activity is about to change.

        (y, lam) = solution and multipliers of the lower level,     L = f + lam . c
        A = {i : lam_i > eps, or an equality},     W = {i not in A : c_i > -eps}
        [ L_yy  J_A' ] [w]   [F_y]
        [ J_A    0   ] [q] = [ 0 ],         gradient for A = F_x - L_xy w - (J_A)_x' q

    and the estimate is the shortest convex combination of the gradients for A and for A + W. c are rows of norm one.

    For f strongly convex in y and convex constraints with linearly independent active gradients, Y the whole space. The
    lower solver must remember multipliers, as `lower.Accurate` does; they are carried here. Per call: the lower solve
    and two dense systems of size m + p, which over a mesh every device has whole.

    Attributes:
      eps: what counts as weakly active.

    The publication takes the gradients of all subsets of W (2^|W| of them); here the two extreme ones. h is not smooth:
    at a kink the direction can be short without x being optimal for a first-order method with a constant step.

    Reference: Xu, Zhu, "Efficient Gradient Approximation Method for Constrained Bilevel Optimization", AAAI 2023.
    """

    honours: ClassVar[tuple[str, ...]] = ("constraint", "equality")
    settles: ClassVar[tuple[str, ...]] = ("lower_residual", "violation")

    eps: float = 1e-4

    def init(self, lower: Level, x: PyTree, y: PyTree) -> jax.Array:
        """Zero multipliers, in the user's units."""
        rows = Constraints(lower, x, y)
        return jnp.zeros((rows.count,), rows.dtype)

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: jax.Array
    ) -> Estimate:
        """The estimate at x."""
        if carry.size:
            self._refuse(solver, lower, x, start.y, carry)
            solved = solver(lower, x, LowerState(start.y, carry))
            y, given, memory = solved.y, solved.memory, start.memory
        else:  # no rows: whatever the solver remembers is its own
            solved = solver(lower, x, start)
            y, given, memory = solved.y, carry, solved.memory
        rows = Constraints(lower, x, y).at(x, y)
        lam = given / rows.scale

        value, (F_x, F_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        flat, unravel = ravel_pytree(y)
        lagrangian = lambda x, y: lower(x, y) + jnp.vdot(lam, rows(x, y))  # noqa: E731
        hessian = jax.hessian(lambda u: lagrangian(x, unravel(u)))(flat)
        jacobian = jax.jacobian(lambda u: rows(x, unravel(u)))(flat)
        right = jnp.concatenate([ravel_pytree(F_y)[0], jnp.zeros_like(lam)])

        def gradient(active: jax.Array) -> tuple[PyTree, jax.Array]:
            masked = jnp.where(active[:, None], jacobian, 0.0)
            system = jnp.block([[hessian, masked.T], [masked, jnp.diag(jnp.where(active, 0.0, 1.0))]])
            solution = jnp.linalg.lstsq(system, right, rcond=1e2 * float(jnp.finfo(rows.dtype).eps))[0]
            w, q = unravel(solution[: flat.size]), jnp.where(active, solution[flat.size :], 0.0)
            through = jax.vjp(lambda x: rows(x, y), x)[1](q)[0]
            left = jnp.linalg.norm(right - system @ solution)
            return optax.tree.sub(F_x, optax.tree.add(derivatives.cross_product(lagrangian, x, y, w), through)), left

        strong = (lam > self.eps) | ~rows.inequality
        weak = (rows(x, y) > -self.eps) & ~strong
        (a, left), (b, _) = gradient(strong), gradient(strong | weak)
        apart = optax.tree.sub(b, a)
        share = -derivatives.dot(a, apart) / jnp.maximum(derivatives.dot(apart, apart), 1e-30)
        shortest = optax.tree.add_scale(a, jnp.clip(share, 0.0, 1.0), apart)
        steep = jnp.linalg.norm(right)
        metrics = {
            "lower_loss": lower(x, y),
            "lower_residual": derivatives.norm(jax.grad(lagrangian, argnums=1)(x, y)),
            "violation": rows.violation(x, y),
            "weakly_active": jnp.sum(weak).astype(value.dtype),
            "linear_residual": left,
            "linear_error": left / jnp.where(steep > 0, steep, 1),
        }
        return Estimate(value, shortest, LowerState(y, memory), given, metrics)

    @staticmethod
    def _refuse(solver: LowerSolver, lower: Level, x: PyTree, y: PyTree, carry: jax.Array) -> None:
        """Raise a `ProblemError` where the solver's memory is something else than multipliers, or nothing: it would
        read them as what it remembers, or hand them back as they were."""
        if isinstance(solver, Accurate):
            return
        multipliers = lambda memory: [jnp.shape(leaf) for leaf in jax.tree.leaves(memory)] == [carry.shape]  # noqa: E731
        begun = solver.init(y).memory
        remembers = multipliers(begun)
        if begun is None:
            remembers = multipliers(jax.eval_shape(lambda y: solver(lower, x, LowerState(y, None)), y).memory)
        if not remembers:
            raise ProblemError(
                f"ActiveSet needs a lower solver that finds the {carry.size} multipliers of the constraints and "
                f"remembers them, and {name_of(solver)} does not: take lower.Accurate(), as in "
                "value_and_hypergradient(problem, hypergradients.ActiveSet(), lower.Accurate()), or solvers.GAM()."
            )

    def multipliers(self, lower: Level, x: PyTree, y: PyTree, carry: jax.Array) -> dict[str, PyTree]:
        """The lower level's multipliers, shaped like the constraints' outputs."""
        return Constraints(lower, x, y).multipliers(carry)


@hyperparameters
class NullSpace:
    """AiPOD's hypergradient under an equality c(x, y) = A y + h(x) - b = 0 with a constant A.

        w = V (V' f_yy V)^-1 V' F_y,   V a basis of the null space of A        (conjugate gradients with the projector)
        dF/dx = F_x - f_xy w - c_x' A^{+T} (F_y - f_yy w)

    The term -c_x' A^{+T} F_y is missing from the public code; without it the hypergradient is wrong by its own size.

    For f strongly convex on the null space of A; no inequalities, Y the whole space. The lower solver is one that stays
    on the equality, such as `lower.EqualityDescent`. Per call: the lower solve, a gradient of F, up to `linear_steps`
    Hessian-vector products, 1 cross product, and a factorisation of A A'. A is dense, and over a mesh every device has
    the whole of it.

    Attributes:
      linear_steps: the most CG steps, from the last w.

    Reference: Xiao, Shen, Yin, Chen, "Alternating Projected SGD for Equality-constrained Bilevel Optimization",
    AISTATS 2023.
    """

    honours: ClassVar[tuple[str, ...]] = ("equality",)
    settles: ClassVar[tuple[str, ...]] = ("lower_residual", "violation")

    linear_steps: int = 50

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """w starts at zero."""
        if lower.equality is None:
            raise ProblemError(
                "NullSpace (AiPOD) is for lower levels with an equality constraint, and the problem has none. "
                "Take solvers.AID instead."
            )
        rows = Constraints(lower, x, y)
        if not is_affine(lambda y: rows.raw(x, y), y):
            raise ProblemError(
                "NullSpace (AiPOD) needs an equality that is affine in y with a constant matrix, and this is not (by "
                "its trace). Take solvers.BiCGAFFA instead."
            )
        return optax.tree.zeros_like(y)

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate:
        """The estimate at x."""
        inner: Any = solver
        while hasattr(inner, "solver"):  # lower.Relative
            inner = inner.solver
        ours = type(inner).__module__.startswith("bilevel.lower.")
        if ours and not isinstance(inner, (Accurate, EqualityDescent, Function, Identity)):
            raise ProblemError(
                f"NullSpace needs a lower solver that stays on the equality, and {name_of(inner)} would ignore it: "
                "take lower.Accurate(), as in value_and_hypergradient(problem, hypergradients.NullSpace(), "
                "lower.Accurate()), or lower.EqualityDescent()."
            )
        found = solver(lower, x, start)
        if start.memory is None:  # multipliers of lower.Accurate, which begins without: every call has one form
            found = LowerState(found.y, None)
        y = found.y
        rows = Equalities.of(lower, x, y)
        value, (F_x, F_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        local = derivatives.linearised(lower, x, y)

        def reduced(v: PyTree) -> PyTree:
            """V V' f_yy V V', and the identity across, where rounding leads: else CG divides zero by zero there."""
            along = rows.along(v)
            return optax.tree.add(rows.along(local.hvp(along)), optax.tree.sub(v, along))

        tol = max(1e-10, float(jnp.finfo(value.dtype).eps))
        w, _ = jax.scipy.sparse.linalg.cg(reduced, rows.along(F_y), x0=carry, maxiter=self.linear_steps, tol=tol)
        w = rows.along(w)
        cross, product = local.products(w)
        q = rows.inverse @ rows.push(optax.tree.sub(F_y, product))
        through = jax.vjp(lambda x: Constraints(lower, x, y).raw(x, y), x)[1](q)[0]

        metrics = {
            "lower_loss": local.value,
            "lower_residual": derivatives.norm(rows.along(local.gradient_y)),
            "violation": derivatives.norm(optax.tree.sub(y, rows.onto(y))),
        }
        return Estimate(value, optax.tree.sub(optax.tree.sub(F_x, cross), through), found, w, metrics)

    def multipliers(self, lower: Level, x: PyTree, y: PyTree, carry: PyTree) -> dict[str, PyTree]:
        """The lower level's multipliers, shaped like the equality's outputs."""
        rows = Equalities.of(lower, x, y)
        return Constraints(lower, x, y).multipliers(-rows.inverse @ rows.push(lower.gradient(x, y)))
