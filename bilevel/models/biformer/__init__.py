"""BiFormer: a vision transformer with bi-level routing attention, exact, fast, and differentiable to any order."""

from bilevel.models.biformer.attend import choose_backend, routed_attention
from bilevel.models.biformer.attention import ConvAttention, FullAttention, Routing, RoutingAttention
from bilevel.models.biformer.flops import multiply_adds
from bilevel.models.biformer.load import load_original, name_table, read_checkpoint
from bilevel.models.biformer.model import (
    BiFormer,
    biformer_base,
    biformer_small,
    biformer_stl,
    biformer_tiny,
)

__all__ = [
    "BiFormer",
    "ConvAttention",
    "FullAttention",
    "Routing",
    "RoutingAttention",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_tiny",
    "choose_backend",
    "load_original",
    "multiply_adds",
    "name_table",
    "read_checkpoint",
    "routed_attention",
]
