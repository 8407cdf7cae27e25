"""A made-up archive in the published layout of the source `cbis_ddsm`, row by row."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from shards.schema import SourceView
from shards.sources.cbis_ddsm.studies import cbis_ddsm
from tests.support.archives import write_dicom

START = ["patient_id", "{density}", "left or right breast", "image view", "abnormality id", "abnormality type"]
END = ["assessment", "pathology", "subtlety", "image file path", "cropped image file path", "ROI mask file path"]
MASS = [*START, "mass shape", "mass margins", *END]
CALC = [*START, "calc type", "calc distribution", *END]
TABLES = [f"{kind}_case_description_{part}_set.csv" for kind in ("mass", "calc") for part in ("train", "test")]


def abnormality(folder: str, number: int = 1, first: str = "OVAL", second: str = "CIRCUMSCRIBED", **more: Any) -> Any:
    """A row: `first` and `second` are shape and margin of a mass, or type and distribution of calcifications."""
    kind, patient, side, view = (
        folder.replace("_P_", " P_").replace("_LEFT_", " LEFT ").replace("_RIGHT_", " RIGHT ").split()
    )
    mass = kind.startswith("Mass")
    uid = "1.3.6.1.4.1.9590.100.1.2"
    return {
        "patient_id": patient,
        "breast_density" if mass else "breast density": "3",
        "left or right breast": side,
        "image view": view,
        "abnormality id": str(number),
        "abnormality type": "mass" if mass else "calcification",
        "mass shape" if mass else "calc type": first,
        "mass margins" if mass else "calc distribution": second,
        "assessment": "4",
        "pathology": "BENIGN",
        "subtlety": "3",
        "image file path": f"{folder}/{uid}.1/{uid}.2/000000.dcm",
        "cropped image file path": f"{folder}_{number}/{uid}.3/{uid}.4/000000.dcm",
        "ROI mask file path": f"{folder}_{number}/{uid}.3/{uid}.4/000001.dcm\n",
        **more,
    }


def write_tables(root: Path, *rows: dict[str, str], spelled: str | None = None) -> Path:
    """Each row into the table that its folder's name tells; `spelled` is how all of them spell the density."""
    for name in TABLES:
        kind, part = name.split("_case_description_")
        density = spelled or ("breast_density" if kind == "mass" else "breast density")
        prefix = f"{kind.title()}-{'Training' if part.startswith('train') else 'Test'}_"
        with (root / name).open("w", newline="") as file:
            header = [column.format(density=density) for column in (MASS if kind == "mass" else CALC)]
            writer = csv.DictWriter(file, header, extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                if row["image file path"].startswith(prefix):
                    told = row.get("breast_density", row.get("breast density", ""))
                    writer.writerow({**row, density: told})
    return root


def image(
    root: Path, folder: str, name: str = "1-1", about: str | None = "full mammogram images", size: int = 8
) -> Path:
    """A file as TCIA's program lays it down, below a folder of a date and one of a series."""
    tags = {"ImageLaterality": None, "ViewPosition": None, "SeriesDescription": about, "PatientID": folder}
    path = root / "CBIS-DDSM" / folder / "07-20-2016-DDSM-NA-74994" / "1.000000-NA-24515" / f"{name}.dcm"
    return write_dicom(path, np.zeros((size, size), np.uint16), **tags)


def views_of(root: Path) -> dict[str, SourceView]:
    """By the folder of the file, which is the first one of its path in the archive."""
    views = [view for study in cbis_ddsm(root) for view in study.views]
    return {view.path.relative_to(root).parts[1] + "/" + view.path.stem: view for view in views}


def told(root: Path, *rows: dict[str, str]) -> dict[str, SourceView]:
    """What becomes of the mammograms that the rows are about."""
    for folder in {row["image file path"].split("/")[0] for row in rows}:
        image(root, folder)
    return {name.split("/")[0]: view for name, view in views_of(write_tables(root, *rows)).items()}
