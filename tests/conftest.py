"""Fixtures that every test file shares."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from problems import float64

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A background job starts with Ctrl-C ignored, and so would all that it starts; the tests of Ctrl-C are meant.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with float64():
        yield
