"""BVFSM: sequential minimisation of regularised value functions, for a nonconvex lower level."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers.penalty._base import Diagnosed
from bilevel.solvers.penalty._constraints import Constraints
from bilevel.solvers.penalty._polish import minimise
from bilevel.solvers.penalty._schedule import Polynomial, as_schedule
from bilevel.solvers.penalty._value import ValueState, advance, begin, descend, upper_rule

PyTree = Any


@hyperparameters
class BVFSM(Diagnosed):
    """BVFSM with an exterior quadratic penalty.

        z ~ argmin f(x, z) + (mu / 2) |z|^2,           v = f(x, z) + (mu / 2) |z|^2
        y ~ argmin F(x, y) + P(f(x, y) - v) + (theta / 2) |y|^2,        P(w) = (c / 2) max(w, 0)^2
        x <- Proj_X(x + upper_optimizer(F_x(x, y) + P'(f - v) (f_x(x, y) - f_x(x, z))))

    with mu = theta = regulariser / (k + 1)^power and c growing. Coupled constraints enter both inner problems as (c /
    2) |excess|^2.

    Problem class: f may be nonconvex, but z must then be its *global* minimiser: it is the best of `starts` solves,
    from the
    last z and from random points `spread` around it. Oracle calls a step: (starts + 1) inner solves of `inner_steps`
    steps.

    Attributes:
      penalty: c, a schedule or a number.
      regulariser, power: of the vanishing quadratic terms. The publication's .01 and 1.1.
      starts, spread: multi-start of z.
      inner_steps: L-BFGS (or projected) steps per inner solve.
      upper_optimizer: None: `optimizers.spectral()` on full batches, Adam(0.01) on minibatches.

    The publication offers barriers too. The public code's barrier is evaluated at a detached constant, so that its
    value does not see the constraint; that is not what is here. Accuracy is that of the quadratic penalty, O(c^-1/3)
    in y at worst.

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

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> ValueState:
        """Both lower variables start at y."""
        honours = ("constraint", "equality", "project_upper", "project_lower")
        refuse(self, problem, x, honours=honours, instead="solvers.MEHA")
        return begin(problem, x, y, key, self.penalty, self._rule(problem), {"z": y})

    def step(self, problem: Problem, state: ValueState, key: Any) -> tuple[ValueState, dict[str, jax.Array]]:
        """One iteration."""
        upper, lower = problem.levels(key)
        (x, y), c = state.point, state.path.penalty
        rows = Constraints(problem, lower, x, y, state.scale)
        mu = self.regulariser / (1.0 + jnp.asarray(key.step, c.dtype)) ** self.power

        def broken(x: PyTree, y: PyTree) -> jax.Array:
            return c / 2 * jnp.sum(rows.excess(x, y) ** 2)

        def regularised(z: PyTree) -> jax.Array:
            return lower(x, z) + broken(x, z) + mu / 2 * optax.tree.norm(z, squared=True)

        z = self._global(regularised, state.inner["z"], lower.project, key.random)
        v = regularised(z)

        def excess(x: PyTree, y: PyTree) -> jax.Array:
            return jnp.maximum(lower(x, y) - v, 0.0)

        def objective(y: PyTree) -> jax.Array:
            return upper(x, y) + c / 2 * excess(x, y) ** 2 + broken(x, y) + mu / 2 * optax.tree.norm(y, squared=True)

        # The better of two starts: where y was, and z.
        candidates = [minimise(objective, start, lower.project, None, self.inner_steps) for start in (y, z)]
        first = objective(candidates[0]) <= objective(candidates[1])
        y = jax.tree.map(lambda a, b: jnp.where(first, a, b), *candidates)

        weight = c * excess(x, y)
        gradient = jax.grad(
            lambda x: upper(x, y) + broken(x, y) - weight * broken(x, z) + weight * (lower(x, y) - lower(x, z))
        )(x)
        rule = self._rule(problem)
        new_x, memory, stationarity = descend(problem, rule, state, objective(y), gradient)
        loss, gap = upper(x, y), lower(x, y) - lower(x, z)
        path, memory = advance(self.penalty, rule, state, key, (new_x, y), memory, jnp.inf, (x, y))
        metrics = {
            "upper_loss": loss,
            "hypergradient_norm": stationarity,
            "lower_residual": derivatives.norm(jax.grad(regularised)(z))
            if lower.project is None
            else jnp.zeros_like(loss),
            "gap": gap,
            "violation": rows.violation(x, y),
            "penalty": c,
            "bias": c * gap**2 + weight * jnp.abs(gap) + mu * optax.tree.norm(y, squared=True),
        }
        return ValueState((new_x, y), {"z": z}, memory, path, state.scale, state.lam, state.curvatures), metrics

    def _rule(self, problem: Problem) -> Any:
        # The objective changes at every step; a rule that compares values with older ones would be misled.
        from bilevel.solvers.penalty._value import default_upper

        return upper_rule(problem, default_upper() if self.upper_optimizer is None else self.upper_optimizer)

    def _global(self, fn: Any, z: PyTree, project: Any, random: jax.Array) -> PyTree:
        def start(i: Any) -> PyTree:
            leaves, structure = jax.tree.flatten(z)
            spread = jnp.where(i == 0, 0.0, self.spread)
            noise = [
                jax.random.normal(jax.random.fold_in(jax.random.fold_in(random, i), j), leaf.shape, leaf.dtype)
                for j, leaf in enumerate(leaves)
            ]
            return jax.tree.unflatten(structure, [leaf + spread * n for leaf, n in zip(leaves, noise, strict=True)])

        found = jax.lax.map(lambda i: minimise(fn, start(i), project, None, self.inner_steps), jnp.arange(self.starts))
        values = jax.vmap(fn)(found)
        # Between equal minima the nearest: the first start wins ties within the values' resolution.
        values = values - jnp.where(jnp.arange(self.starts) == 0, 1e-6 * (1 + jnp.abs(values)), 0.0)
        best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
        return jax.tree.map(lambda leaf: leaf[best], found)

    def _can_grow(self, state: ValueState) -> Any:
        return as_schedule(self.penalty).grows(state.path)
