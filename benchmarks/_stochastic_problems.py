"""The problems of benchopt's benchmark_bilevel, once as a `bilevel.Problem` and once as the functions its solvers call.

Data are real where the caller passes them, otherwise synthetic with the same shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, data, datasets


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem of the suite.

    Attributes:
      name: shown in the tables; says whether the data are synthetic.
      problem: for this library.
      x0, y0: the start.
      lower_fn, upper_fn: `(y, x, start, batch_size)`, closing over the data, as the peer's solvers want them.
      lower_count, upper_count: samples of each level.
      measure: `(x, y) -> float`, the suite's figure of merit.
      measured: its name.
      goal: where it is an error, the value to race to.
    """

    name: str
    problem: Problem
    x0: Any
    y0: Any
    lower_fn: Callable[..., Any]
    upper_fn: Callable[..., Any]
    lower_count: int
    upper_count: int
    measure: Callable[[Any, Any], float]
    measured: str
    goal: float = 0.0


def peer_function(loss: Callable[..., Any], arrays: Any) -> Callable[..., Any]:
    """`loss(x, y, batch)` in the peer's form: (y, x, start, batch_size) with the data closed over."""

    def function(y: Any, x: Any, start: Any = 0, batch_size: int = 1) -> Any:
        batch = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, batch_size), arrays)
        return loss(x, y, batch)

    return jax.jit(function, static_argnames="batch_size")


def _case(
    name: str,
    upper: Any,
    lower: Any,
    upper_arrays: Any,
    lower_arrays: Any,
    x0: Any,
    y0: Any,
    batch: int,
    measure: Any,
    measured: str,
) -> Case:
    upper_arrays, lower_arrays = (jax.tree.map(jnp.asarray, a) for a in (upper_arrays, lower_arrays))
    count = lambda arrays: jax.tree.leaves(arrays)[0].shape[0]
    problem = Problem(
        upper=upper,
        lower=lower,
        upper_data=data.Minibatches(upper_arrays, batch, blocks=True),
        lower_data=data.Minibatches(lower_arrays, batch, blocks=True),
    )
    return Case(
        name,
        problem,
        jnp.asarray(x0),
        jnp.asarray(y0),
        peer_function(lower, lower_arrays),
        peer_function(upper, upper_arrays),
        count(lower_arrays),
        count(upper_arrays),
        measure,
        measured,
    )


# ---------------------------------------------------------------- simulated quadratics


def _quadratic(y: Any, x: Any, hess_y: Any, hess_x: Any, cross: Any, linear_y: Any, linear_x: Any) -> Any:
    return 0.5 * y @ (hess_y @ y) + 0.5 * x @ (hess_x @ x) + x @ cross @ y + linear_y @ y + linear_x @ x


def quadratic_loss(x: Any, y: Any, batch: Any) -> Any:
    """The mean of the batch's quadratics in (y, x)."""
    return jnp.mean(jax.vmap(_quadratic, in_axes=(None, None, 0, 0, 0, 0, 0))(y, x, *batch))


def _rank_one(rng: np.random.Generator, count: int, dim: int, low: float, high: float) -> np.ndarray:
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    root = (basis * np.sqrt(np.geomspace(low, high, dim))) @ basis.T
    features = rng.standard_normal((count, dim)) @ root
    return features[:, :, None] * features[:, None, :]


def _quadratics(
    rng: np.random.Generator, count: int, d: int, p: int, mu: float = 0.1, coupling: float = 0.1
) -> tuple[np.ndarray, ...]:
    rank = min(d, p)
    left = np.linalg.qr(rng.standard_normal((p, p)))[0][:, :rank]
    right = np.linalg.qr(rng.standard_normal((d, d)))[0][:, :rank]
    noise = rng.standard_normal((count, d))
    values = np.geomspace(mu, coupling, rank) if coupling != mu else np.full(rank, coupling)
    cross = ((noise @ right) * values @ left.T)[:, :, None] * noise[:, None, :]
    hess_y, hess_x = _rank_one(rng, count, d, mu, 1.0), _rank_one(rng, count, p, mu, 1.0)
    arrays = hess_y, hess_x, cross, rng.standard_normal((count, d)), rng.standard_normal((count, p))
    return tuple(a.astype(np.float32) for a in arrays)


def simulated(
    lower_count: int = 1024, upper_count: int = 1024, d: int = 100, p: int = 100, batch: int = 64, seed: int = 2442
) -> Case:
    """Means of rank-one quadratics whose mean Hessian has its spectrum log-spaced in [0.1, 1]."""
    rng = np.random.default_rng(seed)
    while True:
        lower, upper = _quadratics(rng, lower_count, d, p), _quadratics(rng, upper_count, d, p)
        f, g = ([a.mean(0).astype(np.float64) for a in arrays] for arrays in (upper, lower))
        jacobian = -np.linalg.solve(g[0], g[2].T)
        mixed = f[2] @ jacobian
        hessian = jacobian.T @ f[0] @ jacobian + f[1] + mixed + mixed.T
        if np.linalg.eigvalsh(hessian).min() > 1e-3:
            break

    def measure(x: Any, y: Any) -> float:
        x = np.asarray(x, np.float64)
        best = np.linalg.solve(g[0], -g[3] - g[2].T @ x)
        v = -np.linalg.solve(g[0], f[0] @ best + f[2].T @ x + f[3])
        return float(np.sum((f[1] @ x + f[2] @ best + f[4] + g[2] @ v) ** 2))

    name = f"simulated, n={lower_count}, d={d}, p={p}"
    return _case(
        name,
        quadratic_loss,
        quadratic_loss,
        upper,
        lower,
        np.full(p, -2.0, np.float32),
        np.zeros(d, np.float32),
        batch,
        measure,
        "|grad h|^2",
    )


# ---------------------------------------------------------------- logistic regression with a penalty per feature


def logistic_upper(x: Any, y: Any, batch: Any) -> Any:
    """The logistic loss on a validation batch."""
    features, labels = batch
    return jnp.mean(jax.nn.softplus(-labels * (features @ y)))


def logistic_lower(x: Any, y: Any, batch: Any) -> Any:
    """The logistic loss on a training batch and the penalty sum exp(x_j) y_j^2 / 2."""
    return logistic_upper(x, y, batch) + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def logistic(
    train: Any = None, validation: Any = None, batch: int = 64, seed: int = 2442, name: str | None = None
) -> Case:
    """ijcnn1's shape unless data are given.

    It has 22 features, 49,984 training and 91,648 validation samples (multiples of the batch).
    """
    rng = np.random.default_rng(seed)
    if train is None:
        truth = rng.standard_normal(22).astype(np.float32)

        def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
            features = rng.standard_normal((count, 22)).astype(np.float32)
            return features, np.sign(features @ truth + 2 * rng.standard_normal(count)).astype(np.float32)

        train, validation = sample(49_984), sample(91_648)
        name = "ijcnn1-shaped (synthetic)"
    train, validation = (jax.tree.map(lambda a: a[: len(a) // batch * batch], t) for t in (train, validation))
    dim = train[0].shape[1]
    x0, y0 = np.log(rng.uniform(size=dim)).astype(np.float32), rng.standard_normal(dim).astype(np.float32)
    return _case(
        name or "logistic",
        logistic_upper,
        logistic_lower,
        validation,
        train,
        x0,
        y0,
        batch,
        _logistic_measure(train, validation),
        "|grad h|^2",
    )


def _logistic_measure(train: Any, validation: Any) -> Callable[[Any, Any], float]:
    """|grad h(x)|^2 by Newton's method and a dense solve in float64."""
    features, labels = (np.asarray(a, np.float64) for a in train)
    held_features, held_labels = (np.asarray(a, np.float64) for a in validation)
    last = [np.zeros(features.shape[1])]

    def measure(x: Any, y: Any) -> float:
        weight = np.exp(np.asarray(x, np.float64))
        if not np.isfinite(weight).all():
            return float("nan")
        y = last[0]
        for _ in range(50):
            s = 1 / (1 + np.exp(labels * (features @ y)))
            gradient = -(features.T @ (labels * s)) / len(labels) + weight * y
            hessian = (features.T * (s * (1 - s))) @ features / len(labels) + np.diag(weight)
            step = np.linalg.solve(hessian, gradient)
            y = y - step
            if np.abs(step).max() < 1e-12:
                break
        last[0] = y
        held = 1 / (1 + np.exp(held_labels * (held_features @ y)))
        v = -np.linalg.solve(hessian, -(held_features.T @ (held_labels * held)) / len(held_labels))
        return float(np.sum((weight * y * v) ** 2))

    return measure


# ---------------------------------------------------------------- softmax regression: a penalty per class; cleaning


def _softmax_losses(weights: Any, features: Any, targets: Any) -> Any:
    logits = features @ weights.reshape(features.shape[1], targets.shape[1])
    return jax.nn.logsumexp(logits, axis=1) - jnp.sum(logits * targets, axis=1)


def softmax_upper(x: Any, y: Any, batch: Any) -> Any:
    """The cross entropy on a validation batch."""
    return jnp.mean(_softmax_losses(y, *batch))


def softmax_lower(x: Any, y: Any, batch: Any) -> Any:
    """The cross entropy on a training batch and the penalty sum_c exp(x_c) |y_c|^2 / 2."""
    weights = y.reshape(batch[0].shape[1], batch[1].shape[1])
    return jnp.mean(_softmax_losses(y, *batch)) + 0.5 * jnp.exp(x) @ jnp.sum(weights**2, axis=0)


def cleaning_lower(x: Any, y: Any, batch: Any) -> Any:
    """The cross entropy weighted by sigmoid(x_i), and 0.2 |y|^2."""
    features, targets, rows = batch
    kept = jax.nn.sigmoid(jax.lax.dynamic_slice_in_dim(x, rows[0], len(rows)))
    return jnp.mean(kept * _softmax_losses(y, features, targets)) + 0.2 * jnp.sum(y**2)


def _synthetic_classes(
    rng: np.random.Generator, count: int, dim: int, classes: int, centres: np.ndarray, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, classes, count)
    return (centres[labels] + noise * rng.standard_normal((count, dim))).astype(np.float32), labels


def _error(features: Any, labels: Any, classes: int) -> Callable[[Any, Any], float]:
    features, labels = jnp.asarray(features), jnp.asarray(labels)
    predict = jax.jit(lambda y, features, labels: jnp.mean(jnp.argmax(features @ y.reshape(-1, classes), 1) != labels))
    return lambda x, y: float(predict(y, features, labels))


def covtype(lower_count: int = 371_840, upper_count: int = 92_928, batch: int = 64, seed: int = 2442) -> Case:
    """covtype's shape: 54 features, 7 classes, a penalty per class."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((7, 54)) * 0.4
    (features, labels), (held, held_labels) = (
        _synthetic_classes(rng, n, 54, 7, centres, 1.0) for n in (lower_count, upper_count)
    )
    one_hot = np.eye(7, dtype=np.float32)
    return _case(
        "covtype-shaped (synthetic)",
        softmax_upper,
        softmax_lower,
        (held, one_hot[held_labels]),
        (features, one_hot[labels]),
        np.full(7, -2.0, np.float32),
        np.zeros(7 * 54, np.float32),
        batch,
        _error(held, held_labels, 7),
        "validation error",
    )


def fashion_mnist() -> tuple[np.ndarray, np.ndarray] | None:
    """Fashion-MNIST as rows of pixels and labels, where the loader finds it (it has MNIST's shape)."""
    try:
        images, labels = datasets.fashion_mnist("train")
    except datasets.DatasetNotFoundError:
        return None
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels


def cleaning(
    images: Any = None,
    lower_count: int = 20_032,
    upper_count: int = 5_056,
    corruption: float = 0.5,
    batch: int = 64,
    seed: int = 32,
) -> Case:
    """Label cleaning with softmax regression at MNIST's shape; `images` = (features, labels), or synthetic classes.

    The counts are the peer's 20,000 and 5,000, rounded up to multiples of the batch.
    """
    rng = np.random.default_rng(seed)
    if images is None:
        centres = rng.standard_normal((10, 784)) * 0.12
        images, name = (
            _synthetic_classes(rng, lower_count + upper_count, 784, 10, centres, 1.0),
            "mnist-shaped cleaning (synthetic)",
        )
    else:
        order = rng.permutation(len(images[1]))[: lower_count + upper_count]
        images, name = (images[0][order], images[1][order]), "cleaning, Fashion-MNIST"
    features, labels = images
    mean, scale = features[:lower_count].mean(0), features[:lower_count].std(0) + 1e-3
    features = ((features - mean) / scale).astype(np.float32)
    noisy = labels[:lower_count].copy()
    flipped = rng.random(lower_count) < corruption
    noisy[flipped] = rng.integers(0, 10, flipped.sum())
    one_hot = np.eye(10, dtype=np.float32)
    held, held_labels = features[lower_count:], labels[lower_count:]
    return _case(
        name,
        softmax_upper,
        cleaning_lower,
        (held, one_hot[held_labels]),
        (features[:lower_count], one_hot[noisy], np.arange(lower_count, dtype=np.int32)),
        np.full(lower_count, -2.0, np.float32),
        np.zeros(10 * features.shape[1], np.float32),
        batch,
        _error(held, held_labels, 10),
        "validation error",
    )
