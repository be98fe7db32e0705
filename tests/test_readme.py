"""The code on the pages that a newcomer copies from runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PEERS = [f"docs/how_to/moving_from_{peer}.md" for peer in ("higher", "betty", "torchopt", "learn2learn")]
SIDE_BY_SIDE = "docs/how_to/side_by_side.md"
# The longest page takes as long as all others.
PAGES = ["README.md", "docs/how_to/stochastic.md", *PEERS]
PAGES += [pytest.param("docs/how_to/moving_from_pytorch.md", marks=pytest.mark.slow)]


def python_blocks(page: str) -> str:
    """The page's python blocks as one script, each line where it stands on the page: tracebacks point there."""
    lines, inside = [], False
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_code_runs_as_printed(page, tmp_path, monkeypatch):
    script = python_blocks(page)
    assert script.strip(), f"{page} has no python block"
    monkeypatch.chdir(tmp_path)
    exec(compile(script, str(ROOT / page), "exec"), {"__name__": "__main__"})


def test_commands_of_the_readme_are_the_ones_that_ci_runs():
    """`.ci/run` finds its two lines in the README by these words."""
    lines = (ROOT / "README.md").read_text().splitlines()
    for extra, last in (("examples", "examples/data_cleaning.py"), ("dev", '-m pytest -n 2 -m "not slow"')):
        (line,) = [line for line in lines if f"'.[{extra}]'" in line]
        install = f"python3 -m venv .venv && .venv/bin/pip install -e '.[{extra}]'"
        assert line == f"{install} && .venv/bin/python {last}"


@pytest.mark.parametrize("page", [*PEERS, SIDE_BY_SIDE])
def test_lines_are_counted_as_the_page_says(page):
    """For each task four blocks: theirs (imports or data, the programme) and ours. Their Python is at least valid."""
    text = (ROOT / page).read_text()
    tasks = re.findall(r": (\d+) lines; here: (\d+) lines", text)
    blocks = re.findall(r"^```(py|julia|python)\n(.*?)^```", text, re.M | re.S)[: 4 * len(tasks)]
    assert tasks and len(blocks) == 4 * len(tasks)
    for task, (theirs, ours) in enumerate(tasks):
        for place, said in ((1, theirs), (3, ours)):
            language, programme = blocks[4 * task + place]
            assert (language == "python") == (place == 3)
            if language != "julia":
                compile(programme, page, "exec")
            lines = [line for line in programme.splitlines() if line.strip()]
            assert sum(not line.startswith(("import ", "from ")) for line in lines) == int(said), programme
        assert int(ours) <= int(theirs)


@pytest.mark.slow
def test_the_programmes_of_the_other_side_run(tmp_path, monkeypatch):
    """Ours of each task; that page's blocks are one script, and what it found is what the task asks for."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    solutions = {}
    for task in re.split("^## ", (ROOT / SIDE_BY_SIDE).read_text(), flags=re.M)[1:]:
        for block in re.findall(r"^```python\n(.*?)^```", task, re.M | re.S):
            exec(compile(block, SIDE_BY_SIDE, "exec"), names)
        solutions[task.splitlines()[0]] = names.pop("solution", None)
    network, anil, toll = (solutions[name].history["upper_loss"] for name in solutions if solutions[name])
    assert network[-1] < 0.2 * network[0] and anil[-1] < 0.5 * anil[0]
    assert abs(solutions["A toll"].x - 1) < 1e-3 and toll[-1] < -0.499
    assert names["cost"](names["model"]) < names["cost"](0 * names["model"])
    assert abs(names["lasso"].best_score_ / names["net"].best_score_ - 1) < 0.05
