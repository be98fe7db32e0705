"""What the rebuild of a tree costs or saves: core timings of two checkouts, ratios of the new over the old.

    python benchmarks/before_after.py OLD_CHECKOUT [--rounds N] [--only NAME ...]

Each checkout has a process of its own, both pinned to one core. They hold their compiled programs and take turns, one
case at a time (old new, new old, ...), so that what disturbs the machine disturbs both. Times are CPU times per step;
the import is timed in fresh processes. The script uses only what both trees have; where a name has moved, the first
that exists is taken. All data are synthetic.
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
    from bilevel.solvers.decentralized import GTDSBO

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


def main() -> None:
    """Print the ratios."""
    parser = _harness.arguments(__doc__, rounds=9)
    parser.add_argument("old", type=Path, help="a checkout of the old tree")
    parser.add_argument("--new", type=Path, default=HERE.parents[1], help="of the new one (default: this)")
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--scale", type=float, default=1.0, help="steps of one timing, as a part of the usual number")
    parser.add_argument("--side", action="store_true", help="serve one checkout's timings (used by itself)")
    options = _harness.start(parser, "optax", scale=0.02)
    if options.side:
        return side(options)
    checkouts = {"old": options.old.resolve(), "new": options.new.resolve()}
    environments = {
        name: {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{HERE.parent}", "PYTHONDONTWRITEBYTECODE": ""}
        for name, path in checkouts.items()
    }
    command = [sys.executable, str(HERE), str(options.old), "--side", "--scale", str(options.scale), "--only"]
    served = {
        name: subprocess.Popen(
            [*command, *options.only], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name, environment in environments.items()
    }
    names = {}
    for name, process in served.items():
        process.stdout.readline()  # the versions
        where, names[name], failed = json.loads(process.stdout.readline())
        assert Path(where).is_relative_to(checkouts[name]), f"{name}: imported {where}, not from {checkouts[name]}."
        for family, error in failed.items():
            print(f"{name}: {family} is not timed: {error.splitlines()[0]}")

    def ask(name: str, case: str) -> float:
        served[name].stdin.write(f"{case}\n")
        served[name].stdin.flush()
        return float(served[name].stdout.readline())

    def importing(name: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, text=True, env=environments[name], check=True
        )
        return float(done.stdout.split()[0])

    cases: dict[str, tuple[Callable[[str], float], float, str]] = {
        case: (lambda name, case=case: ask(name, case), 1e6, "us") for case in names["old"] if case in names["new"]
    }
    cases["import bilevel, above jax and optax"] = (importing, 1e3, "ms")
    begun = time.perf_counter()
    rows = [("", "old", "new", "new / old: median (min, max)")]
    for case, (measure, unit, label) in cases.items():
        times = {name: _harness.Times() for name in served}
        for number in range(options.rounds + 1):
            for name in ("old", "new") if number % 2 else ("new", "old"):
                spent = measure(name)
                if number:
                    times[name].cpu.append(spent)
        each = [f"{times[name].median(unit=unit):.2f} {label}" for name in ("old", "new")]
        rows.append((case, *each, _harness.ratio(times["new"], times["old"])))
    _harness.table(*rows)
    print(f"{options.rounds} rounds on one core, {time.perf_counter() - begun:.0f} s")
    for process in served.values():
        process.stdin.close()
        process.wait()
    return None


if __name__ == "__main__":
    main()
