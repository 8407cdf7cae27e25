"""The axes of a sweep: what `grid`, `list` and `random` say, as the settings in which each point differs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mama.errors import ConfigError
from mama.settings.checks import at_least_one
from mama.settings.typed_values import value_of
from mama.settings.values import assigned, flat, typed
from mama.settings.yaml_text import Node, items, mapping, sequence, shown

DISTRIBUTIONS = ("uniform", "loguniform", "choice")
MOST = 10_000  # points; more are a slip
DIGITS = 4  # significant digits of a drawn number, as names show it
# Settings that are no axis, and what to write.
OWNED = {
    "name": "points are named by what differs",
    "runs": "all points of a sweep lie in its folder",
    "seed": "write seeds: [0, 1, 2] beside grid, list and random",
}


def entries(given: dict[str, Node]) -> list[dict[str, Any]]:
    """(axis -> value) of every point, before recipes and seeds; one plain point if no axis is `given`."""
    found: list[dict[str, Any]] = []
    grid, listed, drawn = given.get("grid"), given.get("list"), given.get("random")
    if grid is not None:
        found += _grid(items(mapping(grid, "grid")))
    if listed is not None:
        found += _list(sequence(listed, "list"))
    if drawn is not None:
        found += _random(dict(items(mapping(drawn, "random"))))
    for axis in (axis for entry in found for axis in entry):
        if axis in OWNED:
            raise ConfigError(f"{axis}: is no axis; {OWNED[axis]}")
    return found or [{}]


def at_most(points: int) -> None:
    """Raise `ConfigError` if these are too many points for a sweep."""
    if points > MOST:
        raise ConfigError(f"makes {points} points; a sweep has at most {MOST}")


@contextmanager
def _inside(key: str) -> Iterator[None]:
    """Name `key` in an error about what it holds."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


@_inside("grid")
def _grid(given: list[tuple[str, Node]]) -> list[dict[str, Any]]:
    """The product of all axes; the last one changes fastest."""
    axes = {axis: [typed(axis, value) for value in sequence(values, axis)] for axis, values in flat(given).items()}
    at_most(math.prod(map(len, axes.values())))
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@_inside("list")
def _list(given: list[Node]) -> list[dict[str, Any]]:
    """The points as they are written; `{}` is the recipe as it is."""
    return [assigned(items(mapping(entry, "a point", may_be_empty=True))) for entry in given]


@_inside("random")
def _random(given: dict[str, Node]) -> list[dict[str, Any]]:
    """As many points as asked for, with a value of each axis. More points leave the first ones as they are."""
    numbers = {key: value_of(int, given.pop(key), key) for key in ("points", "seed") if key in given}
    if "points" not in numbers:
        raise ConfigError("points: is missing; how many points shall be drawn?")
    at_least_one("points", numbers["points"])
    at_most(numbers["points"])
    seed = numbers.get("seed", 0)
    axes = {axis: draws(axis, of, random.Random(f"{seed} {axis}")) for axis, of in flat(given.items()).items()}
    if not axes:
        raise ConfigError("names no axis; write for example optim.lr: {loguniform: [1e-5, 1e-3]}")
    return [{axis: next(values) for axis, values in axes.items()} for _ in range(numbers["points"])]


def draws(axis: str, node: Node, generator: random.Random) -> Iterator[Any]:
    """Values of `{DISTRIBUTION: [...]}` for a setting, without end. A whole number is drawn between whole numbers."""
    (kind, values), *more = items(mapping(node, axis))
    if more or kind not in DISTRIBUTIONS:
        raise ConfigError(f"{axis}: {shown(node)} is not one of {', '.join(DISTRIBUTIONS)} with its values")
    given = [typed(axis, value) for value in sequence(values, axis)]
    if kind == "choice":
        return _drawn(generator, lambda u: given[int(u * len(given))])
    if len(given) != 2 or not all(isinstance(value, int | float) and math.isfinite(value) for value in given):
        raise ConfigError(f"{axis}: {shown(values)} is not a smallest and a largest number; choice takes any values")
    low, high = given
    if isinstance(low, bool) or not low < high:
        raise ConfigError(f"{axis}: {shown(values)} is not a smallest and a larger number")
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"{axis}: {shown(values)} has no logarithm; loguniform needs numbers above 0")
    forth, back = (math.log, math.exp) if kind == "loguniform" else (float, float)
    if isinstance(low, int) and isinstance(high, int):
        start, width = forth(low), forth(high + 1) - forth(low)
        return _drawn(generator, lambda u: min(high, max(low, math.floor(back(start + u * width)))))
    start, width = forth(low), forth(high) - forth(low)
    return _drawn(generator, lambda u: min(high, max(low, float(f"{back(start + u * width):.{DIGITS}g}"))))


def _drawn(generator: random.Random, value: Callable[[float], Any]) -> Iterator[Any]:
    while True:
        yield value(generator.random())
