"""Discrete architectures: derivation from mixture weights, masks, and the networks that they are."""

from __future__ import annotations

import itertools
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
    normal_counts, reduce_counts: how many of the edges belong to each node; empty where no threshold leaves some out.
    """

    normal: tuple[Gene, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Gene, ...] = ()
    reduce_concat: tuple[int, ...] = ()
    normal_counts: tuple[int, ...] = ()
    reduce_counts: tuple[int, ...] = ()


def _edges_of(cell: CellSpec, node: int) -> list[int]:
    return [e for e, (_, target) in enumerate(cell.edges) if target == node]


def _full(cell: CellSpec, top: int | None) -> tuple[int, ...]:
    """How many edges each node keeps where nothing leaves one out."""
    counts = (len(_edges_of(cell, node)) for node in range(cell.nodes))
    return tuple(count if top is None else min(top, count) for count in counts)


def _derive_cell(
    cell: CellSpec, weights: np.ndarray, top: int | None, threshold: float | None
) -> tuple[tuple[Gene, ...], tuple[int, ...]]:
    genes: list[Gene] = []
    counts: list[int] = []
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
        counts.append(len(kept))
    return tuple(genes), () if tuple(counts) == _full(cell, top) else tuple(counts)


def derive(space: SearchSpace, weights: Mapping[str, Any], *, threshold: float | None = None) -> Genotype:
    """The architecture that the mixture weights point at, by magnitude.

    On each edge the operation of the largest weight, `none` aside (where `space.top` is a number); of each node the
    `space.top` (two) edges whose operation has the largest weight. Where there is no `none` this is RobustDARTS' rule.
    In NAS-Bench-201 every edge stays and `none` is an operation like others.

    Args:
        space: the search space.
        weights: {"normal": (edges, operations), ...}, of `space.weights(alphas)`.
        threshold: FairDARTS' rule, 0.85 there, with sigmoid weights: keep at most two edges a node, and only those
            whose weight exceeds it (a node keeps its best edge in any case, or nothing would follow from it).

    Raises:
        ValueError: weights of other shapes, or without a largest one (NaN).
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
        if not np.isfinite(values).all():
            raise ValueError(f"derive was given weights of the {name} cell with NaN or infinity: no largest one is.")
        found[name] = _derive_cell(cell, values, space.top, threshold)
    reduce, nothing = space.reduce, ((), ())
    (normal, counts), (reducing, reducing_counts) = found["normal"], found.get("reduce", nothing)
    concat = () if reduce is None else reduce.concat
    return Genotype(normal, space.normal.concat, reducing, concat, counts, reducing_counts)


def _located(space: SearchSpace, genotype: Genotype) -> dict[str, list[tuple[int, int]]]:
    """{"normal": [(edge, operation's number)], ...}; an error that names the gene where one does not fit."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, cell in space.cells().items():
        genes: Sequence[Gene] = getattr(genotype, name)
        counts = getattr(genotype, f"{name}_counts") or _full(cell, space.top)
        if len(counts) != cell.nodes or sum(counts) != len(genes) or min(counts, default=0) < 0:
            raise ValueError(
                f"The genotype's {name} cell has {len(genes)} genes, and {space.name} has {cell.nodes} nodes with "
                f"{', '.join(map(str, counts))} of them: genes are (operation, source state), node by node, and where "
                f"nodes keep fewer edges {name}_counts says how many each has."
            )
        rest, places = iter(genes), []
        for node, count in enumerate(counts):
            edges = {cell.edges[e][0]: e for e in _edges_of(cell, node)}
            for operation, source in itertools.islice(rest, count):
                e = edges.pop(source, None)
                if e is None:
                    raise ValueError(
                        f"The genotype's {name} cell does not fit {space.name}: node {node} has no edge from state "
                        f"{source} that is not taken."
                    )
                if operation not in cell.operations[e]:
                    raise ValueError(
                        f"The genotype has {operation} on the edge from state {source} to node {node} of the {name} "
                        f"cell, where {space.name} has {', '.join(cell.operations[e])}."
                    )
                places.append((e, cell.operations[e].index(operation)))
        places.sort()
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
