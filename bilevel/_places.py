"""Where arrays lie: on one device, or over a mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bilevel.typing import PyTree

__all__ = ["kept", "over_one_mesh", "put"]


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """The array there; of several processes each has the same one."""
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def over_one_mesh(tree: PyTree) -> tuple[PyTree, tuple[NamedSharding | None, ...] | None]:
    """The tree, its leaves that lie on one device put whole on every one of the mesh that others lie over; and where
    each lies then (None: wherever). All on one device: the tree as it is, and None.

    A compiled loop whose state lies elsewhere after a call than before is compiled again for the next one.
    """
    leaves, structure = jax.tree.flatten(tree)
    lie = [leaf.sharding if isinstance(leaf, jax.Array) else None for leaf in leaves]
    over = [place for place in lie if isinstance(place, NamedSharding) and len(place.device_set) > 1]
    if not over or any(kind is not AxisType.Auto for place in over for kind in place.mesh.axis_types):
        return tree, None
    places: list[NamedSharding | None] = []
    for i, (leaf, place) in enumerate(zip(leaves, lie, strict=True)):
        if place is None or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            places.append(None)
            continue
        if len(place.device_set) == 1:
            place = NamedSharding(over[0].mesh, PartitionSpec(), memory_kind=place.memory_kind)
            leaves[i] = put(leaf, place)
        places.append(place if isinstance(place, NamedSharding) else None)
    return jax.tree.unflatten(structure, leaves), tuple(places)


def kept(tree: PyTree, places: tuple[NamedSharding | None, ...] | None) -> PyTree:
    """Within a compiled function: the tree with its leaves there."""
    if places is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    held = [
        leaf if place is None else jax.lax.with_sharding_constraint(leaf, place)
        for leaf, place in zip(leaves, places, strict=True)
    ]
    return jax.tree.unflatten(structure, held)
