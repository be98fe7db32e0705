"""Hypergradients from perturbed lower solves: no second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.hypergradients._base import Estimate, lower_metrics
from bilevel.keys import Draw
from bilevel.level import Level
from bilevel.lower import LowerState
from bilevel.optimizers import check_count
from bilevel.typing import LowerSolver, PyTree


@hyperparameters
class _Perturbing:
    through: ClassVar[bool] = True

    directions: int = 10
    mu: float = 0.01

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_count(owner, "at least one direction is needed", directions=self.directions)
        if isinstance(self.mu, float) and not self.mu > 0:
            raise ValueError(f"{owner}(mu={self.mu!r}): the perturbation's size is positive.")

    def init(self, lower: Level, x: PyTree, y: PyTree) -> jax.Array:
        """The number of estimates taken, which makes the directions fresh each time."""
        return jnp.zeros((), jnp.uint32)

    def _mean(self, lower: Level, x: PyTree, carry: jax.Array, change: Callable[[PyTree], jax.Array]) -> PyTree:
        """The mean of u change(x + mu u) / mu over standard normal u, other ones at every outer step."""
        key = jax.random.fold_in(lower.key.fold_in(Draw.DIRECTIONS).random, carry)
        normal = lambda key: optax.tree.random_like(key, x, jax.random.normal)  # noqa: E731
        u = jax.vmap(normal)(jax.random.split(key, self.directions))
        slopes = jax.vmap(lambda u: change(optax.tree.add_scale(x, self.mu, u)) / self.mu)(u)
        return jax.tree.map(lambda u: jnp.tensordot(slopes, u, axes=1) / self.directions, u)


@hyperparameters
class PZOBO(_Perturbing):
    """The lower solution's Jacobian by evolution strategies, the upper level's gradient by autodiff.

        delta_q = (y_T(x + mu u_q) - y_T(x)) / mu,    u_q ~ N(0, I)
        dF/dx ~ F_x + (1/Q) sum over q of u_q <delta_q, F_y>

    All Q + 1 lower runs start at the same y and see the same batches. Unbiased for the mu-smoothed Jacobian; the
    variance grows with dim x and falls with Q. Cost: Q + 1 lower runs (vmapped), one upper gradient.

    Attributes:
      directions: Q. The authors take one direction, uniform on the unit sphere, in the place of each normal one here,
        which has sqrt(dim x) times its length: their mu is that much larger than ours for the same perturbation.
      mu: the perturbation's size.

    Reference: Sow, Ji, Liang, "On the Convergence Theory for Hessian-Free Bilevel Algorithms", NeurIPS 2022.
    """

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate:
        """The estimate at x."""
        found = solver(lower, x, start)
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, found.y)
        change = lambda x: derivatives.dot(optax.tree.sub(solver(lower, x, start).y, found.y), upper_y)  # noqa: E731
        gradient = optax.tree.add(upper_x, self._mean(lower, x, carry, change))
        return Estimate(value, gradient, found, carry + 1, lower_metrics(lower, x, found.y))


@hyperparameters
class HOZOG(_Perturbing):
    """Zeroth order in the whole of h(x) = F(x, y_T(x)): for black-box lower solvers and losses without derivatives.

        dF/dx ~ (1/q) sum over i of u_i [h(x + mu u_i) - h(x)] / mu,    u_i ~ N(0, I)

    Cost: q + 1 lower runs (vmapped) and upper values. The variance grows with dim x.

    Attributes:
      directions: q.
      mu: the perturbation's size.

    Reference: Gu et al., "Optimizing Large-Scale Hyperparameters via Automated Learning Algorithm" (HOZOG), 2021.
    """

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate:
        """The estimate at x."""
        found = solver(lower, x, start)
        value = upper(x, found.y)
        gradient = self._mean(lower, x, carry, lambda x: upper(x, solver(lower, x, start).y) - value)
        return Estimate(value, gradient, found, carry + 1, {"lower_loss": lower(x, found.y)})
