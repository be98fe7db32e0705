"""The parts of the penalty methods: projections on the coupled set, rows, traces, polish, schedules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, projections, sets, solvers
from bilevel.constraints import Constraints, depends, is_affine, row_norms
from bilevel.data import as_step_key
from bilevel.lower.accurate import augmented_lagrangian, minimise
from bilevel.solvers import Continuation, Polynomial

pytestmark = pytest.mark.usefixtures("x64")

RANDOM = np.random.default_rng(0)
A, B = RANDOM.normal(size=(2, 3)), RANDOM.normal(size=(2, 4))
U = (RANDOM.normal(size=3), RANDOM.normal(size=4))


def rows(u):
    return jnp.asarray(A) @ u[0] + jnp.asarray(B) @ u[1] - 1.0


def test_affine_projection_is_the_textbook_formula():
    J = np.hstack([A, B])
    flat = np.concatenate(U)
    expected = flat - np.linalg.pinv(J) @ (J @ flat - 1)
    same = lambda u: u
    found = jax.jit(lambda u: projections.affine(rows, same, projections.dual_factor(rows, same, u), u))(U)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-10)


def test_affine_projection_within_a_subspace():
    P = np.eye(3) - np.ones((3, 3)) / 3
    within = lambda u: (jnp.asarray(P) @ u[0], u[1])
    found = jax.jit(lambda u: projections.affine(rows, within, projections.dual_factor(rows, within, u), u))(U)
    np.testing.assert_allclose(A @ found[0] + B @ found[1], 1, atol=1e-10)
    np.testing.assert_allclose(np.sum(found[0]), 0, atol=1e-10)
    # Optimality: u - v is orthogonal to every feasible direction.
    M = np.vstack([np.hstack([A, B]), np.concatenate([np.ones(3), np.zeros(4)])])
    null = np.linalg.svd(M)[2][3:]
    np.testing.assert_allclose(null @ (np.concatenate(U) - np.concatenate(found)), 0, atol=1e-9)


def test_dual_projection_meets_the_optimality_conditions():
    inequality = np.array([True, True])
    box = lambda u: (jnp.clip(u[0], -0.5, 0.5), u[1])
    shifted = lambda u: 3.0 + rows(u)
    v, lam = jax.jit(lambda u: projections.dual(shifted, inequality, box, u, jnp.zeros(2), steps=3000, tol=1e-12))(U)
    assert float(jnp.max(shifted(v))) < 1e-8
    assert float(jnp.min(lam)) >= 0
    np.testing.assert_allclose(lam * shifted(v), 0, atol=1e-7)
    pull = (U[0] - A.T @ lam, U[1] - B.T @ lam)
    np.testing.assert_allclose(np.concatenate(v), np.concatenate(box(pull)), atol=1e-8)


def test_projection_on_a_ball_by_linearised_rows():
    ball = lambda u: jnp.stack([u[0] @ u[0] - 1.0]) / 2
    u = (jnp.asarray([3.0, 4.0]),)
    v, _ = jax.jit(
        lambda u: projections.dual(ball, np.array([True]), lambda u: u, u, jnp.zeros(1), linearisations=6, tol=1e-12)
    )(u)
    np.testing.assert_allclose(v[0], [0.6, 0.8], atol=1e-6)


def test_alternation_and_the_quadratic_programme_agree_with_the_dual_projection():
    J, flat = np.hstack([A, B]), np.concatenate(U)
    half = sets.Intersection(tuple(sets.Halfspace(J[i], -2.0) for i in range(2)), steps=2000)
    dual = lambda u: projections.dual(
        lambda u: J @ u + 2, np.array([True, True]), lambda u: u, u, jnp.zeros(2), steps=3000, tol=1e-12
    )[0]
    programme = sets.Polyhedron(G=J, h=-2 * np.ones(2))
    alternated, programmed, expected = jax.jit(lambda u: (half(u), programme(u), dual(u)))(flat)
    np.testing.assert_allclose(alternated, expected, atol=1e-6)
    np.testing.assert_allclose(programmed, expected, atol=1e-6)


def test_dependence_is_read_off_the_trace():
    x, y = jnp.ones(3), jnp.ones(4)
    assert depends(lambda x, y: x.sum() * y, x, y, on=0)
    assert not depends(lambda x, y: jnp.clip(y, 0, 1), x, y, on=0)
    assert is_affine(lambda x, y: A @ x + B @ y - 1, x, y)
    assert is_affine(lambda x, y: {"a": jnp.stack([x.sum(), y[0]]), "b": -2 * y}, x, y)
    assert not is_affine(lambda x, y: x[0] * y, x, y)
    assert not is_affine(lambda x, y: jnp.sum(y**2), x, y)
    assert jax.jit(lambda x: x * is_affine(lambda x: 2 * x, x))(x)[0] == 1


def test_row_norms_exact_and_estimated(monkeypatch):
    from bilevel import constraints

    scaled = lambda x, y: jnp.concatenate([100.0 * (A @ x), B @ y])
    expected = np.concatenate([100 * np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=1)])
    np.testing.assert_allclose(jax.jit(lambda *u: row_norms(scaled, *u))(*U), expected, rtol=1e-12)
    monkeypatch.setattr(constraints, "_EXACT_ROWS", 1)
    np.testing.assert_allclose(jax.jit(lambda *u: row_norms(scaled, *u))(*U), expected, rtol=0.4)
    ball = lambda x, y: jnp.stack([y @ y - 1])
    assert float(jax.jit(lambda *u: row_norms(ball, *u))(U[0], np.zeros(4))[0]) > 0.1


def test_constraints_of_two_kinds_are_one_vector():
    problem = Problem(
        lambda x, y: 0.0 * y[0],
        lambda x, y: 0.5 * jnp.sum(y**2),
        constraint=lambda x, y: {"low": -10 * y, "sum": jnp.sum(y) - x},
        equality=lambda x, y: y[0] - 1,
    )
    kinds = []

    @jax.jit
    def found(x, y, lam):
        c = Constraints(problem.draw_lower(0), x, y).at(x, y)
        kinds.append((c.count, *c.inequality))
        return c(x, y), c.violation(x, y), c.clip(lam, 3.0), c.multipliers(jnp.ones(4))

    values, violation, clipped, units = found(np.asarray(0.0), np.array([-1.0, 2.0]), np.array([-1.0, 5.0, 1.0, -7.0]))
    assert kinds == [(4, True, True, True, False)]
    np.testing.assert_allclose(values, [1.0, -2.0, 1 / np.sqrt(3), -2.0])
    np.testing.assert_allclose(violation, 2.0)
    np.testing.assert_allclose(clipped, [0, 3, 1, -3])
    np.testing.assert_allclose(units["constraint"]["low"], [0.1, 0.1])
    np.testing.assert_allclose(units["equality"], 1.0)


def test_minimise_with_and_without_a_set():
    d = np.logspace(0, 3, 5)
    f = lambda y: 0.5 * jnp.sum(d * (y - 1) ** 2)
    soft = lambda y, s: jnp.sign(y) * jnp.maximum(jnp.abs(y) - s, 0)
    free, boxed, shrunk = jax.jit(
        lambda y: (
            minimise(f, y),
            minimise(f, y, lambda y: jnp.clip(y, 0, 0.5), None, 500),
            minimise(f, y, None, soft, 2000),
        )
    )(np.zeros(5))
    np.testing.assert_allclose(free, 1, atol=1e-6)
    np.testing.assert_allclose(boxed, 0.5, atol=1e-6)
    np.testing.assert_allclose(shrunk, 1 - 1 / d, atol=1e-6)


def test_the_polish_finds_multipliers():
    """min |y - (2, 0)|^2/2 with y1 <= 1, y1 + y2 = 0: y = (1, -1), equality multiplier 1, inequality multiplier 0...
    by KKT."""
    problem = Problem(
        lambda x, y: 0.0 * y[0],
        lambda x, y: 0.5 * jnp.sum((y - jnp.asarray([4.0, 0.0])) ** 2),
        constraint=lambda x, y: y[0] - 1,
        equality=lambda x, y: y[0] + y[1],
    )
    c = Constraints(problem.draw_lower(0), jnp.zeros(1), jnp.zeros(2))
    found = jax.jit(lambda: augmented_lagrangian(problem.draw_lower(0), c, jnp.zeros(1), jnp.zeros(2)))()
    np.testing.assert_allclose(found.y, [1, -1], atol=1e-7)
    # Stationarity: (y - (4, 0)) + lam (1, 0) + mu (1, 1) = 0.
    np.testing.assert_allclose(found.multipliers, [2, 1], atol=1e-5)


def test_schedules():
    point = (jnp.zeros(2), jnp.zeros(3))
    growing = jax.jit(lambda point: Polynomial(10.0, 0.5).advance(Polynomial(10.0, 0.5).init(point), 2, point, 1.0))
    np.testing.assert_allclose(growing(point).penalty, 20.0)
    schedule = Continuation()
    advance = jax.jit(schedule.advance)
    solution = lambda c: (np.array([1 + 3 / c + 2 / c**2, 2.0]), np.full(3, 1 / c))
    path, k = schedule.init(solution(20.0)), 0
    for _ in range(4):
        k += 100
        path = advance(path, k, solution(float(path.penalty)), 0.0)
    assert float(path.penalty) == 320
    # 1/c and 1/c^2 cancel exactly.
    np.testing.assert_allclose(path.reported[0], [1.0, 2.0], atol=1e-12)
    np.testing.assert_allclose(path.change, 0, atol=1e-10)
    # A series in a root of 1/c is not extrapolated: the last point is reported.
    path, k = schedule.init(point), 0
    for _ in range(4):
        k += 100
        rough = (np.full(2, float(path.penalty) ** (-1 / 3)), np.zeros(3))
        path = advance(path, k, rough, 0.0)
    np.testing.assert_allclose(path.reported[0], rough[0])


# ---------------------------------------------------------------- what a state holds


def _room(solver, simple=False):
    """The numbers in a state over those in x and y, 300 each, nothing being run."""
    n = 300
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2) + (0.0 if simple else 0.1 * jnp.sum(x**2)),
        lambda x, y: 0.5 * jnp.sum(y**2 if simple else (y - x) ** 2),
    )
    x = None if simple else jnp.zeros(n)
    state = jax.eval_shape(lambda: solver.init(problem, x, jnp.zeros(n), as_step_key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(state)) / (n if simple else 2 * n)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: solvers.LVHBA(penalty=c),
        lambda c: solvers.MEHA(penalty=c),
        lambda c: solvers.VPBGD(penalty=c),
        lambda c: solvers.GPBGD(penalty=c),
        lambda c: solvers.BiCGAFFA(penalty=c),
        lambda c: solvers.SFLCB(penalty=c),
        lambda c: solvers.BLOCC(penalty=c),
        lambda c: solvers.BVFSM(penalty=c),
        lambda c: solvers.F2SA(penalty=c),
        lambda c: solvers.F2BA(penalty=c),
        lambda c: solvers.CentralF2SA(penalty=c),
        lambda c: solvers.SingleLoopF2SA(penalty=c),
        lambda c: solvers.BOME(),
    ],
)
@pytest.mark.parametrize("penalty", [20.0, Polynomial(10.0, 0.3), Continuation(extrapolate=False)])
def test_without_extrapolation_a_state_is_at_most_four_times_the_variables(make, penalty):
    assert _room(make(penalty)) < 4


@pytest.mark.parametrize(
    "solver",
    [solvers.IterativeRegularization(penalty=20.0), solvers.BiGSAM(), solvers.BOME(), solvers.VPBGD(penalty=20.0)],
)
def test_states_of_simple_problems_too(solver):
    assert _room(solver, simple=True) < 4.2  # of the one variable there is, with the scalars


def test_ends_of_stages_are_stored_where_they_are_extrapolated():
    assert (
        _room(solvers.MEHA(penalty=Continuation())) > 6 > _room(solvers.MEHA(penalty=Continuation(extrapolate=False)))
    )
