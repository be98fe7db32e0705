"""Parts of y that are constants: hypergradients, runs and certificates of the rest; rules with masks are named."""

from __future__ import annotations

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import float64

from bilevel import (
    Problem,
    ProblemError,
    Result,
    data,
    diagnostics,
    hypergradients,
    lower,
    network,
    run,
    runs,
    solve,
    solvers,
)  # fmt: skip
from bilevel.frozen import standing
from bilevel.hypergradients import value_and_hypergradient

RANDOM = np.random.default_rng(0)
HESSIAN = RANDOM.normal(size=(4, 4))
HESSIAN = HESSIAN @ HESSIAN.T + np.eye(4)
X = np.array([0.5, -0.2])
Y = {"u": np.zeros(2), "c": np.array([0.3, -0.7])}
MASK = {"u": False, "c": True}
GD = lower.GradientDescent(0.1, 300)


def below(x, y):
    z = jnp.concatenate([y["u"], y["c"]])
    # A copy: JAX gives an array that a trace in float64 holds in that precision to one in float32 as well.
    return 0.5 * z @ jnp.asarray(HESSIAN.copy()) @ z - jnp.sum(x * y["u"]) - jnp.sum(x) * jnp.sum(y["c"])


def above(x, y):
    return jnp.sum((y["u"] - 1) ** 2) + jnp.sum((y["c"] - x) ** 2) + 0.1 * jnp.sum(x**2)


def found(x):
    """y*(x) where c is constant."""
    return {"u": jnp.linalg.solve(HESSIAN[:2, :2], x - HESSIAN[:2, 2:] @ Y["c"]), "c": Y["c"]}


def value(x):
    return above(x, found(x))


@functools.cache
def slope():
    """Its gradient at X."""
    with float64():
        return np.asarray(jax.jit(jax.grad(value))(X))


@functools.cache
def best():
    """The minimiser of a quadratic in x."""
    with float64():
        curvature, gradient = jax.jit(lambda x: (jax.hessian(value)(x), jax.grad(value)(x)))(np.zeros(2))
        return -np.linalg.solve(curvature, gradient)


FROZEN = Problem(above, below, frozen=MASK)
FREE = Problem(above, below)

ESTIMATORS = {
    "Implicit": (hypergradients.Implicit(), None),
    "Implicit, Newton": (hypergradients.Implicit(), lower.Newton()),
    "Unrolled": (hypergradients.Unrolled(), GD),
    "Unrolled, Adam": (hypergradients.Unrolled(), lower.GradientDescent(optax.adam(0.05, eps_root=1e-12), 600)),
    "Forward": (hypergradients.Forward(), GD),
    "LeastSquares": (hypergradients.LeastSquares(500), GD),
    "StochasticImplicit": (hypergradients.StochasticImplicit(0.1, 300), GD),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "Unrolled, Adam" else name for name in ESTIMATORS],
)
def test_hypergradients_are_those_of_the_rest_of_y(name, x64):
    estimator, solver = ESTIMATORS[name]
    at = jax.jit(lambda problem, x, y: value_and_hypergradient(problem, estimator, solver)(x, y))
    estimate = at(FROZEN, X, Y)
    np.testing.assert_allclose(estimate.gradient, slope(), rtol=1e-5)
    np.testing.assert_array_equal(estimate.lower.y["c"], Y["c"])
    np.testing.assert_allclose(estimate.lower.y["u"], found(X)["u"], atol=1e-6)
    # And handed back.
    again = jax.jit(value_and_hypergradient(FROZEN, estimator, solver))(X, estimate.lower, estimate.carry)
    np.testing.assert_allclose(again.gradient, slope(), rtol=1e-5)


def test_one_step_and_sama_are_their_equations_in_the_rest_of_y(x64):
    u = np.array([0.1, 0.4])
    y, eta = {"u": u, "c": Y["c"]}, 0.1

    @jax.jit
    def estimates_and_equation():
        new = {"u": u - eta * jax.grad(below, 1)(X, y)["u"], "c": Y["c"]}
        upper_x, upper_y = jax.grad(above, (0, 1))(X, new)
        at = lambda estimator: value_and_hypergradient(FROZEN, estimator, lower.GradientDescent(eta, 1))(X, y)
        estimates = at(hypergradients.OneStep()), at(hypergradients.SAMA(None))
        return [estimate.gradient for estimate in estimates], upper_x + eta * upper_y["u"]  # f_xu = -1

    estimates, expected = estimates_and_equation()
    for estimate in estimates:
        np.testing.assert_allclose(estimate, expected, rtol=1e-12)


SOLVERS = {
    "default": (None, 50), "AID": (solvers.AID(), 50), "ITD": (solvers.ITD(200, 0.1, 0.1), 600),
    "SOBA": (solvers.SOBA(0.1, 0.1, decay=None), 2000), "F2BA": (solvers.F2BA(), 2000), "MEHA": (solvers.MEHA(), 3000),
    "MPCC": (solvers.MPCC(), 20),
}  # fmt: skip


@pytest.mark.parametrize("name", ["default", "ITD", "SOBA", "MPCC"])
def test_runs_converge_to_the_solution_with_the_constant(name):
    """And the certificate lets it stand, though a lower y with another c has a lower f."""
    solver, steps = SOLVERS[name]
    solution = solve(FROZEN, *start(), solver, tol=1e-3, steps=steps)
    assert solution.result is Result.CONVERGED, solution.reason
    np.testing.assert_allclose(solution.x, best(), atol=2e-3)
    np.testing.assert_array_equal(solution.y["c"], np.float32(Y["c"]))
    assert jax.tree.structure(solution.y) == jax.tree.structure(Y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AID", "F2BA", "MEHA"])
def test_runs_of_other_families_converge_to_it_too(name):
    test_runs_converge_to_the_solution_with_the_constant(name)


def start(dtype=np.float32):
    return jax.tree.map(lambda a: np.asarray(a, dtype), (X, Y))


def test_without_the_mask_it_is_another_problem():
    solution = solve(FREE, *start(), solvers.AID(), tol=1e-3, steps=50)
    assert float(jnp.abs(solution.x - best()).max()) > 0.05


def test_parts_of_a_leaf_and_masks_by_a_function(x64):
    """y in one array, its odd entries constant."""
    split = lambda y: {"u": y[::2], "c": y[1::2]}
    functions = (lambda x, y: above(x, split(y))), (lambda x, y: below(x, split(y)))
    y = np.array([0.0, 0.3, 0.0, -0.7])
    odd = np.arange(4) % 2 == 1
    for mask in (odd, lambda y: odd):
        problem = Problem(*functions, frozen=mask)
        estimate = jax.jit(value_and_hypergradient(problem))(X, y)
        np.testing.assert_allclose(estimate.gradient, slope(), rtol=1e-6)
        np.testing.assert_array_equal(estimate.lower.y[odd], y[odd])
    solution = solve(problem, X, y, tol=1e-5, metrics={"c": lambda x, y: y[1]}, keep_best=("c", max), steps=50)
    np.testing.assert_allclose(solution.x, best(), atol=1e-5)
    assert solution.best.y.shape == (4,) and solution.history["c"][-1] == 0.3


def test_prefixes_name_and_mask_half_precision_too():
    """A prefix freezes all below it; masters of half precision lose no constants."""
    y = {"body": {"w": jnp.full(3, 0.3, jnp.bfloat16), "b": jnp.ones((), jnp.bfloat16)}, "head": jnp.zeros(3)}
    problem = Problem(
        lambda x, y: jnp.sum((y["head"] - 1) ** 2) + x**2,
        lambda x, y: jnp.sum((y["head"] - x * y["body"]["w"].astype(np.float32)) ** 2),
        frozen={"body": True, "head": False},
    )
    solution = solve(problem, jnp.asarray(0.5), y, solvers.AID(), tol=1e-4, steps=50)
    assert solution.y["body"]["w"].dtype == jnp.bfloat16
    w = np.float32(y["body"]["w"])
    np.testing.assert_allclose(solution.x, w.sum() / (w @ w + 1), rtol=1e-3)
    assert bool((solution.y["body"]["w"] == y["body"]["w"]).all())


def test_constants_are_arguments_of_compiled_code_and_runs_go_on(tmp_path):
    x, y = start()
    traces = []
    counted = lambda x, y: traces.append(0) or below(x, y)
    problem, solver = Problem(above, counted, frozen=MASK), solvers.AID(lower.GradientDescent(0.1, 50), 0.1)
    whole = solve(problem, x, y, solver, steps=20)
    seen = len(traces)
    other = solve(problem, x, {**y, "c": y["c"] + 1}, solver, steps=20, chunk=None)
    assert len(traces) - seen < seen  # no second trace of the loop
    np.testing.assert_array_equal(other.y["c"], y["c"] + 1)
    half = solve(problem, x, y, solver, steps=10, checkpoint=tmp_path)
    on = solve(problem, steps=20, state=half)
    for a, b in zip(jax.tree.leaves((on.x, on.y)), jax.tree.leaves((whole.x, whole.y)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    resumed = solve(problem, x, y, solver, steps=20, checkpoint=tmp_path)
    np.testing.assert_allclose(resumed.x, whole.x, rtol=1e-5)
    with pytest.raises(ProblemError, match=r"state=solution.state.*frozen.*state=solution"):
        solve(problem, solver=solver, steps=3, state=half.state)


def test_run_sweeps_and_multistarts(x64):
    state, _ = jax.jit(lambda problem: run(problem, solvers.AID(upper_optimizer=0.1), X, Y, 100))(FROZEN)
    np.testing.assert_allclose(state.x, best(), atol=1e-3)
    np.testing.assert_array_equal(state.y["c"], Y["c"])
    swept = runs.sweep(FROZEN, [solvers.SOBA(a, 0.1, decay=None) for a in (0.05, 0.1)], X, Y, steps=500)
    np.testing.assert_array_equal(swept.y["c"], Y["c"])
    np.testing.assert_allclose(swept.x, best(), atol=1e-2)
    many = jax.tree.map(lambda a: np.stack([a, a]), (X, Y))
    ends = runs.multistart(FROZEN, *many, solvers.SOBA(0.1, 0.1, decay=None), steps=500)
    np.testing.assert_array_equal(ends.y["c"], Y["c"])


@pytest.mark.slow
def test_diagnostics_look_at_what_moves(x64):
    assert "2" in str(diagnostics.check(FROZEN, X, Y))


def test_estimates_have_derivatives_in_the_constants(x64):
    in_c = jax.jit(jax.jacfwd(lambda c: value_and_hypergradient(FROZEN)(X, {**Y, "c": c}).value))(Y["c"])
    expected = jax.jit(jax.grad(lambda c: above(X, {"u": jnp.linalg.solve(
        HESSIAN[:2, :2], X - HESSIAN[:2, 2:] @ c), "c": c})))(Y["c"])  # fmt: skip
    np.testing.assert_allclose(in_c, expected, rtol=1e-4)


def test_minibatches_and_stacked_clients():
    rows = np.float32(RANDOM.normal(size=(12, 4)))
    loss = lambda x, y, b: jnp.mean((b @ jnp.concatenate([y["u"], y["c"]]) - x.sum()) ** 2)
    x, y = start()
    drawn = Problem(loss, loss, *(data.Minibatches(rows, 4) for _ in range(2)), frozen=MASK)
    np.testing.assert_array_equal(solve(drawn, x, y, solvers.SOBA(), steps=5).y["c"], y["c"])
    shared = Problem(loss, loss, *(data.Agents(rows.reshape(3, 4, 4)) for _ in range(2)), frozen=MASK)
    for solver in (solvers.FedBiO(), solvers.DSOBA(network.ring(3))):
        end = solve(shared, x, y, solver, steps=3).y
        assert bool((end["c"] == y["c"]).all()) and end["u"].shape[-1] == 2


def test_sets_that_are_apart_are_honoured_and_others_refused(x64):
    boxed = Problem(above, below, project_lower=lambda y: jax.tree.map(lambda a: jnp.clip(a, -0.15, 0.05), y),
                    frozen=MASK)  # fmt: skip
    y = {"u": np.zeros(2), "c": np.array([0.03, -0.1])}
    estimate = jax.jit(value_and_hypergradient(boxed, lower_solver=GD))(X, y)
    np.testing.assert_array_equal(estimate.lower.y["c"], y["c"])
    assert float(jnp.max(estimate.lower.y["u"])) <= 0.05
    total = lambda y: jax.tree.map(lambda a: a - (y["u"].sum() + y["c"].sum()) / 4, y)
    with pytest.raises(ProblemError, match=r"project_lower ties the parts of y that move to those of .*frozen"):
        solve(Problem(above, below, project_lower=total, frozen=MASK), X, Y)


def test_masks_that_do_not_fit_are_refused():
    of = lambda frozen: solve(Problem(above, below, frozen=frozen), *start(), steps=1)
    with pytest.raises(ProblemError, match=r"frozen=...\) does not fit y0.*True is constant"):
        of({"u": False})
    with pytest.raises(ProblemError, match=r"makes all of y0 constant"):
        of(True)
    with pytest.raises(ProblemError, match=r"leaves are True \(constant\) and False"):
        of({"u": 0.0, "c": 1.0})
    with pytest.raises(ProblemError, match=r"mask of shape \[3\] for y0\['c'\] of shape \[2\]"):
        of({"u": False, "c": np.ones(3, bool)})


def test_a_problem_with_a_mask_is_a_pytree_and_pickles():
    assert jax.tree.structure(FROZEN) == jax.tree.structure(Problem(above, below, frozen=dict(MASK)))
    assert jax.tree.structure(FROZEN) != jax.tree.structure(FREE)
    assert pickle.loads(pickle.dumps(FROZEN)).frozen == FROZEN.frozen
    assert solve(Problem(above, below, frozen=False), *start(), steps=1).y["c"].shape == (2,)


# ---------------------------------------------------------------- rules that never move a part

LABELS = {"u": "move", "c": "stay"}
HOLDING = {
    "masked": optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), MASK)),
    "masked first": optax.chain(optax.masked(optax.set_to_zero(), MASK), optax.adam(0.1)),
    "partition": optax.partition({"move": optax.adam(0.1), "stay": optax.set_to_zero()}, LABELS),
    "a step of zero": optax.partition({"move": optax.adam(0.1), "stay": optax.sgd(0.0)}, LABELS),
    "of one's own": optax.chain(optax.sgd(0.1), optax.stateless(lambda g, p: {"u": g["u"], "c": 0 * g["c"]})),
    "zeros": optax.chain(optax.adam(0.1), optax.stateless(lambda g, p: {**g, "c": jnp.zeros_like(g["c"])})),
    "clipped after": optax.chain(
        optax.masked(optax.set_to_zero(), MASK), optax.clip_by_global_norm(1.0), optax.sgd(1.0)
    ),
}
for _name in ("freeze", "selective_transform"):
    if hasattr(optax, _name):
        HOLDING[_name] = (
            optax.chain(optax.adam(0.1), optax.freeze(MASK)) if _name == "freeze"
            else optax.selective_transform(optax.adam(0.1), freeze_mask=MASK)
        )  # fmt: skip
MOVING = {
    "adam": optax.adam(0.1),
    "adamw, masked decay": optax.adamw(0.1, mask={"u": True, "c": False}),
    "warm-up": optax.partition(
        {"move": optax.adam(0.1), "stay": optax.sgd(optax.linear_schedule(0.0, 0.1, 9))}, LABELS
    ),
    "accumulated": optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation(),
    "line search": optax.lbfgs(),
    "late": optax.conditionally_transform(optax.set_to_zero(), lambda step: step < 3),
    "clipped": optax.chain(optax.clip(1.0), optax.rmsprop(0.1)),
    "decayed": optax.chain(optax.masked(optax.set_to_zero(), MASK), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", HOLDING)
def test_a_rule_that_never_moves_a_part_is_seen_without_a_step(name):
    assert standing(HOLDING[name], start()[1]) == ["y['c']"]


@pytest.mark.parametrize("name", MOVING)
def test_a_rule_that_moves_all_sooner_or_later_is_not(name):
    assert standing(MOVING[name], start()[1]) == []


def test_a_mask_of_numbers_stands_in_part():
    rule = optax.chain(optax.sgd(0.1), optax.stateless(lambda g, p: {**g, "u": g["u"] * np.array([1.0, 0.0])}))
    assert standing(rule, start()[1]) == ["y['u'] (in part)"]


@pytest.mark.parametrize("solver", [
    solvers.AID(HOLDING["masked"]), solvers.SOBA(0.1, HOLDING["partition"]), solvers.FSLA(HOLDING["masked"], 0.1),
    solvers.F2BA(lower.GradientDescent(HOLDING["masked"], 5)), solvers.T1T2(HOLDING["masked"]), solvers.VRBO(
        0.1, HOLDING["masked"]), solvers.AID(lower.Relative(lower.GradientDescent(HOLDING["masked"], 5, 1e-3))),
], ids=["AID", "SOBA", "FSLA", "F2BA", "T1T2", "VRBO", "AID Relative"])  # fmt: skip
def test_methods_that_would_solve_for_the_constant_too_refuse_and_name_the_cure(solver):
    text = r"never moves y\['c'\].*Problem\(\.\.\., frozen=mask\)"
    with pytest.raises(ProblemError, match=text):
        solve(FREE, *start(), solver, steps=1)
    with pytest.raises(ProblemError, match=text):
        run(FREE, solver, *start(), 1)


def test_estimators_that_follow_the_rule_are_right_with_it(x64):
    """The derivative through the steps takes what they leave for a constant; a tolerance would be the certificate's."""
    rule = HOLDING["masked"]
    for estimator in (hypergradients.Unrolled(), hypergradients.Forward()):
        estimate = jax.jit(value_and_hypergradient(FREE, estimator, lower.GradientDescent(rule, 300)))(X, Y)
        np.testing.assert_allclose(estimate.gradient, slope(), rtol=1e-6)
    with pytest.raises(ProblemError, match=r"value_and_hypergradient with Implicit's lower step rule never moves"):
        value_and_hypergradient(FREE, lower_solver=rule)(X, Y)
    assert solve(FREE, X, Y, solvers.ITD(5, rule), steps=1).result is Result.COMPLETED
    with pytest.raises(ProblemError, match=r"ITD's lower step rule never moves"):
        solve(FREE, X, Y, solvers.ITD(5, rule), steps=1, tol=1e-3)


@pytest.mark.parametrize(
    "schedule", [lambda k: 1e-2 * k, lambda k: 0.1 * k / (k + 10), lambda k: 0.1 * jnp.tanh(k / 10)],
    ids=["linear", "rational", "tanh"],
)  # fmt: skip
def test_a_warm_up_from_zero_moves_its_variable(schedule):
    """Its first step is zero, and no other: a count that begins at zero is not always zero."""
    for rule in (optax.sgd(schedule), optax.adam(schedule)):
        assert standing(rule, {"w": jnp.zeros(3)}) == []
    assert standing(optax.sgd(0.0), {"w": jnp.zeros(3)}) == ["y['w']"]
