"""BVFSM: sequential minimisation of regularised value functions, for a nonconvex lower level."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.constraints import Constraints, random_like
from bilevel.keys import StepKey
from bilevel.lower.accurate import minimise
from bilevel.optimizers import Move, residual
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import SMOOTH, report
from bilevel.solvers.penalty._schedule import Polynomial
from bilevel.solvers.penalty._value import ValueMethod, ValueState, default_upper
from bilevel.typing import Metrics, PyTree, Scalar


@hyperparameters
class BVFSM(ValueMethod):
    """BVFSM with an exterior quadratic penalty.

        z ~ argmin f(x, z) + (mu / 2) |z|^2,           v = f(x, z) + (mu / 2) |z|^2
        y ~ argmin F(x, y) + P(f(x, y) - v) + (theta / 2) |y|^2,        P(w) = (c / 2) max(w, 0)^2
        x <- Proj_X(x + upper_optimizer(F_x(x, y) + P'(f - v) (f_x(x, y) - f_x(x, z))))

    with mu = theta = regulariser / (k + 1)^power and c growing. Both inner problems have (c / 2) |excess|^2 of coupled
    constraints.

    Problem class: f may be nonconvex, but z must then be its *global* minimiser: it is the best of `starts` solves,
    from the last z and from random points `spread` around it. Oracle calls a step: (starts + 2) inner solves of
    `inner_steps` steps.

    Attributes:
      penalty: c, a schedule or a number.
      regulariser, power: of the vanishing quadratic terms. The publication's .01 and 1.1.
      starts, spread: multi-start of z.
      inner_steps: L-BFGS (or projected) steps per inner solve.
      upper_optimizer: None: Adam(0.01).

    The publication offers barriers too. The public code's barrier is evaluated at a detached constant, so that its
    value does not see the constraint; that is not what is here. Accuracy is that of the quadratic penalty, O(c^-1/3) in
    y at worst.

    Reference: Liu, Liu, Zeng, Zhang, Zhang, "Value-Function-Based Sequential Minimization for Bi-Level Optimization",
    TPAMI 2023.
    """

    penalty: Any = Polynomial(10.0, 1.1, 1e6)
    regulariser: float = 0.01
    power: float = 1.1
    starts: int = 8
    spread: float = 3.0
    inner_steps: int = 50
    upper_optimizer: Any = None

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> ValueState:
        """Both lower variables start at y."""
        refuse(self, problem, x, honours=SMOOTH, instead="solvers.MEHA")
        return self.begin(problem, x, y, key, lambda lam, y: {"z": y})

    def step(self, problem: Problem, state: ValueState, key: StepKey) -> tuple[ValueState, Metrics]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c = state.point, state.path.penalty
        rows = Constraints(lower, x, y, state.scale)
        mu = self.regulariser / (1.0 + jnp.asarray(key.step, c.dtype)) ** self.power

        def broken(x: PyTree, y: PyTree) -> Scalar:
            return c / 2 * jnp.sum(rows.excess(x, y) ** 2)

        def regularised(z: PyTree) -> Scalar:
            return lower(x, z) + broken(x, z) + mu / 2 * optax.tree.norm(z, squared=True)

        z = self._global(regularised, state.inner["z"], lower.project, key.random)
        v = regularised(z)

        def excess(y: PyTree) -> Scalar:
            return jnp.maximum(lower(x, y) - v, 0.0)

        def objective(y: PyTree) -> Scalar:
            return upper(x, y) + c / 2 * excess(y) ** 2 + broken(x, y) + mu / 2 * optax.tree.norm(y, squared=True)

        # The better of two starts: where y was, and z.
        candidates = [minimise(objective, start, lower.project, None, self.inner_steps) for start in (y, z)]
        first = objective(candidates[0]) <= objective(candidates[1])
        y = jax.tree.map(lambda a, b: jnp.where(first, a, b), *candidates)

        weight = c * excess(y)

        def value(x: PyTree) -> Scalar:
            return upper(x, y) + broken(x, y) - weight * broken(x, z) + weight * (lower(x, y) - lower(x, z))

        gradient = jax.grad(value)(x)
        gap = lower(x, y) - lower(x, z)
        new = self.after(problem, state, key, (objective(y), gradient), y, {"z": z})
        inner = derivatives.norm(jax.grad(regularised)(z)) if lower.project is None else jnp.zeros_like(v)
        bias = c * gap**2 + weight * jnp.abs(gap) + mu * optax.tree.norm(y, squared=True)
        stationarity = residual(x, gradient, problem.project_upper)
        said = {"upper_loss": upper(x, y), "hypergradient_norm": stationarity, "lower_residual": inner}
        return new, report(new.path, **said, gap=gap, penalty=c, violation=rows.violation(x, y), bias=bias)

    def move(self, problem: Problem) -> Move:
        """How x moves: the objective changes at every step, and a rule that compares values would be misled by it."""
        rule = default_upper() if self.upper_optimizer is None else self.upper_optimizer
        return Move(rule, problem.project_upper)

    def _global(self, fn: Any, z: PyTree, project: Any, random: jax.Array) -> PyTree:
        def start(i: Any) -> PyTree:
            spread = jnp.where(i == 0, 0.0, self.spread)
            return jax.tree.map(lambda leaf, n: leaf + spread * n, z, random_like(jax.random.fold_in(random, i), z))

        found = jax.lax.map(lambda i: minimise(fn, start(i), project, None, self.inner_steps), jnp.arange(self.starts))
        values = jax.vmap(fn)(found)
        # Between equal minima the nearest: the first start wins ties within the values' resolution.
        values = values - jnp.where(jnp.arange(self.starts) == 0, 1e-6 * (1 + jnp.abs(values)), 0.0)
        best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
        return jax.tree.map(lambda leaf: leaf[best], found)
