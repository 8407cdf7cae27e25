"""A folder of files that are made once, shared by all processes and later runs, and named by their SHA-256."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from shards.errors import FetchError, ShardError
from shards.files import atomic_file

SHA256 = re.compile(r"[0-9a-f]{64}")


def cached(folder: Path, sha256: str, suffix: str, make: Callable[[BinaryIO], None]) -> Path:
    """The path of `<sha256><suffix>` in `folder`; `make` writes its content if the file is missing.

    One process makes it (atomic write) while the others wait at a lock file. Raises `ShardError` if `sha256`, which
    comes from a manifest, is not a SHA-256, and `FetchError` if the folder cannot be written.
    """
    if not SHA256.fullmatch(sha256):
        raise ShardError(f"{sha256[:80]!r} is not a SHA-256; the manifest was edited or damaged")
    path = folder / f"{sha256}{suffix}"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when the process ends
            if not path.exists():
                with atomic_file(path) as file:
                    make(file)
    except OSError as error:
        raise FetchError(f"{path}: cannot be written ({error.strerror}); set another folder for the cache") from None
    return path
