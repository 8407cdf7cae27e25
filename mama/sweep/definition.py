"""Load a sweep from its YAML file, as docs/sweeps.md describes it. A mistake is one line: file, key, value, fix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.run.files import named
from mama.settings.checks import at_least_one, folder_name, one_of
from mama.settings.load import find, shipped_configs
from mama.settings.schema import Config
from mama.settings.typed_values import typed_node, value_of
from mama.settings.values import assigned, document, known_keys, override, put, root, suggestion, with_settings
from mama.settings.yaml_text import Node, is_list, is_null, items, mapping, sequence, shown
from mama.sweep.axes import entries
from mama.sweep.names import UNSAFE
from mama.sweep.points import Recipe, points_of
from mama.sweep.saved import KEYS, LARGEST, SAVED, holds_sweep, known_names, saved_points
from mama.sweep.sweep import OWN, STAGES, Evaluation, Point, Sweep
from shards.errors import did_you_mean

POINTS = ("name", "runs", "recipe", "settings", "grid", "list", "random", "seeds")  # say what the points are
RUNNING = ("stages", "evaluations", "profiles", "at_once", "baseline")  # say what is done with them
EVALUATED = ("data.", "eval.", "finetune.")  # beginnings of the settings that an evaluation may change


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Load a sweep: a YAML file, a shipped sweep by its name, or the folder in which one was saved.

    An override `key=value` is a key of the sweep itself (at_once=2), or a setting of every point (train.steps=100); the
    points of a saved sweep are not to be changed. Raises `ConfigError`.
    """
    file = _file(Path(path))
    given = dict(items(root(file, LARGEST)))
    saved = given.keys() >= set(KEYS)
    own = RUNNING if saved else (*POINTS, *RUNNING)
    if changed := next((text for text in overrides if saved and text.partition("=")[0] not in RUNNING), None):
        raise ConfigError(f"{changed}: {file} holds points that were submitted; change the sweep's own file")
    settings = [_override(text, given, own) for text in overrides]
    try:
        if unknown := next((key for key in given if key not in (*own, *(KEYS if saved else ()))), None):
            raise ConfigError(f"{unknown}: unknown key{_meant(unknown, own)}")
        folder = named(file.parent.parent) if saved else _folder(given, file)
        points = saved_points(given, folder) if saved else _points(given, file, folder, settings)
        return _sweep(given, folder, points, None if saved else file)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def with_default_profile(sweep: Sweep, profile: str) -> Sweep:
    """The sweep with another profile for the stages for which it names none. Raises `ConfigError`."""
    found = _lasting(find(os.path.expanduser(profile), "slurm"))
    return replace(sweep, profiles={**sweep.profiles, "default": found})


def _file(path: Path) -> Path:
    """The YAML file of the sweep that `path` names."""
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        folder = named(path)
        if holds_sweep(folder):
            return folder / OWN / SAVED
        if not (shipped_configs() / "sweeps" / f"{path}.yaml").is_file():
            raise ConfigError(f"{path}: holds no sweep ({OWN}/{SAVED}); give the sweep's YAML file")
    if path.suffix in (".yaml", ".yml") and not path.exists():
        raise ConfigError(f"{path}: no such file; a shipped sweep is named without {path.suffix}")
    return find(path, "sweeps")


def _override(text: str, given: dict[str, Node], own: Sequence[str]) -> dict[str, Any]:
    """Put `key=value` in `given` if it is one of the sweep's `own` keys; else the settings that it changes."""
    key, equals, value = text.partition("=")
    if equals and key in own:
        given[key] = typed_node(None, value, key)
        return {}
    if equals and "." not in key and key not in known_keys(Config):
        raise ConfigError(f"{key}: unknown key{did_you_mean(key, own) or suggestion(key, Config)}")
    return override(text)


def _meant(key: str, own: Sequence[str]) -> str:
    if key.partition(".")[0] in known_keys(Config):
        return "; settings of every point stand under settings:"
    return did_you_mean(key, own)


def _folder(given: dict[str, Node], file: Path) -> Path:
    """The folder of the sweep: `runs`/`name`."""
    name = value_of(str, given["name"], "name") if "name" in given else file.stem
    folder_name("name", name)
    runs = value_of(str, given["runs"], "runs") if "runs" in given else "runs"
    folder = Path(os.path.expanduser(runs)) / name
    if (folder / "config.yaml").exists():
        raise ConfigError(f"name: {name!r}, but {folder} is the folder of a run; choose another name")
    return folder


def _points(given: dict[str, Node], file: Path, folder: Path, changes: Sequence[dict[str, Any]]) -> list[Point]:
    differing = entries(given)
    seeds = [value_of(int, node, "seeds") for node in sequence(given["seeds"], "seeds")] if "seeds" in given else []
    of_all = assigned(items(mapping(given["settings"], "settings", may_be_empty=True))) if "settings" in given else {}
    axes = {axis for entry in differing for axis in entry} | ({"seed"} if seeds else set())
    for new in changes:
        if axis := next((key for key in new if key in axes), None):
            raise ConfigError(f"{axis}: is an axis of the sweep; change it there")
        for key in new:
            of_all.pop(key, None)  # what comes later counts, also where one key lies inside of the other
        of_all |= new
    for key in ("name", "runs"):
        if key in of_all:
            raise ConfigError(f"settings: {key}: belongs to the sweep; write it beside settings")
    if seeds and "seed" in of_all:
        raise ConfigError("settings: seed: is given by seeds; leave it out")
    return points_of(_recipes(given, file, of_all), differing, seeds, folder, known_names(folder))


def _recipes(given: dict[str, Node], file: Path, settings: dict[str, Any]) -> list[Recipe]:
    """The recipes of the sweep with its `settings`; an axis of the sweep if they are a list."""
    if "recipe" not in given or is_null(given["recipe"]):
        raise ConfigError("recipe: is missing; name a shipped recipe or a file")
    node = given["recipe"]
    single = not is_list(node)
    found: dict[str, tuple[Path, Recipe]] = {}
    for text in [value_of(str, one, "recipe") for one in ([node] if single else sequence(node, "recipe"))]:
        path = _beside(text, file, "")
        values = document(Config, path)
        put(values, settings)
        first, _ = found.setdefault(path.stem, (path, Recipe(path.stem, values, differs=not single)))
        if first.resolve() != path.resolve():
            raise ConfigError(f"recipe: {first} and {path} would give points of the same name; rename one")
    return [recipe for _, recipe in found.values()]


def _beside(text: str, file: Path, kind: str) -> Path:
    """The file `text` beside the sweep's `file`, or as `find` finds it."""
    beside = file.parent / os.path.expanduser(text)
    return beside if beside.is_file() else find(os.path.expanduser(text), kind)


def _sweep(given: dict[str, Node], folder: Path, points: list[Point], file: Path | None) -> Sweep:
    """The sweep of these points; `file` is where its profiles are looked for, None if they were found before."""
    stages = list(STAGES[2:])
    if "stages" in given:
        named = [value_of(str, node, "stages") for node in sequence(given["stages"], "stages")]
        for stage in named:
            one_of("stages", stage, STAGES)
        stages = [stage for stage in STAGES if stage in named]
    if "pack" in stages and (bare := next((p for p in points if not p.config.pack.source), None)):
        raise ConfigError(
            f"stages: pack, but no recipe packs the data.shards of point {bare.name}, {bare.config.data.shards}; "
            "take pack out, or give the settings of pack"
        )
    at_once = value_of(int | None, given["at_once"], "at_once") if "at_once" in given else None
    if at_once is not None:
        at_least_one("at_once", at_once)
    return Sweep(
        name=folder.name,
        folder=folder,
        points=points,
        stages=stages,
        evaluations=_evaluations(given, points) if "eval" in stages else [],
        profiles=_profiles(given, file),
        at_once=at_once,
        baseline=_baseline(given, points),
    )


def _evaluations(given: dict[str, Node], points: list[Point]) -> list[Evaluation]:
    found = [] if "evaluations" in given else [Evaluation("eval")]
    for name, node in items(mapping(given["evaluations"], "evaluations")) if "evaluations" in given else ():
        key = f"evaluations.{name}"
        if not name or UNSAFE.search(name):
            raise ConfigError(f"{key}: a name has letters, digits and ._- only")
        settings = assigned(items(mapping(node, key, may_be_empty=True)))
        if other := next((setting for setting in settings if not setting.startswith(EVALUATED)), None):
            raise ConfigError(
                f"{key}: {other}: is a setting of training; an evaluation may change data, eval and finetune"
            )
        found.append(Evaluation(f"eval-{name}", settings))
    for point in points:
        _check_evaluations(point, found)
    return found


def _check_evaluations(point: Point, evaluations: Sequence[Evaluation]) -> None:
    """Raise `ConfigError` if one does not suit the point, or two would write to one folder: that of their images."""
    of_images: dict[str, str] = {}
    for evaluation in evaluations:
        key = evaluation.name.replace("eval-", "evaluations.", 1)
        try:
            config = with_settings(point.config, evaluation.settings)
        except ConfigError as error:
            raise ConfigError(f"{key}: point {point.name}: {error}") from error
        if config.eval.on:
            raise ConfigError(f"{key}: eval.on: {config.eval.on}; a sweep names them as evaluations.NAME.data.shards")
        first = of_images.setdefault(f"{config.data.shards} {config.eval.split}", key)
        if first != key:
            raise ConfigError(f"{key}: evaluates the images of {first}; name all tasks of these images in one of them")


def _profiles(given: dict[str, Node], file: Path | None) -> dict[str, str]:
    """Stage -> profile. Those that lie beside the sweep's file or in the working directory are named by their paths."""
    if "profiles" not in given:
        return {}
    found = {}
    for stage, node in items(mapping(given["profiles"], "profiles", may_be_empty=True)):
        one_of("profiles", stage, ("default", *STAGES))
        found[stage] = profile = value_of(str, node, f"profiles.{stage}")
        if file is not None:
            try:
                found[stage] = _lasting(_beside(profile, file, "slurm"))
            except ConfigError as error:
                raise ConfigError(f"profiles.{stage}: {error}") from error
    return found


def _lasting(profile: Path) -> str:
    """The name of a profile by which it is found from any working directory."""
    return profile.stem if profile.parent == shipped_configs() / "slurm" else str(profile.absolute())


def _baseline(given: dict[str, Node], points: list[Point]) -> dict[str, Any]:
    """What the points differ in, of those with which the report compares the others."""
    if "baseline" not in given:
        return {}
    pairs = items(mapping(given["baseline"], "baseline"))
    baseline = assigned((key, node) for key, node in pairs if key != "recipe")
    for recipe in (value_of(str, node, key) for key, node in pairs if key == "recipe"):
        baseline["recipe"] = Path(recipe).name.removesuffix(".yaml")
    if not any(baseline.items() <= point.differs.items() for point in points):
        raise ConfigError(f"baseline: {shown(given['baseline'])} is none of the points; name values of their axes")
    return baseline
