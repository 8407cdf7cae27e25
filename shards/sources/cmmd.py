"""CMMD, the Chinese Mammography Database (Cai et al., Scientific Data 10:123, 2023).

The Cancer Imaging Archive, DOI 10.7937/tcia.eqde-4b16, CC BY 4.0: its page documents the files and the clinical table.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.progress import progress
from shards.schema import LATERALITIES, Finding, Labels, ShardError, SourceStudy, SourceView
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
    labels: Labels
    findings: tuple[Finding, ...] = ()
    refused: tuple[str, str] | None = None


@dataclass(frozen=True)
class Patient:
    """What the table says: `breasts` by side, and the age where its rows agree about it."""

    breasts: Mapping[str, Breast]
    age: int | None = None


def cmmd(root: Path) -> Iterator[SourceStudy]:
    """Yields one study a patient, sorted by patient, from the DICOM files at any depth below `root`.

    `root` itself holds CMMD_clinicaldata_revision.xlsx. It names breasts, not files: the patient of a file is its
    PatientID, else the folder D1-0001 in its path, and its breast is its ImageLaterality. The view is left to the
    builder, which finds it in the ViewCodeSequence. A file of no such patient becomes a study by itself, for the
    builder to judge.

    - Pathology is `classification`, proven by biopsy, and it is of the breast: 30 patients have a benign and a
      malignant one. The other breast of most patients in D2 has images and no row: they are kept, without labels,
      and not taken for normal. BI-RADS and density are not in the data set.
    - `abnormality` makes a finding without a box on every view of the breast, or two where it is "both". Its
      pathology is that of the breast, but not known for "both" in a malignant breast.
    - Molecular subtypes are not used, nor the list of mistaken sides that was published later (TOMPEI-CMMD).

    The images of a breast are refused for the first of these that holds:
    1. label: a row of the patient names no breast, or a cell is not documented;
    2. label-conflict: its rows call it benign and malignant. The table means to have one row a breast, so nobody
    knows which of them is a mistake.
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


def _patient(path: Path, told: str) -> str:
    return next(filter(PATIENT.fullmatch, (told, *path.parts)), str(path))


def _view(path: Path, side: str, patient: Patient | None) -> SourceView:
    if side not in LATERALITIES:  # the builder looks in other places of the header, and refuses where there is none
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
        ages = {_age(row.age) for row in of_patient} - {None}
        breasts = {side: _breast(breast) for side in LATERALITIES if (breast := _rows_of(of_patient, side))}
        patients[of_patient[0].patient] = Patient(breasts, ages.pop() if len(ages) == 1 else None)
    return patients


def _rows_of(of_patient: Sequence[Any], side: str) -> list[Any]:
    """The rows of a breast; one that does not say of which it is may be of either."""
    return [row for row in of_patient if row.side == side or row.side not in LATERALITIES]


def _breast(breast: Sequence[Any]) -> Breast:
    for row in breast:
        for column, known in (("side", LATERALITIES), ("classification", PATHOLOGIES), ("abnormality", KINDS)):
            text = getattr(row, column)
            if text not in known and (text or column == "side"):
                return Breast(Labels(), refused=("label", f"{TABLE}: {column} {text!r} in row {row.row} is not known"))
    told = {row.classification for row in breast} - {None}
    if len(told) > 1:
        return Breast(Labels(), refused=("label-conflict", f"{TABLE}: calls this breast benign and malignant"))
    pathology = told.pop() if told else None
    labels = Labels(cancer=None if pathology is None else pathology == "malignant", pathology=pathology)
    return Breast(labels, _findings(breast, pathology))


def _findings(breast: Sequence[Any], pathology: str | None) -> tuple[Finding, ...]:
    named = {kind for row in breast for kind in KINDS.get(row.abnormality, ())}
    if len(named) > 1 and pathology == "malignant":
        pathology = None
    return tuple(
        Finding(number, kind, pathology=pathology) for number, kind in enumerate(sorted(named, reverse=True), 1)
    )


def _age(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"[1-9]\d?|1[0-2]\d", text) else None
