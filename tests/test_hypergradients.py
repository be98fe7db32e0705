"""Every estimator and every linear solver against a closed form with vector hyperparameters, and against each other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Ridge, float64

from bilevel import Problem, ProblemError, hypergradients, linear, lower
from bilevel.hypergradients import (
    HOZOG,
    PZOBO,
    FiniteDifference,
    Implicit,
    JacobianFree,
    OneStep,
    Unrolled,
    value_and_hypergradient,
)

D, N = 6, 40
ETA = 0.2


RIDGE = Ridge.make(D, N)
PROBLEM, TRAIN, VALIDATION = RIDGE.problem, RIDGE.train, RIDGE.validation
ridge_lower, ridge_upper = RIDGE.lower, RIDGE.upper
hessian, solution, objective = RIDGE.hessian, RIDGE.solution, RIDGE.objective
X = np.array([-1.0, -2.0, 0.0, -1.5, -3.0, -0.5])
Y = {"w": np.zeros(D)}


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.cache
def exact():
    """The value at X and the hypergradient there, of the closed form, in float64."""
    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(objective))(X))


def compiled(problem, estimator, solver):
    """Of one programme; an eager call compiles one per operation."""
    return jax.jit(value_and_hypergradient(problem, estimator, solver))


LINEAR = {
    "CG": linear.CG(tol=1e-12),
    "CG, fixed length past convergence": linear.CG(tol=None, max_steps=30),
    "CG, Jacobi": linear.CG(tol=1e-12, preconditioner=linear.Jacobi()),
    "CG, Nystrom": linear.CG(tol=1e-12, preconditioner=linear.NystromPreconditioner(rank=3)),
    "CG, stale Cholesky": linear.CG(tol=1e-12, preconditioner=linear.StaleCholesky()),
    "MINRES": linear.MINRES(tol=1e-12),
    "GMRES": linear.GMRES(tol=1e-12),
    "BiCGStab": linear.BiCGStab(tol=1e-12),
    "normal CG": linear.NormalCG(tol=1e-12, max_steps=200),
    "Neumann": linear.Neumann(step_size=0.4, steps=600),
    "Richardson": linear.Richardson(step_size=0.4, steps=600),
    "dense": linear.Dense(),
}


# The linear solvers themselves have their own file: here one of each kind is quick.
LATER = ("CG, fixed length past convergence", "CG, Jacobi", "normal CG", "BiCGStab", "Richardson")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name for name in LINEAR]
)
def test_implicit_equals_the_closed_form_with_every_linear_solver(name, x64):
    estimate = compiled(PROBLEM, Implicit(LINEAR[name]), lower.LBFGS(200, tol=1e-12))(X, Y)
    value, gradient = exact()
    assert relative(estimate.gradient, gradient) < 1e-9
    np.testing.assert_allclose(estimate.value, value, rtol=1e-10)
    assert float(estimate.metrics["lower_residual"]) < 1e-11


def test_identity_is_the_known_biased_answer(x64):
    scale = 0.7
    estimate = compiled(PROBLEM, Implicit(linear.Identity(scale)), lower.LBFGS(200, tol=1e-12))(X, Y)
    y = solution(X)
    b = VALIDATION[0].T @ (VALIDATION[0] @ y - VALIDATION[1]) / N
    expected = 0.02 * X - scale * jnp.exp(X) * y * b  # f_xy v = exp(x) y v, componentwise
    assert relative(estimate.gradient, expected) < 1e-10


def test_nystrom_with_all_columns_is_exact_for_the_damped_system(x64):
    rho = 1e-3
    estimate = compiled(PROBLEM, Implicit(linear.Nystrom(rank=D, rho=rho)), lower.LBFGS(200, tol=1e-12))(X, Y)
    y = solution(X)
    b = VALIDATION[0].T @ (VALIDATION[0] @ y - VALIDATION[1]) / N
    expected = 0.02 * X - jnp.exp(X) * y * jnp.linalg.solve(hessian(X) + rho * jnp.eye(D), b)
    assert relative(estimate.gradient, expected) < 1e-8


@pytest.mark.parametrize(
    "estimator", [Unrolled(), Unrolled(checkpoint=False), Unrolled(mode="forward"), Unrolled(last=120)], ids=repr
)
def test_unrolled_converges_to_the_closed_form(estimator, x64):
    estimate = compiled(PROBLEM, estimator, lower.GradientDescent(ETA, 400))(X, Y)
    assert relative(estimate.gradient, exact()[1]) < 1e-9


def test_unrolled_converges_to_implicit_at_the_rate_of_the_contraction(x64):
    errors = [
        relative(compiled(PROBLEM, Unrolled(), lower.GradientDescent(ETA, t))(X, Y).gradient, exact()[1])
        for t in (20, 40, 80)
    ]
    rho = float(1 - ETA * np.linalg.eigvalsh(hessian(X))[0])
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] / errors[1] < 3 * rho**40  # T rho^T, with a factor for T


def test_truncation_bias_falls_with_the_steps_kept(x64):
    errors = [
        relative(compiled(PROBLEM, Unrolled(last=k), lower.GradientDescent(ETA, 400))(X, Y).gradient, exact()[1])
        for k in (10, 20, 40)
    ]
    rho = float(1 - ETA * np.linalg.eigvalsh(hessian(X))[0])
    assert errors[1] < 1.05 * rho**10 * errors[0] * 1.5
    assert errors[2] < 1.05 * rho**20 * errors[1] * 1.5


@pytest.mark.parametrize(
    "optimizer",
    [
        ETA,
        pytest.param(optax.sgd(0.1, momentum=0.9), marks=pytest.mark.slow),
        optax.adam(0.05, eps_root=1e-8),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_all_ways_of_unrolling_agree_and_equal_finite_differences(optimizer, x64):
    solver = lower.GradientDescent(optimizer, 7)
    gradients = [
        compiled(PROBLEM, e, solver)(X, Y).gradient
        for e in (Unrolled(), Unrolled(checkpoint=False), Unrolled(mode="forward"), Unrolled(last=7))
    ]
    for other in gradients[1:]:
        assert relative(other, gradients[0]) < 1e-10
    direction, h = np.linspace(-1, 1, D), 1e-5
    value = jax.jit(lambda x: value_and_hypergradient(PROBLEM, Unrolled(checkpoint=False), solver)(x, Y).value)
    slope = (value(X + h * direction) - value(X - h * direction)) / (2 * h)
    np.testing.assert_allclose(gradients[0] @ direction, slope, rtol=1e-7)


def test_one_step_and_jacobian_free_are_the_known_biased_answers(x64):
    y = solution(X)
    b = VALIDATION[0].T @ (VALIDATION[0] @ y - VALIDATION[1]) / N
    expected = 0.02 * X - ETA * jnp.exp(X) * y * b
    solver = lower.GradientDescent(ETA, 400)
    assert relative(compiled(PROBLEM, OneStep(), solver)(X, Y).gradient, expected) < 1e-10
    assert relative(compiled(PROBLEM, JacobianFree(ETA), solver)(X, Y).gradient, expected) < 1e-10


def test_one_newton_step_makes_one_step_differentiation_exact(x64):
    """For a superlinear solver the last step alone carries the whole derivative."""

    def newton(level, x, y):
        gradient, h = jax.grad(lambda w: level(x, {"w": w}))(y["w"]), jax.hessian(lambda w: level(x, {"w": w}))(y["w"])
        return {"w": y["w"] - jnp.linalg.solve(h, gradient)}

    estimate = compiled(PROBLEM, Unrolled(checkpoint=False), newton)(X, {"w": np.asarray(solution(X))})
    assert relative(estimate.gradient, exact()[1]) < 1e-10


@pytest.mark.parametrize("radius", [1e-2, 1e-3])
def test_finite_difference_is_the_virtual_step_gradient(radius, x64):
    y = {"w": np.linspace(-1, 1, D)}
    xi = 0.3

    def virtual(x):
        moved = {"w": y["w"] - xi * jax.grad(ridge_lower, 1)(x, y, TRAIN)["w"]}
        return ridge_upper(x, moved, VALIDATION)

    estimate = compiled(PROBLEM, FiniteDifference(xi, radius), 0.1)(X, y)
    # f_x = exp(x) y^2 / 2 is quadratic in y: the central difference is exact up to rounding.
    assert relative(estimate.gradient, jax.jit(jax.grad(virtual))(X)) < 1e-9


@pytest.mark.parametrize("estimator", [PZOBO(3000, 1e-5), HOZOG(3000, 1e-5)], ids=["PZOBO", "HOZOG"])
def test_zeroth_order_has_the_monte_carlo_error_of_its_directions(estimator, x64):
    solver = lower.GradientDescent(ETA, 200)
    gradient = exact()[1]
    f = jax.jit(lambda key, carry: value_and_hypergradient(PROBLEM, estimator, solver)(X, Y, carry, key).gradient)
    errors = np.array([relative(f(jax.random.key(s), np.uint32(0)), gradient) for s in range(8)])
    # u u'g with u normal: E|error|^2 = (D + 1) |g|^2 / Q, with g the part that is estimated: PZOBO knows F_x = 0.02 x.
    estimated = gradient - 0.02 * X if isinstance(estimator, PZOBO) else gradient
    expected = np.sqrt((D + 1) / 3000) * float(np.linalg.norm(estimated) / np.linalg.norm(gradient))
    assert 0.5 * expected < np.sqrt(np.mean(errors**2)) < 1.6 * expected
    assert (
        relative(f(jax.random.key(0), np.uint32(0)), f(jax.random.key(0), np.uint32(1))) > 0.3 * expected
    )  # fresh directions


def test_carry_warm_starts_the_linear_system(x64):
    f = compiled(PROBLEM, Implicit(linear.CG(tol=1e-8)), lower.LBFGS(200, tol=1e-12))
    first = f(X, Y)
    again = f(X, first.lower.y, first.carry)
    assert int(first.metrics["linear_iterations"]) >= D - 1
    assert int(again.metrics["linear_iterations"]) == 0
    assert relative(again.gradient, first.gradient) < 1e-7


def test_projected_lower_level_box(x64):
    """y*(x) = clip(x, -1, 1): the derivative is 0 where the box binds and 1 elsewhere."""
    problem = Problem(
        upper=lambda x, y: jnp.sum((y - 2.0) ** 2) + jnp.sum(x**2),
        lower=lambda x, y: jnp.sum((y - x) ** 2),
        project_lower=lambda y: jnp.clip(y, -1, 1),
    )
    x = np.array([-3.0, -0.5, 0.3, 2.0])
    estimate = compiled(problem, Implicit(step=0.3), lower.GradientDescent(0.3, 100, tol=1e-13))(x, np.zeros(4))
    y = np.clip(x, -1, 1)
    expected = 2 * x + 2 * (y - 2) * (np.abs(x) < 1)
    np.testing.assert_allclose(estimate.gradient, expected, atol=1e-10)


def test_proximal_lower_level_lasso(x64):
    """y* = soft(x_0, exp(x_1)): dy/dx_0 = 1 and dy/dx_1 = -exp(x_1) sign(x_0) where active."""
    problem = Problem(
        upper=lambda x, y: jnp.sum(y**2),
        lower=lambda x, y: jnp.sum((y - x["c"]) ** 2) / 2,
        prox_lower=lambda x, y, scaling: jnp.sign(y) * jnp.maximum(jnp.abs(y) - scaling * jnp.exp(x["l"]), 0),
    )
    x = {"c": np.array([2.0, -1.5, 0.1]), "l": np.asarray(-0.5)}
    estimate = compiled(problem, Implicit(step=0.5), lower.GradientDescent(0.5, 200, tol=1e-13))(x, np.zeros(3))
    t = np.exp(-0.5)
    y = np.sign(x["c"]) * np.maximum(np.abs(x["c"]) - t, 0)
    np.testing.assert_allclose(estimate.lower.y, y, atol=1e-12)
    np.testing.assert_allclose(estimate.gradient["c"], 2 * y, atol=1e-10)
    np.testing.assert_allclose(estimate.gradient["l"], np.sum(-2 * y * t * np.sign(y)), atol=1e-10)


@pytest.mark.parametrize(
    "solver", [linear.CG(), linear.MINRES(), linear.Dense(), linear.Nystrom(rank=1)], ids=lambda s: type(s).__name__
)
def test_symmetric_solvers_with_a_projection_are_refused(solver, x64):
    problem = Problem(
        upper=lambda x, y: jnp.sum(y**2), lower=lambda x, y: jnp.sum((y - x) ** 2), project_lower=lambda y: y
    )
    with pytest.raises(
        ValueError, match=rf"{type(solver).__name__}\(\.\.\.\)\) assumes a symmetric system.*take linear\.GMRES"
    ):
        value_and_hypergradient(problem, Implicit(solver), 0.1)(np.ones(2), np.zeros(2))


def test_refusals_name_the_cure():
    with pytest.raises(ValueError, match=r"set its tol=None"):
        value_and_hypergradient(PROBLEM, Unrolled(), lower.LBFGS())(X, Y)
    with pytest.raises(ValueError, match=r"differentiates 5 steps but the lower solver takes 3: raise steps"):
        value_and_hypergradient(PROBLEM, Unrolled(last=5), lower.GradientDescent(0.1, 3))(X, Y)
    with pytest.raises(ValueError, match=r"needs one made of steps"):
        value_and_hypergradient(PROBLEM, Unrolled(last=5), lambda level, x, y: y)(X, Y)
    with pytest.raises(ValueError, match=r"'reverse' or 'forward'"):
        Unrolled(mode="backward")
    with pytest.raises(ValueError, match=r"a step size is positive"):
        lower.GradientDescent(-0.1)
    with pytest.raises(TypeError, match=r"give a step size or an optax GradientTransformation"):
        lower.GradientDescent("adam")
    with pytest.raises(TypeError, match=r"A lower solver is"):
        lower.as_lower_solver("newton")


shapes = st.lists(st.sampled_from([(), (1,), (2,), (3, 2), (2, 1, 2)]), min_size=1, max_size=3)


@settings(max_examples=6, deadline=None)
@given(x_shapes=shapes, y_shapes=shapes, seed=st.integers(0, 1000))
def test_random_pytree_problems_against_central_differences(x_shapes, y_shapes, seed):
    """f(x, y) = |y - M x|^2 / 2 + sum log cosh(y): strongly convex, with y*(x) nonlinear in x."""
    with float64():
        rng = np.random.default_rng(seed)
        x = {f"x{i}": rng.normal(size=s) for i, s in enumerate(x_shapes)}
        y = [rng.normal(size=s) for s in y_shapes]
        nx, ny = sum(v.size for v in x.values()), sum(v.size for v in y)
        m, c = rng.normal(size=(ny, nx)) / np.sqrt(nx), rng.normal(size=ny)
        flat = lambda tree: jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(tree)])
        problem = Problem(
            upper=lambda x, y: jnp.sum(jnp.sin(flat(y)) * c) + jnp.sum(flat(x) ** 2) / 10,
            lower=lambda x, y: jnp.sum((flat(y) - m @ flat(x)) ** 2) / 2 + jnp.sum(jnp.log(jnp.cosh(flat(y)))),
        )
        f = jax.jit(
            value_and_hypergradient(problem, Implicit(linear.CG(tol=1e-13)), lower.GradientDescent(0.3, 300, tol=1e-13))
        )
        estimate = f(x, y)
        direction = jax.tree.map(lambda v: rng.normal(size=v.shape), x)
        h = 1e-4
        move = lambda s: jax.tree.map(lambda v, d: v + s * d, x, direction)
        slope = (f(move(h), y).value - f(move(-h), y).value) / (2 * h)
        np.testing.assert_allclose(optax.tree.vdot(estimate.gradient, direction), slope, rtol=1e-6, atol=1e-7)
        assert jax.tree.structure(estimate.gradient) == jax.tree.structure(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
    problem = Problem(
        upper=lambda x, y: jnp.sum(y**2), lower=lambda x, y: jnp.sum((y - x) ** 2 * jnp.array([1, 2], x.dtype))
    )
    x, y, solver = jnp.ones(2, dtype), jnp.zeros(2, dtype), lower.GradientDescent(0.1, 3)
    estimators = Implicit(), Unrolled(), JacobianFree(), FiniteDifference(), PZOBO(2), HOZOG(2)
    all_of_them = jax.jit(lambda x, y: [value_and_hypergradient(problem, e, solver)(x, y) for e in estimators])
    for estimator, estimate in zip(estimators, all_of_them(x, y), strict=True):
        assert estimate.gradient.dtype == dtype, estimator
        assert estimate.lower.y.dtype == dtype, estimator


def test_libraries_underneath(x64):
    """jaxopt and optimistix as lower solvers give the closed form too."""
    import warnings

    optimistix = pytest.importorskip("optimistix")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt

        solvers = [
            lower.jaxopt(jaxopt.LBFGS, maxiter=200, tol=1e-12),
            lower.optimistix(optimistix.BFGS(1e-12, 1e-12), max_steps=300),
        ]
        for solver in solvers:
            estimate = compiled(PROBLEM, Implicit(linear.CG(tol=1e-12)), solver)(X, Y)
            assert relative(estimate.gradient, exact()[1]) < 1e-7


def test_three_levels(x64):
    """z*(x, y) = x y inside y*(x) = argmin (y - 1)^2 + (z - 2)^2 = (1 + 2x) / (1 + x^2): an argmin in a lower loss."""
    from bilevel.implicit import argmin

    innermost = argmin(lambda xy, z: (z - xy[0] * xy[1]) ** 2, lambda f, xy, z: xy[0] * xy[1] + 0.0 * z)
    problem = Problem(
        upper=lambda x, y: (y - 1.5) ** 2 + 0.1 * x**2,
        lower=lambda x, y: (y - 1) ** 2 + (innermost((x, y), jnp.zeros(())) - 2) ** 2,
    )
    f = lambda x: (1 + 2 * x) / (1 + x**2)
    x = np.asarray(0.4)
    estimate = compiled(problem, Implicit(linear.CG(tol=1e-12)), lower.GradientDescent(0.3, 100))(x, np.zeros(()))
    np.testing.assert_allclose(estimate.lower.y, f(x), rtol=1e-10)
    np.testing.assert_allclose(estimate.gradient, jax.grad(lambda x: (f(x) - 1.5) ** 2 + 0.1 * x**2)(x), rtol=1e-8)


COUPLED = Problem(
    lambda x, y: jnp.sum((y - 1) ** 2), lambda x, y: jnp.sum((y - x) ** 2), constraint=lambda x, y: y - 0.5
)
TIED = dataclasses.replace(COUPLED, constraint=None, equality=lambda x, y: jnp.sum(y) - 1)


@pytest.mark.parametrize(("problem", "estimator", "wanted"), [
    (COUPLED, hypergradients.ActiveSet(), [0.0, -1.6]),
    (TIED, hypergradients.NullSpace(), [0.8, -0.8]),
])  # fmt: skip
def test_the_advice_for_constraints_is_complete(problem, estimator, wanted):
    """What the refusal says to take works as it stands, and with the lower solver that it names."""
    x, y = jnp.asarray([1.0, 0.2]), jnp.zeros(2)
    said = r"take hypergradients\.ActiveSet\(\) .*NullSpace\(\) .*with lower\.Accurate\(\) as the lower solver"
    with pytest.raises(ProblemError, match=said):
        value_and_hypergradient(problem)(x, y)
    for solver in (None, lower.Accurate(), *([lower.EqualityDescent()] if problem is TIED else [])):
        f = value_and_hypergradient(problem, estimator, solver)
        estimate = f(x, y)
        np.testing.assert_allclose(estimate.gradient, wanted, atol=1e-4)
        np.testing.assert_allclose(f(x, estimate.lower, estimate.carry).gradient, wanted, atol=1e-4)
        assert estimate.metrics["violation"] < 1e-4


@pytest.mark.parametrize("solver", [
    optax.adam(0.1), 0.1, lower.LBFGS(), lower.Relative(lower.LBFGS()), lower.GradientDescent(0.1),
], ids=["adam", "step", "LBFGS", "Relative", "GradientDescent"])  # fmt: skip
def test_a_lower_solver_that_would_ignore_the_constraints_is_refused_by_name(solver):
    x, y = jnp.asarray([1.0, 0.2]), jnp.zeros(2)
    with pytest.raises(ProblemError, match=r"ActiveSet needs .* finds the 2 multipliers .* take lower\.Accurate\(\)"):
        value_and_hypergradient(COUPLED, hypergradients.ActiveSet(), solver)(x, y)
    with pytest.raises(ProblemError, match=r"NullSpace needs .* stays on the equality, and .* lower\.Accurate\(\)"):
        value_and_hypergradient(TIED, hypergradients.NullSpace(), solver)(x, y)


def test_a_function_finds_no_multipliers_for_active_sets():
    """It returned the zeros that it was given, and the gradient was that without the constraints."""
    x, y = jnp.asarray([1.0, 0.2]), jnp.zeros(2)
    with pytest.raises(ProblemError, match=r"finds the 2 multipliers .* and Function does not"):
        value_and_hypergradient(COUPLED, hypergradients.ActiveSet(), lambda level, x, y: jnp.minimum(x, 0.5))(x, y)


def test_active_sets_of_a_level_without_constraints_take_any_lower_solver():
    free = dataclasses.replace(COUPLED, constraint=None)
    x, y = jnp.asarray([1.0, 0.2]), jnp.zeros(2)
    for solver in (None, optax.adam(0.1), lower.LBFGS()):
        f = value_and_hypergradient(free, hypergradients.ActiveSet(), solver)
        estimate = f(x, f(x, y).lower)
        np.testing.assert_allclose(estimate.gradient, 2 * (estimate.lower.y - 1), atol=1e-4)
