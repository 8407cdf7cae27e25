"""The code and the libraries that a run is made with. Without PyTorch, which is slow to import."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shards.files import atomic_write
from slurm.snapshot import code_digest, snapshot

STACK = ("mama-clip", "torch", "deepspeed", "transformers", "peft", "xformers", "webdataset", "pydicom", "numpy")
COMMIT = "commit"  # file in a copy of the code: the commit of the checkout that was copied


def environment() -> dict[str, Any]:
    """Return the contents of `environment.json`: versions, the platform, a digest of our code, and its git commit.

    The commit is that of a checkout, also if what runs is a copy that `mama sweep` made of it; else None.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "code": code_digest(),
        "commit": commit(Path(__file__).parent.parent.parent),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the version of each distribution that a run's numbers depend on; None if it is not installed."""
    return {name: _version(name) for name in STACK}


def copy_code(folder: Path) -> Path:
    """Copy the code that runs now to `folder`/<digest>/, for jobs that start later; returns the copy."""
    place = snapshot(folder)
    if not (place / COMMIT).exists() and (found := commit(Path(__file__).parents[2])):
        atomic_write(place / COMMIT, f"{found}\n".encode())
    return place


def commit(root: Path) -> str | None:
    """The commit of the checkout `root`, or of the one that `root` is a copy of; None if it is neither."""
    if (root / COMMIT).exists():
        return (root / COMMIT).read_text().strip()
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() if git.returncode == 0 and (root / "pyproject.toml").exists() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
