"""The cases of jaxopt's test of implicit differentiation, by the same calls, with `bilevel.implicit` as the module."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import implicit as idf

RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(10, 3)), RNG.normal(size=10)
LAM = 5.0


def objective(params: Any, lam: Any, X: Any, y: Any) -> Any:
    return 0.5 * jnp.mean((X @ params - y) ** 2) + 0.5 * lam * jnp.sum(params**2)


def solve_ridge(init_params: Any, lam: Any, X: Any, y: Any) -> Any:
    return jnp.linalg.solve(X.T @ X + lam * len(y) * jnp.eye(X.shape[1]), X.T @ y)


def solve_ridge_kwargs(init_params: Any, **kw: Any) -> Any:
    return solve_ridge(init_params, kw["lam"], kw["X"], kw["y"])


def numerical_jacobian() -> Any:
    step = 1e-4
    solution = lambda lam: np.linalg.solve(X.T @ X + lam * len(Y) * np.eye(3), X.T @ Y)
    return (solution(LAM + step) - solution(LAM - step)) / (2 * step)


OPTIMALITY = jax.grad(objective)


def test_root_vjp(x64: None) -> None:
    sol = solve_ridge(None, LAM, X, Y)
    vjp = lambda g: idf.root_vjp(optimality_fun=OPTIMALITY, sol=sol, args=(LAM, X, Y), cotangent=g)[0]
    np.testing.assert_allclose(jax.jit(jax.vmap(vjp))(np.eye(3)), numerical_jacobian(), atol=1e-8)


def test_root_jvp(x64: None) -> None:
    sol = solve_ridge(None, LAM, X, Y)
    tangents = (1.0, np.zeros_like(X), np.zeros_like(Y))
    jvp = lambda tangents: idf.root_jvp(optimality_fun=OPTIMALITY, sol=sol, args=(LAM, X, Y), tangents=tangents)
    np.testing.assert_allclose(jax.jit(jvp)(tangents), numerical_jacobian(), atol=1e-8)


def test_custom_root(x64: None) -> None:
    solver = idf.custom_root(OPTIMALITY)(solve_ridge)
    np.testing.assert_array_equal(solver(None, lam=LAM, X=X, y=Y), solve_ridge(None, LAM, X, Y))
    got = jax.jacrev(solver, argnums=1)(None, LAM, X=X, y=Y)
    np.testing.assert_allclose(got, numerical_jacobian(), atol=1e-8)


def test_custom_root_with_aux(x64: None) -> None:
    solver = idf.custom_root(OPTIMALITY, has_aux=True)(lambda init, lam, X, y: (solve_ridge(init, lam, X, y), None))
    np.testing.assert_array_equal(solver(None, lam=LAM, X=X, y=Y)[0], solve_ridge(None, LAM, X, Y))
    got, aux = jax.jacrev(solver, argnums=1)(None, LAM, X=X, y=Y)
    np.testing.assert_allclose(got, numerical_jacobian(), atol=1e-8)
    assert aux is None


def test_custom_fixed_point_with_the_signature_of_another_function(x64: None) -> None:
    fixed_point = functools.wraps(OPTIMALITY)(lambda params, *args: params - OPTIMALITY(params, *args))
    solver = idf.custom_fixed_point(fixed_point)(solve_ridge)
    np.testing.assert_array_equal(solver(None, lam=LAM, X=X, y=Y), solve_ridge(None, LAM, X, Y))
    got = jax.jacrev(solver, argnums=1)(None, LAM, X=X, y=Y)
    np.testing.assert_allclose(got, numerical_jacobian(), atol=1e-8)


@pytest.mark.parametrize("kwargs", [{"X": X, "y": Y}, {"y": Y, "X": X}], ids=["ordered", "unordered"])
def test_custom_root_of_a_solver_with_catch_all_kwargs(x64: None, kwargs: Any) -> None:
    solver = idf.custom_root(OPTIMALITY)(solve_ridge_kwargs)
    first = lambda lam: solver(None, lam=lam, **kwargs)[0]
    exact = jax.grad(lambda lam: solve_ridge(None, lam, X, Y)[0])(LAM)
    for transform in (lambda f: f, jax.jit):
        got = transform(solver)(None, lam=LAM, **kwargs)
        np.testing.assert_allclose(got, solve_ridge(None, LAM, X, Y), rtol=1e-12)
        np.testing.assert_allclose(transform(jax.grad(first))(LAM), exact, rtol=1e-8)
