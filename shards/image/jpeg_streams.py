"""The headers of JPEG and JPEG 2000 streams: size, bit depth, and whether the stream is whole.

Checked before decoding: some decoders end the process on a stream that claims to be huge, some fill in what was cut.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from shards.errors import Refused

LARGEST = 120_000_000  # pixels of one image; the largest detectors and film scans have some 30 million
CUT = "the file ends before its pixels do; copy or download it again"
LOSSLESS = 0xC3
# Frame headers: baseline, extended, progressive, lossless, two of arithmetic coding, JPEG-LS.
FRAMES = (0xC0, 0xC1, 0xC2, LOSSLESS, 0xC9, 0xCA, 0xF7)
MARKER = re.compile(rb"\xff[^\x00\xff]")
ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a segment: TEM, RST, SOI
SCAN, TILE_PART = b"\xff\xda", b"\xff\x90"  # where coded data begin
END = b"\xff\xd9"  # the end marker of either; coded data never hold it
MOST_COMPONENTS = 4


class Jpeg(NamedTuple):
    """Size in pixels and bits per sample."""

    height: int
    width: int
    bits: int


def limit(height: int, width: int) -> None:
    """Raise `Refused` ("too-large") unless an image has 1 to `LARGEST` pixels."""
    if not 0 < height * width <= LARGEST or height < 0:
        raise Refused("too-large", f"{width} x {height} pixels; 1 to {LARGEST} are read")


def read_jpeg_header(stream: bytes) -> Jpeg:
    """Read the frame header of a JPEG or JPEG-LS stream (ITU-T T.81 B.2.2, T.87 C.2.2).

    Raises `Refused` ("unreadable") for a missing frame header or end marker. Some writers omit the end marker of
    lossless streams; it is not required there, because their decoder notices missing pixels.
    """
    header, kind, at = frame_header(stream)
    if kind != LOSSLESS and stream.rfind(END, at) < 0:
        raise Refused("unreadable", CUT)
    if header is None:
        raise Refused("unreadable", "its JPEG stream is damaged, or of a kind that is not read")
    return header


def frame_header(stream: bytes) -> tuple[Jpeg | None, int, int]:
    """The last frame header before the coded data or None; its marker or 0; where the coded data begin.

    Finds markers as the decoders do, which skip fill bytes and garbage: a hidden frame header would hide the size.
    """
    at, kind, header = stream.find(b"\xff\xd8") + 2, 0, b""
    while (marker := MARKER.search(stream, at)) and marker[0] not in (SCAN, END):
        at = marker.end()
        if marker[0][1] in FRAMES:
            kind, header = marker[0][1], stream[at + 2 : at + 7]
        if marker[0][1] not in ALONE:
            at += int.from_bytes(stream[at : at + 2], "big")
    if len(header) < 5:
        return None, kind, at
    return Jpeg(int.from_bytes(header[1:3], "big"), int.from_bytes(header[3:5], "big"), header[0]), kind, at


def read_wavelet_header(stream: bytes) -> tuple[int, int, int, int]:
    """(height, width, bits, levels) of a JPEG 2000 stream, from its SIZ and COD segments (ISO/IEC 15444-1 A.5, A.6).

    `bits` is 0 for signed streams and for several components. Raises `Refused` if the stream is cut, or would decode to
    more than `LARGEST` pixels, whatever the file's header says.
    """
    siz = stream.find(b"\xff\x4f\xff\x51") + 2  # the codestream may be wrapped in the boxes of a JP2 file
    if siz < 2 or len(stream) < siz + 41:
        raise Refused("unreadable", "its JPEG 2000 stream has no header")
    x1, y1, x0, y0 = (int.from_bytes(stream[siz + at : siz + at + 4], "big") for at in (6, 10, 14, 18))
    components, depth = int.from_bytes(stream[siz + 38 : siz + 40], "big"), stream[siz + 40]
    limit(y1 - y0, x1 - x0)
    if components > MOST_COMPONENTS:
        raise Refused("unreadable", f"its JPEG 2000 stream has {components} components")
    at, levels = siz, 0
    while at < len(stream) and stream[at : at + 2] != TILE_PART:
        if stream[at : at + 2] == b"\xff\x52":
            levels = stream[at + 9]
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    if stream.rfind(END, at) < 0:
        raise Refused("unreadable", CUT)
    return y1 - y0, x1 - x0, 0 if depth & 0x80 or components != 1 else depth + 1, levels


def is_reversible(stream: bytes) -> bool:
    """Whether a JPEG 2000 stream uses the reversible wavelet, by its COD segment (ISO/IEC 15444-1 A.6.1)."""
    cod = stream.find(b"\xff\x52", stream.find(b"\xff\x4f\xff\x51"))
    return stream[cod + 13 : cod + 14] == b"\1"
