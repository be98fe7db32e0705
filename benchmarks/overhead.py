"""What `solve` costs above a bare `lax.scan` over the same step, and what importing the package costs.

    python benchmarks/overhead.py

Interleaved in one process, wall-clock and CPU time per step of warm programs, ratios with their spread. The problem is synthetic:
10 upper and 10 lower variables, full batches of 100 samples, one lower gradient step and one upper step.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import Problem, linear, lower, solve, solvers
from bilevel.hypergradients import Implicit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=400_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    a, t = rng.normal(size=(100, 10)).astype(np.float32), rng.normal(size=100).astype(np.float32)
    problem = Problem(
        upper=lambda x, y, b: jnp.mean((b[0] @ y - b[1]) ** 2),
        lower=lambda x, y, b: jnp.mean((b[0] @ y - b[1]) ** 2) + jnp.sum(jnp.exp(x) * y**2),
        upper_data=(a, t),
        lower_data=(a, t),
    )
    solver = solvers.HypergradientDescent(Implicit(linear.Identity(0.1)), lower.GradientDescent(0.1, 1), 0.01)
    x0, y0 = jnp.zeros(10), jnp.zeros(10)

    bare = jax.jit(lambda p, x, y: bilevel.run(p, solver, x, y, args.steps))
    runs = {
        "bare lax.scan": lambda: jax.block_until_ready(bare(problem, x0, y0)),
        "solve": lambda: solve(problem, x0, y0, solver, steps=args.steps, progress=False),
    }
    for run in runs.values():
        run()
    cpu, wall = {n: [] for n in runs}, {n: [] for n in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            c, w = time.process_time(), time.perf_counter()
            run()
            cpu[name].append(1e6 * (time.process_time() - c) / args.steps)
            wall[name].append(1e6 * (time.perf_counter() - w) / args.steps)
    for kind, spent in (("CPU", cpu), ("wall-clock", wall)):
        ratio = np.asarray(spent["solve"]) / np.asarray(spent["bare lax.scan"])
        each = ", ".join(f"{name} {np.median(v):.2f} us" for name, v in spent.items())
        print(f"{kind} per step: {each}; solve / scan {np.median(ratio):.3f} ({ratio.min():.3f}, {ratio.max():.3f})")

    code = "import time; s = time.process_time(); import jax, optax; m = time.process_time(); import bilevel; print(m - s, time.process_time() - m)"
    spent = np.array(
        [
            [
                float(v)
                for v in subprocess.run(
                    [sys.executable, "-c", code], capture_output=True, text=True, check=True
                ).stdout.split()
            ]
            for _ in range(args.rounds)
        ]
    )
    base, ours = np.median(spent, axis=0)
    print(
        f"import: jax and optax {base:.2f} s CPU, bilevel adds {ours:.3f} s ({spent[:, 1].min():.3f}, {spent[:, 1].max():.3f})"
    )


if __name__ == "__main__":
    main()
