"""Decentralised solvers against closed forms, the centralised methods, their bias, float32, and hostile input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distributed_problems import arrays, hypergradient, lower, quadratic, solution, upper

from bilevel import Problem, ProblemError, data, network, run, solve
from bilevel.optimizers import Move
from bilevel.solvers import DSOBA, GTDSBO, MADSBO, SLDBO, SPARKLE, Decentralized
from bilevel.solvers.decentralized.corrections import CORRECTIONS

RING = network.ring(8)

_run = jax.jit(run, static_argnames="steps")


def _error(problem: Problem, solver, steps: int) -> tuple[float, dict]:
    (p, q) = problem.upper_data.arrays[1].shape[-1], problem.upper_data.arrays[0].shape[-1]
    state, metrics = _run(problem, solver, jnp.zeros(p), jnp.zeros(q), steps)
    return float(jnp.linalg.norm(state.mean_x - solution(problem)[0])), jax.tree.map(lambda m: m[-1], metrics)


def test_all_tracked_is_exact_on_a_ring(x64: None) -> None:
    problem, (p, q) = quadratic(8, het=1.0)
    found = solve(problem, jnp.zeros(p), jnp.zeros(q), GTDSBO(RING, 0.05, 0.2, 0.2), steps=2000)
    x, y = solution(problem)
    np.testing.assert_allclose(found.x, np.broadcast_to(x, (8, p)), atol=1e-12)
    np.testing.assert_allclose(found.y, np.broadcast_to(y, (8, q)), atol=1e-12)
    for name in ("consensus_x", "consensus_y", "consensus_v"):
        assert len(found.history[name]) == 2000 and found.history[name][-1] < 1e-12
    # GT sends two exchanges a step: (5 + 5) q and one p, twice.
    assert found.history["communication_floats"][0] == 2 * (10 * q + p)
    assert found.history["communication_rounds"][0] == 22


@pytest.mark.optimised
@pytest.mark.parametrize(
    "solver",
    [
        GTDSBO(RING, 0.05, 0.2, 0.2),
        pytest.param(SPARKLE(RING, 0.05, 0.2, 0.2), marks=pytest.mark.slow),
        pytest.param(SPARKLE(RING, 0.05, 0.2, 0.2, x="extra", y="extra", v="extra"), marks=pytest.mark.slow),
    ],
    ids=["gt", "ed", "extra"],
)
def test_float32_after_100_000_steps(solver) -> None:
    """Of three forms, whose memories differ."""
    problem, _ = quadratic(8, het=1.0)
    error, last = _error(problem, solver, 100_000)
    assert error < 1e-5
    assert last["consensus_x"] < 1e-5


@pytest.mark.parametrize("form", CORRECTIONS)
def test_one_agent_is_the_centralised_method(form: str, x64: None) -> None:
    """With one agent, every correction is plain gradient descent: written out here from the equations."""
    problem, (p, q) = quadratic(1, noise=0.5, samples=3)
    alpha, beta, gamma, steps = 0.05, 0.1, 0.15, 20
    solver = Decentralized(
        network.ring(1), alpha, beta, gamma, form, form, form, lower_steps=2, linear_steps=3, averaging=0.4
    )
    state, _ = _run(problem, solver, jnp.zeros(p), jnp.zeros(q), steps)
    c, d, A, B, b = (np.asarray(a)[0].mean(axis=0) for a in (*problem.upper_data.arrays, *problem.lower_data.arrays))
    x, y, v, r = np.zeros(p), np.zeros(q), np.zeros(q), np.zeros(p)
    for _ in range(steps):
        for _ in range(2):
            y = y - beta * (A @ y - B @ x - b)
        for _ in range(3):
            v = v - gamma * (A @ v - (y - c))
        r = 0.6 * r + 0.4 * (0.5 * x + d + B.T @ v)
        x = x - alpha * r
    np.testing.assert_allclose(state.x[0], x, atol=1e-12)
    np.testing.assert_allclose(state.y[0], y, atol=1e-12)


@pytest.mark.parametrize("make", [GTDSBO, DSOBA, SPARKLE, SLDBO, MADSBO])
def test_complete_graph_with_equal_data_is_the_centralised_method(make, x64: None) -> None:
    one, (p, q) = quadratic(1)
    repeat = functools.partial(jax.tree.map, lambda a: np.repeat(a, 5, axis=0))
    many = Problem(upper, lower, data.Agents(repeat(one.upper_data.arrays)), data.Agents(repeat(one.lower_data.arrays)))
    alone, _ = _run(one, make(network.ring(1), 0.05, 0.1, 0.1), jnp.zeros(p), jnp.zeros(q), 50)
    together, metrics = _run(many, make(network.complete(5), 0.05, 0.1, 0.1), jnp.zeros(p), jnp.zeros(q), 50)
    np.testing.assert_allclose(together.x, np.repeat(alone.x, 5, axis=0), atol=1e-13)
    assert metrics["consensus_x"].max() < 1e-14


def test_dsoba_with_one_agent_is_soba(x64: None) -> None:
    """SOBA: all three directions at the same point."""
    problem, (p, q) = quadratic(1)
    state, _ = _run(problem, DSOBA(network.ring(1), 0.05, 0.1, 0.15, averaging=1.0), jnp.zeros(p), jnp.zeros(q), 30)
    c, d, A, B, b = (np.asarray(a)[0, 0] for a in (*problem.upper_data.arrays, *problem.lower_data.arrays))
    x, y, v = np.zeros(p), np.zeros(q), np.zeros(q)
    for _ in range(30):
        x, y, v = x - 0.05 * (0.5 * x + d + B.T @ v), y - 0.1 * (A @ y - B @ x - b), v - 0.15 * (A @ v - (y - c))
    np.testing.assert_allclose(state.x[0], x, atol=1e-13)


def test_plain_gossip_has_a_bias_of_order_alpha(x64: None) -> None:
    """x by gossip, y and v tracked: halving alpha halves the error and the consensus error."""
    problem, _ = quadratic(8, het=1.0)
    found = []
    for alpha in (0.04, 0.02, 0.01):
        error, last = _error(problem, GTDSBO(RING, alpha, 0.2, 0.2, x="none-cta"), 6000)
        found.append((error, float(last["consensus_x"])))
    slopes = np.log2(np.asarray(found[:-1]) / np.asarray(found[1:]))
    np.testing.assert_allclose(slopes, 1.0, atol=0.25)
    assert found[-1][0] > 1e-4


def test_correcting_y_and_v_matters_more_than_correcting_x(x64: None) -> None:
    problem, _ = quadratic(8, het=1.0)
    only_x, _ = _error(problem, SPARKLE(RING, 0.01, 0.1, 0.1, y="none", v="none"), 5000)
    only_yv, _ = _error(problem, SPARKLE(RING, 0.01, 0.1, 0.1, x="none"), 5000)
    assert only_yv < only_x / 3


def test_madsbo_is_the_papers_recursion(x64: None) -> None:
    problem, (p, q) = quadratic(4, het=0.5)
    W = network.ring(4).matrix()
    solver = MADSBO(network.ring(4), 0.02, 0.05, 0.04, lower_steps=2, linear_steps=3, averaging=0.3)
    state, _ = _run(problem, solver, jnp.zeros(p), jnp.zeros(q), 25)
    c, d, A, B, b = (np.asarray(a)[:, 0] for a in (*problem.upper_data.arrays, *problem.lower_data.arrays))
    apply, transposed = functools.partial(np.einsum, "nij,nj->ni"), functools.partial(np.einsum, "nij,ni->nj")
    x, y, v, r = np.zeros((4, p)), np.zeros((4, q)), np.zeros((4, q)), np.zeros((4, p))
    tracker = before = np.zeros((4, q))
    for _ in range(25):
        for _ in range(2):
            y = W @ y - 0.05 * (apply(A, y) - apply(B, x) - b)
        for _ in range(3):
            s = apply(A, v) - (y - c)
            tracker, before = W @ tracker + s - before, s
            v = W @ v - 0.04 * tracker
        u = 0.5 * x + d + transposed(B, v)
        x, r = W @ x - 0.02 * r, 0.7 * r + 0.3 * u
    np.testing.assert_allclose(state.x, x, atol=1e-12)
    np.testing.assert_allclose(state.v, v, atol=1e-12)


def test_time_varying_graph_and_optax_rules(x64: None) -> None:
    problem, _ = quadratic(8, het=0.5)
    error, _ = _error(problem, GTDSBO(network.one_peer(8), 0.05, 0.2, 0.2), 2000)
    assert error < 1e-12
    rules = GTDSBO(RING, optax.sgd(optax.cosine_decay_schedule(0.1, 3000)), optax.sgd(0.1, momentum=0.5), 0.2)
    error, _ = _error(problem, rules, 3000)
    assert error < 1e-8


def test_minibatches_converge_to_a_neighbourhood(x64: None) -> None:
    """Each agent draws from its own samples; the floor falls with the step size, and the same key gives the same
    run."""
    problem, (p, q) = quadratic(4, het=0.3, samples=16, noise=0.3, size=4)
    solver = GTDSBO(network.ring(4), 0.02, 0.05, 0.05, lower_steps=1, linear_steps=1, averaging=0.2)
    first, metrics = _run(problem, solver, jnp.zeros(p), jnp.zeros(q), 4000)
    again, _ = _run(problem, solver, jnp.zeros(p), jnp.zeros(q), 4000)
    assert (first.x == again.x).all()
    x, _ = solution(problem)
    assert np.linalg.norm(first.mean_x - x) < 0.2 * np.linalg.norm(x)
    assert metrics["consensus_x"][-1] > 1e-8  # it is noisy


def test_clients_of_unequal_sizes() -> None:
    up, low = arrays(3, 0.3, samples=6)

    def cut(tree, i, n):
        return jax.tree.map(lambda a: a[i, :n], tree)

    problem = Problem(
        upper,
        lower,
        data.Clients([cut(up, i, 2 + i) for i in range(3)], size=2),
        data.Clients([cut(low, i, 3 + i) for i in range(3)], size=3),
    )
    found = solve(
        problem, jnp.zeros(3), jnp.zeros(4), DSOBA(network.ring(3), 0.02, 0.1, 0.1, x="gt", y="gt", v="gt"), steps=2000
    )
    centre = Problem(
        upper, lower, data.Agents(up), data.Agents(low)
    )  # without noise all of an agent's samples are alike
    np.testing.assert_allclose(found.state.mean_x, solution(centre)[0], atol=1e-4)


def test_tolerance_and_a_pytree_of_variables() -> None:
    problem, (p, q) = quadratic(4, het=0.5)
    nested = Problem(
        lambda x, y, batch: upper(jnp.concatenate([x["a"], x["b"]]), y[0], batch),
        lambda x, y, batch: lower(jnp.concatenate([x["a"], x["b"]]), y[0], batch),
        problem.upper_data, problem.lower_data,
    )  # fmt: skip
    x0 = {"a": jnp.zeros(1), "b": jnp.zeros(p - 1)}
    found = solve(nested, x0, (jnp.zeros(q),), GTDSBO(network.ring(4), 0.05, 0.2, 0.2), steps=5000, tol=1e-4)
    assert found.result.name == "CONVERGED"
    x = jnp.concatenate([found.state.mean_x["a"], found.state.mean_x["b"]])
    assert np.linalg.norm(hypergradient(problem, x, found.state.mean_y[0])) < 1e-3


def test_agents_draw_their_own_samples(x64: None) -> None:
    rows = np.arange(12.0).reshape(3, 4)
    source = data.Agents(rows, size=2)
    key, draw = data.as_step_key(0), jax.jit(source.draw_each)
    first, second = draw(key), draw(data.StepKey(key.base, np.uint32(1), key.stream))
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second], axis=1), axis=1), rows)  # an epoch
    np.testing.assert_array_equal(draw(key, np.array([1]))[0], first[1])
    assert source.full().shape == (12,) and len(source) == 3 and "3 agents of 4 samples" in repr(source)


def _problem(n: int = 8, m: int | None = None, **replace) -> Problem:
    first, _ = quadratic(n)
    second, _ = quadratic(m or n)
    return Problem(
        **{"upper": upper, "lower": lower, "upper_data": first.upper_data, "lower_data": second.lower_data, **replace}
    )


@pytest.mark.parametrize(
    ("problem", "solver", "words"),
    [
        (_problem(8, 4), GTDSBO(RING), "upper_data has 8 agents and lower_data 4"),
        (_problem(4), GTDSBO(RING), r"for 4 agents, but the network ring\(8\) has 8"),
        (_problem(8, lower_data=arrays(1, 0)[1]), GTDSBO(RING), "lower_data is one set of arrays for all"),
        (
            _problem(8),
            GTDSBO(RING, lower_optimizer=5.0),
            r'lower_optimizer=5 times .* beyond the stability limit 2 of the form "gt" on ring\(8\)',
        ),
        (
            _problem(8),
            MADSBO(RING, linear_optimizer=0.3),
            r'linear_optimizer=0.3 times .* limit 0.222 of the form "gt-cta"',
        ),
        (_problem(8, project_upper=lambda x: x), GTDSBO(RING), "cannot honour the upper projection"),
    ],
    ids=["levels", "network", "pooled", "step", "cta step", "projection"],
)
def test_errors_before_a_run(problem: Problem, solver: Decentralized, words: str) -> None:
    if "one set" in words:
        problem = Problem(
            lambda x, y, b: upper(x, y, b), lambda x, y, b: jnp.sum(y**2), problem.upper_data, problem.lower_data
        )
    with pytest.raises(ProblemError, match=words):
        solve(problem, jnp.zeros(3), jnp.zeros(4), solver, steps=1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Decentralized(8), "give one of bilevel.network"),
        (lambda: GTDSBO(RING, x="extra!"), "a correction is one of 'none', 'gt'"),
        (lambda: SPARKLE(network.one_peer(4)), 'remember the flows of one fixed graph.*Take x="gt"'),
        (lambda: GTDSBO(RING, lower_steps=0), "positive integer"),
        (lambda: DSOBA(RING, averaging=0.0), r"lies in \(0, 1\]"),
        (lambda: DSOBA(RING, lower_steps=2), "must be 1"),
        (lambda: SLDBO(RING, radius=-1.0), "radius is positive"),
        (lambda: GTDSBO(RING, upper_optimizer=-0.1), "positive"),
        (lambda: data.Agents(np.zeros((3, 0, 2))), "has zero samples"),
        (lambda: data.Agents(np.zeros((3, 4)), size=5), "each agent has 4 samples"),
        (lambda: data.Agents.stack([np.zeros(3), np.zeros(4)]), "Use data.Clients"),
    ],
)
def test_errors_of_constructors(make, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def test_the_stability_limits_are_those_of_the_recursions(x64: None) -> None:
    """Spectral radius of each form's scalar recursion just below and just above its limit, over the eigenvalues of a
    ring."""
    graph = network.ring(6)
    for form, correction in CORRECTIONS.items():
        limit = correction.limit(graph.smallest_eigenvalue)
        for factor, grows in ((0.95, False), (1.05, True)):
            move = Move(factor * limit, many=True)
            copies = correction.start(jnp.asarray(np.random.default_rng(0).normal(size=6)), move)

            @jax.jit
            def many(copies, correction=correction, move=move):
                return jax.lax.fori_loop(0, 2000, lambda k, c: correction.advance(graph, c, c.value, move, k), copies)

            size = float(jnp.abs(many(copies).value).max())
            assert (size > 1e6) == grows, (form, factor, size)


@pytest.mark.parametrize("sizes", [(190, 10, 10, 10), (50, 50, 50, 50)])
def test_the_verdict_is_of_the_objective_that_is_solved(sizes, x64):
    """Agents count alike, whatever their sizes: on pooled samples their solution was LOWER_LEVEL. The closed form:
    y = x + mean of the agents' means (.75), and x = (mean of the agents' targets - .75) / 1.1."""
    shifts, targets = (0.0, 1.0, 1.0, 1.0), (2.0, 5.0, 5.0, 5.0)
    clients = lambda values: data.Clients([np.full(n, v) for n, v in zip(sizes, values, strict=True)], 5)
    problem = Problem(
        lambda x, y, c: 0.5 * jnp.mean((y - c) ** 2) + 0.05 * x**2,
        lambda x, y, b: 0.5 * jnp.mean((y - x - b) ** 2),
        clients(targets), clients(shifts),
    )  # fmt: skip
    solver = GTDSBO(network.complete(4), 0.1, 0.3, 0.3)
    solution = solve(problem, jnp.asarray(0.0), jnp.asarray(0.0), solver, steps=3000, tol=1e-9)
    np.testing.assert_allclose(solution.x, (4.25 - 0.75) / 1.1, rtol=1e-6)
    assert solution.result.name == "CONVERGED", solution.reason
