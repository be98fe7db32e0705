"""Conjugated molecules with a wanted HOMO, LUMO or gap: a stand-in for molecule design, by Hueckel's theory.

    python examples/molecule_design.py

A proposer chooses atoms (C or N) and bonds; below each choice the bond lengths are relaxed to the least energy; the
upper loss is the squared distance of the quantity from its target, in |beta|. Derivatives of the quantity by the atoms'
alpha, through the relaxation by implicit differentiation, guide which atom is exchanged. Beside it stand the same
evolution without that guide and random frames, over several seeds. What is found is relaxed once more by another
solver. Hueckel's model sees pi electrons alone: nothing here is a prediction of a real molecule.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import search
from bilevel.applications.discovery import QUANTITIES, Molecule, MoleculeProposer, energies, molecule_problem, relax

TARGETS = {"gap": 0.75, "homo": -0.65, "lumo": 0.15}
KINDS = ("guided evolution", "evolution", "random frames")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--atoms", type=int, default=12, help="at most")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--quantities", nargs="*", default=list(TARGETS))
    parser.add_argument("--out", type=Path, default=Path("molecule_design.png"))
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    jax.config.update("jax_enable_x64", True)
    runs = {}
    for quantity in args.quantities:
        target = TARGETS[quantity]
        problem_of = molecule_problem(quantity, target, args.atoms)
        proposers = (
            MoleculeProposer(args.atoms, quantity, target),
            MoleculeProposer(args.atoms),
            MoleculeProposer(args.atoms, exploit=0.0),
        )
        print(f"{quantity} of {target} |beta|: the best distance from it by seed, after {args.evaluations} molecules")
        for kind, proposer in zip(KINDS, proposers, strict=True):
            found = [
                search(problem_of, proposer, evaluations=args.evaluations, batch=args.batch, key=seed)
                for seed in range(args.seeds)
            ]
            runs[quantity, kind] = found
            print(f"  {kind:<17}" + " ".join(f"{np.sqrt(f.best.loss):8.1e}" for f in found), flush=True)
        best = min(runs[quantity, KINDS[0]], key=lambda f: f.best.loss)
        value = fresh(best.best.proposal, quantity)
        print(f"  relaxed by another solver: {value:.6f}\n  the best molecules")
        for rank, trial in enumerate(best.ranked(4), 1):
            print(f"    {rank}  {np.sqrt(trial.loss):.1e}  {trial.proposal}")
    draw(args.out, runs, args.quantities, args.atoms)
    print(f"\npicture: {args.out}; {time.perf_counter() - began:.1f} s in all")
    return runs


def fresh(text, quantity):
    """The quantity of a molecule whose lengths are found by fixed-point steps, not by the search's least squares."""
    arrays = Molecule.from_text(text).arrays()
    return float(QUANTITIES[quantity](energies(arrays, relax(arrays, steps=400))))


def layout(molecule, steps=3000):
    """Places in the plane whose distances are those along the bonds."""
    n = len(molecule.atoms)
    hops = np.full((n, n), np.inf)
    np.fill_diagonal(hops, 0)
    for a, b in molecule.bonds:
        hops[a, b] = hops[b, a] = 1
    for k in range(n):
        hops = np.minimum(hops, hops[:, k : k + 1] + hops[k : k + 1])
    wanted = hops**0.85 + np.eye(n)
    best, least = None, np.inf
    for seed in range(4):
        places = np.random.default_rng(seed).normal(size=(n, 2)) * n / 4
        for k in range(steps):
            apart = places[:, None] - places
            distance = np.linalg.norm(apart, axis=-1) + np.eye(n)
            pull = (distance - wanted) / wanted**2 / distance
            np.fill_diagonal(pull, 0)
            places = places - 0.25 * (1 - k / steps) * (pull[..., None] * apart).sum(1)
        stress = np.sum(pull**2 * distance**2)
        if stress < least:
            best, least = places - places.mean(0), stress
    return best


def draw(path, runs, quantities, atoms):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(quantities)), layout="constrained")
    panels = figure.subplots(len(quantities), 2, squeeze=False)
    for (left, right), quantity in zip(panels, quantities, strict=True):
        best = min(runs[quantity, KINDS[0]], key=lambda f: f.best.loss).best
        molecule = Molecule.from_text(best.proposal)
        arrays = molecule.arrays()
        lengths = np.asarray(relax(arrays, steps=400))
        value = float(QUANTITIES[quantity](energies(arrays, jnp.asarray(lengths))))
        places = layout(molecule)
        for (a, b), length in zip(molecule.bonds, lengths, strict=True):
            order = (1.517 - length) / 0.18
            left.plot(*places[[a, b]].T, color="0.3", lw=1 + 7 * max(order - 0.2, 0), solid_capstyle="round", zorder=1)
            box = {"facecolor": "w", "edgecolor": "none", "pad": 0.5}
            left.text(*places[[a, b]].mean(0), f"{length:.3f}", fontsize=6, ha="center", va="center", bbox=box)
        colours = ["0.15" if atom == "C" else "C0" for atom in molecule.atoms]
        left.scatter(*places.T, s=170, c=colours, zorder=2)
        for atom, place in zip(molecule.atoms, places, strict=True):
            left.text(*place, atom, color="w", ha="center", va="center", fontsize=8, zorder=3)
        left.set(aspect="equal", title=f"{quantity} {value:.4f}, wanted {TARGETS[quantity]}; lengths in angstrom")
        left.margins(0.15)
        left.axis("off")
        for kind, colour in zip(KINDS, ("C0", "C1", "C7"), strict=True):
            curves = np.sqrt([f.history["best_loss"] for f in runs[quantity, kind]])
            right.semilogy(np.median(curves, 0), color=colour, label=kind)
            right.fill_between(np.arange(curves.shape[1]), curves.min(0), curves.max(0), color=colour, alpha=0.15)
        right.set(xlabel="molecules", ylabel=f"distance of the {quantity}")
        right.legend(fontsize=8, title="median and range of seeds", title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
