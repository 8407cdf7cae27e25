"""`read_picture`: an image file, DICOM or another kind -> the picture of a breast as it is stored, and how to go back.

The steps, in their order:

1. Decode: the stored values; of a JPEG 2000 stream only as many resolution levels as the stored size needs.
2. Padding becomes background.
3. Find the breast on the film in a small copy, cut to it, and shrink by area averaging. Stored values are averaged,
   before the transformations of the next step: they work on single values, so 0.7 instead of 12 million need to be
   looked up.
4. Grayscale transformations (`shards.image.grayscale`): modality, VOI, inversion. Where the picture shows nothing by
   the header's first ones, by its next, and at last by a stretch. For a raw image on demand those of
   `shards.image.for_processing`.
5. What lies outside of the breast's outline becomes black: burnt-in letters, film borders.
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

from shards.image.crop import Geometry, Outline, chest_wall_is_right, find_breast, small
from shards.image.decode import Stored, decode, open_image
from shards.image.for_processing import over_tissue, raw_tone, unexposed_as_air
from shards.image.grayscale import Tone, codes, padding_codes, tones_of
from shards.image.header import find_intent, find_laterality
from shards.schema import RAW, Refused

SHOWS = 0.01  # share of the pixels between darkest and brightest; with fewer a picture is blank or a silhouette


@dataclass(frozen=True)
class PictureConfig:
    """How pictures are made; a part of what decides the bytes of the shards."""

    long_side: int = 1024  # pixels; smaller images stay as they are
    bits: Literal[8, 16] = 8
    crop: bool = True  # cut to the breast and blacken what lies outside of it
    flip: bool = True  # chest wall to the left
    reduced: bool = True  # decode JPEG 2000 at the resolution that suffices
    slab: bool = False  # tomosynthesis: the mean of the middle frames instead of a refusal
    process_raw: bool = (
        False  # FOR PROCESSING images are rendered (`shards.image.for_processing`) instead of stored as they are
    )


@dataclass(frozen=True)
class Picture:
    """`pixels` [h, w] is uint8 or uint16, 0 black; `header` is None for a file that is not DICOM.

    `processed`: a raw image, rendered as `shards.image.for_processing` does. `fallbacks` are words of
    `schema.FALLBACKS`.
    """

    pixels: NDArray[Any]
    geometry: Geometry
    original_size: tuple[int, int]  # (height, width)
    header: Dataset | None
    processed: bool = False
    fallbacks: tuple[str, ...] = ()


def read_picture(path: Path, config: PictureConfig, laterality: str | None = None) -> Picture:
    """The stored picture of an image file; max(h, w) <= `long_side`, and nothing is ever enlarged.

    Its geometry depends on the pixels only; where a breast fills the picture, also on its side: `laterality` (L or R),
    else the header's. Raises `Refused` (see `open_image`, `decode`, `find_laterality`, and "blank").
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
        wanted *= 2  # the crop is much smaller than the image: it needs one level more


def _picture(stored: Stored, config: PictureConfig, laterality: str | None) -> Picture:
    """By the first tone of which the picture shows something; if none does, by the first that is not all one grey."""
    raw = stored.header if config.process_raw and stored.header and find_intent(stored.header) == RAW else None
    tones = [raw_tone(raw, stored.values.dtype)] if raw else tones_of(stored.header, stored.values.dtype)
    if not laterality and stored.header is not None:
        laterality = find_laterality(stored.header)
    first = None
    for tone in tones:
        picture = _rendered(stored, config, tone, laterality, processed=bool(raw))
        darkest, brightest = picture.pixels.min(), picture.pixels.max()
        between = np.count_nonzero((picture.pixels > darkest) & (picture.pixels < brightest))
        if between > SHOWS * picture.pixels.size:
            return picture
        if darkest < brightest:
            first = first or picture
    if first is None:
        raise Refused("blank", "all pixels of the picture are of one grey value, by every transformation")
    return first


def _rendered(stored: Stored, config: PictureConfig, tone: Tone, laterality: str | None, processed: bool) -> Picture:
    image = _without_padding(codes(stored.values), stored, tone)
    image = unexposed_as_air(image, tone) if processed else image
    glance = small(image)
    if glance.min() == glance.max() and image.min() == image.max():
        raise Refused("blank", "all pixels have the same value")
    mask = _find_breast(glance, stored, tone, processed) if config.crop or config.flip else None
    flipped = config.flip and mask is not None and chest_wall_is_right(mask, laterality)
    outline = Outline(mask if config.crop else None, image.shape)
    x0, y0, x1, y1 = outline.bounds
    scale = min(1.0, config.long_side / max(y1 - y0, x1 - x0))
    if scale <= 0.5:  # an odd row or column at the edge is given up, see _shrink
        x1, y1 = x1 - (x1 - x0) % 2, y1 - (y1 - y0) % 2
    size = max(1, round((y1 - y0) * scale)), max(1, round((x1 - x0) * scale))
    inside = outline.inside((x0, y0, x1, y1), size)
    image = _shrink(image[y0:y1, x0:x1], size)
    tone = over_tissue(tone, image, inside) if processed else tone
    pixels = tone.show(image, 2**config.bits - 1, inside) * inside
    geometry = Geometry((x0, y0, x1, y1), flipped, size, stored.level)
    pixels = np.ascontiguousarray(pixels[:, ::-1] if flipped else pixels)
    return Picture(pixels, geometry, stored.size, stored.header, processed, tone.fallbacks)


def _find_breast(glance: NDArray[Any], stored: Stored, tone: Tone, processed: bool) -> NDArray[np.uint8] | None:
    """The breast's mask in a small image. In a raw one that is shown with bright air it is looked for with dark air."""
    if stored.header is not None and not processed and find_intent(stored.header) == RAW:
        with suppress(Refused):  # "blank": values that say of no pixel that it was exposed
            raw = raw_tone(stored.header, stored.values.dtype)
            exposed = unexposed_as_air(glance, raw)
            darkest, brightest = exposed.min(), exposed.max()
            if (raw.unit[brightest] > raw.unit[darkest]) != (tone.unit[brightest] > tone.unit[darkest]):
                glance, tone = exposed, raw
    return find_breast(tone.show(glance, 2 ** (8 * glance.itemsize) - 1))


def _shrink(image: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """`image` [H, W] by area averaging to `size` (h, w): where it can, first by exactly two, which is much faster."""
    height, width = image.shape
    if height >= 2 * size[0] and width >= 2 * size[1]:
        image = cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return image if image.shape == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def _without_padding(image: NDArray[Any], stored: Stored, tone: Tone) -> NDArray[Any]:
    """Padding takes the darkest value of the rest, so that averaging at its edge does not mix in a foreign one."""
    ends = padding_codes(stored.header, stored.values.dtype)
    if ends is None:
        return image
    padding = cv2.inRange(image, ends[0], ends[1]) > 0
    used = np.flatnonzero(np.bincount(image[~padding], minlength=1))
    if not len(used):
        raise Refused("blank", "all pixels are padding")
    darkest = used[np.argmin(tone.unit[used])]
    return np.where(padding, image.dtype.type(darkest), image)
