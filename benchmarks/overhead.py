"""What `solve` costs above a bare `lax.scan` over the same step, and what importing the package costs.

    python benchmarks/overhead.py

Interleaved in one process, wall-clock and CPU time per step of warm programs, ratios with their spread. The problem
is synthetic: 10 upper and 10 lower variables, full batches of 100 samples, one lower gradient step and one upper
step.
"""

from __future__ import annotations

import subprocess
import sys

import _harness
import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import Problem, linear, lower, solve, solvers
from bilevel.hypergradients import Implicit


def main():
    parser = _harness.arguments(__doc__, rounds=9)
    parser.add_argument("--steps", type=int, default=400_000)
    args = _harness.start(parser, "optax", pin=False, steps=4000)
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
        "bare lax.scan": lambda: bare(problem, x0, y0),
        "solve": lambda: solve(problem, x0, y0, solver, steps=args.steps, progress=False).x,
    }
    times = _harness.interleaved(runs, args.rounds)
    for kind, title in (("cpu", "CPU"), ("wall", "wall-clock")):
        each = ", ".join(f"{name} {spent.median(kind, 1e6) / args.steps:.2f} us" for name, spent in times.items())
        print(f"{title} per step: {each}; solve / scan {_harness.ratio(times['solve'], times['bare lax.scan'], kind)}")

    code = (
        "import time; s = time.process_time(); import jax, optax; m = time.process_time(); import bilevel; "
        "print(m - s, time.process_time() - m)"
    )
    command = [sys.executable, "-c", code]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(args.rounds)]
    spent = np.array([[float(v) for v in line.split()] for line in found])
    base, ours = np.median(spent, axis=0)
    low, high = spent[:, 1].min(), spent[:, 1].max()
    print(f"import: jax and optax {base:.2f} s CPU, bilevel adds {ours:.3f} s ({low:.3f}, {high:.3f})")


if __name__ == "__main__":
    main()
