"""The energy of a rubber block, found from one trajectory of its particles, without any network.

    python examples/constitutive_law.py

A block spins, falls and bounces (a material-point simulation in 2-D). Its law is hidden: neo-Hookean, with E = e^13 and
nu = 0.245. A proposer writes sums of terms in I1 = tr F'F and J = det F; below each sum, its coefficients are fitted to
the particles' accelerations in single steps, and those of the best four again to the whole trajectory. Whether the law
is found is decided by new trajectories from other starts, not by the loss. `--without log` takes the logarithm, and so
the truth, out of the grammar: then the report says that the best law is only a fit. `--seeds 6` does it six times.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import search
from bilevel.applications.discovery import ELASTIC, energy_stress, task
from bilevel.proposers import GrammarProposer


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=6144)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--particles", type=int, default=12, help="per side of the block")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--without", nargs="*", default=[], help="functions that the grammar does not have")
    parser.add_argument("--out", type=Path, default=Path("constitutive_law.png"))
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    jax.config.update("jax_enable_x64", True)

    hidden = task("elasticity", per_side=args.particles)
    grammar = hidden.grammar()
    functions = tuple(f for f in grammar.functions if f not in args.without)
    problem_of = hidden.screening()
    rows, kept = [], None
    for seed in range(args.seed, args.seed + args.seeds):
        discovery = search(
            problem_of,
            GrammarProposer(hidden.grammar(functions=functions), parents=10),
            evaluations=args.evaluations,
            batch=args.batch,
            target=1e-14,
            final_problem_of=hidden.final_problem_of,
            finalists=4,
            key=seed,
        )
        best = discovery.best
        verdict = hidden.verify(best.proposal, best.y)
        print(f"seed {seed}, {len(discovery.trials)} laws: {best.proposal.text(best.y)}\n  {verdict}", flush=True)
        rows.append((seed, len(discovery.trials), best.loss, verdict))
        if kept is None or (verdict.holds and not kept[1].holds):
            kept = discovery, verdict
    if args.seeds > 1:
        print(f"\nthe law was found by {sum(row[3].holds for row in rows)} of {args.seeds} seeds")
    discovery, verdict = kept
    terms, coefficients = hidden.true_law()
    print("\nthe truth      W = " + grammar.additive(terms).text(coefficients))
    print(f"the best law   W = {discovery.best.proposal.text(discovery.best.y)}\n  {verdict}")
    print("\nthe best laws on the whole trajectory, by 1e4 times the mean squared distance of positions")
    for rank, trial in enumerate(discovery.ranked(), 1):
        print(f"  {rank}  {trial.loss:9.2e}  {trial.proposal.text(trial.y)}")
    print("\nthe best laws on single steps, by the squared relative distance of accelerations")
    for rank, trial in enumerate(dataclasses.replace(discovery, finalists=()).ranked(8), 1):
        print(f"  {rank}  {trial.loss:9.2e}  {trial.proposal.text(trial.y)}")
    draw(args.out, hidden, discovery)
    print(f"\npicture: {args.out}; {time.perf_counter() - began:.1f} s in all")
    return rows, discovery


def trajectory(hidden, law):
    """Positions by the law, from the true start, without being set back."""
    start = jax.tree.map(lambda a: a[0], hidden.truth)
    return jax.jit(lambda s: hidden.simulation.rollout(s, hidden.steps, law)[1].x)(start)


def draw(path, hidden, discovery):
    from matplotlib.figure import Figure

    best = discovery.best
    values = jnp.asarray(np.ravel(best.y)[: len(best.proposal.terms)])
    found = energy_stress(lambda a, b: best.proposal.evaluate({"I1": a, "J": b}, values))
    first = functools.partial(lambda law, p, f: law(f, p), ELASTIC[hidden.first[0]], hidden.first[1])
    runs = {
        "truth": hidden.truth.x[1:],
        "start (linear)": trajectory(hidden, first),
        "found": trajectory(hidden, found),
    }
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(2, 4)
    times = np.linspace(hidden.steps // 4, hidden.steps - 1, 4).astype(int)
    for panel, k in zip(panels[0], times, strict=True):
        for (name, x), color, size in zip(runs.items(), ("k", "C1", "C0"), (14, 8, 4), strict=True):
            panel.scatter(*np.asarray(x[k]).T, s=size, color=color, label=name, linewidths=0)
        panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=f"step {k + 1}", xticks=[], yticks=[])
    panels[0, 0].legend(fontsize=8, loc="upper left")
    grid = panels[1, 0].get_gridspec()
    for panel in panels[1]:
        panel.remove()
    left, right = figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2:])
    history = discovery.history
    left.semilogy(history["loss"], ".", ms=2, color="C7", label="a law")
    left.semilogy(history["best_loss"], color="C0", label="best so far")
    left.set(xlabel="evaluations", ylabel="loss")
    left.legend(fontsize=8)
    front = discovery.front()
    finite = [t for t in discovery.trials if not t.failed]
    right.semilogy([t.complexity for t in finite], [t.loss for t in finite], ".", ms=2, color="C7")
    right.semilogy([t.complexity for t in front], [t.loss for t in front], "o-", color="C3", label="Pareto front")
    right.set(xlabel="complexity (nodes and coefficients)", ylabel="loss", xlim=(0, 40))
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
