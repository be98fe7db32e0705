"""MPCC and the loop of solvers on the host: closed forms, refusals, history, interrupts and checkpoints."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, ProblemError, Result, data, sets, solve
from bilevel.solvers import MPCC
from bilevel.solvers.small.stationarity import lower_verified, stationary, unbounded

pytestmark = pytest.mark.usefixtures("x64")


def active():
    """min (x - 2)^2 + y, y the least number with y >= x and y >= -x: y = |x|; x = 3/2 for x > 0, F = 7/4; lam = 1."""
    return Problem(lambda x, y: (x - 2) ** 2 + y, lambda x, y: y, constraint=lambda x, y: jnp.stack([x - y, -x - y]))


def capped():
    """The same with G: y <= 1, which binds: x = y = 1, F = 2. F + a G along y = x: 2 (x - 2) + 1 + a = 0, a = 1."""
    return dataclasses.replace(active(), upper_constraint=lambda x, y: y - 1)


def test_a_lower_level_with_active_rows_and_its_multipliers():
    found = solve(active(), 0.3, 1.0, MPCC(), tol=1e-4)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose([found.x, found.y], 1.5, atol=1e-5)
    np.testing.assert_allclose(found.multipliers["constraint"], [1.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(found.history["upper_loss"][-1], 1.75, atol=1e-6)


def test_a_row_of_the_upper_level_in_y_and_its_multiplier():
    found = solve(capped(), 0.3, 1.0, MPCC(), tol=1e-4)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose([found.x, found.y], 1.0, atol=1e-5)
    np.testing.assert_allclose(found.multipliers["upper_constraint"], 1.0, atol=1e-4)


def test_equalities_of_both_levels():
    """y = x / 2 from h, x + y = 3 from H: x = 2, y = 1, whatever F and f are."""
    problem = Problem(
        lambda x, y: x**2 - y,
        lambda x, y: (y - 7) ** 2,
        equality=lambda x, y: 2 * y - x,
        upper_equality=lambda x, y: x + y - 3,
    )
    found = solve(problem, 0.0, 0.0, MPCC(), tol=1e-4)
    assert found.result is Result.CONVERGED
    np.testing.assert_allclose([found.x, found.y], [2.0, 1.0], atol=1e-6)


def test_sets_are_seen_as_objects_and_behind_functions_and_others_are_refused():
    """f = (y - x)^2 over y in [0, 1], x in [-1, 3]: y = 1 for x = 2, the least of (x - 2)^2 + (y - 2)^2."""
    losses = (lambda x, y: (x - 2) ** 2 + (y - 2) ** 2, lambda x, y: (y - x) ** 2)
    for box, other in ((sets.Box(0.0, 1.0), sets.Box(-1.0, 3.0)), (lambda y: jnp.clip(y, 0, 1), None)):
        found = solve(Problem(*losses, project_lower=box, project_upper=other), 0.2, 0.5, MPCC(), tol=1e-4)
        assert found.result is Result.CONVERGED
        np.testing.assert_allclose([found.x, found.y], [2.0, 1.0], atol=1e-5)
    hidden = Problem(*losses, project_lower=lambda y: y / jnp.maximum(1.0, jnp.abs(y)))
    assert sets.seen(lambda y: jnp.clip(y, -2.0, jnp.inf), jnp.zeros(3)).bounds(jnp.zeros(3))[0].tolist() == [-2.0] * 3
    assert sets.seen(lambda y: y / jnp.maximum(1.0, jnp.linalg.norm(y)), jnp.zeros(3)) is None
    found = solve(hidden, 0.2, 0.5, MPCC(), tol=1e-4)  # in one dimension a ball is a box
    np.testing.assert_allclose([found.x, found.y], [2.0, 1.0], atol=1e-5)
    ball = Problem(
        lambda x, y: jnp.sum((x - y) ** 2),
        lambda x, y: jnp.sum((y - x) ** 2),
        project_lower=lambda y: y / jnp.maximum(1.0, jnp.linalg.norm(y)),
    )
    with pytest.raises(ProblemError, match="cannot see which set project_lower= projects on"):
        solve(ball, jnp.ones(2), jnp.ones(2), MPCC())
    with pytest.raises(ProblemError, match="drawn anew at every step"):
        noisy = Problem(
            losses[0], lambda x, y, b: jnp.mean((y - x - b) ** 2), lower_data=data.Minibatches(np.ones(8), 2)
        )
        solve(noisy, 0.2, 0.5, MPCC())


@pytest.mark.parametrize("factor", [1e-8, pytest.param(1e8, marks=pytest.mark.slow)])
def test_units_change_no_verdict(factor):
    for kind in ("F", "f", "x", "y"):
        s = {name: factor if name == kind else 1.0 for name in ("F", "f", "x", "y")}
        problem = Problem(
            lambda x, y, s=s: s["F"] * ((x / s["x"] - 2) ** 2 + y / s["y"]),
            lambda x, y, s=s: s["f"] * y / s["y"],
            constraint=lambda x, y, s=s: jnp.stack([x / s["x"] - y / s["y"], -x / s["x"] - y / s["y"]]),
        )
        found = solve(problem, 0.3 * s["x"], 1.0 * s["y"], tol=1e-4)
        assert found.result is Result.CONVERGED, kind
        np.testing.assert_allclose([found.x / s["x"], found.y / s["y"]], 1.5, atol=1e-4)


def test_the_checks_see_a_kink_a_minimum_and_a_fall():
    kink = Problem(lambda x, y: -y, lambda x, y: y, constraint=lambda x, y: jnp.stack([x - y, 3 * x - 2 - y]))
    at = stationary(kink, jnp.asarray(1.0), jnp.asarray(1.0))
    assert at.slope < -0.1 and float(at.direction[0]) > 0
    best = stationary(active(), jnp.asarray(1.5), jnp.asarray(1.5))
    assert best.slope > -1e-6 and best.checked
    other = lower_verified(active(), jnp.asarray(1.5), jnp.asarray(2.0))
    np.testing.assert_allclose(other.loss_gap, 0.5, atol=1e-6)
    assert unbounded(Problem(lambda x, y: y**2, lambda x, y: -((y - x) ** 2)), jnp.asarray(0.0), jnp.asarray(0.5))
    assert not unbounded(active(), jnp.asarray(1.5), jnp.asarray(1.5))


def test_a_host_run_has_history_metrics_and_callback():
    seen = []
    found = solve(
        active(), 0.3, 1.0, MPCC(starts=3), steps=3, metrics={"twice": lambda x, y: 2 * x}, metrics_every=1,
        callback=lambda event: seen.append(event.step), callback_every=1,
    )  # fmt: skip
    assert found.steps == 3 and seen == [1, 2, 3]
    assert found.history["start_loss"].shape == (3,)
    np.testing.assert_allclose(found.history["twice"][-1], 3.0, atol=1e-4)


def test_an_interrupted_host_run_returns_the_best_so_far_and_goes_on(tmp_path):
    def interrupt(event):
        if event.step == 2:
            raise KeyboardInterrupt

    options = dict(steps=4, checkpoint_every=1)
    whole = solve(active(), 0.3, 1.0, MPCC(starts=4), checkpoint=tmp_path / "whole", **options)
    stopped = solve(
        active(), 0.3, 1.0, MPCC(starts=4), checkpoint=tmp_path / "cut", callback=interrupt, callback_every=1, **options
    )
    assert stopped.result is Result.INTERRUPTED and stopped.steps == 2
    resumed = solve(active(), 0.3, 1.0, MPCC(starts=4), checkpoint=tmp_path / "cut", **options)
    assert resumed.steps == 4
    np.testing.assert_allclose(resumed.x, whole.x, atol=1e-9)
    np.testing.assert_array_equal(resumed.state.ends["upper_loss"], whole.state.ends["upper_loss"])
    assert all(isinstance(leaf, (jax.Array, np.ndarray, np.generic)) for leaf in jax.tree.leaves(resumed.state))
