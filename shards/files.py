"""Bounded reads of files that somebody else wrote, atomic writes, and file names that are not UTF-8."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BufferedRandom
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.from_json import parse_json

PACKAGE = "package:"  # prefix of a path inside an installed Python package
LARGEST_JSON = 2**30  # bytes; the manifest of a million studies has about 2**27


def package_path(path: str) -> Path | None:
    """The file or folder that `package:NAME/PATH` names; None if the Python package NAME is not installed."""
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / inside


def name_bytes(text: str) -> bytes:
    """Encode as UTF-8; a file name that is not UTF-8 (surrogate escapes, PEP 383) gives its original bytes again.

    So a name has the same bytes in every locale. Other lone surrogates are encoded as they are.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def legible(text: str) -> str:
    """A file name, or a text that quotes one, in valid Unicode: bytes that are not UTF-8 become escapes (\\xfc)."""
    return name_bytes(text).decode("utf-8", "backslashreplace")


def read_plain(path: Path, largest: int) -> bytes:
    """The bytes of a regular file of at most `largest` bytes.

    A pipe or a device is refused before it is opened, as reading it might never end. Raises `OSError`, and
    `ShardError` without the file's name for anything that is not a regular file or is larger.
    """
    if path.exists() and not path.is_file():
        raise ShardError("is a folder" if path.is_dir() else "is not a regular file")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise ShardError(f"holds more than {largest} bytes")
        return file.read()


def read_json(path: Path) -> Any:
    """The JSON document in a regular file. Raises `OSError`, and `ValueError` as `parse_json` and `read_plain` do."""
    return parse_json(read_plain(path, LARGEST_JSON))


def atomic_write(path: Path, data: bytes) -> None:
    """Write the whole file or nothing, also when the power fails. Raises `OSError`."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Give an `OSError` without a file name, as a failed write raises it, that of the file that is written."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_file(path: Path, suffix: str = ".part") -> Iterator[BufferedRandom]:
    """A new file to write and read back, which becomes `path` at the end of the block: fsync, then rename.

    After an error or a kill it remains as `path` + `suffix`, and the next writer overwrites it. Where several
    processes may write the same `path` at a time, each needs a suffix of its own. Raises `OSError`.
    """
    partial = path.with_name(path.name + suffix)
    with partial.open("w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
