"""Which dtype and which parts of y a run computes in, and under which of JAX's settings: one answer for all solvers.

Variables of one dtype, float32 or float64, are computed with as they are. Half-precision leaves (bfloat16, float16) and
leaves of several dtypes have master copies in one working dtype, the widest of them and at least float32: solvers,
their optimisers and their linear algebra see that one alone, while each loss, constraint and metric is given every leaf
in the dtype that the user gave it, and so computes in the user's precision. Small steps are thus not lost to rounding,
and what is returned has the user's dtypes again. Likewise y is without its constant parts (`bilevel.frozen`), and whole
again in what is returned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import derivatives
from bilevel._convolutions import convolves
from bilevel._module import name_of, state
from bilevel._traces import equations, inner, of_function, reached, traffic
from bilevel.captures import Apart
from bilevel.data import as_source
from bilevel.frozen import Cut, fixed_functions
from bilevel.level import takes_batch
from bilevel.optimizers import is_rule, unfit
from bilevel.problem import Problem, ProblemError
from bilevel.typing import PyTree

__all__ = ["InGiven", "Working", "named", "undefined_at", "working"]

Dtypes = tuple[Any, ...]


class Working(NamedTuple):
    """A problem and its start in the working dtype.

    Attributes:
      problem: the problem; its functions take the master copies.
      x, y: the master copies of the start.
      dtypes: the user's dtypes of the leaves of x and of y; None where they are the working dtype itself.
      bytes: about what one evaluation of the losses and constraints on a batch computes, and all samples hold.
      convolves: a loss has convolutions.
      cut: how y lost its constant parts; None where it has none.
      constants: those parts.
    """

    problem: Problem
    x: PyTree
    y: PyTree
    dtypes: tuple[Dtypes, Dtypes] | None
    bytes: float
    convolves: bool
    cut: Cut | None = None
    constants: Any = ()

    @property
    def rounding(self) -> float:
        """The eps of the coarsest dtype that the losses are given: what they compute is no more exact than that."""
        leaves = (leaf for leaf in jax.tree.leaves((self.x, self.y)))
        dtypes = itertools.chain(*self.dtypes) if self.dtypes else map(jnp.result_type, leaves)
        return max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)

    @property
    def lifted(self) -> bool:
        """Whether a variable is another here than the user gave it: a leaf of another dtype, or y without constants."""
        here = jax.tree.leaves((self.x, self.y))[0].dtype  # one for all, where there are dtypes
        return self.cut is not None or (
            self.dtypes is not None and any(dtype != here for dtypes in self.dtypes for dtype in dtypes)
        )

    def given(self, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        """Master copies in the user's dtypes, y with its constant parts."""
        if self.cut is not None and jax.tree.structure(y) == jax.tree.structure(self.y):  # type: ignore[operator]
            y = self.cut.whole(y, self.constants)
        if self.dtypes is None:
            return x, y
        pairs = zip((x, y), self.dtypes, strict=True)
        return tuple(_as(tree, d) if len(jax.tree.leaves(tree)) == len(d) else tree for tree, d in pairs)

    def shown(self, state: Any) -> Any:
        """A solver's state whose x and y have the user's dtypes."""
        return InGiven(*self.given(state.x, state.y), state) if self.lifted else state


@state
class InGiven:
    """A solver's state as the user sees it: x and y as they were given, with constant parts; `master` is the state."""

    x: PyTree
    y: PyTree
    master: Any

    def __getattr__(self, name: str) -> Any:
        if name == "master" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.master, name)


def working(problem: Problem, x: PyTree, y: PyTree) -> Working:
    """The problem and the start as solvers see them; themselves where all of y moves and is, as x, of one dtype,
    float32 or float64.

    Raises:
      ProblemError: inside `shard_map` a loss or the start differs from device to device; `frozen` does not fit y.
    """
    found = _in_one_dtype(problem, x, y)
    if problem.frozen is None:
        return found
    cut = Cut.of(problem.frozen, found.y)
    if all(at is None for at in cut.places):
        return found._replace(problem=dataclasses.replace(found.problem, frozen=None))
    functions = fixed_functions(found.problem, cut, found.x, found.y)
    rest = dataclasses.replace(found.problem, frozen=None, **functions)
    return found._replace(problem=rest, y=cut.free(found.y), cut=cut, constants=cut.constants(found.y))


def _in_one_dtype(problem: Problem, x: PyTree, y: PyTree) -> Working:
    leaves = jax.tree.leaves((x, y))
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(jnp.float32, *(jnp.result_type(leaf) for leaf in leaves))
    outputs, own, computed, has_convolutions = _outputs(problem, x, y)
    _refuse_split(outputs, x, y)
    by_reverse = {name: ByReverse(getattr(problem, name), name) for name in own if not _forward(problem, name, x, y)}
    problem = dataclasses.replace(problem, **by_reverse) if by_reverse else problem
    if all(out.dtype == dtype for out in [*map(jnp.asarray, leaves), *itertools.chain(*outputs.values())]):
        return Working(problem, x, y, None, computed, has_convolutions)
    of = lambda tree: tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(tree))  # noqa: E731
    dtypes = of(x), of(y)
    cast = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, dtype))
    lifted: dict[str, Any] = {}
    for name in ("upper", "lower", "constraint", "equality", "upper_constraint", "upper_equality"):
        if (fn := getattr(problem, name)) is not None:
            lifted[name] = _InGiven(fn, dtypes[0], dtypes[1], dtype)
    masters = cast(x), cast(y)
    sets = (("project_upper", dtypes[0], masters[0]), ("project_lower", dtypes[1], masters[1]))
    for name, given, master in sets:
        fn = getattr(problem, name)
        if fn is not None and not _keeps(fn, master):
            lifted[name] = _Projection(fn, given, dtype)
    prox: Any = problem.prox_lower
    if prox is not None and not _keeps(lambda y: prox(masters[0], y, 1.0), masters[1]):
        lifted["prox_lower"] = _InGiven(prox, dtypes[0], dtypes[1], dtype)
    return Working(dataclasses.replace(problem, **lifted), *masters, dtypes, computed, has_convolutions)


@contextlib.contextmanager
def named(method: Any, problem: Problem, x: PyTree, y: PyTree) -> Iterator[None]:
    """What JAX says while a method is traced on a problem, as a sentence that names the level and the cure.

    What is wrong with the problem itself, where nobody has validated it, is said as `Problem.validate` says it.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        if isinstance(error, ProblemError):
            raise
        problem.validate(x, y)
        if isinstance(error, (TypeError, ValueError)) and (sentence := _translated(error, method, problem, x, y)):
            raise ProblemError(sentence) from error
        raise


def _translated(error: Exception, method: Any, problem: Problem, x: PyTree, y: PyTree) -> str:
    name = "a solver" if method is None else type(method).__name__
    what = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if "Reverse-mode differentiation does not work" in what:
        for level in ("upper", "lower"):
            if not _has_gradient(problem, level, x, y):
                return (
                    f"{level}, the {level} level's loss, has no derivative in reverse mode, which {name} takes: there "
                    "is a jax.lax.while_loop in it (or a fori_loop whose length is not known beforehand). Write "
                    "jax.lax.scan, or a fori_loop with a fixed number of steps; where the loop solves an equation, "
                    "bilevel.implicit.custom_root differentiates its solution."
                )
        return (
            f"{name} differentiates in reverse mode through a loop of no fixed length that is in the lower solver, a "
            "projection or a constraint. Give the lower level a rule with a number of steps (0.1, optax.adam), or take "
            "hypergradients.Implicit (solvers.AID), which does not differentiate through the solver."
        )
    blind = "Linearization failed" in what or "custom_vjp function" in what
    if blind and "has no second derivative" not in what:  # which says it already
        for level in ("upper", "lower"):
            if _has_own(problem, level, x, y):
                return (
                    f"{level}, the {level} level's loss, has a part with a custom_vjp (a kernel) that {name} does not "
                    f"get through twice ({what[:200]}): its backward pass has no derivative apart from its value. Give "
                    "that backward pass a custom_vjp of its own, take another implementation, or a method of first "
                    "derivatives alone (solvers.F2SA, solvers.PenaltyDescent, hypergradients.FirstOrder)."
                )
    for owner, field, rule in _rules(method):
        for variable, at in (("x", x), ("y", y)):
            if field.startswith("upper") == (variable == "x") and (wrong := unfit(rule, at)):
                return (
                    f"{name_of(owner)}({field}=...) does not fit {variable}: {wrong}. A step size is one number; a "
                    "rule for parts of a variable (optax.masked, optax.multi_transform) is given a tree like "
                    f"{variable}, or a function that makes one of it."
                )
    inside = any(isinstance(leaf, jax.core.Tracer) and _varying(leaf) for leaf in jax.tree.leaves(problem))
    if inside and ("varying" in str(error) or "{V:" in str(error)):
        # Some of JAX's own parts (its linear solves, linearised functions) do not keep the account.
        return (
            f"{name} does not pass shard_map's check of what differs from device to device ({what}). Leave shard_map "
            "out: put the data on all devices (jax.device_put with a NamedSharding along the samples) and call solve, "
            "or run under jit."
        )
    return ""


def _rules(method: Any) -> Iterator[tuple[Any, str, Any]]:
    """The step rules of a solver and of its lower solver, with whose they are and by which name."""
    for owner in (method, getattr(method, "lower_solver", None)):
        for field in ("upper_optimizer", "lower_optimizer", "optimizer"):
            rule = getattr(owner, field, None)
            if is_rule(rule) or isinstance(rule, jax.Array):
                yield owner, field, rule


def undefined_at(problem: Problem, x: PyTree, y: PyTree) -> str:
    """Which level's loss, or gradient, has no finite value at a start, in a sentence; "" where both have."""
    for name, level in zip(("upper", "lower"), problem.full_levels(), strict=True):
        value, gradients = jax.value_and_grad(level, (0, 1))(x, y)
        if not bool(jnp.isfinite(value)):
            return (
                f"{name}, the {name} level's loss, is {float(value)} at the start (x0, y0): start where it is defined, "
                "keep the variables there (project_upper, project_lower), or mend the loss (a small constant in a "
                "logarithm or a quotient)."
            )
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients)):
            return (
                f"{name}, the {name} level's loss, is {float(value):.6g} at the start (x0, y0), but has no finite "
                "gradient there (a root, a norm or a power at zero): start elsewhere, or put a small constant under it."
            )
    return ""


def _has_gradient(problem: Problem, level: str, x: PyTree, y: PyTree) -> bool:
    try:
        _traced(problem, level, lambda call, s: jax.grad(call, (0, 1))(x, y, s))
    except ValueError:
        return False
    return True


def _has_own(problem: Problem, level: str, x: PyTree, y: PyTree) -> bool:
    """Whether a loss has parts with a reverse mode of their own."""
    return _own(_traced(problem, level, lambda call, s: call(x, y, s)))


def _own(jaxpr: Any) -> bool:
    return any(e.primitive.name.startswith("custom_vjp") for e in equations(jaxpr))


def _forward(problem: Problem, level: str, x: PyTree, y: PyTree) -> bool:
    """Whether a loss's gradient has a derivative in forward mode: tried, in a trace alone."""
    try:
        both = lambda call, s: jax.jvp(lambda y: jax.grad(call, (0, 1))(x, y, s), (y,), (y,))  # noqa: E731
        traced = _traced(problem, level, both)
    except Exception:  # whatever a kernel without a derivative says
        return False
    # How JAX writes down the tangent of a custom_vjp; it raises its error when that is evaluated.
    return not any(equation.primitive.name == "custom_lin" or _torn(equation) for equation in equations(traced))


def _torn(equation: Any) -> bool:
    """Whether this is the tangent of a Pallas kernel some of whose operands have none: JAX 0.10 writes it down with
    more blocks than arrays, and fails where it is compiled or batched."""
    blocks = getattr(equation.params.get("grid_mapping"), "block_mappings", ())
    return len(blocks) > len(equation.invars) + len(equation.outvars)


def _traced(problem: Problem, level: str, ask: Callable[[Callable[..., Any], Any], Any]) -> Any:
    """The trace of a question about a level's loss, which is a function of (x, y, source)."""
    fn, source = getattr(problem, level), problem.sources[level == "lower"]
    call = (lambda x, y, s: fn(x, y, s.example())) if source.given else (lambda x, y, s: fn(x, y))
    return jax.make_jaxpr(lambda s: ask(call, s))(source).jaxpr


@dataclasses.dataclass(frozen=True)
class ByReverse(Apart):
    """A loss whose products are taken reverse over reverse (`derivatives.reverse_over_reverse`).

    Attributes:
      fn: the loss.
      level: "upper" or "lower".
    """

    fn: Callable[..., Any]
    level: str

    def __call__(self, *args: Any) -> Any:
        """The loss."""
        return derivatives.reverse_over_reverse(self.fn, f"{self.level}, the {self.level} level's loss,")(*args)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.fn)


jax.tree_util.register_pytree_node(
    ByReverse,
    lambda loss: ((loss.fn,), (None, loss.level)) if isinstance(loss.fn, Apart) else ((), (loss.fn, loss.level)),
    lambda aux, children: ByReverse((*children, aux[0])[0], aux[1]),  # type: ignore[arg-type]
)


def _outputs(problem: Problem, x: PyTree, y: PyTree) -> tuple[dict[str, list[Any]], list[str], float, bool]:
    """The leaves that each loss and constraint returns, by name, with shape, dtype and axes; the losses that have parts
    with a reverse mode of their own; `Working.bytes`, and `Working.convolves`."""
    upper, lower = problem.sources
    found: dict[str, list[Any]] = {}
    own: list[str] = []
    has_convolutions = False
    computed = float(
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((x, y, problem)) if isinstance(leaf, jax.Array))
    )
    for name in ("upper", "lower", "constraint", "equality", "upper_constraint", "upper_equality"):
        fn, source = getattr(problem, name), upper if name.startswith("upper") else lower
        if fn is None:
            continue
        if name not in ("upper", "lower") and not takes_batch(fn):
            source = as_source(None)
        traced, shapes = of_function(fn, x, y, source)
        _refuse_sums(name, traced.jaxpr, len(jax.tree.leaves((x, y))))
        found[name] = jax.tree.leaves(shapes)
        computed += traffic(traced.jaxpr)
        has_convolutions = has_convolutions or convolves(traced.jaxpr)
        if name in ("upper", "lower") and _own(traced.jaxpr):
            own.append(name)
    return found, own, computed, has_convolutions


# What goes from device to device inside shard_map and its relatives; the first two in one that keeps account of it.
_TRACKED = frozenset({"pvary", "psum_invariant", "all_gather_invariant"})
_COLLECTIVE = frozenset({
    "psum", "pmax", "pmin", "all_gather", "reduce_scatter", "psum_scatter", "all_to_all", "ppermute", "pbroadcast",
})  # fmt: skip


def _refuse_sums(name: str, jaxpr: Any, variables: int) -> None:
    """Refuse a mean over devices of what depends on x or y where JAX keeps no account of what devices share.

    There the derivative of a `pmean` in a shared x is each device's own and not the mean of theirs: every device would
    go its own way, without a word.
    """
    axes = _summed(jaxpr, [i < variables for i in range(len(jaxpr.invars))])
    if axes and not any(equation.primitive.name in _TRACKED for equation in equations(jaxpr)):
        raise ProblemError(
            f"{name} takes a mean, a sum or a copy over the devices of {', '.join(map(repr, sorted(axes)))} inside a "
            "shard_map with check_vma=False (or a pmap, or a vmap with axis_name), where its gradient in a shared x "
            "or y is each device's own and not that of the mean. Leave check_vma at True; or leave the transformation "
            "out: put the data on all devices (jax.device_put with a NamedSharding along the samples) and call solve, "
            "or run under jit."
        )


def _summed(jaxpr: Any, inputs: list[bool]) -> set[str]:
    """The named axes along which values that depend on the marked inputs are put together."""
    axes: set[str] = set()

    def visit(equation: Any) -> None:
        if equation.primitive.name == "shard_map":  # one in the loss itself is whole in itself
            return
        if equation.primitive.name in _COLLECTIVE:
            given = equation.params.get("axes", equation.params.get("axis_name", ()))
            given = given if isinstance(given, (tuple, list)) else (given,)
            axes.update(axis for axis in given if isinstance(axis, str))
        for body in inner(equation):
            reached(body, [True] * len(body.invars), visit)

    reached(jaxpr, inputs, visit)
    return axes


def _refuse_split(outputs: dict[str, list[Any]], x: PyTree, y: PyTree) -> None:
    """Refuse what differs from device to device under a `shard_map` that keeps account of it.

    The gradient in an x that all devices share would be the sum of theirs without a word, and no loop of a solver may
    carry what is shared into what is not.
    """
    parts = {**outputs, "x0": jax.tree.leaves(x), "y0": jax.tree.leaves(y)}
    for name, leaves in parts.items():
        axes = sorted({axis for leaf in leaves for axis in _varying(leaf)})
        if axes:
            along = ", ".join(map(repr, axes))
            what = f"{name} differs from device to device along {along}"
            mean = f"jax.lax.pmean(value, {axes[0]!r})" if len(axes) == 1 else f"jax.lax.pmean(value, ({along}))"
            raise ProblemError(
                f"Inside shard_map {what}. For one run on all devices' data let each loss return the mean over "
                f"them, {mean}, and give the same x0 and y0 to all; for a run of each device's own pass "
                "check_vma=False to shard_map."
            )


def _varying(leaf: Any) -> frozenset[str]:
    """The axes of an enclosing `shard_map` along which an array, or its shape, differs from device to device."""
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    axes = getattr(kind, "vma", None)  # jax before 0.10
    return frozenset(axes or getattr(getattr(kind, "manual_axis_type", None), "varying", None) or ())


def _as(tree: PyTree, dtypes: Dtypes) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jnp.asarray(a, d) for a, d in zip(leaves, dtypes, strict=True)])


def _all(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def _keeps(fn: Callable[[PyTree], PyTree], value: PyTree) -> bool:
    """Whether a projection takes the master copies and keeps their dtype."""
    try:
        out = jax.eval_shape(fn, value)
    except Exception:  # whatever a function of the user's says to another dtype
        return False
    return [leaf.dtype for leaf in jax.tree.leaves(out)] == [leaf.dtype for leaf in jax.tree.leaves(value)]


def given_dtypes(problem: Problem, x: PyTree, y: PyTree) -> tuple[str, str]:
    """The dtypes in which x and y were given to a run of this problem, which may have others there, in words."""
    wrapped = next((value for value in vars(problem).values() if isinstance(value, _InGiven)), None)
    of = lambda tree: [jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    both = (of(x), of(y)) if wrapped is None else (wrapped.x, wrapped.y)
    return tuple(", ".join(dict.fromkeys(jnp.dtype(d).name for d in dtypes)) for dtypes in both)  # type: ignore[return-value]


WRAPPED = ("_InGiven[", "_Projection[")
"""How the words for a function begin that takes x and y in the user's dtypes (`captures.described`)."""


@dataclasses.dataclass(frozen=True)
class _InGiven:
    """A function of (x, y[, batch]), or a prox, that is given x and y in the user's dtypes and answers in the working
    one."""

    fn: Callable[..., PyTree]
    x: Dtypes
    y: Dtypes
    dtype: Any

    def __call__(self, x: PyTree, y: PyTree, *more: PyTree) -> PyTree:
        return _all(self.fn(_as(x, self.x), _as(y, self.y), *more), self.dtype)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.fn)


@dataclasses.dataclass(frozen=True)
class _Projection:
    """A projection that takes the user's dtypes alone."""

    fn: Callable[[PyTree], PyTree]
    given: Dtypes
    dtype: Any

    def __call__(self, z: PyTree) -> PyTree:
        return _all(self.fn(_as(z, self.given)), self.dtype)
