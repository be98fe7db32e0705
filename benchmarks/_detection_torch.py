"""The nano detector and its loss in PyTorch, for `benchmarks/detection.py`: usual operations, the original names."""

from __future__ import annotations

import math

import torch
from biformer import TorchBRA
from torch import nn
from torch.nn import functional as F

STEM, W2, W3, W4, W5 = 16, 16, 24, 32, 48
STRIDES = (4, 8, 16, 32)


def group_norm(channels):
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


class Conv(nn.Module):
    def __init__(self, c_in, c_out, size=1, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
        self.bn = group_norm(c_out)

    def forward(self, x):
        return F.silu(self.bn(self.conv(x)))


class Pair(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c, 3), Conv(c, c, 3)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class Split(nn.Module):
    """C2f with one bottleneck."""

    def __init__(self, c_in, c_out):
        super().__init__()
        half = c_out // 2
        self.cv1, self.cv2, self.m = Conv(c_in, 2 * half), Conv(3 * half, c_out), nn.ModuleList([Pair(half)])

    def forward(self, x):
        parts = list(self.cv1(x).chunk(2, 1))
        parts.append(self.m[0](parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Pools(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c // 2), Conv(2 * c, c)

    def forward(self, x):
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.cv2(torch.cat(parts, 1))


class Rep(nn.Module):
    """Two kernels, summed before they are used; one normalisation."""

    def __init__(self, c):
        super().__init__()
        three, one = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.Conv2d(c, c, 1, bias=False)
        self.rbr_dense = nn.ModuleDict({"conv": three, "bn": group_norm(c)})
        self.rbr_1x1 = nn.ModuleDict({"conv": one})

    def forward(self, x):
        kernel = self.rbr_dense["conv"].weight + F.pad(self.rbr_1x1["conv"].weight, (1, 1, 1, 1))
        return F.silu(self.rbr_dense["bn"](F.conv2d(x, kernel, padding=1)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv2, self.conv1 = Rep(c), Conv(c, c, 3)

    def forward(self, x):
        return x + self.conv1(self.conv2(x))


class Stage(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        half = c_out // 2
        self.conv1, self.conv2, self.conv3 = Conv(c_in, half), Conv(c_in, half), Conv(2 * half, c_out)
        self.convs = nn.ModuleList([Block(half)])

    def forward(self, x):
        return self.conv3(torch.cat([self.conv1(x), self.convs[0](self.conv2(x))], 1))


class Attend(TorchBRA):
    """Routed attention among 4 x 4 regions with a residual; channels second, padded at the bottom and right."""

    def __init__(self, c):
        super().__init__(c, 4, 4, 4, side_dwconv=3)

    def forward(self, x):
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % 4, 0, -height % 4)).permute(0, 2, 3, 1)
        return x + super().forward(padded).permute(0, 3, 1, 2)[:, :, :height, :width]


class Heads(nn.Module):
    def __init__(self, widths, classes, bins):
        super().__init__()
        box, label = max(16, widths[0] // 4, 4 * bins), max(widths[0], classes)

        def branch(c, width, out, bias):
            last = nn.Conv2d(width, out, 1)
            nn.init.constant_(last.bias, bias)
            return nn.Sequential(Conv(c, width, 3), Conv(width, width, 3), last)

        self.cv2 = nn.ModuleList([branch(c, box, 4 * bins, 1.0) for c in widths])
        starts = [math.log(5 / classes / (64 / s) ** 2) for s in STRIDES]
        self.cv3 = nn.ModuleList([branch(c, label, classes, b) for c, b in zip(widths, starts, strict=True)])

    def forward(self, maps):
        both = zip(self.cv2, self.cv3, maps, strict=True)
        return [torch.cat([box(x), label(x)], 1) for box, label, x in both]


# Row: what it is, the rows that it reads (the last one if none is said). "cat" and "up" have no weights.
ROWS = [
    (lambda: Conv(3, STEM, 3, 2), ()), (lambda: Conv(STEM, W2, 3, 2), ()), (lambda: Split(W2, W2), ()),
    (lambda: Conv(W2, W3, 3, 2), ()), (lambda: Split(W3, W3), ()), (lambda: Conv(W3, W4, 3, 2), ()),
    (lambda: Split(W4, W4), ()), (lambda: Conv(W4, W5, 3, 2), ()), (lambda: Split(W5, W5), ()), (lambda: Pools(W5), ()),
    (lambda: Conv(W5, W4), ()), (lambda: Conv(W4, W4, 3, 2), (6,)), (lambda: Attend(W4), ()), ("cat", (12, 10)),
    (lambda: Stage(2 * W4, W4), ()), ("up", ()), (lambda: Conv(W3, W3, 3, 2), (4,)), (lambda: Attend(W3), ()),
    ("cat", (15, 17, 6)), (lambda: Stage(2 * W4 + W3, W4), ()), ("up", ()), (lambda: Attend(W4), ()), ("cat", (21, 4)),
    (lambda: Stage(W4 + W3, W3), ()), ("up", ()), (lambda: Attend(W3), ()), ("cat", (25, 2)),
    (lambda: Stage(W3 + W2, W2), ()), (lambda: Conv(W2, W2, 3, 2), ()), (lambda: Attend(W2), ()), ("cat", (29, 23)),
    (lambda: Stage(W2 + W3, W3), ()), (lambda: Conv(W3, W3, 3, 2), ()), (lambda: Attend(W3), ()), ("cat", (33, 19)),
    (lambda: Stage(W3 + W4, W4), ()), (lambda: Conv(W4, W3, 3, 2), (19,)), (lambda: Conv(W4, W3, 3, 2), (35,)),
    ("cat", (14, 36, 37)), (lambda: Stage(W4 + 2 * W3, W5), ()),
]  # fmt: skip


class Nano(nn.Module):
    """The rows and the heads; the result is raw maps."""

    def __init__(self, classes, bins):
        super().__init__()
        made = [nn.Identity() if isinstance(make, str) else make() for make, _ in ROWS]
        self.model = nn.ModuleList([*made, Heads((W2, W3, W4, W5), classes, bins)])
        self.bins = bins

    def forward(self, x):
        values = []
        for (kind, sources), module in zip(ROWS, self.model, strict=False):
            inputs = [values[s] for s in sources] or [values[-1] if values else x]
            if kind == "cat":
                value = torch.cat(inputs, 1)
            elif kind == "up":
                value = F.interpolate(inputs[0], scale_factor=2)
            else:
                value = module(inputs[0])
            values.append(value)
        return self.model[-1]([values[i] for i in (27, 31, 35, 39)])


def ciou(a, b, eps=1e-7):
    (x1, y1, x2, y2), (u1, v1, u2, v2) = a.unbind(-1), b.unbind(-1)
    w, h, w_, h_ = x2 - x1, y2 - y1 + eps, u2 - u1, v2 - v1 + eps
    shared = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0) * (
        torch.minimum(y2, v2) - torch.maximum(y1, v1)
    ).clamp(min=0)
    iou = shared / (w * h + w_ * h_ - shared + eps)
    wide, high = torch.maximum(x2, u2) - torch.minimum(x1, u1), torch.maximum(y2, v2) - torch.minimum(y1, v1)
    apart = ((u1 + u2 - x1 - x2) ** 2 + (v1 + v2 - y1 - y2) ** 2) / 4 / (wide**2 + high**2 + eps)
    v = 4 / math.pi**2 * (torch.atan(w_ / h_) - torch.atan(w / h)) ** 2
    with torch.no_grad():
        alpha = v / (v - iou + 1 + eps)
    return iou - apart - alpha * v


@torch.no_grad()
def assign(scores, boxes, points, batch, topk=10):
    """Task-aligned targets: boxes, scores and foreground of each anchor."""
    given, labels, mask = batch["boxes"], batch["classes"].long(), batch["mask"]
    apart = torch.cat([points - given[:, :, None, :2], given[:, :, None, 2:] - points], -1)
    inside = (apart.amin(-1) > 1e-9) & mask[..., None]
    fit = ciou(given[:, :, None], boxes[:, None]).clamp(min=0) * inside
    of_class = scores.transpose(1, 2).gather(1, labels[..., None].expand(-1, -1, scores.shape[1]))
    metric = of_class**0.5 * fit**6
    best = torch.zeros_like(inside).scatter_(-1, metric.topk(topk, -1).indices, True) & inside
    winner = torch.zeros_like(best).scatter_(1, fit.argmax(1, keepdim=True), True)
    best = torch.where(best.sum(1, keepdim=True) > 1, winner, best)
    foreground, index = best.any(1), best.int().argmax(1)
    metric, fit = metric * best, fit * best
    level = (metric * fit.amax(-1, keepdim=True) / (metric.amax(-1, keepdim=True) + 1e-9)).amax(1)
    target = F.one_hot(labels.gather(1, index), scores.shape[-1]) * (level * foreground)[..., None]
    return given.gather(1, index[..., None].expand(-1, -1, 4)), target, foreground


def detection_loss(net, batch, gains=(7.5, 0.5, 1.5)):
    """CIoU, binary cross-entropy and distribution focal loss with their gains, times the number of images."""
    maps, r = net(batch["image"]), net.bins
    flat = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
    places, sizes = [], []
    for m, s in zip(maps, STRIDES, strict=True):
        y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in m.shape[2:]), indexing="ij")
        places.append(torch.stack([x, y], -1).reshape(-1, 2))
        sizes.append(torch.full((x.numel(), 1), float(s)))
    places, strides = torch.cat(places), torch.cat(sizes)
    bins, logits = flat[..., : 4 * r].unflatten(-1, (4, r)), flat[..., 4 * r :]
    sides = bins.softmax(-1) @ torch.arange(r, dtype=bins.dtype)
    units = torch.cat([places - sides[..., :2], places + sides[..., 2:]], -1)
    boxes, target, foreground = assign(logits.detach().sigmoid(), units.detach() * strides, places * strides, batch)
    z = target.sum().clamp(min=1)
    classes = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / z
    weight, aim = target.sum(-1)[foreground], (boxes / strides)[foreground]
    box = ((1 - ciou(units[foreground], aim)) * weight).sum() / z
    at = places.expand(len(units), -1, -1)[foreground]
    t = torch.cat([at - aim[:, :2], aim[:, 2:] - at], -1).clamp(0, r - 1.01)
    low, logp = t.long(), bins[foreground].log_softmax(-1)
    near = logp.gather(-1, low[..., None])[..., 0] * (low + 1 - t) + logp.gather(-1, low[..., None] + 1)[..., 0] * (
        t - low
    )
    distribution = -(near.mean(-1) * weight).sum() / z
    return (gains[0] * box + gains[1] * classes + gains[2] * distribution) * len(units)
