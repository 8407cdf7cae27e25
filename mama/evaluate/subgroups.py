"""Figures of the subgroups of a task's images: by patient, breast, device, view, and by kind and size of the finding.

A subgroup are the images with a fact, and the units that they make up: of a woman imaged on the machines of two
vendors each of the two has part of the exam. Kind and size of a finding are those of a unit; without a finding there is
nothing to tell apart, so where a task has two classes the negative units stand against the positives of each subgroup.
Letters: n images, u units.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from mama.data.held_out import Item
from mama.evaluate import metrics
from mama.evaluate.task_data import Predictions, TaskData
from mama.evaluate.units import Units, facts
from mama.settings.schema import Config
from shards.schema import Finding, View

UNKNOWN, NONE = "unknown", "none recorded"  # NONE: of findings and boxes
METRICS = ("auc", "balanced_accuracy", "sensitivity", "specificity")  # those that a task has
AGES = ((40, "under 40"), (50, "40-49"), (60, "50-59"), (70, "60-69"), (200, "70 and over"))  # below -> band
# T1 of the TNM system ends at 20 mm; screening finds many lesions of 10 mm: the areas of boxes with these sides.
AREAS = ((100.0, "box under 100 mm2"), (400.0, "box of 100 to 400 mm2"), (np.inf, "box over 400 mm2"))
# Of images without a pixel spacing.
SHARES = (
    (0.01, "box under 1 % of the image"),
    (0.05, "box of 1 to 5 % of the image"),
    (np.inf, "box over 5 % of the image"),
)

IMPLANT = {None: None, False: "no implant", True: "implant"}
FACTS: dict[str, Callable[[Item], str | None]] = {
    "age": lambda item: None if item.study.age is None else band(item.study.age, AGES),
    "race": lambda item: item.study.race,
    "ethnicity": lambda item: item.study.ethnicity,
    "density": lambda item: item.view.labels.density,
    "vendor": lambda item: item.view.vendor,
    "view": lambda item: item.view.view,
    "implant": lambda item: IMPLANT[item.view.implant],
}
FINDINGS = ("finding", "size")


def subgroups(data: TaskData, config: Config) -> dict[str, Any]:
    """Of the task's unit: every subgroup by every fact, with counts and, of the trained model, figures.

    `not_recorded` are the facts that no image has, `smallest` the size of the smallest subgroup: n units.
    """
    units = data.units(data.task.unit)
    groups = list(_groups(data, units))
    shown = [one for one in data.predictions if one.model == "trained" and one.whole]
    rows = [
        {"by": by, "group": group, "protocol": one.protocol, "model": one.model, **_row(data, of, one, config)}
        for by, group, of in groups
        for one in shown
    ]
    smallest = min(groups, key=lambda found: len(found[2].keys), default=None)
    return {
        "unit": units.kind,
        "pool": None if units.kind == "image" else config.eval.pool,
        "smallest": smallest and {"by": smallest[0], "group": smallest[1], "n": len(smallest[2].keys)},
        "not_recorded": [by for by in (*FACTS, *FINDINGS) if by not in {data.task.label, *(g[0] for g in groups)}],
        "rows": rows,
    }


def as_csv(document: dict[str, Any]) -> str:
    """The rows of `subgroups` as a table, a line for each subgroup and protocol."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    rows = document["rows"]
    names = [name for name in METRICS if rows and name in rows[0]["metrics"]]
    keys = ("by", "group", "protocol", "model", "n", "counts", "patients")
    figures = [f"{name}{end}" for name in names for end in ("", "_low", "_high", "_reason")]
    writer.writerow([*keys, "unit", "pool", *figures])
    for row in rows:
        counts = "; ".join(f"{count} {name}" for name, count in row["counts"].items())
        cells = [row["metrics"][name][end] for name in names for end in ("value", "low", "high", "reason")]
        writer.writerow([*({**row, "counts": counts}[key] for key in keys), document["unit"], document["pool"], *cells])
    return file.getvalue()


def band(value: float, bands: tuple[tuple[float, str], ...]) -> str:
    """The name of the first band whose end is above `value`, or of the last one."""
    return next((name for end, name in bands if value < end), bands[-1][1])


def area(view: View, finding: Finding) -> str | None:
    """The band of the area of a finding's box; None without a box.

    In mm2 of the original image where its pixel spacing is known, else as a share of the stored image, which ends at
    the breast.
    """
    if finding.box is None:
        return None
    x0, y0, x1, y1 = finding.box
    pixels = (x1 - x0) * (y1 - y0)
    if view.pixel_spacing is None:
        return band(pixels / (view.size[0] * view.size[1]), SHARES)
    a, b, _, d, e, _ = view.to_original
    row, column = view.pixel_spacing
    return band(pixels * abs(a * e - b * d) * row * column, AREAS)


def _groups(data: TaskData, units: Units) -> Iterator[tuple[str, str, Units]]:
    """(fact, subgroup, its units) of every fact that some image has, those of which it is unknown last."""
    for by, fact in FACTS.items():
        if by == data.task.label:  # each subgroup would be of one class
            continue
        values = [fact(item) or UNKNOWN for item in data.items]
        for value in _ordered(set(values)):
            yield by, value, data.units(units.kind, np.array([one == value for one in values]))
    of_unit = _findings(data, units)
    positive = units.labels > 0 if data.task.binary else np.ones(len(units.keys), bool)
    for by in FINDINGS:
        sets = of_unit[by]
        lacking = np.array([not found for found in sets], bool) & positive
        for value in _ordered(set().union(*sets, {NONE} if lacking.any() else ())):
            has = lacking if value == NONE else np.array([value in found for found in sets], bool)
            if data.task.binary:
                has = (has & positive) | ~positive
            yield by, value, data.units(units.kind, (units.unit_of >= 0) & has[units.unit_of])


def _ordered(values: set[str]) -> list[str]:
    """In the order of the bands or of the alphabet, the unknown last; nothing if nothing is known."""
    order = [name for bands in (AGES, AREAS, SHARES) for _, name in bands]
    known = sorted(values - {UNKNOWN, NONE}, key=lambda one: (order.index(one) if one in order else -1, one))
    return [*known, *sorted(values & {UNKNOWN, NONE})] if known else []


def _findings(data: TaskData, units: Units) -> dict[str, list[set[str]]]:
    """Of each unit the kinds of its findings, and the size of its largest box in an image of the task."""
    kinds: list[set[str]] = [set() for _ in units.keys]
    sizes: list[set[str]] = [set() for _ in units.keys]
    for item, unit in zip(data.items, units.unit_of.tolist(), strict=True):
        if unit >= 0:
            kinds[unit] |= {finding.kind for finding in item.view.findings}
            sizes[unit] |= {size for finding in item.view.findings if (size := area(item.view, finding))}
    return {"finding": kinds, "size": [set(_ordered(found)[-1:]) for found in sizes]}


def _row(data: TaskData, units: Units, one: Predictions, config: Config) -> dict[str, Any]:
    scores = units.pooled(one.scores, config.eval.pool, data.task.binary)
    measured = metrics.measure(
        units.labels, scores, units.patients, data.task.binary, config.eval.bootstrap, config.seed
    )
    kept = {name: asdict(estimate) for name, estimate in measured.items() if name in METRICS}
    counted = {key: value for key, value in facts(units, data.classes).items() if key in ("n", "counts", "patients")}
    return {**counted, "metrics": kept}
