"""Where parameters start: as in PyTorch, drawn on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def _initialiser(on_host: Callable[..., np.ndarray], traced: Callable[..., Array]) -> Callable[..., Array]:
    """Draw on the host where the key is at hand: JAX would compile a program for each of a model's hundred shapes."""

    def initialise(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        if isinstance(key, jax.core.Tracer):
            return traced(key, shape, dtype)
        data = key if jnp.issubdtype(key.dtype, jnp.unsignedinteger) else jax.random.key_data(key)
        generator = np.random.default_rng(np.asarray(data).ravel().tolist())
        return jnp.asarray(on_host(generator, shape), dtype)

    return initialise


def normal(deviation: float) -> Callable[..., Array]:
    """Normal numbers of mean 0."""
    return _initialiser(
        lambda generator, shape: deviation * generator.standard_normal(shape, np.float32),
        jax.nn.initializers.normal(deviation),
    )


def uniform_fan_in(fan_in: int) -> Callable[..., Array]:
    """PyTorch's default for convolutions: U(-1/sqrt(fan in), 1/sqrt(fan in)), for kernels and biases."""
    bound = 1.0 / math.sqrt(fan_in)
    return _initialiser(
        lambda generator, shape: generator.uniform(-bound, bound, shape),
        lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
    )
