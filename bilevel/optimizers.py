"""Step rules: what is taken for one, the move that a variable makes by one, and two rules that optax does not have."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import derivatives
from bilevel._arguments import explained, has, look
from bilevel._forward import forward_only
from bilevel._module import state
from bilevel._roots import root
from bilevel.typing import Project, PyTree, Scalar

__all__ = [
    "Move", "Withdrawing", "accepted", "as_optimizer", "check_count", "check_optimizer", "coupled_adam",
    "looks_at_values", "quasi_newton", "residual", "rewound", "searches", "spectral", "standing",
    "value_and_gradient", "withdraws",
]  # fmt: skip

# A missing argument by its name, in what Python, optax and the rules here say of it.
_WORDS = re.compile(r"(?<![\w.])(value|value_fn|grad)(?=['\"=])")


def as_optimizer(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """An optax rule; a bare number means `optax.sgd` with that step size."""
    if isinstance(optimizer, optax.GradientTransformation):
        return optax.with_extra_args_support(optimizer)
    return optax.with_extra_args_support(optax.sgd(optimizer))


def is_rule(optimizer: Any) -> bool:
    """Whether it is an optax rule, and not a step size."""
    return isinstance(optimizer, optax.GradientTransformation)


def check_optimizer(owner: str, name: str, value: Any) -> None:
    """Raise a sentence where a step rule is neither a positive number nor an optax rule."""
    if isinstance(value, (optax.GradientTransformation, jax.Array, jax.core.Tracer)):
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 < value < math.inf:
            raise ValueError(f"{owner}({name}={value!r}): a step size is positive and finite.")
        return
    home = look(value, "__module__", "").split(".")[0]
    made = look(value, "__qualname__", "")
    if callable(value) and home == "optax" and "<locals>" in made:  # what a constructor of schedules returns
        raise TypeError(
            f"{owner}({name}=...) was given a schedule, and a rule is what takes one: write {name}=optax.sgd(schedule) "
            f"or {name}=optax.adam(schedule)."
        )
    if callable(value) and made and home in ("optax", "bilevel"):
        raise TypeError(f"{owner}({name}={home}.{made}): the rule is made by a call: {name}={home}.{made}(1e-2).")
    if isinstance(value, (list, tuple)) and any(isinstance(part, optax.GradientTransformation) for part in value):
        raise TypeError(f"{owner}({name}=[...]) was given several rules: chain them, {name}=optax.chain(*rules).")
    if home == "bilevel" or type(value).__module__.startswith("bilevel."):
        raise TypeError(
            f"{owner}({name}={type(value).__name__}(...)): a step rule is a step size or an optax rule, and this is "
            f"another part of the package: write {name}=0.1 or {name}=optax.adam(1e-2)."
        )
    if has(value, "gradient_transformation"):
        raise TypeError(
            f"{owner}({name}={type(value).__name__}(...)): write {name}=optax.{type(value).__name__}"
            "(...).gradient_transformation()."
        )
    raise TypeError(
        f"{owner}({name}={value!r}): give a step size or an optax GradientTransformation such as optax.adam(1e-2)."
    )


def check_count(owner: str, what: str = "a positive integer is needed", **counts: Any) -> None:
    """Raise a sentence where a count is neither a positive integer nor None."""
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1):
            raise ValueError(f"{owner}({name}={count!r}): {what}.")


_NO_REVERSE = (
    "No derivative goes back through a step rule that withdraws steps (optimizers.quasi_newton, optimizers.spectral, "
    "the defaults of solvers without a step size): its choices have none. To differentiate a whole run give it a plain "
    "rule, such as upper_optimizer=0.1 or optax.adam(1e-2)."
)

# ---------------------------------------------------------------- rules that look at values


def looks_at_values(rule: Any, memory: PyTree, variable: PyTree) -> bool:
    """Whether a rule looks at values of the loss (value, grad, value_fn), and not at its gradient alone.

    Read off the rule itself, by a trace of its update: what names the leaves of the variable, or of a memory, have says
    nothing. So `optax.polyak_sgd`, line searches and `reduce_on_plateau` are known wherever in a chain they stand.
    """
    if not is_rule(rule):
        return False
    if withdraws(memory):
        return True
    asked = []

    def value_fn(variable: PyTree) -> jax.Array:
        asked.append(True)
        return sum((jnp.sum(leaf).astype(float) for leaf in jax.tree.leaves(variable)), jnp.zeros(()))

    def update(value: jax.Array, apart: PyTree, gradient: PyTree, memory: PyTree, variable: PyTree) -> Any:
        extra = {"value": value, "grad": apart, "value_fn": value_fn}
        return as_optimizer(rule).update(gradient, memory, variable, **extra)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), variable)
    dtype = jnp.result_type(*jax.tree.leaves(variable))
    value = jax.ShapeDtypeStruct((), dtype)
    jaxpr = jax.make_jaxpr(update)(value, shapes, variable, memory, variable).jaxpr
    given = set(jaxpr.invars[: 1 + len(jax.tree.leaves(shapes))])
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    return bool(asked) or any(id(v) in used for v in given)


_SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)


def searches(memory: PyTree) -> bool:
    """Whether the rule with this memory has a line search of optax's in it."""
    is_one = lambda node: isinstance(node, _SEARCHES)  # noqa: E731
    return any(is_one(node) for node in jax.tree.leaves(memory, is_leaf=is_one))


def value_and_gradient(loss: Any, variable: PyTree, memory: PyTree) -> tuple[jax.Array, PyTree]:
    """The loss and its gradient at the variable, as a line search has left them there, where the chain ends in one.

    `optax.value_and_grad_from_state` looks for leaves of these names, and finds the user's parameters.
    """
    evaluate = jax.value_and_grad(loss)
    last = jax.tree.leaves(memory, is_leaf=lambda node: isinstance(node, (*_SEARCHES, optax.EmptyState)))[-1:]
    known = last[0] if last and isinstance(last[0], _SEARCHES) else None
    if known is None or jax.tree.structure(known.grad) != jax.tree.structure(variable):  # type: ignore[operator]
        return evaluate(variable)
    shapes = jax.eval_shape(evaluate, variable)
    known = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), (known.value, known.grad), shapes)
    return jax.lax.cond(jnp.isfinite(known[0]), lambda _: known, evaluate, variable)


def unfit(rule: Any, variable: PyTree) -> str:
    """Why a rule cannot move a variable, in a line; "" where it can, or where that cannot be seen."""
    full = as_optimizer(rule)
    try:
        memory = jax.eval_shape(full.init, variable)
    except Exception as error:  # whatever a rule says to another tree
        return " ".join(str(error).split())[:200]
    try:
        moved = jax.eval_shape(lambda v, m: optax.apply_updates(v, full.update(v, m, v)[0]), variable, memory)
    except Exception:  # it may look at values
        return ""
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]  # noqa: E731
    here, there = shapes(jax.eval_shape(lambda v: v, variable)), shapes(moved)
    return "" if here == there else f"it takes shapes {here} to {there}"


# ---------------------------------------------------------------- at a gradient of zero

AT_REST = (
    "y is exactly at an optimum of the lower level, where {what}'s step rule is divided by its eps alone (Adam and its "
    "relatives, updates of norm one): the derivative of its steps there is about 1 / eps, whatever that of the lower "
    "solution is. Give the rule an eps_root above its step's square (optax.adam(1e-2, eps_root=1e-3)), plain steps "
    "(0.1), another start, or take hypergradients.Implicit, which does not differentiate steps."
)

# ---------------------------------------------------------------- schedules


def rewound(memory: PyTree, variable: PyTree) -> PyTree:
    """A rule's memory whose schedules begin anew, everything else as it is.

    A schedule's state is a count of steps and nothing beside it (optax's `scale_by_schedule`, `inject_hyperparams`,
    `conditionally_transform`, and rules of one's own with such a state). A count that stands beside moments or
    gradients belongs to those (Adam's bias correction, `MultiSteps`), and stays.

    Args:
      memory: of the rule.
      variable: that the rule moves; nodes of its types hold moments, and are no states of a rule.
    """
    parts = {type(node) for node in _nodes(variable)} - {tuple, list, dict}

    def children(node: Any) -> list[Any] | None:
        """What a container holds; None for a leaf."""
        found = jax.tree.leaves(node, is_leaf=lambda inside: inside is not node)
        return None if len(found) == 1 and found[0] is node else found

    def moments(node: Any) -> bool:
        """Whether a child is a value of the rule itself, or a tree of them, and no state of a part of it."""
        inside = children(node)
        if inside is None:
            return not _counts(node)
        named = hasattr(node, "_fields") or hasattr(type(node), "__dataclass_fields__")
        return any(map(moments, inside)) if not named or type(node) in parts else False

    def walk(node: Any) -> Any:
        inside = children(node)
        if inside is None or isinstance(node, _COUNTING):
            return node
        own = [child for child in inside if _counts(child)]
        others = [child for child in inside if not _counts(child)]
        known = isinstance(node, _SCHEDULED)
        new = own and (known or not any(map(moments, others)))
        made = iter([jnp.zeros_like(child) if new and _counts(child) else walk(child) for child in inside])
        return jax.tree.map(lambda _: next(made), node, is_leaf=lambda inside: inside is not node)

    if _counts(memory):  # a rule whose whole memory is its count
        return jnp.zeros_like(memory)
    return walk(memory)


def _counts(leaf: Any) -> bool:
    """Whether it is an integer number."""
    return (
        hasattr(leaf, "dtype")
        and jnp.issubdtype(leaf.dtype, jnp.integer)
        and jnp.ndim(leaf) == 0
        and not isinstance(leaf, Withdrawing)
    )


def _nodes(tree: PyTree) -> list[Any]:
    """All containers of a pytree."""
    inside = [leaf for leaf in jax.tree.leaves(tree, is_leaf=lambda node: node is not tree) if leaf is not tree]
    return [tree, *(node for child in inside for node in _nodes(child))] if inside else []


# Optax's states with a count and other things: those whose count is a schedule's, and those whose count is not.
_SCHEDULED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
_COUNTING = (optax.LookaheadState,)


# ---------------------------------------------------------------- moving a variable


@dataclasses.dataclass(frozen=True)
class Move:
    """How a variable moves along a direction: z <- project(z + rule(direction)).

    Attributes:
      rule: an optax rule or a step size.
      project: the projection on the variable's set; None: the whole space.
      many: the variable is many, stacked over agents or clients, each with a memory of its own.
    """

    rule: Any
    project: Project | None = None
    many: bool = False

    def init(self, variable: PyTree) -> PyTree:
        """The rule's memory before the first move."""
        start = as_optimizer(self.rule).init
        return jax.vmap(start)(variable) if self.many else start(variable)

    def updates(self, direction: PyTree, memory: PyTree, variable: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        """What the rule would add to the variable, and its memory."""
        update = as_optimizer(self.rule).update
        try:
            return (jax.vmap(update) if self.many else update)(direction, memory, variable, **extra)
        except (TypeError, ValueError) as error:
            if not set(_WORDS.findall(str(error))) & ({"value", "value_fn", "grad"} - set(extra)):
                raise
            raise TypeError(
                "This step rule looks at values of the loss (as optax.polyak_sgd, line searches, reduce_on_plateau and "
                "optimizers.quasi_newton do), and the method does not evaluate the loss at its steps. Give it a rule "
                "of gradients alone, such as optax.adam(1e-2), or take solvers.AID, which gives values to both levels' "
                f"rules. ({error})"
            ) from error

    def __call__(
        self, direction: PyTree, memory: PyTree, variable: PyTree, scale: Any = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """The variable after the move, its update times `scale`, and the rule's memory.

        `extra`: what the rule's update takes besides (value, grad, value_fn).
        """
        updates, memory = self.updates(direction, memory, variable, **extra)
        if scale is not None:
            updates = optax.tree.scale(scale, updates)
        new = optax.apply_updates(variable, updates)
        return (new if self.project is None else self.project(new)), memory


def residual(at: PyTree, gradient: PyTree, project: Project | None = None) -> Scalar:
    """How far from stationary: |gradient|, or with a projection |at - project(at - gradient)|."""
    if project is None:
        return derivatives.norm(gradient)
    return derivatives.norm(optax.tree.sub(at, project(optax.tree.sub(at, gradient))))


# ---------------------------------------------------------------- rules that withdraw steps


class Withdrawing:
    """The state of a step rule that may withdraw a step, once it has seen the value there.

    Attributes:
      x: the accepted point, which is what a loop returns, and not the trial that comes next.
      accepted: whether the last trial was.
    """

    x: PyTree
    accepted: jax.Array

    def standing(self) -> tuple[jax.Array, PyTree]:
        """The value and the gradient at the accepted point."""
        raise NotImplementedError


def _withdrawing(memory: PyTree) -> list[Withdrawing]:
    is_one = lambda node: isinstance(node, Withdrawing)  # noqa: E731
    return [node for node in jax.tree.leaves(memory, is_leaf=is_one) if is_one(node)]


def withdraws(memory: PyTree) -> bool:
    """Whether the rule with this memory may withdraw a step, wherever in an `optax.chain` that rule stands."""
    return bool(_withdrawing(memory))


def accepted(memory: PyTree, params: PyTree) -> tuple[PyTree, Any]:
    """The point that a step rule stands at, and whether its last trial was accepted: `params` and True for most rules.

    Raises:
      ValueError: several rules of a chain may withdraw steps, or one that moves a part of the variable alone.
    """
    found = _withdrawing(memory)
    if not found:
        return params, True
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} step rules of one chain withdraw steps (quasi_newton, spectral), and cannot agree on where "
            "the variable stands: keep one of them."
        )
    if jax.tree.structure(found[0].x) != jax.tree.structure(params):  # type: ignore[operator]
        raise ValueError(
            "A step rule that withdraws steps (quasi_newton, spectral) moves only a part of the variable here "
            "(optax.masked, optax.partition), while the rest moves on: give it the whole variable, or take another "
            "rule."
        )
    return found[0].x, found[0].accepted


def standing(memory: PyTree, value: jax.Array, gradient: PyTree) -> tuple[jax.Array, PyTree]:
    """The value and the gradient at the point that a step rule stands at: those given, for rules that withdraw none."""
    found = _withdrawing(memory)
    if not found:
        return value, gradient
    kept_value, kept_gradient = found[0].standing()
    return kept_value.astype(value.dtype), optax.tree.cast_like(kept_gradient, gradient)


@explained
@functools.cache
def coupled_adam(
    learning_rate: float = 3e-4, b1: float = 0.5, b2: float = 0.999, weight_decay: float = 1e-3
) -> optax.GradientTransformation:
    """Adam on the gradient of the loss plus (weight_decay / 2) |x|^2, DARTS's rule for the architecture.

    The decay goes through Adam's moments (coupled), unlike `optax.adamw`'s. Equal numbers give one and the same
    rule, so that solvers made with it share a compiled program.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate, b1=b1, b2=b2))


@state
class SpectralState(Withdrawing):
    """The accepted point, its gradient and step; the last accepted values; whether there is such a point yet."""

    x: PyTree
    gradient: PyTree
    step: jax.Array
    values: jax.Array
    count: jax.Array
    unit: jax.Array
    accepted: jax.Array

    def standing(self) -> tuple[jax.Array, PyTree]:
        """The value and the gradient at the accepted point."""
        return self.values[0], self.gradient


@explained
@functools.cache
def spectral(memory: int = 10, largest: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Barzilai-Borwein steps, safeguarded, with one evaluation per step and no step size to choose.

    At an accepted point x_k with gradient g_k, s = x_k - x_{k-1} and z = g_k - g_{k-1}, the next trial is

        x_k - t g_k,    t = <s, s> / <s, z>   (twice the last step where <s, z> <= 0),

    with t at most as large as moves x by `largest` times the larger of rms(x), rms(x_0) and 4 rms(s), in root mean
    square. A trial whose value exceeds the largest of the last `memory` accepted ones less 1e-4 <g, s>, or is not
    finite, is withdrawn: the next trial starts at x_k again with a quarter of t. The first t moves x by a tenth of
    `largest` rms(x_0); where x_0 = 0 tells no unit, by a tenth of the least of 1 and |F| / |g|.

    For deterministic objectives: `update` needs `value=`, which `HypergradientDescent` and the lower solvers give. With
    a projection applied after the step it is the spectral projected gradient method, with the line search taken over
    outer iterations.

    References: Barzilai, Borwein, "Two-Point Step Size Gradient Methods", IMA J. Numer. Anal. 1988; Birgin, Martinez,
    Raydan, "Nonmonotone Spectral Projected Gradient Methods on Convex Sets", SIAM J. Optim. 2000.
    """

    def init(params: PyTree) -> SpectralState:
        dtype = jnp.result_type(float, *jax.tree.leaves(params))
        none = jnp.full((memory,), jnp.finfo(dtype).max, dtype)  # no infinity, for jax_debug_infs to stumble on
        zero = optax.tree.zeros_like(params)
        return SpectralState(
            jax.tree.map(jnp.asarray, params),
            zero,
            jnp.zeros((), dtype),
            none,
            jnp.zeros((), jnp.int32),
            jnp.zeros((), dtype),
            jnp.asarray(True),
        )

    def update(gradient: PyTree, s: SpectralState, params: PyTree = None, *, value: Any = None, **_: Any) -> Any:
        if params is None or value is None:
            raise ValueError(
                "optimizers.spectral needs update(gradient, state, params, value=value): the value decides whether a "
                "step is kept."
            )
        dtype = s.step.dtype
        value = jnp.asarray(value, dtype)
        first = s.count == 0
        moved = optax.tree.sub(params, s.x)
        worst = jnp.max(jnp.where(jnp.abs(s.values) < jnp.finfo(dtype).max, s.values, -jnp.inf))
        slack = 8 * jnp.finfo(dtype).eps * jnp.abs(worst)
        decrease = 1e-4 * jnp.asarray(derivatives.dot(s.gradient, moved), dtype)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
        accepted = first | (finite & (value <= worst + jnp.minimum(decrease, 0) + slack))

        curvature = jnp.asarray(derivatives.dot(moved, optax.tree.sub(gradient, s.gradient)), dtype)
        length = jnp.asarray(derivatives.dot(moved, moved), dtype)
        bb = jnp.where(curvature > 0, length / jnp.where(curvature > 0, curvature, 1), 2 * s.step)
        x = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), params, s.x)
        g = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), gradient, s.gradient)
        rms = functools.partial(_root_mean_square, dtype=dtype)
        unit = jnp.where(first, _first_unit(rms(x), rms(g), value), s.unit)
        limit = largest * _farthest(rms(x), rms(moved), unit, accepted)
        limit = limit / jnp.maximum(rms(g), _least_norm(dtype))
        step = jnp.where(first, 0.1 * limit, jnp.where(accepted, jnp.minimum(bb, limit), 0.25 * s.step))
        values = jnp.where(accepted, jnp.roll(s.values, 1).at[0].set(value), s.values)
        updates = jax.tree.map(lambda old, now, g: (old - now) - step.astype(g.dtype) * g, x, params, g)
        updates = forward_only(updates, _NO_REVERSE)
        return updates, SpectralState(x, g, step, values, s.count + 1, unit, accepted)

    return optax.GradientTransformationExtraArgs(init, update)


def _least_norm(dtype: Any) -> jax.Array:
    """Below it a norm is taken for zero: its square is no number of this dtype."""
    return jnp.asarray(jnp.finfo(dtype).tiny, dtype) ** 0.5


def _first_unit(size: jax.Array, slope: jax.Array, value: jax.Array) -> jax.Array:
    """The unit of a variable whose rms is `size` at its start: that; at zero the least of 1 and |value| / slope."""
    least = _least_norm(size.dtype)
    told = jnp.abs(value) / jnp.maximum(slope, least)
    told = jnp.where(jnp.isfinite(told) & (told > 0), jnp.minimum(told, 1), 1)
    return jnp.where(size > least, size, told)


def _farthest(size: jax.Array, moved: jax.Array, unit: jax.Array, accepted: jax.Array) -> jax.Array:
    """How far the next move may go, in root mean square."""
    return jnp.maximum(jnp.maximum(size, unit), jnp.where(accepted & jnp.isfinite(moved), 4 * moved, 0))


def _root_mean_square(tree: PyTree, dtype: Any) -> jax.Array:
    squares = jnp.asarray(optax.tree.norm(tree, squared=True), dtype)
    return root(squares) / max(optax.tree.size(tree), 1) ** 0.5


@state
class QuasiNewtonState(Withdrawing):
    """The accepted point, its gradient and value; the direction being tried and its length.

    The pairs (s, z), newest first.
    """

    x: PyTree
    gradient: PyTree
    value: jax.Array
    direction: PyTree
    step: jax.Array
    s: PyTree
    z: PyTree
    rho: jax.Array
    count: jax.Array
    unit: jax.Array
    accepted: jax.Array

    def standing(self) -> tuple[jax.Array, PyTree]:
        """The value and the gradient at the accepted point."""
        return self.value, self.gradient


@explained
@functools.cache
def quasi_newton(memory: int = 10, largest: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """L-BFGS with its backtracking spread over outer iterations: one evaluation per step, and no step size to choose.

    At an accepted point x_k the direction d = -H g_k is that of L-BFGS with the last `memory` pairs of positive
    curvature, and the trial is x_k + t d, with t = 1, or as much less as keeps the move within `largest` times the
    larger of rms(x), rms(x_0) and 4 rms(last move), in root mean square (the first: a tenth of it, and at x_0 = 0 as
    `spectral`). Without a pair d is along -g_k, a tenth of the limit long, or four times as long as the last move where
    that met no positive curvature, up to rms(x_0). A trial whose value exceeds that of x_k by more than
    1e-4 <g_k, t d>, or is not finite, is withdrawn, and the next one has a quarter of its t; when t has fallen below
    1e-6 the pairs are dropped. Where two values agree to half the digits of the dtype (a lower solution is only so
    exact) the slopes decide: a trial is kept if its slope is at most 0.9998 of the one at x_k.

    For deterministic objectives without a projection: `update` needs `value=`, which `HypergradientDescent` and the
    lower solvers give. Under a projection take `spectral`.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd ed., algorithms 7.4 and 3.1; Hager, Zhang, "A New
    Conjugate Gradient Method with Guaranteed Descent and an Efficient Line Search", SIAM J. Optim. 2005 (the last
    rule).
    """

    def init(params: PyTree) -> QuasiNewtonState:
        dtype = jnp.result_type(float, *jax.tree.leaves(params))
        zero = optax.tree.zeros_like(params)
        pairs = jax.tree.map(lambda leaf: jnp.zeros((memory, *jnp.shape(leaf)), jnp.result_type(leaf)), params)
        nothing = jnp.zeros((), dtype)
        here, rho = jax.tree.map(jnp.asarray, params), jnp.zeros((memory,), dtype)
        count = jnp.zeros((), jnp.int32)
        return QuasiNewtonState(
            here, zero, nothing, zero, nothing, pairs, pairs, rho, count, nothing, jnp.asarray(True)
        )

    def update(gradient: PyTree, old: QuasiNewtonState, params: PyTree = None, *, value: Any = None, **_: Any) -> Any:
        if params is None or value is None:
            raise ValueError(
                "optimizers.quasi_newton needs update(gradient, state, params, value=value): the value decides whether "
                "a step is kept."
            )
        dtype = old.step.dtype
        value = jnp.asarray(value, dtype)
        dot = lambda a, b: jnp.asarray(derivatives.dot(a, b), dtype)  # noqa: E731
        first = old.count == 0
        moved = optax.tree.sub(params, old.x)
        slack = 8 * jnp.finfo(dtype).eps * jnp.abs(old.value)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
        slope = jnp.minimum(dot(old.gradient, moved), 0)
        decreased = value <= old.value + 1e-4 * slope + slack
        # Where values no longer tell points apart, slopes do: Hager and Zhang's approximate Wolfe condition.
        level = (value <= old.value + jnp.finfo(dtype).eps ** 0.5 * jnp.abs(old.value)) & (
            dot(gradient, moved) <= -0.9998 * slope
        )
        accepted = first | (finite & (decreased | level))
        choose = functools.partial(jax.tree.map, lambda new, kept: jnp.where(accepted, new, kept))
        x, g = choose(params, old.x), choose(gradient, old.gradient)

        z = optax.tree.sub(gradient, old.gradient)
        curvature = dot(moved, z)
        useful = accepted & ~first & (curvature > 1e-10 * jnp.sqrt(dot(moved, moved) * dot(z, z)))
        stuck = ~accepted & (old.step < 1e-6)
        push = functools.partial(jax.tree.map, lambda a, b: jnp.where(useful, jnp.roll(a, 1, 0).at[0].set(b), a))
        s_all, z_all = push(old.s, moved), push(old.z, z)
        rho = jnp.where(useful, jnp.roll(old.rho, 1).at[0].set(1 / jnp.where(useful, curvature, 1)), old.rho)
        rho = jnp.where(stuck, 0, rho)

        rms = functools.partial(_root_mean_square, dtype=dtype)
        unit = jnp.where(first, _first_unit(rms(x), rms(g), value), old.unit)
        limit = largest * _farthest(rms(x), rms(moved), unit, accepted)
        # Along a move without positive curvature the value falls the faster the further: the next one goes further, by
        # what the start is long, so that 200 moves down a value without a bound end at a number.
        unbent = accepted & ~first & (curvature <= 0)
        further = jnp.minimum(4 * rms(moved), largest * unit)
        length = jnp.maximum(0.1 * limit, jnp.where(unbent, further, 0))
        fallback = length / jnp.maximum(rms(g), _least_norm(dtype))
        d = _two_loop(g, s_all, z_all, rho, fallback, dot)
        downhill = dot(g, d) < 0
        d = jax.tree.map(lambda d, g: jnp.where(downhill, d, -fallback.astype(g.dtype) * g), d, g)
        fresh = accepted | stuck
        d = jax.tree.map(lambda new, kept: jnp.where(fresh, new, kept), d, old.direction)
        longest = jnp.minimum(1.0, limit / jnp.maximum(rms(d), _least_norm(dtype)))
        step = jnp.where(fresh, longest, 0.25 * old.step)
        updates = jax.tree.map(lambda new, now, d: (new - now) + step.astype(d.dtype) * d, x, params, d)
        updates = forward_only(updates, _NO_REVERSE)
        return updates, QuasiNewtonState(
            x, g, jnp.where(accepted, value, old.value), d, step, s_all, z_all, rho, old.count + 1, unit, accepted
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _two_loop(g: PyTree, s: PyTree, z: PyTree, rho: jax.Array, fallback: jax.Array, dot: Any) -> PyTree:
    """-H g by the two-loop recursion; pairs with rho = 0 are empty; without pairs -fallback g."""
    memory = rho.shape[0]
    pair = lambda tree, i: jax.tree.map(lambda a: a[i], tree)  # noqa: E731

    def backward(i: Any, carry: Any) -> Any:
        q, alpha = carry
        a = rho[i] * dot(pair(s, i), q)
        return optax.tree.cast_like(optax.tree.add_scale(q, -a, pair(z, i)), q), alpha.at[i].set(a)

    q, alpha = jax.lax.fori_loop(0, memory, backward, (g, jnp.zeros_like(rho)))
    newest = dot(pair(z, 0), pair(z, 0))
    scale = jnp.where(rho[0] > 0, 1 / jnp.where(rho[0] > 0, rho[0] * newest, 1), fallback)
    r = optax.tree.cast_like(optax.tree.scale(scale, q), g)

    def forward(j: Any, r: PyTree) -> PyTree:
        i = memory - 1 - j
        b = rho[i] * dot(pair(z, i), r)
        return optax.tree.cast_like(optax.tree.add_scale(r, alpha[i] - b, pair(s, i)), r)

    return optax.tree.scale(-1, jax.lax.fori_loop(0, memory, forward, r))
