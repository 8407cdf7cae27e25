"""A copy of the code that runs now, so that an edit in the checkout does not reach a job that waits."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from slurm.profile import SlurmError

PACKAGES = ("mama", "shards", "slurm")
CONFIGS = "configs"  # beside the packages in a checkout; inside of mama in a wheel


def snapshot(folder: str | Path) -> Path:
    """Copy the packages that run now, and the shipped recipes, to `folder`/<digest of their contents>; return it.

    The copy appears there complete, and once: code that was not changed is not copied again.

    Raises `SlurmError` if a copy that is there was changed.
    """
    files = _files()
    place = Path(folder).absolute() / _digest(files)
    if not place.exists():
        _write(files, place)
    changed = [name for name, content in files.items() if not _holds(place / name, content)]
    if changed:
        raise SlurmError(f"{place / changed[0]}: differs from the code that it is a copy of; delete {place}")
    return place


@cache
def code_digest() -> str:
    """The digest of the code that this process runs, by which `snapshot` names a copy; that of the copy is the same."""
    return _digest(_files())


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(b"%s\0%d\0" % (name.encode(), len(content)) + content)
    return digest.hexdigest()[:16]


def _files() -> dict[str, bytes]:
    """Path inside of the copy -> content, in the order of the paths; without compiled files."""
    roots = {name: _folder_of(name) for name in PACKAGES}
    beside = roots["mama"].parent / CONFIGS
    if beside.is_dir() and not (roots["mama"] / CONFIGS).is_dir():
        roots[CONFIGS] = beside
    paths = {
        f"{name}/{path.relative_to(root).as_posix()}": path
        for name, root in roots.items()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return {name: paths[name].read_bytes() for name in sorted(paths)}


def _folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SlurmError(f"{package}: this package is not installed, so its code cannot be copied")
    return Path(spec.origin).parent


def _write(files: dict[str, bytes], place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".code-", dir=place.parent))
    try:
        for name, content in files.items():
            file = aside / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        aside.chmod(0o755)
        try:
            os.rename(aside, place)
        except OSError:
            if not place.is_dir():  # else another process has copied the same meanwhile
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _holds(file: Path, content: bytes) -> bool:
    return file.is_file() and file.read_bytes() == content
