"""The verdict of the front door over problems with known solutions: never CONVERGED where it is wrong, in any units."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_problems import CASES, Case

from bilevel import Problem, Solution, sets, solve, solvers
from bilevel.lower import Newton
from bilevel.result import Result
from bilevel.solvers import certificate
from bilevel.solvers.certificate import certify

# In the quick lane; all of them are slow together.
QUICK = (
    "free_coordinate", "two_wells", "concave_lower", "empty_lower_set", "kink_to_pass", "start_outside",
    "upper_row_in_y", "two_roads", "simple_line", "tie_at_a_moving_end", "free_at_one_x", "empty_upper_set",
    "saddle_of_the_upper_level", "hole_far_away", "bounds_on_the_safe_side", "falls_to_an_asymptote", "logarithm_down",
    "kink_at_the_start",
)  # fmt: skip

everywhere = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


def solved(case: Case) -> Solution:
    return solve(case.problem, case.x0, case.y0, steps=5000, tol=1e-4, progress=False)


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["quick", "all"])
def test_the_known_solutions_pass_their_own_check_and_other_points_do_not(x64, names):
    for name in names:
        case = CASES[name]()
        if case.solution is None:
            continue
        x, y = (None if part is None else jnp.asarray(part, float) for part in case.solution)
        assert case.wrong(x, y) == "", name
        assert case.wrong(x, y + 0.5) != "", name
        moved = case.scaled(upper=1e3, lower=1e-2, x=10.0, y=0.1)
        assert moved.wrong(None if x is None else 10 * x, y / 10) == "", name
    assert len(CASES) >= 40
    assert len({make().kind for make in CASES.values()}) >= 14


@pytest.mark.parametrize("name", everywhere)
def test_converged_is_never_said_where_it_is_wrong(x64, name):
    case = CASES[name]()
    found = solved(case)
    wrong = case.wrong(found.x, found.y)
    if found.result.name == "CONVERGED":
        assert not wrong, wrong
    else:
        assert found.reason  # a word and a sentence
    if case.value is None:
        assert found.result.name in case.words, found


@pytest.mark.slow
def test_nearly_all_are_solved(x64):
    cases = [(name, make()) for name, make in CASES.items()]
    cases = [(name, case) for name, case in cases if case.value is not None]
    missed = []
    for name, case in cases:
        found = solved(case)
        if case.wrong(found.x, found.y) or found.result.name != "CONVERGED":
            missed.append(f"{name}: {found.result.name}, {case.wrong(found.x, found.y) or 'right'}")
    assert len(missed) <= len(cases) * 5 // 41, missed


SCALES = {"upper": (1e-8, 1e8), "lower": (1e-8, 1e8), "x": (1e-8, 1e8), "y": (1e-8, 1e8)}
SCALED = (
    "shrinkage", "free_and_coupled", "kink_to_pass", "concave_lower", "capacity", "upper_row_in_y",
    "falls_to_an_asymptote", "curve_of_minimisers", "edge_of_a_simplex",
)  # fmt: skip
quick_scales = {("kink_to_pass", "upper", 1e8), ("capacity", "y", 1e-8)}


@pytest.mark.parametrize(
    ("name", "what", "by"),
    [
        pytest.param(name, what, by, marks=() if (name, what, by) in quick_scales else pytest.mark.slow)
        for name in SCALED
        for what, factors in SCALES.items()
        for by in factors
    ],
)
def test_units_change_no_verdict(x64, name, what, by):
    case = CASES[name]()
    moved = case.scaled(**{what: by})
    here, there = solved(case), solved(moved)
    assert here.result is there.result, there
    assert bool(case.wrong(here.x, here.y)) == bool(moved.wrong(there.x, there.y)), there


@pytest.mark.parametrize(
    "start", [0.2, pytest.param(4.0, marks=pytest.mark.slow)], ids=["from the flat part", "from the other side"]
)
def test_a_nonsmooth_term_leaves_no_local_solution_unsaid(x64, start):
    """y = soft(x, 1), F = (y - 2)^2 + x^2/10: x = 30/11, F = 9/11; x = 0 is a local solution with F = 4."""
    soft = lambda y, s: jnp.sign(y) * jnp.maximum(jnp.abs(y) - s, 0)
    problem = Problem(
        lambda x, y: (y[0] - 2) ** 2 + x[0] ** 2 / 10,
        lambda x, y: (y[0] - x[0]) ** 2 / 2,
        prox_lower=lambda x, y, s: soft(y, s),
    )
    found = solve(problem, jnp.array([start]), jnp.zeros(1), steps=5000, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(found.x, 30 / 11, rtol=1e-2)


@pytest.mark.parametrize("start", [1.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_a_small_piece_of_a_linear_problem_is_no_hiding_place(x64, start):
    """F = -8 x0 - 4 x1 - 40 y0 over x0 + 2 x1 <= 2.2 + y1; y = (2 (x1 - 1), 0) for x0 <= 1/2 - 2 (x1 - 1), x1 >= 1.

    On that piece, a triangle of x in boxes up to 10, lies x = (0, 1.1) with F = -12.4. Elsewhere the best is
    x = (.75, 1.225), y = (0, 1) with -10.9, to which starts in the boxes go.
    """
    rows = lambda x, y: jnp.stack([y[0] + y[1] - 1, 4 * x[0] - 2 + 4 * y[0] - y[1], 4 * x[1] - 4 - 2 * y[0] - y[1]])
    problem = Problem(
        lambda x, y: -8 * x[0] - 4 * x[1] - 40 * y[0],
        lambda x, y: y[0] + 2 * y[1],
        project_upper=sets.Box(0.0, 10.0),
        project_lower=sets.Box(0.0, 10.0),
        constraint=rows,
        upper_constraint=lambda x, y: x[0] + 2 * x[1] - 2.2 - y[1],
    )
    at = jnp.full(2, start)
    found = solve(problem, at, at, steps=5000, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(found.x, [0.0, 1.1], atol=1e-3)
    np.testing.assert_allclose(found.y, [0.2, 0.0], atol=1e-3)


@pytest.mark.parametrize("n, m", [(3, 2), pytest.param(6, 3, marks=pytest.mark.slow)])
def test_a_badly_conditioned_lower_level_does_not_hide_that_x_can_be_better(x64, n, m):
    """y = A^-1 B x within a box that holds it, A of condition 1e6: min |y - t|^2 / 2 + |x|^2 / 20 from x = 0.

    As far as x moves y by its unit is by A's smallest eigenvalue; measured by its largest one, F was flat at the start.
    """
    random = np.random.default_rng(0)
    basis, sides = np.linalg.qr(random.normal(size=(n, n)))[0], random.normal(size=(n, m))
    hessian, target = basis @ np.diag(np.geomspace(1, 1e6, n)) @ basis.T, 0.3 * random.normal(size=n)
    answer = np.linalg.solve(hessian, sides)
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum((y - target) ** 2) + 0.05 * jnp.sum(x**2),
        lambda x, y: 0.5 * y @ jnp.asarray(hessian) @ y - y @ (jnp.asarray(sides) @ x),
        project_lower=sets.Box(-1.0, 1.0),
    )
    found = solve(problem, jnp.zeros(m), jnp.zeros(n), steps=2000, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    right = np.linalg.solve(answer.T @ answer + 0.1 * np.eye(m), answer.T @ target)
    np.testing.assert_allclose(found.x, right, atol=1e-4)


@pytest.mark.parametrize("turned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_x_does_is_measured_by_the_lower_solution(turned):
    """f of condition 1e6 with the solution y = x, or turned y = (x0 + x1, x0 - x1) / 2: no coordinate of x does less.

    F = |y - (1, 2)|^2 is zero at the solution. By f's slopes one coordinate of x did a millionth of the other.
    """
    turn = jnp.array([[1.0, 1.0], [1.0, -1.0]]) if turned else jnp.eye(2)
    problem = Problem(
        lambda x, y: jnp.sum((y - jnp.array([1.0, 2.0])) ** 2),
        lambda x, y: jnp.sum(jnp.array([1e3, 1e-3]) * (turn @ y - x) ** 2),
        project_lower=sets.Box(-9.0, 9.0),
    )
    found = solve(problem, jnp.zeros(2), jnp.zeros(2), steps=3000, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(found.x, turn @ jnp.array([1.0, 2.0]), atol=1e-2)


@pytest.mark.parametrize(
    "solver, bound",
    [
        *((solver, bound) for solver in (None, solvers.MPCC()) for bound in (False, True)),
        (solvers.AID(Newton()), False),
        pytest.param(solvers.AID(Newton()), True, marks=pytest.mark.slow),
    ],
    ids=[f"{name}-{where}" for name in ("none", "MPCC", "AID") for where in ("free", "in a box")],
)
def test_a_coordinate_of_x_beside_a_steep_one_is_not_left_where_it_was(solver, bound):
    """F = 1e6 (y0 - 1)^2 + (y1 - 1)^2 with y = x: in F's unit, 1e6, nothing is seen of x1."""
    more = {"project_lower": sets.Box(-5.0, 5.0)} if bound else {}
    problem = Problem(
        lambda x, y: jnp.sum(jnp.array([1e6, 1.0]) * (y - 1) ** 2), lambda x, y: jnp.sum((y - x) ** 2), **more
    )
    found = solve(problem, jnp.zeros(2), jnp.zeros(2), solver, steps=3000, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(found.x, 1.0, atol=2e-2)


@pytest.mark.parametrize("kind", ["free", pytest.param("in a box", marks=pytest.mark.slow), "with a row", "prox"])
def test_what_f_can_fall_by_counts_as_a_part_of_f(kind):
    """F = 4e-3 (y0 + 1.7)^2 + 1e-3 (y1 - 3.3)^2 + 7.4 x1^2, y = (x0, x1) / 15: F falls from .022 to .011 on the way
    from 0 to (-25.5, 0), and where it is moved anyhow it changes by thousands."""
    scale = jnp.array([4e-3, 1e-3])
    upper = lambda x, y: jnp.sum(scale * (y - jnp.array([-1.7, 3.3])) ** 2) + 7.4 * jnp.sum(x[1] ** 2)
    lower = lambda x, y: jnp.sum(jnp.array([276.0, 10.6]) * (y - x[:2] / 15) ** 2)
    more = {
        "free": {},
        "in a box": {"project_lower": sets.Box(-99.0, 99.0)},
        "with a row": {"constraint": lambda x, y: jnp.sum(y**2) - 1e4},
        "prox": {"prox_lower": lambda x, y, step: y},
    }[kind]
    problem = Problem(upper, lower, **more)
    x = jnp.zeros(2), jnp.array([-25.5, 0.0033])
    y = [at[:2] / 15 for at in x]
    assert upper(x[0], y[0]) > 1.9 * upper(x[1], y[1])
    start = jnp.ones(2), jnp.ones(2)
    there = certify(problem, x[0], y[0], start, Result.CONVERGED, {}, 1e-4)
    assert there.result in (Result.NOT_STATIONARY, Result.LOCAL) and upper(*there.better) < 0.6 * upper(x[0], y[0])
    assert certify(problem, x[1], y[1], start, Result.CONVERGED, {}, 1e-4).result is Result.CONVERGED


@pytest.mark.parametrize("kind", ["free", "in a box", pytest.param("prox", marks=pytest.mark.slow)])
def test_a_run_that_begins_at_its_solution_ends_there(kind):
    """F = |y - 1|^2 with y = x is 3e-10 at x = 1 + 1e-5, and all of it could fall: x is not felt to move."""
    more = {
        "free": {},
        "in a box": {"project_lower": sets.Box(-9.0, 9.0)},
        "prox": {"prox_lower": lambda x, y, step: y},
    }[kind]
    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum((y - x) ** 2), **more)
    at = jnp.full(3, 1 + 1e-5)
    assert certify(problem, at, at, (at, at), Result.CONVERGED, {}, 1e-4).result is Result.CONVERGED


@pytest.mark.parametrize("n, condition", [(10, 1e4), pytest.param(40, 1e3, marks=pytest.mark.slow)])
def test_flat_directions_of_many_unknowns_are_seen_by_newtons_step(n, condition):
    """h(x) = (x - t) H (x - t) / 2 with a turned H: at t + the flattest direction h is below 1e-3 of what it was."""
    random = np.random.default_rng(0)
    basis, sides = np.linalg.qr(random.normal(size=(n, n)))[0], random.normal(size=(400, n)) / n**0.5
    hessian, target = basis @ np.diag(np.geomspace(1, 1 / condition, n)) @ basis.T, random.normal(size=n)
    back, sides, hessian, target = map(jnp.asarray, (np.linalg.pinv(sides), sides, hessian, target))
    problem = Problem(
        lambda x, y: 0.5 * (back @ y - target) @ hessian @ (back @ y - target),
        lambda x, y: 0.5 * jnp.sum((y - sides @ x) ** 2),
        prox_lower=lambda x, y, step: y,
    )
    start = jnp.zeros(n), jnp.zeros(400)
    flat = target + n**0.5 * jnp.asarray(basis[:, -1])
    found = certify(problem, flat, sides @ flat, start, Result.CONVERGED, {}, 1e-4)
    assert found.result is Result.NOT_STATIONARY
    near = target + 1e-3 * jnp.asarray(random.normal(size=n))
    assert certify(problem, near, sides @ near, start, Result.CONVERGED, {}, 1e-4).result is Result.CONVERGED


def test_float32_says_converged_only_where_it_is_right():
    assert not jax.config.jax_enable_x64
    case = CASES["capacity"]()
    found = solved(case)
    assert np.asarray(found.y).dtype == np.float32
    assert found.result.name != "CONVERGED" or not case.wrong(found.x, found.y)


@pytest.mark.parametrize("start", [0.1, 0.9], ids=["from inside", "from outside"])
def test_an_end_at_the_edge_of_a_domain_is_rounded_into_it(start):
    """F = (1/3 - x)^1.5 - y with y = x <= 1/3: x = 1/3, which is more than a third in single precision, no number."""
    assert not jax.config.jax_enable_x64
    assert float(np.float32(1 / 3)) > 1 / 3
    problem = Problem(
        lambda x, y: (1 / 3 - x[0]) ** 1.5 - y[0],
        lambda x, y: (y[0] - x[0]) ** 2,
        upper_constraint=lambda x, y: x[0] - 1 / 3,
    )
    found = solve(problem, jnp.array([start]), jnp.zeros(1), steps=5000, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED, found
    np.testing.assert_allclose(found.x, 1 / 3, rtol=1e-4)


SADDLES = {
    # F = |y - 1|^2 but for one coordinate, where it is t^4 - 4t^2 from t = y - 1 = 0; y = x.
    "of F": (lambda x, y: jnp.sum((y[1:] - 1) ** 2) - 4 * (y[0] - 1) ** 2 + (y[0] - 1) ** 4, lambda x: x),
    # The direction down is no coordinate: a^2 + b^2 + 4ab + a^4.
    "of two coordinates": (
        lambda x, y: jnp.sum((y - 1) ** 2) + 4 * (y[0] - 1) * (y[1] - 1) + (y[0] - 1) ** 4,
        lambda x: x,
    ),
    # F is linear in y0 = 1 + t^4/4 - t^2 with t = x0 - 1, and only the lower level bends.
    "of the lower level": (
        lambda x, y: jnp.sum((y[1:] - 1) ** 2) + y[0],
        lambda x: x.at[0].set(1 + (x[0] - 1) ** 4 / 4 - (x[0] - 1) ** 2),
    ),
    "and none": (lambda x, y: jnp.sum((y - 1) ** 2) + (y[0] - 1) ** 4, lambda x: x),
}
quick_saddles = {
    ("of two coordinates", 200, "y in a box"), ("of the lower level", 110, ""), ("and none", 60, "y in a box"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "n", "where"),
    [
        pytest.param(name, n, where, marks=() if (name, n, where) in quick_saddles else pytest.mark.slow)
        for name in SADDLES
        for n in (20, 60, 110, 200)
        for where in ("", "x in a box", "y in a box")
    ],
)
def test_a_saddle_point_of_many_unknowns_is_no_solution(x64, name, n, where):
    """x = 1 is stationary; one direction of n leads down, and random ones do not see it."""
    upper, answer = SADDLES[name]
    sets_ = {"x in a box": {"project_upper": sets.Box(-3, 3)}, "y in a box": {"project_lower": sets.Box(-3, 3)}}
    problem = Problem(upper, lambda x, y: jnp.sum((y - answer(x)) ** 2), **sets_.get(where, {}))
    at = jnp.ones(n)
    found = certify(problem, at, at, (at + 1, at + 1), Result.CONVERGED, {}, 1e-4)
    assert (found.result is Result.CONVERGED) is (name == "and none"), found
    if name != "and none":
        assert found.result in (Result.NOT_STATIONARY, Result.LOCAL)
        assert problem.upper(*found.better) < problem.upper(at, at) - 1e-3


def soft(x, y, step):
    return jnp.sign(y) * jnp.maximum(jnp.abs(y) - step, 0)


# Losses, what to set besides, and with "right" the solution x = c, y = d of all coordinates, with "wrong" another end.
SLOPES = {
    # y = soft(x, 1): 8 a coordinate at x = 2, 9 at x = 0, with a term of which only the prox is known.
    "a nonsmooth term": (
        lambda x, y: jnp.sum((y - 3) ** 2 + x**2),
        lambda x, y: jnp.sum((y - x) ** 2) / 2,
        {"prox_lower": soft},
        {"right": (2.0, 1.0), "wrong": (2.4, 1.4)},
    ),
    # Any y in [x - 1, x + 1]: F is best at x = 3/2, and from elsewhere no y that stays a minimiser sees that.
    "a flat floor": (
        lambda x, y: jnp.sum((x - 3) ** 2 + (y + 1) ** 2),
        lambda x, y: jnp.sum(jnp.maximum(jnp.abs(y - x) - 1, 0.0) ** 2),
        {},
        {"right": (1.5, 0.5), "wrong": (1.575, 0.575)},
    ),
    # f_yy is no number at y = x.
    "no curvature": (
        lambda x, y: jnp.sum((y - 1) ** 2 + x**2 / 10),
        lambda x, y: jnp.sum(jnp.abs(y - x) ** 1.5),
        {},
        {"right": (10 / 11, 10 / 11), "wrong": (0.8, 0.8)},
    ),
}
quick_slopes = {("a nonsmooth term", 200, "wrong")}


@pytest.mark.parametrize(
    ("name", "n", "which"),
    [
        pytest.param(name, n, which, marks=() if (name, n, which) in quick_slopes else pytest.mark.slow)
        for name in SLOPES
        for n in (20, 200, 400)
        for which in ("right", "wrong")
    ],
)
def test_many_unknowns_are_moved_along_a_slope_whatever_the_lower_level_is(x64, name, n, which):
    """Random directions see nothing of it: an end at which nothing else was tried is none that anything is known of."""
    upper, lower, more, at = SLOPES[name]
    x, y = (jnp.full(n, value) for value in at[which])
    found = certify(Problem(upper, lower, **more), x, y, (x + 1, y + 1), Result.CONVERGED, {}, 1e-4)
    assert (found.result is Result.CONVERGED) is (which == "right"), found
    if which == "wrong":
        assert found.result is Result.NOT_STATIONARY


@pytest.mark.parametrize(
    "n, value",
    [(400, 0.8), *(pytest.param(*at, marks=pytest.mark.slow) for at in ((200, 0.8), (200, 10 / 11), (400, 10 / 11)))],
)
def test_a_kink_at_which_no_slope_is_a_number_is_not_passed_over(n, value):
    """f = |y - x| in the 2-norm has no derivative at y = x: x = 10/11 is the solution, and 4/5 is none."""
    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2 + x**2 / 10), lambda x, y: jnp.linalg.norm(y - x))
    at = jnp.full(n, value)
    found = certify(problem, at, at, (at + 1, at + 1), Result.CONVERGED, {}, 1e-4)
    assert found.result in (Result.NOT_STATIONARY, Result.UNRESOLVED), found
    if found.result is Result.UNRESOLVED:
        assert "is not a number here" in found.why
        assert "z + 1e-12 in place of z" in found.why
    if n == 400:  # of so many one random direction is tried, which says nothing
        assert found.result is Result.UNRESOLVED


KINKS = {
    "an absolute value": lambda x, y: jnp.abs(y[0] - x[0]),
    "a maximum": lambda x, y: jnp.max(jnp.stack([y[0] - x[0], x[0] - y[0], (y[0] - x[0]) / 2])),
}


@pytest.mark.parametrize("name", [pytest.param("an absolute value", marks=pytest.mark.slow), "a maximum"])
def test_a_kink_of_the_lower_loss_is_named_with_its_cure(x64, name):
    """y = x on the kink: x = 10/11. Derivatives of f say nothing there, and the search does not go on for long."""
    problem = Problem(lambda x, y: (y[0] - 1) ** 2 + x[0] ** 2 / 10, KINKS[name])
    found = solve(problem, jnp.array([0.3]), jnp.zeros(1), steps=5000, tol=1e-4, progress=False)
    assert found.result is not Result.CONVERGED or abs(found.x[0] - 10 / 11) < 1e-2
    assert "The lower loss has a kink at its minimiser" in found.reason
    assert "constraint=" in found.reason
    assert found.steps < solvers.MPCC().starts
    smooth = Problem(problem.upper, lambda x, y: jnp.abs(y[0] - x[0]) ** 1.5)
    at = jnp.full(1, 0.5)
    assert "kink at its minimiser" not in certify(smooth, at, at, (at + 1, at + 1), Result.CONVERGED, {}, 1e-4).why


@pytest.mark.parametrize("x0", [-0.2, pytest.param(-1.8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", [solvers.MPCC(), pytest.param(None, marks=pytest.mark.slow)], ids=["MPCC", "none"])
def test_what_lies_beyond_a_kink_is_not_passed_over(x0, solver):
    """f is smooth around its minimiser at x = -2, a local solution with F = 16; the global one, F = .479 at x = 1.065,
    is on the kink, where the lower level's conditions say nothing. Either is said to be what it is."""
    problem = Problem(
        lambda x, y: (y + 1.8) ** 2 + 0.05 * (x + 2) ** 2,
        lambda x, y: jnp.abs(y + 1.6 * x) + 0.25 * (y - 0.2) ** 2,
        project_upper=sets.Box(-2.0, 2.0),
    )
    found = solve(problem, jnp.asarray(x0), jnp.asarray(0.5), solver, steps=3000, tol=1e-4, progress=False)
    assert found.result is not Result.CONVERGED or abs(found.x - 1.065) < 1e-2
    assert "further away" in found.reason or "when x is moved a little" in found.reason


def test_the_cure_of_a_kink_works(x64):
    """The same with the kink as rows, t >= y - x and t >= x - y, f = t."""
    problem = Problem(
        lambda x, y: (y[0] - 1) ** 2 + x[0] ** 2 / 10,
        lambda x, y: y[1],
        constraint=lambda x, y: jnp.stack([y[0] - x[0] - y[1], x[0] - y[0] - y[1]]),
    )
    found = solve(problem, jnp.array([0.3]), jnp.zeros(2), steps=5000, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(found.x, 10 / 11, rtol=1e-3)


def test_a_loss_that_is_flat_in_pieces_is_looked_at_far_away(x64):
    """y = floor(x), F = (y - 2)^2 + x^2/100: from x = 0 no derivative leads to x = 2."""
    case = CASES["steps_of_a_floor"]()
    found = certify(case.problem, jnp.zeros(1), jnp.zeros(1), (case.x0, case.y0), Result.CONVERGED, {}, 1e-4)
    assert found.result is Result.LOCAL
    assert case.problem.upper(*found.better) < 2


@pytest.mark.parametrize("x, result", [(0.0, Result.NOT_STATIONARY), (10 / 11, Result.CONVERGED)])
def test_a_run_with_steps_left_gets_the_same_verdict_from_fewer_solves(x, result, monkeypatch):
    """min |y - 1|^2 + .1 |x|^2 with y = x: x = 10 / 11. What is not there yet is seen from the first few solves."""
    problem = Problem(lambda x, y: jnp.mean((y - 1) ** 2) + 0.1 * jnp.mean(x**2), lambda x, y: jnp.mean((y - x) ** 2))
    at, solves = jnp.full(400, x), []
    reach = certificate._Search._reach
    monkeypatch.setattr(
        certificate._Search, "_reach", lambda self, us, *more: (solves.append(len(us)), reach(self, us, *more))[1]
    )
    ends, counts = [], []
    for left in (True, False):
        solves.clear()
        ends.append(certify(problem, at, at, (at + 1, at + 1), Result.CONVERGED, {}, 1e-3, left))
        counts.append(sum(solves))
    assert [end.result for end in ends] == [result, result]
    assert ends[0].unsettled is (result is Result.NOT_STATIONARY)
    assert counts[0] < counts[1] if result is Result.NOT_STATIONARY else counts[0] > counts[1]


@pytest.mark.parametrize("rows", ["constraint", "upper_constraint"])
def test_a_row_whose_slope_vanishes_where_it_is_met_is_named_with_its_cure(rows):
    """z^2 <= 0 holds at z = 0 alone, and has no multiplier there."""
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2) + 0.1 * jnp.sum(x**2),
        lambda x, y: jnp.sum((y - x) ** 2),
        **{rows: (lambda x, y: y**2) if rows == "constraint" else (lambda x, y: x**2)},
    )
    found = solve(problem, jnp.full(1, 0.5), jnp.full(1, 0.5), steps=2000, tol=1e-4, progress=False)
    assert found.result is Result.INFEASIBLE
    assert "its slope vanishes where it is met, as that of z^2 <= 0 does, and it has no multiplier" in found.reason
    empty = Problem(problem.upper, problem.lower, **{rows: lambda x, y: jnp.concatenate([x, 1 - x, y, 1 - y])})
    other = solve(empty, jnp.full(1, 0.5), jnp.full(1, 0.5), steps=2000, tol=1e-4, progress=False)
    assert other.result is Result.INFEASIBLE
    assert "slope vanishes" not in other.reason
