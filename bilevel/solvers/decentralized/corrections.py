"""How copies of a variable move along local directions and still agree on the minimiser of the *mean*.

With s the stacked copies, g the local directions, W the mixing matrix, Wb = (I + W) / 2, and "- a g" the update of a
step a or of any optax rule, one step of each form is

    none      s+ = W (s - a g)                                     diffusion: adapt, then combine
    none-cta  s+ = W s - a g                                       decentralised gradient descent: combine, then adapt
    gt        t+ = W (t + g - g_before),   s+ = W (s - a t+)       gradient tracking: adapt, then combine
    gt-cta    t+ = W t + g - g_before,     s+ = W s - a t+         gradient tracking: combine, then adapt
    ed        s+ = Wb (2 s - s_before - a (g - g_before))          exact diffusion
    extra     s+ = Wb (2 s - s_before) - a (g - g_before)          EXTRA

"none" and "none-cta" converge to a point that is off by O(a) times the heterogeneity; the others have no such bias.
Where the agents' Hessians are alike with largest eigenvalue L, and w is the smallest eigenvalue of W (-1/3 on a ring),
the linear recursions are stable (Jury's test) while a L is below

    none, gt, ed: 2         none-cta: 1 + w         gt-cta: (1 + w)^2 / 2         extra: (5 + 3 w) / 4

ED and EXTRA are kept in the form of an accumulated flow (s - mix(s), exact differences along edges) instead of two
past iterates, whose rounding errors add up in float32:

    ed        p = s - a g + c,   c+ = c - flow(p) / 2,   s+ = p - flow(p) / 2
    extra     d+ = d + flow(s) / 2,                      s+ = s - flow(s) / 2 - a g - d+

In float32 all forms settle where a step is lost in rounding, a |g| = half a unit in the last place of s: small steps
end further away.

References: Yuan, Ying, Zhao, Sayed, "Exact Diffusion for Distributed Optimization and Learning", IEEE TSP 2019; Shi,
Ling, Wu, Yin, "EXTRA", SIAM J. Optim. 2015; Di Lorenzo, Scutari, "NEXT", IEEE TSIPN 2016; Xu et al., "Augmented
Distributed Gradient Methods", CDC 2015.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from bilevel._module import state
from bilevel.network import Network
from bilevel.optimizers import Move
from bilevel.typing import PyTree

__all__ = ["CORRECTIONS", "Copies", "Correction"]


@state
class Copies:
    """All agents' copies of one variable and what its correction remembers.

    Attributes:
      value: the copies, along a leading axis.
      direction: the last local directions (gt).
      memory: the tracker t (gt), or the accumulated flow (ed, extra).
      optimizer: each agent's memory of its step rule.
    """

    value: PyTree
    direction: PyTree
    memory: PyTree
    optimizer: PyTree


@dataclasses.dataclass(frozen=True)
class Correction:
    """One form: how it starts and moves the copies along local directions, what it costs, how long steps may be.

    Attributes:
      advance: (network, copies, direction, move, step) -> copies: one step along each agent's local direction (a
        gradient: the variable moves against it) by its own step rule `move`; `step` is the number of this mixing, for
        time-varying networks.
      limit: the largest stable step times curvature, for agents with equal Hessians, of the smallest eigenvalue of W.
      tracks: whether the last directions and a tracker are remembered.
      accumulates: whether a flow is remembered, which needs one fixed graph.
    """

    advance: Callable[[Network, Copies, PyTree, Move, Any], Copies]
    limit: Callable[[float], float] = lambda w: 2.0
    tracks: bool = False
    accumulates: bool = False

    @property
    def mixings(self) -> int:
        """Exchanges with the neighbours per step."""
        return 2 if self.tracks else 1

    def start(self, value: PyTree, move: Move) -> Copies:
        """Before the first step: nothing tracked."""
        zeros = optax.tree.zeros_like(value)
        memory = zeros if self.tracks or self.accumulates else None
        return Copies(value, zeros if self.tracks else None, memory, move.init(value))


def _adapt_then_combine(network: Network, copies: Copies, direction: PyTree, move: Move, step: Any) -> Copies:
    adapted, moments = move(direction, copies.optimizer, copies.value)
    return Copies(network.mix(adapted, step), None, None, moments)


def _combine_then_adapt(network: Network, copies: Copies, direction: PyTree, move: Move, step: Any) -> Copies:
    update, moments = move.updates(direction, copies.optimizer, copies.value)
    return Copies(optax.apply_updates(network.mix(copies.value, step), update), None, None, moments)


def _tracking(network: Network, copies: Copies, direction: PyTree, move: Move, step: Any) -> Copies:
    change = optax.tree.sub(direction, copies.direction)
    tracker = network.mix(optax.tree.add(copies.memory, change), step)
    moved = _adapt_then_combine(network, copies, tracker, move, step)
    return Copies(moved.value, direction, tracker, moved.optimizer)


def _tracking_descent(network: Network, copies: Copies, direction: PyTree, move: Move, step: Any) -> Copies:
    change = optax.tree.sub(direction, copies.direction)
    tracker = optax.tree.add(network.mix(copies.memory, step), change)
    moved = _combine_then_adapt(network, copies, tracker, move, step)
    return Copies(moved.value, direction, tracker, moved.optimizer)


def _exact_diffusion(network: Network, copies: Copies, direction: PyTree, move: Move, step: Any) -> Copies:
    moved, moments = move(direction, copies.optimizer, copies.value)
    adapted = optax.tree.add(moved, copies.memory)
    flow = optax.tree.scale(0.5, network.flow(adapted, step))
    return Copies(optax.tree.sub(adapted, flow), None, optax.tree.sub(copies.memory, flow), moments)


def _extra(network: Network, copies: Copies, direction: PyTree, move: Move, step: Any) -> Copies:
    update, moments = move.updates(direction, copies.optimizer, copies.value)
    flow = optax.tree.scale(0.5, network.flow(copies.value, step))
    memory = optax.tree.add(copies.memory, flow)
    moved = optax.apply_updates(optax.tree.sub(copies.value, flow), update)
    return Copies(optax.tree.sub(moved, memory), None, memory, moments)


CORRECTIONS: dict[str, Correction] = {
    "none": Correction(_adapt_then_combine),
    "gt": Correction(_tracking, tracks=True),
    "ed": Correction(_exact_diffusion, accumulates=True),
    "extra": Correction(_extra, lambda w: (5 + 3 * w) / 4, accumulates=True),
    "none-cta": Correction(_combine_then_adapt, lambda w: 1 + w),
    "gt-cta": Correction(_tracking_descent, lambda w: (1 + w) ** 2 / 2, tracks=True),
}
"""The forms by the names that `Decentralized(x=, y=, v=)` takes."""
