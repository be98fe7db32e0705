"""Decentralised bilevel optimisation: one solver, in SPARKLE's form. Local directions, then mixed."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import optax

from bilevel import derivatives
from bilevel._module import hyperparameters, name_of, state
from bilevel.keys import Draw, StepKey
from bilevel.level import Levels
from bilevel.network import Network, consensus_error
from bilevel.optimizers import Move, check_count, check_optimizer, is_rule
from bilevel.problem import Problem, ProblemError
from bilevel.solvers import _agents
from bilevel.solvers._base import refuse, within
from bilevel.solvers._directions import Joint, Point
from bilevel.solvers.decentralized.corrections import CORRECTIONS, Copies
from bilevel.typing import Metrics, PyTree, Scalar

logger = logging.getLogger("bilevel")


@state
class DecentralizedState:
    """All agents' copies of x, y and v with their corrections' memories, and the averaged hypergradients r."""

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
    def v(self) -> PyTree:
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
    """Agents on a graph solve min_x mean_i F_i(x, y*(x)), y*(x) = argmin_y mean_i f_i(x, y), each with its own data.

    One outer step, with each agent's own derivatives:

        repeat lower_steps times:    y  <- correct_y(y,  f_y(x, y))
        repeat linear_steps times:   v  <- correct_v(v,  f_yy v - F_y(x, y))
        u = F_x(x, y) - f_xy v,      r  <- (1 - averaging) r + averaging u
        x <- correct_x(x, r)

    where `correct` is one of the forms of `decentralized.corrections`: local directions plus mixing with the
    neighbours. v solves (mean_i f_yy,i) v = mean_i F_y,i: a mean of local hypergradients would be a wrong direction.
    Trackers and flows stay in the state from one outer step to the next: restarting them brings the heterogeneity back.

    The data of both levels are `data.Agents` (or `data.Clients` with a batch size: agents count alike, however many
    samples each has, where federated methods count samples by default). `solution.x` and `.y` (also
    `state.x`, `.y`) hold all agents' copies along a leading axis, `solution.state.mean_x` and `.mean_y` their means.

    Attributes:
      network: who talks to whom, from `bilevel.network`.
      upper_optimizer, lower_optimizer, linear_optimizer: a step size or an optax rule for x, y and v; each agent runs
        its own.
      x, y, v: the corrections, each one of "none", "gt", "ed", "extra", "none-cta", "gt-cta".
      lower_steps, linear_steps: inner steps per outer step.
      averaging: the weight of the new hypergradient in the moving average r; 1: no average.
      late: x moves along r *before* r takes in the new hypergradient (MA-DSBO's order).
      simultaneous: all three directions at one point, from one linearisation (SOBA's order); needs one inner step each.
      radius: v is kept in a ball of this radius; None: free.
      check_stability: before the first step refuse step sizes that, times the largest curvature of any agent at the
        start, exceed the form's limit on this graph. Skipped for optax rules and under `jit` or `vmap`.
      record: report losses, residuals and consensus errors. On a mesh they cost all-reduces; the step needs none.

    Metrics: `upper_loss` (mean over agents), `hypergradient_norm` (|mean_i u_i|), `lower_residual` (|mean_i f_y,i|),
    `consensus_x`, `consensus_y`, `consensus_v` (root of the mean squared distance to the mean), and of this step
    `communication_rounds` (exchanges with the neighbours) and `communication_floats` (numbers that an agent sent to
    *each* neighbour). A run has converged when the norms and the consensus errors of x and y are at most tol.

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
    v: str = "gt"
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
        for name in ("x", "y", "v"):
            form = getattr(self, name)
            if form not in CORRECTIONS:
                forms = ", ".join(map(repr, CORRECTIONS))
                raise ValueError(f"{owner}({name}={form!r}): a correction is one of {forms}.")
            if CORRECTIONS[form].accumulates and self.network.varies:
                raise ValueError(
                    f"{owner}({name}={form!r}): ED and EXTRA remember the flows of one fixed graph, and "
                    f'{self.network.name} varies from step to step. Take {name}="gt".'
                )
        counts = {"lower_steps": self.lower_steps, "linear_steps": self.linear_steps}
        check_count(owner, "the number of steps is a positive integer", **counts)
        weight = self.averaging
        if isinstance(weight, float) and not 0 < weight <= 1:
            raise ValueError(f"{owner}(averaging={weight}): the weight of the new hypergradient lies in (0, 1].")
        if self.simultaneous and (self.lower_steps, self.linear_steps) != (1, 1):
            raise ValueError(
                f"{owner}(simultaneous=True) takes one step of y, v and x from one point: lower_steps and linear_steps "
                "must be 1."
            )
        if isinstance(self.radius, float) and not self.radius > 0:
            raise ValueError(f"{owner}(radius={self.radius}): the ball's radius is positive, or None.")

    def _moves(self) -> Point:
        """How each agent moves its copies of x, y and v."""
        rules = self.upper_optimizer, self.lower_optimizer, self.linear_optimizer
        return Point(*(Move(rule, many=True) for rule in rules))

    def _advance(self, name: str, copies: Copies, direction: PyTree, step: Any) -> Copies:
        """One of x, y and v, corrected; v kept in its ball."""
        move = getattr(self._moves(), name)
        copies = CORRECTIONS[getattr(self, name)].advance(self.network, copies, direction, move, step)
        if name != "v" or self.radius is None:
            return copies
        project = jax.vmap(lambda v: optax.projections.projection_l2_ball(v, self.radius))
        return dataclasses.replace(copies, value=project(copies.value))

    def solved_problem(self, problem: Problem) -> Problem | None:
        """The problem that is solved, the mean over agents of their own, which a certificate judges; None where it
        cannot."""
        return _agents.mean_over_parties(problem)

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> DecentralizedState:
        """Every agent starts at the same x and y, and at v = 0."""
        refuse(self, problem, x)
        n = self.network.n
        given = _agents.number_of_agents(problem, name_of(self))
        if given is not None and given != n:
            raise ProblemError(
                f"The data are for {given} agents, but the network {self.network.name} has {n}: make them equal."
            )
        x, y = _agents.spread(x, n, problem, "x0"), _agents.spread(y, n, problem, "y0")
        if self.check_stability and not _agents.traced(problem, x, y, self):
            self._check(float(_curvature(problem, x, y, key)))
        move = self._moves()
        upper, lower = CORRECTIONS[self.x].start(x, move.x), CORRECTIONS[self.y].start(y, move.y)
        linear = CORRECTIONS[self.v].start(optax.tree.zeros_like(y), move.v)
        return DecentralizedState(upper, lower, linear, optax.tree.zeros_like(x))

    def _check(self, curvature: float) -> None:
        w = self.network.smallest_eigenvalue
        for what, form in (("lower_optimizer", self.y), ("linear_optimizer", self.v)):
            if is_rule(getattr(self, what)):
                continue
            limit, size = CORRECTIONS[form].limit(w), float(getattr(self, what))
            sentence = "%s times the largest curvature %.4g is %.4g; %r is stable below %.4g"
            logger.info(sentence, what, curvature, size * curvature, form, limit)
            if size * curvature >= limit:
                raise ProblemError(
                    f"{what}={size:g} times the largest curvature of an agent's lower level at the start "
                    f"({curvature:.4g}) is {size * curvature:.3g}, beyond the stability limit {limit:.3g} of the form "
                    f'"{form}" on {self.network.name} (smallest eigenvalue {w:.3g}): take {what} below '
                    f"{limit / curvature:.3g}, or set check_stability=False."
                )

    def step(self, problem: Problem, state: DecentralizedState, key: StepKey) -> tuple[DecentralizedState, Metrics]:
        """One outer iteration."""
        move = self._simultaneous if self.simultaneous else self._in_turn
        lower, linear, u, value, lower_y = move(problem.levels(key, "all"), state, key)
        average = jax.tree.map(lambda r, u: r + self.averaging * (u - r), state.average, u)
        direction = state.average if self.late else average
        new = DecentralizedState(self._advance("x", state.upper, direction, key.step), lower, linear, average)
        return new, self._metrics(new, u, value, lower_y)

    def _in_turn(self, levels: Levels, state: DecentralizedState, key: StepKey) -> Any:
        """y, then v at the new y, then the hypergradient at both."""
        (upper, lower), x = levels, state.x

        def lower_step(i: Any, copies: Copies) -> Copies:
            gradient = lower.redraw(i, self.lower_steps).gradient(x, copies.value)
            return self._advance("y", copies, gradient, key.inner(i, self.lower_steps).step)

        found = _repeat(self.lower_steps, lower_step, state.lower)
        y = found.value
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
        last = derivatives.linearised(lower.stream(Draw.CROSS), x, y)  # on full batches shared by all products
        products = lower.stream(Draw.PRODUCTS)

        def linear_step(i: Any, copies: Copies) -> Copies:
            at = derivatives.linearised(products.redraw(i, self.linear_steps), x, y) if lower.random else last
            residual = optax.tree.sub(at.hvp(copies.value), upper_y)
            return self._advance("v", copies, residual, key.inner(i, self.linear_steps).step)

        linear = _repeat(self.linear_steps, linear_step, state.linear)
        return found, linear, optax.tree.sub(upper_x, last.cross(linear.value)), value, last.gradient_y

    def _simultaneous(self, levels: Levels, state: DecentralizedState, key: StepKey) -> Any:
        """All directions at (x, y, v): SOBA's, each agent's own."""
        value, direction = Joint()(*levels, Point(state.x, state.y, state.v))
        lower = self._advance("y", state.lower, direction.y, key.step)
        linear = self._advance("v", state.linear, direction.v, key.step)
        return lower, linear, direction.x, value, direction.y

    def _metrics(self, state: DecentralizedState, u: PyTree, value: Scalar, lower_y: PyTree) -> Metrics:
        p, q = (optax.tree.size(tree) // self.network.n for tree in (state.x, state.y))
        x, y, v = (CORRECTIONS[form].mixings for form in (self.x, self.y, self.v))
        inner = self.lower_steps * y + self.linear_steps * v
        traffic = _agents.traffic(inner + x, inner * q + x * p)
        if not self.record:
            return traffic
        errors = {f"consensus_{name}": consensus_error(getattr(state, name)) for name in ("x", "y", "v")}
        norms = _agents.measures(value / self.network.n, _agents.mean(u), _agents.mean(lower_y))
        return norms | errors | traffic

    def status(self, state: DecentralizedState, metrics: Metrics, tol: Any) -> jax.Array:
        """CONVERGED where the norms and the consensus errors are within the tolerance."""
        if not self.record:
            why = "nothing is measured to compare with the tolerance. Set record=True."
            raise ValueError(f"solve(tol=...) with record=False: {why}")
        return within(tol, metrics, "hypergradient_norm", "lower_residual", "consensus_x", "consensus_y")


@jax.jit
def _curvature(problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> Scalar:
    return _agents.largest_curvature(problem.levels(key, "all").lower, x, y)


def _repeat(steps: int, body: Any, copies: Copies) -> Copies:
    return body(0, copies) if steps == 1 else jax.lax.fori_loop(0, steps, body, copies)
