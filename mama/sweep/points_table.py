"""The points of a sweep as a table of text, for `mama sweep --dry-run`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mama.sweep.sweep import Sweep

WIDEST = 32  # characters of a value


def describe_points(sweep: Sweep) -> Iterator[str]:
    """Lines: a head, each point with its value of every axis, and how many there are."""
    axes = list(dict.fromkeys(axis for point in sweep.points for axis in point.differs))
    axes.sort(key=lambda axis: axis == "seed")  # a stable sort: the seeds end the line, as they do in names
    rows = [["point", *axes]]
    for point in sweep.points:
        rows.append([point.name, *(_cell(point.differs[axis]) if axis in point.differs else "" for axis in axes)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield f"{len(sweep.points)} point{'s' if len(sweep.points) > 1 else ''} in {sweep.folder}"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value).removesuffix(".0")
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
