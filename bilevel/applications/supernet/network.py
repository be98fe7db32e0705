"""The supernet: a stem, a stack of cells, a linear classifier."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from bilevel.applications.layers import uniform_fan_in
from bilevel.applications.layers.maps import Grid, halved, padded, planes
from bilevel.applications.supernet.cell import cell_shapes, run_cell
from bilevel.applications.supernet.operations import dense, factorized_reduce, normalise, pointwise
from bilevel.applications.supernet.spaces import S2, CellSpec, SearchSpace

__all__ = ["Supernet"]


class _Group(nnx.Module):
    """Named parameters, possibly nested: {name: (shape, fan in)}; of fan in 0 scales (ones) and biases (zeros)."""

    def __init__(self, shapes: Mapping[str, Any], rngs: nnx.Rngs):
        for name, entry in shapes.items():
            if isinstance(entry, Mapping):
                setattr(self, name, _Group(entry, rngs))
                continue
            shape, fan_in = entry
            if fan_in:
                values = uniform_fan_in(fan_in)(rngs.params(), shape, float)
            else:
                values = jnp.ones(shape) if name.startswith("scale") else jnp.zeros(shape)
            setattr(self, name, nnx.Param(values))

    def tree(self) -> dict[str, Any]:
        """The arrays as nested dictionaries."""
        return {
            name: value.tree() if isinstance(value, _Group) else value[...]
            for name, value in vars(self).items()
            if isinstance(value, (_Group, nnx.Param))
        }


def _norm_shapes(channels: int, affine: bool) -> dict[str, Any]:
    return {"scale": ((channels,), 0), "bias": ((channels,), 0)} if affine else {}


def _relu_conv_norm(channels_in: int, channels: int, affine: bool) -> dict[str, Any]:
    return {"kernel": ((channels, channels_in), channels_in), **_norm_shapes(channels, affine)}


def _reduce_norm(channels_in: int, channels: int, affine: bool) -> dict[str, Any]:
    half = ((channels // 2, channels_in), channels_in)
    return {"even": half, "odd": half, **_norm_shapes(channels, affine)}


def _preprocess(x: Array, p: Mapping[str, Array], grid: Grid) -> Array:
    """ReLU, 1x1 convolution or factorized reduction, norm."""
    x = jax.nn.relu(x)
    if "kernel" in p:
        kernel = p["kernel"]
        if kernel.shape[1] < x.shape[0]:  # the stem's channels, filled up with zeros to a cell's
            kernel = jnp.pad(kernel, ((0, 0), (0, x.shape[0] - kernel.shape[1])))
        x = pointwise(x, kernel)
    else:
        x = factorized_reduce(x, p["even"], p["odd"], grid)
    return normalise(x, p.get("scale"), p.get("bias"))


class Supernet(nnx.Module):
    """The network of a search space: every candidate operation on every edge, mixed with weights that are an argument.

    DARTS' skeleton: a 3x3 stem of `stem_multiplier * channels`, `cells` cells of which those at a third and two thirds
    of the depth are reduction cells (half the side, twice the channels), global mean, linear classifier. Cell k reads
    the outputs of cells k-1 and k-2, each through ReLU, 1x1 convolution, norm (a factorized reduction where the side
    differs). NAS-Bench-201's, where the space has no reduction cell: three stages of `cells` cells with a fixed
    residual block of stride 2 between them.

    Used as a pure function of a dictionary of parameters:

        params, apply = from_nnx(Supernet(S2, image=(28, 28, 1), rngs=nnx.Rngs(0)))
        logits = apply(params, S2.weights(alphas), images)

    Normalisation always is by the batch at hand. A genotype as a 0/1 mask in place of the weights is the discrete
    network (`mask`), so that one compiled program trains any of them.

    Args:
        space: the cells.
        channels: of the first cells; the original search has 16.
        cells: 8 in the original search and 20 in the final network; per stage (5) for NAS-Bench-201.
        classes: of the classifier.
        image: (rows, columns, channels) of the images.
        reductions: which cells are reduction cells; by default cells // 3 and 2 * cells // 3.
        stem_stride: 2 halves the side at once, for a small budget.
        stem_multiplier: 3 in DARTS (1 for NAS-Bench-201, where the option is ignored).
        affine: scales and biases after the norms, as in the final network; a search has none (but for the stem's, as
            in the authors' code).
        auxiliary_skip: room for the parameters of DARTS-'s auxiliary skip (at stride 2 it has some).
        remat: compute large maps again in the backward pass, edge by edge. The network then has gradients, and these
            have derivatives in forward mode, and no others; False: keep the maps, and have any derivative.
        scan: scan over a run of equal cells where it has at least so many; None: never.
        rngs: for the initial values.

    Raises:
        ValueError: an image whose side is odd where it is to be halved.
    """

    def __init__(
        self,
        space: SearchSpace = S2,
        *,
        channels: int = 16,
        cells: int = 8,
        classes: int = 10,
        image: tuple[int, int, int] = (28, 28, 1),
        reductions: tuple[int, ...] | None = None,
        stem_stride: int = 1,
        stem_multiplier: int = 3,
        affine: bool = False,
        auxiliary_skip: bool = False,
        remat: bool = True,
        scan: int | None = 2,
        rngs: nnx.Rngs,
    ):
        self.space, self.channels, self.classes, self.image = space, channels, classes, tuple(image)
        self.stem_stride, self.affine, self.remat, self.scan = stem_stride, affine, remat, scan
        self.auxiliary_skip = auxiliary_skip
        self.residual = space.reduce is None
        if self.residual:
            self.reductions: tuple[int, ...] = (cells, 2 * cells + 1)
            self.cells = 3 * cells + 2
        else:
            self.reductions = tuple(sorted({cells // 3, 2 * cells // 3} if reductions is None else reductions))
            self.cells = cells
        if cells < 1 or any(not 0 <= k < self.cells for k in self.reductions):
            raise ValueError(
                f"Supernet(cells={cells}, reductions={reductions}): a reduction is one of the cells 0..{cells - 1}."
            )
        self._check_side()
        stem = channels if self.residual else stem_multiplier * channels
        stem_shape = {"kernel": ((stem, image[2], 3, 3), 9 * image[2]), **_norm_shapes(stem, True)}
        self.stem = _Group(stem_shape, rngs)
        before, last, halved = stem, stem, False
        for k in range(self.cells):
            reduction = k in self.reductions
            channels = 2 * channels if reduction else channels
            shapes: dict[str, Any]
            if self.residual and reduction:
                shapes = self._residual_shapes(last, channels)
                out = channels
            else:
                spec = self.spec(k)
                shapes = cell_shapes(spec, channels, reduction=reduction, affine=affine, auxiliary=auxiliary_skip)
                if not self.residual:
                    make = _reduce_norm if halved else _relu_conv_norm
                    shapes["preprocess0"] = make(before, channels, affine)
                    shapes["preprocess1"] = _relu_conv_norm(last, channels, affine)
                out = channels * len(spec.concat)
            self._set(k, _Group(shapes, rngs))
            before, last, halved = last, out, reduction
        if self.residual:
            self.last = _Group(_norm_shapes(last, True), rngs)
        self.head = _Group({"kernel": ((last, classes), last), "bias": ((classes,), last)}, rngs)

    def _set(self, k: int, group: _Group) -> None:
        setattr(self, f"cell{k}", group)

    def _check_side(self) -> None:
        rows, columns, _ = self.image
        halvings = len(self.reductions) + (self.stem_stride == 2)
        if self.stem_stride not in (1, 2):
            raise ValueError(f"Supernet(stem_stride={self.stem_stride}): 1 or 2.")
        if rows % 2**halvings or columns % 2**halvings or not rows or not columns:
            raise ValueError(
                f"Images of {rows} x {columns} pixels cannot be halved {halvings} times (stem_stride={self.stem_stride}"
                f", reduction cells {self.reductions}): pad them to a multiple of {2**halvings} or take fewer "
                "reductions."
            )

    def _residual_shapes(self, channels_in: int, channels: int) -> dict[str, Any]:

        def conv(width: int) -> dict[str, Any]:
            return {"kernel": ((channels, width, 3, 3), 9 * width), **_norm_shapes(channels, True)}

        return {
            "conv1": conv(channels_in),
            "conv2": conv(channels),
            "shortcut": {"kernel": ((channels, channels_in), channels_in)},
        }

    def spec(self, k: int) -> CellSpec:
        """The cell of position k."""
        return self.space.reduce if k in self.reductions and self.space.reduce is not None else self.space.normal

    def __call__(
        self,
        weights: Mapping[str, Array] | None,
        images: Array,
        *,
        drop_path: Array | float | None = None,
        key: Array | None = None,
        beta: Array | float | None = None,
    ) -> Array:
        """Classify.

        Args:
            weights: {"normal": (edges, operations), "reduce": ...}: mixtures (`space.weights(alphas)`) or a 0/1 mask.
                None: ones, for a network of single operations.
            images: (batch, rows, columns, channels).
            drop_path: probability to drop an edge's output, per sample; what is kept is divided by 1 - p. An edge whose
                only operation is the identity is not dropped. None: no drop-path, and no code for it.
            key: for drop-path and `noise`; a `jax.random` key.
            beta: weight of DARTS-'s auxiliary skip connection on every edge; None: no such connection.

        Returns:
            Logits (batch, classes).
        """
        weights = self._weights(weights, images.dtype)
        self._check_call(images, drop_path, key, beta)
        if beta is not None:
            beta = jnp.asarray(beta, images.dtype)
        groups = [getattr(self, f"cell{k}").tree() for k in range(self.cells)]
        x = self._stem(images)
        keys = None if key is None else jax.random.split(key, self.cells)
        run = _Run(self, weights, drop_path, keys, beta, images.shape[0])
        out = run.residual(x, groups) if self.residual else run.cells(x, groups)
        if self.residual:
            last = self.last.tree()
            out = jax.nn.relu(normalise(out, last.get("scale"), last.get("bias")))
        pixels = out.shape[-1] // images.shape[0]
        features = out.reshape(out.shape[0], pixels, -1).mean(1).T
        head = self.head.tree()
        return features @ head["kernel"] + head["bias"]

    def _stem(self, images: Array) -> Array:
        p = self.stem.tree()
        kernel = p["kernel"].transpose(2, 3, 1, 0)
        steps = (self.stem_stride, self.stem_stride)
        dtype = jnp.promote_types(images.dtype, kernel.dtype)
        x = lax.conv_general_dilated(
            images.astype(dtype),
            kernel.astype(dtype),
            steps,
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return normalise(x.transpose(3, 1, 2, 0).reshape(x.shape[-1], -1), p.get("scale"), p.get("bias"))

    def _weights(self, weights: Mapping[str, Array] | None, dtype: Any) -> dict[str, Array]:
        found = {}
        for name, cell in self.space.cells().items():
            shape = (len(cell.edges), cell.choices)
            if weights is None:
                found[name] = jnp.ones(shape, dtype)
                continue
            if name not in weights or jnp.shape(weights[name]) != shape:
                got = {k: jnp.shape(v) for k, v in weights.items()}
                raise ValueError(
                    f"The weights have {got}; {self.space.name} needs {name!r} of shape {shape} (edges, operations)."
                )
            found[name] = jnp.asarray(weights[name])
        return found

    def _check_call(self, images: Array, drop_path: Any, key: Any, beta: Any) -> None:
        if images.ndim != 4 or images.shape[1:] != self.image:
            raise ValueError(
                f"images have shape {images.shape}; this network takes (batch, {', '.join(map(str, self.image))})."
            )
        noisy = any("noise" in names for cell in self.space.cells().values() for names in cell.operations)
        if key is None and (noisy or drop_path is not None):
            what = "drop-path" if drop_path is not None else "the operation `noise`"
            raise ValueError(f"{what} needs a key: apply(..., key=jax.random.key(0)).")
        if beta is not None and not self.auxiliary_skip:
            raise ValueError(
                "beta weighs an auxiliary skip that this network has no parameters for: Supernet(auxiliary_skip=True)."
            )


class _Run:
    """One forward pass: what all cells share."""

    def __init__(self, net: Supernet, weights: dict[str, Array], drop_path: Any, keys: Any, beta: Any, batch: int):
        self.net, self.weights, self.drop_path, self.keys, self.beta = net, weights, drop_path, keys, beta
        self.batch = batch

    def grid(self, k: int) -> Grid:
        """Rows and columns of the maps that cell k reads."""
        grid = halved((self.net.image[0], self.net.image[1]), self.net.stem_stride)
        for _ in range(sum(r < k for r in self.net.reductions)):
            grid = halved(grid)
        return grid

    def cell(self, k: int, params: Any, inputs: tuple[Array, ...], key: Any) -> Array:
        """Cell k (or its equals) with these parameters on these maps."""
        net, spec = self.net, self.net.spec(k)
        reduction = k in net.reductions
        keep = None
        if self.drop_path is not None:
            key, drop_key = jax.random.split(key)
            keep = self._keep(spec, reduction, drop_key, inputs[0].dtype)
        name = "reduce" if reduction and net.space.reduce is not None else "normal"
        return run_cell(
            spec,
            params,
            inputs,
            self.weights[name],
            grid=self.grid(k),
            reduction=reduction,
            pool_norm=net.space.pool_norm,
            keep=keep,
            key=key,
            beta=self.beta,
            remat=net.remat,
        )

    def _keep(self, spec: CellSpec, reduction: bool, key: Array, dtype: Any) -> Array:
        kept = 1.0 - jnp.asarray(self.drop_path, dtype)
        draw = jax.random.uniform(key, (len(spec.edges), self.batch), dtype) < kept
        factor = jnp.where(draw, 1.0 / jnp.maximum(kept, jnp.finfo(dtype).tiny), 0.0).astype(dtype)
        identity = [
            names == ("skip_connect",) and spec.stride(e, reduction) == 1 for e, names in enumerate(spec.operations)
        ]
        return jnp.where(jnp.asarray(identity)[:, None], jnp.ones((), dtype), factor)

    def key(self, k: int) -> Any:
        return None if self.keys is None else self.keys[k]

    def older(self, k: int, before: Array, params: Any) -> Array:
        """Cell k's older input, preprocessed: the output of cell k - 2, of the side that cell k - 1 reads."""
        return _preprocess(before, params["preprocess0"], self.grid(max(k - 1, 0)))

    def cells(self, stem: Array, groups: list[dict[str, Any]]) -> Array:
        """DARTS' stack. Consecutive normal cells are one scan where there are enough."""
        net = self.net
        before, last, k = stem, stem, 0
        while k < net.cells:
            end = k
            while end < net.cells and end not in net.reductions:
                end += 1
            width = groups[k]["preprocess1"]["kernel"].shape[0] * len(net.spec(k).concat)
            # The first cell after a stem that is wider than a cell goes before the scan.
            if net.scan is not None and end - k >= max(net.scan, 2) and last.shape[0] <= width:
                before, last = self._scanned(k, end, before, last, groups)
                k = end
                continue
            newer = _preprocess(last, groups[k]["preprocess1"], self.grid(k))
            inputs = self.older(k, before, groups[k]), newer
            before, last = last, self.cell(k, groups[k], inputs, self.key(k))
            k += 1
        return last

    def _scanned(
        self, k: int, end: int, before: Array, last: Array, groups: list[dict[str, Any]]
    ) -> tuple[Array, Array]:
        """Cells k, ..., end - 1, normal and of one width, as one scan.

        They differ in their first two inputs alone. So each step preprocesses the *next* cell's older input, which is
        this step's newer one; the first older input, from another side perhaps, is preprocessed before the scan.
        """
        spec = self.net.spec(k)
        width = groups[k]["preprocess1"]["kernel"].shape[0] * len(spec.concat)
        if last.shape[0] < width:  # the stem: zeros that its cells' kernels meet with zeros
            last = padded(last, [(0, width - last.shape[0]), (0, 0)])

        def filled(p: dict[str, Array]) -> dict[str, Array]:
            kernel = p["kernel"]
            return p | {"kernel": jnp.pad(kernel, ((0, 0), (0, width - kernel.shape[1])))}

        grid = self.grid(k)
        older = self.older(k, before, groups[k])
        own = [{n: v for n, v in groups[i].items() if not n.startswith("preprocess")} for i in range(k, end)]
        newer = [filled(groups[i]["preprocess1"]) for i in range(k, end)]
        following = [filled(groups[i]["preprocess0"]) for i in range(k + 1, end)]
        following.append(jax.tree.map(jnp.zeros_like, following[0]))  # the last step's is not used
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *part) for part in (own, newer, following)]
        keys = None if self.keys is None else self.keys[k:end]

        def body(carry: Any, step: Any) -> Any:
            older, last, _ = carry
            params, newer, following, key = step
            out = self.cell(k, params, (older, _preprocess(last, newer, grid)), key)
            return (_preprocess(last, following, grid), out, last), None

        (_, last, before), _ = lax.scan(body, (older, last, last), (*stacked, keys))
        return before, last

    def residual(self, x: Array, groups: list[dict[str, Any]]) -> Array:
        """NAS-Bench-201's stack."""
        net, k = self.net, 0
        while k < net.cells:
            if k in net.reductions:
                x = _residual_block(x, groups[k], self.grid(k))
                k += 1
                continue
            end = k
            while end < net.cells and end not in net.reductions:
                end += 1
            if net.scan is not None and end - k >= max(net.scan, 2):
                stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups[k:end])
                keys = None if self.keys is None else self.keys[k:end]

                def body(x: Array, step: Any, k: int = k) -> Any:
                    return self.cell(k, step[0], (x,), step[1]), None

                x, _ = lax.scan(body, x, (stacked, keys))
            else:
                for i in range(k, end):
                    x = self.cell(i, groups[i], (x,), self.key(i))
            k = end
        return x


def _residual_block(x: Array, p: Mapping[str, Any], grid: Grid) -> Array:
    """NAS-Bench-201's reduction: x -> norm(conv relu-conv of stride 2) + 1x1 of the 2x2 mean."""
    y, at = x, grid
    for name, stride in (("conv1", 2), ("conv2", 1)):
        y = dense(jax.nn.relu(y), p[name]["kernel"], at, stride)
        y, at = normalise(y, p[name].get("scale"), p[name].get("bias")), halved(at, stride)
    mean = functools.reduce(jnp.add, planes(x, grid, 2)) / 4
    return y + pointwise(mean, p["shortcut"]["kernel"])
