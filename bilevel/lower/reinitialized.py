"""Lower levels that begin anew: a fresh draw of y every few solves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters, state
from bilevel.keys import as_step_key
from bilevel.level import Level
from bilevel.lower.loops import LowerState
from bilevel.lower.steps import Steps
from bilevel.optimizers import check_count
from bilevel.typing import PyTree, Scalar

__all__ = ["Reinitialized"]


@state
class Renewal:
    """What `Reinitialized` remembers: its solver's memory, and how many solves there were."""

    memory: PyTree
    solves: jax.Array


@hyperparameters
class Reinitialized(Steps):
    """A lower solver whose variable is drawn afresh before solve 0, `every`, 2 `every`, ...

        y <- draw(key_r),  r = 0, 1, ...      where the number of solves so far is r * every; else from the last y
        y <- solver(x, y)

    The optimiser's moments begin anew with y. The upper level then meets a lower level of every age between one solve
    and `every` of them, and from another start each time: x cannot lean on one trajectory. That is what distilled data,
    a meta-learnt loss and a perturbation that has to work at encoders of others' training need. `every=1` is a fresh
    start for each hypergradient.

    Attributes:
      solver: one made of steps, such as `lower.GradientDescent` or `lower.MomentumSGD`.
      draw: `key -> y`, shaped like y0: the initialiser. It replaces y0, which only says what y looks like.
      every: solves from one draw to the next.
      key: a seed, or a PRNG key (a leaf: `vmap` over keys for repetitions). Draw r is made with `fold_in(key, r)`, and
        r is counted in the solver's memory: a resumed run draws what the uninterrupted one does.

    It goes wherever its solver goes: implicit, unrolled (the draw is a constant in x, so that a fresh start cuts the
    derivative), truncated and one-step estimators, with projections and proxes. Refused beside it are
    `HypergradientDescent(warm_start=False)`, where the count would begin anew at every outer step, and upper step rules
    that compare values (`optimizers.quasi_newton`), which need one and the same lower level at two points.

    Reference: the schedule of the surrogate in Sun et al., "Backdoor Contrastive Learning via Bi-level Trigger
    Optimization", ICLR 2024.
    """

    solver: Any
    draw: Callable[[jax.Array], PyTree]
    every: int = 1
    key: Any = 0

    def __post_init__(self) -> None:
        if not all(hasattr(self.solver, name) for name in ("init", "begin", "advance", "end", "steps")):
            raise TypeError(
                f"Reinitialized({type(self.solver).__name__}): give a lower solver made of steps, such as "
                "lower.GradientDescent(0.1, steps=10)."
            )
        if not callable(self.draw):
            raise TypeError(f"Reinitialized(draw={self.draw!r}): the initialiser is a function, key -> y.")
        check_count("Reinitialized", "the number of solves between two draws is a positive integer", every=self.every)
        as_step_key(self.key)

    @property
    def steps(self) -> int:  # type: ignore[override]
        """The solver's."""
        return self.solver.steps

    @property
    def tol(self) -> Any:  # type: ignore[override]
        """The solver's."""
        return getattr(self.solver, "tol", None)

    @property
    def renews(self) -> bool:
        """Two solves in a row need not begin alike."""
        return True

    def rule(self) -> optax.GradientTransformationExtraArgs:
        """The solver's."""
        return self.solver.rule()

    def step_size(self) -> Any:
        """The solver's."""
        return self.solver.step_size()

    def virtual(self) -> Reinitialized:
        """The solver's virtual step, as often begun anew."""
        return dataclasses.replace(self, solver=self.solver.virtual())

    def differentiable(self, choosing: bool = False) -> Reinitialized:
        """The differentiable solver, as often begun anew."""
        made = getattr(self.solver, "differentiable", None)
        return self if made is None else dataclasses.replace(self, solver=made(choosing))

    def looks(self, state: LowerState) -> bool:
        """Whether the rule looks at values of the loss."""
        return self.solver.looks(_inner(state))

    def init(self, y: PyTree) -> LowerState:
        """The start of a run: y is drawn when the first solve begins."""
        drawn = jax.eval_shape(self.draw, jax.random.key(0))
        shapes = lambda tree: jax.tree.map(lambda a: (jnp.shape(a), jnp.result_type(a)), tree)  # noqa: E731
        if jax.tree.structure(drawn) != jax.tree.structure(y) or shapes(drawn) != shapes(y):  # type: ignore[operator]
            raise ValueError(
                f"Reinitialized's draw gives {_described(drawn)}, and y0 is {_described(y)}: the initialiser has to "
                "return what y0 looks like."
            )
        return LowerState(y, Renewal(self.solver.init(y).memory, jnp.zeros((), jnp.int32)))

    def begin(self, x: PyTree, state: LowerState) -> LowerState:
        """Where a solve begins: at a fresh draw, or where the last one ended."""
        done = state.memory.solves
        base = as_step_key(self.key).base
        fresh = self.solver.init(self.draw(jax.random.fold_in(base, done // self.every)))
        chosen = jax.tree.map(lambda new, old: jnp.where(done % self.every == 0, new, old), fresh, _inner(state))
        return _outer(self.solver.begin(x, chosen), done + 1)

    def advance(self, level: Level, x: PyTree, state: LowerState) -> tuple[LowerState, Callable[[], Scalar]]:
        """One step of the solver."""
        new, before = self.solver.advance(level, x, _inner(state))
        return _outer(new, state.memory.solves), before

    def end(self, state: LowerState) -> LowerState:
        """The point that the solver's rule stands at."""
        return _outer(self.solver.end(_inner(state)), state.memory.solves)


def _inner(state: LowerState) -> LowerState:
    return LowerState(state.y, state.memory.memory)


def _outer(state: LowerState, solves: jax.Array) -> LowerState:
    return LowerState(state.y, Renewal(state.memory, solves))


def _described(tree: PyTree) -> str:
    return str(jax.tree.map(lambda a: f"{jnp.result_type(a)}{list(jnp.shape(a))}", tree))
