"""Hypergradients across clients: chains of Hessian factors of the *global* lower level.

    h = F_x - J H^-1 F_y,     H^-1 = lim (1/L) sum_{j < N} (I - H/L)^j,     H = mean_i H_i,   J = mean_i J_i

with L at least the largest eigenvalue of any H_i.

No client knows H; a product of factors, each of another freshly sampled client, has the right expectation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters
from bilevel.data import StepKey
from bilevel.problem import Problem
from bilevel.solvers import _agents
from bilevel.solvers.federated._round import Round, check_count

PyTree = Any


def _where(keep: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def _less(p: PyTree, hp: PyTree, L: Any) -> PyTree:
    """(I - H/L) p."""
    return jax.tree.map(lambda p, hp: (p - hp / L).astype(p.dtype), p, hp)


class _Series:
    """What the estimators with a truncated series share; the counts are those of one factor a round."""

    terms: int

    def __post_init__(self) -> None:
        check_count(type(self).__name__, terms=self.terms)

    def rounds(self) -> int:
        """Rounds of one estimate."""
        return self.terms + 1

    def floats(self, p: int, q: int) -> int:
        """Numbers to and from one client in one estimate: each chain round takes (x, y) and its own vector to another
        client."""
        return (p + 2 * q) + (self.terms - 1) * (p + 3 * q) + (2 * p + 2 * q)


@hyperparameters
class ParallelHypergradient(_Series):
    """FedMBO's estimator: as many chains as clients in a round, each passed on to another client at every factor.

        round 0:      fresh clients S_0;  chain i:  p_i = F_y of client s_0(i)
        rounds j:     fresh clients S_j;  p_i <- p_i - H_{s_j(i)} p_i / L,     j = 1, ..., terms - 1
        last round:   fresh clients S;    h = mean_i (F_x - J q_i)

    with q_i = (1/L) sum_j p_i^(j) (`random=False`, the default), or with the paper's `random=True` q_i = (terms/L) p_i
    after a number of factors drawn uniformly from 0, ..., terms - 1 for each chain by itself. Both are unbiased up to
    (1 - mu/L)^terms and their variance falls with the number of clients; the sum's is several times smaller, for the
    same communication.

    Attributes:
      terms: the number of terms of the truncated series.
      random: the paper's random chain length.

    Rounds: terms + 1. Oracle calls: terms - 1 HVPs, one cross product, F_x and F_y per chain.

    Reference: Huang, Zhang, Ji, "Achieving Linear Speedup in Non-IID Federated Bilevel Learning", ICML 2023.
    """

    terms: int = 10
    random: bool = False

    def __call__(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        key: StepKey,
        curvature: Any,
        clients: int | None,
        weighting: str = "samples",
    ) -> Any:
        """(upper loss, h) at (x, y): one draw of the estimator."""
        first = Round(problem, key.fold_in(20), clients, weighting)
        xs, ys = first.copies(x), first.copies(y)
        p = first.weigh(jax.grad(first.upper(), argnums=1)(xs, ys), "upper")
        q = optax.tree.scale(self.terms if self.random else 1.0, p)
        lengths = jax.random.randint(key.fold_in(21).random, (first.size,), 0, self.terms)

        def factor(j: Any, chains: Any) -> Any:
            at = Round(problem, key.fold_in(22).inner(j, self.terms), clients, weighting)
            p, q, lengths = at.pass_on(chains)
            if self.random:
                product = at.weigh(derivatives.hvp(at.lower(), xs, ys, q), "lower")
                return p, _where(j < lengths, _less(q, product, curvature), q), lengths
            p = _less(p, at.weigh(derivatives.hvp(at.lower(), xs, ys, p), "lower"), curvature)
            return p, optax.tree.add(q, p), lengths

        p, q, _ = jax.lax.fori_loop(0, self.terms - 1, factor, (p, q, lengths))
        q = jax.tree.map(lambda a: (a / curvature).astype(a.dtype), q)
        last = Round(problem, key.fold_in(23), clients, weighting)
        return _last_round(last, xs, ys, last.pass_on(q))


@hyperparameters
class SharedHypergradient(_Series):
    """FedNest's FedIHGP: one chain, each factor the average over freshly sampled clients.

        p = (terms/L) mean F_y,    N' ~ U{0, ..., terms - 1}
        N' times:  p <- p - (1/L) mean_i H_i p
        h = mean_i (F_x - J p)

    The common random length leaves a variance that more clients do not lower; `random=False` sums the series instead.

    Attributes:
      terms: the number of terms of the truncated series.
      random: the paper's random chain length.

    Reference: Tarzanagh, Li, Thrampoulidis, Oymak, "FedNest: Federated Bilevel, Minimax, and Compositional
    Optimization", ICML 2022.
    """

    terms: int = 10
    random: bool = True

    def __call__(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        key: StepKey,
        curvature: Any,
        clients: int | None,
        weighting: str = "samples",
    ) -> Any:
        """(upper loss, h) at (x, y): one draw of the estimator."""
        first = Round(problem, key.fold_in(20), clients, weighting)
        xs, ys = first.copies(x), first.copies(y)
        p = first.mean(jax.grad(first.upper(), argnums=1)(xs, ys), "upper")
        q = optax.tree.scale(self.terms if self.random else 1.0, p)
        length = jax.random.randint(key.fold_in(21).random, (), 0, self.terms)

        def factor(j: Any, chain: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            p, q = chain
            at = Round(problem, key.fold_in(22).inner(j, self.terms), clients, weighting)

            def product(v):
                return at.mean(derivatives.hvp(at.lower(), xs, ys, at.copies(v)), "lower")

            if self.random:
                return p, jax.tree.map(lambda a, b: jnp.where(j < length, a, b), _less(q, product(q), curvature), q)
            p = _less(p, product(p), curvature)
            return p, optax.tree.add(q, p)

        p, q = jax.lax.fori_loop(0, self.terms - 1, factor, (p, q))
        q = jax.tree.map(lambda a: (a / curvature).astype(a.dtype), q)
        last = Round(problem, key.fold_in(23), clients, weighting)
        return _last_round(last, xs, ys, last.copies(q))


@hyperparameters
class LocalHypergradient(_Series):
    """LFedNest's: every client inverts its own Hessian. One round, and biased: the mean of local hypergradients is
    another direction.

    A baseline; right where all clients have equal lower levels.

    Attributes:
      terms: the number of terms of the truncated series.
    """

    terms: int = 10

    def __call__(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        key: StepKey,
        curvature: Any,
        clients: int | None,
        weighting: str = "samples",
    ) -> Any:
        """(upper loss, h) at (x, y): one draw of the estimator."""
        at = Round(problem, key.fold_in(20), clients, weighting)
        xs, ys = at.copies(x), at.copies(y)
        value, (F_x, F_y) = jax.value_and_grad(at.upper(), argnums=(0, 1))(xs, ys)
        lower = derivatives.linearised(at.lower(), xs, ys)

        def factor(_: Any, chains: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            p, q = chains
            p = _less(p, lower.hvp(p), curvature)
            return p, optax.tree.add(q, p)

        _, q = jax.lax.fori_loop(0, self.terms - 1, factor, (F_y, F_y))
        q = jax.tree.map(lambda a: (a / curvature).astype(a.dtype), q)
        return value / at.size, at.mean(optax.tree.sub(F_x, lower.cross(q)), "upper")

    def rounds(self) -> int:
        """Rounds of one estimate."""
        return 1

    def floats(self, p: int, q: int) -> int:
        """Numbers to and from one client in one estimate."""
        return 2 * p + q


def _last_round(at: Round, xs: PyTree, ys: PyTree, q: PyTree) -> tuple[jax.Array, PyTree]:
    """(upper loss, mean_i (F_x - J q_i))."""
    upper = at.upper()
    values, pull = upper(xs, ys), jax.grad(upper, argnums=0)(xs, ys)
    cross = derivatives.cross_product(at.lower(), xs, ys, q)
    return values / at.size, optax.tree.sub(at.mean(pull, "upper"), at.mean(cross, "lower"))


def exact_hypergradient(problem: Problem, x: PyTree, y: PyTree, curvature: Any, terms: int = 1000) -> PyTree:
    """F_x - J H^-1 F_y of the mean losses on full batches at (x, y), all clients taking part: what the estimators
    estimate."""
    at = Round(problem, StepKey(jax.random.key(0), jnp.uint32(0), jnp.uint32(0)))
    if any(_agents.is_random(d) for d in (problem.upper_data, problem.lower_data)):
        raise ValueError("exact_hypergradient needs full batches: data.Agents(arrays) without a size.")
    return SharedHypergradient(terms, random=False)(problem, x, y, at.key, curvature, None)[1]
