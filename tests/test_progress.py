"""The bar is on a terminal and nowhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest

from bilevel.history import History
from bilevel.progress import reporter

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"

# A run in a process of its own: `how` is what happens in the middle.
RUN = """
import importlib.util, sys, time
import numpy as np

# The package without its front, which imports JAX: the bar needs no more than these two parts of it.
spec = importlib.util.find_spec("bilevel")
spec.loader = None
sys.modules["bilevel"] = importlib.util.module_from_spec(spec)
from bilevel.progress import reporter
from bilevel.history import History

how, show = sys.argv[1], eval(sys.argv[2])
history = History()
history.extend("accuracy [test]", np.arange(1), np.float32([0.25]))
with reporter(1000, 100, show) as bar:
    for done in range(200, 1001, 100):
        history.extend("hypergradient_norm", np.arange(done - 100, done), np.full(100, 1e-3))
        history.extend("linear_iterations", np.arange(done - 100, done), np.full(100, 7))
        history.extend("upper_loss", np.arange(done - 100, done), np.full(100, 0.5))
        bar.update(done, history)
        if how == "print" and done == 500:
            print("from a callback", flush=True)
        if how == "interrupt" and done == 500:
            raise KeyboardInterrupt
        time.sleep(0.02)
print("end", flush=True)
"""


def run_on_a_terminal(how="", show=None, stdout_piped=False, columns=140):
    """What the terminal got, and what stdout got where it is a pipe."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    command = [sys.executable, "-W", "error", "-c", RUN, how, repr(show)]
    out = subprocess.PIPE if stdout_piped else theirs
    process = subprocess.Popen(command, stdin=theirs, stdout=out, stderr=theirs, env=environment)
    os.close(theirs)
    received = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        received += part
    os.close(ours)
    piped = process.communicate()[0]
    return received.decode(), piped and piped.decode()


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_bar_on_a_terminal():
    screen, _ = run_on_a_terminal()
    last = [line for line in plain(screen).replace("\r", "\n").splitlines() if "/1000" in line][-1]
    assert re.search(r"1000/1000 .* [\d.,]+ steps/s 0:00:00 accuracy \[test\] 0\.25  upper_loss 0\.5  hyper", last)
    assert "100/1000" in plain(screen)  # a resumed run begins where it was
    assert screen.index(HIDE) < screen.rindex(SHOW) < screen.index("end\r\n")


@pytest.mark.parametrize("columns", [80, 40])
def test_a_narrow_terminal_keeps_one_line(columns):
    screen, _ = run_on_a_terminal(columns=columns)
    lines = [line for line in plain(screen).replace("\r", "\n").splitlines() if "/1000" in line]
    assert lines and max(map(len, lines)) <= columns
    assert screen.count("\n") == 2  # after the bar, and after "end"


def test_an_interrupt_leaves_the_terminal_clean():
    screen, _ = run_on_a_terminal("interrupt")
    assert "KeyboardInterrupt" in screen
    assert screen.rindex(HIDE) < screen.rindex(SHOW) < screen.index("Traceback")
    assert "500/1000" in plain(screen)


def test_what_a_callback_prints_goes_where_stdout_goes():
    screen, _ = run_on_a_terminal("print")
    assert "from a callback\r\n" in plain(screen)
    screen, piped = run_on_a_terminal("print", stdout_piped=True)
    assert piped == "from a callback\nend\n"
    assert "1000/1000" in plain(screen) and "from a callback" not in screen


def test_no_bar_where_it_is_not_wanted():
    assert run_on_a_terminal(show=False)[0] == "end\r\n"


def run_in_a_pipe(show):
    return subprocess.run([sys.executable, "-c", RUN, "", repr(show)], capture_output=True, text=True, check=True)


def test_nothing_in_a_pipe():
    done = run_in_a_pipe(None)
    assert (done.stdout, done.stderr) == ("end\n", "")


def test_a_bar_in_a_pipe_where_it_is_asked_for():
    done = run_in_a_pipe(True)
    assert done.stdout == "end\n"
    assert "1000/1000" in done.stderr and "\x1b" not in done.stderr


def test_without_rich_there_is_none(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    with reporter(10, 0, True) as bar:
        bar.update(10, History())
    assert capsys.readouterr() == ("", "")


def test_without_a_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # a windowed program
    with reporter(10, 0, None) as bar:
        bar.update(10, History())
    assert sys.stderr is None


def test_updates_are_throttled(capsys):
    """A run of tiny chunks reads the history (which joins its pieces) a few times and not at every chunk."""

    class Counting(History):
        reads = 0

        def __getitem__(self, name):
            Counting.reads += 1
            return super().__getitem__(name)

    history = Counting({"upper_loss": np.zeros(1)}, {"upper_loss": np.zeros(1, int)})
    with reporter(10**6, 0, True) as bar:
        bar.update(0, history)
        once = Counting.reads
        for done in range(100):
            bar.update(done, history)
        assert once > 0 and Counting.reads <= 3 * once


def test_a_history_of_odd_things(capsys):
    history = History(
        {"vector": np.zeros((1, 3)), "word": np.array(["a"]), "flag": np.array([True]), "empty": np.zeros(0)},
        {name: np.zeros(1, int) for name in ("vector", "word", "flag")} | {"empty": np.zeros(0, int)},
    )
    with reporter(1, 0, True) as bar:
        bar.update(1, history)
    shown = capsys.readouterr().err
    assert "flag 1" in shown and not re.search("vector|word|empty", shown)
