"""Smooth maps by plain loops over pixels and patches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def naive_smooth(values: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float64]:
    """A map [gh, gw], NaN where a patch has no value -> its values [H, W] at the centres of pixels."""
    (height, width), (rows, columns) = size, values.shape
    found = np.full(size, np.nan)
    for y, x in np.ndindex(height, width):
        down, across = (y + 0.5) * rows / height, (x + 0.5) * columns / width
        if np.isnan(values[int(down), int(across)]):
            continue
        down, across = min(max(down, 0.5), rows - 0.5), min(max(across, 0.5), columns - 0.5)
        total = weights = 0.0
        for row, column in np.ndindex(rows, columns):
            weight = max(0.0, 1 - abs(down - row - 0.5)) * max(0.0, 1 - abs(across - column - 0.5))
            if weight and not np.isnan(values[row, column]):
                total, weights = total + weight * float(values[row, column]), weights + weight
        found[y, x] = total / weights
    return found
