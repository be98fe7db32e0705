"""Step rules that optax does not have."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import state

PyTree = Any

__all__ = ["spectral"]


@state
class SpectralState:
    """The accepted point, its gradient and step; the last accepted values; whether there is such a point yet."""

    x: PyTree
    gradient: PyTree
    step: jax.Array
    values: jax.Array
    count: jax.Array


@functools.cache
def spectral(memory: int = 10, largest: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Barzilai-Borwein steps, safeguarded, with one evaluation per step and no step size to choose.

    At an accepted point x_k with gradient g_k, s = x_k - x_{k-1} and z = g_k - g_{k-1}, the next trial is

        x_k - t g_k,    t = <s, s> / <s, z>   (twice the last step where <s, z> <= 0),

    with t at most as large as moves x by `largest` (1 + rms(x)) in root mean square. A trial whose value exceeds the largest
    of the last `memory` accepted ones less 1e-4 <g, s>, or is not finite, is withdrawn: the next trial starts at x_k
    again with a quarter of t. The first t moves x by a tenth of `largest`.

    For deterministic objectives: `update` needs `value=`, which `HypergradientDescent` and the lower solvers give. With a projection
    applied after the step it is the spectral projected gradient method, with the line search taken over outer iterations.

    References: Barzilai, Borwein, "Two-Point Step Size Gradient Methods", IMA J. Numer. Anal. 1988; Birgin, Martinez, Raydan,
    "Nonmonotone Spectral Projected Gradient Methods on Convex Sets", SIAM J. Optim. 2000.
    """

    def init(params: PyTree) -> SpectralState:
        dtype = jnp.result_type(float, *jax.tree.leaves(params)) if jax.tree.leaves(params) else jnp.result_type(float)
        infinite = jnp.full((memory,), jnp.inf, dtype)
        zero = optax.tree.zeros_like(params)
        return SpectralState(jax.tree.map(jnp.asarray, params), zero, jnp.zeros((), dtype), infinite, jnp.zeros((), jnp.int32))

    def update(gradient: PyTree, s: SpectralState, params: PyTree = None, *, value: Any = None, **_: Any) -> Any:
        if params is None or value is None:
            raise ValueError("optimizers.spectral needs update(gradient, state, params, value=value): the value decides whether a step is kept.")
        dtype = s.step.dtype
        value = jnp.asarray(value, dtype)
        first = s.count == 0
        moved = optax.tree.sub(params, s.x)
        worst = jnp.max(jnp.where(jnp.isfinite(s.values), s.values, -jnp.inf))
        slack = 8 * jnp.finfo(dtype).eps * jnp.abs(worst)
        decrease = 1e-4 * jnp.asarray(optax.tree.vdot(s.gradient, moved), dtype)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
        accepted = first | (finite & (value <= worst + jnp.minimum(decrease, 0) + slack))

        curvature = jnp.asarray(optax.tree.vdot(moved, optax.tree.sub(gradient, s.gradient)), dtype)
        length = jnp.asarray(optax.tree.vdot(moved, moved), dtype)
        bb = jnp.where(curvature > 0, length / jnp.where(curvature > 0, curvature, 1), 2 * s.step)
        x = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), params, s.x)
        g = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), gradient, s.gradient)
        size = max(optax.tree.size(params), 1)
        rms = lambda tree: jnp.asarray(optax.tree.norm(tree), dtype) / size**0.5  # noqa: E731
        limit = largest * (1 + rms(x)) / jnp.maximum(rms(g), jnp.finfo(dtype).tiny ** 0.5)
        step = jnp.where(first, 0.1 * limit, jnp.where(accepted, jnp.minimum(bb, limit), 0.25 * s.step))
        values = jnp.where(accepted, jnp.roll(s.values, 1).at[0].set(value), s.values)
        updates = jax.tree.map(lambda old, now, g: (old - now) - step.astype(g.dtype) * g, x, params, g)
        return updates, SpectralState(x, g, step, values, s.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)
