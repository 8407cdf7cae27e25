"""The one colour map of local alignment maps, in TensorBoard and in the report."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def inferno(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [h, w] -> BGR uint8 [h, w, 3] of matplotlib's "inferno": 0 is black, 255 pale yellow."""
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), dtype=np.uint8)
