"""BiFormer: four stages of blocks with bi-level routing attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bilevel.applications.biformer.attend import Backend
from bilevel.applications.biformer.attention import Routing, RoutingAttention, make_attention
from bilevel.applications.layers import BatchNorm, Conv, DepthwiseConv, LayerNorm, drop_path, gelu, linear

STAGES = 4
UNROLLED = 1  # a stage of up to so many blocks is written out; a longer one is scanned


class MLP(nnx.Module):
    """Linear, optional 3x3 depthwise convolution, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, *, dwconv: bool, rngs: nnx.Rngs):
        self.fc1 = linear(dim, hidden, rngs=rngs)
        self.dwconv = DepthwiseConv(hidden, 3, rngs=rngs) if dwconv else None
        self.fc2 = linear(hidden, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """(batch, height, width, dim) -> the same."""
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x)
        return self.fc2(gelu(x))


class Block(nnx.Module):
    """Positional convolution, attention, MLP:

        x = x + DWConv(x)
        x = x + DropPath(gamma1 Attention(LN(x)))
        x = x + DropPath(gamma2 MLP(LN(x)))

    or, with pre_norm=False, x = LN(x + ...) in the last two lines. gamma only with layer_scale_init_value > 0.
    """

    def __init__(
        self,
        dim: int,
        *,
        topk: int,
        mlp_ratio: float,
        mlp_dwconv: bool,
        side_dwconv: int,
        before_attn_dwconv: int,
        layer_scale_init_value: float,
        pre_norm: bool,
        rngs: nnx.Rngs,
        **routing: Any,
    ):
        self.pos_embed = DepthwiseConv(dim, before_attn_dwconv, rngs=rngs) if before_attn_dwconv > 0 else None
        self.norm1 = LayerNorm(dim)
        self.attn = make_attention(topk, dim, side_dwconv=side_dwconv, rngs=rngs, **routing)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(mlp_ratio * dim), dwconv=mlp_dwconv, rngs=rngs)
        scaled = layer_scale_init_value > 0
        self.gamma1 = nnx.Param(jnp.full(dim, float(layer_scale_init_value))) if scaled else None
        self.gamma2 = nnx.Param(jnp.full(dim, float(layer_scale_init_value))) if scaled else None
        self.pre_norm = pre_norm

    def __call__(
        self, x: Array, *, rate: Array | None, key: Array | None, routing_index: Array | None, return_routing: bool
    ) -> tuple[Array, Routing | None]:
        """(batch, height, width, dim) -> the same, and the routing if asked for and there is one."""
        routing: Routing | None = None

        def attention(x: Array) -> Array:
            nonlocal routing
            if not isinstance(self.attn, RoutingAttention):
                return self.attn(x)  # type: ignore[operator]
            out = self.attn(x, routing_index=routing_index, return_routing=return_routing)
            if return_routing:
                out, routing = out
            return out  # type: ignore[return-value]

        keys = jax.random.split(key) if key is not None else (None, None)

        def residual(x: Array, branch: Any, norm: Any, gamma: Any, key: Array | None) -> Array:
            out = branch(norm(x) if self.pre_norm else x)
            if gamma is not None:
                out = gamma[...] * out
            if key is not None:
                out = drop_path(out, rate, key)  # type: ignore[arg-type]
            return x + out if self.pre_norm else norm(x + out)

        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = residual(x, attention, self.norm1, self.gamma1, keys[0])
        x = residual(x, self.mlp, self.norm2, self.gamma2, keys[1])
        return x, routing


class Stage(nnx.Module):
    """Equal blocks, whose parameters are stacked along a leading axis, applied one after the other.

    A long stage is one `lax.scan`, so that compile time does not grow with depth. `remat` recomputes a block's
    activations in the backward pass instead of keeping them.
    """

    def __init__(self, depth: int, dim: int, *, remat: bool = False, rngs: nnx.Rngs, **block: Any):
        blocks = [nnx.split(Block(dim, rngs=rngs, **block)) for _ in range(depth)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(values for _, values in blocks))
        self.blocks = nnx.merge(blocks[0][0], stacked)
        self.depth, self.dim, self.remat = depth, dim, remat

    def __call__(
        self, x: Array, *, rates: Array | None, key: Array | None, routing_index: Array | None, return_routing: bool
    ) -> tuple[Array, Routing | None]:
        """(batch, height, width, dim) -> the same, and the blocks' routings stacked along a leading axis."""
        graph, stacked = nnx.split(self.blocks)
        keys = jax.random.split(key, self.depth) if key is not None else None

        def body(x: Array, step: Any) -> tuple[Array, Routing | None]:
            values, rate, key, index = step
            block = nnx.merge(graph, values)
            return block(x, rate=rate, key=key, routing_index=index, return_routing=return_routing)

        if self.remat:
            body = jax.checkpoint(body)
        steps = (stacked, rates, keys, routing_index)
        if self.depth > UNROLLED:
            return jax.lax.scan(body, x, steps)
        routings = []
        for i in range(self.depth):
            x, routing = body(x, jax.tree.map(lambda a: a[i], steps))
            routings.append(routing)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)


class Downsample(nnx.Module):
    """To half the side and the next width.

    "overlap": two (stem) or one 3x3 convolutions of stride 2, each with batch normalisation, GELU between the two.
    "patch": a 4x4 convolution of stride 4 and batch normalisation (stem), or normalisation and a 2x2 one of stride 2.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        stem: bool,
        kind: Literal["overlap", "patch"],
        momentum: float = 0.1,
        rngs: nnx.Rngs,
    ):
        self.kind, self.stem = kind, stem
        if kind == "overlap" and stem:
            self.conv1 = Conv(dim_in, dim_out // 2, 3, stride=2, padding=1, rngs=rngs)
            self.norm1 = BatchNorm(dim_out // 2, momentum=momentum)
            self.conv2 = Conv(dim_out // 2, dim_out, 3, stride=2, padding=1, rngs=rngs)
            self.norm2 = BatchNorm(dim_out, momentum=momentum)
        elif kind == "overlap":
            self.conv = Conv(dim_in, dim_out, 3, stride=2, padding=1, rngs=rngs)
            self.norm = BatchNorm(dim_out, momentum=momentum)
        elif kind == "patch":
            size = 4 if stem else 2
            self.conv = Conv(dim_in, dim_out, size, stride=size, padding=0, rngs=rngs)
            self.norm = BatchNorm(dim_out if stem else dim_in, momentum=momentum)
        else:
            raise ValueError(f'downsample={kind!r} is neither "overlap" nor "patch".')

    def __call__(self, x: Array, *, train: bool) -> Array:
        """(batch, height, width, in) -> (batch, height / 2 or 4, width / 2 or 4, out)."""
        if self.kind == "overlap" and self.stem:
            x = gelu(self.norm1(self.conv1(x), train=train))
            return self.norm2(self.conv2(x), train=train)
        if self.kind == "patch" and not self.stem:
            return self.conv(self.norm(x, train=train))
        return self.norm(self.conv(x), train=train)


def _per_stage(name: str, value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * STAGES
    if len(values) != STAGES:
        raise ValueError(f"{name} has {len(values)} entries; BiFormer has {STAGES} stages.")
    return values


class BiFormer(nnx.Module):
    """BiFormer (Zhu, Wang, Ke, Zhang, Lau, "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023).

    Four times: downsample, then a stage of equal blocks; batch normalisation, mean over the map, linear classifier.
    Arguments have the authors' names, so that a configuration of theirs is one of ours. What takes one value per stage
    also takes a single one for all. Images are NHWC.

    Args:
        depth: blocks per stage.
        embed_dim: channels per stage.
        in_chans, num_classes: of the images and the classifier.
        mlp_ratios: hidden width of the MLPs over the channels.
        head_dim: width of a head; stage i has qk_dims[i] // head_dim heads (full attention always has 8).
        qk_dims: width of queries and keys, the stage's channels by default.
        topks: per stage, the number of regions a region looks at, or 0, -1, -2: see `make_attention`.
        n_win: regions per side.
        side_dwconv, before_attn_dwconv: kernel sizes of the local enhancement and the positional convolution; 0: none.
        layer_scale_init_value, pre_norm, mlp_dwconv: see `Block` and `MLP`.
        drop_path_rate: of the last block; it grows linearly from 0 over all blocks.
        downsample: "overlap" or "patch" (the layout of Swin-T), see `Downsample`.
        dense: for detection and segmentation. Instead of the classifier a layer normalisation per stage, and the output
            is the tuple of the four normalised feature maps (the unnormalised ones are passed on).
        norm_momentum: of batch normalisation, how far its running statistics move per batch in training. With 1 they
            are those of the last batch.
        remat: recompute activations in the backward pass, block by block.
        backend, qk_scale, auto_pad, kv_downsample_mode, kv_downsample_ratios, kv_per_wins, param_attention,
            soft_routing, diff_routing, param_routing, layout: see `RoutingAttention`.
        rngs: for the initial values, `nnx.Rngs(0)` say.
    """

    def __init__(
        self,
        depth: Sequence[int] = (2, 2, 8, 2),
        embed_dim: Sequence[int] = (64, 128, 256, 512),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        mlp_ratios: float | Sequence[float] = 3,
        head_dim: int = 32,
        qk_dims: Sequence[int | None] | None = None,
        topks: int | Sequence[int] = (1, 4, 16, -2),
        n_win: int | Sequence[int] = 7,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        layer_scale_init_value: float = -1,
        pre_norm: bool = True,
        mlp_dwconv: bool = False,
        drop_path_rate: float = 0.0,
        downsample: Literal["overlap", "patch"] = "overlap",
        dense: bool = False,
        norm_momentum: float = 0.1,
        remat: bool = False,
        backend: Backend = "auto",
        qk_scale: float | None = None,
        auto_pad: bool = False,
        kv_downsample_mode: str = "identity",
        kv_downsample_ratios: int | Sequence[int] = (4, 2, 1, 1),
        kv_per_wins: int | Sequence[int] = (2, 2, -1, -1),
        param_attention: str = "qkvo",
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        layout: Literal["legacy", "refactored"] = "legacy",
        rngs: nnx.Rngs,
    ):
        depth, embed_dim = _per_stage("depth", depth), _per_stage("embed_dim", embed_dim)
        qk = [q or c for q, c in zip(_per_stage("qk_dims", qk_dims), embed_dim, strict=True)]
        ratios, topks, n_wins = (
            _per_stage("mlp_ratios", mlp_ratios),
            _per_stage("topks", topks),
            _per_stage("n_win", n_win),
        )
        pool_ratios = _per_stage("kv_downsample_ratios", kv_downsample_ratios)
        pool_sizes = _per_stage("kv_per_wins", kv_per_wins)
        self.depth, self.embed_dim, self.dense, self.downsample = depth, embed_dim, dense, downsample
        self.drop_path_rate = float(drop_path_rate)
        for i in range(STAGES):
            dim_in = in_chans if i == 0 else embed_dim[i - 1]
            self._set(
                "down",
                i,
                Downsample(dim_in, embed_dim[i], stem=i == 0, kind=downsample, momentum=norm_momentum, rngs=rngs),
            )
            routing: dict[str, Any] = {}
            if topks[i] > 0:
                routing = {
                    "num_heads": qk[i] // head_dim,
                    "n_win": n_wins[i],
                    "qk_dim": qk[i],
                    "qk_scale": qk_scale,
                    "auto_pad": auto_pad,
                    "kv_downsample_mode": kv_downsample_mode,
                    "kv_downsample_ratio": pool_ratios[i],
                    "kv_per_win": pool_sizes[i],
                    "param_attention": param_attention,
                    "soft_routing": soft_routing,
                    "diff_routing": diff_routing,
                    "param_routing": param_routing,
                    "layout": layout,
                    "backend": backend,
                }
            stage = Stage(
                depth[i],
                embed_dim[i],
                topk=topks[i],
                mlp_ratio=ratios[i],
                mlp_dwconv=mlp_dwconv,
                side_dwconv=side_dwconv,
                before_attn_dwconv=before_attn_dwconv,
                layer_scale_init_value=layer_scale_init_value,
                pre_norm=pre_norm,
                remat=remat,
                rngs=rngs,
                **routing,
            )
            self._set("stage", i, stage)
            if dense:
                self._set("out_norm", i, LayerNorm(embed_dim[i]))
        self.norm = None if dense else BatchNorm(embed_dim[-1], momentum=norm_momentum)
        self.head = None if dense or not num_classes else linear(embed_dim[-1], num_classes, rngs=rngs)

    def _set(self, name: str, i: int, module: nnx.Module) -> None:
        setattr(self, f"{name}{i}", module)

    def drop_path_rates(self) -> Array:
        """The drop-path rate of every block, in order: from 0 to `drop_path_rate`."""
        return jnp.linspace(0.0, self.drop_path_rate, sum(self.depth))

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        key: Array | None = None,
        drop_path_rates: Array | None = None,
        routing_index: Sequence[Array | None] | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Classify, or with dense=True extract feature maps.

        Args:
            images: (batch, height, width, in_chans).
            train: normalise by the batch's statistics (and move the running ones), and drop paths.
            key: for drop path; needed in training if any rate is above 0.
            drop_path_rates: one per block instead of `drop_path_rates()`.
            routing_index: per stage, the chosen regions (depth, batch, regions, k), or None to choose by top-k. It
                freezes the routing, which is otherwise a discontinuous function of the parameters.
            return_routing: also return a list of the four stages' `Routing`, None for a stage without routing.

        Returns:
            Logits (batch, num_classes), the pooled features (batch, channels) if num_classes is 0, or four maps with
            dense=True; with return_routing a pair with the routings.
        """
        rates = None
        if train and key is not None:
            rates = self.drop_path_rates() if drop_path_rates is None else jnp.asarray(drop_path_rates)
        elif train and (self.drop_path_rate > 0 or drop_path_rates is not None):
            raise ValueError("Training with drop path needs a random key: model(images, train=True, key=...).")
        x, maps, routings, first = images, [], [], 0
        for i in range(STAGES):
            x = getattr(self, f"down{i}")(x, train=train)
            last = first + self.depth[i]
            x, routing = getattr(self, f"stage{i}")(
                x,
                rates=rates[first:last] if rates is not None else None,
                key=jax.random.fold_in(key, i) if rates is not None and key is not None else None,
                routing_index=routing_index[i] if routing_index is not None else None,
                return_routing=return_routing,
            )
            first = last
            routings.append(routing)
            if self.dense:
                maps.append(getattr(self, f"out_norm{i}")(x))
        out: Any = tuple(maps)
        if self.norm is not None:
            out = self.norm(x, train=train).mean((1, 2))
            if self.head is not None:
                out = self.head(out)
        return (out, routings) if return_routing else out


def biformer_tiny(*, rngs: nnx.Rngs, **changes: Any) -> BiFormer:
    """BiFormer-T: depth 2, 2, 8, 2 and 64 to 512 channels. 13,142,760 parameters."""
    return BiFormer(**{"depth": (2, 2, 8, 2), "embed_dim": (64, 128, 256, 512), **changes}, rngs=rngs)


def biformer_small(*, rngs: nnx.Rngs, **changes: Any) -> BiFormer:
    """BiFormer-S: depth 4, 4, 18, 4 and 64 to 512 channels. 25,536,232 parameters."""
    return BiFormer(**{"depth": (4, 4, 18, 4), "embed_dim": (64, 128, 256, 512), **changes}, rngs=rngs)


def biformer_base(*, rngs: nnx.Rngs, **changes: Any) -> BiFormer:
    """BiFormer-B: depth 4, 4, 18, 4 and 96 to 768 channels. 56,804,968 parameters."""
    return BiFormer(**{"depth": (4, 4, 18, 4), "embed_dim": (96, 192, 384, 768), **changes}, rngs=rngs)


def biformer_stl(*, rngs: nnx.Rngs, **changes: Any) -> BiFormer:
    """BiFormer in Swin-T's layout: patch embedding, MLP ratio 4, no positional convolution. 28,372,552 parameters."""
    layout = {
        "depth": (2, 2, 6, 2),
        "embed_dim": (96, 192, 384, 768),
        "mlp_ratios": 4,
        "before_attn_dwconv": 0,
        "downsample": "patch",
    }
    return BiFormer(**{**layout, **changes}, rngs=rngs)
