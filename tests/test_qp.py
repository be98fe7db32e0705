"""Quadratic programmes: closed forms, SciPy, the optimality conditions, differences, and what has no solution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from bilevel import implicit, optimality
from bilevel.implicit import QPStatus

SOLVE = jax.jit(implicit.qp)  # one programme for each set of shapes: small problems have two unknowns and two rows
INTERVAL = np.array([[1.0, 0.0], [-1.0, 0.0]])  # |y_0| <= h


def programme(seed, n=5, p=2, m=7, rank=None, slack=0.5):
    """A feasible and bounded programme with some rows active."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(n, n if rank is None else rank))
    A, G, inside = random.normal(size=(p, n)), random.normal(size=(m, n)), random.normal(size=n)
    G = np.vstack([G, np.eye(n), -np.eye(n)])
    h = G @ inside + np.concatenate([random.uniform(0, slack, m), np.full(2 * n, 3.0)])
    return root @ root.T, random.normal(size=n) * 3, A, A @ inside, G, h


def assert_optimal(found, Q, c, A, b, G, h, tol):
    y, nu, lam = (np.asarray(v, float) for v in (found.y, found.nu, found.lam))
    size = max(np.abs(c).max(), np.abs(Q @ y).max(), np.abs(lam).max())
    assert int(found.status) == QPStatus.SOLVED
    assert np.abs(A @ y - b).max() < tol * max(1, np.abs(y).max()) and (G @ y - h).max() < tol * max(1, np.abs(y).max())
    assert lam.min() >= 0
    assert np.abs(Q @ y + c + A.T @ nu + G.T @ lam).max() < tol * size
    assert np.minimum(np.abs(lam) / size, np.abs(h - G @ y)).max() < tol


@pytest.mark.parametrize("seed", range(6))
def test_conditions_hold_to_rounding(x64, seed):
    for rank in (None, 2, 0):  # the last is a linear programme
        Q, c, A, b, G, h = programme(seed, rank=rank)
        assert_optimal(SOLVE(Q, c, A, b, G, h), Q, c, A, b, G, h, 1e-11)
        single = SOLVE(*(np.float32(a) for a in (Q, c, A, b, G, h)))
        assert single.y.dtype == jnp.float32
        assert_optimal(single, Q, c, A, b, G, h, 3e-5)


def test_linear_programmes_equal_those_of_scipy(x64):
    for seed in range(5):
        Q, c, A, b, G, h = programme(seed, rank=0)
        expected = scipy.optimize.linprog(c, G, h, A, b, bounds=(None, None))
        found = SOLVE(Q, c, A, b, G, h)
        np.testing.assert_allclose(c @ found.y, expected.fun, rtol=1e-10)
        np.testing.assert_allclose(found.lam, -expected.ineqlin.marginals, atol=1e-8)


def test_closed_forms(x64):
    free = SOLVE(np.diag([2.0, 4.0]), np.array([-2.0, 4.0]))
    np.testing.assert_allclose(free.y, [1, -1])
    assert free.nu is None and free.lam is None
    box = SOLVE(np.eye(2), np.array([-2.0, 0.5]), None, None, np.eye(2), np.array([1.0, np.inf]))
    np.testing.assert_allclose(box.y, [1, -0.5])
    np.testing.assert_allclose(box.lam, [1, 0])
    sum_is_one = SOLVE(np.eye(3), np.zeros(3), np.ones((1, 3)), np.ones(1))
    np.testing.assert_allclose(sum_is_one.y, 1 / 3)
    np.testing.assert_allclose(sum_is_one.nu, -1 / 3)
    small = jax.eval_shape(implicit.qp, np.eye(2, dtype=jnp.bfloat16), -np.ones(2, jnp.bfloat16))
    assert small.y.dtype == jnp.bfloat16


def test_the_solution_fulfils_the_condition_of_the_room_next_door(x64):
    Q, c, A, b, G, h = programme(1)
    found = SOLVE(Q, c, A, b, G, h)
    left = jax.jit(optimality.kkt_qp())((found.y, found.nu, found.lam), (Q, c), (A, b), (G, h))
    for part in left:
        np.testing.assert_allclose(part, 0, atol=1e-10)


def combined(*args):
    found = implicit.qp(*args)
    return jnp.concatenate([jnp.sin(found.y), found.nu**2, jnp.cos(found.lam)]).sum()


def test_first_and_second_derivatives_by_all_arguments_equal_differences(x64):
    args = programme(2, n=3, p=1, m=3)
    gradient = jax.jit(jax.grad(combined, range(6)))
    random, eps = np.random.default_rng(0), 1e-5
    value = jax.jit(combined)
    found = gradient(*args)
    forward = jax.jit(
        lambda args, tangents: (jax.jvp(combined, args, tangents)[1], jax.jvp(gradient, args, tangents)[1])
    )
    for i in range(6):
        direction = random.normal(size=args[i].shape)
        moved = [tuple(a + s * eps * direction if j == i else a for j, a in enumerate(args)) for s in (1, -1)]
        tangents = tuple(direction if j == i else np.zeros_like(a) for j, a in enumerate(args))
        expected = (float(value(*moved[0])) - float(value(*moved[1]))) / (2 * eps)
        along, twice = forward(args, tangents)
        np.testing.assert_allclose(np.vdot(found[i], direction), expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(along, expected, rtol=1e-6, atol=1e-8)
        for one, ahead, back in zip(twice, gradient(*moved[0]), gradient(*moved[1]), strict=True):
            second = (np.asarray(ahead) - np.asarray(back)) / (2 * eps)
            np.testing.assert_allclose(one, second, rtol=1e-5, atol=1e-6)


def test_a_batch_is_vmap_with_a_status_for_each(x64):
    h = np.array([[1.0, 1.0], [-1.0, 0.0], [0.5, 0.5]])  # the second is empty
    layer = lambda h: implicit.qp(np.eye(2), np.array([-2.0, 1.0]), G=INTERVAL, h=h)
    found, jacobian = jax.device_get(jax.jit(jax.vmap(lambda h: (layer(h), jax.jacrev(lambda h: layer(h).y)(h))))(h))
    np.testing.assert_array_equal(found.status, [QPStatus.SOLVED, QPStatus.INFEASIBLE, QPStatus.SOLVED])
    np.testing.assert_allclose(found.y[[0, 2]], [[1, -1], [0.5, -1]], atol=1e-10)
    assert np.isnan(found.y[1]).all() and np.isnan(found.lam[1]).all()
    np.testing.assert_allclose(jacobian[0], [[1, 0], [0, 0]], atol=1e-10)
    assert np.isnan(jacobian[1]).any()


def test_what_has_no_solution_is_said(x64):
    unbounded = SOLVE(np.diag([1.0, 0.0]), np.array([0.0, 1.0]), None, None, INTERVAL, np.ones(2))
    assert unbounded.status == QPStatus.UNBOUNDED and np.isnan(unbounded.y).all()
    contradiction = SOLVE(np.eye(2), np.zeros(2), np.ones((2, 2)), np.array([1.0, 2.0]))
    assert contradiction.status == QPStatus.INFEASIBLE
    assert SOLVE(np.diag([1.0, -1.0]), np.ones(2)).status == QPStatus.NONCONVEX
    few = implicit.qp(*programme(0), max_steps=1)
    assert few.status == QPStatus.INACCURATE and few.residual > 1e-9 and np.isfinite(few.y).all()


def test_infeasible_and_unbounded_random_programmes_equal_the_verdicts_of_scipy(x64):
    random = np.random.default_rng(0)
    seen = set()
    for trial in range(20):
        Q, c = np.diag([1.0, 1, 0, 0]), random.normal(size=4)
        A, b = random.normal(size=(1, 4)), random.normal(size=1)
        G, h = random.normal(size=(8, 4)), random.normal(size=8) - trial % 2
        if trial % 4 == 2:
            G[:, 3], A[:, 3], c[3] = np.abs(G[:, 3]), 0.0, 1.0  # down along -y_3
        empty = scipy.optimize.linprog(0 * c, G, h, A, b, bounds=(None, None)).status == 2
        flat = np.vstack([Q, A])
        fall = scipy.optimize.linprog(c, G, 0 * h, flat, np.zeros(len(flat)), bounds=(-1, 1)).fun
        expected = QPStatus.INFEASIBLE if empty else QPStatus.UNBOUNDED if fall < -1e-9 else QPStatus.SOLVED
        assert int(SOLVE(Q, c, A, b, G, h).status) == expected
        seen.add(expected)
    assert seen == {QPStatus.SOLVED, QPStatus.INFEASIBLE, QPStatus.UNBOUNDED}


def test_verdict_and_solution_do_not_depend_on_units(x64):
    Q, c, A, b, G, h = programme(3)
    y = SOLVE(Q, c, A, b, G, h).y
    for value in (1e-8, 1.0, 1e8):
        for length in (1e-8, 1.0, 1e8):
            found = SOLVE(value * Q, value * length * c, A, length * b, G, length * h)
            assert found.status == QPStatus.SOLVED
            np.testing.assert_allclose(found.y / length, y, atol=1e-9)
        empty = SOLVE(np.eye(2) * value, np.ones(2), None, None, INTERVAL, -value * np.ones(2))
        assert empty.status == QPStatus.INFEASIBLE


def test_degenerate_programmes(x64):
    """Rows twice over, redundant equations, a multiplier of zero: the solution is right, the derivative one side's."""

    @jax.jit
    def along(t, c, dc, G, h, dh):
        layer = lambda t: implicit.qp(np.eye(2), c + t * dc, G=G, h=h + t * dh)
        return layer(t), jax.jacfwd(lambda t: layer(t).y)(t), jax.jacrev(lambda t: layer(t).y)(t)

    none = np.zeros(3)
    G, h = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), np.array([0.5, 0.5, 1.0])
    # All rows move together, so the same rows can stay active.
    twice, *jacobians = along(1.0, -np.ones(2), np.zeros(2), G, none, h)
    np.testing.assert_allclose(twice.y, [0.5, 1], atol=1e-12)
    np.testing.assert_allclose(G.T @ twice.lam, [0.5, 0], atol=1e-12)
    for jacobian in jacobians:
        np.testing.assert_allclose(jacobian, [0.5, 0], atol=1e-10)
    A = np.array([[1.0, 1.0], [2.0, 2.0]])
    redundant = SOLVE(np.eye(2), np.array([1.0, 0.0]), A, np.array([1.0, 2.0]))
    np.testing.assert_allclose(redundant.y, [0, 1], atol=1e-12)
    # y_0 = min(-t, 0), at t = 0
    G, h = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), np.array([0.0, 5.0, 5.0])
    kink, *slopes = along(0.0, np.zeros(2), np.array([1.0, 0.0]), G, h, none)
    np.testing.assert_allclose(kink.y, 0, atol=1e-8)
    for slope in slopes:
        assert min(abs(slope[0]), abs(slope[0] + 1)) < 1e-15


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.eye(2), np.ones(3)), r"takes Q \(n, n\) and c \(n,\), and was given the shapes \(2, 2\) and \(3,\)"),
        ((np.ones((4, 2, 2)), np.ones((4, 2))), r"Many problems at once are jax.vmap\(implicit.qp\)"),
        ((np.eye(2), np.ones(2), np.ones((1, 2))), "only one of A and b; they come together"),
        ((np.eye(2), np.ones(2), None, None, np.ones((1, 3)), np.ones(1)), r"takes G \(rows, 2\) and h \(rows,\)"),
        ((np.diag([1.0, -1.0]), np.ones(2)), "Q has the eigenvalue -1, so the objective is not convex"),
        ((np.eye(2), np.array([1.0, np.nan])), "qp: c holds a NaN"),
    ],
)
def test_bad_arguments_are_errors_by_name(args, message):
    with pytest.raises(ValueError, match=message):
        implicit.qp(*args)
