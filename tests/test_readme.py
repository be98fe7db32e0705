"""The code on the pages that a newcomer copies from runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PEERS = [f"docs/how_to/moving_from_{peer}.md" for peer in ("higher", "betty", "torchopt", "learn2learn")]
PAGES = ["README.md", "docs/how_to/moving_from_pytorch.md", *PEERS]


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


@pytest.mark.parametrize("page", PEERS)
def test_lines_are_counted_as_the_page_says(page):
    """The second block of each side is the programme, the first its data; the peer's is at least valid Python."""
    text = (ROOT / page).read_text()
    said = re.search(r": (\d+) lines; here: (\d+) lines", text)
    for fence, count in (("py", said[1]), ("python", said[2])):
        programme = re.findall(rf"^```{fence}\n(.*?)^```", text, re.M | re.S)[1]
        compile(programme, page, "exec")
        assert sum(bool(line.strip()) for line in programme.splitlines()) == int(count)
