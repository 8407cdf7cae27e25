"""Replace folders as a whole; create, delete and fsync them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mama.errors import ConfigError


def replace_folder(new: Path, folder: Path) -> None:
    """Rename the finished folder `new` to `folder`, in place of what is there; durable, also when the power fails.

    If the process is killed between the two renames, `standing` finds the old folder. For one process at a time.
    """
    for path in (*new.rglob("*"), new):
        sync(path)
    old = _old(folder)
    if folder.exists() or folder.is_symlink():
        remove(old)
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    remove(old)


def standing(folder: Path) -> Path:
    """Return `folder`, or the old one if `replace_folder` was killed between its two renames."""
    return folder if folder.exists() or not _old(folder).exists() else _old(folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises `ConfigError` if a file is in the way or permission is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made a folder ({error.strerror}); move what is in its way, or name another runs=..."
        ) from None


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


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")
