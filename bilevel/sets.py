"""Feasible sets as objects: each is its projection, and a solver can see its bounds and rows.

    problem = Problem(..., project_upper=sets.Box(-1, 1), project_lower=sets.Simplex())

A set is called as its Euclidean projection, `set(z) -> z`, on an array or a pytree. Besides, it describes itself:

    set.bounds(z)       trees (lower, upper) like z, -inf and inf where an entry has no bound
    set.inequality(z)   a 1-D array of smooth rows, asked to be <= 0, beyond the bounds; may be empty
    set.equality(z)     a 1-D array of smooth rows, asked to be 0; may be empty
    set.smooth          whether bounds and rows are the set exactly (`set.smooth_for(z)` where that depends on z's size)
    set.contains(z)     whether z is in the set, up to a relative tolerance

Bounds and rows repeat nothing: a redundant row would take the multipliers' uniqueness away.

| set | points z | projection |
|---|---|---|
| `Box(lower, upper)`, `NonNegative()` | lower <= z <= upper | clipping |
| `Simplex(total)` | z >= 0, sum z = total | sorting |
| `SparseSimplex(k, total)` | the same with at most k entries other than 0 | the k largest, sorted; not convex |
| `Ball(radius, norm, centre)` | norm 1, 2 or inf of z - centre <= radius | closed form |
| `Sphere(radius, norm, centre)` | norm 1 or 2 of z - centre = radius | closed form; not convex |
| `Hyperplane(a, b)`, `Halfspace(a, b)` | a . z = b, a . z <= b | closed form |
| `Affine(A, b)` | A z = b | least squares, rows may be redundant |
| `Polyhedron(A, b, G, h)` | A z = b, G z <= h | `implicit.qp` |
| `BoxSection(lower, upper, a, b)` | lower <= z <= upper, a . z = b | a search among the breakpoints |
| `Transport(row_sums, column_sums)`, `Birkhoff(n)` | matrices z >= 0 with these sums | Newton's method on the dual |
| `Product(sets)` | a set for each part of a tree | part by part |
| `Intersection(sets)` | in all of the sets | Dykstra's alternation |

Projections are differentiable in both modes, with respect to z and to the set's own numbers: a set is a pytree with
these as leaves. The active set is found without derivatives, and the answer is then one expression that is smooth for
this active set; at a kink the derivative is that of one of the pieces that meet there, and never NaN. Numbers are cast
to the dtype of z, and dtypes of 16 bits are computed with in float32.

Sets are compared and hashed by their values, so that two equal ones share a compiled program. A set keeps copies
of the arrays that it is made of, which can't be written to: it is what they were when it was made.
"""

from __future__ import annotations

import functools
import itertools
import math
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel._arguments import explained
from bilevel._module import hyperparameters
from bilevel.quadratic import projection
from bilevel.typing import Project, PyTree

__all__ = [
    "Affine", "Ball", "Birkhoff", "Box", "BoxSection", "Halfspace", "Hyperplane", "Intersection", "NonNegative",
    "Polyhedron", "Product", "Set", "Simplex", "SparseSimplex", "Sphere", "Transport", "seen",
]  # fmt: skip

T = TypeVar("T")


class Set:
    """What all sets have in common; see the module. A set of one's own needs `__call__`, and the rest where it can."""

    def __call__(self, z: PyTree) -> PyTree:
        """The projection of z."""
        raise NotImplementedError

    @property
    def smooth(self) -> bool:
        """Whether bounds and rows describe the set exactly, for z of any size."""
        return True

    def smooth_for(self, z: PyTree) -> bool:
        """Whether bounds and rows describe the set exactly, for z of this size."""
        return self.smooth

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """Trees (lower, upper) like z, -inf and inf where there is no bound."""
        return jax.tree.map(lambda a: jnp.full_like(a, -jnp.inf), z), jax.tree.map(
            lambda a: jnp.full_like(a, jnp.inf), z
        )

    def inequality(self, z: PyTree) -> jax.Array:
        """Rows asked to be <= 0 beyond the bounds."""
        return _flat(z)[0][:0]

    def equality(self, z: PyTree) -> jax.Array:
        """Rows asked to be 0."""
        return _flat(z)[0][:0]

    def contains(self, z: PyTree, tol: Any = 1e-6, unit: Any = 0.0) -> jax.Array:
        """Whether z is in the set: a boolean scalar, False where z holds a NaN.

        Args:
          z: a point.
          tol: relative: to the numbers that a bound or row is made of, else to the largest entry of z's leaf.
          unit: a length that counts as one where no number of the set says so (a lower bound of 0 and one entry).
        """
        if not self.smooth:  # by the distance to the projection, in the units of each leaf
            near = lambda a, p: jnp.all(jnp.abs(a - p) <= tol * _largest(a, p, unit))  # noqa: E731
            return _all(jax.tree.leaves(jax.tree.map(near, z, self(z))))
        parts = [_between(a, low, high, tol, unit) for a, low, high in _zip(z, *self.bounds(z))]
        inequality, equality = self._sizes(z)
        if inequality is not None:
            parts.append(jnp.all(self.inequality(z) <= tol * jnp.maximum(inequality, unit)))
        if equality is not None:
            parts.append(jnp.all(jnp.abs(self.equality(z)) <= tol * jnp.maximum(equality, unit)))
        return _all(parts)

    def _sizes(self, z: PyTree) -> tuple[Any, Any]:
        """The sizes that the rows' violations are relative to, or None where there are no rows."""
        return None, None

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and _digest(self) == _digest(other))

    def __hash__(self) -> int:
        return hash(_digest(self))


@typing.dataclass_transform(frozen_default=True)
def _set(cls: type[T]) -> type[T]:
    """A frozen dataclass and pytree, as `hyperparameters`, that is compared by its arrays' values too."""
    cls = hyperparameters(cls)
    cls.__eq__, cls.__hash__ = Set.__eq__, Set.__hash__  # type: ignore[method-assign, assignment]
    return cls


@_set
class Box(Set):
    """The box lower <= z <= upper.

    Args:
      lower, upper: numbers, arrays that broadcast to z, or trees of them: like z, or with one entry for a whole part of
        z. Infinite bounds, or None, where there is none. Equal bounds hold an entry fixed.

    A point on the boundary has the derivative of the inside, except where the bounds are equal.
    """

    lower: Any
    upper: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "lower", _numbers("Box(lower=...)", self.lower, none=-math.inf))
        object.__setattr__(self, "upper", _numbers("Box(upper=...)", self.upper, none=math.inf))
        if jax.tree.structure(self.lower) == jax.tree.structure(self.upper):  # type: ignore[operator]
            for low, high in zip(jax.tree.leaves(self.lower), jax.tree.leaves(self.upper), strict=True):
                _ordered("Box", low, high)

    def __call__(self, z: PyTree) -> PyTree:
        """Clip z to the box."""
        return jax.tree.map(_clip, z, *self.bounds(z))

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """The bounds, as trees like z."""
        lower, upper = (_aligned(f"Box's {name}", getattr(self, name), z) for name in ("lower", "upper"))
        for low, high in zip(jax.tree.leaves(lower), jax.tree.leaves(upper), strict=True):
            _ordered("Box", low, high)
        return lower, upper


@explained
def NonNegative() -> Box:
    """The non-negative orthant, z >= 0: `Box(0, inf)`."""
    return Box(0.0, math.inf)


@_set
class Simplex(Set):
    """The simplex z >= 0, sum z = total.

    Args:
      total: the sum, not negative.
      axis: None: the sum is that of all entries of the tree; else every slice of every leaf along this axis is on a
        simplex of its own.
    """

    total: Any = 1.0
    axis: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", _scalar("Simplex(total=...)", self.total, least=0.0))

    def __call__(self, z: PyTree) -> PyTree:
        """Sort, find the threshold, subtract it."""
        project = lambda v: _simplex(v, jnp.asarray(self.total, v.dtype), v.shape[0])  # noqa: E731
        return _along(self.axis, project, z, "Simplex")

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """Z >= 0."""
        return jax.tree.map(jnp.zeros_like, z), super().bounds(z)[1]

    def equality(self, z: PyTree) -> jax.Array:
        """The sums less the total."""
        return _sums(self.axis, z, "Simplex") - self.total

    def _sizes(self, z: PyTree) -> tuple[Any, Any]:
        sums = _sums(self.axis, jax.tree.map(jnp.abs, z), "Simplex")
        return None, jnp.maximum(sums, self.total)


@_set
class SparseSimplex(Set):
    """The points of the simplex (z >= 0, sum z = total) with at most k entries other than zero.

    Not convex: where the k-th and the next largest entry are equal there are several nearest points, and the first is
    taken. Bounds and rows are those of the simplex, so `smooth` is False.

    Args:
      k: how many entries may differ from zero, at least 1.
      total: the sum, not negative.

    Reference: Kyrillidis, Becker, Cevher, Koch, "Sparse projections onto the simplex", ICML 2013.
    """

    k: int
    total: Any = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"SparseSimplex(k={self.k!r}): k is a count of entries, an integer of at least 1.")
        object.__setattr__(self, "total", _scalar("SparseSimplex(total=...)", self.total, least=0.0))

    @property
    def smooth(self) -> bool:
        """False: no rows count the entries."""
        return False

    def __call__(self, z: PyTree) -> PyTree:
        """The projection of the k largest entries on the simplex, zero elsewhere."""
        flat, back = _flat(z)
        return back(_simplex(flat, jnp.asarray(self.total, flat.dtype), min(self.k, flat.shape[0])))

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """Z >= 0."""
        return jax.tree.map(jnp.zeros_like, z), super().bounds(z)[1]

    def equality(self, z: PyTree) -> jax.Array:
        """The sum less the total."""
        return _sums(None, z, "SparseSimplex") - self.total


@_set
class Ball(Set):
    """The ball |z - centre| <= radius, in the norm of all entries of the tree together.

    Args:
      radius: not negative.
      norm: 1, 2 or inf.
      centre: a number, or a tree like z (or with one entry for a whole part of z).

    The 2-norm is one row, (|z - centre|^2 - radius^2) / (2 radius); the inf-norm is bounds; the 1-norm is 2^n rows for
    n <= 8 unknowns, and has no smooth rows beyond: `smooth_for(z)` says which.
    """

    radius: Any = 1.0
    norm: Any = 2
    centre: Any = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", _norm("Ball", self.norm, (1, 2, "inf")))
        object.__setattr__(self, "radius", _scalar("Ball(radius=...)", self.radius, least=0.0))
        object.__setattr__(self, "centre", _numbers("Ball(centre=...)", self.centre))

    @property
    def smooth(self) -> bool:
        """For the 1-norm only where the centre shows that there are few unknowns."""
        sizes = [np.size(leaf) for leaf in jax.tree.leaves(self.centre)]
        return self.norm != 1 or (not _is_number(self.centre) and all(s > 1 for s in sizes) and sum(sizes) <= _SIGNS)

    def smooth_for(self, z: PyTree) -> bool:
        """For the 1-norm up to 8 unknowns."""
        return self.norm != 1 or sum(np.size(leaf) for leaf in jax.tree.leaves(z)) <= _SIGNS

    def _from_centre(self, z: PyTree) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], PyTree]]:
        flat, back = _flat(z)
        centre = _flat(_aligned("Ball's centre", self.centre, z))[0]
        return flat, centre, back

    def __call__(self, z: PyTree) -> PyTree:
        """Shrink, clip or threshold the difference from the centre."""
        flat, centre, back = self._from_centre(z)
        radius = jnp.asarray(self.radius, flat.dtype)
        if self.norm == "inf":
            return back(_clip(flat, centre - radius, centre + radius))
        difference = flat - centre
        if self.norm == 2:
            length = _length(difference)
            outside = length > radius
            moved = centre + difference * (radius / jnp.where(outside, length, 1.0))
        else:
            size = jnp.abs(difference)
            outside = jnp.sum(size) > radius
            moved = centre + jnp.sign(difference) * _simplex(size, radius, flat.shape[0])
        return back(jnp.where(outside, moved, flat))

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """Bounds for the inf-norm, else none."""
        if self.norm != "inf":
            return super().bounds(z)
        flat, centre, back = self._from_centre(z)
        radius = jnp.asarray(self.radius, flat.dtype)
        return back(centre - radius), back(centre + radius)

    def inequality(self, z: PyTree) -> jax.Array:
        """One row for the 2-norm, 2^n for the 1-norm."""
        flat, centre, _ = self._from_centre(z)
        radius, difference = jnp.asarray(self.radius, flat.dtype), flat - centre
        if self.norm == 2:
            return _quadratic_row(difference, radius)
        if self.norm == 1 and self.smooth_for(z):
            signs = np.array(list(itertools.product((1.0, -1.0), repeat=flat.shape[0])))
            return jnp.asarray(signs, flat.dtype) @ difference - radius
        return flat[:0]

    def contains(self, z: PyTree, tol: Any = 1e-6, unit: Any = 0.0) -> jax.Array:
        """Whether |z - centre| is at most the radius, up to tol times the largest of radius, |centre| and `unit`."""
        flat, centre, _ = self._from_centre(z)
        size = _norm_of(flat - centre, self.norm)
        return size - self.radius <= tol * _largest(centre, self.radius, unit)


@_set
class Sphere(Set):
    """The sphere |z - centre| = radius, in the norm of all entries of the tree together; not convex.

    Args:
      radius: not negative.
      norm: 1 or 2. The 1-norm has no smooth rows.
      centre: a number, or a tree like z (or with one entry for a whole part of z).

    At the centre all points of the sphere are nearest: the one in the direction of all ones is taken.
    """

    radius: Any = 1.0
    norm: Any = 2
    centre: Any = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", _norm("Sphere", self.norm, (1, 2)))
        object.__setattr__(self, "radius", _scalar("Sphere(radius=...)", self.radius, least=0.0))
        object.__setattr__(self, "centre", _numbers("Sphere(centre=...)", self.centre))

    @property
    def smooth(self) -> bool:
        """True for the 2-norm."""
        return self.norm == 2

    def _from_centre(self, z: PyTree) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], PyTree]]:
        flat, back = _flat(z)
        centre = _flat(_aligned("Sphere's centre", self.centre, z))[0]
        return flat - centre, centre, back

    def __call__(self, z: PyTree) -> PyTree:
        """Scale or threshold the difference from the centre."""
        difference, centre, back = self._from_centre(z)
        radius = jnp.asarray(self.radius, difference.dtype)
        if self.norm == 2:
            away = jnp.any(difference != 0)
            difference = jnp.where(away, difference, 1.0)
            return back(centre + difference * (radius / _length(difference)))
        sign = jnp.where(difference < 0, -1.0, 1.0).astype(difference.dtype)
        return back(centre + sign * _simplex(sign * difference, radius, difference.shape[0]))

    def equality(self, z: PyTree) -> jax.Array:
        """One row for the 2-norm, (|z - centre|^2 - radius^2) / (2 radius)."""
        difference = self._from_centre(z)[0]
        if self.norm != 2:
            return difference[:0]
        return _quadratic_row(difference, jnp.asarray(self.radius, difference.dtype))

    def contains(self, z: PyTree, tol: Any = 1e-6, unit: Any = 0.0) -> jax.Array:
        """Whether |z - centre| is the radius, up to tol times the largest of radius, |centre| and `unit`."""
        difference, centre, _ = self._from_centre(z)
        return jnp.abs(_norm_of(difference, self.norm) - self.radius) <= tol * _largest(centre, self.radius, unit)


@_set
class Hyperplane(Set):
    """The hyperplane a . z = b.

    Args:
      a: a tree like z, or a vector for z raveled (`jax.flatten_util.ravel_pytree`); not zero.
      b: a number.
    """

    a: Any
    b: Any = 0.0

    def __post_init__(self) -> None:
        _row_fields(self)

    def __call__(self, z: PyTree) -> PyTree:
        """Step along a."""
        flat, back = _flat(z)
        a = _row("Hyperplane's a", self.a, z, flat)
        return back(flat - a * ((_dot(a, flat) - self.b) / _dot(a, a)).astype(flat.dtype))

    def equality(self, z: PyTree) -> jax.Array:
        """The row a . z - b."""
        flat, _ = _flat(z)
        return (_dot(_row("Hyperplane's a", self.a, z, flat), flat) - self.b)[None].astype(flat.dtype)

    def _sizes(self, z: PyTree) -> tuple[Any, Any]:
        flat, _ = _flat(z)
        return None, _row_size(_row("Hyperplane's a", self.a, z, flat), self.b, flat)


@_set
class Halfspace(Set):
    """The half-space a . z <= b.

    Args:
      a: a tree like z, or a vector for z raveled (`jax.flatten_util.ravel_pytree`); not zero.
      b: a number.
    """

    a: Any
    b: Any = 0.0

    def __post_init__(self) -> None:
        _row_fields(self)

    def __call__(self, z: PyTree) -> PyTree:
        """Step along a where z is outside."""
        flat, back = _flat(z)
        a = _row("Halfspace's a", self.a, z, flat)
        excess = _dot(a, flat) - self.b
        return back(flat - a * (jnp.where(excess > 0, excess, 0.0) / _dot(a, a)).astype(flat.dtype))

    def inequality(self, z: PyTree) -> jax.Array:
        """The row a . z - b."""
        flat, _ = _flat(z)
        return (_dot(_row("Halfspace's a", self.a, z, flat), flat) - self.b)[None].astype(flat.dtype)

    def _sizes(self, z: PyTree) -> tuple[Any, Any]:
        flat, _ = _flat(z)
        return _row_size(_row("Halfspace's a", self.a, z, flat), self.b, flat), None


@_set
class Affine(Set):
    """The affine set A z = b, z raveled (`jax.flatten_util.ravel_pytree`).

        z - A^T lam,    A A^T lam = A z - b

    Args:
      A: a matrix (rows, unknowns). Rows may be redundant.
      b: a vector (rows,).

    Raises a ValueError where the equations contradict each other. With redundant rows the derivative with respect to A
    and b is the least-squares one: a change that makes them contradict has no other.
    """

    A: Any
    b: Any

    def __post_init__(self) -> None:
        _matrix_fields(self, "A", "b")
        if self.A is None:
            raise ValueError("Affine(A, b) needs a matrix A and a vector b.")
        _consistent("Affine", self.A, self.b)

    def __call__(self, z: PyTree) -> PyTree:
        """Step along the rows, twice: the second step takes the first one's rounding away."""
        flat, back = _flat(z)
        A, b = _matrix("Affine", "A", self.A, self.b, flat)
        inverse = jnp.linalg.pinv(jax.lax.stop_gradient(A), rtol=_cut(A))
        gram = inverse.T @ inverse  # (A A^T)^+

        def solve(_: Any, r: jax.Array) -> jax.Array:
            return gram @ r

        def step(v: jax.Array) -> jax.Array:
            lam = jax.lax.custom_linear_solve(lambda w: A @ (A.T @ w), A @ v - b, solve, symmetric=True)
            return v - A.T @ lam

        return back(step(step(flat)))

    def equality(self, z: PyTree) -> jax.Array:
        """The rows A z - b."""
        flat, _ = _flat(z)
        A, b = _matrix("Affine", "A", self.A, self.b, flat)
        return A @ flat - b

    def _sizes(self, z: PyTree) -> tuple[Any, Any]:
        flat, _ = _flat(z)
        return None, _row_size(*_matrix("Affine", "A", self.A, self.b, flat), flat)


@_set
class Polyhedron(Set):
    """The polyhedron A z = b, G z <= h, z raveled (`jax.flatten_util.ravel_pytree`); projected on by `implicit.qp`.

    Args:
      A, b: a matrix (rows, unknowns) and a vector (rows,), or None.
      G, h: likewise; h may be inf.

    Raises a ValueError where the set is empty and its numbers are known at construction. Where they are not, the
    projection on an empty set is NaN.
    """

    A: Any = None
    b: Any = None
    G: Any = None
    h: Any = None

    def __post_init__(self) -> None:
        _matrix_fields(self, "A", "b")
        _matrix_fields(self, "G", "h")
        if self.A is None and self.G is None:
            raise ValueError("Polyhedron(A, b, G, h) needs A and b, or G and h, or all four.")
        _nonempty(self.A, self.b, self.G, self.h)

    def __call__(self, z: PyTree) -> PyTree:
        """The quadratic programme min |v - z|^2 / 2 over the polyhedron."""
        flat, back = _flat(z)
        A, b = _matrix("Polyhedron", "A", self.A, self.b, flat)
        G, h = _matrix("Polyhedron", "G", self.G, self.h, flat)
        return back(projection(flat, A, b, G, h))

    def inequality(self, z: PyTree) -> jax.Array:
        """The rows G z - h with a finite h."""
        flat, _ = _flat(z)
        G, h = _matrix("Polyhedron", "G", self.G, self.h, flat)
        return G @ flat - h

    def equality(self, z: PyTree) -> jax.Array:
        """The rows A z - b."""
        flat, _ = _flat(z)
        A, b = _matrix("Polyhedron", "A", self.A, self.b, flat)
        return A @ flat - b

    def _sizes(self, z: PyTree) -> tuple[Any, Any]:
        flat, _ = _flat(z)
        G, h = _matrix("Polyhedron", "G", self.G, self.h, flat)
        A, b = _matrix("Polyhedron", "A", self.A, self.b, flat)
        return _row_size(G, jnp.where(jnp.isinf(h), 0.0, h), flat), _row_size(A, b, flat)


@_set
class BoxSection(Set):
    """The section of a box by a hyperplane, lower <= z <= upper and a . z = b.

        clip(z + tau a, lower, upper),    tau such that the equation holds

    Args:
      lower, upper: as those of `Box`.
      a: a tree like z, or a vector for z raveled; of any signs, and zeros too.
      b: a number.

    The equation's left side rises with tau from bend to bend; the stretch with the root is found among the sorted bends
    and solved exactly. Raises a ValueError where no point of the box fulfils the equation; where the numbers are not
    known in advance the projection is then the corner that comes closest to it.
    """

    lower: Any
    upper: Any
    a: Any
    b: Any = 0.0

    def __post_init__(self) -> None:
        Box(self.lower, self.upper)
        object.__setattr__(self, "lower", _numbers("BoxSection(lower=...)", self.lower, none=-math.inf))
        object.__setattr__(self, "upper", _numbers("BoxSection(upper=...)", self.upper, none=math.inf))
        _row_fields(self)

    def _parts(self, z: PyTree) -> tuple[Any, ...]:
        flat, back = _flat(z)
        lower, upper = (_flat(bound)[0] for bound in self.bounds(z))
        return flat, back, lower, upper, _row("BoxSection's a", self.a, z, flat), jnp.asarray(self.b, flat.dtype)

    def __call__(self, z: PyTree) -> PyTree:
        """Find the stretch with the root, then solve for tau on it."""
        flat, back, lower, upper, a, b = self._parts(z)
        _section_nonempty(lower, upper, a, b)
        fixed, at = _section(*jax.lax.stop_gradient((flat, lower, upper, a, b)))
        bound = jnp.where(at < 0, lower, upper)
        ends = jnp.where(fixed, bound, 0.0)
        moving = jnp.where(fixed, 0.0, a)
        slope = _dot(moving, moving)
        tau = (b - _dot(a, ends) - _dot(moving, flat)) / jnp.where(slope > 0, slope, 1.0)
        inside = _clip(flat + jnp.where(slope > 0, tau, 0.0) * a, lower, upper)
        return back(jnp.where(fixed, bound, inside))

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """Those of the box."""
        return Box(self.lower, self.upper).bounds(z)

    def equality(self, z: PyTree) -> jax.Array:
        """The row a . z - b."""
        flat, _, _, _, a, b = self._parts(z)
        return (_dot(a, flat) - b)[None]

    def _sizes(self, z: PyTree) -> tuple[Any, Any]:
        flat, _, _, _, a, b = self._parts(z)
        return None, _row_size(a, b, flat)


@_set
class Transport(Set):
    """The transport polytope: matrices z >= 0 with given sums of rows and of columns.

        max(z + u 1^T + 1 v^T, 0),    u and v the multipliers of the sums

    The dual in (u, v) is concave and piecewise quadratic; a damped Newton method maximises it. `kl` is the projection
    in the Kullback-Leibler divergence.

    Its potentials are as large as the scores: the sums are met to the rounding of the largest score.

    Args:
      row_sums: a vector (m,), not negative.
      column_sums: a vector (n,), not negative, with the same total.

    z is one matrix (m, n), or a tree with one leaf of this shape.

    Reference: Blondel, Seguy, Rolet, "Smooth and Sparse Optimal Transport", AISTATS 2018 (the dual; their solver is
    L-BFGS).
    """

    row_sums: Any
    column_sums: Any

    def __post_init__(self) -> None:
        for name in ("row_sums", "column_sums"):
            sums = _numbers(f"Transport({name}=...)", getattr(self, name), array=True)
            if np.ndim(sums) != 1:
                raise ValueError(f"Transport({name}=...) is a vector, one sum each; its shape is {np.shape(sums)}.")
            if (known := _known(sums)) is not None and not (np.isfinite(known).all() and (known >= 0).all()):
                raise ValueError(f"Transport({name}=...): sums of non-negative entries are finite and not negative.")
            object.__setattr__(self, name, sums)
        rows, columns = _known(self.row_sums), _known(self.column_sums)
        if rows is not None and columns is not None and abs(rows.sum() - columns.sum()) > 1e-4 * max(rows.sum(), 1e-30):
            raise ValueError(
                f"Transport: the rows sum to {rows.sum():.6g} and the columns to {columns.sum():.6g}; no matrix has "
                "both. Scale one to the other's total."
            )

    def _matrix(self, z: PyTree) -> tuple[jax.Array, jax.Array, jax.Array, Callable[[jax.Array], PyTree]]:
        flat, back = _flat(z)
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(z)]
        shape = (np.shape(self.row_sums)[0], np.shape(self.column_sums)[0])
        if shapes != [shape]:
            raise ValueError(f"Transport with {shape[0]} row sums and {shape[1]} column sums was given {shapes}.")
        rows, columns = (jnp.asarray(sums, flat.dtype) for sums in (self.row_sums, self.column_sums))
        return flat.reshape(shape), rows, columns, lambda matrix: back(matrix.reshape(-1))

    def __call__(self, z: PyTree) -> PyTree:
        """The nearest matrix in the Euclidean norm."""
        matrix, rows, columns, back = self._matrix(z)
        return back(_transport(matrix, rows, columns))

    def kl(self, z: PyTree) -> PyTree:
        """The nearest matrix to exp(z) in the Kullback-Leibler divergence, exp(z + u 1^T + 1 v^T); sums > 0."""
        matrix, rows, columns, back = self._matrix(z)
        return back(_kl_transport(matrix, rows, columns))

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """Z >= 0."""
        return jax.tree.map(jnp.zeros_like, z), super().bounds(z)[1]

    def equality(self, z: PyTree) -> jax.Array:
        """The rows' sums less what they should be, and the columns' but for the last, which follows from the others."""
        matrix, rows, columns, _ = self._matrix(z)
        return jnp.concatenate([matrix.sum(1) - rows, (matrix.sum(0) - columns)[:-1]])

    def _sizes(self, z: PyTree) -> tuple[Any, Any]:
        matrix, rows, columns, _ = self._matrix(z)
        size = jnp.abs(matrix)
        return None, jnp.maximum(
            jnp.concatenate([size.sum(1), size.sum(0)[:-1]]), jnp.concatenate([rows, columns[:-1]])
        )


@explained
def Birkhoff(n: int) -> Transport:
    """The doubly stochastic matrices (n, n): `Transport(ones(n), ones(n))`."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"Birkhoff(n={n!r}): n is the number of rows, an integer of at least 1.")
    return Transport(np.ones(n), np.ones(n))


@_set
class Product(Set):
    """A set for each part of a tree.

        Product({"weights": Simplex(), "scale": Box(0, 10), "bias": None})

    Args:
      sets: a container (dict, tuple, list, ...) with the structure of z down to the parts that have a set; None where
        a part is free. A projection that is a plain function may stand in for a set; then `smooth` is False.
    """

    sets: Any

    def __post_init__(self) -> None:
        for part in jax.tree.leaves(self.sets, is_leaf=_is_part):
            if not (part is None or callable(part)):
                raise ValueError(f"Product(sets=...) holds {part!r}; a set, a projection or None stands for each part.")
        own = jax.tree.map(lambda part: part, self.sets, is_leaf=_is_part)  # the caller's dict may be written to
        object.__setattr__(self, "sets", own)

    def _parts(self, z: PyTree) -> tuple[list[tuple[Any, PyTree]], Any]:
        parts, treedef = jax.tree.flatten(self.sets, is_leaf=_is_part)
        try:
            return list(zip(parts, treedef.flatten_up_to(z), strict=True)), treedef  # type: ignore[attr-defined]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Product's sets are {treedef} and the variable is {jax.tree.structure(z)}; the sets have the "
                "variable's structure down to the parts, with None for a part that is free."
            ) from error

    @property
    def smooth(self) -> bool:
        """Whether all parts are."""
        parts = jax.tree.leaves(self.sets, is_leaf=_is_part)
        return all(part is None or getattr(part, "smooth", False) for part in parts)

    def smooth_for(self, z: PyTree) -> bool:
        """Whether all parts are."""
        return all(part is None or (isinstance(part, Set) and part.smooth_for(v)) for part, v in self._parts(z)[0])

    def __call__(self, z: PyTree) -> PyTree:
        """Project part by part."""
        parts, treedef = self._parts(z)
        return jax.tree.unflatten(treedef, [v if part is None else part(v) for part, v in parts])

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """Those of the parts."""
        parts, treedef = self._parts(z)
        pairs = [(part if isinstance(part, Set) else Set()).bounds(v) for part, v in parts]
        lower, upper = zip(*pairs, strict=True) if pairs else ((), ())
        return jax.tree.unflatten(treedef, lower), jax.tree.unflatten(treedef, upper)

    def inequality(self, z: PyTree) -> jax.Array:
        """Those of the parts, in their order."""
        rows = [part.inequality(v) for part, v in self._parts(z)[0] if isinstance(part, Set)]
        return jnp.concatenate([_flat(z)[0][:0], *rows])

    def equality(self, z: PyTree) -> jax.Array:
        """Those of the parts, in their order."""
        rows = [part.equality(v) for part, v in self._parts(z)[0] if isinstance(part, Set)]
        return jnp.concatenate([_flat(z)[0][:0], *rows])

    def contains(self, z: PyTree, tol: Any = 1e-6, unit: Any = 0.0) -> jax.Array:
        """Whether each part is in its set."""
        return _all([_contains(part, v, tol, unit) for part, v in self._parts(z)[0]])


@_set
class Intersection(Set):
    """The points that are in all of several convex sets, projected on by Dykstra's alternation.

    Converges linearly where the sets are polyhedral and may be slow where they meet at a small angle: a `Polyhedron` or
    `BoxSection` of the same points is exact. Its derivative is that of the rounds.

    Args:
      sets: sets, or projections `z -> z`.
      steps: rounds of the alternation.

    Reference: Boyle, Dykstra, "A Method for Finding Projections onto the Intersection of Convex Sets in Hilbert
    Spaces", 1986.
    """

    sets: tuple[Any, ...]
    steps: int = 100

    def __post_init__(self) -> None:
        if callable(self.sets):
            raise TypeError("Intersection(sets=...) takes several sets in a list: Intersection([first, second]).")
        object.__setattr__(self, "sets", tuple(self.sets))
        if not self.sets or not all(callable(part) for part in self.sets):
            raise ValueError(f"Intersection(sets=...) takes sets or projections z -> z, not {self.sets!r}.")

    @property
    def smooth(self) -> bool:
        """Whether all sets are."""
        return all(getattr(part, "smooth", False) for part in self.sets)

    def smooth_for(self, z: PyTree) -> bool:
        """Whether all sets are."""
        return all(isinstance(part, Set) and part.smooth_for(z) for part in self.sets)

    def __call__(self, z: PyTree) -> PyTree:
        """`steps` rounds of Dykstra's alternation."""

        def round_(_: Any, carry: Any) -> Any:
            z, corrections = carry
            new = []
            for project, correction in zip(self.sets, corrections, strict=True):
                shifted = optax.tree.add(z, correction)
                z = project(shifted)
                new.append(optax.tree.sub(shifted, z))
            return z, new

        z = jax.tree.map(jnp.asarray, z)
        return jax.lax.fori_loop(0, self.steps, round_, (z, [optax.tree.zeros_like(z) for _ in self.sets]))[0]

    def bounds(self, z: PyTree) -> tuple[PyTree, PyTree]:
        """The tightest bounds of all."""
        lower, upper = super().bounds(z)
        for part in self.sets:
            if isinstance(part, Set):
                low, high = part.bounds(z)
                lower, upper = jax.tree.map(jnp.maximum, lower, low), jax.tree.map(jnp.minimum, upper, high)
        return lower, upper

    def inequality(self, z: PyTree) -> jax.Array:
        """Those of all sets, in their order."""
        rows = [part.inequality(z) for part in self.sets if isinstance(part, Set)]
        return jnp.concatenate([_flat(z)[0][:0], *rows])

    def equality(self, z: PyTree) -> jax.Array:
        """Those of all sets, in their order."""
        rows = [part.equality(z) for part in self.sets if isinstance(part, Set)]
        return jnp.concatenate([_flat(z)[0][:0], *rows])

    def contains(self, z: PyTree, tol: Any = 1e-6, unit: Any = 0.0) -> jax.Array:
        """Whether z is in each set."""
        return _all([_contains(part, z, tol, unit) for part in self.sets])


# What follows serves the sets above: numbers and trees, then the searches for active sets.

_SIGNS = 8  # unknowns up to which the 1-norm ball has its 2^n rows


def seen(project: Project, z: PyTree) -> Box | None:
    """The box that a function projects on, by trying it; None where it is none.

    Far corners give the bounds, and points of all sizes must then be clipped to them. No proof, but a function that is
    clipped at both ends and everywhere tried is a clip.
    """
    dtype = np.result_type(*(np.asarray(leaf).dtype for leaf in jax.tree.leaves(z)))
    huge = float(jnp.finfo(dtype).max) ** 0.5
    filled = lambda value: jax.tree.map(lambda leaf: jnp.full_like(leaf, value), z)  # noqa: E731
    random = np.random.default_rng(0)
    scattered = lambda size: jax.tree.map(  # noqa: E731
        lambda leaf: jnp.asarray(size * random.standard_normal(np.shape(leaf)), jnp.result_type(leaf)), z
    )
    try:
        low, high = (jax.tree.map(np.asarray, project(filled(value))) for value in (-huge, huge))
        low = jax.tree.map(lambda bound: np.where(bound <= -huge / 2, -np.inf, bound), low)
        high = jax.tree.map(lambda bound: np.where(bound >= huge / 2, np.inf, bound), high)
        box = Box(low, high)
        points = [z, *(scattered(size) for size in (1e-3, 0.1, 1.0, 10.0, 1e3))]
        same = (
            np.allclose(a, b, rtol=1e-6, atol=0.0)
            for point in points
            for a, b in zip(jax.tree.leaves(project(point)), jax.tree.leaves(box(point)), strict=True)
        )
        return box if all(same) else None
    except (TypeError, ValueError):
        return None


def _is_part(node: Any) -> bool:
    return node is None or isinstance(node, Set)


def _stacked(values: Any) -> Any:
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
    return jnp.asarray(values) if traced else np.asarray(values, float)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (np.ndim(value) == 0 and not isinstance(value, (dict, list, tuple)))


def _known(value: Any) -> np.ndarray | None:
    """The value of a number or an array, or None while it is traced."""
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (float, int, np.ndarray, np.number, jax.Array)):
        return None
    value = np.asarray(value)
    return value if value.dtype.kind in "fiu" else value.astype(np.float64)  # bfloat16 is of kind V


def _digest(one: Set) -> tuple[Any, ...]:
    """What a set is compared by: the bytes of its arrays, the identity of what is traced."""
    found = one.__dict__.get("_key")
    if found is None or not _fixed(one):
        leaves, treedef = jax.tree.flatten([value for name, value in vars(one).items() if not name.startswith("_")])

        def key(leaf: Any) -> Any:
            known = _known(leaf)
            if known is not None:
                return (known.shape, str(known.dtype), known.tobytes())
            return ("traced", id(leaf)) if isinstance(leaf, (jax.core.Tracer, np.ndarray, jax.Array)) else leaf

        found = (type(one), treedef, *(key(leaf) for leaf in leaves))
        object.__setattr__(one, "_key", found)
    return found


def _fixed(one: Set) -> bool:
    """Whether nothing in a set can change: in a class of one's own it can, and so can arrays out of a pickle."""
    ours = getattr(type(one), "__bilevel_hyperparameters__", False)
    return ours and not any(isinstance(a, np.ndarray) and a.flags.writeable for a in jax.tree.leaves(vars(one)))


def _numbers(name: str, value: Any, none: float | None = None, array: bool = False) -> Any:
    """A tree of floats and arrays of its own, NaN refused: what the caller writes into theirs later is not seen."""

    def convert(leaf: Any) -> Any:
        if leaf is None:
            if none is None:
                raise ValueError(f"{name} is None; numbers are expected.")
            return none
        if isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)) or type(leaf) is object:
            return leaf
        if isinstance(leaf, (bool, str)) or not isinstance(leaf, (int, float, np.ndarray, np.number, jax.Array)):
            raise ValueError(f"{name} holds a {type(leaf).__name__}; numbers and arrays are expected.")
        if not isinstance(leaf, jax.Array):
            kept = isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"
            leaf = float(leaf) if np.ndim(leaf) == 0 else np.array(leaf, None if kept else float)
            if isinstance(leaf, np.ndarray):
                leaf.flags.writeable = False
        if np.isnan(_known(leaf)).any():  # type: ignore[arg-type]
            raise ValueError(f"{name} holds a NaN.")
        return leaf

    if array and isinstance(value, (list, tuple)):
        value = np.asarray(value, float)
    return jax.tree.map(convert, value, is_leaf=lambda node: node is None)


def _scalar(name: str, value: Any, least: float) -> Any:
    value = _numbers(name, value)
    if not _is_number(value):
        raise ValueError(f"{name} is one number; its shape is {np.shape(value)}.")
    known = _known(value)
    if known is not None and not (known >= least and np.isfinite(known)):
        raise ValueError(f"{name[:-4]}{known}): a finite number of at least {least:g} is expected.")
    return value


def _norm(owner: str, norm: Any, allowed: tuple[Any, ...]) -> Any:
    norm = "inf" if norm in ("inf", math.inf) else norm
    if norm not in allowed or isinstance(norm, bool):
        raise ValueError(f"{owner}(norm={norm!r}): the norm is one of {', '.join(map(str, allowed))}.")
    return norm if norm == "inf" else int(norm)


def _row_fields(one: Any) -> None:
    """Check and convert the fields a and b of one row."""
    owner = type(one).__name__
    object.__setattr__(one, "a", _numbers(f"{owner}(a=...)", one.a))
    object.__setattr__(one, "b", _scalar(f"{owner}(b=...)", one.b, -math.inf))
    known = [_known(leaf) for leaf in jax.tree.leaves(one.a)]
    if all(leaf is not None and not leaf.any() for leaf in known):
        raise ValueError(f"{owner}(a=...) is zero everywhere: the row says nothing of z.")


def _matrix_fields(one: Any, matrix: str, vector: str) -> None:
    """Check and convert a matrix and its right-hand side; rows whose right-hand side is inf, and known, are dropped."""
    owner = type(one).__name__
    A, b = getattr(one, matrix), getattr(one, vector)
    if (A is None) != (b is None):
        raise ValueError(f"{owner} was given only one of {matrix} and {vector}; they come together.")
    if A is None:
        return
    A = _numbers(f"{owner}({matrix}=...)", A, array=True)
    b = _numbers(f"{owner}({vector}=...)", b, array=True)
    if np.ndim(A) != 2:
        raise ValueError(f"{owner}({matrix}=...) is a matrix (rows, unknowns); its shape is {np.shape(A)}.")
    if np.shape(b) != np.shape(A)[:1]:
        raise ValueError(f"{owner}: {matrix} has {np.shape(A)[0]} rows and {vector} the shape {np.shape(b)}.")
    known = _known(A), _known(b)
    if known[0] is not None and not np.isfinite(known[0]).all():
        raise ValueError(f"{owner}({matrix}=...) holds an infinity.")
    if known[1] is not None and not np.isfinite(known[1]).all():
        if vector == "b" or (known[1] == -math.inf).any():
            raise ValueError(f"{owner}({vector}=...) holds an infinity that no point fulfils.")
        kept = known[1] < math.inf
        A, b = _numbers("", A[kept]), _numbers("", b[kept])
    object.__setattr__(one, matrix, A)
    object.__setattr__(one, vector, b)


def _consistent(owner: str, A: Any, b: Any) -> None:
    A, b = _known(A), _known(b)
    if A is None or b is None or not len(b):
        return
    size = np.maximum(np.linalg.norm(A, axis=1), 1e-300)
    A, b = A / size[:, None], b / size
    left = np.abs(A @ np.linalg.lstsq(A, b, rcond=None)[0] - b).max()
    if left > 1e-5 * np.abs(b).max():
        raise ValueError(
            f"{owner}: A z = b has no solution (the best z leaves a residual of {left:.2g}): rows of A are "
            "dependent and their b contradict each other."
        )


def _nonempty(A: Any, b: Any, G: Any, h: Any) -> None:
    given = [m for m in (A, b, G, h) if m is not None]
    if any(_known(m) is None for m in given):
        return
    from scipy.optimize import linprog  # JAX brings SciPy; it is imported only where it is asked

    def unit(matrix: Any, vector: Any) -> tuple[Any, Any]:
        if matrix is None:
            return None, None
        matrix, vector = np.asarray(matrix, float), np.asarray(vector, float)
        size = np.linalg.norm(matrix, axis=1)
        size[size == 0] = 1.0
        return matrix / size[:, None], vector / size

    (A, b), (G, h) = unit(A, b), unit(G, h)
    scale = max((np.abs(v).max(initial=0.0) for v in (b, h) if v is not None), default=0.0) or 1.0
    n = (A if A is not None else G).shape[1]
    found = linprog(
        np.zeros(n), G, None if h is None else h / scale, A, None if b is None else b / scale, bounds=(None, None)
    )
    if found.status == 2:
        raise ValueError(
            "Polyhedron(A, b, G, h) is empty: no z fulfils A z = b and G z <= h. Look for rows that "
            "contradict each other."
        )


def _ordered(owner: str, low: Any, high: Any) -> None:
    low, high = _known(low), _known(high)
    if low is None or high is None:
        return
    try:
        low, high = np.broadcast_arrays(low, high)
    except ValueError:
        raise ValueError(f"{owner}: lower has the shape {low.shape} and upper {high.shape}.") from None
    if (low > high).any():
        worst = np.unravel_index(np.argmax(low - high), low.shape)
        raise ValueError(
            f"{owner}: lower is above upper ({low[worst]:g} > {high[worst]:g}"
            f"{f' at entry {[int(i) for i in worst]}' if low.ndim else ''}): the box is empty."
        )
    if (low == math.inf).any() or (high == -math.inf).any():
        raise ValueError(f"{owner}: a lower bound of inf or an upper bound of -inf leaves no finite point.")


def _aligned(name: str, value: Any, z: PyTree) -> PyTree:
    """A tree of numbers spread over z: like z in structure, shapes and dtypes."""
    if jax.tree_util.all_leaves([z]) and isinstance(value, (list, tuple)):
        value = _stacked(value)  # for an array z, a list is an array

    def spread(number: Any, part: PyTree) -> PyTree:
        def like(leaf: Any) -> jax.Array:
            shape = np.shape(leaf)
            try:
                fits = np.broadcast_shapes(np.shape(number), shape) == shape
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(f"{name} has the shape {np.shape(number)} where the variable has {shape}.")
            return jnp.broadcast_to(jnp.asarray(number, jnp.result_type(leaf)), shape)

        return jax.tree.map(like, part)

    try:
        return jax.tree.map(spread, value, z)
    except (ValueError, TypeError, KeyError) as error:
        if str(error).startswith(name):
            raise
        raise ValueError(
            f"{name} is {jax.tree.structure(value)} and the variable {jax.tree.structure(z)}; give a number, or a tree "
            "like the variable."
        ) from error


def _flat(z: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """z as a vector of at least 32 bits, and the way back."""
    flat, unravel = ravel_pytree(z)
    if not jnp.issubdtype(flat.dtype, jnp.floating):
        raise ValueError(f"A set was given a point of dtype {flat.dtype}; floating-point entries are expected.")
    return flat.astype(jnp.promote_types(flat.dtype, jnp.float32)), lambda v: unravel(v.astype(flat.dtype))


def _row(name: str, a: Any, z: PyTree, flat: jax.Array) -> jax.Array:
    """The coefficients of a row, as a vector like z raveled."""
    if isinstance(a, (list, tuple)) and all(_is_number(leaf) for leaf in a) and len(a) == flat.shape[0]:
        a = _stacked(a)
    if np.shape(a) == flat.shape and not isinstance(a, (list, tuple, dict)):
        return jnp.asarray(a, flat.dtype)
    return _flat(_aligned(name, a, z))[0].astype(flat.dtype)


def _matrix(owner: str, name: str, A: Any, b: Any, flat: jax.Array) -> tuple[jax.Array, jax.Array]:
    if A is None:
        return jnp.zeros((0, flat.shape[0]), flat.dtype), jnp.zeros((0,), flat.dtype)
    if np.shape(A)[1] != flat.shape[0]:
        raise ValueError(
            f"{owner}: {name} has {np.shape(A)[1]} columns and the variable {flat.shape[0]} entries (raveled in the "
            "order of jax.flatten_util.ravel_pytree)."
        )
    return jnp.asarray(A, flat.dtype), jnp.asarray(b, flat.dtype)


def _row_size(a: jax.Array, b: Any, flat: jax.Array) -> jax.Array:
    """|a| . |z| + |b|, what a row's violation is relative to."""
    return jnp.atleast_1d(jnp.abs(a) @ jnp.abs(flat) + jnp.abs(b))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def _cut(A: jax.Array) -> float:
    """Below this fraction of the largest, a singular value counts as zero."""
    return 10 * max(A.shape) * float(jnp.finfo(A.dtype).eps)


def _clip(z: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Clipping with the derivative of the inside on the boundary, and none in z where the bounds are equal."""
    return jnp.where(z < lower, lower, jnp.where((z > upper) | (lower == upper), upper, z))


def _length(v: jax.Array) -> jax.Array:
    """The 2-norm, without overflow, and with derivative zero at zero."""
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(v), initial=0.0))
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1.0)
    squares = jnp.sum((v / unit) ** 2)
    return jnp.where(squares == 0, 0.0, unit * jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))


def _norm_of(v: jax.Array, norm: Literal[1, 2, "inf"]) -> jax.Array:
    if norm == 2:
        return _length(v)
    return jnp.sum(jnp.abs(v)) if norm == 1 else jnp.max(jnp.abs(v), initial=0.0)


def _quadratic_row(difference: jax.Array, radius: jax.Array) -> jax.Array:
    """(|difference|^2 - radius^2) / (2 radius), whose gradient at the radius has length one."""
    return (((difference @ difference) - radius**2) / (2 * jnp.where(radius > 0, radius, 1.0)))[None]


def _largest(*values: Any) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(jnp.asarray(v)), initial=0.0) for v in values])


def _all(parts: list[Any]) -> jax.Array:
    return functools.reduce(jnp.logical_and, parts, jnp.asarray(True))


def _zip(z: PyTree, lower: PyTree, upper: PyTree) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    trees = (jax.tree.leaves(tree) for tree in (z, lower, upper))
    wide = lambda a: jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32))  # noqa: E731
    return [(wide(a), wide(low), wide(high)) for a, low, high in zip(*trees, strict=True)]


def _between(z: jax.Array, lower: jax.Array, upper: jax.Array, tol: Any, unit: Any) -> jax.Array:
    finite = lambda bound: jnp.where(jnp.isfinite(bound), jnp.abs(bound), 0.0)  # noqa: E731
    size = jnp.maximum(finite(lower), finite(upper))
    size = jnp.maximum(jnp.where(size > 0, size, _largest(z)), unit)
    return jnp.all(jnp.isfinite(z) & (z >= lower - tol * size) & (z <= upper + tol * size))


def _contains(part: Any, z: PyTree, tol: Any, unit: Any) -> jax.Array:
    """`contains` of a set, of a projection that is a plain function, or of None."""
    if part is None:
        return _all([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(z)])
    if isinstance(part, Set):
        return part.contains(z, tol, unit)
    near = lambda a, p: jnp.all(jnp.abs(a - p) <= tol * _largest(a, p, unit))  # noqa: E731
    return _all(jax.tree.leaves(jax.tree.map(near, z, part(z))))


def _along(axis: int | None, project: Project, z: PyTree, owner: str) -> PyTree:
    """A projection of vectors on the whole tree, or on each slice of its leaves along an axis."""
    if axis is None:
        flat, back = _flat(z)
        return back(project(flat))

    def leafwise(leaf: Any) -> jax.Array:
        leaf = _with_axis(leaf, axis, owner)
        last = jnp.moveaxis(leaf, axis, -1)
        rows = last.reshape(-1, last.shape[-1]).astype(jnp.promote_types(leaf.dtype, jnp.float32))
        return jnp.moveaxis(jax.vmap(project)(rows).reshape(last.shape), -1, axis).astype(leaf.dtype)

    return jax.tree.map(leafwise, z)


def _sums(axis: int | None, z: PyTree, owner: str) -> jax.Array:
    if axis is None:
        return jnp.sum(_flat(z)[0])[None]
    wide = lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))  # noqa: E731
    sums = [jnp.sum(wide(_with_axis(leaf, axis, owner)), axis=axis).reshape(-1) for leaf in jax.tree.leaves(z)]
    return jnp.concatenate(sums)


def _with_axis(leaf: Any, axis: int, owner: str) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(f"{owner}(axis={axis}) was given a leaf of shape {leaf.shape}, which has no such axis.")
    return leaf


def _simplex(v: jax.Array, total: jax.Array, k: int) -> jax.Array:
    """The projection of the k largest entries of a vector on {p >= 0, sum p = total}, zero elsewhere.

    With the support known it is v - tau on it, tau such that the sum is right; entries more than `total` below the
    largest are never in it, and cut off there they can't spoil the running sums.
    """
    still, room = jax.lax.stop_gradient((v, total))
    top = jnp.max(still)
    largest, index = jax.lax.top_k(jnp.maximum(still - top, -room), k)
    ranks = jnp.arange(1, k + 1)
    inside = (ranks * largest - jnp.cumsum(largest) + room > 0) & (largest > -room)  # rounding may say > 0 at the cut
    count = jnp.maximum(jnp.sum(inside), 1)
    support = jnp.zeros(v.shape, bool).at[index].set(ranks <= count)
    v = v - top
    tau = (jnp.sum(jnp.where(support, v, 0.0)) - total) / count
    return jnp.where(support, jax.nn.relu(v - tau), 0.0 * top)  # a NaN anywhere is one everywhere


def _section_nonempty(lower: Any, upper: Any, a: Any, b: Any) -> None:
    low, high, slope, level = (_known(value) for value in (lower, upper, a, b))
    if low is None or high is None or slope is None or level is None:
        return
    moving = slope != 0
    low, high, slope = low[moving], high[moving], slope[moving]
    least = np.where(slope > 0, slope * low, slope * high).sum()
    most = np.where(slope > 0, slope * high, slope * low).sum()
    slack = 1e-5 * (abs(level) + max((np.abs(v) for v in (least, most) if np.isfinite(v)), default=0.0))
    if not least - slack <= level <= most + slack:
        raise ValueError(
            f"BoxSection is empty: a . z ranges over [{least:g}, {most:g}] in the box, and is asked to be {level:g}."
        )


def _section(
    z: jax.Array, lower: jax.Array, upper: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which entries of clip(z + tau a) are at a bound at the root of a . clip(z + tau a) = b, and at which (-1, 1).

    Entry i moves between the bends enter_i and leave_i of tau. The last bend at which the left side is not above b is
    found by bisection among the sorted bends.
    """
    moves = a != 0
    slope = jnp.where(moves, a, 1.0)
    to_lower, to_upper = (lower - z) / slope, (upper - z) / slope
    enter = jnp.where(moves, jnp.minimum(to_lower, to_upper), -jnp.inf)
    leave = jnp.where(moves, jnp.maximum(to_lower, to_upper), jnp.inf)
    bends = jnp.sort(jnp.concatenate([jnp.where(moves, enter, jnp.inf), leave]))

    def value(tau: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(moves, a * jnp.clip(z + tau * slope, lower, upper), 0.0))

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # the left side is <= b at bend `low` (or low is -1), and above it at bend `high`
        middle = (low + high) // 2
        below = value(bends[jnp.clip(middle, 0, bends.shape[0] - 1)]) <= b
        done = high - low <= 1
        return jnp.where(done | ~below, low, middle), jnp.where(done | below, high, middle)

    start = (jnp.asarray(-1), jnp.asarray(bends.shape[0]))
    last = jax.lax.fori_loop(0, bends.shape[0].bit_length() + 1, halve, start)[0]
    here = jnp.where(last >= 0, bends[jnp.maximum(last, 0)], -jnp.inf)
    there = jnp.where(last + 1 < bends.shape[0], bends[jnp.minimum(last + 1, bends.shape[0] - 1)], jnp.inf)
    before, after = moves & (enter >= there), moves & (leave <= here)
    return before | after, jnp.where(before == (a > 0), -1, 1)


@jax.jit
def _transport(scores: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The Euclidean projection on the polytope; the last Newton step, on the final support, is differentiated."""
    scores = scores - jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))  # u takes it up
    still = jax.lax.stop_gradient((scores, rows, columns))
    thresholds = jax.vmap(lambda s, r: jnp.max(s) - jnp.max(_simplex(s, r, s.shape[0])))(*still[:2])
    start = jnp.concatenate([-thresholds, jnp.zeros_like(columns)])
    potentials = jax.lax.stop_gradient(_dual_newton(*still, start, jax.nn.relu, lambda t: 0.5 * jax.nn.relu(t) ** 2))
    m = rows.shape[0]
    moved = scores + potentials[:m, None] + potentials[None, m:]
    support = jax.lax.stop_gradient(moved > 0)
    plan = jnp.where(support, moved, 0.0)
    system = _laplacian(support.astype(scores.dtype))
    inverse = jnp.linalg.pinv(system, rtol=_cut(system), hermitian=True)
    step = inverse @ jnp.concatenate([rows - plan.sum(1), columns - plan.sum(0)])
    return jnp.where(support, jax.nn.relu(moved + step[:m, None] + step[None, m:]), 0.0)


@jax.jit
def _kl_transport(scores: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The projection in the Kullback-Leibler divergence: Sinkhorn's rounds, then Newton's; two are differentiated."""
    scores = scores - jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
    still = jax.lax.stop_gradient((scores, rows, columns))
    m = rows.shape[0]

    def round_(_: Any, v: jax.Array) -> jax.Array:
        u = jnp.log(still[1]) - jax.nn.logsumexp(still[0] + v[None, :], axis=1)
        return jnp.log(still[2]) - jax.nn.logsumexp(still[0] + u[:, None], axis=0)

    v = jax.lax.fori_loop(0, 10, round_, jnp.zeros_like(columns))
    u = jnp.log(still[1]) - jax.nn.logsumexp(still[0] + v[None, :], axis=1)
    potentials = jax.lax.stop_gradient(_dual_newton(*still, jnp.concatenate([u, v]), jnp.exp, jnp.exp))
    gauge = jnp.concatenate([jnp.ones_like(rows), -jnp.ones_like(columns)])  # (u, v) and (u + c, v - c) are one plan
    for _ in range(2):
        plan = jnp.exp(scores + potentials[:m, None] + potentials[None, m:])
        system = _laplacian(plan) + jnp.mean(plan) * gauge[:, None] * gauge
        left = jnp.concatenate([rows - plan.sum(1), columns - plan.sum(0)])
        potentials = potentials + jnp.linalg.solve(system, left)
    return jnp.exp(scores + potentials[:m, None] + potentials[None, m:])


def _laplacian(weights: jax.Array) -> jax.Array:
    """The second derivatives of the dual by (u, v), for the weights phi'(scores + u + v)."""
    return jnp.block([[jnp.diag(weights.sum(1)), weights], [weights.T, jnp.diag(weights.sum(0))]])


def _dual_newton(
    scores: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    start: jax.Array,
    plan_of: Callable[[jax.Array], jax.Array],
    integral: Callable[[jax.Array], jax.Array],
    steps: int = 100,
) -> jax.Array:
    """The minimum over (u, v) of sum integral(scores + u + v) - u . rows - v . columns by damped Newton steps.

    The damping is proportional to the gradient, which keeps the local rate; a step is halved until it decreases.
    """
    m = rows.shape[0]
    sums = jnp.concatenate([rows, columns])
    unit = jnp.max(sums)
    unit = jnp.where(unit > 0, unit, 1.0)
    eps = jnp.finfo(scores.dtype).eps
    reach = _largest(scores)

    def at(w: jax.Array) -> jax.Array:
        return scores + w[:m, None] + w[None, m:]

    def value(w: jax.Array) -> jax.Array:
        return jnp.sum(integral(at(w))) - w @ sums

    def gradient(w: jax.Array) -> jax.Array:
        plan = plan_of(at(w))
        return jnp.concatenate([plan.sum(1), plan.sum(0)]) - sums

    def body(carry: Any) -> Any:
        i, w, slope, _ = carry
        weights = jax.vmap(jax.vmap(jax.grad(plan_of)))(at(w))
        size = jnp.max(jnp.abs(slope)) / unit
        # With the least curvature that takes the whole gradient's step no further than the scores reach.
        damping = jnp.maximum(jnp.minimum(size, 1.0), 10 * eps) * unit / (unit + reach)
        direction = -jnp.linalg.solve(_laplacian(weights) + damping * jnp.eye(w.shape[0], dtype=w.dtype), slope)
        here, descent = value(w), slope @ direction

        def too_long(search: Any) -> Any:
            k, t = search
            worse = ~(value(w + t * direction) <= here + 1e-4 * t * descent)
            return worse & ~(_largest(gradient(w + t * direction)) < 0.5 * _largest(slope)) & (k < 40)

        t = jax.lax.while_loop(too_long, lambda s: (s[0] + 1, s[1] / 2), (0, jnp.ones((), w.dtype)))[1]
        new = w + t * direction
        found = gradient(new)
        stuck = ~(value(new) < here) & ~(_largest(found) < _largest(slope))
        return i + 1, jnp.where(stuck, w, new), jnp.where(stuck, slope, found), stuck

    def go(carry: Any) -> jax.Array:
        i, _, slope, stuck = carry
        return (i < steps) & ~stuck & (_largest(slope) > 4 * eps * unit)

    return jax.lax.while_loop(go, body, (0, start, gradient(start), jnp.asarray(False)))[1]
