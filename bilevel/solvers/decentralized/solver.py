"""Decentralised bilevel optimisation: one solver, in SPARKLE's form, and its named members."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters, state
from bilevel.data import StepKey
from bilevel.network import Network, consensus_error
from bilevel.optimizers import check_optimizer
from bilevel.problem import Problem, ProblemError
from bilevel.solution import Result
from bilevel.solvers import _agents
from bilevel.solvers._base import refuse
from bilevel.solvers.decentralized.corrections import CORRECTIONS, Copies, advance, mixings, start, step_limit
from bilevel.typing import PyTree

logger = logging.getLogger("bilevel")


@state
class DecentralizedState:
    """All agents' copies of x, y and z with their corrections' memories, and the averaged hypergradients r.

    `x`, `y` and `z` have a leading axis of agents; `mean_x` and `mean_y` are the averages over agents.
    """

    upper: Copies
    lower: Copies
    linear: Copies
    average: PyTree

    @property
    def x(self) -> PyTree:
        """Each agent's upper variable, stacked."""
        return self.upper.value

    @property
    def y(self) -> PyTree:
        """Each agent's lower variable, stacked."""
        return self.lower.value

    @property
    def z(self) -> PyTree:
        """Each agent's solution of the linear system, stacked."""
        return self.linear.value

    @property
    def mean_x(self) -> PyTree:
        """The upper variable, averaged over agents."""
        return _agents.mean(self.x)

    @property
    def mean_y(self) -> PyTree:
        """The lower variable, averaged over agents."""
        return _agents.mean(self.y)


@hyperparameters
class Decentralized:
    """Agents on a graph solve min_x mean_i f_i(x, y*(x)), y*(x) = argmin_y mean_i g_i(x, y), each with its own data.

    One outer step, G_y, F_x, F_y the local gradients, H and J the local products g_yy v and g_xy v:

        repeat lower_steps times:    y  <- correct_y(y,  G_y(x, y))
        repeat linear_steps times:   z  <- correct_z(z,  H z - F_y(x, y))
        u = F_x(x, y) - J z,         r  <- (1 - averaging) r + averaging u
        x <- correct_x(x, r)

    where `correct` is one of the forms of `decentralized.corrections`: local directions plus mixing with the
    neighbours. z solves (mean_i H_i) z = mean_i F_y: a mean of local hypergradients would be another, wrong direction.
    Trackers and flows stay in the state from one outer step to the next: restarting them brings the heterogeneity back.

    The data of both levels are `data.Agents` (or `data.Clients` with a batch size). `state.x` and `state.y` (also
    `solution.x`, `solution.y`) hold all agents' copies along a leading axis; `solution.state.mean_x` and `.mean_y` are
    their means.

    Attributes:
      network: who talks to whom, from `bilevel.network`.
      upper_optimizer, lower_optimizer, linear_optimizer: a step size or an optax rule for x, y and z; each agent runs
        its own.
      x, y, z: the corrections, each one of "none", "gt", "ed", "extra", "none-cta", "gt-cta".
      lower_steps, linear_steps: inner steps per outer step.
      averaging: the weight of the new hypergradient in the moving average r; 1: no average.
      late: x moves along r *before* r takes in the new hypergradient (MA-DSBO's order).
      simultaneous: all three directions at one point, from one linearisation (SOBA's order); needs one inner step each.
      radius: z is kept in a ball of this radius; None: free.
      check_stability: before the first step compare step sizes times the largest curvature of any agent at the start
        with the form's limit on this graph, and refuse what would diverge. Skipped for optax rules and under `jit` or
        `vmap`.
      record: report losses, residuals and consensus errors. On a mesh they cost all-reduces; the step itself needs
        none.

    Metrics: `upper_loss` (mean over agents), `hypergradient_norm` (|mean_i u_i|), `lower_residual` (|mean_i G_y|),
    `consensus_x`, `consensus_y`, `consensus_z` (root of the mean squared distance to the mean), `communication_rounds`
    (exchanges with the neighbours in this step), `communication_floats` (numbers that an agent sent to *each* neighbour
    in this step). With a tolerance a run has converged when the norms and the consensus errors of x and y are at most
    tol.

    Oracle calls per agent and outer step: lower_steps gradients, linear_steps HVPs, one cross product, one upper
    gradient.

    Reference: Zhu, Kong, Lu, Lin, Yuan, "SPARKLE: A Unified Single-Loop Primal-Dual Framework for Decentralized Bilevel
    Optimization", NeurIPS 2024.
    """

    network: Network
    upper_optimizer: float | optax.GradientTransformation = 0.01
    lower_optimizer: float | optax.GradientTransformation = 0.1
    linear_optimizer: float | optax.GradientTransformation = 0.1
    x: str = "gt"
    y: str = "gt"
    z: str = "gt"
    lower_steps: int = 1
    linear_steps: int = 1
    averaging: float = 1.0
    late: bool = False
    simultaneous: bool = False
    radius: float | None = None
    check_stability: bool = True
    record: bool = True

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.network, Network):
            raise TypeError(f"{owner}(network={self.network!r}): give one of bilevel.network, such as network.ring(8).")
        for name in ("upper_optimizer", "lower_optimizer", "linear_optimizer"):
            check_optimizer(owner, name, getattr(self, name))
        for name in ("x", "y", "z"):
            form = getattr(self, name)
            if form not in CORRECTIONS:
                raise ValueError(
                    f"{owner}({name}={form!r}): a correction is one of {', '.join(map(repr, CORRECTIONS))}."
                )
            if form in ("ed", "extra") and self.network.varies:
                raise ValueError(
                    f"{owner}({name}={form!r}): ED and EXTRA remember the flows of one fixed graph, and "
                    f"{self.network.name} varies from "
                    f'step to step. Take {name}="gt".'
                )
        for name in ("lower_steps", "linear_steps"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{owner}({name}={count!r}): the number of steps is a positive integer.")
        if isinstance(self.averaging, float) and not 0 < self.averaging <= 1:
            raise ValueError(
                f"{owner}(averaging={self.averaging}): the weight of the new hypergradient lies in (0, 1]."
            )
        if self.simultaneous and (self.lower_steps, self.linear_steps) != (1, 1):
            raise ValueError(
                f"{owner}(simultaneous=True) takes one step of y, z and x from one point: lower_steps and "
                f"linear_steps must be 1."
            )
        if isinstance(self.radius, float) and not self.radius > 0:
            raise ValueError(f"{owner}(radius={self.radius}): the ball's radius is positive, or None.")

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: Any) -> DecentralizedState:
        """Every agent starts at the same x and y, and at z = 0."""
        refuse(self, problem, x)
        n = self.network.n
        given = _agents.number_of_agents(problem, type(self).__name__)
        if given is not None and given != n:
            raise ProblemError(
                f"The data are for {given} agents, but the network {self.network.name} has {n}: make them equal."
            )
        x, y = _agents.spread(x, n, problem), _agents.spread(y, n, problem)
        if self.check_stability and not _agents.traced(problem, x, y, self):
            self._check(float(_agents.largest_curvature(problem, x, y, key)))
        return DecentralizedState(
            start(self.x, x, self.upper_optimizer),
            start(self.y, y, self.lower_optimizer),
            start(self.z, optax.tree.zeros_like(y), self.linear_optimizer),
            optax.tree.zeros_like(x),
        )

    def _check(self, curvature: float) -> None:
        w = self.network.smallest_eigenvalue
        for what, form, optimizer in (
            ("lower_optimizer", self.y, self.lower_optimizer),
            ("linear_optimizer", self.z, self.linear_optimizer),
        ):
            if isinstance(optimizer, optax.GradientTransformation):
                continue
            limit = step_limit(form, w)
            product = float(optimizer) * curvature
            logger.info(
                "%s times the largest curvature %.4g is %.4g; %r is stable below %.4g",
                what,
                curvature,
                product,
                form,
                limit,
            )
            if product >= limit:
                raise ProblemError(
                    f"{what}={float(optimizer):g} times the largest curvature of an agent's lower level at the "
                    f"start ({curvature:.4g}) is "
                    f'{product:.3g}, beyond the stability limit {limit:.3g} of the form "{form}" on '
                    f"{self.network.name} (smallest eigenvalue "
                    f"{w:.3g}): take {what} below {limit / curvature:.3g}, or set check_stability=False."
                )

    def step(
        self, problem: Problem, state: DecentralizedState, key: StepKey
    ) -> tuple[DecentralizedState, dict[str, jax.Array]]:
        """One outer iteration."""
        upper = _agents.stacked(problem.upper, problem.upper_data, _agents.draw(problem.upper_data, key.fold_in(1)))
        move = self._simultaneous if self.simultaneous else self._in_turn
        lower, linear, u, measured = move(problem, upper, state, key)

        average = jax.tree.map(lambda r, u: r + self.averaging * (u - r), state.average, u)
        direction = state.average if self.late else average
        moved = advance(self.x, self.network, state.upper, direction, self.upper_optimizer, key.step)
        new = DecentralizedState(moved, lower, linear, average)
        return new, self._metrics(new, u, measured)

    def _in_turn(self, problem: Problem, upper: Any, state: DecentralizedState, key: StepKey) -> Any:
        """y, then z at the new y, then the hypergradient at both."""
        x, data = state.x, problem.lower_data
        random = _agents.is_random(data)

        def level(stream: int, i: Any, total: int) -> _agents.Stacked:
            return _agents.stacked(problem.lower, data, _agents.draw(data, key.fold_in(stream).inner(i, total)))

        def lower_step(i: Any, copies: Copies) -> Copies:
            gradient = jax.grad(level(0, i, self.lower_steps), argnums=1)(x, copies.value)
            return advance(
                self.y, self.network, copies, gradient, self.lower_optimizer, key.inner(i, self.lower_steps).step
            )

        lower = _repeat(self.lower_steps, lower_step, state.lower)
        y = lower.value

        value, (F_x, F_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        last = derivatives.linearised(level(3, 0, 1), x, y)  # on the full batch: shared by all products

        def linear_step(i: Any, copies: Copies) -> Copies:
            at = derivatives.linearised(level(2, i, self.linear_steps), x, y) if random else last
            residual = optax.tree.sub(at.hvp(copies.value), F_y)
            moved = advance(
                self.z, self.network, copies, residual, self.linear_optimizer, key.inner(i, self.linear_steps).step
            )
            return self._in_ball(moved)

        linear = _repeat(self.linear_steps, linear_step, state.linear)
        u = optax.tree.sub(F_x, last.cross(linear.value))
        return lower, linear, u, (value, last.gradient_y)

    def _simultaneous(self, problem: Problem, upper: Any, state: DecentralizedState, key: StepKey) -> Any:
        """All directions at (x, y, z)."""
        data = problem.lower_data
        at = derivatives.linearised(
            _agents.stacked(problem.lower, data, _agents.draw(data, key.fold_in(0))), state.x, state.y
        )
        value, (F_x, F_y) = jax.value_and_grad(upper, argnums=(0, 1))(state.x, state.y)
        cross, hvp = at.products(state.z)
        lower = advance(self.y, self.network, state.lower, at.gradient_y, self.lower_optimizer, key.step)
        linear = advance(self.z, self.network, state.linear, optax.tree.sub(hvp, F_y), self.linear_optimizer, key.step)
        return lower, self._in_ball(linear), optax.tree.sub(F_x, cross), (value, at.gradient_y)

    def _in_ball(self, copies: Copies) -> Copies:
        if self.radius is None:
            return copies
        project = jax.vmap(lambda z: optax.projections.projection_l2_ball(z, self.radius))
        return dataclasses.replace(copies, value=project(copies.value))

    def _metrics(self, state: DecentralizedState, u: PyTree, measured: Any) -> dict[str, jax.Array]:
        p, q = (_agents.size_of(tree) // self.network.n for tree in (state.x, state.y))
        y, z = self.lower_steps * mixings(self.y), self.linear_steps * mixings(self.z)
        found = {
            "communication_rounds": jnp.asarray(y + z + mixings(self.x), jnp.float32),
            "communication_floats": jnp.asarray((y + z) * q + mixings(self.x) * p, jnp.float32),
        }
        if not self.record:
            return found
        value, gradient_y = measured
        return {
            "upper_loss": value / self.network.n,
            "hypergradient_norm": _agents.norm_of_mean(u),
            "lower_residual": _agents.norm_of_mean(gradient_y),
            "consensus_x": consensus_error(state.x),
            "consensus_y": consensus_error(state.y),
            "consensus_z": consensus_error(state.z),
            **found,
        }

    def status(self, state: DecentralizedState, metrics: dict[str, jax.Array], tol: Any) -> jax.Array:
        """CONVERGED where the norms and the consensus errors are within the tolerance."""
        if not self.record:
            raise ValueError(
                "solve(tol=...) with record=False: nothing is measured to compare with the tolerance. Set record=True."
            )
        names = ("hypergradient_norm", "lower_residual", "consensus_x", "consensus_y")
        return jnp.where(jnp.max(jnp.stack([metrics[name] for name in names])) <= tol, Result.CONVERGED.value, 0)


def _repeat(steps: int, body: Any, copies: Copies) -> Copies:
    return body(0, copies) if steps == 1 else jax.lax.fori_loop(0, steps, body, copies)


# ---------------------------------------------------------------- the named members


def MADSBO(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.05,
    *,
    lower_steps: int = 5,
    linear_steps: int = 5,
    averaging: float = 0.2,
    **options: Any,
) -> Decentralized:
    """MA-DSBO: gossip for y and x, gradient tracking for z (the HIGP oracle), a moving average of hypergradients, used
    one step late.

        y <- W y - beta G_y                                            lower_steps times
        z <- W z - gamma d,   d <- W d + s - s_before,   s = H z - F_y    linear_steps times
        x <- W x - alpha r,   then   r <- (1 - a) r + a (F_x - J z)

    The combine-then-adapt forms have small stable steps on graphs with negative eigenvalues (`network.lazy()` helps),
    and the gossip of x and y leaves a bias of O(alpha) and O(beta) where agents differ: `GTDSBO` has neither. The
    paper ties a to alpha; here it is a number of its own. Deviation: d persists from one outer step to the next.

    Reference: Chen, Huang, Ma, Balasubramanian, "Decentralized Stochastic Bilevel Optimization with Improved
    per-Iteration Complexity", ICML 2023.
    """
    forms: dict[str, Any] = {"x": "none-cta", "y": "none-cta", "z": "gt-cta", "late": True} | options
    return Decentralized(
        network, upper_optimizer, lower_optimizer, linear_optimizer,
        lower_steps=lower_steps, linear_steps=linear_steps, averaging=averaging, **forms,
    )  # fmt: skip


def GTDSBO(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.1,
    *,
    lower_steps: int = 5,
    linear_steps: int = 5,
    averaging: float = 1.0,
    **options: Any,
) -> Decentralized:
    """Everything tracked: adapt-then-combine gradient tracking of y, z and x. No bias from heterogeneous agents; the
    one to begin with.

    MA-DSBO's loops with `gt` in place of gossip. Reference: as `MADSBO` and `Decentralized`.
    """
    forms: dict[str, Any] = {"x": "gt", "y": "gt", "z": "gt"} | options
    return Decentralized(
        network, upper_optimizer, lower_optimizer, linear_optimizer,
        lower_steps=lower_steps, linear_steps=linear_steps, averaging=averaging, **forms,
    )  # fmt: skip


def DSOBA(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.1,
    *,
    averaging: float = 0.2,
    **options: Any,
) -> Decentralized:
    """D-SOBA: one diffusion step of y, z and x at once, from one linearisation, and a moving average of hypergradients.

    The least communication, p + 2 q numbers to each neighbour a step; biased where agents differ.

    Reference: Kong, Zhu, Lu, Huang, Yuan, "Decentralized Bilevel Optimization: A Perspective from Transient Iteration
    Complexity", JMLR 26(240), 2025.
    """
    forms: dict[str, Any] = {"x": "none", "y": "none", "z": "none", "simultaneous": True} | options
    return Decentralized(network, upper_optimizer, lower_optimizer, linear_optimizer, averaging=averaging, **forms)


def SPARKLE(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.1,
    *,
    x: str = "ed",
    y: str = "ed",
    z: str = "ed",
    averaging: float = 0.2,
    **options: Any,
) -> Decentralized:
    """SPARKLE: single loop, a moving average, and a correction of its own for each variable (exact diffusion by
    default).

    ED and EXTRA send p + 2 q numbers to each neighbour a step, gradient tracking twice that. Correcting y and z
    matters more than correcting x.

    Reference: Zhu, Kong, Lu, Lin, Yuan, NeurIPS 2024.
    """
    return Decentralized(
        network, upper_optimizer, lower_optimizer, linear_optimizer, x, y, z, averaging=averaging, **options
    )


def SLDBO(
    network: Network,
    upper_optimizer: Any = 0.01,
    lower_optimizer: Any = 0.1,
    linear_optimizer: Any = 0.1,
    *,
    radius: float | None = None,
    **options: Any,
) -> Decentralized:
    """SLDBO: SOBA's simultaneous directions with gradient tracking of all three, z kept in a ball; deterministic, any
    heterogeneity.

    Reference: Dong, Ma, Yang, Yin, "A Single-Loop Algorithm for Decentralized Bilevel Optimization", Mathematics of
    Operations Research 2025.
    """
    forms: dict[str, Any] = {"x": "gt", "y": "gt", "z": "gt", "simultaneous": True} | options
    return Decentralized(network, upper_optimizer, lower_optimizer, linear_optimizer, radius=radius, **forms)
