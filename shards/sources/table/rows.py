"""The rows of one study in a user's table -> a `SourceStudy`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from shards.errors import Refused
from shards.schema import Box, Finding, Labels, SourceStudy, SourceView
from shards.sources.table.options import DESCRIPTORS, IMAGE_FACTS, SIZE, STUDY_FACTS, box_fields

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
UNNUMBERED = -1  # of a finding without a number in the table


def study_of(rows: Sequence[Any], root: Path, names: Mapping[str, str], owners: dict[str, int]) -> SourceStudy:
    """One study with its images in the order of the table.

    `rows` have values for the fields in `names`, the row's number `row`, the reason to refuse it (`refused`), whether
    it has a finding (`described`), and whether its view is one with the implant displaced (`displaced`). `owners`
    (image -> its first row) is shared by all studies and updated.
    """
    images: dict[str, list[Any]] = {}
    for row in rows:
        images.setdefault(row.image, []).append(row)
    numbers = count(1 + max(getattr(row, "number", None) or 0 for row in rows))
    facts, conflict = _study_facts(rows, names)
    views = []
    for image, of_image in images.items():
        try:
            _refuse(image, of_image, owners, conflict)
            view = _view(root / image, of_image, names, numbers)
        except Refused as error:
            view = SourceView(root / image, refused=error.pair)
        views.append(view)
    return SourceStudy(rows[0].patient, rows[0].study, tuple(views), **facts)


def _study_facts(rows: Sequence[Any], names: Mapping[str, str]) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The facts of the study, or the reason to refuse all its images because its rows differ."""
    fix = "" if "study" in names else "; name the column that tells exams apart in options.columns.study"
    try:
        return _agreed(rows, STUDY_FACTS, names, f"one study differ{fix}"), None
    except Refused as error:
        return {}, error.pair


def _refuse(image: str, rows: Sequence[Any], owners: dict[str, int], conflict: tuple[str, str] | None) -> None:
    """Raise `Refused` for the image's path, for a cell of its rows, or for a conflict in its study."""
    if image.startswith(("/", "../")) or image == ".." or CONTROL.search(image):
        raise Refused("outside", "the path leads out of the archive's root or holds control characters")
    owner = owners.setdefault(image, rows[0].row)
    if owner != rows[0].row:
        raise Refused("duplicate", f"row {owner} has this file in another study; row {rows[0].row} does not count")
    for refused in (*(row.refused for row in rows), conflict):
        if refused:
            raise Refused(*refused)


def _view(path: Path, rows: Sequence[Any], names: Mapping[str, str], numbers: Iterator[int]) -> SourceView:
    facts = _agreed(rows, IMAGE_FACTS, names, "this image differ")
    return SourceView(
        path,
        facts.get("laterality"),
        facts.get("view"),
        _labels(facts, names),
        _findings(rows, names, numbers),
        facts.get("report"),
        implant=_implant(facts, rows, names),
    )


def _agreed(rows: Sequence[Any], fields: Sequence[str], names: Mapping[str, str], differ: str) -> dict[str, Any]:
    """The values on which the rows agree; empty cells agree with any. Raises `Refused` if two rows differ."""
    fields = [field for field in fields if field in names]
    if len(rows) == 1:
        return {field: getattr(rows[0], field) for field in fields}
    facts: dict[str, Any] = {}
    for field in fields:
        first_rows = {getattr(row, field): row.row for row in reversed(rows)}  # value -> the first row that has it
        first_rows.pop(None, None)
        if len(first_rows) > 1:
            one, other = sorted(first_rows.values())[:2]
            raise Refused("label-conflict", f"column {names[field]}: rows {one} and {other} of {differ}")
        facts[field] = next(iter(first_rows), None)
    return facts


def _labels(facts: Mapping[str, Any], names: Mapping[str, str]) -> Labels:
    cancer, pathology = facts.get("cancer"), facts.get("pathology")
    if pathology is not None:
        if cancer is not None and cancer != (pathology == "malignant"):
            message = f"column {names['cancer']} says {str(cancer).lower()}, column {names['pathology']} {pathology}"
            raise Refused("label-conflict", message)
        cancer = pathology == "malignant"
    return Labels(facts.get("birads"), facts.get("density"), cancer, pathology)


def _implant(facts: Mapping[str, Any], rows: Sequence[Any], names: Mapping[str, str]) -> bool | None:
    """Whether the breast has an implant: a view with the implant displaced shows one."""
    stated: bool | None = facts.get("implant")
    if not any(row.displaced for row in rows):
        return stated
    if stated is False:
        message = f"column {names['implant']} says no, column {names['view']} a view with the implant displaced"
        raise Refused("label-conflict", message)
    return True


def _findings(rows: Sequence[Any], names: Mapping[str, str], numbers: Iterator[int]) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    boxed: set[Finding] = set()  # joins repeat rows; but two findings without boxes may be equal
    for row in rows:
        if not row.described:
            continue
        finding = _finding(row, names)
        if finding not in boxed:
            findings.append(finding)
        if finding.box:
            boxed.add(finding)
    return tuple(f if f.number != UNNUMBERED else replace(f, number=next(numbers)) for f in findings)


def _finding(row: Any, names: Mapping[str, str]) -> Finding:
    if row.kind is None:
        raise Refused("label", f"column {names['kind']}: does not say what finding row {row.row} describes")
    descriptors = {here: getattr(row, field) for field, here in DESCRIPTORS.items() if field in names}
    number = getattr(row, "number", None)
    return Finding(UNNUMBERED if number is None else number, row.kind, _box(row, names), **descriptors)


def _box(row: Any, names: Mapping[str, str]) -> Box | None:
    """The box (x0, y0, x1, y1); x1 is x0 plus the width, that is, exclusive. Raises `Refused` ("label")."""
    fields = box_fields(names)
    numbers = [getattr(row, field) for field in fields]
    if numbers.count(None) == len(numbers):
        return None
    columns = ", ".join(names[field] for field in fields)
    if None in numbers:
        raise Refused("label", f"columns {columns}: row {row.row} has only some of the four numbers of a box")
    x0, y0, x1, y1 = numbers
    if SIZE[0] in names:
        x1, y1 = x0 + x1, y0 + y1
    if x0 >= x1 or y0 >= y1:
        raise Refused("label", f"columns {columns}: row {row.row} holds no box from its upper left to its lower right")
    if max(x1, y1) <= 1:
        raise Refused("label", f"columns {columns}: row {row.row} holds shares of the image; a box is in pixels")
    return x0, y0, x1, y1
