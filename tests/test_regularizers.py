"""Regularisers: the lower loss under perturbed choices, penalties on the upper variable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, data, run, solve
from bilevel import regularizers as reg
from bilevel.data import as_step_key
from bilevel.solvers.darts import DARTS

# ---------------------------------------------------------------- the lower loss, perturbed


def identity(x):
    return x


def test_random_perturbation_adds_a_third_of_half_the_trace(x64):
    h = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 4.0]])
    smoothed = reg.perturbed(lambda a, y: 0.5 * a @ h @ a + y @ a, 0.3, transform=identity, project=None)
    x, y = np.array([0.2, -0.1, 0.4]), np.array([1.0, 0.0, -1.0])
    level = Problem(lambda x, y: 0.0, smoothed, lower_data=data.Keyed())
    n = 20_000
    values = jax.jit(jax.vmap(lambda k: level.draw_lower(as_step_key(0, k))(x, y)))(jnp.arange(n))
    added = values - (0.5 * x @ h @ x + y @ x)
    np.testing.assert_allclose(added.mean(), 0.3**2 / 6 * np.trace(h), atol=4 * added.std() / np.sqrt(n))


def test_adversarial_perturbation_of_a_linear_loss_is_the_worst(x64):
    g = {"a": np.array([[1.0, -2.0, 0.5]]), "b": np.array([3.0, -0.1])}
    x = {"a": np.zeros((1, 3)), "b": np.array([0.3, 0.1])}

    def loss(a, y, batch):
        return sum(jnp.vdot(g[k] * batch, a[k]) for k in a) + y

    smoothed = reg.perturbed(loss, 0.2, adversarial=True, transform=identity, project=None)
    batch = data.Keyed(np.asarray(2.0)[None]).draw(as_step_key(1))
    batch = (batch[0][0], batch[1])
    one_norm = sum(np.abs(v).sum() for v in g.values())
    value, gradient = jax.jit(jax.value_and_grad(smoothed))(x, 0.5, batch)
    # A random start within the ball and steps of 2/7 of its radius times seven: every coordinate reaches its end.
    np.testing.assert_allclose(value, loss(x, 0.5, 2.0) + 0.2 * 2 * one_norm, rtol=1e-12)
    for k in g:
        np.testing.assert_allclose(gradient[k], 2 * g[k], rtol=1e-12)  # the perturbation is a constant


def test_adversarial_perturbation_is_kept_only_where_the_loss_rose(x64):
    # A peak at A = (1/2, 1/2): nothing rises from there.
    smoothed = reg.perturbed(lambda a, y: -jnp.sum((a - 0.5) ** 2) + y, 0.3, adversarial=True)
    value = jax.jit(smoothed)(np.zeros(2), 1.0, data.Keyed().draw(as_step_key(0)))
    np.testing.assert_allclose(value, 1.0, rtol=1e-15)


@pytest.mark.parametrize("adversarial", [False, True])
def test_perturbed_choices_stay_on_the_simplex(adversarial, x64):
    x = {"normal": np.random.default_rng(0).normal(size=(4, 3)), "reduce": np.zeros((2, 5))}
    seen = lambda a, y: jnp.sum(a["normal"] ** 3) + jnp.sum(a["reduce"] * jnp.arange(5.0))
    keep = {}

    def loss(a, y):
        keep["a"] = a
        return seen(a, y)

    smoothed = reg.perturbed(loss, lambda step: 0.3 * (step + 1), adversarial=adversarial)

    def last(key):
        value = smoothed(x, 0.0, (None, key))
        return value, keep["a"]  # what the loss was evaluated at in the end

    value, a = jax.jit(last)(as_step_key(2, 4))
    for leaf, before in zip(jax.tree.leaves(a), jax.tree.leaves(reg.softmax(x)), strict=True):
        np.testing.assert_allclose(leaf.sum(-1), 1, rtol=1e-12)
        assert jnp.all(leaf >= 0) and jnp.max(jnp.abs(leaf - before)) > 0.01
    assert not adversarial or value > seen(reg.softmax(x), 0.0)
    np.testing.assert_allclose(reg.renormalise(jnp.array([[-1.0, -2.0], [3.0, 1.0]])), [[0.5, 0.5], [0.75, 0.25]])


@pytest.mark.parametrize("order", [pytest.param(2, marks=pytest.mark.slow), "exact"])
def test_perturbed_search_runs_and_reproduces(order):
    train = data.Keyed(data.Minibatches(np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32), 4))
    problem = Problem(
        lambda x, y: jnp.sum((jax.nn.softmax(x) * y - 0.2) ** 2),
        reg.perturbed(lambda a, y, batch: jnp.mean((batch @ (a * y) - 1) ** 2), 0.2),
        lower_data=train,
    )
    keys = jax.vmap(jax.random.key)(jnp.array([0, 0, 1]))
    once = lambda key: run(problem, DARTS(order), jnp.zeros(3), jnp.ones(3), 4, key)[0]
    state = jax.jit(jax.vmap(once))(keys)
    np.testing.assert_array_equal(state.y[0], state.y[1])
    assert jnp.any(state.y[0] != state.y[2]) and jnp.all(jnp.isfinite(state.x))


def test_keyed_batches():
    source = data.Minibatches(np.arange(10.0), 2, replace=True)
    key = as_step_key(0, 7)
    batch, drawn = data.Keyed(source).draw(key)
    np.testing.assert_array_equal(batch, source.draw(key))
    assert drawn.step == 7
    assert np.any(jax.random.key_data(drawn.random) != jax.random.key_data(key.random))
    assert repr(data.Keyed(source)) == "Keyed(Minibatches(10 samples, size=2, with replacement))"
    with pytest.raises(TypeError, match="not a Stream"):
        data.Keyed(data.Stream([np.ones(2)]))
    with pytest.raises(ValueError, match="needs the step's key with each batch"):
        reg.perturbed(lambda a, y: 0.0)(jnp.zeros(2), 0.0)
    with pytest.raises(ValueError, match="radius is positive"):
        reg.perturbed(lambda a, y: 0.0, 0.0)


# ---------------------------------------------------------------- the upper loss, penalised


def test_penalties_in_closed_form(x64):
    rng = np.random.default_rng(0)
    x = {"normal": rng.normal(size=(4, 3)), "reduce": rng.normal(size=(2, 5))}
    p = {k: np.exp(v) / np.exp(v).sum(-1, keepdims=True) for k, v in x.items()}
    edges = np.concatenate([np.log(np.exp(v).sum(-1)) for v in x.values()])
    value, gradient = jax.jit(jax.value_and_grad(reg.beta_decay))(x)
    np.testing.assert_allclose(value, edges.mean(), rtol=1e-12)
    for k, g in gradient.items():
        np.testing.assert_allclose(g, p[k] / 6, rtol=1e-12)
    s = np.concatenate([(1 / (1 + np.exp(-v)) - 0.5).ravel() for v in x.values()])
    np.testing.assert_allclose(jax.jit(reg.zero_one)(x), -np.mean(s**2), rtol=1e-12)
    np.testing.assert_allclose(reg.zero_one(x, norm=1), -np.mean(np.abs(s)), rtol=1e-12)
    entropies = np.concatenate([-(q * np.log(q)).sum(-1) for q in p.values()])
    np.testing.assert_allclose(jax.jit(reg.entropy)(x), entropies.mean(), rtol=1e-12)
    np.testing.assert_allclose(jax.jit(reg.entropy)(jnp.zeros((3, 8))), np.log(8), rtol=1e-12)
    with pytest.raises(ValueError, match="the norm is 1 or 2"):
        reg.zero_one(x, norm=3)
    with pytest.raises(ValueError, match="a leaf is a scalar"):
        reg.beta_decay(jnp.zeros(()))


def test_penalised_follows_the_outer_step(x64):
    loss = reg.penalised(lambda x, y: jnp.sum(y), (reg.beta_decay, 2.0), (jnp.sum, lambda step: 0.5 * step))
    problem = Problem(loss, lambda x, y: jnp.sum((y - x) ** 2), upper_data=data.Keyed())
    x, y = np.array([0.3, -0.2]), np.array([1.0, 2.0])
    found = [problem.draw_upper(as_step_key(0, k))(x, y) for k in (0, 3)]
    base = 3 + 2 * np.log(np.exp(x).sum())
    np.testing.assert_allclose(found, [base, base + 1.5 * x.sum()], rtol=1e-12)
    history = solve(problem, x, y, DARTS(1), steps=3).history
    np.testing.assert_allclose(history["upper_loss"][0], base, rtol=1e-12)
    plain = reg.penalised(lambda x, y, batch: batch * y, (reg.entropy, 1.0))  # numbers alone need no key
    np.testing.assert_allclose(plain(jnp.zeros(4), 3.0, 2.0), 6 + np.log(4), rtol=1e-12)
    with pytest.raises(TypeError, match="takes pairs"):
        reg.penalised(lambda x, y: 0.0, reg.entropy)
    with pytest.raises(ValueError, match="penalised needs the step's key"):
        loss(x, y)
