"""Parts of y that are constants: `Problem(frozen=...)`, and step rules that never move a part of y.

A frozen part is cut off before any method sees the problem: y is what is left of it, and the losses, the sets and the
constraints put it together again. So hypergradients, residuals, multipliers and the certificate are those of the
problem in which that part is a constant, whichever method finds them; and what is returned is the whole of y again.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from bilevel.captures import Apart, form
from bilevel.constraints import depends
from bilevel.data import ProblemError
from bilevel.optimizers import as_optimizer, is_rule
from bilevel.typing import PyTree

__all__ = ["Cut", "Fixed", "Frozen", "as_frozen", "as_rule", "fixed_functions", "refuse_rule", "standing"]


class Frozen:
    """Which parts of y are constants, as it was given; compared by value, so that a `Problem` can be compiled with it.

    Args:
      given: a pytree of truth values shaped like y or like its upper part (True: constant), of which a leaf may be a
        boolean array shaped like y's; or a function y -> such a tree.
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        self._key: Any = given
        if not callable(given):
            leaves, structure = jax.tree.flatten(given)
            for leaf in leaves:
                _truth(leaf)
            self._key = structure, tuple((np.shape(leaf), np.asarray(leaf).tobytes()) for leaf in leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.given)

    def of(self, y: PyTree) -> list[np.ndarray]:
        """For each leaf of y a boolean array, of its shape or a scalar: what of it is constant.

        Raises:
          ProblemError: it does not fit y, or leaves nothing of y to be moved.
        """
        given = self.given(y) if callable(self.given) else self.given
        try:
            masks = jax.tree.leaves(
                jax.tree.map(lambda mask, part: [_truth(mask)] * len(jax.tree.leaves(part)), given, y)
            )
        except ValueError as error:
            raise ProblemError(
                f"Problem(frozen=...) does not fit y0: {str(error).splitlines()[0]} Give truth values in the form of "
                f"y0, {jax.tree.structure(y)}, or of its upper part, or a function y -> such a tree; True is constant."
            ) from None
        for (path, leaf), mask in zip(jax.tree_util.tree_leaves_with_path(y), masks, strict=True):
            if mask.ndim and mask.shape != np.shape(leaf):
                raise ProblemError(
                    f"Problem(frozen=...) has a mask of shape {list(mask.shape)} for y0{jax.tree_util.keystr(path)} of "
                    f"shape {list(np.shape(leaf))}: give True, False, or a boolean array of the same shape."
                )
        if all(mask.all() for mask in masks):
            raise ProblemError(
                "Problem(frozen=...) makes all of y0 constant, and leaves the lower level nothing to move: mark what "
                "stays with True and what is solved for with False."
            )
        return masks


def as_frozen(given: Any) -> Frozen | None:
    """A `Frozen` from itself, from what a user gives, and None from None."""
    return given if given is None or isinstance(given, Frozen) else Frozen(given)


def _truth(mask: Any) -> np.ndarray:
    if isinstance(mask, jax.core.Tracer) or np.asarray(mask).dtype != np.bool_:
        by_name = f" To name a part, give {{{mask!r}: True, ...}}." if isinstance(mask, str) else ""
        raise ProblemError(
            f"Problem(frozen=...) holds {mask!r}: its leaves are True (constant) and False, or boolean numpy arrays."
            f"{by_name}"
        )
    return np.asarray(mask)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How y is taken apart into what moves and what is constant, and put together again.

    Attributes:
      structure: of y.
      places: for each leaf None (it moves), or the places in it that move, none of them for a constant leaf.
      shapes: of y's leaves.
    """

    structure: Any
    places: tuple[tuple[int, ...] | None, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, frozen: Frozen, y: PyTree) -> Cut:
        """That of a mask at y."""
        leaves, structure = jax.tree.flatten(y)
        masks = frozen.of(y)
        full = (np.broadcast_to(mask, np.shape(leaf)) for mask, leaf in zip(masks, leaves, strict=True))
        places = tuple(tuple(np.flatnonzero(~mask).tolist()) if mask.any() else None for mask in full)
        return cls(structure, places, tuple(np.shape(leaf) for leaf in leaves))

    def free(self, y: PyTree) -> PyTree:
        """What moves: y with None for a constant leaf, and for one that is constant in part the vector of the rest."""
        parts = [
            leaf if at is None else jnp.reshape(leaf, -1)[np.asarray(at)] if at else None
            for leaf, at in zip(jax.tree.leaves(y), self.places, strict=True)
        ]
        return jax.tree.unflatten(self.structure, parts)

    def whole(self, free: PyTree, constants: list[Any]) -> PyTree:
        """y from what moves and from a y whose constant parts are right; stacked where what moves is."""
        moving = jax.tree.leaves(free)
        one = next(
            (
                shape if at is None else (len(at),)
                for at, shape in zip(self.places, self.shapes, strict=True)
                if at != ()
            )
        )
        if jnp.ndim(moving[0]) > len(one):
            return jax.vmap(lambda free: self.whole(free, constants))(free)
        parts, rest = [], iter(moving)
        for at, shape, constant in zip(self.places, self.shapes, constants, strict=True):
            if at is None:
                parts.append(next(rest))
            elif at:
                moved = next(rest)
                filled = jnp.reshape(constant, -1).astype(moved.dtype).at[np.asarray(at)].set(moved)
                parts.append(jnp.reshape(filled, shape))
            else:
                parts.append(constant)
        return jax.tree.unflatten(self.structure, parts)

    def constants(self, y: PyTree) -> list[Any]:
        """The leaves of y, with nothing for those that move."""
        return [None if at is None else leaf for at, leaf in zip(self.places, jax.tree.leaves(y), strict=True)]


class Fixed(Apart):
    """A function of y that is given what moves alone; the constants are leaves, and no constants of compiled code.

    Args:
      fn: the function of the whole y.
      cut: how y is taken apart.
      constants: the other parts.
      kind: "loss" for fn(x, y, ...), "set" for y -> y, "prox" for (x, y, scaling) -> y.
    """

    def __init__(self, fn: Callable[..., Any], cut: Cut, constants: list[Any], kind: str) -> None:
        self.fn, self.cut, self.constants, self.kind = fn, cut, constants, kind

    def __call__(self, *args: Any) -> Any:
        """The function's value."""
        place = 0 if self.kind == "set" else 1
        whole = self.cut.whole(args[place], self.constants)
        out = self.fn(*args[:place], whole, *args[place + 1 :])
        return out if self.kind == "loss" else self.cut.free(out)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.fn)

    def __repr__(self) -> str:
        return repr(self.fn)


def _flatten(fixed: Fixed) -> Any:
    apart = isinstance(fixed.fn, Apart)
    return (fixed.fn if apart else None, fixed.constants), (None if apart else fixed.fn, fixed.cut, fixed.kind)


def _unflatten(aux: Any, children: Any) -> Fixed:
    fn, cut, kind = aux
    return Fixed(children[0] if fn is None else fn, cut, children[1], kind)


jax.tree_util.register_pytree_node(Fixed, _flatten, _unflatten)


def fixed_functions(problem: Any, cut: Cut, x: PyTree, y: PyTree) -> dict[str, Any]:
    """The functions of a problem that take y, by name, of what moves alone.

    Raises:
      ProblemError: a projection or a prox ties what moves to what does not.
    """
    constants = cut.constants(y)
    kinds = {"project_lower": "set", "prox_lower": "prox"}
    names = ("upper", "lower", "constraint", "equality", "upper_constraint", "upper_equality", *kinds)
    found = {}
    for name in names:
        fn = getattr(problem, name)
        if fn is None:
            continue
        kind = kinds.get(name, "loss")
        if kind != "loss":
            call = fn if kind == "set" else (lambda y, fn=fn: fn(x, y, 1.0))
            others = [0.0 if leaf is None else leaf for leaf in constants]
            if depends(lambda others, free, call=call: cut.free(call(cut.whole(free, others))), others, cut.free(y)):
                raise ProblemError(
                    f"{name} ties the parts of y that move to those of Problem(frozen=...): its value at the one "
                    "depends on the other, and the projection on what is left is another function. State it for the "
                    "parts that move alone, or leave frozen out."
                )
        found[name] = Fixed(fn, cut, constants, kind)
    return found


# ---------------------------------------------------------------- rules that never move a part


def standing(rule: Any, variable: PyTree) -> list[str]:
    """The leaves of a variable that a step rule never moves, whatever the gradient: by name, "(in part)" behind some.

    Read off a trace of the rule's update, in which the entries that are zero by construction are followed (a mask, a
    zero step, zeros in the place of an update): certain where it says so, and nothing is computed.
    """
    if not is_rule(rule):
        return []
    leaves, treedef = jax.tree.flatten(variable)
    held: Any = form(rule)
    shapes = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    within = any(isinstance(leaf.value, jax.core.Tracer) for leaf in held.leaves)
    return list((_standing.__wrapped__ if within else _standing)(held, treedef, shapes))


@functools.lru_cache(maxsize=16)
def _standing(held: Any, treedef: Any, like: tuple[Any, ...]) -> tuple[str, ...]:
    """The same, read off one trace for all rules that hold the same and variables of these shapes."""
    rule = held.original
    variable = jax.tree.unflatten(treedef, itertools.starmap(jax.ShapeDtypeStruct, like))
    named = jax.tree_util.tree_leaves_with_path(variable)

    def update(gradient: PyTree, memory: PyTree, variable: PyTree) -> tuple[PyTree, PyTree]:
        extra = {"value": jnp.zeros(()), "grad": gradient, "value_fn": lambda _: jnp.zeros(())}
        return as_optimizer(rule).update(gradient, memory, variable, **extra)

    unknown = [_UNKNOWN] * len(named)
    try:
        begin, memory = jax.make_jaxpr(as_optimizer(rule).init, return_shape=True)(variable)
        closed, shapes = jax.make_jaxpr(update, return_shape=True)(variable, memory, variable)
        # Zero for ever is what begins as zero and is left so: a momentum of what a mask takes away, and no count.
        still, before = _zeros(begin, unknown), None
        while before is None or any((a != b).any() for a, b in zip(before, still, strict=True)):
            before, found = still, _zeros(closed, [*unknown, *still, *unknown])
            still = [a & b for a, b in zip(before, found[len(named) :], strict=True)]
    except Exception:  # what a rule of the user's own says to being traced is for its first step to say
        return ()
    if jax.tree.structure(shapes[0]) != jax.tree.structure(variable):  # type: ignore[operator,index]
        return ()
    found = found[: len(named)]
    pairs = [(f"y{jax.tree_util.keystr(path)}", zero) for (path, _), zero in zip(named, found, strict=True)]
    return tuple(name if zero.all() else f"{name} (in part)" for name, zero in pairs if zero.any())


def as_rule(solver: Any) -> Any:
    """The optax rule that a lower solver was given, wherever it stands in it; None where it has none."""
    while hasattr(solver, "solver"):  # lower.Relative
        solver = solver.solver
    return solver if is_rule(solver) else getattr(solver, "optimizer", None)


def refuse_rule(name: str, rule: Any, y: PyTree) -> None:
    """Raise a `ProblemError` where a rule never moves a part of y, and say how to make it a constant."""
    if not is_rule(rule) or not (parts := standing(rule, y)):
        return
    shown = ", ".join(parts[:5]) + (f" and {len(parts) - 5} more" if len(parts) > 5 else "")
    raise ProblemError(
        f"{name}'s lower step rule never moves {shown} (optax.masked, set_to_zero, freeze, a step of zero), and the "
        "lower level would be taken for one in all of y: its linear system, its residual and the certificate. State "
        "what is constant: Problem(..., frozen=mask), with True for the leaves of y that stay and False for others; "
        "the rule then needs no mask."
    )


_UNKNOWN: np.ndarray = np.asarray(False)
_KEEP = frozenset({
    "neg", "convert_element_type", "copy", "copy_p", "real", "abs", "sign", "sqrt", "cbrt", "tanh", "sin", "square",
    "reduce_precision", "stop_gradient", "optimization_barrier",
})  # fmt: skip


def _zeros(closed: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Which entries of each output are zero whatever the inputs are: arrays of their shapes, or scalars for all."""
    jaxpr = getattr(closed, "jaxpr", closed)
    known: dict[Any, np.ndarray] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=False):
        concrete = not isinstance(value, jax.core.Tracer) and hasattr(value, "dtype") and np.size(value) <= 10**7
        known[var] = np.asarray(np.asarray(value) == 0) if concrete else _UNKNOWN
    read = lambda v: np.asarray(np.asarray(v.val) == 0) if isinstance(v, Literal) else known.get(v, _UNKNOWN)  # noqa: E731
    for equation in jaxpr.eqns:
        args = [read(v) for v in equation.invars]
        out = _zero_of(equation, args)
        known.update(zip(equation.outvars, out, strict=True))
    return [np.broadcast_to(read(v), v.aval.shape) for v in jaxpr.outvars]


def _zero_of(equation: Any, args: list[np.ndarray]) -> list[np.ndarray]:
    name, params, unknown = equation.primitive.name, equation.params, [np.asarray(False)] * len(equation.outvars)
    shape = equation.outvars[0].aval.shape if equation.outvars else ()
    if not any(arg.any() for arg in args):
        return unknown
    if name in _KEEP and len(args) == len(equation.outvars):
        return args
    if name == "integer_pow":
        return args if params["y"] > 0 else unknown
    if name == "mul":
        return [args[0] | args[1]]
    if name == "div":
        return [args[0]]
    if name in ("add", "sub", "add_any", "max", "min"):
        return [args[0] & args[1]]
    if name == "select_n":
        return [np.logical_and.reduce(np.broadcast_arrays(*args[1:]))]
    if name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose"):
        if args[0].all():
            return [np.asarray(True)]
        if math.prod(shape) == args[0].size and name not in ("transpose", "broadcast_in_dim"):
            return [args[0].reshape(shape)]
        return unknown
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint") and inner:
        return _zeros(inner, args)
    if name == "cond":
        each = [_zeros(branch, args[1:]) for branch in params["branches"]]
        return [np.logical_and.reduce(np.broadcast_arrays(*outs)) for outs in zip(*each, strict=True)]
    return unknown
