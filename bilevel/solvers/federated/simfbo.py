"""Single-loop federated methods: one round moves y, v and x together."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from bilevel._module import constructor, hyperparameters, name_of, state
from bilevel.keys import Draw
from bilevel.optimizers import Move, check_count, check_optimizer, is_rule
from bilevel.solvers import _agents
from bilevel.solvers._directions import Point
from bilevel.solvers.federated import oracles
from bilevel.solvers.federated.engine import Engine, Federated, InProcess, Oracle
from bilevel.typing import Metrics, PyTree

_VARIABLES = ("upper", "lower", "linear")


@state
class SingleLoopState:
    """The server's x, y and v (which solves f_yy v = F_y), and the memories of its three step rules."""

    x: PyTree
    y: PyTree
    v: PyTree
    upper: PyTree
    lower: PyTree
    linear: PyTree


@hyperparameters
class FederatedSingleLoop(Federated):
    """One round per outer step: clients take local steps on y, v and x at once and send the sums of their directions.

        D_y = f_y,   D_v = f_yy v - F_y,   D_x = F_x - f_xy v       a client's directions at one point
        each sampled client i starts at the server's (x, y, v) and takes t_i local steps
            y_i <- y_i - b D_y,   v_i <- v_i - g D_v,   x_i <- x_i - a D_x
        the server steps along the average of the clients' sums of directions, divided by the mean number of local steps
            y <- y + lower_optimizer(D_y),   v <- ball(v + linear_optimizer(D_v)),   x <- x + upper_optimizer(D_x)

    With one local step this is SOBA on the average of the sampled clients. Clients with more local steps pull harder,
    towards a minimiser of another objective; `normalise=True` divides each client's sum by its own number of steps
    instead.

    Attributes:
      upper_optimizer, lower_optimizer, linear_optimizer: the server's step sizes or optax rules for x, y and v.
      local_steps: local steps per round, one number or a sequence with one for each client.
      local_upper, local_lower, local_linear: the clients' step sizes a, b, g; None: the server's, divided by the mean
        number of local steps.
      normalise: as above.
      radius: v is kept in a ball of this radius; None: free.

    `clients`, `weighting` and metrics as in `FederatedNested`; the norms are |mean D_x| and |mean D_y| at the server's
    point (averaged along the local steps).

    Oracle calls per local step: one of each, from one linearisation.
    """

    clients: int | None = None
    upper_optimizer: float | optax.GradientTransformation = 0.01
    lower_optimizer: float | optax.GradientTransformation = 0.1
    linear_optimizer: float | optax.GradientTransformation = 0.1
    local_steps: int | tuple[int, ...] = 1
    local_upper: float | None = None
    local_lower: float | None = None
    local_linear: float | None = None
    normalise: bool = False
    radius: float | None = None
    weighting: str = "samples"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        self._check()
        if isinstance(self.local_steps, (list, np.ndarray)):
            object.__setattr__(self, "local_steps", tuple(self.local_steps))
        what = "a positive integer is needed, or a sequence with one for each client"
        for count in self._counts or [()]:
            check_count(owner, what, local_steps=count)
        if isinstance(self.local_steps, tuple):
            object.__setattr__(self, "local_steps", tuple(map(int, self.local_steps)))
        for name in _VARIABLES:
            rule = getattr(self, f"{name}_optimizer")
            check_optimizer(owner, f"{name}_optimizer", rule)
            if max(self._counts) > 1 and getattr(self, f"local_{name}") is None and is_rule(rule):
                raise ValueError(
                    f"{owner}({name}_optimizer=an optax rule) with several local steps needs the clients' own step "
                    f"size: local_{name}=..."
                )
        if isinstance(self.radius, float) and not self.radius > 0:
            raise ValueError(f"{owner}(radius={self.radius}): the ball's radius is positive, or None.")

    @property
    def _counts(self) -> tuple[int, ...]:
        return self.local_steps if isinstance(self.local_steps, tuple) else (self.local_steps,)

    @property
    def asks(self) -> tuple[Oracle, ...]:
        """The oracle of this method's round; one number of local steps per client is for clients with numbers."""
        return (oracles.uneven if isinstance(self.local_steps, tuple) else oracles.simfbo,)

    def begin(self, engine: Engine, x: PyTree, y: PyTree) -> SingleLoopState:
        """The server before the first round, v at 0."""
        name, given = name_of(self), len(self._counts)
        if isinstance(engine, InProcess) and isinstance(self.local_steps, tuple) and given != engine.total:
            raise ValueError(
                f"{name}(local_steps=...) has {given} entries for {engine.total} clients: give one for each."
            )
        v = optax.tree.zeros_like(y)
        upper, lower, linear = self._moves()
        return SingleLoopState(x, y, v, upper.init(x), lower.init(y), linear.init(v))

    def _moves(self) -> tuple[Move, Move, Move]:
        ball = functools.partial(optax.projections.projection_l2_ball, scale=self.radius)
        linear = Move(self.linear_optimizer, None if self.radius is None else ball)
        return Move(self.upper_optimizer), Move(self.lower_optimizer), linear

    def advance(self, engine: Engine, state: SingleLoopState) -> tuple[SingleLoopState, Metrics]:
        """One round."""
        at = engine.round(Draw.ROUND)
        found = at.ask(*self.asks, Point(state.x, state.y, state.v), **self._options(at))
        D = found.mean
        upper, lower, linear = self._moves()
        x, upper_memory = upper(D.x, state.upper, state.x)
        y, lower_memory = lower(D.y, state.lower, state.y)
        v, linear_memory = linear(D.v, state.linear, state.v)
        new = SingleLoopState(x, y, v, upper_memory, lower_memory, linear_memory)
        return new, _agents.measures(found.value, D.x, D.y)

    def _options(self, at: Any) -> dict[str, Any]:
        """The oracle's: how many local steps, of which sizes."""
        if self.local_steps == 1:
            return {}
        mean = sum(self._counts) / len(self._counts)
        own = [(getattr(self, f"local_{name}"), getattr(self, f"{name}_optimizer")) for name in _VARIABLES]
        steps = tuple(servers / mean if clients is None else clients for clients, servers in own)
        if not isinstance(self.local_steps, tuple):
            return {"local_steps": int(self.local_steps), "steps": steps}
        counts = at.of(jnp.asarray(self.local_steps))
        divisor = counts if self.normalise else jnp.asarray(mean)
        return {"counts": counts, "most": max(self.local_steps), "steps": steps, "divisor": divisor}


@constructor
def SimFBO(
    clients: int | None = 10,
    upper_optimizer: Any = 0.005,
    lower_optimizer: Any = 0.05,
    linear_optimizer: Any = 0.05,
    *,
    local_steps: int | tuple[int, ...] = 1,
    radius: float | None = None,
    **options: Any,
) -> FederatedSingleLoop:
    """SimFBO: one round of p + 2 q numbers each way per outer step. The practical default.

    Args:
      clients: sampled per round.
      upper_optimizer, lower_optimizer, linear_optimizer: the server's steps for x, y and v.
      local_steps: of every client, or one number for each.
      radius: of the ball that holds v; None: no ball.
      **options: further fields of `FederatedSingleLoop`.

    Reference: Yang, Xiao, Ji, "SimFBO: Towards Simple, Flexible and Communication-efficient Federated Bilevel
    Learning", NeurIPS 2023.
    """
    options |= {"local_steps": local_steps, "radius": radius}
    return FederatedSingleLoop(clients, upper_optimizer, lower_optimizer, linear_optimizer, **options)


@constructor
def ShroFBO(
    clients: int | None = 10,
    upper_optimizer: Any = 0.005,
    lower_optimizer: Any = 0.05,
    linear_optimizer: Any = 0.05,
    *,
    local_steps: int | tuple[int, ...] = 1,
    radius: float | None = None,
    **options: Any,
) -> FederatedSingleLoop:
    """ShroFBO: `SimFBO`, each client's sum divided by its own number of local steps. Reference: as `SimFBO`."""
    options |= {"local_steps": local_steps, "radius": radius, "normalise": True}
    return SimFBO(clients, upper_optimizer, lower_optimizer, linear_optimizer, **options)
