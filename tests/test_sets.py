"""Feasible sets: projections held to their variational inequality and to differences, bounds, rows, errors by name."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, sets, solve, solvers

RANDOM = np.random.default_rng(3)
A = RANDOM.normal(size=(2, 5))
INSIDE = RANDOM.normal(size=5) / 3
G = RANDOM.normal(size=(7, 5))
H = G @ INSIDE + np.array([0.3, 0.1, 0.5, 0.2, 0.05, 0.4, 0.6])
SLOPE = np.array([1.0, -2.0, 0.0, 0.5, 3.0])
CONVEX = {
    "box": sets.Box(np.array([-1.0, -0.2, -np.inf, 0.1, -3]), np.array([0.5, np.inf, 0.3, 0.1, 1])),
    "non-negative": sets.NonNegative(),
    "simplex": sets.Simplex(1.5),
    "ball 1": sets.Ball(0.8, 1, INSIDE),
    "ball 2": sets.Ball(0.8, 2, INSIDE),
    "ball inf": sets.Ball(0.8, np.inf, INSIDE),
    "hyperplane": sets.Hyperplane(SLOPE, 0.7),
    "half-space": sets.Halfspace(SLOPE, -0.7),
    "affine": sets.Affine(A, A @ INSIDE),
    "redundant affine": sets.Affine(np.vstack([A, A[0] + A[1]]), np.append(A @ INSIDE, (A @ INSIDE).sum())),
    "polyhedron": sets.Polyhedron(A[:1], A[:1] @ INSIDE, G, H),
    "section": sets.BoxSection(np.array([-1.0, -1, -1, -np.inf, 0]), np.array([1, np.inf, 1, 2.0, 0]), SLOPE, 0.4),
    "intersection": sets.Intersection((sets.Box(-0.4, 0.4), sets.Halfspace(np.ones(5), 0.5)), steps=300),
}
OTHER = {
    "sparse simplex": sets.SparseSimplex(2, 1.5),
    "sphere 1": sets.Sphere(0.8, 1, INSIDE),
    "sphere 2": sets.Sphere(0.8, 2, INSIDE),
}
ALL = CONVEX | OTHER
each = pytest.mark.parametrize("name", ALL)
# But for the polyhedron, whose quadratic programme takes seconds to compile; its slopes are tested by `each`.
each_quick = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "polyhedron")) for name in ALL]
)
POINTS = RANDOM.normal(size=(12, 5)) * 2
# Compiled once for each kind of set: a set is a pytree.
PROJECT = jax.jit(lambda one, z: one(z))
PROJECT_ALL = jax.jit(lambda one, z: jax.vmap(one)(z))
BOTH_MODES = jax.jit(lambda one, z: (jax.jacfwd(one)(z), jax.jacrev(one)(z)))
CONTAINS = jax.jit(lambda one, z, tol: one.contains(z, tol))
CONTAINS_ALL = jax.jit(lambda one, z, tol: jax.vmap(lambda z: one.contains(z, tol))(z))


@jax.jit
def BY_NUMBERS(one, z, direction, weights):
    """How the projection moves along a direction of the set's numbers, and its pull-back to them."""
    numbers, structure = jax.tree.flatten(one)
    f = lambda numbers: structure.unflatten(numbers)(z)
    return jax.jvp(f, (numbers,), (direction,))[1], jax.vjp(f, numbers)[1](weights)[0]


def differences(f, at, eps=1e-6):
    """By central differences, the steps in NumPy: JAX would compile each of their operations."""
    flat = np.ravel(at)
    columns = []
    for step in eps * np.eye(flat.size):
        ahead, behind = (np.asarray(f((flat + by).reshape(np.shape(at)))) for by in (step, -step))
        columns.append((ahead - behind) / (2 * eps))
    return np.stack(columns, -1)


@pytest.mark.parametrize("name", CONVEX)
def test_a_projection_is_the_point_that_the_variational_inequality_singles_out(x64, name):
    """<z - P z, v - P z> <= 0 for v in the set, P z in it, and P P z = P z."""
    one = CONVEX[name]
    p = np.asarray(PROJECT_ALL(one, POINTS))
    assert np.all(CONTAINS_ALL(one, p, 1e-7))
    others = np.asarray(PROJECT_ALL(one, RANDOM.normal(size=(12, 5))))
    products = np.einsum("id,ijd->ij", POINTS - p, others[None] - p[:, None])
    assert products.max() < 1e-7
    np.testing.assert_allclose(PROJECT_ALL(one, p), p, atol=1e-7)
    np.testing.assert_allclose(one(jnp.asarray(POINTS[0])), p[0], atol=1e-9)


@each
def test_both_modes_by_the_point_and_by_the_sets_numbers_equal_differences(x64, name):
    one, z = ALL[name], POINTS[1]
    expected = differences(lambda z: PROJECT(one, z), z)
    for jacobian in BOTH_MODES(one, z):
        np.testing.assert_allclose(jacobian, expected, atol=1e-5)
    if name in (
        "redundant affine",
        "box",
        "section",
    ):  # its numbers can't all move: rows that agree, bounds that are equal
        return
    numbers, structure = jax.tree.flatten(one)
    flat = np.concatenate([np.ravel(leaf) for leaf in numbers])
    finite = np.isfinite(flat)

    def back(flat):
        parts = np.split(flat, np.cumsum([np.size(leaf) for leaf in numbers])[:-1])
        return [
            float(part[0]) if isinstance(leaf, float) else part.reshape(np.shape(leaf))
            for part, leaf in zip(parts, numbers, strict=True)
        ]

    of_numbers = lambda v: PROJECT(structure.unflatten(back(np.where(finite, v, flat))), z)
    with np.errstate(invalid="ignore"):  # inf - inf, of bounds that do not move
        expected = np.where(finite, differences(of_numbers, flat), 0)
    direction, weights = RANDOM.normal(size=flat.shape) * finite, RANDOM.normal(size=5)
    along, back_to = BY_NUMBERS(one, z, back(direction), weights)
    np.testing.assert_allclose(along, expected @ direction, atol=1e-5)
    back_to = np.concatenate([np.ravel(leaf) for leaf in back_to])
    np.testing.assert_allclose(np.where(finite, back_to, 0), weights @ expected, atol=1e-5)


@each_quick
def test_second_derivatives_exist_in_every_nesting(x64, name):
    one, z = ALL[name], POINTS[1]
    if name == "intersection":
        return  # the rounds of Dykstra's alternation: the derivative above is enough to compile
    f = lambda z: jnp.sum(jnp.sin(one(z)))
    hessian = np.asarray(jax.jit(jax.jacfwd(jax.grad(f)))(z))
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-8)
    gradient = jax.jit(jax.grad(f))
    np.testing.assert_allclose(hessian, differences(gradient, z, 1e-5), atol=1e-5)


@each_quick
def test_nothing_is_nan_at_corners_zeros_and_repeated_values(x64, name):
    one = ALL[name]
    corner = PROJECT(one, POINTS[0])
    for z in (corner, np.zeros(5), np.ones(5), INSIDE, 1e9 * np.ones(5)):
        assert np.all(np.isfinite(BOTH_MODES(one, z)))
        assert bool(CONTAINS(one, PROJECT(one, z), 1e-6))


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_points_dtype_is_kept_and_single_precision_suffices(x64, name, dtype):
    one, z = ALL[name], POINTS[2].astype(jnp.dtype(dtype))
    p = PROJECT(one, z)
    assert p.dtype == z.dtype
    described = jax.eval_shape(lambda z: (one.equality(z), one.inequality(z), *one.bounds(z)), z)
    assert [part.dtype for part in described] == [jnp.float32, jnp.float32, z.dtype, z.dtype]
    exact = PROJECT(one, z.astype(np.float64))
    np.testing.assert_allclose(np.asarray(p, np.float64), exact, atol=2e-5 if dtype == "float32" else 2e-2)


@each
def test_bounds_and_rows_describe_the_set(x64, name):
    """A point is in a smooth set exactly where bounds and rows hold: projections are, and points outside are not."""
    one = ALL[name]
    p = np.asarray(PROJECT_ALL(one, POINTS))

    def violation(z):
        lower, upper = one.bounds(z)
        parts = (lower - z, z - upper, one.inequality(z), jnp.abs(one.equality(z)))
        return jnp.max(jnp.concatenate([*parts, jnp.zeros(1)]))

    violations = jax.jit(jax.vmap(lambda z: (violation(z), jax.jacrev(one.inequality)(z))))
    assert np.max(violations(p)[0]) < 1e-7
    before, slopes = violations(POINTS)
    if one.smooth_for(POINTS[0]):
        outside = np.max(np.abs(POINTS - p), axis=1) > 1e-6
        assert np.all((np.asarray(before) > 1e-7) == outside)
        assert not np.any(np.asarray(CONTAINS_ALL(one, POINTS, 1e-9)) & outside)
    else:
        assert name in ("sparse simplex", "sphere 1")
    assert np.all(np.isfinite(slopes))


def test_the_ball_of_norm_one_has_rows_for_few_unknowns_alone():
    ball = sets.Ball(1.0, 1)
    assert ball.inequality(jnp.ones(3)).shape == (8,) and ball.smooth_for(jnp.ones(3))
    assert ball.inequality(jnp.ones(9)).shape == (0,) and not ball.smooth_for(jnp.ones(9))
    assert not ball.smooth and sets.Ball(1.0, 1, np.zeros(3)).smooth


def test_closed_forms(x64):
    np.testing.assert_allclose(PROJECT(sets.Simplex(), np.array([0.5, 0.5, 2.0])), [0, 0, 1])
    np.testing.assert_allclose(PROJECT(sets.Simplex(3.0), np.array([2.0, 2.0, 2.0])), [1, 1, 1])
    np.testing.assert_allclose(PROJECT(sets.SparseSimplex(1), np.array([0.5, 0.7, 0.1])), [0, 1, 0])
    np.testing.assert_allclose(PROJECT(sets.Ball(5.0), np.array([6.0, 8.0])), [3, 4])
    np.testing.assert_allclose(PROJECT(sets.Ball(1.0), 1e200 * np.array([3.0, 4.0])), [0.6, 0.8])
    np.testing.assert_allclose(PROJECT(sets.Ball(1.0, 1), np.array([2.0, -1.5, 0.1])), [0.75, -0.25, 0])
    np.testing.assert_allclose(PROJECT(sets.Sphere(5.0), np.zeros(2)), 5 / np.sqrt(2) * np.ones(2))
    one = sets.BoxSection(0.0, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(PROJECT(one, np.array([0.5, 0.5, 2.0])), [0, 0, 1], atol=1e-12)
    with_weights = sets.BoxSection(-np.inf, np.inf, np.array([1.0, 2.0]), 5.0)
    np.testing.assert_allclose(PROJECT(with_weights, np.zeros(2)), [1, 2])


def test_simplices_along_an_axis():
    z = {"a": np.array([[0.5, 0.5, 2], [1, 1, 1]], np.float32), "b": np.array([3, 0], np.float32)}
    p = PROJECT(sets.Simplex(axis=-1), z)
    np.testing.assert_allclose(p["a"], [[0, 0, 1], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(p["b"], [1, 0])
    assert jax.eval_shape(sets.Simplex(axis=-1).equality, z).shape == (3,)
    np.testing.assert_allclose(np.sum(PROJECT(sets.Simplex(axis=0), z["a"]), 0), 1, rtol=1e-6)
    with pytest.raises(ValueError, match=r"Simplex\(axis=1\) was given a leaf of shape \(2,\)"):
        jax.eval_shape(sets.Simplex(axis=1), z)


@pytest.mark.parametrize("shape", [pytest.param((3, 3), marks=pytest.mark.slow), (2, 5)])
def test_transport_is_the_quadratic_programme(x64, shape):
    rows, columns = RANDOM.uniform(0.1, 1, shape[0]), RANDOM.uniform(0.1, 1, shape[1])
    columns *= rows.sum() / columns.sum()
    one = sets.Transport(rows, columns)
    scores = RANDOM.normal(size=shape) * 3
    m, n = shape
    sums = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    slow = sets.Polyhedron(sums, np.concatenate([rows, columns]), -np.eye(m * n), np.zeros(m * n))
    project = lambda scores: np.asarray(PROJECT(one, scores))
    np.testing.assert_allclose(project(scores).ravel(), PROJECT(slow, scores.ravel()), atol=1e-9)
    expected = differences(lambda s: project(s).ravel(), scores)
    for jacobian in BOTH_MODES(one, scores):
        np.testing.assert_allclose(jacobian.reshape(expected.shape), expected, atol=1e-6)
    assert bool(CONTAINS(one, project(scores), 1e-9)) and one.equality(scores).shape == (m + n - 1,)
    np.testing.assert_allclose(project(1e4 * scores).sum(1), rows, rtol=1e-8)
    single = project(scores.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, project(scores), atol=1e-5)


def test_kullback_leibler_projection_on_the_birkhoff_polytope(x64):
    scores = RANDOM.normal(size=(4, 4)) * 2
    project = jax.jit(sets.Birkhoff(4).kl)
    plan = np.asarray(project(scores))
    np.testing.assert_allclose(plan.sum(0), 1, rtol=1e-10)
    np.testing.assert_allclose(plan.sum(1), 1, rtol=1e-10)
    left = np.log(plan) - scores  # u 1^T + 1 v^T: its mixed differences vanish
    np.testing.assert_allclose(left[1:, 1:] - left[:1, 1:] - left[1:, :1] + left[:1, :1], 0, atol=1e-9)
    weights = np.arange(16.0).reshape(4, 4)
    f = lambda s: jnp.sum(jnp.cos(project(s)) * weights)
    value = lambda s: np.sum(np.cos(project(s)) * weights)
    gradient, hessian = jax.jit(jax.grad(f)), jax.jit(jax.hessian(f))
    np.testing.assert_allclose(gradient(scores).ravel(), differences(value, scores), atol=1e-6)
    np.testing.assert_allclose(
        hessian(scores).reshape(16, 16), differences(lambda s: np.ravel(gradient(s)), scores, 1e-5), atol=1e-5
    )


def test_products_go_part_by_part_and_leave_free_parts_alone():
    array = lambda *numbers: np.array(numbers, np.float32)
    z = {"w": array(2, -1), "b": np.float32(7), "pair": (array(3), array(4))}
    one = sets.Product({"w": sets.Box(0, 1), "b": None, "pair": sets.Ball(1.0)})
    p, (lower, upper), rows = jax.jit(lambda z: (one(z), one.bounds(z), one.inequality(z)))(z)
    np.testing.assert_allclose(p["w"], [1, 0])
    assert p["b"] == 7
    np.testing.assert_allclose(np.concatenate(p["pair"]), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(lower["w"], 0)
    assert upper["b"] == np.inf and rows.shape == (1,) and one.smooth
    assert bool(CONTAINS(one, p, 1e-6)) and not bool(CONTAINS(one, z, 1e-6))
    assert not sets.Product({"w": lambda w: w, "b": None, "pair": None}).smooth
    with pytest.raises(ValueError, match=r"Product's sets are .* and the variable is .*None for a part that is free"):
        one({"w": z["w"]})


def test_trees_of_bounds_are_spread_over_the_variable():
    z = {"w": jnp.ones((2, 2)), "b": (jnp.ones(3), jnp.ones(()))}
    p = sets.Box({"w": np.zeros(2), "b": None}, {"w": 0.5, "b": 0.25})(z)
    np.testing.assert_array_equal(p["w"], 0.5)
    np.testing.assert_array_equal(p["b"][0], 0.25)
    np.testing.assert_array_equal(sets.Box([0, 0], [1, 0.5])(jnp.ones(2)), [1, 0.5])


def test_contains_is_relative():
    array = lambda *numbers: np.array(numbers, np.float32)
    contains = jax.jit(lambda one, z: one.contains(z))
    box = sets.Box(np.array([0.0, 0.0]), np.array([1e-8, 1e8]))
    assert not box.contains(array(2e-8, 1.0)) and box.contains(array(1e-8, 1e8 + 1))
    for unit in (1e-8, 1.0, 1e8):
        assert contains(sets.Halfspace(np.ones(2), unit), array(0.5, 0.5) * np.float32(unit * (1 + 1e-7)))
        assert not contains(sets.Halfspace(np.ones(2), unit), array(0.5, 0.5) * np.float32(unit * 1.001))
        assert not contains(sets.NonNegative(), array(-1e-3 * unit, unit))
    assert not sets.NonNegative().contains(array(-1e-9)) and sets.NonNegative().contains(array(-1e-9), unit=1)


def test_a_nan_is_in_no_set(x64):
    for one in ALL.values():
        assert not CONTAINS(one, np.full(5, np.nan), 1e-6)


def test_nan_is_not_hidden(x64):
    for one in ALL.values():
        assert np.isnan(PROJECT(one, np.full(5, np.nan))).any()
    assert np.isnan(CONVEX["polyhedron"](jnp.full(5, np.nan))).all()


def test_sets_are_equal_and_hashed_by_value_so_that_programs_are_shared():
    first, second = sets.Box(np.zeros(2), 1), sets.Box(np.zeros(2), 1.0)
    assert first == second and hash(first) == hash(second) and first != sets.Box(np.ones(2), 1)
    assert sets.Simplex() != sets.Box(0, 1)
    traces = []

    @jax.jit
    def run(problem, z):
        traces.append(1)
        return problem.project_upper(z)

    loss = lambda x, y: 0.0
    make = lambda one: Problem(loss, loss, project_upper=one)
    run(make(first), jnp.ones(2)), run(make(second), jnp.ones(2))
    assert len(traces) == 1
    batched = jax.vmap(lambda s, z: s(z), in_axes=(0, None))(sets.Box(jnp.zeros(3), jnp.arange(3.0)), jnp.array(5.0))
    np.testing.assert_array_equal(batched, [0, 1, 2])
    assert dataclasses.replace(first, upper=2.0).upper == 2.0


def test_a_set_is_a_problems_projection(x64):
    problem = Problem(
        lambda x, y: jnp.sum((y - 2) ** 2),
        lambda x, y: jnp.sum((y - x) ** 2),
        project_upper=sets.Simplex(np.float64(1)),
    )
    solution = solve(
        problem, jnp.array([0.5, 0.5, 0.0]), jnp.zeros(3), solvers.AID(0.5, 0.1), steps=300, progress=False
    )
    np.testing.assert_allclose(solution.x, 1 / 3, atol=1e-6)


BAD = [
    (lambda: sets.Box(1, 0), r"Box: lower is above upper \(1 > 0\): the box is empty"),
    (lambda: sets.Box(np.array([0, 2.0]), 1.0), r"lower is above upper \(2 > 1 at entry \[1\]\)"),
    (lambda: sets.Box(np.nan, 1), r"Box\(lower=...\) holds a NaN"),
    (lambda: sets.Box("a", 1), r"Box\(lower=...\) holds a str"),
    (lambda: sets.Box(np.inf, np.inf), "leaves no finite point"),
    (lambda: sets.Box(np.zeros(2), 1)(jnp.ones(3)), r"Box's lower has the shape \(2,\) where the variable has \(3,\)"),
    (lambda: sets.Box({"a": 0}, 1)({"b": jnp.ones(2)}), "Box's lower is .* give a number, or a tree like the variable"),
    (lambda: sets.Simplex(-1), r"Simplex\(total=-1.0\): a finite number of at least 0"),
    (lambda: sets.Ball(-1.0), r"Ball\(radius=-1.0\): a finite number of at least 0"),
    (lambda: sets.Ball(1.0, 3), r"Ball\(norm=3\): the norm is one of 1, 2, inf"),
    (lambda: sets.Ball(np.ones(2)), r"Ball\(radius=...\) is one number; its shape is \(2,\)"),
    (lambda: sets.SparseSimplex(0), "k is a count of entries"),
    (lambda: sets.Halfspace(np.zeros(2), 1), r"Halfspace\(a=...\) is zero everywhere"),
    (lambda: sets.Affine(np.ones(2), 1), r"Affine\(A=...\) is a matrix"),
    (lambda: sets.Affine(np.ones((2, 2)), np.array([1.0, 2])), "Affine: A z = b has no solution"),
    (lambda: sets.Affine(np.ones((2, 2)), np.ones(3)), "A has 2 rows and b the shape"),
    (lambda: sets.Affine(np.ones((1, 2)), np.ones(1))(jnp.ones(3)), "A has 2 columns and the variable 3 entries"),
    (lambda: sets.Polyhedron(), "needs A and b, or G and h"),
    (lambda: sets.Polyhedron(A=np.ones((1, 2))), "only one of A and b"),
    (lambda: sets.Polyhedron(G=np.array([[1.0], [-1]]), h=np.array([-1.0, -1])), r"Polyhedron\(A, b, G, h\) is empty"),
    (lambda: sets.BoxSection(0, 1, np.ones(2), 3)(jnp.ones(2)), r"a . z ranges over \[0, 2\] in the box"),
    (lambda: sets.Transport(np.ones(2), np.ones(3)), "the rows sum to 2 and the columns to 3"),
    (lambda: sets.Transport(-np.ones(2), np.ones(2)), "finite and not negative"),
    (lambda: sets.Birkhoff(3)(jnp.ones((2, 2))), r"3 row sums and 3 column sums was given \[\(2, 2\)\]"),
    (lambda: sets.Birkhoff(0), "n is the number of rows"),
    (lambda: sets.Product({"a": 3}), "Product.*holds 3"),
    (lambda: sets.Intersection(()), "takes sets or projections"),
    (lambda: sets.Simplex()(jnp.arange(3)), "dtype int32; floating-point entries are expected"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_errors_by_name(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()
