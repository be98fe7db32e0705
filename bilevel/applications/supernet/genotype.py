"""Discrete architectures: derivation from mixture weights, masks, and the networks that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.supernet.cell import edge_tables
from bilevel.applications.supernet.operations import OPERATIONS
from bilevel.applications.supernet.spaces import CellSpec, SearchSpace

__all__ = ["Genotype", "derive", "discrete", "extract", "mask", "nasbench201_key", "parameter_free"]

Gene = tuple[str, int]


class Genotype(NamedTuple):
    """A discrete architecture in DARTS' notation.

    normal, reduce: (operation, source state) per kept edge, node by node; for NAS-Bench-201 `reduce` is empty.
    normal_concat, reduce_concat: the states that are the cells' output.
    """

    normal: tuple[Gene, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Gene, ...] = ()
    reduce_concat: tuple[int, ...] = ()


def _edges_of(cell: CellSpec, node: int) -> list[int]:
    return [e for e, (_, target) in enumerate(cell.edges) if target == node]


def _derive_cell(cell: CellSpec, weights: np.ndarray, top: int | None, threshold: float | None) -> tuple[Gene, ...]:
    genes: list[Gene] = []
    for node in range(cell.nodes):
        edges = _edges_of(cell, node)
        best = {}
        for e in edges:
            allowed = [o for o, name in enumerate(cell.operations[e]) if name != "none" or top is None]
            best[e] = max(allowed, key=lambda o: weights[e, o])
        strength = {e: weights[e, best[e]] for e in edges}
        kept = edges if top is None else sorted(edges, key=lambda e: -strength[e])[:top]
        if threshold is not None:
            kept = [e for e in kept if strength[e] > threshold] or kept[:1]
        genes += [(cell.operations[e][best[e]], cell.edges[e][0]) for e in sorted(kept)]
    return tuple(genes)


def derive(space: SearchSpace, weights: Mapping[str, Any], *, threshold: float | None = None) -> Genotype:
    """The architecture that the mixture weights point at, by magnitude.

    On each edge the operation of the largest weight, `none` aside; of each node the `space.top` (two) edges whose
    operation has the largest weight. Where there is no `none` this is RobustDARTS' rule. In NAS-Bench-201 every edge
    stays and `none` is an operation like others.

    Args:
        space: the search space.
        weights: {"normal": (edges, operations), ...}, of `space.weights(alphas)`.
        threshold: FairDARTS' rule, 0.85 there, with sigmoid weights: keep at most two edges a node, and only those
            whose weight exceeds it (a node keeps its best edge in any case, or nothing would follow from it).
    """
    found = {}
    for name, cell in space.cells().items():
        values = np.asarray(weights[name], np.float64) if name in weights else None
        if values is None or values.shape != (len(cell.edges), cell.choices):
            got = {k: np.shape(v) for k, v in weights.items()}
            raise ValueError(
                f"derive was given weights {got}; {space.name} needs {name!r} of shape "
                f"{(len(cell.edges), cell.choices)}."
            )
        found[name] = _derive_cell(cell, values, space.top, threshold)
    reduce = space.reduce
    return Genotype(
        found["normal"], space.normal.concat, found.get("reduce", ()), () if reduce is None else reduce.concat
    )


def _located(space: SearchSpace, genotype: Genotype) -> dict[str, list[tuple[int, int]]]:
    """{"normal": [(edge, operation's number)], ...}; an error that names the gene where one does not fit."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, cell in space.cells().items():
        genes: Sequence[Gene] = getattr(genotype, name)
        position = 0
        places: list[tuple[int, int]] = []
        for node in range(cell.nodes):
            edges = _edges_of(cell, node)
            taken = 0
            while position < len(genes) and taken < (space.top or len(edges)):
                operation, source = genes[position]
                match = [e for e in edges if cell.edges[e][0] == source]
                if not match or (places and match[0] <= places[-1][0]):
                    break
                if operation not in cell.operations[match[0]]:
                    raise ValueError(
                        f"The genotype has {operation} on the edge from state {source} to node {node} of the {name} "
                        f"cell, where {space.name} has {', '.join(cell.operations[match[0]])}."
                    )
                places.append((match[0], cell.operations[match[0]].index(operation)))
                position, taken = position + 1, taken + 1
        if position < len(genes) or not places:
            raise ValueError(
                f"The genotype's {name} cell does not fit {space.name}: {len(genes)} genes, of which gene {position} "
                f"({genes[position] if position < len(genes) else 'absent'}) belongs to none of the {cell.nodes} "
                "nodes; genes are (operation, source state), node by node."
            )
        found[name] = places
    return found


def mask(space: SearchSpace, genotype: Genotype) -> dict[str, Array]:
    """The genotype as mixture weights of 0 and 1: the supernet with these is the discrete network.

    Raises:
        ValueError: the genotype does not fit the space.
    """
    masks = {}
    for name, places in _located(space, genotype).items():
        cell = space.cells()[name]
        values = np.zeros((len(cell.edges), cell.choices), np.float32)
        for e, o in places:
            values[e, o] = 1
        masks[name] = jnp.asarray(values, float)
    return masks


def discrete(space: SearchSpace, genotype: Genotype) -> SearchSpace:
    """The genotype as a space of its own with one operation per kept edge.

    `Supernet(discrete(...), affine=True)` is the final network, with pooling not normalised.
    """
    cells: dict[str, CellSpec] = {}
    for name, places in _located(space, genotype).items():
        cell = space.cells()[name]
        cells[name] = CellSpec(
            cell.nodes,
            tuple(cell.edges[e] for e, _ in places),
            tuple((cell.operations[e][o],) for e, o in places),
            cell.concat,
            cell.inputs,
        )
    return space.replace(name=f"a cell of {space.name}", pool_norm=False, **cells)


def extract(
    space: SearchSpace, genotype: Genotype, params: Mapping[str, Any], reductions: Sequence[int]
) -> dict[str, Any]:
    """From a supernet's parameters those of the discrete network (the same `reductions`, no affine norms)."""
    small = discrete(space, genotype)
    located = _located(space, genotype)
    found: dict[str, Any] = {}
    for key, group in params.items():
        if not key.startswith("cell"):
            found[key] = group
            continue
        reduction = int(key.removeprefix("cell")) in reductions
        name = "reduce" if reduction and space.reduce is not None else "normal"
        if space.reduce is None and reduction:
            found[key] = group
            continue
        big_tables = edge_tables(space.cells()[name], reduction)
        small_tables = edge_tables(small.cells()[name], reduction)
        part = {k: v for k, v in group.items() if k.startswith("preprocess")}
        for table, (_, _, edges) in small_tables.items():
            if table in group:
                at = jnp.asarray([big_tables[table][2].index(located[name][e][0]) for e in edges])
                part[table] = jax.tree.map(lambda a, at=at: a[at], dict(group[table]))
        found[key] = part
    return found


def parameter_free(genotype: Genotype) -> float:
    """The share of the genotype's operations that have no parameters: skip connections, pooling, none, noise."""
    genes = (*genotype.normal, *genotype.reduce)
    return sum(OPERATIONS[operation].parameter_free for operation, _ in genes) / len(genes)


_NASBENCH201 = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


def nasbench201_key(genotype: Genotype) -> str:
    """The cell as six digits, the numbers of the operations on edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3."""
    names = [operation for operation, _ in genotype.normal]
    if len(names) != 6 or not set(names) <= set(_NASBENCH201):
        raise ValueError(f"A NAS-Bench-201 cell has six edges with operations of {_NASBENCH201}; this one has {names}.")
    return "".join(str(_NASBENCH201.index(name)) for name in names)
