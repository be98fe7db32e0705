"""The ways to a hypergradient of the alignment that are compared: how the surrogate is moved and differentiated.

Not exported, but for their names: `robustness_study` runs them, beside the defences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array

from bilevel import Level, hyperparameters, linear, lower
from bilevel.hypergradients import Estimate, Implicit, OneStep, Unrolled
from bilevel.solvers import HypergradientDescent

ROUTES = ("alternating", "unrolled", "one-step", "implicit", "frozen")


@hyperparameters
class Held:
    """The derivative of F in x alone, at the y that the lower solver finds: F_x, as if y did not follow x.

    Alternating minimisation in the two variables. No derivative of the lower level but its gradient is taken.
    """

    def init(self, lower: Level, x: Any, y: Any) -> Any:
        """Nothing is kept."""
        return ()

    def __call__(self, upper: Level, lower: Level, solver: Any, x: Any, start: Any, carry: Any) -> Estimate:
        """The estimate at x."""
        found = solver(lower, x, start)
        value, gradient = jax.value_and_grad(upper)(x, found.y)
        return Estimate(value, gradient, found, carry, {})


def route(
    name: str,
    rule: optax.GradientTransformation,
    draw: Callable[[Array], Any],
    *,
    inner: int = 5,
    every: int = 20,
    rate: float = 1e-2,
    key: Any = 0,
) -> HypergradientDescent:
    """A solver of the alignment problem, by its name.

    - "alternating": `inner` steps on the surrogate, one on the generator with the surrogate held (the paper's);
    - "unrolled": the same, differentiated through the `inner` steps;
    - "one-step": through the last of them;
    - "implicit": by five steps of damped CG (the surrogate is not at a minimum, and its Hessian is indefinite);
    - "frozen": the surrogate that is given stays as it is, and only the generator moves.

    Args:
        rule: of the surrogate's steps.
        draw: `key -> y`; the surrogate is drawn afresh every `every` rounds ("frozen": never).
        inner: K.
        rate: of the generator's Adam.
        key: of the draws.

    Raises:
        ValueError: there is no such route.
    """
    check_route(name)
    adam = optax.adam(rate)
    if name == "frozen":
        return HypergradientDescent(Held(), lower.Identity(), adam)
    estimators: dict[str, Any] = {
        "alternating": Held(),
        "unrolled": Unrolled(),
        "one-step": OneStep(),
        "implicit": Implicit(linear.CG(tol=None, max_steps=5, damping=1.0, warm_start=False)),
    }
    surrogate = lower.Reinitialized(lower.GradientDescent(rule, inner), draw, every, key)
    return HypergradientDescent(estimators[name], surrogate, adam)


def check_route(name: Any) -> None:
    """Raise where there is no such route."""
    if name not in ROUTES:
        raise ValueError(f"route {name!r}: the routes to a hypergradient are {', '.join(ROUTES)}.")
