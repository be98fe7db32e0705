"""What the methods with one joint descent on F / c + gap share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from bilevel import curvature, derivatives
from bilevel._module import state
from bilevel.constraints import Constraints
from bilevel.keys import StepKey
from bilevel.level import Level
from bilevel.lower import GradientDescent
from bilevel.problem import Problem
from bilevel.solvers.penalty import _base
from bilevel.solvers.penalty._base import Diagnosed, Reported, norm, report
from bilevel.solvers.penalty._schedule import Path, as_schedule
from bilevel.typing import Metrics, PyTree, Scalar

S = TypeVar("S", bound="JointState")


@state
class Watch:
    """What keeps the curvatures of f and F up to date along a run."""

    direction: PyTree  # the gap's last gradient in (x, y)
    moved: Scalar  # the length of the step since, in all variables
    probe: PyTree  # a direction of large curvature
    loss: Scalar  # F before that step,
    slope: Scalar  # its slope along it,
    gone: Scalar  # and the step's length in (x, y) alone
    upward: PyTree = None  # F's gradient, within a step

    def along(self, loss: Scalar, estimate: Any) -> Scalar:
        """The curvature of F along the last step, from its value there, or a relaxed estimate where that is larger.

        2 |F(u + s) - F(u) - F' s| / |s|^2
        """
        left, square = 2 * jnp.abs(loss - self.loss - self.slope), self.gone**2
        noise = 1e3 * jnp.finfo(square.dtype).eps * (jnp.abs(loss) + jnp.abs(self.loss))
        resolved = (left > noise) & (square > 0) & jnp.isfinite(left)
        observed = left / jnp.where(resolved, square, 1.0)
        return jnp.where(resolved, jnp.maximum(0.99 * estimate, observed), estimate).astype(jnp.result_type(estimate))


@state
class JointState(Reported):
    """The iterate of a joint method, its auxiliary variables and what sets its steps.

    Attributes:
      point: the iterate (x, y).
      theta: the auxiliary lower variable, shaped like y; None where there is none.
      duals: multipliers by name, each (p,), of the scaled rows (`multipliers` gives the user's); `lam` is reported.
      path: the penalty and what is extrapolated along it.
      scale: (p,), the rows' scale.
      curvatures: estimates by name.
      watch: what keeps `f` among them up to date; None where it is not: on minibatches, or with steps set by hand.
    """

    point: PyTree
    theta: PyTree
    duals: dict[str, jax.Array]
    path: Path
    scale: jax.Array
    curvatures: dict[str, jax.Array]
    watch: Watch | None

    @property
    def lam(self) -> jax.Array:
        """The multipliers to report, of the scaled rows."""
        return self.duals["lam"]

    def followed(
        self: S, key: StepKey, curved: Callable[..., Scalar], found: Slopes, factor: Any = 2.0, also: Any = 0.0
    ) -> S:
        """The state with the curvatures `f` and `F` brought up to date.

        `curved(x, y)` is what has the curvature `f`; `found` the gradients, the gap's varying with up to `factor` times
        that over the last step (and a length `also` besides). F's curvature at the start says little of that
        elsewhere, and a step that is too long for it in F / c diverges where c is small.
        """
        if self.watch is None:
            return self
        L, watch = self.curvatures, self.watch
        floor, probe = curvature.probe_estimate(lambda u: curved(*u), self.point, key.step, L["f0"], watch.probe)
        change, moved = optax.tree.sub(found.apart, watch.direction), factor * (watch.moved + also)
        size = norm(self.point)
        steeper = jnp.maximum(curvature.secant_estimate(L["f"], floor, change, moved, size), floor)
        L = {**L, "f": steeper, "f0": floor, "F": watch.along(found.loss, L["F"])}
        watch = dataclasses.replace(watch, direction=found.apart, probe=probe, loss=found.loss, upward=found.upward)
        return dataclasses.replace(self, curvatures=L, watch=watch)

    def stepped(
        self: S, point: PyTree, theta: PyTree = None, duals: dict[str, jax.Array] | None = None, **more: Any
    ) -> S:
        """The state after a step; variables that are not given stay."""
        theta, duals = self.theta if theta is None else theta, self.duals if duals is None else duals
        new = dataclasses.replace(self, point=point, theta=theta, duals=duals, **more)
        if self.watch is None:
            return new
        moved = norm(optax.tree.sub((point, theta, duals), (self.point, self.theta, self.duals)))
        step = optax.tree.sub(point, self.point)
        slope = jnp.asarray(derivatives.dot(self.watch.upward, step), self.watch.slope.dtype)
        watch = dataclasses.replace(self.watch, moved=moved, slope=slope, gone=norm(step), upward=None)
        return dataclasses.replace(new, watch=watch)


def begin(
    problem: Problem, x: PyTree, y: PyTree, key: StepKey, schedule: Any, follows: bool, duals: Any = ("lam",)
) -> JointState:
    """A start at (x, y): scaled rows, zero multipliers, curvatures by power iteration.

    The curvatures: `f` and `F` in (x, y) jointly, `f_yy`, `negative` (minus the least eigenvalue of f_yy, at least 0),
    `rows` (the spectral norm of the scaled rows' Jacobian). `follows`: whether a step needs `f` as it is along the run.
    """
    upper, lower = problem.levels(key)
    rows = Constraints(lower, x, y).at(x, y)
    convexity = curvature.hessian_norm(lambda y: lower(x, y), y)
    product = jax.linearize(jax.grad(lambda y: lower(x, y)), y)[1]
    rest = lambda v: optax.tree.add_scale(optax.tree.scale(1.05 * convexity, v), -1.0, product(v))  # noqa: E731
    shifted = curvature.spectral_norm(rest, y)
    curvatures = {
        "f": curvature.hessian_norm(lambda u: lower(*u), (x, y)),
        "F": curvature.hessian_norm(lambda u: upper(*u), (x, y)),
        "f_yy": convexity,
        "negative": jnp.maximum(shifted - 1.05 * convexity, 0.0),
        "rows": curvature.jacobian_norm(lambda u: rows(*u), (x, y)) if rows.count else jnp.zeros((), rows.dtype),
    }
    curvatures["f0"] = curvatures["f"]
    path = as_schedule(schedule).init((x, y), _base.ratio(curvatures["F"], curvatures["f"]))
    zeros = {name: jnp.zeros((rows.count,), rows.dtype) for name in duals}
    return JointState((x, y), y, zeros, path, rows.scale, curvatures, watching(problem, (x, y), follows))


def watching(problem: Problem, point: PyTree, follows: bool) -> Watch | None:
    """A watch before the first step; None on minibatches, whose gradients differ without a step."""
    if problem.stochastic or not follows:
        return None
    dtype = jnp.result_type(*jax.tree.leaves(point[1]))
    zero = jnp.zeros((), dtype)
    return Watch(optax.tree.zeros_like(point), zero, curvature.unit_direction(point), zero, zero, zero)


def lower_scale(curvatures: dict[str, jax.Array]) -> Scalar:
    """The curvature of f in y, or where f is flat there in (x, y) jointly, or one."""
    scale = jnp.where(curvatures["f_yy"] > 1e-3 * curvatures["f"], curvatures["f_yy"], curvatures["f"])
    return jnp.where(scale > 1e-12, scale, 1.0)


class Slopes(NamedTuple):
    """Values and gradients in (x, y) of F and of the gap, auxiliary variables held."""

    loss: Scalar
    upward: PyTree
    gap: Scalar
    apart: PyTree

    def along(self, c: Any) -> PyTree:
        """The gradient of F / c + gap."""
        return optax.tree.add_scale(self.apart, 1 / c, self.upward)


def slopes(upper: Level, gap: Callable[..., Scalar], x: PyTree, y: PyTree) -> Slopes:
    """One gradient of F and one of the gap."""
    loss, upward = jax.value_and_grad(upper, argnums=(0, 1))(x, y)
    value, apart = jax.value_and_grad(gap, argnums=(0, 1))(x, y)
    return Slopes(loss, upward, value, apart)


def descend(problem: Problem, u: PyTree, direction: PyTree, alpha: Any) -> PyTree:
    """u - alpha direction, limited in length, projected on X x Y."""
    return problem.projected(*optax.tree.add(u, _base.limited(u, optax.tree.scale(-alpha, direction))))


def descended(lower: Level, x: PyTree, y: PyTree, size: Any, steps: int) -> PyTree:
    """`steps` (projected) gradient steps of f(x, .) from y."""
    solver = GradientDescent(size, steps)
    return solver(lower, x, solver.init(y)).y


class Joint(Diagnosed):
    """What the joint methods' steps begin and end with."""

    def close(
        self, new: S, key: StepKey, found: Slopes, residuals: tuple[Any, ...], lower_residual: Any, **said: Any
    ) -> tuple[S, Metrics]:
        """The new state with its penalty, and the metrics.

        `residuals`: norms of the step's parts over their step sizes (of F / c + gap, hence c times that in units of F);
        `said`: what `report` takes besides.
        """
        c, slope = new.path.penalty, norm(found.upward)
        residual = c * norm(residuals)
        path = self.advance(new.path, key, new.point, residual / jnp.maximum(slope, 1e-30))
        said = {"penalty": c, "upper_loss": found.loss, "gap": found.gap, "slope": slope, **said}
        metrics = report(path, hypergradient_norm=residual, lower_residual=lower_residual, **said)
        return dataclasses.replace(new, path=path), metrics
