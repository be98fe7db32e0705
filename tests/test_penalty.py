"""Penalty methods against closed forms, rates, and problems made to mislead them."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, ProblemError, Result, data, run, solve
from bilevel._module import name_of
from bilevel.constraints import Constraints
from bilevel.runs import multistart
from bilevel.solvers import (
    BLOCC,
    BOME,
    BVFSM,
    F2BA,
    F2SA,
    GALET,
    GAM,
    GPBGD,
    LVHBA,
    MEHA,
    MPCC,
    SFLCB,
    SOBA,
    STFBO,
    VPBGD,
    AiPOD,
    BiCGAFFA,
    BiGSAM,
    CentralF2SA,
    Continuation,
    IterativeRegularization,
)
from bilevel.solvers.default import ROWS, as_markdown, default_solver, look

pytestmark = pytest.mark.usefixtures("x64")


def end(problem, solver, x, y, steps):
    """The state and the metrics after `steps`."""
    return jax.jit(lambda solver: run(problem, solver, x, y, steps))(solver)


# Closed-form problems ------------------------------------------------------------------------------------------------


def quadratic(n=3, m=4, seed=0):
    """F = |x - a|^2 / 2 + |y - b|^2 / 2, f = y'Qy / 2 - y'Bx: y(x) = Kx with K = Q^-1 B, x* = (I + K'K)^-1 (a +
    K'b)."""
    random = np.random.default_rng(seed)
    M, B = random.normal(size=(m, m)), random.normal(size=(m, n))
    Q, a, b = M @ M.T / m + np.eye(m), random.normal(size=n), random.normal(size=m)
    K = np.linalg.solve(Q, B)
    x = np.linalg.solve(np.eye(n) + K.T @ K, a + K.T @ b)
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - a) ** 2) + 0.5 * jnp.sum((y - b) ** 2),
        lambda x, y: 0.5 * y @ Q @ y - y @ (B @ x),
    )
    return problem, x, K @ x, jnp.zeros(n), jnp.zeros(m)


def active(scale=1.0):
    """F = (x-2)^2/2 + (y-1)^2/2, f = (y-x)^2/2 with x + y <= 1 (times a scale): x* = 1, y* = 0, multiplier 1 /
    scale."""
    problem = Problem(
        lambda x, y: 0.5 * (x - 2) ** 2 + 0.5 * (y - 1) ** 2,
        lambda x, y: 0.5 * (y - x) ** 2,
        constraint=lambda x, y: scale * (x + y - 1),
    )
    return problem, 1.0, 0.0, jnp.asarray(-1.0), jnp.asarray(-1.0)


def equality(seed=3):
    """f = |y - Cx|^2/2 with Ay + Hx = b, x in the null space of B; F quadratic: a linear system."""
    random = np.random.default_rng(seed)
    n, m, p = 4, 5, 2
    A, H, C, b = (
        random.normal(size=(p, m)),
        random.normal(size=(p, n)),
        random.normal(size=(m, n)),
        random.normal(size=p),
    )
    B, c, d = random.normal(size=(1, n)), random.normal(size=n), random.normal(size=m)
    plus = np.linalg.pinv(A)
    slope, offset = (np.eye(m) - plus @ A) @ C - plus @ H, plus @ b
    N = np.linalg.svd(B)[2][1:].T
    P = N @ N.T
    u = np.linalg.solve(N.T @ N + (slope @ N).T @ slope @ N, N.T @ c + (slope @ N).T @ (d - offset))
    x = N @ u
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - c) ** 2) + 0.5 * jnp.sum((y - d) ** 2),
        lambda x, y: 0.5 * jnp.sum((y - C @ x) ** 2),
        equality=lambda x, y: A @ y + H @ x - b,
        project_upper=lambda x: P @ x,
    )
    return problem, x, slope @ x + offset, jnp.zeros(n), jnp.zeros(m)


def nonsingleton(n=2):
    """f = |y1|^2/2 - x.y1 leaves y2 free: x* = y1* = y2* = 1; only methods that let F choose y2 find it."""
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - y[1]) ** 2) + 0.5 * jnp.sum((y[0] - 1) ** 2),
        lambda x, y: 0.5 * jnp.sum(y[0] ** 2) - x @ y[0],
    )
    return problem, np.ones(n), np.ones((2, n)), -jnp.ones(n), 2 * jnp.ones((2, n))


def toy_llc(n=100):
    """LV-HBA's merely convex toy from its official start: x* = -0.3, y1* = 0.7, y2* = -0.4, multiplier -1."""
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - y["2"]) ** 2) + 0.5 * jnp.sum((y["1"] - 1) ** 2),
        lambda x, y: 0.5 * jnp.sum(y["1"] ** 2) - x @ y["1"] + jnp.sum(y["2"]),
        equality=lambda x, y: jnp.sum(x) + jnp.sum(y["1"]) + jnp.sum(y["2"]),
    )
    return problem, np.full(n, -20.0), {"1": np.full(n, 10.0), "2": np.full(n, 10.0)}


# LV-HBA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_toy_llc_from_the_official_start_without_step_sizes(n):
    problem, x, y = toy_llc(n)
    error = lambda x, y: jnp.linalg.norm(x + 0.3) / jnp.linalg.norm(jnp.full_like(x, 0.3))
    solution = solve(problem, x, y, LVHBA(), steps=3000, metrics={"error": error}, metrics_every=20)
    errors, steps = solution.history["error"], solution.history.steps["error"]
    assert errors[steps >= 900].max() < 1e-3
    assert errors[-1] < 1e-5
    assert solution.history["violation"][-1] < 1e-10
    multiplier = jax.jit(lambda state: solution.solver.multipliers(problem, state)["equality"])(solution.state)
    np.testing.assert_allclose(multiplier, -1, rtol=1e-3)
    assert solution.result is not Result.CONVERGED
    assert abs(solution.history["polished_gap"][-1]) < 1e-6


def test_multipliers_are_in_the_users_units_and_rows_are_normalised():

    @jax.jit
    def ended(scale):
        problem, _, _, x, y = active(scale)
        state, _ = run(problem, LVHBA(), x, y, 2000)
        return state.x, LVHBA().multipliers(problem, state)["constraint"]

    (one, price), (many, cheaper) = (ended(scale) for scale in (1.0, 1000.0))
    np.testing.assert_allclose(many, one, rtol=1e-9)
    np.testing.assert_allclose(one, 1.0, rtol=1e-3)
    np.testing.assert_allclose([price, cheaper], [1, 1e-3], rtol=2e-2)


@pytest.mark.parametrize(
    ("make", "solver"),
    [
        pytest.param(active, LVHBA(), marks=pytest.mark.slow),  # as above
        (active, BiCGAFFA()),
        (active, SFLCB()),
        *(pytest.param(equality, solver(), marks=pytest.mark.slow) for solver in (LVHBA, BiCGAFFA, SFLCB)),
    ],
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
def test_single_loop_methods_reach_the_solution_of_coupled_problems(solver, make):
    problem, x, y, x0, y0 = make()
    state, _metrics = end(problem, solver, x0, y0, 8000)
    np.testing.assert_allclose(state.x, x, atol=5e-3)
    np.testing.assert_allclose(state.y, y, atol=5e-3)


@pytest.mark.slow
def test_lvhba_bias_falls_like_one_over_c():
    problem, x0, y0 = toy_llc(3)

    def error(c):
        return jnp.linalg.norm(run(problem, LVHBA(penalty=c), x0, y0, 4000)[0].x + 0.3)

    errors = np.asarray(jax.jit(jax.vmap(error))(jnp.asarray([10.0, 20.0, 40.0])))
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2, rtol=0.1)


def test_the_proximal_lagrangian_value_function_has_danskins_gradient():
    """The gradients of the gap at the saddle point against central differences of v itself."""
    from bilevel.solvers.penalty.lvhba import proximal_saddle

    problem, _, _, x0, y0 = equality()
    rows = Constraints(problem.draw_lower(0), x0, y0)
    lower, gamma1, gamma2 = problem.draw_lower(0), 0.7, 2.0

    @jax.jit
    def saddle(x, y, z):
        step = lambda _, p: jax.tree.map(lambda a, b: a - 0.2 * b, p, halfway(p))
        halfway = lambda p: B(*jax.tree.map(lambda a, b: a - 0.2 * b, p, B(*p)))
        B = proximal_saddle(lower, rows, (x, y), z, gamma1, gamma2)
        return jax.lax.fori_loop(0, 3000, step, (y, z))

    def lagrangian(x, y, z, theta, lam):
        prox = jnp.sum((theta - y) ** 2) / (2 * gamma1) - jnp.sum((lam - z) ** 2) / (2 * gamma2)
        return lower(x, theta) + lam @ rows(x, theta) + prox

    random = np.random.default_rng(0)
    x, y, z = (random.normal(size=k) for k in (4, 5, 2))
    v = jax.jit(lambda x, y, z: lagrangian(x, y, z, *saddle(x, y, z)))
    theta, lam = saddle(x, y, z)
    gradients = jax.jit(jax.grad(lagrangian, argnums=(0, 1, 2)))(x, y, z, theta, lam)
    np.testing.assert_allclose(gradients[1], (y - theta) / gamma1, rtol=1e-10)
    np.testing.assert_allclose(gradients[2], (lam - z) / gamma2, rtol=1e-10)
    for i, gradient in enumerate(gradients):
        for j in range(2):
            shift = [np.zeros_like(u) for u in (x, y, z)]
            shift[i][j] = 1e-4
            up, down = (v(*[u + s * d for u, d in zip((x, y, z), shift, strict=True)]) for s in (1, -1))
            np.testing.assert_allclose((up - down) / 2e-4, gradient[j], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_nonlinear_constraint_and_a_linear_lower_loss():
    """min -x.y over the unit ball: y = x / |x|; F* = 1.5 at x = (1.5, sqrt(3)/2)."""
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - jnp.array([2.0, 0.0])) ** 2) + jnp.sum((y - jnp.array([0.0, 1.0])) ** 2),
        lambda x, y: -x @ y,
        constraint=lambda x, y: y @ y - 1,
        project_upper=lambda x: jnp.clip(x, -3, 3),
    )
    x0, y0 = jnp.array([-1.0, 1.0]), jnp.zeros(2)
    for solver in (LVHBA(), BiCGAFFA()):
        state, _ = end(problem, solver, x0, y0, 5000)
        np.testing.assert_allclose(state.x, [1.5, np.sqrt(3) / 2], atol=1e-3)
        np.testing.assert_allclose(state.y, [np.sqrt(3) / 2, 0.5], atol=1e-3)


# Unconstrained lower levels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver,atol",
    [
        (MEHA(), 1e-3),
        (VPBGD(), 1e-3),
        pytest.param(GPBGD(), 1e-3, marks=pytest.mark.slow),  # as VPBGD, with its toy in tests/test_faults.py
        (GALET(), 1e-8),
        pytest.param(F2BA(), 1e-4, marks=pytest.mark.slow),  # as extrapolated, below
        pytest.param(CentralF2SA(), 1e-4, marks=pytest.mark.slow),  # as of second order, below
    ],
    ids=["MEHA", "VPBGD", "GPBGD", "GALET", "F2BA", "central"],
)
def test_methods_for_a_strongly_convex_lower_level(solver, atol):
    problem, x, y, x0, y0 = quadratic()
    steps = 5000 if isinstance(solver, (MEHA, VPBGD, GPBGD)) else 150
    state, _metrics = end(problem, solver, x0, y0, steps)
    np.testing.assert_allclose(state.x, x, atol=atol)
    np.testing.assert_allclose(state.y, y, atol=10 * atol)


@pytest.mark.parametrize("central,order", [pytest.param(False, 1, marks=pytest.mark.slow), (True, 2)])
def test_f2sa_error_falls_with_the_order_of_its_difference(central, order):
    problem, x, _, x0, y0 = quadratic()

    def error(c):
        return jnp.linalg.norm(run(problem, F2SA(central=central, penalty=c), x0, y0, 60)[0].point[0] - x)

    errors = np.asarray(jax.jit(jax.vmap(error))(jnp.asarray([10.0, 20.0, 40.0])))
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2.0**order, rtol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [MEHA, VPBGD], ids=lambda s: s.__name__)
def test_joint_penalties_have_a_bias_of_one_over_c(solver):
    problem, x, _, x0, y0 = quadratic()
    errors = jax.jit(jax.vmap(lambda c: jnp.linalg.norm(run(problem, solver(penalty=c), x0, y0, 6000)[0].x - x)))(
        jnp.asarray([10.0, 20.0, 40.0])
    )
    np.testing.assert_allclose(np.asarray(errors[:-1] / errors[1:]), 2, rtol=0.25)


def test_extrapolation_is_as_exact_as_its_stages():
    """Three stages c / 4, c / 2, c weighted 1/3, -2, 8/3 cancel the bias up to O(1 / c^3), and add up what the stages
    lack.

    A stage ends with a residual of settle |F_y| / c, hence within that of its solution in x (the second derivative of
    F(x, y(x)) is at least one), so that the error is at most 5 settle |F_y| / c: a constant share of the plain bias,
    and the gain is 1 / settle, not c^2.
    """
    problem, x, y, x0, y0 = quadratic()
    slope = float(jnp.linalg.norm(jax.grad(problem.upper, argnums=1)(jnp.asarray(x), jnp.asarray(y))))

    def errors(settle):
        state = run(problem, F2BA(penalty=Continuation(maximum=160.0, settle=settle)), x0, y0, 60)[0]
        return jnp.linalg.norm(state.point[0] - x), jnp.linalg.norm(state.x - x), state.path.penalties[0]

    (_, plain), (loose, tight), (_, c) = np.asarray(jax.jit(jax.vmap(errors))(jnp.asarray([0.02, 1e-3])))
    assert 80 < c <= 160
    for settle, found in ((0.02, loose), (1e-3, tight)):
        assert found < 5 * settle * slope / c + 8 * plain**3
    assert tight < plain / 100
    assert tight < 1e-5


@pytest.mark.slow
def test_where_the_lower_solution_is_not_unique_the_upper_loss_chooses():
    problem, x, y, x0, y0 = nonsingleton()
    for solver, steps in ((MEHA(), 1500), (VPBGD(), 1500), (BOME(), 3000), (F2BA(), 60)):
        state, _ = end(problem, solver, x0, y0, steps)
        np.testing.assert_allclose(state.x, x, atol=1e-3)
        np.testing.assert_allclose(state.y, y, atol=1e-3)


@pytest.mark.parametrize(
    "solver",
    [pytest.param(CentralF2SA(), marks=pytest.mark.slow), GALET()],
    ids=lambda s: type(s).__name__,
)
def test_methods_that_need_a_unique_solution_do_not_claim_to_have_converged_without_one(solver):
    problem, _, _, x0, y0 = nonsingleton()
    solution = solve(problem, x0, y0, solver, steps=100, tol=1e-4)
    assert solution.result is not Result.CONVERGED


@pytest.mark.slow
def test_bome_on_a_quadratic():
    problem, x, _y, x0, y0 = quadratic()
    state, _ = end(problem, BOME(), x0, y0, 10_000)
    np.testing.assert_allclose(state.x, x, atol=5e-2)


@pytest.mark.slow
def test_meha_honours_a_proximal_term():
    """f + r = |y - b|^2/2 + t|y|_1 with t = e^x: soft thresholding; t* = 13/30 (see the derivative of the sum of
    squares)."""
    b, c = jnp.array([3.0, 1.0, -2.0, 0.1]), jnp.array([2.4, 0.7, -1.6, 0.0])
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((y - c) ** 2),
        lambda x, y: 0.5 * jnp.sum((y - b) ** 2),
        project_upper=lambda x: jnp.clip(x, -5, 2),
        prox_lower=lambda x, y, s: jnp.sign(y) * jnp.maximum(jnp.abs(y) - s * jnp.exp(x), 0),
    )
    with pytest.raises(ProblemError, match=r"depends on x.*nonsmooth=r"):
        solve(problem, jnp.zeros(()), jnp.zeros(4), MEHA())
    state, _ = end(problem, MEHA(nonsmooth=lambda x, y: jnp.exp(x) * jnp.sum(jnp.abs(y))), jnp.asarray(-2.0), b, 4000)
    np.testing.assert_allclose(jnp.exp(state.x), 13 / 30, rtol=1e-2)
    assert float(jnp.abs(state.y[3])) < 1e-2


# Accurate lower solves ----------------------------------------------------------------------------------------------


def test_aipod_is_exact_under_equalities():
    problem, x, y, x0, y0 = equality()
    ended = jax.jit(lambda skip: run(problem, AiPOD(skip=skip), x0, y0, 150)[0])
    for skip in (1.0, 0.5):
        state = ended(skip)
        np.testing.assert_allclose(state.x, x, atol=1e-7)
        np.testing.assert_allclose(state.y, y, atol=1e-7)


@pytest.mark.parametrize("solver", [BLOCC(), GAM()], ids=lambda s: type(s).__name__)
def test_methods_with_accurate_saddle_solves(solver):
    problem, x, _y, x0, y0 = active()

    @jax.jit
    def ended():
        state, _ = run(problem, solver, x0, y0, 60)
        return state.x, solver.multipliers(problem, state)["constraint"]

    found, multiplier = ended()
    np.testing.assert_allclose(found, x, atol=5e-3)
    np.testing.assert_allclose(multiplier, 1, atol=2e-2)


@pytest.mark.slow
def test_blocc_bias_falls_like_one_over_c():
    problem, x, _, x0, y0 = equality()
    errors = jax.jit(jax.vmap(lambda c: jnp.linalg.norm(run(problem, BLOCC(penalty=c), x0, y0, 60)[0].point[0] - x)))(
        jnp.asarray([10.0, 20.0, 40.0])
    )
    np.testing.assert_allclose(np.asarray(errors[:-1] / errors[1:]), 2, rtol=0.2)


@pytest.mark.slow
def test_bvfsm_finds_the_global_well_up_to_a_bias_of_the_cube_root_of_one_over_c():
    """f = (y^2 - 1)^2 + 0.3 y has its global minimum near -1.04; from y0 = 1 descent stays in the other well.

    Around the well f - v = k d^2 / 2, so that F_y d + (c / 2)(k d^2 / 2)^2 is least at d = (2 |F_y| / (c k^2))^(1/3).
    """
    well = np.roots([4, 0, -4, 0.3]).real.min()
    problem = Problem(lambda x, y: 0.5 * (x - y) ** 2 + 0.5 * (y - 1) ** 2, lambda x, y: (y**2 - 1) ** 2 + 0.3 * y)

    def away(c):
        solver = BVFSM(penalty=c, regulariser=0.0, upper_optimizer=0.5, starts=4)
        return run(problem, solver, jnp.asarray(0.0), jnp.asarray(1.0), 40)[0].point

    penalties = np.array([800.0, 6400.0])
    x, y = (np.asarray(u) for u in jax.jit(lambda c: jax.lax.map(away, c))(jnp.asarray(penalties)))
    np.testing.assert_allclose(x, y, atol=1e-6)
    np.testing.assert_allclose(y - well, (2 * (1 - well) / (penalties * (12 * well**2 - 4) ** 2)) ** (1 / 3), rtol=0.03)


# Simple bilevel problems --------------------------------------------------------------------------------------------


def minimum_norm():
    """f = |Ay - b|^2/2 with more unknowns than equations, F = |y|^2/2: the minimum-norm solution."""
    random = np.random.default_rng(5)
    A, b = random.normal(size=(2, 4)), random.normal(size=2)
    problem = Problem(lambda x, y: 0.5 * jnp.sum(y**2), lambda x, y: 0.5 * jnp.sum((A @ y - b) ** 2))
    return problem, np.linalg.pinv(A) @ b


@pytest.mark.parametrize(
    "solver,atol",
    [(IterativeRegularization(), 1e-4), (VPBGD(), 1e-4), (BiGSAM(), 1e-2), (BOME(), 3e-2)],
    ids=lambda s: type(s).__name__,
)
def test_simple_bilevel(solver, atol):
    problem, y = minimum_norm()
    state, _ = end(problem, solver, None, jnp.ones(4), 5000)
    assert state.x is None
    np.testing.assert_allclose(state.y, y, atol=atol)


def test_solve_picks_a_solver_for_a_simple_problem():
    problem, _ = minimum_norm()
    solver, reason, _ = default_solver(problem, None, jnp.ones(4))
    assert isinstance(solver, MPCC)
    assert "several starts" in reason
    many = Problem(lambda x, y: jnp.sum(y**2), lambda x, y: (jnp.sum(y) - 1) ** 2)
    solver, reason, _ = default_solver(many, None, jnp.ones(400))
    assert isinstance(solver, IterativeRegularization)
    assert "both levels own y" in reason


# Hostile problems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [BiCGAFFA(), pytest.param(BLOCC(), marks=pytest.mark.slow)], ids=lambda s: type(s).__name__
)
def test_an_infeasible_lower_level_is_said_to_be_one(solver):
    """y <= -1 - x^2 and y >= 0 have no point in common, for any x."""
    problem = Problem(
        lambda x, y: (x - 1) ** 2 + y**2,
        lambda x, y: 0.5 * (y - x) ** 2,
        constraint=lambda x, y: jnp.stack([y + 1 + x**2, -y]),
    )
    solution = solve(problem, jnp.asarray(0.5), jnp.asarray(0.0), solver, steps=60, tol=1e-4)
    assert solution.result is Result.INFEASIBLE
    assert "no feasible lower-level y" in solution.reason


def test_the_wrong_well_of_the_lower_level_is_not_called_converged():
    problem = Problem(lambda x, y: 0.5 * (x - y) ** 2, lambda x, y: (y**2 - 1) ** 2 + 0.3 * y)
    solution = solve(problem, jnp.asarray(0.0), jnp.asarray(1.0), VPBGD(), steps=4000, tol=1e-3)
    assert float(solution.y) > 0
    assert solution.result is Result.LOWER_LEVEL
    assert "below f(x, y)" in solution.reason


def test_a_constant_penalty_ends_at_its_bias_and_says_so():
    problem, x, _, x0, y0 = quadratic()
    solution = solve(problem, x0, y0, F2SA(penalty=20.0), steps=200, tol=1e-4)
    assert solution.result is Result.PENALTY_LIMITED
    assert np.linalg.norm(solution.x - x) > 1e-3
    solution = solve(problem, x0, y0, F2BA(), steps=400, tol=1e-4)
    assert solution.result is Result.CONVERGED
    np.testing.assert_allclose(solution.x, x, atol=1e-3)


def test_a_multiplier_on_its_cap_is_reported():
    """The multiplier at the solution is 1; a cap of 0.2 cannot hold it."""
    problem, _, _, x0, y0 = active()
    solution = solve(problem, x0, y0, LVHBA(cap=0.2), steps=1500, tol=1e-3)
    assert solution.history["multiplier_at_cap"][-1] == 1
    assert solution.result is not Result.CONVERGED
    assert "on their cap" in solution.reason


def test_a_lower_level_too_flat_for_the_penalty_is_not_called_converged():
    """f curves by 1 and by 2e-6: at c = 300 the second equation is not seen, and f - v is 1e-7 all the same."""
    A, b = jnp.asarray([[1.0, 0.0, 1.0], [0.0, 1e-3, 1e-3]]), jnp.asarray([1.0, 1e-3])
    problem = Problem(lambda x, y: 0.5 * jnp.sum(y**2), lambda x, y: 0.5 * jnp.sum((A @ y - b) ** 2))
    solution = solve(problem, None, 2 * jnp.ones(3), IterativeRegularization(), steps=1500, tol=1e-3)
    exact = np.linalg.pinv(A) @ b
    assert np.linalg.norm(solution.y - exact) > 0.3
    assert solution.result is Result.PENALTY_LIMITED
    assert "too flat for this penalty" in solution.reason
    grown = 0.5 * float(exact @ exact - solution.y @ solution.y)
    np.testing.assert_allclose(solution.history["polished_change"][-1], grown, rtol=0.05)


def test_a_steep_lower_loss_and_a_large_multiplier():
    """y = min(x, 1 - x) for any scale of f; the solution (1, 0) has the multiplier 1,000, the kink (1/2, 1/2) none."""
    problem, x, y, x0, y0 = active()
    steep = dataclasses.replace(problem, lower=lambda x, y: 500 * (y - x) ** 2)
    state, _ = end(steep, LVHBA(), x0, y0, 3000)
    np.testing.assert_allclose([state.x, state.y], [x, y], atol=1e-3)
    np.testing.assert_allclose(LVHBA().multipliers(steep, state)["constraint"], 1000, rtol=2e-2)


def test_a_lower_level_that_is_infeasible_for_some_x():
    """x + y <= 1 and y >= 2 leave x <= -1, while F draws x to 1: LV-HBA stays where there is a y."""
    problem = Problem(
        lambda x, y: 0.5 * (x - 1) ** 2 + 0.5 * (y - 3) ** 2,
        lambda x, y: 0.5 * (y - x) ** 2,
        constraint=lambda x, y: jnp.stack([x + y - 1, 2 - y]),
    )
    state, _ = end(problem, LVHBA(), jnp.asarray(0.0), jnp.asarray(0.0), 300)
    np.testing.assert_allclose([state.x, state.y], [-1, 2], atol=1e-3)


@pytest.mark.slow
def test_no_multiplier_exists():
    """y^2 <= 0 has the feasible point 0 alone, and no multiplier for f = y: never a confident wrong answer."""
    problem = Problem(
        lambda x, y: 0.5 * (x - 1) ** 2 + (y + x) ** 2,
        lambda x, y: y,
        constraint=lambda x, y: y**2,
    )
    for solver in (LVHBA(), BiCGAFFA()):
        solution = solve(problem, jnp.asarray(0.0), jnp.asarray(0.5), solver, steps=3000, tol=1e-3)
        if solution.result is Result.CONVERGED:
            np.testing.assert_allclose(solution.x, 1 / 3, atol=2e-2)


@pytest.mark.slow
def test_ill_conditioning_of_a_million():
    """f_yy from 1e-3 to 1e3: L-BFGS inner solves cope."""
    d = jnp.logspace(-3, 3, 4)
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((x - 1) ** 2) + 0.5 * jnp.sum((y - 1) ** 2),
        lambda x, y: 0.5 * jnp.sum(d * (y - x) ** 2),
    )
    solution = solve(problem, jnp.zeros(4), jnp.zeros(4), F2BA(), steps=400, tol=1e-3)
    assert solution.result is not Result.CONVERGED or np.allclose(solution.x, 1, atol=5e-3)
    np.testing.assert_allclose(solution.x, 1, atol=5e-2)


# Refusals, choice, data, transformations ------------------------------------------------------------------------------


def test_solvers_refuse_what_they_cannot_honour():
    problem, _, _, x0, y0 = active()
    for solver in (MEHA(), VPBGD(), GPBGD(), BOME(), F2SA(), GALET(), AiPOD()):
        with pytest.raises(ProblemError, match=f"{name_of(solver)} cannot honour the coupled inequality"):
            solve(problem, x0, y0, solver)
    above = dataclasses.replace(quadratic()[0], upper_constraint=lambda x, y: y)
    for solver in (MEHA(), VPBGD(), F2SA(), LVHBA(), BLOCC(), GALET(), SOBA(), STFBO()):
        with pytest.raises(ProblemError, match=f"{name_of(solver)} cannot honour the upper level's inequality"):
            solve(above, *quadratic()[3:], solver)
    level = dataclasses.replace(quadratic()[0], upper_equality=lambda x, y: x)
    with pytest.raises(ProblemError, match=r"SOBA cannot honour the upper level's equality .* solvers.MPCC"):
        solve(level, *quadratic()[3:], SOBA())
    with pytest.raises(ProblemError, match="affine"):
        solve(dataclasses.replace(problem, constraint=lambda x, y: y**2 - x), x0, y0, SFLCB())
    with pytest.raises(ProblemError, match="needs an upper variable"):
        solve(minimum_norm()[0], None, jnp.ones(4), LVHBA())
    with pytest.raises(ProblemError, match="simple bilevel problems"):
        solve(quadratic()[0], *quadratic()[3:], IterativeRegularization())
    with pytest.raises(ProblemError, match="equality constraint"):
        solve(quadratic()[0], *quadratic()[3:], AiPOD())


def test_the_choice_follows_the_problem():
    """The first row of the table that fits, for small problems and for the same ones with many more unknowns."""
    chosen = lambda *args: default_solver(*args)[0]
    problem, _, _, x0, y0 = active()
    assert isinstance(chosen(problem, x0, y0), MPCC)
    assert isinstance(chosen(dataclasses.replace(problem, upper_constraint=lambda x, y: x - y), x0, y0), MPCC)
    wide = Problem(
        lambda x, y: jnp.sum((x - y) ** 2), lambda x, y: jnp.sum((y - x) ** 2), constraint=lambda x, y: y[:2] - x[:2]
    )
    many = jnp.zeros(400)
    assert isinstance(chosen(wide, many, many), LVHBA)
    assert isinstance(chosen(dataclasses.replace(wide, constraint=lambda x, y: y**2 - x), many, many), BiCGAFFA)
    soft = lambda x, y, s: jnp.sign(y) * jnp.maximum(jnp.abs(y) - s, 0)
    assert isinstance(chosen(dataclasses.replace(quadratic()[0], prox_lower=soft), *quadratic()[3:]), MEHA)
    assert look(*quadratic()[:1], *quadratic()[3:]).curvature == "convex"
    assert chosen(quadratic()[0], *quadratic()[3:]).hypergradient is not None
    flat = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: (y[0] - x[0]) ** 2)
    assert isinstance(chosen(flat, jnp.zeros(1), jnp.zeros(2)), MPCC)
    above = dataclasses.replace(wide, constraint=None, upper_constraint=lambda x, y: y - x)
    with pytest.raises(ProblemError, match=r"MPCC does not take the problem: .* are more than"):
        chosen(above, many, many)


def test_the_page_prints_the_table_of_the_choice():
    page = pathlib.Path(__file__).parents[1] / "docs" / "start" / "which_method_when.md"
    assert as_markdown() in page.read_text()
    assert len(as_markdown().splitlines()) == len(ROWS) + 2


def test_constraints_take_the_lower_levels_data():
    """y >= every sample: y* = max of the data; x follows it."""
    samples = jnp.asarray([0.3, 1.2, -0.5])
    problem = Problem(
        lambda x, y: 0.5 * (x - y) ** 2 + 0.05 * (x - 1) ** 2,
        lambda x, y, batch: 0.5 * y**2,
        lower_data=samples,
        constraint=lambda x, y, batch: batch - y,
    )
    problem.validate(jnp.asarray(0.0), jnp.asarray(0.0))

    @jax.jit
    def ended():
        state, _ = run(problem, LVHBA(), jnp.asarray(0.0), jnp.asarray(0.0), 1500)
        return state.y, LVHBA().multipliers(problem, state)["constraint"]

    y, multipliers = ended()
    np.testing.assert_allclose(y, 1.2, atol=1e-3)
    np.testing.assert_allclose(multipliers, [0, 1.2, 0], atol=2e-2)
    drawn = dataclasses.replace(problem, lower_data=data.Minibatches(np.asarray(samples), 2))
    with pytest.raises(ProblemError, match="drawn anew"):
        solve(drawn, jnp.asarray(0.0), jnp.asarray(0.0), LVHBA())
    with pytest.raises(ProblemError, match="constraint"):
        dataclasses.replace(problem, constraint=lambda x, y, batch: batch @ jnp.zeros(7)).validate(
            jnp.asarray(0.0), jnp.asarray(0.0)
        )


@pytest.mark.slow
def test_minibatches():
    """Ridge regression, its penalty tuned on minibatches: the same x as on full batches, within the noise."""
    random = np.random.default_rng(1)
    A, w = random.normal(size=(256, 4)), np.array([1.0, -1.0, 0.5, 0.0])
    t = A @ w + 0.5 * random.normal(size=256)
    loss = lambda y, batch: 0.5 * jnp.mean((batch[0] @ y - batch[1]) ** 2)
    full = Problem(
        lambda x, y, b: loss(y, b) + 0.05 * x**2,
        lambda x, y, b: loss(y, b) + 0.5 * jnp.exp(x) * y @ y,
        upper_data=(A, t),
        lower_data=(A, t),
    )
    noisy = dataclasses.replace(full, upper_data=data.Minibatches((A, t), 64), lower_data=data.Minibatches((A, t), 64))
    exact, _ = end(full, CentralF2SA(), jnp.asarray(0.0), jnp.zeros(4), 100)
    for solver in (
        F2SA(penalty=20.0, upper_optimizer=0.02),
        CentralF2SA(penalty=20.0, upper_optimizer=0.02),
        MEHA(penalty=20.0),
    ):
        state, metrics = end(noisy, solver, jnp.asarray(0.0), jnp.zeros(4), 3000)
        assert np.isfinite(metrics["upper_loss"]).all()
        np.testing.assert_allclose(state.y, exact.y, atol=0.15)


@pytest.mark.slow
def test_multistart_returns_the_best_feasible_end():
    """Bard (1988): two isolated local solutions, F = 17 at (1, 0) and F = 25 at (5, 2)."""
    problem = Problem(
        lambda x, y: (x - 5) ** 2 + (2 * y + 1) ** 2,
        lambda x, y: (y - 1) ** 2 - 1.5 * x * y,
        constraint=lambda x, y: jnp.stack([-3 * x + y + 3, x - 0.5 * y - 4, x + y - 7]),
        project_upper=lambda x: jnp.clip(x, 0, 10),
        project_lower=lambda y: jnp.clip(y, 0, 20),
    )
    found = multistart(problem, jnp.asarray([4.8, 2.0, 1.2]), jnp.asarray([2.0, 1.0, 0.2]), LVHBA(), steps=3000)
    assert found.best > 0
    np.testing.assert_allclose(found.x, 1.0, atol=2e-2)
    np.testing.assert_allclose(found.metrics["upper_loss"][found.best], 17.0, atol=0.2)
    with pytest.raises(ProblemError, match="leading axis"):
        multistart(problem, jnp.zeros(3), jnp.zeros(2), LVHBA())


def test_a_flag_is_true_or_false():
    """`F2SA(0.1, 0.1)`: its first argument is a flag."""
    with pytest.raises(TypeError, match=r"F2SA\(central=0\.1\): True or False is expected, not a float"):
        F2SA(0.1, 0.1)
