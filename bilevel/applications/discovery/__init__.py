"""Scientific discovery: constitutive laws above a differentiable simulation, and molecules above their relaxation."""

from bilevel.applications.discovery.laws import ELASTIC, PLASTIC, energy_stress, invariants, lame, yield_return
from bilevel.applications.discovery.molecules import MOLECULES, Molecule, energies, hamiltonian, relax, spectrum
from bilevel.applications.discovery.mpm import Simulation, State, block
from bilevel.applications.discovery.tasks import TASKS, Task, Verification, task

__all__ = [
    "ELASTIC",
    "MOLECULES",
    "PLASTIC",
    "TASKS",
    "Molecule",
    "Simulation",
    "State",
    "Task",
    "Verification",
    "block",
    "energies",
    "energy_stress",
    "hamiltonian",
    "invariants",
    "lame",
    "relax",
    "spectrum",
    "task",
    "yield_return",
]
