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

    repaired = sum(d.after is not None for d in study.defences.values())
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    upper, lower = left.subfigures(2, 1, height_ratios=(1.5, 1))
    _embeddings(upper, study)
    _images(lower, study)
    heights = (len(study.defences) + 2, repaired + 2.5)
    parts = right.subplots(2, 1, height_ratios=heights) if repaired else [right.subplots()]
    _statistics(parts[0], study)
    if repaired:
        _repairs(parts[1], study)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _embeddings(figure, study):
    """Features of test images on their first two principal directions, and those of perturbed ones."""
    pictures, target = study.pictures, study.settings["target"]
    labels, (clean, changed) = pictures["labels"], np.split(pictures["features"], 2)
    directions = np.linalg.svd(clean - clean.mean(0), full_matrices=False)[2][:2]
    flat = lambda z: ((z - clean.mean(0)) @ directions.T).T
    axis = figure.subplots()
    points = axis.scatter(*flat(clean), c=labels, cmap="tab10", s=14, vmin=-0.5, vmax=9.5, alpha=0.7)
    other = labels != target
    for taken, color, what in ((False, "0.6", "their own digit still, or a third"), (True, "k", f"{target}")):
        chosen = other & (pictures["taken"] == taken)
        label = f"perturbed and taken for {what}: {chosen.sum()}"
        axis.scatter(*flat(changed[chosen]), c=color, s=18, marker="x", linewidths=0.8, label=label)
    axis.figure.colorbar(points, ax=axis, ticks=range(10), label="digit")
    axis.set(xticks=[], yticks=[])
    axis.set_title(
        f"Features of test images: attack {study.attacked!r} on class {target}, seed {study.seeds[0]}", size=10
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=8, frameon=False)


def _images(figure, study):
    """Test images, the same perturbed up to the bound, and the difference."""
    images, changed = study.pictures["images"], study.pictures["perturbed"]
    bound = study.settings["bound"]
    chosen = [int(np.flatnonzero(study.pictures["labels"] == c)[0]) for c in (1, 3, 4, 5, 7, 9)]
    rows = {"image": images, f"perturbed within {bound:g}": changed, "difference": changed - images}
    figure.suptitle("Images at the bound", size=10)
    for axis, (name, row) in zip(figure.subplots(3, 1), rows.items(), strict=True):
        gap = np.full((8, 1), np.nan)
        strip = np.concatenate([part for k in chosen for part in (row[k], gap)][:-1], 1)
        ends = (-bound, bound) if name == "difference" else (0, 1)
        drawn = axis.imshow(strip, cmap="RdBu_r" if name == "difference" else "gray_r", vmin=ends[0], vmax=ends[1])
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, size=8, loc="left", pad=2)
        axis.spines[:].set_visible(False)
        figure.colorbar(drawn, ax=axis, ticks=[ends[0], sum(ends) / 2, ends[1]], aspect=8).ax.tick_params(labelsize=7)


def _statistics(axis, study):
    """Each defence's statistic over its threshold, of encoders under attack and of clean ones."""
    names, least, most = list(study.defences)[::-1], 0.05, 20
    for at, name in enumerate(names):
        d = study.defences[name]
        for values, shift, style in ((d.clean_statistic, -0.17, "C0o"), (d.statistic, 0.17, "C3x")):
            over = np.asarray(values) / d.threshold
            over = 1 / np.maximum(over, 1e-9) if d.below else over  # flagged is to the right, always
            axis.plot(np.clip(over, least, most), np.full(len(over), at + shift), style, markersize=5, clip_on=False)
    axis.plot([], [], "C3x", label="encoders under attack")
    axis.plot([], [], "C0o", label="clean encoders")
    axis.axvspan(1, most, color="0.92", zorder=0)
    axis.text(most * 0.93, len(names) - 0.55, "flagged", ha="right", va="top", size=9)
    axis.set(
        xscale="log", xlim=(least, most), ylim=(-0.6, len(names) - 0.4), yticks=range(len(names)), yticklabels=names
    )
    axis.set_xticks([0.05, 0.2, 0.5, 1, 2, 5, 20], ["0.05 or less", "0.2", "0.5", "1", "2", "5", "20"], size=8)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(loc="lower right", fontsize=8)
    below = ", ".join(name for name, d in study.defences.items() if d.below)
    axis.set_title("Statistic over threshold" + (f" ({below}: threshold over statistic)" if below else ""), size=10)


def _repairs(axis, study):
    """The attack's success after each repair and preprocessing, with Wilson intervals, and before."""
    repairs = {name: d for name, d in study.defences.items() if d.after is not None}
    attack = study.attacks[study.attacked]
    for at, d in enumerate(reversed(repairs.values())):
        for share, color, shift in ((d.after[0], "C2", 0.15), (d.after[1], "C3", -0.15)):
            axis.plot(share.interval, [at + shift] * 2, color, linewidth=2)
            axis.plot(share.value, at + shift, "o", color=color, markersize=4)
    lines = ((attack.accuracy, "C2", "accuracy before"), (attack.success, "C3", "attack success before"),
             (attack.control, "0.5", "success on clean encoders"))  # fmt: skip
    for share, color, label in lines:
        axis.axvline(share.value, color=color, linewidth=1, linestyle="--", label=label)
    axis.set(xlim=(0, 1), yticks=range(len(repairs)), yticklabels=list(repairs)[::-1])
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.legend(loc="center", bbox_to_anchor=(0.51, 0.5), fontsize=8)
    axis.set_title("After repair or preprocessing: attack success (left), accuracy (right)", size=10)


if __name__ == "__main__":
    main()
