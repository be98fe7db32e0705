"""What decentralised and federated methods share: whom the data belong to, means over agents, where copies lie.

All agents' copies stand along a leading axis; their losses as one are the levels of `problem.levels(key, who)`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bilevel import derivatives
from bilevel.curvature import spectral_norm
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


def spread(tree: PyTree, n: int, problem: Problem) -> PyTree:
    """n copies along a leading axis, lying where the agents' data lie: sharded as they are, on all processes."""
    sharding = agents_sharding(problem)

    def copies(leaf: Any) -> jax.Array:
        many = jnp.broadcast_to(leaf, (n, *jnp.shape(leaf)))
        if sharding is None or isinstance(leaf, jax.core.Tracer):
            return many
        host = np.broadcast_to(np.asarray(leaf), many.shape)
        return jax.make_array_from_callback(many.shape, sharding, lambda index: host[index])

    return jax.tree.map(copies, tree)


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
