"""What was recorded during a run: arrays by name, each with its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

__all__ = ["History"]


class History(Mapping[str, np.ndarray]):
    """Arrays by name, each with the steps at which its entries were taken.

    `history["upper_loss"]` is an array with one entry per recorded step, `history.steps["upper_loss"]` those steps.
    Step k's metrics are those of the iterate *before* its update; the user's metrics are taken after the named number
    of steps.

    Attributes:
      metrics: the names of the user's own metrics.
    """

    def __init__(self, values: dict[str, np.ndarray] | None = None, steps: dict[str, np.ndarray] | None = None) -> None:
        self._values = {name: [np.asarray(v)] for name, v in (values or {}).items()}
        self._steps = {name: [np.asarray(s)] for name, s in (steps or {}).items()}
        self.metrics: tuple[str, ...] = ()

    def copy(self) -> History:
        """Another history with the same entries, to be gone on with."""
        new = History({name: self[name] for name in self}, self.steps)
        new.metrics = self.metrics
        return new

    def extend(self, name: str, steps: np.ndarray, values: np.ndarray) -> None:
        """Append entries."""
        self._values.setdefault(name, []).append(np.asarray(values))
        self._steps.setdefault(name, []).append(np.asarray(steps))

    def _joined(self, store: dict[str, list[np.ndarray]], name: str) -> np.ndarray:
        parts = store[name]
        if len(parts) > 1:
            store[name] = parts = [np.concatenate(parts)]
        return parts[0]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._values:
            raise KeyError(f"the history has no {name!r}; it has {', '.join(self._values) or 'nothing'}")
        return self._joined(self._values, name)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            kept = self.__dict__.get("_values", ())
            how = f'take history["{name}"]' if name in kept else f"it is a mapping, and has {', '.join(kept)}"
            raise AttributeError(name if name.startswith("_") else f"the history has no attribute {name!r}: {how}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """The steps of each array's entries."""
        return {name: self._joined(self._steps, name) for name in self._steps}

    def last(self) -> dict[str, Any]:
        """The newest entry of each."""
        return {name: parts[-1][-1] for name, parts in self._values.items() if len(parts[-1])}

    def last_step(self, name: str) -> int:
        """The step of an array's newest entry, -1 where there is none."""
        parts = self._steps.get(name)
        return int(parts[-1][-1]) if parts and len(parts[-1]) else -1

    def to_frame(self) -> Any:
        """A pandas data frame, one row a step, empty where a quantity was not recorded (needs pandas)."""
        import pandas as pd

        series = {name: pd.Series(list(self[name]), index=self.steps[name]) for name in self}
        return pd.DataFrame(series).rename_axis("step")

    def __repr__(self) -> str:
        return f"History({', '.join(f'{name}[{len(self[name])}]' for name in self)})"
