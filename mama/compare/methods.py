"""The methods of a sweep: points that differ in the seed alone are trainings of one method."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from mama.run.kept_settings import flat
from mama.sweep.names import short
from mama.sweep.sweep import Point, Sweep

SEED = "seed"
OWN = ("name", "runs", SEED)  # settings that differ between points of any sweep, or belong to the machine


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    settings: dict[str, Any]  # what its points differ in from others, without the seed
    points: list[Point]

    def value(self, axis: str) -> Any:
        """The value of an axis of the sweep: where the sweep does not name it for these points, their setting."""
        return self.settings[axis] if axis in self.settings else flat(asdict(self.points[0].config)).get(axis)


def methods(sweep: Sweep) -> list[Method]:
    """In the order in which the sweep names them."""
    grouped: dict[str, list[Point]] = defaultdict(list)
    for point in sweep.points:
        grouped[json.dumps(_settings(point), sort_keys=True, default=str)].append(point)
    keys = {axis: short(axis) for point in sweep.points for axis in _settings(point)}
    varied = [axis for axis in keys if len({shown(point.differs.get(axis)) for point in sweep.points}) > 1]
    rows = list(grouped.values())
    names = [_name(points[0], keys, varied) for points in rows]
    # Figures are kept by these names, and `null` is also shown where the sweep does not name an axis for a point.
    names = [n if names.count(n) == 1 else _whole(points[0]) for n, points in zip(names, rows, strict=True)]
    return [Method(name, _settings(points[0]), points) for name, points in zip(names, rows, strict=True)]


def baseline_of(method: Method, sweep: Sweep, all_methods: list[Method]) -> tuple[Method | None, str]:
    """The method that this one is compared with; None, and why, if there is none.

    Where `sweep.baseline` fits several methods, it is the one that equals this one in everything else.
    """
    wanted = {axis: value for axis, value in sweep.baseline.items() if axis != SEED}
    if not wanted:
        return None, "the sweep names no baseline"
    fitting = [one for one in all_methods if all(one.settings.get(a) == v for a, v in wanted.items())]
    if method in fitting:
        return None, "baseline"
    if len(fitting) == 1:
        return fitting[0], ""
    alike = [one for one in fitting if one.settings == method.settings | wanted]
    return (alike[0], "") if alike else (None, "no baseline has its other settings")


def common_settings(sweep: Sweep) -> tuple[dict[str, Any], dict[str, dict[str, list[str]]]]:
    """The settings that all points share, and of the others but the axes: setting -> value -> names of methods."""
    configs = [(method.name, flat(asdict(point.config))) for method in methods(sweep) for point in method.points]
    axes = {axis for point in sweep.points for axis in point.differs}
    common: dict[str, Any] = {}
    others: dict[str, dict[str, list[str]]] = {}
    for key in sorted({key for _, config in configs for key in config}):
        values = {name: shown(config.get(key)) for name, config in configs}
        if key in OWN:
            continue
        if len(set(values.values())) == 1:
            common[key] = next(iter(values.values()))
        elif key not in axes:
            grouped: dict[str, list[str]] = defaultdict(list)
            for name, value in values.items():
                grouped[value].append(name)
            others[key] = dict(grouped)
    return common, others


def _settings(point: Point) -> dict[str, Any]:
    return {axis: value for axis, value in point.differs.items() if axis != SEED}


def _name(point: Point, keys: dict[str, str], varied: list[str]) -> str:
    """The value of each axis that varies, with its short key unless it is the recipe; else the name of the point."""
    parts = [(axis, shown(value)) for axis, value in _settings(point).items() if axis in varied]
    named = ", ".join(text if axis == "recipe" else f"{keys[axis]}={text}" for axis, text in parts)
    return named or _whole(point)


def _whole(point: Point) -> str:
    """The name of the point, without the seed."""
    return point.name.removesuffix(f"_{SEED}-{point.config.seed}")


def shown(value: Any) -> str:
    """As the YAML of a sweep has it, in one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(one)}" for key, one in value.items()) + "}"
    if _number(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return {True: "true", False: "false", None: "null"}.get(value, str(value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
