"""Images that are not DICOM: supported formats, cut files, and grey images stored in colour."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from shards.errors import Refused
from shards.image.jpeg_streams import CUT, LARGEST, limit, read_jpeg_header, read_wavelet_header
from shards.image.tiff import black_is_zero

FORMATS = ("PNG", "JPEG", "TIFF", "PPM", "BMP", "JPEG2000", "WEBP")  # Pillow's names; PPM has PGM in it
READ = "DICOM (with DICM at byte 128), PNG, JPEG, TIFF, PGM, BMP, JPEG 2000 and WebP files are read"
ONE_CHANNEL = ("1", "L", "LA", "La", "I", "F")  # Pillow's modes, without the byte order behind a semicolon
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PGM_TEXT = re.compile(rb"P[123]\s")
PGM_BINARY = re.compile(rb"P[56](?:\s+(?:#[^\n]*\n\s*)*(\d{1,5})){3}\s")  # width, height, and the value that is white
# (offsets, lengths) of a TIFF's strips or tiles
TIFF_PARTS = ((273, 279), (324, 325))
# A pixel is coloured if its channels, apart from the image's tint, differ by more than an eighth of the brightest value
# and by more than 8: JPEG's rounding and the noise of a scanner's three sensors stay below. SHARE of a scan's pixels
# may be coloured, at edges and dust; drawn letters and circles are more.
EIGHTH, LEAST, SHARE = 8, 8, 1e-4
FLATTEST = 0.5  # of a tint: least slope of one channel over another


def read_plain(data: bytes) -> NDArray[Any]:
    """The grey values, uint8 or uint16 [h, w], of a PNG, JPEG, TIFF, PGM, BMP, JPEG 2000 or WebP file.

    Three equal channels, or channels of one tint, are grey. Transparency is ignored. Raises `Refused`: unreadable,
    too-large, colour.
    """
    data, inverted = black_is_zero(data)
    kind, mode = _check_plain(data)
    if PGM_TEXT.match(data):
        data += b"\n"  # OpenCV needs one more byte after the last number
    array = np.frombuffer(data, np.uint8)
    grey = cv2.imdecode(array, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    colours = None if mode in ONE_CHANNEL else cv2.imdecode(array, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if grey is None or grey.dtype not in (np.uint8, np.uint16):
        raise Refused("unreadable", f"a {kind} image that is damaged, cut, or not of 8 or 16 bits")
    if colours is not None:
        refuse_colour(colours)
    binary = PGM_BINARY.match(data)
    if (
        binary and grey.dtype == np.uint8
    ):  # OpenCV scales to the maximum of text files only; 16 bits are stretched later
        grey = cv2.convertScaleAbs(grey, alpha=255 / max(1, int(binary[1])))
    return cv2.bitwise_not(grey) if inverted else grey


def grey_of(image: NDArray[Any]) -> NDArray[Any]:
    """An RGB image [h, w, 3], uint8 or uint16, as grey [h, w]. Raises `Refused` ("colour")."""
    refuse_colour(image)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def refuse_colour(image: NDArray[Any]) -> None:
    """Raise `Refused` ("colour") unless the channels of `image` [h, w, 3] are equal, or grey in one tint."""
    first, green, last = (channel.astype(np.float32) for channel in cv2.split(image))
    most = max(LEAST, int(image.max()) // EIGHTH)
    apart = np.count_nonzero(np.maximum(_beside(green, first), _beside(green, last)) > most)
    if apart > SHARE * green.size:
        raise Refused("colour", f"a colour image: {apart} of {green.size} pixels are not grey")


def _beside(green: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """The distance [h, w] of each pixel from the linear fit between two channels: a film's tint is no colour."""
    middle, centre = float(green.mean()), float(other.mean())
    spread = float(green.var())
    slope = float(((green - middle) * (other - centre)).mean()) / spread if spread else 0.0
    if not FLATTEST <= slope <= 1 / FLATTEST:  # no tint, but a colour that the other channel lacks
        return np.abs(green - other)
    return np.abs(other - (centre + slope * (green - middle)))


@contextmanager
def no_pixel_limit() -> Iterator[None]:
    """Silence Pillow's warning about large images; `limit` checks their size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _check_plain(data: bytes) -> tuple[str, str]:
    """Pillow's (format, mode), from the file's header alone. Raises `Refused` for huge and for cut files."""
    try:
        with no_pixel_limit(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            limit(image.height, image.width)
            kind, mode = str(image.format), image.mode.partition(";")[0]
            _refuse_cut(data, image)
    except Image.DecompressionBombError:
        raise Refused("too-large", f"its header claims too many pixels; 1 to {LARGEST} are read") from None
    except Refused:
        raise
    except Exception:  # the errors of Pillow's readers have no common type
        what = "not an image, or damaged or cut near its beginning" if data else "an empty file"
        raise Refused("unreadable", f"{what}; {READ}") from None
    return kind, mode


def _refuse_cut(data: bytes, image: Image.Image) -> None:
    """Raise `Refused` for a file that ends too early, by its end marker or the offsets in it.

    OpenCV fills in some cut files, depending on its release. A JPEG 2000 stream may be larger than its file claims.
    """
    whole = True
    if image.format in ("JPEG", "MPO"):
        read_jpeg_header(data)
    elif image.format == "JPEG2000":
        read_wavelet_header(data)
    elif image.format == "PNG":
        whole = data.rfind(PNG_END) > 0
    elif isinstance(image, TiffImageFile):
        tags = image.tag_v2
        parts = [(tags[offset], tags[length]) for offset, length in TIFF_PARTS if {offset, length} <= set(tags)]
        whole = all(np.add(offsets, lengths).max() <= len(data) for offsets, lengths in parts)
    if not whole:
        raise Refused("unreadable", CUT)
