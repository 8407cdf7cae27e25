"""Which bits of a decoded DICOM pixel are its value."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSNearLossless,
)

from shards.image.jpeg_streams import is_reversible

WAVELETS = (JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL)
LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K)


def all_bits(dataset: Dataset) -> dict[str, Any]:
    """Options of pydicom's decoders for pixels with all of their bits, in every transfer syntax."""
    gdcm_cuts = dataset.file_meta.TransferSyntaxUID in (JPEGLossless, JPEGLosslessSV1)
    return {"correct_unused_bits": False, **({"bits_stored": dataset.BitsAllocated} if gdcm_cuts else {})}


def _is_lossy(dataset: Dataset) -> bool:
    """A JPEG 2000 stream says it by its wavelet, whatever its transfer syntax says."""
    if dataset.file_meta.TransferSyntaxUID not in WAVELETS:
        return False
    frames = int(dataset.get("NumberOfFrames") or 1)
    return not is_reversible(get_frame(dataset.PixelData, 0, number_of_frames=frames))


def value_bits(values: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    """`values` [h, w] of the BitsStored bits from HighBit down (PS3.5 8.1.1): old files keep an overlay in the others.

    Values that fit into BitsStored bits stay as they are, whatever HighBit says. So do those of a lossy stream, which
    has no bits to tell apart, and may run over the brightest value by a little.
    """
    bits, stored = 8 * values.dtype.itemsize, int(dataset.BitsStored)
    if stored >= bits or values.ndim != 2 or dataset.file_meta.TransferSyntaxUID in LOSSY:
        return values
    low, high, spare = values.min(), values.max(), bits - stored
    signed = values.dtype.kind == "i"
    if (-(2 ** (stored - 1)) if signed else 0) <= low and high < 2 ** (stored - signed):
        return values
    if _is_lossy(dataset):
        return values
    fits = low >= -(2 ** (stored - 1)) and high < 2**stored  # negative ones without the bits of their sign
    above = spare if fits else min(bits - 1 - int(dataset.get("HighBit") or 0), spare)
    return (values << values.dtype.type(above)) >> values.dtype.type(spare)
