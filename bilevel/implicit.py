"""Differentiate through any solver by stating the equation that its answer satisfies.

A solver returns y*(a) for arguments a; an *optimality function* T vanishes there, T(y*(a), a) = 0. The implicit
function theorem gives the derivative from T alone, whatever the solver did inside:

    A dy* = -B da,        A = dT/dy,  B = dT/da,  both at (y*(a), a).

`custom_root` attaches this rule to a solver, and `custom_fixed_point` does so for y* = T(y*, a). Both keep the
signatures of `jaxopt.implicit_diff`; the decorated function can be differentiated in either mode, and again. `argmin`
is the case in which T is the gradient of a lower-level objective, and `qp` is a quadratic programme as a layer.
Ready-made conditions are in `bilevel.optimality`.

The derivative is that of the *solution*: it is exact only as far as the solver converged, and it is zero with respect
to the initial guess, by design. To differentiate with respect to the start (as MAML does), differentiate through the
solver's steps instead.

Blondel, Berthet, Cuturi, Frostig, Hoyer, Llinares-López, Pedregosa and Vert (2022), "Efficient and modular implicit
differentiation", NeurIPS 35.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from bilevel._arguments import Leaves, bind, explained, has, hoisted, holds_tracer, look, replaced, signature
from bilevel.linear import CG, GMRES, Dense
from bilevel.linear._common import is_skew
from bilevel.optimality import stationarity
from bilevel.quadratic import QPSolution, QPStatus, qp
from bilevel.typing import PyTree, Scalar, X, Y

LinearMap = Callable[[PyTree], PyTree]
Solve = Callable[..., Any]
P = ParamSpec("P")
R = TypeVar("R")
Args = TypeVar("Args", bound=tuple[Any, ...])

__all__ = [
    "QPSolution", "QPStatus", "argmin", "custom_fixed_point", "custom_root", "qp", "root_jvp", "root_vjp",
]  # fmt: skip


@explained
def custom_root(
    optimality_fun: Callable[..., PyTree],
    has_aux: bool = False,
    solve: Solve | None = None,
    reference_signature: Callable[..., Any] | inspect.Signature | None = None,
    *,
    symmetric: bool | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a solver whose answer is a root: `optimality_fun(sol, *args) == 0`.

    The solver is called as `solver(init, *args, **kwargs)`, and `optimality_fun(sol, *args, **kwargs)` takes the same
    arguments with the solution in place of the initial guess. Arguments, solution and auxiliary output are pytrees;
    leaves that are not arrays or floats (callables, strings, counts) are passed through unchanged. The result can be
    used under `jvp`, `vjp`, `jacfwd`, `jacrev`, `hessian`, `vmap` and `jit`, in any nesting. The solver itself is never
    differentiated, so it may hold `while` loops or, outside `jit` and `vmap`, plain NumPy.

    Values that solver and condition capture from an enclosing function are differentiated like arguments where they
    are found in a closure, a `functools.partial` or an attribute; elsewhere they raise an error.

    Args:
        optimality_fun: the condition. Its output has the leaves of the solution, with their shapes.
        has_aux: whether the solver returns `(sol, aux)`. Nothing is differentiated with respect to `aux`.
        solve: solves A u = b. Either a function `(matvec, b) -> u` (those of `jaxopt.linear_solve` are) or a solver of
            `bilevel.linear`. It is given A for forward mode and A^T for reverse mode. A solver of `bilevel.linear` for
            symmetric systems is probed where the condition does not say that A is symmetric, by two products: where
            they disagree the default for a general A is taken in its place. The default is conjugate
            gradients for a symmetric A; for a general one dense least squares up to 100 unknowns and GMRES beyond. The
            iterations end at a relative residual of `eps ** 0.75` (2e-12 in float64, 6e-6 in float32), or 1000.
        reference_signature: a function or signature that says how keyword arguments map to the positional ones of
            `optimality_fun`, if its own signature does not.
        symmetric: whether A is symmetric positive definite, which chooses the default of `solve` and nothing else. If
            None, what `optimality_fun` says of itself (`optimality.stationarity` does), else False.

    Raises:
        TypeError: if the arguments cannot be matched, or condition and solution do not have equal leaves.
    """
    if not callable(optimality_fun):
        raise TypeError(
            f"custom_root was given {optimality_fun!r} as optimality_fun; it expects a function "
            "optimality_fun(sol, *args) that is zero at the solution."
        )
    if callable(has_aux):
        raise TypeError(
            "custom_root was given a function as has_aux: it takes the condition alone and decorates the solver, "
            "custom_root(optimality_fun)(solver)."
        )
    linear_solve = _as_solve(solve, _is_symmetric(optimality_fun) if symmetric is None else symmetric)
    condition_signature = signature(optimality_fun if reference_signature is None else reference_signature)

    def decorator(solver: Callable[P, R]) -> Callable[P, R]:
        solver_signature = signature(solver)

        @functools.wraps(solver, updated=())
        def differentiable_solver(*args: P.args, **kwargs: P.kwargs) -> R:
            (init, *rest), named = bind(solver_signature, args, kwargs, "the solver")
            start, given = Leaves(init), Leaves((tuple(rest), named))

            def call(start_values: list[Any], values: list[Any]) -> Any:
                rest, named = given.merge(values)
                return _arrays(solver(start.merge(start_values), *rest, **named), has_aux)

            def condition(sol: PyTree, values: list[Any]) -> PyTree:
                rest, named = given.merge(values)
                # The initial guess holds the place of the solution while the arguments are matched.
                bound, named = bind(condition_signature, (init, *rest), named, "optimality_fun")
                return optimality_fun(sol, *bound[1:], **named)

            values = given.values
            if holds_tracer((solver, optimality_fun)):
                call, condition, values = hoisted(call, condition, has_aux, start.values, values)
            run = _with_implicit_derivative(call, condition, has_aux, linear_solve)
            try:
                return run(start.values, values)
            except jax.errors.UnexpectedTracerError as error:
                raise TypeError(
                    "The solver or its optimality function uses a value that is being differentiated without having it "
                    "as an argument. Pass it: solver(init, value, ...) and optimality_fun(sol, value, ...)."
                ) from error

        return differentiable_solver

    return decorator


@explained
def custom_fixed_point(
    fixed_point_fun: Callable[..., PyTree],
    has_aux: bool = False,
    solve: Solve | None = None,
    reference_signature: Callable[..., Any] | inspect.Signature | None = None,
    *,
    symmetric: bool = False,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a solver whose answer is a fixed point: `fixed_point_fun(sol, *args) == sol`.

    This is `custom_root` of T(y, a) = y - fixed_point_fun(y, a), with the same arguments. The linear system has
    A = I - d fixed_point_fun / dy, so a contraction makes it well conditioned.
    """

    def optimality_fun(sol: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        return optax.tree.sub(sol, _like(sol, fixed_point_fun(sol, *args, **kwargs)))

    reference = fixed_point_fun if reference_signature is None else reference_signature
    return custom_root(optimality_fun, has_aux, solve, reference, symmetric=symmetric)


@explained
def root_jvp(
    optimality_fun: Callable[..., PyTree], sol: Y, args: Args, tangents: Args, solve: Solve | None = None
) -> Y:
    """Derivative of the root `sol` of `optimality_fun(sol, *args)` along `tangents`: u with A u = -B tangents.

    There is one tangent per argument, of its structure; `solve` is as in `custom_root`. The result is like `sol`.
    """
    if len(args) != len(tangents):
        raise ValueError(
            f"root_jvp was given {len(args)} args and {len(tangents)} tangents; it expects one tangent per argument."
        )
    linear_solve = _as_solve(solve, _is_symmetric(optimality_fun))
    sol = jax.tree.map(jnp.asarray, sol)
    condition = _in_the_space_of(sol, optimality_fun)
    b = jax.jvp(lambda *a: condition(sol, *a), tuple(args), tuple(tangents))[1]
    matvec = jax.linearize(lambda y: condition(y, *args), sol)[1]
    return _linear_solve(matvec, optax.tree.scale(-1, b), linear_solve)


@explained
def root_vjp(
    optimality_fun: Callable[..., PyTree], sol: Y, args: Args, cotangent: Y, solve: Solve | None = None
) -> Args:
    """Derivatives of `<cotangent, sol>`, `sol` the root of `optimality_fun(sol, *args)`, by each argument.

    They are -B^T u with A^T u = cotangent, which is like `sol`; `solve`, as in `custom_root`, is given A^T.
    """
    linear_solve = _as_solve(solve, _is_symmetric(optimality_fun))
    sol = jax.tree.map(jnp.asarray, sol)
    cotangent = jax.tree.map(lambda c, y: jnp.asarray(c, dtype=y.dtype), cotangent, sol)
    condition = _in_the_space_of(sol, optimality_fun)
    _, transposed_in_sol = jax.vjp(lambda y: condition(y, *args), sol)
    _, transposed_in_args = jax.vjp(lambda *a: condition(sol, *a), *args)
    u = _linear_solve(lambda u: transposed_in_sol(u)[0], cotangent, linear_solve)
    return transposed_in_args(optax.tree.scale(-1, u))


@explained
def argmin(
    f: Callable[..., Any],
    solver: Callable[[Callable[[X, Y], Scalar], X, Y], R],
    *,
    optimality: Callable[..., PyTree] | None = None,
    has_aux: bool = False,
    linear_solver: Solve | None = None,
) -> Callable[Concatenate[X, Y, ...], R]:
    """The lower level's solution y*(x) = argmin over y of f(x, y), as a differentiable function of x.

        dy*/dx = -(d^2 f / dy dy)^{-1} d^2 f / dy dx,    whatever `solver` is.

    The result is an ordinary function of x: put it into an upper objective, or into the lower objective of another
    `argmin` for three levels.

    Args:
        f: `f(x, y, *data) -> scalar`.
        solver: `(lower, x, y) -> y`, where `lower(x, y)` is f with its data bound and the given y is the start.
        optimality: the condition `optimality(y, x, *data)` that the solver's answer satisfies where it is not that the
            gradient of f vanishes: a constrained or non-smooth lower level, see `bilevel.optimality`.
        has_aux: whether `solver` returns `(y, aux)`; then so does the result.
        linear_solver: as `solve` of `custom_root`. The default is conjugate gradients, and that for a general
            system if `optimality` is given.

    Returns:
        `y_star(x, y0, *data) -> y`, differentiable in x and the data; by y0 its derivative is zero, by design.
    """
    if not callable(solver) or has(solver, "init"):
        what = type(solver).__name__
        raise TypeError(
            f"argmin takes a function (lower, x, y) -> y as its solver, which finds y by means of its own, not {what}: "
            "with a lower solver of bilevel.lower, or a step size, the hypergradient is "
            "hypergradients.value_and_hypergradient(problem, None, lower_solver)."
        )
    called = explained(solver, "argmin's solver, called as solver(lower, x, y),")
    condition = stationarity(lambda y, x, *data: f(x, y, *data)) if optimality is None else optimality

    @custom_root(condition, has_aux=has_aux, solve=linear_solver)
    def solve_lower(y0: Y, x: X, *data: PyTree) -> R:
        return called(lambda x, y: f(x, y, *data), x, y0)

    def y_star(x: X, y0: Y, *data: PyTree) -> R:
        return solve_lower(y0, x, *data)

    return y_star


def _arrays(output: Any, has_aux: bool) -> Any:
    if has_aux and not (isinstance(output, (tuple, list)) and len(output) == 2):
        raise TypeError(
            f"The solver returned a {type(output).__name__} although has_aux=True; a pair (sol, aux) is expected."
        )
    if output is None or (has_aux and output[0] is None):
        raise TypeError("The solver returned None: it returns the solution, where the optimality function is zero.")
    return jax.tree.map(jnp.asarray, output)


def _with_implicit_derivative(
    call: Callable[..., Any], condition: Callable[..., PyTree], has_aux: bool, linear_solve: Solve
) -> Callable[..., Any]:
    """The function `call(start_values, values)`, with the derivative that `condition(sol, values) = 0` implies.

    The rule is a jvp made of operations that JAX can transpose and differentiate, so that it serves both modes. It
    calls the function that it is the rule of: the solution in it then depends on the arguments, which is what second
    derivatives need.
    """

    @jax.custom_jvp
    def run(start_values: list[Any], values: list[Any]) -> Any:
        return call(start_values, values)

    def rule(primals: Any, tangents: Any) -> Any:
        output = run(*primals)
        sol, aux = output if has_aux else (output, None)
        values, directions = primals[1], tangents[1]
        moving = [i for i, direction in enumerate(directions) if _moves(values[i], direction)]

        def condition_of_moving(sol: PyTree, *moved: Any) -> PyTree:
            return condition(sol, replaced(values, moving, moved))

        if moving:
            at, along = (tuple(every[i] for i in moving) for every in (values, directions))
            try:
                sol_dot = root_jvp(condition_of_moving, sol, at, along, linear_solve)
            except Exception as error:
                if not has_aux and isinstance(output, tuple) and len(output) == 2:
                    error.add_note("The solver returned a pair. If that is (sol, aux), pass has_aux=True.")
                raise
        else:
            sol_dot = jax.tree.map(_zero_tangent, sol)
        tangent = jax.tree.leaves((sol_dot, jax.tree.map(_zero_tangent, aux)))
        return output, jax.tree.unflatten(jax.tree.structure(output), tangent)

    run.defjvp(rule, symbolic_zeros=True)
    return run


def _moves(value: Any, direction: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.inexact) and not isinstance(direction, SymbolicZero)


def _zero_tangent(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


def _in_the_space_of(sol: PyTree, optimality_fun: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The condition with its leaves put into the containers and dtypes of the solution, if they fit."""

    def condition(y: PyTree, *args: Any) -> PyTree:
        residual = _like(sol, optimality_fun(y, *args))
        return jax.tree.map(lambda r, s: jnp.asarray(r, dtype=s.dtype), residual, sol)

    return condition


def _like(sol: PyTree, residual: PyTree) -> PyTree:
    """The leaves of a condition in the containers of the solution, if they fit."""
    for leaf in jax.tree.leaves(sol):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"The solution holds a leaf of type {jnp.result_type(leaf)}, which has no derivative; floating-point "
                "leaves are expected. Return counts and flags as auxiliary output: (sol, aux) with has_aux=True."
            )
    got, expected = ([jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (residual, sol))
    if got != expected:
        raise TypeError(
            f"The optimality function returned leaves of shapes {got} for a solution with leaves of shapes {expected}; "
            "they must be equal, one equation for each unknown."
        )
    return jax.tree.unflatten(jax.tree.structure(sol), jax.tree.leaves(residual))


def _linear_solve(matvec: LinearMap, b: PyTree, solve: Solve) -> PyTree:
    """Solve A u = b so that JAX can transpose the answer and differentiate it again.

    A is linear over the reals only: the gradient of a real objective is not holomorphic in a complex y. So complex
    leaves travel as pairs of real ones.
    """
    if not any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(b)):
        return jax.lax.custom_linear_solve(matvec, _tied(b), solve, transpose_solve=solve)
    real_matvec = lambda parts: _split_complex(matvec(_join_complex(parts, b)))  # noqa: E731
    u = jax.lax.custom_linear_solve(real_matvec, _tied(_split_complex(b)), solve, transpose_solve=solve)
    return _join_complex(u, b)


def _tied(b: PyTree) -> PyTree:
    """b with every leaf depending on all leaves, through the addition of a zero.

    JAX can transpose a linear solve only if every leaf of its right-hand side is a function of the tangents; those of
    equations that the arguments do not enter (the constraints, where the objective is differentiated) are constants.
    """
    first = [leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(b) if leaf.size]
    if len(first) < 2:
        return b
    zero = 0 * sum(first)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), b)


def _split_complex(tree: PyTree) -> list[Any]:
    return [(z.real, z.imag) if jnp.iscomplexobj(z) else z for z in jax.tree.leaves(tree)]


def _join_complex(parts: list[Any], like: PyTree) -> PyTree:
    leaves = [jax.lax.complex(*part) if isinstance(part, tuple) else part for part in parts]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _is_symmetric(optimality_fun: Callable[..., Any]) -> bool:
    return bool(look(optimality_fun, "symmetric", False))


def _as_solve(solve: Solve | None, symmetric: bool) -> Solve:
    """The linear solver as a function `(matvec, b) -> u`."""
    if solve is None:
        return _conjugate_gradients if symmetric else _general
    if isinstance(solve, type):
        raise TypeError(f"The linear solver was the class {solve.__name__}: make one of it, {solve.__name__}().")
    if not callable(solve):
        raise TypeError(
            f"The linear solver was {solve!r}; a function (matvec, b) -> u that solves A u = b, or a solver of "
            "bilevel.linear, is expected."
        )
    if not has(solve, "init"):
        return solve
    chosen = lambda matvec, b: solve(matvec, b)[0]  # noqa: E731  a solver of bilevel.linear returns (u, carry, info)
    sees = isinstance(solve, Dense)  # it holds the matrix
    return chosen if symmetric or sees or not getattr(solve, "symmetric", False) else _where_symmetric(chosen)


def _where_symmetric(solve: Solve) -> Solve:
    """The solver where the products of two random vectors say that A is symmetric, and the general one elsewhere."""

    def probed(matvec: LinearMap, b: PyTree) -> PyTree:
        skew = is_skew(matvec, b)  # a NaN goes to the solver that was asked for
        return jax.lax.cond(skew, lambda b: _general(matvec, b), lambda b: solve(matvec, b), b)

    return probed


def _conjugate_gradients(matvec: LinearMap, b: PyTree) -> PyTree:
    return CG(tol=_tolerance(b), max_steps=1000)(matvec, b)[0]


def _general(matvec: LinearMap, b: PyTree) -> PyTree:
    flat, unravel = ravel_pytree(b)
    if flat.size > 100:
        # GMRES keeps `restart` vectors, so a large system gets fewer.
        restart = 100 if flat.size <= 10_000 else 20
        return GMRES(tol=_tolerance(b), max_steps=1000, restart=restart)(matvec, b)[0]
    # Least squares are exact, also for a system that is indefinite, or singular but consistent (redundant constraints).
    # The columns are made one by one, since a condition with a custom_vjp of its own cannot be batched here.
    multiply = lambda e: ravel_pytree(matvec(unravel(e)))[0]  # noqa: E731
    columns = jax.lax.map(multiply, jnp.eye(flat.size, dtype=flat.dtype))
    return unravel(jnp.linalg.lstsq(columns.T, flat)[0])


def _tolerance(b: PyTree) -> float:
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(b)), default=1.0) ** 0.75
