"""Detect how a CSV file is written: compression, encoding, separator, header.

If that is ambiguous, the error says how to save the file instead.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import logging
import lzma
import re
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from shards.errors import ShardError

log = logging.getLogger(__name__)

SEPARATORS = (",", ";", "\t", "|")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
HEAD = 2**20  # bytes in which the header must end
# Blank lines, and the line that declares the separator to Excel.
PREAMBLE = re.compile(r"(?:(?:[ ,;\t|]*|\"?sep=.\"?)(?:\r\n|\r|\n))*")

# Text of another 8-bit encoding, read as Windows-1252: characters that Western languages do not use, or not in this
# position (Central European letters), and runs of accented letters (Cyrillic, Greek, Hebrew, Chinese).
LETTERS = "À-ÖØ-öø-ÿŠšŽžŒœŸ"
SIGNS = "€‚„…‘’“”•–—™‰«»‹›°±²³µ·§¼½¾®©×¡¿ªº\xa0"
FOREIGN = re.compile(rf"[^\x00-\x7f{LETTERS}{SIGNS}]|[{LETTERS}]{{4}}|\w[¡¿]|[²³]\w")


@dataclass(frozen=True)
class Dialect:
    """How to read a CSV file; `skipped` is the number of lines before the header."""

    encoding: str
    separator: str
    header: tuple[str, ...]
    skipped: int


def find_dialect(path: Path, wanted: Collection[str], separator: str | None = None) -> Dialect:
    """Detect the dialect of the CSV file at `path`; the separator only if `separator` is None.

    The separator is the one that finds most of the `wanted` columns in the header. The encoding is that of the byte
    order mark, else UTF-8; `check_western` handles files that are not. Raises `ShardError` for NUL bytes.
    """
    with open_packed(path) as file:
        head = file.read(HEAD)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
    text = _decode(head, encoding)
    if "\0" in text.partition("\n")[0]:
        raise ShardError(f"{path}: holds NUL bytes: UTF-16 without its byte order mark, or no text; save it as UTF-8")
    preamble = PREAMBLE.match(text)[0]  # type: ignore[index]
    marks = SEPARATORS if separator is None else (separator,)
    headers = {mark: _header(text[len(preamble) :], mark) for mark in marks}
    best = max(headers, key=lambda mark: (len(set(headers[mark]) & set(wanted)), len(headers[mark])))
    return Dialect(encoding, best, headers[best], len(preamble.splitlines()))


def clean_name(name: str) -> str:
    """A column name without surrounding spaces and byte order marks."""
    return name.replace("\ufeff", "").strip()


def open_packed(path: Path) -> IO[bytes]:
    """Open a file, decompressing gzip, bzip2, xz and zip by content, whatever the suffix."""
    with path.open("rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in PACKED.items() if start.startswith(magic)), None)
    return opener(path) if opener else path.open("rb")


def _only_member(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    if len(archive.namelist()) != 1:
        raise ValueError("a zip file of several files; unpack it and name the table")
    return archive.open(archive.namelist()[0])


PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"PK\x03\x04": _only_member,
}


def check_western(path: Path) -> None:
    """Raise `ShardError` unless the file at `path`, which is not UTF-8, plausibly is Windows-1252.

    Logs a word as an example, because other encodings share most letters.
    """
    example, utf8_line = "", 0
    with open_packed(path) as file:
        for number, line in enumerate(file, 1):
            if line.isascii():
                continue
            try:
                line.decode()
                utf8_line = utf8_line or number
            except UnicodeDecodeError as error:
                text = line.decode("cp1252", errors="replace")
                byte = f"byte 0x{line[error.start]:02x} in line {number}"
                if utf8_line:
                    raise ShardError(f"{path}: {byte} is not UTF-8, line {utf8_line} is; save all as UTF-8") from None
                if FOREIGN.search(text):
                    raise ShardError(f"{path}: {byte} is neither UTF-8 nor Windows-1252; save it as UTF-8") from None
                example = example or f"{_accented(text)!r} in line {number}"
    log.warning("%s: read as Windows-1252, as in %s; if that is wrong, save the table as UTF-8", path, example)


def _accented(text: str) -> str:
    """The first word with a non-ASCII character."""
    return next(word for word in re.findall(r"[^\s,;|\"]+", text) if not word.isascii())[:40]


def _decode(head: bytes, encoding: str) -> str:
    try:
        return head.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8" or error.start > len(head) - 4:  # the last character is cut
            return head.decode(encoding, errors="replace")
        return head.decode("cp1252", errors="replace")


def _header(text: str, separator: str) -> tuple[str, ...]:
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), ())
    except (csv.Error, TypeError):  # an unclosed cell; a separator that is a pattern, which only pandas supports
        return ()
    return tuple(clean_name(name) for name in names)
