"""How single-loop methods turn the local directions of their batches into the direction they move along.

A rule is a frozen dataclass with

    init(problem, oracle, at) -> memory
    __call__(problem, oracle, at, memory, key) -> (value, direction, memory)

where `oracle(upper, lower, at) -> (value, direction)` gives the local direction on a batch of each level
(`_directions.Joint`, `_directions.Series`), `at` is a `Point` and `value` the upper loss on its batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel._module import hyperparameters, state
from bilevel.data import Source
from bilevel.keys import Draw, StepKey
from bilevel.level import Level
from bilevel.problem import Problem, ProblemError
from bilevel.solvers._base import reads_x
from bilevel.solvers._directions import Joint, Point, combined
from bilevel.typing import PyTree, Scalar

PIECE_BYTES = 2**21  # of samples, in a pass over all of them on a CPU: about its second-level cache


def at_both(problem: Problem, oracle: Any, at: Point, last: Point, key: StepKey) -> tuple[Scalar, Point, Point]:
    """F at this point, and the directions at this point and the last one, on the same batches."""
    upper, lower = problem.levels(key)
    value, now = oracle(upper, lower, at)
    return value, now, oracle(upper, lower, last)[1]


def full(problem: Problem, oracle: Any, at: Point, key: Any = 0) -> tuple[Scalar, Point]:
    """The direction on all samples of both levels.

    On one CPU device a level whose samples are larger than the cache is passed over in contiguous pieces, and its terms
    are averaged: the same (losses are means over samples), from values that stay in cache.
    """
    upper, lower = problem.full_levels(key)
    if not isinstance(oracle, Joint):  # a series multiplies Hessians: it is not the mean over pieces
        return oracle(upper, lower, at)
    of_upper, of_lower = (_pieces(source) for source in problem.sources)
    value, terms = _mean_over_pieces(lambda level: oracle.upper(level, at), upper, of_upper)
    return value, combined(_mean_over_pieces(lambda level: oracle.lower(level, at), lower, of_lower), terms)


def _mean_over_pieces(fn: Callable[[Level], PyTree], level: Level, pieces: int) -> PyTree:
    """The mean of fn(level on a piece of its batch) over equal contiguous pieces."""
    if pieces == 1:
        return fn(level)

    def on(i: jax.Array) -> PyTree:
        def cut(a: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a, i * (len(a) // pieces), len(a) // pieces)

        return fn(level.on(jax.tree.map(cut, level.batch)))

    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(on, jnp.int32(0)))
    total, _ = jax.lax.scan(lambda total, i: (jax.tree.map(jnp.add, total, on(i)), None), zero, jnp.arange(pieces))
    return jax.tree.map(lambda a: a / pieces, total)


def _pieces(source: Source) -> int:
    """The number of equal pieces, of `PIECE_BYTES` or little more, to pass over the samples in.

    1 where it does not pay.
    """
    # Where batches are all samples anyway, or carry more than samples, there is nothing to cut. On other back-ends
    # launches would cost more than a cache saves, and slices of shards would travel.
    if not source.cuttable or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    leaves = jax.tree.leaves(source.arrays)
    wanted = min(sum(leaf.nbytes for leaf in leaves) // PIECE_BYTES, len(leaves[0]))
    return max((k for k in range(1, wanted + 1) if len(leaves[0]) % k == 0), default=1)


def decayed(scale: Any, exponent: Any, step: jax.Array) -> jax.Array:
    """scale / (step + 1)^exponent."""
    return scale * (step.astype(jnp.result_type(float)) + 1) ** (-exponent)


@hyperparameters
class Plain:
    """No variance reduction: the direction on this step's batches. Memory: none."""

    def init(self, problem: Problem, oracle: Any, at: Point) -> PyTree:
        """Nothing is kept."""
        return None

    def __call__(self, problem: Problem, oracle: Any, at: Point, memory: PyTree, key: StepKey) -> Any:
        """The direction."""
        return *oracle(*problem.levels(key), at), None


@hyperparameters
class Momentum:
    """A moving average of the upper direction: m <- (1 - theta) m + theta D_x, from m = 0.

    Attributes:
      theta: the weight of the new direction.

    Memory: one x.
    """

    theta: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.theta, float) and not 0 < self.theta <= 1:
            raise ValueError(f"Momentum(theta={self.theta!r}): the weight of the new direction lies in (0, 1].")

    def init(self, problem: Problem, oracle: Any, at: Point) -> PyTree:
        """m = 0."""
        return optax.tree.zeros_like(at.x)

    def __call__(self, problem: Problem, oracle: Any, at: Point, memory: PyTree, key: StepKey) -> Any:
        """The direction."""
        value, direction = oracle(*problem.levels(key), at)
        average = jax.tree.map(lambda m, d: (1 - self.theta) * m + self.theta * d, memory, direction.x)
        return value, dataclasses.replace(direction, x=average), average


@state
class Recursion:
    """The last point and the direction that was taken there."""

    at: Point
    direction: Point


@hyperparameters
class STORM:
    """Momentum that is corrected with the *same* batch at the last point.

        m_t = D(z_t; B_t) + (1 - eta_t) (m_{t-1} - D(z_{t-1}; B_t)),    m_0 = D(z_0; B_0)
        eta_t = eta / (t + 1)^eta_decay

    Attributes:
      eta, eta_decay: the schedule of the weight.

    Two local directions per step. Memory: a point and a direction.

    Reference: Cutkosky, Orabona, "Momentum-Based Variance Reduction in Non-Convex SGD", NeurIPS 2019.
    """

    eta: float = 0.5
    eta_decay: float = 2 / 3

    def __post_init__(self) -> None:
        if isinstance(self.eta, float) and not 0 < self.eta <= 1:
            raise ValueError(f"STORM(eta={self.eta!r}): the weight lies in (0, 1].")

    def init(self, problem: Problem, oracle: Any, at: Point) -> Recursion:
        """At the start, with no direction yet."""
        return Recursion(at, optax.tree.zeros_like(at))

    def __call__(self, problem: Problem, oracle: Any, at: Point, memory: Recursion, key: StepKey) -> Any:
        """The direction."""
        value, now, before = at_both(problem, oracle, at, memory.at, key)
        eta = jnp.where(key.step == 0, 1.0, decayed(self.eta, self.eta_decay, key.step))
        direction = storm(now, before, memory.direction, eta)
        return value, direction, Recursion(at, direction)


def storm(now: PyTree, before: PyTree, momentum: PyTree, eta: Any) -> PyTree:
    """now + (1 - eta) (momentum - before), in the dtype of `now`."""
    return jax.tree.map(lambda n, b, m: n + (1 - eta).astype(n.dtype) * (m - b), now, before, momentum)


@hyperparameters
class SARAH:
    """The full direction every `period` steps, and a recursion between them.

        d_t = d_{t-1} + D(z_t; B_t) - D(z_{t-1}; B_t)

    Attributes:
      period: steps from one full direction to the next. None: `period_fraction` (n + m) / batch for n lower and m
        upper samples, as in SRBA.
      period_fraction: see `period`.

    Two local directions per step, and one pass over all data per period. Memory: a point and a direction. Under `vmap`
    both branches are computed at every step: use `SAGA` or `STORM` in sweeps.

    Reference: Nguyen et al., "SARAH: A Novel Method for Machine Learning Problems Using Stochastic Recursive
    Gradient", ICML 2017.
    """

    period: int | None = None
    period_fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.period is not None and (not isinstance(self.period, int) or self.period < 1):
            raise ValueError(f"SARAH(period={self.period!r}): a positive number of steps, or None.")
        if isinstance(self.period_fraction, float) and not self.period_fraction > 0:
            raise ValueError(f"SARAH(period_fraction={self.period_fraction!r}): the fraction of an epoch is positive.")

    def init(self, problem: Problem, oracle: Any, at: Point) -> Recursion:
        """At the start; the first step takes the full direction."""
        refuse_endless("SARAH/SPIDER variance reduction (SRBA, SPABA, VRBO)", problem)
        return Recursion(at, optax.tree.zeros_like(at))

    def restarts(self, problem: Problem, key: StepKey) -> jax.Array:
        """Whether this step takes the full direction."""
        return key.step % period_of(problem, self.period, self.period_fraction) == 0

    def __call__(self, problem: Problem, oracle: Any, at: Point, memory: Recursion, key: StepKey) -> Any:
        """The direction."""
        value, direction = jax.lax.cond(
            self.restarts(problem, key),
            lambda at, memory: full(problem, oracle, at, key),
            lambda at, memory: recursive(problem, oracle, at, memory, key),
            at,
            memory,
        )
        return value, direction, Recursion(at, direction)


@hyperparameters
class PAGE(SARAH):
    """SARAH's recursion, restarted with a full direction at random instead of by a counter.

    Attributes:
      probability: of a restart. None: b / (N + b) with N = n + m samples and b = both levels' batches, the paper's
        choice.

    The first step restarts.

    Reference: Li et al., "PAGE: A Simple and Optimal Probabilistic Gradient Estimator for Nonconvex Optimization", ICML
    2021.
    """

    probability: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.probability, float) and not 0 < self.probability <= 1:
            raise ValueError(f"PAGE(probability={self.probability!r}): a probability in (0, 1], or None.")

    def restarts(self, problem: Problem, key: StepKey) -> jax.Array:
        """Whether this step takes the full direction."""
        samples, batch = samples_and_batch(problem)
        probability = max(batch, 1) / max(samples + batch, 1) if self.probability is None else self.probability
        coin = jax.random.uniform(key.fold_in(Draw.RESTART).random)
        return (key.step == 0) | (coin < probability)


def recursive(problem: Problem, oracle: Any, at: Point, memory: Recursion, key: StepKey) -> tuple[Scalar, Point]:
    """SARAH's recursion on this step's batches."""
    value, now, before = at_both(problem, oracle, at, memory.at, key)
    return value, jax.tree.map(lambda d, n, b: d + (n - b), memory.direction, now, before)


def refuse_endless(what: str, problem: Problem) -> None:
    """Refuse data that have no full batch."""
    for name, source in zip(("upper_data", "lower_data"), problem.sources, strict=True):
        if source.count is None:
            raise ProblemError(
                f"{what} passes over all samples now and then, and {name} is a {type(source).__name__}, which has no "
                "end. Give arrays or data.Minibatches, or take a method without full passes (SOBA, MASOBA, SUSTAIN, "
                "MRBO)."
            )


def samples_and_batch(problem: Problem) -> tuple[int, int]:
    """The samples of both levels, and of one batch of each."""
    counts = [(source.count or 0, source.size or source.count or 0) for source in problem.sources]
    samples, batches = zip(*counts, strict=True)
    return sum(samples), sum(batches)


def period_of(problem: Problem, period: int | None, fraction: Any) -> jax.Array:
    """`period`, or by default `fraction` (n + m) / batch with the levels' mean batch, at least 1."""
    if period is not None:
        return jnp.uint32(period)
    samples, batch = samples_and_batch(problem)
    mean = batch / max(sum(source.given for source in problem.sources), 1)
    return jnp.maximum(jnp.floor(fraction * samples / max(mean, 1)), 1).astype(jnp.uint32)


@state
class Table:
    """One level's memory of SAGA.

    Attributes:
      rows: the last terms of each block, along a leading axis.
      average: their mean.
      row, block: the newest terms, not yet written into `rows`, and the block they belong to.
    """

    rows: PyTree
    average: PyTree
    row: PyTree
    block: jax.Array


@hyperparameters
class SAGA:
    """The newest terms of every block are kept, and the direction corrected with them.

        D = new - table[block] + average,    average += (new - table[block]) / blocks,    table[block] = new

    for each of the terms f_y, f_yy v, f_xy v on the lower level's blocks and F_x, F_y on the upper level's (F_x only
    where F depends on x). The tables start at zero: a block's first visit counts as plain. Where both levels' data are
    full batches nothing is kept.

    The write of a row is deferred to the next step's start (write, then read): XLA otherwise copies the whole table at
    every step, since within a step the row is read before it is overwritten.

    Attributes:
      max_bytes: the most memory that the tables may take; `init` refuses more before it allocates.

    Cost of a plain step and one row read and written. Memory: (2 |y| + |x|) lower blocks + (|y| + |x|) upper blocks,
    and |y| a block of the upper level where F does not depend on x.

    Reference: Defazio, Bach, Lacoste-Julien, "SAGA: A Fast Incremental Gradient Method With Support for
    Non-Strongly Convex Composite Objectives", NeurIPS 2014.
    """

    max_bytes: int = 2**32

    def __post_init__(self) -> None:
        if not isinstance(self.max_bytes, int) or self.max_bytes < 1:
            raise ValueError(f"SAGA(max_bytes={self.max_bytes!r}): a positive number of bytes.")

    def table_bytes(self, problem: Problem, x: PyTree, y: PyTree) -> int:
        """Bytes of the tables for this problem, nothing being allocated."""
        upper, lower = (
            source.blocks or ((source.count or 0) // (source.size or 1) if source.cuttable else 0)
            for source in problem.sources
        )
        of_upper = _bytes(y) + (_bytes(x) if upper and reads_x(problem.upper, x, y, problem.sources[0]) else 0)
        return (2 * _bytes(y) + _bytes(x)) * lower + of_upper * upper

    def init(self, problem: Problem, oracle: Any, at: Point) -> tuple[Table | None, Table | None]:
        """Tables of zeros for the lower and the upper level."""
        if not isinstance(oracle, Joint):
            raise ProblemError(
                "SAGA keeps the terms of the joint directions; it does not combine with a Neumann series."
            )
        upper, lower = problem.sources
        _refuse_unnumbered("lower_data", lower)
        _refuse_unnumbered("upper_data", upper)
        needed = self.table_bytes(problem, at.x, at.y)
        if needed > self.max_bytes:
            raise ProblemError(
                f"SAGA's tables would take {_readable(needed)}, more than its bound of {_readable(self.max_bytes)}: "
                f"one gradient of each of the {lower.blocks or 0} lower and {upper.blocks or 0} upper blocks. Take "
                "SRBA, which reaches the same accuracy with six vectors, or larger batches, or raise max_table_bytes."
            )
        of_upper = Point(at.x if reads_x(problem.upper, at.x, at.y, problem.sources[0]) else None, None, at.v)
        return _empty(_packed(Point(at.x, at.y, at.v)), lower.blocks), _empty(_packed(of_upper), upper.blocks)

    def __call__(
        self, problem: Problem, oracle: Any, at: Point, memory: tuple[Table | None, Table | None], key: Any
    ) -> Any:
        """The direction."""
        upper_level, lower_level = problem.levels(key)
        lower_level, lower_block = _numbered(lower_level)
        upper_level, upper_block = _numbered(upper_level)
        lower_table, lower_old = _opened(memory[0], lower_block)
        upper_table, upper_old = _opened(memory[1], upper_block)
        parts = oracle.components(upper_level, lower_level, at)
        lower, lower_table = _corrected(lower_table, lower_old, parts.lower, lower_block)
        of_upper = parts.upper
        if upper_table is not None and not reads_x(problem.upper, at.x, at.y, problem.sources[0]):
            of_upper = dataclasses.replace(of_upper, x=None)  # zeros, of which no row is kept
        upper, upper_table = _corrected(upper_table, upper_old, of_upper, upper_block)
        return parts.value, combined(lower, upper), (lower_table, upper_table)


def _numbered(level: Level) -> tuple[Level, jax.Array | None]:
    """A level with this step's block bound, and the block's number (None where all samples are seen at every step)."""
    if level.source.blocks is None:
        return level, None
    block, batch = level.source.numbered(level.key)
    return level.on(batch), block


def _empty(terms: PyTree, blocks: int | None) -> Table | None:
    if blocks is None:
        return None
    zeros = optax.tree.zeros_like(terms)
    rows = jax.tree.map(lambda a: jnp.zeros((blocks, *a.shape), a.dtype), terms)
    return Table(rows, zeros, zeros, jnp.zeros((), jnp.int32))


def _opened(table: Table | None, block: jax.Array | None) -> tuple[Table | None, PyTree]:
    """The table with the last step's row written, and the old terms of this step's block."""
    if table is None:
        return None, None
    write = lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, table.block, 0)  # noqa: E731
    rows = jax.tree.map(write, table.rows, table.row)
    old = jax.tree.map(lambda rows: jax.lax.dynamic_index_in_dim(rows, block, 0, keepdims=False), rows)
    return dataclasses.replace(table, rows=rows), old


def _corrected(table: Table | None, old: PyTree, new: Point, block: jax.Array | None) -> tuple[Point, Table | None]:
    """SAGA's direction of one level's terms, and the table with the new terms waiting to be written."""
    if table is None or block is None:
        return new, None
    weight = 1 / jax.tree.leaves(table.rows)[0].shape[0]
    row = _packed(new)
    change = optax.tree.sub(row, old)
    direction = optax.tree.add(change, table.average)
    average = jax.tree.map(lambda a, c: a + weight * c, table.average, change)
    return _unpacked(direction, new), Table(table.rows, average, row, block)


_SMALL = 8192


def _packed(terms: PyTree) -> PyTree:
    """Terms of few bytes as one vector (a table of one array costs fewer kernel calls), others as they are."""
    return ravel_pytree(terms)[0] if _is_small(terms) else terms


def _unpacked(row: PyTree, like: PyTree) -> PyTree:
    return ravel_pytree(like)[1](row) if _is_small(like) else row


def _is_small(terms: PyTree) -> bool:
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(terms)}
    return len(dtypes) == 1 and _bytes(terms) <= _SMALL


def _bytes(tree: PyTree) -> int:
    return sum(
        int(np.prod(np.shape(leaf), dtype=np.int64)) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree)
    )


def _readable(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _refuse_unnumbered(name: str, source: Source) -> None:
    cure = "Write data.Minibatches(arrays, size, blocks=True), or take SRBA or SOBA, which need no numbers."
    if source.blocks is None:
        if source.varies:
            raise ProblemError(
                f"SAGA keeps one gradient per batch, and the batches of {name}, a {type(source).__name__}, "
                f"{source.unnumbered}. {cure}"
            )
        return
    left = source.count % source.size  # type: ignore[operator]
    if left:
        raise ProblemError(
            f"SAGA needs blocks that share out the samples, and {source.size} does not divide the {source.count} "
            f"samples of {name}: the mean over the blocks would not be the mean over the samples. "
            f"{_divisors(source.count, source.size)}drop the last {left} samples, or take SRBA."  # type: ignore[arg-type]
        )


def _divisors(count: int, size: int) -> str:
    """A batch size near the wanted one that does divide, if there is one within a factor of two."""
    near = [d for d in range(max(1, size // 2), min(count, 2 * size) + 1) if count % d == 0]
    return f"Take size={min(near, key=lambda d: abs(d - size))}, " if near else "Either "
