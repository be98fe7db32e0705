"""A cell as a function of its parameters and mixture weights.

Edges that read the same state and carry the same operations are one body, scanned over their stacked parameters: it is
compiled once, and one edge's maps at a time stay in cache. With `remat` a body's maps are computed again in the
backward pass instead of kept, which on CPU costs less time than the memory traffic of keeping them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.layers.maps import Grid, halved
from bilevel.applications.supernet.operations import (
    OPERATIONS,
    Context,
    Params,
    parameter_shapes,
)
from bilevel.applications.supernet.spaces import CellSpec

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


def _groups(cell: CellSpec, reduction: bool) -> list[list[tuple[int, ...]]]:
    """For each state, its outgoing edges in groups of equal operations (and equal stride, which is the state's)."""
    groups: list[list[tuple[int, ...]]] = []
    for state in range(cell.states):
        by_operations: dict[tuple[str, ...], tuple[int, ...]] = {}
        for e, (source, _) in enumerate(cell.edges):
            if source == state:
                by_operations[cell.operations[e]] = (*by_operations.get(cell.operations[e], ()), e)
        groups.append(list(by_operations.values()))
    return groups


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

    def body_of(edges: np.ndarray) -> Any:
        """(the mixed operation of edges with equal operations, their parameters and the like, stacked)."""
        first = int(edges[0])
        names, stride = cell.operations[first], cell.stride(first, reduction)
        here = grid if cell.edges[first][0] < cell.inputs else inner_grid
        own = {n: _rows(params.get(label(n, stride), {}), tables[label(n, stride)][2], edges) for n in names}
        if beta is not None:
            own["auxiliary"] = _rows(params.get("auxiliary", {}) if stride == 2 else {}, strided, edges)

        def mixed(x: Array, mine: Any) -> Array:
            p, w, kept, k = mine
            total: Any = 0
            for o, name in enumerate(names):
                if name != "none":
                    context = Context(here, stride, pool_norm, k, w[o])
                    total = total + OPERATIONS[name].apply(x, p[name], context)
            if beta is not None:
                context = Context(here, stride, pool_norm, weight=beta)
                total = total + OPERATIONS["skip_connect"].apply(x, p["auxiliary"], context)
            if isinstance(total, int):  # `none` alone
                total = OPERATIONS["none"].apply(x, {}, Context(here, stride, pool_norm))
            return total if kept is None else total * kept

        each = (own, weights[edges], None if keep is None else keep[edges], None if keys is None else keys[edges])
        return mixed, each

    for state, groups in enumerate(_groups(cell, reduction)):
        x = states[state]
        if x is None:  # a node that nothing reaches
            continue
        for edges in map(np.asarray, groups):
            mixed, each = body_of(edges)
            targets = [cell.inputs + cell.edges[e][1] for e in edges]
            if len(edges) * x.size * x.dtype.itemsize <= TOGETHER:
                brought = jax.vmap(mixed, in_axes=(None, 0))(x, each)
                for target, map_ in zip(targets, brought, strict=True):
                    states[target] = map_ if states[target] is None else states[target] + map_
                continue
            # Inside a scan nothing can undo the recomputation, so no barrier is needed to protect it.
            body = jax.checkpoint(mixed, prevent_cse=len(edges) == 1) if remat else mixed
            if len(edges) == 1:
                map_ = body(x, jax.tree.map(lambda a: a[0], each))
                states[targets[0]] = map_ if states[targets[0]] is None else states[targets[0]] + map_
                continue
            brought = jax.lax.map(lambda mine, x=x, body=body: body(x, mine), each)
            for i, target in enumerate(targets):
                states[target] = brought[i] if states[target] is None else states[target] + brought[i]
    outputs = [states[i] for i in cell.concat]
    reached = next(x for x in outputs if x is not None)
    outputs = [jnp.zeros_like(reached) if x is None else x for x in outputs]
    return jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _rows(params: Params, held: Any, edges: Any) -> dict[str, Array]:
    """The parameters of these edges, of those stacked over the edges `held`."""
    at = np.asarray([list(held).index(e) for e in edges]) if params else None
    return {name: value[at] for name, value in params.items()}
