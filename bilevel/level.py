"""One level of a problem with its batch bound: what all solvers and estimators compute with."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import derivatives
from bilevel._recompute import noted
from bilevel.data import NOTHING, ProblemError, Source
from bilevel.keys import StepKey
from bilevel.typing import Project, PyTree, Scalar

__all__ = ["Level", "Levels"]


@dataclasses.dataclass(frozen=True)
class Level:
    """One level with its data bound: a plain function of (x, y), and what belongs to it.

    With `who` the level is many: x and y are stacked along a leading axis of agents or clients, each has its own batch,
    and the value is the sum over i of weights_i f(x_i, y_i; batch_i). Gradients, Hessian-vector and cross products of
    that sum are those of each agent, stacked: the calculus of one level does for many.

    Attributes:
      loss: f(x, y, batch), or f(x, y) where there are no data.
      source: where batches come from.
      key: the `StepKey` that the batch was drawn with.
      batch: the batch.
      project: the level's projection, or None.
      prox: the level's proximal operator `prox(x, y, scaling)`, or None (lower level only).
      inequality, equation: the level's constraints as the problem has them; see `constraint` and `equality`.
      who: None: one level on pooled data; "all": every agent or client; an array: those of these numbers.
      weights: of the terms of a stacked level's sum; None: ones.
      mixed: the gradient is `derivatives.mixed_mode_gradient`, cheap to differentiate in reverse.
    """

    loss: Callable[..., Scalar]
    source: Source
    key: StepKey
    batch: PyTree = None
    project: Project | None = None
    prox: Callable[..., PyTree] | None = None
    inequality: Callable[..., PyTree] | None = None
    equation: Callable[..., PyTree] | None = None
    who: Literal["all"] | jax.Array | None = None
    weights: jax.Array | None = None
    mixed: bool = False

    def drawn(self, key: StepKey | None = None) -> Level:
        """The level with the batch of this key (None: of its own)."""
        key = self.key if key is None else key
        if self.who is None or not self.source.given:
            batch = self.source.draw(key)
        else:
            batch = self.source.draw_each(key, None if isinstance(self.who, str) else self.who)
        return dataclasses.replace(self, key=key, batch=batch)

    def full(self) -> Level:
        """The level on all its samples."""
        batch = self.source.full(self.key)
        return dataclasses.replace(self, batch=batch) if self.source.averaged else self.on(batch)

    def each(self, x: PyTree, y: PyTree) -> jax.Array:
        """The loss on each of the draws of an averaged source."""
        loss = self.loss if self.source.given else lambda x, y, _: self.loss(x, y)
        return jax.vmap(loss, in_axes=(None, 0 if self.source.separate else None, 0))(x, y, self.batch)

    def _at(self, x: PyTree, y: PyTree, batch: PyTree) -> Scalar:
        if self.source.averaged:
            return jnp.mean(self.each(x, y))
        loss = self.loss if self.source.given else lambda x, y, _: self.loss(x, y)
        if self.who is None:
            value = loss(x, y, batch)
            return value if hasattr(value, "dtype") else jnp.asarray(value, float)  # a constant
        values = jax.vmap(loss)(x, y, batch)
        return jnp.sum(values if self.weights is None else values * self.weights.astype(values.dtype))

    def __call__(self, x: PyTree, y: PyTree) -> Scalar:
        """The loss on the bound batch."""
        return self._at(x, y, self.batch)

    def gradient(self, x: PyTree, y: PyTree) -> PyTree:
        """The gradient in y, shaped like y."""
        if self.mixed:
            return noted(derivatives.mixed_mode_gradient(self._at)(x, y, self.batch))
        return jax.grad(self, argnums=1)(x, y)

    def mixed_mode(self) -> Level:
        """The same level with `derivatives.mixed_mode_gradient` as its gradient: cheap to unroll in reverse."""
        return dataclasses.replace(self, mixed=True)

    @property
    def random(self) -> bool:
        """Whether drawing again gives another sample."""
        return self.source.random

    def redraw(self, i: Any, total: int) -> Level:
        """The level with the batch of inner step `i` of `total`; itself where all batches are the same."""
        if not self.source.varies or self.source.shared:
            return self
        self.source.asked(total)
        return self.drawn(self.key.inner(i, total))

    def stream(self, tag: int) -> Level:
        """The level with a batch of the stream `tag` (`keys.Draw`), independent of this one's.

        Itself where all are the same.
        """
        return self.drawn(self.key.fold_in(tag)) if self.source.varies and not self.source.shared else self

    def on(self, batch: PyTree) -> Level:
        """The level on this batch in place of its own, which is not drawn any more."""
        return dataclasses.replace(self, batch=batch, source=_Given() if self.source.given else NOTHING)

    def with_loss(self, fn: Callable[[PyTree, PyTree], Scalar]) -> Level:
        """The level with another function of (x, y) in place of its loss."""
        return dataclasses.replace(self, loss=fn, source=NOTHING, batch=None)

    def weighted(self, weights: jax.Array) -> Level:
        """A stacked level whose terms are weighted."""
        return dataclasses.replace(self, weights=weights)

    @property
    def nonsmooth(self) -> bool:
        """Whether there is a projection or a prox, so that a solution need not have a zero gradient."""
        return self.project is not None or self.prox is not None

    @property
    def constraint(self) -> Callable[[PyTree, PyTree], PyTree] | None:
        """The inequality g as a function of (x, y), on this batch where it takes one; None where there is none."""
        return self._bound(self.inequality)

    @property
    def equality(self) -> Callable[[PyTree, PyTree], PyTree] | None:
        """The equality h as a function of (x, y), on this batch where it takes one; None where there is none."""
        return self._bound(self.equation)

    def _bound(self, fn: Callable[..., PyTree] | None) -> Callable[[PyTree, PyTree], PyTree] | None:
        if fn is None or not self.source.given or not takes_batch(fn):
            return fn
        if self.random:
            raise ProblemError(
                "A constraint takes its level's batch, and that batch is drawn anew at every step: its rows, and their "
                "multipliers, would belong to other samples each time. Give the level's data as bare arrays (a full "
                "batch)."
            )
        batch = jax.tree.map(lambda leaf: leaf[0], self.batch) if self.source.averaged else self.batch
        return lambda x, y: fn(x, y, batch)


class Levels(NamedTuple):
    """Both levels of a problem, bound to the batches of one key."""

    upper: Level
    lower: Level


class _Given(Source, leaves=()):
    """A batch that is there already."""

    random = False


def takes_batch(fn: Callable[..., Any]) -> bool:
    """Whether a constraint takes (x, y, batch) rather than (x, y)."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) == 3 or (len(required) < 3 and any(p.name == "batch" for p in positional))
