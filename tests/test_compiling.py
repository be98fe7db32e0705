"""Small programmes are few, and compiled by settings that compile fast; what they compute is the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Problem, _compiling, solve, solvers
from bilevel.keys import StepKey, as_step_key

COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"


def two_variables() -> Problem:
    return Problem(lambda x, y: jnp.sum((y - 1.5) ** 2) + 0.1 * jnp.sum(x**2), lambda x, y: jnp.sum((y - x) ** 2))


def with_a_row() -> Problem:
    return Problem(
        lambda x, y: (y - 1.5) ** 2 + 0.1 * x**2, lambda x, y: (y - x) ** 2 + 0.1 * y**4,
        constraint=lambda x, y: y - 3,
    )  # fmt: skip


def with_data() -> Problem:
    return dataclasses.replace(
        two_variables(), upper=lambda x, y, c: jnp.sum((y - c) ** 2) + 0.1 * jnp.sum(x**2),
        upper_data=jnp.asarray(np.float32([1.5])),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "problem", "zero", "tol"),
    [
        (lambda: None, two_variables, np.zeros(2, np.float32), None),
        pytest.param(lambda: None, with_data, np.zeros(2, np.float32), None, marks=pytest.mark.slow),
        (lambda: None, with_data, np.zeros(2, np.float32), 1e-4),
        (solvers.SOBA, two_variables, np.zeros(2, np.float32), None),
        (solvers.SOBA, with_data, np.zeros(2, np.float32), 1e-4),
        (solvers.F2BA, two_variables, np.zeros(2, np.float32), None),
        pytest.param(solvers.F2BA, with_data, np.zeros(2, np.float32), 1e-4, marks=pytest.mark.slow),
        (solvers.LVHBA, with_a_row, np.float32(0), None),
    ],
)
def test_a_first_answer_is_five_programmes_and_a_second_traces_nothing(make, problem, zero, tol) -> None:
    start, other = jnp.asarray(zero), jnp.asarray(zero + 1)
    jax.clear_caches()
    count = traces = 0

    def seen(name: str, *_: object, **__: object) -> None:
        nonlocal count, traces
        count += name == COMPILED
        traces += name == TRACED

    jax.monitoring.register_event_duration_secs_listener(seen)
    solve(problem(), start, start, make(), steps=20, tol=tol, progress=False)
    assert 1 <= count <= 5
    count = traces = 0
    solve(problem(), other, start, make(), steps=20, tol=tol, progress=False)
    assert count == 0 and traces == 0


@pytest.mark.parametrize("start", [0.0, np.float32(0.0), jnp.asarray(0.0)], ids=["Python", "numpy", "weak"])
def test_a_number_for_a_start_compiles_the_loop_once(start) -> None:
    """A weak type came back strong from the first chunk of steps, and the loop was compiled three times."""
    jax.clear_caches()
    compiled = []

    def seen(name: str, *_: object, fun_name: str = "", **__: object) -> None:
        compiled.extend([fun_name] if name == COMPILED else [])

    jax.monitoring.register_event_duration_secs_listener(seen)
    solve(two_variables(), start, start, solvers.SOBA(), steps=30, chunk=10, progress=False)
    assert compiled and len([name for name in compiled if "_advance" in name]) <= 1 and len(compiled) <= 5


def test_a_small_problem_does_without_the_routines_that_take_long_to_import() -> None:
    """A programme with an eigenvalue routine makes jaxlib import SciPy's, much of the first answer."""
    code = """
import sys
from collections.abc import Callable, Iterator
from typing import Any
import jax.numpy as jnp
from bilevel import Problem, solve
losses = lambda x, y: jnp.sum((y - 1) ** 2) + 0.1 * jnp.sum(x**2), lambda x, y: jnp.sum((y - x) ** 2)
for tol in (None, 1e-4):
    found = solve(Problem(*losses), jnp.zeros(2), jnp.zeros(2), steps=50, tol=tol, progress=False)
    assert abs(found.x - 1 / 1.1).max() < 1e-4, found
assert found.result.name == "CONVERGED", found
print([name for name in sys.modules if name.startswith("scipy.linalg")])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]", out.stdout


@pytest.fixture
def replace(monkeypatch) -> Iterator[Callable[[str, Any], None]]:
    """Another value of a name in `_compiling`, and no settings remembered from before."""

    def put(name: str, value: Any) -> None:
        monkeypatch.setattr(_compiling, name, value)
        _compiling.settings_for.cache_clear()

    yield put
    _compiling.settings_for.cache_clear()


@pytest.mark.parametrize("make", [lambda: None, solvers.SOBA, pytest.param(solvers.F2BA, marks=pytest.mark.slow)])
def test_the_fast_settings_change_rounding_alone(make, replace) -> None:
    start = jnp.zeros(2)
    fast = solve(two_variables(), start, start, make(), steps=30, progress=False)
    replace("_ROWS", [(0, {})])
    jax.clear_caches()
    slow = solve(two_variables(), start, start, make(), steps=30, progress=False)
    assert fast.steps == slow.steps and fast.result is slow.result
    np.testing.assert_allclose(fast.x, slow.x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fast.y, slow.y, rtol=1e-5, atol=1e-6)


def test_settings_go_by_what_the_losses_compute(replace) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("the settings are the CPU's")
    replace("_UNKNOWN", set())
    with _compiling.sized():
        assert _compiling._settings() == ()  # nothing is known yet
        _compiling.computes(100)
        assert len(_compiling._settings()) == 3
        _compiling.computes(2**19)
        assert len(_compiling._settings()) == 2
        _compiling.computes(2**23)
        assert _compiling._settings() == ()
    assert _compiling._settings() == ()


def test_a_setting_that_this_jaxlib_does_not_have_is_left_out(replace) -> None:
    replace("_ROWS", [(2**20, {"xla_of_another_year": True})])
    replace("_UNKNOWN", set())
    double = _compiling.jit(lambda v: 2 * v)
    with _compiling.sized():
        _compiling.computes(1)
        assert double(jnp.float32(3)) == 6
        if jax.default_backend() == "cpu":
            assert {"xla_of_another_year"} == _compiling._UNKNOWN
        assert double(jnp.float32(4)) == 8


def test_other_errors_of_a_programme_are_raised() -> None:
    with pytest.raises(RuntimeError, match="by itself"):
        _compiling.jit(_raises)(jnp.float32(1))


def _raises(v: jax.Array) -> jax.Array:
    raise RuntimeError("by itself")


@pytest.mark.parametrize("seed", [0, 1, 7, 123456789, 2**31 - 1])
def test_a_seed_is_the_key_that_jax_makes_of_it(seed) -> None:
    ours, theirs = as_step_key(seed).base, jax.random.key(seed)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(jax.random.key_data(ours), jax.random.key_data(theirs))


@pytest.mark.parametrize("tags", [(0,), (3, 15), (14, 0, 9)])
def test_streams_on_the_host_are_those_in_a_trace(tags) -> None:
    def folded(key: StepKey) -> StepKey:
        for tag in tags:
            key = key.fold_in(tag)
        return key

    host = folded(as_step_key(5, 3))
    assert isinstance(host.stream, np.uint32)
    traced = jax.jit(folded)(as_step_key(5, 3))
    assert int(host.stream) == int(traced.stream) and int(host.step) == int(traced.step) == 3
