"""Files that are made once and kept for every process and every later start, named by what they hold."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from shards.files import atomic_file
from shards.schema import FetchError, ShardError

SHA256 = re.compile(r"[0-9a-f]{64}")


def cached(folder: Path, sha256: str, suffix: str, make: Callable[[BinaryIO], None]) -> Path:
    """The file `<sha256><suffix>` in `folder`, written by `make` where it is not there.

    One process at a time makes it, behind a lock file, and the others wait; it is written aside and renamed, so that
    a file by this name is a whole one. Raises `ShardError` where `sha256`, which a manifest says, is no such hash, and
    `FetchError` where the folder cannot be written.
    """
    if not SHA256.fullmatch(sha256):
        raise ShardError(f"{sha256[:80]!r} is no SHA-256; the manifest was edited or damaged")
    path = folder / f"{sha256}{suffix}"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a killed process lets go of it
            if not path.exists():
                with atomic_file(path) as file:
                    make(file)
    except OSError as error:
        raise FetchError(
            f"{path}: cannot be kept there ({error.strerror}); name another folder for the cache"
        ) from None
    return path
