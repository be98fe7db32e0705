"""Nested federated methods: rounds for the lower level, rounds for the hypergradient, one server step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters, state
from bilevel.data import StepKey
from bilevel.optimizers import as_optimizer, check_optimizer
from bilevel.problem import Problem
from bilevel.solvers import _agents
from bilevel.solvers._base import refuse
from bilevel.solvers.federated._round import Round, check_clients, check_count, curvature_bound, norms, traffic
from bilevel.solvers.federated.hypergradients import LocalHypergradient, ParallelHypergradient, SharedHypergradient
from bilevel.typing import PyTree

LOWER = ("minibatch", "svrg", "local")


@state
class FederatedState:
    """The server's x and y, the memories of its step rules, and the bound L on the clients' lower curvature."""

    x: PyTree
    y: PyTree
    upper: PyTree
    lower: PyTree
    curvature: jax.Array


@hyperparameters
class FederatedNested:
    """A server solves min_x F(x, y*(x)), y*(x) = argmin_y f(x, y) for averages F, f over clients whose data it never sees.

        y <- lower_rounds of `lower` at x
        h =  hypergradient(x, y),  rounds of its own
        x <- x + upper_optimizer(h);     with local_upper_steps > 1 each sampled client walks
             x_i <- x_i - step h_i,  h_i = F_x,i(x_i, y) - F_x,i(x, y) + h,   and the server moves along mean_i sum h_i

    One lower round of n sampled clients is, with b the lower step,

        "minibatch"   y <- y + lower_optimizer(mean_i G_i(x, y))
        "svrg"        q = mean_i G_i(x, y), then local_steps times  y_i <- y_i - b (G_i(y_i) - G_i(y) + q), both at
                      one sample; averaged (two rounds)
        "local"       local_steps times  y_i <- y_i - b G_i(y_i), averaged: drifts apart where clients differ

    The data of both levels are `data.Clients` or `data.Agents`. Each round samples its clients without replacement.

    Attributes:
      clients: how many take part in each round; None: all.
      upper_optimizer, lower_optimizer: the server's step sizes or optax rules ("svrg" and "local" need a number for y).
      hypergradient: an estimator of `federated.hypergradients`.
      lower: one of the three above.
      lower_rounds, local_steps, local_upper_steps: as above.
      curvature: L, at least the largest eigenvalue of any client's lower Hessian; None: 1.2 times an estimate at the
        start.
      weighting: "samples": a client counts by its number of samples (`data.Clients`); "clients": all count alike.

    Metrics: `upper_loss`, `hypergradient_norm` (|h|) and `lower_residual` (|mean G|), on the clients of their rounds;
    `communication_rounds` and `communication_floats` (received and sent by all clients together), of this step.
    """

    clients: int | None = None
    upper_optimizer: float | optax.GradientTransformation = 0.01
    lower_optimizer: float | optax.GradientTransformation = 0.1
    hypergradient: Any = ParallelHypergradient()
    lower: str = "minibatch"
    lower_rounds: int = 5
    local_steps: int = 1
    local_upper_steps: int = 1
    curvature: float | None = None
    weighting: str = "samples"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_count(
            owner,
            clients=self.clients,
            lower_rounds=self.lower_rounds,
            local_steps=self.local_steps,
            local_upper_steps=self.local_upper_steps,
        )
        check_optimizer(owner, "upper_optimizer", self.upper_optimizer)
        check_optimizer(owner, "lower_optimizer", self.lower_optimizer)
        if self.lower not in LOWER:
            raise ValueError(
                f"{owner}(lower={self.lower!r}): the lower rounds are one of {', '.join(map(repr, LOWER))}."
            )
        if self.weighting not in ("samples", "clients"):
            raise ValueError(f"{owner}(weighting={self.weighting!r}): 'samples' or 'clients'.")
        if self.lower != "minibatch" and isinstance(self.lower_optimizer, optax.GradientTransformation):
            raise ValueError(
                f"{owner}(lower={self.lower!r}) takes its steps on the clients: lower_optimizer must be a step "
                f"size, not an optax rule."
            )
        if self.local_upper_steps > 1 and isinstance(self.upper_optimizer, optax.GradientTransformation):
            raise ValueError(
                f"{owner}(local_upper_steps={self.local_upper_steps}): upper_optimizer must be a step size, not "
                f"an optax rule."
            )

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> FederatedState:
        """The server before the first round."""
        refuse(self, problem, x)
        check_clients(problem, type(self).__name__, self.clients)
        L = curvature_bound(problem, x, y, key) if self.curvature is None else jnp.asarray(self.curvature)
        rules = as_optimizer(self.upper_optimizer), as_optimizer(self.lower_optimizer)
        return FederatedState(x, y, rules[0].init(x), rules[1].init(y), L)

    def step(
        self, problem: Problem, state: FederatedState, key: StepKey
    ) -> tuple[FederatedState, dict[str, jax.Array]]:
        """One outer iteration."""
        x = state.x

        def lower_round(t: Any, carry: Any) -> Any:
            y, memory, _ = carry
            at = Round(problem, key.fold_in(10).inner(t, self.lower_rounds), self.clients, self.weighting)
            return getattr(self, "_" + self.lower)(at, x, y, memory)

        start = (state.y, state.lower, optax.tree.zeros_like(state.y))
        y, memory, residual = jax.lax.fori_loop(0, self.lower_rounds, lower_round, start)

        value, h = self.hypergradient(problem, x, y, key, state.curvature, self.clients, self.weighting)
        direction = h if self.local_upper_steps == 1 else self._walk(problem, x, y, h, key)
        updates, upper = as_optimizer(self.upper_optimizer).update(direction, state.upper, x)
        new = FederatedState(optax.apply_updates(x, updates), y, upper, memory, state.curvature)
        return new, {"upper_loss": value, **norms(h, residual), **self._traffic(problem, x, y)}

    def _minibatch(self, at: Round, x: PyTree, y: PyTree, memory: PyTree) -> Any:
        G = at.mean(jax.grad(at.lower(), argnums=1)(at.copies(x), at.copies(y)), "lower")
        updates, memory = as_optimizer(self.lower_optimizer).update(G, memory, y)
        return optax.apply_updates(y, updates), memory, G

    def _svrg(self, at: Round, x: PyTree, y: PyTree, memory: PyTree) -> Any:
        xs, ys = at.copies(x), at.copies(y)
        G = at.mean(jax.grad(at.lower(), argnums=1)(xs, ys), "lower")
        everywhere = at.copies(G)

        def local(v: Any, mine: PyTree) -> PyTree:
            gradient = jax.grad(at.lower(at.key.fold_in(2).inner(v, self.local_steps)), argnums=1)
            moved, here = gradient(xs, mine), gradient(xs, ys)
            return jax.tree.map(
                lambda y, a, b, q: y - self.lower_optimizer * (a - b + q), mine, moved, here, everywhere
            )

        mine = jax.lax.fori_loop(0, self.local_steps, local, ys)
        return self._averaged(at, mine, y), memory, G

    def _local(self, at: Round, x: PyTree, y: PyTree, memory: PyTree) -> Any:
        xs, ys = at.copies(x), at.copies(y)

        def local(v: Any, mine: PyTree) -> PyTree:
            G = jax.grad(at.lower(at.key.fold_in(2).inner(v, self.local_steps)), argnums=1)(xs, mine)
            return jax.tree.map(lambda y, g: y - self.lower_optimizer * g, mine, G)

        new = self._averaged(at, jax.lax.fori_loop(0, self.local_steps, local, ys), y)
        moved = jax.tree.map(lambda a, b: (a - b) / (self.local_steps * self.lower_optimizer), y, new)
        return new, memory, moved

    def _averaged(self, at: Round, mine: PyTree, y: PyTree) -> PyTree:
        """y plus the weighted mean displacement."""
        return optax.tree.add(y, at.mean(optax.tree.sub(mine, at.copies(y)), "lower"))

    def _walk(self, problem: Problem, x: PyTree, y: PyTree, h: PyTree, key: StepKey) -> PyTree:
        """FedNest's FedOut: the mean over clients of the sum of their local directions."""
        at = Round(problem, key.fold_in(30), self.clients, self.weighting)
        xs, ys, hs = at.copies(x), at.copies(y), at.copies(h)

        def local(v: Any, carry: Any) -> Any:
            mine, total = carry
            gradient = jax.grad(at.upper(at.key.fold_in(2).inner(v, self.local_upper_steps)), argnums=0)
            direction = optax.tree.add(hs, at.weigh(optax.tree.sub(gradient(mine, ys), gradient(xs, ys)), "upper"))
            return jax.tree.map(lambda x, d: x - self.upper_optimizer * d, mine, direction), optax.tree.add(
                total, direction
            )

        return _agents.mean(jax.lax.fori_loop(0, self.local_upper_steps, local, (xs, optax.tree.zeros_like(xs)))[1])

    def _traffic(self, problem: Problem, x: PyTree, y: PyTree) -> dict[str, jax.Array]:
        p, q = _agents.size_of(x), _agents.size_of(y)
        n = Round(problem, StepKey(None, None, None), self.clients).size  # type: ignore[arg-type]
        per_round = 2 if self.lower == "svrg" else 1
        rounds = self.lower_rounds * per_round + self.hypergradient.rounds()
        floats = self.lower_rounds * (p + 2 * q + (per_round - 1) * 2 * q) + self.hypergradient.floats(p, q)
        if self.local_upper_steps > 1:
            rounds, floats = rounds + 1, floats + 3 * p + q
        return traffic(rounds, n * floats)


def FedMBO(
    clients: int | None = 10,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    *,
    lower_rounds: int = 5,
    terms: int = 10,
    chain: str = "sum",
    **options: Any,
) -> FederatedNested:
    """FedMBO: minibatch rounds for y, parallel hypergradient chains over freshly sampled clients; variance falls as
    1/clients.

    Args:
      clients: sampled per round.
      upper_optimizer, lower_optimizer: the server's steps for x and y.
      lower_rounds: rounds for y per outer step.
      terms: terms of the Neumann series.
      chain: "sum" (the truncated series, several times less variance for the same rounds) or "random" (the paper's
        random lengths).
      **options: further fields of `FederatedNested`.

    lower_rounds + terms + 1 rounds per outer step. The update is reconstructed from the paper's description; it has no
    public code.

    Reference: Huang, Zhang, Ji, "Achieving Linear Speedup in Non-IID Federated Bilevel Learning", ICML 2023.
    """
    if chain not in ("sum", "random"):
        raise ValueError(f"FedMBO(chain={chain!r}): 'sum' or 'random'.")
    return FederatedNested(
        clients,
        upper_optimizer,
        lower_optimizer,
        ParallelHypergradient(terms, chain == "random"),
        lower_rounds=lower_rounds,
        **options,
    )


def FedNest(
    clients: int | None = 10,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    *,
    lower_rounds: int = 5,
    local_steps: int = 1,
    local_upper_steps: int = 1,
    terms: int = 10,
    chain: str = "random",
    **options: Any,
) -> FederatedNested:
    """FedNest: variance-reduced local steps for y (FedInn), one chain of averaged Hessians (FedIHGP), local steps for
    x (FedOut).

    The chain's common random length leaves a variance that more clients do not lower; chain="sum" sums the series.

    Reference: Tarzanagh, Li, Thrampoulidis, Oymak, ICML 2022.
    """
    return FederatedNested(
        clients, upper_optimizer, lower_optimizer, SharedHypergradient(terms, chain == "random"), "svrg",
        lower_rounds, local_steps, local_upper_steps, **options,
    )  # fmt: skip


def LFedNest(
    clients: int | None = 10,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    *,
    lower_rounds: int = 5,
    local_steps: int = 1,
    terms: int = 10,
    **options: Any,
) -> FederatedNested:
    """LFedNest: everything local, averaged. Few rounds, and a bias where clients differ that no step size removes: a
    baseline.

    Reference: Tarzanagh, Li, Thrampoulidis, Oymak, ICML 2022.
    """
    return FederatedNested(
        clients,
        upper_optimizer,
        lower_optimizer,
        LocalHypergradient(terms),
        "local",
        lower_rounds,
        local_steps,
        **options,
    )
