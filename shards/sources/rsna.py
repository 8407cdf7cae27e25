"""RSNA Screening Mammography Breast Cancer Detection: the data of a Kaggle competition (Carr et al., 2022).

Documented at kaggle.com/competitions/rsna-breast-cancer-detection/data. Non-commercial use only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from shards.errors import Refused, ShardError
from shards.schema import DENSITIES, VIEWS, Labels, SourceStudy, SourceView
from shards.sources.common import agreed_age, read_code, unidentified
from shards.sources.tables import blank_unknown, groups, read_table, rows

log = logging.getLogger(__name__)

COLUMNS = {
    "patient_id": "patient",
    "image_id": "image",
    **{name: name for name in ("laterality", "view", "age", "cancer", "biopsy", "implant")},
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
IMPLANTS = {"0": False, "1": True}
UNDOCUMENTED = "column {column}: {text!r} in row {row.line} is not documented"


def rsna(root: Path) -> Iterator[SourceStudy]:
    """Yield one study per patient, sorted by patient.

    Files. `<root>/train.csv` lists `train_images/<patient_id>/<image_id>.dcm`; test.csv, if present, lists test_images,
    and has no labels. No column identifies exams. The documentation counts about as many exams as patients, so the
    images of a patient are one exam, and a screening exam. Its age is unknown if its rows disagree.

    Labels.
    - `cancer` is per breast. Pathology is malignant if `cancer` is 1, benign if it is 0 and there was a biopsy, else
      unknown. In which of its images a cancer is visible is not documented.
    - BI-RADS is 0, 1 or 2 and often empty. Density is empty at site 2.
    - `implant` is that of the image's row, if the table has the column; another value than 0 and 1 is unknown, and
      counted in the log. At site 1 it is of the patient: the breast itself may have none.
    - Machine, site and `difficult_negative_case` are not used.

    Refused or left out, by the first that applies:
    1. identifier: patient or image is empty; 2. duplicate: an earlier row names the same file;
    3. other-view: AT, LM, ML, LMO; 4. label: a cell has an undocumented value.
    Raises `ShardError` if train.csv or one of its columns is missing.
    """
    table = _images(root)
    nameless = table["patient"].isna() | table["image"].isna()
    for images in groups(table[~nameless], ["patient"]):
        yield _study(root, images)
    yield from unidentified(_without_identifier(root, row) for row in rows(table[nameless]))


def _images(root: Path) -> pd.DataFrame:
    if not (root / "train.csv").is_file():
        raise ShardError(f"pack.root: {root} must hold train.csv and train_images of the RSNA data set")
    parts = [read_table(root / "train.csv", COLUMNS, optional=("implant",)).assign(part="train")]
    if (root / "test.csv").is_file():
        parts.append(read_table(root / "test.csv", COLUMNS, optional=(*LABELS, "implant")).assign(part="test"))
    parts = [blank_unknown(part, CODES).assign(line=(part.index + 2).astype(str)) for part in parts]
    table = pd.concat(parts, ignore_index=True)
    # pandas writes whole numbers with a point if their column has empty cells.
    for column in ("patient", "image", "age", "cancer", "biopsy", "birads", "implant"):
        table[column] = table[column].map(lambda text: re.sub(r"\.0+$", "", text), na_action="ignore")
    if unknown := int((table["implant"].notna() & ~table["implant"].isin(list(IMPLANTS))).sum()):
        log.warning("RSNA: column implant: %d rows have undocumented values: their implants are unknown", unknown)
    table["again"] = table.duplicated(["part", "patient", "image"])
    return table


def _study(root: Path, images: Sequence[Any]) -> SourceStudy:
    views = tuple(_view(root, row) for row in images)
    patient = images[0].patient
    return SourceStudy(patient, patient, views, age=agreed_age(row.age for row in images), reason="screening")


def _view(root: Path, row: Any) -> SourceView:
    path = root / f"{row.part}_images" / row.patient / f"{row.image}.dcm"
    try:
        if row.again:
            raise Refused("duplicate", f"{row.part}.csv: row {row.line} names a file that a row before it names")
        if row.view is not None and row.view not in VIEWS:
            raise Refused("other-view", f"column view: {row.view[:40]!r} is not one of {', '.join(VIEWS)}")
        cells = {column: read_code(row, column, CODES, UNDOCUMENTED) for column in CODES}
    except Refused as error:
        return SourceView(path, refused=error.pair)
    return SourceView(path, cells["laterality"], row.view, _labels(cells), implant=IMPLANTS.get(row.implant))


def _labels(cells: Mapping[str, Any]) -> Labels:
    pathology = None
    if cells["cancer"]:
        pathology = "malignant"
    elif cells["cancer"] is False and cells["biopsy"]:
        pathology = "benign"
    return Labels(cells["birads"], cells["density"], cells["cancer"], pathology)


def _without_identifier(root: Path, row: Any) -> SourceView:
    message = f"{row.part}.csv: patient_id or image_id of row {row.line} is empty"
    return SourceView(root / f"{row.part}_images" / f"row {row.line}", refused=("identifier", message))
