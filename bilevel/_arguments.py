"""A call's arguments, taken apart so that a custom derivative sees every value that it can depend on.

Keyword arguments become positional ones (`bind`), leaves that are not arrays go around JAX (`Leaves`), and values that
functions capture from an enclosing transformation become arguments (`holds_tracer`, `hoisted`). A call that does not
fit a public function's signature is answered by a sentence (`explained`).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from bilevel.typing import PyTree

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

# Other libraries' words for ours, whole and in parts.
_WHOLE = {"learning_rate": "rule", "step_size": "rule", "random_state": "key", "batch_size": "size"}
_PARTS = {
    "rule": {"lr", "rate", "optimizer", "optimiser", "optim", "opt", "stepsize", "step", "alpha", "eta"},
    "steps": {"iterations", "iters", "iter", "maxiter", "niter", "epochs", "unroll"},
    "upper": {"outer", "meta", "leader"},
    "lower": {"inner", "child", "follower"},
    "tol": {"tolerance", "atol", "rtol", "eps", "epsilon"},
    "key": {"seed", "rng"},
    "progress": {"verbose", "bar"},
    "size": {"batchsize"},
    "solve": {"solver"},
    "evaluations": {"trials", "evals"},
    "folds": {"splits", "k"},
    "strength": {"lam", "lambda"},
    "total": {"sum"},
    "": {"max", "num", "n", "number", "fn", "fun", "func", "function"},
}
# Words that are arguments of something else here.
_ELSEWHERE = {
    "batch_size": "Batches are data: upper_data=data.Minibatches(arrays, size=64).",
    "shuffle": "Batches are drawn anew in each epoch, by the run's key.",
    "bounds": "Bounds are a set: project_upper=sets.Box(lower, upper), or project_lower=.",
    "method": "A method is a value, such as solvers.AID().",
    "steps": "Steps are the lower solver's, such as lower.GradientDescent(0.1, steps=10), or solve's.",
}
_OURS = {theirs: ours for ours, words in _PARTS.items() for theirs in words}


def explained(fn: F, of: str = "", method: bool = False) -> F:
    """The function, whose call with arguments that do not fit it is answered by a sentence: which, and what is meant.

    Costs nothing where the call fits.
    """

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise  # from within the function
            takes = signature(fn)
            parameters = list(takes.parameters.values())[method:] if takes else []
            said = _unfit(of or fn.__name__, parameters, args[method:], kwargs) if takes else ""
            if not said:
                raise
        raise TypeError(said)

    called.__explained__ = fn  # type: ignore[attr-defined]
    return called  # type: ignore[return-value]


def explained_class(cls: type[T]) -> type[T]:
    """Likewise for the class's constructor."""
    cls.__init__ = explained(cls.__init__, cls.__name__, method=True)  # type: ignore[misc, method-assign]
    return cls


def _unfit(name: str, parameters: list[inspect.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What of a call does not fit a function's parameters; nothing where that is not seen."""
    placed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    kinds = {p.kind for p in parameters}
    takes = f"It takes {', '.join(named)}." if named else "It takes no arguments."
    if inspect.Parameter.VAR_KEYWORD not in kinds and (unknown := [k for k in kwargs if k not in named]):
        given, meant = unknown[0], _meant(unknown[0], named)
        size = " (a number there is a step size)" if any(m.endswith("optimizer") for m in meant) else ""
        guess = f"; did you mean {' or '.join(f'{m}=' for m in meant)}{size}?" if meant else "."
        if given in _ELSEWHERE and not meant:
            guess += f" {_ELSEWHERE[given]}"
        return f"{name}({given}={_short(kwargs[given])}): there is no argument {given}={guess} {takes}"
    if len(args) > len(placed) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        extra = _short(args[len(placed)])
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in kwargs]
        rest = f"What follows goes by name: {by_name[0]}={extra}, ..." if by_name else takes
        most = f"{name} takes {len(placed)} arguments by their place"
        return f"{most} ({', '.join(placed)}), and {extra} is one more. {rest}"
    if twice := [p for p in placed[: len(args)] if p in kwargs]:
        return (
            f"{name} is given {twice[0]} twice: by its place, {_short(args[placed.index(twice[0])])}, and by its name."
        )
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name in named and p.name not in kwargs and p.name not in placed[: len(args)]
    ]
    if missing:
        call = ", ".join(p.name for p in parameters if p.default is p.empty and p.name in named)
        return f"{name} is not given {' and '.join(missing)}: call {name}({call}). {takes}"
    return ""


class Named:
    """What is taken apart by its attributes: another name, and unpacking as a tuple, are answered by a sentence."""

    if not TYPE_CHECKING:  # type checkers know the attributes

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            meant = _meant(name, self._public())
            guess = f"; did you mean {' or '.join(meant)}?" if meant else "."
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{guess} {self._has()}")

        def __iter__(self) -> Any:
            raise TypeError(f"{type(self).__name__} is no tuple: take it apart by name. {self._has()}")

    def _public(self) -> list[str]:
        return [name for name in dict.fromkeys([*vars(self), *dir(type(self))]) if not name.startswith("_")]

    def _has(self) -> str:
        return f"It has {', '.join(self._public())}."


def _meant(given: str, names: Sequence[str]) -> list[str]:
    """The arguments that a word of another library, or one that is misspelt, may stand for."""
    wanted, words = _words(given), {name: _words(name) for name in names}
    fit = {name: (len(wanted & has), -len(wanted ^ has)) for name, has in words.items() if wanted & has}
    best = [name for name in fit if fit[name] == max(fit.values())][:4]
    if (close := difflib.get_close_matches(given, names, 1, 0.8)) and not (best and words[best[0]] == wanted):
        return close
    short = [name for name in names if len(given) == 1 and name.startswith(given)]
    return best or (short if len(short) == 1 else difflib.get_close_matches(given, names, 1))


def _words(name: str) -> set[str]:
    for theirs, ours in _WHOLE.items():
        name = name.replace(theirs, ours)
    return {_OURS.get(word, word) for word in name.lower().split("_")} - {""}


def _short(value: Any) -> str:
    """A value in a word or two."""
    text = repr(value)
    return text if len(text) <= 30 and "\n" not in text else f"a {type(value).__name__}"


class Leaves:
    """A pytree of which the arrays and floats (`values`) go through JAX, and all other leaves around it."""

    def __init__(self, tree: PyTree):
        self.leaves, self.treedef = jax.tree.flatten(tree)
        array_like = (jax.Array, np.ndarray, np.number, float, complex)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, array_like)]
        self.values = [self.leaves[i] for i in self.places]

    def merge(self, values: Sequence[Any]) -> PyTree:
        """The pytree with other values in its dynamic leaves."""
        return jax.tree.unflatten(self.treedef, replaced(self.leaves, self.places, values))


def replaced(items: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """The items, with other values in some places."""
    items = list(items)
    for i, value in zip(places, values, strict=True):
        items[i] = value
    return items


def look(value: Any, name: str, default: Any = None) -> Any:
    """An attribute of someone's object; the default where there is none, whatever the object raises to say so.

    `__getattr__ = dict.__getitem__` raises a KeyError, which `getattr` and `hasattr` let through.
    """
    try:
        return getattr(value, name, default)
    except Exception:
        return default


def has(value: Any, name: str) -> bool:
    """Likewise, whether there is one."""
    return look(value, name, look) is not look


def signature(function: Callable[..., Any] | inspect.Signature) -> inspect.Signature | None:
    """How a function takes its arguments; None for a builtin, whose arguments are taken as they come."""
    if isinstance(function, inspect.Signature):
        return function
    with contextlib.suppress(TypeError, ValueError):
        return inspect.signature(look(function, "subfun", function))  # jaxopt's composite objectives have a subfun
    return None


def bind(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any], whose: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keyword arguments turned into positional ones where the signature says how; defaults filled in."""
    if signature is not None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"The arguments do not fit the signature {signature} of {whose}: {error}. Solver and optimality_fun "
                "must take the same arguments (the solution in place of the initial guess); pass reference_signature "
                "to say how they match."
            ) from None
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    if not args:
        raise TypeError(f"The initial guess is missing for {whose}. Pass it (or None) first: solver(init, *args).")
    return args, kwargs


def holds_tracer(root: Any) -> bool:
    """Whether a traced value is reachable from the closures of some functions."""
    pending, seen = [root], set[int]()
    while pending and len(seen) < 10_000:  # a bound on the time that a large object can take
        value = pending.pop()
        if isinstance(value, jax.core.Tracer):
            return True
        if id(value) not in seen:
            seen.add(id(value))
            pending.extend(_contents(value))
    return False


def _contents(value: Any) -> Iterator[Any]:
    if value is None or isinstance(value, (jax.Array, np.ndarray, str, bytes, int, float, type, types.ModuleType)):
        return
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        yield from value
    else:
        for cell in look(value, "__closure__") or ():
            with contextlib.suppress(ValueError):  # a cell that has not been filled yet
                yield cell.cell_contents
        for name in ("__wrapped__", "__self__", "__defaults__", "__kwdefaults__", "__dict__"):
            yield look(value, name)
        if isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)


def hoisted(
    call: Callable[..., Any],
    condition: Callable[..., PyTree],
    has_aux: bool,
    start_values: list[Any],
    values: list[Any],
) -> tuple[Callable[..., Any], Callable[..., PyTree], list[Any]]:
    """Make arguments of the values that the solver and the condition capture from an enclosing transformation.

    A custom derivative sees its arguments only: a captured value would have no derivative, or silently a zero one.
    Returns `call(start_values, values)`, `condition(sol, values)` and the values, longer by what was captured.
    """
    call, call_captured = jax.closure_convert(call, start_values, values)
    output = jax.eval_shape(call, start_values, values, *call_captured)
    blank = lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # noqa: E731  # takes no memory
    sol = jax.tree.map(blank, output[0] if has_aux else output)
    condition, condition_captured = jax.closure_convert(condition, sol, values)
    n, m = len(values), len(values) + len(call_captured)
    return (
        lambda start_values, values: call(start_values, values[:n], *values[n:m]),
        lambda sol, values: condition(sol, values[:n], *values[m:]),
        [*values, *call_captured, *condition_captured],
    )
