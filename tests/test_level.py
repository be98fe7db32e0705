"""Levels, alone and many; sources as a protocol; step rules that withdraw, wherever they stand.

Kernels and their loops.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, data, derivatives, hypergradients, lower, optimizers, solve, solvers
from bilevel.data import ProblemError, as_step_key
from bilevel.keys import Draw

ROWS = np.arange(8.0)


def total(x, y, batch):
    return jnp.sum(batch) * jnp.sum(y) + 0 * jnp.sum(x)


def keyed_total(x, y, batch):
    samples, key = batch
    return total(x, y, samples) + 0.0 * key.step


# ---------------------------------------------------------------- many levels


def curved(x, y, batch):
    return jnp.mean((batch[0] @ y - batch[1]) ** 2) + jnp.sum(jnp.exp(x) * y**2)


def agents(size=None):
    rng = np.random.default_rng(0)
    return data.Agents((rng.normal(size=(3, 6, 4)), rng.normal(size=(3, 6))), size)


@pytest.mark.parametrize("who", ["all", np.array([2, 0])])
@pytest.mark.parametrize("size", [None, 2])
def test_a_stacked_level_is_each_agents_own(who, size, x64):
    source = agents(size)
    problem = Problem(curved, curved, agents(size), source)
    number = np.arange(3) if isinstance(who, str) else who
    rng = np.random.default_rng(1)
    x, y, v = (rng.normal(size=(len(number), 4)) for _ in range(3))
    weights = rng.uniform(1, 2, len(number))

    @jax.jit
    def stacked_level(*at):
        many = problem.levels(5, who).lower
        weighted = many.weighted(weights)
        return many.batch, weighted(*at[:2]), derivatives.gradient_and_products(weighted, *at)

    batches, whole, products = stacked_level(x, y, v)
    of_one = jax.jit(
        lambda batch, *at: (
            curved(*at[:2], batch),
            derivatives.gradient_and_products(lambda x, y: curved(x, y, batch), *at),
        )
    )
    value = 0.0
    for i, agent in enumerate(number):
        batch = jax.tree.map(lambda a, i=i: np.asarray(a)[i], batches)
        own = source.arrays[0][agent], source.arrays[1][agent]
        for taken, all_of_it in zip(batch, own, strict=True):
            assert all(any(np.array_equal(row, other) for other in all_of_it) for row in taken)  # its own samples
        alone, one = of_one(batch, x[i], y[i], v[i])
        value += weights[i] * alone
        for stacked, single in zip(products, one, strict=True):
            np.testing.assert_allclose(stacked[i], weights[i] * single, rtol=1e-12)
    np.testing.assert_allclose(whole, value, rtol=1e-12)


def test_full_batches_pooled_are_the_mean_over_agents(x64):
    problem = Problem(curved, curved, agents(), agents())
    x, y = np.zeros(4), np.ones(4)
    many = [np.broadcast_to(v, (3, 4)) for v in (x, y)]
    pooled, stacked = jax.jit(lambda: (problem.levels(0).lower(x, y), problem.levels(0, "all").lower(*many)))()
    np.testing.assert_allclose(pooled, stacked / 3, rtol=1e-12)


def test_the_streams_of_a_level_are_independent_and_named():
    source = lambda: data.Minibatches(np.arange(1000), 50)

    @jax.jit
    def drawn():
        upper, level = Problem(total, total, source(), source()).levels(3)
        return upper.batch, [level.batch, *(level.stream(tag).batch for tag in Draw)]

    upper, batches = drawn()
    assert len({tuple(np.asarray(batch).tolist()) for batch in batches}) == len(batches)
    assert len(set(Draw)) == len(Draw.__members__)
    assert not np.array_equal(upper, batches[0])


def test_a_level_is_frozen_and_carries_its_constraints():
    problem = Problem(
        total, total, ROWS, ROWS, constraint=lambda x, y, batch: y - batch[0], equality=lambda x, y: y - x
    )
    level = problem.levels(0).lower
    assert float(level.constraint(1.0, 3.0)) == 3.0 and float(level.equality(1.0, 3.0)) == 2.0
    assert problem.levels(0).upper.constraint is None
    above = dataclasses.replace(
        problem, upper_constraint=lambda x, y: x + y, upper_equality=lambda x, y, batch: x - batch[1]
    )
    upper = above.levels(0).upper
    assert float(upper.constraint(1.0, 3.0)) == 4.0 and float(upper.equality(1.0, 3.0)) == 1.0 - ROWS[1]
    with pytest.raises(ProblemError, match=r"upper_equality\(x, y, batch\) fails"):
        dataclasses.replace(above, upper_equality=lambda x, y, batch: x @ batch).validate(jnp.ones(2), 3.0)
    with pytest.raises(ProblemError, match="takes a function, not int"):
        dataclasses.replace(above, upper_constraint=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        level.batch = None
    drawn = dataclasses.replace(problem, lower_data=data.Minibatches(ROWS, 2)).levels(0).lower
    with pytest.raises(ProblemError, match="that batch is drawn anew at every step"):
        drawn.constraint  # noqa: B018
    assert float(drawn.equality(1.0, 3.0)) == 2.0


# ---------------------------------------------------------------- sources


SOURCES = {
    "Minibatches": lambda: data.Minibatches(ROWS, 2),
    "Agents": lambda: data.Agents(ROWS.reshape(2, 4), 2),
    "Clients": lambda: data.Clients([ROWS[:3], ROWS[3:]], 2),
    "arrays": lambda: ROWS,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_keyed_forwards_everything_but_the_key(kind):
    bare, keyed = data.as_source(SOURCES[kind]()), data.Keyed(SOURCES[kind]())
    for name in ("count", "random", "size", "parties", "owners", "stacked"):
        assert getattr(keyed, name) == getattr(bare, name), name
    problem, plain = (
        Problem(lambda x, y: 0.0, loss, lower_data=source) for loss, source in ((keyed_total, keyed), (total, bare))
    )
    assert float(problem.full_lower()(0.0, jnp.ones(()))) == float(plain.full_lower()(0.0, jnp.ones(()))) == 28.0
    assert problem.stochastic is plain.stochastic is bare.random
    key = as_step_key(4, 3)
    drawn, expected = jax.jit(lambda: (keyed.draw(key)[0], bare.draw(key)))()
    np.testing.assert_array_equal(drawn, expected)
    if bare.parties:
        (drawn, keys), expected = jax.jit(lambda: (keyed.draw_each(key), bare.draw_each(key)))()
        np.testing.assert_array_equal(drawn, expected)
        assert keys.step.tolist() == [3] * bare.parties


def test_keyed_arrays_are_full_batches_whose_key_moves_on():
    """Solvers for full batches take them, and the key still counts lower steps."""
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2) + 0.1 * jnp.sum(x**2),
        lambda x, y, batch: jnp.mean((y - x - 0 * batch[0].mean()) ** 2) + 0.0 * batch[1].step,
        lower_data=data.Keyed(ROWS),
    )
    solution = solve(problem, jnp.zeros(()), jnp.zeros(()), steps=50, tol=1e-5)
    np.testing.assert_allclose(solution.x, 1 / 1.1, rtol=1e-3)
    level = problem.draw_lower(as_step_key(0, 2))
    assert [int(level.redraw(i, 5).batch[1].step) for i in range(3)] == [10, 11, 12]


def test_srba_takes_keyed_minibatches_and_saga_says_why_not():
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2) + 0.1 * jnp.sum(x**2),
        lambda x, y, batch: jnp.mean((y - x - 0 * batch[0].mean()) ** 2),
        lower_data=data.Keyed(data.Minibatches(ROWS, 2, blocks=True)),
    )
    solution = solve(problem, jnp.zeros(()), jnp.zeros(()), solvers.SRBA(0.1, 0.2), steps=400)
    np.testing.assert_allclose(solution.x, 1 / 1.1, rtol=1e-3)
    with pytest.raises(ProblemError, match="have no numbers"):
        solve(problem, jnp.zeros(()), jnp.zeros(()), solvers.SABA(0.1, 0.2), steps=1)


class Shifted(data.Source, leaves=("arrays", "shift")):
    """A source of a user's: one class."""

    def __init__(self, arrays, shift):
        self.arrays, self.shift = arrays, shift

    def draw(self, key):
        return self.arrays + self.shift * jax.random.normal(key.random, self.arrays.shape)


def test_a_source_of_ones_own_is_one_class(tmp_path):
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2) + 0.1 * jnp.sum(x**2),
        lambda x, y, batch: jnp.mean((y - x - batch) ** 2),
        lower_data=Shifted(jnp.zeros(64), 0.01),
    )
    assert problem.stochastic and problem.sources[1].count == 64
    solver = solvers.SOBA(0.05, 0.2)
    solution = solve(problem, jnp.zeros(()), jnp.zeros(()), solver, steps=400, checkpoint=tmp_path)
    np.testing.assert_allclose(solution.x, 1 / 1.1, atol=0.05)
    other = dataclasses.replace(problem, lower_data=Shifted(jnp.ones(64), 0.01))
    from bilevel import CheckpointError

    with pytest.raises(CheckpointError, match="lower_data has changed"):
        solve(other, jnp.zeros(()), jnp.zeros(()), solver, steps=500, checkpoint=tmp_path)
    many = jax.vmap(lambda p: p.draw_lower(0)(0.0, 0.0))(
        dataclasses.replace(problem, lower_data=Shifted(jnp.zeros((5, 64)), jnp.arange(5.0)))
    )
    assert many.shape == (5,) and len(set(many.tolist())) == 5


# ---------------------------------------------------------------- rules that withdraw steps


def rosenbrock(x, y):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2 + 0 * jnp.sum(y)


SPECTRAL, QUASI_NEWTON = optimizers.spectral(), optimizers.quasi_newton()


@pytest.mark.parametrize(
    "rule, chain",
    [
        (SPECTRAL, optax.chain(optax.identity(), SPECTRAL)),
        (QUASI_NEWTON, optax.chain(optax.chain(QUASI_NEWTON))),
        pytest.param(SPECTRAL, optax.chain(optax.chain(SPECTRAL)), marks=pytest.mark.slow),
        pytest.param(QUASI_NEWTON, optax.chain(optax.identity(), QUASI_NEWTON), marks=pytest.mark.slow),
    ],
    ids=["spectral", "quasi-Newton in two chains", "spectral in two chains", "quasi-Newton"],
)
def test_a_rule_that_withdraws_is_found_in_a_chain(rule, chain, x64):
    """`solve` returns the accepted point, never the trial that comes next (28838.9 in place of 7.564 for spectral)."""
    problem = Problem(rosenbrock, lambda x, y: jnp.sum((y - x) ** 2))
    start = np.array([-1.2, 1.0])
    found, plain = (
        solve(problem, start, np.zeros(2), solvers.AID(upper_optimizer=taken), steps=8) for taken in (chain, rule)
    )
    np.testing.assert_array_equal(found.x, plain.x)
    loss = jax.jit(rosenbrock)
    for end in (found, plain):
        assert float(loss(end.x, end.y)) <= float(loss(start, end.y))


def test_two_rules_that_withdraw_or_a_part_of_the_variable_are_refused():
    problem = Problem(rosenbrock, lambda x, y: jnp.sum((y - x) ** 2))
    two = optax.chain(optimizers.spectral(), optimizers.quasi_newton())
    with pytest.raises(ValueError, match="cannot agree on where the variable stands"):
        solve(problem, jnp.zeros(2), jnp.zeros(2), solvers.AID(upper_optimizer=two), steps=2)
    part = optax.masked(optimizers.spectral(), {"a": True, "b": False})
    halves = Problem(lambda x, y: jnp.sum(y**2) + x["a"] ** 2 + x["b"] ** 2, lambda x, y: jnp.sum((y - x["a"]) ** 2))
    with pytest.raises(ValueError, match="only a part of the variable"):
        solve(halves, {"a": jnp.ones(()), "b": jnp.ones(())}, jnp.zeros(2), solvers.AID(upper_optimizer=part), steps=2)


def test_a_rule_that_withdraws_works_in_a_chain_of_the_lower_level(x64):
    problem = Problem(lambda x, y: jnp.sum(y) + jnp.sum(x), lambda x, y: rosenbrock(y, x))
    solver = lower.GradientDescent(optax.chain(optax.identity(), optimizers.quasi_newton()), 300, tol=1e-10)
    level = problem.draw_lower(0)
    y = jax.jit(lambda y: solver(level, np.zeros(2), solver.init(y)).y)(np.array([-1.2, 1.0]))
    np.testing.assert_allclose(y, [1.0, 1.0], atol=1e-8)


# ---------------------------------------------------------------- lower solvers made of steps


def quadratic(x, y):
    return 0.5 * y @ (jnp.diag(jnp.array([1.0, 3.0])) @ y) - x @ y + 0.1 * jnp.sum(y**4)


QUADRATIC = Problem(lambda x, y: jnp.sum((y - 1) ** 2), quadratic)
MADE_OF_STEPS = [
    lower.GradientDescent(0.1, 7),
    lower.GradientDescent(optax.sgd(0.1, momentum=0.5), 7),
    lower.MomentumSGD(0.1, 0.5, 0.01, clip=0.7, steps=7),
]


@pytest.mark.parametrize("solver", MADE_OF_STEPS)
def test_truncated_differentiation_takes_every_solver_made_of_steps(solver, x64):
    """Against autodiff of the last steps written out, and all of them against the whole."""
    upper, level = QUADRATIC.levels(0)

    def by_hand(x, start, last):
        def value(free):
            state = start
            for i in range(7):
                state = solver.advance(level, x if i < 7 - last else free, state)[0]
            return upper(free, state.y)

        return jax.grad(value)(x)

    @jax.jit
    def gradients(x, y):
        start = solver.init(y)
        of = lambda estimator: estimator(upper, level, solver, x, start, ()).gradient
        pairs = [(of(hypergradients.Unrolled(last=last)), by_hand(x, start, last)) for last in (1, 3, 7)]
        return pairs, of(hypergradients.Unrolled())

    pairs, whole = gradients(np.array([0.3, -0.4]), np.array([1.0, 2.0]))
    for truncated, expected in pairs:
        np.testing.assert_allclose(truncated, expected, rtol=1e-10)
    np.testing.assert_allclose(truncated, whole, rtol=1e-12)


class Halving:
    """A kernel of a user's, without an optax rule."""

    steps = 6

    def init(self, y):
        return lower.LowerState(y, jnp.zeros(()))

    def begin(self, x, state):
        return state

    def advance(self, level, x, state):
        gradient = level.gradient(x, state.y)
        return lower.LowerState(state.y - 0.2 * gradient, state.memory + 1), lambda: derivatives.norm(gradient)

    def end(self, state):
        return state

    def __call__(self, level, x, state):
        return self.end(lower.repeat(self, level, x, self.begin(x, state)))


def test_a_kernel_of_ones_own_runs_in_both_loops_and_is_truncated(x64):
    solver, (upper, level) = Halving(), QUADRATIC.levels(0)
    plain, many = lower.GradientDescent(0.2, 6), Halving()
    many.steps = 500

    @jax.jit
    def of(x, y):
        ends = [s(level, x, s.init(y)) for s in (solver, plain)]
        truncated = [
            hypergradients.Unrolled(last=2)(upper, level, s, x, s.init(y), ()).gradient for s in (solver, plain)
        ]
        end = lower.until(many, level, x, many.init(y), 1e-9)
        return ends, truncated, end, derivatives.norm(level.gradient(x, end.y))

    (run, expected), truncated, end, slope = of(np.array([0.3, -0.4]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(run.y, expected.y, rtol=1e-14)
    assert int(run.memory) == 6
    np.testing.assert_allclose(*truncated, rtol=1e-14)
    assert float(slope) <= 1e-9
    assert int(end.memory) < 500


def test_truncation_of_what_is_not_made_of_steps_is_refused():
    upper, level = QUADRATIC.levels(0)
    solver = lower.as_lower_solver(lambda level, x, y: y)
    with pytest.raises(ValueError, match="needs one made of steps"):
        hypergradients.Unrolled(last=2)(upper, level, solver, jnp.zeros(2), solver.init(jnp.zeros(2)), ())


def test_sama_adapts_to_momentum_sgd(x64):
    """Plain steps in both solvers are one and the same adaptation."""
    upper, level = QUADRATIC.levels(0)
    both = lower.GradientDescent(0.1, 3), lower.MomentumSGD(0.1, 0.0, 0.0, clip=None, steps=3)
    of = lambda x, y: [hypergradients.SAMA(None)(upper, level, s, x, s.init(y), None).gradient for s in both]
    found = jax.jit(of)(np.array([0.3, -0.4]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(*found, rtol=1e-12)
