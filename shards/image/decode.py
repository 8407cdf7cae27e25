"""One image file -> its stored values, at no more resolution than is needed."""

from __future__ import annotations

import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, get_decoder, iter_pixels, pixel_array
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)
from rle.utils import decode_pixel_data

from shards.errors import is_of_the_machine
from shards.image.dicom_file import CUT, find_file, is_dicom, open_unfolded, read_dicom
from shards.image.header import TOMOSYNTHESIS, lay_frame_over, refuse_other_objects
from shards.image.jpeg_12bit import decode_12_bits
from shards.image.jpeg_streams import limit, read_jpeg_header, read_wavelet_header
from shards.image.other_formats import grey_of, no_pixel_limit, read_plain
from shards.image.stored_bits import all_bits, value_bits
from shards.schema import Refused

WAVELETS = (JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
STREAMS = (*WAVELETS, *JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes)
NEEDED = ("PixelData", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored")
LARGEST_FILE = 4 * 2**30  # bytes; the largest tomosynthesis volumes have one or two gibibytes
SLAB = 9  # frames in the middle of a tomosynthesis volume that make a slab; they lie about 1 mm apart


@dataclass(frozen=True)
class Stored:
    """`values` [h, w], 8 or 16 bits: what the file stores, read at 1 / 2**`level` of its (height, width) `size`.

    `header` is None for a file that is not DICOM.
    """

    values: NDArray[Any]
    size: tuple[int, int]
    level: int = 0
    header: Dataset | None = None


def open_image(path: Path) -> Dataset | NDArray[Any]:
    """The DICOM data set of a file, its pixels still encoded; or the decoded pixels of an image of another kind.

    What it is tells its content, whatever its name is. Raises `Refused` with a reason code: missing, unreadable,
    too-large, colour.
    """
    try:
        path = find_file(path)
        status = path.stat()
    except (OSError, ValueError) as error:
        if is_of_the_machine(error):
            raise
        raise Refused("missing", "no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise Refused("unreadable", "not a file")
    if status.st_size > LARGEST_FILE:
        raise Refused("too-large", f"a file of {status.st_size} bytes; at most {LARGEST_FILE} are read")
    try:
        with open_unfolded(path) as file:
            return read_dicom(file) if is_dicom(file) else read_plain(file.read())
    except OSError as error:
        if is_of_the_machine(error):
            raise
        raise Refused("unreadable", f"cannot be read: {error.strerror}") from None


def decode(dataset: Dataset, long_side: int | None = None, slab: bool = False) -> Stored:
    """The stored values of a mammogram.

    With `long_side`, a JPEG 2000 stream is decoded at the smallest resolution that still has so many
    pixels on its long side. With `slab`, a tomosynthesis volume becomes the mean of its `SLAB` middle
    frames, and `dataset` gets what the functional groups say of the middle one. Raises `Refused`: see
    `refuse_other_objects`, and tomosynthesis, too-large, unreadable.
    """
    frames = int(dataset.get("NumberOfFrames") or 1)
    lay_frame_over(dataset, (frames - 1) // 2)
    refuse_other_objects(dataset)
    if not slab and (frames > 1 or dataset.get("SOPClassUID") == TOMOSYNTHESIS):
        raise Refused("tomosynthesis", f"{frames} frames; pack.tomosynthesis=slab would take the middle ones")
    for name in NEEDED:
        if dataset.get(name) is None:
            raise Refused("unreadable", f"its header has no {name}: the file is cut, or holds no image")
    if dataset.get("SamplesPerPixel") is None:
        dataset.SamplesPerPixel = 1
    size = int(dataset.Rows), int(dataset.Columns)
    limit(size[0], size[1] * int(dataset.SamplesPerPixel))  # colours take several times the memory
    syntax = _syntax(dataset)
    try:
        level = _level(dataset, long_side) if long_side and frames == 1 else 0
        values = _reduced(dataset, level) if level else _whole(dataset, frames)
    except (Refused, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # decoders raise whatever they like on damaged streams; a panic of Rust's is that
        message = f"its pixels ({syntax.name}) cannot be decoded: damaged, or not what the header says"
        raise Refused("unreadable", message) from None
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype.itemsize > 2 or values.ndim != 2:
        raise Refused("unreadable", f"{values.dtype.itemsize * 8} bits per pixel, 8 or 16 can be read")
    return Stored(values, size, level, dataset)


def _syntax(dataset: Dataset) -> UID:
    """The transfer syntax, if a decoder reads it."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise Refused("unreadable", "its header has no TransferSyntaxUID")
    try:
        get_decoder(syntax)
    except NotImplementedError:
        name = repr(str(syntax.name)[:64])
        raise Refused(
            "unreadable", f"pixels in transfer syntax {name} are not read; convert them, for example by gdcmconv"
        ) from None
    return syntax


def _whole(dataset: Dataset, frames: int) -> NDArray[Any]:
    middle = range(max(0, (frames - SLAB) // 2), min(frames, (frames - SLAB) // 2 + SLAB))
    slices = [value_bits(frame, dataset) for frame in _frames(dataset, frames, middle)]
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        slices = [apply_color_lut(indices, dataset) for indices in slices]
    slices = [grey_of(image) if image.ndim == 3 else image for image in slices]
    if frames == 1:
        return slices[0]
    return np.rint(np.mean(slices, axis=0, dtype=np.float32)).astype(slices[0].dtype)


def _frames(dataset: Dataset, frames: int, wanted: range) -> list[NDArray[Any]]:
    """The `wanted` ones of so many frames, [h, w] or [h, w, 3] each."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        _check_length(dataset)
    streams = [get_frame(dataset.PixelData, i, number_of_frames=frames) for i in wanted if syntax in STREAMS]
    bits = {_check_stream(dataset, stream) for stream in streams}
    if syntax == JPEGExtended12Bit and bits != {8}:
        return [decode_12_bits(stream, dataset) for stream in streams]
    if frames > 1:
        return list(iter_pixels(dataset, indices=list(wanted), **all_bits(dataset)))
    if syntax == RLELossless and dataset.BitsAllocated in (8, 16) and dataset.SamplesPerPixel == 1:
        return [_rle(dataset)]
    return [pixel_array(dataset, **all_bits(dataset))]


def _check_length(dataset: Dataset) -> None:
    length, expected = len(dataset.PixelData), get_expected_length(dataset)
    if length < expected:
        raise Refused("unreadable", f"has {length} of {expected} bytes of pixels: {CUT}")


def _check_stream(dataset: Dataset, stream: bytes) -> int:
    """Refuses a stream that is cut or claims to be huge, and a JPEG of another size than its header's: decoders crash.

    Returns its bits a sample.
    """
    if dataset.file_meta.TransferSyntaxUID in WAVELETS:
        return read_wavelet_header(stream)[2]
    height, width, bits = read_jpeg_header(stream)
    if (height, width) != (dataset.Rows, dataset.Columns):
        raise Refused("unreadable", f"its stream has {width} x {height} pixels, its header says otherwise")
    return bits


def _rle(dataset: Dataset) -> NDArray[Any]:
    """The decoder that pydicom would call, without pydicom's copies of its 25 megabytes."""
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    shape = {"rows": dataset.Rows, "columns": dataset.Columns, "bits_allocated": dataset.BitsAllocated}
    data = decode_pixel_data(frame, version=2, **shape)
    kind = "i" if dataset.PixelRepresentation else "u"
    return np.frombuffer(data, dtype=f"<{kind}{dataset.BitsAllocated // 8}").reshape(dataset.Rows, dataset.Columns)


def _level(dataset: Dataset, long_side: int) -> int:
    """How many of a JPEG 2000 stream's resolution levels may be left undecoded for `long_side` pixels.

    0 where the stream is not plainly what the header says (one unsigned component of BitsStored
    bits): such mismatches are for pydicom to resolve, in full. And 0 where there is padding: the
    stream's low-pass filter mixes it with tissue, to values that are neither.
    """
    if dataset.file_meta.TransferSyntaxUID not in (JPEG2000, JPEG2000Lossless) or dataset.PixelRepresentation:
        return 0
    if dataset.get("PixelPaddingValue") is not None:
        return 0
    height, width, bits, levels = read_wavelet_header(get_frame(dataset.PixelData, 0, number_of_frames=1))
    if (height, width, bits) != (dataset.Rows, dataset.Columns, dataset.BitsStored):
        return 0
    fitting = int(np.log2(max(1.0, max(height, width) / long_side)))
    return min(levels, fitting)


def _reduced(dataset: Dataset, level: int) -> NDArray[Any]:
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    with no_pixel_limit(), Image.open(io.BytesIO(frame)) as image:
        # Pillow rounds the reduced size to the nearest where JPEG 2000 rounds up, and takes what it gets for broken.
        width, height = (-(-side >> level) << level for side in image.size)
        image._size = width, height
        image.reduce = level  # type: ignore[assignment, method-assign]
        values = np.asarray(image)
    # Pillow shifts the stream's bits to the top of its 8 or 16.
    return values >> values.dtype.type(8 * values.dtype.itemsize - dataset.BitsStored)
