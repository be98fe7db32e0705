"""Implicit differentiation, held to closed forms, finite differences and other libraries' derivatives."""

from __future__ import annotations

import functools
import warnings
from collections import namedtuple
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from bilevel import linear, optimality
from bilevel.implicit import argmin, custom_fixed_point, custom_root, root_jvp, root_vjp

RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(8, 3)), RNG.normal(size=8)


@pytest.fixture(scope="module")
def jaxopt() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt says that it is no longer maintained
        import jaxopt
    return jaxopt


def ridge(w: Any, lam: Any, X: Any, t: Any) -> Any:
    return 0.5 * jnp.mean((X @ w - t) ** 2) + 0.5 * lam * jnp.sum(w**2)


def ridge_solution(lam: Any, X: Any = X, t: Any = T) -> Any:
    return jnp.linalg.solve(X.T @ X + lam * len(t) * jnp.eye(X.shape[1]), X.T @ t)


# At lam = 0.3, without a programme to compile: the solution, how it moves with lam, and how with t.
INVERSE = np.linalg.inv(X.T @ X + 0.3 * len(T) * np.eye(3))
W = INVERSE @ X.T @ T
BY_LAM, TWICE_BY_LAM = -len(T) * INVERSE @ W, 2 * len(T) ** 2 * INVERSE @ INVERSE @ W
BY_T = INVERSE @ X.T


def ridge_solver(init: Any, lam: Any, X: Any, t: Any) -> Any:
    # The stop_gradient shows that no derivative passes through the solver itself.
    return jax.lax.stop_gradient(ridge_solution(lam, X, t))


def value(w: Any) -> Any:
    return jnp.sum(jnp.sin(w)) + w[0] * w[1]


def value_twice_by_lam() -> Any:
    """The second derivative of `value` at the solution, by lam, in closed form."""
    slope, bend = np.cos(W) + np.array([W[1], W[0], 0]), BY_LAM * -np.sin(W) * BY_LAM
    return slope @ TWICE_BY_LAM + bend.sum() + 2 * BY_LAM[0] * BY_LAM[1]


def central_differences(function: Any, x: Any, step: float = 1e-5) -> np.ndarray:
    """The Jacobian, with the shape of `jax.jacfwd`'s, for an x that is a scalar or a vector."""
    at = lambda x: np.asarray(function(x))
    x = np.asarray(x)
    columns = [
        (at(x + step * e.reshape(x.shape)) - at(x - step * e.reshape(x.shape))) / (2 * step) for e in np.eye(x.size)
    ]
    return np.moveaxis(np.array(columns), 0, -1).reshape(*np.shape(columns[0]), *x.shape)


def both_modes(function: Any, x: Any) -> tuple[Any, Any]:
    return jax.jit(lambda x: (jax.jacfwd(function)(x), jax.jacrev(function)(x)))(x)  # one programme to compile


def assert_differentiates(solution: Any, decorated: Any, x: Any, tol: float = 1e-6) -> tuple[Any, Any]:
    """Forward mode, reverse mode and central differences of a solver give one Jacobian; the first two are returned."""
    numerical = central_differences(jax.jit(solution), x)
    assert np.abs(numerical).max() > 1e-3, "a Jacobian of zeros would test nothing"
    jacobians = both_modes(decorated, x)
    for jacobian in jacobians:
        np.testing.assert_allclose(jacobian, numerical, atol=tol, rtol=0)
    return jacobians


# First and second derivatives.


@pytest.mark.parametrize("condition", [jax.grad(ridge), optimality.stationarity(ridge)], ids=["general", "symmetric"])
def test_forward_reverse_and_finite_differences_agree_on_ridge(x64: None, condition: Any) -> None:
    solver = custom_root(condition)(ridge_solver)
    lam_and_t = np.append(0.3, T)
    assert_differentiates(
        lambda v: ridge_solution(v[0], t=v[1:]), lambda v: solver(None, v[0], X, v[1:]), lam_and_t, 1e-8
    )


def test_float32_keeps_its_dtype_and_its_precision() -> None:
    solver = custom_root(optimality.stationarity(ridge))(ridge_solver)
    X32, t32 = X.astype(np.float32), T.astype(np.float32)
    for jacobian in both_modes(lambda lam: solver(None, lam, X32, t32), np.float32(0.3)):
        assert jacobian.dtype == jnp.float32
        np.testing.assert_allclose(jacobian, BY_LAM, rtol=1e-4)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (jax.jacfwd, jax.jacfwd),
        (jax.jacrev, jax.jacfwd),
        (jax.jacrev, jax.jacrev),
        pytest.param(jax.jacfwd, jax.jacrev, marks=pytest.mark.slow),  # `jax.hessian`, which other tests take
    ],
)
def test_the_hessian_of_a_value_function_is_right_in_every_nesting(x64: None, outer: Any, inner: Any) -> None:
    solver = custom_root(optimality.stationarity(ridge))(ridge_solver)
    got = jax.jit(outer(inner(lambda t: value(solver(None, 0.3, X, t)))))(T)
    curvature = -np.diag(np.sin(W))  # of `value`
    curvature[0, 1] = curvature[1, 0] = 1
    np.testing.assert_allclose(got, BY_T.T @ curvature @ BY_T, atol=1e-10)


def test_hessian_and_third_derivative(x64: None) -> None:
    solver = custom_root(jax.grad(ridge))(ridge_solver)

    def derivatives(solution: Any) -> Any:
        hessian = jax.hessian(lambda lam: value(solution(lam)))
        return jax.jit(jax.value_and_grad(hessian))(0.3)

    np.testing.assert_allclose(derivatives(lambda lam: solver(None, lam, X, T)), derivatives(ridge_solution), rtol=1e-9)


@jax.jit
def pairings(M: Any, x: Any, dx: Any, cotangent: Any) -> Any:
    """`<cotangent, J dx>` and `<J^T cotangent, dx>` of y(x) with M y = x, on pytrees."""

    @custom_root(lambda y, x: optax.tree.sub(product(y), x))
    def solver(init: Any, x: Any) -> Any:
        return init

    def product(y: Any) -> Any:
        flat, unravel = ravel_pytree(y)
        return unravel(M @ flat)

    _, dy = jax.jvp(lambda x: solver(x, x), (x,), (dx,))
    _, pull_back = jax.vjp(lambda x: solver(x, x), x)
    exact = ravel_pytree(cotangent)[0] @ jnp.linalg.solve(M, ravel_pytree(dx)[0])
    return optax.tree.vdot(cotangent, dy), optax.tree.vdot(pull_back(cotangent)[0], dx), exact


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_forward_mode_is_the_transpose_of_reverse_mode(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree = lambda: {"a": rng.normal(size=3).astype(np.float32), "b": (np.float32(rng.normal()),)}
    M = 2 * np.eye(4, dtype=np.float32) + rng.uniform(-0.4, 0.4, size=(4, 4)).astype(np.float32)
    forward, reverse, exact = pairings(M, tree(), tree(), tree())
    np.testing.assert_allclose([forward, reverse], [exact, exact], rtol=1e-4, atol=1e-5)


def test_a_fixed_point_that_is_not_symmetric_matches_its_unrolled_iteration(x64: None) -> None:
    W = RNG.normal(size=(4, 4))
    W = 0.7 * W / np.linalg.norm(W, 2)
    contraction = lambda y, x: jnp.tanh(W @ y + x)

    def iterate(y: Any, x: Any) -> Any:
        return jax.lax.scan(lambda y, _: (contraction(y, x), None), y, length=150)[0]

    y0, x = np.zeros(4), RNG.normal(size=4)
    solver = custom_fixed_point(contraction)(iterate)
    of_unrolled = lambda x: (jax.jacfwd(lambda x: iterate(y0, x))(x), jax.hessian(lambda x: value(iterate(y0, x)))(x))
    unrolled, hessian = jax.jit(of_unrolled)(x)
    assert np.abs(unrolled - unrolled.T).max() > 0.05
    for jacobian in both_modes(lambda x: solver(y0, x), x):
        np.testing.assert_allclose(jacobian, unrolled, atol=1e-10)
    got = jax.jit(jax.hessian(lambda x: value(solver(y0, x))))(x)
    np.testing.assert_allclose(got, hessian, atol=1e-9)


def test_more_unknowns_than_the_dense_default_takes(x64: None) -> None:
    n = 130
    M = np.eye(n) + 0.5 * RNG.normal(size=(n, n)) / np.sqrt(n)
    solver = custom_root(lambda y, x: M @ y - x**2)(lambda init, x: jnp.linalg.solve(M, x**2))
    x, dx = RNG.normal(size=n), RNG.normal(size=n)
    exact = np.linalg.solve(M, 2 * x * dx)
    along = jax.jit(lambda x: jax.jvp(lambda x: solver(None, x), (x,), (dx,))[1])(x)
    np.testing.assert_allclose(along, exact, atol=1e-9)
    gradient = jax.jit(jax.grad(lambda x: solver(None, x) @ dx))(x)
    np.testing.assert_allclose(gradient, 2 * x * np.linalg.solve(M.T, dx), atol=1e-9)


def test_a_system_that_is_singular_but_consistent_has_a_finite_answer(x64: None) -> None:
    # The unknown (y1, y2) enters through y1 + y2 only.
    @custom_root(lambda y, x: jnp.array([y[0] + y[1] - x**2, 2 * (y[0] + y[1] - x**2)]))
    def solver(init: Any, x: Any) -> Any:
        return jnp.array([x**2, 0.0])

    np.testing.assert_allclose(jax.grad(lambda x: solver(None, x).sum())(3.0), 6.0)


# Linear solvers.


@pytest.mark.parametrize(
    "solve",
    [
        linear.CG(tol=1e-12),
        pytest.param(linear.MINRES(tol=1e-12), marks=pytest.mark.slow),
        linear.NormalCG(tol=1e-12),
        pytest.param(linear.BiCGStab(tol=1e-12), marks=pytest.mark.slow),
        linear.Dense(),
        lambda matvec, b: jnp.linalg.solve(jax.jacfwd(matvec)(b), b),
    ],
    ids=["CG", "MINRES", "NormalCG", "BiCGStab", "Dense", "function"],
)
def test_any_linear_solver_goes_in(x64: None, solve: Any) -> None:
    solver = custom_root(jax.grad(ridge), solve=solve)(ridge_solver)
    for jacobian in both_modes(lambda lam: solver(None, lam, X, T), 0.3):
        np.testing.assert_allclose(jacobian, BY_LAM, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["cg", *(pytest.param(name, marks=pytest.mark.slow) for name in ("normal_cg", "bicgstab")), "lu"]
)
def test_the_linear_solvers_of_jaxopt_go_in(x64: None, jaxopt: ModuleType, name: str) -> None:
    solve = getattr(jaxopt.linear_solve, f"solve_{name}")
    solver = custom_root(jax.grad(ridge), solve=solve)(ridge_solver)
    for jacobian in both_modes(lambda lam: solver(None, lam, X, T), 0.3):
        np.testing.assert_allclose(jacobian, BY_LAM, atol=1e-5)


def test_each_mode_hands_its_own_matrix_to_the_linear_solver(x64: None) -> None:
    A = np.array([[2.0, 1.0], [0.0, 3.0]])
    residual = lambda y, x: A @ y - x

    def one_step(matvec: Any, b: Any) -> Any:  # A b instead of A^-1 b, to see which matrix it was given
        return matvec(b)

    direction = np.array([1.0, 2.0])
    np.testing.assert_allclose(root_jvp(residual, direction, (direction,), (direction,), one_step), A @ direction)
    np.testing.assert_allclose(root_vjp(residual, direction, (direction,), direction, one_step)[0], A.T @ direction)
    of = lambda x: custom_root(residual, solve=one_step)(lambda init, x: jnp.linalg.solve(A, x))(None, x)
    np.testing.assert_allclose(jax.jvp(of, (direction,), (direction,))[1], A @ direction)
    np.testing.assert_allclose(jax.vjp(of, direction)[1](direction)[0], A.T @ direction)


def test_root_jvp_and_root_vjp_match_the_closed_form_and_can_be_differentiated(x64: None) -> None:
    gradient = jax.grad(ridge)
    tangents = (1.0, np.zeros_like(X), np.zeros_like(T))
    np.testing.assert_allclose(root_jvp(gradient, W, (0.3, X, T), tangents), BY_LAM, atol=1e-10)
    row = jax.jit(lambda e: root_vjp(gradient, W, (0.3, X, T), e)[0])
    np.testing.assert_allclose([row(e) for e in np.eye(3)], BY_LAM, atol=1e-10)

    # d/dlam of the Jacobian along the solution path is the second derivative.
    along = lambda lam: root_jvp(gradient, ridge_solution(lam), (lam, X, T), tangents)
    np.testing.assert_allclose(jax.jit(jax.jacrev(along))(0.3), TWICE_BY_LAM, atol=1e-9)


# Arguments.


def test_keyword_arguments_in_any_order_and_defaults(x64: None) -> None:
    plain = custom_root(jax.grad(ridge))(ridge_solver)
    catch_all = custom_root(jax.grad(ridge))(lambda init, **kw: ridge_solver(init, kw["lam"], kw["X"], kw["t"]))
    defaults = custom_root(jax.grad(ridge))(lambda init, lam, X=X, t=T: ridge_solver(init, lam, X, t))
    calls = (
        lambda lam: plain(None, lam=lam, X=X, t=T),
        lambda lam: plain(t=T, X=X, lam=lam, init=None),
        lambda lam: plain(None, lam, t=T, X=X),
        lambda lam: catch_all(None, t=T, lam=lam, X=X),
        lambda lam: defaults(None, lam),
    )
    of_all = lambda lam: [jax.grad(lambda lam: call(lam)[0])(lam) for call in calls]
    np.testing.assert_allclose(of_all(0.3), BY_LAM[0], atol=1e-9)
    np.testing.assert_allclose(jax.jit(of_all)(0.3), BY_LAM[0], atol=1e-9)


def test_reference_signature_says_how_keywords_match(x64: None) -> None:
    def anonymous(w: Any, *args: Any) -> Any:
        return jax.grad(ridge)(w, *args)

    solver = custom_root(anonymous, reference_signature=ridge)(lambda init, **kw: ridge_solution(**kw))
    got = jax.grad(lambda lam: solver(None, t=T, X=X, lam=lam)[0])(0.3)
    np.testing.assert_allclose(got, BY_LAM[0], atol=1e-9)


def test_keyword_only_arguments_of_the_condition(x64: None) -> None:
    solver = custom_root(lambda y, *, x, scale: y - scale * x)(lambda init, *, x, scale: scale * x)
    np.testing.assert_allclose(jax.grad(lambda x: solver(None, scale=3.0, x=x))(2.0), 3.0)


def test_counts_strings_functions_and_none_pass_through(x64: None) -> None:
    seen = []

    def condition(y: Any, x: Any, power: int, fn: Any, name: str, nothing: None, index: Any) -> Any:
        return y - fn(x[index]) ** power

    @custom_root(condition)
    def solver(init: Any, x: Any, power: int, fn: Any, name: str, nothing: None, index: Any) -> Any:
        seen.append((power, name, nothing))
        return fn(x[index]) ** power

    of = lambda x: solver(None, x, 3, jnp.sin, "cubed", None, np.array(1))
    x, exact = np.array([0.5, 0.7]), [0, 3 * np.sin(0.7) ** 2 * np.cos(0.7)]
    np.testing.assert_allclose(jax.grad(of)(x), exact)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(of))(x), exact)
    assert (3, "cubed", None) in seen


Pair = namedtuple("Pair", "first second")


def test_pytrees_in_every_place_and_other_containers_out_of_the_condition(x64: None) -> None:
    @custom_root(lambda sol, x: (sol.first - x["a"] ** 2, [sol.second["deep"] - x["b"][0] * x["a"]]))
    def solver(init: Any, x: Any) -> Any:
        return Pair(x["a"] ** 2, {"deep": x["b"][0] * x["a"]})

    x = {"a": np.array([1.0, 2.0]), "b": (np.array(3.0),)}
    for jacobian in both_modes(lambda x: solver(None, x), x):
        np.testing.assert_allclose(jacobian.first["a"], np.diag([2.0, 4.0]))
        np.testing.assert_allclose(jacobian.second["deep"]["a"], 3 * np.eye(2))
        np.testing.assert_allclose(jacobian.second["deep"]["b"][0], [1.0, 2.0])
        np.testing.assert_allclose(jacobian.first["b"][0], [0.0, 0.0])


def test_auxiliary_output_keeps_its_container_and_is_not_differentiated(x64: None) -> None:
    @custom_root(jax.grad(ridge), has_aux=True)
    def solver(init: Any, lam: Any, X: Any, t: Any) -> Any:
        return Pair(ridge_solver(init, lam, X, t), {"steps": 7, "error": lam * 0 + 1e-3, "none": None})

    assert isinstance(solver(None, 0.3, X, T), Pair)
    assert solver(None, 0.3, X, T).second["steps"] == 7
    for jacobian in both_modes(lambda lam: solver(None, lam, X, T).first, 0.3):
        np.testing.assert_allclose(jacobian, BY_LAM, atol=1e-9)
    assert jax.grad(lambda lam: solver(None, lam, X, T).second["error"])(0.3) == 0
    (_, aux), (tangent, _) = jax.jvp(lambda lam: tuple(solver(None, lam, X, T)), (0.3,), (1.0,))
    np.testing.assert_allclose(tangent, BY_LAM, atol=1e-9)
    assert aux["steps"] == 7


def test_the_derivative_by_the_initial_guess_is_zero(x64: None) -> None:
    solver = custom_root(jax.grad(ridge))(lambda init, lam, X, t: init + ridge_solver(init, lam, X, t) - init)
    for jacobian in both_modes(lambda w: solver(w, 0.3, X, T), np.ones(3)):
        assert not np.any(jacobian)


def test_an_unused_solution_and_integer_arguments_give_zeros_not_nans(x64: None) -> None:
    solver = custom_root(jax.grad(ridge))(ridge_solver)
    assert jax.grad(lambda lam: 0.0 * solver(None, lam, X, T).sum())(0.3) == 0
    integers = custom_root(lambda y, x, n: y - x * n)(lambda init, x, n: x * n)
    np.testing.assert_allclose(jax.grad(lambda x: integers(None, x, jnp.arange(3)).sum())(2.0), 3.0)
    assert integers(None, 2.0, 3) == 6


# Transformations.


def test_vmap_over_arguments_data_and_tangents(x64: None) -> None:
    solver = custom_root(optimality.stationarity(ridge))(ridge_solver)
    lams, stacked = np.array([0.1, 0.5]), np.stack([X, 2 * X])
    got = jax.jit(jax.vmap(jax.grad(lambda lam, X: value(solver(None, lam, X, T)))))(lams, stacked)
    exact = jax.jit(jax.grad(lambda lam, X: value(ridge_solution(lam, X)), argnums=(0, 1)))
    np.testing.assert_allclose(got, [exact(*one)[0] for one in zip(lams, stacked, strict=True)], atol=1e-9)
    got = jax.jit(jax.grad(lambda X: jax.vmap(lambda lam: value(solver(None, lam, X, T)))(lams).sum()))(X)
    np.testing.assert_allclose(got, sum(np.asarray(exact(lam, X)[1]) for lam in lams), atol=1e-9)


def test_inside_scan_and_checkpoint(x64: None) -> None:
    solver = custom_root(optimality.stationarity(ridge))(ridge_solver)

    def chain(solve: Any, lam: Any) -> Any:
        step = jax.checkpoint(lambda lam, _: (lam + 0.1 * jnp.sum(solve(lam) ** 2), None))
        return jax.lax.scan(step, lam, length=3)[0]

    got = jax.jit(jax.grad(functools.partial(chain, lambda lam: solver(None, lam, X, T))))(0.3)
    np.testing.assert_allclose(got, jax.jit(jax.grad(functools.partial(chain, ridge_solution)))(0.3), rtol=1e-9)


def test_a_solver_in_numpy_sees_plain_arrays(x64: None) -> None:
    scale = np.array([1.0, 8.0])

    @custom_root(lambda y, x, scale: scale * y**3 - x)
    def solver(init: Any, x: Any, scale: Any) -> np.ndarray:
        return np.cbrt(float(x) / np.asarray(scale))

    of = lambda x: solver(None, x, scale)[1]
    np.testing.assert_allclose(jax.grad(of)(0.3), 0.3 ** (-2 / 3) / 6, rtol=1e-9)
    np.testing.assert_allclose(jax.hessian(of)(0.3), -(0.3 ** (-5 / 3)) / 9, rtol=1e-9)


def test_a_complex_solution(x64: None) -> None:
    A = RNG.normal(size=(4, 2)) + 1j * RNG.normal(size=(4, 2))
    b = RNG.normal(size=4) + 1j * RNG.normal(size=4)

    def objective(z: Any, lam: Any, b: Any) -> Any:
        return jnp.sum(jnp.abs(A @ z - b) ** 2) + lam * jnp.sum(jnp.abs(z) ** 2)

    def solution(lam: Any, b: Any) -> Any:
        return jnp.linalg.solve(A.conj().T @ A + lam * jnp.eye(2), A.conj().T @ b)

    solver = custom_root(jax.grad(objective))(lambda init, lam, b: jax.lax.stop_gradient(solution(lam, b)))
    size = lambda z: jnp.sum(jnp.abs(z - 1j) ** 2)

    def derivatives(solve: Any) -> Any:
        both = jax.grad(lambda lam, b: size(solve(lam, b)), argnums=(0, 1))
        return jax.jit(lambda lam, b: (jax.jacfwd(lambda lam: solve(lam, b))(lam), *both(lam, b)))(0.5, b)

    got, exact = derivatives(lambda lam, b: solver(None, lam, b)), derivatives(solution)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), got, exact)


# Captured values.


def closed_over(lam: Any) -> Any:
    return custom_root(jax.grad(lambda w: ridge(w, lam, X, T)))(lambda init: ridge_solution(lam))(None)


def partially_applied(lam: Any) -> Any:
    condition = functools.partial(lambda lam, w: jax.grad(ridge)(w, lam, X, T), lam)
    return custom_root(condition)(functools.partial(lambda lam, init: ridge_solver(init, lam, X, T), lam))(None)


class Holder:
    def __init__(self, lam: Any):
        self.lam = lam

    def condition(self, w: Any, t: Any) -> Any:
        return jax.grad(ridge)(w, self.lam, X, t)

    def solve(self, init: Any, t: Any) -> Any:
        return ridge_solution(self.lam, X, t)


def held(lam: Any) -> Any:
    return custom_root(Holder(lam).condition)(Holder(lam).solve)(None, T)


def only_in_the_condition(lam: Any) -> Any:
    return custom_root(lambda w, t: jax.grad(ridge)(w, lam, X, t))(lambda init, t: ridge_solution(0.3, X, t))(None, T)


@pytest.mark.parametrize("captured", [closed_over, partially_applied, held, only_in_the_condition])
def test_captured_values_are_differentiated(x64: None, captured: Any) -> None:
    within = jax.jit(lambda lam: (jax.jacfwd(captured)(lam[0]), jax.vmap(jax.jacrev(captured))(lam)[0]))
    for jacobian in (*within(np.array([0.3])), jax.jacrev(captured)(0.3), jax.jacfwd(jax.jit(captured))(0.3)):
        np.testing.assert_allclose(jacobian, BY_LAM, atol=1e-9)


def test_captured_values_have_second_derivatives(x64: None) -> None:
    got = jax.jit(jax.hessian(lambda lam: value(closed_over(lam))))(0.3)
    np.testing.assert_allclose(got, value_twice_by_lam(), rtol=1e-9)


class Hidden:
    __slots__ = ("lam",)

    def __call__(self, init: Any) -> Any:
        return ridge_solution(self.lam)


def test_a_captured_value_that_cannot_be_found_is_an_error_with_the_cure() -> None:
    def of(lam: Any) -> Any:
        hidden = Hidden()
        hidden.lam = lam
        return custom_root(lambda w: w - hidden(None))(hidden)(None)

    with pytest.raises(TypeError, match=r"without having it as an argument. Pass it: solver\(init, value"):
        jax.jacfwd(of)(0.3)


# A condition with a custom derivative of its own.


def test_a_condition_with_a_custom_vjp_works_in_reverse_mode(x64: None) -> None:
    @jax.custom_vjp
    def square(y: Any) -> Any:
        return y**2

    square.defvjp(lambda y: (y**2, y), lambda y, g: (2 * y * g,))
    solver = custom_root(lambda y, x: square(y) - x)(lambda init, x: jnp.sqrt(x))
    np.testing.assert_allclose(jax.grad(lambda x: solver(None, x))(4.0), 0.25)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: solver(None, x), (4.0,), (1.0,))


# Any solver underneath.


def test_an_optax_loop_underneath(x64: None) -> None:
    @custom_root(optimality.stationarity(ridge))
    def solver(w: Any, lam: Any, X: Any, t: Any) -> Any:
        rule = optax.sgd(0.4, momentum=0.5)

        def step(carry: Any) -> Any:
            w, state, _ = carry
            gradient = jax.grad(ridge)(w, lam, X, t)
            updates, state = rule.update(gradient, state, w)
            return optax.apply_updates(w, updates), state, optax.tree.norm(gradient)

        return jax.lax.while_loop(lambda carry: carry[2] > 1e-13, step, (w, rule.init(w), jnp.inf))[0]

    assert_differentiates(ridge_solution, lambda lam: solver(jnp.zeros(3), lam, X, T), 0.3, 1e-8)


@pytest.mark.slow
def test_optimistix_underneath(x64: None) -> None:
    optimistix = pytest.importorskip("optimistix")

    @custom_root(optimality.stationarity(ridge))
    def solver(w: Any, lam: Any, X: Any, t: Any) -> Any:
        method = optimistix.BFGS(rtol=1e-12, atol=1e-12)
        return optimistix.minimise(lambda w, args: ridge(w, *args), method, w, (lam, X, t), max_steps=500).value

    assert_differentiates(ridge_solution, lambda lam: solver(jnp.zeros(3), lam, X, T), 0.3, 1e-8)


def test_jaxopt_underneath_gains_the_second_derivative(x64: None, jaxopt: ModuleType) -> None:
    theirs = jaxopt.LBFGS(ridge, tol=1e-12, maxiter=200)
    solver = custom_root(theirs.optimality_fun, has_aux=True)(theirs.run)
    kept = jax.eval_shape(solver, jnp.zeros(3), 0.3, X, T)  # the type of jaxopt's result
    assert kept.params.shape == (3,)
    of = lambda lam: value(solver(jnp.zeros(3), lam=lam, X=X, t=T).params)
    np.testing.assert_allclose(jax.jit(jax.hessian(of))(0.3), value_twice_by_lam(), rtol=1e-8)


# argmin.


def bowl(x: Any, y: Any, t: Any = T) -> Any:
    return ridge(y, jnp.exp(x), X, t)


def bowl_solution(x: Any, t: Any = T) -> Any:
    return ridge_solution(jnp.exp(x), X, t)


def newton(lower: Any, x: Any, y: Any) -> Any:
    """One Newton step: exact for an objective that is quadratic in y."""
    gradient = jax.grad(lower, argnums=1)
    return y - jnp.linalg.solve(jax.jacfwd(gradient, argnums=1)(x, y), gradient(x, y))


def test_argmin_is_a_differentiable_function_of_x_and_of_the_data(x64: None) -> None:
    y_star = argmin(bowl, newton)
    of_both = lambda v: y_star(v[0], jnp.ones(3), v[1:])
    assert_differentiates(lambda v: bowl_solution(v[0], v[1:]), of_both, np.append(-1.0, T), 1e-8)
    got = jax.jit(jax.hessian(lambda x: value(y_star(x, jnp.ones(3)))))(-1.0)
    np.testing.assert_allclose(got, jax.jit(jax.hessian(lambda x: value(bowl_solution(x))))(-1.0), rtol=1e-9)
    assert not jax.jit(jax.jacrev(lambda y0: y_star(-1.0, y0)))(np.ones(3)).any()


def test_argmin_with_auxiliary_output_and_a_linear_solver(x64: None) -> None:
    y_star = argmin(bowl, lambda *a: (newton(*a), {"steps": 1}), has_aux=True, linear_solver=linear.Dense())
    x = np.log(0.3)
    y, aux = y_star(x, np.zeros(3))
    np.testing.assert_allclose(y, W, atol=1e-12)
    assert aux["steps"] == 1
    jacobian = jax.jit(jax.jacrev(lambda x: y_star(x, np.zeros(3))[0]))(x)
    np.testing.assert_allclose(jacobian, 0.3 * BY_LAM, atol=1e-10)


def test_argmin_over_a_box(x64: None) -> None:
    clip = lambda y: jnp.clip(y, -0.2, 0.2)
    f = lambda x, y: 0.5 * jnp.sum((y - x) ** 2) + 0.1 * y[0] * y[1]

    def solver(lower: Any, x: Any, y: Any) -> Any:
        gradient = jax.grad(lower, argnums=1)
        return jax.lax.fori_loop(0, 100, lambda _, y: clip(y - 0.8 * gradient(x, y)), y)

    in_the_box = optimality.projected_gradient(lambda y, x: f(x, y), clip)
    y_star = argmin(f, solver, optimality=lambda y, x: in_the_box(y, None, x))
    x = np.array([0.1, 3.0, -0.15])
    _, jacobian = assert_differentiates(
        lambda x: solver(f, x, jnp.zeros(3)), lambda x: y_star(x, jnp.zeros(3)), x, 1e-8
    )
    np.testing.assert_allclose(jacobian[1], 0, atol=1e-12)


@pytest.mark.slow
def test_three_levels_are_an_argmin_in_the_lower_objective_of_another(x64: None) -> None:
    A, B, C = RNG.normal(size=(3, 3)), RNG.normal(size=(2, 2)), RNG.normal(size=(2, 3))

    def bottom(xy: Any, z: Any) -> Any:  # z* = A y + (x, 0, x)
        x, y = xy
        return 0.5 * jnp.sum((z - A[:, :2] @ y - jnp.array([x, 0, x])) ** 2)

    z_star = argmin(bottom, newton, linear_solver=lambda A, b: jnp.linalg.solve(jax.jacfwd(A)(b), b))

    def middle(x: Any, y: Any) -> Any:
        z = z_star((x, y), jnp.zeros(3))
        return 0.5 * jnp.sum((C @ z - 1) ** 2) + 0.5 * jnp.sum((B @ y - x) ** 2) + 0.5 * jnp.sum(y**2) * (1 + x**2)

    def y_exact(x: Any) -> Any:
        P, q = C @ A[:, :2], 1 - C @ jnp.array([x, 0, x])
        return jnp.linalg.solve(P.T @ P + B.T @ B + (1 + x**2) * jnp.eye(2), P.T @ q + B.T @ jnp.array([x, x]))

    y_star = argmin(middle, newton)
    np.testing.assert_allclose(y_star(0.7, jnp.zeros(2)), y_exact(0.7), atol=1e-10)
    exact = jax.jacfwd(y_exact)(0.7)
    for jacobian in both_modes(lambda x: y_star(x, jnp.zeros(2)), 0.7):
        np.testing.assert_allclose(jacobian, exact, atol=1e-9)


# Errors.


def test_errors_name_what_was_given_and_the_cure() -> None:
    solver = custom_root(lambda y, x: jnp.concatenate([y, x]))(lambda init, x: x)
    with pytest.raises(TypeError, match=r"leaves of shapes \[\(6,\)\] for a solution with leaves of shapes \[\(3,\)\]"):
        jax.grad(lambda x: solver(None, x).sum())(jnp.ones(3))
    forgot_aux = custom_root(jax.grad(ridge))(lambda *a: (ridge_solver(*a), jnp.zeros(2)))
    with pytest.raises(Exception, match=r"If that is \(sol, aux\), pass has_aux=True"):
        jax.grad(lambda lam: forgot_aux(None, lam, X, T)[0].sum())(0.3)
    no_aux = custom_root(jax.grad(ridge), has_aux=True)(ridge_solver)
    with pytest.raises(TypeError, match="although has_aux=True; a pair"):
        no_aux(None, 0.3, X, T)
    counts = custom_root(lambda y, x: (y[0] - x, 0))(lambda init, x: (x, 3))
    with pytest.raises(TypeError, match="leaf of type int32, which has no derivative"):
        jax.grad(lambda x: counts(None, x)[0])(1.0)
    fewer = custom_root(lambda y, x: y - x)(lambda init, x, steps: x)
    with pytest.raises(TypeError, match=r"do not fit the signature \(y, x\) of optimality_fun"):
        jax.grad(lambda x: fewer(None, x, 10))(1.0)
    with pytest.raises(TypeError, match=r"signature \(init.* of the solver: missing a required argument: 't'"):
        custom_root(jax.grad(ridge))(ridge_solver)(None, 0.3, X)
    with pytest.raises(TypeError, match="initial guess is missing"):
        custom_root(lambda y: y)(lambda *args: 0.0)()
    with pytest.raises(TypeError, match="expects a function optimality_fun"):
        custom_root(0.5)
    with pytest.raises(TypeError, match=r"The linear solver was 'cg'; a function \(matvec, b\)"):
        custom_root(jax.grad(ridge), solve="cg")
    with pytest.raises(ValueError, match="1 args and 2 tangents"):
        root_jvp(lambda y, x: y - x, 1.0, (1.0,), (1.0, 1.0))
    with pytest.raises(TypeError, match=r"returned a shape \(3,\); a scalar is expected"):
        optimality.stationarity(lambda y: y)(jnp.ones(3))
    with pytest.raises(TypeError, match=r"returned a tuple; a scalar is expected.*auxiliary output"):
        optimality.stationarity(lambda y: (y.sum(), y))(jnp.ones(3))


# Optimality conditions.

Q = RNG.normal(size=(4, 4))
Q = Q @ Q.T + np.eye(4)


def quadratic(y: Any, c: Any) -> Any:
    return 0.5 * y @ Q @ y + c @ y


STEP = 1 / np.linalg.norm(Q, 2)
C0 = np.array([-1.0, 2.0, -3.0, 0.5])


def repeat(step: Any, y: Any, times: int = 400) -> Any:
    return jax.lax.fori_loop(0, times, lambda _, y: step(y), y)


def simplex(y: Any, scale: Any = 1.0) -> Any:
    return optax.projections.projection_simplex(y, scale)


@pytest.mark.slow
def test_projected_gradient_on_a_simplex(x64: None, jaxopt: ModuleType) -> None:
    def solution(c: Any, scale: Any) -> Any:
        return repeat(lambda y: simplex(y - STEP * jax.grad(quadratic)(y, c), scale), jnp.full(4, 0.25))

    solver = custom_root(optimality.projected_gradient(quadratic, simplex, 2 * STEP))(
        lambda y, scale, c: solution(c, scale)
    )
    assert 0 < np.sum(solution(C0, 1.0) == 0) < 4  # some constraints are active, some are not
    assert_differentiates(lambda c: solution(c, 1.0), lambda c: solver(None, 1.0, c), C0)
    assert_differentiates(lambda s: solution(C0, s), lambda s: solver(None, s, C0), 1.0)
    theirs = jaxopt.ProjectedGradient(quadratic, jaxopt.projection.projection_simplex, tol=1e-12, maxiter=2000)
    jacobian = jax.jacrev(lambda c: theirs.run(jnp.full(4, 0.25), 1.0, c).params)(C0)
    np.testing.assert_allclose(jax.jacfwd(lambda c: solver(None, 1.0, c))(C0), jacobian, atol=1e-6)


def test_projected_gradient_without_hyperparameters(x64: None) -> None:
    positive = lambda y: jnp.maximum(y, 0)
    solution = lambda c: repeat(lambda y: positive(y - STEP * jax.grad(quadratic)(y, c)), jnp.ones(4))
    solver = custom_root(optimality.projected_gradient(quadratic, positive))(lambda y, hyper, c: solution(c))
    assert_differentiates(solution, lambda c: solver(None, None, c), C0)


def test_proximal_gradient_is_the_lasso(x64: None, jaxopt: ModuleType) -> None:
    prox = lambda y, lam, scaling: jnp.sign(y) * jnp.maximum(jnp.abs(y) - lam * scaling, 0)

    def solution(lam: Any, c: Any) -> Any:
        return repeat(lambda y: prox(y - STEP * jax.grad(quadratic)(y, c), lam, STEP), jnp.zeros(4))

    solver = custom_root(optimality.proximal_gradient(quadratic, prox, STEP))(lambda y, lam, c: solution(lam, c))
    assert 0 < np.sum(np.asarray(jax.jit(solution)(0.8, C0)) == 0) < 4
    of_both = lambda v: solver(None, v[0], c=v[1:])
    ours, _ = assert_differentiates(lambda v: solution(v[0], v[1:]), of_both, np.append(0.8, C0))
    theirs = jaxopt.ProximalGradient(quadratic, jaxopt.prox.prox_lasso, tol=1e-12, maxiter=2000)
    jacobian = jax.jit(jax.jacrev(lambda lam: theirs.run(jnp.zeros(4), lam, C0).params))(0.8)
    np.testing.assert_allclose(ours[:, 0], jacobian, atol=1e-6)


def test_mirror_descent_on_a_simplex(x64: None, jaxopt: ModuleType) -> None:
    objective = lambda y, c: quadratic(y, c) + 0.5 * jnp.sum(y * jnp.log(y))

    def solution(c: Any) -> Any:
        step = lambda y: jax.nn.softmax(jnp.log(y) - 0.3 * STEP * jax.grad(objective)(y, c))
        return repeat(step, jnp.full(4, 0.25), 3000)

    condition = optimality.mirror_descent(objective, jax.nn.softmax, jnp.log)
    solver = custom_root(condition)(lambda y, hyper, c: solution(c))
    np.testing.assert_allclose(jax.jit(lambda c: condition(solution(c), None, c))(C0), 0, atol=1e-10)
    _, ours = assert_differentiates(solution, lambda c: solver(None, None, c), C0)
    kl_step = jaxopt.MirrorDescent.make_projection_grad(lambda z, _: jax.nn.softmax(z), jnp.log)
    theirs = jaxopt.MirrorDescent(objective, kl_step, stepsize=0.3 * STEP, tol=1e-12, maxiter=5000)
    jacobian = jax.jit(jax.jacrev(lambda c: theirs.run(jnp.full(4, 0.25), None, c).params))(C0)
    np.testing.assert_allclose(ours, jacobian, atol=1e-6)


def test_block_coordinate_is_the_group_lasso(x64: None, jaxopt: ModuleType) -> None:
    def shrink(row: Any, lam: Any, scaling: Any) -> Any:
        length = jnp.sqrt(jnp.sum(row**2))
        return row * jnp.where(length > lam * scaling, 1 - lam * scaling / length, 0)

    targets = X @ np.array([[1.0, -1.0], [0.0, 0.1], [2.0, 0.5]])
    objective = lambda W, targets: 0.5 * jnp.sum((X @ W - targets) ** 2)
    L = np.linalg.norm(X, 2) ** 2

    def solution(lam: Any) -> Any:
        step = lambda W: jax.vmap(shrink, (0, None, None))(W - jax.grad(objective)(W, targets) / L, lam, 1 / L)
        return repeat(step, jnp.ones((3, 2)), 600)

    rows = np.abs(jax.jit(solution)(2.0)).sum(axis=1)
    assert (rows == 0).any() and (rows > 0).any()
    condition = optimality.block_coordinate(objective, shrink, 1 / L)
    solver = custom_root(condition)(lambda W, lam, targets: solution(lam))
    ours, _ = assert_differentiates(solution, lambda lam: solver(None, lam, targets), 2.0)
    theirs = jaxopt.BlockCoordinateDescent(
        jaxopt.objective.least_squares,
        jaxopt.prox.prox_group_lasso,
        tol=1e-12,
        maxiter=2000,
    )
    # jaxopt's least squares are a mean over the samples and the outputs.
    scale = X.shape[0] * targets.shape[1]
    their = jax.jit(jax.jacrev(lambda lam: theirs.run(jnp.ones((3, 2)), lam / scale, (X, targets)).params))(2.0)
    np.testing.assert_allclose(ours, their, atol=1e-6)


A_EQ, B_EQ = np.array([[1.0, 1.0, 1.0, 1.0]]), np.array([1.0])
G_IN, H_IN = np.concatenate([-np.eye(4), [[1.0, 0.0, 1.0, 0.0]]]), np.array([0.0, 0.0, 0.0, 0.0, 0.8])


def qp_solution(c: Any, b: Any, h: Any) -> Any:
    """The quadratic programme's (y, nu, lam), from the active set that it has at (C0, B_EQ, H_IN)."""
    active = np.array([1, 4])  # y_1 = 0 and y_0 + y_2 = h_4
    rows = np.concatenate([A_EQ, G_IN[active]])
    matrix = np.block([[Q, rows.T], [rows, np.zeros((3, 3))]])
    y_and_multipliers = jnp.linalg.solve(matrix, jnp.concatenate([-c, b, h[active]]))
    y, nu, active_lam = jnp.split(y_and_multipliers, [4, 5])
    return y, nu, jnp.zeros(5).at[active].set(active_lam)


@pytest.mark.parametrize(
    "matvecs",
    [
        pytest.param((), id="matrices", marks=pytest.mark.slow),
        pytest.param((jnp.dot, jnp.dot, lambda G, y: G @ y), id="products"),
    ],
)
def test_kkt_of_a_quadratic_programme(x64: None, jaxopt: ModuleType, matvecs: Any) -> None:
    solution = y, _, lam = jax.device_get(jax.jit(qp_solution)(C0, B_EQ, H_IN))
    assert (G_IN @ y - H_IN < 1e-12).all() and (lam >= 0).all() and (lam[np.array([1, 4])] > 0.01).all()

    condition = optimality.kkt_qp(*matvecs)
    for part in jax.jit(condition)(solution, (Q, C0), (A_EQ, B_EQ), (G_IN, H_IN)):
        np.testing.assert_allclose(part, 0, atol=1e-10)

    @custom_root(condition)
    def solver(init: Any, params_obj: Any, params_eq: Any, params_ineq: Any) -> Any:
        return jax.lax.stop_gradient(qp_solution(params_obj[1], params_eq[1], params_ineq[1]))

    flat = lambda sol: jnp.concatenate(sol)
    assert_differentiates(
        lambda v: flat(qp_solution(v[:4], B_EQ, v[4:])),
        lambda v: flat(solver(None, params_ineq=(G_IN, v[4:]), params_obj=(Q, v[:4]), params_eq=(A_EQ, B_EQ))),
        np.append(C0, H_IN),
    )
    if not matvecs:
        theirs = jaxopt.OSQP(tol=1e-9, maxiter=20_000)
        run = lambda c: theirs.run(None, (Q, c), (A_EQ, B_EQ), (G_IN, H_IN)).params.primal
        np.testing.assert_allclose(run(C0), y, atol=1e-6)
        ours = jax.jacrev(lambda c: solver(None, (Q, c), (A_EQ, B_EQ), (G_IN, H_IN))[0])(C0)
        np.testing.assert_allclose(ours, jax.jacrev(run)(C0), atol=1e-4)


def test_kkt_with_equalities_only_and_jaxopt_underneath(x64: None, jaxopt: ModuleType) -> None:
    theirs = jaxopt.EqualityConstrainedQP()
    solver = custom_root(optimality.kkt_qp(), has_aux=True)(lambda init, obj, eq: theirs.run(init, obj, eq))

    def solution(b: Any) -> Any:
        matrix = np.block([[Q, A_EQ.T], [A_EQ, np.zeros((1, 1))]])
        return jnp.linalg.solve(matrix, jnp.concatenate([-C0, b]))[:4]

    ours, _ = assert_differentiates(solution, lambda b: solver(None, (Q, C0), (A_EQ, b)).params.primal, B_EQ)
    jacobian = jax.jit(jax.jacrev(lambda b: theirs.run(None, (Q, C0), (A_EQ, b)).params.primal))(B_EQ)
    np.testing.assert_allclose(ours, jacobian, atol=1e-5)


def test_kkt_of_a_convex_programme(x64: None) -> None:
    # min |y - p|^2 / 2  s.t.  |y|^2 <= r,  y_0 = y_1: the projection onto a ball in a hyperplane.
    condition = optimality.kkt(
        lambda y, p: 0.5 * jnp.sum((y["v"] - p) ** 2),
        lambda y, _: y["v"][0] - y["v"][1],
        lambda y, r: jnp.sum(y["v"] ** 2) - r,
    )

    def solution(p: Any, r: Any) -> Any:
        mean = (p[0] + p[1]) / 2
        inside = jnp.stack([mean, mean, p[2]])
        shrink = jnp.minimum(1.0, jnp.sqrt(r / jnp.sum(inside**2)))
        y = shrink * inside
        lam = (1 / shrink - 1) / 2
        return {"v": y}, p[0] - y[0] - 2 * lam * y[0], lam

    solver = custom_root(condition)(lambda init, *params: jax.lax.stop_gradient(solution(params[0], params[2])))
    p = np.array([1.0, 2.0, -1.0])
    of = {"exact": lambda p, r: solution(p, r)[0]["v"], "ours": lambda p, r: solver(None, p, None, r)[0]["v"]}
    residual = jax.jit(lambda p, r: condition(solution(p, r), p, None, r))
    modes = jax.jit(lambda p, r: [jac(of["ours"], argnums=(0, 1))(p, r) for jac in (jax.jacfwd, jax.jacrev)])
    exact = jax.jit(of["exact"])
    for r in (1.0, 10.0):  # the ball is active, and it is not
        jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0, atol=1e-12), residual(p, r))
        by_p = central_differences(lambda p: exact(p, r), p)
        by_r = central_differences(lambda r: exact(p, r), r)
        assert np.abs(by_p).max() > 1e-3 and (np.abs(by_r).max() > 1e-3) == (r == 1)
        for found in modes(p, r):
            np.testing.assert_allclose(found[0], by_p, atol=1e-6, rtol=0)
            np.testing.assert_allclose(found[1], by_r, atol=1e-6, rtol=0)
    got, exact = (jax.jit(jax.hessian(lambda r: value(f(p, r))))(1.0) for f in (of["ours"], of["exact"]))
    np.testing.assert_allclose(got, exact, rtol=1e-8)


def test_kkt_errors() -> None:
    condition = optimality.kkt(lambda y, p: jnp.sum((y - p) ** 2), ineq=lambda y, p: y - p)
    with pytest.raises(TypeError, match="expects the triple"):
        condition(jnp.ones(2), 1.0)
    with pytest.raises(TypeError, match=r"multipliers for `eq`.*Pass eq=\.\.\."):
        condition((jnp.ones(2), jnp.ones(2), None), 1.0)
    with pytest.raises(TypeError, match=r"shapes \[\(3,\)\] and their constraint returned shapes \[\(2,\)\]"):
        condition((jnp.ones(2), None, jnp.ones(3)), 1.0, None, 1.0)


C1 = np.array([0.2, -0.4, 0.6, 0.1])
POLYHEDRON = (A_EQ, B_EQ, -np.eye(4), np.zeros(4))  # the simplex: its projection is known in closed form


def distance(y: Any, c: Any) -> Any:
    return 0.5 * jnp.sum((y - c) ** 2)


def test_the_projection_onto_a_polyhedron_of_jaxopt_works_in_reverse_mode(x64: None, jaxopt: ModuleType) -> None:
    project = functools.partial(jaxopt.projection.projection_polyhedron, check_feasible=False)
    condition = optimality.projected_gradient(distance, project)
    solver = custom_root(condition)(lambda y, hyper, c: simplex(c))
    pull_back = jax.jit(lambda c, row: jax.vjp(lambda c: solver(None, POLYHEDRON, c), c)[1](row)[0])
    jacobian = np.stack([pull_back(C1, row) for row in np.eye(4)])
    np.testing.assert_allclose(jacobian, central_differences(jax.jit(simplex), C1), atol=1e-3)


def test_a_projection_made_of_a_quadratic_programme_works_in_both_modes(x64: None, jaxopt: ModuleType) -> None:
    programme = custom_root(optimality.kkt_qp(), has_aux=True)(jaxopt.OSQP(tol=1e-10, maxiter=20_000).run)

    def project(y: Any, polyhedron: Any) -> Any:
        A, b, G, h = polyhedron
        return programme(None, (jnp.eye(4), -y), (A, b), (G, h)).params.primal

    condition = optimality.projected_gradient(distance, project)
    solver = custom_root(condition)(lambda y, hyper, c: simplex(c))
    assert_differentiates(simplex, lambda c: solver(None, POLYHEDRON, c), C1)
