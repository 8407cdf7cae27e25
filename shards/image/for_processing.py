"""Raw (FOR PROCESSING) images for display: tissue bright, background black, grey levels spread over the tissue.

A detector measures exposure. A displayed mammogram shows attenuation, the negative logarithm of it (Beer-Lambert), over
the range of the breast. Vendors do much more; this is the part that they have in common.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from shards.errors import Refused
from shards.image.grayscale import DisplayLUT, apply_modality

BACKGROUND = 0.5  # percentile of all pixels
THIN = 0.25  # of the way from background to the breast's median: below lies background or skin
ENDS = (1.0, 99.5)  # percentiles of the tissue that become black and white


def attenuation_lut(header: Dataset, dtype: np.dtype[Any]) -> DisplayLUT:
    """The attenuation of each code of a raw image, in any range; infinite for values that mean "not exposed".

    1. Modality LUT or rescale.
    2. Inverted if values fall with exposure: PixelIntensityRelationshipSign is -1, or is missing beside logarithms and
       MONOCHROME2 shows high values bright (PS3.3 C.8.11.3).
    3. The negative logarithm of positive values, unless PixelIntensityRelationship is other than LIN.

    VOI transformations are not used: their range is that of the raw values.
    """
    bits = 8 * dtype.itemsize
    offset = 2 ** (bits - 1) if dtype.kind == "i" else 0
    exposure, fallbacks = apply_modality(header, np.arange(2**bits, dtype=np.float64) - offset)
    stored = int(header.BitsStored) - (dtype.kind == "i")
    linear = str(header.get("PixelIntensityRelationship") or "LIN").strip().upper() == "LIN"
    if not _rises(header, linear):
        first, last = exposure[offset - (2**stored if offset else 0)], exposure[min(offset + 2**stored, 2**bits) - 1]
        exposure = first + last - exposure
    if not linear:
        return DisplayLUT((-exposure).astype(np.float32), True, fallbacks)
    logarithm = np.full(len(exposure), np.inf)
    np.log(exposure, out=logarithm, where=exposure > 0)
    return DisplayLUT(np.where(exposure > 0, -logarithm, np.inf).astype(np.float32), True, fallbacks)


def _rises(header: Dataset, linear: bool) -> bool:
    """Whether values rise with exposure. MONOCHROME1 suffices: it shows high values dark, and tissue bright."""
    sign = header.get("PixelIntensityRelationshipSign")
    return sign == 1 or header.PhotometricInterpretation == "MONOCHROME1" or (linear and sign is None)


def unexposed_as_background(codes: NDArray[Any], lut: DisplayLUT) -> NDArray[Any]:
    """`codes` [H, W] with the background's value at unexposed pixels (a frame of zeros). Raises `Refused` ("blank")."""
    unexposed = np.isinf(lut.brightness)
    counts = np.bincount(codes.ravel(), minlength=len(lut.brightness))
    if not counts[unexposed].any():
        return codes
    used = np.flatnonzero((counts > 0) & ~unexposed)
    if not len(used):
        raise Refused("blank", "none of its pixels was exposed")
    used = used[np.argsort(lut.brightness[used])]
    below = np.cumsum(counts[used])
    background = used[np.searchsorted(below, below[-1] * BACKGROUND / 100)]
    return np.where(unexposed[codes], codes.dtype.type(background), codes)


def stretched_over_tissue(lut: DisplayLUT, codes: NDArray[Any], inside: NDArray[np.bool_]) -> DisplayLUT:
    """`lut` with black and white at percentiles of the tissue in `codes` [h, w]; `inside` [h, w] is the breast."""
    shown = lut.brightness[codes]
    breast = shown[inside]
    background = float(np.percentile(shown, BACKGROUND))
    tissue = breast[breast > background + THIN * (float(np.median(breast)) - background)]
    low, high = np.percentile(tissue if len(tissue) else breast, ENDS)
    unit = (lut.brightness - low) / (high - low if high > low else 1.0)
    return replace(lut, brightness=unit.clip(0, 1).astype(np.float32), stretch=False)
