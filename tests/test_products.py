"""Products with a common factor, taken as one: the same values, derivatives and structure as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import derivatives
from bilevel._products import merge_products

rng = np.random.default_rng(0)


def products(fn, *args):
    """How many matrix products the merged function takes."""
    return str(jax.make_jaxpr(merge_products(fn))(*args)).count("dot_general")


def network(x, y, batch):
    """A two-layer network with weights on the samples."""
    hidden = jnp.tanh(batch @ y["in"])
    return jnp.mean(jax.nn.sigmoid(x) * jnp.sum((hidden @ y["out"]) ** 3, 1)) + 0.1 * jnp.sum(y["out"] ** 2)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


x = normal(6)
y = {"in": normal(4, 3), "out": normal(3, 2)}
v = jax.tree.map(lambda a: normal(*a.shape), y)
batch = normal(6, 4)


def along(x, y, v, batch):
    return jax.jvp(lambda y: jax.grad(network, argnums=(0, 1))(x, y, batch), (y,), (v,))


def assert_same(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def test_value_and_tangent_of_a_network_share_their_products():
    assert_same(jax.jit(merge_products(along))(x, y, v, batch), jax.jit(along)(x, y, v, batch))
    assert products(along, x, y, v, batch) < str(jax.make_jaxpr(along)(x, y, v, batch)).count("dot_general")


def test_merged_functions_can_be_compiled_mapped_and_differentiated():
    merged = lambda x: merge_products(along)(x, y, v, batch)[1][0]
    plain = lambda x: along(x, y, v, batch)[1][0]
    xs = np.stack([x, 2 * x])
    of = lambda f: jax.jit(lambda xs: (jax.vmap(f)(xs), jax.jacrev(f)(xs[0]), jax.jacfwd(f)(xs[0])))(xs)
    assert_same(of(merged), of(plain))


@pytest.mark.parametrize("left", [True, False])
def test_independent_products_are_one_and_dependent_ones_are_not(left):
    a = jnp.asarray(rng.standard_normal((4, 4)))
    b, c = (jnp.asarray(rng.standard_normal((4, 3))) for _ in range(2))
    times = (lambda b: a @ b) if left else (lambda b: b.T @ a)
    independent = lambda b, c: (times(b), times(c))
    assert products(independent, b, c) == 1
    assert_same(merge_products(independent)(b, c), independent(b, c))
    dependent = lambda b: (a @ b, a @ (a @ b))
    assert products(dependent, b) == 2
    assert_same(merge_products(dependent)(b), dependent(b))


def test_two_bundles_that_would_wait_for_each_other_are_not_both_made():
    a, d = (jnp.asarray(rng.standard_normal((4, 4))) for _ in range(2))

    def crossed(b):  # a@b -> d@(a@b), d@b -> a@(d@b): merging both pairs closes a cycle
        return d @ (a @ b), a @ (d @ b)

    b = jnp.asarray(rng.standard_normal((4, 2)))
    assert products(crossed, b) == 3
    assert_same(merge_products(crossed)(b), crossed(b))


def test_the_same_product_twice_vectors_wide_factors_and_loops():
    a, b, u = jnp.eye(4), jnp.ones((4, 2)), jnp.arange(4.0)
    assert_same(merge_products(lambda u: (a @ u, a @ u, u @ a))(u), (u, u, u))
    assert_same(merge_products(lambda b: (a @ b, a @ b))(b), (b, b))
    wide = jnp.ones((4, 40))
    assert products(lambda b: (a @ b, a @ (2 * b)), wide) == 2
    looped = lambda b: jax.lax.fori_loop(0, 3, lambda i, c: a @ c + a @ b, b)
    assert_same(merge_products(looped)(b), looped(b))


def test_what_is_not_asked_for_is_not_computed():
    """f_y and f_xy v without f_yy v: the last backward product has no partner to be merged with."""
    both = jax.make_jaxpr(lambda: derivatives.gradient_and_cross(lambda x, y: network(x, y, batch), x, y, v))()
    three = jax.make_jaxpr(lambda: derivatives.gradient_and_products(lambda x, y: network(x, y, batch), x, y, v))()
    assert len(both.jaxpr.eqns) < len(three.jaxpr.eqns)


def test_products_of_second_derivatives_agree_with_the_dense_hessian(x64):
    at, data = rng.standard_normal((5, 2)), rng.standard_normal((7, 5))
    f = lambda x, y: jnp.sum(jnp.exp(jnp.tanh(data @ y)) * jnp.cosh(x)[:, None])
    z, w = np.linspace(0.0, 1.0, 7), rng.standard_normal((5, 2))

    @jax.jit
    def ours(z, at, w):
        return (
            derivatives.gradient_and_products(f, z, at, w),
            derivatives.hvp(f, z, at, w),
            derivatives.cross_product(f, z, at, w),
        )

    (gradient, cross, hvp), hvp_alone, cross_alone = ours(z, at, w)
    exact, dense = jax.jit(lambda z, at: (jax.grad(f, 1)(z, at), jax.hessian(f, (0, 1))(z, at)))(z, at)
    assert_same(gradient, exact, 1e-12)
    assert_same(cross, np.einsum("kij,ij->k", dense[0][1], w), 1e-12)
    assert_same(hvp, np.einsum("klij,ij->kl", dense[1][1], w), 1e-12)
    assert_same(hvp_alone, hvp, 1e-12)
    assert_same(cross_alone, cross, 1e-12)
