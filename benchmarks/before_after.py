"""What the rebuild of a tree costs or saves: core timings of two checkouts, ratios of the new over the old.

    python benchmarks/before_after.py OLD_CHECKOUT [--rounds N] [--only NAME ...]

Each checkout has a process of its own, both pinned to one core, and there are several such pairs, since where a
process happens to lie in memory makes steps of microseconds a few per cent faster or slower. They hold their compiled
programs and take turns, one case at a time (old new, new old, ...), so that what disturbs the machine disturbs both.
Times are CPU times per step; the import is timed in fresh processes. The script uses only what both trees have; where
a name has moved, the first that exists is taken. All data are synthetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _harness
import numpy as np

HERE = Path(__file__).resolve()
IMPORT = "import time, jax, optax; begun = time.process_time(); import bilevel; print(time.process_time() - begun)"


def first_of(room: Any, *names: str) -> Any:
    """The first of the names that the room has."""
    return next(getattr(room, name) for name in names if hasattr(room, name))


IMPORTING = "import bilevel, above jax and optax"


# One side: what runs in a checkout's process ------------------------------------------------------------------------


def overhead(scale: float) -> dict[str, tuple[int, Callable[[], Any]]]:
    import jax
    import jax.numpy as jnp

    import bilevel
    from bilevel import Problem, linear, lower, solve, solvers
    from bilevel.hypergradients import Implicit

    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(100, 10)).astype(np.float32), rng.normal(size=100).astype(np.float32)
    problem = Problem(
        lambda x, y, b: jnp.mean((b[0] @ y - b[1]) ** 2),
        lambda x, y, b: jnp.mean((b[0] @ y - b[1]) ** 2) + jnp.sum(jnp.exp(x) * y**2),
        upper_data=arrays,
        lower_data=arrays,
    )
    solver = solvers.HypergradientDescent(Implicit(linear.Identity(0.1)), lower.GradientDescent(0.1, 1), 0.01)
    x, y, steps = jnp.zeros(10), jnp.zeros(10), max(1, int(100_000 * scale))
    bare = jax.jit(lambda problem, x, y: bilevel.run(problem, solver, x, y, steps)[0].x)
    return {
        "solve, per step": (steps, lambda: solve(problem, x, y, solver, steps=steps, progress=False).x),
        "run, per step": (steps, lambda: bare(problem, x, y)),
    }


def hypergradients(scale: float) -> dict[str, tuple[int, Callable[[], Any]]]:
    import hypergradients as benchmark
    import jax
    import jax.numpy as jnp

    cases = {}
    for make, repeats in ((benchmark.ridge, 40), (benchmark.cleaning, 2)):
        b = make()
        loop = benchmark.ours(b)
        args = tuple(jax.tree.map(jnp.asarray, v) for v in (b.x0, b.y0, b.train, b.val))
        count = max(1, int(repeats * scale))
        cases[f"hypergradient step, {b.name}"] = (
            count * benchmark.OUTER,
            lambda loop=loop, args=args, count=count: [loop(*args) for _ in range(count)][-1],
        )
    return cases


def stochastic(scale: float) -> dict[str, tuple[int, Callable[[], Any]]]:
    import _stochastic_problems
    import jax

    import bilevel
    from bilevel import solvers

    case, steps, cases = _stochastic_problems.logistic(), max(1, int(3000 * scale)), {}
    for name in ("SOBA", "SABA", "SRBA", "AmIGO", "StocBiO"):
        nested = name in ("AmIGO", "StocBiO")  # ten steps and ten products to each of theirs
        solver = getattr(solvers, name)(0.1, 0.1, **({"hvp_step": 0.1} if nested else {}))
        number = max(1, steps // 4) if nested else steps
        go = jax.jit(
            lambda problem, x, y, solver=solver, number=number: bilevel.run(problem, solver, x, y, number)[0].x
        )
        cases[f"{name}, per step"] = (number, lambda go=go: go(case.problem, case.x0, case.y0))
    return cases


def decentralized(scale: float) -> dict[str, tuple[int, Callable[[], Any]]]:
    import jax
    import jax.numpy as jnp

    import bilevel
    from bilevel import Problem, data, network
    from bilevel.solvers import GTDSBO

    fit = lambda y, batch: jnp.mean((batch[0] @ y - batch[1]) ** 2) / 2
    cases, features = {}, 50
    for agents in (16, 64):
        rng = np.random.default_rng(0)

        def level(agents: int = agents, rng: Any = rng) -> Any:
            A = rng.normal(size=(agents, 64, features)).astype(np.float32)
            arrays = jnp.asarray(A), jnp.asarray(A @ rng.normal(size=features).astype(np.float32))
            return first_of(data, "Agents", "Parties", "Clients")(arrays)

        problem = Problem(
            lambda x, y, batch: fit(y, batch),
            lambda x, y, batch: fit(y, batch) + jnp.sum(jnp.exp(x) * y**2) / 2,
            upper_data=level(),
            lower_data=level(),
        )
        solver = GTDSBO(network.ring(agents), 1e-4, 1e-3, 1e-3, lower_steps=1, linear_steps=1, check_stability=False)
        steps, start = max(1, int(32_000 * scale / agents)), jnp.zeros(features)
        go = jax.jit(lambda problem, u, solver=solver, steps=steps: bilevel.run(problem, solver, u, u, steps)[0].x)
        cases[f"ring of {agents} agents, per step"] = (steps, lambda go=go, p=problem, u=start: go(p, u))
    return cases


FAMILIES = {f.__name__: f for f in (overhead, hypergradients, stochastic, decentralized)}


def side(options: Any) -> None:
    """Answer each name on stdin with its CPU seconds per step; the first line written is the list of the names."""
    import jax

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints must not be read as an answer
    import bilevel

    cases: dict[str, tuple[int, Callable[[], Any]]] = {}
    failed = {}
    for name in options.only:
        try:
            found = FAMILIES[name](options.scale)
            for call in found.values():
                jax.block_until_ready(call[1]())
            cases |= found
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    answers.write(json.dumps([bilevel.__file__, list(cases), failed]) + "\n")
    for line in sys.stdin:
        steps, call = cases[line.strip()]
        answers.write(f"{_harness.measured(call)[1].median() / steps}\n")


# Both sides ---------------------------------------------------------------------------------------------------------


class Served:
    """A checkout's process, which answers with its timings; used in a `with` statement."""

    def __init__(self, checkout: Path, options: Any) -> None:
        path = f"{checkout}{os.pathsep}{HERE.parent}"
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, str(HERE), str(options.old), "--side", "--scale", str(options.scale), "--only"]
        self.process = subprocess.Popen(
            [*command, *options.only], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )
        self.process.stdout.readline()  # the versions
        where, self.names, self.failed = json.loads(self.process.stdout.readline())
        assert Path(where).is_relative_to(checkout), f"{where} was imported, which is not in {checkout}."

    def seconds(self, case: str) -> float:
        """CPU seconds per step; of an import, in a fresh process."""
        if case == IMPORTING:
            command = [sys.executable, "-c", IMPORT]
            done = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=True)
            return float(done.stdout)
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Print the ratios."""
    parser = _harness.arguments(__doc__, rounds=5)
    parser.add_argument("old", type=Path, help="a checkout of the old tree")
    parser.add_argument("--new", type=Path, default=HERE.parents[1], help="of the new one (default: this)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes, one after the other")
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--scale", type=float, default=1.0, help="steps of one timing, as a part of the usual number")
    parser.add_argument("--side", action="store_true", help="serve one checkout's timings (used by itself)")
    options = _harness.start(parser, "optax", pairs=1, scale=0.02)
    if options.side:
        return side(options)
    checkouts = {"old": options.old.resolve(), "new": options.new.resolve()}
    times: dict[str, dict[str, _harness.Times]] = {}
    begun = time.perf_counter()
    for pair in range(options.pairs):
        with Served(checkouts["old"], options) as old, Served(checkouts["new"], options) as new:
            sides = {"old": old, "new": new}
            for name, served in sides.items():
                for family, error in served.failed.items():
                    print(f"{name}: {family} is not timed: {error.splitlines()[0]}", flush=True)
            for case in (*(name for name in old.names if name in new.names), IMPORTING):
                spent = times.setdefault(case, {name: _harness.Times() for name in sides})
                for number in range(options.rounds):
                    for name in ("old", "new") if (number + pair) % 2 else ("new", "old"):
                        spent[name].cpu.append(sides[name].seconds(case))
    rows = [("", "old", "new", "new / old: median (min, max)")]
    for case, spent in times.items():
        each = [f"{spent[name].median(unit=1e6):.2f} us" for name in ("old", "new")]
        rows.append((case, *each, _harness.ratio(spent["new"], spent["old"])))
    _harness.table(*rows)
    print(f"{options.pairs} pairs of processes, {options.rounds} rounds each; {time.perf_counter() - begun:.0f} s")
    return None


if __name__ == "__main__":
    main()
