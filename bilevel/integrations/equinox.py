"""An Equinox module as the pair that `bilevel` works with: a dictionary of parameters, and a pure function of them.

    params, apply = from_equinox(Net(key))
    logits = apply(params, images, key=key)                      # each sample with a key of its own

Equinox's modules take one sample; here they take a batch, whose samples are mapped over. The calls, keys, running
statistics and `calibrated` are those of `integrations.flax`.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from bilevel._arguments import explained
from bilevel.data import as_step_key
from bilevel.integrations._modules import Apply, Path, calibrated, from_dictionary, to_dictionary

try:
    import equinox as eqx
except ImportError as error:  # pragma: no cover
    raise ImportError(f"bilevel.integrations.equinox needs Equinox ({error}): pip install equinox.") from error

__all__ = ["Apply", "calibrated", "from_equinox"]


def _norms(module: Any) -> list[Any]:
    found = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, eqx.nn.BatchNorm))
    return [node for node in found if isinstance(node, eqx.nn.BatchNorm)]


def _index(norm: Any) -> Any:
    return norm.batch_state_index if norm.mode == "batch" else norm.ema_state_index


def _clone(state: Any) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, leaves)


def _begun(norm: Any, state: Any) -> bool:
    """Whether a layer has seen a batch; a value that cannot be looked at is taken for yes."""
    number = state.get(norm.batch_counter if norm.mode == "batch" else norm.ema_first_time_index)
    return isinstance(number, jax.core.Tracer) or bool(number) == (norm.mode == "batch")


@dataclasses.dataclass(frozen=True, eq=False)
class _Equinox(Apply):
    parts: Any  # the module's trained leaves, as places
    rest: Any  # the module without them
    axis: str | None

    def run(self, params: Any, state: Any, key: Any, args: Any, kwargs: Any) -> tuple[Any, Any, list[str]]:
        module = eqx.combine(from_dictionary(self.parts, params), self.rest)
        takes_key = "key" in inspect.signature(type(module).__call__).parameters
        if key is not None and takes_key:
            key = as_step_key(key).random
        elif key is not None:
            raise ValueError(f"{type(module).__name__}.__call__ takes no key: give it one, or apply(params, ...) none.")
        carried = () if state is None else (_clone(state),)  # equinox lets a state be used once

        def one(sample: Any, key: Any) -> Any:
            named = {**kwargs, "key": key} if takes_key and key is not None else kwargs
            found = module(*sample, *carried, **named)
            return found if carried else (found, None)

        try:
            if self.axis is None:
                return *one(args, key), []
            count = len(jax.tree.leaves(args)[0])
            keys = None if key is None else jax.random.split(key, count)
            mapped = jax.vmap(one, axis_name=self.axis, in_axes=(0, None if keys is None else 0), out_axes=(0, None))
            return *mapped(args, keys), []
        except RuntimeError as error:
            if key is None and "requires a key" in str(error):
                return None, state, [str(error).split(" requires a key")[0]]
            raise

    def statistics(self, state: Any) -> dict[Path, Any]:
        if state is None:
            return {}
        state = _clone(state)
        values = [state.get(_index(norm)) for norm in _norms(self.rest)]
        return {(i, name): a for i, pair in enumerate(values) for name, a in zip(("mean", "var"), pair, strict=True)}

    def put(self, state: Any, statistics: dict[Path, Any]) -> Any:
        state = _clone(state)
        for i, norm in enumerate(_norms(self.rest)):
            state = state.set(_index(norm), (statistics[i, "mean"], statistics[i, "var"]))
            if norm.mode == "batch":  # so many updates that its correction for the start is none
                state = state.set(norm.batch_counter, 0 * state.get(norm.batch_counter) + 2**30)
            else:  # the next update takes the batch's
                state = state.set(norm.ema_first_time_index, jnp.array(True))
        return state

    def train(self) -> _Equinox:
        return dataclasses.replace(self, rest=eqx.nn.inference_mode(self.rest, False))

    def eval(self) -> _Equinox:
        return dataclasses.replace(self, rest=eqx.nn.inference_mode(self.rest, True))

    def by_batch(self) -> _Equinox:
        is_norm = lambda node: isinstance(node, eqx.nn.BatchNorm)  # noqa: E731
        switch = lambda node: eqx.tree_at(lambda n: n.inference, node, False) if is_norm(node) else node  # noqa: E731
        return dataclasses.replace(self, rest=jax.tree.map(switch, self.eval().rest, is_leaf=is_norm))

    def calibrated_for_use(self) -> _Equinox:
        return self.eval()


@explained
def from_equinox(module: Any, state: Any = None, *, axis: str | None = "batch") -> tuple[dict[Any, Any], Apply]:
    """Split an Equinox module into its parameters and a pure function of them.

    Args:
        module: any callable `equinox.Module`. Its floating-point arrays are what is trained.
        state: for a module with state, `eqx.nn.make_with_state(Net)(...)`'s second part.
        axis: the name of the axis of samples over which the module is mapped (the one that its BatchNorms were given);
            None: the module takes batches itself.

    Returns:
        `(params, apply)`: nested dictionaries of arrays by attribute, and `apply(params, *args, key=None, **kwargs)`.
        The key is split over the samples.

    Raises:
        TypeError: this is no Equinox module.
    """
    if not isinstance(module, eqx.Module):
        raise TypeError(f"from_equinox takes an equinox.Module, not a {type(module).__name__}.")
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    places = jax.tree.map(lambda leaf: 0, params)
    fresh = [] if state is None else [i for i, norm in enumerate(_norms(rest)) if not _begun(norm, _clone(state))]
    stale = frozenset((i, name) for i in fresh for name in ("mean", "var"))
    return to_dictionary(params), _Equinox(state, stale, places, rest, axis)
