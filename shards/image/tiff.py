"""TIFF files of 16 bits in which white is zero: OpenCV reads their values and leaves them inverted."""

from __future__ import annotations

import struct

BITS, PHOTOMETRIC = 258, 262  # tags BitsPerSample and PhotometricInterpretation, TIFF 6.0 section 8
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1


def black_is_zero(data: bytes) -> tuple[bytes, bool]:
    """A TIFF file of 16 bits whose white is zero, marked as if black were, and True; any other file, and False.

    Pillow does not know all of the former, and of 8 bits and 1 bit OpenCV does the inversion itself.
    """
    order = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}.get(data[:4])
    if order is None:
        return data, False
    # Where the directory begins, how many entries it has, their length, where in them the value lies: also of BigTIFF.
    start, number, length, value = ("8xQ", "Q", 20, 12) if b"+" in data[:4] else ("4xI", "H", 12, 8)
    try:
        (at,) = struct.unpack_from(order + start, data)
        (entries,) = struct.unpack_from(order + number, data, at)
        places = range(at + struct.calcsize(order + number), len(data) - length + 1, length)[: min(entries, 2**16)]
        tags = {struct.unpack_from(order + "H", data, place)[0]: place + value for place in places}
        told = {tag: struct.unpack_from(order + "H", data, tags[tag])[0] for tag in (BITS, PHOTOMETRIC)}
    except (struct.error, KeyError):
        return data, False
    if told != {BITS: 16, PHOTOMETRIC: WHITE_IS_ZERO}:
        return data, False
    place = tags[PHOTOMETRIC]
    return data[:place] + struct.pack(order + "H", BLACK_IS_ZERO) + data[place + 2 :], True
