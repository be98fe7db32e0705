"""A user's code keeps its types: mypy's verdict on snippets, all in one run.

A snippet is a module of its own. Each of its lines `reveal_type(...)  # type` must reveal just that type (module names
are left out of it; " | " stands between several of a line), and `# error: code` is a line that mypy must refuse;
nothing else may be wrong under `--strict`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

COMMON = """
import dataclasses
import jax
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Strength:
    value: jax.Array

@dataclasses.dataclass(frozen=True)
class Fit:
    weights: jax.Array

x, y = Strength(jnp.ones(())), Fit(jnp.zeros(3))
"""

SNIPPETS = {
    "custom_root": """
from bilevel.implicit import custom_root

def condition(fit: Fit, strength: float, *, rows: int = 3) -> Fit:
    return fit

@custom_root(condition)
def ridge(start: Fit, strength: float, *, rows: int = 3) -> Fit:
    return start

@custom_root(condition, has_aux=True)
def counted(start: Fit, strength: float) -> tuple[Fit, int]:
    return start, 3

reveal_type(ridge)  # def (start: Fit, strength: float, *, rows: int =) -> Fit
reveal_type(ridge(y, 0.1, rows=4))  # Fit
reveal_type(counted(y, 0.1))  # tuple[Fit, int]
ridge(y, "much")  # error: arg-type
ridge(y)  # error: call-arg
""",
    "custom_fixed_point": """
from bilevel.implicit import custom_fixed_point

def step(fit: Fit, strength: Strength) -> Fit:
    return fit

@custom_fixed_point(step)
def iterate(start: Fit, strength: Strength) -> Fit:
    return start

reveal_type(iterate)  # def (start: Fit, strength: Strength) -> Fit
reveal_type(iterate(y, strength=x))  # Fit
iterate(y, 3)  # error: arg-type
""",
    "root_derivatives": """
from bilevel.implicit import root_jvp, root_vjp

def condition(fit: Fit, strength: Strength, shift: float) -> Fit:
    return fit

reveal_type(root_jvp(condition, y, (x, 1.0), (x, 0.5)))  # Fit
reveal_type(root_vjp(condition, y, (x, 1.0), y))  # tuple[Strength, float]
root_vjp(condition, y, [x, 1.0], y)  # error: type-var
""",
    "argmin": """
from collections.abc import Callable
from bilevel.implicit import argmin

def lower(x: Strength, y: Fit, batch: jax.Array) -> jax.Array:
    return x.value * jnp.sum(y.weights)

def descend(lower: Callable[[Strength, Fit], jax.Array], x: Strength, y: Fit) -> Fit:
    return y

def counted(lower: Callable[[Strength, Fit], jax.Array], x: Strength, y: Fit) -> tuple[Fit, int]:
    return y, 3

y_star = argmin(lower, descend)
reveal_type(y_star(x, y, jnp.zeros(5)))  # Fit
reveal_type(argmin(lower, counted, has_aux=True)(x, y))  # tuple[Fit, int]
reveal_type(argmin(lower, lambda lower, x, y: y)(x, y))  # Fit
y_star(x, 3)  # error: arg-type
""",
    "front_door": """
from bilevel import Problem, data, multistart, run, solve, solvers, sweep

def upper(x: Strength, y: Fit) -> jax.Array:
    return jnp.sum(y.weights)

def lower(x: Strength, y: Fit, batch: jax.Array) -> jax.Array:
    return x.value * jnp.sum(y.weights)

problem = Problem(upper, lower, lower_data=data.Minibatches(jnp.ones(8), 2))
reveal_type(problem)  # Problem[Strength, Fit]
solution = solve(problem, x, y, solvers.SOBA(0.1, 0.1), steps=3)
reveal_type(solution)  # Solution[Strength, Fit]
reveal_type(solution.x)  # Strength
reveal_type(solution.y.weights)  # Array
reveal_type(solve(problem, x, y, callback=lambda event: reveal_type(event.x)))  # Solution[Strength, Fit] | Strength
reveal_type(problem.levels(0).lower(x, y))  # Array
solve(problem, y, x)  # error: misc | error: misc
solve(problem, x, 3.0)  # error: misc
reveal_type(solvers.LVHBA())  # LVHBA
reveal_type(solvers.AID())  # HypergradientDescent
""",
    "hypergradients": """
from bilevel import Problem
from bilevel.hypergradients import Implicit, value_and_hypergradient

def upper(x: Strength, y: Fit) -> jax.Array:
    return jnp.sum(y.weights)

def lower(x: Strength, y: Fit) -> jax.Array:
    return x.value * jnp.sum(y.weights)

estimate = value_and_hypergradient(Problem(upper, lower), Implicit())(x, y)
reveal_type(estimate)  # Estimate[Strength]
reveal_type(estimate.gradient.value)  # Array
reveal_type(estimate.value)  # Array
""",
}


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, list[str]]]:
    """What mypy says of each snippet, by line: types without the modules' names, and `error: code`."""
    folder = tmp_path_factory.mktemp("user")
    for name, text in SNIPPETS.items():
        (folder / f"user_{name}.py").write_text(COMMON + text)
    options = [
        "--strict",
        "--ignore-missing-imports",
        "--follow-imports=silent",
        "--config-file=",
        "--no-error-summary",
    ]
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'user'}"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, cache, *(f"user_{name}.py" for name in SNIPPETS)],
        cwd=folder,
        env={"MYPYPATH": str(ROOT), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    said: dict[str, dict[int, list[str]]] = {name: {} for name in SNIPPETS}
    for line in done.stdout.splitlines():
        place, number, kind, message = line.split(":", 3)
        name = re.fullmatch(r"user_(\w+)\.py", place)
        assert name, line
        if revealed := re.fullmatch(r' Revealed type is "(.*)"', message):
            words = re.sub(r"\b(?:\w+\.)+(?=\w)", "", revealed[1])
        elif kind == " error":
            words = "error: " + message[message.rindex("[") + 1 : -1]
        else:
            continue  # a note on an error
        said[name[1]].setdefault(int(number), []).append(words)
    return said


@pytest.mark.parametrize("name", SNIPPETS)
def test_users_code_keeps_its_types(name, verdict):
    expected = {
        number: line.split("  # ", 1)[1].split(" | ")
        for number, line in enumerate((COMMON + SNIPPETS[name]).splitlines(), 1)
        if "  # " in line
    }
    assert expected
    assert verdict[name] == expected
