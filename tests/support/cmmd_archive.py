"""A made-up archive in the published layout of the source `cmmd`, row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from shards.sources.cmmd import TABLE
from tests.support.archives import coded, write_dicom

COLUMNS = ["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]
CC, MLO = "399162004", "399368009"  # SNOMED CT


def write_table(root: Path, *rows: tuple[object, ...]) -> Path:
    """Rows (patient, side, age, abnormality, classification)."""
    full = [(patient, side, age, 2, seen, told, None) for patient, side, age, seen, told in rows]
    pd.DataFrame(full, columns=COLUMNS).to_excel(root / TABLE, index=False)
    return root


def image(root: Path, patient: str, side: str | None, name: str = "1-1", view: str = CC, **tags: object) -> Path:
    path = root / "CMMD" / patient / "07-18-2010-NA-NA-79377" / "1.000000-NA-70244" / f"{name}.dcm"
    place = {"ImageLaterality": side, "ViewPosition": None, "ViewCodeSequence": [coded(view)]}
    return write_dicom(path, np.zeros((8, 8), np.uint16), **{"PatientID": patient, **place, **tags})
