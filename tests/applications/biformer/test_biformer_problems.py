"""Cleaning and fine-tuning: their losses written out, and the records that they return."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel.applications import Application
from bilevel.applications.biformer import cleaning, fine_tuning, prepare, small_biformer
from bilevel.integrations.flax import from_nnx

RNG = np.random.default_rng(0)


def split(n):
    return RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8), RNG.integers(0, 10, n).astype(np.int32)


@pytest.fixture(scope="module")
def network():
    """A net of the smallest blocks: full attention in every stage."""
    return small_biformer(embed_dim=(8, 8, 8, 8), topks=(-2, -2, -2, -2))


def test_cleaning_weighs_each_sample_and_says_what_it_measures(network):
    train, clean, test = split(6), split(4), split(5)
    app = cleaning(train, clean, model=network, test=test, batch=6, decay=0.1)
    assert isinstance(app, Application) and "cleaning" in repr(app) and app.source
    x = jnp.asarray(RNG.standard_normal(6), jnp.float32)
    entropy = lambda y: optax.softmax_cross_entropy_with_integer_labels(
        app.apply(y, prepare(jnp.asarray(train[0])), train=True), train[1]
    )
    by_hand = lambda y: (app.weights(x) * entropy(y)).mean() + 0.05 * optax.tree.norm(y, squared=True)
    both = jax.jit(lambda y: (by_hand(y), app.problem.full_lower()(x, y)))
    np.testing.assert_allclose(*both(app.y0), rtol=1e-5)
    app.problem.validate(app.x0, app.y0)
    measure, held = app.metrics["accuracy"]
    assert held is test and jax.eval_shape(measure, app.x0, app.y0, jax.tree.map(jnp.asarray, held)).shape == ()
    assert cleaning(train, clean, model=network).metrics["accuracy"][1] is clean
    assert cleaning(train, clean, model=network, weigh="classes").x0.shape == (train[1].max() + 1,)


def test_fine_tuning_starts_at_the_pretrained_network_and_moves_by_its_rates(network):
    train, validation = split(6), split(4)
    pretrained, apply = from_nnx(network)
    app = fine_tuning(apply, pretrained, train, validation, rate=2.0, decay=0.5)
    assert isinstance(app, Application) and "fine-tuning" in repr(app)
    assert app.metrics["accuracy"][1] is validation
    jax.tree.map(np.testing.assert_array_equal, app.parameters(app.x0, app.y0), pretrained)
    ones = jax.tree.map(jnp.ones_like, app.y0)
    moved = app.parameters(app.x0, ones)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 2.0, rtol=1e-6), moved, pretrained)
    lower, upper = app.problem.full_lower(), app.problem.full_upper()
    values = jax.jit(lambda y: (lower(app.x0, y), upper(app.x0, y)))(ones)

    @jax.jit
    def by_hand(params):
        entropy = lambda images, labels: optax.softmax_cross_entropy_with_integer_labels(
            apply(params, prepare(jnp.asarray(images)), train=True), labels
        ).mean()
        return entropy(*train), entropy(*validation)

    training, validating = by_hand(moved)
    count = sum(leaf.size for leaf in jax.tree.leaves(pretrained))
    np.testing.assert_allclose(values[0], training + 0.5 * 0.5 * 4.0 * count, rtol=1e-5)
    np.testing.assert_allclose(values[1], validating, rtol=2e-4)  # float32, normalised over four images
