"""Find the breast, turn it so that the chest wall is on the left, and shrink it: one affine map, kept with the image.

Coordinates are continuous: pixel i covers [i, i + 1], so a box (0, 0, width, height) is the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.schema import Box

SEARCH_SIDE = 256  # long side, in pixels, of the small image in which the breast is searched
CUTS = 3  # see find_breast
MARGIN = 0.02  # of the long side, kept around the breast: the faint skin line lies outside of an Otsu mask
STRIP = 0.04  # of the long side: thinner structures are film borders and letters, not a breast
SMALLEST_BREAST = 0.03  # of the image area: less is no breast, and the whole image is kept

Mask = NDArray[np.uint8]  # 0 or 255


@dataclass(frozen=True)
class Geometry:
    """From the original image to the stored one: crop, mirror, resize. Sizes are (height, width) in pixels."""

    crop: tuple[int, int, int, int]  # x0, y0, x1, y1 in the original
    flipped: bool
    size: tuple[int, int]

    @property
    def to_original(self) -> tuple[float, float, float, float, float, float]:
        """Row-major 2 x 3 affine from stored (x, y) to original (x, y)."""
        x0, y0, x1, y1 = self.crop
        scale_x, scale_y = (x1 - x0) / self.size[1], (y1 - y0) / self.size[0]
        if self.flipped:
            return (-scale_x, 0.0, float(x1), 0.0, scale_y, float(y0))
        return (scale_x, 0.0, float(x0), 0.0, scale_y, float(y0))

    def box_to_stored(self, box: Box) -> Box | None:
        """A box of the original in stored pixels, cut at the image's edge; None where nothing of it is left."""
        a, _, tx, _, d, ty = self.to_original
        xs = sorted(((box[0] - tx) / a, (box[2] - tx) / a))
        ys = sorted(((box[1] - ty) / d, (box[3] - ty) / d))
        (x0, x1), (y0, y1) = np.clip(xs, 0, self.size[1]), np.clip(ys, 0, self.size[0])
        return (float(x0), float(y0), float(x1), float(y1)) if x1 > x0 and y1 > y0 else None


def prepare(image: NDArray[Any], long_side: int, crop: bool = True) -> tuple[NDArray[np.uint8], Geometry]:
    """Display image [H, W] (uint8 or uint16) to the stored one [h, w] (uint8), max(h, w) <= `long_side`.

    With `crop`, everything outside of the breast's outline is set to black (burnt-in letters, film
    borders) and cut away; the geometry depends on the pixels only, never on a label. An image is never
    enlarged. The chest wall ends up on the left, with or without `crop`.
    """
    height, width = image.shape
    mask = find_breast(image)
    flipped = mask is not None and chest_wall_is_right(mask)
    box = (0, 0, width, height)
    if crop and mask is not None:
        outline = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        x, y, w, h = cv2.boundingRect(outline)
        box = (x, y, x + w, y + h)
        image = cv2.bitwise_and(image, image, mask=outline)[y : y + h, x : x + w]
    scale = min(1.0, long_side / max(image.shape))
    size = tuple(max(1, round(side * scale)) for side in image.shape)
    small = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA) if scale < 1 else image
    if small.dtype == np.uint16:
        small = ((small.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
    if flipped:
        small = small[:, ::-1]
    return np.ascontiguousarray(small), Geometry(box, flipped, (size[0], size[1]))


def find_breast(image: NDArray[Any]) -> Mask | None:
    """Outline of the breast with its margin, filled, at most `SEARCH_SIDE` long; None if none can be told.

    Otsu's threshold (IEEE Trans. SMC 9, 1979), three times: where bright tissue and not the breast
    stands out (contrast-enhanced images, dense tissue), the first threshold lies inside the breast;
    cutting the grey values there and asking again moves it outwards to the skin, and stays put once
    it is there. The largest component that is no thin strip is taken, as its convex hull, because
    dark tissue is tissue.
    """
    scale = min(1.0, SEARCH_SIDE / max(image.shape))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    grey = cv2.GaussianBlur(_stretch(small), (7, 7), 0)
    for _ in range(CUTS):
        threshold, bright = cv2.threshold(grey, 0, 255, cv2.THRESH_OTSU)
        grey = _stretch(np.minimum(grey, np.uint8(threshold)))
    bright = cv2.morphologyEx(bright, cv2.MORPH_OPEN, _disc(STRIP * max(small.shape)))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(bright)
    if count < 2:
        return None
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if stats[largest, cv2.CC_STAT_AREA] < SMALLEST_BREAST * small.size:
        return None
    points = cv2.findNonZero((labels == largest).astype(np.uint8))
    mask = np.zeros(small.shape, dtype=np.uint8)
    cv2.fillConvexPoly(mask, cv2.convexHull(points), 255)
    return cv2.dilate(mask, _disc(2 * MARGIN * max(small.shape))).astype(np.uint8)


def chest_wall_is_right(mask: Mask) -> bool:
    """A breast is tall at the chest wall and runs out at the nipple: compare the outer quarters of its width."""
    x, y, width, height = cv2.boundingRect(mask)
    breast = mask[y : y + height, x : x + width]
    quarter = max(1, width // 4)
    return int(np.count_nonzero(breast[:, -quarter:])) > int(np.count_nonzero(breast[:, :quarter]))


def _stretch(image: NDArray[Any]) -> NDArray[np.uint8]:
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U).astype(np.uint8)  # type: ignore[call-overload]


def _disc(diameter: float) -> NDArray[np.uint8]:
    side = 2 * round(diameter / 2) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)).astype(np.uint8)
