"""The points of a sweep: every recipe with every entry and every seed, each as the configuration of its run."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.settings.schema import Config
from mama.settings.values import build, put, values_of
from mama.sweep.axes import at_most
from mama.sweep.names import name_of, unique
from mama.sweep.sweep import Point

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """A recipe of a sweep, with the sweep's own settings in it."""

    name: str
    values: dict[str, Any]  # dotted setting -> value
    differs: bool  # whether recipes are an axis of the sweep


def points_of(
    recipes: Sequence[Recipe],
    entries: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    folder: Path,
    known: dict[str, str],
) -> list[Point]:
    """A point for each recipe, entry and seed, one for all that have the same settings.

    `known` are the names of points that the sweep had, by `identity`: they keep them. Raises `ConfigError` that names
    the point.
    """
    at_most(len(recipes) * len(entries) * max(1, len(seeds)))
    found: dict[str, Point] = {}
    products = list(itertools.product(recipes, entries, [{"seed": seed} for seed in seeds] or [{}]))
    for recipe, entry, seed in products:
        point = _point(recipe, {**entry, **seed}, recipes, folder)
        found.setdefault(identity(point.config), point)
    if twice := len(products) - len(found):
        log.info("%d of %d points have the settings of another, which runs once", twice, len(products))
    names = {key: known[key] for key in found if key in known}
    new = {key: point for key, point in found.items() if key not in known}
    proposed = [point.name for point in new.values()]
    names |= zip(new, unique(proposed, [point.differs for point in new.values()], names.values()), strict=True)
    return [replace(point, config=replace(point.config, name=names[key])) for key, point in found.items()]


def identity(config: Config) -> str:
    """The same for two configurations if they are the same run, by whatever name."""
    values = {key: value for key, value in values_of(config).items() if key not in ("name", "runs")}
    return json.dumps(values, sort_keys=True)


def _point(recipe: Recipe, entry: dict[str, Any], recipes: Sequence[Recipe], folder: Path) -> Point:
    differs = ({"recipe": recipe.name} if recipe.differs else {}) | entry
    name = name_of(differs, recipe.name)
    values = dict(recipe.values)
    try:
        put(values, entry)
        values = _packed(values, recipes) | {"name": name, "runs": str(folder)}
        return Point(build(Config, values), differs)
    except ConfigError as error:
        raise ConfigError(f"point {name}: {error}") from error


def _packed(values: dict[str, Any], recipes: Sequence[Recipe]) -> dict[str, Any]:
    """`values`, with the section pack of the first recipe that packs their shards if they have none."""
    if values.get("pack.source"):
        return values
    for recipe in recipes:
        if recipe.values.get("pack.source") and recipe.values.get("pack.out") in values.get("data.shards", ()):
            return {key: value for key, value in recipe.values.items() if key.startswith("pack.")} | values
    return values
