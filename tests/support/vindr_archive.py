"""A made-up archive in the published layout of the source `vindr`, row by row."""

from __future__ import annotations

import csv
from pathlib import Path

from shards.schema import SourceStudy
from shards.sources.vindr import BREASTS, FINDINGS, vindr

HEADER = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split"
IMAGE = HEADER.split(",")
FINDING = [*IMAGE[:9], "finding_categories", "finding_birads"]
CORNERS = ["xmin", "ymin", "xmax", "ymax"]


def image(study: str, name: str, place: str = "LCC", **more: str) -> dict[str, str]:
    facts = {"height": "3518", "width": "2800", "breast_birads": "BI-RADS 2", "breast_density": "DENSITY C"}
    shared = {"study_id": study, "series_id": "s", "image_id": name, "split": "training"}
    return {**shared, "laterality": place[0], "view_position": place[1:], **facts, **more}


def finding(of: dict[str, str], categories: str, corners: str = "", birads: str = "BI-RADS 4") -> dict[str, str]:
    box = dict(zip(CORNERS, corners.split(), strict=False))
    return {**of, "finding_categories": categories, "finding_birads": birads, **box}


def write(path: Path, header: list[str], rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)


def read(root: Path, images: list[dict[str, str]], findings: list[dict[str, str]]) -> list[SourceStudy]:
    write(root / BREASTS, IMAGE, images)
    write(root / FINDINGS, [*FINDING, *CORNERS, "split"], findings)
    return list(vindr(root))
