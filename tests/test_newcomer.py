"""The pages of a newcomer's jobs, run as printed, and what each of them claims."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

HOW_TO = Path(__file__).parents[1] / "docs/how_to"


def cells(page):
    """The names that the page's cells leave behind, run as one script whose lines are where they are on the page."""
    lines, inside = [], False
    for line in (HOW_TO / page).read_text().splitlines():
        if line.startswith("```"):
            inside, line = line.startswith("```{code-cell}"), ""
        lines.append("" if not inside or line.startswith("%") else line)
    names = {"__name__": "__main__"}
    exec(compile("\n".join(lines), str(HOW_TO / page), "exec"), names)
    return names


def test_tolls_and_prices(capsys):
    names = cells("prices.md")  # the last of three problems is the one with ties
    np.testing.assert_allclose(names["solution"].x, 1, atol=1e-4)
    np.testing.assert_allclose(names["solution"].y, [1, 0], atol=1e-4)
    said = capsys.readouterr().out
    first = r"CONVERGED.*toll (\S+) drivers \[(\S+) (\S+)\]\ntoll (\S+) drivers \[(\S+) (\S+)\]"
    numbers = [float(word) for word in re.search(first, said, re.DOTALL).groups()]
    np.testing.assert_allclose(numbers, [1, 0.5, 0.5, 0.5, 0.75, 0.25], atol=1e-3)
    assert said.count("CONVERGED") == 2


@pytest.mark.slow
def test_an_own_training_loop(capsys):
    names = cells("training_script.md")
    kept, flipped = names["kept"], names["flipped"]
    assert kept[~flipped].mean() > 0.7 and kept[flipped].mean() < 0.3
    assert float(names["estimate"].value) < 0.5


@pytest.mark.slow
def test_networks_with_dropout_and_batch_normalisation():
    names = cells("flax_equinox.md")
    assert names["solution"].history["test accuracy"][-1] > 0.85
    assert names["weights"][~names["wrong"]].mean() > names["weights"][names["wrong"]].mean() + 0.3


@pytest.mark.slow
def test_meta_learning():
    names = cells("meta_learning.md")
    for name in ("maml_solution", "imaml_solution", "anil_solution"):
        loss = names[name].history["upper_loss"]
        assert loss[-1] < 0.5 * loss[0]
    assert np.linalg.norm(names["maml_solution"].x - names["common"]) < 0.5


@pytest.mark.slow
def test_folds():
    names = cells("cross_validation.md")
    assert names["net"].history["upper_loss"][-1] < 0.51
    assert names["many"].history["upper_loss"][-1] < names["theirs"].mse_path_.mean(-1).min()


@pytest.mark.slow
def test_a_quadratic_programme_is_a_layer():
    names = cells("sets.md")
    np.testing.assert_allclose(names["plan"].sum(), 1.5, rtol=1e-5)
    assert int(names["found"].status[0]) == 0
