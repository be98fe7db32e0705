"""Numbers from original implementations, which tests of several applications read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BESIDE = Path(__file__).parents[2] / "shared" / "fixtures"  # the larger ones live beside the repository


def fixture_file(room: str, name: str, here: Path | None = None) -> Any:
    """An application's arrays by name: from its own folder `here`, BILEVEL_FIXTURES or beside the repository.

    The test is skipped where they are in none of them.
    """
    for folder in (here, os.environ.get("BILEVEL_FIXTURES"), BESIDE / room):
        if folder is not None and (Path(folder) / name).exists():
            return np.load(Path(folder) / name)
    pytest.skip(f"{name} is too large for the repository; set BILEVEL_FIXTURES to the folder that has it")
