"""A material-point simulation (MLS-MPM), differentiable in both modes and to any order.

Per step, with quadratic B-splines w over the 3^d nearest nodes, particle mass m, volume V0 and tau the Kirchhoff
stress:

    particles to grid    m_i = sum_p w m,   (m v)_i = sum_p w [m v_p + (m C_p - dt V0 4/dx^2 tau(F_p)) (x_i - x_p)]
    grid                 v_i <- v_i + dt gravity, then the walls
    grid to particles    v_p = sum_i w v_i,   C_p = 4/dx^2 sum_i w v_i (x_i - x_p)',   x_p <- x_p + dt v_p
                         F_p <- plastic((I + dt C_p) F_p)

The transfer is a scatter. A rollout is a `lax.scan` over checkpointed steps, so that reverse mode keeps one state a
step.

Source: Hu et al., "A Moving Least Squares Material Point Method", SIGGRAPH 2018.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Simulation", "State", "block"]

Law = Callable[[Any], Any]


class State(NamedTuple):
    """Particles: positions and velocities (n, d), affine velocities and deformation gradients (n, d, d)."""

    x: Any
    v: Any
    c: Any
    f: Any


@dataclasses.dataclass(frozen=True)
class Simulation:
    """The grid, the clock and the walls.

    Attributes:
      dimensions: 2 (plane strain) or 3.
      grid: nodes per unit length of the unit box.
      dt: seconds per step.
      density, volume: of a particle: kg per unit volume, and its share of the box at rest.
      gravity: along the last axis.
      walls: "slip" (the velocity into a wall is removed), "sticky" (all velocity is) or "none".
      margin: how many nodes thick the walls are.
      fastest: the largest speed per axis in cells per step; what is faster is cut, so that a bad law ends in a bad
        loss and
        not out of the box.
    """

    dimensions: int = 2
    grid: int = 24
    dt: float = 5e-4
    density: float = 1000.0
    volume: float = 1e-3
    gravity: float = -9.8
    walls: str = "slip"
    margin: int = 3
    fastest: float = 0.5

    def __post_init__(self) -> None:
        if self.dimensions not in (2, 3):
            raise ValueError(f"Simulation(dimensions={self.dimensions!r}): 2 or 3.")
        if self.walls not in ("slip", "sticky", "none"):
            raise ValueError(f"Simulation(walls={self.walls!r}): 'slip', 'sticky' or 'none'.")
        if self.grid < 2 * self.margin + 3:
            raise ValueError(
                f"Simulation(grid={self.grid!r}): at least {2 * self.margin + 3} nodes, for walls of {self.margin}."
            )

    @property
    def dx(self) -> float:
        """The distance of two nodes."""
        return 1 / self.grid

    @property
    def mass(self) -> float:
        """Of a particle."""
        return self.density * self.volume

    def weights(self, x: Any) -> tuple[Any, Any, Any]:
        """(flat node numbers (n, 3^d), weights (n, 3^d), x_i - x_p (n, 3^d, d)) of each particle's nodes."""
        d = self.dimensions
        # The stencil stays inside the grid, for particles that a bad law has thrown out of it too.
        base = jnp.clip(jnp.floor(jax.lax.stop_gradient(x) * self.grid - 0.5).astype(jnp.int32), 0, self.grid - 3)
        fx = x * self.grid - base.astype(x.dtype)
        per_axis = jnp.stack([0.5 * (1.5 - fx) ** 2, 0.75 - (fx - 1) ** 2, 0.5 * (fx - 0.5) ** 2], 1)  # (n, 3, d)
        offsets = np.array(list(itertools.product(range(3), repeat=d)))
        weight = jnp.ones((x.shape[0], 3**d), x.dtype)
        for axis in range(d):
            weight = weight * per_axis[:, offsets[:, axis], axis]
        nodes = base[:, None] + offsets
        flat = nodes[..., 0]
        for axis in range(1, d):
            flat = flat * self.grid + nodes[..., axis]
        distance = (jnp.asarray(offsets, x.dtype) - fx[:, None]) * self.dx
        return flat, weight, distance

    def to_grid(self, state: State, stress: Any, weights: Any = None) -> tuple[Any, Any]:
        """(masses (g^d,), momenta (g^d, d)) of the nodes, with the impulse of the stress."""
        flat, weight, distance = self.weights(state.x) if weights is None else weights
        affine = self.mass * state.c - self.dt * self.volume * 4 * self.grid**2 * stress
        momentum = weight[..., None] * (self.mass * state.v[:, None] + jnp.einsum("nij,nkj->nki", affine, distance))
        nodes = self.grid**self.dimensions
        masses = jnp.zeros(nodes, weight.dtype).at[flat].add(weight * self.mass)
        return masses, jnp.zeros((nodes, self.dimensions), weight.dtype).at[flat].add(momentum)

    def bounded(self, v: Any) -> Any:
        """Grid velocities (g^d, d) after the walls."""
        if self.walls == "none":
            return v
        d, axis_of = self.dimensions, np.arange(self.grid)
        index = np.stack(np.meshgrid(*[axis_of] * d, indexing="ij"), -1).reshape(-1, d)
        low, high = index < self.margin, index > self.grid - 1 - self.margin
        if self.walls == "sticky":
            return jnp.where((low | high).any(-1, keepdims=True), 0.0, v)
        return jnp.where(low, jnp.maximum(v, 0.0), jnp.where(high, jnp.minimum(v, 0.0), v))

    def step(self, state: State, elastic: Law, plastic: Law | None = None) -> State:
        """One step; `elastic` gives the Kirchhoff stress of F, `plastic` the corrected F."""
        weights = self.weights(state.x)
        masses, momenta = self.to_grid(state, elastic(state.f), weights)
        occupied = masses > 1e-12 * self.mass
        v = jnp.where(occupied[:, None], momenta / jnp.where(occupied, masses, 1.0)[:, None], 0.0)
        down = np.zeros(self.dimensions)
        down[-1] = self.gravity
        v = self.bounded(v + self.dt * jnp.asarray(down, v.dtype))
        largest = self.fastest * self.dx / self.dt
        return self.from_grid(state, jnp.clip(v, -largest, largest), weights, plastic)

    def from_grid(self, state: State, v: Any, weights: Any, plastic: Law | None = None) -> State:
        """Particles moved by the grid's velocities."""
        flat, weight, distance = weights
        near = v[flat] * weight[..., None]
        velocity = near.sum(1)
        c = 4 * self.grid**2 * jnp.einsum("nki,nkj->nij", near, distance)
        f = state.f + self.dt * c @ state.f
        x = jnp.clip(state.x + self.dt * velocity, self.dx, 1 - 2 * self.dx)  # where all of a stencil's nodes exist
        return State(x, velocity, c, f if plastic is None else plastic(f))

    def rollout(self, state: State, steps: int, elastic: Law, plastic: Law | None = None) -> tuple[State, State]:
        """(the last state, the states after each step, stacked)."""

        def body(state: State, _: Any) -> tuple[State, State]:
            new = self.step(state, elastic, plastic)
            return new, new

        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), state, None, length=steps)

    def forced(self, truth: State, every: int, elastic: Law, plastic: Law | None = None) -> State:
        """Teacher forcing: a rollout of `every` steps from each of the true states (s, n, ...), side by side.

        Returns the states (s, every, n, ...), to be compared with the truth after each start.
        """
        return jax.vmap(lambda start: self.rollout(start, every, elastic, plastic)[1])(truth)

    def energy(self, state: State, energy_of: Law | None = None) -> Any:
        """Kinetic energy, with that of the affine part, gravity's, and the elastic one where W(F) is given."""
        spin = self.dx**2 / 4
        kinetic = 0.5 * self.mass * (jnp.sum(state.v**2) + spin * jnp.sum(state.c**2))
        elastic = 0.0 if energy_of is None else self.volume * jnp.sum(energy_of(state.f))
        return kinetic - self.mass * self.gravity * jnp.sum(state.x[:, -1]) + elastic

    def momentum(self, state: State) -> tuple[Any, Any]:
        """(linear, angular) momentum; the affine part carries a share of the spin."""
        m, spin = self.mass, self.dx**2 / 4
        linear = m * state.v.sum(0)
        if self.dimensions == 2:
            cross = lambda a, b: a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]  # noqa: E731
            curl = state.c[:, 1, 0] - state.c[:, 0, 1]
            return linear, m * (cross(state.x, state.v) + spin * curl).sum(0)
        c = state.c
        curl = jnp.stack([c[:, 2, 1] - c[:, 1, 2], c[:, 0, 2] - c[:, 2, 0], c[:, 1, 0] - c[:, 0, 1]], -1)
        return linear, m * (jnp.cross(state.x, state.v) + spin * curl).sum(0)


def block(
    simulation: Simulation, per_side: int, side: float = 0.5, centre: Any = 0.5, velocity: Any = None, spin: Any = None
) -> tuple[Simulation, State]:
    """A square (cube) of per_side^d particles at rest strain, moving and spinning; and the simulation with its volumes.

    Args:
      velocity: (d,); None: at rest.
      spin: radians per second, a number in 2-D, (3,) in 3-D.
    """
    d = simulation.dimensions
    line = (np.arange(per_side) + 0.5) / per_side * side - side / 2
    relative = np.stack(np.meshgrid(*[line] * d, indexing="ij"), -1).reshape(-1, d)
    simulation = dataclasses.replace(simulation, volume=(side / per_side) ** d)
    v = np.zeros_like(relative) + (0.0 if velocity is None else np.asarray(velocity, float))
    c = np.zeros((d, d))
    if spin is not None:
        s = np.asarray(spin, float)
        c = np.array([[0, -s], [s, 0]]) if d == 2 else np.array([[0, -s[2], s[1]], [s[2], 0, -s[0]], [-s[1], s[0], 0]])
        v = v + relative @ c.T
    n = len(relative)
    parts = (
        relative + np.asarray(centre, float),
        v,
        np.broadcast_to(c, (n, d, d)),
        np.broadcast_to(np.eye(d), (n, d, d)),
    )
    return simulation, State(*(jnp.asarray(p, jnp.result_type(float)) for p in parts))
