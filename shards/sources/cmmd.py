"""CMMD, the Chinese Mammography Database (Cai et al., Scientific Data 10:123, 2023).

The Cancer Imaging Archive, DOI 10.7937/tcia.eqde-4b16, CC BY 4.0; its page documents files and table.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.progress import progress
from shards.schema import LATERALITIES, Finding, Labels, SourceStudy, SourceView
from shards.sources.common import agreed, agreed_age
from shards.sources.headers import dicom_files, read_header
from shards.sources.tables import blank_unknown, groups, read_table

log = logging.getLogger(__name__)

TABLE = "CMMD_clinicaldata_revision.xlsx"
COLUMNS = {
    "ID1": "patient",
    "LeftRight": "side",
    "Age": "age",
    "abnormality": "abnormality",
    "classification": "classification",
}
PATIENT = re.compile(r"D[12]-\d{4}")
PATHOLOGIES = ("benign", "malignant")
KINDS = {"mass": ("mass",), "calcification": ("calcification",), "both": ("mass", "calcification")}


@dataclass(frozen=True)
class Breast:
    """Labels and findings of all images of a breast, or the reason to refuse them."""

    labels: Labels
    findings: tuple[Finding, ...] = ()
    refused: tuple[str, str] | None = None


@dataclass(frozen=True)
class Patient:
    """The facts of the table: `breasts` by side, and the age in years if the rows agree."""

    breasts: Mapping[str, Breast]
    age: int | None = None


def cmmd(root: Path) -> Iterator[SourceStudy]:
    """Yield one study per patient, sorted by patient.

    Files. `<root>` holds CMMD_clinicaldata_revision.xlsx, and the DICOM files at any depth. The table lists breasts,
    not files. A file's patient is its PatientID, else the folder D1-0001 in its path; its side is ImageLaterality; the
    view is read from ViewCodeSequence when packing. A file without such a patient becomes a study of its own.

    Labels.
    - Pathology is `classification`, proven by biopsy, per breast: 30 patients have one benign and one malignant breast.
      The other breast of most D2 patients has images but no row: it is kept without labels, and is not taken for
      normal. There is no BI-RADS and no density.
    - `abnormality` is a finding without box on every view of the breast, or two for "both". It has the pathology of the
      breast, but for "both" in a malignant breast, where its pathology is unknown.
    - Molecular subtypes, and the list of wrong sides published later (TOMPEI-CMMD), are not used.

    Refused, all images of a breast, by the first that applies:
    1. label: a row of the patient names no breast, or a cell is undocumented; 2. label-conflict: its rows are benign
    and malignant. The table should have one row per breast, so either may be the mistake.
    Raises `ShardError` if the table, one of its columns, or all DICOM files are missing.
    """
    if not (root / TABLE).is_file():
        raise ShardError(f"pack.root: {root} must hold {TABLE} and the images of CMMD")
    files = dicom_files(root)
    if not files:
        raise ShardError(f"pack.root: {root} has no DICOM files")
    table = _clinical(root / TABLE)
    studies: dict[str, list[SourceView]] = defaultdict(list)
    for path in progress(files, len(files), "CMMD, headers", "files"):
        header = read_header(path, "PatientID", "ImageLaterality")
        name = _patient(path.relative_to(root), header["PatientID"])
        studies[name].append(_view(path, header["ImageLaterality"], table.get(name)))
    if absent := len(table.keys() - studies.keys()):
        log.warning("CMMD: %d patients of %s have no image in %s", absent, TABLE, root)
    for name, views in sorted(studies.items()):
        yield SourceStudy(name, name, tuple(views), age=table[name].age if name in table else None)


def _patient(path: Path, patient_id: str) -> str:
    return next(filter(PATIENT.fullmatch, (patient_id, *path.parts)), str(path))


def _view(path: Path, side: str, patient: Patient | None) -> SourceView:
    if side not in LATERALITIES:  # packing reads more attributes, and refuses the image if none states the side
        return SourceView(path)
    breast = patient.breasts.get(side) if patient else None
    if breast is None:
        return SourceView(path, side)
    if breast.refused:
        return SourceView(path, side, refused=breast.refused)
    return SourceView(path, side, labels=breast.labels, findings=breast.findings)


def _clinical(path: Path) -> dict[str, Patient]:
    table = blank_unknown(read_table(path, COLUMNS), {})
    table["row"] = table.index + 2
    for column in ("classification", "abnormality"):
        table[column] = table[column].str.lower()
    nameless = table["patient"].isna()
    if nameless.any():
        log.warning("CMMD: ID1 is empty in %d rows of %s", nameless.sum(), path)
    patients = {}
    of_patient: Any
    for of_patient in groups(table[~nameless], ["patient"]):
        breasts = {side: _breast(breast) for side in LATERALITIES if (breast := _rows_of(of_patient, side))}
        patients[of_patient[0].patient] = Patient(breasts, agreed_age(row.age for row in of_patient))
    return patients


def _rows_of(of_patient: Sequence[Any], side: str) -> list[Any]:
    """The rows of a breast; a row without a side may belong to either."""
    return [row for row in of_patient if row.side == side or row.side not in LATERALITIES]


def _breast(breast: Sequence[Any]) -> Breast:
    for row in breast:
        for column, known in (("side", LATERALITIES), ("classification", PATHOLOGIES), ("abnormality", KINDS)):
            text = getattr(row, column)
            if text not in known and (text or column == "side"):
                message = f"{TABLE}: {column} {text!r} in row {row.row} is not known"
                return Breast(Labels(), refused=("label", message))
    pathologies = {row.classification for row in breast} - {None}
    if len(pathologies) > 1:
        return Breast(Labels(), refused=("label-conflict", f"{TABLE}: calls this breast benign and malignant"))
    pathology = agreed(pathologies)
    labels = Labels(cancer=None if pathology is None else pathology == "malignant", pathology=pathology)
    return Breast(labels, _findings(breast, pathology))


def _findings(breast: Sequence[Any], pathology: str | None) -> tuple[Finding, ...]:
    kinds = {kind for row in breast for kind in KINDS.get(row.abnormality, ())}
    if len(kinds) > 1 and pathology == "malignant":
        pathology = None
    numbered = enumerate(sorted(kinds, reverse=True), 1)
    return tuple(Finding(number, kind, pathology=pathology) for number, kind in numbered)
