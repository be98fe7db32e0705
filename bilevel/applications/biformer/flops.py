"""Multiply-adds of BiFormer, counted from its configuration."""

from __future__ import annotations

from typing import Any

from bilevel.applications.biformer.attention import ConvAttention, FullAttention, RoutingAttention
from bilevel.applications.biformer.model import STAGES, BiFormer


def _linear(module: Any, positions: int) -> int:
    return positions * module.kernel.shape[-1] * module.kernel.shape[-2]


def _depthwise(kernel: Any, positions: int) -> int:
    rows, columns, channels = kernel.shape[-3:]
    return positions * rows * columns * channels


def attention_multiply_adds(attention: Any, height: int, width: int) -> int:
    """Multiply-adds of one of the attention modules on a map of that size, by the rules of `multiply_adds`."""
    if isinstance(attention, ConvAttention):
        positions = height * width
        mix = _depthwise(attention.mix.kernel, positions)
        return _linear(attention.project_in, positions) + mix + _linear(attention.project_out, positions)
    if isinstance(attention, FullAttention):
        positions = height * width
        total = (
            _linear(attention.qkv, positions) + _linear(attention.proj, positions) + 2 * positions**2 * attention.dim
        )
        return total + (_depthwise(attention.lepe.kernel, positions) if attention.lepe is not None else 0)
    assert isinstance(attention, RoutingAttention)
    rows, columns, h, w = attention._regions(height, width)
    regions, positions = rows * columns, rows * h * columns * w
    keys = h * w
    if attention.pooling.startswith("ada_"):
        keys = attention.pool_size**2
    elif attention.pooling != "identity":
        keys = (h // attention.pool_ratio) * (w // attention.pool_ratio)
    total = _linear(attention.qkv, positions)
    total += regions**2 * attention.qk_dim  # region to region
    total += positions * attention.topk * keys * (attention.qk_dim + attention.dim)  # token to token
    if attention.wo is not None:
        total += _linear(attention.wo, positions)
    if attention.router is not None:
        total += 2 * _linear(attention.router, regions)
    return total + (_depthwise(attention.lepe.kernel, positions) if attention.lepe is not None else 0)


def multiply_adds(model: BiFormer, height: int = 224, width: int = 224) -> int:
    """Multiply-adds of one image's forward pass, with the counting rules of fvcore.

    Matrix products and convolutions count their multiply-adds without biases; a layer normalisation counts 5 per
    element, a batch normalisation 2; softmax, GELU, pooling and residual sums count nothing.
    """
    total = 0
    for i in range(STAGES):
        down, stage = getattr(model, f"down{i}"), getattr(model, f"stage{i}")
        convs = [down.conv1, down.conv2] if hasattr(down, "conv1") else [down.conv]
        norms = [down.norm1, down.norm2] if hasattr(down, "norm1") else [down.norm]
        for conv, norm in zip(convs, norms, strict=True):
            size, _, dim_in, dim_out = conv.kernel.shape
            before = height * width
            height, width = ((n + 2 * conv.padding - size) // conv.stride + 1 for n in (height, width))
            total += height * width * size * size * dim_in * dim_out
            normed = norm.scale.shape[0]
            total += 2 * normed * (height * width if normed == dim_out else before)
        block, positions = stage.blocks, height * width
        per_block = attention_multiply_adds(block.attn, height, width)
        per_block += _linear(block.mlp.fc1, positions) + _linear(block.mlp.fc2, positions)
        per_block += 2 * 5 * positions * stage.dim
        for conv in (block.pos_embed, block.mlp.dwconv):
            per_block += _depthwise(conv.kernel, positions) if conv is not None else 0
        total += stage.depth * per_block
    if model.norm is not None:
        total += 2 * height * width * model.embed_dim[-1]
    if model.head is not None:
        total += _linear(model.head, 1)
    return total
