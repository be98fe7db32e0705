"""Look before a long run: curvature of the lower level, and each hypergradient against central differences."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel import derivatives, hypergradients, linear
from bilevel.hypergradients import Implicit, value_and_hypergradient
from bilevel.lower import LBFGS, GradientDescent
from bilevel.problem import Problem, ProblemError, as_variable
from bilevel.solvers.default import default_solver
from bilevel.solvers.single_loop import SABA

PyTree = Any

__all__ = ["Check", "EstimatorCheck", "check", "dominant_eigenvalue", "extreme_eigenvalues"]


def extreme_eigenvalues(
    matvec: Callable[[PyTree], PyTree], like: PyTree, key: Any = 0, steps: int = 40
) -> tuple[jax.Array, jax.Array]:
    """The algebraically smallest and largest eigenvalue of a symmetric linear map on pytrees.

    For at most 64 unknowns the map is made dense and the answer exact; above, it is that of `steps` steps of the Lanczos
    process with full reorthogonalisation from a random start: the smallest is an upper, the largest a lower bound, and
    both are usually close (extreme eigenvalues converge first). Cost: d or `steps` products.

    Args:
      matvec: v -> A v with A symmetric; may be indefinite.
      like: a pytree with the shapes and dtypes of v.
      key: seed or key of the random start.
      steps: Lanczos steps.

    Reference: Golub, Van Loan, "Matrix Computations", chapter 10.
    """
    flat, unravel = ravel_pytree(like)
    d = flat.size
    multiply = lambda v: ravel_pytree(matvec(unravel(v)))[0].astype(flat.dtype)  # noqa: E731
    if d <= 64:
        matrix = jax.vmap(multiply)(jnp.eye(d, dtype=flat.dtype))
        values = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)
        return values[0], values[-1]
    steps = min(steps, d)
    start = jax.random.normal(jax.random.key(key) if isinstance(key, int) else key, (d,), flat.dtype)

    def step(j: jax.Array, carry: Any) -> Any:
        basis, alpha, beta = carry
        q = basis[j]
        w = multiply(q)
        a = jnp.vdot(q, w)
        w = w - basis.T @ (basis @ w)  # against all of the basis, twice: rounding would bring copies of found vectors
        w = w - basis.T @ (basis @ w)
        b = jnp.linalg.norm(w)
        broke = b <= 10 * jnp.finfo(flat.dtype).eps * (jnp.abs(a) + 1e-30)
        following = jnp.where(broke, 0, w / jnp.where(broke, 1, b))
        return basis.at[j + 1].set(following), alpha.at[j].set(a), beta.at[j].set(jnp.where(broke, 0, b))

    basis = jnp.zeros((steps + 1, d), flat.dtype).at[0].set(start / jnp.linalg.norm(start))
    zeros = jnp.zeros(steps, flat.dtype)
    basis, alpha, beta = jax.lax.fori_loop(0, steps, step, (basis, zeros, zeros))
    used = jnp.linalg.norm(basis[:steps], axis=1) > 0.5  # after a breakdown the rest of the basis is zero
    fill = jnp.where(used, alpha, alpha[0])
    off = jnp.where(used[1:], beta[:-1], 0)
    values = jnp.linalg.eigvalsh(jnp.diag(fill) + jnp.diag(off, 1) + jnp.diag(off, -1))
    return values[0], values[-1]


def dominant_eigenvalue(
    loss: Callable[..., jax.Array],
    *,
    weight_decay: float = 0.0,
    dense: int = 256,
    chunk: int = 8,
    steps: int = 64,
    key: int = 0,
) -> Callable[..., jax.Array]:
    """A metric: the algebraically largest eigenvalue of the Hessian of `loss` in x, at the current y.

        solve(..., metrics={"eigenvalue": (dominant_eigenvalue(validation_loss), batch)}, metrics_every=100)

    It is the direct second derivative F_xx(x, y), in all leaves of x together, and not the curvature of x -> F(x, y*(x)):
    the sharpness that RobustDARTS tracks, whose growth announces that an architecture search degenerates. The Hessian
    may be indefinite; a negative eigenvalue of larger modulus is not mistaken for it.

    Args:
      loss: the upper loss, `F(x, y)` or `F(x, y, batch)`.
      weight_decay: of the upper variable; the Hessian of (weight_decay / 2) |x|^2 adds it to every eigenvalue, as in the authors' logs (1e-3).
      dense: up to so many unknowns the Hessian is formed, and the answer is exact; above, it is a lower bound by Lanczos
        (`extreme_eigenvalues`).
      chunk: the Hessian's columns that are computed at once: memory grows with it, and time falls.
      steps, key: Lanczos steps, and the seed of their random start.

    Returns:
      A function of (x, y) or (x, y, batch), for `solve(metrics=...)`. Equal arguments give equal functions, so that a
      program compiled for one serves the other. Cost: one gradient, and one Hessian-vector product per unknown or Lanczos step.

    Reference: Zela et al., "Understanding and Robustifying Differentiable Architecture Search", ICLR 2020.
    """
    if not callable(loss):
        raise TypeError(f"dominant_eigenvalue takes a loss, a function F(x, y[, batch]), not {type(loss).__name__}.")
    return _DominantEigenvalue(loss, weight_decay, dense, chunk, steps, key)


@dataclasses.dataclass(frozen=True)
class _DominantEigenvalue:
    loss: Callable[..., jax.Array]
    weight_decay: float
    dense: int
    chunk: int
    steps: int
    key: int

    def __call__(self, x: PyTree, y: PyTree, *batch: Any) -> jax.Array:
        flat, unravel = ravel_pytree(x)
        gradient = jax.grad(lambda flat: self.loss(unravel(flat), y, *batch))
        _, product = jax.linearize(gradient, flat)
        if flat.size <= self.dense:
            hessian = jax.lax.map(product, jnp.eye(flat.size, dtype=flat.dtype), batch_size=self.chunk)
            largest = jnp.linalg.eigvalsh((hessian + hessian.T) / 2)[-1]
        else:
            largest = extreme_eigenvalues(product, flat, self.key, self.steps)[1]
        return largest + self.weight_decay


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
      variables: descriptions of x and y.
      data: descriptions of the levels' data.
      upper_loss, lower_loss: at (x0, y0).
      lower_eigenvalues: the extreme eigenvalues of f_yy at the lower solution found from (x0, y0).
      condition: their ratio; infinite where the smallest is not positive.
      lower_residual: |f_y| there.
      directional: the central difference of h(x) = F(x, y*(x)) along the random direction.
      estimators: one `EstimatorCheck` each.
      solver: what `solve` would choose.
      reason: why.
      table_bytes: what the tables of a method with memory (`solvers.SABA`) would take on these data; 0 for full batches.
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
        convex = (
            "strongly convex"
            if low > 1e-6 * abs(high)
            else "convex but nearly flat"
            if low > -1e-6 * abs(high)
            else "NOT convex"
        )
        lines = ["Bilevel problem"]
        lines += [f"  {name}: {what}" for name, what in {**self.variables, **self.data}.items()]
        lines += [
            f"  losses at the start: upper {self.upper_loss:.6g}, lower {self.lower_loss:.6g}",
            f"Lower level at its solution from the start (|f_y| = {self.lower_residual:.2g})",
            f"  {convex}: eigenvalues of f_yy in [{low:.3g}, {high:.3g}], condition number {self.condition:.3g}",
            f"Hypergradients against central differences (directional derivative {self.directional:.6g})",
            f"  {'estimator':<44}{'rel. error':>11}{'ms':>9}{'MB':>9}",
        ]
        for e in self.estimators:
            error = "failed" if np.isnan(e.error) else f"{e.error:.1e}"
            lines.append(
                f"  {e.name:<44}{error:>11}{e.milliseconds:>9.2f}{e.megabytes:>9.2f}"
                + (f"  {e.note}" if e.note else "")
            )
        lines.append(f"Solver: {self.reason}")
        if self.table_bytes:
            lines.append(
                f"Tables of solvers.SABA on these data: {self.table_bytes / 2**20:,.1f} MiB (solvers.SRBA needs none)"
            )
        lines += [f"Warning: {w}" for w in self.warnings]
        return "\n".join(lines)


def check(problem: Problem, x0: PyTree, y0: PyTree, *, key: Any = 0, lower_steps: int = 20) -> Check:
    """A report to read before a long run: the lower level's curvature, and which hypergradients are right and what they cost.

    Everything is evaluated on full batches (on the first item of a stream). The lower level is solved with L-BFGS from
    y0; estimators start at that solution, unrolled ones with `lower_steps` gradient steps of length 1/L. Central differences are taken
    in the dtype of the variables: in float32 they are good to about three digits, in float64 to about seven.

    Args:
      problem: the problem.
      x0, y0: the point.
      key: seed of the random direction and of the zeroth-order estimators.
      lower_steps: steps of the unrolled estimators.

    Raises:
      ProblemError: what `problem.validate` finds.
    """
    x, y = as_variable("x0", x0), as_variable("y0", y0)
    problem.validate(x, y)
    full = _full(problem)
    data = {name: repr(source) for name, source in zip(("upper_data", "lower_data"), problem.sources, strict=True)}
    variables = {"x": _describe(x), "y": _describe(y)}
    warnings: list[str] = []
    try:
        solver, reason = default_solver(problem, x, y)
    except ProblemError as error:
        solver, reason = None, str(error)

    upper, lower = jax.jit(lambda p, x, y: (p.full_upper()(x, y), p.full_lower()(x, y)))(full, x, y)
    for name, value in (("upper", upper), ("lower", lower)):
        if not np.isfinite(value):
            raise ProblemError(f"The {name} loss is {value} at (x0, y0): start where both losses are finite.")
    plain = problem.constraint is None and problem.equality is None and bool(jax.tree.leaves(x))
    nonsmooth = problem.project_lower is not None or problem.prox_lower is not None

    found, residual, low, high = _solve_lower(full, x, y, nonsmooth)
    condition = high / low if low > 0 else float("inf")
    if low < -1e-6 * abs(high):
        warnings.append(
            "the lower level is not convex at its solution: implicit hypergradients by CG meet negative curvature; add damping, or take a penalty method."
        )
    elif condition > 1e6:
        warnings.append(
            f"the lower level's condition number is {condition:.1g}: regularise it, or precondition the linear solver."
        )
    estimators: list[EstimatorCheck] = []
    directional = float("nan")
    if plain:
        directional, estimators = _compare(full, x, found, high, nonsmooth, key, lower_steps)
    else:
        warnings.append(
            "hypergradients are not compared: the lower level has coupled constraints, or there is no upper variable."
        )
    return Check(
        variables,
        data,
        float(upper),
        float(lower),
        (low, high),
        condition,
        residual,
        directional,
        estimators,
        solver,
        reason,
        SABA().table_bytes(problem, x, y) if problem.stochastic else 0,
        warnings,
    )


def _full(problem: Problem) -> Problem:
    found = [source.example() if source.host else source.full() for source in problem.sources]
    upper, lower = jax.tree.map(jnp.asarray, found)
    return dataclasses.replace(problem, upper_data=upper, lower_data=lower)


def _describe(tree: PyTree) -> str:
    leaves = jax.tree.leaves(tree)
    count = sum(np.size(leaf) for leaf in leaves)
    shown = ", ".join(f"{jnp.result_type(leaf)}{list(np.shape(leaf))}" for leaf in leaves[:4]) + (
        ", ..." if len(leaves) > 4 else ""
    )
    return f"{count} numbers in {len(leaves)} arrays ({shown})" if leaves else "none: a simple bilevel problem"


def _solve_lower(problem: Problem, x: PyTree, y: PyTree, nonsmooth: bool) -> tuple[PyTree, float, float, float]:
    """The lower solution, its residual and the extreme eigenvalues of f_yy there."""

    @jax.jit
    def eigenvalues(problem: Problem, x: PyTree, y: PyTree) -> Any:
        lin = derivatives.linearised(problem.full_lower(), x, y)
        return *extreme_eigenvalues(lin.hvp, y), derivatives.norm(lin.gradient_y)

    if nonsmooth:
        high = float(eigenvalues(problem, x, y)[1])
        solver = GradientDescent(1 / max(abs(high), 1e-12), 1000, tol=1e-7)
    else:
        solver = LBFGS(300, tol=1e-3 * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y))).eps) ** 0.5)

    @jax.jit
    def minimise(problem: Problem, x: PyTree, y: PyTree) -> PyTree:
        return solver(problem.full_lower(), x, solver.init(y)).y

    y = minimise(problem, x, y)
    low, high, residual = (float(v) for v in eigenvalues(problem, x, y))
    return y, residual, low, high


def _compare(
    problem: Problem, x: PyTree, y: PyTree, high: float, nonsmooth: bool, key: Any, steps: int
) -> tuple[float, list[EstimatorCheck]]:
    step = 1 / max(abs(high), 1e-12)
    eps = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(x))).eps)
    accurate: Any = GradientDescent(step, 2000, tol=10 * eps**0.75) if nonsmooth else LBFGS(300, tol=1e-3 * eps**0.5)
    u = optax.tree.random_like(jax.random.key(key) if isinstance(key, int) else key, x, jax.random.normal)
    u = optax.tree.cast_like(optax.tree.scale(1 / derivatives.norm(u), u), x)

    @jax.jit
    def objective(problem: Problem, x: PyTree, y: PyTree) -> jax.Array:
        return problem.full_upper()(x, accurate(problem.full_lower(), x, accurate.init(y)).y)

    h = eps ** (1 / 3) * (1 + float(derivatives.norm(x)))
    plus, minus = (
        float(objective(problem, optax.tree.cast_like(optax.tree.add_scale(x, s * h, u), x), y)) for s in (1, -1)
    )
    directional = (plus - minus) / (2 * h)

    unrolled = GradientDescent(step, steps)
    rows: list[tuple[str, Any, Any]] = [
        ("Implicit(GMRES)" if nonsmooth else "Implicit(CG)", Implicit(step=step), accurate)
    ]
    if not nonsmooth:
        d = sum(np.size(leaf) for leaf in jax.tree.leaves(y))
        rows += [
            (f"Implicit(Neumann, {steps} terms)", Implicit(linear.Neumann(step, steps)), accurate),
            ("Implicit(Nystrom)", Implicit(linear.Nystrom(rank=min(10, d))), accurate),
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
    return directional, [
        _measure(name, problem, estimator, solver, x, y, u, directional, key) for name, estimator, solver in rows
    ]


def _measure(
    name: str,
    problem: Problem,
    estimator: Any,
    solver: Any,
    x: PyTree,
    y: PyTree,
    u: PyTree,
    directional: float,
    key: Any,
) -> EstimatorCheck:
    def evaluate(problem: Problem, x: PyTree, y: PyTree) -> Any:
        estimate = value_and_hypergradient(problem, estimator, solver)(x, y, key=key)
        return optax.tree.vdot(estimate.gradient, u), estimate.metrics

    try:
        compiled = jax.jit(evaluate).lower(problem, x, y).compile()
        slope, metrics = jax.block_until_ready(compiled(problem, x, y))
        began = time.perf_counter()
        jax.block_until_ready(compiled(problem, x, y))
        elapsed = time.perf_counter() - began
    except Exception as error:
        return EstimatorCheck(
            name, float("nan"), float("nan"), float("nan"), f"{type(error).__name__}: {error}".splitlines()[0][:100]
        )
    memory = compiled.memory_analysis()
    megabytes = getattr(memory, "temp_size_in_bytes", float("nan")) / 1e6 if memory is not None else float("nan")
    relative = abs(float(slope) - directional) / max(abs(directional), 1e-30)
    note = f"{int(metrics['linear_iterations'])} linear iterations" if "linear_iterations" in metrics else ""
    return EstimatorCheck(name, relative, 1e3 * elapsed, megabytes, note)
