"""FedBiO: local steps on three coupled problems, all averaged at the end of a round; and its accelerated form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters, state
from bilevel.data import StepKey
from bilevel.problem import Problem
from bilevel.solvers import _agents
from bilevel.solvers._base import refuse
from bilevel.solvers.federated._round import Round, check_clients, check_count, norms, traffic
from bilevel.solvers.federated.simfbo import FederatedSingleLoop, directions
from bilevel.typing import PyTree


def FedBiO(
    clients: int | None = None,
    upper_step: float = 0.01,
    lower_step: float = 0.1,
    linear_step: float = 0.1,
    *,
    local_steps: int = 5,
    **options: Any,
) -> FederatedSingleLoop:
    """FedBiO: x, y and z walk `local_steps` local steps and are averaged.

    The server's average of the clients' variables is a server step along their summed directions: `FederatedSingleLoop`
    with the server's steps `local_steps` times the clients'.

    Reference: Li, Huang, Huang, "Communication-Efficient Federated Bilevel Optimization with Global and Local Lower
    Level Problems", NeurIPS 2023 (the global lower level problem).
    """
    check_count("FedBiO", local_steps=local_steps)
    server = (upper_step * local_steps, lower_step * local_steps, linear_step * local_steps)
    return FederatedSingleLoop(
        clients,
        *server,
        local_steps,
        local_upper=upper_step,
        local_lower=lower_step,
        local_linear=linear_step,
        **options,
    )


@state
class AcceleratedState:
    """The server's x, y, z and their momenta, averaged over clients at the end of each round."""

    x: PyTree
    y: PyTree
    z: PyTree
    momenta: Any


@hyperparameters
class FedBiOAcc:
    """FedBiO with a STORM momentum on each of its three directions.

    Local step t of a round, with a_t = delta / (offset + t)^(1/3), t counted over all rounds, and D the client's
    directions:

        (x, y, z)+ = (x, y, z) - a_t (upper_step m_x, lower_step m_y, linear_step m_z)
        m+ = D((x, y, z)+; sample) + (1 - momentum a_t^2) (m - D((x, y, z); the same sample))

    After `local_steps` of them the server averages variables and momenta. Deviation: at the last local step the
    momentum is corrected at the client's own point and then averaged, not at the averaged point.

    Attributes:
      clients: how many take part in each round; None: all (what the paper assumes).
      upper_step, lower_step, linear_step: relative step sizes of x, y and z.
      delta, offset: of the schedule; the first step is delta / offset^(1/3).
      momentum: the constant c of the forgetting rate c a_t^2.
      local_steps: local steps per round.
      weighting: as in `FederatedSingleLoop`.

    Two evaluations of each oracle per local step. Metrics as in `FederatedSingleLoop` (the norms are those of the
    averaged momenta).

    Reference: Li, Huang, Huang, NeurIPS 2023.
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

    def __post_init__(self) -> None:
        check_count("FedBiOAcc", clients=self.clients, local_steps=self.local_steps)
        for name in ("upper_step", "lower_step", "linear_step", "delta", "offset", "momentum"):
            value = getattr(self, name)
            if isinstance(value, float) and not value > 0:
                raise ValueError(f"FedBiOAcc({name}={value}): a positive number is needed.")
        if self.weighting not in ("samples", "clients"):
            raise ValueError(f"FedBiOAcc(weighting={self.weighting!r}): 'samples' or 'clients'.")

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> AcceleratedState:
        """The server before the first round; momenta start with the first sample."""
        refuse(self, problem, x)
        check_clients(problem, "FedBiOAcc", self.clients)
        z = optax.tree.zeros_like(y)
        return AcceleratedState(x, y, z, optax.tree.zeros_like((x, y, z)))

    def step(
        self, problem: Problem, state: AcceleratedState, key: StepKey
    ) -> tuple[AcceleratedState, dict[str, jax.Array]]:
        """One round."""
        at = Round(problem, key.fold_in(10), self.clients, self.weighting)
        relative = (self.upper_step, self.lower_step, self.linear_step)

        def local(i: Any, carry: Any) -> Any:
            mine, momenta, _ = carry
            t = key.inner(i, self.local_steps).step
            a = self.delta / jnp.cbrt(self.offset + t)
            moved = tuple(
                jax.tree.map(lambda v, m, s=s: (v - a * s * m).astype(v.dtype), v, m)
                for s, v, m in zip(relative, mine, momenta, strict=True)
            )
            sample = at.key.inner(i, self.local_steps)
            value, new = directions(at, sample, *moved)
            _, old = directions(at, sample, *mine)
            kept = jnp.where(t == 0, 0.0, jnp.maximum(1 - self.momentum * a * a, 0.0))
            momenta = jax.tree.map(lambda n, m, o: (n + kept * (m - o)).astype(n.dtype), new, momenta, old)
            return moved, momenta, value

        start = (at.copies((state.x, state.y, state.z)), at.copies(state.momenta))
        value = jax.eval_shape(lambda: directions(at, at.key, *start[0])[0])
        mine, momenta, loss = jax.lax.fori_loop(
            0, self.local_steps, local, (*start, jnp.zeros(value.shape, value.dtype))
        )
        (x, y, z), momenta = _agents.mean(mine), _agents.mean(momenta)
        p, q = _agents.size_of(x), _agents.size_of(y)
        metrics = {"upper_loss": loss, **norms(momenta[0], momenta[1]), **traffic(1, at.size * 4 * (p + 2 * q))}
        return AcceleratedState(x, y, z, momenta), metrics
