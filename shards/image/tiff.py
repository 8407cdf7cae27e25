"""16-bit TIFF files with WhiteIsZero: OpenCV does not invert them."""

from __future__ import annotations

import struct

BITS, PHOTOMETRIC = 258, 262  # tags BitsPerSample and PhotometricInterpretation, TIFF 6.0 section 8
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1


def black_is_zero(data: bytes) -> tuple[bytes, bool]:
    """A 16-bit WhiteIsZero TIFF relabelled as BlackIsZero, and True; any other file unchanged, and False.

    Pillow cannot open all of the former. OpenCV itself inverts files of 8 bits and 1 bit.
    """
    order = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}.get(data[:4])
    if order is None:
        return data, False
    # Layout of TIFF and BigTIFF: offset of the directory, its number of entries, their length, offset of their value.
    start, number, length, value = ("8xQ", "Q", 20, 12) if b"+" in data[:4] else ("4xI", "H", 12, 8)
    try:
        (at,) = struct.unpack_from(order + start, data)
        (entries,) = struct.unpack_from(order + number, data, at)
        places = range(at + struct.calcsize(order + number), len(data) - length + 1, length)[: min(entries, 2**16)]
        tags = {struct.unpack_from(order + "H", data, place)[0]: place + value for place in places}
        values = {tag: struct.unpack_from(order + "H", data, tags[tag])[0] for tag in (BITS, PHOTOMETRIC)}
    except (struct.error, KeyError):
        return data, False
    if values != {BITS: 16, PHOTOMETRIC: WHITE_IS_ZERO}:
        return data, False
    place = tags[PHOTOMETRIC]
    return data[:place] + struct.pack(order + "H", BLACK_IS_ZERO) + data[place + 2 :], True
