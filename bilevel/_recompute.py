"""Long loops in reverse mode: with a given number of states, the others computed again, or with their gradients kept.

Reverse mode needs the states of a loop s_{t+1} = Phi_t(s_t) from the last to the first. Kept all, they are T copies.
With `keep` of them the loop is run forward once, some of its states kept; step t is then taken back from the nearest
kept state before it, and what is kept along the way takes the places that have become free. Which states, is the
binomial schedule (`schedule`): for a given number it needs the fewest steps. sqrt(2 T) states need each step at most
twice (and once more where it is taken back), log2(T) states a few times.

The program holds a step three times (forward, forward again, backward), however long the loop is and whatever is kept:
the schedule is a table that it reads. With all states kept nothing is computed again, and the program holds it twice.

A training's step is a gradient, which is dear, and a move along it, which is cheap. Where there is room for as much as
all steps, the gradients are kept rather than the states, and moved along again (`gradients_kept`).

Reference: Griewank, Walther, "Algorithm 799: Revolve", ACM Transactions on Mathematical Software 26(1), 2000.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from bilevel._traces import applied, equations
from bilevel.typing import PyTree

__all__ = ["Schedule", "alone", "even", "gradients_kept", "noted", "repeated", "schedule", "split"]

_GRADIENT = "bilevel gradient"
_LARGE = 2**20  # numbers in all states of a run
_LONGEST = 16  # steps between kept states, about: more saves little memory, and leaves caches


class Schedule(NamedTuple):
    """The order of a loop's steps in reverse mode with few states. Places are 0, ..., keep - 1; one more is scratch.

    Attributes:
      first: the states that the forward run keeps, in this order in the places 0, 1, ...; state 0 is the first.
      begin: for each step, from the last to the first, the place of the state that is gone on from.
      at: that state's number.
      rows: where its rows begin in `to` and `place`, and after the last one where all end.
      to, place: states that are computed again on the way to the step, and where each is kept.
      steps: how many steps are computed again, in all.
    """

    first: np.ndarray
    begin: np.ndarray
    at: np.ndarray
    rows: np.ndarray
    to: np.ndarray
    place: np.ndarray
    steps: int


@functools.cache
def schedule(steps: int, keep: int) -> Schedule:
    """The binomial schedule of `steps` steps with `keep` states, the first one among them."""
    scratch = keep
    first, begin, at, rows, to, place = [0], [], [], [0], [], []
    # Stretches of steps [a, b), the state a in its place; the last of them is taken back first.
    stretches, free = [(0, steps, 0)], list(range(keep - 1, 0, -1))
    while stretches:
        a, b, held = stretches.pop()
        begin.append(held)
        at.append(a)
        while b - a > 1 and free:
            middle = a + _ahead(b - a, len(free))
            stretches.append((a, middle, held))
            a, held = middle, free.pop()
            if len(begin) == 1:
                first.append(a)
            else:
                to.append(a)
                place.append(held)
        if b - a > 1:  # nothing is free: each step of the stretch from its beginning
            stretches.append((a, b - 1, held))
            to.append(b - 1)
            place.append(scratch)
        elif held:
            free.append(held)
        rows.append(len(to))
    begin[0], at[0] = len(first) - 1, first[-1]
    again = int(np.sum(np.asarray(to, np.int64) - _starts(at, rows, to)))
    table = lambda values: np.asarray(values, np.int32)  # noqa: E731
    return Schedule(table(first), table(begin), table(at), table(rows), table(to), table(place), again)


def _starts(at: list[int], rows: list[int], to: list[int]) -> np.ndarray:
    """The state that each row begins with: the row before it, or what its step went on from."""
    starts = np.asarray([0, *to[:-1]] if to else [], np.int64)
    for number, state in enumerate(at):
        if rows[number] < rows[number + 1]:
            starts[rows[number]] = state
    return starts


def _ahead(steps: int, free: int) -> int:
    """How far ahead the next state is kept, with so many free places.

    With s = free + 1 and B(s, r) = C(s + r, s) the longest stretch that is taken back with each step computed at most r
    times, it is as far as B(s, r - 1), and leaves at least B(s - 1, r - 1) behind it.
    """
    s, r = free + 1, 1
    while math.comb(s + r, s) < steps:
        r += 1
    return max(1, min(math.comb(s + r - 1, s), steps - math.comb(s + r - 2, s - 1)))


def split(tree: PyTree) -> tuple[list[Any], list[Any], Callable[[list[Any], list[Any]], PyTree]]:
    """The leaves of a tree that have derivatives, the others, and the function that puts them together again."""
    leaves, structure = jax.tree.flatten(tree)
    real = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def join(floats: list[Any], others: list[Any]) -> PyTree:
        both = {True: iter(floats), False: iter(others)}
        return jax.tree.unflatten(structure, [next(both[on]) for on in real])

    take = lambda which: [leaf for leaf, on in zip(leaves, real, strict=True) if on is which]  # noqa: E731
    return take(True), take(False), join


def repeated(
    body: Callable[[PyTree, jax.Array], PyTree], state: PyTree, steps: int, keep: int, beside: PyTree = ()
) -> tuple[PyTree, PyTree]:
    """`for i in range(steps): state = body(state, i)`, differentiable in reverse with `keep` states; and `beside`.

    What `body` captures is differentiated too, where somebody asks for it. Higher derivatives of that derivative, in
    both modes, are those of the loop with all states kept.

    Args:
      body: (state, i) -> state, of the same shapes and dtypes.
      state: any pytree of arrays.
      steps: how many.
      keep: the number of states, from 1 to `steps`.
      beside: arrays that `body` captures, which are returned as they are: the sum of their cotangents over the steps
        begins with that of what is returned, so that a loop in parts adds up what the whole loop does, in its order.
    """
    state = jax.tree.map(_strong, state)
    floats, others, join = split(state)
    traced, active, passive = _flattened(body, floats, others, join)
    leaves, structure = jax.tree.flatten(beside)
    places = [next((i for i, c in active.items() if c is leaf), None) for leaf in leaves]
    run = _Again(traced.jaxpr, len(floats), schedule(steps, keep), keep, frozenset(i for i in places if i is not None))
    *end, through = run(floats, others, active, passive)
    given = [leaf if i is None else through[i] for i, leaf in zip(places, leaves, strict=True)]
    return join(*end), jax.tree.unflatten(structure, given)


def _stepped(body: Callable[[PyTree, jax.Array], PyTree], state: PyTree, i: Any) -> PyTree:
    """The state after a step, of the form and with the types of the one before."""
    new = jax.tree.map(_strong, body(state, i))
    was, now = jax.tree.structure(state), jax.tree.structure(new)
    if str(was) != str(now):
        raise TypeError(f"A step has to keep the form of its state: it made {now} of {was}.")
    return new


def _strong(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return jax.lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf, "weak_type", False) else leaf


# Around a step and its gradient: XLA rewrites nothing across it, so that each is the same sums in the same order
# wherever it is computed again, and the gradient the same numbers for every `keep` of `repeated`.
alone = jax.lax.optimization_barrier


def even(steps: int, about: float) -> int:
    """The length of stretches that are all as long, about so long; where no number near divides the steps, that one."""
    divisors = [d for d in range(math.ceil(about / 2), int(2 * about) + 1) if steps % d == 0]
    return min(divisors, key=lambda d: (round(abs(math.log(d / about)), 9), d), default=math.ceil(about))


def noted(gradient: PyTree) -> PyTree:
    """A gradient that `gradients_kept` keeps: what is dear in a step, and what the rest of it can be told from."""
    return alone(jax.tree.map(lambda leaf: checkpoint_name(leaf, _GRADIENT), gradient))


def gradients_kept(body: Callable[[PyTree, jax.Array], PyTree], state: PyTree, steps: int) -> PyTree:
    """`for i in range(steps): state = body(state, i)`, of which reverse mode computes no gradient again.

    Kept are the gradients that the body has `noted`, and the states between the steps; where these are large, every
    K-th alone, K about sqrt(steps) or 16: those between are moved along the gradients that are there. With y and
    Adam's two moments as state that is little more than one copy of y per step, and not three. Where a body notes
    nothing all states are kept, and each step is computed again.

    The numbers are those of `repeated` to rounding: a processor may contract a move along a kept gradient otherwise.
    """
    state = jax.tree.map(_strong, state)
    floats, others, join = split(state)
    traced, active, passive = _flattened(body, floats, others, join)
    seen = sum(map(_is_note, traced.jaxpr.eqns))
    if not seen or seen < sum(map(_is_note, equations(traced.jaxpr))):  # or within a loop of the step's own
        return repeated(body, state, steps, steps)[0]
    large = steps * sum(leaf.size for leaf in (*floats, *others)) > _LARGE
    length = even(steps, min(math.sqrt(steps), _LONGEST)) if large else 1
    *end, _ = _Moved(traced.jaxpr, len(floats), steps, length)(floats, others, active, passive)
    return join(*end)


def _flattened(
    body: Callable[[PyTree, jax.Array], PyTree], floats: list[Any], others: list[Any], join: Any
) -> tuple[Any, dict[int, Any], dict[int, Any]]:
    """A step's trace, and what it captures by number: what has a derivative, and the rest.

    What the body captures must be an argument: a custom derivative sees nothing else.
    """

    def flat(i: Any, floats: list[Any], others: list[Any]) -> tuple[list[Any], list[Any]]:
        return split(_stepped(body, join(floats, others), i))[:2]

    traced = jax.make_jaxpr(flat)(jnp.int32(0), floats, others)
    captured = dict(enumerate(traced.consts))
    active = {i: c for i, c in captured.items() if jnp.issubdtype(jnp.result_type(c), jnp.inexact)}
    return traced, active, {i: c for i, c in captured.items() if i not in active}


def _is_note(equation: Any) -> bool:
    return equation.primitive.name == "name" and equation.params["name"] == _GRADIENT


class _Run:
    """The loop as a function of its state (`floats`, `others`) and of what its step captured, floats first.

    Captured arrays are dictionaries by their number: which of them are differentiated is thus the form of the argument.
    Those with a number in `through` are returned too.
    """

    def __init__(self, jaxpr: Any, floats: int, count: int, through: frozenset[int] = frozenset()) -> None:
        self.jaxpr, self.floats, self.count, self.through = jaxpr, floats, count, through

    def step(self, t: Any, floats: Any, others: Any, active: Any, passive: Any) -> tuple[Any, Any]:
        both = active | passive
        consts = [both[i] for i in range(len(both))]
        state = alone((*floats, *others))
        new = alone(jax.core.eval_jaxpr(self.jaxpr, consts, jnp.asarray(t, jnp.int32), *state))
        return new[: self.floats], new[self.floats :]

    def __call__(self, floats: Any, others: Any, active: Any, passive: Any) -> tuple[Any, Any, Any]:
        handed = lambda active: {i: active[i] for i in self.through}  # noqa: E731

        @jax.custom_vjp
        def run(floats: Any, others: Any, active: Any, passive: Any) -> tuple[Any, Any, Any]:
            go = lambda t, state: self.step(t, state[0], state[1], active, passive)  # noqa: E731
            return *jax.lax.fori_loop(0, self.count, go, (floats, others)), handed(active)

        def forward(floats: Any, others: Any, active: Any, passive: Any) -> tuple[Any, Any]:
            value = lambda tree: jax.tree.map(lambda p: p.value, tree, is_leaf=_is_primal)  # noqa: E731
            asked = {i: c.value for i, c in active.items() if c.perturbed}
            rest = {i: c.value for i, c in active.items() if not c.perturbed} | value(passive)
            given = value(floats), value(others), asked, rest
            ends, kept = self.sweep(*given)
            return (*ends, handed(value(active))), (given, kept)

        def backward(residuals: Any, cotangents: Any) -> Any:
            given, kept = residuals
            of_ends, _, of_through = jax.tree.map(_instantiated, cotangents, is_leaf=_is_zero)
            so_far = {i: of_through.get(i, jnp.zeros_like(c)) for i, c in given[2].items()}
            of_state, of_captured = self.pullback(*given, kept, of_ends, so_far)
            return of_state, [None] * len(given[1]), {i: of_captured.get(i) for i in active}, {i: None for i in passive}

        run.defvjp(forward, backward, symbolic_zeros=True)
        return run(floats, others, active, passive)

    # Two loops of a length that is known in their tables alone: their own derivatives are those of plain scans.

    def sweep(self, *given: Any) -> tuple[Any, Any]:
        """The end of the loop, and what is kept for the way back."""
        sweep = jax.custom_jvp(self._sweep)

        @sweep.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            _, along = jax.jvp(self._plain_forward, primals, tangents)
            ends, kept = sweep(*primals)
            return (ends, kept), (along, jax.tree.map(_no_tangent, kept))  # what is kept is a note, and no argument

        return sweep(*given)

    def pullback(self, *given: Any) -> tuple[Any, Any]:
        """The cotangents of the first state and of what is captured, from those of the end and the sums so far."""
        pullback = jax.custom_jvp(self._pullback)

        @pullback.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            without = lambda args: (*args[:4], *args[5:])  # noqa: E731  # without what is kept
            _, along = jax.jvp(self._plain_pullback, without(primals), without(tangents))
            return pullback(*primals), along

        return pullback(*given)

    def _plain(self, floats: Any, others: Any, active: Any, passive: Any) -> tuple[Any, Any]:
        def body(state: Any, t: Any) -> tuple[Any, None]:
            return self.step(t, state[0], state[1], active, passive), None

        steps = jnp.arange(self.count)
        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), (floats, others), steps)[0]

    def _plain_forward(self, floats: Any, others: Any, active: Any, passive: Any) -> tuple[Any, Any]:
        """The same by the rules of reverse mode, which a step may have of its own (and none of forward mode)."""
        plain = lambda floats, active: self._plain(floats, others, active, passive)  # noqa: E731
        ends, _, others = jax.vjp(plain, floats, active, has_aux=True)
        return ends, others

    def _plain_pullback(
        self, floats: Any, others: Any, active: Any, passive: Any, cotangents: Any, so_far: Any
    ) -> tuple[Any, Any]:
        back = jax.vjp(lambda floats, active: self._plain(floats, others, active, passive)[0], floats, active)[1]
        of_state, of_captured = back(cotangents)
        return of_state, jax.tree.map(jnp.add, so_far, of_captured)

    def _sweep(self, *given: Any) -> tuple[Any, Any]:
        """The end of the loop, and what its backward pass needs."""
        raise NotImplementedError

    def _pullback(
        self, floats: Any, others: Any, active: Any, passive: Any, kept: Any, cotangents: Any, so_far: Any
    ) -> tuple[Any, Any]:
        """The backward pass."""
        raise NotImplementedError


class _Again(_Run):
    """The loop with the states of a schedule kept, and the others computed again."""

    def __init__(self, jaxpr: Any, floats: int, plan: Schedule, keep: int, through: frozenset[int]) -> None:
        super().__init__(jaxpr, floats, len(plan.begin), through)
        self.plan, self.keep = plan, keep

    def _sweep(self, *given: Any) -> tuple[Any, Any]:
        floats, others, active, passive = given
        state = floats, others
        kept = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.keep + 1, *leaf.shape)), state)
        stops = jnp.asarray([*self.plan.first[1:], self.count], jnp.int32)
        places = jnp.asarray([*range(1, len(self.plan.first)), self.keep], jnp.int32)
        return self._advanced(state, kept, 0, (0, len(stops)), stops, places, active, passive)

    def _pullback(
        self, floats: Any, others: Any, active: Any, passive: Any, kept: Any, cotangents: Any, so_far: Any
    ) -> tuple[Any, Any]:
        plan = jax.tree.map(jnp.asarray, self.plan._replace(steps=0))

        def back(k: Any, carry: Any) -> Any:
            kept, of_state, of_captured = carry
            state = jax.tree.map(lambda rows: rows[plan.begin[k]], kept)
            rows = plan.rows[k], plan.rows[k + 1]
            if len(self.plan.to):  # otherwise all states are kept
                state, kept = self._advanced(state, kept, plan.at[k], rows, plan.to, plan.place, active, passive)
            t = self.count - 1 - k
            one = lambda floats, active: self.step(t, floats, state[1], active, passive)[0]  # noqa: E731
            of_state, more = jax.vjp(one, state[0], active)[1](of_state)
            return kept, of_state, jax.tree.map(jnp.add, of_captured, more)

        _, of_state, of_captured = jax.lax.fori_loop(0, self.count, back, (kept, cotangents, so_far))
        return of_state, of_captured

    def _advanced(
        self, state: Any, kept: Any, at: Any, rows: Any, to: Any, place: Any, active: Any, passive: Any
    ) -> tuple[Any, Any]:
        """From state number `at` on to those of the rows, each of which is kept in its place."""

        def row(r: Any, carry: Any) -> Any:
            state, kept, at = carry
            go = lambda t, state: self.step(t, state[0], state[1], active, passive)  # noqa: E731
            state = jax.lax.fori_loop(at, to[r], go, state)
            write = lambda rows, leaf: jax.lax.dynamic_update_index_in_dim(rows, leaf, place[r], 0)  # noqa: E731
            return state, jax.tree.map(write, kept, state), to[r]

        state, kept, _ = jax.lax.fori_loop(rows[0], rows[1], row, (state, kept, jnp.asarray(at, jnp.int32)))
        return state, kept


class _Moved(_Run):
    """The loop with its gradients kept, and every `length`-th state: those between are moved along the gradients."""

    def __init__(self, jaxpr: Any, floats: int, count: int, length: int) -> None:
        super().__init__(jaxpr, floats, count)
        self.length, self.stretches = length, -(-count // length)
        self.notes = [equation.outvars[0] for equation in jaxpr.eqns if _is_note(equation)]

    def of_step(self, wanted: Any, t: Any, state: Any, active: Any, passive: Any, gradients: Any = ()) -> list[Any]:
        """Variables of a step's trace at a state, with gradients in the place of those that it notes."""
        both = active | passive
        consts = [both[i] for i in range(len(both))]
        variables = (*self.jaxpr.constvars, *self.jaxpr.invars, *(self.notes if gradients else ()))
        values = (*consts, jnp.asarray(t, jnp.int32), *state, *gradients)
        return _computed(self.jaxpr, dict(zip(variables, values, strict=True)), wanted)

    def moved(self, t: Any, floats: Any, others: Any, active: Any, passive: Any, gradients: Any) -> tuple[Any, Any]:
        """The state after a step along gradients that are there."""
        new = self.of_step(self.jaxpr.outvars, t, (*floats, *others), active, passive, gradients)
        return new[: self.floats], new[self.floats :]

    def _steps_of(self, stretch: Any) -> tuple[Any, Any]:
        return stretch * self.length, jnp.minimum((stretch + 1) * self.length, self.count)

    def _sweep(self, *given: Any) -> tuple[Any, Any]:
        floats, others, active, passive = given
        ends = len(self.jaxpr.outvars)
        wanted = (*self.jaxpr.outvars, *self.notes)

        def step(t: Any, carry: Any) -> Any:
            (floats, others), gradients = carry
            found = alone(self.of_step(wanted, t, alone((*floats, *others)), active, passive))
            return (found[: self.floats], found[self.floats : ends]), _written(gradients, t, found[ends:])

        def stretch(k: Any, carry: Any) -> Any:
            state, states, gradients = carry
            states = _written(states, k, state)
            state, gradients = jax.lax.fori_loop(*self._steps_of(k), step, (state, gradients))
            return state, states, gradients

        state = list(floats), list(others)
        states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.stretches, *leaf.shape)), state)
        # Each of its own: of equal arrays XLA makes one, and copies it.
        rows = [jnp.full((self.count, *v.aval.shape), i, v.aval.dtype) for i, v in enumerate(self.notes)]
        end, *kept = jax.lax.fori_loop(0, self.stretches, stretch, (state, states, rows))
        return end, kept

    def _pullback(
        self, floats: Any, others: Any, active: Any, passive: Any, kept: Any, cotangents: Any, so_far: Any
    ) -> tuple[Any, Any]:
        states, gradients = kept

        def stretch(k: Any, carry: Any) -> Any:
            k = self.stretches - 1 - k
            first, last = self._steps_of(k)

            def again(t: Any, carry: Any) -> Any:
                (floats, others), between = carry
                between = _written(between, t - first, (floats, others))
                return self.moved(t, floats, others, active, passive, _row(gradients, t)), between

            state, between = jax.lax.fori_loop(first, last - 1, again, (_row(states, k), carry[0]))
            between = _written(between, last - 1 - first, state)

            def back(i: Any, carry: Any) -> Any:
                of_state, of_captured = carry
                t = last - 1 - i
                floats, others = _row(between, t - first)

                def move(floats: Any, active: Any, along: Any) -> Any:
                    return self.moved(t, floats, others, active, passive, along)[0]

                def gradient(floats: Any, active: Any) -> Any:
                    return self.of_step(self.notes, t, (*floats, *others), active, passive)

                *direct, of_gradient = jax.vjp(move, floats, active, _row(gradients, t))[1](of_state)
                through = jax.vjp(gradient, floats, active)[1](of_gradient)
                of_state, more = jax.tree.map(jnp.add, tuple(direct), through)
                return of_state, jax.tree.map(jnp.add, of_captured, more)

            return between, *jax.lax.fori_loop(0, last - first, back, carry[1:])

        between = jax.tree.map(lambda rows: jnp.zeros((self.length, *rows.shape[1:]), rows.dtype), states)
        return jax.lax.fori_loop(0, self.stretches, stretch, (between, cotangents, so_far))[1:]


def _row(rows: PyTree, i: Any) -> PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), rows)


def _written(rows: PyTree, i: Any, row: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, i, 0), rows, row)


def _computed(jaxpr: Any, values: dict[Any, Any], wanted: Any) -> list[Any]:
    """Variables of a trace from the values of others; what these make needless is not computed."""
    needed, order = {v for v in wanted if not isinstance(v, Literal)} - values.keys(), []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            order.append(equation)
            needed.update(v for v in equation.invars if not isinstance(v, Literal) and v not in values)
    values, read = dict(values), lambda v: v.val if isinstance(v, Literal) else values[v]
    for equation in reversed(order):
        found = applied(equation, [read(v) for v in equation.invars])
        values.update((v, new) for v, new in zip(equation.outvars, found, strict=True) if v not in values)
    return [read(v) for v in wanted]


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _instantiated(cotangent: Any) -> Any:
    if _is_zero(cotangent):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _no_tangent(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
