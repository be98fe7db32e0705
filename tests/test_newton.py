"""Newton's method for lower levels, against closed forms."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, ProblemError, Result, lower, solve, solvers
from bilevel.hypergradients import Unrolled, value_and_hypergradient

A = jnp.asarray
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Interval:
    """A box as `lower.Newton` asks for it: a projection with `bounds`."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __call__(self, y):
        return jax.tree.map(lambda y: jnp.clip(y, self.low, self.high), y)

    def bounds(self, y):
        return jax.tree.map(lambda _: A(self.low), y), jax.tree.map(lambda _: A(self.high), y)


def minimum(f, y, x=0.0, project=None, **options):
    """The lower solution of f(x, .) from y."""
    level = Problem(lambda x, y: 0.0, f, project_lower=project).full_lower()
    solver = lower.Newton(**options)
    y = jax.tree.map(A, y, is_leaf=lambda node: isinstance(node, list))
    return jax.jit(lambda x, y: solver(level, x, solver.init(y)).y)(A(x), y)


def hessian(condition, d=6, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    return (q * np.geomspace(1 / condition, 1, d)) @ q.T


@pytest.mark.parametrize("condition", [1e6, 1e9])
def test_an_ill_conditioned_lower_level_is_solved_exactly_through_the_front_door(condition, x64):
    h, a = hessian(condition), np.random.default_rng(1).normal(size=6)
    problem = Problem(
        lambda x, y: jnp.sum((y - a) ** 2) / 2 + jnp.sum(x**2) / 2, lambda x, y: (y - x) @ h @ (y - x) / 2
    )
    solution = solve(problem, jnp.zeros(6), jnp.ones(6), solvers.AID(lower_solver=lower.Newton()), tol=1e-4, steps=50)
    np.testing.assert_allclose(solution.x, a / 2, rtol=1e-5)
    assert solution.result is Result.CONVERGED and solution.steps < 10


def penalised(x, y, samples, signs):
    """A logistic loss with a penalty e^x per unknown."""
    return jax.nn.softplus(-signs * (samples @ y)).mean() + jnp.sum(jnp.exp(x) * y**2) / 2


def logistic_data(d=3):
    samples = np.random.default_rng(0).normal(size=(40, d)).astype(np.float32)
    return samples, np.sign(samples @ np.linspace(1, -1, d, dtype=np.float32) + 0.3)


@pytest.mark.parametrize("steep", [8.0, 16.0, 30.0])
@pytest.mark.parametrize("box", [None, Interval(-5.0, 5.0)])
def test_a_steep_unknown_hides_no_flat_one_in_float32(steep, box):
    """One penalty of e^16 beside two of e^-3: in one unit for all, the flat curvatures are below f_yy's rounding."""
    samples, signs = logistic_data()
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: penalised(x, y, samples, signs), project_lower=box
    )
    x = A([-3.0, -3.0, steep])
    found = value_and_hypergradient(problem, None, lower.Newton())(x, jnp.zeros(3))
    # Without the steep unknown, which stands at zero, the same numbers.
    two = Problem(lambda x, y: 1 + jnp.sum((y - 1) ** 2), lambda x, y: penalised(x, y, samples[:, :2], signs))
    expected = value_and_hypergradient(two, None, lower.Newton())(x[:2], jnp.zeros(2))
    np.testing.assert_allclose(found.value, expected.value, rtol=3e-3)
    np.testing.assert_allclose(found.gradient[:2], expected.gradient, rtol=3e-3)
    assert found.metrics["lower_residual"] < 1e-5 and found.metrics["linear_error"] < 1e-4
    through = value_and_hypergradient(problem, Unrolled(), lower.Newton())(x, jnp.zeros(3))
    np.testing.assert_allclose(through.gradient, found.gradient, rtol=1e-4, atol=1e-6)


def test_steep_and_flat_unknowns_beyond_the_size_that_robust_takes_as_a_matrix():
    samples, signs = logistic_data(60)
    x = A(np.where(np.arange(60) % 3 == 0, 14.0, -2.0))
    kept = np.flatnonzero(x < 0)
    fns = (lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: penalised(x, y, samples, signs))
    found = value_and_hypergradient(Problem(*fns), None, lower.Newton())(x, jnp.zeros(60))
    few = Problem(fns[0], lambda x, y: penalised(x, y, samples[:, kept], signs))
    expected = value_and_hypergradient(few, None, lower.Newton())(x[kept], jnp.zeros(len(kept)))
    np.testing.assert_allclose(found.gradient[kept], expected.gradient, rtol=2e-3, atol=2e-4)
    assert found.metrics["linear_error"] < 1e-4


def test_an_ill_conditioned_lower_level_in_float32():
    scale = np.geomspace(1e-6, 1, 6).astype(np.float32)
    y = minimum(lambda x, y: jnp.sum(scale * (y - 3) ** 2), np.zeros(6, np.float32))
    np.testing.assert_allclose(y, 3, rtol=1e-5)


def test_a_quadratic_takes_one_step(x64):
    h, b = hessian(1e3), np.arange(6.0)
    solution = np.linalg.solve(h, b)
    y = minimum(lambda x, y: y @ h @ y / 2 - b @ y, solution + 1, steps=1)
    np.testing.assert_allclose(y, solution, rtol=1e-9)


NAMED = {
    "rosenbrock": (lambda y: 100 * (y[1] - y[0] ** 2) ** 2 + (1 - y[0]) ** 2, [-1.2, 1.0], [1.0, 1.0], 1e-8),
    "a barrier": (lambda y: jnp.sum(y - jnp.log(y)), [0.01, 40.0], [1.0, 1.0], 1e-8),
    "a line of solutions": (lambda y: (y[0] + 2 * y[1] - 5) ** 2, [0.0, 0.0], [1.0, 2.0], 1e-8),
    "a zero Hessian at the solution": (lambda y: jnp.sum((y - 1) ** 4), [3.0, -2.0], [1.0, 1.0], 1e-3),
    "one unknown without a slope": (lambda y: (y[0] - 1) ** 2, [0.0, 7.0], [1.0, 7.0], 1e-8),
    "large units": (lambda y: 1e-8 * jnp.sum((y - 1e8) ** 2), [0.0, 0.0], [1e8, 1e8], 1e-8),
    "small units": (lambda y: 1e8 * jnp.sum((y - 1e-8) ** 2), [0.0, 0.0], [1e-8, 1e-8], 1e-8),
}


@pytest.mark.parametrize("name", NAMED)
def test_known_minima(name, x64):
    f, start, solution, rtol = NAMED[name]
    np.testing.assert_allclose(minimum(lambda x, y: f(y), A(start), steps=100), solution, rtol=rtol)


@pytest.mark.parametrize("start", [[1.0, 0.0], [0.0, 0.0], [0.0, 1e-9]])
def test_a_saddle_point_and_a_maximum_are_left(start, x64):
    y = minimum(lambda x, y: y[0] ** 2 - y[1] ** 2 + y[1] ** 4, A(start))
    np.testing.assert_allclose([y[0], abs(y[1])], [0, 0.5**0.5], atol=1e-8)


def test_a_box_is_honoured_and_what_is_held_is_let_go_again(x64):
    t = np.array([2.0, 0.3, -5.0])
    f = lambda x, y: jnp.sum((y - t) ** 2) / 2 + 0.4 * y[0] * y[1]
    find = jax.jit(lambda start: minimum(f, start, project=Interval(-1.0, 1.0)))
    y = find(np.ones(3))
    np.testing.assert_allclose(y, [1, -0.1, -1], atol=1e-12)
    np.testing.assert_allclose(find(np.array([-1.0, -1.0, 9.0])), y, atol=1e-12)  # from the wrong bound, and outside
    start = {"a": np.array(0.0), "b": np.array([2.0, 2.0])}
    tree = minimum(lambda x, y: (y["a"] - 3) ** 2 + jnp.sum(y["b"] ** 2), start, project=Interval(0.5, 1.0))
    np.testing.assert_allclose([tree["a"], *tree["b"]], [1, 0.5, 0.5])


def test_a_concave_lower_level_ends_at_a_bound(x64):
    np.testing.assert_allclose(abs(minimum(lambda x, y: -(y**2), 0.0, project=Interval(-1.0, 1.0))), 1.0)


def test_above_the_dense_size_steps_are_by_conjugate_gradients(x64):
    scale = np.geomspace(1e-3, 1, 40)
    f = lambda x, y: jnp.sum(scale * (y - 1) ** 2) + jnp.sum((y - 1) ** 4)
    np.testing.assert_allclose(minimum(f, np.zeros(40), dense=10), 1, rtol=1e-8)
    bounded = minimum(f, np.zeros(40), dense=10, project=Interval(-1.0, 0.5))
    np.testing.assert_allclose(bounded, 0.5, rtol=1e-8)


def test_the_answer_is_differentiated_implicitly_in_both_modes(x64):
    rates = np.arange(1.0, 4.0)
    f = lambda x, y: jnp.sum((y - x * rates) ** 2) / 2 + jnp.sum(jnp.cosh(y))
    y_star = lambda x: jnp.sum(minimum(f, np.zeros(3), x) ** 2)
    of = jax.jit(lambda x: (y_star(x), jax.grad(y_star)(x), jax.jvp(y_star, (x,), (1.0,))[1]))
    slope = (of(0.7 + 1e-4)[0] - of(0.7 - 1e-4)[0]) / 2e-4
    np.testing.assert_allclose(of(0.7)[1:], [slope] * 2, rtol=1e-7)
    boxed = lambda x: jnp.sum(minimum(lambda x, y: jnp.sum((y - x * rates) ** 2), np.zeros(3), x, Interval(-1.0, 1.0)))
    np.testing.assert_allclose(jax.jit(jax.grad(boxed))(0.4), 3.0)  # 0.4 and 0.8 move, 1.2 is held


def test_every_estimator_through_it_gives_the_same_hypergradient(x64):
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2) + jnp.sum(x), lambda x, y: jnp.sum((y - x) ** 2) / 2 + jnp.sum(jnp.cosh(y))
    )
    x, y = A([1.0, -0.5]), jnp.zeros(2)
    found = [
        jax.jit(value_and_hypergradient(problem, estimator, lower.Newton()))(x, y).gradient
        for estimator in (None, Unrolled(), Unrolled(mode="forward"))
    ]
    y = np.asarray(minimum(problem.lower, np.zeros(2), x))
    np.testing.assert_allclose(found, [1 + 2 * (y - 1) / (1 + np.cosh(y))] * 3, rtol=1e-9)


def test_a_batch_of_problems_is_each_of_them(x64):
    f = lambda x, y: jnp.sum((y - x) ** 4 + y**2)
    solver = lower.Newton()
    level = Problem(lambda x, y: 0.0, f).full_lower()
    one = lambda x: solver(level, x, solver.init(A([0.0, 3.0]))).y
    x, alone = np.arange(3.0), quick_jit(one)
    np.testing.assert_allclose(quick_jit(jax.vmap(one))(x), [alone(v) for v in x], atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"project_lower": lambda y: y}, r"sees a box by its bounds.*sets.Box"),
        ({"prox_lower": lambda x, y, s: y}, r"has a prox or coupled constraints.*GradientDescent"),
        ({"constraint": lambda x, y: y}, r"has a prox or coupled constraints.*Accurate"),
    ],
)
def test_what_it_cannot_honour_is_refused(options, words):
    level = Problem(lambda x, y: y, lambda x, y: y**2, **options).full_lower()
    with pytest.raises(ProblemError, match=words):
        lower.Newton()(level, A(0.0), lower.Newton().init(A(0.0)))


def test_its_numbers_are_checked():
    with pytest.raises(ValueError, match="the tolerance is positive"):
        lower.Newton(tol=-1.0)
    with pytest.raises(ValueError, match="positive integer"):
        lower.Newton(steps=0)


def test_the_chosen_solver_of_many_unknowns_solves_what_quasi_newton_steps_leave_open():
    """Penalties e^x that run apart: F fell at a y that is no minimiser, and was far larger at the one there is."""
    d = 130
    rng = np.random.default_rng(0)
    truth = np.where(np.arange(d) % 3 == 0, rng.normal(size=d), 0)
    rows, others = rng.normal(size=(2, 2 * d, d)).astype(np.float32)
    signs = [np.sign(part @ truth + rng.normal(size=2 * d)).astype(np.float32) for part in (rows, others)]
    problem = Problem(
        lambda x, y: jax.nn.softplus(-signs[1] * (others @ y)).mean(), lambda x, y: penalised(x, y, rows, signs[0])
    )
    solution = solve(problem, jnp.full(d, -3.0), jnp.zeros(d), steps=25, progress=False)
    y = lower.Newton().minimum(problem.full_lower(), solution.x, jnp.zeros(d))
    assert solution.solver.lower_solver.careful
    np.testing.assert_allclose(solution.history["upper_loss"][-1], problem.upper(solution.x, y), rtol=2e-2)


def test_a_warm_start_that_is_none_is_left():
    """At the next x the last y has a slope of 1e8, by which a share of it would be no tolerance."""
    level = Problem(lambda x, y: 0.0, lambda x, y: jnp.exp(x) * y[0] ** 2 + (y[1] - 1) ** 2).full_lower()
    for careful, ends in ((False, False), (True, True)):
        solver = lower.Relative(lower.LBFGS(tol=1e-4), careful=careful)
        state = solver(level, A(-9.0), solver.init(jnp.zeros(2)))
        state = dataclasses.replace(state, y=A([30.0, -500.0]))
        found = solver(level, A(18.0), state).y
        assert bool(jnp.abs(level.gradient(A(18.0), found)).max() < 1e-3) is ends
