"""A penalty, or one per feature, chosen by hypergradients: a search with scikit-learn's interface (extra `sklearn`).

    search = HypergradientSearchCV(Lasso(), penalties="per_feature", cv=5).fit(X, y)
    search.predict(X_new), search.penalties_, search.coef_

The upper level is the validation loss, averaged over the folds of the cross-validation; the lower level are the linear
models of the k folds, fitted at once as one vmapped problem. The derivative with respect to the logarithms of the
penalties is exact (implicit differentiation, with a dense matrix a fold), so a penalty for each of hundreds of features
costs what a single one does.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from bilevel._arguments import explained_class
from bilevel.datasets import spread

try:
    from sklearn.base import BaseEstimator
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.model_selection import check_cv
    from sklearn.svm import SVC, SVR, LinearSVC, LinearSVR
    from sklearn.utils import ClassifierTags, RegressorTags, get_tags
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("bilevel.integrations.sklearn needs scikit-learn: pip install 'bilevel[sklearn]'.") from error

__all__ = ["HypergradientSearchCV"]

# What each estimator is: its loss, and the names of its penalties (`C` is the inverse of one).
_MODELS: dict[type, tuple[str, tuple[str, ...]]] = {
    Ridge: ("squared", ("alpha",)),
    Lasso: ("squared", ("alpha",)),
    ElasticNet: ("squared", ("l1", "l2")),
    LogisticRegression: ("logistic", ("C",)),
    LinearSVC: ("squared_hinge", ("C",)),
    LinearSVR: ("squared_insensitive", ("C",)),
}
_NEWTON_STEPS, _FISTA_STEPS = 100, 5000
_SETTLED = 1e-10
"""By what part of the largest coefficient a step may move a sparse model that has settled."""


@explained_class
class HypergradientSearchCV(BaseEstimator):
    """The penalties of a linear model by gradient descent on its cross-validated loss.

    Args:
      estimator: `Ridge`, `Lasso`, `ElasticNet`, `LogisticRegression` (l2), `LinearSVC` (squared hinge), or `LinearSVR`
        with `loss="squared_epsilon_insensitive"` (its own default has kinks); None: `Ridge()`. Its penalty (alpha, C,
        l1_ratio) is what is searched, and its `fit_intercept` and `epsilon` are kept. Intercepts are not penalised
        (scikit-learn's LinearSVC and LinearSVR penalise theirs).
      penalties: "one" for all coefficients, "per_feature", or an array of a group number for each feature.
      cv: as in `GridSearchCV`: a number of folds, a splitter, or pairs of indices.
      steps: the most steps of L-BFGS-B on the logarithms of the penalties.
      tol: the search ends once the projected gradient is at most this, relative to the loss at its start.

    Attributes:
      coef_, intercept_: of the model refitted on all samples, shaped as scikit-learn's.
      penalties_: by name (`alpha`; `l1` and `l2` for the elastic net; `C`), a number or one for each group, in the
        units of scikit-learn's parameter (`ElasticNet`: l1 = alpha l1_ratio, l2 = alpha (1 - l1_ratio)).
      best_params_: with penalties="one", the estimator's parameters of the same meaning.
      best_score_: minus the cross-validated loss (mean squared error, log loss, squared hinge).
      history_: that loss after each step. classes_: of a classifier.

    Raises:
      TypeError, ValueError: by name, another estimator or a setting of it that cannot be honoured.
    """

    def __init__(
        self, estimator: Any = None, penalties: Any = "one", *, cv: Any = 5, steps: int = 50, tol: float = 1e-7
    ) -> None:
        self.estimator, self.penalties, self.cv, self.steps, self.tol = estimator, penalties, cv, steps, tol

    @property
    def _model(self) -> Any:
        return Ridge() if self.estimator is None else self.estimator

    @property
    def _classifies(self) -> bool:
        return isinstance(self._model, (LogisticRegression, LinearSVC))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        own = get_tags(self._model)
        tags.estimator_type = own.estimator_type
        tags.target_tags.required = True
        tags.classifier_tags = ClassifierTags() if own.estimator_type == "classifier" else None
        tags.regressor_tags = RegressorTags() if own.estimator_type == "regressor" else None
        return tags

    def fit(self, X: Any, y: Any, groups: Any = None) -> HypergradientSearchCV:
        """Search, then fit the model with the penalties found on all samples; `groups` of samples are for a splitter
        that keeps them together (`GroupKFold`)."""
        loss, names = _checked(self._model)
        if isinstance(self.steps, bool) or not isinstance(self.steps, (int, np.integer)) or self.steps < 1:
            raise ValueError(f"HypergradientSearchCV(steps={self.steps!r}): the most steps are a positive integer.")
        if isinstance(self.tol, (str, bytes)) or not self.tol > 0:
            raise ValueError(f"HypergradientSearchCV(tol={self.tol!r}): the tolerance is a positive number.")
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=not self._classifies, ensure_min_samples=2)
        folds = list(check_cv(self.cv, y, classifier=self._classifies).split(X, y, groups))
        if self._classifies:
            check_classification_targets(y)
            self.classes_, codes = np.unique(y, return_inverse=True)
            if len(self.classes_) < 2:
                raise ValueError(
                    "HypergradientSearchCV needs samples of at least 2 classes in the data, but the data contains only "
                    f"one class: {self.classes_[0]!r}."
                )
            targets = _one_hot(codes, len(self.classes_), loss)
        else:
            targets = np.asarray(y, float)[:, None]
        table = _Table(X, targets, self._model.fit_intercept)
        groups = self._groups(X.shape[1])
        inside = np.zeros((2, len(folds), len(X)))
        for k, (train, valid) in enumerate(folds):
            for samples, what in ((train, "train on"), (valid, "validate on")):
                if not len(samples) or (np.asarray(samples).dtype == bool and not np.any(samples)):
                    raise ValueError(f"HypergradientSearchCV(cv=...): fold {k} has no samples to {what}.")
            np.add.at(inside[0, k], train, 1.0)  # a sample that a bootstrap draws twice counts twice
            np.add.at(inside[1, k], valid, 1.0)
        search = _Search(loss, type(self._model).__name__, names, table, groups, getattr(self._model, "epsilon", 0.0))
        with jax.enable_x64(True):
            x, value, self.history_ = search.minimum(inside[0], inside[1], self.steps, self.tol)
            weights = search.refit(x)
        self.best_score_ = -value
        single = isinstance(self.penalties, str) and self.penalties == "one"
        strengths = dict(zip(names, np.exp(x), strict=True))
        if names == ("C",):
            strengths = {"C": 1 / strengths["C"]}
        self.penalties_ = {name: float(v[0]) if single else v for name, v in strengths.items()}
        if single:
            self.best_params_ = _params(self._model, self.penalties_)
        coef, intercept = table.in_units(weights)
        flat = not self._classifies
        self.coef_ = coef[0] if flat else coef
        self.intercept_ = float(intercept[0]) if flat else intercept
        return self

    def _groups(self, features: int) -> np.ndarray:
        if isinstance(self.penalties, str):
            if self.penalties not in ("one", "per_feature"):
                raise ValueError(
                    f"HypergradientSearchCV(penalties={self.penalties!r}): 'one', 'per_feature', or an array of a "
                    "group number for each feature."
                )
            return np.zeros(features, int) if self.penalties == "one" else np.arange(features)
        if isinstance(self.penalties, dict):
            raise ValueError(
                "HypergradientSearchCV(penalties={...}): there is no grid to give, penalties are found: penalties is "
                "'one', 'per_feature', or an array of a group number for each feature."
            )
        groups = np.asarray(self.penalties)
        if groups.shape != (features,):
            raise ValueError(
                f"HypergradientSearchCV(penalties=...): an array of {features} group numbers is needed, one for each "
                f"feature, and this has the shape {groups.shape}."
            )
        return np.unique(groups, return_inverse=True)[1]

    def _raw(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_.T + self.intercept_

    def predict(self, X: Any) -> np.ndarray:
        """The regressor's value, or the classifier's class, of each sample."""
        raw = self._raw(X)
        if not self._classifies:
            return raw
        return self.classes_[(raw[:, 0] > 0).astype(int) if raw.shape[1] == 1 else raw.argmax(1)]

    @available_if(lambda self: self._classifies)
    def decision_function(self, X: Any) -> np.ndarray:
        """The margins: (samples,) of two classes, else (samples, classes)."""
        raw = self._raw(X)
        return raw[:, 0] if raw.shape[1] == 1 else raw

    @available_if(lambda self: isinstance(self._model, LogisticRegression))
    def predict_proba(self, X: Any) -> np.ndarray:
        """The classes' probabilities, (samples, classes)."""
        raw = self._raw(X)
        raw = np.concatenate([np.zeros_like(raw), raw], 1) if raw.shape[1] == 1 else raw
        raw = np.exp(raw - raw.max(1, keepdims=True))
        return raw / raw.sum(1, keepdims=True)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R^2 of a regressor, accuracy of a classifier."""
        measure = accuracy_score if self._classifies else r2_score
        return float(measure(y, self.predict(X), sample_weight=sample_weight))


def _checked(model: Any) -> tuple[str, tuple[str, ...]]:
    """The loss and the penalties' names of an estimator; an error that says what of it is not treated."""
    known = next((value for kind, value in _MODELS.items() if type(model) is kind), None)
    if isinstance(model, type):
        raise TypeError(
            f"HypergradientSearchCV was given the class {model.__name__}: give an estimator, {model.__name__}()."
        )
    if known is None:
        cure = " A kernel's support vector machine has no linear penalty to search: take LinearSVC or LinearSVR."
        raise TypeError(
            f"HypergradientSearchCV takes {', '.join(kind.__name__ for kind in _MODELS)}, not "
            f"{type(model).__name__}.{cure if isinstance(model, (SVC, SVR)) else ''}"
        )
    wanted: dict[str, tuple[Any, ...]] = {"positive": (False,), "class_weight": (None,), "multi_class": ("ovr",)}
    if isinstance(model, LinearSVR):
        wanted |= {"loss": ("squared_epsilon_insensitive",)}
    if isinstance(model, LinearSVC):
        wanted |= {"loss": ("squared_hinge",), "penalty": ("l2",)}
    if isinstance(model, LogisticRegression):
        wanted |= {"penalty": ("l2", "deprecated"), "l1_ratio": (None, 0, 0.0)}
    for name, allowed in wanted.items():
        value = getattr(model, name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"HypergradientSearchCV cannot honour {type(model).__name__}({name}={value!r}); it takes {name}="
                f"{allowed[0]!r}."
            )
    return known


def _params(model: Any, found: dict[str, float]) -> dict[str, float]:
    if type(model) is ElasticNet:
        alpha = found["l1"] + found["l2"]
        return {"alpha": alpha, "l1_ratio": found["l1"] / alpha}
    return dict(found)


def _one_hot(codes: np.ndarray, classes: int, loss: str) -> np.ndarray:
    """Targets (samples, outputs): 0 or 1 for log losses, -1 or 1 for hinges; two classes are one output."""
    one = (codes == 1)[:, None] if classes == 2 else codes[:, None] == np.arange(classes)
    return one.astype(float) if loss == "logistic" else np.where(one, 1.0, -1.0)


class _Table:
    """Standardised features, padded so that tables of like sizes share a compiled programme.

    Samples are padded with weight zero and features with zeros, to the next size of a coarse ladder; the last column is
    the intercept's. Standardising changes no solution (the penalties are divided by the same scales) and makes the
    systems well conditioned.
    """

    def __init__(self, X: np.ndarray, targets: np.ndarray, intercept: bool) -> None:
        n, p = X.shape
        self.n, self.p, self.intercept = n, p, intercept
        self.middle = X.mean(0) if intercept else np.zeros(p)
        self.scale = spread(X, self.middle)
        # A regression's targets too, so that tolerances have no unit; the offset of the intercept is put back.
        self.regression = targets.shape[1] == 1 and len(np.unique(targets)) > 2
        self.size = float(targets.std()) or 1.0 if self.regression else 1.0
        self.offset = float(targets.mean()) if self.regression and intercept else 0.0
        rows, columns = _rung(n), _rung(p)
        self.X = np.zeros((rows, columns + 1))
        self.X[:n, :p] = (X - self.middle) / self.scale if intercept else X / self.scale
        self.X[:n, -1] = float(intercept)
        self.targets = np.zeros((rows, targets.shape[1]))
        self.targets[:n] = (targets - self.offset) / self.size

    def in_units(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients (outputs, features) and intercepts (outputs,) for the features as they were given."""
        coef = weights[: self.p].T / self.scale * self.size
        return coef, weights[-1] * self.size + self.offset - coef @ self.middle


def _rung(count: int) -> int:
    """The next of 8, 12, 16, 24, 32, ...: a third is padding at most."""
    size = 8
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class _Search:
    """The cross-validated loss of one table as a function of the logarithms of its penalties."""

    def __init__(
        self, loss: str, kind: str, names: tuple[str, ...], table: _Table, groups: np.ndarray, epsilon: float
    ) -> None:
        self.loss, self.kind, self.names, self.table, self.groups = loss, kind, names, table, groups
        self.count = int(groups.max()) + 1
        self.epsilon = epsilon / table.size
        # Ours per entry of the standardised problem: mean loss + l1 |w| + l2 w^2 / 2, from scikit-learn's parameters.
        self.sums = kind in ("Ridge", "LogisticRegression", "LinearSVC", "LinearSVR")

    def strengths(self, x: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """l1 and l2 (folds, columns of the table) for mean losses over `counts` (folds, 1) samples."""
        logs = np.reshape(x, (len(self.names), self.count))
        by = {name: np.exp(logs[i])[self.groups] for i, name in enumerate(self.names)}
        t = self.table
        l1, l2 = np.zeros((2, len(counts), t.X.shape[1]))
        if self.sums:  # sum of the losses (Ridge: without the half) + strength w^2 / 2
            l2[:, : t.p] = by[self.names[0]] / t.scale**2 / counts
            return l1, l2
        l1[:, : t.p] = by["alpha" if self.kind == "Lasso" else "l1"] / t.scale / t.size
        if self.kind == "ElasticNet":
            l2[:, : t.p] = by["l2"] / t.scale**2
        return l1, l2

    def slope(self, l1: np.ndarray, l2: np.ndarray, d1: np.ndarray, d2: np.ndarray) -> np.ndarray:
        """dF/dx from dF/dl1 and dF/dl2: an entry of x is the logarithm of its strengths, so that dl/dx = l."""
        moved = [l2 * d2] if self.sums else [l1 * d1, l2 * d2][: len(self.names)]
        totals = [part.sum(0)[: self.table.p] for part in moved]
        return np.concatenate([np.bincount(self.groups, total, self.count) for total in totals])

    def start(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts (a row each), and the bounds: in units of the table, where 1 shrinks a feature's weight by half."""
        t = self.table
        squares = np.zeros(self.count)
        np.add.at(squares, self.groups, np.log(t.scale))
        log_scale = squares / np.bincount(self.groups)
        rows = []
        top = float(np.abs(t.X[: t.n, : t.p].T @ t.targets[: t.n]).max() / t.n) or 1.0
        for name in self.names:
            if self.sums:
                rows.append(np.log(0.8 * t.n) + 2 * log_scale)
            elif name == "l2":
                rows.append(2 * log_scale)
            else:
                rows.append(np.log(top * t.size) + log_scale)
        unit = np.stack(rows)
        lowest = [-18.0 if name != "alpha" or self.sums else -9.0 for name in self.names]
        highest = [9.0 if self.sums or name == "l2" else 0.0 for name in self.names]
        starts = np.linspace(-7, 1, 5) if self.sums else np.linspace(-6, -0.7, 5)
        low, high = (unit + np.asarray(bound)[:, None] for bound in (lowest, highest))
        return np.stack([(unit + s).ravel() for s in starts]), low.ravel(), high.ravel()

    def _padded(self, inside: np.ndarray) -> np.ndarray:
        full = np.zeros((len(inside), len(self.table.X)))
        full[:, : self.table.n] = inside
        return full

    def objective(self, train: np.ndarray, valid: np.ndarray) -> Any:
        """`x, models=None -> loss, gradient, models`; the models of a call are where the next one's begin."""
        t, counts = self.table, train.sum(-1, keepdims=True)
        data = tuple(jnp.asarray(a) for a in (t.X, t.targets, self._padded(train), self._padded(valid)))
        begin = jnp.zeros((len(train), t.X.shape[1], t.targets.shape[1]))

        def evaluate(x: np.ndarray, y: Any = None) -> tuple[float, np.ndarray, Any]:
            y = begin if y is None else y
            l1, l2 = self.strengths(x, counts)
            value, slopes, y = _cross_validated(self.loss, not self.sums, self.epsilon, l1, l2, y, *data)
            return float(value), self.slope(l1, l2, *map(np.asarray, slopes)), y

        return evaluate

    def minimum(
        self, train: np.ndarray, valid: np.ndarray, steps: int, tol: float
    ) -> tuple[np.ndarray, float, np.ndarray]:
        """The logarithms of the penalties (names, groups), the loss there, and the losses on the way."""
        evaluate = self.objective(train, valid)
        factor = self.table.size**2 if self.loss in ("squared", "squared_insensitive") else 1.0
        starts, low, high = self.start()
        tried = [(*evaluate(x), x) for x in starts]
        value, _, y, x = min(tried, key=lambda found: found[0] if np.isfinite(found[0]) else np.inf)
        unit, losses, warm = abs(value) or 1.0, [value], [y]

        def scaled(x: np.ndarray) -> tuple[float, np.ndarray]:
            found, slope, warm[0] = evaluate(x, warm[0])
            return found / unit, slope / unit

        found = scipy.optimize.minimize(
            scaled, x, jac=True, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)),
            options={"maxiter": steps, "gtol": tol, "ftol": 1e-12},
            callback=lambda intermediate_result: losses.append(unit * float(intermediate_result.fun)),
        )  # fmt: skip
        shape = (len(self.names), self.count)
        return found.x.reshape(shape), float(found.fun) * unit * factor, np.asarray(losses) * factor

    def refit(self, x: np.ndarray) -> np.ndarray:
        """The weights (features and intercept, outputs) on all samples."""
        t = self.table
        everyone = np.ones((1, t.n))
        l1, l2 = self.strengths(x, everyone.sum(-1, keepdims=True))
        begin = jnp.zeros((1, t.X.shape[1], t.targets.shape[1]))
        data = jnp.asarray(t.X), jnp.asarray(t.targets), jnp.asarray(self._padded(everyone))
        found = np.asarray(_fits(self.loss, not self.sums, self.epsilon, l1, l2, begin, *data)[0])
        if not self.sums:
            again = np.asarray(_fista_step(l1[0], l2[0], *data[:2], data[2][0], jnp.asarray(found)))
            left = float(np.abs(again - found).max() / max(np.abs(found).max(), 1e-300))
            if left > _SETTLED:
                warnings.warn(
                    f"HypergradientSearchCV: the model still moves by a part of {left:.1g} with each step after "
                    f"{_FISTA_STEPS:,} steps, its features being nearly collinear, and the penalty was chosen on such "
                    "models. Drop or join features that say the same, or take an ElasticNet.",
                    ConvergenceWarning,
                    stacklevel=3,
                )
        return np.concatenate([found[: t.p], found[-1:]])


def _of_sample(loss: str, epsilon: Any, z: jax.Array, t: jax.Array) -> jax.Array:
    """The loss of one sample with the outputs z (outputs,) and targets t."""
    if loss == "squared":
        return 0.5 * jnp.sum((z - t) ** 2)
    if loss == "squared_insensitive":
        return jnp.sum(jnp.maximum(jnp.abs(z - t) - epsilon, 0) ** 2)
    if loss == "squared_hinge":
        return jnp.sum(jnp.maximum(1 - t * z, 0) ** 2)
    if z.shape[0] == 1:
        return jnp.sum(jax.nn.softplus(z) - t * z)
    return jax.nn.logsumexp(z) - jnp.sum(t * z)


def _mean_loss(loss: str, epsilon: Any, w: jax.Array, X: jax.Array, t: jax.Array, inside: jax.Array) -> jax.Array:
    each = jax.vmap(functools.partial(_of_sample, loss, epsilon))(X @ w, t)
    return jnp.sum(inside * each) / jnp.sum(inside)


def _hessian(loss: str, epsilon: Any, l2: Any, w: Any, X: Any, t: Any, inside: Any) -> jax.Array:
    """Of the mean loss and the ridge, (features * outputs, features * outputs); the dead columns have a one."""
    curved = jax.vmap(jax.hessian(functools.partial(_of_sample, loss, epsilon)))(X @ w, t)
    curved = curved * (inside / jnp.sum(inside))[:, None, None]
    outputs = w.shape[1]
    blocks = [[X.T @ (curved[:, a, b, None] * X) for b in range(outputs)] for a in range(outputs)]
    full = jnp.stack([jnp.stack(row) for row in blocks]).transpose(2, 0, 3, 1)
    size = w.size
    ridge = jnp.repeat(l2 + _dead(X), outputs)
    return full.reshape(size, size) + jnp.diag(ridge + 1e-12)


def _dead(X: jax.Array) -> jax.Array:
    return (jnp.sum(X**2, axis=0) == 0).astype(X.dtype)


def _newton(loss: str, epsilon: Any, l2: Any, w: Any, X: Any, t: Any, inside: Any) -> jax.Array:
    """Newton's method with step halving on mean loss + l2 w^2 / 2."""
    objective = lambda w: _mean_loss(loss, epsilon, w, X, t, inside) + 0.5 * jnp.sum(l2[:, None] * w**2)  # noqa: E731

    def body(carry: Any) -> Any:
        i, w, _ = carry
        value, gradient = jax.value_and_grad(objective)(w)
        step = jnp.linalg.solve(_hessian(loss, epsilon, l2, w, X, t, inside), gradient.ravel()).reshape(w.shape)
        sizes = 0.5 ** jnp.arange(12.0)
        values = jax.vmap(lambda s: objective(w - s * step))(sizes)
        enough = values <= value - 1e-4 * sizes * jnp.sum(step * gradient) + 1e-14 * jnp.abs(value)
        size = jnp.where(enough.any(), sizes[jnp.argmax(enough)], 0.0)
        return i + 1, w - size * step, jnp.where(size > 0, jnp.abs(size * step).max(), 0.0)

    more = lambda carry: (carry[0] < _NEWTON_STEPS) & (carry[2] > 1e-11)  # noqa: E731
    return jax.lax.while_loop(more, body, (0, w, jnp.asarray(jnp.inf)))[1]


@jax.jit
def _fista_step(l1: Any, l2: Any, X: Any, t: Any, inside: Any, w: Any) -> jax.Array:
    """One plain step of `_fista`."""
    return _shrunk(*_quadratic(l2, X, t, inside), l1, w)


def _quadratic(l2: Any, X: Any, t: Any, inside: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The Gram matrix, the right-hand side, and the step that is safe."""
    share = inside / jnp.sum(inside)
    gram = X.T @ (share[:, None] * X) + jnp.diag(l2)
    return gram, X.T @ (share[:, None] * t), 1 / jnp.linalg.eigvalsh(gram)[-1]


def _shrunk(gram: Any, right: Any, step: Any, l1: Any, w: Any) -> jax.Array:
    u = w - step * (gram @ w - right)
    return jnp.sign(u) * jnp.maximum(jnp.abs(u) - step * l1[:, None], 0)


def _fista(l1: Any, l2: Any, w: Any, X: Any, t: Any, inside: Any) -> jax.Array:
    """Accelerated proximal gradient on the Gram matrix, with restarts, until a step moves nothing."""
    parts = _quadratic(l2, X, t, inside)

    def body(carry: Any) -> Any:
        i, w, ahead, a, _ = carry
        new = _shrunk(*parts, l1, ahead)
        again = jnp.sum((ahead - new) * (new - w)) > 0
        a = jnp.where(again, 1.0, a)
        b = (1 + jnp.sqrt(1 + 4 * a**2)) / 2
        return i + 1, new, new + jnp.where(again, 0.0, (a - 1) / b) * (new - w), b, jnp.abs(new - ahead).max()

    more = lambda carry: (carry[0] < _FISTA_STEPS) & (carry[4] > 1e-12)  # noqa: E731
    return jax.lax.while_loop(more, body, (0, w, w, jnp.asarray(1.0), jnp.asarray(jnp.inf)))[1]


@functools.partial(jax.jit, static_argnames=("loss", "sparse"))
def _fits(loss: str, sparse: bool, epsilon: Any, l1: Any, l2: Any, w: Any, X: Any, t: Any, inside: Any) -> jax.Array:
    """The models of all folds, (folds, features, outputs): the lower level."""
    if sparse:
        return jax.vmap(lambda l1, l2, w, i: _fista(l1, l2, w, X, t, i))(l1, l2, w, inside)
    return jax.vmap(lambda l2, w, i: _newton(loss, epsilon, l2, w, X, t, i))(l2, w, inside)


@functools.partial(jax.jit, static_argnames=("loss", "sparse"))
def _cross_validated(
    loss: str, sparse: bool, epsilon: Any, l1: Any, l2: Any, w: Any, X: Any, t: Any, train: Any, valid: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """The mean over folds of the validation loss F, its derivatives by l1 and l2 of each fold, and the models.

    On the entries S that are not zero, f_ww + l2 is H and (H v)_S = (F_w)_S, v = 0 elsewhere; then
    dF/dl1 = - sum v sign(w) and dF/dl2 = - sum v w, over outputs.
    """
    w = _fits(loss, sparse, epsilon, l1, l2, w, X, t, train)

    def fold(l2: Any, w: Any, train: Any, valid: Any) -> Any:
        measured = 2.0 if loss == "squared" else 1.0  # the mean squared error
        upper = lambda w: measured * _mean_loss(loss, epsilon, w, X, t, valid)  # noqa: E731
        value, slope = jax.value_and_grad(upper)(w)
        kept = jnp.ones(w.size) if not sparse else (w != 0).astype(w.dtype).ravel()
        H = _hessian(loss, epsilon, l2, w, X, t, train)
        H = kept[:, None] * H * kept + jnp.diag(1 - kept)
        v = jnp.linalg.solve(H, kept * slope.ravel()).reshape(w.shape)
        return value, -jnp.sum(v * jnp.sign(w), 1), -jnp.sum(v * w, 1)

    values, d1, d2 = jax.vmap(fold)(l2, w, train, valid)
    return values.mean(), (d1 / len(values), d2 / len(values)), w
