"""Find the breast, and map the stored picture back to the original image.

Coordinates are continuous: pixel i covers [i, i + 1], so the box (0, 0, width, height) is the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.image.film import LEFT, RIGHT, Field, cut_off, turned, unpadded, without_bright_edges
from shards.schema import Box

SEARCH_SIDE = 256  # long side, in pixels, of the small image in which the breast is searched
THRESHOLDS = 3  # see _bright
MARGIN = 0.02  # of the long side, kept around the breast: the faint skin line lies outside of an Otsu mask
STRIP = 0.04  # of the long side: thinner structures are film borders and letters, not a breast
CORE = 0.08  # of the long side: no letter lies deeper below the skin
NIPPLE = 0.03  # of the long side
LETTERS = (0.01, 0.08)  # smallest and largest share of the breast's area
SHARP = 0.6  # least ratio of the mean Laplacian to the mean grey level of letters
WHITE = 153  # least grey level of their bright pixels
FULL = 0.1  # least relative difference of a breast's outer quarters, unless it fills the picture
SMALLEST_BREAST = 0.03  # of the image area: below, there is no breast, and the whole image is kept

Mask = NDArray[np.uint8]  # 0 or 255


@dataclass(frozen=True)
class Geometry:
    """The map from the original image to the stored one: decode at a level, crop, mirror, resize to (height, width).

    `crop` is (x0, y0, x1, y1) in pixels of the decoded image, which has 1 / 2**`level` of the original's
    resolution. Its pixel i is the low-pass sample at the original's pixel i * 2**level (ISO/IEC 15444-1 F.3): centres,
    not edges, coincide, hence the shift in `to_original`.
    """

    crop: tuple[int, int, int, int]
    flipped: bool
    size: tuple[int, int]
    level: int = 0

    @property
    def to_original(self) -> tuple[float, float, float, float, float, float]:
        """Row-major 2 x 3 affine from stored (x, y) to original (x, y)."""
        x0, y0, x1, y1 = self.crop
        step = 2**self.level
        shift = (step - 1) / 2
        scale_x, scale_y = step * (x1 - x0) / self.size[1], step * (y1 - y0) / self.size[0]
        if self.flipped:
            return (-scale_x, 0.0, float(step * x1 - shift), 0.0, scale_y, float(step * y0 - shift))
        return (scale_x, 0.0, float(step * x0 - shift), 0.0, scale_y, float(step * y0 - shift))

    def original_crop(self, original: tuple[int, int]) -> tuple[int, int, int, int]:
        """The crop (x0, y0, x1, y1) in whole pixels of the original of (height, width)."""
        x0, y0, x1, y1 = (2**self.level * side for side in self.crop)
        return x0, y0, min(x1, original[1]), min(y1, original[0])

    def box_to_stored(self, box: Box) -> Box | None:
        """A box of the original in stored pixels, clipped to the image; None if it lies outside."""
        a, _, tx, _, d, ty = self.to_original
        xs = sorted(((box[0] - tx) / a, (box[2] - tx) / a))
        ys = sorted(((box[1] - ty) / d, (box[3] - ty) / d))
        (x0, x1), (y0, y1) = np.clip(xs, 0, self.size[1]), np.clip(ys, 0, self.size[0])
        return (float(x0), float(y0), float(x1), float(y1)) if x1 > x0 and y1 > y0 else None


@dataclass(frozen=True)
class Outline:
    """A small mask scaled to the whole image of `shape` (height, width); without a mask, all of the image."""

    mask: Mask | None
    shape: tuple[int, ...]

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """The bounding box (x0, y0, x1, y1) of the mask in pixels of the whole image."""
        height, width = self.shape
        if self.mask is None:
            return 0, 0, width, height
        rows = np.flatnonzero(self.mask.max(axis=1)[_nearest(self.mask.shape[0], height)])
        columns = np.flatnonzero(self.mask.max(axis=0)[_nearest(self.mask.shape[1], width)])
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    def inside(self, bounds: tuple[int, int, int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
        """Which pixels belong to the breast, bool [h, w], in the part within `bounds` shrunk to `size` (h, w)."""
        if self.mask is None:
            return np.ones(size, dtype=bool)
        height, width = self.shape
        x0, y0, x1, y1 = bounds
        rows = _nearest(self.mask.shape[0], height)[y0 + _nearest(y1 - y0, size[0])]
        columns = _nearest(self.mask.shape[1], width)[x0 + _nearest(x1 - x0, size[1])]
        return self.mask[:, columns][rows] > 0


def _nearest(few: int, many: int) -> NDArray[np.int64]:
    """For each of `many` pixels, the one of `few` that covers its start."""
    return np.arange(many) * few // many


def find_breast(image: NDArray[Any]) -> Mask | None:
    """The filled outline of the breast with its margin, in a small display image [h, w]; None if none is found.

    The largest bright component on the film (`shards.image.film`) that is no thin strip, without letters. Its convex
    hull, because dark tissue is tissue too. There is no margin where the film's edge cuts the breast off.
    """
    x0, y0, x1, y1 = _film(image)
    grey = _stretch(image[y0:y1, x0:x1])
    bright = cv2.morphologyEx(_bright(grey), cv2.MORPH_OPEN, _disc(STRIP * max(image.shape)))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(bright)
    if count < 2:
        return None
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if stats[largest, cv2.CC_STAT_AREA] < SMALLEST_BREAST * image.size:
        return None
    breast = (labels == largest).astype(np.uint8)
    left, right = (cut_off(turned(grey, side), turned(breast, side)) for side in (LEFT, RIGHT))
    x0, x1, breast, grey = x0 + left, x1 - right, breast[:, left : x1 - x0 - right], grey[:, left : x1 - x0 - right]
    breast = _without_letters(breast, grey, max(image.shape))
    edges, _ = cv2.findContours(breast, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = np.zeros(breast.shape, dtype=np.uint8)
    cv2.fillConvexPoly(hull, cv2.convexHull(max(edges, key=cv2.contourArea)), 255)
    mask = np.zeros(image.shape, dtype=np.uint8)
    mask[y0:y1, x0:x1] = cv2.dilate(hull, _disc(2 * MARGIN * max(image.shape)))
    return mask


def _film(image: NDArray[Any]) -> Field:
    x0, y0, x1, y1 = unpadded(_stretch(image))
    grey = _stretch(image[y0:y1, x0:x1])
    left, top, right, bottom = without_bright_edges(grey, _bright(grey), max(1, round(STRIP * max(image.shape))))
    return x0 + left, y0 + top, x0 + right, y0 + bottom


def _without_letters(breast: Mask, grey: NDArray[np.uint8], long_side: int) -> Mask:
    """`breast` without letters that touch the skin: sharp black-and-white tails, longer than a nipple."""
    core = cv2.distanceTransform(breast, cv2.DIST_L2, 5) > CORE * long_side
    away = cv2.distanceTransform((~core).astype(np.uint8), cv2.DIST_L2, 5) > (CORE + NIPPLE) * long_side
    _, labels, stats, _ = cv2.connectedComponentsWithStats((away & (breast > 0)).astype(np.uint8))
    contrast = np.abs(cv2.Laplacian(grey, cv2.CV_32F))
    height, width = breast.shape
    kept = breast.copy()
    for number, (x, y, w, h, area) in enumerate(stats[1:], 1):
        inside = x > 0 and y > 0 and x + w < width and y + h < height
        if inside and LETTERS[0] <= area / np.count_nonzero(breast) <= LETTERS[1]:
            tail = labels == number
            sharp = contrast[tail].mean() >= SHARP * grey[tail].mean()
            kept[tail & (sharp and np.percentile(grey[tail], 90) >= WHITE)] = 0
    return kept


def _bright(grey: NDArray[np.uint8]) -> Mask:
    """The mask of all that is not background, by Otsu's threshold (IEEE Trans. SMC 9, 1979) applied three times.

    In contrast-enhanced images and dense breasts, the first threshold separates bright tissue, inside the breast.
    Clipping grey levels there and thresholding again moves it outwards to the skin, where it stays.
    """
    grey = cv2.GaussianBlur(grey, (7, 7), 0).astype(np.uint8)
    for _ in range(THRESHOLDS):
        threshold, bright = cv2.threshold(grey, 0, 255, cv2.THRESH_OTSU)
        grey = _stretch(np.minimum(grey, np.uint8(threshold)))
    return bright.astype(np.uint8)


def small(image: NDArray[Any]) -> NDArray[Any]:
    """`image` [H, W] shrunk to `SEARCH_SIDE` pixels on its long side; of a large one, every n-th pixel is used."""
    step = max(1, max(image.shape) // (4 * SEARCH_SIDE))
    image = image[::step, ::step]
    scale = min(1.0, SEARCH_SIDE / max(image.shape))
    return cv2.resize(np.ascontiguousarray(image), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def chest_wall_is_right(mask: Mask, laterality: str | None = None) -> bool:
    """Whether the chest wall is on the right: a breast is tall there and ends at the nipple.

    Compares the outer quarters of its width. If the breast fills the picture, `laterality` (L, R) decides: by
    convention, the chest wall of a left breast is on the left.
    """
    x, y, width, height = cv2.boundingRect(mask)
    breast = mask[y : y + height, x : x + width]
    quarter = max(1, width // 4)
    left, right = np.count_nonzero(breast[:, :quarter]), np.count_nonzero(breast[:, -quarter:])
    if laterality and abs(right - left) < FULL * max(left, right):
        return laterality == "R"
    return bool(right > left)


def _stretch(image: NDArray[Any]) -> NDArray[np.uint8]:
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U).astype(np.uint8)  # type: ignore[call-overload]


def _disc(diameter: float) -> NDArray[np.uint8]:
    side = 2 * round(diameter / 2) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)).astype(np.uint8)
