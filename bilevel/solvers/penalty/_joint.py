"""What the methods with one joint descent on F / c + gap share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel._module import state
from bilevel.problem import Problem
from bilevel.solvers.penalty import _base
from bilevel.solvers.penalty._base import norm
from bilevel.solvers.penalty._constraints import Constraints
from bilevel.solvers.penalty._schedule import Path, Reported, as_schedule

PyTree = Any


@state
class JointState(Reported):
    """The iterate of a joint method, its auxiliary variables and what sets its steps.

    Attributes:
      point: the iterate (x, y).
      theta: the auxiliary lower variable, shaped like y.
      duals: multipliers by name, each (p,), of the scaled rows (`multipliers` gives the user's). `lam` is the one to
        report.
      path: the penalty and what is extrapolated along it.
      scale: (p,), the rows' scale.
      curvatures: estimates by name.
      direction, moved, probe: the gap's last gradient and the length of the step since, and a direction of large
        curvature (they keep the curvature up to date).
    """

    point: PyTree
    theta: PyTree
    duals: dict[str, jax.Array]
    path: Path
    scale: jax.Array
    curvatures: dict[str, jax.Array]
    direction: PyTree
    moved: jax.Array
    probe: PyTree

    @property
    def lam(self) -> jax.Array:
        """The multipliers to report, of the scaled rows."""
        return self.duals["lam"]


def begin(
    problem: Problem, x: PyTree, y: PyTree, key: Any, schedule: Any, duals: tuple[str, ...] = ("lam",)
) -> JointState:
    """A start at (x, y): scaled rows, zero multipliers, curvatures by power iteration.

    The curvatures: `f` and `F` in (x, y) jointly, `f_yy`, `negative` (minus the least eigenvalue of f_yy, at least 0),
    `rows` (the spectral norm of the scaled rows' Jacobian).
    """
    upper, lower = problem.levels(key)
    rows = Constraints(problem, lower, x, y).at(x, y)
    convexity = _base.curvature(lambda y: lower(x, y), y)
    product = jax.linearize(lambda y: jax.grad(lambda y: lower(x, y))(y), y)[1]
    shifted = _base.spectral_norm(
        lambda v: optax.tree.add_scale(optax.tree.scale(1.05 * convexity, v), -1.0, product(v)), y
    )
    curvatures = {
        "f": _base.curvature(lambda u: lower(*u), (x, y)),
        "F": _base.curvature(lambda u: upper(*u), (x, y)),
        "f_yy": convexity,
        "negative": jnp.maximum(shifted - 1.05 * convexity, 0.0),
        "rows": _base.operator_norm(lambda u: rows(*u), (x, y)) if rows.count else jnp.zeros((), rows.dtype),
    }
    curvatures["f0"] = curvatures["f"]
    zeros = {name: jnp.zeros((rows.count,), rows.dtype) for name in duals}
    nought = optax.tree.zeros_like((x, y))
    return JointState(
        (x, y),
        y,
        zeros,
        as_schedule(schedule).init((x, y), _base.ratio(curvatures["F"], curvatures["f"])),
        rows.scale,
        curvatures,
        nought,
        jnp.zeros((), rows.dtype),
        _base.random_like((x, y)),
    )


def lower_scale(curvatures: dict[str, jax.Array]) -> jax.Array:
    """The curvature of f in y, or where f is flat there in (x, y) jointly, or one."""
    scale = jnp.where(curvatures["f_yy"] > 1e-3 * curvatures["f"], curvatures["f_yy"], curvatures["f"])
    return jnp.where(scale > 1e-12, scale, 1.0)


class Slopes(NamedTuple):
    """Values and gradients in (x, y) of F and of the gap, auxiliary variables held."""

    loss: jax.Array
    upward: PyTree
    gap: jax.Array
    apart: PyTree

    def along(self, c: Any) -> PyTree:
        """The gradient of F / c + gap."""
        return optax.tree.add_scale(self.apart, 1 / c, self.upward)


def slopes(upper: Callable[..., jax.Array], gap: Callable[..., jax.Array], x: PyTree, y: PyTree) -> Slopes:
    """One gradient of F and one of the gap."""
    loss, upward = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
    value, apart = jax.value_and_grad(gap, argnums=(0, 1))(x, y)
    return Slopes(loss, upward, value, apart)


def descend(problem: Problem, u: PyTree, direction: PyTree, alpha: Any) -> PyTree:
    """u - alpha direction, limited in length, projected on X x Y."""
    return _base.project_pair(problem, *optax.tree.add(u, _base.limited(u, optax.tree.scale(-alpha, direction))))


def follow(
    problem: Problem,
    state: JointState,
    key: Any,
    curved: Callable[..., jax.Array],
    apart: PyTree,
    factor: Any = 2.0,
    moved: Any = None,
) -> tuple[dict[str, jax.Array], PyTree]:
    """The curvatures with `f` brought up to date, and the next probe; unchanged for minibatches.

    `curved(x, y)` is what has the curvature; `apart` the gap's gradient, which varies with up to `factor` times that.
    """
    if problem.stochastic:
        return dict(state.curvatures), state.probe
    floor, probe = _base.probed(lambda u: curved(*u), state.point, key.step, state.curvatures["f0"], state.probe)
    moved = state.moved if moved is None else moved
    found = _base.secant(
        state.curvatures["f"], floor, optax.tree.sub(apart, state.direction), factor * moved, norm(state.point)
    )
    return {**state.curvatures, "f": jnp.maximum(found, floor), "f0": floor}, probe


def close(
    schedule: Any,
    state: JointState,
    key: Any,
    found: Slopes,
    rows: Constraints,
    point: PyTree,
    theta: PyTree,
    duals: dict[str, jax.Array],
    curvatures: tuple[dict[str, jax.Array], PyTree],
    residuals: tuple[Any, ...],
    lower_residual: Any,
    cap: Any = None,
    penalty: Any = None,
    bias: Any = None,
) -> tuple[JointState, dict[str, jax.Array]]:
    """The new state and the family's metrics (`Diagnosed`); `residuals` are norms of the step's parts over their step
    sizes."""
    c = state.path.penalty if penalty is None else penalty
    residual = c * jnp.sqrt(sum(jnp.asarray(r) ** 2 for r in residuals))
    slope = norm(found.upward)
    path = as_schedule(schedule).advance(state.path, key.step, point, residual / jnp.maximum(slope, 1e-30))
    if bias is None:
        bias = jnp.abs(c * found.gap)
    bias = jnp.where(jnp.isfinite(path.change), jnp.minimum(slope * path.change, bias), bias)
    moved = norm(
        (optax.tree.sub(point, state.point), optax.tree.sub(theta, state.theta), optax.tree.sub(duals, state.duals))
    )
    metrics = {
        "upper_loss": found.loss,
        "hypergradient_norm": residual,
        "lower_residual": jnp.asarray(lower_residual),
        "gap": found.gap,
        "violation": rows.violation(*point),
        "penalty": jnp.asarray(c),
        "bias": bias,
    }
    if cap is not None:
        metrics["multiplier_at_cap"] = share_at_cap(duals["lam"], cap)
    new = JointState(point, theta, duals, path, state.scale, curvatures[0], found.apart, moved, curvatures[1])
    return new, metrics


def share_at_cap(lam: jax.Array, cap: Any) -> jax.Array:
    """The share of multipliers that sit on their cap."""
    if not lam.size:
        return jnp.zeros((), lam.dtype)
    return jnp.mean((jnp.abs(lam) >= cap * (1 - 1e-6)).astype(lam.dtype))
