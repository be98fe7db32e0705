"""What three seeds of the robustness study cost, over one: they are vmapped, so that most of the cost is shared.

The first call of a process compiles everything, for each number of seeds in a fresh process of its own; a second call
of the same shapes compiles nothing. Both ratios are of CPU time. One seed has three clean encoders too, which the false
positives need.

    python benchmarks/robustness.py            # the defaults of robustness_study: some minutes
    python benchmarks/robustness.py --quick
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import _harness
import numpy as np

QUICK = {
    "attacks": ("alternating", "frozen"), "defences": ("spectral signatures", "CLP", "label-free unlearning"),
    "steps": 50, "rounds": 10, "repair_steps": 10,
}  # fmt: skip


def measure(seeds: int, quick: bool) -> list[float]:
    """CPU seconds of a first and of a second study in this process."""
    from bilevel.applications.contrastive import robustness_study

    times = []
    for _ in range(2):
        began = time.process_time()
        robustness_study(tuple(range(seeds)), **(QUICK if quick else {}))
        times.append(time.process_time() - began)
    return times


def main() -> None:
    """Processes with one and with three seeds in turn."""
    parser = _harness.arguments(__doc__, rounds=1)
    parser.add_argument("--seeds", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seeds:
        print(json.dumps(measure(options.seeds, options.quick)))
        return
    print(_harness.versions("optax"), flush=True)
    found: dict[int, list[list[float]]] = {1: [], 3: []}
    for _ in range(options.rounds):
        for seeds, rows in found.items():
            command = [sys.executable, __file__, "--seeds", str(seeds), *(["--quick"] if options.quick else [])]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
            print(f"{seeds} seeds: first call {rows[-1][0]:.1f} s, second {rows[-1][1]:.1f} s of CPU", flush=True)
    first, second = (np.median([c[k] / a[k] for a, c in zip(found[1], found[3], strict=True)]) for k in (0, 1))
    print(f"three seeds over one: first call {first:.2f}, second {second:.2f}")


if __name__ == "__main__":
    main()
