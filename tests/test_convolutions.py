"""Convolutions in loops are brought into the order of axes that XLA:CPU is fast in; nothing else changes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel import Problem, _convolutions, data, loop, lower, run, solve, solvers
from bilevel._convolutions import _permuted, in_canonical_order

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order is the CPU's")

LAYERS = {
    "plain": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 2), "padding": "SAME"},
    "valid": {"window_strides": (1, 2), "padding": "VALID"},
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
    "padded": {"window_strides": (1, 1), "padding": ((2, 0), (1, 3))},
    "transposed": {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 2)},
}
ORDERS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NCHW")]


def arrays(order):
    random, sizes = np.random.default_rng(0), {"N": 2, "C": 3, "I": 3, "O": 4, "H": 6, "W": 7}
    kernel = dict(sizes, H=3, W=2)
    shape = [tuple(of[axis] for axis in axes) for of, axes in ((sizes, order[0]), (kernel, order[1]))]
    return tuple(jnp.asarray(random.standard_normal(s), jnp.float32) for s in shape)


def same(fn, *args):
    """The values of both forms agree, and no convolution is left in another order."""
    plain, ordered = jax.jit(fn)(*args), jax.jit(in_canonical_order(fn))(*args)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ordered), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert not _permuted(jax.make_jaxpr(in_canonical_order(fn))(*args).jaxpr)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_values_and_all_derivatives_are_those_of_the_order_that_was_written(layer, order) -> None:
    x, w = arrays(order)
    convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=order, **LAYERS[layer])
    value = lambda x, w: jnp.sum(jnp.tanh(convolve(x, w)))
    same(jax.value_and_grad(value, (0, 1)), x, w)
    same(lambda x, w: jax.jvp(jax.grad(value, 1), (x, w), (x, w))[1], x, w)


def test_one_place_and_groups() -> None:
    x, w = jnp.ones((2, 9, 4)), jnp.arange(24.0).reshape(3, 4, 2)
    order = ("NWC", "WIO", "NWC")
    one = lambda w: jnp.sum(jnp.sin(jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=order)))
    same(jax.grad(one), w)
    grouped = lambda w: jnp.sum(
        jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=order, feature_group_count=4) ** 2
    )
    w = jnp.ones((3, 1, 8))
    np.testing.assert_allclose(in_canonical_order(jax.grad(grouped))(w), jax.grad(grouped)(w))  # left as they are


def test_within_loops_branches_checkpoints_and_rules_of_derivatives() -> None:
    x, w = arrays(ORDERS[1])
    convolve = lambda w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=ORDERS[1])
    slope = jax.grad(lambda w: jnp.sum(jnp.tanh(convolve(w))))
    kept = jax.grad(jax.checkpoint(lambda w: jnp.sum(jnp.tanh(convolve(jax.nn.silu(w))))))

    def everything(w):
        w = jax.lax.fori_loop(0, 2, lambda _, w: w - 0.01 * slope(w), w)
        w = jax.lax.scan(lambda w, _: (w - 0.01 * jax.jit(slope)(w), None), w, None, length=2)[0]
        w = jax.lax.while_loop(lambda w: jnp.sum(w) > 1e9, lambda w: w - slope(w), w)
        return jax.lax.cond(w[0, 0, 0, 0] > 0, lambda w: w - 0.01 * kept(w), lambda w: w + 0.01 * slope(w), w)

    same(everything, w)
    gradient = lambda f: jax.grad(lambda w: jnp.sum(f(w) ** 2))(w)
    only_scans = lambda w: jax.lax.scan(lambda w, _: (w - 0.01 * slope(w), None), w, None, length=2)[0]
    np.testing.assert_allclose(gradient(in_canonical_order(only_scans)), gradient(only_scans), rtol=1e-4, atol=1e-4)


def network():
    """A small convolutional network as a lower level, weights of the samples above."""
    random = np.random.default_rng(1)
    images = random.standard_normal((24, 6, 6, 1)).astype(np.float32)
    labels = (images.mean((1, 2, 3)) > 0).astype(np.float32)

    def losses(y, images, labels):
        h = jax.lax.conv_general_dilated(images, y["w"], (1, 1), "SAME", dimension_numbers=ORDERS[0])
        return optax.sigmoid_binary_cross_entropy(jnp.tanh(h).mean((1, 2)) @ y["v"], labels)

    def weighted(x, y, batch):
        decay = 0.2 * optax.tree.norm(y, squared=True)  # convex: a saddle would magnify rounding
        return (jax.nn.sigmoid(x)[batch[2]] * losses(y, *batch[:2])).mean() + decay

    problem = Problem(
        lambda x, y, batch: losses(y, *batch).mean(), weighted,
        upper_data=(images[:8], labels[:8]),
        lower_data=data.Minibatches((images, labels, np.arange(24)), size=8),
    )  # fmt: skip
    y = {"w": jnp.asarray(0.3 * random.standard_normal((3, 3, 1, 4)), jnp.float32), "v": jnp.ones(4)}
    return problem, jnp.zeros(24), y


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(solvers.SOBA, id="SOBA"),
        # Loops within loops, and derivatives through them, have the test above.
        pytest.param(lambda: solvers.ITD(3, 0.1), marks=pytest.mark.slow, id="ITD"),
        pytest.param(
            lambda: solvers.AID(lower.GradientDescent(0.1, steps=3), optax.sgd(0.1)),
            marks=[pytest.mark.slow, pytest.mark.optimised],  # its linear system stops on rounding
            id="AID",
        ),
    ],
)
def test_a_run_is_what_it_was_and_its_loop_has_one_order(make, monkeypatch) -> None:
    problem, x, y = network()
    seen = []

    def watched(fn):
        ordered = in_canonical_order(fn)
        return lambda *args: (seen.append(_permuted(jax.make_jaxpr(ordered)(*args).jaxpr)), ordered(*args))[1]

    monkeypatch.setattr(loop, "in_canonical_order", watched)
    solution = solve(problem, x, y, make(), steps=4, progress=False)
    state, _ = run(problem, make(), x, y, 4)
    assert seen and not any(seen)
    monkeypatch.setattr(loop, "in_canonical_order", lambda fn: fn)
    jax.clear_caches()
    plain = solve(problem, x, y, make(), steps=4, progress=False)
    ends = [(end.x, end.y) for end in (solution, plain, state)]
    for a, b, c in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-6)


def test_problems_without_convolutions_are_traced_as_they_are(monkeypatch) -> None:
    monkeypatch.setattr(loop, "in_canonical_order", lambda fn: pytest.fail("there is no convolution"))
    problem = Problem(lambda x, y: (y - 1) ** 2, lambda x, y: (y - x) ** 2)
    solve(problem, jnp.zeros(()), jnp.zeros(()), solvers.SOBA(), steps=3, progress=False)
    assert _convolutions.convolves(
        jax.make_jaxpr(lambda w: jax.lax.conv(jnp.ones((1, 1, 4, 4)), w, (1, 1), "SAME"))(jnp.ones((1, 1, 2, 2))).jaxpr
    )
