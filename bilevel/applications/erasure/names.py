"""The names of the original release of Flux, whose projections are fused, and those of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bilevel.applications.erasure.flux import Flux
from bilevel.applications.layers.weights import check_weights

_DUAL = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_DUAL_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_SWAPPED = "final_layer.adaLN_modulation.1"
"""The original has (shift, scale) there, diffusers (scale, shift)."""


def original_names(flux: Flux) -> dict[str, tuple[str, ...]]:
    """The original's name of each parameter, and the names of diffusers whose rows it holds one below the other."""
    table: dict[str, tuple[str, ...]] = {}

    def add(original: str, names: tuple[str, ...], parts: tuple[str, ...] = ("weight", "bias")) -> None:
        table.update({f"{original}.{part}": tuple(f"{name}.{part}" for name in names) for part in parts})

    for original, name in _REST.items():
        add(original, (name,))
    for theirs, ours, count, layers, norms in (
        ("double_blocks", "transformer_blocks", flux.num_layers, _DUAL, _DUAL_NORMS),
        ("single_blocks", "single_transformer_blocks", flux.num_single_layers, _SINGLE, _SINGLE_NORMS),
    ):
        for k in range(count):
            for original, names in layers.items():
                add(f"{theirs}.{k}.{original}", tuple(f"{ours}.{k}.{name}" for name in names))
            for original, name in norms.items():
                table[f"{theirs}.{k}.{original}.scale"] = (f"{ours}.{k}.{name}.weight",)
    shapes = flux.shapes(stacked=False)
    return {original: names for original, names in table.items() if names[0] in shapes}


def to_original(flux: Flux, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters under the original's names, projections fused."""
    flat, fused = flux.unstack(params), {}
    for original, names in original_names(flux).items():
        missing = [name for name in names if name not in flat]
        if missing:
            raise ValueError(f"The parameters lack {missing[0]}, which is a part of {original}.")
        parts = [np.asarray(flat[name]) for name in names]
        fused[original] = np.concatenate(_swap(original, parts))
    return fused


def from_original(flux: Flux, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters under diffusers' names, from the original's.

    Raises:
        ValueError: missing, unknown or misshapen names.
    """
    table, shapes = original_names(flux), flux.shapes(stacked=False)
    flat: dict[str, np.ndarray] = {}
    rows = {original: [shapes[name][0] for name in names] for original, names in table.items()}
    fused = {original: (sum(rows[original]), *shapes[names[0]][1:]) for original, names in table.items()}
    check_weights(weights, fused, flux)
    for original, names in table.items():
        parts = _swap(original, np.split(np.asarray(weights[original]), np.cumsum(rows[original])[:-1]))
        flat.update(zip(names, parts, strict=True))
    return flat


def _swap(original: str, parts: list[np.ndarray]) -> list[np.ndarray]:
    if original.rpartition(".")[0] != _SWAPPED:
        return parts
    first, second = np.split(parts[0], 2)
    return [np.concatenate([second, first])]
