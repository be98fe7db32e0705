"""Pictures of histories."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bilevel.history import History
from bilevel.plot import plot_history

pytest.importorskip("matplotlib")


@pytest.fixture
def history():
    steps = np.arange(200)
    values = {
        "test accuracy": np.linspace(0.1, 0.9, 5),
        "upper_loss": 0.3 + np.exp(-steps / 50),
        "hypergradient_norm": np.exp(-steps / 10.0).astype(np.float32),
        "x": np.stack([np.sin(steps / 20 + k) for k in range(3)], 1),
        "weights": np.random.default_rng(0).normal(size=(200, 4, 10)).cumsum(0),
    }
    return History(values, {name: steps[:: 200 // len(v)] for name, v in values.items()})


def panels_of(figure):
    return {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}


def test_one_panel_a_quantity_with_the_scale_that_suits_it(history):
    figure = plot_history(history, title="AID")
    panels = panels_of(figure)
    assert list(panels) == list(history)
    assert {name: axes.get_yscale() for name, axes in panels.items()} == {
        name: "log" if name == "hypergradient_norm" else "linear" for name in history
    }
    assert figure.get_suptitle() == "AID"
    (line,) = panels["test accuracy"].lines
    assert line.get_xdata().tolist() == [0, 40, 80, 120, 160]
    assert line.get_ydata().tolist() == history["test accuracy"].tolist()
    assert len(panels["x"].lines) == 3
    (mean,) = panels["weights"].lines
    assert np.allclose(mean.get_ydata(), history["weights"].reshape(200, -1).mean(1))


def test_names_choose_and_order(history):
    assert list(panels_of(plot_history(history, names=["x", "upper_loss"]))) == ["x", "upper_loss"]
    assert list(panels_of(plot_history(history, names="x"))) == ["x"]


def test_a_picture_is_saved_and_folders_are_made(history, tmp_path):
    path = tmp_path / "runs" / "one" / "curves.png"
    plot_history(history, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    plot_history(history, path=str(path.with_suffix(".pdf")))
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_no_global_state(history):
    before = "matplotlib.pyplot" in sys.modules
    plot_history(history)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_what_is_not_finite_is_left_out(tmp_path):
    loss = np.array([1.0, np.nan, np.inf, -np.inf, 2.0])
    history = History({"loss": loss, "gone": np.full(5, np.nan)}, {"loss": np.arange(5), "gone": np.arange(5)})
    figure = plot_history(history, path=tmp_path / "curves.png")
    (line,) = panels_of(figure)["loss"].lines
    assert np.isnan(line.get_ydata()).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("values", [np.array([3]), np.array([True, False]), np.array([1 + 1j, 2j]), np.zeros((2, 0))])
def test_odd_values(values, tmp_path):
    history = History({"odd": values}, {"odd": np.arange(len(values))})
    figure = plot_history(history, path=tmp_path / "curves.png")
    assert list(panels_of(figure)) == ["odd"]


def test_a_long_run_is_thinned_but_ends_at_its_end():
    n = 100_000
    figure = plot_history(History({"loss": np.arange(n) * 1.0}, {"loss": np.arange(n)}))
    (line,) = panels_of(figure)["loss"].lines
    assert len(line.get_xdata()) <= 4000 and line.get_xdata()[[0, -1]].tolist() == [0, n - 1]


def test_unknown_names_are_named_with_what_there_is(history):
    with pytest.raises(ValueError, match="has no 'loss', 'acc'; it has 'test accuracy', 'upper_loss'"):
        plot_history(history, names=["loss", "x", "acc"])


def test_an_empty_history():
    with pytest.raises(ValueError, match=r"history is empty.*take at least one step"):
        plot_history(History())


def test_without_matplotlib(history, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"need matplotlib.*pip install 'bilevel\[plot\]'"):
        plot_history(history)


def test_a_directory_is_no_picture(history, tmp_path):
    with pytest.raises(IsADirectoryError, match="give the path of a picture in it"):
        plot_history(history, path=tmp_path)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))
