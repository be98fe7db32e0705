"""The search with scikit-learn's interface, held to scikit-learn's own models, searches and checks."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC, LinearSVR
from sklearn.utils.estimator_checks import check_estimator

from bilevel.integrations.sklearn import HypergradientSearchCV

SQUARED_SVR = LinearSVR(loss="squared_epsilon_insensitive")

X, T = load_diabetes(return_X_y=True)
CANCER, LABELS = load_breast_cancer(return_X_y=True)
CANCER = (CANCER - CANCER.mean(0)) / CANCER.std(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [Ridge(), Lasso(), ElasticNet(), LogisticRegression(), LinearSVC(), SQUARED_SVR])
def test_scikit_learns_own_checks_pass(model):
    check_estimator(HypergradientSearchCV(model, cv=2, steps=3))


@pytest.mark.parametrize("model", [Ridge(), pytest.param(Lasso(), marks=pytest.mark.slow), ElasticNet()])
def test_one_penalty_is_the_best_of_a_fine_grid_and_the_model_is_scikit_learns(model):
    search = HypergradientSearchCV(model).fit(X, T)
    score = lambda m: cross_val_score(m, X, T, cv=5, scoring="neg_mean_squared_error").mean()
    there = clone(model).set_params(
        **search.best_params_, **({} if isinstance(model, Ridge) else {"tol": 1e-8, "max_iter": 10**6})
    )
    assert search.best_score_ == pytest.approx(score(there), rel=1e-6)
    np.testing.assert_allclose(search.coef_, there.fit(X, T).coef_, rtol=1e-4, atol=1e-3)
    assert search.intercept_ == pytest.approx(there.intercept_, rel=1e-6)
    if not isinstance(model, ElasticNet):
        near = search.best_params_["alpha"] * np.logspace(-0.3, 0.3, 13)
        grid = GridSearchCV(there, {"alpha": near}, scoring="neg_mean_squared_error").fit(X, T)
        assert search.best_score_ >= grid.best_score_ - 1e-5 * abs(grid.best_score_)


def test_more_penalties_do_no_worse_than_one_on_the_folds():
    one = HypergradientSearchCV(Ridge()).fit(X, T)
    groups = HypergradientSearchCV(Ridge(), np.arange(10) // 5).fit(X, T)
    each = HypergradientSearchCV(Ridge(), "per_feature").fit(X, T)
    assert one.best_score_ <= groups.best_score_ + 0.1 <= each.best_score_ + 0.2
    assert each.penalties_["alpha"].shape == (10,) and groups.penalties_["alpha"].shape == (2,)


@pytest.mark.parametrize("model", [Ridge(), Lasso(), ElasticNet(), LogisticRegression(), LinearSVC(), SQUARED_SVR])
def test_the_gradient_is_that_of_differences(model):
    import jax

    from bilevel.integrations import sklearn as ours

    codes = (T > 140).astype(int) + (T > 200) * isinstance(model, LogisticRegression)  # three classes, or two
    y = codes if isinstance(model, (LogisticRegression, LinearSVC)) else T
    loss, names = ours._checked(model)
    targets = T[:, None] if y is T else ours._one_hot(y.astype(int), len(np.unique(y)), loss)
    table = ours._Table(X[:100, :6], targets[:100], True)
    search = ours._Search(loss, type(model).__name__, names, table, np.arange(6), 0.1)
    inside = np.zeros((2, 3, 100))
    for k, (train, valid) in enumerate(KFold(3).split(X[:100])):
        inside[0, k, train], inside[1, k, valid] = 1, 1
    with jax.enable_x64(True):
        evaluate, x = search.objective(*inside), search.start()[0][2] + 0.1 * np.arange(6 * len(names))
        slope = evaluate(x)[1]
        for i in range(len(x)):
            move = np.eye(len(x))[i] * 1e-4
            difference = (evaluate(x + move)[0] - evaluate(x - move)[0]) / 2e-4
            assert slope[i] == pytest.approx(difference, rel=1e-4, abs=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize("model", [LogisticRegression(), LinearSVC()])
def test_classifiers_agree_with_scikit_learns(model):
    names = np.array(["benign", "malign"])[LABELS]
    search = HypergradientSearchCV(model, cv=3).fit(CANCER, names)
    assert search.score(CANCER, names) > 0.97 and set(search.predict(CANCER)) == {"benign", "malign"}
    if isinstance(model, LogisticRegression):
        there = LogisticRegression(tol=1e-10, max_iter=5000, **search.best_params_).fit(CANCER, names)
        np.testing.assert_allclose(search.predict_proba(CANCER), there.predict_proba(CANCER), atol=1e-4)
        score = cross_val_score(there, CANCER, names, cv=3, scoring="neg_log_loss").mean()
        assert search.best_score_ == pytest.approx(score, rel=1e-4)
    else:
        assert not hasattr(search, "predict_proba")


def test_it_stands_in_a_pipeline_and_in_a_search():
    pipeline = make_pipeline(StandardScaler(), HypergradientSearchCV(Ridge(), "per_feature", cv=3, steps=5))
    assert pipeline.fit(X, T).score(X, T) > 0.45
    inner = HypergradientSearchCV(Ridge(), cv=3, steps=5)
    outer = GridSearchCV(inner, {"penalties": ["one", "per_feature"]}, cv=2).fit(X, T)
    assert outer.best_params_["penalties"] in ("one", "per_feature")


@pytest.mark.parametrize(
    ("search", "error", "text"),
    [
        (HypergradientSearchCV(SVC()), TypeError, "not SVC. A kernel's support vector machine has no linear penalty"),
        (HypergradientSearchCV(Lasso(positive=True)), ValueError, r"cannot honour Lasso\(positive=True\)"),
        (HypergradientSearchCV(Ridge(), "each"), ValueError, "'one', 'per_feature', or an array"),
        (HypergradientSearchCV(Ridge(), np.zeros(3)), ValueError, "an array of 10 group numbers is needed"),
        (HypergradientSearchCV(LinearSVC(loss="hinge")), ValueError, "it takes loss='squared_hinge'"),
    ],
)
def test_what_is_not_treated_is_refused(search, error, text):
    with pytest.raises(error, match=text):
        search.fit(X, T > 140)


def test_groups_stay_together_and_samples_drawn_twice_count_twice():
    X, y = load_diabetes(return_X_y=True)
    X, y, groups = X[:90], y[:90], np.repeat(np.arange(9), 10)
    by_groups = HypergradientSearchCV(Ridge(), cv=GroupKFold(3)).fit(X, y, groups=groups)
    pairs = list(GroupKFold(3).split(X, y, groups))
    by_pairs = HypergradientSearchCV(Ridge(), cv=pairs).fit(X, y)
    np.testing.assert_allclose(by_groups.best_params_["alpha"], by_pairs.best_params_["alpha"], rtol=1e-8)
    random = np.random.default_rng(0)
    bootstraps = [(random.choice(train, len(train)), valid) for train, valid in pairs]
    found = HypergradientSearchCV(Ridge(), cv=bootstraps).fit(X, y)
    scores = cross_val_score(Ridge(found.best_params_["alpha"]), X, y, cv=bootstraps, scoring="neg_mean_squared_error")
    np.testing.assert_allclose(found.best_score_, scores.mean(), rtol=1e-6)


def test_a_sparse_model_that_has_not_settled_is_said():
    random = np.random.default_rng(0)
    near = random.normal(size=(100, 1)) + 1e-3 * random.normal(size=(100, 40))
    X = np.c_[near, random.normal(size=(100, 5))]
    y = X[:, 0] - X[:, 41] + 0.1 * random.normal(size=100)
    with pytest.warns(ConvergenceWarning, match=r"after 5,000 steps, its features being nearly collinear.*ElasticNet"):
        HypergradientSearchCV(Lasso(), steps=2).fit(X, y)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (LinearSVR(), r"LinearSVR\(loss='epsilon_insensitive'\); it takes loss='squared_epsilon_insensitive'"),
        (LinearSVC(multi_class="crammer_singer"), r"LinearSVC\(multi_class='crammer_singer'\); it takes multi_class="),
    ],
)
def test_a_loss_that_is_not_treated_is_not_replaced(model, said):
    with pytest.raises(ValueError, match=said):
        HypergradientSearchCV(model).fit(CANCER, LABELS)


@pytest.mark.parametrize(("fold", "said"), [((range(300), ()), "validate on"), (((), range(300)), "train on")])
def test_a_fold_without_samples_is_said(fold, said):
    with pytest.raises(ValueError, match=rf"fold 1 has no samples to {said}"):
        HypergradientSearchCV(Ridge(), cv=[(range(200), range(200, 300)), fold]).fit(X, T)
