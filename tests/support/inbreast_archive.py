"""A made-up archive in the published layout of the source `inbreast`, row by row."""

from __future__ import annotations

import plistlib
from pathlib import Path

from shards.schema import SourceStudy
from shards.sources.inbreast import IMAGES, OUTLINES, TABLE, inbreast

HEADER = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads"
ANN, EVE = "5291e1aee2bbf5df", "6c613a14b80a8591"
SQUARE = ["(10.5, 20.25)", "(30.0, 20.25)", "(30.0, 60.75)", "(10.5, 60.75)"]


def row(
    file: str, place: str = "LCC", date: str = "201001", density: str = "2", birads: str = "2", age: str = "removed"
) -> str:
    return f"removed;{age};{place[:1]};{place[1:]};{date};{file};{density};{birads}"


def image(root: Path, file: str, place: str = "L_CC", patient: str = ANN) -> Path:
    path = root / IMAGES / f"{file}_{patient}_MG_{place}_ANON.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def outlines(root: Path, file: str, *marks: tuple[str | None, list[str]]) -> None:
    """An XML file as OsiriX exports it; a name of None is left out."""
    rois = [
        {
            "Area": 1.5,
            "Center": "(0.0, 0.0, 0.0)",
            "IndexInImage": number,
            **({} if name is None else {"Name": name}),
            "NumberOfPoints": len(points),
            "Point_mm": ["(0.1, 0.2, 0.0)"] * len(points),
            "Point_px": points,
            "Type": 15,
        }
        for number, (name, points) in enumerate(marks)
    ]
    document = {"Images": [{"ImageIndex": 0, "NumberOfROIs": len(rois), "ROIs": rois}]}
    (root / OUTLINES).mkdir(exist_ok=True)
    (root / OUTLINES / f"{file}.xml").write_bytes(plistlib.dumps(document))


def read(root: Path, *rows: str) -> list[SourceStudy]:
    for folder in (IMAGES, OUTLINES):
        (root / folder).mkdir(exist_ok=True)
    (root / TABLE).write_text("\n".join([HEADER, *rows]) + "\n")
    return list(inbreast(root))


def document(body: str, doctype: str = "") -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>{doctype}<plist version="1.0">{body}</plist>'
