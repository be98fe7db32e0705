"""What all adapters of network libraries give: a pure function of the parameters, honest about randomness and state.

A module of a library holds three things that a loss must not mix up: what is trained, random state (dropout), and
running state (the statistics of batch normalisation). Here the first is the argument, the second comes with a key, and
the third is `apply.state`: read only where somebody has computed it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Path = tuple[Any, ...]


def names(path: Any) -> Path:
    """The names along a leaf's path: dictionary keys, attributes and places in lists."""
    return tuple(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)


def to_dictionary(tree: Any, names: Callable[[Any], Path] = names) -> dict[Any, Any]:
    """The leaves of a tree in nested dictionaries by the names along their paths."""
    return nested({names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]})


def nested(leaves: dict[Path, Any]) -> dict[Any, Any]:
    """Nested dictionaries of leaves by their paths."""
    root: dict[Any, Any] = {}
    for (*parents, last), leaf in leaves.items():
        node = root
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return root


def from_dictionary(like: Any, values: dict[Any, Any], names: Callable[[Any], Path] = names) -> Any:
    """A tree of this structure with its leaves from `to_dictionary`'s form.

    Raises:
        KeyError: one is missing; the message names it.
        TypeError: they are no dictionary.
    """
    if not isinstance(values, dict):
        raise TypeError(
            f"The parameters are a {type(values).__name__}, and not the dictionary that came with the function: "
            "apply(params, inputs), the parameters first."
        )
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, _ in paths:
        node: Any = values
        for name in names(path):
            if not isinstance(node, dict) or name not in node:
                raise KeyError(f"The parameters lack {'.'.join(map(str, names(path)))}, which this module has.")
            node = node[name]
        leaves.append(node)
    return treedef.unflatten(leaves)  # type: ignore[attr-defined]


def flat(tree: dict[Any, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested dictionaries by their paths."""
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from flat(node, (*path, name))
        else:
            yield (*path, name), node


def put(tree: Any, leaves: dict[Path, Any], path: Path = ()) -> Any:
    """Nested dictionaries with other leaves at these paths."""
    if isinstance(tree, dict):
        return {name: put(node, leaves, (*path, name)) for name, node in tree.items()}
    return leaves.get(path, tree)


def is_statistic(path: Path) -> bool:
    """Whether a leaf of this name is a running mean or variance."""
    return any(part in str(path[-1]) for part in ("mean", "var"))


def untouched(statistics: dict[Path, Any]) -> frozenset[Path]:
    """Those that still are as modules begin, means of 0 and variances of 1 throughout."""
    known = {path: a for path, a in statistics.items() if not isinstance(a, jax.core.Tracer)}
    return frozenset(path for path, a in known.items() if np.all(np.asarray(a) == 0) or np.all(np.asarray(a) == 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """A module as a pure function of its parameters: `apply(params, *args, key=None, **kwargs)`.

    Attributes:
        state: what is neither trained nor random (running statistics), as a pytree.
        stale: names of running statistics in `state` that nobody has computed yet.
    """

    state: Any
    stale: frozenset[Path]

    # Whether the library hides from derivatives how statistics depend on the parameters.
    cuts_derivatives: ClassVar[bool] = False

    def run(self, params: Any, state: Any, key: Any, args: Any, kwargs: Any) -> tuple[Any, Any, list[str]]:
        """The library's call: the output, the state afterwards, and the random streams drawn from without a key."""
        raise NotImplementedError

    def statistics(self, state: Any) -> dict[Path, Any]:
        """The running means and variances of a state, by name."""
        return {path: leaf for path, leaf in flat(state) if is_statistic(path)}

    def put(self, state: Any, statistics: dict[Path, Any]) -> Any:
        """A state with these running means and variances."""
        return put(state, statistics)

    def train(self) -> Any:
        """The module in training mode: dropout drops, batch normalisation takes the batch's statistics."""
        raise NotImplementedError

    def eval(self) -> Any:
        """The module in evaluation mode: no dropout, running statistics."""
        raise NotImplementedError

    def by_batch(self) -> Any:
        """The module without dropout that normalises by the batch's own statistics: for a validation loss."""
        raise NotImplementedError

    def calibrating(self) -> Any:
        """The module as `calibrated` runs it."""
        return self.by_batch()

    def calibrated_for_use(self) -> Any:
        """The module as `calibrated` returns it."""
        return self

    def holding(self, state: Any) -> Any:
        """The same function with this state, of `with_state` or of a file, as its own."""
        return dataclasses.replace(self, state=state, stale=frozenset())

    def with_state(self, params: Any, state: Any, *args: Any, key: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """`(module(*args, **kwargs), new state)` with these parameters and this state; `key` as in a call.

        Raises:
            ValueError: the module drew random numbers, and there is no key.
        """
        output, after, drawn = self.run(params, state, key, args, kwargs)
        if drawn:
            raise ValueError(
                f"The module draws random numbers ({', '.join(map(str, drawn))}), and apply was given no key: each "
                "call would repeat the same ones. Give apply(params, ..., key=key): in a loss the key comes with "
                "the batch of data.Keyed(...). Or switch dropout off: apply.eval(), or the module's own flag."
            )
        return output, after

    def __call__(self, params: Any, *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """`module(*args, **kwargs)` with these parameters; changes of the state are dropped.

        Args:
            params: the parameters.
            args, kwargs: of the module.
            key: for modules that draw random numbers: a `jax.random` key, a `data.StepKey` or a seed. Equal keys give
                equal masks. Where a module holds no random state of its own, `key` is passed on to it.

        Raises:
            ValueError: random numbers were drawn without a key; running statistics were read that nobody has computed;
                or the module keeps a memory of its own, which a pure call cannot carry on.
        """
        output, after = self.with_state(params, self.state, *args, key=key, **kwargs)
        if self.stale:
            now = self.statistics(after)
            before = self.statistics(self.state)
            read = [path for path in sorted(self.stale, key=str) if now.get(path) is before[path]]
            if read:
                raise ValueError(
                    f"The module normalises by running statistics ({_dotted(read[0])} and "
                    f"{len(read) - 1} more) that are still those it was made with, 0 and 1: nobody has computed them. "
                    "Take the data's, calibrated(apply, params, inputs)(params, ...), or normalise by the batch "
                    "(apply.train(), or the module's own flag), or, where 0 and 1 are meant, apply.holding(state)."
                )
        memory = self.memory(after)
        if memory:
            raise ValueError(
                f"The module changes {_dotted(memory[0])} in every call, and apply(params, ...) drops changes: the "
                "next call would begin as this one did. Carry the state: output, state = apply.with_state(params, "
                "state, ...)."
            )
        return output

    def memory(self, after: Any) -> list[Path]:
        """Names of what a call changed that is neither random nor a statistic."""
        return []


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def calibrated(apply: Any, params: PyTree, *inputs: Any, chunks: int = 1, key: Any = None, **options: Any) -> Any:
    """The network for use: its running statistics are those that these parameters have on these inputs.

        fixed = calibrated(apply, params, images)
        logits = fixed(params, new_images)

    They are recomputed, not carried along: a function of (params, inputs) without a memory, whatever the module's
    momentum, under `jit` too. The module is called on the inputs in training mode without dropout; one exponential mean
    is told from the other's start by two calls. Linen's and Equinox' can be differentiated, statistics included; nnx
    cuts their derivative, and one that would miss them is refused: a loss there takes `apply.by_batch()`.

    Args:
        apply: from `from_nnx`, `from_linen` or `from_equinox`.
        params: the parameters.
        inputs: what the module is called with, arrays with a leading axis of samples.
        chunks: how many pieces the samples are cut into, where one pass of all does not fit. With one, every layer's
            statistics are those of the data; with more, they are those of the data for the inputs that layers get
            when each piece is normalised by its own.
        key: for modules that draw random numbers here all the same.
        options: of the call, such as `use_running_average=False` or `train=True` of a module that takes it there (a
            linen module must).

    Returns:
        An `Apply` in evaluation mode, whose `state` are the statistics. A module that takes its mode in the call is
        called with it: `fixed(params, x, train=False)`.

    Raises:
        ValueError: the module has no running statistics, or did not update them.
    """
    if not isinstance(apply, Apply):
        raise TypeError(
            "calibrated takes the function first and the parameters second, calibrated(apply, params, inputs), and was "
            f"given a {type(apply).__name__} as apply: it is what from_nnx, from_linen or from_equinox returns."
        )
    if not jax.tree.leaves(inputs):
        raise TypeError(
            "calibrated(apply, params, inputs) needs the inputs whose statistics are meant, such as images."
        )
    training = apply.calibrating()
    start = training.statistics(apply.state)
    if not start:
        raise ValueError(
            "calibrated: the module has no running statistics (no leaf named mean or var). Call it as it is."
        )
    count = len(jax.tree.leaves(inputs)[0])
    if not 1 <= chunks <= count:
        raise ValueError(f"calibrated(chunks={chunks}): the inputs have {count} samples; cut them into 1 to {count}.")
    ends = np.linspace(0, count, chunks + 1).astype(int)
    pieces = [jax.tree.map(lambda a, i=i, j=j: a[i:j], inputs) for i, j in itertools.pairwise(ends)]
    found = [_of_batch(training, params, start, piece, key, options) for piece in pieces]
    shares = np.diff(ends) / count
    pooled = found[0] if chunks == 1 else {path: _pooled(path, found, shares) for path in start}
    if apply.cuts_derivatives:
        pooled = _constant(pooled, params)
    state = training.put(apply.state, pooled)
    return apply.calibrated_for_use().holding(state)


@jax.custom_jvp
def _constant(statistics: dict[Path, Any], params: PyTree) -> dict[Path, Any]:
    """The statistics; their derivative in the parameters raises."""
    return statistics


@_constant.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "calibrated: Flax's nnx.BatchNorm cuts the derivative of its statistics, so that the derivative of a loss "
        "through them would be wrong. In a loss normalise by the batch, apply.by_batch()(params, inputs) or the "
        "module's own flag; calibrated is for metrics and for use. Where the statistics are meant to be constants, "
        "compute them with jax.lax.stop_gradient(params)."
    )


def _of_batch(
    training: Any, params: PyTree, start: dict[Path, Any], inputs: Any, key: Any, options: Any
) -> dict[Path, Any]:
    """The statistics s of a batch, from two updates r -> m r + (1 - m) s of the running ones, from 0 and from there."""

    def updated(statistics: dict[Path, Any]) -> dict[Path, Any]:
        state = training.put(training.state, statistics)
        return training.statistics(training.with_state(params, state, *inputs, key=key, **options)[1])

    zeros = {path: jnp.zeros_like(leaf) for path, leaf in start.items()}
    first = updated(zeros)
    kept = [path for path in start if first[path] is zeros[path]]
    if kept:
        raise ValueError(
            f"calibrated: the call left {_dotted(kept[0])} as it was, because the module ran in evaluation mode. Give "
            "the option that has it take the batch's statistics, such as train=True or use_running_average=False."
        )
    still = [path for path, leaf in first.items() if not isinstance(leaf, jax.core.Tracer) and not np.any(leaf)]
    if still and len(still) == len(first):
        raise ValueError(
            f"calibrated: {_dotted(still[0])} stays at zero whatever the batch is: with a momentum of 1 a module takes "
            "nothing from it. Give a momentum below 1."
        )
    second = updated(first)
    return {path: _limit(first[path], second[path]) for path in start}


def _limit(first: Any, second: Any) -> Any:
    """s from first = (1 - m) s and second = m first + (1 - m) s, m being one number for the whole leaf."""
    # Any scale gives the same s. Differentiated, a maximum is divided by how many entries equal it: none, where the
    # compiler computes them twice and rounds them differently.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(first)))
    unit = jnp.where(scale > 0, scale, 1)
    one, two = first / unit, (second - first) / unit
    m = jnp.where(scale > 0, jnp.sum(one * two) / jnp.where(scale > 0, jnp.sum(one * one), 1), 0)
    share = 1 - m
    near = jnp.round(1e4 * share) / 1e4  # momenta have few digits, and 1 - m has lost some to rounding
    share = jnp.where((jnp.abs(share - near) < 20 * jnp.finfo(m.dtype).eps) & (near > 0), near, share)
    return (first / share).astype(first.dtype)


def _pooled(path: Path, found: list[dict[Path, Any]], shares: np.ndarray) -> Any:
    """A mean, or a variance within and between the pieces."""
    average = lambda values: sum(float(w) * v for w, v in zip(shares, values, strict=True))  # noqa: E731
    mean = (*path[:-1], str(path[-1]).replace("var", "mean")) if "var" in str(path[-1]) else None
    if mean is None or mean not in found[0]:
        return average([piece[path] for piece in found])
    centre = average([piece[mean] for piece in found])
    return average([piece[path] + (piece[mean] - centre) ** 2 for piece in found])
