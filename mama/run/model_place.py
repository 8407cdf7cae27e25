"""What names a model: a run folder, or a model folder by itself. Anything else is told what it is. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from mama.errors import ConfigError
from mama.run.checkpoint_marker import STEP
from mama.run.portable import MODEL, OLD_WEIGHTS
from shards.read.manifest import MANIFEST

MEANT = "name a run folder, or a model folder that `mama consolidate` wrote"
PARTS = ("vision", "text", "heads.safetensors")  # of a model folder


def require_place(path: Path) -> None:
    """Raise `ConfigError` unless `path` is a folder that may be a run, or hold a model."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise ConfigError(f"{path}: {what}; {MEANT}")
    if (path / MODEL).is_file() or any((path / name).is_dir() for name in ("model", "checkpoints")):
        return
    settings = (path / "config.yaml").is_file()
    if settings and (path / OLD_WEIGHTS).is_file():
        raise ConfigError(f"{path}: an earlier release wrote this model; run `mama consolidate` again")
    if settings and any((path / name).exists() for name in PARTS):
        raise ConfigError(f"{path}: has no {MODEL}; copy the whole folder model/ that `mama consolidate` wrote")
    if settings:
        return
    if STEP.fullmatch(path.name):
        raise ConfigError(f"{path}: is a checkpoint; run `mama consolidate {path}`, then name its run folder")
    if (path.parent / MODEL).is_file():
        raise ConfigError(f"{path}: is a part of a model; name the whole folder, {path.parent}")
    what = "is a folder of shards" if (path / MANIFEST).is_file() else "is neither a run nor a model"
    raise ConfigError(f"{path}: {what}; {MEANT}")
