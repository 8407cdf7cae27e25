"""Maps of patches at the resolution of pixels: bilinear between the centres of the patches that have a value.

Letters: gh x gw patches of an image, H x W pixels.
"""

from __future__ import annotations

import numpy as np

from mama.evaluate.arrays import Float32s, Float64s, Ints

PIXELS = 1 << 16  # of one map at most that are computed at once: they stay in a core's cache


def smooth(values: Float32s, size: tuple[int, int]) -> Float32s:
    """Maps [..., gh, gw] on all pixels of their canvas (H, W), [..., H, W]."""
    down, across = (
        (np.arange(pixels) + 0.5) * count / pixels for pixels, count in zip(size, values.shape[-2:], strict=True)
    )
    return at_points(values, down, across)


def at_points(values: Float32s, down: Float64s, across: Float64s) -> Float32s:
    """Maps [..., gh, gw], NaN where a patch has no value, at rows `down` [H] and columns `across` [W]: [..., H, W].

    These are in patches: patch i reaches from i to i + 1. A value is the sum over the four patches around a point of
    weight x value, divided by the sum of weights of those that have one; beyond the outermost centres a map goes on as
    it ends. So no value is above the highest patch, whose centre has it. NaN where the point's own patch has no
    value, or the point is NaN or lies in no patch.
    """
    known = np.isfinite(values)
    filled = np.where(known, values, 0).astype(np.float64)
    rows, columns = (_weights(*axis) for axis in zip((down, across), values.shape[-2:], strict=True))
    own_rows, own_columns = (_own_patch(*axis) for axis in zip((down, across), values.shape[-2:], strict=True))
    in_a_patch = np.pad(known, [(0, 0)] * (values.ndim - 2) + [(0, 1), (0, 1)])  # the last row and column: no patch
    found = np.empty((*values.shape[:-2], len(down), len(across)), np.float32)
    step = max(1, PIXELS // max(1, len(across)))
    for start in range(0, len(down), step):
        band = slice(start, start + step)
        sums, weights = (rows[band] @ part @ columns.T for part in (filled, known.astype(np.float64)))
        own = in_a_patch[..., own_rows[band, None], own_columns]  # a quarter of the weight at least is its own
        found[..., band, :] = np.divide(sums, weights, out=np.full(sums.shape, np.nan), where=own)
    return found


def _weights(points: Float64s, count: int) -> Float64s:
    """Of `count` patches at each point, [points, count]: 1 at a patch's centre, falling to 0 at the next ones."""
    held = np.clip(np.nan_to_num(points), 0.5, count - 0.5)
    found: Float64s = np.clip(1 - np.abs(held[:, None] - (np.arange(count) + 0.5)), 0, None)
    return found


def _own_patch(points: Float64s, count: int) -> Ints:
    """The patch that each point lies in, or -1."""
    inside = (points >= 0) & (points <= count)
    return np.where(inside, np.minimum(np.floor(np.where(inside, points, 0)), count - 1), -1).astype(np.int64)
