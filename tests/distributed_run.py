"""The runs that the tests of the engines compare; as a script on whatever devices and processes there are.

python tests/distributed_run.py OUT.npz [--methods A,B] [--steps K] [--checkpoint DIR] [--kill-at K] [--collectives]
"""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from distributed_problems import quadratic

from bilevel import data, distributed, network, solve
from bilevel.solvers import GTDSBO, SLDBO, SPARKLE, FedMBO, SimFBO

METHODS = {
    "gt": lambda: GTDSBO(network.ring(8), 0.05, 0.1, 0.1, lower_steps=2, linear_steps=2),
    "ed": lambda: SPARKLE(network.exponential(8), 0.02, 0.1, 0.1),
    "simfbo": lambda: SimFBO(4, 0.02, 0.1, 0.1, local_steps=2),
    "fedmbo": lambda: FedMBO(None, 0.02, 0.1, lower_rounds=2, terms=4),
}


def results(
    methods: list[str], steps: int, sharded: bool, checkpoint: str | None = None, kill_at: int | None = None
) -> dict[str, Any]:
    """Iterates and histories by name."""
    problem, (p, q) = quadratic(8, het=0.5, samples=4, noise=0.3, size=2)
    if sharded:
        problem = distributed.shard(problem, distributed.mesh())

    def killed(event: Any) -> None:
        if kill_at is not None and event.step >= kill_at:
            os._exit(9)

    found: dict[str, Any] = {}
    for name in methods:
        solution = solve(
            problem, jnp.zeros(p), jnp.zeros(q), METHODS[name](), steps=steps, key=3, checkpoint=checkpoint,
            checkpoint_every=10 if checkpoint else None, callback=killed, callback_every=1 if kill_at else None,
        )  # fmt: skip
        found[f"{name} devices"] = len(solution.x.sharding.device_set)
        found |= {f"{name}.x": distributed.gather(solution.x), f"{name}.y": distributed.gather(solution.y)}
        found |= {f"{name}.{k}": v for k, v in solution.history.items()}
    return found


def collectives() -> list[str]:
    """The collectives in the compiled steps of a ring, metrics left out, data and copies sharded."""
    problem, (p, q) = quadratic(8, het=0.5, samples=4, size=2)
    problem = distributed.shard(problem, distributed.mesh())
    found = []
    rings = METHODS["gt"](), SLDBO(network.ring(8), radius=5.0)
    for solver in (*rings, SPARKLE(network.torus(2, 4)), SPARKLE(network.exponential(8))):
        key = data.as_step_key(0)
        state = solver.init(problem, jnp.zeros(p), jnp.zeros(q), key)
        step = jax.jit(lambda problem, state, key, solver=solver: solver.step(problem, state, key)[0])
        text = step.lower(problem, state, key).compile().as_text()
        found.append(" ".join(sorted(set(re.findall(COLLECTIVES, text)))))
    return found


COLLECTIVES = (
    r"\b(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter|collective-broadcast)(?:-start)?\("
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--methods", default="gt,ed,simfbo,fedmbo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--collectives", action="store_true")
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    found = results(given.methods.split(","), given.steps, True, given.checkpoint, given.kill_at)
    if given.collectives:
        found["collectives"] = np.asarray(collectives())
    if jax.process_index() == 0:
        np.savez(given.out, devices=jax.device_count(), processes=jax.process_count(), **found)


if __name__ == "__main__":
    main()
