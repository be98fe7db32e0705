"""Small bilevel problems whose solutions are derived in their docstrings: what a verdict is tested and measured on.

`CASES` maps names to functions that make a `Case`. Each belongs to a kind; several of a kind differ in what misleads.
A case knows its lower level's least value V(x) and the upper level's least value in closed form, so a solution is
judged (`Case.wrong`) without any solver. `Case.scaled` is the same problem in other units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Problem, sets

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, where to start, and what is true of it.

    Attributes:
      kind: what makes it hard.
      problem, x0, y0: as `solve` takes them.
      value: the least F; None where there is no solution.
      floor: V(x) = min over y of f(x, y), on NumPy arrays; None where there is none.
      solution: (x, y), where it is one point.
      words: the names of the results that are right where there is no solution.
      units: those of F, f, x and y; see `scaled`.
    """

    kind: str
    problem: Problem
    x0: Any
    y0: Any
    value: float | None
    floor: Function | None = None
    solution: tuple[Any, Any] | None = None
    words: frozenset[str] = frozenset()
    units: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def wrong(self, x: Any, y: Any) -> str:
        """What is wrong with (x, y) as a solution, in words; empty where it is right."""
        if self.value is None or self.floor is None:
            return "there is no solution"
        upper, lower, c, d = self.units
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((x, y))):
            return "not finite"
        problem = self.problem
        for name, z, unit in (("project_upper", x, c), ("project_lower", y, d)):
            project = getattr(problem, name)
            if project is not None:
                off = _most(jax.tree.map(lambda a, b: a - b, z, project(z))) / unit
                if off > 1e-4:
                    return f"outside {name} by {off:.2g}"
        for name in ("upper_constraint", "constraint", "upper_equality", "equality"):
            rows = getattr(problem, name)
            if rows is not None:
                value = rows(x, y)
                off = _most(value if name.endswith("equality") else jax.tree.map(lambda v: jnp.maximum(v, 0), value))
                if not off <= 1e-4:
                    return f"{name} broken by {off:.2g}"
        plain = None if x is None else jax.tree.map(lambda leaf: np.asarray(leaf, float) / c, x)
        floor = self.floor(plain)
        value = (float(problem.lower(x, y)) + self._nonsmooth(x, y)) / lower
        if not value - floor <= 1e-4 * (1 + abs(floor)):
            return f"f is {value - floor:.2g} above its least value"
        value = float(problem.upper(x, y)) / upper
        if not abs(value - self.value) <= 1e-2 * (1 + abs(self.value)):
            return f"F is {value:.5g} and should be {self.value:.5g}"
        return ""

    def _nonsmooth(self, x: Any, y: Any) -> float:
        if self.problem.prox_lower is None:
            return 0.0
        _, lower, c, d = self.units
        return lower * math.exp(float(x[0]) / c) * float(np.abs(np.asarray(y) / d).sum())

    def scaled(self, upper: float = 1.0, lower: float = 1.0, x: float = 1.0, y: float = 1.0) -> Case:
        """The same problem with both losses times these numbers, and the variables x times, y times these."""
        problem, more = self.problem, {}
        into = lambda u, w: (over(x)(u), over(y)(w))

        def over(c: float) -> Function:
            return lambda tree: jax.tree.map(lambda leaf: leaf / c, tree)

        def of(fn: Function | None, by: float = 1.0) -> Function | None:
            return None if fn is None else lambda u, w: jax.tree.map(lambda v: by * v, fn(*into(u, w)))

        for name, c in (("project_upper", x), ("project_lower", y)):
            project = getattr(problem, name)
            if isinstance(project, sets.Box):
                more[name] = sets.Box(c * project.lower, c * project.upper)
            elif isinstance(project, sets.Simplex):
                more[name] = sets.Simplex(c * project.total)
            elif project is not None:
                more[name] = lambda z, c=c, project=project: over(1 / c)(project(over(c)(z)))
        prox = problem.prox_lower
        if prox is not None:
            more["prox_lower"] = lambda u, w, s: over(1 / y)(prox(over(x)(u), over(y)(w), s * lower / y**2))
        for name in ("constraint", "equality", "upper_constraint", "upper_equality"):
            more[name] = of(getattr(problem, name))
        moved = Problem(of(problem.upper, upper), of(problem.lower, lower), **more)
        start = over(1 / x)(self.x0), over(1 / y)(self.y0)
        point = None if self.solution is None else (over(1 / x)(self.solution[0]), over(1 / y)(self.solution[1]))
        units = (upper, lower, x, y)
        return dataclasses.replace(self, problem=moved, x0=start[0], y0=start[1], solution=point, units=units)


def _most(tree: Any) -> float:
    return max((float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(tree)), default=0.0)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


def _v(*numbers: float) -> jax.Array:
    return jnp.asarray(numbers, float)


def _zero(x: Any) -> float:
    return 0.0


# Smooth: one lower minimiser, which moves smoothly with x ------------------------------------------------------------


@case
def quadratic() -> Case:
    """F = |x - a|^2/2 + |y - b|^2/2, f = y'Qy/2 - y'Bx: y = Kx with K = Q^-1 B, and x = (I + K'K)^-1 (a + K'b)."""
    Q = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.5]])
    B = np.array([[1.0, 0.0], [0.5, -1.0], [2.0, 1.0]])
    a, b = np.array([1.0, -2.0]), np.array([0.5, 1.0, -1.0])
    K = np.linalg.solve(Q, B)
    x = np.linalg.solve(np.eye(2) + K.T @ K, a + K.T @ b)
    return Case(
        "smooth",
        Problem(
            lambda x, y: jnp.sum((x - a) ** 2) / 2 + jnp.sum((y - b) ** 2) / 2,
            lambda x, y: y @ Q @ y / 2 - y @ B @ x,
        ),
        _v(0, 0), _v(0, 0, 0), float(np.sum((x - a) ** 2) + np.sum((K @ x - b) ** 2)) / 2,
        lambda x: -x @ B.T @ K @ x / 2, (x, K @ x),
    )  # fmt: skip


@case
def exponential() -> Case:
    """f = exp(y) - x y on x > 0: y = log x, V = x - x log x. F = x - 3y: x = 3."""
    return Case(
        "smooth",
        Problem(
            lambda x, y: x[0] - 3 * y[0],
            lambda x, y: jnp.exp(y[0]) - x[0] * y[0],
            project_upper=sets.Box(0.1, 10),
        ),
        _v(1), _v(0.5), 3 - 3 * math.log(3), lambda x: float(x[0] - x[0] * np.log(x[0])), ([3.0], [math.log(3)]),
    )  # fmt: skip


@case
def shrinkage() -> Case:
    """f = |y - b|^2/2 + exp(x)|y|^2/2: y = s b, s = 1/(1 + exp x); F = |y - c|^2/2 is least at s = b.c/|b|^2 = 1/4."""
    b, e = np.array([2.0, -2.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, -1.0])  # b.e = 0
    c = b / 4 + e / 2
    return Case(
        "smooth",
        Problem(
            lambda x, y: jnp.sum((y - c) ** 2) / 2,
            lambda x, y: jnp.sum((y - b) ** 2) / 2 + jnp.exp(x[0]) * jnp.sum(y**2) / 2,
        ),
        _v(-1), jnp.zeros(4), 0.5, lambda x: float(5 * np.exp(x[0]) / (1 + np.exp(x[0]))), ([math.log(3)], b / 4),
    )  # fmt: skip


@case
def dictionaries() -> Case:
    """Variables in containers. f = |y.u - x.a|^2/2 + (y.v + 2 x.b)^2/2: u = a, v = -2b.

    F = |u - (1, 2)|^2/2 + |a|^2/2 + (v - 1)^2/2 + b^2: a = (1/2, 1), and (2b + 1)^2/2 + b^2 is least at b = -1/3, with
    1/18 + 1/9. Together 5/4 + 1/6.
    """
    t = np.array([1.0, 2.0])
    return Case(
        "smooth",
        Problem(
            lambda x, y: (
                jnp.sum((y["u"] - t) ** 2) / 2 + jnp.sum(x["a"] ** 2) / 2 + (y["v"] - 1) ** 2 / 2 + x["b"] ** 2
            ),
            lambda x, y: jnp.sum((y["u"] - x["a"]) ** 2) / 2 + (y["v"] + 2 * x["b"]) ** 2 / 2,
        ),
        {"a": _v(0, 0), "b": jnp.zeros(())}, {"u": _v(0, 0), "v": jnp.ones(())}, 1.25 + 1 / 6, _zero,
    )  # fmt: skip


@case
def upper_alone() -> Case:
    """x is in F alone, y in f alone: x = -1, y = 2, F = 9."""
    return Case(
        "smooth",
        Problem(lambda x, y: (x[0] + 1) ** 2 + (y[0] + 1) ** 2, lambda x, y: (y[0] - 2) ** 2),
        _v(4), _v(0), 9.0, _zero, ([-1.0], [2.0]),
    )  # fmt: skip


# Ill-conditioned or degenerate lower levels --------------------------------------------------------------------------


@case
def condition_1e6() -> Case:
    """f = (y - Mx)'H(y - Mx)/2 with eigenvalues 1 ... 1e6: y = Mx.

    F = |y - b|^2/2 + |x|^2/20: x = (M'M + I/10)^-1 M'b.
    """
    rng = np.random.default_rng(3)
    R, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    H = R @ np.diag(np.logspace(0, 6, 6)) @ R.T
    M, b = rng.normal(size=(6, 2)), rng.normal(size=6)
    x = np.linalg.solve(M.T @ M + 0.1 * np.eye(2), M.T @ b)
    return Case(
        "ill-conditioned",
        Problem(
            lambda x, y: jnp.sum((y - b) ** 2) / 2 + jnp.sum(x**2) / 20,
            lambda x, y: (y - M @ x) @ H @ (y - M @ x) / 2,
        ),
        _v(1, 1), jnp.zeros(6), float(np.sum((M @ x - b) ** 2)) / 2 + float(x @ x) / 20, _zero, (x, M @ x),
    )  # fmt: skip


@case
def unequal_units() -> Case:
    """f = (1e3 y1 - x)^2/2 + (1e-3 y2 - x)^2/2: y = (x/1e3, 1e3 x). F = (1e-3 y2 - 1)^2/2 + x^2/2: x = 1/2, F = 1/4."""
    return Case(
        "ill-conditioned",
        Problem(
            lambda x, y: (1e-3 * y[1] - 1) ** 2 / 2 + x[0] ** 2 / 2,
            lambda x, y: (1e3 * y[0] - x[0]) ** 2 / 2 + (1e-3 * y[1] - x[0]) ** 2 / 2,
        ),
        _v(0), _v(0, 0), 0.25, _zero, ([0.5], [0.0005, 500.0]),
    )  # fmt: skip


@case
def quartic() -> Case:
    """f = (y - x)^4/4: y = x with f_yy = 0 there. F = (x + 1)^2/2 + (y - 2)^2/2: x = 1/2, F = 9/4."""
    return Case(
        "degenerate",
        Problem(lambda x, y: (x[0] + 1) ** 2 / 2 + (y[0] - 2) ** 2 / 2, lambda x, y: (y[0] - x[0]) ** 4 / 4),
        _v(-1), _v(1), 2.25, _zero, ([0.5], [0.5]),
    )  # fmt: skip


@case
def half_quartic() -> Case:
    """f = (y1 - x)^4 + (y2 + x)^2: y = (x, -x). F = (y1 - 1)^2 + (y2 - 1)^2 + (x - 2)^2: x = 2/3, F = 14/3."""
    return Case(
        "degenerate",
        Problem(
            lambda x, y: (y[0] - 1) ** 2 + (y[1] - 1) ** 2 + (x[0] - 2) ** 2,
            lambda x, y: (y[0] - x[0]) ** 4 + (y[1] + x[0]) ** 2,
        ),
        _v(0), _v(0.5, 0.5), 14 / 3, _zero, ([2 / 3], [2 / 3, -2 / 3]),
    )  # fmt: skip


# Several lower minimisers: the best for F counts ---------------------------------------------------------------------


@case
def free_coordinate() -> Case:
    """f = (y1 - 3x)^2 leaves y2 free. F = (x - 2)^2 + (y2 + 1)^2 = 0 at x = 2, y = (6, -1)."""
    return Case(
        "several minimisers",
        Problem(lambda x, y: (x[0] - 2) ** 2 + (y[1] + 1) ** 2, lambda x, y: (y[0] - 3 * x[0]) ** 2),
        _v(0), _v(1, 1), 0.0, _zero, ([2.0], [6.0, -1.0]),
    )  # fmt: skip


@case
def free_and_coupled() -> Case:
    """f = (y1 - x)^2/2; y2 is in F alone: F = (y1 - 2)^2/2 + x^2/2 + (y2 - x)^2/2. y2 = x, x = 1, F = 1."""
    return Case(
        "several minimisers",
        Problem(
            lambda x, y: (y[0] - 2) ** 2 / 2 + x[0] ** 2 / 2 + (y[1] - x[0]) ** 2 / 2,
            lambda x, y: (y[0] - x[0]) ** 2 / 2,
        ),
        _v(0), _v(0, -3), 1.0, _zero, ([1.0], [1.0, 1.0]),
    )  # fmt: skip


@case
def out_of_range() -> Case:
    """f = (y1 + y2 - x)^2/2; F_y is not in the range of f_yy. F = y1^2 + 3 y2^2 + (x - 2)^2.

    On y1 + y2 = x the best is y = (3x/4, x/4), 3x^2/4 + (x - 2)^2: x = 8/7, F = 12/7.
    """
    return Case(
        "several minimisers",
        Problem(
            lambda x, y: y[0] ** 2 + 3 * y[1] ** 2 + (x[0] - 2) ** 2,
            lambda x, y: (y[0] + y[1] - x[0]) ** 2 / 2,
        ),
        _v(0), _v(2, 0), 12 / 7, _zero, ([8 / 7], [6 / 7, 2 / 7]),
    )  # fmt: skip


@case
def underdetermined() -> Case:
    """f = (a.y - x)^2/2, F = |y - c|^2/2 + (x - 1)^2/2: with x = a.y, y = (I + aa')^-1 (c + a)."""
    a, c = np.array([1.0, 2.0, -1.0, 0.5]), np.array([1.0, 0.0, 2.0, -1.0])
    y = np.linalg.solve(np.eye(4) + np.outer(a, a), c + a)
    return Case(
        "several minimisers",
        Problem(lambda x, y: jnp.sum((y - c) ** 2) / 2 + (x[0] - 1) ** 2 / 2, lambda x, y: (a @ y - x[0]) ** 2 / 2),
        _v(-1), jnp.zeros(4), float(np.sum((y - c) ** 2) + (a @ y - 1) ** 2) / 2, _zero, ([a @ y], y),
    )  # fmt: skip


@case
def circle() -> Case:
    """f = (|y|^2 - 1)^2: any y on the unit circle. F = |y - (3, 4)|^2/2 + (x - y1)^2/2: y = (.6, .8) = 16/2 + 0."""
    t = np.array([3.0, 4.0])
    return Case(
        "several minimisers",
        Problem(lambda x, y: jnp.sum((y - t) ** 2) / 2 + (x[0] - y[0]) ** 2 / 2, lambda x, y: (y @ y - 1) ** 2),
        _v(0), _v(-1, 0.1), 8.0, _zero, ([0.6], [0.6, 0.8]),
    )  # fmt: skip


@case
def constant_lower() -> Case:
    """f = x^2 does not depend on y: F = (x - 1)^2 + (x - y + 2)^2 = 0 at x = 1, y = 3."""
    return Case(
        "several minimisers",
        Problem(lambda x, y: (x[0] - 1) ** 2 + (x[0] - y[0] + 2) ** 2, lambda x, y: x[0] ** 2 + 0 * y[0]),
        _v(-1), _v(0), 0.0, lambda x: float(x[0] ** 2), ([1.0], [3.0]),
    )  # fmt: skip


@case
def flat_floor() -> Case:
    """f = max(|y - x| - 1, 0)^2: y anywhere in [x - 1, x + 1].

    F = (x - 3)^2 + (y + 1)^2: y = x - 1, x = 3/2, F = 9/2.
    """
    return Case(
        "several minimisers",
        Problem(
            lambda x, y: (x[0] - 3) ** 2 + (y[0] + 1) ** 2,
            lambda x, y: jnp.maximum(jnp.abs(y[0] - x[0]) - 1, 0.0) ** 2,
        ),
        _v(0), _v(0.5), 4.5, _zero, ([1.5], [0.5]),
    )  # fmt: skip


# Lower levels that are not convex ------------------------------------------------------------------------------------


@case
def two_wells() -> Case:
    """f = (y^2 - 1)^2: y = 1 or -1. F = (x - y)^2 + (y + 1)^2/2 = 0 at -1, -1; from y = 1 the other well has F = 2."""
    return Case(
        "non-convex",
        Problem(lambda x, y: (x[0] - y[0]) ** 2 + (y[0] + 1) ** 2 / 2, lambda x, y: (y[0] ** 2 - 1) ** 2),
        _v(0.5), _v(0.9), 0.0, _zero, ([-1.0], [-1.0]),
    )  # fmt: skip


def _tilted(x: float) -> float:
    roots = np.roots([4.0, 0.0, -4.0, x])
    y = roots[np.abs(roots.imag) < 1e-9].real
    return float(np.min((y**2 - 1) ** 2 + x * y))


@case
def well_in_a_box() -> Case:
    """f = (y^2 - 1)^2 + y/2 on [-5, 5], an inactive box: the left well is the minimum, the right one only local.

    F = (x - y)^2 + x/2: x = y - 1/4, F = y/2 - 1/16 with y the least root of 4y^3 - 4y + 1/2.
    """
    y = float(np.roots([4.0, 0.0, -4.0, 0.5]).real.min())
    return Case(
        "non-convex",
        Problem(
            lambda x, y: (x[0] - y[0]) ** 2 + x[0] / 2,
            lambda x, y: (y[0] ** 2 - 1) ** 2 + y[0] / 2,
            project_lower=sets.Box(-5, 5),
        ),
        _v(1), _v(1), y / 2 - 1 / 16, lambda x: _tilted(0.5), ([y - 0.25], [y]),
    )  # fmt: skip


@case
def waves() -> Case:
    """f = sin(x + y): x + y = -pi/2 + 2 pi k. F = (y - 4)^2 + (x - 1)^2 = (3 pi/2 - 5)^2/2: 3 pi/2 is nearest to 5."""
    d = 1.5 * math.pi - 5
    return Case(
        "non-convex",
        Problem(lambda x, y: (y[0] - 4) ** 2 + (x[0] - 1) ** 2, lambda x, y: jnp.sin(x[0] + y[0])),
        _v(0), _v(0), d * d / 2, lambda x: -1.0, ([1 + d / 2], [4 + d / 2]),
    )  # fmt: skip


@case
def tied_wells() -> Case:
    """f = (y^2 - 1)^2 + x y: the well at y > 0 is the minimum for x <= 0, tied with the other at x = 0.

    F = (y - 1)^2 + (x - 1)^2 wants x = 1, where the minimum is the other well and F > 4. For x < 0, F > 1. So the tie,
    x = 0 and y = 1 with F = 1, is the solution, and a solve that follows one well past it is wrong.
    """
    return Case(
        "non-convex",
        Problem(lambda x, y: (y[0] - 1) ** 2 + (x[0] - 1) ** 2, lambda x, y: (y[0] ** 2 - 1) ** 2 + x[0] * y[0]),
        _v(-1), _v(1), 1.0, lambda x: _tilted(float(x[0])), ([0.0], [1.0]),
    )  # fmt: skip


@case
def maximum_inside() -> Case:
    """A set given as a function. f = -(y - .2)^2 on [-1, 1] from its maximum y = .2: y = -1.

    F = (x - y)^2 + y: x = -1, F = -1.
    """
    return Case(
        "concave in a box",
        Problem(
            lambda x, y: (x[0] - y[0]) ** 2 + y[0],
            lambda x, y: -((y[0] - 0.2) ** 2),
            project_lower=lambda y: jnp.clip(y, -1, 1),
        ),
        _v(0), _v(0.2), -1.0, lambda x: -1.44, ([-1.0], [-1.0]),
    )  # fmt: skip


@case
def even_quartic() -> Case:
    """f = x y^2 - y^4 on [-1, 1] is concave in y^2: y = 0 for x >= 1 (V = 0), y = 1 or -1 for x <= 1 (V = x - 1).

    F = 2 y^2 - x on x in [0, 2]: x = 2, y = 0, F = -2. The start, x = 1/2 and y = 0, is a local minimum of f, not its
    minimum.
    """
    return Case(
        "concave in a box",
        Problem(
            lambda x, y: 2 * y[0] ** 2 - x[0],
            lambda x, y: x[0] * y[0] ** 2 - y[0] ** 4,
            project_upper=sets.Box(0, 2),
            project_lower=sets.Box(-1, 1),
        ),
        _v(0.5), _v(0.0), -2.0, lambda x: min(0.0, float(x[0]) - 1), ([2.0], [0.0]),
    )  # fmt: skip


@case
def concave_between_rows() -> Case:
    """f = -y^2 between -2x <= y <= x, x in [0, 3]: y = -2x, V = -4x^2.

    F = (x - 1)^2 + (y + 1)^2: x = 3/5, y = -6/5, F = 1/5.
    """
    return Case(
        "concave in a box",
        Problem(
            lambda x, y: (x[0] - 1) ** 2 + (y[0] + 1) ** 2,
            lambda x, y: -(y[0] ** 2),
            project_upper=sets.Box(0, 3),
            constraint=lambda x, y: jnp.stack([y[0] - x[0], -y[0] - 2 * x[0]]),
        ),
        _v(1), _v(0.5), 0.2, lambda x: -4 * float(x[0]) ** 2, ([0.6], [-1.2]),
    )  # fmt: skip


@case
def tie_at_a_moving_end() -> Case:
    """f = -(y - 1)^2 between x - 3 <= y <= 2: y = x - 3 for x <= 3, where V = -(x - 4)^2, and y = 2 for x >= 3, V = -1.

    F = (x - 1)^2 + (y - 2)^2 on x in [0, 4]. Left of x = 3 it is (x - 1)^2 + (x - 5)^2 >= 8, so the tie is the
    solution: x = 3, y = 2, F = 4. The other lower minimum moves with x, and its value with twice the slope of f.
    """
    return Case(
        "concave in a box",
        Problem(
            lambda x, y: (x[0] - 1) ** 2 + (y[0] - 2) ** 2,
            lambda x, y: -((y[0] - 1) ** 2),
            project_upper=sets.Box(0, 4),
            constraint=lambda x, y: jnp.stack([x[0] - 3 - y[0], y[0] - 2]),
        ),
        _v(0), _v(0), 4.0, lambda x: min(-((float(x[0]) - 4) ** 2), -1.0), ([3.0], [2.0]),
    )  # fmt: skip


@case
def free_at_one_x() -> Case:
    """f = (x - 1) y on [-1, 1]: y = 1 for x < 1, -1 for x > 1, any at x = 1. V = -|x - 1|.

    F = (x - 4/5)^2 + (y - 1/5)^2 is .64 at best where y is an end, and 1/25 at x = 1, y = 1/5.
    """
    return Case(
        "several minimisers",
        Problem(
            lambda x, y: (x[0] - 0.8) ** 2 + (y[0] - 0.2) ** 2,
            lambda x, y: (x[0] - 1) * y[0],
            project_lower=sets.Box(-1, 1),
        ),
        _v(0), _v(0), 0.04, lambda x: -abs(float(x[0]) - 1), ([1.0], [0.2]),
    )  # fmt: skip


@case
def face_of_a_programme() -> Case:
    """f = y1 + y2 on y1 + y2 >= x, y in [0, 2]^2: V = x, attained on a segment, for x in [0, 4].

    F = (y1 - 1/4)^2 + (y2 - 1/2)^2 + (x - 1)^2: y = (1/4 + d, 1/2 + d), x = 3/4 + 2d, 2 d^2 + (2d - 1/4)^2, d = 1/12:
    x = 11/12, y = (1/3, 7/12), F = 1/48.
    """
    return Case(
        "several minimisers",
        Problem(
            lambda x, y: (y[0] - 0.25) ** 2 + (y[1] - 0.5) ** 2 + (x[0] - 1) ** 2,
            lambda x, y: y[0] + y[1],
            project_upper=sets.Box(0, 4),
            project_lower=sets.Box(0, 2),
            constraint=lambda x, y: x[0] - y[0] - y[1],
        ),
        _v(3), _v(2, 2), 1 / 48, lambda x: float(x[0]), ([11 / 12], [1 / 3, 7 / 12]),
    )  # fmt: skip


# No solution ---------------------------------------------------------------------------------------------------------

_UNBOUNDED = frozenset({"UNBOUNDED", "DIVERGED"})
_INFEASIBLE = frozenset({"INFEASIBLE"})


@case
def concave_lower() -> Case:
    """f = -(y - 2x)^2 has a maximum and no minimum."""
    return Case(
        "unbounded",
        Problem(lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2, lambda x, y: -((y[0] - 2 * x[0]) ** 2)),
        _v(0.5), _v(1.2), None, words=_UNBOUNDED,
    )  # fmt: skip


@case
def linear_lower() -> Case:
    """f = (x^2 + 1) y falls for ever."""
    return Case(
        "unbounded",
        Problem(lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2, lambda x, y: (x[0] ** 2 + 1) * y[0]),
        _v(0), _v(1), None, words=_UNBOUNDED,
    )  # fmt: skip


@case
def saddle_lower() -> Case:
    """f = (y1 - x)^2/2 - (y2 - x)^2/2 is stationary at y = (x, x), the start, and falls for ever along y2."""
    return Case(
        "unbounded",
        Problem(
            lambda x, y: (x[0] - 1) ** 2 + y @ y,
            lambda x, y: (y[0] - x[0]) ** 2 / 2 - (y[1] - x[0]) ** 2 / 2,
        ),
        _v(0.3), _v(0.3, 0.3), None, words=_UNBOUNDED,
    )  # fmt: skip


@case
def cubic_lower() -> Case:
    """f = y^3 - 3y + x y is bounded near its local minimum, the start, and falls for ever below -2."""
    return Case(
        "unbounded",
        Problem(lambda x, y: x[0] ** 2 + (y[0] - 1) ** 2, lambda x, y: y[0] ** 3 - 3 * y[0] + x[0] * y[0]),
        _v(0.5), _v(1), None, words=_UNBOUNDED,
    )  # fmt: skip


@case
def falls_along_a_curve() -> Case:
    """f = -y2 under y2 <= x + y1^2 falls for ever along the parabola, and along no ray from a point below it."""
    return Case(
        "unbounded",
        Problem(
            lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2 + y[1] ** 2,
            lambda x, y: -y[1],
            constraint=lambda x, y: y[1] - x[0] - y[0] ** 2,
        ),
        _v(0), _v(0, 0), None, words=_UNBOUNDED,
    )  # fmt: skip


@case
def upper_falls_for_ever() -> Case:
    """F = -x with y = x: no least value."""
    return Case(
        "unbounded",
        Problem(lambda x, y: -x[0] + 0 * y[0], lambda x, y: (y[0] - x[0]) ** 2 / 2),
        _v(0), _v(0), None, words=frozenset({"UNBOUNDED", "DIVERGED", "NOT_STATIONARY", "MAX_STEPS", "LOCAL"}),
    )  # fmt: skip


@case
def empty_lower_set() -> Case:
    """y <= -1 and y >= 1 at once."""
    return Case(
        "infeasible",
        Problem(
            lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2,
            lambda x, y: (y[0] - x[0]) ** 2,
            constraint=lambda x, y: jnp.stack([y[0] + 1, 1 - y[0]]),
        ),
        _v(0), _v(0), None, words=_INFEASIBLE,
    )  # fmt: skip


@case
def empty_upper_set() -> Case:
    """y = x, and the upper level asks y >= x + 1."""
    return Case(
        "infeasible",
        Problem(
            lambda x, y: x[0] ** 2 + y[0] ** 2,
            lambda x, y: (y[0] - x[0]) ** 2 / 2,
            upper_constraint=lambda x, y: jnp.stack([x[0] + 1 - y[0]]),
        ),
        _v(1), _v(1), None, words=_INFEASIBLE,
    )  # fmt: skip


@case
def never_a_number() -> Case:
    """F = log(-1 - y^2) is no number anywhere."""
    return Case(
        "not a number",
        Problem(lambda x, y: x[0] ** 2 + jnp.log(-1 - y[0] ** 2), lambda x, y: (y[0] - x[0]) ** 2),
        _v(1), _v(1), None, words=frozenset({"DIVERGED"}),
    )  # fmt: skip


# Kinks ---------------------------------------------------------------------------------------------------------------


@case
def kink_to_pass() -> Case:
    """f = y above x/2 and 2x - 3, x in [0, 4]: y = max of both, with a kink at x = 2.

    F = x/2 - 2y falls by 1/2 before the kink and by 7/2 after it: x = 4, y = 5, F = -8. At the kink some multiplier of
    both rows makes F look stationary.
    """
    return Case(
        "kink",
        Problem(
            lambda x, y: x[0] / 2 - 2 * y[0],
            lambda x, y: y[0],
            project_upper=sets.Box(0, 4),
            constraint=lambda x, y: jnp.stack([x[0] / 2 - y[0], 2 * x[0] - 3 - y[0]]),
        ),
        _v(0.5), _v(1), -8.0, lambda x: float(np.maximum(x[0] / 2, 2 * x[0] - 3)), ([4.0], [5.0]),
    )  # fmt: skip


@case
def clipped() -> Case:
    """f = (y - x)^2/2 on [0, 1]: y = clip(x). F = (x - 3)^2/2 - y: x = 3, y = 1, F = -1, beyond two kinks."""
    return Case(
        "kink",
        Problem(
            lambda x, y: (x[0] - 3) ** 2 / 2 - y[0], lambda x, y: (y[0] - x[0]) ** 2 / 2, project_lower=sets.Box(0, 1)
        ),
        _v(-2), _v(0), -1.0, lambda x: float((x[0] - np.clip(x[0], 0, 1)) ** 2) / 2, ([3.0], [1.0]),
    )  # fmt: skip


@case
def solution_at_a_kink() -> Case:
    """f = (y - x)^2/2 on y >= 0: y = max(x, 0). F = 3y - x + x^2/10 has slopes -1 and 2 at 0: x = y = F = 0."""
    return Case(
        "kink",
        Problem(
            lambda x, y: 3 * y[0] - x[0] + x[0] ** 2 / 10,
            lambda x, y: (y[0] - x[0]) ** 2 / 2,
            constraint=lambda x, y: -y,
        ),
        _v(1), _v(1), 0.0, lambda x: float(np.minimum(x[0], 0) ** 2) / 2, ([0.0], [0.0]),
    )  # fmt: skip


@case
def absolute_value() -> Case:
    """f = y above x - 1 and 1 - x: y = |x - 1|. F = y + x^2/4 has slopes -1/2 and 3/2 at x = 1: F = 1/4."""
    return Case(
        "kink",
        Problem(
            lambda x, y: y[0] + x[0] ** 2 / 4,
            lambda x, y: y[0],
            constraint=lambda x, y: jnp.stack([x[0] - 1 - y[0], 1 - x[0] - y[0]]),
        ),
        _v(-1), _v(3), 0.25, lambda x: float(abs(x[0] - 1)), ([1.0], [0.0]),
    )  # fmt: skip


@case
def lasso() -> Case:
    """f = |y - b|^2/2 + exp(x)|y|_1, by its prox, b = (2, -1.5, .2): y = soft(b, t), t = exp x.

    F = |y - c|^2/2, c = (1.5, -1.2, 0). On t in (.2, 1.5), F = ((.5 - t)^2 + (.3 - t)^2)/2: t = .4, F = 1/100.
    """
    b, c = np.array([2.0, -1.5, 0.2]), np.array([1.5, -1.2, 0.0])
    soft = lambda t: np.sign(b) * np.maximum(np.abs(b) - t, 0)

    def floor(x: Any) -> float:
        t = float(np.exp(x[0]))
        y = soft(t)
        return float(np.sum((y - b) ** 2) / 2 + t * np.abs(y).sum())

    return Case(
        "kink",
        Problem(
            lambda x, y: jnp.sum((y - c) ** 2) / 2,
            lambda x, y: jnp.sum((y - b) ** 2) / 2,
            project_upper=sets.Box(-5, 2),
            prox_lower=lambda x, y, s: jnp.sign(y) * jnp.maximum(jnp.abs(y) - s * jnp.exp(x[0]), 0),
        ),
        _v(0.2), jnp.zeros(3), 0.01, floor, ([math.log(0.4)], soft(0.4)),
    )  # fmt: skip


# Sets ----------------------------------------------------------------------------------------------------------------


@case
def start_outside() -> Case:
    """A set given as a function, and a start outside it. f = (y - 2x)^2/2, F = (y - 1)^2 + x^2/5 on X = [-1/4, 1/4].

    x = 1/4, y = 1/2, F = 1/4 + 1/80.
    """
    return Case(
        "sets",
        Problem(
            lambda x, y: (y[0] - 1) ** 2 + x[0] ** 2 / 5,
            lambda x, y: (y[0] - 2 * x[0]) ** 2 / 2,
            project_upper=lambda x: jnp.clip(x, -0.25, 0.25),
        ),
        _v(4), _v(0), 0.2625, _zero, ([0.25], [0.5]),
    )  # fmt: skip


@case
def probabilities() -> Case:
    """f = |y - x|^2/2, F = |y - p|^2/2, x in the simplex, p = (.9, .5, -.2): its projection (.7, .3, 0), F = .06."""
    p = np.array([0.9, 0.5, -0.2])
    return Case(
        "sets",
        Problem(
            lambda x, y: jnp.sum((y - p) ** 2) / 2,
            lambda x, y: jnp.sum((y - x) ** 2) / 2,
            project_upper=sets.Simplex(),
        ),
        _v(1 / 3, 1 / 3, 1 / 3), jnp.zeros(3), 0.06, _zero, ([0.7, 0.3, 0.0], [0.7, 0.3, 0.0]),
    )  # fmt: skip


@case
def edge_of_a_domain() -> Case:
    """f = (y - 1/x)^2/2 with x in [0, 3], whose edge is a pole: y = 1/x. F = x + y: x = y = 1, F = 2."""
    return Case(
        "sets",
        Problem(
            lambda x, y: x[0] + y[0], lambda x, y: (y[0] - 1 / x[0]) ** 2 / 2, project_upper=sets.Box(0, 3)
        ),
        _v(2), _v(0), 2.0, _zero, ([1.0], [1.0]),
    )  # fmt: skip


@case
def linear_on_a_ball() -> Case:
    """f = -x.y on |y| <= 1: y = x/|x|, V = -|x|. F = |x - (3, 0)|^2/2 + |y - (0, 1)|^2.

    With x = r(cos t, sin t): r = 3 cos t, then F = 13/2 - 9/2 cos^2 t - 2 sin t, least at sin t = 2/9.
    """
    s = 2 / 9
    c = math.sqrt(1 - s * s)
    return Case(
        "sets",
        Problem(
            lambda x, y: ((x[0] - 3) ** 2 + x[1] ** 2) / 2 + y[0] ** 2 + (y[1] - 1) ** 2,
            lambda x, y: -x @ y,
            constraint=lambda x, y: jnp.stack([y @ y - 1]),
        ),
        _v(1, 1), _v(0, 0), 6.5 - 4.5 * c * c - 2 * s, lambda x: -float(np.linalg.norm(x)),
        ([3 * c * c, 3 * c * s], [c, s]),
    )  # fmt: skip


# Constraints ---------------------------------------------------------------------------------------------------------


@case
def capacity() -> Case:
    """f = (y - 2x)^2/2 with x + y <= 3: y = min(2x, 3 - x). F = (x - 3)^2/2 + (y - 1)^2/2: x = 5/2, F = 1/4."""
    return Case(
        "constraints",
        Problem(
            lambda x, y: (x[0] - 3) ** 2 / 2 + (y[0] - 1) ** 2 / 2,
            lambda x, y: (y[0] - 2 * x[0]) ** 2 / 2,
            constraint=lambda x, y: x + y - 3,
        ),
        _v(0), _v(0), 0.25, lambda x: float(np.maximum(3 * x[0] - 3, 0) ** 2) / 2, ([2.5], [0.5]),
    )  # fmt: skip


@case
def budget() -> Case:
    """f = |y - (x, x)|^2/2 with x + y1 + y2 = 1: both y are (1 - x)/2, V = (1 - 3x)^2/4.

    F = x^2/2 + |y - (2, 2)|^2/2: x = -1, y = (1, 1), F = 3/2.
    """
    return Case(
        "constraints",
        Problem(
            lambda x, y: x[0] ** 2 / 2 + jnp.sum((y - 2) ** 2) / 2,
            lambda x, y: jnp.sum((y - x[0]) ** 2) / 2,
            equality=lambda x, y: x + jnp.sum(y) - 1,
        ),
        _v(1), _v(0, 0), 1.5, lambda x: float((1 - 3 * x[0]) ** 2) / 4, ([-1.0], [1.0, 1.0]),
    )  # fmt: skip


@case
def part_of_x_infeasible() -> Case:
    """f = y between x and 1 - x, empty for x > 1/2: y = x. F = (x - 2)^2 + y: x = y = 1/2, F = 11/4."""
    return Case(
        "constraints",
        Problem(
            lambda x, y: (x[0] - 2) ** 2 + y[0],
            lambda x, y: y[0],
            constraint=lambda x, y: jnp.stack([x[0] - y[0], x[0] + y[0] - 1]),
        ),
        _v(0), _v(0.5), 2.75, lambda x: float(x[0]), ([0.5], [0.5]),
    )  # fmt: skip


@case
def no_qualification() -> Case:
    """(y - x)^2 <= 0 means y = x, without a multiplier. f = -y, F = (x - 1)^2 + y: x = y = 1/2, F = 3/4."""
    return Case(
        "constraints",
        Problem(
            lambda x, y: (x[0] - 1) ** 2 + y[0], lambda x, y: -y[0], constraint=lambda x, y: (y - x) ** 2
        ),
        _v(0), _v(0), 0.75, lambda x: -float(x[0]) - 0.0, ([0.5], [0.5]),
    )  # fmt: skip


@case
def upper_row() -> Case:
    """f = (y - x)^2/2, F = x^2 + y^2 with x1 + 2 x2 >= 5: x = y = (1, 2), F = 10."""
    return Case(
        "upper constraints",
        Problem(
            lambda x, y: x @ x + y @ y,
            lambda x, y: jnp.sum((y - x) ** 2) / 2,
            upper_constraint=lambda x, y: jnp.stack([5 - x[0] - 2 * x[1]]),
        ),
        _v(0, 0), _v(0, 0), 10.0, _zero, ([1.0, 2.0], [1.0, 2.0]),
    )  # fmt: skip


@case
def upper_row_in_y() -> Case:
    """f = (y + x)^2/2: y = -x. The upper level asks y <= x - 2, so x >= 1. F = x^2 + y^2/2: x = 1, y = -1, F = 3/2."""
    return Case(
        "upper constraints",
        Problem(
            lambda x, y: x[0] ** 2 + y[0] ** 2 / 2,
            lambda x, y: (y[0] + x[0]) ** 2 / 2,
            upper_constraint=lambda x, y: y - x + 2,
        ),
        _v(3), _v(0), 1.5, _zero, ([1.0], [-1.0]),
    )  # fmt: skip


@case
def upper_equation() -> Case:
    """f = |y - x|^2/2, F = |x|^2/2 + |y|^2/2, y1 - y2 = 1 asked above: x = y = (1/2, -1/2), F = 1/2."""
    return Case(
        "upper constraints",
        Problem(
            lambda x, y: (x @ x + y @ y) / 2,
            lambda x, y: jnp.sum((y - x) ** 2) / 2,
            upper_equality=lambda x, y: jnp.stack([y[0] - y[1] - 1]),
        ),
        _v(2, 1), _v(0, 0), 0.5, _zero, ([0.5, -0.5], [0.5, -0.5]),
    )  # fmt: skip


@case
def rows_on_both_levels() -> Case:
    """f = (y - x)^2/2 with y <= 2, above y >= x/2 and x >= 1. F = -x - y: y = 2 and x = 4, F = -6."""
    return Case(
        "upper constraints",
        Problem(
            lambda x, y: -x[0] - y[0],
            lambda x, y: (y[0] - x[0]) ** 2 / 2,
            constraint=lambda x, y: y - 2,
            upper_constraint=lambda x, y: jnp.stack([x[0] / 2 - y[0], 1 - x[0]]),
        ),
        _v(1), _v(1), -6.0, lambda x: float(np.maximum(x[0] - 2, 0) ** 2) / 2, ([4.0], [2.0]),
    )  # fmt: skip


# Tolls, ties and several local solutions -----------------------------------------------------------------------------


@case
def demand() -> Case:
    """Demand falls with the price: f = |y - (c - x)|^2/2, y >= 0, c = (6, 4). F = -x.y: x = y = (3, 2), F = -13."""
    c = np.array([6.0, 4.0])
    return Case(
        "toll",
        Problem(
            lambda x, y: -x @ y,
            lambda x, y: jnp.sum((y - c + x) ** 2) / 2,
            project_upper=sets.Box(0, 8),
            constraint=lambda x, y: -y,
        ),
        _v(1, 1), _v(1, 1), -13.0, lambda x: float(np.sum(np.minimum(c - x, 0) ** 2)) / 2, ([3.0, 2.0], [3.0, 2.0]),
    )  # fmt: skip


@case
def two_roads() -> Case:
    """f = (1 + x) y1 + 3 y2, y1 + y2 = 1, y >= 0: the tolled road while x <= 2, tied at 2. F = -x y1: x = 2, F = -2."""
    return Case(
        "toll",
        Problem(
            lambda x, y: -x[0] * y[0],
            lambda x, y: (1 + x[0]) * y[0] + 3 * y[1],
            project_upper=sets.Box(0, 10),
            constraint=lambda x, y: -y,
            equality=lambda x, y: jnp.stack([y[0] + y[1] - 1]),
        ),
        _v(0.5), _v(0.5, 0.5), -2.0, lambda x: float(np.minimum(1 + x[0], 3)), ([2.0], [1.0, 0.0]),
    )  # fmt: skip


@case
def tie_of_all() -> Case:
    """f = x y on [-1, 1]: y = -sign x, and any y at x = 0. F = x^2 + (y - 1/2)^2 = 0 at that tie, x = 0, y = 1/2."""
    return Case(
        "toll",
        Problem(
            lambda x, y: x[0] ** 2 + (y[0] - 0.5) ** 2, lambda x, y: x[0] * y[0], project_lower=sets.Box(-1, 1)
        ),
        _v(1), _v(0), 0.0, lambda x: -float(abs(x[0])), ([0.0], [0.5]),
    )  # fmt: skip


@case
def many_valleys() -> Case:
    """y = x, F = (x - 2)^2/10 + sin 3y on [-6, 6]: the least of its valleys, from a scan and Newton's method."""
    x = np.linspace(-6, 6, 200_001)
    x = float(x[np.argmin((x - 2) ** 2 / 10 + np.sin(3 * x))])
    for _ in range(5):
        x -= ((x - 2) / 5 + 3 * math.cos(3 * x)) / (1 / 5 - 9 * math.sin(3 * x))
    return Case(
        "local solutions",
        Problem(
            lambda x, y: (x[0] - 2) ** 2 / 10 + jnp.sin(3 * y[0]),
            lambda x, y: (y[0] - x[0]) ** 2,
            project_upper=sets.Box(-6, 6),
        ),
        _v(-4.5), _v(0), (x - 2) ** 2 / 10 + math.sin(3 * x), _zero, ([x], [x]),
    )  # fmt: skip


@case
def two_pieces() -> Case:
    """f = (y - 1)^2 - y x with 0 <= y <= 2 and y <= 2x: y = min(2x, 1 + x/2, 2), with kinks at x = 2/3 and x = 2.

    F = (x - 4)^2 + 16 y on x in [0, 4]: 0 <= x <= 2/3 gives 16 at 0 with slope 24; 2/3 <= x <= 2 has slope
    2(x - 4) + 8 >= 8/3 - 4/3; beyond 2, y = 2 and F falls to 32 at x = 4. So x = y = 0 with F = 16, and x = 4 is local.
    """

    def floor(x: Any) -> float:
        y = min(2 * float(x[0]), 1 + float(x[0]) / 2, 2.0)
        return (y - 1) ** 2 - y * float(x[0])

    return Case(
        "local solutions",
        Problem(
            lambda x, y: (x[0] - 4) ** 2 + 16 * y[0],
            lambda x, y: (y[0] - 1) ** 2 - y[0] * x[0],
            project_upper=sets.Box(0, 4),
            constraint=lambda x, y: jnp.stack([-y[0], y[0] - 2, y[0] - 2 * x[0]]),
        ),
        _v(3), _v(1), 16.0, floor, ([0.0], [0.0]),
    )  # fmt: skip


# Domains and simple problems -------------------------------------------------------------------------


@case
def upper_logarithm() -> Case:
    """F = y - log x, no number for x < 0, f = (y - x)^2/2: x = y = F = 1."""
    return Case(
        "not a number",
        Problem(lambda x, y: y[0] - jnp.log(x[0]), lambda x, y: (y[0] - x[0]) ** 2 / 2),
        _v(3), _v(0), 1.0, _zero, ([1.0], [1.0]),
    )  # fmt: skip


@case
def lower_entropy() -> Case:
    """f = y log y - y - x y, no number for y < 0: y = exp x, V = -exp x. F = (y - 2)^2/2 + (x - log 2)/4.

    At y = 2 the slope in x is 1/4: with u = exp x the condition is (u - 2) u + 1/4 = 0, u = 1 + sqrt(3)/2.
    """
    u = 1 + math.sqrt(3) / 2
    return Case(
        "not a number",
        Problem(
            lambda x, y: (y[0] - 2) ** 2 / 2 + (x[0] - math.log(2)) / 4,
            lambda x, y: y[0] * jnp.log(y[0]) - y[0] - x[0] * y[0],
            project_upper=sets.Box(-1, 2),
        ),
        _v(0), _v(0.1), (u - 2) ** 2 / 2 + (math.log(u) - math.log(2)) / 4, lambda x: -float(np.exp(x[0])),
        ([math.log(u)], [u]),
    )  # fmt: skip


@case
def two_poles() -> Case:
    """y = x in the unit ball of R^4, F = -(a.y)^2 - a.y/10 with |a| = 1: -11/10 at y = a, and -9/10 at y = -a, a local
    solution. The start is next to -a.
    """
    a = np.array([0.5, -0.5, 0.7, 0.1])
    a = a / np.linalg.norm(a)
    return Case(
        "local solutions",
        Problem(
            lambda x, y: -((a @ y) ** 2) - a @ y / 10,
            lambda x, y: jnp.sum((y - x) ** 2) / 2,
            upper_constraint=lambda x, y: jnp.sum(x**2) - 1,
        ),
        jnp.asarray(-0.9 * a), jnp.asarray(-0.9 * a), -1.1, _zero, (a, a),
    )  # fmt: skip


@case
def two_kinks_to_pass() -> Case:
    """f = y over y >= x, 3x - 2, 7x - 10 on x in [0, 3]: kinks at x = 1 and x = 2, V their largest.

    F = x/2 - y has the slopes -1/2, -5/2 and -13/2 between them: x = 3, y = 11, F = -19/2.
    """
    return Case(
        "kink",
        Problem(
            lambda x, y: x[0] / 2 - y[0],
            lambda x, y: y[0],
            project_upper=sets.Box(0, 3),
            constraint=lambda x, y: jnp.stack([x[0], 3 * x[0] - 2, 7 * x[0] - 10]) - y[0],
        ),
        _v(0.5), _v(0.5), -9.5, lambda x: max(float(x[0]), 3 * float(x[0]) - 2, 7 * float(x[0]) - 10), ([3.0], [11.0]),
    )  # fmt: skip


@case
def simple_line() -> Case:
    """Both levels own y. f = (y1 + y2 - 2)^2/2, F = |y - (3, 0)|^2/2: y = (5/2, -1/2), F = 1/4."""
    t = np.array([3.0, 0.0])
    return Case(
        "simple",
        Problem(lambda x, y: jnp.sum((y - t) ** 2) / 2, lambda x, y: (y[0] + y[1] - 2) ** 2 / 2),
        None, _v(0, 0), 0.25, _zero, (None, [2.5, -0.5]),
    )  # fmt: skip


@case
def simple_rows() -> Case:
    """Both levels own y. f = y1 + y2 on y >= 0 and y1 + y2 >= 1; F = (y1 - 2)^2/2 + (y2 - 1)^2/2: y = (1, 0), F = 1."""
    t = np.array([2.0, 1.0])
    return Case(
        "simple",
        Problem(
            lambda x, y: jnp.sum((y - t) ** 2) / 2,
            lambda x, y: y[0] + y[1],
            constraint=lambda x, y: jnp.stack([-y[0], -y[1], 1 - y[0] - y[1]]),
        ),
        None, _v(2, 2), 1.0, lambda x: 1.0, (None, [1.0, 0.0]),
    )  # fmt: skip


# What a search has to go far for, or not to trust --------------------------------------------------------------------


@case
def tie_beyond_a_local_solution() -> Case:
    """f = (y^2 - 1)^2 + 3 x y/10: the wells tie at x = 0. F = (y - 1/2)^2 + (x - 1/2)^2 on x in [-2, 2].

    For x > 0 the minimum is the left well, where F > 9/4; for x < 0 the right one, y > 1, where F > 1/2. So the tie,
    x = 0 and y = 1 with F = 1/2, is the solution; from the left well a local one is met first.
    """
    return Case(
        "non-convex",
        Problem(
            lambda x, y: (y[0] - 0.5) ** 2 + (x[0] - 0.5) ** 2,
            lambda x, y: (y[0] ** 2 - 1) ** 2 + 0.3 * x[0] * y[0],
            project_upper=sets.Box(-2, 2),
        ),
        _v(1), _v(-1), 0.5, lambda x: _tilted(0.3 * float(x[0])), ([0.0], [1.0]),
    )  # fmt: skip


@case
def lattice_of_wells() -> Case:
    """f = |y - x|^2 - 2 sum cos(2 pi (y - x)) in R^3, a well at each integer, the least at y = x: V = -6.

    F = |y - 1|^2 + |x|^2: x = y = 1/2, F = 3/2. The start is in another well.
    """
    return Case(
        "non-convex",
        Problem(
            lambda x, y: jnp.sum((y - 1) ** 2) + x @ x,
            lambda x, y: jnp.sum((y - x) ** 2 - 2 * jnp.cos(2 * jnp.pi * (y - x))),
        ),
        _v(0, 0, 0), _v(1, -1, 2), 1.5, lambda x: -6.0, ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    )  # fmt: skip


@case
def saddle_of_the_upper_level() -> Case:
    """y = x, F = y1^2 - y2^2 + x2^4/4: a saddle at 0, to which the start's symmetry leads. F = -1 at x2^2 = 2."""
    return Case(
        "maxima and saddles",
        Problem(lambda x, y: y[0] ** 2 - y[1] ** 2 + x[1] ** 4 / 4, lambda x, y: jnp.sum((y - x) ** 2)),
        _v(1, 0), _v(0, 0), -1.0, _zero,
    )  # fmt: skip


@case
def maximum_of_the_upper_level() -> Case:
    """y = x, F = x^4/4 - y^2 from its local maximum at 0. F = -1 at x^2 = 2."""
    return Case(
        "maxima and saddles",
        Problem(lambda x, y: x[0] ** 4 / 4 - y[0] ** 2, lambda x, y: (y[0] - x[0]) ** 2),
        _v(0), _v(0), -1.0, _zero,
    )  # fmt: skip


@case
def hole_far_away() -> Case:
    """y = x, F = y^2/50 - 5 exp(-(y - 8)^2/4): zero at the start's valley, and a hole near 8.

    There F' = y/25 + 5/2 (y - 8) exp(-(y - 8)^2/4) = 0, solved by Newton's method.
    """
    x = 8.0
    for _ in range(50):
        e = math.exp(-((x - 8) ** 2) / 4)
        x -= (x / 25 + 2.5 * (x - 8) * e) / (1 / 25 + 2.5 * e - 1.25 * (x - 8) ** 2 * e)
    return Case(
        "local solutions",
        Problem(lambda x, y: y[0] ** 2 / 50 - 5 * jnp.exp(-((y[0] - 8) ** 2) / 4), lambda x, y: (y[0] - x[0]) ** 2),
        _v(-1), _v(0), x * x / 50 - 5 * math.exp(-((x - 8) ** 2) / 4), _zero, ([x], [x]),
    )  # fmt: skip


@case
def curved_valley() -> Case:
    """f = 100 (y2 - y1^2)^2 + (y1 - x)^2: y = (x, x^2). F = (y2 - 4)^2 + (x - 1)^2: 4x^3 - 14x - 2 = 0.

    The greatest root is the solution; the least, near the start, is a local one with F > 8.
    """
    x = float(np.roots([4.0, 0.0, -14.0, -2.0]).real.max())
    return Case(
        "ill-conditioned",
        Problem(
            lambda x, y: (y[1] - 4) ** 2 + (x[0] - 1) ** 2,
            lambda x, y: 100 * (y[1] - y[0] ** 2) ** 2 + (y[0] - x[0]) ** 2,
        ),
        _v(-2), _v(-1.2, 1), (x * x - 4) ** 2 + (x - 1) ** 2, _zero, ([x], [x, x * x]),
    )  # fmt: skip


@case
def bounds_on_the_safe_side() -> Case:
    """y = x, F = (y - 1)^2 + (x - 2)^2/10: x = 12/11, F = 1/11. Both sets are a million times as wide."""
    return Case(
        "sets",
        Problem(
            lambda x, y: (y[0] - 1) ** 2 + (x[0] - 2) ** 2 / 10,
            lambda x, y: (y[0] - x[0]) ** 2,
            project_upper=sets.Box(-1e6, 1e6),
            project_lower=sets.Box(-1e6, 1e6),
        ),
        _v(0), _v(0), 1 / 11, _zero, ([12 / 11], [12 / 11]),
    )  # fmt: skip


@case
def far_from_a_ball() -> Case:
    """f = |y - x|^2/2 on the 1-norm's unit ball of R^12, whose rows are too many to be seen. F = |y - c|^2: x = c.

    Outside of the ball x is not seen along the ball's normal, and all of its faces hold local solutions.
    """
    c = np.linspace(-0.1, 0.1, 12)

    def floor(x: Any) -> float:
        size = np.sort(np.abs(x))[::-1]
        t = (np.cumsum(size) - 1) / np.arange(1, 13)
        t = max(t[np.sum(size > t) - 1], 0.0)
        return float(np.sum(np.minimum(np.abs(x), t) ** 2)) / 2

    return Case(
        "sets",
        Problem(
            lambda x, y: jnp.sum((y - c) ** 2),
            lambda x, y: jnp.sum((y - x) ** 2) / 2,
            project_lower=sets.Ball(1.0, norm=1),
        ),
        jnp.ones(12), jnp.zeros(12), 0.0, floor, (c, c),
    )  # fmt: skip


@case
def ridge() -> Case:
    """f = y above x1 - x2 and x2 - x1: y = |x1 - x2|. F = 3y + (x1 - 1)^2 + (x2 + 1)^2, from the ridge x1 = x2.

    On the ridge F = 2 + 2 x1^2, and off it 3 - 2 > 0 is its slope at 0: x = 0, y = 0, F = 2.
    """
    return Case(
        "kink",
        Problem(
            lambda x, y: 3 * y[0] + (x[0] - 1) ** 2 + (x[1] + 1) ** 2,
            lambda x, y: y[0],
            constraint=lambda x, y: jnp.stack([x[0] - x[1] - y[0], x[1] - x[0] - y[0]]),
        ),
        _v(2, 2), _v(0), 2.0, lambda x: abs(float(x[0] - x[1])), ([0.0, 0.0], [0.0]),
    )  # fmt: skip


@case
def worst_case() -> Case:
    """The lower level looks for the y that breaks cos 2y + y/10 <= x most, y in [-4, 4]; F = x.

    The greatest is near pi: 2 sin 2y = 1/10, y = pi + arcsin(1/20)/2.
    """
    y = math.pi + math.asin(0.05) / 2
    top = math.cos(2 * y) + y / 10
    return Case(
        "upper constraints",
        Problem(
            lambda x, y: x[0] + 0 * y[0],
            lambda x, y: -(jnp.cos(2 * y[0]) + y[0] / 10),
            project_lower=sets.Box(-4, 4),
            upper_constraint=lambda x, y: jnp.cos(2 * y) + y / 10 - x,
        ),
        _v(5), _v(0), top, lambda x: -top, ([top], [y]),
    )  # fmt: skip


# Found by a later hunt -----------------------------------------------------------------------------------------------


@case
def falls_to_an_asymptote() -> Case:
    """f = exp(-y) comes down to 0 and has no minimiser."""
    return Case(
        "unbounded",
        Problem(lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2, lambda x, y: jnp.exp(-y[0]) + 0 * x[0]),
        _v(0), _v(0), None, words=frozenset({"UNBOUNDED"}),
    )  # fmt: skip


@case
def logarithm_down() -> Case:
    """f = -log(1 + y^2) falls for ever, by less and less, from its maximum at 0."""
    return Case(
        "unbounded",
        Problem(lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2, lambda x, y: -jnp.log(1 + y[0] ** 2) + 0 * x[0]),
        _v(0), _v(0), None, words=frozenset({"UNBOUNDED"}),
    )  # fmt: skip


@case
def runs_away_along_a_line() -> Case:
    """f = -x y has no minimiser at x = 1, and only y runs: F = (x - 1)^2 is 0 all the way."""
    return Case(
        "unbounded",
        Problem(lambda x, y: (x[0] - 1) ** 2, lambda x, y: -x[0] * y[0]),
        _v(1), _v(0), None, words=frozenset({"UNBOUNDED", "LOWER_LEVEL"}),
    )  # fmt: skip


@case
def sixth_power() -> Case:
    """f = (y - x)^6: y = x, with three derivatives that vanish. F = (x - 1)^2 + x^2/10: x = 10/11, F = 1/11."""
    return Case(
        "flat",
        Problem(lambda x, y: (y[0] - 1) ** 2 + x[0] ** 2 / 10, lambda x, y: (y[0] - x[0]) ** 6),
        _v(0), _v(2), 1 / 11, _zero, ([10 / 11], [10 / 11]),
    )  # fmt: skip


@case
def kink_at_the_start() -> Case:
    """F = -|y| + x^2/4 with y = x, from its kink: x = 2 or -2, F = -1."""
    return Case(
        "kink",
        Problem(lambda x, y: -jnp.abs(y[0]) + x[0] ** 2 / 4, lambda x, y: (y[0] - x[0]) ** 2),
        _v(0), _v(0), -1.0, _zero,
    )  # fmt: skip


@case
def curve_of_minimisers() -> Case:
    """f = (y1 - (y0^2 + x))^2: all of a parabola, (t, t^2 + x). F = y0^2 + (y1 - 1)^2 + x^2, best for x = (1 - t^2)/2.

    There it is t^2 + (1 - t^2)^2/2, which has its minimum 1/2 at t = 0: x = 1/2.
    """
    return Case(
        "several minimisers",
        Problem(lambda x, y: y[0] ** 2 + (y[1] - 1) ** 2 + x[0] ** 2, lambda x, y: (y[1] - y[0] ** 2 - x[0]) ** 2),
        _v(0.2), _v(1, -1), 0.5, _zero, ([0.5], [0.0, 0.5]),
    )  # fmt: skip


@case
def saddle_at_the_start() -> Case:
    """Four wells, from the saddle point between two: f = (y0^2 - 1)^2 + (y1^2 - 1)^2, F best at (1, -1)."""
    return Case(
        "several minimisers",
        Problem(
            lambda x, y: (y[0] - 1) ** 2 + (y[1] + 1) ** 2 + (x[0] - 0.3) ** 2,
            lambda x, y: (y[0] ** 2 - 1) ** 2 + (y[1] ** 2 - 1) ** 2 + 0 * x[0],
        ),
        _v(0), _v(0, 1), 0.0, _zero, ([0.3], [1.0, -1.0]),
    )  # fmt: skip


@case
def edge_of_a_simplex() -> Case:
    """f = x y0 + (2 - x) y1 on a simplex jumps from y = (0, 1) to (1, 0) at x = 1, where all of it ties.

    F = (y0 - 1/2)^2 + (x - 1)^2 is 0 there, at y = (1/2, 1/2), and at least 1/4 elsewhere.
    """
    return Case(
        "tie",
        Problem(
            lambda x, y: (y[0] - 0.5) ** 2 + (x[0] - 1) ** 2,
            lambda x, y: x[0] * y[0] + (2 - x[0]) * y[1],
            project_lower=sets.Simplex(),
        ),
        _v(0), _v(1, 0), 0.0, lambda x: float(min(x[0], 2 - x[0])), ([1.0], [0.5, 0.5]),
    )  # fmt: skip


@case
def steps_of_a_floor() -> Case:
    """y = floor(x) and F = (y - 2)^2 + x^2/100: x = 2, F = 1/25, at the edge of a step where every slope is x/50."""
    return Case(
        "discontinuous",
        Problem(lambda x, y: (y[0] - 2) ** 2 + x[0] ** 2 / 100, lambda x, y: (y[0] - jnp.floor(x[0])) ** 2),
        _v(0.5), _v(0), 0.04, _zero,
    )  # fmt: skip


@case
def free_where_x_is_zero() -> Case:
    """f = x^2 (y + 1)^2: y = -1, but at x = 0 any y. F = (y - 1)^2 + x^2: 0 there, and above 4 elsewhere."""
    return Case(
        "tie",
        Problem(lambda x, y: (y[0] - 1) ** 2 + x[0] ** 2, lambda x, y: x[0] ** 2 * (y[0] + 1) ** 2),
        _v(1), _v(0), 0.0, _zero, ([0.0], [1.0]),
    )  # fmt: skip
