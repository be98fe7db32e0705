"""The attention modules of BiFormer: bi-level routing, full, full with local enhancement, and convolution."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from bilevel import state
from bilevel.applications.biformer.attend import Backend, full_attention, routed_attention
from bilevel.applications.layers import DepthwiseConv, linear, pointwise

HEADS_OF_FULL_ATTENTION = 8


@state
class Routing:
    """Where the query regions look.

    index: the chosen key regions of every query region, (batch, regions, k).
    weight: softmax over the chosen logits, (batch, regions, k); multiplies keys and values in soft routing.
    logits: affinity of every pair of regions, (batch, regions, regions).
    In a stage's routing all three have the blocks as an additional leading axis.
    """

    index: Array
    weight: Array
    logits: Array


class RoutingAttention(nnx.Module):
    """Bi-level routing attention (Zhu et al., "BiFormer", CVPR 2023).

    With the map cut into regions (n_win x n_win of them), q^r and k^r the mean query and key of a region:

        A^r = scale q^r (k^r)^T,    I = top-k of A^r, row-wise             region to region, no gradient
        out = softmax(scale q [k of I]^T) [v of I] + DWConv(v)             token to token, per head
        out W_o

    Gradients reach q and k through the token attention alone, as the routing is piecewise constant. Both scales are
    qk_dim^-1/2: the full width, not the width of a head.

    Args:
        dim: channels C.
        num_heads: heads of the token attention; the routing does not know of heads.
        n_win: regions per side, S.
        qk_dim: width of queries and keys, C by default.
        qk_scale: both scales; qk_dim^-1/2 by default.
        topk: how many regions a region looks at, k.
        side_dwconv: kernel size of the local enhancement DWConv(v) (LePE); 0 for none.
        auto_pad: pad height and width with zeros, at the bottom and right, to a multiple of n_win, before the
            projection: padding tokens have q, k and v equal to the bias and take part in pooling, routing and
            attention. Without it sizes have to be divisible.
        kv_downsample_mode: "identity", or pooling of keys and values within their region: "avgpool" and "maxpool" by
            kv_downsample_ratio, "ada_avgpool" and "ada_maxpool" to kv_per_win x kv_per_win. Routing uses the unpooled.
        param_attention: "qkvo", or "qkv" without the output projection.
        soft_routing: multiply chosen keys and values by the softmax of their routing logits.
        diff_routing: let gradients through the routing weights (with soft routing; hard routing has no gradient).
        param_routing: a learned linear map, shared by q^r and k^r, before the routing (with diff_routing).
        layout: "legacy", what the published models use, or "refactored", the authors' second version: pads after the
            projection with zeros, means over real tokens only, region size (H // n_win, W // n_win), and so maybe more
            than n_win regions per side; routing logits are unscaled. The two agree where n_win divides the map.
        backend: see `bilevel.applications.biformer.attend`.
        rngs: for the initial values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        *,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        kv_downsample_mode: str = "identity",
        kv_downsample_ratio: int = 4,
        kv_per_win: int = 4,
        param_attention: str = "qkvo",
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        layout: Literal["legacy", "refactored"] = "legacy",
        backend: Backend = "auto",
        rngs: nnx.Rngs,
    ):
        qk_dim = qk_dim or dim
        if qk_dim % num_heads or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim} and qk_dim={qk_dim}.")
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f'param_attention={param_attention!r} is neither "qkvo" nor "qkv".')
        if layout not in ("legacy", "refactored"):
            raise ValueError(f'layout={layout!r} is neither "legacy" nor "refactored".')
        if kv_downsample_mode not in ("identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool"):
            raise ValueError(
                f"kv_downsample_mode={kv_downsample_mode!r} is none of identity, avgpool, maxpool, ada_avgpool, "
                "ada_maxpool."
            )
        if param_routing and not diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True: its weights have no gradient otherwise.")
        if diff_routing and not soft_routing:
            raise NotImplementedError("diff_routing=True needs soft_routing=True: the choice alone has no gradient.")
        if layout == "refactored" and (qk_dim != dim or soft_routing or kv_downsample_mode != "identity"):
            raise ValueError('layout="refactored" has qk_dim = dim, no soft routing and no pooling; use "legacy".')
        self.dim, self.qk_dim, self.num_heads, self.n_win, self.topk = dim, qk_dim, num_heads, n_win, topk
        self.scale = qk_scale or qk_dim**-0.5
        self.auto_pad, self.layout, self.backend = auto_pad, layout, backend
        self.pooling, self.pool_ratio, self.pool_size = kv_downsample_mode, kv_downsample_ratio, kv_per_win
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        project = linear if layout == "legacy" else pointwise
        self.qkv = project(dim, 2 * qk_dim + dim, rngs=rngs)
        self.wo = project(dim, dim, rngs=rngs) if param_attention == "qkvo" else None
        self.lepe = DepthwiseConv(dim, side_dwconv, rngs=rngs) if side_dwconv > 0 else None
        self.router = linear(qk_dim, qk_dim, rngs=rngs) if param_routing else None

    def __call__(
        self, x: Array, *, routing_index: Array | None = None, return_routing: bool = False
    ) -> Array | tuple[Array, Routing]:
        """(batch, height, width, dim) -> the same, and the `Routing` if asked for.

        `routing_index`, integers (batch, regions, k), replaces the top-k choice: a frozen routing.
        """
        height, width = x.shape[1:3]
        rows, columns, h, w = self._regions(height, width)
        bottom, right = rows * h - height, columns * w - width
        if self.layout == "legacy":
            x = _pad(x, bottom, right)
        q, k, v = jnp.split(self.qkv(x), (self.qk_dim, 2 * self.qk_dim), axis=-1)
        local = self.lepe(v) if self.lepe is not None else None
        if self.layout == "refactored":
            q, k, v = (_pad(a, bottom, right) for a in (q, k, v))

        everything = min(self.topk, rows * columns) == rows * columns and not self.soft_routing
        if everything and routing_index is None and not return_routing and self.backend == "auto":
            routing = None  # who looks at all regions needs no choice
            index, weight = jnp.zeros((x.shape[0], rows * columns, rows * columns), jnp.int32), None
        else:
            routing = self._route(q, k, (rows, columns, h, w), (height, width), routing_index)
            index, weight = routing.index, routing.weight if self.soft_routing else None

        out = routed_attention(
            _to_regions(q, rows, columns, self.num_heads),
            _to_regions(self._pool(k, rows, columns), rows, columns, self.num_heads),
            _to_regions(self._pool(v, rows, columns), rows, columns, self.num_heads),
            index,
            weight,
            scale=self.scale,
            backend=self.backend,
        )
        out = _from_regions(out, rows, columns, h, w)
        if self.layout == "refactored":
            out = out[:, :height, :width]
        if local is not None:
            out = out + local
        if self.wo is not None:
            out = self.wo(out)
        out = out[:, :height, :width]
        return (out, routing) if return_routing else out  # type: ignore[return-value]

    def _regions(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Rows and columns of regions, and a region's height and width, both padded up where that is allowed."""
        n = self.n_win
        if self.layout == "refactored":
            h, w = height // n, width // n
            if not h or not w:
                raise ValueError(
                    f"A map of {height} x {width} is too small for n_win={n}: a region would have no token."
                )
            return math.ceil(height / h), math.ceil(width / w), h, w
        if not self.auto_pad and (height % n or width % n):
            raise ValueError(
                f"A map of {height} x {width} does not divide into {n} x {n} regions. "
                "Resize the input, or set auto_pad=True."
            )
        return n, n, math.ceil(height / n), math.ceil(width / n)

    def _route(
        self, q: Array, k: Array, grid: tuple[int, int, int, int], valid: tuple[int, int], index: Array | None
    ) -> Routing:
        rows, columns, h, w = grid
        if not self.diff_routing:
            q, k = lax.stop_gradient((q, k))

        def mean(a: Array) -> Array:
            a = a.reshape(a.shape[0], rows, h, columns, w, -1)
            if self.layout == "legacy":
                return a.mean((2, 4)).reshape(a.shape[0], rows * columns, -1)
            real_rows = jnp.minimum(h, valid[0] - h * jnp.arange(rows))
            real_columns = jnp.minimum(w, valid[1] - w * jnp.arange(columns))
            count = (real_rows[:, None] * real_columns)[..., None].astype(a.dtype)
            return (a.sum((2, 4)) / count).reshape(a.shape[0], rows * columns, -1)

        q, k = mean(q), mean(k)
        if self.router is not None:
            q, k = self.router(q), self.router(k)
        if self.layout == "legacy":
            q = q * jnp.asarray(self.scale, q.dtype)
        # A choice is not continuous: full precision, also where matrix products are fast and rough by default.
        logits = jnp.einsum("brc,bsc->brs", q, k, precision=lax.Precision.HIGHEST)
        if self.topk > logits.shape[-1]:
            raise ValueError(f"topk={self.topk} of {logits.shape[-1]} regions; choose at most all of them.")
        if index is None:
            top, index = lax.top_k(logits, self.topk)
        else:
            top = jnp.take_along_axis(logits, index, axis=-1)
        return Routing(index=index, weight=jax.nn.softmax(top, axis=-1), logits=logits)

    def _pool(self, a: Array, rows: int, columns: int) -> Array:
        """Keys or values pooled within their region, still as a map."""
        if self.pooling == "identity" or (self.pooling in ("avgpool", "maxpool") and self.pool_ratio <= 1):
            return a
        batch, height, width, channels = a.shape
        h, w = height // rows, width // columns
        a = a.reshape(batch, rows, h, columns, w, channels)
        if self.pooling.startswith("ada_"):
            row_bins, column_bins = _adaptive_bins(h, self.pool_size), _adaptive_bins(w, self.pool_size)
        else:
            row_bins, column_bins = _bins(h, self.pool_ratio), _bins(w, self.pool_ratio)
        reduce = jnp.mean if self.pooling.endswith("avgpool") else jnp.max
        pooled = jnp.stack(
            [
                jnp.stack([reduce(a[:, :, top:bottom, :, left:right], (2, 4)) for left, right in column_bins], axis=3)
                for top, bottom in row_bins
            ],
            axis=2,
        )  # (batch, rows, bins, columns, bins, channels)
        return pooled.reshape(batch, rows * len(row_bins), columns * len(column_bins), channels)


def _bins(length: int, ratio: int) -> list[tuple[int, int]]:
    if length < ratio:
        raise ValueError(f"A region side of {length} tokens cannot be pooled by {ratio}.")
    return [(start, start + ratio) for start in range(0, length - ratio + 1, ratio)]


def _adaptive_bins(length: int, bins: int) -> list[tuple[int, int]]:
    """The bins of adaptive pooling; they overlap where `bins` does not divide the length."""
    return [(i * length // bins, -(-(i + 1) * length // bins)) for i in range(bins)]


def _pad(x: Array, bottom: int, right: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def _to_regions(x: Array, rows: int, columns: int, heads: int) -> Array:
    """(B, H, W, C) -> (B, heads, regions, tokens, C / heads)."""
    batch, height, width, channels = x.shape
    h, w = height // rows, width // columns
    x = x.reshape(batch, rows, h, columns, w, heads, channels // heads)
    return x.transpose(0, 5, 1, 3, 2, 4, 6).reshape(batch, heads, rows * columns, h * w, channels // heads)


def _from_regions(x: Array, rows: int, columns: int, h: int, w: int) -> Array:
    """(B, heads, regions, tokens, width) -> (B, H, W, C)."""
    batch, heads, *_, d = x.shape
    x = x.reshape(batch, heads, rows, columns, h, w, d)
    return x.transpose(0, 2, 4, 3, 5, 1, 6).reshape(batch, rows * h, columns * w, heads * d)


class FullAttention(nnx.Module):
    """Attention among all tokens, with 8 heads, no bias in q, k and v, and scale (C / 8)^-1/2.

    With `side_dwconv` > 0 a depthwise convolution of the *input* (not of v) is added before the output projection, as
    in the last stage of BiFormer.
    """

    def __init__(self, dim: int, *, side_dwconv: int = 0, rngs: nnx.Rngs):
        if dim % HEADS_OF_FULL_ATTENTION:
            raise ValueError(f"Full attention has {HEADS_OF_FULL_ATTENTION} heads, which must divide dim={dim}.")
        self.dim = dim
        self.qkv = linear(dim, 3 * dim, bias=False, rngs=rngs)
        self.proj = linear(dim, dim, rngs=rngs)
        self.lepe = DepthwiseConv(dim, side_dwconv, rngs=rngs) if side_dwconv > 0 else None

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, dim) -> the same."""
        batch, height, width, _ = x.shape
        d = self.dim // HEADS_OF_FULL_ATTENTION
        qkv = self.qkv(x).reshape(batch, height * width, 3, HEADS_OF_FULL_ATTENTION, d)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        out = full_attention(q, k, v, scale=d**-0.5)
        out = out.transpose(0, 2, 1, 3).reshape(batch, height, width, self.dim)
        if self.lepe is not None:
            out = out + self.lepe(x)
        return self.proj(out)


class ConvAttention(nnx.Module):
    """In place of attention: 1x1 convolution, 5x5 depthwise convolution, 1x1 convolution."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.project_in = pointwise(dim, dim, rngs=rngs)
        self.mix = DepthwiseConv(dim, 5, rngs=rngs)
        self.project_out = pointwise(dim, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, dim) -> the same."""
        return self.project_out(self.mix(self.project_in(x)))


def make_attention(topk: int, dim: int, *, side_dwconv: int, rngs: nnx.Rngs, **routing: Any) -> nnx.Module:
    """The attention of a `topk` code: k > 0 routing, 0 convolution, -1 full, -2 full with a convolution."""
    if topk > 0:
        return RoutingAttention(dim, topk=topk, side_dwconv=side_dwconv, rngs=rngs, **routing)
    if topk == 0:
        return ConvAttention(dim, rngs=rngs)
    if topk in (-1, -2):
        return FullAttention(dim, side_dwconv=side_dwconv if topk == -2 else 0, rngs=rngs)
    raise ValueError(f"topk={topk} is no attention: k > 0, 0 (convolution), -1 (full) or -2 (full with a convolution).")
