"""Problems with closed-form solutions that several test files share, and the one way to float64.

Those of many agents and clients are in distributed_problems.py, which processes of their own import too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Float64 within the block. A test takes the fixture `x64`; this is for fixtures of a module and for hypothesis."""
    before = bool(jax.config.jax_enable_x64)
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _weights(y: Any) -> Any:
    return y["w"] if isinstance(y, dict) else y


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Ridge regression with one penalty exp(x_j) per feature: y*(x) = (A'A/n + diag exp x)^{-1} A't/n.

    `y` is the vector of weights or {"w": the vector}.

    Attributes:
      train, validation: (A, t) of each level.
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def make(features: int, samples: int = 40, noise: float = 0.3, seed: int = 0) -> Ridge:
        rng = np.random.default_rng(seed)
        w = rng.normal(size=features)
        a, b = rng.normal(size=(samples, features)), rng.normal(size=(samples, features))
        train, validation = ((m, m @ w + noise * rng.normal(size=samples)) for m in (a, b))
        return Ridge(train, validation)

    @staticmethod
    def lower(x: Any, y: Any, batch: Any) -> Any:
        a, t = batch
        w = _weights(y)
        return jnp.mean((a @ w - t) ** 2) / 2 + jnp.sum(jnp.exp(x) * w**2) / 2

    @staticmethod
    def upper(x: Any, y: Any, batch: Any) -> Any:
        a, t = batch
        return jnp.mean((a @ _weights(y) - t) ** 2) / 2 + 0.01 * jnp.sum(x**2)

    @property
    def problem(self) -> Problem:
        return Problem(upper=self.upper, lower=self.lower, upper_data=self.validation, lower_data=self.train)

    def hessian(self, x: Any) -> Any:
        a, t = self.train
        return a.T @ a / len(t) + jnp.diag(jnp.exp(x))

    def solution(self, x: Any) -> Any:
        a, t = self.train
        return jnp.linalg.solve(self.hessian(x), a.T @ t / len(t))

    def objective(self, x: Any) -> Any:
        """F(x, y*(x)); its `jax.grad` is the hypergradient."""
        return self.upper(x, self.solution(x), self.validation)
