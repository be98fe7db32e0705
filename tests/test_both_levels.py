"""Alternations and combined directions for simple bilevel problems, held to closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, ProblemError, run
from bilevel.solvers import Alternating, DynamicBarrier, LossMultiplier, PenaltyDescent, WeightedSum

Y0 = jnp.array([2.0, -1.0])


def upper(x, y):
    return 0.5 * jnp.sum((y - 1) ** 2)


def lower(x, y):
    """Its minimisers are y[0] = 0, any y[1]; the best of them for F is (0, 1)."""
    return 0.5 * y[0] ** 2


PROBLEM = Problem(upper, lower)


def end(solver, steps, y=Y0):
    return jax.jit(lambda y: run(PROBLEM, solver, None, y, steps=steps, key=0)[0].y)(y)


def test_the_sum_ends_at_the_sums_minimum(x64):
    y = end(WeightedSum(0.3, weight=0.5), 400, Y0.astype(float))
    np.testing.assert_allclose(y, [1 / 3, 1], atol=1e-10)  # y + w (y - 1) = 0


@pytest.mark.parametrize("solver", [PenaltyDescent(0.3, 10.0, 10.0, 0.5), DynamicBarrier(0.02, 1.0)])
def test_the_bilevel_methods_end_at_the_bilevel_solution(x64, solver):
    np.testing.assert_allclose(end(solver, 4000, Y0.astype(float)), [0, 1], atol=0.03)


def test_the_barriers_direction_reduces_f_as_fast_as_it_asks(x64):
    y = Y0.astype(float)
    new = end(DynamicBarrier(1.0, 0.5), 1, y)
    # F_y = (1, -2), f_y = (2, 0): lam = .5 - 2 / 4 = 0
    np.testing.assert_allclose(y - new, [1, -2], atol=1e-12)
    y = jnp.array([0.5, 0.0])  # F_y = (-.5, -1), f_y = (.5, 0): lam = .5 + 1
    np.testing.assert_allclose(y - end(DynamicBarrier(1.0, 0.5), 1, y), [0.25, -1], atol=1e-12)


def test_an_alternation_is_its_two_steps_in_turn(x64):
    y = Y0.astype(float)
    after = y - 0.1 * jax.grad(lower, 1)(None, y)
    after = after - 0.3 * jax.grad(upper, 1)(None, after)
    np.testing.assert_allclose(end(Alternating(0.1, 0.3), 1, y), after, rtol=1e-12)
    # one optimiser with one memory is not two
    shared, apart = (end(Alternating(optax.adam(0.1), other), 5, y) for other in (None, optax.adam(0.1)))
    rule, memory, z = optax.adam(0.1), optax.adam(0.1).init(y), y
    for k in range(10):
        updates, memory = rule.update(jax.grad((lower, upper)[k % 2], 1)(None, z), memory)
        z = z + updates
    np.testing.assert_allclose(shared, z, rtol=1e-9)
    assert float(jnp.abs(shared - apart).max()) > 1e-3
    many = end(Alternating(0.1, 0.3, lower_steps=3), 1, y)
    np.testing.assert_allclose(many[0], (2 * 0.9**3) - 0.3 * (2 * 0.9**3 - 1), rtol=1e-12)


def test_the_multiplier_grows_where_the_upper_loss_does_not_fall(x64):
    solver = LossMultiplier(0.01, rate=0.3, decay=0.0, slack=0.0, step_size=0.01, start=1.0)
    solved = jax.jit(lambda y: run(PROBLEM, solver, None, y, steps=1, key=0)[0])
    falls = solved(Y0.astype(float))  # (F_y + f_y) / 2 = (1.5, -1): F falls, Adam's first step is the rate
    np.testing.assert_allclose(falls.memory[1][0], 0.7, atol=1e-6)
    rises = solved(jnp.array([0.9, 1.0]))  # (-.1 + .9) / 2 moves away from 1
    np.testing.assert_allclose(rises.memory[1][0], 1.3, atol=1e-6)


def test_refusals():
    with pytest.raises(ProblemError, match="Alternating is for simple bilevel problems, where both levels own y"):
        run(PROBLEM, Alternating(0.1), jnp.ones(1), Y0, steps=1, key=0)
    with pytest.raises(ProblemError, match="cannot honour the coupled inequality"):
        run(Problem(upper, lower, constraint=lambda x, y: y), WeightedSum(0.1), None, Y0, steps=1, key=0)
    with pytest.raises(ValueError, match=r"PenaltyDescent\(start=0\): a positive number is needed"):
        PenaltyDescent(0.1, start=0)
    with pytest.raises(ValueError, match=r"Alternating\(lower_steps=0\)"):
        Alternating(0.1, lower_steps=0)
