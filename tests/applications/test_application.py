"""The record that all applications share: what a user types works, and a class below it adds what it needs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, solve, solvers
from bilevel.applications import Application


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Ridge(Application):
    """One application's own class."""

    names: tuple[str, ...]
    name: str = "ridge"


def ridge():
    problem = Problem(lambda x, y: ((y - 1.0) ** 2).sum(), lambda x, y: ((y - x) ** 2).sum())
    metrics = {"distance": lambda x, y: jnp.abs(x - 1.0).max()}
    return Ridge(problem, jnp.zeros(3), jnp.zeros(3), metrics, names=("a", "b", "c"), source="A paper")


def test_a_record_is_what_a_user_types():
    app = ridge()
    solver = solvers.SOBA(upper_optimizer=0.2, lower_optimizer=0.4)
    solution = solve(app.problem, app.x0, app.y0, solver, steps=1000, metrics=app.metrics, progress=False)
    assert solution.history["distance"][-1] < 1e-3 < solution.history["distance"][0]
    np.testing.assert_allclose(solution.x, 1.0, atol=1e-3)


def test_a_record_shows_what_it_is_and_cannot_be_changed():
    app = ridge()
    assert repr(app) == "Ridge: ridge\n  x: 3 numbers, y: 3 numbers, metrics: distance\n  A paper"
    assert repr(Application(app.problem, None, app.y0)) == "Application\n  x: 0 numbers, y: 3 numbers, metrics: none"
    assert app.names == ("a", "b", "c")
    with pytest.raises(dataclasses.FrozenInstanceError):
        app.x0 = None
