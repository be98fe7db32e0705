"""Which defences hold against perturbations that were tuned through contrastive pretraining? An evaluation, on digits.

Bilevel trigger optimisation tunes a bounded perturbation of images above the pretraining of an encoder, so that
perturbed images are embedded like those of a class. Here it is studied from the defender's side: eighteen defences,
three of them bilevel problems themselves, are given the encoders pretrained with the perturbation and clean ones, and
each is shown with its statistic, its threshold and its false positives. The orderings that papers claim are tested
on every seed and printed as they come out. scikit-learn's 8x8 digits are the only data, and nothing but the picture is
written.

    python examples/trigger_robustness.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from bilevel.applications.contrastive import DEFENCES, METHODS, ROUTES, Pretraining, robustness_study


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, default="simclr")
    parser.add_argument("--bound", type=float, default=0.25, help="L-infinity, of pixels in 0..1")
    parser.add_argument("--share", type=float, default=0.04, help="of the pool that is perturbed")
    parser.add_argument("--steps", type=int, default=500, help="of each pretraining")
    parser.add_argument("--rounds", type=int, default=300, help="of the tuning")
    parser.add_argument("--repair-steps", type=int, default=100, help="of the bilevel defences")
    parser.add_argument("--attacks", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--defences", nargs="+", choices=list(DEFENCES), default=list(DEFENCES))
    parser.add_argument("--out", type=Path, default=Path("trigger_robustness.png"))
    args = parser.parse_args(given)
    began, cpu = time.perf_counter(), time.process_time()
    study = robustness_study(
        tuple(range(args.seeds)),
        bound=args.bound,
        share=args.share,
        pretraining=Pretraining(args.method),
        attacks=args.attacks,
        defences=args.defences,
        steps=args.steps,
        rounds=args.rounds,
        repair_steps=args.repair_steps,
    )
    print(study)
    show(args.out, study)
    seconds = time.perf_counter() - began
    print(f"picture: {args.out}; {seconds:.0f} s, {time.process_time() - cpu:.0f} s of the processor")
    return study


def show(path, study):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.25), height_ratios=(1.35, 1))
    _embeddings(figure.add_subplot(grid[0, 0]), study)
    _statistics(figure.add_subplot(grid[:, 1]), study)
    _images(figure, grid[1, 0].subgridspec(3, 6, wspace=0.05, hspace=0.05), study)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _embeddings(axis, study):
    """Features of test images on their first two principal directions, and those of perturbed ones."""
    labels, features = study.pictures["labels"], study.pictures["features"]
    clean, changed = np.split(features, 2)
    directions = np.linalg.svd(clean - clean.mean(0), full_matrices=False)[2][:2]
    flat = lambda z: (z - clean.mean(0)) @ directions.T
    points = axis.scatter(*flat(clean).T, c=labels, cmap="tab10", s=14, vmin=-0.5, vmax=9.5)
    other = labels != study.settings["target"]
    axis.scatter(*flat(changed[other]).T, c="k", s=16, marker="x", linewidths=0.7, label="perturbed, of other classes")
    axis.figure.colorbar(points, ax=axis, ticks=range(10), label="digit")
    axis.set(title=f"features under attack ({study.attacked}), seed {study.seeds[0]}", xticks=[], yticks=[])
    axis.legend(loc="best", fontsize=8)


def _statistics(axis, study):
    """Each defence's statistic over its threshold, of encoders under attack and of clean ones."""
    names = list(study.defences)[::-1]
    for at, name in enumerate(names):
        d = study.defences[name]
        ratio = lambda values, d=d: np.asarray(values) / d.threshold
        axis.scatter(ratio(d.clean_statistic), np.full(len(d.clean_statistic), at - 0.15), c="C0", s=30, marker="o")
        axis.scatter(ratio(d.statistic), np.full(len(d.statistic), at + 0.15), c="C3", s=30, marker="x")
    axis.scatter([], [], c="C3", marker="x", label="encoders under attack")
    axis.scatter([], [], c="C0", marker="o", label="clean encoders")
    axis.axvline(1, color="k", linewidth=0.8)
    labels = [f"{name} ({'<' if study.defences[name].below else '>'})" for name in names]
    axis.set(yticks=range(len(names)), yticklabels=labels, xlabel="statistic / threshold (flagged: > or <, as said)")
    axis.set_xscale("symlog", linthresh=0.5)
    axis.set_xlim(left=-0.02)
    axis.set_xticks([0, 0.5, 1, 2, 5, 10], ["0", ".5", "1", "2", "5", "10"])
    axis.legend(loc="center right", fontsize=8)
    axis.set_title("what the detectors see")


def _images(figure, grid, study):
    """Test images, the same perturbed up to the bound, and the difference."""
    images, changed = study.pictures["images"], study.pictures["perturbed"]
    bound = study.settings["bound"]
    chosen = [int(np.flatnonzero(study.pictures["labels"] == c)[0]) for c in (1, 3, 4, 5, 7, 9)]
    for column, k in enumerate(chosen):
        for row, what in enumerate((images[k], changed[k], changed[k] - images[k])):
            axis = figure.add_subplot(grid[row, column])
            scale = (
                {"cmap": "RdBu", "vmin": -bound, "vmax": bound}
                if row == 2
                else {"cmap": "gray_r", "vmin": 0, "vmax": 1}
            )
            axis.imshow(what, **scale)
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(("image", f"within {bound:g}", "difference")[row], fontsize=8)


if __name__ == "__main__":
    main()
