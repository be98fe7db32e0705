"""Every constructor over the grid of dtypes and of JAX's settings: it works, or one sentence refuses it.

Each constructor once on a start that has several things at once (half precision, several dtypes, typed keys and
integers in the data, strict promotion, jax_debug_infs and jax_debug_nans), and traced under the others: one of each
family in the fast lane, all of them and the whole product in the slow one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import ESTIMATORS, LINEAR, LOWER, SOLVERS
from jax.sharding import AxisType, PartitionSpec
from problems import float64

from bilevel import ProblemError, linear, run, solve, solvers
from bilevel.hypergradients import value_and_hypergradient

FAST = (
    "AID", "ITD", "SOBA", "DARTS", "SingleLoopF2SA", "VPBGD", "DSOBA", "FedBiO", "IterativeRegularization", "Implicit",
    "Unrolled", "FiniteDifference", "GradientDescent", "Function", "CG", "Dense", "Robust", "TaskCG",
)  # fmt: skip


def lanes(table):
    """The names of a table, one of each family for the fast lane."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in table]


HALF = {
    "bfloat16": (jnp.bfloat16,) * 4,
    "float16": (jnp.float16,) * 4,
    "bfloat16 x": (np.float32, jnp.bfloat16, np.float32, np.float32),
    "bfloat16 y": (np.float32, np.float32, jnp.bfloat16, jnp.bfloat16),
    "bfloat16 beside float32": (np.float32, np.float32, jnp.bfloat16, np.float32),
}
SETTINGS = {
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_infs": lambda: jax.debug_infs(True),
    "debug_nans": lambda: jax.debug_nans(True),
}


@contextlib.contextmanager
def all_settings() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for setting in SETTINGS.values():
            stack.enter_context(setting())
        yield


def dtypes(tree):
    return jax.tree.map(lambda leaf: jnp.dtype(leaf.dtype), tree)


def check(case, of_data, x, w, b, steps=2):
    """A few steps: finite, and in the dtypes that were given."""
    problem, (x0, y0), solver = case.problem(of_data), case.start(x, w, b), case.make()
    if isinstance(solver, solvers.MPCC):
        found = solve(problem, x0, y0, solver, steps=steps)
    else:
        found, _ = jax.jit(lambda problem, x, y: run(problem, solver, x, y, steps))(problem, x0, y0)
    assert dtypes((found.x, found.y)) == dtypes((x0, y0))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((found.x, found.y)))


def trace(case, of_data, x, w, b):
    """The same, without a compilation."""
    problem, (x0, y0), solver = case.problem(of_data), case.start(x, w, b), case.make()
    if isinstance(solver, solvers.MPCC):
        return
    found, _ = jax.eval_shape(lambda problem, x, y: run(problem, solver, x, y, 2), problem, x0, y0)
    assert dtypes((found.x, found.y)) == dtypes((x0, y0))


@pytest.mark.parametrize("name", lanes(SOLVERS))
def test_a_solver_takes_all_of_it_at_once(name):
    with all_settings():
        check(SOLVERS[name], np.float32, jnp.bfloat16, jnp.bfloat16, np.float32)


@pytest.mark.parametrize("name", lanes(SOLVERS))
def test_a_solver_is_traced_on_float32_under_x64(name):
    with float64():
        trace(SOLVERS[name], np.float64, np.float32, np.float32, np.float32)


def test_every_solver_of_the_package_is_in_the_grid():
    parts = {"Path", "Polynomial", "Continuation", "default_solver", "refuse"}
    assert {name.split()[0] for name in SOLVERS} == set(solvers.__all__) - parts
    assert {name.split()[0] for name in LINEAR} >= {
        n for n in linear.__all__ if isinstance(getattr(linear, n), type) and hasattr(getattr(linear, n), "_solve")
    }


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_under_one_setting(name, setting):
    with SETTINGS[setting]():
        check(SOLVERS[name], np.float32, np.float32, np.float32, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_in_half_precision(name, kind):
    check(SOLVERS[name], *HALF[kind])


@pytest.mark.slow
@pytest.mark.parametrize("b", [np.float32, np.float64], ids=["float32", "float32 and float64"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_in_float32_under_x64(name, b):
    with float64():
        check(SOLVERS[name], np.float64, np.float32, np.float32, b)


# Inside shard_map -----------------------------------------------------------------------------------------------------


def in_shard_map(case, mean):
    """A run traced inside shard_map with its check, on data that differ from device to device."""
    problem, (x0, y0), solver = case.problem(), case.start(), case.make()
    if mean:
        average = lambda fn: lambda *args: jax.lax.pmean(fn(*args), "devices")
        problem = dataclasses.replace(problem, upper=average(problem.upper), lower=average(problem.lower))
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Auto,))
    split = PartitionSpec(None, "devices") if case.needs == "agents" else PartitionSpec("devices")
    whole = PartitionSpec()
    end = lambda problem, x, y: (lambda state: (state.x, state.y))(run(problem, solver, x, y, 2)[0])
    mapped = jax.shard_map(end, mesh=mesh, in_specs=(split, whole, whole), out_specs=whole)
    return jax.eval_shape(mapped, problem, x0, y0)


UNACCOUNTED = {"AID", "AID Newton", "AiPOD", "HypergradientDescent", "IMAML"}
"""Those whose linear solves, or linearised constraints, are parts of JAX that do not keep the account."""


@pytest.mark.parametrize("name", lanes([name for name in SOLVERS if name != "MPCC"]))
def test_a_run_on_all_devices_data_inside_shard_map(name):
    if name in UNACCOUNTED:
        with pytest.raises(ProblemError, match="Leave shard_map out: put the data on all devices"):
            in_shard_map(SOLVERS[name], mean=True)
    else:
        in_shard_map(SOLVERS[name], mean=True)


@pytest.mark.parametrize("name", ["AID", "ITD", "SOBA", "F2SA", "FedBiO", "DSOBA"])
def test_losses_that_differ_from_device_to_device_are_refused(name):
    with pytest.raises(ProblemError, match=r"upper differs .* 'devices'.*pmean.*check_vma=False"):
        in_shard_map(SOLVERS[name], mean=False)


# Estimators, lower solvers, linear solvers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", lanes(ESTIMATORS))
def test_an_estimator_takes_all_of_it_at_once(name):
    estimator, solver, case = ESTIMATORS[name]
    x, y = case.start(jnp.bfloat16, jnp.bfloat16, np.float32)
    with all_settings():
        found = jax.jit(lambda problem, x, y: value_and_hypergradient(problem, estimator, solver)(x, y))(
            case.problem(), x, y
        )
    assert dtypes((found.gradient, found.lower.y)) == dtypes((x, y))
    assert bool(jnp.isfinite(found.gradient).all())


@pytest.mark.parametrize("name", lanes(LOWER))
def test_a_lower_solver_takes_all_of_it_at_once(name):
    solver, case = LOWER[name]
    x, y = case.start(jnp.bfloat16, jnp.bfloat16, np.float32)
    estimator = ESTIMATORS["NullSpace" if name == "EqualityDescent" else "HOZOG"][0]  # one that honours the case's rows
    with all_settings():
        found = jax.jit(lambda problem, x, y: value_and_hypergradient(problem, estimator, solver)(x, y).lower.y)(
            case.problem(), x, y
        )
    assert dtypes(found) == dtypes(y)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", lanes(LINEAR))
def test_a_linear_solver_takes_mixed_leaves_under_strict_promotion(name):
    b = {"a": jnp.asarray([[1.0, 2.0]], jnp.bfloat16), "b": jnp.asarray([[0.5]], np.float32)}  # one task of TaskCG
    with all_settings():
        found = jax.jit(lambda b: LINEAR[name](lambda v: jax.tree.map(lambda leaf: leaf * 2, v), b)[0])(b)
    assert dtypes(found) == dtypes(b)
    if name not in ("Identity", "Neumann", "Richardson", "Nystrom"):
        np.testing.assert_allclose(np.float32(found["a"]), [[0.5, 1.0]], rtol=2e-2)
        np.testing.assert_allclose(found["b"], [[0.25]], rtol=2e-2)
