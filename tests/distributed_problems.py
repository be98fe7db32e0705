"""Heterogeneous quadratics with closed-form solutions, for the tests of decentralised and federated solvers.

Agent i:  g_i(x, y) = y' A_i y / 2 - y' (B_i x + b_i),    f_i(x, y) = |y - c_i|^2 / 2 + rho |x|^2 / 2 + d_i' x,
so y*(x) = A^-1 (B x + b) with the means A, B, b, and x* solves a linear system in the means.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, data

RHO = 0.5


def upper(x: jax.Array, y: jax.Array, batch: Any) -> jax.Array:
    c, d = batch
    return jnp.mean(jnp.sum((y - c) ** 2, axis=-1) / 2 + d @ x) + RHO * jnp.sum(x**2) / 2


def lower(x: jax.Array, y: jax.Array, batch: Any) -> jax.Array:
    A, B, b = batch
    return jnp.mean(jnp.einsum("i,sij,j->s", y, A, y) / 2 - (B @ x + b) @ y)


def arrays(n: int, het: float, p: int = 3, q: int = 4, samples: int = 1, noise: float = 0.0, seed: int = 0) -> Any:
    """((c, d), (A, B, b)) with leading axes (n, samples): a common part, `het` times each agent's own, `noise` times
    each sample's."""
    rng = np.random.default_rng(seed)

    def parts(*shape: int) -> np.ndarray:
        common, own = rng.normal(size=(1, 1, *shape)), rng.normal(size=(n, 1, *shape))
        own = own - own.mean(axis=0) if n > 1 else 0 * own
        sample = rng.normal(size=(n, samples, *shape))
        return common + het * own + noise * (sample - sample.mean(axis=1, keepdims=True))

    root = parts(q, q) / np.sqrt(q)
    A = np.einsum("...ij,...kj->...ik", root, root) / (1 + het**2 + noise**2) + 0.5 * np.eye(q)
    found = ((parts(q), parts(p)), (A, parts(q, p) / np.sqrt(p), parts(q)))
    dtype = jnp.zeros(()).dtype
    return jax.tree.map(lambda a: a.astype(dtype), found)


def quadratic(n: int, het: float = 1.0, size: int | None = None, **options: Any) -> tuple[Problem, tuple[int, int]]:
    """The problem and the sizes of x and y."""
    up, low = arrays(n, het, **options)
    problem = Problem(upper, lower, data.Agents(up, size), data.Agents(low, size))
    return problem, (up[1].shape[-1], up[0].shape[-1])


def solution(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """x* and y*(x*), in float64."""
    means = [
        np.asarray(a, np.float64).mean(axis=(0, 1)) for a in (*problem.upper_data.arrays, *problem.lower_data.arrays)
    ]
    c, d, A, B, b = means
    M, m = np.linalg.solve(A, B), np.linalg.solve(A, b)  # y*(x) = M x + m
    x = np.linalg.solve(M.T @ M + RHO * np.eye(len(d)), M.T @ (c - m) - d)
    return x, M @ x + m


def hypergradient(problem: Problem, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """F_x - J H^-1 F_y of the mean losses at any (x, y), in float64."""
    c, d, A, B, _ = (
        np.asarray(a, np.float64).mean(axis=(0, 1)) for a in (*problem.upper_data.arrays, *problem.lower_data.arrays)
    )
    return RHO * x + d + B.T @ np.linalg.solve(A, y - c)
