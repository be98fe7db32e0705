"""How programmes are compiled: on a CPU, small ones by settings of XLA that compile fast.

Two variables are answered in milliseconds by a programme that XLA optimises for a second. What a compile may cost is
therefore measured by what the problem's losses compute (bytes, from their traces), the same in every call of a problem
and whatever the steps: one problem is one programme, and a run has the same bits however it is cut.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["computes", "jit", "settings_for", "sized"]

# Bytes that one evaluation of the losses computes, and XLA's settings up to there. The old emitters compile faster, to
# code about as fast; machine code in one piece costs less than in up to 32, each with a compiler and a linker of its
# own; code that is not optimised compiles faster still and runs slower, which nobody sees where the calls between
# kernels are what takes time.
_FAST: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_ROWS: list[tuple[float, dict[str, Any]]] = [
    (2**10, {**_FAST, "xla_backend_optimization_level": 0}),
    (2**22, _FAST),
]
_UNKNOWN: set[str] = set()
"""Settings that this jaxlib does not have (it said so)."""

_BYTES: contextvars.ContextVar[float] = contextvars.ContextVar("bytes", default=float("inf"))


@contextlib.contextmanager
def sized() -> Iterator[None]:
    """Within this block programmes are compiled for the size that `computes` states; also a decorator."""
    token = _BYTES.set(float("inf"))
    try:
        yield
    finally:
        _BYTES.reset(token)


def computes(total: float) -> None:
    """From here to the end of the `sized` block programmes are for losses that compute so many bytes."""
    _BYTES.set(total)


def jit(fn: Callable[..., Any] | None = None, *, static_argnames: tuple[str, ...] = ()) -> Any:
    """`jax.jit`, compiled by what `computes` says; also a decorator with arguments. For calls on the host alone."""
    return functools.partial(jit, static_argnames=static_argnames) if fn is None else _Programme(fn, static_argnames)


class _Programme:
    """A function in as many compiled forms as there are settings, each made when it is first asked for."""

    def __init__(self, fn: Callable[..., Any], static_argnames: tuple[str, ...]) -> None:
        self._forms: dict[tuple[tuple[str, Any], ...], Any] = {}
        self._fn, self._static = fn, static_argnames
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's value."""
        settings = _settings()
        try:
            return self._form(settings)(*args, **kwargs)
        except RuntimeError as error:  # JAX's own name for it changes
            absent = {name for name, _ in settings if f"No such compile option: '{name}'" in str(error)}
            if not absent:
                raise
            _UNKNOWN.update(absent)
            settings_for.cache_clear()
        return self(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """`jax.jit(fn).lower`."""
        return self._form(()).lower(*args, **kwargs)

    def _form(self, settings: tuple[tuple[str, Any], ...]) -> Any:
        if settings not in self._forms:
            options: Any = dict(settings) or None
            self._forms[settings] = jax.jit(self._fn, static_argnames=self._static, compiler_options=options)
        return self._forms[settings]


def _settings() -> tuple[tuple[str, Any], ...]:
    return settings_for(_BYTES.get())


@functools.cache  # a search on the host calls small programmes by the thousand
def settings_for(total: float) -> tuple[tuple[str, Any], ...]:
    """The settings where the losses compute so many bytes."""
    if total > _ROWS[-1][0] or jax.default_backend() != "cpu":
        return ()
    row = next(row for most, row in _ROWS if total <= most)
    return tuple(item for item in row.items() if item[0] not in _UNKNOWN)
