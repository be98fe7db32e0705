"""Solvers that work on the host: history, progress, callbacks, checkpoints and Ctrl-C are those of all others."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import Problem, Result, host, solve, solvers
from bilevel.checkpoint import CheckpointError
from bilevel.typing import HostSolver

PROBLEM = Problem(
    upper=lambda x, y: jnp.sum((y - 1) ** 2) / 2 + jnp.sum(x**2) / 2, lower=lambda x, y: jnp.sum((y - x) ** 2) / 2
)


@bilevel.state
class State:
    """The variables and the number of steps taken."""

    x: Any
    y: Any
    done: Any


HOOKS: list[Any] = []


@dataclasses.dataclass(frozen=True)
class Halving:
    """x and y go half of the way to the solution 1/2, and what is in HOOKS is called with the step on the way."""

    most_steps: int = 6

    def init(self, problem, x, y, key):
        return State(x, y, np.int64(0))

    def search(self, problem, state, key):
        while state.done < self.most_steps:
            for hook in HOOKS:
                hook(int(state.done))
            half = lambda tree: jax.tree.map(lambda leaf: leaf + (0.5 - leaf) / 2, tree)
            state = State(half(state.x), half(state.y), state.done + 1)
            yield state, {"upper_loss": problem.upper(state.x, state.y)}

    def status(self, state, metrics, tol):
        return Result.CONVERGED.value if tol is not None and abs(float(state.x[0]) - 0.5) < tol else 0


def start():
    return jnp.zeros(1), jnp.zeros(1)


def expected(done):
    return 0.5 - 0.5 ** (done + 1)


def test_what_a_host_solver_is():
    assert isinstance(Halving(), HostSolver)
    assert isinstance(solvers.MPCC(), HostSolver)
    assert not isinstance(solvers.AID(), HostSolver)
    assert host.most_steps(Halving(), 1000) == 6
    assert host.most_steps(Halving(), 4) == 4
    assert host.most_steps(object(), 4) == 4


def test_history_metrics_and_callbacks():
    seen = []
    solution = solve(
        PROBLEM,
        *start(),
        Halving(),
        metrics={"x": lambda x, y: x[0]},
        metrics_every=2,
        callback=lambda event: seen.append((event.step, float(event.x[0]))) or event.step == 4,
        callback_every=1,
    )
    assert seen == [(k, expected(k)) for k in (1, 2, 3, 4)]
    assert solution.result is Result.STOPPED
    assert solution.steps == 4
    np.testing.assert_allclose(solution.history["x"], [expected(k) for k in (0, 2, 4)])
    assert solution.history.steps["upper_loss"].tolist() == [0, 1, 2, 3]


def test_steps_are_a_bound():
    solution = solve(PROBLEM, *start(), Halving(), steps=3)
    assert solution.steps == 3
    np.testing.assert_allclose(solution.x, [expected(3)])


@pytest.fixture
def hooks():
    yield HOOKS
    HOOKS.clear()


def test_interrupt_returns_the_newest_state(hooks):
    hooks.append(lambda done: signal.raise_signal(signal.SIGINT) if done == 3 else None)
    solution = solve(PROBLEM, *start(), Halving())
    assert solution.result is Result.INTERRUPTED
    assert solution.steps == 3
    np.testing.assert_allclose(solution.x, [expected(3)])


def test_resumes_after_an_error(tmp_path, hooks):
    class Stop(Exception):
        pass

    def stop(done):
        if done == 4:
            raise Stop

    run = lambda: solve(PROBLEM, *start(), Halving(), checkpoint=tmp_path / "run", checkpoint_every=1, key=3)
    hooks.append(stop)
    with pytest.raises(Stop):
        run()
    hooks[:] = [lambda done: None if done >= 4 else pytest.fail("a step was repeated")]
    again = run()
    hooks.clear()
    whole = solve(PROBLEM, *start(), Halving(), key=3)
    assert again.steps == 6
    np.testing.assert_array_equal(again.x, whole.x)
    np.testing.assert_array_equal(again.history["upper_loss"], whole.history["upper_loss"])
    with pytest.raises(CheckpointError, match=r"solver\.most_steps was 6, is now 7"):
        solve(PROBLEM, *start(), Halving(7), checkpoint=tmp_path / "run", key=3)


KILLED = """
import os, sys
import jax.numpy as jnp
from bilevel import Problem, solve, solvers

problem = Problem(
    upper=lambda x, y: (x[0] - 5) ** 2 + (2 * y[0] + 1) ** 2,
    lower=lambda x, y: (y[0] - 1) ** 2 - 1.5 * x[0] * y[0],
    constraint=lambda x, y: jnp.array([-3 * x[0] + y[0] + 3, x[0] - y[0] / 2 - 4, x[0] + y[0] - 7, -y[0]]),
)

def stop(event):
    if len(sys.argv) > 2 and event.step == 4:
        os.kill(os.getpid(), 9)

solution = solve(problem, jnp.array([4.0]), jnp.array([2.0]), solvers.MPCC(), checkpoint=sys.argv[1],
                 checkpoint_every=1, callback=stop, callback_every=1)
print(solution.steps, float(solution.x[0]), float(solution.y[0]), solution.history["upper_loss"].tolist())
"""


@pytest.mark.slow
def test_a_killed_search_ends_as_one_that_was_not(tmp_path):
    run = lambda *arguments: subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert run(tmp_path / "a", "kill").returncode == -9
    resumed, whole = run(tmp_path / "a"), run(tmp_path / "b")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    assert resumed.stdout == whole.stdout
    assert resumed.stdout.startswith("10 ")


def test_mpcc_through_the_front_door():
    solution = solve(PROBLEM, *start(), solvers.MPCC(starts=2), tol=1e-4)
    assert solution.result is Result.CONVERGED
    assert solution.steps == 2
    np.testing.assert_allclose(solution.x, [0.5], atol=1e-4)
    assert solution.multipliers == {}


@dataclasses.dataclass(frozen=True)
class Staying:
    """Every step is content with where it is; it goes where it is sent."""

    def init(self, problem, x, y, key):
        return State(x, y, np.int64(0))

    def search(self, problem, state, key):
        yield State(state.x, state.y, state.done + 1), {"upper_loss": problem.upper(state.x, state.y)}

    def status(self, state, metrics, tol):
        return Result.CONVERGED.value

    def towards(self, state, x, y):
        return State(x, y, state.done)


def test_a_run_goes_on_from_a_lower_point_of_its_certificate():
    # y = max(x, 3x - 2), F = -y: at the kink, x = 1, one multiplier alone sees no descent.
    kink = Problem(
        lambda x, y: -y[0],
        lambda x, y: y[0],
        constraint=lambda x, y: jnp.stack([x[0], 3 * x[0] - 2]) - y[0],
        upper_constraint=lambda x, y: jnp.stack([-x[0], x[0] - 2]),
    )
    solution = solve(kink, jnp.ones(1), jnp.ones(1), Staying(), tol=1e-4, steps=20)
    assert solution.steps == 5  # the first and four more
    assert float(solution.x[0]) > 1 and solution.result is Result.NOT_STATIONARY
    np.testing.assert_allclose(solution.y, 3 * solution.x - 2, rtol=1e-4)
    assert solve(kink, jnp.ones(1), jnp.ones(1), Staying(), tol=1e-4, steps=1).x == 1.0


def test_neither_kind_of_solver():
    with pytest.raises(TypeError, match=r"or init, search and status: take one of bilevel\.solvers"):
        solve(PROBLEM, *start(), object())
