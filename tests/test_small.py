"""The search, the program and the checks of small problems, on problems with closed-form solutions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, data, sets, solve, solvers
from bilevel.data import ProblemError
from bilevel.keys import as_step_key
from bilevel.result import Result
from bilevel.solvers.small.branches import best_branches
from bilevel.solvers.small.nlp import Rows, attempt
from bilevel.solvers.small.program import Program
from bilevel.solvers.small.search import Search, solve_lower
from bilevel.solvers.small.stationarity import lower_verified, refusal, stationary, unbounded


def ended(problem, x, y, solver=None):
    """The last state of a search, without the certificate of `solve`."""
    solver = solvers.MPCC() if solver is None else solver
    x, y = (None if v is None else jnp.asarray(v, float) for v in (x, y))
    key = as_step_key(0)
    *_, (state, metrics) = solver.search(problem, solver.init(problem, x, y, key), key)
    assert np.isfinite(metrics["upper_loss"])
    assert solver.status(state, metrics, None) == Result.CONVERGED
    return state


def coupled():
    """min (x - 5)^2 + (2y + 1)^2, the lower level on an interval that x moves; global at (1, 0), local at (5, 2)."""
    return Problem(
        upper=lambda x, y: (x[0] - 5) ** 2 + (2 * y[0] + 1) ** 2,
        lower=lambda x, y: (y[0] - 1) ** 2 - 1.5 * x[0] * y[0],
        constraint=lambda x, y: jnp.array([-3 * x[0] + y[0] + 3, x[0] - y[0] / 2 - 4, x[0] + y[0] - 7, -y[0]]),
        upper_constraint=lambda x, y: -x,
    )


def kink(F=1.0, f=1.0, x_unit=1.0, y_unit=1.0):
    """y = max(x, 3x - 2) in the lower level, F = -y, x in [0, 2]: the solution is (2, 4), and (1, 1) is a kink."""

    def unscaled(x, y):
        return x / x_unit, y / y_unit

    def rows(x, y):
        x, y = unscaled(x, y)
        return jnp.array([x[0] - y[0], 3 * x[0] - 2 - y[0]])

    return Problem(
        upper=lambda x, y: -F * unscaled(x, y)[1][0],
        lower=lambda x, y: f * unscaled(x, y)[1][0],
        constraint=rows,
        upper_constraint=lambda x, y: jnp.concatenate([-unscaled(x, y)[0], unscaled(x, y)[0] - 2]),
    )


# ---------------------------------------------------------------- MPCC


def test_finds_the_global_solution_and_lists_the_local_one():
    state = ended(coupled(), [4.0], [2.0])
    np.testing.assert_allclose(state.x, [1.0], atol=1e-5)
    np.testing.assert_allclose(state.y, [0.0], atol=1e-5)
    assert float(state.upper_loss) == pytest.approx(17, abs=1e-4)
    others = solvers.MPCC().others(state)
    assert any(o.verified and abs(o.upper_loss - 25) < 1e-3 and abs(float(o.x[0]) - 5) < 1e-3 for o in others)


@pytest.mark.parametrize("start", [0.0, 1.0, 1.5])
def test_a_kink_is_passed(start):
    state = ended(kink(), [start], [start])
    np.testing.assert_allclose(state.x, [2.0], atol=1e-5)
    np.testing.assert_allclose(state.y, [4.0], atol=1e-5)


def test_multipliers_of_both_levels_in_the_users_units():
    # Lower: y = a - x on 7 (y + x - a) = 0 with f = y^2: mu = -2 y / 7. Upper: -y + x^2 with x >= 1, rows of norm 5.
    problem = Problem(
        upper=lambda x, y: x[0] ** 2 + y["v"],
        lower=lambda x, y: y["v"] ** 2 / 2,
        equality=lambda x, y: {"row": 7 * (y["v"] + x[0] - 3)},
        upper_constraint=lambda x, y: 5 * (1 - x),
    )
    key, solver = as_step_key(0), solvers.MPCC(starts=2)
    begun = solver.init(problem, jnp.array([2.0]), {"v": jnp.array(0.0)}, key)
    *_, (state, _) = solver.search(problem, begun, key)
    # F(x) = x^2 + 3 - x: the free minimum 1/2 is below the bound; 2x - 1 = 5 nu at x = 1.
    assert float(state.x[0]) == pytest.approx(1, abs=1e-5)
    assert float(state.y["v"]) == pytest.approx(2, abs=1e-5)
    assert set(state.multipliers) == {"equality", "upper_constraint"}
    assert float(state.multipliers["equality"]["row"]) == pytest.approx(-2 / 7, abs=1e-4)
    np.testing.assert_allclose(state.multipliers["upper_constraint"], [1 / 5], atol=1e-4)


def test_upper_rows_that_couple_bind_the_choice_of_x():
    # y = x; F = (x - 3)^2 with G = x + y <= 2 and H = x_1 - x_2 = 0: x = 1.
    problem = Problem(
        upper=lambda x, y: jnp.sum((x - 3) ** 2),
        lower=lambda x, y: jnp.sum((y - x) ** 2),
        upper_constraint=lambda x, y: x[0] + y[0] - 2,
        upper_equality=lambda x, y: x[0] - x[1],
    )
    state = ended(problem, [0.0, 0.5], [0.0, 0.0])
    np.testing.assert_allclose(state.x, [1.0, 1.0], atol=1e-5)
    np.testing.assert_allclose(state.y, [1.0, 1.0], atol=1e-5)


def test_a_lower_level_without_a_multiplier_is_reached_by_cuts():
    # y^2 <= 0 has no constraint qualification: y = 0 for all x, and F = (x - 1)^2 + y^2 ends at x = 1.
    problem = Problem(
        upper=lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2,
        lower=lambda x, y: (1 + x[0] ** 2) * y[0],
        constraint=lambda x, y: y**2,
    )
    state = ended(problem, [-1.0], [0.5])
    np.testing.assert_allclose(state.x, [1.0], atol=1e-2)
    assert abs(float(state.y[0])) < 2e-3


def test_non_convex_lower_levels_take_the_global_minimiser():
    # f = (y^2 - 1)^2 - x y / 10: for x > 0 the minimiser is near 1, for x < 0 near -1; F wants y = -1 and x = 1.
    problem = Problem(
        upper=lambda x, y: (x[0] - 1) ** 2 + 3 * (y[0] + 1) ** 2,
        lower=lambda x, y: (y[0] ** 2 - 1) ** 2 - x[0] * y[0] / 10,
    )
    state = ended(problem, [1.0], [-1.0])
    # At x = 0 the two tie and F = 1; any x > 0 has F near 12.
    assert float(state.x[0]) == pytest.approx(0, abs=1e-3)
    assert float(state.y[0]) == pytest.approx(-1, abs=1e-3)


def test_of_many_lower_minimisers_the_best_for_F():
    # f = sin(x + y - 2): y = -pi/2 + 2 k pi + 2 - x. The closed form: d = 3 pi / 2 - 4, x = 2 + d / 2, F = d^2 / 2.
    problem = Problem(upper=lambda x, y: (x[0] - 2) ** 2 + (y[0] - 4) ** 2, lower=lambda x, y: jnp.sin(x[0] + y[0] - 2))
    state, d = ended(problem, [0.0], [0.0]), 3 * np.pi / 2 - 4
    assert float(state.upper_loss) == pytest.approx(d**2 / 2, abs=1e-4)
    assert float(state.x[0]) == pytest.approx(2 + d / 2, abs=1e-3)


def test_no_upper_variable():
    # Among the y with y_0 + y_1 = 1 the one next to (1, 1).
    problem = Problem(upper=lambda x, y: jnp.sum((y - 1) ** 2), lower=lambda x, y: (y[0] + y[1] - 1) ** 2)
    state = ended(problem, None, [3.0, -1.0])
    assert state.x is None
    np.testing.assert_allclose(state.y, [0.5, 0.5], atol=1e-3)


def test_sets_are_bounds_and_rows():
    # The lower level projects x on the simplex; F pulls y to (1, 1, 0) / 2 + 1 and x into a box.
    target = jnp.array([0.5, 0.5, 0.0])
    problem = Problem(
        upper=lambda x, y: jnp.sum((y - target) ** 2) + 0.1 * jnp.sum((x - target) ** 2),
        lower=lambda x, y: jnp.sum((y - x) ** 2),
        project_upper=sets.Box(-0.25, 0.75),
        project_lower=sets.Simplex(),
    )
    state = ended(problem, [0.0, 0.0, 0.0], [1 / 3] * 3)
    np.testing.assert_allclose(state.y, target, atol=1e-3)
    assert float(state.y.sum()) == pytest.approx(1, abs=1e-5)


def test_opposite_inequalities_are_one_equality():
    problem = Problem(
        upper=lambda x, y: (x[0] - 1) ** 2 + (y[0] - 1) ** 2,
        lower=lambda x, y: (y[0] + y[1]) ** 2,
        constraint=lambda x, y: jnp.array([y[1] - x[0] * 2, x[0] * 2 - y[1]]),
    )
    program = Program(problem, jnp.zeros(1), jnp.zeros(2))
    assert program.pairs.tolist() == [[0, 1]]
    assert program.inequality.tolist() == [False, False]
    # y_1 = 2x, y_0 = -2x: (x - 1)^2 + (2x + 1)^2 has its minimum at x = -1/5.
    state = ended(problem, [0.5], [0.0, 0.0])
    assert float(state.x[0]) == pytest.approx(-0.2, abs=1e-4)


@pytest.mark.parametrize("F", [1e-8, 1e8])
@pytest.mark.parametrize("f", [1e-8, 1e8])
def test_units_change_nothing(F, f, x64):
    state = ended(kink(F, f, 1e4, 1e-4), [1e4], [1e-4], solvers.MPCC(starts=3))
    np.testing.assert_allclose(state.x, [2e4], rtol=1e-5)
    np.testing.assert_allclose(state.y, [4e-4], rtol=1e-5)


def test_trust_constr_is_a_method_too():
    problem = Problem(
        upper=lambda x, y: (x[0] - 2) ** 2 + y[0] ** 2,
        lower=lambda x, y: (y[0] - x[0]) ** 2,
        constraint=lambda x, y: y - 0.5,
    )
    # y = min(x, 1/2): the best x is 2 with y = 1/2.
    state = ended(problem, [1.0], [0.0], solvers.MPCC(starts=1, method="trust-constr", lower_starts=1, rounds=1))
    assert float(state.x[0]) == pytest.approx(2, abs=1e-2)
    assert float(state.y[0]) == pytest.approx(0.5, abs=1e-3)


def test_bounds_of_the_upper_level_do_not_bind_the_lower_one():
    # f falls for ever in y; the upper level's y <= 1 is none of its rows, so that no point is a solution.
    problem = Problem(
        upper=lambda x, y: x[0] ** 2 - y[0], lower=lambda x, y: -y[0], upper_constraint=lambda x, y: y - 1
    )
    solver, key = solvers.MPCC(starts=3), as_step_key(0)
    *_, (state, metrics) = solver.search(problem, solver.init(problem, jnp.ones(1), jnp.ones(1), key), key)
    assert not state.verified
    assert solver.status(state, metrics, None) != Result.CONVERGED


@pytest.mark.parametrize(
    "constraint",
    [
        lambda x, y: jnp.concatenate([y + 1 + x**2, 1 - y]),
        pytest.param(lambda x, y: y**2 + 1 + x**2, marks=pytest.mark.slow),
    ],
    ids=["two rows", "one row"],
)
def test_a_point_without_a_lower_solution_is_never_verified(constraint):
    # The lower level has no feasible point at all.
    problem = Problem(
        upper=lambda x, y: x[0] ** 2 + y[0] ** 2,
        lower=lambda x, y: y[0] ** 2,
        constraint=constraint,
    )
    solver, key = solvers.MPCC(starts=2, rounds=1), as_step_key(0)
    *_, (state, metrics) = solver.search(problem, solver.init(problem, jnp.ones(1), jnp.ones(1), key), key)
    assert not state.verified
    assert solver.status(state, metrics, None) == Result.INFEASIBLE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"project_lower": lambda y: jnp.tanh(y)}, "Give an object of bilevel.sets"),
        ({"prox_lower": lambda x, y, s: y}, "cannot honour the nonsmooth lower term prox_lower="),
    ],
)
def test_refuses_by_name(changes, words):
    problem = Problem(upper=lambda x, y: jnp.sum(x + y), lower=lambda x, y: jnp.sum((y - x) ** 2), **changes)
    with pytest.raises(ProblemError, match=words):
        solvers.MPCC().init(problem, jnp.zeros(1), jnp.zeros(1), as_step_key(0))


def test_refuses_minibatches_and_what_is_large():
    batches = data.Minibatches(jnp.ones((8, 1)), size=2)
    problem = Problem(upper=lambda x, y: jnp.sum(x), lower=lambda x, y, b: jnp.sum((y - x) ** 2), lower_data=batches)
    with pytest.raises(ProblemError, match="works on full batches"):
        solvers.MPCC().init(problem, jnp.zeros(1), jnp.zeros(1), as_step_key(0))
    problem = Problem(upper=lambda x, y: jnp.sum(x), lower=lambda x, y: jnp.sum((y - x) ** 2))
    with pytest.raises(ProblemError, match=r"or MPCC\(largest=40\) and time"):
        solvers.MPCC(largest=20).init(problem, jnp.zeros(20), jnp.zeros(20), as_step_key(0))


def test_hyperparameters_are_checked():
    with pytest.raises(ValueError, match="the methods are 'SLSQP', 'trust-constr'"):
        solvers.MPCC(method="simplex")
    with pytest.raises(ValueError, match="a tolerance is positive"):
        solvers.MPCC(tol=0.0)


# ---------------------------------------------------------------- the program


def test_jacobian_is_that_of_central_differences(x64):
    problem = Problem(
        upper=lambda x, y: jnp.sum(jnp.sin(x) * y[0]) + y[1] ** 3,
        lower=lambda x, y: jnp.exp(y[0] * x[1]) + jnp.cos(y[1]) * x[0],
        constraint=lambda x, y: {"a": x * y, "b": jnp.sum(y**2)},
        equality=lambda x, y: y[0] * y[1] - x[0],
        upper_constraint=lambda x, y: jnp.tanh(x + y),
    )
    program = Program(problem, jnp.array([0.3, -0.7]), jnp.array([0.5, 1.1]))
    z = np.random.default_rng(0).normal(size=program.size)
    values, jacobian = program.raw(z)
    assert values.shape == (2 + 2 + 0 + 3 + 1 + 2,)
    for j in range(program.size):
        step = np.eye(program.size)[j] * 1e-6
        slope = (program.raw(z + step)[0] - program.raw(z - step)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[:, j], slope, rtol=1e-6, atol=1e-8)
    # The last rows are the gradient of the Lagrangian in y.
    x, y, lam, mu = z[:2], z[2:4], z[4:7], z[7]
    lagrangian = lambda y: (
        problem.lower(x, y)
        + lam[:2] @ problem.constraint(x, y)["a"]
        + lam[2] * problem.constraint(x, y)["b"]
        + mu * problem.equality(x, y)
    )
    np.testing.assert_allclose(values[-2:], jax.grad(lagrangian)(jnp.asarray(y)), rtol=1e-10)


def test_double_precision_inside_and_the_users_dtypes_outside():
    program = Program(coupled(), jnp.array([4.0], jnp.float32), jnp.array([2.0], jnp.float32))
    assert program.double
    x, y = program.trees(program.start)
    assert x.dtype == jnp.float32
    assert y.dtype == jnp.float32
    assert not jax.config.jax_enable_x64


# ---------------------------------------------------------------- stationarity


@pytest.mark.parametrize(
    "scale", [{}, {"F": 1e-8}, {"F": 1e8}, {"f": 1e-8}, {"f": 1e8}, {"x_unit": 1e8, "y_unit": 1e-8}]
)
def test_a_kink_is_not_stationary_and_the_solution_is(scale, x64):
    problem = kink(**scale)
    x_unit, y_unit = scale.get("x_unit", 1.0), scale.get("y_unit", 1.0)
    at_kink = stationary(problem, jnp.array([x_unit]), jnp.array([y_unit]))
    assert at_kink.checked
    assert at_kink.slope < -0.3
    dx, dy = at_kink.direction
    assert float(dx[0]) > 0
    assert float(dy[0] / y_unit) == pytest.approx(3 * float(dx[0] / x_unit), rel=1e-4)
    at_solution = stationary(problem, jnp.array([2 * x_unit]), jnp.array([4 * y_unit]))
    assert at_solution.checked
    assert at_solution.slope == 0
    assert at_solution.direction is None


def test_a_tie_of_two_minimisers_is_no_false_alarm():
    problem = Problem(
        upper=lambda x, y: (x[0] - 1) ** 2 + 3 * (y[0] + 1) ** 2,
        lower=lambda x, y: (y[0] ** 2 - 1) ** 2 - x[0] * y[0] / 10,
    )
    found = stationary(problem, jnp.array([0.0]), jnp.array([-1.0]))
    assert found.slope == 0
    lower = lower_verified(problem, jnp.array([0.0]), jnp.array([-1.0]))
    assert lower.gap < 1e-6
    assert {round(float(y[0])) for y in lower.minimisers} == {-1, 1}
    assert lower.optimistic_gain < 1e-6
    wrong = lower_verified(problem, jnp.array([0.0]), jnp.array([1.0]))
    assert wrong.optimistic_gain > 0.05
    assert wrong.loss_gain == pytest.approx(12, rel=1e-3)


def test_a_smooth_point_that_is_not_stationary():
    problem = Problem(
        upper=lambda x, y: jnp.sum((y - 1) ** 2) / 2 + jnp.sum(x**2) / 2, lower=lambda x, y: jnp.sum((y - x) ** 2) / 2
    )
    assert stationary(problem, jnp.array([0.5]), jnp.array([0.5])).slope == 0
    off = stationary(problem, jnp.array([0.6]), jnp.array([0.6]))
    assert off.slope < -0.05
    assert float(off.direction[0][0]) < 0


def test_the_lower_level_is_checked_from_several_starts():
    # y = -1 is a local minimiser of (y^2 - 1)^2 - y / 10 and not the global one.
    problem = Problem(upper=lambda x, y: jnp.sum(x**2), lower=lambda x, y: (y[0] ** 2 - 1) ** 2 - y[0] / 10)
    found = lower_verified(problem, jnp.zeros(1), jnp.array([-0.9871]))
    assert found.loss_gap == pytest.approx(0.2, abs=0.01)
    assert found.gap > 1e-3


def test_what_is_not_checked_says_why():
    problem = Problem(upper=lambda x, y: jnp.sum(x), lower=lambda x, y: jnp.sum((y - x) ** 2))
    assert refusal(problem, jnp.zeros(2), jnp.zeros(2)) == ""
    assert "more than 300" in refusal(problem, jnp.zeros(200), jnp.zeros(200))


# ---------------------------------------------------------------- parts of the search


def test_a_linear_lower_level_is_seen_and_solved_at_once(x64):
    box = sets.Box(0.0, 2.0)
    linear = Problem(
        lambda x, y: (y[0] - 0.5) ** 2, lambda x, y: x[0] * (y[0] + y[1]), project_lower=box,
        constraint=lambda x, y: 1 - y[0] - y[1],
    )  # fmt: skip
    program = Program(linear, jnp.ones(1), jnp.ones(2))
    assert program.linear
    lowest = solve_lower(program, program.start, [program.start[1:]])
    np.testing.assert_allclose(lowest.value * program.lower_scale, 1.0, rtol=1e-9)
    for lower in (lambda x, y: y[0] * y[1], lambda x, y: jnp.abs(y[0]), lambda x, y: y[0] ** 2 + x[0]):
        assert not Program(dataclasses.replace(linear, lower=lower), jnp.ones(1), jnp.ones(2)).linear
    free = Problem(lambda x, y: y[0] ** 2, lambda x, y: -y[0], constraint=lambda x, y: x[0] - y[0])
    assert unbounded(free, jnp.ones(1), jnp.ones(1))


def test_a_solution_on_an_upper_row_is_no_saddle(x64):
    """F = 4 (y0 - y1)^2 - (y0 + y1)^2 with y = x over x0 + x1 <= 1, or x0 + y1 <= 1: x = (1/2, 1/2).

    F bends down across the row, where nothing is to be had. Along one it does: 3 (y0 - y1)^2 less makes it a saddle.
    """
    follow, at = lambda x, y: jnp.sum((y - x) ** 2), jnp.full(2, 0.5)
    for row in (lambda x, y: jnp.sum(x) - 1, lambda x, y: x[0] + y[1] - 1, lambda x, y: jnp.sum(x) ** 2 - 1):
        upper = lambda x, y: 4 * (y[0] - y[1]) ** 2 - jnp.sum(y) ** 2
        problem = Problem(upper, follow, upper_constraint=row)
        assert stationary(problem, at, at).slope > -1e-4
        bent = lambda x, y, upper=upper: upper(x, y) - 5 * (y[0] - y[1]) ** 2 + (y[0] - y[1]) ** 4
        found = stationary(dataclasses.replace(problem, upper=bent), at, at)
        assert found.slope < -1e-3


def test_a_lower_solve_that_creeps_to_a_known_end_is_left(x64):
    """min (y - 2)^2 s.t. y^2 <= x at x = 0: y = 0 alone, without a qualification, and steps that get ever shorter."""
    problem = Problem(lambda x, y: y[0] ** 2, lambda x, y: (y[0] - 2) ** 2, constraint=lambda x, y: y**2 - x)
    calls = []
    for starts in ([[-1.0]], np.linspace(-1, 3, 12)[:, None]):
        program = Program(problem, jnp.zeros(1), -jnp.ones(1))
        before = program.calls
        lowest = solve_lower(program, program.start, np.asarray(starts))
        assert abs(lowest.points[0][1]) < 1e-6
        calls.append(program.calls - before)
    assert calls[0] > 60  # else it does not creep, and says nothing
    assert calls[1] < calls[0] + 12 * 40


def test_lower_solves_that_all_creep_are_not_all_waited_for(x64):
    """min (y0 - 2)^2 s.t. y0^4 <= x at x = 0: y0 = 0, any y1; each start goes to its own y1, in more than 20 steps."""
    problem = Problem(
        lambda x, y: y[0] ** 2, lambda x, y: (y[0] - 2) ** 2, constraint=lambda x, y: y[0] ** 4 - x[0]
    )  # fmt: skip
    program = Program(problem, jnp.zeros(1), -jnp.ones(2))
    before = program.calls
    starts = [np.array([-1.0, y1]) for y1 in np.linspace(-30, 30, 12)]
    lowest = solve_lower(program, program.start, starts, iterations=20)
    assert abs(lowest.points[0][1]) < 0.1
    assert program.calls - before < 12 * 30  # going on with each, it is twice twenty for most


def test_the_best_branch_of_a_linear_problem_is_found_at_once(x64):
    """y = max(x - 1, 0) for x <= 2, above it y = x - 1 is no more in the upper rows; F = x - 3y: x = 2 beats x = 0."""
    problem = Problem(
        lambda x, y: x[0] - 3 * y[0],
        lambda x, y: y[0],
        project_lower=sets.Box(0.0, 5.0),
        project_upper=sets.Box(0.0, 5.0),
        constraint=lambda x, y: x - 1 - y,
        upper_constraint=lambda x, y: y - 1,
    )
    program = Program(problem, jnp.zeros(1), jnp.ones(1))
    assert program.affine
    found = best_branches(program, program.start)
    np.testing.assert_allclose(found[0] * program.columns[:2], [2.0, 1.0], atol=1e-6)
    curved = dataclasses.replace(problem, upper_constraint=lambda x, y: y**2 - 1)
    assert best_branches(Program(curved, jnp.zeros(1), jnp.ones(1)), program.start) == []
    quadratic = dataclasses.replace(problem, lower=lambda x, y: y[0] ** 2)
    program = Program(quadratic, jnp.zeros(1), jnp.ones(1))
    found = best_branches(program, program.start)
    np.testing.assert_allclose(found[0] * program.columns[:2], [2.0, 1.0], atol=1e-6)


def test_a_cut_bounds_the_lower_value_to_second_order(x64):
    """f = y^3 - 3y over y >= x - 3: the minimum at the row has the value (x - 3)^3 - 3 (x - 3)."""
    problem = Problem(lambda x, y: x[0] + y[0], lambda x, y: y[0] ** 3 - 3 * y[0], constraint=lambda x, y: x - 3 - y)
    program = Program(problem, jnp.array([0.8]), jnp.array([1.0]))
    search = Search(program)
    at_row = program.scaled(jnp.array([0.8]), jnp.array([-2.2]))
    cut = search.cut(at_row)
    value = lambda x: (x - 3) ** 3 - 3 * (x - 3)
    for d in (0.0, 0.1, 0.01):
        z = program.point(program.scaled(jnp.array([0.8 + d]), jnp.array([1.0])))
        left, gradient = search._cut(program(z), z, cut)
        allowed = left * program.lower_scale + (1 - 3)  # left is the bound less f(x, y), and f is -2 at y = 1
        np.testing.assert_allclose(allowed, value(0.8 + d), atol=1e-9)
        steps = [sign * 1e-6 * np.eye(z.size)[0] for sign in (1, -1)]
        ahead, behind = (search._cut(program(z + step), z + step, cut)[0] for step in steps)
        np.testing.assert_allclose(gradient[0], (ahead - behind) / 2e-6, rtol=1e-5)


def test_equations_that_follow_from_others_do_not_stop_a_search():
    rows = lambda z: Rows(
        float((z - 2) @ (z - 2)), 2 * (z - 2), np.zeros(0), np.zeros((0, 2)),
        np.array([z.sum() - 2, 2 * z.sum() - 4]), np.array([[1.0, 1.0], [2.0, 2.0]]),
    )  # fmt: skip
    far = np.full(2, np.inf)
    found = attempt(rows, np.array([5.0, -1.0]), -far, far).point
    np.testing.assert_allclose(found, [1.0, 1.0], atol=1e-5)  # the root of the tolerance, 1e-10, in the value


def test_coordinates_of_unequal_effects_have_units_of_their_own(x64):
    lower = lambda x, y: (1e3 * y[0] - x[0]) ** 2 / 2 + (1e-3 * y[1] - x[0]) ** 2 / 2
    program = Program(Problem(lambda x, y: x[0] ** 2 + y[1], lower), jnp.zeros(1), jnp.zeros(2))
    np.testing.assert_allclose(program.columns[2] / program.columns[1], 1e6, rtol=1e-6)
    # A curvature that is zero here by chance is no unit.
    by_chance = lambda x, y: x[0] * y[0] ** 2 + (x[0] - x[1]) * y[1] ** 2
    program = Program(Problem(lambda x, y: y[0], by_chance), jnp.array([1.0, 1.0 + 1e-14]), jnp.ones(2))
    assert program.columns[2] == program.columns[3]


@pytest.mark.parametrize("bend", [1e-9, 1e-12])
@pytest.mark.parametrize("project", [None, sets.Box(-2.0, 2.0)], ids=["free", "box"])
def test_a_row_that_is_nearly_affine_makes_no_unit_of_a_variable_at_zero(bend, project):
    """It bends at 1 / bend: in units of that, the box around x was a point, F had no slope, and 0 was CONVERGED."""
    problem = Problem(
        lambda x, y: (x - 1) ** 2 + (y - 1) ** 2,
        lambda x, y: (y - x) ** 2,
        constraint=lambda x, y: y + bend * y**2 - 3,
        upper_constraint=lambda x, y: x + bend * x**2 - 5,
        project_upper=project,
    )
    found = solve(problem, jnp.zeros(()), jnp.zeros(()), tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED, found
    np.testing.assert_allclose([found.x, found.y], 1.0, atol=1e-3)


def test_a_kink_nearer_than_the_tolerance_is_where_x_is(x64):
    """y = min(x, 1) and F = (y - 2)^2 + x^2 / 2 falls towards 1 from both sides, at slopes -1 and 1."""
    problem = Problem(
        lambda x, y: (y - 2) ** 2 + x**2 / 2, lambda x, y: (y - x) ** 2, project_lower=sets.Box(-1.0, 1.0)
    )
    slopes = []
    for left in (0.0, 1e-6, 1e-4, 1e-3):
        x = jnp.asarray(1 - left)
        slopes.append(stationary(problem, x, x, tol=1e-4).slope)
    assert slopes[0] > -1e-6 and slopes[1] > -1e-6
    assert slopes[2] < -1e-2 and slopes[3] < -1e-2
    # Where F falls further than to the next kink, a small step is none to be left out: y = min(x, (x + 1) / 2).
    on = Problem(lambda x, y: -y - x / 10, lambda x, y: y**2 / 2 - y * x, constraint=lambda x, y: y - (x + 1) / 2)
    x = jnp.asarray(1 - 1e-6)
    assert stationary(on, x, x, tol=1e-4).slope < -1e-2


@pytest.mark.parametrize("count", [1, 2])
def test_a_maximum_along_the_one_free_unknown_is_no_solution(x64, count):
    """F = -x_1^2, the other x at its bound: only one unknown is left along which F could bend down."""
    problem = Problem(
        lambda x, y: -(y[0] ** 2) + jnp.sum(y[1:]),
        lambda x, y: jnp.sum((y - x) ** 2),
        project_upper=sets.Box(-1.0, 1.0),
    )
    x = jnp.array([0.0, -1.0])[:count]
    found = stationary(problem, x, x)
    assert found.slope < -1e-2 and found.reached is not None
    assert stationary(problem, x.at[0].set(1.0), x.at[0].set(1.0)).slope > -1e-6


@pytest.mark.parametrize("angle", [1.0, 1.75, 2.0])
def test_a_descent_into_a_valley_that_is_not_the_lowest_is_none(x64, angle):
    """Four wells w = (+-1, r), rotated: for x > 0 the lowest has w_1 = -1, F wants x = 1 and w_1 = 1, and 0 it is."""
    wells = lambda y: jnp.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ y
    problem = Problem(
        lambda x, y: (wells(y)[0] - 1) ** 2 + (x - 1) ** 2,
        lambda x, y: jnp.sum((wells(y) ** 2 - 1) ** 2) + x * wells(y)[0] - 0.3 * wells(y)[1],
    )
    r = np.roots([4, 0, -4, -0.3]).real.max()
    y = np.array([np.cos(angle) - np.sin(angle) * r, np.sin(angle) + np.cos(angle) * r])
    assert stationary(problem, jnp.zeros(()), jnp.asarray(y)).slope > -1e-6


def test_a_search_goes_where_it_is_sent(x64):
    """F = -y^2 - y/10 with y = x in [-1, 1]: -9/10 at -1, next to the start, and -11/10 at 1."""
    problem = Problem(
        lambda x, y: -(y[0] ** 2) - y[0] / 10, lambda x, y: (y[0] - x[0]) ** 2, project_upper=sets.Box(-1.0, 1.0)
    )
    solver, key = solvers.MPCC(starts=1), as_step_key(0)
    state = solver.init(problem, jnp.array([-0.9]), jnp.array([-0.9]), key)
    state, _ = next(solver.search(problem, state, key))
    np.testing.assert_allclose(state.upper_loss, -0.9, atol=1e-6)
    state = solver.towards(state, jnp.array([0.5]), jnp.array([0.5]))
    state, _ = next(solver.search(problem, state, key))
    np.testing.assert_allclose(state.upper_loss, -1.1, atol=1e-6)
    assert not state.led


@pytest.mark.parametrize(
    "lower, quadratic, convex",
    [
        (lambda x, y: jnp.exp(x[0]) * jnp.sum((y - x) ** 2), True, True),
        (lambda x, y: -jnp.sum((y - x) ** 2), True, False),
        (lambda x, y: (y[0] - x[0]) ** 2, True, False),  # flat along y[1]
        (lambda x, y: jnp.sum((y - x) ** 4), False, False),
        (lambda x, y: jnp.sum(y**2) + jnp.abs(y[0]), False, True),
        (lambda x, y: jnp.sum(y**2) + jnp.sin(y[0]), False, False),
    ],
)
def test_a_lower_level_with_one_minimiser_is_seen(x64, lower, quadratic, convex):
    program = Program(
        Problem(lambda x, y: jnp.sum(y), lower, project_lower=sets.Box(-2.0, 2.0)), jnp.ones(2), jnp.ones(2)
    )
    assert program.quadratic is quadratic
    assert program.convex(program.start) is convex
    curved = Problem(lambda x, y: jnp.sum(y), lower, constraint=lambda x, y: 1 - y[0] ** 2)
    assert not Program(curved, jnp.ones(2), jnp.ones(2)).convex(program.start)


@pytest.mark.parametrize(
    "lower, at, falls",
    [
        (lambda y: jnp.exp(-y), 0.0, True),
        (lambda y: jnp.exp(-y), 35.0, True),  # its values end as numbers
        (lambda y: -jnp.log(1 + y**2), 0.0, True),
        (lambda y: -jnp.log(y), 3.0, True),
        (lambda y: 1 / (1 + y**2), 0.5, True),
        (lambda y: jax.nn.relu(3 - y) ** 2, 0.0, False),  # a floor that it takes
        (lambda y: y**4, 0.5, False),
        (lambda y: jax.nn.softplus(y) - y / 3, 0.5, False),
        (lambda y: y - jnp.log(y), 1.2, False),
        (lambda y: jax.nn.sigmoid(-y) - 2 * jnp.exp(-((y + 3) ** 2)), 0.0, False),  # lower in a well than far away
    ],
)
def test_a_value_that_is_approached_and_never_taken_is_no_minimum(x64, lower, at, falls):
    problem = Problem(lambda x, y: y[0] + x[0], lambda x, y: lower(y[0]))
    assert unbounded(problem, jnp.zeros(1), jnp.array([at])) is falls
