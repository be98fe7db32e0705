"""Ready-made bilevel problems over real data, and the loaders that read the data."""

from __future__ import annotations

from bilevel.problems import datasets

__all__ = ["datasets"]
