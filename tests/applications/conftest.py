"""What the tests of several applications compare with."""

from __future__ import annotations

import itertools

import numpy as np
import pytest


@pytest.fixture(scope="session")
def depthwise_by_hand():
    """A depthwise convolution's definition, pixel by pixel."""
    return _depthwise_by_hand


def _depthwise_by_hand(x, kernel, stride, dilation):
    """The definition, pixel by pixel."""
    k, pad = kernel.shape[-1], dilation * (kernel.shape[-1] - 1) // 2
    t, c = kernel.shape[:2]
    m = t // x.shape[0]
    rows, columns = (-(-side // stride) for side in x.shape[2:4])
    out = np.zeros((t, c, rows, columns, x.shape[-1]))
    for i, j, a, b in itertools.product(range(rows), range(columns), range(k), range(k)):
        r, s = stride * i + dilation * a - pad, stride * j + dilation * b - pad
        if 0 <= r < x.shape[2] and 0 <= s < x.shape[3]:
            for e in range(t):
                out[e, :, i, j] += kernel[e, :, a, b, None] * x[e // m, :, r, s]
    return out
