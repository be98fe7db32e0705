"""Conjugated molecules by Hueckel theory: a stand-in for molecule design that needs no learned predictor.

It is a stand-in: Hueckel's model sees the pi electrons of a planar carbon frame with nitrogen in it and nothing else,
and its couplings here depend on the bond lengths (Su, Schrieffer and Heeger's idea, with Longuet-Higgins and Salem's
exponential).
Energies are in units of |beta|, the coupling at 1.397 angstrom, relative to carbon's alpha.

    H_aa = h_a,   H_ab = -k_ab exp(-(r_ab - r0)/0.3106)          over the bonds of the frame
    E(r)  = 2 sum over occupied orbitals e_i(r) + sum over bonds s(r_ab)

s is the energy of the sigma bond, such that E is stationary where r = 1.517 - 0.18 p (Coulson's relation of bond
length and bond order p). The discrete variable is which atoms and bonds; the lower level relaxes the lengths to the
least E; the upper loss is the distance of HOMO, LUMO or gap from a target.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import implicit

__all__ = ["MOLECULES", "Molecule", "energies", "energy", "hamiltonian", "relax", "residual", "spectrum"]

_R0, _DECAY, _SINGLE, _SLOPE = 1.397, 0.3106, 1.517, 0.18
_ALPHA = {"C": 0.0, "N": 0.5}  # in |beta|; positive: deeper than carbon
_COUPLING = {"CC": 1.0, "CN": 1.0, "NN": 1.0}
_VALENCE = {"C": 3, "N": 2}  # neighbours in the frame, at most: what is left of carbon's is hydrogen


@dataclasses.dataclass(frozen=True)
class Molecule:
    """Atoms and bonds of a conjugated frame, one pi electron each.

    Attributes:
      atoms: "C" or "N" (a pyridine's), one letter each.
      bonds: pairs of atoms' numbers.

    Raises:
      ValueError: a bond names no two atoms, an atom has too many neighbours, or the frame is not one piece.
    """

    atoms: str
    bonds: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        bonds = tuple(sorted({(min(a, b), max(a, b)) for a, b in self.bonds}))
        object.__setattr__(self, "bonds", bonds)
        if unknown := set(self.atoms) - set(_ALPHA):
            raise ValueError(f"Molecule(atoms={self.atoms!r}): {sorted(unknown)} is none of {', '.join(_ALPHA)}.")
        n = len(self.atoms)
        if n < 2 or any(not 0 <= a < b < n for a, b in bonds):
            raise ValueError(
                f"Molecule(bonds={bonds}): pairs of two of the {n} atoms are needed, of at least two atoms."
            )
        for i, atom in enumerate(self.atoms):
            if sum(i in bond for bond in bonds) > _VALENCE[atom]:
                raise ValueError(f"Molecule: atom {i} ({atom}) has more than {_VALENCE[atom]} neighbours in the frame.")
        reached, frontier = {0}, [0]
        while frontier:
            i = frontier.pop()
            new = {b if a == i else a for a, b in bonds if i in (a, b)} - reached
            reached |= new
            frontier += new
        if len(reached) < n:
            raise ValueError("Molecule: the frame is not one piece.")
        if n % 2:
            raise ValueError(f"Molecule: {n} pi electrons leave an orbital half filled; an even number is needed.")

    def __str__(self) -> str:
        return f"{self.atoms} " + " ".join(f"{a}-{b}" for a, b in self.bonds)

    def to_text(self) -> str:
        """What `from_text` reads."""
        return str(self)

    @classmethod
    def from_text(cls, text: str) -> Molecule:
        """A molecule of `CCCC 0-1 1-2 2-3`: letters and pairs of numbers, and nothing else."""
        if not isinstance(text, str) or len(text) > 2000:
            raise ValueError("A molecule is a text of at most 2,000 characters.")
        atoms, *bonds = text.split() or [""]
        pairs = []
        for bond in bonds:
            a, dash, b = bond.partition("-")
            if not (dash and a.isdecimal() and b.isdecimal() and a.isascii() and b.isascii() and len(a) + len(b) < 7):
                raise ValueError("A bond is two numbers with a dash between them.")
            pairs.append((int(a), int(b)))
        return cls(atoms, tuple(pairs))

    def arrays(self, size: int | None = None) -> dict[str, np.ndarray]:
        """Alphas (n,), bonds as pairs (m, 2) and couplings (m,), padded to n = `size` atoms and m = 3n/2 bonds.

        A padded atom has no bond and an alpha far above all others; a padded bond has no coupling.
        """
        n = len(self.atoms) if size is None else size
        if n < len(self.atoms):
            raise ValueError(f"The molecule has {len(self.atoms)} atoms, and at most {n} fit.")
        m = len(self.bonds) if size is None else 3 * n // 2
        alpha = np.full(n, 20.0)
        alpha[: len(self.atoms)] = [-_ALPHA[a] for a in self.atoms]
        pairs, coupling = np.zeros((m, 2), np.int32), np.zeros(m)
        for i, (a, b) in enumerate(self.bonds):
            pairs[i], coupling[i] = (a, b), _COUPLING["".join(sorted(self.atoms[a] + self.atoms[b]))]
        return {
            "alpha": alpha,
            "pairs": pairs,
            "coupling": coupling,
            "electrons": np.asarray(len(self.atoms), np.int32),
        }


def _ring(n: int, first: int = 0) -> list[tuple[int, int]]:
    return [(first + i, first + (i + 1) % n) for i in range(n)]


MOLECULES = {
    "ethylene": Molecule("CC", ((0, 1),)),
    "butadiene": Molecule("CCCC", ((0, 1), (1, 2), (2, 3))),
    "benzene": Molecule("CCCCCC", tuple(_ring(6))),
    "pyridine": Molecule("NCCCCC", tuple(_ring(6))),
    "naphthalene": Molecule("C" * 10, (*_ring(10), (0, 5))),
}
"""By name; naphthalene's bridge is the bond 0-5."""


def hamiltonian(arrays: Any, lengths: Any) -> Any:
    """H (n, n) in |beta|, for bond lengths (m,) in angstrom."""
    alpha, pairs = jnp.asarray(arrays["alpha"], lengths.dtype), arrays["pairs"]
    coupling = -arrays["coupling"] * jnp.exp(-(lengths - _R0) / _DECAY)
    h = jnp.diag(alpha)
    return h.at[pairs[:, 0], pairs[:, 1]].add(coupling).at[pairs[:, 1], pairs[:, 0]].add(coupling)


@jax.custom_jvp
def _levels(h: Any) -> Any:
    """Eigenvalues, ascending."""
    return jnp.linalg.eigh(h)[0]


@_levels.defjvp
def _levels_change(primals: Any, tangents: Any) -> Any:
    e, c = jnp.linalg.eigh(primals[0])
    return e, jnp.einsum("ai,ab,bi->i", c, tangents[0], c)


@jax.custom_jvp
def _density(h: Any, filled: Any) -> Any:
    """The sum of filled_i c_i c_i' (n, n) over orbitals.

    Its derivative is stated, because that of the orbitals is infinite where two of them are level, as benzene's are;
    that of the density has only pairs of unequal filling in it.
    """
    c = jnp.linalg.eigh(h)[1]
    return (c * filled) @ c.T


@_density.defjvp
def _density_change(primals: Any, tangents: Any) -> Any:
    h, filled = primals
    e, c = jnp.linalg.eigh(h)
    apart, unequal = e[:, None] - e, filled[:, None] - filled
    share = jnp.where(jnp.abs(apart) > 1e-9, unequal / jnp.where(jnp.abs(apart) > 1e-9, apart, 1.0), 0.0)
    return (c * filled) @ c.T, c @ (share * (c.T @ tangents[0] @ c)) @ c.T


def spectrum(arrays: Any, lengths: Any) -> tuple[Any, Any]:
    """(orbital energies ascending (n,), bond orders (m,)) at these lengths."""
    h = hamiltonian(arrays, lengths)
    filled = 2.0 * (jnp.arange(h.shape[0]) < arrays["electrons"] // 2)
    pairs = arrays["pairs"]
    return _levels(h), _density(h, filled.astype(h.dtype))[pairs[:, 0], pairs[:, 1]]


def _sigma(lengths: Any) -> Any:
    """s(r), with s'(r) = -(2 / 0.3106) p(r) exp(-(r - r0)/0.3106) where p(r) = (1.517 - r) / 0.18."""
    u = (lengths - _R0) / _DECAY
    return 2 * jnp.exp(-u) * (_SINGLE - lengths - _DECAY) / _SLOPE


def energy(arrays: Any, lengths: Any) -> Any:
    """E of the pi electrons and the sigma bonds, in |beta|; `relax` finds where it is least."""
    filled = 2.0 * (jnp.arange(arrays["alpha"].shape[0]) < arrays["electrons"] // 2)
    bonded = jnp.where(arrays["coupling"] != 0, _sigma(lengths) * arrays["coupling"], 0.0)
    return jnp.vdot(filled, _levels(hamiltonian(arrays, lengths))) + jnp.sum(bonded)


def energies(arrays: Any, lengths: Any) -> Any:
    """(HOMO, LUMO) in |beta|."""
    e = _levels(hamiltonian(arrays, lengths))
    last = arrays["electrons"] // 2
    return jnp.stack([jnp.take(e, last - 1), jnp.take(e, last)])


def residual(lengths: Any, arrays: Any) -> Any:
    """Coulson's relation (m,), zero where E is stationary: r - (1.517 - 0.18 p(r)); a padded bond stays at 1.397."""
    order = spectrum(arrays, lengths)[1]
    return lengths - jnp.where(arrays["coupling"] != 0, _SINGLE - _SLOPE * order, _R0)


def relax(arrays: Any, steps: int = 60) -> Any:
    """The lengths (m,) of least energy, by damped fixed-point steps r <- (r + 1.517 - 0.18 p(r)) / 2.

    Differentiable in the arrays' `alpha` and `coupling` by implicit differentiation at the solution, not through the
    steps.
    """
    start = jnp.full(arrays["coupling"].shape, _R0, jnp.result_type(float, arrays["coupling"]))
    whole = {name: arrays[name] for name in ("pairs", "electrons")}

    def solve(start: Any, smooth: Any) -> Any:
        body = lambda r, _: (r - 0.5 * residual(r, {**whole, **smooth}), None)  # noqa: E731
        return jax.lax.scan(body, start, None, length=steps)[0]

    condition = lambda r, smooth: residual(r, {**whole, **smooth})  # noqa: E731
    smooth = {name: jnp.asarray(arrays[name]) for name in ("alpha", "coupling")}
    return implicit.custom_root(condition)(solve)(start, smooth)
