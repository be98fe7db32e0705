"""Approximate inverses of a fixed cost: the Neumann series, Richardson's iteration and a multiple of the identity.

They are plain polynomials in H, and are differentiated as what they are (not as the solution they approximate).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters
from bilevel.linear._common import (
    LinearCarry,
    LinearInfo,
    Matvec,
    PyTree,
    as_vector,
    axpy,
    check_carry,
    check_positive,
    checked,
    dot,
    norm,
    nothing_to_solve,
    report,
    scaled,
    size,
    start,
)


@hyperparameters
class Neumann:
    """The first K terms of the Neumann series, from cold: v = eta sum_{i<K} (I - eta H)^i b.

    K - 1 products, and one more for the residual (under `jit` only if `info.residual` is used). It converges if and
    only if the eigenvalues of H are in (0, 2/eta), with the factor 1 - eta mu per term for the smallest one, mu: some
    sqrt(kappa) times slower than CG. What speaks for it is its fixed and even cost and that it is linear in b, which
    CG is not. Equal to `Richardson` with as many steps from v = 0.

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

    def init(self, b: PyTree) -> LinearCarry:
        """Nothing is carried."""
        as_vector(b)
        return LinearCarry()

    def __call__(
        self, matvec: Matvec, b: PyTree, carry: LinearCarry | None = None
    ) -> tuple[PyTree, LinearCarry, LinearInfo]:
        """Sum the series; `info.negative_curvature` is True if one of its terms p has p'Hp <= 0, p not zero."""
        b = as_vector(b)
        carry = LinearCarry() if carry is None else carry
        if size(b) == 0:
            return nothing_to_solve(b, carry)
        h = checked(matvec, b)

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
class Richardson:
    """Gradient descent, K steps, on v'Hv/2 - b'v from the carried v: v <- v - eta (H v - b).

    K products from a warm start and K - 1 from a cold one, which is then `Neumann` with K terms. Warm-started over
    the outer steps it approaches the solution although K stays small: with K = 1 it is the linear system's share of a
    single-loop method such as SOBA.

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

    def init(self, b: PyTree) -> LinearCarry:
        """Start at zero."""
        b = as_vector(b)
        return LinearCarry(v=optax.tree.zeros_like(b) if self.warm_start else None)

    def __call__(
        self, matvec: Matvec, b: PyTree, carry: LinearCarry | None = None
    ) -> tuple[PyTree, LinearCarry, LinearInfo]:
        """Iterate; `info.negative_curvature` is True if a residual r with r'Hr <= 0, r not zero, was met."""
        b = as_vector(b)
        cold = carry is None or not self.warm_start
        carry = jax.lax.stop_gradient(self.init(b) if carry is None else carry)
        if size(b) == 0:
            return nothing_to_solve(b, carry)
        if not cold:
            check_carry("Richardson", carry, b)
        h = checked(matvec, b)

        def step(s: tuple[PyTree, PyTree, jax.Array], _: None) -> tuple[tuple[PyTree, PyTree, jax.Array], None]:
            v, r, negative = s
            v, q = axpy(self.step_size, r, v), h(r)
            return (v, axpy(-self.step_size, q, r), negative | ((dot(r, q) <= 0) & (dot(r, r) > 0))), None

        v, r = start(h, b, None if cold else carry.v)
        s, _ = jax.lax.scan(step, (v, r, jnp.bool_(False)), None, length=self.steps - 1)
        (v, r, negative), _ = step(s, None)
        info = report(norm(r), self.steps, negative)
        return v, LinearCarry(jax.lax.stop_gradient(v) if self.warm_start else None), jax.lax.stop_gradient(info)


@hyperparameters
class Identity:
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

    def init(self, b: PyTree) -> LinearCarry:
        """Nothing is carried."""
        as_vector(b)
        return LinearCarry()

    def __call__(
        self, matvec: Matvec, b: PyTree, carry: LinearCarry | None = None
    ) -> tuple[PyTree, LinearCarry, LinearInfo]:
        """Scale b."""
        b = as_vector(b)
        carry = LinearCarry() if carry is None else carry
        if size(b) == 0:
            return nothing_to_solve(b, carry)
        q = checked(matvec, b)(b)
        info = report(norm(axpy(-self.scale, q, b)), 0, (dot(b, q) <= 0) & (dot(b, b) > 0))
        return scaled(self.scale, b), carry, jax.lax.stop_gradient(info)
