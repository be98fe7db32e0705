"""Models, authored in Flax and used as a pure function of a dictionary of parameters."""

from bilevel.models._layers import depthwise_conv
from bilevel.models._nnx import from_nnx

__all__ = ["depthwise_conv", "from_nnx"]
