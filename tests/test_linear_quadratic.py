"""The exact end of a linear-quadratic run: closed forms, agreement with the search, units, and what is not one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import bilevel
from bilevel import Problem, Result, solve
from bilevel._traces import degrees
from bilevel.solvers import certificate
from bilevel.solvers.small.program import precise
from bilevel.solvers.small.quadratic import exact_end

ORIGIN = (jnp.zeros(2), jnp.zeros(3))


def random_problem(seed=0, scale=(1.0, 1.0)):
    """F and f of random definite Hessians, with their matrices."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2, 5, 5))
    above, below = (r @ r.T + np.eye(5) for r in root)
    a, b = rng.normal(size=(2, 5))
    factor = np.linalg.cholesky(below).T

    def upper(x, y):
        z = jnp.concatenate([x, y])
        return scale[0] * (0.5 * z @ (above @ z) + a @ z)

    def lower(x, y):
        z = jnp.concatenate([x, y])
        return scale[1] * (0.5 * jnp.sum((factor @ z) ** 2) + jnp.dot(b, z) + jnp.sum(x**2))

    return Problem(upper, lower), above, below, a, b


def solution(above, below, a, b):
    """(x*, y*) by the optimality conditions as one linear system."""
    jacobian = -np.linalg.solve(below[2:, 2:], below[2:, :2])
    offset = -np.linalg.solve(below[2:, 2:], b[2:])
    along = np.concatenate([np.eye(2), jacobian])
    base = np.concatenate([np.zeros(2), offset])
    x = -np.linalg.solve(along.T @ above @ along, along.T @ (above @ base + a))
    return x, jacobian @ x + offset


def test_closed_form():
    problem, *parts = random_problem()
    x, y = solution(*parts)
    with precise():
        found, better = exact_end(problem, jnp.asarray(x), jnp.asarray(y), ORIGIN, 1e-4)
        away, then = exact_end(problem, jnp.asarray(x + 0.1), jnp.asarray(y - 0.2), ORIGIN, 1e-4)
    assert max(found["near"], found["gap"], found["gain"]) < 1e-12 and better is None
    above, below, a, b = parts
    value = lambda z: 0.5 * z @ above @ z + a @ z
    lowest = lambda x: -np.linalg.solve(below[2:, 2:], below[2:, :2] @ x + b[2:])
    answer = lowest(x + 0.1)
    d = y - 0.2 - answer
    np.testing.assert_allclose(away["polished_gap"], 0.5 * d @ below[2:, 2:] @ d, rtol=1e-9)
    at = value(np.concatenate([x + 0.1, answer]))
    np.testing.assert_allclose(away["polished_change"], at - value(np.concatenate([x + 0.1, y - 0.2])), rtol=1e-8)
    np.testing.assert_allclose(away["descent"], at - value(np.concatenate([x, y])), rtol=1e-8)
    np.testing.assert_allclose(np.concatenate(then), np.concatenate([x, y]), rtol=1e-6)


@pytest.mark.parametrize("moved", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (1e-6, 1e-6)])
def test_agrees_with_the_search(moved, monkeypatch):
    """The verdicts of both ways at the solution, at a wrong x, and at a wrong y."""
    problem, *parts = random_problem(1)
    x, y = solution(*parts)
    point = jnp.asarray(x + moved[0], jnp.float32), jnp.asarray(y + moved[1], jnp.float32)
    if moved[0]:  # y follows x
        jacobian = -np.linalg.solve(parts[1][2:, 2:], parts[1][2:, :2])
        point = point[0], point[1] + jnp.asarray(jacobian @ np.full(2, moved[0]), jnp.float32)
    exact = certificate.certify(problem, *point, ORIGIN, Result.CONVERGED, {}, 1e-3)
    monkeypatch.setattr(certificate, "exact_end", lambda *_: None)
    searched = certificate.certify(problem, *point, ORIGIN, Result.CONVERGED, {}, 1e-3)
    wanted = Result.NOT_STATIONARY if moved[0] > 0.1 else Result.LOWER_LEVEL if moved[1] > 0.1 else Result.CONVERGED
    assert exact.result is searched.result is wanted
    for name in ("polished_gap", "polished_change"):
        np.testing.assert_allclose(exact.measures[name], searched.measures[name], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("level", [0, 1])
def test_units_of_the_losses_change_nothing(factor, level):
    problem, *_ = random_problem(2)
    scaled = random_problem(2, (factor, 1.0) if level == 0 else (1.0, factor))[0]
    point = jnp.full(2, 0.3), jnp.full(3, -0.7)
    one, other = (exact_end(p, *point, ORIGIN, 1e-4)[0] for p in (problem, scaled))
    for name in ("near", "gap", "gain"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6)


def test_solve_ends_by_it_and_goes_there(monkeypatch):
    """A run with a tolerance asks no search, and a start that is far away is no excuse."""
    monkeypatch.setattr(certificate, "_of_small", lambda *_: pytest.fail("the search was asked"))
    problem, *parts = random_problem(3)
    found = solve(problem, *ORIGIN, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose(np.concatenate([found.x, found.y]), np.concatenate(solution(*parts)), atol=2e-3)


@pytest.mark.parametrize(
    "upper, lower",
    [
        pytest.param(lambda x, y: jnp.sum(y**2), lambda x, y: -jnp.sum((y - 1) ** 2), id="lower level concave"),
        pytest.param(lambda x, y: jnp.sum(y**2), lambda x, y: (y[0] - x[0]) ** 2, id="several lower minimisers"),
        pytest.param(lambda x, y: -jnp.sum(x**2), lambda x, y: jnp.sum((y - x[0]) ** 2), id="upper level unbounded"),
        pytest.param(lambda x, y: y[0], lambda x, y: jnp.sum((y - x[0]) ** 2), id="linear in x"),
        pytest.param(lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum(jnp.abs(y - x[0])), id="not smooth"),
        pytest.param(lambda x, y: jnp.sum(x**2), lambda x, y: jnp.sum((y - 1) ** 2 * x[0]), id="cubic together"),
        pytest.param(
            lambda x, y: jnp.sum(x**2 + jax.lax.stop_gradient(x)), lambda x, y: jnp.sum((y - 1) ** 2), id="stopped"
        ),
        pytest.param(
            lambda x, y: jnp.sum(jnp.where(x > 0, x, 3 * x) ** 2), lambda x, y: jnp.sum((y - 1) ** 2), id="branches"
        ),
    ],
)
def test_what_is_none_is_left_to_the_search(upper, lower):
    assert exact_end(Problem(upper, lower), *ORIGIN, ORIGIN, 1e-4) is None


def with_rows(seed, n, inequalities, equalities):
    """Definite random losses and random lower rows; the problem as `solve` has it, F, and x -> y*(x) by SLSQP."""
    rng, m = np.random.default_rng(seed), 2 + equalities
    above, below = (r @ r.T + np.eye(n + m) for r in rng.normal(size=(2, n + m, n + m)))
    (a, b), C, c = (
        3 * rng.normal(size=(2, n + m)),
        rng.normal(size=(inequalities, n + m)),
        rng.normal(size=inequalities),
    )
    E, e = rng.normal(size=(equalities, n + m)), rng.normal(size=equalities)
    value = lambda z: 0.5 * z @ (above @ z) + a @ z
    joint = lambda x, y: jnp.concatenate([x, y])
    rows = {"constraint": lambda x, y: C @ joint(x, y) + c - 0.5}
    if equalities:
        rows["equality"] = lambda x, y: E @ joint(x, y) + e
    problem = Problem(
        lambda x, y: value(joint(x, y)),
        lambda x, y: 0.5 * joint(x, y) @ (below @ joint(x, y)) + b @ joint(x, y),
        **rows,
    )
    problem = jax.tree.map(jnp.asarray, problem.captured(jnp.zeros(n), jnp.zeros(m)))

    def answer(x):
        at = lambda y: np.concatenate([x, y])
        kept = [{"type": "ineq", "fun": lambda y: 0.5 - C @ at(y) - c, "jac": lambda y: -C[:, n:]}]
        kept += [{"type": "eq", "fun": lambda y: E @ at(y) + e, "jac": lambda y: E[:, n:]}] if equalities else []
        found = optimize.minimize(
            lambda y: 0.5 * at(y) @ below @ at(y) + b @ at(y), np.zeros(m), jac=lambda y: (below @ at(y) + b)[n:],
            constraints=kept, method="SLSQP", options={"ftol": 1e-12, "maxiter": 200},
        ).x  # fmt: skip
        broken = max((C @ at(found) + c - 0.5).max(initial=0.0), np.abs(E @ at(found) + e).max(initial=0.0))
        return found if broken < 1e-7 else None

    return problem, value, answer


@pytest.mark.parametrize(
    "seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_with_lower_rows_the_best_of_a_grid_is_the_exact_end(seed):
    """h is quadratic in pieces, with jumps where the lower level has no feasible y."""
    problem, value, answer = with_rows(seed, 1, 3, seed % 2)
    grid = np.linspace(-6, 6, 121)
    answers = [answer(np.array([x])) for x in grid]
    h = [np.inf if y is None else value(np.concatenate([[x], y])) for x, y in zip(grid, answers, strict=True)]
    best = int(np.argmin(h))
    point = jnp.asarray(grid[best : best + 1]), jnp.asarray(answers[best])
    found, better = exact_end(problem, *point, jax.tree.map(jnp.zeros_like, point), 1e-4)
    x, y = map(np.asarray, better)
    np.testing.assert_allclose(y, answer(np.asarray(x, float)), atol=1e-4)
    reached = value(np.concatenate([x, y]))
    assert reached <= h[best] + 1e-5 and abs(x[0] - grid[best]) <= 0.11
    np.testing.assert_allclose(max(found["descent"], found["beaten"]), h[best] - reached, atol=1e-4)
    there, beyond = exact_end(problem, *better, jax.tree.map(jnp.zeros_like, point), 1e-4)
    assert max(there["near"], there["far"], there["gap"]) < 1e-4
    assert beyond is None or np.abs(np.asarray(beyond[0]) - x).max() < 1e-4


@pytest.mark.parametrize("seed", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_with_lower_rows_the_verdicts_are_the_searchs(seed, monkeypatch):
    """At the solution, at local ones, beside them, far from them, and with a wrong y."""
    n, equalities = 1 + seed % 2, seed // 2 % 2
    problem, value, answer = with_rows(seed, n, 1 + seed % 4, equalities)
    start, rng = (jnp.zeros(n), jnp.zeros(2 + equalities)), np.random.default_rng(seed)
    feasible = next(x for x in 2 * rng.normal(size=(50, n)) if answer(x) is not None)
    best = exact_end(problem, jnp.asarray(feasible), jnp.asarray(answer(feasible)), start, 1e-4)[1]
    x = np.asarray(best[0], float)

    def h(x):
        y = answer(x)
        return 1e6 if y is None else value(np.concatenate([x, y]))

    others = [x, x + 0.3 * rng.normal(size=n), x + 2 * rng.normal(size=n)]
    others.append(optimize.minimize(h, x + 2 * rng.normal(size=n), method="Nelder-Mead", options={"xatol": 1e-7}).x)
    points = [(z, y) for z in others if (y := answer(z)) is not None] + [(x, answer(x) + 0.2)]
    points = [tuple(jnp.asarray(part, jnp.float32) for part in point) for point in points]
    look = lambda: [certificate.certify(problem, *point, start, Result.CONVERGED, {}, 1e-3).result for point in points]
    exact = look()
    monkeypatch.setattr(certificate, "exact_end", lambda *_: None)
    assert exact == look()
    assert exact[0] is Result.CONVERGED and exact[-1] in (Result.LOWER_LEVEL, Result.INFEASIBLE)


def test_a_row_that_y_does_not_reach_bounds_x():
    """min (x - 2)^2 + y^2, y = x, and the lower level has no y where x > 1/2."""
    problem = Problem(
        lambda x, y: jnp.sum((x - 2) ** 2) + jnp.sum(y**2),
        lambda x, y: jnp.sum((y - x) ** 2),
        constraint=lambda x, y: x - 0.5,
    )
    point = jnp.array([0.5]), jnp.array([0.5])
    found, better = exact_end(problem, *point, (jnp.zeros(1), jnp.zeros(1)), 1e-4)
    assert max(found["near"], found["far"], found["gap"], found["gain"]) < 1e-6 and better is None
    found, better = exact_end(problem, jnp.array([0.2]), jnp.array([0.2]), (jnp.zeros(1), jnp.zeros(1)), 1e-4)
    np.testing.assert_allclose(better[0], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found["descent"], 1.8**2 + 0.2**2 - 1.5**2 - 0.5**2, rtol=1e-5)


@pytest.mark.parametrize("x, ends", [(0.3, (7.189, 8.789)), (1.0, (1.6, 0.0)), (1.5, (1.225, 0.0)), (5.0, (0.0, 0.0))])
def test_an_equality_as_two_opposite_rows(x, ends):
    """y_0 = y_1 = min(x, 1), h(x) = 2 (y - 3)^2 + (x - 5)^2 / 10: two quadratics, a kink at 1, and the minimum at 5."""
    problem = Problem(
        lambda x, y: jnp.sum((y - 3) ** 2) + 0.1 * jnp.sum((x - 5) ** 2),
        lambda x, y: jnp.sum((y - x[0]) ** 2),
        constraint=lambda x, y: jnp.stack([y[0] - y[1], y[1] - y[0], y[0] - 1.0]),
    )
    found, better = exact_end(problem, jnp.array([x]), jnp.full(2, min(x, 1.0)), (jnp.zeros(1), jnp.zeros(2)), 1e-4)
    np.testing.assert_allclose((found["descent"], found["beaten"]), ends, atol=1e-5)
    assert (found["near"] < 1e-6) == (x == 5.0) and found["gap"] < 1e-9
    assert (better is None) == (x == 5.0)


def test_an_end_without_a_tolerance_has_its_penalty_looked_at():
    """y is off by the penalty's bias; x and the choice of y are not judged."""
    problem, *_ = random_problem(4)
    point = jnp.full(2, 0.3), jnp.full(3, -0.7)
    exact = exact_end(problem, *point, ORIGIN, 1e-4)[0]
    seen = certificate.certify(problem, *point, ORIGIN, Result.COMPLETED, {"penalty": 10.0}, None)
    assert seen.result is Result.COMPLETED and seen.better is None
    assert seen.measures["polished_gap"] == exact["polished_gap"] and "descent" not in seen.measures
    assert "An independent solve of the lower level reaches" in seen.why
    plain = certificate.certify(problem, *point, ORIGIN, Result.COMPLETED, {}, None)
    assert plain.why == "" and "polished_gap" not in plain.measures


def test_sets_and_many_rows_are_left_to_the_search():
    problem = random_problem()[0]
    box = bilevel.sets.Box(-1.0, 1.0)
    many, bent = lambda x, y: jnp.concatenate([x, y]), lambda x, y: jnp.sum(y**2) - 9
    for given in ({"project_upper": box}, {"project_lower": box}, {"constraint": many}, {"equality": bent}):
        assert exact_end(Problem(problem.upper, problem.lower, **given), *ORIGIN, ORIGIN, 1e-4) is None


@pytest.mark.parametrize(
    "fn, degree",
    [
        (lambda x: jnp.sum(x), 1),
        (lambda x: jnp.dot(x, x) + 3.0, 2),
        (lambda x: jnp.sum(x[1:] * x[:-1]) / 2, 2),
        (lambda x: jnp.sum(jnp.outer(x, x) @ x), 3),
        (lambda x: jnp.sum(jnp.arange(3.0) ** 5 * x), 1),
        (lambda x: jax.jit(jnp.square)(x)[0], 2),
        (lambda x: jnp.sum(jnp.stack([x[0] * x[1], x[2]])), 2),
        (lambda x: jnp.sum(jnp.tile(jnp.concatenate([x, x]), 2)), 1),
        (lambda x: jnp.sum(x**0), 0),
        (lambda x: jnp.sum(1 / x), np.inf),
        (lambda x: jnp.sum(jnp.sin(x)) ** 0 * 2, 0),
        (lambda x: jnp.sum(x.astype(int)), np.inf),
        (lambda x: x[jnp.argmax(x)], np.inf),
        (lambda x: jnp.sum(jnp.sin(2.0) * x), 1),
        (lambda x: jax.lax.scan(lambda c, v: (c + v, None), 0.0, x)[0], np.inf),
    ],
)
def test_degrees(fn, degree):
    assert degrees(jax.make_jaxpr(fn)(jnp.ones(3)).jaxpr, [1.0]) == [degree]
