"""Selection by perturbation (DARTS-PT): an operation is as good as the network is bad without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bilevel.applications.supernet.genotype import Genotype
from bilevel.applications.supernet.spaces import SearchSpace

__all__ = ["perturbation_select"]

Weights = dict[str, np.ndarray]


def perturbation_select(
    space: SearchSpace,
    weights: Mapping[str, Any],
    evaluate: Callable[[Weights], Any],
    *,
    fine_tune: Callable[[Weights], Any] | None = None,
    seed: int = 0,
) -> Genotype:
    """Decide the architecture edge by edge, by what the network loses.

        for each edge, in random order:   keep argmin over o of evaluate(weights with w_eo = 0); set the edge to it
        for each node, in random order:   keep the `space.top` edges e with the lowest evaluate(weights with w_e = 0)

    `none` is never kept, but in NAS-Bench-201, where it is an operation like others. Weights are not renormalised when
    one is removed, as in the authors' code.

    Args:
        space: the search space.
        weights: the mixtures that the search ended in, {"normal": (edges, operations), ...}.
        evaluate: `weights -> validation accuracy` of the supernet with these mixtures; one call per operation and edge.
        fine_tune: called with the weights after each decision, to train the supernet on with them (five epochs in the
            paper); `evaluate` is expected to see the result. None: no fine-tuning.
        seed: of the order.

    Raises:
        ValueError: `evaluate` returned a NaN or an infinity.

    Reference: Wang, Cheng, Chen, Tang, Hsieh, "Rethinking Architecture Selection in Differentiable NAS", ICLR 2021.
    """
    cells = space.cells()
    now = {name: np.array(weights[name], np.float32) for name in cells}
    random = np.random.default_rng(seed)
    chosen: dict[tuple[str, int], int] = {}

    def without(name: str, e: int, o: Any) -> float:
        changed = {n: w.copy() for n, w in now.items()}
        changed[name][e, o] = 0
        found = float(evaluate(changed))
        if not np.isfinite(found):
            raise ValueError(
                f"perturbation_select: evaluate returned {found} with an operation of edge {e} of the {name} cell "
                "taken out; it is to return the supernet's accuracy, a finite number."
            )
        return found

    edges = [(name, e) for name, cell in cells.items() for e in range(len(cell.edges))]
    for i in random.permutation(len(edges)):
        name, e = edges[i]
        names = cells[name].operations[e]
        candidates = [o for o, operation in enumerate(names) if operation != "none" or space.top is None]
        best = min(candidates, key=lambda o: without(name, e, o))
        chosen[name, e] = best
        now[name][e] = np.eye(len(names), dtype=np.float32)[best]
        if fine_tune is not None:
            fine_tune(now)

    nodes = [(name, j) for name, cell in cells.items() for j in range(cell.nodes)] if space.top is not None else []
    for i in random.permutation(len(nodes)):
        name, node = nodes[i]
        left = [e for e, (_, target) in enumerate(cells[name].edges) if target == node]
        crowded = len(left) > space.top  # type: ignore[operator]
        losses = {e: without(name, e, slice(None)) for e in left} if crowded else {}
        for e in sorted(losses, key=losses.__getitem__)[space.top :]:
            now[name][e] = 0
        if losses and fine_tune is not None:
            fine_tune(now)

    found = {}
    for name, cell in cells.items():
        kept = [e for e in range(len(cell.edges)) if now[name][e].any()]
        found[name] = tuple((cell.operations[e][chosen[name, e]], cell.edges[e][0]) for e in kept)
    reduce = space.reduce
    concat = () if reduce is None else reduce.concat
    return Genotype(found["normal"], space.normal.concat, found.get("reduce", ()), concat)
