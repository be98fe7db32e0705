"""The report before a run: its numbers against NumPy's, its words against the problem."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Ridge

from bilevel import Problem, ProblemError, data
from bilevel.diagnostics import check, extreme_eigenvalues


@pytest.mark.parametrize("d", [5, 64])
def test_small_maps_are_exact_also_indefinite_ones_on_pytrees(d, x64):
    a = np.random.default_rng(d).normal(size=(d, d))
    a = a + a.T
    like = {"u": jnp.zeros(2), "v": jnp.zeros((d - 2,))}

    def matvec(tree):
        out = a @ jnp.concatenate([tree["u"], tree["v"]])
        return {"u": out[:2], "v": out[2:]}

    low, high = extreme_eigenvalues(matvec, like)
    values = np.linalg.eigvalsh(a)
    np.testing.assert_allclose([low, high], values[[0, -1]], rtol=1e-10)


def test_lanczos_finds_both_ends_of_an_indefinite_spectrum(x64):
    values = np.concatenate([[-7.0], np.linspace(-1, 3, 198), [11.0]])
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(200, 200)))[0]
    a = (q * values) @ q.T
    low, high = jax.jit(lambda: extreme_eigenvalues(lambda v: a @ v, jnp.zeros(200)))()
    np.testing.assert_allclose([low, high], [-7, 11], rtol=1e-6)


def test_lanczos_survives_breakdown(x64):
    low, high = extreme_eigenvalues(lambda v: 3.0 * v, jnp.zeros(100))
    np.testing.assert_allclose([low, high], [3, 3], rtol=1e-10)


def test_the_report_has_the_true_curvature_and_ranks_the_estimators(x64):
    ridge, x = Ridge.make(5, noise=1.0), np.array([-1.0, -2.0, 0.0, -1.5, -3.0])
    minibatches = data.Minibatches(ridge.train, 8)
    report = check(dataclasses.replace(ridge.problem, lower_data=minibatches), x, np.zeros(5))
    values = np.linalg.eigvalsh(ridge.hessian(x))
    np.testing.assert_allclose(report.lower_eigenvalues, values[[0, -1]], rtol=1e-8)
    assert report.condition == pytest.approx(values[-1] / values[0], rel=1e-8)
    errors = {e.name.split(" ")[0]: e.error for e in report.estimators}
    assert errors["Implicit(CG)"] < 1e-6
    assert errors["Unrolled"] < 0.1
    assert errors["Implicit(CG)"] < errors["Unrolled"] < errors["OneStep"]
    assert report.table_bytes == 5 * (5 + 5 + 5) * 8  # per block f_y, f_yy v and f_xy v
    text = str(report)
    for words in (
        "Tables of solvers.SABA on these data: 0.0 MiB",
        "strongly convex",
        "Minibatches(40 samples, size=8",
        "Implicit(CG)",
        "Solver: Chose",
        "linear iterations",
        "rel. error",
    ):
        assert words in text


def test_a_lower_level_that_is_not_convex_is_called_so():
    report = check(
        Problem(
            upper=lambda x, y: jnp.sum((y - 1) ** 2) + x**2,
            lower=lambda x, y: y[0] ** 2 - 1e-3 * x * y[0] + 0 * y[1] - y[1] ** 2,
        ),
        np.float32(0.5),
        np.zeros(2, np.float32),
    )
    assert report.lower_eigenvalues[0] < 0
    assert "NOT convex" in str(report)
    assert "negative curvature" in str(report)


def test_bad_starts_are_refused():
    with pytest.raises(ProblemError, match=r"lower loss is nan at \(x0, y0\)"):
        check(Problem(upper=lambda x, y: jnp.sum(y), lower=lambda x, y: jnp.sum(jnp.log(y))), np.zeros(1), -np.ones(1))
    with pytest.raises(ProblemError, match="a loss is one scalar"):
        check(Problem(upper=lambda x, y: y, lower=lambda x, y: jnp.sum(y)), np.zeros(1), np.ones(2))
