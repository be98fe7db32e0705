"""Forward mode: the derivative of the lower run in few upper variables, carried along with it in constant memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel import derivatives
from bilevel._module import hyperparameters, state
from bilevel.hypergradients._base import Estimate, last_steps, lower_metrics
from bilevel.keys import Draw
from bilevel.level import Level
from bilevel.lower import LowerState, Steps
from bilevel.optimizers import check_count
from bilevel.typing import LowerSolver, PyTree, Scalar

_RULE = "the number of {} is a positive integer, or None for {}"


@state
class Tangents:
    """What `Forward` keeps from call to call.

    Attributes:
      calls: how many there were.
      directions: u_1, ..., u_n, shaped like x with a leading axis; None where each call begins anew.
      lower: the derivative of the lower solver's state along each, a list of its floating-point leaves (those of y
        first, then those of the optimiser's memory) with a leading axis; None where each call begins anew.
    """

    calls: jax.Array
    directions: PyTree
    lower: list[jax.Array] | None


@hyperparameters
class Forward:
    """The exact derivative of F(x, y_T(x)) by tangents that travel with the lower run (forward mode).

    With s = (y, the optimiser's memory), s_{t+1} = Phi_t(s_t, x) and Z = ds/dx along the directions u_1, ..., u_n of x,

        Z_{t+1} = decay (d_s Phi_t) Z_t + (d_x Phi_t) U,    G = F_x + (the y part of Z_T)' F_y

    where U are the unit vectors, n = p = dim x: as exact as `Unrolled`, which takes the same derivative in reverse. The
    memory is n copies of s however many steps there are. Works along any lower solver: optax rules with their states,
    projections, proxes, runs until a tolerance, functions `(level, x, y) -> y`.

    A long run in pieces: with `restart=k` the tangents of a call are where those of the next begin, k calls in a row:
    k calls of T steps at one x are one run of k T steps (its schedules too), and its exact derivative; the carry is
    all there is to save. `restart=None` never begins anew. In `HypergradientDescent` x then moves between calls:
    real-time recurrence, in which Z belongs to the x's along the way, and which tends to the exact derivative as x
    settles. It needs the warm start and an upper step rule that withdraws no steps.

    Many upper variables: with `directions=n` the u are random, and with E[u u'] = I

        G = F_x + (1/n) sum over i of u_i <Z u_i, F_y>

    is unbiased. With g = Z'F_y, what is estimated (F_x is exact), its variance E|G - E G|^2 is

        "rademacher"  (signs)                  (p - 1) |g|^2 / n
        "normal"      (standard normal)        (p + 1) |g|^2 / n
        "orthogonal"  (a random n-frame)       (p - n) |g|^2 / n,   n <= p; exact at n = p

    so that step sizes are about n / p of those for the exact gradient. A small G does not show a small g: a run with
    random directions takes all its steps and never ends CONVERGED.

    Attributes:
      last: differentiate only the last K steps of each call (truncated); None: all of them.
      restart: the calls after which Z begins at zero again; None: never.
      decay: what is kept of Z in each step, 0 to 1 (truncated recurrence): at 0 only the last step counts, as in
        `OneStep`. None: all of it.
      directions: n, the number of random directions per call (drawn anew where Z begins anew); None: all p.
      distribution: of the random directions, see above.

    Cost per step: one step, and n tangents of it (each an HVP and a cross product) in one batched pass; per call one
    gradient of F. Metrics: `lower_residual` = |f_y|; with random directions `deviation`, an estimate of the root of the
    variance from this call's G alone.

    Rules that withdraw steps or search along a line are differentiated with their choices (which step, how long) for
    constants. Where a parameter's gradient is exactly zero, roots have the derivative zero, as in `Unrolled`.

    References: Franceschi, Donini, Frasconi, Pontil, "Forward and Reverse Gradient-Based Hyperparameter Optimization",
    ICML 2017 (forward mode, real-time hyperparameter optimisation); Donini et al., "MARTHE: Scheduling the Learning
    Rate Via Online Hypergradients", IJCAI 2020 (`decay`); Shen et al., "Memory-Efficient Gradient Unrolling for
    Large-Scale Bi-level Optimization" (FG2U), NeurIPS 2024 (random directions).
    """

    through: ClassVar[bool] = True

    last: int | None = None
    restart: int | None = 1
    decay: float | None = None
    directions: int | None = None
    distribution: str = "rademacher"

    _VARIANCES: ClassVar[dict[str, Callable[[int, int], float]]] = {
        "rademacher": lambda p, n: (p - 1) / n,
        "normal": lambda p, n: (p + 1) / n,
        "orthogonal": lambda p, n: (p - n) / n,
    }

    def __post_init__(self) -> None:
        check_count("Forward", _RULE.format("differentiated steps", "all of them"), last=self.last)
        check_count("Forward", _RULE.format("calls between restarts", "no restart"), restart=self.restart)
        check_count("Forward", _RULE.format("random directions", "all unit vectors"), directions=self.directions)
        if isinstance(self.decay, float) and not 0 <= self.decay <= 1:
            raise ValueError(f"Forward(decay={self.decay!r}): what is kept of dy/dx in a step lies between 0 and 1.")
        if self.distribution not in self._VARIANCES:
            names = ", ".join(map(repr, self._VARIANCES))
            raise ValueError(f"Forward(distribution={self.distribution!r}): give one of {names}.")
        if self.last is not None and self.restart != 1:
            raise ValueError(
                f"Forward(last={self.last}, restart={self.restart}): `last` begins dy/dx at zero within each call, and "
                "`restart` carries it from call to call. Give one of the two (decay < 1 forgets the past of a carried "
                "one)."
            )
        if self.directions is not None and self.restart is None:
            raise ValueError(
                f"Forward(directions={self.directions}, restart=None): directions are drawn where dy/dx begins anew, "
                "and the rest of x would never be looked at. Give a finite restart, or directions=None."
            )

    @property
    def settles(self) -> tuple[str, ...]:
        """As of `Unrolled`: nothing but the hypergradient where it is exact."""
        exact = self.last is None and self.decay is None and self.restart == 1
        return () if exact else ("lower_residual",)

    @property
    def continues(self) -> bool:
        """Whether a call goes on where the last one ended, and needs its y and x not to be taken back."""
        return self.restart != 1

    @property
    def conclusive(self) -> bool:
        """Whether a small estimate shows a small hypergradient; one along random directions does not."""
        return self.directions is None

    def init(self, lower: Level, x: PyTree, y: PyTree) -> Tangents:
        """Nothing yet; the first call finds out what the lower solver remembers."""
        return Tangents(jnp.zeros((), jnp.uint32), None, None)

    def begin(self, lower: Level, x: PyTree, start: LowerState) -> Tangents:
        """The same in the form that all later calls return, which a compiled loop needs."""
        carry = self.init(lower, x, start.y)
        return Tangents(carry.calls, *self._zero(lower, x, start, carry)) if self.continues else carry

    def __call__(
        self, upper: Level, lower: Level, solver: LowerSolver, x: PyTree, start: LowerState, carry: Tangents
    ) -> Estimate:
        """The estimate at x."""
        directions, tangents = self._zero(lower, x, start, carry)
        if self.continues and carry.lower is not None:
            fresh = jnp.bool_(False) if self.restart is None else carry.calls % jnp.uint32(self.restart) == 0
            keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(fresh, new, old), new, old)  # noqa: E731
            directions, tangents = keep(directions, carry.directions), keep(tangents, carry.lower)

        found, tangents = self._run(lower, solver, x, start, directions, tangents)
        value, (upper_x, upper_y) = jax.value_and_grad(upper, argnums=(0, 1))(x, found.y)
        of_y = jax.tree.unflatten(jax.tree.structure(found.y), tangents[: len(jax.tree.leaves(found.y))])
        slopes = jax.vmap(lambda tangent: derivatives.dot(tangent, upper_y))(of_y)  # <Z u_i, F_y>
        through = jax.tree.map(lambda u: jnp.tensordot(slopes.astype(u.dtype), u, axes=1), directions)

        metrics = lower_metrics(lower, x, found.y)
        if self.directions is not None:
            through = optax.tree.scale(1 / self.directions, through)
            c = self._VARIANCES[self.distribution](optax.tree.size(x), self.directions)
            metrics["deviation"] = derivatives.norm(through) * (c / (1 + c)) ** 0.5  # E|G - F_x|^2 = (1 + c) |g|^2
        kept = (directions, tangents) if self.continues else (None, None)
        gradient = optax.tree.cast_like(optax.tree.add(upper_x, through), x)
        return Estimate(value, gradient, found, Tangents(carry.calls + 1, *kept), metrics)

    def _run(
        self,
        lower: Level,
        solver: LowerSolver,
        x: PyTree,
        start: LowerState,
        directions: PyTree,
        tangents: list[jax.Array],
    ) -> tuple[LowerState, list[jax.Array]]:
        """The lower run, and the tangents of its state at the end."""
        if self.continues and hasattr(solver, "schedules") and solver.schedules is None:
            solver = dataclasses.replace(solver, schedules="run")  # type: ignore[type-var]  # the pieces of one run
        if hasattr(solver, "differentiable"):
            solver = solver.differentiable(choosing=True)
        if self.decay is not None:
            solver = _Forgetting(solver, self.decay)
        if self.last is not None:
            solver, start = last_steps("Forward", self.last, solver, lower, x, start)
        leaves, structure = jax.tree.flatten(start)
        floats = [_differentiable(leaf) for leaf in leaves]

        def run(x: PyTree, inputs: list[jax.Array]) -> tuple[list[jax.Array], list[Any]]:
            both = iter(inputs)
            begin = [next(both) if is_float else leaf for is_float, leaf in zip(floats, leaves, strict=True)]
            end = jax.tree.leaves(solver(lower, x, jax.tree.unflatten(structure, begin)))
            return _pick(end, floats, True), _pick(end, floats, False)

        inputs = _pick(leaves, floats, True)

        def along(direction: PyTree, tangent: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
            return jax.jvp(run, (x, inputs), (direction, tangent), has_aux=True)

        # The run itself does not depend on the direction: one run, and all tangents in one batched pass along it.
        ends, tangents, others = jax.vmap(along, out_axes=(None, 0, None))(directions, tangents)
        of_floats, of_others = iter(ends), iter(others)
        end = [next(of_floats) if is_float else next(of_others) for is_float in floats]
        return jax.tree.unflatten(structure, end), tangents

    def _zero(self, lower: Level, x: PyTree, start: LowerState, carry: Tangents) -> tuple[PyTree, list[jax.Array]]:
        """Where dy/dx begins: the directions, and zeros."""
        if self.directions is None:
            flat, unravel = ravel_pytree(x)
            directions = jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))
        else:
            key = jax.random.fold_in(lower.key.fold_in(Draw.DIRECTIONS).random, carry.calls)
            directions = self._draw(key, x, self.directions)
        count = jax.tree.leaves(directions)[0].shape[0]
        floats = _pick(jax.tree.leaves(start), [_differentiable(leaf) for leaf in jax.tree.leaves(start)], True)
        return directions, [jnp.zeros((count, *jnp.shape(leaf)), jnp.result_type(leaf)) for leaf in floats]

    def _draw(self, key: jax.Array, x: PyTree, n: int) -> PyTree:
        """Random directions with E[u u'] = I, shaped like x with a leading axis of n."""
        wide = lambda leaf: jnp.promote_types(jnp.result_type(leaf), jnp.float32)  # noqa: E731
        if self.distribution == "orthogonal":
            flat, unravel = ravel_pytree(x)
            p = flat.size
            if n > p:
                raise ValueError(
                    f"Forward(directions={n}, distribution='orthogonal'): x has {p} numbers, and no more than so many "
                    "directions are orthogonal. Leave directions=None, which takes all of them."
                )
            frame = jnp.linalg.qr(jax.random.normal(key, (p, n), wide(flat)))[0]
            return jax.vmap(unravel)((jnp.sqrt(p) * frame.T).astype(flat.dtype))
        draw = jax.random.rademacher if self.distribution == "rademacher" else jax.random.normal
        leaves, structure = jax.tree.flatten(x)
        # Leaf by leaf: where x lies over a mesh its directions can lie there too, and no device draws them all.
        keys = jax.random.split(key, len(leaves))
        drawn = [draw(k, (n, *leaf.shape), wide(leaf)).astype(leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)


class _Forgetting(Steps):
    """A lower solver's steps, whose incoming state has its derivative multiplied by `decay`."""

    def __init__(self, kernel: Any, decay: Any) -> None:
        if not hasattr(kernel, "advance"):
            raise ValueError(
                "Forward(decay=...) forgets from step to step and needs a lower solver made of steps: "
                f"lower.GradientDescent(...) or lower.MomentumSGD(...), not {type(kernel).__name__}."
            )
        self.kernel, self.decay = kernel, decay
        self.steps, self.tol = kernel.steps, getattr(kernel, "tol", None)

    def begin(self, x: PyTree, state: LowerState) -> LowerState:
        return self.kernel.begin(x, state)

    def advance(self, level: Level, x: PyTree, state: LowerState) -> tuple[LowerState, Callable[[], Scalar]]:
        fade = lambda leaf: _fade(leaf, self.decay) if _differentiable(leaf) else leaf  # noqa: E731
        return self.kernel.advance(level, x, jax.tree.map(fade, state))

    def end(self, state: LowerState) -> LowerState:
        return self.kernel.end(state)

    def step_size(self) -> Any:
        return self.kernel.step_size()


@jax.custom_jvp
def _fade(value: jax.Array, decay: Any) -> jax.Array:
    """The value, with `decay` times its tangent."""
    return value


@_fade.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], jnp.asarray(primals[1], tangents[0].dtype) * tangents[0]


def _differentiable(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _pick(leaves: list[Any], floats: list[bool], which: bool) -> list[Any]:
    return [leaf for is_float, leaf in zip(floats, leaves, strict=True) if is_float is which]
