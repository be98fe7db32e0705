"""Approximate inverses of a fixed cost: the Neumann series, Richardson's iteration and a multiple of the identity.

They are plain polynomials in H, and are differentiated as what they are (not as the solution they approximate).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel._module import hyperparameters
from bilevel.linear._common import (
    LinearCarry,
    LinearInfo,
    Matvec,
    Solver,
    axpy,
    check_positive,
    dot,
    norm,
    report,
    scaled,
    start,
)
from bilevel.typing import PyTree


@hyperparameters
class Neumann(Solver):
    """The first K terms of the Neumann series, from cold: v = eta sum_{i<K} (I - eta H)^i b.

    K - 1 products, and one more for the residual (under `jit` only if `info.residual` is used). It converges if and
    only if the eigenvalues of H are in (0, 2/eta), with the factor 1 - eta mu per term for the smallest one, mu: some
    sqrt(kappa) times slower than CG. What speaks for it is its fixed and even cost and that it is linear in b, which
    CG is not. Equal to `Richardson` with as many steps from v = 0. `info.negative_curvature` is True if one of its
    terms p has p'Hp <= 0, p not zero.

    Attributes:
      step_size: eta, below 2 / (largest eigenvalue of H). It has no default, since none is right for every H.
      steps: K, the number of terms; 10 is a convention and not a measured optimum.

    Reference: Lorraine, Vicol and Duvenaud (2020), "Optimizing millions of hyperparameters by implicit
    differentiation", AISTATS, Algorithm 3; the sum of K terms as in Ji, Yang and Liang (2021), "Bilevel optimization:
    convergence analysis and enhanced design" (stocBiO), ICML.
    """

    step_size: float
    steps: int = 10

    def __post_init__(self) -> None:
        check_positive("Neumann", step_size=self.step_size, steps=self.steps)

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, carry: LinearCarry) -> tuple[PyTree, LinearCarry, LinearInfo]:
        def next_term(p: PyTree) -> tuple[PyTree, jax.Array]:
            q = h(p)
            return axpy(-self.step_size, q, p), (dot(p, q) <= 0) & (dot(p, p) > 0)

        def term(s: tuple[PyTree, PyTree, jax.Array], _: None) -> tuple[tuple[PyTree, PyTree, jax.Array], None]:
            total, p, negative = s
            p, curved_down = next_term(p)
            return (axpy(1.0, p, total), p, negative | curved_down), None

        (total, p, negative), _ = jax.lax.scan(term, (b, b, jnp.bool_(False)), None, length=self.steps - 1)
        p, curved_down = next_term(p)  # b - H v is the next term of the series
        info = report(norm(p), self.steps, negative | curved_down)
        return scaled(self.step_size, total), carry, jax.lax.stop_gradient(info)


@hyperparameters
class Richardson(Solver):
    """Gradient descent, K steps, on v'Hv/2 - b'v from the carried v: v <- v - eta (H v - b).

    K products from a warm start and K - 1 from a cold one, which is then `Neumann` with K terms. Warm-started over
    the outer steps it approaches the solution although K stays small: with K = 1 it is the linear system's share of a
    single-loop method such as SOBA. `info.negative_curvature` is True if a residual r with r'Hr <= 0, r not zero, was
    met.

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

    def __post_init__(self) -> None:
        check_positive("Richardson", step_size=self.step_size, steps=self.steps)

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, carry: LinearCarry) -> tuple[PyTree, LinearCarry, LinearInfo]:
        def step(s: tuple[PyTree, PyTree, jax.Array], _: None) -> tuple[tuple[PyTree, PyTree, jax.Array], None]:
            v, r, negative = s
            v, q = axpy(self.step_size, r, v), h(r)
            return (v, axpy(-self.step_size, q, r), negative | ((dot(r, q) <= 0) & (dot(r, r) > 0))), None

        v, r = start(h, b, v)
        s, _ = jax.lax.scan(step, (v, r, jnp.bool_(False)), None, length=self.steps - 1)
        (v, r, negative), _ = step(s, None)
        info = report(norm(r), self.steps, negative)
        return v, LinearCarry(self._carried(v)), jax.lax.stop_gradient(info)


@hyperparameters
class Identity(Solver):
    """The multiple v = scale * b: the Hessian is taken for I / scale.

    No product, and one for the residual (under `jit` only if `info.residual` or `info.negative_curvature` is used).
    With scale = eta it is one term of the Neumann series and gives T1-T2's hypergradient, the derivative through one
    gradient step of size eta; on a fixed-point system it is Jacobian-free backpropagation.

    Attributes:
      scale: one over the curvature that is assumed.

    Reference: Luketina, Berglund, Greff and Raiko (2016), "Scalable gradient-based tuning of continuous
    regularization hyperparameters" (T1-T2), ICML; Fung et al. (2022), "JFB: Jacobian-free backpropagation for
    implicit networks", AAAI.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("Identity", scale=self.scale)

    def _solve(self, h: Matvec, b: PyTree, v: PyTree, carry: LinearCarry) -> tuple[PyTree, LinearCarry, LinearInfo]:
        q = h(b)
        info = report(norm(axpy(-self.scale, q, b)), 0, (dot(b, q) <= 0) & (dot(b, b) > 0))
        return scaled(self.scale, b), carry, jax.lax.stop_gradient(info)
