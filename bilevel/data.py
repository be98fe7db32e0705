"""What a level's data can be, and how a batch is drawn inside a compiled loop.

A source has no state. The batch of step k is a function of the run's key and of k, so that results depend neither on
how many steps are compiled together nor on where a run was interrupted.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel._module import state

PyTree = Any

__all__ = ["Agents", "Clients", "Keyed", "Minibatches", "Sampler", "StepKey", "Stream", "as_step_key", "permute"]


@state
class StepKey:
    """The key of one step: the run's key together with the step's index and a stream.

    The index travels with the key so that an epoch without replacement needs no sampler state.

    Attributes:
      base: the run's PRNG key, the same at every step.
      step: uint32, the index of the draw.
      stream: uint32, tells independent uses within one step apart.
    """

    base: jax.Array
    step: jax.Array
    stream: jax.Array

    @property
    def random(self) -> jax.Array:
        """A PRNG key for `jax.random`, fresh at every step and in every stream."""
        return jax.random.fold_in(jax.random.fold_in(self.base, self.stream), self.step)

    def fold_in(self, tag: int) -> StepKey:
        """The same step in another stream: draws that are independent of this one's."""
        return StepKey(self.base, self.step, _mix(self.stream * jnp.uint32(0x01000193) + jnp.uint32(tag + 1)))

    def inner(self, i: Any, total: int) -> StepKey:
        """The key of inner step `i` of `total`: draw number `step * total + i` of the same stream."""
        return StepKey(self.base, self.step * jnp.uint32(total) + jnp.asarray(i, jnp.uint32), self.stream)


def as_step_key(key: Any, step: Any = 0) -> StepKey:
    """A `StepKey` from an integer seed, a PRNG key or a `StepKey` (returned as it is)."""
    if isinstance(key, StepKey):
        return key
    if isinstance(key, (int, np.integer)):
        key = jax.random.key(int(key))
    elif not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return StepKey(key, jnp.asarray(step, jnp.uint32), jnp.uint32(0))


def _mix(h: jax.Array) -> jax.Array:
    """A bijective hash of 32 bits (multiplications and shifts only, so that it fuses with what follows)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


_ROUNDS, _AT_ONCE = 9, 3


def permute(i: Any, n: Any, seed: jax.Array) -> jax.Array:
    """The image of `i` under a keyed permutation of 0, ..., n-1, computed without the other n-1 images.

    A random rotation, then eight rounds of swap-or-not: each pairs i with k - i mod n for a random k, and swaps the two or
    not by a hashed coin, which depends on the pair alone. Every round is a bijection of 0..n-1 for any n, without a table.
    A single image is uniform thanks to the rotation, and two images are independent but for about 2^-8: enough for the
    order of batches.

    Args:
      i: integer array of indices in 0..n-1.
      n: number of elements, below 2^31; may be traced.
      seed: uint32 scalar.

    Reference: Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012.
    """
    n = jnp.asarray(n, jnp.uint32)
    # As a loop and not written out: XLA:CPU compiles a loop this small to one kernel, the rounds in a row to dozens.
    rounds = lambda r, i: _rounds(r, i, n, seed)  # noqa: E731
    return jax.lax.fori_loop(0, _ROUNDS // _AT_ONCE, rounds, jnp.asarray(i, jnp.uint32)).astype(jnp.int32)


def _rounds(r: Any, i: jax.Array, n: jax.Array, seed: jax.Array) -> jax.Array:
    for u in range(_AT_ONCE):
        i = _swap_or_not(r * _AT_ONCE + u, i, n, seed)
    return i


def _swap_or_not(r: Any, i: jax.Array, n: jax.Array, seed: jax.Array) -> jax.Array:
    """Round r of the permutation; round 0 is the rotation."""
    key = _mix(seed + jnp.uint32(0x9E3779B9) * jnp.asarray(r, jnp.uint32))
    k = key % n
    other = jnp.where(i <= k, k - i, k + n - i)
    coin = (jnp.maximum(i, other) ^ key) * jnp.uint32(0x7FEB352D)
    coin = ((coin ^ (coin >> 15)) * jnp.uint32(0x846CA68B)) >> 31
    return jnp.where((coin == 1) | (r == 0), other, i)


def _in_epoch(step: jax.Array, n: int, stream: jax.Array) -> jax.Array:
    """permute(step mod n, n, seed of the epoch step // n): the scalar that a block sampler draws at every step.

    The division is done in the loop's round 0, so that XLA:CPU has one kernel to launch.
    """
    count = jnp.uint32(n)

    def rounds(r: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, seed = carry
        first = r == 0
        seed = jnp.where(first, _epoch_seed(seed, i // count), seed)
        return _rounds(r, jnp.where(first, i % count, i), count, seed), seed

    return jax.lax.fori_loop(0, _ROUNDS // _AT_ONCE, rounds, (step, stream))[0].astype(jnp.int32)


def _seed(key: StepKey, epoch: Any) -> jax.Array:
    """The seed of an epoch's permutation."""
    return _epoch_seed(_stream_seed(key), epoch)


def _stream_seed(key: StepKey) -> jax.Array:
    words = jax.random.key_data(key.base).reshape(-1)
    h = key.stream
    for w in range(words.shape[0]):
        h = _mix(h ^ words[w])
    return h


def _epoch_seed(h: jax.Array, epoch: Any) -> jax.Array:
    return _mix(h + jnp.asarray(epoch, jnp.uint32) * jnp.uint32(0x9E3779B9))


def sample_count(arrays: PyTree, name: str) -> int:
    """The length of the leading axis that all leaves share; an error that names the leaves where they do not."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if not leaves:
        raise ValueError(f"{name} holds no arrays: give a pytree of arrays with a leading sample axis.")
    counts = {}
    for path, leaf in leaves:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if np.ndim(leaf) == 0:
            raise ValueError(f"{where} is a scalar: every leaf of the data needs a leading sample axis.")
        counts[where] = np.shape(leaf)[0]
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{where} has {count}" for where, count in counts.items())
        raise ValueError(f"The leaves of {name} disagree on the number of samples: {listed}. Make them equal.")
    count = next(iter(counts.values()))
    if count == 0:
        raise ValueError(f"{name} has zero samples: give at least one.")
    return count


@jax.tree_util.register_pytree_node_class
class Minibatches:
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

    def __init__(self, arrays: PyTree, size: int, *, replace: bool = False, blocks: bool = False) -> None:
        n = sample_count(arrays, "Minibatches' arrays")
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"Minibatches(size={size!r}): the batch size is a positive integer.")
        if size > n:
            raise ValueError(
                f"Minibatches(size={size}) exceeds the {n} samples: lower the size, or pass the arrays bare for full batches."
            )
        if replace and blocks:
            raise ValueError("Minibatches: blocks=True draws without replacement; choose one of replace and blocks.")
        self.arrays, self.size, self.replace, self.blocks = arrays, int(size), replace, blocks

    def tree_flatten(self) -> tuple[Any, Any]:
        """The arrays are leaves, the rest is static."""
        return (self.arrays,), (self.size, self.replace, self.blocks)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Minibatches:
        """Rebuild without validation (leaves may be tracers)."""
        self = object.__new__(cls)
        (self.arrays,) = children
        self.size, self.replace, self.blocks = aux
        return self

    @property
    def count(self) -> int:
        """The number of samples."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    @property
    def batches(self) -> int:
        """The number of batches in an epoch."""
        return -(-self.count // self.size) if self.blocks else self.count // self.size

    def block(self, key: StepKey) -> jax.Array:
        """The number (0..batches-1) of the batch that `draw(key)` returns; only with `blocks=True`."""
        return _in_epoch(key.step, self.batches, _stream_seed(key))

    def take(self, block: jax.Array) -> PyTree:
        """The batch of that number; only with `blocks=True`."""
        start = jnp.minimum(block * self.size, self.count - self.size)
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, self.size), self.arrays)

    def draw(self, key: StepKey) -> PyTree:
        """The batch of this step."""
        if self.blocks:
            return self.take(self.block(key))
        if self.replace:
            rows = jax.random.randint(key.random, (self.size,), 0, self.count)
        else:
            per_epoch = jnp.uint32(self.batches)
            first = (key.step % per_epoch) * jnp.uint32(self.size)
            slots = first + jnp.arange(self.size, dtype=jnp.uint32)
            rows = permute(slots, self.count, _seed(key, key.step // per_epoch))
        return jax.tree.map(lambda a: jnp.asarray(a).at[rows].get(mode="promise_in_bounds"), self.arrays)

    def full(self) -> PyTree:
        """All samples."""
        return self.arrays

    def __repr__(self) -> str:
        how = "with replacement" if self.replace else "in blocks" if self.blocks else "without replacement"
        return f"Minibatches({self.count} samples, size={self.size}, {how})"


@jax.tree_util.register_pytree_node_class
class Sampler:
    """Batches made by a function of the user's: `fn(key, arrays) -> batch`, pure, drawn inside the compiled loop.

    The function may put a key into the batch: randomness then reaches the losses through the batch, and one draw can
    be evaluated at two points.

    Args:
      fn: `fn(key, arrays) -> batch`, with `key` a `jax.random` key.
      arrays: any pytree of arrays, handed to `fn` (never baked into the compiled program).
    """

    def __init__(self, fn: Callable[[jax.Array, PyTree], PyTree], arrays: PyTree = None) -> None:
        if not callable(fn):
            raise TypeError(f"Sampler needs a function fn(key, arrays) -> batch, not {type(fn).__name__}.")
        self.fn, self.arrays = fn, arrays

    def tree_flatten(self) -> tuple[Any, Any]:
        """The arrays are leaves, the function is static."""
        return (self.arrays,), self.fn

    @classmethod
    def tree_unflatten(cls, fn: Any, children: Any) -> Sampler:
        """Rebuild without validation."""
        self = object.__new__(cls)
        self.fn, (self.arrays,) = fn, children
        return self

    def draw(self, key: StepKey) -> PyTree:
        """The batch of this step."""
        return self.fn(key.random, self.arrays)

    def __repr__(self) -> str:
        return f"Sampler({getattr(self.fn, '__name__', self.fn)!s})"


@jax.tree_util.register_pytree_node_class
class Keyed(Sampler):
    """Batches with the key they were drawn with: a loss is given `(batch, StepKey)` and can follow a schedule or draw noise.

        def upper(x, y, batch):
            (features, targets), key = batch
            strength = 0.1 * key.step          # a schedule
            noise = jax.random.normal(key.random, features.shape)

    In the upper level `key.step` is the outer step; in the lower level it counts draws, outer steps times the lower
    solver's steps. `key.random` is independent of the draw of the batch itself.

    Args:
      source: arrays (a full batch), `Minibatches`, `Sampler`, `Clients` or `Agents`; None: a level without data, whose batch is
        `(None, key)`.
    """

    def __init__(self, source: Any = None) -> None:
        if isinstance(source, (Stream, Keyed)):
            raise TypeError(
                f"Keyed wraps arrays or a source that is drawn from in the compiled loop, not a {type(source).__name__}."
            )
        self.arrays = source

    @property
    def fn(self) -> str:  # type: ignore[override]
        """What is drawn from, in words."""
        return repr(self.arrays) if hasattr(self.arrays, "draw") else "arrays"

    def tree_flatten(self) -> tuple[Any, Any]:
        """The source's leaves are leaves."""
        return (self.arrays,), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Keyed:
        """Rebuild without validation."""
        self = object.__new__(cls)
        (self.arrays,) = children
        return self

    def draw(self, key: StepKey) -> PyTree:
        """The batch of this step, and its key."""
        batch = self.arrays.draw(key) if hasattr(self.arrays, "draw") else self.arrays
        return batch, key.fold_in(0x4B)

    def __repr__(self) -> str:
        return f"Keyed({self.fn})"


@jax.tree_util.register_pytree_node_class
class Clients:
    """One data set per client, of unequal sizes.

    The samples stand one client after the other in one set of arrays, with the offset of each: no padding. To a
    centralised solver this is the pooled data set (the objective is the mean over all samples); federated and
    decentralised solvers draw from one client with `draw_client`.

    Args:
      datasets: a sequence of pytrees of arrays, alike but for their leading lengths.
      size: samples per batch; None for full batches (a centralised solver then sees all samples at every step).
    """

    def __init__(self, datasets: Sequence[PyTree], size: int | None = None) -> None:
        datasets = list(datasets)
        if not datasets:
            raise ValueError("Clients needs at least one client's data set; the sequence is empty.")
        structures = [jax.tree.structure(d) for d in datasets]
        for c, structure in enumerate(structures):
            if structure != structures[0]:  # type: ignore[operator]
                raise ValueError(
                    f"Client {c}'s data have the structure {structure}, client 0's {structures[0]}: make them alike."
                )
        counts = [sample_count(d, f"client {c}'s data") for c, d in enumerate(datasets)]
        if size is not None and not 1 <= size <= min(counts):
            raise ValueError(
                f"Clients(size={size}): the smallest client has {min(counts)} samples; the batch size must lie in 1..{min(counts)}."
            )
        self.arrays = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *datasets)
        self.counts = np.asarray(counts, np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
        self.size = size

    def tree_flatten(self) -> tuple[Any, Any]:
        """Arrays, counts and offsets are leaves."""
        return (self.arrays, self.counts, self.offsets), self.size

    @classmethod
    def tree_unflatten(cls, size: Any, children: Any) -> Clients:
        """Rebuild without validation."""
        self = object.__new__(cls)
        self.arrays, self.counts, self.offsets = children
        self.size = size
        return self

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def count(self) -> int:
        """The number of samples of all clients together."""
        return jax.tree.leaves(self.arrays)[0].shape[0]

    def draw(self, key: StepKey) -> PyTree:
        """A batch of the pooled samples."""
        return self.arrays if self.size is None else Minibatches(self.arrays, self.size).draw(key)

    def draw_client(self, key: StepKey, client: Any, size: int) -> PyTree:
        """`size` of one client's samples, without replacement within an epoch of that client (`client` may be traced)."""
        count = jnp.asarray(self.counts)[client].astype(jnp.uint32)
        per_epoch = jnp.maximum(count // jnp.uint32(size), 1)
        slots = (key.step % per_epoch) * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
        seed = _mix(_seed(key, key.step // per_epoch) ^ jnp.asarray(client, jnp.uint32))
        rows = permute(slots % count, count, seed) + jnp.asarray(self.offsets)[client]
        return jax.tree.map(lambda a: jnp.asarray(a).at[rows].get(mode="promise_in_bounds"), self.arrays)

    def full(self) -> PyTree:
        """All samples of all clients."""
        return self.arrays

    def __repr__(self) -> str:
        return f"Clients({len(self)} clients, {self.count} samples, size={self.size})"


@jax.tree_util.register_static
class Stream:
    """Batches from the host, for data that do not fit on the device.

    `solve` reads ahead in a thread, which copies the items into segments of up to 16 MiB that the compiled loop takes whole;
    step k consumes items `k * draws, ..., k * draws + draws - 1`. All items must have equal shapes and dtypes. The
    iterable is iterated afresh at the start of each run, again from its beginning whenever it ends, and on resume
    the items already consumed are skipped: for an exact resume iterating must give the same items every time.

    Args:
      iterable: an iterable of batches (pytrees of numpy arrays), or a function `start -> iterator` that begins at
        item `start` (a cheap skip on resume).
      draws: items consumed per step, for solvers that draw several batches per step.
    """

    def __init__(self, iterable: Iterable[PyTree] | Callable[[int], Iterator[PyTree]], draws: int = 1) -> None:
        if not callable(iterable) and not isinstance(iterable, collections.abc.Iterable):
            raise TypeError(
                f"Stream needs an iterable of batches or a function start -> iterator, not {type(iterable).__name__}."
            )
        if draws < 1:
            raise ValueError(f"Stream(draws={draws}): at least one item per step is consumed.")
        self.iterable, self.draws = iterable, draws

    def items(self, start: int = 0) -> Iterator[PyTree]:
        """Items from number `start` on, endlessly."""
        if callable(self.iterable):
            begun = start
            while True:
                produced = False
                for item in self.iterable(begun):
                    produced = True
                    yield item
                if not produced:
                    raise ValueError("The stream is empty: it produced no batch. Give an iterable with at least one.")
                begun = 0
        skip, first = start, True
        while True:
            produced = False
            for item in self.iterable:
                produced = True
                if skip:
                    skip -= 1
                else:
                    yield item
            if not produced:
                what = (
                    "The stream is empty: it produced no batch."
                    if first
                    else "The stream ended and cannot be iterated again (a generator?)."
                )
                raise ValueError(f"{what} Give a list, a loader object, or a function start -> iterator.")
            first = False

    def prefetched(self, start: int = 0) -> Prefetched:
        """The same items, read ahead by a thread."""
        return Prefetched(self.items(start), self.draws)

    def __repr__(self) -> str:
        return f"Stream({type(self.iterable).__name__}, draws={self.draws})"


_SEGMENT_BYTES, _SEGMENT_STEPS, _SEGMENTS_AHEAD = 2**24, 4096, 4
_PATIENCE = 0.05  # seconds that a loop with a step's items at hand waits for a fuller segment


class Prefetched:
    """The items of a stream, which a thread copies into segments ahead of the loop.

    A segment is an array per leaf, with rows for as many steps as 16 MiB hold (1 to 4096): one shape, hence one compiled loop,
    and one transfer for many steps. Four full ones are kept ahead. Where the source is the slower side the loop is handed a
    segment with the steps that there are; rows beyond them hold zeros or older items. Errors of the source are raised
    where its items would have been consumed.

    Args:
      items: an endless iterator of pytrees of equal shapes and dtypes.
      draws: items per step.

    Attributes:
      steps: the steps that a segment holds, known once some are ready.
    """

    def __init__(self, items: Iterator[PyTree], draws: int = 1) -> None:
        self._draws = draws
        self._changed = threading.Condition()
        self._full: collections.deque[_Segment] = collections.deque()  # handed over by the thread
        self._spare: list[_Segment] = []  # consumed, to be written again
        self._filling: _Segment | None = None  # being written by the thread, `_filled` whole steps of it readable
        self._filled = 0
        self.steps = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._current: _Segment | None = None
        self._first, self._end = 0, 0
        # Processes of one program must cut their steps alike, which partly filled segments would not be.
        self._patience = _PATIENCE if jax.process_count() == 1 else None
        self._thread = threading.Thread(target=self._work, args=(items,), daemon=True)
        self._thread.start()

    def _work(self, items: Iterator[PyTree]) -> None:
        try:
            segment: _Segment | None = None
            row, first = 0, None
            for number, item in enumerate(items):
                item = jax.tree.map(np.asarray, item)
                shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), item)
                if first is None:
                    first = shapes
                    size = self._draws * sum(leaf.nbytes for leaf in jax.tree.leaves(item))
                    self.steps = min(max(_SEGMENT_BYTES // max(size, 1), 1), _SEGMENT_STEPS)
                if shapes != first:
                    raise ValueError(
                        f"Item {number} of the stream has the shapes and dtypes {shapes}, the first had {first}: give items of "
                        "equal shapes (drop or pad a last batch that is smaller)."
                    )
                if segment is None:
                    segment, row = self._fresh(item), 0
                segment.write(row, item)
                row += 1
                with self._changed:
                    if self._filling is not segment and row > 1:  # it was taken meanwhile, with `_filled` steps
                        taken, segment = segment, self._fresh(item)
                        rest = range(self._filled * self._draws, row)
                        row = len(rest)
                        for to, i in enumerate(rest):
                            segment.write(to, taken.row(i))
                    self._filling, self._filled = segment, row // self._draws
                    if self._filled == self.steps:
                        self._full.append(segment)
                        segment = self._filling = None
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._stopped or len(self._full) < _SEGMENTS_AHEAD)
                    if self._stopped:
                        return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _fresh(self, item: PyTree) -> _Segment:
        return self._spare.pop() if self._spare else _Segment(item, self.steps * self._draws)

    def _at_hand(self, steps: int) -> bool:
        return bool(self._full) or self._error is not None or (self._filling is not None and self._filled >= steps)

    def ready(self, steps: int) -> tuple[PyTree, int, int]:
        """Up to `steps` steps, without consuming them: `(segment, first, count)`, with the items of step i in rows (first + i) draws, ..."""
        if self._first == self._end:
            self._next(steps)
        assert self._current is not None
        return self._current.placed(), self._first, min(steps, self._end - self._first)

    def _next(self, steps: int) -> None:
        with self._changed:
            if self._current is not None:
                self._spare.append(self._current.released())
            if self._patience is not None:
                self._changed.wait_for(lambda: self._at_hand(steps), self._patience)
                self._changed.wait_for(lambda: self._at_hand(1))
            else:
                self._changed.wait_for(lambda: bool(self._full) or self._error is not None)
            if self._full:
                self._current, self._end = self._full.popleft(), self.steps
            elif self._filling is not None and self._filled:
                self._current, self._end = self._filling, self._filled
                self._filling = None
            elif self._error is not None:
                raise self._error
            self._first = 0
            self._changed.notify_all()
            ahead = list(self._full)
        # Here and not in the thread, whose jax settings may be others; what lies ahead is transferred during the step.
        for segment in ahead:
            segment.placed()

    def consume(self, steps: int) -> None:
        """The first `steps` of the steps that are ready have been used."""
        self._first += steps

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=5)


class _Segment:
    """Rows in host memory, and the device's arrays of them.

    The memory begins on a boundary of 64 bytes, so that on a CPU the device's array is this memory and not a copy. It may be
    written again only after `released`, and that only when nothing that was computed from the array is pending.
    """

    def __init__(self, item: PyTree, rows: int) -> None:
        def zeros(leaf: np.ndarray) -> np.ndarray:
            memory = np.zeros(rows * leaf.nbytes + 64, np.uint8)  # what is not written yet may still be cast
            begin = -memory.ctypes.data % 64
            return memory[begin : begin + rows * leaf.nbytes].view(leaf.dtype).reshape(rows, *leaf.shape)

        self._rows = jax.tree.map(zeros, item)
        self._placed: PyTree = None

    def write(self, row: int, item: PyTree) -> None:
        """Put an item in its row."""
        for rows, leaf in zip(jax.tree.leaves(self._rows), jax.tree.leaves(item), strict=True):
            rows[row] = leaf

    def row(self, row: int) -> PyTree:
        """The item in a row."""
        return jax.tree.map(lambda rows: rows[row], self._rows)

    def placed(self) -> PyTree:
        """On the device."""
        if self._placed is None:
            self._placed = jax.tree.map(jax.device_put, self._rows)
        return self._placed

    def released(self) -> _Segment:
        """With the device's arrays deleted."""
        jax.tree.map(lambda leaf: leaf.delete(), self._placed)
        self._placed = None
        return self


@jax.tree_util.register_pytree_node_class
class Streamed:
    """The items of one step of a `Stream`, as the compiled loop sees them."""

    def __init__(self, items: PyTree, draws: int) -> None:
        self.items, self.draws = items, draws

    def tree_flatten(self) -> tuple[Any, Any]:
        """The items are leaves."""
        return (self.items,), self.draws

    @classmethod
    def tree_unflatten(cls, draws: Any, children: Any) -> Streamed:
        """Rebuild."""
        return cls(children[0], draws)

    def draw(self, key: StepKey) -> PyTree:
        """Item `key.step mod draws` of this step."""
        which = (key.step % jnp.uint32(self.draws)).astype(jnp.int32)
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, which, keepdims=False), self.items)


@jax.tree_util.register_pytree_node_class
class Agents:
    """One data set per agent, all of one size: arrays with two leading axes, (agents, samples, ...).

    Decentralised and federated solvers hand each agent its own samples; an axis sharded over a mesh puts each agent's on its
    own device. To a centralised solver this is the pooled data set. For unequal sizes: `Clients`.

    Args:
      arrays: pytree of arrays (agents, samples, ...).
      size: samples per agent and batch, drawn without replacement within an epoch of that agent; None for full batches.
    """

    def __init__(self, arrays: PyTree, size: int | None = None) -> None:
        sample_count(arrays, "Agents' arrays (agents, samples, ...)")
        n = sample_count(jax.tree.map(lambda a: np.empty(np.shape(a)[1:], bool), arrays), "each agent's arrays")
        if size is not None and not 1 <= size <= n:
            raise ValueError(f"Agents(size={size}): each agent has {n} samples; the batch size must lie in 1..{n}.")
        self.arrays, self.size = arrays, size

    @classmethod
    def stack(cls, datasets: Sequence[PyTree], size: int | None = None) -> Agents:
        """From a sequence of data sets of equal shapes."""
        datasets = list(datasets)
        shapes = [jax.tree.map(np.shape, d) for d in datasets]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"Agents need data of equal shapes: agent {i} has {shape}, agent 0 {shapes[0]}. Use data.Clients for unequal sizes."
                )
        if not datasets:
            raise ValueError("Agents needs at least one agent's data set; the sequence is empty.")
        return cls(jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *datasets), size)

    def tree_flatten(self) -> tuple[Any, Any]:
        """The arrays are leaves."""
        return (self.arrays,), self.size

    @classmethod
    def tree_unflatten(cls, size: Any, children: Any) -> Agents:
        """Rebuild without validation."""
        self = object.__new__(cls)
        (self.arrays,), self.size = children, size
        return self

    def __len__(self) -> int:
        return jax.tree.leaves(self.arrays)[0].shape[0]

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

    def _rows(self, key: StepKey, agent: Any) -> jax.Array:
        assert self.size is not None
        per_epoch = jnp.uint32(self.samples // self.size)
        slots = (key.step % per_epoch) * jnp.uint32(self.size) + jnp.arange(self.size, dtype=jnp.uint32)
        return permute(slots, self.samples, _mix(_seed(key, key.step // per_epoch) ^ jnp.asarray(agent, jnp.uint32)))

    def draw_agents(self, key: StepKey) -> PyTree:
        """Every agent's batch, (agents, size, ...): each from its own samples, in an order of its own."""
        if self.size is None:
            return self.arrays
        rows = jax.vmap(lambda agent: self._rows(key, agent))(jnp.arange(len(self)))
        take = jax.vmap(lambda a, rows: a.at[rows].get(mode="promise_in_bounds"))
        return jax.tree.map(lambda a: take(jnp.asarray(a), rows), self.arrays)

    def draw_agent(self, key: StepKey, agent: Any) -> PyTree:
        """One agent's batch (`agent` may be traced): its row of `draw_agents(key)`."""
        if self.size is None:
            return jax.tree.map(lambda a: jnp.asarray(a)[agent], self.arrays)
        rows = self._rows(key, agent)
        return jax.tree.map(lambda a: jnp.asarray(a).at[agent, rows].get(mode="promise_in_bounds"), self.arrays)

    def full(self) -> PyTree:
        """All samples of all agents."""
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), self.arrays)

    def __repr__(self) -> str:
        return f"Agents({len(self)} agents of {self.samples} samples, size={self.size})"


SOURCES: tuple[Any, ...] = (Minibatches, Sampler, Clients, Agents, Stream, Streamed)
