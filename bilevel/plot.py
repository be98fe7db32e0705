"""Pictures of a run's history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.history import History

__all__ = ["plot_history"]

_LINES = 12  # of a vector-valued quantity; more are shown by their range
_POINTS = 4000  # more cannot be seen


def plot_history(history: History, names: str | Sequence[str] | None = None, path: Any = None, title: str = "") -> Any:
    """Draw quantities of a history against the steps, one small panel each.

    A panel's axis is logarithmic where all values are positive and span more than two decades. A vector-valued quantity
    is one line per entry, or its mean and range where there are more than 12. Values that are not finite are left out.

    Args:
      names: which of its quantities, in the order of the panels; None: all.
      path: where to save the picture (the folders are made; the suffix gives the format); None: nowhere.
      title: stands above the panels.

    Returns:
      A `matplotlib.figure.Figure` that belongs to no window and to no global state; a notebook shows it by itself.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: a name is not in the history, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed: pip install 'bilevel[plot]'.") from error

    if names is None:
        names = [name for name in history if history[name].dtype.kind not in "OSU"]
    elif isinstance(names, str):
        names = [names]
    if unknown := [name for name in names if name not in history]:
        has = ", ".join(map(repr, history)) or "nothing"
        raise ValueError(f"The history has no {', '.join(map(repr, unknown))}; it has {has}.")
    if not names:
        raise ValueError(
            "The history is empty, so there is nothing to draw: take at least one step, or give solve metrics."
        )

    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.3 * rows + 0.7), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for panel, name in zip(panels, names, strict=False):
        _draw(panel, history.steps[name], history[name])
        panel.set_title(name, fontsize="medium")
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(names) - columns) : len(names)]:
        panel.set_xlabel("step")
    if title:
        figure.suptitle(title)
    if path is not None:
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _draw(panel: Any, steps: np.ndarray, values: np.ndarray) -> None:
    lines = (np.abs(values) if values.dtype.kind == "c" else values.astype(float)).reshape(len(steps), -1)
    keep = np.unique(np.linspace(0, len(steps) - 1, _POINTS).astype(int)) if len(steps) > _POINTS else slice(None)
    steps, lines = steps[keep], np.where(np.isfinite(lines[keep]), lines[keep], np.nan)
    finite = lines[np.isfinite(lines)]
    marker = "." if len(steps) < 15 else None
    if lines.shape[1] <= _LINES:
        panel.plot(steps, lines, linewidth=1.2, marker=marker)
    else:
        panel.plot(steps, lines.mean(1), linewidth=1.2, marker=marker)
        panel.fill_between(steps, lines.min(1), lines.max(1), alpha=0.25, linewidth=0)
    if finite.size and finite.min() > 0 and finite.max() > 100 * finite.min():
        panel.set_yscale("log")
    else:
        panel.ticklabel_format(axis="y", useOffset=False)  # "+3.21e-1" above an axis is hard to read
