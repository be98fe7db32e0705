"""SciPy's methods of nonlinear programming over rows that are evaluated together."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["FAR", "METHODS", "Rows", "minimise"]

METHODS = ("SLSQP", "trust-constr")
_SHORT = {"inequality": "ineq", "equality": "eq"}  # SciPy's names
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


def minimise(
    rows: Callable[[np.ndarray], Rows],
    start: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    *,
    method: str = "SLSQP",
    iterations: int = 60,
    tol: float = 1e-10,
    far: float = FAR,
) -> np.ndarray:
    """Where a local method ends, the start where it ends nowhere; whether it says that it failed is not asked.

    Unknowns whose bounds are equal stay where they are. An end beyond `far` is none.
    """
    from scipy.optimize import Bounds, NonlinearConstraint
    from scipy.optimize import minimize as scipy_minimise

    whole = np.clip(start, lower, upper)
    free = np.flatnonzero(lower < upper)
    if not free.size:
        return whole
    last: dict[str, Any] = {"z": None, "rows": None}

    def at(z: np.ndarray) -> Rows:
        if last["z"] is None or not np.array_equal(last["z"], z):
            point = whole.copy()
            point[free] = np.clip(z, lower[free], upper[free])
            last["z"], last["rows"] = z.copy(), _walled(_columns(rows(point), free))
        return last["rows"]

    first = at(whole[free])
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
                whole[free],
                jac=lambda z: at(z).gradient,
                bounds=Bounds(lower[free], upper[free]),
                constraints=constraints,
                method=method,
                options=options,
            ).x
    except (ValueError, np.linalg.LinAlgError):  # of a subproblem without a solution
        return whole
    if not np.isfinite(found).all() or np.abs(found).max() > far:
        return whole
    whole = whole.copy()
    whole[free] = np.clip(found, lower[free], upper[free])
    return whole


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
