"""Stored values -> grey levels: the grayscale transformations of PS3.4 N.2, combined in one lookup table an image.

A *code* is a stored value as an unsigned integer (`to_codes`), and so an index of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from shards.image.windows_luts import Values, apply_each, modality_transformations, voi_transformations

SIGN = np.uint16(0x8000)
GREY = ("MONOCHROME1", "MONOCHROME2")
MOST_TRIED = 16  # VOI LUTs and windows of an image: each may be rendered, and a header can hold thousands


@dataclass(frozen=True)
class DisplayLUT:
    """The brightness of each code.

    `brightness` [2**bits] runs from 0 black to 1 white after a VOI transformation. Without one it has any range
    (`stretch`), and larger is brighter. `fallbacks` are words of `schema.FALLBACKS`.
    """

    brightness: NDArray[np.float32]
    stretch: bool
    fallbacks: tuple[str, ...] = ()

    def render(self, codes: NDArray[Any], white: int, among: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        """Codes [h, w] as grey levels [h, w] of 0..`white` (255: uint8, 65535: uint16).

        With `stretch`, black and white are the darkest and the brightest entry between the smallest and the largest
        code `among` those pixels [h, w].
        """
        brightness = self.brightness
        if self.stretch:
            counted = codes
            if among is not None and among.any():  # the others count as one more of the first
                counted = np.where(among, codes, codes.flat[among.argmax()])
            used = brightness[counted.min() : int(counted.max()) + 1]
            low, high = float(used.min()), float(used.max())
            brightness = (brightness - low) / (high - low if high > low else 1.0)
        table = np.rint(brightness.clip(0, 1) * white).astype(np.uint8 if white == 255 else np.uint16)
        return table.take(codes)


def to_codes(values: NDArray[Any]) -> NDArray[Any]:
    """Signed or unsigned values as unsigned ones in the same order, so that averages of codes average values."""
    if values.dtype.kind == "u":
        return values
    sign = SIGN if values.dtype.itemsize == 2 else np.uint8(0x80)
    return values.view(f"u{values.dtype.itemsize}") ^ sign


def display_luts(header: Dataset | None, dtype: np.dtype[Any]) -> Iterator[DisplayLUT]:
    """The lookup tables of an image in the order of preference; `header` is None for a file that is not DICOM.

    1. Modality LUT, else rescale, else the stored values.
    2. VOI: the items of VOILUTSequence, then the windows by VOILUTFunction, in the header's order. Their output range
       becomes black to white, so that the images of one scanner stay comparable.
    3. Inversion, once, for MONOCHROME1 or an INVERSE presentation LUT: both mean the same (PS3.3 C.11.6.1).

    Without a VOI transformation there is no range, and the image is stretched. 8-bit files that are not DICOM are
    ready for display. So is grey stored as colour: windows and LUTs do not apply to it (PS3.3 C.11.2.1.2).

    A transformation that cannot be used (no data, no number, no width, slope 0) is skipped. The later tables are for
    images that show nothing by the earlier ones; the last two stretch modality values and stored values.
    """
    bits = 8 * dtype.itemsize
    values = np.arange(2**bits, dtype=np.float64) - (2 ** (bits - 1) if dtype.kind == "i" else 0)
    if header is None or header.PhotometricInterpretation not in GREY:
        yield DisplayLUT((values / (2**bits - 1)).astype(np.float32), stretch=bits == 16)
        return
    inverted = header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE"
    modality, lost = apply_modality(header, values)
    inputs = modality[_stored(header, values)]
    skipped: tuple[str, ...] = ()
    for voi in apply_each(islice(voi_transformations(header, inputs), MOST_TRIED), modality):
        if voi:
            unit, words = voi
            yield DisplayLUT((1 - unit if inverted else unit).astype(np.float32), False, (*lost, *words, *skipped))
        skipped = ("next",)
    skipped = ("stretch",) if skipped else ()
    yield DisplayLUT((-modality if inverted else modality).astype(np.float32), True, (*lost, *skipped))
    if modality is not values:
        yield DisplayLUT((-values if inverted else values).astype(np.float32), True, ("modality", *skipped))


def apply_modality(header: Dataset, values: Values) -> tuple[Values, tuple[str, ...]]:
    """All `values` of a bit depth by modality LUT or rescale, unchanged if neither can be used; and the fallbacks."""
    tried = list(apply_each(modality_transformations(header, _stored(header, values)), values))
    return next((result[0] for result in tried if result), values), () if all(tried[:1]) else ("modality",)


def padding_codes(header: Dataset | None, dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """The first and the last code of padding, None if there is none (PS3.3 C.7.5.1.1.2)."""
    value = None if header is None else header.get("PixelPaddingValue")
    if header is None or value is None:
        return None
    limit = header.get("PixelPaddingRangeLimit")
    bits = 8 * dtype.itemsize
    offset = 2 ** (bits - 1) if dtype.kind == "i" else 0
    first, last = sorted(int(end) + offset for end in (value, value if limit is None else limit))
    return (max(first, 0), min(last, 2**bits - 1)) if first < 2**bits and last >= 0 else None


def _stored(header: Dataset, values: Values) -> slice:
    """The part of all `values` of a bit depth that BitsStored bits can hold."""
    bits = min(int(header.get("BitsStored") or 16), len(values).bit_length() - 1)
    first = len(values) // 2 - 2 ** (bits - 1) if values[0] < 0 else 0
    return slice(first, first + 2**bits)
