"""Stored values -> display values: the grayscale transformations of PS3.4 N.2, as one table for an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_windowing

from shards.schema import Refused

SIGN = np.uint16(0x8000)


@dataclass(frozen=True)
class Tone:
    """What each stored value looks like.

    `unit` has one entry for every value of an unsigned image of this depth: 0 black to 1 white where the
    file has a VOI transformation, and otherwise any range, brighter being larger (`stretch`).
    """

    unit: NDArray[np.float32]
    stretch: bool

    def show(self, codes: NDArray[Any], white: int, among: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        """Codes [h, w] as grey values 0..`white` (255: uint8, 65535: uint16).

        Without a VOI transformation the darkest and the brightest of what lies between the smallest and the largest
        code `among` those become black and white.
        """
        unit = self.unit
        if self.stretch:
            counted = codes
            if among is not None and among.any():  # the others count as one more of the first
                counted = np.where(among, codes, codes.flat[among.argmax()])
            used = unit[counted.min() : int(counted.max()) + 1]
            low, high = float(used.min()), float(used.max())
            unit = (unit - low) / (high - low if high > low else 1.0)
        table = np.rint(unit.clip(0, 1) * white).astype(np.uint8 if white == 255 else np.uint16)
        return table.take(codes)


def codes(values: NDArray[Any]) -> NDArray[Any]:
    """Stored values, signed or not, as unsigned ones in the same order: averages of codes are averages of values."""
    if values.dtype.kind == "u":
        return values
    sign = SIGN if values.dtype.itemsize == 2 else np.uint8(0x80)
    return values.view(f"u{values.dtype.itemsize}") ^ sign


def tone_of(header: Dataset | None, dtype: np.dtype[Any]) -> Tone:
    """The tone of a DICOM image, or of a PNG, JPEG or TIFF without a header.

    1. Modality LUT or rescale. 2. VOI LUT: the first item of VOILUTSequence, else the first window by its
    VOILUTFunction (LINEAR, LINEAR_EXACT or SIGMOID); its output range becomes black to white, so that one
    scanner's images stay comparable. 3. Inversion, once, for MONOCHROME1 or an INVERSE presentation LUT: the two
    say the same thing (PS3.3 C.11.6.1). A file without a VOI has no range of its own and is stretched;
    8-bit files without a header are taken as ready for display. Raises `Refused` ("unreadable") for
    transformations that cannot be.
    """
    bits = 8 * dtype.itemsize
    values = np.arange(2**bits, dtype=np.int64) - (2 ** (bits - 1) if dtype.kind == "i" else 0)
    if header is None:
        return Tone((values / (2**bits - 1)).astype(np.float32), stretch=bits == 16)
    try:
        modality = np.asarray(apply_modality_lut(values, header), dtype=np.float64)
        display = _voi(modality, header)
    except Exception as error:  # an empty slope, a window without width, a LUT without data
        raise Refused("unreadable", f"grayscale transformation: {' '.join(str(error).split())}") from None
    unit = modality if display is None else display
    if header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        unit = -unit if display is None else 1 - unit
    return Tone(unit.astype(np.float32), stretch=display is None)


def padding_codes(header: Dataset | None, dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """The first and the last code that is padding and not tissue (PS3.3 C.7.5.1.1.2)."""
    value = None if header is None else header.get("PixelPaddingValue")
    if header is None or value is None:
        return None
    limit = header.get("PixelPaddingRangeLimit")
    bits = 8 * dtype.itemsize
    offset = 2 ** (bits - 1) if dtype.kind == "i" else 0
    first, last = sorted(int(end) + offset for end in (value, value if limit is None else limit))
    return (max(first, 0), min(last, 2**bits - 1)) if first < 2**bits and last >= 0 else None


def _voi(modality: NDArray[np.float64], header: Dataset) -> NDArray[np.float64] | None:
    """0..1 after the VOI step; None where the file has none."""
    if header.get("VOILUTSequence"):
        return _voi_lut(modality, header.VOILUTSequence[0])
    if header.get("WindowWidth") is None or header.get("WindowCenter") is None:
        return None
    # The last two values lie far outside of any window: they come back as the ends of its output range.
    with np.errstate(over="ignore"):
        windowed = apply_windowing(np.append(modality, (-1e9, 1e9)), header, index=0)
    low, high = windowed[-2], windowed[-1]
    return (windowed[:-2] - low) / (high - low) if high != low else None  # a negative slope swaps the two


def _voi_lut(modality: NDArray[np.float64], item: Dataset) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.1. Not pydicom's `apply_voi`, which wraps the index of 8-bit LUTs at 256 entries."""
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries = entries or 65536
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, dtype=np.uint8 if len(data) == entries else "<u2")
    lut = np.asarray(data, dtype=np.float64)[:entries]
    return lut[np.clip(modality - first, 0, len(lut) - 1).astype(np.int64)] / (2**bits - 1)
