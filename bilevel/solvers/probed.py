"""A stochastic single loop whose steps come from probed curvatures: no step size, no unit of losses or variables."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel._module import hyperparameters, state
from bilevel._roots import root
from bilevel.derivatives import dot
from bilevel.keys import Draw, StepKey
from bilevel.optimizers import Move
from bilevel.problem import Problem
from bilevel.solvers._base import refuse
from bilevel.solvers._directions import Joint, Point
from bilevel.solvers._variance_reduction import SAGA, SARAH, Plain
from bilevel.solvers.single_loop import SingleLoop, measured
from bilevel.typing import Metrics, PyTree

__all__ = ["ProbedSingleLoop"]

_TINY = 1e-37  # for 0/0 only
_Y, _X = 0.65, 0.5  # the steps of y and v, and of x, times their curvature
_FIRST = 8, 32  # until when all steps probe, and every fourth
_WAIT = 16  # steps that x waits, at least
_EVERY = 10  # steps from one probe to the next after these, twice as many with each doubling of the steps done
_SETTLED = 320, 8  # from when on that is, and the most it grows by
_GROWN = 100.0  # of a squared norm, over its least: x is running away


@state
class Probes:
    """What is known of the curvature.

    Attributes:
      u, u_y: unit directions in x and in y along which it is measured.
      to_x, answer: the direction of the last D_x, and the answer of (y, v) to a move of x along it.
      q1, q2: the answers of (y, v) to a move of x along u, and the lag of these answers; x is None in both.
      lower, upper, lag: L, Lh and M, slow maxima of |f_yy p|, of the curvature of h, and of its lag.
    """

    u: PyTree
    u_y: PyTree
    to_x: PyTree
    answer: Point
    q1: Point
    q2: Point
    lower: jax.Array
    upper: jax.Array
    lag: jax.Array


@state
class ProbedState:
    """Between two steps.

    Attributes:
      x, y, v: the variables.
      memory: what the variance reduction keeps.
      probes: the curvatures.
      squares: slow averages of |D_x|^2, |D_y|^2, |D_v|^2.
      b: the step of x.
      brake: a factor of b, divided by 4 at each return.
      good, least: the point where the average of |D_x|^2 was least since x moved, and that average.
      returns: how often x, y and v were put back there.
    """

    x: PyTree
    y: PyTree
    v: PyTree
    memory: PyTree
    probes: Probes
    squares: jax.Array
    b: jax.Array
    brake: jax.Array
    good: Point
    least: jax.Array
    returns: jax.Array


@hyperparameters
class ProbedSingleLoop:
    """SOBA's directions with steps from probed curvatures; nothing to tune. A heuristic of this package: no paper, no
    theorem.

        y <- y - a e c_y D_y,    v <- v - a e c_v D_v,    x <- project_upper(x - b e c_x D_x)
        a = 0.65 / L,    b up to 0.5 / (Lh + 0.1 M / a)

    L is a slow maximum of |f_yy p| over unit directions p (the last probe's, D_y and D_v). Lh is that of the curvature
    of h along a probe and along D_x, through the answers of (y, v) to a move of x, and M that of how far these answers
    lag. All come from products with the derivative of the joint directions on the step's own batches, at the first 8
    steps, every fourth up to the 32nd, then every tenth (every 20th, 40th and 80th from step 320, 640 and 1,280 on),
    and wherever D_y or D_v is clipped. c clips a direction at twice its usual norm; e decays
    as 1/sqrt(t) without variance reduction and is 1 with it. x waits until y and v have seen the data once. Where the
    average of |D_x|^2 grows a hundredfold over its least, x, y and v return to the point where it was least, and b is
    divided by 4.

    All are ratios of like with like: another unit of F, of f, of all of x or of all of y changes no step but by
    rounding. One unit covers all leaves of x, and one all of y: a unit per leaf does not cancel.

    Attributes:
      reduction: `Plain()`, `SAGA()` or `SARAH()`. None: SAGA where blocks are numbered and its tables fit, SARAH on
        other data with an end, Plain on endless data.

    Metrics: as `SingleLoop`, and `lower_curvature` = L, `upper_curvature` = Lh + 0.1 M / a, `returns`.

    Where it fails: badly conditioned lower levels (y and v follow slowly, and M is underestimated: it returns again and
    again, or stalls); a flat or linear h (no curvature, no step: x stays where it is). The run's end says so
    where it was seen. Take `AID` on all samples there. Under `vmap` every step probes.

    Cost: SOBA's, SABA's or SRBA's, and per probe the batch once more, a derivative of the directions, and 8 products
    with it, six of which are taken together.
    """

    reduction: Any = None

    def __post_init__(self) -> None:
        if self.reduction is not None and type(self.reduction) not in (Plain, SAGA, SARAH):
            raise ValueError(
                f"ProbedSingleLoop(reduction={self.reduction!r}): give Plain(), SAGA() or SARAH(), or None, by "
                "the data."
            )

    def _reduction(self, problem: Problem, x: PyTree, y: PyTree) -> Any:
        if self.reduction is not None:
            return self.reduction
        if any(source.count is None for source in problem.sources):
            return Plain()
        shared = all(
            not source.varies if source.blocks is None else (source.count or 0) % (source.size or 1) == 0
            for source in problem.sources
        )
        return SAGA() if shared and SAGA().table_bytes(problem, x, y) <= SAGA().max_bytes else SARAH()

    def init(self, problem: Problem, x: PyTree, y: PyTree, key: StepKey) -> ProbedState:
        """The state before the first step."""
        refuse(self, problem, x, honours=("project_upper",), instead="solvers.AID or one of the Hessian-free solvers")
        at = Point(x, y, optax.tree.zeros_like(y))
        dtype = jnp.result_type(*jax.tree.leaves((x, y)))
        zero, random = jnp.zeros((), dtype), key.fold_in(Draw.RESTART).random
        pick = lambda key, tree: _unit(optax.tree.random_like(key, tree, jax.random.normal))  # noqa: E731
        u, u_y = (pick(k, tree) for k, tree in zip(jax.random.split(random), (x, y), strict=True))
        none = Point(None, at.v, at.v)
        probes = Probes(u, u_y, optax.tree.zeros_like(x), none, none, none, zero, zero, zero)
        memory = self._reduction(problem, x, y).init(problem, Joint(), at)
        # The largest number, and no infinity, which jax_debug_infs would take for a fault.
        counter, none_yet = jnp.zeros((), jnp.int32), jnp.asarray(jnp.finfo(dtype).max, dtype)
        return ProbedState(x, y, at.v, memory, probes, jnp.zeros(3, dtype), zero, zero + 1, at, none_yet, counter)

    def step(self, problem: Problem, state: ProbedState, key: StepKey) -> tuple[ProbedState, Metrics]:
        """One outer iteration."""
        at, reduction = Point(state.x, state.y, state.v), self._reduction(problem, state.x, state.y)
        value, direction, memory = reduction(problem, Joint(), at, state.memory, key)

        now = jnp.stack([dot(d, d) for d in (direction.x, direction.y, direction.v)])
        held = jnp.where(state.squares > 0, state.squares, now)  # D_x is zero as long as v is
        squares = held + 0.01 * (jnp.minimum(now, 4 * held) - held)
        clips = jnp.minimum(1, 2 * root(squares / jnp.where(now > _TINY, now, _TINY)))

        due = _scheduled(key.step) | (clips[1] < 1) | (clips[2] < 1)
        # The batches are drawn within the branch: outside they would be copied at every step, to be handed to it.
        look = lambda probes: _probed(*problem.levels(key), at, direction, probes)  # noqa: E731
        probes = jax.lax.cond(due, look, lambda probes: probes, state.probes)

        blocks = max(_blocks(source) for source in problem.sources)
        wait = max(_WAIT, blocks) if isinstance(reduction, SAGA) else _WAIT
        a = _over(_Y, probes.lower)
        curvature = probes.upper + 0.1 * probes.lag * probes.lower / _Y
        most = _over(state.brake * _X, curvature)
        grown = jnp.where(state.b > 0, state.b * jnp.exp(jnp.minimum(0.1, 3 / blocks)), 0.1 * most)
        b = jnp.where(key.step < wait, 0, jnp.minimum(most, grown)).astype(a.dtype)

        fade: Any = 1.0
        if isinstance(reduction, Plain) and problem.stochastic:
            fade = jnp.maximum(1, (key.step + 1) / wait).astype(a.dtype) ** -0.5
        y = optax.tree.add_scale(at.y, -a * fade * clips[1], direction.y)
        v = optax.tree.add_scale(at.v, -a * fade * clips[2], direction.v)
        x = Move(b * fade * clips[0], problem.project_upper)(direction.x, (optax.EmptyState(),) * 2, at.x)[0]

        # The averages see 100 steps; before 4 epochs of them the least would be of the transient of v from zero.
        judged = key.step >= wait + max(400, 4 * blocks)
        better = judged & (squares[0] < state.least)
        away = (judged & (squares[0] > _GROWN * state.least)) | ~jnp.isfinite(jnp.sum(now))
        least = jnp.where(better, squares[0], state.least)
        good = _where(better | (~judged & ~away), at, state.good)
        x, y, v = (_where(away, back, on) for back, on in ((good.x, x), (good.y, y), (good.v, v)))
        squares = jnp.where(away, jnp.where(jnp.isfinite(state.squares), jnp.minimum(squares, held), 0), squares)
        squares = squares.at[0].set(jnp.where(away & (least < jnp.finfo(least.dtype).max), least, squares[0]))
        brake = jnp.where(away, state.brake / 4, state.brake)
        returns = state.returns + away
        metrics = {"upper_loss": value, **measured(problem, at.x, direction)}
        metrics |= {"lower_curvature": probes.lower, "upper_curvature": curvature, "returns": returns}
        return ProbedState(x, y, v, memory, probes, squares, b, brake, good, least, returns), metrics

    status = SingleLoop.status


def _scheduled(step: Any) -> jax.Array:
    """Whether this step looks: the first eight, every fourth to the 32nd, every tenth, and more and more rarely."""
    step, (all_until, some_until), (start, most) = jnp.asarray(step, jnp.uint32), _FIRST, _SETTLED
    doublings = sum((step >= start * 2**k).astype(jnp.uint32) for k in range(int(math.log2(most))))
    every = jnp.uint32(_EVERY) << doublings
    return (step < all_until) | ((step < some_until) & (step % 4 == 0)) | (step % every == 0)


def _blocks(source: Any) -> int:
    return source.blocks or max((source.count or 0) // (source.size or source.count or 1), 1)


def _where(chosen: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), a, b)


def _norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm, with the derivative zero at zero, where directions begin."""
    return root(dot(tree, tree))


def _over(number: Any, curvature: jax.Array) -> jax.Array:
    """The quotient, 0 where there is no curvature, in derivatives too."""
    seen = curvature > _TINY
    return jnp.where(seen, number / jnp.where(seen, curvature, 1), 0)


def _unit(tree: PyTree) -> PyTree:
    return optax.tree.scale(_over(1.0, _norm(tree)), tree)


def _slow(old: jax.Array, new: jax.Array) -> jax.Array:
    """The new value where it is larger, a tenth of the way to it where it is not."""
    new = jnp.where(jnp.isfinite(new), new, old)
    return jnp.maximum(new, old + 0.1 * (new - old))


def _probed(upper: Any, lower: Any, at: Point, direction: Point, probes: Probes) -> Probes:
    """The curvatures after one more look, on these batches."""
    joint = lambda x, y, v: Joint()(upper, lower, Point(x, y, v))[1]  # noqa: E731
    _, tangent = jax.linearize(joint, at.x, at.y, at.v)
    zero = optax.tree.zeros_like(at)
    to_x, to_y, to_v = (_unit(d) for d in (direction.x, direction.y, direction.v))
    cosine = dot(to_x, probes.to_x)
    answer = optax.tree.scale(cosine, probes.answer)  # that part of D_x which the last probe has followed

    # Products with many directions at once read the samples once.
    together = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    bent = jax.vmap(lambda p: tangent(zero.x, p, zero.v).y)(together(probes.u_y, to_y, to_v))
    at_once = together(
        Point(probes.u, probes.q1.y, probes.q1.v),
        Point(zero.x, probes.q2.y, probes.q2.v),
        Point(to_x, answer.y, answer.v),
    )
    products = jax.vmap(tangent)(at_once.x, at_once.y, at_once.v)
    first, second, third = (jax.tree.map(lambda leaf: leaf[i], products) for i in range(3))

    lipschitz = _slow(probes.lower, jnp.max(jax.vmap(_norm)(bent)))
    u_y = _unit(optax.tree.add_scale(_unit(jax.tree.map(lambda leaf: leaf[0], bent)), 0.1, to_y))
    a = _over(_Y, lipschitz)

    def followed(q: Point, r: Point, target: Point | None = None) -> Point:
        """One step of (y, v) towards an answer."""
        left = Point(None, r.y, r.v) if target is None else optax.tree.sub(Point(None, r.y, r.v), target)
        return optax.tree.add_scale(q, -a, left)

    q1, q2 = followed(probes.q1, first), followed(probes.q2, second, probes.q1)
    answer = followed(answer, third)
    answer = followed(answer, tangent(to_x, answer.y, answer.v))
    of_direction = _norm(tangent(to_x, answer.y, answer.v).x)

    upper_curvature = _slow(probes.upper, jnp.maximum(_norm(first.x), of_direction))
    lag = _slow(probes.lag, _norm(second.x))
    sign = jnp.where(dot(probes.u, first.x) < 0, -1, 1)
    u = _unit(optax.tree.add_scale(probes.u, sign, _unit(first.x)))
    return Probes(u, u_y, to_x, answer, q1, q2, lipschitz, upper_curvature, lag)
