"""What `solve` takes for minibatches when it is given no solver, against the best-tuned stochastic methods.

    python benchmarks/minibatch_default.py                       three shapes, five seeds
    python benchmarks/minibatch_default.py --shape ijcnn1 --seeds 2
    python benchmarks/minibatch_default.py --far 10              x0 and y0 ten times as far from zero

The data are synthetic. A seed makes the data, the start and the batches. On the first seed every method of `METHODS`
runs with every pair of steps of the shape's grid; the one that reaches the goal soonest is "tuned". Then both sides run
on all seeds, in turn, in this process and on one core. The clock is CPU time of finished steps, without compilation and
without the measure, which is taken between chunks.

The goal is 1e-6 of the start's squared hypergradient (quadratics, ijcnn1's shape). For the cleaning of labels, where it
vanishes at infinity, it is a share of the way from F(x0, y*(x0)) to the least value that a long run of AID on all
samples reaches: `--left`, by default three of them, each with a search of its own.
`grid` is the CPU time that the whole search took: what a user pays for steps that nobody has tuned yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import _harness
import _stochastic_problems as problems
import jax
import numpy as np
from stochastic import Ours

from bilevel.data import as_step_key
from bilevel.lower import LBFGS, LowerState
from bilevel.solvers import AID, SABA, SOBA, SRBA, default_solver

GRIDS = {
    "simulated": ((0.1, 0.25, 0.4), (0.1, 0.2, 0.4)),
    "ijcnn1": ((0.25, 1.0), (0.3, 1.0, 3.0)),
    "cleaning": ((0.1, 0.3), (300.0, 1e3, 3e3, 1e4)),
}
"""By shape: steps of y, and of x."""
METHODS = {"SABA": SABA, "SRBA": SRBA, "SOBA": lambda upper, lower: SOBA(upper, lower, decay=None)}
CHUNK = {"simulated": 20, "ijcnn1": 1000, "cleaning": 40}


def cleaning(seed: int, d: int = 200) -> problems.Case:
    """The cleaning of labels with 5,056 training samples; the measure is F(x, y*(x))."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((10, d)) * 0.12
    images = problems._synthetic_classes(rng, 5_056 + 1_280, d, 10, centres, 1.0)
    case = problems.cleaning(images, 5_056, 1_280, seed=seed)
    whole = case.problem.whole()

    @jax.jit
    def value(problem: Any, x: Any, y: Any) -> Any:
        solver = LBFGS(300, tol=1e-6)
        upper, lower = problem.full_levels()
        return upper(x, solver(lower, x, LowerState(y, solver.init(y).memory)).y)

    name = "cleaning, n=5056, d=200 (synthetic)"
    return dataclasses.replace(case, name=name, measure=lambda x, y: float(value(whole, x, y)), measured="F(x, y*(x))")


SHAPES: dict[str, Callable[[int], problems.Case]] = {
    "simulated": lambda seed: problems.simulated(seed=2442 + seed),
    "ijcnn1": lambda seed: problems.logistic(seed=2442 + seed),
    "cleaning": cleaning,
}


class Runner(Ours):
    """A solver on a case, in chunks."""

    def __init__(self, case: problems.Case, solver: Any, seed: int) -> None:
        self.case, self.solver, self.base = case, solver, as_step_key(seed)
        self.restart()


def seconds_to(run: Runner, goal: float, chunk: int, budget: float) -> float:
    """CPU seconds until the measure is at most `goal`; infinite where it is not within the budget."""
    run.run(chunk)  # compile
    run.restart()
    spent = 0.0
    while spent < budget:
        began = time.process_time()
        run.run(chunk)
        spent += time.process_time() - began
        value = run.case.measure(*run.point)
        if value <= goal:
            return spent
        if not np.isfinite(value):
            break
    return math.inf


def goal_of(case: problems.Case, left: float) -> float:
    """What is raced to: what is `left` of the way."""
    start, least = case.measure(case.x0, case.y0), 0.0
    if case.measured != "|grad h|^2":
        run = Runner(dataclasses.replace(case, problem=case.problem.whole()), AID(), 0)
        run.run(100)
        least = case.measure(*run.point)
    return least + left * (start - least)


def moved(case: problems.Case, far: float) -> problems.Case:
    """The case from `far` times as far from zero."""
    return dataclasses.replace(case, x0=case.x0 * far, y0=case.y0 * far)


def main() -> None:
    parser = _harness.arguments(__doc__, rounds=1)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--left", nargs="+", type=float, default=[5e-3, 1e-3, 2e-4], help="goals of the cleaning")
    parser.add_argument("--far", type=float, default=1.0)
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds of one run")
    options = _harness.start(parser, "optax", shape=["ijcnn1"], seeds=1, budget=0.3)
    print(f"{'shape':<36} {'left':<7} {'tuned (y, x)':<24} {'default':<18} {'tuned s':>8} {'ours s':>8}  ratio by seed")
    for shape in options.shape:
        for left in options.left if shape == "cleaning" else (1e-6,):
            race(shape, left, options)


def race(shape: str, left: float, options: argparse.Namespace) -> None:
    """One row."""
    first = moved(SHAPES[shape](0), options.far)
    goal = goal_of(first, left)
    best, which, search = math.inf, None, 0.0
    for name, make in METHODS.items():
        for lower in GRIDS[shape][0]:
            for upper in GRIDS[shape][1]:
                budget = min(options.budget, 1.2 * best)
                taken = seconds_to(Runner(first, make(upper, lower), 0), goal, CHUNK[shape], budget)
                search += min(taken, budget)
                if taken < best:
                    best, which = taken, (name, functools.partial(make, upper, lower), (lower, upper))
    if which is None:
        print(f"{first.name:<36} no method of the grid reached the goal in {options.budget} s")
    ours, tuned, ratios, chosen = [], [], [], ""
    for seed in range(options.seeds):
        case = moved(SHAPES[shape](seed), options.far)
        goal = goal_of(case, left)
        if which is not None:
            tuned.append(seconds_to(Runner(case, which[1](), seed), goal, CHUNK[shape], options.budget))
        choice = default_solver(case.problem, case.x0, case.y0)
        whole = not choice.problem.stochastic
        chosen = f"{'AID, all samples' if whole else type(choice.solver).__name__}"
        run = Runner(dataclasses.replace(case, problem=choice.problem), choice.solver, seed)
        ours.append(seconds_to(run, goal, 1 if whole else CHUNK[shape], options.budget))
        ratios.append(ours[-1] / tuned[-1] if tuned else math.nan)
    label = "-" if which is None else f"{which[0]} {which[2]}"
    print(
        f"{first.name:<36} {left:<7g} {label:<24} {chosen:<18} {np.median(tuned) if tuned else math.nan:>8.2f} "
        f"{np.median(ours):>8.2f}  {' '.join(f'{ratio:.2f}' for ratio in ratios)}; median {np.median(ratios):.2f}; "
        f"grid {search:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
