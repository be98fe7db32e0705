"""The pages: code that fits a column, every solver on one page, a built site that holds together."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bilevel import Result, solvers

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
from check_site import problems  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```(?:python|\{code-cell\}[^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_code_on_the_pages_is_88_columns_wide():
    wide = [
        f"{page.relative_to(ROOT)}: {line}"
        for page in PAGES
        if "_build" not in page.parts
        for block in CODE.findall(page.read_text())
        for line in block.splitlines()
        if len(line) > 88
    ]
    assert not wide, "\n".join(wide)


def test_every_solver_stands_on_one_page():
    """A family's page lists its solvers twice: in the table on top, and below with their docstrings."""
    engines = {"decentralized": "bilevel.solvers.decentralized", "federated": "bilevel.solvers.federated"}
    whole = {name for page, room in engines.items() if f"automodule:: {room}" in (
        ROOT / f"docs/api/{page}.md").read_text() for name in solvers.__all__
        if room in getattr(getattr(solvers, name), "__module__", "")}  # fmt: skip
    listed = []
    for page in (ROOT / "docs/api").glob("solvers*.md"):
        text = page.read_text()
        documented = re.findall(r"^\.\. auto(?:class|function):: (\w+)", text, re.MULTILINE)
        table = re.findall(r"^   (\w+)$", text, re.MULTILINE)
        assert table == (documented if table else [])
        listed += documented
    assert len(set(listed)) == len(listed)
    assert set(listed) | whole == set(solvers.__all__)


def test_the_citation_has_the_version():
    number = lambda file, pattern: re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1]
    assert number("CITATION.cff", r"^version: (.+)") == number("pyproject.toml", r'^version = "(.+)"')


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="other.html">x</a>', "other.html leads nowhere"),
        ('<a href="#nowhere">x</a>', "#nowhere has no such place"),
        ('<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        ("<p>a ``literal</p>", "leaks"),
        ("<p>so **bold** a word</p>", "leaks"),
    ],
)
def test_the_check_of_the_site_sees(body, said, tmp_path):
    (tmp_path / "index.html").write_text(f"<html><body>{body}</body></html>")
    (found,) = problems(tmp_path)
    assert said in found


def test_the_check_of_the_site_lets_a_good_page_pass(tmp_path):
    good = '<h1 id="top">x</h1><a href="#top">up</a><a href="https://example.org">out</a><code>f(**options)</code>'
    (tmp_path / "index.html").write_text(good)
    assert problems(tmp_path) == []


def test_every_end_of_a_run_stands_in_the_table():
    rows = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/how_to/how_runs_end.md").read_text(), re.M)
    assert sorted(rows) == sorted(Result.__members__)
