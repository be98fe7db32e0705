"""Matrix products with a common factor, taken as one.

A function's value and its tangent multiply the same matrices: X Y and X dY forward, R'X and dR'X backward. With few
columns such products are bound by reading X, and one product with twice the columns reads it once.
"""

from __future__ import annotations

import graphlib
import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from bilevel._traces import applied, traced_by

_COLUMNS = 64


def merge_products(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with products A B_1, A B_2, ... of one matrix A and narrow B_i (or B_1 A, B_2 A, ...) as one product each.

    The values are the same up to the order of sums. Products are merged where none needs another's result and the B_i
    have at most 64 columns (rows) in all; products inside loops and inner compiled functions are left as they are.

    Args:
      fn: a pure function of pytrees of arrays; it is traced once per call of the result.
    """

    return traced_by(lambda closed, args: _evaluate(closed.jaxpr, closed.consts, args), fn)


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    equations = _live(jaxpr)
    environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else environment[atom]  # noqa: E731
    bundles, order = _schedule(equations)
    for numbers in order:
        members = [equations[i] for i in numbers]
        if len(members) > 1:
            results = _product(members, bundles[numbers[0]][1], read)
        else:
            (equation,) = members
            results = applied(equation, [read(atom) for atom in equation.invars])
        outputs = [out for equation in members for out in equation.outvars]
        environment.update(zip(outputs, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _live(jaxpr: Any) -> list[Any]:
    """The equations that the outputs need: in a merged product what is not used could not be left out any more."""
    wanted, live = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            live.append(equation)
            wanted.update(atom for atom in equation.invars if not isinstance(atom, Literal))
    return live[::-1]


def _candidates(equation: Any) -> Iterator[tuple[int, Any]]:
    """The sides (0: left, 1: right) on which its factor may be shared, and what members of a bundle agree in."""
    if equation.primitive.name != "dot_general" or any(isinstance(atom, Literal) for atom in equation.invars):
        return
    contracted, batched = equation.params["dimension_numbers"]
    if batched[0] or len(contracted[0]) != 1:
        return
    for side in (0, 1):
        other = equation.invars[1 - side].aval
        if other.ndim == 2:
            params = {k: str(v) for k, v in equation.params.items() if k != "dimension_numbers"}
            yield side, (equation.invars[side], side, contracted[side], other.dtype, *sorted(params.items()))


def _product(equations: list[Any], side: int, read: Callable[[Any], Any]) -> list[jax.Array]:
    """The results of products that share the factor on this side, by one."""
    axes = [equation.params["dimension_numbers"][0] for equation in equations]
    factors = [read(equation.invars[1 - side]) for equation in equations]
    table = jnp.concatenate([jnp.moveaxis(b, axis[1 - side][0], 0) for b, axis in zip(factors, axes, strict=True)], 1)
    shared, axis, params = read(equations[0].invars[side]), axes[0][side][0], equations[0].params
    left, right, a, b = (shared, table, axis, 0) if side == 0 else (table, shared, 0, axis)
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    result = jax.lax.dot_general(left, right, (((a,), (b,)), ((), ())), **options)
    stops = itertools.accumulate(_columns(equation, side) for equation in equations[:-1])
    return jnp.split(result, list(stops), axis=result.ndim - 1 if side == 0 else 0)


def _schedule(equations: list[Any]) -> tuple[dict[int, tuple[list[int], int]], list[list[int]]]:
    """The bundles of products and an order of execution that has them together.

    A bundle stands under its first member: all members, and the side of the shared factor.
    """
    made = {out: i for i, equation in enumerate(equations) for out in equation.outvars}
    needs = [{made[a] for a in equation.invars if not isinstance(a, Literal) and a in made} for equation in equations]
    groups: dict[Any, list[int]] = {}
    for i, equation in enumerate(equations):
        for side, key in _candidates(equation):
            groups.setdefault((side, key), []).append(i)
    bundles: dict[int, tuple[list[int], int]] = {}
    order = [[i] for i in range(len(equations))]
    for (side, _), members in groups.items():
        members = [i for i in members if not any(i in others for others, _ in bundles.values())]
        if len(members) < 2 or sum(_columns(equations[i], side) for i in members) > _COLUMNS:
            continue
        found = _order(needs, [*(others for others, _ in bundles.values()), members])
        if found is not None:
            bundles[members[0]], order = (members, side), found
    return bundles, order


def _columns(equation: Any, side: int) -> int:
    """The width of the factor that is not shared."""
    return equation.invars[1 - side].aval.shape[1 - equation.params["dimension_numbers"][0][1 - side][0]]


def _order(needs: list[set[int]], bundles: list[list[int]]) -> list[list[int]] | None:
    """The order of execution with these bundles, as close to the given one as can be; None where there is none."""
    head = {i: bundle[0] for bundle in bundles for i in bundle}
    nodes: dict[int, list[int]] = {}
    for i in range(len(needs)):
        nodes.setdefault(head.get(i, i), []).append(i)
    waits = {node: {head.get(j, j) for i in members for j in needs[i]} for node, members in nodes.items()}
    sorter = graphlib.TopologicalSorter(waits)
    try:
        sorter.prepare()
    except graphlib.CycleError:
        return None
    order: list[list[int]] = []
    ready: list[int] = []
    while sorter.is_active():
        for node in sorter.get_ready():
            heapq.heappush(ready, node)
        node = heapq.heappop(ready)
        order.append(nodes[node])
        sorter.done(node)
    return order
