"""The bits of a decoded DICOM pixel that hold its value (BitsStored and HighBit, PS3.5 8.1.1)."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame

from shards.image.jpeg_streams import is_reversible

WAVELETS = (uid.JPEG2000Lossless, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL)
LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)


def all_bits(dataset: Dataset) -> dict[str, Any]:
    """Options for pydicom's decoders that keep all bits of a pixel, in every transfer syntax."""
    gdcm_cuts = dataset.file_meta.TransferSyntaxUID in (uid.JPEGLossless, uid.JPEGLosslessSV1)
    return {"correct_unused_bits": False, **({"bits_stored": dataset.BitsAllocated} if gdcm_cuts else {})}


def _is_lossy(dataset: Dataset) -> bool:
    """Whether a "lossless" JPEG 2000 stream is lossy: its wavelet counts, not its transfer syntax."""
    if dataset.file_meta.TransferSyntaxUID not in WAVELETS:
        return False
    frames = int(dataset.get("NumberOfFrames") or 1)
    return not is_reversible(get_frame(dataset.PixelData, 0, number_of_frames=frames))


def value_bits(values: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    """`values` [h, w] without the bits outside of BitsStored and HighBit, in which old files keep an overlay.

    Values that fit into BitsStored bits are kept, whatever HighBit is. So are those of lossy streams: they may slightly
    exceed the largest value, and hold no overlay.
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
    fits = low >= -(2 ** (stored - 1)) and high < 2**stored  # negative values whose sign bits were not extended
    above = spare if fits else min(bits - 1 - int(dataset.get("HighBit") or 0), spare)
    return (values << values.dtype.type(above)) >> values.dtype.type(spare)
