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
_NOISY = 60  # entries from which on a curve that goes up and down is drawn with its running mean
_APART = 30  # metrics whose sizes differ by more than this factor do not share a panel


def plot_history(
    history: History, names: str | Sequence[str | tuple[str, ...]] | None = None, path: Any = None, title: str = ""
) -> Any:
    """Draw quantities of a history against the steps in small panels.

    The user's own scalar metrics share the first panel, with a legend (those of another size by its right axis). A
    curve that goes up and down from step to step, as minibatch losses do, is drawn faint, and its running mean over it.

    A panel's axis is logarithmic where all values are positive and span more than two decades. A vector-valued quantity
    is one line per entry, or its mean and range where there are more than 12. Values that are not finite are left out.

    Args:
      names: which of its quantities, in the order of the panels, a tuple of names being one panel; None: all.
      path: where to save the picture (the folders are made; the suffix gives the format); None: nowhere.
      title: stands above the panels.

    Returns:
      A `matplotlib.figure.Figure` that belongs to no window and to no global state; a notebook shows it by itself.

    Raises:
      ImportError: matplotlib is not installed.
      IsADirectoryError: the path is a directory's.
      ValueError: a name is not in the history, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("Plots need matplotlib, which is not installed: pip install 'bilevel[plot]'.") from error

    if names is None:
        drawable = [name for name in history if history[name].dtype.kind not in "OSU"]
        own = [name for name in history.metrics if name in drawable and history[name].ndim == 1]
        shown: list[tuple[str, ...]] = [tuple(own)] if own else []
        shown += [(name,) for name in drawable if name not in own]
    else:
        asked = [names] if isinstance(names, str) else names
        shown = [(part,) if isinstance(part, str) else tuple(part) for part in asked]
    if unknown := [name for panel in shown for name in panel if name not in history]:
        has = ", ".join(map(repr, history)) or "nothing"
        raise ValueError(f"The history has no {', '.join(map(repr, unknown))}; it has {has}.")
    if not shown:
        raise ValueError(
            "The history is empty, so there is nothing to draw: take at least one step, or give solve metrics."
        )

    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.3 * rows + 0.7), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for panel, together in zip(panels, shown, strict=False):
        colors = {name: f"C{i}" for i, name in enumerate(together)}
        axes, keys = [panel], []
        for names_here in _of_like_size(history, together):
            axis = axes[-1]
            for name in names_here:
                beside = f"{name} (right)" if axis is not panel else name
                keys.append(_draw(axis, history.steps[name], history[name], colors[name], beside))
            _scale(axis, [history[name] for name in names_here])
            if axis is panel and len(names_here) < len(together):
                axes.append(panel.twinx())
        if len(axes) > 1:
            axes[1].spines[["top"]].set_visible(False)
        if len(together) > 1:
            axes[-1].legend(
                handles=[key for key in keys if key is not None], fontsize="small", frameon=False, loc="center right"
            )
        panel.set_title(together[0] if len(together) == 1 else "metrics", fontsize="medium")
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(shown) - columns) : len(shown)]:
        panel.set_xlabel("step")
    if title:
        figure.suptitle(title)
    if path is not None:
        path = Path(path).expanduser()
        if path.is_dir():
            raise IsADirectoryError(f"plot(path={str(path)!r}) is a directory: give the path of a picture in it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _of_like_size(history: History, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The metrics of either side of a panel: on one axis their largest entries differ by no more than a factor."""

    def size(name: str) -> float:
        values = np.abs(history[name][np.isfinite(history[name])])
        return float(values.max()) if values.size and values.max() > 0 else 1.0

    groups: list[list[str]] = []
    for name in names:
        near = (g for g in groups if 1 / _APART <= size(name) / size(g[0]) <= _APART)
        group = next(near, None)
        if group is not None:
            group.append(name)
        elif len(groups) < 2:
            groups.append([name])
        else:  # there are two sides only
            groups[1].append(name)
    return [tuple(group) for group in groups]


def _real(values: np.ndarray) -> np.ndarray:
    return np.abs(values) if values.dtype.kind == "c" else values.astype(float)


def _draw(panel: Any, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> Any:
    """Draw a quantity; returns the line that stands for it in a legend."""
    lines = _real(values).reshape(len(steps), -1)
    lines = np.where(np.isfinite(lines), lines, np.nan)
    smooth = _running_mean(lines[:, 0]) if lines.shape[1] == 1 else None
    keep = np.unique(np.linspace(0, len(steps) - 1, _POINTS).astype(int)) if len(steps) > _POINTS else slice(None)
    steps, lines = steps[keep], lines[keep]
    style: dict[str, Any] = dict(linewidth=1.2, marker="." if len(steps) < 15 else None)
    if smooth is not None:
        panel.plot(steps, lines, linewidth=0.6, alpha=0.3, color=color)
        return panel.plot(steps, smooth[keep], linewidth=1.4, color=color, label=label)[0]
    if lines.shape[1] == 1:
        return panel.plot(steps, lines, color=color, label=label, **style)[0]
    if lines.shape[1] <= _LINES:
        return next(iter(panel.plot(steps, lines, label=label, **style)), None)  # None: of no entries
    panel.fill_between(steps, lines.min(1), lines.max(1), alpha=0.25, linewidth=0, color=color)
    return panel.plot(steps, lines.mean(1), color=color, label=label, **style)[0]


def _running_mean(values: np.ndarray) -> np.ndarray | None:
    """The centred mean over a twentieth of the curve; None where the curve needs none.

    A curve is noisy where a third of its moves turn back and the turns are not small beside what the curve does. Of a
    positive curve over decades it is the mean of the logarithms, as the axis is.
    """
    known = values[np.isfinite(values)]
    if len(known) < _NOISY:
        return None
    logs = _decades(known)
    known = np.log(known) if logs else known
    moves = np.diff(known)
    moves = moves[moves != 0]
    turns = np.mean(moves[1:] * moves[:-1] < 0) if len(moves) > 2 else 0.0
    spread = np.subtract(*np.percentile(known, [90, 10]))
    if turns < 1 / 3 or np.median(np.abs(moves)) < 0.02 * spread:
        return None
    half = max(len(values) // 40, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        line = np.log(values) if logs else values
    seen = np.isfinite(line)
    sums = np.concatenate([[0.0], np.cumsum(np.where(seen, line, 0.0))])
    counts = np.concatenate([[0], np.cumsum(seen)])
    first = np.maximum(np.arange(len(line)) - half, 0)
    last = np.minimum(np.arange(len(line)) + half + 1, len(line))
    with np.errstate(invalid="ignore"):
        means = (sums[last] - sums[first]) / (counts[last] - counts[first])
    return np.exp(means) if logs else means


def _decades(values: np.ndarray) -> bool:
    return bool(values.size and values.min() > 0 and values.max() > 100 * values.min())


def _scale(panel: Any, curves: Sequence[np.ndarray]) -> None:
    """A logarithmic axis where all values are positive and span more than two decades."""
    values = np.concatenate([_real(curve).ravel() for curve in curves])
    if _decades(values[np.isfinite(values)]):
        panel.set_yscale("log")
    else:
        panel.ticklabel_format(axis="y", useOffset=False)  # "+3.21e-1" above an axis is hard to read
