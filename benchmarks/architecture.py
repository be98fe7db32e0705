"""A search step on the space S2 against the same supernet in PyTorch: CPU time, peak memory, compile time.

    python benchmarks/architecture.py [--rounds 7] [--cells 8] [--channels 16] [--batch 64] [--orders 1 2]

The setting is DARTS': 16 channels, 8 cells, batch 64, 28 x 28 pixels, momentum SGD with clipping and decay below,
Adam above. The reference is written here with torch modules in the shape of the original (one module per operation
and edge, batch normalisation without scales, NCHW); it asks autograd for the gradient in the architecture alone where
only that is needed, which the original does not. Both sides run on one core in one process; rounds alternate between
them, and medians of the process CPU time are printed, with the median, smallest and largest of the rounds' ratios.
Memory is the peak resident size of a process of its own for each side, less what it held before the first step. The
gradients of both sides are compared once, from equal weights, before anything is timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import _harness
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from bilevel.applications.supernet import S2, Supernet, search
from bilevel.data import as_step_key
from bilevel.lower import MomentumSGD
from bilevel.optimizers import coupled_adam
from bilevel.solvers import DARTS


def norm(channels, affine=False):
    return nn.BatchNorm2d(channels, affine=affine)


class SepConv(nn.Module):
    def __init__(self, c, stride):
        super().__init__()
        layers = []
        for s in (stride, 1):
            depth = nn.Conv2d(c, c, 3, s, 1, groups=c, bias=False)
            layers += [nn.ReLU(), depth, nn.Conv2d(c, c, 1, bias=False), norm(c)]
        self.op = nn.Sequential(*layers)

    def forward(self, x):
        return self.op(x)


class Reduce(nn.Module):
    def __init__(self, c_in, c):
        super().__init__()
        self.even = nn.Conv2d(c_in, c // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(c_in, c // 2, 1, 2, bias=False)
        self.norm = norm(c)

    def forward(self, x):
        x = F.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))


class Point(nn.Module):
    def __init__(self, c_in, c):
        super().__init__()
        self.op = nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c, 1, bias=False), norm(c))

    def forward(self, x):
        return self.op(x)


class Cell(nn.Module):
    def __init__(self, before, last, c, reduction, halved, nodes=4):
        super().__init__()
        self.pre0 = Reduce(before, c) if halved else Point(before, c)
        self.pre1 = Point(last, c)
        self.nodes = nodes
        self.skips, self.seps = nn.ModuleList(), nn.ModuleList()
        for j in range(nodes):
            for i in range(2 + j):
                stride = 2 if reduction and i < 2 else 1
                self.skips.append(Reduce(c, c) if stride == 2 else nn.Identity())
                self.seps.append(SepConv(c, stride))

    def forward(self, s0, s1, weights):
        states, e = [self.pre0(s0), self.pre1(s1)], 0
        for _ in range(self.nodes):
            total = 0
            for x in states:
                total = total + weights[e, 0] * self.skips[e](x) + weights[e, 1] * self.seps[e](x)
                e += 1
            states.append(total)
        return torch.cat(states[2:], 1)


class TorchSupernet(nn.Module):
    def __init__(self, channels=16, cells=8, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3 * channels, 3, padding=1, bias=False), norm(3 * channels, True))
        before = last = 3 * channels
        halved, self.cells, self.reductions = False, nn.ModuleList(), {cells // 3, 2 * cells // 3}
        for k in range(cells):
            reduction = k in self.reductions
            channels *= 2 if reduction else 1
            self.cells.append(Cell(before, last, channels, reduction, halved))
            before, last, halved = last, 4 * channels, reduction
        self.head = nn.Linear(last, classes)

    def forward(self, alphas, x):
        s0 = s1 = self.stem(x)
        for k, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, alphas[int(k in self.reductions)].softmax(-1))
        return self.head(s1.mean((2, 3)))

    def load(self, params):
        """Our parameters into these modules."""
        put = lambda target, values: target.data.copy_(torch.from_numpy(np.array(values)))
        point = lambda conv, values: put(conv.weight, np.asarray(values)[..., None, None])
        put(self.stem[0].weight, params["stem"]["kernel"])
        put(self.head.weight, np.asarray(params["head"]["kernel"]).T)
        put(self.head.bias, params["head"]["bias"])
        for k, cell in enumerate(self.cells):
            p, seen = params[f"cell{k}"], {"": 0, "_stride2": 0}
            if "even" in p["preprocess0"]:
                point(cell.pre0.even, p["preprocess0"]["even"])
                point(cell.pre0.odd, p["preprocess0"]["odd"])
            else:
                point(cell.pre0.op[1], p["preprocess0"]["kernel"])
            point(cell.pre1.op[1], p["preprocess1"]["kernel"])
            for skip, sep in zip(cell.skips, cell.seps, strict=True):
                kind = "_stride2" if isinstance(skip, Reduce) else ""
                i, ours = seen[kind], p[f"sep_conv_3x3{kind}"]
                seen[kind] += 1
                for half in (1, 2):
                    put(sep.op[4 * half - 3].weight, np.asarray(ours[f"depth{half}"][i])[:, None])
                    point(sep.op[4 * half - 2], ours[f"point{half}"][i])
                if kind:
                    point(skip.even, p["skip_connect_stride2"]["even"][i])
                    point(skip.odd, p["skip_connect_stride2"]["odd"][i])
        return self


class TorchSearch:
    """The original's step: the architecture on a validation batch, then the weights on a training batch."""

    def __init__(self, net, alphas):
        self.net, self.alphas = net, [a.clone().requires_grad_() for a in alphas]
        self.weights = list(net.parameters())
        self.sgd = torch.optim.SGD(self.weights, 0.025, momentum=0.9, weight_decay=3e-4)
        self.adam = torch.optim.Adam(self.alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def loss(self, batch):
        return F.cross_entropy(self.net(self.alphas, batch[0]), batch[1])

    def shift(self, directions, size):
        with torch.no_grad():
            torch._foreach_add_(self.weights, directions, alpha=size)

    def second_order(self, train, validation):
        rate = 0.025
        before = [w.detach().clone() for w in self.weights]
        gradients = torch.autograd.grad(self.loss(train), self.weights)
        moves = []
        for w, g in zip(self.weights, gradients, strict=True):
            moved = g + 3e-4 * w.detach()
            buffer = self.sgd.state[w].get("momentum_buffer")
            moves.append(moved if buffer is None else moved + 0.9 * buffer)
        self.shift(moves, -rate)
        outer = torch.autograd.grad(self.loss(validation), [*self.alphas, *self.weights])
        n, v = len(self.alphas), list(outer[len(self.alphas) :])
        with torch.no_grad():
            for w, b in zip(self.weights, before, strict=True):
                w.copy_(b)
        size = 0.01 / torch.cat([a.reshape(-1) for a in v]).norm().item()
        self.shift(v, size)
        plus = torch.autograd.grad(self.loss(train), self.alphas)
        self.shift(v, -2 * size)
        minus = torch.autograd.grad(self.loss(train), self.alphas)
        self.shift(v, size)
        return [g - rate * (p - m) / (2 * size) for g, p, m in zip(outer[:n], plus, minus, strict=True)]

    def step(self, train, validation, order):
        if order == 1:
            gradient = torch.autograd.grad(self.loss(validation), self.alphas)
        else:
            gradient = self.second_order(train, validation)
        for a, g in zip(self.alphas, gradient, strict=True):
            a.grad = g
        self.adam.step()
        self.sgd.zero_grad()
        self.loss(train).backward()
        nn.utils.clip_grad_norm_(self.weights, 5.0)
        self.sgd.step()


def images(n, seed):
    random = np.random.default_rng(seed)
    return random.standard_normal((n, 28, 28, 1)).astype(np.float32), random.integers(0, 10, n).astype(np.int32)


def to_torch(batch):
    x, labels = batch
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


class Ours:
    def __init__(self, options, order):
        self.network = lambda seed: Supernet(
            S2,
            channels=options.channels,
            cells=options.cells,
            image=(28, 28, 1),
            scan=options.scan or None,
            rngs=nnx.Rngs(seed),
        )
        n = options.batch
        self.search = search(images(n, 0), images(n, 1), self.network, batch=n)
        self.solver = DARTS(order, MomentumSGD(0.025), coupled_adam())
        key = as_step_key(0)
        self.state = self.solver.init(self.search.problem, self.search.x0, self.search.y0, key)
        self.key = key

    def compile(self):
        problem, solver = jax.tree.map(jnp.asarray, self.search.problem), self.solver
        step = jax.jit(lambda problem, state, key: solver.step(problem, state, key), donate_argnums=1)
        self.program, self.compiling = _harness.compiled(step, problem, self.state, self.key)
        self.problem = problem
        return self

    def step(self):
        self.state, metrics = self.program(self.problem, self.state, self.key)
        jax.block_until_ready(self.state)
        return metrics


def theirs(options, params=None):
    torch.manual_seed(0)
    net = TorchSupernet(options.channels, options.cells)
    if params is not None:
        net.load(params)
    alphas = [torch.from_numpy(np.array(S2.alphas(0)[k])) for k in ("normal", "reduce")]
    return TorchSearch(net, alphas), to_torch(images(options.batch, 0)), to_torch(images(options.batch, 1))


def compare(options):
    """The largest relative difference of loss and gradients from equal weights, on a small network of the same make."""
    options = argparse.Namespace(**{**vars(options), "cells": 3, "channels": 4, "batch": 8})
    ours = Ours(options, 1)
    reference, train, _ = theirs(options, ours.search.y0)
    loss = reference.loss(train)
    gradient = torch.autograd.grad(loss, reference.alphas)
    batch = tuple(jnp.asarray(a) for a in images(options.batch, 0))
    value, mine = jax.jit(jax.value_and_grad(ours.search.validation_loss))(ours.search.x0, ours.search.y0, batch)
    worst = max(
        float(np.abs(np.asarray(mine[k]) - g.numpy()).max() / np.abs(g.numpy()).max())
        for k, g in zip(("normal", "reduce"), gradient, strict=True)
    )
    size = sum(p.numel() for p in reference.net.parameters()), sum(a.size for a in jax.tree.leaves(ours.search.y0))
    print(
        f"parameters {size[0]} (torch) {size[1]} (ours); loss {loss.item():.6f} and {float(value):.6f}; architecture "
        f"gradients differ by {worst:.1e} of the largest"
    )


def peak():
    """The peak resident size in KiB; not `getrusage`, which starts at the parent's."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def main():
    parser = _harness.arguments(__doc__, rounds=7)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scan", type=int, default=2, help="scan runs of so many equal cells; 0: never")
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--side", choices=("torch", "ours"), help="run one side, print its peak memory (used by itself)"
    )
    options = _harness.start(parser, "torch", "flax", cells=3, channels=4, batch=8, orders=[1])
    torch.set_num_threads(1)
    if options.side:
        return print(side(options))
    compare(options)
    for order in options.orders:
        ours = Ours(options, order).compile()
        reference, train, validation = theirs(options)
        wall, cpu = ours.compiling.median("wall"), ours.compiling.median()
        print(f"order {order}: compiled in {wall:.1f} s wall, {cpu:.1f} s CPU")
        calls = {"torch": lambda r=reference, a=train, b=validation, o=order: r.step(a, b, o), "ours": ours.step}
        times = _harness.interleaved(calls, options.rounds)
        each = ", ".join(f"{name} {taken.median():.2f}" for name, taken in times.items())
        print(f"  CPU s per step: {each}; ratio {_harness.ratio(times['ours'], times['torch'])}", flush=True)
        command = [sys.executable, __file__, "--channels", options.channels, "--cells", options.cells]
        command += ["--batch", options.batch, "--scan", options.scan, "--orders", order]
        peaks = {
            name: float(
                subprocess.run(
                    [*map(str, command), "--side", name], capture_output=True, check=True, text=True
                ).stdout.splitlines()[-1]
            )
            for name in ("torch", "ours")
        }
        temporary = ours.program.memory_analysis().temp_size_in_bytes / 2**20
        print(
            f"  peak memory above the start, MiB: torch {peaks['torch']:.0f}, ours {peaks['ours']:.0f} (of which "
            f"compiling takes a part; the program's temporaries are {temporary:.0f})",
            flush=True,
        )
    return None


def side(options):
    """MiB by which a process's peak exceeds what it held before its first step (compilation included)."""
    order = options.orders[0]
    if options.side == "ours":
        ours = Ours(options, order)
        step = lambda: ours.step()
        before = peak()
        ours.compile()
    else:
        reference, train, validation = theirs(options)
        step = lambda: reference.step(train, validation, order)
        before = peak()
    for _ in range(2):
        step()
    return (peak() - before) / 1024


if __name__ == "__main__":
    main()
