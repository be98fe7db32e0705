"""Linear solvers, held to dense algebra in float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bilevel.applications.attention_contrast import oracle
from bilevel.hypergradients import Implicit, value_and_hypergradient
from bilevel.linear import (
    CG,
    GMRES,
    MINRES,
    BiCGStab,
    Dense,
    Identity,
    Jacobi,
    LinearCarry,
    LinearInfo,
    Neumann,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    Richardson,
    Robust,
    StaleCholesky,
    TaskCG,
)

# What takes the time here is compiling, so XLA is told to do little of it.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# A right-hand side of mixed shapes: a matrix, a scalar, an empty leaf and a tuple. d = 8.
D = 8


def tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    numbers = {
        "w": rng.normal(size=(2, 3)),
        "s": np.asarray(rng.normal()),
        "none": np.zeros((0, 3)),
        "t": (rng.normal(size=1),),
    }
    return jax.tree.map(jnp.asarray, numbers)


def flat(v) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(v)])


def matvec(matrix):
    def multiply(v):
        x, unravel = ravel_pytree(v)
        return unravel(jnp.asarray(matrix, x.dtype) @ x)

    return multiply


def symmetric(eigenvalues, seed: int = 1) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return q @ np.diag(eigenvalues) @ q.T


def spd() -> np.ndarray:
    return symmetric(np.geomspace(0.5, 20, D))


def nonsymmetric() -> np.ndarray:
    a = np.random.default_rng(2).normal(size=(D, D))
    return spd() + 2 * (a - a.T)


@quick_jit
def compiled(solver, matrix, b, carry):
    return solver(matvec(matrix), b, carry)


def run(solver, matrix, b, carry=None):
    """All solves go through one jitted function; solver and matrix are its arguments, so that few compile."""
    return compiled(solver, matrix, b, solver.init(b) if carry is None else carry)


def relative_error(v, matrix, b) -> float:
    expected = np.linalg.solve(matrix, flat(b))
    return float(np.linalg.norm(flat(v) - expected) / np.linalg.norm(expected))


KRYLOV_SYMMETRIC = [CG(tol=1e-11), CG(tol=None), MINRES(tol=1e-11)]
KRYLOV_GENERAL = [
    GMRES(tol=1e-11),
    GMRES(tol=1e-11, restart=5, max_steps=500),
    BiCGStab(tol=1e-11),
    NormalCG(tol=1e-11),
]
PRECONDITIONERS = [
    Jacobi(),
    Jacobi(probes=12),
    NystromPreconditioner(rank=4),
    NystromPreconditioner(rank=D, damping=0.1),
    StaleCholesky(),
]
PRECONDITIONED = [CG(tol=1e-11, preconditioner=p) for p in PRECONDITIONERS] + [
    MINRES(tol=1e-11, preconditioner=p) for p in (Jacobi(), NystromPreconditioner(rank=4))
]
EXACT = [
    *KRYLOV_SYMMETRIC,
    *KRYLOV_GENERAL,
    *PRECONDITIONED,
    Dense(),
    Dense(symmetric=False),
    Neumann(0.08, 900),
    Richardson(0.08, 900),
]


def name(solver) -> str:
    inner = getattr(solver, "preconditioner", None)
    fixed = "" if getattr(solver, "tol", 1) is not None else "-fixed"
    fields = {field.name for field in dataclasses.fields(solver)}
    details = "".join(f"-{k}{getattr(solver, k)}" for k in ("restart", "symmetric", "sketch") if k in fields)
    return type(solver).__name__ + fixed + details + ("" if inner is None else f"+{name(inner)}") + probes(solver)


def probes(solver) -> str:
    return "".join(f"-{k}{getattr(solver, k)}" for k in ("probes", "rank") if getattr(solver, k, None))


def but_slow(names, solvers):
    """The solvers, those of these names marked slow."""
    return [pytest.param(solver, marks=[pytest.mark.slow] * (name(solver) in names)) for solver in solvers]


# Right answers.


@pytest.mark.parametrize("solver", but_slow(["CG+NystromPreconditioner-rank8"], EXACT), ids=name)
def test_solves_a_symmetric_positive_definite_system(solver, x64):
    matrix, b = spd(), tree()
    v, carry, info = run(solver, matrix, b)
    assert relative_error(v, matrix, b) < 1e-9
    assert jax.tree.map(jnp.shape, v) == jax.tree.map(jnp.shape, b)
    true_residual = np.linalg.norm(flat(b) - matrix @ flat(v))
    assert abs(float(info.residual) - true_residual) < 1e-9
    assert not info.negative_curvature
    assert isinstance(info, LinearInfo) and isinstance(carry, LinearCarry)
    # what comes out as a carry goes in as one: same structure, shapes and dtypes, as a scan needs
    assert jax.tree.map(lambda x: (x.shape, x.dtype), carry) == jax.tree.map(
        lambda x: (x.shape, x.dtype), solver.init(b)
    )


@pytest.mark.parametrize("solver", [*KRYLOV_GENERAL, Dense(symmetric=False)], ids=name)
def test_solves_a_nonsymmetric_system(solver, x64):
    matrix, b = nonsymmetric(), tree()
    v, _, info = run(solver, matrix, b)
    assert relative_error(v, matrix, b) < 1e-9
    assert float(info.residual) < 1e-9


@pytest.mark.parametrize("solver", [CG(tol=1e-11), MINRES(tol=1e-11), GMRES(tol=1e-11), Dense()], ids=name)
def test_damping_is_added_to_the_matrix(solver, x64):
    matrix, b = spd(), tree()
    v, _, info = run(dataclasses.replace(solver, damping=3.0), matrix, b)
    assert relative_error(v, matrix + 3 * np.eye(D), b) < 1e-9
    assert float(info.residual) < 1e-9


def test_krylov_solvers_end_after_as_many_iterations_as_distinct_eigenvalues(x64):
    matrix, b = symmetric([1, 1, 1, 3, 3, 3, 7, 7]), tree()
    for solver in (CG(tol=1e-10), MINRES(tol=1e-10), GMRES(tol=1e-10)):
        v, _, info = run(solver, matrix, b)
        assert int(info.iterations) == 3
        assert relative_error(v, matrix, b) < 1e-12


def test_neumann_is_the_partial_sum(x64):
    matrix, b, eta = spd(), tree(), 0.07
    for k in (1, 2, 5):
        series = sum(np.linalg.matrix_power(np.eye(D) - eta * matrix, i) for i in range(k))
        v, _, info = run(Neumann(eta, k), matrix, b)
        np.testing.assert_allclose(flat(v), eta * series @ flat(b), rtol=1e-13)
        np.testing.assert_allclose(float(info.residual), np.linalg.norm(flat(b) - matrix @ flat(v)), rtol=1e-12)
        cold, _, _ = run(Richardson(eta, k), matrix, b)
        np.testing.assert_allclose(flat(cold), flat(v), rtol=1e-12)


def test_richardson_goes_on_where_it_stopped(x64):
    matrix, b = spd(), tree()
    solver = Richardson(0.07, 5)
    _, carry, _ = run(solver, matrix, b)
    v, _, info = run(solver, matrix, b, carry)
    np.testing.assert_allclose(flat(v), flat(run(Neumann(0.07, 10), matrix, b)[0]), rtol=1e-12)
    assert int(info.iterations) == 5


def test_identity_scales(x64):
    matrix, b = spd(), tree()
    v, _, info = run(Identity(0.3), matrix, b)
    np.testing.assert_allclose(flat(v), 0.3 * flat(b))
    np.testing.assert_allclose(float(info.residual), np.linalg.norm(flat(b) - 0.3 * matrix @ flat(b)), rtol=1e-12)


@pytest.mark.parametrize("sketch", ["columns", "gaussian"])
def test_nystrom_is_exact_at_full_rank_and_for_low_rank_matrices(sketch, x64):
    b = tree()
    v, _, info = run(Nystrom(rank=D, rho=0.01, sketch=sketch), spd(), b)
    assert relative_error(v, spd() + 0.01 * np.eye(D), b) < 1e-8
    assert float(info.residual) < 1e-8
    low = symmetric([0, 0, 0, 0, 0, 2, 5, 9])
    v, _, _ = run(Nystrom(rank=3, rho=0.01, sketch=sketch), low, b)
    assert relative_error(v, low + 0.01 * np.eye(D), b) < 1e-8


def test_nystrom_columns_is_the_formula_of_hataya_and_yamada(x64):
    matrix, b, rho, k = spd(), tree(), 0.05, 3
    v, _, _ = run(Nystrom(rank=k, rho=rho), matrix, b)
    candidates = []
    for columns in itertools.combinations(range(D), k):
        c = matrix[:, columns]
        w = c[list(columns)]
        x = flat(b)
        candidates.append(x / rho - c @ np.linalg.solve(w + c.T @ c / rho, c.T @ x) / rho**2)
    errors = [np.linalg.norm(flat(v) - c) / np.linalg.norm(c) for c in candidates]
    assert min(errors) < 1e-9


# Warm starts.


def moving_systems(steps: int = 6):
    for t in range(steps):
        yield (
            symmetric(np.geomspace(1, 300, 40) * (1 + 1e-4 * t)),
            jnp.asarray(np.random.default_rng(5).normal(size=40) + 1e-4 * t),
        )


@pytest.mark.parametrize(
    "solver",
    [
        CG(tol=1e-4),
        MINRES(tol=1e-4),
        GMRES(tol=1e-4, restart=40),
        BiCGStab(tol=1e-4),
        NormalCG(tol=1e-4, max_steps=300),
    ],
    ids=name,
)
def test_a_warm_start_saves_iterations(solver, x64):
    carry, warm, cold = None, [], []
    for matrix, b in moving_systems():
        cold.append(int(run(solver, matrix, b)[2].iterations))
        v, carry, info = run(solver, matrix, b, carry)
        warm.append(int(info.iterations))
        assert np.linalg.norm(b - matrix @ v) < 1.01e-4 * np.linalg.norm(b)
    assert warm[0] == cold[0] > 15
    assert max(warm[1:]) <= 0.6 * min(cold)


@pytest.mark.parametrize(
    "solver", [CG(tol=1e-8), MINRES(tol=1e-8), GMRES(tol=1e-8), BiCGStab(tol=1e-8), NormalCG(tol=1e-8)], ids=name
)
def test_a_bad_warm_start_is_dropped(solver, x64):
    matrix, b = spd(), tree()
    cold = int(run(solver, matrix, b)[2].iterations)
    for far in (1e6, np.nan, np.inf):
        carry = LinearCarry(v=jax.tree.map(lambda x, far=far: np.full_like(x, far), b))
        v, _, info = run(solver, matrix, b, carry)
        assert int(info.iterations) == cold
        assert relative_error(v, matrix, b) < 1e-6


def test_a_zero_right_hand_side_has_the_solution_zero_from_any_start(x64):
    zero = jax.tree.map(np.zeros_like, tree())
    for solver in (*KRYLOV_SYMMETRIC, *KRYLOV_GENERAL, CG(preconditioner=StaleCholesky()), Dense(), Neumann(0.1)):
        v, carry, info = run(solver, spd(), zero, LinearCarry(v=tree()) if name(solver) == "CG" else None)
        assert np.all(flat(v) == 0) and float(info.residual) == 0
        assert np.all(flat(run(solver, spd(), zero, carry)[0]) == 0)


def test_without_warm_start_nothing_is_carried(x64):
    _, carry, first = run(CG(warm_start=False), spd(), tree())
    assert jax.tree.leaves(carry) == []
    assert int(run(CG(warm_start=False), spd(), tree(), carry)[2].iterations) == int(first.iterations) > 0


# Fixed length, breakdowns, indefinite and singular systems.


@quick_jit
def solve_multiple(solver, c, b):
    return solver(lambda v: c * v, b)


@pytest.mark.parametrize("solver", [CG(tol=None), CG(), MINRES(tol=None)], ids=name)
@pytest.mark.parametrize("size", [3, 7840])
def test_multiples_of_the_identity_in_float32(solver, size):
    """At c = 1e-3 (at d = 7840 at c = 0.1) lineax's CG returns NaN, and a fixed length is past convergence at once."""
    b = jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)
    for c in (1e-3, 1.0, 1e3):
        v, _, info = solve_multiple(solver, c, b)
        assert v.dtype == jnp.float32
        np.testing.assert_allclose(v, b / c, rtol=1e-5)
        assert int(info.iterations) <= 2 and not info.negative_curvature


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_right_hand_sides_whose_squares_leave_float32(scale):
    b = np.random.default_rng(0).normal(size=D).astype(np.float32) * np.float32(scale)
    for solver in (CG(), MINRES(), GMRES(), BiCGStab(), NormalCG()):
        v, _, info = run(solver, spd(), b)
        expected = np.linalg.solve(spd(), np.asarray(b, np.float64))
        v = np.asarray(v, np.float64)
        assert np.linalg.norm(v / scale - expected / scale) < 1e-4 * np.linalg.norm(expected / scale)
        assert 0 <= float(info.residual) < 1e-4 * scale * D


@pytest.mark.parametrize(
    "solver",
    [CG(), CG(tol=None), CG(preconditioner=Jacobi()), CG(preconditioner=StaleCholesky())],
    ids=name,
)
def test_cg_reports_negative_curvature_and_stays_finite(solver, x64):
    matrix, b = symmetric([-3, -1, 1, 2, 3, 4, 5, 6]), tree()
    v, carry, info = run(solver, matrix, b)
    assert bool(info.negative_curvature) and np.all(np.isfinite(flat(v)))
    np.testing.assert_allclose(float(info.residual), np.linalg.norm(flat(b) - matrix @ flat(v)), rtol=1e-9)
    v, _, info = run(solver, matrix, b, carry)
    assert np.all(np.isfinite(flat(v)))


def test_cg_at_a_negative_first_curvature_gives_steepest_descent(x64):
    b = tree()
    v, _, info = run(CG(), -2 * np.eye(D), b)
    np.testing.assert_allclose(flat(v), flat(b) / 2)
    assert bool(info.negative_curvature) and int(info.iterations) == 1
    v, _, info = run(CG(), np.zeros((D, D)), b)
    assert np.all(flat(v) == 0) and bool(info.negative_curvature)
    # not from a warm start: that one is kept
    start = jax.tree.map(lambda x: -0.4 * x, b)
    v, _, info = run(CG(), -2 * np.eye(D), b, LinearCarry(v=start))
    np.testing.assert_allclose(flat(v), flat(start))
    assert bool(info.negative_curvature)


def test_enough_damping_cures_negative_curvature(x64):
    matrix, b = symmetric([-3, -1, 1, 2, 3, 4, 5, 6]), tree()
    v, _, info = run(CG(tol=1e-10, damping=4.0), matrix, b)
    assert relative_error(v, matrix + 4 * np.eye(D), b) < 1e-8 and not info.negative_curvature


@pytest.mark.parametrize(
    "solver",
    [MINRES(tol=1e-11), GMRES(tol=1e-11), NormalCG(tol=1e-11), Dense(), MINRES(tol=1e-11, preconditioner=Jacobi())],
    ids=name,
)
def test_indefinite_systems_are_solved_by_the_solvers_that_can(solver, x64):
    matrix, b = symmetric([-3, -1, 1, 2, 3, 4, 5, 6]), tree()
    v, _, info = run(solver, matrix, b)
    assert relative_error(v, matrix, b) < 1e-8
    expected = name(solver) in ("MINRES", "Dense-symmetricTrue")
    assert bool(info.negative_curvature) == expected


@pytest.mark.parametrize("solver", [*KRYLOV_SYMMETRIC, *KRYLOV_GENERAL], ids=name)
def test_singular_systems_stay_finite(solver, x64):
    matrix, b = symmetric([0, 0, 1, 2, 3, 4, 5, 6]), tree()
    _, unravel = ravel_pytree(b)
    consistent = unravel(jnp.asarray(matrix @ np.random.default_rng(3).normal(size=D)))
    v, _, _ = run(solver, matrix, consistent)
    least = np.linalg.pinv(matrix) @ flat(consistent)
    np.testing.assert_allclose(flat(v), least, atol=1e-8)
    v, _, info = run(solver, matrix, b)  # no solution
    assert np.all(np.isfinite(flat(v))) and np.isfinite(float(info.residual))
    if isinstance(solver, (MINRES, NormalCG)):
        best = np.linalg.norm(flat(b) - matrix @ np.linalg.pinv(matrix) @ flat(b))
        np.testing.assert_allclose(float(info.residual), best, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("d", [2, 6])
def test_robust_solves_what_units_hide_and_keeps_least_norms(d, symmetric, x64):
    """S A S with S from 1e-9 to 1: regular, its exact solution; singular, that of least norm; without a solution, the
    least squares and their residual."""
    rng = np.random.default_rng(d)
    units = np.geomspace(1e-9, 1, d)
    q = rng.normal(size=(d, d))
    regular = units[:, None] * (q @ q.T + np.eye(d)) * units
    b = regular @ (v := rng.normal(size=d))
    solver = Robust(symmetric=symmetric)
    np.testing.assert_allclose(solver(lambda v: jnp.asarray(regular) @ v, jnp.asarray(b))[0], v, rtol=1e-5)
    # An unknown that is not seen at all, and another direction without curvature among equals.
    singular = np.zeros((d + 3, d + 3))
    singular[:d, :d] = regular
    singular[d:-1, d:-1] = np.ones((2, 2))
    b = np.concatenate([b, [3.0, 3.0, 0.0]])
    found, _, info = solver(lambda v: jnp.asarray(singular) @ v, jnp.asarray(b))
    np.testing.assert_allclose(found, np.concatenate([v, [1.5, 1.5, 0.0]]), rtol=1e-5, atol=1e-12)
    assert info.residual < 1e-9
    found, _, info = solver(lambda v: jnp.asarray(singular) @ v, jnp.asarray(b + np.eye(d + 3)[-1] * 2))
    np.testing.assert_allclose(found, np.concatenate([v, [1.5, 1.5, 0.0]]), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(info.residual, 2, rtol=1e-9)


@pytest.mark.parametrize("solver", [*KRYLOV_GENERAL], ids=name)
def test_a_skew_symmetric_system_breaks_nothing(solver, x64):
    """v'Hv = 0 for all v: the pivots of BiCGStab vanish in the first step."""
    block = np.array([[0.0, 1.0], [-1.0, 0.0]])
    matrix, b = np.kron(np.eye(D // 2), block), tree()
    v, _, _ = run(solver, matrix, b)
    assert np.all(np.isfinite(flat(v)))
    if not isinstance(solver, BiCGStab):
        assert relative_error(v, matrix, b) < 1e-9


@pytest.mark.parametrize("solver", [CG(), CG(tol=None), MINRES(), GMRES(), BiCGStab(), NormalCG(), Dense()], ids=name)
def test_a_nan_is_not_swallowed(solver, x64):
    b = tree()
    v, _, _ = run(solver, spd(), {**b, "s": jnp.asarray(jnp.nan)})
    assert np.any(np.isnan(flat(v)))
    poisoned = spd()
    poisoned[0, 0] = np.nan
    v, _, _ = run(solver, poisoned, b)
    assert np.any(np.isnan(flat(v)))


# Preconditioners.


def counting(matrix):
    """A matvec and the number of vectors that it has really been applied to, also under `cond` and `vmap`."""
    calls = []

    def multiply(v):
        jax.debug.callback(lambda _: calls.append(1), v.ravel()[0])
        return matrix @ v

    def count() -> int:
        jax.effects_barrier()
        return len(calls)

    return multiply, count


def ill_scaled(t: float = 0.0) -> np.ndarray:
    """Condition 1e6, of which all but a factor of about 2 comes from the scales of the variables."""
    d = 30
    scales = np.geomspace(1e-2, 10, d) * (1 + 0.1 * t * np.cos(np.arange(d)))
    a = np.random.default_rng(7).normal(size=(d, d))
    return np.diag(scales) @ (np.eye(d) + 0.3 * (a + a.T) / np.sqrt(8 * d)) @ np.diag(scales)


@pytest.mark.parametrize(
    "preconditioner",
    [
        Jacobi(refresh=3),
        Jacobi(refresh=3, probes=50),
        StaleCholesky(refresh=3),
        NystromPreconditioner(rank=25, refresh=3),
    ],
    ids=name,
)
def test_a_stale_preconditioner_is_right_and_saves_iterations(preconditioner, x64):
    b = jnp.asarray(np.random.default_rng(8).normal(size=30))
    solver = CG(tol=1e-9, max_steps=1000, warm_start=False, preconditioner=preconditioner)
    carry, first = solver.init(b), None
    for t in range(5):
        matrix = ill_scaled(t)
        plain = int(run(CG(tol=1e-9, max_steps=1000), matrix, b)[2].iterations)
        v, carry, info = run(solver, matrix, b, carry)
        assert relative_error(v, matrix, b) < 1e-4  # the residual is 1e-9, the condition number 1e6
        assert np.linalg.norm(b - matrix @ v) < 1e-7 * np.linalg.norm(b)
        assert int(info.iterations) < 0.5 * plain
        assert int(carry.preconditioner.count) == t + 1
        first = first or int(info.iterations)
        if t == 3 and not getattr(preconditioner, "probes", None):  # rebuilt: as good as new
            assert int(info.iterations) <= first + 1
    if isinstance(preconditioner, StaleCholesky):
        assert first <= 2


@pytest.mark.parametrize(
    ("preconditioner", "cost"),
    [(Jacobi(refresh=2), 30), (Jacobi(refresh=2, probes=7), 7), (StaleCholesky(refresh=2), 30),
     (NystromPreconditioner(rank=9, refresh=2), 9), (Jacobi(refresh=None), 30)],
    ids=lambda p: name(p) if hasattr(p, "refresh") else str(p),
)  # fmt: skip
def test_products_are_those_that_the_documentation_counts(preconditioner, cost, x64):
    """One per iteration, one for a warm start, and the preconditioner's cost in the solves that build it."""
    b = jnp.asarray(np.random.default_rng(8).normal(size=30))
    multiply, count = counting(jnp.asarray(ill_scaled()))
    solver = CG(tol=1e-3, max_steps=1000, preconditioner=preconditioner)
    solve = quick_jit(lambda b, carry: solver(multiply, b, carry))
    carry = solver.init(b)
    for t in range(4):
        before = count()
        _, carry, info = solve(b * (1 + t), carry)
        due = t == 0 if preconditioner.refresh is None else t % 2 == 0
        assert count() - before == int(info.iterations) + 1 + due * cost


def test_products_of_the_other_solvers(x64):
    b = jnp.asarray(np.random.default_rng(8).normal(size=D))
    matrix = jnp.asarray(spd())

    def cost(solver, carry=None):
        multiply, count = counting(matrix)
        info = quick_jit(lambda b: solver(multiply, b, carry)[::2])(b)[1]
        return count(), int(info.iterations)

    products, iterations = cost(CG(tol=1e-6))
    assert products == iterations
    assert cost(CG(tol=None, max_steps=5)) == (5, 5)
    products, iterations = cost(MINRES(tol=1e-6), LinearCarry(v=b))
    assert products == iterations + 2  # the start, and the true residual that is asked for here
    assert cost(Neumann(0.1, 5)) == (5, 5)  # four, and one for the residual that is asked for here
    assert cost(Richardson(0.1, 5), LinearCarry(v=0 * b)) == (6, 5)
    assert cost(Nystrom(rank=3)) == (4, 0)
    assert cost(Dense())[0] == D + 1


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=name)
def test_preconditioners_of_an_indefinite_matrix_are_positive_definite(preconditioner, x64):
    b = tree()

    def inverse_of(matrix):
        memory = preconditioner.update(matvec(matrix), b, preconditioner.init(b))
        return jax.vmap(lambda x: ravel_pytree(preconditioner.apply(memory, ravel_pytree(b)[1](x)))[0])(jnp.eye(D))

    inverse = np.asarray(quick_jit(inverse_of)(symmetric([-3, -1, 1, 2, 3, 4, 5, 6])))
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-12)
    assert np.linalg.eigvalsh(inverse).min() > 0


def test_jacobi_is_the_diagonal_and_hutchinson_approaches_it(x64):
    b, matrix = tree(), spd() + np.diag(np.arange(D))
    exact = Jacobi().update(matvec(matrix), b, Jacobi().init(b)).arrays
    np.testing.assert_allclose(exact, np.diag(matrix))
    rough = Jacobi(probes=4000)
    np.testing.assert_allclose(rough.update(matvec(matrix), b, rough.init(b)).arrays, np.diag(matrix), rtol=0.1)
    diagonal = np.diag(np.arange(1.0, D + 1))  # without off-diagonal entries one probe is exact
    one = Jacobi(probes=1)
    np.testing.assert_allclose(one.update(matvec(diagonal), b, one.init(b)).arrays, np.diag(diagonal))


def test_randomness_is_the_seeds(x64):
    b = tree()
    matrix, memory = spd(), Jacobi(probes=2).init(b)
    make = quick_jit(lambda seed: Jacobi(probes=2, seed=seed).update(matvec(matrix), b, memory).arrays)
    np.testing.assert_array_equal(make(0), make(0))
    assert np.any(make(0) != make(1))
    solver = Nystrom(rank=3)
    first, carry, _ = run(solver, spd(), b)
    second, _, _ = run(solver, spd(), b, carry)
    assert np.any(flat(first) != flat(second))  # other columns at the next solve
    np.testing.assert_array_equal(flat(first), flat(run(solver, spd(), b)[0]))


# Derivatives.

DIFFERENTIABLE = [
    CG(tol=1e-12),
    pytest.param(CG(tol=1e-12, preconditioner=NystromPreconditioner(rank=3)), marks=pytest.mark.slow),
    CG(tol=1e-12, preconditioner=StaleCholesky()),
    pytest.param(MINRES(tol=1e-12), marks=pytest.mark.slow),
    # Of the solvers of general matrices, BiCGStab compiles in the shortest time.
    pytest.param(GMRES(tol=1e-12), marks=pytest.mark.slow),
    BiCGStab(tol=1e-12),
    pytest.param(NormalCG(tol=1e-12), marks=pytest.mark.slow),
    Dense(),
    Dense(symmetric=False),
    Neumann(0.08, 900),
    Nystrom(rank=D, rho=1e-12),
]


def derivatives(f):
    """Of a number: the value, the slope in both modes, the second derivative."""
    forward = lambda a: jax.jvp(f, (a,), (1.0,))[1]
    return lambda a: jnp.stack([f(a), forward(a), jax.grad(f)(a), jax.grad(forward)(a)])


@quick_jit
def of_a_dense_solve(base, direction, b, c):
    def dense(a):
        return c @ jnp.linalg.solve(base + jnp.sin(a) * direction, b * (1 + a**2))

    return derivatives(dense)(0.3)


@pytest.mark.parametrize("solver", DIFFERENTIABLE, ids=name)
def test_derivatives_in_both_modes_and_twice(solver, x64):
    """Of <c, H(a)^-1 b(a)>, against the same function of a dense solve, with a warm start that must not matter."""
    base, direction, b, c = spd(), symmetric(np.linspace(-0.3, 0.5, D), 4), tree(), flat(tree(3))
    if isinstance(solver, (GMRES, BiCGStab, NormalCG)) or solver == Dense(symmetric=False):
        base = nonsymmetric()
    carry = solver.init(b)
    if carry.v is not None:
        carry = LinearCarry(jax.tree.map(lambda x: np.full_like(x, 0.01), b), carry.preconditioner)

    def ours(a):
        rhs = jax.tree.map(lambda x: x * (1 + a**2), b)
        return c @ ravel_pytree(solver(matvec(base + jnp.sin(a) * direction), rhs, carry)[0])[0]

    np.testing.assert_allclose(
        quick_jit(derivatives(ours))(0.3), of_a_dense_solve(base, direction, flat(b), c), rtol=1e-6
    )


@pytest.mark.parametrize("solver", [CG(tol=1e-12), GMRES(tol=1e-12)], ids=name)
def test_the_jacobian_is_the_inverse(solver, x64):
    matrix = spd() if isinstance(solver, CG) else nonsymmetric()
    b = jnp.asarray(flat(tree()))
    f = lambda b: solver(matvec(matrix), b)[0]
    for jacobian in quick_jit(lambda b: (jax.jacfwd(f)(b), jax.jacrev(f)(b)))(b):
        np.testing.assert_allclose(jacobian, np.linalg.inv(matrix), atol=1e-9)


def test_the_carry_has_no_derivative(x64):
    b = jnp.asarray(flat(tree()))

    def f(start):
        v, carry, info = Richardson(0.05, 2)(matvec(spd()), b, LinearCarry(v=start))
        return jnp.sum(v) + jnp.sum(carry.v) + info.residual

    np.testing.assert_array_equal(quick_jit(jax.grad(f))(0.1 * flat(tree())), np.zeros(D))


def test_damping_and_step_size_are_differentiable(x64):
    matrix, b = spd(), flat(tree())
    ours = quick_jit(jax.grad(lambda a: CG(tol=1e-12, damping=a)(matvec(matrix), jnp.asarray(b))[0].sum()))(0.7)
    inverse = np.linalg.inv(matrix + 0.7 * np.eye(D))
    np.testing.assert_allclose(ours, -(inverse @ inverse @ b).sum(), rtol=1e-9)
    ours = quick_jit(jax.grad(lambda eta: Neumann(eta, 2)(matvec(matrix), jnp.asarray(b))[0].sum()))(0.1)
    np.testing.assert_allclose(ours, (2 * b - 2 * 0.1 * matrix @ b).sum(), rtol=1e-9)


# Transformations and dtypes.


@pytest.mark.parametrize(
    "solver",
    but_slow(
        ["MINRES", "BiCGStab"],
        [CG(tol=1e-10), CG(tol=None), MINRES(tol=1e-10), GMRES(tol=1e-10), BiCGStab(tol=1e-10), Dense(),
         CG(tol=1e-10, preconditioner=NystromPreconditioner(rank=3, refresh=2))],
    ),
    ids=name,
)  # fmt: skip
def test_vmap_over_systems_that_end_at_different_times(solver, x64):
    matrices = np.stack([np.eye(D), spd(), symmetric([1, 1, 2, 2, 2, 2, 2, 2]), spd()])
    b = np.random.default_rng(0).normal(size=(4, D))
    b[3] = 0
    carry = jax.vmap(solver.init)(jnp.asarray(b))
    v, carry, info = quick_jit(jax.vmap(lambda m, b, c: solver(matvec(m), b, c)))(matrices, jnp.asarray(b), carry)
    expected = np.linalg.solve(matrices, b[..., None])[..., 0]
    np.testing.assert_allclose(v, expected, atol=1e-8)
    assert info.residual.shape == (4,) and np.all(info.residual < 1e-8)
    if isinstance(solver, (CG, MINRES)):
        alone = run(solver, matrices[1], jnp.asarray(b[1]), solver.init(jnp.asarray(b[1])))[2].iterations
        assert int(info.iterations[0]) == 1 and int(info.iterations[3]) == 0
        assert abs(int(info.iterations[1]) - int(alone)) <= 1 < int(alone)  # rounding may cost a step


def test_vmap_over_a_hyperparameter(x64):
    matrix, b = spd(), jnp.asarray(flat(tree()))
    damping = np.array([0.0, 1.0, 5.0])
    v = quick_jit(jax.vmap(lambda a: CG(tol=1e-12, damping=a)(matvec(matrix), b)[0]))(damping)
    for a, row in zip(damping, v, strict=True):
        assert relative_error(row, matrix + float(a) * np.eye(D), b) < 1e-10


def test_a_scan_over_outer_steps_carries_the_carry(x64):
    solver = CG(tol=1e-3, preconditioner=NystromPreconditioner(rank=3, refresh=2))
    b = jnp.asarray(flat(tree()))

    def outer(carry, t):
        v, carry, info = solver(matvec(spd() + t * np.eye(D)), b, carry)
        return carry, (v, info)

    carry, (vs, infos) = quick_jit(lambda: jax.lax.scan(outer, solver.init(b), jnp.arange(4) * 1e-4))()
    assert relative_error(vs[3], spd() + 3e-4 * np.eye(D), b) < 0.04  # tol times the condition number
    assert int(infos.iterations[3]) < int(infos.iterations[0])
    assert int(carry.preconditioner.count) == 4


ALL = [
    *(CG(), CG(tol=None), MINRES(), GMRES(), BiCGStab(), NormalCG(), Dense(), Neumann(0.1, 60)),
    *(Richardson(0.1, 60), Nystrom(rank=1), Identity(), CG(preconditioner=Jacobi(probes=3))),
    *(CG(preconditioner=StaleCholesky()), CG(preconditioner=NystromPreconditioner(rank=1))),
]


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_dtypes_are_kept(solver):
    """Leaves of three precisions in one system: each keeps its own, and is right to the coarsest."""
    b = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.asarray(2, jnp.float16), "c": jnp.ones(2, jnp.float32)}
    v, carry, info = solve_tree(solver, 4.0, b)
    assert jax.tree.map(lambda x: x.dtype, v) == jax.tree.map(lambda x: x.dtype, b)
    assert info.residual.dtype == jnp.float32 and info.iterations.dtype == jnp.int32
    if carry.v is not None:
        assert jax.tree.map(lambda x: x.dtype, carry.v) == jax.tree.map(lambda x: x.dtype, b)
    if not isinstance(solver, (Nystrom, Identity)):
        for x, y in zip(jax.tree.leaves(v), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32) / 4, rtol=2e-2)


@quick_jit
def solve_tree(solver, c, b):
    return solver(lambda v: jax.tree.map(lambda x: (c * x).astype(x.dtype), v), b, solver.init(b))


LEAF = st.tuples(
    st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from(["float32", "bfloat16", "float16"])
)
TREES = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=4,
)
SIMPLE = [
    *(
        CG(max_steps=5),
        MINRES(max_steps=5),
        GMRES(max_steps=5, restart=3),
        BiCGStab(max_steps=5),
        NormalCG(max_steps=5),
    ),
    *(Dense(), Neumann(0.4, 3), CG(max_steps=3, preconditioner=Jacobi(probes=2))),
]


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    shapes=TREES, solver=st.sampled_from(SIMPLE), seed=st.integers(0, 9), scale=st.sampled_from([1e-6, 1.0, 1e4])
)
def test_any_pytree(shapes, solver, seed, scale):
    """Structures, shapes (with empty leaves and trees), dtypes and magnitudes at random: H = 2I is solved by all."""
    rng = np.random.default_rng(seed)
    is_leaf = lambda x: isinstance(x, tuple)
    b = jax.tree.map(
        lambda leaf: np.asarray(rng.normal(size=leaf[0]) * (scale if leaf[1] != "float16" else 1)).astype(
            jnp.dtype(leaf[1])
        ),
        shapes,
        is_leaf=is_leaf,
    )
    v, carry, info = solve_tree(solver, 2.0, b)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), v) == jax.tree.map(lambda x: (x.shape, x.dtype), b)
    assert jax.tree.structure(carry) == jax.tree.structure(solver.init(b))
    assert np.isfinite(float(info.residual)) and not info.negative_curvature
    if not isinstance(solver, Neumann):
        for x, y in zip(jax.tree.leaves(v), jax.tree.leaves(b), strict=True):
            half = np.asarray(y, np.float64) / 2
            eps = max([float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(b)])
            top = max(
                [float(np.max(np.abs(leaf.astype(np.float32)))) for leaf in jax.tree.leaves(b) if leaf.size],
                default=0.0,
            )
            np.testing.assert_allclose(np.asarray(x, np.float64), half, rtol=4 * eps, atol=4 * eps * top)


def test_numpy_and_weakly_typed_right_hand_sides():
    b = {"a": np.ones(3, np.float32), "b": 2.0}
    v, _, _ = CG()(lambda v: jax.tree.map(lambda x: 4.0 * x, v), b)
    np.testing.assert_allclose(v["b"], 0.5)
    assert v["b"].dtype == v["a"].dtype == jnp.float32


# Refusals.


def test_integer_and_complex_right_hand_sides_are_refused_by_leaf():
    for bad in (jnp.arange(3), jnp.ones(2, jnp.complex64), jnp.ones(2, bool)):
        for solver in (CG(), Dense(), Neumann(0.1), Identity(), Nystrom(rank=1)):
            with pytest.raises(TypeError, match=rf"leaf b\['n'\] has dtype {bad.dtype}.*real floating-point"):
                solver(lambda v: v, {"w": jnp.ones(2), "n": bad})
            with pytest.raises(TypeError, match=r"leaf b\['n'\]"):
                solver.init({"w": jnp.ones(2), "n": bad})


@pytest.mark.parametrize("solver", [CG(), GMRES(), Dense(), Neumann(0.1), Identity(), Nystrom(rank=1)], ids=name)
def test_a_matvec_into_another_space_is_refused(solver):
    for wrong in (lambda v: (v,), lambda v: v[:1], lambda v: v.astype(jnp.bfloat16)):
        with pytest.raises(TypeError, match=r"matvec\(v\) returned .* but b is .*float32\[3\].*same structure"):
            solver(wrong, jnp.ones(3))


def test_hyperparameters_are_refused_with_the_cure():
    for make in (CG, MINRES, GMRES, BiCGStab, NormalCG):
        with pytest.raises(ValueError, match=rf"{make.__name__}\(tol=0.*must be positive.*tol=None"):
            make(tol=0)
        with pytest.raises(ValueError, match=r"max_steps=0.*must be positive"):
            make(max_steps=0)
        with pytest.raises(ValueError, match=r"damping=-1.*zero or positive"):
            make(damping=-1)
    with pytest.raises(ValueError, match=r"step_size=-0.1"):
        Neumann(-0.1)
    with pytest.raises(ValueError, match=r"steps=0"):
        Richardson(0.1, 0)
    with pytest.raises(ValueError, match=r'sketch=.rows.*"columns" or "gaussian"'):
        Nystrom(sketch="rows")
    with pytest.raises(ValueError, match=r"rho=0"):
        Nystrom(rho=0)
    with pytest.raises(ValueError, match=r"refresh=0"):
        Jacobi(refresh=0)


def test_sizes_are_refused_with_the_cure():
    b = jnp.ones(11)
    with pytest.raises(ValueError, match=r"11 unknowns, but its max_size is 10. Use a matrix-free solver"):
        Dense(max_size=10)(lambda v: v, b)
    with pytest.raises(ValueError, match=r"11 unknowns, but its max_size is 10. Estimate the diagonal"):
        CG(preconditioner=Jacobi(max_size=10))(lambda v: v, b)
    with pytest.raises(ValueError, match=r"StaleCholesky .* max_size is 10. Use Nystrom"):
        CG(preconditioner=StaleCholesky(max_size=10)).init(b)
    with pytest.raises(ValueError, match=r"NystromPreconditioner\(rank=20\).*only 11 unknowns.*at most 11"):
        CG(preconditioner=NystromPreconditioner(rank=20)).init(b)
    with pytest.raises(ValueError, match=r"Nystrom\(rank=12\).*only 11 unknowns"):
        Nystrom(rank=12)(lambda v: v, b)


def test_a_carry_of_another_system_is_refused():
    for solver in (CG(), Richardson(0.1)):
        with pytest.raises(ValueError, match=r"carry whose v has shapes .* solver.init\(b\)"):
            solver(lambda v: v, jnp.ones(3), solver.init(jnp.ones(4)))


# An ill-conditioned oracle: the contrast of attention maps, whose hypergradient is known in closed form.


@functools.cache
def contrast_of_maps():
    """Two pairs of maps of 36 tokens; the Hessian is diagonal, with a condition number of 1e8.

    With that number, the hypergradient and the length of the right-hand side, all at x0.
    """
    rng = np.random.default_rng(0)
    general = np.stack([rng.permutation(np.geomspace(1, 1e4, 36)) for _ in range(2)])
    general *= 0.8 / general.sum(-1, keepdims=True)
    question, mask = 0.8 * rng.dirichlet(np.ones(36), 2), rng.dirichlet(np.full(36, 0.3), 2)
    app = oracle(question, general, mask, 1e-10)

    @jax.jit
    def exact(x):
        y = app.solution(x)
        return app.condition(x), app.hypergradient(x), jnp.linalg.norm(jax.grad(app.problem.full_upper(), 1)(x, y))

    return app, *map(float, exact(app.x0))


# A relative residual of 1e-14 is asked for; the error that it leaves is up to the condition number times larger.
EXACT_AT_1E8 = {
    "CG": CG(tol=1e-14, max_steps=2000),
    "CG, Jacobi": CG(tol=1e-14, preconditioner=Jacobi()),
    "CG, Nystrom": CG(tol=1e-14, max_steps=2000, preconditioner=NystromPreconditioner(rank=10)),
    "CG, stale Cholesky": CG(tol=1e-14, preconditioner=StaleCholesky()),
    "MINRES": MINRES(tol=1e-14, max_steps=2000),
    "GMRES": GMRES(tol=1e-14, restart=72, max_steps=720),
    "NormalCG": NormalCG(tol=1e-14, max_steps=4000),
    "Robust": Robust(tol=1e-14, max_steps=2000),
    "TaskCG": TaskCG(tol=1e-14, max_steps=2000),
    "Dense": Dense(),
}
SHORT_AT_1E8 = {
    "CG, 100 steps": CG(),
    "BiCGStab": BiCGStab(tol=1e-14, max_steps=2000),
    "Neumann": Neumann(0.5, 2000),
    "Richardson": Richardson(0.5, 2000),
    "Nystrom": Nystrom(rank=36, rho=1e-10),
    "Identity": Identity(1.0),
}


SECOND_OF_A_KIND = ("CG, Nystrom", "CG, stale Cholesky", "MINRES", "Richardson")


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(which, marks=[pytest.mark.slow] * (which in SECOND_OF_A_KIND))
        for which in (*EXACT_AT_1E8, *SHORT_AT_1E8)
    ],
)
def test_at_a_condition_number_of_1e8_the_hypergradient_is_right_or_the_residual_says_not(which, x64):
    app, condition, exact, length = contrast_of_maps()
    assert 0.9e8 < condition < 1.1e8
    solver = {**EXACT_AT_1E8, **SHORT_AT_1E8}[which]
    closed = lambda level, x, y: app.solution(x)
    found = jax.jit(value_and_hypergradient(app.problem, Implicit(solver), closed))(app.x0, app.y0)
    error = abs(float(found.gradient) - exact) / abs(exact)
    residual = float(found.metrics["linear_residual"]) / length
    if which in EXACT_AT_1E8:
        assert error < 1e-6 and residual < 1e-6
    else:
        assert error > 1e-6 and residual > 1e-3
