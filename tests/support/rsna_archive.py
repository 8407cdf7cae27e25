"""A made-up archive in the published layout of the source `rsna`, row by row."""

from __future__ import annotations

import csv
from pathlib import Path

TRAIN = """
    site_id patient_id image_id laterality view age cancer biopsy invasive BIRADS implant density machine_id
    difficult_negative_case
"""
TEST = "site_id patient_id image_id laterality view age implant machine_id prediction_id"


def row(patient: str, image: str, place: str = "LCC", **more: str) -> dict[str, str]:
    facts = {"age": "61", "cancer": "0", "biopsy": "0", "invasive": "0", "BIRADS": "1.0", "density": "C"}
    shared = {"site_id": "1", "patient_id": patient, "image_id": image, "implant": "0", "machine_id": "29"}
    return {**shared, "laterality": place[0], "view": place[1:], **facts, "difficult_negative_case": "False", **more}


def write(root: Path, name: str, header: str, *rows: dict[str, str]) -> Path:
    root.mkdir(exist_ok=True)
    with (root / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, header.split(), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return root
