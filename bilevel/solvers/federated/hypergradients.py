"""Hypergradients across clients: chains of Hessian factors of the *global* lower level.

    h = F_x - J H^-1 F_y,     H^-1 = lim (1/L) sum_{j < N} (I - H/L)^j,     H = mean_i H_i,   J = mean_i J_i

with L at least the largest eigenvalue of any H_i: it is raised from step to step by the |H_i p| / |p| that are met.

No client knows H; a product of factors, each of another freshly sampled client, has the right expectation. An estimator
is called with the engine, x, y and L, and gives (the mean upper loss, h, the largest |H_i p| / |p| or None).
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters
from bilevel.keys import Draw
from bilevel.optimizers import check_count
from bilevel.solvers._directions import Point
from bilevel.solvers.federated import oracles
from bilevel.solvers.federated.engine import Engine, Oracle
from bilevel.typing import PyTree

__all__ = ["LocalHypergradient", "ParallelHypergradient", "SharedHypergradient"]


class _Series:
    """The truncated series, factor by factor: each chain by itself, or one chain of averages."""

    terms: int
    random: bool
    apart: ClassVar[bool]
    asks: ClassVar[tuple[Oracle, ...]] = (oracles.f_y, oracles.hvp, oracles.hyper)

    def __post_init__(self) -> None:
        check_count(type(self).__name__, terms=self.terms)

    def __call__(self, engine: Engine, x: PyTree, y: PyTree, curvature: Any) -> tuple[Any, PyTree, Any]:
        """(upper loss, h) at (x, y), one draw of the estimator, and the largest |H_i p| / |p| that it met."""
        found = engine.round(Draw.FIRST).by_share(self.apart).ask(oracles.f_y, Point(x, y, None))
        p = optax.tree.scale(-self.terms if self.random else -1.0, (found.each if self.apart else found.mean).v)
        shape = jax.tree.leaves(p)[0].shape[:1] if self.apart else ()
        left = jax.random.randint(engine.key.fold_in(Draw.LENGTH).random, shape, 0, self.terms)

        def factor(at: Any, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            chain, most = carry
            at = at.by_share(self.apart)
            if self.apart:
                chain = at.pass_on(chain)
                moving = chain[2] > 0 if self.random else None
                found = at.ask(oracles.hvp, Point(x, y, chain[0]), own=chain, only=moving)
                product, (p, v, left) = found.each.v, found.own
            else:
                p, v, left = chain
                product = at.ask(oracles.hvp, Point(x, y, p)).mean.v
            most = jnp.maximum(most, _stretch(p, product, self.apart))
            new = oracles.factor(p, product, curvature)
            if not self.random:
                return (new, optax.tree.add(v, new), left), most
            p = jax.tree.map(lambda a, b: jnp.where(oracles.rows(left > 0, a), a, b), new, p)
            return (p, p, left - 1), most

        zero = jnp.zeros((), jnp.result_type(float))
        (_, v, _), most = engine.repeat(Draw.FACTOR, self.terms - 1, factor, ((p, p, left), zero))
        v = jax.tree.map(lambda a: (a / curvature).astype(a.dtype), v)
        last = engine.round(Draw.LAST).by_share(self.apart)
        v = last.pass_on(v) if self.apart else v
        found = last.ask(oracles.hyper, Point(x, y, v), own=v if self.apart else None)
        return found.value, found.mean.x, most


def _stretch(p: PyTree, product: PyTree, apart: bool) -> jax.Array:
    """The largest |H p| / |p|, of each row or of all: at most the largest eigenvalue of an H; 0 where p is zero."""
    squares = [
        sum(jnp.sum(jnp.square(leaf), axis=tuple(range(int(apart), leaf.ndim))) for leaf in jax.tree.leaves(tree))
        for tree in (product, p)
    ]
    safe = jnp.where(squares[1] > 0, squares[1], 1)
    found = jnp.where(squares[1] > 0, jnp.sqrt(squares[0] / safe), 0)
    return jnp.max(jnp.where(jnp.isfinite(found), found, 0)).astype(jnp.result_type(float))


@hyperparameters
class ParallelHypergradient(_Series):
    """FedMBO's estimator: as many chains as clients in a round, each passed on to another client at every factor.

        round 0:      fresh clients S_0;  chain i:  p_i = F_y of client s_0(i)
        rounds j:     fresh clients S_j;  p_i <- p_i - H_{s_j(i)} p_i / L,     j = 1, ..., terms - 1
        last round:   fresh clients S;    h = mean_i (F_x - J v_i)

    with v_i = (1/L) sum_j p_i^(j) (`random=False`, the default), or with the paper's `random=True` v_i = (terms/L) p_i
    after a number of factors drawn uniformly from 0, ..., terms - 1 for each chain by itself. Both are unbiased up to
    (1 - mu/L)^terms and their variance falls with the number of clients; the sum's is several times smaller, for the
    same communication.

    Rounds: terms + 1. Oracle calls: terms - 1 HVPs, one cross product, F_x and F_y per chain.

    Reference: Huang, Zhang, Ji, "Achieving Linear Speedup in Non-IID Federated Bilevel Learning", ICML 2023.
    """

    terms: int = 10
    random: bool = False
    apart: ClassVar[bool] = True


@hyperparameters
class SharedHypergradient(_Series):
    """FedNest's FedIHGP: one chain, each factor the average over freshly sampled clients.

        p = (terms/L) mean F_y,    N' ~ U{0, ..., terms - 1}
        N' times:  p <- p - (1/L) mean_i H_i p
        h = mean_i (F_x - J p)

    The common random length leaves a variance that more clients do not lower; `random=False` sums the series instead.

    Reference: Tarzanagh, Li, Thrampoulidis, Oymak, "FedNest: Federated Bilevel, Minimax, and Compositional
    Optimization", ICML 2022.
    """

    terms: int = 10
    random: bool = True
    apart: ClassVar[bool] = False


@hyperparameters
class LocalHypergradient:
    """LFedNest's: every client inverts its own Hessian by `terms` terms of the series.

    One round, and biased where lower levels differ: the mean of local hypergradients is another direction. A baseline.
    """

    terms: int = 10
    asks: ClassVar[tuple[Oracle, ...]] = (oracles.local_hyper,)

    def __post_init__(self) -> None:
        check_count("LocalHypergradient", terms=self.terms)

    def __call__(self, engine: Engine, x: PyTree, y: PyTree, curvature: Any) -> tuple[Any, PyTree, Any]:
        """(upper loss, h) at (x, y), one draw of the estimator, and that the clients' curvatures stay with them."""
        at = engine.round(Draw.FIRST).by_share()
        found = at.ask(oracles.local_hyper, Point(x, y, None), terms=self.terms, curvature=curvature)
        return found.value, found.mean.x, None
