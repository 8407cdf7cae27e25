"""An image file, DICOM or another kind -> the stored picture of a breast, and the affine map back to the original.

`read_picture` does, in this order:

1. Decode to stored values; of a JPEG 2000 stream only as many resolution levels as the stored size needs.
2. Padding becomes background.
3. Find the breast in a small copy, crop to it, and shrink by area averaging. Stored values are averaged, before the
   grayscale transformations, so that 0.7 million pixels instead of 12 million are looked up.
4. Grayscale transformations (`shards.image.grayscale`): modality, VOI, inversion. If the picture shows nothing by the
   header's first ones, its next ones are tried, and finally a stretch. A raw image is rendered by
   `shards.image.for_processing` if the configuration asks for it.
5. Pixels outside the breast's outline become black: burnt-in letters, film borders.
6. Mirror, so that the chest wall is on the left.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from shards.errors import Refused
from shards.image.crop import Geometry, Outline, chest_wall_is_right, find_breast, small
from shards.image.decode import Stored, decode, open_image
from shards.image.for_processing import attenuation_lut, stretched_over_tissue, unexposed_as_background
from shards.image.grayscale import DisplayLUT, display_luts, padding_codes, to_codes
from shards.image.header import find_intent, find_laterality
from shards.schema import RAW

SHOWS = 0.01  # share of pixels strictly between darkest and brightest; with fewer it is blank or a silhouette


@dataclass(frozen=True)
class PictureConfig:
    """How pictures are made: part of the settings that decide the bytes of shards."""

    long_side: int = 1024  # pixels; smaller images stay as they are
    bits: Literal[8, 16] = 8
    crop: bool = True  # crop to the breast and blacken the pixels outside of it
    flip: bool = True  # chest wall to the left
    reduced: bool = True  # decode JPEG 2000 at the lowest resolution that suffices
    slab: bool = False  # tomosynthesis: the mean of the middle frames instead of a refusal
    process_raw: bool = False  # render FOR PROCESSING images (`shards.image.for_processing`)


@dataclass(frozen=True)
class Picture:
    """`pixels` [h, w] is uint8 or uint16, 0 black; `header` is None for a file that is not DICOM.

    `processed`: a raw image that `shards.image.for_processing` rendered. `fallbacks` are words of `schema.FALLBACKS`.
    """

    pixels: NDArray[Any]
    geometry: Geometry
    original_size: tuple[int, int]  # (height, width)
    header: Dataset | None
    processed: bool = False
    fallbacks: tuple[str, ...] = ()


def read_picture(path: Path, config: PictureConfig, laterality: str | None = None) -> Picture:
    """The stored picture of an image file: max(h, w) <= `long_side`, never enlarged.

    Its geometry depends on the pixels alone, unless the breast fills the picture: then `laterality` (L or R), else the
    header's, decides about mirroring. Raises `Refused`: see `open_image`, `decode`, `find_laterality`; and "blank".
    """
    opened = open_image(path)
    if isinstance(opened, np.ndarray):
        return _picture(Stored(opened, opened.shape), config, laterality)
    wanted = config.long_side
    while True:
        stored = decode(opened, wanted if config.reduced else None, config.slab)
        picture = _picture(stored, config, laterality)
        if stored.level == 0 or max(picture.geometry.size) == config.long_side:
            return picture
        wanted *= 2  # the crop is much smaller than the image: decode one more resolution level


def _picture(stored: Stored, config: PictureConfig, laterality: str | None) -> Picture:
    """The picture by the first lookup table that shows something, else by the first that is not one grey level."""
    raw = stored.header if config.process_raw and stored.header and find_intent(stored.header) == RAW else None
    dtype = stored.values.dtype
    luts = [attenuation_lut(raw, dtype)] if raw else display_luts(stored.header, dtype)
    if not laterality and stored.header is not None:
        laterality = find_laterality(stored.header)
    first = None
    for lut in luts:
        picture = _rendered(stored, config, lut, laterality, processed=bool(raw))
        darkest, brightest = picture.pixels.min(), picture.pixels.max()
        between = np.count_nonzero((picture.pixels > darkest) & (picture.pixels < brightest))
        if between > SHOWS * picture.pixels.size:
            return picture
        if darkest < brightest:
            first = first or picture
    if first is None:
        raise Refused("blank", "all pixels of the picture have one grey value, by every transformation")
    return first


def _rendered(
    stored: Stored, config: PictureConfig, lut: DisplayLUT, laterality: str | None, processed: bool
) -> Picture:
    image = _without_padding(to_codes(stored.values), stored, lut)
    image = unexposed_as_background(image, lut) if processed else image
    glance = small(image)
    if glance.min() == glance.max() and image.min() == image.max():
        raise Refused("blank", "all pixels have the same value")
    mask = _find_breast(glance, stored, lut, processed) if config.crop or config.flip else None
    flipped = config.flip and mask is not None and chest_wall_is_right(mask, laterality)
    outline = Outline(mask if config.crop else None, image.shape)
    x0, y0, x1, y1 = outline.bounds
    scale = min(1.0, config.long_side / max(y1 - y0, x1 - x0))
    if scale <= 0.5:  # drop an odd row or column at the edge: see _shrink
        x1, y1 = x1 - (x1 - x0) % 2, y1 - (y1 - y0) % 2
    size = max(1, round((y1 - y0) * scale)), max(1, round((x1 - x0) * scale))
    inside = outline.inside((x0, y0, x1, y1), size)
    image = _shrink(image[y0:y1, x0:x1], size)
    lut = stretched_over_tissue(lut, image, inside) if processed else lut
    pixels = lut.render(image, 2**config.bits - 1, inside) * inside
    geometry = Geometry((x0, y0, x1, y1), flipped, size, stored.level)
    pixels = np.ascontiguousarray(pixels[:, ::-1] if flipped else pixels)
    return Picture(pixels, geometry, stored.size, stored.header, processed, lut.fallbacks)


def _find_breast(glance: NDArray[Any], stored: Stored, lut: DisplayLUT, processed: bool) -> NDArray[np.uint8] | None:
    """The breast's mask in the small image `glance` of codes [h, w].

    A raw image that is stored with a bright background is searched as if that were dark.
    """
    if stored.header is not None and not processed and find_intent(stored.header) == RAW:
        with suppress(Refused):  # "blank": by its values, no pixel was exposed
            raw = attenuation_lut(stored.header, stored.values.dtype)
            exposed = unexposed_as_background(glance, raw)
            darkest, brightest = exposed.min(), exposed.max()
            raw_rises = raw.brightness[brightest] > raw.brightness[darkest]
            if raw_rises != (lut.brightness[brightest] > lut.brightness[darkest]):
                glance, lut = exposed, raw
    return find_breast(lut.render(glance, 2 ** (8 * glance.itemsize) - 1))


def _shrink(image: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """`image` [H, W] averaged to `size` (h, w): first by exactly two where possible, which is much faster."""
    height, width = image.shape
    if height >= 2 * size[0] and width >= 2 * size[1]:
        image = cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return image if image.shape == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def _without_padding(image: NDArray[Any], stored: Stored, lut: DisplayLUT) -> NDArray[Any]:
    """`image` with padding set to the darkest other value, so that averaging at its edge mixes in no foreign one."""
    ends = padding_codes(stored.header, stored.values.dtype)
    if ends is None:
        return image
    padding = cv2.inRange(image, ends[0], ends[1]) > 0
    used = np.flatnonzero(np.bincount(image[~padding], minlength=1))
    if not len(used):
        raise Refused("blank", "all pixels are padding")
    darkest = used[np.argmin(lut.brightness[used])]
    return np.where(padding, image.dtype.type(darkest), image)
