"""One image file -> its stored values, at no more resolution than is needed."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import iter_pixels, pixel_array
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
)
from rle.utils import decode_pixel_data

from shards.header import TOMOSYNTHESIS, lay_frame_over, refuse_other_objects
from shards.schema import Refused
from shards.tiff import black_is_zero
from shards.value_bits import all_bits, value_bits

PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
WAVELETS = (JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
LARGEST = 120_000_000  # pixels of one image; the largest detectors and film scans have some 30 million
LARGEST_FILE = 4 * 2**30  # bytes; the largest tomosynthesis volumes have one or two gibibytes
SLAB = 9  # frames in the middle of a tomosynthesis volume that make a slab; they lie about 1 mm apart


@dataclass(frozen=True)
class Stored:
    """`values` [h, w], 8 or 16 bits: what the file stores, read at 1 / 2**`level` of its (height, width) `size`.

    `header` is None for a PNG, JPEG or TIFF file.
    """

    values: NDArray[Any]
    size: tuple[int, int]
    level: int = 0
    header: Dataset | None = None


def open_image(path: Path) -> FileDataset | NDArray[Any]:
    """The DICOM data set of a file, its pixels still encoded; or the decoded pixels of a PNG, JPEG or TIFF.

    Anything without such a suffix is taken for DICOM. Raises `Refused` with a reason code: missing, unreadable,
    too-large.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        raise Refused("missing", "no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise Refused("unreadable", "not a file")
    if status.st_size > LARGEST_FILE:
        raise Refused("too-large", f"a file of {status.st_size} bytes; at most {LARGEST_FILE} are read")
    if path.suffix.lower() in PLAIN_SUFFIXES:
        return _read_plain(path)
    try:
        # A deflated data set unfolds in memory as a whole before its size is known; no mammogram needs that.
        if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise Refused("unreadable", "a deflated data set is not read")
        return pydicom.dcmread(path)
    except Refused:
        raise
    except Exception as error:  # on a damaged file the parser raises whatever it trips over
        raise Refused("unreadable", f"not a readable DICOM file: {_first_line(error)}") from None


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
    if "PixelData" not in dataset:
        raise Refused("unreadable", "has no PixelData")
    size = int(dataset.Rows), int(dataset.Columns)
    _limit(*size)
    try:
        level = _level(dataset, long_side) if long_side and frames == 1 else 0
        values = _reduced(dataset, level) if level else _whole(dataset, frames)
    except (Refused, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # decoders raise whatever they like on damaged streams; a panic of Rust's is that
        raise Refused("unreadable", f"pixel data: {_first_line(error)}") from None
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype.itemsize > 2 or values.ndim != 2:
        raise Refused("unreadable", f"{values.dtype.itemsize * 8} bits per pixel, 8 or 16 can be read")
    return Stored(values, size, level, dataset)


def _whole(dataset: Dataset, frames: int) -> NDArray[Any]:
    middle = range(max(0, (frames - SLAB) // 2), min(frames, (frames - SLAB) // 2 + SLAB))
    _check_streams(dataset, frames, middle)
    if frames > 1:
        found = iter_pixels(dataset, indices=list(middle), **all_bits(dataset))
        slices = [value_bits(one, dataset) for one in found]
        return np.rint(np.mean(slices, axis=0, dtype=np.float32)).astype(slices[0].dtype)
    if dataset.file_meta.TransferSyntaxUID == RLELossless and dataset.BitsAllocated in (8, 16):
        return value_bits(_rle(dataset), dataset)
    return value_bits(pixel_array(dataset, **all_bits(dataset)), dataset)


def _check_streams(dataset: Dataset, frames: int, wanted: range) -> None:
    """Refuses a stream that claims to be huge, and a JPEG whose size is not the header's: decoders end the process."""
    syntax = dataset.file_meta.TransferSyntaxUID
    for index in wanted if syntax in (*WAVELETS, *JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes) else ():
        frame = get_frame(dataset.PixelData, index, number_of_frames=frames)
        if syntax in WAVELETS:
            _stream_size(frame)
        elif (size := _jpeg_size(frame)) != (dataset.Rows, dataset.Columns):
            raise ValueError(f"its stream is of (height, width) {size}, its header is not")


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
    height, width, bits, levels = _stream_size(get_frame(dataset.PixelData, 0, number_of_frames=1))
    if (height, width, bits) != (dataset.Rows, dataset.Columns, dataset.BitsStored):
        return 0
    fitting = int(np.log2(max(1.0, max(height, width) / long_side)))
    return min(levels, fitting)


def _stream_size(frame: bytes) -> tuple[int, int, int, int]:
    """(height, width, bits, levels) of a JPEG 2000 stream, from its SIZ and COD segments (ISO/IEC 15444-1 A.5, A.6).

    `bits` is 0 for a signed stream. Raises `Refused` where the stream would decode to more than `LARGEST`
    pixels, whatever the header says.
    """
    siz = frame.index(b"\xff\x4f\xff\x51") + 2  # some streams come in a JP2 file's boxes
    x1, y1, x0, y0 = (int.from_bytes(frame[siz + at : siz + at + 4], "big") for at in (6, 10, 14, 18))
    components, depth = int.from_bytes(frame[siz + 38 : siz + 40], "big"), frame[siz + 40]
    _limit(y1 - y0, x1 - x0)
    cod = siz
    while frame[cod + 1] != 0x52:
        cod += 2 + int.from_bytes(frame[cod + 2 : cod + 4], "big")
    bits = 0 if depth & 0x80 or components != 1 else depth + 1
    return y1 - y0, x1 - x0, bits, frame[cod + 9]


def _jpeg_size(frame: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG or JPEG-LS stream, from its frame header (ITU-T T.81 B.2.2, T.87 C.2.2)."""
    at = frame.index(b"\xff\xd8") + 2
    while (marker := frame[at + 1]) not in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7):
        # A marker may be preceded by any number of fill bytes 0xff.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")


def _reduced(dataset: Dataset, level: int) -> NDArray[Any]:
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    with _no_pixel_limit(), Image.open(io.BytesIO(frame)) as image:
        # Pillow rounds the reduced size to the nearest where JPEG 2000 rounds up, and takes what it gets for broken.
        width, height = (-(-side >> level) << level for side in image.size)
        image._size = width, height
        image.reduce = level  # type: ignore[assignment, method-assign]
        values = np.asarray(image)
    # Pillow shifts the stream's bits to the top of its 8 or 16.
    return values >> values.dtype.type(8 * values.dtype.itemsize - dataset.BitsStored)


def _read_plain(path: Path) -> NDArray[Any]:
    data, inverted = black_is_zero(path.read_bytes())
    try:
        with _no_pixel_limit(), Image.open(io.BytesIO(data)) as image:  # reads the file's header only
            _limit(image.height, image.width)
    except Image.DecompressionBombError:
        raise Refused("too-large", f"Pillow takes it for a bomb; 1 to {LARGEST} pixels are read") from None
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("unreadable", f"not a readable {path.suffix.lower()} image") from None
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    if array is None or array.dtype not in (np.uint8, np.uint16):
        raise Refused("unreadable", f"not a readable {path.suffix.lower()} image of 8 or 16 bits")
    return cv2.bitwise_not(array) if inverted else array


def _limit(height: int, width: int) -> None:
    if not 0 < height * width <= LARGEST or height < 0:
        raise Refused("too-large", f"{width} x {height} pixels; 1 to {LARGEST} are read")


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Pillow's own bomb guard speaks by warnings; `_limit` is the one that counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
