"""The local directions (D_x, D_y, D_v) of single-loop methods, from one batch of each level: the one joint direction.

Notation: F the upper and f the lower loss on a batch, v the variable of the linear system. At the solution f_yy v =
F_y, and the hypergradient is F_x - f_xy v. On levels that are many (stacked over agents or clients) all of it is each
agent's own, stacked.
"""

from __future__ import annotations

import jax
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters, state
from bilevel.hypergradients.stochastic import Neumann, check_series
from bilevel.level import Level
from bilevel.typing import PyTree, Scalar


@state
class Point:
    """The three variables, or a direction for each: x (upper), y (lower), v (linear system); None where it is no
    variable."""

    x: PyTree
    y: PyTree
    v: PyTree


@state
class Components:
    """What each level contributes: the terms of a direction, before they are put together by `combined`.

    Attributes:
      value: F(x, y) on the batch.
      lower: the lower level's terms, a `Point` of f_xy v, f_y and f_yy v.
      upper: the upper level's terms, a `Point` of F_x, None and F_y.
    """

    value: Scalar
    lower: Point
    upper: Point


def combined(lower: Point | None, upper: Point | None) -> Point:
    """The direction (F_x - f_xy v, f_y, f_yy v - F_y) from the two levels' terms, a tree without leaves being none."""
    nothing = Point(None, None, None)
    lower, upper = lower or nothing, upper or nothing
    return Point(_less(upper.x, lower.x), lower.y, _less(lower.v, upper.v))


def _less(a: PyTree, b: PyTree) -> PyTree:
    if not jax.tree.leaves(b):
        return a
    return optax.tree.sub(a, b) if jax.tree.leaves(a) else optax.tree.scale(-1, b)


@hyperparameters
class Joint:
    """One simultaneous step in all three variables.

        D_y = f_y,    D_v = f_yy v - F_y,    D_x = F_x - f_xy v

    One joint linearisation of the lower level gives f_y, f_yy v and f_xy v (the tangent of the joint gradient along v),
    and one gradient the upper level's share.
    """

    def start(self, y: PyTree) -> PyTree:
        """v = 0."""
        return optax.tree.zeros_like(y)

    def lower(self, lower: Level, at: Point) -> Point:
        """The lower level's terms."""
        lower_y, cross, hvp = derivatives.gradient_and_products(lower, at.x, at.y, at.v)
        return Point(cross, lower_y, hvp)

    def upper(self, upper: Level, at: Point) -> tuple[Scalar, Point]:
        """The upper level's value and terms."""
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(at.x, at.y)
        return value, Point(upper_x, None, upper_y)

    def components(self, upper: Level, lower: Level, at: Point) -> Components:
        """Both levels' terms."""
        value, terms = self.upper(upper, at)
        return Components(value, self.lower(lower, at), terms)

    def __call__(self, upper: Level, lower: Level, at: Point) -> tuple[Scalar, Point]:
        """F on its batch, and the direction."""
        parts = self.components(upper, lower, at)
        return parts.value, combined(parts.lower, parts.upper)


@hyperparameters
class Series:
    """A gradient in y and a hypergradient whose linear system is solved from scratch by a stochastic Neumann series.

        D_y = f_y,    D_x = F_x - f_xy w,    w ~ f_yy^{-1} F_y

    with, over K = `steps` batches B_1, ..., B_K of the lower level,

        w = eta sum_{k=0..K} prod_{j<=k} (I - eta f_yy(B_j)) F_y                  (`randomised=False`)
        w = K eta prod_{j<=P} (I - eta f_yy(B_j)) F_y,  P uniform on 0, ..., K-1  (`randomised=True`)

    The first has K + 1 terms, as in stocBiO, and the second the mean of K terms, as in BSA: it is unbiased for the
    first with K - 1 in the place of K, and not for the first with the same K.

    Attributes:
      step_size: eta, below 2/L.
      steps: K.
      randomised: draw the length of the product.

    Per call: 1 gradient and 1 cross product of f, 1 gradient of F, K HVPs (on average (K-1)/2 if randomised).

    References: Ghadimi, Wang, "Approximation Methods for Bilevel Programming", 2018 (randomised); Ji, Yang, Liang, ICML
    2021.
    """

    step_size: float = 0.1
    steps: int = 10
    randomised: bool = False

    def __post_init__(self) -> None:
        check_series("Series", self.step_size, self.steps, "terms")

    def start(self, y: PyTree) -> PyTree:
        """No variable of its own."""
        return None

    def __call__(self, upper: Level, lower: Level, at: Point) -> tuple[Scalar, Point]:
        """F on its batch, and the direction."""
        x, y = at.x, at.y
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        w = Neumann(self.step_size, self.steps, self.randomised)(lower, x, y, upper_y)
        lower_y, cross = derivatives.gradient_and_cross(lower, x, y, w)
        return value, Point(optax.tree.sub(upper_x, cross), lower_y, None)
