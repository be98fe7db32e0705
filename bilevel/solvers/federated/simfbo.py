"""Single-loop federated methods: one round moves y, z and x together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters, state
from bilevel.data import StepKey
from bilevel.optimizers import as_optimizer, check_optimizer
from bilevel.problem import Problem
from bilevel.solvers import _agents
from bilevel.solvers._base import refuse
from bilevel.solvers.federated._round import Round, check_clients, check_count, norms, traffic
from bilevel.typing import PyTree


@state
class SingleLoopState:
    """The server's x, y and z (which solves H z = F_y), and the memories of its three step rules."""

    x: PyTree
    y: PyTree
    z: PyTree
    upper: PyTree
    lower: PyTree
    linear: PyTree


def directions(
    at: Round, key: StepKey, x: PyTree, y: PyTree, z: PyTree
) -> tuple[jax.Array, tuple[PyTree, PyTree, PyTree]]:
    """(mean upper loss, (D_x, D_y, D_z)) of each of the round's clients at its own point, stacked and weighted.

    D_y = G_y,    D_z = H z - F_y,    D_x = F_x - J z
    """
    value, (F_x, F_y) = jax.value_and_grad(at.upper(key), argnums=(0, 1))(x, y)
    lower = derivatives.linearised(at.lower(key), x, y)
    cross, hvp = lower.products(z)
    F_x, F_y = at.weigh(F_x, "upper"), at.weigh(F_y, "upper")
    G_y, hvp, cross = (at.weigh(v, "lower") for v in (lower.gradient_y, hvp, cross))
    return value / at.size, (optax.tree.sub(F_x, cross), G_y, optax.tree.sub(hvp, F_y))


@hyperparameters
class FederatedSingleLoop:
    """One round per outer step: clients take local steps on y, z and x at once and send the sums of their directions.

        D_y = G_y,   D_z = H z - F_y,   D_x = F_x - J z        a client's directions at one point
        each sampled client i starts at the server's (x, y, z) and takes t_i local steps
            y_i <- y_i - b D_y,   z_i <- z_i - g D_z,   x_i <- x_i - a D_x
        the server steps along the average of the clients' sums of directions, divided by the mean number of local steps
            y <- y + lower_optimizer(D_y),   z <- ball(z + linear_optimizer(D_z)),   x <- x + upper_optimizer(D_x)

    With one local step this is SOBA on the average of the sampled clients. Clients with more local steps pull harder,
    towards a minimiser of another objective; `normalise=True` divides each client's sum by its own number of steps
    instead.

    Attributes:
      clients: how many take part in each round; None: all.
      upper_optimizer, lower_optimizer, linear_optimizer: the server's step sizes or optax rules for x, y and z.
      local_steps: local steps per round, one number or one per client.
      local_upper, local_lower, local_linear: the clients' step sizes a, b, g; None: the server's, divided by the mean
        number of local steps.
      normalise: as above.
      radius: z is kept in a ball of this radius; None: free.
      weighting: "samples": a client counts by its number of samples (`data.Clients`); "clients": all count alike.

    Metrics: `upper_loss`, `hypergradient_norm` (|mean D_x|) and `lower_residual` (|mean D_y|) on the round's clients at
    the server's point (averaged along the local steps), `communication_rounds` (1), `communication_floats` (received
    and sent by all clients).

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
        check_count(owner, clients=self.clients)
        for count in self.local_steps if isinstance(self.local_steps, tuple) else (self.local_steps,):
            check_count(owner, local_steps=count)
        for name in ("upper", "lower", "linear"):
            check_optimizer(owner, f"{name}_optimizer", getattr(self, f"{name}_optimizer"))
            if (
                self._most > 1
                and getattr(self, f"local_{name}") is None
                and isinstance(getattr(self, f"{name}_optimizer"), optax.GradientTransformation)
            ):
                raise ValueError(
                    f"{owner}({name}_optimizer=an optax rule) with several local steps needs the clients' own "
                    f"step size: local_{name}=..."
                )
        if isinstance(self.radius, float) and not self.radius > 0:
            raise ValueError(f"{owner}(radius={self.radius}): the ball's radius is positive, or None.")
        if self.weighting not in ("samples", "clients"):
            raise ValueError(f"{owner}(weighting={self.weighting!r}): 'samples' or 'clients'.")

    @property
    def _most(self) -> int:
        return max(self.local_steps) if isinstance(self.local_steps, tuple) else self.local_steps

    @property
    def _mean_steps(self) -> float:
        return (
            sum(self.local_steps) / len(self.local_steps) if isinstance(self.local_steps, tuple) else self.local_steps
        )

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> SingleLoopState:
        """The server before the first round, z at 0."""
        refuse(self, problem, x)
        total = check_clients(problem, type(self).__name__, self.clients)
        if isinstance(self.local_steps, tuple) and len(self.local_steps) != total:
            raise ValueError(
                f"{type(self).__name__}(local_steps=...) has {len(self.local_steps)} entries for {total} clients: "
                f"give one for each."
            )
        upper, lower, linear = (
            as_optimizer(o) for o in (self.upper_optimizer, self.lower_optimizer, self.linear_optimizer)
        )
        return SingleLoopState(x, y, optax.tree.zeros_like(y), upper.init(x), lower.init(y), linear.init(y))

    def step(
        self, problem: Problem, state: SingleLoopState, key: StepKey
    ) -> tuple[SingleLoopState, dict[str, jax.Array]]:
        """One round."""
        at = Round(problem, key.fold_in(10), self.clients, self.weighting)
        start = at.copies((state.x, state.y, state.z))
        if self._most == 1:
            value, total = directions(at, at.key, *start)
        else:
            value, total = self._local_steps(at, start)
        D_x, D_y, D_z = _agents.mean(total)

        (x, upper), (y, lower), (z, linear) = (
            _stepped(rule, direction, memory, variable)
            for rule, direction, memory, variable in (
                (self.upper_optimizer, D_x, state.upper, state.x),
                (self.lower_optimizer, D_y, state.lower, state.y),
                (self.linear_optimizer, D_z, state.linear, state.z),
            )
        )
        if self.radius is not None:
            z = optax.projections.projection_l2_ball(z, self.radius)
        p, q = _agents.size_of(x), _agents.size_of(y)
        metrics = {"upper_loss": value, **norms(D_x, D_y), **traffic(1, at.size * 2 * (p + 2 * q))}
        return SingleLoopState(x, y, z, upper, lower, linear), metrics

    def _local_steps(self, at: Round, start: Any) -> tuple[jax.Array, Any]:
        counts = jnp.asarray(self.local_steps)[at.who()] if isinstance(self.local_steps, tuple) else None
        steps = [
            getattr(self, f"{name}_optimizer") / self._mean_steps
            if getattr(self, f"local_{name}") is None
            else getattr(self, f"local_{name}")
            for name in ("upper", "lower", "linear")
        ]

        def local(k: Any, carry: Any) -> Any:
            mine, total, value = carry
            found, D = directions(at, at.key.inner(k, self._most), *mine)
            if counts is not None:
                D = jax.tree.map(lambda d: jnp.where((k < counts).reshape(-1, *[1] * (d.ndim - 1)), d, 0), D)
            mine = tuple(
                jax.tree.map(lambda v, d, s=s: v - s * d, v, d) for s, v, d in zip(steps, mine, D, strict=True)
            )
            return mine, optax.tree.add(total, D), jnp.where(k == 0, found, value)

        shape = jax.eval_shape(lambda: directions(at, at.key, *start)[0])
        zero = (start, optax.tree.zeros_like(start), jnp.zeros(shape.shape, shape.dtype))
        _, total, value = jax.lax.fori_loop(0, self._most, local, zero)
        if self.normalise and counts is not None:
            total = jax.tree.map(lambda d: d / counts.reshape(-1, *[1] * (d.ndim - 1)).astype(d.dtype), total)
        else:
            total = optax.tree.scale(1 / self._mean_steps, total)
        return value, total


def _stepped(rule: Any, direction: PyTree, memory: PyTree, variable: PyTree) -> tuple[PyTree, PyTree]:
    updates, memory = as_optimizer(rule).update(direction, memory, variable)
    return optax.apply_updates(variable, updates), memory


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

    Reference: Yang, Xiao, Ji, "SimFBO: Towards Simple, Flexible and Communication-efficient Federated Bilevel
    Learning", NeurIPS 2023.
    """
    return FederatedSingleLoop(
        clients, upper_optimizer, lower_optimizer, linear_optimizer, local_steps, radius=radius, **options
    )


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
    """ShroFBO: SimFBO for clients that take unequal numbers of local steps, each one's sum divided by its own number.

    Reference: Yang, Xiao, Ji, NeurIPS 2023.
    """
    return FederatedSingleLoop(
        clients,
        upper_optimizer,
        lower_optimizer,
        linear_optimizer,
        local_steps,
        normalise=True,
        radius=radius,
        **options,
    )
