"""Weights under PyTorch's names and in its layout, put into a Flax module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)

LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _to_ours(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch's (out, in), (out, in, kh, kw), depthwise (C, 1, kh, kw) as (in, out), (kh, kw, in, out), (kh, kw, C)."""
    if weight.ndim == 4 and len(shape) == 2:
        weight = weight[:, :, 0, 0]
    if weight.ndim == 2:
        return weight.T
    if weight.ndim == 4:
        return weight[:, 0].transpose(1, 2, 0) if len(shape) == 3 else weight.transpose(2, 3, 1, 0)
    return weight


def _names(path: Any) -> list[str]:
    return [str(entry.key) for entry in path if hasattr(entry, "key")]


def _theirs(table: Mapping[str, tuple[str, ...]], path: list[str]) -> tuple[str, ...]:
    if ".".join(path) in table:  # a bare parameter
        return table[".".join(path)]
    *module, leaf = path
    return tuple(f"{name}.{LEAF[leaf]}" for name in table[".".join(module)])


def set_weights(
    model: Module,
    table: Mapping[str, tuple[str, ...]],
    weights: Mapping[str, Any],
    *,
    stacked: Callable[[list[str]], bool] = lambda path: False,
) -> Module:
    """Set the parameters and running statistics of `model` from PyTorch's names; returns the model.

    Args:
        model: changed in place.
        table: our module paths, dotted (or of a bare parameter), to their names: one, or one for each block of what is
            stacked. A parameter's name there is the module's and `weight`, `bias`, `running_mean` or `running_var`.
        weights: name -> array, as a PyTorch `state_dict()` with its tensors on CPU; `num_batches_tracked` is passed
            over.
        stacked: whether what is at a path has the blocks as its leading axis.

    Raises:
        KeyError: a weight is missing. ValueError: a shape differs, or weights are left over.
    """
    left = {name for name in weights if not name.endswith("num_batches_tracked")}
    values = nnx.state(model)
    paths, structure = jax.tree_util.tree_flatten_with_path(values)
    leaves = []
    for path, old in paths:
        ours = _names(path)
        shape = old.shape[1:] if stacked(ours) else old.shape
        parts = []
        for name in _theirs(table, ours):
            if name not in weights:
                raise KeyError(f"The weights lack {name}, which is {'.'.join(ours)} here.")
            part = _to_ours(np.asarray(weights[name]), shape)
            if part.shape != shape:
                raise ValueError(f"{name} has shape {np.shape(weights[name])}; {'.'.join(ours)} needs {shape}.")
            parts.append(part)
            left.discard(name)
        leaves.append(jnp.asarray(np.stack(parts) if stacked(ours) else parts[0], old.dtype))
    if left:
        raise ValueError(
            f"The model has no place for {', '.join(sorted(left)[:5])} ({len(left)} in all): another configuration?"
        )
    nnx.update(model, structure.unflatten(leaves))  # type: ignore[attr-defined]
    return model
