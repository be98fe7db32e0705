"""Federated solvers: variance and bias of the estimators, floors, equalities with centralised methods, sampling."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distributed_problems import RHO, arrays, hypergradient, lower, quadratic, solution, upper

from bilevel import Problem, ProblemError, data, run, solve
from bilevel.keys import Draw
from bilevel.solvers.federated import (
    AggITD,
    FedBiO,
    FedBiOAcc,
    FederatedNested,
    FedMBO,
    FedNest,
    InProcess,
    LFedNest,
    LocalHypergradient,
    ParallelHypergradient,
    SharedHypergradient,
    ShroFBO,
    SimFBO,
    oracles,
)  # fmt: skip

_run = jax.jit(run, static_argnames="steps")


def _end(problem: Problem, solver, steps: int):
    p, q = problem.upper_data.arrays[1].shape[-1], problem.upper_data.arrays[0].shape[-1]
    return _run(problem, solver, jnp.zeros(p), jnp.zeros(q), steps)


def _error(problem: Problem, solver, steps: int) -> float:
    return float(jnp.linalg.norm(_end(problem, solver, steps)[0].x - solution(problem)[0]))


# ---------------------------------------------------------------- estimators

TERMS, DRAWS = 12, 1500


@functools.partial(jax.jit, static_argnames=("clients", "draws"))
def _moments(problem, estimator, curvature, clients: int, draws: int):
    """Mean and total variance of `draws` draws at x = 1, y = 1."""
    x, y = jnp.ones(3), jnp.ones(4)
    keys = jax.random.split(jax.random.key(clients), draws)
    found = jax.lax.map(
        lambda k: estimator(InProcess(problem, data.as_step_key(k), clients), x, y, curvature)[1],
        keys,
        batch_size=250,
    )
    return found.mean(axis=0), found.var(axis=0).sum()


def _curvature(problem: Problem) -> float:
    return float(np.linalg.eigvalsh(np.asarray(problem.lower_data.arrays[0])[:, 0]).max())


def _truncated(problem: Problem, L: float) -> np.ndarray:
    """The hypergradient at x = 1, y = 1 with the first TERMS terms of the series in place of the inverse: the
    estimators' mean."""
    c, d, A, B, _ = (
        np.asarray(a, np.float64).mean(axis=(0, 1)) for a in (*problem.upper_data.arrays, *problem.lower_data.arrays)
    )
    factor = np.eye(4) - A / L
    inverse = sum(np.linalg.matrix_power(factor, j) for j in range(TERMS)) / L
    return 0.5 * np.ones(3) + d + B.T @ inverse @ (np.ones(4) - c)


@pytest.mark.parametrize(("random", "m"), [(True, 64), (False, 512)], ids=["random length", "sum"])
def test_parallel_chains_have_a_variance_of_order_one_over_clients(random: bool, m: int) -> None:
    """n times the variance is constant, and the estimator is unbiased (n close to m would leave less: nobody is drawn
    twice)."""
    problem, _ = quadratic(m, het=0.5)
    L = _curvature(problem)
    truth = _truncated(problem, L)
    scaled = {}
    for n in (1, 16, 64):
        mean, variance = _moments(problem, ParallelHypergradient(TERMS, random), L, n, DRAWS)
        scaled[n] = n * float(variance)
        noise = np.sqrt(float(variance) / DRAWS)
        assert np.linalg.norm(mean - truth) < 5 * noise + 1e-5
    centre = np.mean(list(scaled.values()))
    np.testing.assert_allclose(list(scaled.values()), centre, rtol=0.25)


def test_the_sum_has_less_variance_than_random_lengths_and_a_shared_length_has_a_floor() -> None:
    problem, _ = quadratic(64, het=0.5)
    L = _curvature(problem)

    def variance(estimator, n):
        return float(_moments(problem, estimator, L, n, DRAWS)[1])

    assert variance(ParallelHypergradient(TERMS), 16) < variance(ParallelHypergradient(TERMS, random=True), 16) / 2
    # FedNest's: from 16 to 64 clients nothing is gained; FedMBO's falls by four.
    assert variance(SharedHypergradient(TERMS), 64) > 0.7 * variance(SharedHypergradient(TERMS), 16)
    assert variance(ParallelHypergradient(TERMS, random=True), 64) < 0.35 * variance(
        ParallelHypergradient(TERMS, random=True), 16
    )


def test_local_hypergradients_are_biased_by_what_the_closed_form_says(x64: None) -> None:
    problem, _ = quadratic(16, het=0.5)
    x, y = np.ones(3), np.ones(4)
    everyone = InProcess(problem, data.as_step_key(0))
    L = _curvature(problem)
    estimate = jax.jit(lambda estimator: estimator(everyone, jnp.ones(3), jnp.ones(4), L)[1])
    local, shared = estimate(LocalHypergradient(400)), estimate(SharedHypergradient(400, random=False))
    c, d, A, B, _ = (np.asarray(a)[:, 0] for a in (*problem.upper_data.arrays, *problem.lower_data.arrays))
    of_each = 0.5 * x + d + np.einsum("nji,nj->ni", B, np.linalg.solve(A, (y - c)[..., None])[..., 0])
    np.testing.assert_allclose(local, of_each.mean(axis=0), rtol=1e-8)
    np.testing.assert_allclose(shared, hypergradient(problem, x, y), rtol=1e-8)
    assert np.linalg.norm(of_each.mean(axis=0) - hypergradient(problem, x, y)) > 1e-2


# ---------------------------------------------------------------- end to end


def _truncated_solution(problem: Problem, L: float) -> tuple[np.ndarray, np.ndarray]:
    """The zero of the hypergradient with TERMS terms of the series, and y* there: what such estimators converge to."""
    c, d, A, B, b = (
        np.asarray(a, np.float64).mean(axis=(0, 1)) for a in (*problem.upper_data.arrays, *problem.lower_data.arrays)
    )
    series = sum(np.linalg.matrix_power(np.eye(4) - A / L, j) for j in range(TERMS)) / L
    M, m = np.linalg.solve(A, B), np.linalg.solve(A, b)
    x = np.linalg.solve(RHO * np.eye(3) + B.T @ series @ M, -d - B.T @ series @ (m - c))
    return x, M @ x + m


@pytest.mark.slow
def test_linear_speedup_end_to_end() -> None:
    """n times the tail of E |x - x_N|^2 is constant within 25%, 16 seeds.

    x_N is the point that a series of N terms leads to (its distance from x* does not fall with n); FedNest saturates.
    """
    problem, _ = quadratic(512, het=0.5)
    L = _curvature(problem)
    x, y = (jnp.asarray(a, jnp.float32) for a in _truncated_solution(problem, L))
    assert jnp.sum((x - solution(problem)[0]) ** 2) > 1e-3

    def tail(solver, steps: int = 600) -> float:
        def path(key):
            base = data.as_step_key(key)
            state = solver.init(problem, x, y, base)

            def body(state, k):
                state, _ = solver.step(problem, state, data.StepKey(base.base, k, base.stream))
                return state, jnp.sum((state.x - x) ** 2)

            return jax.lax.scan(body, state, jnp.arange(steps, dtype=jnp.uint32))[1][steps // 3 :].mean()

        return float(jax.jit(jax.vmap(path))(jax.random.split(jax.random.key(0), 16)).mean())

    make = functools.partial(FedMBO, upper_optimizer=0.03, lower_optimizer=0.02, terms=TERMS, curvature=L)
    scaled = {n: n * tail(make(n)) for n in (1, 4, 16, 64)}
    np.testing.assert_allclose(list(scaled.values()), np.mean(list(scaled.values())), rtol=0.25)
    nested = {n: tail(FedNest(n, 0.03, 0.02, terms=TERMS, curvature=L)) for n in (16, 64)}
    assert nested[64] > 0.6 * nested[16]
    assert nested[64] > 1.5 * scaled[64] / 64


def test_full_participation_finds_the_solution_and_lfednest_does_not(x64: None) -> None:
    problem, _ = quadratic(8, het=0.5)
    assert (
        _error(problem, FedNest(None, 0.05, 0.2, terms=150, chain="sum", local_steps=3, local_upper_steps=2), 400)
        < 1e-6
    )
    assert _error(problem, AggITD(None, 0.05, 0.2, 100), 600) < 1e-6
    assert _error(problem, SimFBO(None, 0.05, 0.2, 0.2), 2000) < 1e-12
    assert _error(problem, LFedNest(None, 0.05, 0.2, terms=150), 400) > 1e-2


def test_local_steps_drift_by_a_bias_that_falls_with_the_step(x64: None) -> None:
    """FedBiO's local steps: the fixed point moves by O(step), so a quarter of the steps has a quarter of the error."""
    problem, _ = quadratic(8, het=0.5)
    coarse = _error(problem, FedBiO(None, 0.008, 0.04, 0.04, local_steps=4), 3000)
    fine = _error(problem, FedBiO(None, 0.002, 0.01, 0.01, local_steps=4), 12000)
    assert 2.5 < coarse / fine < 5.5


@pytest.mark.parametrize("local_steps", [1, 3])
def test_one_client_is_the_centralised_single_loop(local_steps: int, x64: None) -> None:
    """SimFBO with one client and one local step is SOBA; FedBiO with one client takes SOBA's steps, several a round."""
    problem, (p, q) = quadratic(1)
    steps = (0.05, 0.1, 0.15)
    solver = SimFBO(1, *steps) if local_steps == 1 else FedBiO(1, *steps, local_steps=local_steps)
    state, metrics = _end(problem, solver, 20)
    c, d, A, B, b = (np.asarray(a)[0, 0] for a in (*problem.upper_data.arrays, *problem.lower_data.arrays))
    x, y, v = np.zeros(p), np.zeros(q), np.zeros(q)
    for _ in range(20 * local_steps):
        x, y, v = x - 0.05 * (0.5 * x + d + B.T @ v), y - 0.1 * (A @ y - B @ x - b), v - 0.15 * (A @ v - (y - c))
    np.testing.assert_allclose(state.x, x, atol=1e-13)
    np.testing.assert_allclose(state.y, y, atol=1e-13)
    assert (metrics["communication_rounds"] == 1).all()
    assert metrics["communication_floats"][0] == 2 * (p + 2 * q)


@pytest.mark.parametrize("make", [FedMBO, FedBiOAcc, pytest.param(FedNest, marks=pytest.mark.slow)])
def test_equal_clients_are_one_client(make, x64: None) -> None:
    one, _ = quadratic(1)
    repeat = functools.partial(jax.tree.map, lambda a: np.repeat(a, 6, axis=0))
    many = Problem(upper, lower, data.Agents(repeat(one.upper_data.arrays)), data.Agents(repeat(one.lower_data.arrays)))
    options = {FedMBO: {"terms": 3}, FedNest: {"terms": 3, "chain": "sum"}, FedBiOAcc: {}}[make]
    alone, together = _end(one, make(1, **options), 10)[0], _end(many, make(3, **options), 10)[0]
    np.testing.assert_allclose(together.x, alone.x, atol=1e-12)


def test_accelerated_fedbio_is_storm(x64: None) -> None:
    """One client, full batches: the momentum is the exact direction, so the iterates are gradient steps on the
    schedule."""
    problem, (p, q) = quadratic(1)
    state, _ = _end(problem, FedBiOAcc(1, 0.1, 1.0, 1.0, delta=0.2, offset=8.0, local_steps=2), 15)
    c, d, A, B, b = (np.asarray(a)[0, 0] for a in (*problem.upper_data.arrays, *problem.lower_data.arrays))
    x, y, v = np.zeros(p), np.zeros(q), np.zeros(q)
    for t in range(1, 30):  # the first step only fills the momentum
        a = 0.2 / np.cbrt(8.0 + t)
        x, y, v = x - a * 0.1 * (0.5 * x + d + B.T @ v), y - a * (A @ y - B @ x - b), v - a * (A @ v - (y - c))
    np.testing.assert_allclose(state.x, x, atol=1e-12)


def test_unequal_local_steps(x64: None) -> None:
    """Clients that take more steps pull harder; normalised, none does."""
    problem, _ = quadratic(4, het=0.5)
    counts, steps = (1, 1, 1, 5), (0.002, 0.02, 0.02)
    biased = _error(problem, SimFBO(None, *steps, local_steps=counts), 8000)
    fair = _error(problem, ShroFBO(None, *steps, local_steps=counts), 8000)
    assert fair < biased / 3


def _clients(sizes, size: int | None) -> Problem:
    """Clients of unequal sizes, each with its own samples of a quadratic."""
    up, low = arrays(len(sizes), 0.5, samples=max(sizes), noise=0.2)

    def cut(tree):
        return [jax.tree.map(lambda a: a[i, :n], tree) for i, n in enumerate(sizes)]

    return Problem(upper, lower, data.Clients(cut(up), size), data.Clients(cut(low), size))


def test_unequal_clients_count_by_their_samples() -> None:
    """The weighted mean over all clients, averaged over an epoch of batches, is the pooled gradient."""
    sizes = (2, 4, 8)
    problem = _clients(sizes, 2)
    x, y = jnp.ones(3), jnp.ones(4)
    pooled = jax.jit(jax.grad(lower, argnums=1))(x, y, problem.lower_data.arrays)

    def mean_gradient(weighting: str):
        def one(k):
            at = InProcess(problem, data.as_step_key(0, k), None, weighting).round(Draw.ROUND)
            return at.ask(oracles.grad_y, oracles.Point(x, y, None)).mean.y

        steps = np.arange(4, dtype=np.uint32)  # whole epochs of all three: 1, 2 and 4 batches
        return np.asarray(jax.jit(jax.vmap(one))(steps)).mean(axis=0)

    np.testing.assert_allclose(mean_gradient("samples"), pooled, rtol=1e-4)
    assert np.linalg.norm(mean_gradient("clients") - pooled) > 0.05 * np.linalg.norm(pooled)


def _line(upper_sizes, lower_sizes, curvature=None, targets=None) -> Problem:
    """One number each: f = mean c_i (y - x)^2 / 2, F = mean (y - b_i)^2 / 2 + x^2 / 20; b and c are ones at first."""
    ones = np.ones(len(lower_sizes))
    curvature, targets = (ones if given is None else given for given in (curvature, targets))
    return Problem(
        lambda x, y, b: jnp.mean((y - b) ** 2) / 2 + x**2 / 20,
        lambda x, y, c: jnp.mean(c) * (y - x) ** 2 / 2,
        data.Clients([np.full(n, b, np.float32) for n, b in zip(upper_sizes, targets, strict=True)], 1),
        data.Clients([np.full(n, c, np.float32) for n, c in zip(lower_sizes, curvature, strict=True)], 1),
    )


@pytest.mark.parametrize(
    "solver",
    [
        FedMBO(None, 0.05, 0.1),
        FedMBO(1, 0.05, 0.3),
        FedNest(1, 0.05, 0.3, chain="sum"),
        AggITD(1, 0.05, 0.5),
        SimFBO(1, 0.02, 0.3, 0.3),
        pytest.param(FedMBO(2, 0.05, 0.1, chain="random"), marks=pytest.mark.slow),
        pytest.param(FedBiO(1, 0.005, 0.08, 0.08, local_steps=4), marks=pytest.mark.slow),
        pytest.param(LFedNest(1, 0.05, 0.3, local_steps=2), marks=pytest.mark.slow),
    ],
    ids=lambda solver: f"{type(solver).__name__}-{solver.clients}",
)
def test_a_client_of_most_samples_does_not_blow_up_what_is_stable_for_each(solver) -> None:
    """Every client's curvature is 1, and the first has 19 times the mean number of samples."""
    problem = _line([1900] + [5] * 19, [1900] + [5] * 19)
    state, metrics = _run(problem, solver, jnp.zeros(()), jnp.zeros(()), 400)
    np.testing.assert_allclose(state.x, 1 / 1.1, atol=0.05)
    assert float(metrics["hypergradient_norm"].max()) < 10


@pytest.mark.parametrize("clients", [1, 3])
def test_rounds_by_shares_are_unbiased_in_both_levels(clients: int, x64: None) -> None:
    """Whatever the levels' numbers of samples: the mean of the answers is the pooled direction."""
    up, low, c = (1, 6, 2, 3), (20, 1, 5, 4), np.array([0.5, 3.0, 1.0, 2.0])
    problem = _line(up, low, c, np.arange(4))

    def one(k):
        at = InProcess(problem, data.as_step_key(0, k), clients).round(Draw.ROUND).by_share()
        found = at.ask(oracles.simfbo, oracles.Point(1.0, 3.0, 2.0))
        return jnp.stack([found.mean.x, found.mean.y, found.mean.v, found.value])

    draws = np.asarray(jax.jit(jax.vmap(one))(np.arange(20_000, dtype=np.uint32)))
    mean_c, mean_b = c @ low / sum(low), np.arange(4) @ up / sum(up)
    value = sum(n * (3.0 - i) ** 2 for i, n in enumerate(up)) / sum(up) / 2 + 1 / 20
    expected = [1 / 10 + 2 * mean_c, 2 * mean_c, 2 * mean_c - (3.0 - mean_b), value]
    assert (np.abs(draws.mean(axis=0) - expected) < 5 * draws.std(axis=0) / np.sqrt(len(draws))).all()


@pytest.mark.parametrize(
    "solver",
    [FedMBO(5, 3.0, 0.04, terms=20, lower_rounds=40), LFedNest(5, 3.0, 0.04, terms=20, lower_rounds=40)],
    ids=["FedMBO", "LFedNest"],
)
def test_a_curvature_that_grows_along_the_run_is_followed(solver, x64: None) -> None:
    """1 + e^x is the lower curvature, 2 at the start and 20 at the solution, log 19; with the start's L the runs stood
    still at 1.35."""
    low = lambda x, y, b: jnp.mean((y - b) ** 2) / 2 + jnp.exp(x) * y**2 / 2
    up = lambda x, y, c: jnp.mean((y - c) ** 2) / 2
    problem = Problem(up, low, data.Agents(np.full((10, 1), 0.05)), data.Agents(np.ones((10, 1))))
    state, _ = _run(problem, solver, jnp.zeros(()), jnp.full((), 0.5), 800)
    np.testing.assert_allclose(state.x, np.log(19), atol=5e-3)


@pytest.mark.parametrize("chain", ["sum", "random"])
def test_a_curvature_that_nobody_looked_at_is_met(chain: str) -> None:
    """One of eight clients is 100 times as curved as L says: no h is out of bounds, and L knows it from there on."""
    problem = _line([3] * 8, [3] * 8, np.r_[np.ones(7), 100.0])
    solver = FedMBO(4, 0.01, 0.005, curvature=1.2, chain=chain)
    state, metrics = _run(problem, solver, jnp.zeros(()), jnp.zeros(()), 50)
    assert float(metrics["hypergradient_norm"].max()) < 200
    np.testing.assert_allclose(state.curvature, 120, rtol=1e-5)


def test_counts_of_numpy_and_lists_are_counts() -> None:
    solver = SimFBO(np.int64(2), local_steps=np.arange(1, 4))
    assert solver == SimFBO(2, local_steps=[1, 2, 3]) == SimFBO(2, local_steps=(1, 2, 3))
    assert jax.tree.structure(SimFBO(2, local_steps=np.int64(3))) == jax.tree.structure(SimFBO(2, local_steps=3))


def test_clients_are_sampled_without_replacement_and_uniformly() -> None:
    problem, _ = quadratic(10)

    def sampled(k):
        return InProcess(problem, data.as_step_key(0, k), 4).round(Draw.ROUND).who

    who = jax.jit(jax.vmap(sampled))(np.arange(2000, dtype=np.uint32))
    assert all(len(set(row.tolist())) == 4 for row in np.asarray(who)[:100])
    share = np.bincount(np.asarray(who).ravel(), minlength=10) / 2000
    np.testing.assert_allclose(share, 0.4, atol=0.05)


def test_partial_participation_under_solve_counts_its_communication() -> None:
    problem = _clients((3, 5, 4, 6), 2)
    solver = FedMBO(2, optax.adam(1e-2), 0.05, lower_rounds=2, terms=3)
    go = functools.partial(solve, problem, jnp.zeros(3), jnp.zeros(4), solver, key=1, chunk=7)
    found, again = go(steps=20), go(steps=20, state=go(steps=9))  # what a step draws goes by its number alone
    assert (found.x == again.x).all()
    p, q = 3, 4
    assert found.history["communication_rounds"].tolist() == [2 + 3 + 1] * 20
    assert found.history["communication_floats"][0] == 2 * (
        2 * (p + 2 * q) + (p + 2 * q) + 2 * (p + 3 * q) + (2 * p + 2 * q)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: SimFBO(20), r"SimFBO\(clients=20\) samples more clients than the 8 that exist"),
        (lambda p: FedMBO(9), r"FedMBO\(clients=9\) samples more clients than the 8"),
        (lambda p: AggITD(9), r"AggITD\(clients=9\) samples more clients than the 8"),
        (lambda p: FedBiOAcc(9), r"FedBiOAcc\(clients=9\) samples more clients than the 8"),
        (lambda p: SimFBO(2, local_steps=(1, 2)), "2 entries for 8 clients"),
    ],
)
def test_errors_before_a_run(make, words: str) -> None:
    problem, (p, q) = quadratic(8)
    with pytest.raises((ProblemError, ValueError), match=words):
        solve(problem, jnp.zeros(p), jnp.zeros(q), make(problem), steps=1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: data.Clients([np.zeros((3, 1)), np.zeros((0, 1))]), "client 1's data has zero samples"),
        (lambda: SimFBO(0), r"clients=0\): a positive integer"),
        (lambda: FedMBO(chain="long"), "'sum' or 'random'"),
        (lambda: FedNest(chain="paper"), r"FedNest\(chain='paper'\): 'sum' or 'random'"),
        (lambda: FederatedNested(hypergradient="parallel"), r"hypergradient='parallel'\): give an estimator"),
        (lambda: SimFBO(local_steps=[1, 2.5]), r"local_steps=2.5\): a positive integer is needed, or a sequence"),
        (lambda: SimFBO(local_steps=()), r"local_steps=\(\)\): a positive integer is needed, or a sequence"),
        (lambda: FedNest(lower_optimizer=optax.adam(0.1)), "must be a step size, not an optax rule"),
        (lambda: FederatedNested(lower="avg"), "'minibatch', 'svrg', 'local'"),
        (lambda: SimFBO(weighting="size"), "'samples' or 'clients'"),
        (lambda: SimFBO(2, optax.adam(0.1), local_steps=2), "local_upper="),
        (lambda: FedBiOAcc(delta=0.0), r"delta=0.0\): a positive number"),
        (lambda: ParallelHypergradient(0), "terms=0"),
        (lambda: SimFBO(radius=0.0), "radius is positive"),
    ],
)
def test_errors_of_constructors(make, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def test_unequal_clients_need_a_batch_size_and_pooled_data_are_refused() -> None:
    problem = _clients((2, 3), None)
    with pytest.raises(ProblemError, match="of unequal sizes needs a batch size"):
        solve(problem, jnp.zeros(3), jnp.zeros(4), SimFBO(1), steps=1)
    up, low = arrays(1, 0.0)
    pooled = Problem(upper, lower, jax.tree.map(lambda a: a[0], up), jax.tree.map(lambda a: a[0], low))
    with pytest.raises(ProblemError, match="whose samples are whose"):
        solve(pooled, jnp.zeros(3), jnp.zeros(4), SimFBO(1), steps=1)


@pytest.mark.parametrize(
    "solver",
    [SimFBO(None, 0.05, 0.1, 0.1), FedBiO(None, 0.05, 0.1, 0.1, local_steps=1), AggITD(None, 0.05, 0.1, rounds=20)],
    ids=["SimFBO", "FedBiO", "AggITD"],
)
@pytest.mark.parametrize("weighting", ["samples", pytest.param("clients", marks=pytest.mark.slow)])
def test_the_upper_loss_in_the_history_is_the_objective(x64, solver, weighting):
    """Clients of one and of nine samples, 0 and 1: F is .09 at .9 by samples, and 1/4 at 1/2 by clients."""
    each = lambda: data.Clients([np.full(n, v) for n, v in ((1, 0.0), (9, 1.0))], 1)
    upper = lambda x, y, b: jnp.mean((y - b) ** 2)
    problem = Problem(upper, lambda x, y, b: jnp.mean((y - x) ** 2 + 0 * b), each(), each())
    solver = dataclasses.replace(solver, weighting=weighting)
    found = solve(problem, jnp.zeros(()), jnp.zeros(()), solver, steps=400, progress=False)
    x, loss = (0.9, 0.09) if weighting == "samples" else (0.5, 0.25)
    np.testing.assert_allclose([found.x, found.history["upper_loss"][-1]], [x, loss], rtol=1e-3)


def unequal(count, sizes):
    """Clients of so many samples, all alike: f = (y - x)^2 / 2 and F = (y - 1)^2 / 2 + x^2 / 20, solved by 1 / 1.1."""
    features = [np.ones((size, 1)) for size in sizes(count)]
    upper = lambda x, y, batch: 0.5 * jnp.mean((y - batch[:, 0]) ** 2) + 0.05 * x**2
    lower = lambda x, y, batch: 0.5 * jnp.mean((y - x * batch[:, 0]) ** 2)
    return Problem(upper, lower, data.Clients(features, 4), data.Clients(features, 4))


@pytest.mark.parametrize("clients", [5, None])
@pytest.mark.parametrize("chain", ["sum", "random"])
@pytest.mark.parametrize("method", [FedMBO, FedNest])
def test_chains_stand_clients_of_unequal_sizes(method, chain, clients):
    """What a client counts was a factor within its chain: of twelve clients one with most samples sent x to 1e20."""
    problem = unequal(12, lambda count: (400, *[4] * (count - 1)))
    solver = method(clients, 0.1, 0.5, terms=8, chain=chain)
    solution = solve(problem, jnp.asarray(0.0), jnp.asarray(0.0), solver, steps=200)
    assert abs(float(solution.x) - 1 / 1.1) < (1e-2 if chain == "sum" else 0.3)


def test_clients_are_drawn_by_their_share():
    problem = unequal(6, lambda count: (40, 20, 20, 8, 8, 4))
    drawn = lambda step: InProcess(problem, data.as_step_key(0, step), 3).round(Draw.ROUND).by_share().who
    who = jax.jit(jax.vmap(drawn))(np.arange(400, dtype=np.uint32))
    assert who.shape == (400, 3)
    counts = np.bincount(np.ravel(who), minlength=6)
    np.testing.assert_allclose(counts / counts.sum(), np.array([40, 20, 20, 8, 8, 4]) / 100, atol=0.02)
    even = unequal(6, lambda count: [8] * count)
    at = InProcess(even, data.as_step_key(0), 3).round(Draw.ROUND)
    assert at.by_share() is at and at.by_share(chains=True) is at


def test_the_one_stiff_client_among_many_is_seen():
    hessians = np.ones((100, 1))
    hessians[30] = 100.0
    lower = lambda x, y, batch: 0.5 * jnp.mean(batch) * (y - x) ** 2
    problem = Problem(lambda x, y: (y - 1) ** 2, lower, None, data.Agents(hessians))
    assert float(InProcess(problem, data.as_step_key(0), 10).curvature(jnp.asarray(0.0), jnp.asarray(0.0))) >= 99


@pytest.mark.parametrize("curvature", [0.0, -1.0, np.nan])
def test_a_curvature_is_positive(curvature):
    with pytest.raises(ValueError, match=r"curvature=.*: L is a positive number, or None for an estimate"):
        FedMBO(curvature=curvature)
    with pytest.raises(ValueError, match=r"FedNest\(chain='paper'\): 'sum' or 'random'"):
        FedNest(chain="paper")
