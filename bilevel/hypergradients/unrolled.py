"""Iterative differentiation: the hypergradient of the lower solver's last iterate, seen as a function of x."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax

from bilevel._arguments import explained
from bilevel._module import hyperparameters
from bilevel._recompute import alone
from bilevel.hypergradients._base import Estimate, last_steps, lower_metrics
from bilevel.hypergradients.forward import Forward
from bilevel.level import Level
from bilevel.lower import Identity, LowerState, repeat
from bilevel.lower.loops import HOST
from bilevel.optimizers import check_count
from bilevel.typing import LowerSolver, PyTree

_SCHEDULES = {
    "all": lambda steps: steps,
    "sqrt": lambda steps: math.ceil(math.sqrt(2 * steps)),
    "log": lambda steps: max(1, math.ceil(math.log2(steps))),
}
_FEW = 256  # steps up to which all states are kept


@hyperparameters
class Unrolled:
    """The exact derivative of F(x, y_T(x)), where y_T is the result of T steps of the lower solver.

    In reverse mode: with y_{t+1} = Phi(y_t, x), a = F_y, G = F_x, and for t = T-1, ..., 0

        G <- G + (d_x Phi_t)' a,    a <- (d_y Phi_t)' a.

    Attributes:
      last: differentiate only the last K steps (truncated); None: all of them. With a strongly convex lower level the
        bias is O((1 - mu eta)^K). K = 1 is one-step differentiation.
      mode: "reverse", or "forward", which is `Forward(last)`: for few upper variables, at a memory that does not grow
        with T.
      checkpoint: which states s_t = (y_t, moments) are kept in reverse mode:

            "all"      T of them and the T gradients; where they are large, the gradients and every K-th state (K
                       about sqrt(T) or 16; those between are moved along the gradients again): no gradient twice
            "sqrt"     sqrt(2 T) of them: one more gradient per step
            "log"      log2(T) of them: a few more gradients per step (under 5 up to T = 100,000)
            a number   so many of the T, from 1 to T
            "host"     T of them, in the host's memory, moved there and back within the compiled programme: on GPUs and
                       TPUs (a CPU's memory is the host's, and it is refused there)

        with the steps between them computed again as often as the binomial schedule needs for the number, the fewest
        there are. True: "all" up to 256 steps, "sqrt" beyond, where it is less than a tenth of the states for one
        more gradient per step; a lower solver that is not made of steps: as it is. In all of these the gradient's own
        second derivative is taken in mixed mode (`derivatives.mixed_mode_gradient`). False: plain reverse mode, which
        keeps all that each step computes.

    All schedules are the same derivative. Derivatives of the estimate itself keep all states.

    Cost per call: reverse, T gradients and T (HVP + cross product), and the schedule's further gradients; memory, the
    schedule's states and one step; forward, p T HVPs. Works through any differentiable optimiser. Where a parameter's
    gradient is zero, rules that divide by its root (Adam, clipping by a norm) are differentiated as if the root had the
    derivative zero there; with `eps_root > 0` Adam's is what it is.

    References: Franceschi et al., "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017; Shaban
    et al., "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019; Kemaev et al., ICML 2025 (mixed mode).
    """

    through: ClassVar[bool] = True

    last: int | None = None
    mode: str = "reverse"
    checkpoint: bool | str | int = True

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, str) and self.checkpoint not in (*_SCHEDULES, HOST):
            names = ", ".join(map(repr, (*_SCHEDULES, HOST)))
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint!r}): the states to keep are {names}, a number of them, True (by "
                "the number of steps) or False (plain reverse mode)."
            )
        if not isinstance(self.checkpoint, (bool, str)):
            if self.checkpoint is None:
                raise ValueError("Unrolled(checkpoint=None): give True, the default, or False for plain reverse mode.")
            check_count("Unrolled", "the number of states to keep is a positive integer", checkpoint=self.checkpoint)
        if self.mode == "forward" and not isinstance(self.checkpoint, bool):
            raise ValueError(
                f"Unrolled(mode='forward', checkpoint={self.checkpoint!r}): forward mode keeps no states at all. Leave "
                "checkpoint out."
            )
        if self.mode not in ("reverse", "forward"):
            raise ValueError(f"Unrolled(mode={self.mode!r}): the mode is 'reverse' or 'forward'.")
        rule = "the number of differentiated steps is a positive integer, or None for all"
        check_count("Unrolled", rule, last=self.last)

    @property
    def settles(self) -> tuple[str, ...]:
        """What a run's tolerance is for beside the hypergradient: it is that of F(x, y_T(x)) whatever is left of f_y,
        unless steps before the last ones are left out. The certificate says whether y_T is a minimiser."""
        return () if self.last is None else ("lower_residual",)

    def init(self, lower: Level, x: PyTree, y: PyTree) -> PyTree:
        """Nothing is kept."""
        return ()

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: PyTree
    ) -> Estimate:
        """The estimate at x."""
        if isinstance(solver, Identity):
            raise ValueError(
                "Unrolled differentiates through the steps of the lower solver, and lower.Identity takes none: its "
                "hypergradient would be F_x alone. Take an implicit estimator, hypergradients.Implicit()."
            )
        if self.mode == "forward":
            forward = Forward(self.last)
            estimate = forward(upper, lower, solver, x, start, forward.init(lower, x, start.y))
            return dataclasses.replace(estimate, carry=carry)
        if getattr(solver, "tol", None) is not None:
            raise ValueError(
                "Unrolled differentiates through the lower solver's loop, whose length must be fixed: set its tol=None "
                "(a number of steps), or take an implicit estimator."
            )
        solver = solver.differentiable() if hasattr(solver, "differentiable") else solver
        level, run = lower.mixed_mode() if self.checkpoint else lower, solver
        steps = getattr(solver, "steps", 0) if self.last is None else self.last
        keep = self.kept(solver, steps)
        if self.last is not None:
            run, start = last_steps("Unrolled", self.last, solver, lower, x, start, keep)
        elif keep is not None:
            run = _Keeping(solver, keep)

        def objective(x: PyTree) -> tuple[jax.Array, LowerState]:
            found = run(level, x, start)
            return end_value(upper, x, found.y), found

        (value, found), gradient = jax.value_and_grad(objective, has_aux=True)(x)
        return Estimate(value, gradient, found, carry, lower_metrics(lower, x, found.y))

    def kept(self, solver: Any, steps: int) -> int | str | None:
        """How many states are kept of so many steps of a solver; None: all; `lower.loops.HOST`: all, on the host."""
        if self.checkpoint is False:
            return None
        if not hasattr(solver, "advance"):
            if self.checkpoint in (True, "all"):
                return None
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint!r}) keeps some of the states between the lower solver's steps, "
                "and needs one made of steps: lower.GradientDescent(...) or lower.MomentumSGD(...), not "
                f"{type(solver).__name__}."
            )
        if self.checkpoint == HOST:
            _check_host_memory()
            return HOST
        if self.checkpoint is True:
            return None if steps <= _FEW else _SCHEDULES["sqrt"](steps)
        if isinstance(self.checkpoint, str):
            return min(steps, _SCHEDULES[self.checkpoint](steps))
        if self.checkpoint > steps:
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint}) keeps {self.checkpoint} states, and the run that is "
                f"differentiated has {steps} steps: give a number up to {steps}, or 'all'."
            )
        return int(self.checkpoint)


def end_value(upper: Level, x: PyTree, y: PyTree) -> jax.Array:
    """F at the end of a training, rounded alike in whatever programme it stands: long runs amplify the last digit."""
    return alone(upper(*alone((x, y))))


def _check_host_memory() -> None:
    """Raise a sentence where the device has no memory of the host's beside its own."""
    device = jax.devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if device.platform == "cpu" or "pinned_host" not in kinds:
        why = "whose memory is the host's" if device.platform == "cpu" else f"which has {', '.join(kinds)} alone"
        raise ValueError(
            "Unrolled(checkpoint='host') keeps states in the host's memory (pinned_host), and this runs on a "
            f"{device.platform.upper()}, {why}: take 'sqrt' or 'log', or runs.metagradient, which brings the states of "
            "segments to the host, or to a disk, from any device."
        )


class _Keeping:
    """A lower solver made of steps, of whose states some are kept."""

    def __init__(self, solver: Any, keep: int | str) -> None:
        self.solver, self.keep, self.init = solver, keep, solver.init

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        return self.solver.end(repeat(self.solver, level, x, self.solver.begin(x, state), keep=self.keep))


@explained
def OneStep() -> Unrolled:
    """Differentiate the last step of the lower solver only: F_x + (d_x Phi)' F_y.

    With gradient descent of step eta: F_x - eta f_xy F_y. The bias is at most a multiple of rho / (1 - rho) for a
    contraction rho, and vanishes for superlinear solvers.

    Reference: Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms", NeurIPS 2023.
    """
    return Unrolled(last=1)
