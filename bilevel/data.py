"""What a level's data can be, and how a batch is drawn inside a compiled loop.

A source has no state. The batch of step k is a function of the run's key and of k, so that results depend neither on
how many steps are compiled together nor on where a run was interrupted. `Source` says what a source is; a new one is
one class.
"""

from __future__ import annotations

import collections.abc
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._arguments import explained_class, has
from bilevel._pickling import storable
from bilevel.captures import form
from bilevel.keys import Draw, StepKey, as_step_key, epoch_seed, in_epoch, mix, permute, stream_seed
from bilevel.typing import PyTree

__all__ = [
    "Agents", "Clients", "Description", "Full", "Keyed", "Minibatches", "Sampler", "Shared", "Source", "StepKey",
    "Stream", "as_source", "as_step_key",
]  # fmt: skip


class ProblemError(ValueError):
    """The problem, a start or a solver's fit to them is wrong; the message says what and how to mend it."""


def as_arrays(tree: PyTree, name: str) -> PyTree:
    """The tree with tables and foreign tensors as numpy arrays; what is a stream of batches is refused with the cure.

    Taken: pandas and polars tables and columns of numbers, torch and TensorFlow tensors. A scipy sparse matrix, a
    DataLoader, a tf.data.Dataset, an iterator and text are named.
    """

    def convert(path: Any, leaf: Any) -> Any:
        where = name + jax.tree_util.keystr(path)
        kind, home = type(leaf).__name__, type(leaf).__module__.partition(".")[0]
        if isinstance(leaf, (np.ndarray, np.generic, jax.Array, jax.core.Tracer)) or home in ("jax", "jaxlib"):
            return leaf
        if home in ("pandas", "polars") and has(leaf, "to_numpy"):
            return _column_numbers(leaf, where)
        if home == "torch" and has(leaf, "detach"):
            return leaf.detach().cpu().numpy()
        if home == "tensorflow" and has(leaf, "numpy"):
            return leaf.numpy()
        if isinstance(leaf, dict):
            raise ProblemError(f"{where} is a {kind}, a dictionary that JAX does not take apart: give dict({where}).")
        if has(leaf, "toarray") and has(leaf, "nnz"):
            raise ProblemError(
                f"{where} is a sparse matrix ({kind}), and losses take dense arrays: give its .toarray() where that "
                "fits, else a data.Stream of dense batches, whose items are X[rows].toarray()."
            )
        if isinstance(leaf, collections.abc.Iterator) or (has(leaf, "__iter__") and not has(leaf, "__array__")):
            if isinstance(leaf, (str, bytes)):
                raise ProblemError(f"{where} is text: encode it as numbers; of a file, give the arrays that are in it.")
            raise ProblemError(
                f"{where} is a {kind}, which gives batches one after the other: wrap it, data.Stream(loader), or give "
                "arrays of all samples."
            )
        if isinstance(leaf, os.PathLike):
            raise ProblemError(f"{where} is a path, and data are arrays: give those that are in the file.")
        if callable(leaf) and not has(leaf, "__array__"):
            what = f"the class {leaf.__name__}" if isinstance(leaf, type) else f"a {kind}"
            cure = (
                f"make one of it, {leaf.__name__}(...)"
                if isinstance(leaf, type)
                else "give what it returns, or draw with it: data.Sampler(function), called as function(key, arrays)"
            )
            raise ProblemError(f"{where} is {what}, and data are arrays: {cure}.")
        return leaf

    one_by_one = lambda value: isinstance(value, collections.abc.Iterator)  # noqa: E731
    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=one_by_one)


def _column_numbers(table: Any, where: str) -> np.ndarray:
    """A table's numbers; an error that names the columns which hold none."""
    import_name = type(table).__module__.partition(".")[0]
    columns = {str(c): table[c] for c in table.columns} if hasattr(table, "columns") else {str(table.name): table}
    if import_name == "polars":
        bad = [c for c, column in columns.items() if not (column.dtype.is_numeric() or str(column.dtype) == "Boolean")]
    else:
        from pandas.api import types

        bad = [c for c, column in columns.items() if not types.is_numeric_dtype(column)]
    if bad:
        listed = ", ".join(map(repr, bad[:5])) + ("" if len(bad) <= 5 else f" and {len(bad) - 5} more")
        raise ProblemError(
            f"{where} has columns that are no numbers: {listed}. Encode them, for example by pandas.get_dummies, or "
            "leave them out."
        )
    array = table.to_numpy()
    return array if array.dtype.kind in "biuf" else np.asarray(array, float)


def sample_count(arrays: PyTree, name: str) -> int:
    """The length of the leading axis that all leaves share; an error that names the leaves where they do not."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if not leaves:
        raise ProblemError(f"{name} holds no arrays: give a pytree of arrays with a leading sample axis.")
    counts = {}
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if np.ndim(leaf) == 0:
            raise ProblemError(
                f"{where} is a scalar: every leaf of the data needs a leading sample axis (a list of numbers is "
                "as many scalars: numpy.asarray makes one array of it)."
            )
        counts[where] = np.shape(leaf)[0]
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{where} has {count}" for where, count in counts.items())
        raise ProblemError(f"The leaves of {name} disagree on the number of samples: {listed}. Make them equal.")
    count = next(iter(counts.values()))
    if count == 0:
        raise ProblemError(f"{name} has zero samples: give at least one.")
    return count


def _check_integer(owner: str, size: Any) -> None:
    """Raise where a batch size is not a positive integer."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        cure = "; several arrays go into one tuple, Minibatches((X, t), size)" if np.ndim(size) else ""
        shown = f"array of shape {list(np.shape(size))}" if np.ndim(size) else repr(size)
        raise ProblemError(f"{owner}(size={shown}): the batch size is a positive integer{cure}.")


def _check_size(owner: str, size: Any, most: int, whose: str) -> None:
    """Raise where a batch size (None: full batches) is not an integer in 1..most."""
    if size is None:
        return
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool) and not 1 <= size <= most:
        raise ProblemError(f"{owner}(size={size}): {whose} {most} samples; the batch size must lie in 1..{most}.")
    _check_integer(owner, size)


def _take(arrays: PyTree, rows: jax.Array) -> PyTree:
    return jax.tree.map(lambda a: jnp.asarray(a).at[rows].get(mode="promise_in_bounds"), arrays)


def _slots(key: StepKey, per_epoch: Any, size: int) -> jax.Array:
    """The places in the epoch's order that the batch of this step reads."""
    return (key.step % per_epoch) * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)


class Description(NamedTuple):
    """What tells one source from another in two processes.

    Attributes:
      kind: the source's name.
      settings: what it was made with, by name.
      arrays: its arrays, told apart by shapes, dtypes and contents.
      sampled: the arrays are a first item only, and not all there is.
    """

    kind: str
    settings: dict[str, Any]
    arrays: PyTree
    sampled: bool = False


@storable
class Source:
    """Where a level's batches come from.

    A new source is a subclass with `draw`, and with what else of the following is not as here:

        class Shifted(data.Source, leaves=("arrays", "shift")):
            def __init__(self, arrays, shift): self.arrays, self.shift = arrays, shift
            def draw(self, key): return jax.tree.map(lambda a: a + self.shift * key.step, self.arrays)

    Subclasses are pytrees: the attributes named by `leaves` travel as data, all others are static and hashable.

    Attributes:
      count: the number of samples; None where there is no end of them.
      arrays: the arrays that batches are made of; looked through before a run for what is not finite.
      given: whether there are data at all (else losses take (x, y) alone).
      random: whether samples are drawn, so that the loss of a step is an estimate.
      varies: whether another key gives another batch: what is random does, and what carries its key.
      size: the samples of one batch; None: all of them.
      shared: whether all draws of an outer step are one, in either level (`Shared`).
      host: whether it is read on the host, and `solve` puts a step's items in its place (`Stream`).
      parties, owners: how many own the samples, None being nobody in particular; and what one of them is called.
      even: all parties own equally many samples.
      stacked: the leading axis of the arrays is the parties', and may be spread over devices.
      blocks: the number of numbered batches, where `numbered` gives the number of each; None: they have none.
      unnumbered: why not, in words.
      cuttable: `full()` is nothing but samples, drawn in smaller batches otherwise: a pass over it may go in pieces.
      redrawn: whether another key gives another `full()`: there is no end of samples, or they carry their key.
      averaged: its batch is many draws, stacked, and a loss on it is the mean of those on each.
      separate: and y is stacked likewise, one for each draw.
    """

    arrays: PyTree = None
    given: bool = True
    random: bool = True
    size: int | None = None
    shared: bool = False
    host: bool = False
    parties: int | None = None
    owners: str = ""
    even: bool = True
    stacked: bool = False
    blocks: int | None = None
    unnumbered: str = "have no numbers"
    cuttable: bool = False
    averaged: bool = False
    separate: bool = False
    _leaves: tuple[str, ...] = ()

    def __init_subclass__(cls, leaves: tuple[str, ...] | None = ("arrays",), **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            explained_class(cls)
        cls._leaves = leaves or ()
        if leaves is None:
            jax.tree_util.register_static(cls)
            return

        def flatten(self: Any) -> Any:
            static = tuple(sorted((name, value) for name, value in vars(self).items() if name not in leaves))
            return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves), static

        def unflatten(static: Any, children: Any) -> Any:
            self = object.__new__(cls)
            vars(self).update(static)
            vars(self).update(zip(leaves, children, strict=True))
            return self

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)

    def draw(self, key: StepKey) -> PyTree:
        """The batch of this step."""
        raise NotImplementedError

    def full(self, key: StepKey | None = None) -> PyTree:
        """All samples as one batch, or one draw where there is no end of them; `key` is that of the draw."""
        return self.arrays if self.count is not None else self.draw(as_step_key(0) if key is None else key)

    def whole(self) -> Source | None:
        """The source of all samples at every step; None where there is none, or batches carry more than samples."""
        return None if self.random or self.host else self

    @property
    def count(self) -> int | None:
        """The number of samples; None where there is no end of them."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    @property
    def varies(self) -> bool:
        """Whether another key gives another batch."""
        return self.random

    @property
    def redrawn(self) -> bool:
        """Whether another key gives another `full()`."""
        return self.random and self.count is None

    def numbered(self, key: StepKey) -> tuple[jax.Array, PyTree]:
        """The number of this step's batch, and the batch."""
        raise NotImplementedError

    def draw_each(self, key: StepKey, who: jax.Array | None = None) -> PyTree:
        """The batches of these parties (None: of all), stacked: each from its own samples, in an order of its own."""
        raise NotImplementedError

    def shares(self) -> jax.Array:
        """Each party's share of the samples, times the number of parties: 1 on average."""
        return jnp.ones(self.parties)

    def check(self, name: str) -> None:
        """Raise where the data of this kind cannot be used, `name` being the argument they were given as."""

    def asked(self, total: Any) -> None:
        """Take note that a solve on one step's draws takes `total` of them, one after the other."""

    def example(self) -> PyTree:
        """A batch, to see its shapes."""
        return self.draw(as_step_key(0))

    def shapes(self) -> PyTree:
        """The shapes and dtypes of a batch, which JAX remembers where no function of the user's draws it."""
        part: Any = self
        ours = True
        while isinstance(part, Source):
            ours = ours and type(part).__module__ == __name__ and not hasattr(part, "fn")
            part = getattr(part, "source", None)
        return jax.eval_shape(_example if ours else lambda source: source.example(), self)

    def captured(self) -> Source:
        """The source, compared in compiled code by what its functions capture too; see `bilevel.captures`."""
        inside = {name: value.captured() for name, value in vars(self).items() if isinstance(value, Source)}
        static = {name: value for name, value in vars(self).items() if name not in (*self._leaves, *inside)}
        held = form({"class": type(self), **{name: value for name, value in static.items() if callable(value)}})
        if self.host or (type(self).__module__ == __name__ and not inside and not any(map(callable, static.values()))):
            return self
        new = object.__new__(type(self))
        vars(new).update(vars(self) | inside | {"_held": held})
        return new

    def describe(self) -> Description:
        """What tells it from other sources."""
        return Description(type(self).__name__, {}, self.arrays)


class Nothing(Source, leaves=()):
    """No data: the losses take (x, y)."""

    given, random, count = False, False, 0  # type: ignore[assignment]

    def draw(self, key: StepKey) -> PyTree:
        """None."""
        return None

    def describe(self) -> Description:
        """None."""
        return Description("None", {}, None)

    def __repr__(self) -> str:
        return "none"


class Full(Source):
    """All samples at every step: what bare arrays are.

    Args:
      arrays: pytree of arrays of one leading length.
    """

    random = False

    def __init__(self, arrays: PyTree) -> None:
        self.arrays = as_arrays(arrays, "arrays")

    def draw(self, key: StepKey) -> PyTree:
        """All samples."""
        return self.arrays

    def check(self, name: str) -> None:
        """Raise where the leaves do not share a sample axis."""
        sample_count(self.arrays, name)

    def describe(self) -> Description:
        """The arrays."""
        return Description("arrays", {}, self.arrays)

    def __repr__(self) -> str:
        return f"full batches of {self.count} samples"


@jax.jit
def _example(source: Source) -> PyTree:
    return source.example()


NOTHING = Nothing()


def as_source(data: Any) -> Source:
    """The source of a level's data: itself, bare arrays as `Full`, None as no data."""
    if isinstance(data, Source):
        return data
    return NOTHING if data is None else Full(data)


class Minibatches(Source):
    """Batches of `size` samples, drawn inside the compiled loop.

    Without replacement (the default) step k reads batch `k mod (n // size)` of epoch `k // (n // size)`, and every
    epoch is a fresh keyed permutation of the n samples; the `n mod size` samples left over differ from epoch to
    epoch. With `blocks=True` the samples are cut once into `ceil(n / size)` contiguous blocks and the *blocks* are
    permuted: a slice instead of a gather (faster for wide rows), and each batch has a number, which methods that
    remember a gradient per batch need. The last block then starts at `n - size`, overlapping its neighbour where
    size does not divide n. Shuffle the arrays once before if their order means anything.

    Args:
      arrays: pytree of arrays of one leading length n.
      size: samples per batch, at most n.
      replace: draw every batch uniformly, with replacement.
      blocks: permute contiguous blocks instead of samples.
    """

    size: int
    cuttable = True
    unnumbered = "are drawn afresh from the samples"

    def __init__(self, arrays: PyTree, size: int, *, replace: bool = False, blocks: bool = False) -> None:
        arrays = as_arrays(arrays, "Minibatches' arrays")
        n = sample_count(arrays, "Minibatches' arrays")
        _check_integer("Minibatches", size)
        if size > n:
            raise ProblemError(
                f"Minibatches(size={size}) exceeds the {n} samples: lower the size, or pass the arrays bare for full "
                "batches."
            )
        if replace and blocks:
            raise ProblemError("Minibatches: blocks=True draws without replacement; choose one of replace and blocks.")
        self.arrays, self.size, self.replace, self.in_blocks = arrays, int(size), replace, blocks

    @property
    def batches(self) -> int:
        """The number of batches in an epoch."""
        count = jax.tree.leaves(self.arrays)[0].shape[0]
        return -(-count // self.size) if self.in_blocks else count // self.size

    @property
    def blocks(self) -> int | None:  # type: ignore[override]
        """The number of blocks, with `blocks=True`."""
        return self.batches if self.in_blocks else None

    def numbered(self, key: StepKey) -> tuple[jax.Array, PyTree]:
        """The number (0..blocks-1) of this step's batch, and the batch; only with `blocks=True`."""
        block = in_epoch(key.step, self.batches, stream_seed(key))
        count = jax.tree.leaves(self.arrays)[0].shape[0]
        start = jnp.minimum(block * self.size, count - self.size)
        return block, jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, self.size), self.arrays)

    def draw(self, key: StepKey) -> PyTree:
        """The batch of this step."""
        if self.in_blocks:
            return self.numbered(key)[1]
        count = jax.tree.leaves(self.arrays)[0].shape[0]
        if self.replace:
            return _take(self.arrays, jax.random.randint(key.random, (self.size,), 0, count))
        per_epoch = jnp.uint32(self.batches)
        seed = epoch_seed(stream_seed(key), key.step // per_epoch)
        return _take(self.arrays, permute(_slots(key, per_epoch, self.size), count, seed))

    def whole(self) -> Full:
        """Full batches of the same arrays."""
        return Full(self.arrays)

    def describe(self) -> Description:
        """The arrays and the way of drawing."""
        settings = {"size": self.size, "replace": self.replace, "blocks": self.in_blocks}
        return Description("Minibatches", settings, self.arrays)

    def __repr__(self) -> str:
        how = "with replacement" if self.replace else "in blocks" if self.in_blocks else "without replacement"
        return f"Minibatches({self.count} samples, size={self.size}, {how})"


class Sampler(Source):
    """Batches made by a function of the user's: `fn(key, arrays) -> batch`, pure, drawn inside the compiled loop.

    The function may put a key into the batch: randomness then reaches the losses through the batch, and one draw can
    be evaluated at two points.

    Args:
      fn: `fn(key, arrays) -> batch`, with `key` a `jax.random` key.
      arrays: any pytree of arrays, handed to `fn` (never baked into the compiled program).
    """

    count = None  # type: ignore[assignment]

    def __init__(self, fn: Callable[[jax.Array, PyTree], PyTree], arrays: PyTree = None) -> None:
        if not callable(fn):
            raise TypeError(f"Sampler needs a function fn(key, arrays) -> batch, not {type(fn).__name__}.")
        self.fn, self.arrays = fn, as_arrays(arrays, "Sampler's arrays")

    def draw(self, key: StepKey) -> PyTree:
        """The batch of this step."""
        return self.fn(key.random, self.arrays)

    def describe(self) -> Description:
        """The function and its arrays."""
        return Description("Sampler", {"fn": self.fn}, self.arrays)

    def __repr__(self) -> str:
        return f"Sampler({getattr(self.fn, '__name__', self.fn)!s})"


class Keyed(Source, leaves=("source",)):
    """Batches with the key they were drawn with: a loss is given `(batch, StepKey)`, for a schedule or for noise.

        def upper(x, y, batch):
            (features, targets), key = batch
            strength = 0.1 * key.step          # a schedule
            noise = jax.random.normal(key.random, features.shape)

    In the upper level `key.step` is the outer step; in the lower level it counts draws, outer steps times the lower
    solver's steps. `key.random` is independent of the draw of the batch itself, and each of several agents or clients
    has its own. All else is the wrapped source's: how many samples there are, whether they are drawn, whose they are.

    Args:
      source: arrays (a full batch), or any source that is drawn from in the compiled loop; None: a level without
        data, whose batch is `(None, key)`.
    """

    def __init__(self, source: Any = None) -> None:
        if isinstance(source, Keyed) or as_source(source).host:
            raise TypeError(
                "Keyed wraps arrays or a source that is drawn from in the compiled loop, not a "
                f"{type(source).__name__}."
            )
        self.source = as_source(source)

    arrays, size, count, random, parties, owners, even, stacked, shares, check = (  # type: ignore[assignment]
        property(operator.attrgetter(f"source.{name}"))
        for name in ("arrays", "size", "count", "random", "parties", "owners", "even", "stacked", "shares", "check")
    )

    @property
    def varies(self) -> bool:
        """The key does."""
        return True

    redrawn = varies

    def draw(self, key: StepKey) -> PyTree:
        """The batch of this step, and its key."""
        return self.source.draw(key), key.fold_in(Draw.KEYED)

    def full(self, key: StepKey | None = None) -> PyTree:
        """All samples, and the key."""
        key = as_step_key(0) if key is None else key
        return self.source.full(key), key.fold_in(Draw.KEYED)

    def draw_each(self, key: StepKey, who: jax.Array | None = None) -> PyTree:
        """Each party's batch, and for each a key of its own: what they draw by it is independent too."""
        own = jnp.arange(self.source.parties) if who is None else jnp.asarray(who)
        step = key.fold_in(Draw.KEYED)
        keys = jax.vmap(lambda i: jax.tree.map(jnp.asarray, step.fold_in(i)))(own)
        return self.source.draw_each(key, who), keys

    def describe(self) -> Description:
        """What is wrapped."""
        inner = self.source.describe()
        return inner._replace(kind=f"Keyed {inner.kind}")

    def __repr__(self) -> str:
        return f"Keyed({self.source!r})"


class Shared(Source, leaves=("source",)):
    """One draw per outer step, the same wherever it is asked for: in the upper level, in the lower one, in all of the
    lower solver's steps.

        tasks = data.Shared(data.Sampler(draw_tasks))       # {"support": ..., "query": ...}
        Problem(query_loss, support_loss, upper_data=tasks, lower_data=tasks)

    Without it each level draws for itself, and each lower step anew: an upper loss would judge other tasks than those
    that the lower level has learnt. With `Keyed` inside, the key is one as well.

    Args:
      source: any source that is drawn from in the compiled loop.
    """

    shared = True

    def __init__(self, source: Any) -> None:
        if isinstance(source, Shared) or as_source(source).host or not as_source(source).given:
            what = (
                "a Stream, which is read item by item: use a Sampler or Minibatches"
                if (as_source(source).host)
                else type(source).__name__
            )
            raise TypeError(f"Shared wraps a source that is drawn from in the compiled loop, not {what}.")
        self.source = as_source(source)

    arrays, size, count, random, parties, owners, even, stacked, shares, check, varies, redrawn = (  # type: ignore[assignment]
        property(operator.attrgetter(f"source.{name}"))
        for name in (
            "arrays", "size", "count", "random", "parties", "owners", "even", "stacked", "shares", "check", "varies",
            "redrawn",
        )
    )  # fmt: skip

    @staticmethod
    def _of_step(key: StepKey) -> StepKey:
        """The lower level's first draw of this step, whoever asks."""
        return StepKey(key.base, key.step, jnp.uint32(0)).fold_in(Draw.LOWER)

    def draw(self, key: StepKey) -> PyTree:
        """The batch of this step."""
        return self.source.draw(self._of_step(key))

    def full(self, key: StepKey | None = None) -> PyTree:
        """All samples, or this step's draw."""
        return self.source.full(None if key is None else self._of_step(key))

    def whole(self) -> Source | None:
        """Where the wrapped source has all samples: those."""
        return self.source.whole()

    def draw_each(self, key: StepKey, who: jax.Array | None = None) -> PyTree:
        """Each party's batch."""
        return self.source.draw_each(self._of_step(key), who)

    def describe(self) -> Description:
        """What is wrapped."""
        inner = self.source.describe()
        return inner._replace(kind=f"Shared {inner.kind}")

    def __repr__(self) -> str:
        return f"Shared({self.source!r})"


def warn_of_one_object(upper: Any, lower: Any) -> None:
    """A warning where one random source stands in both levels, which draw from it by themselves."""
    shared = [isinstance(_bare(level, (Keyed,)), Shared) for level in (upper, lower)]
    upper, lower = (_bare(level, (Keyed, Shared)) for level in (upper, lower))
    if upper is lower and isinstance(upper, Source) and upper.random and not all(shared):
        if any(shared):
            cure = f"write it around the {('upper', 'lower')[shared[0]]} level's too: data.Shared stands in one alone"
        elif upper.host:
            cure = "make two objects, each of an iterable of its own"
        else:
            cure = (
                "write data.Shared(...) around it where both are to see the same batch, or make two objects where not"
            )
        warnings.warn(
            f"upper_data and lower_data are one object, {upper!r}, and each level draws from it by itself: in one step "
            f"they see different batches. To say which is meant, {cure}.",
            stacklevel=4,
        )


def _bare(source: Any, wrappers: tuple[type[Keyed] | type[Shared], ...]) -> Any:
    while isinstance(source, wrappers):
        source = source.source
    return source


def of_one_step(source: Source) -> bool:
    """Whether all of a step's batches are one draw (`Shared`, with keys or without), of which there is no end."""
    return _bare(source, (Keyed,)).shared and source.redrawn


def as_keyed(owner: str, *batch: Any) -> tuple[PyTree, StepKey]:
    """A batch of `data.Keyed` in its two parts; an error where it is another."""
    if len(batch) == 1 and isinstance(batch[0], tuple) and len(batch[0]) == 2 and isinstance(batch[0][1], StepKey):
        return batch[0]
    raise ValueError(
        f"{owner} needs the step's key with each batch: wrap the level's data, data.Keyed(data.Minibatches(...)), or "
        "data.Keyed() where the level has no data."
    )


class Clients(Source, leaves=("arrays", "counts", "offsets")):
    """One data set per client, of unequal sizes.

    The samples stand one client after the other in one set of arrays, with the offset of each: no padding. To a
    centralised solver this is the pooled data set (the objective is the mean over all samples); federated and
    decentralised solvers draw each client's own samples.

    Args:
      datasets: a sequence of pytrees of arrays, alike but for their leading lengths.
      size: samples per batch; None for full batches (a centralised solver then sees all samples at every step).
    """

    owners = "client"

    def __init__(self, datasets: Sequence[PyTree], size: int | None = None) -> None:
        if hasattr(datasets, "shape") or isinstance(datasets, (str, bytes, collections.abc.Mapping)):
            raise ProblemError(
                f"Clients takes a list with one data set per client, not a {type(datasets).__name__}: "
                "Clients([(X_0, t_0), (X_1, t_1), ...]). Arrays of one size, stacked over clients, are data.Agents."
            )
        datasets = [as_arrays(d, f"client {c}'s data") for c, d in enumerate(datasets)]
        if not datasets:
            raise ProblemError("Clients needs at least one client's data set; the sequence is empty.")
        structures = [jax.tree.structure(d) for d in datasets]
        for c, structure in enumerate(structures):
            if structure != structures[0]:  # type: ignore[operator]
                raise ProblemError(
                    f"Client {c}'s data have the structure {structure}, client 0's {structures[0]}: make them alike."
                )
        counts = [sample_count(d, f"client {c}'s data") for c, d in enumerate(datasets)]
        shapes = [[np.shape(leaf)[1:] for leaf in jax.tree.leaves(d)] for d in datasets]
        for c, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ProblemError(
                    f"A sample of client {c} has the shape {shape}, one of client 0 {shapes[0]}: make them alike."
                )
        _check_size("Clients", size, min(counts), "the smallest client has")
        self.arrays = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *datasets)
        self.counts = np.asarray(counts, np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
        self.size, self.random, self.parties, self.even = size, size is not None, len(counts), len(set(counts)) == 1

    def __len__(self) -> int:
        return self.counts.shape[0]

    def shares(self) -> jax.Array:
        """Each client's share of the samples, times the number of clients."""
        counts = jnp.asarray(self.counts)
        return counts * (len(self) / counts.sum())

    def draw(self, key: StepKey) -> PyTree:
        """A batch of the pooled samples."""
        return self.arrays if self.size is None else Minibatches(self.arrays, self.size).draw(key)

    def draw_client(self, key: StepKey, client: Any, size: int) -> PyTree:
        """`size` of one client's samples, without replacement within an epoch of that client (`client`.

        Also traced).
        """
        count = jnp.asarray(self.counts)[client].astype(jnp.uint32)
        per_epoch = jnp.maximum(count // jnp.uint32(size), 1)
        seed = mix(epoch_seed(stream_seed(key), key.step // per_epoch) ^ jnp.asarray(client, jnp.uint32))
        rows = permute(_slots(key, per_epoch, size) % count, count, seed) + jnp.asarray(self.offsets)[client]
        return _take(self.arrays, rows)

    def draw_each(self, key: StepKey, who: jax.Array | None = None) -> PyTree:
        """Each client's batch, stacked; full batches where all clients have equally many samples."""
        size = self.size if self.size is not None else self.count // len(self)  # type: ignore[operator]
        return jax.vmap(lambda c: self.draw_client(key, c, size))(jnp.arange(len(self)) if who is None else who)

    def describe(self) -> Description:
        """The arrays and whose they are."""
        settings = {"clients": len(self.counts), "size": self.size, "counts": self.counts}
        return Description("Clients", settings, self.arrays)

    def __repr__(self) -> str:
        return f"Clients({len(self)} clients, {self.count} samples, size={self.size})"


class Agents(Source):
    """One data set per agent, all of one size: arrays with two leading axes, (agents, samples, ...).

    Decentralised and federated solvers hand each agent its own samples; an axis sharded over a mesh puts each agent's
    on its own device. To a centralised solver this is the pooled data set. For unequal sizes: `Clients`.

    Args:
      arrays: pytree of arrays (agents, samples, ...).
      size: samples per agent and batch, drawn without replacement within an epoch of that agent; None for full
        batches.
    """

    owners = "agent"
    stacked = True

    def __init__(self, arrays: PyTree, size: int | None = None) -> None:
        arrays = as_arrays(arrays, "Agents' arrays")
        sample_count(arrays, "Agents' arrays (agents, samples, ...)")
        n = sample_count(jax.tree.map(lambda a: np.empty(np.shape(a)[1:], bool), arrays), "each agent's arrays")
        _check_size("Agents", size, n, "each agent has")
        self.arrays, self.size, self.random = arrays, size, size is not None

    @classmethod
    def stack(cls, datasets: Sequence[PyTree], size: int | None = None) -> Agents:
        """From a sequence of data sets of equal shapes."""
        datasets = list(datasets)
        shapes = [jax.tree.map(np.shape, d) for d in datasets]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"Agents need data of equal shapes: agent {i} has {shape}, agent 0 {shapes[0]}. "
                    "Use data.Clients for unequal sizes."
                )
        if not datasets:
            raise ValueError("Agents needs at least one agent's data set; the sequence is empty.")
        return cls(jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *datasets), size)

    def __len__(self) -> int:
        return jax.tree.leaves(self.arrays)[0].shape[0]

    @property
    def parties(self) -> int:  # type: ignore[override]
        """The number of agents."""
        return len(self)

    @property
    def count(self) -> int:
        """The number of samples of all agents together."""
        return len(self) * self.samples

    @property
    def samples(self) -> int:
        """The number of samples of each agent."""
        return jax.tree.leaves(self.arrays)[0].shape[1]

    def draw(self, key: StepKey) -> PyTree:
        """A batch of the pooled samples."""
        return self.full() if self.size is None else Minibatches(self.full(), self.size).draw(key)

    def draw_each(self, key: StepKey, who: jax.Array | None = None) -> PyTree:
        """Each agent's batch, (agents, size, ...)."""
        agents = jnp.arange(len(self)) if who is None else who
        if self.size is None:
            return self.arrays if who is None else jax.tree.map(lambda a: jnp.asarray(a)[agents], self.arrays)
        per_epoch = jnp.uint32(self.samples // self.size)
        epoch = epoch_seed(stream_seed(key), key.step // per_epoch)
        slots = _slots(key, per_epoch, self.size)
        rows = jax.vmap(lambda i: permute(slots, self.samples, mix(epoch ^ jnp.asarray(i, jnp.uint32))))(agents)
        if who is None:  # along the agents' axis alone, so that nothing of a sharded axis travels
            take = jax.vmap(lambda a, rows: a.at[rows].get(mode="promise_in_bounds"))
            return jax.tree.map(lambda a: take(jnp.asarray(a), rows), self.arrays)
        at = agents[:, None]
        return jax.tree.map(lambda a: jnp.asarray(a).at[at, rows].get(mode="promise_in_bounds"), self.arrays)

    def full(self, key: StepKey | None = None) -> PyTree:
        """All samples of all agents."""
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), self.arrays)

    def describe(self) -> Description:
        """The arrays and whose they are."""
        return Description("Agents", {"agents": len(self), "size": self.size}, self.arrays)

    def __repr__(self) -> str:
        return f"Agents({len(self)} agents of {self.samples} samples, size={self.size})"


def _is_function(iterable: Any) -> bool:
    """Whether a stream was given as `start -> iterator`; a dataset class that can be called is still an iterable."""
    return callable(iterable) and not isinstance(iterable, collections.abc.Iterable)


class Stream(Source, leaves=None):
    """Batches from the host, for data that do not fit on the device.

    `solve` reads ahead in a thread, which copies the items into segments of up to 16 MiB that the compiled loop takes
    whole; step k consumes items `k * draws, ..., k * draws + draws - 1`. All items must have equal shapes and dtypes.
    The iterable is iterated afresh at the start of each run, again from its beginning whenever it ends, and on resume
    the items already consumed are skipped: for an exact resume iterating must give the same items every time.

    Args:
      iterable: an iterable of batches (pytrees of arrays, of torch or TensorFlow tensors, of tables): a list, a torch
        DataLoader, a tf.data.Dataset; or a function `start -> iterator` that begins at
        item `start` (a cheap skip on resume).
      draws: items consumed per step, for solvers that draw several batches per step: a lower solver of n steps has an
        item for each with `draws=n`, and a warning is given where it has fewer, and some of its steps the same one.
    """

    host, count = True, None  # type: ignore[assignment]

    def __init__(self, iterable: Iterable[PyTree] | Callable[[int], Iterator[PyTree]], draws: int = 1) -> None:
        if not callable(iterable) and not isinstance(iterable, collections.abc.Iterable):
            raise TypeError(
                f"Stream needs an iterable of batches or a function start -> iterator, not {type(iterable).__name__}."
            )
        if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < 1:
            raise ValueError(
                f"Stream(draws={draws!r}): the number of items per step is a positive integer: at least one item per "
                "step is consumed."
            )
        self.iterable, self.draws = iterable, draws

    def items(self, start: int = 0) -> Iterator[PyTree]:
        """Items from number `start` on, endlessly."""
        given: Any = self.iterable
        skip, first = start, True
        while True:
            count = 0
            for count, item in enumerate(given(skip) if _is_function(given) else given, 1):
                if _is_function(given) or count > skip:
                    yield as_arrays(item, "the stream's item")
            if not count:
                what = (
                    "is empty: it produced no batch" if first else "ended and cannot be iterated again (a generator?)"
                )
                if hasattr(given, "__next__"):
                    what = "is used up, and a generator cannot be iterated again (its first batches were looked at)"
                raise ValueError(f"The stream {what}. Give a list, a loader object, or a function start -> iterator.")
            skip, first = 0 if _is_function(given) else max(skip - count, 0), False

    def first(self, size: int, most: int) -> tuple[list[PyTree], bool]:
        """Its first items, up to `size` bytes (one at least) and `most` in number, and whether they are all it has."""
        given: Any = self.iterable
        found: list[PyTree] = []
        for item in given(0) if _is_function(given) else given:
            found.append(jax.tree.map(np.asarray, as_arrays(item, "the stream's item")))
            size -= sum(leaf.nbytes for leaf in jax.tree.leaves(found[-1]))
            if size <= 0 or len(found) == most:
                return found, False
        return found, True

    def example(self) -> PyTree:
        """The first item."""
        return jax.tree.map(np.asarray, next(self.items()))

    def full(self, key: StepKey | None = None) -> PyTree:
        """There is no full batch."""
        raise ProblemError(
            "A Stream has no full batch: its data do not fit on the device. Evaluate on samples of your own."
        )

    def describe(self) -> Description:
        """The first item stands for all; that of an iterator would be used up by looking."""
        looked = _is_function(self.iterable) or not hasattr(self.iterable, "__next__")
        return Description("Stream", {"draws": self.draws}, next(self.items()) if looked else None, sampled=True)

    def __repr__(self) -> str:
        return f"Stream({type(self.iterable).__name__}, draws={self.draws})"


class Draws(Source, leaves=("arrays",)):
    """Draws that were made once, stacked: a loss is the mean over them, which estimates that over all there are, or
    is it where they are `exact`. Each has a y of its own where they are `separate`; a level without data is not
    `given`."""

    random, averaged = False, True

    def __init__(self, arrays: PyTree, exact: bool = False, separate: bool = False, given: bool = True) -> None:
        self.arrays, self.exact, self.separate, self.given = arrays, exact, separate, given

    def draw(self, key: StepKey) -> PyTree:
        """All of them."""
        return self.arrays

    def full(self, key: StepKey | None = None) -> PyTree:
        """All of them."""
        return self.arrays


class Streamed(Source, leaves=("items",)):
    """The items of one step of a `Stream`, as the compiled loop sees them; `whole`: they are all that it has."""

    count = None  # type: ignore[assignment]

    def __init__(self, items: PyTree, draws: int, whole: bool = False) -> None:
        self.items, self.draws, self.whole_stream = items, draws, whole

    def asked(self, total: Any) -> None:
        """Warn where a step asks for more draws than it has items."""
        if isinstance(total, int) and total > self.draws and not self.whole_stream:
            warnings.warn(
                f"The lower solver takes {total} steps for each step of the run, and Stream(draws={self.draws}) has "
                f"{self.draws} of its items for them, which come again: Stream(..., draws={total}) has one for each.",
                stacklevel=2,
            )

    def draw(self, key: StepKey) -> PyTree:
        """Item `key.step mod draws` of this step."""
        which = (key.step % jnp.uint32(self.draws)).astype(jnp.int32)
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, which, keepdims=False), self.items)
