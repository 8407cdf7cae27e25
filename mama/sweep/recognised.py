"""Whether a word on the command line names a sweep, or a run."""

from __future__ import annotations

import os
from pathlib import Path

from mama.errors import ConfigError
from mama.settings.load import is_shipped, shipped_configs
from mama.settings.values import root
from mama.settings.yaml_text import items
from mama.sweep.definition import POINTS, RUNNING
from mama.sweep.saved import KEYS, LARGEST, holds_sweep

# A recipe may have these keys too.
SHARED = ("name", "runs")


def is_sweep(name: str) -> bool:
    """Whether `name` is the folder of a sweep, a file with a key of sweeps, or a shipped sweep that is no recipe.

    A name that is both, such as quickstart, is the recipe: a shipped sweep is reported by its folder.
    """
    path = Path(os.path.expanduser(name))
    if holds_sweep(path):
        return True
    if path.is_file():
        return _has_a_key_of_sweeps(path)
    shipped = (shipped_configs() / "sweeps" / f"{name}.yaml").is_file() and not is_shipped(name)
    return shipped and not (path / "config.yaml").exists()


def _has_a_key_of_sweeps(file: Path) -> bool:
    try:
        keys = {key for key, _ in items(root(file, LARGEST))}
    except ConfigError:
        return False  # it is refused as a recipe, in one line
    return bool(keys & {*POINTS, *RUNNING, *KEYS} - {*SHARED})
