"""The verdict where data have no end: the end is looked at on fixed draws, and their sampling error is a tolerance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, data, lower, solve, solvers
from bilevel.result import Result
from bilevel.solvers._draws import fixed_draws
from bilevel.solvers.certificate import certify

SIZE = 0.02
SOURCES = {
    "noiseless": lambda: data.Sampler(lambda key, arrays: jnp.zeros(())),
    "noisy": lambda: data.Sampler(lambda key, arrays: SIZE * jax.random.normal(key)),
    "stream": lambda: data.Stream([np.float32(SIZE), np.float32(-SIZE)]),
    "minibatches": lambda: data.Minibatches(np.array([SIZE, -SIZE]), 1),
    "keyed": lambda: data.Keyed(),
    "shared": lambda: data.Shared(data.Sampler(lambda key, arrays: SIZE * jax.random.normal(key))),
}


def drawn(upper, lower, source):
    """F = upper(x, y) + b sum x, f = lower(x, y - b) with b of mean zero."""

    def value(batch):
        return SIZE * jax.random.normal(batch[1].random) if isinstance(batch, tuple) else jnp.mean(batch)

    return Problem(
        lambda x, y, b: upper(x, y) + value(b) * jnp.sum(x),
        lambda x, y, b: lower(x, y - value(b)),
        upper_data=SOURCES[source](),
        lower_data=SOURCES[source](),
    )


# Where a run can end by its own measures, and what is wrong there.
WRONG = {
    "another well is lower": (
        lambda x, y: jnp.sum((x - y) ** 2),
        lambda x, y: jnp.sum((y**2 - 1) ** 2 - 0.9 * y),
        ([-0.8375], [-0.8375]),
        {"LOWER_LEVEL"},
    ),
    "two wells tie": (
        lambda x, y: jnp.sum((y + 1) ** 2 + x**2),
        lambda x, y: jnp.sum((y**2 - 1) ** 2),
        ([0.0], [1.0]),
        {"SEVERAL_MINIMISERS"},
    ),
    "a maximum in x": (
        lambda x, y: jnp.sum(x**4 / 2 - x**2),
        lambda x, y: jnp.sum((y - x) ** 2),
        ([0.0], [0.0]),
        {"NOT_STATIONARY", "LOCAL"},
    ),
    "a kink in x": (
        lambda x, y: jnp.sum(x**2 / 2 - y),
        lambda x, y: jnp.sum((y - jnp.abs(x)) ** 2),
        ([0.0], [0.0]),
        {"NOT_STATIONARY"},
    ),
    "a concave lower level": (
        lambda x, y: jnp.sum(x**2),
        lambda x, y: -jnp.sum((y - x) ** 2),
        ([0.0], [0.0]),
        {"UNBOUNDED", "LOWER_LEVEL"},
    ),
    "a singular lower level": (
        lambda x, y: (x[0] - 1) ** 2 + (y[1] - 3) ** 2,
        lambda x, y: (y[0] - x[0]) ** 2,
        ([1.0], [1.0, 0.0]),
        {"SEVERAL_MINIMISERS"},
    ),
}
# Every kind once, where it is cheapest, and one of each kind of draws besides; tests of whole runs have the others.
quick = {*((name, "minibatches") for name in WRONG), ("two wells tie", "noisy"), ("a kink in x", "shared")}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        pytest.param(name, source, marks=() if (name, source) in quick else pytest.mark.slow)
        for name in WRONG
        for source in SOURCES
        if source != "stream"
    ],
)
def test_a_wrong_end_is_seen_on_any_source(x64, name, source):
    upper, lower, at, words = WRONG[name]
    x, y = (jnp.asarray(part) for part in at)
    problem = drawn(upper, lower, source)
    problem = problem.whole() or problem
    found = certify(problem, x, y, (x + 1, y + 1), Result.CONVERGED, {}, 1e-2)
    assert found.result.name in words, found
    assert found.why


def right(source):
    """F = (y - 1)^2 + x^2/10 with y = x: x = 10/11."""
    return drawn(lambda x, y: jnp.sum((y - 1) ** 2 + 0.1 * x**2), lambda x, y: jnp.sum((y - x) ** 2), source)


@pytest.mark.parametrize("source", ["noiseless", "noisy", "keyed", pytest.param("shared", marks=pytest.mark.slow)])
def test_a_right_end_is_let_stand_and_the_sampling_error_is_said(x64, source):
    at = jnp.full(1, 10 / 11)
    found = certify(right(source), at, at, (at + 1, at + 1), Result.CONVERGED, {}, 1e-2)
    assert found.result is Result.CONVERGED, found
    said = " ".join(found.unchecked)
    assert ("are sampling error" in said) is (source != "noiseless")


def test_noise_above_the_tolerance_hides_the_end_and_is_said(x64):
    """f = (y - x)^2 + 10 b y: a change of f by one unit of y is lost in the noise of any affordable number of draws."""
    draw = data.Sampler(lambda key, arrays: 10 * jax.random.normal(key))
    problem = Problem(
        lambda x, y: jnp.sum((y - 1) ** 2 + 0.1 * x**2),
        lambda x, y, b: jnp.sum((y - x) ** 2 + b * y),
        lower_data=draw,
    )
    at = jnp.full(1, 10 / 11)
    found = certify(problem, at, at, (at + 1, at + 1), Result.CONVERGED, {}, 1e-3)
    assert found.result is Result.UNRESOLVED
    assert "Draw larger batches, or ask for a larger tolerance" in found.why
    ended = certify(problem, at, at, (at + 1, at + 1), Result.MAX_STEPS, {}, 1e-3)
    assert ended.result is Result.MAX_STEPS  # and not CONVERGED by the certificate's word


def test_the_sampling_error_is_that_of_the_mean_and_falls_as_draws_are_asked_for(x64):
    """F = b x with b = 1 + e, Var e = 1: a change of x by d changes F by d, with the error 3 d / sqrt(N) of N draws."""
    draw = data.Sampler(lambda key, arrays: 1 + jax.random.normal(key))
    problem = Problem(lambda x, y, b: b * jnp.sum(x), lambda x, y: jnp.sum((y - x) ** 2), upper_data=draw)
    one = jnp.ones(1)
    coarse = fixed_draws(problem, one, one, (one, one), 10.0)
    fine = fixed_draws(problem, one, one, (one, one), 0.2)
    assert coarse.draws == 64
    assert fine.draws > 500
    for found in (coarse, fine):
        np.testing.assert_allclose(found.upper, 3 / found.draws**0.5, rtol=0.3)
        assert found.lower == 0.0


SHARED = data.Shared(data.Sampler(lambda key, arrays: jax.random.normal(key)))


@pytest.mark.parametrize("keyed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_draws_that_each_have_a_lower_level_of_their_own_have_a_y_of_their_own(x64, keyed):
    """f = (y - x - b)^2 and F = (y - b)^2 + x^2 on the same b: y_i = x + b_i, and F = 2 x^2 whatever b."""
    read = (lambda b: b[0]) if keyed else (lambda b: b)
    tasks = data.Keyed(SHARED) if keyed else SHARED
    problem = Problem(
        lambda x, y, b: jnp.sum((y - read(b)) ** 2 + x**2), lambda x, y, b: jnp.sum((y - x - read(b)) ** 2),
        upper_data=tasks, lower_data=tasks,
    )  # fmt: skip
    one = jnp.ones(1)
    fixed = fixed_draws(problem, one, one, (one, one), 0.1)
    assert fixed.upper == fixed.lower == 0.0
    b = [read(source.arrays) for source in fixed.problem.sources]
    np.testing.assert_array_equal(*b)
    assert np.std(b[0]) > 0.3
    np.testing.assert_allclose(fixed.y[:, 0], 1 + b[0], rtol=1e-9)
    np.testing.assert_allclose(fixed.problem.full_upper()(one, fixed.y), 2.0, rtol=1e-9)


def test_the_error_of_draws_with_lower_levels_of_their_own_is_that_of_where_y_follows(x64):
    """h_b(x) = b x with b = 1 + e through y = b x: a change of x by d changes h by d, with the error 3 d / sqrt(N)."""
    problem = Problem(
        lambda x, y: jnp.sum(y),
        lambda x, y, b: jnp.sum((y - (1 + b) * x) ** 2),
        lower_data=SHARED,
    )
    one = jnp.ones(1)
    fixed = fixed_draws(problem, one, one, (one, one), 10.0)
    np.testing.assert_allclose(fixed.upper, 3 / fixed.draws**0.5, rtol=0.3)


def test_which_draws_with_lower_levels_of_their_own_are_not_looked_at_is_said():
    def loss(x, y, b):
        return jnp.sum((y - x - b) ** 2)

    for size, options, word in (
        (1, {"project_lower": lambda y: y}, "project_lower= binds one y"),
        (1_000, {}, "8 of 1,000 unknowns each are too many"),
    ):
        at = jnp.ones(size)
        problem = Problem(loss, loss, SHARED, SHARED, **options)
        found = certify(problem, at, at, (at, at), Result.CONVERGED, {}, 1e-2)
        assert word in found.why


@pytest.mark.parametrize(
    ("sign", "words"),
    [(-1, {"NOT_STATIONARY", "LOCAL"}), pytest.param(1, {"CONVERGED"}, marks=pytest.mark.slow)],
)
def test_a_run_on_shared_tasks_is_looked_at(sign, words):
    """h(x) = +-x^2 + x^4 / 2 on tasks of their own; the run stands at its stationary point x = 0 from the start."""
    problem = Problem(
        lambda x, y, b: jnp.sum(sign * (y - b) ** 2 + (y - b) ** 4 / 2),
        lambda x, y, b: jnp.sum((y - b - x) ** 2),
        upper_data=SHARED,
        lower_data=SHARED,
    )
    solver = solvers.AID(lower.Newton(), 1e-3)
    found = solve(problem, jnp.zeros(1), jnp.zeros(1), solver, steps=20, tol=1e-2, progress=False)
    assert found.result.name in words, found
    assert found.y.shape == (1,)


def test_draws_that_are_too_large_are_not_stacked():
    tables = data.Keyed(np.zeros((2**14, 2**10), np.float32))
    problem = Problem(lambda x, y, b: jnp.sum(b[0]) * x[0] + y[0], lambda x, y: (y[0] - x[0]) ** 2, upper_data=tables)
    one = jnp.ones(1)
    found = certify(problem, one, one, (one, one), Result.CONVERGED, {}, 1e-3)
    assert "a draw holds 64 MiB" in " ".join(found.unchecked)


def test_of_a_single_item_of_a_stream_nothing_is_known():
    for whole, error in ((False, np.inf), (True, 0.0)):
        item = data.Streamed(np.ones(1, np.float32), 1, whole)
        problem = Problem(lambda x, y, b: b * jnp.sum(x), lambda x, y: jnp.sum((y - x) ** 2), upper_data=item)
        one = jnp.ones(1)
        assert fixed_draws(problem, one, one, (one, one), 0.1).upper == error


@pytest.mark.parametrize("solver", [None, pytest.param(solvers.SOBA(0.05, 0.05), marks=pytest.mark.slow)])
def test_a_run_on_a_sampler_does_not_converge_at_a_wrong_well(solver):
    upper, lower, at, words = WRONG["another well is lower"]
    problem = drawn(upper, lower, "noiseless")
    found = solve(problem, jnp.zeros(1), jnp.asarray(at[1]) - 0.05, solver, steps=2000, tol=1e-3, progress=False)
    assert found.result.name in words


def test_a_stream_that_is_read_to_its_end_is_looked_at_on_all_its_items():
    """Two items, +b and -b: their mean is the whole problem, without an error."""
    found = solve(
        right("stream"), jnp.zeros(1), jnp.zeros(1), solvers.SOBA(0.05, 0.1), steps=2000, tol=1e-2, progress=False
    )
    assert found.certificate.measures.get("sampling_error", 0.0) == 0.0
    assert not any("not looked at" in said or "sampling" in said for said in found.certificate.unchecked)
    np.testing.assert_allclose(found.x, 10 / 11, rtol=0.2)


def test_a_schedule_by_the_step_is_looked_at_where_the_run_ended():
    """F = (y - s)^2 with s = 1 after ten steps, else 0."""
    problem = Problem(
        lambda x, y, b: jnp.sum((y - jnp.where(b[1].step > 10, 1.0, 0.0)) ** 2),
        lambda x, y: jnp.sum((y - x) ** 2),
        upper_data=data.Keyed(),
    )
    for step, result in ((0, Result.NOT_STATIONARY), (100, Result.CONVERGED)):
        at = jnp.ones(1)
        assert certify(problem, at, at, (at + 1, at + 1), Result.CONVERGED, {}, 1e-3, step=step).result is result
