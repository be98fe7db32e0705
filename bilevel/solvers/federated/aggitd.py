"""AggITD: the hypergradient's linear system runs in the same rounds as the lower level."""

from __future__ import annotations

from typing import Any

import jax
import optax

from bilevel._module import hyperparameters, state
from bilevel.keys import Draw
from bilevel.optimizers import Move, check_optimizer
from bilevel.solvers._directions import Point
from bilevel.solvers.federated import oracles
from bilevel.solvers.federated.engine import Engine, Federated, Oracle, measures
from bilevel.typing import Metrics, PyTree


@state
class AggITDState:
    """The server's x and y, and the memory of its step rule for x."""

    x: PyTree
    y: PyTree
    upper: PyTree


@hyperparameters
class AggITD(Federated):
    """Aggregated iterative differentiation.

    One exchange per lower step carries a gradient and a Hessian-vector product.

        v = 0;   `rounds` times, clients sampled afresh each time:
            y <- y - b mean_i D_y,i,     v <- v - b mean_i D_v,i      both at the y before the step
        h = mean_i D_x,i,   x <- x + upper_optimizer(h)

    with D_y = f_y, D_v = f_yy v - F_y, D_x = F_x - f_xy v. v is the sum over the lower steps t of
    prod_{s > t} (I - b f_yy(y_s)) b F_y(y_t): the matrix products of unrolled differentiation, aggregated over clients
    while y is still moving. The published method draws the step at which the product starts at random; the sum over all
    starts has the same expectation and less variance.

    Attributes:
      clients: how many take part in each round; None: all.
      upper_optimizer: the server's step size or optax rule for x.
      lower_step: b, below 1 / L.
      rounds: T; the bias of h falls as (1 - b mu)^T.
      weighting: "samples": a client counts by its number of samples (`data.Clients`); "clients": all count alike.

    Metrics as in `FederatedNested`; rounds + 1 rounds per outer step. The update is reconstructed from the paper's
    description.

    Reference: Xiao, Ji, "Communication-Efficient Federated Hypergradient Computation via Aggregated Iterative
    Differentiation", ICML 2023.
    """

    clients: int | None = 10
    upper_optimizer: float | optax.GradientTransformation = 0.01
    lower_step: float = 0.1
    rounds: int = 10
    weighting: str = "samples"

    def __post_init__(self) -> None:
        self._check("rounds")
        check_optimizer("AggITD", "upper_optimizer", self.upper_optimizer)
        check_optimizer("AggITD", "lower_step", self.lower_step)

    @property
    def asks(self) -> tuple[Oracle, ...]:
        """The oracles of this method's rounds."""
        return oracles.aggitd, oracles.hyper

    def begin(self, engine: Engine, x: PyTree, y: PyTree) -> AggITDState:
        """The server before the first round."""
        return AggITDState(x, y, Move(self.upper_optimizer).init(x))

    def advance(self, engine: Engine, state: AggITDState) -> tuple[AggITDState, Metrics]:
        """The rounds of one outer iteration."""
        x = state.x

        def exchange(at: Any, carry: tuple[PyTree, PyTree, PyTree]) -> tuple[PyTree, PyTree, PyTree]:
            y, v, _ = carry
            D = at.ask(oracles.aggitd, Point(x, y, v)).mean
            y, v = jax.tree.map(lambda a, d: a - self.lower_step * d, (y, v), (D.y, D.v))
            return y, v, D.y

        zero = optax.tree.zeros_like(state.y)
        y, v, G = engine.repeat(Draw.ROUND, self.rounds, exchange, (state.y, zero, zero))
        last = engine.round(Draw.LAST).ask(oracles.hyper, Point(x, y, v))
        h = last.mean.x
        x, upper = Move(self.upper_optimizer)(h, state.upper, x)
        return AggITDState(x, y, upper), measures(last.value, h, G)
