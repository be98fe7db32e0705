"""AiPOD and E-AiPOD: implicit differentiation under linear equality constraints of the lower level."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import Diagnosed
from bilevel.solvers.penalty._constraints import Constraints, is_affine
from bilevel.solvers.penalty._value import ValueState, advance, begin, descend, upper_rule

PyTree = Any


@hyperparameters
class AiPOD(Diagnosed):
    """AiPOD, for c(x, y) = A y + h(x) - b = 0 with a constant A.

        y <- `lower_steps` steps  Proj_{c(x, .) = 0}(y - beta f_y)
        w = V (V' f_yy V)^-1 V' F_y,   V a basis of the null space of A
            (conjugate gradients with the projector)
        hypergradient = F_x - f_xy w - c_x' A^{+T} (F_y - f_yy w),      x <- Proj_X(x + upper_optimizer(hypergradient))

    The term -c_x' A^{+T} F_y is missing from the public code; without it the hypergradient is wrong by its own size.

    With `skip` < 1 it is E-AiPOD's lower level: the steps use a correction r and project with probability `skip` only,

        z = y - beta (f_y - r);   with probability skip:  y <- Proj(z - (beta / skip) r),
            r <- r + (skip / beta) (y - z);   else y <- z

    Problem class: f strongly convex on the null space of A; no inequalities, Y the whole space. Oracle calls a step:
    lower_steps f_y and projections, up to `linear_steps` Hessian-vector products, 1 gradient of F, 1 cross product.

    Attributes:
      lower_steps, lower_step: None: 1 / L_yy. The publication takes 5 steps of 0.1.
      linear_steps: the most CG steps.
      skip: the probability of projecting; 1 is AiPOD.
      upper_optimizer: None: `optimizers.spectral()` on full batches, Adam(0.01) on minibatches.

    Reference: Xiao, Shen, Yin, Chen, "Alternating Projected SGD for Equality-constrained Bilevel Optimization",
      AISTATS 2023.
    """

    lower_steps: int = 5
    lower_step: float | None = None
    linear_steps: int = 50
    skip: float = 1.0
    upper_optimizer: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.skip, float) and not 0 < self.skip <= 1:
            raise ValueError(f"AiPOD(skip={self.skip!r}): a probability in (0, 1].")

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> ValueState:
        """Factor A A'."""
        refuse(self, problem, x, honours=("equality", "project_upper"), instead="solvers.LVHBA or solvers.BiCGAFFA")
        if problem.equality is None:
            raise ProblemError(
                "AiPOD is for lower levels with an equality constraint, and the problem has none. "
                "Take solvers.AID instead."
            )
        rows = Constraints(problem, problem.draw_lower(key), x, y)
        if not is_affine(lambda y: rows.raw(x, y), y):
            raise ProblemError(
                "AiPOD needs an equality that is affine in y with a constant matrix, and this is not (by its trace). "
                "Take solvers.BiCGAFFA instead."
            )
        state = begin(problem, x, y, key, 1.0, upper_rule(problem, self.upper_optimizer), {})
        rows = Constraints(problem, problem.draw_lower(key), x, y, state.scale)
        matrix = jax.vmap(lambda q: _apply(rows, x, y, _transpose(rows, x, y, q)))(
            jnp.eye(rows.count, dtype=rows.dtype)
        )
        inverse = jnp.linalg.pinv(matrix, rtol=1e3 * jnp.finfo(rows.dtype).eps, hermitian=True)
        nought = optax.tree.zeros_like(y)
        inner = {"inverse": inverse, "correction": nought, "w": nought}
        y = _onto(rows, x, y, inverse)
        return ValueState((x, y), inner, state.upper, state.path, state.scale, state.lam, state.curvatures)

    def step(self, problem: Problem, state: ValueState, key: Any) -> tuple[ValueState, dict[str, jax.Array]]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), inverse = state.point, state.inner["inverse"]
        rows = Constraints(problem, lower, x, y, state.scale)
        beta = 1 / jnp.maximum(state.curvatures["f_yy"], 1e-12) if self.lower_step is None else self.lower_step

        def inner(carry: tuple[PyTree, PyTree], i: Any) -> tuple[tuple[PyTree, PyTree], None]:
            y, r = carry
            gradient = lower.redraw(i, self.lower_steps).gradient(x, y)
            if isinstance(self.skip, float) and self.skip == 1:
                return (_onto(rows, x, optax.tree.add_scale(y, -beta, gradient), inverse), r), None
            z = optax.tree.add_scale(y, -beta, optax.tree.sub(gradient, r))
            projected = _onto(rows, x, optax.tree.add_scale(z, -beta / self.skip, r), inverse)
            corrected = optax.tree.add_scale(r, self.skip / beta, optax.tree.sub(projected, z))
            now = jax.random.bernoulli(jax.random.fold_in(key.random, i), self.skip)
            return jax.tree.map(lambda a, b: jnp.where(now, a, b), (projected, corrected), (z, r)), None

        (y, r), _ = jax.lax.scan(inner, (y, state.inner["correction"]), jnp.arange(self.lower_steps))

        loss, (F_x, F_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        local = derivatives.linearised(lower, x, y)
        along = lambda v: optax.tree.sub(v, _transpose(rows, x, y, inverse @ _apply(rows, x, y, v)))  # noqa: E731
        reduced = lambda v: along(local.hvp(along(v)))  # noqa: E731
        w = jax.scipy.sparse.linalg.cg(reduced, along(F_y), x0=state.inner["w"], maxiter=self.linear_steps, tol=1e-10)[
            0
        ]
        w = along(w)
        cross, product = local.products(w)
        q = inverse @ _apply(rows, x, y, optax.tree.sub(F_y, product))
        gradient = optax.tree.sub(optax.tree.sub(F_x, cross), jax.vjp(lambda x: rows(x, y), x)[1](q)[0])

        rule = upper_rule(problem, self.upper_optimizer)
        new_x, memory, stationarity = descend(problem, rule, state, loss, gradient)
        path, memory = advance(1.0, rule, state, key, (new_x, y), memory, jnp.inf, (x, y))
        residual = derivatives.norm(along(local.gradient_y))
        lam = -(inverse @ _apply(rows, x, y, local.gradient_y))
        metrics = {
            "upper_loss": loss,
            "hypergradient_norm": stationarity,
            "lower_residual": residual,
            "gap": residual**2 * beta / 2,
            "violation": rows.violation(x, y),
            "penalty": jnp.ones_like(loss),
            "bias": residual,
        }
        new = {"inverse": inverse, "correction": r, "w": w}
        return ValueState((new_x, y), new, memory, path, state.scale, lam, state.curvatures), metrics


def _apply(rows: Constraints, x: PyTree, y: PyTree, v: PyTree) -> jax.Array:
    """A v."""
    return jax.jvp(lambda y: rows(x, y), (y,), (v,))[1]


def _transpose(rows: Constraints, x: PyTree, y: PyTree, q: jax.Array) -> PyTree:
    """A' q."""
    return jax.vjp(lambda y: rows(x, y), y)[1](q)[0]


def _onto(rows: Constraints, x: PyTree, y: PyTree, inverse: jax.Array) -> PyTree:
    """The projection of y on {c(x, .) = 0}."""
    return optax.tree.sub(y, _transpose(rows, x, y, inverse @ rows(x, y)))
