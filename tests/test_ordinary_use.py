"""What an ordinary afternoon meets: Ctrl-C at the end, shard_map, sweeps over changed globals, steps at an optimum."""

from __future__ import annotations

import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from bilevel import Problem, ProblemError, Result, data, hypergradients, lower, optimizers, run, runs, solve, solvers
from bilevel.hypergradients import value_and_hypergradient

A = jnp.asarray
QUADRATIC = Problem(lambda x, y: jnp.sum((y - 1) ** 2) + x**2, lambda x, y: 0.5 * jnp.sum((y - x) ** 2))
X, Y = A(0.5), A([0.0, 0.2])

# Ctrl-C ---------------------------------------------------------------------------------------------------------------


class Pressed:
    """A metric's host that is interrupted by a real signal at one of its evaluations."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, event):
        self.seen += 1
        if self.seen == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("tol", [None, 1e-9])
def test_an_interrupt_in_any_chunk_is_interrupted_the_last_one_too(at, tol):
    before = signal.getsignal(signal.SIGINT)
    solver = solvers.ITD(5, 0.1, 0.01)
    solution = solve(QUADRATIC, X, Y, solver, steps=6, tol=tol, callback=Pressed(at), callback_every=2)
    assert solution.result is Result.INTERRUPTED and solution.steps == 2 * at
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_in_the_only_chunk_is_noticed(tmp_path):
    solution = solve(QUADRATIC, X, Y, solvers.SOBA(), steps=1, callback=Pressed(1), checkpoint=tmp_path)
    assert solution.result is Result.INTERRUPTED and solution.steps == 1
    on = solve(QUADRATIC, X, Y, solvers.SOBA(), steps=3, checkpoint=tmp_path)
    assert on.result is Result.COMPLETED and on.steps == 3


def test_an_interrupt_while_the_end_is_looked_at_returns_the_run(monkeypatch):
    def pressed(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys.modules["bilevel.solve"], "certify", pressed)
    solution = solve(QUADRATIC, X, Y, solvers.ITD(5, 0.1, 0.01), steps=3, tol=1e-9)
    assert solution.result is Result.INTERRUPTED and solution.steps == 3
    assert "Ctrl-C" in " ".join(solution.certificate.unchecked)


# A converged unrolled run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [hypergradients.Unrolled(), hypergradients.Forward()], ids=["reverse", "forward"])
def test_an_unrolled_run_ends_by_its_own_hypergradient(estimator):
    """Where |f_y| after T steps is above the tolerance and y all the same a minimiser as far as values tell."""
    solver = solvers.HypergradientDescent(estimator, lower.GradientDescent(0.3, 20), 0.2, warm_start=False)
    solution = solve(QUADRATIC, X, Y, solver, tol=1e-4, steps=500)
    assert solution.result is Result.CONVERGED and solution.steps < 100
    left = float(solution.history["lower_residual"][-1])
    assert left > 1e-4, "the test is of a residual above the tolerance"


def test_an_unrolled_run_that_is_far_from_the_minimum_is_not_called_converged():
    solution = solve(QUADRATIC, X, Y, solvers.ITD(2, 0.1, 0.2), tol=1e-4, steps=500)
    assert solution.result is Result.LOWER_LEVEL and "below f(x, y)" in solution.reason
    # Too large to be looked at: the residual is what there is.
    many = Problem(lambda x, y: jnp.mean((y - 1) ** 2) + x**2, lambda x, y: 0.5 * jnp.sum((y - x) ** 2))
    solution = solve(many, X, jnp.zeros(10_001), solvers.ITD(2, 0.1, 0.2), tol=1e-4, steps=200)
    assert solution.result is Result.LOWER_LEVEL and "|f_y|" in solution.reason and "size" in solution.reason


# shard_map ------------------------------------------------------------------------------------------------------------

ROWS = jnp.arange(8.0) / 8


def upper(x, y, b):
    return jnp.mean((y - b) ** 2) + 0.1 * jnp.sum(x**2)


def below(x, y, b):
    return jnp.mean((y - x * b) ** 2) / 2 + 0.1 * jnp.sum(y**4)


def averaged(fn):
    return lambda *args: jax.lax.pmean(fn(*args), "devices")


def mapped(solver, problem, check):
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("devices"), PartitionSpec()
    end = lambda problem, x, y: (lambda s: (s.x, s.y))(run(problem, solver, x, y, 3)[0])
    return jax.shard_map(end, mesh=mesh, in_specs=(split, whole, whole), out_specs=whole, check_vma=check)(
        problem, A(0.7), A(0.1)
    )


SHARDED = {
    "ITD": solvers.ITD(3, 0.1, 0.1),
    "plain reverse": solvers.HypergradientDescent(
        hypergradients.Unrolled(checkpoint=False), lower.GradientDescent(0.1, 3), 0.1
    ),
    "forward": solvers.HypergradientDescent(hypergradients.Forward(), lower.GradientDescent(0.1, 3), 0.1),
    "SOBA": solvers.SOBA(0.1, 0.1),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "plain reverse" else name for name in SHARDED]
)
def test_a_mean_over_devices_is_right_with_the_check_and_refused_without(name):
    problem = Problem(averaged(upper), averaged(below), ROWS, ROWS)
    plain, _ = run(Problem(upper, below, ROWS, ROWS), SHARDED[name], A(0.7), A(0.1), 3)
    np.testing.assert_allclose(mapped(SHARDED[name], problem, True), (plain.x, plain.y), rtol=1e-5)
    with pytest.raises(ProblemError, match=r"upper takes a mean.*'devices'.*check_vma=False.*Leave check_vma at True"):
        mapped(SHARDED[name], problem, False)


def test_each_devices_own_problem_goes_without_the_check():
    own = Problem(upper, below, ROWS, ROWS)
    plain, _ = run(own, SHARDED["ITD"], A(0.7), A(0.1), 3)
    np.testing.assert_allclose(mapped(SHARDED["ITD"], own, False), (plain.x, plain.y), rtol=1e-5)
    # A count over all devices depends on no variable, and has no derivative that could be wrong.
    counted = lambda x, y, b: upper(x, y, b) / jax.lax.psum(1.0 * len(b), "devices")
    mapped(SHARDED["ITD"], Problem(counted, below, ROWS, ROWS), False)


def test_a_vmap_with_a_named_axis_is_refused_likewise():
    problem = Problem(averaged(upper), averaged(below), ROWS.reshape(2, 4), ROWS.reshape(2, 4))
    with pytest.raises(ProblemError, match="vmap with axis_name"):
        jax.vmap(lambda p: run(p, SHARDED["ITD"], A(0.7), A(0.1), 1)[0].x, axis_name="devices")(problem)


# Captured values in runs ----------------------------------------------------------------------------------------------

LAM = 1.0
SCORED = 1.0


def penalised(x, y):
    return (y - 1) ** 2 + LAM * x**2


def tracked(x, y):
    return (y - x) ** 2


def score(x, y):
    return SCORED * penalised(x, y)


def multistart(lam):
    starts = jnp.linspace(-1, 1, 3)
    return runs.multistart(Problem(penalised, tracked), starts, starts, solvers.SOBA(0.2, 0.4, decay=None), 100)


def sweep(lam):
    grid = [solvers.SOBA(a, 0.4, decay=None) for a in (0.1, 0.2)]
    return runs.sweep(Problem(penalised, tracked), grid, A(0.0), A(0.0), steps=100, score=score)


@pytest.mark.parametrize("call", [multistart, sweep])
def test_fifty_calls_with_another_global_are_right_and_compile_once(call):
    global LAM, SCORED
    compiled = []
    count = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(count)
    for i, lam in enumerate(np.linspace(0.3, 3, 50)):
        LAM = SCORED = float(lam)
        found = call(lam)
        np.testing.assert_allclose(found.x, 1 / (1 + lam), atol=1e-3)
        if call is sweep:
            np.testing.assert_allclose(found.score, lam * lam / (1 + lam), rtol=1e-3)
        if i == 1:
            compiled.clear()
    assert not compiled


def test_an_adaptive_strength_sees_globals_of_now(tmp_path):
    global LAM
    ends = []
    for lam in (1.0, 3.0):
        LAM = lam
        found = runs.adaptive(
            Problem(penalised, tracked), A(0.0), A(0.0), lambda wd: solvers.SOBA(0.2, 0.4, decay=None), 0.1,
            eigenvalue=lambda x, y: y, largest=0.1, steps=100, every=50, checkpoint=tmp_path / str(lam),
        )  # fmt: skip
        ends.append(float(found.solution.x))
    np.testing.assert_allclose(ends, [0.5, 0.25], atol=1e-3)


# Steps that are differentiated at an optimum --------------------------------------------------------------------------

STIFF = {
    "adam": optax.adam(0.01), "adamw": optax.adamw(0.01), "rmsprop": optax.rmsprop(0.01), "radam": optax.radam(0.01),
    "lamb": optax.lamb(0.01), "a norm of one": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
    "clipped adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    "a tiny eps_root": optax.adam(0.01, eps_root=1e-12), "a warm-up": optax.adam(optax.linear_schedule(0.0, 0.1, 9)),
}  # fmt: skip
REST = A([0.5, 0.5])


@pytest.mark.parametrize("name", STIFF)
def test_a_stiff_rule_at_an_optimum_is_named_before_its_derivative_is_taken_for_one(name):
    solver = lower.GradientDescent(STIFF[name], 5)
    with pytest.raises(ProblemError, match=r"exactly at an optimum.*eps_root.*hypergradients.Implicit"):
        solve(QUADRATIC, X, REST, solvers.HypergradientDescent(hypergradients.Unrolled(), solver, 0.1), steps=1)


@pytest.mark.parametrize("name", ["adam", pytest.param("a norm of one", marks=pytest.mark.slow)])
def test_a_stiff_rule_at_an_optimum_is_named_by_whatever_differentiates_its_steps(name):
    for estimator in (hypergradients.OneStep(), hypergradients.Forward(), hypergradients.SAMA(None)):
        with pytest.raises(ProblemError, match=r"exactly at an optimum.*eps_root"):
            value_and_hypergradient(QUADRATIC, estimator, lower.GradientDescent(STIFF[name], 5))(X, REST)


@pytest.mark.parametrize("rule", [
    0.1, optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), optax.chain(optax.clip(1.0), optax.sgd(0.1)),
    optax.chain(optax.adaptive_grad_clip(0.5), optax.sgd(0.1)),
], ids=["plain", "norm", "entries", "adaptive"])  # fmt: skip
@pytest.mark.parametrize("estimator", [hypergradients.Unrolled(), hypergradients.Forward()], ids=["reverse", "forward"])
def test_clipping_at_an_optimum_is_plain_descent(rule, estimator):
    """y_5 = x + 0.9^5 (y - x), so dy/dx = 1 - 0.9^5."""
    estimate = value_and_hypergradient(QUADRATIC, estimator, lower.GradientDescent(rule, 5))(X, REST)
    np.testing.assert_allclose(estimate.gradient, 2 * (1 - 0.9**5) * jnp.sum(REST - 1) + 2 * X, rtol=1e-5)


def test_moments_that_have_seen_gradients_are_not_stiff_at_an_optimum():
    """A lower run that reaches its optimum to the last bit and is handed back: the derivative is that of its steps."""
    rule = optax.adam(0.1)
    solver = lower.GradientDescent(rule, 5)
    seen = optax.tree.set(rule.init(REST), count=100, nu=jnp.ones_like(REST))
    estimate = value_and_hypergradient(QUADRATIC, hypergradients.Unrolled(), solver)(X, lower.LowerState(REST, seen))

    @jax.jit
    def after(x):
        y, memory = REST, seen
        for _ in range(5):
            updates, memory = rule.update(jax.grad(QUADRATIC.lower, 1)(x, y), memory, y)
            y = optax.apply_updates(y, updates)
        return QUADRATIC.upper(x, y)

    np.testing.assert_allclose(estimate.gradient, jax.jit(jax.grad(after))(X), rtol=1e-5)
    assert not np.allclose(estimate.gradient, jax.grad(QUADRATIC.upper)(X, REST), rtol=1e-2)


def test_an_eps_root_of_the_size_of_a_step_is_the_cure():
    rule = optax.adam(1e-2, eps_root=1e-3)
    at = lambda steps: (
        value_and_hypergradient(QUADRATIC, hypergradients.Unrolled(), lower.GradientDescent(rule, steps))(
            X, REST
        ).gradient
    )
    np.testing.assert_allclose(at(200), 2 * jnp.sum(REST - 1) + 2 * X, rtol=1e-2)


def test_a_parameter_without_a_gradient_is_no_optimum():
    """A bias before a normalisation: the rest of y is on its way."""
    problem = Problem(lambda x, y: jnp.sum((y[:2] - 1) ** 2), lambda x, y: 0.5 * jnp.sum((y[:2] - x) ** 2))
    for estimator in (hypergradients.Unrolled(), hypergradients.Forward()):
        estimate = value_and_hypergradient(problem, estimator, lower.GradientDescent(optax.adam(0.01), 3))(
            X, jnp.zeros(3)
        )
        assert bool(jnp.isfinite(estimate.gradient))


# Crashes --------------------------------------------------------------------------------------------------------------


def looped(value):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.9), (0, value))[1]


@pytest.mark.parametrize("level", ["upper", "lower"])
@pytest.mark.parametrize("solver", [None, solvers.ITD(3), solvers.SOBA()], ids=["none", "ITD", "SOBA"])
def test_a_loop_without_a_length_in_a_loss_is_named_by_its_level(level, solver):
    fns = {"upper": lambda x, y: (y - 1) ** 2 + x**2, "lower": lambda x, y: (y - x) ** 2}
    problem = Problem(**{**fns, level: lambda x, y: looped(fns[level](x, y))})
    with pytest.raises(ProblemError, match=rf"{level}, the {level} level's loss.*while_loop.*jax.lax.scan"):
        solve(problem, A(0.3), A(0.0), solver, steps=1)


def test_a_loop_without_a_length_in_the_upper_loss_is_taken_by_a_method_in_forward_mode():
    problem = Problem(lambda x, y: looped((y - 1) ** 2 + x**2), lambda x, y: (y - x) ** 2)
    solution = solve(problem, A(0.3), A(0.0), solvers.MPCC(), steps=50)
    assert solution.result is Result.CONVERGED
    np.testing.assert_allclose(solution.x, 0.5, atol=1e-4)


def test_reverse_mode_through_a_solver_of_jaxopt_names_its_option():
    jaxopt = pytest.importorskip("jaxopt")
    make = lambda **more: solvers.AID(lower.jaxopt(jaxopt.GradientDescent, maxiter=50, **more), 0.1)
    of = lambda solver: jax.grad(lambda x: run(QUADRATIC, solver, x, Y, 2)[0].x)
    with pytest.raises(ValueError, match=r"lower.jaxopt\(..., implicit_diff=True\)"):
        of(make())(X)
    np.testing.assert_allclose(of(make(implicit_diff=True))(X), (1 - 0.1 * 6) ** 2, rtol=1e-3)


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_an_infinite_loss_at_the_start_is_named_by_its_level(level):
    fns = {"upper": lambda x, y: (y - 1) ** 2 + x**2, "lower": lambda x, y: (y - x) ** 2}
    problem = Problem(**{**fns, level: lambda x, y: fns[level](x, y) - jnp.log(y)})
    solution = solve(problem, A(0.3), A(0.0), solvers.SOBA(), steps=3)
    assert solution.result is Result.DIVERGED
    assert f"{level}, the {level} level's loss, is inf at the start" in solution.reason


# Trials, samplers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level, rule", [
    ("upper", optimizers.quasi_newton),
    pytest.param("upper", optimizers.spectral, marks=pytest.mark.slow),
    pytest.param("lower", optimizers.quasi_newton, marks=pytest.mark.slow),
    ("lower", optimizers.spectral),
])  # fmt: skip
def test_a_trial_without_an_upper_value_or_a_lower_loss_is_withdrawn(rule, level):
    """A loss has no value for x > 1, and a long second step from 0.3 leads there."""
    hole = lambda x, y: y * jnp.where(x > 1.0, jnp.nan, 0.0)
    losses = {"upper": lambda x, y: -jnp.log(y) + y**4, "lower": lambda x, y: (y - x) ** 2}
    whole = losses[level]
    losses[level] = lambda x, y: whole(x, y) + hole(x, y)
    trials = []
    solution = solve(
        Problem(**losses), A(0.3), A(0.3), solvers.AID(upper_optimizer=rule(largest=30.0)), steps=60, tol=1e-4,
        callback=lambda event: trials.append(float(event.state.trial)), callback_every=1,
    )  # fmt: skip
    assert max(trials) > 1, "the test is of such a trial"
    assert solution.result is Result.CONVERGED, solution
    np.testing.assert_allclose(solution.x, 0.25**0.25, rtol=1e-3)
    assert np.isfinite(solution.history["upper_loss"]).all()


def test_a_lower_level_without_values_around_x_is_named():
    """The lower loss has values at the start alone: no trial, however short, mends that."""
    problem = Problem(lambda x, y: y**2 + x**2, lambda x, y: (y - x) ** 2 + jnp.where(x == A(0.3), 0.0, jnp.nan) * y)
    solution = solve(problem, A(0.3), A(0.3), solvers.AID(), steps=60)
    assert solution.result is Result.DIVERGED and "lower_loss" in solution.reason and solution.steps < 20
    np.testing.assert_allclose(solution.x, 0.3)


def test_what_is_reported_under_such_a_rule_is_of_the_point_that_stands():
    wild = Problem(lambda x, y: -jnp.log(y) + y**4, lambda x, y: (y - x) ** 2)
    solution = solve(wild, A(0.02), A(0.02), solvers.AID(), steps=7)
    np.testing.assert_allclose(solution.history["upper_loss"][-1], wild.upper(solution.x, solution.x), rtol=1e-4)
    assert (np.diff(solution.history["upper_loss"]) <= 1e-5).all()


def test_a_sampler_that_is_shared_in_one_level_alone_is_warned_of():
    pool = data.Minibatches(np.arange(8.0), 4)
    shared = data.Shared(pool)
    for pair, level in (((shared, pool), "lower"), ((pool, data.Keyed(shared)), "upper")):
        with pytest.warns(UserWarning, match=f"around the {level} level's too"):
            Problem(upper, below, *pair)
    Problem(upper, below, shared, data.Shared(pool))
