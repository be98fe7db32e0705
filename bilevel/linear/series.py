"""Approximate inverses of a fixed cost: the Neumann series, Richardson's iteration and a multiple of the identity.

They are plain polynomials in H, and are differentiated as what they are (not as the solution they approximate).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel._module import hyperparameters
from bilevel.linear._common import LinearInfo, Matvec, Solver, axpy, dot, norm, report, scaled, start
from bilevel.typing import PyTree

Terms = tuple[PyTree, PyTree, jax.Array]


def curves_down(p: PyTree, q: PyTree) -> jax.Array:
    """Whether p'q <= 0 with q = H p and p not zero."""
    return (dot(p, q) <= 0) & (dot(p, p) > 0)


@hyperparameters
class Neumann(Solver):
    """The first K terms of the Neumann series, from cold: v = eta sum_{i<K} (I - eta H)^i b.

    K - 1 products, and one more for the residual (under `jit` only if `info.residual` is used). It converges if and
    only if the eigenvalues of H are in (0, 2/eta), with the factor 1 - eta mu per term for the smallest one, mu: some
    sqrt(kappa) times slower than CG, but linear in b and of a fixed cost. Equal to `Richardson` with as many steps
    from v = 0. `info.negative_curvature` is True if one of its terms p has p'Hp <= 0, p not zero.

    Attributes:
      step_size: eta, below 2 / (largest eigenvalue of H). It has no default, since none is right for every H.
      steps: K, the number of terms; 10 is a convention and not a measured optimum.

    Reference: Lorraine, Vicol and Duvenaud (2020), "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS, Algorithm 3; the sum of K terms as in Ji, Yang and Liang (2021), "Bilevel optimization:
    convergence analysis and enhanced design" (stocBiO), ICML.
    """

    step_size: float
    steps: int = 10

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, memory: PyTree) -> tuple[PyTree, PyTree, LinearInfo]:
        def next_term(p: PyTree, negative: jax.Array) -> tuple[PyTree, jax.Array]:
            q = h(p)
            return axpy(-self.step_size, q, p), negative | curves_down(p, q)

        def add(_: int, s: Terms) -> Terms:
            p, negative = next_term(*s[1:])
            return axpy(1.0, p, s[0]), p, negative

        total, p, negative = jax.lax.fori_loop(0, self.steps - 1, add, (b, b, jnp.bool_(False)))
        p, negative = next_term(p, negative)  # b - H v is the next term of the series
        return scaled(self.step_size, total), memory, report(norm(p), self.steps, negative)


@hyperparameters
class Richardson(Solver):
    """Gradient descent, K steps, on v'Hv/2 - b'v from the carried v: v <- v - eta (H v - b).

    K products from a warm start and K - 1 from a cold one, which is then `Neumann` with K terms. Warm-started it
    approaches the solution over the outer steps although K stays small: with K = 1 it is the linear system's share of
    a single-loop method such as SOBA. `info.negative_curvature`: a residual r with r'Hr <= 0, r not zero, was met.

    Attributes:
      step_size: eta, below 2 / (largest eigenvalue of H). It has no default, since none is right for every H.
      steps: K.
      warm_start: start from the carried solution (if its residual does not exceed ||b||).

    Reference: Richardson (1911), Phil. Trans. R. Soc. A 210; as "fixed point" in Grazzi, Franceschi, Pontil and Salzo
    (2020), "On the iteration complexity of hypergradient computation", ICML.
    """

    step_size: float
    steps: int = 10
    warm_start: bool = True

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, memory: PyTree) -> tuple[PyTree, PyTree, LinearInfo]:
        def step(_: int, s: Terms) -> Terms:
            v, r, negative = s
            q = h(r)
            return axpy(self.step_size, r, v), axpy(-self.step_size, q, r), negative | curves_down(r, q)

        s = jax.lax.fori_loop(0, self.steps - 1, step, (*start(h, b, v), jnp.bool_(False)))
        v, r, negative = step(0, s)  # outside the loop, so that under jit its product is for the residual alone
        return v, memory, report(norm(r), self.steps, negative)


@hyperparameters
class Identity(Solver):
    """The multiple v = scale * b: the Hessian is taken for I / scale.

    No product, and one for the residual (under `jit` only if `info.residual` or `info.negative_curvature` is used).
    With scale = eta it is one term of the Neumann series and gives T1-T2's hypergradient, the derivative through one
    gradient step of size eta; on a fixed-point system it is Jacobian-free backpropagation.

    Reference: Luketina, Berglund, Greff and Raiko (2016), "Scalable gradient-based tuning of continuous
    regularization hyperparameters" (T1-T2), ICML; Fung et al. (2022), "JFB: Jacobian-free backpropagation for
    implicit networks", AAAI.
    """

    scale: float = 1.0

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, memory: PyTree) -> tuple[PyTree, PyTree, LinearInfo]:
        q = h(b)
        info = report(norm(axpy(-self.scale, q, b)), 0, curves_down(b, q))
        return scaled(self.scale, b), memory, info
