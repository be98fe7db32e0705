"""The two loops that run a lower solver made of steps: a count of steps, and until a tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bilevel._forward import forward_only
from bilevel._module import state
from bilevel._recompute import gradients_kept, repeated
from bilevel.level import Level
from bilevel.typing import PyTree, Scalar

__all__ = ["HOST", "PATIENCE", "Kernel", "LowerState", "repeat", "until", "until_share"]

HOST = "host"
"""In place of a number of states to keep: all of them, in the host's memory."""

PATIENCE = 40
"""Steps without a smaller residual after which a loop with a tolerance ends."""

NO_REVERSE = (
    "No derivative goes back through a lower solver that runs until a tolerance (lower.LBFGS, lower.Accurate, "
    "GradientDescent(tol=...)): its loop has no length that is known beforehand. The derivative of the lower level's "
    "solution itself is hypergradients.value_and_hypergradient's, or bilevel.implicit's (custom_root); to differentiate"
    " a whole run take lower.Newton(), which is differentiated implicitly, or a number of steps (tol=None), and a "
    "plain upper_optimizer; forward mode (jax.jacfwd) goes through it."
)


@state
class LowerState:
    """The lower variable and what its solver remembers from one outer step to the next."""

    y: PyTree
    memory: PyTree


class Kernel(Protocol):
    """A lower solver's step."""

    steps: int

    def advance(self, level: Level, x: PyTree, state: LowerState) -> tuple[LowerState, Callable[[], Scalar]]:
        """The state after a step on the batch that the level holds, and a function that gives the residual *before* it
        (which costs nothing where nobody calls it)."""

    def end(self, state: LowerState) -> LowerState:
        """What a run returns that has come to this state."""


def repeat(
    kernel: Kernel,
    level: Level,
    x: PyTree,
    state: LowerState,
    first: Any = 0,
    count: int | None = None,
    keep: int | str | None = None,
) -> LowerState:
    """`count` steps of a run of `kernel.steps`, from step `first` on, each on its own batch; by default to its end.

    Differentiable in both modes; in reverse each step's state alone is kept and the step computed again, or, of a level
    in mixed mode, its gradient and few of the states (`gradients_kept`). With `keep` states alone (in reverse mode
    only) all others are computed again; with `HOST` all are kept, in the host's memory, and moved there and back within
    the programme. `first` may be traced where there is a `count`.
    """
    count = kernel.steps - first if count is None else count
    if isinstance(keep, int) and keep < count:
        return stretch(kernel, level, x, state, first, count, keep)[0]
    step = _stepping(kernel, level, x, first)
    if level.mixed and keep != HOST:
        return gradients_kept(step, state, count)

    def body(state: LowerState, i: Any) -> tuple[LowerState, None]:
        if keep == HOST:
            state = jax.tree.map(lambda leaf: checkpoint_name(leaf, _STATE), state)
        return step(state, i), None

    policy = _ON_HOST if keep == HOST else None
    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False, policy=policy), state, jnp.arange(count))[0]


def stretch(
    kernel: Kernel, level: Level, x: PyTree, state: LowerState, first: Any, count: int, keep: int
) -> tuple[LowerState, PyTree]:
    """As `repeat` with `keep` states, and x itself: in reverse mode the sum of x's cotangents over the steps goes on
    from that of this x, so that stretches one after the other add up what the whole run does, to the last bit."""
    return repeated(_stepping(kernel, level, x, first), state, count, keep, x)


def _stepping(kernel: Kernel, level: Level, x: PyTree, first: Any) -> Callable[[LowerState, Any], LowerState]:
    return lambda state, i: kernel.advance(level.redraw(first + i, kernel.steps), x, state)[0]


_STATE = "bilevel state"
_ON_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_STATE],
    offload_src="device",
    offload_dst="pinned_host",
)


def until(kernel: Kernel, level: Level, x: PyTree, state: LowerState, tol: Any) -> LowerState:
    """Steps until the residual is at most `tol`, or 40 have not made it smaller (the precision of the dtype).

    At most `kernel.steps`. Not differentiable in reverse. The residual is that of the point before the step: a step
    more than needed is taken, and none wasted on a test. The point that meets the tolerance is what is returned.
    """

    return until_share(kernel, level, x, state, tol, None)[0]


def until_share(
    kernel: Kernel, level: Level, x: PyTree, state: LowerState, tol: Any, reach: Any
) -> tuple[LowerState, Any]:
    """As `until`, where the tolerance is `tol` times the larger of `reach` and this run's first residual.

    That larger one is returned beside the state. With `reach` None the tolerance is `tol` itself, and None is returned.
    """

    def unfinished(carry: Any) -> jax.Array:
        i, _, residual, _, since, least = carry
        return (i < kernel.steps) & (residual > least) & (since < PATIENCE)

    def step(state: LowerState, i: Any) -> tuple[LowerState, Scalar]:
        new, residual_of = kernel.advance(level.redraw(i, kernel.steps), x, state)
        return new, residual_of()

    step = jax.jit(step, inline=True)  # traced once, for the residual's dtype and for the loop

    def body(carry: Any) -> Any:
        i, state, _, best, since, least = carry
        new, residual = step(state, i)
        if reach is not None:
            least = jnp.where(i == 0, tol * jnp.maximum(reach, residual), least)
        y = jax.tree.map(lambda new, y: jnp.where(residual <= least, y, new), new.y, state.y)
        state = LowerState(y, new.memory)
        return i + 1, state, residual, jnp.minimum(residual, best), jnp.where(residual < best, 0, since + 1), least

    zero = jnp.zeros((), jnp.int32)
    infinite = jnp.full_like(jax.eval_shape(step, state, zero)[1], jnp.inf)
    least = jnp.asarray(0 if reach is not None else tol, infinite.dtype)
    start = zero, state, infinite, infinite, zero, least
    _, state, residual, *_, least = jax.lax.while_loop(unfinished, body, start)
    end = kernel.end(state)
    y = jax.tree.map(lambda met, stood: jnp.where(residual <= least, met, stood), state.y, end.y)
    return forward_only(LowerState(y, end.memory), NO_REVERSE), None if reach is None else least / tol
