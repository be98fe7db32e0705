"""Losses whose gradient has no forward mode: a kernel's backward pass that is a custom_vjp, or a kernel, itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, ProblemError, Result, data, derivatives, lower, run, runs, solve, solvers
from bilevel.hypergradients import (
    SAMA,
    FiniteDifference,
    Forward,
    Implicit,
    LeastSquares,
    StochasticImplicit,
    Unrolled,
    value_and_hypergradient,
)
from bilevel.precision import ByReverse, working
from bilevel.solvers.certificate import certify


@jax.custom_vjp
def slope(a, g):
    """The backward pass of `sine`, with a backward pass of its own."""
    return g * jnp.cos(a)


slope.defvjp(lambda a, g: (slope(a, g), (a, g)), lambda r, c: (-c * r[1] * jnp.sin(r[0]), c * jnp.cos(r[0])))


@jax.custom_vjp
def sine(a):
    """A function that only reverse mode goes through, twice."""
    return jnp.sin(a)


sine.defvjp(lambda a: (sine(a), a), lambda a, g: (slope(a, g),))

X, Y = np.array([0.3, 0.4]), np.array([0.5, -0.3])
ROWS = np.arange(6.0).reshape(3, 2) / 5


def problem(sine, scale=1.0, **parts):
    return Problem(
        lambda x, y, b: jnp.mean((y - b) ** 2) + 0.1 * jnp.sum(x**2),
        lambda x, y, b: scale * jnp.mean((y - sine(x * b)) ** 2) + 0.1 * jnp.sum(sine(y) * x) + jnp.sum(y**4),
        ROWS,
        ROWS,
        **parts,
    )


ESTIMATORS = {
    "Implicit": (Implicit(), lower.GradientDescent(0.1, 4), {}),
    "Implicit, Newton": (Implicit(), lower.Newton(), {}),
    "Implicit, projected": (Implicit(), lower.GradientDescent(0.1, 4), {"project_lower": lambda y: jnp.clip(y, -1, 1)}),
    "Unrolled": (Unrolled(), lower.GradientDescent(optax.adam(0.1, eps_root=1e-8), 4), {}),
    "Unrolled, plain": (Unrolled(checkpoint=False), lower.GradientDescent(0.1, 4), {}),
    "Unrolled, log": (Unrolled(checkpoint="log"), lower.GradientDescent(0.1, 4), {}),
    "Forward": (Forward(), lower.GradientDescent(0.1, 4), {}),
    "Forward, directions": (Forward(directions=1), lower.GradientDescent(0.1, 4), {}),
    "StochasticImplicit": (StochasticImplicit(), lower.GradientDescent(0.1, 4), {}),
    "LeastSquares": (LeastSquares(), lower.GradientDescent(0.1, 4), {}),
    "SAMA, exact": (SAMA(None), lower.GradientDescent(0.1, 4), {}),
    "FiniteDifference, exact": (FiniteDifference(radius=None), lower.GradientDescent(0.1, 4), {}),
}


# Of `checkpoint="log"` the attention below has a run, and of a projection every file of tests of Implicit.
LATER = ("Implicit, projected", "Unrolled, log")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name for name in ESTIMATORS]
)
def test_every_estimator_takes_it(name, x64):
    estimator, solver, parts = ESTIMATORS[name]
    of = lambda f: jax.jit(value_and_hypergradient(problem(f, **parts), estimator, solver))(X, Y)
    found, expected = of(sine), of(jnp.sin)
    assert np.abs(expected.gradient).max() > 1e-3
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-12)
    np.testing.assert_allclose(found.lower.y, expected.lower.y, rtol=1e-13)


def test_the_way_is_chosen_by_trial():
    assert isinstance(working(problem(sine), X, Y).problem.lower, ByReverse)
    assert not isinstance(working(problem(sine), X, Y).problem.upper, ByReverse)
    assert not isinstance(working(problem(jnp.sin), X, Y).problem.lower, ByReverse)
    # A custom_vjp whose backward pass is plain goes forward over reverse, as ever.
    plain = jax.custom_vjp(jnp.sin)
    plain.defvjp(lambda a: (jnp.sin(a), a), lambda a, g: (g * jnp.cos(a),))
    assert not isinstance(working(problem(plain), X, Y).problem.lower, ByReverse)


def test_set_by_hand_and_derivatives_of_all_orders(x64):
    """In both modes, under vmap, in what the loss captures."""

    def of(f, scale, x, y):
        loss = lambda x, y: scale * jnp.sum(f(x * y) * y**2)
        return derivatives.reverse_over_reverse(loss) if f is sine else loss

    def third(f, scale, x):
        hvp = lambda y: derivatives.linearised(of(f, scale, x, y), x, y).hvp(jnp.cos(y))
        return jnp.sum(jax.vmap(hvp)(jnp.stack([Y, X, X + Y])) ** 2)

    def all_of(f):
        batched = jax.vmap(jax.hessian(lambda y, x: of(f, 2.0, x, y)(x, y)), (None, 0))(Y, jnp.stack([X, Y]))
        thirds = [derivative(functools.partial(third, f), (0, 1))(1.3, X) for derivative in (jax.grad, jax.jacfwd)]
        return batched, thirds

    found, expected = (jax.jit(functools.partial(all_of, f))() for f in (sine, jnp.sin))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), found, expected)


def test_a_whole_solve_and_a_whole_training():
    solver = solvers.AID(lower.GradientDescent(0.2, 30), 0.2)
    found = solve(problem(sine), X, Y, solver, steps=300, tol=1e-4, progress=False)
    assert found.result is Result.CONVERGED
    expected = jax.jit(lambda: run(problem(jnp.sin), solver, X, Y, found.steps)[0].x)()
    np.testing.assert_allclose(found.x, expected, atol=1e-4)
    training = lower.GradientDescent(0.1, 9)
    whole = jax.jit(value_and_hypergradient(problem(jnp.sin), Unrolled(), training))(X, Y)
    np.testing.assert_allclose(runs.metagradient(problem(sine), X, Y, training).gradient, whole.gradient, rtol=1e-5)


def attention(x, y, tokens):
    query, key, value = (tokens @ y[name] for name in ("query", "key", "value"))
    heads = lambda a: a.reshape(2, 4, 1, 3)
    mixed = jax.nn.dot_product_attention(heads(query), heads(key), heads(value), is_causal=True)
    return jnp.mean(jax.nn.softplus(x) * jnp.sum((mixed - tokens.reshape(2, 4, 1, 3)) ** 2, (1, 2, 3)))


@pytest.mark.parametrize(
    "loss",
    [pytest.param(attention, marks=pytest.mark.slow), jax.checkpoint(attention)],
    ids=["attention", "rematerialised"],
)
def test_attention_and_rematerialisation(loss, x64):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 4, 3))
    y = {name: rng.normal(size=(3, 3)) / 2 for name in ("query", "key", "value")}
    x = np.array([0.2, -0.4])
    upper = lambda x, y, tokens: attention(jnp.zeros(2), y, tokens)
    of = lambda loss, estimator: jax.jit(
        value_and_hypergradient(Problem(upper, loss, tokens[::-1], tokens), estimator, lower.GradientDescent(0.05, 3))
    )
    whole = of(attention, Unrolled(checkpoint=False))(x, y)
    value = jax.jit(lambda x: of(attention, Unrolled())(x, y).value)
    slopes = [(value(x + h) - value(x - h)) / 4e-2 for h in 2e-2 * np.eye(2)]
    np.testing.assert_allclose(whole.gradient, slopes, rtol=1e-3)  # the attention computes in float32
    for estimator in (Unrolled(), Unrolled(checkpoint="log"), Forward()):
        np.testing.assert_allclose(of(loss, estimator)(x, y).gradient, whole.gradient, rtol=1e-5)


def kernel(body):
    from jax.experimental import pallas as pl

    return lambda *a: pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(a[0].shape, a[0].dtype), interpret=True)(*a)


def fused(backward, plain=False):
    """A Pallas kernel of sine, whose backward pass is `backward(a, g)`; `plain`: forward it is the bare kernel."""

    def forward_body(a, out):
        out[...] = jnp.sin(a[...])

    run = jax.custom_vjp(kernel(forward_body))
    ahead = kernel(forward_body) if plain else run
    run.defvjp(lambda a: (ahead(a), a), lambda a, g: (backward(a, g),))
    return run


def cosine(a, g):
    """The backward pass, by a kernel that has no rule of its own."""

    def body(a, out):
        out[...] = jnp.cos(a[...])

    return g * kernel(body)(a)


def slope_body(a, g, out):
    out[...] = g[...] * jnp.cos(a[...])


def test_a_pallas_kernel_whose_backward_pass_is_one(x64):
    backward = jax.custom_vjp(kernel(slope_body))
    backward.defvjp(lambda a, g: (backward(a, g), (a, g)), lambda r, c: (-c * r[1] * jnp.sin(r[0]), c * jnp.cos(r[0])))
    for estimator in (Unrolled(), Implicit()):
        found, expected = (
            jax.jit(value_and_hypergradient(problem(f), estimator, 0.1))(X, Y) for f in (fused(backward), jnp.sin)
        )
        np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-12)


def test_a_pallas_kernel_whose_backward_pass_is_a_plain_one(x64):
    """It has tangents, together with its value alone."""
    of = lambda f, estimator: jax.jit(
        value_and_hypergradient(
            Problem(lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum((y - x) ** 2 + 0.3 * f(y))), estimator, 0.1
        )
    )(X, Y)
    for estimator in (Unrolled(), Unrolled(checkpoint="log"), Implicit()):
        found, expected = (of(f, estimator).gradient for f in (fused(cosine, plain=True), jnp.sin))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def product(own, plain=False):
    """A Pallas kernel (a, b) -> sin(a) b, and for its backward pass one of three operands and two results; `own`: which
    has a backward pass of its own."""
    from jax.experimental import pallas as pl

    def forward_body(a, b, out):
        out[...] = jnp.sin(a[...]) * b[...]

    def backward_body(a, b, g, of_a, of_b):
        of_a[...] = g[...] * jnp.cos(a[...]) * b[...]
        of_b[...] = g[...] * jnp.sin(a[...])

    def backward(a, b, g):
        one = jax.ShapeDtypeStruct(a.shape, a.dtype)
        return pl.pallas_call(backward_body, out_shape=(one, one), interpret=True)(a, b, g)

    pullback = backward
    if own:
        pullback = jax.custom_vjp(backward)
        by_hand = lambda a, b, g: (g * jnp.cos(a) * b, g * jnp.sin(a))
        pullback.defvjp(lambda *at: (pullback(*at), at), lambda at, c: jax.vjp(by_hand, *at)[1](c))
    bare = kernel(forward_body)
    run = jax.custom_vjp(lambda a, b: bare(a, b))
    run.defvjp(lambda a, b: ((bare if plain else run)(a, b), (a, b)), lambda r, g: pullback(*r, g))
    return lambda a: run(a, jnp.cos(a) + a)


@pytest.mark.parametrize(
    "name",
    [
        "Implicit",
        "Forward",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Unrolled, log", "StochasticImplicit")),
    ],
)
def test_a_pallas_kernel_of_several_operands(name, x64):
    estimator, solver, parts = ESTIMATORS[name]
    of = lambda f: jax.jit(value_and_hypergradient(problem(f, **parts), estimator, solver))(X, Y).gradient
    np.testing.assert_allclose(of(product(own=True)), of(lambda a: jnp.sin(a) * (jnp.cos(a) + a)), rtol=1e-12)


def test_what_a_plain_backward_kernel_has_no_derivative_for_is_named(x64):
    """Of several operands it has none at all: JAX makes no tangents of it where some operands have none."""
    torn, single = product(own=False, plain=True), fused(cosine, plain=True)
    for name, (estimator, solver, parts) in ESTIMATORS.items():
        for f in (torn, single):
            if f is torn or name in ("Forward", "Unrolled, plain"):
                what = "no second derivative, neither" if f is torn else "a part with a custom_vjp"
                with pytest.raises(ValueError, match=rf"^lower, the lower level's loss, has {what}.*solvers\.F2SA"):
                    jax.jit(value_and_hypergradient(problem(f, **parts), estimator, solver))(X, Y)


def blind():
    """A sine whose gradient has no derivative."""

    @jax.custom_vjp
    def opaque(a, g):
        return g * jnp.cos(a)

    def none(r, c):
        raise NotImplementedError("the kernel has no second derivative")

    opaque.defvjp(lambda a, g: (opaque(a, g), None), none)
    run = jax.custom_vjp(jnp.sin)
    run.defvjp(lambda a: (jnp.sin(a), a), lambda a, g: (opaque(a, g),))
    return run


@pytest.mark.parametrize(
    "make",
    [blind, pytest.param(lambda: fused(cosine, plain=True), marks=pytest.mark.slow)],
    ids=["blind", "plain kernel"],
)
def test_a_run_of_first_derivatives_ends_on_it(make, x64):
    """The end of a run is looked at with second derivatives: where there are none, the run stands and that is said."""
    solver = solvers.F2SA(lower_solver=0.1, upper_optimizer=0.1, penalty=2.0)
    found, expected = (
        solve(problem(f), X, Y, solver, steps=5, tol=tol, progress=False)
        for f, tol in ((make(), 1e-9), (jnp.sin, None))
    )
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-12)
    seen = certify(working(problem(make()), X, Y).problem, X, Y, (X, Y), Result.CONVERGED, {}, 1e-3)
    assert seen.result is Result.CONVERGED
    assert seen.why == "Not checked by an independent solve: lower, the lower level's loss, has no second derivative."


def test_a_kernel_without_a_second_derivative_is_named(x64):
    for estimator in (Unrolled(), Implicit(), Forward()):
        with pytest.raises(ValueError, match=r"^lower, the lower level's loss, has no second .*kernel has no"):
            jax.jit(value_and_hypergradient(problem(blind()), estimator, 0.1))(X, Y)
    with pytest.raises((ValueError, ProblemError), match=r"lower, the lower level's loss, has no second derivative"):
        solve(problem(blind()), X, Y, solvers.AID(lower.GradientDescent(0.1, 3), 0.1), steps=2, progress=False)


def test_minibatches_and_captured_numbers(x64):
    scale = {"value": 1.0}

    def of(f):
        drawn = Problem(
            lambda x, y, b: jnp.mean((y - b) ** 2),
            lambda x, y, b: scale["value"] * jnp.mean((y - f(x * b)) ** 2) + jnp.sum(f(y) ** 2),
            ROWS,
            data.Minibatches(ROWS, 2),
        )
        return solve(drawn, X, Y, solvers.SOBA(0.1, 0.1), steps=20, progress=False).x

    first = of(sine)
    np.testing.assert_allclose(first, of(jnp.sin), rtol=1e-10)
    scale["value"] = 2.0
    np.testing.assert_allclose(of(sine), of(jnp.sin), rtol=1e-10)
    assert np.abs(of(sine) - first).max() > 1e-4
