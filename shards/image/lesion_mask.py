"""The mask of a lesion, an image as large as its mammogram and white inside of the lesion -> the lesion's box."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.errors import is_machine_error
from shards.image.decode import decode, open_image
from shards.schema import Box

LARGEST = 0.5  # share of the image that a lesion covers at most; more is an inverted mask, or a mammogram


def mask_box(path: Path, size: tuple[int, int]) -> Box | None:
    """The box around the white pixels of a mask, in pixels of its mammogram of `size` (height, width).

    White is brighter than the middle between darkest and brightest: Kaggle's copies are lossy. None if the file is
    missing or unreadable, of another size, or shows no lesion. Raises `OSError` when the machine is to blame.
    """
    try:
        opened = open_image(path)
        values = opened if isinstance(opened, np.ndarray) else decode(opened).values
    except Exception as error:  # untrusted input: a parser may raise anything
        if isinstance(error, OSError) and is_machine_error(error):
            raise
        return None
    if values.shape != size:
        return None
    white = values > (int(values.min()) + int(values.max())) // 2
    if not 0 < np.count_nonzero(white) <= LARGEST * white.size:
        return None
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1
