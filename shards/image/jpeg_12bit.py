"""JPEG with 12 bits (extended, ITU-T T.81 process 4): gdcm reads it, but pydicom's plugins do not ask it to."""

from __future__ import annotations

from typing import Any

import gdcm
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from shards.image.jpeg_streams import read_jpeg_header
from shards.schema import Refused

BITS = 12


def decode_12_bits(stream: bytes, dataset: Dataset) -> NDArray[Any]:
    """The values [h, w], uint16, of a JPEG stream of 12 bits whose size has been compared with the header's."""
    bits = read_jpeg_header(stream).bits
    if bits != BITS or dataset.SamplesPerPixel != 1 or dataset.PixelRepresentation or dataset.BitsAllocated != 16:
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
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, BITS, BITS - 1, 0))
    image.SetDataElement(element)
    values = image.GetBuffer().encode("utf-8", "surrogateescape")  # it comes as a text that holds bytes
    return np.frombuffer(values, dtype="<u2").reshape(dataset.Rows, dataset.Columns)
