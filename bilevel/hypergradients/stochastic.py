"""Hypergradients whose linear system is solved with a minibatch per Hessian-vector product, and SAMA's without any."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._forward import forward_only
from bilevel._module import hyperparameters
from bilevel._roots import with_roots
from bilevel.hypergradients._base import Estimate, central_difference, check_radius
from bilevel.keys import Draw
from bilevel.level import Level
from bilevel.lower import LowerState
from bilevel.optimizers import check_count
from bilevel.typing import LowerSolver, PyTree

__all__ = ["SAMA", "StochasticImplicit"]


_NO_REVERSE = (
    "No derivative goes back through a randomised product of Hessians (BSA, TTSA, randomised=True): its length is "
    "drawn. Take the summed series (StocBiO, randomised=False), or forward mode (jax.jacfwd)."
)


@hyperparameters
class Neumann:
    """w ~ f_yy^{-1} b by the series of `StochasticImplicit`, summed or (`randomised`) one of its terms."""

    step_size: float = 0.1
    steps: int = 10
    randomised: bool = False

    def __call__(self, lower: Level, x: PyTree, y: PyTree, b: PyTree) -> PyTree:
        """w, from batches of the level's stream PRODUCTS (the same ones at any x, y and b)."""
        batches = lower.stream(Draw.PRODUCTS)

        def contracted(j: Any, p: PyTree) -> PyTree:
            level = batches.redraw(j, self.steps)
            return optax.tree.add_scale(p, -self.step_size, derivatives.hvp(level, x, y, p))

        if self.randomised:
            length = jax.random.randint(lower.key.fold_in(Draw.LENGTH).random, (), 0, self.steps)
            product = forward_only(jax.lax.fori_loop(0, length, contracted, b), _NO_REVERSE)
            return optax.tree.scale(self.steps * self.step_size, product)

        def term(j: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            p = contracted(j, carry[0])
            return p, optax.tree.add(carry[1], p)

        return optax.tree.scale(self.step_size, jax.lax.fori_loop(0, self.steps, term, (b, b))[1])


def check_series(owner: str, step_size: Any, steps: Any, what: str = "products") -> None:
    """Raise a sentence where a series' step is not positive, or its number of products is not a positive integer."""
    if isinstance(step_size, float) and not step_size > 0:
        raise ValueError(f"{owner}(step_size={step_size!r}): a step size is positive.")
    check_count(owner, f"the number of {what} is a positive integer", steps=steps)


@hyperparameters
class StochasticImplicit:
    """Implicit differentiation with K = `steps` stochastic Hessian-vector products, each on a batch B_j of its own.

        dF/dx ~ F_x - f_xy(B_0) w,      w ~ f_yy^{-1} F_y

        AmIGO (`warm_start`):       w <- w - eta (f_yy(B_j) w - F_y), SGD on the linear system from the last w
        StocBiO:                    w = eta sum_{k=0..K} prod_{j<=k} (I - eta f_yy(B_j)) F_y
        BSA, TTSA (`randomised`):   w = K eta prod_{j<=P} (I - eta f_yy(B_j)) F_y, P uniform on 0, ..., K-1

    Attributes:
      step_size, steps: eta, below 2/L, and K.
      warm_start: keep w between outer steps.
      randomised: draw the length of the product instead of summing the products.

    Per call: the lower solve, 1 gradient of F, K HVPs (on average (K-1)/2 if randomised), 1 cross product. The
    series has K + 1 terms and the relative bias (1 - eta mu)^(K+1); the randomised product has the mean of K terms, one
    less, and the bias (1 - eta mu)^K. Both are as published.

    References: Ghadimi, Wang, "Approximation Methods for Bilevel Programming", 2018 (BSA); Ji, Yang, Liang, "Bilevel
    Optimization: Convergence Analysis and Enhanced Design", ICML 2021 (StocBiO); Arbel, Mairal, "Amortized Implicit
    Differentiation for Stochastic Bilevel Optimization", ICLR 2022 (AmIGO).
    """

    step_size: float = 0.1
    steps: int = 10
    warm_start: bool = False
    randomised: bool = False

    def __post_init__(self) -> None:
        check_series("StochasticImplicit", self.step_size, self.steps)
        if self.warm_start and self.randomised:
            what = "a randomised product has no warm start; choose one of warm_start and randomised."
            raise ValueError(f"StochasticImplicit: {what}")

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """w = 0 where it is kept."""
        if lower.nonsmooth:
            raise ValueError(
                "StochasticImplicit assumes f_y = 0 at the solution; with a projection or prox on the lower level take "
                "Implicit."
            )
        return optax.tree.zeros_like(y) if self.warm_start else None

    def solve(self, lower: Level, x: PyTree, y: PyTree, b: PyTree, w: PyTree) -> PyTree:
        """w ~ f_yy^{-1} b; `w` is the warm start."""
        if not self.warm_start:
            return Neumann(self.step_size, self.steps, self.randomised)(lower, x, y, b)
        batches = lower.stream(Draw.PRODUCTS)

        def descend(j: Any, w: PyTree) -> PyTree:
            product = derivatives.hvp(batches.redraw(j, self.steps), x, y, w)
            return optax.tree.add_scale(w, -self.step_size, optax.tree.sub(product, b))

        return jax.lax.fori_loop(0, self.steps, descend, w)

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate[Any]:
        """The estimate at x."""
        found = solver(lower, x, start)
        y = found.y
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        w = self.solve(lower, x, y, upper_y, carry)
        lower_y, cross = derivatives.gradient_and_cross(lower.stream(Draw.CROSS), x, y, w)
        metrics = {"lower_residual": derivatives.norm(lower_y)}
        return Estimate(value, optax.tree.sub(upper_x, cross), found, w if self.warm_start else None, metrics)


@hyperparameters
class SAMA:
    """The inverse Hessian taken for the derivative of the lower optimiser's update: no second derivatives of f at all.

        v = D F_y,   D = - d update / d gradient  at the last gradient and moments     (SGD: eta I; Adam: adaptive)
        dF/dx ~ F_x - [f_x(x, y + e v) - f_x(x, y - e v)] / (2 e),   e = radius / |v|

    The derivative of the update is taken exactly, by a `jvp` through the optax rule (the paper writes it out for Adam).

    Attributes:
      radius: the length of the perturbation e v, the paper's 1.0. None: the cross product f_xy v exactly, by a `jvp`.

    Needs a lower solver made of steps of an optax rule (`lower.GradientDescent`, `lower.MomentumSGD`). Per call: the
    lower solve, 1 gradient of F, 1 of f, 2 gradients in x.

    Reference: Choe et al., "Making Scalable Meta Learning Practical", NeurIPS 2023.
    """

    through: ClassVar[bool] = True

    radius: float | None = 1.0

    def __post_init__(self) -> None:
        check_radius("SAMA", self.radius)

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """Nothing is kept."""
        return None

    def __call__(
        self, upper: Level, lower: Level, solver: Any, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate[Any]:
        """The estimate at x."""
        if not hasattr(solver, "rule"):
            raise ValueError(
                "SAMA adapts to the lower optimiser and needs GradientDescent(...) or MomentumSGD(...), not "
                f"{type(solver).__name__}."
            )
        found = solver(lower, x, start)
        y, rule = found.y, solver.rule()
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        lower_y = lower.gradient(x, y)
        adapted = jax.jvp(lambda g: with_roots(rule.update)(g, found.memory, y)[0], (lower_y,), (upper_y,))[1]
        # Adam's update has no derivative where a gradient has been zero all along (the root of a zero second moment).
        v = jax.tree.map(lambda a, g: jnp.where((g == 0) & ~jnp.isfinite(a), 0, -a), adapted, lower_y)
        cross = central_difference(lower, x, y, v, self.radius)
        metrics = {"lower_residual": derivatives.norm(lower_y)}
        return Estimate(value, optax.tree.sub(upper_x, cross), found, None, metrics)
