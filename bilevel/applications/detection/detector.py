"""Detectors as lists of rows: where each reads, and what it does. BGF-YOLO, a YOLOv7 with routed attention, small ones.

A row reads the outputs of earlier rows. The rows' numbers are those of the original models, so that the names of their
state dicts follow (`name_table`).

Sources: Kang et al., "BGF-YOLO: Enhanced YOLOv8 with Multiscale Attentional Feature Fusion for Brain Tumor Detection",
MICCAI 2024; Yang et al., "Student Classroom Behavior Detection based on YOLOv7-BRA and Multi-Model Fusion", ICIG 2023.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bilevel.applications.biformer import Routing
from bilevel.applications.detection.losses import from_maps
from bilevel.applications.detection.parts import (
    ELAN,
    ORIGINAL,
    SPPCSPC,
    SPPF,
    C2f,
    ConvBlock,
    CSPStage,
    Halving,
    Head,
    Norm,
    RepConv,
    Routed,
)

Scale = Literal["n", "s", "m", "l", "x"]

# Multiples of depth and width, and the most channels before the multiple, of YOLOv8's five sizes.
SCALES: dict[str, tuple[float, float, int]] = {
    "n": (0.33, 0.25, 1024),
    "s": (0.33, 0.50, 1024),
    "m": (0.67, 0.75, 768),
    "l": (1.00, 1.00, 512),
    "x": (1.00, 1.25, 512),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a detector.

    sources: the rows that it reads, by number; -1 is the image.
    operation: "part" (a module), "concatenate", or "double" (each pixel twice in both directions).
    number: of the original model's row that it is, or that it begins with.
    """

    sources: tuple[int, ...]
    operation: Literal["part", "concatenate", "double"]
    number: int


class Detector(nnx.Module):
    """A detector as its rows say it.

        boxes of a batch:  detector(images).boxes, .scores       (`losses.Predictions`)

    Args:
        rows: a row and its module, or None, each.
        outputs: the rows that the heads read, finest first.
        strides: of those rows.
        heads: one for each.
        bins: of each side's distribution.
        classes: how many.
    """

    def __init__(
        self,
        rows: Sequence[tuple[Row, nnx.Module | None]],
        outputs: Sequence[int],
        strides: Sequence[int],
        heads: Sequence[Head],
        *,
        bins: int,
        classes: int,
    ):
        self.rows = tuple(row for row, _ in rows)
        for i, (_, module) in enumerate(rows):
            if module is not None:
                setattr(self, f"row{i}", module)
        for i, head in enumerate(heads):
            setattr(self, f"head{i}", head)
        self.outputs, self.strides = tuple(outputs), tuple(strides)
        self.bins, self.classes = bins, classes

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        routing_index: Mapping[str, Array] | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Say boxes and classes.

        Args:
            images: (batch, height, width, 3) in 0..1, sides divisible by the largest stride.
            train: normalise by the batch's statistics (and move the running ones); for group normalisation no matter.
            routing_index: the chosen regions by the attention's row, as `return_routing` names them: a frozen routing,
                which is otherwise a discontinuous function of the parameters.
            return_routing: also return {row: `Routing`}.

        Returns:
            `Predictions`; with return_routing a pair with the routings.
        """
        images = jnp.asarray(images)
        largest = max(self.strides)
        height, width = images.shape[1:3] if images.ndim == 4 else (0, 0)
        if height % largest or width % largest or not height:
            raise ValueError(
                f"Images of shape {images.shape}; this detector takes (batch, height, width, 3) with sides divisible "
                f"by {largest}, its largest stride. Pad them (letterbox), boxes included."
            )
        values: list[Any] = []
        routings: dict[str, Routing] = {}
        for i, row in enumerate(self.rows):
            inputs = [images if source == -1 else values[source] for source in row.sources]
            if row.operation == "concatenate":
                value: Any = jnp.concatenate(inputs, axis=-1)
            elif row.operation == "double":
                value = jnp.repeat(jnp.repeat(inputs[0], 2, axis=1), 2, axis=2)
            else:
                module = getattr(self, f"row{i}")
                if _attention(module) is None:
                    value = module(inputs[0], train=train)
                else:
                    name = f"row{i}"
                    index = routing_index.get(name) if routing_index is not None else None
                    value = module(inputs[0], train=train, routing_index=index, return_routing=return_routing)
                    if return_routing:
                        value, routings[name] = value
            values.append(value)
        heads = [getattr(self, f"head{i}") for i in range(len(self.outputs))]
        maps = [head(values[row], train=train) for head, row in zip(heads, self.outputs, strict=True)]
        predictions = from_maps(maps, self.strides, self.bins)
        return (predictions, routings) if return_routing else predictions


def _attention(module: nnx.Module) -> Any:
    """The routed attention of a part that has one."""
    if isinstance(module, Routed):
        return module
    return module.attention if isinstance(module, SPPCSPC) else None


class _Rows:
    """Collects rows, knowing how many channels each has."""

    def __init__(self, channels: int = 3):
        self.rows: list[tuple[Row, nnx.Module | None]] = []
        self.channels = {-1: channels}
        self.number = 0

    def part(self, module: nnx.Module, channels: int, source: int | None = None, *, originals: int = 1) -> int:
        """A module on the last row or on `source`, which the original has as so many; returns the new row's number."""
        row = Row((self.last if source is None else source,), "part", self.number)
        return self._add(row, module, channels, originals)

    def concatenate(self, *sources: int) -> int:
        return self._add(Row(sources, "concatenate", self.number), None, sum(self.channels[s] for s in sources))

    def double(self) -> int:
        return self._add(Row((self.last,), "double", self.number), None, self.channels[self.last])

    def width(self, source: int | None = None) -> int:
        return self.channels[self.last if source is None else source]

    @property
    def last(self) -> int:
        return len(self.rows) - 1

    def _add(self, row: Row, module: nnx.Module | None, channels: int, originals: int = 1) -> int:
        self.rows.append((row, module))
        self.number += originals
        self.channels[self.last] = channels
        return self.last


def _checked_classes(classes: int) -> None:
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes={classes!r}: give how many classes there are, at least 1.")


def _heads(
    rows: _Rows, outputs: Sequence[int], strides: Sequence[int], classes: int, bins: int, image: int, **options: Any
) -> list[Head]:
    """Heads whose two branches have the same widths on all levels.

    A class's logit starts at log(5 / C / (image / stride)^2): five objects in an image.
    """
    finest = rows.channels[outputs[0]]
    return [
        Head(
            rows.channels[row],
            classes,
            bins,
            box_width=max(16, finest // 4, 4 * bins),
            class_width=max(finest, classes),
            class_bias=math.log(5 / classes / (image / stride) ** 2),
            **options,
        )
        for row, stride in zip(outputs, strides, strict=True)
    ]


STRIDES = (4, 8, 16, 32)
BATCH_NORM = {"epsilon": 1e-3, "momentum": 0.03}  # of the YOLO family


def queen_fusion(
    classes: int,
    widths: tuple[int, int, int, int, int],
    depths: tuple[int, int, int, int, int],
    *,
    bins: int,
    attention: Mapping[str, Any],
    norm: Norm,
    image: int,
    rngs: nnx.Rngs,
) -> Detector:
    """YOLOv8's backbone and a neck of queen fusion over four levels, with attention on six of its edges.

        p2..p5   levels of the backbone, strides 4 to 32
        n5 = CSP[attend(down p4), 1x1 p5]                            n4 = CSP[attend(down p3), up n5, p4]
        n3 = CSP[attend(up n4), p3]                                  n2 = CSP[attend(up n3), p2]
        m3 = CSP[attend(down n2), n3]                                m4 = CSP[attend(down m3), n4]
        m5 = CSP[n5, down n4, down m4]                               heads on n2, m3, m4, m5

    Args:
        classes: how many.
        widths: channels of the stem and of the four levels.
        depths: bottlenecks in the backbone's four stages, and blocks in each stage of the neck.
        bins: of each side's distribution.
        attention: options of `Routed`.
        norm: "batch" or "group".
        image: the side of images for which the class scores start.
        rngs: for the initial values.
    """
    _checked_classes(classes)
    block: dict[str, Any] = {"norm": norm, **BATCH_NORM, "rngs": rngs}
    stem, *levels = widths
    w2, w3, w4, w5 = levels
    rows = _Rows()
    conv = lambda width, size=1, stride=1, at=None: rows.part(  # noqa: E731
        ConvBlock(rows.width(at), width, size, stride, **block), width, at
    )
    stage = lambda width: rows.part(CSPStage(rows.width(), width, depths[4], **block), width)  # noqa: E731
    attend = lambda: rows.part(Routed(rows.width(), rngs=rngs, **attention), rows.width())  # noqa: E731

    conv(stem, 3, 2)
    backbone = []
    for width, depth in zip(levels, depths, strict=False):
        conv(width, 3, 2)
        backbone.append(rows.part(C2f(width, width, depth, shortcut=True, **block), width))
    p2, p3, p4, _ = backbone
    rows.part(SPPF(w5, w5, **block), w5)

    p5 = conv(w4)
    conv(w4, 3, 2, at=p4)
    rows.concatenate(attend(), p5)
    n5 = stage(w4)
    up = rows.double()
    conv(w3, 3, 2, at=p3)
    rows.concatenate(up, attend(), p4)
    n4 = stage(w4)
    rows.double()
    rows.concatenate(attend(), p3)
    n3 = stage(w3)
    rows.double()
    rows.concatenate(attend(), p2)
    n2 = stage(w2)
    conv(w2, 3, 2)
    rows.concatenate(attend(), n3)
    m3 = stage(w3)
    conv(w3, 3, 2)
    rows.concatenate(attend(), n4)
    m4 = stage(w4)
    a, b = conv(w3, 3, 2, at=n4), conv(w3, 3, 2, at=m4)
    rows.concatenate(n5, a, b)
    m5 = stage(w5)
    outputs = (n2, m3, m4, m5)
    heads = _heads(rows, outputs, STRIDES, classes, bins, image, **block)
    return Detector(rows.rows, outputs, STRIDES, heads, bins=bins, classes=classes)


def bgf_yolo(scale: Scale = "n", classes: int = 1, *, rngs: nnx.Rngs) -> Detector:
    """BGF-YOLO of one of YOLOv8's five sizes; the paper's is "x".

    Parameters with one class, the 16 fixed numbers of the bins included as the authors count them:
    n 3,396,164; s 12,497,268; m 30,426,692; l 54,198,996; x 84,310,340.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is none of {', '.join(SCALES)}.")
    depth, width, most = SCALES[scale]
    widths = tuple(8 * math.ceil(min(c, most) * width / 8) for c in (64, 128, 256, 512, 1024))
    depths = tuple(max(round(n * depth), 1) for n in (3, 6, 6, 3, 3))
    return queen_fusion(
        classes, widths, depths, bins=16, attention={}, norm="batch", image=640, rngs=rngs  # type: ignore[arg-type]
    )  # fmt: skip


# Stem and levels of the small sizes.
SMALL = {"nano": (16, 16, 24, 32, 48), "pico": (8, 8, 16, 16, 24)}


def bgf_nano(
    classes: int, size: Literal["nano", "pico"] = "nano", *, norm: Norm = "group", image: int = 64, rngs: nnx.Rngs
) -> Detector:
    """BGF-YOLO's architecture in a size for two cores: one block per stage, 4 x 4 regions, residual attention, 8 bins.

    For images of 64 x 64 it has 340 anchors. With group normalisation it is a function of parameters and of each image
    alone, as a lower level wants it.
    """
    if size not in SMALL:
        raise ValueError(f"size={size!r} is none of {', '.join(SMALL)}.")
    # A quarter of 16 regions: on the finest map dense logits and their mask would be much of a training step.
    attention = {"regions": 4, "heads": 4, "chosen": 4, "residual": True, "backend": "gathered"}
    return queen_fusion(
        classes, SMALL[size], (1, 1, 1, 1, 1), bins=8, attention=attention, norm=norm, image=image, rngs=rngs
    )  # fmt: skip


def yolov7_bra(
    classes: int,
    *,
    width: float = 1.0,
    attention: Mapping[str, Any] | None = ORIGINAL,
    norm: Norm = "batch",
    bins: int = 16,
    image: int = 640,
    rngs: nnx.Rngs,
) -> Detector:
    """YOLOv7's backbone and neck with routed attention at the end of its `SPPCSPC`, as YOLOv7-BRA has it.

    Its heads are not YOLOv7's (anchor boxes), but the decoupled ones with distributions, so that all detectors here
    have one loss. Three levels, strides 8, 16 and 32.

    Args:
        classes: how many.
        width: multiple of YOLOv7's channels.
        attention: options of `Routed`, whose default is 7 x 7 regions without a residual; None: YOLOv7's own block.
        norm: "batch" or "group".
        bins: of each side's distribution.
        image: the side of images for which the class scores start.
        rngs: for the initial values.
    """
    _checked_classes(classes)
    block: dict[str, Any] = {"norm": norm, **BATCH_NORM, "rngs": rngs}
    c = lambda channels: 8 * math.ceil(channels * width / 8)  # noqa: E731
    rows = _Rows()
    conv = lambda width, size=1, stride=1, at=None: rows.part(  # noqa: E731
        ConvBlock(rows.width(at), c(width), size, stride, **block), c(width), at
    )

    def elan(out: int, enter: int, inner: int, every: int) -> int:
        widths = {"enter": c(enter), "inner": c(inner)}
        return rows.part(ELAN(rows.width(), c(out), depth=4, every=every, **widths, **block), c(out), originals=8)

    def halve(out: int, originals: int = 5) -> int:
        return rows.part(Halving(rows.width(), 2 * c(out // 2), **block), 2 * c(out // 2), originals=originals)

    conv(32, 3)
    conv(64, 3, 2)
    conv(64, 3)
    conv(128, 3, 2)
    elan(256, 64, 64, 2)
    halve(256)
    p3 = elan(512, 128, 128, 2)
    halve(512)
    p4 = elan(1024, 256, 256, 2)
    halve(1024)
    elan(1024, 256, 256, 2)
    p5 = rows.part(SPPCSPC(rows.width(), c(512), attention=attention, **block), c(512))
    conv(256)
    up = rows.double()
    rows.concatenate(conv(256, at=p4), up)
    n4 = elan(256, 256, 128, 1)
    conv(128)
    up = rows.double()
    rows.concatenate(conv(128, at=p3), up)
    n3 = elan(128, 128, 64, 1)
    rows.concatenate(halve(256, 4), n4)  # the original concatenates all three at once
    m4 = elan(256, 256, 128, 1)
    rows.concatenate(halve(512, 4), p5)
    m5 = elan(512, 512, 256, 1)
    rep = lambda at, out: rows.part(RepConv(rows.width(at), c(out), **block), c(out), at)  # noqa: E731
    outputs = tuple(rep(at, out) for at, out in ((n3, 256), (m4, 512), (m5, 1024)))
    strides = STRIDES[1:]
    heads = _heads(rows, outputs, strides, classes, bins, image, **block)
    return Detector(rows.rows, outputs, strides, heads, bins=bins, classes=classes)


def yolov7_nano(
    classes: int, *, width: float = 1 / 16, norm: Norm = "group", image: int = 64, rngs: nnx.Rngs
) -> Detector:
    """`yolov7_bra` in a size for two cores: 8 bins, residual attention of 4 heads among 2 x 2 regions, 84 anchors."""
    attention = {"regions": 2, "heads": 4, "chosen": 2, "residual": True}
    return yolov7_bra(
        classes, width=width, attention=attention, norm=norm, bins=8, image=image, rngs=rngs
    )  # fmt: skip


def fused(detector: Detector) -> Detector:
    """The detector for use: batch normalisations by their running statistics in the convolutions, branches united.

    It gives what the detector gives with `train=False`, up to rounding, and cannot be trained further in its form.
    """
    copy = nnx.clone(detector)
    for _, module in nnx.iter_modules(copy):  # type: ignore[attr-defined]
        if isinstance(module, (ConvBlock, RepConv)):
            module.fold()
    return copy


def parameter_count(module: Any) -> int:
    """Trained numbers of a module, also of one that is only shapes (`nnx.eval_shape`).

    Of a `Detector` the bins 0..R-1 are counted too, as the original models store them as a convolution's weights.
    """
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]
    return sum(sizes) + (module.bins if isinstance(module, Detector) else 0)
