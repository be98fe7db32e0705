"""Contrastive losses of two views of a batch: SimSiam's, BYOL's and SimCLR's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def normalised(z: Array) -> Array:
    """z / |z| along the last axis; zero, with the derivative zero, where z is zero."""
    square = jnp.sum(z * z, -1, keepdims=True)
    nonzero = square > 0
    return jnp.where(nonzero, z * jax.lax.rsqrt(jnp.where(nonzero, square, 1)), 0)


def cosine(a: Array, b: Array) -> Array:
    """The cosine similarity along the last axis, (..., d) and (..., d) -> (...)."""
    return jnp.sum(normalised(a) * normalised(b), -1)


def simsiam(p1: Array, p2: Array, z1: Array, z2: Array) -> Array:
    """SimSiam's loss, -1/2 [cos(p1, sg z2) + cos(p2, sg z1)], the mean over the batch.

    Args:
        p1, p2: predictions of the two views (batch, d).
        z1, z2: projections, which are held constant (sg).

    Reference: Chen, He, "Exploring Simple Siamese Representation Learning", CVPR 2021.
    """
    z1, z2 = jax.lax.stop_gradient((z1, z2))
    return -0.5 * jnp.mean(cosine(p1, z2) + cosine(p2, z1))


def byol(q1: Array, q2: Array, target1: Array, target2: Array) -> Array:
    """BYOL's loss, 2 - 2 cos(q, sg target of the other view), the mean over both views and the batch.

    Args:
        q1, q2: the online network's predictions of the two views (batch, d).
        target1, target2: the target network's projections of them.

    Reference: Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020 (which sums over the two views).
    """
    target1, target2 = jax.lax.stop_gradient((target1, target2))
    return 2 - jnp.mean(cosine(q1, target2) + cosine(q2, target1))


def nt_xent(z1: Array, z2: Array, temperature: float | Array = 0.5) -> Array:
    """SimCLR's loss: the cross entropy of finding a view's partner among all other views of the batch.

        mean over i of   -log exp(cos(z_i, z_j) / tau) / sum over k != i of exp(cos(z_i, z_k) / tau)

    Args:
        z1, z2: projections of the two views (batch, d); i runs over both.
        temperature: tau > 0.

    Reference: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning", ICML 2020.
    """
    z, n = normalised(jnp.concatenate([z1, z2])), len(z1)
    scores = z @ z.T / temperature
    scores = jnp.where(jnp.eye(2 * n, dtype=bool), -jnp.inf, scores)
    partner = jnp.roll(jnp.arange(2 * n), n)
    return -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(2 * n), partner])
