"""All functions of a small problem and their dense Jacobian in one compiled program, and their scaling on the host.

The unknowns are z = (x, y, lam, mu) in one vector, the rows [F, f, G, H, g, h, r] in another, with

    r(z) = gradient in y of f + lam . g + mu . h,      shape (n_y,),

so that one call gives all that a method of nonlinear programming asks for: first derivatives of the two losses and of
all constraints, and the derivative of the lower level's stationarity. The derivative is taken forwards, in one batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import _compiling, sets
from bilevel._convexity import VARIABLE, Kind, constant, kinds
from bilevel._traces import degrees, equations
from bilevel.constraints import depends
from bilevel.problem import ROWS, Problem, ProblemError
from bilevel.solvers._units import IRREGULAR, untrue
from bilevel.typing import PyTree

__all__ = ["PASS_BYTES", "Evaluated", "Program", "precise", "size_of"]

_KINKS = frozenset((
    "abs", "argmax", "argmin", "clamp", "cummax", "cummin", "max", "min", "reduce_max", "reduce_min", "rsqrt",
    "select_n", "sign", "sort", "sqrt",
))  # fmt: skip
"""Primitives of functions that have kinks somewhere."""
_UNEQUAL = 1e3
"""How far the units of the coordinates of one variable differ before each has its own."""
_NO_LENGTH = 1e6
"""By how much lengths of a variable differ that are not both lengths."""
_SHORTER = 13
"""How many lengths are tried over which slopes are of the order of those nearby, each a quarter of the one before."""
_WITHOUT = 40
"""And over which there is a value at all."""
_EPS = np.finfo(float).eps
_NEARBY = np.array([1e-3, 1e-3 / 16])
"""Steps at which differences are taken, in units."""
_TIGHT = 1e-9
"""Relative: two numbers that are equal but for rounding."""
PASS_BYTES = 2**22
"""What one evaluation of both losses may read and write, where there may be thousands of them."""


def precise() -> Any:
    """A block in which JAX computes in double precision, which the methods of the host do as well."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # type: ignore[attr-defined]  # before it was moved

    return enable_x64(True)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How x and y lie in a vector, and how many rows there are of each kind: hashable, static in the program.

    Attributes:
      x, y: the structures of the variables.
      shapes: of all their leaves, those of x first.
      rows: the numbers of rows of G, H, g, h, the bounds of x and y as rows included.
    """

    x: Any
    y: Any
    shapes: tuple[tuple[int, ...], ...]
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def sizes(self) -> tuple[int, int]:
        """n_x and n_y."""
        counts = [int(np.prod(shape)) for shape in self.shapes]
        return sum(counts[: self.x.num_leaves]), sum(counts[self.x.num_leaves :])

    def unflatten(self, vector: Any) -> tuple[PyTree, PyTree]:
        """(x, y) of the first n_x + n_y entries."""
        leaves, first = [], 0
        for shape in self.shapes:
            size = int(np.prod(shape))
            leaves.append(vector[first : first + size].reshape(shape))
            first += size
        cut = self.x.num_leaves
        return jax.tree.unflatten(self.x, leaves[:cut]), jax.tree.unflatten(self.y, leaves[cut:])


def flatten(tree: PyTree) -> np.ndarray:
    """The leaves in one vector of double precision, on the host."""
    leaves = [np.asarray(leaf, float).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


class Bounds(NamedTuple):
    """Finite bounds of one variable as rows: sign * (variable[index] - value) <= 0."""

    index: Any
    sign: Any
    value: Any

    @classmethod
    def of(cls, lower: np.ndarray, upper: np.ndarray) -> Bounds:
        """The finite ones of two vectors."""
        low, high = np.flatnonzero(np.isfinite(lower)), np.flatnonzero(np.isfinite(upper))
        sign = np.concatenate([-np.ones(low.size), np.ones(high.size)])
        return cls(np.concatenate([low, high]), sign, np.concatenate([lower[low], upper[high]]))

    def rows(self, leaves: list[jax.Array]) -> jax.Array:
        """Their values."""
        if not self.index.shape[0]:
            return jnp.zeros((0,))
        vector = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        return self.sign * (vector[self.index] - self.value)


def _vector(*trees: PyTree) -> jax.Array:
    leaves = [jnp.ravel(leaf) for tree in trees for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros((0,))


def _rows(level: Any, bounds: Bounds, variable: Any, x: PyTree, y: PyTree) -> tuple[jax.Array, jax.Array]:
    """A level's inequalities and equalities: its constraints, then its set's."""
    project, own = level.project, variable
    inequality = [level.constraint(x, y)] if level.constraint is not None else []
    equality = [level.equality(x, y)] if level.equality is not None else []
    if project is not None:
        inequality += [project.inequality(own), bounds.rows(jax.tree.leaves(own))]
        equality += [project.equality(own)]
    return _vector(*inequality), _vector(*equality)


def _all_rows(
    problem: Problem, bounds: tuple[Bounds, Bounds], layout: Layout, vector: Any
) -> tuple[Any, Any, Any, Any, Any, Any]:
    upper, lower = problem.full_levels()
    x, y = layout.unflatten(vector)
    upper_rows, lower_rows = _rows(upper, bounds[0], x, x, y), _rows(lower, bounds[1], y, x, y)
    return upper(x, y), lower(x, y), *upper_rows, *lower_rows


@_compiling.jit(static_argnames=("layout",))
def _evaluate(problem: Problem, bounds: tuple[Bounds, Bounds], z: jax.Array, layout: Layout) -> tuple[Any, Any]:
    (n, m), p = layout.sizes, layout.rows[2]

    def values(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        xy, lam, mu = z[: n + m], z[n + m : n + m + p], z[n + m + p :]

        def lagrangian(y: jax.Array) -> tuple[jax.Array, jax.Array]:
            parts = _all_rows(problem, bounds, layout, jnp.concatenate([xy[:n], y]))
            return parts[1] + lam @ parts[4] + mu @ parts[5], _vector(*parts)

        residual, rows = jax.grad(lagrangian, has_aux=True)(xy[n:])
        found = jnp.concatenate([rows, residual])
        return found, found

    jacobian, found = jax.jacfwd(values, has_aux=True)(z)
    return found, jacobian


@dataclasses.dataclass
class Evaluated:
    """The scaled values and Jacobians at a point; `F, f, G, H, g, h, r`, and each with a `d` before it.

    A Jacobian has a column for each of the scaled unknowns (x, y, lam, mu).
    """

    F: float
    f: float
    G: np.ndarray
    H: np.ndarray
    g: np.ndarray
    h: np.ndarray
    r: np.ndarray
    dF: np.ndarray
    df: np.ndarray
    dG: np.ndarray
    dH: np.ndarray
    dg: np.ndarray
    dh: np.ndarray
    dr: np.ndarray


class ProgramSpentError(Exception):
    """A whole search has evaluated its programme as often as it was to, and ends; one solve's own limit is `nlp`'s."""


class Program:
    """A problem's functions on the host, in units of their own.

    Variables are divided by lengths on which the functions change, rows by their gradients: a problem whose F, f, x, y
    or constraints are multiplied with a number is the same problem here. All vectors below are scaled.

    Args:
      problem: the problem, on full batches.
      x, y: a point, for shapes and scales.
      owner: who asks, for errors.
      measured: False: shapes alone, without units and bounds, and without a compile.
      began: where the run began that came to (x, y): its way is a length, whatever the losses do on it.

    Attributes:
      n, m, p, q: the numbers of x, y, lower inequalities and lower equalities.
      start: the point (x, y), scaled.
      lower, upper: bounds of the unknowns that sets or rows imply.
      own_lower, own_upper: those of (x, y) that the lower level's rows and the sets imply, without the upper's rows.
      pairs, upper_pairs: (k, 2): inequalities i and j with g_i = -g_j (G_i = -G_j), which are one equality.
      inequality, upper_inequality: bool, which rows of g and of G are of no such pair.
      bounding, upper_bounding: bool, which rows of g and of G bound one unknown: `lower` and `upper` have them.
      edges: of each bounding row of g, its unknown and the bound.
      double: whether the functions are evaluated in double precision.

    Raises:
      ProblemError: a part of the problem is not made for this.
    """

    def __init__(
        self,
        problem: Problem,
        x: PyTree,
        y: PyTree,
        owner: str = "MPCC",
        *,
        measured: bool = True,
        began: tuple[PyTree, PyTree] | None = None,
    ) -> None:
        problem = visible(problem, x, y)
        self.problem, self.owner = problem, owner
        _refuse(problem, x, y, owner)
        leaves = [*jax.tree.leaves(x), *jax.tree.leaves(y)]
        self.dtypes = [np.asarray(leaf).dtype for leaf in leaves]
        layout = Layout(jax.tree.structure(x), jax.tree.structure(y), tuple(np.shape(leaf) for leaf in leaves))
        self.n, self.m = layout.sizes
        x_low, x_high = _set_bounds(problem.project_upper, x)
        y_low, y_high = _set_bounds(problem.project_lower, y)
        self._bounds = Bounds.of(x_low, x_high), Bounds.of(y_low, y_high)
        xy = np.concatenate([flatten(x), flatten(y)])
        self.double = True
        try:
            with precise():
                shapes = jax.eval_shape(lambda vector: _all_rows(problem, self._bounds, layout, vector), xy)
        except TypeError:  # a function insists on single precision
            self.double = False
            single = xy.astype(np.float32)
            shapes = jax.eval_shape(lambda vector: _all_rows(problem, self._bounds, layout, vector), single)
        counts: tuple[Any, ...] = tuple(int(np.prod(shape.shape)) for shape in shapes)
        self.shapes = self._user_shapes(problem, x, y, counts[2:])
        self.layout = dataclasses.replace(layout, rows=counts[2:])
        self.p, self.q = counts[4], counts[5]
        self.size = self.n + self.m + self.p + self.q
        edges = np.cumsum([0, 1, 1, *counts[2:], self.m])
        self._slices = [slice(a, b) for a, b in itertools.pairwise(edges)]
        self._cache: dict[bytes, Evaluated] = {}
        self._convexity: dict[tuple[Kind, ...], bool] = {}
        self.calls, self.most = 0, np.inf
        self.columns, self.rows = np.ones(self.size), np.ones(edges[-1])
        self._way = np.zeros(xy.size) if began is None else np.abs(np.concatenate([*map(flatten, began)]) - xy)
        self.lower, self.upper = np.full(self.size, -np.inf), np.full(self.size, np.inf)
        low, high = np.concatenate([x_low, y_low]), np.concatenate([x_high, y_high])
        xy = np.clip(xy, low, high)
        if measured:
            with self.precision():
                self._measure(xy, low, high)
        self.start = xy / self.columns[: self.n + self.m]

    @functools.cached_property
    def linear(self) -> bool:
        """Whether f(x, .) and the lower level's rows are affine at every x."""
        lower = self.problem.full_lower()
        with self.precision():
            x, y = self.trees(self.start)
            if self.double:
                x, y = jax.tree.map(lambda leaf: np.asarray(leaf, float), (x, y))

            def slopes(y: PyTree, x: PyTree, tangent: PyTree) -> Any:
                parts = lambda y: (lower(x, y), _rows(lower, self._bounds[1], y, x, y))  # noqa: E731
                return jax.jvp(parts, (y,), (tangent,))[1]

            return not depends(slopes, y, x, y, on=0)

    @functools.cached_property
    def _lower_trace(self) -> Any:
        """f and the lower level's rows, inequalities and equalities, as a trace of leaves of y and of x."""
        lower = self.problem.full_lower()
        with self.precision():
            x, y = self.trees(self.start)
            if self.double:
                x, y = jax.tree.map(lambda leaf: np.asarray(leaf, float), (x, y))
            parts = lambda y, x: (lower(x, y), *_rows(lower, self._bounds[1], y, x, y))  # noqa: E731
            return jax.make_jaxpr(parts)(y, x)

    @functools.cached_property
    def quadratic(self) -> bool:
        """Whether f(x, .) is seen to be of degree two at most, and the lower level's rows to be affine, at every x."""
        traced, of_x = self._lower_trace.jaxpr, self.layout.x.num_leaves
        loss, *rows = degrees(traced, [1.0] * (len(traced.invars) - of_x) + [0.0] * of_x)
        return loss <= 2 and max(rows, default=0.0) <= 1 and not traced.effects

    @functools.cached_property
    def may_kink(self) -> bool:
        """Whether f is computed with a function that has kinks: an absolute value, a maximum, a choice, a root."""
        lower = self.problem.full_lower()
        with self.precision():
            traced = jax.make_jaxpr(lower)(*self.trees(self.start)).jaxpr
        return any(equation.primitive.name in _KINKS for equation in equations(traced))

    @functools.cached_property
    def affine(self) -> bool:
        """Whether all rows are seen to be affine in (x, y), and f to be of degree two at most: then the lower level's
        conditions are affine in (x, y, lam, mu)."""
        with self.precision():
            rows = functools.partial(_all_rows, self.problem, self._bounds, self.layout)
            traced = jax.make_jaxpr(rows)(self.start if self.double else self.start.astype(np.float32)).jaxpr
            _, lower, *others = degrees(traced, [1.0])
            return lower <= 2 and max(others, default=0.0) <= 1 and not traced.effects

    def convex(self, xy: np.ndarray) -> bool:
        """Whether the lower level at the x of `xy` is seen to have one minimiser, and no other local one.

        Where f is of degree two any y tells it, and elsewhere the y of a minimiser: f(x, .) has to bend up there.
        """
        if not self.quadratic and not self.convex_at(xy):
            return False
        hessian = self(self.point(xy)).dr[:, self.n : self.n + self.m]
        if not np.isfinite(hessian).all():
            return False
        ends = np.linalg.eigvalsh(equilibrated(hessian)[1])
        return bool(ends[0] > (1e-12 if self.double else 1e-6) * ends[-1])

    def convex_at(self, xy: np.ndarray) -> bool:
        """Whether the traces say that f(x, .) and the inequalities are convex at this x, and the equations affine."""
        sizes = [int(np.prod(shape)) for shape in self.layout.shapes[: self.layout.x.num_leaves]]
        parts = np.split(xy[: self.n] * self.columns[: self.n], np.cumsum(sizes)[:-1])
        signs = tuple(map(constant, parts))
        if signs not in self._convexity:
            traced = self._lower_trace
            given = [VARIABLE] * (len(traced.jaxpr.invars) - len(signs))
            f, inequality, equality = kinds(traced.jaxpr, traced.consts, [*given, *signs])
            known = f.convex and inequality.convex and equality.affine
            self._convexity[signs] = known and not traced.jaxpr.effects
        return self._convexity[signs]

    @staticmethod
    def _user_shapes(problem: Problem, x: PyTree, y: PyTree, counts: tuple[int, ...]) -> dict[str, tuple[PyTree, int]]:
        """What each of the problem's constraints returns, in the user's precision, and the rows of a set beside it."""
        found = {}
        upper, lower = problem.full_levels()
        functions = {
            "upper_constraint": upper.constraint,
            "upper_equality": upper.equality,
            "constraint": lower.constraint,
            "equality": lower.equality,
        }
        for (name, fn), count in zip(functions.items(), counts, strict=True):
            shape = () if fn is None else jax.eval_shape(fn, x, y)
            found[name] = shape, count - sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shape))
        return found

    def precision(self) -> Any:
        """The block in which this program is evaluated."""
        return precise() if self.double else contextlib.nullcontext()

    # ------------------------------------------------------------ values

    def raw(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and Jacobian in the user's units."""
        self.calls += 1
        if self.calls > self.most:
            raise ProgramSpentError
        if not self.double:
            z = z.astype(np.float32)
        checked = jax.config.jax_debug_nans  # type: ignore[attr-defined]
        # A search looks where a loss is undefined, too.
        with np.errstate(all="ignore"), jax.debug_nans(False) if checked else contextlib.nullcontext():
            values, jacobian = _evaluate(self.problem, self._bounds, z, layout=self.layout)
            return np.asarray(values, float), np.asarray(jacobian, float)

    def __call__(self, z: np.ndarray) -> Evaluated:
        """Values and Jacobian at scaled unknowns z."""
        key = z.tobytes()
        found = self._cache.get(key)
        if found is None:
            values, jacobian = self.raw(z * self.columns)
            with np.errstate(all="ignore"):
                values, jacobian = self.rows * values, self.rows[:, None] * jacobian * self.columns
            if len(self._cache) > 64:
                self._cache.clear()
            v, d = [values[part] for part in self._slices], [jacobian[part] for part in self._slices]
            parts: tuple[Any, ...] = (*v[2:], d[0][0], d[1][0], *d[2:])
            found = Evaluated(float(v[0][0]), float(v[1][0]), *parts)
            self._cache[key] = found
        return found

    def point(self, xy: np.ndarray, lam: np.ndarray | None = None, mu: np.ndarray | None = None) -> np.ndarray:
        """The unknowns z of (x, y) and multipliers (None: zeros)."""
        lam = np.zeros(self.p) if lam is None else lam
        return np.concatenate([xy, lam, np.zeros(self.q) if mu is None else mu])

    def split(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x, y) in one vector, lam, mu."""
        k = self.n + self.m
        return z[:k], z[k : k + self.p], z[k + self.p :]

    def untrue(self, xy: np.ndarray) -> str | None:
        """Whose derivative is another than that of its values near (x, y): a name of `Problem`'s; None where nothing is
        seen."""
        rng, z, k = np.random.default_rng(7), self.point(xy), self.n + self.m
        names = ("upper", "lower", "upper_constraint", "upper_equality", "constraint", "equality", "lower")
        with self.precision(), np.errstate(all="ignore"):
            here, jacobian = self.raw(z * self.columns)
            changes, told = [], []
            for block in (slice(0, self.n), slice(self.n, k)) * 2:
                way = np.zeros(z.size)
                way[block] = rng.standard_normal(block.stop - block.start)
                ends = [z + sign * size * way for size in _NEARBY for sign in (1.0, -1.0)]
                changes.append([self.rows * (self.raw(end * self.columns)[0] - here) for end in ends])
                told.append(self.rows * (jacobian @ (self.columns * way)))
            eps = np.finfo(np.float64 if self.double else np.float32).eps
            least = np.maximum(1e-3 * _NEARBY[-1], 1e2 * eps * np.abs(self.rows * here))
        by_size = np.array(changes).reshape(len(told), len(_NEARBY), 2, -1).swapaxes(0, 1)
        found = untrue(by_size, np.array(told), _NEARBY, least)
        return next((name for name, part in zip(names, self._slices, strict=True) if found[part].any()), None)

    # ------------------------------------------------------------ between trees and vectors

    def trees(self, xy: np.ndarray) -> tuple[PyTree, PyTree]:
        """(x, y) in the user's units, structure and dtypes."""
        raw, leaves, first = xy * self.columns[: self.n + self.m], [], 0
        for shape, dtype in zip(self.layout.shapes, self.dtypes, strict=True):
            size = int(np.prod(shape))
            leaves.append(jax.device_put(raw[first : first + size].reshape(shape).astype(dtype)))
            first += size
        cut = self.layout.x.num_leaves
        return jax.tree.unflatten(self.layout.x, leaves[:cut]), jax.tree.unflatten(self.layout.y, leaves[cut:])

    def trees_inside(self, xy: np.ndarray) -> tuple[PyTree, PyTree]:
        """`trees`; where the losses are numbers at (x, y) and none at what it is rounded to, every number is rounded
        towards the start instead, or away from it: the edge of a domain lies between."""
        found, (dtype, *others) = self.trees(xy), self.dtypes
        numbers = lambda trees: bool(np.isfinite(self.losses(*trees)).all())  # noqa: E731
        if dtype == np.float64 or any(other != dtype for other in others) or numbers(found):
            return found
        columns = self.columns[: self.n + self.m]
        raw = xy * columns
        near = raw.astype(dtype)
        for sign in (1.0, -1.0):
            way = sign * (self.start * columns - raw)
            other_side = np.nextafter(near, (near + way).astype(dtype))
            moved = self.trees(np.where((near - raw) * way < 0, other_side, near).astype(float) / columns)
            if numbers(moved):
                return moved
        return found

    def scaled(self, x: PyTree, y: PyTree) -> np.ndarray:
        """(x, y) of the user as one scaled vector."""
        return np.concatenate([flatten(x), flatten(y)]) / self.columns[: self.n + self.m]

    def losses(self, x: PyTree, y: PyTree) -> tuple[float, float]:
        """F and f in the user's units."""
        with self.precision():
            at = self(self.point(self.scaled(x, y)))
        return at.F * self.upper_scale, at.f * self.lower_scale

    @contextlib.contextmanager
    def at_most(self, calls: int) -> Iterator[None]:
        """A block within which there are so many evaluations: one more raises `ProgramSpentError`."""
        self.most = self.calls + calls
        try:
            yield
        finally:
            self.most = np.inf

    @property
    def upper_scale(self) -> float:
        """What a difference of scaled F is multiplied with to be one of F."""
        return 1 / self.rows[0]

    @property
    def lower_scale(self) -> float:
        """Likewise of f."""
        return 1 / self.rows[1]

    def excess(self, xy: np.ndarray) -> float:
        """By how much the unit of f exceeds its typical change at this x, in units of y's coordinates by curvature; 1
        where these are no further apart than a thousand.

        One steep coordinate makes f's unit, and what is nothing beside that may be all that the others change.
        """
        n, k = self.n, self.n + self.m

        def curvatures(point: np.ndarray) -> np.ndarray:
            found = np.abs(np.diag(self(self.point(point)).dr[:, n:k]))
            return np.where(np.isfinite(found), found, 0.0)

        def apart(found: np.ndarray) -> bool:
            return bool(found.size and _UNEQUAL * np.median(found) < found.max(initial=0.0))

        if not apart(curvatures(xy)):
            return 1.0
        rng = np.random.default_rng(0)
        beside = [np.concatenate([xy[:n], xy[n:] + rng.normal(size=self.m)]) for _ in range(4)]
        nearby = np.median([curvatures(xy), *map(curvatures, beside)], axis=0)
        typical = np.sqrt(self.m) * np.median(nearby)
        return float(max(1.0, 1 / typical)) if apart(nearby) and typical > 0 else 1.0

    def violation(self, at: Evaluated, upper: bool = True) -> float:
        """The largest violated row, about the distance in units of the variables; infinite where one is not finite."""
        parts = [np.maximum(at.g, 0), np.abs(at.h)]
        if upper:
            parts += [np.maximum(at.G, 0), np.abs(at.H)]
        worst = max((float(np.max(part)) for part in parts if part.size), default=0.0)
        return worst if np.isfinite(worst) else np.inf

    # ------------------------------------------------------------ scales

    def _measure(self, xy: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """The units of x and y, of the rows, and what rows are bounds or opposite pairs."""
        lengths, common = self._lengths(xy, low, high)
        k, n = self.n + self.m, self.n
        self.columns[:n], self.columns[n:k] = lengths
        rng = np.random.default_rng(0)
        unit = self.columns[:k]
        near = [xy] + [np.clip(xy + unit * rng.normal(size=k), low, high) for _ in range(4)]
        samples = [self.raw(self.point(point)) for point in near]
        jacobians = np.stack([jacobian for _, jacobian in samples])[:, :, :k] * unit
        with np.errstate(all="ignore"):
            norms = np.sqrt(np.sum(jacobians**2, axis=2))
            # The lower loss counts by its part in y: a term in x alone is nothing to the lower level.
            norms[:, 1] = np.sqrt(np.sum(jacobians[:, 1, n:] ** 2, axis=1))
            if (common < unit).any():
                # Where f is flat a coordinate's own unit is long, and F has no part in that: it would be measured at
                # points where it is of another size.
                short, rng = np.minimum(unit, common), np.random.default_rng(0)
                near_by = [xy] + [np.clip(xy + short * rng.normal(size=k), low, high) for _ in range(4)]
                slopes = [self.raw(self.point(point))[1][0, :k] * short for point in near_by]
                norms[:, 0] = [np.linalg.norm(slope) for slope in slopes]
            # What is flat at this x, and is not far away, is measured here.
            beside = [xy] + [xy + np.where(np.arange(k) < n, 0.0, point - xy) for point in near[1:]]
            slopes = [self.raw(self.point(point))[1][1, n:k] * unit[n:] for point in beside]
            here = np.array([np.linalg.norm(slope) for slope in slopes])
            if np.median(here) > 0 and not np.median(norms[:, 1]) <= IRREGULAR * np.median(here):
                norms[:, 1] = here
        norms[~np.isfinite(norms)] = np.nan
        for row in range(norms.shape[1]):
            column = norms[:, row]
            column = column[np.isfinite(column) & (column > 0)]
            # Losses by the median, constraints by the start, which are affine mostly.
            self.rows[row] = 1 / float(np.median(column)) if column.size else 1.0
        _, f, G, _, g, h, r = self._slices
        self.rows[r] = self.rows[f] * self.columns[n:k]
        self.columns[k : k + self.p] = self.rows[g] / self.rows[f]
        self.columns[k + self.p :] = self.rows[h] / self.rows[f]
        self._find_bounds(near, samples, low, high)
        self.pairs = _opposite([self.rows[g] * values[g] for values, _ in samples])
        self.upper_pairs = _opposite([self.rows[G] * values[G] for values, _ in samples])
        self.inequality, self.upper_inequality = np.ones(self.p, bool), np.ones(G.stop - G.start, bool)
        self.inequality[self.pairs.ravel()] = self.upper_inequality[self.upper_pairs.ravel()] = False
        self.lower[k : k + self.p] = np.where(self.inequality, 0.0, -np.inf)
        for _, j in self.pairs:  # the second of a pair has no multiplier of its own
            self.lower[k + j] = self.upper[k + j] = 0.0

    def _lengths(self, xy: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """For x and for y: the median of the lengths on which something changes, for each coordinate alike.

        Where the coordinates of y have curvatures, or those of x effects, that differ by much, each has a unit of its
        own by them, and the median is taken in these; the second result is the common one of all (x, y) all the same.
        """
        n, k = self.n, self.n + self.m
        at = self.raw(self.point(xy))
        rng = np.random.default_rng(1)
        found: list[np.ndarray] = []
        common = np.ones(k)
        for block in (slice(n, k), slice(0, n)):
            signs = rng.choice([-1.0, 1.0], block.stop - block.start)
            along_y = found[0] * rng.choice([-1.0, 1.0], k - n) if found and signs.size else None
            weights = np.ones(signs.size)
            lengths, cut = self._block_lengths(xy, low, high, block, at, signs, along_y)
            common[block] = lengths
            own = self._weights(xy, low, high, block, lengths, found)
            if own is not None:
                weights = own
                lengths, cut = self._block_lengths(xy, low, high, block, at, signs * own, along_y)
            if found and cut < 1:  # what x is not moved by, y does not answer to
                answers = _answers(at[1][self._slices[-1], n:k], at[1][self._slices[-1], :n])
                if not at[1][self._slices[-1], n:k].any():
                    answers = self._held(at[1])
                if answers is not None and (far := np.abs(answers) @ (lengths * weights)).any():
                    found[0] = found[0] * min(1.0, max(cut, float(np.max(far / found[0]))))
            found.append(lengths * weights)
        return found[::-1], common

    def _held(self, jacobian: np.ndarray) -> np.ndarray:
        """How far y goes at most with each coordinate of x where f is affine in it, so that rows alone hold it."""
        _, _, _, _, g, h, _ = self._slices
        of_x, of_y = (
            np.abs(jacobian[np.r_[g, h]])[:, part] for part in (slice(0, self.n), slice(self.n, self.n + self.m))
        )
        with np.errstate(all="ignore"):
            ratios = of_x[:, None, :] / of_y[:, :, None]
        return np.where(np.isfinite(ratios), ratios, 0.0).max(axis=0, initial=0.0)

    def _weights(
        self, xy: np.ndarray, low: np.ndarray, high: np.ndarray, block: slice, length: float, y: list[np.ndarray]
    ) -> np.ndarray | None:
        """Units of the coordinates of a block relative to each other, where they differ by much; else None."""
        n, k = self.n, self.n + self.m
        if block.stop - block.start < 2:
            return None
        rng = np.random.default_rng(2)
        reach = np.maximum(np.abs(xy), 1.0)
        reach[block] = length

        def effects_at(point: np.ndarray) -> np.ndarray:
            jacobian = self.raw(self.point(np.clip(point, low, high)))[1][self._slices[-1]]
            if y:  # x counts by the lower solution's answer
                return _effects(jacobian[:, n:k], jacobian[:, :n], y[0])
            return np.sqrt(np.abs(np.diag(jacobian[:, n:k])))

        effects = [effects_at(xy + (reach * rng.normal(size=k) if i else 0.0)) for i in range(4)]
        effect, least = np.max(effects, axis=0), np.min(effects, axis=0)
        seen = np.isfinite(effect) & (effect > 0)
        if not seen.any() or effect[seen].max() <= _UNEQUAL * effect[seen].min():
            return None
        if (effect[seen] > 10 * least[seen]).any():  # what is small here is not so elsewhere: no unit
            return None
        common = np.exp(np.median(np.log(effect[seen])))
        units = 1 / np.where(seen, effect, common)
        # A coordinate of no effect here that has one where its unit ends (e^x, far down) is not measured by it.
        far = np.zeros(k)
        far[block] = length * common * units
        for sign in (1.0, -1.0):
            there = effects_at(xy + sign * far)[seen]
            if not (there <= 1e3 * effect[seen]).all():
                return None
        return units

    def _block_lengths(
        self,
        xy: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        block: slice,
        at: tuple[np.ndarray, np.ndarray],
        steps: np.ndarray,
        along_y: np.ndarray | None,
    ) -> tuple[float, float]:
        """The median of the lengths of x or of y, in units |steps| of the coordinates, and what part of it stays where
        rows leave less room or the losses are regular over less."""
        values, jacobian = at
        k = self.n + self.m
        _, _, G, H, g, h, r = self._slices
        constraints = np.r_[G, H, g, h]
        unit = np.abs(steps)
        lengths: list[float] = []
        direction = np.zeros(k)
        direction[block] = steps
        lengths += self._curving(xy, direction, values, jacobian) if direction.any() else []
        if along_y is not None:  # as far as x moves the lower solution by a unit of y
            moved = _answered(jacobian[r, self.n : k], jacobian[r, :k] @ direction, along_y)
            lengths += [moved] if np.isfinite(moved) and moved > 0 else []
        # Bounds that are there to be on the safe side say nothing, where anything else does.
        widest = min(_UNEQUAL * max(lengths, default=np.inf), np.finfo(float).max)
        with np.errstate(all="ignore"):
            distance = np.abs(values[constraints]) / np.sqrt(np.sum((jacobian[constraints, block] * unit) ** 2, axis=1))
        for size in ((high - low)[block] / unit / 2, distance):
            lengths += list(size[(size > 0) & (size <= widest)])
        largest = float(np.max(np.abs(xy[block]) / unit, initial=0.0))
        # At a solution some are zero but for rounding, and what is nearly affine bends far away: no lengths. A variable
        # at zero has no size that tells these apart: that which most others are like does, of several one near one.
        alike = lambda length: sum(1 / _NO_LENGTH <= other / length <= _NO_LENGTH for other in lengths)  # noqa: E731
        near = largest or max(lengths, key=lambda length: (alike(length), -abs(np.log(length))), default=0.0)
        least = 1e-2 * largest if largest > 0 else near / _NO_LENGTH
        lengths = [length for length in lengths if length >= least]
        lengths = [length for length in lengths if length <= near * _NO_LENGTH] or lengths
        lengths += [largest] if largest > 0 else []
        length = float(np.exp(np.median(np.log(lengths)))) if lengths else 1.0
        room = self._room(values, jacobian, block, unit)
        left = self._regular(xy, direction, at, min(length, room) if room > 1e-9 * length else length)
        return left, left / length

    def _room(self, values: np.ndarray, jacobian: np.ndarray, block: slice, unit: np.ndarray) -> float:
        """Half of the longest way that the own inequalities of x or of y leave one of its coordinates, in units, and
        infinite where they leave one a whole side. Rows count as if they were affine."""
        _, _, G, _, g, _, _ = self._slices
        rows = G if block.start == 0 else g
        slopes, left = jacobian[rows, block] * unit, np.maximum(-values[rows], 0.0)[:, None]
        with np.errstate(all="ignore"):
            up = np.where(slopes > 0, left / slopes, np.inf).min(axis=0, initial=np.inf)
            down = np.where(slopes < 0, -left / slopes, np.inf).min(axis=0, initial=np.inf)
        return float(np.max(up + down, initial=0.0)) / 2 if unit.size else np.inf

    def _regular(
        self, xy: np.ndarray, direction: np.ndarray, at: tuple[np.ndarray, np.ndarray], length: float
    ) -> float:
        """`length`, or a shorter one along a direction, at which the losses' slopes are still of the order of those
        nearby.

        How far a variable is from zero is no length of a problem that was moved away from there, and what is flat here
        may be anything where it is not: such a loss is measured where it says nothing of this point.
        """
        n, k, r = self.n, self.n + self.m, self._slices[-1]
        values, jacobian = at
        moved = direction != 0
        way = float(np.min(self._way[moved] / np.abs(direction[moved]), initial=np.inf))
        if not length > way:
            return length
        answers = _answers(jacobian[r, n:k], jacobian[r, :n]) if moved[:n].any() else None
        if answers is not None:  # y follows, as what F is as a function of x needs
            direction = direction - np.concatenate([np.zeros(n), answers @ direction[:n]])

        def slopes(values: np.ndarray, jacobian: np.ndarray) -> list[np.ndarray]:
            of_x, of_y = jacobian[0, :n], jacobian[0, n:k]
            return [of_x if answers is None else of_x - of_y @ answers, of_y, values[r]]

        here = slopes(values, jacobian)

        def secants(size: float) -> np.ndarray:
            """By how much each slope differs at both ends, over the size; NaN where neither is finite."""
            found = []
            for sign in (1.0, -1.0):
                there = slopes(*self.raw(self.point(xy + sign * size * direction)))
                with np.errstate(all="ignore"):
                    found.append([np.linalg.norm(a - b) / size for a, b in zip(there, here, strict=True)])
            table = np.where(np.isfinite(found), found, -np.inf).max(axis=0)
            return np.where(table >= 0, table, np.nan)

        first = secants(length)
        for _ in range(_WITHOUT):  # a length at whose ends a loss has no value is none
            if length <= way or np.isfinite(first).all():
                break
            length = max(length / 4, way)
            first = secants(length)
        sizes = length * 4.0 ** -np.arange(_SHORTER)
        last = secants(sizes[-1])
        if not (first > IRREGULAR * last).any():
            return length
        table = np.stack([first, *(secants(size) for size in sizes[1:-1]), last])
        # A slope that is nearly zero is a sum of terms that are not, and rounded as these are.
        of_x, of_y, of_f = (float(np.linalg.norm(slope)) for slope in here)
        terms = np.linalg.norm(np.abs(jacobian[r, :k]) @ np.abs(xy))
        rounding = np.array([1e-12 * (of_x + of_y), 1e-12 * of_y, 1e-12 * of_f + _EPS * terms]) / sizes[-1]
        for column, least in zip(table.T, rounding, strict=True):
            near = column[-1]
            # Of a power there is no slope nearby: it is none at every length.
            if near > least and 0.5 * near <= column[-2] <= 2 * near:
                regular = column <= IRREGULAR * near
                first_regular = int(np.flatnonzero(~regular)[-1]) + 1 if not regular.all() else 0
                length = min(length, sizes[first_regular])
        return float(max(length, way))

    def _curving(self, xy: np.ndarray, direction: np.ndarray, values: np.ndarray, jacobian: np.ndarray) -> list[float]:
        """The lengths along a direction on which the gradients of F, of f in y and of the rows change by themselves."""
        n, k = self.n, self.n + self.m
        _, _, G, H, g, h, r = self._slices
        rows = np.r_[0, G, H, g, h]

        def gradients(values: np.ndarray, jacobian: np.ndarray) -> list[np.ndarray]:
            # By x and by y apart: the two have units of their own.
            return [values[r], *jacobian[rows, :n], *jacobian[rows, n:k]]

        before, lengths = gradients(values, jacobian), {}
        sizes = [float(np.linalg.norm(gradient)) for gradient in before]
        for size in 10.0 ** np.arange(-10, 11, 1):
            after = gradients(*self.raw(self.point(xy + size * direction)))
            for i, (a, b, norm) in enumerate(zip(after, before, sizes, strict=True)):
                with np.errstate(all="ignore"):
                    change = float(np.linalg.norm(a - b))
                if i not in lengths and np.isfinite(change) and norm > 0 and change > 1e-2 * norm:
                    lengths[i] = size * norm / change
            if len(lengths) == sum(size > 0 for size in sizes):
                break
        return list(lengths.values())

    def _find_bounds(self, points: list[np.ndarray], samples: list[Any], low: np.ndarray, high: np.ndarray) -> None:
        """Rows with one constant derivative are bounds of that variable."""
        k = self.n + self.m
        _, _, G, _, g, _, _ = self._slices
        low, high = low.copy(), high.copy()
        # The lower level is bound by its own rows alone, whatever the upper level asks of y.
        own_low, own_high = low.copy(), high.copy()
        alone = np.zeros(self.rows.size, bool)
        for row in np.r_[G, g]:
            gradients = np.stack([jacobian[row, :k] for _, jacobian in samples])
            if not np.isfinite(gradients).all() or np.count_nonzero(gradients[0]) != 1:
                continue
            j = int(np.flatnonzero(gradients[0])[0])
            slope = gradients[0, j]
            if np.any(np.abs(gradients - gradients[0]) > _TIGHT * abs(slope)):
                continue
            edges = [point[j] - values[row] / slope for point, (values, _) in zip(points, samples, strict=True)]
            if np.ptp(edges) > 1e-6 * (self.columns[j] + abs(edges[0])):
                continue
            edge = float(np.median(edges))
            alone[row] = True
            for is_own, lows, highs in ((False, low, high), (True, own_low, own_high)):
                if is_own and not g.start <= row < g.stop:
                    continue
                if slope > 0:
                    highs[j] = min(highs[j], edge)
                else:
                    lows[j] = max(lows[j], edge)
        unit = self.columns[:k]
        closed = np.isfinite(low) & np.isfinite(high)
        with np.errstate(invalid="ignore"):
            equal = closed & (np.abs(low - high) <= _TIGHT * (unit + np.abs(low)))  # but for rounding
        low[equal] = high[equal] = 0.5 * (low[equal] + high[equal])
        crossed = low > high
        low[crossed], high[crossed] = -np.inf, np.inf  # no point meets them: the rows will say so
        for row in np.flatnonzero(alone):
            alone[row] = not crossed[np.flatnonzero(samples[0][1][row, :k])].any()
        self.lower[:k], self.upper[:k] = low / unit, high / unit
        own = own_low <= own_high
        self.own_lower, self.own_upper = np.where(own, own_low, -np.inf) / unit, np.where(own, own_high, np.inf) / unit
        self.bounding, self.upper_bounding = alone[g], alone[G]
        first = samples[0]
        self.edges = {}
        for i in np.flatnonzero(self.bounding):
            j = int(np.flatnonzero(first[1][g, :k][i])[0])
            edge = points[0][j] - first[0][g][i] / first[1][g, :k][i, j]
            self.edges[int(i)] = j, float(edge / unit[j])


def equilibrated(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(s, S H S), the matrix with a diagonal of ones where H's is positive: in one unit for all, a flat unknown's
    curvature is below the rounding of a steep one's."""
    diagonal = np.diag(hessian)
    units = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    return units, units[:, None] * (hessian + hessian.T) / 2 * units


def _answers(hessian: np.ndarray, moves: np.ndarray) -> np.ndarray | None:
    """H^-1 of each column: how y answers moves of f_y; None where H has no answer."""
    if not (np.isfinite(hessian).all() and np.isfinite(moves).all()):
        return None
    found = np.linalg.lstsq(hessian, moves, rcond=1e-12)[0]
    left = np.linalg.norm(hessian @ found - moves, axis=0)
    return found if (left <= 1e-6 * np.linalg.norm(moves, axis=0)).all() else None


def _answered(hessian: np.ndarray, move: np.ndarray, along: np.ndarray) -> float:
    """How much of a move of f_y it takes for y to answer by as much as `along`; where H has no answer, for f_y to move
    by as much as along it."""
    answer = _answers(hessian, move[:, None])
    with np.errstate(all="ignore"):
        if answer is not None:
            return float(np.linalg.norm(along) / np.linalg.norm(answer))
        return float(np.linalg.norm(hessian @ along) / np.linalg.norm(move))


def _effects(hessian: np.ndarray, moves: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What each coordinate of x does: to the lower solution, in units of y; where H has no answer, to f's slopes."""
    answers = _answers(hessian, moves)
    effects = moves * y[:, None] if answers is None else answers / y[:, None]
    return np.abs(effects).max(0, initial=0.0)


def _opposite(samples: list[np.ndarray]) -> np.ndarray:
    """The pairs (i, j) of rows of which one is the other's negative at all samples, shape (k, 2)."""
    values = np.stack(samples)
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    size = np.max(np.abs(values), axis=0, initial=0.0)
    for i in range(values.shape[1]):
        total = np.max(np.abs(values[:, i : i + 1] + values), axis=0)
        with np.errstate(invalid="ignore"):
            opposite = (total <= _TIGHT * size[i]) & (size[i] > 0)
        rest = [int(j) for j in np.flatnonzero(opposite) if j > i and j not in taken]
        if rest and i not in taken:
            pairs.append((i, rest[0]))
            taken |= {i, rest[0]}
    return np.asarray(pairs, int).reshape(-1, 2)


def size_of(problem: Problem, x: PyTree, y: PyTree) -> tuple[int, int]:
    """The numbers of unknowns and of rows, without a compile; a `ProblemError` where a `Program` is not made."""
    problem = visible(problem, x, y)
    _refuse(problem, x, y, "A check of a small problem")
    leaves = [*jax.tree.leaves(x), *jax.tree.leaves(y)]
    layout = Layout(jax.tree.structure(x), jax.tree.structure(y), tuple(np.shape(leaf) for leaf in leaves))
    unknowns = sum(layout.sizes)
    if (
        all(getattr(problem, name) is None for name in ROWS)
        and problem.project_upper is None
        and problem.project_lower is None
    ):
        return unknowns, 0
    sets = [_set_bounds(problem.project_upper, x), _set_bounds(problem.project_lower, y)]
    bounds = [Bounds.of(*both) for both in sets]
    vector = np.zeros(unknowns, np.result_type(*(np.asarray(leaf).dtype for leaf in leaves)))
    shapes = jax.eval_shape(lambda vector: _all_rows(problem, (bounds[0], bounds[1]), layout, vector), vector)
    return unknowns, sum(int(np.prod(shape.shape)) for shape in shapes[2:])


def visible(problem: Problem, x: PyTree, y: PyTree) -> Problem:
    """The same problem, with a box in the place of a function that projects on one."""
    found: dict[str, Any] = {}
    for name, variable in (("project_upper", x), ("project_lower", y)):
        project = getattr(problem, name)
        if project is not None and not hasattr(project, "bounds") and jax.tree.leaves(variable):
            box = sets.seen(project, variable)
            if box is not None:
                found[name] = box
    return dataclasses.replace(problem, **found) if found else problem


def _set_bounds(project: Any, variable: PyTree) -> tuple[np.ndarray, np.ndarray]:
    size = flatten(variable).size
    if project is None:
        return np.full(size, -np.inf), np.full(size, np.inf)
    lower, upper = project.bounds(variable)
    return flatten(lower), flatten(upper)


def _smooth(project: Any, variable: PyTree) -> bool:
    by_size = getattr(project, "smooth_for", None)
    return bool(getattr(project, "smooth", True) if by_size is None else by_size(variable))


def _refuse(problem: Problem, x: PyTree, y: PyTree, owner: str) -> None:
    variables = {"project_upper": x, "project_lower": y}
    if problem.stochastic or any(source.host for source in problem.sources):
        raise ProblemError(
            f"{owner} works on full batches, and the problem's data are drawn anew at every step: give both levels' "
            "data as bare arrays, or take a stochastic solver."
        )
    if problem.prox_lower is not None:
        raise ProblemError(
            f"{owner} cannot honour the nonsmooth lower term prox_lower= of the problem, and would ignore it. Write "
            "the term with variables of its own and constraint= (|y| <= u), or take solvers.MEHA."
        )
    for name in ("project_upper", "project_lower"):
        project = getattr(problem, name)
        if project is not None and not all(hasattr(project, part) for part in ("bounds", "inequality", "equality")):
            raise ProblemError(
                f"{owner} cannot see which set {name}= projects on: a function that projects has no rows. Give an "
                "object of bilevel.sets (sets.Box, sets.Simplex, ...), or state the set by constraint= or "
                "upper_constraint= rows."
            )
        if project is not None and not _smooth(project, variables[name]):
            raise ProblemError(
                f"{owner} needs smooth rows, and those of {project!r} ({name}=) are not. State the set by smooth rows "
                "with more variables, or take a first-order solver, which needs its projection alone."
            )
