"""The statement of a bilevel problem."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import derivatives
from bilevel.data import SOURCES, Agents, Clients, Sampler, StepKey, Stream, Streamed, as_step_key, sample_count

PyTree = Any

__all__ = ["Level", "Problem", "ProblemError"]


class ProblemError(ValueError):
    """The problem, a start or a solver's fit to them is wrong; the message says what and how to mend it."""


class Level:
    """One level of a problem with its data bound: a plain function of (x, y).

    Attributes:
      key: the `StepKey` that its batch was drawn with.
      project: the level's projection, or None.
      prox: the level's proximal operator `prox(y, x, scaling)`, or None (lower level only).
    """

    def __init__(
        self,
        fn: Callable[..., jax.Array],
        source: Any = None,
        key: StepKey | None = None,
        project: Callable[[PyTree], PyTree] | None = None,
        prox: Callable[..., PyTree] | None = None,
        batch: PyTree = None,
        mixed: bool = False,
    ) -> None:
        self.fn, self.source, self.key, self.project, self.prox, self.mixed = fn, source, key, project, prox, mixed
        if source is not None and batch is None:
            batch = source.draw(key) if isinstance(source, SOURCES) else source
        self.batch = batch

    def __call__(self, x: PyTree, y: PyTree) -> jax.Array:
        """The loss on the bound batch."""
        return self.fn(x, y) if self.source is None else self.fn(x, y, self.batch)

    def gradient(self, x: PyTree, y: PyTree) -> PyTree:
        """The gradient in y, shaped like y."""
        if self.mixed:
            fn = (lambda x, y, batch: self.fn(x, y)) if self.source is None else self.fn
            return derivatives.mixed_mode_gradient(fn)(x, y, self.batch)
        return jax.grad(self, argnums=1)(x, y)

    def mixed_mode(self) -> Level:
        """The same level with `derivatives.mixed_mode_gradient` as its gradient: cheap to unroll in reverse."""
        return Level(self.fn, self.source, self.key, self.project, self.prox, self.batch, mixed=True)

    @property
    def random(self) -> bool:
        """Whether drawing again gives another batch."""
        return isinstance(self.source, SOURCES) and not (
            isinstance(self.source, (Agents, Clients)) and self.source.size is None
        )

    def redraw(self, i: Any, total: int) -> Level:
        """The level with the batch of inner step `i` of `total`; itself where the data are not drawn."""
        if not self.random or self.key is None:
            return self
        return Level(self.fn, self.source, self.key.inner(i, total), self.project, self.prox, mixed=self.mixed)

    def stream(self, tag: int) -> Level:
        """The level with a batch that is independent of this one's; itself where the data are not drawn."""
        if not self.random or self.key is None:
            return self
        return Level(self.fn, self.source, self.key.fold_in(tag), self.project, self.prox, mixed=self.mixed)


_FUNCTIONS = ("upper", "lower", "project_upper", "project_lower", "prox_lower", "constraint", "equality")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("upper_data", "lower_data"), meta_fields=_FUNCTIONS)
@dataclasses.dataclass(frozen=True)
class Problem:
    """The bilevel problem

        min over x in X   F(x, y*(x))   subject to   y*(x) in argmin over y in Y of f(x, y),  g(x, y) <= 0,  h(x, y) = 0.

    A `Problem` is a pytree: its functions are static, its data are leaves. Data are thus arguments of a compiled step
    and never constants in it, and `jax.vmap` over a problem whose data have a leading axis is many problems.

    Args:
      upper: the upper loss F, `F(x, y)`, or `F(x, y, batch)` where `upper_data` is given; returns a scalar.
      lower: the lower loss f, `f(x, y)`, or `f(x, y, batch)` where `lower_data` is given; returns a scalar.
      upper_data, lower_data: a pytree of arrays with a leading sample axis (full batches), or one of
        `data.Minibatches`, `data.Sampler`, `data.Stream`, `data.Clients`, `data.Agents`.
      project_upper: `x -> x`, the projection on X.
      project_lower: `y -> y`, the projection on Y.
      prox_lower: `(y, x, scaling) -> y`, the proximal operator of a nonsmooth term r(x, y) that is added to f:
        argmin over u of |u - y|^2 / 2 + scaling r(x, u).
      constraint: the coupled inequality g of the lower level, `g(x, y)`, a pytree of arrays asked to be <= 0. Where
        `lower_data` is given it may take the lower level's batch too: `g(x, y, batch)`.
      equality: the coupled equality h of the lower level, likewise: `h(x, y)` or `h(x, y, batch)`, asked to be 0.

    Both variables are arbitrary pytrees of floating-point arrays. With `x0=None` the problem is a *simple* bilevel
    problem: both levels own y.
    """

    upper: Callable[..., jax.Array]
    lower: Callable[..., jax.Array]
    upper_data: Any = None
    lower_data: Any = None
    project_upper: Callable[[PyTree], PyTree] | None = None
    project_lower: Callable[[PyTree], PyTree] | None = None
    prox_lower: Callable[..., PyTree] | None = None
    constraint: Callable[..., PyTree] | None = None
    equality: Callable[..., PyTree] | None = None

    def __post_init__(self) -> None:
        for name in _FUNCTIONS:
            fn = getattr(self, name)
            if fn is None and name not in ("upper", "lower"):
                continue
            if not callable(fn):
                raise ProblemError(f"Problem({name}=...) takes a function, not {type(fn).__name__}.")
            try:
                hash(fn)
            except TypeError:
                raise ProblemError(
                    f"Problem({name}=...): the function is not hashable, so compiled code could not be reused. "
                    "Wrap it in a plain function (def or lambda)."
                ) from None

    def draw_upper(self, key: Any) -> Level:
        """The upper loss with the batch of this key bound: a function of (x, y). `key`: a `StepKey`, PRNG key or seed."""
        return Level(self.upper, self.upper_data, as_step_key(key).fold_in(1), self.project_upper)

    def draw_lower(self, key: Any) -> Level:
        """The lower loss with the batch of this key bound: a function of (x, y). `key`: a `StepKey`, PRNG key or seed."""
        return Level(self.lower, self.lower_data, as_step_key(key).fold_in(0), self.project_lower, self.prox_lower)

    def full_upper(self) -> Level:
        """The upper loss on all its samples (one draw where the data are a sampler's)."""
        return Level(self.upper, full_batch(self.upper_data), as_step_key(0), self.project_upper)

    def full_lower(self) -> Level:
        """The lower loss on all its samples (one draw where the data are a sampler's)."""
        return Level(self.lower, full_batch(self.lower_data), as_step_key(0), self.project_lower, self.prox_lower)

    def constraints(self, lower: Level) -> tuple[Any, Any]:
        """`constraint` and `equality` as functions of (x, y), on the batch of `lower` where they take one; None where absent."""

        def bind(fn: Callable[..., PyTree] | None) -> Any:
            if fn is None or lower.source is None or not _takes_batch(fn):
                return fn
            if lower.random:
                raise ProblemError(
                    "A constraint takes the lower level's batch, and that batch is drawn anew at every step: its rows, and "
                    "their multipliers, would belong to other samples each time. Give lower_data as bare arrays (a full batch)."
                )
            return lambda x, y: fn(x, y, lower.batch)

        return bind(self.constraint), bind(self.equality)

    @property
    def stochastic(self) -> bool:
        """Whether a level's batches differ from step to step."""
        return any(
            isinstance(d, SOURCES) and not (isinstance(d, (Agents, Clients)) and d.size is None)
            for d in (self.upper_data, self.lower_data)
        )

    def validate(self, x: PyTree, y: PyTree) -> None:
        """Raise a `ProblemError` that names what is wrong with the problem at (x, y) and the cure, before any compile.

        Checks the variables (floating, finite), the data (sample axes, finite), the losses (scalar, floating), the
        projections and the constraints (structure, shapes, dtypes).
        """
        _check_variable("x0", x)
        if not jax.tree.leaves(y):
            raise ProblemError(
                "y0 holds no arrays: the lower variable is a pytree with at least one floating-point array."
            )
        _check_variable("y0", y)
        for name in ("upper_data", "lower_data"):
            _check_data(name, getattr(self, name))
        _check_agents(self.upper_data, self.lower_data)
        for name, data in (("upper", self.upper_data), ("lower", self.lower_data)):
            self._check_loss(name, data, x, y)
        if self.project_upper is not None:
            _check_same("project_upper", "x0", self.project_upper, x)
        if self.project_lower is not None:
            _check_same("project_lower", "y0", self.project_lower, y)
        if self.prox_lower is not None:
            prox = self.prox_lower
            _check_same("prox_lower", "y0", lambda y: prox(y, x, 1.0), y)
        for name in ("constraint", "equality"):
            fn = getattr(self, name)
            if fn is not None:
                out = self._constraint_shapes(name, fn, x, y)
                if not jax.tree.leaves(out):
                    raise ProblemError(
                        f"{name}(x, y) returned no arrays; return the constraint's values as an array or a pytree of arrays."
                    )

    def _constraint_shapes(self, name: str, fn: Callable[..., PyTree], x: PyTree, y: PyTree) -> PyTree:
        if self.lower_data is None or not _takes_batch(fn):
            return _shapes(name, "(x, y)", fn, x, y)
        if isinstance(self.lower_data, Stream):
            return _shapes(name, "(x, y, batch)", fn, x, y, next(self.lower_data.items()))
        draw = lambda x, y, source: fn(x, y, source.draw(as_step_key(0)) if isinstance(source, SOURCES) else source)  # noqa: E731
        return _shapes(name, "(x, y, batch)", draw, x, y, self.lower_data)

    def _check_loss(self, name: str, data: Any, x: PyTree, y: PyTree) -> None:
        fn = getattr(self, name)
        if isinstance(data, Stream):
            batch = jax.tree.map(np.asarray, next(data.items()))
            out = _shapes(name, "(x, y, batch)", fn, x, y, batch)
        elif data is None:
            out = _shapes(name, "(x, y)", fn, x, y)
        else:
            source = data

            def bound(x: PyTree, y: PyTree, source: Any) -> Any:
                return fn(x, y, source.draw(as_step_key(0)) if isinstance(source, SOURCES) else source)

            out = _shapes(name, "(x, y, batch)", bound, x, y, source)
        leaves = jax.tree.leaves(out)
        if len(leaves) != 1 or leaves[0].shape != ():
            got = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "nothing"
            raise ProblemError(
                f"{name}(x, y{', batch' if data is not None else ''}) returned {got}; a loss is one scalar. Take a mean or a sum."
            )
        if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
            raise ProblemError(f"{name} returned the dtype {leaves[0].dtype}; a loss is a floating-point scalar.")


def _takes_batch(fn: Callable[..., Any]) -> bool:
    """Whether a constraint takes (x, y, batch) rather than (x, y)."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) == 3 or (len(required) < 3 and any(p.name == "batch" for p in positional))


def as_variable(name: str, tree: PyTree) -> PyTree:
    """Arrays of its own for each leaf, so that a solver never touches the caller's."""

    def convert(path: Any, leaf: Any) -> jax.Array:
        if isinstance(leaf, (bool, int, np.integer)) or (
            not hasattr(leaf, "dtype") and not isinstance(leaf, (float, list, tuple))
        ):
            where = f"{name}{jax.tree_util.keystr(path)}"
            kind = type(leaf).__name__
            raise ProblemError(
                f"{where} is of type {kind}; variables are floating-point arrays: write jnp.asarray({leaf!r}, float)."
            )
        return jnp.array(leaf, copy=True)

    return jax.tree_util.tree_map_with_path(convert, tree)


def _check_variable(name: str, tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = f"{name}{jax.tree_util.keystr(path)}"
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ProblemError(
                f"{where} has dtype {dtype}; variables are floating-point (gradients are taken in them): "
                f"write jnp.asarray({where}, float)."
            )
        if not isinstance(leaf, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(leaf))):
            raise ProblemError(f"{where} is not finite (a NaN or an infinity): start from finite values.")


def _check_data(name: str, data: Any) -> None:
    if data is None or isinstance(data, (Stream, Streamed)):
        return
    arrays = data.arrays if isinstance(data, SOURCES) else data
    if not isinstance(data, SOURCES):
        try:
            sample_count(arrays, name)
        except ValueError as error:
            raise ProblemError(str(error)) from None
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        if isinstance(leaf, jax.core.Tracer):
            continue
        dtype = getattr(leaf, "dtype", None)
        where = f"{name}{jax.tree_util.keystr(path)}"
        if dtype is None:
            raise ProblemError(f"{where} is of type {type(leaf).__name__}, not an array: wrap it with numpy.asarray.")
        if dtype.kind == "O" or dtype.kind in "US":
            raise ProblemError(f"{where} has dtype {dtype}: encode it as numbers.")
        if jnp.issubdtype(dtype, jnp.floating):
            finite = np.isfinite(leaf).all() if isinstance(leaf, np.ndarray) else bool(jnp.isfinite(leaf).all())
            if not finite:
                raise ProblemError(f"{where} holds a NaN or an infinity: remove or fill those samples first.")


def _check_agents(upper: Any, lower: Any) -> None:
    many = (Agents, Clients)
    if isinstance(upper, many) and isinstance(lower, many) and len(upper) != len(lower):
        what = "agents" if isinstance(upper, Agents) else "clients"
        raise ProblemError(
            f"upper_data has {len(upper)} {what} and lower_data {len(lower)}: one data set per {what[:-1]} in each level."
        )


def _shapes(name: str, signature: str, fn: Callable[..., Any], *args: Any) -> PyTree:
    try:
        return jax.eval_shape(fn, *args)
    except Exception as error:
        shapes = ", ".join(
            f"{label}: {jax.tree.map(lambda a: f'{jnp.result_type(a)}{list(np.shape(a))}', arg)}"
            for label, arg in zip(("x", "y", "batch"), args, strict=False)
        )
        raise ProblemError(
            f"{name}{signature} fails on the given variables and data ({shapes}): {type(error).__name__}: {error}"
        ) from error


def _check_same(name: str, variable: str, fn: Callable[..., Any], value: PyTree) -> None:
    out = _shapes(name, "", fn, value)
    if jax.tree.structure(out) != jax.tree.structure(value):  # type: ignore[operator]
        raise ProblemError(
            f"{name} changes the structure of {variable} from {jax.tree.structure(value)} to {jax.tree.structure(out)}; it must keep it."
        )
    before = jax.tree_util.tree_leaves_with_path(value)
    for (path, leaf), new in zip(before, jax.tree.leaves(out), strict=True):
        where = f"{variable}{jax.tree_util.keystr(path)}"
        if new.shape != np.shape(leaf):
            raise ProblemError(
                f"{name} changes the shape of {where} from {list(np.shape(leaf))} to {list(new.shape)}; it must keep it."
            )
        if new.dtype != jnp.result_type(leaf):
            raise ProblemError(
                f"{name} changes the dtype of {where} from {jnp.result_type(leaf)} to {new.dtype}; it must keep it "
                "(cast the result back, or make its constants Python floats)."
            )


def full_batch(data: Any) -> Any:
    """All of a level's samples, or one draw of a sampler."""
    if isinstance(data, Sampler):
        return data.draw(as_step_key(0))
    if isinstance(data, Stream):
        raise ProblemError(
            "A Stream has no full batch: its data do not fit on the device. Evaluate on samples of your own."
        )
    return data.full() if isinstance(data, SOURCES) and not isinstance(data, Streamed) else data
