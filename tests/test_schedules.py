"""Schedules of a lower step rule begin anew with each lower solve; everything else that a rule remembers goes on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, data, hypergradients, run, solvers
from bilevel.hypergradients import value_and_hypergradient
from bilevel.lower import GradientDescent, MomentumSGD, Relative
from bilevel.optimizers import rewound

STEPS = 4
DECAY = optax.linear_schedule(0.3, 0.0, STEPS)
PROBLEM = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: 0.5 * jnp.sum((y - x) ** 2))
X, Y = jnp.asarray([1.0, 2.0]), jnp.zeros(2)


class Weights(NamedTuple):
    w: jax.Array
    b: jax.Array


def counter():
    """A rule of one's own whose whole memory is its count."""
    update = lambda g, n, p=None: (jax.tree.map(lambda g: -DECAY(n) * g, g), n + 1)
    return optax.GradientTransformation(lambda p: jnp.zeros((), jnp.int32), update)


def switched():
    """Steps of 0.3 that end after the first four."""
    stop = optax.conditionally_transform(optax.set_to_zero(), lambda step: step >= STEPS)
    return optax.chain(optax.sgd(0.3), stop)


def every(label):
    return lambda p: jax.tree.map(lambda _: label, p)


RULES = {
    "sgd": optax.sgd(DECAY),
    "momentum": optax.sgd(DECAY, momentum=0.9),
    "adam": optax.adam(DECAY),
    "adamw, clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(DECAY)),
    "injected": optax.inject_hyperparams(optax.adam)(DECAY),
    "partitioned": optax.partition({"all": optax.adam(DECAY)}, every("all")),
    "masked": optax.masked(optax.sgd(DECAY), every(True)),
    "accumulated": optax.MultiSteps(optax.sgd(DECAY), 2).gradient_transformation(),
    "counter": counter(),
    "counter in a chain": optax.chain(counter(), optax.trace(0.5)),
    "switched": switched(),
}
POINTS = {
    "array": jnp.ones(2),
    "number": jnp.ones(()),
    "dict": {"count": jnp.ones(2), "step": jnp.ones(())},
    "named tuple": Weights(jnp.ones(2), jnp.ones(())),
}


# At points of other kinds: a rule of arrays, one within another and one whose whole memory is a number.
QUICK = ("adam", "injected", "counter")


@pytest.mark.parametrize(
    "point, name",
    [
        (point, name) if point == "array" or name in QUICK else pytest.param(point, name, marks=pytest.mark.slow)
        for point in POINTS
        for name in RULES
    ],
)
def test_counts_of_schedules_begin_anew_and_nothing_else(name, point):
    """Moments, and the count of their bias correction, are those that were there."""
    rule, y = RULES[name], POINTS[point]
    memory = rule.init(y)
    for _ in range(6):
        _, memory = rule.update(y, memory, y)
    found = rewound(memory, y)
    assert jax.tree.structure(found) == jax.tree.structure(memory)
    before, after = (jax.tree_util.tree_leaves_with_path(m) for m in (memory, found))
    changed = [
        jax.tree_util.keystr(path) for (path, a), (_, b) in zip(before, after, strict=True) if not np.array_equal(a, b)
    ]
    assert changed and not any("mu" in path or "nu" in path or "[0].count" in path for path in changed)
    assert all(path.endswith(("count", "step")) or name.startswith("counter") for path in changed)
    # The first update afterwards is of the first size again, where moments do not say otherwise.
    if name in ("sgd", "masked", "counter", "injected"):
        size = lambda memory: optax.tree.norm(rule.update(y, memory, y)[0])
        assert float(size(memory)) == 0
        np.testing.assert_allclose(size(found), size(rule.init(y)), rtol=1e-5)


@pytest.mark.parametrize("rule", [optax.adam(0.1), optax.lion(0.1), optax.adafactor(0.1), optax.radam(0.1)])
def test_a_rule_without_a_schedule_is_left_alone(rule):
    y = jnp.ones(3)
    memory = jax.jit(lambda y: rule.update(y, rule.init(y), y)[1])(y)
    for a, b in zip(*map(jax.tree.leaves, (memory, rewound(memory, y))), strict=True):
        np.testing.assert_array_equal(a, b)


def moved(solver, lower_solver, outer=6, **more):
    """y after so many outer steps that leave x where it is: F pulls nothing, x's step is as good as zero."""
    solver = solver(lower_solver, **more) if callable(solver) else solver
    return run(PROBLEM, solver, X, Y, outer)[0].y


def nested(estimator):
    return lambda lower: solvers.HypergradientDescent(estimator, lower, 1e-12)


NESTED = {
    "AID": nested(hypergradients.Implicit()),
    "truncated": nested(hypergradients.Unrolled(last=2)),
    "one step": nested(hypergradients.OneStep()),
    "unrolled": nested(hypergradients.Unrolled()),
    "forward": nested(hypergradients.Forward()),
    "SAMA": nested(hypergradients.SAMA(None)),
    "UpperFirst": lambda lower: solvers.UpperFirst(hypergradients.FirstOrder(), lower, 1e-12),
    "F2SA": lambda lower: solvers.F2SA(lower_solver=lower, upper_optimizer=1e-12, penalty=1e6),
}


@pytest.mark.parametrize("name", NESTED)
def test_warm_starts_do_not_run_a_schedule_out(name):
    """Each solve contracts y - x by the same factor; with a count that goes on y would stand after the first."""
    rates = 1 - np.asarray([DECAY(i) for i in range(STEPS)])
    found = moved(NESTED[name], GradientDescent(optax.sgd(DECAY), STEPS))
    np.testing.assert_allclose(found, X * (1 - np.prod(rates) ** 6), rtol=1e-4)
    counted_on = moved(NESTED[name], GradientDescent(optax.sgd(DECAY), STEPS, schedules="run"))
    np.testing.assert_allclose(counted_on, X * (1 - np.prod(rates)), rtol=1e-4)


FALLING = np.prod([1 - DECAY(i) for i in range(STEPS)])


@pytest.mark.parametrize("lower, factor", [
    (MomentumSGD(DECAY, 0.0, 0.0, None, STEPS), FALLING),
    (Relative(GradientDescent(optax.sgd(DECAY), STEPS, tol=1e-9)), FALLING),
    (GradientDescent(switched(), STEPS), 0.7**STEPS),
], ids=["MomentumSGD", "Relative", "switched"])  # fmt: skip
def test_every_lower_solver_of_steps_begins_its_schedules_anew(lower, factor):
    np.testing.assert_allclose(moved(NESTED["AID"], lower), X * (1 - factor**6), rtol=1e-4)


def test_one_step_per_call_counts_on_through_the_run():
    """As in architecture search, whose rate falls over the whole run."""
    rates = 1 - np.asarray([DECAY(i) for i in range(6)])
    for lower in (GradientDescent(optax.sgd(DECAY), 1), MomentumSGD(DECAY, 0.0, 0.0, None, 1)):
        np.testing.assert_allclose(moved(NESTED["UpperFirst"], lower), X * (1 - np.prod(rates)), rtol=1e-4)
    lower = GradientDescent(optax.sgd(DECAY), 1, schedules="solve")
    np.testing.assert_allclose(moved(NESTED["UpperFirst"], lower), X * (1 - 0.7**6), rtol=1e-4)


def test_an_own_loop_that_hands_the_state_back_begins_schedules_anew():
    at = jax.jit(value_and_hypergradient(PROBLEM, hypergradients.Implicit(), GradientDescent(RULES["sgd"], STEPS)))
    state, carry = Y, None
    for _ in range(3):
        estimate = at(X, state, carry)
        state, carry = estimate.lower, estimate.carry
    rates = 1 - np.asarray([DECAY(i) for i in range(STEPS)])
    np.testing.assert_allclose(state.y, X * (1 - np.prod(rates) ** 3), rtol=1e-5)


def test_adams_moments_go_on_through_a_warm_start():
    """Two solves of four steps are eight steps of Adam whose rate is that of the first four twice."""
    y, twice = Y, optax.adam(lambda n: DECAY(n % STEPS))
    memory = twice.init(y)
    for _ in range(2 * STEPS):
        updates, memory = twice.update(y - X, memory)
        y = optax.apply_updates(y, updates)
    np.testing.assert_allclose(moved(NESTED["AID"], GradientDescent(optax.adam(DECAY), STEPS), 2), y, rtol=1e-5)


def test_a_single_loops_schedule_is_over_the_run():
    rates = 1 - np.asarray([DECAY(i) for i in range(6)])
    found = moved(solvers.SOBA(1e-12, optax.sgd(DECAY), decay=None), None)
    np.testing.assert_allclose(found, X * (1 - np.prod(rates)), rtol=1e-4)


def test_inner_loops_of_stochastic_and_federated_methods_begin_theirs_anew():
    rates = 1 - np.asarray([DECAY(i) for i in range(STEPS)])
    problem = Problem(
        lambda x, y, b: jnp.sum((y - 1) ** 2), lambda x, y, b: 0.5 * jnp.sum((y - x) ** 2),
        *(data.Clients([np.zeros((4, 1), np.float32)] * 2) for _ in range(2)),
    )  # fmt: skip
    solver = solvers.FederatedNested(None, 1e-12, optax.sgd(DECAY), lower_rounds=STEPS, curvature=1.2)
    found = run(problem, solver, X, Y, 6)[0].y
    np.testing.assert_allclose(found, X * (1 - np.prod(rates) ** 6), rtol=1e-4)


def test_the_inner_loop_of_vrbo_begins_its_schedule_anew():
    """On a quadratic its directions are exact; with a count that goes on y would stand."""
    whole = Problem(lambda x, y, b: jnp.sum((y - 1) ** 2), lambda x, y, b: 0.5 * jnp.sum((y - x) ** 2),
                    *(np.zeros((8, 1), np.float32),) * 2)  # fmt: skip
    solver = solvers.VRBO(1e-12, optax.sgd(DECAY), lower_steps=STEPS, period=1)
    ends = jax.jit(lambda: [run(whole, solver, X, Y, n)[0].y for n in (2, 4)])()
    assert float(jnp.abs(ends[1] - X).max()) < 0.5 * float(jnp.abs(ends[0] - X).max())


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"GradientDescent\(schedules='epoch'\).*'solve'.*'run'"):
        GradientDescent(0.1, schedules="epoch")
    with pytest.raises(ValueError, match=r"MomentumSGD\(schedules=1\)"):
        MomentumSGD(schedules=1)
