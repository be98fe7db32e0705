"""A step rule's numbers are arguments of compiled code: another rate compiles nothing, and is that rate's own run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import float64

from bilevel import Problem, _rules, loop, lower, solve, solvers
from bilevel.runs import metagradient, multistart

GOAL = {"a": jnp.asarray([1.0, -2.0, 0.5]), "b": jnp.asarray([[0.3, 0.1], [2.0, -1.0]])}
ZERO = jax.tree.map(jnp.zeros_like, GOAL)
STEPS = 12


def apart(y: Any, x: Any) -> jax.Array:
    return sum(jnp.sum((a - b) ** 2 * (1 + jnp.arange(a.size).reshape(a.shape))) for a, b in zip(
        jax.tree.leaves(y), jax.tree.leaves(x), strict=True
    ))  # fmt: skip


def problem() -> Problem:
    return Problem(lambda x, y: apart(y, GOAL), lambda x, y: apart(y, x))


@contextlib.contextmanager
def compiles() -> Iterator[list[str]]:
    """What is compiled within."""
    found: list[str] = []
    count = lambda name, *_, **__: found.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def by_hand(rule: Any) -> Any:
    """Steps on x -> F(x, x), which is what the problem is."""
    rule = optax.with_extra_args_support(rule)

    @jax.jit
    def step(x: Any, memory: Any) -> Any:
        value, gradient = jax.value_and_grad(apart)(x, GOAL)
        updates, memory = rule.update(
            gradient, memory, x, value=value, grad=gradient, value_fn=lambda x: apart(x, GOAL)
        )
        return optax.apply_updates(x, updates), memory

    x, memory = ZERO, rule.init(ZERO)
    for _ in range(STEPS):
        x, memory = step(x, memory)
    return x


def own(rate: float) -> optax.GradientTransformation:
    """A rule of one's own in optax's form: sign descent with a memory."""

    def init(x: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, x), jnp.asarray(rate)

    def update(g: Any, memory: Any, x: Any = None) -> Any:
        mean = jax.tree.map(lambda m, g: 0.5 * m + 0.5 * g, memory[0], g)
        return jax.tree.map(lambda m: -memory[1] * jnp.sign(m) - rate * m, mean), (mean, memory[1] * 0.9)

    return optax.GradientTransformation(init, update)


RULES = {
    "sgd": lambda a: optax.sgd(a),
    "momentum": lambda a: optax.sgd(a, momentum=0.9, nesterov=True),
    "adam": lambda a: optax.adam(a),
    "adam with an eps_root": lambda a: optax.adam(0.05, eps=a, eps_root=a),
    "adamw with a mask": lambda a: optax.adamw(0.05, weight_decay=a, mask={"a": True, "b": False}),
    "rmsprop": lambda a: optax.rmsprop(a),
    "lion": lambda a: optax.lion(a),
    "clipped": lambda a: optax.chain(optax.clip_by_global_norm(10 * a), optax.adam(a)),
    "injected": lambda a: optax.inject_hyperparams(optax.adam)(a, b1=1 - a),
    "cosine": lambda a: optax.adam(optax.cosine_decay_schedule(a, 10)),
    "linear": lambda a: optax.sgd(optax.linear_schedule(a, 0.0, 10)),
    "warm-up": lambda a: optax.adam(optax.warmup_cosine_decay_schedule(0.0, a, 4, 12)),
    "masked": lambda a: optax.masked(optax.sgd(a), {"a": True, "b": True}),
    "parts": lambda a: optax.partition({"p": optax.adam(a), "q": optax.sgd(a / 2)}, {"a": "p", "b": "q"}),
    "finite": lambda a: optax.apply_if_finite(optax.sgd(a), 2),
    "Polyak": lambda a: optax.polyak_sgd(a, f_min=0.0),
    "schedule-free": lambda a: optax.contrib.schedule_free_sgd(a),
    "an array for a rate": lambda a: optax.adam(jnp.asarray(a)),
    "a number of numpy's": lambda a: optax.sgd(np.float32(a)),
    "one's own": own,
}  # fmt: skip


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("adam", "injected", "warm-up", "one's own", "parts") else pytest.mark.slow)
    for name in RULES
])  # fmt: skip
def test_another_rate_compiles_nothing_and_is_that_rates_own_run(name, monkeypatch):
    ends, solver = [], lambda rate: solvers.AID(lower.Newton(), upper_optimizer=RULES[name](rate))
    run = lambda rate: solve(problem(), ZERO, ZERO, solver(rate), steps=STEPS, progress=False)
    run(0.04)
    for rate in (0.02, 0.07):
        with compiles() as found:
            ends.append(run(rate))
        assert not found
        for leaf, wanted in zip(*map(jax.tree.leaves, (ends[-1].x, by_hand(RULES[name](rate)))), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(loop, "parted", lambda solver, variables: (solver, []))
    for rate, end in zip((0.02, 0.07), ends, strict=True):  # as it is with its numbers written into the programme
        plain = run(rate)
        exact = name not in ("linear", "warm-up")  # whose ends are subtracted
        for leaf, wanted in zip(*map(jax.tree.leaves, ((end.x, end.state), (plain.x, plain.state))), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=0 if exact else 3e-6, atol=0 if exact else 1e-6)
            assert leaf.dtype == wanted.dtype and leaf.weak_type == wanted.weak_type


@pytest.mark.parametrize("make", [
    lambda rule: solvers.SOBA(rule, 0.01),
    lambda rule: solvers.AID(lower.GradientDescent(rule, 5), upper_optimizer=0.01),
    lambda rule: solvers.ITD(5, rule, upper_optimizer=0.01),
    pytest.param(lambda rule: solvers.AID(lower.Newton(), upper_optimizer=rule), marks=pytest.mark.slow),
    pytest.param(lambda rule: solvers.F2BA(upper_optimizer=rule), marks=pytest.mark.slow),
])  # fmt: skip
def test_so_it_is_at_either_level_and_in_both_precisions(make, monkeypatch):
    def ends() -> list[Any]:
        found = []
        for count, rate in enumerate((0.04, 0.02, 0.07)):
            with compiles() as compiled:
                zero = jax.tree.map(jnp.zeros_like, jax.tree.map(np.asarray, ZERO))
                zero = jax.tree.map(lambda a: a.astype(float), zero)
                one = jax.tree.map(lambda a: a + 1, zero)
                found.append(solve(problem(), zero, one, make(optax.adam(rate)), steps=5, progress=False).x)
            assert count == 0 or not compiled or loop.parted is not _rules.parted
        return found

    for precision in (contextlib.nullcontext, float64):
        with precision():
            mine = ends()
            with monkeypatch.context() as patch:
                patch.setattr(loop, "parted", lambda solver, variables: (solver, []))
                plain = ends()
        for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=16 * jnp.finfo(one.dtype).eps)  # the compiler folds constants
        assert not np.array_equal(mine[0]["a"], mine[2]["a"])


# ---------------------------------------------------------------- what stays part of the programme


def travelling(rule: Any, variable: Any = ZERO) -> list[Any]:
    """The numbers of a rule that are arguments."""
    return jax.tree.leaves(_rules.parted(rule, (variable, variable))[1])


def plain_rule(scale: Any) -> optax.GradientTransformation:
    """-scale(g) for a function of the gradient."""
    return optax.GradientTransformation(lambda x: (), lambda g, s, x=None: (jax.tree.map(lambda g: -scale(g), g), s))


def branching(rate: float) -> Any:
    return plain_rule(lambda g: 0.01 * g if rate > 0.05 else rate * g)


def asking(rate: float) -> Any:
    return plain_rule(lambda g: (rate if isinstance(rate, float) else 0.5) * g)


def casting(rate: float) -> Any:
    return plain_rule(lambda g: float(rate) * g)


def counting(rate: float) -> Any:
    return plain_rule(lambda g: jnp.ones(int(100 * rate)).sum() / 100 * g)


def cancelling(rate: float) -> Any:
    return plain_rule(lambda g: (1 - (1 - 1e-4 * rate)) * 1e4 * g)


def accumulating(rate: float) -> Any:
    return optax.MultiSteps(optax.sgd(rate), 2).gradient_transformation()


@pytest.mark.parametrize("rule", [
    branching, counting, cancelling,
    *(pytest.param(rule, marks=pytest.mark.slow) for rule in (asking, casting, accumulating)),
])  # fmt: skip
def test_what_a_rule_computes_or_asks_in_python_is_its_own_programme(rule):
    assert 0.02 not in travelling(rule(0.02))
    for rate in (0.02, 0.06, 0.03):
        end = solve(
            problem(), ZERO, ZERO, solvers.AID(lower.Newton(), upper_optimizer=rule(rate)), steps=STEPS, progress=False
        )
        for leaf, wanted in zip(*map(jax.tree.leaves, (end.x, by_hand(rule(rate)))), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-5, atol=1e-6)


def test_a_number_that_another_rounding_would_show_stays():
    """1 - 0.999 has an error of 5e-5 in single precision; 1 - 0.5 has none, and in double precision nothing has."""
    assert travelling(optax.adam(0.1)) == [1e-8, 0.0, -0.1]
    assert travelling(optax.adam(0.1, b1=0.5)) == [0.5, 1e-8, 0.0, -0.1]
    assert travelling(optax.adam(0.1, b1=0.9)) == [1e-8, 0.0, -0.1]
    assert travelling(optax.adam(0.1, b1=0.75)) == [0.75, 1e-8, 0.0, -0.1]
    with float64():
        zero = jax.tree.map(lambda a: np.zeros(a.shape), ZERO)
        assert travelling(optax.adam(0.1), zero) == [0.9, 0.999, 1e-8, 0.0, -0.1]
    # the numbers of a schedule, in all its values
    assert travelling(optax.sgd(optax.linear_schedule(0.1, 0.0, 10))) == [0.0, 0.1]
    assert travelling(optax.sgd(optax.linear_schedule(0.1, 0.0999, 10))) == []


def test_what_is_an_argument_does_not_depend_on_the_rules_before():
    """Where a difference of two numbers decides, another one of them may decide otherwise."""

    def make(a: float, b: float, c: float) -> Any:
        return plain_rule(lambda g: (a - b) * g * c * a)

    pairs = [(0.1, 0.0999, 0.3), (0.5, 0.25, 0.3), (0.1, 0.0999, 0.2), (0.75, 0.0999, 0.3), (0.1, 0.25, 0.3)]
    alone = []
    for numbers in pairs:
        _rules._known.cache_clear()
        alone.append(travelling(make(*numbers)))
    assert alone[0] == [0.3] and alone[1] == [0.5, 0.25, 0.3]
    for _ in range(2):
        for numbers, wanted in zip(pairs, alone, strict=True):
            assert travelling(make(*numbers)) == wanted


def test_a_rule_that_changes_when_it_is_called_is_the_same_rule_after_it():
    """optax's cosine schedule makes its number of steps a float, which must not become an argument for that: a run's
    bits would depend on what the process did before."""
    rule = optax.adam(optax.cosine_decay_schedule(0.05, 60))
    before = travelling(rule)
    updates = rule.update(GOAL, rule.init(ZERO), ZERO)[0]
    assert travelling(rule) == before == [1e-8, 0.0, 0.0, 1.0, 0.05]
    solver = solvers.AID(lower.Newton(), upper_optimizer=rule)
    again = _rules.joined(*_rules.parted(solver, (ZERO, ZERO))).upper_optimizer
    np.testing.assert_array_equal(again.update(GOAL, again.init(ZERO), ZERO)[0]["a"], updates["a"])


def test_a_value_that_a_library_asks_for_by_its_type_is_seen():
    """The same operations with another number in them are not the same."""
    space: dict[str, Any] = {"optax": optax, "jax": jax, "float": float}
    text = "def make(rate):\n    take = lambda g: -(rate if isinstance(rate, float) else 0.5) * g\n"
    text += "    update = lambda g, s, x=None: (jax.tree.map(take, g), s)\n"
    text += "    return optax.GradientTransformation(lambda x: (), update)\n"
    exec(compile(text, f"{optax.__path__[0]}/made.py", "exec"), space)  # as an installed package's
    assert travelling(space["make"](0.02)) == []


def test_states_of_another_type_are_seen():
    """A rate as a Python number makes a state of float32; a traced one would make another (weak) type."""

    def make(rate: float) -> Any:
        kept = lambda x: rate if isinstance(x, jax.core.Tracer) else 0.0
        return optax.GradientTransformation(lambda x: np.multiply(rate, 1), lambda g, s, x=None: (g, kept(x)))

    assert travelling(make(0.02)) == []


def test_a_rule_that_fits_the_variable_alone_is_tried_on_it():
    labels = {"a": "p", "b": "q"}
    rule = optax.partition({"p": optax.sgd(0.1), "q": optax.sgd(0.2)}, labels)
    assert travelling(rule) == [-0.1, -0.2]
    solver = solvers.AID(lower.GradientDescent(0.1, 5), upper_optimizer=rule)
    held, rules = _rules.parted(solver, (ZERO, jnp.zeros(3)))
    assert jax.tree.leaves(rules) == [-0.1, -0.2]
    assert held.upper_optimizer is not rule and held.lower_solver is solver.lower_solver
    again = _rules.joined(held, rules)
    assert repr(again.lower_solver) == repr(solver.lower_solver) and type(again) is type(solver)
    updates = again.upper_optimizer.update(GOAL, again.upper_optimizer.init(GOAL), GOAL)[0]
    np.testing.assert_allclose(updates["b"], -0.2 * GOAL["b"])
    assert _rules.parted(solver, None) == (solver, [])


# ---------------------------------------------------------------- who else has solvers


@dataclasses.dataclass(frozen=True)
class Mine:
    """A solver of one's own: steps on F(x, x)."""

    rule: Any

    def init(self, problem: Any, x: Any, y: Any, key: Any) -> Any:
        return solvers_state(x, y, self.rule.init(x))

    def step(self, problem: Any, state: Any, key: Any) -> Any:
        value, gradient = jax.value_and_grad(apart)(state.x, GOAL)
        updates, memory = self.rule.update(gradient, state.memory, state.x)
        x = optax.apply_updates(state.x, updates)
        return solvers_state(x, x, memory), {"upper_loss": value}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class solvers_state:
    x: Any
    y: Any
    memory: Any


def test_a_solver_of_ones_own_that_is_a_dataclass_has_it_too():
    for count, rate in enumerate((0.04, 0.02, 0.07)):
        with compiles() as found:
            end = solve(problem(), ZERO, ZERO, Mine(optax.adam(rate)), steps=STEPS, progress=False)
        assert count == 0 or not found
        np.testing.assert_allclose(end.x["a"], by_hand(optax.adam(rate))["a"], rtol=1e-5, atol=1e-6)


def test_many_starts_and_long_derivatives_have_it_too():
    starts = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), ZERO)
    small = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum((y - x) ** 2))
    ends: list[Any] = []
    for count, rate in enumerate((0.04, 0.02, 0.07)):
        with compiles() as found:
            made = multistart(
                problem(), starts, starts, solvers.AID(lower.Newton(), upper_optimizer=optax.adam(rate)), steps=3
            )
            given = lower.GradientDescent(optax.adam(rate, eps_root=1e-3), 4)
            ends.append(metagradient(small, jnp.zeros(2), jnp.ones(2), given, progress=False).gradient)
        assert count == 0 or not found
        np.testing.assert_allclose(abs(made.xs["a"][0]), 3 * rate, rtol=0.2)
    assert abs(ends[1][0]) < abs(ends[0][0]) < abs(ends[2][0])
