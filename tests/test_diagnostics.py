"""The report before a run: its numbers against NumPy's, its words against the problem."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Ridge

from bilevel import Problem, ProblemError, data, diagnostics, lower
from bilevel.diagnostics import check


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


# ---------------------------------------------------------------- metasmoothness


def rough(rate):
    """y <- y - rate (y^3 - y - x / 10), a few steps: chaotic where rate is large."""
    problem = Problem(lambda x, y: jnp.sum(y), lambda x, y: jnp.sum(y**4 / 4 - y**2 / 2 - x * y / 10))
    training = lower.GradientDescent(rate, 40)
    return diagnostics.metasmoothness(problem, jnp.zeros(20), jnp.full(20, 0.3), training, size=0.5)


def test_metasmoothness_tells_a_smooth_training_from_a_chaotic_one():
    smooth, chaotic = rough(0.1), rough(1.4)
    assert smooth.smoothness > 0.99
    assert not smooth.warnings
    assert chaotic.smoothness < 0.5
    assert "is not smooth in x" in str(chaotic)
    assert len(smooth.values) == 4
    np.testing.assert_allclose(smooth.smoothness, smooth.values.mean())


def test_metasmoothness_along_a_step_in_closed_form():
    """One gradient step: A(x) = (c x^2, x); two steps in a row agree in sign unless x^2 turns between them."""
    problem = Problem(lambda x, y: jnp.sum(y), lambda x, y: -jnp.sum(y[0] * x**2) - jnp.sum(y[1] * x))
    found = lambda at: diagnostics.metasmoothness(
        problem, jnp.asarray(at), jnp.zeros(2), lower.GradientDescent(1.0, 1), along=jnp.asarray(1.0)
    )
    assert found(0.5).smoothness == pytest.approx(1)
    # from -1.2: d = (0.04 - 1.44, 1), d' = (0.64 - 0.04, 1)
    assert found(-1.2).smoothness == pytest.approx((1 - 1.4) / 2.4, rel=1e-5)
    with pytest.raises(ValueError, match="has to be shaped like x"):
        diagnostics.metasmoothness(problem, jnp.ones(2), jnp.zeros(2), 0.1, along=jnp.ones(3))
    flat = Problem(lambda x, y: jnp.sum(y), lambda x, y: jnp.sum(y**2) + 0 * x)
    still = diagnostics.metasmoothness(flat, jnp.asarray(1.0), jnp.ones(2), 0.1)
    assert "does not depend on x along this step" in still.warnings[0]
    assert "diverges" in str(rough(50.0))


def test_a_second_look_at_a_training_compiles_nothing():
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None

    def look(rate, target):
        problem = Problem(lambda x, y: jnp.sum(y**2), lambda x, y: jnp.sum((y - x * target) ** 2))
        training = lower.GradientDescent(optax.adam(rate), 5)
        return diagnostics.metasmoothness(problem, jnp.ones(2), jnp.zeros(2), training)

    first = look(0.1, 1.0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        second = look(0.2, 3.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled and abs(second.change - first.change) > 1e-4
    jax.clear_caches()
    np.testing.assert_allclose(look(0.2, 3.0).change, second.change, rtol=1e-6)
