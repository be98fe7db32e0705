"""`HypergradientSearchCV` beside scikit-learn's searches, on real tables, at equal time.

    python benchmarks/sklearn_search.py

Tables: diabetes (442 x 10; with all products and squares, 442 x 65), breast cancer (569 x 30), spam (4601 x 57, where
UCI's spambase.data is in /usr/share/datasets/spambase). Half of each is for the search, half is never seen by it. Every
search uses the same five folds. GridSearchCV and RandomizedSearchCV (log-uniform penalties) are given as many points as
fit the time of our slower fit, ten at least. Our fits are timed when their programme is compiled, which it is once for
tables of like size; the time of the first fit, compilation included, stands beside. LassoCV has its own path of 100.

cv       the cross-validated loss at the end of the search (mean squared error over the variance of the targets, or log
         loss); lower is better, and what the search minimises
held out the same on the other half
seconds  wall-clock of the search and the refit
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np
from scipy.stats import loguniform
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import Lasso, LassoCV, LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import GridSearchCV, KFold, RandomizedSearchCV, train_test_split
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from bilevel.integrations.sklearn import HypergradientSearchCV

FOLDS = KFold(5, shuffle=True, random_state=0)
SPAM = Path("/usr/share/datasets/spambase/spambase.data")


def tables():
    X, y = load_diabetes(return_X_y=True)
    yield "diabetes", X, y, (Ridge(), Lasso(max_iter=20_000))
    products = PolynomialFeatures(2, include_bias=False).fit_transform(X)
    yield "diabetes, products", products, y, (Ridge(), Lasso(max_iter=20_000))
    X, y = load_breast_cancer(return_X_y=True)
    yield "breast cancer", X, y, (LogisticRegression(max_iter=5000),)
    if SPAM.exists():
        table = np.loadtxt(SPAM, delimiter=",")
        yield "spam", table[:, :-1], table[:, -1].astype(int), (LogisticRegression(max_iter=5000),)


def fitted(search, X, y):
    began = time.perf_counter()
    search.fit(X, y)
    return search, time.perf_counter() - began


def main():
    warnings.simplefilter("ignore")
    print(f"{'table':<20} {'model':<20} {'search':<34} {'cv':>8} {'held out':>9} {'seconds':>8}")
    for name, X, y, models in tables():
        train, test, t_train, t_test = train_test_split(X, y, test_size=0.5, random_state=0)
        scaler = StandardScaler().fit(train)
        train, test = scaler.transform(train), scaler.transform(test)
        for model in models:
            classifies = isinstance(model, LogisticRegression)
            unit = 1.0 if classifies else np.var(t_train)
            scoring = "neg_log_loss" if classifies else "neg_mean_squared_error"

            def row(label, search, seconds, best):
                if classifies:
                    error = log_loss(t_test, search.predict_proba(test))
                else:
                    error = mean_squared_error(t_test, search.predict(test)) / unit
                numbers = f"{best / unit:>8.4f} {error:>9.4f} {seconds:>8.2f}"
                print(f"{name:<20} {type(model).__name__:<20} {label:<34} {numbers}", flush=True)

            budget = 0.0
            for penalties in ("one", "per_feature"):
                ours = HypergradientSearchCV(model, penalties, cv=FOLDS)
                first = fitted(ours, train, t_train)[1]
                ours, seconds = fitted(ours, train, t_train)
                row(f"hypergradient, {penalties} ({first:.1f} s first)", ours, seconds, -ours.best_score_)
                budget = max(budget, seconds)

            parameter = "C" if classifies else "alpha"
            low, high = (1e-4, 1e3) if not isinstance(model, Lasso) else (1e-3, 1e2)
            middle = {parameter: [np.sqrt(low * high)]}
            _, one = fitted(GridSearchCV(model, middle, cv=FOLDS, scoring=scoring), train, t_train)
            count = int(np.clip(budget / one, 10, 2000))
            grid = {parameter: np.geomspace(low, high, count)}
            search, seconds = fitted(GridSearchCV(model, grid, cv=FOLDS, scoring=scoring), train, t_train)
            row(f"GridSearchCV, {count} points", search, seconds, -search.best_score_)
            draws = {parameter: loguniform(low, high)}
            random = RandomizedSearchCV(model, draws, n_iter=count, cv=FOLDS, scoring=scoring, random_state=0)
            search, seconds = fitted(random, train, t_train)
            row(f"RandomizedSearchCV, {count} draws", search, seconds, -search.best_score_)
            if isinstance(model, Lasso):
                search, seconds = fitted(LassoCV(cv=FOLDS, max_iter=20_000), train, t_train)
                row("LassoCV, 100 points", search, seconds, search.mse_path_.mean(1).min())


if __name__ == "__main__":
    main()
