"""The original models' names of weights, and multiply-adds, both read off a detector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

from bilevel.applications import biformer
from bilevel.applications.biformer import attention_multiply_adds
from bilevel.applications.detection.detector import Detector
from bilevel.applications.detection.parts import ELAN, ConvBlock, Halving, Head, RepConv, Routed
from bilevel.applications.layers import Conv, set_weights

Module = TypeVar("Module", bound=nnx.Module)

YOLOV7_REP_CONV = {"dense": "rbr_dense.0", "dense_norm": "rbr_dense.1", "point": "rbr_1x1.0", "point_norm": "rbr_1x1.1"}


def _children(module: nnx.Module) -> dict[str, nnx.Module]:
    return {name: child for name, child in vars(module).items() if isinstance(child, nnx.Module)}


def name_table(module: nnx.Module, *, level: int = 0) -> dict[str, tuple[str, ...]]:
    """Our module paths -> the original's, of a `Detector` or of one of the parts.

    A weight's name is the module's and `weight` for `kernel` and `scale`, `running_mean` and `running_var` for `mean`
    and `var`. A detector's are `model.<row>....`, as BGF-YOLO's (all of it) and YOLOv7's (all but the heads, which
    YOLOv7 does not have) state dicts name them.

    Args:
        module: a detector or a part.
        level: of a `Head`, counted from the finest.
    """
    if isinstance(module, Detector):
        return _of_detector(module)
    if isinstance(module, Routed):
        table = biformer.name_table(module.attention)
        there = vars(module.attention)
        return {f"attention.{ours}": theirs for ours, theirs in table.items() if there.get(ours) is not None}
    table = {}
    for ours, child in _children(module).items():
        names: Mapping[str, str] = module.NAMES  # type: ignore[attr-defined]
        stem = ours.rstrip("0123456789")
        name = names[ours].format(level=level) if ours in names else f"{names[stem]}.{ours[len(stem) :]}"
        inner = name_table(child) if hasattr(child, "NAMES") else {"": ("",)}
        for path, (theirs,) in inner.items():
            table[".".join(filter(None, (ours, path)))] = (".".join(filter(None, (name, theirs))),)
    return table


def _of_detector(detector: Detector) -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    last = max(row.number for row in detector.rows) + 1
    spread = any(isinstance(m, ELAN) for m in _children(detector).values())  # YOLOv7: a row of ours is many of its
    for i, row in enumerate(detector.rows):
        if row.operation != "part":
            continue
        module = getattr(detector, f"row{i}")
        for ours, (theirs,) in name_table(module).items():
            if isinstance(module, (ELAN, Halving)):
                theirs = _row_of(module, ours, theirs, row.number)
            elif spread and isinstance(module, RepConv):
                theirs = f"{row.number}.{YOLOV7_REP_CONV[ours]}"
            else:
                theirs = f"{row.number}.{theirs}"
            table[f"row{i}.{ours}"] = (f"model.{theirs}",)
    for level in range(len(detector.outputs)):
        for ours, (theirs,) in name_table(getattr(detector, f"head{level}"), level=level).items():
            table[f"head{level}.{ours}"] = (f"model.{last}.{theirs}",)
    return table


def _row_of(module: nnx.Module, ours: str, theirs: str, number: int) -> str:
    """A name in a stage that the original has as several rows: its row and the rest."""
    part, rest = ours.split(".")[0], theirs.split(".")[-1]
    offset = 2 + int(part.removeprefix("block")) if part.startswith("block") else int(module.NAMES[part])  # type: ignore
    return f"{number + offset}.{rest}"


def load_original(module: Module, weights: Mapping[str, Any]) -> Module:
    """Set a detector's, or a part's, parameters and running statistics from the original's names; returns it.

    Args:
        module: of the same configuration; changed in place.
        weights: name -> array, as `biformer.read_checkpoint` gives it or a PyTorch `state_dict()` with its tensors on
            CPU. The bins' fixed numbers ("dfl.conv.weight") are passed over.

    Raises:
        KeyError: a weight is missing. ValueError: a shape differs, or weights are left over.
    """
    trained = {name: value for name, value in weights.items() if not name.endswith("dfl.conv.weight")}
    return set_weights(module, name_table(module), trained)


def multiply_adds(detector: Detector, height: int = 640, width: int = 640) -> int:
    """Multiply-adds of one image's forward pass, as fvcore counts them.

    Convolutions and matrix products count their multiply-adds without biases, a batch normalisation 2 per element, a
    doubled map 1 per element, the bins' expectation R per side of each anchor; SiLU, pooling and sums nothing.
    """
    total, sizes, widths = 0, {-1: (height, width)}, {-1: 3}
    for i, row in enumerate(detector.rows):
        h, w = sizes[row.sources[0]]
        if row.operation == "part":
            module = getattr(detector, f"row{i}")
            count, (h, w), channels = _part(module, h, w)
            total += count
        elif row.operation == "double":
            h, w, channels = 2 * h, 2 * w, widths[row.sources[0]]
            total += h * w * channels
        else:
            channels = sum(widths[s] for s in row.sources)
        sizes[i], widths[i] = (h, w), channels
    for level, output in enumerate(detector.outputs):
        h, w = sizes[output]
        total += _part(getattr(detector, f"head{level}"), h, w)[0] + h * w * 4 * detector.bins
    return total


def _part(module: Any, height: int, width: int) -> tuple[int, tuple[int, int], int]:
    """Multiply-adds, the size of the result, and its channels."""
    if isinstance(module, Conv):
        size, _, features_in, features_out = module.kernel.shape
        height, width = ((n + 2 * module.padding - size) // module.stride + 1 for n in (height, width))
        return height * width * size * size * features_in * features_out, (height, width), features_out
    if isinstance(module, ConvBlock):
        count, grid, channels = _part(module.conv, height, width)
        return count + (2 * math.prod(grid) * channels if module.norm is not None else 0), grid, channels
    if isinstance(module, RepConv):
        branches = [
            (conv, norm) for conv, norm in ((module.dense, module.dense_norm), (module.point, module.point_norm))
        ]
        channels = module.dense.kernel.shape[-1]
        total = 0
        for conv, norm in branches:
            total += _part(conv, height, width)[0] if conv is not None else 0
            total += 2 * height * width * channels if norm is not None else 0
        return total, (height, width), channels
    if isinstance(module, Routed):
        attention = module.attention
        return attention_multiply_adds(attention, height, width), (height, width), attention.dim
    if isinstance(module, Halving):
        pooled = _part(module.pooled, height // 2, width // 2)
        enter = _part(module.enter, height, width)
        strided = _part(module.strided, height, width)
        return pooled[0] + enter[0] + strided[0], strided[1], pooled[2] + strided[2]
    total = sum(_part(child, height, width)[0] for child in _children(module).values())
    last = module.class3 if isinstance(module, Head) else getattr(module, "leave", None) or module.second
    return total, (height, width), _part(last, 1, 1)[2]
