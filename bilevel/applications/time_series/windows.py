"""Windows of a series, split in time; and synthetic ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class TimeSplit:
    """Windows of the parts of a series, in time's order, none of which shares a time step with another part's.

    Attributes:
        train, validation, test: windows (n, length, channels), scaled to -1..1 by the extremes of the training part.
        low, high: those extremes, by channel.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    low: np.ndarray
    high: np.ndarray


def windows(series: Any, length: int, stride: int = 1) -> np.ndarray:
    """All windows of a series (steps, channels), `stride` apart: (n, length, channels).

    Raises:
        ValueError: the series is shorter than a window.
    """
    series = np.asarray(series)
    if series.ndim != 2:
        raise ValueError(f"A series has the shape (steps, channels), not {series.shape}: give one column per channel.")
    if length < 2 or stride < 1:
        raise ValueError(f"windows(length={length}, stride={stride}): a length of 2 and a stride of 1 are the least.")
    if len(series) < length:
        raise ValueError(
            f"The series has {len(series)} steps, fewer than the length {length} asked for: give a longer series or "
            "shorter windows."
        )
    view = np.lib.stride_tricks.sliding_window_view(series, length, axis=0)[::stride]
    return np.ascontiguousarray(np.moveaxis(view, -1, 1))


def filled(series: Any) -> np.ndarray:
    """A series whose missing values (NaN) are interpolated in time, channel by channel; its ends repeat what is known.

    Raises:
        ValueError: a channel has no values.
    """
    series = np.array(series, np.result_type(np.float32, np.asarray(series).dtype))
    if series.ndim != 2:
        raise ValueError(f"filled was given a series of the shape {series.shape}; (steps, channels) is needed.")
    at = np.arange(len(series))
    for j in range(series.shape[1]):
        known = np.isfinite(series[:, j])
        if not known.any():
            raise ValueError(f"Channel {j} has no values at all: leave it out.")
        series[:, j] = np.interp(at, at[known], series[known, j])
    return series


def split_in_time(
    series: Any,
    length: int,
    *,
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
    gap: int | None = None,
    stride: int = 1,
    names: Sequence[str] | None = None,
) -> TimeSplit:
    """Cut a series into three parts with gaps between them, and each part into windows.

    Args:
        series: (steps, channels).
        length: of the windows.
        shares: of the steps, for training, validation and test.
        gap: the steps left out between two parts, `length` by default, and at least so many.
        stride: between the starts of two windows.
        names: of the channels, for errors.

    Raises:
        ValueError: a channel is constant in the training part, values are missing, a part is shorter than a window, or
            the gap is too short.
    """
    series = np.asarray(series)
    if series.ndim != 2:
        raise ValueError(f"A series has the shape (steps, channels), not {series.shape}: give one column per channel.")
    gap = length if gap is None else gap
    if gap < length:
        raise ValueError(
            f"split_in_time(gap={gap}, length={length}): with a gap shorter than the windows what is validated on is "
            "close to, or part of, what was trained on. Give a gap of the length at least."
        )
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"split_in_time(shares={shares}): give three positive shares whose sum is 1.")
    _check_values(series, names)
    used = len(series) - 2 * gap
    ends = np.cumsum(np.asarray(shares) * max(used, 0)).round().astype(int)
    bounds = [(0, ends[0]), (ends[0] + gap, ends[1] + gap), (ends[1] + 2 * gap, ends[2] + 2 * gap)]
    for part, (first, last) in zip(("training", "validation", "test"), bounds, strict=True):
        if last - first < length:
            raise ValueError(
                f"The {part} part has {max(last - first, 0)} of {len(series)} steps, fewer than the length {length} "
                "asked for: give a longer series, shorter windows or other shares."
            )
    train = series[: ends[0]]
    low, high = train.min(0), train.max(0)
    for j in np.flatnonzero(low == high):
        raise ValueError(
            f"{_name(int(j), names)} is constant ({low[j]:g}) in the training part: it has no correlation with "
            "others. Leave it out."
        )
    scaled = (2 * (series - low) / (high - low) - 1).astype(np.float32)
    parts = [windows(scaled[first:last], length, stride) for first, last in bounds]
    return TimeSplit(parts[0], parts[1], parts[2], low, high)


def _check_values(values: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Raise where a channel, the last axis, has missing or infinite values."""
    bad = ~np.isfinite(values)
    for j in np.flatnonzero(bad.any(axis=tuple(range(values.ndim - 1)))):
        raise ValueError(
            f"{_name(int(j), names)} has {bad[..., j].sum()} missing or infinite values of {bad[..., j].size}: fill "
            "them (`filled`) or leave the channel out."
        )


def _name(j: int, names: Sequence[str] | None) -> str:
    return f"Channel {j}" if names is None else f"Channel {j} ({names[j]})"


def sines_windows(count: int, length: int = 24, channels: int = 5, seed: int = 0) -> np.ndarray:
    """Independent windows of sines, -1..1: sin(f s + phase) at s = 0, 1, ..., f and phase by channel; float32.

    Both are uniform on 0..0.1 (the benchmark of TimeGAN, Yoon et al., NeurIPS 2019).
    """
    random = np.random.default_rng(seed)
    frequency, phase = random.uniform(0, 0.1, (2, count, 1, channels))
    return np.sin(frequency * np.arange(length)[:, None] + phase).astype(np.float32)


def check_disjoint(train: np.ndarray, validation: np.ndarray) -> None:
    """Raise where two time steps in a row of a validation window are those of a training window: the split leaks."""

    def rows(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float32)  # of any two precisions
        return np.concatenate([x[:, :-1], x[:, 1:]], -1).reshape(-1, 2 * x.shape[-1])

    seen = {row.tobytes() for row in rows(train)}
    leaks = np.array([row.tobytes() in seen for row in rows(validation)])
    shared = leaks.reshape(len(validation), -1).any(1).sum()
    if shared:
        raise ValueError(
            f"{shared} of {len(validation)} validation windows share time steps with training windows: the split "
            "leaks. Split the series in time, with a gap (`split_in_time`), before cutting it into windows."
        )


_LARGEST = 10.0  # what validation windows go beyond the training part's extremes by is no other scale


def check_windows(name: str, values: Any, length: int | None = None, channels: int | None = None) -> np.ndarray:
    """Windows as an array, or an error that names what is wrong with them."""
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"The {name} windows are of {values.dtype}, and noise is added to them: scale them to -1..1 as floats "
            "(`split_in_time`)."
        )
    if values.ndim != 3 or len(values) == 0:
        raise ValueError(f"The {name} windows have the shape {values.shape}; (n, length, channels) is needed.")
    if length is not None and values.shape[1] < length:
        raise ValueError(f"The {name} windows have {values.shape[1]} steps, fewer than the {length} asked for.")
    if (length is not None and values.shape[1] != length) or (channels is not None and values.shape[2] != channels):
        raise ValueError(
            f"The {name} windows have the shape {values.shape}; (n, {length}, {channels}) is needed: cut them alike."
        )
    _check_values(values)
    if (largest := float(np.abs(values).max())) > _LARGEST:
        raise ValueError(
            f"The {name} windows have values of size {largest:.3g}, and -1..1 is needed, in which samples are cut off: "
            "scale them by the training part's extremes (`split_in_time`)."
        )
    for j in range(values.shape[2]):
        if values[..., j].min() == values[..., j].max():
            raise ValueError(
                f"Channel {j} of the {name} windows is constant: it has no correlation with others. Leave it out."
            )
    return values
