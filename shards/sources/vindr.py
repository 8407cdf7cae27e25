"""VinDr-Mammo: Vietnamese exams with radiologists' bounding boxes (Nguyen et al., Scientific Data 10:277, 2023).

PhysioNet, DOI 10.13026/br2v-7517, restricted access; its page documents layout and columns.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from shards.errors import Refused, ShardError
from shards.schema import Box, Finding, Labels, SourceStudy, SourceView
from shards.sources.common import read_code, unidentified
from shards.sources.stated_splits import Stated, in_column
from shards.sources.tables import blank_unknown, groups, read_table, rows

log = logging.getLogger(__name__)

BREASTS, FINDINGS, METADATA = "breast-level_annotations.csv", "finding_annotations.csv", "metadata.csv"
IMAGE = {
    "study_id": "study",
    "image_id": "image",
    "laterality": "laterality",
    "view_position": "view",
    "breast_birads": "birads",
    "breast_density": "density",
}
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FINDING = {**IMAGE, "finding_categories": "categories", **{name: name for name in CORNERS}}
AGES = {"SOP Instance UID": "image", "Patient's Age": "age"}

CODES: dict[str, dict[str, Any]] = {
    "laterality": {"L": "L", "R": "R"},
    "view": {"CC": "CC", "MLO": "MLO"},
    "birads": {f"BI-RADS {number}": number for number in range(1, 6)},
    "density": {f"DENSITY {letter}": letter for letter in "ABCD"},
}
UNDOCUMENTED = f"{BREASTS}: {{column}} {{text!r}} is not documented"
KINDS = {  # category -> (kind, shape)
    "Mass": ("mass", None),
    "Suspicious Calcification": ("calcification", None),
    "Asymmetry": ("asymmetry", None),
    "Focal Asymmetry": ("asymmetry", "focal"),
    "Global Asymmetry": ("asymmetry", "global"),
    "Architectural Distortion": ("distortion", None),
}
# Associated features, for which a `Finding` has no kind.
SIGNS = ("Skin Thickening", "Skin Retraction", "Nipple Retraction", "Suspicious Lymph Node")
NO_FINDING = "No Finding"


def vindr(root: Path) -> Iterator[SourceStudy]:
    """Yield one study per exam, sorted by `study_id`.

    Files. `<root>` holds breast-level_annotations.csv, finding_annotations.csv, images/<study_id>/<image_id>.dicom, and
    optionally metadata.csv, which has the ages by image. The tables do not link exams of the same patient, so each exam
    is a patient: two exams of one woman may be in two splits. Whether an exam is screening or diagnostic is not
    documented. The official split is `vindr_split`.

    Labels.
    - BI-RADS (1 to 5) and density are those of breast-level_annotations.csv. There is no pathology: cancer and
      pathology are unknown, also for BI-RADS 1 and 5.
    - A row of finding_annotations.csv is one box with a list of categories. Each category in `KINDS` is a finding with
      that box and with the number of the row. Numbers are never shared between views, because the table does not link
      them. Categories in `SIGNS` are left out and counted in the log. `finding_birads` is not used.

    Refused, by the first that applies:
    1. identifier: study or image is empty; 2. duplicate: an earlier row names the same image; 3. label: an undocumented
    cell or category, a box without four ordered corners, or an image with findings but without a row of its own.
    Raises `ShardError` if a table or one of its columns is missing.
    """
    breasts, findings, ages = _read(root)
    nameless = breasts["study"].isna() | breasts["image"].isna()
    of_image = _by_image(findings)
    for images in groups(breasts[~nameless], ["study"]):
        yield _study(root, images, of_image, ages)
    yield from unidentified(_without_identifier(root, row) for row in rows(breasts[nameless]))


def vindr_split(root: Path) -> list[Stated]:
    """The official split of each exam, training or test, if breast-level_annotations.csv has that column."""
    return in_column(root / BREASTS, "study_id", "split", optional=True)


def _by_image(findings: pd.DataFrame) -> dict[str, list[Any]]:
    of_image: dict[str, list[Any]] = {}
    line: Any
    for line in rows(findings):
        of_image.setdefault(line.image, []).append(line)
    return of_image


def _read(root: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """The images, their findings with the number of their row, and the age by image."""
    for name in (BREASTS, FINDINGS):
        if not (root / name).is_file():
            raise ShardError(f"pack.root: {root} must hold {BREASTS}, {FINDINGS} and images of VinDr-Mammo")
    breasts = blank_unknown(read_table(root / BREASTS, IMAGE), CODES).assign(listed=True)
    findings = blank_unknown(read_table(root / FINDINGS, FINDING), CODES)
    findings["line"] = findings.index + 2
    orphans = findings.loc[~findings["image"].isin(breasts["image"]), list(IMAGE.values())]
    table = pd.concat([breasts, orphans.drop_duplicates("image").assign(listed=False)], ignore_index=True)
    table["again"] = table["image"].notna() & table["image"].duplicated()
    signs = findings["categories"].fillna("").astype(str).str.count("|".join(SIGNS)).sum()
    if signs:
        log.info("VinDr-Mammo: %d skin, nipple and lymph node findings are left out: they are no lesions", signs)
    return table, findings.dropna(subset=["image"]), _ages(root / METADATA)


def _ages(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    table = read_table(path, AGES, optional=("age",)).dropna()
    ages = pd.to_numeric(table["age"].str.extract(r"^(\d{1,3})(?:\.\d+)?Y?$", expand=False), errors="coerce")
    known = ages.between(1, 130)
    if not known.any():
        log.warning('VinDr-Mammo: %s has no ages in its column "Patient\'s Age"', path)
    return dict(zip(table.loc[known, "image"], ages[known].astype(int), strict=True))


def _study(root: Path, images: Sequence[Any], of_image: Mapping[str, Any], ages: Mapping[str, int]) -> SourceStudy:
    numbers = count(1)
    views = tuple(_view(root, row, of_image.get(row.image, ()), numbers) for row in images)
    age = next((ages[row.image] for row in images if row.image in ages), None)
    return SourceStudy(images[0].study, images[0].study, views, age=age)


def _view(root: Path, row: Any, lines: Sequence[Any], numbers: Iterator[int]) -> SourceView:
    path = root / "images" / row.study / f"{row.image}.dicom"
    try:
        if row.again:
            raise Refused("duplicate", f"{BREASTS}: a row before this one names the same image")
        if not row.listed:
            raise Refused("label", f"{BREASTS}: has no row for this image, but {FINDINGS} has")
        cells = {column: read_code(row, column, CODES, UNDOCUMENTED) for column in CODES}
        findings = [finding for line in lines for finding in _findings(line, numbers)]
    except Refused as error:
        return SourceView(path, refused=error.pair)
    labels = Labels(cells["birads"], cells["density"])
    return SourceView(path, cells["laterality"], cells["view"], labels, tuple(findings))


def _findings(line: Any, numbers: Iterator[int]) -> list[Finding]:
    """One finding per category, all with the number and the box of the row."""
    kinds = [KINDS[category] for category in _categories(line) if category in KINDS]
    box = _box(line)
    number = next(numbers) if kinds else 0
    return [Finding(number, kind, box, shape=shape) for kind, shape in kinds]


def _categories(line: Any) -> list[str]:
    """The items of a list in Python's notation: "['Mass', 'Skin Retraction']"."""
    text = line.categories or ""
    inside = re.fullmatch(r"\[(.*)\]", text)
    words = [word.strip().strip("'\"") for word in (inside[1] if inside else text).split(",")]
    for word in words:
        if word not in KINDS and word not in SIGNS and word != NO_FINDING:
            raise Refused("label", f"{FINDINGS}: category {word[:40]!r} in row {line.line} is not documented")
    return words


def _box(line: Any) -> Box | None:
    corners = [getattr(line, corner) for corner in CORNERS]
    if corners == [None] * 4:
        return None
    try:
        x0, y0, x1, y1 = (float(corner) for corner in corners)
    except (TypeError, ValueError):
        x0 = y0 = x1 = y1 = math.nan
    if not (-math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf):
        raise Refused("label", f"{FINDINGS}: {', '.join(CORNERS)} of row {line.line} are no box")
    return x0, y0, x1, y1


def _without_identifier(root: Path, row: Any) -> SourceView:
    name = f"{row.study or 'no study'}/{row.image or 'no image'}"
    return SourceView(root / "images" / name, refused=("identifier", f"{BREASTS}: study_id or image_id is empty"))
