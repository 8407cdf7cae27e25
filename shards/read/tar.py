"""The members of a shard, read defensively: the file may be cut, damaged or malicious.

Nothing is extracted to disk, no link is followed, and no more memory is allocated than the file can fill. Errors are
`ShardError` without the name of the file, which the caller adds.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.errors import ShardError
from shards.image.jpeg_streams import END as JPEG_END
from shards.image.jpeg_streams import LARGEST as LARGEST_IMAGE
from shards.image.jpeg_streams import frame_header
from shards.schema import Study

BLOCK = tarfile.BLOCKSIZE
MEMBER_NAME = re.compile(r"[A-Za-z0-9_-]+\.(json|\d+\.(jpg|png))")
LARGEST_MEMBER = 2**28  # bytes; a 16-bit image of a whole film scan has about 2**26
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG = b"\xff\xd8"


class Readable(Protocol):
    """A binary file that is read sequentially."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """One file in a tar. `start` and `data` are the byte offsets of its header and its content."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """Byte offset of the next header."""
        return self.data + -(-self.size // BLOCK) * BLOCK


def open_shard(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a tar for reading. Raises `OSError`, and `ShardError` for a pipe or device, whose reading might not end."""
    if path.exists() and not path.is_file():
        raise ShardError("is not a regular file")
    return path.open("rb", buffering)


def parse_header(block: bytes, start: int, total: int) -> Member | None:
    """The member with the header `block` at byte `start` of a tar of `total` bytes; None at the end-of-archive mark.

    Raises `ShardError` for anything but a regular file of a study's name that fits into the tar.
    """
    if len(block) < BLOCK:
        raise ShardError(f"ends at byte {total} without an end mark")
    if block == bytes(BLOCK):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        raise ShardError(f"damaged at byte {start}: no tar header") from None
    if not MEMBER_NAME.fullmatch(info.name):
        raise ShardError(f"byte {start}: the name {info.name[:60]!a} is not one of a study's members")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ShardError(f"byte {start}: {info.name} is not a regular file but a link, folder or device")
    member = Member(info.name, start, start + BLOCK, info.size)
    if not 0 <= info.size <= LARGEST_MEMBER:
        raise ShardError(f"byte {start}: {info.name} claims {info.size} bytes, at most {LARGEST_MEMBER} are read")
    if member.end > total:
        raise ShardError(f"byte {start}: {info.name} claims {info.size} bytes, the file ends before")
    return member


def members(file: Readable, total: int) -> Iterator[tuple[Member, bytes]]:
    """Yield (member, content) by sequential reads up to the end-of-archive mark. Raises `ShardError`."""
    position = 0
    while member := parse_header(file.read(BLOCK), position, total):
        content = file.read(member.end - member.data)
        if len(content) < member.end - member.data:
            raise ShardError(f"byte {position}: {member.name} is not whole")
        yield member, content[: member.size]
        position = member.end


def parse_study(data: bytes) -> Study:
    """The study in a JSON member. Raises `ShardError` for one that is damaged or of another schema version."""
    try:
        return Study.from_json(data)
    except ShardError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"the study's JSON cannot be read ({type(error).__name__})") from None


def decode_image(data: bytes) -> NDArray[Any]:
    """Decode a JPEG or PNG member to uint8 or uint16 [h, w].

    The size in its header is checked before anything is allocated. Raises `ShardError`, and `MemoryError`.
    """
    height, width = _picture_size(data)
    if not 0 < height * width <= LARGEST_IMAGE:
        raise ShardError(f"claims {width} x {height} pixels, at most {LARGEST_IMAGE} are decoded")
    if not data.endswith((PNG_END, JPEG_END)):  # OpenCV would fill the missing part with grey
        raise ShardError("the image is cut")
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        if error.code == cv2.Error.STS_NO_MEM:
            raise MemoryError(f"not enough for an image of {height} x {width} pixels") from None
        image = None
    if image is None or image.ndim != 2 or image.dtype not in (np.uint8, np.uint16):
        raise ShardError("does not decode to a grey image")
    return image


def to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 or uint16 [h, w] -> uint8: of 16 bits the nearest of 256 grey levels."""
    return image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header of a PNG (IHDR) or JPEG."""
    if data.startswith(PNG) and data[12:16] == b"IHDR":
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    if data.startswith(JPEG) and (header := frame_header(data)[0]):
        return header.height, header.width
    raise ShardError("is not a JPEG or PNG image")
