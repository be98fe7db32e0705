"""The diff in CONTRIBUTING, which adds a solver, applied to a copy of the package and its test run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_diff_that_adds_a_solver_works(tmp_path):
    diff = re.search(r"^```diff\n(.+?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    shutil.copytree(ROOT / "bilevel", tmp_path / "bilevel", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("tests/conftest.py", "tests/compiled.py", "tests/problems.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    added = re.findall(r"^\+\+\+ b/(tests/test_\w+\.py)$", diff, re.MULTILINE)
    assert len(added) == 1
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *added]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout or done.stdout.startswith("..")
