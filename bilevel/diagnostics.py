"""Look before a long run: the lower level's curvature, each hypergradient against central differences, and whether the
derivative of a training says anything."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel import derivatives, hypergradients, linear
from bilevel._arguments import explained
from bilevel._settings import settings
from bilevel.curvature import extreme_eigenvalues, unit_direction
from bilevel.hypergradients import Implicit, value_and_hypergradient
from bilevel.keys import Draw, StepKey, as_step_key
from bilevel.loop import as_argument, as_solver
from bilevel.lower import LBFGS, GradientDescent, as_lower_solver
from bilevel.optimizers import check_count
from bilevel.precision import working
from bilevel.problem import Problem, ProblemError, as_variable, check_problem
from bilevel.solvers.default import default_solver
from bilevel.solvers.single_loop import SABA
from bilevel.typing import PyTree

__all__ = ["Check", "EstimatorCheck", "Metasmoothness", "check", "metasmoothness"]


@dataclasses.dataclass(frozen=True)
class EstimatorCheck:
    """One estimator at the point.

    Attributes:
      name: the estimator and the lower solver it was run with.
      error: |<G, u> - D| / |D| with D the central difference of h along a random direction u, NaN where it failed.
      milliseconds: wall-clock time of one call, compilation excluded.
      megabytes: temporaries of the compiled call.
      note: what went wrong, or what to know.
    """

    name: str
    error: float
    milliseconds: float
    megabytes: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Check:
    """What `check` found; `print` it.

    Attributes:
      variables, data: descriptions of x and y, and of the levels' data.
      upper_loss, lower_loss: at (x0, y0).
      lower_eigenvalues: the extreme eigenvalues of f_yy at the lower solution found from (x0, y0).
      condition: their ratio; infinite where the smallest is not positive.
      lower_residual: |f_y| there.
      directional: the central difference of h(x) = F(x, y*(x)) along the random direction.
      estimators: one `EstimatorCheck` each.
      solver, reason: what `solve` would choose, and why.
      table_bytes: what the tables of `solvers.SABA` would take on these data; 0 for full batches.
      warnings: sentences.
    """

    variables: dict[str, str]
    data: dict[str, str]
    upper_loss: float
    lower_loss: float
    lower_eigenvalues: tuple[float, float]
    condition: float
    lower_residual: float
    directional: float
    estimators: list[EstimatorCheck]
    solver: Any
    reason: str
    table_bytes: int
    warnings: list[str]

    def __str__(self) -> str:
        low, high = self.lower_eigenvalues
        flat = 1e-6 * abs(high)
        convex = "strongly convex" if low > flat else "convex but nearly flat" if low > -flat else "NOT convex"
        lines = [
            "Bilevel problem",
            *(f"  {name}: {what}" for name, what in {**self.variables, **self.data}.items()),
            f"  losses at the start: upper {self.upper_loss:.6g}, lower {self.lower_loss:.6g}",
            f"Lower level at its solution from the start (|f_y| = {self.lower_residual:.2g})",
            f"  {convex}: eigenvalues of f_yy in [{low:.3g}, {high:.3g}], condition number {self.condition:.3g}",
            f"Hypergradients against central differences (directional derivative {self.directional:.6g})",
            f"  {'estimator':<44}{'rel. error':>11}{'ms':>9}{'MB':>9}",
        ]
        for e in self.estimators:
            error = "failed" if np.isnan(e.error) else f"{e.error:.1e}"
            lines.append(f"  {e.name:<44}{error:>11}{e.milliseconds:>9.2f}{e.megabytes:>9.2f}  {e.note}".rstrip())
        lines.append(f"Solver: {self.reason}")
        if self.table_bytes:
            tables = f"{self.table_bytes / 2**20:,.1f} MiB"
            lines.append(f"Tables of solvers.SABA on these data: {tables} (solvers.SRBA needs none)")
        lines += [f"Warning: {w}" for w in self.warnings]
        return "\n".join(lines)


@explained
def check(problem: Problem, x0: PyTree, y0: PyTree, *, key: Any = 0, lower_steps: int = 20) -> Check:
    """A report to read before a long run: the lower level's curvature, and which hypergradients are right at what cost.

    Everything is evaluated on full batches (on the first item of a stream). The lower level is solved with L-BFGS from
    y0; estimators start at that solution, unrolled ones with `lower_steps` gradient steps of length 1/L. Central
    differences are taken in the dtype of the variables: in float32 they are good to about three digits, in float64 to
    about seven.

    Args:
      x0, y0: the point.
      key: seed of the random direction and of the zeroth-order estimators.
      lower_steps: steps of the unrolled estimators.

    Raises:
      ProblemError: what `problem.validate` finds.
    """
    check_problem("check", problem, "check(problem, x0, y0)")
    x, y = as_variable("x0", x0), as_variable("y0", y0)
    problem.validate(x, y)
    if problem.frozen is not None:
        found = working(problem, x, y)
        problem, x, y = found.problem, found.x, found.y
    upper_data, lower_data = (source.example() if source.host else source.full() for source in problem.sources)
    upper_data, lower_data = jax.tree.map(jnp.asarray, (upper_data, lower_data))
    full = dataclasses.replace(problem, upper_data=upper_data, lower_data=lower_data)
    try:
        solver, reason, _ = default_solver(problem, x, y)
    except ProblemError as error:
        solver, reason = None, str(error)

    upper, lower = jax.jit(lambda p, x, y: (p.full_upper()(x, y), p.full_lower()(x, y)))(full, x, y)
    for name, value in (("upper", upper), ("lower", lower)):
        if not np.isfinite(value):
            raise ProblemError(f"The {name} loss is {value} at (x0, y0): start where both losses are finite.")
    nonsmooth = problem.project_lower is not None or problem.prox_lower is not None
    found, residual, low, high = _solve_lower(full, x, y, nonsmooth)
    condition = high / low if low > 0 else float("inf")
    warnings: list[str] = []
    if low < -1e-6 * abs(high):
        warnings.append(
            "the lower level is not convex at its solution: implicit hypergradients by CG meet negative curvature; add "
            "damping, or take a penalty method."
        )
    elif condition > 1e6:
        cure = "regularise it, or precondition the linear solver"
        warnings.append(f"the lower level's condition number is {condition:.1g}: {cure}.")
    directional, estimators = float("nan"), list[EstimatorCheck]()
    if problem.constraint is None and problem.equality is None and jax.tree.leaves(x):
        directional, estimators = _compare(full, x, found, high, nonsmooth, key, lower_steps)
    else:
        warnings.append(
            "hypergradients are not compared: the lower level has coupled constraints, or there is no upper variable."
        )
    return Check(
        variables={"x": _describe(x), "y": _describe(y)},
        data=dict(zip(("upper_data", "lower_data"), map(repr, problem.sources), strict=True)),
        upper_loss=float(upper),
        lower_loss=float(lower),
        lower_eigenvalues=(low, high),
        condition=condition,
        lower_residual=residual,
        directional=directional,
        estimators=estimators,
        solver=solver,
        reason=reason,
        table_bytes=SABA().table_bytes(problem, x, y) if problem.stochastic else 0,
        warnings=warnings,
    )


# ---------------------------------------------------------------- is the derivative of a training of use


@dataclasses.dataclass(frozen=True)
class Metasmoothness:
    """What `metasmoothness` found; `print` it.

    Attributes:
      smoothness: the mean over the directions, from -1 to 1.
      values: one per direction.
      change: how far a step moves the trained y, |A(x + u) - A(x)| / |A(x)|, the mean over the directions.
      warnings: sentences; none where metagradients of this training can be trusted over such steps.
    """

    smoothness: float
    values: np.ndarray
    change: float
    warnings: list[str]

    def __str__(self) -> str:
        among = f", {len(self.values)} directions from {self.values.min():.2f} to {self.values.max():.2f}"
        lines = [
            f"Metasmoothness {self.smoothness:.3f}{among if len(self.values) > 1 else ''}; "
            f"a step changes the trained y by {self.change:.2g} of its length",
        ]
        return "\n".join(lines + [f"Warning: {w}" for w in self.warnings])


_SMOOTH = 0.7


@settings()
@explained
def metasmoothness(
    problem: Problem,
    x: PyTree,
    y0: PyTree,
    lower_solver: Any,
    *,
    along: PyTree | None = None,
    size: float = 0.1,
    directions: int = 4,
    key: Any = 0,
) -> Metasmoothness:
    """Whether the derivative of a whole training tells what a step in x does, before it is relied on.

    A training can be differentiated exactly and yet its derivative say nothing about any step one would take: with a
    large learning rate the trained y is a rugged function of x. With A(x) = y_T(x) and two steps u in a row,

        d = A(x + u) - A(x),    d' = A(x + 2 u) - A(x + u),    S = sum over i of |d_i| sign(d_i) sign(d'_i) / |d|_1,

    1 where the second step moves every parameter the way the first did, 0 where the two have nothing to do with each
    other. Below 0.7 a warning names the cures. It is a property of the training (rule, learning rate, batches, length,
    network) and of the length of u; three trainings for each direction, and no derivative.

    Args:
      problem, x, y0: as in `hypergradients.value_and_hypergradient`; y0 is where the training begins.
      lower_solver: the training, such as `lower.GradientDescent(optax.adam(1e-3), 1000)`.
      along: the step u, shaped like x (for weights of samples: -1 for those that are left out); None: random signs
        times `size`, and so many `directions` of them.
      size: of the random steps, in units of x.
      directions: how many random steps.
      key: of the draws of the training (the same in all trainings), and of the random steps.

    Reference: Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML Training with Metagradient Descent", 2025.
    """
    x, y = as_variable("x", x), as_variable("y0", y0)
    problem.validate(x, y)
    check_count("metasmoothness", directions=directions)
    solver: Any = as_lower_solver(lower_solver)
    if along is None:
        leaves, structure = jax.tree.flatten(x)
        keys = jax.random.split(as_step_key(key).fold_in(Draw.DIRECTIONS).random, (directions, len(leaves)))
        signs = [
            [size * jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(row, leaves, strict=True)]
            for row in keys
        ]
        steps = [jax.tree.unflatten(structure, row) for row in signs]
    else:
        steps = [as_variable("along", along)]
        shape = lambda tree: (jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
        if shape(steps[0]) != shape(x):
            raise ValueError("metasmoothness(along=...): the step has to be shaped like x.")
    found = working(jax.tree.map(jnp.asarray, problem.captured(x, y)), x, y)
    given = as_argument(solver, found.x, found.y), as_step_key(key)
    at = lambda u, times: _trained(found.problem, *given, optax.tree.add_scale(found.x, times, u), found.y)  # noqa: E731
    first = at(optax.tree.zeros_like(found.x), 0)
    values, changes = [], []
    for u in steps:
        u = jax.tree.map(lambda u, x: jnp.asarray(u, x.dtype), u, found.x)
        second, third = at(u, 1), at(u, 2)
        d, later = np.asarray(second - first, np.float64), np.asarray(third - second, np.float64)
        total = np.abs(d).sum()
        values.append(float(np.sum(np.abs(d) * np.sign(d) * np.sign(later)) / total) if total > 0 else np.nan)
        changes.append(float(np.linalg.norm(d) / max(float(jnp.linalg.norm(first)), 1e-30)))
    smoothness, change, warnings = float(np.mean(values)), float(np.mean(changes)), list[str]()
    if not np.isfinite(change):
        warnings.append("the training diverges: lower its step size.")
    elif np.isnan(smoothness):
        warnings.append(
            "the trained y does not depend on x along this step at all: look for an x that the loss ignores."
        )
    elif smoothness < _SMOOTH:
        warnings.append(
            f"the training is not smooth in x (metasmoothness {smoothness:.2f}, below {_SMOOTH}): its metagradient is "
            "exact and says little about steps of this size. Lower the learning rate or let it decay, take larger "
            "batches, a larger eps in Adam, or smooth activations; or ask for shorter steps."
        )
    return Metasmoothness(smoothness, np.asarray(values), change, warnings)


@jax.jit
def _trained(problem: Problem, solver: Any, key: StepKey, x: PyTree, y: PyTree) -> jax.Array:
    solver = as_solver(solver)
    return ravel_pytree(solver(problem.levels(key).lower, x, solver.init(y)).y)[0]


def _describe(tree: PyTree) -> str:
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return "none: a simple bilevel problem"
    shown = [f"{jnp.result_type(leaf)}{list(np.shape(leaf))}" for leaf in leaves[:4]] + ["..."] * (len(leaves) > 4)
    return f"{optax.tree.size(tree)} numbers in {len(leaves)} arrays ({', '.join(shown)})"


def _solve_lower(problem: Problem, x: PyTree, y: PyTree, nonsmooth: bool) -> tuple[PyTree, float, float, float]:
    """The lower solution, its residual and the extreme eigenvalues of f_yy there."""

    @jax.jit
    def eigenvalues(problem: Problem, x: PyTree, y: PyTree) -> Any:
        lin = derivatives.linearised(problem.full_lower(), x, y)
        return *extreme_eigenvalues(lin.hvp, y), derivatives.norm(lin.gradient_y)

    solver: Any = LBFGS(300, tol=1e-3 * _precision(y) ** 0.5)
    if nonsmooth:
        solver = GradientDescent(_step(float(eigenvalues(problem, x, y)[1])), 1000, tol=1e-7)

    @jax.jit
    def minimise(problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        return solver(problem.full_lower(), x, solver.init(y)).y

    y = minimise(problem, x, y)
    low, high, residual = (float(v) for v in eigenvalues(problem, x, y))
    return y, residual, low, high


def _step(largest: float) -> float:
    return 1 / max(abs(largest), 1e-12)


def _precision(tree: PyTree) -> float:
    return float(jnp.finfo(jnp.result_type(*jax.tree.leaves(tree))).eps)


def _compare(
    problem: Problem, x: PyTree, y: PyTree, high: float, nonsmooth: bool, key: Any, steps: int
) -> tuple[float, list[EstimatorCheck]]:
    step, eps = _step(high), _precision(x)
    accurate: Any = GradientDescent(step, 2000, tol=10 * eps**0.75) if nonsmooth else LBFGS(300, tol=1e-3 * eps**0.5)
    u = unit_direction(x, key)

    @jax.jit
    def objective(problem: Problem, x: PyTree, y: PyTree) -> jax.Array:
        return problem.full_upper()(x, accurate(problem.full_lower(), x, accurate.init(y)).y)

    h = eps ** (1 / 3) * (1 + float(derivatives.norm(x)))
    ends = (optax.tree.cast_like(optax.tree.add_scale(x, s * h, u), x) for s in (1, -1))
    plus, minus = (float(objective(problem, end, y)) for end in ends)
    directional = (plus - minus) / (2 * h)

    unrolled = GradientDescent(step, steps)
    rows: list[tuple[str, Any, Any]]
    rows = [("Implicit(GMRES)" if nonsmooth else "Implicit(CG)", Implicit(step=step), accurate)]
    if not nonsmooth:
        rows += [
            (f"Implicit(Neumann, {steps} terms)", Implicit(linear.Neumann(step, steps)), accurate),
            ("Implicit(Nystrom)", Implicit(linear.Nystrom(rank=min(10, optax.tree.size(y)))), accurate),
            ("JacobianFree (step 1/L)", hypergradients.JacobianFree(step), accurate),
            ("FiniteDifference (virtual step 1/L)", hypergradients.FiniteDifference(step), GradientDescent(step, 1)),
        ]
    rows += [
        (f"Unrolled ({steps} steps of 1/L)", hypergradients.Unrolled(), unrolled),
        (f"Unrolled(last={max(1, steps // 4)})", hypergradients.Unrolled(last=max(1, steps // 4)), unrolled),
        ("OneStep", hypergradients.OneStep(), unrolled),
        ("PZOBO (10 directions)", hypergradients.PZOBO(10, eps**0.4), unrolled),
        ("HOZOG (10 directions)", hypergradients.HOZOG(10, eps**0.4), unrolled),
    ]

    def measure(name: str, estimator: Any, solver: Any) -> EstimatorCheck:
        def evaluate(problem: Problem, x: PyTree, y: PyTree) -> Any:
            estimate = value_and_hypergradient(problem, estimator, solver)(x, y, key=key)
            return derivatives.dot(estimate.gradient, u), estimate.metrics

        nan = float("nan")
        try:
            compiled = jax.jit(evaluate).lower(problem, x, y).compile()
            slope, metrics = jax.block_until_ready(compiled(problem, x, y))
            began = time.perf_counter()
            jax.block_until_ready(compiled(problem, x, y))
            elapsed = time.perf_counter() - began
        except Exception as error:
            return EstimatorCheck(name, nan, nan, nan, f"{type(error).__name__}: {error}".splitlines()[0][:100])
        megabytes = getattr(compiled.memory_analysis(), "temp_size_in_bytes", nan) / 1e6
        relative = abs(float(slope) - directional) / max(abs(directional), 1e-30)
        note = f"{int(metrics['linear_iterations'])} linear iterations" if "linear_iterations" in metrics else ""
        return EstimatorCheck(name, relative, 1e3 * elapsed, megabytes, note)

    return directional, [measure(*row) for row in rows]
