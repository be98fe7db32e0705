"""A verdict knows no zero and no common length: problems moved away from zero, and coordinates of unlike sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from known_problems import CASES

from bilevel import Problem, Result, lower, solve, solvers
from bilevel.solvers.certificate import certify
from bilevel.solvers.small.nlp import Rows, attempt
from bilevel.solvers.small.program import Program

PROX = {"prox_lower": lambda x, y, step: y}  # the check of problems that are not small


def v(*numbers):
    return jnp.array(numbers, float)


def seen(problem, x, y=None, start=None, tol=1e-4):
    y = x if y is None else y
    return certify(problem, x, y, (x, y) if start is None else start, Result.CONVERGED, {}, tol)


def two_wells(c, **parts):
    """F = t^4 - 2 t^2 + .3 t with t = y - c, and y = x: lowest at t = -1.03558, a local solution at .96015."""
    t = lambda y: y[0] - c
    return Problem(lambda x, y: t(y) ** 4 - 2 * t(y) ** 2 + 0.3 * t(y), lambda x, y: (y[0] - x[0]) ** 2, **parts)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("parts", [{}, PROX], ids=["small", "prox"])
@pytest.mark.parametrize("c", [0.0, pytest.param(100.0, marks=pytest.mark.slow), 1e5])
def test_a_problem_moved_away_from_zero_has_the_same_ends(c, parts):
    problem = two_wells(c, **parts)
    assert seen(problem, v(c - 1.03557858)).result is Result.CONVERGED
    for t in (-2.0, -0.5, 0.0754, 0.3, 2.0):  # slopes of both signs, and the maximum between the wells
        assert seen(problem, v(c + t)).result in (Result.NOT_STATIONARY, Result.LOCAL), t


@pytest.mark.usefixtures("x64")
def test_a_saddle_far_from_zero_is_left():
    c = 30.0
    problem = Problem(lambda x, y: (y[0] - c) ** 2 + ((y[1] - c) ** 2 - 1) ** 2, lambda x, y: jnp.sum((y - x) ** 2))
    assert seen(problem, v(c, c), start=(v(c - 3, c),) * 2).result in (Result.NOT_STATIONARY, Result.LOCAL)
    found = solve(problem, v(c - 3, c), v(c - 3, c), tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(jnp.abs(found.x - c), [0, 1], atol=1e-3)


C = 1000.0
WELLS = Problem(
    lambda x, y: (x[0] - 1) ** 2 + 0.1 * (y[0] - C - 2) ** 2,
    lambda x, y: ((y[0] - C) ** 2 - 1) ** 2 + 0.3 * (y[0] - C) + 0 * x[0],
)
"""f = (t^2 - 1)^2 + .3 t with t = y - C: lowest at t = -1.0356."""


@pytest.mark.usefixtures("x64")
def test_the_wrong_well_of_a_lower_level_far_from_zero_is_seen():
    assert seen(WELLS, v(1.0), v(C + 0.96015)).result is Result.LOWER_LEVEL
    assert seen(WELLS, v(1.0), v(C - 1.03557858)).result is Result.CONVERGED


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [lambda: None, solvers.MPCC])
def test_the_right_well_of_a_lower_level_far_from_zero_is_found(make):
    found = solve(WELLS, v(0.0), v(C + 1), make(), tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(found.y - C, [-1.03558], atol=1e-3)


def unequal(more=0.0, **parts):
    """The solution is (1, 1e4), F = 1 there; the first coordinate is nothing beside the second."""
    return Problem(
        lambda x, y: 1 + (y[0] - 1) ** 2 + (y[1] / 1e4 - 1) ** 2,
        lambda x, y: (y[0] - x[0]) ** 2 + ((y[1] - x[1]) / 1e4) ** 2 + more * (y[0] - x[0]) ** 4,
        **parts,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "problem", [unequal(), unequal(0.1), unequal(**PROX)], ids=["linear-quadratic", "small", "prox"]
)
def test_a_small_coordinate_beside_a_large_one_counts(problem):
    start = v(-1, 5e3), v(0, 0)
    assert seen(problem, v(1, 1e4), start=start).result is Result.CONVERGED
    for wrong in (0.0, 3.0):
        assert seen(problem, v(wrong, 1e4), start=start).result is Result.NOT_STATIONARY


@pytest.mark.usefixtures("x64")
def test_a_run_that_took_all_its_steps_is_asked_what_is_left():
    """x hardly moves beside its offset, and F can fall by two thirds."""
    problem = Problem(lambda x, y: (y[0] - 1e6) ** 2 + 1, lambda x, y: (y[0] - x[0]) ** 2)
    start = v(1e6 + 2)
    found = solve(
        problem, start, start, solvers.AID(lower.Newton(), optax.adam(0.01)), steps=20, tol=1e-4, progress=False
    )
    assert found.result is Result.MAX_STEPS and "F falls by 3" in found.reason
    found = solve(
        problem, start, start, solvers.AID(lower.Newton(), optax.sgd(0.4)), steps=60, tol=1e-4, progress=False
    )
    assert found.result is Result.CONVERGED


@pytest.mark.usefixtures("x64")
def test_a_lower_loss_that_is_flat_at_this_x_is_measured_there():
    """A penalty exp(x) that has gone to nothing: a unit of x on which it comes back is no unit of f."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 12, 5)), random.normal(size=(2, 12))
    problem = Problem(
        lambda x, y: jnp.mean((a[0] @ y - b[0]) ** 2),
        lambda x, y: jnp.mean(jnp.cosh(a[1] @ y - b[1]) - 1) + jnp.exp(x) * jnp.sum(y**2),
    )
    x, best, ridge = jnp.array(-12.0), np.zeros(5), 2 * np.exp(-12.0) * np.eye(5)
    for _ in range(20):
        left = a[1] @ best - b[1]
        hessian = a[1].T @ (np.cosh(left)[:, None] * a[1]) / 12 + ridge
        best -= np.linalg.solve(hessian, a[1].T @ np.sinh(left) / 12 + ridge @ best)
    assert seen(problem, x, best + 0.1, start=(jnp.array(0.0), jnp.zeros(5))).result is Result.LOWER_LEVEL


@pytest.mark.usefixtures("x64")
def test_equations_that_follow_from_others_are_left_out():
    same = lambda x: jnp.array([x[0] + x[1] - 1, 2 * x[0] + 2 * x[1] - 2, x[0] + x[1] - 1])
    problem = Problem(
        lambda x, y: jnp.sum(y**2) + x[0],
        lambda x, y: jnp.sum((y - x) ** 2),
        upper_equality=lambda x, y: same(x),
        upper_constraint=lambda x, y: -x[:1],
    )
    found = solve(problem, v(2, 2), v(2, 2), tol=1e-5, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(found.x, [0.25, 0.75], atol=1e-4)


def test_an_equation_without_a_slope_at_the_start_is_kept():
    """z1 z2 = 0 and z1 = z2: at the start (0, 0) the first says nothing, and beside it all."""

    def rows(z):
        nothing = np.zeros(0), np.zeros((0, 2))
        held = np.array([z[0] * z[1], z[0] - z[1]])
        return Rows(np.sum((z - 1) ** 2), 2 * (z - 1), *nothing, held, np.array([[z[1], z[0]], [1.0, -1.0]]))

    wide = np.full(2, np.inf)
    end = attempt(rows, np.zeros(2), -wide, wide, iterations=200)
    assert np.abs(end.point).max() < 1e-3


@pytest.mark.usefixtures("x64")
def test_a_better_point_is_a_lower_solution_in_its_own_units():
    """Two parallel equations; at x = 3 the lower solution is (1.5, 1.5), and (1, 2) has the lower F."""
    problem = Problem(
        lambda x, y: (y[0] - 1) ** 2 + (x[0] - 3) ** 2,
        lambda x, y: jnp.sum(y**2),
        equality=lambda x, y: jnp.array([y[0] + y[1] - x[0], 2 * y[0] + 2 * y[1] - 2 * x[0]]),
    )
    found = seen(problem, v(2.8000006), v(1.399991, 1.4000006), start=(v(0.0), v(0, 0)))
    assert found.result is Result.CONVERGED, found


@pytest.mark.parametrize("steep", [5.0, 15.0, 35.0])
def test_a_steep_coordinate_of_the_lower_level_hides_no_flat_one(steep):
    """e^35 of one coordinate is the unit of f: by that, the others of y would be anywhere."""
    samples = np.random.default_rng(0).normal(size=(40, 3))
    signs = np.sign(samples @ [1.0, -1.0, 0.5] + 0.3)
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2) + jnp.sum((x - v(-3, -3, steep)) ** 2),
        lambda x, y: jax.nn.softplus(-signs * (samples @ y)).mean() + jnp.sum(jnp.exp(x) * y**2) / 2,
    )
    x = v(-3, -3, steep)
    y = lower.Newton().minimum(problem.full_lower(), x, jnp.zeros(3))
    start = (x, v(0.5, -0.5, 0))
    assert seen(problem, x, y * v(0.9, 1, 1), start=start).result is Result.LOWER_LEVEL
    assert seen(problem, x, y, start=start).result not in (Result.LOWER_LEVEL, Result.SEVERAL_MINIMISERS)


def test_a_length_over_which_a_loss_has_no_value_is_no_unit():
    """e^x beside a start far away: the way to it is 1000, and e^1000 is no number."""
    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum(jnp.exp(x) * (y - x) ** 2))
    program = Program(problem, v(1000.0, -1000.0), v(0, 0))
    assert (program.columns[:2] <= 1e3).all()
    assert (Program(problem, v(-300.0, -80.0), v(0, 0)).columns[:2] <= 1e3).all()


def moved_away(problem, by):
    """The same problem with x and y both this far from where they were."""
    back = lambda tree: jax.tree.map(lambda leaf: leaf - by, tree)
    of = lambda fn: None if fn is None else lambda x, y: fn(back(x), back(y))
    onto = lambda project: None if project is None else lambda z: project(z - by) + by
    rows = ("constraint", "equality", "upper_constraint", "upper_equality")
    return Problem(
        of(problem.upper), of(problem.lower),
        project_upper=onto(problem.project_upper), project_lower=onto(problem.project_lower),
        **{name: of(getattr(problem, name)) for name in rows},
    )  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        "concave_between_rows", "unequal_units", "kink_to_pass",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "face_of_a_programme", "tie_at_a_moving_end", "budget", "many_valleys", "demand",
                "upper_row_in_y", "quadratic",
            )
        ),
    ],
)  # fmt: skip
def test_known_problems_far_from_zero_are_solved(name):
    case, c = CASES[name](), 1e4
    found = solve(moved_away(case.problem, c), case.x0 + c, case.y0 + c, steps=5000, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    assert not case.wrong(found.x - c, found.y - c)
