"""What else is taken for a lower solver: a step size, an optax rule, a function, a solver of another library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel._arguments import explained, has, look
from bilevel._forward import forward_only
from bilevel._module import hyperparameters
from bilevel.level import Level
from bilevel.lower.loops import LowerState
from bilevel.lower.steps import GradientDescent
from bilevel.optimizers import is_rule
from bilevel.typing import LowerSolver, PyTree

__all__ = ["Function", "Identity", "as_lower_solver", "jaxopt", "optimistix"]


_NO_REVERSE = (
    "No derivative goes back through a solver of jaxopt that was made without implicit_diff, as implicit estimators "
    "want it: give lower.jaxopt(..., implicit_diff=True) for one of its solution, or unroll=True (and jit=True) for "
    "one of its steps."
)


@hyperparameters
class Function:
    """A lower solver from a function `(level, x, y) -> y`."""

    fn: Callable[[Level, PyTree, PyTree], PyTree]

    def init(self, y: PyTree) -> LowerState:
        """y with nothing to remember."""
        return LowerState(y, None)

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """Run from `state`."""
        name = look(self.fn, "__name__", type(self.fn).__name__)
        try:
            y = self.fn(level, x, state.y)
        except (TypeError, jax.errors.TracerArrayConversionError) as error:
            if isinstance(error, TypeError) and "positional argument" in str(error):
                raise ValueError(
                    f"The lower solver {name} is called as {name}(lower, x, y) and returns y: {error}."
                ) from error
            if isinstance(error, (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError)):
                raise ValueError(
                    f"The lower solver {name} asks for the numbers of a traced array, as numpy, SciPy and float() do: "
                    "write it in jax.numpy, or call what runs on the host by jax.pure_callback."
                ) from error
            raise
        _check_answer(name, y, state.y)
        return LowerState(y, None)


def _check_answer(name: str, y: PyTree, start: PyTree) -> None:
    """Raise a sentence where a lower solver of the user's returns something other than y."""

    def form(tree: PyTree) -> str:
        return str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree))

    if jax.tree.structure(y) != jax.tree.structure(start) or [jnp.shape(a) for a in jax.tree.leaves(y)] != [  # type: ignore[operator]
        jnp.shape(a) for a in jax.tree.leaves(start)
    ]:
        raise ValueError(
            f"The lower solver {name} returned {form(y)} for a y of {form(start)}: it returns the lower variable, and "
            "nothing else, shaped as it was given."
        )


@hyperparameters
class Identity:
    """y stays where it is: for a training loop of one's own, which moves it between two hypergradients.

    Only estimators that take derivatives of the lower *loss* go with it (`hypergradients.Implicit` and its relatives);
    those that differentiate the lower solver's steps have none to differentiate here, and refuse it.
    """

    def init(self, y: PyTree) -> LowerState:
        """y with nothing to remember."""
        return LowerState(y, None)

    def __call__(self, level: Level, x: PyTree, state: LowerState) -> LowerState:
        """The state itself."""
        return state


_ELSEWHERE = {
    "bilevel.hypergradients": "an estimator goes first, solvers.HypergradientDescent(hypergradients.{name}(...))",
    "bilevel.linear": "it goes into linear_solver=, as in solvers.AID(linear_solver=linear.{name}(...))",
}


def as_lower_solver(solver: Any) -> LowerSolver:
    """A lower solver from itself, an optax rule (10 steps), a step size, or a function `(level, x, y) -> y`."""
    if isinstance(solver, type):
        raise TypeError(f"A lower solver was given as the class {solver.__name__}: write {solver.__name__}().")
    if callable(solver) and look(solver, "__module__", "").split(".")[0] in ("optax", "bilevel", "jaxopt"):
        given = look(solver, "__name__")
        if given is not None:  # a function that makes a rule or a solver, and not one
            raise TypeError(f"A lower solver was given as the constructor {given}: call it, {given}(...).")
    module, name = type(solver).__module__, type(solver).__name__
    for home, cure in _ELSEWHERE.items():
        if module.startswith(home):
            raise TypeError(f"A lower solver was given as {name}, which is one of {home}: {cure.format(name=name)}.")
    if has(solver, "init") and callable(solver) and not is_rule(solver):
        return solver
    if is_rule(solver) or (isinstance(solver, (float, int, jax.Array)) and not isinstance(solver, bool)):
        return GradientDescent(solver)
    if callable(solver):
        return Function(solver)
    raise TypeError(
        "A lower solver is a bilevel.lower solver, an optax rule, a step size or a function (lower, x, y) -> y, not "
        f"{type(solver).__name__}."
    )


@explained
def jaxopt(solver_class: Any, **options: Any) -> Function:
    """A jaxopt solver, which minimises y -> f(x, y) from the incoming y.

        lower.jaxopt(jaxopt.LBFGS, maxiter=100, tol=1e-8)

    Derivatives through it follow the options (`implicit_diff`, `unroll`); implicit estimators need none, and
    `implicit_diff=False` is set unless given.
    """
    options = {"implicit_diff": False, **options}
    reverse = options["implicit_diff"] or options.get("unroll") is True

    def solve(level: Level, x: PyTree, y: PyTree) -> PyTree:
        found = solver_class(fun=lambda y, x: level(x, y), **options).run(y, x).params
        return found if reverse else forward_only(found, _NO_REVERSE)

    return Function(solve)


@explained
def optimistix(solver: Any, **options: Any) -> Function:
    """An optimistix minimiser from the incoming y: `lower.optimistix(optimistix.BFGS(1e-8, 1e-8), max_steps=100)`."""
    options = {"throw": False, **options}

    def solve(level: Level, x: PyTree, y: PyTree) -> PyTree:
        import optimistix as optx

        return optx.minimise(lambda y, x: level(x, y), solver, y, args=x, **options).value

    return Function(solve)
