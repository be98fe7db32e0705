"""Data read on the host: a thread copies a stream's items into segments, which the compiled loop takes whole."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import Streamed, as_source
from bilevel.problem import Problem
from bilevel.typing import PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=("items", "first"), meta_fields=("draws",))
@dataclasses.dataclass(frozen=True)
class Portion:
    """A stream's items for consecutive steps, an argument of the compiled loop.

    Attributes:
      items: arrays with the items of step i (0, 1, ... within the portion) in rows (first + i) draws, ... of them.
      first: uint32, the steps in the arrays that come before the portion.
      draws: items per step; static.
    """

    items: PyTree
    first: Any
    draws: int

    @property
    def room(self) -> int:
        """The steps that the arrays hold."""
        return jax.tree.leaves(self.items)[0].shape[0] // self.draws

    def of(self, i: jax.Array) -> Streamed:
        """The items of step i."""
        row = (self.first + i) * self.draws
        mine = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, row, self.draws), self.items)
        return Streamed(mine, self.draws)


def on_device(problem: Problem, portions: Mapping[str, Portion], i: jax.Array) -> Problem:
    """The problem with step i's items in the place of its streams."""
    found: dict[str, Any] = {name: portion.of(i) for name, portion in portions.items()}
    return dataclasses.replace(problem, **found)


class Streams:
    """The streams of a problem (often none), read ahead from `begin` to `close`.

    Attributes:
      rest: the problem without its streams, which travels into the compiled loop; `on_device` puts items in their
        place.
    """

    def __init__(self, problem: Problem) -> None:
        named = {name: as_source(getattr(problem, name)) for name in ("upper_data", "lower_data")}
        self._problem = problem
        self._streams: dict[str, Any] = {name: source for name, source in named.items() if source.host}
        self._readers: dict[str, Prefetched] = {}
        nothing: dict[str, Any] = dict.fromkeys(self._streams)
        self.rest = dataclasses.replace(problem, **nothing)

    def peeked(self) -> Problem:
        """The problem with the first step's items in place, for what looks at it outside the loop."""
        found: dict[str, Any] = {}
        for name, stream in self._streams.items():
            items = stream.items()
            first = [next(items) for _ in range(stream.draws)]
            found[name] = Streamed(jax.tree.map(lambda *leaves: jnp.stack(leaves), *first), stream.draws)
        return dataclasses.replace(self._problem, **found)

    def sampled(self) -> Problem:
        """The problem with some of the first items in place, at least a step's, for what estimates means over them."""
        found: dict[str, Any] = {}
        for name, stream in self._streams.items():
            items, ended = stream.first(_SAMPLED_BYTES, max(_SAMPLED, stream.draws))
            found[name] = Streamed(jax.tree.map(lambda *leaves: np.stack(leaves), *items), len(items), ended)
        return dataclasses.replace(self._problem, **found)

    def begin(self, step: int) -> None:
        """Read from this step's items on."""
        for name, stream in self._streams.items():
            self._readers[name] = Prefetched(stream.items(step * stream.draws), stream.draws)

    def ready(self, steps: int) -> tuple[dict[str, Portion], int]:
        """Items of up to `steps` steps, without consuming them, and for how many steps they are."""
        portions = {}
        for name, reader in self._readers.items():
            segment, first, count = reader.ready(steps)
            portions[name] = Portion(segment, np.uint32(first), self._streams[name].draws)
            steps = min(steps, count)
        return portions, steps

    def consume(self, steps: int) -> None:
        """The first `steps` of the steps that are ready have been used."""
        for reader in self._readers.values():
            reader.consume(steps)

    def close(self) -> None:
        """Stop reading."""
        for reader in self._readers.values():
            reader.close()


_SAMPLED, _SAMPLED_BYTES = 64, 2**22  # items of a stream that are read for means over them
_SEGMENT_BYTES, _SEGMENT_STEPS, _SEGMENTS_AHEAD = 2**24, 4096, 4
_PATIENCE = 0.05  # seconds that a loop with a step's items at hand waits for a fuller segment


class Prefetched:
    """The items of a stream, which a thread copies into segments ahead of the loop.

    A segment is an array per leaf, with rows for as many steps as 16 MiB hold (1 to 4096): one shape, hence one
    compiled loop, and one transfer for many steps. Four full ones are kept ahead. Where the source is the slower side
    the loop is handed a segment with the steps that there are; rows beyond them hold zeros or older items. Errors of
    the source are raised where its items would have been consumed.

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
                        f"Item {number} of the stream has the shapes and dtypes {shapes}, the first had {first}: give "
                        "items of equal shapes (drop or pad a last batch that is smaller)."
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
        """Up to `steps` steps, without consuming them.

        Returns `(segment, first, count)`, with the items of step i in rows (first + i) draws, ... of the segment.
        """
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

    The memory begins on a boundary of 64 bytes, so that on a CPU the device's array is this memory and not a copy. It
    may be written again only after `released`, and that only when nothing that was computed from the array is pending.
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
