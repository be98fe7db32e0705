"""What detectors are composed of: convolution blocks, stages, pyramids of pools, routed attention. NHWC throughout.

Every part is `part(x, train=...)`, with `batch` or `group` normalisation. The first is the originals'; with the second
a network is a function of its parameters and of one image, which a lower level wants: no running statistics, no
coupling of a batch's images.

Sources: Xu et al., "DAMO-YOLO", 2022 (`CSPStage`, the neck); Ding et al., "RepVGG", CVPR 2021 (`RepConv`); Wang et al.,
"YOLOv7", CVPR 2023 (`SPPCSPC`, `ELAN`); Zhu et al., "BiFormer", CVPR 2023 (the attention).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from bilevel.applications.biformer import Routing, RoutingAttention
from bilevel.applications.layers import BatchNorm, Conv, convolve

Norm = Literal["batch", "group"]
NORMS = ("batch", "group")
ORIGINAL: Mapping[str, Any] = MappingProxyType({})  # options of attention: its own
GROUP = 8  # channels, at most, of a group


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardise(x: Array, size: int) -> tuple[Array, Array]:
    """Centre and scale each sample's groups of `size` neighbouring channels: (batch, pixels, channels) -> the same.

        n = (x - P x) r,    r = (P (x - P x)^2 + 1e-5)^-1/2,    P: the mean over pixels and a group
        dn = r (dx - P dx - n P(n dx))

    The derivative is said in this form because it is the shorter programme, by a quarter, and P is its own transpose.

    Returns:
        n, and r.
    """
    centred = x - _group_mean(x, size)
    factor = lax.rsqrt(_group_mean(jnp.square(centred), size) + 1e-5)
    return centred * factor, factor


@standardise.defjvp
def _(size: int, primals: tuple[Array], tangents: tuple[Array]) -> Any:
    (x,), (dx,) = primals, tangents
    n, factor = standardise(x, size)
    along = _group_mean(n * dx, size)
    return (n, factor), (factor * (dx - _group_mean(dx, size) - n * along), -jnp.square(factor) * along)


def _group_mean(x: Array, size: int) -> Array:
    """The mean over pixels and a group, at each channel: (batch, pixels, channels) -> (batch, 1, channels)."""
    _, pixels, channels = x.shape
    groups = np.kron(np.eye(channels // size), np.full((size, size), 1 / (size * pixels)))
    return jnp.matmul(x.sum(1), jnp.asarray(groups, x.dtype), precision=lax.Precision.HIGHEST)[:, None]


class GroupNorm(nnx.Module):
    """Group normalisation: by each sample's mean and variance over pixels and a group of `GROUP` neighbouring channels.

    One group where `GROUP` does not divide the channels.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.size = GROUP if features % GROUP == 0 else features

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, channels) -> the same."""
        return group_normalise(x, self.scale[...], self.bias[...], self.size)


def group_normalise(x: Array, scale: Array, bias: Array, size: int) -> Array:
    """Standardised groups of `size` channels, times `scale`, plus `bias`: (batch, height, width, channels)."""
    normal, _ = standardise(x.reshape(x.shape[0], -1, x.shape[-1]), size)
    return (normal * scale + bias).reshape(x.shape)


def make_norm(norm: Norm, features: int, epsilon: float, momentum: float) -> nnx.Module:
    """The normalisation of that name."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is none of {', '.join(NORMS)}.")
    return BatchNorm(features, epsilon=epsilon, momentum=momentum) if norm == "batch" else GroupNorm(features)


def number(owner: Any, blocks: list[Any]) -> None:
    """Give a module these modules as `block0`, `block1`, ..."""
    owner.count = len(blocks)
    for i, block in enumerate(blocks):
        setattr(owner, f"block{i}", block)


def numbered(owner: Any) -> list[Any]:
    """Those modules."""
    return [getattr(owner, f"block{i}") for i in range(owner.count)]


class ConvBlock(nnx.Module):
    """SiLU(norm(convolution)), no bias; padding size // 2. The `Conv` block of the YOLO family.

    Args:
        features_in, features_out, size, stride: of the convolution.
        norm: "batch" or "group".
        active: without it no SiLU.
        epsilon, momentum: of batch normalisation. PyTorch's; whole detectors of the YOLO family have 1e-3 and 0.03.
        rngs: for the initial values.
    """

    NAMES: ClassVar = {"conv": "conv", "norm": "bn"}

    def __init__(
        self,
        features_in: int,
        features_out: int,
        size: int = 1,
        stride: int = 1,
        *,
        norm: Norm = "batch",
        active: bool = True,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(features_in, features_out, size, stride=stride, padding=size // 2, bias=False, rngs=rngs)
        self.norm: Any = make_norm(norm, features_out, epsilon, momentum)
        self.active = active

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, in) -> (batch, height / stride, width / stride, out)."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x, train=train)
        return jax.nn.silu(x) if self.active else x

    def fold(self) -> None:
        """Put batch normalisation by the running statistics into the convolution: kernel and bias take over."""
        if isinstance(self.norm, BatchNorm):
            self.conv = _with_bias(self.conv, *_folded(self.conv, self.norm))
            self.norm = None


def side_by_side(first: ConvBlock, second: ConvBlock, x: Array, *, train: bool) -> tuple[Array, Array]:
    """Two blocks of one input, as one convolution where both have group normalisation with groups of one size."""
    norms: list[Any] = [first.norm, second.norm]
    if not all(isinstance(norm, GroupNorm) for norm in norms) or norms[0].size != norms[1].size:
        return first(x, train=train), second(x, train=train)
    kernel = jnp.concatenate([first.conv.kernel[...], second.conv.kernel[...]], axis=-1)
    y = convolve(x, kernel, stride=first.conv.stride, padding=first.conv.padding)
    scale, bias = (jnp.concatenate([getattr(n, name)[...] for n in norms]) for name in ("scale", "bias"))
    y = jax.nn.silu(group_normalise(y, scale, bias, norms[0].size))
    return y[..., : norms[0].scale.shape[0]], y[..., norms[0].scale.shape[0] :]


def _folded(conv: Conv, norm: BatchNorm) -> tuple[Array, Array]:
    factor = norm.scale[...] * lax.rsqrt(norm.var[...] + norm.epsilon)
    return conv.kernel[...] * factor, norm.bias[...] - norm.mean[...] * factor


def _with_bias(conv: Conv, kernel: Array, bias: Array) -> Conv:
    size, _, features_in, features_out = kernel.shape
    new = Conv(features_in, features_out, size, stride=conv.stride, padding=conv.padding, rngs=nnx.Rngs(0))
    new.kernel, new.bias = nnx.Param(kernel), nnx.Param(bias)
    return new


class RepConv(nnx.Module):
    """A 3x3 convolution that is trained as two branches and used as one.

        train    SiLU(norm(3x3(x)) + norm(1x1(x)))         two normalisations: with norm="batch", as published
                 SiLU(norm(3x3(x) + 1x1(x)))               one: with norm="group"
        use      SiLU(3x3'(x) + b)                         `fold`, of the first form; the second sums the two kernels

    There is no identity branch. With group normalisation the two kernels are summed before they are used, so that
    training is one convolution too.
    """

    NAMES: ClassVar = {
        "dense": "rbr_dense.conv",
        "dense_norm": "rbr_dense.bn",
        "point": "rbr_1x1.conv",
        "point_norm": "rbr_1x1.bn",
    }

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        norm: Norm = "batch",
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        rngs: nnx.Rngs,
    ):
        self.dense = Conv(features_in, features_out, 3, stride=1, padding=1, bias=False, rngs=rngs)
        self.dense_norm: Any = make_norm(norm, features_out, epsilon, momentum)
        self.point: Any = Conv(features_in, features_out, 1, stride=1, padding=0, bias=False, rngs=rngs)
        self.point_norm: Any = make_norm(norm, features_out, epsilon, momentum) if norm == "batch" else None

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, in) -> (batch, height, width, out)."""
        if self.point is None:
            x = self.dense(x)
            x = x if self.dense_norm is None else self.dense_norm(x, train=train)
        elif self.point_norm is None:
            x = self.dense_norm(convolve(x, self._summed(), padding=1), train=train)
        else:
            x = self.dense_norm(self.dense(x), train=train) + self.point_norm(self.point(x), train=train)
        return jax.nn.silu(x)

    def _summed(self) -> Array:
        return self.dense.kernel[...].at[1, 1].add(self.point.kernel[0, 0])

    def fold(self) -> None:
        """Make it one convolution, of the running statistics with batch normalisation."""
        if self.point is None:
            return
        if isinstance(self.dense_norm, BatchNorm):
            kernel, bias = _folded(self.dense, self.dense_norm)
            point, point_bias = _folded(self.point, self.point_norm)
            self.dense = _with_bias(self.dense, kernel.at[1, 1].add(point[0, 0]), bias + point_bias)
            self.dense_norm = None
        else:
            self.dense.kernel[...] = self._summed()
        self.point = self.point_norm = None


class Bottleneck(nnx.Module):
    """Two 3x3 blocks, and the input added to them where `shortcut`."""

    NAMES: ClassVar = {"first": "cv1", "second": "cv2"}

    def __init__(self, features: int, *, shortcut: bool, rngs: nnx.Rngs, **block: Any):
        self.first = ConvBlock(features, features, 3, rngs=rngs, **block)
        self.second = ConvBlock(features, features, 3, rngs=rngs, **block)
        self.shortcut = shortcut

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, features) -> the same."""
        out = self.second(self.first(x, train=train), train=train)
        return x + out if self.shortcut else out


class C2f(nnx.Module):
    """YOLOv8's stage: 1x1 block, halved; n bottlenecks on the second half; 1x1 block of both halves and all outputs.

    Args:
        features_in, features_out: channels.
        count: n.
        shortcut: in the bottlenecks.
        block: of every `ConvBlock`: norm, epsilon, momentum.
        rngs: for the initial values.
    """

    NAMES: ClassVar = {"enter": "cv1", "leave": "cv2", "block": "m"}

    def __init__(
        self,
        features_in: int,
        features_out: int,
        count: int = 1,
        *,
        shortcut: bool = False,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        half = features_out // 2
        self.enter = ConvBlock(features_in, 2 * half, rngs=rngs, **block)
        self.leave = ConvBlock((2 + count) * half, features_out, rngs=rngs, **block)
        number(self, [Bottleneck(half, shortcut=shortcut, rngs=rngs, **block) for _ in range(count)])

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, in) -> (batch, height, width, out)."""
        parts = jnp.split(self.enter(x, train=train), 2, axis=-1)
        for block in numbered(self):
            parts.append(block(parts[-1], train=train))
        return self.leave(jnp.concatenate(parts, axis=-1), train=train)


class ReversedBlock(nnx.Module):
    """x + 3x3 block of a `RepConv` of x: DAMO-YOLO's basic block, hidden ratio 1."""

    NAMES: ClassVar = {"first": "conv2", "second": "conv1"}  # the original counts from the back

    def __init__(self, features: int, *, rngs: nnx.Rngs, **block: Any):
        self.first = RepConv(features, features, rngs=rngs, **block)
        self.second = ConvBlock(features, features, 3, rngs=rngs, **block)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, features) -> the same."""
        return x + self.second(self.first(x, train=train), train=train)


class CSPStage(nnx.Module):
    """DAMO-YOLO's stage: two 1x1 blocks; n reversed blocks on the second; 1x1 block of the first and all outputs."""

    NAMES: ClassVar = {"skip": "conv1", "enter": "conv2", "leave": "conv3", "block": "convs"}

    def __init__(self, features_in: int, features_out: int, count: int = 1, *, rngs: nnx.Rngs, **block: Any):
        half = features_out // 2
        self.skip = ConvBlock(features_in, half, rngs=rngs, **block)
        self.enter = ConvBlock(features_in, half, rngs=rngs, **block)
        self.leave = ConvBlock((1 + count) * half, features_out, rngs=rngs, **block)
        number(self, [ReversedBlock(half, rngs=rngs, **block) for _ in range(count)])

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, in) -> (batch, height, width, out)."""
        skip, y = side_by_side(self.skip, self.enter, x, train=train)
        parts = [skip]
        for block in numbered(self):
            y = block(y, train=train)
            parts.append(y)
        return self.leave(jnp.concatenate(parts, axis=-1), train=train)


def max_pool(x: Array, size: int) -> Array:
    """Maximum over size x size at stride 1, with a border that never wins: over rows, then over columns.

    Written as maxima of shifted maps, which have derivatives of every order.
    """
    lowest = jnp.asarray(-jnp.inf, x.dtype)
    for axis in (1, 2):
        reach = min(size // 2, x.shape[axis] - 1)
        widths = [(reach, reach, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
        padded = lax.pad(x, lowest, widths)
        shifts = [lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(2 * reach + 1)]
        x = functools.reduce(jnp.maximum, shifts)
    return x


def halving_pool(x: Array) -> Array:
    """Maximum over 2 x 2 at stride 2."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


class SPPF(nnx.Module):
    """1x1 block to half the channels, three 5x5 maxima one of the other, 1x1 block of all four."""

    NAMES: ClassVar = {"enter": "cv1", "leave": "cv2"}

    def __init__(self, features_in: int, features_out: int, size: int = 5, *, rngs: nnx.Rngs, **block: Any):
        half = features_in // 2
        self.enter = ConvBlock(features_in, half, rngs=rngs, **block)
        self.leave = ConvBlock(4 * half, features_out, rngs=rngs, **block)
        self.size = size

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, in) -> (batch, height, width, out)."""
        parts = [self.enter(x, train=train)]
        for _ in range(3):
            parts.append(max_pool(parts[-1], self.size))
        return self.leave(jnp.concatenate(parts, axis=-1), train=train)


class Routed(nnx.Module):
    """Bi-level routing attention on a feature map, without normalisation.

    It replaces the map, as the original detectors have it; with `residual` it is added. Maps of any size: padded to a
    multiple of `regions`.

    Args:
        features: channels.
        regions: per side, S.
        heads: of the token attention.
        chosen: how many regions a region looks at, k.
        residual: x + attention(x).
        attention: other options of `biformer.RoutingAttention`.
        rngs: for the initial values.
    """

    def __init__(
        self,
        features: int,
        *,
        regions: int = 8,
        heads: int = 8,
        chosen: int = 4,
        residual: bool = False,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        options = {"side_dwconv": 3, "auto_pad": True, **attention}
        self.attention = RoutingAttention(features, heads, regions, topk=chosen, rngs=rngs, **options)
        self.residual = residual

    NAMES: ClassVar = {"attention": ""}

    def __call__(
        self, x: Array, *, train: bool = False, routing_index: Array | None = None, return_routing: bool = False
    ) -> Array | tuple[Array, Routing]:
        """(batch, height, width, features) -> the same, and the `Routing` if asked for."""
        found: Any = self.attention(x, routing_index=routing_index, return_routing=return_routing)
        out, routing = found if return_routing else (found, None)
        out = x + out if self.residual else out
        return (out, routing) if return_routing else out  # type: ignore[return-value]


class SPPCSPC(nnx.Module):
    """YOLOv7's pyramid of pools in a cross-stage partial block, with routed attention at its end.

        a = 1x1(3x3(1x1(x))),    b = 3x3(1x1[a, max5 a, max9 a, max13 a]),    out = attention(1x1[b, 1x1(x)])

    Args:
        features_in, features_out: channels; all inner ones are features_out.
        attention: options of `Routed`, here with 7 x 7 regions; None: YOLOv7's own block without it.
        block: of every `ConvBlock`: norm, epsilon, momentum.
        rngs: for the initial values.
    """

    NAMES: ClassVar = {
        "enter": "cv1", "side": "cv2", "widen": "cv3", "narrow": "cv4", "pooled": "cv5", "mix": "cv6", "leave": "cv7",
        "attention": "att",
    }  # fmt: skip

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        attention: Mapping[str, Any] | None = ORIGINAL,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        make = lambda i, size=1, n=1: ConvBlock(n * i, features_out, size, rngs=rngs, **block)  # noqa: E731
        self.enter, self.side = make(features_in), make(features_in)
        self.widen, self.narrow = make(features_out, 3), make(features_out)
        self.pooled, self.mix, self.leave = make(features_out, n=4), make(features_out, 3), make(features_out, n=2)
        options = {"regions": 7, **attention} if attention is not None else None
        self.attention = Routed(features_out, rngs=rngs, **options) if options is not None else None

    def __call__(
        self, x: Array, *, train: bool = False, routing_index: Array | None = None, return_routing: bool = False
    ) -> Any:
        """(batch, height, width, in) -> (batch, height, width, out), and the `Routing` if asked for."""
        a, side = side_by_side(self.enter, self.side, x, train=train)
        a = self.narrow(self.widen(a, train=train), train=train)
        pools = [a]
        for _ in range(3):  # the maximum of 5 x 5 maxima is that of 9 x 9
            pools.append(max_pool(pools[-1], 5))
        b = self.mix(self.pooled(jnp.concatenate(pools, axis=-1), train=train), train=train)
        out = self.leave(jnp.concatenate([b, side], axis=-1), train=train)
        if self.attention is None:
            return (out, None) if return_routing else out
        return self.attention(out, routing_index=routing_index, return_routing=return_routing)


class ELAN(nnx.Module):
    """YOLOv7's stage: two 1x1 blocks, `depth` 3x3 blocks one of the other, 1x1 block of some or all of their outputs.

    Args:
        features_in, features_out: channels.
        enter: of the 1x1 blocks.
        inner: of the 3x3 blocks.
        depth: of the 3x3 blocks.
        every: take only every so-manyth of the 3x3 blocks' outputs, from the last back (2 in the backbone, 1 in the
            neck).
        block: of every `ConvBlock`: norm, epsilon, momentum.
        rngs: for the initial values.
    """

    NAMES: ClassVar = {
        "skip": "0",
        "enter": "1",
        "block": "",
        "leave": "7",
    }  # rows of the original, counted from this one's

    def __init__(
        self, features_in: int, features_out: int, *, enter: int, inner: int, depth: int, every: int, rngs: nnx.Rngs,
        **block: Any,
    ):  # fmt: skip
        self.skip = ConvBlock(features_in, enter, rngs=rngs, **block)
        self.enter = ConvBlock(features_in, enter, rngs=rngs, **block)
        widths = [enter, *[inner] * depth]
        number(self, [ConvBlock(widths[i], inner, 3, rngs=rngs, **block) for i in range(depth)])
        self.every = every
        taken = len(range(depth - 1, -1, -every))
        self.leave = ConvBlock(2 * enter + taken * inner, features_out, rngs=rngs, **block)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, in) -> (batch, height, width, out)."""
        skip, y = side_by_side(self.skip, self.enter, x, train=train)
        outputs = [y]
        for block in numbered(self):
            outputs.append(block(outputs[-1], train=train))
        taken = outputs[-1 : 0 : -self.every]
        return self.leave(jnp.concatenate([*taken, y, skip], axis=-1), train=train)


class Halving(nnx.Module):
    """YOLOv7's way to half the side: 1x1 block of the 2x2 maxima, beside a 1x1 and a 3x3 block of stride 2."""

    NAMES: ClassVar = {"pooled": "1", "enter": "2", "strided": "3"}  # rows of the original, counted from this one's

    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs, **block: Any):
        half = features_out // 2
        self.pooled = ConvBlock(features_in, half, rngs=rngs, **block)
        self.enter = ConvBlock(features_in, half, rngs=rngs, **block)
        self.strided = ConvBlock(half, half, 3, 2, rngs=rngs, **block)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, height, width, in) -> (batch, height / 2, width / 2, out)."""
        pooled = self.pooled(halving_pool(x), train=train)
        return jnp.concatenate([self.strided(self.enter(x, train=train), train=train), pooled], axis=-1)


class Head(nnx.Module):
    """The decoupled head of one level: two 3x3 blocks and a 1x1 convolution for the boxes' bins, the same for classes.

    Args:
        features_in: channels of the level.
        classes: C.
        bins: R, of each of the four sides.
        box_width, class_width: channels of the two branches.
        class_bias: where a class's logit starts.
        block: of every `ConvBlock`: norm, epsilon, momentum.
        rngs: for the initial values.
    """

    NAMES: ClassVar = {
        "box1": "cv2.{level}.0", "box2": "cv2.{level}.1", "box3": "cv2.{level}.2",
        "class1": "cv3.{level}.0", "class2": "cv3.{level}.1", "class3": "cv3.{level}.2",
    }  # fmt: skip

    def __init__(
        self, features_in: int, classes: int, bins: int, *, box_width: int, class_width: int, class_bias: float,
        rngs: nnx.Rngs, **block: Any,
    ):  # fmt: skip
        self.box1 = ConvBlock(features_in, box_width, 3, rngs=rngs, **block)
        self.box2 = ConvBlock(box_width, box_width, 3, rngs=rngs, **block)
        self.box3 = Conv(box_width, 4 * bins, 1, stride=1, padding=0, rngs=rngs)
        self.class1 = ConvBlock(features_in, class_width, 3, rngs=rngs, **block)
        self.class2 = ConvBlock(class_width, class_width, 3, rngs=rngs, **block)
        self.class3 = Conv(class_width, classes, 1, stride=1, padding=0, rngs=rngs)
        self.box3.bias = nnx.Param(jnp.ones(4 * bins, jnp.float32))
        self.class3.bias = nnx.Param(jnp.full(classes, class_bias, jnp.float32))

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(batch, rows, columns, in) -> (batch, rows, columns, 4 bins + classes)."""
        box, label = side_by_side(self.box1, self.class1, x, train=train)
        box = self.box3(self.box2(box, train=train))
        label = self.class3(self.class2(label, train=train))
        return jnp.concatenate([box, label], axis=-1)
