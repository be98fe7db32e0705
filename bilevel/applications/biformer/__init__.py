"""BiFormer, a vision transformer that routes its attention, differentiable to any order; cleaning and fine-tuning."""

from bilevel.applications.biformer.attend import choose_backend, routed_attention
from bilevel.applications.biformer.attention import ConvAttention, FullAttention, Routing, RoutingAttention
from bilevel.applications.biformer.flops import attention_multiply_adds, multiply_adds
from bilevel.applications.biformer.load import load_original, name_table, read_checkpoint
from bilevel.applications.biformer.model import (
    BiFormer,
    biformer_base,
    biformer_small,
    biformer_stl,
    biformer_tiny,
)
from bilevel.applications.biformer.problem import (
    Cleaning,
    FineTuning,
    calibrated,
    cleaning,
    fine_tuning,
    layer_names,
    prepare,
    small_biformer,
)

__all__ = [
    "BiFormer",
    "Cleaning",
    "ConvAttention",
    "FineTuning",
    "FullAttention",
    "Routing",
    "RoutingAttention",
    "attention_multiply_adds",
    "biformer_base",
    "biformer_small",
    "biformer_stl",
    "biformer_tiny",
    "calibrated",
    "choose_backend",
    "cleaning",
    "fine_tuning",
    "layer_names",
    "load_original",
    "multiply_adds",
    "name_table",
    "prepare",
    "read_checkpoint",
    "routed_attention",
    "small_biformer",
]
