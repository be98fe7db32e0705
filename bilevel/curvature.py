"""How curved a function is: eigenvalues of its Hessian, spectral norms, and estimates that follow a run.

| wanted | function | products |
|---|---|---|
| both ends of a symmetric map's spectrum | `extreme_eigenvalues` | `steps`, or one per unknown |
| the largest eigenvalue of F_xx, as a metric of `solve` | `dominant_eigenvalue` | the same |
| norms of a symmetric map, a Hessian, a Jacobian | `spectral_norm`, `hessian_norm`, `jacobian_norm` | `steps` |
| a spectral norm kept up to date along a run | `secant_estimate`, `probe_estimate` | none, one in ten steps |

Norms and ends of spectra by iteration are estimates from inside, within a few per cent as a rule: whoever sets a step
by one leaves that much room. All functions are pure and run under `jit`, `vmap` and `scan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel import _compiling
from bilevel._arguments import explained
from bilevel.derivatives import linearised, norm
from bilevel.typing import PyTree, Scalar

LinearMap = Callable[[PyTree], PyTree]

__all__ = [
    "dominant_eigenvalue", "ends_of_spectrum", "extreme_eigenvalues", "hessian_norm", "jacobian_norm", "least_curved",
    "lower_curvature", "lower_spectrum", "probe_estimate", "ritz_pairs",
    "secant_estimate", "spectral_norm", "unit_direction",
]  # fmt: skip


@explained
def extreme_eigenvalues(
    matvec: LinearMap, like: PyTree, key: Any = 0, steps: int = 40, *, dense: int = 64, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The algebraically smallest and largest eigenvalue of a symmetric linear map on pytrees.

    For at most `dense` unknowns the map is made a matrix, by one product each, and the answer is exact. Above, it is
    that of `steps` steps (a product each) of the Lanczos process with full reorthogonalisation from a random q_0,

        beta_{j+1} q_{j+1} = A q_j - alpha_j q_j - beta_j q_{j-1};

    the smallest is an upper, the largest a lower bound, usually close (extreme eigenvalues converge first).

    Args:
      matvec: v -> A v with A symmetric; may be indefinite.
      like: a pytree with the shapes and dtypes of v.
      key: seed or key of the random start.
      chunk: columns of the matrix that are computed at once (with more of them memory grows and time falls); None: all.

    Reference: Golub, Van Loan, "Matrix Computations", chapter 10.
    """
    return _ends(_reduced(matvec, like, key, steps, dense, chunk))


def _ends(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = jnp.linalg.eigvalsh(matrix)
    return values[0], values[-1]


def _reduced(matvec: LinearMap, like: PyTree, key: Any, steps: int, dense: int, chunk: int | None) -> jax.Array:
    """A symmetric matrix that has the eigenvalues which `extreme_eigenvalues` returns: the map's, or Lanczos's."""
    flat, unravel = ravel_pytree(like)
    d, eps = flat.size, jnp.finfo(flat.dtype).eps
    multiply = lambda v: ravel_pytree(matvec(unravel(v)))[0].astype(flat.dtype)  # noqa: E731
    if d <= dense:
        columns = jnp.eye(d, dtype=flat.dtype)
        matrix = jax.vmap(multiply)(columns) if chunk is None else jax.lax.map(multiply, columns, batch_size=chunk)
        return (matrix + matrix.T) / 2
    steps = min(steps, d)
    start = jax.random.normal(_key(key), (d,), flat.dtype)

    def step(j: jax.Array, carry: Any) -> Any:
        basis, alpha, beta = carry
        w = multiply(basis[j])
        a = jnp.vdot(basis[j], w)
        for _ in range(2):  # against all of the basis, twice: rounding would bring copies of found vectors
            w = w - basis.T @ (basis @ w)
        b = jnp.linalg.norm(w)
        broke = b <= 10 * eps * (jnp.abs(a) + 1e-30)
        following = jnp.where(broke, 0, w / jnp.where(broke, 1, b))
        return basis.at[j + 1].set(following), alpha.at[j].set(a), beta.at[j].set(jnp.where(broke, 0, b))

    basis = jnp.zeros((steps + 1, d), flat.dtype).at[0].set(start / jnp.linalg.norm(start))
    zeros = jnp.zeros(steps, flat.dtype)
    basis, alpha, beta = jax.lax.fori_loop(0, steps, step, (basis, zeros, zeros))
    used = jnp.linalg.norm(basis[:steps], axis=1) > 0.5  # after a breakdown the rest of the basis is zero
    off = jnp.diag(jnp.where(used[1:], beta[:-1], 0), 1)
    return jnp.diag(jnp.where(used, alpha, alpha[0])) + off + off.T


def lower_curvature(problem: Any, x: PyTree, y: PyTree, dense: int = 64) -> jax.Array:
    """A symmetric matrix whose extreme eigenvalues are those of f_yy(x, y) of a `Problem` on all samples, or near."""
    return _reduced(linearised(problem.full_lower(), x, y).hvp, y, 0, 40, dense, None)


_curvature = _compiling.jit(lower_curvature, static_argnames=("dense",))


def lower_spectrum(problem: Any, x: PyTree, y: PyTree, dense: int = 64) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of f_yy(x, y) of a `Problem` on all samples, as `extreme_eigenvalues`."""
    return ends_of_spectrum(_curvature(problem, x, y, dense=dense))


def ends_of_spectrum(matrix: Any) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of a symmetric matrix, on the host; NaN where an entry is not finite.

    On the host because the first programme with an eigenvalue routine makes jaxlib import SciPy's.
    """
    if isinstance(matrix, jax.Array) and not (matrix.is_fully_addressable or matrix.is_fully_replicated):
        low, high = jax.jit(_ends)(matrix)  # rows of it are on other processes
        return float(low), float(high)
    wide = np.asarray(matrix, np.float64)
    if not np.isfinite(wide).all():
        return float("nan"), float("nan")
    eigenvalues = np.linalg.eigvalsh(wide)
    return float(eigenvalues[0]), float(eigenvalues[-1])


def ritz_pairs(
    product: Callable[[np.ndarray], np.ndarray], size: int, steps: int = 12
) -> tuple[np.ndarray, np.ndarray] | None:
    """Approximate eigenvalues of a symmetric map on vectors of the host, rising, and their unit vectors as rows.

    By Lanczos's process as in `extreme_eigenvalues`, with `steps` products, which may be differences of gradients; None
    where one of them is not finite. Exact, and all of them, where `size` is no more than `steps`.
    """
    basis = np.zeros((0, size))
    images, vector = [], np.random.default_rng(13).standard_normal(size)
    for _ in range(min(steps, size)):
        whole = np.linalg.norm(vector)
        for _ in range(2):
            vector = vector - basis.T @ (basis @ vector)
        left = np.linalg.norm(vector)
        if not left > 1e-9 * whole:
            break
        basis = np.concatenate([basis, vector[None] / left])
        vector = np.asarray(product(basis[-1]), np.float64)
        if not np.isfinite(vector).all():
            return None
        images.append(vector)
    reduced = basis @ np.stack(images, axis=1)
    values, vectors = np.linalg.eigh((reduced + reduced.T) / 2)
    return values, vectors.T @ basis


def least_curved(
    product: Callable[[np.ndarray], np.ndarray], size: int, steps: int = 12
) -> tuple[float, np.ndarray] | None:
    """The first of `ritz_pairs`: about the least eigenvalue, from above, and its unit vector."""
    pairs = ritz_pairs(product, size, steps)
    return None if pairs is None else (float(pairs[0][0]), pairs[1][0])


@explained
def dominant_eigenvalue(
    loss: Callable[..., Scalar],
    *,
    weight_decay: float = 0.0,
    dense: int = 256,
    chunk: int = 8,
    steps: int = 64,
    key: int = 0,
) -> Callable[..., Scalar]:
    """A metric: the algebraically largest eigenvalue of the Hessian of `loss` in x, at the current y.

        solve(..., metrics={"eigenvalue": (dominant_eigenvalue(validation_loss), batch)}, metrics_every=100)

    It is the direct second derivative F_xx(x, y), in all leaves of x together, and not the curvature of x -> F(x,
    y*(x)): the sharpness that RobustDARTS tracks, whose growth announces that an architecture search degenerates. It
    costs one gradient, and one Hessian-vector product per unknown or Lanczos step. A negative eigenvalue of larger
    modulus is not mistaken for it. Equal arguments give equal functions, which share a compiled program.

    Args:
      loss: the upper loss, `F(x, y)` or `F(x, y, batch)`; the metric is called likewise.
      weight_decay: of the upper variable; the Hessian of (weight_decay / 2) |x|^2 adds it to every eigenvalue, as in
        the authors' logs (1e-3).
      dense, chunk, steps, key: as in `extreme_eigenvalues`.

    Reference: Zela et al., "Understanding and Robustifying Differentiable Architecture Search", ICLR 2020.
    """
    if not callable(loss):
        raise TypeError(f"dominant_eigenvalue takes a loss, a function F(x, y[, batch]), not {type(loss).__name__}.")
    return _DominantEigenvalue(loss, weight_decay, dense, chunk, steps, key)


@dataclasses.dataclass(frozen=True)
class _DominantEigenvalue:
    loss: Callable[..., Scalar]
    weight_decay: float
    dense: int
    chunk: int
    steps: int
    key: int

    def __call__(self, x: PyTree, y: PyTree, *batch: Any) -> jax.Array:
        _, hvp = jax.linearize(jax.grad(lambda x: self.loss(x, y, *batch)), x)
        largest = extreme_eigenvalues(hvp, x, self.key, self.steps, dense=self.dense, chunk=self.chunk)[1]
        return largest + self.weight_decay


def spectral_norm(
    product: LinearMap, example: PyTree, steps: int = 30, *, key: Any = 17, stacked: bool = False
) -> jax.Array:
    """The largest |eigenvalue| of a symmetric linear map A on pytrees, by power iteration from a fixed random start.

        v <- A v / |v|,    `steps` times; then |v|, at most the true norm, up to rounding

    Args:
      product: v -> A v; may be indefinite.
      example: a pytree with the shapes and dtypes of v.
      key: seed or key of the random start.
      stacked: A acts on each entry of the leaves' leading axis by itself (each agent's Hessian, stacked), and the
        answer is one norm per entry.
    """
    length = jax.vmap(norm) if stacked else norm

    def power(_: Any, v: PyTree) -> PyTree:
        scale = length(v)
        scale = jnp.maximum(scale, jnp.finfo(scale.dtype).tiny ** 0.5)  # a map that is zero stays zero
        widened = lambda a: scale.reshape(scale.shape + (1,) * (a.ndim - scale.ndim)).astype(a.dtype)  # noqa: E731
        return product(jax.tree.map(lambda a: a / widened(a), v))

    return length(jax.lax.fori_loop(0, steps, power, optax.tree.random_like(_key(key), example, jax.random.normal)))


def hessian_norm(fn: Callable[[PyTree], Scalar], at: PyTree, steps: int = 30) -> Scalar:
    """The spectral norm of the Hessian of `fn` at a point: |fn''(u)|, the least L of a gradient that is L-Lipschitz."""
    return spectral_norm(jax.linearize(jax.grad(fn), at)[1], at, steps)


def jacobian_norm(fn: LinearMap, at: PyTree, steps: int = 30) -> jax.Array:
    """The spectral norm of the derivative J of a map of pytrees at a point: the root of |J'J|."""
    push = jax.linearize(fn, at)[1]
    pull = jax.linear_transpose(push, at)
    return jnp.sqrt(spectral_norm(lambda v: pull(push(v))[0], at, steps))


def unit_direction(like: PyTree, key: Any = 23) -> PyTree:
    """A random direction of norm one, shaped like `like`; by default always the same."""
    v = optax.tree.random_like(_key(key), like, jax.random.normal)
    return optax.tree.cast_like(optax.tree.scale(1 / norm(v), v), v)


def secant_estimate(estimate: Any, floor: Any, change: PyTree, moved: Any, size: Any, forget: float = 0.99) -> Scalar:
    """A curvature estimate L brought up to date with what the last move has shown (full batches only).

        L <- max(forget L + (1 - forget) L_0,  |g(u_new) - g(u)| / |u_new - u|)

    It relaxes towards L_0 (`floor`), the estimate at the start, where nothing larger is seen. Moves below the
    resolution of the variables' dtype say nothing and are passed over.

    Args:
      change: the difference of the gradients, a pytree.
      moved, size: |u_new - u| and |u|, by which the move is judged.
    """
    resolved = moved > 1e4 * jnp.finfo(jnp.result_type(moved)).eps * size
    observed = norm(change) / jnp.where(resolved, moved, 1.0)
    relaxed = jnp.maximum(forget * estimate + (1 - forget) * floor, observed)
    return jnp.where(resolved & jnp.isfinite(observed), relaxed, estimate)


def probe_estimate(
    fn: Callable[[PyTree], jax.Array], at: PyTree, k: Any, estimate: Any, direction: PyTree, every: int = 10
) -> tuple[Any, PyTree]:
    """A curvature estimate L and its direction d after one more power step on the Hessian of `fn` at u.

        p = fn''(u) d;    L <- max(|p|, 0.97 L);    d <- p / |p|

    Curvature moves along a run (that of e^x does) in directions that a slowly moving iterate does not explore: the
    differences of its gradients stay small until a step is far too long.

    Args:
      k: the run's step; at multiples of `every` there is a probe, and otherwise nothing changes.
      direction: d, of norm one and shaped like u: `unit_direction(u)` at the start.
    """

    def probe(_: Any) -> tuple[Any, PyTree]:
        product = jax.jvp(jax.grad(fn), (at,), (direction,))[1]
        size = norm(product)
        usable = jnp.isfinite(size) & (size > 1e-12)
        turned = jax.tree.map(lambda p, d: jnp.where(usable, p / jnp.where(usable, size, 1.0), d), product, direction)
        return jnp.where(usable, jnp.maximum(size, 0.97 * estimate), estimate).astype(jnp.result_type(estimate)), turned

    return jax.lax.cond(jnp.asarray(k) % every == 0, probe, lambda _: (estimate, direction), None)


def _key(key: Any) -> jax.Array:
    return jax.random.key(key) if isinstance(key, int) else key
