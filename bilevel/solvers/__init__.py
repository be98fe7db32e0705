"""Solvers: frozen dataclasses of hyperparameters with `init` and `step`.

A paper's name is a short constructor over parts.

Which name lives in which file is written in one table, `__init__.pyi` beside this file, which type checkers read as
well. A file is imported where a name of it is first used.
"""

from bilevel._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__)
