"""Differentiate through any solver by stating the equation that its answer satisfies.

A solver returns y*(a) for arguments a; an *optimality function* T vanishes there, T(y*(a), a) = 0. The implicit
function theorem gives the derivative from T alone, whatever the solver did inside:

    A dy* = -B da,        A = dT/dy,  B = dT/da,  both at (y*(a), a).

`custom_root` attaches this rule to a solver, and `custom_fixed_point` does so for y* = T(y*, a). Both keep the
signatures of `jaxopt.implicit_diff`; the decorated function can be differentiated in either mode, and again. `argmin`
is the case in which T is the gradient of a lower-level objective. Ready-made conditions are in `bilevel.optimality`.

The derivative is that of the *solution*, so it is exact only as far as the solver converged, and it does not depend
on the start: the derivative with respect to the initial guess is zero by design. To differentiate with respect to the start (as
MAML does), differentiate through the solver's steps instead.

Blondel, Berthet, Cuturi, Frostig, Hoyer, Llinares-López, Pedregosa and Vert (2022), "Efficient and modular implicit
differentiation", NeurIPS 35.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero

from bilevel.optimality import stationarity

LinearMap = Callable[[Any], Any]
Solve = Callable[..., Any]


def custom_root(
    optimality_fun: Callable[..., Any],
    has_aux: bool = False,
    solve: Solve | None = None,
    reference_signature: Callable[..., Any] | inspect.Signature | None = None,
    *,
    symmetric: bool | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a solver whose answer is a root: `optimality_fun(sol, *args) == 0`.

    The solver is called as `solver(init, *args, **kwargs)`, and `optimality_fun(sol, *args, **kwargs)` takes the same
    arguments with the solution in place of the initial guess. Arguments, solution and auxiliary output are arbitrary pytrees;
    leaves that are not arrays or floats (callables, strings, counts) are passed through unchanged. The result can be
    used under `jvp`, `vjp`, `jacfwd`, `jacrev`, `hessian`, `vmap` and `jit`, in any nesting. The solver itself is never
    differentiated, so it may hold `while` loops or, outside `jit`, plain NumPy.

    Args:
        optimality_fun: the condition. Its output has the leaves of the solution, with their shapes.
        has_aux: whether the solver returns `(sol, aux)`. Nothing is differentiated with respect to `aux`.
        solve: solves A u = b. Either a function `(matvec, b) -> u` (those of `jaxopt.linear_solve` are) or a solver of
            `bilevel.linear`. The default is conjugate gradients for a symmetric A and GMRES for a general one,
            to a relative residual of `eps ** 0.75`.
        reference_signature: a function or signature that says how keyword arguments map to the positional ones of
            `optimality_fun`, if its own signature does not.
        symmetric: whether A is symmetric positive definite, which is used to choose the default of `solve` and for
            nothing else. If None, what `optimality_fun` says of itself (`stationarity` does), else False.

    Returns:
        A decorator of solvers.

    Raises:
        TypeError: if the arguments cannot be matched, or the condition and the solution do not have equal leaves.
    """
    if not callable(optimality_fun):
        raise TypeError(
            f"custom_root was given {optimality_fun!r} as optimality_fun; it expects a function "
            "optimality_fun(sol, *args) that is zero at the solution."
        )
    if symmetric is None:
        symmetric = getattr(optimality_fun, "symmetric", False)
    linear_solve = _as_solve(solve, symmetric)
    condition_signature = _signature(optimality_fun if reference_signature is None else reference_signature)

    def decorator(solver: Callable[..., Any]) -> Callable[..., Any]:
        solver_signature = _signature(solver)

        @functools.wraps(solver, updated=())
        def differentiable_solver(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _bind(solver_signature, args, kwargs, "the solver")
            if not args:
                raise TypeError(
                    "A solver decorated with custom_root was called without its first argument. Pass the initial guess "
                    "(or None) first: solver(init, *args)."
                )
            init, *rest = args
            start = _Leaves((init,))
            given = _Leaves((tuple(rest), kwargs))

            @jax.custom_jvp
            def run(start_values: list[Any], values: list[Any]) -> Any:
                (init,), (rest, kwargs) = start.merge(start_values), given.merge(values)
                return _split_aux(solver(init, *rest, **kwargs), has_aux)

            def rule(primals: Any, tangents: Any) -> Any:
                values, directions = primals[1], tangents[1]
                sol, aux = run(*primals)  # the decorated solver again: this is what makes second derivatives right
                moving = [i for i, direction in enumerate(directions) if _moves(values[i], direction)]

                def condition(sol: Any, moved: Sequence[Any]) -> Any:
                    replaced = list(values)
                    for i, value in zip(moving, moved, strict=True):
                        replaced[i] = value
                    (rest, kwargs) = given.merge(replaced)
                    # The initial guess holds the place of the solution while the arguments are matched.
                    bound, bound_kwargs = _bind(condition_signature, (init, *rest), kwargs, "optimality_fun")
                    return optimality_fun(sol, *bound[1:], **bound_kwargs)

                if moving:
                    at, along = [values[i] for i in moving], [directions[i] for i in moving]
                    sol_dot = _root_jvp(condition, sol, (at,), (along,), linear_solve)
                else:
                    sol_dot = jax.tree.map(_zero_tangent, sol)
                return (sol, aux), (sol_dot, jax.tree.map(_zero_tangent, aux))

            run.defjvp(rule, symbolic_zeros=True)
            sol, aux = run(start.values, given.values)
            return (sol, aux) if has_aux else sol

        return differentiable_solver

    return decorator


def custom_fixed_point(
    fixed_point_fun: Callable[..., Any],
    has_aux: bool = False,
    solve: Solve | None = None,
    reference_signature: Callable[..., Any] | inspect.Signature | None = None,
    *,
    symmetric: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a solver whose answer is a fixed point: `fixed_point_fun(sol, *args) == sol`.

    The linear system is that of `custom_root` with A = I - dT/dy, so a contraction T makes it well conditioned.
    The arguments are those of `custom_root`.
    """

    def optimality_fun(sol: Any, *args: Any, **kwargs: Any) -> Any:
        image = fixed_point_fun(sol, *args, **kwargs)
        _check_condition(image, sol)
        return jax.tree.unflatten(
            jax.tree.structure(sol), [y - t for y, t in zip(jax.tree.leaves(sol), jax.tree.leaves(image), strict=True)]
        )

    return custom_root(
        optimality_fun,
        has_aux=has_aux,
        solve=solve,
        reference_signature=fixed_point_fun if reference_signature is None else reference_signature,
        symmetric=symmetric,
    )


def root_jvp(
    optimality_fun: Callable[..., Any], sol: Any, args: tuple[Any, ...], tangents: tuple[Any, ...], solve: Solve | None = None
) -> Any:
    """Derivative of a root along `tangents`: u with A u = -B tangents.

    Args:
        optimality_fun: `optimality_fun(sol, *args)`, zero at `sol`.
        sol: the root.
        args: the arguments to differentiate with respect to.
        tangents: one direction per argument, of its structure.
        solve: as in `custom_root`.

    Returns:
        A pytree like `sol`.
    """
    if len(args) != len(tangents):
        raise ValueError(
            f"root_jvp was given {len(args)} args and {len(tangents)} tangents; it expects one tangent for each argument."
        )
    return _root_jvp(optimality_fun, sol, tuple(args), tuple(tangents), _as_solve(solve, _is_symmetric(optimality_fun)))


def root_vjp(
    optimality_fun: Callable[..., Any], sol: Any, args: tuple[Any, ...], cotangent: Any, solve: Solve | None = None
) -> tuple[Any, ...]:
    """Derivatives of `<cotangent, root>` by each argument: -B^T u with A^T u = cotangent.

    Args:
        optimality_fun: `optimality_fun(sol, *args)`, zero at `sol`.
        sol: the root.
        args: the arguments to differentiate with respect to.
        cotangent: a pytree like `sol`.
        solve: as in `custom_root`; it is given A^T.

    Returns:
        A tuple with one pytree per argument.
    """
    linear_solve = _as_solve(solve, _is_symmetric(optimality_fun))
    sol = jax.tree.map(_as_array, sol)
    condition = _in_the_space_of(optimality_fun, sol)
    _, transposed_in_sol = jax.vjp(lambda y: condition(y, *args), sol)
    _, transposed_in_args = jax.vjp(lambda *a: condition(sol, *a), *args)
    cotangent = jax.tree.map(lambda c, y: jnp.asarray(c, dtype=y.dtype), cotangent, sol)
    u = _linear_solve(lambda u: transposed_in_sol(u)[0], cotangent, linear_solve)
    return transposed_in_args(optax.tree.scale(-1, u))


def argmin(
    f: Callable[..., Any],
    solver: Callable[[Callable[..., Any], Any, Any], Any],
    *,
    optimality: Callable[..., Any] | None = None,
    has_aux: bool = False,
    linear_solver: Solve | None = None,
) -> Callable[..., Any]:
    """The lower level's solution y*(x) = argmin over y of f(x, y), as a differentiable function of x.

    dy*/dx = -(d2f/dy2)^{-1} d2f/dy dx, whatever `solver` is. The result is an ordinary function of x: put it into an upper
    objective, or into the lower objective of another `argmin` for three levels.

    Args:
        f: `f(x, y, *data) -> scalar`.
        solver: `(lower, x, y) -> y`, where `lower(x, y)` is f with its data bound.
        optimality: the condition `optimality(y, x, *data)` that the solver's answer satisfies, if it is not that the
            gradient of f by y vanishes: a constrained or non-smooth lower level, see `bilevel.optimality`.
        has_aux: whether `solver` returns `(y, aux)`; then so does the result.
        linear_solver: as `solve` of `custom_root`. The default is conjugate gradients, or GMRES if `optimality` is given.

    Returns:
        `y_star(x, y0, *data) -> y`. It is differentiable by x and by the data, and its derivative by y0 is zero by design.
    """
    if optimality is None:
        gradient = stationarity(lambda y, x, *data: f(x, y, *data))
    else:
        gradient = optimality

    @custom_root(gradient, has_aux=has_aux, solve=linear_solver)
    def solve_lower(y0: Any, x: Any, *data: Any) -> Any:
        return solver(lambda x, y: f(x, y, *data), x, y0)

    def y_star(x: Any, y0: Any, *data: Any) -> Any:
        return solve_lower(y0, x, *data)

    return y_star


# The implicit function theorem.


def _root_jvp(
    optimality_fun: Callable[..., Any], sol: Any, args: tuple[Any, ...], tangents: tuple[Any, ...], solve: Solve
) -> Any:
    sol = jax.tree.map(_as_array, sol)
    condition = _in_the_space_of(optimality_fun, sol)
    _, b = jax.jvp(lambda *a: condition(sol, *a), args, tangents)
    _, matvec = jax.linearize(lambda y: condition(y, *args), sol)
    return _linear_solve(matvec, optax.tree.scale(-1, b), solve)


def _linear_solve(matvec: LinearMap, b: Any, solve: Solve) -> Any:
    """Solve A u = b so that JAX can transpose the answer and differentiate it again.

    A is real-linear: the gradient of a real objective is not holomorphic in a complex y, so complex leaves travel as pairs of
    real ones.
    """
    join = functools.partial(_join_complex, like=b)
    real_matvec = lambda u: _split_complex(matvec(join(u)))  # noqa: E731
    u = jax.lax.custom_linear_solve(real_matvec, _split_complex(b), solve, transpose_solve=solve)
    return join(u)


def _split_complex(tree: Any) -> list[Any]:
    return [(z.real, z.imag) if jnp.iscomplexobj(z) else z for z in jax.tree.leaves(tree)]


def _join_complex(parts: list[Any], like: Any) -> Any:
    leaves = [jax.lax.complex(*part) if isinstance(part, tuple) else part for part in parts]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _in_the_space_of(optimality_fun: Callable[..., Any], sol: Any) -> Callable[..., Any]:
    """The condition with its leaves put into the containers of the solution, after a check that they fit."""

    def condition(y: Any, *args: Any) -> Any:
        residual = optimality_fun(y, *args)
        _check_condition(residual, sol)
        leaves = [jnp.asarray(r, dtype=s.dtype) for r, s in zip(jax.tree.leaves(residual), jax.tree.leaves(sol), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(sol), leaves)

    return condition


def _check_condition(residual: Any, sol: Any) -> None:
    wrong = [leaf for leaf in jax.tree.leaves(sol) if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    if wrong:
        raise TypeError(
            f"The solution holds a leaf of type {jnp.result_type(wrong[0])}, by which nothing can be differentiated; it expects "
            "floating-point leaves. Return counts and flags as auxiliary output: (sol, aux) with has_aux=True."
        )
    got, expected = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (residual, sol)]
    if got != expected:
        raise TypeError(
            f"The optimality function returned leaves of shapes {got} for a solution with leaves of shapes {expected}; they must be "
            "equal, one equation for each unknown. If the solver also returns auxiliary output, pass has_aux=True."
        )


# Linear solvers.


def _is_symmetric(optimality_fun: Callable[..., Any]) -> bool:
    return bool(getattr(optimality_fun, "symmetric", False))


def _as_solve(solve: Solve | None, symmetric: bool) -> Solve:
    if solve is None:
        return _conjugate_gradients if symmetric else _gmres
    if hasattr(solve, "init"):  # a solver of bilevel.linear: (matvec, b, carry) -> (u, carry, info)
        return lambda matvec, b: solve(matvec, b)[0]
    if not callable(solve):
        raise TypeError(
            f"solve was {solve!r}; it expects a function (matvec, b) -> u that solves A u = b, or a solver of bilevel.linear."
        )
    return solve


def _tolerance(b: Any) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(b)) ** 0.75


def _conjugate_gradients(matvec: LinearMap, b: Any) -> Any:
    return jax.scipy.sparse.linalg.cg(matvec, b, tol=_tolerance(b))[0]


def _gmres(matvec: LinearMap, b: Any) -> Any:
    # Up to 100 unknowns the Krylov space is the whole space and the answer is exact, also for an indefinite or a
    # singular but consistent system. Beyond, it restarts, so that memory stays at 50 vectors.
    size = optax.tree.size(b)
    if size <= 100:
        return jax.scipy.sparse.linalg.gmres(
            matvec, b, tol=_tolerance(b), restart=size, maxiter=4, solve_method="batched"
        )[0]
    return jax.scipy.sparse.linalg.gmres(
        matvec, b, tol=_tolerance(b), restart=50, maxiter=20, solve_method="incremental"
    )[0]


# Arguments.


class _Leaves:
    """A pytree of which the arrays and floats go through JAX, and all other leaves around it."""

    def __init__(self, tree: Any):
        self.leaves, self.treedef = jax.tree.flatten(tree)
        self.dynamic = [
            isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, complex)) and not isinstance(leaf, np.str_)
            for leaf in self.leaves
        ]
        self.values = [leaf for leaf, dynamic in zip(self.leaves, self.dynamic, strict=True) if dynamic]

    def merge(self, values: Sequence[Any]) -> Any:
        rest = iter(values)
        leaves = [next(rest) if dynamic else leaf for leaf, dynamic in zip(self.leaves, self.dynamic, strict=True)]
        return jax.tree.unflatten(self.treedef, leaves)


def _as_array(leaf: Any) -> Any:
    return jnp.asarray(leaf)


def _moves(value: Any, direction: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.inexact) and not isinstance(direction, SymbolicZero)


def _zero_tangent(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _split_aux(output: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(output, (tuple, list)) and len(output) == 2):
        raise TypeError(
            f"The solver returned {type(output).__name__} although has_aux=True; it must return a pair (sol, aux)."
        )
    sol, aux = output if has_aux else (output, None)
    return jax.tree.map(_as_array, sol), jax.tree.map(_as_array, aux)


def _signature(function: Callable[..., Any] | inspect.Signature) -> inspect.Signature | None:
    if isinstance(function, inspect.Signature):
        return function
    try:
        return inspect.signature(getattr(function, "subfun", function))
    except (TypeError, ValueError):  # a builtin: its arguments are taken as they come
        return None


def _bind(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any], whose: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keyword arguments turned into positional ones where the signature says how; defaults filled in."""
    if signature is None:
        return args, kwargs
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"The arguments do not fit the signature {signature} of {whose}: {error}. Solver and optimality_fun must take the same "
            "arguments (the solution in place of the initial guess); pass reference_signature to say how they match."
        ) from None
    bound.apply_defaults()
    return bound.args, bound.kwargs
