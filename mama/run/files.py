"""Files and folders of a run: JSON, folders that are replaced as a whole, and digests that show damage."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from shards.errors import one_line
from shards.files import atomic_write, named_in_errors, read_json

log = logging.getLogger(__name__)

DIGESTS = "digests.json"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `ConfigError` if the file is missing, damaged or no JSON object."""
    try:
        document = read_json(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); restore it from a copy") from None
    except ValueError as error:
        reason = one_line(error)[:100]
        raise ConfigError(f"{path}: is not JSON ({reason}); restore it from a copy") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: holds a {type(document).__name__}, not an object; restore it from a copy")
    return document


def write_json(path: Path, document: Any) -> None:
    """Write a document to a JSON file, atomically."""
    with named_in_errors(path):
        atomic_write(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())


def write_with_digest(path: Path, document: dict[str, Any]) -> None:
    """Write a document and the digest of its other entries, by which it is seen that it was edited or damaged."""
    write_json(path, {**document, "digest": document_digest(document)})


def document_digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of a document that JSON can hold, in whatever order its entries are."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; a gigabyte takes about a second. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path, known: Mapping[Path, str] | None = None, without: Collection[str] = ()) -> None:
    """Write the SHA-256 of every file in a folder to its `digests.json`, which is written last.

    Files whose digest is `known` are not read; those that are to change later, by their names, are left `without`.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    digests = {name: (known or {}).get(path) or sha256(path) for name, path in paths.items() if name not in without}
    write_json(folder / DIGESTS, digests)


def check_digests(folder: Path, fix: str) -> None:
    """Raises `ConfigError`, ending in `fix`, if a file listed in the folder's `digests.json` is missing or has changed.

    Other files are ignored. A folder without `digests.json`, as earlier versions wrote it, passes with a log line.
    """
    if not (folder / DIGESTS).exists():
        log.info("%s: has no %s, so damage to its files cannot be detected", folder, DIGESTS)
        return
    for name, expected in read_object(folder / DIGESTS).items():
        if (found := sha256_or_reason(folder / name)) != expected:
            reason = "its content has changed since it was written" if len(found) == 64 else found
            raise ConfigError(f"{folder / name}: {reason}; {fix}")


def sha256_or_reason(path: Path) -> str:
    """Return the SHA-256 of a file, or the reason why it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        return error.strerror or type(error).__name__


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` at the end of the block; after an error it is removed.

    Two processes do not mix their files: each fills one of its own, and the later one wins. Those of killed processes
    are removed. Raises `ConfigError` if it cannot be made.
    """
    own = f".{folder.name}.{platform.node()}-"
    for left in folder.parent.glob(f"{glob.escape(own)}*.partial"):
        number = left.name.removeprefix(own).removesuffix(".partial")
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            remove(left)
    new = folder.with_name(f"{own}{os.getpid()}.partial")
    remove(new)
    make_folder(new)
    try:
        yield new
        replace_folder(new, folder)
    finally:
        remove(new)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename the finished folder `new` to `folder`, in place of what is there; durable, also when the power fails.

    If the process is killed between the two renames, `surviving` finds the old folder. For one process at a time.
    """
    for path in (*new.rglob("*"), new):
        sync(path)
    old = previous(folder)
    if folder.exists() or folder.is_symlink():
        remove(old)
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    remove(old)


def surviving(folder: Path) -> Path:
    """Return `folder`, or the old one if `replace_folder` was killed between its two renames."""
    return folder if folder.exists() or not previous(folder).exists() else previous(folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises `ConfigError` if a file is in the way or permission is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made a folder ({error.strerror}); move what is in its way, or name another place"
        ) from None


def named(folder: Path) -> Path:
    """The folder by a path that ends in its name: not `.` or `..`."""
    return folder.resolve() if folder.name in ("", "..") else folder


def remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def previous(folder: Path) -> Path:
    """Where `replace_folder` keeps the folder that it replaces, until it is done.

    A hidden name: a folder such as `model.old` may be somebody's own.
    """
    return folder.with_name(f".{folder.name}.old")
