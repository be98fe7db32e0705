"""SciPy's methods of nonlinear programming over rows that are evaluated together."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["FAR", "METHODS", "End", "Rows", "attempt"]

METHODS = ("SLSQP", "trust-constr")
_SHORT = {"inequality": "ineq", "equality": "eq"}  # SciPy's names
_SINGULAR = 6
"""SLSQP's word for equations of which some follow from others."""
_SPENT, _LIMIT = -1, {"SLSQP": 9, "trust-constr": 0}
"""Our word for a call that was left, and their word for one whose iterations are spent."""
_TRIALS = 3
FAR = 1e7
"""In units of the variables: a point beyond it is not kept."""


class Rows(NamedTuple):
    """An NLP's values at a point.

    Attributes:
      value, gradient: of the objective, (k,).
      inequality: (a,), asked to be >= 0, with its Jacobian (a, k).
      equality: (b,), asked to be 0, with its Jacobian (b, k).
    """

    value: float
    gradient: np.ndarray
    inequality: np.ndarray
    inequality_jacobian: np.ndarray
    equality: np.ndarray
    equality_jacobian: np.ndarray


class End(NamedTuple):
    """Where a local method was left.

    Attributes:
      point: the point.
      rested: whether it ended there by itself; False: its iterations or evaluations were spent.
    """

    point: np.ndarray
    rested: bool


class _SpentError(Exception):
    """All evaluations are spent."""


def attempt(
    rows: Callable[[np.ndarray], Rows],
    start: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    *,
    method: str = "SLSQP",
    iterations: int = 60,
    tol: float = 1e-10,
    far: float = FAR,
    evaluations: float = np.inf,
) -> End:
    """Where a local method ends, and its word for it; the start where it ends nowhere.

    Unknowns whose bounds are equal stay where they are. An end beyond `far` is none. The rows are evaluated at most
    `evaluations` times at a call of the method.
    """
    whole = np.clip(start, lower, upper)
    free = np.flatnonzero(lower < upper)
    if not free.size:
        return End(whole, True)

    def reduced(z: np.ndarray) -> Rows:
        point = whole.copy()
        point[free] = np.clip(z, lower[free], upper[free])
        return _walled(_columns(rows(point), free))

    end, status = whole[free], _SINGULAR
    random = np.random.default_rng(0)

    def independent(basis: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray]:
        """Combinations of the equations, fewer than those in use, or None; and a point beside the end where some follow
        from others at the end alone."""
        fewer = _independent(reduced(end).equality_jacobian, basis)
        if fewer is None:
            return None, end
        beside = end + 1e-2 * random.normal(size=end.size)
        both = [reduced(point).equality_jacobian for point in (end, beside)]
        fewer = _independent(np.concatenate(both, axis=1), basis)
        return fewer, end if fewer is not None else beside

    basis, end = independent(None)
    for _ in range(_TRIALS):
        found, status = _local(reduced, end, lower[free], upper[free], basis, method, iterations, tol, evaluations)
        if found is None or not np.isfinite(found).all() or np.abs(found).max() > far:
            break
        end = found
        if status != _SINGULAR or method != "SLSQP":
            break
        fewer, beside = independent(basis)
        if fewer is None and beside is end:
            break
        basis, end = (basis if fewer is None else fewer), beside
    whole = whole.copy()
    whole[free] = np.clip(end, lower[free], upper[free])
    return End(whole, status not in (_SPENT, _LIMIT[method]))


def _independent(jacobian: np.ndarray, basis: np.ndarray | None) -> np.ndarray | None:
    """Combinations of the equations that are independent here, in columns; None where those in use are so already.

    Equations that follow from the others say nothing, and a method may take them for contradictions.
    """
    if not len(jacobian) or not np.isfinite(jacobian).all():
        return None
    left, sizes, _ = np.linalg.svd(jacobian, full_matrices=False)
    rank = int((sizes > 1e-10 * sizes.max(initial=0.0)).sum())
    return None if rank == (len(jacobian) if basis is None else basis.shape[1]) else left[:, :rank]


def _local(
    rows: Callable[[np.ndarray], Rows],
    start: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    basis: np.ndarray | None,
    method: str,
    iterations: int,
    tol: float,
    evaluations: float,
) -> tuple[np.ndarray | None, int]:
    """One call of SciPy's method, with combinations `basis` of the equations: where it ended, and its word."""
    from scipy.optimize import Bounds, NonlinearConstraint
    from scipy.optimize import minimize as scipy_minimise

    last: dict[str, Any] = {"z": None, "rows": None, "iterate": start, "left": evaluations}

    def at(z: np.ndarray) -> Rows:
        if last["z"] is None or not np.array_equal(last["z"], z):
            if not last["left"] > 0:
                raise _SpentError
            last["left"] -= 1
            found = rows(z)
            if basis is not None:
                found = found._replace(
                    equality=basis.T @ found.equality, equality_jacobian=basis.T @ found.equality_jacobian
                )
            last["z"], last["rows"] = z.copy(), found
        return last["rows"]

    def gradient(z: np.ndarray) -> np.ndarray:  # asked for where a line search has ended
        last["iterate"] = z.copy()
        return at(z).gradient

    first = at(start)
    kinds = [kind for kind in ("inequality", "equality") if getattr(first, kind).size]
    value = {kind: (lambda z, kind=kind: getattr(at(z), kind)) for kind in kinds}
    slope = {kind: (lambda z, kind=kind: getattr(at(z), f"{kind}_jacobian")) for kind in kinds}
    constraints: list[Any]
    if method == "SLSQP":
        constraints = [{"type": _SHORT[kind], "fun": value[kind], "jac": slope[kind]} for kind in kinds]
        options: dict[str, Any] = {"maxiter": iterations, "ftol": tol}
    else:
        most = {"inequality": np.inf, "equality": 0.0}
        constraints = [NonlinearConstraint(value[kind], 0, most[kind], jac=slope[kind]) for kind in kinds]
        options = {"maxiter": 4 * iterations, "gtol": max(tol, 1e-10), "xtol": 1e-12}
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of failures, which are looked at by the caller
            found = scipy_minimise(
                lambda z: at(z).value,
                start,
                jac=gradient,
                bounds=Bounds(lower, upper),
                constraints=constraints,
                method=method,
                options=options,
            )
    except (ValueError, np.linalg.LinAlgError):  # of a subproblem without a solution
        return None, _SINGULAR
    except _SpentError:
        return last["iterate"], _SPENT
    return found.x, int(found.status)


def _columns(rows: Rows, free: np.ndarray) -> Rows:
    """The derivatives by some of the unknowns."""
    return rows._replace(
        gradient=rows.gradient[free],
        inequality_jacobian=rows.inequality_jacobian[:, free],
        equality_jacobian=rows.equality_jacobian[:, free],
    )


def _walled(rows: Rows) -> Rows:
    """Values that are not finite are a wall: large numbers, from which a line search turns back."""
    if all(np.isfinite(part).all() for part in rows):
        return rows
    wall: Any = lambda part, value: np.where(np.isfinite(part), part, value)  # noqa: E731
    return Rows(
        1e12,
        np.zeros_like(rows.gradient),
        wall(rows.inequality, -1e12),
        wall(rows.inequality_jacobian, 0.0),
        wall(rows.equality, 1e12),
        wall(rows.equality_jacobian, 0.0),
    )
