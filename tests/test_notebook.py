"""The progress bar in a notebook: a real kernel runs a cell, and what it shows is looked at."""

from __future__ import annotations

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

CELL = """
import jax.numpy as jnp
from bilevel import Problem, lower, solve, solvers

problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum((y - x) ** 2))
solver = solvers.AID(lower.GradientDescent(0.1, 3), 0.1)
solution = solve(problem, jnp.zeros(2), jnp.zeros(2), solver, steps=40, chunk=10{more})
"""


@pytest.mark.filterwarnings("ignore")
def test_a_bar_is_drawn_in_place_and_ends_full():
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CELL.format(more=more)) for more in ("", ", progress=False")]
    )
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown, silent = notebook.cells
    bars = [output for output in shown.outputs if output.output_type == "display_data"]
    assert len(bars) == 1  # rewritten in place, not one after the other
    assert bars[0].data["text/plain"].startswith("#" * 24 + " 40/40") and "upper_loss" in bars[0].data["text/plain"]
    assert '<progress value="40" max="40"' in bars[0].data["text/html"]
    assert not [output for output in silent.outputs if output.output_type == "display_data"]
