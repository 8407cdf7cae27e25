"""Raw (FOR PROCESSING) images as pictures: tissue bright, air black, the greys spread over the tissue.

A detector counts photons: what a radiologist looks at is the logarithm of that, turned over (Beer and Lambert: the
attenuation), over the range that the breast needs. Vendors do much more; this is the part that they have in common.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from shards.image.grayscale import Tone, apply_modality
from shards.schema import Refused

AIR = 0.5  # percentile of all pixels
THIN = 0.25  # of the way from air to the breast's median: what lies below is air or skin
ENDS = (1.0, 99.5)  # percentiles of the tissue that become black and white


def raw_tone(header: Dataset, dtype: np.dtype[Any]) -> Tone:
    """The tone of a raw image: attenuation in any range, and infinite where a value means that nothing was exposed.

    1. Modality LUT or rescale. 2. Turned over, so that values rise with exposure, where they fall with it:
    PixelIntensityRelationshipSign is -1, or missing beside logarithms, and MONOCHROME2 shows the high ones bright.
    3. The logarithm of what is positive, unless PixelIntensityRelationship says that they are logarithms, or anything
    else than LIN. A VOI transformation is not used: its range is that of the raw values.
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
        return Tone((-exposure).astype(np.float32), True, fallbacks)
    unit = np.full(len(exposure), np.inf)
    np.log(exposure, out=unit, where=exposure > 0)
    return Tone(np.where(exposure > 0, -unit, np.inf).astype(np.float32), True, fallbacks)


def _rises(header: Dataset, linear: bool) -> bool:
    """Whether values rise with exposure. MONOCHROME1 alone says so, since tissue is to be bright."""
    sign = header.get("PixelIntensityRelationshipSign")
    return sign == 1 or header.PhotometricInterpretation == "MONOCHROME1" or (linear and sign is None)


def unexposed_as_air(image: NDArray[Any], tone: Tone) -> NDArray[Any]:
    """Codes [H, W] where what was not exposed (a frame of zeros) has the value of air. Raises `Refused` ("blank")."""
    unexposed = np.isinf(tone.unit)
    counts = np.bincount(image.ravel(), minlength=len(tone.unit))
    if not counts[unexposed].any():
        return image
    used = np.flatnonzero((counts > 0) & ~unexposed)
    if not len(used):
        raise Refused("blank", "no pixel of it was exposed")
    used = used[np.argsort(tone.unit[used])]
    below = np.cumsum(counts[used])
    air = used[np.searchsorted(below, below[-1] * AIR / 100)]
    return np.where(unexposed[image], image.dtype.type(air), image)


def over_tissue(tone: Tone, codes: NDArray[Any], inside: NDArray[np.bool_]) -> Tone:
    """`tone` with black and white at percentiles of the tissue among codes [h, w]; `inside` is the breast's outline."""
    shown = tone.unit[codes]
    breast = shown[inside]
    air = float(np.percentile(shown, AIR))
    tissue = breast[breast > air + THIN * (float(np.median(breast)) - air)]
    low, high = np.percentile(tissue if len(tissue) else breast, ENDS)
    unit = (tone.unit - low) / (high - low if high > low else 1.0)
    return replace(tone, unit=unit.clip(0, 1).astype(np.float32), stretch=False)
