"""What the applications share.

Convolutions and sums against their definitions, and their derivatives of every order.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bilevel.applications.layers import (
    BatchNorm,
    LayerNorm,
    depthwise,
    depthwise_conv,
    drop_path,
    gelu,
    maps,
    share_right,
)

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape)


GEOMETRIES = [(2, 4, 3, 1, 1, 4), (1, 3, 3, 2, 1, 6), (1, 2, 5, 1, 1, 3), (1, 1, 3, 2, 2, 6)]


@pytest.mark.parametrize("inputs,edges,size,stride,dilation,side", GEOMETRIES)
def test_depthwise_is_the_definition_and_its_gradients_are_the_adjoints(
    x64, depthwise_by_hand, inputs, edges, size, stride, dilation, side
):
    x, k = draw(inputs, 2, side, side + 2, 3), draw(edges, 2, size, size)
    conv = jax.jit(functools.partial(depthwise, stride=stride, dilation=dilation))
    out = conv(x, k)
    np.testing.assert_allclose(out, depthwise_by_hand(x, k, stride, dilation), atol=1e-12)
    # <g, conv(x, k)> is trilinear: each gradient returns its value when contracted with its own operand.
    g = draw(*out.shape)
    phi = lambda x, k: jnp.vdot(g, conv(x, k))
    gx, gk = jax.jit(jax.grad(phi, argnums=(0, 1)))(x, k)
    dx, dk = draw(*x.shape), draw(*k.shape)
    np.testing.assert_allclose(jnp.vdot(gx, dx), phi(dx, k), rtol=1e-10)
    np.testing.assert_allclose(jnp.vdot(gk, dk), phi(x, dk), rtol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_kernel_gradient_of_a_map_cut_into_blocks_is_the_adjoint(x64, stride):
    x, k = draw(2, 2, 2, 36, 2), draw(4, 2, 3, 3)
    conv = jax.jit(functools.partial(depthwise, stride=stride))
    g = draw(*conv(x, k).shape)
    gradient = jax.jit(jax.grad(lambda k: jnp.vdot(g, conv(x, k))))(k)
    direction = draw(*k.shape)
    np.testing.assert_allclose(jnp.vdot(gradient, direction), jnp.vdot(g, conv(x, direction)), rtol=1e-10)


def test_depthwise_differentiates_to_second_order_both_ways_and_maps_over_an_axis(x64):
    x, k, v = draw(1, 2, 3, 3, 2), draw(2, 2, 3, 3), draw(2, 2, 3, 3)
    loss = lambda k, x: jnp.sum(jnp.sin(depthwise(x, k)))
    forward = jax.jit(lambda k, x: jax.jvp(jax.grad(loss), (k, x), (v, 0 * x))[1])(k, x)
    reverse = jax.jit(jax.grad(lambda k, x: jnp.vdot(jax.grad(loss)(k, x), v)))(k, x)
    step = 1e-6
    gradient = jax.jit(jax.grad(loss))
    difference = (gradient(k + step * v, x) - gradient(k - step * v, x)) / (2 * step)
    np.testing.assert_allclose(forward, reverse, atol=1e-10)
    np.testing.assert_allclose(forward, difference, atol=1e-7)
    ks, xs = draw(3, 2, 2, 3, 3), draw(3, 1, 2, 3, 3, 2)
    grads = jax.grad(loss, argnums=(0, 1))
    single = jax.jit(grads)
    for axes, many in (((0, None), (ks, x)), ((None, 0), (k, xs))):
        at = lambda i: tuple(a[i] if axis == 0 else a for a, axis in zip(many, axes, strict=True))
        together = jax.jit(jax.vmap(grads, in_axes=axes))(*many)
        for i in range(3):
            for mine, alone in zip(together, single(*at(i)), strict=True):
                np.testing.assert_allclose(mine[i], alone, atol=1e-12)


@pytest.mark.parametrize("grid,stride", [((4, 6), 1), ((4, 6), 2), ((3, 5), 2), ((7, 4), 3)])
def test_planes_are_the_strided_pixels_and_unite_to_the_map(grid, stride):
    x = draw(2, *grid, 3)
    parts = maps.planes(jnp.asarray(x).reshape(2, -1), grid, stride)
    np.testing.assert_array_equal(maps.unite(parts, grid, stride), x.reshape(2, -1).astype(np.float32))
    for number, part in enumerate(parts):
        seen = x[:, number // stride :: stride, number % stride :: stride]
        cut = np.asarray(part).reshape(2, *maps.halved(grid, stride), 3)[:, : seen.shape[1], : seen.shape[2]]
        np.testing.assert_array_equal(cut, seen.astype(np.float32))


@pytest.mark.parametrize("down,right", [(0, 0), (1, 0), (-2, 0), (0, 1), (0, -1), (1, -1), (-1, 2)])
def test_a_shifted_map_is_filled_from_outside(down, right):
    x = draw(2, 4, 3, 2).astype(np.float32)
    expected = np.full_like(x, 7.0)
    for i, j in itertools.product(range(4), range(3)):
        if 0 <= i + down < 4 and 0 <= j + right < 3:
            expected[:, i, j] = x[:, i + down, j + right]
    found = maps.shifted(jnp.asarray(x).reshape(2, -1), (4, 3), down, right, 7.0)
    np.testing.assert_array_equal(np.asarray(found).reshape(x.shape), expected)


def test_sums_over_maps_are_the_sums_with_derivatives_of_second_order_and_under_vmap(x64):
    x, y, a = draw(3, 5), draw(3, 5), draw(3)

    def ours(x, y, a):
        return jnp.sum(jnp.sin(maps.inner(maps.scale(a, x) + maps.spread(a, 5), y)) * maps.total(x * y))

    def plain(x, y, a):
        return jnp.sum(jnp.sin(((a[:, None] * x + a[:, None]) * y).sum(-1)) * (x * y).sum(-1))

    np.testing.assert_allclose(ours(x, y, a), plain(x, y, a), rtol=1e-12)
    for order in (jax.grad, lambda f, argnums: jax.jacfwd(jax.grad(f, argnums), argnums), jax.hessian):
        both = [jax.tree.leaves(jax.jit(order(f, argnums=(0, 1, 2)))(x, y, a)) for f in (ours, plain)]
        for mine, theirs in zip(*both, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-11)
    many = draw(4, 3)
    together = jax.jit(jax.vmap(jax.grad(ours, argnums=(0, 2)), in_axes=(None, None, 0)))(x, y, many)
    for i in range(4):
        for mine, alone in zip(together, jax.grad(plain, argnums=(0, 2))(x, y, many[i]), strict=True):
            np.testing.assert_allclose(mine[i], alone, atol=1e-11)


def test_depthwise_refuses_kernels_that_no_input_shares():
    with pytest.raises(ValueError, match="a multiple of inputs"):
        depthwise(jnp.zeros((2, 1, 4, 4, 1)), jnp.zeros((3, 1, 3, 3)))


@pytest.mark.parametrize(
    ("stride", "dilation", "padding", "size"),
    [
        pytest.param(1, 1, "SAME", (3, 3), marks=pytest.mark.slow),
        (2, 1, ((1, 1), (0, 1)), (3, 5)),
        (2, 2, ((4, 4), (2, 2)), (3, 3)),
        ((1, 2), (2, 1), 1, (3, 2)),
    ],
)
def test_depthwise_convolution_equals_the_grouped_one_and_differentiates_to_third_order(
    x64, stride, dilation, padding, size
):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (*size, 3))
    pads = {"SAME": ((1, 1), (1, 1)), 1: ((1, 1), (1, 1))}.get(padding, padding)

    def ours(x, kernel):
        return depthwise_conv(x, kernel, stride, dilation, padding)

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            (stride,) * 2 if isinstance(stride, int) else stride,
            pads,
            rhs_dilation=(dilation,) * 2 if isinstance(dilation, int) else dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    np.testing.assert_allclose(ours(x, kernel), theirs(x, kernel), atol=1e-12)
    check_grads(jax.jit(ours), (x, kernel), order=3, modes=("fwd", "rev"))
    xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel**2])
    for axes in ((0, None), (None, 0), (0, 0)):
        arguments = [
            stack if axis == 0 else one for axis, stack, one in zip(axes, (xs, kernels), (x, kernel), strict=True)
        ]
        cube = [jax.grad(lambda x, k, f=f: (f(x, k) ** 3).sum(), argnums=(0, 1)) for f in (ours, theirs)]
        a, b = (jax.jit(jax.vmap(f, axes))(*arguments) for f in cube)
        for mine, expected in zip(a, b, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=1e-10, atol=1e-9)


def test_depthwise_convolution_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="it expects"):
        depthwise_conv(jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 2)))
    with pytest.raises(ValueError, match="neither"):
        depthwise_conv(jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3)), padding="FULL")


def test_sixteen_bit_kernels_are_accumulated_in_single_precision():
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 4))
    kernel = jax.random.normal(jax.random.key(1), (5, 5, 4))
    half = depthwise_conv(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    exact = depthwise_conv(*(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, kernel)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, rtol=2**-7)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    out = drop_path(jnp.ones((4000, 2, 2, 1)), 0.25, jax.random.key(0))
    values = np.unique(np.round(out, 5))
    np.testing.assert_allclose(values, [0, 4 / 3], atol=1e-4)
    assert np.ptp(out, axis=(1, 2)).max() == 0
    assert abs(float(out.mean()) - 1) < 0.05
    np.testing.assert_array_equal(drop_path(jnp.ones((3, 1)), 1.0, jax.random.key(0)), jnp.zeros((3, 1)))


def test_normalisations_and_gelu_equal_their_formulas(x64):
    x = 5 + jax.random.normal(jax.random.key(0), (3, 4, 4, 6))
    centred = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(
        jax.jit(LayerNorm(6))(x), centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6), atol=1e-12
    )
    norm = BatchNorm(6)
    out = norm(x, train=True)
    np.testing.assert_allclose(out, (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5), atol=1e-12)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-6)
    np.testing.assert_allclose(gelu(x), x * jax.scipy.stats.norm.cdf(x), atol=1e-12)


def test_the_share_of_right_answers_counts_every_sample_whatever_the_chunk():
    scores, labels = jnp.asarray(draw(23, 4)), jnp.asarray(RNG.integers(0, 4, 23))
    right = scores.argmax(-1) == labels
    for chunk in (1, 5, 23, 100):
        np.testing.assert_allclose(share_right(lambda s: s, scores, labels, chunk=chunk), right.mean(), rtol=1e-6)
    np.testing.assert_allclose(share_right(lambda s: s, scores, labels, chunk=5, rest=False), right[:20].mean())
