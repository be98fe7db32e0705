"""Nested federated methods: rounds for the lower level, rounds for the hypergradient, one server step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import constructor, hyperparameters, state
from bilevel.keys import Draw
from bilevel.optimizers import Move, check_optimizer, is_rule, rewound
from bilevel.solvers import _agents
from bilevel.solvers._directions import Point
from bilevel.solvers.federated import oracles
from bilevel.solvers.federated.engine import Engine, Federated, Oracle
from bilevel.solvers.federated.hypergradients import LocalHypergradient, ParallelHypergradient, SharedHypergradient
from bilevel.typing import Metrics, PyTree

LOWER: dict[str, tuple[Oracle, ...]] = {
    "minibatch": (oracles.grad_y,),
    "svrg": (oracles.grad_y, oracles.local),
    "local": (oracles.local,),
}
"""The lower rounds, and the oracles that they ask."""


@state
class FederatedState:
    """The server's x and y, the memories of its step rules, and the bound L on the clients' lower curvature."""

    x: PyTree
    y: PyTree
    upper: PyTree
    lower: PyTree
    curvature: jax.Array


@hyperparameters
class FederatedNested(Federated):
    """A server solves min_x F(x, y*(x)), y*(x) = argmin_y f(x, y); F and f are averages over clients.

    It never sees their data. One outer step:

        y <- lower_rounds of `lower` at x
        h =  hypergradient(x, y),  rounds of its own
        x <- x + upper_optimizer(h);     with local_upper_steps > 1 each sampled client walks
             x_i <- x_i - step h_i,  h_i = F_x,i(x_i, y) - F_x,i(x, y) + h,   and the server moves along mean_i sum h_i

    One lower round of n sampled clients is, with b the lower step,

        "minibatch"   y <- y + lower_optimizer(mean_i G_i(x, y))
        "svrg"        q = mean_i G_i(x, y), then local_steps times  y_i <- y_i - b (G_i(y_i) - G_i(y) + q), both at
                      one sample; averaged (two rounds)
        "local"       local_steps times  y_i <- y_i - b G_i(y_i), averaged: drifts apart where clients differ

    The data of both levels are `data.Clients` or `data.Agents`. Each round samples its clients without replacement; but
    fewer than all of unequal sizes, which count by their samples, are drawn by their shares of the lower level's.

    Attributes:
      clients: how many take part in each round; None: all.
      upper_optimizer, lower_optimizer: the server's step sizes or optax rules ("svrg" and "local" need a number for y).
        A schedule of y's is over the `lower_rounds` of one outer step where they are several, and else over the run.
      hypergradient: an estimator of `federated.hypergradients`.
      lower, lower_rounds, local_steps, local_upper_steps: as above.
      curvature: L, at least any client's largest lower curvature; None: 1.2 times an estimate at the start. Where a
        chain meets a larger one, L is as large from there on, and 1.2 times that from the next step.
      weighting: "samples": a client counts by its number of samples (`data.Clients`), and where these are unequal and
        not all take part, or each has a chain of its own, it is drawn that much more often; "clients": all count alike.

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
        self._check("lower_rounds", "local_steps", "local_upper_steps")
        check_optimizer(owner, "upper_optimizer", self.upper_optimizer)
        check_optimizer(owner, "lower_optimizer", self.lower_optimizer)
        L = self.curvature
        if isinstance(L, (bool, str)) or (isinstance(L, (int, float)) and not 0 < L < float("inf")):
            raise ValueError(f"{owner}(curvature={L!r}): L is a positive number, or None for an estimate.")
        if not (callable(self.hypergradient) and hasattr(self.hypergradient, "asks")):
            raise TypeError(
                f"{owner}(hypergradient={self.hypergradient!r}): give an estimator of federated.hypergradients, "
                "ParallelHypergradient(), SharedHypergradient() or LocalHypergradient()."
            )
        if self.lower not in LOWER:
            rounds = ", ".join(map(repr, LOWER))
            raise ValueError(f"{owner}(lower={self.lower!r}): the lower rounds are one of {rounds}.")
        if self.lower != "minibatch" and is_rule(self.lower_optimizer):
            raise ValueError(
                f"{owner}(lower={self.lower!r}) takes its steps on the clients: lower_optimizer must be a step size, "
                "not an optax rule."
            )
        if self.local_upper_steps > 1 and is_rule(self.upper_optimizer):
            raise ValueError(
                f"{owner}(local_upper_steps={self.local_upper_steps}): upper_optimizer must be a step size, not an "
                "optax rule."
            )

    @property
    def asks(self) -> tuple[Oracle, ...]:
        """The oracles of this method's rounds."""
        walk = (oracles.fedout,) if self.local_upper_steps > 1 else ()
        return *LOWER[self.lower], *self.hypergradient.asks, *walk

    def begin(self, engine: Engine, x: PyTree, y: PyTree) -> FederatedState:
        """The server before the first round."""
        L = 1.2 * engine.curvature(x, y) if self.curvature is None else self.curvature
        memories = Move(self.upper_optimizer).init(x), Move(self.lower_optimizer).init(y)
        return FederatedState(x, y, *memories, jnp.asarray(L))

    def advance(self, engine: Engine, state: FederatedState) -> tuple[FederatedState, Metrics]:
        """The rounds of one outer iteration."""
        x = state.x

        def lower_round(at: Any, carry: tuple[PyTree, PyTree, PyTree]) -> tuple[PyTree, PyTree, PyTree]:
            y, memory, _ = carry
            G = None if self.lower == "local" else at.ask(oracles.grad_y, Point(x, y, None)).mean.y
            if self.lower == "minibatch":
                return *Move(self.lower_optimizer)(G, memory, y), G
            own = {"local_steps": self.local_steps, "step_size": self.lower_optimizer}
            moved = at.ask(oracles.local, Point(x, y, G), held=G is not None, **own).mean.y
            if G is None:
                G = jax.tree.map(lambda d: -d / (self.local_steps * self.lower_optimizer), moved)
            return optax.tree.add(y, moved), memory, G

        # A schedule is over the rounds at one x, where there are several.
        memory = rewound(state.lower, state.y) if self.lower_rounds > 1 else state.lower
        start = (state.y, memory, optax.tree.zeros_like(state.y))
        y, memory, residual = engine.repeat(Draw.ROUND, self.lower_rounds, lower_round, start)
        value, h, met = self.hypergradient(engine, x, y, state.curvature)
        L = state.curvature if met is None else jnp.maximum(state.curvature, (1.2 * met).astype(state.curvature.dtype))
        metrics = _agents.measures(value, h, residual)
        if self.local_upper_steps > 1:
            own = {"local_steps": self.local_upper_steps, "step_size": self.upper_optimizer}
            h = engine.round(Draw.WALK).ask(oracles.fedout, Point(x, y, h), weighted=True, **own).mean.x
        x, upper = Move(self.upper_optimizer)(h, state.upper, x)
        return FederatedState(x, y, upper, memory, L), metrics


def _check_chain(owner: str, chain: Any) -> None:
    if chain not in ("sum", "random"):
        raise ValueError(f"{owner}(chain={chain!r}): 'sum' or 'random'.")


@constructor
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
    """FedMBO: minibatch rounds for y, parallel chains over freshly sampled clients; variance falls as 1/clients.

    Args:
      clients: sampled per round.
      upper_optimizer, lower_optimizer: the server's steps for x and y.
      lower_rounds: rounds for y per outer step.
      terms: terms of the Neumann series.
      chain: "sum" (the truncated series, several times less variance for the same rounds) or "random" (the paper's
        random lengths).
      **options: further fields of `FederatedNested` (`curvature`, `weighting`).

    lower_rounds + terms + 1 rounds per outer step. The update is reconstructed from the paper's description; it has no
    public code.

    Reference: Huang, Zhang, Ji, "Achieving Linear Speedup in Non-IID Federated Bilevel Learning", ICML 2023.
    """
    _check_chain("FedMBO", chain)
    chains = ParallelHypergradient(terms, chain == "random")
    options["lower_rounds"] = lower_rounds
    return FederatedNested(clients, upper_optimizer, lower_optimizer, chains, **options)


@constructor
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
    """FedNest: `local_steps` variance-reduced for y (FedInn), one chain of averaged Hessians (FedIHGP),
    `local_upper_steps` for x (FedOut).

    Arguments as `FedMBO`'s. The chain's common random length leaves a variance that more clients do not lower;
    chain="sum" sums the series.

    Reference: Tarzanagh, Li, Thrampoulidis, Oymak, ICML 2022.
    """
    _check_chain("FedNest", chain)
    shared = SharedHypergradient(terms, chain == "random")
    steps = lower_rounds, local_steps, local_upper_steps
    return FederatedNested(clients, upper_optimizer, lower_optimizer, shared, "svrg", *steps, **options)


@constructor
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
    """LFedNest: everything local, averaged; arguments as `FedMBO`'s.

    A baseline: few rounds, and a bias where clients differ that no step size removes. Reference: as `FedNest`.
    """
    steps = LocalHypergradient(terms), "local", lower_rounds, local_steps
    return FederatedNested(clients, upper_optimizer, lower_optimizer, *steps, **options)
