"""Stochastic methods on the problems of benchopt's benchmark_bilevel, alone or against that suite's own solver classes.

    python benchmarks/stochastic.py                                  ours alone
    python benchmarks/stochastic.py --peer PATH --problem ijcnn1     against a checkout of benchmark_bilevel
    python benchmarks/stochastic.py --peer PATH --race               time to accuracy as well, with a figure

The peer needs `pip install benchopt`.

The data are synthetic, but for "mnist", which is Fashion-MNIST where its loader finds it. Both run in this process,
interleaved, on one pinned core, with the same losses, batches and steps, and both give their iterates alone:
`metrics` is what ours costs with the metrics of every step, over that, and `/ SOBA` is ours over our SOBA. Times are
CPU times of finished work (block_until_ready before the clock is read), medians over rounds; ratios are medians of the
rounds' ratios, that to the peer with its quartiles. `agree` is the largest relative difference of the
iterates after `--agree` steps when the peer is fed our order of blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _harness
import _stochastic_problems as problems
import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import as_step_key
from bilevel.keys import Draw, StepKey
from bilevel.solvers.nested import AID
from bilevel.solvers.single_loop import FSLA, MRBO, SABA, SOBA, SPABA, SRBA, SUSTAIN
from bilevel.solvers.stochastic_nested import TTSA, AmIGO, StocBiO
from bilevel.solvers.tuning_free import STFBO

CASES: dict[str, Callable[[], problems.Case]] = {
    "simulated": problems.simulated,
    "simulated-large": lambda: problems.simulated(lower_count=32_768, upper_count=1_024, d=100, p=10),
    "ijcnn1": problems.logistic,
    "covtype": problems.covtype,
    "mnist": lambda: problems.cleaning(problems.fashion_mnist()),
}
# Steps per timed call, and the published best (step, ratio of the steps) for the race.
STEPS = {"simulated": 40, "simulated-large": 40, "ijcnn1": 4000, "covtype": 1000, "mnist": 400}
BEST = {
    ("simulated", "SABA"): (0.1, 1.0), ("simulated", "SRBA"): (0.1, 1.0), ("simulated", "SOBA"): (0.1, 1.0),
    ("simulated-large", "SABA"): (0.1, 1.0), ("simulated-large", "SRBA"): (0.1, 1.0),
    ("ijcnn1", "SABA"): (0.125, 1.0), ("ijcnn1", "SRBA"): (0.25, 1.0),
    ("mnist", "SABA"): (0.1, 1e-3), ("mnist", "SOBA"): (1.0, 1e-4), ("mnist", "SRBA"): (1e-3, 1e-5),
}  # fmt: skip


def ours(name: str, step: float, outer: float) -> Any:
    """This library's solver with the peer's steps."""
    make = {
        "SOBA": lambda: SOBA(outer, step),
        "SABA": lambda: SABA(outer, step),
        "SRBA": lambda: SRBA(outer, step),
        "SPABA": lambda: SPABA(outer, step),
        "FSLA": lambda: FSLA(step, outer, step),
        "SUSTAIN": lambda: SUSTAIN(outer, step, step),
        "MRBO": lambda: MRBO(outer, step, step),
        "TTSA": lambda: TTSA(outer, step, step),
        "StocBiO": lambda: StocBiO(outer, step, hvp_step=step),
        "AmIGO": lambda: AmIGO(outer, step, hvp_step=step),
        "STFBO": lambda: STFBO(),
    }
    return make[name]()


@functools.partial(jax.jit, static_argnames=("steps", "metrics"))
def advance(problem: Any, solver: Any, state: Any, base: StepKey, start: Any, steps: int, metrics: bool = False) -> Any:
    """`steps` steps from `state`; what `jit` of `bilevel.run(...)[0]` does, from any state, and with `metrics` of both
    its results."""

    def step(state: Any, k: Any) -> Any:
        state, found = solver.step(problem, state, StepKey(base.base, k, base.stream))
        return state, found if metrics else None

    return jax.lax.scan(step, state, start + jnp.arange(steps, dtype=jnp.uint32))


class Ours:
    """A run of this library's solver, in chunks; of its iterates alone, or of the metrics of every step as well."""

    metrics = False

    def __init__(self, case: problems.Case, name: str, step: float, outer: float, metrics: bool = False) -> None:
        self.case, self.solver, self.base = case, ours(name, step, outer), as_step_key(0)
        self.metrics = metrics
        self.restart()

    def restart(self) -> None:
        self.state, self.done = self.solver.init(self.case.problem, self.case.x0, self.case.y0, self.base), 0

    def run(self, steps: int) -> None:
        start = jnp.uint32(self.done)
        self.state, _ = advance(self.case.problem, self.solver, self.state, self.base, start, steps, self.metrics)
        self.done += steps
        jax.block_until_ready(self.state)

    @property
    def point(self) -> tuple[Any, Any]:
        return self.state.x, self.state.y


class FullBatch(Ours):
    """A run of AID, which takes all samples at every step and has no step size to choose."""

    def __init__(self, case: problems.Case) -> None:
        every = {name: getattr(case.problem, name).arrays for name in ("upper_data", "lower_data")}
        self.case = dataclasses.replace(case, problem=dataclasses.replace(case.problem, **every))
        self.solver, self.base = AID(), as_step_key(0)
        self.restart()


class Peer:
    """A run of benchmark_bilevel's solver class, in chunks of the one size that it was compiled for."""

    def __init__(self, case: problems.Case, name: str, step: float, ratio: float, orders: Any = None) -> None:
        module = importlib.import_module(f"solvers.{name.lower()}")
        base = importlib.import_module("benchmark_utils.stochastic_jax_solver")
        sampler, self.name = base.init_sampler, name
        if orders is not None:
            base.init_sampler = _replaying(iter(orders))
        try:
            self.solver = module.Solver.get_instance(step_size=step, outer_ratio=ratio, batch_size=64)
            self.solver.set_objective(
                f_inner=case.lower_fn,
                f_outer=case.upper_fn,
                n_inner_samples=case.lower_count,
                n_outer_samples=case.upper_count,
                inner_var0=case.y0,
                outer_var0=case.x0,
            )
        finally:
            base.init_sampler = sampler
        self.restart()

    def restart(self) -> None:
        start = self.solver.init()
        self.memory, self.carry = start if isinstance(start, tuple) else (None, start)
        self.done = 0

    def run(self, steps: int) -> None:
        if self.name == "SABA":
            self.memory, self.carry = self.solver.one_epoch(self.carry, self.memory, steps)
        elif self.name in ("SRBA", "VRBO"):
            self.carry = self.solver.one_epoch(self.carry, steps, self.done)
        else:
            self.carry = self.solver.one_epoch(self.carry, steps)
        self.done += steps
        jax.block_until_ready((self.memory, self.carry))

    @property
    def point(self) -> tuple[Any, Any]:
        return self.carry["outer_var"], self.carry["inner_var"]


def _replaying(orders: Any) -> Callable[..., Any]:
    """A sampler of the peer's that reads given block numbers: first for its inner level, then for its outer one."""

    def init_sampler(n_samples: int, batch_size: int, key: Any) -> Any:
        order = jnp.asarray(next(orders))
        weight = batch_size / n_samples

        def sampler(state: Any) -> Any:
            block = order[state["i_batch"]]
            return block * batch_size, block, weight, {**state, "i_batch": state["i_batch"] + 1}

        return sampler, {
            "batch_order": jnp.zeros(-(-n_samples // batch_size), int),
            "i_batch": jnp.array(0),
            "key": key,
        }

    return init_sampler


def block_orders(case: problems.Case, name: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper blocks that our solver draws in `steps` steps, in the order of the peer's class."""
    lower, upper, base = case.problem.lower_data, case.problem.upper_data, as_step_key(0)
    n = 10

    def at(step: Any) -> tuple[jax.Array, jax.Array]:
        key = StepKey(base.base, step, base.stream)
        low, up = key.fold_in(Draw.LOWER), key.fold_in(Draw.UPPER)
        if name not in ("StocBiO", "AmIGO"):
            return lower.numbered(low)[0][None], upper.numbered(up)[0]
        inner = [lower.numbered(low.inner(i, n))[0] for i in range(n)]
        products = [lower.numbered(low.fold_in(Draw.PRODUCTS).inner(j, n))[0] for j in range(n)]
        return jnp.stack([*inner, *products, lower.numbered(low.fold_in(Draw.CROSS))[0]]), upper.numbered(up)[0]

    numbers = np.arange(steps)
    if name == "SRBA":  # full steps draw nothing there
        period = int((case.lower_count + case.upper_count) * 0.5 / lower.size)
        numbers = numbers[numbers % period != 0]
    low, up = jax.jit(jax.vmap(at))(jnp.asarray(numbers, jnp.uint32))
    return np.asarray(low).reshape(-1), np.asarray(up).reshape(-1)


def cpu(fn: Callable[[], Any]) -> float:
    """CPU seconds of `fn`, which waits for its results."""
    return _harness.measured(fn)[1].median()


HEADER = (
    "problem", "solver", "ours", "metrics", "/ SOBA", "peer", "ratio (quartiles)", "compile", "peer", "ratio", "agree",
)  # fmt: skip


def compare(case: problems.Case, key: str, name: str, arguments: argparse.Namespace) -> tuple[str, ...]:
    """A row of the table: CPU microseconds per iteration, CPU seconds to compile, and agreement."""
    steps = arguments.steps or STEPS[key]
    mine = Ours(case, name, 0.1, 0.1)
    first = cpu(lambda: mine.run(steps))
    theirs, peer_first = None, 0.0
    if arguments.peer and (Path(arguments.peer) / "solvers" / f"{name.lower()}.py").exists():
        made: list[Peer] = []
        peer_first = cpu(lambda: (made.append(Peer(case, name, 0.1, 1.0)), made[0].run(steps)))
        theirs = made[0]
    others = {"metrics": Ours(case, name, 0.1, 0.1, metrics=True)}
    others |= {} if name == "SOBA" else {"SOBA": Ours(case, "SOBA", 0.1, 0.1)}
    for run in others.values():
        run.run(steps)  # compile
    sides: dict[str, Any] = {"ours": mine, **others} | ({} if theirs is None else {"peer": theirs})
    times = _harness.interleaved(
        {side: functools.partial(run.run, steps) for side, run in sides.items()},
        arguments.rounds,
        warm=0,
        before={side: run.restart for side, run in sides.items()},
    )

    def over(a: str, b: str) -> np.ndarray:
        return np.asarray(times[a].cpu) / np.asarray(times[b].cpu)

    per_step = {side: taken.median("cpu", 1e6) / steps for side, taken in times.items()}
    compiled = first - times["ours"].median()
    row = [case.name, name, f"{per_step['ours']:.1f}", f"{np.median(over('metrics', 'ours')):.2f}"]
    row.append("" if name == "SOBA" else f"{np.median(over('ours', 'SOBA')):.2f}")
    if theirs is None:
        return (*row, "", "", f"{compiled:.2f}", "", "", "")
    low, middle, high = np.quantile(over("ours", "peer"), [0.25, 0.5, 0.75])
    peer_compiled = peer_first - times["peer"].median()
    asked = arguments.agree and name in ("SOBA", "SABA", "SRBA", "StocBiO", "AmIGO")
    agree = f"{agreement(case, name, arguments.agree):.0e}" if asked else ""
    row += [f"{per_step['peer']:.1f}", f"{middle:.2f} ({low:.2f}, {high:.2f})", f"{compiled:.2f}"]
    return (*row, f"{peer_compiled:.2f}", f"{compiled / peer_compiled:.2f}", agree)


def agreement(case: problems.Case, name: str, steps: int) -> float:
    """The largest relative difference of x and y after `steps` steps on the same blocks."""
    mine = Ours(case, name, 0.1, 0.1)
    theirs = Peer(case, name, 0.1, 1.0, block_orders(case, name, steps))
    theirs.restart()
    mine.run(steps)
    theirs.run(steps)
    pairs = zip(mine.point, theirs.point, strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30)) for a, b in pairs)


def race(case: problems.Case, key: str, arguments: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    """The figure of merit against CPU time, evaluated between chunks, off the clock; with the published best steps."""
    curves = {}
    untuned = {"STFBO": lambda: Ours(case, "STFBO", 0.0, 0.0), "AID": lambda: FullBatch(case)}
    for name in ("SABA", "SRBA", "SOBA", *untuned):
        chunk = 1 if name == "AID" else arguments.steps or STEPS[key]
        if name in untuned and name in arguments.solver:
            entrants: list[tuple[str, Any]] = [(f"ours {name}", untuned[name])]
        elif name in arguments.solver and (arguments.rate or (key, name) in BEST):
            step, ratio = arguments.rate or BEST[key, name]
            entrants = [(f"ours {name}", lambda n=name, s=step, r=ratio: Ours(case, n, s, s / r))]
            if arguments.peer:
                entrants.append((f"peer {name}", lambda n=name, s=step, r=ratio: Peer(case, n, s, r)))
        else:
            continue
        for label, make in entrants:
            run = make()
            run.run(chunk)  # compile
            run.restart()
            spent, times, values = 0.0, [0.0], [case.measure(*run.point)]
            while spent < arguments.budget and values[-1] > 1e-7 * values[0]:
                spent += cpu(lambda run=run: run.run(chunk))
                times.append(spent)
                values.append(case.measure(*run.point))
                if not np.isfinite(values[-1]):
                    break
            curves[label] = times, values
            target = target_of(case, values[0])
            when = next((t for t, v in zip(times, values, strict=True) if v <= target), None)
            reached = f"{when:.2f} CPU s" if when is not None else "not reached"
            print(
                f"  {label:<12} {case.measured} {values[0]:.3g} -> {values[-1]:.3g} in {spent:.1f} CPU s, "
                f"{run.done} steps; to {target:.3g}: {reached}",
                flush=True,
            )
    return curves


def target_of(case: problems.Case, start: float) -> float:
    """1e-6 of the start's squared hypergradient; for errors, what the case says."""
    return 1e-6 * start if "grad" in case.measured else case.goal


def draw(curves: dict[str, Any], case: problems.Case, path: Path) -> None:
    """Save the curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, (times, values) in curves.items():
        colour = {"SABA": "C0", "SRBA": "C1", "SOBA": "C2", "STFBO": "C3", "AID": "C4"}[label.split()[1]]
        axes.plot(times, values, color=colour, linestyle="-" if label.startswith("ours") else "--", label=label)
    axes.set(xlabel="CPU seconds", ylabel=case.measured, title=case.name)
    axes.set_yscale("log" if "grad" in case.measured else "linear")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Print the table, and with --race the times to accuracy."""
    parser = _harness.arguments(__doc__, rounds=7)
    parser.add_argument("--peer", help="a checkout of benchopt/benchmark_bilevel")
    parser.add_argument("--problem", nargs="+", choices=sorted(CASES), default=["simulated", "ijcnn1", "mnist"])
    parser.add_argument(
        "--solver",
        nargs="+",
        default=["SOBA", "SABA", "SRBA", "AmIGO", "StocBiO"],
        help="also STFBO, SPABA, FSLA, SUSTAIN, MRBO, TTSA; in the race STFBO, and AID on full batches",
    )
    parser.add_argument("--steps", type=int, help="steps per timed call (default: by problem)")
    parser.add_argument("--agree", type=int, default=30, help="steps after which iterates are compared; 0: not")
    parser.add_argument("--race", action="store_true", help="time to accuracy instead of the table")
    parser.add_argument(
        "--rate", nargs=2, type=float, metavar=("STEP", "RATIO"), help="the race's steps, instead of the published best"
    )
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds per method in the race")
    parser.add_argument("--out", default="benchmarks/figures", help="where figures are saved")
    arguments = _harness.start(parser, "optax", "benchopt", problem=["ijcnn1"], steps=20, budget=0.1)
    if arguments.peer:
        sys.path.insert(0, arguments.peer)
    print(f"{jax.devices()[0].device_kind}; CPU microseconds per iteration, medians of {arguments.rounds} rounds")
    rows = [HEADER]
    for key in arguments.problem:
        case = CASES[key]()
        if arguments.race:
            path = Path(arguments.out)
            path.mkdir(parents=True, exist_ok=True)
            draw(race(case, key, arguments), case, path / f"stochastic_{key}.png")
            continue
        rows += [compare(case, key, name, arguments) for name in arguments.solver]
    if len(rows) > 1:
        _harness.table(*rows)


if __name__ == "__main__":
    main()
