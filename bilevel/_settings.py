"""JAX's settings that the package's own arithmetic needs, whatever the user's are."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

__all__ = ["settings", "users_settings"]

_PROMOTION: contextvars.ContextVar[str | None] = contextvars.ContextVar("promotion", default=None)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """JAX's settings that the package's own arithmetic needs, whatever the user's are; also a decorator.

    Strict promotion is meant for the user's arithmetic (see `users_settings`), and an infinity is how a search says "no
    value yet": `solve` itself looks at what must be finite.
    """
    token = _PROMOTION.set(_PROMOTION.get() or jax.config.jax_numpy_dtype_promotion)  # type: ignore[attr-defined]
    try:
        with jax.numpy_dtype_promotion("standard"), jax.debug_infs(False):
            yield
    finally:
        _PROMOTION.reset(token)


@contextlib.contextmanager
def users_settings() -> Iterator[None]:
    """Within `settings`: the user's promotion, under which the user's functions are looked at before a run."""
    with jax.numpy_dtype_promotion(_PROMOTION.get() or jax.config.jax_numpy_dtype_promotion):  # type: ignore[attr-defined]
        yield
