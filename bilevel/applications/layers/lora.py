"""Low-rank adapters (LoRA) for any dictionary of parameters: w + (alpha / rank) B A for chosen weights w.

An adapter is a flat dictionary of arrays under PEFT's names, `NAME.lora_A.weight` and `NAME.lora_B.weight`: a variable
as any other. What is not in it is frozen because only it is differentiated.

    adapter = lora.init(key, params, ["add_q_proj", "add_k_proj"], rank=8)
    adapted = lora.merge(params, adapter)          # params are not changed
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bilevel.applications.layers.weights import read_safetensors, safetensors_metadata, write_safetensors

PyTree = Any
Adapter = dict[str, Array]
Layout = Literal["out_in", "in_out"]

_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIXES = ("base_model.model.", "transformer.", "unet.", "text_encoder.")


def matches(params: PyTree, targets: str | Sequence[str]) -> list[str]:
    """The names, without their last part, of the weights that `targets` name.

    As in PEFT: a string is a regular expression that a name matches in full; several strings are names, or ends of
    names at a dot. Nested dictionaries have names joined by dots. Weights are `weight` or `kernel` of two axes or more:
    axes before the last two are stacks.

    Raises:
        ValueError: no weight has such a name; the nearest are said.
    """
    names = [name for name, _, _ in _weights(params)]
    if isinstance(targets, str):
        try:
            found = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise ValueError(f"lora: {targets!r} is no regular expression ({error}).") from None
        unmatched = [] if found else [targets]
    else:
        ends = {t: [n for n in names if n == t or n.endswith(f".{t}")] for t in targets}
        found = [name for name in names if any(name in some for some in ends.values())]
        unmatched = [t for t, some in ends.items() if not some] or ([] if found else ["nothing"])
    if unmatched:
        last = sorted({name.rpartition(".")[2] for name in names})
        some = ", ".join(last[:12]) + (", ..." if len(last) > 12 else "")
        raise ValueError(
            f"lora: {unmatched[0]!r} matches none of the {len(names)} weights. A string is a regular expression of the "
            f"whole name, as of {names[0]!r}; a list has ends of names, such as: {some}."
            if names
            else "lora: the parameters have no weight of two axes or more under `weight` or `kernel`."
        )
    return found


def init(
    key: Array,
    params: PyTree,
    targets: str | Sequence[str],
    rank: int = 8,
    *,
    layout: Layout = "out_in",
    dtype: Any = None,
) -> Adapter:
    """A fresh adapter, which changes nothing: A normal of deviation 1 / rank (PEFT's "gaussian"), B zero.

    Args:
        key: draws A.
        params: a dictionary of arrays, flat or nested.
        targets: which weights, see `matches`.
        rank: r. A is (stacks, r, in) and B (stacks, out, r).
        layout: how a weight lies: (out, in), PyTorch's, or (in, out), Flax's kernels.
        dtype: of the adapter; None: the weight's own.

    Raises:
        ValueError: targets that match nothing; a rank that is no positive integer or larger than a weight's sides.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ValueError(f"lora.init(rank={rank!r}): a positive integer is needed.")
    shapes, adapter = {name: leaf for name, _, leaf in _weights(params)}, {}
    for k, name in enumerate(matches(params, targets)):
        weight = shapes[name]
        out, n_in = _sides(weight.shape, layout)
        if rank > min(out, n_in):
            raise ValueError(f"lora.init(rank={rank}): {name} is {out} x {n_in}, so a rank of {min(out, n_in)} is all.")
        kind, lead = weight.dtype if dtype is None else dtype, weight.shape[:-2]
        adapter[name + _A] = jax.random.normal(jax.random.fold_in(key, k), (*lead, rank, n_in), kind) / rank
        adapter[name + _B] = jnp.zeros((*lead, out, rank), kind)
    return adapter


def merge(
    params: PyTree,
    adapter: Mapping[str, Any],
    *,
    alpha: float | None = None,
    scale: float | Array | Mapping[str, Any] = 1.0,
    layout: Layout = "out_in",
) -> PyTree:
    """The parameters with w + scale (alpha / rank) B A in place of each adapted weight w.

    Args:
        params: the frozen parameters, a dictionary flat or nested; it is not changed.
        adapter: from `init` or `read`.
        alpha: None: the rank, so that alpha / rank is one.
        scale: a strength: one number; or by adapted name (all of them), numbers or one per stack, as gates.
        layout: see `init`.

    Raises:
        ValueError: an adapter without a weight for it, half an adapter, or shapes that do not fit; by name.
    """
    places = {name: (path, leaf) for name, path, leaf in _weights(params)}
    gates = scale if isinstance(scale, Mapping) else dict.fromkeys(names(adapter), scale)
    if gates.keys() != set(names(adapter)):
        odd = sorted(gates.keys() ^ set(names(adapter)))
        raise ValueError(
            f"lora.merge(scale=...): {odd[0]!r} is {'not adapted' if odd[0] in gates else 'adapted, and has none'}. "
            "Give one number, or one for each adapted name and for no other."
        )
    changed: dict[tuple[str, ...], Any] = {}
    for name in names(adapter):
        if name not in places:
            raise ValueError(f"lora.merge: the adapter has {name}, and the parameters have no weight of that name.")
        path, weight = places[name]
        a, b = adapter[name + _A], adapter[name + _B]
        out, n_in = _sides(weight.shape, layout)
        rank, lead = a.shape[-2], weight.shape[:-2]
        if a.shape != (*lead, rank, n_in) or b.shape != (*lead, out, rank):
            raise ValueError(
                f"lora.merge: {name} is {weight.shape}, and its adapter {a.shape} and {b.shape}: (.., rank, {n_in}) "
                f"and (.., {out}, rank) are needed."
            )
        gate = gates[name]
        factor = jnp.asarray(gate) * (1.0 if alpha is None else alpha / rank)
        factor = factor.reshape(*factor.shape, *(1,) * (weight.ndim - factor.ndim)) if factor.ndim else factor
        delta = (factor * (b @ a)).astype(weight.dtype)
        changed[path] = weight + (delta if layout == "out_in" else jnp.swapaxes(delta, -1, -2))
    return _with(params, changed, ())


def product(adapter: Mapping[str, Any], name: str, x: Array, *, alpha: float | None = None) -> Array | None:
    """What the adapter adds to the layer `name` at inputs x (.., in), (alpha / rank) B A x; None: it adds nothing.

    For a network that knows its adapter: where `merge` makes the changed weights, this makes rank numbers per input.
    A and B are of one layer, (rank, in) and (out, rank), and are cast to the inputs' dtype.
    """
    if name + _A not in adapter:
        return None
    a, b = (adapter[name + part].astype(x.dtype) for part in (_A, _B))
    out = (x @ a.T) @ b.T
    return out if alpha is None else alpha / a.shape[0] * out


def names(adapter: Mapping[str, Any]) -> list[str]:
    """The adapted weights' names.

    Raises:
        ValueError: names that are no adapter's, or an A without its B.
    """
    found = []
    for key in adapter:
        if key.endswith(_A):
            if key.removesuffix(_A) + _B not in adapter:
                raise ValueError(f"The adapter has {key} without its lora_B.")
            found.append(key.removesuffix(_A))
        elif not key.endswith(_B):
            raise ValueError(f"The adapter has {key}, which is neither a lora_A.weight nor a lora_B.weight.")
        elif key.removesuffix(_B) + _A not in adapter:
            raise ValueError(f"The adapter has {key} without its lora_A.")
    return found


def freeze(tree: PyTree) -> PyTree:
    """The same values, through which no derivative goes: for parameters that stand beside an adapter in one loss."""
    return jax.tree.map(jax.lax.stop_gradient, tree)


def split(weights: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The frozen weights and the adapter of a PEFT model's state, with `.base_layer.` and `lora_A.default`."""
    base, adapter = {}, {}
    for name, array in weights.items():
        if ".lora_A." in name or ".lora_B." in name:
            adapter[name] = array
        else:
            base[name.replace(".base_layer.", ".")] = array
    return base, from_published(adapter)


def from_published(weights: Mapping[str, Any], prefix: str | None = None) -> dict[str, Any]:
    """An adapter under this package's names, from those of PEFT or diffusers.

    The prefix and the adapter's own name (`lora_A.default.weight`) are dropped. A prefix of None is the first of
    `base_model.model.`, `transformer.`, `unet.` and `text_encoder.` that all names begin with, or "": give it where the
    network's own names begin with one of these.

    Raises:
        ValueError: names that are no adapter's, two that become one, or half an adapter.
    """
    adapter: dict[str, Any] = {}
    if prefix is None:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), "")
    odd = next((name for name in weights if not name.startswith(prefix)), None)
    if odd is not None:
        raise ValueError(f"The adapter has {odd}, which does not begin with the prefix {prefix!r}.")
    for name, array in weights.items():
        plain = re.sub(r"\.lora_([AB])(\.[^.]+)?\.weight$", r".lora_\1.weight", name).removeprefix(prefix)
        if plain in adapter:
            raise ValueError(f"The adapter has {plain} twice: more than one adapter is in this file.")
        adapter[plain] = array
    names(adapter)
    if not adapter:
        raise ValueError("There is no lora_A.weight or lora_B.weight among the names: this is no adapter.")
    return adapter


def read(path: str | os.PathLike[str], prefix: str | None = None) -> dict[str, np.ndarray]:
    """An adapter from a safetensors file of PEFT or diffusers.

    An alpha that the file itself states (diffusers' `lora_adapter_metadata`) is multiplied into B, so that `merge`
    needs none; that of PEFT stands in another file, `adapter_config.json`: give it to `merge`.

    Args:
        path: of the file.
        prefix: before each name; None: what `save` has written down, or else as `from_published` finds it.

    Raises:
        ValueError: no safetensors file, or one with other names, or with an alpha for each part.
    """
    said = safetensors_metadata(path)
    adapter = from_published(read_safetensors(path), said.get("bilevel_prefix") if prefix is None else prefix)
    try:
        stated = json.loads(said.get("lora_adapter_metadata", "{}"))
    except ValueError:
        stated = {}
    last = {name.rpartition(".")[2]: value for name, value in stated.items()}
    if last.get("alpha_pattern") or last.get("rank_pattern"):
        raise ValueError(f"{path} states an alpha for each part (alpha_pattern, rank_pattern), which is not read.")
    factor = last.get("lora_alpha", 1) / last.get("r", 1) if {"lora_alpha", "r"} <= last.keys() else 1
    return (
        adapter if factor == 1 else {n: a * a.dtype.type(factor) if n.endswith(_B) else a for n, a in adapter.items()}
    )


def save(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    *,
    prefix: str = "transformer.",
    unstack: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> None:
    """Write an adapter as diffusers' `load_lora_weights` reads it; for PEFT's loader the prefix `base_model.model.`.

    Args:
        path: of the safetensors file.
        adapter: its arrays.
        prefix: before each name.
        unstack: where blocks are stacked, what gives each its name: `flux.unstack`.
    """
    names(adapter)
    flat = adapter if unstack is None else unstack(adapter)
    said = {"format": "pt", "bilevel_prefix": prefix}
    write_safetensors(path, {prefix + name: array for name, array in flat.items()}, said)


def _sides(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """(out, in)."""
    if layout not in ("out_in", "in_out"):
        raise ValueError(f"lora: layout={layout!r}; a weight lies 'out_in' (PyTorch) or 'in_out' (Flax).")
    return (shape[-2], shape[-1]) if layout == "out_in" else (shape[-1], shape[-2])


def _arrays(params: PyTree, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The keys of the place, and the array, of each."""
    found = []
    for key, value in params.items():
        if isinstance(value, Mapping):
            found += _arrays(value, (*path, key))
        elif isinstance(value, (list, tuple)):
            raise ValueError(
                f"lora: {'.'.join(map(str, (*path, key)))} is a {type(value).__name__}, and weights are found by "
                "dictionaries' keys: give its entries names, such as {'0': ..., '1': ...}."
            )
        elif hasattr(value, "shape"):
            found.append(((*path, key), value))
    return found


def _weights(params: PyTree) -> list[tuple[str, tuple[str, ...], Any]]:
    """Name without its last part, keys of the place, and array of each weight of at least two axes in a layer.

    Layers lie stacked where all arrays of a part have one leading length and two axes at least, some three: there a
    norm's scale has two, and is no matrix.
    """
    named = [(".".join(map(str, path)), path, leaf) for path, leaf in _arrays(params)]
    parts: dict[str, list[tuple[int, ...]]] = {}
    for name, _, leaf in named:
        parts.setdefault(name.partition(".")[0], []).append(leaf.shape)
    stacked = {
        part for part, shapes in parts.items()
        if min(map(len, shapes)) >= 2 and max(map(len, shapes)) >= 3 and len({shape[0] for shape in shapes}) == 1
    }  # fmt: skip
    return [
        (name.rpartition(".")[0], path, leaf)
        for name, path, leaf in named
        if name.rpartition(".")[2] in ("weight", "kernel")
        and len(leaf.shape) >= (3 if name.partition(".")[0] in stacked else 2)
    ]


def _with(tree: PyTree, changed: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> PyTree:
    return {
        key: _with(value, changed, (*path, key)) if isinstance(value, Mapping) else changed.get((*path, key), value)
        for key, value in tree.items()
    }
