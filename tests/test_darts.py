"""DARTS: its fixed points, its order of operations, its virtual step; the dominant eigenvalue."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, data, solve, sweep
from bilevel.curvature import dominant_eigenvalue
from bilevel.data import as_step_key
from bilevel.hypergradients import Unrolled, value_and_hypergradient
from bilevel.hypergradients.finite_difference import FiniteDifference, FirstOrder
from bilevel.lower import GradientDescent, MomentumSGD
from bilevel.optimizers import coupled_adam, quasi_newton
from bilevel.problem import ProblemError
from bilevel.solvers.darts import DARTS, UpperFirst

TOY = Problem(upper=lambda a, w: a * w - 2 * a + 1, lower=lambda a, w: w**2 - 2 * a * w + a**2)


TOY_RULE = optax.sgd(0.1)


@pytest.mark.parametrize("order", [2, "exact"])
def test_fixed_point_of_the_papers_toy(order, x64):
    xis = [0.0, 0.1, 0.25, 0.5, 1.0]
    found = [
        solve(TOY, jnp.array(2.0), jnp.array(-2.0), DARTS(order, 0.25, TOY_RULE, virtual_step=xi), steps=400)
        for xi in xis
    ]
    np.testing.assert_allclose([s.x for s in found], [2 / (1 + 2 * xi) for xi in xis], atol=1e-6)
    np.testing.assert_allclose([s.y for s in found], [2 / (1 + 2 * xi) for xi in xis], atol=1e-6)


def test_first_order_is_biased_on_the_toy(x64):
    solution = solve(TOY, jnp.array(2.0), jnp.array(-2.0), DARTS(1, 0.25, TOY_RULE), steps=400)
    np.testing.assert_allclose([solution.x, solution.y], [2.0, 2.0], atol=1e-6)  # the optimum is (1, 1)


def smooth_lower(x, y):
    return jnp.sum(jnp.exp(x) * jnp.sin(y["a"])) + jnp.sum(jnp.cos(x[:2] * y["b"]) * y["a"][:2] ** 2)


def smooth_upper(x, y):
    return jnp.sum(jnp.sin(y["a"] + x)) + 0.5 * jnp.sum((y["b"] - x[:2]) ** 2)


SMOOTH = Problem(upper=smooth_upper, lower=smooth_lower)
X = np.array([0.3, -0.2, 0.5])
Y = {"a": np.array([0.4, -0.7, 1.1]), "b": np.array([0.9, -0.3])}
RULE = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(optax.linear_schedule(0.3, 0.0, 10), momentum=0.9))


@pytest.mark.parametrize(
    "solver, virtual",
    [(GradientDescent(0.3, 1), 0.3), (GradientDescent(RULE, 1), None), (MomentumSGD(0.3, clip=None), None)],
)
def test_finite_difference_tends_to_the_exact_gradient_at_its_rate(solver, virtual, x64):
    level, upper = SMOOTH.draw_lower(0), SMOOTH.draw_upper(0)
    y = jax.tree.map(jnp.asarray, Y)
    x = jnp.asarray(X)
    once = jax.jit(lambda x, state: solver(level, x, state))
    start = once(x, once(x, solver.init(y)))  # a momentum buffer that is not empty

    value, exact = jax.jit(jax.value_and_grad(lambda x, start: upper(x, solver(level, x, start).y)))(x, start)
    unrolled = jax.jit(lambda x, start: Unrolled()(upper, level, solver, x, start, ()).gradient)(x, start)
    np.testing.assert_allclose(unrolled, exact, rtol=1e-12)

    estimate = jax.jit(lambda estimator, x, start: estimator(upper, level, solver, x, start, ()))

    def error(radius):
        found = estimate(FiniteDifference(virtual, radius), x, start)
        np.testing.assert_allclose(found.value, value, rtol=1e-12)
        return np.linalg.norm(found.gradient - exact) / np.linalg.norm(exact)

    exactly = estimate(FiniteDifference(virtual, None), x, start)
    np.testing.assert_allclose(exactly.gradient, exact, rtol=1e-12)
    errors = [error(radius) for radius in (0.1, 0.01, 0.001)]
    assert errors[1] < 1e-3
    rates = np.log10(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(rates, 2, atol=0.1)  # central: the square of the radius


def test_the_virtual_step_is_not_clipped_and_the_real_one_is(x64):
    solver = DARTS(2, MomentumSGD(0.1, momentum=0.0, weight_decay=0.0, clip=0.5), 0.1)
    first = solver.init(TOY, jnp.array(2.0), jnp.array(-2.0), as_step_key(0))
    state, metrics = jax.jit(functools.partial(solver.step, TOY))(first, as_step_key(0))
    virtual = -2 - 0.1 * (2 * -2 - 2 * 2)
    # F_a(a, w') - xi f_aw F_w(a, w') = w' - 2 + 0.1 * 2 * a
    a = 2 - 0.1 * (virtual - 2 + 0.2 * 2)
    np.testing.assert_allclose(metrics["upper_loss"], 2 * virtual - 4 + 1, rtol=1e-12)
    np.testing.assert_allclose(state.x, a, rtol=1e-9)
    np.testing.assert_allclose(state.y, -2 + 0.1 * 0.5, rtol=1e-12)  # f_w = -8, clipped to norm 0.5


def test_the_lower_step_is_taken_at_the_new_architecture(x64):
    problem = Problem(upper=lambda x, y: 3 * x, lower=lambda x, y: x * y)
    solver = DARTS(1, 0.5, 0.1)
    state, _ = solver.step(
        problem, solver.init(problem, jnp.array(1.0), jnp.array(0.0), as_step_key(0)), as_step_key(0)
    )
    np.testing.assert_allclose([state.x, state.y], [1 - 0.1 * 3, -0.5 * (1 - 0.1 * 3)], rtol=1e-12)


def batch_lower(x, y, batch):
    return jnp.mean((jnp.tanh(batch @ y) - batch @ jnp.sin(x)) ** 2) + jnp.sum(y**4)


def batch_upper(x, y, batch):
    return jnp.mean((batch @ y - batch @ x**2) ** 2)


LOWER_GRADIENTS = jax.jit(jax.grad(batch_lower, (0, 1)))
UPPER_GRADIENTS = jax.jit(jax.grad(batch_upper, (0, 1)))


def by_hand(problem, x, y, steps, order, key, numbers):
    """DARTS in numpy from its equations; the gradients are the only thing taken from elsewhere."""
    lr, mu, decay, clip = numbers
    buffer, m, v = np.zeros_like(y), np.zeros_like(x), np.zeros_like(x)
    draw = jax.jit(lambda step: (problem.draw_upper(step).batch, problem.draw_lower(step).batch))
    for k in range(steps):
        F, f = draw(as_step_key(key, k))
        f_y = lambda x, y, f=f: np.asarray(LOWER_GRADIENTS(x, y, f)[1])
        f_x = lambda y, x=x, f=f: np.asarray(LOWER_GRADIENTS(x, y, f)[0])
        if order == 1:
            gradient = np.asarray(UPPER_GRADIENTS(x, y, F)[0])
        else:
            virtual = y - lr * (mu * buffer + f_y(x, y) + decay * y)
            F_x, w = map(np.asarray, UPPER_GRADIENTS(x, virtual, F))
            e = 0.01 / np.linalg.norm(w)
            gradient = F_x - lr * (f_x(y + e * w) - f_x(y - e * w)) / (2 * e)
        gradient = gradient + 1e-3 * x
        m, v = 0.5 * m + 0.5 * gradient, 0.999 * v + 0.001 * gradient**2
        x = x - 3e-4 * (m / (1 - 0.5 ** (k + 1))) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
        g = f_y(x, y)
        g = g * min(1, clip / np.linalg.norm(g)) + decay * y
        buffer = mu * buffer + g
        y = y - lr * buffer
    return x, y


@pytest.mark.parametrize("order", [1, 2])
def test_trajectory_equals_one_written_by_hand(order, x64):
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(12, 3))
    problem = Problem(
        batch_upper,
        batch_lower,
        upper_data=data.Minibatches(samples[:6], 2, replace=True),
        lower_data=data.Minibatches(samples[6:], 3),
    )
    x, y = rng.normal(size=3), 2 * rng.normal(size=3)
    g = np.linalg.norm(LOWER_GRADIENTS(x, y, problem.draw_lower(as_step_key(5, 0)).batch)[1])
    assert g > 5  # the default clipping is at work
    expected = by_hand(problem, x, y, 3, order, 5, (0.025, 0.9, 3e-4, 5.0))
    solution = solve(problem, x, y, DARTS(order), steps=3, key=5)
    np.testing.assert_allclose(solution.x, expected[0], rtol=1e-9)
    np.testing.assert_allclose(solution.y, expected[1], rtol=1e-9)


def test_weight_decay_is_a_leaf_and_sweeps():
    traced = []

    def lower(x, y):
        traced.append(1)
        return jnp.sum((y - x) ** 2)

    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lower)
    x, y = jnp.zeros(2), jnp.ones(2)
    first = solve(problem, x, y, DARTS(1, weight_decay=0.0), steps=5, chunk=5)
    count = len(traced)
    second = solve(problem, x, y, DARTS(1, weight_decay=10.0), steps=5, chunk=5)
    assert len(traced) - count <= 1  # validation evaluates shapes; nothing is compiled again
    assert jnp.all(second.y < first.y)
    swept = sweep(problem, [DARTS(1, weight_decay=w) for w in (0.0, 10.0)], x, y, steps=5)
    np.testing.assert_allclose(swept.state.y[1], second.y, rtol=1e-5)


def test_default_rules_are_the_papers():
    solver = DARTS()
    assert solver.lower_solver == MomentumSGD(0.025, 0.9, 3e-4, 5.0, 1)
    assert solver.upper_optimizer is coupled_adam()  # Adam(3e-4, 0.5, 0.999) with 1e-3: by the trajectory's test
    assert solver.hypergradient == FiniteDifference(None, 0.01)


def test_a_learning_rate_schedule_counts_lower_steps(x64):
    rates = optax.piecewise_constant_schedule(0.1, {2: 0.5})
    problem = Problem(lambda x, y: jnp.sum(x) * 0, lambda x, y: jnp.sum(y))
    solver = DARTS(1, MomentumSGD(rates, momentum=0.0, weight_decay=0.0, clip=None), 0.1)
    solution = solve(problem, jnp.zeros(1), jnp.zeros(1), solver, steps=4)
    np.testing.assert_allclose(solution.y, -(0.1 + 0.1 + 0.05 + 0.05), rtol=1e-6)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="order is 1, 2 or 'exact'"):
        DARTS(3)
    with pytest.raises(ValueError, match="with a lower_optimizer put it in there"):
        DARTS(2, 0.1, weight_decay=1e-3)
    with pytest.raises(ValueError, match="step is not negative"):
        DARTS(2, virtual_step=-0.1)
    with pytest.raises(ValueError, match=r"MomentumSGD\(weight_decay=-1.0\)"):
        MomentumSGD(weight_decay=-1.0)
    with pytest.raises(TypeError, match="estimates at the incoming y, ahead of the lower solver"):
        UpperFirst(Unrolled(), 0.1, 0.1)
    with pytest.raises(ProblemError, match="cannot withdraw an upper step"):
        solve(TOY, jnp.array(2.0), jnp.array(-2.0), DARTS(2, 0.1, quasi_newton()), steps=2)
    with pytest.raises(ValueError, match="does not measure the lower level's residual"):
        solve(TOY, jnp.array(2.0), jnp.array(-2.0), DARTS(1, 0.1, 0.1), steps=2, tol=1e-3)
    with pytest.raises(ValueError, match="GradientDescent takes 10: give it steps=1"):
        value_and_hypergradient(TOY, FiniteDifference(None), 0.1)(jnp.array(2.0), jnp.array(-2.0))
    with pytest.raises(ValueError, match="this one evaluates the loss itself"):
        newton = lambda lower, x, y: y - jax.grad(lower, 1)(x, y)
        value_and_hypergradient(TOY, FiniteDifference(None), newton)(jnp.array(2.0), jnp.array(-2.0))


def test_first_order_as_an_estimator(x64):
    estimate = jax.jit(value_and_hypergradient(SMOOTH, FirstOrder(), GradientDescent(0.1, 2)))(X, Y)
    np.testing.assert_allclose(estimate.gradient, jax.jit(jax.grad(smooth_upper))(X, Y), rtol=1e-12)


# ---------------------------------------------------------------- dominant eigenvalue


def quadratic(x, y, matrix):
    flat = jnp.concatenate([x["a"].reshape(-1), x["b"]])
    return 0.5 * flat @ (matrix @ flat) * y


def split(flat, n):
    return {"a": flat[: 2 * n].reshape(2, n), "b": flat[2 * n :]}


def symmetric(rng, values):
    q, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return (q * values) @ q.T


def test_dominant_eigenvalue_is_numpys(x64):
    rng = np.random.default_rng(0)

    def loss(x, y):
        flat = jnp.concatenate([x["a"].reshape(-1), x["b"]])
        return jnp.sum(jnp.tanh(y @ flat)) + jnp.sum(jax.nn.logsumexp(x["a"], -1)) - 3 * jnp.sum(x["b"] ** 4)

    x, y = split(rng.normal(size=70), 20), rng.normal(size=(5, 70))
    flat, unravel = jax.flatten_util.ravel_pytree(x)
    values = np.linalg.eigvalsh(jax.jit(jax.hessian(lambda flat, y: loss(unravel(flat), y)))(flat, y))
    assert -values[0] > 2 * values[-1]  # the most negative one has the larger modulus
    found = jax.jit(dominant_eigenvalue(loss))(x, y)
    np.testing.assert_allclose(found, values[-1], rtol=1e-8)
    shifted = jax.jit(dominant_eigenvalue(loss, weight_decay=1e-3, chunk=70))(x, y)
    np.testing.assert_allclose(shifted, values[-1] + 1e-3, rtol=1e-8)


def test_dominant_eigenvalue_by_lanczos_of_an_indefinite_hessian(x64):
    rng = np.random.default_rng(1)
    values = np.concatenate([[-9.0], np.linspace(-2, 1, 298), [1.3]])
    matrix = symmetric(rng, values)
    found = jax.jit(dominant_eigenvalue(quadratic))(split(rng.normal(size=300), 100), 2.0, matrix)
    np.testing.assert_allclose(found, 2.6, rtol=1e-4)


def test_dominant_eigenvalue_on_schedule_in_solve(x64):
    problem = Problem(lambda x, y: jnp.sum((y * x) ** 2) / 2, lambda x, y: jnp.sum((y - 3.0) ** 2))
    metric = dominant_eigenvalue(problem.upper)
    solution = solve(
        problem, jnp.ones(2), jnp.ones(2), DARTS(1, 0.1, 0.01), steps=6, metrics={"eigenvalue": metric}, metrics_every=2
    )
    np.testing.assert_array_equal(solution.history.steps["eigenvalue"], [0, 2, 4, 6])
    expected = [(3 - 2 * 0.8**k) ** 2 for k in (0, 2, 4, 6)]
    np.testing.assert_allclose(solution.history["eigenvalue"], expected, rtol=1e-8)
    assert dataclasses.is_dataclass(metric) and metric == dominant_eigenvalue(problem.upper)
    with pytest.raises(TypeError, match="dominant_eigenvalue takes a loss"):
        dominant_eigenvalue(3)
