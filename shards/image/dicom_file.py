"""Open an image file within bounded memory: find it, decompress gzip, read a DICOM data set."""

from __future__ import annotations

import gzip
import io
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import DeflatedExplicitVRLittleEndian

from shards.errors import Refused, is_machine_error
from shards.image.jpeg_streams import CUT

GZIP = b"\x1f\x8b"
PREFIX = 128  # bytes before DICM (PS3.10 7.1)
# Bytes of a decompressed gzip file or deflated data set: both are decompressed in memory, and a few kilobytes can
# expand to any size. An image of `jpeg_streams.LARGEST` pixels has a quarter of it.
LARGEST_UNFOLDED = 2**30
SUFFIXES = (".dcm", ".dicom", ".ima")
SUFFIX = re.compile(rf"({'|'.join(map(re.escape, SUFFIXES))})?(\.gz)?$", re.IGNORECASE)


def find_file(path: Path) -> Path:
    """`path`; if there is none, the file that differs in the suffix only (a.dcm.gz, a.dicom, a); else `path`.

    Archives are compressed or renamed after their tables were written, and file names come in another Unicode form
    (macOS) or in Latin-1. A missing folder is not searched: most are missing if an archive was downloaded in part.
    """
    if path.is_symlink() or path.exists():
        return path
    path = next((spelling for spelling in _spellings(path) if spelling.exists()), path)
    if not path.parent.is_dir() or path.exists():
        return path
    spellings = ("", *SUFFIXES, *(suffix.upper() for suffix in SUFFIXES))
    names = (bare_name(path) + suffix + packed for suffix in spellings for packed in ("", ".gz"))
    return next((other for name in names if (other := path.with_name(name)).is_file()), path)


def _spellings(path: Path) -> Iterator[Path]:
    text = str(path)
    if text.isascii():
        return
    for form in ("NFC", "NFD"):
        yield Path(unicodedata.normalize(form, text))
    with suppress(UnicodeEncodeError):
        yield Path(os.fsdecode(text.encode("latin-1")))


def bare_name(path: Path) -> str:
    """The file name without .dcm, .dicom or .ima, and without .gz after it."""
    return SUFFIX.sub("", path.name, count=1)


def is_named_dicom(path: Path) -> bool:
    """Whether the suffix is .dcm, .dicom or .ima, in any case, possibly followed by .gz."""
    match = SUFFIX.search(path.name)
    return bool(match and match[1])


def holds_dicom(path: Path) -> bool:
    """Whether the file is DICOM, by its first bytes, also within gzip; False if it cannot be read.

    Raises `OSError` when the machine is to blame and not the file, which would silently be missing from a list.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            return is_dicom(gzip.GzipFile(fileobj=file) if packed else file)
    except (OSError, EOFError, zlib.error) as error:
        if is_machine_error(error):
            raise
        return False


def is_dicom(file: BinaryIO | gzip.GzipFile) -> bool:
    """Whether the content is DICOM; `file` is at its beginning, before and after."""
    head = file.read(PREFIX + 4)
    file.seek(0)
    return head[PREFIX:] == b"DICM"


def open_unfolded(path: Path) -> BinaryIO:
    """The file, decompressed if its content is gzip. Raises `OSError`; `Refused`: unreadable, too-large."""
    file = path.open("rb")
    packed = file.read(len(GZIP)) == GZIP
    file.seek(0)
    if not packed:
        return file
    with file:
        return _unfold(file)


def read_dicom(file: BinaryIO, **options: Any) -> Dataset:
    """The data set of a DICOM file, its pixels still encoded. `options` are those of `pydicom.dcmread`.

    Raises `Refused`: unreadable, too-large.
    """
    try:
        read_preamble(file, force=False)
        meta = FileMetaDataset(read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2))
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            dataset = read_dataset(io.BytesIO(_inflate(file.read())), False, True)
            dataset.file_meta = meta
        else:
            file.seek(0)
            dataset = pydicom.dcmread(file, **options)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # pydicom's errors on damaged files have no common type
        if isinstance(error, OSError) and error.errno is not None:  # from the disk; the parser's own have no errno
            raise
        raise Refused("unreadable", "a damaged DICOM file: its header cannot be read") from None
    if not len(dataset):  # pydicom drops all elements if one of undefined length has no end
        raise Refused("unreadable", CUT)
    return dataset


def _unfold(file: BinaryIO) -> BinaryIO:
    kept = io.BytesIO()
    try:
        with gzip.GzipFile(fileobj=file) as packed:
            while piece := packed.read(2**20):
                _limit(kept.tell() + len(piece))
                kept.write(piece)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise Refused("unreadable", "a gzip file that is cut or damaged; copy or download it again") from None
    kept.seek(0)
    return kept


def _inflate(data: bytes) -> bytes:
    """Decompress the data set of a deflated transfer syntax (PS3.5 A.5; raw deflate, RFC 1951)."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unfolded = inflater.decompress(data, LARGEST_UNFOLDED + 1)
    except zlib.error:
        raise Refused("unreadable", "its deflated data set is damaged; copy or download it again") from None
    _limit(len(unfolded))
    if not inflater.eof:
        raise Refused("unreadable", CUT)
    return unfolded


def _limit(size: int) -> None:
    if size > LARGEST_UNFOLDED:
        raise Refused("too-large", f"decompresses to more than {LARGEST_UNFOLDED} bytes")
