"""Forward mode: reverse mode's gradient, closed recurrences, pieces of a run, the variance of random directions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Ridge

from bilevel import Problem, ProblemError, Result, data, lower, run, solve
from bilevel.hypergradients import Forward, OneStep, Unrolled, value_and_hypergradient
from bilevel.solvers import HypergradientDescent

D = 6
RIDGE = Ridge.make(D)
PROBLEM = RIDGE.problem
X = np.array([-1.0, -2.0, 0.0, -1.5, -3.0, -0.5])
Y = {"w": np.zeros(D)}
ADAM = optax.adam(optax.cosine_decay_schedule(0.1, 40), eps_root=1e-12)
RULES = {"sgd": 0.2, "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True), "adam": ADAM}


def minibatches(size=8):
    return Problem(RIDGE.upper, RIDGE.lower, RIDGE.validation, data.Minibatches(RIDGE.train, size))


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def gradient(problem, estimator, solver, x=X, y=Y, key=3):
    f = jax.jit(lambda x, y: value_and_hypergradient(problem, estimator, solver)(x, y, key=key))
    return f(x, y)


@pytest.mark.parametrize(
    "kind, rule",
    [
        ("full", "sgd"),
        ("minibatches", "adam"),
        *(
            pytest.param(kind, rule, marks=pytest.mark.slow)
            for kind, rule in (
                ("full", "momentum"), ("full", "adam"), ("minibatches", "sgd"), ("minibatches", "momentum"),
            )
        ),
    ],
)  # fmt: skip
def test_forward_is_reverse(kind, rule, x64):
    problem = PROBLEM if kind == "full" else minibatches()
    solver = lower.GradientDescent(RULES[rule], 40)
    forward, reverse = (gradient(problem, e, solver) for e in (Forward(), Unrolled()))
    assert relative(forward.gradient, reverse.gradient) < 1e-12
    np.testing.assert_allclose(forward.value, reverse.value, rtol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), forward.lower, reverse.lower)
    assert float(forward.metrics["lower_residual"]) > 0
    truncated = [gradient(problem, e(last=7), solver).gradient for e in (Forward, Unrolled)]
    assert relative(*truncated) < 1e-12 < relative(truncated[0], reverse.gradient)


def test_trees_projections_proxes_starts_and_functions(x64):
    """x of several leaves, a lasso's prox, a box, a start at x, and a solver that is a function or stops by itself."""
    x = {"c": np.array([2.0, -1.5, 0.1]), "l": np.asarray(-0.5)}
    lasso = Problem(
        upper=lambda x, y: jnp.sum(y**2) + x["l"] ** 2,
        lower=lambda x, y: jnp.sum((y - x["c"]) ** 2) / 2,
        prox_lower=lambda x, y, scaling: jnp.sign(y) * jnp.maximum(jnp.abs(y) - scaling * jnp.exp(x["l"]), 0),
    )
    box = Problem(
        upper=lambda x, y: jnp.sum((y - 2.0) ** 2 * x["c"]),
        lower=lambda x, y: jnp.sum((y - x["c"]) ** 2) + x["l"] * jnp.sum(jnp.sin(y)),
        project_lower=lambda y: jnp.clip(y, -1, 1),
    )
    plain = Problem(box.upper, box.lower)
    start = lambda x, y: x["c"] ** 2 + 0 * y
    for problem, solver in (
        (lasso, lower.GradientDescent(0.3, 12)),
        (box, lower.GradientDescent(0.3, 12)),
        (plain, lower.GradientDescent(optax.sgd(0.1, 0.9), 12, start=start)),
        (plain, lambda level, x, y: y - 0.1 * level.gradient(x, y)),
    ):
        found = [gradient(problem, e, solver, x, np.zeros(3)).gradient for e in (Forward(), Unrolled(checkpoint=False))]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), *found)
    until = gradient(lasso, Forward(), lower.GradientDescent(0.5, 400, tol=1e-13), x, np.zeros(3))
    y = np.sign(x["c"]) * np.maximum(np.abs(x["c"]) - np.exp(-0.5), 0)
    np.testing.assert_allclose(until.gradient["c"], 2 * y, atol=1e-10)
    np.testing.assert_allclose(until.gradient["l"], -1 - 2 * np.exp(-0.5) * np.sum(y * np.sign(y)), rtol=1e-9)


@functools.cache
def forty_steps():
    solver = lower.GradientDescent(ADAM, 40)
    return np.asarray(gradient(minibatches(), Forward(), solver, key=data.as_step_key(3)).gradient)


@pytest.mark.parametrize("restart", [None, 4])
def test_pieces_are_the_whole_run(restart, x64):
    """Four calls of ten steps, moments, schedule and batches going on, are the derivative of forty steps."""
    piece = value_and_hypergradient(minibatches(), Forward(restart=restart), lower.GradientDescent(ADAM, 10))
    step = jax.jit(lambda y, carry, k: piece(X, y, carry, data.as_step_key(3, k)))
    found = step(Y, None, 0)
    for k in (1, 2, 3):
        found = step(found.lower, found.carry, k)
    assert relative(found.gradient, forty_steps()) < 1e-12
    fifth = step(found.lower, found.carry, 4)
    fresh = step(found.lower, Forward(restart=restart).init(None, X, Y), 4)
    same = relative(fifth.gradient, fresh.gradient) < 1e-12
    assert same is (restart == 4)


def test_decay_is_the_discounted_recurrence(x64):
    """Z <- mu (I - eta H) Z - eta f_yx, written out on the ridge problem."""
    eta, mu, steps = 0.2, 0.6, 9
    h, exp = np.asarray(jax.jit(RIDGE.hessian)(X)), np.exp(X)
    y, z = np.zeros(D), np.zeros((D, D))
    b = RIDGE.train[0].T @ RIDGE.train[1] / len(RIDGE.train[1])
    for _ in range(steps):
        z = mu * (np.eye(D) - eta * h) @ z - eta * np.diag(exp * y)
        y = y - eta * (h @ y - b)
    upper_y = np.asarray(jax.jit(jax.grad(RIDGE.upper, 1))(X, y, RIDGE.validation))
    expected = 0.02 * X + z.T @ upper_y
    solver = lower.GradientDescent(eta, steps)
    assert relative(gradient(PROBLEM, Forward(decay=mu), solver).gradient, expected) < 1e-12
    at = lambda decay: gradient(PROBLEM, Forward(decay=decay), solver).gradient
    assert relative(at(0), gradient(PROBLEM, OneStep(), solver).gradient) < 1e-12
    assert relative(at(1), gradient(PROBLEM, Forward(), solver).gradient) < 1e-12


@pytest.mark.parametrize("distribution, factor", [("rademacher", D - 1), ("normal", D + 1), ("orthogonal", D - 2)])
def test_random_directions_are_unbiased_with_the_stated_variance(distribution, factor, x64):
    n, solver = 2, lower.GradientDescent(0.2, 10)
    exact = gradient(PROBLEM, Forward(), solver).gradient
    g = exact - 0.02 * X  # F_x = 0.02 x is known
    estimator = Forward(directions=n, distribution=distribution)
    f = lambda key: value_and_hypergradient(PROBLEM, estimator, solver)(X, Y, key=key)
    draws = 4000
    found = jax.jit(jax.vmap(f))(jax.random.split(jax.random.key(0), draws))
    variance = factor / n * float(g @ g)
    errors = np.asarray(found.gradient - exact)
    assert np.linalg.norm(errors.mean(0)) < 3 * np.sqrt(variance / draws)
    np.testing.assert_allclose((errors**2).sum(1).mean(), variance, rtol=0.1)
    np.testing.assert_allclose((found.metrics["deviation"] ** 2).mean(), variance, rtol=0.1)


def test_all_directions_of_a_frame_are_exact_and_draws_are_fresh(x64):
    solver = lower.GradientDescent(0.2, 10)
    exact = gradient(PROBLEM, Forward(), solver).gradient
    whole = gradient(PROBLEM, Forward(directions=D, distribution="orthogonal"), solver)
    assert relative(whole.gradient, exact) < 1e-12 and float(whole.metrics["deviation"]) == 0
    f = jax.jit(value_and_hypergradient(PROBLEM, Forward(directions=2), solver))
    first = f(X, Y)
    second = f(X, Y, first.carry)
    assert relative(first.gradient, second.gradient) > 0.1
    # within a run of several calls the directions stay: two calls of five steps are one of ten along the same ones
    f = jax.jit(value_and_hypergradient(PROBLEM, Forward(directions=2, restart=2), lower.GradientDescent(0.2, 5)))
    first = f(X, Y)
    expected = jax.jit(lambda u: whole_along(u, solver))(first.carry.directions)
    assert relative(f(X, first.lower, first.carry).gradient, expected) < 1e-12


def whole_along(u, solver):
    """F_x + mean of u <Z u, F_y> over ten steps, along the directions that a carry holds."""
    objective = lambda x: RIDGE.upper(x, solver(PROBLEM.full_lower(), x, solver.init(Y)).y, RIDGE.validation)
    y = solver(PROBLEM.full_lower(), X, solver.init(Y)).y
    upper_x = jax.grad(RIDGE.upper)(X, y, RIDGE.validation)
    slopes = jax.vmap(lambda u: jax.jvp(objective, (X,), (u,))[1])(u) - u @ upper_x
    return upper_x + slopes @ u / len(u)


def test_real_time_descent_finds_the_solution_of_the_implicit_problem(x64):
    """Five steps a call, x moving in between: a truncated derivative ends elsewhere, a carried one at the optimum."""
    descent = lambda e: HypergradientDescent(e, lower.GradientDescent(0.3, 5), optax.adam(0.02))
    end = jax.jit(lambda e: run(PROBLEM, descent(e), X, Y, 3000)[0].x, static_argnums=0)
    slope = jax.jit(jax.grad(RIDGE.objective))
    slopes = [float(np.linalg.norm(slope(end(e)))) for e in (Forward(restart=None), Forward())]
    assert slopes[0] < 1e-6 and slopes[1] > 1e-3


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    """The tangents are part of the state that checkpoints save."""
    solver = HypergradientDescent(Forward(restart=None), lower.GradientDescent(ADAM, 5), optax.adam(0.05))
    x, y = jax.tree.map(lambda a: np.asarray(a, np.float32), (X, Y))
    problem = jax.tree.map(lambda a: np.asarray(a, np.float32), minibatches())
    options = {"key": 1, "progress": False, "chunk": 4}
    whole = solve(problem, x, y, solver, steps=12, **options)
    solve(problem, x, y, solver, steps=8, checkpoint=tmp_path / "run", **options)
    resumed = solve(problem, x, y, solver, steps=12, checkpoint=tmp_path / "run", **options)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    assert len(jax.tree.leaves(resumed.state.carry.lower)) == 3  # y, mu, nu


def test_random_directions_never_say_converged(x64):
    """At the optimum of the problem the estimate is small, and at other points it may be by chance."""
    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum((y - x) ** 2))
    start = (np.ones(3), np.ones(3))
    for estimator, word in ((Forward(directions=1), 0), (Forward(), Result.CONVERGED)):
        solver = HypergradientDescent(estimator, lower.GradientDescent(0.3, 20), 0.1)
        state, metrics = run(problem, solver, *start, 3)
        assert float(metrics["hypergradient_norm"][-1]) < 1e-6
        assert int(solver.status(state, {name: m[-1] for name, m in metrics.items()}, 1e-6)) == word


def test_memory_does_not_grow_with_the_steps():
    def temporaries(estimator, steps):
        f = lambda x, y: value_and_hypergradient(PROBLEM, estimator, lower.GradientDescent(ADAM, steps))(x, y).gradient
        return jax.jit(f).lower(jnp.asarray(X, jnp.float32), jax.tree.map(jnp.float32, Y)).compile().memory_analysis()

    few, many = (temporaries(Forward(), steps).temp_size_in_bytes for steps in (100, 1600))
    assert many == few
    few, many = (temporaries(Unrolled(checkpoint="all"), s).temp_size_in_bytes for s in (100, 1600))
    assert many > 8 * few


def test_dtypes_are_kept():
    problem = Problem(lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum((y - x) ** 2 * jnp.array([1, 2], x.dtype)))
    for dtype in (jnp.float32, jnp.bfloat16):
        estimators = Forward(), Forward(restart=None, decay=0.5), Forward(directions=2)
        solver = lower.GradientDescent(0.1, 3)
        of = jax.jit(lambda x, y: [value_and_hypergradient(problem, e, solver)(x, y) for e in estimators])
        for estimator, found in zip(estimators, of(jnp.ones(2, dtype), jnp.zeros(2, dtype)), strict=True):
            assert found.gradient.dtype == found.lower.y.dtype == dtype, estimator


def test_refusals_name_the_cure():
    solver = lower.GradientDescent(0.1, 3)
    with pytest.raises(ValueError, match=r"Forward\(last=5\) differentiates 5 steps but the lower solver takes 3"):
        value_and_hypergradient(PROBLEM, Forward(last=5), solver)(X, Y)
    with pytest.raises(ValueError, match=r"Forward\(last=5\).*needs one made of steps"):
        value_and_hypergradient(PROBLEM, Forward(last=5), lambda level, x, y: y)(X, Y)
    with pytest.raises(ValueError, match=r"forgets from step to step and needs a lower solver made of steps"):
        value_and_hypergradient(PROBLEM, Forward(decay=0.5), lambda level, x, y: y)(X, Y)
    with pytest.raises(ValueError, match=r"decay=1\.5\): what is kept of dy/dx in a step lies between 0 and 1"):
        Forward(decay=1.5)
    with pytest.raises(ValueError, match=r"give one of 'rademacher', 'normal', 'orthogonal'"):
        Forward(directions=2, distribution="gauss")
    with pytest.raises(ValueError, match=r"Forward\(restart=0\): the number of calls between restarts is a positive"):
        Forward(restart=0)
    with pytest.raises(ValueError, match=r"last=3, restart=None.*Give one of the two"):
        Forward(last=3, restart=None)
    with pytest.raises(ValueError, match=r"the rest of x would never be looked at\. Give a finite restart"):
        Forward(directions=3, restart=None)
    with pytest.raises(ValueError, match=r"x has 6 numbers, and no more than so many directions are orthogonal"):
        value_and_hypergradient(PROBLEM, Forward(directions=7, distribution="orthogonal"), solver)(X, Y)
    f = jax.jit(value_and_hypergradient(PROBLEM, Forward(restart=None), solver))
    first = f(X, Y)
    with pytest.raises(ValueError, match=r"give the last estimate's `lower` as y, and not its `lower\.y`"):
        f(X, first.lower.y, first.carry)
    for descent, cure in (
        (HypergradientDescent(Forward(restart=None), solver), "upper_optimizer a step size or an optax rule"),
        (HypergradientDescent(Forward(restart=2), solver, 0.1, warm_start=False), "warm_start=True"),
    ):
        with pytest.raises(ProblemError, match=f"must go on and not be taken back: give HypergradientDescent {cure}"):
            solve(PROBLEM, X, Y, descent, steps=1, progress=False)
