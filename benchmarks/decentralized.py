"""Decentralised and federated methods: what agents and clients cost on one device.

    python benchmarks/decentralized.py [--most 256] [--features 50] [--seconds 0.5] [--clients 10000]

1. Microseconds per outer step of n agents (ridge regression with a weight per feature, every agent its own samples),
   against n times the step of a single agent, on a ring, an exponential graph and with a dense matrix.
2. Microseconds per round of SimFBO and FedMBO with n clients sampled of many: the numbers of ten_thousand_clients.md
   in docs/.
3. The collectives in the compiled step of a ring whose agents lie on several devices.

CPU time of this process is counted, the least of the rounds: other work on the machine does not enter.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from typing import Any

import _harness
import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, data, network
from bilevel.solvers import GTDSBO, FedMBO, SimFBO


def upper(x: jax.Array, y: jax.Array, batch: Any) -> jax.Array:
    A, t = batch
    return jnp.mean((A @ y - t) ** 2) / 2


def lower(x: jax.Array, y: jax.Array, batch: Any) -> jax.Array:
    A, t = batch
    return jnp.mean((A @ y - t) ** 2) / 2 + jnp.sum(jnp.exp(x) * y**2) / 2


def problem_of(agents: int, samples: int, features: int, size: int | None = None) -> Problem:
    rng = np.random.default_rng(0)

    def level() -> data.Agents:
        A = rng.normal(size=(agents, samples, features)).astype(np.float32)
        return data.Agents((A, A @ rng.normal(size=features).astype(np.float32)), size)

    return jax.tree.map(jnp.asarray, Problem(upper, lower, level(), level()))


@functools.partial(jax.jit, static_argnames="steps")
def many(problem: Problem, solver: Any, state: Any, key: data.StepKey, steps: int) -> Any:
    def body(state: Any, k: jax.Array) -> Any:
        return solver.step(problem, state, data.StepKey(key.base, k, key.stream))[0], None

    return jax.lax.scan(body, state, jnp.arange(steps, dtype=jnp.uint32))[0]


def cost(problem: Problem, solver: Any, features: int, seconds: float, repeats: int) -> float:
    """Microseconds of CPU per step, the least of several measurements, compilation left out."""
    key = data.as_step_key(0)
    state = solver.init(problem, jnp.zeros(features), jnp.zeros(features), key)
    steps = 8
    run = lambda: many(problem, solver, state, key, steps)
    while (spent := min(_harness.interleaved({"": run}, 1)[""].cpu)) <= seconds / repeats:
        steps = int(steps * min(8, max(2, 1.5 * seconds / repeats / max(spent, 1e-4))))
    return min(spent, *_harness.interleaved({"": run}, repeats, warm=0)[""].cpu) / steps * 1e6


def agents(most: int, samples: int, features: int, seconds: float, rounds: int) -> None:
    print(
        f"\nCPU microseconds per outer step (GTDSBO, one y and one v step), {samples} samples of {features} "
        f"features per agent"
    )
    print(
        f"{'agents':>7} {'ring':>10} {'/ (n single)':>13} {'exponential':>12} {'/ (n single)':>13} {'matrix':>10} "
        f"{'/ (n single)':>13}"
    )
    single, n = 0.0, 1
    while n <= most:
        problem, row = problem_of(n, samples, features), []
        for graph in (network.ring(n), network.exponential(n), network.matrix(network.ring(n).matrix())):
            solver = GTDSBO(graph, 1e-4, 1e-3, 1e-3, lower_steps=1, linear_steps=1, check_stability=False)
            row.append(cost(problem, solver, features, seconds, rounds))
        single = single or row[0]
        print(
            f"{n:>7} "
            + " ".join(f"{us:>{w}.1f} {us / (n * single):>13.2f}" for us, w in zip(row, (10, 12, 10), strict=True)),
            flush=True,
        )
        n *= 4 if n < 64 or most > 64 else 2


def clients(total: int, samples: int, features: int, seconds: float, rounds: int) -> None:
    print(
        f"\nCPU microseconds per outer step, n clients sampled of {total}, {samples} samples of {features} "
        f"features each, batches of 8"
    )
    print(f"{'sampled':>8} {'SimFBO':>10} {'per client':>11} {'FedMBO':>10} {'per client and round':>21}")
    problem = problem_of(total, samples, features, 8)
    n = 1
    while n <= min(total, 1000):
        simfbo = cost(problem, SimFBO(n, 1e-4, 1e-3, 1e-3), features, seconds, rounds)
        solver = FedMBO(n, 1e-4, 1e-3, lower_rounds=5, terms=10, curvature=50.0)
        fedmbo = cost(problem, solver, features, seconds, rounds)
        print(f"{n:>8} {simfbo:>10.1f} {simfbo / n:>11.2f} {fedmbo:>10.1f} {fedmbo / n / 16:>21.2f}", flush=True)
        n *= 10


def collectives(features: int) -> None:
    from bilevel import distributed

    count = jax.device_count()
    problem = distributed.shard(problem_of(2 * count, 16, features), distributed.mesh())
    key = data.as_step_key(0)
    for graph in (network.ring(2 * count), network.exponential(2 * count), network.complete(2 * count)):
        solver = GTDSBO(graph, 1e-4, 1e-3, 1e-3, check_stability=False)
        state = solver.init(problem, jnp.zeros(features), jnp.zeros(features), key)
        text = (
            jax.jit(lambda p, s, k, solver=solver: solver.step(p, s, k)[0])
            .lower(problem, state, key)
            .compile()
            .as_text()
        )
        found = re.findall(r"\b(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\(", text)
        counts = ", ".join(f"{found.count(name)} {name}" for name in sorted(set(found))) or "none"
        print(f"  {graph.name}: {counts}", flush=True)


def main() -> None:
    parser = _harness.arguments(__doc__, rounds=5)
    parser.add_argument("--most", type=int, default=256, help="agents at most")
    parser.add_argument("--samples", type=int, default=64, help="samples per agent")
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU time per measurement")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument(
        "--collectives",
        action="store_true",
        help="only print the collectives of the compiled steps on this machine's devices",
    )
    given = _harness.start(parser, "optax", pin=True, most=4, seconds=0.01, clients=10)
    if given.collectives:
        return collectives(given.features)
    agents(given.most, given.samples, given.features, given.seconds, given.rounds)
    clients(given.clients, given.samples, given.features, given.seconds, given.rounds)
    print("\nCollectives in the compiled step, 8 agents on 4 devices (metrics left out):", flush=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, __file__, "--collectives"], env=environment, check=True)
    return None


if __name__ == "__main__":
    main()
