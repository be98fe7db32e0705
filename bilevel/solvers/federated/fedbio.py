"""FedBiO: local steps on three coupled problems, all averaged at the end of a round; and its accelerated form."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from bilevel._module import constructor, hyperparameters, state
from bilevel.keys import Draw
from bilevel.optimizers import check_count
from bilevel.solvers import _agents
from bilevel.solvers._directions import Point
from bilevel.solvers.federated import oracles
from bilevel.solvers.federated.engine import Engine, Federated, Oracle
from bilevel.solvers.federated.simfbo import FederatedSingleLoop
from bilevel.typing import Metrics, PyTree


@constructor
def FedBiO(
    clients: int | None = None,
    upper_step: float = 0.01,
    lower_step: float = 0.1,
    linear_step: float = 0.1,
    *,
    local_steps: int = 5,
    **options: Any,
) -> FederatedSingleLoop:
    """FedBiO: x, y and v walk `local_steps` local steps and are averaged.

    Averaging the clients' variables is a server step along their summed directions: `FederatedSingleLoop` with the
    server's steps `local_steps` times the clients'.

    Reference: Li, Huang, Huang, "Communication-Efficient Federated Bilevel Optimization with Global and Local Lower
    Level Problems", NeurIPS 2023 (the global lower level problem).
    """
    check_count("FedBiO", local_steps=local_steps)
    steps = upper_step, lower_step, linear_step
    x, y, v = (step * local_steps for step in steps)
    return FederatedSingleLoop(clients, x, y, v, local_steps, *steps, **options)


@state
class AcceleratedState:
    """The server's x, y, v and their momenta, averaged over clients at the end of each round."""

    x: PyTree
    y: PyTree
    v: PyTree
    momenta: Point


@hyperparameters
class FedBiOAcc(Federated):
    """FedBiO with a STORM momentum on each of its three directions.

    Local step t of a round, with a_t = delta / (offset + t)^(1/3), t counted over all rounds, and D the client's
    directions:

        (x, y, v)+ = (x, y, v) - a_t (upper_step m_x, lower_step m_y, linear_step m_v)
        m+ = D((x, y, v)+; sample) + (1 - momentum a_t^2) (m - D((x, y, v); the same sample))

    After `local_steps` of them the server averages variables and momenta. Deviation: at the last local step the
    momentum is corrected at the client's own point and then averaged, not at the averaged point.

    Attributes:
      upper_step, lower_step, linear_step: relative step sizes of x, y and v.
      delta, offset: of the schedule; the first step is delta / offset^(1/3).
      momentum: the constant c of the forgetting rate c a_t^2.
      local_steps: local steps per round.

    Two evaluations of each oracle per local step. `clients` (the paper assumes all), `weighting` (of the losses) and
    metrics as in `FederatedNested`; the norms are those of the averaged momenta. Reference: as `FedBiO`.
    """

    clients: int | None = None
    upper_step: float = 0.1
    lower_step: float = 1.0
    linear_step: float = 1.0
    delta: float = 0.2
    offset: float = 8.0
    momentum: float = 10.0
    local_steps: int = 5
    weighting: str = "samples"
    asks: ClassVar[tuple[Oracle, ...]] = (oracles.storm,)

    def __post_init__(self) -> None:
        self._check("local_steps")
        for name in ("upper_step", "lower_step", "linear_step", "delta", "offset", "momentum"):
            value = getattr(self, name)
            if isinstance(value, float) and not value > 0:
                raise ValueError(f"FedBiOAcc({name}={value}): a positive number is needed.")

    def begin(self, engine: Engine, x: PyTree, y: PyTree) -> AcceleratedState:
        """The server before the first round; momenta start with the first sample."""
        v = optax.tree.zeros_like(y)
        return AcceleratedState(x, y, v, optax.tree.zeros_like(Point(x, y, v)))

    def advance(self, engine: Engine, state: AcceleratedState) -> tuple[AcceleratedState, Metrics]:
        """One round."""

        def schedule(t: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
            a = self.delta / jnp.cbrt(self.offset + t)
            kept = jnp.where(t == 0, 0.0, jnp.maximum(1 - self.momentum * a * a, 0.0))
            return (a * self.upper_step, a * self.lower_step, a * self.linear_step), kept

        sent = Point(state.x, state.y, state.v), state.momenta
        first = engine.key.inner(0, self.local_steps).step
        own = {"first": first, "local_steps": self.local_steps, "schedule": schedule}
        found = engine.round(Draw.ROUND).ask(oracles.storm, sent, weighted=True, **own)
        at, momenta = found.mean
        return AcceleratedState(at.x, at.y, at.v, momenta), _agents.measures(found.value, momenta.x, momenta.y)
