"""A made-up archive in the published layout of the source `embed`, row by row."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from shards.schema import SourceStudy
from shards.sources.embed.studies import embed

NAS = "/mnt/NAS2/mammo/anon_dicom"
# The columns of the reduced tables, and those of the full ones that decide about something.
CLINICAL = """
    empi_anon acc_anon study_date_anon desc tissueden asses numfind side total_L_find total_R_find massshape massmargin
    massdens calcfind calcdistri calcnumber implanfind bside path_severity RACE_DESC ETHNICITY_DESC ETHNIC_GROUP_DESC
    age_at_study
"""
FILES = """
    empi_anon acc_anon study_date_anon StudyDescription SeriesDescription FinalImageType ImageLateralityFinal
    ViewPosition spot_mag num_roi ROI_coords SRC_DST match_level anon_dicom_path PatientOrientation Rows Columns
"""


def finding(exam: str, side: str = "", asses: str = "N", **more: str) -> dict[str, str]:
    """A clinical row as the tables hold it: numbers with a point where their column has empty cells."""
    shared = {"empi_anon": "900", "acc_anon": exam, "desc": "MG Screen Bilat w/Tomo/CAD Stnd Protocol"}
    facts = {"tissueden": "2.0", "numfind": "1", "calcnumber": "0", "age_at_study": "52.9"}
    return {**dict.fromkeys(CLINICAL.split(), ""), **shared, **facts, "side": side, "asses": asses, **more}


def image(exam: str, side: str, view: str = "CC", name: str = "", **more: str) -> dict[str, str]:
    path = f"{NAS}/cohort_1/900/{exam}/{name or side + view}.dcm"
    shared = {"empi_anon": "900", "acc_anon": exam, "anon_dicom_path": path, "FinalImageType": "2D"}
    facts = {"PatientOrientation": "['P', 'R']", "Rows": "3328", "Columns": "2560", "num_roi": "0", "ROI_coords": "()"}
    place = {"ImageLateralityFinal": side, "ViewPosition": view}
    return {**dict.fromkeys(FILES.split(), ""), **shared, **facts, **place, **more}


def write(root: Path, clinical: list[dict[str, str]], files: list[dict[str, str]], suffix: str = "") -> Path:
    (root / "tables").mkdir(parents=True, exist_ok=True)
    for kind, rows, columns in (("clinical", clinical, CLINICAL.split()), ("metadata", files, FILES.split())):
        extra = {name: None for row in rows for name in row if name not in columns}
        with (root / "tables" / f"EMBED_OpenData_{kind}{suffix}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["", *columns, *extra])  # the first column has no name
            writer.writeheader()
            writer.writerows(rows)
    return root


def read(root: Path, clinical: list[dict[str, str]], files: list[dict[str, str]], **options: Any) -> list[SourceStudy]:
    return list(embed(write(root, clinical, files), **options))
