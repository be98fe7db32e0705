"""BiFormer against PyTorch: CPU time of models and single layers, compile time; on a GPU throughput and memory.

    python benchmarks/biformer.py [--rounds 9] [--only models|layers|gradients|compile|gpu]

The reference is written here with torch operations in the shape of the original: gather with expanded operands for the
routed keys and values, channels-first convolutions. Both sides run on one core with the same weights; rounds
alternate between the sides, and the median of the process CPU time is printed, with the largest difference of outputs.
"""

from __future__ import annotations

import itertools

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from bilevel.applications.biformer import RoutingAttention, biformer_tiny, load_original
from bilevel.integrations.flax import from_nnx


class TorchBRA(nn.Module):
    def __init__(self, dim, num_heads, n_win, topk, side_dwconv=5):
        super().__init__()
        self.heads, self.n_win, self.topk, self.scale = num_heads, n_win, topk, dim**-0.5
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim)})
        self.wo = nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)

    def forward(self, x):
        n, height, width, c = x.shape
        s, m = self.n_win, self.heads
        h, w = height // s, width // s
        x = x.reshape(n, s, h, s, w, c).transpose(2, 3).reshape(n, s * s, h * w, c)
        q, k, v = self.qkv["qkv"](x).split(c, dim=-1)
        affinity = (q.mean(2).detach() * self.scale) @ k.mean(2).detach().transpose(1, 2)
        chosen = affinity.topk(self.topk, dim=-1).indices
        kv = torch.cat([k, v], -1)
        index = chosen[..., None, None].expand(-1, -1, -1, h * w, 2 * c)
        kv = kv[:, None].expand(-1, s * s, -1, -1, -1).gather(2, index).flatten(2, 3)
        k_of, v_of = kv.split(c, dim=-1)
        q_, k_, v_ = (a.unflatten(-1, (m, c // m)).transpose(2, 3) for a in (q, k_of, v_of))
        out = ((q_ * self.scale) @ k_.transpose(-1, -2)).softmax(-1) @ v_
        out = out.transpose(2, 3).flatten(3)

        def grid(a):
            return a.reshape(n, s, s, h, w, c).transpose(2, 3).reshape(n, height, width, c)

        local = self.lepe(grid(v).permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        return self.wo(grid(out) + local)


class TorchFull(nn.Module):
    def __init__(self, dim, side_dwconv=5):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)

    def forward(self, x):
        n, h, w, c = x.shape
        q, k, v = self.qkv(x).reshape(n, h * w, 3, 8, c // 8).permute(2, 0, 3, 1, 4)
        out = (q @ k.transpose(-1, -2) * (c // 8) ** -0.5).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(n, h, w, c)
        return self.proj(out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class TorchBlock(nn.Module):
    def __init__(self, dim, topk):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = TorchBRA(dim, dim // 32, 7, topk) if topk > 0 else TorchFull(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.Identity(), nn.GELU(), nn.Linear(3 * dim, dim))

    def forward(self, x):
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class TorchTiny(nn.Module):
    def __init__(self, depth=(2, 2, 8, 2), dims=(64, 128, 256, 512), topks=(1, 4, 16, -2)):
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(3, dims[0] // 2, 3, 2, 1),
            nn.BatchNorm2d(dims[0] // 2),
            nn.GELU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1),
            nn.BatchNorm2d(dims[0]),
        )
        rest = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in itertools.pairwise(dims)]
        self.downsample_layers = nn.ModuleList([stem, *rest])
        stages = [
            nn.Sequential(*[TorchBlock(c, k) for _ in range(d)]) for d, c, k in zip(depth, dims, topks, strict=True)
        ]
        self.stages = nn.ModuleList(stages)
        self.norm, self.head = nn.BatchNorm2d(dims[-1]), nn.Linear(dims[-1], 1000)

    def forward(self, x):
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x).flatten(2).mean(-1))


def cpu_medians(rounds, **calls):
    """The median process CPU time of each call in milliseconds, rounds interleaved, after one warm-up round."""
    return {name: taken.median(unit=1e3) for name, taken in _harness.interleaved(calls, rounds).items()}


def rounded(values):
    return "  ".join(f"{name} {value:8.1f}" for name, value in values.items())


def untrained(model):
    """Parameters and function of a model whose running statistics are meant to be 0 and 1 still."""
    params, apply = from_nnx(model)
    return params, apply.holding(apply.state)


def models(rounds):
    print("BiFormer-T, 224 x 224, CPU ms per batch")
    torch.manual_seed(0)
    theirs = TorchTiny().eval()
    ours = load_original(biformer_tiny(rngs=nnx.Rngs(0)), theirs.state_dict())
    params, apply = untrained(ours)
    forward = jax.jit(apply)
    for batch in (1, 8):
        x = np.random.RandomState(batch).standard_normal((batch, 224, 224, 3)).astype(np.float32)
        t, j = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), jnp.asarray(x)
        with torch.no_grad():
            reference = theirs(t).numpy()
            difference = np.abs(np.asarray(forward(params, j)) - reference).max() / np.abs(reference).max()
            times = cpu_medians(rounds, torch=lambda: theirs(t), ours=lambda: forward(params, j).block_until_ready())
        print(
            f"  batch {batch}: {rounded(times)}  ratio {times['ours'] / times['torch']:.2f}  "
            f"difference {difference:.1e}"
        )


def layer_pair(dim, heads, n_win, topk, **options):
    theirs = TorchBRA(dim, heads, n_win, topk).eval()
    layer = RoutingAttention(dim, heads, n_win, topk=topk, side_dwconv=5, **options, rngs=nnx.Rngs(0))
    return theirs, from_nnx(load_original(layer, theirs.state_dict()))


LAYERS = [
    # side, channels, heads, S, k
    (56, 64, 2, 7, 1),
    (56, 64, 2, 7, 4),
    (56, 64, 2, 7, 16),
    (28, 128, 4, 7, 4),
    (14, 256, 8, 7, 16),
    (112, 64, 2, 7, 4),
    (112, 64, 2, 14, 4),
    (112, 64, 2, 14, 16),
]


def layers(rounds, backends=("auto", "gathered", "online", "dense")):
    print("One layer, batch 1, forward, CPU ms")
    for side, dim, heads, n_win, topk in LAYERS:
        torch.manual_seed(0)
        x = np.random.RandomState(0).standard_normal((1, side, side, dim)).astype(np.float32)
        t, j = torch.from_numpy(x), jnp.asarray(x)
        calls = {}
        for backend in backends:
            if backend == "dense" and side > 28:
                continue
            theirs, (params, apply) = layer_pair(dim, heads, n_win, topk, backend=backend)
            forward = jax.jit(apply)
            calls[backend] = lambda f=forward, p=params: f(p, j).block_until_ready()
        with torch.no_grad():
            times = cpu_medians(rounds, torch=lambda: theirs(t), **calls)
        print(f"  {side}x{side} d{dim} S{n_win} k{topk}: {rounded(times)}")


def gradients(rounds, backends=("auto", "gathered", "online", "dense")):
    print(
        "One layer, batch 1, forward and backward to input and weights, CPU ms; hvp is forward over reverse of `auto`"
    )
    for side, dim, heads, n_win, topk in LAYERS[:5]:
        torch.manual_seed(0)
        x = np.random.RandomState(0).standard_normal((1, side, side, dim)).astype(np.float32)
        t, j = torch.from_numpy(x).requires_grad_(), jnp.asarray(x)
        calls = {}
        for backend in backends:
            if backend == "dense" and side > 28:
                continue
            theirs, (params, apply) = layer_pair(dim, heads, n_win, topk, backend=backend)
            gradient = jax.grad(lambda p, x, f=apply: jnp.square(f(p, x)).sum(), argnums=(0, 1))
            run = jax.jit(gradient)
            calls[backend] = lambda f=run, p=params: jax.block_until_ready(f(p, j))
            if backend == "auto":
                hvp = jax.jit(lambda p, x, g=gradient: jax.jvp(g, (p, x), (p, x))[1])
                calls["hvp"] = lambda f=hvp, p=params: jax.block_until_ready(f(p, j))

        def torch_gradient(theirs=theirs, t=t):
            torch.autograd.grad(theirs(t).square().sum(), [t, *theirs.parameters()])

        times = cpu_medians(rounds, torch=torch_gradient, **calls)
        print(f"  {side}x{side} d{dim} S{n_win} k{topk}: {rounded(times)}")


def compile_time(rounds):
    del rounds
    params, apply = untrained(biformer_tiny(rngs=nnx.Rngs(0)))
    x = jnp.zeros((1, 224, 224, 3))
    traced, tracing = _harness.measured(lambda: jax.jit(apply).lower(params, x))
    _, compiling = _harness.measured(traced.compile)
    spent = f"trace and lower {tracing.median('wall'):.1f} s, compile {compiling.median('wall'):.1f} s (wall)"
    print(f"BiFormer-T compile, batch 1: {spent}")


def gpu(rounds):
    """Throughput and peak memory against torch eager and against full attention by the fused kernel."""
    if jax.default_backend() != "gpu":
        print("No GPU: throughput and memory not measured.")
        return
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 64):
            theirs = TorchTiny().eval().cuda().to(getattr(torch, dtype))
            model = load_original(
                biformer_tiny(rngs=nnx.Rngs(0)), {k: v.float().cpu() for k, v in theirs.state_dict().items()}
            )
            params, apply = untrained(model)
            params = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), params)
            x = jnp.zeros((batch, 224, 224, 3), dtype)
            t = torch.zeros((batch, 3, 224, 224), dtype=getattr(torch, dtype), device="cuda")
            forward = jax.jit(apply).lower(params, x).compile()
            memory = forward.memory_analysis()

            def run_torch(theirs=theirs, t=t):
                with torch.no_grad():
                    theirs(t)
                torch.cuda.synchronize()

            torch.cuda.reset_peak_memory_stats()
            run_torch()
            peak = torch.cuda.max_memory_allocated()
            calls = {"torch": run_torch, "ours": lambda f=forward, p=params, x=x: f(p, x)}
            times = _harness.interleaved(calls, rounds, warm=2)
            rates = {name: batch / taken.median("wall") for name, taken in times.items()}
            print(
                f"  {dtype} batch {batch}: images/s {rounded(rates)}; temporary memory ours "
                f"{memory.temp_size_in_bytes / 2**20:.0f} MiB, torch peak {peak / 2**20:.0f} MiB"
            )
    for side, n_win, topk in ((56, 7, 4), (112, 14, 4), (112, 14, 16)):
        x = jnp.zeros((16, side, side, 64), jnp.bfloat16)
        qkv = jnp.zeros((16, side * side, 2, 32), jnp.bfloat16)
        calls = {"full": jax.jit(lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn"))}
        arguments = {"full": (qkv,)}
        for backend in ("gathered", "online", "fused"):
            layer = RoutingAttention(64, 2, n_win, topk=topk, side_dwconv=5, backend=backend, rngs=nnx.Rngs(0))
            params, apply = from_nnx(layer)
            calls[backend], arguments[backend] = (
                jax.jit(apply),
                (jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), x),
            )
        times = _harness.interleaved({name: lambda n=name: calls[n](*arguments[n]) for name in calls}, rounds)
        times = {name: taken.median("wall", 1e3) for name, taken in times.items()}
        print(f"  {side}x{side} S{n_win} k{topk} batch 16, bfloat16, wall ms: {rounded(times)}")


PARTS = {"models": models, "layers": layers, "gradients": gradients, "compile": compile_time, "gpu": gpu}

if __name__ == "__main__":
    parser = _harness.arguments(__doc__, rounds=9)
    parser.add_argument("--only", choices=list(PARTS))
    options = _harness.start(parser, "torch", "flax", only="compile")
    torch.set_num_threads(1)
    for name, part in PARTS.items():
        if options.only in (None, name):
            part(options.rounds)
