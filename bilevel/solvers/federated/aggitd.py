"""AggITD: the hypergradient's linear system runs in the same rounds as the lower level."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import optax

from bilevel._module import hyperparameters, state
from bilevel.keys import Draw
from bilevel.optimizers import Move, check_optimizer
from bilevel.solvers import _agents
from bilevel.solvers._directions import Point
from bilevel.solvers.federated import oracles
from bilevel.solvers.federated.engine import Engine, Federated, Oracle
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
    while y moves. The paper draws the step at which the product starts; the sum over all starts has the same
    expectation and less variance.

    Attributes:
      upper_optimizer: the server's step size or optax rule for x.
      lower_step: b, below 1 / L.
      rounds: T; the bias of h falls as (1 - b mu)^T.

    `clients`, `weighting` and metrics as in `FederatedNested`; rounds + 1 rounds per outer step. The update is
    reconstructed from the paper's description.

    Reference: Xiao, Ji, "Communication-Efficient Federated Hypergradient Computation via Aggregated Iterative
    Differentiation", ICML 2023.
    """

    clients: int | None = 10
    upper_optimizer: float | optax.GradientTransformation = 0.01
    lower_step: float = 0.1
    rounds: int = 10
    weighting: str = "samples"
    asks: ClassVar[tuple[Oracle, ...]] = (oracles.aggitd, oracles.hyper)

    def __post_init__(self) -> None:
        self._check("rounds")
        check_optimizer("AggITD", "upper_optimizer", self.upper_optimizer)
        check_optimizer("AggITD", "lower_step", self.lower_step)

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
        return AggITDState(x, y, upper), _agents.measures(last.value, h, G)
