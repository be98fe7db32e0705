"""Which atoms and which bonds: the discrete level above a molecule's relaxation, and a proposer for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import LowerProblem
from bilevel.applications.discovery.molecules import MOLECULES, Molecule, energies, relax, residual
from bilevel.proposers import Trial

__all__ = ["QUANTITIES", "MoleculeProposer", "alchemical", "molecule_problem"]

QUANTITIES: dict[str, Callable[[Any], Any]] = {
    "homo": lambda levels: levels[0],
    "lumo": lambda levels: levels[1],
    "gap": lambda levels: levels[1] - levels[0],
}
"""Of (HOMO, LUMO)."""


_RELAXED = 1e-3
"""The error of Coulson's relation, in angstrom, with which lengths are relaxed."""


def _check(quantity: str, size: int) -> None:
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity={quantity!r}: one of {', '.join(QUANTITIES)} is needed.")
    if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size % 2:
        raise ValueError(f"size={size!r}: an even number of atoms is needed.")


def molecule_problem(quantity: str, target: float, size: int = 12) -> Callable[[Any], LowerProblem]:
    """`problem_of` for `search`: bond lengths relaxed to the least energy, then (quantity - target)^2 as upper loss.

    The lower level is stated as its condition, Coulson's relation of length and bond order (m,), whose least squares
    is zero where the energy is stationary; lengths that are not relaxed have no loss. All molecules are padded to
    `size` atoms: one compile serves all of them.

    Args:
      quantity: "homo", "lumo" or "gap", in |beta|.
      target: what it should be.
      size: the most atoms.

    Raises:
      ValueError: an argument; of the function returned, a text that is no molecule.
    """
    _check(quantity, size)
    start = np.full(3 * size // 2, 1.397)

    def score(lengths: Any, arrays: Any, target: Any) -> Any:
        relaxed = jnp.max(jnp.abs(residual(lengths, arrays))) < _RELAXED  # a start that is level by symmetry may stand
        return jnp.where(relaxed, quantity_of(lengths, arrays, target), jnp.inf)

    def quantity_of(lengths: Any, arrays: Any, target: Any) -> Any:
        return (QUANTITIES[quantity](energies(arrays, lengths)) - target) ** 2

    def residuals(lengths: Any, arrays: Any, target: Any) -> Any:
        return residual(lengths, arrays)

    goal = jnp.asarray(float(target))

    def problem_of(proposal: Any) -> LowerProblem:
        molecule = proposal if isinstance(proposal, Molecule) else Molecule.from_text(proposal)
        return LowerProblem(
            start,
            residuals=residuals,
            lower=1.2,
            upper=1.7,
            data=molecule.arrays(size),
            shared=goal,
            score=score,
        )

    return problem_of


@functools.partial(jax.jit, static_argnums=1)
def _alchemical(arrays: Any, quantity: str) -> tuple[Any, Any]:
    def value(alpha: Any) -> Any:
        changed = {**arrays, "alpha": alpha}
        return QUANTITIES[quantity](energies(changed, relax(changed)))

    return jax.value_and_grad(value)(jnp.asarray(arrays["alpha"], float))


def alchemical(molecule: Molecule, quantity: str, size: int | None = None) -> tuple[float, np.ndarray]:
    """(the quantity of the relaxed molecule, its derivative by each atom's alpha (n,)).

    The derivative is a hypergradient: it goes through the relaxation by implicit differentiation. It says, to first
    order, what exchanging an atom would do. A level that is degenerate (benzene's HOMO and LUMO) has none: it is then
    the slope of one orbital among several.
    """
    _check(quantity, 2 if size is None else size)
    value, slope = _alchemical(molecule.arrays(size), quantity)
    return float(value), np.asarray(slope)[: len(molecule.atoms)]


@dataclasses.dataclass(frozen=True)
class MoleculeProposer:
    """Conjugated frames by evolution; proposals are texts that `Molecule.from_text` reads.

    A child exchanges C and N, grows or loses two atoms, or closes or opens a ring of five or six. Where there is a
    target, exchanges are guided: the atom is drawn by how near the exchange would come to the target, to first order,
    by `alchemical`. What it proposes follows from history and key. No frame is proposed twice, in another order of its
    atoms either (as far as colour refinement can tell).

    Attributes:
      size: the most atoms, an even number.
      quantity, target: for guided exchanges; None: exchanges at random.
      exploit: the share of children; the others are random frames.
      parents: how many of the best trials have children.
    """

    size: int = 12
    quantity: str | None = None
    target: float | None = None
    exploit: float = 0.7
    parents: int = 8

    def __post_init__(self) -> None:
        _check("gap" if self.quantity is None else self.quantity, self.size)
        if (self.quantity is None) != (self.target is None):
            raise ValueError("MoleculeProposer: guided exchanges need both quantity and target.")
        if not 0 <= self.exploit <= 1:
            raise ValueError(f"MoleculeProposer(exploit={self.exploit!r}): a share between 0 and 1 is needed.")
        if self.parents < 1:
            raise ValueError(f"MoleculeProposer(parents={self.parents!r}): a positive integer is needed.")

    def ask(self, history: Sequence[Trial], count: int, key: jax.Array) -> list[str]:
        """At most `count` new molecules as texts."""
        random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
        seen = {_fingerprint(Molecule.from_text(t.proposal)) for t in history}
        best = [t for t in sorted(history, key=lambda t: (t.loss, t.number)) if not t.failed][: self.parents]
        slopes: dict[str, Any] = {}
        found: list[str] = []
        for _ in range(40 * count):
            if len(found) == count:
                break
            child: Molecule | None
            if best and random.random() < self.exploit:
                rank = min(int(random.exponential(self.parents / 3)), len(best) - 1)
                child = self._child(random, Molecule.from_text(best[rank].proposal), slopes)
            else:
                child = self._random(random)
            if child is not None and (mark := _fingerprint(child)) not in seen:
                seen.add(mark)
                found.append(child.to_text())
        return found

    def tell(self, results: Sequence[Trial]) -> None:
        """Nothing to remember: `ask` reads the history."""

    def _random(self, random: np.random.Generator) -> Molecule | None:
        molecule: Molecule | None = list(MOLECULES.values())[int(random.integers(len(MOLECULES)))]
        for _ in range(int(random.integers(1, 8))):
            if molecule is not None and len(molecule.atoms) <= self.size:
                molecule = self._child(random, molecule, None) or molecule
        return molecule if molecule is not None and len(molecule.atoms) <= self.size else None

    def _child(self, random: np.random.Generator, parent: Molecule, slopes: dict[str, Any] | None) -> Molecule | None:
        move = random.random()
        try:
            if move < 0.4:
                child = self._exchanged(random, parent, slopes)
            elif move < 0.65:
                child = _grown(random, parent)
            elif move < 0.8:
                child = _shrunk(random, parent)
            elif move < 0.92:
                child = _closed(random, parent)
            else:
                child = _opened(random, parent)
        except ValueError:  # what a move leads to may be no molecule
            return None
        return child if len(child.atoms) <= self.size else None

    def _exchanged(self, random: np.random.Generator, parent: Molecule, slopes: dict[str, Any] | None) -> Molecule:
        """C for N or N for C at one place."""
        n = len(parent.atoms)
        chances = np.ones(n)
        if slopes is not None and self.quantity is not None and self.target is not None:
            name = parent.to_text()
            if name not in slopes:
                slopes[name] = alchemical(parent, self.quantity, self.size)
            value, slope = slopes[name]
            change = np.array([-0.5 if a == "C" else 0.5 for a in parent.atoms])  # of alpha, in |beta|
            off = np.abs(value + slope * change - self.target)
            if np.isfinite(off).all():
                chances = np.exp(-off / max(float(off.min()), 0.05))
        i = int(random.choice(n, p=chances / chances.sum()))
        other = "N" if parent.atoms[i] == "C" else "C"
        return Molecule(parent.atoms[:i] + other + parent.atoms[i + 1 :], parent.bonds)


def _neighbours(molecule: Molecule) -> list[list[int]]:
    near: list[list[int]] = [[] for _ in molecule.atoms]
    for a, b in molecule.bonds:
        near[a].append(b)
        near[b].append(a)
    return near


def _distances(molecule: Molecule, start: int) -> np.ndarray:
    """Bonds on the shortest way from an atom to each."""
    near, found, front = _neighbours(molecule), np.full(len(molecule.atoms), -1), [start]
    found[start] = 0
    while front:
        a = front.pop(0)
        for b in near[a]:
            if found[b] < 0:
                found[b] = found[a] + 1
                front.append(b)
    return found


def _grown(random: np.random.Generator, parent: Molecule) -> Molecule:
    """Two atoms more at an atom, or a ring of six fused to a bond."""
    n = len(parent.atoms)
    if random.random() < 0.5:
        a, b = parent.bonds[int(random.integers(len(parent.bonds)))]
        ring = ((a, n), (n, n + 1), (n + 1, n + 2), (n + 2, n + 3), (n + 3, b))
        return Molecule(parent.atoms + "CCCC", (*parent.bonds, *ring))
    return Molecule(parent.atoms + "CC", (*parent.bonds, (int(random.integers(n)), n), (n, n + 1)))


def _shrunk(random: np.random.Generator, parent: Molecule) -> Molecule:
    """Two atoms less, where the rest is one piece."""
    n = len(parent.atoms)
    gone = {int(i) for i in random.choice(n, 2, replace=False)}
    kept = [i for i in range(n) if i not in gone]
    place = {i: k for k, i in enumerate(kept)}
    bonds = tuple((place[a], place[b]) for a, b in parent.bonds if a in place and b in place)
    return Molecule("".join(parent.atoms[i] for i in kept), bonds)


def _closed(random: np.random.Generator, parent: Molecule) -> Molecule:
    """A bond more, such that a ring of five or six closes."""
    a = int(random.integers(len(parent.atoms)))
    ends = np.flatnonzero(np.isin(_distances(parent, a), (4, 5)))
    if not len(ends):
        raise ValueError("there is no ring to close")
    return Molecule(parent.atoms, (*parent.bonds, (a, int(random.choice(ends)))))


def _opened(random: np.random.Generator, parent: Molecule) -> Molecule:
    """A bond less, where the rest is one piece."""
    i = int(random.integers(len(parent.bonds)))
    return Molecule(parent.atoms, parent.bonds[:i] + parent.bonds[i + 1 :])


def _fingerprint(molecule: Molecule) -> tuple[Any, ...]:
    """The same for molecules that differ by the order of their atoms: colours refined by those of the neighbours."""
    near, colours = _neighbours(molecule), list(molecule.atoms)
    for _ in range(len(colours)):
        signs = [(colours[i], *sorted(colours[j] for j in near[i])) for i in range(len(colours))]
        names = {sign: f"{k:03d}" for k, sign in enumerate(sorted(set(signs)))}
        settled = len(names) == len(set(colours))
        colours = [names[sign] for sign in signs]
        if settled:
            break
    edges = sorted(tuple(sorted((colours[a], colours[b]))) for a, b in molecule.bonds)
    return (tuple(sorted(zip(colours, molecule.atoms, strict=True))), tuple(edges))
