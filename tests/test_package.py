"""What `import bilevel` loads, what it offers, and that the docs list the same."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import bilevel

ROOT = Path(__file__).parents[1]
HEAVY = ("flax", "jaxopt", "matplotlib", "optimistix", "orbax", "pandas", "rich", "sklearn")
ROOMS = [name for name in bilevel.__all__ if isinstance(getattr(bilevel, name), ModuleType)]


def modules_after(statement: str) -> set[str]:
    """The top-level packages in a fresh interpreter after a statement, which must print nothing."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement", ["import bilevel", "from bilevel import datasets, splits", "import bilevel.applications"]
)
def test_import_is_light_and_silent(statement):
    assert modules_after(statement).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "module", ["bilevel", *(f"bilevel.{room}" for room in (*ROOMS, "datasets", "splits", "applications"))]
)
def test_all_names_exist_once(module):
    names = importlib.import_module(module).__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(importlib.import_module(module), name) for name in names)


def test_docs_list_the_public_names_in_order():
    """Functions and classes of `bilevel.__all__` stand on docs/api/bilevel.md in its order; each room has a page."""
    page = (ROOT / "docs/api/bilevel.md").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function|exception)::\s+(\S+)", page, re.MULTILINE)
    assert listed == [name for name in bilevel.__all__ if name not in ROOMS]
    for room in ROOMS:
        text = (ROOT / f"docs/api/{room}.md").read_text()
        assert f".. automodule:: bilevel.{room}\n" in text


def test_applications_use_public_names_alone():
    """What `bilevel.applications` imports from elsewhere in the package has no underscore in front, room or name."""
    for file in (ROOT / "bilevel/applications").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bilevel":
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_")], file


def test_version_is_that_of_the_distribution():
    assert version("bilevel") == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
