"""Checks of a setting's value: each raises `ConfigError` with one line: setting, value, fix."""

from __future__ import annotations

from collections.abc import Sequence

from mama.errors import ConfigError

LONGEST_NAME = 200  # bytes of a run's name; file systems allow 255, and the names of its jobs are longer


def folder_name(name: str, value: str) -> None:
    """One plain folder name: what a run writes and deletes must stay in its folder, and job logs expand a `%`."""
    if value in ("", ".", "..") or set(value) & set("/\\"):
        reason = "is not the name of one folder; the folder that holds it is runs=..."
    elif not value.isprintable() or "%" in value:
        reason = "holds a control character or a %; take it out"
    elif value[0] in "-. " or value[-1] == " ":
        reason = "begins with '-', '.' or a blank, or ends with a blank; take it away"
    elif len(value.encode()) > LONGEST_NAME:
        reason = f"is longer than {LONGEST_NAME} bytes"
    else:
        return
    raise ConfigError(f"{name}: {value[:80]!r} {reason}")


def probability(name: str, value: float) -> None:
    """A number in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: {value} is not between 0 and 1")


def at_least_one(name: str, value: int) -> None:
    """A number of at least 1."""
    if value < 1:
        raise ConfigError(f"{name}: {value} is less than 1")


def prefixes(name: str, values: Sequence[str]) -> None:
    """No empty prefix of a tensor's name."""
    if "" in values:
        raise ConfigError(f"{name}: {values} holds an empty prefix, with which every tensor could be missing")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    """One of the `known` words."""
    if value not in known:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(known)}")


def weights(name: str, values: Sequence[float], of: str, entries: Sequence[str]) -> None:
    """Nothing, or a weight of at least 0 for each of the `entries` of the setting `of`, at least one above 0."""
    if values and len(values) != len(entries):
        raise ConfigError(f"{name}: {values} has {len(values)} weights, but {of} has {len(entries)} entries")
    if values and not (all(0 <= w < float("inf") for w in values) and any(values)):
        raise ConfigError(f"{name}: {values} holds no weight above 0, or one that is not a number of at least 0")
