"""Implicit differentiation: solve the lower level, then one linear system."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives, linear
from bilevel._arguments import explained
from bilevel._module import hyperparameters
from bilevel.hypergradients._base import Estimate
from bilevel.level import Level
from bilevel.lower import LowerState
from bilevel.lower.scaled import curvature_at, inverse_curvature, unknown_curvature
from bilevel.typing import LowerSolver, PyTree


@hyperparameters
class Implicit:
    """The hypergradient by the implicit function theorem at the y that the lower solver finds.

        dF/dx = F_x - f_xy v,        f_yy v = F_y

    With a projection or a prox on the lower level the solution is a fixed point of the forward-backward map
    T(x, y) = prox(y - step f_y(x, y)), and

        dF/dx = F_x + (d_x T)' w,    (I - d_y T)' w = F_y,

    a system that is not symmetric.

    Attributes:
      linear_solver: any of `bilevel.linear`. None: `linear.Robust(tol)` (not symmetric with a projection or prox; for
        up to 256 unknowns with as many iterations, before it takes the system as a matrix), to a relative residual of
        eps^(3/4) of y's dtype (6e-6 in float32, 2e-12 in float64): CG or GMRES where f_yy is regular, else a
        least-squares solution. `linear.Identity(scale)` makes it Jacobian-free (T1-T2), `linear.Neumann` a truncated
        series.
        A `linear.TaskCG` is taken where y is stacked over tasks along a leading axis of every leaf, each shaped like x
        (and the ordinary `linear.CG` of the same numbers where it is not).
      step: the step of the forward-backward map; only used with a projection or prox. Any positive number is exact,
        and near 1/L the system is best conditioned. None: 1/L, L = |f_yy| by power iteration (30 products at the start
        of a run, one for each outer step).

    Per call: the lower solve, one gradient of the upper level, one joint linearisation of the lower level, one HVP per
    iteration of the linear solver, one cross product. Assumes f_yy(x, y*) to be invertible (positive definite for CG),
    or F_y to be in its range. The error is O(|y - y*|) plus that of the linear solve.

    Metrics: `lower_loss` and `lower_residual`, f and |f_y| at the y found; `linear_residual` = |F_y - f_yy v| and
    `linear_error`, its share of |F_y|; `linear_iterations`; `negative_curvature`, 1 where the linear solver met a
    direction p with p'f_yy p < 0, so that y is no minimum.

    References: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016; Blondel et al.,
    "Efficient and Modular Implicit Differentiation", NeurIPS 2022 (the fixed-point form).
    """

    linear_solver: Any = None
    step: float | None = None

    def __post_init__(self) -> None:
        given = self.linear_solver
        if isinstance(given, type):
            raise TypeError(
                f"Implicit(linear_solver={given.__name__}) was given the class: write linear.{given.__name__}()."
            )
        if given is not None and not (hasattr(given, "init") and callable(given) and not _is_estimator(given)):
            raise TypeError(
                f"Implicit(linear_solver=...) takes a solver of bilevel.linear, such as linear.CG(), not a "
                f"{type(given).__name__}."
            )

    def _solver(self, nonsmooth: bool, x: PyTree, y: PyTree) -> Any:
        if isinstance(self.linear_solver, linear.TaskCG) and not _stacked(x, y):
            return linear.CG(**{name: getattr(self.linear_solver, name) for name in _KRYLOV})
        if self.linear_solver is None:
            tol = float(max(jnp.finfo(jnp.result_type(leaf)).eps for leaf in jax.tree.leaves(y))) ** 0.75
            # As a matrix, where Krylov methods have not solved it after as many steps as there are unknowns.
            few = optax.tree.size(y) <= linear.Robust.most_as_matrix
            steps = max(optax.tree.size(y), 100) if few else 100
            return linear.Robust(tol=tol, symmetric=not nonsmooth, max_steps=steps)
        if nonsmooth and getattr(self.linear_solver, "symmetric", False):
            raise ValueError(
                f"Implicit(linear_solver={type(self.linear_solver).__name__}(...)) assumes a symmetric system, but "
                "with a projection or prox on the lower level it is not: take linear.GMRES(), linear.BiCGStab(), "
                "linear.NormalCG() or linear.Dense(symmetric=False)."
            )
        return self.linear_solver

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """What the linear solver keeps between outer steps, its warm start and preconditioner, and an estimate of L."""
        kept = self._solver(lower.nonsmooth, x, y).init(y)
        return (kept, unknown_curvature(y)) if lower.nonsmooth and self.step is None else kept

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate:
        """The estimate at x."""
        found = solver(lower, x, start)
        y = found.y
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        linear_solver = self._solver(lower.nonsmooth, x, y)
        lin = derivatives.linearised(lower, x, y)
        loss = lin.value
        if lower.nonsmooth:
            step: Any = self.step
            known = None
            if self.step is None:
                carry, known = carry
                known = curvature_at(known, lower, x, y)
                step = inverse_curvature(known)
            moved = optax.tree.add_scale(y, -step, lin.gradient_y)
            new, pullback = jax.vjp(lambda x, moved: _backward(lower, x, moved, step), x, moved)

            def system(w: PyTree) -> PyTree:
                # I - d_y T', its two sides of the projection apart: step f_yy may be far below the rounding of 1.
                passed = pullback(w)[1]
                return optax.tree.add_scale(optax.tree.sub(w, passed), step, lin.hvp(passed))

            w, carry, info = linear_solver(system, upper_y, carry)
            carry = carry if known is None else (carry, known)
            through, passed = pullback(w)
            gradient = optax.tree.add(upper_x, optax.tree.add_scale(through, -step, lin.cross(passed)))
            slope = lambda y, moved, new, g: jnp.where(new == moved, g, (y - new) / step)  # noqa: E731
            residual = derivatives.norm(jax.tree.map(slope, y, moved, new, lin.gradient_y))
        else:
            v, carry, info = linear_solver(lin.hvp, upper_y, carry)
            gradient = optax.tree.sub(upper_x, lin.cross(v))
            residual = derivatives.norm(lin.gradient_y)
        steep = derivatives.norm(upper_y)
        metrics = {
            "lower_loss": loss,
            "lower_residual": residual,
            "linear_residual": info.residual,
            "linear_error": info.residual / jnp.where(steep > 0, steep, 1),
            "linear_iterations": info.iterations,
            "negative_curvature": info.negative_curvature.astype(residual.dtype),
        }
        return Estimate(value, gradient, found, carry, metrics)


_KRYLOV = ("tol", "max_steps", "warm_start", "damping")


def _is_estimator(given: Any) -> bool:
    return type(given).__module__.startswith(("bilevel.hypergradients", "bilevel.lower", "bilevel.solvers"))


def _stacked(x: PyTree, y: PyTree) -> bool:
    """Whether every leaf of y is some copies of that of x, as many in all of them."""
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=False))
    if len(jax.tree.leaves(x)) != len(jax.tree.leaves(y)):
        return False
    copies = {jnp.shape(b)[:1] for _, b in pairs}
    return len(copies) == 1 and all(jnp.ndim(b) and jnp.shape(b)[1:] == jnp.shape(a) for a, b in pairs)


@explained
def JacobianFree(step: float = 1.0) -> Implicit:
    """The inverse of the fixed-point system replaced by the identity, with one gradient step as the fixed-point map.

        dF/dx ~ F_x - step f_xy F_y

    A descent direction where the lower level is well conditioned; `Implicit(linear.Neumann(...))` adds terms to it.

    Reference: Fung et al., "JFB: Jacobian-Free Backpropagation for Implicit Networks", AAAI 2022.
    """
    return Implicit(linear.Identity(step), step=1.0)


def _backward(lower: Level, x: PyTree, moved: PyTree, step: Any) -> PyTree:
    """What projection and prox make of the point that the gradient step has moved to."""
    if lower.project is not None:
        moved = lower.project(moved)
    return moved if lower.prox is None else lower.prox(x, moved, step)
