"""Scientific discovery: constitutive laws above a differentiable simulation, and molecules above their relaxation."""

from bilevel.applications.discovery.laws import ELASTIC, PLASTIC, energy_stress, invariants, lame, yield_return
from bilevel.applications.discovery.molecule_search import (
    QUANTITIES,
    MoleculeProposer,
    alchemical,
    molecule_problem,
)
from bilevel.applications.discovery.molecules import MOLECULES, Molecule, energies, energy, hamiltonian, relax, spectrum
from bilevel.applications.discovery.mpm import Simulation, State, block
from bilevel.applications.discovery.tasks import TASKS, Task, Verification, task

__all__ = [
    "ELASTIC",
    "MOLECULES",
    "PLASTIC",
    "QUANTITIES",
    "TASKS",
    "Molecule",
    "MoleculeProposer",
    "Simulation",
    "State",
    "Task",
    "Verification",
    "alchemical",
    "block",
    "energies",
    "energy",
    "energy_stress",
    "hamiltonian",
    "invariants",
    "lame",
    "molecule_problem",
    "relax",
    "spectrum",
    "task",
    "yield_return",
]
