"""AggITD: the hypergradient's linear system runs in the same rounds as the lower level."""

from __future__ import annotations

from typing import Any

import jax
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
class AggITDState:
    """The server's x and y, and the memory of its step rule for x."""

    x: PyTree
    y: PyTree
    upper: PyTree


@hyperparameters
class AggITD:
    """Aggregated iterative differentiation: one exchange per lower step carries a gradient and a Hessian-vector product.

        z = 0;   `rounds` times, clients sampled afresh each time:
            y <- y - b mean_i G_i(x, y),     z <- z - b mean_i (H_i z - F_y,i)       both at the y before the step
        h = mean_i (F_x - J z),   x <- x + upper_optimizer(h)

    z is the sum over the lower steps t of prod_{s > t} (I - b H(y_s)) b F_y(y_t): the matrix products of unrolled
    differentiation, aggregated over clients while y is still moving. The published method draws the step at which the
    product starts at random; the sum over all starts has the same expectation and less variance.

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
        check_count("AggITD", clients=self.clients, rounds=self.rounds)
        check_optimizer("AggITD", "upper_optimizer", self.upper_optimizer)
        check_optimizer("AggITD", "lower_step", self.lower_step)
        if self.weighting not in ("samples", "clients"):
            raise ValueError(f"AggITD(weighting={self.weighting!r}): 'samples' or 'clients'.")

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> AggITDState:
        """The server before the first round."""
        refuse(self, problem, x)
        check_clients(problem, "AggITD", self.clients)
        return AggITDState(x, y, as_optimizer(self.upper_optimizer).init(x))

    def step(self, problem: Problem, state: AggITDState, key: StepKey) -> tuple[AggITDState, dict[str, jax.Array]]:
        """One outer iteration."""
        x = state.x

        def exchange(t: Any, carry: Any) -> Any:
            y, z, _ = carry
            at = Round(problem, key.fold_in(10).inner(t, self.rounds), self.clients, self.weighting)
            xs, ys = at.copies(x), at.copies(y)
            lower = derivatives.linearised(at.lower(), xs, ys)
            G = at.mean(lower.gradient_y, "lower")
            F_y = at.mean(jax.grad(at.upper(), argnums=1)(xs, ys), "upper")
            residual = optax.tree.sub(at.mean(lower.hvp(at.copies(z)), "lower"), F_y)

            def down(v, g):
                return jax.tree.map(lambda v, g: v - self.lower_step * g, v, g)

            return down(y, G), down(z, residual), G

        zero = optax.tree.zeros_like(state.y)
        y, z, G = jax.lax.fori_loop(0, self.rounds, exchange, (state.y, zero, zero))

        at = Round(problem, key.fold_in(23), self.clients, self.weighting)
        xs, ys = at.copies(x), at.copies(y)
        value, F_x = jax.value_and_grad(at.upper(), argnums=0)(xs, ys)
        cross = derivatives.cross_product(at.lower(), xs, ys, at.copies(z))
        h = optax.tree.sub(at.mean(F_x, "upper"), at.mean(cross, "lower"))
        updates, upper = as_optimizer(self.upper_optimizer).update(h, state.upper, x)
        p, q = _agents.size_of(x), _agents.size_of(y)
        floats = at.size * (self.rounds * (p + 4 * q) + 2 * p + 2 * q)
        metrics = {"upper_loss": value / at.size, **norms(h, G), **traffic(self.rounds + 1, floats)}
        return AggITDState(optax.apply_updates(x, updates), y, upper), metrics
