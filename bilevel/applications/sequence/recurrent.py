"""LSTMs over padded batches: the cells of PyTorch and TensorFlow, one recurrence, derivatives of any order.

The recurrence of one layer and direction is, with drive z_t = W x_t and sigma the logistic function,

    i, f, o = sigma(z_t + U h_{t-1} + b) (three parts),    g = tanh(z_t + U h_{t-1} + b) (the fourth)
    c_t = m_t (f c_{t-1} + i g),    h_t = m_t o tanh(c_t)

with m_t = 1 within the sequence and 0 at padding. A state of zero is also where a sequence starts, so that the backward
direction, which meets the padding first, starts at the last real step as it should.

Its derivative is a linear recurrence in (dh, dc), stated here as a `custom_jvp` with the term h_{t-1} dU taken out of
the loop: transposed, the gradient by U is then one product of matrices instead of one per step. Forward mode, reverse
mode and their compositions all go through it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

PyTree = Any
Cell = Literal["pytorch", "tensorflow"]
# The order of the gates in each cell's columns.
_GATES = {"pytorch": "ifgo", "tensorflow": "igfo"}


def _activations(z: Array, cell: Cell) -> dict[str, Array]:
    """The four gates' values by name, from what goes into them.

    One sigmoid of all four, g's thrown away: one for each gate is slower on CPU, where XLA repeats it for its users.
    """
    gates = dict(zip(_GATES[cell], jnp.split(jax.nn.sigmoid(z), 4, -1), strict=True))
    return gates | {"g": jnp.tanh(jnp.split(z, 4, -1)[_GATES[cell].index("g")])}


def _run(drive: Array, kernel: Array, bias: Array, mask: Array | None, cell: Cell, reverse: bool, keep: bool) -> Any:
    """The scan over time; with `keep`, also every step's gates and c, which its derivative is made of."""

    def step(carry: Any, now: Any) -> Any:
        h, c = carry
        z, m = now
        gates = _activations(z + h @ kernel + bias, cell)
        c = gates["f"] * c + gates["i"] * gates["g"]
        c = c if m is None else m * c
        h = gates["o"] * jnp.tanh(c)
        h = h if m is None else m * h
        return (h, c), (h, (gates, c)) if keep else h

    zero = jnp.zeros((*drive.shape[1:-1], kernel.shape[0]), drive.dtype)
    return lax.scan(step, (zero, zero), (drive, mask), reverse=reverse)[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def recurrence(drive: Array, kernel: Array, bias: Array, mask: Array | None, cell: Cell, reverse: bool) -> Array:
    """The states h of one layer in one direction.

    Args:
        drive: what comes from the inputs, (time, batch, 4 d), the gates in the cell's order.
        kernel: U, (d, 4 d).
        bias: (4 d,).
        mask: 1 and 0, (time, batch, 1), or None where nothing is padded.
        cell: whose order of the gates.
        reverse: from the last step to the first.

    Returns:
        (time, batch, d), zero at padding.
    """
    return _run(drive, kernel, bias, mask, cell, reverse, keep=False)


@recurrence.defjvp
def _recurrence_jvp(cell: Cell, reverse: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    drive, kernel, bias, mask = primals
    d_drive, d_kernel, d_bias, _ = tangents
    states, (gates, cells) = _run(drive, kernel, bias, mask, cell, reverse, keep=True)
    time, batch, n = states.shape

    def earlier(a: Array) -> Array:
        zero = jnp.zeros_like(a[:1])
        return jnp.concatenate([a[1:], zero] if reverse else [zero, a[:-1]])

    pushed = d_drive + (earlier(states).reshape(time * batch, n) @ d_kernel).reshape(drive.shape) + d_bias

    # The slopes are made of the gates within the loop: kept, they would be seven arrays where the gates and c are five.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def linear(dh: Array, dc: Array, dz: Array, gates: Any, c: Array, before: Array, m: Array | None) -> Any:
        i, f, o, g = (gates[name] for name in "ifog")
        t = jnp.tanh(c)
        parts = dict(zip(_GATES[cell], jnp.split(dz + dh @ kernel, 4, -1), strict=True))
        dc = f * dc + (1 - i) * i * g * parts["i"] + (1 - f) * f * before * parts["f"] + (1 - g * g) * i * parts["g"]
        dc = dc if m is None else m * dc
        dh = (1 - o) * o * t * parts["o"] + (1 - t * t) * o * dc
        return dh if m is None else m * dh, dc

    def step(carry: Any, now: Any) -> Any:
        dh, dc = linear(*carry, *now)
        return (dh, dc), dh

    zero = jnp.zeros_like(states[0])
    along = (pushed, gates, cells, earlier(cells), mask)
    return states, lax.scan(step, (zero, zero), along, reverse=reverse)[1]


def valid(lengths: Array, time: int) -> Array:
    """Which steps are real: lengths (...,) -> booleans (..., time)."""
    return jnp.arange(time) < jnp.asarray(lengths)[..., None]


VOCABULARY = "Encode with the vocabulary that the model was made for."


def concrete(array: Any) -> np.ndarray | None:
    """The array's values where they are known, None inside a transformation."""
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array)


def check_lengths(lengths: Any, batch: int, time: int, what: str = "sequences") -> None:
    """Refuse lengths that are no lengths of this batch, naming the first that is wrong (by shape alone inside `jit`).

    Inside `jit`, where values are not known, a sequence of length 0 has states, attention and gradients of zero.
    """
    shape, dtype = jnp.shape(lengths), jnp.result_type(lengths)
    if shape != (batch,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"lengths of shape {shape} and type {dtype} were given for {batch} {what}; give {batch} whole numbers."
        )
    values = concrete(lengths)
    if values is None or not batch:
        return
    if (values == 0).any():
        which = np.flatnonzero(values == 0).tolist()
        raise ValueError(
            f"{what.capitalize()} {which} of the batch have length 0: there is nothing to read. "
            "Leave them out, or give them a token of their own."
        )
    if values.min() < 0 or values.max() > time:
        raise ValueError(
            f"lengths from {values.min()} to {values.max()} were given for {what} padded to {time} steps; "
            f"give lengths from 1 to {time}."
        )


@dataclasses.dataclass(frozen=True)
class LSTM:
    """A stack of LSTM layers in one or both directions, over padded batches.

        h = LSTM(features=300, hidden=150, layers=2)(params, x, lengths)

    Parameters are nested dictionaries, `{"layer0": {"forward": {...}, "backward": {...}}, ...}`. A "pytorch" cell has
    `input_kernel` (features, 4 d), `hidden_kernel` (d, 4 d) and two biases `input_bias` and `hidden_bias`, columns in
    the order i, f, g, o. A "tensorflow" cell (`BasicLSTMCell`) has one `kernel` (features + d, 4 d) and one `bias`,
    columns i, j, f, o, and adds 1 to the forget gate.

    Padded inputs are replaced by zeros before they are read, so that not even a NaN in them is seen; outputs at padded
    steps, and gradients there, are zero.

    Attributes:
        features: width of the inputs.
        hidden: d, width of a direction's state.
        layers: of the stack; each reads both directions of the one below.
        bidirectional: the second direction's states follow the first's along the last axis.
        cell: whose parameters.
        dropout: share of a layer's outputs that the next one does not see, where a key is given.
    """

    features: int
    hidden: int
    layers: int = 1
    bidirectional: bool = True
    cell: Cell = "pytorch"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.cell not in _GATES:
            raise ValueError(f"cell={self.cell!r} was given; there are {', '.join(map(repr, _GATES))}.")
        if min(self.features, self.hidden, self.layers) < 1:
            raise ValueError(
                f"features={self.features}, hidden={self.hidden}, layers={self.layers} were given; each is at least 1."
            )

    @property
    def directions(self) -> tuple[str, ...]:
        """Their names among the parameters."""
        return ("forward", "backward") if self.bidirectional else ("forward",)

    @property
    def out(self) -> int:
        """Width of the outputs."""
        return self.hidden * len(self.directions)

    def init(self, key: Array) -> PyTree:
        """Parameters as the cell's library draws them: U(-1/sqrt(d), 1/sqrt(d)), or Glorot's with zero biases."""
        params: dict[str, Any] = {}
        for layer in range(self.layers):
            width = self.out if layer else self.features
            keys = jax.random.split(jax.random.fold_in(key, layer), len(self.directions))
            params[f"layer{layer}"] = {
                name: self._draw(k, width) for name, k in zip(self.directions, keys, strict=True)
            }
        return params

    def _draw(self, key: Array, width: int) -> dict[str, Array]:
        d = self.hidden
        if self.cell == "tensorflow":
            bound = math.sqrt(6 / (width + 5 * d))
            return {
                "kernel": jax.random.uniform(key, (width + d, 4 * d), minval=-bound, maxval=bound),
                "bias": jnp.zeros(4 * d),
            }
        shapes = {
            "input_kernel": (width, 4 * d),
            "hidden_kernel": (d, 4 * d),
            "input_bias": (4 * d,),
            "hidden_bias": (4 * d,),
        }
        keys = jax.random.split(key, 4)
        bound = 1 / math.sqrt(d)
        return {
            name: jax.random.uniform(k, shape, minval=-bound, maxval=bound)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def _split(self, params: Mapping[str, Array], width: int) -> tuple[Array, Array, Array]:
        """W, U and b, columns in the cell's order."""
        if self.cell == "pytorch":
            return params["input_kernel"], params["hidden_kernel"], params["input_bias"] + params["hidden_bias"]
        kernel = params["kernel"]
        forget = jnp.repeat(jnp.array([gate == "f" for gate in _GATES[self.cell]], kernel.dtype), self.hidden)
        return kernel[:width], kernel[width:], params["bias"] + forget

    def __call__(self, params: PyTree, x: Array, lengths: Array | None = None, *, key: Array | None = None) -> Array:
        """The states of the last layer.

        Args:
            params: as `init` makes them.
            x: (batch, time, features).
            lengths: real steps of each sequence, whole numbers (batch,); None where all are `time` long.
            key: for dropout between layers; none is done without it.

        Returns:
            (batch, time, d) or (batch, time, 2 d), zero at padded steps.

        Raises:
            ValueError: shapes or lengths that do not fit, by name.
        """
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(
                f"Inputs of shape {x.shape} were given to an LSTM of {self.features} features; "
                f"give (batch, time, {self.features})."
            )
        batch, time, _ = x.shape
        mask = None
        if lengths is not None:
            check_lengths(lengths, batch, time)
            real = valid(lengths, time).T[..., None]
            mask = real.astype(x.dtype)
        states = jnp.swapaxes(x, 0, 1)
        if mask is not None:
            states = jnp.where(real, states, 0)
        for layer in range(self.layers):
            if layer and key is not None and self.dropout:
                states = drop(states, self.dropout, jax.random.fold_in(key, layer))
            width = states.shape[-1]
            out = []
            for name in self.directions:
                kernel, recurrent, bias = self._split(params[f"layer{layer}"][name], width)
                drive = (states.reshape(time * batch, width) @ kernel).reshape(time, batch, -1)
                out.append(recurrence(drive, recurrent, bias, mask, self.cell, name == "backward"))
            states = jnp.concatenate(out, -1) if len(out) > 1 else out[0]
        return jnp.swapaxes(states, 0, 1)

    def from_pytorch(self, arrays: Mapping[str, Any], prefix: str = "") -> PyTree:
        """Parameters from a PyTorch LSTM's, by its names: `weight_ih_l0`, `bias_hh_l1_reverse`, ...

        Raises:
            KeyError, ValueError: a name that is missing, a shape that does not fit, a cell of the other library.
        """
        if self.cell != "pytorch":
            raise ValueError(f"These are the parameters of a PyTorch cell, and this LSTM has cell={self.cell!r}.")
        names = {
            "input_kernel": "weight_ih",
            "hidden_kernel": "weight_hh",
            "input_bias": "bias_ih",
            "hidden_bias": "bias_hh",
        }
        like = jax.eval_shape(self.init, jax.random.key(0))
        params: dict[str, Any] = {}
        for layer in range(self.layers):
            for direction in self.directions:
                cell = {}
                for ours, theirs in names.items():
                    name = f"{prefix}{theirs}_l{layer}{'_reverse' if direction == 'backward' else ''}"
                    cell[ours] = fetch(arrays, name, like[f"layer{layer}"][direction][ours].shape)
                params.setdefault(f"layer{layer}", {})[direction] = cell
        return params


def fetch(arrays: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Array:
    """A PyTorch array by its name, transposed where it is a matrix; its shape is checked."""
    if name not in arrays:
        raise KeyError(f"The arrays lack {name!r}; they have {', '.join(sorted(arrays)[:8])}, ...")
    array = jnp.asarray(np.asarray(arrays[name]).T)
    if array.shape != shape:
        raise ValueError(f"{name!r} has shape {array.shape[::-1]}; {shape[::-1]} was expected.")
    return array


def drop(x: Array, rate: float, key: Array) -> Array:
    """Dropout: zero with probability `rate`, the rest scaled up."""
    if not 0 <= rate < 1:
        raise ValueError(f"A dropout of {rate} was given; it is a probability, from 0 to below 1.")
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def parameter_count(params: PyTree) -> int:
    """How many numbers the parameters are."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(params))
