"""The progress bar: on a terminal, on stderr, through rich; in a notebook as the cell's output; else nothing."""

from __future__ import annotations

import contextlib
import html
import importlib
import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from bilevel.history import History

__all__ = ["Reporter", "reporter"]

logger = logging.getLogger("bilevel")

_SECONDS_BETWEEN_UPDATES = 0.1
_METRICS_SHOWN = 3


class Reporter:
    """What `reporter` gives, told after every chunk where the run stands: a bar of rich, or nothing.

    Rich's own thread redraws the bar, so that the clock goes on while a chunk is compiled or runs.
    """

    def __init__(self, progress: Any = None, task: Any = None) -> None:
        self._progress, self._task, self._due = progress, task, 0.0
        self._last: tuple[int, History] | None = None

    def update(self, done: int, history: History) -> None:
        """`done` steps are taken, and this is the history so far."""
        self._last = done, history
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _SECONDS_BETWEEN_UPDATES
            self.show()

    def show(self) -> None:
        """Draw what the last update said."""
        if self._progress is not None and self._last is not None:
            done, history = self._last
            self._progress.update(self._task, completed=done, metrics=_telling(history))


def _telling(history: History) -> str:
    """The newest of the most telling scalars: the user's own, then the upper loss and the hypergradient's norm."""
    names = list(history)
    # The solver's quantities come after the user's and have an entry a step, the user's an entry now and then.
    solvers = {name for name in names if len(history[name]) == len(history[names[-1]])}
    first = [name for name in names if name not in solvers]
    first += [name for name in ("upper_loss", "hypergradient_norm") if name in solvers]
    shown = []
    for name in dict.fromkeys((*first, *names)):
        values = history[name]
        if values.ndim == 1 and values.size and values.dtype.kind not in "cOSU":
            shown.append(f"{name} {float(values[-1]):.4g}")
    return "  ".join(shown[:_METRICS_SHOWN])


class NotebookReporter(Reporter):
    """The bar in a notebook: one output of the cell, rewritten in place; no widgets are needed."""

    def __init__(self, total: int, done: int) -> None:
        super().__init__()
        self._total, self._first, self._began = total, done, time.monotonic()
        self._handle: Any = None

    def show(self) -> None:
        """Draw what the last update said."""
        if self._last is None:
            return
        display = importlib.import_module("IPython.display").display  # of the kernel that this runs in
        done, history = self._last
        speed = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = (self._total - done) / speed if speed > 0 else 0.0
        filled = round(24 * done / self._total)
        pace = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
        words = f"{done}/{self._total}", f"{pace} steps/s", f"{left:.0f} s left" if done < self._total else ""
        text = "  ".join(part for part in (*words, _telling(history)) if part)
        bar = f'<progress value="{done}" max="{self._total}" style="width:12em"></progress>'
        content = {
            "text/plain": f"{'#' * filled}{'.' * (24 - filled)} {text}",
            "text/html": f"{bar} <code>{html.escape(text)}</code>",
        }
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def in_notebook() -> bool:
    """Whether this is a cell of a notebook: a kernel of IPython that is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


@contextlib.contextmanager
def reporter(total: int, done: int, show: bool | None) -> Iterator[Reporter]:
    """A bar for a run of `total` steps of which `done` are taken; the terminal is clean again however the block ends.

    `show=None`: in a notebook, and where stderr is a terminal. Without rich there is none on a terminal, and the log
    says so.
    """
    if show is not False and in_notebook():
        bar: Reporter = NotebookReporter(total, done)
        try:
            yield bar
        finally:
            bar.show()
        return
    if show is None:
        show = sys.stderr is not None and sys.stderr.isatty()
    if show and importlib.util.find_spec("rich") is None:
        logger.warning("The progress bar is drawn by rich, which is not installed: pip install rich.")
        show = False
    if not show:
        yield Reporter()
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            if task.speed:
                return Text(f"{task.speed:,.0f} steps/s" if task.speed >= 100 else f"{task.speed:.3g} steps/s")
            return Text("compiling" if task.completed == done else "")

    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    progress = Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=12),
        Speed(Column(no_wrap=True)),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}", markup=False, table_column=rest),
        console=Console(file=sys.stderr, force_jupyter=False),
        refresh_per_second=4,
        expand=True,
        # What callbacks print stands above the bar, unless stdout goes elsewhere: then it must go there.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )
    with progress:
        bar = Reporter(progress, progress.add_task("", total=total, completed=done, metrics=""))
        try:
            yield bar
        finally:
            bar.show()
