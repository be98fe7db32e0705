"""Lower levels that begin anew, held to runs written out by hand and to closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, ProblemError, hypergradients, lower, run, solve, solvers
from bilevel.hypergradients import value_and_hypergradient

RATE = 0.1


def draw(key):
    return jax.random.normal(key, (2,))


def upper(x, y):
    return 0.5 * jnp.sum((y - 1) ** 2)


def below(x, y):
    return 0.5 * jnp.sum((y - x) ** 2)


PROBLEM = Problem(upper, below)


def by_hand(rounds, every, steps, x, key=3):
    y, found = None, []
    for k in range(rounds):
        if k % every == 0:
            y = np.asarray(draw(jax.random.fold_in(jax.random.key(key), k // every)))
        for _ in range(steps):
            y = y - RATE * (y - x)
        found.append(y)
    return np.asarray(found)


@pytest.mark.parametrize(
    ("every", "rounds"),
    [(1, 1), (1, 4), (3, 3), (3, 4), (3, 7)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 3), (1, 7), (3, 1)]],
)
def test_a_run_is_the_one_by_hand(every, rounds, x64):
    solver = lower.Reinitialized(lower.GradientDescent(RATE, 4), draw, every, key=3)
    method = solvers.HypergradientDescent(lower_solver=solver, upper_optimizer=optax.set_to_zero())
    state, _ = run(PROBLEM, method, jnp.ones(2) * 2.0, jnp.zeros(2), rounds)
    np.testing.assert_allclose(state.y, by_hand(rounds, every, 4, 2.0)[-1], rtol=1e-12)


def test_moments_begin_anew_with_y(x64):
    """Adam's first step after a draw has the length of its rate, whatever came before."""
    solver = lower.Reinitialized(lower.GradientDescent(optax.adam(RATE), 1), draw, 5, key=3)
    method = solvers.HypergradientDescent(lower_solver=solver, upper_optimizer=optax.set_to_zero())
    state, _ = run(PROBLEM, method, jnp.ones(2) * 9.0, jnp.zeros(2), 6)
    start = draw(jax.random.fold_in(jax.random.key(3), 1))
    np.testing.assert_allclose(state.y - start, RATE, rtol=1e-6)


def test_keys_are_leaves_and_runs_of_several_are_one_vmap(x64):
    def ends(key):
        solver = lower.Reinitialized(lower.GradientDescent(RATE, 4), draw, 2, key=key)
        return run(PROBLEM, solvers.AID(solver, 0.3), jnp.ones(2), jnp.zeros(2), 5)[0].x

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(ends))(keys)
    alone = jax.jit(ends)
    np.testing.assert_allclose(together, [alone(key) for key in keys], rtol=1e-12)
    assert len(np.unique(np.asarray(together)[:, 0])) == 3


ESTIMATORS = [hypergradients.Unrolled(), hypergradients.Unrolled(last=2), hypergradients.OneStep()]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unrolled_hypergradients_are_the_derivative_of_the_run_from_the_draw(estimator, x64):
    """y_T = x + (1 - a)^T (y_0 - x), with y_0 the draw: of the last K steps dy/dx = 1 - (1 - a)^K."""
    solver = lower.Reinitialized(lower.GradientDescent(RATE, 5), draw, key=3)
    x = np.array([0.5, -1.0])
    found = jax.jit(value_and_hypergradient(PROBLEM, estimator, solver))(x, np.full(2, 77.0))
    y = by_hand(1, 1, 5, np.asarray(x))[-1]
    np.testing.assert_allclose(found.lower.y, y, rtol=1e-12)
    last = estimator.last or 5
    np.testing.assert_allclose(found.gradient, (1 - (1 - RATE) ** last) * (y - 1), rtol=1e-12)


def test_implicit_differentiation_forgets_the_draw(x64):
    solver = lower.Reinitialized(lower.GradientDescent(RATE, 1000, tol=1e-12), draw)
    of = jax.jit(value_and_hypergradient(PROBLEM, hypergradients.Implicit(), solver))
    found = of(np.array([0.5, -1.0]), np.zeros(2))
    np.testing.assert_allclose(found.gradient, [-0.5, -2.0], rtol=1e-8)


def test_projections_are_kept(x64):
    problem = Problem(upper, below, project_lower=lambda y: jnp.clip(y, -0.1, 0.1))
    solver = lower.Reinitialized(lower.GradientDescent(RATE, 30), draw)
    method = solvers.HypergradientDescent(hypergradients.Unrolled(), solver, 0.1)
    np.testing.assert_allclose(run(problem, method, jnp.ones(2), jnp.zeros(2), 1)[0].y, 0.1)


def test_chunks_and_resumes_draw_alike(x64):
    solver = solvers.AID(lower.Reinitialized(lower.GradientDescent(RATE, 3), draw, 2), 0.2)
    whole = solve(PROBLEM, jnp.ones(2), jnp.zeros(2), solver, steps=9)
    part = solve(PROBLEM, jnp.ones(2), jnp.zeros(2), solver, steps=4, chunk=3)
    rest = solve(PROBLEM, solver=solver, state=part, steps=9)
    np.testing.assert_array_equal(whole.x, rest.x)


def test_misuse_is_named():
    with pytest.raises(TypeError, match=r"give a lower solver made of steps, such as lower.GradientDescent"):
        lower.Reinitialized(lower.Newton(), draw)
    with pytest.raises(TypeError, match=r"the initialiser is a function, key -> y"):
        lower.Reinitialized(lower.GradientDescent(), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"Reinitialized\(every=0\)"):
        lower.Reinitialized(lower.GradientDescent(), draw, 0)
    with pytest.raises(ValueError, match=r"draw gives float32\[2\], and y0 is float32\[3\]"):
        lower.Reinitialized(lower.GradientDescent(), draw).init(jnp.zeros(3))
    method = solvers.AID(lower.Reinitialized(lower.GradientDescent(), draw))
    with pytest.raises(ProblemError, match=r"may begin their lower solves at different draws"):
        solve(PROBLEM, jnp.zeros(2), jnp.zeros(2), method, steps=1)
    method = solvers.HypergradientDescent(
        lower_solver=lower.Reinitialized(lower.GradientDescent(), draw), upper_optimizer=0.1, warm_start=False
    )
    with pytest.raises(ProblemError, match=r"warm_start=False.* would take draw 0 at every step"):
        solve(PROBLEM, jnp.zeros(2), jnp.zeros(2), method, steps=1)
