"""Stochastic single-loop and nested methods against closed forms and against NumPy loops over the same batches."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, ProblemError, data, run, solve
from bilevel.checkpoint import CheckpointError
from bilevel.data import as_step_key
from bilevel.hypergradients.stochastic import SAMA as AdaptiveIdentity
from bilevel.hypergradients.stochastic import Neumann, StochasticImplicit
from bilevel.keys import Draw
from bilevel.lower import GradientDescent, LowerState
from bilevel.runs import multistart, sweep
from bilevel.solvers import _variance_reduction
from bilevel.solvers._directions import Joint, Point, Series
from bilevel.solvers._variance_reduction import PAGE, SAGA, SARAH, STORM, Momentum
from bilevel.solvers.single_loop import FSLA, MASOBA, MRBO, SABA, SOBA, SPABA, SRBA, SUSTAIN, AdamSOBA, SingleLoop
from bilevel.solvers.stochastic_nested import BSA, SAMA, TTSA, VRBO, AmIGO, StocBiO
from bilevel.solvers.tuning_free import DTFBO, STFBO

N, M, SIZE, D, P = 12, 9, 3, 3, 2
BLOCKS = N // SIZE


def lower_loss(x, y, batch):
    a, c, b = batch
    return jnp.mean(0.5 * jnp.einsum("i,nij,j->n", y, a, y) + jnp.einsum("i,nij,j->n", y, c, x) + b @ y)


def upper_loss(x, y, batch):
    t, e = batch
    return jnp.mean(0.5 * jnp.sum((y - t) ** 2, axis=1) + e @ x) + 0.1 * jnp.sum(x**2)


@dataclasses.dataclass
class Quadratic:
    """f_i = y'A_i y / 2 + y'C_i x + b_i'y,  F_i = |y - t_i|^2 / 2 + e_i'x + |x|^2 / 10, in NumPy."""

    lower: tuple
    upper: tuple

    def joint(self, x, y, v, rows=slice(None), held=slice(None)):
        a, c, b = (z[rows].mean(0) for z in self.lower)
        t, e = (z[held].mean(0) for z in self.upper)
        return e + 0.2 * x - c.T @ v, a @ y + c @ x + b, a @ v - (y - t)

    def solution(self):
        a, c, b = (z.mean(0) for z in self.lower)
        t, e = (z.mean(0) for z in self.upper)
        s = -np.linalg.solve(a, c)
        x = np.linalg.solve(s.T @ s + 0.2 * np.eye(P), -e - s.T @ (-np.linalg.solve(a, b) - t))
        y = s @ x - np.linalg.solve(a, b)
        return x, y, np.linalg.solve(a, y - t)

    def hypergradient(self, x, y):
        a, c, _ = (z.mean(0) for z in self.lower)
        t, e = (z.mean(0) for z in self.upper)
        return e + 0.2 * x - c.T @ np.linalg.solve(a, y - t)


def make(seed=0):
    rng = np.random.default_rng(seed)
    root = 0.4 * rng.standard_normal((N, D, D))
    a = np.einsum("nij,nkj->nik", root, root) + 0.5 * np.eye(D)
    lower = a, 0.5 * rng.standard_normal((N, D, P)), rng.standard_normal((N, D))
    return Quadratic(lower, (rng.standard_normal((M, D)), rng.standard_normal((M, P))))


def problem_of(q, size=SIZE, blocks=True, **kwargs):
    if size is None:
        return Problem(upper_loss, lower_loss, q.upper, q.lower, **kwargs)
    minibatches = [data.Minibatches(a, size, blocks=blocks) for a in (q.upper, q.lower)]
    return Problem(upper_loss, lower_loss, *minibatches, **kwargs)


def start(seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(P), rng.standard_normal(D)


def rows_of(problem, step, draws=1, i=0, tag=None, level="lower"):
    """The rows that a level's batch holds at a step, in the package's own order."""
    block = int(block_of(problem, np.uint32(step), np.uint32(i), draws, tag, level))
    return slice(block * SIZE, block * SIZE + SIZE)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def block_of(problem, step, i, draws, tag, level):
    source = problem.lower_data if level == "lower" else problem.upper_data
    key = dataclasses.replace(as_step_key(0), step=step).fold_in(0 if level == "lower" else 1)
    if tag is not None:
        key = key.fold_in(tag)
    return source.numbered(key.inner(i, draws) if draws > 1 else key)[0]


# ---------------------------------------------------------------- SOBA and the variance-reduced rules


def test_full_batch_soba_is_deterministic_and_its_fixed_point_is_the_solution(x64):
    q = make()
    problem, (x0, y0) = problem_of(q, None), start()
    solver = SOBA(0.1, 0.5, decay=None)
    runs = [solve(problem, x0, y0, solver, steps=2000, key=key) for key in (0, 7)]
    x, y, v = q.solution()
    np.testing.assert_array_equal(runs[0].x, runs[1].x)
    np.testing.assert_allclose(runs[0].x, x, atol=1e-12)
    np.testing.assert_allclose(runs[0].y, y, atol=1e-12)
    np.testing.assert_allclose(runs[0].state.v, v, atol=1e-12)
    for name in ("hypergradient_norm", "lower_residual", "linear_residual"):
        assert runs[0].history[name][-1] < 1e-12


def test_variance_reduction_reaches_the_solution_with_constant_steps_where_soba_stalls(x64):
    q = make()
    problem, (x0, y0) = problem_of(q), start()
    x, y, _ = q.solution()

    def error(solver, steps=4000):
        state, _ = jax.jit(lambda s: run(problem, s, x0, y0, steps))(solver)
        return max(np.abs(state.x - x).max(), np.abs(state.y - y).max())

    stalled = error(SOBA(0.05, 0.2, decay=None))
    assert 1e-3 < stalled < 3  # its noise floor: neither converged nor diverged
    assert error(SABA(0.05, 0.2)) < 1e-10
    assert error(SRBA(0.05, 0.2)) < 1e-10
    assert error(SPABA(0.05, 0.2)) < 1e-10


def test_saga_with_deferred_writes_is_saga(x64):
    q = make()
    problem, (x, y) = problem_of(q), start()
    solver = SABA(0.05, 0.2)
    found, metrics = jax.jit(run, static_argnums=4)(problem, solver, x, y, 25)

    v, table = np.zeros(D), {"lower": np.zeros((BLOCKS, 2 * D + P)), "upper": np.zeros((M // SIZE, D + P))}
    for t in range(25):
        rows, held = rows_of(problem, t), rows_of(problem, t, level="upper")
        a, c, b = (z[rows].mean(0) for z in q.lower)
        goal, e = (z[held].mean(0) for z in q.upper)
        new = {
            "lower": np.concatenate([c.T @ v, a @ y + c @ x + b, a @ v]),
            "upper": np.concatenate([e + 0.2 * x, y - goal]),
        }
        direction = {}
        for level, block in (("lower", rows.start // SIZE), ("upper", held.start // SIZE)):
            direction[level] = new[level] - table[level][block] + table[level].mean(0)
            table[level][block] = new[level]
        low, up = direction["lower"], direction["upper"]
        d_x, d_y, d_v = up[:P] - low[:P], low[P : P + D], low[P + D :] - up[P:]
        np.testing.assert_allclose(metrics["hypergradient_norm"][t], np.linalg.norm(d_x), rtol=1e-10)
        x, y, v = x - 0.05 * d_x, y - 0.2 * d_y, v - 0.2 * d_v
    np.testing.assert_allclose(found.x, x, atol=1e-12)
    np.testing.assert_allclose(found.y, y, atol=1e-12)
    np.testing.assert_allclose(found.v, v, atol=1e-12)


def test_large_rows_keep_a_table_per_term_and_give_the_same_iterates(x64, monkeypatch):
    import bilevel.solvers._variance_reduction as module

    problem, (x, y) = problem_of(make()), start()
    go = lambda: jax.jit(lambda x, y: run(problem, SABA(0.05, 0.2), x, y, 20)[0])(x, y)  # traced anew at each call
    packed = go()
    monkeypatch.setattr(module, "_SMALL", 0)
    separate = go()
    assert len(jax.tree.leaves(separate.memory)) > len(jax.tree.leaves(packed.memory))
    np.testing.assert_allclose(separate.x, packed.x, atol=1e-14)


def test_the_tables_are_not_copied_inside_the_compiled_loop():
    count, dim = 640, 2048
    problem = Problem(
        lambda x, y, b: 0.5 * jnp.sum((y - b.mean(0)) ** 2),
        lambda x, y, b: 0.5 * jnp.sum((y - x * b.mean(0)) ** 2),
        jnp.ones((4, dim)),
        data.Minibatches(jnp.ones((count, dim)), 1, blocks=True),
    )
    compiled = (
        jax.jit(lambda p, x, y: run(p, SABA(), x, y, 10)[0])
        .lower(problem, jnp.ones(dim), jnp.ones(dim))
        .compile()
        .as_text()
    )
    body = compiled[: compiled.index("ENTRY")]
    assert f"f32[{count},{dim}]" in body
    assert not re.findall(rf"= f32\[{count},{dim}\]\S* copy\(", body)


@pytest.mark.parametrize(
    "name", ["SRBA", "MASOBA", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SPABA", "FSLA"))]
)
def test_each_rule_is_its_equations(x64, name):
    q = make()
    problem, (x, y) = problem_of(q), start()
    solver = {
        "SRBA": SRBA(0.05, 0.2, period=4),
        "MASOBA": MASOBA(0.05, 0.2, theta=0.3),
        "SPABA": SPABA(0.05, 0.2),
        "FSLA": FSLA(0.2, 0.05, 0.5),
    }[name]
    steps = 13
    found, _ = jax.jit(lambda: run(problem, solver, x, y, steps))()
    restarts = jax.jit(lambda t: PAGE().restarts(problem, dataclasses.replace(as_step_key(0), step=t)))

    v, before, direction, m = np.zeros(D), None, None, np.zeros(P)
    for t in range(steps):
        rows, held = rows_of(problem, t), rows_of(problem, t, level="upper")
        scale = (t + 1) ** -0.5
        if name == "FSLA":
            eta = 0.5 * scale if t else 1.0
            i = [rows_of(problem, t, 3, j) for j in range(3)]
            u = [rows_of(problem, t, 2, j, level="upper") for j in range(2)]
            old = (x, y, v) if before is None else before
            y = y - 0.2 * scale * q.joint(x, y, v, i[0])[1]
            v = v - 0.2 * scale * q.joint(x, y, v, i[1], u[0])[2]
            m = q.joint(x, y, v, i[2], u[1])[0] + (1 - eta) * (m - q.joint(*old, i[2], u[1])[0])
            before = (x, y, v)
            x = x - 0.05 * scale * m
            continue
        if name == "MASOBA":
            d = q.joint(x, y, v, rows, held)
            m = 0.7 * m + 0.3 * d[0]
            d = m, d[1], d[2]
        else:
            restart = t % 4 == 0 if name == "SRBA" else bool(restarts(np.uint32(t)))
            if restart:
                d = q.joint(x, y, v)
            else:
                pairs = zip(direction, q.joint(x, y, v, rows, held), q.joint(*before, rows, held), strict=True)
                d = tuple(last + now - then for last, now, then in pairs)
            before, direction = (x, y, v), d
        x, y, v = x - 0.05 * d[0], y - 0.2 * d[1], v - 0.2 * d[2]
    np.testing.assert_allclose(found.x, x, atol=1e-12)
    np.testing.assert_allclose(found.y, y, atol=1e-12)


def test_the_directions_are_unbiased_with_the_variance_that_theory_says(x64):
    """Over all blocks: mean = full direction; variance of D_y = mean |f_y(B) - f_y|^2, that of D_x the sum of both."""
    q = make()
    problem = problem_of(q)
    x, y = start(3)
    v = np.random.default_rng(5).standard_normal(D)
    at = Point(jnp.asarray(x), jnp.asarray(y), jnp.asarray(v))
    period = BLOCKS * (M // SIZE)  # lower blocks repeat every 4 draws, upper ones every 3
    draw = jax.jit(lambda t: Joint()(*problem.levels(dataclasses.replace(as_step_key(0), step=t)), at)[1])
    drawn = [draw(jnp.uint32(t)) for t in range(period * 40)]

    full = q.joint(x, y, v)
    lower = [q.joint(x, y, v, rows=slice(SIZE * b, SIZE * b + SIZE)) for b in range(BLOCKS)]
    upper = [q.joint(x, y, v, held=slice(SIZE * b, SIZE * b + SIZE)) for b in range(M // SIZE)]
    for i, name in enumerate(("x", "y", "v")):
        sample = np.stack([getattr(d, name) for d in drawn])
        variance = sum(np.mean([np.sum((part[i] - full[i]) ** 2) for part in parts]) for parts in (lower, upper))
        tolerance = (
            1e-12 if name == "y" else 4 * np.sqrt(variance / len(drawn))
        )  # y: one level, exact over whole epochs
        np.testing.assert_allclose(sample.mean(0), full[i], atol=tolerance)
        found = np.mean(np.sum((sample - full[i]) ** 2, axis=1))
        np.testing.assert_allclose(found, variance, rtol=1e-12 if name == "y" else 0.1)


def test_saga_has_no_variance_at_the_solution_once_its_tables_are_full(x64):
    q = make()
    problem = problem_of(q)
    at = Point(*(jnp.asarray(z) for z in q.solution()))
    rule, oracle = SAGA(), Joint()
    step = jax.jit(lambda memory, t: rule(problem, oracle, at, memory, dataclasses.replace(as_step_key(0), step=t))[1:])
    memory = rule.init(problem, oracle, at)
    for t in range(2 * BLOCKS * M // SIZE):
        direction, memory = step(memory, jnp.uint32(t))
    for leaf in jax.tree.leaves(direction):
        np.testing.assert_allclose(leaf, 0, atol=1e-13)


def test_storm_uses_the_same_sample_at_both_points(x64):
    """The corrections cancel noise that is additive in the gradients: the error only shrinks by 1 - eta per step.

    f_i = |y|^2 / 2 - x'y + noise_i'y. Had the last point's direction been taken on another sample, the error would
    random-walk.
    """
    rng = np.random.default_rng(0)
    noise = 10 * rng.standard_normal((40, 2))
    noise -= noise.mean(0)
    problem = Problem(
        lambda x, y: 0.5 * jnp.sum(y**2) + 0.5 * jnp.sum(x**2),
        lambda x, y, b: 0.5 * jnp.sum(y**2) - x @ y + b.mean(0) @ y,
        None,
        data.Minibatches(noise, 1),
    )
    solver = SingleLoop(0.1, 0.01, reduction=STORM(1e-3, 0.0))
    x, y = np.ones(2), np.ones(2)
    state = jax.jit(lambda: solver.init(problem, x, y, as_step_key(0)))()

    @jax.jit
    def step(state, t):
        key = dataclasses.replace(as_step_key(0), step=t)
        return solver.step(problem, state, key)[0], problem.draw_lower(key).batch

    error = None
    for t in range(12):
        at = np.asarray(state.x), np.asarray(state.y)
        state, batch = step(state, np.uint32(t))
        now = np.asarray(state.memory.direction.y) - (at[1] - at[0])  # the noise left in the direction
        drawn = np.asarray(batch)[0]
        expected = drawn if t == 0 else (1 - 1e-3) * error + 1e-3 * drawn
        np.testing.assert_allclose(now, expected, atol=1e-10)
        error = now
    assert np.abs(error).max() > 1  # the noise was there


def test_step_rules_decays_and_momentum(x64):
    q = make()
    problem, (x, y) = problem_of(q, None), start()
    state, _ = run(problem, SOBA(0.1, 0.2, linear_optimizer=0.05), x, y, 3)
    v = np.zeros(D)
    for t in range(3):
        d, scale = q.joint(x, y, v), (t + 1) ** -0.5
        x, y, v = x - 0.1 * scale * d[0], y - 0.2 * scale * d[1], v - 0.05 * scale * d[2]
    np.testing.assert_allclose(state.x, x, atol=1e-14)
    np.testing.assert_allclose(state.v, v, atol=1e-14)

    x0, y0 = start()
    adam = solve(problem, x0, y0, AdamSOBA(0.02, 0.05), steps=3000)
    np.testing.assert_allclose(adam.x, q.solution()[0], atol=1e-4)
    momentum = solve(problem, x0, y0, SOBA(optax.sgd(0.02, momentum=0.5), 0.5, decay=None), steps=3000)
    np.testing.assert_allclose(momentum.x, q.solution()[0], atol=1e-10)


def test_a_projection_of_the_upper_variable_is_honoured(x64):
    q = make()
    x0, y0 = start()
    problem = problem_of(q, None, project_upper=lambda x: jnp.clip(x, -0.2, 0.2))
    for solver in (SOBA(0.1, 0.5, decay=None), SABA(0.1, 0.5), FSLA(0.5, 0.1, decay=0.0), STFBO(), DTFBO()):
        found = solve(problem, x0, y0, solver, steps=3000)
        gradient = q.hypergradient(np.asarray(found.x), np.asarray(found.y))
        fixed = np.clip(found.x - gradient, -0.2, 0.2)
        np.testing.assert_allclose(found.x, fixed, atol=1e-6)
        assert np.abs(found.x).max() == pytest.approx(0.2)


# ---------------------------------------------------------------- nested methods


def test_the_stochastic_series_is_its_equations(x64):
    q = make()
    problem, (x, y) = problem_of(q), start()
    v, warm = np.ones(D), StochasticImplicit(0.3, 5, warm_start=True)

    @jax.jit
    def of_package(key):
        upper, lower = problem.draw_upper(key), problem.draw_lower(key)
        b = jax.grad(upper, 1)(x, y)
        plain = StochasticImplicit(0.3, 5).solve(lower, x, y, b, None), Neumann(0.3, 5)(lower, x, y, b)
        return b, plain, warm.solve(lower, x, y, b, v)

    b, plain, warmed = jax.tree.map(np.asarray, of_package(as_step_key(0, 4)))
    p, total = b, b
    for j in range(5):
        p = p - 0.3 * q.lower[0][rows_of(problem, 4, 5, j, tag=Draw.PRODUCTS)].mean(0) @ p
        total = total + p
    for found in plain:
        np.testing.assert_allclose(found, 0.3 * total, atol=1e-12)
    assert np.abs(p - b).max() > 1e-2

    expected = v
    for j in range(5):
        expected = expected - 0.3 * (q.lower[0][rows_of(problem, 4, 5, j, tag=Draw.PRODUCTS)].mean(0) @ expected - b)
    np.testing.assert_allclose(warmed, expected, atol=1e-12)


def test_the_randomised_product_has_the_series_as_its_mean(x64):
    q = make()
    problem, (x, y) = problem_of(q, None), start()
    b, a = np.ones(D), q.lower[0].mean(0)
    exact = sum(0.3 * np.linalg.matrix_power(np.eye(D) - 0.3 * a, k) @ b for k in range(6))
    estimator = StochasticImplicit(0.3, 6, randomised=True)
    for method in (lambda *at: estimator.solve(*at, None), Neumann(0.3, 6, randomised=True)):
        draw = jax.jit(lambda t, m=method: m(problem.draw_lower(dataclasses.replace(as_step_key(0), step=t)), x, y, b))
        samples = np.stack([draw(jnp.uint32(t)) for t in range(600)])
        assert len(np.unique(np.round(samples[:, 0], 9))) == 6
        np.testing.assert_allclose(samples.mean(0), exact, atol=4 * samples.std(0).max() / np.sqrt(600))


@pytest.mark.parametrize(
    "solver",
    [
        StocBiO(0.1, 0.4, 20, 0.4, 60),
        AmIGO(0.1, 0.4, 10, 0.4, 5),
        VRBO(0.1, 0.4, Series(0.4, 60)),
        MRBO(1.0, 1.0, 0.4, 60),
    ],
    ids=["StocBiO", "AmIGO", "VRBO", "MRBO"],
)
def test_nested_methods_on_full_batches_reach_the_solution(x64, solver):
    q = make()
    x0, y0 = start()
    found = solve(problem_of(q, None), x0, y0, solver, steps=1500)
    np.testing.assert_allclose(found.x, q.solution()[0], atol=1e-6)


def test_decaying_steps_of_bsa_and_ttsa(x64):
    q = make()
    problem, (x, y) = problem_of(q, None), start()
    # One product (P = 0 always): v = eta F_y.
    for solver, exponents, n in ((BSA(0.1, 0.2, 2, 0.3, 1), (0.5, 0.5), 2), (TTSA(0.1, 0.2, 0.3, 1), (0.4, 0.6), 1)):
        state, _ = run(problem, solver, x, y, 4)
        u, w = x, y
        for t in range(4):
            for _ in range(n):
                w = w - 0.2 * (t + 1) ** -exponents[0] * q.joint(u, w, 0 * w)[1]
            v = 0.3 * (w - q.upper[0].mean(0))
            gradient = q.upper[1].mean(0) + 0.2 * u - q.lower[1].mean(0).T @ v
            u = u - 0.1 * (t + 1) ** -exponents[1] * gradient
        np.testing.assert_allclose(state.x, u, atol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        SUSTAIN(0.2, 0.5, 0.3, 20),
        BSA(0.1, 0.4, 5, 0.3, 20),
        pytest.param(TTSA(0.2, 0.5, 0.3, 20), marks=pytest.mark.slow),
        pytest.param(FSLA(0.3, 0.1), marks=pytest.mark.slow),
    ],
    ids=["SUSTAIN", "BSA", "TTSA", "FSLA"],
)
def test_stochastic_nested_and_momentum_methods_improve_on_minibatches(solver):
    q = make()
    x0, y0 = (z.astype(np.float32) for z in start())
    q = Quadratic(*(tuple(z.astype(np.float32) for z in level) for level in (q.lower, q.upper)))
    x = q.solution()[0]
    before = np.linalg.norm(x0 - x)
    state, _ = jax.jit(lambda: run(problem_of(q), solver, x0, y0, 1500))()
    assert np.linalg.norm(state.x - x) < 0.3 * before


def test_sama_takes_the_derivative_of_the_update_for_the_inverse_hessian(x64):
    q = make()
    problem, (x, y) = problem_of(q, None), start()
    upper, lower = problem.draw_upper(0), problem.draw_lower(0)
    rule = optax.adam(0.01)

    def found_and_expected(optimizer, radius):
        solver = GradientDescent(optimizer, 3)
        estimate = AdaptiveIdentity(radius)(upper, lower, solver, x, solver.init(jnp.asarray(y)), None)
        found: LowerState = estimate.lower
        gradient, upper_y = lower.gradient(x, found.y), found.y - q.upper[0].mean(0)
        if optimizer == 0.3:
            v = 0.3 * upper_y
        else:
            e = 1e-6
            update = lambda g: rule.update(g, found.memory, found.y)[0]
            v = -(update(gradient + e * upper_y) - update(gradient - e * upper_y)) / (2 * e)
        expected = (
            q.upper[1].mean(0) + 0.2 * x - q.lower[1].mean(0).T @ v
        )  # the finite difference is exact on a quadratic
        return estimate.gradient, expected

    cases = (0.3, None), (rule, None), (rule, 1.0)
    for found, expected in jax.jit(lambda: [found_and_expected(*case) for case in cases])():
        np.testing.assert_allclose(found, expected, atol=1e-8)
    trained = solve(problem, x, y, SAMA(1e-2, optax.adam(1e-2)), steps=300)
    assert trained.history["upper_loss"][-1] < trained.history["upper_loss"][0]


# ---------------------------------------------------------------- no step sizes; sweeps


@pytest.mark.parametrize("solver", [STFBO(), STFBO(0.1), DTFBO(), DTFBO(5, 20, 10.0)], ids=str)
def test_tuning_free_methods_reach_the_solution(x64, solver):
    q = make()
    x0, y0 = start()
    found = solve(problem_of(q, None), x0, y0, solver, steps=6000, tol=1e-7)
    assert found.result.name == "CONVERGED"
    np.testing.assert_allclose(found.x, q.solution()[0], atol=1e-5)


def test_stfbo_is_its_equations(x64):
    q = make()
    (x, y), v = start(), np.zeros(D)
    x0, y0 = x, y
    alpha2 = beta2 = gamma2 = 1.0
    for _ in range(5):
        d_x, d_y, d_v = q.joint(x, y, v)
        beta2, gamma2, alpha2 = beta2 + d_y @ d_y, gamma2 + d_v @ d_v, alpha2 + d_x @ d_x
        phi = np.sqrt(max(beta2, gamma2))
        x, y, v = x - d_x / (np.sqrt(alpha2) * phi), y - d_y / np.sqrt(beta2), v - d_v / phi
    state, _ = run(problem_of(q, None), STFBO(), x0, y0, 5)
    np.testing.assert_allclose(state.x, x, atol=1e-13)
    np.testing.assert_allclose(state.v, v, atol=1e-13)


def test_a_sweep_is_its_runs_and_returns_the_best():
    q = make()
    problem, (x0, y0) = problem_of(q), (z.astype(np.float32) for z in start())
    x0, y0 = start()
    solvers = [SABA(b, a) for a in (0.1, 0.3) for b in (0.01, 0.1)] + [SABA(1e3, 0.3)]
    found = sweep(problem, solvers, x0, y0, steps=60, key=3)
    go = jax.jit(lambda s: run(problem, s, x0, y0, 60, 3)[0])
    alone = [go(s) for s in solvers[:4]]
    for i, state in enumerate(alone):
        np.testing.assert_allclose(found.state.x[i], state.x, rtol=1e-4, atol=1e-5)
    score = jax.jit(lambda s: problem.full_upper()(s.x, s.y))
    scores = [float(score(s)) for s in alone]
    np.testing.assert_allclose(found.scores[:4], scores, rtol=1e-4)
    assert np.isinf(found.scores[4])
    assert found.solver == solvers[int(np.argmin(scores))]
    assert "1 diverged" in repr(found)


def test_a_sweep_says_what_it_cannot_do():
    q = make()
    problem, (x0, y0) = problem_of(q), start()
    with pytest.raises(ValueError, match="differ in numbers only, and solver 1 differs"):
        sweep(problem, [StocBiO(lower_steps=1), StocBiO(lower_steps=2)], x0, y0, steps=2)
    with pytest.raises(ValueError, match="at least one solver"):
        sweep(problem, [], x0, y0)
    with pytest.raises(ValueError, match="all 1 runs diverged within 100 steps"):
        sweep(problem, [SABA(1e4, 1e4)], x0, y0, steps=100)
    with pytest.raises(ValueError, match="has no numbers to vary"):
        sweep(problem, [SingleLoop(optax.scale_by_sign(), optax.scale_by_sign())], x0, y0)
    with pytest.raises(ValueError, match=r"solver 1 differs from solver 0.*another rule"):
        sweep(problem, [SingleLoop(optax.adam(0.1), 0.1), SingleLoop(optax.sgd(0.1), 0.1)], x0, y0)


@pytest.mark.parametrize(
    "rule",
    [
        optax.adam,
        lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, 50), momentum=0.9),
        lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.sgd)(rate)),
    ],
    ids=["adam", "schedule", "injected"],
)
def test_a_sweep_over_the_rates_of_a_rule_is_one_programme(rule):
    problem, (x0, y0) = problem_of(make()), start()
    rates = (0.01, 0.03, 0.1)
    found = sweep(problem, [SingleLoop(rule(rate), 0.1) for rate in rates], x0, y0, steps=40, key=3)
    for i, rate in enumerate(rates):
        state, _ = run(problem, SingleLoop(rule(rate), 0.1), x0, y0, 40, 3)
        np.testing.assert_allclose(found.state.x[i], state.x, rtol=1e-4, atol=1e-5)
    assert len({float(np.sum(x)) for x in found.state.x}) == len(rates)


def test_a_multistart_chooses_by_all_samples_and_not_by_the_last_batch():
    random = np.random.default_rng(0)
    values = lambda: data.Minibatches(random.normal(size=(64,)).astype(np.float32), 2)
    problem = Problem(
        lambda x, y, b: jnp.mean((y - b) ** 2), lambda x, y, b: jnp.mean((y - x - b) ** 2), values(), values()
    )
    starts = np.linspace(-0.3, 0.3, 8).astype(np.float32)
    upper = jax.jit(jax.vmap(problem.full_upper()))
    for key in range(4):
        found = multistart(problem, starts, starts, SOBA(0.01, 0.02), steps=3, key=key)
        assert found.best == int(np.argmin(upper(found.xs, found.ys)))
    assert "score" not in found.metrics


# ---------------------------------------------------------------- reproducible, resumable, parallel


def test_each_epoch_of_blocks_is_a_permutation_and_none_is_the_last_one():
    source = data.Minibatches(np.arange(37.0), 4, blocks=True)
    numbers = np.asarray(
        jax.vmap(lambda t: source.numbered(dataclasses.replace(as_step_key(2), step=t))[0])(
            jnp.arange(40, dtype=jnp.uint32)
        )
    )
    epochs = numbers.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize(
    "solver", [pytest.param(SABA(0.05, 0.2), marks=pytest.mark.slow), SRBA(0.05, 0.2)], ids=["SABA", "SRBA"]
)
def test_a_run_does_not_depend_on_the_chunk_size(solver):
    """SABA's tables cross from one call into another in the next test too."""
    q = make()
    problem, (x0, y0) = problem_of(q), start()
    one, other = (solve(problem, x0, y0, solver, steps=40, key=5, chunk=chunk) for chunk in (7, 40))
    for a, b in zip(jax.tree.leaves(one.state), jax.tree.leaves(other.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(solve(problem, x0, y0, solver, steps=40, key=6, chunk=40).x, one.x)


def test_a_resumed_run_is_the_uninterrupted_one_tables_included(tmp_path):
    q = make()
    problem, (x0, y0) = problem_of(q), start()
    whole = solve(problem, x0, y0, SABA(0.05, 0.2), steps=30)
    solve(problem, x0, y0, SABA(0.05, 0.2), steps=17, checkpoint=tmp_path / "run")
    resumed = solve(problem, x0, y0, SABA(0.05, 0.2), steps=30, checkpoint=tmp_path / "run")
    assert jax.tree.structure(whole.state) == jax.tree.structure(resumed.state)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = Quadratic((q.lower[0], q.lower[1], q.lower[2] + 1), q.upper)
    with pytest.raises(CheckpointError, match="lower_data"):
        solve(problem_of(changed), x0, y0, SABA(0.05, 0.2), steps=40, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("methods", ["SABA", pytest.param("SOBA, SRBA", marks=pytest.mark.slow)])
def test_a_sharded_sample_axis_gives_the_same_iterates(methods):
    """On full batches and on minibatches."""
    script = textwrap.dedent("""
        import re
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec
        from bilevel import Problem, data, run
        from bilevel.solvers.single_loop import SABA, SOBA, SRBA

        mesh = jax.make_mesh((4,), ("samples",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = NamedSharding(mesh, PartitionSpec("samples"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        rng = np.random.default_rng(0)

        def loss(y, batch):
            features, labels = batch
            return jnp.mean(jax.nn.softplus(-labels * (features @ y)))

        def sample(n):
            return rng.standard_normal((n, 5)).astype(np.float32), np.sign(rng.standard_normal(n)).astype(np.float32)

        upper, lower = (lambda x, y, b: loss(y, b)), (lambda x, y, b: loss(y, b) + 0.5 * jnp.sum(jnp.exp(x) * y**2))
        train, held = sample(64), sample(32)
        x, y = jnp.zeros(5), jnp.ones(5)
        go = jax.jit(lambda problem, solver, x, y: run(problem, solver, x, y, 20)[0], static_argnums=())
        put = lambda tree, where: jax.tree.map(lambda a: jax.device_put(a, where), tree)
        minibatches = lambda a: data.Minibatches(a, 8, blocks=True)
        for wrap, solvers in ((lambda a: a, [SOBA()]), (minibatches, [method() for method in METHODS])):
            for solver in solvers:
                plain = go(Problem(upper, lower, wrap(held), wrap(train)), solver, x, y)
                sharded = Problem(upper, lower, wrap(put(held, rows)), wrap(put(train, rows)))
                parallel = go(sharded, solver, put(x, everywhere), put(y, everywhere))
                for name in ("x", "y", "v"):
                    np.testing.assert_allclose(getattr(plain, name), getattr(parallel, name), rtol=2e-5, atol=2e-6)
        sharded = Problem(upper, lower, put(held, rows), put(train, rows))
        step = jax.jit(lambda p, s: SOBA().step(p, s, data.as_step_key(0))[0])
        state = SOBA().init(sharded, put(x, everywhere), put(y, everywhere), data.as_step_key(0))
        text = step.lower(sharded, state).compile().as_text()
        reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\\(", text)
        print("all-reduces", len(reduced), "gathers", len(re.findall(r" all-gather", text)))
    """)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    script = script.replace("METHODS", f"[{methods}]")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    reduces, gathers = map(int, re.search(r"all-reduces (\d+) gathers (\d+)", done.stdout).groups())
    assert gathers == 0
    assert 1 <= reduces <= 5  # at most one per term: f_y, f_yy v, F_y, F_x and the loss (f_xy v has none here)


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(SOBA(0.5, 0.5), marks=pytest.mark.slow),
        SABA(0.5, 0.2),
        pytest.param(SRBA(0.5, 0.2), marks=pytest.mark.slow),
        STFBO(),
    ],
    ids=["SOBA", "SABA", "SRBA", "STFBO"],
)
def test_losses_in_bfloat16_train_parameters_in_float32(solver):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((64, 4)).astype(np.float32)
    labels = np.sign(features @ np.asarray([1.0, -2.0, 0.5, 0.0], np.float32))

    def loss(y, batch):
        features, labels = jax.tree.map(lambda a: a.astype(jnp.bfloat16), batch)
        return jnp.mean(jax.nn.softplus(-labels * (features @ y.astype(jnp.bfloat16))))

    problem = Problem(
        lambda x, y, b: loss(y, b),
        lambda x, y, b: loss(y, b) + (0.5 * jnp.sum(jnp.exp(x) * y**2)).astype(jnp.bfloat16),
        data.Minibatches((features[:32], labels[:32]), 8, blocks=True),
        data.Minibatches((features[32:], labels[32:]), 8, blocks=True),
    )
    found = solve(problem, np.zeros(4, np.float32), np.zeros(4, np.float32), solver, steps=300)
    assert {leaf.dtype for leaf in jax.tree.leaves((found.x, found.y))} == {jnp.dtype("float32")}
    full = jax.jit(lambda y: loss(y, (features[:32], labels[:32])))
    assert float(full(found.y)) < 0.85 * float(full(np.zeros(4, np.float32)))


@pytest.mark.parametrize(
    "solver",
    [
        SABA(0.05, 0.2),
        DTFBO(),
        *(pytest.param(solver, marks=pytest.mark.slow) for solver in (FSLA(), AmIGO(0.01))),
    ],
    ids=["SABA", "DTFBO", "FSLA", "AmIGO"],
)
def test_variables_may_be_any_pytree(solver):
    q = make()
    problem = Problem(
        lambda x, y, b: upper_loss(jnp.concatenate(x), y["y"], b),
        lambda x, y, b: lower_loss(jnp.concatenate(x), y["y"], b),
        data.Minibatches(q.upper, SIZE, blocks=True),
        data.Minibatches(q.lower, SIZE, blocks=True),
    )
    x0, y0 = (jnp.asarray(z) for z in start())
    plain, tree = (x0, y0), ((x0[:1], x0[1:]), {"y": y0})
    go = jax.jit(run, static_argnums=4)
    a, _ = go(problem_of(q), solver, *plain, 6)
    b, _ = go(problem, solver, *tree, 6)
    np.testing.assert_allclose(a.x, np.concatenate(b.x), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- bad input


def test_tables_are_counted_and_refused_before_they_are_allocated():
    q = make()
    problem, (x0, y0) = problem_of(q), (z.astype(np.float32) for z in start())
    x0, y0 = (z.astype(np.float32) for z in start())
    expected = 4 * ((2 * D + P) * BLOCKS + (D + P) * (M // SIZE))
    assert SABA().table_bytes(problem, x0, y0) == expected
    assert SRBA().table_bytes(problem, x0, y0) == 0
    state = SABA().init(problem, jnp.asarray(x0), jnp.asarray(y0), as_step_key(0))
    rows = [leaf for leaf in jax.tree.leaves(state.memory) if leaf.ndim == 2]
    assert sum(leaf.nbytes for leaf in rows) == expected
    with pytest.raises(
        ProblemError, match=r"SAGA's tables would take 188 bytes, more than its bound of 100 bytes.*Take SRBA"
    ):
        solve(problem, x0, y0, SABA(max_table_bytes=100), steps=1)
    wide = Problem(
        lambda x, y: jnp.sum(y**2),
        lambda x, y, b: jnp.sum((y - x) ** 2),
        None,
        data.Minibatches(np.zeros((10**6, 1), np.float32), 1, blocks=True),
    )
    with pytest.raises(ProblemError, match=r"would take 1.12e.04 GiB, more than its bound of 4 GiB"):
        SABA().init(wide, jnp.zeros(10**6), jnp.zeros(10**6), as_step_key(0))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            lambda a: data.Minibatches(a, 3),
            "drawn afresh from the samples. Write data.Minibatches.arrays, size, blocks=True",
        ),
        (
            lambda a: data.Minibatches(a, 5, blocks=True),
            "5 does not divide the 12 samples of lower_data.*Take size=4, drop the last 2 samples",
        ),
        (
            lambda a: data.Minibatches(jax.tree.map(lambda z: z[:11], a), 4, blocks=True),
            "4 does not divide the 11 samples.*Either drop the last 3",
        ),
        (lambda a: data.Sampler(lambda key, a: a, a), "the batches of lower_data, a Sampler, have no numbers"),
    ],
)
def test_saga_refuses_data_without_numbered_blocks(source, words):
    q = make()
    problem = Problem(upper_loss, lower_loss, q.upper, source(q.lower))
    with pytest.raises(ProblemError, match=words):
        solve(problem, *start(), SABA(), steps=1)


def test_methods_with_full_passes_refuse_endless_data():
    q = make()
    problem = Problem(upper_loss, lower_loss, q.upper, data.Sampler(lambda key, a: a, q.lower))
    for solver in (SRBA(), SPABA(), VRBO()):
        with pytest.raises(ProblemError, match="passes over all samples now and then, and lower_data is a Sampler"):
            solve(problem, *start(), solver, steps=1)


def test_what_a_solver_cannot_honour_is_refused():
    q = make()
    for solver in (SOBA(), SABA(), FSLA(), VRBO(), STFBO(), DTFBO()):
        with pytest.raises(ProblemError, match="cannot honour the lower projection project_lower="):
            solve(problem_of(q, project_lower=lambda y: y), *start(), solver, steps=1)
    with pytest.raises(ValueError, match="assumes f_y = 0 at the solution"):
        solve(problem_of(q, project_lower=lambda y: y), *start(), AmIGO(), steps=1)
    with pytest.raises(ProblemError, match="does not combine with a Neumann series"):
        solve(problem_of(q), *start(), SingleLoop(reduction=SAGA(), directions=Series()), steps=1)
    with pytest.raises(ProblemError, match="x0 is empty"):
        solve(Problem(lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum(y**2)), None, jnp.ones(2), SOBA(), steps=1)


def test_batches_larger_than_the_data_and_empty_levels_are_errors_by_name():
    q = make()
    with pytest.raises(ValueError, match=r"Minibatches\(size=10\) exceeds the 9 samples"):
        problem_of(q, 10)
    with pytest.raises(ProblemError, match="upper_data has zero samples"):
        empty = jax.tree.map(lambda a: a[:0], q.upper)
        solve(Problem(upper_loss, lower_loss, empty, q.lower), *start(), SOBA(), steps=1)
    with pytest.raises(ValueError, match="has zero samples"):
        data.Minibatches(jax.tree.map(lambda a: a[:0], q.upper), 1)


@pytest.mark.parametrize(
    ("make_solver", "words"),
    [
        (lambda: SOBA(-0.1), "upper_optimizer=-0.1"),
        (lambda: SOBA(lower_optimizer="fast"), "give a step size or an optax"),
        (lambda: MASOBA(theta=2.0), "lies in .0, 1."),
        (lambda: SRBA(period=0), "a positive number of steps"),
        (lambda: SPABA(probability=0.0), "a probability in"),
        (lambda: STORM(eta=0.0), "the weight lies in"),
        (lambda: Momentum(0.0), "the weight of the new direction"),
        (lambda: SARAH(period_fraction=-1.0), "fraction of an epoch is positive"),
        (lambda: SAGA(max_bytes=0), "a positive number of bytes"),
        (lambda: Series(steps=0), "number of terms"),
        (lambda: StocBiO(hvp_steps=0), "number of products"),
        (lambda: StochasticImplicit(0.1, 5, True, True), "choose one of warm_start and randomised"),
        (lambda: VRBO(lower_steps=0), r"lower_steps=0\): a positive integer"),
        (lambda: VRBO(period=0), r"VRBO\(period=0\): a positive integer"),
        (lambda: VRBO(period_fraction=0), r"the fraction of an epoch is positive"),
        (lambda: STFBO(start=0.0), "accumulators start at a positive"),
        (lambda: DTFBO(lower_steps=0), "number of steps is a positive"),
        (lambda: AdaptiveIdentity(radius=0.0), "perturbation's length is positive"),
        (lambda: FSLA(eta=1.5), "the weight lies in"),
    ],
)
def test_hyperparameters_are_checked_where_they_are_written(make_solver, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make_solver()


def test_a_pass_over_all_samples_in_pieces_is_the_pass_over_all_at_once(x64, monkeypatch):
    """And a series, whose products of Hessians are no mean over pieces, is not cut."""
    random = np.random.default_rng(0)
    problem = Problem(
        lambda x, y, b: jnp.mean((b @ y - jnp.sum(x)) ** 2),
        lambda x, y, b: jnp.mean(jnp.log1p((b @ y) ** 2)) + jnp.mean((y - x) ** 2),
        data.Minibatches(random.normal(size=(12, 3)), 3),
        data.Minibatches(random.normal(size=(20, 3)), 5),
    )
    at = Point(*(jnp.asarray(random.normal(size=3)) for _ in range(3)))
    passes = lambda: jax.jit(  # traced anew at each call
        lambda at: [_variance_reduction.full(problem, oracle, at) for oracle in (Joint(), Series(0.1, 3))]
    )(at)
    whole, series = passes()
    assert _variance_reduction._pieces(problem.lower_data) == 1
    monkeypatch.setattr(_variance_reduction, "PIECE_BYTES", 80)
    assert _variance_reduction._pieces(problem.lower_data) == (5 if jax.device_count() == 1 else 1)
    pieces, uncut = passes()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-13), pieces, whole)
    jax.tree.map(np.testing.assert_array_equal, uncut, series)
