"""What the applications share: depthwise convolution, flat maps, small modules, adapters, weight files, accuracy."""

from bilevel.applications.layers import lora
from bilevel.applications.layers.answers import check_numbers, share_right
from bilevel.applications.layers.depthwise import depthwise, depthwise_conv, depthwise_flat
from bilevel.applications.layers.initialisers import normal, uniform_fan_in
from bilevel.applications.layers.modules import (
    BatchNorm,
    Conv,
    DepthwiseConv,
    LayerNorm,
    convolve,
    drop_path,
    gelu,
    linear,
    pointwise,
)
from bilevel.applications.layers.state_dicts import set_weights
from bilevel.applications.layers.weights import read_safetensors, write_safetensors

__all__ = [
    "BatchNorm",
    "Conv",
    "DepthwiseConv",
    "LayerNorm",
    "check_numbers",
    "convolve",
    "depthwise",
    "depthwise_conv",
    "depthwise_flat",
    "drop_path",
    "gelu",
    "linear",
    "lora",
    "normal",
    "pointwise",
    "read_safetensors",
    "set_weights",
    "share_right",
    "uniform_fan_in",
    "write_safetensors",
]
