"""Weights in the authors' naming and layout (PyTorch) to ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax import nnx

from bilevel.applications.biformer.attention import ConvAttention, FullAttention, RoutingAttention
from bilevel.applications.biformer.model import STAGES, BiFormer
from bilevel.applications.layers import set_weights

Module = TypeVar("Module", bound=nnx.Module)

# Our name -> the authors', per module; {j} is the block. The last two columns of a block differ in the Swin layout.
DOWNSAMPLE = {
    ("overlap", True): {"conv1": "0", "norm1": "1", "conv2": "3", "norm2": "4"},
    ("overlap", False): {"conv": "0", "norm": "1"},
    ("patch", True): {"conv": "0", "norm": "1"},
    ("patch", False): {"norm": "0", "conv": "1"},
}
BLOCK = {"pos_embed": "pos_embed", "norm1": "norm1", "norm2": "norm2", "gamma1": "gamma1", "gamma2": "gamma2"}
MLP = {
    "overlap": {"fc1": "mlp.0", "dwconv": "mlp.1.dwconv", "fc2": "mlp.3"},
    "patch": {"fc1": "mlp.0", "dwconv": "mlp.1.dwconv", "fc2": "mlp.2"},
}
ATTENTION = {
    "legacy": {"qkv": "attn.qkv.qkv", "wo": "attn.wo", "lepe": "attn.lepe", "router": "attn.router.emb"},
    "refactored": {"qkv": "attn.qkv_linear", "wo": "attn.output_linear", "lepe": "attn.lepe"},
    "full": {"qkv": "attn.qkv", "proj": "attn.proj", "lepe": "attn.lepe"},
    "conv": {"project_in": "attn.1", "mix": "attn.2", "project_out": "attn.3"},
}


def _attention_kind(attention: Any) -> str:
    if isinstance(attention, RoutingAttention):
        return attention.layout
    kinds: dict[Any, str] = {FullAttention: "full", ConvAttention: "conv"}
    return kinds[type(attention)]


def _block_table(kind: str, downsample: str) -> dict[str, str]:
    """Path within a block, dotted -> the authors' path within a block."""
    inner = {f"mlp.{ours}": theirs for ours, theirs in MLP[downsample].items()}
    return {**BLOCK, **inner, **{f"attn.{ours}": theirs for ours, theirs in ATTENTION[kind].items()}}


def name_table(model: BiFormer | nnx.Module) -> dict[str, tuple[str, ...]]:
    """Our module paths -> the authors' names: one, or one per block for what is stacked over a stage's blocks.

    For a whole BiFormer or for one of the attention modules.

    A parameter's name is the module's and `kernel` or `scale` for `weight`, `mean` and `var` for running statistics.
    """
    if not isinstance(model, BiFormer):
        return {ours: (theirs.removeprefix("attn."),) for ours, theirs in ATTENTION[_attention_kind(model)].items()}
    table: dict[str, tuple[str, ...]] = {"norm": ("norm",), "head": ("head",)}
    blocks_in = "blocks." if model.downsample == "patch" else ""
    for i in range(STAGES):
        for ours, theirs in DOWNSAMPLE[model.downsample, i == 0].items():
            table[f"down{i}.{ours}"] = (f"downsample_layers.{i}.{theirs}",)
        kind = _attention_kind(getattr(model, f"stage{i}").blocks.attn)
        for ours, theirs in _block_table(kind, model.downsample).items():
            names = tuple(f"stages.{i}.{blocks_in}{j}.{theirs}" for j in range(model.depth[i]))
            table[f"stage{i}.blocks.{ours}"] = names
        table[f"out_norm{i}"] = (f"extra_norms.{i}",)
    return table


def load_original(model: Module, weights: Mapping[str, Any]) -> Module:
    """Set the parameters and running statistics of `model` from the authors' names; returns the model.

    Args:
        model: a BiFormer, or one of the attention modules, of the same configuration; changed in place.
        weights: name -> array, as `read_checkpoint` gives it or a PyTorch `state_dict()` with its tensors on CPU.

    Raises:
        KeyError: a weight is missing. ValueError: a shape differs, or weights are left over.
    """
    return set_weights(model, name_table(model), weights, stacked=lambda path: "blocks" in path)


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Read name -> array from a `.safetensors`, `.npz`, or PyTorch `.pth`/`.pt` file.

    The first needs the package safetensors and the last torch. A PyTorch file may hold the weights under "model" or
    "state_dict". Tensors only: a file that holds other Python objects is refused.
    """
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        content = content.get(key, content)
    return {name: value.numpy() for name, value in content.items()}
