"""How copies of a variable move along local directions and still agree on the minimiser of the *mean*.

With s the stacked copies, g the local directions, W the mixing matrix, Wb = (I + W) / 2, a the step (any optax rule:
"- a g" below is its update) one step of each form is

    none      s+ = W (s - a g)                                     diffusion: adapt, then combine
    none-cta  s+ = W s - a g                                       decentralised gradient descent: combine, then adapt
    gt        v+ = W (v + g - g_before),   s+ = W (s - a v+)       gradient tracking: adapt, then combine
    gt-cta    v+ = W v + g - g_before,     s+ = W s - a v+         gradient tracking: combine, then adapt
    ed        s+ = Wb (2 s - s_before - a (g - g_before))          exact diffusion
    extra     s+ = Wb (2 s - s_before) - a (g - g_before)          EXTRA

"none" and "none-cta" converge to a point that is off by O(a) times the heterogeneity; the others have no such bias. Where the
agents' Hessians are alike with largest eigenvalue L, the linear recursions are stable (Jury's test) while a L is below

    none, gt, ed: 2         none-cta: 1 + w         gt-cta: (1 + w)^2 / 2         extra: (5 + 3 w) / 4

with w the smallest eigenvalue of W (-1/3 on a ring).

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

from typing import Any

import jax
import optax

from bilevel._module import state
from bilevel.network import Network
from bilevel.optimizers import as_optimizer

PyTree = Any

CORRECTIONS = ("none", "gt", "ed", "extra", "none-cta", "gt-cta")


@state
class Copies:
    """All agents' copies of one variable and what its correction remembers.

    Attributes:
      value: the copies, along a leading axis.
      direction: the last local directions (gt).
      memory: the tracker v (gt), or the accumulated flow (ed, extra).
      optimizer: each agent's memory of its step rule.
    """

    value: PyTree
    direction: PyTree
    memory: PyTree
    optimizer: PyTree


def start(form: str, value: PyTree, optimizer: Any) -> Copies:
    """Before the first step: nothing tracked."""
    zeros = optax.tree.zeros_like(value)
    tracks = form.startswith("gt")
    memory = zeros if tracks or form in ("ed", "extra") else None
    moments = jax.vmap(as_optimizer(optimizer).init)(value)
    return Copies(value, zeros if tracks else None, memory, moments)


def advance(form: str, network: Network, copies: Copies, direction: PyTree, optimizer: Any, step: Any) -> Copies:
    """One step of the given form along local directions.

    Args:
      form: one of `CORRECTIONS`.
      network: who mixes with whom.
      copies: the variable.
      direction: each agent's local direction, stacked (a gradient: the variable moves against it).
      optimizer: a step size or an optax rule, applied by each agent on its own.
      step: the number of this mixing, for time-varying networks.
    """
    add, sub = optax.tree.add, optax.tree.sub
    s, memory, moments = copies.value, copies.memory, copies.optimizer
    rule = jax.vmap(as_optimizer(optimizer).update)

    if form == "gt":
        memory = network.mix(add(memory, sub(direction, copies.direction)), step)
        update, moments = rule(memory, moments, s)
        return Copies(network.mix(optax.apply_updates(s, update), step), direction, memory, moments)
    if form == "gt-cta":
        memory = add(network.mix(memory, step), sub(direction, copies.direction))
        update, moments = rule(memory, moments, s)
        return Copies(optax.apply_updates(network.mix(s, step), update), direction, memory, moments)

    update, moments = rule(direction, moments, s)
    if form == "none":
        return Copies(network.mix(optax.apply_updates(s, update), step), None, None, moments)
    if form == "none-cta":
        return Copies(optax.apply_updates(network.mix(s, step), update), None, None, moments)
    if form == "ed":
        adapted = add(optax.apply_updates(s, update), memory)
        flow = optax.tree.scale(0.5, network.flow(adapted, step))
        return Copies(sub(adapted, flow), None, sub(memory, flow), moments)
    if form == "extra":
        flow = optax.tree.scale(0.5, network.flow(s, step))
        memory = add(memory, flow)
        return Copies(sub(optax.apply_updates(sub(s, flow), update), memory), None, memory, moments)
    raise ValueError(f"A correction is one of {', '.join(CORRECTIONS)}, not {form!r}.")


def mixings(form: str) -> int:
    """Exchanges with the neighbours per step."""
    return 2 if form.startswith("gt") else 1


def step_limit(form: str, smallest_eigenvalue: float) -> float:
    """The largest stable step times curvature, for agents with equal Hessians."""
    w = smallest_eigenvalue
    return {"none-cta": 1 + w, "gt-cta": (1 + w) ** 2 / 2, "extra": (5 + 3 * w) / 4}.get(form, 2.0)
