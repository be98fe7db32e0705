"""The single loop with probed steps, and what `solve` takes for minibatches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_stochastic import make, problem_of, start

from bilevel import Problem, Result, data, run, solve
from bilevel.solvers import AID, SOBA, ProbedSingleLoop, default_solver
from bilevel.solvers._variance_reduction import SAGA, SARAH, STORM, Plain

D = 6


def ridge(upper=1.0, lower=1.0, x=1.0, y=1.0, size=8, power=1.0):
    """A penalty per feature of a least-squares fit; its losses and variables times these units."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=D)
    features = [(rng.normal(size=(64, D)) * np.geomspace(1, power, D)).astype(np.float32) for _ in range(2)]
    train, held = ((a, (a @ truth + 0.5 * rng.normal(size=64)).astype(np.float32)) for a in features)
    fit = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    problem = Problem(
        lambda u, w, batch: upper * (fit(w / y, batch) + 0.01 * jnp.sum((u / x) ** 2)),
        lambda u, w, batch: lower * (fit(w / y, batch) + jnp.sum(jnp.exp(u / x) * (w / y) ** 2) / 2),
        data.Minibatches(held, size, blocks=True),
        data.Minibatches(train, size, blocks=True),
    )
    return problem, jnp.full(D, -x, jnp.float32), jnp.zeros(D, jnp.float32)


@pytest.mark.parametrize(("reduction", "steps"), [(None, 3000), (SAGA(), 3000), (SARAH(), 4000)], ids=str)
def test_it_reaches_the_closed_form_without_a_step_size(x64, reduction, steps):
    q = make()
    state, metrics = run(problem_of(q), ProbedSingleLoop(reduction), *start(), steps)
    x, y, v = q.solution()
    for found, right in zip((state.x, state.y, state.v), (x, y, v), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)
    assert metrics["returns"][-1] == 0


def test_without_reduction_the_steps_fade_and_the_error_with_them(x64):
    q = make()
    x, _, _ = q.solution()
    error = lambda steps: np.linalg.norm(run(problem_of(q), ProbedSingleLoop(Plain()), *start(), steps)[0].x - x)
    few, many = error(500), error(20_000)  # steps of t^-1/2: the noise leaves an error of t^-1/4, .4 of it here
    assert many < 0.5 * few
    assert many < 0.02 * np.linalg.norm(start()[0] - x)


ONES = dict.fromkeys(("upper", "lower", "x", "y"), 1.0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def end(solver, steps, whole, units):
    """Where a run ends, in units of one; those that are given are arguments, so that one programme serves all."""
    problem, x0, y0 = ridge(**units)
    state, _ = run(problem.whole() if whole else problem, solver, x0, y0, steps)
    return state.x / units["x"], state.y / units["y"]


@pytest.mark.parametrize("unit", ONES)
@pytest.mark.parametrize("factor", [2.0**-24, 2.0**24])
def test_another_unit_changes_no_step(unit, factor):
    """Powers of two: losses' units leave every bit alone, those of variables all but rounding."""
    plain, scaled = (end(ProbedSingleLoop(), 400, False, units) for units in (ONES, {**ONES, unit: factor}))
    np.testing.assert_allclose(scaled[0], plain[0], rtol=2e-4)
    np.testing.assert_allclose(scaled[1], plain[1], rtol=2e-3, atol=1e-6)


def test_another_unit_changes_no_step_of_what_takes_all_samples():
    """Units of losses and of x change rounding alone; y's changes where lower solves end, which are as exact as x
    needs."""
    x = lambda units: end(AID(), 8, True, units)[0]
    plain = x(ONES)
    assert np.linalg.norm(plain + 1) > 0.5
    for unit in ONES:
        for factor in (2.0**-7, 2.0**7):
            np.testing.assert_allclose(x({**ONES, unit: factor}), plain, atol=1e-3 if unit == "y" else 1e-5)


def test_what_it_takes_follows_the_data():
    problem, x0, y0 = ridge()
    reduction = lambda p: type(ProbedSingleLoop()._reduction(p, x0, y0))
    assert reduction(problem) is SAGA
    loose = Problem(problem.upper, problem.lower, *(data.Minibatches(s.arrays, 8) for s in problem.sources))
    assert reduction(loose) is SARAH
    endless = Problem(
        problem.upper, problem.lower, *(data.Sampler(lambda key, arrays: arrays, s.arrays) for s in problem.sources)
    )
    assert reduction(endless) is Plain
    with pytest.raises(ValueError, match=r"give Plain\(\), SAGA\(\) or SARAH\(\), or None"):
        ProbedSingleLoop(STORM())
    with pytest.raises(ValueError, match="ProbedSingleLoop cannot honour the lower projection"):
        solve(Problem(problem.upper, problem.lower, *problem.sources, project_lower=lambda y: y), x0, y0,
              ProbedSingleLoop())  # fmt: skip


def test_x_is_projected(x64):
    q = make()
    problem = problem_of(q, project_upper=lambda x: jnp.clip(x, -0.1, 0.1))
    x = run(problem, ProbedSingleLoop(), *start(), 2000)[0].x
    slope = q.hypergradient(x, q.solution()[1])
    assert np.all(np.abs(x) <= 0.1)
    a, c, b = (z.mean(0) for z in q.lower)
    slope = q.hypergradient(x, -np.linalg.solve(a, c @ x + b))
    np.testing.assert_allclose(x, np.clip(x - slope, -0.1, 0.1), atol=1e-6)


def test_an_ill_conditioned_lower_level_is_said_and_nothing_diverges():
    problem, x0, y0 = ridge(power=300.0)
    solution = solve(problem, x0, y0, ProbedSingleLoop(), steps=4000)
    assert np.all(np.isfinite(solution.x))
    assert np.all(np.isfinite(solution.y))
    if solution.history["returns"][-1] > 0:
        assert "ill-conditioned" in solution.reason


def test_a_linear_upper_level_has_no_curvature_and_that_is_said():
    problem, _, y0 = ridge()
    flat = Problem(lambda x, y, batch: jnp.sum(x), lambda x, y, batch: jnp.sum((y - 1) ** 2) + 0 * jnp.sum(x),
                   *problem.sources)  # fmt: skip
    solution = solve(flat, jnp.zeros(2), y0, ProbedSingleLoop(), steps=100)
    np.testing.assert_array_equal(solution.x, 0)
    assert "No curvature" in solution.reason


# ---------------------------------------------------------------- what `solve` takes for minibatches


def test_samples_that_are_few_are_passed_over_whole_and_the_run_ends_by_itself(x64):
    q = make()
    solution = solve(problem_of(q), *start(), steps=100_000)
    assert "on all samples in place of minibatches" in solution.reason
    assert solution.steps < 100
    assert solution.result is Result.COMPLETED
    np.testing.assert_allclose(solution.x, q.solution()[0], atol=1e-4)
    judged = solve(problem_of(q), *start(), tol=1e-6)
    assert judged.result is Result.CONVERGED
    np.testing.assert_allclose(judged.x, q.solution()[0], atol=1e-5)


def test_samples_that_are_many_are_not(monkeypatch):
    problem, x0, y0 = ridge()
    assert not default_solver(problem, x0, y0).problem.stochastic
    monkeypatch.setattr("bilevel.solvers.default._PASS_BYTES", 1000)
    chosen = default_solver(problem, x0, y0)
    assert isinstance(chosen.solver, ProbedSingleLoop)
    assert chosen.problem is problem


def test_a_pass_counts_samples_and_what_is_computed_from_them():
    problem, x0, y0 = ridge()
    samples = 2 * 64 * (D + 1) * 4
    assert samples < problem.pass_bytes(x0, y0) < 4 * samples
    looped = Problem(lambda x, y: jnp.sum(y), lambda x, y: jax.lax.scan(lambda c, _: (c + x, None), y, None, 100)[0][0])
    assert looped.pass_bytes(jnp.zeros(D), jnp.zeros(D)) >= 100 * 4 * D
    sampled = data.Sampler(lambda key, arrays: arrays, problem.lower_data.arrays)
    endless = Problem(problem.upper, problem.lower, problem.upper_data, sampled)
    assert endless.pass_bytes(x0, y0) == np.inf
    assert endless.whole() is None


def test_a_loss_that_takes_batches_of_one_size_keeps_its_minibatches():
    problem, x0, y0 = ridge()
    stiff = lambda x, y, batch: problem.lower(x, y, jax.tree.map(lambda a: a.reshape(8, *a.shape[1:]), batch))
    fixed = Problem(problem.upper, stiff, *problem.sources)
    assert isinstance(default_solver(fixed, x0, y0).solver, ProbedSingleLoop)


def test_where_minibatches_do_not_get_there_all_samples_are_tried(monkeypatch):
    monkeypatch.setattr("bilevel.solvers.default._PASS_BYTES", 1000)
    problem, x0, y0 = ridge(power=30.0)
    solution = solve(problem, x0, y0, steps=60, tol=1e-6)
    assert solution.result is Result.CONVERGED
    assert "on all samples in place of minibatches" in solution.reason
    assert type(solution.solver) is type(AID())


def test_a_solver_that_is_named_keeps_the_minibatches():
    problem, x0, y0 = ridge()
    solution = solve(problem, x0, y0, SOBA(0.1, 0.1), steps=5)
    assert solution.steps == 5
    assert "all samples" not in solution.reason
    assert optax.tree.size(solution.x) == D


@pytest.mark.parametrize("unit", ONES)
@pytest.mark.parametrize("factor", [2.0**-24, 2.0**24])
def test_neither_does_it_change_aids(unit, factor):
    plain, scaled = (end(AID(), 30, True, units)[0] for units in (ONES, {**ONES, unit: factor}))
    np.testing.assert_allclose(scaled, plain, atol=1e-5)
