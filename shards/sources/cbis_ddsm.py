"""CBIS-DDSM: digitised film mammograms as DICOM (Lee et al., Scientific Data 4:170177, 2017).

The Cancer Imaging Archive, DOI 10.7937/K9/TCIA.2016.7O02S9CY, CC BY 3.0: cite it where results are shown.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from shards.header import find_laterality, find_view
from shards.schema import Finding, Labels, ShardError, SourceStudy, SourceView

# PatientID names the case, the patient and the view; a trailing number marks a lesion's crop or mask.
PATIENT_ID = re.compile(r"(?:Mass|Calc)-(?:Training|Test)_(P_\d+)_(LEFT|RIGHT)_(CC|MLO)(_\d+)?")
HEADER = ("PatientID", "Laterality", "ImageLaterality", "ViewPosition", "PatientOrientation")

BENIGN_B = Labels(density="B", cancer=False, pathology="benign")
BENIGN_C = Labels(density="C", cancer=False, pathology="benign")
MALIGNANT_C = Labels(density="C", cancer=True, pathology="malignant", birads=5)
SPICULATED_MASS = Finding(number=1, kind="mass", margin="spiculated", pathology="malignant")

# (patient, side) -> what the data set's case descriptions say of the two patients in the package `mammograms`.
FACTS: dict[tuple[str, str], tuple[Labels, tuple[Finding, ...]]] = {
    ("P_00173", "L"): (BENIGN_B, ()),
    ("P_00173", "R"): (BENIGN_B, ()),
    ("P_00820", "L"): (MALIGNANT_C, (SPICULATED_MASS,)),
    ("P_00820", "R"): (BENIGN_C, ()),
}


def cbis_ddsm(root: Path) -> Iterator[SourceStudy]:
    """Yields the full mammograms in any folder of CBIS-DDSM's DICOM files, one study per patient.

    Every view has a PatientID and a StudyInstanceUID of its own, so views are grouped by the
    patient's number. Lesion crops and ROI masks are left out. A file without such a PatientID or
    that is no DICOM file becomes a study by itself, for the builder to judge. Labels are known for
    the patients in `FACTS` only. Raises `ShardError` where `root` holds no DICOM file.
    """
    files = sorted(root.rglob("*.dcm"))
    if not files:
        raise ShardError(f"root: {root} is no folder with *.dcm files of CBIS-DDSM")
    patients: dict[str, list[SourceView]] = defaultdict(list)
    for path in files:
        header = _header(path)
        match = PATIENT_ID.fullmatch(str(header.get("PatientID", "")))
        if match is None:
            patients[str(path.relative_to(root))].append(SourceView(path))
        elif match[4] is None:
            patients[match[1]].append(_view(path, header, match))
    for patient, views in sorted(patients.items()):
        yield SourceStudy(patient_id=patient, study_id=patient, views=tuple(views))


def _view(path: Path, header: Dataset, match: re.Match[str]) -> SourceView:
    side = find_laterality(header) or match[2][0]
    labels, findings = FACTS.get((match[1], side), (Labels(), ()))
    return SourceView(path, side, find_view(header) or match[3], labels, findings)


def _header(path: Path) -> Dataset:
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER))
    except (InvalidDicomError, OSError, EOFError):
        return Dataset()
