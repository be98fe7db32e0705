"""The front door.

`solve` and `run` on a problem whose solution is known, and everything that can go wrong with them.
"""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, ProblemError, Result, data, lower, optimizers, run, solve, solvers

# y*(x) = x + c and F = |y - 1|^2 + |x|^2 give x* = (1 - c)/2, y* = (1 + c)/2.
C = np.array([0.5, -1.0, 2.0], np.float32)


def upper(x, y):
    return jnp.sum((y["a"] - 1) ** 2) + jnp.sum(x**2)


def lower_loss(x, y):
    return jnp.sum((y["a"] - x - C) ** 2 * jnp.array([1.0, 2.0, 5.0]))


PROBLEM = Problem(upper=upper, lower=lower_loss)
X0, Y0 = np.zeros(3, np.float32), {"a": np.zeros(3, np.float32)}
FAST = solvers.HypergradientDescent(lower_solver=lower.GradientDescent(0.1, 20), upper_optimizer=0.1)


def noisy_lower(x, y, batch):
    return jnp.mean(jnp.sum((y["a"] - x - batch) ** 2, -1))


RNG = np.random.default_rng(0)
SAMPLES = (C + RNG.normal(size=(40, 3))).astype(np.float32)
NOISY = Problem(upper=upper, lower=noisy_lower, lower_data=data.Minibatches(SAMPLES, 8))


def same(a, b):
    return all(np.array_equal(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_default_solver_reaches_the_closed_form_and_says_what_it_is(x64, caplog):
    x0, y0 = np.zeros(3), {"a": np.zeros(3)}
    solver = solvers.AID(lower_solver=lower.LBFGS(tol=1e-11))
    solution = solve(PROBLEM, x0, y0, solver, tol=1e-9, steps=200)
    assert solution.result is Result.CONVERGED
    np.testing.assert_allclose(solution.x, (1 - C) / 2, atol=1e-8)
    np.testing.assert_allclose(solution.y["a"], (1 + C) / 2, atol=1e-8)
    with caplog.at_level(logging.INFO, "bilevel"):
        chosen = solve(PROBLEM, x0, y0, steps=2)
    assert "Chose AID" in caplog.text
    assert "Chose AID" in chosen.reason


def test_chunks_of_any_length_give_the_same_bits():
    runs = [solve(NOISY, X0, Y0, FAST, steps=37, chunk=chunk, key=3) for chunk in (None, 1, 7)]
    for other in runs[1:]:
        assert same((runs[0].x, runs[0].y, runs[0].state), (other.x, other.y, other.state))
        assert same(dict(runs[0].history), dict(other.history))
    state, metrics = jax.jit(lambda p: run(p, FAST, jnp.asarray(X0), jax.tree.map(jnp.asarray, Y0), 37, 3))(NOISY)
    np.testing.assert_allclose(state.x, runs[0].x, rtol=1e-5)
    np.testing.assert_allclose(metrics["upper_loss"], runs[0].history["upper_loss"], rtol=1e-4)


def test_keys_decide_the_run():
    a, b, c = (solve(NOISY, X0, Y0, FAST, steps=5, key=k) for k in (1, 1, 2))
    assert same(a.x, b.x)
    assert not same(a.x, c.x)


def test_the_callers_arrays_survive():
    x0, y0 = jnp.asarray(X0), {"a": jnp.asarray(Y0["a"])}
    solve(PROBLEM, x0, y0, FAST, steps=3)
    np.testing.assert_array_equal(x0, X0)
    np.testing.assert_array_equal(y0["a"], Y0["a"])


def test_run_is_pure_vmaps_over_starts_keys_and_step_sizes_and_differentiates(x64):
    x0, y0 = jnp.zeros(3), {"a": jnp.zeros(3)}

    @jax.jit
    def final(step, key=0, x0=x0):
        solver = solvers.HypergradientDescent(lower_solver=lower.GradientDescent(0.1, 5), upper_optimizer=step)
        return run(PROBLEM, solver, x0, y0, 10, key)[1]["upper_loss"][-1]

    steps = jnp.array([0.01, 0.05, 0.1])
    np.testing.assert_allclose(jax.vmap(final)(steps), [final(s) for s in steps], rtol=1e-12)
    starts = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(
        jax.vmap(lambda x: final(0.1, x0=x))(starts), [final(0.1, x0=x) for x in starts], rtol=1e-12
    )
    slope = (final(0.05 + 1e-6) - final(0.05 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(final)(0.05), slope, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(final, (0.05,), (1.0,))[1], slope, rtol=1e-6)

    noisy = jax.jit(lambda key: run(NOISY, FAST, x0.astype(jnp.float32), jax.tree.map(jnp.float32, y0), 3, key)[0].x)
    together = jax.vmap(noisy)(jax.vmap(jax.random.key)(jnp.arange(2)))
    assert not np.array_equal(together[0], together[1])
    np.testing.assert_allclose(together[1], noisy(jax.random.key(1)), rtol=1e-5)


def test_many_problems_at_once_by_vmap_over_their_data(x64):
    targets = np.stack([SAMPLES[:10], SAMPLES[10:20] + 1.0]).astype(float)
    problem = Problem(upper=upper, lower=noisy_lower, lower_data=targets)
    x0, y0 = jnp.zeros(3), {"a": jnp.zeros(3)}
    f = jax.jit(lambda p: run(p, FAST, x0, y0, 100)[0].x)
    together = jax.vmap(f)(problem)
    for i in range(2):
        c = targets[i].mean(0)
        np.testing.assert_allclose(together[i], f(dataclasses.replace(problem, lower_data=targets[i])), rtol=1e-10)
        np.testing.assert_allclose(together[i], (1 - c) / 2, atol=1e-4)


def test_sources_reach_the_neighbourhood_of_the_solution():
    mean = SAMPLES.mean(0)
    stream = data.Stream([SAMPLES[i : i + 8] for i in range(0, 40, 8)], draws=10)
    sampler = data.Sampler(lambda key, a: a[jax.random.randint(key, (8,), 0, 40)], SAMPLES)
    clients = data.Clients([SAMPLES[:10], SAMPLES[10:40]])
    solver = solvers.HypergradientDescent(lower_solver=lower.GradientDescent(0.05, 10), upper_optimizer=0.02)
    for source, tolerance in (
        (SAMPLES, 1e-3),
        (data.Minibatches(SAMPLES, 8, blocks=True), 0.25),
        (stream, 0.25),
        (sampler, 0.25),
        (clients, 1e-3),
    ):
        problem = Problem(upper=upper, lower=noisy_lower, lower_data=source)
        solution = solve(problem, X0, Y0, solver, steps=300)
        np.testing.assert_allclose(solution.x, (1 - mean) / 2, atol=tolerance, err_msg=repr(source))


def test_a_stream_is_one_and_the_same_in_any_chunks():
    stream = data.Stream([SAMPLES[i : i + 8] for i in range(0, 40, 8)], draws=20)
    problem = Problem(upper=upper, lower=noisy_lower, lower_data=stream)
    a, b = (solve(problem, X0, Y0, FAST, steps=13, chunk=c) for c in (3, 13))
    assert same((a.x, a.y), (b.x, b.y))


def test_user_metrics_are_taken_on_schedule_with_their_data_as_arguments():
    target = np.float32(1.0)
    metrics = {"first": lambda x, y: x[0], "distance": (lambda x, y, t: jnp.abs(y["a"] - t).max(), target)}
    solution = solve(PROBLEM, X0, Y0, FAST, steps=10, metrics=metrics, metrics_every=4)
    assert solution.history.steps["first"].tolist() == [0, 4, 8, 10]
    assert solution.history["first"][0] == 0
    assert solution.history["first"][-1] == solution.x[0]
    assert solution.history["upper_loss"].shape == (10,)
    frame = solution.history.to_frame()
    assert frame.loc[4, "first"] == solution.history["first"][1]
    assert frame["first"].notna().sum() == 4
    assert "first = " in repr(solution)


def test_callbacks_see_the_run_and_can_stop_it():
    seen = []

    def callback(event):
        seen.append((event.step, float(event.x[0]), len(event.history["upper_loss"])))
        return event.step >= 6

    solution = solve(PROBLEM, X0, Y0, FAST, steps=50, callback=callback, callback_every=3)
    assert [s for s, _, _ in seen] == [3, 6]
    assert [n for _, _, n in seen] == [3, 6]
    assert solution.result is Result.STOPPED
    assert solution.steps == 6


def test_divergence_is_caught_within_the_chunk_with_the_last_finite_iterate(caplog):
    wild = solvers.HypergradientDescent(lower_solver=lower.GradientDescent(0.1, 20), upper_optimizer=30.0)
    solution = solve(PROBLEM, X0, Y0, wild, steps=1000, chunk=1000)
    assert solution.result is Result.DIVERGED
    assert 0 < solution.steps < 100
    assert np.isfinite(solution.x).all()
    assert np.isfinite(solution.y["a"]).all()
    assert "non-finite" in solution.reason
    assert "lower the" in solution.reason
    assert same(solution.x, solve(PROBLEM, X0, Y0, wild, steps=solution.steps).x)


def test_nan_at_the_first_step_returns_the_start():
    problem = Problem(upper=lambda x, y: jnp.sum(y["a"]) + jnp.sum(x), lower=lambda x, y: jnp.sum(jnp.sqrt(y["a"] - 1)))
    solution = solve(problem, X0, {"a": np.ones(3, np.float32)}, FAST, steps=5)
    assert solution.result is Result.DIVERGED
    assert solution.steps == 0
    np.testing.assert_array_equal(solution.x, X0)


def test_a_users_own_class_with_two_methods_works():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        x: jax.Array
        y: dict

    class Alternating:
        def init(self, problem, x, y, key):
            return State(x, y)

        def step(self, problem, state, key):
            level, top = problem.draw_lower(key), problem.draw_upper(key)
            y = optax.tree.add_scale(state.y, -0.05, level.gradient(state.x, state.y))
            x = state.x - 0.05 * jax.grad(top)(state.x, y) + 0.0 * jax.random.normal(key.random)
            return State(x, y), {"upper_loss": top(x, y)}

    solution = solve(PROBLEM, X0, Y0, Alternating(), steps=200)
    np.testing.assert_allclose(solution.y["a"], C, atol=1e-3)  # first order only: x goes to 0
    with pytest.raises(ValueError, match=r"Alternating has no method status"):
        solve(PROBLEM, X0, Y0, Alternating(), tol=1e-3)


def test_projection_of_the_upper_level(x64):
    problem = Problem(upper=upper, lower=lower_loss, project_upper=lambda x: jnp.clip(x, -0.1, 0.1))
    solution = solve(problem, np.zeros(3), {"a": np.zeros(3)}, tol=1e-6, steps=200)
    np.testing.assert_allclose(solution.x, np.clip((1 - C) / 2, -0.1, 0.1), atol=1e-6)
    assert solution.result is Result.CONVERGED


def test_quasi_newton_rule_on_an_ill_conditioned_quadratic_and_its_need_for_values(x64):
    scale = np.logspace(0, 3, 10)
    problem = Problem(upper=lambda x, y: jnp.sum(scale * (y - 1) ** 2) / 2, lower=lambda x, y: jnp.sum((y - x) ** 2))
    closed = lower.Function(lambda level, x, y: x)
    solver = solvers.HypergradientDescent(lower_solver=closed, upper_optimizer=optimizers.quasi_newton())
    solution = solve(problem, np.zeros(10), np.zeros(10), solver, tol=1e-8, steps=400)
    assert solution.result is Result.CONVERGED
    np.testing.assert_allclose(solution.x, 1, atol=1e-8)
    with pytest.raises(ValueError, match="the value decides"):
        optimizers.spectral().update(jnp.ones(2), optimizers.spectral().init(jnp.ones(2)), jnp.ones(2))


def test_quasi_newton_goes_further_while_it_meets_no_positive_curvature(x64):
    """h = 1 - x^2 / 2 from x = 1, in any units: moves of a tenth of x_0, of four times that, and then of all of x_0."""
    rule = optimizers.quasi_newton()
    move = jax.jit(lambda x, memory, value: rule.update(-x, memory, x, value=value))
    for unit in (1e-3, 1.0, 1e3):
        x = np.array([unit])
        memory, moves = rule.init(x), []
        for _ in range(3):
            update, memory = move(x, memory, unit**2 - x[0] ** 2 / 2)
            moves.append(float(update[0] / x[0]))
            x = x + np.asarray(update)
        np.testing.assert_allclose(moves, [0.1, 0.4 / 1.1, 1 / 1.5], rtol=1e-12)


NAMED = {
    "AID": solvers.AID(),
    "ITD": solvers.ITD(60, 0.1, 0.1),
    "TruncatedITD": solvers.TruncatedITD(60, 30, 0.1, 0.1),
    "OneStep": solvers.OneStep(20, 0.1, 0.1),
    "T1T2": solvers.T1T2(0.1, 0.05, 0.5),
    "AID, optax": solvers.AID(lower.GradientDescent(0.1, 60), optax.adam(0.05)),
    "upper L-BFGS": solvers.AID(upper_optimizer=optax.lbfgs()),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_methods_end_at_their_fixed_point(name):
    """All reach the solution but those with a biased hypergradient, which end where that estimate vanishes."""
    solution = solve(PROBLEM, X0, Y0, NAMED[name], steps=300)
    h = 2 * np.array([1.0, 2.0, 5.0])
    weight = {"OneStep": 0.1 * h, "T1T2": 0.5 * h}.get(name, np.ones(3))  # estimate: 2x + weight * 2 (x + c - 1)
    np.testing.assert_allclose(solution.x, weight * (1 - C) / (1 + weight), atol=3e-3)


def test_imaml_is_the_implicit_gradient_of_its_tasks(x64):
    """Tasks |y_i - t_i|^2/2 + (lam/2)|y_i - x|^2: y_i = (t_i + lam x)/(1 + lam).

    The optimum of the mean loss at v_i is closed.
    """
    lam, t = 2.0, np.array([[1.0, 2.0], [3.0, -1.0]])
    v = t + np.array([[0.3, 0.1], [0.2, -0.4]])
    problem = Problem(
        upper=lambda x, y, b: jnp.mean(jax.vmap(lambda y, v: jnp.sum((y - v) ** 2))(y, b)),
        lower=lambda x, y, b: jnp.sum(
            jax.vmap(lambda y, t: jnp.sum((y - t) ** 2) / 2 + lam / 2 * jnp.sum((y - x) ** 2))(y, b)
        ),
        upper_data=v,
        lower_data=t,
    )
    solution = solve(problem, np.zeros(2), np.zeros((2, 2)), solvers.IMAML(60, 0.2, 0.5), steps=300)
    np.testing.assert_allclose(solution.x, ((1 + lam) * v - t).mean(0) / lam, atol=1e-8)


BAD_PROBLEMS = [
    (
        lambda: (Problem(upper=lambda x, y: y["a"], lower=lower_loss), X0, Y0),
        r"upper\(x, y\) returned float32\[3\]; a loss is one scalar",
    ),
    (lambda: (Problem(upper=upper, lower=lambda x, y: jnp.int32(1)), X0, Y0), r"lower returned the dtype int32"),
    (
        lambda: (PROBLEM, X0, {"a": np.zeros(3, np.int32)}),
        r"y0\['a'\] has dtype int32; variables are floating-point.*jnp.asarray",
    ),
    (lambda: (PROBLEM, np.array([0.0, np.nan, 0.0], np.float32), Y0), r"x0 is not finite"),
    (
        lambda: (Problem(upper=upper, lower=noisy_lower, lower_data=np.full((4, 3), np.nan, np.float32)), X0, Y0),
        r"lower_data holds a NaN",
    ),
    (
        lambda: (Problem(upper=upper, lower=lambda x, y, b: 0.0, lower_data=(np.zeros(3), np.zeros(4))), X0, Y0),
        r"leaves of lower_data disagree on the number of samples: lower_data\[0\] has 3, lower_data\[1\] has 4",
    ),
    (
        lambda: (Problem(upper=upper, lower=noisy_lower, lower_data=np.zeros((0, 3))), X0, Y0),
        "lower_data has zero samples",
    ),
    (
        lambda: (Problem(upper=upper, lower=noisy_lower, lower_data=np.zeros((4, 2), np.float32)), X0, Y0),
        r"lower\(x, y, batch\) fails on the given variables",
    ),
    (
        lambda: (Problem(upper=upper, lower=lower_loss, project_upper=lambda x: x.astype(jnp.float16)), X0, Y0),
        r"project_upper changes the dtype of x0 from float32 to float16",
    ),
    (
        lambda: (Problem(upper=upper, lower=lower_loss, project_upper=lambda x: x[:2]), X0, Y0),
        r"project_upper changes the shape of x0 from \[3\] to \[2\]",
    ),
    (
        lambda: (Problem(upper=upper, lower=lower_loss, project_lower=lambda y: y["a"]), X0, Y0),
        r"project_lower changes the structure of y0",
    ),
    (lambda: (PROBLEM, X0, {}), "y0 holds no arrays"),
    (lambda: (PROBLEM, None, Y0), "needs an upper variable: x0 is empty|fails on the given"),
    (
        lambda: (Problem(upper=upper, lower=lower_loss, constraint=lambda x, y: y["a"] - x), X0, Y0),
        r"HypergradientDescent cannot honour the coupled inequality",
    ),
    (
        lambda: (Problem(upper=upper, lower=lower_loss, equality=lambda x, y: y["a"] - x), X0, Y0),
        r"HypergradientDescent cannot honour the coupled equality",
    ),
    (lambda: (Problem(upper=upper, lower=noisy_lower, lower_data=data.Stream([])), X0, Y0), "The stream is empty"),
    (
        lambda: (
            Problem(
                upper=lambda x, y, b: 0.0,
                lower=lambda x, y, b: 0.0,
                upper_data=data.Clients([SAMPLES]),
                lower_data=data.Clients([SAMPLES, SAMPLES]),
            ),
            X0,
            Y0,
        ),
        "upper_data has 1 clients and lower_data 2",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD_PROBLEMS)))
def test_bad_problems_are_refused_before_any_compile_with_a_cure(number):
    make, words = BAD_PROBLEMS[number]
    with pytest.raises(ValueError, match=words):
        solve(*make(), FAST, steps=1)


BAD_CALLS = [
    ({"steps": 0}, ValueError, r"steps=0\): a positive integer"),
    ({"steps": 2.5}, ValueError, "positive integer"),
    ({"tol": -1.0}, ValueError, "tolerance is positive"),
    ({"solver": "AID"}, TypeError, r"needs methods init"),
    ({"metrics": {"m": 3.0}}, TypeError, r"metrics\['m'\] is a float"),
    ({"chunk": 0}, ValueError, "chunk=0"),
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_bad_calls_are_refused(number):
    arguments, error, words = BAD_CALLS[number]
    with pytest.raises(error, match=words):
        solve(PROBLEM, X0, Y0, **{"solver": FAST, **arguments})


class Unhashable:
    __hash__ = None

    def __call__(self, x, y):
        return 0.0


def test_bad_problem_functions_are_refused_where_they_are_written():
    with pytest.raises(ProblemError, match=r"Problem\(upper=\.\.\.\) takes a function"):
        Problem(upper=3, lower=lower_loss)
    with pytest.raises(ProblemError, match="not hashable"):
        Problem(upper=Unhashable(), lower=lower_loss)
    with pytest.raises(TypeError, match="solve takes a Problem first"):
        solve(upper, X0, Y0)
    with pytest.raises(ProblemError, match="cannot read a Stream"):
        run(Problem(upper=upper, lower=noisy_lower, lower_data=data.Stream([SAMPLES])), FAST, X0, Y0, 1)


def test_the_program_does_not_grow_with_the_data():
    def size(n):
        problem = Problem(upper=upper, lower=noisy_lower, lower_data=data.Minibatches(np.zeros((n, 3), np.float32), 4))
        return len(
            jax.jit(lambda p: run(p, FAST, jnp.asarray(X0), jax.tree.map(jnp.asarray, Y0), 3)[0])
            .lower(problem)
            .as_text()
        )

    assert abs(size(10_000) - size(100)) < 200


TWO_WELLS = Problem(lambda x, y: (x - 2) ** 2 + (y - 1) ** 2, lambda x, y: (y**2 - 1) ** 2 + 0.3 * x * y)


def test_a_stationary_lower_point_that_is_no_minimum_is_not_called_converged():
    """Two wells: from y = .9 the lower solve stays in the higher one, where the upper loss is small."""
    wrong = solve(TWO_WELLS, np.float32(2.0), np.float32(0.9), solvers.AID(), tol=1e-4, steps=100)
    assert wrong.y > 0 and wrong.result is Result.LOWER_LEVEL
    assert wrong.history["polished_gap"][-1] == pytest.approx(1.194, abs=1e-2)
    assert "stationary and not its minimum" in wrong.reason


@pytest.mark.slow
def test_the_solver_that_is_chosen_takes_the_point_where_two_wells_are_level():
    """They are at x = 0, where the one that F prefers may be taken: F = 4 at (0, 1), and 4.27 at (2, -1.07)."""
    right = solve(TWO_WELLS, np.float32(2.0), np.float32(0.9), tol=1e-4, steps=100)
    assert right.result is Result.CONVERGED
    np.testing.assert_allclose([right.x, right.y], [0.0, 1.0], atol=1e-3)


def test_a_start_that_a_state_overrides_is_said(caplog):
    problem = Problem(lambda x, y: (y - 1) ** 2, lambda x, y: (y - x) ** 2)
    solver = solvers.AID(lower.Newton(), upper_optimizer=0.1)
    before = solve(problem, 0.0, 0.0, solver, steps=3, progress=False)
    going_on = solve(problem, state=before, steps=6, progress=False)
    caplog.clear()
    for start in ((before.x, before.y), (float(before.x), float(before.y))):
        assert solve(problem, *start, solver, state=before, steps=6, progress=False).x == going_on.x
        assert not caplog.records
    for x, y, name in ((5.0, before.y, "x0"), (before.x, 5.0, "y0")):
        caplog.clear()
        assert solve(problem, x, y, solver, state=before, steps=6, progress=False).x == going_on.x
        said = f"{name} is not where the state stands; it is ignored, the run goes on from the state"
        assert [record.message for record in caplog.records] == [said]
    caplog.clear()
    solve(problem, 5.0, before.y, solver, state=before.state, steps=6, progress=False)
    assert "x0 is not where the state stands" in caplog.text


def test_a_state_that_a_checkpoint_overrides_is_said(caplog, tmp_path):
    problem = Problem(lambda x, y: (y - 1) ** 2, lambda x, y: (y - x) ** 2)
    solver = solvers.AID(lower.Newton(), upper_optimizer=0.1)
    options = dict(progress=False, checkpoint=tmp_path / "run")
    before = solve(problem, 0.0, 0.0, solver, steps=3, progress=False)
    solve(problem, state=before, steps=6, **options)
    assert "state is ignored" not in caplog.text
    solve(problem, state=before, steps=8, **options)
    assert f"state is ignored: the run goes on from the checkpoint in {tmp_path / 'run'}" in caplog.text


def test_what_a_linear_solver_leaves_in_half_precision_is_no_singular_hessian():
    """0.18% of F_y is bfloat16's rounding, and more than float32's."""
    from bilevel.precision import working
    from bilevel.solvers._base import remark

    problem = Problem(lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum((y - x) ** 2))
    left = {"linear_error": 0.0018}
    for dtype, quiet in ((jnp.bfloat16, True), (jnp.float32, False), (jnp.float16, False)):
        y = jnp.zeros(2, dtype)
        assert bool(remark(left, working(problem, jnp.zeros(()), y).rounding)) is not quiet
    assert "is left with 1.8% of F_y" in remark({"linear_error": 0.018}, 2**-7)
