"""A module whose number losses read: tests/test_captures.py."""

from typing import ClassVar

LAM = 1.0


class Settings:
    """A namespace."""

    lam = 1.0
    parts: ClassVar = {"a": [1.0]}


def penalty(x):
    """What a loss calls as captured.penalty."""
    return LAM * x**2


def reader(x):
    """Code that no loss names, and that reads what only it reads."""
    return OTHER * x


OTHER = 1
