"""One image as the model sees it: the result of the picture code of packing, and the way back to the original."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Seen:
    """An image on its way to the model.

    `stored` [h, w] is what packing stores, `canvas` [H, W] is `stored` scaled to the canvas of the model. Of the stored
    image (x, y), the row-major 2 x 3 affine `to_original` makes the pixel of the original file.
    """

    patient: str | None
    laterality: str | None  # L | R
    view: str | None  # CC | MLO
    stored: NDArray[np.uint8]
    canvas: NDArray[np.uint8]
    original_size: tuple[int, int]  # (height, width)
    to_original: tuple[float, float, float, float, float, float]
    flipped: bool  # mirrored, so that the chest wall is on the left
