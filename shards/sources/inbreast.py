"""INbreast: full-field digital mammograms from Porto (Moreira et al., Academic Radiology 19:236, 2012).

The paper documents the release. Research only; the authors grant access.
"""

from __future__ import annotations

import logging
import plistlib
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from shards.errors import Refused, ShardError
from shards.image.dicom_file import bare_name
from shards.schema import VIEWS, Box, Finding, Labels, SourceStudy, SourceView
from shards.sources.common import agreed_age, read_code, unidentified
from shards.sources.headers import dicom_files
from shards.sources.tables import blank_unknown, groups, read_table, rows

log = logging.getLogger(__name__)

TABLE, IMAGES, OUTLINES = "INbreast.csv", "AllDICOMs", "AllXML"
COLUMNS = {
    "Patient age": "age",
    "Laterality": "laterality",
    "View": "view",
    "Acquisition date": "date",
    "File Name": "file",
    "ACR": "density",
    "Bi-Rads": "birads",
}
# 20586908_6c613a14b80a8591_MG_R_CC_ANON: file number, patient, side, view (ML means MLO).
NAME = r"^(?P<file>\d+)_(?P<patient>[0-9a-f]+)_MG_(?P<named_side>[LR])_(?P<named_view>[A-Z]+)_ANON$"
NAMED_VIEWS = {"CC": "CC", "ML": "MLO", "MLO": "MLO"}
CODES: dict[str, dict[str, Any]] = {
    "laterality": {"L": "L", "R": "R"},
    "density": dict(zip("1234", "ABCD", strict=True)),
    "birads": {**{str(category): category for category in range(7)}, "4a": 4, "4b": 4, "4c": 4},
}
AGAIN = f"a row of {TABLE} or a file before it has the number {{}}"
UNDOCUMENTED = f"{TABLE}: {{column}} {{text!r}} in row {{row.row}} is not documented"


class Mark(NamedTuple):
    """The meaning of an outline's name."""

    kind: str
    margin: str | None = None
    distribution: str | None = None


SPECK = Mark("calcification")
MARKS = {  # names of outlines in lower case, with the misspellings of the release
    "mass": Mark("mass"),
    "spiculated region": Mark("mass", margin="spiculated"),
    "espiculated region": Mark("mass", margin="spiculated"),
    "calcification": SPECK,
    "calcifications": SPECK,
    "cluster": Mark("calcification", distribution="grouped"),
    "asymmetry": Mark("asymmetry"),
    "assymetry": Mark("asymmetry"),
    "distortion": Mark("distortion"),
}
UNNAMED = re.compile(r"|unnamed|point \d+")  # OsiriX's names for unnamed outlines
NUMBER = r"\s*(-?\d{1,6}(?:\.\d{1,12})?)\s*"
POINT = re.compile(rf"\({NUMBER},{NUMBER}\)")


def inbreast(root: Path) -> Iterator[SourceStudy]:
    """Yield one study per exam, sorted by patient and date: a patient's images of one acquisition date (a month).

    Files. `<root>` holds INbreast.csv, the DICOM files in AllDICOMs at any depth, and the radiologists' outlines in
    AllXML/<file>.xml, as OsiriX writes them. Patient ID is "removed" in the table; the file name has the patient. A
    file without a row is kept without labels, in an exam without date. An image without XML has no findings.

    Labels.
    - BI-RADS and density are per breast; 4a, 4b and 4c are 4. There is no pathology: cancer is unknown, also for
      BI-RADS 6. Age is "removed", but read if present.
    - An outline is a finding with the bounding box of its points, numbered within its exam: outlines are not linked
      between views. Points without area, mostly a single one, have no box. Single calcifications, often dozens, are one
      finding per image, with a box only if there is one outline. A spiculated region is a spiculated mass, even beside
      the mass. Outlines without a name are left out and counted in the log.

    Refused or left out, by the first that applies:
    1. duplicate: an earlier row or file has the same number;
    2. identifier: a row without file number, or without file and so without patient; a file name without patient;
    3. other-view: FB (from below) and the like;
    4. label: an undocumented cell or outline name, a file name that contradicts the row, or an unreadable XML file.
    Raises `ShardError` if the table, one of its columns, or a folder is missing.
    """
    if not all((root / name).exists() for name in (TABLE, IMAGES, OUTLINES)):
        raise ShardError(f"pack.root: {root} must hold {TABLE}, {IMAGES} and {OUTLINES} of INbreast")
    table = _images(root)
    nameless = table["patient"].isna()
    unnamed: list[str] = []
    for images in groups(table[~nameless], ["patient", "date"]):
        yield _study(root, images, unnamed)
    yield from unidentified(_without_patient(root, row) for row in rows(table[nameless]))
    if unnamed:
        log.info("INbreast: %d outlines have no name and are left out", len(unnamed))


def _images(root: Path) -> pd.DataFrame:
    """One row per image: rows and files of the same number joined, and those without a partner."""
    table = blank_unknown(read_table(root / TABLE, COLUMNS), CODES)
    table["row"] = (table.index + 2).astype(str)
    paths = dicom_files(root / IMAGES)
    files = pd.Series([bare_name(path) for path in paths], dtype="string").str.extract(NAME).assign(path=paths)
    for part in (table, files):
        part["again"] = part.groupby("file").cumcount()  # do not join the second row of a number to its first file
    numbered, named = table["file"].notna(), files["file"].notna()
    images = table[numbered].merge(files[named], on=["file", "again"], how="outer")
    return pd.concat([images, table[~numbered], files[~named]], ignore_index=True)


def _study(root: Path, images: Sequence[Any], unnamed: list[str]) -> SourceStudy:
    numbers = count(1)
    views = tuple(_view(root, row, numbers, unnamed) for row in images)
    study = f"{images[0].patient} {images[0].date or ''}".strip()
    return SourceStudy(images[0].patient, study, views, age=agreed_age(row.age for row in images))


def _view(root: Path, row: Any, numbers: Iterator[int], unnamed: list[str]) -> SourceView:
    try:
        if row.again:
            raise Refused("duplicate", AGAIN.format(row.file))
        view = NAMED_VIEWS.get(row.named_view)
        if view is None or row.view not in (None, *VIEWS):
            raise Refused("other-view", f"the view is {(row.view or row.named_view)[:40]!r}")
        cells = {column: read_code(row, column, CODES, UNDOCUMENTED) for column in CODES}
        if cells["laterality"] not in (None, row.named_side) or row.view not in (None, view):
            raise Refused("label", f"{TABLE}: Laterality or View of row {row.row} contradicts the file's name")
        findings = tuple(_findings(root / OUTLINES / f"{row.file}.xml", numbers, unnamed))
    except Refused as error:
        return SourceView(row.path, refused=error.pair)
    return SourceView(row.path, row.named_side, view, Labels(cells["birads"], cells["density"]), findings)


def _findings(path: Path, numbers: Iterator[int], unnamed: list[str]) -> Iterator[Finding]:
    specks: list[Box | None] = []
    for name, points in _outlines(path):
        if UNNAMED.fullmatch(name):
            unnamed.append(name)
            continue
        if name not in MARKS:
            raise Refused("label", f"{path.name}: the name of an outline, {name[:40]!r}, is not documented")
        mark, box = MARKS[name], _box(points)
        if mark is SPECK:
            specks.append(box)
        else:
            yield Finding(next(numbers), mark.kind, box, margin=mark.margin, distribution=mark.distribution)
    if specks:
        yield Finding(next(numbers), SPECK.kind, specks[0] if len(specks) == 1 else None)


def _outlines(path: Path) -> list[tuple[str, list[tuple[float, float]]]]:
    """(name in lower case, points (x, y) in pixels) of each outline. `plistlib` refuses entities, which may explode."""
    if not path.is_file():
        return []
    try:
        with path.open("rb") as file:
            images = plistlib.load(file, fmt=plistlib.FMT_XML)["Images"]
        outlines = [outline for image in images for outline in image["ROIs"]]
        return [
            (" ".join(outline.get("Name", "").lower().split()), _points(outline["Point_px"])) for outline in outlines
        ]
    except Exception as error:  # untrusted input: errors of the parser and of what it parsed have no common type
        raise Refused(
            "label", f"{path.name}: cannot be read as outlines ({type(error).__name__}: {str(error)[:80]})"
        ) from None


def _points(texts: Sequence[str]) -> list[tuple[float, float]]:
    points = []
    for text in texts:
        match = POINT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:40]!r} is no point")
        points.append((float(match[1]), float(match[2])))
    return points


def _box(points: Sequence[tuple[float, float]]) -> Box | None:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(points) < 2 or min(xs) == max(xs) or min(ys) == max(ys):
        return None
    return min(xs), min(ys), max(xs), max(ys)


def _without_patient(root: Path, row: Any) -> SourceView:
    if row.path is not None:
        return SourceView(row.path, refused=("identifier", "the file's name is not <number>_<patient>_MG_..._ANON"))
    path = root / IMAGES / (f"{row.file}.dcm" if row.file else f"row {row.row}")
    if row.again:
        return SourceView(path, refused=("duplicate", AGAIN.format(row.file)))
    message = f"{TABLE}: row {row.row} has no file number, or no file in {IMAGES} has it: the patient is not known"
    return SourceView(path, refused=("identifier", message))
