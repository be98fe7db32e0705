"""What decentralised and federated methods share: whom the data belong to, means over agents, where copies lie.

All agents' copies stand along a leading axis; their losses as one are the levels of `problem.levels(key, who)`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bilevel import derivatives
from bilevel._places import put
from bilevel.curvature import spectral_norm
from bilevel.data import Clients
from bilevel.level import Level
from bilevel.problem import Problem, ProblemError
from bilevel.typing import Metrics, PyTree, Scalar


def number_of_agents(problem: Problem, owner: str) -> int | None:
    """How many agents the data are for; None where neither level has data. Errors where the levels disagree."""
    counts = {}
    for name, source in zip(("upper_data", "lower_data"), problem.sources, strict=True):
        if not source.given:
            continue
        if source.parties is None:
            raise ProblemError(
                f"{owner} needs to know whose samples are whose: {name} is one set of arrays for all ({source!r}). "
                "Give data.Agents(arrays) with leading axes (agents, samples), or data.Clients([...])."
            )
        if not source.random and not source.even:
            raise ProblemError(
                f"{owner} with data.Clients of unequal sizes needs a batch size: data.Clients({name}, size=...). Full "
                "batches of unequal lengths cannot be stacked."
            )
        counts[name] = source.parties
    if len(set(counts.values())) > 1:
        raise ProblemError(
            f"The agents' axes differ: upper_data has {counts['upper_data']} agents and lower_data "
            f"{counts['lower_data']}: one data set per agent in each level."
        )
    return next(iter(counts.values()), None)


_FEW = 64
"""The most parties whose losses are written out one after the other."""


def mean_over_parties(problem: Problem) -> Problem | None:
    """The problem whose losses are means over the parties' own, on all samples: where parties of unequal sizes count
    alike. None where they are too many, or their source is wrapped."""
    changed: dict[str, Any] = {}
    for name, source in zip(("upper", "lower"), problem.sources, strict=True):
        if source.even or source.parties is None:
            continue
        if not isinstance(source, Clients) or source.parties > _FEW:
            return None
        edges = (*(int(first) for first in source.offsets), int(source.count or 0))
        changed[name] = functools.partial(_parted, getattr(problem, name), edges)
        changed[f"{name}_data"] = source.arrays
    return dataclasses.replace(problem, **changed) if changed else problem


def _parted(loss: Any, edges: tuple[int, ...], x: PyTree, y: PyTree, batch: PyTree) -> Scalar:
    """The mean over parties, whose samples lie between the edges, of the loss on each one's."""
    parts = [jax.tree.map(lambda a, i=i, j=j: a[i:j], batch) for i, j in itertools.pairwise(edges)]
    return sum((loss(x, y, part) for part in parts[1:]), loss(x, y, parts[0])) / len(parts)


def mean(tree: PyTree) -> PyTree:
    """The mean over agents."""
    return jax.tree.map(lambda a: jnp.mean(a, axis=0), tree)


def measures(value: Any, h: PyTree, G: PyTree) -> Metrics:
    """The upper loss, and the norms of the hypergradient and the lower gradient."""
    return {"upper_loss": value, "hypergradient_norm": derivatives.norm(h), "lower_residual": derivatives.norm(G)}


def traffic(rounds: Any, floats: Any) -> Metrics:
    """How many exchanges there were, and the numbers that they moved."""
    counts = {"communication_rounds": rounds, "communication_floats": floats}
    return {name: jnp.asarray(count, jnp.float32) for name, count in counts.items()}


def spread(tree: PyTree, n: int, problem: Problem, name: str) -> PyTree:
    """n copies along a leading axis, lying where the agents' data lie: sharded as they are, on all processes. A leaf
    that lies over other axes of their mesh keeps to these, in each of its copies.

    Raises:
      ProblemError: a leaf lies over another mesh than the data, or over the axis that the agents lie over.
    """
    sharding = agents_sharding(problem)

    def copies(path: Any, leaf: Any) -> jax.Array:
        many = lambda leaf: jnp.broadcast_to(leaf, (n, *jnp.shape(leaf)))  # noqa: E731
        if sharding is None or isinstance(leaf, jax.core.Tracer):
            return many(leaf)
        own = _axes_of(leaf)
        if own is None:
            return put(np.broadcast_to(np.asarray(leaf), (n, *jnp.shape(leaf))), sharding)
        where = name + jax.tree_util.keystr(path)
        if own.mesh != sharding.mesh:
            raise ProblemError(
                f"The agents' data lie over the mesh {dict(sharding.mesh.shape)} and {where} over another one, "
                f"{dict(own.mesh.shape)}: put both over one mesh of two axes, distributed.mesh(shape={{'agents': .., "
                "'model': ..}), distributed.shard for the data and distributed.place for the variables."
            )
        both = sharding.spec[0]
        if set(_names(both)) & {name for along in own.spec for name in _names(along)}:
            raise ProblemError(
                f"{where} lies over the mesh's axis {both!r}, and so do the agents, each of which has a copy of it: "
                "put variables over another axis of the mesh, or on every device whole."
            )
        return jax.jit(many, out_shardings=NamedSharding(own.mesh, PartitionSpec(both, *own.spec)))(leaf)

    return jax.tree_util.tree_map_with_path(copies, tree)


def _axes_of(leaf: Any) -> NamedSharding | None:
    """How an array lies over a mesh; None where it is whole everywhere."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated else None


def _names(along: Any) -> tuple[str, ...]:
    return () if along is None else (along,) if isinstance(along, str) else tuple(along)


def agents_sharding(problem: Problem) -> NamedSharding | None:
    """How the agents' axis of the data is sharded; None where it is not."""
    for source in problem.sources:
        for leaf in jax.tree.leaves(source.arrays) if source.stacked else ():
            sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and len(sharding.spec) and sharding.spec[0] is not None:
                return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    return None


def traced(*trees: PyTree) -> bool:
    """Whether any leaf is a tracer: values cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def largest_curvature(level: Level, x: PyTree, y: PyTree) -> Scalar:
    """The largest |eigenvalue| of any agent's Hessian in y, of a level that is many, at (x, y) (both stacked)."""
    return jnp.max(spectral_norm(derivatives.linearised(level, x, y).hvp, y, stacked=True))
