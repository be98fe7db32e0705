"""The four constitutive laws that are to be found from one trajectory, and the two losses by which they are judged."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import LowerProblem
from bilevel.applications.discovery.laws import ELASTIC, PLASTIC, energy_stress, yield_return
from bilevel.applications.discovery.mpm import Simulation, State, block
from bilevel.lower import LeastSquares, LevenbergMarquardt
from bilevel.proposers import Expression, Grammar, GrammarError, Trial, assemble_terms, execute

__all__ = ["TASKS", "Task", "Verification", "task"]

_INSTRUCTIONS = 14  # of a term's register program


@dataclasses.dataclass(frozen=True)
class Verification:
    """How a law does where it was not fitted.

    Attributes:
      apart: the relative distance of positions from the truth, for each fresh start.
      rest_stress: of an energy, the stress of the undeformed body over its stiffness.
      stable: whether an energy resists every small strain.
      tolerance: of `apart`.
    """

    apart: tuple[float, ...]
    rest_stress: float
    stable: bool
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the law may be called found. A distance that is no number is too far."""
        return self.stable and self.rest_stress < 1e-3 and all(a <= self.tolerance for a in self.apart)

    def __str__(self) -> str:
        apart = ", ".join(f"{a:.1e}" for a in self.apart)
        if self.holds:
            return f"the law holds: from fresh starts it is {apart} away from the truth"
        if not self.stable:
            return "NOT the law: the body would not resist small strains"
        if not self.rest_stress < 1e-3:
            return f"NOT the law: the undeformed body would be under stress, {self.rest_stress:.1e} of its stiffness"
        return f"NOT the law, only a fit: from fresh starts it is {apart} away from the truth"


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A law that is hidden in a trajectory.

    The loss is 1e4 times the mean squared distance of positions, over all particles, axes and steps, where the
    rollout is set
    back to the true state every `every` steps (teacher forcing).

    Attributes:
      name: "elasticity", "plasticine", "sand" or "water".
      simulation: grid, clock and walls.
      truth: the states at steps 0, 1, ..., stacked.
      every: steps between two resets.
      elastic, plastic: names of the true laws; that of `unknown` is to be found.
      parameters: of both true laws, by name.
      unknown: "elastic" (an energy of I1 and J is sought) or "plastic" (a yield radius of t and n).
      first: the law that the paper starts from, with its parameters.
    """

    name: str
    simulation: Simulation
    truth: State
    every: int
    elastic: str
    plastic: str
    parameters: dict[str, dict[str, float]]
    unknown: str
    first: tuple[str, dict[str, float]]

    @property
    def variables(self) -> tuple[str, str]:
        """Of a proposed law: (I1, J) of F, or (t, n) = (tr e, |dev e|) of e = log V."""
        return ("I1", "J") if self.unknown == "elastic" else ("t", "n")

    def grammar(self, **options: Any) -> Grammar:
        """The grammar of the sought law's variables, with the options of `Grammar`; I1, J and n are not negative."""
        positive = tuple(v for v in self.variables if v != "t")
        return Grammar(self.variables, **{"positive": positive, **options})

    @property
    def steps(self) -> int:
        """Of the trajectory."""
        return self.truth.x.shape[0] - 1

    def starts(self) -> tuple[State, Any]:
        """(true states at the resets, true positions after them (segments, every, n, d))."""
        count = self.steps // self.every
        begin = jax.tree.map(lambda a: a[: count * self.every : self.every], self.truth)
        follow = self.truth.x[1 : count * self.every + 1]
        return begin, follow.reshape(count, self.every, *follow.shape[1:])

    def residuals_of(self, elastic: Any, plastic: Any, shared: Any) -> Any:
        """Whose sum of squares is the loss, for laws that are functions of F."""
        begin, follow = shared
        found = self.simulation.forced(begin, self.every, elastic, plastic).x
        return 100.0 * (found - follow) / math.sqrt(follow.size)

    # ------------------------------------------------------------ a known law

    def named(self, law: str, parameters: Any) -> tuple[Any, Any]:
        """(elastic, plastic) as functions of F, where the unknown one is this law of the tables with these
        parameters."""
        laws = {"elastic": (ELASTIC, self.elastic), "plastic": (PLASTIC, self.plastic)}
        chosen = []
        for kind, (table, true) in laws.items():
            name, given = (law, parameters) if kind == self.unknown else (true, self.parameters[kind])
            if name not in table:
                raise ValueError(f"{name!r} is no {kind} law; there are {', '.join(table)}.")
            chosen.append(functools.partial(_with, table[name], given))
        return chosen[0], chosen[1]

    def loss(self, law: str, parameters: Any) -> Any:
        """Of a law of the tables."""
        return jnp.sum(self.residuals_of(*self.named(law, parameters), self.starts()) ** 2)

    def fit(self, law: str, start: dict[str, float], steps: int = 20, noise: Any = None) -> LeastSquares:
        """A law of the tables, its parameters fitted by Levenberg-Marquardt: log E, log of stresses, nu in (0,
        0.49)."""
        kinds = {"nu": "logit", "friction": None}
        solver = LevenbergMarquardt(
            steps=steps,
            transform={name: kinds.get(name, "log") for name in start},
            lower={name: 0.0 if name in kinds else 1e-6 for name in start},
            upper={name: {"nu": 0.49, "friction": 89.0}.get(name, math.inf) for name in start},
        )
        shared = self.starts()
        if noise is not None:
            shared = shared[0], shared[1] + noise

        @jax.jit
        def run(start: Any, shared: Any) -> LeastSquares:
            return solver.fit(lambda p: self.residuals_of(*self.named(law, p), shared), start)

        return run({name: jnp.asarray(float(v)) for name, v in start.items()}, shared)

    # ------------------------------------------------------------ proposed laws

    def true_law(self) -> tuple[list[str], list[float]] | None:
        """The truth as terms of an additive law in `variables` and their coefficients; None where it is not one."""
        if self.elastic == "neo_hookean" and self.unknown == "elastic":
            given = self.parameters["elastic"]
            mu = given["E"] / (2 * (1 + given["nu"]))
            lam = given["E"] * given["nu"] / ((1 + given["nu"]) * (1 - 2 * given["nu"]))
            return ["I1", "log(J)", "sq(log(J))"], [mu / 2, -mu, lam / 2]
        return None

    def program(self, law: Expression, terms: int = 3) -> Any:
        """The register programs of an additive law's terms."""
        return assemble_terms(law, self.variables, terms, _INSTRUCTIONS)

    def _proposed(self, coefficients: Any, program: Any) -> tuple[Any, Any]:
        """(elastic, plastic) with the proposed law in the place of the unknown one."""

        def law(a: Any, b: Any) -> Any:
            values = jax.vmap(lambda term: execute(term, (a, b)))(program)
            return jnp.tensordot(coefficients, values, 1)

        return self._with_law(law)

    def _with_law(self, law: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
        if self.unknown == "elastic":
            return energy_stress(law), functools.partial(_with, PLASTIC[self.plastic], self.parameters["plastic"])
        tension = self.plastic == "von_mises"
        return functools.partial(_with, ELASTIC[self.elastic], self.parameters["elastic"]), yield_return(law, tension)

    def _rollout_residuals(self, coefficients: Any, program: Any, shared: Any) -> Any:
        return self.residuals_of(*self._proposed(coefficients, program), shared)

    def problem_of(self, law: Expression, terms: int = 3) -> LowerProblem:
        """The whole problem of an additive law: its coefficients, so that teacher-forced rollouts follow the truth.

        The law is a register program, so that one compile serves all of them.
        """
        start, data = np.zeros(terms), self.program(law, terms)
        return LowerProblem(start, residuals=self._rollout_residuals, data=data, shared=self._shared_starts)

    def final_problem_of(self, trial: Trial) -> LowerProblem:
        """The same for a law that was fitted already, from its coefficients; compiled for this law, so that its steps
        cost a small part of the register program's."""
        law = trial.proposal

        def residuals(coefficients: Any, shared: Any) -> Any:
            return self.residuals_of(*self._with_law(self._evaluated(law, coefficients)), shared)

        return LowerProblem(np.ravel(trial.y)[: len(law.terms)], residuals=residuals, shared=self._shared_starts)

    def _evaluated(self, law: Expression, coefficients: Any) -> Callable[[Any, Any], Any]:
        return lambda a, b: law.evaluate(dict(zip(self.variables, (a, b), strict=True)), coefficients)

    @functools.cached_property
    def _shared_starts(self) -> Any:
        return jax.tree.map(jnp.asarray, self.starts())

    # ------------------------------------------------------------ one step at a time

    def screening(self, snapshots: int = 6, terms: int = 3) -> Callable[[Expression], LowerProblem]:
        """A cheap problem of an energy: the particles' accelerations in single steps from true states.

        One step is linear in the stress, and the stress of an additive energy in its coefficients. So what is to be
        fitted
        is a linear least squares whose columns each term's stress gives once; particles that touch a wall are left out.
        The loss is relative to the accelerations.

        Raises:
          ValueError: the unknown law is not elastic.
        """
        if self.unknown != "elastic":
            raise ValueError(
                f"screening is for energies, whose stress acts in a single step; {self.name} has an unknown return "
                "map: use problem_of."
            )
        sim = self.simulation
        # Where the body moves as a rigid one there is nothing to see; the later steps are the deformed ones.
        chosen = np.linspace(self.steps // 4, self.steps - 1, snapshots).astype(int)
        states = jax.tree.map(lambda a: a[chosen], self.truth)
        without = jax.vmap(lambda s: sim.step(s, jnp.zeros_like))(states)
        change = self.truth.v[chosen + 1] - without.v
        low, high = (sim.margin + 1.5) * sim.dx, 1 - (sim.margin + 2.5) * sim.dx
        inside = ((states.x > low) & (states.x < high)).all(-1)
        kept = jnp.where(inside, 1.0, 0.0)[..., None]
        scale = kept / jnp.sqrt(jnp.sum((kept * change) ** 2))
        shared = (states, change, scale)

        def features(program: Any, shared: Any) -> Any:
            states, _, scale = shared

            def pushed(state: State, stress: Any) -> Any:
                weights = sim.weights(state.x)
                still = state._replace(v=0 * state.v, c=0 * state.c)
                masses, momenta = sim.to_grid(still, stress, weights)
                v = momenta / jnp.where(masses > 1e-12 * sim.mass, masses, 1.0)[:, None]
                return (v[weights[0]] * weights[1][..., None]).sum(1)

            def column(term: Any) -> Any:
                stress = energy_stress(lambda a, b: execute(term, (a, b)))
                return jax.vmap(lambda s: pushed(s, stress(s.f)))(states) * scale

            return jax.vmap(column)(program)

        def residuals(coefficients: Any, columns: Any, shared: Any) -> Any:
            _, change, scale = shared
            return jnp.tensordot(coefficients, columns, 1) - change * scale

        def problem_of(law: Expression) -> LowerProblem:
            if not isinstance(law, Expression):
                raise GrammarError("an additive law is needed")
            return LowerProblem(
                np.zeros(terms), residuals=residuals, prepare=features, data=self.program(law, terms), shared=shared
            )

        return problem_of

    # ------------------------------------------------------------ whether a law holds

    def fresh_starts(self, count: int = 2, seed: int = 0) -> State:
        """The undeformed block with other velocities and spins than the trajectory's, faster ones; (count, n, ...)."""
        rng, d = np.random.default_rng(seed), self.simulation.dimensions
        x = np.asarray(self.truth.x[0])
        relative, starts = x - x.mean(0), []
        for _ in range(count):
            direction, axis = rng.normal(size=d), rng.normal(size=1 if d == 2 else 3)
            spin = 6.0 * axis / np.linalg.norm(axis)
            if d == 2:
                c = np.array([[0, -spin[0]], [spin[0], 0]])
            else:
                c = np.array([[0, -spin[2], spin[1]], [spin[2], 0, -spin[0]], [-spin[1], spin[0], 0]])
            v = 2.5 * direction / np.linalg.norm(direction) + relative @ c.T
            starts.append(State(x, v, np.broadcast_to(c, (len(x), d, d)), np.broadcast_to(np.eye(d), (len(x), d, d))))
        return jax.tree.map(lambda *a: jnp.asarray(np.stack(a), self.truth.x.dtype), *starts)

    @functools.cached_property
    def _fresh_run(self) -> Callable[..., Any]:
        """Positions from fresh starts: of a proposed law, or of the truth where it is None."""

        @jax.jit
        def run(starts: State, coefficients: Any, program: Any) -> Any:
            true = self.elastic if self.unknown == "elastic" else self.plastic
            if program is None:
                laws = self.named(true, self.parameters[self.unknown])
            else:
                laws = self._proposed(coefficients, program)
            return jax.vmap(lambda s: self.simulation.rollout(s, self.steps, *laws)[1].x)(starts)

        return run

    def verify(
        self, law: Expression, coefficients: Any, *, count: int = 2, seed: int = 0, tolerance: float = 1e-6
    ) -> Verification:
        """Whether a law holds beyond the trajectory that it was found on: from fresh starts, never set back.

        What is compared are positions, which an experiment would give as well; the true law is used for nothing but
        to simulate them. An energy has to be at rest without stress and stable there besides.

        Args:
          law, coefficients: of a trial.
          count, seed: of the fresh starts.
          tolerance: the largest relative distance at which the law is said to hold. Wrong laws that fit well come to
            1e-2 to 1e-4, so that single precision would not do.

        Raises:
          ValueError: the task is in single precision.
        """
        if self.truth.x.dtype != np.float64:
            raise ValueError(
                "Task.verify tells a true law from one that fits well, and needs float64 for it: "
                'jax.config.update("jax_enable_x64", True) before the task is made.'
            )
        starts, program = self.fresh_starts(count, seed), self.program(law, len(np.ravel(coefficients)))
        wanted = self._fresh_run(starts, None, None)
        found = self._fresh_run(starts, jnp.asarray(np.ravel(coefficients)), program)
        length = lambda a: np.linalg.norm(np.asarray(a).reshape(count, -1), axis=1)  # noqa: E731
        apart = length(found - wanted) / length(wanted - starts.x[:, None])
        rest, stable = (0.0, True) if self.unknown == "plastic" else self._at_rest(coefficients, program)
        return Verification(tuple(map(float, apart)), rest, stable, tolerance)

    @functools.cached_property
    def _rest_response(self) -> Callable[..., Any]:
        """Stress of the undeformed body and its change along small strains; one compile for all laws of a task."""

        @jax.jit
        def response(coefficients: Any, program: Any, strains: Any) -> Any:
            stress = self._proposed(coefficients, program)[0]
            rest = jnp.broadcast_to(jnp.eye(strains.shape[-1], dtype=strains.dtype), strains.shape)
            return jax.jvp(jax.vmap(stress), (rest,), (strains,))

        return response

    def _at_rest(self, coefficients: Any, program: Any) -> tuple[float, bool]:
        """(stress at F = I over the stiffness there, whether the stiffness is positive for all small strains)."""
        d = self.simulation.dimensions
        pairs = [(i, j) for i in range(d) for j in range(i, d)]
        strains = np.zeros((len(pairs), d, d))
        for k, (i, j) in enumerate(pairs):
            strains[k, i, j] += 0.5
            strains[k, j, i] += 0.5
        tau, pushed = self._rest_response(jnp.asarray(np.ravel(coefficients)), program, strains)
        stiffness = np.einsum("aij,bij->ab", strains, np.asarray(pushed))
        values = np.linalg.eigvalsh(stiffness + stiffness.T) / 2
        return float(jnp.abs(tau).max() / max(np.abs(values).max(), 1e-300)), bool(values.min() > 0)

    def same_energy(self, law: Expression, coefficients: Any, count: int = 200, seed: int = 0) -> float:
        """How far a law's stress is from the true one, relatively, on random deformations beyond those of the
        trajectory."""
        rng = np.random.default_rng(seed)
        d = self.simulation.dimensions
        drawn = np.eye(d) + 0.25 * rng.normal(size=(count, d, d))
        f = jnp.asarray(drawn[np.linalg.det(drawn) > 0.3])
        values = np.ravel(coefficients)[: len(law.terms)]
        found = energy_stress(lambda a, b: law.evaluate({"I1": a, "J": b}, values))(f)
        true = ELASTIC[self.elastic](f, self.parameters["elastic"])
        return float(jnp.linalg.norm(found - true) / jnp.linalg.norm(true))


def _with(law: Any, parameters: Any, f: Any) -> Any:
    return law(f, parameters)


def _sigmoid(z: float) -> float:
    return 0.49 / (1 + math.exp(-z))


_HENCKY = {"E": 1e5, "nu": 0.2}
# name: elastic, plastic, their parameters, the unknown one, and where the paper starts
TASKS: dict[str, Any] = {
    "elasticity": (
        "neo_hookean",
        "identity",
        {"elastic": {"E": math.exp(13), "nu": _sigmoid(0)}, "plastic": {}},
        "elastic",
        ("linear", {"E": math.exp(10), "nu": _sigmoid(-1)}),
    ),
    "plasticine": (
        "hencky",
        "von_mises",
        {"elastic": _HENCKY, "plastic": {"E": math.exp(13), "nu": 0.25, "yield_stress": 3e4}},
        "plastic",
        ("identity", {}),
    ),
    "sand": (
        "hencky",
        "drucker_prager",
        {"elastic": _HENCKY, "plastic": {"E": math.exp(10), "nu": 0.1, "friction": 25.0}},
        "plastic",
        ("identity", {}),
    ),
    "water": ("hencky", "water", {"elastic": _HENCKY, "plastic": {}}, "plastic", ("identity", {})),
}


def task(
    name: str,
    *,
    full: bool = False,
    per_side: int | None = None,
    grid: int = 20,
    steps: int | None = None,
    every: int = 100,
    parameters: dict[str, dict[str, float]] | None = None,
) -> Task:
    """One of the paper's four tasks: "elasticity", "plasticine", "sand" or "water".

    Scaled for two cores: in 2-D, 144 particles, 400 steps. `full=True` is the paper's scale: 3-D, 1,000 particles on
    20^3
    nodes, 1,000 steps. The truth is simulated here, in the dtype that JAX is set to.

    Args:
      name: of the task.
      full: the paper's scale.
      per_side: particles per side of the block.
      grid: nodes per side.
      steps: of the trajectory.
      every: steps between two resets to the truth.
      parameters: other true parameters, {"elastic": {...}, "plastic": {...}}.

    Source: Ma et al., "LLM and Simulation as Bilevel Optimizers", ICML 2024, and its code (read, not copied).
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; there are {', '.join(TASKS)}.")
    elastic, plastic, true, unknown, first = TASKS[name]
    true = {kind: dict((parameters or {}).get(kind, given)) for kind, given in true.items()}
    d = 3 if full else 2
    steps = steps if steps is not None else (1000 if full else 400)
    if steps < every:
        raise ValueError(f"task(steps={steps}, every={every}): at least one segment of {every} steps is needed.")
    velocity, spin = ((1.0, -0.5, -0.75), (1.0, 3.0, 2.0)) if full else ((1.0, -1.5), 3.0)
    side = 0.5 if full else 0.4
    simulation, state = block(Simulation(d, grid), per_side or (10 if full else 12), side, velocity=velocity, spin=spin)
    laws = (
        functools.partial(_with, t[n], true[k])
        for t, n, k in ((ELASTIC, elastic, "elastic"), (PLASTIC, plastic, "plastic"))
    )
    _, states = jax.jit(lambda s, laws=tuple(laws): simulation.rollout(s, steps, *laws))(state)
    truth = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), state, states)
    return Task(name, simulation, truth, every, elastic, plastic, true, unknown, first)
