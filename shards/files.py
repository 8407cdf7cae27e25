"""Files that somebody else may have written: read only where reading them ends."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shards.from_json import parse_json
from shards.schema import ShardError

PACKAGE = "package:"  # prefix of a path inside an installed Python package
LARGEST_JSON = 2**30  # bytes; the manifest of a million studies has some 2**27


def package_path(path: str) -> Path | None:
    """The file or folder that `package:NAME/PATH` names; None if the Python package NAME is not installed."""
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / inside


def name_bytes(text: str) -> bytes:
    """A text as UTF-8. What Python read from a file name that is not UTF-8 becomes the bytes of that name again.

    So a name has the same bytes whatever the locale is. A lone surrogate of another origin is encoded as such.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def legible(text: str) -> str:
    """A file name, or a text that quotes one, for a file or a page: bytes that are not UTF-8 are written as \\xfc."""
    return name_bytes(text).decode("utf-8", "backslashreplace")


def read_plain(path: Path, largest: int) -> bytes:
    """The bytes of a plain file. Raises `OSError`; `ShardError`, without the file's name, for what is none or larger.

    A pipe or a device is refused before it is opened: reading it might never end.
    """
    if path.exists() and not path.is_file():
        raise ShardError("is a folder" if path.is_dir() else "is no plain file")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise ShardError(f"holds more than {largest} bytes")
        return file.read()


def read_json(path: Path) -> Any:
    """The document in a plain file. Raises `OSError`, and `ValueError` for what `parse_json` or `read_plain` refuse."""
    return parse_json(read_plain(path, LARGEST_JSON))


def set_default_mode(path: Path) -> None:
    """Permissions of any new file of this user; `tempfile` and safetensors leave files that only he may read."""
    mask = os.umask(0o077)  # there is no other way to read it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file of this name whole or not at all, also when the power fails: write beside it, fsync, rename."""
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
