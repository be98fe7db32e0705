"""Whole runs in reverse mode: every schedule of kept states is the same derivative, in the memory that it says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, data, lower
from bilevel._recompute import schedule
from bilevel._traces import equations
from bilevel.hypergradients import Unrolled, value_and_hypergradient

ROWS = np.random.default_rng(0).normal(size=(24, 3))
TARGETS = np.random.default_rng(1).normal(size=24)


def test_a_schedule_visits_every_step_and_needs_the_fewest():
    @functools.cache
    def fewest(steps, free):
        if steps == 1 or not free:
            return steps * (steps - 1) // 2
        return min(m + fewest(steps - m, free - 1) + fewest(m, free) for m in range(1, steps))

    for steps in range(1, 40):
        for keep in range(1, steps + 1):
            plan, again = schedule(steps, keep), 0
            kept = dict(enumerate(plan.first))
            for k in range(steps):
                state = kept[plan.begin[k]]
                assert state == plan.at[k]
                for row in range(plan.rows[k], plan.rows[k + 1]):
                    again += plan.to[row] - state
                    state = kept[plan.place[row]] = plan.to[row]
                assert state == steps - 1 - k
            assert len(kept) <= keep + 1  # one is scratch
            assert again == plan.steps
            assert again + plan.first[-1] == fewest(steps, keep - 1)


def weighed(x, y, batch):
    rows, targets, i = batch
    return jnp.mean(jax.nn.sigmoid(x["w"])[i] * (jnp.tanh(rows @ y["a"]) * y["b"] - targets) ** 2) + x["r"] * jnp.sum(
        y["a"] ** 2
    )


def plain(x, y, batch):
    rows, targets, _ = batch
    return jnp.mean((jnp.tanh(rows @ y["a"]) * y["b"] - targets) ** 2)


def training(dtype, sets=None):
    everything = (ROWS.astype(dtype), TARGETS.astype(dtype), np.arange(24))
    return (
        Problem(plain, weighed, everything, data.Minibatches(everything, 5), **(sets or {})),
        {"w": jnp.zeros(24, dtype), "r": jnp.asarray(0.1, dtype)},
        {"a": jnp.ones(3, dtype), "b": jnp.asarray(0.5, dtype)},
    )


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


ADAM = optax.adam(optax.cosine_decay_schedule(0.05, 23), eps_root=1e-8)
BOX = {"project_lower": lambda y: jax.tree.map(lambda v: jnp.clip(v, -0.6, 0.9), y)}
FROM_X = lower.GradientDescent(0.1, 23, start=lambda x, y: {"a": y["a"] * x["r"], "b": x["r"]})
ADAM_RUN = lower.GradientDescent(ADAM, 23)
ANEW = lower.Reinitialized(ADAM_RUN, lambda key: {"a": jax.random.normal(key, (3,)), "b": jnp.ones(())})
CASES = {
    "Adam, a schedule": (ADAM_RUN, {}, {}, (False, "sqrt", "log", 1)),
    "momentum": (lower.MomentumSGD(0.05, steps=23), {}, {}, ("log",)),
    "projected": (lower.GradientDescent(0.1, 23), BOX, {}, ("sqrt",)),
    "last": (lower.GradientDescent(ADAM, 30), {}, {"last": 23}, ("log",)),
    "a start that depends on x": (FROM_X, {}, {}, ("log",)),
    "begun anew": (ANEW, {}, {}, ("log",)),
}


@pytest.mark.parametrize("name", CASES)
def test_all_schedules_are_one_derivative(name, x64):
    solver, sets, options, others = CASES[name]
    problem, x, y = training(np.float64, sets)
    of = lambda keep: jax.jit(value_and_hypergradient(problem, Unrolled(checkpoint=keep, **options), solver))(x, y)
    whole = of("all")
    assert np.abs(flat(whole.gradient)).max() > 1e-4
    for keep in others:
        found = of(keep)
        np.testing.assert_allclose(flat(found.gradient), flat(whole.gradient), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(flat(found.lower), flat(whole.lower), rtol=1e-13)
        assert float(found.value) == pytest.approx(float(whole.value), rel=1e-14)


class Own(lower.GradientDescent):
    """Gradient descent with a gradient that the level does not give."""

    def advance(self, level, x, state):
        return self.move(level, x, state, jax.grad(level, 1)(x, state.y)), lambda: jnp.zeros(())


def test_of_large_states_gradients_are_kept_and_few_states(x64):
    """97 steps in stretches of ten, and seven before; and a step of one's own, which notes no gradient."""
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=6000))
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2),
        lambda x, y: jnp.sum(jnp.log(jnp.cosh(y - x["pull"] * target)) + x["decay"] * y**2),
    )
    x, y = {"pull": jnp.asarray(1.3), "decay": jnp.full(6000, 0.1)}, jnp.zeros(6000)
    descents = [lower.GradientDescent(rule, 97) for rule in (ADAM, optax.sgd(0.05, momentum=0.9))]
    for solver, bound in zip((*descents, Own(0.05, 97)), (0.7, 0.95, None), strict=True):
        of = lambda keep, solver=solver: jax.jit(value_and_hypergradient(problem, Unrolled(checkpoint=keep), solver))
        compiled = of("all").lower(x, y).compile()
        whole, found = compiled(x, y), of("sqrt")(x, y)
        np.testing.assert_allclose(flat(found.gradient), flat(whole.gradient), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(flat(found.lower.y), flat(whole.lower.y), rtol=1e-12)
        if bound:
            states = sum(leaf.nbytes for leaf in jax.tree.leaves((y, found.lower.memory)))
            assert compiled.memory_analysis().temp_size_in_bytes < bound * 97 * states


@pytest.mark.parametrize("code", ["quick", pytest.param("optimised", marks=[pytest.mark.slow, pytest.mark.optimised])])
def test_in_float32_all_schedules_are_the_same_numbers(code):
    """A step is compiled alike wherever it is computed again. The network is wide enough for XLA to fuse parts of it.

    Where its gradient is kept, one processor (AVX-512) contracts other products and sums of Adam's than elsewhere."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(60, 16)).astype(np.float32), rng.integers(0, 4, 60), np.arange(60))
    losses = lambda y, batch: optax.softmax_cross_entropy_with_integer_labels(
        jnp.tanh(jnp.tanh(batch[0] @ y["a"] + y["b"]) @ y["c"]) @ y["d"], batch[1]
    )
    problem = Problem(
        lambda x, y, batch: jnp.mean(losses(y, batch)),
        lambda x, y, batch: jnp.mean(jax.nn.sigmoid(x)[batch[2]] * losses(y, batch)),
        rows,
        data.Minibatches(rows, 20),
    )
    shapes = {"a": (16, 32), "b": (32,), "c": (32, 32), "d": (32, 4)}
    y = {name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for name, shape in shapes.items()}
    solver = lower.GradientDescent(optax.adam(1e-2, eps_root=1e-8), 60)
    of = lambda keep: jax.jit(value_and_hypergradient(problem, Unrolled(checkpoint=keep), solver))(jnp.zeros(60), y)
    whole, found = of("sqrt"), of("log")
    np.testing.assert_array_equal(found.gradient, whole.gradient)
    np.testing.assert_array_equal(flat(found.lower), flat(whole.lower))
    found = of("all")
    assert np.linalg.norm(found.gradient - whole.gradient) < 1e-6 * np.linalg.norm(whole.gradient)
    np.testing.assert_allclose(flat(found.lower), flat(whole.lower), rtol=1e-5, atol=1e-6)


def temporaries(keep, steps, width):
    """Those of a compiled metagradient, in copies of y and Adam's two moments."""
    problem = Problem(lambda x, y: jnp.sum(jnp.sin(y)), lambda x, y: jnp.sum(jnp.log(jnp.cosh(y - x))))
    of = value_and_hypergradient(problem, Unrolled(checkpoint=keep), lower.GradientDescent(optax.adam(0.1), steps))
    x = jnp.zeros(width)
    return jax.jit(lambda x, y: of(x, y).gradient).lower(x, x).compile().memory_analysis().temp_size_in_bytes / (
        3 * x.nbytes
    )


def test_memory_is_that_of_the_schedule():
    steps, width = 400, 1000
    copies = {keep: temporaries(keep, steps, width) for keep in ("all", "sqrt", "log", 50, True)}
    assert steps / 3 < copies["all"] < 0.47 * steps  # a gradient per step, and a state of three such every 20 steps
    assert temporaries("all", 100, width) > 4 / 3 * 100  # small: all states too
    assert copies["sqrt"] < 2 * steps**0.5
    assert copies["log"] < np.log2(steps) + 12
    assert 50 < copies[50] < 62
    assert copies[True] == copies["sqrt"]  # beyond 256 steps
    assert temporaries(True, 256, width) == pytest.approx(temporaries("all", 256, width), abs=1)


def test_the_programme_does_not_grow_with_the_run():
    def size(steps, keep):
        problem = Problem(lambda x, y: jnp.sum(jnp.sin(y)), lambda x, y: jnp.sum((y - x) ** 2))
        of = value_and_hypergradient(problem, Unrolled(checkpoint=keep), lower.GradientDescent(0.1, steps))
        return len(list(equations(jax.make_jaxpr(lambda x: of(x, x).gradient)(jnp.zeros(2)).jaxpr)))

    assert size(20, "log") == size(5000, "log") == size(5000, "sqrt")


def test_stacked_runs_and_captured_values(x64):
    """Under vmap; and differentiated in what a loss captures, which keeps all states and is right."""
    solver = lower.GradientDescent(optax.adam(0.1, eps_root=1e-6), 7)

    def gradient(x, scale, keep):
        problem = Problem(lambda x, y: jnp.sum((y - scale) ** 2), lambda x, y: jnp.sum(scale * (y - x) ** 2 + y**4))
        return value_and_hypergradient(problem, Unrolled(checkpoint=keep), solver)(x, jnp.array([0.1, 0.2])).gradient

    xs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    stacked = jax.jit(jax.vmap(lambda x: gradient(x, 1.3, 2)))(xs)
    np.testing.assert_allclose(stacked, [gradient(x, 1.3, "all") for x in xs], rtol=1e-12)
    total = lambda scale, keep: jnp.sum(jnp.sin(gradient(xs[0], scale, keep)))
    both = lambda keep: jax.jit(lambda s: (jax.grad(total)(s, keep), jax.jacfwd(total)(s, keep)))(1.3)
    np.testing.assert_allclose(both(2), both("all"), rtol=1e-11)


def test_what_cannot_be_kept_is_said():
    problem, x, y = training(np.float32)
    with pytest.raises(ValueError, match=r"keeps 24 states, and the run that is differentiated has 23 steps: give a"):
        value_and_hypergradient(problem, Unrolled(checkpoint=24), lower.GradientDescent(0.1, 23))(x, y)
    with pytest.raises(ValueError, match=r"keeps 9 states, and the run that is differentiated has 5 steps"):
        value_and_hypergradient(problem, Unrolled(last=5, checkpoint=9), lower.GradientDescent(0.1, 23))(x, y)
    with pytest.raises(ValueError, match=r"'half'\): the states to keep are 'all', 'sqrt', 'log', 'host', a number"):
        Unrolled(checkpoint="half")
    with pytest.raises(ValueError, match=r"checkpoint=0\): the number of states to keep is a positive integer"):
        Unrolled(checkpoint=0)
    with pytest.raises(ValueError, match=r"checkpoint=None\): give True, the default, or False for plain reverse mode"):
        Unrolled(checkpoint=None)
    with pytest.raises(ValueError, match=r"forward mode keeps no states at all"):
        Unrolled(mode="forward", checkpoint="sqrt")
    with pytest.raises(ValueError, match=r"needs one made of steps: .* not Function"):
        value_and_hypergradient(problem, Unrolled(checkpoint="log"), lambda level, x, y: y)(x, y)


def test_states_on_the_host(x64, monkeypatch):
    """The derivative of all schedules; a programme for a GPU that moves each state to the host and back, as far as that
    can be seen without one; and on a CPU a refusal."""
    problem, x, y = training(np.float64)
    of = lambda keep: jax.jit(value_and_hypergradient(problem, Unrolled(checkpoint=keep), ADAM_RUN))
    with pytest.raises(
        ValueError, match=r"'host'\) .* runs on a CPU, whose memory is the host's: take 'sqrt' or 'log', or"
    ):
        of("host")(x, y)
    monkeypatch.setattr("bilevel.hypergradients.unrolled._check_host_memory", lambda: None)
    np.testing.assert_allclose(flat(of("host")(x, y).gradient), flat(of("all")(x, y).gradient), rtol=1e-12, atol=1e-14)

    def moves(keep):
        gradient = jax.jit(
            lambda x, y: value_and_hypergradient(problem, Unrolled(checkpoint=keep), ADAM_RUN)(x, y).gradient
        )
        text = jax.export.export(gradient, platforms=["cuda"])(x, y).mlir_module()
        return [text.count(f'_xla_buffer_placement = "{kind}"') for kind in ("pinned_host", "device")]

    there, back = moves("host")
    assert there >= 5 and back >= 5  # the leaves of y and of both moments, but for what is not needed again
    assert moves("all") == [0, 0]


@pytest.mark.parametrize("keep", ["all", "sqrt"])
def test_a_step_that_changes_the_form_of_its_state_is_named(keep):
    class Forgetful(lower.GradientDescent):
        def advance(self, level, x, state):
            new, before = super().advance(level, x, state)
            return type(new)(new.y, (new.memory[0], None)), before

    problem, x, y = training(np.float32)
    with pytest.raises(TypeError, match=r"A step has to keep the form of its state: it made .* of "):
        value_and_hypergradient(problem, Unrolled(checkpoint=keep), Forgetful(optax.adam(0.1), 23))(x, y)
