"""All benchmarks in turn, and a page of what they printed: docs/development/results.md, with machine, versions, dates.

    python -m benchmarks.report                          # all of them: hours
    python -m benchmarks.report first_answer overhead    # these; the page keeps the other sections as they are
    python -m benchmarks.report --quick --to /tmp/page.md

A script that fails, or a peer that is not installed, stands in the page with what it said. Options for a script follow
its name after a colon: `python -m benchmarks.report "constrained: --section members"`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "development" / "results.md"
NAMES = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_") and path.stem != "report")
NEEDS_TWO_CHECKOUTS = ("before_after",)

HEAD = """# Results of the benchmarks

What the scripts in `benchmarks/` printed, each with the command, the machine and the day. `python -m benchmarks.report`
makes this page anew, `python -m benchmarks.report NAME` one section of it. Times are CPU time of one process group in
which the sides took turns, where a section says nothing else; compare within a section, never across.
"""
_SECTION = re.compile(r"^## (\w+)\n", re.MULTILINE)


def machine() -> str:
    """The processor and its cores, as the operating system names them."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found.group(1) if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {platform.system()}"


def ran(name: str, options: list[str], limit: float) -> str:
    """The section of one script: what it is, its command, where and when, and all that it printed."""
    script = HERE / f"{name}.py"
    title = script.read_text().split('"""')[1].splitlines()[0]
    command = ["python", f"benchmarks/{name}.py", *options]
    print(f"{' '.join(command)} ...", flush=True)
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, str(script), *options],
            cwd=HERE.parent, capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
        out, end = done.stdout.strip(), "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1:]
        ended = f"It ended with an error: {end[0] if end else done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        out = (printed.decode() if isinstance(printed, bytes) else printed).strip()
        ended = f"It was stopped after {limit:.0f} s."
    seconds = time.perf_counter() - began
    print(f"    {seconds:.0f} s {ended}", flush=True)
    today = datetime.date.today().isoformat()
    lines = [f"## {name}", "", title, "", f"{today}, {machine()}, {seconds:.0f} s.", "", "```text"]
    lines += [f"$ {shlex.join(command)}", *out.splitlines(), "```"]
    return "\n".join([*lines, *(["", ended] if ended else [])])


def sections(page: str) -> dict[str, str]:
    """A page's sections by name."""
    parts = _SECTION.split(page)[1:]
    return {name: f"## {name}\n{text}".rstrip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def main() -> int:
    """Run what is named, and write the page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; none: all of them")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: do they still work?")
    parser.add_argument("--to", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that a script may take")
    args = parser.parse_args()
    asked = [(name.strip(), shlex.split(options)) for name, _, options in (text.partition(":") for text in args.names)]
    unknown = [name for name, _ in asked if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if args.quick and args.to == PAGE:
        parser.error("--quick times nothing that anybody should read: say where to, with --to FILE")
    failed = 0
    for name, options in asked or [(name, []) for name in NAMES if name not in NEEDS_TWO_CHECKOUTS]:
        section = ran(name, [*options, *(["--quick"] if args.quick else [])], args.limit)
        failed += not section.endswith("```")
        known = sections(args.to.read_text()) if args.to.exists() else {}
        known[name] = section
        args.to.write_text("\n\n".join([HEAD.strip(), *(known[key] for key in sorted(known))]) + "\n")
    print(f"wrote {args.to}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
