"""A package whose names are imported where they are first used, from the one table that type checkers read too."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROW = re.compile(r"^from (\S+) import (\w+) as \2$", re.MULTILINE)


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__` from the rows of its `__init__.pyi`."""
    module = sys.modules[package]
    table = {name: home for home, name in _ROW.findall(Path(str(module.__file__)).with_suffix(".pyi").read_text())}

    def find(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(table[name]), name)
        setattr(module, name, value)
        return value

    return find, lambda: sorted({*table, *vars(module)}), sorted(table)
