"""The frames of a DICOM data set: encoded pixel data -> arrays, by transfer syntax (PS3.5 section 8.2 and annex A)."""

from __future__ import annotations

from typing import Any

import gdcm
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, iter_pixels, pixel_array
from pydicom.pixels.utils import get_expected_length
from rle.utils import decode_pixel_data

from shards.errors import Refused
from shards.image.jpeg_streams import CUT, read_jpeg_header, read_wavelet_header
from shards.image.stored_bits import all_bits

WAVELETS = (uid.JPEG2000, uid.JPEG2000Lossless, uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL)
TWELVE = 12  # bits
STREAMS = (*WAVELETS, *uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes)


def decodable_syntax(dataset: Dataset) -> uid.UID:
    """The transfer syntax. Raises `Refused` ("unreadable") if it is missing or has no decoder."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise Refused("unreadable", "its header has no TransferSyntaxUID")
    try:
        get_decoder(syntax)
    except NotImplementedError:
        name = repr(str(syntax.name)[:64])
        message = f"pixels in transfer syntax {name} are not read; convert them, for example by gdcmconv"
        raise Refused("unreadable", message) from None
    return syntax


def decode_frames(dataset: Dataset, frames: int, wanted: range) -> list[NDArray[Any]]:
    """The `wanted` frames out of `frames`, each [h, w] or [h, w, 3]. Raises `Refused`, and what the decoders raise."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        _check_length(dataset)
    streams = [get_frame(dataset.PixelData, i, number_of_frames=frames) for i in wanted if syntax in STREAMS]
    bits = [_check_stream(dataset, stream) for stream in streams]
    if syntax == uid.JPEGExtended12Bit and {*bits} != {8}:
        return [_decode_12_bits(stream, depth, dataset) for stream, depth in zip(streams, bits, strict=True)]
    if frames > 1:
        return list(iter_pixels(dataset, indices=list(wanted), **all_bits(dataset)))
    if syntax == uid.RLELossless and dataset.BitsAllocated in (8, 16) and dataset.SamplesPerPixel == 1:
        return [_decode_rle(dataset)]
    return [pixel_array(dataset, **all_bits(dataset))]


def _check_length(dataset: Dataset) -> None:
    length, expected = len(dataset.PixelData), get_expected_length(dataset)
    if length < expected:
        raise Refused("unreadable", f"has {length} of {expected} bytes of pixels: {CUT}")


def _check_stream(dataset: Dataset, stream: bytes) -> int:
    """The bits per sample of a JPEG or JPEG 2000 stream.

    Raises `Refused` for a stream that is cut or claims to be huge, and for a JPEG whose size differs from the header's:
    decoders crash on them.
    """
    if dataset.file_meta.TransferSyntaxUID in WAVELETS:
        return read_wavelet_header(stream)[2]
    height, width, bits = read_jpeg_header(stream)
    if (height, width) != (dataset.Rows, dataset.Columns):
        raise Refused("unreadable", f"its stream has {width} x {height} pixels, its header says otherwise")
    return bits


def _decode_rle(dataset: Dataset) -> NDArray[Any]:
    """The decoder that pydicom would call, without pydicom's copies of its 25 megabytes."""
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    shape = {"rows": dataset.Rows, "columns": dataset.Columns, "bits_allocated": dataset.BitsAllocated}
    data = decode_pixel_data(frame, version=2, **shape)
    kind = "i" if dataset.PixelRepresentation else "u"
    return np.frombuffer(data, dtype=f"<{kind}{dataset.BitsAllocated // 8}").reshape(dataset.Rows, dataset.Columns)


def _decode_12_bits(stream: bytes, bits: int, dataset: Dataset) -> NDArray[Any]:
    """The values uint16 [h, w] of 12-bit JPEG (extended, ITU-T T.81 process 4) by gdcm; pydicom's plugin cannot.

    Raises `Refused` ("unreadable") for other than 12 unsigned bits in one channel.
    """
    if bits != TWELVE or dataset.SamplesPerPixel != 1 or dataset.PixelRepresentation or dataset.BitsAllocated != 16:
        raise Refused("unreadable", f"JPEG Extended of {bits} bits in {dataset.SamplesPerPixel} channels is not read")
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(stream)
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((dataset.Columns, dataset.Rows, 1))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, TWELVE, TWELVE - 1, 0))
    image.SetDataElement(element)
    values = image.GetBuffer().encode("utf-8", "surrogateescape")  # gdcm returns bytes as a str
    return np.frombuffer(values, dtype="<u2").reshape(dataset.Rows, dataset.Columns)
