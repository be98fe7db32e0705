"""Hypergradients whose linear system is solved with a fresh minibatch per Hessian-vector product; SAMA's without any."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.hypergradients._base import Estimate, PyTree
from bilevel.lower import GradientDescent, Inner, LowerState, as_optimizer

__all__ = ["SAMA", "StochasticImplicit"]


@hyperparameters
class StochasticImplicit:
    """Implicit differentiation with K = `steps` stochastic Hessian-vector products, each on a batch B_j of its own.

        dF/dx ~ F_x - f_xy(B_0) v,      v ~ f_yy^{-1} F_y

    `warm_start=True` (AmIGO): SGD on the linear system from the last v, v <- v - eta (f_yy(B_j) v - F_y).
    `warm_start=False`, `randomised=False` (StocBiO): v = eta sum_{k=0..K} prod_{j<=k} (I - eta f_yy(B_j)) F_y.
    `warm_start=False`, `randomised=True` (BSA, TTSA): v = K eta prod_{j<=P} (I - eta f_yy(B_j)) F_y, P uniform on 0..K-1.

    Attributes:
      step_size: eta, below 2/L.
      steps: K.
      warm_start: keep v between outer steps.
      randomised: draw the length of the product instead of summing the products.

    Per call: the lower solve, 1 gradient of F, K HVPs (on average (K-1)/2 if randomised), 1 cross product. Bias of
    the series: (1 - eta mu)^(K+1), and the same for the randomised one.

    References: Ghadimi, Wang, 2018 (BSA, randomised); Ji, Yang, Liang, ICML 2021 (StocBiO); Arbel, Mairal, "Amortized
    Implicit Differentiation for Stochastic Bilevel Optimization", ICLR 2022 (AmIGO).
    """

    step_size: float = 0.1
    steps: int = 10
    warm_start: bool = False
    randomised: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.step_size, float) and not self.step_size > 0:
            raise ValueError(f"StochasticImplicit(step_size={self.step_size!r}): a step size is positive.")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"StochasticImplicit(steps={self.steps!r}): the number of products is a positive integer.")
        if self.warm_start and self.randomised:
            raise ValueError(
                "StochasticImplicit: a randomised product has no warm start; choose one of warm_start and randomised."
            )

    def init(self, lower: Any, x: PyTree, y: PyTree) -> PyTree:
        """v = 0 where it is kept."""
        if lower.project is not None or lower.prox is not None:
            raise ValueError(
                "StochasticImplicit assumes f_y = 0 at the solution; with a projection or prox on the lower level take Implicit."
            )
        return optax.tree.zeros_like(y) if self.warm_start else None

    def solve(self, lower: Any, x: PyTree, y: PyTree, b: PyTree, v: PyTree) -> PyTree:
        """v ~ f_yy^{-1} b; `v` is the warm start."""
        batches = lower.stream(1)

        def product(j: Any, p: PyTree) -> PyTree:
            return derivatives.hvp(batches.redraw(j, self.steps), x, y, p)

        def contracted(j: Any, p: PyTree) -> PyTree:
            return optax.tree.add_scale(p, -self.step_size, product(j, p))

        if self.warm_start:

            def descend(j: Any, v: PyTree) -> PyTree:
                return optax.tree.add_scale(v, -self.step_size, optax.tree.sub(product(j, v), b))

            return jax.lax.fori_loop(0, self.steps, descend, v)
        if self.randomised:
            length = jax.random.randint(lower.key.fold_in(2).random, (), 0, self.steps)
            return optax.tree.scale(self.steps * self.step_size, jax.lax.fori_loop(0, length, contracted, b))

        def term(j: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            p = contracted(j, carry[0])
            return p, optax.tree.add(carry[1], p)

        return optax.tree.scale(self.step_size, jax.lax.fori_loop(0, self.steps, term, (b, b))[1])

    def __call__(self, upper: Any, lower: Any, inner: Inner, x: PyTree, start: LowerState, carry: PyTree) -> Estimate:
        """The estimate at x."""
        found = jax.lax.stop_gradient(inner(x, start))
        y = found.y
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        v = self.solve(lower, x, y, upper_y, carry)
        last = lower.stream(3)
        lower_y, cross = derivatives.gradient_and_cross(last, x, y, v)
        metrics = {"lower_residual": derivatives.norm(lower_y)}
        return Estimate(value, optax.tree.sub(upper_x, cross), found, v if self.warm_start else None, metrics)


@hyperparameters
class SAMA:
    """The inverse Hessian taken for the derivative of the lower optimiser's update: no second derivatives of f at all.

        v = D F_y,   D = - d update / d gradient  at the last gradient and moments     (SGD: eta I; Adam: adaptive)
        dF/dx ~ F_x - [f_x(x, y + e v) - f_x(x, y - e v)] / (2 e),   e = radius / |v|

    The derivative of the update is taken exactly, by a `jvp` through the optax rule (the paper writes it out for Adam).

    Attributes:
      radius: the length of the perturbation e v, the paper's 1.0. None: the cross product f_xy v exactly, by a `jvp`.

    Needs a lower solver made of steps, `GradientDescent`. Per call: the lower solve, 1 gradient of F, 1 of f, 2 gradients in x.

    Reference: Choe et al., "Making Scalable Meta Learning Practical", NeurIPS 2023.
    """

    radius: float | None = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.radius, float) and not self.radius > 0:
            raise ValueError(
                f"SAMA(radius={self.radius!r}): the perturbation's length is positive, or None for the exact product."
            )

    def init(self, lower: Any, x: PyTree, y: PyTree) -> PyTree:
        """Nothing is kept."""
        return None

    def __call__(self, upper: Any, lower: Any, inner: Inner, x: PyTree, start: LowerState, carry: PyTree) -> Estimate:
        """The estimate at x."""
        if not isinstance(inner.solver, GradientDescent):
            raise ValueError(
                f"SAMA adapts to the lower optimiser and needs GradientDescent(...), not {type(inner.solver).__name__}."
            )
        found = jax.lax.stop_gradient(inner(x, start))
        y, rule = found.y, as_optimizer(inner.solver.optimizer)
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        lower_y = lower.gradient(x, y)
        adapted = jax.jvp(lambda g: rule.update(g, found.memory, y)[0], (lower_y,), (upper_y,))[1]
        # Adam's update has no derivative where a gradient has been zero all along (the root of a second moment of zero).
        v = jax.tree.map(lambda a, g: jnp.where((g == 0) & ~jnp.isfinite(a), 0, -a), adapted, lower_y)
        if self.radius is None:
            cross = derivatives.cross_product(lower, x, y, v)
        else:
            length = derivatives.norm(v)
            e = self.radius / jnp.maximum(length, jnp.finfo(length.dtype).tiny ** 0.5)
            plus = jax.grad(lower)(x, optax.tree.add_scale(y, e, v))
            minus = jax.grad(lower)(x, optax.tree.add_scale(y, -e, v))
            cross = optax.tree.scale(1 / (2 * e), optax.tree.sub(plus, minus))
        metrics = {"lower_residual": derivatives.norm(lower_y)}
        return Estimate(value, optax.tree.sub(upper_x, cross), found, None, metrics)
