"""An image file -> its stored values, at no more resolution than is needed."""

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
from pydicom.pixels import apply_color_lut
from pydicom.uid import JPEG2000, JPEG2000Lossless

from shards.errors import Refused, is_machine_error
from shards.image.dicom_file import find_file, is_dicom, open_unfolded, read_dicom
from shards.image.frames import decodable_syntax, decode_frames
from shards.image.header import TOMOSYNTHESIS, merge_functional_groups, refuse_other_objects
from shards.image.jpeg_streams import limit, read_wavelet_header
from shards.image.other_formats import grey_of, no_pixel_limit, read_plain
from shards.image.stored_bits import value_bits

NEEDED = ("PixelData", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored")
LARGEST_FILE = 4 * 2**30  # bytes; the largest tomosynthesis volumes have one or two gibibytes
SLAB = 9  # frames in the middle of a tomosynthesis volume that make a slab; they lie about 1 mm apart


@dataclass(frozen=True)
class Stored:
    """Stored values `values` [h, w] of 8 or 16 bits, read at 1 / 2**`level` of the (height, width) `size`.

    `header` is None for a file that is not DICOM.
    """

    values: NDArray[Any]
    size: tuple[int, int]
    level: int = 0
    header: Dataset | None = None


def open_image(path: Path) -> Dataset | NDArray[Any]:
    """The DICOM data set of a file, its pixels still encoded; or the decoded pixels [h, w] of another image format.

    The content decides, not the suffix. Raises `Refused` with a reason code: missing, unreadable, too-large, colour;
    and `OSError` when the machine is to blame.
    """
    try:
        path = find_file(path)
        status = path.stat()
    except (OSError, ValueError) as error:
        if is_machine_error(error):
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
        if is_machine_error(error):
            raise
        raise Refused("unreadable", f"cannot be read: {error.strerror}") from None


def decode(dataset: Dataset, long_side: int | None = None, slab: bool = False) -> Stored:
    """The stored values of a mammogram.

    With `long_side`, a JPEG 2000 stream is decoded at the lowest resolution that still has so many pixels on its long
    side. With `slab`, a tomosynthesis volume becomes the mean of its `SLAB` middle frames, and `dataset` gets the
    functional groups of the middle one. Raises `Refused`: see `refuse_other_objects`; tomosynthesis, too-large,
    unreadable, colour.
    """
    frames = int(dataset.get("NumberOfFrames") or 1)
    merge_functional_groups(dataset, (frames - 1) // 2)
    refuse_other_objects(dataset)
    if not slab and (frames > 1 or dataset.get("SOPClassUID") == TOMOSYNTHESIS):
        raise Refused("tomosynthesis", f"{frames} frames; pack.tomosynthesis=slab would take the middle ones")
    for name in NEEDED:
        if dataset.get(name) is None:
            raise Refused("unreadable", f"its header has no {name}: the file is cut or holds no image")
    if dataset.get("SamplesPerPixel") is None:
        dataset.SamplesPerPixel = 1
    size = int(dataset.Rows), int(dataset.Columns)
    limit(size[0], size[1] * int(dataset.SamplesPerPixel))  # colour takes several times the memory
    syntax = decodable_syntax(dataset)
    try:
        level = _level(dataset, long_side) if long_side and frames == 1 else 0
        values = _reduced(dataset, level) if level else _whole(dataset, frames)
    except (Refused, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # decoders raise anything on damaged streams; a Rust panic is a BaseException
        message = f"its pixels ({syntax.name}) cannot be decoded: damaged, or not what the header says"
        raise Refused("unreadable", message) from None
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype.itemsize > 2 or values.ndim != 2:
        raise Refused("unreadable", f"{values.dtype.itemsize * 8} bits per pixel, 8 or 16 are read")
    return Stored(values, size, level, dataset)


def _whole(dataset: Dataset, frames: int) -> NDArray[Any]:
    """At full resolution: the only frame [h, w], or the mean of the middle ones."""
    middle = range(max(0, (frames - SLAB) // 2), min(frames, (frames - SLAB) // 2 + SLAB))
    slices = [value_bits(frame, dataset) for frame in decode_frames(dataset, frames, middle)]
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        slices = [apply_color_lut(indices, dataset) for indices in slices]
    slices = [grey_of(image) if image.ndim == 3 else image for image in slices]
    if frames == 1:
        return slices[0]
    return np.rint(np.mean(slices, axis=0, dtype=np.float32)).astype(slices[0].dtype)


def _level(dataset: Dataset, long_side: int) -> int:
    """The number of JPEG 2000 resolution levels that need not be decoded for `long_side` pixels.

    0 unless the stream agrees with the header (one unsigned component of BitsStored bits): pydicom resolves
    mismatches at full resolution. 0 if there is padding: the low-pass filter would mix it with tissue.
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
    """The only frame [h, w] at 1 / 2**`level` of its resolution."""
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    with no_pixel_limit(), Image.open(io.BytesIO(frame)) as image:
        # Pillow rounds the reduced size to the nearest, JPEG 2000 up; it takes the stream for broken if they differ.
        width, height = (-(-side >> level) << level for side in image.size)
        image._size = width, height
        image.reduce = level  # type: ignore[assignment, method-assign]
        values = np.asarray(image)
    # Pillow shifts the stream's bits to the top of its 8 or 16.
    return values >> values.dtype.type(8 * values.dtype.itemsize - dataset.BitsStored)
