"""Hypergradients across clients: chains of Hessian factors of the *global* lower level.

    h = F_x - J H^-1 F_y,     H^-1 = lim (1/L) sum_{j < N} (I - H/L)^j,     H = mean_i H_i,   J = mean_i J_i

with L at least the largest eigenvalue of any H_i: it is raised within a chain, and for the steps to come, by the
|H_i p| / |p| that are met (of an L that grows, p_0 - p_N is still H sum_j p_j / L_j, a series for H^-1).

No client knows H; a product of factors, each of another freshly sampled client, has the right expectation. An estimator
is called with the engine, x, y and L, and gives (the mean upper loss, h, the largest |H_i p| / |p|: 0 where none
exceeds L, None where it is not known).
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
from bilevel.solvers.federated.engine import Answers, Engine, Oracle
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

        def of_chains(found: Answers) -> PyTree:
            return found.each.v if self.apart else jax.tree.map(lambda a: a[None], found.mean.v)

        start = of_chains(engine.round(Draw.FIRST, self.apart).ask(oracles.f_y, Point(x, y, None)))
        p = optax.tree.scale(-self.terms if self.random else -1.0, start)
        shape = jax.tree.leaves(p)[0].shape[:1]
        left = jax.random.randint(engine.key.fold_in(Draw.LENGTH).random, shape, 0, self.terms)

        def factor(at: Any, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            chain, L = carry
            if self.apart:
                chain = at.pass_on(chain)
                moving = chain[2] > 0 if self.random else None
                found = at.ask(oracles.hvp, Point(x, y, chain[0]), own=chain, only=moving)
                chain = found.own
            else:
                found = at.ask(oracles.hvp, Point(x, y, _only(chain[0])))
            (p, v, left), product = chain, of_chains(found)
            # A factor with an L below the curvature would not shrink: from here on it is as large.
            L = jnp.maximum(L, jnp.max(oracles.stretch(p, product)).astype(L.dtype))
            new = oracles.less(p, product, L)
            if not self.random:
                return (new, oracles.less(v, p, -L), left), L
            p = jax.tree.map(lambda a, b: jnp.where(oracles.rows(left > 0, a), a, b), new, p)
            return (p, v, left - 1), L

        chain = p, optax.tree.zeros_like(p), left
        start_L = jnp.asarray(curvature, jnp.result_type(float))
        (p, v, _), L = engine.repeat(Draw.FACTOR, self.terms - 1, factor, (chain, start_L), self.apart)
        v = oracles.less(v, p, -L)
        last = engine.round(Draw.LAST, self.apart)
        v = last.pass_on(v) if self.apart else _only(v)
        found = last.ask(oracles.hyper, Point(x, y, v), own=v if self.apart else None)
        return found.value, found.mean.x, jnp.where(start_L < L, L, 0)


def _only(chains: PyTree) -> PyTree:
    """The one chain there is."""
    return jax.tree.map(lambda a: a[0], chains)


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
    A client whose products are longer than L times their vector raises L for itself.
    """

    terms: int = 10
    asks: ClassVar[tuple[Oracle, ...]] = (oracles.local_hyper,)

    def __post_init__(self) -> None:
        check_count("LocalHypergradient", terms=self.terms)

    def __call__(self, engine: Engine, x: PyTree, y: PyTree, curvature: Any) -> tuple[Any, PyTree, Any]:
        """(upper loss, h) at (x, y), one draw of the estimator, and that the clients' curvatures stay with them."""
        at = engine.round(Draw.FIRST)
        found = at.ask(oracles.local_hyper, Point(x, y, None), terms=self.terms, curvature=curvature)
        return found.value, found.mean.x, None
