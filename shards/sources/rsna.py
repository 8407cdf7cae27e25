"""RSNA Screening Mammography Breast Cancer Detection (Carr et al., 2022), the data of a Kaggle competition.

Layout and columns: kaggle.com/competitions/rsna-breast-cancer-detection/data. For non-commercial purposes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from shards.schema import DENSITIES, VIEWS, Labels, Refused, ShardError, SourceStudy, SourceView
from shards.sources.tables import blank_unknown, groups, read_table, rows

COLUMNS = {
    "patient_id": "patient",
    "image_id": "image",
    "laterality": "laterality",
    "view": "view",
    "age": "age",
    "cancer": "cancer",
    "biopsy": "biopsy",
    "BIRADS": "birads",
    "density": "density",
}
LABELS = ("cancer", "biopsy", "birads", "density")
CODES: dict[str, dict[str, Any]] = {
    "laterality": {"L": "L", "R": "R"},
    "cancer": {"0": False, "1": True},
    "biopsy": {"0": False, "1": True},
    "birads": {"0": 0, "1": 1, "2": 2},  # needs follow-up, negative, normal
    "density": {letter: letter for letter in DENSITIES},
}


def rsna(root: Path) -> Iterator[SourceStudy]:
    """Yields one study per patient, sorted by patient: the rows of train.csv, and of test.csv where that is there.

    The files are `<root>/train_images/<patient_id>/<image_id>.dcm`, and in test_images those of test.csv, which has
    no labels. No column tells exams apart: the data set's description counts just under 20,000 exams, which is about
    its number of patients, so the images of a patient are taken for one exam. Where their ages differ it has none.

    - `cancer` is said of each image's breast. Pathology is malignant where it is 1, benign where it is 0 and there
      was a biopsy, and else not known. Which images it can be seen in is not said.
    - BIRADS is 0, 1 or 2 and often empty; density is empty at site 2.
    - The exams are screening exams. Implants, machine, site and the verdict "difficult" are not used.

    An image is refused or left out for the first of these that holds:
    1. identifier: patient or image is empty; 2. duplicate: a row before it names the same file;
    3. other-view: AT, LM, ML, LMO; 4. label: a cell has a value that the data set does not document.
    """
    table = _images(root)
    nameless = table["patient"].isna() | table["image"].isna()
    for images in groups(table[~nameless], ["patient"]):
        yield _study(root, images)
    if nameless.any():
        views = (_nameless(root, row) for row in rows(table[nameless]))
        yield SourceStudy("", "", tuple(views))


def _images(root: Path) -> pd.DataFrame:
    if not (root / "train.csv").is_file():
        raise ShardError(f"pack.root: {root} must hold train.csv and train_images of the RSNA data set")
    parts = [read_table(root / "train.csv", COLUMNS).assign(part="train")]
    if (root / "test.csv").is_file():
        parts.append(read_table(root / "test.csv", COLUMNS, optional=LABELS).assign(part="test"))
    parts = [blank_unknown(part, CODES).assign(line=(part.index + 2).astype(str)) for part in parts]
    table = pd.concat(parts, ignore_index=True)
    # A number has a point where its column has empty cells.
    for column in ("patient", "image", "age", "cancer", "biopsy", "birads"):
        table[column] = table[column].map(lambda text: re.sub(r"\.0+$", "", text), na_action="ignore")
    table["again"] = table.duplicated(["part", "patient", "image"])
    return table


def _study(root: Path, images: Sequence[Any]) -> SourceStudy:
    ages = {_age(row.age) for row in images} - {None}
    views = tuple(_view(root, row) for row in images)
    patient = images[0].patient
    return SourceStudy(patient, patient, views, age=ages.pop() if len(ages) == 1 else None, reason="screening")


def _view(root: Path, row: Any) -> SourceView:
    path = root / f"{row.part}_images" / row.patient / f"{row.image}.dcm"
    try:
        if row.again:
            raise Refused("duplicate", f"{row.part}.csv: row {row.line} names a file that a row before it names")
        if row.view is not None and row.view not in VIEWS:
            raise Refused("other-view", f"column view: {row.view[:40]!r} is not one of {', '.join(VIEWS)}")
        told = {column: _code(row, column) for column in CODES}
    except Refused as error:
        return SourceView(path, refused=(error.reason, str(error)))
    return SourceView(path, told["laterality"], row.view, _labels(told))


def _labels(told: Mapping[str, Any]) -> Labels:
    pathology = None
    if told["cancer"]:
        pathology = "malignant"
    elif told["cancer"] is False and told["biopsy"]:
        pathology = "benign"
    return Labels(told["birads"], told["density"], told["cancer"], pathology)


def _code(row: Any, column: str) -> Any:
    text = getattr(row, column)
    if text is not None and text not in CODES[column]:
        raise Refused("label", f"column {column}: {text[:40]!r} in row {row.line} is not documented")
    return CODES[column].get(text)


def _age(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"[1-9]\d?|1[0-2]\d", text) else None


def _nameless(root: Path, row: Any) -> SourceView:
    message = f"{row.part}.csv: patient_id or image_id of row {row.line} is empty"
    return SourceView(root / f"{row.part}_images" / f"row {row.line}", refused=("identifier", message))
