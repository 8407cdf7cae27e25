"""EMBED's regions of interest as boxes in the DICOM image, or none if their place is uncertain.

The radiologists' marks were detected in PNGs. The authors had made these from the DICOM files, mirrored left to right
if the row direction in PatientOrientation is P (their DCM_to_PNG notebook): this depends on the file, not on the side.
Tables of a later release also hold the regions in the DICOM image, which differ by that mirroring. The open release has
`ROI_coords` alone. Its README does not document the image they refer to, and users found them on the wrong side of some
DICOM images (issues 5 and 9 of the repository). "png" is the default because nearly all coordinates printed in the
authors' notebook lie in the left half of an image, where the PNGs have the breast, and because it places no box by a
guess.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from shards.schema import Box

Orientation = Literal["png", "dicom"]

NUMBER = r"\s*(\d{1,5}(?:\.\d{1,9})?)\s*"
REGION = re.compile(rf"[(\[]{NUMBER},{NUMBER},{NUMBER},{NUMBER},?\s*[)\]]")
MIRRORED = {"A": False, "P": True}  # first letter of PatientOrientation -> whether the PNG is mirrored


def regions_of(row: Any, orientation: Orientation) -> list[Box] | None:
    """The boxes of an image in pixels: empty if it has none, None if it has some in an uncertain place.

    1. `DCM_ROI_coords`, if present, refer to the DICOM image.
    2. `orientation` "png": `ROI_coords` refer to the PNG. They are mirrored by the width in `Columns` if
       `PatientOrientation` begins with P, kept if it begins with A, and uncertain if either is missing, as in the
       reduced table.
    3. `orientation` "dicom": `ROI_coords` refer to the DICOM image, for users who have verified that.
    Also uncertain: a text that is no list of regions, a count other than `num_roi`, and a box outside of the image.
    """
    text, flips = row.dicom_regions, False
    if text is None:
        text, flips = row.regions, orientation == "png"
    boxes = _parse(text or "")
    if not boxes:
        return boxes
    if row.regions_counted not in (None, str(len(boxes))):
        return None
    if flips:
        boxes = _unmirrored(boxes, row)
    return boxes if boxes and all(_fits(box, row) for box in boxes) else None


def _parse(text: str) -> list[Box] | None:
    """The boxes in a text `((ymin, xmin, ymax, xmax),)`, nested at will, with round or square brackets."""
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
