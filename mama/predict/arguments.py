"""The arguments of a `Model`: one of the wrong kind is a `ConfigError` of one line that names it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from mama.errors import ConfigError
from mama.evaluate.units import Pool

Paths = str | Path | Iterable[str | Path]


def path(name: str, given: Any) -> str:
    """The path of one file or folder. Raises `ConfigError` for another type, and for an empty text."""
    found = os.fspath(given) if isinstance(given, Path) else given
    if not isinstance(found, str):
        raise ConfigError(f"{name}: {given!r} is no path; give a text or a pathlib.Path")
    if not found.strip():
        raise ConfigError(f"{name}: {found!r} names nothing; the folder that you are in is '.'")
    return found


def paths(name: str, given: Any) -> list[str]:
    """The paths of one file or folder, or of several."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Path)
    return [path(name, one) for one in (given if several else [given])]


def texts(name: str, given: Any) -> list[str]:
    """Several texts. Raises `ConfigError` also for a single one, whose letters would be taken for texts."""
    if isinstance(given, str):
        raise ConfigError(f"{name}: {given!r} is one text; give a list, [{given!r}]")
    if not isinstance(given, Iterable):
        raise ConfigError(f"{name}: {given!r} is no list of texts")
    found = list(given)
    if wrong := [one for one in found if not isinstance(one, str)]:
        raise ConfigError(f"{name}: {wrong[0]!r} is no text")
    return found


def require_choices(pool: Any, workers: Any) -> None:
    """Raise `ConfigError` for a way of pooling that there is not, or a number of processes that is none."""
    if pool not in get_args(Pool):
        raise ConfigError(f"pool: {pool!r} is not one of {', '.join(get_args(Pool))}")
    if not isinstance(workers, int) or workers < 0:
        raise ConfigError(f"workers: {workers!r} is no number of processes; 0 is none besides this one")
