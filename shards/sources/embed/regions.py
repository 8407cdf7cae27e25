"""EMBED's regions of interest as boxes in the DICOM image, or none where their place is not certain.

The radiologists' marks were found in PNGs, which the authors had made from the DICOM files and mirrored left to
right where the row direction in PatientOrientation is P (their DCM_to_PNG notebook): so that depends on the file,
not on the side of the breast. Tables of a later release hold the regions of the DICOM image, too; their coordinates
differ by that mirroring. The open release has `ROI_coords` alone. Its README does not say in which image these
are, and users found them on the wrong side of some DICOM images (issues 5 and 9 of the repository). "png" is the
default because nearly all coordinates that the authors' notebook prints lie in the left half of an image, where the
PNGs have the breast, and because it places nothing by a guess.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from shards.schema import Box

Orientation = Literal["png", "dicom"]

NUMBER = r"\s*(\d{1,5}(?:\.\d{1,9})?)\s*"
REGION = re.compile(rf"[(\[]{NUMBER},{NUMBER},{NUMBER},{NUMBER},?\s*[)\]]")
MIRRORED = {"A": False, "P": True}  # by the direction in which the columns of the DICOM image go


def regions_of(row: Any, orientation: Orientation) -> list[Box] | None:
    """The boxes of an image; empty where it has none, None where it has some and their place is not certain.

    1. `DCM_ROI_coords`, where the table has them, are in pixels of the DICOM image.
    2. `orientation` "png": `ROI_coords` are in pixels of the PNG. They are mirrored back with the width in
       `Columns` where `PatientOrientation` begins with P, kept where it begins with A, and not placed where one
       of them is missing, as in the reduced table.
    3. "dicom": `ROI_coords` are in pixels of the DICOM image, for who has looked at them and knows.
    A text that is no list of regions, a number of them other than `num_roi`, and a box outside of the image are
    not placed either.
    """
    text, flips = row.dicom_regions, False
    if text is None:
        text, flips = row.regions, orientation == "png"
    found = _parse(text or "")
    if not found:
        return found
    if row.regions_counted not in (None, str(len(found))):
        return None
    if flips:
        found = _unmirrored(found, row)
    return found if found and all(_fits(box, row) for box in found) else None


def _parse(text: str) -> list[Box] | None:
    """`((ymin, xmin, ymax, xmax),)`, of any depth and with either kind of bracket."""
    if re.sub(r"[\[\]()\s,]", "", REGION.sub("", text)):
        return None
    corners = [tuple(map(float, match)) for match in REGION.findall(text)]
    return [(x0, y0, x1, y1) for y0, x0, y1, x1 in corners]


def _unmirrored(boxes: list[Box], row: Any) -> list[Box] | None:
    direction = re.findall("[A-Z]+", row.orientation or "")[:1]
    mirrored = MIRRORED.get(direction[0]) if direction else None
    width = _length(row.width)
    if mirrored is None or width is None:
        return None
    return [(width - x1, y0, width - x0, y1) for x0, y0, x1, y1 in boxes] if mirrored else boxes


def _fits(box: Box, row: Any) -> bool:
    x0, y0, x1, y1 = box
    width, height = _length(row.width), _length(row.height)
    return 0 <= x0 < x1 and 0 <= y0 < y1 and (width is None or x1 <= width) and (height is None or y1 <= height)


def _length(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and len(text) <= 5 else None
