"""An image file as it is stored, and as a model sees it: the picture code that packing and predicting share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from shards.errors import Refused
from shards.image.header import find_laterality, find_view
from shards.image.picture import Picture, PictureConfig, read_picture
from shards.schema import LATERALITIES, VIEWS


@dataclass(frozen=True)
class StoredImage:
    """`data` is the picture as JPEG or PNG. `header` is empty for a file that is not DICOM."""

    picture: Picture
    header: Dataset
    laterality: str | None  # L | R; None: not known
    view: str | None  # CC | MLO
    conflicts: tuple[str, ...]  # words of CONFLICTS
    data: bytes


def stored_image(
    path: Path,
    config: PictureConfig,
    quality: int | None,
    laterality: str | None = None,
    view: str | None = None,
    must_know: bool = True,
) -> StoredImage:
    """Read, crop and encode an image file; `quality` is that of JPEG, and None gives lossless PNG.

    `laterality` and `view` are those of a table, which win over the header: people have checked it, while headers are
    often wrong. Raises `Refused` as `read_picture`; for a view that is not stored; and, if both `must_know`, for an
    image whose side or view neither states.
    """
    picture = read_picture(path, config, laterality)
    header = picture.header if picture.header is not None else Dataset()
    side, position, conflicts = _side_and_view(laterality, view, header, must_know)
    return StoredImage(picture, header, side, position, conflicts, encode(picture, quality))


def _side_and_view(
    laterality: str | None, view: str | None, header: Dataset, must_know: bool
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """(laterality, view, words of CONFLICTS)."""
    conflicts = []
    known: dict[str, str] = {}
    for name, of_table, find in (("laterality", laterality, find_laterality), ("view", view, find_view)):
        try:
            of_header = find(header)
        except Refused:
            if of_table is None:
                raise
            of_header = "several"
        if of_table and of_header and of_table != of_header:
            conflicts.append(name)
        known[name] = of_table or of_header or ""
    if must_know and known["laterality"] not in LATERALITIES:
        raise Refused("laterality", "neither the table nor the header has the laterality")
    if must_know and not known["view"]:
        raise Refused("view", f"neither the table nor the header has the view, one of {', '.join(VIEWS)}")
    if known["view"] and known["view"] not in VIEWS:
        reason = "spot" if known["view"] == "spot" else "other-view"
        raise Refused(reason, f"the view is {known['view'][:40]!r}, not one of {', '.join(VIEWS)}")
    return known["laterality"] or None, known["view"] or None, tuple(conflicts)


def encode(picture: Picture, quality: int | None) -> bytes:
    """The picture as JPEG of this quality; None: as PNG. Raises `Refused` ("encode")."""
    suffix, options = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality]) if quality else (".png", [])
    pixels: NDArray[Any] = picture.pixels
    ok, data = cv2.imencode(suffix, pixels, options)
    if not ok:
        raise Refused("encode", f"an image of {picture.geometry.size} could not be encoded as {suffix}")
    return data.tobytes()
