"""What a client computes when the server asks: its own terms of the joint direction, at the point that it was sent.

    D_y = f_y,    D_v = f_yy v - F_y,    D_x = F_x - f_xy v

An oracle takes the client's levels, the point, and options; all clients of a round stand along a leading axis (over
Flower a client is a round of one). It gives `Terms`, what each level contributes, apart because a client may count
differently in each; `_directions.combined` puts them together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import derivatives
from bilevel.keys import Draw
from bilevel.level import Levels
from bilevel.solvers import _agents
from bilevel.solvers._directions import Joint, Point, combined
from bilevel.typing import PyTree


class Terms(NamedTuple):
    """What the levels contribute at a client: its upper loss, and the terms of each; None where an oracle has none.

    Those of `Joint` are a `Point` of f_xy v, f_y, f_yy v (lower) and one of F_x, None, F_y (upper).
    """

    value: Any = None
    lower: Any = None
    upper: Any = None


def grad_y(levels: Levels, at: Point) -> Terms:
    """D_y: the lower gradient."""
    return Terms(lower=Point(None, levels.lower.gradient(at.x, at.y), None))


def f_y(levels: Levels, at: Point) -> Terms:
    """D_v at v = 0, which is -F_y: a linear system begins with it."""
    return Terms(upper=Point(None, None, jax.grad(levels.upper, argnums=1)(at.x, at.y)))


def hvp(levels: Levels, at: Point) -> Terms:
    """f_yy v."""
    return Terms(lower=Point(None, None, derivatives.hvp(levels.lower, at.x, at.y, at.v)))


def hyper(levels: Levels, at: Point) -> Terms:
    """D_x, and the upper loss."""
    value, F_x = jax.value_and_grad(levels.upper, argnums=0)(at.x, at.y)
    cross = derivatives.cross_product(levels.lower, at.x, at.y, at.v)
    return Terms(value, Point(cross, None, None), Point(F_x, None, None))


def aggitd(levels: Levels, at: Point) -> Terms:
    """D_y and D_v."""
    lower = derivatives.linearised(levels.lower, at.x, at.y)
    F_y = jax.grad(levels.upper, argnums=1)(at.x, at.y)
    return Terms(lower=Point(None, lower.gradient_y, lower.hvp(at.v)), upper=Point(None, None, F_y))


def simfbo(levels: Levels, at: Point, local_steps: int = 1, steps: Any = ()) -> Terms:
    """All three directions, averaged along `local_steps` local steps of the sizes `steps` (of x, y, v)."""
    if local_steps == 1:
        return _joint(levels, at)
    return uneven(levels, at, None, local_steps, steps, jnp.asarray(local_steps))


def _joint(levels: Levels, at: Point) -> Terms:
    found = Joint().components(levels.upper, levels.lower, at)
    return Terms(found.value, found.lower, found.upper)


def uneven(levels: Levels, at: Point, counts: jax.Array | None, most: int, steps: Any, divisor: jax.Array) -> Terms:
    """The sums of the directions along each client's own number of local steps (`counts`, at most `most`; None: all
    take so many), divided; the loss is that of the first step."""

    def step(k: Any, carry: tuple[Point, Terms]) -> tuple[Point, Terms]:
        at, total = carry
        found = _joint(Levels(*(level.redraw(k, most) for level in levels)), at)
        if counts is not None:
            stopped = jax.tree.map(lambda d: jnp.where(rows(k < counts, d), d, 0), (found.lower, found.upper))
            found = Terms(found.value, *stopped)
        first = Terms(jnp.where(k == 0, found.value, 0), found.lower, found.upper)
        return _down(at, steps, combined(found.lower, found.upper)), optax.tree.add(total, first)

    shapes = jax.eval_shape(lambda at: _joint(levels, at), at)
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total = jax.lax.fori_loop(0, most, step, (at, zero))[1]
    shared = jax.tree.map(lambda d: d / rows(divisor, d).astype(d.dtype), (total.lower, total.upper))
    return Terms(total.value, *shared)


def _down(at: Point, sizes: Any, D: Point) -> Point:
    """x, y and v, each a step of its own size against its direction."""
    trios = zip(sizes, (at.x, at.y, at.v), (D.x, D.y, D.v), strict=True)
    return Point(*(jax.tree.map(lambda a, d, s=s: (a - s * d).astype(a.dtype), a, d) for s, a, d in trios))


def storm(levels: Levels, at: tuple[Point, Point], first: jax.Array, local_steps: int, schedule: Any) -> Terms:
    """Where the three variables and their momenta go in `local_steps` steps, numbers `first`, first + 1, ... of a run.

    `schedule(t)` gives the steps' sizes (of x, y, v) and the share of the momentum's error that is kept.
    """

    def step(k: Any, carry: tuple[Point, Point, Any]) -> tuple[Point, Point, Any]:
        at, momenta, _ = carry
        sizes, kept = schedule(first + k)
        moved = _down(at, sizes, momenta)
        upper, lower = (level.redraw(k, local_steps) for level in levels)
        value, new = Joint()(upper, lower, moved)
        _, old = Joint()(upper, lower, at)
        momenta = jax.tree.map(lambda n, m, o: (n + kept * (m - o)).astype(n.dtype), new, momenta, old)
        return moved, momenta, value

    value = jax.eval_shape(levels.upper, at[0].x, at[0].y)
    moved, momenta, loss = jax.lax.fori_loop(0, local_steps, step, (*at, jnp.zeros(value.shape, value.dtype)))
    return Terms(loss, upper=(moved, momenta))


def local(levels: Levels, at: Point, local_steps: int, step_size: Any) -> Terms:
    """How far y goes in `local_steps` steps of the client's own; with v, the mean gradient of all clients at y, their
    variance is reduced: f_y(y_i) - f_y(y) + v, both at one sample."""
    lower = levels.lower.stream(Draw.LOCAL)

    def step(k: Any, y: PyTree) -> PyTree:
        gradient = lower.redraw(k, local_steps).gradient
        G = gradient(at.x, y)
        if at.v is not None:
            G = optax.tree.add(optax.tree.sub(G, gradient(at.x, at.y)), at.v)
        return jax.tree.map(lambda y, g: y - step_size * g, y, G)

    y = jax.lax.fori_loop(0, local_steps, step, at.y)
    return Terms(lower=Point(None, optax.tree.sub(y, at.y), None))


def fedout(levels: Levels, at: Point, local_steps: int, step_size: Any) -> Terms:
    """The sum of the directions of a walk in x that corrects the hypergradient (v) by the change of F_x."""
    upper = levels.upper.stream(Draw.LOCAL)

    def step(k: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        x, total = carry
        gradient = jax.grad(upper.redraw(k, local_steps), argnums=0)
        direction = optax.tree.add(at.v, optax.tree.sub(gradient(x, at.y), gradient(at.x, at.y)))
        return jax.tree.map(lambda x, d: x - step_size * d, x, direction), optax.tree.add(total, direction)

    total = jax.lax.fori_loop(0, local_steps, step, (at.x, optax.tree.zeros_like(at.x)))[1]
    return Terms(upper=Point(total, None, None))


def local_hyper(levels: Levels, at: Point, terms: int, curvature: Any) -> Terms:
    """The hypergradient of a client for itself: its own Hessian, inverted by `terms` terms of the series."""
    value, (F_x, F_y) = jax.value_and_grad(levels.upper, argnums=(0, 1))(at.x, at.y)
    lower = derivatives.linearised(levels.lower, at.x, at.y)

    def term(_: Any, chain: tuple[PyTree, PyTree, jax.Array]) -> tuple[PyTree, PyTree, jax.Array]:
        p, v, L = chain
        product = lower.hvp(p)
        L = jnp.maximum(L, stretch(p, product).astype(L.dtype))
        return less(p, product, L), less(v, p, -L), L

    L = jnp.broadcast_to(curvature, jax.tree.leaves(at.y)[0].shape[:1])
    p, v, L = jax.lax.fori_loop(0, terms - 1, term, (F_y, optax.tree.zeros_like(F_y), L))
    return Terms(value, upper=Point(optax.tree.sub(F_x, lower.cross(less(v, p, -L))), None, None))


def curvature(levels: Levels, at: Point) -> Terms:
    """The largest |eigenvalue| of any of these clients' lower Hessians, as the value."""
    return Terms(_agents.largest_curvature(levels.lower, at.x, at.y))


def less(a: PyTree, b: PyTree, L: jax.Array) -> PyTree:
    """a - b / L, with one L or one for each row: (I - H/L) p is a factor of the series for H^-1."""
    return jax.tree.map(lambda a, b: (a - b / rows(L, b)).astype(a.dtype), a, b)


def stretch(p: PyTree, product: PyTree) -> jax.Array:
    """|H p| / |p| of each row, at most H's largest eigenvalue; 0 where p is, or where it is no number."""
    length, of_product = map(jax.vmap(derivatives.norm), (p, product))
    found = jnp.where(length > 0, of_product / jnp.where(length > 0, length, 1), 0)
    return jnp.where(jnp.isfinite(found), found, 0)


def rows(numbers: jax.Array, like: jax.Array) -> jax.Array:
    """One number per client, broadcast against stacked arrays."""
    return numbers.reshape(*numbers.shape, *[1] * (like.ndim - numbers.ndim))
