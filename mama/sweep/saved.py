"""`sweep/sweep.yaml` in the folder of a sweep: its points with all their settings, whatever becomes of the recipes.

The settings of the first point are written out, of every other point only what differs from them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.settings.load import yaml_of
from mama.settings.schema import Config
from mama.settings.typed_values import value_of
from mama.settings.values import assigned, build, put, root, values_of
from mama.settings.yaml_text import Node, items, mapping, sequence
from mama.sweep.points import identity
from mama.sweep.sweep import OWN, Point, Sweep
from shards.files import atomic_write

SAVED = "sweep.yaml"
LARGEST = 2**26  # bytes; a point has about 250
KEYS = ("base", "points")
HEAD = "# Written by `mama sweep`, which reads it when it is given this folder. To change points, edit your own file.\n"


def holds_sweep(folder: Path) -> bool:
    """Whether a sweep was run, or submitted, in this folder."""
    return (folder / OWN / SAVED).is_file()


def save_sweep(sweep: Sweep) -> Path:
    """Write the file from which `load_sweep(sweep.folder)` makes the same sweep; returns it. Raises `OSError`."""
    base = sweep.points[0].config
    document = {
        "stages": sweep.stages,
        "evaluations": {e.name.removeprefix("eval-"): e.settings for e in sweep.evaluations if e.name != "eval"},
        "profiles": sweep.profiles,
        "at_once": sweep.at_once,
        "baseline": sweep.baseline,
        "base": asdict(base),
        "points": [{"name": p.name, "differs": p.differs, "settings": _left(p, values_of(base))} for p in sweep.points],
    }
    sweep.own.mkdir(parents=True, exist_ok=True)
    file = sweep.own / SAVED
    atomic_write(file, (HEAD + yaml_of({key: of for key, of in document.items() if of})).encode())
    return file


def saved_points(given: dict[str, Node], folder: Path) -> list[Point]:
    """The points of a saved file, in the `folder` where it lies now. Raises `ConfigError`."""
    if not given.keys() >= set(KEYS):
        raise ConfigError("holds no points; restore it from a copy, or take the folder away")
    base = assigned(items(mapping(given["base"], "base")))
    return [_point(dict(items(mapping(node, "points"))), base, folder) for node in sequence(given["points"], "points")]


def known_names(folder: Path) -> dict[str, str]:
    """The names of the points of a sweep that was saved, by `identity`; empty if there is none."""
    file = folder / OWN / SAVED
    if not file.exists():
        return {}
    try:
        return {identity(point.config): point.name for point in saved_points(dict(items(root(file, LARGEST))), folder)}
    except ConfigError as error:
        reason = str(error).removeprefix(f"{file}: ").partition(";")[0]
        raise ConfigError(f"{file}: is damaged ({reason}); delete it, this command writes it anew") from error


def _point(given: dict[str, Node], base: dict[str, Any], folder: Path) -> Point:
    if given.keys() != {"name", "differs", "settings"}:
        raise ConfigError(f"points: holds {', '.join(given)}, not name, differs, settings; give the sweep's own file")
    name = value_of(str, given["name"], "name")
    pairs = items(mapping(given["differs"], "differs", may_be_empty=True))
    axes = assigned((key, node) for key, node in pairs if key != "recipe")
    recipe = {key: value_of(str, node, key) for key, node in pairs if key == "recipe"}
    values = dict(base)
    put(values, axes)
    put(values, assigned(items(mapping(given["settings"], "settings", may_be_empty=True))))
    return Point(build(Config, values | {"name": name, "runs": str(folder)}), recipe | axes)


def _left(point: Point, base: dict[str, Any]) -> dict[str, Any]:
    """The settings of a point that its axes do not change in those of the `base`."""
    put(base, {axis: value for axis, value in point.differs.items() if axis != "recipe"})
    own = values_of(replace(point.config, name=base["name"], runs=base["runs"]))
    return {key: value for key, value in own.items() if json.dumps(value) != json.dumps(base[key])}
