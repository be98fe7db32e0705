"""Curvature estimates against NumPy's eigenvalues and singular values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.curvature import (
    extreme_eigenvalues,
    hessian_norm,
    jacobian_norm,
    least_curved,
    probe_estimate,
    ritz_pairs,
    secant_estimate,
    spectral_norm,
    unit_direction,
)

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("d", [5, 64])
def test_small_maps_are_exact_also_indefinite_ones_on_pytrees(d, x64):
    a = np.random.default_rng(d).normal(size=(d, d))
    a = a + a.T
    like = {"u": jnp.zeros(2), "v": jnp.zeros((d - 2,))}

    def matvec(tree):
        out = a @ jnp.concatenate([tree["u"], tree["v"]])
        return {"u": out[:2], "v": out[2:]}

    low, high = extreme_eigenvalues(matvec, like)
    values = np.linalg.eigvalsh(a)
    np.testing.assert_allclose([low, high], values[[0, -1]], rtol=1e-10)


def test_lanczos_finds_both_ends_of_an_indefinite_spectrum(x64):
    values = np.concatenate([[-7.0], np.linspace(-1, 3, 198), [11.0]])
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 200)))[0]
    a = (q * values) @ q.T
    low, high = jax.jit(lambda: extreme_eigenvalues(lambda v: a @ v, jnp.zeros(200)))()
    np.testing.assert_allclose([low, high], [-7, 11], rtol=1e-6)


def test_the_least_eigenvalue_of_a_map_on_the_host_comes_with_its_vector():
    """An isolated one below a spread spectrum is found from few products, by differences of a gradient, too."""
    values = np.concatenate([[-1.0], np.linspace(1, 5, 299)])
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 300)))[0]
    A = Q * values @ Q.T
    gradient = lambda z: A @ z + 0.1 * z**2
    products = []
    least, vector = least_curved(lambda d: (products.append(d), gradient(1e-5 * d) / 1e-5)[1], 300)
    assert len(products) == 12
    np.testing.assert_allclose(least, -1.0, atol=1e-2)
    assert abs(vector @ Q[:, 0]) > 0.99
    assert least_curved(lambda d: np.zeros(3), 3)[0] == 0.0
    np.testing.assert_allclose(least_curved(lambda d: np.array([1.0, -2.0]) * d, 2)[0], -2.0)
    assert least_curved(lambda d: np.full(2, np.nan), 2) is None


def test_of_a_small_map_all_eigenvalues_and_vectors_are_found():
    random = np.random.default_rng(0)
    matrix = random.normal(size=(7, 7))
    values, vectors = ritz_pairs(lambda d: (matrix + matrix.T) @ d, 7)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix + matrix.T), atol=1e-10)
    np.testing.assert_allclose(vectors @ (matrix + matrix.T), values[:, None] * vectors, atol=1e-10)


def test_lanczos_survives_breakdown(x64):
    low, high = extreme_eigenvalues(lambda v: 3.0 * v, jnp.zeros(100))
    np.testing.assert_allclose([low, high], [3, 3], rtol=1e-10)


def test_curvatures_are_spectral_norms():
    M = RANDOM.normal(size=(4, 4))
    np.testing.assert_allclose(
        hessian_norm(lambda y: 0.5 * jnp.sum((M @ y) ** 2), jnp.zeros(4)), np.linalg.norm(M, 2) ** 2, rtol=1e-2
    )
    np.testing.assert_allclose(jacobian_norm(lambda u: (M @ u[0],), (jnp.zeros(4),)), np.linalg.norm(M, 2), rtol=1e-2)


def test_stacked_norms_are_those_of_each_agent(x64):
    """Also of one whose map is zero, and of an indefinite one; the leaves of a pytree count together."""
    a = RANDOM.normal(size=(4, 6, 6))
    a = (a + a.transpose(0, 2, 1)) * np.asarray([1.0, 1e-3, 0.0, 50.0])[:, None, None]

    def product(v):
        out = jnp.einsum("nij,nj->ni", a, jnp.concatenate([v["u"], v["w"].reshape(4, 4)], axis=1))
        return {"u": out[:, :2], "w": out[:, 2:].reshape(4, 2, 2)}

    like = {"u": jnp.zeros((4, 2)), "w": jnp.zeros((4, 2, 2))}
    found = jax.jit(lambda: spectral_norm(product, like, 2000, stacked=True))()
    np.testing.assert_allclose(found, np.abs(np.linalg.eigvalsh(a)).max(1), rtol=1e-5)
    np.testing.assert_allclose(spectral_norm(product, like, 2000), found.max(), rtol=1e-5)


def test_a_power_step_keeps_dtypes():
    like = (jnp.zeros(3, jnp.bfloat16), jnp.zeros(2))
    found = spectral_norm(lambda v: jax.tree.map(lambda a: -2 * a, v), like)
    np.testing.assert_allclose(found, 2.0, rtol=1e-2)


def test_estimates_follow_a_run(x64):
    """Of f(u) = e^u summed: a probe finds the curvature ahead of the gradients' differences, on its schedule alone."""
    fn, u = lambda u: jnp.sum(jnp.exp(u)), jnp.asarray([0.0, 2.0])
    direction = unit_direction(u)
    np.testing.assert_allclose(jnp.linalg.norm(direction), 1.0)
    assert probe_estimate(fn, u, 3, 1.5, direction)[0] == 1.5
    estimate = 0.0
    for k in range(0, 300, 10):
        estimate, direction = probe_estimate(fn, u, k, estimate, direction)
    np.testing.assert_allclose(estimate, np.exp(2.0), rtol=1e-6)
    lowered, _ = probe_estimate(fn, u, 0, 100.0, direction)
    np.testing.assert_allclose(lowered, 97.0)

    moved = 1e-3
    change = jax.grad(fn)(u + jnp.asarray([0.0, moved])) - jax.grad(fn)(u)
    np.testing.assert_allclose(secant_estimate(1.0, 1.0, change, moved, 2.0), np.exp(2.0), rtol=1e-3)
    np.testing.assert_allclose(secant_estimate(100.0, 10.0, change, moved, 2.0), 99.1)
    assert secant_estimate(5.0, 1.0, change, 1e-14, 2.0) == 5.0
