"""The exposed film in a digitised mammogram: without the padding around it and the bright lines at its edges.

A digital image has neither, and is film as a whole. Images [h, w] are small and grey. Each side is rotated to the left
and examined there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = tuple[int, int, int, int]  # x0, y0, x1, y1

SIDES = LEFT, TOP, RIGHT, BOTTOM = range(4)  # as quarter turns that bring each to the left
BORDERS = 3  # nested at most: padding, the edge of the scanner's glass, the edge of the film
THIN = 2  # pixels: a single line is no padding, unless it lies inside of other padding
EVEN = 2  # of 255 grey levels: the most that padding varies, also in a scan stored as JPEG
WHOLE = 0.8  # share of the rows that must begin on one line at a film's edge; a skin line is round
REACHING, FAR = 3, 4  # rows and pixels: fewer are dust or a blurred edge
TILT = 0.03  # pixels a row that a film may lean at most
LIT = 0.6  # of the breast's upper quartile: brightness of a bright edge
PART = 0.25  # of a side: shortest bright edge, and least background beside it, as tissue has none
STRAIGHT = 0.5  # share of the breast's rows that begin together if the film's edge cuts the breast off


def turned(image: NDArray[Any], side: int) -> NDArray[Any]:
    """A NumPy view of `image`, rotated so that its left, top, right or bottom `side` is on the left."""
    return np.rot90(image, side)


def unpadded(grey: NDArray[np.uint8]) -> Field:
    """The part of `grey` [h, w] inside of the padding."""
    inner = whole = (0, 0, grey.shape[1], grey.shape[0])
    for _ in range(BORDERS):
        x0, y0, x1, y1 = field = inner
        widths = [_padding(turned(grey[y0:y1, x0:x1], side)) for side in SIDES]
        known = [now != before for now, before in zip(field, whole, strict=True)]
        inner = _without((width * (width >= THIN or more) for width, more in zip(widths, known, strict=True)), field)
        if inner == field:
            break
    return inner


def without_bright_edges(grey: NDArray[np.uint8], bright: NDArray[np.uint8], deepest: int) -> Field:
    """The part of `grey` [h, w] without bright edges, each narrower than `deepest` pixels; `bright` is a mask."""
    white = grey > (LIT * np.percentile(grey[bright > 0], 75) if bright.any() else 255)
    edges = (_bright_edge(turned(white, side), turned(bright, side), deepest) for side in SIDES)
    return _without(edges, (0, 0, grey.shape[1], grey.shape[0]))


def _without(widths: Iterable[int], field: Field) -> Field:
    left, top, right, bottom = widths
    x0, y0, x1, y1 = field[0] + left, field[1] + top, field[2] - right, field[3] - bottom
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else field


def _padding(image: NDArray[np.uint8]) -> int:
    """Columns of even padding on the left, up to a film whose background has another grey level."""
    other = np.abs(image.astype(np.int16) - int(np.median(image[:, 0]))) > EVEN
    starts = other.argmax(axis=1)
    line = _straight_line(starts) if other.any(axis=1).mean() >= WHOLE else None
    if line is None:
        return 0
    # A connected part beyond the line is tissue (a nipple beyond the paddle's edge): the line is not the film's.
    beyond = np.flatnonzero((starts > 0) & (starts < line - FAR))
    joined = [row for row in beyond if other[row, starts[row] : int(line[row]) + 2].all()]
    return 0 if len(joined) >= REACHING else int(np.median(starts))


def _straight_line(starts: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """The nearly vertical line [h] on which most rows start; None if they do not."""
    half = len(starts) // 2
    if not half:
        return None
    slope = (np.median(starts[half:]) - np.median(starts[:half])) / half
    line = np.median(starts) + slope * (np.arange(len(starts)) - len(starts) / 2)
    return line if abs(slope) <= TILT and (np.abs(starts - line) <= 1.5).mean() >= WHOLE else None


def _bright_edge(white: NDArray[np.bool_], bright: NDArray[np.uint8], deepest: int) -> int:
    """White columns on the left with only background behind them: the film's edge, or leaked light."""
    background = ~bright[:, deepest : 2 * deepest].any(axis=1)
    if bright.shape[1] < 2 * deepest or background.mean() < PART:
        return 0
    share = white[background, :deepest].mean(axis=0) >= PART
    first = int(np.argmax(share))
    dark = ~share[first:]
    if not share[first] or first > 2 or not dark.any():
        return 0
    return first + int(np.argmax(dark)) + 1  # and the pixel that lies across its inner edge


def cut_off(grey: NDArray[np.uint8], breast: NDArray[np.uint8]) -> int:
    """Columns of background on the left if the film's edge cuts `breast` off in a straight line; 0 at a skin line."""
    rows = np.flatnonzero(breast.any(axis=1))
    start = breast[rows].argmax(axis=1)
    straight = rows[start <= start.min() + 2]
    first = int(start.min())
    inner = grey[straight, first + 6 : first + 12]
    if not first or not inner.size or len(straight) < STRAIGHT * len(rows):
        return 0
    half_way = (np.median(grey[breast == 0]) + inner.mean()) / 2
    edge = int(np.argmax(grey[straight].mean(axis=0) >= half_way))
    return edge if edge <= first + 4 else 0
