"""Scripts of the tests in processes of their own: with forced devices, or several that find each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **more}


def forced(devices: int) -> dict[str, str]:
    """The environment of a process with so many devices on a CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return environment(XLA_FLAGS=flags.strip())


def printed(script: str, *arguments: Any, devices: int, timeout: float = 500) -> list[str]:
    """The lines that a script prints, with so many forced devices."""
    ended = subprocess.run(
        [sys.executable, str(TESTS / script), *map(str, arguments)],
        env=forced(devices), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.splitlines()


def started(script: str, count: int, devices: int, arguments: Sequence[Any]) -> list[subprocess.Popen[str]]:
    """The documented command, once per process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    return [
        subprocess.Popen(
            [
                sys.executable, "-m", "bilevel.distributed", "--coordinator", coordinator, "--processes", str(count),
                "--process", str(i), "--devices", str(devices), str(TESTS / script), *map(str, arguments),
            ],
            env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]], timeout: float = 500) -> None:
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
