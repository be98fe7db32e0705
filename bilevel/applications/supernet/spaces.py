"""Search spaces: which operations may stand on which edge of a cell; architecture weights and their transforms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.supernet.operations import OPERATIONS

__all__ = ["NASBENCH201", "S1", "S2", "S3", "S4", "S5", "CellSpec", "SearchSpace", "darts_space", "full_edges"]

Transform = Literal["softmax", "sigmoid"]


def full_edges(nodes: int, inputs: int = 2) -> tuple[tuple[int, int], ...]:
    """All edges (source state, node) of a cell, node by node: node j reads the inputs and nodes 0..j-1."""
    return tuple((i, j) for j in range(nodes) for i in range(inputs + j))


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """A cell: a graph whose edges carry one or more operations.

    States 0..inputs-1 are the inputs, state inputs + j is node j, the sum of what its edges bring. The cell's output is
    the concatenation of some states along the channels.

    Attributes:
      nodes: how many.
      edges: (source state, node), node by node.
      operations: for each edge the names of its operations, the same number on every edge.
      concat: the states of the output.
      inputs: 2 (DARTS: the two cells before) or 1 (NAS-Bench-201).
    """

    nodes: int
    edges: tuple[tuple[int, int], ...]
    operations: tuple[tuple[str, ...], ...]
    concat: tuple[int, ...]
    inputs: int = 2

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.operations):
            raise ValueError(
                f"The cell has {len(self.edges)} edges and lists of operations for {len(self.operations)}: give one "
                "list per edge, node by node."
            )
        unknown = sorted({name for names in self.operations for name in names} - set(OPERATIONS))
        if unknown:
            raise ValueError(f"Unknown operations {', '.join(unknown)}; there are {', '.join(OPERATIONS)}.")
        if len({len(names) for names in self.operations}) > 1 or not all(self.operations):
            raise ValueError(
                f"The edges have {[len(names) for names in self.operations]} operations; give each edge equally many, "
                "at least one (`none` can fill up)."
            )
        order = [node for _, node in self.edges]
        if order != sorted(order) or any(not 0 <= i < self.inputs + j < self.states for i, j in self.edges):
            raise ValueError(
                f"edges={self.edges}: an edge is (source state, node) with the source before the node, and edges come "
                "node by node."
            )

    @property
    def states(self) -> int:
        """Inputs and nodes together."""
        return self.inputs + self.nodes

    @property
    def choices(self) -> int:
        """Operations per edge."""
        return len(self.operations[0])

    def stride(self, edge: int, reduction: bool) -> int:
        """2 on the edges from a reduction cell's inputs, 1 elsewhere."""
        return 2 if reduction and self.edges[edge][0] < self.inputs else 1


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """A normal cell and, where there is one, a reduction cell, with the way from architecture weights to mixtures.

    Attributes:
      name: for messages and figures.
      normal, reduce: the cells; `reduce=None` for NAS-Bench-201, whose reduction blocks are fixed.
      top: edges that a node keeps in the discrete cell; None: all of them (NAS-Bench-201).
      transform: "softmax" over an edge's operations (DARTS), or "sigmoid" of each (FairDARTS).
      pool_norm: normalise after pooling, as DARTS does in its search and not in its final network.
    """

    name: str
    normal: CellSpec
    reduce: CellSpec | None = None
    top: int | None = 2
    transform: Transform = "softmax"
    pool_norm: bool = True

    def cells(self) -> dict[str, CellSpec]:
        """{"normal": ..., "reduce": ...}, the keys that alphas, weights and masks have."""
        return {"normal": self.normal} | ({} if self.reduce is None else {"reduce": self.reduce})

    def alphas(self, seed: int = 0, deviation: float = 1e-3) -> dict[str, Array]:
        """Where a search starts: {"normal": (edges, operations), ...}, normal numbers of deviation 1e-3 (DARTS)."""
        generator = np.random.default_rng(seed)
        return {
            name: jnp.asarray(deviation * generator.standard_normal((len(cell.edges), cell.choices)), float)
            for name, cell in self.cells().items()
        }

    def weights(self, alphas: Mapping[str, Array]) -> dict[str, Array]:
        """The mixture weights that the network takes: the transform of the architecture weights, edge by edge."""
        if self.transform == "sigmoid":
            return {name: jax.nn.sigmoid(a) for name, a in alphas.items()}
        return {name: jax.nn.softmax(a, axis=-1) for name, a in alphas.items()}

    def replace(self, **changes: Any) -> SearchSpace:
        """The space with some attributes changed, e.g. `S2.replace(transform="sigmoid")`."""
        return dataclasses.replace(self, **changes)


def _cell(operations: Any, nodes: int) -> CellSpec:
    edges = full_edges(nodes)
    lists = tuple(operations) if not isinstance(operations[0], str) else (tuple(operations),) * len(edges)
    return CellSpec(nodes, edges, tuple(tuple(names) for names in lists), tuple(range(2, 2 + nodes)))


def darts_space(name: str, operations: Any, reduce: Any = None, *, nodes: int = 4, **options: Any) -> SearchSpace:
    """A space on DARTS' cell, two inputs and `nodes` nodes, of which each reads all states before it.

    Args:
        name: for messages and figures.
        operations: names, the same on every edge; or one list of names per edge, node by node.
        reduce: the same for the reduction cell; by default as `operations`.
        nodes: 4 in the papers: 14 edges; 2 make 5 edges.
        options: `top`, `transform`, `pool_norm` of `SearchSpace`.
    """
    return SearchSpace(name, _cell(operations, nodes), _cell(reduce or operations, nodes), **options)


_SHORT = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}


def _pairs(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(_SHORT[name] for name in pair.split("+")) for pair in text.split())


S1 = darts_space(
    "S1",
    _pairs(
        "skip+dil3 skip+dil5 skip+dil5 skip+sep3 skip+dil3 max+skip skip+sep3 "
        "skip+sep3 skip+dil3 skip+sep3 max+skip skip+dil3 dil3+dil5 dil3+dil5"
    ),
    _pairs(
        "max+avg max+dil3 max+avg max+avg skip+dil5 max+avg max+sep3 "
        "skip+dil3 skip+dil5 max+avg max+avg skip+dil5 skip+dil5 skip+dil5"
    ),
)
"""Two operations per edge, others on each (Zela et al., ICLR 2020)."""

S2 = darts_space("S2", ("skip_connect", "sep_conv_3x3"))
"""Skip connection or separable convolution (Zela et al.)."""

S3 = darts_space("S3", ("none", "skip_connect", "sep_conv_3x3"))
"""S2 and `none` (Zela et al.)."""

S4 = darts_space("S4", ("noise", "sep_conv_3x3"))
"""Noise or separable convolution (Zela et al.)."""

S5 = darts_space(
    "S5",
    (
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    ),
)
"""DARTS' own eight operations (Liu, Simonyan, Yang, ICLR 2019)."""

NASBENCH201 = SearchSpace(
    "NAS-Bench-201",
    CellSpec(
        nodes=3,
        edges=full_edges(3, inputs=1),
        operations=(("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"),) * 6,
        concat=(3,),
        inputs=1,
    ),
    top=None,
    pool_norm=False,
)
"""Four nodes, six edges, five operations (Dong, Yang, "NAS-Bench-201", ICLR 2020)."""
