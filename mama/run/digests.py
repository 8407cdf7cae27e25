"""Folders that are whole or not there, and the digests by which damage is noticed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from mama.settings.schema import ConfigError
from shards.errors import one_line
from shards.files import atomic_write, read_json

log = logging.getLogger(__name__)

DIGESTS = "digests.json"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ConfigError` where the file is gone, damaged or holds something else."""
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
    """Atomic write."""
    atomic_write(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())


def sha256(path: Path) -> str:
    """In hexadecimal; about a second for a gigabyte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder into its `digests.json`, the last file of a whole one."""
    digests = {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}
    write_json(folder / DIGESTS, digests)


def check_digests(folder: Path, fix: str) -> None:
    """Raises `ConfigError`, which ends in `fix`, where a file is not the one that `write_digests` has seen.

    Files that have come since do no harm. A folder without digests, which earlier versions wrote, is logged.
    """
    if not (folder / DIGESTS).exists():
        log.info("%s: has no %s, so damage to its files would not be noticed", folder, DIGESTS)
        return
    for name, expected in read_object(folder / DIGESTS).items():
        if (found := sha256_or_reason(folder / name)) != expected:
            reason = "its content has changed since it was written" if len(found) == 64 else found
            raise ConfigError(f"{folder / name}: {reason}; {fix}")


def sha256_or_reason(path: Path) -> str:
    """The digest of a file, or why it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        return error.strerror or type(error).__name__


def replace_folder(aside: Path, folder: Path) -> None:
    """Put a finished folder in the place of another, on the disk; a kill leaves the old one or the new one whole.

    Between the two renames the old one stands aside, where `standing` finds it.
    """
    for path in (*aside.rglob("*"), aside):
        sync(path)
    old = _old(folder)
    if folder.exists() or folder.is_symlink():
        remove(old)
        folder.rename(old)
    aside.rename(folder)
    sync(folder.parent)
    remove(old)


def standing(folder: Path) -> Path:
    """Where a folder lies: the old one is aside where `replace_folder` was killed between its two renames."""
    return folder if folder.exists() or not _old(folder).exists() else _old(folder)


def make_folder(folder: Path) -> None:
    """A folder and those that hold it. Raises `ConfigError` where a file is in the way, or it may not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made a folder ({error.strerror}); move what is in its way, or name another runs=..."
        ) from None


def remove(path: Path) -> None:
    """A file, a link (not what it points to) or a folder, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")
