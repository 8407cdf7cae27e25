"""The software that a run is computed with: `environment.json` in its folder."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STACK = ("mama-clip", "torch", "deepspeed", "transformers", "peft", "xformers", "webdataset", "pydicom", "numpy")


def environment() -> dict[str, Any]:
    """Return versions of Python and the stack, the platform and, in a checkout, the git commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(Path(__file__).parent.parent.parent),
        "versions": {name: _version(name) for name in STACK},
    }


def _commit(root: Path) -> str | None:
    """The commit of the checkout `root`; None if it is no checkout or git is not installed."""
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
