"""The statement of a bilevel problem."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import explained_class, has, look
from bilevel._pickling import storable
from bilevel._traces import Outlines, of_losses, traffic
from bilevel.captures import Functions, generator_state, host_generators, taken
from bilevel.data import ProblemError, Source, as_arrays, as_source, warn_of_one_object
from bilevel.frozen import as_frozen
from bilevel.keys import Draw, StepKey, as_step_key
from bilevel.level import Level, Levels, takes_batch
from bilevel.sets import Set
from bilevel.typing import PyTree, Scalar, X, Y

__all__ = ["Problem"]

ROWS = ("constraint", "equality", "upper_constraint", "upper_equality")
_DATA = ("upper_data", "lower_data")
_SETS = ": a set such as sets.Box(lower, upper) or sets.Simplex(), or a function z -> z"
_FUNCTIONS = ("upper", "lower", "project_upper", "project_lower", "prox_lower", *ROWS)


@explained_class
@storable
@dataclasses.dataclass(frozen=True)
class Problem(Generic[X, Y]):
    """The bilevel problem

        min over x in X   F(x, y*(x))
        subject to   G(x, y*(x)) <= 0,  H(x, y*(x)) = 0,
                     y*(x) in argmin over y in Y of f(x, y)   subject to   g(x, y) <= 0,  h(x, y) = 0.

    A `Problem` is a pytree: its functions are static, its data are leaves. Data are thus arguments of a compiled step
    and never constants in it, and `jax.vmap` over a problem whose data have a leading axis is many problems. What its
    functions capture (numbers and arrays from closures, globals and attributes) are leaves too in `solve`, by
    `captured`: changed between two calls, they have their new values in the second one. What a package written in C
    remembers, and how far an iterator has come, is not seen.

    Args:
      upper: the upper loss F, `F(x, y)`, or `F(x, y, batch)` where `upper_data` is given; returns a scalar.
      lower: the lower loss f, `f(x, y)`, or `f(x, y, batch)` where `lower_data` is given; returns a scalar.
      upper_data, lower_data: a pytree of arrays with a leading sample axis (full batches), or a `data.Source`:
        `data.Minibatches`, `data.Sampler`, `data.Stream`, `data.Clients`, `data.Agents`, or a class of your own.
      project_upper: `x -> x`, the projection on X.
      project_lower: `y -> y`, the projection on Y.
      prox_lower: `(x, y, scaling) -> y`, the proximal operator of a nonsmooth term r(x, y) that is added to f:
        argmin over u of |u - y|^2 / 2 + scaling r(x, u).
      constraint: the coupled inequality g of the lower level, `g(x, y)`, a pytree of arrays asked to be <= 0. Where
        `lower_data` is given it may take the lower level's batch too: `g(x, y, batch)`.
      equality: the coupled equality h of the lower level, likewise: `h(x, y)` or `h(x, y, batch)`, asked to be 0.
      upper_constraint: the inequality G of the upper level, in x alone or coupled with y: `G(x, y)`, a pytree of arrays
        asked to be <= 0, or `G(x, y, batch)` with the upper level's batch where `upper_data` is given. It binds the
        choice of x, never that of y: the lower level does not see it.
      upper_equality: the equality H of the upper level, likewise, asked to be 0.
      frozen: which parts of y are constants, equal to y0's: a pytree of truth values shaped like y or its upper part
        (True: constant; boolean numpy arrays for parts of a leaf), or a function y -> such a tree. Every method, and
        the certificate, then solves the problem in the rest of y: a step rule needs no mask, and a pretrained part no
        gradient.

    Both variables are arbitrary pytrees of floating-point arrays. With `x0=None` the problem is a *simple* bilevel
    problem: both levels own y.
    """

    upper: Callable[[X, Y], Scalar] | Callable[[X, Y, Any], Scalar]
    lower: Callable[[X, Y], Scalar] | Callable[[X, Y, Any], Scalar]
    upper_data: Any = None
    lower_data: Any = None
    project_upper: Callable[[X], X] | None = None
    project_lower: Callable[[Y], Y] | None = None
    prox_lower: Callable[..., Y] | None = None
    constraint: Callable[..., PyTree] | None = None
    equality: Callable[..., PyTree] | None = None
    upper_constraint: Callable[..., PyTree] | None = None
    upper_equality: Callable[..., PyTree] | None = None
    frozen: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "frozen", as_frozen(self.frozen))
        for name in _FUNCTIONS:
            fn = getattr(self, name)
            if fn is None and name not in ("upper", "lower"):
                continue
            if not callable(fn):
                cure = _SETS if name.startswith("project") else ""
                raise ProblemError(f"Problem({name}=...) takes a function, not {type(fn).__name__}{cure}.")
            if isinstance(fn, type):
                ours = fn.__module__.split(".")[:2]
                made = f"{'.'.join(ours[1:] if ours[0] == 'bilevel' else ours)}.{fn.__name__}(...)"
                raise ProblemError(f"Problem({name}=...) was given the class {fn.__name__}: make one of it, {made}.")
            try:
                hash(fn)
            except TypeError:
                raise ProblemError(
                    f"Problem({name}=...): the function is not hashable, so compiled code could not be reused. "
                    "Wrap it in a plain function (def or lambda)."
                ) from None

        for name in ("upper_data", "lower_data"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, Source):
                object.__setattr__(self, name, as_arrays(given, name))
        warn_of_one_object(self.upper_data, self.lower_data)

    def captured(self, x: X, y: Y) -> Problem[X, Y]:
        """The same problem with what its functions capture as it is now; see `bilevel.captures`.

        Numbers and arrays from closures, globals and attributes become leaves of the problem beside its data where the
        functions can be traced so, and compiled code that takes the problem is never that of other values.
        """
        upper, lower = self.sources
        found: dict[str, Any] = {}
        for name in _FUNCTIONS:
            fn, source = getattr(self, name), upper if name.startswith("upper") else lower
            batch = (source,) if source.given and (name in ("upper", "lower") or takes_batch(fn)) else ()
            args: Any = {"project_upper": (x,), "project_lower": (y,), "prox_lower": (x, y, 1.0)}.get(name, (x, y))
            try:
                args += tuple(source.shapes() for source in batch)
            except Exception:  # `validate` says what is wrong with it
                args = None
            found[name] = taken(fn, args)
        for name, source in zip(_DATA, (upper, lower), strict=True):
            if getattr(self, name) is not None:
                found[name] = source.captured()
        return dataclasses.replace(self, **found)

    @property
    def sources(self) -> tuple[Source, Source]:
        """The sources of the upper and the lower level's data."""
        return as_source(self.upper_data), as_source(self.lower_data)

    def _unbound(self, key: Any, who: Any = None) -> Levels:
        key, (upper, lower) = as_step_key(key), self.sources
        return Levels(
            Level(
                self.upper,
                upper,
                key.fold_in(Draw.UPPER),
                project=self.project_upper,
                inequality=self.upper_constraint,
                equation=self.upper_equality,
                who=who,
            ),
            Level(
                self.lower,
                lower,
                key.fold_in(Draw.LOWER),
                project=self.project_lower,
                prox=self.prox_lower,
                inequality=self.constraint,
                equation=self.equality,
                who=who,
            ),
        )

    def levels(self, key: Any, who: Literal["all"] | jax.Array | None = None) -> Levels:
        """Both levels, each with the batch of this key bound: functions of (x, y).

        Args:
          key: a `StepKey`, a PRNG key or a seed.
          who: None: one upper and one lower level on pooled data. "all", or an array of indices: levels that are many,
            stacked over agents or clients; see `Level`.
        """
        return Levels(*(level.drawn() for level in self._unbound(key, who)))

    def draw_upper(self, key: Any) -> Level:
        """The upper level alone, with the batch of this key bound."""
        return self._unbound(key).upper.drawn()

    def draw_lower(self, key: Any) -> Level:
        """The lower level alone, with the batch of this key bound."""
        return self._unbound(key).lower.drawn()

    def full_levels(self, key: Any = 0) -> Levels:
        """Both levels on all their samples (one draw where the data are a sampler's); `key`: for data that carry it."""
        return Levels(*(level.full() for level in self._unbound(key)))

    def full_upper(self) -> Level:
        """The upper level alone, on all its samples."""
        return self._unbound(0).upper.full()

    def full_lower(self) -> Level:
        """The lower level alone, on all its samples."""
        return self._unbound(0).lower.full()

    @property
    def stochastic(self) -> bool:
        """Whether a level's samples differ from step to step."""
        return any(source.random for source in self.sources)

    def whole(self) -> Problem[X, Y] | None:
        """The same problem on full batches; None where samples have no end or batches carry more than samples."""
        upper, lower = (source.whole() for source in self.sources)
        if upper is None or lower is None:
            return None
        return dataclasses.replace(self, upper_data=upper, lower_data=lower)

    def pass_bytes(self, x: X, y: Y) -> float:
        """About what one evaluation of both losses on all samples reads and writes, from their traces: the samples, and
        all that is computed on the way. Infinite where there is no end of samples, or a loss takes no full batch."""
        if any(source.host or (source.count is None and source.random) for source in self.sources):
            return math.inf
        samples = sum(leaf.size * leaf.dtype.itemsize for s in self.sources for leaf in jax.tree.leaves(s.arrays))
        try:
            return samples + sum(map(traffic, of_losses(self, x, y)))
        except (TypeError, ValueError, IndexError):  # batches of one size alone
            return math.inf

    def projected(self, x: X, y: Y) -> tuple[X, Y]:
        """x projected on X and y on Y: where a run from (x, y) begins, whoever solves it.

        A start outside a set would stand at its wrong side until the first step moves it, and where F is stationary
        outside, no step does. Coupled constraints are not treated here: a method that projects on them does so itself.
        """
        if self.project_upper is not None and jax.tree.leaves(x):
            x = self.project_upper(x)
        return x, y if self.project_lower is None else self.project_lower(y)

    def validate(self, x: PyTree, y: PyTree) -> None:
        """Raise a `ProblemError` that names what is wrong with the problem at (x, y) and the cure, before any compile.

        Checks the variables (floating, finite), the data (sample axes, finite), the losses (scalar, floating), the
        projections and the constraints (structure, shapes, dtypes).
        """
        self._validate_values(x, y)
        self._validate_functions(x, y)

    def validated(self, x: X, y: Y) -> Problem[X, Y]:
        """`captured`, after `validate`. Functions that were found right once are not traced again for other numbers."""
        self._validate_values(x, y)
        captured = self.captured(x, y)
        functions = [fn for name in _FUNCTIONS if (fn := getattr(captured, name)) is not None]
        whole = all(getattr(fn, "whole", False) for fn in functions)
        if not (whole and _VALID.have((captured, x, y))):
            self._validate_functions(x, y)
            if whole:
                _VALID.add((captured, x, y))
        return captured

    def _validate_values(self, x: PyTree, y: PyTree) -> None:
        _check_variable("x0", x)
        if not jax.tree.leaves(y):
            raise ProblemError(
                "y0 holds no arrays: the lower variable is a pytree with at least one floating-point array."
            )
        _check_variable("y0", y)
        if self.frozen is not None:
            self.frozen.of(y)
        upper, lower = self.sources
        _check_data("upper_data", upper)
        _check_data("lower_data", lower)
        _check_parties(upper, lower)
        _check_places(self, x, y)

    def _validate_functions(self, x: PyTree, y: PyTree) -> None:
        upper, lower = self.sources
        _check_loss("upper", self.upper, upper, x, y)
        _check_loss("lower", self.lower, lower, x, y)
        if self.project_upper is not None:
            _check_same("project_upper", "x0", self.project_upper, x)
        if self.project_lower is not None:
            _check_same("project_lower", "y0", self.project_lower, y)
        if self.prox_lower is not None:
            prox = self.prox_lower
            _check_prox_order(prox, x, y)
            _check_same("prox_lower", "y0", lambda y: prox(x, y, 1.0), y, whose=prox)
        for name in ROWS:
            fn, source = getattr(self, name), upper if name.startswith("upper") else lower
            if fn is not None:
                out = _shapes_on(name, fn, source if takes_batch(fn) else as_source(None), x, y)
                if not jax.tree.leaves(out):
                    raise ProblemError(
                        f"{name}(x, y) returned no arrays; return the constraint's values as an array or a pytree of "
                        "arrays."
                    )
                if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(out)):
                    raise ProblemError(
                        f"{name}(x, y) returned {jax.tree.leaves(out)[0].dtype}, not floating-point values: return "
                        "what is to be compared with 0, such as y - 1 for y <= 1, and not the comparison."
                    )


_VALID = Outlines()


def _flatten(problem: Problem) -> tuple[Any, Any]:
    """Leaves: the data, and what functions that were taken apart capture."""
    children = [(name, getattr(problem, name)) for name in _DATA]
    apart, others = Functions({name: getattr(problem, name) for name in _FUNCTIONS}).split()
    children += apart.items()
    return tuple((jax.tree_util.GetAttrKey(name), child) for name, child in children), (
        tuple(apart),
        (*others, ("frozen", problem.frozen)),
    )


def _unflatten(aux: Any, children: Any) -> Problem:
    apart, others = aux
    problem = object.__new__(Problem)
    vars(problem).update(zip((*_DATA, *apart), children, strict=True), **dict(others))
    return problem


jax.tree_util.register_pytree_with_keys(Problem, _flatten, _unflatten)


def _shapes_on(name: str, fn: Callable[..., PyTree], source: Source, x: PyTree, y: PyTree) -> PyTree:
    """The shapes of fn(x, y), or of fn(x, y, batch) where there are data."""
    if not source.given:
        return _shapes(name, "(x, y)", fn, x, y)
    words = _drawn(f"{'upper' if name.startswith('upper') else 'lower'}_data", source)
    called = lambda x, y, source: fn(x, y, source.example())  # noqa: E731
    return _shapes(name, "(x, y, batch)", called, x, y, source, whose=fn, words=words)


def _drawn(name: str, source: Source) -> PyTree:
    """A batch in words, dtypes and shapes; an error of the draw is the data's and not the loss's."""
    drawing = source
    while isinstance(inside := getattr(drawing, "source", None), Source):
        drawing = inside
    try:
        with _no_draws_on_the_host(name, getattr(drawing, "fn", None)):
            found = source.shapes()
    except ProblemError:
        raise
    except Exception as error:
        called = ""
        if isinstance(error, TypeError) and "positional argument" in str(error) and hasattr(source, "fn"):
            called = " (a Sampler's function is called as fn(key, arrays) and returns a batch)"
        elif isinstance(error, _CONCRETE):
            called = " (a batch is drawn in compiled code: jax.random and jnp in the place of numpy)"
        raise ProblemError(
            f"{name}, {source!r}, fails as a batch is drawn: {type(error).__name__}: "
            f"{str(error).split(_DETAILS)[0].strip()[:400]}{called}"
        ) from error
    if not jax.tree.leaves(found):
        raise ProblemError(f"{name}, {source!r}, draws a batch without arrays: its function has to return the batch.")
    return _in_words(found)


def _check_loss(name: str, fn: Callable[..., Scalar], source: Source, x: PyTree, y: PyTree) -> None:
    out = _shapes_on(name, fn, source, x, y)
    leaves = jax.tree.leaves(out)
    if len(leaves) == 1 and leaves[0].shape == () and leaves[0] is not out:
        raise ProblemError(
            f"{name} returned its value in a {type(out).__name__}; a loss is one scalar: return the value itself."
        )
    if len(leaves) != 1 or leaves[0].shape != ():
        if len(leaves) > 1 and leaves[0].shape == ():
            raise ProblemError(
                f"{name} returned {len(leaves)} values; a loss is one scalar, without aux: return it alone, and give "
                "what else you want to see as metrics={'name': function of (x, y)}."
            )
        got = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "nothing"
        raise ProblemError(
            f"{name}(x, y{', batch' if source.given else ''}) returned {got}; a loss is one scalar. Take a mean or a "
            "sum."
        )
    if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        raise ProblemError(f"{name} returned the dtype {leaves[0].dtype}; a loss is a floating-point scalar.")


def _check_places(problem: Problem, x: PyTree, y: PyTree) -> None:
    """A sentence where arrays were put on different devices, which no compiled programme takes together."""
    first: tuple[str, Any] | None = None
    for owner, tree in (("y0", y), ("x0", x), ("", problem)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(leaf, jax.core.Tracer) or not look(leaf, "committed", False):
                continue
            name, devices = owner + jax.tree_util.keystr(path).removeprefix("." if not owner else ""), leaf.sharding
            first = first or (name, devices)
            if devices.device_set != first[1].device_set:
                there, here = (
                    ", ".join(str(d.id) for d in sorted(s.device_set, key=lambda d: d.id)) for s in (first[1], devices)
                )
                raise ProblemError(
                    f"{first[0]} was put on the devices {there} and {name} on {here}: a programme runs over one set of "
                    "devices. Put x0, y0 and the problem on one mesh (distributed.place), or leave out what is to go "
                    "where the others lie."
                )


def as_variable(name: str, tree: PyTree) -> PyTree:
    """Arrays of its own for each leaf, so that a solver never touches the caller's."""

    def convert(path: Any, leaf: Any) -> jax.Array:
        where, kind = f"{name}{jax.tree_util.keystr(path)}", type(leaf).__name__
        numbers = isinstance(leaf, (bool, int, np.integer))
        if type(leaf).__module__.split(".")[0] == "bilevel":
            raise ProblemError(f"{where} is a {kind}: the order is solve(problem, x0, y0, solver).")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ProblemError(
                f"{where} is a shape without numbers ({kind}): a run starts at values, such as jnp.zeros({leaf.shape})."
            )
        _check_there(where, leaf)
        if numbers or (not has(leaf, "dtype") and not isinstance(leaf, (float, list, tuple))):
            _refuse_kind(where, leaf)
        extended = has(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        if getattr(look(leaf, "dtype"), "kind", "") in "OUS" and has(leaf, "dtype") and not extended:
            raise ProblemError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {leaf.dtype} (an array of Python objects or text): "
                "variables are floating-point arrays; give one leaf an array of numbers each."
            )
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            # A copy for which nothing is compiled; what no device was named for goes where the others lie. A weak type
            # would be lost on the way, and with it the compiled loop.
            of = np.asarray(leaf) if leaf.weak_type and leaf.is_fully_addressable else leaf
            return jax.device_put(of, leaf.sharding if leaf.committed else None, may_alias=False)
        return jnp.array(np.asarray(leaf, jnp.result_type(leaf)) if isinstance(leaf, float) else leaf, copy=True)

    _refuse_modules(name, tree)
    if getattr(type(tree), "__bilevel_hyperparameters__", False) or isinstance(tree, Problem):
        raise ProblemError(f"{name} is a {type(tree).__name__}: the order is solve(problem, x0, y0, solver).")
    _refuse_lists(name, tree)
    return jax.tree_util.tree_map_with_path(convert, tree)


def _refuse_lists(name: str, tree: PyTree) -> None:
    """A sentence where a list of numbers stands for an array."""

    def of_numbers(node: Any) -> bool:
        return isinstance(node, list) and bool(node) and all(isinstance(a, (int, float)) or of_numbers(a) for a in node)

    lists = jax.tree_util.tree_leaves_with_path(tree, is_leaf=of_numbers)
    for path, node in lists:
        if of_numbers(node):
            raise ProblemError(
                f"{name}{jax.tree_util.keystr(path)} is a list of numbers, which JAX takes for as many arrays as it "
                "has numbers: write jnp.asarray([...], float) for one array, or a dict of arrays (one leaf each)."
            )


def as_given(name: str, tree: PyTree) -> PyTree:
    """A variable of a function that stands under transformations: its leaves as arrays, which may be traced.

    Raises:
      ProblemError: it is no tree of floating-point arrays, so that its gradient would be none.
    """
    _refuse_modules(name, tree)
    _refuse_lists(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        _check_floating(f"{name}{jax.tree_util.keystr(path)}", leaf)
    return jax.tree.map(jnp.asarray, tree)


def _refuse_kind(where: str, leaf: Any) -> None:
    """A sentence where a leaf of a variable is no array."""
    kind, cure = type(leaf).__name__, f"write jnp.asarray({leaf!r}, float)"
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        cure = (
            f"register its class, jax.tree_util.register_dataclass({kind}), so that JAX takes it apart, or give a dict "
            "of arrays"
        )
    elif isinstance(leaf, dict):
        cure = f"JAX does not take apart a dictionary of this class, write dict({where})"
    elif callable(leaf):
        cure = "call it, and give what it returns, or give arrays"
    elif has(leaf, "to_numpy"):
        cure = f"write jnp.asarray({where}.to_numpy(), float)"
    elif not _is_numeric(leaf):
        cure = "give an array, or a dict of arrays"
    raise ProblemError(f"{where} is of type {kind}; variables are floating-point arrays: {cure}.")


def _is_numeric(leaf: Any) -> bool:
    """Whether numpy makes floats of it."""
    try:
        np.asarray(leaf, float)
    except Exception:  # whatever an object of someone's own raises
        return False
    return True


def _check_there(where: str, leaf: Any) -> None:
    """A sentence where an array's memory has been taken."""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
        raise ProblemError(
            f"{where} has been deleted: it was given away to a compiled function (donate_argnums), or its delete() was "
            "called. Give an array that is still there, or a copy that was made before."
        )


def _check_floating(where: str, leaf: Any) -> None:
    _check_there(where, leaf)
    if not has(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
        _refuse_kind(where, leaf)
    if type(leaf).__module__.split(".")[0] == "bilevel":
        raise ProblemError(f"{where} is a {type(leaf).__name__}, and variables are floating-point arrays.")
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ProblemError(f"{where} is a PRNG key, which no gradient moves: put it into the data, or take data.Keyed.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ProblemError(
            f"{where} has dtype {dtype}; variables are floating-point (gradients are taken in them): "
            f"write jnp.asarray({where}, float)."
        )


_MODULES = {  # of what library, by the module that defines the class; how its parameters are had
    ("flax.nnx", "Module"): "{name}, apply = bilevel.integrations.flax.from_nnx(module), and call apply({short}, ...)",
    ("flax.linen", "Module"): (
        "{name}, apply = bilevel.integrations.flax.from_linen(module, module.init(key, inputs)), and call "
        "apply({short}, ...)"
    ),
    (
        "equinox",
        "Module",
    ): "{name}, apply = bilevel.integrations.equinox.from_equinox(module), and call apply({short}, ...)",
    ("torch.nn", "Module"): (
        "bilevel differentiates by JAX: write the model in Flax or Equinox, or as a function of a dictionary of "
        "arrays, {{n: jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}}"
    ),
}


def _cure_of_module(node: Any) -> str | None:
    """How the parameters of a network library's module are had; None where this is none."""
    for base in type(node).__mro__:
        for (home, named), cure in _MODULES.items():
            if base.__name__ == named and f"{base.__module__}.".startswith(f"{home}."):
                return cure
    return None


def _refuse_modules(name: str, tree: PyTree) -> None:
    """A sentence where a variable is a module of a network library, or its variables of several kinds, and no tree of
    parameters. An Equinox module of nothing but arrays is one."""

    def module(node: Any) -> bool:
        cure = _cure_of_module(node)
        return cure is not None and not (
            cure is _MODULES["equinox", "Module"]
            and all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(node))
        )

    def kind(node: Any) -> str | None:
        bases = (base.__name__ for base in type(node).__mro__ if base.__module__.startswith("flax.nnx"))
        return next((name for name in bases if name in ("BatchStat", "RngState")), None)

    stop = lambda node: module(node) or kind(node) is not None  # noqa: E731
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if module(node):
            cure = (_cure_of_module(node) or "").format(name=name, short=name[0])
            raise ProblemError(
                f"{where} is a module ({type(node).__name__}), and variables are pytrees of arrays: {cure}."
            )
        if kind(node) is not None:
            cure = _MODULES["flax.nnx", "Module"].format(name=name, short=name[0])
            raise ProblemError(f"{where} is a {kind(node)}, which no gradient may move. Take the parameters: {cure}.")
    if hasattr(tree, "keys") and "params" in tree and len(tree.keys()) > 1 and "batch_stats" in tree:
        raise ProblemError(
            f"{name} holds a module's running statistics ('batch_stats') beside its parameters, and no gradient may "
            f"move those: {name}, apply = bilevel.integrations.flax.from_linen(module, variables)."
        )


def _check_variable(name: str, tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = f"{name}{jax.tree_util.keystr(path)}"
        _check_floating(where, leaf)
        if not isinstance(leaf, jax.core.Tracer) and not _all_finite(leaf):
            raise ProblemError(f"{where} is not finite (a NaN or an infinity): start from finite values.")


def _all_finite(leaf: Any) -> bool:
    """Whether there is no NaN and no infinity; looked at where the numbers are, on a CPU without compiling anything."""
    here = not isinstance(leaf, jax.Array) or (
        leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices())
    )
    return bool(np.isfinite(np.asarray(leaf)).all() if here else jnp.isfinite(leaf).all())


def check_problem(owner: str, problem: Any, call: str) -> None:
    """Raise a sentence where this is no problem; `call` says how it is given."""
    if not isinstance(problem, Problem):
        raise TypeError(f"{owner} takes a Problem first, not a {type(problem).__name__}: {call}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(problem):
        _check_there(jax.tree_util.keystr(path).removeprefix("."), leaf)


def _check_data(name: str, source: Source) -> None:
    source.check(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(source.arrays):
        if isinstance(leaf, jax.core.Tracer):
            continue
        dtype = look(leaf, "dtype")
        where = f"{name}{jax.tree_util.keystr(path)}"
        if dtype is None:
            raise ProblemError(f"{where} is of type {type(leaf).__name__}, not an array: wrap it with numpy.asarray.")
        if getattr(dtype, "kind", "") in "OUSMm" and not jnp.issubdtype(dtype, jax.dtypes.extended):
            raise ProblemError(f"{where} has dtype {dtype}: encode it as numbers.")
        if jnp.issubdtype(dtype, jnp.floating) and not _all_finite(leaf):
            raise ProblemError(f"{where} holds a NaN or an infinity: remove or fill those samples first.")


def _check_parties(upper: Source, lower: Source) -> None:
    if None not in (upper.parties, lower.parties) and upper.parties != lower.parties:
        what = upper.owners
        raise ProblemError(
            f"upper_data has {upper.parties} {what}s and lower_data {lower.parties}: one data set per {what} in each "
            "level."
        )


def _shapes(
    name: str, signature: str, fn: Callable[..., Any], *args: Any, whose: Any = None, words: PyTree = None
) -> PyTree:
    """The shapes of fn(*args); `whose`: the user's function within fn, `words`: of the last argument, for errors."""
    try:
        with _no_draws_on_the_host(name, whose or fn):
            return jax.eval_shape(fn, *args)
    except ProblemError:
        raise
    except Exception as error:
        labels = ("y",) if name in ("project_lower", "prox_lower") else ("x", "y", "batch")
        given = (*args[:-1], words) if words is not None else args
        shapes = ", ".join(f"{label}: {_in_words(arg)}" for label, arg in zip(labels, given, strict=False))
        raise ProblemError(
            f"{name}{signature} fails on the given variables and data ({shapes}): {type(error).__name__}: "
            f"{str(error).split(_DETAILS)[0].strip()[:400]}{_cure(name, signature, whose or fn, error)}"
        ) from error


@contextlib.contextmanager
def _no_draws_on_the_host(name: str, fn: Any) -> Iterator[None]:
    """Refuse a function that draws random numbers of numpy's or Python's while it is traced: every step would see the
    same ones."""
    before = [(generator, generator_state(generator)) for generator in host_generators(fn)]
    yield
    if any(generator_state(generator) != then for generator, then in before):
        raise ProblemError(
            f"{name} draws random numbers of numpy's or Python's, and compiled code would repeat the same at every "
            "step. Draw with a key: data.Sampler(lambda key, arrays: ...) for batches, data.Keyed(...) for noise in a "
            "loss, both with jax.random; numbers that are meant to stay are made outside of the function."
        )


def _in_words(tree: PyTree) -> PyTree:
    """Each array as its dtype and shape."""

    def word(leaf: Any) -> Any:
        if isinstance(leaf, StepKey):
            return "StepKey"
        return leaf if isinstance(leaf, str) else f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"

    return jax.tree.map(word, tree, is_leaf=lambda node: isinstance(node, StepKey))


def _check_prox_order(prox: Callable[..., PyTree], x: PyTree, y: PyTree) -> None:
    """Raise where an operator is written for (y, x, scaling), the order that it had before the one of all else.

    At scaling zero the operator of any finite term is the identity in y: one that gives back its first argument takes
    y first. Variables of different shapes show it in what it returns; parameters named y and x say it themselves.
    """
    cure = (
        "prox_lower takes (x, y, scaling), the order of everything else, and this one takes (y, x, scaling), as it was "
        "up to version 0.1.0: swap its first two parameters."
    )
    try:
        names = list(inspect.signature(prox).parameters)[:2]
    except (TypeError, ValueError):  # a builtin
        names = []
    if names == ["y", "x"]:
        raise ProblemError(cure)
    leaves = jax.tree.leaves((x, y))
    if not jax.tree.leaves(x) or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    # Two points that differ in every entry, whatever the start is, and positive, where barriers are defined.
    one, two = jax.tree.map(lambda a: jnp.full_like(a, 1.2347), x), jax.tree.map(lambda a: jnp.full_like(a, 1.7653), y)

    def gives_back(first: PyTree, second: PyTree, given: PyTree) -> bool:
        try:
            out = prox(first, second, 0.0)
        except Exception:  # the strength of one variable read off the other
            return False
        same = lambda a, b: jnp.shape(a) == jnp.shape(b) and bool(jnp.allclose(a, b, rtol=1e-2))  # noqa: E731
        alike = jax.tree.structure(out) == jax.tree.structure(given)  # type: ignore[operator]
        return alike and all(map(same, jax.tree.leaves(out), jax.tree.leaves(given)))

    if not gives_back(one, two, two) and (gives_back(one, two, one) or gives_back(two, one, two)):
        raise ProblemError(cure)


_DETAILS = "The error occurred while tracing"  # From here JAX repeats itself.
_CONCRETE = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError, jax.errors.JAXTypeError)
_CALLED = {"project_upper": "(x)", "project_lower": "(y)", "prox_lower": "(x, y, scaling)"}


def _cure(name: str, signature: str, fn: Callable[..., Any], error: Exception) -> str:
    """What to do about a function that could not be traced, as the end of the sentence; "" where nobody knows."""
    home, made = look(fn, "__module__", ""), look(fn, "__qualname__", "")
    of_prox = home == "bilevel.prox"
    if of_prox and "<locals>" not in made and made:
        return f" (prox.{made} makes an operator: call it with its strength, {name}=prox.{made}(...))."
    if of_prox and name != "prox_lower":
        return " (this is a proximal operator: it goes into prox_lower=, and a set or a projection here)."
    if isinstance(fn, Set) and not name.startswith("project"):
        also = ", or by prox.projection(set) into prox_lower=" if name == "prox_lower" else ""
        return f" (this is a set: it goes into project_lower= or project_upper={also})."
    if isinstance(error, _CONCRETE):
        return " (a loss is traced: jnp.where for an `if`, jnp in the place of numpy, math and float())."
    if isinstance(error, TypeError) and "positional argument" in str(error):
        called = _CALLED.get(name, signature)
        data = f"{'upper' if name.startswith('upper') else 'lower'}_data"
        batch = f"; with {data}= it takes a batch besides, and without none" if name not in _CALLED else ""
        unpack = (
            "; a batch of several arrays is one argument, to be unpacked: X, t = batch" if "batch)" in called else ""
        )
        return f" ({name} is called as {name}{called}{batch}{unpack})."
    if isinstance(error, TypeError) and "not a valid JAX type" in str(error):
        return f" ({name} returns arrays, a loss one scalar)."
    if isinstance(error, TypeError) and "'tuple'" in str(error) and "batch" in signature:
        return " (the batch is a tuple: unpack it, X, t = batch; that of data.Keyed is batch, key)."
    return ""


def _check_same(name: str, variable: str, fn: Callable[..., Any], value: PyTree, whose: Any = None) -> None:
    out = _shapes(name, "", fn, value, whose=whose)
    if jax.tree.structure(out) != jax.tree.structure(value):  # type: ignore[operator]
        if not jax.tree.leaves(out):
            raise ProblemError(f"{name} returned nothing: it returns {variable}, projected.")
        raise ProblemError(
            f"{name} changes the structure of {variable} from {jax.tree.structure(value)} to "
            f"{jax.tree.structure(out)}; it must keep it."
        )
    before = jax.tree_util.tree_leaves_with_path(value)
    for (path, leaf), new in zip(before, jax.tree.leaves(out), strict=True):
        where = f"{variable}{jax.tree_util.keystr(path)}"
        if new.shape != np.shape(leaf):
            raise ProblemError(
                f"{name} changes the shape of {where} from {list(np.shape(leaf))} to {list(new.shape)}; it must keep "
                "it."
            )
        if new.dtype != jnp.result_type(leaf):
            raise ProblemError(
                f"{name} changes the dtype of {where} from {jnp.result_type(leaf)} to {new.dtype}; it must keep it "
                "(cast the result back, or make its constants Python floats)."
            )
