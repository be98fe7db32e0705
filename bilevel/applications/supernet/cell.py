"""A cell as a function of its parameters and mixture weights.

Edges that carry the same operations are one body, which is compiled once and goes over their stacked parameters: for
large maps edge by edge, so that one edge's maps at a time stay in cache. They are computed again in the backward pass
instead of kept (`remat`), which on CPU costs less time than the memory traffic of keeping them. Small maps are worked
on together, for all edges from one state.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from bilevel.applications.layers.maps import Grid, halved
from bilevel.applications.layers.primitives import align
from bilevel.applications.supernet.operations import (
    OPERATIONS,
    Context,
    Params,
    parameter_shapes,
)
from bilevel.applications.supernet.spaces import CellSpec
from bilevel.derivatives import forward_only

# Edges whose maps together take at most so many bytes are worked on together, their maps kept for the backward pass.
TOGETHER = 2**21

CellParams = Mapping[str, Params]


def label(name: str, stride: int) -> str:
    """The key of an operation's stacked parameters, which have other shapes at stride 2."""
    return name if stride == 1 else f"{name}_stride{stride}"


def edge_tables(cell: CellSpec, reduction: bool) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """{key: (operation, stride, the edges that have it)} of the operations that have parameters or may have.

    The parameters of an operation are stacked over these edges, in this order.
    """
    tables: dict[str, tuple[str, int, tuple[int, ...]]] = {}
    for e, names in enumerate(cell.operations):
        stride = cell.stride(e, reduction)
        for name in names:
            _, _, edges = tables.get(label(name, stride), (name, stride, ()))
            tables[label(name, stride)] = (name, stride, (*edges, e))
    return tables


def cell_shapes(cell: CellSpec, channels: int, *, reduction: bool, affine: bool, auxiliary: bool) -> dict[str, Any]:
    """{key: {parameter: ((edges, ...), fan in)}} of a cell's operations."""
    found: dict[str, Any] = {}
    for key, (name, stride, edges) in edge_tables(cell, reduction).items():
        shapes = parameter_shapes(name, channels, stride, affine)
        if shapes:
            found[key] = {k: ((len(edges), *shape), fan_in) for k, (shape, fan_in) in shapes.items()}
    strided = sum(cell.stride(e, reduction) == 2 for e in range(len(cell.edges)))
    if auxiliary and strided:
        shapes = parameter_shapes("skip_connect", channels, 2, affine=False)
        found["auxiliary"] = {k: ((strided, *shape), fan_in) for k, (shape, fan_in) in shapes.items()}
    return found


def _chains(cell: CellSpec, reduction: bool) -> list[list[tuple[int, ...]]]:
    """The edges by their source, in groups of equal operations; groups in a row that are alike are one chain.

    States that no edge reaches are left out, with the edges from them.
    """
    by_source: dict[int, dict[tuple[str, ...], tuple[int, ...]]] = {}
    reached = set(range(cell.inputs))
    for source in range(cell.states):
        for e, (start, node) in enumerate(cell.edges):
            if start == source in reached:
                groups, names = by_source.setdefault(source, {}), cell.operations[e]
                groups[names] = (*groups.get(names, ()), e)
                reached.add(cell.inputs + node)
    alike = lambda item: (item[0], cell.stride(item[1][0], reduction))  # noqa: E731
    items = (item for groups in by_source.values() for item in groups.items())
    return [[edges for _, edges in chain] for _, chain in itertools.groupby(items, alike)]


def run_cell(
    cell: CellSpec,
    params: CellParams,
    inputs: tuple[Array, ...],
    weights: Array,
    *,
    grid: Grid,
    reduction: bool,
    pool_norm: bool,
    keep: Array | None,
    key: Array | None,
    beta: Array | None,
    remat: bool,
) -> Array:
    """The cell's output from its (preprocessed) inputs.

        node_j = sum over edges e = (i, j) of  keep_e / p * ( beta x_i + sum over operations o of weights_eo o(x_i) )

    Args:
        cell: the graph.
        params: as `cell_shapes` describes them.
        inputs: flat maps (channels, rows x columns x batch).
        weights: (edges, operations).
        grid: (rows, columns) of the inputs.
        reduction: whether edges from the inputs have stride 2.
        pool_norm: see `SearchSpace`.
        keep: (edges, batch), what drop-path multiplies each edge's output by; None: nothing.
        key: for `noise`.
        beta: weight of DARTS-'s auxiliary skip connection; None: there is none.
        remat: recompute an edge's maps in the backward pass.

    Returns:
        (channels x concatenated states, rows' x columns' x batch).
    """
    tables = edge_tables(cell, reduction)
    strided = [e for e in range(len(cell.edges)) if cell.stride(e, reduction) == 2]
    states: list[Any] = [*inputs, *[None] * cell.nodes]
    inner_grid = halved(grid) if reduction else grid
    if keep is not None:  # a sample's factor at each of its pixels
        keep = jnp.tile(keep, (1, inner_grid[0] * inner_grid[1]))
    keys = None if key is None else jax.random.split(key, len(cell.edges))

    def body_of(alike: Sequence[int]) -> Any:
        """(the mixed operation of edges with equal operations, their parameters and the like, stacked)."""
        first, edges = alike[0], np.asarray(alike)
        names, stride = cell.operations[first], cell.stride(first, reduction)
        here = grid if cell.edges[first][0] < cell.inputs else inner_grid
        own: dict[str, Any] = {
            n: _rows(params.get(label(n, stride), {}), tables[label(n, stride)][2], edges) for n in names
        }
        if beta is not None:
            own["auxiliary"] = _rows(params.get("auxiliary", {}) if stride == 2 else {}, strided, edges)
            own["auxiliary_weight"] = jnp.broadcast_to(beta, edges.shape)

        def mixed(x: Array, mine: Any) -> Array:
            p, w, kept, k = mine
            total: Any = 0
            for o, name in enumerate(names):
                if name != "none":
                    context = Context(here, stride, pool_norm, k, w[o])
                    total = total + OPERATIONS[name].apply(x, p[name], context)
            if beta is not None:
                context = Context(here, stride, pool_norm, weight=p["auxiliary_weight"])
                total = total + OPERATIONS["skip_connect"].apply(x, p["auxiliary"], context)
            if isinstance(total, int):  # `none` alone
                total = OPERATIONS["none"].apply(x, {}, Context(here, stride, pool_norm))
            return total if kept is None else total * kept

        each = (own, weights[edges], None if keep is None else keep[edges], None if keys is None else keys[edges])
        return mixed, each

    def add(edge: int, map_: Array) -> None:
        target = cell.inputs + cell.edges[edge][1]
        states[target] = map_ if states[target] is None else states[target] + map_

    for chain in _chains(cell, reduction):
        sources = [cell.edges[edges[0]][0] for edges in chain]
        if not remat or max(map(len, chain)) * states[sources[0]].nbytes <= TOGETHER:
            for source, edges in zip(sources, chain, strict=True):
                mixed, each = body_of(edges)
                for edge, map_ in zip(edges, jax.vmap(mixed, in_axes=(None, 0))(states[source], each), strict=True):
                    add(edge, map_)
            continue
        _one_by_one(cell, chain, states, *body_of([e for edges in chain for e in edges]))
    outputs = [states[i] for i in cell.concat]
    reached = next(x for x in outputs if x is not None)
    outputs = [jnp.zeros_like(reached) if x is None else x for x in outputs]
    return jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _one_by_one(cell: CellSpec, chain: list[tuple[int, ...]], states: list[Any], body: Any, each: Any) -> None:
    """Add what a chain's edges bring to `states`, one after the other: one body, compiled once."""
    sources = [cell.edges[edges[0]][0] for edges in chain]
    targets = [cell.inputs + cell.edges[e][1] for edges in chain for e in edges]
    x = states[sources[0]]
    made = jax.eval_shape(body, x, jax.tree.map(lambda a: a[0], each))
    # A reduction's inputs are of another side: they are read alone, and nothing is added to them.
    apart = made.shape != x.shape
    held = sorted({*targets} if apart else {*sources, *targets})
    read = sources if apart else held
    zeros = align(jnp.zeros(made.shape, made.dtype), x)[0]
    start = jnp.stack([zeros if states[i] is None else states[i] for i in held])
    given = jnp.stack([states[i] for i in sources]) if apart else None
    last = np.cumsum([len(edges) for edges in chain], dtype=np.int32)
    order = _Order(
        np.asarray([read.index(i) for i in sources], np.int32),
        np.append(np.int32(0), last[:-1]),
        last,
        np.asarray([held.index(i) for i in targets], np.int32),
    )
    for i, map_ in zip(held, _in_turn(body, order, given, start, each), strict=True):
        states[i] = map_


class _Order(NamedTuple):
    """Which map each source is, its first edge and the one behind its last, and which map each edge is added to."""

    source: np.ndarray
    first: np.ndarray
    last: np.ndarray
    target: np.ndarray

    def by_source(self) -> tuple[np.ndarray, ...]:
        return self.source, self.first, self.last


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _put(tree: Any, i: Array, values: Any) -> Any:
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, i, 0), tree, values)


def _in_turn(body: Any, order: _Order, given: Array | None, start: Array, each: Any) -> Array:
    """For each source and then for each of its edges e: maps[target[e]] += body((maps or given)[source], each[e]).

    From maps = start. The derivative goes back over the edges, each computed again from its source's map. It is written
    out because that of a scan which carries the maps would keep and add up all of them at each edge; and with loops of
    as many rounds as a source has edges, so that XLA makes once what its edges share.
    """

    def run(given: Array | None, start: Array, each: Any) -> Array:
        def from_source(maps: Array, now: Any) -> tuple[Array, None]:
            source, first, last = now
            x = _at(maps if given is None else given, source)

            def along(e: Array, maps: Array) -> Array:
                target = _at(order.target, e)
                return _put(maps, target, _at(maps, target) + body(x, _at(each, e)))

            return lax.fori_loop(first, last, along, maps), None

        return lax.scan(from_source, start, order.by_source())[0]

    def forward(given: Any, start: Any, each: Any) -> Any:
        wanted = _Wanted(tuple(leaf.perturbed for leaf in jax.tree.leaves(each[:3])))
        given, start, each = jax.tree.map(lambda leaf: leaf.value, (given, start, each))
        maps = run(given, start, each)
        return maps, (maps if given is None else given, each, wanted)  # a source is as it was read at the end, too

    def backward(kept: Any, ct: Any) -> Any:
        seen, (own, weights, keep, keys), wanted = kept
        ct = jnp.zeros(ct.shape, ct.dtype) if isinstance(ct, SymbolicZero) else ct
        leaves, treedef = jax.tree.flatten((own, weights, keep))
        free = [leaf for leaf, yes in zip(leaves, wanted.leaves, strict=True) if yes]

        fixed = [leaf for leaf, yes in zip(leaves, wanted.leaves, strict=True) if not yes]

        def whole(some: list[Any], others: list[Any]) -> Any:
            wants, has = iter(some), iter(others)
            return jax.tree.unflatten(treedef, [next(wants if yes else has) for yes in wanted.leaves])

        def from_source(carry: Any, now: Any) -> tuple[Any, None]:
            (total, found), (source, first, last) = carry, now
            x, above = _at(seen, source), total if given is None else ct

            def along(k: Array, carry: Any) -> Any:
                to_x, found = carry
                e = first + last - 1 - k
                others, key = _at((fixed, keys), e)
                _, back = jax.vjp(lambda x, some: body(x, (*whole(some, others), key)), x, _at(free, e))
                here = back(_at(above, _at(order.target, e)))
                return to_x + here[0], _put(found, e, here[1])

            to_x, found = lax.fori_loop(first, last, along, (_at(total, source), found))
            return (_put(total, source, to_x), found), None

        begin = ct if given is None else align(jnp.zeros_like(seen), ct)[0], jax.tree.map(jnp.zeros_like, free)
        (total, found), _ = lax.scan(from_source, begin, order.by_source(), reverse=True)
        to_maps = (None, total) if given is None else (total, ct)
        to_each = *whole(found, jax.tree.map(jnp.zeros_like, fixed)), None
        return forward_only((*to_maps, to_each), _NO_REVERSE)

    turns = jax.custom_vjp(run)
    turns.defvjp(forward, backward, symbolic_zeros=True)
    return turns(given, start, each)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which leaves of what the edges have need a cotangent."""

    leaves: tuple[bool, ...]


_NO_REVERSE = (
    "The gradient of a Supernet with maps of this size (over 2 MiB for the edges from one state) has no derivative in "
    "reverse mode: take products in mixed mode, jax.jvp(jax.grad(loss), ...), as the hypergradients do, or keep the "
    "maps with Supernet(remat=False)."
)


def _rows(params: Params, held: Any, edges: Any) -> dict[str, Array]:
    """The parameters of these edges, of those stacked over the edges `held`."""
    at = np.asarray([list(held).index(e) for e in edges]) if params else None
    return {name: value[at] for name, value in params.items()}
