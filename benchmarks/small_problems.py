"""The front door over small problems with known solutions, beside the plain first-order methods.

    python benchmarks/small_problems.py                    # all problems of tests/known_problems.py
    python benchmarks/small_problems.py --only kink_to_pass two_roads
    python benchmarks/small_problems.py --scale 1e-4       # the losses and variables times this as well, one at a time

Both sides take at most 5,000 steps with tol=1e-4 in float64. `chosen` is `solve` without a solver. `first-order` is AID
without constraints, LV-HBA with affine ones, BiC-GAFFA with others, iterative regularisation for a simple problem; it
cannot state constraints of the upper level.

solved       the point is feasible, lower-optimal to 1e-4 and F is the known least value to 1e-2 (relative)
wrong        CONVERGED, and it is not solved
named        there is no solution, and the result is a word for why
seconds      wall-clock, compilation included
"""

from __future__ import annotations

import collections
import sys
import warnings
from pathlib import Path

import _harness
import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from known_problems import CASES

from bilevel import ProblemError, solve
from bilevel.lower import GradientDescent
from bilevel.solvers import AID, LVHBA, BiCGAFFA, IterativeRegularization

jax.config.update("jax_enable_x64", True)


def affine(rows, case):
    """Whether rows(x, y) is affine, by its values at random points."""
    if rows is None:
        return True
    rng = np.random.default_rng(0)
    like = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=np.shape(leaf))), tree)
    ends = [(like(case.x0), like(case.y0)) for _ in range(2)]
    middle = jax.tree.map(lambda a, b: (a + b) / 2, *ends)
    half = jax.tree.map(lambda a, b: (a + b) / 2, rows(*ends[0]), rows(*ends[1]))
    near = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), rows(*middle), half)
    return all(jax.tree.leaves(near))


def first_order(case):
    """The plain method for the problem's kind."""
    problem = case.problem
    if problem.constraint is not None or problem.equality is not None:
        return LVHBA() if affine(problem.constraint, case) and affine(problem.equality, case) else BiCGAFFA()
    if case.x0 is None:
        return IterativeRegularization()
    if problem.project_lower is not None or problem.prox_lower is not None:
        return AID(lower_solver=GradientDescent(0.1, 1000, tol=1e-6))
    return AID()


def one(case, solver):
    """The result's name, what is wrong with the point, and the time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found, times = _harness.measured(
                lambda: solve(case.problem, case.x0, case.y0, solver, steps=5000, tol=1e-4, progress=False)
            )
        except ProblemError:
            return "refused", "refused", float("nan")
    return found.result.name, case.wrong(found.x, found.y), times.wall[0]


def report(title, cases):
    """A line for each problem, then the counts of both sides."""
    print(f"\n{title}\n{'problem':22s} {'kind':19s} {'chosen':20s} {'':7s} {'s':>6s}   {'first-order':20s}")
    counts = {"chosen": collections.Counter(), "first-order": collections.Counter()}
    seconds = {"chosen": [], "first-order": []}
    for name, case in cases.items():
        line = f"{name:22s} {case.kind:19s} "
        for side, solver in (("chosen", None), ("first-order", first_order(case))):
            result, wrong, took = one(case, solver)
            named = case.value is None and result in case.words
            word = "solved" if not wrong else "wrong" if result == "CONVERGED" else "named" if named else ""
            counts[side][word] += 1
            seconds[side].append(took)
            line += f"{result:20s} {word:7s} {took:6.2f}   "
        print(line, flush=True)
    for side, count in counts.items():
        solvable = sum(case.value is not None for case in cases.values())
        print(
            f"{side:12s} solved {count['solved']} of {solvable}, named {count['named']} of {len(cases) - solvable}, "
            f"wrong CONVERGED {count['wrong']}, median {np.nanmedian(seconds[side]):.2f} s"
        )


def main():
    parser = _harness.arguments(__doc__, rounds=1)
    parser.add_argument("--only", nargs="*", help="names of problems")
    parser.add_argument("--scale", type=float, help="each of F, f, x and y times this in turn")
    options = _harness.start(parser, "scipy", pin=False, only=["capacity", "two_wells"])
    cases = {name: make() for name, make in CASES.items() if not options.only or name in options.only}
    report("As written", cases)
    if options.scale:
        for what in ("upper", "lower", "x", "y"):
            moved = {name: case.scaled(**{what: options.scale}) for name, case in cases.items()}
            report(f"{what} times {options.scale:g}", moved)


if __name__ == "__main__":
    main()
